//! Control verbs on the engine's objects. Called by the control backend with the engine stopped between two
//! turns; everything a user said is checked here.

use std::sync::Arc;

use hyv_abi::control::{DeviceAttr, PkeyReply, PortAttr};
use hyv_abi::queue::{MAX_INLINE, MAX_RECV_SGE, MAX_RING_LOG2, MAX_SEND_SGE};
use hyv_abi::sync::Ordering;
use hyv_abi::types::{Errno, QpState, Reason, VerbError};
use hyv_abi::window::{MAX_CQS, MAX_QPS, MAX_SRQS, summary};

use crate::Wake;
use crate::engine::Engine;
use crate::limits;
use crate::mem::UserMemory;
use crate::objects::{Keys, Pd, User, UserId};
use crate::table::Table;

mod ah;
mod cq;
mod mr;
mod mw;
mod qp;
mod srq;

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
            srqs: Table::new(MAX_SRQS),
            ahs: Table::new(limits::MAX_AHS),
            mws: Table::new(limits::MAX_MWS),
            mr_keys: Keys::default(),
            mw_keys: Keys::default(),
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
                let remote = qp.wire.is_some();
                (
                    qp.qpn,
                    if remote {
                        u32::MAX
                    } else {
                        qp.attr.dest_qp_num
                    },
                )
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
        let srqs: Vec<usize> = self.user(u).srqs.iter().map(|(_, &slot)| slot).collect();
        for slot in srqs {
            self.srqs[slot] = None;
        }
        self.users[u] = None;
        self.finish_turn();
    }

    pub(crate) fn slot_of(&self, id: UserId) -> Result<usize> {
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
            active_mtu: self.active_mtu(),
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

    /// A port's P_Key: the default partition's, as a full member, is all there is.
    pub fn pkey(&self, port: u32, index: u32) -> Result<PkeyReply> {
        if port != 1 || index != 0 {
            return err(Errno::Inval, Reason::BadGid);
        }
        Ok(PkeyReply {
            pkey: 0xffff,
            reserved: 0,
        })
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
}
