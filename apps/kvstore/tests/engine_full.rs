//! A store that is full says so, after a bounded amount of work, and then rests: whatever the sizes of what is in it.

mod engine_common;

use engine_common::{Plain, Random, fresh_seeds};
use kvstore::limits::LEASES_PER_SLICE;
use kvstore::store::{
    CleanState, Config, Progress, RejectRules, RequestId, Store, StoreError, Write,
};

const SEGMENT: usize = 32 << 10;
const REGION: usize = 32 * SEGMENT;
/// Bytes that a write, or a call of the cleaner, may clean.
const SLICE: usize = 1 << 10;
/// Between two calls, ns.
const TICK: u64 = 10_000;

fn store(quarantine_ns: u64) -> Store<Vec<u8>> {
    let config = Config {
        seed: 5,
        segment_bytes: Some(SEGMENT),
        quarantine_ns,
        clean_for_write: Some(SLICE),
        ..Config::default()
    };
    Store::new(vec![0; REGION], config).unwrap()
}

/// A store as its server calls it: a write that finds it busy is tried again, and the cleaner works meanwhile.
struct Served {
    store: Store<Vec<u8>>,
    now: u64,
    calls: u32,
}

impl Served {
    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<u64, StoreError> {
        loop {
            self.now += TICK;
            self.calls += 1;
            match self.store.write(&Write::new(0, key, value), self.now) {
                Err(StoreError::Busy) => {
                    let _ = self.store.clean(SLICE, self.now);
                }
                other => return other,
            }
            // Sixteen times what it takes to move everything once.
            assert!(self.calls < 16 * (REGION / SLICE) as u32, "busy for ever");
        }
    }

    /// Writes until nothing more fits; then the cleaner has to come to rest.
    fn fill(&mut self, mut size: impl FnMut() -> usize) -> u64 {
        let mut objects = 0;
        for n in 0u32.. {
            self.calls = 0;
            let size = size();
            match self.write(&n.to_le_bytes(), &vec![n as u8; size]) {
                Ok(_) => objects += 1,
                Err(StoreError::Full { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        self.rest();
        objects
    }

    fn rest(&mut self) {
        let before = self.store.stats().cleaner.bytes_moved;
        let mut calls = 0;
        while self.store.wants_cleaning(self.now) {
            self.now += TICK;
            calls += 1;
            let _ = self.store.clean(SLICE, self.now);
            assert!(calls < 16 * REGION / SLICE, "the cleaner never rests");
        }
        let moved = self.store.stats().cleaner.bytes_moved - before;
        assert!(moved <= 2 * REGION as u64, "{moved} bytes for nothing");
        let progress = self.store.clean(SLICE, self.now);
        assert_eq!(
            (progress.state, progress.moved_bytes),
            (CleanState::Idle, 0)
        );
        self.store.audit().unwrap();
    }
}

fn served(quarantine_ns: u64) -> Served {
    Served {
        store: store(quarantine_ns),
        now: 1,
        calls: 0,
    }
}

/// Of objects a little longer than half a segment only one fits each, and moving them gains nothing.
#[test]
fn a_store_full_of_objects_that_do_not_pack_says_so_and_rests() {
    for quarantine_ns in [0, 400_000] {
        let mut served = served(quarantine_ns);
        let objects = served.fill(|| SEGMENT / 2);
        let segments = served.store.stats().segments;
        assert!(objects >= segments - 4, "{objects} in {segments} segments");
        // It goes on saying so, at once.
        for n in 0..100u32 {
            served.calls = 0;
            let refused = served.write(&(n + 1000).to_le_bytes(), &[0; SEGMENT / 2]);
            assert!(
                matches!(refused, Err(StoreError::Full { .. })),
                "{refused:?}"
            );
            assert_eq!(served.calls, 1);
        }
        // One out, one in; the one that the cleaner moved last, too.
        for n in 0..objects as u32 {
            served.now += TICK;
            served.store.del(&n.to_le_bytes()).unwrap();
            served.calls = 0;
            served
                .write(&(n + 2000).to_le_bytes(), &[0; SEGMENT / 2])
                .unwrap();
        }
        served.rest();
    }
}

fn sizes_at_random_fill_a_store_well_before_it_says_that_it_is_full(seed: u64) {
    let mut random = Random(seed);
    for _ in 0..20 {
        let mut served = served(400_000 * random.below(2));
        let largest = 1 + random.below(SEGMENT as u64 / 2);
        served.fill(|| random.below(largest) as usize);
        let stats = served.store.stats();
        // Ends of segments for which no entry is short enough are lost, half of one at most; some are found between.
        let least = (stats.segments - 4) * (SEGMENT as u64 - largest - 1024);
        assert!(stats.bytes.live >= least, "{largest}: {stats:?}");
    }
}

/// A store whose every segment is pinned is busy for as long as that lasts; leases last longer.
#[test]
fn a_lease_is_renewed_though_the_store_is_busy_for_long() {
    let mut served = served(0);
    served.fill(|| 100);
    served
        .store
        .take_lease(7, 1_000_000_000, served.now)
        .unwrap();
    for n in 0..served.store.layout().segments as u32 {
        served.store.pin(n);
    }
    // Overwrites until no room is left.
    let busy = (0..100_000u32).find_map(|n| {
        let write = (n % 100).to_le_bytes();
        served.store.put(0, &write, &[1; 90], served.now).err()
    });
    assert_eq!(busy, Some(StoreError::Busy));
    let (end, unlogged) = (served.now + 4_000_000_000, served.store.stats().unlogged);
    let mut until = 1_000_000_000;
    while served.now < end {
        served.now += 10_000_000;
        if until - served.now < 500_000_000
            && served
                .store
                .take_lease(7, served.now + 1_000_000_000, served.now)
                .is_ok()
        {
            until = served.now + 1_000_000_000;
        }
        let id = RequestId {
            client: 7,
            sequence: 1,
        };
        assert_eq!(served.store.check(id, 1, served.now), Ok(Progress::New));
    }
    assert!(served.store.stats().unlogged > unlogged);
    // Another client gets none that a replay would not know.
    assert_eq!(
        served.store.take_lease(8, end, served.now),
        Err(StoreError::Busy)
    );
}

/// Leases that expire at the same time are ended a few in each slice.
#[test]
fn leases_that_expired_together_are_ended_by_and_by() {
    let mut store = store(0);
    for client in 0..100 {
        store.take_lease(client, 1000, 1).unwrap();
        for sequence in 1..=3 {
            let id = RequestId { client, sequence };
            assert_eq!(store.check(id, 1, 2), Ok(Progress::New));
            let write = Write {
                once: Some(id),
                ..Write::new(0, b"key", b"")
            };
            store.write(&write, 2).unwrap();
        }
    }
    // Renewed meanwhile: that the first expires later shows only when it is looked at.
    store.take_lease(5, 5000, 2).unwrap();
    let mut slices = 0;
    while store.wants_cleaning(2000) {
        let before = store.leases();
        let _ = store.clean(1, 2000);
        assert!(before - store.leases() <= LEASES_PER_SLICE);
        slices += 1;
        assert!(slices < 1000);
    }
    assert_eq!(store.leases(), 1);
    assert_eq!(store.stats().bytes.records, 3 * 72);
    let id = RequestId {
        client: 5,
        sequence: 4,
    };
    assert_eq!(store.check(id, 1, 2000), Ok(Progress::New));
    store.audit().unwrap();
}

/// Nearly all of a full store is removed, the newest first. A tombstone stays as long as what it hides: a cleaner that believes
/// otherwise moves the same tombstones again and again, and frees nothing.
fn a_full_store_is_emptied_without_being_busy_for_ever(seed: u64) {
    const BYTES: usize = 64 << 20;
    const PART: usize = 64 << 10;
    let mut random = Random(seed);
    let config = Config {
        seed: random.next(),
        quarantine_ns: 4_000_000,
        clean_for_write: Some(PART),
        ..Config::default()
    };
    let mut store = Store::new(vec![0; BYTES], config).unwrap();
    let (mut now, mut sequence) = (1, 0);
    store.take_lease(1, u64::MAX, now).unwrap();
    let mut execute = |store: &mut Store<Vec<u8>>, n: u64, write: bool| {
        sequence += 1;
        let (client, key, value) = (1, format!("user{n:020}"), [n as u8; 100]);
        let once = RequestId { client, sequence };
        store.check(once, sequence, now).unwrap();
        let begun = now;
        loop {
            now += 1_000;
            if sequence.is_multiple_of(4) && store.wants_cleaning(now) {
                store.clean(4 << 10, now);
            }
            let done = if write {
                let write = Write {
                    once: Some(once),
                    ..Write::new(0, key.as_bytes(), &value)
                };
                store.write(&write, now).map(|_| ())
            } else {
                let removed = store.remove(0, key.as_bytes(), &RejectRules::NONE, Some(once), now);
                removed.map(|version| assert!(version.is_some(), "{key} is missing"))
            };
            match done {
                Err(StoreError::Busy) => {
                    if store.wants_cleaning(now) {
                        store.clean(4 << 10, now);
                    }
                }
                Err(StoreError::Full { .. }) => return false,
                other => {
                    other.unwrap();
                    return true;
                }
            }
            // Hundreds of times what memory rests, and what it takes to move everything once.
            assert!(now - begun < 1_000_000_000, "busy for ever");
        }
    };
    let mut objects = 0;
    while execute(&mut store, objects, true) {
        objects += 1;
    }
    for _ in 0..objects {
        execute(&mut store, random.next() % objects, true);
    }
    for n in (objects / 5..objects).rev() {
        assert!(execute(&mut store, n, false));
    }
    store.audit().unwrap();
}

fresh_seeds! {
    sizes_at_random_fill_a_store_well_before_it_says_that_it_is_full
    a_full_store_is_emptied_without_being_busy_for_ever
}
