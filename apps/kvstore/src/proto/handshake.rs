//! What client and server tell each other when a connection is made, in the CM's private data.
//!
//! REQ: protocol version (u8). REP: protocol version (u8), requests that may be outstanding (u8). REJ: [`Refusal`]
//! (u8), protocol version (u8).

/// Version of the messages in this module and its parent.
pub const PROTOCOL_VERSION: u8 = 1;

/// Why a server refused a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[repr(u8)]
pub enum Refusal {
    /// Another protocol version.
    #[error("the server speaks another protocol version: build client and server from one source")]
    Version = 1,
    /// As many clients as it takes.
    #[error("the server has as many clients as it takes: end one first")]
    TooMany = 2,
    /// Memory or device objects could not be had.
    #[error("the server is out of memory for connections: start it with more --memory")]
    NoResources = 3,
}

impl Refusal {
    /// The refusal in a reject's private data, if there is one.
    #[must_use]
    pub const fn parse(private: &[u8]) -> Option<Self> {
        Some(match private.first() {
            Some(1) => Self::Version,
            Some(2) => Self::TooMany,
            Some(3) => Self::NoResources,
            _ => return None,
        })
    }
}
