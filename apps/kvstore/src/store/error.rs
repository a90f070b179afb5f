//! What the store refuses, and why.

use crate::limits::{
    MAX_KEY_BYTES, MAX_REGION_BYTES, MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES, MIN_SEGMENTS,
};
use thiserror::Error;

/// Errors of the storage engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The key has no bytes.
    #[error("the key is empty; a key has 1 to {MAX_KEY_BYTES} bytes")]
    EmptyKey,
    /// The key has too many bytes.
    #[error("the key has {bytes} bytes; the limit is {limit}")]
    KeyTooLong {
        /// Bytes of the key.
        bytes: usize,
        /// Most bytes that a key may have in this store.
        limit: usize,
    },
    /// The value has too many bytes.
    #[error("the value has {bytes} bytes; the limit is {limit}")]
    ValueTooLarge {
        /// Bytes of the value.
        bytes: usize,
        /// Most bytes that a value of this key may have in this store.
        limit: usize,
    },
    /// No room for the write, even after cleaning.
    #[error(
        "the store is full: {live} of {capacity} bytes are live; remove keys or give it more memory"
    )]
    Full {
        /// Bytes of live entries and open reservations.
        live: u64,
        /// Bytes that they may reach.
        capacity: u64,
    },
    /// Room could be made, but transfers in flight still hold the segments that would be reused.
    #[error(
        "no segment is free until transfers in flight complete; reap completions, unpin, and try again"
    )]
    Busy,
    /// The reservation is not one of this store's open ones.
    #[error("the reservation does not belong to this store")]
    UnknownReservation,
    /// The region is too small.
    #[error(
        "a region of {bytes} bytes is too small for {MIN_SEGMENTS} segments and a hash table; give it {needed}"
    )]
    RegionTooSmall {
        /// Bytes of the region.
        bytes: usize,
        /// Bytes that suffice.
        needed: usize,
    },
    /// The region is too large for 47-bit offsets.
    #[error("a region of {bytes} bytes exceeds the limit of {MAX_REGION_BYTES}")]
    RegionTooLarge {
        /// Bytes of the region.
        bytes: usize,
    },
    /// The configured segment size cannot be used.
    #[error(
        "a segment of {bytes} bytes: must be a power of two from {MIN_SEGMENT_BYTES} to {MAX_SEGMENT_BYTES}"
    )]
    SegmentSize {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The bytes given to replay hold no store.
    #[error("these bytes do not hold a store (no valid superblock)")]
    NotAStore,
    /// The store was written in another format.
    #[error(
        "the store has format {version}, this program reads format {}",
        super::FORMAT_VERSION
    )]
    Format {
        /// Format number found.
        version: u32,
    },
    /// Replay found an entry that is damaged.
    #[error("the log is damaged at offset {offset}: {cause}")]
    Damaged {
        /// Offset of the entry in the region.
        offset: usize,
        /// What is wrong with it.
        cause: super::EntryError,
    },
    /// Replay needs an empty store.
    #[error("a log can only be replayed into an empty store; this one holds {objects} objects")]
    NotEmpty {
        /// Objects in the store.
        objects: u64,
    },
}
