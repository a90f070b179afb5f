//! Registered memory of a client: requests, replies, what it READs, and buffers for keys and values that travel by address.
#![allow(unsafe_code, reason = "memory that the device reads and writes")]

use alloc::vec::Vec;

use hyv_verbs::{Access, Error, MemoryRegion, ProtectionDomain};

use crate::limits::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crate::proto::RemoteBuffer;

/// Staging buffers: large requests outstanding at once.
const BUFFERS: usize = 4;
const KEY_ROOM: usize = (MAX_KEY_BYTES + 1).next_multiple_of(4096);
/// Bytes of a staging buffer.
pub(super) const ROOM: usize = KEY_ROOM + MAX_VALUE_BYTES;

/// A pool of staging buffers in one region: a key, then a value or a page; or elements, then results.
pub(super) struct Staging {
    mr: MemoryRegion,
    free: Vec<u32>,
}

impl Staging {
    pub fn new(pd: &ProtectionDomain) -> Result<Self, Error> {
        let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
        Ok(Self {
            mr: pd.alloc_mr(BUFFERS * ROOM, access)?,
            free: (0..BUFFERS as u32).collect(),
        })
    }

    pub fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    pub fn give_back(&mut self, s: u32) {
        self.free.push(s);
    }

    /// The address of part of a buffer.
    pub fn remote(&self, s: u32, at: usize, len: usize) -> RemoteBuffer {
        let to = self.mr.remote((s as usize * ROOM + at) as u64);
        RemoteBuffer {
            addr: to.addr,
            rkey: to.rkey,
            len: len as u32,
        }
    }

    /// Copies a key in; gives its address.
    pub fn fill_key(&self, s: u32, key: &[u8]) -> RemoteBuffer {
        let copied = self.mr.write(s as usize * ROOM, key);
        debug_assert!(copied.is_ok(), "its length was checked");
        self.remote(s, 0, key.len())
    }

    /// Copies a value in; gives its address.
    pub fn fill_value(&self, s: u32, value: &[u8]) -> RemoteBuffer {
        let copied = self.mr.write(s as usize * ROOM + KEY_ROOM, value);
        debug_assert!(copied.is_ok(), "its length was checked");
        self.value(s, value.len())
    }

    /// Address of the value's `len` bytes.
    pub fn value(&self, s: u32, len: usize) -> RemoteBuffer {
        self.remote(s, KEY_ROOM, len)
    }

    /// Where a value is in a buffer.
    pub const VALUE_AT: usize = KEY_ROOM;

    /// What the server wrote to part of a buffer.
    pub fn written(&self, s: u32, at: usize, len: usize) -> &[u8] {
        received(&self.mr, s as usize * ROOM + at, len.min(ROOM - at))
    }

    /// A buffer, to fill before the server knows of it.
    pub fn fill(&mut self, s: u32) -> &mut [u8] {
        own(&self.mr, s as usize * ROOM, ROOM)
    }
}

/// What arrived at `offset`: empty if that is outside the region.
///
/// The caller holds that part of the region: no work request and no outstanding request names it.
#[inline]
pub(super) fn received(mr: &MemoryRegion, offset: usize, len: usize) -> &[u8] {
    // SAFETY: the device writes there only for a posted receive or an outstanding request, and there is none.
    unsafe { mr.slice(offset, len) }.unwrap_or_default()
}

/// Part of a region, to write: empty if that is outside the region.
///
/// The caller holds that part of the region: no outstanding request names it.
#[inline]
#[allow(
    clippy::mut_from_ref,
    reason = "a registered region is shared with the device; each part has one owner at a time"
)]
pub(super) fn own(mr: &MemoryRegion, offset: usize, len: usize) -> &mut [u8] {
    // SAFETY: each part belongs to one request slot or one staging buffer, and whoever has that calls; the device does not write
    // it, and reads it only for a request that is still outstanding.
    unsafe { mr.slice_mut(offset, len) }.unwrap_or_default()
}
