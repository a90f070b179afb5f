//! The engine's object model against maps: tables, versions, reject rules, numbers, expiry, exactly-once and enumeration, in
//! random histories in which the cleaner works in slices, memory rests after use and time passes. The log is replayed along the
//! way and must give the same store.
//!
//! `HYV_STORE_SEED` runs one history again, first; `HYV_STORE_SECONDS` goes on with fresh seeds for so long.

mod engine_common;

use engine_common::{Random, seeds};
use kvstore::limits::MAX_RESULTS;
use kvstore::store::{
    Config, Cursor, DEFAULT_TABLE, Increment, NEVER, Outcome, Progress, RejectReason, RejectRules,
    RequestId, Reservation, Store, StoreError, Write,
};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone, PartialEq)]
struct Object {
    value: Vec<u8>,
    version: u64,
    expires: u64,
}

impl Object {
    fn exists(&self, now: u64) -> bool {
        self.expires == NEVER || now < self.expires
    }
}

struct Client {
    id: u64,
    expires: u64,
    next: u64,
    /// Requests whose results the client has not acknowledged; none if nobody knows the result yet.
    open: BTreeMap<u64, Option<Outcome>>,
    acknowledged: u64,
}

struct Listing {
    table: u32,
    cursor: Cursor,
    seen: BTreeSet<u16>,
    throughout: BTreeSet<u16>,
}

struct Held {
    reservation: Reservation,
    table: u32,
    key: u16,
    value: Vec<u8>,
    expires: u64,
    rules: RejectRules,
    request: Option<(usize, u64)>,
}

struct World {
    store: Store<Vec<u8>>,
    random: Random,
    now: u64,
    keys: u64,
    /// Nothing expires, and tables are not dropped.
    hoards: bool,
    tables: BTreeMap<String, u32>,
    ids: BTreeSet<u32>,
    objects: BTreeMap<(u32, u16), Object>,
    /// Highest version of a key in a table of that name.
    versions: BTreeMap<(String, u16), u64>,
    clients: Vec<Client>,
    listing: Option<Listing>,
    held: Vec<Held>,
    pins: Vec<u32>,
    full: u64,
    counts: BTreeMap<&'static str, u64>,
}

fn key_bytes(key: u16) -> Vec<u8> {
    let mut bytes = format!("k{key}").into_bytes();
    if key % 9 == 4 {
        bytes.resize(40 + usize::from(key % 30), b'x');
    }
    bytes
}

fn key_of(bytes: &[u8]) -> u16 {
    let digits = bytes[1..].iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |sum, byte| sum * 10 + u16::from(byte - b'0'))
}

fn config(seed: u64, quarantine_ns: u64, segment: usize) -> Config {
    Config {
        seed,
        segment_bytes: Some(segment),
        quarantine_ns,
        // A replay has to succeed in one go.
        clean_for_write: (quarantine_ns > 0).then_some(500),
        incarnation: 0,
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed | 1);
        let quarantine = [0, 0, 2_000][random.below(3) as usize];
        // Seeds that follow each other go through all shapes: stores that stay empty, and some that fill up.
        let shape = (seed / 2) as usize;
        let (region, segment) = [(48, 4), (160, 8), (512, 16)][shape % 3];
        let config = config(random.next(), quarantine, segment << 10);
        Self {
            store: Store::new(vec![0; region << 10], config).unwrap(),
            now: 1,
            keys: [30, 150, 500, 500][shape / 3 % 4],
            hoards: shape / 3 % 4 == 3,
            random,
            tables: [("default".to_owned(), DEFAULT_TABLE)].into(),
            ids: [DEFAULT_TABLE].into(),
            objects: BTreeMap::new(),
            versions: BTreeMap::new(),
            clients: Vec::new(),
            listing: None,
            held: Vec::new(),
            pins: Vec::new(),
            full: 0,
            counts: BTreeMap::new(),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn table(&mut self) -> (String, u32) {
        let which = self.random.below(self.tables.len() as u64) as usize;
        let (name, id) = self.tables.iter().nth(which).unwrap();
        (name.clone(), *id)
    }

    fn key(&mut self) -> u16 {
        self.random.below(self.keys) as u16
    }

    fn current(&self, table: u32, key: u16) -> Option<&Object> {
        self.objects
            .get(&(table, key))
            .filter(|object| object.exists(self.now))
    }

    fn rules(&mut self, table: u32, key: u16) -> RejectRules {
        let version = self.current(table, key).map_or(7, |object| object.version);
        let near = version.wrapping_add(self.random.below(3)).saturating_sub(1);
        match self.random.below(10) {
            0 => RejectRules::EXISTS,
            1 => RejectRules::ABSENT,
            2 => RejectRules::unless_version(near),
            3 => RejectRules {
                at_most: Some(near),
                ..RejectRules::NONE
            },
            _ => RejectRules::NONE,
        }
    }

    /// What the rules say of an object, in words of their own.
    fn rejection(&self, rules: &RejectRules, table: u32, key: u16) -> Option<(RejectReason, u64)> {
        match self.current(table, key).map(|object| object.version) {
            None => rules.absent.then_some((RejectReason::Absent, 0)),
            Some(version) if rules.exists => Some((RejectReason::Exists, version)),
            Some(version) => {
                let low = matches!(rules.at_most, Some(limit) if limit >= version);
                let other = matches!(rules.other_than, Some(wanted) if wanted != version);
                (low || other).then_some((RejectReason::Version, version))
            }
        }
    }

    /// A client that wants an operation executed once, and the number of its request.
    fn request(&mut self) -> Option<(usize, u64)> {
        let now = self.now;
        let able: Vec<usize> = (0..self.clients.len())
            .filter(|which| self.clients[*which].expires > now)
            .filter(|which| {
                let client = &self.clients[*which];
                client.next - client.acknowledged < MAX_RESULTS as u64
            })
            .collect();
        if able.is_empty() || self.random.below(2) == 0 {
            return None;
        }
        let which = able[self.random.below(able.len() as u64) as usize];
        let client = &mut self.clients[which];
        let sequence = client.next;
        client.next += 1;
        client.open.insert(sequence, None);
        let id = self.id((which, sequence));
        let acknowledged = self.clients[which].acknowledged;
        assert_eq!(self.store.check(id, acknowledged, now), Ok(Progress::New));
        Some((which, sequence))
    }

    fn id(&self, (which, sequence): (usize, u64)) -> RequestId {
        RequestId {
            client: self.clients[which].id,
            sequence,
        }
    }

    fn done(&mut self, request: Option<(usize, u64)>, outcome: Outcome) {
        if let Some((which, sequence)) = request {
            self.clients[which].open.insert(sequence, Some(outcome));
        }
    }

    /// The request was not executed: the client will not ask again.
    fn gave_up(&mut self, request: Option<(usize, u64)>) {
        if let Some(request) = request
            && self.clients[request.0].expires > self.now
        {
            let id = self.id(request);
            self.store.refuse(id, 99, self.now).unwrap();
            self.done(Some(request), Outcome::Refused { code: 99 });
        }
    }

    fn failed(&mut self, error: StoreError, request: Option<(usize, u64)>) {
        match error {
            StoreError::Full { .. } => self.full += 1,
            StoreError::Busy => {
                self.count("busy");
                if let Some(until) = self.store.busy_until() {
                    self.now = self.now.max(until);
                }
            }
            other => panic!("{other}"),
        }
        self.gave_up(request);
    }

    fn rejected(
        &mut self,
        error: StoreError,
        expected: (RejectReason, u64),
        request: Option<(usize, u64)>,
    ) {
        let (reason, version) = expected;
        assert_eq!(error, StoreError::Rejected { reason, version });
        self.done(request, Outcome::Rejected { reason, version });
        self.count("rejected");
    }

    fn stored(&mut self, name: &str, table: u32, key: u16, object: Object) {
        let before = self.versions.insert((name.to_owned(), key), object.version);
        assert!(
            before.is_none_or(|before| before < object.version),
            "version went back"
        );
        self.objects.insert((table, key), object);
    }

    fn expiry(&mut self) -> u64 {
        if self.hoards {
            return NEVER;
        }
        match self.random.below(5) {
            0 => self.now + 1 + self.random.below(3_000),
            1 => self.now.saturating_sub(self.random.below(3)).max(1),
            _ => NEVER,
        }
    }

    fn value(&mut self) -> Vec<u8> {
        let len = match self.random.below(12) {
            0 => self.random.below(1500),
            _ => self.random.below(90),
        };
        let stamp = self.random.next();
        (0..len)
            .map(|n| (stamp.rotate_left(n as u32 % 64) + n) as u8)
            .collect()
    }

    fn write(&mut self) {
        let ((name, table), key) = (self.table(), self.key());
        let (rules, request) = (self.rules(table, key), self.request());
        let (value, expires) = (self.value(), self.expiry());
        let bytes = key_bytes(key);
        let write = Write {
            expires,
            rules,
            once: request.map(|request| self.id(request)),
            ..Write::new(table, &bytes, &value)
        };
        let expected = self.rejection(&rules, table, key);
        match (self.store.write(&write, self.now), expected) {
            (Ok(version), None) => {
                let object = Object {
                    value,
                    version,
                    expires,
                };
                self.stored(&name, table, key, object);
                self.done(request, Outcome::Written { version });
                self.count("written");
            }
            (Err(error), Some(expected)) => self.rejected(error, expected, request),
            (Err(error), None) => self.failed(error, request),
            (Ok(_), Some(expected)) => panic!("not rejected: {expected:?}"),
        }
    }

    fn increment(&mut self) {
        let ((name, table), key) = (self.table(), self.key());
        let (rules, request) = (self.rules(table, key), self.request());
        let by = match self.random.below(2) {
            0 => Increment::I64(self.random.next() as i64),
            _ => Increment::F64(self.random.below(1000) as f64 / 8.0),
        };
        let once = request.map(|request| self.id(request));
        let old = self.current(table, key).cloned();
        let result = self
            .store
            .increment(table, &key_bytes(key), by, &rules, once, self.now);
        match (result, self.rejection(&rules, table, key)) {
            (Ok(new), None) => {
                let expires = old.as_ref().map_or(NEVER, |old| old.expires);
                let old = old.map_or([0; 8], |old| old.value.try_into().unwrap());
                let sum = match by {
                    Increment::I64(by) => Increment::I64(i64::from_le_bytes(old).wrapping_add(by)),
                    Increment::F64(by) => Increment::F64(f64::from_le_bytes(old) + by),
                };
                assert_eq!(new.value.bits(), sum.bits());
                let object = Object {
                    value: sum.bits().to_le_bytes().to_vec(),
                    version: new.version,
                    expires,
                };
                self.stored(&name, table, key, object);
                let outcome = Outcome::Incremented {
                    value: new.value,
                    version: new.version,
                };
                self.done(request, outcome);
                self.count("incremented");
            }
            (Err(StoreError::NotANumber { bytes }), None) => {
                assert_eq!(Some(bytes), old.map(|old| old.value.len()));
                assert_ne!(bytes, 8);
                self.gave_up(request);
            }
            (Err(error), Some(expected)) => self.rejected(error, expected, request),
            (Err(error), None) => self.failed(error, request),
            (Ok(_), Some(expected)) => panic!("not rejected: {expected:?}"),
        }
    }

    fn remove(&mut self) {
        let ((_, table), key) = (self.table(), self.key());
        let (rules, request) = (self.rules(table, key), self.request());
        let once = request.map(|request| self.id(request));
        let expected = self.rejection(&rules, table, key);
        let result = self
            .store
            .remove(table, &key_bytes(key), &rules, once, self.now);
        match (result, expected) {
            (Ok(Some(version)), None) => {
                let object = self
                    .current(table, key)
                    .expect("removed what was not there");
                assert_eq!(object.version, version);
                self.removed(table, key);
                self.done(request, Outcome::Removed { version });
                self.count("removed");
            }
            (Ok(None), None) => {
                assert_eq!(self.current(table, key), None);
                self.done(request, Outcome::Absent);
            }
            (Err(error), Some(expected)) => self.rejected(error, expected, request),
            (Err(error), None) => {
                assert_eq!(error, StoreError::Busy);
                self.failed(error, request);
            }
            (Ok(_), Some(expected)) => panic!("not rejected: {expected:?}"),
        }
    }

    fn removed(&mut self, table: u32, key: u16) {
        self.objects.remove(&(table, key));
        if let Some(listing) = self
            .listing
            .as_mut()
            .filter(|listing| listing.table == table)
        {
            listing.throughout.remove(&key);
        }
    }

    fn reserve(&mut self) {
        let ((_, table), key) = (self.table(), self.key());
        let (rules, request) = (self.rules(table, key), self.request());
        let (value, expires) = (self.value(), self.expiry());
        let bytes = key_bytes(key);
        let write = Write {
            expires,
            rules,
            once: request.map(|request| self.id(request)),
            ..Write::new(table, &bytes, &[])
        };
        match (
            self.store.reserve(&write, value.len(), self.now),
            self.rejection(&rules, table, key),
        ) {
            (Ok(reservation), None) => {
                self.store.region_mut()[reservation.value()].copy_from_slice(&value);
                if let Some(request) = request {
                    let (id, first) = (self.id(request), self.clients[request.0].acknowledged);
                    let progress = self.store.check(id, first, self.now);
                    assert_eq!(progress, Ok(Progress::InProgress));
                }
                self.held.push(Held {
                    reservation,
                    table,
                    key,
                    value,
                    expires,
                    rules,
                    request,
                });
            }
            (Err(error), Some(expected)) => self.rejected(error, expected, request),
            (Err(error), None) => self.failed(error, request),
            (Ok(_), Some(expected)) => panic!("not rejected: {expected:?}"),
        }
    }

    fn finish_reservation(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let which = self.random.below(self.held.len() as u64) as usize;
        let held = self.held.swap_remove(which);
        // A lease that ended took its requests with it.
        let request = held
            .request
            .filter(|request| self.clients[request.0].open.contains_key(&request.1));
        if self.random.below(4) == 0 {
            self.store.abort(held.reservation).unwrap();
            self.gave_up(request);
            return;
        }
        let name = self.tables.iter().find(|(_, id)| **id == held.table);
        let name = name.map(|(name, _)| name.clone());
        let expected = self.rejection(&held.rules, held.table, held.key);
        match (
            self.store.commit(held.reservation, self.now),
            name,
            expected,
        ) {
            (Ok(version), Some(name), None) => {
                let object = Object {
                    value: held.value,
                    version,
                    expires: held.expires,
                };
                self.stored(&name, held.table, held.key, object);
                self.done(request, Outcome::Written { version });
                self.count("committed");
            }
            (Err(StoreError::UnknownTable { .. }), None, _) => self.gave_up(request),
            (Err(error), Some(_), Some(expected)) => self.rejected(error, expected, request),
            (result, name, expected) => panic!("{result:?} {name:?} {expected:?}"),
        }
    }

    fn tables(&mut self) {
        let name = format!("t{}", self.random.below(4));
        match self.tables.get(&name).copied() {
            None => match self.store.create_table(&name, self.now) {
                Ok(id) => {
                    assert!(self.ids.insert(id), "an id was used again");
                    self.tables.insert(name, id);
                    self.count("created");
                }
                Err(error) => self.failed(error, None),
            },
            Some(id) if !self.hoards && self.random.below(3) == 0 => {
                match self.store.drop_table(id, self.now) {
                    Ok(()) => {
                        self.tables.remove(&name);
                        self.objects.retain(|(table, _), _| *table != id);
                        if self
                            .listing
                            .as_ref()
                            .is_some_and(|listing| listing.table == id)
                        {
                            self.listing = None;
                        }
                        assert_eq!(
                            self.store.put(id, b"k", b"", self.now),
                            Err(StoreError::UnknownTable { table: id })
                        );
                        self.count("dropped");
                    }
                    Err(error) => self.failed(error, None),
                }
            }
            Some(id) => assert_eq!(
                self.store.create_table(&name, self.now),
                Err(StoreError::TableExists { table: id })
            ),
        }
        let listed: BTreeMap<String, u32> = self
            .store
            .tables()
            .map(|table| (table.name.to_owned(), table.id))
            .collect();
        assert_eq!(listed, self.tables);
    }

    fn leases(&mut self) {
        let now = self.now;
        let expires = now + 500 + self.random.below(20_000);
        if self.clients.len() < 5 || self.random.below(4) == 0 {
            let id = self.random.next();
            match self.store.take_lease(id, expires, now) {
                Ok(()) => self.clients.push(Client {
                    id,
                    expires,
                    next: 1,
                    open: BTreeMap::new(),
                    acknowledged: 1,
                }),
                Err(error) => self.failed(error, None),
            }
        } else {
            let which = self.random.below(self.clients.len() as u64) as usize;
            let (id, alive) = (self.clients[which].id, self.clients[which].expires > now);
            if alive && self.random.below(2) == 0 {
                match self.store.take_lease(id, expires, now) {
                    Ok(()) => self.clients[which].expires = expires,
                    Err(error) => self.failed(error, None),
                }
            } else if alive && self.random.below(2) == 0 {
                match self.store.end_lease(id, now) {
                    Ok(()) => {
                        self.clients[which].expires = 0;
                        self.clients[which].open.clear();
                    }
                    Err(error) => self.failed(error, None),
                }
            }
        }
    }

    /// Asks for results again, and acknowledges some.
    fn retry(&mut self) {
        if self.clients.is_empty() {
            return;
        }
        let which = self.random.below(self.clients.len() as u64) as usize;
        let now = self.now;
        let client = &mut self.clients[which];
        if client.expires <= now {
            client.open.clear();
            let id = RequestId {
                client: client.id,
                sequence: client.next,
            };
            let error = StoreError::NoLease { client: client.id };
            assert_eq!(self.store.check(id, 1, now), Err(error));
            return;
        }
        let id = client.id;
        let open: Vec<(u64, Option<Outcome>)> = client.open.clone().into_iter().collect();
        for (sequence, outcome) in open {
            let request = RequestId {
                client: id,
                sequence,
            };
            let progress = self
                .store
                .check(request, self.clients[which].acknowledged, now);
            let expected = outcome.map_or(Progress::InProgress, Progress::Done);
            assert_eq!(progress, Ok(expected), "client {id}, request {sequence}");
            if outcome.is_some() {
                let bytes = key_bytes(0);
                let write = Write {
                    once: Some(request),
                    ..Write::new(DEFAULT_TABLE, &bytes, b"a second time")
                };
                let error = StoreError::DuplicateRequest { sequence };
                assert_eq!(self.store.write(&write, now), Err(error));
            }
        }
        // Up to the first that is not finished.
        let client = &mut self.clients[which];
        let first_open = client.open.iter().find(|(_, outcome)| outcome.is_none());
        let limit = first_open.map_or(client.next, |(sequence, _)| *sequence);
        let span = limit - client.acknowledged;
        let acknowledged = client.acknowledged + self.random.below(span + 1);
        client.acknowledged = acknowledged;
        client.open.retain(|sequence, _| *sequence >= acknowledged);
        let request = RequestId {
            client: id,
            sequence: acknowledged,
        };
        let _ = self.store.check(request, acknowledged, now).unwrap();
        if acknowledged > 1 {
            let request = RequestId {
                client: id,
                sequence: acknowledged - 1,
            };
            assert_eq!(self.store.check(request, 1, now), Ok(Progress::Stale));
        }
        self.count("acknowledged");
    }

    fn page(&mut self) {
        if self.listing.is_none() {
            let (_, table) = self.table();
            let throughout = self.objects.iter().filter(|((of, _), _)| *of == table);
            self.listing = Some(Listing {
                table,
                cursor: Cursor::START,
                seen: BTreeSet::new(),
                throughout: throughout.map(|((_, key), _)| *key).collect(),
            });
        }
        let buckets = 1 + self.random.below(40) as usize;
        let mut room = 1 + self.random.below(60);
        let Some(mut listing) = self.listing.take() else {
            return;
        };
        let mut found = Vec::new();
        let progress = self
            .store
            .enumerate(listing.table, listing.cursor, buckets, self.now, |object| {
                if room == 0 {
                    return false;
                }
                room -= 1;
                found.push(*object);
                true
            })
            .unwrap();
        assert_eq!(progress.visited, found.len() as u64);
        for object in found {
            let key = key_of(self.store.bytes(object.key()));
            let expected = self
                .current(listing.table, key)
                .expect("expired or removed");
            assert_eq!(expected.version, object.version);
            assert!(
                listing.seen.insert(key) || !listing.throughout.contains(&key),
                "{key} twice"
            );
        }
        // What has expired since is no part of the promise.
        listing
            .throughout
            .retain(|key| self.current(listing.table, *key).is_some());
        match progress.next {
            Some(next) => {
                listing.cursor = next;
                self.listing = Some(listing);
            }
            None => {
                let missed: Vec<_> = listing.throughout.difference(&listing.seen).collect();
                assert!(missed.is_empty(), "never listed: {missed:?}");
                self.count("listed");
            }
        }
    }

    fn pin(&mut self) {
        let ((_, table), key) = (self.table(), self.key());
        if self.pins.len() < 3
            && let Some(found) = self.store.get(table, &key_bytes(key), self.now)
        {
            let segment = self.store.segment_of(found.entry_offset).unwrap();
            self.store.pin(segment);
            self.pins.push(segment);
        } else if let Some(segment) = self.pins.pop() {
            self.store.unpin(segment);
        }
    }

    fn step(&mut self) {
        self.now += self.random.below(20);
        match self.random.below(40) {
            0..=14 => self.write(),
            15..=17 => self.increment(),
            18..=21 => self.remove(),
            22 | 23 => self.reserve(),
            24 | 25 => self.finish_reservation(),
            26 => self.tables(),
            27 => self.leases(),
            28 | 29 => self.retry(),
            30 | 31 => self.page(),
            32 => self.pin(),
            33 => self.now += self.random.below(1000),
            _ => {
                let budget = self.random.below(3000) as usize;
                let progress = self.store.clean(budget, self.now);
                // One more entry, at most as long as a value and a key.
                assert!(progress.moved_bytes <= budget as u64 + 1800);
            }
        }
        let bytes = self.store.stats().bytes;
        assert_eq!(bytes.total(), self.store.region().len() as u64);
    }

    fn check_objects(&self, store: &Store<Vec<u8>>) {
        for table in self.tables.values() {
            for key in 0..self.keys as u16 {
                let found = store.get(*table, &key_bytes(key), self.now);
                let expected = self.current(*table, key);
                assert_eq!(
                    found.is_some(),
                    expected.is_some(),
                    "table {table}, key {key}"
                );
                if let (Some(found), Some(expected)) = (found, expected) {
                    assert_eq!(store.bytes(found.value()), expected.value);
                    assert_eq!(found.version, expected.version);
                    assert_eq!(found.expires, expected.expires);
                }
            }
        }
    }

    fn check_all(&mut self) {
        self.store.audit().unwrap();
        self.check_objects(&self.store);
        for stats in self.store.tables() {
            let held = self.objects.keys().filter(|(table, _)| *table == stats.id);
            // Expired ones may be gone already, or not yet.
            assert!(stats.objects <= held.count() as u64, "{stats:?}");
        }
    }

    /// A replay of the log gives the same store: objects, tables, versions, leases and results.
    fn check_replay(&mut self) {
        let seed = self.random.next();
        let size = (self.store.region().len() * 3).max(256 << 10);
        let config = config(seed, 0, 16 << 10);
        let mut replayed = Store::new(vec![0; size], config).unwrap();
        replayed.replay(self.store.region(), self.now).unwrap();
        replayed.audit().unwrap();
        self.check_objects(&replayed);
        let current = self
            .objects
            .values()
            .filter(|object| object.exists(self.now));
        assert_eq!(replayed.len(), current.count() as u64);
        let names: BTreeMap<String, u32> = replayed
            .tables()
            .map(|table| (table.name.to_owned(), table.id))
            .collect();
        assert_eq!(names, self.tables);
        for which in 0..self.clients.len() {
            self.check_replayed_client(&mut replayed, which);
        }
        let id = replayed.create_table("a new one", self.now).unwrap();
        assert!(!self.ids.contains(&id), "a replay forgot an id");
        for ((name, key), version) in &self.versions {
            let table = match replayed.table_id(name) {
                Some(id) => id,
                None => replayed.create_table(name, self.now).unwrap(),
            };
            let new = replayed
                .put(table, &key_bytes(*key), b"", self.now)
                .unwrap();
            assert!(
                new > *version,
                "a replay lost the version of {key} in {name}"
            );
        }
        self.count("replayed");
    }

    fn check_replayed_client(&self, replayed: &mut Store<Vec<u8>>, which: usize) {
        let client = &self.clients[which];
        for (sequence, outcome) in &client.open {
            let request = RequestId {
                client: client.id,
                sequence: *sequence,
            };
            let progress = replayed.check(request, client.acknowledged, self.now);
            let kept = matches!(
                outcome,
                Some(
                    Outcome::Written { .. } | Outcome::Removed { .. } | Outcome::Incremented { .. }
                )
            );
            if self.store.stats().unlogged > 0 {
                // On a full store leases and results of removes may be kept in memory alone.
                continue;
            } else if client.expires <= self.now {
                assert_eq!(progress, Err(StoreError::NoLease { client: client.id }));
            } else if kept {
                assert_eq!(progress, Ok(Progress::Done(outcome.unwrap())));
            } else {
                assert_eq!(progress, Ok(Progress::New));
            }
        }
    }

    /// When everything is let go and time has passed, all that nobody needs is reclaimed.
    fn finish(mut self) {
        for held in std::mem::take(&mut self.held) {
            self.store.abort(held.reservation).unwrap();
        }
        for segment in std::mem::take(&mut self.pins) {
            self.store.unpin(segment);
        }
        self.check_all();
        self.now += 100_000;
        for (table, key) in self.objects.keys().copied().collect::<Vec<_>>() {
            let version = self.current(table, key).map(|object| object.version);
            let gone =
                self.store
                    .remove(table, &key_bytes(key), &RejectRules::NONE, None, self.now);
            assert_eq!(gone, Ok(version));
            if version.is_some() {
                self.objects.remove(&(table, key));
            }
        }
        for _ in 0..100_000 {
            if !self.store.wants_cleaning(self.now) {
                break;
            }
            self.store.clean(2000, self.now);
            self.now += 100;
        }
        self.check_all();
        assert!(self.ids.iter().all(|id| !self.store.is_dropping(*id)));
        assert_eq!(self.store.leases(), 0);
        let bytes = self.store.stats().bytes;
        assert_eq!((bytes.records, bytes.pending), (0, 0));
        self.check_replay();
    }
}

fn run(seed: u64, steps: u64) -> BTreeMap<&'static str, u64> {
    let mut world = World::new(seed);
    for step in 0..steps {
        world.step();
        if step % 64 == 0 {
            world.check_all();
        }
        if step % 512 == 0 {
            world.check_replay();
        }
    }
    world.check_replay();
    let mut counts = std::mem::take(&mut world.counts);
    *counts.entry("full").or_default() += world.full;
    let stats = world.store.stats().cleaner;
    *counts.entry("cleaned").or_default() += stats.segments_cleaned;
    *counts.entry("expired").or_default() += stats.objects_expired;
    world.finish();
    counts
}

#[test]
fn fresh_seeds_give_histories_that_agree_with_the_model_and_replay_to_the_same_store() {
    let (mut sums, mut rounds) = (BTreeMap::<&str, u64>::new(), 0);
    for seed in seeds(12) {
        for (what, count) in run(seed, 3000) {
            *sums.entry(what).or_default() += count;
        }
        rounds += 1;
    }
    println!("{rounds} histories: {sums:?}");
    for what in [
        "written",
        "incremented",
        "removed",
        "rejected",
        "committed",
        "created",
        "dropped",
        "acknowledged",
        "listed",
        "full",
        "cleaned",
        "expired",
        "replayed",
    ] {
        assert!(
            sums.get(what).is_some_and(|count| *count > 0),
            "no history {what}"
        );
    }
}
