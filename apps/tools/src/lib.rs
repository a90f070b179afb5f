//! RDMA tools that run in a guest and on Linux alike: the exchanges of `ibv_*_pingpong` and `rping`, and latency loops.
#![no_std]

extern crate alloc;

pub mod perf;
pub mod pingpong;
pub mod rping;
pub mod words;
