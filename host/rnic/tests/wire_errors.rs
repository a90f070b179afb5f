//! What goes wrong between two hosts: who learns what.

mod common;

use common::net::*;
use common::*;
use hyv_abi::control::QueryCounters;

const LEN: u64 = 1 << 20;

fn statuses(cq: &mut Cq) -> Vec<(u64, WcStatus)> {
    cq.drain().iter().map(|c| (c.wr_id, status(c))).collect()
}

fn conn(f: impl FnOnce(&mut Conn)) -> Path {
    let mut path = Path::default();
    f(&mut path.conn);
    path
}

fn pair(path: &Path) -> WirePair {
    WirePair::with(LEN, Cap::default(), path, 1, Faults::default())
}

/// Posts a good WRITE, the request, and another good WRITE; gives both sides' completions and the peer's event.
fn refused(mut p: WirePair, wr: &Wr) -> (WirePair, Vec<(u64, WcStatus)>) {
    let good = |id| {
        Wr::new(WrOpcode::Write, id)
            .inline(&[7; 8])
            .to(&p.b.mr, 8 * id)
    };
    let (first, last) = (good(1), good(3));
    p.a.qp.post(&first);
    p.a.qp.post(wr);
    p.a.qp.post(&last);
    p.pump();
    assert_eq!(p.a.qp.state(&p.ea), QpState::Err);
    let done = statuses(&mut p.a.scq);
    assert_eq!(done[0], (1, WcStatus::Success));
    assert_eq!(done[2], (3, WcStatus::WrFlushErr));
    assert_eq!(done.len(), 3);
    (p, done)
}

#[test]
fn remote_access() {
    for len in [8u32, 5_000] {
        for op in [WrOpcode::Write, WrOpcode::Read, WrOpcode::FetchAdd] {
            let p = pair(&Path::default());
            let len = if op == WrOpcode::FetchAdd { 8 } else { len };
            // One byte beyond the region; a key that is none.
            let beyond =
                p.b.mr.iova + LEN + if op == WrOpcode::FetchAdd { 0 } else { 1 } - u64::from(len);
            let beyond = if op == WrOpcode::FetchAdd {
                beyond + 8
            } else {
                beyond
            };
            for (addr, key) in [(beyond, p.b.mr.rkey), (p.b.mr.iova, p.b.mr.rkey ^ 1)] {
                let p = pair(&Path::default());
                let wr = Wr::new(op, 2).sge(p.a.mr.sge(0, len)).remote(addr, key);
                let (p, done) = refused(p, &wr);
                assert_eq!(done[1], (2, WcStatus::RemAccessErr), "{op:?} {len}");
                assert_eq!(p.b.qp.state(&p.eb), QpState::Err);
                assert!(event(
                    &p.b.user.ram,
                    summary::QP_ACCESS_ERROR,
                    p.b.qp.index()
                ));
                assert_eq!(p.eb.device_counters().access_naks_sent, 1);
                assert_eq!(p.ea.device_counters().access_naks_received, 1);
            }
        }
    }
}

#[test]
fn invalid_requests() {
    // The QP was not set up for it.
    for op in [WrOpcode::Write, WrOpcode::Read, WrOpcode::CmpSwp] {
        let p = pair(&conn(|c| c.access = Access::LOCAL_WRITE));
        let wr = Wr::new(op, 2).sge(p.a.mr.sge(0, 8)).to(&p.b.mr, 0);
        let mut p = p;
        p.a.qp.post(&wr);
        p.pump();
        assert_eq!(statuses(&mut p.a.scq), [(2, WcStatus::RemInvReqErr)]);
        assert_eq!(p.b.qp.state(&p.eb), QpState::Err);
        assert!(event(
            &p.b.user.ram,
            summary::QP_REQUEST_ERROR,
            p.b.qp.index()
        ));
    }
    // An atomic off its alignment.
    let p = pair(&Path::default());
    let wr = Wr::new(WrOpcode::FetchAdd, 2)
        .sge(p.a.mr.sge(0, 8))
        .to(&p.b.mr, 4);
    let (_, done) = refused(p, &wr);
    assert_eq!(done[1], (2, WcStatus::RemInvReqErr));
}

#[test]
fn receives_at_fault() {
    // Too short: both learn it. The bytes beyond stay.
    for (room, len) in [(10, 11u32), (3_000, 3_001)] {
        let mut p = pair(&Path::default());
        p.b.qp.post_recv(8, &[p.b.mr.sge(0x8000, room)]);
        p.b.qp.post_recv(9, &[p.b.mr.sge(0, 100)]);
        let wr = Wr::new(WrOpcode::Send, 2).sge(p.a.mr.sge(0, len));
        let (mut p, done) = refused(p, &wr);
        assert_eq!(done[1], (2, WcStatus::RemInvReqErr));
        assert_eq!(
            statuses(&mut p.b.rcq),
            [(8, WcStatus::LocLenErr), (9, WcStatus::WrFlushErr)]
        );
        assert_eq!(p.b.data(0x8000 + u64::from(room), 8), [0; 8]);
        assert!(event(
            &p.b.user.ram,
            summary::QP_REQUEST_ERROR,
            p.b.qp.index()
        ));
    }
    // A key that is none.
    for len in [8u32, 3_000] {
        let mut p = pair(&Path::default());
        let mut sge = p.b.mr.sge(0, 4_000);
        sge.lkey ^= 1;
        p.b.qp.post_recv(8, &[sge]);
        let wr = Wr::new(WrOpcode::Send, 2).sge(p.a.mr.sge(0, len));
        let (mut p, done) = refused(p, &wr);
        assert_eq!(done[1], (2, WcStatus::RemOpErr));
        assert_eq!(statuses(&mut p.b.rcq), [(8, WcStatus::LocProtErr)]);
        assert!(event(&p.b.user.ram, summary::QP_FATAL, p.b.qp.index()));
    }
}

#[test]
fn local_faults_come_in_order() {
    let mut p = pair(&Path::default());
    for id in 0..3u64 {
        p.a.qp.post(
            &Wr::new(WrOpcode::Read, id)
                .sge(p.a.mr.sge(0, 50_000))
                .to(&p.b.mr, 0),
        );
    }
    let mut sge = p.a.mr.sge(0, 64);
    sge.lkey ^= 1;
    p.a.qp
        .post(&Wr::new(WrOpcode::Write, 3).sge(sge).to(&p.b.mr, 0));
    p.a.qp
        .post(&Wr::new(WrOpcode::Write, 4).inline(b"x").to(&p.b.mr, 0));
    p.pump();
    use WcStatus::*;
    assert_eq!(
        statuses(&mut p.a.scq),
        [
            (0, Success),
            (1, Success),
            (2, Success),
            (3, LocProtErr),
            (4, WrFlushErr)
        ]
    );
    assert_eq!(p.b.data(0, 1), [0]);
}

#[test]
fn receiver_not_ready() {
    // min_rnr_timer 1 is 10 us.
    let mut p = pair(&conn(|c| c.rnr_retry = 3));
    p.a.qp.post(&Wr::new(WrOpcode::Send, 1).inline(b"hello"));
    p.run(20_000_000);
    assert_eq!(statuses(&mut p.a.scq), [(1, WcStatus::RnrRetryExcErr)]);
    assert_eq!(p.eb.device_counters().rnr_naks_sent, 4);
    assert_eq!(p.b.qp.state(&p.eb), QpState::Rts, "the responder goes on");
    // For ever.
    let mut p = pair(&conn(|c| c.rnr_retry = 7));
    p.a.qp.post(&Wr::new(WrOpcode::Send, 1).inline(b"hello"));
    for _ in 0..20_000 {
        p.step();
    }
    assert!(p.a.scq.poll().is_none());
    assert!(p.ea.device_counters().rnr_naks_received > 100);
    p.b.qp.post_recv(5, &[p.b.mr.sge(0, 100)]);
    p.pump();
    assert_eq!(statuses(&mut p.a.scq), [(1, WcStatus::Success)]);
    assert_eq!(p.b.rcq.one().byte_len, 5);
    // Data of a WRITE with immediate does not come before its receive, if it is one packet.
    p.a.qp.post(
        &Wr::new(WrOpcode::WriteImm, 2)
            .inline(b"late")
            .to(&p.b.mr, 64)
            .imm(3),
    );
    for _ in 0..100 {
        p.step();
    }
    assert_eq!(p.b.data(64, 4), [0; 4]);
    p.b.qp.post_recv(6, &[]);
    p.pump();
    assert_eq!(p.b.data(64, 4), *b"late");
    let r = p.b.rcq.one();
    assert_eq!((r.opcode, r.imm), (WcOpcode::RecvRdmaWithImm as u8, 3));
}

#[test]
fn nobody_answers() {
    for retry_cnt in [0, 1, 7] {
        // Timeout code 8 is 1 ms.
        let mut p = pair(&conn(|c| (c.retry_cnt, c.timeout) = (retry_cnt, 8)));
        p.net.lock().unwrap().faults.loss = 100;
        let start = p.clock.0.load(std::sync::atomic::Ordering::SeqCst);
        p.a.qp
            .post(&Wr::new(WrOpcode::Write, 1).inline(b"x").to(&p.b.mr, 0));
        p.a.qp.post(&Wr::new(WrOpcode::Send, 2).inline(b"y"));
        while p.a.qp.state(&p.ea) != QpState::Err {
            p.step();
        }
        let took = p.clock.0.load(std::sync::atomic::Ordering::SeqCst) - start;
        let t = 4096u64 << 8;
        let n = u64::from(retry_cnt) + 1;
        // Up to a quarter more, so that those of many connections do not come together.
        assert!(
            (n * t..n * t * 5 / 4 + t).contains(&took),
            "{took} of {n} times {t}"
        );
        assert_eq!(
            statuses(&mut p.a.scq),
            [(1, WcStatus::RetryExcErr), (2, WcStatus::WrFlushErr)]
        );
        assert_eq!(p.ea.device_counters().timeouts, u64::from(retry_cnt));
        if retry_cnt == 0 {
            assert_eq!(p.ea.device_counters().retransmissions, 0);
        }
    }
}

#[test]
fn a_region_that_goes_while_it_is_read_or_sent() {
    // The responder's.
    let mut p = pair(&conn(|c| c.rd_atomic = 1));
    p.a.qp.post(
        &Wr::new(WrOpcode::Read, 1)
            .sge(p.a.mr.sge(0, 500_000))
            .to(&p.b.mr, 0),
    );
    for _ in 0..4 {
        p.step();
    }
    p.eb.dereg_mr(p.b.user.id, p.b.mr.handle).unwrap();
    p.pump();
    assert_eq!(statuses(&mut p.a.scq), [(1, WcStatus::RemAccessErr)]);
    assert!(event(
        &p.b.user.ram,
        summary::QP_ACCESS_ERROR,
        p.b.qp.index()
    ));
    // The requester's, of a WRITE.
    let mut p = pair(&Path::default());
    let write = |id| {
        Wr::new(WrOpcode::Write, id)
            .sge(p.a.mr.sge(0, 500_000))
            .to(&p.b.mr, 0)
    };
    let (one, two) = (write(1), write(2));
    p.a.qp.post(&one);
    p.a.qp.post(&two);
    p.step();
    p.ea.dereg_mr(p.a.user.id, p.a.mr.handle).unwrap();
    p.pump();
    assert_eq!(
        statuses(&mut p.a.scq),
        [(1, WcStatus::LocProtErr), (2, WcStatus::WrFlushErr)]
    );
    // The requester's, of a READ.
    let mut p = pair(&Path::default());
    p.a.qp.post(
        &Wr::new(WrOpcode::Read, 1)
            .sge(p.a.mr.sge(0, 500_000))
            .to(&p.b.mr, 0),
    );
    p.step();
    p.ea.dereg_mr(p.a.user.id, p.a.mr.handle).unwrap();
    p.pump();
    assert_eq!(statuses(&mut p.a.scq), [(1, WcStatus::LocProtErr)]);
    // The receiver's, of a SEND.
    let mut p = pair(&Path::default());
    p.b.qp.post_recv(4, &[p.b.mr.sge(0, 600_000)]);
    p.a.qp
        .post(&Wr::new(WrOpcode::Send, 1).sge(p.a.mr.sge(0, 500_000)));
    for _ in 0..4 {
        p.step();
    }
    p.eb.dereg_mr(p.b.user.id, p.b.mr.handle).unwrap();
    p.pump();
    assert_eq!(statuses(&mut p.a.scq), [(1, WcStatus::RemOpErr)]);
    assert_eq!(statuses(&mut p.b.rcq), [(4, WcStatus::LocProtErr)]);
}

#[test]
fn queues_that_end_in_the_middle() {
    // The peer's QP goes: no answer, and the device drops what comes.
    let mut p = pair(&conn(|c| (c.retry_cnt, c.timeout) = (1, 8)));
    p.a.qp.post(
        &Wr::new(WrOpcode::Write, 1)
            .sge(p.a.mr.sge(0, 500_000))
            .to(&p.b.mr, 0),
    );
    p.step();
    p.eb.destroy_qp(p.b.user.id, p.b.qp.handle).unwrap();
    p.run(10_000_000);
    assert_eq!(statuses(&mut p.a.scq), [(1, WcStatus::RetryExcErr)]);
    assert!(p.eb.device_counters().drops_no_qp > 0);
    // The own QP goes to error: everything in flight flushes, in order.
    let mut p = pair(&Path::default());
    for id in 1..5 {
        p.a.qp.post(
            &Wr::new(WrOpcode::Write, id)
                .sge(p.a.mr.sge(0, 100_000))
                .to(&p.b.mr, 0)
                .unsignaled(),
        );
    }
    p.step();
    p.a.qp.go(&mut p.ea, QpState::Err).unwrap();
    p.pump();
    let done = statuses(&mut p.a.scq);
    assert!(!done.is_empty());
    assert!(done.iter().all(|(_, s)| *s == WcStatus::WrFlushErr));
    assert!(done.windows(2).all(|w| w[0].0 + 1 == w[1].0));
    assert_eq!(done.last().unwrap().0, 4);
    // And may be used again.
    p.a.qp.reset(&mut p.ea);
    p.b.qp.reset(&mut p.eb);
    let path = Path::default();
    join(&mut p.ea, &p.a.qp, (v4(2), p.b.qp.qpn), &path);
    join(&mut p.eb, &p.b.qp, (v4(1), p.a.qp.qpn), &path);
    p.a.qp
        .post(&Wr::new(WrOpcode::Write, 9).inline(b"again").to(&p.b.mr, 0));
    p.pump();
    assert_eq!(statuses(&mut p.a.scq), [(9, WcStatus::Success)]);
}

#[test]
fn the_send_queue_drains() {
    let mut p = pair(&Path::default());
    for id in 1..4 {
        p.a.qp.post(
            &Wr::new(WrOpcode::Write, id)
                .sge(p.a.mr.sge(0, 200_000))
                .to(&p.b.mr, 0),
        );
    }
    p.step();
    p.a.qp.go(&mut p.ea, QpState::Sqd).unwrap();
    p.pump();
    let begun = statuses(&mut p.a.scq);
    assert!(begun.len() < 3 && !begun.is_empty(), "{begun:?}");
    p.a.qp.go(&mut p.ea, QpState::Rts).unwrap();
    p.pump();
    assert_eq!(begun.len() + p.a.scq.drain().len(), 3);
}

#[test]
fn counters_by_scope() {
    let mut p = pair(&Path::default());
    p.a.qp.post(
        &Wr::new(WrOpcode::Write, 1)
            .sge(p.a.mr.sge(0, 10_000))
            .to(&p.b.mr, 0),
    );
    p.pump();
    let ask = |e: &hyv_rnic::Engine, side: &Side, scope, handle| {
        e.query_counters(side.user.id, &QueryCounters { scope, handle })
    };
    for scope in 0..3 {
        let a = ask(&p.ea, &p.a, scope, p.a.qp.handle).unwrap();
        assert_eq!((a.work_requests, a.bytes, a.tx_packets), (1, 10_000, 10));
        assert!(a.rx_packets >= 1 && a.tx_bytes > 10_000);
        let b = ask(&p.eb, &p.b, scope, p.b.qp.handle).unwrap();
        assert_eq!((b.rx_packets, b.tx_packets), (10, a.rx_packets));
    }
    assert_eq!(ask(&p.ea, &p.a, 3, 0).unwrap_err().reason, Reason::BadFlags);
    assert_eq!(
        ask(&p.ea, &p.a, 2, 99).unwrap_err().reason,
        Reason::BadHandle
    );
    // What a QP did is not forgotten with it.
    p.ea.destroy_qp(p.a.user.id, p.a.qp.handle).unwrap();
    for scope in 0..2 {
        assert_eq!(ask(&p.ea, &p.a, scope, 0).unwrap().tx_packets, 10);
    }
}
