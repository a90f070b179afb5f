//! RAM after the image: a heap of bounded size, and the rest for the application.
//!
//! RAM is zero at boot, and the first touch of a page costs the host a microsecond or more, so nothing here
//! writes what it does not need.
#![allow(
    unsafe_code,
    reason = "the heap and the application's region are made from bare addresses"
)]

use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use lock_api::{GuardNoSend, RawMutex};
use talc::TalcLock;
use talc::source::Manual;

use crate::{layout, limits};

unsafe extern "C" {
    #[link_name = "hyv_pool_end"]
    static POOL_END: u8;
    #[link_name = "hyv_image_end"]
    static IMAGE_END: u8;
}

/// One vCPU and no code in interrupts: the lock can only be taken twice by a bug, which then fails loudly.
struct Lock(AtomicBool);

// SAFETY: `lock` returns only when this caller set the flag; `unlock` clears it.
unsafe impl RawMutex for Lock {
    #[allow(
        clippy::declare_interior_mutable_const,
        reason = "the trait asks for an initial value"
    )]
    const INIT: Self = Self(AtomicBool::new(false));
    type GuardMarker = GuardNoSend;

    fn lock(&self) {
        assert!(self.try_lock(), "the heap was entered from within itself");
    }

    fn try_lock(&self) -> bool {
        !self.0.swap(true, core::sync::atomic::Ordering::Acquire)
    }

    unsafe fn unlock(&self) {
        self.0.store(false, core::sync::atomic::Ordering::Release);
    }
}

struct Heap {
    talc: TalcLock<Lock, Manual>,
    size: AtomicU64,
    in_use: AtomicU64,
    peak: AtomicU64,
    /// Size of the last request that was refused, or 0.
    refused: AtomicU64,
}

#[global_allocator]
static HEAP: Heap = Heap {
    talc: TalcLock::new(Manual),
    size: AtomicU64::new(0),
    in_use: AtomicU64::new(0),
    peak: AtomicU64::new(0),
    refused: AtomicU64::new(0),
};

impl Heap {
    fn grew(&self, bytes: usize) {
        let now = self.in_use.load(Relaxed) + bytes as u64;
        self.in_use.store(now, Relaxed);
        if now > self.peak.load(Relaxed) {
            self.peak.store(now, Relaxed);
        }
    }

    fn shrank(&self, bytes: usize) {
        self.in_use
            .store(self.in_use.load(Relaxed) - bytes as u64, Relaxed);
    }
}

// SAFETY: all memory comes from talc, which upholds the contract; the counters do not influence it.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are talc's.
        let p = unsafe { self.talc.alloc(layout) };
        if p.is_null() {
            self.refused.store(layout.size() as u64, Relaxed);
        } else {
            self.grew(layout.size());
        }
        p
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are talc's.
        unsafe { self.talc.dealloc(p, layout) };
        self.shrank(layout.size());
    }

    unsafe fn realloc(&self, p: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are talc's.
        let q = unsafe { self.talc.realloc(p, layout, new_size) };
        if q.is_null() {
            self.refused.store(new_size as u64, Relaxed);
        } else {
            self.shrank(layout.size());
            self.grew(new_size);
        }
        q
    }
}

/// A request that the heap refused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) asked: u64,
    pub(crate) in_use: u64,
    pub(crate) size: u64,
}

/// The last request that the heap refused, if any.
pub(crate) fn last_failure() -> Option<Failure> {
    let asked = HEAP.refused.load(Relaxed);
    (asked != 0).then(|| Failure {
        asked,
        in_use: HEAP.in_use.load(Relaxed),
        size: HEAP.size.load(Relaxed),
    })
}

/// First byte not yet given away, and end, of the application's memory.
static REST: AtomicU64 = AtomicU64::new(0);
static REST_END: AtomicU64 = AtomicU64::new(0);

/// Address after the image and the page pool.
pub(crate) fn image_end() -> u64 {
    (&raw const POOL_END) as u64
}

/// End of the RAM that heap and application have: a multiple of 2 MiB.
pub(crate) fn ram_end() -> u64 {
    REST_END.load(Relaxed)
}

/// Sets up the heap and what is left after it. Called once, when all of RAM is mapped.
pub(crate) fn init(ram_len: u64) -> Result<(), &'static str> {
    let start = image_end();
    let end = ram_len & !(layout::LARGE_PAGE - 1);
    let size = (ram_len / limits::HEAP_SHARE).clamp(limits::HEAP_MIN, limits::HEAP_MAX);
    let heap_end = (start + size).next_multiple_of(layout::LARGE_PAGE);
    if heap_end > end {
        return Err("too little RAM for a heap");
    }
    // SAFETY: the range is mapped RAM behind the image that nothing else uses.
    unsafe {
        HEAP.talc
            .lock()
            .claim(start as *mut u8, (heap_end - start) as usize)
    }
    .ok_or("the heap could not be set up")?;
    HEAP.size.store(heap_end - start, Relaxed);
    REST.store(heap_end, Relaxed);
    REST_END.store(end, Relaxed);
    Ok(())
}

/// Bytes that [`take`] and [`take_rest`] can still give.
#[must_use]
pub fn rest() -> usize {
    (REST_END.load(Relaxed) - REST.load(Relaxed)) as usize
}

/// Gives the application `len` bytes, rounded up to 2 MiB: zeroed, aligned to 2 MiB, contiguous, for
/// good; its address is
/// its offset in RAM. `None` if that much is not left.
pub fn take(len: usize) -> Option<&'static mut [u8]> {
    let len = (len as u64).checked_next_multiple_of(layout::LARGE_PAGE)?;
    let start = REST.load(Relaxed);
    if len > REST_END.load(Relaxed) - start {
        return None;
    }
    REST.store(start + len, Relaxed);
    // SAFETY: mapped RAM, zero since boot, that is handed out once: `REST` only grows.
    Some(unsafe { core::slice::from_raw_parts_mut(start as *mut u8, len as usize) })
}

/// Gives the application all that is left, as [`take`] does; empty if nothing is.
pub fn take_rest() -> &'static mut [u8] {
    take(rest()).unwrap_or_default()
}

/// Bytes allocated from the heap now.
#[must_use]
pub fn heap_in_use() -> u64 {
    HEAP.in_use.load(Relaxed)
}

/// Most bytes that were ever allocated from the heap at once.
#[must_use]
pub fn heap_peak() -> u64 {
    HEAP.peak.load(Relaxed)
}

/// Size of the heap in bytes.
#[must_use]
pub fn heap_size() -> u64 {
    HEAP.size.load(Relaxed)
}

/// RAM that is not the application's region: stacks, image, page directories in use, and the heap's peak.
#[must_use]
pub fn overhead() -> u64 {
    let image_end = (&raw const IMAGE_END) as u64;
    let stacks = layout::MAIN_STACK_TOP - layout::MAIN_STACK_BOTTOM + 0x1_0000;
    let directories = 4096
        * (REST_END
            .load(Relaxed)
            .div_ceil(layout::GIB)
            .saturating_sub(1));
    stacks + (image_end - layout::NUCLEUS) + directories + heap_peak()
}
