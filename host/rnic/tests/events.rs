//! Completion events, overruns, and the other things that set a bit and wake the user.

mod common;

use std::sync::atomic::Ordering;

use common::*;

const LEN: u64 = 1 << 16;

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
