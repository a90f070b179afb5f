//! TCP/IP for a unikernel, without I/O, clock or `unsafe` of its own.
//!
//! | module | what is there |
//! | --- | --- |
//! | [`virtq`] | the driver's side of a split virtqueue |
//! | [`card`] | virtio-net: frames in and out of two such queues |
//! | [`config`] | addresses as the command line gives them |
//! | [`stack`] | [`Net`]: smoltcp on a card, DHCP, and sleeping when nothing is to be done |
//! | [`tcp`] | [`TcpListener`] and [`TcpStream`], which block with time limits |
//!
//! Memory that the device shares is [`virtq::Shared`], a card is [`Nic`], time and sleep are [`Surroundings`]: a guest gives
//! the real ones, tests give fakes. One thread.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod card;
pub mod config;
mod error;
pub mod limits;
mod nic;
pub mod stack;
pub mod tcp;
pub mod virtq;

pub use config::Config;
pub use error::Error;
pub use nic::{Nic, Surroundings};
pub use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, IpEndpoint};
pub use stack::Net;
pub use tcp::{TcpListener, TcpStream};
