//! The engine at its limits: sizes, overhead, crafted contents, misuse, slices.

mod engine_common;

use engine_common::Plain;
use kvstore::limits::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use kvstore::store::{CleanState, Config, Entry, EntryKind, Store, StoreError, entry, hash64};

const CONFIG: Config = Config {
    seed: 11,
    segment_bytes: None,
    quarantine_ns: 0,
    clean_for_write: None,
    incarnation: 0,
};

fn small(region: usize, segment: usize) -> Store<Vec<u8>> {
    let config = Config {
        seed: 11,
        segment_bytes: Some(segment),
        ..Config::default()
    };
    Store::new(vec![0; region], config).unwrap()
}

#[test]
fn the_smallest_region_takes_the_largest_key_and_value() {
    let mut store = Store::new(vec![0; 16 << 20], CONFIG).unwrap();
    let key = vec![b'k'; MAX_KEY_BYTES];
    for round in 0..40u8 {
        let value = vec![round; MAX_VALUE_BYTES];
        store.set(&key, &value).unwrap();
        let found = store.look(&key).unwrap();
        assert_eq!(store.bytes(found.value()), value);

        let reservation = store.hold(&key, MAX_VALUE_BYTES).unwrap();
        store.region_mut()[reservation.value()].fill(!round);
        store.seal(reservation).unwrap();
        let found = store.look(&key).unwrap();
        assert_eq!(found.value_len, MAX_VALUE_BYTES);
        assert!(
            store
                .bytes(found.value())
                .iter()
                .all(|byte| *byte == !round)
        );
    }
    store.set(b"e", b"").unwrap();
    assert_eq!(store.look(b"e").unwrap().value_len, 0);
    store.audit().unwrap();
}

#[test]
fn what_exceeds_a_limit_is_refused_by_name_and_changes_nothing() {
    let mut store = Store::new(vec![0; 16 << 20], CONFIG).unwrap();
    store.set(b"k", b"old").unwrap();
    let long_key = vec![0; MAX_KEY_BYTES + 1];
    let long_value = vec![0; MAX_VALUE_BYTES + 1];
    let key_error = StoreError::KeyTooLong {
        bytes: 65_536,
        limit: 65_535,
    };
    let value_error = StoreError::ValueTooLarge {
        bytes: 1_048_577,
        limit: 1_048_576,
    };
    assert_eq!(store.set(b"", b""), Err(StoreError::EmptyKey));
    assert_eq!(store.set(&long_key, b""), Err(key_error));
    assert_eq!(store.set(b"k", &long_value), Err(value_error));
    assert_eq!(store.hold(b"", 1), Err(StoreError::EmptyKey));
    assert_eq!(store.hold(&long_key, 1), Err(key_error));
    assert_eq!(store.hold(b"k", long_value.len()), Err(value_error));
    assert!(key_error.to_string().contains("65535"));
    assert!(value_error.to_string().contains("1048576"));
    assert_eq!(store.look(b""), None);
    assert_eq!(store.look(&long_key), None);
    assert_eq!(store.del(&long_key), Ok(None));
    let found = store.look(b"k").unwrap();
    assert_eq!(store.bytes(found.value()), b"old");
    store.audit().unwrap();
}

#[test]
fn an_object_of_100_bytes_costs_at_most_56_beyond_key_and_value() {
    let mut store = Store::new(vec![0; 64 << 20], CONFIG).unwrap();
    let value = [9; 100];
    let mut payload = 0;
    for n in 0u64.. {
        let key = format!("user{n:016}");
        match store.set(key.as_bytes(), &value) {
            Ok(_) => payload += (key.len() + value.len()) as u64,
            Err(StoreError::Full { .. }) => break,
            Err(error) => panic!("{error}"),
        }
    }
    let stats = store.stats();
    // All of the front, used or not; free log space apart.
    let front = store.layout().log as u64;
    let per_object = (stats.bytes.live + front - payload) / stats.objects;
    println!("{per_object} bytes beyond key and value, {stats:?}");
    assert!(per_object <= 56);
    assert!(stats.table_bytes <= front);
}

#[test]
fn versions_never_go_back_over_remove_and_re_create() {
    let mut store = small(64 << 10, 4 << 10);
    let mut last = 0;
    for round in 0..50 {
        for _ in 0..round % 5 + 1 {
            let version = store.set(b"key", &[round; 20]).unwrap();
            assert!(version > last);
            last = version;
        }
        assert_eq!(store.del(b"key"), Ok(Some(last)));
        assert_eq!(store.del(b"key"), Ok(None));
        // Everything that knew the version leaves the log.
        for filler in 0..400u32 {
            store.set(b"filler", &filler.to_le_bytes()).unwrap();
        }
    }
}

#[test]
fn a_replay_knows_versions_of_keys_that_left_no_trace() {
    let mut store = small(64 << 10, 4 << 10);
    for filler in 0..60u32 {
        store.set(&filler.to_le_bytes(), &[0; 400]).unwrap();
    }
    let last = (0..10_000).map(|_| store.set(b"gone", b"").unwrap()).max();
    assert_eq!(store.del(b"gone").unwrap(), last);
    // Overwrites of old keys have low versions: nothing but the segment headers remembers the high one.
    let dropped = store.stats().cleaner.tombstones_dropped;
    // In no order, so that segments die by and by and the cleaner has something to move.
    for step in 0..10_000u32 {
        let filler = step.wrapping_mul(2_654_435_761) >> 16;
        store
            .set(&(filler % 60).to_le_bytes(), &[step as u8; 400])
            .unwrap();
    }
    assert_eq!(store.stats().cleaner.tombstones_dropped, dropped + 1);
    assert_eq!(store.stats().bytes.tombstones, 0);
    let mut replayed = small(128 << 10, 4 << 10);
    assert_eq!(replayed.adopt(store.region()), Ok(60));
    let mut again = small(128 << 10, 4 << 10);
    assert_eq!(again.adopt(replayed.region()), Ok(60));
    for store in [&mut replayed, &mut again] {
        assert!(Some(store.set(b"gone", b"").unwrap()) > last);
        store.audit().unwrap();
    }
}

#[test]
fn a_value_that_looks_like_log_entries_cannot_enter_a_replay() {
    // Segments get generations in order, so a client can guess the next ones.
    let mut forged = small(64 << 10, 4 << 10);
    forged.set(b"forged", b"").unwrap();
    let found = forged.look(b"forged").unwrap();
    let mut fake = forged
        .bytes(found.entry_offset..found.entry_offset + 40)
        .to_vec();
    let mut store = small(64 << 10, 4 << 10);
    let mut generation = 1u64;
    for round in 0..3000u64 {
        // A segment is used again some twelve generations later.
        let guess = generation + 8 + round / 50 % 8;
        fake[..8].copy_from_slice(&((guess << 1) | 1).to_le_bytes());
        assert_eq!(Entry::parse(&fake).unwrap().verify(), Ok(()));
        let value = fake.repeat(12 + round as usize % 12);
        // Entries of varying multiples of 40 bytes, so that fakes lie where later entries begin.
        let key = (round % 8).to_le_bytes();
        store.set(&key, &value).unwrap();
        let found = store.look(&key).unwrap();
        let entry = Entry::parse(store.bytes(found.span())).unwrap();
        generation = entry.header().generation();
        if round % 3 == 0 {
            let mut replayed = small(128 << 10, 4 << 10);
            replayed.adopt(store.region()).unwrap();
            assert_eq!(replayed.look(b"forged"), None, "round {round}");
            assert_eq!(replayed.len(), store.len());
        }
    }
}

#[test]
fn replay_refuses_what_is_damaged_foreign_or_in_the_way() {
    let mut store = small(64 << 10, 4 << 10);
    assert_eq!(store.adopt(&[0; 4096]), Err(StoreError::NotAStore));
    store.set(b"key", b"value").unwrap();
    let found = store.look(b"key").unwrap();
    let mut copy = store.region().clone();
    copy[found.value_offset] ^= 1;
    let mut target = small(64 << 10, 4 << 10);
    let error = target.adopt(&copy).unwrap_err();
    assert!(
        matches!(error, StoreError::Damaged { offset, .. } if offset == found.entry_offset),
        "{error}"
    );
    assert_eq!(store.adopt(&copy), Err(StoreError::NotEmpty { objects: 1 }));
}

#[test]
fn a_reservation_of_another_store_is_refused_by_both() {
    let (mut a, mut b) = (small(64 << 10, 4 << 10), small(64 << 10, 4 << 10));
    a.set(b"shift", b"the offsets").unwrap();
    let of_a = a.hold(b"key", 10).unwrap();
    assert_eq!(b.seal(of_a), Err(StoreError::UnknownReservation));
    let of_b = b.hold(b"key", 10).unwrap();
    assert_eq!(a.abort(of_b), Err(StoreError::UnknownReservation));
    a.audit().unwrap();
    b.audit().unwrap();
    assert_eq!(a.look(b"key"), None);
}

#[test]
fn a_reserved_value_is_invisible_until_committed_and_the_last_commit_wins() {
    let mut store = small(64 << 10, 4 << 10);
    let first = store.hold(b"key", 3).unwrap();
    let second = store.hold(b"key", 5).unwrap();
    store.region_mut()[first.value()].copy_from_slice(b"one");
    store.region_mut()[second.value()].copy_from_slice(b"three");
    assert_eq!(store.look(b"key"), None);
    let put = store.set(b"key", b"between").unwrap();
    let later = store.seal(second).unwrap();
    assert!(later > put);
    let found = store.look(b"key").unwrap();
    assert_eq!(store.bytes(found.value()), b"three");
    let last = store.seal(first).unwrap();
    assert!(last > later);
    let found = store.look(b"key").unwrap();
    assert_eq!(store.bytes(found.value()), b"one");
    assert_eq!(store.stats().open_reservations, 0);
    store.audit().unwrap();
}

#[test]
fn one_open_reservation_does_not_stop_a_store_from_being_overwritten() {
    let mut store = small(64 << 10, 4 << 10);
    let reservation = store.hold(b"slow client", 100).unwrap();
    for n in 0..20_000u32 {
        store.set(&(n % 100).to_le_bytes(), &[n as u8; 64]).unwrap();
    }
    store.region_mut()[reservation.value()].fill(b'x');
    store.seal(reservation).unwrap();
    let found = store.look(b"slow client").unwrap();
    assert_eq!(store.bytes(found.value()), [b'x'; 100]);
    store.audit().unwrap();
}

#[test]
fn a_pinned_segment_keeps_its_bytes_and_only_busy_is_reported_when_all_are_pinned() {
    let mut store = small(32 << 10, 4 << 10);
    store.set(b"sent", &[1; 1000]).unwrap();
    let found = store.look(b"sent").unwrap();
    let segment = store.segment_of(found.entry_offset).unwrap();
    let in_flight = found.entry_offset + 8..found.value().end;
    let before = store.bytes(in_flight.clone()).to_vec();
    store.pin(segment);
    store.pin(segment);
    for n in 0..5000u32 {
        store.set(b"sent", &n.to_le_bytes()).unwrap();
        store.set(&(n % 50).to_le_bytes(), &[n as u8; 64]).unwrap();
    }
    assert_eq!(store.bytes(in_flight.clone()), before);
    store.unpin(segment);
    for n in 0..500u32 {
        store.set(b"sent", &n.to_le_bytes()).unwrap();
    }
    assert_eq!(store.bytes(in_flight), before, "pins are counted");
    store.unpin(segment);
    store.audit().unwrap();

    let count = store.layout().segments as u32;
    (0..count).for_each(|segment| store.pin(segment));
    let error = (0..10_000u32)
        .find_map(|n| store.set(b"sent", &[n as u8; 64]).err())
        .unwrap();
    assert_eq!(error, StoreError::Busy);
    assert!(store.look(b"sent").is_some());
    store.audit().unwrap();
    (0..count).for_each(|segment| store.unpin(segment));
    store.set(b"sent", b"again").unwrap();
    store.audit().unwrap();
}

#[test]
fn slices_stay_within_their_budget_and_finish_what_they_began() {
    let mut store = small(256 << 10, 8 << 10);
    let mut slices = 0;
    for n in 0..40_000u32 {
        store
            .set(&(n % 1300).to_le_bytes(), &[n as u8; 90])
            .unwrap();
        let wanted = store.wants_cleaning(0);
        let progress = store.slice(256);
        // The budget, and at most one more entry.
        assert!(progress.moved_bytes <= 256 + 128);
        slices += usize::from(progress.state == CleanState::More);
        if !wanted {
            assert_eq!(
                (progress.state, progress.moved_bytes),
                (CleanState::Idle, 0)
            );
        }
    }
    assert!(slices > 1000, "{slices} slices had more to do");
    store.audit().unwrap();
}

#[test]
fn lookups_in_two_stages_agree_and_the_hash_is_the_documented_one() {
    let mut store = small(64 << 10, 4 << 10);
    for n in 0..200u32 {
        store.set(&n.to_le_bytes(), &n.to_be_bytes()).unwrap();
    }
    for n in 0..300u32 {
        let key = n.to_le_bytes();
        let hash = store.hash(0, &key);
        assert_eq!(hash, hash64(11, &key));
        assert_eq!(store.get_hashed(hash, 0, &key, 0), store.look(&key));
        assert_eq!(store.look(&key).is_some(), n < 200);
    }
}

#[test]
fn the_format_of_an_entry_is_fixed() {
    let mut store = small(64 << 10, 4 << 10);
    assert_eq!(store.set(b"key", b"value"), Ok(1));
    let found = store.look(b"key").unwrap();
    let bytes = store.bytes(found.span());
    let expected_header = [
        3, 0, 0, 0, 0, 0, 0, 0, // generation 1, live
    ];
    assert_eq!(bytes[..8], expected_header);
    assert_eq!(bytes[12..16], [EntryKind::Object as u8, 0, 3, 0]);
    assert_eq!(bytes[16..24], [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[24..32], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&bytes[32..], b"keyvalue");
    assert_eq!(
        bytes[8..12],
        kvstore::crc::crc32c(&bytes[12..]).to_le_bytes()
    );
    assert_eq!(entry::entry_bytes(3, 5), 40);
    assert_eq!(entry::entry_bytes(3, 6), 48);
}
