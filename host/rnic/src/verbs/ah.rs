//! Address handles.

use hyv_abi::control::CreateAh;
use hyv_abi::types::{Errno, Reason};

use super::{BAD_HANDLE, QUOTA, Result, err};
use crate::engine::Engine;
use crate::exec::datagram::hop_limit;
use crate::objects::{Ah, UserId};

impl Engine {
    /// Makes an address handle; gives its handle.
    pub fn create_ah(&mut self, id: UserId, req: &CreateAh) -> Result<u32> {
        let u = self.slot_of(id)?;
        if req.port_num != 1 || req.sgid_index != 0 {
            return err(Errno::Inval, Reason::BadGid);
        }
        if req.traffic_class > 0xff || req.hop_limit > 0xff || req.flow_label >= 1 << 20 {
            return err(Errno::Inval, Reason::BadAttr);
        }
        if !self.is_reachable(&req.dest_gid) {
            return err(Errno::HostUnreach, Reason::NoRoute);
        }
        let user = self.user_mut(u);
        let pd = user.pds.get_mut(req.pd).ok_or(BAD_HANDLE)?;
        let ah = Ah {
            pd: req.pd,
            dest_gid: req.dest_gid,
            traffic_class: req.traffic_class as u8,
            hop_limit: hop_limit(req.hop_limit),
            flow_label: req.flow_label,
        };
        let handle = user.ahs.insert_with(|_| ah).ok_or(QUOTA)?;
        pd.refs += 1;
        Ok(handle)
    }

    /// Drops an address handle.
    pub fn destroy_ah(&mut self, id: UserId, handle: u32) -> Result<()> {
        let u = self.slot_of(id)?;
        let user = self.user_mut(u);
        let ah = user.ahs.remove(handle).ok_or(BAD_HANDLE)?;
        if let Some(pd) = user.pds.get_mut(ah.pd) {
            pd.refs -= 1;
        }
        Ok(())
    }
}
