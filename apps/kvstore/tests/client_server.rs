//! What a client gets from a server, over the real device.

mod common;

use common::{Host, config};
use kvstore::client::{ClientConfig, ClientError, Operation};
use kvstore::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES};
use kvstore::proto::{Class, Element, MultiOp, Reply, Status};
use kvstore::store::{Increment, NEVER, RejectReason, RejectRules};

fn pattern(len: usize, salt: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i * 31 + salt * 7 + i / 251) as u8)
        .collect()
}

#[test]
fn objects_of_every_size_come_back() {
    let host = Host::new();
    let server = host.serve_usual();
    let mut client = host.client();
    let keys = [
        1,
        22,
        26,
        27,
        200,
        EAGER_KEY_BYTES,
        EAGER_KEY_BYTES + 1,
        MAX_KEY_BYTES,
    ];
    let values = [
        0,
        1,
        100,
        EAGER_VALUE_BYTES,
        EAGER_VALUE_BYTES + 1,
        100_000,
        MAX_VALUE_BYTES,
    ];
    for table in [0, client.create_table("sizes").unwrap().0] {
        for (k, &key_len) in keys.iter().enumerate() {
            for (v, &value_len) in values.iter().enumerate() {
                let key = pattern(key_len, k);
                let value = pattern(value_len, v);
                let version = client.write(table, &key, &value).unwrap();
                let object = client.read(table, &key).unwrap().unwrap();
                assert_eq!(object.version, version);
                assert!(object.value == value, "key {key_len} value {value_len}");
                let object = client.read_one_sided(table, &key).unwrap().unwrap();
                assert_eq!(object.version, version);
                assert!(
                    object.value == value,
                    "key {key_len} value {value_len}, one-sided"
                );
            }
            let key = pattern(key_len, k);
            let version = client.read(table, &key).unwrap().unwrap().version;
            assert_eq!(client.remove(table, &key).unwrap(), Some(version));
            assert_eq!(client.remove(table, &key).unwrap(), None);
            assert_eq!(client.read(table, &key).unwrap(), None);
            assert_eq!(client.read_one_sided(table, &key).unwrap(), None);
        }
    }
    assert!(client.one_sided_counters().by_table > 0);
    client.close().unwrap();
    assert_eq!(server.stop().objects, 0);
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let host = Host::new();
    let _server = host.serve_usual();
    let mut client = host.client();
    assert_eq!(client.get(b"").unwrap_err(), ClientError::EmptyKey);
    let long = vec![1; MAX_KEY_BYTES + 1];
    let error = ClientError::KeyTooLong { len: long.len() };
    assert_eq!(client.get(&long).unwrap_err(), error);
    let large = vec![1; MAX_VALUE_BYTES + 1];
    let error = ClientError::ValueTooLarge { len: large.len() };
    assert_eq!(client.put(b"k", &large).unwrap_err(), error);
    let status = |error: ClientError| error.status().unwrap();
    assert_eq!(
        status(client.read(77, b"k").unwrap_err()),
        Status::UnknownTable
    );
    assert_eq!(
        status(client.write(77, b"k", b"v").unwrap_err()),
        Status::UnknownTable
    );
    assert_eq!(
        status(client.drop_table(77).unwrap_err()),
        Status::UnknownTable
    );
    assert_eq!(
        status(client.drop_table(0).unwrap_err()),
        Status::DefaultTable
    );
    client.put(b"text", b"seven b").unwrap();
    let error = client.increment(0, b"text", Increment::I64(1)).unwrap_err();
    assert_eq!(
        error,
        ClientError::Status {
            status: Status::NotANumber,
            detail: 7
        }
    );
    let error = client.create_table("a\nb").unwrap_err();
    assert!(matches!(error, ClientError::Proto(_)), "{error}");
    // It goes on working after all that.
    assert_eq!(client.get(b"text").unwrap().unwrap().value, b"seven b");
}

#[test]
fn rules_versions_numbers_and_expiry() {
    let host = Host::new();
    let _server = host.serve_usual();
    let mut client = host.client();
    let rejected = |reason, version| ClientError::Rejected { reason, version };
    let mut write = |rules| client.write_if(0, b"k", b"v", rules, NEVER);
    assert_eq!(
        write(RejectRules::ABSENT).unwrap_err(),
        rejected(RejectReason::Absent, 0)
    );
    let first = write(RejectRules::EXISTS).unwrap();
    assert_eq!(
        write(RejectRules::EXISTS).unwrap_err(),
        rejected(RejectReason::Exists, first)
    );
    let second = write(RejectRules::unless_version(first)).unwrap();
    assert!(second > first);
    let error = rejected(RejectReason::Version, second);
    assert_eq!(
        write(RejectRules::unless_version(first)).unwrap_err(),
        error
    );
    let newer = RejectRules {
        at_most: Some(second),
        ..RejectRules::NONE
    };
    assert_eq!(client.read_if(0, b"k", newer).unwrap_err(), error);
    assert_eq!(
        client
            .remove_if(0, b"k", RejectRules::unless_version(first))
            .unwrap_err(),
        error
    );
    assert_eq!(
        client
            .remove_if(0, b"k", RejectRules::unless_version(second))
            .unwrap(),
        Some(second)
    );
    assert!(
        client.put(b"k", b"again").unwrap() > second,
        "versions never go back"
    );

    assert_eq!(
        client.increment(0, b"n", Increment::I64(5)).unwrap().value,
        Increment::I64(5)
    );
    assert_eq!(
        client.increment(0, b"n", Increment::I64(-7)).unwrap().value,
        Increment::I64(-2)
    );
    assert_eq!(
        client
            .increment(0, b"f", Increment::F64(0.5))
            .unwrap()
            .value,
        Increment::F64(0.5)
    );
    assert_eq!(
        client
            .increment(0, b"f", Increment::F64(0.25))
            .unwrap()
            .value,
        Increment::F64(0.75)
    );
    let must = RejectRules::ABSENT;
    assert!(
        client
            .increment_if(0, b"none", Increment::I64(1), must)
            .is_err()
    );

    let soon = client.server_time() + 50_000_000;
    for value in [b"short".as_slice(), &[7; 9000]] {
        client
            .write_if(0, b"mortal", value, RejectRules::NONE, soon)
            .unwrap();
        assert_eq!(client.get(b"mortal").unwrap().unwrap().value, value);
    }
    common::eventually("it expires", || client.get(b"mortal").unwrap().is_none());
    assert_eq!(client.read_one_sided(0, b"mortal").unwrap(), None);
    let later = client.server_time() + 3_600_000_000_000;
    client
        .write_if(0, b"mortal", b"long", RejectRules::EXISTS, later)
        .unwrap();
    assert_eq!(
        client.read_one_sided(0, b"mortal").unwrap().unwrap().value,
        b"long"
    );
}

#[test]
fn tables_hold_their_own_objects_and_go_with_them() {
    let host = Host::new();
    let _server = host.serve_usual();
    let (mut one, mut two) = (host.client(), host.client());
    let (a, created) = one.create_table("a").unwrap();
    assert!(created);
    assert_eq!(two.create_table("a").unwrap(), (a, false));
    let (b, _) = two.create_table("b").unwrap();
    assert_eq!(two.table("b").unwrap(), Some(b));
    assert_eq!(two.table("c").unwrap(), None);
    for (table, value) in [(0, b"zero".as_slice()), (a, b"of a"), (b, b"of b")] {
        one.write(table, b"same key", value).unwrap();
    }
    for i in 0..300u32 {
        one.write(a, &i.to_le_bytes(), b"filling").unwrap();
    }
    assert_eq!(two.read(a, b"same key").unwrap().unwrap().value, b"of a");
    assert_eq!(
        two.read_one_sided(a, b"same key").unwrap().unwrap().value,
        b"of a"
    );
    assert_eq!(
        two.read_one_sided(a, b"same key").unwrap().unwrap().value,
        b"of a"
    );
    let tables = two.tables().unwrap();
    let names: Vec<_> = tables
        .iter()
        .map(|t| (t.id, t.name.as_str(), t.objects))
        .collect();
    assert_eq!(names, [(0, "default", 1), (a, "a", 301), (b, "b", 1)]);
    one.drop_table(a).unwrap();
    assert_eq!(
        two.read_one_sided(a, b"same key").unwrap(),
        None,
        "nobody finds it any more"
    );
    assert_eq!(
        two.read(a, b"same key").unwrap_err().status(),
        Some(Status::UnknownTable)
    );
    let (again, created) = two.create_table("a").unwrap();
    assert!(created && again != a, "ids are never used again");
    assert_eq!(two.read(again, b"same key").unwrap(), None);
    assert_eq!(two.read(b, b"same key").unwrap().unwrap().value, b"of b");
    // More of them than fit one page.
    for i in 0..400 {
        one.create_table(&format!("table {i:03} {}", "x".repeat(40)))
            .unwrap();
    }
    let tables = one.tables().unwrap();
    assert_eq!(tables.len(), 403);
    assert!(tables.windows(2).all(|w| w[0].id < w[1].id));
}

#[test]
fn many_requests_in_flight_each_get_their_own_reply() {
    let host = Host::new();
    let server = host.serve_usual();
    let mut client = host.client();
    let value = |i: usize| pattern([10, 300, 5000, 70_000][i % 4], i);
    let mut submitted = 0;
    let mut expected: Vec<Option<usize>> = vec![None; 16];
    let mut done = 0;
    // Writes of all sizes, then reads of what was written, as many at a time as may be.
    for writing in [true, false] {
        (submitted, done) = (0, 0);
        while done < 400 {
            while submitted < 400 {
                let key = format!("key {submitted}");
                let (key, value) = (key.as_bytes(), value(submitted));
                let ticket = match writing {
                    true => client.submit(&Operation::put(key, &value)),
                    false => client.submit(&Operation::get(key)),
                };
                match ticket {
                    Ok(ticket) => {
                        let place = &mut expected[usize::from(ticket)];
                        assert_eq!(place.replace(submitted), None);
                        submitted += 1;
                    }
                    Err(ClientError::WindowFull) => break,
                    Err(e) => panic!("{e}"),
                }
            }
            done += client
                .wait(|ticket, reply| {
                    let i = expected[usize::from(ticket)]
                        .take()
                        .expect("one reply each");
                    match reply.unwrap() {
                        Reply::Version(_) if writing => {}
                        Reply::Value { value: got, .. } if !writing => assert!(got == value(i)),
                        other => panic!("{other:?}"),
                    }
                })
                .unwrap();
        }
    }
    assert_eq!((submitted, done, client.outstanding()), (400, 400, 0));
    drop(client);
    let stats = server.stop();
    assert_eq!(
        (stats.puts, stats.gets - stats.misses, stats.objects),
        (400, 400 + 200, 400)
    );
}

#[test]
fn multi_operations_of_any_size_give_each_element_its_result() {
    let host = Host::new();
    let server = host.serve(kvstore::server::ServerConfig {
        store_bytes: 64 << 20,
        ..config()
    });
    let mut client = host.client();
    let (table, _) = client.create_table("many").unwrap();
    let mut wild = host.client_with(ClientConfig {
        exactly_once: false,
        ..ClientConfig::default()
    });
    for (round, count) in [1usize, 30, 33, 100, 3000].into_iter().enumerate() {
        for client in [&mut client, &mut wild] {
            let keys: Vec<Vec<u8>> = (0..count)
                .map(|i| format!("{round} {i}").into_bytes())
                .collect();
            let values: Vec<Vec<u8>> = (0..count)
                .map(|i| pattern(if i % 50 == 7 { 6000 } else { i % 300 }, i))
                .collect();
            let of = |i: usize| Element {
                value: &values[i],
                ..Element::new(table, &keys[i])
            };
            let elements: Vec<_> = (0..count).map(of).collect();
            let written = client.multi(MultiOp::Write, &elements).unwrap();
            let bare: Vec<_> = keys.iter().map(|key| Element::new(table, key)).collect();
            let read = client.multi(MultiOp::Read, &bare).unwrap();
            for (i, (w, r)) in written.iter().zip(&read).enumerate() {
                let kvstore::client::MultiResult::Version(version) = *w.as_ref().unwrap() else {
                    panic!("{w:?}")
                };
                let value = values[i].clone();
                assert_eq!(
                    r.as_ref().unwrap(),
                    &kvstore::client::MultiResult::Value { version, value }
                );
            }
            let mut some = bare.clone();
            some.truncate(count.min(70));
            some.push(Element::new(table, b"missing"));
            some.push(Element::new(999, b"no table"));
            let removed = client.multi(MultiOp::Remove, &some).unwrap();
            let ok = removed.iter().filter(|r| r.is_ok()).count();
            assert_eq!(ok, count.min(70));
            let failures: Vec<_> = removed
                .iter()
                .filter_map(|r| r.as_ref().err()?.status())
                .collect();
            assert_eq!(failures, [Status::NotFound, Status::UnknownTable]);
            let numbers: Vec<_> = (0..40)
                .map(|i| Element {
                    by: Increment::I64(i),
                    ..Element::new(table, b"sum")
                })
                .collect();
            client.remove(table, b"sum").unwrap();
            let sums = client.multi(MultiOp::Increment, &numbers).unwrap();
            let last = sums.last().unwrap().as_ref().unwrap();
            assert!(
                matches!(
                    last,
                    kvstore::client::MultiResult::Incremented {
                        value: Increment::I64(780),
                        ..
                    }
                ),
                "{last:?}"
            );
        }
    }
    // Longer than shares a request, and longer than shares a reply.
    let large = pattern(MAX_VALUE_BYTES, 3);
    let elements = [
        Element {
            value: b"small",
            ..Element::new(0, b"s")
        },
        Element {
            value: &large,
            ..Element::new(0, b"l")
        },
        Element {
            rules: RejectRules::ABSENT,
            ..Element::new(0, b"none")
        },
    ];
    let written = client.multi(MultiOp::Write, &elements).unwrap();
    assert!(written[0].is_ok() && written[1].is_ok());
    assert_eq!(
        written[2],
        Err(ClientError::Rejected {
            reason: RejectReason::Absent,
            version: 0
        })
    );
    let read = client
        .multi(
            MultiOp::Read,
            &[Element::new(0, b"l"), Element::new(0, b"s")],
        )
        .unwrap();
    let lens: Vec<_> = read
        .into_iter()
        .map(|r| match r.unwrap() {
            kvstore::client::MultiResult::Value { value, .. } => value.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(lens, [MAX_VALUE_BYTES, 5]);
    drop((client, wild));
    assert!(server.stop().multis > 100);
}

#[test]
fn an_enumeration_sees_each_object_once_while_others_come_and_go() {
    let host = Host::new();
    let _server = host.serve_usual();
    let (mut client, mut other) = (host.client(), host.client());
    let (table, _) = client.create_table("t").unwrap();
    let stay = |i: u32| format!("stays {i}").into_bytes();
    for i in 0..2000 {
        let len = if i % 100 == 3 { 20_000 } else { 60 };
        client
            .write(table, &stay(i), &pattern(len, i as usize))
            .unwrap();
        client.write(0, &stay(i), b"of another table").unwrap();
    }
    let mut seen = std::collections::HashMap::<Vec<u8>, u32>::new();
    let (mut cursor, mut pages) = (Some(0), 0u32);
    while let Some(at) = cursor {
        let page = client.enumerate(table, at, 100).unwrap();
        assert!(page.objects.len() <= 100);
        for (key, object) in page.objects {
            if let Some(i) = key.strip_prefix(b"stays ") {
                let i: usize = std::str::from_utf8(i).unwrap().parse().unwrap();
                let len = if i % 100 == 3 { 20_000 } else { 60 };
                assert!(object.value == pattern(len, i));
            }
            *seen.entry(key).or_default() += 1;
        }
        pages += 1;
        other.write(table, &pages.to_le_bytes(), b"comes").unwrap();
        other
            .write(table, &stay(pages), &pattern(60, pages as usize))
            .ok();
        if pages % 100 == 3 {
            other
                .write(table, &stay(pages), &pattern(20_000, pages as usize))
                .unwrap();
        }
        cursor = page.next;
    }
    for i in 0..2000 {
        assert_eq!(seen.get(&stay(i)), Some(&1), "{i}");
    }
    let (mut keys, mut cursor) = (0, Some(0));
    while let Some(at) = cursor {
        let page = client.keys(0, at).unwrap();
        keys += page.keys.len();
        cursor = page.next;
    }
    assert_eq!(keys, 2000);
    assert!(client.keys(99, 0).is_err());
}

#[test]
fn statistics_say_what_was_done() {
    let host = Host::new();
    let _server = host.serve_usual();
    let mut client = host.client();
    for i in 0..500u32 {
        client.put(&i.to_le_bytes(), &[1; 100]).unwrap();
        client.get(&i.to_le_bytes()).unwrap();
    }
    client.get(b"missing").unwrap();
    client.remove(0, &1u32.to_le_bytes()).unwrap();
    client.increment(0, b"n", Increment::I64(1)).unwrap();
    let stats = client.stats().unwrap();
    assert_eq!(
        (
            stats.puts,
            stats.gets,
            stats.misses,
            stats.dels,
            stats.increments
        ),
        (500, 501, 1, 1, 1)
    );
    assert_eq!(
        (stats.objects, stats.tables, stats.connections, stats.leases),
        (500, 1, 1, 1)
    );
    assert!(
        stats.live_bytes > 500 * 132 && stats.utilisation_permille > 0,
        "{stats:?}"
    );
    let samples = client
        .execute(&Operation::Stats, |reply| match reply {
            Reply::Stats(stats) => Some(Class::ALL.map(|class| stats.times(class).total())),
            _ => None,
        })
        .unwrap();
    assert!(samples[0] + samples[1] >= 10, "{samples:?}");
    client.close().unwrap();
    let mut client = host.client();
    common::eventually("the lease was given back", || {
        client.stats().unwrap().leases == 1
    });
}
