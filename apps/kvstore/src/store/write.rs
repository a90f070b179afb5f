//! Writing: an entry is appended to the head, complete before it is live, and the hash table refers to it from then on.

use super::entry::{
    ENTRY_ALIGN, ENTRY_HEADER_BYTES, EXPIRY_BYTES, EntryHeader, EntryKind, FLAG_EXPIRES,
    STATE_LIVE, clear_live, entry_bytes, expires_at, seal, total_at, version_at,
};
use super::index::{Index, Slot};
use super::mem::{load_u64, store_u64};
use super::once::{RECORD_BYTES, Ticket};
use super::{Increment, Incremented, NEVER, Outcome, RejectRules, RequestId, Store, StoreError};
use crate::prefetch::prefetch;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write<'a> {
    /// Id of the table.
    pub table: u32,
    /// Key, 1 to 65,535 bytes.
    pub key: &'a [u8],
    /// Value, up to 1 MiB.
    pub value: &'a [u8],
    /// From when on the object does not exist any more, ns; [`NEVER`]: it stays.
    pub expires: u64,
    /// When to refuse.
    pub rules: RejectRules,
    /// The request that asks for it, if a retry of it must not write again.
    pub once: Option<RequestId>,
}

impl<'a> Write<'a> {
    /// A write without conditions, of an object that stays.
    #[must_use]
    pub const fn new(table: u32, key: &'a [u8], value: &'a [u8]) -> Self {
        Self {
            table,
            key,
            value,
            expires: NEVER,
            rules: RejectRules::NONE,
            once: None,
        }
    }
}

/// Bytes that an object takes in the log.
#[inline(always)]
pub(crate) const fn object_bytes(key_len: usize, value_len: usize, expires: u64) -> usize {
    if expires == NEVER {
        entry_bytes(key_len, value_len)
    } else {
        entry_bytes(key_len, value_len + EXPIRY_BYTES)
    }
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Stores `value` under `key` for good, without conditions. Returns and errors as [`Self::write`].
    #[inline]
    pub fn put(
        &mut self,
        table: u32,
        key: &[u8],
        value: &[u8],
        now: u64,
    ) -> Result<u64, StoreError> {
        self.write(&Write::new(table, key, value), now)
    }

    /// Writes an object. Returns its version: greater than any that the key ever had.
    ///
    /// Errors: no such table; a key or value outside the limits; a reject rule holds; [`StoreError::Full`];
    /// [`StoreError::Busy`] if room can only be made when transfers complete or time passes; with `once`, what
    /// [`Self::check`] would say. The old object stays on any error.
    #[inline]
    pub fn write(&mut self, write: &Write<'_>, now: u64) -> Result<u64, StoreError> {
        let place = self.tables.user_place(write.table)?;
        self.write_in(place, write, now)
    }

    /// [`Self::write`] into the table at `place` of the directory.
    #[inline]
    pub(crate) fn write_in(
        &mut self,
        place: usize,
        write: &Write<'_>,
        now: u64,
    ) -> Result<u64, StoreError> {
        let hash = self.hash(write.table, write.key);
        let ticket = self.ticket(write.once, now)?;
        if !write.rules.is_none() {
            self.apply_rules(&write.rules, hash, write.table, write.key, ticket, now)?;
        }
        let outcome = |version| Outcome::Written { version };
        self.append_object(place, hash, write, None, ticket, outcome, now)
    }

    /// Checks the rules; a refusal is a result like any other.
    pub(crate) fn apply_rules(
        &mut self,
        rules: &RejectRules,
        hash: u64,
        table: u32,
        key: &[u8],
        ticket: Option<Ticket>,
        now: u64,
    ) -> Result<(), StoreError> {
        let slot = self.lookup_current(hash, table, key, now);
        let version = slot.map(|slot| version_at(self.region.as_ref(), slot.entry));
        rules.check(version).inspect_err(|error| {
            if let (Some(ticket), StoreError::Rejected { reason, version }) = (ticket, *error) {
                self.leases
                    .settle(ticket, Outcome::Rejected { reason, version });
            }
        })
    }

    /// Appends the object, and in the same breath the result of the request that asked for it, and makes it current. Returns its
    /// version: `version`, or the next one of its key.
    #[allow(clippy::too_many_arguments, reason = "one call per kind of write")]
    #[inline]
    pub(crate) fn append_object(
        &mut self,
        place: usize,
        hash: u64,
        write: &Write<'_>,
        version: Option<u64>,
        ticket: Option<Ticket>,
        outcome: impl FnOnce(u64) -> Outcome,
        now: u64,
    ) -> Result<u64, StoreError> {
        let &Write {
            table, key, value, ..
        } = write;
        let record = if ticket.is_some() { RECORD_BYTES } else { 0 };
        // What the old object's death is counted in: the miss overlaps with those of the search for it.
        prefetch(self.region.as_ref(), self.index.place(hash, false));
        self.check_lengths(key, value.len())?;
        let bytes = object_bytes(key.len(), value.len(), write.expires);
        self.admit(hash, table, key, bytes + record, now)?;
        let (entry, generation) = self.take(bytes + record, now)?;
        // Only now: making room may have moved the old entry.
        let old = self.lookup(hash, table, key);
        let version = version.unwrap_or_else(|| self.next_version(old));
        if let Some(ticket) = ticket {
            self.write_record(ticket, entry + bytes, generation, table, outcome(version));
        }
        let header = EntryHeader {
            state: generation << 1 | STATE_LIVE,
            crc: 0,
            kind: EntryKind::Object,
            flags: if write.expires == NEVER {
                0
            } else {
                FLAG_EXPIRES
            },
            key_len: key.len() as u16,
            value_len: value.len() as u32,
            table,
            version,
        };
        let mem = &mut self.region.as_mut()[entry..entry + bytes];
        header.emit(mem);
        let value_start = ENTRY_HEADER_BYTES + key.len();
        let value_end = value_start + value.len();
        mem[ENTRY_HEADER_BYTES..value_start].copy_from_slice(key);
        mem[value_start..value_end].copy_from_slice(value);
        if write.expires != NEVER {
            store_u64(mem, value_end, write.expires);
        }
        seal(mem, &header);
        self.publish(place, hash, (entry, bytes), version, write.expires, old);
        Ok(version)
    }

    /// Adds to a number. One that does not exist counts as 0; an expiry stays as it is. Integers wrap around. Returns the new
    /// number and version.
    ///
    /// Errors: the value has not 8 bytes; others as for [`Self::write`].
    pub fn increment(
        &mut self,
        table: u32,
        key: &[u8],
        by: Increment,
        rules: &RejectRules,
        once: Option<RequestId>,
        now: u64,
    ) -> Result<Incremented, StoreError> {
        let place = self.tables.user_place(table)?;
        let hash = self.hash(table, key);
        let ticket = self.ticket(once, now)?;
        if !rules.is_none() {
            self.apply_rules(rules, hash, table, key, ticket, now)?;
        }
        let (mut old, mut expires) = (0, NEVER);
        if let Some(found) = self.find(hash, table, key, now) {
            if found.value_len != 8 {
                return Err(StoreError::NotANumber {
                    bytes: found.value_len,
                });
            }
            old = load_u64(self.region.as_ref(), found.value_offset);
            expires = found.expires;
        }
        let value = by.apply(old);
        let bytes = value.bits().to_le_bytes();
        let write = Write {
            expires,
            ..Write::new(table, key, &bytes)
        };
        let outcome = |version| Outcome::Incremented { value, version };
        let version = self.append_object(place, hash, &write, None, ticket, outcome, now)?;
        Ok(Incremented { value, version })
    }

    pub(crate) fn next_version(&self, old: Option<Slot>) -> u64 {
        old.map_or(self.safe_version, |slot| {
            version_at(self.region.as_ref(), slot.entry).saturating_add(1)
        })
    }

    /// Accounts for the complete, live entry at `entry` and points the hash table at it, instead of `old`.
    #[inline(always)]
    pub(crate) fn publish(
        &mut self,
        place: usize,
        hash: u64,
        (entry, bytes): (usize, usize),
        version: u64,
        expires: u64,
        old: Option<Slot>,
    ) {
        let segment = self.log.segment_at(entry);
        segment.live += bytes as u32;
        if expires != NEVER {
            segment.note_expiry(bytes, expires);
            self.tell_sweep(entry, expires);
        }
        self.log.bytes.live += bytes as u64;
        self.max_version = self.max_version.max(version);
        self.tables.at(place).live_bytes += bytes as u64;
        if let Some(old) = old {
            self.bury(place, hash, old.entry);
            Index::redirect(self.region.as_mut(), old.at, entry);
        } else {
            let inserted = self.index.insert(self.region.as_mut(), hash, entry);
            debug_assert!(inserted, "admit() keeps an overflow bucket at hand");
            self.objects += 1;
            self.tables.at(place).objects += 1;
            self.safe_version = self.safe_version.max(version.saturating_add(1));
        }
    }

    /// Declares the object at `entry`, of the table at `place`, dead, before that is published.
    #[inline(always)]
    pub(crate) fn bury(&mut self, place: usize, hash: u64, entry: usize) {
        let bytes = self.unaccount(place, entry);
        let mem = self.region.as_mut();
        clear_live(mem, entry);
        self.index.count_dead(mem, hash);
        self.cleaner.dead_objects += 1;
        self.log.bytes.dead += bytes as u64;
    }

    /// Takes the live object at `entry`, of the table at `place`, off all accounts of live bytes. Returns its bytes.
    #[inline(always)]
    pub(crate) fn unaccount(&mut self, place: usize, entry: usize) -> usize {
        let mem = self.region.as_ref();
        let bytes = total_at(mem, entry);
        let expires = expires_at(mem, entry) != NEVER;
        let segment = self.log.segment_at(entry);
        segment.live -= bytes as u32;
        if expires {
            segment.expiring -= bytes as u32;
        }
        self.cleaner.maybe_empty |= segment.live == 0;
        self.log.bytes.live -= bytes as u64;
        self.tables.at(place).live_bytes -= bytes as u64;
        self.log.died_bytes += bytes as u64;
        bytes
    }

    /// Takes a dead object's slot out of the hash table.
    pub(crate) fn unlink(&mut self, hash: u64, slot: Slot, table: u32) {
        let version = version_at(self.region.as_ref(), slot.entry);
        self.index.remove(self.region.as_mut(), hash, slot.at);
        self.objects -= 1;
        self.tables.forget_object(table);
        self.safe_version = self.safe_version.max(version.saturating_add(1));
    }
}

const _: () = assert!(RECORD_BYTES.is_multiple_of(ENTRY_ALIGN));
