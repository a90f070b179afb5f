//! How a guest ends that cannot go on: exceptions and panics. The report goes to the log ring and to COM1.
//!
//! Its form, for whoever reads it: a first line `exception: ...` or `panicked at FILE:LINE:COL:
//! MESSAGE`, the registers
//! of an exception, then lines `  at 0x...`, innermost first: each an address *inside* the instruction
//! that faulted or called, so a symboliser needs no adjustment.
#![allow(
    unsafe_code,
    reason = "the nucleus jumps here by symbol and leaves the registers in memory"
)]

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use hyv_abi::window::UserState;

use crate::com1::Com1;
use crate::{backtrace, layout, logring, memory, rt};

/// What the nucleus leaves at `REPORT_FRAME`, in its order.
#[repr(C)]
struct Frame {
    cr2: u64,
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rbp: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rbx: u64,
    rax: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Log ring and COM1 at once, a line at a time.
struct Sink {
    line: [u8; 512],
    len: usize,
}

impl Sink {
    const fn new() -> Self {
        Self {
            line: [0; 512],
            len: 0,
        }
    }

    fn flush(&mut self) {
        let line = &self.line[..self.len];
        logring::write(log::Level::Error, line);
        crate::com1::write(line);
        let _ = Com1.write_str("\n");
        self.len = 0;
    }
}

impl Write for Sink {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for &b in s.as_bytes() {
            if b == b'\n' {
                self.flush();
                continue;
            }
            // Break over-long lines, but not inside a character.
            if self.len >= self.line.len() - 4 && (b & 0xc0) != 0x80 {
                self.flush();
            }
            if self.len < self.line.len() {
                self.line[self.len] = b;
                self.len += 1;
            }
        }
        Ok(())
    }
}

const NAMES: [&str; 32] = [
    "divide error",
    "debug",
    "NMI",
    "breakpoint",
    "overflow",
    "bound range",
    "invalid opcode",
    "no coprocessor",
    "double fault",
    "coprocessor overrun",
    "invalid TSS",
    "segment not present",
    "stack segment",
    "general protection",
    "page fault",
    "vector 15",
    "x87 floating point",
    "alignment check",
    "machine check",
    "SIMD floating point",
    "virtualisation",
    "control protection",
    "vector 22",
    "vector 23",
    "vector 24",
    "vector 25",
    "vector 26",
    "vector 27",
    "hypervisor injection",
    "VMM communication",
    "security",
    "vector 31",
];

/// What lies at a faulting address, in words a reader can act on.
fn place(address: u64, ram_end: u64) -> &'static str {
    match address {
        0..0x1000 => "null pointer",
        0x1000..layout::REPORT_GUARD => "near the null pointer, what the loader left",
        layout::MAIN_GUARD..layout::MAIN_STACK_BOTTOM => {
            "stack overflow: the guard below the main stack"
        }
        layout::REPORT_GUARD..layout::REPORT_STACK_BOTTOM => "the guard below the report's stack",
        layout::NUCLEUS..layout::IMAGE_TEXT => "the nucleus",
        a if (layout::IMAGE_TEXT..memory::image_end()).contains(&a) => "the image",
        a if (layout::DEVICES..layout::DEVICES + layout::GIB).contains(&a) => "the device area",
        a if a >= ram_end => "beyond RAM",
        _ => "RAM",
    }
}

/// Ring 3's end of an exception: `frame` is `REPORT_FRAME`. Runs on its own stack.
#[unsafe(no_mangle)]
extern "C" fn hyv_report(frame: *const Frame) -> ! {
    // SAFETY: the nucleus filled the frame before it came here, and nothing else writes it.
    let f = unsafe { &*frame };
    let mut out = Sink::new();
    let _ = report_exception(&mut out, f);
    out.flush();
    rt::end(UserState::Panicked, rt::EXIT_EXCEPTION)
}

fn report_exception(out: &mut Sink, f: &Frame) -> fmt::Result {
    let name = NAMES.get(f.vector as usize).copied().unwrap_or("unknown");
    write!(
        out,
        "exception: {name} (vector {}, error {:#x}) at {:#018x}",
        f.vector, f.error, f.rip
    )?;
    if f.vector == 14 {
        let doing = match (f.error & 0x10 != 0, f.error & 2 != 0) {
            (true, _) => "executing",
            (false, true) => "writing",
            (false, false) => "reading",
        };
        write!(
            out,
            ", {doing} {:#018x} ({})",
            f.cr2,
            place(f.cr2, rt::ram_len())
        )?;
    }
    if f.cs & 3 == 0 {
        out.write_str(", in ring 0: the nucleus itself")?;
    }
    writeln!(out)?;
    writeln!(
        out,
        "  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}",
        f.rax, f.rbx, f.rcx, f.rdx
    )?;
    writeln!(
        out,
        "  rsi {:016x} rdi {:016x} rbp {:016x} rsp {:016x}",
        f.rsi, f.rdi, f.rbp, f.rsp
    )?;
    writeln!(
        out,
        "  r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}",
        f.r8, f.r9, f.r10, f.r11
    )?;
    writeln!(
        out,
        "  r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}",
        f.r12, f.r13, f.r14, f.r15
    )?;
    writeln!(out, "  flags {:x} cs {:x} ss {:x}", f.rflags, f.cs, f.ss)?;
    write!(out, "  at {:#018x}", f.rip)?;
    backtrace::walk(f.rbp, |a| {
        let _ = write!(out, "\n  at {a:#018x}");
    });
    Ok(())
}

static PANICKING: AtomicBool = AtomicBool::new(false);

#[cfg(not(test))]
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if PANICKING.swap(true, Ordering::Relaxed) {
        // The message's own formatting panicked.
        crate::com1::write(b"panicked while panicking\n");
        rt::end(UserState::Panicked, rt::EXIT_PANIC)
    }
    let mut out = Sink::new();
    let _ = match info.location() {
        Some(l) => write!(out, "panicked at {l}: {}", info.message()),
        None => write!(out, "panicked: {}", info.message()),
    };
    // The standard library's words when an allocation fails that cannot be refused.
    let refused = out.line[..out.len]
        .windows(20)
        .any(|w| w == b"memory allocation of");
    if let Some(f) = memory::last_failure().filter(|_| refused) {
        let _ = write!(
            out,
            "\nthe heap is exhausted: {} bytes asked for, {} of {} in use; give the guest more --memory",
            f.asked, f.in_use, f.size
        );
    }
    backtrace::walk(backtrace::frame_pointer(), |a| {
        let _ = write!(out, "\n  at {a:#018x}");
    });
    out.flush();
    rt::end(UserState::Panicked, rt::EXIT_PANIC)
}
