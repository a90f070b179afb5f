//! The format of a log entry, shared by the engine, the server's replies, clients and replay.
//!
//! An entry starts at a multiple of 8 bytes: a 32-byte header, the key, the value, with [`FLAG_EXPIRES`] 8 bytes of expiry,
//! padding to 8. All integers are little-endian.
//!
//! | bytes | field | |
//! | --- | --- | --- |
//! | 0..8 | state | segment generation << 1, bit 0: live. Outside the checksum; a one-sided reader checks it |
//! | 8..12 | crc | CRC-32C of bytes 12.. to the end of value and expiry (of the key, in a tombstone; of the header, in space that is handed out) |
//! | 12 | kind | [`EntryKind`] |
//! | 13 | flags | [`FLAG_IN_PLACE`], [`FLAG_EXPIRES`], [`FLAG_RETIRED`] |
//! | 14..16 | key_len | |
//! | 16..20 | value_len | |
//! | 20..24 | table | id of the key's table; 0 is the default table |
//! | 24..32 | version | of the object; of a segment header or [`EntryKind::SafeVersion`], the store's safe version then |
//!
//! The state word is written last and cleared first: an entry whose state word says live is complete, and current.

use super::mem::{load_u16, load_u32, load_u64, order, store_u32, store_u64};
use crate::crc::{Sum, crc32c};
use thiserror::Error;

/// Bytes of an entry before its key.
pub const ENTRY_HEADER_BYTES: usize = 32;

/// Entries start and end at multiples of this many bytes.
pub const ENTRY_ALIGN: usize = 8;

/// Live bit of the state word.
pub const STATE_LIVE: u64 = 1;

/// On a tombstone: the object was turned into its own tombstone where it stood, because the log had no room for another
/// entry. Its value still occupies the log and is dead.
pub const FLAG_IN_PLACE: u8 = 1;

/// On an object: its value is followed by the time (u64, ns) from which on it does not exist any more. On a tombstone made
/// in place: that much more of it is dead.
pub const FLAG_EXPIRES: u8 = 2;

/// On a segment header: what follows was moved elsewhere or is dead; the segment is no part of the log any more.
pub const FLAG_RETIRED: u8 = 4;

/// Bytes of an expiry.
pub const EXPIRY_BYTES: usize = 8;

const CRC: usize = 8;
const CHECKED: usize = 12;
const KIND: usize = 12;
const FLAGS: usize = 13;
const KEY_LEN: usize = 14;
const VALUE_LEN: usize = 16;
const TABLE: usize = 20;
const VERSION: usize = 24;

/// What an entry is. The numbers are the format; 0 is never valid, so zeroed memory is the end of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// First entry of a segment: no key; value is generation (u64), segment bytes (u32), segment index (u32).
    SegmentHeader = 1,
    /// A key and its value.
    Object = 2,
    /// A removed key; its version is that of the newest object it hides.
    Tombstone = 3,
    /// A raise of the safe version outside a segment header.
    SafeVersion = 4,
    /// The result of a request, kept so that a retry does not execute again ([`super::Outcome`]).
    ResultRecord = 5,
    /// Second entry of a segment: the segments that make up the log. Value: for each segment of the region the generation
    /// (u64) that it held when this segment was opened, 0 if it was no part of the log.
    Digest = 6,
    /// Space handed out whose value is still being written.
    Pending = 7,
    /// Space whose reservation was given up.
    Abandoned = 8,
}

impl EntryKind {
    /// The kind with number `raw`, if there is one.
    #[must_use]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::SegmentHeader,
            2 => Self::Object,
            3 => Self::Tombstone,
            4 => Self::SafeVersion,
            5 => Self::ResultRecord,
            6 => Self::Digest,
            7 => Self::Pending,
            8 => Self::Abandoned,
            _ => return None,
        })
    }
}

/// Why bytes are not a log entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum EntryError {
    /// Fewer bytes than a header, or than header, key and value together.
    #[error("log entry of {needed} bytes cut off after {available}")]
    Truncated {
        /// Bytes that the entry has.
        needed: usize,
        /// Bytes that were given.
        available: usize,
    },
    /// The kind byte is no [`EntryKind`].
    #[error("log entry of unknown kind {0}")]
    UnknownKind(u8),
    /// The state word has the generation of another segment.
    #[error("log entry of generation {found} in a segment of generation {expected}")]
    Generation {
        /// In the state word.
        found: u64,
        /// Of the segment.
        expected: u64,
    },
    /// The checksum differs from that of the bytes.
    #[error("log entry's checksum is {stored:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// In the header.
        stored: u32,
        /// Of the bytes.
        computed: u32,
    },
}

/// Bytes that an entry with these lengths takes in the log, padding included.
#[must_use]
#[inline(always)]
pub const fn entry_bytes(key_len: usize, value_len: usize) -> usize {
    (ENTRY_HEADER_BYTES + key_len + value_len).next_multiple_of(ENTRY_ALIGN)
}

/// Bytes of expiry that `flags` announce.
#[inline(always)]
const fn expiry_bytes(flags: u8) -> usize {
    (flags & FLAG_EXPIRES) as usize * (EXPIRY_BYTES / FLAG_EXPIRES as usize)
}

/// A parsed entry header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryHeader {
    /// Segment generation << 1 and the live bit.
    pub state: u64,
    /// CRC-32C as stored.
    pub crc: u32,
    /// What the entry is.
    pub kind: EntryKind,
    /// [`FLAG_IN_PLACE`], [`FLAG_EXPIRES`], [`FLAG_RETIRED`].
    pub flags: u8,
    /// Bytes of key.
    pub key_len: u16,
    /// Bytes of value.
    pub value_len: u32,
    /// The table that the key belongs to.
    pub table: u32,
    /// Version of the object.
    pub version: u64,
}

impl EntryHeader {
    /// Reads a header from the first 32 bytes of `bytes`. Errors: too few bytes, or no known kind.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Self, EntryError> {
        let Some(bytes) = bytes.get(..ENTRY_HEADER_BYTES) else {
            return Err(EntryError::Truncated {
                needed: ENTRY_HEADER_BYTES,
                available: bytes.len(),
            });
        };
        let kind = EntryKind::from_raw(bytes[KIND]).ok_or(EntryError::UnknownKind(bytes[KIND]))?;
        Ok(Self {
            state: load_u64(bytes, 0),
            crc: load_u32(bytes, CRC),
            kind,
            flags: bytes[FLAGS],
            key_len: load_u16(bytes, KEY_LEN),
            value_len: load_u32(bytes, VALUE_LEN),
            table: load_u32(bytes, TABLE),
            version: load_u64(bytes, VERSION),
        })
    }

    /// Writes the header, all but checksum and state word, over the first 32 bytes of `bytes`.
    #[inline(always)]
    pub(crate) fn emit(&self, bytes: &mut [u8]) {
        let bytes = &mut bytes[..ENTRY_HEADER_BYTES];
        bytes[KIND] = self.kind as u8;
        bytes[FLAGS] = self.flags;
        bytes[KEY_LEN..VALUE_LEN].copy_from_slice(&self.key_len.to_le_bytes());
        store_u32(bytes, VALUE_LEN, self.value_len);
        store_u32(bytes, TABLE, self.table);
        store_u64(bytes, VERSION, self.version);
    }

    /// The segment generation in the state word.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.state >> 1
    }

    /// Whether the state word says that this is the current entry of its key.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        self.state & STATE_LIVE != 0
    }

    /// Bytes of header, key, value and expiry, without padding.
    #[must_use]
    #[inline(always)]
    pub const fn span_bytes(&self) -> usize {
        ENTRY_HEADER_BYTES
            + self.key_len as usize
            + self.value_len as usize
            + expiry_bytes(self.flags)
    }

    /// Bytes that the entry takes in the log, padding included.
    #[must_use]
    #[inline(always)]
    pub const fn total_bytes(&self) -> usize {
        self.span_bytes().next_multiple_of(ENTRY_ALIGN)
    }

    /// End of what the checksum covers, relative to the entry.
    const fn checked_end(&self) -> usize {
        match self.kind {
            EntryKind::Tombstone => ENTRY_HEADER_BYTES + self.key_len as usize,
            EntryKind::Pending | EntryKind::Abandoned => ENTRY_HEADER_BYTES,
            _ => self.span_bytes(),
        }
    }
}

/// A view of one whole entry: header, key, value and expiry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    header: EntryHeader,
    bytes: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Views the entry at the start of `bytes`; what follows it is ignored. Errors: cut off, or no known kind.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, EntryError> {
        Self::of(EntryHeader::parse(bytes)?, bytes)
    }

    /// The same, with the header that was read from `bytes`. Errors: cut off.
    #[inline]
    pub(crate) fn of(header: EntryHeader, bytes: &'a [u8]) -> Result<Self, EntryError> {
        let needed = header.span_bytes();
        let bytes = bytes.get(..needed).ok_or(EntryError::Truncated {
            needed,
            available: bytes.len(),
        })?;
        Ok(Self { header, bytes })
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &EntryHeader {
        &self.header
    }

    /// The key.
    #[must_use]
    #[inline]
    pub fn key(&self) -> &'a [u8] {
        &self.bytes[ENTRY_HEADER_BYTES..ENTRY_HEADER_BYTES + usize::from(self.header.key_len)]
    }

    /// The value.
    #[must_use]
    #[inline]
    pub fn value(&self) -> &'a [u8] {
        let start = ENTRY_HEADER_BYTES + usize::from(self.header.key_len);
        &self.bytes[start..start + self.header.value_len as usize]
    }

    /// From when on the object does not exist any more, ns; [`super::NEVER`] if it stays.
    #[must_use]
    #[inline]
    pub fn expires(&self) -> u64 {
        match expiry_bytes(self.header.flags) {
            0 => super::NEVER,
            bytes => load_u64(self.bytes, self.bytes.len() - bytes),
        }
    }

    /// Compares the checksum. Errors: it differs.
    #[inline]
    pub fn verify(&self) -> Result<(), EntryError> {
        let computed = crc32c(&self.bytes[CHECKED..self.header.checked_end()]);
        if computed == self.header.crc {
            Ok(())
        } else {
            Err(EntryError::Checksum {
                stored: self.header.crc,
                computed,
            })
        }
    }
}

/// Computes and stores the checksum of the entry at the start of `bytes`, whose header is `header`, then its state word: with
/// that the entry is part of the log.
#[inline(always)]
pub(crate) fn seal(bytes: &mut [u8], header: &EntryHeader) {
    let crc = crc32c(&bytes[CHECKED..header.checked_end()]);
    seal_as(bytes, header, crc);
}

/// The same where the bytes after the header have been summed before.
pub(crate) fn seal_summed(bytes: &mut [u8], header: &EntryHeader, rest: &Sum) {
    let crc = rest.after(&bytes[CHECKED..ENTRY_HEADER_BYTES]);
    seal_as(bytes, header, crc);
}

#[inline(always)]
fn seal_as(bytes: &mut [u8], header: &EntryHeader, crc: u32) {
    store_u32(bytes, CRC, crc);
    order();
    store_u64(bytes, 0, header.state);
}

/// Stores the state word of the entry at the start of `bytes`.
#[inline(always)]
pub(crate) fn set_state(bytes: &mut [u8], state: u64) {
    order();
    store_u64(bytes, 0, state);
}

/// Length of the key of the entry at `offset`: all that a lookup reads before it compares.
#[inline(always)]
pub(crate) fn key_len_at(mem: &[u8], offset: usize) -> usize {
    usize::from(load_u16(mem, offset + KEY_LEN))
}

/// The key of the entry at `offset`.
#[inline(always)]
pub(crate) fn key_at(mem: &[u8], offset: usize) -> &[u8] {
    let start = offset + ENTRY_HEADER_BYTES;
    &mem[start..start + key_len_at(mem, offset)]
}

/// Value length of the entry at `offset`.
#[inline(always)]
pub(crate) fn value_len_at(mem: &[u8], offset: usize) -> usize {
    load_u32(mem, offset + VALUE_LEN) as usize
}

/// Version of the entry at `offset`.
#[inline(always)]
pub(crate) fn version_at(mem: &[u8], offset: usize) -> u64 {
    load_u64(mem, offset + VERSION)
}

/// Table of the entry at `offset`.
#[inline(always)]
pub(crate) fn table_at(mem: &[u8], offset: usize) -> u32 {
    load_u32(mem, offset + TABLE)
}

/// Bytes that the entry at `offset` takes in the log.
#[inline(always)]
pub(crate) fn total_at(mem: &[u8], offset: usize) -> usize {
    let bytes = ENTRY_HEADER_BYTES
        + key_len_at(mem, offset)
        + value_len_at(mem, offset)
        + expiry_bytes(mem[offset + FLAGS]);
    bytes.next_multiple_of(ENTRY_ALIGN)
}

/// Expiry of the object at `offset`, [`super::NEVER`] if it has none.
#[inline(always)]
pub(crate) fn expires_at(mem: &[u8], offset: usize) -> u64 {
    if mem[offset + FLAGS] & FLAG_EXPIRES == 0 {
        return super::NEVER;
    }
    let end = ENTRY_HEADER_BYTES + key_len_at(mem, offset) + value_len_at(mem, offset);
    load_u64(mem, offset + end)
}

/// Clears the live bit of the entry at `offset`, before anything that follows from its death is stored.
#[inline(always)]
pub(crate) fn clear_live(mem: &mut [u8], offset: usize) {
    let state = load_u64(mem, offset);
    order();
    store_u64(mem, offset, state & !STATE_LIVE);
    order();
}
