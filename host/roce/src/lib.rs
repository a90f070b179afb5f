//! RoCEv2 (InfiniBand Architecture 1.4, annex A17): packet formats, the ICRC, connection-management MADs and the
//! transport's state machines. Nothing here does I/O, reads a clock or touches a user's memory.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod carrier;
pub mod checks;
pub mod icrc;
pub mod limits;
pub mod mad;
pub mod pcap;
pub mod transport;
pub mod wire;
