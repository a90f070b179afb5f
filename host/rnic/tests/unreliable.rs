//! UC and UD: what nobody takes is dropped, and its sender never knows.

mod common;

use common::*;
use hyv_abi::control::CreateAh;
use hyv_abi::queue::Cqe;
use hyv_rnic::Engine;
use hyv_roce::wire::grh::{self, Grh};

fn of(ty: QpType) -> Cap {
    Cap {
        ty,
        ..Cap::default()
    }
}

fn ah_to(gid: [u8; 16], pd: u32) -> CreateAh {
    CreateAh {
        pd,
        port_num: 1,
        dest_gid: gid,
        sgid_index: 0,
        traffic_class: 0x28,
        hop_limit: 7,
        flow_label: 0x1_2345,
    }
}

fn datagram(p: &Pair, ah: u32, wr_id: u64, len: u32) -> Wr {
    let remote = u64::from(ah) | u64::from(p.b.qp.qpn) << 32;
    Wr::new(WrOpcode::Send, wr_id)
        .sge(p.a.mr.sge(0, len))
        .remote(remote, QKEY)
}

/// Sends, and says how the sender's side ended.
fn post(p: &mut Pair, wr: &Wr) -> WcStatus {
    p.a.qp.post(wr);
    p.pump();
    status(&p.a.scq.one())
}

fn check_datagram(p: &Pair, c: &Cqe, at: u64, data: &[u8], v4: bool, imm: Option<u32>) {
    assert_eq!(status(c), WcStatus::Success);
    assert_eq!(c.opcode, WcOpcode::Recv as u8);
    assert_eq!(c.byte_len as usize, 40 + data.len());
    assert_eq!(c.data[0], u64::from(p.a.qp.qpn), "the sender's number");
    let with_imm = imm.map_or(0, |_| cqe_flags::WITH_IMM);
    assert_eq!(c.flags, cqe_flags::GRH | with_imm);
    assert_eq!(c.imm, imm.unwrap_or(0));
    assert_eq!(p.b.data(at + 40, data.len() as u64), data);
    let area: [u8; 40] = p.b.data(at, 40).try_into().expect("40");
    let g = Grh::parse(&area).expect("a GRH");
    let len = 12 + 8 + 4 + imm.map_or(0, |_| 4) + data.len().next_multiple_of(4);
    assert_eq!(usize::from(g.packet_len), len);
    assert_eq!(
        (g.src, g.dst),
        (p.e.gid(1, 0).unwrap(), p.e.gid(1, 0).unwrap())
    );
    assert_eq!((g.traffic_class, g.hop_limit), (0x28, 7));
    assert_eq!(g.flow_label, if v4 { 0 } else { 0x1_2345 });
    assert_eq!(
        area[..20] == [0; 20],
        v4,
        "an IPv4 header is behind 20 bytes"
    );
}

#[test]
fn datagrams_carry_their_header() {
    for v4 in [false, true] {
        let mut gid = GID;
        if v4 {
            gid = [0; 16];
            gid[10..].copy_from_slice(&[0xff, 0xff, 10, 1, 2, 3]);
        }
        let (mut e, clock) = engine_at(gid);
        let mut a = Side::new(&mut e, 1 << 16, of(QpType::Ud));
        let mut b = Side::new(&mut e, 1 << 16, of(QpType::Ud));
        // Each of its CQs holds what it must.
        for q in [&mut a.qp, &mut b.qp] {
            q.connect(&mut e, 0, &Conn::default());
        }
        let mut p = Pair { e, clock, a, b };
        let mut rng = Rng(22);
        for (i, len) in [0u32, 1, 3, 4, 31, 32, 33, 1024, 4095, 4096]
            .into_iter()
            .enumerate()
        {
            let data = rng.bytes(len as usize);
            p.a.fill(0, &data);
            // Loopback and zeros stand for this host too.
            let mut dest = gid;
            match i % 3 {
                0 => dest = [0; 16],
                1 => dest = std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets(),
                _ => {}
            }
            let req = ah_to(dest, p.a.pd);
            let handle = p.e.create_ah(p.a.user.id, &req).expect("create_ah");
            let at = u64::from(len % 7);
            let (x, y) = (p.b.mr.sge(at, 39), p.b.mr.sge(at + 39, len + 1));
            p.b.qp.post_recv(1, &[x, y]);
            let imm = (i % 2 == 1).then_some(77 + i as u32);
            let mut wr = datagram(&p, handle, 5, len);
            if let Some(imm) = imm {
                wr.op = WrOpcode::SendImm as u8;
                wr.imm = imm;
            }
            assert_eq!(post(&mut p, &wr), WcStatus::Success);
            let c = p.b.rcq.one();
            assert_eq!(c.wr_id, 1);
            check_datagram(&p, &c, at, &data, v4, imm);
            p.e.destroy_ah(p.a.user.id, handle).expect("destroy_ah");
        }
        // Inline, and the QP's own Q_Key.
        let handle = {
            let req = ah_to(gid, p.a.pd);
            p.e.create_ah(p.a.user.id, &req).expect("create_ah")
        };
        let data = rng.bytes(100);
        let remote = u64::from(handle) | u64::from(p.b.qp.qpn) << 32;
        p.b.qp.post_recv(2, &[p.b.mr.sge(0, 140)]);
        let wr = Wr::new(WrOpcode::Send, 6).inline(&data);
        let wr = wr.remote(remote, 0x8000_0000);
        assert_eq!(post(&mut p, &wr), WcStatus::Success);
        let c = p.b.rcq.one();
        check_datagram(&p, &c, 0, &data, v4, None);
    }
    assert_eq!(grh::LEN, 40);
}

#[test]
fn what_is_asked_of_an_address_handle_is_checked() {
    let (mut e, _) = engine();
    let user = User::new(&mut e, 1 << 16);
    let other = User::new(&mut e, 1 << 16);
    let pd = user.pd(&mut e);
    let good = ah_to(GID, pd);
    let refused = |e: &mut Engine, what: CreateAh, errno, reason| {
        assert_eq!(
            e.create_ah(user.id, &what),
            Err(VerbError::new(errno, reason)),
            "{what:?}"
        );
    };
    use Errno::{HostUnreach, Inval, NoEnt};
    for pd in [pd ^ 0x1_0000, pd + 1, u32::MAX] {
        refused(&mut e, CreateAh { pd, ..good }, NoEnt, Reason::BadHandle);
    }
    for port_num in [0, 2, u32::MAX] {
        let what = CreateAh { port_num, ..good };
        refused(&mut e, what, Inval, Reason::BadGid);
    }
    let what = CreateAh {
        sgid_index: 1,
        ..good
    };
    refused(&mut e, what, Inval, Reason::BadGid);
    for what in [
        CreateAh {
            traffic_class: 256,
            ..good
        },
        CreateAh {
            hop_limit: 256,
            ..good
        },
        CreateAh {
            flow_label: 1 << 20,
            ..good
        },
    ] {
        refused(&mut e, what, Inval, Reason::BadAttr);
    }
    let mut far = good;
    far.dest_gid[15] ^= 1;
    refused(&mut e, far, HostUnreach, Reason::NoRoute);
    let handle = e.create_ah(user.id, &good).expect("create_ah");
    let busy = VerbError::new(Errno::Busy, Reason::InUse);
    assert_eq!(e.dealloc_pd(user.id, pd), Err(busy));
    let gone = Err(VerbError::new(NoEnt, Reason::BadHandle));
    assert_eq!(e.destroy_ah(other.id, handle), gone);
    e.destroy_ah(user.id, handle).expect("destroy_ah");
    assert_eq!(e.destroy_ah(user.id, handle), gone);
    e.dealloc_pd(user.id, pd).expect("dealloc_pd");
}
