//! Rebuilding a store from the log of another.

use super::entry::{Entry, EntryKind};
use super::layout::Layout;
use super::mem::load_u64;
use super::segment::SEGMENT_HEADER_BYTES;
use super::{Store, StoreError};
use alloc::vec::Vec;

/// A walk over the entries of every segment that is part of a log.
struct Walk<'a> {
    mem: &'a [u8],
    layout: Layout,
    segment: u32,
    /// Offset of the next entry in the region, and end of the current segment; none between segments.
    at: Option<(usize, usize)>,
    generation: u64,
}

impl<'a> Walk<'a> {
    fn new(mem: &'a [u8], layout: Layout) -> Self {
        Self {
            mem,
            layout,
            segment: 0,
            at: None,
            generation: 0,
        }
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<(usize, Entry<'a>), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((at, end)) = self.at else {
                if self.segment as usize >= self.layout.segments {
                    return None;
                }
                let start = self.layout.segment_offset(self.segment);
                self.segment += 1;
                self.generation = load_u64(self.mem, start) >> 1;
                let header = Entry::parse(&self.mem[start..start + SEGMENT_HEADER_BYTES]);
                // A segment without a header is free, retired, or holds overflow buckets.
                if let Ok(header) = header
                    && header.header().kind == EntryKind::SegmentHeader
                    && header.value().len() == 16
                    && self.generation != 0
                    && load_u64(header.value(), 0) == self.generation
                    && header.verify().is_ok()
                {
                    self.at = Some((start, start + self.layout.segment_bytes()));
                }
                continue;
            };
            if at + 8 > end || load_u64(self.mem, at) >> 1 != self.generation {
                self.at = None;
                continue;
            }
            let entry = match Entry::parse(&self.mem[at..end]) {
                Ok(entry) => entry,
                Err(cause) => {
                    self.at = None;
                    return Some(Err(StoreError::Damaged { offset: at, cause }));
                }
            };
            // Space that was handed out has no checksum yet.
            if entry.header().kind != EntryKind::Pending
                && let Err(cause) = entry.verify()
            {
                self.at = None;
                return Some(Err(StoreError::Damaged { offset: at, cause }));
            }
            self.at = Some((at + entry.header().total_bytes(), end));
            return Some(Ok((at, entry)));
        }
    }
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Fills this empty store from the log in `source`, a region that held a store. Of each key the newest version is kept,
    /// unless a tombstone hides it; live bits and the hash table of `source` are not looked at. Returns the objects now held.
    ///
    /// Errors: this store is not empty; `source` is no store, or its log is damaged; this store is too small.
    pub fn replay(&mut self, source: &[u8]) -> Result<u64, StoreError> {
        if !self.is_empty() || self.open_reservations > 0 {
            return Err(StoreError::NotEmpty {
                objects: self.objects,
            });
        }
        let (layout, _) = Layout::parse(source)?;
        let mut tombstones: Vec<(u64, usize, u64)> = Vec::new();
        let mut safe_version = self.safe_version;
        for item in Walk::new(source, layout) {
            let (at, entry) = item?;
            let version = entry.header().version;
            match entry.header().kind {
                EntryKind::Tombstone => {
                    tombstones.push((self.hash(entry.key()), at, version));
                    safe_version = safe_version.max(version.saturating_add(1));
                }
                EntryKind::Object => safe_version = safe_version.max(version.saturating_add(1)),
                EntryKind::SegmentHeader | EntryKind::SafeVersion => {
                    safe_version = safe_version.max(version);
                }
                EntryKind::Pending
                | EntryKind::Abandoned
                | EntryKind::ResultRecord
                | EntryKind::Digest => {}
            }
        }
        self.safe_version = safe_version;
        tombstones.sort_unstable();
        let hidden = |hash: u64, key: &[u8], version: u64| {
            let first = tombstones.partition_point(|tombstone| tombstone.0 < hash);
            tombstones[first..]
                .iter()
                .take_while(|tombstone| tombstone.0 == hash)
                .any(|&(_, at, limit)| limit >= version && super::entry::key_at(source, at) == key)
        };
        for item in Walk::new(source, layout) {
            let (_, entry) = item?;
            if entry.header().kind != EntryKind::Object {
                continue;
            }
            let (key, version) = (entry.key(), entry.header().version);
            let hash = self.hash(key);
            let newer = self
                .get_hashed(hash, key)
                .is_none_or(|found| found.version < version);
            if newer && !hidden(hash, key, version) {
                self.put_versioned(hash, key, entry.value(), Some(version))?;
            }
        }
        // The head was opened before the safe version was known.
        let head = self.log.head;
        self.log
            .write_header(self.region.as_mut(), head, safe_version);
        Ok(self.objects)
    }

    /// Every entry of the log, in no particular order: offset and entry.
    pub(crate) fn walk(
        &self,
    ) -> impl Iterator<Item = Result<(usize, Entry<'_>), StoreError>> + use<'_, R> {
        Walk::new(self.region.as_ref(), *self.layout())
    }
}
