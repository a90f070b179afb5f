//! Where an object lies.

use super::NEVER;
use super::entry::{
    ENTRY_ALIGN, ENTRY_HEADER_BYTES, EXPIRY_BYTES, expires_at, key_len_at, value_len_at, version_at,
};
use core::ops::Range;

/// Where a key's entry lies. Offsets are relative to the region's start and stay valid until the next call that changes
/// the store, or, for sending, as long as the segment is pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Offset of the entry's header.
    pub entry_offset: usize,
    /// Offset of the value.
    pub value_offset: usize,
    /// Bytes of key; it lies between header and value.
    pub key_len: usize,
    /// Bytes of value.
    pub value_len: usize,
    /// Version of the object.
    pub version: u64,
    /// From when on it does not exist, ns; [`NEVER`] if it stays.
    pub expires: u64,
}

impl Found {
    #[inline(always)]
    pub(crate) fn at(mem: &[u8], entry: usize) -> Self {
        let key_len = key_len_at(mem, entry);
        Self {
            entry_offset: entry,
            value_offset: entry + ENTRY_HEADER_BYTES + key_len,
            key_len,
            value_len: value_len_at(mem, entry),
            version: version_at(mem, entry),
            expires: expires_at(mem, entry),
        }
    }

    /// The whole entry: header, key, value and expiry, without padding.
    #[must_use]
    pub const fn span(&self) -> Range<usize> {
        let expiry = if self.expires == NEVER {
            0
        } else {
            EXPIRY_BYTES
        };
        self.entry_offset..self.value_offset + self.value_len + expiry
    }

    /// The header alone.
    #[must_use]
    pub const fn header(&self) -> Range<usize> {
        self.entry_offset..self.entry_offset + ENTRY_HEADER_BYTES
    }

    /// The key.
    #[must_use]
    pub const fn key(&self) -> Range<usize> {
        self.entry_offset + ENTRY_HEADER_BYTES..self.value_offset
    }

    /// The value.
    #[must_use]
    pub const fn value(&self) -> Range<usize> {
        self.value_offset..self.value_offset + self.value_len
    }

    /// Bytes that the entry takes in the log, padding included.
    #[must_use]
    #[inline(always)]
    pub const fn total_bytes(&self) -> usize {
        let span = self.span();
        (span.end - span.start).next_multiple_of(ENTRY_ALIGN)
    }
}
