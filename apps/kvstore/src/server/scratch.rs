//! Scratch buffers: where keys and elements arrive that the server READs, and where pages and results are put together.

use alloc::sync::Arc;
use alloc::vec::Vec;

use hyv_verbs::{Access, Error, MemoryRegion, ProtectionDomain, Sge};

use super::connection::{Link, NONE};
use super::limits::{
    LARGE_BUFFERS, LARGE_BYTES, LARGE_PER_CLIENT, SCRATCH_REGION_BYTES, SMALL_BUFFERS, SMALL_BYTES,
};

/// The pools. A buffer is named by a number: the large ones first.
pub(super) struct Scratch {
    region: Arc<MemoryRegion>,
    large: Vec<u32>,
    small: Vec<u32>,
}

impl Scratch {
    pub fn new(pd: &ProtectionDomain) -> Result<Self, Error> {
        let region = pd.alloc_mr(SCRATCH_REGION_BYTES, Access::LOCAL_WRITE)?;
        Ok(Self {
            region: Arc::new(region),
            large: (0..LARGE_BUFFERS as u32).collect(),
            small: (LARGE_BUFFERS as u32..(LARGE_BUFFERS + SMALL_BUFFERS) as u32).collect(),
        })
    }

    /// The memory.
    pub fn region(&self) -> Arc<MemoryRegion> {
        Arc::clone(&self.region)
    }

    /// A large buffer for a client. None: it has as many as it may, or none is free.
    pub fn take_large(&mut self, link: &mut Link) -> Option<u32> {
        if link.large >= LARGE_PER_CLIENT {
            return None;
        }
        let buffer = self.large.pop()?;
        link.large += 1;
        Some(buffer)
    }

    pub fn take_small(&mut self) -> Option<u32> {
        self.small.pop()
    }

    /// Gives a buffer back; `link` is whoever took it. Nothing for [`NONE`].
    pub fn give_back(&mut self, link: &mut Link, buffer: u32) {
        if is_large(buffer) {
            link.large = link.large.saturating_sub(1);
            self.large.push(buffer);
        } else if buffer != NONE {
            self.small.push(buffer);
        }
    }

    /// The first `len` bytes of a buffer, for a work request.
    pub fn sge(&self, buffer: u32, len: usize) -> Sge {
        self.region.sge(offset(buffer) as u64, len as u32)
    }
}

const fn is_large(buffer: u32) -> bool {
    (buffer as usize) < LARGE_BUFFERS
}

/// Where a buffer begins in the region.
pub(super) const fn offset(buffer: u32) -> usize {
    let buffer = buffer as usize;
    match buffer.checked_sub(LARGE_BUFFERS) {
        None => buffer * LARGE_BYTES,
        Some(small) => LARGE_BUFFERS * LARGE_BYTES + small * SMALL_BYTES,
    }
}

/// Bytes of a buffer.
pub(super) const fn size(buffer: u32) -> usize {
    if is_large(buffer) {
        LARGE_BYTES
    } else {
        SMALL_BYTES
    }
}
