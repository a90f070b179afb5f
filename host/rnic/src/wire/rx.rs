//! Packets that arrive: checked, given to their QP, and into users' memory.

use hyv_abi::queue::{CQE_DATA, Sge, WcOpcode, WcStatus, cqe_flags};
use hyv_abi::sync::Ordering;
use hyv_abi::types::{Access, QpState, QpType};
use hyv_abi::window::summary;
use hyv_roce::carrier::Arrival;
use hyv_roce::transport::{
    Check, Effect, Go, Psn, Remote, Reply, Request, RequestOp, UnreliableCheck,
};
use hyv_roce::wire::{Extension, NakCode, Operation, Packet, Repr, Service, Suffix, Syndrome, bth};

use super::qp::Receiver;
use super::{End, Wire, WireQp, scatter};
use crate::engine::Engine;
use crate::exec::complete::Arrived;
use crate::exec::receives;
use crate::limits::ACK_DELAY_NS;
use crate::mem::Bytes;
use crate::recv::RecvWr;

/// Why a request's packet is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Refusal {
    /// No receive is posted.
    NotReady,
    /// The request is at fault.
    Nak(NakCode),
    /// A message longer than its receive.
    TooLong,
    /// The receive is at fault.
    Receive(WcStatus),
    /// The key to invalidate is none that this QP's peer may.
    Invalidate,
}

impl Engine {
    /// Takes one packet in.
    pub(super) fn arrival(&mut self, w: &mut Wire, a: &Arrival<'_>) {
        let Ok(packet) = Packet::new_checked(a.payload) else {
            w.counters.drops_malformed += 1;
            return;
        };
        if !check_icrc(w, a) {
            w.counters.icrc_errors += 1;
            return;
        }
        let Ok(repr) = packet.repr() else {
            w.counters.drops_malformed += 1;
            return;
        };
        let qpn = repr.bth.dest_qpn;
        if qpn == 1 {
            w.take_mad(a, &repr, packet.payload());
            return;
        }
        let Some(slot) = self.find_qpn(qpn) else {
            w.counters.drops_no_qp += 1;
            return;
        };
        let qp = self.qps[slot].as_mut().expect("just found");
        let service = match qp.ty {
            QpType::Rc => Service::Rc,
            QpType::Uc => Service::Uc,
            QpType::Ud => Service::Ud,
        };
        let info = repr.bth.opcode.info();
        if info.service != service || !receives(qp.state) {
            qp.counters.drops_state += 1;
            return;
        }
        // Full and limited members of the default partition (IBA 1.4, 10.9.3).
        if repr.bth.pkey & 0x7fff != bth::DEFAULT_PKEY & 0x7fff {
            qp.counters.drops_pkey += 1;
            return;
        }
        if service == Service::Ud {
            qp.counters.rx_packets += 1;
            qp.counters.rx_bytes += a.payload.len() as u64;
            self.datagram(slot, a, &repr, packet.payload());
            return;
        }
        let state = qp.state;
        let Some(mut q) = qp.wire.take() else {
            qp.counters.drops_source += 1;
            return;
        };
        if a.src != q.flow.dst {
            qp.counters.drops_source += 1;
            qp.wire = Some(q);
            return;
        }
        qp.counters.rx_packets += 1;
        qp.counters.rx_bytes += a.payload.len() as u64;
        let reply = matches!(
            info.operation,
            Operation::Acknowledge | Operation::ReadResponse | Operation::AtomicAcknowledge
        );
        let end = if reply {
            self.reply(w, slot, &mut q, &repr, packet.payload())
        } else {
            if state == QpState::Rtr {
                self.established(slot);
            }
            self.request(slot, &mut q, &repr, packet.payload());
            // The user that got it may answer at once: then both go together.
            let delivered = matches!(info.operation, Operation::Send) && info.position.ends();
            match &q.receiver {
                Receiver::Rc(r) if delivered && r.lone_ack().is_some() => {
                    if q.lazy.is_none() {
                        let until = w.now + ACK_DELAY_NS;
                        q.lazy = Some(until);
                        w.lazy.push_back((until, slot));
                    }
                }
                _ => q.lazy = None,
            }
            End::Open
        };
        self.settle(w, slot, &mut q, end.before());
        if !std::mem::replace(&mut q.is_ready, true) {
            w.ready.push(slot);
        }
        self.qp_mut(slot).wire = Some(q);
        if !matches!(end, End::Open) {
            self.end(slot, end);
        }
    }

    /// An answer to what the QP asked.
    fn reply(
        &mut self,
        w: &mut Wire,
        slot: usize,
        q: &mut WireQp,
        repr: &Repr,
        payload: &[u8],
    ) -> End {
        let now = w.now;
        let psn = Psn::new(repr.bth.psn);
        let counters = &mut self.qp_mut(slot).counters;
        let Some(requester) = q.requester.as_mut() else {
            counters.drops_state += 1;
            return End::Open;
        };
        let info = repr.bth.opcode.info();
        let reply = match (info.operation, repr.ext) {
            (Operation::ReadResponse, _) => Reply::ReadData {
                psn,
                position: info.position,
                len: payload.len() as u32,
            },
            (Operation::AtomicAcknowledge, Extension::AethAtomicAck(_, value)) => {
                Reply::AtomicValue { psn, value }
            }
            (_, Extension::Aeth(aeth)) => match aeth.syndrome {
                Syndrome::Ack { .. } => Reply::Ack { psn },
                Syndrome::RnrNak { timer } => Reply::RnrNak { psn, timer },
                Syndrome::Nak(code) => Reply::Nak { psn, code },
                Syndrome::Reserved(_) => {
                    counters.drops_malformed += 1;
                    return End::Open;
                }
            },
            _ => return End::Open,
        };
        let effect = requester.on_reply(&reply, now);
        if effect == Effect::Ghost {
            counters.ghosts += 1;
            return End::Open;
        }
        match reply {
            Reply::RnrNak { .. } => counters.rnr_naks_received += 1,
            Reply::Nak { code, .. } => match code {
                NakCode::PsnSequence => counters.sequence_naks_received += 1,
                NakCode::InvalidRequest => counters.invalid_naks_received += 1,
                NakCode::RemoteAccess => counters.access_naks_received += 1,
                NakCode::RemoteOperational | NakCode::InvalidRd => {
                    counters.operational_naks_received += 1;
                }
            },
            _ => {}
        }
        match effect {
            Effect::Place { index, offset } => self.place(slot, q, index, offset, payload),
            Effect::Atomic { index, value } => self.place(slot, q, index, 0, &value.to_ne_bytes()),
            Effect::Fail { index, status } => End::Failed(index, status),
            Effect::None | Effect::Ghost | Effect::TimedOut => End::Open,
        }
    }

    /// Writes an answer's data to the work request's buffers.
    fn place(
        &mut self,
        slot: usize,
        q: &mut WireQp,
        index: usize,
        offset: u32,
        data: &[u8],
    ) -> End {
        let Some(wr) = q.wrs.get_mut(index) else {
            return End::Open;
        };
        match self.open_local(slot, wr, Access::LOCAL_WRITE) {
            Ok(_) => {
                scatter(data, &self.src, u64::from(offset));
                End::Open
            }
            Err(status) => End::Failed(index, status),
        }
    }

    /// A request from the peer.
    fn request(&mut self, slot: usize, q: &mut WireQp, repr: &Repr, payload: &[u8]) {
        let info = repr.bth.opcode.info();
        let remote = |address, rkey| Remote {
            addr: address,
            rkey,
        };
        let op = match (info.operation, repr.ext) {
            (Operation::Send, _) => RequestOp::Send,
            (Operation::Write, ext) => {
                RequestOp::Write(ext.reth().map(|r| (remote(r.address, r.rkey), r.dma_len)))
            }
            (Operation::ReadRequest, Extension::Reth(r)) => {
                RequestOp::Read(remote(r.address, r.rkey), r.dma_len)
            }
            (_, Extension::Atomic(a)) => RequestOp::Atomic(remote(a.address, a.rkey)),
            _ => {
                self.qp_mut(slot).counters.drops_state += 1;
                return;
            }
        };
        let request = Request {
            psn: Psn::new(repr.bth.psn),
            op,
            position: info.position,
            len: payload.len() as u32,
            ack_req: repr.bth.ack_req,
        };
        let go = match &mut q.receiver {
            Receiver::Rc(r) => match r.check(&request) {
                Check::Go(go) => go,
                Check::Duplicate => {
                    self.qp_mut(slot).counters.duplicates += 1;
                    return;
                }
                Check::Ahead(nak) => {
                    self.qp_mut(slot).counters.sequence_naks_sent += u64::from(nak);
                    return;
                }
                Check::Refused(_) => {
                    q.event = summary::QP_REQUEST_ERROR;
                    self.qp_mut(slot).counters.invalid_naks_sent += 1;
                    return;
                }
                Check::Over => {
                    self.qp_mut(slot).counters.drops_state += 1;
                    return;
                }
            },
            Receiver::Uc(r) => match r.check(&request) {
                UnreliableCheck::Go(go) => go,
                UnreliableCheck::Drop => {
                    self.qp_mut(slot).counters.drops_order += 1;
                    return;
                }
            },
        };
        let served = match go {
            Go::Send { offset } => self.serve_send(slot, repr, offset, payload),
            Go::Write {
                remote,
                offset,
                total,
            } => self.serve_write(slot, repr, remote, offset, total, payload),
            Go::Read { remote, len } => {
                let served = self.serve_read(slot, remote, len);
                if served.is_ok()
                    && let Receiver::Rc(r) = &mut q.receiver
                {
                    r.accept_read(remote, len);
                    return;
                }
                served
            }
            Go::Atomic { remote } => match self.serve_atomic(slot, repr, remote) {
                Ok(value) => {
                    if let Receiver::Rc(r) = &mut q.receiver {
                        r.accept_atomic(value);
                    }
                    return;
                }
                Err(e) => Err(e),
            },
        };
        match (served, &mut q.receiver) {
            (Ok(()), Receiver::Rc(r)) => r.accept(&request),
            (Ok(()), Receiver::Uc(_)) => {}
            (Err(refusal), Receiver::Rc(_)) => self.refuse(slot, q, refusal),
            (Err(Refusal::Receive(status)), Receiver::Uc(r)) => {
                r.give_up();
                if let Some(recv) = self.qp_mut(slot).receiving.take() {
                    self.fail_recv(slot, recv, status);
                }
                self.doomed.push(slot);
            }
            (Err(_), Receiver::Uc(r)) => {
                // What it had taken stays for the next message.
                r.give_up();
                self.qp_mut(slot).counters.drops_receive += 1;
            }
        }
    }

    fn refuse(&mut self, slot: usize, q: &mut WireQp, refusal: Refusal) {
        let timer = self.qp(slot).attr.min_rnr_timer as u8;
        let Receiver::Rc(r) = &mut q.receiver else {
            return;
        };
        let (code, status, event) = match refusal {
            Refusal::NotReady => {
                r.not_ready(timer);
                return;
            }
            Refusal::Nak(NakCode::RemoteAccess) => {
                (NakCode::RemoteAccess, None, summary::QP_ACCESS_ERROR)
            }
            Refusal::Nak(code) => (code, None, summary::QP_REQUEST_ERROR),
            Refusal::TooLong => (
                NakCode::InvalidRequest,
                Some(WcStatus::LocLenErr),
                summary::QP_REQUEST_ERROR,
            ),
            Refusal::Invalidate => (
                NakCode::RemoteAccess,
                Some(WcStatus::RemInvReqErr),
                summary::QP_ACCESS_ERROR,
            ),
            Refusal::Receive(status) => {
                (NakCode::RemoteOperational, Some(status), summary::QP_FATAL)
            }
        };
        r.refuse(code);
        q.event = event;
        if let Some(status) = status
            && let Some(recv) = self.qp_mut(slot).receiving.take()
        {
            self.fail_recv(slot, recv, status);
        }
        let counters = &mut self.qp_mut(slot).counters;
        match code {
            NakCode::RemoteAccess => counters.access_naks_sent += 1,
            NakCode::RemoteOperational => counters.operational_naks_sent += 1,
            _ => counters.invalid_naks_sent += 1,
        }
    }

    fn serve_send(
        &mut self,
        slot: usize,
        repr: &Repr,
        offset: u32,
        payload: &[u8],
    ) -> Result<(), Refusal> {
        let at = repr.bth.opcode.info().position;
        let recv = if at.begins() {
            self.take_recv(slot)
        } else {
            self.qp_mut(slot).receiving.take()
        };
        let recv = recv.ok_or(Refusal::NotReady)?;
        match self.fill(slot, &recv, at.begins() && at.ends(), offset, payload) {
            Ok(_) if matches!(repr.ext, Extension::Ieth(key) if !self.invalidate(slot, key)) => {
                self.qp_mut(slot).receiving = Some(recv);
                Err(Refusal::Invalidate)
            }
            Ok(data) if at.ends() => {
                let total = offset + payload.len() as u32;
                self.deliver_wire(slot, recv, repr, WcOpcode::Recv, total, data);
                Ok(())
            }
            result => {
                self.qp_mut(slot).receiving = Some(recv);
                result.map(|_| ())
            }
        }
    }

    /// Puts a packet's payload into a receive; gives it back if it fits the completion.
    fn fill(
        &mut self,
        slot: usize,
        recv: &RecvWr,
        whole: bool,
        offset: u32,
        payload: &[u8],
    ) -> Result<Option<[u64; 4]>, Refusal> {
        let first = recv.sges().first().copied().unwrap_or_default();
        if whole && payload.len() <= CQE_DATA && first.len as usize >= payload.len() {
            // Small enough for the completion; the key is checked all the same.
            let sges = std::slice::from_ref(&first);
            self.open_sges(slot, recv.pd, sges, payload.len() as u64)?;
            let mut words = [0; 4];
            Bytes::own(payload).gather(&mut words, 0);
            return Ok(Some(words));
        }
        if !payload.is_empty() {
            let end = u64::from(offset) + payload.len() as u64;
            let room = self.open_sges(slot, recv.pd, recv.sges(), u64::MAX)?;
            if room < end {
                return Err(Refusal::TooLong);
            }
            scatter(payload, &self.dst, u64::from(offset));
        }
        Ok(None)
    }

    /// Opens a receive's pieces into `self.dst`, of the first `most` bytes; gives their room.
    pub(super) fn open_sges(
        &mut self,
        slot: usize,
        pd: u32,
        sges: &[Sge],
        most: u64,
    ) -> Result<u64, Refusal> {
        self.dst.clear();
        let qp = self.qps[slot].as_ref().expect("a live QP's slot");
        let user = self.users[qp.user].as_ref().expect("a QP's user");
        let mut room = 0;
        for sge in sges {
            let len = u64::from(sge.len).min(most);
            if len == 0 {
                continue;
            }
            let piece = user
                .open(pd, sge.lkey, sge.addr, len, Access::LOCAL_WRITE)
                .ok_or(Refusal::Receive(WcStatus::LocProtErr))?;
            self.dst.push(piece);
            room += len;
        }
        Ok(room)
    }

    /// The end of a message that takes a receive: its completion.
    fn deliver_wire(
        &mut self,
        slot: usize,
        recv: Box<RecvWr>,
        repr: &Repr,
        opcode: WcOpcode,
        total: u32,
        data: Option<[u64; 4]>,
    ) {
        let (flag, imm) = match repr.bth.opcode.info().suffix {
            Suffix::None => (0, 0),
            Suffix::Imm => (cqe_flags::WITH_IMM, repr.ext.imm().unwrap_or(0)),
            Suffix::Invalidate => match repr.ext {
                Extension::Ieth(rkey) => (cqe_flags::WITH_INV, rkey),
                _ => (0, 0),
            },
        };
        let arrived = Arrived {
            status: WcStatus::Success,
            opcode,
            flags: flag | if data.is_some() { cqe_flags::DATA } else { 0 },
            byte_len: total,
            imm,
            data: data.unwrap_or_default(),
        };
        self.complete_recv(slot, recv, &arrived, repr.bth.solicited);
    }

    #[allow(clippy::too_many_arguments, reason = "a WRITE packet's headers")]
    fn serve_write(
        &mut self,
        slot: usize,
        repr: &Repr,
        remote: Remote,
        offset: u32,
        total: u32,
        payload: &[u8],
    ) -> Result<(), Refusal> {
        let info = repr.bth.opcode.info();
        if info.position.begins() {
            if !self.enabled(slot, Access::REMOTE_WRITE) {
                return Err(Refusal::Nak(NakCode::InvalidRequest));
            }
            self.open_here(slot, remote, 0, total, Access::REMOTE_WRITE)?;
        }
        let imm = info.suffix == Suffix::Imm;
        if imm && !self.has_recv(slot) {
            return Err(Refusal::NotReady);
        }
        let len = payload.len() as u32;
        let piece = self.open_here(slot, remote, offset, len, Access::REMOTE_WRITE)?;
        Bytes::own(payload).copy_to(&piece);
        if imm && let Some(recv) = self.take_recv(slot) {
            self.deliver_wire(slot, recv, repr, WcOpcode::RecvRdmaWithImm, total, None);
        }
        Ok(())
    }

    /// Bytes of this side that the peer names. None of them are not checked (IBA 1.4, C9-88).
    fn open_here(
        &self,
        slot: usize,
        remote: Remote,
        offset: u32,
        len: u32,
        need: Access,
    ) -> Result<Bytes, Refusal> {
        const DENIED: Refusal = Refusal::Nak(NakCode::RemoteAccess);
        if len == 0 {
            return Ok(Bytes::EMPTY);
        }
        let qp = self.qp(slot);
        let addr = remote.addr.checked_add(u64::from(offset)).ok_or(DENIED)?;
        self.user(qp.user)
            .open_remote(qp.pd, qp.handle, remote.rkey, addr, u64::from(len), need)
            .ok_or(DENIED)
    }

    fn serve_read(&self, slot: usize, remote: Remote, len: u32) -> Result<(), Refusal> {
        if !self.enabled(slot, Access::REMOTE_READ) {
            return Err(Refusal::Nak(NakCode::InvalidRequest));
        }
        self.open_here(slot, remote, 0, len, Access::REMOTE_READ)?;
        Ok(())
    }

    fn serve_atomic(&self, slot: usize, repr: &Repr, remote: Remote) -> Result<u64, Refusal> {
        const INVALID: Refusal = Refusal::Nak(NakCode::InvalidRequest);
        let Extension::Atomic(atomic) = repr.ext else {
            return Err(INVALID);
        };
        if !remote.addr.is_multiple_of(8) || !self.enabled(slot, Access::REMOTE_ATOMIC) {
            return Err(INVALID);
        }
        let target = self.open_here(slot, remote, 0, 8, Access::REMOTE_ATOMIC)?;
        let word = target.atomic().ok_or(INVALID)?;
        Ok(if repr.bth.opcode.info().operation == Operation::FetchAdd {
            word.fetch_add(atomic.swap_add, Ordering::SeqCst)
        } else {
            match word.compare_exchange(
                atomic.compare,
                atomic.swap_add,
                Ordering::SeqCst,
                Ordering::SeqCst,
            ) {
                Ok(v) | Err(v) => v,
            }
        })
    }
}

/// Whether the ICRC is right, as far as can be told: the identification may be hidden.
fn check_icrc(w: &mut Wire, a: &Arrival<'_>) -> bool {
    let crc = w.crc_of(&a.src, a.src_port);
    if let Some(ident) = a.ident {
        return crc.check(a.payload, ident);
    }
    // Kernels count on inside a burst, so the right guess is mostly the next number. A wrong one differs from the right one by what is
    // missing to the CRC, which is linear.
    let residual = crc.residual(a.payload, w.guess);
    let ident = match residual {
        0 => Some(w.guess),
        _ if crc.is_v4() => {
            let differs = w.solver.solve(residual, a.payload.len());
            differs.map(|d| w.guess ^ d)
        }
        _ => None,
    };
    if let Some(ident) = ident {
        w.guess = ident.wrapping_add(1);
    }
    ident.is_some()
}
