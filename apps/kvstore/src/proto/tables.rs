//! A page of tables, the answer to TABLES.
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..4 | id of the last table on the page, if there are more; otherwise 2^32 - 1 |
//! | 4..6 | number of tables |
//! | then, per table | id (u32), objects (u64), live bytes (u64), reads, writes, removes, increments (u64 each), bytes of the name (u8), name |

use super::ProtoError;
use super::cursor::{Reader, Writer};

/// Bytes of a page before its first table.
pub const TABLES_HEADER_BYTES: usize = 6;

const END: u32 = u32::MAX;

/// What was done to a table since the server began; elements of multi-operations count one by one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableOperations {
    /// Reads by request, misses included.
    pub reads: u64,
    /// Writes done.
    pub writes: u64,
    /// Removes that removed something.
    pub removes: u64,
    /// Increments done.
    pub increments: u64,
}

/// Bytes of a table on a page, without its name.
pub const TABLE_ENTRY_BYTES: usize = 4 + 6 * 8 + 1;

/// A table, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableEntry<'a> {
    /// Id.
    pub id: u32,
    /// Objects, expired ones included until the cleaner has seen them.
    pub objects: u64,
    /// Bytes of their log entries.
    pub live_bytes: u64,
    /// What was done to it.
    pub operations: TableOperations,
    /// Name.
    pub name: &'a str,
}

impl<'a> TableEntry<'a> {
    fn parse(input: &mut Reader<'a>) -> Result<Self, ProtoError> {
        let (id, objects, live_bytes) = (input.u32()?, input.u64()?, input.u64()?);
        let operations = TableOperations {
            reads: input.u64()?,
            writes: input.u64()?,
            removes: input.u64()?,
            increments: input.u64()?,
        };
        let length = usize::from(input.u8()?);
        let name = core::str::from_utf8(input.take(length)?);
        let name = name.ok().filter(|name| !name.is_empty());
        Ok(Self {
            id,
            objects,
            live_bytes,
            operations,
            name: name.ok_or(ProtoError::Field("name"))?,
        })
    }
}

/// A checked view of a page of tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tables<'a> {
    pub(super) bytes: &'a [u8],
    next: Option<u32>,
    count: u16,
}

impl<'a> Tables<'a> {
    /// Views `bytes` as a page. Errors: cut off, a name that is none, or anything left over.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ProtoError> {
        let mut input = Reader { bytes };
        let next = input.u32()?;
        let count = input.u16()?;
        for _ in 0..count {
            TableEntry::parse(&mut input)?;
        }
        input.end()?;
        Ok(Self {
            bytes,
            next: (next != END).then_some(next),
            count,
        })
    }

    /// What to ask for the next page with; none at the end.
    #[must_use]
    pub const fn next(&self) -> Option<u32> {
        self.next
    }

    /// Number of tables.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there are none on this page.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The tables, by id.
    pub fn iter(&self) -> impl Iterator<Item = TableEntry<'a>> + use<'a> {
        let mut input = Reader {
            bytes: self.bytes.get(TABLES_HEADER_BYTES..).unwrap_or_default(),
        };
        core::iter::from_fn(move || TableEntry::parse(&mut input).ok())
    }
}

/// Builds a page of tables in a buffer.
#[derive(Debug)]
pub struct TablesBuilder<'a> {
    out: &'a mut [u8],
    at: usize,
    count: u16,
    last: u32,
}

impl<'a> TablesBuilder<'a> {
    /// An empty page in `out`. Errors: `out` does not hold even an empty page.
    pub fn new(out: &'a mut [u8]) -> Result<Self, ProtoError> {
        if out.len() < TABLES_HEADER_BYTES {
            return Err(ProtoError::NoRoom {
                available: out.len(),
            });
        }
        Ok(Self {
            out,
            at: TABLES_HEADER_BYTES,
            count: 0,
            last: 0,
        })
    }

    /// Adds a table. False, with nothing added: the page is full.
    pub fn push(&mut self, table: &TableEntry<'_>) -> bool {
        let Ok(length) = u8::try_from(table.name.len()) else {
            return false;
        };
        let mut out = Writer {
            out: self.out,
            at: self.at,
        };
        let ops = table.operations;
        let numbers = [
            table.objects,
            table.live_bytes,
            ops.reads,
            ops.writes,
            ops.removes,
            ops.increments,
        ];
        let written = out
            .put(&table.id.to_le_bytes())
            .and_then(|()| numbers.iter().try_for_each(|n| out.put(&n.to_le_bytes())))
            .and_then(|()| out.put(&[length]))
            .and_then(|()| out.put(table.name.as_bytes()));
        if written.is_err() || self.count == u16::MAX {
            return false;
        }
        self.at = out.at;
        self.count += 1;
        self.last = table.id;
        true
    }

    /// Completes the page, after which there are `more` or not. Returns its length in bytes.
    pub fn finish(self, more: bool) -> usize {
        let next = if more { self.last } else { END };
        self.out[..4].copy_from_slice(&next.to_le_bytes());
        self.out[4..6].copy_from_slice(&self.count.to_le_bytes());
        self.at
    }
}
