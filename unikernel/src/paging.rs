//! Maps RAM above the first GiB: fills page directories of the pool and has the nucleus seal and link them.
#![allow(unsafe_code, reason = "writes page directories")]

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hyv_abi::window::MAX_REGIONS;

use crate::window::Region;
use crate::{layout, nucleus};

/// Present, writable, user, accessed, dirty, 2 MiB, no-execute.
const LARGE: u64 = 0x8000_0000_0000_00e7;
const ENTRIES: usize = 512;

unsafe extern "C" {
    #[link_name = "hyv_pool"]
    static POOL: u8;
}

/// RAM as [`map_ram`] was told: guest-physical address, length, offset. A length of 0 is no region.
static REGIONS: [[AtomicU64; 3]; MAX_REGIONS] =
    [const { [const { AtomicU64::new(0) }; 3] }; MAX_REGIONS];

/// Guest-physical address of `len` bytes of RAM at virtual address `at`: what a device is told. None where they are not contiguous.
pub(crate) fn device_address(at: u64, len: u64) -> Option<u64> {
    let end = at.checked_add(len)?;
    REGIONS.iter().find_map(|region| {
        let [guest_addr, region_len, offset] = region.each_ref().map(|w| w.load(Relaxed));
        let inside = at >= offset && end <= offset + region_len;
        inside.then(|| guest_addr + (at - offset))
    })
}

fn pool() -> u64 {
    (&raw const POOL) as u64
}

/// Guest-physical address of the 2 MiB at `offset` of the RAM file; none where the RAM does not fill them.
fn physical(regions: &[Region], offset: u64) -> Option<u64> {
    let r = regions
        .iter()
        .find(|r| (r.file_offset..r.file_offset + r.len).contains(&offset))?;
    let within = offset - r.file_offset;
    (r.len - within >= layout::LARGE_PAGE).then(|| r.guest_addr + within)
}

/// Makes all of `ram_len` bytes readable and writable at their offsets. `ram_len` is within the pool's reach.
pub(crate) fn map_ram(regions: &[Region], ram_len: u64) -> Result<(), &'static str> {
    for (keep, r) in REGIONS.iter().zip(regions) {
        for (word, value) in keep.iter().zip([r.guest_addr, r.len, r.file_offset]) {
            word.store(value, Relaxed);
        }
    }
    for gib in 1..ram_len.div_ceil(layout::GIB) {
        let directory = pool() + (gib - 1) * 4096;
        // SAFETY: page `gib - 1` of the pool is mapped, zero, used by nobody else, and not linked yet.
        let entries = unsafe { &mut *(directory as *mut [u64; ENTRIES]) };
        for (i, entry) in (0..).zip(entries.iter_mut()) {
            if let Some(p) = physical(regions, gib * layout::GIB + i * layout::LARGE_PAGE) {
                *entry = p | LARGE;
            }
        }
        if !nucleus::link(directory, gib) {
            return Err("the nucleus refused a page directory");
        }
    }
    Ok(())
}
