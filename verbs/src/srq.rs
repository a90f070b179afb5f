//! Shared receive queues.
//!
//! One ring that several queue pairs take receives from. The device takes entries in ring order and copies each when a
//! message begins, so an entry of the *ring* is free once a later one, or itself, has completed. Completions come in any
//! order and through several completion queues; until an entry has completed its *shadow* (where small payload goes) must
//! stay. So there are more shadows than ring entries, and a message that takes long holds up nobody.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hyv_abi::control::{CreateSrq, DestroySrq, ModifySrq, QuerySrq, SrqAttr};
use hyv_abi::queue::{CQE_DATA, Cqe, MAX_RECV_SGE, SLOT_LEN, WcStatus, cqe_flags};

use crate::context::ContextInner;
use crate::dma::{self, DmaBuf};
use crate::error::{Error, PostError, PostListError};
use crate::event::forget;
use crate::limits::{SRQ_SHADOWS_MAX, SRQ_SHADOWS_MIN, SRQ_SHADOWS_PER_ENTRY};
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

/// Where small payload of one entry goes. The posting thread fills it, the polling one empties it.
#[derive(Debug, Default)]
struct Shadow {
    addr: AtomicU64,
    /// [`BUSY`], the first SGE's length (as far as a completion's payload reaches) from bit 32 on, the position.
    meta: AtomicU64,
}

/// What the completion queues need of a shared receive queue. Without locks: several threads may poll.
#[derive(Debug)]
pub(crate) struct SrqShared {
    shadows: Box<[Shadow]>,
    /// One past the latest entry known to have completed: the device took all before it.
    taken: AtomicU32,
    /// Entries before this that never completed may have gone with a queue pair.
    abandoned: AtomicU32,
}

impl SrqShared {
    fn new(slots: u32) -> Self {
        let n = (slots * SRQ_SHADOWS_PER_ENTRY).clamp(SRQ_SHADOWS_MIN, SRQ_SHADOWS_MAX);
        Self {
            shadows: (0..n).map(|_| Shadow::default()).collect(),
            taken: AtomicU32::new(0),
            abandoned: AtomicU32::new(0),
        }
    }

    #[inline]
    fn shadow(&self, position: u32) -> &Shadow {
        &self.shadows[position as usize & (self.shadows.len() - 1)]
    }

    /// Whether the shadow of a position may be filled.
    #[inline]
    fn is_free(&self, position: u32) -> bool {
        let meta = self.shadow(position).meta.load(Ordering::Acquire);
        if meta & BUSY == 0 {
            return true;
        }
        let before = (meta as u32).wrapping_sub(self.abandoned.load(Ordering::Relaxed));
        (before as i32) < 0
    }

    /// Books a completion: delivers its payload and frees the entry. False if the payload could not be delivered, because
    /// the entry was given up meanwhile.
    #[inline]
    pub(crate) fn complete(&self, cqe: &Cqe) -> bool {
        let shadow = self.shadow(u32::from(cqe.wqe));
        // Filled before the entry was posted, and the completion orders the two.
        let meta = shadow.meta.load(Ordering::Relaxed);
        let has_data = cqe.flags & cqe_flags::DATA != 0 && cqe.status == WcStatus::Success as u8;
        if meta & BUSY == 0 || meta as u16 != cqe.wqe {
            return !has_data;
        }
        if has_data {
            let len = (cqe.byte_len as usize).min((meta >> 32) as usize & 0xff);
            let bytes = data_bytes(cqe);
            dma::deliver(shadow.addr.load(Ordering::Relaxed), &bytes[..len]);
        }
        shadow.meta.store(0, Ordering::Release);
        let end = (meta as u32).wrapping_add(1);
        let mut taken = self.taken.load(Ordering::Relaxed);
        while (end.wrapping_sub(taken) as i32) > 0 {
            match self
                .taken
                .compare_exchange_weak(taken, end, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => break,
                Err(now) => taken = now,
            }
        }
        true
    }
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
    /// A queue pair is gone or starts anew: an entry that it took and did not complete never will be.
    pub(crate) fn abandon(&self) {
        let posted = self.control.words()[0].load(Ordering::Relaxed) as u32;
        self.shared.abandoned.store(posted, Ordering::Relaxed);
    }

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
    /// As [`SrqShared::taken`], looked up anew when the ring seems full.
    taken: u32,
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
            taken: 0,
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

    /// Receives that can be posted now. (While a message goes on holding an entry many laps of the ring old, it may be fewer.)
    #[must_use]
    pub fn room(&mut self) -> u32 {
        self.taken = self.inner.shared.taken.load(Ordering::Acquire);
        if self.inner.shared.is_free(self.ring.next()) {
            self.ring.room(self.taken)
        } else {
            0
        }
    }

    #[inline]
    fn push(&mut self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        if wr.sges.len() > self.max_sge {
            return Err(PostError::TooManySges);
        }
        let position = self.ring.next();
        let shared = &self.inner.shared;
        if self.ring.room(self.taken) == 0 {
            self.taken = shared.taken.load(Ordering::Acquire);
            if self.ring.room(self.taken) == 0 {
                return Err(PostError::QueueFull);
            }
        }
        if !shared.is_free(position) {
            return Err(PostError::QueueFull);
        }
        let first = first_of(wr.sges);
        let shadow = shared.shadow(position);
        let len = u64::from(first.len).min(CQE_DATA as u64);
        shadow.addr.store(first.addr, Ordering::Relaxed);
        shadow
            .meta
            .store(BUSY | len << 32 | u64::from(position), Ordering::Relaxed);
        self.ring.push(wr.wr_id, wr.sges);
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
