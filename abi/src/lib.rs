//! The contract between a *user* of the RDMA device (a guest, or a Linux process that is treated as a
//! guest without a VM) and `hyv-host`.
//!
//! | module | what crosses |
//! | --- | --- |
//! | [`window`] | the 2 MiB shared page: header, events, doorbells, log ring |
//! | [`queue`] | work-queue and completion-queue entries, in the user's RAM |
//! | [`doorbell`] | who polls what, and how nobody misses a doorbell |
//! | [`control`] | control verbs: one table of requests and replies |
//! | [`types`] | states, access flags, statuses, attribute masks |
//! | [`session`] | what the unix socket of a native process says |
//!
//! Addresses that cross are *RAM offsets*: byte offsets into the file that is the user's memory. Every
//! layout is asserted at compile time. Both sides read each shared word once, into a local.
#![no_std]
#![forbid(unsafe_code)]

pub mod control;
pub mod doorbell;
pub mod queue;
pub mod session;
pub mod sync;
pub mod types;
#[cfg(not(loom))]
pub mod window;

/// Version of everything in this crate. Both sides refuse to talk to another one.
pub const ABI_VERSION: u32 = 4;
