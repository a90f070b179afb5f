//! The messages: golden bytes, round trips, truncations, and bytes from anywhere.

use kvstore::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_RESULTS, MAX_VALUE_BYTES};
use kvstore::proto::*;
use kvstore::store::{CleanerMode, Config, Increment, NEVER, RejectRules, Store, Write};
use proptest::prelude::*;

fn bytes(range: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Vec<u8>> {
    (range, any::<u8>()).prop_map(|(len, start)| (0..len).map(|n| (n as u8) ^ start).collect())
}

fn buffer(len: std::ops::RangeInclusive<u32>) -> impl Strategy<Value = RemoteBuffer> {
    (any::<u64>(), any::<u32>(), len).prop_map(|(addr, rkey, len)| RemoteBuffer { addr, rkey, len })
}

fn rules() -> impl Strategy<Value = RejectRules> {
    let version = prop::option::of(any::<u64>());
    (any::<bool>(), any::<bool>(), version.clone(), version).prop_map(
        |(exists, absent, at_most, other_than)| RejectRules {
            exists,
            absent,
            at_most,
            other_than,
        },
    )
}

fn once() -> impl Strategy<Value = Once> {
    (1..u64::MAX - 70, 0..MAX_RESULTS as u64).prop_map(|(first_incomplete, ahead)| Once {
        sequence: first_incomplete + ahead,
        first_incomplete,
    })
}

fn number() -> impl Strategy<Value = Increment> {
    prop_oneof![
        any::<i64>().prop_map(Increment::I64),
        any::<f64>()
            .prop_filter("NaN equals nothing", |f| !f.is_nan())
            .prop_map(Increment::F64),
    ]
}

/// What owns the bytes that a request borrows.
#[derive(Debug, Clone)]
struct Parts {
    op: u8,
    table: u32,
    key: Vec<u8>,
    remote: Option<RemoteBuffer>,
    value: Vec<u8>,
    buffer: Option<RemoteBuffer>,
    rules: RejectRules,
    once: Option<Once>,
    expires: u64,
    by: Increment,
    number: u64,
    name: String,
}

const KINDS: u8 = 15;

fn parts() -> impl Strategy<Value = Parts> {
    let first = (
        0..KINDS,
        prop_oneof![Just(0u32), any::<u32>()],
        prop_oneof![3 => bytes(1..=40), 1 => bytes(1..=EAGER_KEY_BYTES)],
        prop::option::of(buffer(1..=65_535)),
        prop_oneof![3 => bytes(4..=200), 1 => bytes(4..=EAGER_VALUE_BYTES)],
        prop::option::of(buffer(0..=MAX_VALUE_BYTES as u32)),
    );
    let second = (
        prop_oneof![Just(RejectRules::NONE), rules()],
        prop::option::of(once()),
        prop_oneof![Just(NEVER), any::<u64>()],
        number(),
        any::<u64>(),
        "[a-zäö ]{1,60}",
    );
    (first, second).prop_map(
        |((op, table, key, remote, value, buffer), (rules, once, expires, by, number, name))| {
            Parts {
                op,
                table,
                key,
                remote,
                value,
                buffer,
                rules,
                once,
                expires,
                by,
                number,
                name,
            }
        },
    )
}

impl Parts {
    fn request(&self) -> Request<'_> {
        let key = self.remote.map_or(Key::Inline(&self.key), Key::Remote);
        let &Self {
            table,
            buffer,
            rules,
            once,
            expires,
            by,
            ..
        } = self;
        let name = &self.name;
        match self.op {
            0 => Request::Read {
                table,
                key,
                rules,
                buffer,
            },
            1 => Request::Write {
                table,
                key,
                value: buffer.map_or(Value::Inline(&self.value), Value::Remote),
                rules,
                expires,
                once,
            },
            2 => Request::Remove {
                table,
                key,
                rules,
                once,
            },
            3 => Request::Increment {
                table,
                key,
                by,
                rules,
                once,
            },
            4 => Request::Enumerate {
                table,
                cursor: self.number,
                limit: self.number as u16,
                values: self.number & 1 << 20 != 0,
                buffer,
            },
            5 => {
                let op = MultiOp::ALL[self.number as usize % 4];
                Request::Multi {
                    op,
                    count: 1,
                    elements: match self.remote.filter(|remote| remote.len >= 4) {
                        Some(remote) => Elements::Remote(remote),
                        None => Elements::Inline(&self.value),
                    },
                    once: once.filter(|_| op != MultiOp::Read),
                    buffer,
                }
            }
            6 => Request::CreateTable { name },
            7 => Request::DropTable { table },
            8 => Request::FindTable { name },
            9 => Request::Tables {
                after: Some(table).filter(|table| *table != u32::MAX),
                buffer,
            },
            10 => Request::Stats,
            11 => Request::Ping,
            12 => Request::EndLease,
            13 => Request::Cleaner {
                mode: CleanerMode::from_raw(self.number as u8 % 3).unwrap(),
            },
            _ => Request::Probe {
                rounds: 1 + self.number as u32 % MAX_PROBE_ROUNDS,
            },
        }
    }
}

/// Whether the last field of a request goes on to the end of its message, so that a shorter message is another request.
fn ends_open(request: &Request<'_>) -> bool {
    matches!(
        request,
        Request::Write {
            value: Value::Inline(_),
            ..
        } | Request::Multi {
            elements: Elements::Inline(_),
            ..
        }
    )
}

fn element() -> impl Strategy<Value = (u32, Vec<u8>, Vec<u8>, RejectRules, u64, Increment)> {
    (
        prop_oneof![Just(0u32), any::<u32>()],
        bytes(1..=60),
        bytes(0..=90),
        prop_oneof![Just(RejectRules::NONE), rules()],
        prop_oneof![Just(NEVER), any::<u64>()],
        number(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_survive_the_trip_and_every_truncation_is_noticed(parts in parts(), tag: u16) {
        let request = parts.request();
        let mut out = [0xee; MAX_REQUEST_BYTES];
        let len = request.emit(tag, &mut out).unwrap();
        prop_assert_eq!(Request::parse(&out[..len]), Ok((tag, request)));
        prop_assert_eq!(request_tag(&out[..len]), Some(tag));
        for short in 0..len {
            match Request::parse(&out[..short]) {
                Err(_) => {}
                Ok((_, cut)) => prop_assert!(
                    ends_open(&request) && cut.op() == request.op() && cut != request,
                    "cut at {} of {}: {:?}", short, len, cut
                ),
            }
            prop_assert_eq!(request.emit(tag, &mut vec![0; short]), Err(ProtoError::NoRoom { available: short }));
        }
        if !ends_open(&request) {
            prop_assert_eq!(Request::parse(&out[..len + 1]), Err(ProtoError::Trailing { bytes: 1 }));
        }
    }

    #[test]
    fn any_bytes_parse_or_fail_and_what_parses_is_what_would_be_sent(
        mut input in prop::collection::vec(any::<u8>(), 0..200),
        op in 0u8..22,
        flags: u8,
        key_len in 0u8..30,
    ) {
        for tamed in [false, true] {
            if tamed && input.len() >= 4 {
                // Far enough into the parser to matter.
                input[..4].copy_from_slice(&[op, flags, key_len, 0]);
            }
            if let Ok((tag, request)) = Request::parse(&input) {
                let mut out = [0; MAX_REQUEST_BYTES];
                let len = request.emit(tag, &mut out).unwrap();
                prop_assert_eq!(&out[..len], &input[..]);
            }
            let immediate = u32::from(op) << 8 | u32::from(flags) | u32::from(key_len) << 16;
            for kind in 0..16 {
                let _ = Reply::parse(immediate & 0xffff_0000 | kind, &input);
                let _ = Reply::parse(immediate + kind, &input);
            }
            let _ = (Page::parse(&input), Tables::parse(&input), StatsView::parse(&input));
            let _ = (Hello::parse(&input), Welcome::parse(&input));
            for op in MultiOp::ALL {
                let _ = Results::parse(op, usize::from(key_len), &input);
                if let Ok((element, len)) = Element::parse(op, &input) {
                    let mut out = [0; 300];
                    prop_assert_eq!(emit_element(op, &element, &mut out), Ok(len));
                    prop_assert_eq!(&out[..len], &input[..len]);
                }
            }
        }
    }

    #[test]
    fn elements_and_results_survive_the_trip(
        owned in prop::collection::vec(element(), 1..20), which in 0usize..4, a: u64, b: u64,
    ) {
        let op = MultiOp::ALL[which];
        let mut packed = Vec::new();
        let mut elements = Vec::new();
        for (table, key, value, rules, expires, by) in &owned {
            let mut element = Element { rules: *rules, ..Element::new(*table, key) };
            match op {
                MultiOp::Write => (element.value, element.expires) = (value, *expires),
                MultiOp::Increment => element.by = *by,
                _ => {}
            }
            let mut out = [0; 400];
            let len = emit_element(op, &element, &mut out).unwrap();
            prop_assert_eq!(len, element.packed_bytes(op));
            prop_assert!(len >= MIN_ELEMENT_BYTES);
            for short in 0..len {
                prop_assert!(matches!(Element::parse(op, &out[..short]), Err(ProtoError::Truncated { .. })), "cut at {}", short);
            }
            packed.extend_from_slice(&out[..len]);
            elements.push(element);
        }
        let mut at = 0;
        for element in &elements {
            let (parsed, len) = Element::parse(op, &packed[at..]).unwrap();
            prop_assert_eq!(&parsed, element);
            at += len;
        }
        prop_assert_eq!(at, packed.len());

        let mut out = vec![0; 4000];
        let mut writer = ResultWriter::new(&mut out, 0);
        let mut results = Vec::new();
        for (index, (_, _, value, ..)) in owned.iter().enumerate() {
            let result = match op {
                _ if index % 3 == 1 => ElementResult::Failed { status: Status::Full, detail: a },
                MultiOp::Read => ElementResult::Value { version: a, value },
                MultiOp::Increment => ElementResult::Incremented { version: a, bits: b },
                _ => ElementResult::Version(b),
            };
            let before = writer.len();
            prop_assert!(writer.push(&result));
            prop_assert_eq!(writer.len() - before, ResultWriter::needed(&result));
            results.push(result);
        }
        let len = writer.len();
        let parsed = Results::parse(op, results.len(), &out[..len]).unwrap();
        prop_assert_eq!(parsed.iter().collect::<Vec<_>>(), results.clone());
        prop_assert!(Results::parse(op, results.len() + 1, &out[..len]).is_err());
        prop_assert!(Results::parse(op, results.len(), &out[..len + 1]).is_err());
        for short in 0..len {
            prop_assert!(Results::parse(op, results.len(), &out[..short]).is_err());
            let mut writer = ResultWriter::new(&mut out[..short], 0);
            prop_assert!(!results.iter().all(|result| writer.push(result)));
        }
    }

    #[test]
    fn replies_survive_the_trip_and_every_truncation_is_noticed(
        tag: u16, a: u64, b: u32, created: bool, values: bool, next: Option<u64>,
        keys in prop::collection::vec(bytes(1..=60), 0..20),
    ) {
        let mut page = [0; 4000];
        let mut builder = PageBuilder::new(&mut page, values).unwrap();
        for key in &keys {
            prop_assert!(builder.push(key, a, &key[1..]));
        }
        prop_assert_eq!(builder.len(), keys.len());
        let page_len = builder.finish(next);
        let page = Page::parse(&page[..page_len]).unwrap();
        prop_assert_eq!((page.next(), page.has_values(), page.len()), (next, values, keys.len()));
        prop_assert_eq!(page.keys().collect::<Vec<_>>(), keys.iter().map(|key| &key[..]).collect::<Vec<_>>());
        for (object, key) in page.objects().zip(&keys) {
            prop_assert_eq!(object.value, values.then_some(&key[1..]));
            prop_assert_eq!(object.version, if values { a } else { 0 });
        }
        let mut tables = [0; 2000];
        let mut builder = TablesBuilder::new(&mut tables).unwrap();
        let operations = TableOperations { reads: a, writes: 5, removes: a / 3, increments: 7 };
        let entry = TableEntry { id: b, objects: a, live_bytes: 3, operations, name: "a name" };
        prop_assert!(builder.push(&entry) && builder.push(&entry));
        let tables_len = builder.finish(created);
        let tables = Tables::parse(&tables[..tables_len]).unwrap();
        prop_assert_eq!(tables.iter().collect::<Vec<_>>(), [entry, entry]);
        prop_assert_eq!(tables.next(), Some(b).filter(|id| created && *id != u32::MAX));
        let counters = StatsReply { objects: a, connections: u64::from(b), ..StatsReply::default() };
        let mut times: [Histogram; 3] = Default::default();
        times[1].add(u64::from(b));
        let mut stats = [0; MAX_REPLY_BYTES];
        let stats_len = emit_stats(&counters, &times, &mut stats).unwrap();
        let stats = StatsView::parse(&stats[..stats_len]).unwrap();
        prop_assert_eq!(stats.get(), counters);
        prop_assert_eq!(stats.times(Class::Write).quantile(500), times[1].quantile(500));
        for reply in [
            Reply::Empty,
            Reply::Error { status: Status::TooLargeForEager, detail: a },
            Reply::Written { version: a, value_len: b },
            Reply::Version(a),
            Reply::Page(page),
            Reply::PackedWritten { len: b },
            Reply::Stats(stats),
            Reply::Probe { rounds: b },
            Reply::Incremented { version: a, bits: u64::from(b) },
            Reply::Table { id: b, created },
            Reply::Tables(tables),
        ] {
            let mut out = [0xee; MAX_REPLY_BYTES];
            let (immediate, len) = reply.emit(tag, &mut out).unwrap();
            prop_assert_eq!(Reply::parse(immediate, &out[..len]), Ok((tag, reply)));
            for short in 0..len {
                prop_assert!(Reply::parse(immediate, &out[..short]).is_err());
                prop_assert_eq!(reply.emit(tag, &mut vec![0; short]), Err(ProtoError::NoRoom { available: short }));
            }
            prop_assert_eq!(Reply::parse(immediate, &out[..len + 1]).is_err(), true);
        }
    }

    #[test]
    fn a_hit_is_the_log_entry_itself(
        key in bytes(1..=200), value in bytes(0..=4096), tag: u16, expires in prop_oneof![Just(NEVER), 1u64..],
    ) {
        let mut store = Store::new(vec![0; 256 << 10], Config { seed: 1, segment_bytes: Some(16 << 10), ..Config::default() }).unwrap();
        let version = store.write(&Write { expires, ..Write::new(0, &key, &value) }, 0).unwrap();
        let found = store.get(0, &key, 0).unwrap();
        let whole = store.bytes(found.span());
        prop_assert_eq!(
            Reply::parse(entry_reply(tag, true), whole),
            Ok((tag, Reply::Value { version, value: &value, key: Some(&key) }))
        );
        let mut gathered = store.bytes(found.header()).to_vec();
        gathered.extend_from_slice(store.bytes(found.value_offset..found.span().end));
        prop_assert_eq!(
            Reply::parse(entry_reply(tag, false), &gathered),
            Ok((tag, Reply::Value { version, value: &value, key: None }))
        );
        for short in 0..whole.len() {
            prop_assert!(Reply::parse(entry_reply(tag, true), &whole[..short]).is_err());
        }
        for short in 0..gathered.len() {
            prop_assert!(Reply::parse(entry_reply(tag, false), &gathered[..short]).is_err());
        }
        gathered.push(0);
        prop_assert_eq!(Reply::parse(entry_reply(tag, false), &gathered), Err(ProtoError::Trailing { bytes: 1 }));
        gathered[12] = 3;
        prop_assert!(Reply::parse(entry_reply(tag, false), &gathered).is_err());
    }

    #[test]
    fn greetings_survive_the_trip(client: u64, lease: bool, window in 1u8.., known: bool, lease_ms: u32, epoch: u64, now_ns: u64,
        log in prop::option::of((any::<u64>(), any::<u64>(), any::<u32>())), padding in 0usize..40) {
        let hello = Hello { lease, client };
        let mut bytes = hello.to_bytes().to_vec();
        for short in 0..bytes.len() {
            prop_assert!(Hello::parse(&bytes[..short]).is_err());
        }
        bytes.resize(bytes.len() + padding, 0);
        prop_assert_eq!(Hello::parse(&bytes), Ok(hello));
        let log = log.map(|(addr, len, rkey)| LogKey { addr, len, rkey });
        let welcome = Welcome { window, known, lease_ms, epoch, client, now_ns, log };
        let mut bytes = welcome.to_bytes().to_vec();
        for short in 0..bytes.len() {
            prop_assert!(Welcome::parse(&bytes[..short]).is_err());
        }
        bytes.resize(bytes.len() + padding, 0);
        prop_assert_eq!(Welcome::parse(&bytes), Ok(welcome));
        bytes[0] = 1;
        prop_assert!(Welcome::parse(&bytes).is_err());
    }
}

#[test]
fn golden_bytes() {
    let mut out = [0; MAX_REQUEST_BYTES];
    let key = [b'k'; 26];
    let read = |table, key| Request::Read {
        table,
        key: Key::Inline(key),
        rules: RejectRules::NONE,
        buffer: None,
    };
    let len = read(0, &key).emit(0x1234, &mut out).unwrap();
    assert_eq!(
        len, 32,
        "a READ of 26 bytes of key fits a completion queue entry"
    );
    assert_eq!(out[..6], [1, 0, 26, 0, 0x34, 0x12]);
    assert_eq!(out[6..32], key);
    let len = read(7, &key[..22]).emit(0x1234, &mut out).unwrap();
    assert_eq!(len, 32, "of another table, one of 22 bytes");
    assert_eq!(out[..10], [1, 1, 22, 0, 0x34, 0x12, 7, 0, 0, 0]);

    let write = Request::Write {
        table: 9,
        key: Key::Remote(RemoteBuffer {
            addr: 0x0102_0304_0506_0708,
            rkey: 0x0a0b_0c0d,
            len: 0x1122,
        }),
        value: Value::Remote(RemoteBuffer {
            addr: 1,
            rkey: 2,
            len: 3,
        }),
        rules: RejectRules::unless_version(0x55),
        expires: 0x66,
        once: Some(Once {
            sequence: 0x77,
            first_incomplete: 0x70,
        }),
    };
    let len = write.emit(1, &mut out).unwrap();
    #[rustfmt::skip]
    let expected = [
        2, 0x3f, 0x22, 0x11, 1, 0, 9, 0, 0, 0,
        10, 0x55, 0, 0, 0, 0, 0, 0, 0,
        0x77, 0, 0, 0, 0, 0, 0, 0, 7,
        0x66, 0, 0, 0, 0, 0, 0, 0,
        8, 7, 6, 5, 4, 3, 2, 1, 0x0d, 0x0c, 0x0b, 0x0a, 0x22, 0x11, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0,
    ];
    assert_eq!(out[..len], expected);
    assert_eq!(
        immediate(0xabcd, Status::NotFound, ReplyKind::Error),
        0xabcd_0101
    );
    for (index, status) in Status::ALL.iter().enumerate() {
        assert_eq!(
            (*status as usize, Status::from_raw(index as u8)),
            (index, Some(*status))
        );
    }
    let element = Element {
        value: b"vv",
        ..Element::new(5, b"k")
    };
    let len = emit_element(MultiOp::Write, &element, &mut out).unwrap();
    assert_eq!(
        out[..len],
        [1, 1, 0, 5, 0, 0, 0, 2, 0, 0, 0, b'k', b'v', b'v']
    );
}

#[test]
fn what_does_not_fit_is_refused_by_both_sides_with_the_reason() {
    let mut out = vec![0; 100_000];
    let long_key = vec![1; EAGER_KEY_BYTES + 1];
    let long_value = vec![1; EAGER_VALUE_BYTES + 1];
    let remote = |len| RemoteBuffer {
        addr: 0,
        rkey: 0,
        len,
    };
    let remove = |key| Request::Remove {
        table: 0,
        key,
        rules: RejectRules::NONE,
        once: None,
    };
    let write = |value| Request::Write {
        table: 0,
        key: Key::Inline(b"k"),
        value,
        rules: RejectRules::NONE,
        expires: NEVER,
        once: None,
    };
    let multi = |op, count, elements, once| Request::Multi {
        op,
        count,
        elements,
        once,
        buffer: None,
    };
    let number = |sequence, first_incomplete| {
        Some(Once {
            sequence,
            first_incomplete,
        })
    };
    let late = Request::Remove {
        table: 0,
        key: Key::Inline(b"k"),
        rules: RejectRules::NONE,
        once: number(MAX_RESULTS as u64 + 1, 1),
    };
    let inline = Elements::Inline(&[0; 400]);
    let cases = [
        (remove(Key::Inline(b"")), ProtoError::EmptyKey),
        (remove(Key::Remote(remote(0))), ProtoError::EmptyKey),
        (
            remove(Key::Inline(&long_key)),
            ProtoError::KeyNotEager { bytes: 1025 },
        ),
        (
            remove(Key::Remote(remote(65_536))),
            ProtoError::Field("key_len"),
        ),
        (
            write(Value::Inline(&long_value)),
            ProtoError::ValueNotEager { bytes: 4097 },
        ),
        (
            write(Value::Remote(remote((1 << 20) + 1))),
            ProtoError::ValueTooLarge { bytes: 1_048_577 },
        ),
        (Request::Probe { rounds: 0 }, ProtoError::Field("rounds")),
        (late, ProtoError::Field("first_incomplete")),
        (
            multi(MultiOp::Read, 0, inline, None),
            ProtoError::Field("count"),
        ),
        (
            multi(MultiOp::Read, 101, inline, None),
            ProtoError::Field("count"),
        ),
        (
            multi(MultiOp::Write, 65, inline, number(1, 1)),
            ProtoError::Field("count"),
        ),
        (
            multi(MultiOp::Read, 1, inline, number(1, 1)),
            ProtoError::Field("count"),
        ),
        (
            multi(
                MultiOp::Read,
                1,
                Elements::Remote(remote(MAX_MULTI_BYTES as u32 + 1)),
                None,
            ),
            ProtoError::Field("elements"),
        ),
        (Request::CreateTable { name: "" }, ProtoError::Field("name")),
        (
            Request::FindTable { name: "a\tb" },
            ProtoError::Field("name"),
        ),
    ];
    for (request, error) in cases {
        assert_eq!(request.emit(1, &mut out), Err(error), "{request:?}");
    }

    let parse = |header: [u8; 6], rest: &[u8]| {
        let bytes = [&header[..], rest].concat();
        Request::parse(&bytes).map(|_| ()).unwrap_err()
    };
    assert_eq!(parse([0, 0, 0, 0, 0, 0], b"").status(), Status::Unsupported);
    assert_eq!(parse([1, 0, 0, 0, 0, 0], b"").status(), Status::EmptyKey);
    assert_eq!(parse([1, 0, 0, 0, 0, 0], b"x").status(), Status::EmptyKey);
    assert_eq!(parse([1, 128, 1, 0, 0, 0], b"k"), ProtoError::Flags(128));
    assert_eq!(parse([1, 4, 1, 0, 0, 0], b"k"), ProtoError::Flags(4));
    assert_eq!(parse([6, 1, 0, 0, 0, 0], b""), ProtoError::Flags(1));
    assert_eq!(
        parse([6, 0, 1, 0, 0, 0], b"k"),
        ProtoError::Field("key_len")
    );
    assert_eq!(
        parse([1, 1, 1, 0, 0, 0], b"\0\0\0\0k"),
        ProtoError::Field("table")
    );
    for rules in [0, 16, 255] {
        let error = ProtoError::Field("rules");
        assert_eq!(parse([3, 2, 1, 0, 0, 0], &[rules, b'k']), error);
    }
    assert_eq!(
        parse([1, 0, 1, 4, 0, 0], &long_key).status(),
        Status::KeyTooLong
    );
    assert_eq!(
        parse([2, 0, 1, 0, 0, 0], &[1; 4098]).status(),
        Status::ValueTooLarge
    );
    let mut too_large = [0; 17];
    too_large[12..16].copy_from_slice(&1_048_577u32.to_le_bytes());
    assert_eq!(
        parse([2, 32, 1, 0, 0, 0], &too_large).status(),
        Status::ValueTooLarge
    );
    assert_eq!(
        parse([9, 0, 2, 0, 0, 0], b"\xff\xfe").status(),
        Status::TableName
    );

    // Statuses and kinds that contradict each other, or do not exist.
    let unknown = (Status::ALL.len() as u32) << 8 | 1;
    for immediate in [0x0000_0001, 0x0000_0100, unknown, 0x0000_000e] {
        assert_eq!(
            Reply::parse(immediate, &[0; 8]),
            Err(ProtoError::Immediate(immediate))
        );
    }
    let wrong = Reply::Error {
        status: Status::Ok,
        detail: 0,
    };
    assert_eq!(wrong.emit(0, &mut out), Err(ProtoError::Field("status")));
}

#[test]
fn a_full_page_takes_no_more_and_the_largest_object_fits_the_stated_buffer() {
    let mut out = vec![0; MIN_PAGE_BUFFER_BYTES];
    let mut builder = PageBuilder::new(&mut out, true).unwrap();
    assert!(builder.is_empty());
    assert!(!builder.push(&vec![1; 65_536], 1, b""));
    assert!(builder.push(&vec![1; 65_535], 1, &[7; EAGER_VALUE_BYTES]));
    assert!(!builder.push(b"x", 1, b""));
    let len = builder.finish(Some(7));
    let page = Page::parse(&out[..len]).unwrap();
    assert_eq!((page.len(), page.next()), (1, Some(7)));

    let mut builder = PageBuilder::new(&mut out, true).unwrap();
    assert!(builder.push(b"long", 3, &vec![1; EAGER_VALUE_BYTES + 1]));
    let len = builder.finish(None);
    let page = Page::parse(&out[..len]).unwrap();
    let object = page.objects().next().unwrap();
    assert_eq!(
        (object.version, object.value_len, object.value),
        (3, EAGER_VALUE_BYTES + 1, None),
        "a value over the eager limit is left out"
    );
    assert!(PageBuilder::new(&mut [0; PAGE_HEADER_BYTES - 1], false).is_err());
    assert!(TablesBuilder::new(&mut [0; TABLES_HEADER_BYTES - 1]).is_err());
}
