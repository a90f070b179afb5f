//! Completion queues.

use std::sync::Arc;

use hyv_abi::control::{CreateCq, ResizeCq};
use hyv_abi::queue::{MAX_RING_LOG2, SLOT_WORDS};
use hyv_abi::types::{Errno, Reason};

use super::{BAD_HANDLE, OUTSIDE, QUOTA, Result, err};
use crate::engine::Engine;
use crate::objects::{Cq, UserId};

impl Engine {
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

    /// Moves a CQ to another ring, with what was not polled. Its user polls no more until this returns.
    pub fn resize_cq(&mut self, id: UserId, req: &ResizeCq) -> Result<()> {
        let u = self.slot_of(id)?;
        let slot = *self.user(u).cqs.get(req.cq).ok_or(BAD_HANDLE)?;
        if req.log2 > MAX_RING_LOG2 {
            return err(Errno::Inval, Reason::BadRingSize);
        }
        if !req.ring.is_multiple_of(64) {
            return err(Errno::Inval, Reason::Misaligned);
        }
        let mem = Arc::clone(&self.user(u).mem);
        let ring = mem.words(req.ring, SLOT_WORDS << req.log2).ok_or(OUTSIDE)?;
        let cq = self.cq_mut(slot);
        let Some(n) = cq.waiting() else {
            return err(Errno::Inval, Reason::BadAttr);
        };
        if n > 1 << req.log2 {
            return err(Errno::Inval, Reason::RingTooSmall);
        }
        cq.move_to(ring, n);
        Ok(())
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

    pub(super) fn drop_cq(&mut self, slot: usize) {
        self.touched.retain(|&c| c != slot);
        self.cqs[slot] = None;
    }
}
