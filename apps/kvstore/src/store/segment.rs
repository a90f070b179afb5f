//! The log: a fixed set of segments, one head that is appended to, one survivor that the cleaner appends to.

use super::entry::{ENTRY_HEADER_BYTES, EntryHeader, EntryKind, seal_checksum};
use super::layout::Layout;
use super::mem::{store_u32, store_u64};
use alloc::vec::Vec;

/// Bytes of a segment's first entry.
pub(crate) const SEGMENT_HEADER_BYTES: usize = ENTRY_HEADER_BYTES + 16;

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
    /// Cleaned, but pinned.
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
    /// Bytes of open reservations.
    pub(crate) pending: u32,
    pub(crate) open_reservations: u32,
    pub(crate) pins: u32,
    /// How old the data is: the number of segments opened when it was written.
    pub(crate) epoch: u64,
    /// Survivor only: sum of bytes times epoch of what was moved in.
    epoch_weight: u64,
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
    /// Overwritten, removed or abandoned entries, and unused ends of sealed segments.
    pub dead: u64,
    /// Free segments and the unused ends of head and survivor.
    pub free: u64,
    /// Superblock, hash table, counters, overflow buckets, segment headers, and what does not make a whole segment.
    pub overhead: u64,
}

impl Accounting {
    /// The sum of all fields: the region's size.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.live + self.tombstones + self.pending + self.dead + self.free + self.overhead
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
    pub(crate) segments_opened: u64,
    overflow: usize,
    pub(crate) bytes: Accounting,
}

impl Log {
    /// A log with its first head open.
    pub(crate) fn new(layout: Layout, mem: &mut [u8], safe_version: u64) -> Self {
        let empty = Segment {
            state: State::Free,
            generation: 0,
            used: 0,
            live: 0,
            tombstones: 0,
            pending: 0,
            open_reservations: 0,
            pins: 0,
            epoch: 0,
            epoch_weight: 0,
        };
        let log_bytes = (layout.segments << layout.segment_shift) as u64;
        let mut log = Self {
            segments: alloc::vec![empty; layout.segments],
            free: (0..layout.segments as u32).rev().collect(),
            head: 0,
            survivor: None,
            next_generation: 1,
            segments_opened: 0,
            overflow: 0,
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

    /// Replaces the head or the survivor by a free segment. False: none is free.
    pub(crate) fn roll(&mut self, mem: &mut [u8], target: Target, safe_version: u64) -> bool {
        let Some(new) = self.open(mem, safe_version) else {
            return false;
        };
        match target {
            Target::Head => {
                self.seal(self.head);
                self.head = new;
            }
            Target::Survivor => {
                if let Some(old) = self.survivor.replace(new) {
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
        self.write_header(mem, survivor, safe_version);
        true
    }

    fn open(&mut self, mem: &mut [u8], safe_version: u64) -> Option<u32> {
        let index = self.free.pop()?;
        self.segments_opened += 1;
        let segment = &mut self.segments[index as usize];
        *segment = Segment {
            state: State::Open,
            generation: self.next_generation,
            used: SEGMENT_HEADER_BYTES as u32,
            epoch: self.segments_opened,
            epoch_weight: 0,
            live: 0,
            tombstones: 0,
            pending: 0,
            open_reservations: 0,
            pins: segment.pins,
        };
        self.next_generation += 1;
        self.bytes.free -= SEGMENT_HEADER_BYTES as u64;
        self.bytes.overhead += SEGMENT_HEADER_BYTES as u64;
        self.write_header(mem, index, safe_version);
        let start = self.layout.segment_offset(index);
        store_u64(mem, start + SEGMENT_HEADER_BYTES, 0);
        Some(index)
    }

    pub(crate) fn write_header(&self, mem: &mut [u8], index: u32, safe_version: u64) {
        let start = self.layout.segment_offset(index);
        let generation = self.segments[index as usize].generation;
        let header = EntryHeader {
            state: generation << 1,
            crc: 0,
            kind: EntryKind::SegmentHeader,
            flags: 0,
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
        seal_checksum(bytes, &header);
    }

    fn seal(&mut self, index: u32) {
        let room = self.room(index) as u64;
        let segment = &mut self.segments[index as usize];
        segment.state = State::Sealed;
        if segment.epoch_weight != 0 {
            let moved = u64::from(segment.used) - SEGMENT_HEADER_BYTES as u64;
            segment.epoch = (segment.epoch_weight / moved.max(1)).min(segment.epoch);
        }
        self.bytes.free -= room;
        self.bytes.dead += room;
    }

    /// Gives `bytes` that the cleaner moved into the survivor the age of where they came from.
    pub(crate) fn age_survivor(&mut self, bytes: usize, epoch: u64) {
        if let Some(survivor) = self.survivor {
            let segment = &mut self.segments[survivor as usize];
            segment.epoch_weight = segment
                .epoch_weight
                .saturating_add(epoch.saturating_mul(bytes as u64));
        }
    }

    /// Ends the use of a cleaned segment. Its entries are dead or moved; it is reused once nothing pins it.
    pub(crate) fn retire(&mut self, mem: &mut [u8], index: u32) {
        // Without a valid first word the segment is no part of the log any more.
        store_u64(mem, self.layout.segment_offset(index), 0);
        if self.segments[index as usize].pins > 0 {
            self.segments[index as usize].state = State::Quarantined;
        } else {
            self.release(index);
        }
    }

    fn release(&mut self, index: u32) {
        let segment_bytes = self.layout.segment_bytes() as u64;
        self.segments[index as usize].state = State::Free;
        self.bytes.dead -= segment_bytes - SEGMENT_HEADER_BYTES as u64;
        self.bytes.overhead -= SEGMENT_HEADER_BYTES as u64;
        self.bytes.free += segment_bytes;
        self.free.push(index);
    }

    /// Takes a free segment out of the log for overflow buckets. Returns its offset.
    pub(crate) fn take_for_overflow(&mut self) -> Option<usize> {
        let index = self.free.pop()?;
        self.segments[index as usize].state = State::Overflow;
        self.overflow += 1;
        self.bytes.free -= self.layout.segment_bytes() as u64;
        self.bytes.overhead += self.layout.segment_bytes() as u64;
        Some(self.layout.segment_offset(index))
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
        if segment.pins == 0 && segment.state == State::Quarantined {
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
