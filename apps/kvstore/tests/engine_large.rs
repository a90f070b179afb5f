//! Large objects beside a cleaner that works in small slices: none copies more than its budget, and whatever happens to an object
//! while it is being moved, the store stays as the model says.

mod engine_common;

use std::collections::BTreeMap;

use engine_common::{Plain, Random, fresh_seeds};
use kvstore::limits::LARGE_MOVE_BYTES;
use kvstore::store::{Config, RejectRules, Store, StoreError, Write};

const SEGMENT: usize = 512 << 10;
const SLICE: usize = 4096;
/// A slice ends with the entry that exceeds its budget: the longest of the others here.
const SMALL: usize = 256;

fn store(region: usize) -> Store<Vec<u8>> {
    let config = Config {
        seed: 3,
        segment_bytes: Some(SEGMENT),
        clean_for_write: Some(SLICE),
        ..Config::default()
    };
    Store::new(vec![0; region], config).unwrap()
}

fn value(random: &mut Random) -> Vec<u8> {
    let len = match random.below(4) {
        0 => LARGE_MOVE_BYTES as u64 + random.below(130 << 10),
        _ => random.below(SMALL as u64 / 2),
    };
    let stamp = random.next() as u8;
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31) ^ stamp)
        .collect()
}

fn moves_of_large_objects_are_sliced_and_survive_all_that_happens_meanwhile(seed: u64) {
    let mut random = Random(seed);
    let mut store = store(10 * SEGMENT);
    let dropped = store.create_table("dropped", 0).unwrap();
    store.set(b"keeps the default table", b"").unwrap();
    let mut model: BTreeMap<u32, (Vec<u8>, u64)> = BTreeMap::new();
    let (mut now, mut largest_slice, mut moved) = (1u64, 0, 0);
    for step in 0..4000u32 {
        now += 1;
        model.retain(|_, (_, expires)| *expires == 0 || now < *expires);
        let key = random.below(90) as u32;
        let name = key.to_le_bytes();
        if step == 2000 {
            store.drop_table(dropped, now).unwrap();
        } else if step < 2000 && step % 40 == 0 {
            let _ = store.put(dropped, &name, &value(&mut random), now);
        }
        match random.below(10) {
            0 => match store.remove(0, &name, &RejectRules::NONE, None, now) {
                Ok(version) => assert_eq!(version.is_some(), model.remove(&key).is_some()),
                Err(error) => assert_eq!(error, StoreError::Busy),
            },
            1..4 => {
                let value = value(&mut random);
                let expires = if random.below(4) == 0 {
                    now + 1 + random.below(500)
                } else {
                    0
                };
                let write = Write {
                    expires,
                    ..Write::new(0, &name, &value)
                };
                match store.write(&write, now) {
                    Ok(_) => drop(model.insert(key, (value, expires))),
                    Err(StoreError::Busy | StoreError::Full { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            _ => {}
        }
        for _ in 0..random.below(12) {
            let progress = store.clean(SLICE, now);
            largest_slice = largest_slice.max(progress.moved_bytes);
            moved += progress.moved_bytes;
            if step % 16 == 0 && random.below(4) == 0 {
                store.audit().unwrap();
            }
        }
        if step % 300 == 299 {
            let mut replayed = self::store(32 * SEGMENT);
            replayed.replay(store.region(), now).unwrap();
            for store in [&store, &replayed] {
                for (key, (value, _)) in &model {
                    let found = store.get(0, &key.to_le_bytes(), now).unwrap();
                    assert_eq!(store.bytes(found.value()), value, "key {key} at {step}");
                }
            }
            replayed.audit().unwrap();
        }
    }
    println!("largest slice {largest_slice}, moved {moved}");
    assert!(
        moved > 10 << 20,
        "the cleaner had too little to do: {moved}"
    );
    assert!(largest_slice <= (SLICE + SMALL) as u64, "{largest_slice}");
    store.audit().unwrap();
}

fn the_sum_of_a_value_in_slices_is_that_of_its_entry(seed: u64) {
    let mut random = Random(seed);
    let mut store = store(24 * SEGMENT);
    for round in 0..60u64 {
        let len = random.below(200 << 10) as usize;
        let expires = random.below(2) * 1000;
        let key = vec![b'k'; 1 + random.below(300) as usize];
        let write = Write {
            expires,
            ..Write::new(0, &key, &[])
        };
        let mut reservation = store.reserve(&write, len, 1).unwrap();
        let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        store.region_mut()[reservation.value()].copy_from_slice(&bytes);
        let (mut slices, budget) = (0, 1 + random.below(20_000) as usize);
        // Sometimes the commit has to sum the rest.
        while slices < 5 + round && reservation.unsummed() > 0 {
            let before = reservation.unsummed();
            store.sum_value(&mut reservation, budget);
            assert_eq!(before - reservation.unsummed(), budget.min(before));
            slices += 1;
        }
        if round % 7 == 0 {
            store.abort(reservation).unwrap();
        } else {
            store.commit(reservation, 1).unwrap();
            let found = store.get(0, &key, 1).unwrap();
            let entry = kvstore::store::Entry::parse(store.bytes(found.span())).unwrap();
            entry.verify().unwrap();
            assert_eq!((entry.value(), entry.expires()), (&bytes[..], expires));
        }
        store.audit().unwrap();
    }
}

fresh_seeds! {
    moves_of_large_objects_are_sliced_and_survive_all_that_happens_meanwhile
    the_sum_of_a_value_in_slices_is_that_of_its_entry
}
