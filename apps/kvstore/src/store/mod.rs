//! The storage engine: log-structured memory with a hash table and a cleaner, in one region of bytes.
//!
//! It knows nothing of networks, threads or clocks: the region is handed in, the time is an argument (`now`, ns on a
//! clock of the caller's choice that never goes back), and every call runs to its end. All offsets are
//! relative to the region's start, so that whoever registered the region with a NIC can gather a reply straight from the
//! log. The region must be zeroed; the store does not touch memory before it needs it.
//!
//! Writing appends an [`entry`] to the head segment; the hash table refers to the current entry of each key; what was current
//! before is dead space until the cleaner moves the live entries of a segment to a survivor and frees it. A remove appends
//! a tombstone, so that replaying the log gives the same store. A tombstone is needed as long as a dead version of its key
//! lies in the log. Counters, four per bucket of the table, say how many dead objects lie in the log, and at zero the
//! cleaner drops the tombstone: an overwrite needs none.
//!
//! | module | what it has |
//! | --- | --- |
//! | `layout`, `segment`, [`entry`], `index` | the bytes: superblock, segments of the log, entries, the hash table |
//! | `write`, `remove`, `reserve`, `space` | changes, and the room for them |
//! | `tables`, `rules`, `number`, `expiry`, `once` | the object model: tables, reject rules, numbers, expiry, exactly-once |
//! | `cleaner`, `victim`, `relocate` | the cleaner: what to do, what becomes of each entry, how a large one is moved |
//! | `enumerate`, `stats`, `audit`, `replay` | all objects of a table; accounts; rebuilding a store from its log |
//! | [`onesided`] | how somebody reads who can only READ the region |
//!
//! The calls, all of [`Store`]:
//!
//! | calls | what for |
//! | --- | --- |
//! | `new`, `replay` | an empty store; one from another's log |
//! | `create_table`, `drop_table`, `is_dropping`, `table_id`, `tables` | tables |
//! | `get`, `get_hashed`, `read` | reading: where the object lies ([`Found`]) |
//! | `put`, `write`, `remove`, `increment` | changes, with [`RejectRules`], expiry and [`RequestId`] |
//! | `reserve`, `commit`, `abort` | a write whose value a transport brings |
//! | `take_lease`, `end_lease`, `check`, `refuse` | exactly-once: ask `check` first, execute what is [`Progress::New`] |
//! | `enumerate` | all objects of a table, page by page |
//! | `clean`, `wants_cleaning`, `busy_until` | the cleaner, between requests; when to try again after [`StoreError::Busy`] |
//! | `set_cleaner_mode` | has the cleaner rest, or never rest: for measurements |
//! | `pin`, `unpin`, `segment_of`, `bytes`, `region` | sending straight from the log |
//! | `stats`, `len`, `capacity`, `audit` | accounts |
#![forbid(unsafe_code)]

pub mod entry;
pub mod onesided;

mod audit;
mod cleaner;
mod enumerate;
mod error;
mod expiry;
mod found;
mod hash;
mod ids;
mod index;
mod layout;
mod mem;
mod number;
mod once;
mod relocate;
mod remove;
mod replay;
mod reserve;
mod rules;
mod segment;
mod space;
mod stats;
mod tables;
mod victim;
mod write;

pub use audit::AuditError;
pub use cleaner::{CleanProgress, CleanState, CleanerMode};
pub use entry::{Entry, EntryError, EntryHeader, EntryKind};
pub use enumerate::{Cursor, Enumerated};
pub use error::StoreError;
pub use found::Found;
pub use hash::{hash64, table_seed};
pub use layout::{FORMAT_VERSION, Layout, SUPERBLOCK_BYTES, SUPERBLOCK_MAGIC};
pub use number::{Increment, Incremented};
pub use once::{Outcome, Progress, RECORD_BYTES as RESULT_RECORD_BYTES, RequestId};
pub use reserve::Reservation;
pub use rules::{RejectReason, RejectRules};
pub use segment::Accounting;
pub use stats::{CleanerWork, Stats};
pub use tables::{DEFAULT_TABLE, DEFAULT_TABLE_NAME, TableStats};
pub use write::Write;

use cleaner::Cleaner;
use core::ops::Range;
use entry::{EXPIRY_BYTES, key_at, key_len_at, table_at};
use expiry::Sweep;
use index::{Index, Slot};
use once::Leases;
use segment::Log;
use tables::Tables;

/// The expiry of an object that stays.
pub const NEVER: u64 = 0;

/// How to set up a store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Config {
    /// Seed of the key hash. Take it from a random source, or clients may choose keys that collide.
    pub seed: u64,
    /// Bytes of a segment, a power of two. None: a 128th of the region, 2 to 8 MiB.
    pub segment_bytes: Option<usize>,
    /// How long memory that was freed keeps its bytes at least, ns: longer than any one-sided READ of the region takes, or else its
    /// reader discards it ([`onesided`]; [`crate::limits::QUARANTINE_NS`]). 0: nobody reads the region.
    pub quarantine_ns: u64,
    /// How many bytes a write may clean that finds no segment free, about. A write that needs more is answered with
    /// [`StoreError::Busy`], and succeeds when it is tried again often enough, or after [`Store::clean`]. None: as many as it takes,
    /// which may be most of the log if that is almost full.
    pub clean_for_write: Option<usize>,
    /// Tells this store from others that were in the same place before: a random number.
    pub incarnation: u64,
}

/// A key-value store in one region.
#[derive(Debug)]
pub struct Store<R> {
    region: R,
    seed: u64,
    index: Index,
    log: Log,
    tables: Tables,
    cleaner: Cleaner,
    sweep: Option<Sweep>,
    leases: Leases,
    /// Entries that the hash table refers to.
    objects: u64,
    /// Above every version that a removed key ever had: where the versions of a new key begin.
    safe_version: u64,
    /// The highest version that an object ever had.
    max_version: u64,
    open_reservations: usize,
    /// Results and leases kept in memory alone for want of room.
    unlogged: u64,
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// An empty store in `region`, which must be zeroed. Errors: the region is too small or too large, or the configured
    /// segment size is no power of two within the limits, or too small for the region.
    pub fn new(mut region: R, config: Config) -> Result<Self, StoreError> {
        let mem = region.as_mut();
        let layout = Layout::plan(mem.len(), config.segment_bytes)?;
        layout.emit(&config, mem);
        Ok(Self {
            index: Index::new(&layout),
            log: Log::new(layout, mem, &config, 1),
            tables: Tables::new(),
            cleaner: Cleaner::new(config.clean_for_write),
            sweep: None,
            leases: Leases::default(),
            region,
            seed: config.seed,
            objects: 0,
            safe_version: 1,
            max_version: 0,
            open_reservations: 0,
            unlogged: 0,
        })
    }

    /// The region.
    #[must_use]
    #[inline]
    pub fn region(&self) -> &R {
        &self.region
    }

    /// The region, mutably: for a transport that writes a reserved value itself. Only [`Reservation::value`] of an open
    /// reservation may be written.
    pub fn region_mut(&mut self) -> &mut R {
        &mut self.region
    }

    /// Gives the region back.
    #[must_use]
    pub fn into_region(self) -> R {
        self.region
    }

    /// The bytes at `range` of the region, as given by [`Found`].
    #[must_use]
    #[inline]
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.region.as_ref()[range]
    }

    /// Where things lie in the region.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.log.layout
    }

    /// The hash of `key` of `table` in this store: the first stage of [`Self::get_hashed`].
    #[must_use]
    #[inline(always)]
    pub fn hash(&self, table: u32, key: &[u8]) -> u64 {
        hash64(table_seed(self.seed, table), key)
    }

    /// Finds `key` of `table`. None: it does not exist at `now`, or the table does not.
    #[must_use]
    #[inline]
    pub fn get(&self, table: u32, key: &[u8], now: u64) -> Option<Found> {
        self.get_hashed(self.hash(table, key), table, key, now)
    }

    /// Finds `key` of `table`, whose hash is `hash` ([`Self::hash`]).
    #[must_use]
    #[inline]
    pub fn get_hashed(&self, hash: u64, table: u32, key: &[u8], now: u64) -> Option<Found> {
        self.tables.user_place(table).ok()?;
        self.find(hash, table, key, now)
    }

    /// Reads `key` of `table`. None: it does not exist at `now`. Errors: no such table; a reject rule holds.
    #[inline]
    pub fn read(
        &self,
        table: u32,
        key: &[u8],
        rules: &RejectRules,
        now: u64,
    ) -> Result<Option<Found>, StoreError> {
        self.tables.user_place(table)?;
        let found = self.find(self.hash(table, key), table, key, now);
        rules.check(found.map(|found| found.version))?;
        Ok(found)
    }

    #[inline(always)]
    pub(crate) fn find(&self, hash: u64, table: u32, key: &[u8], now: u64) -> Option<Found> {
        let slot = self.lookup(hash, table, key)?;
        let found = Found::at(self.region.as_ref(), slot.entry);
        (found.expires == NEVER || now < found.expires).then_some(found)
    }

    /// The slot of `key`, expired or not.
    #[inline(always)]
    pub(crate) fn lookup(&self, hash: u64, table: u32, key: &[u8]) -> Option<Slot> {
        let mem = self.region.as_ref();
        self.index.find(mem, hash, |entry| {
            key_len_at(mem, entry) == key.len()
                && table_at(mem, entry) == table
                && key_at(mem, entry) == key
        })
    }

    /// The slot of `key`, if it has not expired.
    pub(crate) fn lookup_current(
        &self,
        hash: u64,
        table: u32,
        key: &[u8],
        now: u64,
    ) -> Option<Slot> {
        self.lookup(hash, table, key)
            .filter(|slot| self.is_current(slot.entry, now))
    }
}
