//! A cleaner that rests, and one that never does: in the engine, and at the wish of a client.

mod common;

use common::{Host, eventually};
use kvstore::store::{CleanState, CleanerMode, Config, DEFAULT_TABLE, Store, StoreError, hash64};

const SEGMENT: usize = 64 << 10;

fn store() -> Store<Vec<u8>> {
    resting(0)
}

/// Memory that was freed rests for so long, ns.
fn resting(quarantine_ns: u64) -> Store<Vec<u8>> {
    let config = Config {
        seed: 3,
        quarantine_ns,
        segment_bytes: Some(SEGMENT),
        ..Config::default()
    };
    Store::new(vec![0; 4 << 20], config).unwrap()
}

fn key(i: usize) -> Vec<u8> {
    format!("key {i}").into_bytes()
}

fn value(i: usize) -> Vec<u8> {
    format!("{i}:").repeat(30).into_bytes()
}

/// Objects of half of what the store accepts: nothing to gain, nothing scarce.
fn half_full() -> (Store<Vec<u8>>, usize) {
    filled(50)
}

fn filled(percent: u64) -> (Store<Vec<u8>>, usize) {
    fill(store(), percent)
}

fn fill(mut store: Store<Vec<u8>>, percent: u64) -> (Store<Vec<u8>>, usize) {
    let mut objects = 0;
    while store.stats().bytes.live < store.capacity() * percent / 100 {
        let (key, value) = (key(objects), value(objects));
        store.put(DEFAULT_TABLE, &key, &value, 0).unwrap();
        objects += 1;
    }
    (store, objects)
}

fn check(store: &Store<Vec<u8>>, objects: usize) {
    store.audit().unwrap();
    for i in 0..objects {
        let found = store.get(DEFAULT_TABLE, &key(i), 0).unwrap();
        assert_eq!(store.bytes(found.value()), value(i));
    }
}

#[test]
fn always_goes_round_the_whole_log_though_nothing_needs_it() {
    let (mut store, objects) = half_full();
    assert!(!store.wants_cleaning(0));
    assert_eq!(store.clean(1 << 20, 0).moved_bytes, 0);
    store.set_cleaner_mode(CleanerMode::Always);
    let (mut moved, mut slices) = (0, 0);
    // Three times everything that is there.
    while moved < 3 * store.stats().bytes.live {
        assert!(store.wants_cleaning(0), "after {moved} bytes");
        let progress = store.clean(4 << 10, 0);
        assert_eq!(progress.state, CleanState::More);
        // A slice: its budget and an entry, whatever there is.
        assert!(progress.moved_bytes <= (4 << 10) + 1024, "{progress:?}");
        moved += progress.moved_bytes;
        slices += 1;
        if slices % 100 == 0 {
            check(&store, objects);
        }
    }
    // Half the segments have something in them.
    assert!(store.stats().cleaner.segments_cleaned > store.stats().segments);
    store.set_cleaner_mode(CleanerMode::Auto);
    while store.clean(4 << 10, 0).state == CleanState::More {}
    assert!(!store.wants_cleaning(0));
    let before = store.stats().cleaner;
    assert_eq!(store.clean(1 << 20, 0).moved_bytes, 0);
    assert_eq!(store.stats().cleaner, before);
    check(&store, objects);
}

/// Where a log was written over, the cleaner leaves only a few segments free; and what it freed rests, which nobody but itself looks at
/// where nobody writes.
#[test]
fn always_never_stops_where_few_segments_are_free_and_others_rest() {
    for quarantine_ns in [0, 1_000_000] {
        let (mut store, objects) = fill(resting(quarantine_ns), 80);
        let mut now = 0;
        for n in 0..20 * objects {
            // At random: what is overwritten in order leaves segments that are all dead.
            let i = hash64(7, &n.to_le_bytes()) as usize % objects;
            while let Err(e) = store.put(DEFAULT_TABLE, &key(i), &value(i), now) {
                assert_eq!(e, StoreError::Busy);
                now += 10_000;
                store.clean(4 << 10, now);
            }
        }
        while store.wants_cleaning(now) {
            store.clean(4 << 10, now);
            now += 10_000;
        }
        let free = store.stats().free_segments;
        assert!(free < 6, "{free}");
        store.set_cleaner_mode(CleanerMode::Always);
        let (mut moved, mut slices) = (0, 0);
        while moved < 3 * store.stats().bytes.live {
            now += 10_000;
            slices += 1;
            // As a server does: it asks first.
            if store.wants_cleaning(now) {
                moved += store.clean(4 << 10, now).moved_bytes;
            }
            assert!(slices < 100_000, "{moved} bytes moved, and then no more");
        }
        check(&store, objects);
    }
}

#[test]
fn writes_find_room_beside_one_that_never_rests_and_beside_one_that_is_off() {
    for mode in [CleanerMode::Always, CleanerMode::Off, CleanerMode::Auto] {
        let (mut store, objects) = half_full();
        store.set_cleaner_mode(mode);
        assert_eq!(store.cleaner_mode(), mode);
        for n in 0..8 * objects {
            let i = n * 7919 % objects;
            store
                .put(DEFAULT_TABLE, &key(i), &value(i), 0)
                .unwrap_or_else(|e| panic!("{mode:?}, write {n}: {e}"));
            let before = store.stats().cleaner.bytes_moved;
            store.clean(1 << 10, 0);
            if mode == CleanerMode::Off {
                assert_eq!(store.stats().cleaner.bytes_moved, before);
            }
        }
        check(&store, objects);
        // The replay of what the cleaner left is the same store.
        let mut copy = self::store();
        copy.replay(store.region(), 0).unwrap();
        check(&copy, objects);
    }
}

#[test]
fn off_still_takes_out_what_was_dropped() {
    let (mut store, objects) = half_full();
    store.set_cleaner_mode(CleanerMode::Off);
    let table = store.create_table("short-lived", 0).unwrap();
    for i in 0..1000 {
        store.put(table, &key(i), b"x", 0).unwrap();
    }
    store.drop_table(table, 0).unwrap();
    let mut slices = 0;
    while store.is_dropping(table) {
        assert!(store.wants_cleaning(0));
        store.clean(4 << 10, 0);
        slices += 1;
        assert!(slices < 100_000);
    }
    check(&store, objects);
}

#[test]
fn what_a_client_asked_for_ends_with_its_connection() {
    let host = Host::new();
    let server = host.serve_usual();
    let mut watcher = host.client();
    // Several segments: of 2 MiB at this size.
    let large = |i: usize| value(i).repeat(20);
    for i in 0..4_000 {
        watcher.put(&key(i), &large(i)).unwrap();
    }
    let moved = |client: &mut kvstore::client::Client| client.stats().unwrap().cleaner_moved_bytes;
    let goes_on = |watcher: &mut kvstore::client::Client| {
        let before = moved(watcher);
        eventually("the cleaner works", || moved(watcher) > before + (1 << 20));
    };
    // The server is asleep in between: it has to work though nobody asks anything.
    let mut asker = host.client();
    asker.set_cleaner(CleanerMode::Always).unwrap();
    goes_on(&mut watcher);
    // While it is dropped without a word, and when it says goodbye.
    drop(asker);
    let rests = |watcher: &mut kvstore::client::Client| {
        let mut last = moved(watcher);
        eventually("the cleaner rests", || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            std::mem::replace(&mut last, moved(watcher)) == last
        });
    };
    rests(&mut watcher);
    // Who asks last has it, and the end of another's connection changes nothing.
    let mut first = host.client();
    let mut second = host.client();
    first.set_cleaner(CleanerMode::Off).unwrap();
    second.set_cleaner(CleanerMode::Always).unwrap();
    first.close().unwrap();
    goes_on(&mut watcher);
    second.set_cleaner(CleanerMode::Auto).unwrap();
    rests(&mut watcher);
    second.close().unwrap();
    let found = watcher.get(&key(3_999)).unwrap().unwrap();
    assert_eq!(found.value, large(3_999));
    drop(watcher);
    server.stop();
}
