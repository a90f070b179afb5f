//! Memory regions.

use hyv_abi::control::{MrReply, RegMr, ReregMr, rereg};
use hyv_abi::types::{Access, Errno, Reason};

use super::{BAD_HANDLE, OUTSIDE, QUOTA, Result, err};
use crate::engine::Engine;
use crate::mem::Bytes;
use crate::objects::{Mr, User, UserId};
use crate::table::index;

fn check_access(bits: u32) -> Result<Access> {
    match Access::from_bits(bits) {
        Some(a)
            if !a.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
                || a.contains(Access::LOCAL_WRITE) =>
        {
            Ok(a)
        }
        _ => err(Errno::Inval, Reason::BadAccess),
    }
}

impl User {
    /// The memory of a region that may be, beside `freed` bytes of registrations that go.
    fn region(&self, iova: u64, ram_offset: u64, len: u64, freed: u64) -> Result<Bytes> {
        if len == 0 {
            return err(Errno::Inval, Reason::ZeroLength);
        }
        if iova.checked_add(len).is_none() {
            return err(Errno::Inval, Reason::Overflow);
        }
        let bytes = self.mem.bytes(ram_offset, len).ok_or(OUTSIDE)?;
        if self.mr_bytes - freed + len > self.max_mr_bytes {
            return err(Errno::NoMem, Reason::QuotaMemory);
        }
        Ok(bytes)
    }
}

fn reply(handle: u32, key: u32) -> MrReply {
    MrReply {
        handle,
        lkey: key,
        rkey: key,
        reserved: 0,
    }
}

impl Engine {
    /// Registers memory.
    pub fn reg_mr(&mut self, id: UserId, req: &RegMr) -> Result<MrReply> {
        let u = self.slot_of(id)?;
        let user = self.user_mut(u);
        let access = check_access(req.access)?;
        user.pds.get(req.pd).ok_or(BAD_HANDLE)?;
        let bytes = user.region(req.iova, req.ram_offset, req.len, 0)?;
        let keys = &mut user.mr_keys;
        let mut key = 0;
        let handle = user.mrs.insert_with(|handle| {
            key = keys.renew(index(handle), 0);
            Mr {
                key,
                pd: req.pd,
                iova: req.iova,
                access,
                bytes,
                windows: 0,
            }
        });
        let handle = handle.ok_or(QUOTA)?;
        user.mr_bytes += req.len;
        if let Some(pd) = user.pds.get_mut(req.pd) {
            pd.refs += 1;
        }
        Ok(reply(handle, key))
    }

    /// Changes a region. Its old keys open nothing once this returns; if it is refused, they still do.
    pub fn rereg_mr(&mut self, id: UserId, req: &ReregMr) -> Result<MrReply> {
        let u = self.slot_of(id)?;
        let user = self.user_mut(u);
        let mr = user.mrs.get(req.mr).ok_or(BAD_HANDLE)?;
        if req.flags == 0 || req.flags & !rereg::ALL != 0 {
            return err(Errno::Inval, Reason::BadFlags);
        }
        if mr.windows > 0 {
            return err(Errno::Busy, Reason::WindowsBound);
        }
        let (mut iova, mut bytes, mut pd, mut access) = (mr.iova, mr.bytes, mr.pd, mr.access);
        let before = (mr.pd, bytes.len());
        if req.flags & rereg::ACCESS != 0 {
            access = check_access(req.access)?;
        }
        if req.flags & rereg::PD != 0 {
            user.pds.get(req.pd).ok_or(BAD_HANDLE)?;
            pd = req.pd;
        }
        if req.flags & rereg::TRANSLATION != 0 {
            iova = req.iova;
            bytes = user.region(iova, req.ram_offset, req.len, before.1)?;
        }
        // Nothing fails from here on.
        let key = user.mr_keys.renew(index(req.mr), 0);
        user.mr_bytes = user.mr_bytes - before.1 + bytes.len();
        for (pd, change) in [(before.0, -1), (pd, 1)] {
            if let Some(pd) = user.pds.get_mut(pd) {
                pd.refs = pd.refs.wrapping_add_signed(change);
            }
        }
        if let Some(mr) = user.mrs.get_mut(req.mr) {
            *mr = Mr {
                key,
                pd,
                iova,
                access,
                bytes,
                windows: 0,
            };
        }
        Ok(reply(req.mr, key))
    }

    /// Deregisters memory that no window is bound to. No work request touches it after this returns.
    pub fn dereg_mr(&mut self, id: UserId, handle: u32) -> Result<()> {
        let u = self.slot_of(id)?;
        let user = self.user_mut(u);
        if user.mrs.get(handle).ok_or(BAD_HANDLE)?.windows > 0 {
            return err(Errno::Busy, Reason::WindowsBound);
        }
        let Some(mr) = user.mrs.remove(handle) else {
            return Err(BAD_HANDLE);
        };
        user.mr_bytes -= mr.bytes.len();
        if let Some(pd) = user.pds.get_mut(mr.pd) {
            pd.refs -= 1;
        }
        Ok(())
    }
}
