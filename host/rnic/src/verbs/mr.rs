//! Memory regions.

use hyv_abi::control::{MrReply, RegMr};
use hyv_abi::types::{Access, Errno, Reason};

use super::{BAD_HANDLE, OUTSIDE, QUOTA, Result, err};
use crate::engine::Engine;
use crate::objects::{Mr, UserId};

impl Engine {
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
}
