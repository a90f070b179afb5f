//! What the cleaner does with each entry of a victim: live objects, needed result records and needed tombstones are moved to the
//! survivor, the rest is left behind.

use super::Store;
use super::entry::{
    ENTRY_HEADER_BYTES, EntryHeader, EntryKind, FLAG_EXPIRES, STATE_LIVE, clear_live, entry_bytes,
    expires_at, key_at, seal, set_state, version_at,
};
use super::index::Index;
use super::once::request_of;
use super::segment::Target;

/// What became of one entry of a victim.
pub(crate) enum Moved {
    /// Done, with so many bytes copied.
    Bytes(usize),
    /// So many bytes of it were copied, and the slice's budget is spent.
    Part(usize),
    /// No survivor to move to.
    Blocked,
    /// Live, but the table does not know it.
    Lost,
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    pub(crate) fn clean_entry(
        &mut self,
        entry: usize,
        header: &EntryHeader,
        hash: u64,
        victim: u32,
        (budget, now): (usize, u64),
    ) -> Moved {
        if header.kind != EntryKind::Object || !header.is_live() {
            self.give_up_relocation();
        }
        match header.kind {
            EntryKind::Object if header.is_live() => {
                let expires = header.flags & FLAG_EXPIRES != 0 && !self.is_current(entry, now);
                if expires && self.expire(entry, header) {
                    self.give_up_relocation();
                    return match EntryHeader::parse(&self.region.as_ref()[entry..]) {
                        Ok(tombstone) => self.move_tombstone(entry, &tombstone, hash, victim),
                        Err(_) => Moved::Lost,
                    };
                }
                self.move_object(entry, header, hash, victim, budget)
            }
            EntryKind::Object => {
                self.index.uncount_dead(self.region.as_mut(), hash);
                self.cleaner.dead_objects = self.cleaner.dead_objects.saturating_sub(1);
                self.cleaner.dead_freed += 1;
                self.cleaner.bytes_freed += header.total_bytes() as u64;
                Moved::Bytes(0)
            }
            EntryKind::Tombstone => self.move_tombstone(entry, header, hash, victim),
            EntryKind::ResultRecord => self.move_record(entry, header, victim),
            _ => {
                self.cleaner.bytes_freed += header.total_bytes() as u64;
                Moved::Bytes(0)
            }
        }
    }

    pub(super) fn survivor_space(&mut self, bytes: usize) -> Option<(usize, u64)> {
        let mem = self.region.as_mut();
        if !self.log.fits(Target::Survivor, bytes)
            && !self.log.roll(mem, Target::Survivor, self.safe_version)
        {
            return None;
        }
        self.log.append(mem, Target::Survivor, bytes)
    }

    fn move_object(
        &mut self,
        entry: usize,
        header: &EntryHeader,
        hash: u64,
        victim: u32,
        budget: usize,
    ) -> Moved {
        let bytes = header.total_bytes();
        let mem = self.region.as_ref();
        let Some(slot) = self.index.find_entry(mem, hash, entry) else {
            return Moved::Lost;
        };
        let (to, generation, part) = match self.copy_object(entry, header, budget) {
            Ok(copied) => (copied.to, copied.generation, copied.part),
            Err(moved) => return moved,
        };
        let mem = self.region.as_mut();
        set_state(&mut mem[to..], generation << 1 | STATE_LIVE);
        // Who has found the old place is sent to look again, before the new one can become outdated.
        clear_live(mem, entry);
        Index::redirect(mem, slot, to);
        let expires = expires_at(mem, to);
        let survivor = self.log.segment_at(to);
        survivor.live += bytes as u32;
        let from = &mut self.log.segments[victim as usize];
        from.live -= bytes as u32;
        if header.flags & FLAG_EXPIRES != 0 {
            from.expiring -= bytes as u32;
            self.log.segment_at(to).note_expiry(bytes, expires);
        }
        self.cleaner.bytes_moved += part as u64;
        Moved::Bytes(part)
    }

    fn move_record(&mut self, entry: usize, header: &EntryHeader, victim: u32) -> Moved {
        let bytes = header.total_bytes();
        let id = request_of(key_at(self.region.as_ref(), entry));
        let Some(id) = id.filter(|id| self.leases.needs(*id, entry)) else {
            self.cleaner.bytes_freed += bytes as u64;
            return Moved::Bytes(0);
        };
        let Some((to, generation)) = self.survivor_space(bytes) else {
            return Moved::Blocked;
        };
        let mem = self.region.as_mut();
        mem.copy_within(entry + 8..entry + bytes, to + 8);
        set_state(&mut mem[to..], generation << 1);
        self.leases.moved(id, to);
        self.log.segment_at(to).records += bytes as u32;
        let from = &mut self.log.segments[victim as usize];
        from.records -= bytes as u32;
        self.log.bytes.dead += bytes as u64;
        self.moved(bytes)
    }

    fn move_tombstone(
        &mut self,
        entry: usize,
        header: &EntryHeader,
        hash: u64,
        victim: u32,
    ) -> Moved {
        let bytes = entry_bytes(usize::from(header.key_len), 0);
        if !self.tombstone_needed(entry, header, hash) {
            self.forget_tombstone(victim, bytes);
            self.cleaner.tombstones_dropped += 1;
            self.cleaner.bytes_freed += bytes as u64;
            return Moved::Bytes(0);
        }
        let Some((to, generation)) = self.survivor_space(bytes) else {
            return Moved::Blocked;
        };
        let mem = self.region.as_mut();
        let key_end = ENTRY_HEADER_BYTES + usize::from(header.key_len);
        mem.copy_within(entry + 8..entry + key_end, to + 8);
        // One that was made in place leaves its value behind here.
        let header = EntryHeader {
            state: generation << 1,
            flags: 0,
            value_len: 0,
            ..*header
        };
        let new = &mut mem[to..to + bytes];
        header.emit(new);
        seal(new, &header);
        let freed = self.cleaner.dead_freed;
        self.log.segment_at(to).note_tombstone(bytes, freed);
        self.log.bytes.tombstones += bytes as u64;
        self.forget_tombstone(victim, bytes);
        self.moved(bytes)
    }

    fn forget_tombstone(&mut self, victim: u32, bytes: usize) {
        self.log.segments[victim as usize].tombstones -= bytes as u32;
        self.log.bytes.tombstones -= bytes as u64;
        self.log.bytes.dead += bytes as u64;
    }

    fn moved(&mut self, bytes: usize) -> Moved {
        self.cleaner.bytes_moved += bytes as u64;
        Moved::Bytes(bytes)
    }

    /// A tombstone hides dead versions of its key from a replay. It is needless when none lies in the log, when the key
    /// exists again (then the newer object hides them), or when its table does not exist (a replay ignores all of it).
    fn tombstone_needed(&self, entry: usize, header: &EntryHeader, hash: u64) -> bool {
        let mem = self.region.as_ref();
        let key = key_at(mem, entry);
        self.index.dead_count(mem, hash) > 0
            && self.tables.place(header.table).is_some()
            && self
                .lookup(hash, header.table, key)
                .is_none_or(|slot| version_at(mem, slot.entry) <= header.version)
    }
}
