//! What the store can say about itself.

use super::index::{BUCKET_BYTES, COUNTER_BYTES};
use super::segment::State;
use super::{Accounting, Store};

/// What the cleaner did since the store was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CleanerWork {
    /// Segments cleaned.
    pub segments_cleaned: u64,
    /// Bytes of live entries and tombstones copied to survivors.
    pub bytes_moved: u64,
    /// Bytes of dead entries and needless tombstones freed.
    pub bytes_freed: u64,
    /// Tombstones dropped.
    pub tombstones_dropped: u64,
    /// Objects taken out because they had expired.
    pub objects_expired: u64,
}

/// A summary of the store. Bytes unless they count something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Objects of all tables.
    pub objects: u64,
    /// Tables, the default table included.
    pub tables: u64,
    /// Clients with a lease.
    pub leases: u64,
    /// Where every byte of the region is.
    pub bytes: Accounting,
    /// Live bytes and open reservations that the store accepts.
    pub capacity: u64,
    /// Bytes of all segments that hold log.
    pub log_bytes: u64,
    /// Live bytes per log byte, in thousandths.
    pub utilisation_permille: u32,
    /// Bytes of hash table: buckets, counters, and overflow buckets in use.
    pub table_bytes: u64,
    /// Overflow buckets in use.
    pub overflow_buckets: u64,
    /// Bytes of one segment.
    pub segment_bytes: u64,
    /// Segments that hold log.
    pub segments: u64,
    /// Segments ready for reuse.
    pub free_segments: u64,
    /// Cleaned segments that wait for transfers in flight, or for their quarantine to end.
    pub quarantined_segments: u64,
    /// Segments that the cleaner found unreadable.
    pub damaged_segments: u64,
    /// Open reservations.
    pub open_reservations: u64,
    /// Results of removes, and leases, that a replay does not know: the store was too full to log them.
    pub unlogged: u64,
    /// What the cleaner did.
    pub cleaner: CleanerWork,
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// A summary of the store. Costs a pass over the list of segments.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let layout = self.layout();
        let segments = self.log.log_segments() as u64;
        let log_bytes = segments << layout.segment_shift;
        let overflow = self.index.overflow_used() as u64;
        Stats {
            objects: self.len(),
            tables: self.tables().count() as u64,
            leases: self.leases() as u64,
            bytes: self.log.bytes,
            capacity: self.capacity(),
            log_bytes,
            utilisation_permille: (self.log.bytes.live * 1000)
                .checked_div(log_bytes)
                .unwrap_or(0) as u32,
            table_bytes: layout.buckets as u64 * (BUCKET_BYTES + COUNTER_BYTES) as u64
                + overflow * BUCKET_BYTES as u64,
            overflow_buckets: overflow,
            segment_bytes: layout.segment_bytes() as u64,
            segments,
            free_segments: self.log.free_segments() as u64,
            quarantined_segments: self.log.count(State::Quarantined) as u64,
            damaged_segments: self.log.count(State::Damaged) as u64,
            open_reservations: self.open_reservations as u64,
            unlogged: self.unlogged,
            cleaner: CleanerWork {
                segments_cleaned: self.cleaner.segments_cleaned,
                bytes_moved: self.cleaner.bytes_moved,
                bytes_freed: self.cleaner.bytes_freed,
                tombstones_dropped: self.cleaner.tombstones_dropped,
                objects_expired: self.cleaner.objects_expired,
            },
        }
    }

    /// Objects of all tables, those included that have expired or whose table was dropped until the cleaner has seen them.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.objects - self.tables.directory_objects()
    }

    /// Whether there are no objects.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
