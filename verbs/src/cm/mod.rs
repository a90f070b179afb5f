//! Connections, in librdmacm's shape: identifiers, an event channel, resolve, connect, accept.
//!
//! As in librdmacm, an identifier that has a queue pair ([`CmId::create_qp`]) moves it through its states by
//! itself: `accept` and the answer to `connect` bring it to RTS, a disconnect to the error state.
//!
//! Datagrams have no connections; in [`hyv_abi::control::PortSpace::Udp`] an identifier finds out which queue pair serves behind
//! a port ([`find_datagram`]), or answers that ([`listen_datagram`]).

mod channel;
mod connect;
mod id;
mod reason;

pub use channel::{CmEvent, DatagramPeer, EventChannel};
pub use connect::{
    ConnectOptions, Connection, DatagramService, connect, find_datagram, listen, listen_datagram,
};
pub use id::{CmId, ConnParam, UDP_QKEY};
pub use reason::RejectReason;

pub(crate) use id::IdShared;
