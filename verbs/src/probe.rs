//! The floor: what no queue between two parties can be faster than.
//!
//! The prober stores odd numbers and waits for the even ones that the responder stores; the loops are as tight
//! as they can be (a fence after the store would change what is measured). Both store to one line, or each to its own as a
//! request and its completion do: a line that always the same side writes has to be taken back from its reader each time,
//! which costs up to twice as much.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicU64, Ordering};

use hyv_abi::window::Window;

/// Turns of waiting between looks at the clock.
const PATIENCE: u32 = 1 << 16;

/// Where the two sides store.
#[derive(Clone, Copy, Debug)]
pub struct Lines<'a> {
    prober: &'a AtomicU64,
    responder: &'a AtomicU64,
}

impl<'a> Lines<'a> {
    /// A word of each side's, or one for both.
    #[must_use]
    pub const fn new(prober: &'a AtomicU64, responder: &'a AtomicU64) -> Self {
        Self { prober, responder }
    }

    /// One line of a window, that goes from one side to the other and back.
    #[must_use]
    pub const fn one(window: &'a Window) -> Self {
        Self::new(&window.probe.line, &window.probe.line)
    }

    /// A line of each side's.
    #[must_use]
    pub const fn two(window: &'a Window) -> Self {
        Self::new(&window.probe.line, &window.probe.reply)
    }

    /// Makes them ready; before the responder begins.
    pub fn reset(&self) {
        self.prober.store(0, Ordering::SeqCst);
        self.responder.store(0, Ordering::SeqCst);
    }
}

/// Answers `rounds` rounds, or gives up after `silence_ns` without one. Returns the rounds answered.
pub fn respond(lines: Lines<'_>, rounds: u32, silence_ns: u64, now_ns: impl Fn() -> u64) -> u32 {
    for k in 1..=u64::from(rounds) {
        let mut turns = 0u32;
        let mut since = None;
        while lines.prober.load(Ordering::Acquire) != 2 * k - 1 {
            turns += 1;
            if turns.is_multiple_of(PATIENCE) {
                let now = now_ns();
                if now.saturating_sub(*since.get_or_insert(now)) > silence_ns {
                    return k as u32 - 1;
                }
                spin_loop();
            }
        }
        lines.responder.store(2 * k, Ordering::Release);
    }
    rounds
}

/// Bounces rounds `from + 1` to `from + rounds`; false if the responder was silent for `silence_ns`.
pub fn bounce(
    lines: Lines<'_>,
    from: u32,
    rounds: u32,
    silence_ns: u64,
    now_ns: impl Fn() -> u64,
) -> bool {
    for k in u64::from(from) + 1..=u64::from(from) + u64::from(rounds) {
        lines.prober.store(2 * k - 1, Ordering::Release);
        let mut turns = 0u32;
        let mut since = None;
        while lines.responder.load(Ordering::Acquire) != 2 * k {
            turns += 1;
            if turns.is_multiple_of(PATIENCE) {
                let now = now_ns();
                if now.saturating_sub(*since.get_or_insert(now)) > silence_ns {
                    return false;
                }
            }
        }
    }
    true
}
