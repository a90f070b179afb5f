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

#[test]
fn a_receive_posted_late_is_found() {
    for op in [WrOpcode::Send, WrOpcode::SendImm, WrOpcode::WriteImm] {
        for len in [0u32, 8, 200, 300_000] {
            let mut p = Pair::new(LEN);
            let data = Rng(1).bytes(len as usize);
            p.a.fill(0, &data);
            let sge = p.b.mr.sge(0, 300_000);
            p.a.qp
                .post(&Wr::new(op, 1).sge(p.a.mr.sge(0, len)).to(&p.b.mr, 0).imm(9));
            // Behind it, in order: it waits too.
            p.a.qp.post(
                &Wr::new(WrOpcode::Write, 2)
                    .inline(&[0x77; 8])
                    .to(&p.b.mr, 400_000),
            );
            for _ in 0..10 {
                p.pump();
                p.clock.advance(RNR_NS / 3);
            }
            assert!(p.a.scq.poll().is_none(), "{op:?} of {len}");
            assert!(p.b.rcq.poll().is_none());
            assert_eq!(p.b.data(400_000, 8), [0; 8], "{op:?}: overtaken");
            p.b.qp.post_recv(3, &[sge]);
            p.clock.advance(RNR_NS);
            p.pump();
            assert_eq!(
                ids(&mut p.a.scq),
                [(1, WcStatus::Success), (2, WcStatus::Success)]
            );
            let r = p.b.rcq.one();
            assert_eq!((r.wr_id, r.status, r.byte_len), (3, 0, len));
            assert_eq!(
                received(&p.b.user.ram, &r, &[sge], IOVA),
                data,
                "{op:?} of {len}"
            );
            assert_eq!(p.b.data(400_000, 8), [0x77; 8]);
        }
    }
}

#[test]
fn rnr_retries_run_out() {
    for retry in 0..7u32 {
        let mut p = Pair::with(LEN, Cap::default(), &conn(retry, 7, 14));
        p.a.qp
            .post(&Wr::new(WrOpcode::Send, 1).inline(b"x").unsignaled());
        p.a.qp.post(
            &Wr::new(WrOpcode::Write, 2)
                .inline(b"y")
                .to(&p.b.mr, 0)
                .unsignaled(),
        );
        p.a.qp.post_recv(3, &[]);
        p.pump();
        for k in 0..retry {
            assert_eq!(p.a.qp.state(&p.e), QpState::Rts, "retry {k} of {retry}");
            assert!(p.a.scq.poll().is_none());
            p.clock.advance(RNR_NS - 1);
            p.pump();
            assert_eq!(p.a.qp.state(&p.e), QpState::Rts, "retry {k} of {retry}");
            p.clock.advance(1);
            p.pump();
        }
        p.clock.advance(RNR_NS);
        p.pump();
        assert_eq!(
            ids(&mut p.a.scq),
            [(1, WcStatus::RnrRetryExcErr), (2, WcStatus::WrFlushErr)],
            "rnr_retry {retry}"
        );
        assert_eq!(ids(&mut p.a.rcq), [(3, WcStatus::WrFlushErr)]);
        assert_eq!(p.a.qp.state(&p.e), QpState::Err);
        assert_eq!(
            p.b.qp.state(&p.e),
            QpState::Rts,
            "the responder only said no"
        );
        assert_eq!(pending(&p.b.user.ram), 0);
        assert_eq!(p.b.data(0, 1), [0]);
    }
}

#[test]
fn rnr_retry_7_never_runs_out() {
    let mut p = Pair::with(LEN, Cap::default(), &conn(7, 0, 1));
    p.a.qp.post(&Wr::new(WrOpcode::Send, 1).inline(b"patience"));
    for _ in 0..500 {
        p.clock.advance(100 * RNR_NS);
        p.pump();
    }
    assert!(p.a.scq.poll().is_none());
    assert_eq!(p.a.qp.state(&p.e), QpState::Rts);
    p.b.qp.post_recv(2, &[p.b.mr.sge(0, 64)]);
    p.clock.advance(RNR_NS);
    p.pump();
    assert_eq!((p.a.scq.one().status, p.b.rcq.one().byte_len), (0, 8));
}

#[test]
fn each_message_has_its_own_retries() {
    let mut p = Pair::with(LEN, Cap::default(), &conn(3, 7, 14));
    for i in 0..20 {
        p.a.qp.post(&Wr::new(WrOpcode::Send, i).inline(b"x"));
        p.pump();
        for _ in 0..2 {
            p.clock.advance(RNR_NS);
            p.pump();
        }
        assert!(p.a.scq.poll().is_none());
        p.b.qp.post_recv(i, &[p.b.mr.sge(0, 8)]);
        p.clock.advance(RNR_NS);
        p.pump();
        assert_eq!((p.a.scq.one().status, p.b.rcq.one().wr_id), (0, i));
    }
}

/// Ways to be connected to nobody.
#[test]
fn a_peer_that_does_not_answer() {
    type Spoil = fn(&mut Pair);
    let cases: [(&str, Spoil); 5] = [
        ("reset", |p| {
            p.b.qp.go(&mut p.e, QpState::Reset).expect("RESET");
        }),
        ("in error", |p| {
            p.b.qp.go(&mut p.e, QpState::Err).expect("ERR");
        }),
        ("destroyed", |p| {
            p.e.destroy_qp(p.b.user.id, p.b.qp.handle).expect("destroy");
        }),
        ("in INIT", |p| {
            p.b.qp.reset(&mut p.e);
            p.b.qp.init(&mut p.e, &Conn::default());
        }),
        ("connected to another", |p| {
            let other = p.a.extra_qp(&mut p.e, Cap::default());
            p.b.qp.reset(&mut p.e);
            p.b.qp.connect(&mut p.e, other.qpn, &Conn::default());
        }),
    ];
    for (name, spoil) in cases {
        for retry in [0u32, 1, 7] {
            let mut p = Pair::with(LEN, Cap::default(), &conn(7, retry, 14));
            spoil(&mut p);
            p.b.qp.post_recv(70, &[p.b.mr.sge(0, 64)]);
            p.pump();
            p.b.rcq.drain();
            p.a.qp.post(
                &Wr::new(WrOpcode::Write, 1)
                    .inline(b"anybody")
                    .to(&p.b.mr, 0),
            );
            p.a.qp.post(&Wr::new(WrOpcode::Send, 2));
            p.pump();
            for k in 0..=retry {
                p.clock.advance(ACK_NS - 1);
                p.pump();
                assert!(p.a.scq.poll().is_none(), "{name}: timeout {k} of {retry}");
                p.clock.advance(1);
                p.pump();
            }
            assert_eq!(
                ids(&mut p.a.scq),
                [(1, WcStatus::RetryExcErr), (2, WcStatus::WrFlushErr)],
                "{name}, retry_cnt {retry}"
            );
            assert_eq!(p.a.qp.state(&p.e), QpState::Err, "{name}");
            assert_eq!(p.b.data(0, 64), [0; 64], "{name}");
            assert!(p.b.rcq.poll().is_none(), "{name}");
        }
    }
}

#[test]
fn timeout_0_waits_for_ever_and_finds_a_peer_that_comes_back() {
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

/// The peer goes while a large message is under way: the error names the right request.
#[test]
fn a_peer_destroyed_in_the_middle() {
    for op in [WrOpcode::Send, WrOpcode::Write, WrOpcode::Read] {
        let mut p = Pair::with(4 << 20, Cap::default(), &conn(7, 1, 14));
        // Positions other than 0, and a request of several slots behind.
        for i in 0..3 {
            p.a.qp
                .post(&Wr::new(WrOpcode::Write, i).inline(&[1; 100]).to(&p.b.mr, 0));
        }
        p.pump();
        p.a.scq.drain();
        p.b.qp.post_recv(70, &[p.b.mr.sge(0, 4 << 20)]);
        p.a.fill(0, &vec![1; 4 << 20]);
        p.b.fill(0, &vec![2; 4 << 20]);
        let position = p.a.qp.sq_tail as u16;
        p.a.qp
            .post(&Wr::new(op, 4711).sge(p.a.mr.sge(0, 4 << 20)).to(&p.b.mr, 0));
        p.a.qp.post(
            &Wr::new(WrOpcode::Write, 4712)
                .inline(&[1; 100])
                .to(&p.b.mr, 0),
        );
        for _ in 0..5 {
            p.e.poll();
        }
        assert!(p.a.scq.poll().is_none(), "{op:?}: under way");
        p.e.destroy_qp(p.b.user.id, p.b.qp.handle).expect("destroy");
        let (a, b) = (p.a.data(0, 4 << 20), p.b.data(0, 4 << 20));
        p.pump();
        assert!(
            p.a.scq.poll().is_none(),
            "{op:?}: waits for an answer first"
        );
        for _ in 0..3 {
            p.clock.advance(ACK_NS);
            p.pump();
        }
        let got = p.a.scq.drain();
        assert_eq!(
            got.iter().map(|c| (c.wr_id, status(c))).collect::<Vec<_>>(),
            [(4711, WcStatus::RetryExcErr), (4712, WcStatus::WrFlushErr)],
            "{op:?}"
        );
        assert_eq!(got[0].wqe, position, "{op:?}");
        assert!(
            a == p.a.data(0, 4 << 20) && b == p.b.data(0, 4 << 20),
            "{op:?}"
        );
        // Posted later: flushed, each once.
        p.a.qp.post(
            &Wr::new(WrOpcode::Write, 4713)
                .inline(&[1; 100])
                .to(&p.b.mr, 0),
        );
        p.pump();
        assert_eq!(ids(&mut p.a.scq), [(4713, WcStatus::WrFlushErr)], "{op:?}");
    }
}

/// A new QP in a destroyed one's place is not the old connection's peer.
#[test]
fn a_place_taken_again_is_nobodys_peer() {
    let mut p = Pair::with(LEN, Cap::default(), &conn(7, 0, 14));
    p.e.destroy_qp(p.b.user.id, p.b.qp.handle).expect("destroy");
    let old = p.b.qp.handle;
    // Places rest for long before they are used again.
    let memory = p.b.user.qp_memory(Cap::default());
    let mut q = loop {
        let q = p.b.user.qp_at(
            &mut p.e,
            p.b.pd,
            (&p.b.scq, &p.b.rcq),
            Cap::default(),
            memory,
        );
        if q.handle & 0xffff == old & 0xffff {
            break q;
        }
        p.e.destroy_qp(q.owner, q.handle).expect("destroy");
    };
    assert_ne!((q.handle, q.qpn), (old, p.b.qp.qpn));
    q.connect(&mut p.e, p.a.qp.qpn, &Conn::default());
    q.post_recv(5, &[p.b.mr.sge(0, 64)]);
    p.a.qp
        .post(&Wr::new(WrOpcode::Send, 1).inline(b"for the old one"));
    p.pump();
    assert!(p.b.rcq.poll().is_none());
    p.clock.advance(ACK_NS);
    p.pump();
    assert_eq!(ids(&mut p.a.scq), [(1, WcStatus::RetryExcErr)]);
    assert!(p.b.rcq.poll().is_none());
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
fn a_waiting_queue_can_be_failed_reset_and_destroyed() {
    for missing_peer in [false, true] {
        for what in 0..3 {
            let mut p = Pair::new(LEN);
            if missing_peer {
                p.b.qp.reset(&mut p.e);
            }
            p.a.qp.post(&Wr::new(WrOpcode::Send, 1).inline(b"first"));
            p.pump();
            match what {
                0 => {
                    p.a.qp.go(&mut p.e, QpState::Err).expect("ERR");
                    assert_eq!(ids(&mut p.a.scq), [(1, WcStatus::WrFlushErr)]);
                }
                1 => {
                    p.a.qp.reset(&mut p.e);
                    p.pump();
                    assert!(p.a.scq.poll().is_none(), "a reset completes nothing");
                }
                _ => p.e.destroy_qp(p.a.user.id, p.a.qp.handle).expect("destroy"),
            }
            for _ in 0..20 {
                p.clock.advance(ACK_NS);
                p.pump();
            }
            assert!(p.a.scq.poll().is_none());
            p.b.qp.reset(&mut p.e);
            if what == 2 {
                p.a.qp = p.a.extra_qp(&mut p.e, Cap::default());
            } else {
                p.a.qp.reset(&mut p.e);
            }
            connect(&mut p.e, &p.a.qp, &p.b.qp, &Conn::default());
            p.b.qp.post_recv(2, &[p.b.mr.sge(0, 64)]);
            p.a.qp.post(&Wr::new(WrOpcode::Send, 3).inline(b"second"));
            p.pump();
            assert_eq!(ids(&mut p.a.scq), [(3, WcStatus::Success)]);
            assert_eq!(cqe_data(&p.b.rcq.one(), 6), b"second");
        }
    }
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
