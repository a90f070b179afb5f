//! The engine against a map: random histories in stores so small that nearly every write has to clean, with a full audit of
//! log, table and accounts along the way, and a replay at the end.

mod engine_common;

use engine_common::{Plain, Random, fresh_seeds};
use kvstore::store::{
    CleanState, Config, Cursor, DEFAULT_TABLE, NEVER, Progress, RequestId, Reservation, Store,
    StoreError, Write,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone)]
enum Op {
    Put { key: u16, len: usize },
    Remove { key: u16 },
    Get { key: u16 },
    Reserve { key: u16, len: usize },
    Commit { which: usize },
    Abort { which: usize },
    Pin { key: u16 },
    Unpin { which: usize },
    Clean { budget: usize },
    Page { buckets: usize },
}

fn op(keys: u16, longest: usize) -> impl Strategy<Value = Op> {
    let key = move || 0..keys;
    let len = move || prop_oneof![4 => 0..longest / 8, 1 => 0..=longest];
    prop_oneof![
        12 => (key(), len()).prop_map(|(key, len)| Op::Put { key, len }),
        5 => key().prop_map(|key| Op::Remove { key }),
        3 => key().prop_map(|key| Op::Get { key }),
        2 => (key(), len()).prop_map(|(key, len)| Op::Reserve { key, len }),
        2 => any::<usize>().prop_map(|which| Op::Commit { which }),
        1 => any::<usize>().prop_map(|which| Op::Abort { which }),
        1 => key().prop_map(|key| Op::Pin { key }),
        2 => any::<usize>().prop_map(|which| Op::Unpin { which }),
        3 => (0usize..4000).prop_map(|budget| Op::Clean { budget }),
        1 => (1usize..20).prop_map(|buckets| Op::Page { buckets }),
    ]
}

/// Keys of very different lengths; short ones share prefixes.
fn key_bytes(key: u16) -> Vec<u8> {
    let mut bytes = format!("k{key}").into_bytes();
    if key % 7 == 3 {
        bytes.resize(60 + usize::from(key % 50), b'x');
    }
    bytes
}

fn value_bytes(key: u16, stamp: u64, len: usize) -> Vec<u8> {
    (0..len)
        .map(|n| (u64::from(key) * 31 + stamp * 7 + n as u64) as u8)
        .collect()
}

/// One round of paging through the keys while they change.
struct Listing {
    cursor: Cursor,
    seen: BTreeSet<u16>,
    /// Keys that have existed since the listing began.
    throughout: BTreeSet<u16>,
}

struct Harness {
    store: Store<Vec<u8>>,
    model: BTreeMap<u16, (Vec<u8>, u64)>,
    /// Highest version that a key ever had.
    versions: BTreeMap<u16, u64>,
    open: Vec<(Reservation, u16, Vec<u8>)>,
    /// Pinned segments, with bytes of one entry as they were when it was pinned.
    pins: Vec<(u32, std::ops::Range<usize>, Vec<u8>)>,
    listing: Option<Listing>,
    stamp: u64,
    full: u64,
    refused: bool,
}

impl Harness {
    fn new(region: usize, segment: usize, seed: u64) -> Self {
        let config = Config {
            seed,
            segment_bytes: Some(segment),
            ..Config::default()
        };
        Self {
            store: Store::new(vec![0; region], config).unwrap(),
            model: BTreeMap::new(),
            versions: BTreeMap::new(),
            open: Vec::new(),
            pins: Vec::new(),
            listing: None,
            stamp: 0,
            full: 0,
            refused: false,
        }
    }

    fn stored(&mut self, key: u16, value: Vec<u8>, version: u64) {
        let before = self.versions.insert(key, version);
        assert!(
            before.is_none_or(|before| before < version),
            "version went back"
        );
        self.model.insert(key, (value, version));
    }

    fn refused(&mut self, error: StoreError) {
        match error {
            StoreError::Full { .. } => self.full += 1,
            StoreError::Busy => assert!(!self.pins.is_empty(), "busy without pins"),
            other => panic!("{other}"),
        }
        self.refused = true;
    }

    fn apply(&mut self, op: Op) {
        self.stamp += 1;
        match op {
            Op::Put { key, len } => {
                let value = value_bytes(key, self.stamp, len);
                match self.store.set(&key_bytes(key), &value) {
                    Ok(version) => self.stored(key, value, version),
                    Err(error) => self.refused(error),
                }
            }
            Op::Remove { key } => match self.store.del(&key_bytes(key)) {
                Ok(version) => {
                    let expected = self.model.remove(&key).map(|(_, version)| version);
                    assert_eq!(version, expected);
                    if let Some(listing) = &mut self.listing {
                        listing.throughout.remove(&key);
                    }
                }
                Err(StoreError::Busy) => assert!(!self.pins.is_empty(), "remove refused"),
                Err(error) => panic!("remove: {error}"),
            },
            Op::Get { key } => self.check(key),
            Op::Reserve { key, len } => {
                let value = value_bytes(key, self.stamp, len);
                match self.store.hold(&key_bytes(key), len) {
                    Ok(reservation) => {
                        self.store.region_mut()[reservation.value()].copy_from_slice(&value);
                        self.open.push((reservation, key, value));
                    }
                    Err(error) => self.refused(error),
                }
            }
            Op::Commit { which } if !self.open.is_empty() => {
                let (reservation, key, value) = self.open.swap_remove(which % self.open.len());
                let version = self.store.seal(reservation).unwrap();
                self.stored(key, value, version);
            }
            Op::Abort { which } if !self.open.is_empty() => {
                let (reservation, ..) = self.open.swap_remove(which % self.open.len());
                self.store.abort(reservation).unwrap();
            }
            Op::Pin { key } => {
                if let Some(found) = self.store.look(&key_bytes(key)) {
                    let segment = self.store.segment_of(found.entry_offset).unwrap();
                    self.store.pin(segment);
                    // What a send in flight gathers: all but the state word.
                    let range = found.entry_offset + 8..found.value().end;
                    let bytes = self.store.bytes(range.clone()).to_vec();
                    self.pins.push((segment, range, bytes));
                }
            }
            Op::Unpin { which } if !self.pins.is_empty() => {
                let (segment, range, bytes) = self.pins.swap_remove(which % self.pins.len());
                assert_eq!(self.store.bytes(range), bytes, "a pinned entry changed");
                self.store.unpin(segment);
            }
            Op::Clean { budget } => {
                let progress = self.store.slice(budget);
                if progress.state == CleanState::Blocked {
                    assert!(!self.pins.is_empty(), "cleaner blocked without pins");
                }
            }
            Op::Page { buckets } => self.page(buckets),
            Op::Commit { .. } | Op::Abort { .. } | Op::Unpin { .. } => {}
        }
        let bytes = self.store.stats().bytes;
        assert_eq!(bytes.total(), self.store.region().len() as u64);
    }

    fn page(&mut self, buckets: usize) {
        let listing = self.listing.get_or_insert_with(|| Listing {
            cursor: Cursor::START,
            seen: BTreeSet::new(),
            throughout: self.model.keys().copied().collect(),
        });
        let mut keys = Vec::new();
        let mut room = buckets * 2;
        let progress = self
            .store
            .enumerate(0, listing.cursor, buckets, 0, |found| {
                if room == 0 {
                    return false;
                }
                room -= 1;
                keys.push(found.key());
                true
            });
        for range in keys {
            let bytes = self.store.bytes(range);
            let digits: String = bytes[1..]
                .iter()
                .map(|b| *b as char)
                .take_while(char::is_ascii_digit)
                .collect();
            let key: u16 = digits.parse().unwrap();
            assert_eq!(key_bytes(key), bytes);
            let again = !listing.seen.insert(key);
            assert!(
                !again || !listing.throughout.contains(&key),
                "{key} listed twice"
            );
        }
        match progress.unwrap().next {
            Some(next) => listing.cursor = next,
            None => {
                let missed: Vec<_> = listing.throughout.difference(&listing.seen).collect();
                assert!(missed.is_empty(), "never listed: {missed:?}");
                self.listing = None;
            }
        }
    }

    fn check(&self, key: u16) {
        let bytes = key_bytes(key);
        let found = self.store.look(&bytes);
        assert_eq!(found.is_some(), self.model.contains_key(&key), "key {key}");
        if let (Some(found), Some((value, version))) = (found, self.model.get(&key)) {
            assert_eq!(self.store.bytes(found.value()), value);
            assert_eq!(self.store.bytes(found.key()), bytes);
            assert_eq!(found.version, *version);
            let entry = kvstore::store::Entry::parse(self.store.bytes(found.span())).unwrap();
            entry.verify().unwrap();
            assert!(entry.header().is_live());
            assert_eq!((entry.key(), entry.value()), (&bytes[..], &value[..]));
        }
    }

    fn check_all(&self, keys: u16) {
        self.store.audit().unwrap();
        for key in 0..keys {
            self.check(key);
        }
        assert_eq!(self.store.len(), self.model.len() as u64);
    }

    /// A store that was refused something recovers once what holds it is let go; then its log gives the same store again.
    fn finish(mut self, keys: u16) {
        for (reservation, ..) in std::mem::take(&mut self.open) {
            self.store.abort(reservation).unwrap();
        }
        for (segment, range, bytes) in std::mem::take(&mut self.pins) {
            assert_eq!(self.store.bytes(range), bytes, "a pinned entry changed");
            self.store.unpin(segment);
        }
        self.check_all(keys);

        let stats = self.store.stats();
        assert_eq!(stats.quarantined_segments + stats.damaged_segments, 0);
        let config = Config {
            seed: 99,
            segment_bytes: Some(2 * stats.segment_bytes as usize),
            ..Config::default()
        };
        // Room for entries of every size to pack worse than they did.
        let mut replayed = Store::new(vec![0; self.store.region().len() * 3], config).unwrap();
        assert_eq!(
            replayed.adopt(self.store.region()).unwrap(),
            self.store.len()
        );
        replayed.audit().unwrap();
        for (key, (value, version)) in &self.model {
            let found = replayed.look(&key_bytes(*key)).unwrap();
            assert_eq!(replayed.bytes(found.value()), value);
            assert_eq!(found.version, *version);
        }
        for (key, version) in &self.versions {
            let new = replayed.set(&key_bytes(*key), b"").unwrap();
            assert!(new > *version, "key {key}: replay lost the version");
        }

        for key in self.model.keys() {
            assert!(self.store.del(&key_bytes(*key)).unwrap().is_some());
        }
        self.model.clear();
        self.check_all(keys);
        self.store.set(b"new", b"value").unwrap();
        self.store.audit().unwrap();
    }
}

fn run(region: usize, segment: usize, seed: u64, keys: u16, ops: Vec<Op>) {
    let mut harness = Harness::new(region, segment, seed);
    for (index, op) in ops.into_iter().enumerate() {
        harness.apply(op);
        if index % 16 == 0 {
            harness.check_all(keys);
        }
    }
    harness.finish(keys);
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(80))]

    #[test]
    fn six_segments_of_1_kib(seed: u64, ops in prop::collection::vec(op(40, 640), 1..600)) {
        run(8 << 10, 1 << 10, seed, 40, ops);
    }

    #[test]
    fn sixteen_segments_of_4_kib(seed: u64, ops in prop::collection::vec(op(300, 3000), 1..900)) {
        run(72 << 10, 4 << 10, seed, 300, ops);
    }

    #[test]
    fn many_tiny_objects_that_chain_buckets(seed: u64, ops in prop::collection::vec(op(2000, 64), 500..3000)) {
        run(96 << 10, 8 << 10, seed, 2000, ops);
    }
}

/// Fills a store until `permille` of its log is live, then overwrites many times its size.
fn overwrite(seed: u64, permille: u64, background: bool) {
    let mut random = Random(seed);
    let config = Config {
        seed: random.next(),
        segment_bytes: Some(32 << 10),
        ..Config::default()
    };
    let mut store = Store::new(vec![0; 4 << 20], config).unwrap();
    let mut model = BTreeMap::new();
    let mut keys = 0u64;
    while u64::from(store.stats().utilisation_permille) < permille {
        let value = vec![keys as u8; 100 + random.below(40) as usize];
        store.set(&keys.to_le_bytes(), &value).unwrap();
        model.insert(keys, value);
        keys += 1;
    }
    let mut written = 0;
    while written < 60 << 20 {
        let key = random.below(keys);
        let len = model[&key].len();
        let value = vec![random.next() as u8; len];
        store
            .set(&key.to_le_bytes(), &value)
            .unwrap_or_else(|error| panic!("after {written} bytes: {error}; {:?}", store.stats()));
        model.insert(key, value);
        written += len;
        if background {
            let _ = store.slice(2048);
        }
        if random.below(20_000) == 0 {
            store.audit().unwrap();
        }
    }
    store.audit().unwrap();
    let stats = store.stats();
    println!(
        "{permille} permille: moved {} bytes for {written} written; {stats:?}",
        stats.cleaner.bytes_moved
    );
    for (key, value) in &model {
        let found = store.look(&key.to_le_bytes()).unwrap();
        assert_eq!(store.bytes(found.value()), value);
    }
}

fn overwriting_at_80_percent_never_runs_out(seed: u64) {
    overwrite(seed, 800, false);
}

fn overwriting_at_90_percent_never_runs_out(seed: u64) {
    overwrite(seed, 900, false);
}

fn overwriting_at_90_percent_with_a_background_cleaner_never_runs_out(seed: u64) {
    overwrite(seed, 900, true);
}

/// As a server does it that has one-sided readers: memory rests, a write cleans little and is tried again after slices of
/// cleaning, each write is executed once, and some objects expire.
fn overwriting_at_90_percent_with_memory_that_rests_in_slices_never_runs_out(seed: u64) {
    const BUDGET: usize = 4096;
    let mut random = Random(seed);
    let config = Config {
        seed: random.next(),
        segment_bytes: Some(32 << 10),
        quarantine_ns: 1000,
        clean_for_write: Some(BUDGET),
        ..Config::default()
    };
    let mut store = Store::new(vec![0; 4 << 20], config).unwrap();
    let (mut now, mut keys, mut sequence) = (1u64, 0u64, 0u64);
    store.take_lease(9, u64::MAX, now).unwrap();
    let mut write = |store: &mut Store<Vec<u8>>, key: u64, expires: bool, now: &mut u64| {
        sequence += 1;
        let id = RequestId {
            client: 9,
            sequence,
        };
        let expires = if expires { *now + 500_000 } else { NEVER };
        let (key, value) = (key.to_le_bytes(), [sequence as u8; 120]);
        let write = Write {
            expires,
            once: Some(id),
            ..Write::new(DEFAULT_TABLE, &key, &value)
        };
        for _ in 0..10_000 {
            assert_eq!(
                store.check(id, sequence.saturating_sub(5), *now),
                Ok(Progress::New)
            );
            let moved = store.stats().cleaner.bytes_moved;
            let result = store.write(&write, *now);
            // One more entry than the budget.
            let moved = store.stats().cleaner.bytes_moved - moved;
            assert!(moved <= BUDGET as u64 + 200, "moved {moved}");
            match result {
                Err(StoreError::Busy) => {
                    store.clean(BUDGET, *now);
                    *now += 10;
                }
                result => return result.map(|_| 160),
            }
        }
        Err(StoreError::Busy)
    };
    while store.stats().utilisation_permille < 880 {
        write(&mut store, keys, false, &mut now).unwrap();
        keys += 1;
    }
    let mut written = 0;
    while written < 16 << 20 {
        let expires = random.below(50) == 0;
        let key = if expires {
            keys + random.below(500)
        } else {
            random.below(keys)
        };
        written += write(&mut store, key, expires, &mut now)
            .unwrap_or_else(|error| panic!("after {written} bytes: {error}; {:?}", store.stats()));
        now += 20;
        if random.below(20_000) == 0 {
            store.audit().unwrap();
        }
    }
    store.audit().unwrap();
    let stats = store.stats();
    println!(
        "moved {} bytes for {written} written; {stats:?}",
        stats.cleaner.bytes_moved
    );
    assert!(stats.cleaner.objects_expired > 0);
    assert_eq!(
        (stats.unlogged, stats.utilisation_permille > 850),
        (0, true)
    );
    for key in 0..keys {
        assert!(store.get(DEFAULT_TABLE, &key.to_le_bytes(), now).is_some());
    }
}

#[test]
fn a_full_store_refuses_writes_serves_reads_and_removes_and_recovers() {
    let config = Config {
        seed: 5,
        segment_bytes: Some(4 << 10),
        ..Config::default()
    };
    // Values of 0 bytes: a tombstone is as large as the object it hides.
    for value_len in [0, 10, 100, 1800, 2100, 3600] {
        let mut store = Store::new(vec![0; 128 << 10], config).unwrap();
        let value = vec![7; value_len];
        for round in 0..4u64 {
            let mut keys = 0u64;
            let error = loop {
                match store.set(&keys.to_be_bytes(), &value) {
                    Ok(_) => keys += 1,
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, StoreError::Full { .. }), "{error}");
            assert!(keys > 0);
            store.audit().unwrap();
            let live = store.stats().bytes.live;
            // Entries of more than half a segment fill it alone.
            let floor = match value_len {
                2000.. => 45,
                1000.. => 98,
                _ => 99,
            };
            assert!(
                live * 100 >= store.capacity() * floor,
                "value of {value_len}: {live} live"
            );
            for key in 0..keys {
                let found = store.look(&key.to_be_bytes()).unwrap();
                assert_eq!(store.bytes(found.value()), value);
            }
            for key in 0..keys {
                assert!(store.del(&key.to_be_bytes()).unwrap().is_some());
                if key % 97 == round {
                    store.audit().unwrap();
                }
            }
            assert_eq!(store.len(), 0);
            store.audit().unwrap();
        }
    }
}

fn removes_never_fail_when_nothing_is_pinned_and_replay_agrees(seed: u64) {
    let mut random = Random(seed);
    let config = Config {
        seed: 8,
        segment_bytes: Some(1 << 10),
        ..Config::default()
    };
    let mut store = Store::new(vec![0; 16 << 10], config).unwrap();
    let mut model = BTreeMap::new();
    for step in 0..200_000u64 {
        let key = random.below(400);
        if random.below(3) == 0 {
            let existed = store.del(&key.to_be_bytes()).unwrap().is_some();
            assert_eq!(existed, model.remove(&key).is_some());
        } else {
            let value = vec![step as u8; random.below(60) as usize];
            match store.set(&key.to_be_bytes(), &value) {
                Ok(version) => drop(model.insert(key, (value, version))),
                Err(StoreError::Full { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        if step % 5000 == 0 {
            store.audit().unwrap();
            let larger = Config {
                segment_bytes: Some(4 << 10),
                ..config
            };
            let mut replayed = Store::new(vec![0; 64 << 10], larger).unwrap();
            replayed.adopt(store.region()).unwrap();
            assert_eq!(replayed.len(), model.len() as u64);
            for (key, (value, version)) in &model {
                let found = replayed.look(&key.to_be_bytes()).unwrap();
                assert_eq!(
                    (replayed.bytes(found.value()), found.version),
                    (&value[..], *version)
                );
            }
        }
    }
    println!("{:?}", store.stats());
}

fresh_seeds! {
    overwriting_at_80_percent_never_runs_out
    overwriting_at_90_percent_never_runs_out
    overwriting_at_90_percent_with_a_background_cleaner_never_runs_out
    overwriting_at_90_percent_with_memory_that_rests_in_slices_never_runs_out
    removes_never_fail_when_nothing_is_pinned_and_replay_agrees
}
