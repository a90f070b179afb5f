//! A unikernel: what a guest needs to run one application over RDMA, and nothing else.
//!
//! An image is an application, this crate and the nucleus, linked by `linker/image.ld` into one static
//! ELF that
//! QEMU starts at its PVH note. Boot (assembly, ring 0) loads tables that were laid out at link time
//! and drops
//! to ring 3, where everything in this crate runs. What stays in ring 0 is the nucleus
//! (`asm/nucleus.s`, one page):
//! interrupts count, exceptions end in a report, and three services: halt, link a page directory,
//! access an MSR.
//!
//! | module | what is there |
//! | --- | --- |
//! | [`rt`] | arguments, waiting, shutdown, the host's heartbeat, exit |
//! | [`memory`] | heap, and the large zeroed region for the application |
//! | [`time`] | nanoseconds since boot, from the TSC |
//! | [`platform`] | the guest as surroundings of `hyv-verbs` |
//! | [`net`] | TCP/IP over virtio-net, for those who bring it up |
//! | [`function`] | the HyV function: window and doorbells, behind one trait |
//! | [`window`] | the window's header, checked |
//! | `layout` | the address space: a virtual address is an offset in the RAM file |
//!
//! Messages go through the [`log`] crate to a ring in the window that the host drains. One vCPU.
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//! hyv_unikernel::entry!(main);
//!
//! fn main() -> Result<(), &'static str> {
//!     hyv_unikernel::log::info!("hello, {}", hyv_unikernel::rt::args().text());
//!     Ok(())
//! }
//! ```
#![no_std]

extern crate alloc;

mod backtrace;
mod com1;
mod entry;
pub mod function;
mod ivshmem;
mod layout;
pub mod limits;
mod logring;
pub mod memory;
pub mod net;
mod nucleus;
mod paging;
mod pci;
pub mod platform;
mod port;
mod report;
pub mod rt;
mod start;
pub mod time;
mod virtio;
pub mod window;

pub use entry::Outcome;
pub use log;

#[doc(hidden)]
pub use entry::run;
