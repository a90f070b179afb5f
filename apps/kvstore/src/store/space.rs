//! Room in the log: what is admitted, and what is done when there is none.

use super::entry::{ENTRY_HEADER_BYTES, EntryHeader, EntryKind, seal, total_at};
use super::layout::Layout;
use super::once::RECORD_BYTES;
use super::segment::Target;
use super::{EXPIRY_BYTES, Store, StoreError};
use crate::limits::{
    CLEANER_RESERVE_SEGMENTS, MAX_KEY_BYTES, MAX_VALUE_BYTES, SLACK_FRACTION, WORKING_SEGMENTS,
};

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Keeps segment `segment` ([`Self::segment_of`]) from being reused: sends from it are in flight. It may still be
    /// cleaned. Pins are counted.
    #[inline]
    pub fn pin(&mut self, segment: u32) {
        self.log.pin(segment);
    }

    /// Takes one pin back.
    #[inline]
    pub fn unpin(&mut self, segment: u32) {
        self.log.unpin(segment);
    }

    /// The segment that holds the region's byte at `offset`; none for the hash table.
    #[must_use]
    #[inline]
    pub fn segment_of(&self, offset: usize) -> Option<u32> {
        self.log.segment_of(offset)
    }

    /// Bytes of live entries (header, key, value, padding), result records and open reservations that the store accepts.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        capacity_of(&self.log.layout, self.log.log_segments())
    }

    /// When to ask again after [`StoreError::Busy`], ns: then memory that was freed can be reused. None: only the end of
    /// transfers helps, or cleaning ([`Self::clean`]).
    #[must_use]
    pub fn busy_until(&self) -> Option<u64> {
        self.log.next_rested_at()
    }

    #[inline(always)]
    pub(crate) fn check_lengths(&self, key: &[u8], value_len: usize) -> Result<(), StoreError> {
        // The shortest segment that is chosen by itself has room for both at their longest.
        let payload =
            self.log.layout.payload_bytes() - (ENTRY_HEADER_BYTES + EXPIRY_BYTES + RECORD_BYTES);
        let longest = key.len().max(1) + value_len;
        if key.is_empty()
            || key.len() > MAX_KEY_BYTES
            || value_len > MAX_VALUE_BYTES
            || longest > payload
        {
            return Err(lengths_error(payload, key.len(), value_len));
        }
        Ok(())
    }

    pub(crate) fn full(&self) -> StoreError {
        StoreError::Full {
            live: self.log.bytes.claimed(),
            capacity: self.capacity(),
        }
    }

    /// Whether an entry of `bytes` under `key` may be added, and an overflow bucket is at hand should the key be new.
    #[inline(always)]
    pub(crate) fn admit(
        &mut self,
        hash: u64,
        table: u32,
        key: &[u8],
        bytes: usize,
        now: u64,
    ) -> Result<(), StoreError> {
        if self.log.bytes.claimed() + bytes as u64 > self.capacity() {
            self.admit_beyond(hash, table, key, bytes, now)?;
        }
        if self.index.spare() <= self.open_reservations {
            self.grow_index(now)
                .or_else(|error| self.lookup(hash, table, key).map(|_| ()).ok_or(error))?;
        }
        Ok(())
    }

    /// The same where capacity is exceeded: in place of an object as large, or of what has expired or was dropped.
    #[cold]
    fn admit_beyond(
        &mut self,
        hash: u64,
        table: u32,
        key: &[u8],
        bytes: usize,
        now: u64,
    ) -> Result<(), StoreError> {
        let fits = |store: &Self| {
            let replaced = store
                .lookup(hash, table, key)
                .map_or(0, |slot| total_at(store.region.as_ref(), slot.entry));
            store.log.bytes.claimed() + bytes as u64 <= store.capacity() + replaced as u64
        };
        if fits(self) {
            return Ok(());
        }
        let mut more = self.leases.any_expired(now) && self.drop_expired_results(now);
        self.sweep_dropped_for_write();
        more |= self.sweep_expired_for_write(now);
        if fits(self) {
            Ok(())
        } else if more || self.tables.has_dropped() {
            Err(StoreError::Busy)
        } else {
            Err(self.full())
        }
    }

    /// Turns a free segment into overflow buckets.
    #[cold]
    fn grow_index(&mut self, now: u64) -> Result<(), StoreError> {
        let remaining = self.log.log_segments() - 1;
        if self.log.bytes.claimed() > capacity_of(&self.log.layout, remaining) {
            return Err(self.full());
        }
        self.make_room(now)?;
        let mem = self.region.as_mut();
        let taken = self.log.take_for_overflow(mem, self.safe_version);
        let Some((start, bytes)) = taken else {
            return Err(self.full());
        };
        self.index.grow(self.region.as_mut(), start, bytes);
        Ok(())
    }

    /// Takes `bytes` of the head, with a new head if need be. Returns offset and generation.
    #[inline(always)]
    pub(crate) fn take(&mut self, bytes: usize, now: u64) -> Result<(usize, u64), StoreError> {
        if !self.log.fits(Target::Head, bytes) {
            self.new_head(bytes, now)?;
        }
        let mem = self.region.as_mut();
        match self.log.append(mem, Target::Head, bytes) {
            Some(space) => Ok(space),
            None => Err(self.full()),
        }
    }

    #[cold]
    fn new_head(&mut self, bytes: usize, now: u64) -> Result<(), StoreError> {
        if let Err(error) = self.make_room(now) {
            // What is left of the survivor serves before a write is refused, unless the cleaner needs it: for a victim, or
            // because its reserve still rests.
            let needed = self.is_cleaning() || self.log.free_segments() < CLEANER_RESERVE_SEGMENTS;
            if needed || !self.log.fits(Target::Survivor, bytes) {
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
    fn make_room(&mut self, now: u64) -> Result<(), StoreError> {
        self.log.set_now(now);
        self.log.release_rested();
        if self.log.free_segments() > CLEANER_RESERVE_SEGMENTS {
            self.cleaner.victims_tried = 0;
            return Ok(());
        }
        self.clean_for_write(now)
    }

    /// Tells the head the safe version, if none of its entries does: before the segment is reused that does.
    pub(crate) fn log_safe_version(&mut self) {
        if self.log.head_safe_version >= self.safe_version {
            return;
        }
        self.log.head_safe_version = self.safe_version;
        let mem = self.region.as_mut();
        if !self.log.fits(Target::Head, ENTRY_HEADER_BYTES) {
            self.log
                .write_header(mem, self.log.head, self.safe_version, 0);
            return;
        }
        let taken = self.log.append(mem, Target::Head, ENTRY_HEADER_BYTES);
        if let Some((at, generation)) = taken {
            let header = EntryHeader {
                state: generation << 1,
                crc: 0,
                kind: EntryKind::SafeVersion,
                flags: 0,
                key_len: 0,
                value_len: 0,
                table: 0,
                version: self.safe_version,
            };
            header.emit(&mut mem[at..]);
            seal(&mut mem[at..], &header);
            self.log.bytes.dead += ENTRY_HEADER_BYTES as u64;
        }
    }
}

fn capacity_of(layout: &Layout, segments: usize) -> u64 {
    let most = segments.saturating_sub(WORKING_SEGMENTS) * layout.payload_bytes();
    (most - most / SLACK_FRACTION) as u64
}

#[cold]
fn lengths_error(payload: usize, key_len: usize, value_len: usize) -> StoreError {
    let limit = payload.min(MAX_KEY_BYTES);
    if key_len == 0 {
        StoreError::EmptyKey
    } else if key_len > limit {
        StoreError::KeyTooLong {
            bytes: key_len,
            limit,
        }
    } else {
        StoreError::ValueTooLarge {
            bytes: value_len,
            limit: (payload - key_len).min(MAX_VALUE_BYTES),
        }
    }
}
