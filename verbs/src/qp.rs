//! Queue pairs.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::Ordering;

use hyv_abi::control::{CreateQp, DestroyQp, ModifyQp, QpAttr, QueryQp};
use hyv_abi::doorbell::Ring;
use hyv_abi::queue::{
    MAX_INLINE, MAX_RECV_SGE, MAX_SEND_SGE, RECV_STRIDES, SLOT_LEN, SendHead, Sge, flags,
};
use hyv_abi::types::{Access, QpAttrMask, QpState, QpType};
use hyv_abi::window::KICK_DATA;

use crate::context::{ContextInner, Gid};
use crate::cq::{CompletionQueue, CqInner};
use crate::dma::{DmaBuf, WindowRef};
use crate::error::{Error, PostError, PostListError};
use crate::limits::{MAX_RING, MIN_SEND_RING};
use crate::mr::{PdInner, ProtectionDomain};
use crate::ring::{Body, RecvRing, SendRing};
use crate::shadow::QpShared;
use crate::wr::{Payload, RecvWr, SendOp, SendWr};

/// What a queue pair is made for, as `struct ibv_qp_cap`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QpCaps {
    /// Send work requests outstanding; 1 or more.
    pub max_send_wr: u32,
    /// Receives outstanding; 1 or more.
    pub max_recv_wr: u32,
    /// SGEs of a send, at most 16.
    pub max_send_sge: u32,
    /// SGEs of a receive, at most 15.
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

/// What INIT → RTR needs: the peer and how to hear it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RtrParams {
    /// The peer's GID.
    pub dest_gid: Gid,
    /// The peer's QPN.
    pub dest_qpn: u32,
    /// First PSN that the peer sends.
    pub rq_psn: u32,
    /// Path MTU, bytes: 256 to 4096.
    pub path_mtu: u32,
    /// READs and atomics that the peer may have outstanding here.
    pub max_dest_rd_atomic: u32,
    /// What the peer is told to wait for when no receive is posted: a 5-bit code
    /// ([`hyv_abi::types::rnr_timer_ns`]).
    pub min_rnr_timer: u32,
}

impl RtrParams {
    /// To a peer, with the usual rest.
    #[must_use]
    pub const fn to(dest_gid: Gid, dest_qpn: u32, rq_psn: u32) -> Self {
        Self {
            dest_gid,
            dest_qpn,
            rq_psn,
            path_mtu: 4096,
            max_dest_rd_atomic: 16,
            min_rnr_timer: 1,
        }
    }
}

/// What RTR → RTS needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RtsParams {
    /// First PSN that this side sends.
    pub sq_psn: u32,
    /// READs and atomics that this side may have outstanding.
    pub max_rd_atomic: u32,
    /// ACK timeout, a 5-bit code: 4.096 us x 2^code.
    pub timeout: u32,
    /// Retries when no answer comes.
    pub retry_cnt: u32,
    /// Retries when the peer has no receive posted; 7 is for ever.
    pub rnr_retry: u32,
}

impl RtsParams {
    /// With the usual rest.
    #[must_use]
    pub const fn from_psn(sq_psn: u32) -> Self {
        Self {
            sq_psn,
            max_rd_atomic: 16,
            timeout: 14,
            retry_cnt: 7,
            rnr_retry: 7,
        }
    }
}

/// A queue pair's control side: what connection management needs of it.
pub(crate) struct QpControl {
    pub(crate) context: Arc<ContextInner>,
    pub(crate) handle: u32,
    pub(crate) shared: Arc<QpShared>,
    _pd: Arc<PdInner>,
    _send_cq: Arc<CqInner>,
    _recv_cq: Arc<CqInner>,
}

impl QpControl {
    pub(crate) fn modify(&self, attr: &QpAttr, mask: QpAttrMask) -> Result<(), Error> {
        if self.shared.dead.load(Ordering::Acquire) {
            return Err(Error::NoQueuePair);
        }
        self.context.call(&ModifyQp {
            qp: self.handle,
            mask: mask.bits(),
            attr: *attr,
        })?;
        if mask.contains(QpAttrMask::STATE) {
            self.shared
                .set_state(QpState::from_u32(attr.state).unwrap_or(QpState::Err));
        }
        Ok(())
    }

    pub(crate) fn to_init(&self, access: Access) -> Result<(), Error> {
        let mask = QpAttrMask::STATE
            | QpAttrMask::PKEY_INDEX
            | QpAttrMask::PORT
            | QpAttrMask::ACCESS_FLAGS;
        let attr = QpAttr {
            state: QpState::Init as u32,
            access: access.bits(),
            port_num: 1,
            ..QpAttr::EMPTY
        };
        self.modify(&attr, mask)
    }

    pub(crate) fn to_rtr(&self, p: &RtrParams) -> Result<(), Error> {
        let mask = QpAttrMask::STATE
            | QpAttrMask::AV
            | QpAttrMask::PATH_MTU
            | QpAttrMask::DEST_QPN
            | QpAttrMask::RQ_PSN
            | QpAttrMask::MAX_DEST_RD_ATOMIC
            | QpAttrMask::MIN_RNR_TIMER;
        let attr = QpAttr {
            state: QpState::Rtr as u32,
            dest_gid: p.dest_gid.0,
            dest_qp_num: p.dest_qpn,
            rq_psn: p.rq_psn,
            path_mtu: p.path_mtu,
            max_dest_rd_atomic: p.max_dest_rd_atomic,
            min_rnr_timer: p.min_rnr_timer,
            hop_limit: 64,
            ..QpAttr::EMPTY
        };
        self.modify(&attr, mask)
    }

    pub(crate) fn to_rts(&self, p: &RtsParams) -> Result<(), Error> {
        let mask = QpAttrMask::STATE
            | QpAttrMask::SQ_PSN
            | QpAttrMask::TIMEOUT
            | QpAttrMask::RETRY_CNT
            | QpAttrMask::RNR_RETRY
            | QpAttrMask::MAX_QP_RD_ATOMIC;
        let attr = QpAttr {
            state: QpState::Rts as u32,
            sq_psn: p.sq_psn,
            max_rd_atomic: p.max_rd_atomic,
            timeout: p.timeout,
            retry_cnt: p.retry_cnt,
            rnr_retry: p.rnr_retry,
            ..QpAttr::EMPTY
        };
        self.modify(&attr, mask)
    }
}

/// A queue pair of a reliable connection. One thread posts; its completion queues may be polled by others. It
/// keeps its protection domain and completion queues alive, and is destroyed when dropped.
pub struct QueuePair {
    control: Arc<QpControl>,
    shared: Arc<QpShared>,
    window: WindowRef,
    sq: SendRing<DmaBuf>,
    rq: RecvRing<DmaBuf>,
    /// Slots known to be free again; looked up anew when the ring seems full.
    sq_freed: u32,
    rq_freed: u32,
    max_send_sge: usize,
    max_recv_sge: usize,
    max_inline: usize,
    qpn: u32,
    doorbell: u32,
    destroyed: bool,
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair")
            .field("qpn", &self.qpn)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// The SGE that small payload goes to: the first of any length.
#[inline]
fn first_of(sges: &[Sge]) -> Sge {
    sges.iter()
        .find(|s| s.len != 0)
        .copied()
        .unwrap_or_default()
}

fn ring_slots(what: &'static str, asked: u32, per: u32, least: u32) -> Result<u32, Error> {
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

fn at_most(what: &'static str, asked: u32, max: usize) -> Result<usize, Error> {
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
    /// Makes a queue pair (`ibv_create_qp`, RC), in the RESET state.
    ///
    /// # Errors
    /// [`Error::BadSize`] for what no ring can hold, [`Error::OutOfMemory`], [`Error::InUse`] for CQs of another
    /// context, and as any control verb.
    pub fn create_qp(
        &self,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        caps: &QpCaps,
    ) -> Result<QueuePair, Error> {
        let context = &self.inner.context;
        let max_send_sge = at_most("SGEs of a send", caps.max_send_sge, MAX_SEND_SGE)?;
        let max_recv_sge = at_most("SGEs of a receive", caps.max_recv_sge, MAX_RECV_SGE)?;
        let max_inline = at_most("inline bytes of a send", caps.max_inline_data, MAX_INLINE)?;
        let per_send = SendHead::slots_for(max_send_sge, max_inline, false) as u32;
        let sq_slots = ring_slots(
            "send work requests",
            caps.max_send_wr,
            per_send,
            MIN_SEND_RING,
        )?;
        let rq_slots = ring_slots("receive work requests", caps.max_recv_wr, 1, 1)?;
        let fits = |stride: &u32| (*stride as usize - 16) / 16 >= max_recv_sge;
        let rq_stride = RECV_STRIDES
            .into_iter()
            .find(fits)
            .unwrap_or(RECV_STRIDES[3]);

        let platform = context.platform();
        let sq_len = sq_slots as usize * SLOT_LEN;
        let rq_len = rq_slots as usize * rq_stride as usize;
        let sq_mem = DmaBuf::new(platform, sq_len, SLOT_LEN)?;
        let rq_mem = DmaBuf::new(platform, rq_len, SLOT_LEN)?;
        let request = CreateQp {
            pd: self.inner.handle,
            qp_type: QpType::Rc as u32,
            send_cq: send_cq.inner.handle,
            recv_cq: recv_cq.inner.handle,
            srq: u32::MAX,
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
        let shared = Arc::new(QpShared::new(reply.qpn, index, sq_slots, rq_slots));
        send_cq.inner.attach(Arc::clone(&shared));
        if !Arc::ptr_eq(&send_cq.inner, &recv_cq.inner) {
            recv_cq.inner.attach(Arc::clone(&shared));
        }
        let control = QpControl {
            context: Arc::clone(context),
            handle: reply.handle,
            shared: Arc::clone(&shared),
            _pd: Arc::clone(&self.inner),
            _send_cq: Arc::clone(&send_cq.inner),
            _recv_cq: Arc::clone(&recv_cq.inner),
        };
        Ok(QueuePair {
            control: Arc::new(control),
            shared,
            window: context.window.clone(),
            sq,
            rq,
            sq_freed: 0,
            rq_freed: 0,
            max_send_sge,
            max_recv_sge,
            max_inline,
            qpn: reply.qpn,
            doorbell: u32::from(index),
            destroyed: false,
        })
    }
}

impl QueuePair {
    /// Its number, which a peer needs.
    #[inline]
    #[must_use]
    pub const fn qpn(&self) -> u32 {
        self.qpn
    }

    /// Its index in completions ([`crate::WorkCompletion::qp_index`]) and events.
    #[inline]
    #[must_use]
    pub const fn index(&self) -> u16 {
        self.doorbell as u16
    }

    /// Its state as far as is known here: what was last asked for, or the error state once a completion told so.
    #[must_use]
    pub fn state(&self) -> QpState {
        if self.shared.errored.load(Ordering::Relaxed) {
            QpState::Err
        } else {
            self.shared.state()
        }
    }

    pub(crate) const fn control(&self) -> &Arc<QpControl> {
        &self.control
    }

    /// Posts a send work request (`ibv_post_send`) and rings the doorbell.
    ///
    /// # Errors
    /// [`PostError`]; nothing is posted then.
    #[inline]
    pub fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        self.push_send(wr)?;
        self.ring();
        Ok(())
    }

    /// Posts send work requests in order, with one doorbell for all.
    ///
    /// # Errors
    /// The first that cannot be posted, and how many were before it.
    #[inline]
    pub fn post_send_list(&mut self, list: &[SendWr<'_>]) -> Result<(), PostListError> {
        for (posted, wr) in list.iter().enumerate() {
            if let Err(error) = self.push_send(wr) {
                if posted > 0 {
                    self.ring();
                }
                return Err(PostListError { posted, error });
            }
        }
        if !list.is_empty() {
            self.ring();
        }
        Ok(())
    }

    /// Posts a receive (`ibv_post_recv`).
    ///
    /// # Errors
    /// [`PostError`]; nothing is posted then.
    #[inline]
    pub fn post_recv(&mut self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        self.push_recv(wr)?;
        self.ring_if_failed();
        Ok(())
    }

    /// Posts receives in order.
    ///
    /// # Errors
    /// The first that cannot be posted, and how many were before it.
    #[inline]
    pub fn post_recv_list(&mut self, list: &[RecvWr<'_>]) -> Result<(), PostListError> {
        for (posted, wr) in list.iter().enumerate() {
            if let Err(error) = self.push_recv(wr) {
                self.ring_if_failed();
                return Err(PostListError { posted, error });
            }
        }
        self.ring_if_failed();
        Ok(())
    }

    /// Free slots of the send ring. A work request takes one, and more with over one SGE or 24 inline bytes.
    #[must_use]
    pub fn send_room(&mut self) -> u32 {
        self.sq_freed = self.shared.sq_freed();
        self.sq.room(self.sq_freed)
    }

    /// Receives that can be posted now.
    #[must_use]
    pub fn recv_room(&mut self) -> u32 {
        self.rq_freed = self.shared.rq_freed();
        self.rq.room(self.rq_freed)
    }

    #[inline]
    fn ring(&self) {
        if self.window.doorbells.ring(self.doorbell) == Ring::Kick {
            self.window.platform().kick(KICK_DATA);
        }
    }

    /// Receives ring no doorbell: a device looks for one when a message comes. Only to flush them it must know.
    #[inline]
    fn ring_if_failed(&self) {
        if self.shared.errored.load(Ordering::Relaxed) || self.shared.state() == QpState::Err {
            self.ring();
        }
    }

    #[inline]
    fn push_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        // RTR may not send, and Reset and Init even less (IBA 1.4, 10.3.1); in the error state it flushes.
        if !matches!(
            self.shared.state(),
            QpState::Rts | QpState::Sqd | QpState::Sqe | QpState::Err
        ) {
            return Err(PostError::BadState);
        }
        let (body, first) = match (&wr.op, wr.payload) {
            (SendOp::CmpSwp { compare, swap, .. }, Payload::Sges([sge])) => (
                Body::Atomic {
                    sge: *sge,
                    operand: *swap,
                    compare: Some(*compare),
                },
                *sge,
            ),
            (SendOp::FetchAdd { add, .. }, Payload::Sges([sge])) => (
                Body::Atomic {
                    sge: *sge,
                    operand: *add,
                    compare: None,
                },
                *sge,
            ),
            (SendOp::CmpSwp { .. } | SendOp::FetchAdd { .. }, _) => {
                return Err(PostError::BadPayload);
            }
            (SendOp::LocalInv(_), Payload::Sges([])) => (Body::None, Sge::default()),
            (SendOp::LocalInv(_), _) => return Err(PostError::BadPayload),
            (op, Payload::Sges(sges)) => {
                if sges.len() > self.max_send_sge {
                    return Err(PostError::TooManySges);
                }
                let first = match (op, sges) {
                    (SendOp::Read(_), sges) => first_of(sges),
                    _ => Sge::default(),
                };
                (Body::Sges(sges), first)
            }
            (SendOp::Read(_), _) => return Err(PostError::BadPayload),
            (_, Payload::Inline(bytes)) => (self.inline(bytes)?, Sge::default()),
            (_, Payload::InlineParts(parts)) => return self.push_parts(wr, parts),
        };
        let slots = body.slots();
        if self.sq.room(self.sq_freed) < slots && self.send_room() < slots {
            return Err(PostError::QueueFull);
        }
        let remote = wr.op.remote();
        let inline = if matches!(body, Body::Inline(_)) {
            flags::INLINE
        } else {
            0
        };
        let head = SendHead {
            opcode: wr.op.opcode() as u8,
            flags: wr.flags.bits() | inline,
            num_sge: 0,
            slots: 0,
            imm: wr.op.imm(),
            wr_id: wr.wr_id,
            remote_addr: remote.addr,
            rkey: remote.rkey,
            inline_len: 0,
        };
        // Before the device can complete it.
        self.shared.sq_slot(self.sq.next()).set(first, slots);
        self.sq.push(head, body);
        Ok(())
    }

    #[inline(never)]
    fn push_parts(&mut self, wr: &SendWr<'_>, parts: &[&[u8]]) -> Result<(), PostError> {
        let mut bytes = [0; MAX_INLINE];
        let mut len = 0usize;
        for part in parts {
            let end = len.saturating_add(part.len());
            bytes
                .get_mut(len..end)
                .ok_or(PostError::InlineTooLong)?
                .copy_from_slice(part);
            len = end;
        }
        self.push_send(&SendWr {
            payload: Payload::Inline(&bytes[..len]),
            ..*wr
        })
    }

    #[inline]
    fn inline<'a>(&self, bytes: &'a [u8]) -> Result<Body<'a>, PostError> {
        if bytes.len() > self.max_inline {
            Err(PostError::InlineTooLong)
        } else {
            Ok(Body::Inline(bytes))
        }
    }

    #[inline]
    fn push_recv(&mut self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        if self.shared.state() == QpState::Reset {
            return Err(PostError::BadState);
        }
        if wr.sges.len() > self.max_recv_sge {
            return Err(PostError::TooManySges);
        }
        if self.rq.room(self.rq_freed) == 0 && self.recv_room() == 0 {
            return Err(PostError::QueueFull);
        }
        let first = first_of(wr.sges);
        self.shared.rq_slot(self.rq.next()).set(first, 1);
        self.rq.push(wr.wr_id, wr.sges);
        Ok(())
    }

    /// Moves it through its states (`ibv_modify_qp`). `attr` counts where `mask` names it. To RESET empties both
    /// queues; poll the completion queues empty before posting again.
    ///
    /// # Errors
    /// As any control verb: EINVAL with a reason for a transition that does not exist, lacks attributes or has too
    /// many.
    pub fn modify(&mut self, attr: &QpAttr, mask: QpAttrMask) -> Result<(), Error> {
        self.control.modify(attr, mask)?;
        if mask.contains(QpAttrMask::STATE) && attr.state == QpState::Reset as u32 {
            self.sq.reset();
            self.rq.reset();
            (self.sq_freed, self.rq_freed) = (0, 0);
            self.shared.reset();
        }
        Ok(())
    }

    /// RESET → INIT; `access` is what peers may do. Receives may be posted from here on.
    ///
    /// # Errors
    /// As [`modify`](Self::modify).
    pub fn to_init(&mut self, access: Access) -> Result<(), Error> {
        self.control.to_init(access)
    }

    /// INIT → RTR: hears the peer from here on.
    ///
    /// # Errors
    /// As [`modify`](Self::modify).
    pub fn to_rtr(&mut self, params: &RtrParams) -> Result<(), Error> {
        self.control.to_rtr(params)
    }

    /// RTR → RTS: may send from here on.
    ///
    /// # Errors
    /// As [`modify`](Self::modify).
    pub fn to_rts(&mut self, params: &RtsParams) -> Result<(), Error> {
        self.control.to_rts(params)
    }

    /// To the error state: everything posted completes as flushed.
    ///
    /// # Errors
    /// As [`modify`](Self::modify).
    pub fn to_err(&mut self) -> Result<(), Error> {
        self.modify(
            &QpAttr {
                state: QpState::Err as u32,
                ..QpAttr::EMPTY
            },
            QpAttrMask::STATE,
        )
    }

    /// Back to RESET: both queues are emptied without completions. Poll the completion queues empty before posting
    /// again.
    ///
    /// # Errors
    /// As [`modify`](Self::modify).
    pub fn to_reset(&mut self) -> Result<(), Error> {
        self.modify(
            &QpAttr {
                state: QpState::Reset as u32,
                ..QpAttr::EMPTY
            },
            QpAttrMask::STATE,
        )
    }

    /// Its attributes and its state as the device sees it (`ibv_query_qp`).
    ///
    /// # Errors
    /// As any control verb.
    pub fn query(&self) -> Result<QpAttr, Error> {
        let attr = self.control.context.call(&QueryQp {
            qp: self.control.handle,
        })?;
        if let Some(state) = QpState::from_u32(attr.state) {
            self.shared.set_state(state);
        }
        Ok(attr)
    }

    fn destroy_once(&mut self) -> Result<(), Error> {
        if core::mem::replace(&mut self.destroyed, true) {
            return Ok(());
        }
        self.shared.dead.store(true, Ordering::Release);
        let context = &self.control.context;
        let done = context.call(&DestroyQp {
            qp: self.control.handle,
        });
        if done.is_err() {
            // The device may still touch the rings, and complete into regions.
            self.sq.memory().retain();
            self.rq.memory().retain();
        }
        done.map(|_| ())
    }

    /// Destroys it and says how that went (`ibv_destroy_qp`). Dropping does the same in silence.
    ///
    /// # Errors
    /// As any control verb.
    pub fn destroy(mut self) -> Result<(), Error> {
        self.destroy_once()
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        let _ = self.destroy_once();
    }
}
