//! Memory windows of type 2: a piece of a region with a key of its own, given and taken by work requests.

use alloc::sync::Arc;
use core::fmt;

use hyv_abi::control::{AllocMw, DeallocMw};
use hyv_abi::types::Access;

use crate::error::Error;
use crate::mr::{MemoryRegion, PdInner, ProtectionDomain};
use crate::wr::Bind;

/// `mw_type` of type 2 (`enum ibv_mw_type`).
const TYPE_2: u32 = 2;

/// The next key of the same window: the low byte is the owner's to change (`ibv_inc_rkey`).
#[must_use]
pub const fn inc_rkey(rkey: u32) -> u32 {
    rkey & !0xff | rkey.wrapping_add(1) & 0xff
}

/// A memory window (`struct ibv_mw`), deallocated when dropped: its key stops working then.
///
/// Bind it with [`crate::QueuePair::bind_mw`]. It is unbound by a bind of no bytes, by a peer's SEND with invalidate of its
/// key, or by a local invalidate ([`crate::SendWr::local_inv`]); after each of these it can be bound again. A region with
/// bound windows cannot be deregistered: dropping it waits for them ([`MemoryRegion`]).
pub struct MemoryWindow {
    pd: Arc<PdInner>,
    handle: u32,
    rkey: u32,
    allocated: bool,
}

impl fmt::Debug for MemoryWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryWindow")
            .field("handle", &self.handle)
            .field("rkey", &self.rkey)
            .finish_non_exhaustive()
    }
}

impl ProtectionDomain {
    /// Makes a memory window of type 2, not bound yet (`ibv_alloc_mw`).
    ///
    /// # Errors
    /// As any control verb; ENOMEM beyond the quota.
    pub fn alloc_mw(&self) -> Result<MemoryWindow, Error> {
        let reply = self.inner.context.call(&AllocMw {
            pd: self.inner.handle,
            mw_type: TYPE_2,
        })?;
        Ok(MemoryWindow {
            pd: Arc::clone(&self.inner),
            handle: reply.handle,
            rkey: reply.rkey,
            allocated: true,
        })
    }
}

impl MemoryWindow {
    /// Its present key, which peers use while it is bound.
    #[must_use]
    pub const fn rkey(&self) -> u32 {
        self.rkey
    }

    /// Takes note of a key: after posting a [`Bind`] by hand, its `new_rkey`; after a bind that failed, the one before.
    pub const fn set_rkey(&mut self, rkey: u32) {
        self.rkey = rkey;
    }

    /// A bind to `len` bytes at `offset` of a region, with the next key; 0 bytes unbind. For lists of work requests:
    /// [`set_rkey`](Self::set_rkey) once it is posted.
    #[must_use]
    pub fn bind(&self, mr: &MemoryRegion, offset: u64, len: u64, access: Access) -> Bind {
        Bind {
            rkey: self.rkey,
            new_rkey: inc_rkey(self.rkey),
            access,
            lkey: mr.lkey(),
            addr: mr.addr().wrapping_add(offset),
            len,
        }
    }

    fn dealloc(&mut self) -> Result<(), Error> {
        if !core::mem::take(&mut self.allocated) {
            return Ok(());
        }
        let context = &self.pd.context;
        context.call(&DeallocMw { mw: self.handle })?;
        context.parked.retry(context);
        Ok(())
    }

    /// Deallocates it and says how that went (`ibv_dealloc_mw`). Dropping does the same in silence.
    ///
    /// # Errors
    /// As any control verb.
    pub fn dealloc_now(mut self) -> Result<(), Error> {
        self.dealloc()
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        let _ = self.dealloc();
    }
}
