//! UC and UD: what nobody takes is dropped, and its sender never knows.

use crate::common::*;
use crate::fabric::{Link, On, patient};
use hyv_abi::control::{CreateAh, QpAttr};
use hyv_abi::queue::Cqe;
use hyv_roce::wire::grh::Grh;

fn of(ty: QpType) -> Cap {
    Cap {
        ty,
        ..Cap::default()
    }
}

fn uc(on: On) -> Link {
    Link::with(on, 1 << 20, of(QpType::Uc), &patient())
}

/// Two users with a datagram QP each, ready.
fn ud(on: On) -> Link {
    Link::with(on, 1 << 20, of(QpType::Ud), &patient())
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

fn ah(p: &mut Link) -> u32 {
    let req = ah_to(p.f.gid_b(), p.a.pd);
    p.f.a().create_ah(p.a.user.id, &req).expect("create_ah")
}

fn datagram(p: &Link, ah: u32, wr_id: u64, len: u32) -> Wr {
    let remote = u64::from(ah) | u64::from(p.b.qp.qpn) << 32;
    Wr::new(WrOpcode::Send, wr_id)
        .sge(p.a.mr.sge(0, len))
        .remote(remote, QKEY)
}

/// Sends, and says how the sender's side ended.
fn post(p: &mut Link, wr: &Wr) -> WcStatus {
    p.a.qp.post(wr);
    p.pump();
    status(&p.a.scq.one())
}

fn quiet(p: &mut Link) {
    assert!(p.b.rcq.poll().is_none(), "nothing arrived");
    assert_eq!(p.b.qp.state(p.f.rb()), QpState::Rts);
    let known = summary::QP_COMM_ESTABLISHED;
    assert_eq!(pending(&p.b.user.ram) & !known, 0, "no event");
}

/// The requester's send queue is in error and no more; back to work.
fn recover(p: &mut Link) {
    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Sqe);
    p.a.qp.go(p.f.a(), QpState::Rts).expect("SQE to RTS");
}

fn uc_moves_messages_of_every_length(on: On) {
    let mut p = uc(on);
    let mut rng = Rng(21);
    for len in [0, 1, 8, 32, 33, 4096, 65_536, 65_537, 300_000] {
        let data = rng.bytes(len as usize);
        p.a.fill(0, &data);
        let sge = p.b.mr.sge(0, len);
        p.b.qp.post_recv(1, &[sge]);
        let wr = Wr::new(WrOpcode::SendImm, 2).imm(7);
        let wr = wr.sge(p.a.mr.sge(0, len));
        assert_eq!(post(&mut p, &wr), WcStatus::Success);
        let c = p.b.rcq.one();
        assert_eq!((c.wr_id, c.byte_len, c.imm), (1, len, 7));
        assert_eq!(received(&p.b.user.ram, &c, &[sge], IOVA), data);
        p.b.fill(500_000, &vec![0; len as usize]);
        p.b.qp.post_recv(3, &[]);
        let wr = Wr::new(WrOpcode::WriteImm, 4).imm(len);
        let wr = wr.sge(p.a.mr.sge(0, len)).to(&p.b.mr, 500_000);
        assert_eq!(post(&mut p, &wr), WcStatus::Success);
        let c = p.b.rcq.one();
        assert_eq!((c.wr_id, c.byte_len, c.imm), (3, len, len));
        assert_eq!(c.opcode, WcOpcode::RecvRdmaWithImm as u8);
        assert_eq!(p.b.data(500_000, u64::from(len)), data);
        let wr = Wr::new(WrOpcode::Write, 5).sge(p.a.mr.sge(0, len));
        let wr = wr.to(&p.b.mr, 0);
        assert_eq!(post(&mut p, &wr), WcStatus::Success);
        assert_eq!(p.b.data(0, u64::from(len)), data);
    }
}

fn uc_drops_what_the_responder_does_not_take(on: On) {
    let mut p = uc(on);
    p.a.fill(0, &[5; 4096]);
    p.b.fill(0, &[9; 4096]);
    let send = |p: &Link, len| Wr::new(WrOpcode::Send, 1).sge(p.a.mr.sge(0, len));
    // No receive.
    let wr = send(&p, 64);
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    quiet(&mut p);
    let wr = Wr::new(WrOpcode::WriteImm, 1).sge(p.a.mr.sge(0, 64));
    let wr = wr.to(&p.b.mr, 0);
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    quiet(&mut p);
    // Too long for its receive, which stays for the next message.
    p.b.qp.post_recv(10, &[p.b.mr.sge(0, 64)]);
    p.b.qp.post_recv(11, &[p.b.mr.sge(64, 64)]);
    for len in [65, 200_000] {
        let wr = send(&p, len);
        assert_eq!(post(&mut p, &wr), WcStatus::Success);
        quiet(&mut p);
    }
    let wr = send(&p, 64);
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    let c = p.b.rcq.one();
    assert_eq!((c.wr_id, c.wqe, c.byte_len), (10, 0, 64));
    // Keys and access that forbid it.
    let write = Wr::new(WrOpcode::Write, 1).sge(p.a.mr.sge(0, 64));
    let far = write.clone().to(&p.b.mr, (1 << 20) - 63);
    let wrong = write.clone().remote(p.b.mr.iova, p.b.mr.rkey ^ 0x80);
    for wr in [far, wrong] {
        assert_eq!(post(&mut p, &wr), WcStatus::Success);
        quiet(&mut p);
    }
    // A QP that nobody may write to.
    let mut a: QpAttr = attr();
    a.access = 0;
    p.b.qp.modify(p.f.b(), M::ACCESS_FLAGS, a).expect("modify");
    let wr = write.to(&p.b.mr, 0);
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    quiet(&mut p);
    assert_eq!(p.b.data(64, 64), [9; 64], "nothing was written");
    // A QP that is not there any more.
    p.f.b()
        .destroy_qp(p.b.qp.owner, p.b.qp.handle)
        .expect("drop");
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Rts);
}

fn a_receive_that_is_wrong_itself_ends_the_responder_and_nobody_else(on: On) {
    for ty in [QpType::Uc, QpType::Ud] {
        for len in [8, 2000] {
            let mut p = Link::with(on, 1 << 16, of(ty), &patient());
            let handle = ah(&mut p);
            let mut sge = p.b.mr.sge(0, 4096);
            sge.lkey ^= 1;
            p.b.qp.post_recv(1, &[sge]);
            p.b.qp.post_recv(2, &[p.b.mr.sge(0, 4096)]);
            let wr = match ty {
                QpType::Ud => datagram(&p, handle, 3, len),
                _ => Wr::new(WrOpcode::Send, 3).sge(p.a.mr.sge(0, len)),
            };
            assert_eq!(post(&mut p, &wr), WcStatus::Success);
            let c: Vec<_> =
                p.b.rcq
                    .drain()
                    .iter()
                    .map(|c| (c.wr_id, status(c)))
                    .collect();
            assert_eq!(
                c,
                [(1, WcStatus::LocProtErr), (2, WcStatus::WrFlushErr)],
                "{ty:?} {len}"
            );
            assert_eq!(p.b.qp.state(p.f.rb()), QpState::Err);
            let i = p.b.qp.index();
            assert!(event(&p.b.user.ram, summary::QP_FATAL, i));
            assert_eq!(p.a.qp.state(p.f.ra()), QpState::Rts);
        }
    }
}

fn what_these_services_cannot_do(on: On) {
    use WrOpcode as O;
    let both = [O::Read, O::CmpSwp, O::FetchAdd, O::SendInv];
    let ud_only = [O::Write, O::WriteImm, O::LocalInv, O::BindMw];
    for (ty, ops) in [
        (QpType::Uc, both.to_vec()),
        (QpType::Ud, [both, ud_only].concat()),
    ] {
        let mut p = Link::with(on, 1 << 16, of(ty), &patient());
        let handle = ah(&mut p);
        for op in ops {
            p.b.qp.post_recv(1, &[p.b.mr.sge(0, 64)]);
            let mut wr = Wr::new(op, 1).sge(p.a.mr.sge(0, 8)).to(&p.b.mr, 0);
            if ty == QpType::Ud {
                wr = wr.remote(u64::from(handle) | u64::from(p.b.qp.qpn) << 32, QKEY);
            }
            assert_eq!(post(&mut p, &wr), WcStatus::LocQpOpErr, "{ty:?} {op:?}");
            quiet(&mut p);
            recover(&mut p);
        }
    }
}

fn an_error_of_the_sender_stops_its_send_queue_only(on: On) {
    for ty in [QpType::Uc, QpType::Ud] {
        let mut p = Link::with(on, 1 << 16, of(ty), &patient());
        let (there, back) = (ah(&mut p), {
            let req = ah_to(p.f.gid_a(), p.b.pd);
            p.f.b().create_ah(p.b.user.id, &req).expect("create_ah")
        });
        let send = |p: &Link, id| match ty {
            QpType::Ud => datagram(p, there, id, 8),
            _ => Wr::new(WrOpcode::Send, id).sge(p.a.mr.sge(0, 8)),
        };
        for id in 0..4 {
            p.b.qp.post_recv(id, &[p.b.mr.sge(0, 64)]);
            p.a.qp.post_recv(id, &[p.a.mr.sge(0, 64)]);
        }
        // The first is fine, the second is not, the third never goes.
        let mut bad = send(&p, 2).unsignaled();
        bad.sges[0].lkey ^= 1;
        for wr in [send(&p, 1), bad, send(&p, 3)] {
            p.a.qp.post_silently(&wr);
        }
        assert_eq!(p.a.qp.ring(), Ring::Seen);
        p.pump();
        let seen: Vec<_> =
            p.a.scq
                .drain()
                .iter()
                .map(|c| (c.wr_id, status(c)))
                .collect();
        let want = [
            (1, WcStatus::Success),
            (2, WcStatus::LocProtErr),
            (3, WcStatus::WrFlushErr),
        ];
        assert_eq!(seen, want, "{ty:?}");
        assert_eq!(p.b.rcq.one().wr_id, 0);
        assert_eq!(p.a.qp.state(p.f.ra()), QpState::Sqe);
        assert_eq!(pending(&p.a.user.ram) & summary::QP_FATAL, 0, "no event");
        // What is posted now flushes; what comes in is received.
        let wr = send(&p, 4);
        p.a.qp.post(&wr);
        let answer = match ty {
            QpType::Ud => Wr::new(WrOpcode::Send, 9)
                .sge(p.b.mr.sge(0, 8))
                .remote(u64::from(back) | u64::from(p.a.qp.qpn) << 32, QKEY),
            _ => Wr::new(WrOpcode::Send, 9).sge(p.b.mr.sge(0, 8)),
        };
        p.b.qp.post(&answer);
        p.pump();
        let c = p.a.scq.one();
        assert_eq!((c.wr_id, status(&c)), (4, WcStatus::WrFlushErr));
        assert_eq!(status(&p.b.scq.one()), WcStatus::Success);
        assert_eq!(status(&p.a.rcq.one()), WcStatus::Success);
        recover(&mut p);
        let wr = send(&p, 5);
        assert_eq!(post(&mut p, &wr), WcStatus::Success, "{ty:?}");
        assert_eq!(p.b.rcq.one().wr_id, 1);
        // From SQE to the error state: the receives flush too.
        let mut bad = send(&p, 6);
        bad.sges[0].lkey ^= 1;
        assert_eq!(post(&mut p, &bad), WcStatus::LocProtErr);
        p.a.qp.go(p.f.a(), QpState::Err).expect("ERR");
        let n = p.a.rcq.drain().len();
        assert_eq!(n, 3, "three receives were left");
    }
}

fn check_datagram(p: &Link, c: &Cqe, at: u64, data: &[u8], imm: Option<u32>) {
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
    assert_eq!((g.src, g.dst), (p.f.gid_a(), p.f.gid_b()));
    assert_eq!((g.traffic_class, g.hop_limit), (0x28, 7));
    assert_eq!(area[..20], [0; 20], "an IPv4 header is behind 20 bytes");
}

fn datagrams_carry_their_header(on: On) {
    let mut p = ud(on);
    let mut rng = Rng(22);
    let handle = ah(&mut p);
    for (i, len) in [0u32, 1, 3, 4, 31, 32, 33, 1024, 4095, 4096]
        .into_iter()
        .enumerate()
    {
        let data = rng.bytes(len as usize);
        p.a.fill(0, &data);
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
        check_datagram(&p, &c, at, &data, imm);
    }
    // Inline, and the QP's own Q_Key.
    let data = rng.bytes(100);
    let remote = u64::from(handle) | u64::from(p.b.qp.qpn) << 32;
    p.b.qp.post_recv(2, &[p.b.mr.sge(0, 140)]);
    let wr = Wr::new(WrOpcode::Send, 6).inline(&data);
    let wr = wr.remote(remote, 0x8000_0000);
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    let c = p.b.rcq.one();
    check_datagram(&p, &c, 0, &data, None);
}

fn datagrams_that_nobody_takes(on: On) {
    let mut p = ud(on);
    let handle = ah(&mut p);
    let good = datagram(&p, handle, 1, 64);
    // No receive.
    assert_eq!(post(&mut p, &good), WcStatus::Success);
    quiet(&mut p);
    // No room: 40 bytes come in front. The receive is the next one's.
    p.b.qp.post_recv(10, &[p.b.mr.sge(0, 103)]);
    assert_eq!(post(&mut p, &good), WcStatus::Success);
    quiet(&mut p);
    let wr = datagram(&p, handle, 1, 63);
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    let c = p.b.rcq.one();
    assert_eq!((c.wr_id, c.byte_len), (10, 103));
    p.b.qp.post_recv(11, &[p.b.mr.sge(0, 4096)]);
    // A wrong Q_Key, and the sender's own where it differs.
    let mut wr = good.clone();
    wr.rkey = QKEY + 1;
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    quiet(&mut p);
    let mut a = attr();
    a.qkey = QKEY + 1;
    p.a.qp.modify(p.f.a(), M::QKEY, a).expect("modify");
    wr.rkey = 1 << 31;
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    quiet(&mut p);
    // No such QP, and one of another type.
    let rc = p.b.extra_qp(p.f.b(), Cap::default());
    let qpns = [p.b.qp.qpn ^ 0x1_0000, 0, 1, rc.qpn];
    for qpn in qpns {
        let mut wr = good.clone();
        wr.remote = u64::from(handle) | u64::from(qpn) << 32;
        assert_eq!(post(&mut p, &wr), WcStatus::Success, "{qpn:x}");
        quiet(&mut p);
    }
    // A number has 24 bits, whatever stands above them.
    let mut wr = good.clone();
    wr.remote |= 1 << 56;
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    assert_eq!(p.b.rcq.one().wr_id, 11);
    // A QP that is not ready yet.
    p.b.qp.go(p.f.b(), QpState::Reset).expect("RESET");
    p.b.qp.init(p.f.b(), &patient());
    assert_eq!(post(&mut p, &good), WcStatus::Success);
    assert!(p.b.rcq.poll().is_none());
}

fn datagrams_that_cannot_be_sent(on: On) {
    let mut p = ud(on);
    let handle = ah(&mut p);
    for i in 0..4 {
        p.b.qp.post_recv(i, &[p.b.mr.sge(0, 8192)]);
    }
    let wr = datagram(&p, handle, 1, 4097);
    assert_eq!(post(&mut p, &wr), WcStatus::LocLenErr);
    recover(&mut p);
    // Another PD's handle, one that is gone, another user's, and none.
    let pd = p.a.user.pd(p.f.a());
    let req = ah_to(p.f.gid_b(), pd);
    let other = p.f.a().create_ah(p.a.user.id, &req).expect("create_ah");
    let wr = datagram(&p, other, 1, 8);
    assert_eq!(post(&mut p, &wr), WcStatus::LocProtErr);
    recover(&mut p);
    p.f.a().destroy_ah(p.a.user.id, other).expect("destroy_ah");
    for bad in [other, handle ^ 0x1_0000, u32::MAX] {
        let wr = datagram(&p, bad, 1, 8);
        assert_eq!(post(&mut p, &wr), WcStatus::LocQpOpErr);
        recover(&mut p);
    }
    quiet(&mut p);
    let wr = datagram(&p, handle, 1, 8);
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    assert_eq!(p.b.rcq.one().wr_id, 0);
}

fn a_datagram_to_oneself_and_from_many_to_one_srq(on: On) {
    let mut p = ud(on);
    let handle = ah(&mut p);
    p.a.fill(0, b"to myself");
    p.a.qp.post_recv(1, &[p.a.mr.sge(100, 100)]);
    let mut wr = datagram(&p, handle, 2, 9);
    let own = ah_to(p.f.gid_a(), p.a.pd);
    let own = p.f.a().create_ah(p.a.user.id, &own).expect("create_ah");
    wr.remote = u64::from(own) | u64::from(p.a.qp.qpn) << 32;
    assert_eq!(post(&mut p, &wr), WcStatus::Success);
    assert_eq!(p.a.rcq.one().byte_len, 49);
    assert_eq!(p.a.data(140, 9), b"to myself");
    // Two QPs on one SRQ; what is too long for one receive stays with its QP.
    let mut srq = p.b.user.srq(p.f.b(), p.b.pd, 3, 32);
    let cap = Cap {
        srq: srq.handle,
        ..of(QpType::Ud)
    };
    let to: Vec<Qp> = (0..2).map(|_| p.b.extra_qp(p.f.b(), cap)).collect();
    for q in &to {
        p.f.connect_b(q, 0, &patient());
    }
    srq.post_recv(20, &[p.b.mr.sge(0, 50)]);
    srq.post_recv(21, &[p.b.mr.sge(50, 50)]);
    for (i, len) in [(0, 11), (1, 10), (0, 10)] {
        let mut wr = datagram(&p, handle, 3, len);
        wr.remote = u64::from(handle) | u64::from(to[i].qpn) << 32;
        assert_eq!(post(&mut p, &wr), WcStatus::Success);
    }
    let got: Vec<_> =
        p.b.rcq
            .drain()
            .iter()
            .map(|c| (c.wr_id, c.wqe, c.qpn))
            .collect();
    assert_eq!(got, [(21, 1, to[1].qpn), (20, 0, to[0].qpn)]);
}

on_every_carrier! {
    uc_moves_messages_of_every_length
    uc_drops_what_the_responder_does_not_take
    a_receive_that_is_wrong_itself_ends_the_responder_and_nobody_else
    what_these_services_cannot_do
    an_error_of_the_sender_stops_its_send_queue_only
    datagrams_carry_their_header
    datagrams_that_nobody_takes
    datagrams_that_cannot_be_sent
    a_datagram_to_oneself_and_from_many_to_one_srq
}
