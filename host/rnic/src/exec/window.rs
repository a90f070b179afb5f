//! Memory windows and keys: what a QP binds and invalidates (IBA 1.4, 10.6.7; "o10-37" there).
//!
//! Only windows can be invalidated: a region's key belongs to who registered it, until it is deregistered.

use hyv_abi::queue::{WcStatus, WrOpcode, flags};
use hyv_abi::types::Access;

use crate::engine::{Engine, Step};
use crate::objects::{Binding, FIRST_WINDOW, Wr};

const REMOTE: Access = Access::REMOTE_READ
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_ATOMIC);

/// Index of the window that a key names, if it is one's.
fn window(key: u32) -> Option<usize> {
    (key >> 8).checked_sub(FIRST_WINDOW).map(|i| i as usize)
}

impl Engine {
    /// Executes LOCAL_INV or BIND_MW, which need no peer.
    #[cold]
    pub(super) fn local_operation(&mut self, slot: usize, wr: &mut Wr, op: WrOpcode) -> Step {
        match self.operate(slot, wr, op) {
            Ok(()) => {
                self.complete_ok(slot, wr, None);
                Step::Done(0)
            }
            Err(status) => self.complete_error(slot, wr, status),
        }
    }

    /// What LOCAL_INV and BIND_MW do, or why they cannot: for whoever completes them.
    pub(crate) fn operate(&mut self, slot: usize, wr: &Wr, op: WrOpcode) -> Result<(), WcStatus> {
        if wr.head.flags & flags::INLINE != 0 {
            return Err(WcStatus::LocQpOpErr);
        }
        let done = match op {
            WrOpcode::LocalInv => self.invalidate(slot, wr.head.imm),
            WrOpcode::BindMw => self.bind(slot, wr).is_some(),
            _ => false,
        };
        match op {
            _ if done => Ok(()),
            WrOpcode::BindMw => Err(WcStatus::MwBindErr),
            _ => Err(WcStatus::LocQpOpErr),
        }
    }

    /// Makes a key useless: a window's that is bound to this QP. False if it is none.
    pub(crate) fn invalidate(&mut self, slot: usize, key: u32) -> bool {
        let qp = self.qp(slot);
        let (u, pd, handle) = (qp.user, qp.pd, qp.handle);
        let Some(i) = window(key) else { return false };
        let ours = self.user(u).mws.at(i).is_some_and(|mw| {
            mw.key == key && mw.pd == pd && mw.bound.as_ref().is_some_and(|b| b.qp == handle)
        });
        if ours {
            self.unbind(u, i);
        }
        ours
    }

    /// Binds a window, or unbinds it if there are no bytes. `None` if a rule forbids it: then nothing has changed.
    fn bind(&mut self, slot: usize, wr: &Wr) -> Option<()> {
        let (new, present) = (wr.head.imm, wr.head.rkey);
        let sge = wr.sge(0);
        let (addr, lkey, len) = (sge.addr, sge.lkey, wr.data[2]);
        let access = Access::from_bits(u32::try_from(wr.head.remote_addr).ok()?)?;
        if !REMOTE.contains(access) || new >> 8 != present >> 8 || new == present {
            return None;
        }
        let qp = self.qp(slot);
        let (u, pd, handle) = (qp.user, qp.pd, qp.handle);
        let i = window(present)?;
        let user = self.user(u);
        let mw = user.mws.at(i)?;
        if mw.key != present || mw.pd != pd {
            return None;
        }
        if len == 0 {
            if mw.bound.as_ref().is_some_and(|b| b.qp != handle) {
                return None;
            }
            self.unbind(u, i);
        } else {
            let mr = user.mrs.at((lkey >> 8) as usize)?;
            let writes = access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC);
            if mw.bound.is_some()
                || mr.key != lkey
                || mr.pd != pd
                || !mr.access.contains(Access::MW_BIND)
                || (writes && !mr.access.contains(Access::LOCAL_WRITE))
            {
                return None;
            }
            let bytes = mr.bytes.sub(addr.checked_sub(mr.iova)?, len)?;
            let bound = Binding {
                mr: (lkey >> 8) as usize,
                qp: handle,
                place: qp.windows.len(),
                access,
                iova: addr,
                bytes,
            };
            let user = self.user_mut(u);
            user.mrs.at_mut(bound.mr)?.windows += 1;
            user.mws.at_mut(i)?.bound = Some(bound);
            self.qp_mut(slot).windows.push(i as u16);
        }
        let user = self.user_mut(u);
        user.mws.at_mut(i)?.key = new;
        user.mw_keys.set(i, new);
        Some(())
    }

    /// Unbinds a window, if it is bound.
    pub(crate) fn unbind(&mut self, u: usize, window: usize) {
        let user = self.user_mut(u);
        let Some(bound) = user.mws.at_mut(window).and_then(|mw| mw.bound.take()) else {
            return;
        };
        if let Some(mr) = user.mrs.at_mut(bound.mr) {
            mr.windows -= 1;
        }
        let Some(slot) = user.qps.get(bound.qp).copied() else {
            return;
        };
        let list = &mut self.qp_mut(slot).windows;
        list.swap_remove(bound.place);
        let moved = list.get(bound.place).map(|&w| usize::from(w));
        if let Some(moved) = moved
            && let Some(mw) = self.user_mut(u).mws.at_mut(moved)
            && let Some(b) = &mut mw.bound
        {
            b.place = bound.place;
        }
    }

    /// Unbinds the windows of a QP that goes.
    pub(crate) fn unbind_all(&mut self, slot: usize) {
        while let Some(qp) = &self.qps[slot]
            && let Some(&last) = qp.windows.last()
        {
            let u = qp.user;
            self.unbind(u, usize::from(last));
        }
    }
}
