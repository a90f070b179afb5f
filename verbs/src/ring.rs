//! Send, receive and completion rings: the bytes of the data path, as `hyv_abi::queue` describes them.
//!
//! A ring writes to shared memory only, and reads only what the device writes (completions). How much of a
//! work ring is free comes from completions, which the owner counts and passes in.

use hyv_abi::queue::{
    Cqe, INLINE_EXT, INLINE_HEAD, RECV_STRIDES, SGES_EXT, SLOT_WORDS, SendHead, Sge, seq,
};
use hyv_abi::sync::{AtomicU64, Ordering};

/// Memory made of words that another party may read and write at any time.
pub trait Words {
    /// The words.
    fn words(&self) -> &[AtomicU64];
}

impl Words for &[AtomicU64] {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// The data part of a send work request.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// No data.
    None,
    /// Pieces of registered memory, at most [`hyv_abi::queue::MAX_SEND_SGE`].
    Sges(&'a [Sge]),
    /// The data itself, at most [`hyv_abi::queue::MAX_INLINE`] bytes.
    Inline(&'a [u8]),
    /// An atomic: where the old value goes, the swap value or addend, and what to compare with.
    Atomic {
        /// Local memory, 8 bytes.
        sge: Sge,
        /// Swap value or addend.
        operand: u64,
        /// Compare operand of a compare-and-swap.
        compare: Option<u64>,
    },
    /// A memory window's bind: what it covers. The keys and the access are in the head.
    Bind {
        /// Address of its first byte, as the region has it.
        addr: u64,
        /// The region's lkey.
        lkey: u32,
        /// Bytes; 0 unbinds.
        len: u64,
    },
}

impl Body<'_> {
    /// Slots that a work request with this body takes.
    #[inline]
    #[must_use]
    pub const fn slots(&self) -> u32 {
        (match self {
            Self::None | Self::Bind { .. } => 1,
            Self::Sges(s) => SendHead::slots_for(s.len(), 0, false),
            Self::Inline(d) => SendHead::slots_for(0, d.len(), false),
            Self::Atomic { compare, .. } => SendHead::slots_for(1, 0, compare.is_some()),
        }) as u32
    }
}

/// Eight bytes of `data` from `at` on, with zeros after its end.
#[inline]
fn inline_word(data: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    if let Some(chunk) = data.get(at..).and_then(|d| d.first_chunk::<8>()) {
        bytes = *chunk;
    } else if let Some(rest) = data.get(at..) {
        for (to, from) in bytes.iter_mut().zip(rest) {
            *to = *from;
        }
    }
    u64::from_le_bytes(bytes)
}

/// A send ring, producer side.
#[derive(Debug)]
pub struct SendRing<W> {
    mem: W,
    mask: u32,
    next: u32,
}

impl<W: Words> SendRing<W> {
    /// A ring of `slots` slots of 64 bytes, a power of two, over `mem`, which is zeroed; `None` if it has no room.
    #[must_use]
    pub fn new(mem: W, slots: u32) -> Option<Self> {
        if !slots.is_power_of_two() || mem.words().len() < slots as usize * SLOT_WORDS {
            return None;
        }
        Some(Self {
            mem,
            mask: slots - 1,
            next: 0,
        })
    }

    /// Slots of the ring.
    #[inline]
    #[must_use]
    pub const fn slots(&self) -> u32 {
        self.mask + 1
    }

    /// Position of the next work request: slots ever used.
    #[inline]
    #[must_use]
    pub const fn next(&self) -> u32 {
        self.next
    }

    /// Free slots, where `freed` slots ever used are free again.
    #[inline]
    #[must_use]
    pub const fn room(&self, freed: u32) -> u32 {
        self.slots().saturating_sub(self.next.wrapping_sub(freed))
    }

    #[inline]
    fn slot(&self, position: u32) -> &[AtomicU64; SLOT_WORDS] {
        &self.mem.words().as_chunks().0[(position & self.mask) as usize]
    }

    /// Writes a work request of `body.slots()` slots, which the caller knows to be free; returns its position. Sets
    /// the head's number of SGEs, slots and inline bytes. The device may execute it from here on.
    #[inline]
    pub fn push(&mut self, head: SendHead, body: Body<'_>) -> u32 {
        let position = self.next;
        let slots = body.slots();
        let mut head = head;
        head.slots = slots as u8;
        let mut data = [0; 3];
        match body {
            Body::None => {}
            Body::Sges(sges) => {
                head.num_sge = sges.len() as u8;
                if let Some((first, rest)) = sges.split_first() {
                    [data[0], data[1]] = first.to_words();
                    for (i, three) in rest.chunks(SGES_EXT).enumerate() {
                        let mut words = [0; SLOT_WORDS - 1];
                        for (pair, sge) in words.as_chunks_mut::<2>().0.iter_mut().zip(three) {
                            *pair = sge.to_words();
                        }
                        self.extend(position.wrapping_add(1 + i as u32), &words);
                    }
                }
            }
            Body::Inline(bytes) => {
                head.inline_len = bytes.len() as u32;
                data = core::array::from_fn(|i| inline_word(bytes, 8 * i));
                if let Some(rest) = bytes.get(INLINE_HEAD..) {
                    for (i, part) in rest.chunks(INLINE_EXT).enumerate() {
                        let words = core::array::from_fn(|k| inline_word(part, 8 * k));
                        self.extend(position.wrapping_add(1 + i as u32), &words);
                    }
                }
            }
            Body::Atomic {
                sge,
                operand,
                compare,
            } => {
                head.num_sge = 1;
                [data[0], data[1]] = sge.to_words();
                data[2] = operand;
                if let Some(compare) = compare {
                    self.extend(position.wrapping_add(1), &[compare, 0, 0, 0, 0, 0, 0]);
                }
            }
            Body::Bind { addr, lkey, len } => {
                head.num_sge = 1;
                let sge = Sge { addr, len: 0, lkey };
                [data[0], data[1]] = sge.to_words();
                data[2] = len;
            }
        }
        let slot = self.slot(position);
        for (to, word) in slot.iter().zip(head.to_words().into_iter().chain(data)) {
            to.store(word, Ordering::Relaxed);
        }
        slot[SLOT_WORDS - 1].store(u64::from(seq(position)), Ordering::Release);
        self.next = position.wrapping_add(slots);
        position
    }

    #[inline]
    fn extend(&self, position: u32, words: &[u64; SLOT_WORDS - 1]) {
        let slot = self.slot(position);
        for (to, word) in slot.iter().zip(words) {
            to.store(*word, Ordering::Relaxed);
        }
        slot[SLOT_WORDS - 1].store(u64::from(seq(position)), Ordering::Relaxed);
    }

    /// Empties the ring and starts again at position 0. The device does not look at it meanwhile.
    pub fn reset(&mut self) {
        for word in self.mem.words() {
            word.store(0, Ordering::Relaxed);
        }
        self.next = 0;
    }

    /// The memory.
    pub const fn memory(&self) -> &W {
        &self.mem
    }
}

/// Bytes of a receive slot for so many SGEs (at most [`hyv_abi::queue::MAX_RECV_SGE`]).
#[must_use]
pub fn recv_stride(max_sge: usize) -> u32 {
    let fits = |stride: &u32| (*stride as usize - 16) / 16 >= max_sge;
    RECV_STRIDES
        .into_iter()
        .find(fits)
        .unwrap_or(RECV_STRIDES[RECV_STRIDES.len() - 1])
}

/// A receive ring, producer side.
#[derive(Debug)]
pub struct RecvRing<W> {
    mem: W,
    mask: u32,
    stride: usize,
    next: u32,
}

impl<W: Words> RecvRing<W> {
    /// A ring of `slots` entries, a power of two, of `stride` bytes ([`hyv_abi::queue::RECV_STRIDES`]) over `mem`, which
    /// is zeroed; `None` if it has no room.
    #[must_use]
    pub fn new(mem: W, slots: u32, stride: u32) -> Option<Self> {
        if !slots.is_power_of_two() || !RECV_STRIDES.contains(&stride) {
            return None;
        }
        let stride = stride as usize / 8;
        if mem.words().len() < slots as usize * stride {
            return None;
        }
        Some(Self {
            mem,
            mask: slots - 1,
            stride,
            next: 0,
        })
    }

    /// Entries of the ring.
    #[inline]
    #[must_use]
    pub const fn slots(&self) -> u32 {
        self.mask + 1
    }

    /// Position of the next receive: entries ever used.
    #[inline]
    #[must_use]
    pub const fn next(&self) -> u32 {
        self.next
    }

    /// SGEs that an entry holds.
    #[inline]
    #[must_use]
    pub const fn max_sge(&self) -> usize {
        self.stride / 2 - 1
    }

    /// Free entries, where `freed` entries ever used are free again.
    #[inline]
    #[must_use]
    pub const fn room(&self, freed: u32) -> u32 {
        self.slots().saturating_sub(self.next.wrapping_sub(freed))
    }

    /// Writes a receive into an entry that the caller knows to be free; returns its position. `sges` beyond
    /// [`max_sge`](Self::max_sge) are ignored. The completion of a receive of a shared queue names it by `tag`.
    #[inline]
    pub fn push(&mut self, wr_id: u64, sges: &[Sge], tag: u16) -> u32 {
        let position = self.next;
        let at = (position & self.mask) as usize * self.stride;
        let entry = &self.mem.words()[at..at + self.stride];
        let sges = &sges[..sges.len().min(self.max_sge())];
        entry[0].store(wr_id, Ordering::Relaxed);
        for (pair, sge) in entry[1..].as_chunks::<2>().0.iter().zip(sges) {
            let [addr, key_len] = sge.to_words();
            pair[0].store(addr, Ordering::Relaxed);
            pair[1].store(key_len, Ordering::Relaxed);
        }
        let last = u64::from(seq(position)) | (sges.len() as u64) << 32 | u64::from(tag) << 48;
        entry[self.stride - 1].store(last, Ordering::Release);
        self.next = position.wrapping_add(1);
        position
    }

    /// Empties the ring and starts again at position 0. The device does not look at it meanwhile.
    pub fn reset(&mut self) {
        for word in self.mem.words() {
            word.store(0, Ordering::Relaxed);
        }
        self.next = 0;
    }

    /// The memory.
    pub const fn memory(&self) -> &W {
        &self.mem
    }
}

/// Words of a control line.
pub const CONTROL_WORDS: usize = 8;

/// A completion ring and its control line, consumer side.
#[derive(Debug)]
pub struct CompletionRing<W> {
    mem: W,
    control: W,
    mask: u32,
    next: u32,
    published: u32,
    publish_every: u32,
}

impl<W: Words> CompletionRing<W> {
    /// A ring of `1 << log2` entries over `mem` and a control line over `control`, both zeroed; `None` if one of them is
    /// too short. The consumer index is published after every `publish_every` entries.
    #[must_use]
    pub fn new(mem: W, control: W, log2: u32, publish_every: u32) -> Option<Self> {
        let slots = 1u32.checked_shl(log2)?;
        if mem.words().len() < slots as usize * SLOT_WORDS || control.words().len() < CONTROL_WORDS
        {
            return None;
        }
        Some(Self {
            mem,
            control,
            mask: slots - 1,
            next: 0,
            published: 0,
            publish_every: publish_every.max(1),
        })
    }

    /// Entries of the ring.
    #[inline]
    #[must_use]
    pub const fn slots(&self) -> u32 {
        self.mask + 1
    }

    /// Entries ever taken.
    #[inline]
    #[must_use]
    pub const fn next(&self) -> u32 {
        self.next
    }

    /// Takes the next completion, if there is one.
    #[inline]
    pub fn pop(&mut self) -> Option<Cqe> {
        let slot: &[AtomicU64; SLOT_WORDS] =
            &self.mem.words().as_chunks().0[(self.next & self.mask) as usize];
        let last = slot[SLOT_WORDS - 1].load(Ordering::Acquire);
        if last as u32 != seq(self.next) {
            return None;
        }
        let mut words = [0; SLOT_WORDS];
        for (to, from) in words.iter_mut().zip(&slot[..SLOT_WORDS - 1]) {
            *to = from.load(Ordering::Relaxed);
        }
        words[SLOT_WORDS - 1] = last;
        self.next = self.next.wrapping_add(1);
        if self.next.wrapping_sub(self.published) >= self.publish_every {
            self.publish();
        }
        Some(Cqe::from_words(words))
    }

    /// Tells the device how many entries were taken.
    pub fn publish(&mut self) {
        self.published = self.next;
        self.word(0).store(u64::from(self.next), Ordering::Release);
    }

    /// Goes on with another ring of `1 << log2` entries, to whose first positions the device has moved what was not taken
    /// ([`hyv_abi::control::ResizeCq`]). Gives the old one back, or `mem` if that is too short.
    pub fn replace(&mut self, mem: W, log2: u32, publish_every: u32) -> Result<W, W> {
        match 1u32.checked_shl(log2) {
            Some(slots) if mem.words().len() >= slots as usize * SLOT_WORDS => {
                self.mask = slots - 1;
            }
            _ => return Err(mem),
        }
        self.next = 0;
        self.publish_every = publish_every.max(1);
        self.publish();
        Ok(core::mem::replace(&mut self.mem, mem))
    }

    /// Stores the arm word. A full fence and another look at the ring must follow.
    pub fn arm(&self, value: u64) {
        self.word(1).store(value, Ordering::SeqCst);
    }

    /// The arm word: what was stored, or [`hyv_abi::queue::arm::NONE`] once its event was raised.
    #[must_use]
    pub fn armed(&self) -> u64 {
        self.word(1).load(Ordering::SeqCst)
    }

    #[inline]
    fn word(&self, word: usize) -> &AtomicU64 {
        &self.control.words()[word]
    }

    /// The memory of the ring.
    pub const fn memory(&self) -> &W {
        &self.mem
    }
}
