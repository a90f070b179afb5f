//! Requests and replies as bytes: what client and server say to each other over a reliable connection.
//!
//! A **request** is one SEND. All integers are little-endian.
//!
//! | bytes | field | |
//! | --- | --- | --- |
//! | 0 | op | [`Op`] |
//! | 1 | flags | [`FLAG_BUFFER`], [`FLAG_REMOTE_KEY`]; others must be 0 |
//! | 2..4 | key_len | |
//! | 4..6 | tag | chosen by the client, comes back in the reply |
//! | 6..8 | extra | LIST: most keys wanted, 0 for as many as fit; otherwise 0 |
//! | then 16 | remote key | with [`FLAG_REMOTE_KEY`]: [`RemoteBuffer`] of the key, which the server READs |
//! | then 16 | buffer | with [`FLAG_BUFFER`]: [`RemoteBuffer`] for the value or the page |
//! | then | | LIST: cursor u64. PROBE: rounds u32 |
//! | then | key | unless it is remote |
//! | to the end | value | of a PUT without buffer |
//!
//! A GET of a key up to 24 bytes is 32 bytes, which fits a completion queue entry.
//!
//! A **reply** is one SEND with immediate: tag (bits 31..16), [`Status`] (15..8), [`ReplyKind`] (7..0). A GET that hits
//! carries the log entry itself ([`crate::store::entry`]), gathered from the log.

use crate::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crate::store::entry::ENTRY_HEADER_BYTES;
use crate::store::{Entry, EntryHeader, EntryKind, StoreError};
use thiserror::Error;

mod cursor;
mod handshake;
mod page;
mod stats;

use cursor::{Reader, Writer};
pub use handshake::{PROTOCOL_VERSION, Refusal};
pub use page::{PAGE_HEADER_BYTES, Page, PageBuilder};
pub use stats::{STATS_BYTES, StatsReply, StatsView};

/// Bytes of a request before anything optional.
pub const REQUEST_HEADER_BYTES: usize = 8;

/// Bytes of a [`RemoteBuffer`].
pub const REMOTE_BUFFER_BYTES: usize = 16;

/// Longest request: header, two buffers, cursor, and the longest eager key and value.
pub const MAX_REQUEST_BYTES: usize =
    (REQUEST_HEADER_BYTES + 2 * REMOTE_BUFFER_BYTES + 8 + EAGER_KEY_BYTES + EAGER_VALUE_BYTES)
        .next_multiple_of(64);

/// Longest payload of a reply: a log entry with the longest eager key and value.
pub const MAX_REPLY_BYTES: usize =
    (ENTRY_HEADER_BYTES + EAGER_KEY_BYTES + EAGER_VALUE_BYTES).next_multiple_of(64);

/// Smallest buffer for a LIST that is certain to hold one key, whatever its length.
pub const MIN_LIST_BUFFER_BYTES: usize = PAGE_HEADER_BYTES + 2 + MAX_KEY_BYTES;

/// Most rounds of one PROBE: bounds for how long it keeps the server from other clients (about 50 ms at 0.5 us each).
pub const MAX_PROBE_ROUNDS: u32 = 100_000;

/// The request has a [`RemoteBuffer`] for its value (PUT: READ by the server; GET: written) or page (LIST: written).
pub const FLAG_BUFFER: u8 = 1;

/// The key is not in the message but in the client's memory.
pub const FLAG_REMOTE_KEY: u8 = 2;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Read a key's value.
    Get = 1,
    /// Store a value.
    Put = 2,
    /// Remove a key.
    Del = 3,
    /// A page of keys.
    List = 4,
    /// The server's counters.
    Stats = 5,
    /// Nothing but a reply.
    Ping = 6,
    /// Bounce a cache line so many times: the floor that latencies are compared with.
    Probe = 7,
}

impl Op {
    const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::Get,
            2 => Self::Put,
            3 => Self::Del,
            4 => Self::List,
            5 => Self::Stats,
            6 => Self::Ping,
            7 => Self::Probe,
            _ => return None,
        })
    }

    const fn has_key(self) -> bool {
        matches!(self, Self::Get | Self::Put | Self::Del)
    }

    const fn may_have_buffer(self) -> bool {
        matches!(self, Self::Get | Self::Put | Self::List)
    }
}

/// Memory of the client that the server READs or WRITEs: an allegation, which the NIC checks on use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteBuffer {
    /// Address, as registered by the client.
    pub addr: u64,
    /// Remote key of the client's memory region.
    pub rkey: u32,
    /// Bytes.
    pub len: u32,
}

impl RemoteBuffer {
    fn emit(&self, out: &mut Writer<'_>) -> Result<(), ProtoError> {
        out.put(&self.addr.to_le_bytes())?;
        out.put(&self.rkey.to_le_bytes())?;
        out.put(&self.len.to_le_bytes())
    }

    fn parse(input: &mut Reader<'_>) -> Result<Self, ProtoError> {
        Ok(Self {
            addr: input.u64()?,
            rkey: input.u32()?,
            len: input.u32()?,
        })
    }
}

/// A key of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key<'a> {
    /// In the message; 1 to [`EAGER_KEY_BYTES`] bytes.
    Inline(&'a [u8]),
    /// In the client's memory; 1 to [`MAX_KEY_BYTES`] bytes.
    Remote(RemoteBuffer),
}

/// The value of a PUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutValue<'a> {
    /// In the message; at most [`EAGER_VALUE_BYTES`] bytes.
    Inline(&'a [u8]),
    /// In the client's memory; at most [`MAX_VALUE_BYTES`] bytes.
    Remote(RemoteBuffer),
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// Read a key's value: into `buffer` if it is larger than eager, or refused as too large for eager without one.
    Get {
        /// Key.
        key: Key<'a>,
        /// Where a value larger than eager goes.
        buffer: Option<RemoteBuffer>,
    },
    /// Store a value.
    Put {
        /// Key.
        key: Key<'a>,
        /// Value.
        value: PutValue<'a>,
    },
    /// Remove a key.
    Del {
        /// Key.
        key: Key<'a>,
    },
    /// A page of keys, in the reply or in `buffer`.
    List {
        /// 0 at first, then what the last page said.
        cursor: u64,
        /// Most keys wanted; 0: as many as fit.
        limit: u16,
        /// Where the page goes.
        buffer: Option<RemoteBuffer>,
    },
    /// The server's counters.
    Stats,
    /// Nothing but a reply.
    Ping,
    /// Bounce a cache line.
    Probe {
        /// How often; 1 to [`MAX_PROBE_ROUNDS`].
        rounds: u32,
    },
}

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
    pub const fn status(&self) -> Status {
        match self {
            Self::UnknownOp(_) => Status::Unsupported,
            Self::EmptyKey => Status::EmptyKey,
            Self::KeyNotEager { .. } => Status::KeyTooLong,
            Self::ValueNotEager { .. } | Self::ValueTooLarge { .. } => Status::ValueTooLarge,
            _ => Status::Malformed,
        }
    }
}

/// The tag of the request in `bytes`, even if the rest of it is malformed, so that its client can be told. None: cut off
/// before the tag.
#[must_use]
pub fn request_tag(bytes: &[u8]) -> Option<u16> {
    bytes.get(4..6)?.try_into().ok().map(u16::from_le_bytes)
}

impl<'a> Request<'a> {
    /// Reads a request: its tag and what it asks for. Errors: anything that [`Self::emit`] would not have written.
    pub fn parse(bytes: &'a [u8]) -> Result<(u16, Self), ProtoError> {
        let mut input = Reader { bytes };
        let raw_op = input.u8()?;
        let flags = input.u8()?;
        let key_len = usize::from(input.u16()?);
        let tag = input.u16()?;
        let extra = input.u16()?;
        let op = Op::from_raw(raw_op).ok_or(ProtoError::UnknownOp(raw_op))?;
        let allowed = if op.may_have_buffer() { FLAG_BUFFER } else { 0 }
            | if op.has_key() { FLAG_REMOTE_KEY } else { 0 };
        if flags & !allowed != 0 {
            return Err(ProtoError::Flags(flags));
        }
        if extra != 0 && op != Op::List {
            return Err(ProtoError::Field("extra"));
        }
        if op.has_key() && key_len == 0 {
            return Err(ProtoError::EmptyKey);
        }
        if !op.has_key() && key_len != 0 {
            return Err(ProtoError::Field("key_len"));
        }
        let remote_key = if flags & FLAG_REMOTE_KEY != 0 {
            let buffer = RemoteBuffer::parse(&mut input)?;
            if buffer.len as usize != key_len {
                return Err(ProtoError::Field("key_len"));
            }
            Some(buffer)
        } else {
            None
        };
        let buffer = if flags & FLAG_BUFFER != 0 {
            Some(RemoteBuffer::parse(&mut input)?)
        } else {
            None
        };
        let mut key = || match remote_key {
            Some(buffer) => Ok(Key::Remote(buffer)),
            None if key_len > EAGER_KEY_BYTES => Err(ProtoError::KeyNotEager { bytes: key_len }),
            None => input.take(key_len).map(Key::Inline),
        };
        let request = match op {
            Op::Get => Self::Get {
                key: key()?,
                buffer,
            },
            Op::Put => Self::Put {
                key: key()?,
                value: match buffer {
                    Some(buffer) => PutValue::Remote(check_value(buffer)?),
                    None => PutValue::Inline(eager_value(input.rest())?),
                },
            },
            Op::Del => Self::Del { key: key()? },
            Op::List => Self::List {
                cursor: input.u64()?,
                limit: extra,
                buffer,
            },
            Op::Stats => Self::Stats,
            Op::Ping => Self::Ping,
            Op::Probe => Self::Probe {
                rounds: check_rounds(input.u32()?)?,
            },
        };
        input.end()?;
        Ok((tag, request))
    }

    /// What it asks for.
    #[must_use]
    pub const fn op(&self) -> Op {
        match self {
            Self::Get { .. } => Op::Get,
            Self::Put { .. } => Op::Put,
            Self::Del { .. } => Op::Del,
            Self::List { .. } => Op::List,
            Self::Stats => Op::Stats,
            Self::Ping => Op::Ping,
            Self::Probe { .. } => Op::Probe,
        }
    }

    /// Writes the request. Returns its length. Errors: a key or value that is empty, too long, or too long to be inline; the
    /// buffer is too short ([`MAX_REQUEST_BYTES`] always suffice).
    pub fn emit(&self, tag: u16, out: &mut [u8]) -> Result<usize, ProtoError> {
        let available = out.len();
        let mut out = Writer { out, at: 0 };
        let (key, buffer, extra) = match *self {
            Self::Get { key, buffer } => (Some(key), buffer, 0),
            Self::Put { key, value } => match value {
                PutValue::Inline(value) => {
                    eager_value(value)?;
                    (Some(key), None, 0)
                }
                PutValue::Remote(buffer) => (Some(key), Some(check_value(buffer)?), 0),
            },
            Self::Del { key } => (Some(key), None, 0),
            Self::List { limit, buffer, .. } => (None, buffer, limit),
            Self::Probe { rounds } => {
                check_rounds(rounds)?;
                (None, None, 0)
            }
            Self::Stats | Self::Ping => (None, None, 0),
        };
        let (key_len, remote_key, inline_key) = match key {
            None => (0, None, &[][..]),
            Some(Key::Inline(key)) if key.len() > EAGER_KEY_BYTES => {
                return Err(ProtoError::KeyNotEager { bytes: key.len() });
            }
            Some(Key::Inline(key)) => (key.len(), None, key),
            Some(Key::Remote(buffer)) => (buffer.len as usize, Some(buffer), &[][..]),
        };
        if key.is_some() && key_len == 0 {
            return Err(ProtoError::EmptyKey);
        }
        let key_len = u16::try_from(key_len).map_err(|_| ProtoError::Field("key_len"))?;
        let flags = if buffer.is_some() { FLAG_BUFFER } else { 0 }
            | if remote_key.is_some() {
                FLAG_REMOTE_KEY
            } else {
                0
            };
        let mut header = [self.op() as u8, flags, 0, 0, 0, 0, 0, 0];
        header[2..4].copy_from_slice(&key_len.to_le_bytes());
        header[4..6].copy_from_slice(&tag.to_le_bytes());
        header[6..8].copy_from_slice(&extra.to_le_bytes());
        let mut write = || -> Result<(), ProtoError> {
            out.put(&header)?;
            for buffer in [remote_key, buffer].into_iter().flatten() {
                buffer.emit(&mut out)?;
            }
            match *self {
                Self::List { cursor, .. } => out.put(&cursor.to_le_bytes())?,
                Self::Probe { rounds } => out.put(&rounds.to_le_bytes())?,
                _ => {}
            }
            out.put(inline_key)?;
            if let Self::Put {
                value: PutValue::Inline(value),
                ..
            } = *self
            {
                out.put(value)?;
            }
            Ok(())
        };
        write().map_err(|_| ProtoError::NoRoom { available })?;
        Ok(out.at)
    }
}

fn eager_value(value: &[u8]) -> Result<&[u8], ProtoError> {
    if value.len() > EAGER_VALUE_BYTES {
        return Err(ProtoError::ValueNotEager { bytes: value.len() });
    }
    Ok(value)
}

fn check_value(buffer: RemoteBuffer) -> Result<RemoteBuffer, ProtoError> {
    if buffer.len as usize > MAX_VALUE_BYTES {
        return Err(ProtoError::ValueTooLarge {
            bytes: buffer.len as usize,
        });
    }
    Ok(buffer)
}

fn check_rounds(rounds: u32) -> Result<u32, ProtoError> {
    if rounds == 0 || rounds > MAX_PROBE_ROUNDS {
        return Err(ProtoError::Field("rounds"));
    }
    Ok(rounds)
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[repr(u8)]
pub enum Status {
    /// As asked.
    #[error("ok")]
    Ok = 0,
    /// No such key.
    #[error("no such key")]
    NotFound = 1,
    /// The store has no room for the write. Detail: bytes that may be live.
    #[error("the store is full; remove keys or give it more memory")]
    Full = 2,
    /// The key exceeds the limit, or should have been sent by address. Detail: the limit in bytes.
    #[error(
        "the key is too long; a key has 1 to {MAX_KEY_BYTES} bytes, more than {EAGER_KEY_BYTES} by address"
    )]
    KeyTooLong = 3,
    /// The key has no bytes.
    #[error("the key is empty; a key has 1 to {MAX_KEY_BYTES} bytes")]
    EmptyKey = 4,
    /// The value exceeds the limit. Detail: the limit in bytes.
    #[error(
        "the value is too large; a value has at most {MAX_VALUE_BYTES} bytes, more than {EAGER_VALUE_BYTES} by address"
    )]
    ValueTooLarge = 5,
    /// The request could not be parsed.
    #[error("the server could not parse the request")]
    Malformed = 6,
    /// The value or page does not fit what the client gave. Detail: bytes of buffer needed. Ask again with such a buffer.
    #[error("the answer needs a larger buffer")]
    TooLargeForEager = 7,
    /// The server's READ or WRITE of the client's memory failed.
    #[error("the transfer to or from the client's memory failed; check address, length and key")]
    TransferFailed = 8,
    /// The server does not know the operation.
    #[error("the server does not support this operation")]
    Unsupported = 9,
    /// Room could be made once transfers in flight complete: ask again.
    #[error("the store waits for transfers in flight; try again")]
    Busy = 10,
    /// An error inside the server.
    #[error("the server failed internally; see its log")]
    Internal = 11,
}

impl Status {
    const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::Ok,
            1 => Self::NotFound,
            2 => Self::Full,
            3 => Self::KeyTooLong,
            4 => Self::EmptyKey,
            5 => Self::ValueTooLarge,
            6 => Self::Malformed,
            7 => Self::TooLargeForEager,
            8 => Self::TransferFailed,
            9 => Self::Unsupported,
            10 => Self::Busy,
            11 => Self::Internal,
            _ => return None,
        })
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
        _ => 0,
    }
}

/// What the payload of a reply is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ReplyKind {
    /// Nothing: PING.
    Empty = 0,
    /// A detail (u64), with a status other than Ok.
    Error = 1,
    /// GET: header, key and value of the log entry.
    Entry = 2,
    /// GET: header and value of the log entry, the key left out.
    HeaderValue = 3,
    /// GET: version (u64) and length (u32) of a value that was written to the client's buffer.
    Written = 4,
    /// PUT, DEL: version (u64).
    Version = 5,
    /// LIST: the page.
    Page = 6,
    /// LIST: bytes (u32) of a page that was written to the client's buffer.
    PageWritten = 7,
    /// STATS: [`StatsReply`].
    Stats = 8,
    /// PROBE: rounds (u32) that follow, to be answered one by one.
    Probe = 9,
}

impl ReplyKind {
    const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::Empty,
            1 => Self::Error,
            2 => Self::Entry,
            3 => Self::HeaderValue,
            4 => Self::Written,
            5 => Self::Version,
            6 => Self::Page,
            7 => Self::PageWritten,
            8 => Self::Stats,
            9 => Self::Probe,
            _ => return None,
        })
    }
}

/// Puts a reply's immediate together.
#[must_use]
pub const fn immediate(tag: u16, status: Status, kind: ReplyKind) -> u32 {
    (tag as u32) << 16 | (status as u32) << 8 | kind as u32
}

/// The tag in a reply's immediate.
#[must_use]
pub const fn immediate_tag(immediate: u32) -> u16 {
    (immediate >> 16) as u16
}

/// A reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    /// The answer to a PING.
    Empty,
    /// The request failed.
    Error {
        /// Why; not Ok.
        status: Status,
        /// A number that belongs to the status, or 0.
        detail: u64,
    },
    /// The value of a GET.
    Value {
        /// Version of the object.
        version: u64,
        /// The value.
        value: &'a [u8],
        /// The key, if it came along.
        key: Option<&'a [u8]>,
    },
    /// The value of a GET is in the client's buffer.
    Written {
        /// Version of the object.
        version: u64,
        /// Bytes of the value.
        value_len: u32,
    },
    /// The object that a PUT made or a DEL removed.
    Version(u64),
    /// Keys.
    Page(Page<'a>),
    /// The page is in the client's buffer: read it with [`Page::parse`].
    PageWritten {
        /// Bytes of the page.
        len: u32,
    },
    /// Counters.
    Stats(StatsView<'a>),
    /// The server is ready to bounce a cache line.
    Probe {
        /// How often.
        rounds: u32,
    },
}

impl<'a> Reply<'a> {
    /// Reads a reply from its immediate and payload: the tag of its request, and the answer. Errors: an unknown status or
    /// kind, or a payload that does not fit them.
    pub fn parse(immediate: u32, payload: &'a [u8]) -> Result<(u16, Self), ProtoError> {
        let wrong = ProtoError::Immediate(immediate);
        let status = Status::from_raw((immediate >> 8) as u8).ok_or(wrong)?;
        let kind = ReplyKind::from_raw(immediate as u8).ok_or(wrong)?;
        if (status == Status::Ok) == (kind == ReplyKind::Error) {
            return Err(wrong);
        }
        let mut input = Reader { bytes: payload };
        let reply = match kind {
            ReplyKind::Empty => Self::Empty,
            ReplyKind::Error => Self::Error {
                status,
                detail: input.u64()?,
            },
            ReplyKind::Entry => {
                let entry = Entry::parse(input.rest())?;
                let (header, key, value) = (entry.header(), entry.key(), entry.value());
                check_entry(header, payload.len(), header.span_bytes())?;
                Self::Value {
                    version: header.version,
                    value,
                    key: Some(key),
                }
            }
            ReplyKind::HeaderValue => {
                let header = EntryHeader::parse(input.take(ENTRY_HEADER_BYTES)?)?;
                let value = input.take(header.value_len as usize)?;
                check_entry(&header, payload.len(), ENTRY_HEADER_BYTES + value.len())?;
                Self::Value {
                    version: header.version,
                    value,
                    key: None,
                }
            }
            ReplyKind::Written => Self::Written {
                version: input.u64()?,
                value_len: input.u32()?,
            },
            ReplyKind::Version => Self::Version(input.u64()?),
            ReplyKind::Page => Self::Page(Page::parse(input.rest())?),
            ReplyKind::PageWritten => Self::PageWritten { len: input.u32()? },
            ReplyKind::Stats => Self::Stats(StatsView::parse(&mut input)?),
            ReplyKind::Probe => Self::Probe {
                rounds: input.u32()?,
            },
        };
        input.end()?;
        Ok((immediate_tag(immediate), reply))
    }

    /// Writes the payload of a reply that is not gathered from the log. Returns immediate and length. Errors: the buffer is
    /// too short ([`MAX_REPLY_BYTES`] suffice); values are never copied (see [`entry_reply`]), pages are built in place
    /// ([`PageBuilder`]).
    pub fn emit(&self, tag: u16, out: &mut [u8]) -> Result<(u32, usize), ProtoError> {
        let available = out.len();
        let mut out = Writer { out, at: 0 };
        let mut write = || -> Result<(Status, ReplyKind), ProtoError> {
            Ok(match *self {
                Self::Empty => (Status::Ok, ReplyKind::Empty),
                Self::Error { status, detail } => {
                    out.put(&detail.to_le_bytes())?;
                    (status, ReplyKind::Error)
                }
                Self::Value { .. } => return Err(ProtoError::Field("value")),
                Self::Written { version, value_len } => {
                    out.put(&version.to_le_bytes())?;
                    out.put(&value_len.to_le_bytes())?;
                    (Status::Ok, ReplyKind::Written)
                }
                Self::Version(version) => {
                    out.put(&version.to_le_bytes())?;
                    (Status::Ok, ReplyKind::Version)
                }
                Self::Page(page) => {
                    out.put(page.bytes)?;
                    (Status::Ok, ReplyKind::Page)
                }
                Self::PageWritten { len } => {
                    out.put(&len.to_le_bytes())?;
                    (Status::Ok, ReplyKind::PageWritten)
                }
                Self::Stats(stats) => {
                    stats.emit(&mut out)?;
                    (Status::Ok, ReplyKind::Stats)
                }
                Self::Probe { rounds } => {
                    out.put(&rounds.to_le_bytes())?;
                    (Status::Ok, ReplyKind::Probe)
                }
            })
        };
        let (status, kind) = write().map_err(|error| match error {
            ProtoError::Field(_) => error,
            _ => ProtoError::NoRoom { available },
        })?;
        if (status == Status::Ok) == (kind == ReplyKind::Error) {
            return Err(ProtoError::Field("status"));
        }
        Ok((immediate(tag, status, kind), out.at))
    }
}

/// The immediate for a GET answered from the log: with the whole entry ([`crate::store::Found::span`]), or, without the key,
/// with [`crate::store::Found::header`] and [`crate::store::Found::value`] as two spans.
#[must_use]
pub const fn entry_reply(tag: u16, with_key: bool) -> u32 {
    let kind = if with_key {
        ReplyKind::Entry
    } else {
        ReplyKind::HeaderValue
    };
    immediate(tag, Status::Ok, kind)
}

fn check_entry(header: &EntryHeader, payload: usize, bytes: usize) -> Result<(), ProtoError> {
    if header.kind != EntryKind::Object {
        return Err(ProtoError::Field("kind"));
    }
    match payload.checked_sub(bytes) {
        Some(0) => Ok(()),
        Some(bytes) => Err(ProtoError::Trailing { bytes }),
        None => Err(ProtoError::Truncated {
            needed: bytes - payload,
        }),
    }
}
