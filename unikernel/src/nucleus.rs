//! Calls into the nucleus, and its assembly.
#![allow(unsafe_code, reason = "the nucleus is assembly, entered by int3")]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

use crate::layout;

global_asm!(
    include_str!("asm/boot.s"),
    EXIT_PORT = const layout::EXIT_PORT,
    EXIT_FAILURE = const layout::EXIT_FAILURE,
    RING0_STACK_TOP = const layout::RING0_STACK_TOP,
    DOUBLE_FAULT_STACK_TOP = const layout::DOUBLE_FAULT_STACK_TOP,
    MAIN_STACK_TOP = const layout::MAIN_STACK_TOP,
    LAPIC = const layout::LAPIC,
    LAPIC_PHYS = const layout::LAPIC_PHYS,
    SVR = const 0x100 | layout::SPURIOUS_VECTOR,
    TSS_LOW = const layout::TSS & 0xffff,
    TSS_MID = const (layout::TSS >> 16) & 0xff,
    WAKE_VECTOR = const layout::WAKE_VECTOR,
    BAR0_PHYS = const layout::BAR0_PHYS,
    BAR2_PHYS = const layout::BAR2_PHYS,
    options(att_syntax)
);
global_asm!(
    include_str!("asm/nucleus.s"),
    LAPIC = const layout::LAPIC,
    SERVICE = const layout::SERVICE,
    DEVICE_GIB = const layout::DEVICE_GIB,
    NUCLEUS = const layout::NUCLEUS,
    REPORT_FRAME = const layout::REPORT_FRAME,
    EXIT_PORT = const layout::EXIT_PORT,
    EXIT_FAILURE = const layout::EXIT_FAILURE,
    options(att_syntax)
);
global_asm!(include_str!("asm/mem.s"), options(att_syntax));

/// Wake-ups from the host since boot. Only the nucleus's interrupt stub writes it.
#[unsafe(no_mangle)]
static HYV_WAKES: AtomicU64 = AtomicU64::new(0);

/// From how many bytes on memory functions use `rep movsb` and `rep stosb`; see `asm/mem.s`.
#[unsafe(no_mangle)]
static HYV_REP_MIN: AtomicU64 = AtomicU64::new(u64::MAX);

const HALT: u64 = layout::SERVICE;
const LINK: u64 = layout::SERVICE + 1;
const WRMSR: u64 = layout::SERVICE + 3;

fn service(number: u64, a: u64, b: u64) -> u64 {
    let result;
    // SAFETY: the nucleus changes the registers named here and no memory that Rust knows of except the wake
    // count; the services themselves are bounded by its own checks.
    unsafe {
        asm!(
            "int3",
            inlateout("rax") number => result,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            lateout("rcx") _,
            lateout("rdx") _,
        );
    }
    result
}

/// Wake-ups since boot.
pub(crate) fn wakes() -> u64 {
    HYV_WAKES.load(Ordering::Acquire)
}

/// Sleeps until a wake-up comes, or not at all if one came since `wakes()` was `seen`.
pub(crate) fn halt(seen: u64) {
    service(HALT, seen, 0);
}

/// Seals the page directory at `page` and makes it map the GiB `gib`; false if the page is not of the pool or
/// the GiB is mapped already.
pub(crate) fn link(page: u64, gib: u64) -> bool {
    service(LINK, page, gib) == 0
}

/// Writes a model-specific register. One that does not exist ends the guest with a report.
pub(crate) fn wrmsr(register: u32, value: u64) {
    service(WRMSR, u64::from(register), value);
}

/// Lets the memory functions use string instructions from `bytes` on.
pub(crate) fn set_rep_min(bytes: u64) {
    HYV_REP_MIN.store(bytes, Ordering::Relaxed);
}
