//! The doorbell and completion handshakes under loom: in no interleaving is a work request or a completion
//! left where nobody looks.
//!
//! Run: `RUSTFLAGS="--cfg loom" cargo test -p hyv-abi --test loom_doorbell --release`
#![cfg(loom)]

use std::cell::Cell;

use hyv_abi::doorbell::{Ring, cool, doze, ring};
use hyv_abi::queue::arm;
use hyv_abi::sync::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use loom::sync::Arc;
use loom::thread;

/// One queue of one user: its slots' last words, and what the window has for it.
struct Shared {
    /// Sequence numbers, as in the last words of a ring's slots.
    slots: [AtomicU64; 2],
    polled: AtomicU8,
    level0: AtomicU64,
    level1: AtomicU64,
    need_wakeup: AtomicU32,
    /// The eventfd.
    kicks: AtomicU32,
}

const L0: u64 = 1 << 5;
const L1: u64 = 1 << 3;

impl Shared {
    fn new(polled: bool) -> Arc<Self> {
        Arc::new(Self {
            slots: [AtomicU64::new(0), AtomicU64::new(0)],
            polled: AtomicU8::new(u8::from(polled)),
            level0: AtomicU64::new(0),
            level1: AtomicU64::new(0),
            need_wakeup: AtomicU32::new(0),
            kicks: AtomicU32::new(0),
        })
    }

    /// The user posts at position `i`.
    fn post(&self, i: usize) {
        self.slots[i].store(i as u64 + 1, Ordering::Release);
        self.ring();
    }

    fn ring(&self) {
        let r = ring(
            &self.polled,
            (&self.level0, L0),
            (&self.level1, L1),
            &self.need_wakeup,
        );
        if r == Ring::Kick {
            self.kicks.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// The engine's look at the bitmap, as `Doorbells::take` does it: whether this queue's bit was there.
    fn take(&self) -> bool {
        if self.level1.load(Ordering::Relaxed) == 0
            || self.level1.swap(0, Ordering::SeqCst) & L1 == 0
        {
            return false;
        }
        let rung = self.level0.swap(0, Ordering::SeqCst) & L0 != 0;
        fence(Ordering::SeqCst);
        rung
    }

    fn posted(&self, head: usize) -> bool {
        self.slots
            .get(head)
            .is_some_and(|s| s.load(Ordering::Acquire) as usize == head + 1)
    }
}

/// The engine as far as one queue goes.
struct Device {
    hot: bool,
    dozing: bool,
    head: Cell<usize>,
}

impl Device {
    fn new(hot: bool) -> Self {
        Self {
            hot,
            dozing: false,
            head: Cell::new(0),
        }
    }

    fn run(&self, s: &Shared) {
        while s.posted(self.head.get()) {
            self.head.set(self.head.get() + 1);
        }
    }

    fn turn(&self, s: &Shared) {
        if self.hot {
            self.run(s);
        }
        if s.take() {
            self.run(s);
        }
    }

    fn cool(&mut self, s: &Shared) {
        if self.hot {
            self.hot = cool(&s.polled, || s.posted(self.head.get()));
        }
    }

    fn heat(&mut self, s: &Shared) {
        self.hot = true;
        s.polled.store(1, Ordering::SeqCst);
        // What was posted before the flag was seen.
        self.run(s);
    }

    fn doze(&mut self, s: &Shared) {
        if self.hot {
            s.polled.store(0, Ordering::Relaxed);
        }
        let stay = doze(&s.need_wakeup, || {
            s.level1.load(Ordering::Relaxed) != 0 || (self.hot && s.posted(self.head.get()))
        });
        self.dozing = !stay;
        if stay && self.hot {
            s.polled.store(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        }
    }

    /// Whether an engine that is left alone from here on would come to see all of `posted` requests.
    fn will_see(&self, s: &Shared, posted: usize) {
        let head = self.head.get();
        if head == posted {
            return;
        }
        let bit =
            s.level1.load(Ordering::SeqCst) & L1 != 0 && s.level0.load(Ordering::SeqCst) & L0 != 0;
        if self.dozing {
            assert!(
                s.kicks.load(Ordering::SeqCst) > 0,
                "asleep, unkicked: {head} of {posted}"
            );
            // Woken, it polls hot queues again, and the bitmap.
            assert!(
                self.hot || bit,
                "kicked, but nothing says where: {head} of {posted}"
            );
        } else {
            assert!(
                self.hot || bit,
                "awake, but nobody looks there: {head} of {posted}"
            );
        }
    }
}

fn check(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut b = loom::model::Builder::new();
    b.preemption_bound = Some(preemptions);
    b.check(f);
}

/// The user posts twice, while the engine does `steps` with the queue.
fn posts_against(hot: bool, steps: fn(&mut Device, &Shared)) {
    check(4, move || {
        let s = Shared::new(hot);
        let user = {
            let s = Arc::clone(&s);
            thread::spawn(move || {
                s.post(0);
                s.post(1);
            })
        };
        let mut d = Device::new(hot);
        steps(&mut d, &s);
        user.join().unwrap();
        d.will_see(&s, 2);
    });
}

#[test]
fn a_queue_that_is_not_polled() {
    posts_against(false, |d, s| {
        d.turn(s);
        d.turn(s);
    });
}

#[test]
fn a_queue_that_cools() {
    posts_against(true, |d, s| {
        d.turn(s);
        d.cool(s);
        d.turn(s);
    });
}

#[test]
fn a_queue_that_heats() {
    posts_against(false, |d, s| {
        d.turn(s);
        d.heat(s);
        d.turn(s);
    });
}

#[test]
fn a_queue_that_heats_and_cools() {
    posts_against(false, |d, s| {
        d.heat(s);
        d.cool(s);
        d.turn(s);
    });
}

#[test]
fn falling_asleep_with_a_hot_queue() {
    posts_against(true, |d, s| {
        d.turn(s);
        d.doze(s);
    });
}

#[test]
fn falling_asleep_with_a_cold_queue() {
    posts_against(false, |d, s| {
        d.turn(s);
        d.doze(s);
    });
}

#[test]
fn cooling_and_falling_asleep() {
    posts_against(true, |d, s| {
        d.cool(s);
        d.doze(s);
    });
}

/// Two queues share the summary word, and this engine takes only what the summary says.
#[test]
fn two_users_of_one_summary_bit() {
    check(3, || {
        let s = Shared::new(false);
        let other = Arc::new((AtomicU64::new(0), AtomicU8::new(0)));
        const OTHER: u64 = 1 << 9;
        let first = {
            let s = Arc::clone(&s);
            thread::spawn(move || s.post(0))
        };
        let second = {
            let (s, other) = (Arc::clone(&s), Arc::clone(&other));
            thread::spawn(move || {
                other.0.store(1, Ordering::Release);
                let _ = ring(
                    &other.1,
                    (&s.level0, OTHER),
                    (&s.level1, L1),
                    &s.need_wakeup,
                );
            })
        };
        let (mut seen, mut seen_other) = (false, false);
        if s.level1.load(Ordering::Relaxed) != 0 && s.level1.swap(0, Ordering::SeqCst) & L1 != 0 {
            let bits = s.level0.swap(0, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            seen = bits & L0 != 0 && s.posted(0);
            seen_other = bits & OTHER != 0 && other.0.load(Ordering::Acquire) == 1;
            assert_eq!(seen, bits & L0 != 0, "a bit without its work request");
            assert_eq!(
                seen_other,
                bits & OTHER != 0,
                "a bit without its work request"
            );
        }
        first.join().unwrap();
        second.join().unwrap();
        let (l0, l1) = (
            s.level0.load(Ordering::SeqCst),
            s.level1.load(Ordering::SeqCst),
        );
        assert!(seen || (l0 & L0 != 0 && l1 & L1 != 0));
        assert!(seen_other || (l0 & OTHER != 0 && l1 & L1 != 0));
    });
}

/// The user: arm, fence, look again, sleep. The engine: entry, fence, take the arm word, event.
#[test]
fn an_armed_user_is_woken() {
    for pushes in 1..=2 {
        check(4, move || {
            let entries = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
            let armed = Arc::new(AtomicU64::new(arm::NONE));
            let events = Arc::new(AtomicU32::new(0));
            let engine = {
                let (entries, armed, events) = (entries.clone(), armed.clone(), events.clone());
                thread::spawn(move || {
                    for (i, e) in entries.iter().enumerate().take(pushes) {
                        e.store(i as u64 + 1, Ordering::Release);
                        fence(Ordering::SeqCst);
                        if armed.load(Ordering::Relaxed) == arm::ANY
                            && armed.swap(arm::NONE, Ordering::AcqRel) != arm::NONE
                        {
                            events.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                })
            };
            let mut got = 0;
            let mut take = || {
                let before = got;
                while got < pushes && entries[got].load(Ordering::Acquire) as usize == got + 1 {
                    got += 1;
                }
                got > before
            };
            take();
            armed.store(arm::ANY, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let sleeps = !take();
            engine.join().unwrap();
            let (events, missed) = (events.load(Ordering::SeqCst), got < pushes);
            assert!(events <= 1, "one arm, one event");
            if sleeps && missed {
                assert_eq!(events, 1, "asleep for ever: {got} of {pushes}");
            }
        });
    }
}
