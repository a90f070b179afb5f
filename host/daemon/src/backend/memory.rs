//! A user's memory: its window and its RAM, and the RAM as the control queue's implementation wants to see it.
#![allow(
    unsafe_code,
    reason = "lends a shared mapping to the virtqueue implementation"
)]

use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::sys::memory::Mapping;
use crate::sys::window::SharedWindow;

/// What a user and this process share. Cheap to clone; the memory stays mapped until the last clone is dropped.
#[derive(Clone, Debug)]
pub struct UserMemory {
    /// The window.
    pub window: Arc<SharedWindow>,
    /// All of the RAM; a RAM offset is an offset into it.
    pub ram: Arc<Mapping>,
}

/// RAM by RAM offset, for the virtqueue implementation: one region at 0.
#[derive(Debug)]
pub(super) struct RamView {
    memory: GuestMemoryMmap<()>,
    /// Keeps what `memory` points to mapped.
    ram: Arc<Mapping>,
}

impl RamView {
    /// A view of all of `ram`, or what is wrong with it.
    pub(super) fn new(ram: Arc<Mapping>) -> Result<Self, String> {
        let builder = MmapRegionBuilder::<()>::new(ram.len())
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED);
        // SAFETY: `ram` maps that many bytes, readable and writable, at a 2 MiB-aligned address, and lives as long as
        // the region because both are fields of this structure. Others change the memory at any time; the region is
        // only accessed by volatile copies and atomics.
        let builder = unsafe { builder.with_raw_mmap_pointer(ram.as_ptr()) };
        let region = builder.build().map_err(|e| e.to_string())?;
        let region = GuestRegionMmap::new(region, GuestAddress(0))
            .ok_or("RAM reaches past the address space")?;
        let memory = GuestMemoryMmap::from_regions(vec![region]).map_err(|e| e.to_string())?;
        Ok(Self { memory, ram })
    }

    /// As the virtqueue implementation wants it.
    pub(super) fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Bytes.
    pub(super) fn len(&self) -> u64 {
        self.ram.len() as u64
    }
}
