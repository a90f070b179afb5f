//! The log: a fixed set of segments, one head that is appended to, one survivor that the cleaner appends to.

use super::Config;
use super::entry::{ENTRY_HEADER_BYTES, EntryHeader, EntryKind, FLAG_RETIRED, entry_bytes, seal};
use super::index::BUCKET_BYTES;
use super::layout::Layout;
use super::mem::{store_u32, store_u64};
use crate::limits::{QUARANTINE_MARGIN, SWEEP_FRACTION};
use alloc::vec::Vec;

/// Bytes of a segment's first entry.
pub(crate) const SEGMENT_HEADER_BYTES: usize = ENTRY_HEADER_BYTES + 16;

/// One part in this many of a segment is added to what died in it and to what was expected to, so that a few deaths more or
/// less do not decide. From a fifth to a third of a segment the cleaner moves about as little.
const PRIOR_FRACTION: u64 = 4;
/// Where the expected deaths of a segment end, bytes: far beyond what tells segments apart.
const MOST_EXPECTED: u128 = 1 << 40;

/// What a segment is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Ready for reuse.
    Free,
    /// Head or survivor: being appended to.
    Open,
    /// Full; may be cleaned.
    Sealed,
    /// Being cleaned.
    Victim,
    /// Cleaned, but pinned, or freed so recently that a one-sided READ of it may be under way.
    Quarantined,
    /// Holds overflow buckets for good.
    Overflow,
    /// Sealed, and found unreadable by the cleaner: left alone for good.
    Damaged,
}

#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) state: State,
    /// Unique and increasing over all segments ever opened.
    pub(crate) generation: u64,
    /// Bytes appended, header included.
    pub(crate) used: u32,
    /// Bytes of live objects.
    pub(crate) live: u32,
    /// Bytes of tombstones.
    pub(crate) tombstones: u32,
    /// How many dead objects the cleaner had freed when they were last known to be needed, on average by bytes.
    pub(crate) tombstones_since: u64,
    /// Bytes of open reservations.
    pub(crate) pending: u32,
    /// Bytes of result records that are needed.
    pub(crate) records: u32,
    /// Bytes of live objects that expire, and when the first and the last of them does, as far as known: none earlier, none
    /// later.
    pub(crate) expiring: u32,
    pub(crate) first_expiry: u64,
    pub(crate) last_expiry: u64,
    pub(crate) open_reservations: u32,
    pub(crate) pins: u32,
    /// Quarantined: when it was freed.
    freed_at: u64,
    /// Sealed: bytes of live objects when it was sealed, and [`Log::died_bytes`] then.
    sealed_live: u32,
    sealed_at: u64,
    /// Bytes at its end that stayed unused because the next entry moved did not fit: to move its entries once more would gain
    /// none of them.
    pub(crate) unpackable: u32,
}

impl Segment {
    const fn opened(generation: u64, used: usize, pins: u32) -> Self {
        Self {
            state: State::Open,
            generation,
            used: used as u32,
            live: 0,
            tombstones: 0,
            tombstones_since: 0,
            pending: 0,
            records: 0,
            expiring: 0,
            first_expiry: u64::MAX,
            last_expiry: 0,
            open_reservations: 0,
            pins,
            freed_at: 0,
            sealed_live: 0,
            sealed_at: 0,
            unpackable: 0,
        }
    }

    /// Notes a tombstone of `bytes` that is needed now that the cleaner has freed `freed` dead objects.
    pub(crate) fn note_tombstone(&mut self, bytes: usize, freed: u64) {
        let (before, bytes) = (u128::from(self.tombstones), bytes as u128);
        let sum = u128::from(self.tombstones_since) * before + u128::from(freed) * bytes;
        self.tombstones += bytes as u32;
        self.tombstones_since = (sum / u128::from(self.tombstones).max(1)) as u64;
    }

    /// Notes a live object of `bytes` that expires.
    pub(crate) fn note_expiry(&mut self, bytes: usize, expires: u64) {
        self.expiring += bytes as u32;
        self.first_expiry = self.first_expiry.min(expires);
        self.last_expiry = self.last_expiry.max(expires);
    }

    /// When about 1/[`SWEEP_FRACTION`] of the segment has expired, if expiries are spread evenly between the first and the last.
    pub(crate) fn sweep_at(&self, segment_bytes: u64) -> u64 {
        let (expiring, enough) = (u64::from(self.expiring), segment_bytes / SWEEP_FRACTION);
        if expiring == 0 {
            u64::MAX
        } else if expiring <= enough {
            self.last_expiry
        } else {
            let span = u128::from(self.last_expiry - self.first_expiry);
            self.first_expiry + (span * u128::from(enough) / u128::from(expiring)) as u64
        }
    }

    /// How many bytes died in it since it was sealed, and how many would have if the store's `died` had hit each live byte alike.
    /// Both are a quarter of a segment too many: so much has to have been expected before what was counted says more than chance.
    pub(crate) fn mortality(&self, segment_bytes: u64, died: u64, live: u64) -> (u64, u64) {
        let (before, now) = (u64::from(self.sealed_live), u64::from(self.live));
        let at_risk = u128::from(before.midpoint(now));
        let expected = at_risk * u128::from(died - self.sealed_at) / u128::from(live.max(1));
        let prior = segment_bytes / PRIOR_FRACTION;
        (
            before.saturating_sub(now) + prior,
            expected.min(MOST_EXPECTED) as u64 + prior,
        )
    }

    const fn is_log(&self) -> bool {
        matches!(
            self.state,
            State::Open | State::Sealed | State::Victim | State::Damaged
        )
    }
}

/// Where every byte of the region is. The fields sum up to the region's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Accounting {
    /// Current objects.
    pub live: u64,
    /// Tombstones, needed or not yet known to be needless.
    pub tombstones: u64,
    /// Open reservations.
    pub pending: u64,
    /// Result records of requests that may be retried.
    pub records: u64,
    /// Overwritten, removed or abandoned entries, and unused ends of sealed segments.
    pub dead: u64,
    /// Free segments and the unused ends of head and survivor.
    pub free: u64,
    /// Superblock, hash table, counters, overflow buckets, segment headers with digests, and what does not make a whole segment.
    pub overhead: u64,
}

impl Accounting {
    /// The sum of all fields: the region's size.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.live
            + self.tombstones
            + self.pending
            + self.records
            + self.dead
            + self.free
            + self.overhead
    }

    /// What occupies log for as long as nobody removes, overwrites, commits or acknowledges it.
    #[must_use]
    #[inline(always)]
    pub const fn claimed(&self) -> u64 {
        self.live + self.pending + self.records
    }
}

/// Which open segment an append goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Head,
    Survivor,
}

#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) layout: Layout,
    pub(crate) segments: Vec<Segment>,
    /// Last in, first out: memory that was touched is used again before memory that never was.
    free: Vec<u32>,
    pub(crate) head: u32,
    pub(crate) survivor: Option<u32>,
    next_generation: u64,
    /// Bytes of objects and reservations that died since the store was opened.
    pub(crate) died_bytes: u64,
    overflow: usize,
    /// Segments in quarantine, oldest first.
    resting: Vec<u32>,
    quarantine_ns: u64,
    /// The latest time that a call brought.
    now: u64,
    /// No sealed segment is worth a search for expired objects before.
    pub(crate) next_sweep_at: u64,
    /// The safe version that the head's entries tell a replay.
    pub(crate) head_safe_version: u64,
    pub(crate) bytes: Accounting,
}

impl Log {
    /// A log with its first head open.
    pub(crate) fn new(layout: Layout, mem: &mut [u8], config: &Config, safe_version: u64) -> Self {
        let empty = Segment {
            state: State::Free,
            ..Segment::opened(0, 0, 0)
        };
        let log_bytes = (layout.segments << layout.segment_shift) as u64;
        let mut log = Self {
            segments: alloc::vec![empty; layout.segments],
            free: (0..layout.segments as u32).rev().collect(),
            head: 0,
            survivor: None,
            next_generation: 1,
            died_bytes: 0,
            overflow: 0,
            resting: Vec::with_capacity(layout.segments),
            quarantine_ns: config.quarantine_ns,
            now: 0,
            next_sweep_at: u64::MAX,
            head_safe_version: safe_version,
            bytes: Accounting {
                free: log_bytes,
                overhead: layout.region_bytes as u64 - log_bytes,
                ..Accounting::default()
            },
            layout,
        };
        if let Some(head) = log.open(mem, safe_version) {
            log.head = head;
        }
        log
    }

    pub(crate) fn free_segments(&self) -> usize {
        self.free.len()
    }

    /// Segments that time alone will free.
    pub(crate) fn resting_segments(&self) -> usize {
        self.resting
            .iter()
            .filter(|index| self.segments[**index as usize].pins == 0)
            .count()
    }

    /// Segments that hold log.
    pub(crate) fn log_segments(&self) -> usize {
        self.segments.len() - self.overflow
    }

    pub(crate) fn segment_of(&self, offset: usize) -> Option<u32> {
        let index = offset.checked_sub(self.layout.log)? >> self.layout.segment_shift;
        (index < self.segments.len()).then_some(index as u32)
    }

    #[inline(always)]
    pub(crate) fn segment_at(&mut self, offset: usize) -> &mut Segment {
        let index = (offset - self.layout.log) >> self.layout.segment_shift;
        &mut self.segments[index]
    }

    fn room(&self, index: u32) -> usize {
        self.layout.segment_bytes() - self.segments[index as usize].used as usize
    }

    fn target(&self, target: Target) -> Option<u32> {
        match target {
            Target::Head => Some(self.head),
            Target::Survivor => self.survivor,
        }
    }

    /// Whether `bytes` fit what is open.
    #[inline(always)]
    pub(crate) fn fits(&self, target: Target, bytes: usize) -> bool {
        self.target(target)
            .is_some_and(|index| self.room(index) >= bytes)
    }

    /// Takes `bytes` that [`Self::fits`] said to fit. Returns their offset and the segment's generation; the caller adds them
    /// to an account.
    #[inline(always)]
    pub(crate) fn append(
        &mut self,
        mem: &mut [u8],
        target: Target,
        bytes: usize,
    ) -> Option<(usize, u64)> {
        let index = self.target(target)?;
        let segment = &mut self.segments[index as usize];
        let at = self.layout.segment_offset(index) + segment.used as usize;
        segment.used += bytes as u32;
        self.bytes.free -= bytes as u64;
        // A zero word ends the segment for a scan: what lies behind it is from an earlier use, and not to be trusted.
        if segment.used as usize + 8 <= self.layout.segment_bytes() {
            store_u64(mem, at + bytes, 0);
        }
        Some((at, segment.generation))
    }

    /// Gives back the last `bytes` that were taken of the survivor, at `at`.
    pub(crate) fn take_back(&mut self, mem: &mut [u8], at: usize, bytes: usize) {
        let segment = self.segment_at(at);
        debug_assert_eq!(segment.state, State::Open);
        segment.used -= bytes as u32;
        self.bytes.free += bytes as u64;
        store_u64(mem, at, 0);
    }

    /// Replaces the head or the survivor by a free segment. False: none is free.
    pub(crate) fn roll(&mut self, mem: &mut [u8], target: Target, safe_version: u64) -> bool {
        let Some(new) = self.open(mem, safe_version) else {
            return false;
        };
        match target {
            Target::Head => {
                self.seal(self.head);
                self.head = new;
                self.head_safe_version = safe_version;
            }
            Target::Survivor => {
                if let Some(old) = self.survivor.replace(new) {
                    self.segments[old as usize].unpackable = self.room(old) as u32;
                    self.seal(old);
                }
            }
        }
        true
    }

    /// Continues the head in the survivor, for want of a free segment. Its header's safe version is raised to `safe_version`,
    /// as that of any head is. False: there is no survivor.
    pub(crate) fn adopt_survivor(&mut self, mem: &mut [u8], safe_version: u64) -> bool {
        let Some(survivor) = self.survivor.take() else {
            return false;
        };
        self.seal(self.head);
        self.head = survivor;
        self.write_header(mem, survivor, safe_version, 0);
        self.head_safe_version = safe_version;
        true
    }

    /// Ends the survivor; the next one is opened when something is moved.
    pub(crate) fn seal_survivor(&mut self) {
        if let Some(survivor) = self.survivor.take() {
            self.seal(survivor);
        }
    }

    fn open(&mut self, mem: &mut [u8], safe_version: u64) -> Option<u32> {
        let index = self.free.pop()?;
        let prologue = self.layout.prologue_bytes();
        let segment = &mut self.segments[index as usize];
        *segment = Segment::opened(self.next_generation, prologue, segment.pins);
        self.next_generation += 1;
        self.bytes.free -= prologue as u64;
        self.bytes.overhead += prologue as u64;
        self.write_header(mem, index, safe_version, 0);
        self.write_digest(mem, index);
        let start = self.layout.segment_offset(index);
        store_u64(mem, start + prologue, 0);
        Some(index)
    }

    pub(crate) fn write_header(&self, mem: &mut [u8], index: u32, safe_version: u64, flags: u8) {
        let start = self.layout.segment_offset(index);
        let generation = self.segments[index as usize].generation;
        let header = EntryHeader {
            state: generation << 1,
            crc: 0,
            kind: EntryKind::SegmentHeader,
            flags,
            key_len: 0,
            value_len: 16,
            table: 0,
            version: safe_version,
        };
        let bytes = &mut mem[start..start + SEGMENT_HEADER_BYTES];
        header.emit(bytes);
        store_u64(bytes, ENTRY_HEADER_BYTES, generation);
        store_u32(
            bytes,
            ENTRY_HEADER_BYTES + 8,
            self.layout.segment_bytes() as u32,
        );
        store_u32(bytes, ENTRY_HEADER_BYTES + 12, index);
        seal(bytes, &header);
    }

    /// Writes the list of all segments of the log, the new segment `index` included, behind its header.
    fn write_digest(&self, mem: &mut [u8], index: u32) {
        let start = self.layout.segment_offset(index) + SEGMENT_HEADER_BYTES;
        let value_len = 8 * self.layout.segments;
        let header = EntryHeader {
            state: self.segments[index as usize].generation << 1,
            crc: 0,
            kind: EntryKind::Digest,
            flags: 0,
            key_len: 0,
            value_len: value_len as u32,
            table: 0,
            version: 0,
        };
        let bytes = &mut mem[start..start + entry_bytes(0, value_len)];
        header.emit(bytes);
        for (place, segment) in self.segments.iter().enumerate() {
            let id = if segment.is_log() {
                segment.generation
            } else {
                0
            };
            store_u64(bytes, ENTRY_HEADER_BYTES + 8 * place, id);
        }
        seal(bytes, &header);
    }

    fn seal(&mut self, index: u32) {
        let room = self.room(index) as u64;
        let segment = &mut self.segments[index as usize];
        segment.state = State::Sealed;
        let sweep_at = segment.sweep_at(self.layout.segment_bytes() as u64);
        self.next_sweep_at = self.next_sweep_at.min(sweep_at);
        segment.sealed_live = segment.live;
        segment.sealed_at = self.died_bytes;
        self.bytes.free -= room;
        self.bytes.dead += room;
    }

    /// Ends the use of a cleaned segment. Its entries are dead or moved; it is reused once nothing pins it and nobody can be
    /// reading it any more.
    pub(crate) fn retire(&mut self, mem: &mut [u8], index: u32, safe_version: u64) {
        self.write_header(mem, index, safe_version, FLAG_RETIRED);
        let segment = &mut self.segments[index as usize];
        if segment.pins > 0 || self.quarantine_ns > 0 {
            segment.state = State::Quarantined;
            segment.freed_at = self.now;
            self.resting.push(index);
        } else {
            self.release(index);
        }
    }

    fn release(&mut self, index: u32) {
        let segment_bytes = self.layout.segment_bytes() as u64;
        let prologue = self.layout.prologue_bytes() as u64;
        self.segments[index as usize].state = State::Free;
        self.bytes.dead -= segment_bytes - prologue;
        self.bytes.overhead -= prologue;
        self.bytes.free += segment_bytes;
        self.free.push(index);
    }

    /// Sets how long memory rests. Returns how long it rested so far.
    pub(crate) fn set_quarantine(&mut self, quarantine_ns: u64) -> u64 {
        core::mem::replace(&mut self.quarantine_ns, quarantine_ns)
    }

    /// Takes note of the time. It never goes back.
    pub(crate) fn set_now(&mut self, now: u64) {
        self.now = self.now.max(now);
    }

    /// Frees the segments whose quarantine is over.
    pub(crate) fn release_rested(&mut self) {
        let mut at = 0;
        while let Some(&index) = self.resting.get(at) {
            if self.has_rested(index) {
                self.resting.remove(at);
                self.release(index);
            } else {
                at += 1;
            }
        }
    }

    fn has_rested(&self, index: u32) -> bool {
        let segment = &self.segments[index as usize];
        segment.pins == 0 && self.now >= self.rested_at(segment)
    }

    /// From when on a quarantined segment may be reused: the quarantine as readers know it, and a margin for clocks that
    /// differ and for times that callers read a little earlier.
    const fn rested_at(&self, segment: &Segment) -> u64 {
        if self.quarantine_ns == 0 {
            return 0;
        }
        let rest = self
            .quarantine_ns
            .saturating_add(self.quarantine_ns / QUARANTINE_MARGIN);
        segment.freed_at.saturating_add(rest)
    }

    /// When the next segment's quarantine ends; none if no segment waits for time.
    pub(crate) fn next_rested_at(&self) -> Option<u64> {
        self.resting
            .iter()
            .map(|index| &self.segments[*index as usize])
            .filter(|segment| segment.pins == 0)
            .map(|segment| self.rested_at(segment))
            .min()
    }

    /// Takes a free segment out of the log for overflow buckets. Returns their offset and bytes. The segment's header stays: it
    /// tells a replay what became of the segment that digests list there.
    pub(crate) fn take_for_overflow(
        &mut self,
        mem: &mut [u8],
        safe_version: u64,
    ) -> Option<(usize, usize)> {
        let index = self.free.pop()?;
        let segment = &mut self.segments[index as usize];
        segment.state = State::Overflow;
        segment.generation = self.next_generation;
        self.next_generation += 1;
        self.overflow += 1;
        self.bytes.free -= self.layout.segment_bytes() as u64;
        self.bytes.overhead += self.layout.segment_bytes() as u64;
        self.write_header(mem, index, safe_version, FLAG_RETIRED);
        let end = self.layout.segment_offset(index) + self.layout.segment_bytes();
        let start = (self.layout.segment_offset(index) + SEGMENT_HEADER_BYTES)
            .next_multiple_of(BUCKET_BYTES);
        Some((start, end - start))
    }

    pub(crate) fn pin(&mut self, index: u32) {
        if let Some(segment) = self.segments.get_mut(index as usize) {
            segment.pins += 1;
        }
    }

    pub(crate) fn unpin(&mut self, index: u32) {
        let Some(segment) = self.segments.get_mut(index as usize) else {
            return;
        };
        debug_assert!(
            segment.pins > 0,
            "segment {index} unpinned more often than pinned"
        );
        segment.pins = segment.pins.saturating_sub(1);
        if segment.state == State::Quarantined && self.has_rested(index) {
            self.resting.retain(|resting| *resting != index);
            self.release(index);
        }
    }

    /// Segments in `state`.
    pub(crate) fn count(&self, state: State) -> usize {
        self.segments
            .iter()
            .filter(|segment| segment.state == state)
            .count()
    }
}
