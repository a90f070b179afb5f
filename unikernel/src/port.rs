//! Port I/O. Ring 3 reaches the ports that the TSS's bitmap (`asm/boot.s`) names and faults on all others.
//! Where KVM has no hardware under it, each access costs 30 to 50 us.
#![allow(unsafe_code, reason = "port instructions are inline assembly")]

use core::arch::asm;

/// Reads a byte.
pub(crate) fn read8(port: u16) -> u8 {
    let v: u8;
    // SAFETY: the ports that the bitmap allows belong to devices that never touch RAM.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") v, options(nomem, nostack, preserves_flags));
    };
    v
}

/// Writes a byte.
pub(crate) fn write8(port: u16, v: u8) {
    // SAFETY: as for `read8`.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") v, options(nomem, nostack, preserves_flags));
    };
}

/// Reads 32 bits.
pub(crate) fn read32(port: u16) -> u32 {
    let v: u32;
    // SAFETY: as for `read8`.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") v, options(nomem, nostack, preserves_flags));
    };
    v
}

/// Writes 32 bits. Not `nomem`: the write to the exit port must come after all stores to the window.
pub(crate) fn write32(port: u16, v: u32) {
    // SAFETY: as for `read8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") v, options(nostack, preserves_flags)) };
}
