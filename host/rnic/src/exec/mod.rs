//! Executes a work request between two QPs of this host, memory to memory: what requester and responder
//! do (InfiniBand Architecture 1.4, sections 9.7 and 9.8), without packets in between.

use hyv_abi::queue::{CQE_DATA, WcOpcode, WcStatus, WrOpcode, cqe_flags, flags};
use hyv_abi::sync::Ordering;
use hyv_abi::types::{Access, QpState, QpType};
use hyv_abi::window::summary;

use self::complete::Arrived;
use self::copy::{copy, copy_inline};
use crate::engine::{Engine, Step};
use crate::limits::MAX_MSG;
use crate::mem::Bytes;
use crate::objects::{User, WaitFor, Wr};
use crate::recv::RecvWr;

pub(crate) mod complete;
mod copy;
pub(crate) mod datagram;
mod window;

/// What a responder finds wrong; decides both sides' statuses (IBA 1.4, table 60 and 61).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Nak {
    InvalidRequest,
    RemoteAccess,
    /// The responder's own receive buffers are at fault.
    RemoteOperational(WcStatus),
    /// A message longer than the receive.
    TooLong,
    /// The key to invalidate is none that this QP's peer may.
    Invalidate,
}

impl Engine {
    /// Executes (or goes on executing) `wr` of the QP at `slot`, which is in RTS. All that came before it in its queue is
    /// done, so a fence has nothing to wait for.
    #[inline]
    pub(crate) fn execute(&mut self, slot: usize, wr: &mut Wr) -> Step {
        let Some(op) = WrOpcode::from_u8(wr.head.opcode) else {
            return self.complete_error(slot, wr, WcStatus::LocQpOpErr);
        };
        let ty = self.qp(slot).ty;
        if ty == QpType::Ud {
            return self.send_datagram(slot, wr, op);
        }
        if ty == QpType::Uc && !unreliable(op) {
            return self.complete_error(slot, wr, WcStatus::LocQpOpErr);
        }
        if matches!(op, WrOpcode::LocalInv | WrOpcode::BindMw) {
            return self.local_operation(slot, wr, op);
        }
        let peer = {
            let qp = self.qp(slot);
            match self.find_qpn(qp.attr.dest_qp_num) {
                Some(p)
                    if self.qp(p).attr.dest_qp_num == qp.qpn
                        && self.qp(p).ty == ty
                        && self.qp(p).wire.is_none()
                        && receives(self.qp(p).state) =>
                {
                    p
                }
                _ => return self.no_peer(slot, wr),
            }
        };
        if self.qp(peer).state == QpState::Rtr {
            self.established(peer);
        }
        match op {
            WrOpcode::Send | WrOpcode::SendImm | WrOpcode::SendInv => self.send(slot, peer, wr, op),
            WrOpcode::Write | WrOpcode::WriteImm => self.write(slot, peer, wr, op),
            WrOpcode::Read => self.read(slot, peer, wr),
            WrOpcode::CmpSwp | WrOpcode::FetchAdd => self.atomic(slot, peer, wr, op),
            WrOpcode::LocalInv | WrOpcode::BindMw => {
                self.complete_error(slot, wr, WcStatus::LocQpOpErr)
            }
        }
    }

    /// Nobody answers: a reliable connection tries again, an unreliable one does not even know.
    #[cold]
    fn no_peer(&mut self, slot: usize, wr: &mut Wr) -> Step {
        match self.qp(slot).ty {
            QpType::Rc => Step::Wait(WaitFor::Peer),
            _ => self.lost(slot, wr),
        }
    }

    /// The peer has no receive posted.
    #[cold]
    fn no_receive(&mut self, slot: usize, wr: &mut Wr) -> Step {
        match self.qp(slot).ty {
            QpType::Rc => Step::Wait(WaitFor::Receive),
            _ => self.lost(slot, wr),
        }
    }

    /// A message of an unreliable service that nobody takes: for its sender it is done, if only its own side is right.
    #[cold]
    fn lost(&mut self, slot: usize, wr: &mut Wr) -> Step {
        match self.open_local(slot, wr, Access::empty()) {
            Ok(total) => {
                self.complete_ok(slot, wr, None);
                Step::Done(total)
            }
            Err(status) => self.complete_error(slot, wr, status),
        }
    }

    /// A message reached a QP that may not send yet: the first one is worth an event.
    #[cold]
    pub(crate) fn established(&mut self, slot: usize) {
        let qp = self.qp_mut(slot);
        if !std::mem::replace(&mut qp.established, true) {
            self.raise(slot, summary::QP_COMM_ESTABLISHED);
        }
    }

    fn send(&mut self, slot: usize, peer: usize, wr: &mut Wr, op: WrOpcode) -> Step {
        let total = match self.open_local(slot, wr, Access::empty()) {
            Ok(n) => n,
            Err(status) => return self.complete_error(slot, wr, status),
        };
        let fresh = wr.done == 0;
        let Some(recv) = self.take_recv(peer) else {
            return self.no_receive(slot, wr);
        };
        if total as usize <= CQE_DATA && fresh {
            let first = recv.sges().first().copied().unwrap_or_default();
            if u64::from(first.len) >= total {
                // Small enough for the completion: the receiver's library scatters it. The key is checked all the same.
                let ok = total == 0
                    || self
                        .user(self.qp(peer).user)
                        .open(recv.pd, first.lkey, first.addr, total, Access::LOCAL_WRITE)
                        .is_some();
                if !ok {
                    let nak = Nak::RemoteOperational(WcStatus::LocProtErr);
                    return self.nak(slot, peer, wr, Some(recv), nak);
                }
                let data = self.small(wr, total);
                return self.deliver(slot, peer, wr, op, recv, total, Some(data));
            }
        }
        let room = match self.open_recv(peer, &recv) {
            Ok(n) => n,
            Err(status) => {
                return self.nak(slot, peer, wr, Some(recv), Nak::RemoteOperational(status));
            }
        };
        if room < total {
            return self.nak(slot, peer, wr, Some(recv), Nak::TooLong);
        }
        let moved = if wr.head.flags & flags::INLINE != 0 {
            copy_inline(&wr.data, &self.dst, total)
        } else {
            copy(&self.src, &self.dst, wr.done, total)
        };
        wr.done += moved;
        if wr.done < total {
            self.qp_mut(peer).receiving = Some(recv);
            return Step::More(moved);
        }
        self.deliver(slot, peer, wr, op, recv, moved, None)
    }

    /// The payload of a message whose source is open, and that fits a completion.
    #[inline(always)]
    fn small(&self, wr: &Wr, total: u64) -> [u64; 4] {
        if wr.head.flags & flags::INLINE != 0 {
            let shown = |k: u64| match total.saturating_sub(8 * k) {
                0 => 0,
                n @ 1..8 => wr.data[k as usize] & !(u64::MAX << (8 * n)),
                _ => wr.data[k as usize],
            };
            return [shown(0), shown(1), shown(2), shown(3)];
        }
        match self.src[..] {
            [one] => one.first_words(),
            _ => {
                let (mut data, mut at) = ([0; 4], 0);
                for piece in &self.src {
                    piece.gather(&mut data, at);
                    at += piece.len() as usize;
                }
                data
            }
        }
    }

    /// The end of a SEND or WRITE with immediate: completions on both sides.
    #[inline(always)]
    #[allow(
        clippy::too_many_arguments,
        reason = "one call per field of two completions"
    )]
    fn deliver(
        &mut self,
        slot: usize,
        peer: usize,
        wr: &mut Wr,
        op: WrOpcode,
        recv: Box<RecvWr>,
        moved: u64,
        data: Option<[u64; 4]>,
    ) -> Step {
        let (mut flags, imm) = match op {
            WrOpcode::SendImm | WrOpcode::WriteImm => (cqe_flags::WITH_IMM, wr.head.imm),
            WrOpcode::SendInv => {
                if !self.invalidate(peer, wr.head.imm) {
                    return self.nak(slot, peer, wr, Some(recv), Nak::Invalidate);
                }
                (cqe_flags::WITH_INV, wr.head.imm)
            }
            _ => (0, 0),
        };
        if data.is_some() {
            flags |= cqe_flags::DATA;
        }
        let arrived = Arrived {
            status: WcStatus::Success,
            opcode: if op == WrOpcode::WriteImm {
                WcOpcode::RecvRdmaWithImm
            } else {
                WcOpcode::Recv
            },
            flags,
            byte_len: wr.total as u32,
            imm,
            data: data.unwrap_or_default(),
        };
        self.complete_recv(peer, recv, &arrived, wr.head.flags & flags::SOLICITED != 0);
        self.complete_ok(slot, wr, None);
        Step::Done(moved)
    }

    fn write(&mut self, slot: usize, peer: usize, wr: &mut Wr, op: WrOpcode) -> Step {
        let total = match self.open_local(slot, wr, Access::empty()) {
            Ok(n) => n,
            Err(status) => return self.complete_error(slot, wr, status),
        };
        if !self.enabled(peer, Access::REMOTE_WRITE) {
            return self.nak(slot, peer, wr, None, Nak::InvalidRequest);
        }
        let with_imm = op == WrOpcode::WriteImm;
        if with_imm && !self.has_recv(peer) {
            return self.no_receive(slot, wr);
        }
        let Some(dst) = self.open_remote(peer, wr, total, Access::REMOTE_WRITE) else {
            return self.nak(slot, peer, wr, None, Nak::RemoteAccess);
        };
        let dst = std::slice::from_ref(&dst);
        let moved = if wr.head.flags & flags::INLINE != 0 {
            copy_inline(&wr.data, dst, total)
        } else {
            copy(&self.src, dst, wr.done, total)
        };
        wr.done += moved;
        if wr.done < total {
            return Step::More(moved);
        }
        if with_imm {
            // Another QP may have taken the last one of an SRQ since the first slice.
            let Some(recv) = self.take_recv(peer) else {
                return self.no_receive(slot, wr);
            };
            return self.deliver(slot, peer, wr, op, recv, moved, None);
        }
        self.complete_ok(slot, wr, None);
        Step::Done(moved)
    }

    fn read(&mut self, slot: usize, peer: usize, wr: &mut Wr) -> Step {
        if wr.head.flags & flags::INLINE != 0 || self.qp(slot).attr.max_rd_atomic == 0 {
            return self.complete_error(slot, wr, WcStatus::LocQpOpErr);
        }
        let total = match self.open_local(slot, wr, Access::LOCAL_WRITE) {
            Ok(n) => n,
            Err(status) => return self.complete_error(slot, wr, status),
        };
        if !self.enabled(peer, Access::REMOTE_READ) || self.qp(peer).attr.max_dest_rd_atomic == 0 {
            return self.nak(slot, peer, wr, None, Nak::InvalidRequest);
        }
        let Some(src) = self.open_remote(peer, wr, total, Access::REMOTE_READ) else {
            return self.nak(slot, peer, wr, None, Nak::RemoteAccess);
        };
        if total as usize <= CQE_DATA && self.src.len() == 1 && self.signaled(slot, wr) {
            self.complete_ok(slot, wr, Some(src.first_words()));
            return Step::Done(total);
        }
        // The local pieces were opened as a source list; here they are the destination.
        let moved = copy(std::slice::from_ref(&src), &self.src, wr.done, total);
        wr.done += moved;
        if wr.done < total {
            return Step::More(moved);
        }
        self.complete_ok(slot, wr, None);
        Step::Done(moved)
    }

    fn atomic(&mut self, slot: usize, peer: usize, wr: &mut Wr, op: WrOpcode) -> Step {
        let bad = wr.head.flags & flags::INLINE != 0
            || wr.head.num_sge != 1
            || wr.sge(0).len != 8
            || self.qp(slot).attr.max_rd_atomic == 0
            || (op == WrOpcode::CmpSwp && wr.head.slots < 2);
        if bad {
            return self.complete_error(slot, wr, WcStatus::LocQpOpErr);
        }
        if let Err(status) = self.open_local(slot, wr, Access::LOCAL_WRITE) {
            return self.complete_error(slot, wr, status);
        }
        if !wr.head.remote_addr.is_multiple_of(8)
            || !self.enabled(peer, Access::REMOTE_ATOMIC)
            || self.qp(peer).attr.max_dest_rd_atomic == 0
        {
            return self.nak(slot, peer, wr, None, Nak::InvalidRequest);
        }
        let Some(target) = self.open_remote(peer, wr, 8, Access::REMOTE_ATOMIC) else {
            return self.nak(slot, peer, wr, None, Nak::RemoteAccess);
        };
        let Some(word) = target.atomic() else {
            return self.nak(slot, peer, wr, None, Nak::InvalidRequest);
        };
        let operand = wr.data[2];
        let before = if op == WrOpcode::FetchAdd {
            word.fetch_add(operand, Ordering::SeqCst)
        } else {
            match word.compare_exchange(wr.data[3], operand, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(v) | Err(v) => v,
            }
        };
        Bytes::own(&before.to_ne_bytes()).copy_to(&self.src[0]);
        self.complete_ok(slot, wr, None);
        Step::Done(8)
    }

    /// Opens the local side into `self.src`; gives the message's length.
    #[inline]
    pub(crate) fn open_local(
        &mut self,
        slot: usize,
        wr: &mut Wr,
        need: Access,
    ) -> Result<u64, WcStatus> {
        self.src.clear();
        let mut total = 0u64;
        if wr.head.flags & flags::INLINE != 0 {
            total = u64::from(wr.head.inline_len);
            self.src.push(Bytes::words(&wr.data, total));
        } else {
            let qp = self.qps[slot].as_ref().ok_or(WcStatus::FatalErr)?;
            let user: &User = self.users[qp.user].as_ref().ok_or(WcStatus::FatalErr)?;
            for i in 0..usize::from(wr.head.num_sge) {
                let sge = wr.sge(i);
                if sge.len == 0 {
                    continue;
                }
                let len = u64::from(sge.len);
                self.src.push(
                    user.open(qp.pd, sge.lkey, sge.addr, len, need)
                        .ok_or(WcStatus::LocProtErr)?,
                );
                total += len;
            }
            if total > u64::from(MAX_MSG) {
                return Err(WcStatus::LocLenErr);
            }
        }
        wr.total = total;
        Ok(total)
    }

    /// Opens a receive's pieces into `self.dst`; gives their room.
    fn open_recv(&mut self, peer: usize, recv: &RecvWr) -> Result<u64, WcStatus> {
        self.dst.clear();
        let mut room = 0u64;
        let qp = self.qps[peer].as_ref().ok_or(WcStatus::FatalErr)?;
        let user = self.users[qp.user].as_ref().ok_or(WcStatus::FatalErr)?;
        for sge in recv.sges() {
            if sge.len == 0 {
                continue;
            }
            let len = u64::from(sge.len);
            let piece = user.open(recv.pd, sge.lkey, sge.addr, len, Access::LOCAL_WRITE);
            self.dst.push(piece.ok_or(WcStatus::LocProtErr)?);
            room += len;
        }
        Ok(room)
    }

    /// Whether the peer's QP was set up for this kind of request; to one that was not it is an unsupported
    /// opcode (IBA 1.4, table 60), and comes before any look at the key.
    #[inline]
    pub(crate) fn enabled(&self, peer: usize, need: Access) -> bool {
        self.qp(peer).attr.access & need.bits() != 0
    }

    /// Opens the remote side, if the peer's region allows it. A request of no bytes opens nothing and is
    /// not checked (IBA 1.4, C9-88).
    #[inline]
    fn open_remote(&self, peer: usize, wr: &Wr, len: u64, need: Access) -> Option<Bytes> {
        let p = self.qp(peer);
        if len == 0 {
            return Some(Bytes::EMPTY);
        }
        let (key, addr) = (wr.head.rkey, wr.head.remote_addr);
        self.user(p.user)
            .open_remote(p.pd, p.handle, key, addr, len, need)
    }

    /// The responder refuses: both sides learn it.
    #[cold]
    fn nak(
        &mut self,
        slot: usize,
        peer: usize,
        wr: &mut Wr,
        recv: Option<Box<RecvWr>>,
        nak: Nak,
    ) -> Step {
        if self.qp(slot).ty == QpType::Uc {
            return self.drop_message(slot, peer, wr, recv, nak);
        }
        let (mine, theirs, event) = match nak {
            Nak::InvalidRequest => (WcStatus::RemInvReqErr, None, summary::QP_REQUEST_ERROR),
            Nak::RemoteAccess => (WcStatus::RemAccessErr, None, summary::QP_ACCESS_ERROR),
            Nak::TooLong => (
                WcStatus::RemInvReqErr,
                Some(WcStatus::LocLenErr),
                summary::QP_REQUEST_ERROR,
            ),
            Nak::Invalidate => (
                WcStatus::RemAccessErr,
                Some(WcStatus::RemInvReqErr),
                summary::QP_ACCESS_ERROR,
            ),
            Nak::RemoteOperational(s) => (WcStatus::RemOpErr, Some(s), summary::QP_FATAL),
        };
        if let (Some(recv), Some(status)) = (recv, theirs) {
            self.fail_recv(peer, recv, status);
        }
        if peer != slot {
            self.fail(peer, event);
        }
        self.complete_error(slot, wr, mine)
    }

    /// A responder without acknowledgements refuses: it drops the message, and keeps the receive for the next one unless
    /// that is at fault itself.
    #[cold]
    fn drop_message(
        &mut self,
        slot: usize,
        peer: usize,
        wr: &mut Wr,
        recv: Option<Box<RecvWr>>,
        nak: Nak,
    ) -> Step {
        match (recv, nak) {
            (Some(recv), Nak::RemoteOperational(status)) => {
                self.fail_recv(peer, recv, status);
                self.doomed.push(peer);
            }
            (Some(recv), _) => self.qp_mut(peer).receiving = Some(recv),
            (None, _) => {}
        }
        self.qp_mut(peer).counters.drops_receive += 1;
        self.lost(slot, wr)
    }
}

/// What unreliable connections can do (IBA 1.4, table 37).
fn unreliable(op: WrOpcode) -> bool {
    matches!(
        op,
        WrOpcode::Send
            | WrOpcode::SendImm
            | WrOpcode::Write
            | WrOpcode::WriteImm
            | WrOpcode::LocalInv
            | WrOpcode::BindMw
    )
}

/// Whether a QP in that state takes messages (IBA 1.4, 10.3.1).
pub(crate) fn receives(state: QpState) -> bool {
    matches!(
        state,
        QpState::Rtr | QpState::Rts | QpState::Sqd | QpState::Sqe
    )
}
