//! Why a request, or the connection, failed, and what to do about it.

use core::time::Duration;

use hyv_verbs::Error;

use crate::limits::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crate::proto::{ProtoError, Refusal, Status};
use crate::store::RejectReason;

/// Why a request, or the connection, failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The server answered with a failure. The number belongs to the status (a limit, or bytes needed).
    #[error("{status}")]
    Status {
        /// What it said.
        status: Status,
        /// The number.
        detail: u64,
    },
    /// A reject rule held: nothing was changed. Read the object and decide anew.
    #[error("rejected: the object {reason} (its version is {version})")]
    Rejected {
        /// Which rule.
        reason: RejectReason,
        /// Version of the object; 0 if it does not exist.
        version: u64,
    },
    /// The server was started again and has lost its memory: tables, objects, results. Whether the request was executed before is not
    /// known, and it will not be executed again. [`super::Client::accept_restart`] says that the caller has understood.
    #[error(
        "the store was started again and its memory is lost; look up tables again, load what is needed, and do not rely on anything from before"
    )]
    ServerRestarted,
    /// The connection was lost for longer than the store keeps results, or the request had no id: whether it was executed is not known.
    /// Read the object to find out.
    #[error(
        "the connection was lost and it is not known whether the request was executed: read the object to find out"
    )]
    OutcomeUnknown,
    /// The server refused the connection.
    #[error("{0}")]
    Refused(Refusal),
    /// Nobody serves on that port.
    #[error("no store listens on port {port} of this host: start one with ./run.sh kvstore")]
    NoServer {
        /// The port.
        port: u16,
    },
    /// A verb failed.
    #[error("{what}: {source}")]
    Verb {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: Error,
    },
    /// The connection ended: the server went away, or one side broke the rules.
    #[error("the connection to the store ended ({0}); start the store again if it has stopped")]
    Disconnected(&'static str),
    /// No answer in time.
    #[error("the store did not answer within {0:?}")]
    Timeout(Duration),
    /// As many requests are outstanding as may be, or no staging buffer is free: poll first.
    #[error("too many requests are outstanding: take replies first")]
    WindowFull,
    /// A multi-operation with too many elements, or too many bytes, for one request.
    #[error(
        "a multi-operation of {elements} elements and {bytes} bytes does not fit one request: split it"
    )]
    MultiTooLarge {
        /// Its elements.
        elements: usize,
        /// Their bytes.
        bytes: usize,
    },
    /// The request cannot be said in the protocol, or a reply made no sense.
    #[error("{0}")]
    Proto(#[from] ProtoError),
    /// The key is too long.
    #[error("the key has {len} bytes; the limit is {MAX_KEY_BYTES}")]
    KeyTooLong {
        /// Its bytes.
        len: usize,
    },
    /// The key is empty.
    #[error("the key is empty; a key has 1 to {MAX_KEY_BYTES} bytes")]
    EmptyKey,
    /// The value is too large.
    #[error("the value has {len} bytes; the limit is {MAX_VALUE_BYTES} (1 MiB)")]
    ValueTooLarge {
        /// Its bytes.
        len: usize,
    },
}

impl ClientError {
    /// What the server's failure is to the caller.
    #[must_use]
    pub fn of(status: Status, detail: u64) -> Self {
        match status.rejected() {
            Some(reason) => Self::Rejected {
                reason,
                version: detail,
            },
            None => Self::Status { status, detail },
        }
    }

    /// The status that the server answered with, if it did; not of a rejection.
    #[must_use]
    pub const fn status(&self) -> Option<Status> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }
}

pub(super) fn verb(what: &'static str) -> impl FnOnce(Error) -> ClientError {
    move |source| ClientError::Verb { what, source }
}

pub(super) const fn check_key(key: &[u8]) -> Result<(), ClientError> {
    match key.len() {
        0 => Err(ClientError::EmptyKey),
        1..=MAX_KEY_BYTES => Ok(()),
        len => Err(ClientError::KeyTooLong { len }),
    }
}

pub(super) const fn check_value(len: usize) -> Result<(), ClientError> {
    if len > MAX_VALUE_BYTES {
        return Err(ClientError::ValueTooLarge { len });
    }
    Ok(())
}
