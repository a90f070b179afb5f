//! Round trips of everything that can be emitted, and any bytes at all into everything that parses.

mod common;

use common::{A, A6, B, B6};
use hyv_roce::{
    checks,
    icrc::Flow,
    mad::{
        Drep, Dreq, Mad, Message, Mra, Path, Rej, RejectReason, Rejected, Rep, Req, Rtu, SidrRep,
        SidrReq, SidrStatus, TransportType,
        rdma_cm::{self, PortSpace},
    },
    wire::{
        Aeth, AtomicEth, Bth, Deth, Extension, Layout, Opcode, Packet, Repr, Reth, Syndrome,
        ethernet, grh, ip, udp,
    },
};
use proptest::{array::uniform, collection::vec, prelude::*};

const QPN: std::ops::Range<u32> = 0..1 << 24;

fn extension(layout: Layout) -> BoxedStrategy<Extension> {
    let imm = any::<u32>();
    let reth = any::<(u64, u32, u32)>().prop_map(|(address, rkey, dma_len)| Reth {
        address,
        rkey,
        dma_len,
    });
    let aeth = (any::<u8>(), QPN).prop_map(|(syndrome, msn)| Aeth {
        syndrome: Syndrome::from_byte(syndrome),
        msn,
    });
    let deth = (any::<u32>(), any::<u8>(), QPN).prop_map(|(qkey, reserved, src_qpn)| Deth {
        qkey,
        reserved,
        src_qpn,
    });
    match layout {
        Layout::None => Just(Extension::None).boxed(),
        Layout::Imm => imm.prop_map(Extension::Imm).boxed(),
        Layout::Ieth => imm.prop_map(Extension::Ieth).boxed(),
        Layout::Reth => reth.prop_map(Extension::Reth).boxed(),
        Layout::RethImm => (reth, imm)
            .prop_map(|(r, i)| Extension::RethImm(r, i))
            .boxed(),
        Layout::Aeth => aeth.prop_map(Extension::Aeth).boxed(),
        Layout::AethAtomicAck => (aeth, any::<u64>())
            .prop_map(|(a, v)| Extension::AethAtomicAck(a, v))
            .boxed(),
        Layout::Atomic => any::<(u64, u32, u64, u64)>()
            .prop_map(|(address, rkey, swap_add, compare)| {
                Extension::Atomic(AtomicEth {
                    address,
                    rkey,
                    swap_add,
                    compare,
                })
            })
            .boxed(),
        Layout::Deth => deth.prop_map(Extension::Deth).boxed(),
        Layout::DethImm => (deth, imm)
            .prop_map(|(d, i)| Extension::DethImm(d, i))
            .boxed(),
    }
}

fn repr() -> impl Strategy<Value = (Repr, Vec<u8>)> {
    (0..Opcode::ALL.len()).prop_flat_map(|i| {
        let opcode = Opcode::ALL[i];
        let info = opcode.info();
        let payload = vec(any::<u8>(), if info.payload { 0..600 } else { 0..1 });
        let bits = any::<(bool, bool, u16, bool, bool, bool)>();
        let numbers = (0..64u8, QPN, 0..128u8, QPN);
        (extension(info.layout), payload, bits, numbers).prop_map(
            move |(ext, payload, bits, numbers)| {
                let (solicited, migreq, pkey, fecn, becn, ack_req) = bits;
                let (reserved6, dest_qpn, reserved7, psn) = numbers;
                let mut repr = Repr {
                    bth: Bth {
                        opcode,
                        solicited,
                        migreq,
                        pad: 0,
                        pkey,
                        fecn,
                        becn,
                        reserved6,
                        dest_qpn,
                        ack_req,
                        reserved7,
                        psn,
                    },
                    ext,
                };
                repr.set_pad(payload.len());
                (repr, payload)
            },
        )
    })
}

fn path() -> impl Strategy<Value = Path> {
    let addresses = any::<(u16, u16, [u8; 16], [u8; 16])>();
    let rest = (
        0..1u32 << 20,
        0..64u8,
        any::<u8>(),
        any::<u8>(),
        0..16u8,
        any::<bool>(),
        0..32u8,
    );
    (addresses, rest).prop_map(
        |((local_lid, remote_lid, local_gid, remote_gid), rest)| Path {
            local_lid,
            remote_lid,
            local_gid,
            remote_gid,
            flow_label: rest.0,
            packet_rate: rest.1,
            traffic_class: rest.2,
            hop_limit: rest.3,
            sl: rest.4,
            subnet_local: rest.5,
            local_ack_timeout: rest.6,
        },
    )
}

fn req() -> impl Strategy<Value = Message> {
    let transport = prop_oneof![
        Just(TransportType::Rc),
        Just(TransportType::Uc),
        Just(TransportType::Rd),
        Just(TransportType::Extended)
    ];
    let ids = any::<(u32, u64, u64, u32, u8, u8, u16)>();
    let qpns = (QPN, QPN, QPN, QPN);
    let small = (0..32u8, 0..32u8, 0..8u8, 0..16u8, 0..8u8, 0..16u8, 0..8u8);
    let bits = any::<(bool, bool, bool)>();
    let rest = (path(), path(), uniform::<_, 92>(any::<u8>()));
    (ids, qpns, small, bits, transport, rest).prop_map(
        |(ids, qpns, small, bits, transport, rest)| {
            Message::Req(Req {
                local_comm_id: ids.0,
                service_id: ids.1,
                local_ca_guid: ids.2,
                local_qkey: ids.3,
                local_qpn: qpns.0,
                responder_resources: ids.4,
                local_eecn: qpns.1,
                initiator_depth: ids.5,
                remote_eecn: qpns.2,
                remote_cm_timeout: small.0,
                transport,
                flow_control: bits.0,
                starting_psn: qpns.3,
                local_cm_timeout: small.1,
                retry_count: small.2,
                pkey: ids.6,
                path_mtu: small.3,
                rdc_exists: bits.1,
                rnr_retry_count: small.4,
                max_cm_retries: small.5,
                srq: bits.2,
                extended_transport: small.6,
                primary: rest.0,
                alternate: rest.1,
                private: rest.2,
            })
        },
    )
}

fn rejected() -> impl Strategy<Value = Rejected> {
    prop_oneof![
        Just(Rejected::Req),
        Just(Rejected::Rep),
        Just(Rejected::Other),
        Just(Rejected::Reserved)
    ]
}

fn bytes<const N: usize>() -> impl Strategy<Value = [u8; N]> {
    uniform::<_, N>(any::<u8>())
}

fn message() -> impl Strategy<Value = Message> {
    let ids = any::<(u32, u32)>();
    let mra = (ids, rejected(), 0..32u8, bytes()).prop_map(|(ids, message, timeout, private)| {
        Message::Mra(Mra {
            local_comm_id: ids.0,
            remote_comm_id: ids.1,
            message,
            service_timeout: timeout,
            private,
        })
    });
    let rej = (ids, rejected(), 0..128u8, any::<u16>(), bytes(), bytes()).prop_map(
        |(ids, message, info_len, reason, info, private)| {
            Message::Rej(Rej {
                local_comm_id: ids.0,
                remote_comm_id: ids.1,
                message,
                info_len,
                reason: RejectReason(reason),
                info,
                private,
            })
        },
    );
    let numbers = (
        any::<(u32, u8, u8, u64)>(),
        QPN,
        QPN,
        QPN,
        0..32u8,
        0..4u8,
        0..8u8,
    );
    let rep = (ids, numbers, any::<(bool, bool)>(), bytes()).prop_map(
        |(ids, n, (flow_control, srq), private)| {
            Message::Rep(Rep {
                local_comm_id: ids.0,
                remote_comm_id: ids.1,
                local_qkey: n.0.0,
                local_qpn: n.1,
                local_eecn: n.2,
                starting_psn: n.3,
                responder_resources: n.0.1,
                initiator_depth: n.0.2,
                target_ack_delay: n.4,
                failover: n.5,
                flow_control,
                rnr_retry_count: n.6,
                srq,
                local_ca_guid: n.0.3,
                private,
            })
        },
    );
    let rtu = (ids, bytes()).prop_map(|(ids, private)| {
        Message::Rtu(Rtu {
            local_comm_id: ids.0,
            remote_comm_id: ids.1,
            private,
        })
    });
    let dreq = (ids, QPN, bytes()).prop_map(|(ids, remote_qpn, private)| {
        Message::Dreq(Dreq {
            local_comm_id: ids.0,
            remote_comm_id: ids.1,
            remote_qpn,
            private,
        })
    });
    let drep = (ids, bytes()).prop_map(|(ids, private)| {
        Message::Drep(Drep {
            local_comm_id: ids.0,
            remote_comm_id: ids.1,
            private,
        })
    });
    let sidr_req = (any::<(u32, u16, u64)>(), bytes()).prop_map(|(n, private)| {
        Message::SidrReq(SidrReq {
            request_id: n.0,
            pkey: n.1,
            service_id: n.2,
            private,
        })
    });
    let sidr_rep = (any::<(u32, u8, u8, u64, u32)>(), QPN, bytes(), bytes()).prop_map(
        |(n, qpn, info, private)| {
            Message::SidrRep(SidrRep {
                request_id: n.0,
                status: SidrStatus(n.1),
                info_len: n.2,
                qpn,
                service_id: n.3,
                qkey: n.4,
                info,
                private,
            })
        },
    );
    let other = (0x0019u16..0x00ff, bytes())
        .prop_map(|(attribute, data)| Message::Other { attribute, data });
    prop_oneof![
        req(),
        mra,
        rej,
        rep,
        rtu,
        dreq,
        drep,
        sidr_req,
        sidr_rep,
        other
    ]
}

proptest! {
    #[test]
    fn packets((repr, payload) in repr(), ident: u16, v6: bool) {
        let (src, dst) = if v6 { (A6, B6) } else { (A, B) };
        let bytes = common::packet(&src, &dst, ident, &repr, &payload);
        let packet = Packet::new_checked(&bytes).unwrap();
        prop_assert_eq!(packet.repr(), Ok(repr));
        prop_assert_eq!(packet.payload(), &payload[..]);
        prop_assert!(packet.pad().iter().all(|b| *b == 0));
        prop_assert!(Flow::new(&src, &dst, 0xc000).check(&bytes, ident));
        prop_assert_eq!(Flow::new(&src, &dst, 0xc000).of(&bytes, ident), packet.icrc());
        checks::packet(&bytes);
        // Cut anywhere: an error, or a packet that ends there.
        for len in 0..bytes.len() {
            checks::packet(&bytes[..len]);
        }
    }

    #[test]
    fn mads(message in message(), method: u8, status: u16, class_specific: u16, transaction: u64, modifier: u32) {
        let mad = Mad { method, status, class_specific, transaction, modifier, message };
        let bytes = mad.to_bytes();
        prop_assert_eq!(Mad::parse(&bytes), Ok(mad));
        checks::mad(&bytes);
    }

    #[test]
    fn any_bytes(bytes in vec(any::<u8>(), 0..400)) {
        checks::packet(&bytes);
        checks::mad(&bytes);
        checks::frames(&bytes);
        checks::capture(&bytes);
    }

    #[test]
    fn any_bytes_behind_an_opcode(i in 0..Opcode::ALL.len(), flags: u8, rest in vec(any::<u8>(), 10..80)) {
        let bytes = [&[Opcode::ALL[i].byte(), flags & 0xf0], &rest[..]].concat();
        checks::packet(&bytes);
    }

    #[test]
    fn any_bytes_in_a_mad(attribute in 0x0fu8..0x1b, data in vec(any::<u8>(), 232)) {
        let mut bytes = vec![0; 24];
        bytes[..4].copy_from_slice(&[1, 7, 2, 3]);
        bytes[17] = attribute;
        bytes.extend(data);
        checks::mad(&bytes);
    }

    #[test]
    fn outer_headers(
        tos: u8, label in 0u32..1 << 20, hops: u8, ident: u16, ports: (u16, u16, u16),
        payload in vec(any::<u8>(), 0..50), gids: ([u8; 16], [u8; 16]), macs: ([u8; 6], [u8; 6]),
    ) {
        let udp = udp::Udp { src_port: ports.0, dst_port: ports.1, len: 8 + payload.len() as u16, checksum: ports.2 };
        let mut datagram = vec![0; 8];
        udp.emit(&mut datagram);
        datagram.extend(&payload);
        prop_assert_eq!(udp::Udp::parse(&datagram), Ok((udp, &payload[..])));

        let v4 = ip::V4 {
            tos, total_len: 20 + udp.len, ident, flags_fragment: ident ^ ports.0, ttl: hops, protocol: 17,
            src: ip::mapped_v4(&A).unwrap(), dst: [gids.0[0], 2, 3, 4],
        };
        let mut bytes = vec![0; 20];
        v4.emit(&mut bytes);
        bytes.extend(&datagram);
        bytes.extend([0; 9]);
        prop_assert_eq!(ip::V4::parse(&bytes), Ok((v4, &datagram[..])));
        bytes[usize::from(hops) % 20] ^= 1 << (tos % 8);
        prop_assert!(ip::V4::parse(&bytes).is_err());

        let v6 = ip::V6 {
            traffic_class: tos, flow_label: label, payload_len: udp.len, next_header: 17, hop_limit: hops,
            src: gids.0, dst: gids.1,
        };
        let mut bytes = vec![0; 40];
        v6.emit(&mut bytes);
        bytes.extend(&datagram);
        bytes.extend([0; 9]);
        prop_assert_eq!(ip::V6::parse(&bytes), Ok((v6, &datagram[..])));

        let eth = ethernet::Ethernet { dst: macs.0, src: macs.1, ethertype: ethernet::IPV6, header_len: 14 };
        let mut bytes = vec![0; 14];
        eth.emit(&mut bytes);
        bytes.extend(&payload);
        prop_assert_eq!(ethernet::Ethernet::parse(&bytes), Ok((eth, &payload[..])));

        for (src, dst, flow_label, ident) in [(A, B, 0, ident), (gids.0, B6, label, 0)] {
            let grh = grh::Grh {
                src, dst, traffic_class: tos, flow_label, hop_limit: hops, ident, packet_len: 16 + payload.len() as u16,
            };
            let mut area = [0xff; grh::LEN];
            grh.emit(&mut area);
            prop_assert_eq!(grh::Grh::parse(&area), Ok(grh));
        }
    }

    #[test]
    fn rdma_cm_headers(src_port: u16, addresses: ([u8; 16], [u8; 16]), port: u16) {
        for (src, dst) in [(A, B), addresses] {
            let header = rdma_cm::Header { src_port, src, dst };
            let mut private = [0x77; 92];
            header.emit(&mut private);
            let (parsed, user) = rdma_cm::Header::parse(&private).unwrap();
            prop_assert_eq!(parsed, header);
            prop_assert_eq!(user, &[0x77; 56]);
        }
        for space in [PortSpace::Tcp, PortSpace::Udp, PortSpace::Ipoib, PortSpace::Ib] {
            prop_assert_eq!(rdma_cm::port_of(rdma_cm::service_id(space, port)), Some((space, port)));
        }
    }
}
