//! Control verbs on the engine's objects. Called by the control backend with the engine stopped between two
//! turns; everything a user said is checked here.

use std::sync::Arc;

use hyv_abi::control::{
    CreateCq, CreateQp, DeviceAttr, ModifyQp, MrReply, PortAttr, QpAttr, QpReply, RegMr,
};
use hyv_abi::queue::{
    MAX_INLINE, MAX_RECV_SGE, MAX_RING_LOG2, MAX_SEND_SGE, RECV_STRIDES, SLOT_WORDS,
};
use hyv_abi::sync::Ordering;
use hyv_abi::types::{Access, Errno, QpAttrMask, QpState, QpType, Reason, VerbError};
use hyv_abi::window::{MAX_CQS, MAX_QPS, MAX_SRQS, summary};

use crate::engine::Engine;
use crate::limits;
use crate::mem::UserMemory;
use crate::objects::{Cq, Mr, Pd, Qp, User, UserId};
use crate::table::Table;
use crate::{Wake, state};

type Result<T> = std::result::Result<T, VerbError>;

const fn err<T>(errno: Errno, reason: Reason) -> Result<T> {
    Err(VerbError::new(errno, reason))
}

const BAD_HANDLE: VerbError = VerbError::new(Errno::NoEnt, Reason::BadHandle);
const QUOTA: VerbError = VerbError::new(Errno::NoMem, Reason::QuotaObjects);
const OUTSIDE: VerbError = VerbError::new(Errno::Fault, Reason::OutsideRam);

impl Engine {
    /// Adds a user. Its window and RAM stay in use until [`Engine::remove_user`].
    pub fn add_user(&mut self, mem: Arc<UserMemory>, wake: Arc<dyn Wake>) -> Result<UserId> {
        let slot = match self.users.iter().position(Option::is_none) {
            Some(i) => i,
            None if self.users.len() < limits::MAX_USERS => {
                self.users.push(None);
                self.users.len() - 1
            }
            None => return Err(QUOTA),
        };
        self.generation += 1;
        mem.window()
            .doorbells
            .need_wakeup
            .store(u32::from(self.dozing), Ordering::SeqCst);
        self.users[slot] = Some(User {
            generation: self.generation,
            // Overlapping registrations are legitimate, endless ones are not.
            max_mr_bytes: mem.ram_len().saturating_mul(16),
            mem,
            wake,
            pds: Table::new(limits::MAX_PDS),
            mrs: Table::new(limits::MAX_MRS),
            cqs: Table::new(MAX_CQS),
            qps: Table::new(MAX_QPS),
            mr_bytes: 0,
            past: crate::wire::zeroed(),
        });
        Ok(UserId {
            slot: slot as u32,
            generation: self.generation,
        })
    }

    /// Removes a user and all it owns, QPs first. QPs connected to its QPs go to the error state.
    pub fn remove_user(&mut self, id: UserId) {
        let Ok(u) = self.slot_of(id) else { return };
        let qps: Vec<usize> = self.user(u).qps.iter().map(|(_, &slot)| slot).collect();
        for slot in qps {
            let (qpn, peer) = {
                let qp = self.qp(slot);
                (qp.qpn, qp.attr.dest_qp_num)
            };
            self.drop_qp(slot);
            if let Some(p) = self.find_qpn(peer)
                && self.qp(p).attr.dest_qp_num == qpn
                && matches!(self.qp(p).state, QpState::Rtr | QpState::Rts | QpState::Sqd)
            {
                self.fail(p, summary::QP_FATAL);
            }
        }
        let cqs: Vec<usize> = self.user(u).cqs.iter().map(|(_, &slot)| slot).collect();
        for slot in cqs {
            self.drop_cq(slot);
        }
        self.users[u] = None;
        self.finish_turn();
    }

    fn slot_of(&self, id: UserId) -> Result<usize> {
        match self.users.get(id.slot as usize) {
            Some(Some(u)) if u.generation == id.generation => Ok(id.slot as usize),
            _ => Err(BAD_HANDLE),
        }
    }

    /// Limits of the device as this user sees them.
    pub fn device_attr(&self, id: UserId) -> Result<DeviceAttr> {
        let user = self.user(self.slot_of(id)?);
        Ok(DeviceAttr {
            node_guid: self.config.node_guid,
            max_mr_size: user.mem.ram_len(),
            max_mr_bytes: user.max_mr_bytes,
            max_qp: MAX_QPS as u32,
            max_qp_wr: 1 << MAX_RING_LOG2,
            max_send_sge: MAX_SEND_SGE as u32,
            max_recv_sge: MAX_RECV_SGE as u32,
            max_inline: MAX_INLINE as u32,
            max_cq: MAX_CQS as u32,
            max_cqe: 1 << MAX_RING_LOG2,
            max_mr: limits::MAX_MRS as u32,
            max_pd: limits::MAX_PDS as u32,
            max_srq: MAX_SRQS as u32,
            max_qp_rd_atom: limits::MAX_RD_ATOMIC,
            max_qp_init_rd_atom: limits::MAX_RD_ATOMIC,
            max_msg_len: limits::MAX_MSG,
            phys_port_cnt: 1,
        })
    }

    /// State of a port.
    pub fn port_attr(&self, port: u32) -> Result<PortAttr> {
        if port != 1 {
            return err(Errno::Inval, Reason::BadGid);
        }
        Ok(PortAttr {
            state: 4,
            max_mtu: limits::MAX_MTU,
            active_mtu: limits::MAX_MTU,
            gid_tbl_len: 1,
            max_msg_len: limits::MAX_MSG,
            pkey_tbl_len: 1,
        })
    }

    /// A port's GID.
    pub fn gid(&self, port: u32, index: u32) -> Result<[u8; 16]> {
        if port != 1 || index != 0 {
            return err(Errno::Inval, Reason::BadGid);
        }
        Ok(self.config.gid)
    }

    /// Makes a PD; gives its handle.
    pub fn alloc_pd(&mut self, id: UserId) -> Result<u32> {
        let u = self.slot_of(id)?;
        self.user_mut(u)
            .pds
            .insert_with(|_| Pd::default())
            .ok_or(QUOTA)
    }

    /// Drops a PD that nothing uses.
    pub fn dealloc_pd(&mut self, id: UserId, pd: u32) -> Result<()> {
        let u = self.slot_of(id)?;
        let pds = &mut self.user_mut(u).pds;
        if pds.get(pd).ok_or(BAD_HANDLE)?.refs > 0 {
            return err(Errno::Busy, Reason::InUse);
        }
        pds.remove(pd);
        Ok(())
    }

    /// Registers memory.
    pub fn reg_mr(&mut self, id: UserId, req: &RegMr) -> Result<MrReply> {
        let u = self.slot_of(id)?;
        let user = self.user_mut(u);
        let Some(access) = Access::from_bits(req.access) else {
            return err(Errno::Inval, Reason::BadAccess);
        };
        if access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
            && !access.contains(Access::LOCAL_WRITE)
        {
            return err(Errno::Inval, Reason::BadAccess);
        }
        if req.len == 0 {
            return err(Errno::Inval, Reason::ZeroLength);
        }
        if req.iova.checked_add(req.len).is_none() {
            return err(Errno::Inval, Reason::Overflow);
        }
        let bytes = user.mem.bytes(req.ram_offset, req.len).ok_or(OUTSIDE)?;
        let pd = user.pds.get_mut(req.pd).ok_or(BAD_HANDLE)?;
        if user.mr_bytes + req.len > user.max_mr_bytes {
            return err(Errno::NoMem, Reason::QuotaMemory);
        }
        let mut key = 0;
        let handle = user
            .mrs
            .insert_with(|handle| {
                key = (handle & 0xffff) << 8 | handle >> 16 & 0xff;
                Mr {
                    key,
                    pd: req.pd,
                    iova: req.iova,
                    access,
                    bytes,
                }
            })
            .ok_or(QUOTA)?;
        pd.refs += 1;
        user.mr_bytes += req.len;
        Ok(MrReply {
            handle,
            lkey: key,
            rkey: key,
            reserved: 0,
        })
    }

    /// Deregisters memory. No work request touches it after this returns.
    pub fn dereg_mr(&mut self, id: UserId, handle: u32) -> Result<()> {
        let u = self.slot_of(id)?;
        let user = self.user_mut(u);
        let mr = user.mrs.remove(handle).ok_or(BAD_HANDLE)?;
        user.mr_bytes -= mr.bytes.len();
        if let Some(pd) = user.pds.get_mut(mr.pd) {
            pd.refs -= 1;
        }
        Ok(())
    }

    /// Makes a CQ; gives its handle.
    pub fn create_cq(&mut self, id: UserId, req: &CreateCq) -> Result<u32> {
        let u = self.slot_of(id)?;
        if req.log2 > MAX_RING_LOG2 {
            return err(Errno::Inval, Reason::BadRingSize);
        }
        let mem = Arc::clone(&self.user(u).mem);
        if !req.ring.is_multiple_of(64) || !req.ctrl.is_multiple_of(64) {
            return err(Errno::Inval, Reason::Misaligned);
        }
        let ring = mem.words(req.ring, SLOT_WORDS << req.log2).ok_or(OUTSIDE)?;
        let ctrl = mem.words(req.ctrl, SLOT_WORDS).ok_or(OUTSIDE)?;
        let slot = self
            .cqs
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.cqs.len());
        let handle = self.user_mut(u).cqs.insert_with(|_| slot).ok_or(QUOTA)?;
        let cq = Some(Cq::new(u, handle & 0xffff, ring, ctrl));
        if slot == self.cqs.len() {
            self.cqs.push(cq);
        } else {
            self.cqs[slot] = cq;
        }
        Ok(handle)
    }

    /// Drops a CQ that no QP uses.
    pub fn destroy_cq(&mut self, id: UserId, handle: u32) -> Result<()> {
        let u = self.slot_of(id)?;
        let slot = *self.user(u).cqs.get(handle).ok_or(BAD_HANDLE)?;
        if self.cq(slot).refs > 0 {
            return err(Errno::Busy, Reason::InUse);
        }
        self.user_mut(u).cqs.remove(handle);
        self.drop_cq(slot);
        Ok(())
    }

    /// Makes a QP in the RESET state.
    pub fn create_qp(&mut self, id: UserId, req: &CreateQp) -> Result<QpReply> {
        let u = self.slot_of(id)?;
        let user = self.user(u);
        match QpType::from_u32(req.qp_type) {
            Some(QpType::Rc) => {}
            Some(_) => return err(Errno::OpNotSupp, Reason::BadQpType),
            None => return err(Errno::Inval, Reason::BadQpType),
        }
        user.pds.get(req.pd).ok_or(BAD_HANDLE)?;
        let send_cq = *user.cqs.get(req.send_cq).ok_or(BAD_HANDLE)?;
        let recv_cq = *user.cqs.get(req.recv_cq).ok_or(BAD_HANDLE)?;
        if req.srq != u32::MAX {
            return Err(BAD_HANDLE);
        }
        if req.sq_log2 > MAX_RING_LOG2 || req.rq_log2 > MAX_RING_LOG2 {
            return err(Errno::Inval, Reason::BadRingSize);
        }
        if !RECV_STRIDES.contains(&req.rq_stride) {
            return err(Errno::Inval, Reason::BadStride);
        }
        if !req.sq_ring.is_multiple_of(64) || !req.rq_ring.is_multiple_of(64) {
            return err(Errno::Inval, Reason::Misaligned);
        }
        let rq_stride = req.rq_stride as usize / 8;
        let sq = user
            .mem
            .words(req.sq_ring, SLOT_WORDS << req.sq_log2)
            .ok_or(OUTSIDE)?;
        let rq = user
            .mem
            .words(req.rq_ring, rq_stride << req.rq_log2)
            .ok_or(OUTSIDE)?;
        let slot = match self.free_qps.pop() {
            Some(s) => s,
            None if self.qps.len() < limits::FIRST_QP_SLOT + limits::MAX_QPS_TOTAL => {
                self.qps.push(None);
                self.qps.len() - 1
            }
            None => return Err(QUOTA),
        };
        let Some(handle) = self.user_mut(u).qps.insert_with(|_| slot) else {
            self.free_qps.push(slot);
            return Err(QUOTA);
        };
        self.qpn_generation = self.qpn_generation.wrapping_add(1);
        let qpn = u32::from(self.qpn_generation) << 16 | slot as u32;
        self.qps[slot] = Some(Box::new(Qp {
            user: u,
            handle,
            qpn,
            ty: QpType::Rc,
            pd: req.pd,
            sig_all: req.sig_all != 0,
            state: QpState::Reset,
            attr: QpAttr::EMPTY,
            send_cq,
            recv_cq,
            sq,
            sq_mask: (1 << req.sq_log2) - 1,
            sq_head: 0,
            rq,
            rq_mask: (1 << req.rq_log2) - 1,
            rq_head: 0,
            rq_stride,
            current: None,
            wait: None,
            established: false,
            is_hot: false,
            in_backlog: false,
            wire: None,
            counters: crate::wire::zeroed(),
        }));
        self.cq_mut(send_cq).refs += 1;
        self.cq_mut(recv_cq).refs += 1;
        if let Some(pd) = self.user_mut(u).pds.get_mut(req.pd) {
            pd.refs += 1;
        }
        Ok(QpReply { handle, qpn })
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
                (qp.sq_head, qp.rq_head) = (0, 0);
                (qp.current, qp.wait) = (None, None);
                qp.established = false;
                qp.wire = None;
                self.forget(slot);
            }
            QpState::Err => self.set_error(slot),
            _ => {
                qp.state = to;
                self.set_up_wire(slot, now);
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
            if !self.is_local(&new.dest_gid) && !self.has_wire() {
                return err(Errno::HostUnreach, Reason::NoRoute);
            }
            have.dest_gid = new.dest_gid;
            (have.traffic_class, have.hop_limit) = (new.traffic_class, new.hop_limit);
            have.flow_label = new.flow_label;
        }
        Ok(have)
    }

    /// Whether a GID is this device's own: its own one, zeros, or a loopback address.
    #[must_use]
    pub fn is_local(&self, gid: &[u8; 16]) -> bool {
        let v6 = std::net::Ipv6Addr::from(*gid);
        *gid == self.config.gid
            || v6.is_unspecified()
            || v6.is_loopback()
            || v6
                .to_ipv4_mapped()
                .is_some_and(|v4| v4.is_loopback() || v4.is_unspecified())
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

    fn drop_qp(&mut self, slot: usize) {
        self.forget(slot);
        let Some(qp) = self.qps[slot].take() else {
            return;
        };
        self.free_qps.push(slot);
        crate::wire::add(&mut self.past, &qp.counters);
        crate::wire::add(&mut self.user_mut(qp.user).past, &qp.counters);
        self.cq_mut(qp.send_cq).refs -= 1;
        self.cq_mut(qp.recv_cq).refs -= 1;
        let user = self.user_mut(qp.user);
        user.qps.remove(qp.handle);
        if let Some(pd) = user.pds.get_mut(qp.pd) {
            pd.refs -= 1;
        }
    }

    fn drop_cq(&mut self, slot: usize) {
        self.touched.retain(|&c| c != slot);
        self.cqs[slot] = None;
    }
}
