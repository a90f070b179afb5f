//! Where things lie in the region.
//!
//! | from 0 | what |
//! | --- | --- |
//! | 0..128 | superblock: what a reader needs to find the rest |
//! | 128.. | hash table: `buckets` lines of 64 bytes ([`super::onesided`] reads them) |
//! | .. | four u32 counters per bucket: dead objects of a quarter of its hashes still in the log |
//! | .. | first pool of overflow buckets |
//! | `log`.. | `segments` segments of 2^`segment_shift` bytes |
//!
//! The superblock, little-endian:
//!
//! | bytes | |
//! | --- | --- |
//! | 0..8 | magic |
//! | 8..12 | format version; it also stands for the formats of buckets and entries |
//! | 12..16 | `segment_shift` |
//! | 16..24 | `buckets` |
//! | 24..32 | `log` |
//! | 32..40 | `segments` |
//! | 40..48 | seed of the key hash |
//! | 48..56 | bytes of the region |
//! | 56..64 | incarnation: differs between two stores in one place, as the caller chose it |
//! | 64..72 | quarantine, ns: how long memory that was freed keeps its bytes at least |
//! | 72..76 | key hash: 1 is [`super::hash64`] with [`super::table_seed`] |
//! | 76..80 | CRC-32C of bytes 0..76 |

use super::entry::entry_bytes;
use super::index::{BUCKET_BYTES, COUNTER_BYTES};
use super::mem::{load_u32, load_u64, store_u32, store_u64};
use super::segment::SEGMENT_HEADER_BYTES;
use super::{Config, StoreError};
use crate::crc::crc32c;
use crate::limits::{
    MAX_AUTO_SEGMENT_BYTES, MAX_REGION_BYTES, MAX_SEGMENT_BYTES, MIN_AUTO_SEGMENT_BYTES,
    MIN_SEGMENT_BYTES, MIN_SEGMENTS, PROLOGUE_FRACTION, SEGMENTS_PER_REGION, TABLE_FRACTION,
};

/// Bytes of the superblock.
pub const SUPERBLOCK_BYTES: usize = 128;

/// The key hash of this format.
const HASH_FUNCTION: u32 = 1;

const SUPERBLOCK_CRC: usize = 76;

/// First eight bytes of a region that holds a store ("hyvstore").
pub const SUPERBLOCK_MAGIC: u64 = u64::from_le_bytes(*b"hyvstore");

/// Version of the region's format.
pub const FORMAT_VERSION: u32 = 4;

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
        if prologue_bytes(segments) > segment / PROLOGUE_FRACTION {
            return Err(StoreError::SegmentsTooMany {
                segments,
                bytes: segment,
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

    /// Bytes at the start of each segment: its header, and the digest.
    #[must_use]
    pub const fn prologue_bytes(&self) -> usize {
        prologue_bytes(self.segments)
    }

    /// Bytes of a segment that entries can have.
    #[must_use]
    pub const fn payload_bytes(&self) -> usize {
        self.segment_bytes() - self.prologue_bytes()
    }

    /// Writes the superblock.
    pub(crate) fn emit(&self, config: &Config, mem: &mut [u8]) {
        store_u32(mem, 8, FORMAT_VERSION);
        store_u32(mem, 12, self.segment_shift);
        store_u64(mem, 16, self.buckets as u64);
        store_u64(mem, 24, self.log as u64);
        store_u64(mem, 32, self.segments as u64);
        store_u64(mem, 40, config.seed);
        store_u64(mem, 48, self.region_bytes as u64);
        store_u64(mem, 56, config.incarnation);
        store_u64(mem, 64, config.quarantine_ns);
        store_u32(mem, 72, HASH_FUNCTION);
        store_u64(mem, 0, SUPERBLOCK_MAGIC);
        let crc = crc32c(&mem[..SUPERBLOCK_CRC]);
        store_u32(mem, SUPERBLOCK_CRC, crc);
    }

    /// Reads a superblock ([`SUPERBLOCK_BYTES`]): where things lie, and how the store was set up. Errors: not a store, another
    /// format, or sizes that contradict each other.
    pub fn parse(mem: &[u8]) -> Result<(Self, Config), StoreError> {
        if mem.len() < SUPERBLOCK_BYTES || load_u64(mem, 0) != SUPERBLOCK_MAGIC {
            return Err(StoreError::NotAStore);
        }
        let version = load_u32(mem, 8);
        if version != FORMAT_VERSION {
            return Err(StoreError::Format { version });
        }
        if load_u32(mem, SUPERBLOCK_CRC) != crc32c(&mem[..SUPERBLOCK_CRC])
            || load_u32(mem, 72) != HASH_FUNCTION
        {
            return Err(StoreError::NotAStore);
        }
        let shift = load_u32(mem, 12);
        let smallest = MIN_SEGMENT_BYTES.trailing_zeros();
        if !(smallest..=MAX_SEGMENT_BYTES.trailing_zeros()).contains(&shift) {
            return Err(StoreError::NotAStore);
        }
        let layout = Self::plan(load_u64(mem, 48) as usize, Some(1 << shift))?;
        let same = load_u64(mem, 16) == layout.buckets as u64
            && load_u64(mem, 24) == layout.log as u64
            && load_u64(mem, 32) == layout.segments as u64;
        let config = Config {
            seed: load_u64(mem, 40),
            segment_bytes: Some(layout.segment_bytes()),
            quarantine_ns: load_u64(mem, 64),
            clean_for_write: None,
            incarnation: load_u64(mem, 56),
        };
        if same {
            Ok((layout, config))
        } else {
            Err(StoreError::NotAStore)
        }
    }
}

/// Bytes of header and digest in a store of so many segments.
const fn prologue_bytes(segments: usize) -> usize {
    SEGMENT_HEADER_BYTES + entry_bytes(0, 8 * segments)
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
        let config = Config {
            seed: 77,
            segment_bytes: Some(16 << 10),
            quarantine_ns: 5,
            clean_for_write: None,
            incarnation: 6,
        };
        layout.emit(&config, &mut mem);
        let superblock = &mut mem[..SUPERBLOCK_BYTES];
        assert_eq!(Layout::parse(superblock), Ok((layout, config)));
        assert_eq!(Layout::parse(&superblock[..64]), Err(StoreError::NotAStore));
        for byte in 0..SUPERBLOCK_CRC + 4 {
            superblock[byte] ^= 4;
            assert!(Layout::parse(superblock).is_err(), "byte {byte}");
            superblock[byte] ^= 4;
        }
        superblock[8] = 9;
        assert_eq!(
            Layout::parse(superblock),
            Err(StoreError::Format { version: 9 })
        );
    }
}
