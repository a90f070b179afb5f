//! Rebuilding a store from the log of another.

use super::entry::{Entry, EntryError, EntryKind, FLAG_RETIRED, key_at, table_at};
use super::layout::Layout;
use super::mem::load_u64;
use super::segment::SEGMENT_HEADER_BYTES;
use super::tables::DIRECTORY;
use super::{Found, NEVER, Outcome, Store, StoreError, Write};
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

/// What the first entry of a segment says.
struct SegmentHeader {
    generation: u64,
    retired: bool,
}

/// The header of segment `index`; none if it was never used. Errors: it is damaged.
fn segment_header(
    mem: &[u8],
    layout: &Layout,
    index: u32,
) -> Result<Option<SegmentHeader>, StoreError> {
    let start = layout.segment_offset(index);
    let bytes = &mem[start..start + SEGMENT_HEADER_BYTES];
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let damaged = |cause| StoreError::Damaged {
        offset: start,
        cause,
    };
    let entry = Entry::parse(bytes).map_err(damaged)?;
    entry.verify().map_err(damaged)?;
    let header = entry.header();
    if header.kind != EntryKind::SegmentHeader || entry.value().len() != 16 {
        return Err(damaged(EntryError::UnknownKind(header.kind as u8)));
    }
    let expected = load_u64(entry.value(), 0);
    if header.generation() != expected {
        return Err(damaged(EntryError::Generation {
            found: header.generation(),
            expected,
        }));
    }
    Ok(Some(SegmentHeader {
        generation: expected,
        retired: header.flags & FLAG_RETIRED != 0,
    }))
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
                let header = segment_header(self.mem, &self.layout, self.segment);
                self.segment += 1;
                let header = match header {
                    Ok(header) => header,
                    Err(error) => return Some(Err(error)),
                };
                // A segment without a header is free; a retired one was cleaned, or holds overflow buckets.
                if let Some(header) = header.filter(|header| !header.retired) {
                    self.generation = header.generation;
                    self.at = Some((start, start + self.layout.segment_bytes()));
                }
                continue;
            };
            let state = match self.mem.get(at..end).filter(|rest| rest.len() >= 8) {
                Some(rest) => load_u64(rest, 0),
                None => 0,
            };
            // A zero word follows the last entry, if anything does.
            if state == 0 {
                self.at = None;
                continue;
            }
            if state >> 1 != self.generation {
                self.at = None;
                return Some(Err(StoreError::Damaged {
                    offset: at,
                    cause: EntryError::Generation {
                        found: state >> 1,
                        expected: self.generation,
                    },
                }));
            }
            let entry = match Entry::parse(&self.mem[at..end]) {
                Ok(entry) => entry,
                Err(cause) => {
                    self.at = None;
                    return Some(Err(StoreError::Damaged { offset: at, cause }));
                }
            };
            if let Err(cause) = entry.verify() {
                self.at = None;
                return Some(Err(StoreError::Damaged { offset: at, cause }));
            }
            self.at = Some((at + entry.header().total_bytes(), end));
            return Some(Ok((at, entry)));
        }
    }
}

/// Checks that every segment is there that the newest digest lists. Errors: one is missing, or there is no digest.
fn check_digest(mem: &[u8], layout: &Layout) -> Result<(), StoreError> {
    let headers: Vec<Option<SegmentHeader>> = (0..layout.segments as u32)
        .map(|index| segment_header(mem, layout, index))
        .collect::<Result<_, _>>()?;
    let newest = headers
        .iter()
        .enumerate()
        .filter_map(|(index, header)| Some((index, header.as_ref()?)))
        .filter(|(_, header)| !header.retired)
        .max_by_key(|(_, header)| header.generation);
    let Some((index, head)) = newest else {
        return Err(StoreError::Incomplete {
            segment: 0,
            generation: 0,
        });
    };
    let at = layout.segment_offset(index as u32) + SEGMENT_HEADER_BYTES;
    let end = layout.segment_offset(index as u32) + layout.prologue_bytes();
    let damaged = |cause| StoreError::Damaged { offset: at, cause };
    let digest = Entry::parse(&mem[at..end]).map_err(damaged)?;
    digest.verify().map_err(damaged)?;
    if digest.header().kind != EntryKind::Digest || digest.value().len() != 8 * layout.segments {
        return Err(StoreError::Incomplete {
            segment: index,
            generation: head.generation,
        });
    }
    for (segment, header) in headers.iter().enumerate() {
        let generation = load_u64(digest.value(), 8 * segment);
        // One that was cleaned since then says so, or holds a later segment that was.
        let known = header.as_ref().map_or(0, |header| header.generation);
        if known < generation {
            return Err(StoreError::Incomplete {
                segment,
                generation,
            });
        }
    }
    Ok(())
}

/// What hides objects: for each hash the offset of a key and the highest version that is hidden.
struct Hidden(Vec<(u64, usize, u64)>);

impl Hidden {
    fn covers(&self, source: &[u8], hash: u64, table: u32, key: &[u8], version: u64) -> bool {
        let first = self.0.partition_point(|hidden| hidden.0 < hash);
        self.0[first..]
            .iter()
            .take_while(|hidden| hidden.0 == hash)
            .any(|&(_, at, limit)| {
                limit >= version && table_at(source, at) == table && key_at(source, at) == key
            })
    }
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Fills this empty store from the log in `source`, a region that held a store. Of each key the newest version is kept,
    /// unless a tombstone hides it, it has expired at `now`, or its table was dropped; live bits and the hash table of
    /// `source` are not looked at. Tables, leases and the results of requests come with it. Returns the objects now held. Nobody
    /// may READ this store's region before that.
    ///
    /// Errors: this store is not empty; `source` is no store, or its log is damaged or incomplete; this store is too small.
    pub fn replay(&mut self, source: &[u8], now: u64) -> Result<u64, StoreError> {
        if self.objects > 0 || self.open_reservations > 0 || self.leases.len() > 0 {
            return Err(StoreError::NotEmpty {
                objects: self.objects,
            });
        }
        let (layout, _) = Layout::parse(source)?;
        if layout.region_bytes > source.len() {
            return Err(StoreError::NotAStore);
        }
        check_digest(source, &layout)?;
        // Nobody is kept waiting, and nobody reads.
        let budget = core::mem::replace(&mut self.cleaner.budget_for_write, usize::MAX);
        let quarantine_ns = self.log.set_quarantine(0);
        let result = self.replay_log(source, layout, now);
        self.cleaner.budget_for_write = budget;
        self.log.set_quarantine(quarantine_ns);
        result
    }

    fn replay_log(&mut self, source: &[u8], layout: Layout, now: u64) -> Result<u64, StoreError> {
        let walk = || Walk::new(source, layout);
        let hidden = self.survey(source, walk(), now)?;
        let directory = |entry: &Entry<'_>| entry.header().table == DIRECTORY;
        self.replay_objects(source, walk(), &hidden, directory, now)?;
        self.restore_directory();
        self.replay_objects(source, walk(), &hidden, |entry| !directory(entry), now)?;
        for item in walk() {
            let (_, entry) = item?;
            if entry.header().kind == EntryKind::ResultRecord {
                self.restore_acknowledged(&entry);
            }
        }
        for item in walk() {
            let (_, entry) = item?;
            if entry.header().kind == EntryKind::ResultRecord {
                self.restore_record(&entry, now)?;
            }
        }
        // The head was opened before the safe version was known.
        self.log_safe_version();
        Ok(self.len())
    }

    /// Finds what hides objects, and how far versions have come.
    fn survey(&mut self, source: &[u8], walk: Walk<'_>, now: u64) -> Result<Hidden, StoreError> {
        let mut hidden = Vec::new();
        for item in walk {
            let (at, entry) = item?;
            let header = entry.header();
            let above = header.version.saturating_add(1);
            match header.kind {
                EntryKind::Tombstone => {
                    hidden.push((self.hash(header.table, entry.key()), at, header.version));
                    self.safe_version = self.safe_version.max(above);
                }
                EntryKind::Object => {
                    // One that has expired hides what came before it.
                    if entry.expires() != NEVER && entry.expires() <= now {
                        hidden.push((self.hash(header.table, entry.key()), at, header.version));
                    }
                    self.safe_version = self.safe_version.max(above);
                }
                EntryKind::SegmentHeader | EntryKind::SafeVersion => {
                    self.safe_version = self.safe_version.max(header.version);
                }
                EntryKind::Pending
                | EntryKind::Abandoned
                | EntryKind::ResultRecord
                | EntryKind::Digest => {}
            }
        }
        hidden.sort_unstable();
        debug_assert!(hidden.iter().all(|hidden| hidden.1 < source.len()));
        Ok(Hidden(hidden))
    }

    fn replay_objects(
        &mut self,
        source: &[u8],
        walk: Walk<'_>,
        hidden: &Hidden,
        wanted: impl Fn(&Entry<'_>) -> bool,
        now: u64,
    ) -> Result<(), StoreError> {
        for item in walk {
            let (_, entry) = item?;
            let (header, key) = (entry.header(), entry.key());
            if header.kind != EntryKind::Object || !wanted(&entry) {
                continue;
            }
            let Some(place) = self.tables.place(header.table) else {
                continue;
            };
            let hash = self.hash(header.table, key);
            let newer = self.lookup(hash, header.table, key).is_none_or(|slot| {
                super::entry::version_at(self.region.as_ref(), slot.entry) < header.version
            });
            if !newer || hidden.covers(source, hash, header.table, key, header.version) {
                continue;
            }
            let write = Write {
                expires: entry.expires(),
                ..Write::new(header.table, key, entry.value())
            };
            let outcome = |version| Outcome::Written { version };
            self.append_object(
                place,
                hash,
                &write,
                Some(header.version),
                None,
                outcome,
                now,
            )?;
        }
        Ok(())
    }

    /// Takes in tables and leases, of which the newest state is known by now.
    fn restore_directory(&mut self) {
        let mem = self.region.as_ref();
        let (mut found, mut cursor) = (Vec::new(), Some(0));
        while let Some(hash) = cursor {
            self.index.for_chain(mem, hash, |slot| {
                let object = Found::at(mem, slot.entry);
                let (key, value) = (&mem[object.key()], &mem[object.value()]);
                found.push((key.to_vec(), value.to_vec(), object.expires));
            });
            cursor = self.index.next_bucket(hash);
        }
        for (key, value, expires) in found {
            self.tables.restore(&key, &value);
            self.restore_lease(&key, expires);
        }
    }

    /// Every entry of the log, in no particular order: offset and entry.
    pub(crate) fn walk(
        &self,
    ) -> impl Iterator<Item = Result<(usize, Entry<'_>), StoreError>> + use<'_, R> {
        Walk::new(self.region.as_ref(), *self.layout())
    }

    /// Checks the newest digest. Errors: a segment is missing that it lists.
    pub(crate) fn check_own_digest(&self) -> Result<(), StoreError> {
        check_digest(self.region.as_ref(), self.layout())
    }
}
