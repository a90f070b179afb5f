//! Tables: created, dropped and listed by name, known to objects by an id that is never given out twice.
//!
//! The directory is in the log: each table is an object of a reserved table ([`DIRECTORY`]) with the table's name as key and its
//! id as value, so a replay finds the tables as it finds everything else. Beside them lies the next id.
//!
//! A drop removes that one object, and with it the table is gone: for every call here at once, and for a replay, which
//! ignores objects of tables that do not exist. The objects themselves are taken out of the hash table by the cleaner, in slices;
//! until then they count as live. A one-sided reader looks at nothing but an object's state word, so whoever serves such readers
//! acknowledges a drop when [`Store::is_dropping`] says that all of them are cleared.

use super::cleaner::BUCKET_COST_BYTES;
use super::entry::{key_at, table_at};
use super::ids::IdIndex;
use super::index::Slot;
use super::{NEVER, RejectRules, Store, StoreError};
use crate::limits::{MAX_SYNC_DROP_BUCKETS, MAX_TABLE_NAME_BYTES, MAX_TABLES};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// The table that always exists.
pub const DEFAULT_TABLE: u32 = 0;

/// The reserved table of tables and leases.
pub(crate) const DIRECTORY: u32 = u32::MAX;

/// Name of the default table.
pub const DEFAULT_TABLE_NAME: &str = "default";

/// Key of the next id in the directory. No name begins with a zero.
const NEXT_ID: &[u8] = b"\0next";

/// Place of the directory's own record.
pub(crate) const DIRECTORY_PLACE: usize = 0;

/// Place of the default table's, which stays as no table before it is ever dropped.
const DEFAULT_PLACE: usize = 1;

/// What the store knows of a table.
#[derive(Debug)]
pub(crate) struct Record {
    id: u32,
    name: Box<str>,
    /// False: dropped, and some objects are not yet taken out.
    exists: bool,
    /// Of no table: for the next one that is created. Records are never moved, so that a place stays good while room is made.
    vacant: bool,
    pub(crate) objects: u64,
    pub(crate) live_bytes: u64,
}

/// A table, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableStats<'a> {
    /// Id.
    pub id: u32,
    /// Name.
    pub name: &'a str,
    /// Objects, expired ones included until the cleaner has seen them.
    pub objects: u64,
    /// Bytes of their entries: header, key, value, expiry, padding.
    pub live_bytes: u64,
}

#[derive(Debug)]
pub(crate) struct Tables {
    records: Vec<Record>,
    by_id: IdIndex,
    next_id: u32,
    /// Tables that are dropped and still have objects.
    dropped: usize,
    /// One of them has lost its last object.
    emptied: bool,
    /// Hash up to which the search for their objects has come.
    cursor: u64,
}

impl Tables {
    pub(crate) fn new() -> Self {
        let mut tables = Self {
            records: Vec::new(),
            by_id: IdIndex::default(),
            next_id: DEFAULT_TABLE + 1,
            dropped: 0,
            emptied: false,
            cursor: 0,
        };
        tables.add(DIRECTORY, "");
        tables.add(DEFAULT_TABLE, DEFAULT_TABLE_NAME);
        tables
    }

    /// The place of a table that exists, the directory included.
    #[inline(always)]
    pub(crate) fn place(&self, id: u32) -> Option<usize> {
        self.by_id
            .find(id.into())
            .filter(|place| self.records[*place].exists)
    }

    /// The place of a table that a user may name.
    #[inline(always)]
    pub(crate) fn user_place(&self, id: u32) -> Result<usize, StoreError> {
        if id == DEFAULT_TABLE {
            return Ok(DEFAULT_PLACE);
        }
        match self.place(id) {
            Some(place) if place != DIRECTORY_PLACE => Ok(place),
            _ => Err(StoreError::UnknownTable { table: id }),
        }
    }

    #[inline(always)]
    pub(crate) fn at(&mut self, place: usize) -> &mut Record {
        &mut self.records[place]
    }

    /// The place of a table, dropped or not. Every object is of one.
    #[inline(always)]
    pub(crate) fn place_of_object(&self, id: u32) -> usize {
        self.by_id.find(id.into()).unwrap_or(DIRECTORY_PLACE)
    }

    /// Notes that a table has one object less.
    pub(crate) fn forget_object(&mut self, id: u32) {
        if let Some(place) = self.by_id.find(id.into()) {
            let record = &mut self.records[place];
            record.objects -= 1;
            self.emptied |= record.objects == 0 && !record.exists;
        }
    }

    /// Objects and bytes of every record, for an audit.
    pub(crate) fn sums(&self) -> impl Iterator<Item = (u32, u64, u64)> {
        let used = self.records.iter().filter(|record| !record.vacant);
        used.map(|r| (r.id, r.objects, r.live_bytes))
    }

    /// Objects of the directory.
    pub(crate) fn directory_objects(&self) -> u64 {
        self.records[DIRECTORY_PLACE].objects
    }

    fn named(&self, name: &str) -> Option<&Record> {
        self.existing().find(|record| &*record.name == name)
    }

    fn existing(&self) -> impl Iterator<Item = &Record> {
        self.records[DIRECTORY_PLACE + 1..]
            .iter()
            .filter(|record| record.exists)
    }

    fn add(&mut self, id: u32, name: &str) {
        let record = Record {
            id,
            name: name.into(),
            exists: true,
            vacant: false,
            objects: 0,
            live_bytes: 0,
        };
        match self.records.iter_mut().find(|record| record.vacant) {
            Some(vacant) => *vacant = record,
            None => self.records.push(record),
        }
        self.reindex();
    }

    /// Tables, dropped ones included whose objects are not all gone, and the directory.
    fn count(&self) -> usize {
        self.records.iter().filter(|record| !record.vacant).count()
    }

    fn reindex(&mut self) {
        let records = self.records.iter().enumerate();
        let used = records.filter(|(_, record)| !record.vacant);
        let ids: Vec<(u64, u32)> = used
            .map(|(place, record)| (record.id.into(), place as u32))
            .collect();
        self.by_id.rebuild(ids.into_iter());
    }

    /// Takes in what a replay found: a table, or the next id.
    pub(crate) fn restore(&mut self, key: &[u8], value: &[u8]) {
        let Ok(id) = value.try_into().map(u32::from_le_bytes) else {
            return;
        };
        if key == NEXT_ID {
            self.next_id = self.next_id.max(id);
        } else if let Ok(name) = core::str::from_utf8(key)
            && id != DIRECTORY
            && self.by_id.find(id.into()).is_none()
        {
            self.add(id, name);
            self.next_id = self.next_id.max(id.saturating_add(1));
        }
    }

    /// Whether objects of dropped tables are left.
    #[inline(always)]
    pub(crate) fn has_dropped(&self) -> bool {
        self.dropped > 0
    }

    /// Forgets dropped tables whose objects are gone.
    fn forget_empty(&mut self) {
        self.emptied = false;
        for record in &mut self.records {
            record.vacant |= !record.exists && record.objects == 0;
        }
        let dropped = self.records.iter().filter(|r| !r.exists && !r.vacant);
        self.dropped = dropped.count();
        self.reindex();
    }
}

fn check_name(name: &str) -> Result<(), StoreError> {
    let fits = (1..=MAX_TABLE_NAME_BYTES).contains(&name.len());
    if fits && !name.chars().any(char::is_control) {
        Ok(())
    } else {
        Err(StoreError::TableName)
    }
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Creates a table. Returns its id, which no table had before. Errors: the name is taken or not allowed; too many tables; no
    /// room in the log.
    pub fn create_table(&mut self, name: &str, now: u64) -> Result<u32, StoreError> {
        check_name(name)?;
        if let Some(record) = self.tables.named(name) {
            return Err(StoreError::TableExists { table: record.id });
        }
        let id = self.tables.next_id;
        if self.tables.count() > MAX_TABLES || id == DIRECTORY {
            return Err(StoreError::TooManyTables);
        }
        // The next id first: one that was given out and lost is no harm.
        self.put_directory(NEXT_ID, &(id + 1).to_le_bytes(), NEVER, now)?;
        self.tables.next_id = id + 1;
        self.put_directory(name.as_bytes(), &id.to_le_bytes(), NEVER, now)?;
        self.tables.add(id, name);
        Ok(id)
    }

    /// Drops a table with everything in it. The table is gone at once; its objects are taken out by [`Self::clean`], in slices. A
    /// later table of that name gives no object a version that one of this table had.
    ///
    /// Errors: no such table, or the default table; [`StoreError::Busy`] as for [`Self::remove`].
    pub fn drop_table(&mut self, table: u32, now: u64) -> Result<(), StoreError> {
        if table == DEFAULT_TABLE {
            return Err(StoreError::DefaultTable);
        }
        let place = self.tables.user_place(table)?;
        let name = self.tables.records[place].name.clone();
        // The directory's tombstone carries the version below which nothing starts any more.
        self.safe_version = self.safe_version.max(self.max_version.saturating_add(1));
        self.remove_in(DIRECTORY, name.as_bytes(), &RejectRules::NONE, None, now)?;
        self.tables.at(place).exists = false;
        self.tables.forget_empty();
        Ok(())
    }

    /// Whether objects of a dropped table are still to be taken out: until then a one-sided reader may find them.
    #[must_use]
    pub fn is_dropping(&self, table: u32) -> bool {
        self.tables
            .by_id
            .find(table.into())
            .is_some_and(|place| !self.tables.records[place].exists)
    }

    /// The id of the table named `name`.
    #[must_use]
    pub fn table_id(&self, name: &str) -> Option<u32> {
        self.tables.named(name).map(|record| record.id)
    }

    /// All tables, with what they hold; the default table first.
    pub fn tables(&self) -> impl Iterator<Item = TableStats<'_>> {
        self.tables.existing().map(|record| TableStats {
            id: record.id,
            name: &record.name,
            objects: record.objects,
            live_bytes: record.live_bytes,
        })
    }

    /// Stores an object of the directory.
    pub(crate) fn put_directory(
        &mut self,
        key: &[u8],
        value: &[u8],
        expires: u64,
        now: u64,
    ) -> Result<u64, StoreError> {
        let write = super::Write {
            expires,
            ..super::Write::new(DIRECTORY, key, value)
        };
        self.write_in(DIRECTORY_PLACE, &write, now)
    }

    /// Takes objects of dropped tables out of so many buckets, or until none is left. Returns the buckets looked at.
    pub(crate) fn sweep_dropped(&mut self, buckets: usize) -> usize {
        for done in 0..buckets {
            if !self.tables.has_dropped() {
                return done;
            }
            let hash = self.tables.cursor;
            while let Some((slot, table)) = self.find_dropped(hash) {
                let mem = self.region.as_ref();
                let own = self.hash(table, key_at(mem, slot.entry));
                let place = self.tables.place_of_object(table);
                self.bury(place, own, slot.entry);
                self.unlink(own, slot, table);
            }
            if self.tables.emptied {
                self.tables.forget_empty();
            }
            self.tables.cursor = self.index.next_bucket(hash).unwrap_or(0);
        }
        buckets
    }

    fn find_dropped(&self, hash: u64) -> Option<(Slot, u32)> {
        let mem = self.region.as_ref();
        let mut found = None;
        self.index.for_chain(mem, hash, |slot| {
            let table = table_at(mem, slot.entry);
            if found.is_none() && self.tables.place(table).is_none() {
                found = Some((slot, table));
            }
        });
        found
    }

    /// Makes room from dropped tables for a write that found none.
    pub(crate) fn sweep_dropped_for_write(&mut self) {
        let affordable = self.cleaner.budget_for_write / BUCKET_COST_BYTES;
        self.sweep_dropped(affordable.clamp(1, MAX_SYNC_DROP_BUCKETS));
    }
}
