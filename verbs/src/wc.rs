//! Completions.

use hyv_abi::queue::{CQE_DATA, Cqe, WcOpcode, WcStatus, cqe_flags};

use crate::shadow::data_bytes;

/// A completed work request, as `struct ibv_wc`.
#[derive(Clone, Copy, Debug)]
pub struct WorkCompletion {
    /// The work request's name.
    pub wr_id: u64,
    /// How it went.
    pub status: WcStatus,
    /// What it was.
    pub opcode: WcOpcode,
    /// Bytes received or read; of a send, its length. Says nothing with an error.
    pub byte_len: u32,
    /// Immediate data that came with the message, a number in host order ([`crate::SendOp`]).
    pub imm: Option<u32>,
    /// Key that the message invalidated.
    pub invalidated_rkey: Option<u32>,
    /// The local QP's number.
    pub qpn: u32,
    /// The local QP's doorbell index ([`crate::QueuePair::index`]): small, for tables.
    pub qp_index: u16,
    /// UD receives: the sender's QPN.
    pub src_qp: u32,
    /// UD receives: the first 40 bytes of the buffer are the network header ([`crate::Grh`]).
    pub grh: bool,
    /// Device's own detail of an error.
    pub vendor_err: u32,
    has_data: bool,
    data: [u8; CQE_DATA],
}

impl WorkCompletion {
    /// A place for a completion to go: fill an array with it.
    pub const EMPTY: Self = Self {
        wr_id: 0,
        status: WcStatus::GeneralErr,
        opcode: WcOpcode::Send,
        byte_len: 0,
        imm: None,
        invalidated_rkey: None,
        qpn: 0,
        qp_index: 0,
        src_qp: 0,
        grh: false,
        vendor_err: 0,
        has_data: false,
        data: [0; CQE_DATA],
    };

    /// From what the device wrote.
    #[inline]
    pub(crate) fn from_cqe(cqe: &Cqe) -> Self {
        let opcode = WcOpcode::from_u8(cqe.opcode);
        let status = if opcode.is_some() {
            WcStatus::from_u8(cqe.status)
        } else {
            WcStatus::GeneralErr
        };
        let grh = cqe.flags & cqe_flags::GRH != 0;
        Self {
            wr_id: cqe.wr_id,
            status,
            opcode: opcode.unwrap_or(WcOpcode::Send),
            byte_len: cqe.byte_len,
            imm: (cqe.flags & cqe_flags::WITH_IMM != 0).then_some(cqe.imm),
            invalidated_rkey: (cqe.flags & cqe_flags::WITH_INV != 0).then_some(cqe.imm),
            qpn: cqe.qpn,
            qp_index: cqe.qp,
            src_qp: if grh { cqe.data[0] as u32 } else { 0 },
            grh,
            vendor_err: u32::from(cqe.syndrome),
            has_data: cqe.flags & cqe_flags::DATA != 0 && matches!(status, WcStatus::Success),
            data: data_bytes(cqe),
        }
    }

    /// Of a receive whose buffer could not be filled.
    #[cold]
    pub(crate) fn undelivered(cqe: &Cqe) -> Self {
        Self {
            status: WcStatus::GeneralErr,
            ..Self::from_cqe(cqe)
        }
    }

    /// Whether it succeeded.
    #[inline]
    #[must_use]
    pub const fn is_ok(&self) -> bool {
        matches!(self.status, WcStatus::Success)
    }

    /// Whether it completes a receive.
    #[inline]
    #[must_use]
    pub const fn is_recv(&self) -> bool {
        matches!(self.opcode, WcOpcode::Recv | WcOpcode::RecvRdmaWithImm)
    }

    /// The payload, if it came in the completion itself: up to 32 bytes that need no look at the buffer. They
    /// are in the buffer as well.
    #[inline]
    #[must_use]
    pub fn inline_data(&self) -> Option<&[u8]> {
        if self.has_data {
            self.data.get(..self.byte_len as usize)
        } else {
            None
        }
    }
}

impl Default for WorkCompletion {
    fn default() -> Self {
        Self::EMPTY
    }
}
