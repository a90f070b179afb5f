//! Memory windows.

use hyv_abi::control::{AllocMw, MrReply};
use hyv_abi::types::{Errno, Reason};

use super::{BAD_HANDLE, QUOTA, Result, err};
use crate::engine::Engine;
use crate::objects::{FIRST_WINDOW, Mw, UserId};
use crate::table::index;

/// `IBV_MW_TYPE_2`.
const TYPE_2: u32 = 2;

impl Engine {
    /// Makes a memory window, not bound. Its key opens nothing before it is bound.
    pub fn alloc_mw(&mut self, id: UserId, req: &AllocMw) -> Result<MrReply> {
        let u = self.slot_of(id)?;
        if req.mw_type != TYPE_2 {
            return err(Errno::Inval, Reason::BadMwType);
        }
        let user = self.user_mut(u);
        let pd = user.pds.get_mut(req.pd).ok_or(BAD_HANDLE)?;
        let keys = &mut user.mw_keys;
        let mut key = 0;
        let handle = user.mws.insert_with(|handle| {
            key = keys.renew(index(handle), FIRST_WINDOW);
            Mw {
                key,
                pd: req.pd,
                bound: None,
            }
        });
        let handle = handle.ok_or(QUOTA)?;
        pd.refs += 1;
        Ok(MrReply {
            handle,
            lkey: 0,
            rkey: key,
            reserved: 0,
        })
    }

    /// Drops a memory window. Its key opens nothing once this returns.
    pub fn dealloc_mw(&mut self, id: UserId, handle: u32) -> Result<()> {
        let u = self.slot_of(id)?;
        self.user(u).mws.get(handle).ok_or(BAD_HANDLE)?;
        self.unbind(u, index(handle));
        let user = self.user_mut(u);
        if let Some(mw) = user.mws.remove(handle)
            && let Some(pd) = user.pds.get_mut(mw.pd)
        {
            pd.refs -= 1;
        }
        Ok(())
    }
}
