//! Packets that Linux's rdma_rxe sent: each one parses, has the right ICRC, and is emitted to the same bytes.

mod common;

use common::frames;
use hyv_roce::{
    icrc::{Flow, solve_ident},
    mad::{
        self, Mad, Message, TransportType,
        rdma_cm::{self, PortSpace},
    },
    wire::{Packet, Repr, ethernet, ip, udp},
};

fn check(name: &str, expect: usize) {
    let mut seen = 0;
    for (n, frame) in frames(name).iter().enumerate() {
        let (eth, rest) = ethernet::Ethernet::parse(frame).unwrap();
        let mut emitted = frame.clone();
        eth.emit(&mut emitted);
        let (src, dst, ident, datagram) = match eth.ethertype {
            ethernet::IPV4 => {
                let (v4, rest) = ip::V4::parse(rest).unwrap();
                v4.emit(&mut emitted[14..]);
                (ip::map_v4(v4.src), ip::map_v4(v4.dst), v4.ident, rest)
            }
            ethernet::IPV6 => {
                let (v6, rest) = ip::V6::parse(rest).unwrap();
                v6.emit(&mut emitted[14..]);
                if v6.next_header != ip::UDP {
                    continue;
                }
                (v6.src, v6.dst, 0, rest)
            }
            _ => continue,
        };
        if eth.ethertype == ethernet::IPV4 && frame[23] != ip::UDP {
            continue;
        }
        let (udp, bytes) = udp::Udp::parse(datagram).unwrap();
        if udp.dst_port != 4791 {
            continue;
        }
        assert_eq!(&emitted, frame, "packet {n}");
        let flow = Flow::new(&src, &dst, udp.src_port);
        assert!(flow.check(bytes, ident), "packet {n}: ICRC");
        if flow.is_v4() {
            assert_eq!(
                solve_ident(flow.residual(bytes, 0), bytes.len()),
                Some(ident)
            );
        }
        let packet = Packet::new_checked(bytes).unwrap();
        let repr = packet.repr().unwrap();
        let mut again = vec![0xaa; repr.buffer_len(packet.payload().len())];
        repr.emit(packet.payload(), &mut again);
        flow.seal(&mut again, ident);
        assert_eq!(again, bytes, "packet {n}");
        if repr.bth.dest_qpn == mad::GSI_QPN {
            check_mad(&repr, packet.payload());
        }
        seen += 1;
    }
    assert_eq!(seen, expect, "{name}");
}

fn check_mad(repr: &Repr, payload: &[u8]) {
    let deth = repr.ext.deth().unwrap();
    assert_eq!((deth.qkey, deth.src_qpn), (mad::GSI_QKEY, mad::GSI_QPN));
    let parsed = Mad::parse(payload).unwrap();
    assert_eq!(parsed.to_bytes(), payload, "{parsed:?}");
    assert_eq!(parsed.method, mad::METHOD_SEND);
    let (service_id, private) = match &parsed.message {
        Message::Req(req) => {
            assert_eq!(req.transport, TransportType::Rc);
            (req.service_id, &req.private[..])
        }
        Message::SidrReq(req) => (req.service_id, &req.private[..]),
        Message::Other { attribute, .. } => panic!("attribute {attribute:#06x}"),
        _ => return,
    };
    let (space, _) = rdma_cm::port_of(service_id).unwrap();
    assert!(matches!(space, PortSpace::Tcp | PortSpace::Udp));
    let (header, user) = rdma_cm::Header::parse(private).unwrap();
    let mut again = private.to_vec();
    header.emit(&mut again);
    assert_eq!(again, private);
    assert!(ip::mapped_v4(&header.src).is_some() && user.len() >= rdma_cm::USER_REQ);
}

#[test]
fn vec() {
    check("vec.pcap", 296);
}

#[test]
fn pingpong() {
    check("pingpong.pcap", 3743);
}

#[test]
fn cm() {
    check("cm.pcap", 108);
}
