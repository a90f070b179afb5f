//! Requests and replies as bytes: what client and server say to each other over a reliable connection (version 3).
//!
//! A **request** is one SEND. All integers are little-endian.
//!
//! | bytes | field | |
//! | --- | --- | --- |
//! | 0 | op | [`Op`] |
//! | 1 | flags | which of the following there are; others must be 0 |
//! | 2..4 | key_len | bytes of the key or the table's name |
//! | 4..6 | tag | chosen by the client, comes back in the reply |
//! | then 4 | table | with [`FLAG_TABLE`]: id of the table, not 0; without, the default table |
//! | then 1, 9 or 17 | rules | with [`FLAG_RULES`]: what to refuse, see `blocks` |
//! | then 9 | request id | with [`FLAG_ONCE`]: [`Once`] |
//! | then 8 | expiry | with [`FLAG_EXPIRES`]: ns since 1970, not 0 |
//! | then 16 | remote | with [`FLAG_REMOTE`]: [`RemoteBuffer`] of the key, or of a multi-operation's elements, which the server READs |
//! | then 16 | buffer | with [`FLAG_BUFFER`]: [`RemoteBuffer`] for what the server READs (a value) or WRITEs (anything else) |
//! | then | | INCREMENT: number, 8 bytes. ENUMERATE: cursor u64, most objects u16 (0: as fit). multi: elements u16. TABLES: id u32. PROBE: rounds u32. CLEANER: mode u8 |
//! | then | key | or name, unless it is remote |
//! | to the end | value | of a WRITE without buffer; elements of a multi-operation that are not remote |
//!
//! A READ of a key up to 26 bytes (22 of another table than the default one) is 32 bytes, which fits a completion queue entry.
//!
//! A **reply** is one SEND with immediate: tag (bits 31..16), [`Status`] (15..8), [`ReplyKind`] (7..0). A READ that hits
//! carries the log entry itself ([`crate::store::entry`]), gathered from the log.

use crate::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_KEY_BYTES};
use crate::store::entry::{ENTRY_HEADER_BYTES, EXPIRY_BYTES};

mod blocks;
mod cursor;
mod error;
mod handshake;
mod histogram;
mod multi;
mod page;
mod reply;
mod request;
mod stats;
mod status;
mod tables;

pub use blocks::{Once, RemoteBuffer};
pub use error::ProtoError;
pub use handshake::{
    HELLO_BYTES, Hello, LogKey, PROTOCOL_VERSION, Refusal, WELCOME_BYTES, Welcome,
};
pub use histogram::{Histogram, HistogramView};
pub use multi::{
    Element, ElementResult, Elements, MAX_MULTI_BYTES, MIN_ELEMENT_BYTES, MultiOp, ResultWriter,
    Results, emit_element,
};
pub use page::{PAGE_HEADER_BYTES, PAGE_OBJECT_BYTES, Page, PageBuilder, PageObject};
pub use reply::{Reply, ReplyKind, entry_reply, immediate, immediate_tag};
pub use request::{Key, Op, Request, Value, request_tag};
pub use stats::{Class, STATS_COUNTERS, StatsReply, StatsView, emit_stats};
pub use status::{Status, error_detail};
pub use tables::{
    TABLE_ENTRY_BYTES, TABLES_HEADER_BYTES, TableEntry, TableOperations, Tables, TablesBuilder,
};

/// Bytes of a request before anything optional.
pub const REQUEST_HEADER_BYTES: usize = 6;

/// Bytes of a [`RemoteBuffer`].
pub const REMOTE_BUFFER_BYTES: usize = 16;

/// Bytes of everything optional together: table, rules, request id, expiry, two buffers, and what an operation adds.
const OPTIONAL_BYTES: usize = 4 + 17 + 9 + 8 + 2 * REMOTE_BUFFER_BYTES + 10;

/// Longest request: header, all that is optional, and the longest eager key and value.
pub const MAX_REQUEST_BYTES: usize =
    (REQUEST_HEADER_BYTES + OPTIONAL_BYTES + EAGER_KEY_BYTES + EAGER_VALUE_BYTES)
        .next_multiple_of(64);

/// Longest payload of a reply: a log entry with the longest eager key and value, and an expiry.
pub const MAX_REPLY_BYTES: usize =
    (ENTRY_HEADER_BYTES + EAGER_KEY_BYTES + EAGER_VALUE_BYTES + EXPIRY_BYTES).next_multiple_of(64);

/// Smallest buffer for an ENUMERATE that is certain to hold one object (a longer value than the eager limit is left out).
pub const MIN_PAGE_BUFFER_BYTES: usize =
    PAGE_HEADER_BYTES + PAGE_OBJECT_BYTES + MAX_KEY_BYTES + EAGER_VALUE_BYTES;

/// Most rounds of one PROBE: bounds for how long it keeps the server from other clients (about 50 ms at 0.5 us each).
pub const MAX_PROBE_ROUNDS: u32 = 100_000;

/// The request names a table other than the default one.
pub const FLAG_TABLE: u8 = 1;
/// The request has reject rules.
pub const FLAG_RULES: u8 = 2;
/// The request has an id, so that a retry of it does not execute again.
pub const FLAG_ONCE: u8 = 4;
/// WRITE: the object expires.
pub const FLAG_EXPIRES: u8 = 8;
/// The key, or a multi-operation's elements, are not in the message but in the client's memory.
pub const FLAG_REMOTE: u8 = 16;
/// The request has a [`RemoteBuffer`] for its value (WRITE: READ by the server) or its answer (WRITTEN by the server).
pub const FLAG_BUFFER: u8 = 32;
/// INCREMENT: the number is a float. ENUMERATE: values too, not keys alone.
pub const FLAG_VARIANT: u8 = 64;
