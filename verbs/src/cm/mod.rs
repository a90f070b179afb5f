//! Connections, in librdmacm's shape: identifiers, an event channel, resolve, connect, accept.
//!
//! As in librdmacm, an identifier that has a queue pair ([`CmId::create_qp`]) moves it through its states by
//! itself: `accept` and the answer to `connect` bring it to RTS, a disconnect to the error state.

mod channel;
mod connect;
mod id;

pub use channel::{CmEvent, EventChannel};
pub use connect::{ConnectOptions, Connection, connect, listen};
pub use id::{CmId, ConnParam};

pub(crate) use id::IdShared;
