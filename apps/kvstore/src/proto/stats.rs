//! The counters of a server, the answer to STATS: so many u64 in a row.

use super::cursor::Reader;
use super::{ProtoError, Writer};
use crate::store::Stats;

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
    /// Keys.
    objects,
    /// Bytes of current entries: header, key, value, padding.
    live_bytes,
    /// Bytes of tombstones.
    tombstone_bytes,
    /// Bytes of values still being transferred.
    pending_bytes,
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
    /// Bytes of hash table in use.
    table_bytes,
    /// Bytes of one segment.
    segment_bytes,
    /// Log segments.
    segments,
    /// Free segments.
    free_segments,
    /// Segments cleaned so far.
    cleaned_segments,
    /// Bytes that the cleaner moved so far.
    cleaner_moved_bytes,
    /// GETs answered, misses included.
    gets,
    /// GETs that found nothing.
    misses,
    /// PUTs done.
    puts,
    /// DELs that removed something.
    dels,
    /// Requests refused or failed.
    errors,
    /// Clients connected.
    connections,
}

/// Bytes of the counters in a message.
pub const STATS_BYTES: usize = size_of::<StatsReply>();

/// Counters as they lie in a message: small to pass around, unlike what they say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatsView<'a> {
    bytes: &'a [u8; STATS_BYTES],
}

impl<'a> StatsView<'a> {
    /// Views bytes that [`StatsReply::to_bytes`] made.
    #[must_use]
    pub const fn new(bytes: &'a [u8; STATS_BYTES]) -> Self {
        Self { bytes }
    }

    /// The counters.
    #[must_use]
    pub fn get(&self) -> StatsReply {
        // Of the right length by its type.
        StatsReply::parse(&mut Reader { bytes: self.bytes }).unwrap_or_default()
    }

    pub(super) fn parse(input: &mut Reader<'a>) -> Result<Self, ProtoError> {
        let taken = input.take(STATS_BYTES)?;
        taken
            .try_into()
            .map(Self::new)
            .map_err(|_| ProtoError::Field("stats"))
    }

    pub(super) fn emit(&self, out: &mut Writer<'_>) -> Result<(), ProtoError> {
        out.put(self.bytes)
    }
}

impl StatsReply {
    /// As they lie in a message.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; STATS_BYTES] {
        let mut bytes = [0; STATS_BYTES];
        for (to, (_, value)) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.fields()) {
            *to = value.to_le_bytes();
        }
        bytes
    }

    /// Takes over what the store says; the server's own counters stay as they are.
    pub fn set_store(&mut self, stats: &Stats) {
        self.objects = stats.objects;
        self.live_bytes = stats.bytes.live;
        self.tombstone_bytes = stats.bytes.tombstones;
        self.pending_bytes = stats.bytes.pending;
        self.dead_bytes = stats.bytes.dead;
        self.free_bytes = stats.bytes.free;
        self.overhead_bytes = stats.bytes.overhead;
        self.capacity_bytes = stats.capacity;
        self.log_bytes = stats.log_bytes;
        self.table_bytes = stats.table_bytes;
        self.segment_bytes = stats.segment_bytes;
        self.segments = stats.segments;
        self.free_segments = stats.free_segments;
        self.cleaned_segments = stats.cleaner.segments_cleaned;
        self.cleaner_moved_bytes = stats.cleaner.bytes_moved;
    }
}
