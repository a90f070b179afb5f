//! The hash table: 64-byte buckets of eight slots, chained where eight are not enough.
//!
//! A slot is a u64: bits 63..48 a tag (never 0), bit 47 the chain bit, bits 46..0 an offset in the region. An empty slot is 0.
//! With the chain bit the last slot of a bucket holds no entry but the offset of an overflow bucket; the last slot of the last
//! bucket may hold an entry.
//!
//! **An entry stays in its slot.** A removed one leaves a hole for the next insertion, and nothing is moved into it. The only move
//! is that of an entry in a bucket's last slot to the first slot of a new overflow bucket, which is complete before the chain
//! bit is set. So a one-sided reader that looks at each slot of a chain once, at any time and in any order, sees every key
//! that exists throughout. An overflow bucket is taken out of its chain when it is the last one and empty.
//!
//! The bucket is chosen by the high bits of the hash (so bucket order is hash order, which makes cursors stable), the tag
//! is its low bits.

use super::layout::{Layout, SUPERBLOCK_BYTES};
use super::mem::{load_u32, load_u64, order, store_u32, store_u64};

/// Bytes of a bucket: a cache line.
pub const BUCKET_BYTES: usize = 64;
/// Counters of dead objects per bucket. A full table then has one or two keys a counter, so that the dead versions of one
/// key seldom keep the tombstone of another in the log.
pub(crate) const COUNTERS: usize = 4;
/// Bytes of a bucket's counters.
pub(crate) const COUNTER_BYTES: usize = 4 * COUNTERS;
pub(crate) const SLOTS: usize = 8;
const LAST: usize = 8 * (SLOTS - 1);
pub(crate) const CHAIN: u64 = 1 << 47;
pub(crate) const OFFSET: u64 = CHAIN - 1;

/// The 16-bit tag of `hash`. Never 0, so that a used slot cannot look empty.
#[inline(always)]
pub(crate) const fn tag(hash: u64) -> u64 {
    let tag = hash & 0xffff;
    if tag == 0 { 1 } else { tag }
}

#[inline(always)]
const fn bucket_index(hash: u64, buckets: u64) -> u64 {
    ((hash as u128 * buckets as u128) >> 64) as u64
}

/// Offset of the first bucket of `hash` in a store with so many.
#[inline(always)]
pub(crate) const fn bucket_offset(hash: u64, buckets: u64) -> usize {
    SUPERBLOCK_BYTES + bucket_index(hash, buckets) as usize * BUCKET_BYTES
}

/// Where an entry was found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    /// Offset of the slot.
    pub(crate) at: usize,
    /// Offset of the entry that it refers to.
    pub(crate) entry: usize,
}

#[derive(Debug)]
pub(crate) struct Index {
    buckets: u64,
    counters: usize,
    /// First of the recycled overflow buckets, linked through their first word; 0: none.
    recycled: usize,
    recycled_count: usize,
    /// Overflow buckets never used so far.
    fresh: usize,
    fresh_end: usize,
    /// Overflow buckets in chains.
    used: usize,
}

impl Index {
    pub(crate) fn new(layout: &Layout) -> Self {
        Self {
            buckets: layout.buckets as u64,
            counters: layout.counters,
            recycled: 0,
            recycled_count: 0,
            fresh: layout.overflow,
            fresh_end: layout.log,
            used: 0,
        }
    }

    #[inline(always)]
    fn bucket(&self, hash: u64) -> usize {
        bucket_offset(hash, self.buckets)
    }

    /// The smallest hash that falls into the bucket after that of `hash`; none after the last.
    pub(crate) fn next_bucket(&self, hash: u64) -> Option<u64> {
        let next = bucket_index(hash, self.buckets) + 1;
        (next < self.buckets)
            .then(|| (u128::from(next) << 64).div_ceil(u128::from(self.buckets)) as u64)
    }

    /// Finds the slot of `hash` whose entry satisfies `matches`.
    #[inline(always)]
    pub(crate) fn find(
        &self,
        mem: &[u8],
        hash: u64,
        mut matches: impl FnMut(usize) -> bool,
    ) -> Option<Slot> {
        // Tag and a clear chain bit in one comparison.
        let wanted = tag(hash) << 1;
        let mut bucket = self.bucket(hash);
        loop {
            let line: &[u8; BUCKET_BYTES] = mem[bucket..].first_chunk()?;
            let (slots, _) = line.as_chunks::<8>();
            for (index, slot) in slots.iter().enumerate() {
                let slot = u64::from_le_bytes(*slot);
                if slot >> 47 == wanted {
                    let entry = (slot & OFFSET) as usize;
                    if matches(entry) {
                        return Some(Slot {
                            at: bucket + 8 * index,
                            entry,
                        });
                    }
                }
            }
            let last = u64::from_le_bytes(slots[SLOTS - 1]);
            if last & CHAIN == 0 {
                return None;
            }
            bucket = (last & OFFSET) as usize;
        }
    }

    /// The offset of the slot that refers to `entry`, whose key has `hash`.
    #[inline(always)]
    pub(crate) fn find_entry(&self, mem: &[u8], hash: u64, entry: usize) -> Option<usize> {
        let wanted = tag(hash) << 48 | entry as u64;
        let mut bucket = self.bucket(hash);
        loop {
            let line: &[u8; BUCKET_BYTES] = mem[bucket..].first_chunk()?;
            let (slots, _) = line.as_chunks::<8>();
            // All eight without a branch: which of them it is cannot be predicted.
            let mut found = SLOTS;
            for (index, slot) in slots.iter().enumerate() {
                let same = u64::from_le_bytes(*slot) == wanted;
                found = core::hint::select_unpredictable(same, index, found);
            }
            if found < SLOTS {
                return Some(bucket + 8 * found);
            }
            let last = u64::from_le_bytes(slots[SLOTS - 1]);
            if last & CHAIN == 0 {
                return None;
            }
            bucket = (last & OFFSET) as usize;
        }
    }

    /// Points `slot` at the entry at `entry`.
    #[inline(always)]
    pub(crate) fn redirect(mem: &mut [u8], slot: usize, entry: usize) {
        let old = load_u64(mem, slot);
        order();
        store_u64(mem, slot, old & !OFFSET | entry as u64);
    }

    /// Adds an entry. Needs an overflow bucket at hand if the chain is full ([`Self::spare`]); returns whether it had one.
    pub(crate) fn insert(&mut self, mem: &mut [u8], hash: u64, entry: usize) -> bool {
        let new = tag(hash) << 48 | entry as u64;
        let mut bucket = self.bucket(hash);
        loop {
            if let Some(free) = (0..SLOTS).find(|index| load_u64(mem, bucket + 8 * index) == 0) {
                order();
                store_u64(mem, bucket + 8 * free, new);
                return true;
            }
            let last = load_u64(mem, bucket + LAST);
            if last & CHAIN != 0 {
                bucket = (last & OFFSET) as usize;
                continue;
            }
            let Some(overflow) = self.take_bucket(mem) else {
                return false;
            };
            store_u64(mem, overflow, last);
            store_u64(mem, overflow + 8, new);
            order();
            store_u64(mem, bucket + LAST, CHAIN | overflow as u64);
            return true;
        }
    }

    /// Empties the slot at `slot` in the chain of `hash`. Empty overflow buckets at the chain's end are recycled.
    pub(crate) fn remove(&mut self, mem: &mut [u8], hash: u64, slot: usize) {
        order();
        store_u64(mem, slot, 0);
        let first = self.bucket(hash);
        if load_u64(mem, first + LAST) & CHAIN != 0 {
            self.shorten(mem, first);
        }
    }

    /// Recycles empty overflow buckets at the end of the chain from `first`.
    #[cold]
    fn shorten(&mut self, mem: &mut [u8], first: usize) {
        loop {
            let (mut previous, mut bucket) = (None, first);
            loop {
                let last = load_u64(mem, bucket + LAST);
                if last & CHAIN == 0 {
                    break;
                }
                previous = Some(bucket);
                bucket = (last & OFFSET) as usize;
            }
            let empty = (0..SLOTS).all(|index| load_u64(mem, bucket + 8 * index) == 0);
            let (Some(previous), true) = (previous, empty) else {
                return;
            };
            store_u64(mem, previous + LAST, 0);
            order();
            self.recycle(mem, bucket);
        }
    }

    /// Calls `visit` with each entry in the chain of `hash`. Returns the number of overflow buckets in the chain.
    pub(crate) fn for_chain(&self, mem: &[u8], hash: u64, mut visit: impl FnMut(Slot)) -> usize {
        let (mut bucket, mut overflow) = (self.bucket(hash), 0);
        loop {
            for index in 0..SLOTS {
                let slot = load_u64(mem, bucket + 8 * index);
                if slot & CHAIN == 0 && slot != 0 {
                    visit(Slot {
                        at: bucket + 8 * index,
                        entry: (slot & OFFSET) as usize,
                    });
                }
            }
            let last = load_u64(mem, bucket + LAST);
            if last & CHAIN == 0 {
                return overflow;
            }
            bucket = (last & OFFSET) as usize;
            overflow += 1;
        }
    }

    /// Overflow buckets that [`Self::insert`] can still take.
    #[inline(always)]
    pub(crate) fn spare(&self) -> usize {
        self.recycled_count + (self.fresh_end - self.fresh) / BUCKET_BYTES
    }

    /// Overflow buckets in chains.
    pub(crate) fn overflow_used(&self) -> usize {
        self.used
    }

    /// Adds `bytes` of region from `start` to the pool of overflow buckets.
    pub(crate) fn grow(&mut self, mem: &mut [u8], start: usize, bytes: usize) {
        while self.fresh + BUCKET_BYTES <= self.fresh_end {
            let bucket = self.fresh;
            self.fresh += BUCKET_BYTES;
            self.link(mem, bucket);
        }
        self.fresh = start;
        self.fresh_end = start + bytes;
    }

    fn take_bucket(&mut self, mem: &mut [u8]) -> Option<usize> {
        let bucket = if self.recycled != 0 {
            let bucket = self.recycled;
            self.recycled = load_u64(mem, bucket) as usize;
            self.recycled_count -= 1;
            bucket
        } else if self.fresh + BUCKET_BYTES <= self.fresh_end {
            self.fresh += BUCKET_BYTES;
            self.fresh - BUCKET_BYTES
        } else {
            return None;
        };
        mem[bucket..bucket + BUCKET_BYTES].fill(0);
        self.used += 1;
        Some(bucket)
    }

    fn recycle(&mut self, mem: &mut [u8], bucket: usize) {
        self.used -= 1;
        self.link(mem, bucket);
    }

    fn link(&mut self, mem: &mut [u8], bucket: usize) {
        store_u64(mem, bucket, self.recycled as u64);
        self.recycled = bucket;
        self.recycled_count += 1;
    }

    /// Which counter `hash` falls to: the counters split the hashes of a bucket evenly.
    #[inline(always)]
    pub(crate) fn counter_index(&self, hash: u64) -> u64 {
        ((u128::from(hash) * u128::from(COUNTERS as u64 * self.buckets)) >> 64) as u64
    }

    /// The sum of all counters.
    pub(crate) fn dead_total(&self, mem: &[u8]) -> u64 {
        (0..COUNTERS * self.buckets as usize)
            .map(|index| u64::from(load_u32(mem, self.counters + 4 * index)))
            .sum()
    }

    #[inline(always)]
    fn counter(&self, hash: u64) -> usize {
        self.counters + 4 * self.counter_index(hash) as usize
    }

    /// Notes that an object of `hash` died and still lies in the log.
    #[inline(always)]
    pub(crate) fn count_dead(&self, mem: &mut [u8], hash: u64) {
        let at = self.counter(hash);
        let count = load_u32(mem, at);
        store_u32(mem, at, count.saturating_add(1));
    }

    /// Notes that a dead object of `hash` leaves the log.
    pub(crate) fn uncount_dead(&self, mem: &mut [u8], hash: u64) {
        let at = self.counter(hash);
        let count = load_u32(mem, at);
        // A counter that ever reached the top stays there: its tombstones are kept, which is always safe.
        if count != u32::MAX {
            store_u32(mem, at, count.saturating_sub(1));
        }
    }

    /// Offset of what a live object of `hash` is looked up in, or a dead one counted in: to be fetched ahead.
    #[inline(always)]
    pub(crate) fn place(&self, hash: u64, live: bool) -> usize {
        if live {
            self.bucket(hash)
        } else {
            self.counter(hash)
        }
    }

    /// Dead objects in the log whose keys share the counter of `hash`: at least the dead versions of its own key.
    pub(crate) fn dead_count(&self, mem: &[u8], hash: u64) -> u32 {
        load_u32(mem, self.counter(hash))
    }
}
