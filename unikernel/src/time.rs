//! Time since boot, from the TSC.
#![allow(
    unsafe_code,
    reason = "rdtsc and cpuid; a clock page that the hypervisor writes"
)]

use core::arch::x86_64::{__cpuid, _rdtsc};
use core::ops::Add;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use core::time::Duration;

use crate::{limits, nucleus, port};

static START: AtomicU64 = AtomicU64::new(0);
static HZ: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds per tick, times 2^32.
static SCALE: AtomicU64 = AtomicU64::new(0);
static REALTIME_AT_START: AtomicU64 = AtomicU64::new(0);

/// The time stamp counter.
#[inline]
#[must_use]
pub fn tsc() -> u64 {
    // SAFETY: the instruction is there on every x86-64, and allowed in ring 3.
    unsafe { _rdtsc() }
}

/// TSC ticks per second.
#[must_use]
pub fn tsc_hz() -> u64 {
    HZ.load(Relaxed)
}

/// Ticks to nanoseconds.
#[inline]
#[must_use]
pub fn ticks_to_ns(ticks: u64) -> u64 {
    ((u128::from(ticks) * u128::from(SCALE.load(Relaxed))) >> 32) as u64
}

/// Nanoseconds since the runtime started. Costs a `rdtsc` and a multiplication.
#[inline]
#[must_use]
pub fn now_ns() -> u64 {
    ticks_to_ns(tsc().wrapping_sub(START.load(Relaxed)))
}

/// Nanoseconds since 1970, to the accuracy of the boot's length: the host's clock when it filled the
/// window, plus
/// the time since the runtime started.
#[must_use]
pub fn unix_ns() -> u64 {
    REALTIME_AT_START.load(Relaxed).wrapping_add(now_ns())
}

/// A point in time on this guest's clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Instant(u64);

impl Instant {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        Self(now_ns())
    }

    /// Nanoseconds since the runtime started.
    #[must_use]
    pub const fn as_ns(self) -> u64 {
        self.0
    }

    /// Time from this point to now; zero if it lies ahead.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        Duration::from_nanos(now_ns().saturating_sub(self.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, d: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

/// Remembers now as the clock's zero; before anything that takes time.
pub(crate) fn mark_start() {
    START.store(tsc(), Relaxed);
}

/// Starts the clock. `tsc_hz` is the header's, 0 if the host does not know it.
pub(crate) fn init(tsc_hz: u64, realtime_ns: u64) -> Result<(), &'static str> {
    let hz = if tsc_hz != 0 {
        tsc_hz
    } else if is_hypervisor(b"KVMKVMKVM\0\0\0") {
        kvmclock_hz().unwrap_or_else(calibrate)
    } else {
        calibrate()
    };
    // A real TSC runs at 0.5 to 10 GHz; TCG may report anything that counts.
    if !(1_000_000..=100_000_000_000).contains(&hz) {
        return Err("the TSC's frequency is out of reason");
    }
    HZ.store(hz, Relaxed);
    SCALE.store(
        ((1_000_000_000_u128 << 32) / u128::from(hz)) as u64,
        Relaxed,
    );
    REALTIME_AT_START.store(realtime_ns, Relaxed);
    Ok(())
}

/// Whether the hypervisor leaf of CPUID carries this signature.
pub(crate) fn is_hypervisor(signature: &[u8; 12]) -> bool {
    let r = __cpuid(0x4000_0000);
    let words = [r.ebx, r.ecx, r.edx];
    words
        .iter()
        .zip(signature.as_chunks().0)
        .all(|(w, s)| *w == u32::from_le_bytes(*s))
}

/// What KVM writes at the address given to MSR `4b564d01`.
#[repr(C, align(64))]
struct KvmClock {
    /// Words 0 version, 1 padding, 2-3 TSC at the update, 4-5 time at it, 6 multiplier, 7 shift and flags.
    words: [core::sync::atomic::AtomicU32; 8],
}

static KVM_CLOCK: KvmClock = KvmClock {
    words: [const { core::sync::atomic::AtomicU32::new(0) }; 8],
};

/// The frequency from KVM's paravirtual clock, exactly as the hypervisor has it.
fn kvmclock_hz() -> Option<u64> {
    const MSR: u32 = 0x4b56_4d01;
    if __cpuid(0x4000_0001).eax & 1 << 3 == 0 {
        return None;
    }
    // The image is linked below the first RAM region's end, so its addresses are guest-physical ones.
    nucleus::wrmsr(MSR, (&raw const KVM_CLOCK) as u64 | 1);
    let word = |i: usize| KVM_CLOCK.words[i].load(core::sync::atomic::Ordering::Acquire);
    let found = (0..1000).find_map(|_| {
        let version = word(0);
        let (mul, shift) = (word(6), word(7) as u8 as i8);
        (version & 1 == 0 && version == word(0) && mul != 0).then_some((mul, shift))
    });
    nucleus::wrmsr(MSR, 0);
    let (mul, shift) = found?;
    // ns = (ticks << shift) * mul >> 32
    let hz = (1_000_000_000_u128 << 32) / u128::from(mul);
    let hz = if shift >= 0 {
        hz >> shift
    } else {
        hz << -shift
    };
    u64::try_from(hz).ok()
}

/// A reading of the interval timer's channel 2, and the TSC before and after it.
#[derive(Clone, Copy)]
struct Sample {
    before: u64,
    count: u16,
    after: u64,
}

/// The tightest of some readings: a vCPU that lost its core between two instructions would spoil it.
fn sample() -> Sample {
    let read = |_| {
        let before = tsc();
        port::write8(0x43, 0x80); // latch channel 2
        let after = tsc();
        let low = port::read8(0x42);
        let count = u16::from_le_bytes([low, port::read8(0x42)]);
        Sample {
            before,
            count,
            after,
        }
    };
    let first = read(0);
    (1..limits::CALIBRATION_READINGS)
        .map(read)
        .fold(first, |best, s| {
            if s.after - s.before < best.after - best.before {
                s
            } else {
                best
            }
        })
}

/// Counts TSC ticks against channel 2 of the interval timer. 0: there is none, or no measurement was finished in time.
fn calibrate() -> u64 {
    (0..limits::CALIBRATION_TRIES)
        .find_map(|_| calibrate_once())
        .unwrap_or(0)
}

/// None: this vCPU was kept from running until the counter had passed 0, which it does after 55 ms, and how often it went round is not
/// known.
fn calibrate_once() -> Option<u64> {
    const PIT_HZ: u64 = 1_193_182;
    /// Channel 2's output, high from when its counter reached 0.
    const OUT: u8 = 1 << 5;
    let gate = port::read8(0x61);
    port::write8(0x61, gate & !0x02 | 0x01); // speaker off, gate on
    port::write8(0x43, 0xb0); // channel 2, both bytes, mode 0: counts down once
    port::write8(0x42, 0xff);
    port::write8(0x42, 0xff);
    let start = sample();
    let wanted = PIT_HZ / limits::CALIBRATION_HZ;
    loop {
        let end = sample();
        let counted = u64::from(start.count.wrapping_sub(end.count));
        let expired = port::read8(0x61) & OUT != 0;
        if expired || counted >= wanted {
            port::write8(0x61, gate);
        }
        if expired {
            return None;
        }
        if counted >= wanted {
            let middle = |s: Sample| s.before + (s.after - s.before) / 2;
            let ticks = middle(end) - middle(start);
            return Some((u128::from(ticks) * u128::from(PIT_HZ) / u128::from(counted)) as u64);
        }
    }
}
