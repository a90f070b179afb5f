//! Expiry: an object that has expired does not exist for any call from that time on. The cleaner looks for such objects in
//! sealed segments, in slices, and turns each into its own tombstone, so that a replay brings nothing back.
//!
//! A segment is searched when about 1/64 of it has expired. That is estimated from three numbers: bytes that expire, the
//! first and the last time. Between searches a segment thus withholds little, and is not searched for every object.

use super::entry::{ENTRY_HEADER_BYTES, EntryHeader, EntryKind, FLAG_EXPIRES, expires_at, key_at};
use super::segment::State;
use super::{NEVER, Store};
use crate::limits::{MAX_SYNC_SWEEPS, SWEEP_RETRY_NS};

/// What looking at one entry is charged to a slice, in bytes: a cache line of the log.
const LOOK_COST_BYTES: usize = 64;

/// A search under way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sweep {
    segment: u32,
    generation: u64,
    /// Offset of the next entry, relative to the segment.
    cursor: usize,
    first: u64,
    last: u64,
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Whether the object at `entry` exists as far as its expiry goes.
    #[inline(always)]
    pub(crate) fn is_current(&self, entry: usize, now: u64) -> bool {
        let expires = expires_at(self.region.as_ref(), entry);
        expires == NEVER || now < expires
    }

    /// Whether [`Self::sweep_expired`] has something to do.
    #[inline(always)]
    pub(crate) fn wants_sweep(&self, now: u64) -> bool {
        self.sweep.is_some() || now >= self.log.next_sweep_at
    }

    /// Searches for expired objects until nothing is worth it or `spent` has reached `budget`.
    pub(crate) fn sweep_expired(&mut self, spent: &mut usize, budget: usize, now: u64) {
        while self.wants_sweep(now) {
            if self.sweep.is_none() && !self.begin_sweep(now, false) {
                return;
            }
            if *spent >= budget && *spent > 0 {
                return;
            }
            self.continue_sweep(spent, budget, now);
        }
    }

    /// Makes room for a write from what has expired. Returns whether more may be gained that way.
    pub(crate) fn sweep_expired_for_write(&mut self, now: u64) -> bool {
        let (mut spent, budget) = (0, self.cleaner.budget_for_write);
        for _ in 0..MAX_SYNC_SWEEPS {
            if self.sweep.is_none() && !self.begin_sweep(now, true) {
                return false;
            }
            self.continue_sweep(&mut spent, budget, now);
            if self.sweep.is_some() {
                return true;
            }
        }
        self.begin_sweep(now, true)
    }

    /// Chooses the segment to search: one that is due, or, `eager`, one where anything has expired. False: none is.
    fn begin_sweep(&mut self, now: u64, eager: bool) -> bool {
        let segment_bytes = self.log.layout.segment_bytes() as u64;
        let (mut next, mut best) = (u64::MAX, None);
        for (index, segment) in self.log.segments.iter().enumerate() {
            if segment.state != State::Sealed || segment.expiring == 0 {
                continue;
            }
            let due = segment.sweep_at(segment_bytes);
            if segment.pins > 0 {
                next = next.min(due.max(now.saturating_add(SWEEP_RETRY_NS)));
                continue;
            }
            next = next.min(due);
            if now >= due || (eager && now >= segment.first_expiry) {
                best = best.max(Some((segment.expiring, index)));
            }
        }
        self.log.next_sweep_at = next;
        let Some((_, index)) = best else {
            return false;
        };
        self.sweep = Some(Sweep {
            segment: index as u32,
            generation: self.log.segments[index].generation,
            cursor: self.log.layout.prologue_bytes(),
            first: u64::MAX,
            last: 0,
        });
        true
    }

    fn continue_sweep(&mut self, spent: &mut usize, budget: usize, now: u64) {
        let Some(mut sweep) = self.sweep.take() else {
            return;
        };
        let index = sweep.segment as usize;
        let start = self.log.layout.segment_offset(sweep.segment);
        let segment = &self.log.segments[index];
        if segment.state != State::Sealed || segment.generation != sweep.generation {
            // The cleaner has it, and looks for itself.
            return;
        }
        let used = segment.used as usize;
        while sweep.cursor < used {
            if *spent >= budget && *spent > 0 {
                self.sweep = Some(sweep);
                return;
            }
            *spent += LOOK_COST_BYTES;
            let at = start + sweep.cursor;
            let Some(header) = self.readable(sweep.segment, at, used - sweep.cursor) else {
                // Not to be searched again; the cleaner will find the damage too.
                self.log.segments[index].first_expiry = u64::MAX;
                self.log.segments[index].last_expiry = u64::MAX;
                return;
            };
            if header.kind == EntryKind::Object
                && header.is_live()
                && header.flags & FLAG_EXPIRES != 0
            {
                let expires = expires_at(self.region.as_ref(), at);
                if expires > now || !self.expire(at, &header) {
                    sweep.first = sweep.first.min(expires);
                    sweep.last = sweep.last.max(expires);
                }
            }
            sweep.cursor += header.total_bytes();
        }
        let segment = &mut self.log.segments[index];
        segment.first_expiry = sweep.first;
        segment.last_expiry = sweep.last;
        let due = segment.sweep_at(self.log.layout.segment_bytes() as u64);
        // What expires at the very time of its search, or could not be taken, is looked at again later.
        let due = due.max(now.saturating_add(1));
        self.log.next_sweep_at = self.log.next_sweep_at.min(due);
    }

    /// Tells a search under way of an object that appears in a sealed segment: that of a reservation.
    pub(crate) fn tell_sweep(&mut self, entry: usize, expires: u64) {
        let segment = self.log.segment_of(entry);
        if let Some(sweep) = &mut self.sweep
            && Some(sweep.segment) == segment
        {
            sweep.first = sweep.first.min(expires);
            sweep.last = sweep.last.max(expires);
        } else if let Some(segment) = segment.map(|index| &self.log.segments[index as usize])
            && segment.state == State::Sealed
        {
            let due = segment.sweep_at(self.log.layout.segment_bytes() as u64);
            self.log.next_sweep_at = self.log.next_sweep_at.min(due);
        }
    }

    /// Turns the expired live object at `entry` into its own tombstone. False: its segment is pinned.
    pub(crate) fn expire(&mut self, entry: usize, header: &EntryHeader) -> bool {
        debug_assert!(header.total_bytes() > ENTRY_HEADER_BYTES);
        let hash = self.hash(header.table, key_at(self.region.as_ref(), entry));
        let slot = self
            .index
            .find(self.region.as_ref(), hash, |found| found == entry);
        let Some(slot) = slot else {
            return false;
        };
        if self.bury_in_place(entry).is_err() {
            return false;
        }
        self.unlink(hash, slot, header.table);
        self.cleaner.objects_expired += 1;
        true
    }
}
