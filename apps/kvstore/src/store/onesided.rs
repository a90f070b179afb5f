//! How somebody reads who can only READ the region: where to READ, and what to believe of what came.
//!
//! A reader knows the [`View`], which it got from the superblock when it connected. For a key it READs the bucket
//! ([`View::bucket_range`]), gets the entries that may be the key's ([`candidates`]), READs one ([`View::entry_range`]) and checks it
//! ([`verify_entry`]). Who has found a key before READs its entry at once, and says which generation it had
//! there. In doubt the server is asked.
//!
//! **Why a hit was current at an instant within the read.** The bytes of an entry other than its state word do not change as
//! long as the state word says live, and for the quarantine after that, whatever is done: an overwrite, a remove, an expiry and a move by the
//! cleaner clear the live bit first, and only then store what follows from it (the slot that refers to another entry, the
//! acknowledgement, the next use of the memory). So let a READ find the state word live, of the expected generation, at some
//! instant. Then the entry was current at that instant. The other bytes may have been read earlier or later, but not before the
//! entry was complete, because its place was learnt from a slot or a hit, which exist only then; and not after its memory
//! was used again, because that is not before the quarantine has passed since the entry died, and the reader discards what took
//! longer, counted from the READ that its knowledge of the place came from, or, with a known generation, from this one's
//! ([`View::in_time`]). The generation is part of the state word: it names the use of the segment, and no two uses have the
//! same. The checksum is no part of this argument. It finds memory that is damaged, and what an object that is
//! turned into its own tombstone looks like while its header is changed.
//!
//! **Why a miss was one.** An entry stays in its slot of the hash table until it is removed; only a new overflow bucket takes one
//! over, and has it before the chain leads there (`index`). So whoever looks at each slot of the chain once sees every key that exists
//! throughout. A candidate of another key is no reason for doubt if it is live.
//!
//! **Expiry** is judged by the server's clock. A reader gives the latest time that the server's clock may show
//! ([`u64::MAX`] if it has no idea), and what may have expired by then is in doubt.
//!
//! **Trust.** Who may READ the region reads every table. Who may write can put anything into a value, also what looks like an
//! entry, and another reader with a place that it has not used for long may take that for one: give the key to the region to
//! readers who trust the store's writers.

use super::entry::{ENTRY_ALIGN, ENTRY_HEADER_BYTES, Entry, EntryHeader, EntryKind};
use super::index::{BUCKET_BYTES, CHAIN, OFFSET, SLOTS, bucket_offset, tag};
use super::mem::load_u64;
use super::{Layout, NEVER, StoreError, hash64, table_seed};
use crate::limits::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use core::ops::Range;

/// What a reader knows of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    layout: Layout,
    seed: u64,
    quarantine_ns: u64,
    incarnation: u64,
}

impl View {
    /// Reads a superblock ([`super::SUPERBLOCK_BYTES`] from the region's start). Errors: not a store, or one of another format.
    pub fn parse(superblock: &[u8]) -> Result<Self, StoreError> {
        let (layout, config) = Layout::parse(superblock)?;
        Ok(Self {
            layout,
            seed: config.seed,
            quarantine_ns: config.quarantine_ns,
            incarnation: config.incarnation,
        })
    }

    /// Tells this store from another in the same place: what is known of one is worth nothing for the other.
    #[must_use]
    pub const fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// The longest that a lookup may take, ns. 0: this store is not to be read one-sidedly.
    #[must_use]
    pub const fn quarantine_ns(&self) -> u64 {
        self.quarantine_ns
    }

    /// The hash of `key` of `table`.
    #[must_use]
    #[inline]
    pub fn hash(&self, table: u32, key: &[u8]) -> u64 {
        hash64(table_seed(self.seed, table), key)
    }

    /// Where the first bucket of `hash` lies in the region.
    #[must_use]
    #[inline]
    pub fn bucket_range(&self, hash: u64) -> Range<u64> {
        let start = bucket_offset(hash, self.layout.buckets as u64) as u64;
        start..start + BUCKET_BYTES as u64
    }

    /// Where the overflow bucket at `offset` lies. None: there cannot be one.
    #[must_use]
    pub fn overflow_range(&self, offset: u64) -> Option<Range<u64>> {
        let end = offset + BUCKET_BYTES as u64;
        let within = offset >= self.layout.overflow as u64
            && end <= self.layout.region_bytes as u64
            && offset.is_multiple_of(BUCKET_BYTES as u64);
        within.then_some(offset..end)
    }

    /// Where to READ the entry at `offset`, of which `bytes` are wanted (at least its header is). Never beyond the end of its
    /// segment. None: there cannot be an entry.
    #[must_use]
    #[inline]
    pub fn entry_range(&self, offset: u64, bytes: usize) -> Option<Range<u64>> {
        let log = self.layout.log as u64;
        let in_log = offset.checked_sub(log)?;
        let segment = in_log >> self.layout.segment_shift;
        let end = log + ((segment + 1) << self.layout.segment_shift);
        let bytes = bytes.max(ENTRY_HEADER_BYTES) as u64;
        let range = offset..end.min(offset + bytes);
        let fits = segment < self.layout.segments as u64
            && offset.is_multiple_of(ENTRY_ALIGN as u64)
            && range.end - offset >= ENTRY_HEADER_BYTES as u64;
        fits.then_some(range)
    }

    /// Whether a lookup that began at `started` and whose last READ had completed at `ended` may be believed: both times by the
    /// reader's clock, ns. With a known generation it begins with the READ of the entry, else with that of the bucket.
    #[must_use]
    #[inline]
    pub const fn in_time(&self, started: u64, ended: u64) -> bool {
        ended.saturating_sub(started) <= self.quarantine_ns
    }
}

/// What a bucket says of a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidates {
    offsets: [u64; SLOTS],
    count: usize,
    /// Where the chain goes on.
    pub overflow: Option<u64>,
}

impl Candidates {
    /// Offsets of the entries that may be the key's: usually none or one.
    #[must_use]
    pub fn offsets(&self) -> &[u64] {
        &self.offsets[..self.count]
    }
}

/// Looks through a bucket for entries of `hash`. None: in doubt, the bucket is no part of a chain any more.
#[must_use]
#[inline]
pub fn candidates(bucket: &[u8; BUCKET_BYTES], hash: u64) -> Option<Candidates> {
    let mut found = Candidates {
        offsets: [0; SLOTS],
        count: 0,
        overflow: None,
    };
    for index in 0..SLOTS {
        let slot = load_u64(bucket, 8 * index);
        if slot == 0 {
            continue;
        }
        if slot & CHAIN != 0 {
            if index != SLOTS - 1 {
                return None;
            }
            found.overflow = Some(slot & OFFSET);
        } else if slot >> 48 == tag(hash) {
            found.offsets[found.count] = slot & OFFSET;
            found.count += 1;
        } else if slot >> 48 == 0 {
            // The link of a bucket that waits for its next use.
            return None;
        }
    }
    Some(found)
}

/// An object that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit<'a> {
    /// Its value.
    pub value: &'a [u8],
    /// Its version.
    pub version: u64,
    /// The generation at its place: what to expect when it is read again.
    pub generation: u64,
    /// Bytes to READ for the whole entry.
    pub bytes: usize,
}

/// What a READ of an entry says of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// The object.
    Hit(Hit<'a>),
    /// The entry is that of another key, and current: look at the next candidate. After the last one the key does not exist.
    Other,
    /// The entry is longer than what was READ: READ again, so many bytes.
    Longer {
        /// Bytes of the entry.
        bytes: usize,
    },
    /// No answer: the entry has died, is of another generation, may have expired, or is damaged. Ask the server.
    Doubt,
}

/// Judges the bytes of an entry, READ at one of the [`candidates`], or at a place where the key was found before with
/// `generation`. `now` is asked about objects that expire: the latest time that the server's clock may show, ns; [`u64::MAX`] if unknown.
#[must_use]
#[inline]
pub fn verify_entry<'a>(
    bytes: &'a [u8],
    table: u32,
    key: &[u8],
    generation: Option<u64>,
    now: impl FnOnce() -> u64,
) -> Verdict<'a> {
    let Ok(header) = EntryHeader::parse(bytes) else {
        return Verdict::Doubt;
    };
    let expected = header.kind == EntryKind::Object
        && header.is_live()
        && generation.is_none_or(|generation| generation == header.generation())
        && usize::from(header.key_len) <= MAX_KEY_BYTES
        && header.value_len as usize <= MAX_VALUE_BYTES;
    if !expected {
        return Verdict::Doubt;
    }
    let span = header.span_bytes();
    let Ok(entry) = Entry::of(header, bytes) else {
        return Verdict::Longer { bytes: span };
    };
    if entry.verify().is_err() {
        return Verdict::Doubt;
    }
    if header.table != table || entry.key() != key {
        return Verdict::Other;
    }
    let expires = entry.expires();
    if expires != NEVER && expires <= now() {
        return Verdict::Doubt;
    }
    Verdict::Hit(Hit {
        value: entry.value(),
        version: header.version,
        generation: header.generation(),
        bytes: span,
    })
}
