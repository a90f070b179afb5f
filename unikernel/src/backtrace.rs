//! Walks frame pointers. Addresses come out raw: the image carries no symbols, the host has them beside it.
#![allow(unsafe_code, reason = "reads saved frame pointers from the stack")]

use core::arch::asm;

use crate::{layout, limits};

/// The caller's frame pointer.
#[inline(always)]
pub(crate) fn frame_pointer() -> u64 {
    let rbp;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) rbp, options(nomem, nostack, preserves_flags)) };
    rbp
}

fn on_a_stack(rbp: u64) -> bool {
    rbp.is_multiple_of(8)
        && ((layout::MAIN_STACK_BOTTOM..layout::MAIN_STACK_TOP - 15).contains(&rbp)
            || (layout::REPORT_STACK_BOTTOM..layout::REPORT_FRAME - 15).contains(&rbp))
}

/// Calls `f` with an address inside each calling instruction, innermost first, from the frame at `rbp` on.
pub(crate) fn walk(mut rbp: u64, mut f: impl FnMut(u64)) {
    for _ in 0..limits::MAX_FRAMES {
        if !on_a_stack(rbp) {
            return;
        }
        let frame = rbp as *const u64;
        // SAFETY: both words lie in a stack that is mapped; what they say is checked before use.
        let (next, ret) = unsafe { (frame.read_volatile(), frame.add(1).read_volatile()) };
        if ret == 0 {
            return;
        }
        f(ret - 1);
        if next <= rbp {
            return;
        }
        rbp = next;
    }
}
