//! The storage engine: log-structured memory with a hash table and a cleaner, in one region of bytes.
//!
//! It knows nothing of networks, threads or clocks: the region is handed in, and every call runs to its end. All offsets are
//! relative to the region's start, so that whoever registered the region with a NIC can gather a reply straight from the
//! log. The region must be zeroed; the store does not touch memory before it needs it.
//!
//! Writing appends an [`entry`] to the head segment; the hash table refers to the current entry of each key; what was current
//! before is dead space until the cleaner moves the live entries of a segment to a survivor and frees it. A remove appends
//! a tombstone, so that replaying the log gives the same store. A tombstone is needed as long as a dead version of its key
//! lies in the log. Counters, four per bucket of the table, say how many dead objects lie in the log, and at zero the
//! cleaner drops the tombstone: an overwrite needs none.
#![forbid(unsafe_code)]

pub mod entry;

mod audit;
mod cleaner;
mod error;
mod hash;
mod layout;
mod mem;
mod replay;
mod scan;
mod segment;
mod stats;
mod table;

pub use audit::AuditError;
pub use cleaner::{CleanProgress, CleanState};
pub use entry::{Entry, EntryError, EntryHeader, EntryKind};
pub use error::StoreError;
pub use hash::hash64;
pub use layout::{FORMAT_VERSION, Layout, SUPERBLOCK_BYTES, SUPERBLOCK_MAGIC};
pub use scan::ScanProgress;
pub use segment::Accounting;
pub use stats::{CleanerWork, Stats};

use crate::limits::{
    CLEANER_RESERVE_SEGMENTS, MAX_KEY_BYTES, MAX_VALUE_BYTES, SLACK_FRACTION, WORKING_SEGMENTS,
};
use cleaner::Cleaner;
use core::ops::Range;
use entry::{
    ENTRY_HEADER_BYTES, FLAG_IN_PLACE, STATE_LIVE, clear_live, entry_bytes, key_at, key_len_at,
    seal_checksum, value_len_at, version_at,
};
use segment::{Log, SEGMENT_HEADER_BYTES, Target};
use table::{Slot, Table};

/// How to set up a store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Config {
    /// Seed of the key hash. Take it from a random source, or clients may choose keys that collide.
    pub seed: u64,
    /// Bytes of a segment, a power of two. None: a 64th of the region, 2 to 8 MiB.
    pub segment_bytes: Option<usize>,
}

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
}

impl Found {
    /// The whole entry: header, key and value, without padding.
    #[must_use]
    pub const fn span(&self) -> Range<usize> {
        self.entry_offset..self.value_offset + self.value_len
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

    #[inline(always)]
    fn at(mem: &[u8], entry: usize) -> Self {
        let key_len = key_len_at(mem, entry);
        Self {
            entry_offset: entry,
            value_offset: entry + ENTRY_HEADER_BYTES + key_len,
            key_len,
            value_len: value_len_at(mem, entry),
            version: version_at(mem, entry),
        }
    }
}

/// Log space for a value that something else will write. Give it back by [`Store::commit`] or [`Store::abort`]; until then
/// its segment cannot be cleaned.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a reservation that is neither committed nor aborted holds its segment for ever"]
pub struct Reservation {
    entry: usize,
    hash: u64,
    key_len: usize,
    value_len: usize,
    generation: u64,
}

impl Reservation {
    /// Where the value goes, relative to the region's start.
    #[must_use]
    pub const fn value(&self) -> Range<usize> {
        let start = self.entry + ENTRY_HEADER_BYTES + self.key_len;
        start..start + self.value_len
    }

    const fn bytes(&self) -> usize {
        entry_bytes(self.key_len, self.value_len)
    }
}

/// A key-value store in one region.
#[derive(Debug)]
pub struct Store<R> {
    region: R,
    seed: u64,
    table: Table,
    log: Log,
    cleaner: Cleaner,
    objects: u64,
    /// Above every version that a removed key ever had.
    safe_version: u64,
    open_reservations: usize,
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// An empty store in `region`, which must be zeroed. Errors: the region is too small or too large, or the configured
    /// segment size is no power of two within the limits.
    pub fn new(mut region: R, config: Config) -> Result<Self, StoreError> {
        let mem = region.as_mut();
        let layout = Layout::plan(mem.len(), config.segment_bytes)?;
        layout.emit(config.seed, mem);
        Ok(Self {
            table: Table::new(&layout),
            log: Log::new(layout, mem, 1),
            cleaner: Cleaner::default(),
            region,
            seed: config.seed,
            objects: 0,
            safe_version: 1,
            open_reservations: 0,
        })
    }

    /// The region.
    #[must_use]
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
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.region.as_ref()[range]
    }

    /// Where things lie in the region.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.log.layout
    }

    /// The hash of `key` in this store: the first stage of [`Self::get_hashed`].
    #[must_use]
    #[inline]
    pub fn hash(&self, key: &[u8]) -> u64 {
        hash64(self.seed, key)
    }

    /// Finds `key`.
    #[must_use]
    #[inline]
    pub fn get(&self, key: &[u8]) -> Option<Found> {
        self.get_hashed(self.hash(key), key)
    }

    /// Finds `key`, whose hash is `hash` ([`Self::hash`]).
    #[must_use]
    #[inline]
    pub fn get_hashed(&self, hash: u64, key: &[u8]) -> Option<Found> {
        let mem = self.region.as_ref();
        let slot = self.lookup(hash, key)?;
        Some(Found::at(mem, slot.entry))
    }

    #[inline(always)]
    fn lookup(&self, hash: u64, key: &[u8]) -> Option<Slot> {
        let mem = self.region.as_ref();
        self.table.find(mem, hash, |entry| {
            key_len_at(mem, entry) == key.len() && key_at(mem, entry) == key
        })
    }

    /// Stores `value` under `key`. Returns the object's version: greater than any that the key ever had.
    ///
    /// Errors: a key or value outside the limits; [`StoreError::Full`]; [`StoreError::Busy`] if only pinned segments could
    /// make room. The old value stays on any error.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<u64, StoreError> {
        let hash = self.hash(key);
        self.put_hashed(hash, key, value)
    }

    /// [`Self::put`] for a key whose hash is `hash` ([`Self::hash`]).
    pub fn put_hashed(&mut self, hash: u64, key: &[u8], value: &[u8]) -> Result<u64, StoreError> {
        self.put_versioned(hash, key, value, None)
    }

    fn put_versioned(
        &mut self,
        hash: u64,
        key: &[u8],
        value: &[u8],
        version: Option<u64>,
    ) -> Result<u64, StoreError> {
        self.check_lengths(key, value.len())?;
        let bytes = entry_bytes(key.len(), value.len());
        self.admit(hash, key, bytes)?;
        let (entry, generation) = self.take(bytes)?;
        // Only now: making room may have moved the old entry.
        let old = self.lookup(hash, key);
        let version = version.unwrap_or_else(|| self.next_version(old));
        let header = EntryHeader {
            state: generation << 1 | STATE_LIVE,
            crc: 0,
            kind: EntryKind::Object,
            flags: 0,
            key_len: key.len() as u16,
            value_len: value.len() as u32,
            table: 0,
            version,
        };
        let mem = &mut self.region.as_mut()[entry..entry + bytes];
        header.emit(mem);
        let value_start = ENTRY_HEADER_BYTES + key.len();
        mem[ENTRY_HEADER_BYTES..value_start].copy_from_slice(key);
        mem[value_start..value_start + value.len()].copy_from_slice(value);
        seal_checksum(mem, &header);
        self.log.segment_at(entry).live += bytes as u32;
        self.log.bytes.live += bytes as u64;
        self.publish(hash, entry, old);
        Ok(version)
    }

    /// Takes log space for a value of `value_len` bytes under `key`, to be written by somebody else and then committed.
    /// Several reservations may be open, also for the same key: the last commit wins. Errors as for [`Self::put`].
    pub fn reserve(&mut self, key: &[u8], value_len: usize) -> Result<Reservation, StoreError> {
        self.check_lengths(key, value_len)?;
        let hash = self.hash(key);
        let bytes = entry_bytes(key.len(), value_len);
        self.admit(hash, key, bytes)?;
        let (entry, generation) = self.take(bytes)?;
        let header = EntryHeader {
            state: generation << 1,
            crc: 0,
            kind: EntryKind::Pending,
            flags: 0,
            key_len: key.len() as u16,
            value_len: value_len as u32,
            table: 0,
            version: 0,
        };
        let mem = &mut self.region.as_mut()[entry..entry + bytes];
        header.emit(mem);
        mem[ENTRY_HEADER_BYTES..ENTRY_HEADER_BYTES + key.len()].copy_from_slice(key);
        let segment = self.log.segment_at(entry);
        segment.pending += bytes as u32;
        segment.open_reservations += 1;
        self.log.bytes.pending += bytes as u64;
        self.open_reservations += 1;
        Ok(Reservation {
            entry,
            hash,
            key_len: key.len(),
            value_len,
            generation,
        })
    }

    /// Makes a reservation whose value has been written the current object of its key. Returns its version. Errors: the
    /// reservation is another store's.
    pub fn commit(&mut self, reservation: Reservation) -> Result<u64, StoreError> {
        let mut header = self.close(&reservation)?;
        let Reservation { entry, hash, .. } = reservation;
        let bytes = reservation.bytes();
        let old = self.lookup(hash, key_at(self.region.as_ref(), entry));
        header.version = self.next_version(old);
        header.kind = EntryKind::Object;
        header.state |= STATE_LIVE;
        let mem = &mut self.region.as_mut()[entry..entry + bytes];
        header.emit(mem);
        seal_checksum(mem, &header);
        self.log.segment_at(entry).live += bytes as u32;
        self.log.bytes.live += bytes as u64;
        self.publish(hash, entry, old);
        Ok(header.version)
    }

    /// Gives up a reservation; its space is dead until it is cleaned. Errors: the reservation is another store's.
    pub fn abort(&mut self, reservation: Reservation) -> Result<(), StoreError> {
        let mut header = self.close(&reservation)?;
        header.kind = EntryKind::Abandoned;
        let entry = reservation.entry;
        let mem = &mut self.region.as_mut()[entry..entry + reservation.bytes()];
        header.emit(mem);
        seal_checksum(mem, &header);
        self.log.bytes.dead += reservation.bytes() as u64;
        self.cleaner.note_death(reservation.bytes());
        Ok(())
    }

    /// Takes an open reservation off the account of pending bytes.
    fn close(&mut self, reservation: &Reservation) -> Result<EntryHeader, StoreError> {
        let Reservation { entry, .. } = *reservation;
        let mem = self.region.as_ref();
        let header = mem
            .get(entry..entry + reservation.bytes())
            .and_then(|bytes| EntryHeader::parse(bytes).ok())
            .filter(|header| {
                header.kind == EntryKind::Pending
                    && header.generation() == reservation.generation
                    && usize::from(header.key_len) == reservation.key_len
                    && header.value_len as usize == reservation.value_len
            })
            .filter(|_| self.log.segment_of(entry).is_some())
            .ok_or(StoreError::UnknownReservation)?;
        let segment = self.log.segment_at(entry);
        if segment.open_reservations == 0 {
            return Err(StoreError::UnknownReservation);
        }
        segment.pending -= reservation.bytes() as u32;
        segment.open_reservations -= 1;
        self.log.bytes.pending -= reservation.bytes() as u64;
        self.open_reservations -= 1;
        Ok(header)
    }

    /// Removes `key`. Returns the version that it had, or none if there was no such key. Works on a full store.
    ///
    /// Errors: [`StoreError::Busy`] if the log has no room for a tombstone and the entry's segment is pinned, so that the
    /// entry cannot become its own tombstone either.
    pub fn remove(&mut self, key: &[u8]) -> Result<Option<u64>, StoreError> {
        let hash = self.hash(key);
        if self.lookup(hash, key).is_none() {
            return Ok(None);
        }
        let bytes = entry_bytes(key.len(), 0);
        let space = self.take(bytes);
        // Only now: making room may have moved the entry.
        let Some(slot) = self.lookup(hash, key) else {
            return Ok(None);
        };
        let version = version_at(self.region.as_ref(), slot.entry);
        match space {
            Ok((tombstone, generation)) => {
                let header = EntryHeader {
                    state: generation << 1,
                    crc: 0,
                    kind: EntryKind::Tombstone,
                    flags: 0,
                    key_len: key.len() as u16,
                    value_len: 0,
                    table: 0,
                    version,
                };
                let mem = &mut self.region.as_mut()[tombstone..tombstone + bytes];
                header.emit(mem);
                mem[ENTRY_HEADER_BYTES..ENTRY_HEADER_BYTES + key.len()].copy_from_slice(key);
                seal_checksum(mem, &header);
                self.log.segment_at(tombstone).tombstones += bytes as u32;
                self.log.bytes.tombstones += bytes as u64;
                self.bury(hash, slot.entry);
            }
            Err(_) => self.bury_in_place(slot.entry)?,
        }
        let mem = self.region.as_mut();
        self.table.remove(mem, hash, slot.at);
        self.objects -= 1;
        self.safe_version = self.safe_version.max(version.saturating_add(1));
        Ok(Some(version))
    }

    /// Turns the live object at `entry` into its own tombstone.
    fn bury_in_place(&mut self, entry: usize) -> Result<(), StoreError> {
        if self.log.segment_at(entry).pins > 0 {
            return Err(StoreError::Busy);
        }
        clear_live(self.region.as_mut(), entry);
        let mem = &mut self.region.as_mut()[entry..];
        let Ok(mut header) = EntryHeader::parse(mem) else {
            return Err(StoreError::Busy);
        };
        header.kind = EntryKind::Tombstone;
        header.flags |= FLAG_IN_PLACE;
        header.emit(mem);
        seal_checksum(mem, &header);
        let whole = header.total_bytes();
        let tombstone = entry_bytes(usize::from(header.key_len), 0);
        let segment = self.log.segment_at(entry);
        segment.live -= whole as u32;
        segment.tombstones += tombstone as u32;
        self.log.bytes.live -= whole as u64;
        self.log.bytes.tombstones += tombstone as u64;
        self.log.bytes.dead += (whole - tombstone) as u64;
        self.cleaner.note_death(whole);
        Ok(())
    }

    /// Keeps segment `segment` ([`Self::segment_of`]) from being reused: sends from it are in flight. It may still be
    /// cleaned. Pins are counted.
    pub fn pin(&mut self, segment: u32) {
        self.log.pin(segment);
    }

    /// Takes one pin back.
    pub fn unpin(&mut self, segment: u32) {
        self.log.unpin(segment);
    }

    /// The segment that holds the region's byte at `offset`; none for the hash table.
    #[must_use]
    pub fn segment_of(&self, offset: usize) -> Option<u32> {
        self.log.segment_of(offset)
    }

    /// Bytes of live entries (header, key, value, padding) and open reservations that the store accepts.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity_of(self.log.log_segments())
    }

    fn capacity_of(&self, segments: usize) -> u64 {
        let payload = self.log.layout.segment_bytes() - SEGMENT_HEADER_BYTES;
        let most = segments.saturating_sub(WORKING_SEGMENTS) * payload;
        (most - most / SLACK_FRACTION) as u64
    }

    fn check_lengths(&self, key: &[u8], value_len: usize) -> Result<(), StoreError> {
        if key.is_empty() {
            return Err(StoreError::EmptyKey);
        }
        let payload = self.log.layout.segment_bytes() - SEGMENT_HEADER_BYTES - ENTRY_HEADER_BYTES;
        let limit = payload.min(MAX_KEY_BYTES);
        if key.len() > limit {
            let bytes = key.len();
            return Err(StoreError::KeyTooLong { bytes, limit });
        }
        let limit = (payload - key.len()).min(MAX_VALUE_BYTES);
        if value_len > limit {
            return Err(StoreError::ValueTooLarge {
                bytes: value_len,
                limit,
            });
        }
        Ok(())
    }

    fn full(&self) -> StoreError {
        StoreError::Full {
            live: self.log.bytes.live + self.log.bytes.pending,
            capacity: self.capacity(),
        }
    }

    /// Whether an entry of `bytes` under `key` may be added, and an overflow bucket is at hand should the key be new.
    #[inline]
    fn admit(&mut self, hash: u64, key: &[u8], bytes: usize) -> Result<(), StoreError> {
        let live = self.log.bytes.live + self.log.bytes.pending + bytes as u64;
        let capacity = self.capacity();
        if live > capacity {
            let replaced = self.lookup(hash, key).map_or(0, |slot| {
                Found::at(self.region.as_ref(), slot.entry).total_bytes()
            });
            if live > capacity + replaced as u64 {
                return Err(self.full());
            }
        }
        if self.table.spare() <= self.open_reservations {
            self.grow_table()
                .or_else(|error| self.lookup(hash, key).map(|_| ()).ok_or(error))?;
        }
        Ok(())
    }

    /// Turns a free segment into overflow buckets.
    #[cold]
    fn grow_table(&mut self) -> Result<(), StoreError> {
        let remaining = self.log.log_segments() - 1;
        if self.log.bytes.live + self.log.bytes.pending > self.capacity_of(remaining) {
            return Err(self.full());
        }
        self.make_room()?;
        let start = self.log.take_for_overflow().ok_or_else(|| self.full())?;
        let bytes = self.log.layout.segment_bytes();
        self.table.grow(self.region.as_mut(), start, bytes);
        Ok(())
    }

    /// Takes `bytes` of the head, with a new head if need be. Returns offset and generation.
    #[inline]
    fn take(&mut self, bytes: usize) -> Result<(usize, u64), StoreError> {
        if !self.log.fits(Target::Head, bytes) {
            self.new_head(bytes)?;
        }
        let mem = self.region.as_mut();
        match self.log.append(mem, Target::Head, bytes) {
            Some(space) => Ok(space),
            None => Err(self.full()),
        }
    }

    #[cold]
    fn new_head(&mut self, bytes: usize) -> Result<(), StoreError> {
        if let Err(error) = self.make_room() {
            // What is left of the survivor serves before a write is refused, unless a victim still needs it.
            if self.is_cleaning() || !self.log.fits(Target::Survivor, bytes) {
                return Err(error);
            }
            let mem = self.region.as_mut();
            self.log.adopt_survivor(mem, self.safe_version);
            return Ok(());
        }
        let mem = self.region.as_mut();
        self.log.roll(mem, Target::Head, self.safe_version);
        Ok(())
    }

    /// Sees to it that a segment is free beyond the cleaner's reserve.
    fn make_room(&mut self) -> Result<(), StoreError> {
        if self.log.free_segments() > CLEANER_RESERVE_SEGMENTS {
            return Ok(());
        }
        self.clean_for_write()
    }

    fn next_version(&self, old: Option<Slot>) -> u64 {
        old.map_or(self.safe_version, |slot| {
            version_at(self.region.as_ref(), slot.entry).saturating_add(1)
        })
    }

    /// Points the table at the complete, live entry at `entry`, instead of `old`.
    #[inline]
    fn publish(&mut self, hash: u64, entry: usize, old: Option<Slot>) {
        if let Some(old) = old {
            self.bury(hash, old.entry);
            Table::redirect(self.region.as_mut(), old.at, entry);
        } else {
            let version = version_at(self.region.as_ref(), entry);
            let inserted = self.table.insert(self.region.as_mut(), hash, entry);
            debug_assert!(inserted, "admit() keeps an overflow bucket at hand");
            self.objects += 1;
            self.safe_version = self.safe_version.max(version.saturating_add(1));
        }
    }

    /// Declares the object at `entry` dead, before that is published.
    #[inline]
    fn bury(&mut self, hash: u64, entry: usize) {
        let mem = self.region.as_mut();
        clear_live(mem, entry);
        self.table.count_dead(mem, hash);
        let bytes = Found::at(mem, entry).total_bytes();
        let segment = self.log.segment_at(entry);
        segment.live -= bytes as u32;
        self.cleaner.maybe_empty |= segment.live == 0;
        self.log.bytes.live -= bytes as u64;
        self.log.bytes.dead += bytes as u64;
        self.cleaner.dead_objects += 1;
        self.cleaner.note_death(bytes);
    }
}

impl Found {
    /// Bytes that the entry takes in the log, padding included.
    #[must_use]
    #[inline(always)]
    pub const fn total_bytes(&self) -> usize {
        entry_bytes(self.key_len, self.value_len)
    }
}
