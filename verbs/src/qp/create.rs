//! Making queue pairs: what they are made for, and their rings.

use alloc::sync::Arc;

use hyv_abi::control::CreateQp;
use hyv_abi::queue::{MAX_INLINE, MAX_RECV_SGE, MAX_SEND_SGE, SLOT_LEN, SendHead};
use hyv_abi::types::QpType;

use crate::cq::CompletionQueue;
use crate::dma::DmaBuf;
use crate::error::Error;
use crate::limits::{MAX_RING, MIN_SEND_RING};
use crate::mr::ProtectionDomain;
use crate::qp::control::QpControl;
use crate::qp::{QueuePair, allowed};
use crate::ring::{RecvRing, SendRing, recv_stride};
use crate::shadow::QpShared;
use crate::srq::SharedReceiveQueue;

/// What a queue pair is made for, as `struct ibv_qp_cap`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QpCaps {
    /// Send work requests outstanding; 1 or more.
    pub max_send_wr: u32,
    /// Receives outstanding; 1 or more. Not looked at with a shared receive queue.
    pub max_recv_wr: u32,
    /// SGEs of a send, at most 16.
    pub max_send_sge: u32,
    /// SGEs of a receive, at most 15. Not looked at with a shared receive queue.
    pub max_recv_sge: u32,
    /// Inline bytes of a send, at most 416.
    pub max_inline_data: u32,
    /// Every send writes a completion, whatever its flags (`sq_sig_all`).
    pub signal_all: bool,
}

impl Default for QpCaps {
    fn default() -> Self {
        Self {
            max_send_wr: 64,
            max_recv_wr: 64,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 24,
            signal_all: false,
        }
    }
}

/// What a queue pair is made of, as `struct ibv_qp_init_attr`.
#[derive(Clone, Copy, Debug)]
pub struct QpInitAttr<'a> {
    /// Reliable or unreliable connection, or unreliable datagrams.
    pub qp_type: QpType,
    /// Where its sends complete.
    pub send_cq: &'a CompletionQueue,
    /// Where its receives complete.
    pub recv_cq: &'a CompletionQueue,
    /// Where its receives come from, instead of a ring of its own.
    pub srq: Option<&'a SharedReceiveQueue>,
    /// How large.
    pub caps: QpCaps,
}

impl<'a> QpInitAttr<'a> {
    /// Of a type, with one completion queue for sends and one for receives (or twice the same).
    #[must_use]
    pub fn new(
        qp_type: QpType,
        send_cq: &'a CompletionQueue,
        recv_cq: &'a CompletionQueue,
    ) -> Self {
        Self {
            qp_type,
            send_cq,
            recv_cq,
            srq: None,
            caps: QpCaps::default(),
        }
    }

    /// The same with receives from a shared queue.
    #[must_use]
    pub const fn with_srq(mut self, srq: &'a SharedReceiveQueue) -> Self {
        self.srq = Some(srq);
        self
    }

    /// The same of another size.
    #[must_use]
    pub const fn with_caps(mut self, caps: QpCaps) -> Self {
        self.caps = caps;
        self
    }
}

pub(crate) fn ring_slots(
    what: &'static str,
    asked: u32,
    per: u32,
    least: u32,
) -> Result<u32, Error> {
    match asked
        .checked_mul(per)
        .and_then(u32::checked_next_power_of_two)
    {
        Some(slots) if asked > 0 && slots <= MAX_RING => Ok(slots.max(least)),
        _ => Err(Error::BadSize {
            what,
            asked,
            max: MAX_RING / per,
        }),
    }
}

pub(crate) fn at_most(what: &'static str, asked: u32, max: usize) -> Result<usize, Error> {
    match usize::try_from(asked) {
        Ok(n) if n <= max => Ok(n),
        _ => Err(Error::BadSize {
            what,
            asked,
            max: max as u32,
        }),
    }
}

impl ProtectionDomain {
    /// Makes a queue pair of a reliable connection (`ibv_create_qp`, RC), in the RESET state.
    ///
    /// # Errors
    /// As [`create_qp_ex`](Self::create_qp_ex).
    pub fn create_qp(
        &self,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        caps: &QpCaps,
    ) -> Result<QueuePair, Error> {
        self.create_qp_ex(&QpInitAttr::new(QpType::Rc, send_cq, recv_cq).with_caps(*caps))
    }

    /// Makes a queue pair of any type (`ibv_create_qp`), in the RESET state.
    ///
    /// # Errors
    /// [`Error::BadSize`] for what no ring can hold, [`Error::OutOfMemory`], [`Error::OtherContext`] for queues of
    /// another one, and as any control verb.
    pub fn create_qp_ex(&self, attr: &QpInitAttr<'_>) -> Result<QueuePair, Error> {
        let context = &self.inner.context;
        let caps = &attr.caps;
        let (send_cq, recv_cq) = (&attr.send_cq.inner, &attr.recv_cq.inner);
        let srq = attr.srq.map(|s| &s.inner);
        let others = [&send_cq.context, &recv_cq.context];
        if others
            .into_iter()
            .chain(srq.map(|s| &s.context))
            .any(|c| !Arc::ptr_eq(c, context))
        {
            return Err(Error::OtherContext);
        }
        let max_send_sge = at_most("SGEs of a send", caps.max_send_sge, MAX_SEND_SGE)?;
        let max_inline = at_most("inline bytes of a send", caps.max_inline_data, MAX_INLINE)?;
        let per_send = SendHead::slots_for(max_send_sge, max_inline, false) as u32;
        let sq_slots = ring_slots(
            "send work requests",
            caps.max_send_wr,
            per_send,
            MIN_SEND_RING,
        )?;
        // With a shared receive queue the ring of its own is the smallest there is, and nothing is posted to it.
        let (max_recv_sge, rq_slots) = if srq.is_some() {
            (0, 1)
        } else {
            (
                at_most("SGEs of a receive", caps.max_recv_sge, MAX_RECV_SGE)?,
                ring_slots("receive work requests", caps.max_recv_wr, 1, 1)?,
            )
        };
        let rq_stride = recv_stride(max_recv_sge);

        let platform = context.platform();
        let sq_len = sq_slots as usize * SLOT_LEN;
        let rq_len = rq_slots as usize * rq_stride as usize;
        let sq_mem = DmaBuf::new(platform, sq_len, SLOT_LEN)?;
        let rq_mem = DmaBuf::new(platform, rq_len, SLOT_LEN)?;
        let request = CreateQp {
            pd: self.inner.handle,
            qp_type: attr.qp_type as u32,
            send_cq: send_cq.handle,
            recv_cq: recv_cq.handle,
            srq: srq.map_or(u32::MAX, |s| s.handle),
            sig_all: u32::from(caps.signal_all),
            sq_ring: sq_mem.offset(),
            rq_ring: rq_mem.offset(),
            sq_log2: sq_slots.trailing_zeros(),
            rq_log2: rq_slots.trailing_zeros(),
            rq_stride,
            reserved: 0,
        };
        let sq = SendRing::new(sq_mem, sq_slots).ok_or(Error::OutOfMemory { len: sq_len })?;
        let rq =
            RecvRing::new(rq_mem, rq_slots, rq_stride).ok_or(Error::OutOfMemory { len: rq_len })?;
        let reply = context.call(&request)?;
        let index = reply.handle as u16;
        let shared = Arc::new(QpShared::new(
            (reply.qpn, index),
            attr.qp_type,
            (sq_slots, rq_slots),
            srq.map(|s| Arc::clone(&s.shared)),
        ));
        send_cq.attach(Arc::clone(&shared));
        if !Arc::ptr_eq(send_cq, recv_cq) {
            recv_cq.attach(Arc::clone(&shared));
        }
        let control = QpControl {
            context: Arc::clone(context),
            handle: reply.handle,
            shared: Arc::clone(&shared),
            _pd: Arc::clone(&self.inner),
            _send_cq: Arc::clone(send_cq),
            _recv_cq: Arc::clone(recv_cq),
            _srq: srq.map(Arc::clone),
        };
        Ok(QueuePair {
            control: Arc::new(control),
            shared,
            window: context.window.clone(),
            sq,
            rq,
            sq_freed: 0,
            rq_freed: 0,
            allowed: allowed(attr.qp_type),
            own_receives: srq.is_none(),
            max_send_sge,
            max_recv_sge,
            max_inline,
            qpn: reply.qpn,
            doorbell: u32::from(index),
            destroyed: false,
        })
    }
}
