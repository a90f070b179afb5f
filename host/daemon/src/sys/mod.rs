//! The operating system, wrapped: what needs `unsafe` or raw descriptors is here, and small.
//!
//! | module | what it wraps |
//! | --- | --- |
//! | [`memory`] | sealed memfds and shared mappings |
//! | [`window`] | the window of one user, mapped |
//! | [`event`] | eventfds |
//! | [`socket`] | unix sockets that pass descriptors |
//! | [`tap`] | Ethernet interfaces whose other end is a descriptor |
//! | [`cpu`] | CPU numbers and pinning |
//! | [`clock`] | monotonic time and the TSC |
//! | [`process`] | children that die with this process |
//! | [`runtime_dir`] | one private folder per instance |

pub mod clock;
pub mod cpu;
pub mod event;
pub mod memory;
pub mod process;
pub mod runtime_dir;
pub mod socket;
pub mod tap;
pub mod window;
