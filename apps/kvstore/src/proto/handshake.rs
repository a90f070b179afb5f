//! What client and server tell each other when a connection is made, in the CM's private data.
//!
//! REQ: [`Hello`]. REP: [`Welcome`]. REJ: [`Refusal`] (u8), protocol version (u8). The first byte of REQ and REP is the protocol
//! version, in every version.

use super::ProtoError;
use super::cursor::{Reader, Writer};

/// Version of the messages in this module and its parent.
pub const PROTOCOL_VERSION: u8 = 3;

/// Bytes of a [`Hello`].
pub const HELLO_BYTES: usize = 16;

/// Bytes of a [`Welcome`].
pub const WELCOME_BYTES: usize = 64;

/// The flag in a [`Hello`] for a lease.
const WITH_LEASE: u8 = 1;

/// What a client says when it connects.
///
/// | bytes | field |
/// | --- | --- |
/// | 0 | protocol version |
/// | 1 | 1: it wants a lease, for requests that execute once; 0: it does not |
/// | 2..8 | 0 |
/// | 8..16 | client: the id of an earlier connection's [`Welcome`], or 0 for a new one |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Whether it wants a lease.
    pub lease: bool,
    /// Its id, 0 for a new one.
    pub client: u64,
}

impl Hello {
    /// As it lies in the message.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0] = PROTOCOL_VERSION;
        bytes[1] = if self.lease { WITH_LEASE } else { 0 };
        bytes[8..].copy_from_slice(&self.client.to_le_bytes());
        bytes
    }

    /// Reads one; bytes after it are ignored, since some carriers pad. Errors: another version, cut off, or fields out of range.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProtoError> {
        let mut input = Reader { bytes };
        if input.u8()? != PROTOCOL_VERSION {
            return Err(ProtoError::Field("version"));
        }
        let flags = input.u8()?;
        if flags & !WITH_LEASE != 0 || input.take(6)? != [0; 6] {
            return Err(ProtoError::Field("flags"));
        }
        Ok(Self {
            lease: flags & WITH_LEASE != 0,
            client: input.u64()?,
        })
    }
}

/// Where clients READ the store themselves. The key gives read access to every table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogKey {
    /// Address of the region.
    pub addr: u64,
    /// Bytes of the region.
    pub len: u64,
    /// Key to it, for READs alone.
    pub rkey: u32,
}

/// What a server says when it accepts.
///
/// | bytes | field |
/// | --- | --- |
/// | 0 | protocol version |
/// | 1 | requests that may be outstanding |
/// | 2 | 1: the client's lease was there already |
/// | 3 | 1: there is a key to the store's region |
/// | 4..8 | lease, ms; 0: none |
/// | 8..16 | epoch |
/// | 16..24 | client |
/// | 24..32 | the server's time, ns since 1970 |
/// | 32..40 | region: address |
/// | 40..48 | region: bytes |
/// | 48..52 | region: key |
/// | 52..64 | 0 |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// Requests that the client may have outstanding.
    pub window: u8,
    /// Whether the server knew the client: results of its earlier requests are kept.
    pub known: bool,
    /// How long results are kept after the server last heard of the client, ms; 0: there is no lease.
    pub lease_ms: u32,
    /// A random number of the store's life: another one says that memory was lost.
    pub epoch: u64,
    /// The client's id.
    pub client: u64,
    /// The server's time when it accepted, ns since 1970: what expiries are compared with.
    pub now_ns: u64,
    /// Where the client may READ the store itself, if the server lets it.
    pub log: Option<LogKey>,
}

impl Welcome {
    /// As it lies in the message.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; WELCOME_BYTES] {
        let mut bytes = [0; WELCOME_BYTES];
        let log = self.log.unwrap_or(LogKey {
            addr: 0,
            len: 0,
            rkey: 0,
        });
        let mut out = Writer {
            out: &mut bytes,
            at: 0,
        };
        let head = [
            PROTOCOL_VERSION,
            self.window,
            u8::from(self.known),
            u8::from(self.log.is_some()),
        ];
        let written = out
            .put(&head)
            .and_then(|()| out.put(&self.lease_ms.to_le_bytes()))
            .and_then(|()| {
                [self.epoch, self.client, self.now_ns, log.addr, log.len]
                    .iter()
                    .try_for_each(|word| out.put(&word.to_le_bytes()))
            })
            .and_then(|()| out.put(&log.rkey.to_le_bytes()));
        debug_assert!(written.is_ok(), "it has its fixed size");
        bytes
    }

    /// Reads one; bytes after it are ignored. Errors: another version, cut off, or fields out of range.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProtoError> {
        let mut input = Reader { bytes };
        if input.u8()? != PROTOCOL_VERSION {
            return Err(ProtoError::Field("version"));
        }
        let window = input.u8()?;
        if window == 0 {
            return Err(ProtoError::Field("window"));
        }
        let flag = |raw: u8| match raw {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(ProtoError::Field("flags")),
        };
        let known = flag(input.u8()?)?;
        let readable = flag(input.u8()?)?;
        let lease_ms = input.u32()?;
        let (epoch, client, now_ns) = (input.u64()?, input.u64()?, input.u64()?);
        let log = LogKey {
            addr: input.u64()?,
            len: input.u64()?,
            rkey: input.u32()?,
        };
        input.take(12)?;
        Ok(Self {
            window,
            known,
            lease_ms,
            epoch,
            client,
            now_ns,
            log: readable.then_some(log),
        })
    }
}

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
    /// As many leases as there may be.
    #[error(
        "as many clients have leases as the server takes: those that ended keep theirs for a while; try again later"
    )]
    TooManyLeases = 4,
    /// The request to connect made no sense.
    #[error(
        "the server could not understand the request to connect: build client and server from one source"
    )]
    Malformed = 5,
}

impl Refusal {
    /// The refusal in a reject's private data, if there is one.
    #[must_use]
    pub const fn parse(private: &[u8]) -> Option<Self> {
        Some(match private.first() {
            Some(1) => Self::Version,
            Some(2) => Self::TooMany,
            Some(3) => Self::NoResources,
            Some(4) => Self::TooManyLeases,
            Some(5) => Self::Malformed,
            _ => return None,
        })
    }
}
