//! The messages: golden bytes, round trips, truncations, and bytes from anywhere.

use kvstore::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_VALUE_BYTES};
use kvstore::proto::*;
use kvstore::store::{Config, Store};
use proptest::prelude::*;

fn bytes(range: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Vec<u8>> {
    (range, any::<u8>()).prop_map(|(len, start)| (0..len).map(|n| (n as u8) ^ start).collect())
}

fn buffer(len: std::ops::RangeInclusive<u32>) -> impl Strategy<Value = RemoteBuffer> {
    (any::<u64>(), any::<u32>(), len).prop_map(|(addr, rkey, len)| RemoteBuffer { addr, rkey, len })
}

/// What owns the bytes that a request borrows.
#[derive(Debug, Clone)]
struct Parts {
    op: u8,
    key: Vec<u8>,
    remote_key: Option<RemoteBuffer>,
    value: Vec<u8>,
    buffer: Option<RemoteBuffer>,
    number: u64,
}

fn parts() -> impl Strategy<Value = Parts> {
    (
        1u8..=7,
        prop_oneof![3 => bytes(1..=40), 1 => bytes(1..=EAGER_KEY_BYTES)],
        prop::option::of(buffer(1..=65_535)),
        prop_oneof![3 => bytes(0..=200), 1 => bytes(0..=EAGER_VALUE_BYTES)],
        prop::option::of(buffer(0..=MAX_VALUE_BYTES as u32)),
        any::<u64>(),
    )
        .prop_map(|(op, key, remote_key, value, buffer, number)| Parts {
            op,
            key,
            remote_key,
            value,
            buffer,
            number,
        })
}

impl Parts {
    fn request(&self) -> Request<'_> {
        let key = self.remote_key.map_or(Key::Inline(&self.key), Key::Remote);
        let buffer = self.buffer;
        match self.op {
            1 => Request::Get { key, buffer },
            2 => Request::Put {
                key,
                value: buffer.map_or(PutValue::Inline(&self.value), PutValue::Remote),
            },
            3 => Request::Del { key },
            4 => Request::List {
                cursor: self.number,
                limit: self.number as u16,
                buffer,
            },
            5 => Request::Stats,
            6 => Request::Ping,
            _ => Request::Probe {
                rounds: 1 + self.number as u32 % MAX_PROBE_ROUNDS,
            },
        }
    }
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
            // A PUT's inline value ends where the message does: cut there it is a shorter value.
            match Request::parse(&out[..short]) {
                Err(ProtoError::Truncated { .. }) => {}
                Ok((_, Request::Put { value: PutValue::Inline(value), .. })) => {
                    prop_assert_eq!(value.len() + len - short, parts.value.len());
                }
                other => prop_assert!(false, "cut at {} of {}: {:?}", short, len, other),
            }
            prop_assert_eq!(request.emit(tag, &mut vec![0; short]), Err(ProtoError::NoRoom { available: short }));
        }
        let inline_value = matches!(request, Request::Put { value: PutValue::Inline(_), .. });
        if !inline_value {
            prop_assert_eq!(Request::parse(&out[..len + 1]), Err(ProtoError::Trailing { bytes: 1 }));
        }
    }

    #[test]
    fn any_bytes_parse_or_fail_and_what_parses_is_what_would_be_sent(
        mut input in prop::collection::vec(any::<u8>(), 0..200),
        op in 0u8..9,
        flags in 0u8..5,
        key_len in 0u8..30,
    ) {
        for tamed in [false, true] {
            if tamed && input.len() >= 8 {
                // Far enough into the parser to matter.
                input[..4].copy_from_slice(&[op, flags, key_len, 0]);
                input[6..8].fill(0);
            }
            if let Ok((tag, request)) = Request::parse(&input) {
                let mut out = [0; MAX_REQUEST_BYTES];
                let len = request.emit(tag, &mut out).unwrap();
                prop_assert_eq!(&out[..len], &input[..]);
            }
            let immediate = u32::from(op) << 8 | u32::from(flags) | u32::from(key_len) << 16;
            for kind in 0..12 {
                let _ = Reply::parse(immediate & 0xffff_0000 | kind, &input);
                let _ = Reply::parse(immediate + kind, &input);
            }
            let _ = Page::parse(&input);
        }
    }

    #[test]
    fn replies_survive_the_trip_and_every_truncation_is_noticed(
        tag: u16, a: u64, b: u32, keys in prop::collection::vec(bytes(1..=60), 0..20), next: Option<u64>,
    ) {
        let mut page = [0; 2000];
        let mut builder = PageBuilder::new(&mut page).unwrap();
        for key in &keys {
            prop_assert!(builder.push(key));
        }
        prop_assert_eq!(builder.len(), keys.len());
        let page_len = builder.finish(next);
        let page = Page::parse(&page[..page_len]).unwrap();
        prop_assert_eq!(page.next(), next);
        prop_assert_eq!(page.keys().collect::<Vec<_>>(), keys.iter().map(|key| &key[..]).collect::<Vec<_>>());
        let stats = StatsReply { objects: a, connections: u64::from(b), ..StatsReply::default() }.to_bytes();
        for reply in [
            Reply::Empty,
            Reply::Error { status: Status::TooLargeForEager, detail: a },
            Reply::Written { version: a, value_len: b },
            Reply::Version(a),
            Reply::Page(page),
            Reply::PageWritten { len: b },
            Reply::Stats(StatsView::new(&stats)),
            Reply::Probe { rounds: b },
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
    fn a_hit_is_the_log_entry_itself(key in bytes(1..=200), value in bytes(0..=4096), tag: u16) {
        let mut store = Store::new(vec![0; 256 << 10], Config { seed: 1, segment_bytes: Some(16 << 10), ..Config::default() }).unwrap();
        let version = store.put(0, &key, &value, 0).unwrap();
        let found = store.get(0, &key, 0).unwrap();
        let whole = store.bytes(found.span());
        prop_assert_eq!(
            Reply::parse(entry_reply(tag, true), whole),
            Ok((tag, Reply::Value { version, value: &value, key: Some(&key) }))
        );
        let mut gathered = store.bytes(found.header()).to_vec();
        gathered.extend_from_slice(store.bytes(found.value()));
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
}

#[test]
fn golden_bytes() {
    let mut out = [0; MAX_REQUEST_BYTES];
    let key = [b'k'; 24];
    let get = Request::Get {
        key: Key::Inline(&key),
        buffer: None,
    };
    let len = get.emit(0x1234, &mut out).unwrap();
    assert_eq!(
        len, 32,
        "a GET of 24 bytes of key fits a completion queue entry"
    );
    assert_eq!(out[..8], [1, 0, 24, 0, 0x34, 0x12, 0, 0]);
    assert_eq!(out[8..32], key);

    let put = Request::Put {
        key: Key::Remote(RemoteBuffer {
            addr: 0x0102_0304_0506_0708,
            rkey: 0x0a0b_0c0d,
            len: 0x1122,
        }),
        value: PutValue::Remote(RemoteBuffer {
            addr: 1,
            rkey: 2,
            len: 3,
        }),
    };
    let len = put.emit(1, &mut out).unwrap();
    let expected = [
        2, 3, 0x22, 0x11, 1, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0x0d, 0x0c, 0x0b, 0x0a, 0x22, 0x11,
        0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0,
    ];
    assert_eq!(out[..len], expected);
    assert_eq!(
        immediate(0xabcd, Status::NotFound, ReplyKind::Error),
        0xabcd_0101
    );
}

#[test]
fn what_does_not_fit_is_refused_by_both_sides_with_the_reason() {
    let mut out = vec![0; 100_000];
    let long_key = vec![1; EAGER_KEY_BYTES + 1];
    let long_value = vec![1; EAGER_VALUE_BYTES + 1];
    let del = |key| Request::Del { key };
    let remote = |len| RemoteBuffer {
        addr: 0,
        rkey: 0,
        len,
    };
    let put = |value| Request::Put {
        key: Key::Inline(b"k"),
        value,
    };
    let cases = [
        (del(Key::Inline(b"")), ProtoError::EmptyKey),
        (del(Key::Remote(remote(0))), ProtoError::EmptyKey),
        (
            del(Key::Inline(&long_key)),
            ProtoError::KeyNotEager { bytes: 1025 },
        ),
        (
            del(Key::Remote(remote(65_536))),
            ProtoError::Field("key_len"),
        ),
        (
            put(PutValue::Inline(&long_value)),
            ProtoError::ValueNotEager { bytes: 4097 },
        ),
        (
            put(PutValue::Remote(remote((1 << 20) + 1))),
            ProtoError::ValueTooLarge { bytes: 1_048_577 },
        ),
        (Request::Probe { rounds: 0 }, ProtoError::Field("rounds")),
    ];
    for (request, error) in cases {
        assert_eq!(request.emit(1, &mut out), Err(error));
    }

    let parse = |header: [u8; 8], rest: &[u8]| {
        let bytes = [&header[..], rest].concat();
        Request::parse(&bytes).map(|_| ()).unwrap_err()
    };
    assert_eq!(
        parse([0, 0, 0, 0, 0, 0, 0, 0], b"").status(),
        Status::Unsupported
    );
    assert_eq!(
        parse([1, 0, 0, 0, 0, 0, 0, 0], b"").status(),
        Status::EmptyKey
    );
    assert_eq!(parse([1, 4, 1, 0, 0, 0, 0, 0], b"k"), ProtoError::Flags(4));
    assert_eq!(parse([3, 1, 1, 0, 0, 0, 0, 0], b"k"), ProtoError::Flags(1));
    assert_eq!(parse([5, 2, 0, 0, 0, 0, 0, 0], b""), ProtoError::Flags(2));
    assert_eq!(
        parse([6, 0, 1, 0, 0, 0, 0, 0], b"k"),
        ProtoError::Field("key_len")
    );
    assert_eq!(
        parse([1, 0, 1, 0, 0, 0, 1, 0], b"k"),
        ProtoError::Field("extra")
    );
    assert_eq!(
        parse([1, 0, 1, 4, 0, 0, 0, 0], &long_key).status(),
        Status::KeyTooLong
    );
    assert_eq!(
        parse([2, 0, 1, 0, 0, 0, 0, 0], &[1; 4098]).status(),
        Status::ValueTooLarge
    );
    let mut too_large = [0; 17];
    too_large[12..16].copy_from_slice(&1_048_577u32.to_le_bytes());
    assert_eq!(
        parse([2, 1, 1, 0, 0, 0, 0, 0], &too_large).status(),
        Status::ValueTooLarge
    );

    // Statuses and kinds that contradict each other.
    for immediate in [0x0000_0101 ^ 0x100, 0x0000_0100, 0x0000_0c01, 0x0000_000a] {
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
fn a_full_page_takes_no_more_and_the_largest_key_fits_the_stated_buffer() {
    let mut out = vec![0; MIN_LIST_BUFFER_BYTES];
    let mut builder = PageBuilder::new(&mut out).unwrap();
    assert!(builder.is_empty());
    assert!(!builder.push(&vec![1; 65_536]));
    assert!(builder.push(&vec![1; 65_535]));
    assert!(!builder.push(b"x"));
    let len = builder.finish(Some(7));
    let page = Page::parse(&out[..len]).unwrap();
    assert_eq!((page.len(), page.next()), (1, Some(7)));
    assert!(PageBuilder::new(&mut [0; PAGE_HEADER_BYTES - 1]).is_err());
}
