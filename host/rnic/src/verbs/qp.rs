//! Queue pairs.

use hyv_abi::control::{CreateQp, ModifyQp, QpAttr, QpReply};
use hyv_abi::queue::{MAX_RING_LOG2, RECV_STRIDES, SLOT_WORDS};
use hyv_abi::types::{Access, Errno, QpAttrMask, QpState, QpType, Reason};

use super::{BAD_HANDLE, OUTSIDE, QUOTA, Result, err};
use crate::engine::Engine;
use crate::limits;
use crate::objects::{Qp, UserId};
use crate::recv::{RecvFrom, RecvRing};
use crate::state;

impl Engine {
    /// Makes a QP in the RESET state.
    pub fn create_qp(&mut self, id: UserId, req: &CreateQp) -> Result<QpReply> {
        let u = self.slot_of(id)?;
        let user = self.user(u);
        let Some(ty) = QpType::from_u32(req.qp_type) else {
            return err(Errno::Inval, Reason::BadQpType);
        };
        user.pds.get(req.pd).ok_or(BAD_HANDLE)?;
        let send_cq = *user.cqs.get(req.send_cq).ok_or(BAD_HANDLE)?;
        let recv_cq = *user.cqs.get(req.recv_cq).ok_or(BAD_HANDLE)?;
        let srq = match req.srq {
            u32::MAX => None,
            handle => Some(*user.srqs.get(handle).ok_or(BAD_HANDLE)?),
        };
        // With an SRQ the receive ring's fields say nothing.
        if req.sq_log2 > MAX_RING_LOG2 || (srq.is_none() && req.rq_log2 > MAX_RING_LOG2) {
            return err(Errno::Inval, Reason::BadRingSize);
        }
        if srq.is_none() && !RECV_STRIDES.contains(&req.rq_stride) {
            return err(Errno::Inval, Reason::BadStride);
        }
        if !req.sq_ring.is_multiple_of(64) || (srq.is_none() && !req.rq_ring.is_multiple_of(64)) {
            return err(Errno::Inval, Reason::Misaligned);
        }
        let sq = user
            .mem
            .words(req.sq_ring, SLOT_WORDS << req.sq_log2)
            .ok_or(OUTSIDE)?;
        let recv = if let Some(srq) = srq {
            RecvFrom::Shared(srq)
        } else {
            let stride = req.rq_stride as usize / 8;
            let words = user.mem.words(req.rq_ring, stride << req.rq_log2);
            let words = words.ok_or(OUTSIDE)?;
            RecvFrom::Own(RecvRing::new(words, req.rq_log2, stride, req.pd, false))
        };
        let slot = self.take_qp_slot().ok_or(QUOTA)?;
        let Some(handle) = self.user_mut(u).qps.insert_with(|_| slot) else {
            self.free_qps.push_front(slot);
            return Err(QUOTA);
        };
        if self.qpn_generations.len() <= slot {
            self.qpn_generations.resize(slot + 1, 0);
        }
        let generation = self.qpn_generations[slot].wrapping_add(1);
        self.qpn_generations[slot] = generation;
        let qpn = u32::from(generation) << 16 | slot as u32;
        self.qps[slot] = Some(Box::new(Qp {
            user: u,
            handle,
            qpn,
            ty,
            pd: req.pd,
            sig_all: req.sig_all != 0,
            state: QpState::Reset,
            attr: QpAttr::EMPTY,
            send_cq,
            recv_cq,
            sq,
            sq_mask: (1 << req.sq_log2) - 1,
            sq_head: 0,
            recv,
            receiving: None,
            current: None,
            wait: None,
            established: false,
            is_hot: false,
            in_backlog: false,
            windows: Vec::new(),
            datagram_psn: 0,
            wire: None,
            counters: crate::wire::zeroed(),
        }));
        self.cq_mut(send_cq).refs += 1;
        self.cq_mut(recv_cq).refs += 1;
        if let Some(srq) = srq {
            self.srq_mut(srq).refs += 1;
        }
        if let Some(pd) = self.user_mut(u).pds.get_mut(req.pd) {
            pd.refs += 1;
        }
        Ok(QpReply { handle, qpn })
    }

    /// A slot for a QP: the one that has been free for longest, and not before many are, so that a QPN stays stale for long.
    fn take_qp_slot(&mut self) -> Option<usize> {
        let fresh = self.qps.len() < limits::FIRST_QP_SLOT + limits::MAX_QPS_TOTAL;
        if fresh && self.free_qps.len() < limits::MIN_FREE {
            self.qps.push(None);
            return Some(self.qps.len() - 1);
        }
        self.free_qps.pop_front()
    }

    /// Moves a QP through its states. `Ok` means that the device acts accordingly from now on.
    pub fn modify_qp(&mut self, id: UserId, req: &ModifyQp) -> Result<()> {
        let u = self.slot_of(id)?;
        let slot = *self.user(u).qps.get(req.qp).ok_or(BAD_HANDLE)?;
        let Some(mask) = QpAttrMask::from_bits(req.mask) else {
            return err(Errno::Inval, Reason::ExtraAttr);
        };
        let (ty, now) = (self.qp(slot).ty, self.qp(slot).state);
        let to = state::check(ty, now, mask, req.attr.state, req.attr.cur_state)?;
        let attr = self.merge(self.qp(slot).attr, mask, &req.attr)?;
        self.check_path(slot, to, &attr)?;
        let qp = self.qp_mut(slot);
        qp.attr = attr;
        match to {
            QpState::Reset => {
                qp.attr = QpAttr::EMPTY;
                qp.state = to;
                qp.sq_head = 0;
                if let RecvFrom::Own(ring) = &mut qp.recv {
                    ring.head = 0;
                }
                (qp.current, qp.wait) = (None, None);
                qp.established = false;
                qp.wire = None;
                self.return_recv(slot);
                self.forget(slot);
            }
            QpState::Err => self.set_error(slot),
            _ => {
                qp.state = to;
                self.set_up_wire(slot, now);
                if now == QpState::Rtr {
                    self.qp_mut(slot).datagram_psn = attr.sq_psn;
                }
                if to == QpState::Rts {
                    self.activate(slot);
                }
            }
        }
        self.finish_turn();
        Ok(())
    }

    fn merge(&self, mut have: QpAttr, mask: QpAttrMask, new: &QpAttr) -> Result<QpAttr> {
        use QpAttrMask as M;
        const REMOTE: u32 = Access::REMOTE_READ
            .union(Access::REMOTE_WRITE)
            .union(Access::REMOTE_ATOMIC)
            .bits();
        type Field<'a> = (M, &'a mut u32, u32, fn(u32) -> bool);
        let fields: [Field<'_>; 14] = [
            (M::ACCESS_FLAGS, &mut have.access, new.access, |v| {
                v & !(REMOTE | Access::LOCAL_WRITE.bits()) == 0
            }),
            (M::PKEY_INDEX, &mut have.pkey_index, new.pkey_index, |v| {
                v == 0
            }),
            (M::PORT, &mut have.port_num, new.port_num, |v| v == 1),
            (M::QKEY, &mut have.qkey, new.qkey, |_| true),
            (M::PATH_MTU, &mut have.path_mtu, new.path_mtu, |v| {
                v.is_power_of_two() && (256..=4096).contains(&v)
            }),
            (M::DEST_QPN, &mut have.dest_qp_num, new.dest_qp_num, |v| {
                v < 1 << 24
            }),
            (M::RQ_PSN, &mut have.rq_psn, new.rq_psn, |v| v < 1 << 24),
            (M::SQ_PSN, &mut have.sq_psn, new.sq_psn, |v| v < 1 << 24),
            (
                M::MAX_QP_RD_ATOMIC,
                &mut have.max_rd_atomic,
                new.max_rd_atomic,
                |v| v <= limits::MAX_RD_ATOMIC,
            ),
            (
                M::MAX_DEST_RD_ATOMIC,
                &mut have.max_dest_rd_atomic,
                new.max_dest_rd_atomic,
                |v| v <= limits::MAX_RD_ATOMIC,
            ),
            (
                M::MIN_RNR_TIMER,
                &mut have.min_rnr_timer,
                new.min_rnr_timer,
                |v| v < 32,
            ),
            (M::TIMEOUT, &mut have.timeout, new.timeout, |v| v < 32),
            (M::RETRY_CNT, &mut have.retry_cnt, new.retry_cnt, |v| v < 8),
            (M::RNR_RETRY, &mut have.rnr_retry, new.rnr_retry, |v| v < 8),
        ];
        for (bit, have, new, ok) in fields {
            if mask.contains(bit) {
                if !ok(new) {
                    return err(Errno::Inval, Reason::BadAttr);
                }
                *have = new;
            }
        }
        if mask.contains(M::AV) {
            if !self.is_reachable(&new.dest_gid) {
                return err(Errno::HostUnreach, Reason::NoRoute);
            }
            if new.sgid_index != 0 {
                return err(Errno::Inval, Reason::BadGid);
            }
            if new.traffic_class > 0xff || new.hop_limit > 0xff || new.flow_label >= 1 << 20 {
                return err(Errno::Inval, Reason::BadAttr);
            }
            have.dest_gid = new.dest_gid;
            (have.traffic_class, have.hop_limit) = (new.traffic_class, new.hop_limit);
            have.flow_label = new.flow_label;
        }
        Ok(have)
    }

    /// Whether a GID is this device's own: its own one, zeros, or a loopback address (unless its own is one of those: then others
    /// are other devices).
    #[must_use]
    pub fn is_local(&self, gid: &[u8; 16]) -> bool {
        let loopback = |gid: &[u8; 16]| {
            let v6 = std::net::Ipv6Addr::from(*gid);
            v6.is_loopback() || v6.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback())
        };
        let v6 = std::net::Ipv6Addr::from(*gid);
        *gid == self.config.gid
            || v6.is_unspecified()
            || v6.to_ipv4_mapped().is_some_and(|v4| v4.is_unspecified())
            || (loopback(gid) && !loopback(&self.config.gid))
    }

    /// Whether there is a way to a GID.
    pub(super) fn is_reachable(&self, gid: &[u8; 16]) -> bool {
        let v4 = |gid: &[u8; 16]| std::net::Ipv6Addr::from(*gid).to_ipv4_mapped().is_some();
        self.is_local(gid) || (self.has_wire() && v4(gid) == v4(&self.config.gid))
    }

    /// A QP's attributes and state.
    pub fn query_qp(&self, id: UserId, handle: u32) -> Result<QpAttr> {
        let u = self.slot_of(id)?;
        let qp = self.qp(*self.user(u).qps.get(handle).ok_or(BAD_HANDLE)?);
        Ok(QpAttr {
            state: qp.state as u32,
            cur_state: qp.state as u32,
            ..qp.attr
        })
    }

    /// Drops a QP. The engine touches its rings no more. Completions already written stay.
    pub fn destroy_qp(&mut self, id: UserId, handle: u32) -> Result<()> {
        let u = self.slot_of(id)?;
        let slot = *self.user(u).qps.get(handle).ok_or(BAD_HANDLE)?;
        self.drop_qp(slot);
        Ok(())
    }

    /// Whether a user owns the QP of this number.
    #[must_use]
    pub fn owns_qpn(&self, id: UserId, qpn: u32) -> bool {
        let (Ok(u), Some(slot)) = (self.slot_of(id), self.find_qpn(qpn)) else {
            return false;
        };
        self.qp(slot).user == u
    }

    /// Puts a user's QP into the error state and flushes it (a disconnect).
    pub fn fail_qpn(&mut self, id: UserId, qpn: u32) {
        if self.owns_qpn(id, qpn)
            && let Some(slot) = self.find_qpn(qpn)
        {
            self.set_error(slot);
            self.finish_turn();
        }
    }

    pub(super) fn drop_qp(&mut self, slot: usize) {
        self.forget(slot);
        self.return_recv(slot);
        self.unbind_all(slot);
        let Some(qp) = self.qps[slot].take() else {
            return;
        };
        self.free_qps.push_back(slot);
        crate::wire::add(&mut self.past, &qp.counters);
        crate::wire::add(&mut self.user_mut(qp.user).past, &qp.counters);
        self.cq_mut(qp.send_cq).refs -= 1;
        self.cq_mut(qp.recv_cq).refs -= 1;
        if let RecvFrom::Shared(srq) = qp.recv {
            self.srq_mut(srq).refs -= 1;
        }
        let user = self.user_mut(qp.user);
        user.qps.remove(qp.handle);
        if let Some(pd) = user.pds.get_mut(qp.pd) {
            pd.refs -= 1;
        }
    }
}
