//! Unreliable datagrams (IBA 1.4, section 9.8.3).

use hyv_abi::queue::{WcOpcode, WcStatus, WrOpcode, cqe_flags, flags};
use hyv_abi::types::{Access, QpType};
use hyv_roce::carrier::DEFAULT_HOP_LIMIT;
use hyv_roce::wire::bth;
use hyv_roce::wire::grh::{self, Grh};

use super::complete::Arrived;
use super::copy::copy;
use super::receives;
use crate::engine::{Engine, Step};
use crate::mem::Bytes;
use crate::objects::{Ah, Wr};

/// Bytes of BTH, DETH and ICRC.
const OVERHEAD: u64 = 12 + 8 + 4;
/// Bytes of an immediate.
const IMMEDIATE: u64 = 4;
/// A Q_Key with this bit stands for the QP's own (IBA 1.4, 10.2.5).
const OWN_QKEY: u32 = 1 << 31;

/// What a datagram's packet says beside its payload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Datagram {
    /// The sender's QP.
    pub src_qpn: u32,
    /// Immediate data.
    pub imm: Option<u32>,
    /// The sender wants an event raised.
    pub solicited: bool,
}

impl Engine {
    pub(super) fn send_datagram(&mut self, slot: usize, wr: &mut Wr, op: WrOpcode) -> Step {
        if !matches!(op, WrOpcode::Send | WrOpcode::SendImm) {
            return self.complete_error(slot, wr, WcStatus::LocQpOpErr);
        }
        let handle = wr.head.remote_addr as u32;
        let qp = self.qp(slot);
        let Some(&ah) = self.user(qp.user).ahs.get(handle) else {
            return self.complete_error(slot, wr, WcStatus::LocQpOpErr);
        };
        if ah.pd != qp.pd {
            return self.complete_error(slot, wr, WcStatus::LocProtErr);
        }
        let total = match self.open_local(slot, wr, Access::empty()) {
            Ok(n) => n,
            Err(status) => return self.complete_error(slot, wr, status),
        };
        // One packet carries it, wherever it goes (IBA 1.4, C9-196).
        if total > u64::from(self.active_mtu()) {
            return self.complete_error(slot, wr, WcStatus::LocLenErr);
        }
        let imm = (op == WrOpcode::SendImm).then_some(wr.head.imm);
        if self.is_local(&ah.dest_gid) {
            self.hand_over(slot, wr, imm, &ah, total);
        } else if !self.send_away(slot, wr, imm, &ah, total as usize) {
            return Step::More(0);
        }
        self.complete_ok(slot, wr, None);
        Step::Done(total)
    }

    /// Gives the datagram in `self.src` to a QP of this host, if that takes it.
    fn hand_over(&mut self, slot: usize, wr: &Wr, imm: Option<u32>, ah: &Ah, total: u64) {
        // A packet has 24 bits for it.
        let dest_qpn = (wr.head.remote_addr >> 32) as u32 & bth::MASK;
        let qp = self.qp(slot);
        let (src_qpn, qkey) = (qp.qpn, datagram_qkey(wr, qp.attr.qkey));
        let Some(peer) = self.find_qpn(dest_qpn) else {
            return;
        };
        let to = self.qp_mut(peer);
        if to.ty != QpType::Ud || !receives(to.state) {
            to.counters.drops_state += 1;
            return;
        }
        if to.attr.qkey != qkey {
            to.counters.drops_qkey += 1;
            return;
        }
        let len = OVERHEAD + if imm.is_some() { IMMEDIATE } else { 0 } + total.next_multiple_of(4);
        let mut area = [0; grh::LEN];
        Grh {
            src: self.config.gid,
            dst: self.config.gid,
            traffic_class: ah.traffic_class,
            flow_label: ah.flow_label,
            hop_limit: ah.hop_limit,
            ident: 0,
            packet_len: len as u16,
        }
        .emit(&mut area);
        let what = Datagram {
            src_qpn,
            imm,
            solicited: wr.head.flags & flags::SOLICITED != 0,
        };
        if !self.deliver_datagram(peer, &area, total, &what) {
            self.qp_mut(peer).counters.drops_receive += 1;
        }
    }

    /// Puts a datagram, whose payload of `len` bytes is in `self.src`, into the next receive of a UD QP. False if there is
    /// none that takes it: then it is dropped.
    pub(crate) fn deliver_datagram(
        &mut self,
        slot: usize,
        area: &[u8; grh::LEN],
        len: u64,
        what: &Datagram,
    ) -> bool {
        let Some(recv) = self.take_recv(slot) else {
            return false;
        };
        let room = match self.open_recv(slot, &recv) {
            Ok(n) => n,
            Err(status) => {
                self.fail_recv(slot, recv, status);
                self.doomed.push(slot);
                return false;
            }
        };
        let total = grh::LEN as u64 + len;
        if room < total {
            self.qp_mut(slot).receiving = Some(recv);
            return false;
        }
        self.src.insert(0, Bytes::own(area));
        copy(&self.src, &self.dst, 0, total);
        let imm = if what.imm.is_some() {
            cqe_flags::WITH_IMM
        } else {
            0
        };
        let arrived = Arrived {
            status: WcStatus::Success,
            opcode: WcOpcode::Recv,
            flags: cqe_flags::GRH | imm,
            byte_len: total as u32,
            imm: what.imm.unwrap_or(0),
            data: [u64::from(what.src_qpn), 0, 0, 0],
        };
        self.complete_recv(slot, recv, &arrived, what.solicited);
        true
    }
}

/// The Q_Key that a datagram carries.
pub(crate) fn datagram_qkey(wr: &Wr, own: u32) -> u32 {
    if wr.head.rkey & OWN_QKEY != 0 {
        own
    } else {
        wr.head.rkey
    }
}

/// The hop limit that an address handle stands for.
pub(crate) fn hop_limit(asked: u32) -> u8 {
    match asked {
        0 => DEFAULT_HOP_LIMIT,
        n => n as u8,
    }
}
