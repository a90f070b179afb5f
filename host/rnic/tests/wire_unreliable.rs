//! UC and UD between two hosts.

mod common;

use common::net::*;
use common::*;
use hyv_abi::control::CreateAh;

const LEN: u64 = 1 << 20;

fn pair(ty: QpType, faults: Faults) -> WirePair {
    let cap = Cap {
        ty,
        sq_log2: 8,
        rq_log2: 8,
        ..Cap::default()
    };
    WirePair::with(LEN, cap, &Path::default(), 3, faults)
}

#[test]
fn uc_loses_messages_whole_and_goes_on() {
    for seed in 0..6 {
        let faults = Faults {
            loss: 2 + seed,
            double: 3,
            reorder: 2,
            ..Faults::default()
        };
        let mut p = pair(QpType::Uc, faults);
        let mut got = 0;
        for i in 0..200u32 {
            let len = 2_000 + i * 8;
            let data = vec![i as u8; len as usize];
            p.a.fill(0, &data);
            let sge = p.b.mr.sge(0, 20_000);
            p.b.qp.post_recv(u64::from(i), &[sge]);
            p.a.qp
                .post(&Wr::new(WrOpcode::SendImm, 2).sge(p.a.mr.sge(0, len)).imm(i));
            p.run(50_000);
            assert_eq!(status(&p.a.scq.one()), WcStatus::Success);
            for r in p.b.rcq.drain() {
                // Each is whole: its length and its bytes are those of its number.
                assert_eq!((r.status, r.byte_len), (0, 2_000 + r.imm * 8));
                assert_eq!(r.imm, i, "of this round");
                assert!(received(&p.b.user.ram, &r, &[sge], IOVA) == data);
                got += 1;
            }
        }
        assert!((100..200).contains(&got), "{got} of 200");
        assert!(p.eb.device_counters().drops_order > 0);
        assert_eq!(p.b.qp.state(&p.eb), QpState::Rts);
    }
}

#[test]
fn uc_drops_what_it_cannot_take() {
    let mut p = pair(QpType::Uc, Faults::default());
    let bad = p.b.mr.rkey ^ 1;
    p.a.qp.post(&Wr::new(WrOpcode::Send, 1).inline(b"nobody"));
    p.a.qp.post(
        &Wr::new(WrOpcode::Write, 2)
            .sge(p.a.mr.sge(0, 5_000))
            .remote(p.b.mr.iova, bad),
    );
    p.pump();
    p.b.qp.post_recv(1, &[p.b.mr.sge(0, 10)]);
    p.a.qp
        .post(&Wr::new(WrOpcode::Send, 3).sge(p.a.mr.sge(0, 11)));
    p.a.qp
        .post(&Wr::new(WrOpcode::Send, 4).inline(b"0123456789"));
    p.pump();
    let ids: Vec<_> =
        p.a.scq
            .drain()
            .iter()
            .map(|c| (c.wr_id, c.status))
            .collect();
    assert_eq!(ids, [(1, 0), (2, 0), (3, 0), (4, 0)]);
    // The receive of the one that was too long is the next one's.
    assert_eq!(p.b.rcq.one().byte_len, 10);
    assert_eq!(p.eb.device_counters().drops_receive, 3);
    // A fault of the sender's own: its send queue is in error, and comes back.
    let mut sge = p.a.mr.sge(0, 5_000);
    sge.lkey ^= 1;
    p.a.qp.post(&Wr::new(WrOpcode::Send, 5).sge(sge));
    p.a.qp.post(&Wr::new(WrOpcode::Send, 6).inline(b"x"));
    p.pump();
    let ids: Vec<_> =
        p.a.scq
            .drain()
            .iter()
            .map(|c| (c.wr_id, status(c)))
            .collect();
    assert_eq!(ids, [(5, WcStatus::LocProtErr), (6, WcStatus::WrFlushErr)]);
    assert_eq!(p.a.qp.state(&p.ea), QpState::Sqe);
    p.a.qp.go(&mut p.ea, QpState::Rts).unwrap();
    p.b.qp.post_recv(2, &[p.b.mr.sge(0, 10)]);
    p.a.qp.post(&Wr::new(WrOpcode::Send, 7).inline(b"back"));
    p.pump();
    assert_eq!(p.b.rcq.one().byte_len, 4);
}

fn ah(p: &mut WirePair, gid: [u8; 16]) -> u32 {
    let req = CreateAh {
        pd: p.a.pd,
        port_num: 1,
        dest_gid: gid,
        sgid_index: 0,
        traffic_class: 0x28,
        hop_limit: 7,
        flow_label: 0,
    };
    p.ea.create_ah(p.a.user.id, &req).expect("create_ah")
}

#[test]
fn datagrams_that_nobody_takes() {
    let mut p = pair(QpType::Ud, Faults::default());
    let ah2 = ah(&mut p, v4(2));
    let ah9 = ah(&mut p, v4(9));
    let send = |p: &mut WirePair, ah: u32, qpn: u32, qkey, len| {
        let remote = u64::from(ah) | u64::from(qpn) << 32;
        let wr = Wr::new(WrOpcode::Send, 1)
            .sge(p.a.mr.sge(0, len))
            .remote(remote, qkey);
        p.a.qp.post(&wr);
        p.pump();
        assert_eq!(status(&p.a.scq.one()), WcStatus::Success);
        assert!(p.b.rcq.poll().is_none());
    };
    let qpn = p.b.qp.qpn;
    send(&mut p, ah2, qpn, QKEY, 8);
    assert_eq!(p.eb.device_counters().drops_receive, 1, "no receive");
    p.b.qp.post_recv(9, &[p.b.mr.sge(0, 47)]);
    send(&mut p, ah2, qpn, QKEY, 8);
    assert_eq!(p.eb.device_counters().drops_receive, 2, "too short");
    send(&mut p, ah2, qpn, QKEY ^ 1, 7);
    assert_eq!(p.eb.device_counters().drops_qkey, 1);
    send(&mut p, ah2, qpn ^ 0x10000, QKEY, 7);
    assert_eq!(p.eb.device_counters().drops_no_qp, 1);
    send(&mut p, ah9, qpn, QKEY, 7);
    // The receive that was too short takes the one that fits.
    let remote = u64::from(ah2) | u64::from(qpn) << 32;
    let wr = Wr::new(WrOpcode::Send, 1).sge(p.a.mr.sge(0, 7));
    p.a.qp.post(&wr.remote(remote, 1 << 31));
    p.pump();
    assert_eq!(p.b.rcq.one().byte_len, 47, "the QP's own Q_Key");
}
