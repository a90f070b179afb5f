//! Lost replies, lost connections, lost servers: what was asked for once is done once, or the client is told.

mod common;
mod engine_common;

use std::time::Duration;

use common::{Host, PATIENCE, PORT, Raw, config};
use engine_common::{Random, fresh_seeds};
use hyv_verbs::Gid;
use kvstore::client::{Client, ClientConfig, ClientError, Operation};
use kvstore::proto::{Hello, Key, Once, Reply, Request, Status, Value};
use kvstore::server::ServerConfig;
use kvstore::store::{Increment, NEVER, RejectRules};

fn increments_are_executed_once_however_often_the_connection_is_lost(seed: u64) {
    let host = Host::new();
    let server = host.serve_usual();
    let mut client = host.client();
    let mut random = Random(seed);
    let mut sum = 0i64;
    let mut failed = Vec::new();
    for round in 0..150 {
        let count = 1 + random.below(16);
        for _ in 0..count {
            let by = Increment::I64(1 + random.below(5) as i64);
            match client.submit(&Operation::increment(0, b"sum", by)) {
                Ok(_) => sum += by.bits() as i64,
                Err(ClientError::WindowFull) => break,
                Err(e) => panic!("{e}"),
            }
        }
        // Somewhere between none of them executed and all of them answered.
        for _ in 0..random.below(3000) {
            std::hint::spin_loop();
        }
        if round % 3 != 0 {
            client.reconnect();
        }
        let mut done = 0;
        while client.outstanding() > 0 {
            done += client
                .wait(|_, reply| {
                    if let Err(e) = reply {
                        failed.push(e);
                    }
                })
                .unwrap();
        }
        assert!(done <= count as usize && failed.is_empty(), "{failed:?}");
    }
    let got = client.increment(0, b"sum", Increment::I64(0)).unwrap();
    assert_eq!(got.value, Increment::I64(sum));
    // A connection that is still being made is not cut again.
    assert!(
        (50..=100).contains(&client.reconnects()),
        "{} of 100",
        client.reconnects()
    );
    let stats = client.stats().unwrap();
    assert!(stats.duplicates > 0, "no reply was ever lost: {stats:?}");
    assert_eq!((stats.leases, stats.connections), (1, 1));
    drop(client);
    server.stop();
}

fn operations_of_every_kind_survive_a_lost_connection(seed: u64) {
    let host = Host::new();
    let _server = host.serve_usual();
    let mut client = host.client();
    let mut random = Random(seed);
    let large = vec![7u8; 300_000];
    let (table, _) = client.create_table("t").unwrap();
    for round in 0u32..60 {
        let key = round.to_le_bytes();
        client.write(table, &key, b"before").unwrap();
        client.write(table, b"gone", b"soon").unwrap();
        let version = client.read(table, &key).unwrap().unwrap().version;
        let fresh = RejectRules::unless_version(version);
        let operations = [
            Operation::Write {
                table,
                key: &key,
                value: &large,
                rules: fresh,
                expires: NEVER,
            },
            Operation::remove(table, b"gone"),
            Operation::Write {
                table,
                key: b"only once",
                value: b"v",
                rules: RejectRules::EXISTS,
                expires: NEVER,
            },
            Operation::read(table, &key),
            Operation::Enumerate {
                table,
                cursor: 0,
                limit: 0,
                values: true,
            },
            Operation::CreateTable { name: "t" },
        ];
        client.remove(table, b"only once").unwrap();
        let tickets: Vec<_> = operations
            .iter()
            .map(|o| client.submit(o).unwrap())
            .collect();
        for _ in 0..random.below(20_000) {
            std::hint::spin_loop();
        }
        client.reconnect();
        while client.outstanding() > 0 {
            client
                .wait(|ticket, reply| {
                    let which = tickets.iter().position(|t| *t == ticket).unwrap();
                    match (which, reply.unwrap_or_else(|e| panic!("{which}: {e}"))) {
                        // Had one of them been executed twice, its rule would have refused the second time.
                        (0 | 2, Reply::Version(v)) => assert!(v > 0),
                        (1, Reply::Version(_)) | (3, Reply::Value { .. }) | (4, Reply::Page(_)) => {
                        }
                        (5, Reply::Table { id, created: false }) => assert_eq!(id, table),
                        (which, other) => panic!("{which}: {other:?}"),
                    }
                })
                .unwrap();
        }
        assert!(client.read(table, &key).unwrap().unwrap().value == large);
        assert_eq!(client.read(table, b"gone").unwrap(), None);
    }
}

#[test]
fn a_server_that_lost_its_memory_is_told_from_one_that_was_out_of_reach() {
    let host = Host::new();
    let server = host.serve_usual();
    let mut client = host.client();
    let (table, _) = client.create_table("t").unwrap();
    client.write(table, b"k", b"v").unwrap();
    let epoch = client.server_epoch();
    server.stop();
    // Submitted while there is no server; nobody knows whether it was executed, and it never will be.
    let ticket = client
        .submit(&Operation::increment(0, b"n", Increment::I64(1)))
        .unwrap();
    let again = host.serve(ServerConfig {
        seed: 2,
        ..config()
    });
    let mut ended = None;
    while ended.is_none() {
        client
            .wait(|t, reply| ended = Some((t, reply.map(|_| ()))))
            .unwrap();
    }
    assert_eq!(ended, Some((ticket, Err(ClientError::ServerRestarted))));
    assert_ne!(client.server_epoch(), epoch);
    // Until the caller has understood.
    assert_eq!(
        client.read(table, b"k").unwrap_err(),
        ClientError::ServerRestarted
    );
    client.accept_restart();
    assert_eq!(
        client.read(table, b"k").unwrap_err().status(),
        Some(Status::UnknownTable)
    );
    assert_eq!(
        client.increment(0, b"n", Increment::I64(1)).unwrap().value,
        Increment::I64(1)
    );
    let stats = again.stop();
    assert_eq!(stats.increments, 1);
}

#[test]
fn a_server_that_is_gone_is_given_up_with_every_request_told() {
    let host = Host::new();
    let server = host.serve_usual();
    let config = ClientConfig {
        timeout: PATIENCE,
        reconnect: Some(Duration::from_millis(300)),
        ..ClientConfig::default()
    };
    let mut client = host.client_with(config);
    let mut without = host.client_with(ClientConfig {
        reconnect: None,
        ..config
    });
    client.put(b"k", b"v").unwrap();
    server.stop();
    for client in [&mut client, &mut without] {
        client.submit(&Operation::get(b"k")).unwrap();
        client.submit(&Operation::put(b"k", b"w")).unwrap();
        let mut told = 0;
        let end = loop {
            match client.wait(|_, reply| {
                assert!(reply.is_err());
                told += 1;
            }) {
                Ok(_) => {}
                Err(e) => break e,
            }
        };
        assert_eq!((told, client.outstanding()), (2, 0), "{end}");
        assert!(
            matches!(
                end,
                ClientError::NoServer { .. } | ClientError::Disconnected(_)
            ),
            "{end:?}"
        );
        assert_eq!(
            client.get(b"k").unwrap_err(),
            end,
            "and so is every further call"
        );
    }
}

#[test]
fn what_is_not_to_be_executed_once_is_not_repeated() {
    let host = Host::new();
    let _server = host.serve_usual();
    let mut client = host.client_with(ClientConfig {
        exactly_once: false,
        timeout: PATIENCE,
        ..ClientConfig::default()
    });
    let (mut answered, mut unknown) = (0, 0);
    while unknown == 0 {
        assert!(answered < 10_000, "replies outrun every lost connection");
        let write = Operation::increment(0, b"n", Increment::I64(1));
        let (write, read) = (
            client.submit(&write).unwrap(),
            client.submit(&Operation::get(b"m")).unwrap(),
        );
        client.reconnect();
        while client.outstanding() > 0 {
            let each = |ticket, reply: Result<Reply<'_>, ClientError>| match reply {
                Ok(_) if ticket == write => answered += 1,
                Err(ClientError::OutcomeUnknown) if ticket == write => unknown += 1,
                Err(e) if ticket == read && e.status() == Some(Status::NotFound) => {}
                other => panic!("{other:?}"),
            };
            client.wait(each).unwrap();
        }
    }
    let got = client.increment(0, b"n", Increment::I64(0)).unwrap();
    let executed = got.value.bits();
    assert!(
        (answered..=answered + unknown).contains(&executed),
        "{executed}"
    );
    assert_eq!(client.stats().unwrap().leases, 0);
}

#[test]
fn a_retry_gets_the_result_that_was_kept_and_nothing_else() {
    let host = Host::new();
    let _server = host.serve_usual();
    let context = host.user("raw", 16 << 20);
    let mut raw = Raw::new(&context);
    let increment = |sequence, first_incomplete| Request::Increment {
        table: 0,
        key: Key::Inline(b"n"),
        by: Increment::I64(10),
        rules: RejectRules::NONE,
        once: Some(Once {
            sequence,
            first_incomplete,
        }),
    };
    let ask = |raw: &mut Raw, request: &Request<'_>| {
        raw.request(3, request);
        let (imm, bytes) = raw.reply().expect("a reply");
        let (tag, reply) = Reply::parse(imm, &bytes).unwrap();
        assert_eq!(tag, 3);
        match reply {
            Reply::Incremented { bits, .. } => Ok(bits),
            Reply::Version(version) => Ok(version),
            Reply::Error { status, detail } => Err((status, detail)),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ask(&mut raw, &increment(1, 1)), Ok(10));
    assert_eq!(ask(&mut raw, &increment(1, 1)), Ok(10), "the kept result");
    assert_eq!(ask(&mut raw, &increment(2, 1)), Ok(20));
    // A refusal is a result, too: it stays one when the reason is gone.
    let only_new = |sequence| Request::Write {
        table: 0,
        key: Key::Inline(b"n"),
        value: Value::Inline(b"xyz"),
        rules: RejectRules::EXISTS,
        expires: NEVER,
        once: Some(Once {
            sequence,
            first_incomplete: 1,
        }),
    };
    let refused = ask(&mut raw, &only_new(3)).unwrap_err();
    assert_eq!(refused.0, Status::RejectedExists);
    let of_no_table = |sequence| Request::Remove {
        table: 55,
        key: Key::Inline(b"n"),
        rules: RejectRules::NONE,
        once: Some(Once {
            sequence,
            first_incomplete: 1,
        }),
    };
    assert_eq!(
        ask(&mut raw, &of_no_table(4)),
        Err((Status::UnknownTable, 0))
    );
    let remove = |sequence, first_incomplete| Request::Remove {
        table: 0,
        key: Key::Inline(b"n"),
        rules: RejectRules::NONE,
        once: Some(Once {
            sequence,
            first_incomplete,
        }),
    };
    let removed = ask(&mut raw, &remove(5, 1)).unwrap();
    assert_eq!(ask(&mut raw, &only_new(3)), Err(refused));
    // On another connection of the same client as well; the former one is closed.
    let hello = Hello {
        lease: true,
        client: raw.welcome.client,
    };
    let mut later = Raw::connect(&context, &hello.to_bytes(), 4).unwrap();
    assert!(later.welcome.known);
    assert_eq!(later.welcome.client, raw.welcome.client);
    common::eventually("the former connection ends", || raw.ended());
    assert_eq!(ask(&mut later, &remove(5, 1)), Ok(removed));
    assert_eq!(
        ask(&mut later, &of_no_table(4)),
        Err((Status::UnknownTable, 0))
    );
    // What is acknowledged is forgotten; what is too far ahead is refused.
    assert_eq!(ask(&mut later, &remove(6, 6)), Err((Status::NotFound, 0)));
    assert_eq!(ask(&mut later, &increment(1, 1)), Err((Status::Stale, 0)));
    assert_eq!(ask(&mut later, &increment(70, 70 - 63)), Ok(10));
    assert_eq!(ask(&mut later, &increment(71, 71 - 63)), Ok(20));
    // A client that the server does not know gets another id.
    let hello = Hello {
        lease: true,
        client: 12345,
    };
    let stranger = Raw::connect(&context, &hello.to_bytes(), 4).unwrap();
    assert!(!stranger.welcome.known && stranger.welcome.client != 12345);
    // Without a lease nothing is executed once.
    let hello = Hello {
        lease: false,
        client: 0,
    };
    let mut without = Raw::connect(&context, &hello.to_bytes(), 4).unwrap();
    assert_eq!(
        ask(&mut without, &increment(1, 1)),
        Err((Status::NoLease, 0))
    );
}

#[test]
fn nobody_there_says_so() {
    let host = Host::new();
    let context = host.user("client", 16 << 20);
    let error = Client::connect(&context, Gid::LOCAL, PORT, PATIENCE).unwrap_err();
    assert_eq!(error, ClientError::NoServer { port: PORT });
    let _server = host.serve(ServerConfig {
        max_connections: 1,
        ..config()
    });
    let _first = host.client();
    let error = Client::connect(&context, Gid::LOCAL, PORT, PATIENCE).unwrap_err();
    assert!(matches!(error, ClientError::Refused(_)), "{error}");
}

fresh_seeds! {
    increments_are_executed_once_however_often_the_connection_is_lost
    operations_of_every_kind_survive_a_lost_connection
}
