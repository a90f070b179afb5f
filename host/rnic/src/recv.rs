//! Where receives come from: a QP's own ring or a shared one, and the one that a QP has taken.

use std::collections::VecDeque;

use hyv_abi::queue::{MAX_RECV_SGE, Sge, seq};
use hyv_abi::sync::Ordering;
use hyv_abi::window::summary;

use crate::engine::Engine;
use crate::mem::Words;

/// A receive work request, copied out of its ring: the user may reuse nothing of it before its completion, but
/// whatever it does to the slot meanwhile changes nothing.
#[derive(Clone, Debug)]
pub(crate) struct RecvWr {
    /// The user's name for it.
    pub wr_id: u64,
    /// For the completion: position in its ring modulo 2^16, or in a shared one the user's tag.
    pub name: u16,
    /// The protection domain that its keys are of: the QP's, or the SRQ's (IBA 1.4, 10.2.3).
    pub pd: u32,
    /// How many of `sges` count.
    pub num_sge: usize,
    pub sges: [Sge; MAX_RECV_SGE],
}

impl Default for RecvWr {
    fn default() -> Self {
        Self {
            wr_id: 0,
            name: 0,
            pd: 0,
            num_sge: 0,
            sges: [Sge::default(); MAX_RECV_SGE],
        }
    }
}

impl RecvWr {
    /// Its pieces.
    #[inline]
    pub fn sges(&self) -> &[Sge] {
        &self.sges[..self.num_sge.min(MAX_RECV_SGE)]
    }
}

/// A ring of receives.
pub(crate) struct RecvRing {
    words: Words,
    mask: u32,
    /// Position of the next one.
    pub head: u32,
    /// Words of a slot.
    stride: usize,
    pd: u32,
    shared: bool,
}

impl RecvRing {
    /// A ring of `1 << log2` slots of `stride` words; its receives are named by their tags if it is a shared one.
    pub fn new(words: Words, log2: u32, stride: usize, pd: u32, shared: bool) -> Self {
        debug_assert_eq!(words.count(), stride << log2);
        Self {
            words,
            mask: (1 << log2) - 1,
            head: 0,
            stride,
            pd,
            shared,
        }
    }

    pub fn slots(&self) -> u32 {
        self.mask + 1
    }

    /// SGEs that a slot holds.
    pub fn max_sge(&self) -> usize {
        (self.stride - 2) / 2
    }

    #[inline]
    fn base(&self) -> usize {
        (self.head & self.mask) as usize * self.stride
    }

    /// Whether one is posted.
    #[inline]
    pub fn ready(&self) -> bool {
        let last = self.words.at(self.base() + self.stride - 1);
        last.load(Ordering::Acquire) as u32 == seq(self.head)
    }

    /// Takes the next one; false if none is posted.
    #[inline]
    pub fn take(&mut self, into: &mut RecvWr) -> bool {
        let base = self.base();
        let last = self.words.at(base + self.stride - 1);
        let last = last.load(Ordering::Acquire);
        if last as u32 != seq(self.head) {
            return false;
        }
        let word = |i: usize| self.words.at(base + i).load(Ordering::Relaxed);
        into.wr_id = word(0);
        into.name = if self.shared {
            (last >> 48) as u16
        } else {
            self.head as u16
        };
        into.pd = self.pd;
        into.num_sge = usize::from((last >> 32) as u8).min(self.max_sge());
        for (i, sge) in into.sges.iter_mut().take(into.num_sge).enumerate() {
            *sge = Sge::from_words([word(1 + 2 * i), word(2 + 2 * i)]);
        }
        self.head = self.head.wrapping_add(1);
        // The user wrote it: fetch the next line now, not when a message waits for it.
        self.words.prefetch(self.base());
        true
    }
}

/// Where a QP's receives come from.
pub(crate) enum RecvFrom {
    /// Its own ring.
    Own(RecvRing),
    /// The engine's SRQ of that slot.
    Shared(usize),
}

/// A shared receive queue: whichever QP gets a message takes the next one.
pub(crate) struct Srq {
    pub user: usize,
    /// Its event bit.
    pub index: u32,
    pub pd: u32,
    pub ring: RecvRing,
    pub ctrl: Words,
    /// An event is due when fewer are posted; 0 is not armed.
    pub limit: u32,
    /// Taken by QPs that were reset or dropped in the middle of a message: handed out again first.
    pub returned: VecDeque<Box<RecvWr>>,
    /// QPs that use it.
    pub refs: u32,
}

impl Srq {
    fn take(&mut self, into: &mut RecvWr) -> bool {
        if let Some(r) = self.returned.pop_front() {
            *into = *r;
            return true;
        }
        self.ring.take(into)
    }

    /// Receives posted and not taken, as far as the user's count can be believed.
    pub fn posted(&self) -> u32 {
        let posted = self.ctrl.at(0).load(Ordering::Acquire) as u32;
        let waiting = posted.wrapping_sub(self.ring.head).min(self.ring.slots());
        waiting.saturating_add(self.returned.len() as u32)
    }
}

impl Engine {
    /// Takes the next receive of a QP: from its own ring, or from its SRQ, whose limit event may become due. `None`: none
    /// is posted. What is taken must end in a completion, in `Qp::receiving` (a message that takes many turns,
    /// or was dropped), or go back by [`Engine::return_recv`].
    #[inline]
    pub(crate) fn take_recv(&mut self, slot: usize) -> Option<Box<RecvWr>> {
        if let Some(held) = self.qp_mut(slot).receiving.take() {
            return Some(held);
        }
        let mut recv = self.spare_recv.take().unwrap_or_default();
        let taken = match &mut self.qp_mut(slot).recv {
            RecvFrom::Own(ring) => ring.take(&mut recv),
            &mut RecvFrom::Shared(srq) => self.take_shared(srq, &mut recv),
        };
        if taken {
            return Some(recv);
        }
        self.spare_recv = Some(recv);
        None
    }

    /// Whether [`Engine::take_recv`] would find one.
    #[inline]
    pub(crate) fn has_recv(&self, slot: usize) -> bool {
        let qp = self.qp(slot);
        qp.receiving.is_some()
            || match &qp.recv {
                RecvFrom::Own(ring) => ring.ready(),
                &RecvFrom::Shared(srq) => {
                    let srq = self.srq(srq);
                    !srq.returned.is_empty() || srq.ring.ready()
                }
            }
    }

    fn take_shared(&mut self, slot: usize, into: &mut RecvWr) -> bool {
        let srq = self.srq_mut(slot);
        if !srq.take(into) {
            return false;
        }
        if srq.limit != 0 {
            self.check_limit(slot);
        }
        true
    }

    /// Raises an SRQ's limit event if it is due, once.
    #[cold]
    pub(crate) fn check_limit(&mut self, slot: usize) {
        let srq = self.srq_mut(slot);
        if srq.posted() >= srq.limit {
            return;
        }
        srq.limit = 0;
        let (index, u) = (srq.index as usize, srq.user);
        let user = self.user(u);
        let events = &user.mem.window().events;
        events.srq_limit[index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
        events
            .summary
            .fetch_or(summary::SRQ_LIMIT, Ordering::SeqCst);
        user.wake.wake();
    }

    /// A QP is reset or dropped: what it has taken of an SRQ goes back there, so that the user's ring has no gap for ever.
    pub(crate) fn return_recv(&mut self, slot: usize) {
        let qp = self.qp_mut(slot);
        let Some(recv) = qp.receiving.take() else {
            return;
        };
        if let RecvFrom::Shared(srq) = qp.recv {
            self.srq_mut(srq).returned.push_back(recv);
        }
    }

    #[inline]
    pub(crate) fn srq(&self, slot: usize) -> &Srq {
        self.srqs[slot].as_ref().expect("a live SRQ's slot")
    }

    #[inline]
    pub(crate) fn srq_mut(&mut self, slot: usize) -> &mut Srq {
        self.srqs[slot].as_mut().expect("a live SRQ's slot")
    }
}
