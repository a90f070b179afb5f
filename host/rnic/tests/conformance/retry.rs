//! Waiting: for a receive, for a peer that does not answer, for one that is gone.

use crate::common::*;
use crate::fabric::{Link, On, patient};

/// `min_rnr_timer` 14 is 1.28 ms, `timeout` 14 is 67 ms, and over a network up to a quarter more.
const RNR_NS: u64 = 1_280_000;
const ACK_NS: u64 = 4096 << 14;
const LEN: u64 = 1 << 20;

fn conn(rnr_retry: u32, retry_cnt: u32, timeout: u32) -> Conn {
    Conn {
        rnr_retry,
        retry_cnt,
        timeout,
        ..patient()
    }
}

fn ids(cq: &mut Cq) -> Vec<(u64, WcStatus)> {
    cq.drain().iter().map(|c| (c.wr_id, status(c))).collect()
}

fn a_receive_posted_late_is_found(on: On) {
    for op in [WrOpcode::Send, WrOpcode::SendImm, WrOpcode::WriteImm] {
        for len in [0u32, 8, 200, 300_000] {
            let mut p = Link::new(on, LEN);
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
                p.f.clock.advance(RNR_NS / 3);
            }
            assert!(p.a.scq.poll().is_none(), "{op:?} of {len}");
            assert!(p.b.rcq.poll().is_none());
            assert_eq!(p.b.data(400_000, 8), [0; 8], "{op:?}: overtaken");
            p.b.qp.post_recv(3, &[sge]);
            p.f.clock.advance(RNR_NS);
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

fn rnr_retries_run_out(on: On) {
    for retry in 0..7u32 {
        let mut p = Link::with(on, LEN, Cap::default(), &conn(retry, 7, 14));
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
            assert_eq!(p.a.qp.state(p.f.ra()), QpState::Rts, "retry {k} of {retry}");
            assert!(p.a.scq.poll().is_none());
            p.f.pass(RNR_NS * 3 / 4);
            assert_eq!(p.a.qp.state(p.f.ra()), QpState::Rts, "retry {k} of {retry}");
            p.f.pass(RNR_NS / 2);
        }
        p.f.clock.advance(RNR_NS);
        p.pump();
        assert_eq!(
            ids(&mut p.a.scq),
            [(1, WcStatus::RnrRetryExcErr), (2, WcStatus::WrFlushErr)],
            "rnr_retry {retry}"
        );
        assert_eq!(ids(&mut p.a.rcq), [(3, WcStatus::WrFlushErr)]);
        assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err);
        assert_eq!(
            p.b.qp.state(p.f.rb()),
            QpState::Rts,
            "the responder only said no"
        );
        assert_eq!(pending(&p.b.user.ram), 0);
        assert_eq!(p.b.data(0, 1), [0]);
    }
}

fn rnr_retry_7_never_runs_out(on: On) {
    let mut p = Link::with(on, LEN, Cap::default(), &conn(7, 0, 8));
    p.a.qp.post(&Wr::new(WrOpcode::Send, 1).inline(b"patience"));
    for _ in 0..500 {
        p.f.clock.advance(100 * RNR_NS);
        p.pump();
    }
    assert!(p.a.scq.poll().is_none());
    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Rts);
    p.b.qp.post_recv(2, &[p.b.mr.sge(0, 64)]);
    p.f.clock.advance(RNR_NS);
    p.pump();
    assert_eq!((p.a.scq.one().status, p.b.rcq.one().byte_len), (0, 8));
}

fn each_message_has_its_own_retries(on: On) {
    let mut p = Link::with(on, LEN, Cap::default(), &conn(3, 7, 14));
    for i in 0..20 {
        p.a.qp.post(&Wr::new(WrOpcode::Send, i).inline(b"x"));
        p.pump();
        for _ in 0..2 {
            p.f.clock.advance(RNR_NS);
            p.pump();
        }
        assert!(p.a.scq.poll().is_none());
        p.b.qp.post_recv(i, &[p.b.mr.sge(0, 8)]);
        p.f.clock.advance(RNR_NS);
        p.pump();
        assert_eq!((p.a.scq.one().status, p.b.rcq.one().wr_id), (0, i));
    }
}

/// Ways to be connected to nobody.
fn a_peer_that_does_not_answer(on: On) {
    type Spoil = fn(&mut Link);
    let cases: [(&str, Spoil); 4] = [
        ("reset", |p| {
            p.b.qp.go(p.f.b(), QpState::Reset).expect("RESET");
        }),
        ("in error", |p| {
            p.b.qp.go(p.f.b(), QpState::Err).expect("ERR");
        }),
        ("destroyed", |p| {
            p.f.b()
                .destroy_qp(p.b.user.id, p.b.qp.handle)
                .expect("destroy");
        }),
        ("in INIT", |p| {
            p.b.qp.reset(p.f.b());
            p.b.qp.init(p.f.b(), &patient());
        }),
    ];
    for (name, spoil) in cases {
        for retry in [0u32, 1, 7] {
            let mut p = Link::with(on, LEN, Cap::default(), &conn(7, retry, 14));
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
                p.f.pass(ACK_NS * 3 / 4);
                assert!(p.a.scq.poll().is_none(), "{name}: timeout {k} of {retry}");
                p.f.pass(ACK_NS / 2);
            }
            assert_eq!(
                ids(&mut p.a.scq),
                [(1, WcStatus::RetryExcErr), (2, WcStatus::WrFlushErr)],
                "{name}, retry_cnt {retry}"
            );
            assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err, "{name}");
            assert_eq!(p.b.data(0, 64), [0; 64], "{name}");
            assert!(p.b.rcq.poll().is_none(), "{name}");
        }
    }
}

/// Without a time-out nothing is sent again.
fn timeout_0_waits_for_ever(on: On) {
    let mut p = Link::with(on, LEN, Cap::default(), &conn(7, 0, 0));
    p.b.qp.reset(p.f.b());
    p.a.qp
        .post(&Wr::new(WrOpcode::Write, 1).inline(b"back").to(&p.b.mr, 0));
    for _ in 0..300 {
        p.f.pass(10_000_000_000);
    }
    assert!(p.a.scq.poll().is_none());
    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Rts);
    p.a.qp.go(p.f.a(), QpState::Err).expect("ERR");
    assert_eq!(ids(&mut p.a.scq), [(1, WcStatus::WrFlushErr)]);
}

fn a_peer_that_comes_back_in_time(on: On) {
    let mut p = Link::with(on, LEN, Cap::default(), &conn(7, 2, 14));
    p.b.qp.reset(p.f.b());
    for id in 1..4u64 {
        let wr = Wr::new(WrOpcode::Write, id).inline(&[id as u8; 8]);
        p.a.qp.post(&wr.to(&p.b.mr, 8 * id));
    }
    p.f.pass(ACK_NS * 5 / 4);
    assert!(p.a.scq.poll().is_none());
    p.f.connect_b(&p.b.qp, p.a.qp.qpn, &patient());
    p.f.pass(ACK_NS * 5 / 4);
    assert_eq!(
        ids(&mut p.a.scq),
        [1, 2, 3].map(|id| (id, WcStatus::Success))
    );
    assert_eq!(
        p.b.data(0, 40),
        [[0; 8], [1; 8], [2; 8], [3; 8], [0; 8]].concat()
    );
}

/// The peer goes while a large message is under way: the error names the right request.
fn a_peer_destroyed_in_the_middle(on: On) {
    for op in [WrOpcode::Send, WrOpcode::Write, WrOpcode::Read] {
        let mut p = Link::with(on, 4 << 20, Cap::default(), &conn(7, 1, 14));
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
        let (ram, at) = match op {
            WrOpcode::Read => (p.a.user.ram.clone(), p.a.mr.offset),
            _ => (p.b.user.ram.clone(), p.b.mr.offset),
        };
        let before = ram.read(at, 8);
        p.f.turn_until(|| ram.read(at, 8) != before);
        assert!(p.a.scq.poll().is_none(), "{op:?}: under way");
        p.f.b()
            .destroy_qp(p.b.user.id, p.b.qp.handle)
            .expect("destroy");
        let b = p.b.data(0, 4 << 20);
        p.pump();
        assert!(
            p.a.scq.poll().is_none(),
            "{op:?}: waits for an answer first"
        );
        for _ in 0..3 {
            p.f.clock.advance(ACK_NS * 5 / 4);
            p.pump();
        }
        let got = p.a.scq.drain();
        assert_eq!(
            got.iter().map(|c| (c.wr_id, status(c))).collect::<Vec<_>>(),
            [(4711, WcStatus::RetryExcErr), (4712, WcStatus::WrFlushErr)],
            "{op:?}"
        );
        assert_eq!(got[0].wqe, position, "{op:?}");
        assert!(b == p.b.data(0, 4 << 20), "{op:?}");
        let last = p.a.data((4 << 20) - 1, 1);
        assert_eq!(last, [1], "{op:?}: the answer's end did not come");
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
fn a_place_taken_again_is_nobodys_peer(on: On) {
    let mut p = Link::with(on, LEN, Cap::default(), &conn(7, 0, 14));
    p.f.b()
        .destroy_qp(p.b.user.id, p.b.qp.handle)
        .expect("destroy");
    let old = p.b.qp.handle;
    // Places rest for long before they are used again.
    let memory = p.b.user.qp_memory(Cap::default());
    let mut q = loop {
        let q = p.b.user.qp_at(
            p.f.b(),
            p.b.pd,
            (&p.b.scq, &p.b.rcq),
            Cap::default(),
            memory,
        );
        if q.handle & 0xffff == old & 0xffff {
            break q;
        }
        p.f.b().destroy_qp(q.owner, q.handle).expect("destroy");
    };
    assert_ne!((q.handle, q.qpn), (old, p.b.qp.qpn));
    p.f.connect_b(&q, p.a.qp.qpn, &patient());
    q.post_recv(5, &[p.b.mr.sge(0, 64)]);
    p.a.qp
        .post(&Wr::new(WrOpcode::Send, 1).inline(b"for the old one"));
    p.pump();
    assert!(p.b.rcq.poll().is_none());
    p.f.clock.advance(ACK_NS * 5 / 4);
    p.pump();
    assert_eq!(ids(&mut p.a.scq), [(1, WcStatus::RetryExcErr)]);
    assert!(p.b.rcq.poll().is_none());
}

fn a_waiting_queue_can_be_failed_reset_and_destroyed(on: On) {
    for missing_peer in [false, true] {
        for what in 0..3 {
            let mut p = Link::new(on, LEN);
            if missing_peer {
                p.b.qp.reset(p.f.b());
            }
            p.a.qp.post(&Wr::new(WrOpcode::Send, 1).inline(b"first"));
            p.pump();
            match what {
                0 => {
                    p.a.qp.go(p.f.a(), QpState::Err).expect("ERR");
                    assert_eq!(ids(&mut p.a.scq), [(1, WcStatus::WrFlushErr)]);
                }
                1 => {
                    p.a.qp.reset(p.f.a());
                    p.pump();
                    assert!(p.a.scq.poll().is_none(), "a reset completes nothing");
                }
                _ => {
                    p.f.a()
                        .destroy_qp(p.a.user.id, p.a.qp.handle)
                        .expect("destroy")
                }
            }
            for _ in 0..20 {
                p.f.clock.advance(ACK_NS);
                p.pump();
            }
            assert!(p.a.scq.poll().is_none());
            p.b.qp.reset(p.f.b());
            if what == 2 {
                p.a.qp = p.a.extra_qp(p.f.a(), Cap::default());
            } else {
                p.a.qp.reset(p.f.a());
            }
            p.f.connect(&p.a.qp, &p.b.qp, &patient());
            p.b.qp.post_recv(2, &[p.b.mr.sge(0, 64)]);
            p.a.qp.post(&Wr::new(WrOpcode::Send, 3).inline(b"second"));
            p.pump();
            assert_eq!(ids(&mut p.a.scq), [(3, WcStatus::Success)]);
            assert_eq!(cqe_data(&p.b.rcq.one(), 6), b"second");
        }
    }
}

on_every_carrier! {
    a_receive_posted_late_is_found
    rnr_retries_run_out
    rnr_retry_7_never_runs_out
    each_message_has_its_own_retries
    a_peer_that_does_not_answer
    timeout_0_waits_for_ever
    a_peer_that_comes_back_in_time
    a_peer_destroyed_in_the_middle
    a_place_taken_again_is_nobodys_peer
    a_waiting_queue_can_be_failed_reset_and_destroyed
}
