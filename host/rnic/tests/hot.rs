//! More queues than the engine looks at every turn: all work is seen, and nobody is told otherwise.

mod common;

use std::sync::atomic::Ordering;

use common::*;
use hyv_rnic::Engine;

const SMALL: Cap = Cap {
    sq_log2: 3,
    rq_log2: 3,
    stride: 32,
    sig_all: false,
    ty: QpType::Rc,
    srq: u32::MAX,
};

/// Connections between two users; each QP sends its own count.
struct Many {
    e: Engine,
    a: Side,
    b: Side,
    /// Sender, receiver, messages sent.
    links: Vec<(Qp, Qp, u64)>,
    /// Messages received, by link.
    got: Vec<u64>,
}

impl Many {
    fn new(n: usize) -> Self {
        let (mut e, _clock) = engine();
        let ram = 2 << 20;
        let mut a = Side::new(&mut e, ram, SMALL);
        let mut b = Side::new(&mut e, ram, SMALL);
        // Rings lie in the rest of a larger RAM.
        for s in [&mut a, &mut b] {
            let mut user = User::new(&mut e, 8 << 20);
            s.pd = user.pd(&mut e);
            s.mr = user.mr(&mut e, s.pd, 4096, FULL);
            s.scq = user.cq(&mut e, 13);
            s.rcq = user.cq(&mut e, 13);
            s.user = user;
        }
        let links: Vec<_> = (0..n)
            .map(|_| {
                let (x, y) = (a.extra_qp(&mut e, SMALL), b.extra_qp(&mut e, SMALL));
                connect(&mut e, &x, &y, &Conn::default());
                (x, y, 0)
            })
            .collect();
        let got = vec![0; n];
        Self {
            e,
            a,
            b,
            links,
            got,
        }
    }

    /// A receive and a message, which says who sent it and its number.
    fn post(&mut self, i: usize) -> Ring {
        let (x, y, sent) = &mut self.links[i];
        y.post_recv(i as u64, &[self.b.mr.sge(0, 64)]);
        let mut data = (i as u64).to_le_bytes().to_vec();
        data.extend(sent.to_le_bytes());
        x.post_silently(&Wr::new(WrOpcode::Send, i as u64).inline(&data));
        *sent += 1;
        x.ring()
    }

    fn outstanding(&self, i: usize) -> u64 {
        self.links[i].2 - self.got[i]
    }

    fn take(&mut self) {
        for c in self.b.rcq.drain() {
            assert_eq!(c.status, 0);
            let i = c.wr_id as usize;
            assert_eq!(
                (c.data[0], c.data[1]),
                (c.wr_id, self.got[i]),
                "link {i}, in order"
            );
            self.got[i] += 1;
        }
        assert!(self.a.scq.drain().iter().all(|c| c.status == 0));
    }

    fn check_all(&mut self) {
        pump(&mut self.e);
        self.take();
        for i in 0..self.links.len() {
            assert_eq!(self.got[i], self.links[i].2, "link {i}: work not seen");
        }
    }

    fn is_polled(&self, i: usize) -> bool {
        polled(&self.a.user, self.links[i].0.index())
    }
}

fn polled(u: &User, index: usize) -> bool {
    u.ram.window().doorbells.polled[index].load(Ordering::SeqCst) != 0
}

fn polled_flags(u: &User) -> usize {
    let flags = &u.ram.window().doorbells.polled;
    flags
        .iter()
        .filter(|f| f.load(Ordering::SeqCst) != 0)
        .count()
}

fn bits(u: &User) -> u64 {
    let d = &u.ram.window().doorbells;
    d.level1
        .iter()
        .map(|w| w.load(Ordering::SeqCst))
        .fold(0, |a, b| a | b)
}

#[test]
fn more_busy_queues_than_places() {
    let mut m = Many::new(64);
    for _ in 0..200 {
        for i in 0..64 {
            if m.outstanding(i) < 8 {
                assert_eq!(m.post(i), Ring::Seen);
            }
        }
        m.e.poll();
        m.take();
        let hot = polled_flags(&m.a.user) + polled_flags(&m.b.user);
        assert!(hot <= 16, "{hot} queues are polled");
    }
    m.check_all();
    assert!(
        m.got.iter().all(|&n| n >= 100),
        "each got its share: {:?}",
        m.got
    );
}

#[test]
fn two_thousand_queues_with_random_activity() {
    let mut m = Many::new(2_000);
    let mut rng = Rng(11);
    for round in 0..3_000 {
        for _ in 0..rng.below(8) {
            // A few favourites, and the rest.
            let i = if rng.below(2) == 0 {
                rng.below(10)
            } else {
                rng.below(2_000)
            } as usize;
            if m.outstanding(i) < 8 {
                assert_eq!(m.post(i), Ring::Seen);
            }
        }
        for _ in 0..rng.below(3) {
            m.e.poll();
        }
        if round % 7 == 0 {
            m.take();
        }
    }
    m.check_all();
    let before = m.e.counters();
    for _ in 0..10_000 {
        assert_eq!(m.e.poll(), 0, "idle queues are no work");
    }
    assert_eq!(m.e.counters(), before);
    // Everybody at once.
    for i in 0..2_000 {
        assert_eq!(m.post(i), Ring::Seen);
    }
    m.check_all();
}

/// The last queues that the bitmap has bits for.
#[test]
fn the_bitmaps_ends() {
    let mut m = Many::new(4_200);
    for i in [0, 63, 64, 4_095, 4_096, 4_199] {
        assert_eq!(m.post(i), Ring::Seen);
        pump(&mut m.e);
        m.take();
        assert_eq!(m.outstanding(i), 0, "link {i}");
    }
}

#[test]
fn a_polled_queue_needs_no_bit_and_another_does() {
    let mut m = Many::new(40);
    let hot: Vec<usize> = (0..40).filter(|&i| m.is_polled(i)).collect();
    assert!(!hot.is_empty() && hot.len() <= 16);
    let cold = (0..40).find(|&i| !m.is_polled(i)).expect("more than 16");
    assert_eq!(m.post(hot[0]), Ring::Seen);
    assert_eq!(bits(&m.a.user), 0, "its slot is its doorbell");
    pump(&mut m.e);
    m.take();
    assert_eq!(m.post(cold), Ring::Seen);
    assert_ne!(bits(&m.a.user), 0);
    pump(&mut m.e);
    assert_eq!(bits(&m.a.user), 0, "taken");
    m.check_all();
}

#[test]
fn places_go_to_those_who_work() {
    let mut m = Many::new(48);
    for phase in 0..3 {
        let mine = phase * 16..phase * 16 + 16;
        for _ in 0..10_000 {
            for i in mine.clone() {
                if m.outstanding(i) == 0 {
                    assert_eq!(m.post(i), Ring::Seen);
                }
            }
            m.e.poll();
            m.take();
        }
        let hot = mine.clone().filter(|&i| m.is_polled(i)).count();
        assert!(
            hot >= 15,
            "phase {phase}: {hot} of the 16 busy queues are polled"
        );
        for i in 0..48 {
            if m.outstanding(i) == 0 {
                // Also those that just lost their place.
                assert_eq!(m.post(i), Ring::Seen);
            }
        }
        m.check_all();
    }
}

/// A queue loses its place between its user's look at the flag and the device's next turn: its work is seen all
/// the same.
#[test]
fn a_place_is_not_taken_from_a_queue_with_work() {
    let mut m = Many::new(40);
    let mut rng = Rng(13);
    for round in 0..20 {
        m.check_all();
        for _ in 0..5_000 {
            m.e.poll();
        }
        let hot: Vec<usize> = (0..40).filter(|&i| m.is_polled(i)).collect();
        assert!(!hot.is_empty(), "round {round}");
        for &i in &hot {
            if rng.below(4) != 0 {
                assert_eq!(m.post(i), Ring::Seen);
            }
        }
        assert_eq!(bits(&m.a.user), 0, "no bit says so");
        // Queues that become able to send ask for places, before the device's next turn.
        for _ in 0..4 {
            let x = m.a.extra_qp(&mut m.e, SMALL);
            x.connect(&mut m.e, x.qpn, &Conn::default());
        }
        m.check_all();
    }
}

#[test]
fn a_sleeping_device_asks_for_a_kick() {
    let mut m = Many::new(40);
    let mut rng = Rng(12);
    m.check_all();
    for round in 0..300 {
        assert!(m.e.doze(), "round {round}: nothing to do");
        assert!(m.e.is_dozing());
        assert_eq!(
            polled_flags(&m.a.user) + polled_flags(&m.b.user),
            0,
            "nobody is polled"
        );
        let n = 1 + rng.below(4);
        for _ in 0..n {
            let i = rng.below(40) as usize;
            if m.outstanding(i) < 8 {
                assert_eq!(m.post(i), Ring::Kick, "round {round}, link {i}");
            }
        }
        m.e.wake_up();
        assert!(!m.e.is_dozing());
        // Posted after it woke, before it looked.
        let i = rng.below(40) as usize;
        if m.outstanding(i) < 8 {
            assert_eq!(m.post(i), Ring::Seen);
        }
        m.check_all();
    }
}

#[test]
fn a_device_with_work_does_not_fall_asleep() {
    let mut m = Many::new(40);
    m.check_all();
    for i in 0..40 {
        let hot = m.is_polled(i);
        assert_eq!(m.post(i), Ring::Seen);
        assert!(!m.e.doze(), "link {i}, polled {hot}: work was posted");
        assert!(!m.e.is_dozing());
        assert_eq!(m.is_polled(i), hot, "the flags are as they were");
        let need = &m.a.user.ram.window().doorbells.need_wakeup;
        assert_eq!(need.load(Ordering::SeqCst), 0);
        m.check_all();
    }
    // A large transfer in slices.
    let mut p = Pair::new(4 << 20);
    p.a.qp.post(
        &Wr::new(WrOpcode::Write, 1)
            .sge(p.a.mr.sge(0, 4 << 20))
            .to(&p.b.mr, 0),
    );
    p.e.poll();
    assert!(!p.e.doze(), "in the middle of a transfer");
    p.pump();
    assert_eq!(p.a.scq.one().status, 0);
    assert!(p.e.doze());
}

#[test]
fn what_happens_while_the_device_sleeps() {
    let mut m = Many::new(3);
    m.check_all();
    assert!(m.e.doze());
    // A user that comes now is told to kick, and so is a QP that is connected now.
    let mut c = Side::new(&mut m.e, 1 << 16, Cap::default());
    let mut d = Side::new(&mut m.e, 1 << 16, Cap::default());
    connect(&mut m.e, &c.qp, &d.qp, &Conn::default());
    assert!(m.e.is_dozing());
    assert_eq!((polled_flags(&c.user), polled_flags(&d.user)), (0, 0));
    d.qp.post_recv(1, &[d.mr.sge(0, 64)]);
    c.qp.post_silently(&Wr::new(WrOpcode::Send, 2).inline(b"new"));
    assert_eq!(c.qp.ring(), Ring::Kick);
    assert_eq!(m.post(1), Ring::Kick);
    m.e.wake_up();
    pump(&mut m.e);
    assert_eq!((c.scq.one().status, d.rcq.one().status), (0, 0));
    m.check_all();
    // QPs that go while it sleeps.
    assert!(m.e.doze());
    m.e.destroy_qp(c.user.id, c.qp.handle).expect("destroy");
    m.e.remove_user(d.user.id);
    m.e.wake_up();
    assert_eq!(m.post(2), Ring::Seen);
    m.check_all();
}

#[test]
fn a_sleeping_device_keeps_time() {
    let c = Conn {
        rnr_retry: 2,
        ..Conn::default()
    };
    let mut p = Pair::with(1 << 16, Cap::default(), &c);
    assert_eq!(p.e.next_timer_ns(), None);
    p.a.qp.post(&Wr::new(WrOpcode::Send, 1).inline(b"late"));
    p.pump();
    assert!(p.e.doze(), "only a timer runs");
    let wait = p.e.next_timer_ns().expect("a timer");
    assert!(wait > 0 && wait < 1_000_000_000, "{wait} ns");
    // A receive posted meanwhile rings no doorbell; the timer finds it.
    p.b.qp.post_recv(2, &[p.b.mr.sge(0, 8)]);
    p.clock.advance(wait);
    p.e.wake_up();
    p.e.tick();
    p.pump();
    assert_eq!((p.a.scq.one().status, p.b.rcq.one().byte_len), (0, 4));
    // And one that never comes.
    p.a.qp.post(&Wr::new(WrOpcode::Send, 3).inline(b"never"));
    p.pump();
    for _ in 0..100 {
        if p.a.qp.state(&p.e) == QpState::Err {
            break;
        }
        assert!(p.e.doze());
        p.clock.advance(p.e.next_timer_ns().expect("a timer"));
        p.e.wake_up();
        p.e.tick();
    }
    assert_eq!(status(&p.a.scq.one()), WcStatus::RnrRetryExcErr);
}

#[test]
fn more_users_than_one_turn_looks_at() {
    let (mut e, _clock) = engine();
    let mut sides: Vec<(Side, Qp)> = (0..60)
        .map(|_| {
            let mut s = Side::new(&mut e, 4096, SMALL);
            let t = s.extra_qp(&mut e, SMALL);
            connect(&mut e, &s.qp, &t, &Conn::default());
            (s, t)
        })
        .collect();
    for round in 0..50u64 {
        for (k, (s, t)) in sides.iter_mut().enumerate() {
            if (round + k as u64).is_multiple_of(3) {
                t.post_recv(round, &[s.mr.sge(0, 8)]);
                s.qp.post(&Wr::new(WrOpcode::Send, round).inline(&round.to_le_bytes()));
            }
        }
        // Every user's summary is looked at once in so many turns, however many users there are.
        for _ in 0..8 * hyv_rnic::limits::SUMMARY_TURNS {
            e.poll();
        }
        for (k, (s, _)) in sides.iter_mut().enumerate() {
            if (round + k as u64).is_multiple_of(3) {
                assert_eq!(s.scq.one().status, 0, "user {k}");
                assert_eq!(s.rcq.one().data[0], round, "user {k}");
            }
        }
    }
}

#[test]
fn doorbells_of_queues_that_are_not_there() {
    let mut m = Many::new(20);
    let d = &m.a.user.ram.window().doorbells;
    for w in &d.level0 {
        w.store(u64::MAX, Ordering::SeqCst);
    }
    for w in &d.level1 {
        w.store(u64::MAX, Ordering::SeqCst);
    }
    pump(&mut m.e);
    assert_eq!(bits(&m.a.user), 0);
    for i in 0..20 {
        let _ = m.post(i);
    }
    m.check_all();
}
