//! Errors of control verbs and of posting.

use core::fmt;

use hyv_abi::control::{CmEventKind, Opcode};
use hyv_abi::types::{Errno, VerbError};

use crate::cm::RejectReason;
use crate::platform::HostGone;

/// Why a control verb failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Error {
    /// The device refused: its errno and its reason.
    Verb(VerbError),
    /// There is no host any more.
    HostGone,
    /// The host lives but did not answer a control verb in time.
    NoAnswer {
        /// Which.
        verb: Opcode,
    },
    /// The host answered a control verb with something that is not its reply.
    BadReply {
        /// Which.
        verb: Opcode,
    },
    /// There is no window, or it is of another ABI version.
    BadWindow {
        /// Version found; 0 if the window is not set up at all.
        version: u32,
    },
    /// The platform has a context already.
    AlreadyOpen,
    /// Shared memory is exhausted.
    OutOfMemory {
        /// Bytes asked for.
        len: usize,
    },
    /// Memory to register is not in the RAM that the device reaches.
    NotShared,
    /// A queue size that no ring can have.
    BadSize {
        /// What was too large or too small.
        what: &'static str,
        /// What was asked for.
        asked: u32,
        /// What is possible.
        max: u32,
    },
    /// An object is still in use by another one.
    InUse,
    /// Objects of different contexts were to work together.
    OtherContext,
    /// Private data is longer than its message can carry.
    PrivateData {
        /// Bytes given.
        len: usize,
        /// Bytes that fit.
        max: usize,
    },
    /// The identifier has no queue pair, or it was destroyed.
    NoQueuePair,
    /// The peer refused the connection.
    Rejected {
        /// Why.
        reason: RejectReason,
        /// The first bytes of its private data, zeros where there are fewer.
        private: [u8; 8],
    },
    /// A connection could not be made.
    Connection {
        /// The event that said so.
        event: CmEventKind,
        /// Its status.
        status: u32,
    },
    /// A time limit passed.
    Timeout,
}

impl Error {
    /// The errno that ibverbs would give.
    #[must_use]
    pub fn errno(&self) -> u32 {
        match self {
            Self::Verb(e) => e.errno as u32,
            Self::HostGone => 19,
            Self::NoAnswer { .. } | Self::Timeout => 110,
            Self::BadReply { .. } => 71,
            Self::BadWindow { .. } => Errno::ProtoNoSupport as u32,
            Self::AlreadyOpen | Self::InUse => Errno::Busy as u32,
            Self::OutOfMemory { .. } => Errno::NoMem as u32,
            Self::NotShared => Errno::Fault as u32,
            Self::BadSize { .. }
            | Self::PrivateData { .. }
            | Self::NoQueuePair
            | Self::OtherContext => Errno::Inval as u32,
            Self::Rejected { .. } => Errno::ConnRefused as u32,
            Self::Connection { .. } => Errno::HostUnreach as u32,
        }
    }
}

impl From<VerbError> for Error {
    fn from(e: VerbError) -> Self {
        Self::Verb(e)
    }
}

impl From<HostGone> for Error {
    fn from(_: HostGone) -> Self {
        Self::HostGone
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Verb(e) => e.fmt(f),
            Self::HostGone => HostGone.fmt(f),
            Self::NoAnswer { verb } => write!(
                f,
                "hyv-host did not answer {verb:?} in time: it is stopped or overloaded; see its log"
            ),
            Self::BadReply { verb } => write!(
                f,
                "hyv-host's answer to {verb:?} makes no sense: rebuild both sides from one source"
            ),
            Self::BadWindow { version: 0 } => {
                f.write_str("the window is not set up: was it made by hyv-host?")
            }
            Self::BadWindow { version } => write!(
                f,
                "hyv-host speaks ABI version {version}, this program version {}: rebuild both from one source",
                hyv_abi::ABI_VERSION
            ),
            Self::AlreadyOpen => f.write_str("this platform has a context already: clone that one"),
            Self::OutOfMemory { len } => write!(
                f,
                "no {len} bytes of shared memory left: give the program more of it, or register less"
            ),
            Self::NotShared => {
                f.write_str("the memory is not in the RAM that the device reaches: use alloc_mr")
            }
            Self::BadSize { what, asked, max } => {
                write!(f, "{what}: {asked} is not possible, at most {max}")
            }
            Self::InUse => f.write_str("other objects still use it: destroy those first"),
            Self::OtherContext => f.write_str(
                "the objects belong to different contexts: make them all on clones of one",
            ),
            Self::PrivateData { len, max } => {
                write!(
                    f,
                    "private data of {len} bytes, but the message carries at most {max}"
                )
            }
            Self::NoQueuePair => {
                f.write_str("the connection identifier has no queue pair: call create_qp first")
            }
            Self::Rejected { reason, .. } => {
                write!(f, "the peer refused the connection: {reason}")
            }
            Self::Connection { event, status } => {
                write!(f, "the connection could not be made: {event:?}")?;
                match Errno::ALL.into_iter().find(|e| *e as u32 == *status) {
                    Some(errno) => write!(f, ", {errno:?} (status {status})"),
                    None => write!(f, " (status {status})"),
                }
            }
            Self::Timeout => f.write_str("the time limit passed"),
        }
    }
}

impl core::error::Error for Error {}

/// Why a work request was not posted. Nothing was changed then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PostError {
    /// The ring has no room: poll the completion queue first (ENOMEM in ibverbs).
    QueueFull,
    /// More SGEs than the queue pair was made for.
    TooManySges,
    /// More inline data than the queue pair was made for.
    InlineTooLong,
    /// The opcode cannot carry this payload: inline data for a READ, not exactly one SGE for an atomic, or any for a bind or an
    /// invalidate.
    BadPayload,
    /// The queue pair's state does not take such work requests yet.
    BadState,
    /// The queue pair's type has no such operation: a READ of unreliable ones, or datagrams where there is a connection.
    BadOperation,
    /// The queue pair takes its receives from a shared queue.
    SharedReceives,
}

impl fmt::Display for PostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QueueFull => "the work queue is full: poll its completion queue first",
            Self::TooManySges => "more SGEs than the queue pair was made for",
            Self::InlineTooLong => "more inline data than the queue pair was made for",
            Self::BadPayload => "this opcode cannot carry this payload",
            Self::BadState => {
                "the queue pair is not in a state for it: bring it to INIT, RTR and RTS first"
            }
            Self::BadOperation => "this type of queue pair has no such operation",
            Self::SharedReceives => {
                "the queue pair takes receives from a shared queue: post them there"
            }
        })
    }
}

impl core::error::Error for PostError {}

/// Why the rest of a list was not posted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PostListError {
    /// How many of the list were posted: the index of the one that was not.
    pub posted: usize,
    /// Why that one was not.
    pub error: PostError,
}

impl fmt::Display for PostListError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "work request {} of the list: {}",
            self.posted, self.error
        )
    }
}

impl core::error::Error for PostListError {}
