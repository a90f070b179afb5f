//! Waiting: for a receive, for a peer that does not answer, for one that is gone.

mod common;

use std::sync::Arc;

use common::*;

/// `min_rnr_timer` 1 is 10 us, `timeout` 14 is 67 ms.
const RNR_NS: u64 = 10_000;
const ACK_NS: u64 = 4096 << 14;
const LEN: u64 = 1 << 20;

fn conn(rnr_retry: u32, retry_cnt: u32, timeout: u32) -> Conn {
    Conn {
        rnr_retry,
        retry_cnt,
        timeout,
        ..Conn::default()
    }
}

fn ids(cq: &mut Cq) -> Vec<(u64, WcStatus)> {
    cq.drain().iter().map(|c| (c.wr_id, status(c))).collect()
}

/// The device knows who sends; a packet would not say.
#[test]
fn a_peer_that_is_connected_to_another() {
    let mut p = Pair::with(LEN, Cap::default(), &conn(7, 1, 14));
    let other = p.a.extra_qp(&mut p.e, Cap::default());
    p.b.qp.reset(&mut p.e);
    p.b.qp.connect(&mut p.e, other.qpn, &Conn::default());
    p.b.qp.post_recv(70, &[p.b.mr.sge(0, 64)]);
    p.a.qp
        .post(&Wr::new(WrOpcode::Write, 1).inline(b"you?").to(&p.b.mr, 0));
    p.a.qp.post(&Wr::new(WrOpcode::Send, 2));
    for _ in 0..2 {
        p.pump();
        assert!(p.a.scq.poll().is_none());
        p.clock.advance(ACK_NS);
    }
    p.pump();
    assert_eq!(
        ids(&mut p.a.scq),
        [(1, WcStatus::RetryExcErr), (2, WcStatus::WrFlushErr)]
    );
    assert_eq!(p.b.data(0, 64), [0; 64]);
    assert!(p.b.rcq.poll().is_none());
}

#[test]
fn without_a_timeout_a_peer_that_comes_back_is_found() {
    let mut p = Pair::with(LEN, Cap::default(), &conn(7, 0, 0));
    p.b.qp.reset(&mut p.e);
    p.a.qp
        .post(&Wr::new(WrOpcode::Write, 1).inline(b"back").to(&p.b.mr, 0));
    for _ in 0..300 {
        p.clock.advance(10_000_000_000);
        p.pump();
    }
    assert!(p.a.scq.poll().is_none());
    assert_eq!(p.a.qp.state(&p.e), QpState::Rts);
    p.b.qp.connect(&mut p.e, p.a.qp.qpn, &Conn::default());
    p.pump();
    assert_eq!(p.a.scq.one().status, 0);
    assert_eq!(p.b.data(0, 4), b"back");
}

#[test]
fn a_peers_user_that_is_removed_ends_the_connection() {
    for under_way in [false, true] {
        let mut p = Pair::new(4 << 20);
        let mut other = Side::new(&mut p.e, LEN, Cap::default());
        let mut local = p.a.extra_qp(&mut p.e, Cap::default());
        connect(&mut p.e, &local, &other.qp, &Conn::default());
        p.a.qp.post_recv(5, &[]);
        if under_way {
            p.a.qp.post(
                &Wr::new(WrOpcode::Write, 1)
                    .sge(p.a.mr.sge(0, 4 << 20))
                    .to(&p.b.mr, 0),
            );
            for _ in 0..5 {
                p.e.poll();
            }
            assert!(p.a.scq.poll().is_none());
        }
        let Side {
            user, scq, rcq, qp, ..
        } = p.b;
        let User { id, ram, .. } = user;
        drop((scq, rcq, qp));
        p.a.rcq.arm(arm::ANY);
        p.e.remove_user(id);
        assert_eq!(
            Arc::strong_count(&ram),
            1,
            "the engine let go of its memory"
        );
        let before = ram.all();
        pump(&mut p.e);
        assert_eq!(p.a.qp.state(&p.e), QpState::Err);
        assert!(event(&p.a.user.ram, summary::QP_FATAL, p.a.qp.index()));
        assert!(event(
            &p.a.user.ram,
            summary::CQ_COMPLETION,
            p.a.rcq.index()
        ));
        assert!(p.a.user.wakes.0.load(std::sync::atomic::Ordering::SeqCst) > 0);
        assert_eq!(ids(&mut p.a.rcq), [(5, WcStatus::WrFlushErr)]);
        let sends = ids(&mut p.a.scq);
        if under_way {
            assert_eq!(sends.len(), 1, "{sends:?}");
            assert_eq!(sends[0].0, 1);
            assert_ne!(sends[0].1, WcStatus::Success);
        } else {
            assert!(sends.is_empty());
        }
        assert!(ram.all() == before);
        // Others go on.
        other.qp.post_recv(6, &[other.mr.sge(0, 8)]);
        local.post(&Wr::new(WrOpcode::Send, 7).inline(b"on"));
        pump(&mut p.e);
        assert_eq!((p.a.scq.one().status, other.rcq.one().wr_id), (0, 6));
        // The handle of a user that is gone opens nothing, also when its place is taken.
        p.e.remove_user(id);
        let new = User::new(&mut p.e, 4096);
        assert!(p.e.alloc_pd(id).is_err());
        p.e.remove_user(id);
        assert!(p.e.alloc_pd(new.id).is_ok());
    }
}

#[test]
fn a_user_that_leaves_alone_takes_its_own_queues_along() {
    let (mut e, clock) = engine();
    let mut s = Side::new(&mut e, LEN, Cap::default());
    let mut t = s.extra_qp(&mut e, Cap::default());
    let c = Conn::default();
    connect(&mut e, &s.qp, &t, &c);
    let qpn = s.user.qp(&mut e, s.pd, &s.scq, &s.rcq, Cap::default());
    qpn.connect(&mut e, qpn.qpn, &c);
    // One waits, one is under way, one is in error.
    t.post(&Wr::new(WrOpcode::Send, 1));
    s.qp.post(
        &Wr::new(WrOpcode::Write, 2)
            .sge(s.mr.sge(0, LEN as u32))
            .to(&s.mr, 0),
    );
    qpn.go(&mut e, QpState::Err).expect("ERR");
    for _ in 0..3 {
        e.poll();
    }
    e.remove_user(s.user.id);
    for _ in 0..100 {
        pump(&mut e);
        clock.advance(RNR_NS);
    }
    assert!(!e.is_dozing() && e.doze(), "nothing is left to do");
    assert_eq!(e.next_timer_ns(), None, "and nothing to wait for");
}

#[test]
fn hundreds_wait_and_each_gets_its_turn() {
    let (mut e, clock) = engine();
    let mut a = Side::new(&mut e, LEN, Cap::default());
    let mut b = Side::new(&mut e, LEN, Cap::default());
    let n = 120;
    let mut qps: Vec<(Qp, Qp)> = (0..n)
        .map(|_| {
            let cap = Cap {
                sq_log2: 2,
                rq_log2: 2,
                ..Cap::default()
            };
            let (x, y) = (a.extra_qp(&mut e, cap), b.extra_qp(&mut e, cap));
            connect(&mut e, &x, &y, &Conn::default());
            (x, y)
        })
        .collect();
    for (i, (x, _)) in qps.iter_mut().enumerate() {
        x.post(&Wr::new(WrOpcode::Send, i as u64).inline(&i.to_le_bytes()));
    }
    pump(&mut e);
    assert!(a.scq.poll().is_none());
    let mut done = vec![0; n];
    for i in (0..n).rev() {
        qps[i].1.post_recv(i as u64, &[b.mr.sge(0, 64)]);
        if i % 10 == 0 {
            clock.advance(RNR_NS);
            pump(&mut e);
            for c in b.rcq.drain() {
                assert_eq!((c.status, c.data[0]), (0, c.wr_id));
                done[c.wr_id as usize] += 1;
            }
            a.scq.drain();
        }
    }
    assert_eq!(done, vec![1; n]);
}
