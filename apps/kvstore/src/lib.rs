//! A key-value store in log-structured memory, served over RDMA.
//!
//! | module | what it is | knows about |
//! | --- | --- | --- |
//! | [`store`] | the storage engine: log segments, hash table, cleaner | bytes in one region, nothing else |
//! | [`proto`] | requests and replies as bytes | the entry format of the log |
//! | [`client`] | asks a server, one request or many at a time | proto, verbs |
//! | [`server`] | answers requests over RC queue pairs | store, proto, verbs |
//! | [`status`] | what a running server shows to its host | server |
//! | [`probe`] | the cache-line ping-pong that latencies are compared with | |
//! | [`crc`] | the checksum of log entries | the CPU |
//! | [`limits`] | every bound of this crate, with its reason | |
#![no_std]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

pub mod client;
pub mod crc;
pub mod limits;
mod prefetch;
pub mod proto;
pub mod server;
pub mod status;
pub mod store;
