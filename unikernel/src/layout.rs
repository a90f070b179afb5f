//! Where everything lies in the guest's address space.
//!
//! A virtual address is an offset in the guest's RAM file (and, below the first RAM region's end, also the
//! guest-physical address). Devices lie in a GiB of their own at the top of the first half-terabyte.
//!
//! | address | what | ring 3 may |
//! | --- | --- | --- |
//! | `0x0` | null page | nothing |
//! | `0x1000` | what the loader left: command line, start info | read |
//! | `0x40000` | guard, then the exception reporter's stack | read, write |
//! | `0x80000`, `0xc0000` | firmware data | read |
//! | `0x100000` | guard, then the main stack up to `0x200000` | read, write |
//! | `0x200000` | nucleus: ring 0's code, descriptors, page tables, stacks | nothing |
//! | `0x210000` | image (`linker/image.ld`), page pool, heap, rest of RAM | by section |
//! | `0x7f_c000_0000` | device registers, window, local APIC (ring 0 only) | read, write |
//!
//! `linker/image.ld` repeats `NUCLEUS`, `IMAGE_AREA_END` and the size of the pool.

/// First byte of the nucleus, and of the area that boot maps with 4 KiB pages by section.
pub(crate) const NUCLEUS: u64 = 0x20_0000;
/// First byte of the image behind the nucleus.
pub(crate) const IMAGE_TEXT: u64 = NUCLEUS + 0x1_0000;
/// End of the area mapped with 4 KiB pages; from here up RAM is mapped with 2 MiB pages.
pub(crate) const IMAGE_AREA_END: u64 = 0x60_0000;
/// Ring 0's descriptors (GDT, TSS, IDT): one page.
pub(crate) const TSS: u64 = NUCLEUS + 0x1080;
/// Top of ring 0's stack: one page between two unmapped ones.
pub(crate) const RING0_STACK_TOP: u64 = NUCLEUS + 0xb000;
/// Top of the double fault's own stack: one page between two unmapped ones.
pub(crate) const DOUBLE_FAULT_STACK_TOP: u64 = NUCLEUS + 0xd000;
/// 64 KiB that fault, below the main stack.
pub(crate) const MAIN_GUARD: u64 = 0x10_0000;
/// Lowest byte of the main stack.
pub(crate) const MAIN_STACK_BOTTOM: u64 = 0x11_0000;
/// Top of the main stack.
pub(crate) const MAIN_STACK_TOP: u64 = NUCLEUS;
/// 64 KiB that fault, below the reporter's stack.
pub(crate) const REPORT_GUARD: u64 = 0x4_0000;
/// Lowest byte of the reporter's stack.
pub(crate) const REPORT_STACK_BOTTOM: u64 = 0x5_0000;
/// Where ring 0 leaves an exception's registers, and the top of the reporter's stack.
pub(crate) const REPORT_FRAME: u64 = 0x5_f000;

/// Bytes that one entry of a page directory maps.
pub(crate) const LARGE_PAGE: u64 = 2 << 20;
/// Bytes that one page directory maps.
pub(crate) const GIB: u64 = 1 << 30;

/// The GiB whose page directory maps devices.
pub(crate) const DEVICE_GIB: u64 = 511;
/// Virtual address of the device GiB.
pub(crate) const DEVICES: u64 = DEVICE_GIB * GIB;
/// Guest-physical address given to BAR 0 (registers). The 32-bit PCI hole of every QEMU machine that has
/// one includes it, whatever the size of RAM.
pub(crate) const BAR0_PHYS: u64 = 0xc000_0000;
/// Guest-physical address given to BAR 1 (the MSI-X table).
pub(crate) const BAR1_PHYS: u64 = 0xc000_1000;
/// Guest-physical address given to the first BAR of the network card; each of its BARs has [`NET_BAR`] bytes from here on.
pub(crate) const NET_PHYS: u64 = BAR0_PHYS + 0x1_0000;
/// Room for one BAR of the network card.
pub(crate) const NET_BAR: u64 = 0x1_0000;
/// Guest-physical address given to BAR 2 (the window): one 2 MiB page.
pub(crate) const BAR2_PHYS: u64 = 0xc020_0000;
/// Where BAR 0 is mapped, uncached.
pub(crate) const BAR0: u64 = DEVICES;
/// Where the network card's BARs are mapped, uncached.
pub(crate) const NET: u64 = DEVICES + (NET_PHYS - BAR0_PHYS);
/// Where BAR 1 is mapped, uncached.
pub(crate) const BAR1: u64 = DEVICES + 0x1000;
/// Where the window is mapped, write-back.
pub(crate) const WINDOW: u64 = DEVICES + LARGE_PAGE;
/// Where the local APIC is mapped, for ring 0.
pub(crate) const LAPIC: u64 = DEVICES + 2 * LARGE_PAGE;
/// Guest-physical address of the local APIC.
pub(crate) const LAPIC_PHYS: u64 = 0xfee0_0000;

/// Interrupt vector of the host's wake-up.
pub(crate) const WAKE_VECTOR: u32 = 0x30;
/// Vector of spurious interrupts of the local APIC; its low four bits must be ones.
pub(crate) const SPURIOUS_VECTOR: u32 = 0x3f;

/// `rax` of a service call is this plus the service's number: an `int3` that is none is a breakpoint
/// exception.
pub(crate) const SERVICE: u64 = 0x6879_7600;

/// The port of `isa-debug-exit`.
pub(crate) const EXIT_PORT: u16 = 0xf4;
/// Written to the port when the guest failed; QEMU exits with twice this plus one: 35.
pub(crate) const EXIT_FAILURE: u32 = 0x11;
/// Written to the port when the guest ended well; QEMU exits with twice this plus one: 33.
pub(crate) const EXIT_SUCCESS: u32 = 0x10;

const _: () = {
    assert!(BAR2_PHYS.is_multiple_of(LARGE_PAGE));
    // In the 2 MiB that are mapped for BAR 0.
    assert!(NET_PHYS + 6 * NET_BAR <= BAR0_PHYS + LARGE_PAGE);
    assert!(NUCLEUS == 0x20_0000); // asm/boot.s names 0x20 as the upper half of every handler's address
    assert!(IMAGE_AREA_END - NUCLEUS == 2 * LARGE_PAGE);
};
