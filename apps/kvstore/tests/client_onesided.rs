//! One-sided reads while the store is overwritten, cleaned and removed from as fast as it goes.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{Host, config};
use kvstore::client::{ClientConfig, ClientError};
use kvstore::proto::{Reply, Status};
use kvstore::server::ServerConfig;

const KEYS: usize = 200;

/// A value that says whose it is and which.
fn value(key: usize, number: u64) -> Vec<u8> {
    let len = 40 + (key * 37 + number as usize * 11) % 3000;
    let mut value = vec![(key as u8) ^ (number as u8); len];
    value[..8].copy_from_slice(&(key as u64).to_le_bytes());
    value[8..16].copy_from_slice(&number.to_le_bytes());
    value
}

#[test]
fn a_value_is_one_that_was_current_while_it_was_read() {
    let host = Host::new();
    // Small, so that its memory is used again every few thousand writes.
    let server = host.serve(ServerConfig {
        store_bytes: 12 << 20,
        ..config()
    });
    // What each key surely holds at least, and at most: numbers of writes that were acknowledged, and begun.
    let acknowledged: Vec<AtomicU64> = (0..KEYS).map(|_| AtomicU64::new(0)).collect();
    let begun: Vec<AtomicU64> = (0..KEYS).map(|_| AtomicU64::new(0)).collect();
    let mut first = host.client();
    for key in 0..KEYS {
        first.put(&key.to_le_bytes(), &value(key, 0)).unwrap();
    }
    let stop = AtomicBool::new(false);
    let mut reader = host.client();
    std::thread::scope(|scope| {
        let mut writer = host.client_with(ClientConfig {
            exactly_once: false,
            ..ClientConfig::default()
        });
        let (stop, acknowledged, begun) = (&stop, &acknowledged, &begun);
        scope.spawn(move || {
            let mut number = 0u64;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                for key in 0..KEYS {
                    begun[key].store(number, Ordering::SeqCst);
                    if number % 7 == key as u64 % 7 {
                        writer.remove(0, &key.to_le_bytes()).unwrap();
                    }
                    writer.put(&key.to_le_bytes(), &value(key, number)).unwrap();
                    acknowledged[key].store(number, Ordering::SeqCst);
                }
            }
        });
        let end = Stop(stop);
        let (mut hits, mut x) = (0u64, 1usize);
        while hits < 60_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let key = (x >> 33) % KEYS;
            let least = acknowledged[key].load(Ordering::SeqCst);
            let ticket = match reader.submit_one_sided(0, &key.to_le_bytes()) {
                Ok(ticket) => ticket,
                Err(ClientError::WindowFull) => continue,
                Err(e) => panic!("{e}"),
            };
            let mut done = false;
            while !done {
                reader
                    .wait(|t, reply| {
                        assert_eq!(t, ticket);
                        done = true;
                        match reply {
                            Ok(Reply::Value { value: got, .. }) => {
                                let number = u64::from_le_bytes(got[8..16].try_into().unwrap());
                                assert!(got == value(key, number), "key {key} is torn");
                                assert!(
                                    number >= least,
                                    "key {key}: {number}, but {least} was acknowledged"
                                );
                                let most = begun[key].load(Ordering::SeqCst);
                                assert!(number <= most, "key {key}: {number} of {most}");
                            }
                            // Between a remove and the write that follows.
                            Err(e) if e.status() == Some(Status::NotFound) => {
                                let most = begun[key].load(Ordering::SeqCst);
                                let removed = (least + 1..=most).any(|n| n % 7 == key as u64 % 7);
                                assert!(removed, "key {key} is missing between {least} and {most}");
                            }
                            other => panic!("{other:?}"),
                        }
                    })
                    .unwrap();
            }
            hits += 1;
        }
        drop(end);
    });
    let counters = reader.one_sided_counters();
    println!("{counters:?}");
    assert!(counters.direct > 0 && counters.by_table > 0, "{counters:?}");
    assert!(
        counters.doubts > 0,
        "nothing was ever in doubt: {counters:?}"
    );
    let stats = first.stats().unwrap();
    assert!(stats.cleaned_segments > 0, "{stats:?}");
    drop((first, reader));
    server.stop();
}

/// Ends the writer, also when the reader panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_known_place_takes_one_read_and_a_server_may_say_no() {
    let host = Host::new();
    let server = host.serve_usual();
    let mut client = host.client();
    for i in 0..100u32 {
        client.put(&i.to_le_bytes(), &[i as u8; 100]).unwrap();
    }
    client.prepare_one_sided().unwrap();
    common::eventually("the superblock arrives", || {
        client.poll(|_, _| {}).unwrap();
        client.is_one_sided()
    });
    let gets = client.stats().unwrap().gets;
    for round in 0..3 {
        for i in 0..100u32 {
            let object = client.read_one_sided(0, &i.to_le_bytes()).unwrap().unwrap();
            assert_eq!(object.value, [i as u8; 100]);
        }
        assert_eq!(client.read_one_sided(0, b"none").unwrap(), None);
        let counters = client.one_sided_counters();
        // A machine that stops this thread for longer than memory rests has lookups begin again, by the table, or leaves them to
        // the server, which also forgets the place.
        let disturbed = 2 * counters.doubts + counters.too_long;
        assert!(counters.by_table + disturbed >= 100, "{counters:?}");
        assert!(counters.direct + disturbed >= 100 * round, "{counters:?}");
        assert!(counters.misses + counters.doubts > round, "{counters:?}");
    }
    let asked = client.stats().unwrap().gets - gets;
    assert_eq!(
        asked,
        client.one_sided_counters().doubts,
        "the server was asked for nothing else"
    );
    drop(client);
    server.stop();

    let _server = host.serve(ServerConfig {
        one_sided: false,
        ..config()
    });
    let mut client = host.client();
    client.put(b"k", b"v").unwrap();
    for _ in 0..3 {
        assert_eq!(client.read_one_sided(0, b"k").unwrap().unwrap().value, b"v");
    }
    assert!(!client.is_one_sided());
    assert_eq!(client.stats().unwrap().gets, 3);
}
