//! The private part of a queue pair that its completion queues need: what frees slots, and where payload
//! that came in a completion belongs.
//!
//! The posting thread writes it, the polling one reads it. A completion orders the two (post, release, device,
//! acquire, poll), so relaxed atomics do.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use hyv_abi::queue::{CQE_DATA, Cqe, Sge, WcOpcode, WcStatus, cqe_flags};
use hyv_abi::types::{QpState, QpType};

use crate::dma;
use crate::srq::SrqShared;

/// One slot's first SGE that is not empty, and how many slots its work request takes.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    addr: AtomicU64,
    len_slots: AtomicU64,
}

impl Shadow {
    #[inline]
    pub(crate) fn set(&self, sge: Sge, slots: u32) {
        self.addr.store(sge.addr, Ordering::Relaxed);
        self.len_slots.store(
            u64::from(sge.len) | u64::from(slots) << 32,
            Ordering::Relaxed,
        );
    }
}

/// What a QP shares with the CQs that it reports to.
#[derive(Debug)]
pub(crate) struct QpShared {
    /// Its number.
    pub(crate) qpn: u32,
    /// Its doorbell index.
    pub(crate) index: u16,
    pub(crate) ty: QpType,
    /// Where its receives come from, if not from a ring of its own.
    pub(crate) srq: Option<Arc<SrqShared>>,
    /// Destroyed: completions that still come are not its owner's business.
    pub(crate) dead: AtomicBool,
    /// A completion with an error was seen since it was last reset.
    pub(crate) errored: AtomicBool,
    /// A [`QpState`], as far as is known here.
    state: AtomicU32,
    sq_freed: AtomicU32,
    rq_freed: AtomicU32,
    sq: Box<[Shadow]>,
    rq: Box<[Shadow]>,
}

impl QpShared {
    /// By QPN and doorbell index, for rings of so many slots (powers of two).
    pub(crate) fn new(
        (qpn, index): (u32, u16),
        ty: QpType,
        (sq_slots, rq_slots): (u32, u32),
        srq: Option<Arc<SrqShared>>,
    ) -> Self {
        let shadows = |n| (0..n).map(|_| Shadow::default()).collect();
        Self {
            qpn,
            index,
            ty,
            srq,
            dead: AtomicBool::new(false),
            errored: AtomicBool::new(false),
            state: AtomicU32::new(QpState::Reset as u32),
            sq_freed: AtomicU32::new(0),
            rq_freed: AtomicU32::new(0),
            sq: shadows(sq_slots),
            rq: shadows(rq_slots),
        }
    }

    #[inline]
    pub(crate) fn state(&self) -> QpState {
        QpState::from_u32(self.state.load(Ordering::Relaxed)).unwrap_or(QpState::Err)
    }

    pub(crate) fn set_state(&self, state: QpState) {
        self.state.store(state as u32, Ordering::Relaxed);
    }

    /// Slots of the send ring ever freed.
    #[inline]
    pub(crate) fn sq_freed(&self) -> u32 {
        self.sq_freed.load(Ordering::Acquire)
    }

    /// Entries of the receive ring ever freed.
    #[inline]
    pub(crate) fn rq_freed(&self) -> u32 {
        self.rq_freed.load(Ordering::Acquire)
    }

    /// The shadow of a send-ring position.
    #[inline]
    pub(crate) fn sq_slot(&self, position: u32) -> &Shadow {
        &self.sq[position as usize & (self.sq.len() - 1)]
    }

    /// The shadow of a receive-ring position.
    #[inline]
    pub(crate) fn rq_slot(&self, position: u32) -> &Shadow {
        &self.rq[position as usize & (self.rq.len() - 1)]
    }

    /// Both rings start again.
    pub(crate) fn reset(&self) {
        self.sq_freed.store(0, Ordering::Relaxed);
        self.rq_freed.store(0, Ordering::Relaxed);
        self.errored.store(false, Ordering::Relaxed);
    }

    /// Books a completion: delivers its payload, then frees its work request's slots and all before it. False if the
    /// payload could not be delivered.
    #[inline]
    pub(crate) fn complete(&self, cqe: &Cqe) -> bool {
        let recv = cqe.opcode & WcOpcode::Recv as u8 != 0;
        if recv && let Some(srq) = &self.srq {
            return srq.complete(cqe);
        }
        let (ring, freed) = if recv {
            (&self.rq, &self.rq_freed)
        } else {
            (&self.sq, &self.sq_freed)
        };
        let done = freed.load(Ordering::Relaxed);
        // Work requests complete in order, so this one is less than a ring ahead of what is free.
        let ahead = u32::from(cqe.wqe.wrapping_sub(done as u16));
        let position = done.wrapping_add(ahead);
        if ahead >= ring.len() as u32 {
            // Left over from before a reset: its slots are free already.
            return true;
        }
        let shadow = &ring[position as usize & (ring.len() - 1)];
        let len_slots = shadow.len_slots.load(Ordering::Relaxed);
        if cqe.flags & cqe_flags::DATA != 0 && cqe.status == WcStatus::Success as u8 {
            let len = (cqe.byte_len as usize)
                .min(len_slots as u32 as usize)
                .min(CQE_DATA);
            let bytes = data_bytes(cqe);
            dma::deliver(shadow.addr.load(Ordering::Relaxed), &bytes[..len]);
        }
        let slots = ((len_slots >> 32) as u32).max(1);
        freed.store(position.wrapping_add(slots), Ordering::Release);
        true
    }

    /// A completion that nobody will see: a shared receive queue gets its entry back.
    pub(crate) fn give_back(&self, cqe: &Cqe) {
        if cqe.opcode & WcOpcode::Recv as u8 != 0
            && let Some(srq) = &self.srq
        {
            srq.complete(&Cqe { flags: 0, ..*cqe });
        }
    }

    /// A completion with an error came: the queue pair is in an error state. True if that is news and the device must look
    /// at the queues again: a receive posted while it went there may have been missed.
    #[cold]
    pub(crate) fn fail(&self, cqe: &Cqe) -> bool {
        let recv = cqe.opcode & WcOpcode::Recv as u8 != 0;
        if self.ty != QpType::Rc && !recv && self.state() != QpState::Err {
            // Unreliable ones go on receiving (IBA 1.4, 10.3.1.6). The first failure says more than those flushed after it.
            if cqe.status != WcStatus::WrFlushErr as u8 || self.state() == QpState::Sqe {
                self.set_state(QpState::Sqe);
                return false;
            }
        }
        !self.errored.swap(true, Ordering::Relaxed)
    }
}

/// The payload words of a completion, as bytes.
#[inline]
pub(crate) fn data_bytes(cqe: &Cqe) -> [u8; CQE_DATA] {
    let mut bytes = [0; CQE_DATA];
    for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(cqe.data) {
        *to = word.to_le_bytes();
    }
    bytes
}
