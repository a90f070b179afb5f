//! Why bytes are no message.

use super::Status;
use crate::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES};
use thiserror::Error;

/// Why bytes are no message, or a message does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProtoError {
    /// The message ends before its fields do.
    #[error("message cut off: {needed} more bytes expected")]
    Truncated {
        /// Bytes missing.
        needed: usize,
    },
    /// Bytes follow the last field.
    #[error("{bytes} bytes after the end of the message")]
    Trailing {
        /// Bytes too many.
        bytes: usize,
    },
    /// No such operation.
    #[error("unknown operation {0}")]
    UnknownOp(u8),
    /// Flags that do not exist or do not go with the operation.
    #[error("flags {0:#04x} are unknown or do not go with the operation")]
    Flags(u8),
    /// A field that must be zero is not, or one is out of its range.
    #[error("field `{0}` is out of its range")]
    Field(&'static str),
    /// The key has no bytes.
    #[error("the key is empty; a key has 1 to {MAX_KEY_BYTES} bytes")]
    EmptyKey,
    /// The key is too long to travel inside a message.
    #[error(
        "a key of {bytes} bytes cannot travel inside a message (limit {EAGER_KEY_BYTES}); send its address"
    )]
    KeyNotEager {
        /// Bytes of the key.
        bytes: usize,
    },
    /// The value is too long to travel inside a message.
    #[error(
        "a value of {bytes} bytes cannot travel inside a message (limit {EAGER_VALUE_BYTES}); send its address"
    )]
    ValueNotEager {
        /// Bytes of the value.
        bytes: usize,
    },
    /// The value exceeds what the store takes at all.
    #[error("the value has {bytes} bytes; the limit is {MAX_VALUE_BYTES}")]
    ValueTooLarge {
        /// Bytes of the value.
        bytes: usize,
    },
    /// The output buffer is too short.
    #[error("the message does not fit a buffer of {available} bytes")]
    NoRoom {
        /// Bytes of the buffer.
        available: usize,
    },
    /// The immediate holds a status or kind that does not exist, or a kind that does not go with the status.
    #[error("reply with immediate {0:#010x} makes no sense")]
    Immediate(u32),
    /// A reply's log entry is damaged.
    #[error(transparent)]
    Entry(#[from] crate::store::EntryError),
}

impl ProtoError {
    /// The status that a server answers such a request with.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::UnknownOp(_) => Status::Unsupported,
            Self::EmptyKey => Status::EmptyKey,
            Self::KeyNotEager { .. } => Status::KeyTooLong,
            Self::ValueNotEager { .. } | Self::ValueTooLarge { .. } => Status::ValueTooLarge,
            Self::Field("name") => Status::TableName,
            _ => Status::Malformed,
        }
    }
}
