//! Every bound of this crate, with its reason.

/// Longest key, in bytes: the length travels as a `u16` and an empty key is an error.
pub const MAX_KEY_BYTES: usize = u16::MAX as usize;

/// Longest value, in bytes. A value must fit one segment together with the longest key, and the smallest segment is 2 MiB.
pub const MAX_VALUE_BYTES: usize = 1 << 20;

/// Smallest segment chosen from a region's size: fits the longest key, the longest value and all headers.
pub const MIN_AUTO_SEGMENT_BYTES: usize = 2 << 20;

/// Largest segment chosen from a region's size: bounds what one cleaning pass copies.
pub const MAX_AUTO_SEGMENT_BYTES: usize = 8 << 20;

/// A region is divided into about this many segments (within the two bounds above), so that head, survivor and what the cleaner
/// keeps free together stay 4% of the log: with 64 they are 8%, and at 90% live the cleaner moves nearly twice as much.
pub const SEGMENTS_PER_REGION: usize = 128;

/// Smallest segment that a configuration may ask for: below it headers dominate.
pub const MIN_SEGMENT_BYTES: usize = 1 << 10;

/// Largest segment that a configuration may ask for: offsets inside a segment are kept in 32 bits with room for sums.
pub const MAX_SEGMENT_BYTES: usize = 1 << 30;

/// Fewest segments a store works with: head, survivor, the cleaner's reserve, and two with data.
pub const MIN_SEGMENTS: usize = 5;

/// The front of the region (hash table, counters, first overflow buckets) takes one part in this many. At 100 B values and
/// keys of 16 B a full log then loads the buckets to 70% (17 B of table per object), and the first pool has the overflow buckets for
/// it: no segment has to become one.
pub const TABLE_FRACTION: usize = 11;

/// A region's largest size: a hash-table slot holds 47 bits of offset.
pub const MAX_REGION_BYTES: u64 = 1 << 47;

/// Header and digest of a segment (8 bytes for every segment of the region) take at most one part in this many of it. With
/// segments of 8 MiB that allows regions of 2 TiB.
pub const PROLOGUE_FRACTION: usize = 4;

/// Tables at once, dropped ones included until their objects are gone: a few bytes each in memory, looked up by id in constant
/// time.
pub const MAX_TABLES: usize = 4096;

/// Longest name of a table, in bytes.
pub const MAX_TABLE_NAME_BYTES: usize = 255;

/// How long memory that was freed keeps its bytes, ns, where clients read the log themselves: a READ takes some
/// microseconds, so it ends in time unless its client was stopped in between; and at 1 GB/s of writes it withholds half a segment of 8 MiB.
pub const QUARANTINE_NS: u64 = 4_000_000;

/// The quarantine lasts one part in this many longer than readers are told, for clocks that run at different rates and for
/// callers that read the clock once for several calls. So a time given to the store may be a sixteenth of the quarantine old.
pub const QUARANTINE_MARGIN: u64 = 8;

/// Buckets searched for objects of dropped tables on behalf of one write that finds the store full: bounds the time of that
/// write.
pub const MAX_SYNC_DROP_BUCKETS: usize = 4096;

/// Entries up to so many bytes are moved in one go by the cleaner, some 10 us; longer ones in parts.
pub const LARGE_MOVE_BYTES: usize = 64 << 10;

/// Leases that expired which are ended in one slice of the cleaner: each has up to [`MAX_RESULTS`] records to let go of.
pub const LEASES_PER_SLICE: usize = 8;

/// Segments searched for expired objects on behalf of one write that finds the store full.
pub const MAX_SYNC_SWEEPS: usize = 4;

/// Objects that expire are looked for in a segment when about one part in this many of it has expired.
pub const SWEEP_FRACTION: u64 = 64;

/// Segments whose search for expired objects has to wait for transfers are looked at again after this, ns.
pub const SWEEP_RETRY_NS: u64 = 1_000_000;

/// Clients with a lease at once: each costs [`MAX_RESULTS`] times 48 bytes of memory.
pub const MAX_LEASES: usize = 4096;

/// Requests of one client whose results are kept, a power of two: what it may have in flight or unacknowledged.
pub const MAX_RESULTS: usize = 64;

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
