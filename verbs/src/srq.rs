//! Shared receive queues.
//!
//! One ring that several queue pairs take receives from. The device takes entries in ring order and copies each when a
//! message begins; completions come in any order and through several completion queues, one of which may not be polled for
//! long. So a receive's *shadow* (where small payload goes) has no place in the ring: each receive takes a free one, its
//! completion names that one (the entry's tag) and frees it. There are as many shadows as ring entries. While one is free,
//! so is the next entry: of the receives ever posted, all but fewer than a ring have completed, and the device took those,
//! or as many others, from the front.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use hyv_abi::control::{CreateSrq, DestroySrq, ModifySrq, QuerySrq, SrqAttr};
use hyv_abi::queue::{CQE_DATA, Cqe, MAX_RECV_SGE, SLOT_LEN, WcStatus, cqe_flags};

use crate::context::ContextInner;
use crate::dma::{self, DmaBuf};
use crate::error::{Error, PostError, PostListError};
use crate::event::forget;
use crate::mr::{PdInner, ProtectionDomain};
use crate::qp::{at_most, first_of, ring_slots};
use crate::ring::{RecvRing, Words, recv_stride};
use crate::shadow::data_bytes;
use crate::wr::RecvWr;

/// What a shared receive queue is made for, as `struct ibv_srq_init_attr`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SrqCaps {
    /// Receives outstanding; 1 or more.
    pub max_wr: u32,
    /// SGEs of a receive, at most 15.
    pub max_sge: u32,
}

impl Default for SrqCaps {
    fn default() -> Self {
        Self {
            max_wr: 256,
            max_sge: 1,
        }
    }
}

/// Bit of [`Shadow::meta`]: posted, and no completion of it was polled yet.
const BUSY: u64 = 1 << 63;

/// Where small payload of one receive goes. The posting thread fills it, the polling one empties it.
#[derive(Debug, Default)]
struct Shadow {
    addr: AtomicU64,
    /// [`BUSY`], and the first SGE's length as far as a completion's payload reaches.
    meta: AtomicU64,
}

/// What the completion queues need of a shared receive queue. Without locks: several threads may poll.
#[derive(Debug)]
pub(crate) struct SrqShared {
    /// By tag.
    shadows: Box<[Shadow]>,
    /// A bit for each shadow that a completion has freed and the posting thread has not yet taken for its own.
    free: Box<[AtomicU64]>,
}

impl SrqShared {
    fn new(slots: u32) -> Self {
        let free = |word: u32| AtomicU64::new(ones((slots - 64 * word).min(64)));
        Self {
            shadows: (0..slots).map(|_| Shadow::default()).collect(),
            free: (0..slots.div_ceil(64)).map(free).collect(),
        }
    }

    /// Books a completion: delivers its payload and frees its shadow. False if the payload could not be delivered: no such
    /// receive is posted.
    #[inline]
    pub(crate) fn complete(&self, cqe: &Cqe) -> bool {
        let has_data = cqe.flags & cqe_flags::DATA != 0 && cqe.status == WcStatus::Success as u8;
        let tag = usize::from(cqe.wqe);
        let (Some(shadow), Some(free)) = (self.shadows.get(tag), self.free.get(tag / 64)) else {
            return !has_data;
        };
        // Filled before the entry was posted, and the completion orders the two.
        let meta = shadow.meta.load(Ordering::Relaxed);
        if meta & BUSY == 0 {
            return !has_data;
        }
        if has_data {
            let len = (cqe.byte_len as usize).min(meta as usize & 0xff);
            let bytes = data_bytes(cqe);
            dma::deliver(shadow.addr.load(Ordering::Relaxed), &bytes[..len]);
        }
        shadow.meta.store(0, Ordering::Relaxed);
        free.fetch_or(1 << (tag % 64), Ordering::Release);
        true
    }
}

/// So many low bits.
const fn ones(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// What queue pairs keep alive of their SRQ.
pub(crate) struct SrqInner {
    pub(crate) context: Arc<ContextInner>,
    pub(crate) handle: u32,
    pub(crate) shared: Arc<SrqShared>,
    ring: Arc<DmaBuf>,
    control: DmaBuf,
    destroyed: bool,
    _pd: Arc<PdInner>,
}

impl SrqInner {
    fn destroy(&mut self) -> Result<(), Error> {
        if core::mem::replace(&mut self.destroyed, true) {
            return Ok(());
        }
        let (events, index) = (&self.context.window.events, self.handle as u16);
        let done = self
            .context
            .control
            .call_then(&DestroySrq { srq: self.handle }, || {
                forget(&events.srq_limit, index);
            });
        if done.is_err() {
            // The device may still read them.
            self.ring.retain();
            self.control.retain();
        }
        done.map(|_| ())
    }
}

impl Drop for SrqInner {
    fn drop(&mut self) {
        let _ = self.destroy();
    }
}

/// A shared receive queue (`struct ibv_srq`). One thread posts; the completions of its receives come to the completion
/// queues of the queue pairs that took them, in any order, and any thread may poll those. It is destroyed when it and all
/// its queue pairs are dropped.
///
/// Before destroying a queue pair, bring it to the error state and wait for
/// [`crate::AsyncEvent::QpLastWqe`]: no receive completes through it after that. Dropping it at once is fine too: a receive
/// that was being filled then is not reported.
pub struct SharedReceiveQueue {
    pub(crate) inner: Arc<SrqInner>,
    ring: RecvRing<Arc<DmaBuf>>,
    /// Free shadows that this thread has taken for its own: bits of one word of [`SrqShared::free`], and which word.
    own: (u64, usize),
    max_sge: usize,
}

impl fmt::Debug for SharedReceiveQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedReceiveQueue")
            .field("handle", &self.inner.handle)
            .field("entries", &self.ring.slots())
            .finish_non_exhaustive()
    }
}

impl ProtectionDomain {
    /// Makes a shared receive queue (`ibv_create_srq`).
    ///
    /// # Errors
    /// [`Error::BadSize`] for what no ring can hold, [`Error::OutOfMemory`], and as any control verb.
    pub fn create_srq(&self, caps: &SrqCaps) -> Result<SharedReceiveQueue, Error> {
        let context = &self.inner.context;
        let max_sge = at_most("SGEs of a receive", caps.max_sge, MAX_RECV_SGE)?;
        let slots = ring_slots("receive work requests", caps.max_wr, 1, 1)?;
        let stride = recv_stride(max_sge);
        let len = slots as usize * stride as usize;
        let mem = Arc::new(DmaBuf::new(context.platform(), len, SLOT_LEN)?);
        let control = DmaBuf::new(context.platform(), SLOT_LEN, SLOT_LEN)?;
        let ring =
            RecvRing::new(Arc::clone(&mem), slots, stride).ok_or(Error::OutOfMemory { len })?;
        let request = CreateSrq {
            pd: self.inner.handle,
            log2: slots.trailing_zeros(),
            ring: mem.offset(),
            ctrl: control.offset(),
            stride,
            reserved: 0,
        };
        let handle = context.call(&request)?.handle;
        let inner = SrqInner {
            context: Arc::clone(context),
            handle,
            shared: Arc::new(SrqShared::new(slots)),
            ring: mem,
            control,
            destroyed: false,
            _pd: Arc::clone(&self.inner),
        };
        Ok(SharedReceiveQueue {
            inner: Arc::new(inner),
            ring,
            own: (0, 0),
            max_sge,
        })
    }
}

impl SharedReceiveQueue {
    /// Its index in events ([`crate::AsyncEvent::SrqLimit`]).
    #[must_use]
    pub fn index(&self) -> u16 {
        self.inner.handle as u16
    }

    /// Entries of its ring: at least as many as were asked for.
    #[must_use]
    pub const fn capacity(&self) -> u32 {
        self.ring.slots()
    }

    /// Posts a receive (`ibv_post_srq_recv`). One more fits for each that was completed and polled.
    ///
    /// # Errors
    /// [`PostError`]; nothing is posted then.
    #[inline]
    pub fn post_recv(&mut self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        self.push(wr)?;
        self.publish();
        Ok(())
    }

    /// Posts receives in order.
    ///
    /// # Errors
    /// The first that cannot be posted, and how many were before it.
    #[inline]
    pub fn post_recv_list(&mut self, list: &[RecvWr<'_>]) -> Result<(), PostListError> {
        for (posted, wr) in list.iter().enumerate() {
            if let Err(error) = self.push(wr) {
                self.publish();
                return Err(PostListError { posted, error });
            }
        }
        self.publish();
        Ok(())
    }

    /// Receives that can be posted now.
    #[must_use]
    pub fn room(&self) -> u32 {
        let free = self.inner.shared.free.iter();
        let shared: u32 = free.map(|w| w.load(Ordering::Relaxed).count_ones()).sum();
        self.own.0.count_ones() + shared
    }

    /// A free shadow.
    #[inline]
    fn tag(&mut self) -> Option<u16> {
        if self.own.0 == 0 && !self.refill() {
            return None;
        }
        let (bits, word) = &mut self.own;
        let tag = *word * 64 + bits.trailing_zeros() as usize;
        *bits &= *bits - 1;
        Some(tag as u16)
    }

    /// Takes a word's worth of free shadows, if there are any.
    fn refill(&mut self) -> bool {
        let words = &self.inner.shared.free;
        for i in 1..=words.len() {
            let at = (self.own.1 + i) % words.len();
            if words[at].load(Ordering::Relaxed) != 0 {
                self.own = (words[at].swap(0, Ordering::Acquire), at);
                return true;
            }
        }
        false
    }

    #[inline]
    fn push(&mut self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        if wr.sges.len() > self.max_sge {
            return Err(PostError::TooManySges);
        }
        let tag = self.tag().ok_or(PostError::QueueFull)?;
        let shadow = &self.inner.shared.shadows[usize::from(tag)];
        let first = first_of(wr.sges);
        let len = u64::from(first.len).min(CQE_DATA as u64);
        shadow.addr.store(first.addr, Ordering::Relaxed);
        shadow.meta.store(BUSY | len, Ordering::Relaxed);
        self.ring.push(wr.wr_id, wr.sges, tag);
        Ok(())
    }

    /// How many were ever posted: what the limit is reckoned from.
    #[inline]
    fn publish(&self) {
        self.inner.control.words()[0].store(u64::from(self.ring.next()), Ordering::Release);
    }

    /// Asks for one [`crate::AsyncEvent::SrqLimit`] when fewer receives than `limit` are posted (`ibv_modify_srq`); 0 takes
    /// that back.
    ///
    /// # Errors
    /// As any control verb; EINVAL for more than the ring holds.
    pub fn set_limit(&mut self, limit: u32) -> Result<(), Error> {
        let srq = self.inner.handle;
        self.inner
            .context
            .call(&ModifySrq { srq, limit })
            .map(|_| ())
    }

    /// Its size and the limit that is armed, 0 once its event was raised (`ibv_query_srq`).
    ///
    /// # Errors
    /// As any control verb.
    pub fn query(&self) -> Result<SrqAttr, Error> {
        let srq = self.inner.handle;
        self.inner.context.call(&QuerySrq { srq })
    }

    /// Destroys it and says how that went (`ibv_destroy_srq`). Dropping does the same in silence.
    ///
    /// # Errors
    /// [`Error::InUse`] while queue pairs use it: it is destroyed with the last of them then.
    pub fn destroy(self) -> Result<(), Error> {
        let Self { inner, ring, .. } = self;
        drop(ring);
        match Arc::into_inner(inner) {
            None => Err(Error::InUse),
            Some(mut inner) => inner.destroy(),
        }
    }
}
