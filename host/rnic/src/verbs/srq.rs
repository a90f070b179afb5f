//! Shared receive queues.

use std::collections::VecDeque;

use hyv_abi::control::{CreateSrq, ModifySrq, SrqAttr};
use hyv_abi::queue::{MAX_RING_LOG2, RECV_STRIDES, SLOT_WORDS};
use hyv_abi::types::{Errno, Reason};

use super::{BAD_HANDLE, OUTSIDE, QUOTA, Result, err};
use crate::engine::Engine;
use crate::objects::UserId;
use crate::recv::{RecvRing, Srq};

impl Engine {
    /// Makes an SRQ; gives its handle.
    pub fn create_srq(&mut self, id: UserId, req: &CreateSrq) -> Result<u32> {
        let u = self.slot_of(id)?;
        let user = self.user(u);
        user.pds.get(req.pd).ok_or(BAD_HANDLE)?;
        if req.log2 > MAX_RING_LOG2 {
            return err(Errno::Inval, Reason::BadRingSize);
        }
        if !RECV_STRIDES.contains(&req.stride) {
            return err(Errno::Inval, Reason::BadStride);
        }
        if !req.ring.is_multiple_of(64) || !req.ctrl.is_multiple_of(64) {
            return err(Errno::Inval, Reason::Misaligned);
        }
        let stride = req.stride as usize / 8;
        let ring = user
            .mem
            .words(req.ring, stride << req.log2)
            .ok_or(OUTSIDE)?;
        let ctrl = user.mem.words(req.ctrl, SLOT_WORDS).ok_or(OUTSIDE)?;
        let slot = self
            .srqs
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.srqs.len());
        let handle = self.user_mut(u).srqs.insert_with(|_| slot).ok_or(QUOTA)?;
        let srq = Some(Srq {
            user: u,
            index: handle & 0xffff,
            pd: req.pd,
            ring: RecvRing::new(ring, req.log2, stride, req.pd, true),
            ctrl,
            limit: 0,
            returned: VecDeque::new(),
            refs: 0,
        });
        if slot == self.srqs.len() {
            self.srqs.push(srq);
        } else {
            self.srqs[slot] = srq;
        }
        if let Some(pd) = self.user_mut(u).pds.get_mut(req.pd) {
            pd.refs += 1;
        }
        Ok(handle)
    }

    /// Arms an SRQ's limit event; 0 disarms it. If fewer receives than that are posted already, the event is raised now.
    pub fn modify_srq(&mut self, id: UserId, req: &ModifySrq) -> Result<()> {
        let u = self.slot_of(id)?;
        let slot = *self.user(u).srqs.get(req.srq).ok_or(BAD_HANDLE)?;
        let srq = self.srq_mut(slot);
        if req.limit > srq.ring.slots() {
            return err(Errno::Inval, Reason::BadAttr);
        }
        srq.limit = req.limit;
        if req.limit != 0 {
            self.check_limit(slot);
        }
        Ok(())
    }

    /// An SRQ's attributes.
    pub fn query_srq(&self, id: UserId, handle: u32) -> Result<SrqAttr> {
        let u = self.slot_of(id)?;
        let srq = self.srq(*self.user(u).srqs.get(handle).ok_or(BAD_HANDLE)?);
        Ok(SrqAttr {
            max_wr: srq.ring.slots(),
            max_sge: srq.ring.max_sge() as u32,
            limit: srq.limit,
            reserved: 0,
        })
    }

    /// Drops an SRQ that no QP uses.
    pub fn destroy_srq(&mut self, id: UserId, handle: u32) -> Result<()> {
        let u = self.slot_of(id)?;
        let slot = *self.user(u).srqs.get(handle).ok_or(BAD_HANDLE)?;
        let srq = self.srq(slot);
        if srq.refs > 0 {
            return err(Errno::Busy, Reason::InUse);
        }
        let pd = srq.pd;
        self.srqs[slot] = None;
        let user = self.user_mut(u);
        user.srqs.remove(handle);
        if let Some(pd) = user.pds.get_mut(pd) {
            pd.refs -= 1;
        }
        Ok(())
    }
}
