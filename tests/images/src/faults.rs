//! Every way to do wrong: each must end in a report, never in silence and never in a hang.
#![allow(unsafe_code, reason = "these tests break rules on purpose")]

use alloc::format;
use core::arch::asm;

use crate::Verdict;

/// In `.rodata`, with an address of its own.
static CONSTANT: [u64; 4] = [0x1111, 0x2222, 0x3333, 0x4444];

fn poke(address: u64) {
    // SAFETY: meant to fault; nothing runs after it if it does, and the test fails if it does not.
    unsafe { (address as *mut u64).write_volatile(0xdead) };
}

fn peek(address: u64) -> u64 {
    // SAFETY: as for `poke`.
    unsafe { (address as *const u64).read_volatile() }
}

#[inline(never)]
fn dig(depth: u64) -> u64 {
    let mut room = [depth; 64];
    core::hint::black_box(&mut room);
    if depth == u64::MAX {
        0
    } else {
        dig(depth + 1) + room[(depth % 64) as usize]
    }
}

/// Does the wrong that `name` says. Returns only when it went unpunished, or is unknown.
pub(crate) fn run(name: &str) -> Verdict {
    match name {
        "panic" => panic!("as asked, with a number: {}", 42),
        "index" => {
            let v: [u8; 4] = core::hint::black_box([1, 2, 3, 4]);
            let i = core::hint::black_box(7);
            hyv_unikernel::log::info!("{}", v[i]);
        }
        "null" => poke(8),
        "nullread" => drop(peek(0)),
        "text" => poke(run as *const () as u64),
        "rodata" => poke((&raw const CONSTANT) as u64),
        "nucleus" => poke(0x20_1000),
        "nucleusread" => drop(peek(0x20_2000)),
        "lapic" => drop(peek((511 << 30) + (4 << 20) + 0x20)),
        "jump" => {
            // `ret`, in writable memory.
            let mut code = [0xc3_u8; 16];
            core::hint::black_box(&mut code);
            // SAFETY: meant to fault at the call.
            unsafe { core::mem::transmute::<*const u8, extern "C" fn()>(code.as_ptr())() };
        }
        "stack" => drop(core::hint::black_box(dig(0))),
        "beyond" => poke((2 << 30) + (hyv_unikernel::rt::ram_len().next_multiple_of(1 << 30))),
        "noncanonical" => drop(peek(0x8000_0000_0000_0000)),
        // SAFETY: meant to fault: privileged in ring 3.
        "hlt" => unsafe { asm!("hlt") },
        // SAFETY: as for `hlt`.
        "cli" => unsafe { asm!("cli") },
        // SAFETY: as for `hlt`.
        "cr3" => unsafe { asm!("mov cr3, {}", in(reg) 0_u64) },
        // SAFETY: as for `hlt`.
        "rdmsr" => unsafe { asm!("rdmsr", in("ecx") 0x1b, out("eax") _, out("edx") _) },
        // SAFETY: a port that the bitmap does not name (the keyboard's, which could reset the machine).
        "port" => unsafe { asm!("out dx, al", in("dx") 0x64_u16, in("al") 0xfe_u8) },
        // SAFETY: a port beyond the bitmap.
        "highport" => unsafe { asm!("in al, dx", in("dx") 0xfff0_u16, out("al") _) },
        // SAFETY: no service: a breakpoint.
        "int3" => unsafe { asm!("int3", in("rax") 0) },
        // SAFETY: an undefined instruction.
        "ud2" => unsafe { asm!("ud2") },
        // SAFETY: division by zero.
        "divide" => unsafe {
            asm!("div {0:e}", in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _);
        },
        // SAFETY: link service with a page that is not of the pool: refused with -1, and nothing happens.
        "link" => {
            let answer: u64;
            // SAFETY: as said.
            unsafe {
                asm!("int3", inlateout("rax") 0x6879_7601_u64 => answer, inlateout("rdi") 0x21_0000_u64 => _,
                     inlateout("rsi") 1_u64 => _, lateout("rcx") _, lateout("rdx") _);
            }
            return if answer == u64::MAX {
                Ok(())
            } else {
                Err(format!("the nucleus answered {answer:#x}"))
            };
        }
        "msr" => {
            let answer: u64;
            // SAFETY: a register that does not exist: a general protection fault inside the nucleus.
            unsafe {
                asm!("int3", inlateout("rax") 0x6879_7602_u64 => answer, inlateout("rdi") 0xdead_u64 => _,
                     inlateout("rsi") 0_u64 => _, lateout("rcx") _, lateout("rdx") _);
            }
            // TCG and a KVM told to ignore such accesses answer zero.
            return if answer == 0 {
                Ok(())
            } else {
                Err(format!("no such register, and it says {answer:#x}"))
            };
        }
        // SAFETY: a stack pointer into the null page, then an exception: the nucleus has a stack of its own.
        "rsp" => unsafe { asm!("mov rsp, 64", "push rax", options(noreturn)) },
        _ => return Err(format!("there is no test of this name: {name}")),
    }
    Err(format!("{name} went unpunished"))
}
