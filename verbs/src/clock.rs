//! The clock of a native process: what a guest has, where the machine can give it.
#![allow(unsafe_code, reason = "reads the time-stamp counter")]

use std::time::Instant;

/// Nanoseconds since it was made: by the TSC where the host says that it is steady, as in a guest, so that neither side of a comparison
/// pays for a system's clock; otherwise by the system's.
#[derive(Debug)]
pub(crate) struct Clock {
    base: u64,
    /// Nanoseconds per tick, times 2^32; 0: the TSC is no clock here.
    scale: u64,
    start: Instant,
}

impl Clock {
    /// Starts it. `tsc_hz`: ticks of the TSC per second, 0 if it is not steady.
    pub fn start(tsc_hz: u64) -> Self {
        Self {
            base: tsc(),
            scale: (1_000_000_000u64 << 32).checked_div(tsc_hz).unwrap_or(0),
            start: Instant::now(),
        }
    }

    /// Now. Not ordered against other instructions.
    #[inline]
    pub fn now_ns(&self) -> u64 {
        if self.scale == 0 {
            return self.start.elapsed().as_nanos() as u64;
        }
        // Another core's counter may be a few ticks behind.
        let ticks = tsc().saturating_sub(self.base);
        ((u128::from(ticks) * u128::from(self.scale)) >> 32) as u64
    }
}

#[inline]
fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has it, and Linux leaves it open to user code.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn without_a_steady_counter_the_systems_clock_is_read() {
        let clock = Clock::start(0);
        let before = clock.start.elapsed();
        std::thread::sleep(Duration::from_millis(2));
        let now = Duration::from_nanos(clock.now_ns());
        assert!(now >= before + Duration::from_millis(2) && now <= clock.start.elapsed());
    }

    #[test]
    fn ticks_become_nanoseconds_at_the_rate_that_was_given() {
        // A rate of one tick a second: each tick is a second.
        let clock = Clock::start(1);
        let (from, now, to) = (tsc(), clock.now_ns(), tsc());
        let second = 1_000_000_000;
        assert!((from - clock.base) * second <= now && now <= (to - clock.base) * second);
        // No rate makes it turn over within a process's life.
        let slow = Clock {
            base: 0,
            scale: (1_000_000_000 << 32) / 500_000_000,
            start: Instant::now(),
        };
        let (from, now, to) = (tsc(), slow.now_ns(), tsc());
        assert!(from * 2 <= now && now <= to * 2);
    }
}
