//! What the store refuses, and why.

use crate::limits::{
    MAX_KEY_BYTES, MAX_LEASES, MAX_REGION_BYTES, MAX_RESULTS, MAX_SEGMENT_BYTES,
    MAX_TABLE_NAME_BYTES, MAX_TABLES, MIN_SEGMENT_BYTES, MIN_SEGMENTS,
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
    /// Room could be made, but not at once: transfers in flight hold the segments that would be reused, or these have to rest
    /// until nobody can be reading them, or more has to be cleaned than one write may ([`super::Config::clean_for_write`]).
    #[error(
        "no segment is free until transfers in flight complete, time passes or the cleaner has worked; try again"
    )]
    Busy,
    /// A reject rule held: nothing was changed.
    #[error("rejected: the object {reason} (its version is {version})")]
    Rejected {
        /// Which rule.
        reason: super::RejectReason,
        /// Version of the object; 0 if it does not exist.
        version: u64,
    },
    /// No such table.
    #[error("there is no table with id {table}: it was dropped, or never created")]
    UnknownTable {
        /// Id asked for.
        table: u32,
    },
    /// A table of that name exists.
    #[error("a table of that name exists; its id is {table}")]
    TableExists {
        /// Id of the table.
        table: u32,
    },
    /// A table's name is empty, too long, or not printable.
    #[error("a table's name has 1 to {MAX_TABLE_NAME_BYTES} bytes and no control characters")]
    TableName,
    /// The default table cannot be dropped.
    #[error("the default table cannot be dropped; remove its objects, or use another table")]
    DefaultTable,
    /// No more tables, or no more ids.
    #[error(
        "the store has {MAX_TABLES} tables, or tables whose objects are still being removed: drop some, or wait"
    )]
    TooManyTables,
    /// An increment of something else than a number of 8 bytes.
    #[error("only values of 8 bytes can be incremented; this one has {bytes}")]
    NotANumber {
        /// Bytes of the value.
        bytes: usize,
    },
    /// The client has no lease (any more), so it cannot be told whether a request was executed before.
    #[error("client {client:#x} has no lease: it expired, or was never taken")]
    NoLease {
        /// The client.
        client: u64,
    },
    /// No more clients with leases.
    #[error("{MAX_LEASES} clients have leases; wait until one expires")]
    TooManyLeases,
    /// A client has too many results that it did not acknowledge.
    #[error(
        "request {sequence} is {MAX_RESULTS} or more after the client's first incomplete one, {first_incomplete}: acknowledge results"
    )]
    TooManyResults {
        /// Sequence number of the request.
        sequence: u64,
        /// First request whose result the client did not acknowledge.
        first_incomplete: u64,
    },
    /// A request with that number was begun or executed before, or its result was acknowledged.
    #[error(
        "request {sequence} of the client was begun before; look its result up instead of executing it"
    )]
    DuplicateRequest {
        /// Sequence number of the request.
        sequence: u64,
    },
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
    /// Segments so small that listing all of them takes too much of each.
    #[error("{segments} segments of {bytes} bytes are too many for a region; make segments larger")]
    SegmentsTooMany {
        /// Segments of the region.
        segments: usize,
        /// Bytes of a segment.
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
    /// Replay misses a segment that the log's newest digest lists.
    #[error(
        "the log is incomplete: segment {segment} (generation {generation}) is missing or damaged"
    )]
    Incomplete {
        /// Index of the segment in the region.
        segment: usize,
        /// Generation that the digest lists there.
        generation: u64,
    },
    /// Replay needs an empty store.
    #[error("a log can only be replayed into an empty store; this one holds {objects} objects")]
    NotEmpty {
        /// Objects in the store.
        objects: u64,
    },
}
