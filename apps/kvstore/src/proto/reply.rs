//! What a server answers.

use super::cursor::{Reader, Writer};
use super::{Page, ProtoError, StatsView, Status, Tables};
use crate::store::entry::{ENTRY_HEADER_BYTES, EXPIRY_BYTES, FLAG_EXPIRES};
use crate::store::{Entry, EntryHeader, EntryKind};

/// What the payload of a reply is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ReplyKind {
    /// Nothing: PING, DROP, END LEASE.
    Empty = 0,
    /// A detail (u64), with a status other than Ok.
    Error = 1,
    /// READ: header, key, value and expiry of the log entry.
    Entry = 2,
    /// READ: header, value and expiry of the log entry, the key left out.
    HeaderValue = 3,
    /// READ: version (u64) and length (u32) of a value that was written to the client's buffer.
    Written = 4,
    /// WRITE, REMOVE: version (u64).
    Version = 5,
    /// ENUMERATE: the page ([`Page`]).
    Page = 6,
    /// Bytes (u32) of the page, or the results, that were written to the client's buffer.
    PackedWritten = 7,
    /// STATS ([`StatsView`]).
    Stats = 8,
    /// PROBE: rounds (u32) that follow, to be answered one by one.
    Probe = 9,
    /// INCREMENT: version and new number (u64 each).
    Incremented = 10,
    /// CREATE, FIND: id (u32), and 1 if it was created just now, otherwise 0 (u8).
    Table = 11,
    /// TABLES: the page ([`Tables`]).
    Tables = 12,
    /// Multi-operations: the results ([`super::Results`]).
    Results = 13,
}

impl ReplyKind {
    #[inline]
    const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::Empty,
            1 => Self::Error,
            2 => Self::Entry,
            3 => Self::HeaderValue,
            4 => Self::Written,
            5 => Self::Version,
            6 => Self::Page,
            7 => Self::PackedWritten,
            8 => Self::Stats,
            9 => Self::Probe,
            10 => Self::Incremented,
            11 => Self::Table,
            12 => Self::Tables,
            13 => Self::Results,
            _ => return None,
        })
    }
}

/// Puts a reply's immediate together.
#[must_use]
#[inline]
pub const fn immediate(tag: u16, status: Status, kind: ReplyKind) -> u32 {
    (tag as u32) << 16 | (status as u32) << 8 | kind as u32
}

/// The tag in a reply's immediate.
#[must_use]
#[inline]
pub const fn immediate_tag(immediate: u32) -> u16 {
    (immediate >> 16) as u16
}

/// A reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    /// Done, and nothing more to say.
    Empty,
    /// The request failed.
    Error {
        /// Why; not Ok.
        status: Status,
        /// A number that belongs to the status, or 0.
        detail: u64,
    },
    /// An object that was read.
    Value {
        /// Version of the object.
        version: u64,
        /// The value.
        value: &'a [u8],
        /// The key, if it came along.
        key: Option<&'a [u8]>,
    },
    /// The value that was read is in the client's buffer.
    Written {
        /// Version of the object.
        version: u64,
        /// Bytes of the value.
        value_len: u32,
    },
    /// The object that was written or removed.
    Version(u64),
    /// Objects of a table.
    Page(Page<'a>),
    /// A page, or results, are in the client's buffer.
    PackedWritten {
        /// Bytes of them.
        len: u32,
    },
    /// The server's state.
    Stats(StatsView<'a>),
    /// The server is ready to bounce a cache line.
    Probe {
        /// How often.
        rounds: u32,
    },
    /// A number was incremented.
    Incremented {
        /// Version of the object.
        version: u64,
        /// The new number's bits; of the kind that was added.
        bits: u64,
    },
    /// A table.
    Table {
        /// Its id.
        id: u32,
        /// Whether it was created just now.
        created: bool,
    },
    /// Tables.
    Tables(Tables<'a>),
    /// Results of a multi-operation: read them with [`super::Results::parse`].
    Results(&'a [u8]),
}

impl<'a> Reply<'a> {
    /// Reads a reply from its immediate and payload: the tag of its request, and the answer. Errors: an unknown status or
    /// kind, or a payload that does not fit them.
    #[inline]
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
                let expiry = if header.flags & FLAG_EXPIRES != 0 {
                    EXPIRY_BYTES
                } else {
                    0
                };
                input.take(expiry)?;
                let bytes = ENTRY_HEADER_BYTES + value.len() + expiry;
                check_entry(&header, payload.len(), bytes)?;
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
            ReplyKind::PackedWritten => Self::PackedWritten { len: input.u32()? },
            ReplyKind::Stats => Self::Stats(StatsView::parse(input.rest())?),
            ReplyKind::Probe => Self::Probe {
                rounds: input.u32()?,
            },
            ReplyKind::Incremented => Self::Incremented {
                version: input.u64()?,
                bits: input.u64()?,
            },
            ReplyKind::Table => Self::Table {
                id: input.u32()?,
                created: match input.u8()? {
                    0 => false,
                    1 => true,
                    _ => return Err(ProtoError::Field("created")),
                },
            },
            ReplyKind::Tables => Self::Tables(Tables::parse(input.rest())?),
            ReplyKind::Results => Self::Results(input.rest()),
        };
        input.end()?;
        Ok((immediate_tag(immediate), reply))
    }

    /// Writes the payload of a reply that is not gathered from the log. Returns immediate and length. Errors: the buffer is
    /// too short ([`super::MAX_REPLY_BYTES`] suffice); values are never copied (see [`entry_reply`]), pages are built in place
    /// ([`super::PageBuilder`]).
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
                Self::PackedWritten { len } => {
                    out.put(&len.to_le_bytes())?;
                    (Status::Ok, ReplyKind::PackedWritten)
                }
                Self::Stats(stats) => {
                    out.put(stats.bytes)?;
                    (Status::Ok, ReplyKind::Stats)
                }
                Self::Probe { rounds } => {
                    out.put(&rounds.to_le_bytes())?;
                    (Status::Ok, ReplyKind::Probe)
                }
                Self::Incremented { version, bits } => {
                    out.put(&version.to_le_bytes())?;
                    out.put(&bits.to_le_bytes())?;
                    (Status::Ok, ReplyKind::Incremented)
                }
                Self::Table { id, created } => {
                    out.put(&id.to_le_bytes())?;
                    out.put(&[u8::from(created)])?;
                    (Status::Ok, ReplyKind::Table)
                }
                Self::Tables(tables) => {
                    out.put(tables.bytes)?;
                    (Status::Ok, ReplyKind::Tables)
                }
                Self::Results(bytes) => {
                    out.put(bytes)?;
                    (Status::Ok, ReplyKind::Results)
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

/// The immediate for a READ answered from the log: with the whole entry ([`crate::store::Found::span`]), or, without the key,
/// with [`crate::store::Found::header`] and what follows the key (value and expiry) as two spans.
#[must_use]
#[inline]
pub const fn entry_reply(tag: u16, with_key: bool) -> u32 {
    let kind = if with_key {
        ReplyKind::Entry
    } else {
        ReplyKind::HeaderValue
    };
    immediate(tag, Status::Ok, kind)
}

#[inline]
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
