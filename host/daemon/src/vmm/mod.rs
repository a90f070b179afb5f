//! One guest: its QEMU, its memory, its window, its end.
//!
//! [`Qemu::launch`] creates the memory and the window, starts QEMU on them and leaves a supervisor thread that beats the window's
//! heart, drains the guest's log, answers for time limits and finds out how the guest ended ([`ExitReport`]). All that
//! QEMU is given (RAM, window, monitor, console) are inherited descriptors without a name, so nothing is left behind however
//! either process ends.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | what a guest is started with, and QEMU's command line |
//! | [`layout`] | where q35 puts RAM, and the window's header |
//! | [`ivshmem`] | the server's side of `ivshmem-doorbell` |
//! | [`net`] | the guest's network card, and its addresses |
//! | [`qmp`] | QEMU's monitor: exit counters, thread ids |
//! | [`console`] | COM1, the log ring, and what is shown of them |
//! | [`symbols`] | addresses of a backtrace turned into functions and lines |
//! | [`exit`] | how a guest ended |

pub mod config;
pub mod console;
pub mod exit;
pub mod ivshmem;
pub mod layout;
pub mod net;
mod qemu;
pub mod qmp;
mod supervisor;
pub mod symbols;

pub use config::{ConfigError, GuestConfig};
pub use exit::{Ending, ExitReport};
pub use net::{Forward, GuestIp, NetConfig, NetError};
pub use qemu::{LaunchError, Qemu, WaitError};
pub use qmp::{QmpError, VcpuStats};
