//! PCI configuration space through ports CF8 and CFC. One access is two port accesses of up to 50 us each.
#![allow(
    unsafe_code,
    reason = "configuration writes move devices; MSI-X entries are registers at fixed addresses"
)]

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use pci_types::{ConfigRegionAccess, PciAddress};

use crate::{layout, port};

/// Offset of the command register.
pub(crate) const COMMAND: u16 = 0x04;
/// Offset of the first BAR.
pub(crate) const BAR: u16 = 0x10;
/// Offset of the pointer to the first capability.
pub(crate) const CAPABILITIES: u16 = 0x34;
/// Memory decoding and bus mastering (an MSI is a write by the device).
pub(crate) const MEMORY_AND_MASTER: u32 = 0x6;

static ACCESSES: AtomicU32 = AtomicU32::new(0);

/// Accesses to configuration space so far.
pub(crate) fn accesses() -> u32 {
    ACCESSES.load(Relaxed)
}

/// Configuration space of bus 0 and on.
pub(crate) struct ConfigPorts;

impl ConfigPorts {
    fn select(address: PciAddress, offset: u16) {
        let at = 0x8000_0000
            | u32::from(address.bus()) << 16
            | u32::from(address.device()) << 11
            | u32::from(address.function()) << 8
            | u32::from(offset & 0xfc);
        ACCESSES.store(accesses() + 1, Relaxed);
        port::write32(0xcf8, at);
    }
}

impl ConfigRegionAccess for ConfigPorts {
    unsafe fn read(&self, address: PciAddress, offset: u16) -> u32 {
        Self::select(address, offset);
        port::read32(0xcfc)
    }

    unsafe fn write(&self, address: PciAddress, offset: u16, value: u32) {
        Self::select(address, offset);
        port::write32(0xcfc, value);
    }
}

/// Reads 32 bits.
pub(crate) fn read(address: PciAddress, offset: u16) -> u32 {
    // SAFETY: reading the header or a capability of a function has no side effect; an absent one reads as all ones.
    unsafe { ConfigPorts.read(address, offset) }
}

/// Writes 32 bits: for a driver's own function, its BARs (with addresses in the PCI hole that `layout` keeps for it), command register and
/// capabilities.
pub(crate) fn write(address: PciAddress, offset: u16, value: u32) {
    // SAFETY: see above; drivers in this crate keep to that.
    unsafe { ConfigPorts.write(address, offset, value) };
}

/// The function on bus 0 whose first register (device and vendor) is `id`. Looks at `usual` first.
pub(crate) fn find(id: u32, usual: u8) -> Option<PciAddress> {
    core::iter::once(usual)
        .chain((0..32).filter(|&slot| slot != usual))
        .map(|slot| PciAddress::new(0, 0, slot, 0))
        .find(|&at| read(at, 0) == id)
}

/// Makes the MSI-X entry at virtual address `entry`, which is in a mapped MSI-X table, raise the wake-up.
pub(crate) fn route(entry: u64) {
    let entry = entry as *mut u32;
    // SAFETY: an MSI-X table, mapped uncached; one entry is four 32-bit registers.
    unsafe {
        entry.write_volatile(layout::LAPIC_PHYS as u32);
        entry.add(1).write_volatile(0);
        entry.add(2).write_volatile(layout::WAKE_VECTOR);
        entry.add(3).write_volatile(0);
    }
}
