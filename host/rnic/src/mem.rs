//! The room for `unsafe`: users' memory as the engine sees it.
//!
//! A user may write any byte of its memory at any time. So the engine reads ring words through atomics, once,
//! and treats payload as bytes without meaning. Bounds are checked where a view is made; a view cannot
//! outlive the mapping because it holds the [`UserMemory`].
#![allow(
    unsafe_code,
    reason = "shared memory with users: ring views and payload copies"
)]

use std::any::Any;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hyv_abi::queue::SLOT_WORDS;
use hyv_abi::window::Window;
use rustix::mm::{MapFlags, ProtFlags};

/// A user's window and RAM, mapped.
pub struct UserMemory {
    window: NonNull<Window>,
    ram: NonNull<u8>,
    ram_len: u64,
    _keep: Box<dyn Any + Send + Sync>,
}

// SAFETY: both mappings are shared memory for their whole life; the window is all atomics, and RAM is only
// reached through atomics or through copies of plain bytes.
unsafe impl Send for UserMemory {}
// SAFETY: as above.
unsafe impl Sync for UserMemory {}

impl std::fmt::Debug for UserMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserMemory")
            .field("ram_len", &self.ram_len)
            .finish_non_exhaustive()
    }
}

impl UserMemory {
    /// Memory at `window` and `ram`, which stay mapped as long as `keep` lives.
    ///
    /// # Safety
    /// `window` points to a `Window`, 4096-byte aligned; `ram` to `ram_len` bytes, 4096-byte aligned; both are
    /// readable and writable until `keep` is dropped, cannot be truncated by anyone, and are never the
    /// target of a Rust reference to anything but atomics in this process while the engine may write them.
    #[must_use]
    pub unsafe fn new(
        window: NonNull<Window>,
        ram: NonNull<u8>,
        ram_len: u64,
        keep: Box<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            window,
            ram,
            ram_len,
            _keep: keep,
        }
    }

    /// Memory of its own: a zeroed window and `ram_len` bytes of zeroed RAM (a multiple of 4096), which no other process sees.
    ///
    /// # Errors
    /// What the kernel says when there is no room.
    pub fn zeroed(ram_len: u64) -> io::Result<Self> {
        let window = Anonymous::new(size_of::<Window>())?;
        let ram = Anonymous::new(ram_len as usize)?;
        let (at, bytes) = (window.ptr.cast(), ram.ptr);
        // SAFETY: both are mapped, page-aligned, readable and writable, nobody else's, and go along.
        Ok(unsafe { Self::new(at, bytes, ram_len, Box::new((window, ram))) })
    }

    /// The window.
    #[inline]
    #[must_use]
    pub fn window(&self) -> &Window {
        // SAFETY: valid by the contract of `new`; all fields are atomics.
        unsafe { self.window.as_ref() }
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn ram_len(&self) -> u64 {
        self.ram_len
    }

    fn range(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        if offset.checked_add(len)? > self.ram_len {
            return None;
        }
        // SAFETY: `offset` is inside the mapping, or one past its end with `len` 0.
        Some(unsafe { self.ram.add(offset as usize) })
    }

    /// A view of `count` words at a RAM offset; `None` if outside or not 64-byte aligned.
    #[must_use]
    pub fn words(self: &Arc<Self>, offset: u64, count: usize) -> Option<Words> {
        if !offset.is_multiple_of(64) {
            return None;
        }
        let ptr = self.range(offset, (count as u64).checked_mul(8)?)?;
        Some(Words {
            ptr: ptr.cast(),
            count,
            mem: Arc::clone(self),
        })
    }

    /// A view of bytes for payload; `None` if outside.
    #[must_use]
    pub fn bytes(self: &Arc<Self>, offset: u64, len: u64) -> Option<Bytes> {
        Some(Bytes {
            ptr: self.range(offset, len)?,
            len,
        })
    }
}

/// Zeroed pages of this process alone, which appear when they are touched.
struct Anonymous {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: an address range that nothing else knows of.
unsafe impl Send for Anonymous {}
// SAFETY: as above; it gives no access.
unsafe impl Sync for Anonymous {}

impl Anonymous {
    fn new(len: usize) -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: asks for new pages, wherever the kernel likes.
        let at = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE)
        }?;
        let ptr = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { ptr, len })
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and whoever refers to it keeps it alive. Failing leaves it mapped.
        let _ = unsafe { rustix::mm::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

/// Words of a ring or a control line.
#[derive(Debug)]
pub struct Words {
    ptr: NonNull<AtomicU64>,
    count: usize,
    #[allow(dead_code, reason = "keeps the mapping alive")]
    mem: Arc<UserMemory>,
}

// SAFETY: a view of atomics in a mapping that `mem` keeps.
unsafe impl Send for Words {}

impl Words {
    /// Words in it.
    #[inline]
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The word at `i`; panics outside, which callers exclude by masking.
    #[inline]
    #[must_use]
    pub fn at(&self, i: usize) -> &AtomicU64 {
        assert!(i < self.count);
        // SAFETY: inside the view, which `mem` keeps mapped.
        unsafe { self.ptr.add(i).as_ref() }
    }

    /// `N` words from `i` on.
    #[inline]
    #[must_use]
    pub fn array<const N: usize>(&self, i: usize) -> &[AtomicU64; N] {
        assert!(i + N <= self.count);
        // SAFETY: inside the view; an array has the alignment of its element.
        unsafe { self.ptr.add(i).cast().as_ref() }
    }

    /// Starts to fetch the line of word `i`, for a later turn.
    #[inline]
    pub fn prefetch(&self, i: usize) {
        let word: *const AtomicU64 = self.at(i);
        // SAFETY: a hint that changes nothing; the address is inside the view.
        unsafe {
            core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(word.cast())
        };
    }

    /// Stores an entry whose last word makes it valid.
    #[inline]
    pub fn publish(&self, i: usize, words: &[u64; SLOT_WORDS]) {
        let slot = self.array::<SLOT_WORDS>(i);
        for k in 0..SLOT_WORDS - 1 {
            slot[k].store(words[k], Ordering::Relaxed);
        }
        slot[SLOT_WORDS - 1].store(words[SLOT_WORDS - 1], Ordering::Release);
    }
}

/// A watched word: the doorbell of a hot queue. Holds the memory it looks at.
#[derive(Debug)]
pub struct Watch {
    ptr: NonNull<AtomicU64>,
    expect: u32,
    mem: Arc<UserMemory>,
}

// SAFETY: an atomic in a mapping that `mem` keeps.
unsafe impl Send for Watch {}

impl Watch {
    /// Watches word `i` of `words` for a low half of `expect`.
    #[must_use]
    pub fn new(words: &Words, i: usize, expect: u32) -> Self {
        Self {
            ptr: NonNull::from(words.at(i)),
            expect,
            mem: Arc::clone(&words.mem),
        }
    }

    /// Watches another word of the same user's memory.
    #[inline]
    pub fn set(&mut self, words: &Words, i: usize, expect: u32) {
        assert!(Arc::ptr_eq(&self.mem, &words.mem));
        self.ptr = NonNull::from(words.at(i));
        self.expect = expect;
    }

    /// Whether the expected value is there.
    #[inline]
    #[must_use]
    pub fn rung(&self) -> bool {
        // SAFETY: `mem` keeps the mapping that `ptr` points into.
        unsafe { self.ptr.as_ref() }.load(Ordering::Acquire) as u32 == self.expect
    }
}

/// A piece of a user's RAM that a key gave access to, or of the engine's own inline buffer. Valid within one
/// turn of the engine, in which no region can be deregistered and no user removed.
#[derive(Clone, Copy, Debug)]
pub struct Bytes {
    ptr: NonNull<u8>,
    len: u64,
}

// SAFETY: an address range; all access is through the copies below.
unsafe impl Send for Bytes {}

impl Bytes {
    /// Nothing.
    pub const EMPTY: Self = Self {
        ptr: NonNull::dangling(),
        len: 0,
    };

    /// The engine's own bytes.
    #[inline]
    #[must_use]
    pub fn own(slice: &[u8]) -> Self {
        Self {
            ptr: NonNull::from(slice).cast(),
            len: slice.len() as u64,
        }
    }

    /// The first `len` bytes of the engine's own words, as they lie in memory; at most all of them.
    #[inline]
    #[must_use]
    pub fn words(words: &[u64], len: u64) -> Self {
        Self {
            ptr: NonNull::from(words).cast(),
            len: len.min(8 * words.len() as u64),
        }
    }

    /// Length.
    #[inline]
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it; `None` if outside.
    #[inline]
    #[must_use]
    pub fn sub(&self, offset: u64, len: u64) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: inside the range.
        let ptr = unsafe { self.ptr.add(offset as usize) };
        Some(Self { ptr, len })
    }

    /// Copies `dst.len()` or `self.len()` bytes, whichever is less, to `dst`. The ranges may overlap.
    #[inline]
    pub fn copy_to(&self, dst: &Self) {
        let n = self.len.min(dst.len) as usize;
        // SAFETY: both ranges are mapped and at least `n` long. A user may write them meanwhile; the bytes have
        // no invariants, and `copy` tolerates overlap.
        unsafe { std::ptr::copy(self.ptr.as_ptr(), dst.ptr.as_ptr(), n) };
    }

    /// Copies as many of its bytes as fit to `out`; gives how many.
    #[inline]
    pub fn read_into(&self, out: &mut [u8]) -> usize {
        let n = (self.len as usize).min(out.len());
        // SAFETY: both are at least `n` long; `out` is the engine's own, no user maps it.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr.as_ptr(), out.as_mut_ptr(), n) };
        n
    }

    /// Its first bytes, at most 32, as four words in the order of memory; zeros behind them.
    ///
    /// Each byte is loaded once, by loads no wider than a word: a wide load of what narrower stores have just written waits
    /// until all stores before those are done, among them such to lines that another core has.
    #[inline(always)]
    #[must_use]
    pub fn first_words(&self) -> [u64; 4] {
        let n = (self.len as usize).min(32);
        let mut words = [0; 4];
        for (k, word) in words.iter_mut().enumerate() {
            let at = 8 * k;
            if at + 8 <= n {
                // SAFETY: inside the range, which is mapped.
                *word = unsafe { self.ptr.add(at).cast::<u64>().read_unaligned() };
            } else if at < n {
                *word = self.tail(at, n - at);
            }
        }
        words
    }

    /// The `n` bytes at `at` as a word; `n` is less than 8, and they are inside.
    #[inline(always)]
    fn tail(&self, at: usize, n: usize) -> u64 {
        debug_assert!(n < 8 && (at + n) as u64 <= self.len);
        let (mut word, mut done) = (0, 0);
        // SAFETY: inside the range, which is mapped.
        unsafe {
            let from = self.ptr.add(at);
            if n & 4 != 0 {
                word = u64::from(from.cast::<u32>().read_unaligned());
                done = 4;
            }
            if n & 2 != 0 {
                word |= u64::from(from.add(done).cast::<u16>().read_unaligned()) << (8 * done);
                done += 2;
            }
            if n & 1 != 0 {
                word |= u64::from(from.add(done).read()) << (8 * done);
            }
        }
        word
    }

    /// Stores the first bytes of `words` here: `n` of them, or as many as fit. Word by word, for the reason of
    /// [`Self::first_words`]: the words were stored a moment ago.
    #[inline(always)]
    pub fn store_words(&self, words: &[u64], n: u64) {
        let n = n.min(self.len).min(8 * words.len() as u64) as usize;
        for (k, word) in words[..n / 8].iter().enumerate() {
            // SAFETY: `word` is a reference. Volatile, or the loop becomes a call of `memcpy`, whose loads are wide.
            let word = unsafe { std::ptr::from_ref(word).read_volatile() };
            // SAFETY: inside the range, which is mapped.
            unsafe { self.ptr.add(8 * k).cast::<u64>().write_unaligned(word) };
        }
        if n.is_multiple_of(8) {
            return;
        }
        let (mut word, mut at) = (words[n / 8], n / 8 * 8);
        // SAFETY: inside the range, which is mapped.
        unsafe {
            if n & 4 != 0 {
                self.ptr.add(at).cast::<u32>().write_unaligned(word as u32);
                (word, at) = (word >> 32, at + 4);
            }
            if n & 2 != 0 {
                self.ptr.add(at).cast::<u16>().write_unaligned(word as u16);
                (word, at) = (word >> 16, at + 2);
            }
            if n & 1 != 0 {
                self.ptr.add(at).write(word as u8);
            }
        }
    }

    /// Appends up to 32 bytes at byte `at` of four words.
    #[inline]
    pub fn gather(&self, words: &mut [u64; 4], at: usize) {
        let n = (self.len as usize).min(32 - at.min(32));
        // SAFETY: `at + n <= 32`, the size of `words`; the source is mapped.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.ptr.as_ptr(),
                words.as_mut_ptr().cast::<u8>().add(at.min(32)),
                n,
            );
        }
    }

    /// The word here, for atomics; `None` unless it is 8 bytes, aligned to 8.
    #[inline]
    #[must_use]
    pub fn atomic(&self) -> Option<&AtomicU64> {
        if self.len != 8 || !self.ptr.as_ptr().addr().is_multiple_of(8) {
            return None;
        }
        // SAFETY: mapped, 8 bytes, aligned; users reach it with atomic or plain stores, which the hardware keeps whole.
        Some(unsafe { self.ptr.cast::<AtomicU64>().as_ref() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_bytes_are_the_same_at_every_length_and_place() {
        let bytes: Vec<u8> = (1..=80).collect();
        let mut words = [0u64; 8];
        Bytes::own(&bytes).gather_all(&mut words);
        for at in 0..9 {
            for n in 0..40 {
                let source = Bytes::own(&bytes[at..at + n]);
                let mut expected = [0u8; 32];
                expected[..n.min(32)].copy_from_slice(&bytes[at..at + n.min(32)]);
                let found = source.first_words().map(u64::to_ne_bytes).concat();
                assert_eq!(found, expected, "{n} bytes at {at}");

                // Nothing before or behind them changes.
                let mut target = vec![0xffu8; 64];
                let mut expected = target.clone();
                expected[at..at + n].copy_from_slice(&bytes[..n]);
                Bytes::own_mut(&mut target[at..at + n]).store_words(&words, n as u64);
                assert_eq!(target, expected, "{n} bytes to {at}");
            }
        }
        // No more than there is room for.
        let mut target = [0xffu8; 8];
        Bytes::own_mut(&mut target[..3]).store_words(&words, 40);
        assert_eq!(target, [1, 2, 3, 0xff, 0xff, 0xff, 0xff, 0xff]);
    }

    impl Bytes {
        fn own_mut(slice: &mut [u8]) -> Self {
            Self {
                ptr: NonNull::from(&mut *slice).cast(),
                len: slice.len() as u64,
            }
        }

        fn gather_all(&self, words: &mut [u64; 8]) {
            for (k, word) in words.iter_mut().enumerate() {
                let piece = self.sub(8 * k as u64, 8).expect("inside");
                *word = piece.first_words()[0];
            }
        }
    }
}
