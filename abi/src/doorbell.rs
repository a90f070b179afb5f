//! Doorbells: who looks where, and the handshakes by which no work request is missed.
//!
//! The slot is the doorbell: a user posts by storing the sequence number in a WQE's last word, and the
//! engine polls the next slot of a small *hot* set of queues. For every other queue the user also sets
//! a bit. Three levels keep the engine's polling cost independent of how many queues exist:
//!
//! 1. hot queue: `polled[qp]` is 1, the engine reads its next slot every turn;
//! 2. any other queue of a user that is polled: one bit in `level0`, one in `level1`, and the engine
//!    reads only the user's `level1` line;
//! 3. a user that the engine does not poll (`need_wakeup`): the bits, and a kick.
//!
//! Each step is a Dekker handshake: *publish, full fence, look at the other side's flag*, on both sides.

use crate::sync::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

/// QPs a bitmap covers; the same as [`crate::window::MAX_QPS`].
pub const QPS: usize = 16_384;
#[cfg(not(loom))]
const L0_WORDS: usize = QPS / 64;
#[cfg(not(loom))]
const L1_WORDS: usize = L0_WORDS / 64;

/// The doorbell pages of a window.
#[cfg(not(loom))]
#[repr(C, align(4096))]
pub struct Doorbells {
    /// Bit `i` of word `w`: word `64 w + i` of `level0` is nonzero. One cache line. User sets, engine takes.
    pub level1: [AtomicU64; L1_WORDS],
    _pad0: [AtomicU64; 8 - L1_WORDS],
    /// Nonzero: the engine does not look at `level1`; kick after setting bits. Engine writes.
    pub need_wakeup: AtomicU32,
    _pad1: [AtomicU32; 15],
    _pad2: [AtomicU64; 496],
    /// Bit `i` of word `w`: QP index `64 w + i` has work. User sets, engine takes.
    pub level0: [AtomicU64; L0_WORDS],
    _pad3: [AtomicU64; 512 - L0_WORDS],
    /// By QP index: 1 while the engine polls that queue's next slot. Engine writes.
    pub polled: [AtomicU8; QPS],
}

/// What the user has to do after [`ring`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Ring {
    /// Nothing: the engine will see it.
    Seen,
    /// Kick the engine ([`crate::window::KICK_DATA`]).
    Kick,
}

/// User side, after the WQE's last word is stored: makes sure that the engine will look.
///
/// `l0` and `l1` are the words of [`Doorbells`] that hold this QP's bits.
#[inline]
pub fn ring(
    polled: &AtomicU8,
    l0: (&AtomicU64, u64),
    l1: (&AtomicU64, u64),
    need_wakeup: &AtomicU32,
) -> Ring {
    fence(Ordering::SeqCst);
    if polled.load(Ordering::Relaxed) != 0 {
        return Ring::Seen;
    }
    // RMW on the engine's lines only when the bit is not there yet: idle queues share these words.
    if l0.0.load(Ordering::Relaxed) & l0.1 == 0 {
        l0.0.fetch_or(l0.1, Ordering::SeqCst);
    }
    l1.0.fetch_or(l1.1, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    if need_wakeup.load(Ordering::Relaxed) != 0 {
        Ring::Kick
    } else {
        Ring::Seen
    }
}

#[cfg(not(loom))]
impl Doorbells {
    /// User side: [`ring`] for QP index `qp` (below [`QPS`]; higher bits are ignored).
    #[inline]
    pub fn ring(&self, qp: u32) -> Ring {
        let qp = qp as usize % QPS;
        let w0 = qp / 64;
        ring(
            &self.polled[qp],
            (&self.level0[w0], 1 << (qp % 64)),
            (&self.level1[w0 / 64], 1 << (w0 % 64)),
            &self.need_wakeup,
        )
    }

    /// Engine side: takes every pending bit and calls `f` with each QP index. Reads one line when nothing is pending.
    #[inline]
    pub fn take(&self, mut f: impl FnMut(u32)) {
        for (w1, level1) in self.level1.iter().enumerate() {
            if level1.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut m1 = level1.swap(0, Ordering::SeqCst);
            while m1 != 0 {
                let w0 = w1 * 64 + m1.trailing_zeros() as usize;
                m1 &= m1 - 1;
                let mut m0 = self.level0[w0].swap(0, Ordering::SeqCst);
                // A user that found its bit still set did not store it again: its WQE must be visible now.
                fence(Ordering::SeqCst);
                while m0 != 0 {
                    let qp = w0 * 64 + m0.trailing_zeros() as usize;
                    m0 &= m0 - 1;
                    f(qp as u32);
                }
            }
        }
    }

    /// Engine side: whether any bit is pending.
    #[inline]
    #[must_use]
    pub fn pending(&self) -> bool {
        self.level1.iter().any(|w| w.load(Ordering::Relaxed) != 0)
    }
}

/// Engine side: stop polling a queue's slots. Returns true if `has_work` says, after the fence, that the
/// queue must stay hot (the user may have seen the flag still set).
#[inline]
pub fn cool(polled: &AtomicU8, has_work: impl FnOnce() -> bool) -> bool {
    polled.store(0, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    if has_work() {
        polled.store(1, Ordering::Relaxed);
        true
    } else {
        false
    }
}

/// Engine side: announce sleep. Returns true if `has_work` says, after the fence, that it must stay awake
/// (`need_wakeup` is then clear again).
#[inline]
pub fn doze(need_wakeup: &AtomicU32, has_work: impl FnOnce() -> bool) -> bool {
    need_wakeup.store(1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    if has_work() {
        need_wakeup.store(0, Ordering::Relaxed);
        true
    } else {
        false
    }
}
