//! Tells the CPU which memory will be needed soon.
//!
//! A load whose result nobody uses would fetch the line as well, but holds up what comes behind it until the line is there; a
//! prefetch does not.
#![allow(
    unsafe_code,
    reason = "the prefetch instruction takes an address, not a reference"
)]

/// Fetches the cache line of the byte at `offset` of `mem` in the background. An offset outside is ignored.
#[inline(always)]
pub(crate) fn prefetch(mem: &[u8], offset: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(byte) = mem.get(offset) {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address is that of a byte that may be read, and a prefetch changes nothing but the caches.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(core::ptr::from_ref(byte).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (mem, offset);
}
