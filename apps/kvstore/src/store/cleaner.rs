//! The cleaner: frees segments by moving what is live in them to survivors.
//!
//! It works on one victim at a time, in slices, with all state between slices in [`Cleaner`]. A victim that was begun is always
//! finished: the live entries of any segment fit one free segment, and one is kept for that.

use super::entry::{EntryHeader, key_at};
use super::relocate::Relocation;
use super::segment::{Segment, State};
use super::victim::Moved;
use super::{Store, StoreError};
use crate::limits::{
    CLEANER_RESERVE_SEGMENTS, MAX_SYNC_VICTIMS, SEGMENTS_PER_REGION, SLACK_FRACTION,
};
use crate::prefetch::prefetch;
use core::ops::Range;

/// Entries by which the hashing of a victim's keys is ahead of its cleaning, a power of two. In between their lines of the hash
/// table are fetched: about as many misses as a core has in flight.
const AHEAD_ENTRIES: usize = 16;

/// What looking at one entry is charged to a slice, in bytes: a cache line of the log and one of the table.
const SCAN_COST_BYTES: usize = 64;

/// What looking at one bucket for objects of dropped tables is charged: its line, and one of the log for each entry.
pub(crate) const BUCKET_COST_BYTES: usize = 8 * 64;

/// What a victim must give to be worth it, in halves of a segment's 1/[`SLACK_FRACTION`].
const LEAST_GAIN_IN_BACKGROUND: u64 = 2;
const LEAST_GAIN_FOR_WRITE: u64 = 1;
/// Half a segment: what a victim must give while enough segments rest, but none is free.
const LEAST_GAIN_WHILE_STARVED: u64 = SLACK_FRACTION as u64;

/// So many times as many segments as usual may rest while none is free: a quarter of the log at most.
const STARVED_FACTOR: usize = 4;

/// When the cleaner works between requests. What a write needs that finds no room is always done for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum CleanerMode {
    /// When free segments get scarce.
    #[default]
    Auto = 0,
    /// Not at all.
    Off = 1,
    /// Without rest: while segments are not scarce one after the other is cleaned, in the order of their places, whatever there is to gain.
    Always = 2,
}

impl CleanerMode {
    /// The mode with this number.
    #[must_use]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::Auto,
            1 => Self::Off,
            2 => Self::Always,
            _ => return None,
        })
    }
}

#[derive(Debug, Default)]
pub(crate) struct Cleaner {
    victim: Option<Victim>,
    ahead: Ahead,
    pub(crate) relocation: Option<Relocation>,
    mode: CleanerMode,
    /// Where [`CleanerMode::Always`] goes on.
    next_place: usize,
    /// Dead objects in the log, over all segments.
    pub(crate) dead_objects: u64,
    /// Dead objects freed since the store was opened.
    pub(crate) dead_freed: u64,
    /// Cleaning for a write is not tried again before this many bytes have died: the last try freed nothing.
    futile_until: u64,
    /// Victims chosen for writes since the last one that got its segment.
    pub(crate) victims_tried: usize,
    /// Bytes to clean on behalf of one write.
    pub(crate) budget_for_write: usize,
    /// The same for cleaning in the background, where the last look found no victim that is worth it.
    idle_until: u64,
    /// A sealed segment may hold nothing that is needed: taken back even while others are free, so that a working set that is
    /// overwritten stays in memory that was used before.
    pub(crate) maybe_empty: bool,
    pub(crate) segments_cleaned: u64,
    pub(crate) bytes_moved: u64,
    pub(crate) bytes_freed: u64,
    pub(crate) tombstones_dropped: u64,
    pub(crate) objects_expired: u64,
}

#[derive(Debug, Clone, Copy)]
struct Victim {
    segment: u32,
    /// Offset of the next entry, relative to the segment.
    cursor: usize,
}

/// Entries of a victim that were looked at before they are cleaned. It outlives a slice: where an entry is and what its key is
/// does not change.
#[derive(Debug, Default)]
struct Ahead {
    /// Place in the segment and hash of each, by number.
    entries: [(usize, u64); AHEAD_ENTRIES],
    /// Number of the next one to be cleaned.
    next: usize,
    /// Number of the next one to be looked at, and where it is.
    end: usize,
    cursor: usize,
}

impl Ahead {
    fn from(cursor: usize) -> Self {
        Self {
            cursor,
            ..Self::default()
        }
    }

    const fn is_full(&self) -> bool {
        self.end - self.next == AHEAD_ENTRIES
    }

    fn push(&mut self, hash: u64, bytes: usize) {
        self.entries[self.end % AHEAD_ENTRIES] = (self.cursor, hash);
        self.end += 1;
        self.cursor += bytes;
    }

    /// The hash of the entry at `cursor`, if that is the next one.
    fn first(&self, cursor: usize) -> Option<u64> {
        let (at, hash) = self.entries[self.next % AHEAD_ENTRIES];
        (self.next < self.end && at == cursor).then_some(hash)
    }
}

/// What a slice of cleaning did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CleanProgress {
    /// Bytes copied to survivors.
    pub moved_bytes: u64,
    /// Segments cleaned to the end.
    pub segments_cleaned: u64,
    /// What is left to do.
    pub state: CleanState,
}

/// What is left to do after a slice of cleaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CleanState {
    /// Nothing for now.
    Idle,
    /// The budget ran out before the work did.
    More,
    /// Waits for a pinned segment.
    Blocked,
}

enum Step {
    Finished,
    OutOfBudget,
    Blocked,
}

impl Cleaner {
    pub(crate) fn new(budget_for_write: Option<usize>) -> Self {
        Self {
            budget_for_write: budget_for_write.unwrap_or(usize::MAX),
            ..Self::default()
        }
    }
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// When the cleaner works.
    #[must_use]
    pub const fn cleaner_mode(&self) -> CleanerMode {
        self.cleaner.mode
    }

    /// Changes when the cleaner works from now on.
    pub const fn set_cleaner_mode(&mut self, mode: CleanerMode) {
        self.cleaner.mode = mode;
    }

    /// Works for about `budget_bytes` (at least one entry): drops leases that expired, takes out objects of dropped tables and
    /// objects that expired, and, if segments are getting scarce, cleans. Call it between requests: then writes seldom have to
    /// do it for themselves.
    pub fn clean(&mut self, budget_bytes: usize, now: u64) -> CleanProgress {
        let (moved, cleaned) = (self.cleaner.bytes_moved, self.cleaner.segments_cleaned);
        self.log.set_now(now);
        self.log.release_rested();
        if self.leases.any_expired(now) {
            self.end_expired_leases(now);
        }
        let mut spent = 0;
        if self.tables.has_dropped() {
            let buckets = (budget_bytes / BUCKET_COST_BYTES).max(1);
            spent += self.sweep_dropped(buckets) * BUCKET_COST_BYTES;
        }
        if self.wants_sweep(now) {
            self.sweep_expired(&mut spent, budget_bytes, now);
        }
        let state = self.clean_segments(&mut spent, budget_bytes, now);
        CleanProgress {
            moved_bytes: self.cleaner.bytes_moved - moved,
            segments_cleaned: self.cleaner.segments_cleaned - cleaned,
            state,
        }
    }

    fn clean_segments(&mut self, spent: &mut usize, budget: usize, now: u64) -> CleanState {
        loop {
            if !self.wants_cleaning(now) {
                return CleanState::Idle;
            }
            if self.cleaner.mode == CleanerMode::Off {
                return CleanState::More;
            }
            if *spent >= budget && *spent > 0 {
                return CleanState::More;
            }
            if !self.is_cleaning() && self.may_clean_anything() {
                self.select_next();
            }
            if !self.is_cleaning() && !self.is_scarce() {
                if self.cleaner.maybe_empty && !self.select_empty() {
                    self.cleaner.maybe_empty = false;
                }
                if !self.is_cleaning()
                    && self.wants_cleaning_while_starved()
                    && !self.select_victim(LEAST_GAIN_WHILE_STARVED)
                {
                    self.cleaner.idle_until = self.log.died_bytes + self.least_gain(1);
                }
                if !self.is_cleaning() {
                    return if self.has_chores(now) {
                        CleanState::More
                    } else {
                        CleanState::Idle
                    };
                }
            } else if !self.is_cleaning() && !self.select_victim(LEAST_GAIN_IN_BACKGROUND) {
                if self.waits_for_release(LEAST_GAIN_IN_BACKGROUND) {
                    return CleanState::Blocked;
                }
                self.cleaner.idle_until = self.log.died_bytes + self.least_gain(1);
                return CleanState::Idle;
            }
            match self.advance(spent, budget, now) {
                Step::Finished => {}
                Step::OutOfBudget => return CleanState::More,
                Step::Blocked => return CleanState::Blocked,
            }
        }
    }

    /// Whether [`Self::clean`] has something to do: cheap, for an idle loop.
    #[must_use]
    pub fn wants_cleaning(&self, now: u64) -> bool {
        if self.cleaner.mode == CleanerMode::Off {
            return self.has_chores(now);
        }
        self.is_cleaning()
            || self.may_clean_anything()
            // What rests is looked at by `clean` alone, where nobody writes.
            || (self.cleaner.mode == CleanerMode::Always && self.log.resting_segments() > 0)
            || (self.is_scarce() && self.log.died_bytes >= self.cleaner.idle_until)
            || (self.cleaner.maybe_empty && !self.is_scarce())
            || self.wants_cleaning_while_starved()
            || self.has_chores(now)
    }

    /// Whether segments are cleaned that nothing is to be gained from: one is free for a survivor beside the reserve.
    fn may_clean_anything(&self) -> bool {
        self.cleaner.mode == CleanerMode::Always
            && !self.is_scarce()
            && self.log.free_segments() > CLEANER_RESERVE_SEGMENTS
    }

    /// Whether writes wait for memory that rests, and more of it would help them.
    fn wants_cleaning_while_starved(&self) -> bool {
        let free = self.log.free_segments();
        free <= CLEANER_RESERVE_SEGMENTS
            && free + self.log.resting_segments() < STARVED_FACTOR * self.low_water()
            && self.log.died_bytes >= self.cleaner.idle_until
    }

    /// Whether there is work that frees no segment by itself.
    fn has_chores(&self, now: u64) -> bool {
        self.tables.has_dropped() || self.wants_sweep(now) || self.leases.any_expired(now)
    }

    /// Bytes of objects that were overwritten, removed or expired since the store was opened: what the cleaner can get back.
    #[must_use]
    pub const fn died_bytes(&self) -> u64 {
        self.log.died_bytes
    }

    /// Whether free segments are so few that cleaning is worth copying for.
    #[must_use]
    pub fn is_scarce(&self) -> bool {
        let free = self.log.free_segments();
        free < self.low_water() && free + self.log.resting_segments() < self.low_water()
    }

    /// Free segments below which the cleaner works. Few: the longer it waits, the more of what it finds is dead.
    fn low_water(&self) -> usize {
        CLEANER_RESERVE_SEGMENTS + 1 + self.log.layout.segments / SEGMENTS_PER_REGION
    }

    /// Cleans until a segment is free beyond the cleaner's reserve. Errors: nothing (more) to gain, or only pinned segments; the
    /// budget for writes is spent.
    pub(crate) fn clean_for_write(&mut self, now: u64) -> Result<(), StoreError> {
        if !self.is_cleaning() && self.log.died_bytes < self.cleaner.futile_until {
            return Err(self.full());
        }
        let (mut spent, budget) = (0, self.cleaner.budget_for_write);
        while self.cleaner.victims_tried < MAX_SYNC_VICTIMS {
            if self.log.free_segments() > CLEANER_RESERVE_SEGMENTS {
                self.cleaner.victims_tried = 0;
                return Ok(());
            }
            if !self.is_cleaning() {
                // Enough that only has to rest: another victim's survivor would take what the write waits for.
                let resting = self.log.resting_segments();
                if self.log.free_segments() + resting > CLEANER_RESERVE_SEGMENTS {
                    return Err(StoreError::Busy);
                }
                let found = self.select_victim(LEAST_GAIN_FOR_WRITE)
                    || (self.seal_empty_survivor() && self.select_victim(LEAST_GAIN_FOR_WRITE));
                if !found {
                    if self.waits_for_release(LEAST_GAIN_FOR_WRITE) {
                        return Err(StoreError::Busy);
                    }
                    break;
                }
                self.cleaner.victims_tried += 1;
            }
            match self.advance(&mut spent, budget, now) {
                Step::Finished => {}
                Step::OutOfBudget | Step::Blocked => return Err(StoreError::Busy),
            }
        }
        if self.log.free_segments() > CLEANER_RESERVE_SEGMENTS {
            self.cleaner.victims_tried = 0;
            return Ok(());
        }
        self.cleaner.victims_tried = 0;
        let segment_bytes = self.log.layout.segment_bytes() as u64;
        self.cleaner.futile_until = self.log.died_bytes + segment_bytes / SLACK_FRACTION as u64;
        Err(self.full())
    }

    /// Whether a victim has been begun and is not finished.
    pub(crate) fn is_cleaning(&self) -> bool {
        self.cleaner.victim.is_some()
    }

    /// The part of the region that is a victim's and already cleaned.
    pub(crate) fn cleaned_of_victim(&self) -> Range<usize> {
        self.cleaner.victim.map_or(0..0, |victim| {
            let start = self.log.layout.segment_offset(victim.segment);
            start..start + victim.cursor
        })
    }

    /// Whether segments would be free, or worth cleaning, if nothing pinned them and they had rested.
    fn waits_for_release(&self, least_gain: u64) -> bool {
        let least = self.least_gain(least_gain);
        self.log.segments.iter().any(|segment| {
            segment.state == State::Quarantined
                || (segment.state == State::Sealed
                    && segment.pins > 0
                    && self.gain(segment) >= least)
        })
    }

    fn least_gain(&self, halves: u64) -> u64 {
        let segment_bytes = self.log.layout.segment_bytes() as u64;
        (segment_bytes * halves / (2 * SLACK_FRACTION as u64)).max(1)
    }

    /// Bytes that cleaning `segment` is expected to free. Without what the cleaner itself could not fill: else a store full of
    /// entries that do not pack would be moved for ever.
    fn gain(&self, segment: &Segment) -> u64 {
        let packed = self.log.layout.payload_bytes() as u64 - u64::from(segment.unpackable);
        packed.saturating_sub(self.kept(segment))
    }

    /// Bytes that cleaning `segment` is expected to move. A tombstone is needed as long as the object that it hides lies in the log: all
    /// of them when they were written or last looked at, and since then as many fewer as dead objects were freed. (To take them for
    /// needless without that has the cleaner move the same tombstones for ever.)
    fn kept(&self, segment: &Segment) -> u64 {
        let dead = self.cleaner.dead_objects;
        let freed = self.cleaner.dead_freed - segment.tombstones_since;
        let tombstones = u64::from(segment.tombstones);
        let needed = match dead {
            0 => 0,
            _ => (u128::from(tombstones) * u128::from(dead) / u128::from(dead + freed)) as u64,
        };
        u64::from(segment.live) + u64::from(segment.records) + needed
    }

    /// Chooses the segment whose cleaning pays best: benefit (space, and how long what is moved is likely to live) over cost, as
    /// in RAMCloud, which guesses that what is old lives long. Here the deaths in each segment are counted
    /// ([`Segment::mortality`]): where all keys are overwritten alike, age says nothing, and to heed it costs a sixth more
    /// moving. Bytes moved per byte written at 90% of 119 segments, in a simulation: 6.1 where all are overwritten alike (with no
    /// age 6.1, with its root 7.0), 3.6 where a tenth of the keys gets nine tenths of the writes (6.0, 3.9), 4.1 where
    /// keys follow Zipf's law (4.7, 4.0). Looking through a victim is taken to cost as much as moving a quarter of it. Segments that
    /// give less than `least_gain` are left alone.
    fn select_victim(&mut self, least_gain: u64) -> bool {
        let segment_bytes = self.log.layout.segment_bytes() as u64;
        let least = self.least_gain(least_gain);
        let spare = self.log.free_segments() > CLEANER_RESERVE_SEGMENTS;
        let (died, live) = (self.log.died_bytes, self.log.bytes.live);
        let best = self
            .log
            .segments
            .iter()
            .enumerate()
            // A pinned victim is not free when it is done, which needs a segment to spare.
            .filter(|(_, segment)| {
                segment.state == State::Sealed
                    && segment.open_reservations == 0
                    && (segment.pins == 0 || spare)
            })
            .filter_map(|(index, segment)| {
                let (gain, kept) = (self.gain(segment), self.kept(segment));
                if gain < least {
                    return None;
                }
                let (deaths, expected) = segment.mortality(segment_bytes, died, live);
                let score = ((u128::from(gain) * u128::from(expected)) << 20)
                    / (u128::from(segment_bytes / 4 + kept) * u128::from(deaths));
                // Next to nothing to move: free at once, whatever else there is. The longest full first even then, or a few
                // would stay for ever.
                Some((self.is_near_empty(kept), score, index as u32))
            })
            .max();
        let Some((_, _, index)) = best else {
            return false;
        };
        self.begin_victim(index);
        true
    }

    /// Whether a segment that keeps so many bytes is as good as empty.
    fn is_near_empty(&self, kept: u64) -> bool {
        kept < self.log.layout.segment_bytes() as u64 / SLACK_FRACTION as u64
    }

    /// Makes a victim of the survivor, if what was moved into it has died. False: there is none, or it holds something.
    fn seal_empty_survivor(&mut self) -> bool {
        let empty = self.log.survivor.is_some_and(|survivor| {
            let kept = self.kept(&self.log.segments[survivor as usize]);
            self.is_near_empty(kept)
        });
        if empty {
            self.log.seal_survivor();
        }
        empty
    }

    /// Chooses a segment that costs nothing to move.
    fn select_empty(&mut self) -> bool {
        let empty = self.log.segments.iter().position(|s| {
            s.state == State::Sealed
                && s.open_reservations == 0
                && s.live == 0
                && s.tombstones == 0
                && s.records == 0
        });
        match empty {
            Some(index) => {
                self.begin_victim(index as u32);
                true
            }
            None => false,
        }
    }

    /// Chooses the segment after the one that was chosen so before.
    fn select_next(&mut self) {
        let count = self.log.segments.len();
        let from = self.cleaner.next_place;
        let place = (0..count).map(|i| (from + i) % count).find(|place| {
            let segment = &self.log.segments[*place];
            segment.state == State::Sealed && segment.open_reservations == 0
        });
        if let Some(place) = place {
            self.cleaner.next_place = place + 1;
            self.begin_victim(place as u32);
        }
    }

    fn begin_victim(&mut self, index: u32) {
        let cursor = self.log.layout.prologue_bytes();
        self.log.segments[index as usize].state = State::Victim;
        self.cleaner.ahead = Ahead::from(cursor);
        self.cleaner.victim = Some(Victim {
            segment: index,
            cursor,
        });
    }

    /// Cleans the victim until it is done or `spent` has reached `budget`.
    fn advance(&mut self, spent: &mut usize, budget: usize, now: u64) -> Step {
        let Some(Victim {
            segment,
            mut cursor,
        }) = self.cleaner.victim
        else {
            return Step::Finished;
        };
        let start = self.log.layout.segment_offset(segment);
        let used = self.log.segments[segment as usize].used as usize;
        while cursor < used {
            if *spent >= budget && *spent > 0 {
                return Step::OutOfBudget;
            }
            self.look_ahead(segment, used);
            let Some(header) = self.readable(segment, start + cursor, used - cursor) else {
                return self.leave_alone(segment);
            };
            let Some(hash) = self.cleaner.ahead.first(cursor) else {
                return self.leave_alone(segment);
            };
            let left = budget.saturating_sub(*spent);
            match self.clean_entry(start + cursor, &header, hash, segment, (left, now)) {
                Moved::Bytes(bytes) => *spent += SCAN_COST_BYTES + bytes,
                Moved::Part(bytes) => {
                    *spent += SCAN_COST_BYTES + bytes;
                    return Step::OutOfBudget;
                }
                Moved::Blocked => return Step::Blocked,
                Moved::Lost => return self.leave_alone(segment),
            }
            cursor += header.total_bytes();
            self.cleaner.ahead.next += 1;
            self.cleaner.victim = Some(Victim { segment, cursor });
        }
        self.cleaner.victim = None;
        self.cleaner.segments_cleaned += 1;
        // What the segment said of the safe version must be said elsewhere before its bytes are reused.
        self.log_safe_version();
        self.log
            .retire(self.region.as_mut(), segment, self.safe_version);
        Step::Finished
    }

    /// Hashes the keys of a victim's next entries and has their lines of the hash table fetched: a cache miss for each, which
    /// passes while the entries before are cleaned.
    #[inline(always)]
    fn look_ahead(&mut self, segment: u32, used: usize) {
        let start = self.log.layout.segment_offset(segment);
        while !self.cleaner.ahead.is_full() && self.cleaner.ahead.cursor < used {
            let cursor = self.cleaner.ahead.cursor;
            let Some(header) = self.readable(segment, start + cursor, used - cursor) else {
                return;
            };
            let mem = self.region.as_ref();
            let hash = self.hash(header.table, key_at(mem, start + cursor));
            prefetch(mem, self.index.place(hash, header.is_live()));
            self.cleaner.ahead.push(hash, header.total_bytes());
        }
    }

    /// The header at `offset`, if it is one of this segment's and ends within `room`.
    pub(crate) fn readable(&self, segment: u32, offset: usize, room: usize) -> Option<EntryHeader> {
        let header = EntryHeader::parse(&self.region.as_ref()[offset..]).ok()?;
        let generation = self.log.segments[segment as usize].generation;
        (header.generation() == generation && header.total_bytes() <= room).then_some(header)
    }

    /// Leaves a segment alone whose entries cannot be followed: what the table refers to in it still serves reads.
    #[cold]
    fn leave_alone(&mut self, segment: u32) -> Step {
        self.give_up_relocation();
        self.log.segments[segment as usize].state = State::Damaged;
        self.cleaner.victim = None;
        Step::Finished
    }
}
