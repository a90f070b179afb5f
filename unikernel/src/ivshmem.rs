//! The HyV function on QEMU's `ivshmem-doorbell`: BAR 0 registers, BAR 1 MSI-X table, BAR 2 window.
//!
//! The firmware leaves BARs unassigned, so they get the addresses that the page tables already map, without sizing them.
#![allow(unsafe_code, reason = "device registers are memory at fixed addresses")]

use core::sync::atomic::{Ordering, fence};

use hyv_abi::window::{PEER_GUEST, PEER_HOST, WAKE_VECTOR, Window};
use pci_types::capability::PciCapability;
use pci_types::{EndpointHeader, PciHeader};

use crate::function::Function;
use crate::pci::{BAR, COMMAND, ConfigPorts, MEMORY_AND_MASTER, find, write};
use crate::{layout, pci};

/// Vendor 1af4, device 1110.
const ID: u32 = 0x1110_1af4;
/// Where hyv-host puts the function; looked at first.
const USUAL_SLOT: u8 = 4;

/// BAR 0: this guest's peer id.
const REG_POSITION: u64 = 8;
/// BAR 0: doorbell, `peer << 16 | vector`.
const REG_DOORBELL: u64 = 12;

fn register(bar: u64, offset: u64) -> *mut u32 {
    (bar + offset) as *mut u32
}

/// The function; its BARs are where `layout` says once `attach` has succeeded.
pub(crate) struct Ivshmem;

impl Ivshmem {
    /// Finds the function, assigns its BARs, and routes its interrupt.
    pub(crate) fn attach(&self) -> Result<(), &'static str> {
        let at = find(ID, USUAL_SLOT).ok_or(
            "no HyV function (ivshmem-doorbell, 1af4:1110) on PCI bus 0: start this image with hyv-host",
        )?;
        write(at, BAR, layout::BAR0_PHYS as u32);
        write(at, BAR + 4, layout::BAR1_PHYS as u32);
        write(at, BAR + 8, layout::BAR2_PHYS as u32);
        write(at, BAR + 12, (layout::BAR2_PHYS >> 32) as u32);
        write(at, COMMAND, MEMORY_AND_MASTER);

        let header = EndpointHeader::from_header(PciHeader::new(at), ConfigPorts)
            .ok_or("the ivshmem function has no endpoint header")?;
        let mut msix = header
            .capabilities(ConfigPorts)
            .find_map(|c| {
                if let PciCapability::MsiX(m) = c {
                    Some(m)
                } else {
                    None
                }
            })
            .ok_or("the ivshmem function has no MSI-X: start it with vectors=1")?;
        if msix.table_bar() != 1 || msix.table_offset() != 0 {
            return Err("the ivshmem function's MSI-X table is not at the start of BAR 1");
        }
        pci::route(layout::BAR1 + 16 * u64::from(WAKE_VECTOR));
        msix.set_enabled(true, ConfigPorts);

        // SAFETY: BAR 0 is mapped uncached.
        let position = unsafe { register(layout::BAR0, REG_POSITION).read_volatile() };
        if position != u32::from(PEER_GUEST) {
            return Err("the ivshmem function is not peer 1: its server is not hyv-host");
        }
        Ok(())
    }
}

impl Function for Ivshmem {
    fn window(&self) -> &'static Window {
        // SAFETY: BAR 2 is WINDOW_LEN bytes of memory, mapped here for good and aligned to 2 MiB; a
        // `Window` is atomics only, so the host's writes are no aliasing violation.
        unsafe { &*(layout::WINDOW as *const Window) }
    }

    fn kick(&self, vector: u32) {
        fence(Ordering::Release);
        // SAFETY: BAR 0 is mapped uncached; a write to the doorbell register signals the host and does
        // no more.
        unsafe {
            register(layout::BAR0, REG_DOORBELL)
                .write_volatile(u32::from(PEER_HOST) << 16 | vector);
        }
    }
}
