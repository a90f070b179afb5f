//! Every bound of this crate, with its reason.

/// Longest key, in bytes: the length travels as a `u16` and an empty key is an error.
pub const MAX_KEY_BYTES: usize = u16::MAX as usize;

/// Longest value, in bytes. A value must fit one segment together with the longest key, and the smallest segment is 2 MiB.
pub const MAX_VALUE_BYTES: usize = 1 << 20;

/// Smallest segment chosen from a region's size: fits the longest key, the longest value and all headers.
pub const MIN_AUTO_SEGMENT_BYTES: usize = 2 << 20;

/// Largest segment chosen from a region's size: bounds what one cleaning pass copies.
pub const MAX_AUTO_SEGMENT_BYTES: usize = 8 << 20;

/// A region is divided into about this many segments (within the two bounds above), so that head, survivor and the
/// cleaner's reserve together stay a few per cent of the log.
pub const SEGMENTS_PER_REGION: usize = 64;

/// Smallest segment that a configuration may ask for: below it headers dominate.
pub const MIN_SEGMENT_BYTES: usize = 1 << 10;

/// Largest segment that a configuration may ask for: offsets inside a segment are kept in 32 bits with room for sums.
pub const MAX_SEGMENT_BYTES: usize = 1 << 30;

/// Fewest segments a store works with: head, survivor, the cleaner's reserve, and two with data.
pub const MIN_SEGMENTS: usize = 5;

/// The front of the region (hash table, counters, first overflow buckets) takes one part in this many. At 100 B values and
/// 20 B keys a full log then loads the table to two thirds (12 B of table per object).
pub const TABLE_FRACTION: usize = 15;

/// A region's largest size: a hash-table slot holds 47 bits of offset.
pub const MAX_REGION_BYTES: u64 = 1 << 47;

/// Free segments that only the cleaner may take: the live entries of any segment fit one empty segment, so with one in
/// reserve every cleaning pass that was started can be finished.
pub const CLEANER_RESERVE_SEGMENTS: usize = 1;

/// Segments that never hold live data counted as capacity: the cleaner's reserve, the head and the survivor.
pub const WORKING_SEGMENTS: usize = CLEANER_RESERVE_SEGMENTS + 2;

/// One part in this many of the remaining capacity stays unused, so that some segment always has that share to give.
pub const SLACK_FRACTION: usize = 64;

/// Segments cleaned on behalf of one write before the store is declared full: with each giving at least
/// 1/[`SLACK_FRACTION`] of a segment, twice that many must have freed one unless entries do not pack.
pub const MAX_SYNC_VICTIMS: usize = 2 * SLACK_FRACTION;

/// Largest value that travels inside a request or a reply, in bytes. Larger ones go by address and key, so that a
/// connection's receive buffers stay at kilobytes.
pub const EAGER_VALUE_BYTES: usize = 4096;

/// Longest key that travels inside a request or a reply, in bytes. Longer ones go by address and key.
pub const EAGER_KEY_BYTES: usize = 1024;
