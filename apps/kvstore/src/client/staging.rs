//! Buffers for keys and values that travel by address.
#![allow(unsafe_code, reason = "memory that the device reads and writes")]

use alloc::vec::Vec;

use hyv_verbs::{Access, Error, MemoryRegion, ProtectionDomain};

use crate::limits::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crate::proto::RemoteBuffer;

/// Staging buffers: large requests outstanding at once.
const BUFFERS: usize = 4;
const KEY_ROOM: usize = (MAX_KEY_BYTES + 1).next_multiple_of(4096);
const ROOM: usize = KEY_ROOM + MAX_VALUE_BYTES;

/// A pool of staging buffers in one region: a key, then a value or a page.
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

    fn remote(&self, offset: usize, len: usize) -> RemoteBuffer {
        let at = self.mr.remote(offset as u64);
        RemoteBuffer {
            addr: at.addr,
            rkey: at.rkey,
            len: len as u32,
        }
    }

    /// Copies a key in; gives its address.
    pub fn fill_key(&self, s: u32, key: &[u8]) -> RemoteBuffer {
        let at = s as usize * ROOM;
        let copied = self.mr.write(at, key);
        debug_assert!(copied.is_ok(), "its length was checked");
        self.remote(at, key.len())
    }

    /// Copies a value in.
    pub fn fill_value(&self, s: u32, value: &[u8]) {
        let copied = self.mr.write(s as usize * ROOM + KEY_ROOM, value);
        debug_assert!(copied.is_ok(), "its length was checked");
    }

    /// Address of the value's `len` bytes.
    pub fn value(&self, s: u32, len: usize) -> RemoteBuffer {
        self.remote(s as usize * ROOM + KEY_ROOM, len)
    }

    /// What the server wrote.
    pub fn written(&self, s: u32, len: usize) -> &[u8] {
        received(&self.mr, s as usize * ROOM + KEY_ROOM, len)
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
