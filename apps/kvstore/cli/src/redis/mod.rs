//! The machine's Redis beside the store: a server of the measurement's own, a client, and `redis-benchmark`.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`server`] | starts `redis-server` on a socket and a port of its own, and ends it |
//! | [`resp`] | replies of the Redis protocol, version 2 |
//! | [`client`] | a pipelining client, as a [`Target`](crate::bench::target::Target) |
//! | [`benchmark`] | runs `redis-benchmark` and reads what it says |

pub mod benchmark;
pub mod client;
pub mod resp;
pub mod server;
