//! Completion events, overruns, and the other things that set a bit and wake the user.

mod common;

use std::sync::atomic::Ordering;

use common::*;

const LEN: u64 = 1 << 16;

fn wakes(u: &User) -> u64 {
    u.wakes.0.load(Ordering::SeqCst)
}

fn send(p: &mut Pair, solicited: bool) {
    p.b.qp.post_recv(1, &[p.b.mr.sge(0, 64)]);
    let wr = Wr::new(WrOpcode::Send, 2).inline(b"event");
    p.a.qp.post(&if solicited {
        wr.with(flags::SOLICITED)
    } else {
        wr
    });
    p.pump();
    assert_eq!(p.a.scq.one().status, 0);
}

#[test]
fn one_event_for_each_time_it_is_asked_for() {
    let mut p = Pair::new(LEN);
    let index = p.b.rcq.index();
    send(&mut p, false);
    assert_eq!(
        (pending(&p.b.user.ram), wakes(&p.b.user)),
        (0, 0),
        "not armed"
    );
    for round in 0..5u64 {
        p.b.rcq.arm(arm::ANY);
        p.pump();
        assert_eq!(
            pending(&p.b.user.ram),
            0,
            "armed after the completion: polling finds it"
        );
        send(&mut p, false);
        assert!(
            event(&p.b.user.ram, summary::CQ_COMPLETION, index),
            "round {round}"
        );
        assert_eq!(wakes(&p.b.user), round + 1);
        assert_eq!(
            p.b.user.ram.word(p.b.rcq.ctrl + 8).load(Ordering::SeqCst),
            arm::NONE
        );
        send(&mut p, true);
        assert_eq!(pending(&p.b.user.ram), 0, "one arm, one event");
        assert_eq!(wakes(&p.b.user), round + 1);
    }
    assert_eq!(p.b.rcq.drain().len(), 11, "every message completed");
    assert_eq!(wakes(&p.a.user), 0);
}

#[test]
fn solicited_only() {
    let mut p = Pair::new(LEN);
    let index = p.b.rcq.index();
    p.b.rcq.arm(arm::SOLICITED);
    for _ in 0..3 {
        send(&mut p, false);
    }
    assert_eq!(pending(&p.b.user.ram), 0, "nobody solicited");
    send(&mut p, true);
    assert!(event(&p.b.user.ram, summary::CQ_COMPLETION, index));
    // An earlier solicited completion does not answer a later arm.
    p.b.rcq.arm(arm::SOLICITED);
    send(&mut p, false);
    assert_eq!(pending(&p.b.user.ram), 0);
    // WRITE with immediate can solicit too.
    p.b.qp.post_recv(1, &[]);
    let wr = Wr::new(WrOpcode::WriteImm, 2).inline(b"x").to(&p.b.mr, 0);
    p.a.qp.post(&wr.with(flags::SOLICITED));
    p.pump();
    assert!(event(&p.b.user.ram, summary::CQ_COMPLETION, index));
    // On the sender's side the flag means nothing, an error does.
    p.a.scq.drain();
    p.a.scq.arm(arm::SOLICITED);
    send(&mut p, true);
    assert_eq!(
        pending(&p.a.user.ram),
        0,
        "a send's success is not solicited"
    );
    p.b.rcq.arm(arm::SOLICITED);
    p.b.qp.post_recv(1, &[]);
    p.a.qp
        .post(&Wr::new(WrOpcode::Send, 2).inline(b"too long").unsignaled());
    p.pump();
    assert!(
        event(&p.b.user.ram, summary::CQ_COMPLETION, index),
        "errors solicit"
    );
    assert!(
        event(&p.a.user.ram, summary::CQ_COMPLETION, p.a.scq.index()),
        "errors solicit"
    );
}

#[test]
fn nonsense_in_the_arm_word_arms_nothing() {
    let mut p = Pair::new(LEN);
    for word in [3, 1 << 32, u64::MAX] {
        p.b.rcq.arm(word);
        send(&mut p, true);
        assert_eq!(pending(&p.b.user.ram), 0, "{word:#x}");
    }
}

#[test]
fn every_queues_bit_is_its_own() {
    let mut p = Pair::new(LEN);
    for i in 0..130 {
        let cq = p.b.user.cq(&mut p.e, 2);
        if i % 43 != 0 {
            continue;
        }
        let mut y = p.b.user.qp(&mut p.e, p.b.pd, &p.b.scq, &cq, Cap::default());
        let mut x = p.a.extra_qp(&mut p.e, Cap::default());
        connect(&mut p.e, &x, &y, &Conn::default());
        cq.arm(arm::ANY);
        y.post_recv(1, &[p.b.mr.sge(0, 8)]);
        x.post(&Wr::new(WrOpcode::Send, 2).inline(b"x"));
        p.pump();
        assert!(
            event(&p.b.user.ram, summary::CQ_COMPLETION, cq.index()),
            "CQ {i}"
        );
    }
}

#[test]
fn a_flush_by_a_control_verb_raises_the_event_too() {
    let mut p = Pair::new(LEN);
    p.b.qp.post_recv(1, &[]);
    p.b.rcq.arm(arm::SOLICITED);
    p.b.qp.go(&mut p.e, QpState::Err).expect("ERR");
    assert!(event(
        &p.b.user.ram,
        summary::CQ_COMPLETION,
        p.b.rcq.index()
    ));
    assert_eq!(wakes(&p.b.user), 1);
    // A disconnect, likewise.
    p.a.qp.post_recv(1, &[]);
    p.a.rcq.arm(arm::ANY);
    p.e.fail_qpn(p.b.user.id, p.a.qp.qpn);
    assert_eq!(p.a.qp.state(&p.e), QpState::Rts, "not that user's");
    p.e.fail_qpn(p.a.user.id, p.a.qp.qpn);
    assert_eq!(p.a.qp.state(&p.e), QpState::Err);
    assert!(event(
        &p.a.user.ram,
        summary::CQ_COMPLETION,
        p.a.rcq.index()
    ));
    assert!(p.e.owns_qpn(p.a.user.id, p.a.qp.qpn) && !p.e.owns_qpn(p.b.user.id, p.a.qp.qpn));
}

/// The user sleeps only when it armed, looked again and found nothing: then an event must come, whatever
/// happened in between.
#[test]
fn no_event_is_missed() {
    let mut rng = Rng(77);
    let mut p = Pair::new(LEN);
    let index = p.b.rcq.index();
    let (mut sent, mut got, mut sleeps) = (0u64, 0u64, 0);
    let mut posted = 0u64;
    while got < 5_000 {
        let step =
            |p: &mut Pair, rng: &mut Rng, sent: &mut u64, posted: &mut u64| match rng.below(3) {
                0 if *sent < *posted => {
                    p.a.qp.post(
                        &Wr::new(WrOpcode::Send, 0)
                            .inline(&sent.to_le_bytes())
                            .unsignaled(),
                    );
                    *sent += 1;
                }
                1 if *posted - *sent < 16 => {
                    p.b.qp.post_recv(*posted, &[p.b.mr.sge(0, 64)]);
                    *posted += 1;
                }
                _ => {
                    p.e.poll();
                }
            };
        let take = |p: &mut Pair, got: &mut u64| {
            while let Some(c) = p.b.rcq.poll() {
                assert_eq!((c.status, c.data[0]), (0, *got), "in order");
                *got += 1;
            }
        };
        for _ in 0..rng.below(6) {
            if posted - got < 30 {
                step(&mut p, &mut rng, &mut sent, &mut posted);
            }
        }
        take(&mut p, &mut got);
        p.b.rcq.arm(arm::ANY);
        for _ in 0..rng.below(2) {
            p.e.poll();
        }
        let before = got;
        take(&mut p, &mut got);
        if got != before {
            // An event may still come for what was just taken; as in ibverbs that is nobody's loss.
            event(&p.b.user.ram, summary::CQ_COMPLETION, index);
            continue;
        }
        sleeps += 1;
        let mut turns = 0;
        while !event(&p.b.user.ram, summary::CQ_COMPLETION, index) {
            turns += 1;
            assert!(turns < 1_000, "asleep for ever: {sent} sent, {got} got");
            if sent == got && posted == sent {
                p.b.qp.post_recv(posted, &[p.b.mr.sge(0, 64)]);
                posted += 1;
            }
            if sent == got {
                p.a.qp.post(
                    &Wr::new(WrOpcode::Send, 0)
                        .inline(&sent.to_le_bytes())
                        .unsignaled(),
                );
                sent += 1;
            }
            p.e.poll();
        }
        take(&mut p, &mut got);
    }
    assert!(sleeps > 500, "{sleeps} sleeps only: the test shows little");
}

/// A third user's connection, which must go on whatever happens to the first.
fn others_go_on(p: &mut Pair, x: &mut Side, y: &mut Side) {
    y.qp.post_recv(1, &[y.mr.sge(0, 64)]);
    x.qp.post(&Wr::new(WrOpcode::Send, 2).inline(b"on"));
    p.pump();
    assert_eq!((x.scq.one().status, y.rcq.one().status), (0, 0));
}

#[test]
fn a_send_queues_cq_overruns() {
    let mut p = Pair::new(LEN);
    let mut x = Side::new(&mut p.e, LEN, Cap::default());
    let mut y = Side::new(&mut p.e, LEN, Cap::default());
    connect(&mut p.e, &x.qp, &y.qp, &Conn::default());
    let mut cq = p.a.user.cq(&mut p.e, 2);
    let mut q = p.a.user.qp(&mut p.e, p.a.pd, &cq, &p.a.rcq, Cap::default());
    let mut r = p.b.extra_qp(&mut p.e, Cap::default());
    connect(&mut p.e, &q, &r, &Conn::default());
    r.post_recv(9, &[]);
    q.post_recv(8, &[]);
    for i in 0..10u64 {
        let wr = Wr::new(WrOpcode::Write, i)
            .inline(&[0xaa; 8])
            .to(&p.b.mr, 64 * i);
        q.post_silently(&wr);
    }
    let _ = q.ring();
    p.pump();
    assert!(event(&p.a.user.ram, summary::CQ_ERROR, cq.index()));
    assert!(event(&p.a.user.ram, summary::QP_FATAL, q.index()));
    assert!(wakes(&p.a.user) > 0);
    assert_eq!(q.state(&p.e), QpState::Err);
    for i in 0..10u64 {
        let want = if i < 4 { [0xaa; 8] } else { [0; 8] };
        if i != 4 {
            // The fifth may have moved before its completion found no place; none behind it.
            assert_eq!(p.b.data(64 * i, 8), want, "WRITE {i}");
        }
    }
    let ids: Vec<u64> = std::iter::from_fn(|| cq.poll_quietly())
        .map(|c| c.wr_id)
        .collect();
    assert_eq!(ids, [0, 1, 2, 3], "what was written stays");
    cq.publish();
    let c = p.a.rcq.one();
    assert_eq!(
        (c.wr_id, status(&c)),
        (8, WcStatus::WrFlushErr),
        "its receives flush"
    );
    let _ = q.ring();
    q.post_silently(&Wr::new(WrOpcode::Write, 11).inline(&[1]).to(&p.b.mr, 0));
    let _ = q.ring();
    p.pump();
    assert!(cq.poll().is_none(), "an overrun CQ takes nothing more");
    others_go_on(&mut p, &mut x, &mut y);
    // Also the same users' other queues.
    p.b.qp.post_recv(1, &[p.b.mr.sge(0, 64)]);
    p.a.qp.post(&Wr::new(WrOpcode::Send, 2).inline(b"on"));
    p.pump();
    assert_eq!(p.a.scq.one().status, 0);
    assert_eq!(pending(&p.a.user.ram), 0, "one event each");
    // Destroyed and made anew, it works.
    p.e.destroy_qp(p.a.user.id, q.handle).expect("destroy_qp");
    p.e.destroy_cq(p.a.user.id, cq.handle).expect("destroy_cq");
}

#[test]
fn a_receive_queues_cq_overruns() {
    let mut p = Pair::new(LEN);
    let mut x = Side::new(&mut p.e, LEN, Cap::default());
    let mut y = Side::new(&mut p.e, LEN, Cap::default());
    connect(&mut p.e, &x.qp, &y.qp, &Conn::default());
    let mut cq = p.b.user.cq(&mut p.e, 1);
    let mut r = p.b.user.qp(&mut p.e, p.b.pd, &p.b.scq, &cq, Cap::default());
    let mut q = p.a.extra_qp(&mut p.e, Cap::default());
    connect(&mut p.e, &q, &r, &Conn::default());
    for i in 0..6 {
        r.post_recv(i, &[p.b.mr.sge(0, 64)]);
    }
    for i in 0..3u64 {
        q.post(&Wr::new(WrOpcode::Send, i).inline(b"x"));
        p.pump();
    }
    assert!(event(&p.b.user.ram, summary::CQ_ERROR, cq.index()));
    assert!(event(&p.b.user.ram, summary::QP_FATAL, r.index()));
    assert_eq!(r.state(&p.e), QpState::Err);
    assert_eq!(pending(&p.a.user.ram), 0);
    let got: Vec<u64> = cq.drain().iter().map(|c| c.wr_id).collect();
    assert_eq!(got, [0, 1]);
    p.pump();
    assert!(cq.poll().is_none());
    let sends = p.a.scq.drain();
    assert!(
        sends.len() >= 2 && sends[..2].iter().all(|c| c.status == 0),
        "{sends:?}"
    );
    others_go_on(&mut p, &mut x, &mut y);
}

/// The receiver's overrun ends the receiver; a sender outside the hot set still learns of all it posted.
#[test]
fn a_sender_goes_on_after_its_peers_overrun() {
    let mut p = Pair::new(LEN);
    let small = Cap {
        sq_log2: 3,
        rq_log2: 3,
        ..Cap::default()
    };
    // Enough others that no place in the hot set is left.
    for _ in 0..20 {
        let other = p.a.extra_qp(&mut p.e, small);
        other.connect(&mut p.e, other.qpn, &Conn::default());
    }
    let cq = p.b.user.cq(&mut p.e, 0);
    let mut r = p.b.user.qp(&mut p.e, p.b.pd, &p.b.scq, &cq, small);
    let mut q = p.a.extra_qp(&mut p.e, small);
    connect(&mut p.e, &q, &r, &Conn::default());
    let polled = &p.a.user.ram.window().doorbells.polled[q.index()];
    assert_eq!(polled.load(Ordering::SeqCst), 0, "not in the hot set");
    for i in 0..6 {
        r.post_recv(i, &[p.b.mr.sge(0, 64)]);
        q.post_silently(&Wr::new(WrOpcode::Send, i).inline(b"x"));
    }
    assert_eq!(q.ring(), Ring::Seen);
    for _ in 0..20 {
        pump(&mut p.e);
        p.clock.advance(4096 << 14);
    }
    assert_eq!(r.state(&p.e), QpState::Err);
    let ids: Vec<u64> = p.a.scq.drain().iter().map(|c| c.wr_id).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5], "nobody is left waiting in silence");
}

/// A QP connected to itself whose receive CQ overruns: each of its sends still completes once.
#[test]
fn an_overrun_of_ones_own_receives() {
    let (mut e, _clock) = engine();
    let mut s = Side::new(&mut e, LEN, Cap::default());
    let rcq = s.user.cq(&mut e, 1);
    let mut q = s.user.qp(&mut e, s.pd, &s.scq, &rcq, Cap::default());
    q.connect(&mut e, q.qpn, &Conn::default());
    for i in 0..8 {
        q.post_recv(i, &[s.mr.sge(0, 128)]);
    }
    for i in 0..6u64 {
        q.post_silently(&Wr::new(WrOpcode::Send, i).inline(&[1; 100]));
    }
    let _ = q.ring();
    pump(&mut e);
    assert_eq!(q.state(&e), QpState::Err);
    let ids: Vec<u64> = s.scq.drain().iter().map(|c| c.wr_id).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5], "each once");
    for i in 6..9u64 {
        q.post(&Wr::new(WrOpcode::Send, i));
    }
    pump(&mut e);
    let ids: Vec<u64> = s.scq.drain().iter().map(|c| c.wr_id).collect();
    assert_eq!(ids, [6, 7, 8], "and those posted later");
}

#[test]
fn a_full_cq_that_is_polled_in_time_loses_nothing() {
    let mut p = Pair::new(LEN);
    let mut cq = p.a.user.cq(&mut p.e, 2);
    let mut q = p.a.user.qp(&mut p.e, p.a.pd, &cq, &p.a.rcq, Cap::default());
    let r = p.b.extra_qp(&mut p.e, Cap::default());
    connect(&mut p.e, &q, &r, &Conn::default());
    for round in 0..200u64 {
        for i in 0..4 {
            q.post(
                &Wr::new(WrOpcode::Write, 4 * round + i)
                    .inline(&[1])
                    .to(&p.b.mr, 0),
            );
        }
        p.pump();
        let got: Vec<u64> = cq.drain().iter().map(|c| c.wr_id).collect();
        assert_eq!(got, (4 * round..4 * round + 4).collect::<Vec<_>>());
    }
    assert_eq!(pending(&p.a.user.ram), 0);
}

/// The device keeps its own count: whatever the user publishes hurts only that CQ.
#[test]
fn a_lying_consumer_index_hurts_only_its_own_cq() {
    for lie in [1000u64, 0xffff_ffff, u64::MAX, 1 << 31] {
        let mut p = Pair::new(LEN);
        let mut x = Side::new(&mut p.e, LEN, Cap::default());
        let mut y = Side::new(&mut p.e, LEN, Cap::default());
        connect(&mut p.e, &x.qp, &y.qp, &Conn::default());
        let cq = p.a.user.cq(&mut p.e, 1);
        let mut q = p.a.user.qp(&mut p.e, p.a.pd, &cq, &p.a.rcq, Cap::default());
        let r = p.b.extra_qp(&mut p.e, Cap::default());
        connect(&mut p.e, &q, &r, &Conn::default());
        p.a.user.ram.word(cq.ctrl).store(lie, Ordering::SeqCst);
        let before = p.a.user.ram.read(p.a.mr.offset - 4096, LEN + 8192);
        for i in 0..20 {
            q.post(&Wr::new(WrOpcode::Write, i).inline(&[1]).to(&p.b.mr, 0));
            p.pump();
        }
        assert!(p.a.user.ram.read(p.a.mr.offset - 4096, LEN + 8192) == before);
        others_go_on(&mut p, &mut x, &mut y);
    }
}

/// The first message to a QP in RTR says that the other side is established (IBA 1.4, 11.6.3.2).
#[test]
fn communication_established() {
    for op in [WrOpcode::Send, WrOpcode::Write, WrOpcode::Read] {
        let (mut e, _clock) = engine();
        let c = Conn::default();
        let mut a = Side::new(&mut e, LEN, Cap::default());
        let mut b = Side::new(&mut e, LEN, Cap::default());
        for (x, y) in [(&a.qp, &b.qp), (&b.qp, &a.qp)] {
            x.init(&mut e, &c);
            x.rtr(&mut e, y.qpn, &c);
        }
        a.qp.rts(&mut e, &c);
        pump(&mut e);
        assert_eq!(pending(&b.user.ram), 0);
        for i in 0..3 {
            b.qp.post_recv(1, &[b.mr.sge(0, 64)]);
            a.qp.post(&Wr::new(op, 2).sge(a.mr.sge(0, 8)).to(&b.mr, 0));
            pump(&mut e);
            assert_eq!(a.scq.one().status, 0);
            let raised = pending(&b.user.ram) != 0
                && event(&b.user.ram, summary::QP_COMM_ESTABLISHED, b.qp.index());
            assert_eq!(raised, i == 0, "{op:?}, message {i}");
            assert_eq!(wakes(&b.user), 1);
        }
        b.qp.rts(&mut e, &c);
        a.qp.post_recv(1, &[a.mr.sge(0, 64)]);
        b.qp.post(&Wr::new(WrOpcode::Send, 2));
        pump(&mut e);
        assert_eq!(pending(&a.user.ram), 0, "in RTS: no news");
    }
}
