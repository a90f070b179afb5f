//! Where things lie in the region.
//!
//! | from 0 | what |
//! | --- | --- |
//! | 0..64 | superblock: what a reader needs to find the rest |
//! | 64.. | hash table: `buckets` lines of 64 bytes |
//! | .. | four u32 counters per bucket: dead objects of a quarter of its hashes still in the log |
//! | .. | first pool of overflow buckets |
//! | `log`.. | `segments` segments of 2^`segment_shift` bytes |

use super::StoreError;
use super::mem::{load_u32, load_u64, store_u32, store_u64};
use super::table::{BUCKET_BYTES, COUNTER_BYTES};
use crate::limits::{
    MAX_AUTO_SEGMENT_BYTES, MAX_REGION_BYTES, MAX_SEGMENT_BYTES, MIN_AUTO_SEGMENT_BYTES,
    MIN_SEGMENT_BYTES, MIN_SEGMENTS, SEGMENTS_PER_REGION, TABLE_FRACTION,
};

/// Bytes of the superblock.
pub const SUPERBLOCK_BYTES: usize = 64;

/// First eight bytes of a region that holds a store ("hyvstore").
pub const SUPERBLOCK_MAGIC: u64 = u64::from_le_bytes(*b"hyvstore");

/// Version of the region's format.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes of the front per bucket: the bucket, its counters, and an eighth of an overflow bucket.
const FRONT_BYTES_PER_BUCKET: usize = BUCKET_BYTES + COUNTER_BYTES + BUCKET_BYTES / 8;

/// Offsets and sizes, all in bytes relative to the region's start unless they count something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of the region.
    pub region_bytes: usize,
    /// Buckets of the hash table proper.
    pub buckets: usize,
    /// Offset of the first counter.
    pub counters: usize,
    /// Offset of the first overflow bucket of the first pool, which ends before `log`.
    pub overflow: usize,
    /// Offset of segment 0.
    pub log: usize,
    /// Number of segments.
    pub segments: usize,
    /// Logarithm of a segment's size.
    pub segment_shift: u32,
}

impl Layout {
    /// Divides a region of `region_bytes`. Errors: too small or too large for a store, or a segment size that is no power of
    /// two within the limits.
    pub(crate) fn plan(
        region_bytes: usize,
        segment_bytes: Option<usize>,
    ) -> Result<Self, StoreError> {
        let segment = match segment_bytes {
            Some(bytes)
                if bytes.is_power_of_two()
                    && (MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&bytes) =>
            {
                bytes
            }
            Some(bytes) => return Err(StoreError::SegmentSize { bytes }),
            None => (region_bytes / SEGMENTS_PER_REGION)
                .clamp(MIN_AUTO_SEGMENT_BYTES, MAX_AUTO_SEGMENT_BYTES)
                .next_power_of_two(),
        };
        if region_bytes as u64 > MAX_REGION_BYTES {
            return Err(StoreError::RegionTooLarge {
                bytes: region_bytes,
            });
        }
        let front_least = (region_bytes / TABLE_FRACTION).max(SUPERBLOCK_BYTES + 1024);
        let segments = region_bytes.saturating_sub(front_least) / segment;
        if segments < MIN_SEGMENTS {
            let needed = (MIN_SEGMENTS * segment + 2048) * TABLE_FRACTION / (TABLE_FRACTION - 1);
            return Err(StoreError::RegionTooSmall {
                bytes: region_bytes,
                needed: needed.next_multiple_of(4096),
            });
        }
        // What is left of the region after whole segments goes to the table.
        let log = (region_bytes - segments * segment) & !(BUCKET_BYTES - 1);
        let buckets = (log - SUPERBLOCK_BYTES - 2 * BUCKET_BYTES) / FRONT_BYTES_PER_BUCKET;
        let counters = SUPERBLOCK_BYTES + buckets * BUCKET_BYTES;
        Ok(Self {
            region_bytes,
            buckets,
            counters,
            overflow: (counters + COUNTER_BYTES * buckets).next_multiple_of(BUCKET_BYTES),
            log,
            segments,
            segment_shift: segment.trailing_zeros(),
        })
    }

    /// Bytes of one segment.
    #[must_use]
    pub const fn segment_bytes(&self) -> usize {
        1 << self.segment_shift
    }

    /// Offset of segment `index`.
    #[must_use]
    pub const fn segment_offset(&self, index: u32) -> usize {
        self.log + ((index as usize) << self.segment_shift)
    }

    /// Writes the superblock: magic, format version, segment shift, buckets, log offset, segments, seed.
    pub(crate) fn emit(&self, seed: u64, mem: &mut [u8]) {
        store_u32(mem, 8, FORMAT_VERSION);
        store_u32(mem, 12, self.segment_shift);
        store_u64(mem, 16, self.buckets as u64);
        store_u64(mem, 24, self.log as u64);
        store_u64(mem, 32, self.segments as u64);
        store_u64(mem, 40, seed);
        store_u64(mem, 48, self.region_bytes as u64);
        store_u64(mem, 0, SUPERBLOCK_MAGIC);
    }

    /// Reads a superblock and checks it against the region's size. Errors: not a store, another format, or sizes that do
    /// not fit the region.
    pub fn parse(mem: &[u8]) -> Result<(Self, u64), StoreError> {
        if mem.len() < SUPERBLOCK_BYTES || load_u64(mem, 0) != SUPERBLOCK_MAGIC {
            return Err(StoreError::NotAStore);
        }
        let version = load_u32(mem, 8);
        if version != FORMAT_VERSION {
            return Err(StoreError::Format { version });
        }
        let shift = load_u32(mem, 12);
        let region_bytes = load_u64(mem, 48) as usize;
        if !(MIN_SEGMENT_BYTES.trailing_zeros()..=MAX_SEGMENT_BYTES.trailing_zeros())
            .contains(&shift)
            || region_bytes > mem.len()
        {
            return Err(StoreError::NotAStore);
        }
        let layout = Self::plan(region_bytes, Some(1 << shift))?;
        let same = load_u64(mem, 16) == layout.buckets as u64
            && load_u64(mem, 24) == layout.log as u64
            && load_u64(mem, 32) == layout.segments as u64;
        if same {
            Ok((layout, load_u64(mem, 40)))
        } else {
            Err(StoreError::NotAStore)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_from_16_mib_to_64_gib_divide_without_overlap() {
        for mib in [16, 17, 24, 40, 64, 100, 128, 500, 1024, 4096, 65_536] {
            let bytes = (mib << 20) + 12_345;
            let layout = Layout::plan(bytes, None).unwrap();
            assert!(layout.overflow >= layout.counters + COUNTER_BYTES * layout.buckets);
            assert!(layout.overflow + BUCKET_BYTES <= layout.log);
            assert!(layout.log + layout.segments * layout.segment_bytes() <= bytes);
            assert!(
                layout.segments * layout.segment_bytes() * 100 >= bytes * 80,
                "{mib} MiB"
            );
            assert!((2 << 20..=8 << 20).contains(&layout.segment_bytes()));
        }
    }

    #[test]
    fn what_cannot_hold_a_store_is_refused_with_the_size_that_can() {
        let Err(StoreError::RegionTooSmall { needed, .. }) = Layout::plan(1 << 20, None) else {
            panic!("1 MiB accepted");
        };
        assert!(Layout::plan(needed, None).is_ok());
        assert!(matches!(
            Layout::plan(1 << 30, Some(3 << 20)),
            Err(StoreError::SegmentSize { bytes: 3_145_728 })
        ));
    }

    #[test]
    fn superblock_round_trip_and_refusals() {
        let mut mem = alloc::vec![0; 1 << 20];
        assert_eq!(Layout::parse(&mem), Err(StoreError::NotAStore));
        let layout = Layout::plan(mem.len(), Some(16 << 10)).unwrap();
        layout.emit(77, &mut mem);
        assert_eq!(Layout::parse(&mem), Ok((layout, 77)));
        assert_eq!(Layout::parse(&mem[..1 << 19]), Err(StoreError::NotAStore));
        mem[8] = 9;
        assert_eq!(Layout::parse(&mem), Err(StoreError::Format { version: 9 }));
    }
}
