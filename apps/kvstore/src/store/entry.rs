//! The format of a log entry, shared by the engine, the server's replies, clients and replay.
//!
//! An entry starts at a multiple of 8 bytes: a 32-byte header, the key, the value, padding to 8. All integers are
//! little-endian.
//!
//! | bytes | field | |
//! | --- | --- | --- |
//! | 0..8 | state | segment generation << 1, bit 0: live. Outside the checksum; a one-sided reader checks it |
//! | 8..12 | crc | CRC-32C of bytes 12.. to the end of the value (of the key, in a tombstone) |
//! | 12 | kind | [`EntryKind`] |
//! | 13 | flags | [`FLAG_IN_PLACE`] |
//! | 14..16 | key_len | |
//! | 16..20 | value_len | |
//! | 20..24 | table | 0: the only table so far |
//! | 24..32 | version | of the object; of a segment header, the store's safe version when the segment was opened |

use super::mem::{load_u16, load_u32, load_u64, store_u32, store_u64};
use crate::crc::crc32c;
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
    /// Reserved: a raise of the safe version outside a segment header.
    SafeVersion = 4,
    /// Reserved: the result of a request, kept so that a retry does not execute again.
    ResultRecord = 5,
    /// Reserved: the list of segments that make up the log, for replicas.
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

/// A parsed entry header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryHeader {
    /// Segment generation << 1 and the live bit.
    pub state: u64,
    /// CRC-32C as stored.
    pub crc: u32,
    /// What the entry is.
    pub kind: EntryKind,
    /// [`FLAG_IN_PLACE`] or 0.
    pub flags: u8,
    /// Bytes of key.
    pub key_len: u16,
    /// Bytes of value.
    pub value_len: u32,
    /// The table that the key belongs to; 0.
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

    /// Writes the header, all but its checksum, over the first 32 bytes of `bytes`.
    #[inline]
    pub(crate) fn emit(&self, bytes: &mut [u8]) {
        let bytes = &mut bytes[..ENTRY_HEADER_BYTES];
        store_u64(bytes, 0, self.state);
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

    /// Bytes that the entry takes in the log, padding included.
    #[must_use]
    #[inline(always)]
    pub const fn total_bytes(&self) -> usize {
        entry_bytes(self.key_len as usize, self.value_len as usize)
    }

    /// End of what the checksum covers, relative to the entry.
    const fn checked_end(&self) -> usize {
        let key_end = ENTRY_HEADER_BYTES + self.key_len as usize;
        match self.kind {
            EntryKind::Tombstone => key_end,
            _ => key_end + self.value_len as usize,
        }
    }
}

/// A view of one whole entry: header, key and value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    header: EntryHeader,
    bytes: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Views the entry at the start of `bytes`; what follows it is ignored. Errors: cut off, or no known kind.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, EntryError> {
        let header = EntryHeader::parse(bytes)?;
        let needed = ENTRY_HEADER_BYTES + usize::from(header.key_len) + header.value_len as usize;
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
    pub fn key(&self) -> &'a [u8] {
        &self.bytes[ENTRY_HEADER_BYTES..ENTRY_HEADER_BYTES + usize::from(self.header.key_len)]
    }

    /// The value.
    #[must_use]
    pub fn value(&self) -> &'a [u8] {
        &self.bytes[ENTRY_HEADER_BYTES + usize::from(self.header.key_len)..]
    }

    /// Compares the checksum. Errors: it differs.
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

/// Computes and stores the checksum of the entry at the start of `bytes`, whose header is `header`.
#[inline]
pub(crate) fn seal_checksum(bytes: &mut [u8], header: &EntryHeader) {
    let crc = crc32c(&bytes[CHECKED..header.checked_end()]);
    store_u32(bytes, CRC, crc);
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

/// Clears the live bit of the entry at `offset`.
#[inline(always)]
pub(crate) fn clear_live(mem: &mut [u8], offset: usize) {
    let state = load_u64(mem, offset);
    store_u64(mem, offset, state & !STATE_LIVE);
}
