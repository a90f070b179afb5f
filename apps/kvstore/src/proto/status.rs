//! How a request ended.

use crate::limits::{
    EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_KEY_BYTES, MAX_LEASES, MAX_RESULTS,
    MAX_TABLE_NAME_BYTES, MAX_TABLES, MAX_VALUE_BYTES,
};
use crate::store::{RejectReason, StoreError};
use thiserror::Error;

macro_rules! statuses {
    ($($(#[doc = $doc:literal])* #[error($text:literal)] $name:ident = $number:literal,)*) => {
        /// How a request ended. The numbers are the protocol.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
        #[repr(u8)]
        pub enum Status {
            $($(#[doc = $doc])* #[error($text)] $name = $number,)*
        }

        impl Status {
            /// Every status.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The status with number `raw`, if there is one.
            #[must_use]
            #[inline]
            pub const fn from_raw(raw: u8) -> Option<Self> {
                match raw {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// As asked.
    #[error("ok")]
    Ok = 0,
    /// No such key, or no table of that name.
    #[error("no such key")]
    NotFound = 1,
    /// The store has no room for the write. Detail: bytes that may be live.
    #[error("the store is full; remove keys or give it more memory")]
    Full = 2,
    /// The key exceeds the limit, or should have been sent by address. Detail: the limit in bytes.
    #[error("the key is too long; a key has 1 to {MAX_KEY_BYTES} bytes, more than {EAGER_KEY_BYTES} by address")]
    KeyTooLong = 3,
    /// The key has no bytes.
    #[error("the key is empty; a key has 1 to {MAX_KEY_BYTES} bytes")]
    EmptyKey = 4,
    /// The value exceeds the limit. Detail: the limit in bytes.
    #[error("the value is too large; a value has at most {MAX_VALUE_BYTES} bytes, more than {EAGER_VALUE_BYTES} by address")]
    ValueTooLarge = 5,
    /// The request could not be parsed.
    #[error("the server could not parse the request")]
    Malformed = 6,
    /// The answer does not fit what the client gave. Detail: bytes of buffer needed. Ask again with such a buffer.
    #[error("the answer needs a larger buffer")]
    TooLargeForEager = 7,
    /// The server's READ or WRITE of the client's memory failed.
    #[error("the transfer to or from the client's memory failed; check address, length and key")]
    TransferFailed = 8,
    /// The server does not know the operation.
    #[error("the server does not support this operation")]
    Unsupported = 9,
    /// Room could be made once transfers in flight complete or freed memory has rested: ask again, with the same request id.
    #[error("the store waits for transfers in flight; try again")]
    Busy = 10,
    /// An error inside the server.
    #[error("the server failed internally; see its log")]
    Internal = 11,
    /// Refused by a reject rule: the object exists. Detail: its version.
    #[error("rejected: the object exists")]
    RejectedExists = 12,
    /// Refused by a reject rule: the object does not exist.
    #[error("rejected: the object does not exist")]
    RejectedAbsent = 13,
    /// Refused by a reject rule on the version. Detail: the object's version.
    #[error("rejected: the object has another version than the rule allows")]
    RejectedVersion = 14,
    /// No table with that id.
    #[error("there is no such table: it was dropped, or never created; look its id up again")]
    UnknownTable = 15,
    /// A table's name is empty, too long, or not printable.
    #[error("a table's name has 1 to {MAX_TABLE_NAME_BYTES} bytes of UTF-8 and no control characters")]
    TableName = 16,
    /// No more tables.
    #[error("the store has {MAX_TABLES} tables, or tables whose objects are still being removed: drop some, or wait")]
    TooManyTables = 17,
    /// The default table cannot be dropped.
    #[error("the default table cannot be dropped; remove its objects, or use another table")]
    DefaultTable = 18,
    /// An increment of something else than 8 bytes. Detail: bytes of the value.
    #[error("only values of 8 bytes can be incremented")]
    NotANumber = 19,
    /// The request has an id, but its client has no lease (any more). Connect again.
    #[error("the client's lease has expired: whether requests without a reply were executed is not known; connect again")]
    NoLease = 20,
    /// The request's number is too far ahead of the first incomplete one. Detail: that one.
    #[error("a client may have {MAX_RESULTS} requests with an id that are not acknowledged; acknowledge results first")]
    TooManyResults = 21,
    /// The request's result was acknowledged: nobody can want it any more.
    #[error("the request was completed and acknowledged before")]
    Stale = 22,
    /// As many clients have leases as may.
    #[error("{MAX_LEASES} clients have leases; wait until one expires")]
    TooManyLeases = 23,
}

impl Status {
    /// The reject rule that held, if one did.
    #[must_use]
    pub const fn rejected(self) -> Option<RejectReason> {
        match self {
            Self::RejectedExists => Some(RejectReason::Exists),
            Self::RejectedAbsent => Some(RejectReason::Absent),
            Self::RejectedVersion => Some(RejectReason::Version),
            _ => None,
        }
    }
}

impl From<RejectReason> for Status {
    fn from(reason: RejectReason) -> Self {
        match reason {
            RejectReason::Exists => Self::RejectedExists,
            RejectReason::Absent => Self::RejectedAbsent,
            RejectReason::Version => Self::RejectedVersion,
        }
    }
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::EmptyKey => Self::EmptyKey,
            StoreError::KeyTooLong { .. } => Self::KeyTooLong,
            StoreError::ValueTooLarge { .. } => Self::ValueTooLarge,
            StoreError::Full { .. } => Self::Full,
            StoreError::Busy => Self::Busy,
            StoreError::Rejected { reason, .. } => reason.into(),
            StoreError::UnknownTable { .. } => Self::UnknownTable,
            StoreError::TableName => Self::TableName,
            StoreError::TooManyTables => Self::TooManyTables,
            StoreError::DefaultTable => Self::DefaultTable,
            StoreError::NotANumber { .. } => Self::NotANumber,
            StoreError::NoLease { .. } => Self::NoLease,
            StoreError::TooManyLeases => Self::TooManyLeases,
            StoreError::TooManyResults { .. } => Self::TooManyResults,
            // Between the check of a request's id and its execution nothing else runs: begun, and not finished.
            StoreError::DuplicateRequest { .. } => Self::Busy,
            _ => Self::Internal,
        }
    }
}

/// The number that a failed request's reply carries beside the status.
#[must_use]
pub const fn error_detail(error: &StoreError) -> u64 {
    match *error {
        StoreError::Full { capacity, .. } => capacity,
        StoreError::KeyTooLong { limit, .. } | StoreError::ValueTooLarge { limit, .. } => {
            limit as u64
        }
        StoreError::Rejected { version, .. } => version,
        StoreError::NotANumber { bytes } => bytes as u64,
        StoreError::TooManyResults {
            first_incomplete, ..
        } => first_incomplete,
        _ => 0,
    }
}
