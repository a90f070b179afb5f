//! The room for `unsafe` of the core: memory that the device reads and writes.
#![allow(
    unsafe_code,
    reason = "views of, and copies to and from, memory that the device shares"
)]

use alloc::sync::Arc;
use core::alloc::Layout;
use core::fmt;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};

use core::sync::atomic::AtomicU8;

use hyv_abi::window::Window;

use crate::error::Error;
use crate::platform::Platform;
use crate::ring::Words;

/// The window at hand: one load away, kept by its platform.
#[derive(Clone)]
pub(crate) struct WindowRef {
    window: NonNull<Window>,
    platform: Arc<dyn Platform>,
}

// SAFETY: a window is all atomics, and `platform`, which keeps it, is `Send + Sync`.
unsafe impl Send for WindowRef {}
// SAFETY: as above.
unsafe impl Sync for WindowRef {}

impl WindowRef {
    pub(crate) fn new(platform: Arc<dyn Platform>) -> Self {
        Self {
            window: NonNull::from(platform.window()),
            platform,
        }
    }

    #[inline]
    pub(crate) fn platform(&self) -> &Arc<dyn Platform> {
        &self.platform
    }
}

impl Deref for WindowRef {
    type Target = Window;

    #[inline]
    fn deref(&self) -> &Window {
        // SAFETY: a platform's window stays where it is as long as the platform lives, and we hold that.
        unsafe { self.window.as_ref() }
    }
}

/// Memory from `Platform::alloc_dma`, given back when dropped.
pub(crate) struct DmaBuf {
    ptr: NonNull<u8>,
    layout: Layout,
    offset: u64,
    retained: AtomicBool,
    platform: Arc<dyn Platform>,
}

// SAFETY: plain memory that belongs to no thread, only reached through atomics or raw copies.
unsafe impl Send for DmaBuf {}
// SAFETY: as above; `&self` gives out atomics only.
unsafe impl Sync for DmaBuf {}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "DmaBuf({:#x}, {} bytes)",
            self.offset,
            self.layout.size()
        )
    }
}

impl DmaBuf {
    /// `len` zeroed bytes, aligned to `align` (a power of two, at least 64 is used).
    pub(crate) fn new(
        platform: &Arc<dyn Platform>,
        len: usize,
        align: usize,
    ) -> Result<Self, Error> {
        let refuse = || Error::OutOfMemory { len };
        let layout = Layout::from_size_align(len.max(64).next_multiple_of(64), align.max(64))
            .map_err(|_| refuse())?;
        let ptr = platform.alloc_dma(layout).ok_or_else(refuse)?;
        // Made first, so that the memory goes back if it is not where it should be.
        let mut buf = Self {
            ptr,
            layout,
            offset: 0,
            retained: AtomicBool::new(false),
            platform: Arc::clone(platform),
        };
        buf.offset = platform
            .ram_offset(ptr.as_ptr(), layout.size())
            .ok_or(Error::NotShared)?;
        Ok(buf)
    }

    /// RAM offset of its first byte.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes, rounded up to 64.
    pub(crate) fn size(&self) -> usize {
        self.layout.size()
    }

    /// Its first byte.
    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Never give it back: the device may still use it.
    pub(crate) fn retain(&self) {
        self.retained.store(true, Ordering::Relaxed);
    }

    /// The half-word at `at`, which is inside and aligned.
    pub(crate) fn u16_at(&self, at: usize) -> &AtomicU16 {
        assert!(at + 2 <= self.layout.size() && at.is_multiple_of(2));
        // SAFETY: inside the allocation and aligned (checked); only accessed atomically.
        unsafe { AtomicU16::from_ptr(self.ptr.add(at).as_ptr().cast()) }
    }

    /// The word at `at`, which is inside and aligned.
    pub(crate) fn u32_at(&self, at: usize) -> &AtomicU32 {
        assert!(at + 4 <= self.layout.size() && at.is_multiple_of(4));
        // SAFETY: inside the allocation and aligned (checked); only accessed atomically.
        unsafe { AtomicU32::from_ptr(self.ptr.add(at).as_ptr().cast()) }
    }

    /// The double word at `at`, which is inside and aligned.
    pub(crate) fn u64_at(&self, at: usize) -> &AtomicU64 {
        assert!(at + 8 <= self.layout.size() && at.is_multiple_of(8));
        // SAFETY: inside the allocation and aligned (checked); only accessed atomically.
        unsafe { AtomicU64::from_ptr(self.ptr.add(at).as_ptr().cast()) }
    }

    /// Copies `from` to `at`, which is inside.
    pub(crate) fn write(&self, at: usize, from: &[u8]) {
        assert!(at <= self.layout.size() && from.len() <= self.layout.size() - at);
        // SAFETY: inside the allocation (checked).
        unsafe { copy_in(self.ptr.add(at).as_ptr(), from) }
    }

    /// Copies from `at`, which is inside, to `to`.
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) {
        assert!(at <= self.layout.size() && to.len() <= self.layout.size() - at);
        // SAFETY: inside the allocation (checked).
        unsafe { copy_out(self.ptr.add(at).as_ptr(), to) }
    }

    /// Writes zeros all over it.
    pub(crate) fn clear(&self) {
        for word in self.words() {
            word.store(0, Ordering::Relaxed);
        }
    }
}

impl Words for DmaBuf {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the allocation is aligned to 64, a multiple of 64 bytes long, lives as long as `self`, and is
        // reached through atomics only.
        unsafe { core::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.layout.size() / 8) }
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        if !*self.retained.get_mut() {
            // SAFETY: from `alloc_dma` with this layout; whoever gave it to the device calls `retain` unless the
            // device said that it does not use it any more.
            unsafe { self.platform.free_dma(self.ptr, self.layout) }
        }
    }
}

/// Copies into shared memory, in words where possible, so that a word never arrives torn.
///
/// # Safety
/// `from.len()` bytes at `to` are mapped, writable, and not the target of a Rust reference to anything but
/// atomics.
pub(crate) unsafe fn copy_in(to: *mut u8, from: &[u8]) {
    let head = to.align_offset(8).min(from.len());
    let (edge, rest) = from.split_at(head);
    let (words, tail) = rest.as_chunks::<8>();
    for (i, b) in edge.iter().enumerate() {
        // SAFETY: inside the range that the caller vouches for.
        unsafe { AtomicU8::from_ptr(to.add(i)) }.store(*b, Ordering::Relaxed);
    }
    for (i, w) in words.iter().enumerate() {
        // SAFETY: as above, and a multiple of 8 from an aligned address.
        unsafe { AtomicU64::from_ptr(to.add(head + 8 * i).cast()) }
            .store(u64::from_ne_bytes(*w), Ordering::Relaxed);
    }
    for (i, b) in tail.iter().enumerate() {
        // SAFETY: as above.
        unsafe { AtomicU8::from_ptr(to.add(head + 8 * words.len() + i)) }
            .store(*b, Ordering::Relaxed);
    }
}

/// Copies out of shared memory, in words where possible.
///
/// # Safety
/// `to.len()` bytes at `from` are mapped, readable, and not the target of a mutable Rust reference.
pub(crate) unsafe fn copy_out(from: *const u8, to: &mut [u8]) {
    let from = from.cast_mut();
    let head = from.align_offset(8).min(to.len());
    let (edge, rest) = to.split_at_mut(head);
    let (words, tail) = rest.as_chunks_mut::<8>();
    for (i, b) in edge.iter_mut().enumerate() {
        // SAFETY: inside the range that the caller vouches for.
        *b = unsafe { AtomicU8::from_ptr(from.add(i)) }.load(Ordering::Relaxed);
    }
    for (i, w) in words.iter_mut().enumerate() {
        // SAFETY: as above, and a multiple of 8 from an aligned address.
        *w = unsafe { AtomicU64::from_ptr(from.add(head + 8 * i).cast()) }
            .load(Ordering::Relaxed)
            .to_ne_bytes();
    }
    let done = head + 8 * words.len();
    for (i, b) in tail.iter_mut().enumerate() {
        // SAFETY: as above.
        *b = unsafe { AtomicU8::from_ptr(from.add(done + i)) }.load(Ordering::Relaxed);
    }
}

/// Completes what the device began: puts payload that came in a completion where the work request's SGE says.
///
/// `addr` is the address of an SGE that the device accepted, and `bytes` no longer than that SGE. So, when it
/// accepted, the range was in a memory region. Regions of `ProtectionDomain::alloc_mr` keep their memory for
/// regions only, as long as a queue pair may have completions outstanding; the contract of
/// `ProtectionDomain::reg_mr` asks the same of the caller.
#[inline]
pub(crate) fn deliver(addr: u64, bytes: &[u8]) {
    let to = core::ptr::with_exposed_provenance_mut::<u8>(addr as usize);
    // SAFETY: see above: memory of a region, writable by the device at that address, and the address of a
    // region is its virtual address.
    unsafe { copy_in(to, bytes) }
}
