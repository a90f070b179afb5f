//! What executes verbs: the software RNIC, or a real device. Control verbs only; the data path never comes here.

use std::sync::Arc;

use hyv_abi::control::{
    AllocMw, Counters, CreateAh, CreateCq, CreateQp, CreateSrq, DeviceAttr, ModifyQp, ModifySrq,
    MrReply, PkeyReply, PortAttr, QpAttr, QpReply, QueryCounters, RegMr, ReregMr, ResizeCq,
    SrqAttr,
};
use hyv_abi::types::VerbError;

use super::UserMemory;
use crate::sys::event::EventFd;

/// A user, as a provider numbers it. May be used again once the user is removed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct UserId(pub u64);

/// Tells a user that something in its window or on its control queue changed. Called from any thread; must not block.
pub trait Wake: Send + Sync {
    /// Does it.
    fn wake(&self);
}

/// A device. Every call is synchronous and quick; a request is *unchecked* input, and a provider checks all of it.
/// Handles are the provider's own, per user and generation-checked. Errors are those of the verb.
///
/// The methods are the control verbs of the same names in [`hyv_abi::control`]; what they take and give is
/// documented there.
#[allow(missing_docs, reason = "the verbs' table in hyv-abi documents them")]
pub trait Provider: Send + Sync {
    /// A new user. `wake` is for events of the data path (completions that were asked for, errors); `kick` is raised
    /// by the user when a work queue has entries and its window says that nobody looks.
    ///
    /// # Errors
    /// `NoMem`/`QuotaObjects` when there are too many users.
    fn add_user(
        &self,
        memory: &UserMemory,
        wake: Arc<dyn Wake>,
        kick: EventFd,
    ) -> Result<UserId, VerbError>;
    /// A user is gone: releases all it had, in dependency order. Peers see their queue pairs in error. The user's
    /// memory is not touched any more once this returns.
    fn remove_user(&self, user: UserId);
    fn device_attr(&self, user: UserId) -> Result<DeviceAttr, VerbError>;
    fn port_attr(&self, port: u32) -> Result<PortAttr, VerbError>;
    fn gid(&self, port: u32, index: u32) -> Result<[u8; 16], VerbError>;
    fn pkey(&self, port: u32, index: u32) -> Result<PkeyReply, VerbError>;
    fn alloc_pd(&self, user: UserId) -> Result<u32, VerbError>;
    fn dealloc_pd(&self, user: UserId, pd: u32) -> Result<(), VerbError>;
    fn reg_mr(&self, user: UserId, verb: &RegMr) -> Result<MrReply, VerbError>;
    fn dereg_mr(&self, user: UserId, mr: u32) -> Result<(), VerbError>;
    fn create_cq(&self, user: UserId, verb: &CreateCq) -> Result<u32, VerbError>;
    fn destroy_cq(&self, user: UserId, cq: u32) -> Result<(), VerbError>;
    fn create_qp(&self, user: UserId, verb: &CreateQp) -> Result<QpReply, VerbError>;
    fn modify_qp(&self, user: UserId, verb: &ModifyQp) -> Result<(), VerbError>;
    fn query_qp(&self, user: UserId, qp: u32) -> Result<QpAttr, VerbError>;
    fn destroy_qp(&self, user: UserId, qp: u32) -> Result<(), VerbError>;
    fn create_srq(&self, user: UserId, verb: &CreateSrq) -> Result<u32, VerbError>;
    fn modify_srq(&self, user: UserId, verb: &ModifySrq) -> Result<(), VerbError>;
    fn query_srq(&self, user: UserId, srq: u32) -> Result<SrqAttr, VerbError>;
    fn destroy_srq(&self, user: UserId, srq: u32) -> Result<(), VerbError>;
    fn query_counters(&self, user: UserId, verb: &QueryCounters) -> Result<Counters, VerbError>;
    fn rereg_mr(&self, user: UserId, verb: &ReregMr) -> Result<MrReply, VerbError>;
    fn alloc_mw(&self, user: UserId, verb: &AllocMw) -> Result<MrReply, VerbError>;
    fn dealloc_mw(&self, user: UserId, mw: u32) -> Result<(), VerbError>;
    fn resize_cq(&self, user: UserId, verb: &ResizeCq) -> Result<(), VerbError>;
    fn create_ah(&self, user: UserId, verb: &CreateAh) -> Result<u32, VerbError>;
    fn destroy_ah(&self, user: UserId, ah: u32) -> Result<(), VerbError>;
    /// Whether a queue pair number is this user's.
    fn owns_qpn(&self, user: UserId, qpn: u32) -> bool;
    /// Moves a queue pair to the error state and flushes it. Nothing happens for a number that is not this user's.
    fn fail_qpn(&self, user: UserId, qpn: u32);
    /// Sends a MAD to a peer's QP1, from one of this device's GIDs. It may get lost.
    fn send_mad(&self, src: &[u8; 16], dst: &[u8; 16], mad: &[u8; 256]) {
        let _ = (src, dst, mad);
    }
    /// MADs that came to QP1 since the last call: from where, and what.
    fn take_mads(&self) -> Vec<([u8; 16], Box<[u8; 256]>)> {
        Vec::new()
    }
    /// Whether packets can go from one of this device's GIDs to an address that is not this host's.
    fn has_route(&self, src: &[u8; 16], dst: &[u8; 16]) -> bool {
        let _ = (src, dst);
        false
    }
}
