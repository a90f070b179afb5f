//! Replays of damaged logs: an error that says what is wrong, or the same store; never a panic, never less than there was.

mod engine_common;

use engine_common::{Plain, Random, fresh_seeds};
use kvstore::store::{
    Config, DEFAULT_TABLE, RejectRules, RequestId, SUPERBLOCK_BYTES, Store, StoreError, Write,
};
use std::collections::BTreeMap;

const CONFIG: Config = Config {
    seed: 3,
    segment_bytes: Some(4 << 10),
    quarantine_ns: 0,
    clean_for_write: None,
    incarnation: 1,
};

type Objects = BTreeMap<(u32, Vec<u8>), (Vec<u8>, u64, u64)>;

/// A store with a bit of everything, and enough history that its cleaner has worked.
fn lived_in(random: &mut Random) -> Store<Vec<u8>> {
    let mut store = Store::new(vec![0; 96 << 10], CONFIG).unwrap();
    let tables = [DEFAULT_TABLE, store.create_table("a", 1).unwrap()];
    store.take_lease(5, 1_000_000, 1).unwrap();
    for step in 0..4000u64 {
        let table = tables[random.below(2) as usize];
        let key = random.below(200).to_le_bytes();
        if random.below(4) == 0 {
            store
                .remove(table, &key, &RejectRules::NONE, None, step)
                .unwrap();
            continue;
        }
        let id = RequestId {
            client: 5,
            sequence: step + 1,
        };
        store.check(id, step + 1, step).unwrap();
        let value = vec![step as u8; random.below(120) as usize];
        let write = Write {
            expires: if random.below(3) == 0 {
                step + 1 + random.below(5000)
            } else {
                0
            },
            once: Some(id),
            ..Write::new(table, &key, &value)
        };
        store.write(&write, step).unwrap();
        store.clean(200, step);
    }
    assert!(store.stats().cleaner.segments_cleaned > 10);
    store
}

/// Everything that exists at `now`.
fn objects(store: &Store<Vec<u8>>, now: u64) -> Objects {
    let mut objects = Objects::new();
    for table in store.tables() {
        let all = store.enumerate(table.id, Default::default(), usize::MAX, now, |found| {
            let key = (table.id, store.bytes(found.key()).to_vec());
            let value = store.bytes(found.value()).to_vec();
            objects.insert(key, (value, found.version, found.expires));
            true
        });
        assert_eq!(all.unwrap().next, None);
    }
    objects
}

fn replay(region: &[u8], now: u64) -> Result<Objects, StoreError> {
    let mut store = Store::new(vec![0; 256 << 10], CONFIG).unwrap();
    store.replay(region, now)?;
    store.audit().unwrap();
    Ok(objects(&store, now))
}

fn a_flipped_bit_is_an_error_or_changes_nothing(seed: u64) {
    let mut random = Random(seed);
    let store = lived_in(&mut random);
    let expected = objects(&store, 4000);
    let mut region = store.region().clone();
    assert_eq!(replay(&region, 4000).as_ref(), Ok(&expected));
    let (mut errors, mut same) = (0, 0);
    for _ in 0..3000 {
        let at = random.below(region.len() as u64) as usize;
        let bit = 1 << random.below(8);
        region[at] ^= bit;
        match replay(&region, 4000) {
            Ok(objects) => {
                assert!(
                    objects == expected,
                    "a flip of {bit:#x} at {at} changed the store"
                );
                same += 1;
            }
            Err(
                StoreError::Damaged { .. } | StoreError::Incomplete { .. } | StoreError::NotAStore,
            ) => {
                errors += 1;
            }
            Err(StoreError::Format { .. }) if at < SUPERBLOCK_BYTES => {}
            Err(other) => panic!("a flip of {bit:#x} at {at}: {other}"),
        }
        region[at] ^= bit;
    }
    println!("{errors} errors, {same} without effect");
    assert!(errors > 500 && same > 100);
}

#[test]
fn a_lost_segment_is_missed() {
    let mut random = Random(11);
    let store = lived_in(&mut random);
    let layout = *store.layout();
    let mut missed = 0;
    for segment in 0..layout.segments as u32 {
        let mut region = store.region().clone();
        let start = layout.segment_offset(segment);
        region[start..start + layout.segment_bytes()].fill(0);
        match replay(&region, 4000) {
            Err(StoreError::Incomplete { segment: index, .. }) => {
                assert_eq!(index, segment as usize);
                missed += 1;
            }
            // One that was free, or the newest of all: then an older digest lists all but that.
            Ok(_) => {}
            Err(other) => panic!("{other}"),
        }
    }
    let stats = store.stats();
    assert!(
        missed + stats.free_segments + 2 >= stats.segments,
        "{missed} missed, {stats:?}"
    );
}

fn random_bytes_and_cut_regions_are_refused_without_a_panic(seed: u64) {
    let mut random = Random(seed);
    let store = lived_in(&mut random);
    for _ in 0..300 {
        let mut region = store.region().clone();
        let from = random.below(region.len() as u64) as usize;
        let to = from + random.below((region.len() - from) as u64 + 1) as usize;
        for byte in &mut region[from..to] {
            *byte = random.next() as u8;
        }
        let _ = replay(&region, 4000);
        let cut = replay(&region[..from], 4000);
        assert_eq!(cut, Err(StoreError::NotAStore));
    }
    let mut full = Store::new(vec![0; 64 << 10], CONFIG).unwrap();
    let error = full.adopt(store.region()).err();
    assert!(matches!(
        error,
        None | Some(StoreError::Full { .. } | StoreError::Busy)
    ));
}

fresh_seeds! {
    a_flipped_bit_is_an_error_or_changes_nothing
    random_bytes_and_cut_regions_are_refused_without_a_panic
}
