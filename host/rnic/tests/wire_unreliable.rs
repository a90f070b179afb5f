//! UC and UD between two hosts.

mod common;

use common::net::*;
use common::*;
use hyv_abi::control::CreateAh;
use hyv_roce::wire::grh::{self, Grh};

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
fn uc_moves_messages_of_every_length() {
    let mut p = pair(QpType::Uc, Faults::default());
    let mut rng = Rng(5);
    for len in [0u32, 1, 32, 33, 1023, 1024, 1025, 4096, 100_000] {
        for op in [WrOpcode::SendImm, WrOpcode::WriteImm] {
            let data = rng.bytes(len as usize);
            p.a.fill(0, &data);
            p.b.fill(0, &vec![0; 100_000]);
            let sge = p.b.mr.sge(0, 200_000);
            p.b.qp.post_recv(1, &[sge]);
            p.a.qp
                .post(&Wr::new(op, 2).sge(p.a.mr.sge(0, len)).imm(7).to(&p.b.mr, 0));
            p.pump();
            assert_eq!(status(&p.a.scq.one()), WcStatus::Success);
            let r = p.b.rcq.one();
            assert_eq!((r.byte_len, r.imm), (len, 7));
            if op == WrOpcode::SendImm {
                assert_eq!(received(&p.b.user.ram, &r, &[sge], IOVA), data);
            } else {
                assert_eq!(p.b.data(0, u64::from(len)), data);
            }
        }
    }
    let c = p.eb.device_counters();
    assert_eq!((c.tx_packets, c.drops_order), (0, 0), "nothing is answered");
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
fn datagrams_cross_with_their_headers() {
    let mut p = pair(QpType::Ud, Faults::default());
    let ah = ah(&mut p, v4(2));
    let to = |p: &WirePair| u64::from(ah) | u64::from(p.b.qp.qpn) << 32;
    let mut rng = Rng(8);
    for (i, len) in [0u32, 1, 31, 64, 1000, 4096].into_iter().enumerate() {
        let data = rng.bytes(len as usize);
        p.a.fill(0, &data);
        let sges = [p.b.mr.sge(0, 50), p.b.mr.sge(4_000, 5_000)];
        p.b.qp.post_recv(9, &sges);
        let op = [WrOpcode::Send, WrOpcode::SendImm][i % 2];
        let wr = Wr::new(op, 1).sge(p.a.mr.sge(0, len)).imm(77);
        p.a.qp.post(&wr.remote(to(&p), QKEY));
        p.pump();
        assert_eq!(status(&p.a.scq.one()), WcStatus::Success);
        let r = p.b.rcq.one();
        assert_eq!((r.wr_id, r.byte_len), (9, len + 40));
        assert_eq!(r.data[0], u64::from(p.a.qp.qpn), "who sent it");
        assert!(r.flags & cqe_flags::GRH != 0);
        assert_eq!(r.flags & cqe_flags::WITH_IMM != 0, op == WrOpcode::SendImm);
        let got = received(&p.b.user.ram, &r, &sges, IOVA);
        let area: [u8; grh::LEN] = got[..40].try_into().unwrap();
        assert_eq!(area[..20], [0; 20]);
        let grh = Grh::parse(&area).unwrap();
        assert_eq!((grh.src, grh.dst), (v4(1), v4(2)));
        assert_eq!((grh.traffic_class, grh.hop_limit), (0x28, 7));
        assert_eq!(got[40..], data);
    }
    // Longer than the path's MTU.
    let wr = Wr::new(WrOpcode::Send, 1).sge(p.a.mr.sge(0, 4_097));
    p.a.qp.post(&wr.remote(to(&p), QKEY));
    p.pump();
    assert_eq!(status(&p.a.scq.one()), WcStatus::LocLenErr);
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
