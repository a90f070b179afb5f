//! Removing: a tombstone is appended, so that a replay of the log gives the same store; on a store without room for one the
//! object becomes its own tombstone.

use super::entry::{
    ENTRY_HEADER_BYTES, EntryHeader, EntryKind, FLAG_IN_PLACE, clear_live, entry_bytes, seal,
    version_at,
};
use super::once::{RECORD_BYTES, Ticket};
use super::{Outcome, RejectRules, RequestId, Store, StoreError};

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Removes `key`. Returns the version that it had, or none if it did not exist. Works on a full store.
    ///
    /// Errors: no such table; a reject rule holds; [`StoreError::Busy`] if the log has no room for a tombstone and the
    /// entry's segment is pinned, so that the entry cannot become its own tombstone either; with `once`, also if the log has no
    /// room at the moment, and what [`Self::check`] would say. (On a store so full that only removes make room for the
    /// result, the result is kept in memory alone: [`super::Stats::unlogged`].)
    pub fn remove(
        &mut self,
        table: u32,
        key: &[u8],
        rules: &RejectRules,
        once: Option<RequestId>,
        now: u64,
    ) -> Result<Option<u64>, StoreError> {
        self.tables.user_place(table)?;
        self.remove_in(table, key, rules, once, now)
    }

    /// [`Self::remove`] from a table that exists, the directory included.
    pub(crate) fn remove_in(
        &mut self,
        table: u32,
        key: &[u8],
        rules: &RejectRules,
        once: Option<RequestId>,
        now: u64,
    ) -> Result<Option<u64>, StoreError> {
        let hash = self.hash(table, key);
        let ticket = self.ticket(once, now)?;
        if !rules.is_none() {
            self.apply_rules(rules, hash, table, key, ticket, now)?;
        }
        if self.lookup_current(hash, table, key, now).is_none() {
            if let Some(ticket) = ticket {
                self.leases.settle(ticket, Outcome::Absent);
            }
            return Ok(None);
        }
        let record = if ticket.is_some() { RECORD_BYTES } else { 0 };
        let bytes = entry_bytes(key.len(), 0);
        let space = self.take(bytes + record, now);
        // Only now: making room may have moved the entry.
        let Some(slot) = self.lookup(hash, table, key) else {
            return Ok(None);
        };
        let version = version_at(self.region.as_ref(), slot.entry);
        self.safe_version = self.safe_version.max(version.saturating_add(1));
        match space {
            Ok((tombstone, generation)) => {
                if let Some(ticket) = ticket {
                    let outcome = Outcome::Removed { version };
                    self.write_record(ticket, tombstone + bytes, generation, table, outcome);
                }
                // It hides every version that the key had, and tells a replay where versions go on.
                let header = EntryHeader {
                    state: generation << 1,
                    crc: 0,
                    kind: EntryKind::Tombstone,
                    flags: 0,
                    key_len: key.len() as u16,
                    value_len: 0,
                    table,
                    version: self.safe_version - 1,
                };
                let mem = &mut self.region.as_mut()[tombstone..tombstone + bytes];
                header.emit(mem);
                mem[ENTRY_HEADER_BYTES..ENTRY_HEADER_BYTES + key.len()].copy_from_slice(key);
                seal(mem, &header);
                let freed = self.cleaner.dead_freed;
                self.log.segment_at(tombstone).note_tombstone(bytes, freed);
                self.log.bytes.tombstones += bytes as u64;
                let place = self.tables.place_of_object(table);
                self.bury(place, hash, slot.entry);
            }
            // The result would not be in the log; a moment later it can be.
            Err(StoreError::Busy) if ticket.is_some() => return Err(StoreError::Busy),
            Err(_) => {
                self.bury_in_place(slot.entry)?;
                self.settle_removed(ticket, version);
            }
        }
        self.unlink(hash, slot, table);
        Ok(Some(version))
    }

    fn settle_removed(&mut self, ticket: Option<Ticket>, version: u64) {
        if let Some(ticket) = ticket {
            self.leases.settle(ticket, Outcome::Removed { version });
            self.unlogged += 1;
        }
    }

    /// Turns the live object at `entry` into its own tombstone. Errors: its segment is pinned.
    pub(crate) fn bury_in_place(&mut self, entry: usize) -> Result<(), StoreError> {
        if self.log.segment_at(entry).pins > 0 {
            return Err(StoreError::Busy);
        }
        let Ok(mut header) = EntryHeader::parse(&self.region.as_ref()[entry..]) else {
            return Err(StoreError::Busy);
        };
        let place = self.tables.place_of_object(header.table);
        let whole = self.unaccount(place, entry);
        self.safe_version = self.safe_version.max(header.version.saturating_add(1));
        let mem = self.region.as_mut();
        clear_live(mem, entry);
        header.state &= !super::entry::STATE_LIVE;
        header.kind = EntryKind::Tombstone;
        header.flags |= FLAG_IN_PLACE;
        header.version = self.safe_version - 1;
        let mem = &mut mem[entry..];
        header.emit(mem);
        seal(mem, &header);
        let tombstone = entry_bytes(usize::from(header.key_len), 0);
        let freed = self.cleaner.dead_freed;
        self.log.segment_at(entry).note_tombstone(tombstone, freed);
        self.log.bytes.tombstones += tombstone as u64;
        self.log.bytes.dead += (whole - tombstone) as u64;
        Ok(())
    }
}
