//! Where q35 puts RAM, and the header of the window that says so.

use std::sync::atomic::Ordering;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use hyv_abi::ABI_VERSION;
use hyv_abi::window::{Header, MAGIC, WINDOW_LEN, Window};

use crate::limits::{FOUR_GIB, Q35_SPLIT_BELOW, Q35_SPLIT_FROM};
use crate::sys::clock;

/// One contiguous piece of RAM: guest-physical address, length and offset in the RAM file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address of its first byte.
    pub guest_addr: u64,
    /// Length.
    pub len: u64,
    /// Offset of its first byte in the RAM file.
    pub file_offset: u64,
}

/// The pieces that QEMU's q35 makes of `ram` bytes, ascending.
#[must_use]
pub fn q35_regions(ram: u64) -> Vec<RamRegion> {
    let low = RamRegion {
        guest_addr: 0,
        len: ram,
        file_offset: 0,
    };
    if ram < Q35_SPLIT_FROM {
        return vec![low];
    }
    let high = RamRegion {
        guest_addr: FOUR_GIB,
        len: ram - Q35_SPLIT_BELOW,
        file_offset: Q35_SPLIT_BELOW,
    };
    vec![
        RamRegion {
            len: Q35_SPLIT_BELOW,
            ..low
        },
        high,
    ]
}

/// One piece: what a process has for RAM.
#[must_use]
pub fn flat_region(ram: u64) -> Vec<RamRegion> {
    vec![RamRegion {
        guest_addr: 0,
        len: ram,
        file_offset: 0,
    }]
}

/// What the header says of one user.
#[derive(Clone, Debug)]
pub struct HeaderInfo<'a> {
    /// Differs for every user; see [`next_generation`].
    pub generation: u32,
    /// RAM, at most [`hyv_abi::window::MAX_REGIONS`] pieces.
    pub regions: &'a [RamRegion],
    /// TSC ticks per second as the user sees them; 0: it must calibrate.
    pub tsc_hz: u64,
    /// CPUs the user may spin on without sharing one with the engine.
    pub spin_hint: u32,
}

/// Fills the header; its magic is stored last. Pieces beyond `MAX_REGIONS` are left out (q35 has two).
pub fn write_header(window: &Window, info: &HeaderInfo<'_>) {
    let h: &Header = &window.header;
    h.version.store(ABI_VERSION, Relaxed);
    h.generation.store(info.generation, Relaxed);
    h.window_len.store(WINDOW_LEN as u64, Relaxed);
    h.tsc_hz.store(info.tsc_hz, Relaxed);
    h.realtime_ns.store(clock::realtime_ns(), Relaxed);
    h.spin_hint.store(info.spin_hint, Relaxed);
    let (mut ram_len, mut count) = (0, 0);
    for (to, from) in h.regions.iter().zip(info.regions) {
        to.guest_addr.store(from.guest_addr, Relaxed);
        to.len.store(from.len, Relaxed);
        to.file_offset.store(from.file_offset, Relaxed);
        ram_len += from.len;
        count += 1;
    }
    h.ram_len.store(ram_len, Relaxed);
    h.num_regions.store(count, Relaxed);
    beat(window);
    h.magic.store(MAGIC, Ordering::Release);
}

/// One beat of the host's heart: call it at least every 100 ms.
pub fn beat(window: &Window) {
    window
        .header
        .host_time_ns
        .store(clock::monotonic_ns(), Relaxed);
    window.header.host_beat.fetch_add(1, Ordering::Release);
}

/// A number that no user before had: the time of this process's first call, counted up. Never 0.
#[must_use]
pub fn next_generation() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    // Milliseconds, so that two starts of this program differ unless they are 49 days apart to the millisecond.
    let seed = (clock::realtime_ns() / 1_000_000) as u32;
    let _ = LAST.compare_exchange(0, seed, Relaxed, Relaxed);
    loop {
        let next = LAST.fetch_add(1, Relaxed).wrapping_add(1);
        if next != 0 {
            return next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::window::SharedWindow;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn small_ram_is_one_piece() {
        for ram in [64 * MIB, 512 * MIB, 2 * GIB, 2814 * MIB] {
            assert_eq!(q35_regions(ram), flat_region(ram));
        }
    }

    #[test]
    fn large_ram_splits_without_gap() {
        for ram in [2816 * MIB, 3 * GIB, 4 * GIB, 6 * GIB + 2 * MIB] {
            let r = q35_regions(ram);
            assert_eq!(r.len(), 2);
            assert_eq!(
                (r[0].guest_addr, r[0].len, r[0].file_offset),
                (0, 2 * GIB, 0)
            );
            assert_eq!(
                (r[1].guest_addr, r[1].len, r[1].file_offset),
                (4 * GIB, ram - 2 * GIB, 2 * GIB)
            );
        }
    }

    #[test]
    fn header_is_complete_when_magic_shows() {
        let w = SharedWindow::create().unwrap();
        let regions = q35_regions(5 * GIB);
        write_header(
            &w,
            &HeaderInfo {
                generation: 9,
                regions: &regions,
                tsc_hz: 77,
                spin_hint: 1,
            },
        );
        let h = &w.header;
        assert_eq!(h.magic.load(Ordering::Acquire), MAGIC);
        assert_eq!(
            (h.version.load(Relaxed), h.generation.load(Relaxed)),
            (ABI_VERSION, 9)
        );
        assert_eq!(
            (h.num_regions.load(Relaxed), h.ram_len.load(Relaxed)),
            (2, 5 * GIB)
        );
        assert_eq!(h.regions[1].guest_addr.load(Relaxed), 4 * GIB);
        assert_eq!((h.tsc_hz.load(Relaxed), h.spin_hint.load(Relaxed)), (77, 1));
        assert!(h.realtime_ns.load(Relaxed) > 1_600_000_000_000_000_000);
        let before = h.host_beat.load(Relaxed);
        beat(&w);
        assert_eq!(h.host_beat.load(Relaxed), before + 1);
    }

    #[test]
    fn generations_differ() {
        let (a, b) = (next_generation(), next_generation());
        assert!(a != b && a != 0 && b != 0);
    }
}
