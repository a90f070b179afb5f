//! The store's region: one memory region that the device reads replies from and writes large values into.
#![allow(
    unsafe_code,
    reason = "hands the registered region to the engine as plain memory, and fetches lines of buffers ahead"
)]

use hyv_verbs::MemoryRegion;

/// A memory region as the engine's memory.
///
/// The device writes only into reservations, which the engine does not read until they are committed, and
/// reads only what the engine does not change while its segment is pinned; the rest is the engine's alone.
#[derive(Debug)]
pub struct LogRegion {
    mr: MemoryRegion,
}

impl LogRegion {
    /// Takes a region that the caller allocated for the store.
    #[must_use]
    pub const fn new(mr: MemoryRegion) -> Self {
        Self { mr }
    }

    /// The registered region.
    #[inline]
    #[must_use]
    pub const fn mr(&self) -> &MemoryRegion {
        &self.mr
    }
}

impl AsRef<[u8]> for LogRegion {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the region is mapped as long as `mr` lives, and what the device may write meanwhile is only
        // the inside of reservations, which nobody reads before their transfer has completed.
        unsafe { core::slice::from_raw_parts(self.mr.as_ptr(), self.mr.len()) }
    }
}

impl AsMut<[u8]> for LogRegion {
    #[inline]
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` makes the slice the only one on this side.
        unsafe { core::slice::from_raw_parts_mut(self.mr.as_ptr(), self.mr.len()) }
    }
}

/// What arrived in a receive buffer: `len` bytes at `offset`. Empty if that is outside.
///
/// The caller holds the buffer: its receive has completed, and it is not posted again while the slice lives.
#[inline]
pub(super) fn received(buffers: &MemoryRegion, offset: usize, len: usize) -> &[u8] {
    // SAFETY: the device writes a buffer only while its receive is posted, and nobody else writes it.
    unsafe { buffers.slice(offset, len) }.unwrap_or_default()
}

/// Starts to fetch what arrived in a receive buffer.
#[inline]
pub(super) fn prefetch(buffers: &MemoryRegion, offset: usize, len: usize) {
    /// Lines fetched of one request: a small one whole.
    const MOST: usize = 256;
    #[cfg(target_arch = "x86_64")]
    for line in received(buffers, offset, len.min(MOST)).chunks(64) {
        // SAFETY: a hint that changes nothing, for an address inside the region.
        unsafe {
            core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(
                line.as_ptr().cast(),
            );
        }
    }
}

/// A scratch buffer to fill before it is sent, or to read after it was filled by the device.
///
/// The caller took it from the pool and no work request names it.
#[inline]
#[allow(
    clippy::mut_from_ref,
    reason = "a registered region is shared with the device; the pool gives a buffer to one owner"
)]
pub(super) fn scratch(buffers: &MemoryRegion, offset: usize, len: usize) -> &mut [u8] {
    // SAFETY: the pool hands each buffer to one owner at a time, and the device does not know it now.
    unsafe { buffers.slice_mut(offset, len) }.unwrap_or_default()
}
