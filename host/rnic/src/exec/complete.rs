//! What ends a work request: completions, errors, and the flush of a queue in error.

use hyv_abi::queue::{Cqe, WcOpcode, WcStatus, WrOpcode, cqe_flags, flags};
use hyv_abi::sync::Ordering;
use hyv_abi::types::{QpState, QpType};
use hyv_abi::window::summary;

use crate::engine::{Engine, Step};
use crate::objects::Wr;
use crate::recv::{RecvFrom, RecvWr};

/// How a receive ended: what its completion says.
pub(crate) struct Arrived {
    pub status: WcStatus,
    pub opcode: WcOpcode,
    /// Of the completion.
    pub flags: u8,
    pub byte_len: u32,
    pub imm: u32,
    pub data: [u64; 4],
}

impl Engine {
    #[inline]
    pub(crate) fn signaled(&self, slot: usize, wr: &Wr) -> bool {
        wr.head.flags & flags::SIGNALED != 0 || self.qp(slot).sig_all
    }

    #[inline(always)]
    pub(crate) fn complete_ok(&mut self, slot: usize, wr: &Wr, data: Option<[u64; 4]>) {
        if self.signaled(slot, wr) {
            let opcode = WrOpcode::from_u8(wr.head.opcode).map_or(0, |op| op.wc() as u8);
            self.complete_send(
                slot,
                wr.head.wr_id,
                wr.index,
                WcStatus::Success,
                opcode,
                wr.total as u32,
                data,
            );
        }
    }

    /// A send work request failed: its completion (signaled or not), and the QP is in error; one without acknowledgements
    /// only its send queue.
    #[cold]
    pub(crate) fn complete_error(&mut self, slot: usize, wr: &Wr, status: WcStatus) -> Step {
        let opcode = WrOpcode::from_u8(wr.head.opcode).map_or(0, |op| op.wc() as u8);
        let counters = &mut self.qp_mut(slot).counters;
        counters.errors += 1;
        counters.work_requests += 1;
        self.complete_send(slot, wr.head.wr_id, wr.index, status, opcode, 0, None);
        let qp = self.qp_mut(slot);
        qp.sq_head = wr.index.wrapping_add(u32::from(wr.head.slots));
        if self.qp(slot).ty == QpType::Rc {
            self.set_error(slot);
        } else {
            self.set_send_error(slot);
        }
        Step::Failed
    }

    /// The state SQE (IBA 1.4, 10.3.1.6): sends flush until `modify_qp` says otherwise, receives go on.
    #[cold]
    fn set_send_error(&mut self, slot: usize) {
        if self.qp(slot).state == QpState::Err {
            return;
        }
        self.forget(slot);
        let qp = self.qp_mut(slot);
        qp.state = QpState::Sqe;
        qp.wait = None;
        qp.current = None;
        if let Some(first) = qp.wire.as_mut().and_then(|w| w.hang_up()) {
            qp.sq_head = first;
        }
        self.flush_sends(slot);
    }

    /// Completes a receive with an error.
    #[cold]
    pub(crate) fn fail_recv(&mut self, slot: usize, recv: Box<RecvWr>, status: WcStatus) {
        let failed = Arrived {
            status,
            opcode: WcOpcode::Recv,
            flags: 0,
            byte_len: 0,
            imm: 0,
            data: [0; 4],
        };
        self.complete_recv(slot, recv, &failed, true);
    }

    /// Completes a receive that was taken.
    #[inline(always)]
    pub(crate) fn complete_recv(
        &mut self,
        slot: usize,
        recv: Box<RecvWr>,
        arrived: &Arrived,
        solicited: bool,
    ) {
        let qp = self.qp(slot);
        let cqe = Cqe {
            wr_id: recv.wr_id,
            status: arrived.status as u8,
            opcode: arrived.opcode as u8,
            flags: arrived.flags,
            syndrome: 0,
            qpn: qp.qpn,
            byte_len: arrived.byte_len,
            imm: arrived.imm,
            data: arrived.data,
            wqe: recv.name,
            qp: qp.doorbell() as u16,
        };
        let cq = qp.recv_cq;
        self.spare_recv = Some(recv);
        self.push(slot, cq, &cqe, solicited);
    }

    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "the fields of a completion")]
    fn complete_send(
        &mut self,
        slot: usize,
        wr_id: u64,
        index: u32,
        status: WcStatus,
        opcode: u8,
        byte_len: u32,
        data: Option<[u64; 4]>,
    ) {
        let qp = self.qp(slot);
        let cqe = Cqe {
            wr_id,
            status: status as u8,
            opcode,
            flags: if data.is_some() { cqe_flags::DATA } else { 0 },
            syndrome: 0,
            qpn: qp.qpn,
            byte_len,
            imm: 0,
            data: data.unwrap_or_default(),
            wqe: index as u16,
            qp: qp.doorbell() as u16,
        };
        let cq = qp.send_cq;
        self.push(slot, cq, &cqe, status != WcStatus::Success);
    }

    /// Inlined, so that an entry is put together in registers: words loaded from fields that were stored a moment ago would wait for
    /// all stores before those, among them the payload's to lines that another core has.
    #[inline(always)]
    fn push(&mut self, slot: usize, cq_slot: usize, cqe: &Cqe, solicited: bool) {
        let cq = self.cq_mut(cq_slot);
        let first_overrun = !cq.overrun;
        if !cq.push(cqe) {
            if first_overrun {
                self.overrun(cq_slot);
            }
            // IBA 1.4, 11.6.3: a QP whose completion is lost goes to the error state.
            if self.qp(slot).state != QpState::Err {
                self.doomed.push(slot);
            }
            return;
        }
        let cq = self.cq_mut(cq_slot);
        cq.solicited |= solicited || cqe.status != 0;
        if !cq.touched {
            cq.touched = true;
            self.touched.push(cq_slot);
        }
    }

    #[cold]
    fn overrun(&mut self, cq_slot: usize) {
        let cq = self.cq(cq_slot);
        let (index, user) = (cq.index as usize, self.user(cq.user));
        let events = &user.mem.window().events;
        events.cq_error[index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
        events.summary.fetch_or(summary::CQ_ERROR, Ordering::SeqCst);
        user.wake.wake();
    }

    /// Completes everything posted to a QP in error as flushed. Bounded by the rings' sizes.
    #[cold]
    pub(crate) fn flush(&mut self, slot: usize) {
        self.flush_sends(slot);
        // Of an SRQ only what it has taken: the rest is for the other QPs.
        let own = match &self.qp(slot).recv {
            RecvFrom::Own(ring) => ring.slots(),
            RecvFrom::Shared(_) => 0,
        };
        if let Some(recv) = self.qp_mut(slot).receiving.take() {
            self.fail_recv(slot, recv, WcStatus::WrFlushErr);
        }
        for _ in 0..own {
            let Some(recv) = self.take_recv(slot) else {
                break;
            };
            self.fail_recv(slot, recv, WcStatus::WrFlushErr);
        }
    }

    /// Completes the sends posted to a QP in error as flushed.
    #[cold]
    pub(crate) fn flush_sends(&mut self, slot: usize) {
        let mut wr = Wr::new();
        for _ in 0..=self.qp(slot).sq_mask {
            if self.qp(slot).fetch(&mut wr).is_none() {
                break;
            }
            let opcode = WrOpcode::from_u8(wr.head.opcode).map_or(0, |op| op.wc() as u8);
            self.complete_send(
                slot,
                wr.head.wr_id,
                wr.index,
                WcStatus::WrFlushErr,
                opcode,
                0,
                None,
            );
            let qp = self.qp_mut(slot);
            qp.sq_head = qp.sq_head.wrapping_add(u32::from(wr.head.slots));
        }
    }
}
