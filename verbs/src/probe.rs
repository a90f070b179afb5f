//! The floor: one cache line that two parties bounce. No queue between them can be faster than this.
//!
//! The prober stores odd numbers and waits for the even ones that the responder stores; the loops are as tight
//! as they can be (a fence after the store would change what is measured).

use core::hint::spin_loop;
use core::sync::atomic::{AtomicU64, Ordering};

/// Turns of waiting between looks at the clock.
const PATIENCE: u32 = 1 << 16;

/// Answers `rounds` rounds, or gives up after `silence_ns` without one. Returns the rounds answered.
pub fn respond(line: &AtomicU64, rounds: u32, silence_ns: u64, now_ns: impl Fn() -> u64) -> u32 {
    for k in 1..=u64::from(rounds) {
        let mut turns = 0u32;
        let mut since = None;
        while line.load(Ordering::Acquire) != 2 * k - 1 {
            turns += 1;
            if turns.is_multiple_of(PATIENCE) {
                let now = now_ns();
                if now.saturating_sub(*since.get_or_insert(now)) > silence_ns {
                    return k as u32 - 1;
                }
                spin_loop();
            }
        }
        line.store(2 * k, Ordering::Release);
    }
    rounds
}

/// Bounces rounds `from + 1` to `from + rounds`; false if the responder was silent for `silence_ns`.
pub fn bounce(
    line: &AtomicU64,
    from: u32,
    rounds: u32,
    silence_ns: u64,
    now_ns: impl Fn() -> u64,
) -> bool {
    for k in u64::from(from) + 1..=u64::from(from) + u64::from(rounds) {
        line.store(2 * k - 1, Ordering::Release);
        let mut turns = 0u32;
        let mut since = None;
        while line.load(Ordering::Acquire) != 2 * k {
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
