//! The state of a server, the answer to STATS: so many u64 in a row, then for each [`Class`] a histogram of service times.

use super::cursor::{Reader, Writer};
use super::histogram::MAX_HISTOGRAM_BYTES;
use super::{Histogram, HistogramView, MAX_REPLY_BYTES, ProtoError};
use crate::store::Stats;

/// Kinds of operation whose service times are kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Reads.
    Read = 0,
    /// Writes, removes, increments.
    Write = 1,
    /// Everything else.
    Other = 2,
}

impl Class {
    /// All of them, in the order of the message.
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Other];

    /// Its name, for people and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Other => "other",
        }
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of a server and its store. Bytes unless they count something.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct StatsReply {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl StatsReply {
            /// Every counter with its name, in the order of the message.
            #[must_use]
            pub const fn fields(&self) -> [(&'static str, u64); [$(stringify!($name)),*].len()] {
                [$((stringify!($name), self.$name)),*]
            }

            fn parse(input: &mut Reader<'_>) -> Result<Self, ProtoError> {
                Ok(Self { $($name: input.u64()?,)* })
            }
        }
    };
}

counters! {
    /// Objects of all tables.
    objects,
    /// Tables, the default table included.
    tables,
    /// Bytes of current entries: header, key, value, padding.
    live_bytes,
    /// Bytes of tombstones.
    tombstone_bytes,
    /// Bytes of values still being transferred.
    pending_bytes,
    /// Bytes of results kept for requests that may be retried.
    result_bytes,
    /// Bytes that the cleaner can reclaim.
    dead_bytes,
    /// Bytes ready for writing.
    free_bytes,
    /// Bytes of hash table and headers.
    overhead_bytes,
    /// Live and pending bytes that the store accepts.
    capacity_bytes,
    /// Bytes of all log segments.
    log_bytes,
    /// Live bytes per log byte, in thousandths.
    utilisation_permille,
    /// Bytes of hash table in use.
    table_bytes,
    /// Bytes of one segment.
    segment_bytes,
    /// Log segments.
    segments,
    /// Free segments.
    free_segments,
    /// Cleaned segments that wait for transfers in flight, or for their quarantine to end.
    quarantined_segments,
    /// Segments that the cleaner found unreadable.
    damaged_segments,
    /// Segments cleaned so far.
    cleaned_segments,
    /// Bytes that the cleaner moved so far.
    cleaner_moved_bytes,
    /// Bytes that the cleaner freed so far.
    cleaner_freed_bytes,
    /// Tombstones that the cleaner dropped so far.
    tombstones_dropped,
    /// Objects taken out so far because they had expired.
    objects_expired,
    /// Clients with a lease.
    leases,
    /// Results and leases that are in memory alone, because the log had no room: a replay would not know them.
    unlogged,
    /// Reads answered, misses included; elements of multi-operations count one by one, here and below.
    gets,
    /// Reads and removes that found nothing.
    misses,
    /// Writes done.
    puts,
    /// Removes that removed something.
    dels,
    /// Increments done.
    increments,
    /// Operations that a reject rule refused.
    rejects,
    /// Requests that were executed before and got the result kept for them.
    duplicates,
    /// Multi-operations.
    multis,
    /// Pages of enumerations.
    pages,
    /// Requests refused or failed.
    errors,
    /// Clients connected.
    connections,
    /// Clients accepted so far.
    accepted,
    /// Connections ended because their client broke the protocol or took no replies.
    expelled,
    /// Bytes registered for connections: rings, receive and scratch buffers.
    connection_bytes,
}

/// Bytes of the counters in a message.
pub const STATS_COUNTERS: usize = size_of::<StatsReply>();

const _: () = assert!(STATS_COUNTERS + MAX_HISTOGRAM_BYTES <= MAX_REPLY_BYTES);

/// A server's state as it lies in a message: small to pass around, unlike what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatsView<'a> {
    pub(super) bytes: &'a [u8],
    times: [HistogramView<'a>; Class::ALL.len()],
}

impl<'a> StatsView<'a> {
    /// Views what [`emit_stats`] wrote. Errors: cut off, a histogram that is none, or anything left over.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ProtoError> {
        let mut input = Reader { bytes };
        input.take(STATS_COUNTERS)?;
        let mut times = [HistogramView::EMPTY; Class::ALL.len()];
        for times in &mut times {
            *times = HistogramView::parse(&mut input)?;
        }
        input.end()?;
        Ok(Self { bytes, times })
    }

    /// The counters.
    #[must_use]
    pub fn get(&self) -> StatsReply {
        // Long enough, as it was parsed.
        StatsReply::parse(&mut Reader { bytes: self.bytes }).unwrap_or_default()
    }

    /// Service times of sampled requests of a class, ns: from a request's completion to its reply's work request.
    #[must_use]
    pub const fn times(&self, class: Class) -> HistogramView<'a> {
        self.times[class as usize]
    }
}

/// Writes a server's state. Returns its length. Errors: `out` is too short ([`MAX_REPLY_BYTES`] suffice).
pub fn emit_stats(
    counters: &StatsReply,
    times: &[Histogram; Class::ALL.len()],
    out: &mut [u8],
) -> Result<usize, ProtoError> {
    let mut out = Writer { out, at: 0 };
    for (_, value) in counters.fields() {
        out.put(&value.to_le_bytes())?;
    }
    for times in times {
        times.emit(&mut out)?;
    }
    Ok(out.at)
}

impl StatsReply {
    /// Takes over what the store says; the server's own counters stay as they are.
    pub fn set_store(&mut self, stats: &Stats) {
        self.objects = stats.objects;
        self.tables = stats.tables;
        self.live_bytes = stats.bytes.live;
        self.tombstone_bytes = stats.bytes.tombstones;
        self.pending_bytes = stats.bytes.pending;
        self.result_bytes = stats.bytes.records;
        self.dead_bytes = stats.bytes.dead;
        self.free_bytes = stats.bytes.free;
        self.overhead_bytes = stats.bytes.overhead;
        self.capacity_bytes = stats.capacity;
        self.log_bytes = stats.log_bytes;
        self.utilisation_permille = u64::from(stats.utilisation_permille);
        self.table_bytes = stats.table_bytes;
        self.segment_bytes = stats.segment_bytes;
        self.segments = stats.segments;
        self.free_segments = stats.free_segments;
        self.quarantined_segments = stats.quarantined_segments;
        self.damaged_segments = stats.damaged_segments;
        self.cleaned_segments = stats.cleaner.segments_cleaned;
        self.cleaner_moved_bytes = stats.cleaner.bytes_moved;
        self.cleaner_freed_bytes = stats.cleaner.bytes_freed;
        self.tombstones_dropped = stats.cleaner.tombstones_dropped;
        self.objects_expired = stats.cleaner.objects_expired;
        self.leases = stats.leases;
        self.unlogged = stats.unlogged;
    }
}
