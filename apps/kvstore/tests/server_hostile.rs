//! Clients that send nonsense, too much, or take nothing; and very many of them. Nobody else notices.

mod common;

use std::sync::atomic::Ordering;

use common::{Host, Raw, config, eventually};
use hyv_verbs::{Context, Error};
use kvstore::client::{ClientConfig, ClientError, Operation};
use kvstore::proto::{
    Element, Elements, Hello, Key, MAX_PROBE_ROUNDS, MAX_REPLY_BYTES, MultiOp, PROTOCOL_VERSION,
    Refusal, RemoteBuffer, Reply, Request, Results, Status, Value, emit_element,
};
use kvstore::server::{ServerConfig, limits};
use kvstore::store::{NEVER, RejectRules};

fn read(key: &[u8]) -> Request<'_> {
    Request::Read {
        table: 0,
        key: Key::Inline(key),
        rules: RejectRules::NONE,
        buffer: None,
    }
}

fn answer(raw: &mut Raw, request: &Request<'_>) -> Result<(), (Status, u64)> {
    raw.request(9, request);
    let (imm, bytes) = raw.reply().expect("a reply");
    match Reply::parse(imm, &bytes).unwrap() {
        (9, Reply::Error { status, detail }) => Err((status, detail)),
        (9, _) => Ok(()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn nonsense_is_answered_or_ends_its_connection_and_no_other() {
    let host = Host::new();
    let server = host.serve_usual();
    let mut good = host.client();
    good.put(b"k", b"v").unwrap();
    let context = host.user("raw", 64 << 20);
    let mut raw = Raw::new(&context);
    let mut status = |bytes: &[u8]| {
        raw.send(bytes);
        let (imm, reply) = raw.reply().expect("an answer");
        match Reply::parse(imm, &reply).unwrap() {
            (tag, Reply::Error { status, .. }) => (tag, status),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(status(&[0, 0, 0, 0, 5, 0]), (5, Status::Unsupported));
    assert_eq!(status(&[1, 0, 0, 0, 6, 0]), (6, Status::EmptyKey));
    assert_eq!(status(&[1, 0, 9, 0, 7, 0, b'k']), (7, Status::Malformed));
    assert_eq!(status(&[1, 255, 1, 0, 8, 0, b'k']), (8, Status::Malformed));
    assert_eq!(status(&[2, 4, 1, 0, 8, 0, b'k']), (8, Status::Malformed));
    assert_eq!(status(&[9, 0, 1, 0, 8, 0, 7]), (8, Status::TableName));
    // Bytes from anywhere, a connection each time one ends.
    let mut x = 88_172_645_463_325_252u64;
    let mut connections = 1;
    for round in 0..3000 {
        let mut bytes = [0; 120];
        for byte in &mut bytes {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            *byte = x as u8;
        }
        let len = 1 + x as usize % 119;
        // Not a probe: it would keep the server for its whole time limit.
        bytes[0] = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 16, 17, 18, 19, 77][round % 17];
        bytes[1] &= if round % 2 == 0 { 0xff } else { 0x4f };
        bytes[3] = 0;
        raw.send(&bytes[..len]);
        if raw.reply().is_none() {
            raw = Raw::new(&context);
            connections += 1;
        }
    }
    println!("{connections} connections");
    assert_eq!(good.get(b"k").unwrap().unwrap().value, b"v");
    drop(raw);
    eventually("only the good one is left", || {
        good.stats().unwrap().connections == 1
    });
    server.stop();
}

#[test]
fn memory_that_is_not_the_clients_is_not_touched() {
    let host = Host::new();
    let _server = host.serve_usual();
    let mut good = host.client();
    good.put(b"large", &vec![7; 100_000]).unwrap();
    let context = host.user("raw", 64 << 20);
    let nowhere = RemoteBuffer {
        addr: 0x1000,
        rkey: 0x1234,
        len: 50_000,
    };
    let requests = [
        Request::Read {
            table: 0,
            key: Key::Inline(b"large"),
            rules: RejectRules::NONE,
            buffer: Some(RemoteBuffer {
                len: 1 << 20,
                ..nowhere
            }),
        },
        Request::Write {
            table: 0,
            key: Key::Inline(b"k"),
            value: Value::Remote(nowhere),
            rules: RejectRules::NONE,
            expires: NEVER,
            once: None,
        },
        read(b"k").with_key(Key::Remote(nowhere)),
        Request::Enumerate {
            table: 0,
            cursor: 0,
            limit: 0,
            values: true,
            buffer: Some(nowhere),
        },
        Request::Multi {
            op: MultiOp::Read,
            count: 9,
            elements: Elements::Remote(nowhere),
            once: None,
            buffer: Some(nowhere),
        },
    ];
    for request in requests {
        let mut raw = Raw::new(&context);
        raw.request(1, &request);
        while raw.reply().is_some() {}
    }
    // Not even with the key to the store's memory: it is for READs.
    let mut raw = Raw::new(&context);
    let log = raw.welcome.log.unwrap();
    let to = hyv_verbs::RemoteAddr {
        addr: log.addr,
        rkey: log.rkey,
    };
    let sges = [raw.mr.sge(0, 64)];
    let write = hyv_verbs::SendWr::new(
        u64::MAX,
        hyv_verbs::SendOp::Write(to),
        hyv_verbs::Payload::Sges(&sges),
    );
    raw.qp.post_send(&write).unwrap();
    assert_eq!(raw.reply(), None, "the connection ends");
    eventually("all of them are gone", || {
        good.stats().unwrap().connections == 1
    });
    assert_eq!(good.get(b"k").unwrap(), None);
    assert_eq!(good.get(b"large").unwrap().unwrap().value.len(), 100_000);
    assert_eq!(
        good.stats().unwrap().pending_bytes,
        0,
        "nothing stays reserved"
    );
}

#[test]
fn who_sends_more_than_the_window_is_disconnected_and_the_others_are_served() {
    let host = Host::new();
    let server = host.serve_usual();
    let mut good = host.client();
    good.put(b"k", b"v").unwrap();
    let context = host.user("raw", 64 << 20);
    for _ in 0..20 {
        // No receives: replies cannot leave, so requests pile up.
        let hello = Hello {
            lease: false,
            client: 0,
        };
        let mut raw = Raw::connect(&context, &hello.to_bytes(), 0).unwrap();
        for tag in 0..60 {
            raw.request(tag, &read(b"k"));
            assert_eq!(good.get(b"k").unwrap().unwrap().value, b"v");
        }
        eventually("it is disconnected", || raw.ended());
    }
    eventually("all of them were expelled", || {
        server.seen.expelled.load(Ordering::Relaxed) >= 20
    });
    let stats = server.stop();
    assert_eq!(stats.accepted, 21);
}

#[test]
fn who_takes_no_replies_is_given_up_and_pins_nothing() {
    let host = Host::new();
    let server = host.serve_usual();
    let mut good = host.client();
    let context = host.user("raw", 64 << 20);
    let hello = Hello {
        lease: true,
        client: 0,
    };
    let mut stuck = Raw::connect(&context, &hello.to_bytes(), 0).unwrap();
    good.put(b"k", &[1; 2000]).unwrap();
    for tag in 0..16 {
        stuck.request(tag, &read(b"k"));
    }
    // Meanwhile the store is overwritten several times over, though that client's replies hold one of its segments.
    let value = vec![3; 100_000];
    for i in 0..1500u32 {
        good.put(&(i % 40).to_le_bytes(), &value).unwrap();
    }
    eventually("it is given up", || stuck.ended());
    assert_eq!(good.stats().unwrap().expelled, 1);
    drop(good);
    server.stop();
}

#[test]
fn a_full_store_refuses_writes_and_goes_on() {
    let host = Host::new();
    let server = host.serve(ServerConfig {
        store_bytes: 16 << 20,
        ..config()
    });
    let mut client = host.client();
    let value = vec![5; 50_000];
    let mut stored = 0u32;
    let error = loop {
        match client.put(&stored.to_le_bytes(), &value) {
            Ok(_) => stored += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(error.status(), Some(Status::Full), "{error}");
    let elements: Vec<_> = [1u32, 2, 3].map(|i| i.to_le_bytes()).into();
    let reads: Vec<_> = elements.iter().map(|key| Element::new(0, key)).collect();
    assert!(
        client
            .multi(MultiOp::Read, &reads)
            .unwrap()
            .iter()
            .all(Result::is_ok)
    );
    for i in 0..stored {
        assert_eq!(client.get(&i.to_le_bytes()).unwrap().unwrap().value, value);
    }
    for i in 0..stored / 2 {
        assert!(client.remove(0, &i.to_le_bytes()).unwrap().is_some());
    }
    for i in 0..stored / 3 {
        client.put(&i.to_le_bytes(), &value).unwrap();
    }
    assert_eq!(
        server.stop().objects,
        u64::from(stored - stored / 2 + stored / 3)
    );
}

#[test]
fn elements_that_cannot_be_followed_fail_alone_with_those_behind_them() {
    let host = Host::new();
    let _server = host.serve_usual();
    let context = host.user("raw", 16 << 20);
    let mut raw = Raw::new(&context);
    let mut packed = vec![0; 200];
    let first = Element {
        value: b"v",
        ..Element::new(0, b"first")
    };
    let len = emit_element(MultiOp::Write, &first, &mut packed).unwrap();
    // The second is cut off.
    let again = emit_element(MultiOp::Write, &first, &mut packed[len..]).unwrap();
    let bytes = &packed[..len + again - 3];
    raw.request(
        4,
        &Request::Multi {
            op: MultiOp::Write,
            count: 3,
            elements: Elements::Inline(bytes),
            once: None,
            buffer: None,
        },
    );
    let (imm, reply) = raw.reply().unwrap();
    let (_, Reply::Results(results)) = Reply::parse(imm, &reply).unwrap() else {
        panic!("no results");
    };
    let results = Results::parse(MultiOp::Write, 3, results).unwrap();
    let text: Vec<_> = results.iter().map(|r| format!("{r:?}")).collect();
    assert!(text[0].starts_with("Version"), "{text:?}");
    assert!(
        text[1].contains("Malformed") && text[2].contains("Malformed"),
        "{text:?}"
    );
    assert_eq!(answer(&mut raw, &read(b"first")), Ok(()));
    // More results than the reply has room for.
    let packed = vec![0; 4000];
    let many = Request::Multi {
        op: MultiOp::Increment,
        count: 1000,
        elements: Elements::Inline(&packed),
        once: None,
        buffer: None,
    };
    assert_eq!(
        answer(&mut raw, &many),
        Err((Status::TooLargeForEager, 17_000))
    );
    const { assert!(17_000 > MAX_REPLY_BYTES && MAX_PROBE_ROUNDS > 0) }
}

#[test]
fn greetings_that_make_no_sense_are_refused_with_the_reason() {
    let host = Host::new();
    let _server = host.serve_usual();
    let context = host.user("raw", 64 << 20);
    let refusal = |context: &Context, hello: &[u8]| match Raw::connect(context, hello, 1) {
        Err(Error::Rejected { private, .. }) => {
            assert_eq!(private[1], PROTOCOL_VERSION);
            Refusal::parse(&private)
        }
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("it was accepted"),
    };
    assert_eq!(refusal(&context, &[]), Some(Refusal::Version));
    assert_eq!(refusal(&context, &[1]), Some(Refusal::Version));
    let mut hello = Hello {
        lease: true,
        client: 0,
    }
    .to_bytes();
    for at in [1, 5] {
        hello[at] = 0x80;
        assert_eq!(refusal(&context, &hello), Some(Refusal::Malformed));
        hello[at] = 0;
    }
}

#[test]
fn a_thousand_clients_at_once_are_all_served_in_bounded_memory() {
    const CLIENTS: usize = 1000;
    let host = Host::new();
    let server = host.serve(ServerConfig {
        max_connections: 1024,
        ..config()
    });
    let mut good = host.client_with(ClientConfig {
        timeout: common::PATIENCE,
        ..ClientConfig::default()
    });
    let hello = Hello {
        lease: true,
        client: 0,
    }
    .to_bytes();
    // Ten processes with a hundred connections each.
    let contexts: Vec<Context> = (0..10).map(|_| host.user("crowd", 64 << 20)).collect();
    let mut crowd = Vec::new();
    for i in 0..CLIENTS - 1 {
        crowd.push(Raw::connect(&contexts[i % 10], &hello, 2).unwrap());
    }
    let stats = good.stats().unwrap();
    assert_eq!(stats.connections, CLIENTS as u64, "{stats:?}");
    for (i, raw) in crowd.iter_mut().enumerate() {
        let key = (i as u32).to_le_bytes();
        let write = Request::Write {
            table: 0,
            key: Key::Inline(&key),
            value: Value::Inline(&[i as u8; 100]),
            rules: RejectRules::NONE,
            expires: NEVER,
            once: None,
        };
        // Two each: all that the last windows allow.
        raw.request(1, &write);
        raw.request(2, &read(&key));
    }
    for (i, raw) in crowd.iter_mut().enumerate() {
        for _ in 0..2 {
            let (imm, bytes) = raw.reply().expect("a reply");
            match Reply::parse(imm, &bytes).unwrap() {
                (1, Reply::Version(_)) => {}
                (2, Reply::Value { value, .. }) => assert_eq!(value, [i as u8; 100]),
                other => panic!("{other:?}"),
            }
        }
    }
    let stats = good.stats().unwrap();
    let each = stats.connection_bytes / CLIENTS as u64;
    println!("{each} bytes registered for each of {CLIENTS} clients");
    assert!(each < 28 << 10, "{each} bytes a client");
    assert!(stats.connection_bytes <= limits::memory_for(1024) as u64);
    assert_eq!(
        (stats.objects, stats.leases),
        (CLIENTS as u64 - 1, CLIENTS as u64)
    );
    // One too many for the server's limit, then room again.
    let mut last = Vec::new();
    loop {
        match Raw::connect(&contexts[0], &hello, 1) {
            Ok(raw) => last.push(raw),
            Err(Error::Rejected { private, .. }) => {
                assert_eq!(Refusal::parse(&private), Some(Refusal::TooMany));
                break;
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert_eq!(last.len(), 24);
    drop((crowd, last));
    eventually("they are all gone", || {
        good.stats().unwrap().connections == 1
    });
    assert_eq!(
        good.stats().unwrap().connection_bytes,
        stats.connection_bytes
    );
    for round in 0..50u32 {
        good.put(&round.to_le_bytes(), b"and on it goes").unwrap();
    }
    drop(good);
    assert_eq!(server.stop().expelled, 0);
}

#[test]
fn clients_that_come_and_go_by_the_thousand_leave_room_for_others() {
    let host = Host::new();
    let server = host.serve_usual();
    let context = host.user("crowd", 16 << 20);
    let hello = Hello {
        lease: true,
        client: 0,
    }
    .to_bytes();
    let mut first = host.client();
    first.put(b"k", b"v").unwrap();
    for _ in 0..kvstore::limits::MAX_LEASES + 100 {
        // Those that have just left may not all be gone.
        eventually("there is room", || {
            match Raw::connect(&context, &hello, 1) {
                Ok(_) => true,
                Err(Error::Rejected { private, .. }) => {
                    assert_eq!(Refusal::parse(&private), Some(Refusal::TooMany));
                    false
                }
                Err(e) => panic!("{e}"),
            }
        });
    }
    // Whoever is connected keeps its own.
    first.put(b"k", b"w").unwrap();
    let stats = first.stats().unwrap();
    assert_eq!(stats.leases, kvstore::limits::MAX_LEASES as u64);
    drop(first);
    server.stop();
}

#[test]
fn many_threads_of_clients_share_a_server() {
    let host = Host::new();
    let server = host.serve_usual();
    std::thread::scope(|scope| {
        for t in 0..6u64 {
            let mut client = host.client();
            scope.spawn(move || {
                for i in 0..300u64 {
                    client
                        .increment(0, b"shared", kvstore::store::Increment::I64(1))
                        .unwrap();
                    let key = ((t << 32) | (i % 50)).to_le_bytes();
                    client.put(&key, &i.to_le_bytes()).unwrap();
                    let object = client.read_one_sided(0, &key).unwrap().unwrap();
                    assert_eq!(object.value, i.to_le_bytes(), "one's own write is seen");
                    if i % 60 == 7 {
                        client.reconnect();
                    }
                    match client.submit(&Operation::Ping) {
                        Ok(_) | Err(ClientError::WindowFull) => {}
                        Err(e) => panic!("{e}"),
                    }
                    while client.outstanding() > 0 {
                        client
                            .wait(|_, reply| assert!(reply.is_ok(), "{reply:?}"))
                            .unwrap();
                    }
                }
                client.close().unwrap();
            });
        }
    });
    let mut client = host.client();
    let sum = client
        .increment(0, b"shared", kvstore::store::Increment::I64(0))
        .unwrap();
    assert_eq!(sum.value, kvstore::store::Increment::I64(1800));
    drop(client);
    server.stop();
}

#[test]
fn a_server_ends_in_order_beside_a_client_that_died_before_its_connection_stood() {
    use hyv_verbs::cm::{ConnParam, EventChannel};
    use hyv_verbs::{CmEventKind, Gid, QpCaps};

    let host = Host::new();
    let mut server = host.server(config());
    let context = host.user("dying", 16 << 20);
    let channel = EventChannel::new(&context);
    let mut id = channel.create_id().unwrap();
    let happened = |kind| {
        eventually("an event", || {
            channel
                .poll_event()
                .unwrap()
                .is_some_and(|e| e.kind == kind)
        });
    };
    id.resolve_addr(Gid::LOCAL, common::PORT, common::PATIENCE)
        .unwrap();
    happened(CmEventKind::AddrResolved);
    id.resolve_route(common::PATIENCE).unwrap();
    happened(CmEventKind::RouteResolved);
    let pd = context.alloc_pd().unwrap();
    let cq = context.create_cq(64).unwrap();
    id.create_qp(&pd, &cq, &cq, &QpCaps::default()).unwrap();
    let hello = Hello {
        lease: true,
        client: 0,
    };
    id.connect(&ConnParam {
        private_data: &hello.to_bytes(),
        ..ConnParam::default()
    })
    .unwrap();
    eventually("the server's answer", || {
        server.poll_connections().unwrap();
        server.counters().connections == 1
    });
    // It goes without having seen the answer, and the server has not heard of that.
    drop(id);
    server.close().unwrap();
}
