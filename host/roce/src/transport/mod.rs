//! The transport's state machines (IBA 1.4, sections 9.7 and 9.8): no memory, no I/O, no clock.
//!
//! | type | is |
//! | --- | --- |
//! | [`Requester`] | the sending half of a reliable or unreliable connection: which packet goes next, what answers mean |
//! | [`Responder`] | the receiving half of a reliable connection: what a request packet means, which answers go out |
//! | [`Unreliable`] | the receiving half of an unreliable connection |
//!
//! Whoever drives them owns the packets' bytes and the users' memory: it puts [`Segment`]s and [`Answer`]s into packets, and
//! calls with what it parsed out of packets that came in.

use crate::wire::{NakCode, Position};

mod psn;
mod requester;
mod responder;
mod unreliable;

pub use psn::Psn;
pub use requester::{Effect, Mark, Requester, RequesterConfig, Segment};
pub use responder::{Answer, Check, Go, Request, RequestOp, Responder, ResponderConfig};
pub use unreliable::{Unreliable, UnreliableCheck};

/// The position of packet `i` of `n`.
#[inline]
#[must_use]
pub const fn position(i: u32, n: u32) -> Position {
    match (i == 0, i + 1 == n) {
        (true, true) => Position::Only,
        (true, false) => Position::First,
        (false, true) => Position::Last,
        (false, false) => Position::Middle,
    }
}

/// An address in the peer's memory, with the key that opens it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Remote {
    /// Virtual address as the peer registered it.
    pub addr: u64,
    /// Remote key.
    pub rkey: u32,
}

/// What a message does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MessageKind {
    /// A SEND of any kind.
    Send,
    /// An RDMA WRITE.
    Write(Remote),
    /// An RDMA READ.
    Read(Remote),
    /// An atomic.
    Atomic(Remote),
}

impl MessageKind {
    /// Whether it is answered with data, and not merely acknowledged.
    #[inline]
    #[must_use]
    pub const fn is_answered(self) -> bool {
        matches!(self, Self::Read(_) | Self::Atomic(_))
    }
}

/// A message to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    /// What it does.
    pub kind: MessageKind,
    /// Bytes.
    pub len: u32,
    /// Not before earlier READs and atomics are answered.
    pub fence: bool,
}

/// Packets of a message of `len` bytes; one of no bytes takes one.
#[inline]
#[must_use]
pub const fn packets(len: u32, mtu: u32) -> u32 {
    if len == 0 { 1 } else { len.div_ceil(mtu) }
}

/// A responder's answer as a requester gets it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reply {
    /// All up to this PSN arrived.
    Ack {
        /// The last that did.
        psn: Psn,
    },
    /// No receive was posted for the request that begins here.
    RnrNak {
        /// The first packet not taken.
        psn: Psn,
        /// Code of the time to wait.
        timer: u8,
    },
    /// Refused.
    Nak {
        /// The packet in question; those before it arrived.
        psn: Psn,
        /// Why.
        code: NakCode,
    },
    /// Data of a READ.
    ReadData {
        /// Position.
        psn: Psn,
        /// Position in the answer to one request.
        position: Position,
        /// Bytes of payload.
        len: u32,
    },
    /// The answer to an atomic.
    AtomicValue {
        /// The atomic's.
        psn: Psn,
        /// What was there before.
        value: u64,
    },
}
