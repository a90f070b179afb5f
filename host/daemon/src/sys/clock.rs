//! Time: the kernel's monotonic clock, and the TSC that host and guest share under KVM.
#![allow(unsafe_code, reason = "reads the time-stamp counter")]

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::limits::TSC_CALIBRATION;

/// What the kernel keeps time by.
const CLOCKSOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// `CLOCK_MONOTONIC`, ns.
#[must_use]
pub fn monotonic_ns() -> u64 {
    read_ns(ClockId::Monotonic)
}

/// `CLOCK_REALTIME`, ns since 1970.
#[must_use]
pub fn realtime_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

fn read_ns(id: ClockId) -> u64 {
    let t = clock_gettime(id);
    // Neither field is ever negative for these clocks.
    t.tv_sec.unsigned_abs() * 1_000_000_000 + t.tv_nsec.unsigned_abs()
}

/// The time-stamp counter, not ordered against other instructions.
#[inline]
#[must_use]
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has it, and Linux leaves it open to user code.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Ticks of the TSC per second, measured once per process against `CLOCK_MONOTONIC_RAW` (takes 20 ms the first time;
/// call it early). Good to some 10 ppm.
#[must_use]
pub fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        let (tsc0, ns0) = pair();
        std::thread::sleep(TSC_CALIBRATION);
        let (tsc1, ns1) = pair();
        let hz =
            u128::from(tsc1.wrapping_sub(tsc0)) * 1_000_000_000 / u128::from((ns1 - ns0).max(1));
        u64::try_from(hz).unwrap_or(0)
    })
}

/// [`tsc_hz`] where the kernel keeps time by the TSC, so that it is steady and the same on all cores; 0 elsewhere.
#[must_use]
pub fn steady_tsc_hz() -> u64 {
    static STEADY: OnceLock<bool> = OnceLock::new();
    let steady = *STEADY.get_or_init(|| {
        std::fs::read_to_string(CLOCKSOURCE).is_ok_and(|name| name.trim() == "tsc")
    });
    if steady { tsc_hz() } else { 0 }
}

/// A clock for who asks at every turn of a loop: nanoseconds from some point on, by the TSC where it is steady, else
/// `CLOCK_MONOTONIC`.
#[must_use]
pub fn quick_ns() -> Box<dyn Fn() -> u64 + Send> {
    let hz = steady_tsc_hz();
    if hz == 0 {
        return Box::new(monotonic_ns);
    }
    let (base, per_tick) = (tsc(), (1_000_000_000u64 << 32) / hz);
    Box::new(move || {
        let ticks = u128::from(tsc().saturating_sub(base));
        // Not 0, which is no time.
        1 + ((ticks * u128::from(per_tick)) >> 32) as u64
    })
}

/// One instant on both clocks: the tightest of a few tries, so that an interruption in between does not count.
fn pair() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..16 {
        let before = tsc();
        let ns = read_ns(ClockId::MonotonicRaw);
        let width = tsc().wrapping_sub(before);
        if width < best.0 {
            best = (width, before.wrapping_add(width / 2), ns);
        }
    }
    (best.1, best.2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_quick_clock_goes_as_the_kernels_does() {
        let quick = quick_ns();
        let (q0, k0) = (quick(), monotonic_ns());
        std::thread::sleep(Duration::from_millis(100));
        let (q1, k1) = (quick(), monotonic_ns());
        // Both readings of a clock lie around one of the other's, however late this thread runs.
        let (q, k) = ((q1 - q0) as f64, (k1 - k0) as f64);
        assert!(q0 > 0 && (q / k - 1.0).abs() < 0.05, "{q} {k}");
    }

    #[test]
    fn the_frequency_holds_over_a_longer_time() {
        let hz = tsc_hz();
        let (tsc0, ns0) = pair();
        std::thread::sleep(Duration::from_millis(100));
        let (tsc1, ns1) = pair();
        let expected = (ns1 - ns0) as f64 * hz as f64 / 1e9;
        let error = ((tsc1 - tsc0) as f64 - expected).abs() / expected;
        assert!(error < 1e-3, "{error} at {hz} Hz");
        assert!((100_000_000..10_000_000_000).contains(&hz), "{hz}");
    }
}
