//! Queue pairs: posting work.

mod control;
mod create;

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::Ordering;

use hyv_abi::control::{CounterScope, Counters, QpAttr, QueryCounters};
use hyv_abi::doorbell::Ring;
use hyv_abi::queue::{MAX_INLINE, SendHead, Sge, WrOpcode, flags};
use hyv_abi::types::{Access, QpAttrMask, QpState, QpType};
use hyv_abi::window::KICK_DATA;

use crate::dma::{DmaBuf, WindowRef};
use crate::error::{Error, PostError, PostListError};
use crate::mr::MemoryRegion;
use crate::mw::MemoryWindow;
use crate::ring::{Body, RecvRing, SendRing};
use crate::shadow::QpShared;
use crate::wr::{Payload, RecvWr, SendFlags, SendOp, SendWr};

pub(crate) use control::QpControl;
pub use control::{RtrParams, RtsParams};
pub use create::{QpCaps, QpInitAttr};
pub(crate) use create::{at_most, ring_slots};

/// Which operations a type of queue pair has, as bits of [`SendOp::bit`] (InfiniBand Architecture 1.4, table 47).
const fn allowed(ty: QpType) -> u32 {
    const fn of(op: WrOpcode) -> u32 {
        1 << op as u32
    }
    let both = of(WrOpcode::Send)
        | of(WrOpcode::SendImm)
        | of(WrOpcode::Write)
        | of(WrOpcode::WriteImm)
        | of(WrOpcode::LocalInv)
        | of(WrOpcode::BindMw);
    match ty {
        QpType::Rc => {
            both | of(WrOpcode::Read)
                | of(WrOpcode::CmpSwp)
                | of(WrOpcode::FetchAdd)
                | of(WrOpcode::SendInv)
        }
        QpType::Uc => both,
        QpType::Ud => SendOp::DATAGRAM,
    }
}

/// A queue pair. One thread posts; its completion queues may be polled by others. It keeps its protection domain,
/// completion queues and shared receive queue alive, and is destroyed when dropped.
pub struct QueuePair {
    control: Arc<QpControl>,
    shared: Arc<QpShared>,
    window: WindowRef,
    sq: SendRing<DmaBuf>,
    rq: RecvRing<DmaBuf>,
    /// Slots known to be free again; looked up anew when the ring seems full.
    sq_freed: u32,
    rq_freed: u32,
    /// Operations that its type has.
    allowed: u32,
    /// Receives come from its own ring.
    own_receives: bool,
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
            .field("type", &self.qp_type())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// The SGE that small payload goes to: the first of any length.
#[inline]
pub(crate) fn first_of(sges: &[Sge]) -> Sge {
    sges.iter()
        .find(|s| s.len != 0)
        .copied()
        .unwrap_or_default()
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

    /// Reliable or unreliable connection, or datagrams.
    #[must_use]
    pub fn qp_type(&self) -> QpType {
        self.shared.ty
    }

    /// Its state as far as is known here: what was last asked for, or an error state once a completion told so.
    /// [`query`](Self::query) asks the device.
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

    /// Posts a send work request and leaves its doorbell, and so its fence, to [`Self::ring_doorbell`] (`ibv_wr_complete`). A
    /// device that polls this queue sees the request at once; any other only then, so the call must follow soon.
    ///
    /// # Errors
    /// [`PostError`]; nothing is posted then.
    #[inline]
    pub fn post_send_unrung(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        self.push_send(wr)
    }

    /// Rings the doorbell for everything posted so far.
    #[inline]
    pub fn ring_doorbell(&mut self) {
        self.ring();
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

    /// Begins a batch of sends with one doorbell, and so one fence, for all (`ibv_wr_start`): for those that are not at hand
    /// together as a list.
    #[inline]
    pub const fn batch(&mut self) -> SendBatch<'_> {
        SendBatch {
            qp: self,
            posted: false,
        }
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
        if self.allowed & wr.op.bit() == 0 {
            return Err(PostError::BadOperation);
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
            (SendOp::BindMw(bind), Payload::Sges([])) => (
                Body::Bind {
                    addr: bind.addr,
                    lkey: bind.lkey,
                    len: bind.len,
                },
                Sge::default(),
            ),
            (SendOp::LocalInv(_) | SendOp::BindMw(_), _) => return Err(PostError::BadPayload),
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
        if !self.own_receives {
            return Err(PostError::SharedReceives);
        }
        if wr.sges.len() > self.max_recv_sge {
            return Err(PostError::TooManySges);
        }
        if self.rq.room(self.rq_freed) == 0 && self.recv_room() == 0 {
            return Err(PostError::QueueFull);
        }
        let first = first_of(wr.sges);
        self.shared.rq_slot(self.rq.next()).set(first, 1);
        self.rq.push(wr.wr_id, wr.sges, 0);
        Ok(())
    }

    /// Binds a memory window of type 2 to a piece of a region (`IBV_WR_BIND_MW`): gives the window's new rkey, which works
    /// once the bind has executed, as work posted later to this queue sees it. `len` 0 unbinds. Needs a region with
    /// [`Access::MW_BIND`], and with [`Access::LOCAL_WRITE`] to let peers write.
    ///
    /// # Errors
    /// [`PostError`]; the window keeps its key then. What the device refuses comes as a completion with
    /// [`crate::WcStatus::MwBindErr`].
    pub fn bind_mw(
        &mut self,
        window: &mut MemoryWindow,
        wr_id: u64,
        region: (&MemoryRegion, u64, u64),
        access: Access,
        flags: SendFlags,
    ) -> Result<u32, PostError> {
        let (mr, offset, len) = region;
        let bind = window.bind(mr, offset, len, access);
        self.post_send(&SendWr {
            wr_id,
            op: SendOp::BindMw(bind),
            payload: Payload::Sges(&[]),
            flags,
        })?;
        window.set_rkey(bind.new_rkey);
        Ok(bind.new_rkey)
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

    /// RESET → INIT of a connection; `access` is what peers may do. Receives may be posted from here on.
    ///
    /// # Errors
    /// As [`modify`](Self::modify).
    pub fn to_init(&mut self, access: Access) -> Result<(), Error> {
        self.control.to_init(access)
    }

    /// RESET → INIT of a datagram queue pair: it takes datagrams with this Q_Key, of which the highest bit is kept for
    /// privileged ones.
    ///
    /// # Errors
    /// As [`modify`](Self::modify).
    pub fn to_init_datagram(&mut self, qkey: u32) -> Result<(), Error> {
        self.control.to_init_datagram(qkey)
    }

    /// A datagram queue pair all the way from RESET to RTS.
    ///
    /// # Errors
    /// As [`modify`](Self::modify).
    pub fn ready_datagram(&mut self, qkey: u32, sq_psn: u32) -> Result<(), Error> {
        self.control.ready_datagram(qkey, sq_psn)
    }

    /// INIT → RTR: hears the peer from here on. Of `params` counts what its type has; datagrams take nothing.
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

    /// SQE → RTS: an unreliable queue pair whose sends failed may send again.
    ///
    /// # Errors
    /// As [`modify`](Self::modify).
    pub fn resume_sends(&mut self) -> Result<(), Error> {
        let attr = QpAttr {
            state: QpState::Rts as u32,
            cur_state: QpState::Sqe as u32,
            ..QpAttr::EMPTY
        };
        self.modify(&attr, QpAttrMask::STATE | QpAttrMask::CUR_STATE)
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
        self.control.query()
    }

    /// What it did and what went wrong on its way since it was made.
    ///
    /// # Errors
    /// As any control verb.
    pub fn counters(&self) -> Result<Counters, Error> {
        self.control.context.call(&QueryCounters {
            scope: CounterScope::Qp as u32,
            handle: self.control.handle,
        })
    }

    fn destroy_once(&mut self) -> Result<(), Error> {
        if core::mem::replace(&mut self.destroyed, true) {
            return Ok(());
        }
        let done = self.control.destroy();
        if done.is_err() {
            // The device may still touch the rings, and complete into regions.
            self.sq.memory().retain();
            self.rq.memory().retain();
        }
        done
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

/// Sends that share a doorbell: it rings when this is dropped. A device that polls the queue may execute them before.
#[derive(Debug)]
#[must_use = "it rings the doorbell when dropped"]
pub struct SendBatch<'a> {
    qp: &'a mut QueuePair,
    posted: bool,
}

impl SendBatch<'_> {
    /// Posts one more.
    ///
    /// # Errors
    /// [`PostError`]; it is not posted then, those before it are.
    #[inline]
    pub fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        self.qp.push_send(wr)?;
        self.posted = true;
        Ok(())
    }
}

impl Drop for SendBatch<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.posted {
            self.qp.ring();
        }
    }
}
