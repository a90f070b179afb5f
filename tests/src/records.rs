//! Records of every size, and the files they travel in, written and read here apart from the project's own code.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::Random;

/// Keys and values.
pub type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// Sizes of values on both sides of every boundary that the protocol knows.
pub const VALUE_SIZES: [usize; 16] = [
    0, 1, 7, 8, 24, 25, 100, 136, 1024, 4095, 4096, 4097, 65_535, 100_000, 1_048_575, 1_048_576,
];
/// Sizes of keys likewise.
pub const KEY_SIZES: [usize; 10] = [1, 2, 24, 255, 256, 1023, 1024, 1025, 4097, 65_535];

/// Binary records: every size of value, every size of key, and the largest of both together.
#[must_use]
pub fn of_every_size(random: &mut Random) -> Records {
    let mut records = Records::new();
    let pairs = VALUE_SIZES
        .map(|v| (12, v))
        .into_iter()
        .chain(KEY_SIZES.map(|k| (k, 100)))
        .chain([(65_535, 1_048_576), (65_535, 0), (1, 1_048_576)]);
    for (key, value) in pairs {
        let value = random.bytes(value);
        // A key of one byte may be there already.
        let mut key_bytes = random.bytes(key);
        while records.contains_key(&key_bytes) {
            key_bytes = random.bytes(key);
        }
        records.insert(key_bytes, value);
    }
    records
}

/// `count` records with readable keys (`PREFIXnnnnnn`) and values of up to `size` bytes, which differ by seed.
#[must_use]
pub fn many(random: &mut Random, prefix: &str, count: usize, size: usize) -> Records {
    (0..count)
        .map(|i| {
            let len = random.below(size + 1);
            (format!("{prefix}{i:06}").into_bytes(), random.bytes(len))
        })
        .collect()
}

/// As JSON lines, all in base64 where a field is not UTF-8.
#[must_use]
pub fn to_jsonl<'a>(records: impl IntoIterator<Item = (&'a Vec<u8>, &'a Vec<u8>)>) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in records {
        let mut object = serde_json::Map::new();
        for (name, bytes) in [("key", key), ("value", value)] {
            match std::str::from_utf8(bytes) {
                Ok(text) => object.insert(name.to_owned(), json!(text)),
                Err(_) => object.insert(format!("{name}_b64"), json!(STANDARD.encode(bytes))),
            };
        }
        out.extend(Value::from(object).to_string().into_bytes());
        out.push(b'\n');
    }
    out
}

/// Reads JSON lines.
///
/// # Panics
/// When they are none, or a key is there twice.
#[must_use]
pub fn from_jsonl(bytes: &[u8]) -> Records {
    let mut records = Records::new();
    for line in bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let object: Value = serde_json::from_slice(line).expect("each line is JSON");
        let field = |name: &str| match &object[name] {
            Value::String(text) => text.clone().into_bytes(),
            _ => STANDARD
                .decode(
                    object[format!("{name}_b64")]
                        .as_str()
                        .expect("one form is there"),
                )
                .expect("it is base64"),
        };
        let twice = records.insert(field("key"), field("value"));
        assert!(twice.is_none(), "a key is there twice: {object}");
    }
    records
}

/// As tab-separated lines.
#[must_use]
pub fn to_tsv<'a>(records: impl IntoIterator<Item = (&'a Vec<u8>, &'a Vec<u8>)>) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in records {
        escape(&mut out, key);
        out.push(b'\t');
        escape(&mut out, value);
        out.push(b'\n');
    }
    out
}

fn escape(out: &mut Vec<u8>, bytes: &[u8]) {
    for byte in bytes {
        match byte {
            b'\t' => out.extend(b"\\t"),
            b'\n' => out.extend(b"\\n"),
            b'\r' => out.extend(b"\\r"),
            b'\\' => out.extend(b"\\\\"),
            other => out.push(*other),
        }
    }
}

/// Reads tab-separated lines.
///
/// # Panics
/// When they are none, or a key is there twice.
#[must_use]
pub fn from_tsv(bytes: &[u8]) -> Records {
    let mut records = Records::new();
    for (key, value) in tsv_lines(bytes) {
        assert!(records.insert(key, value).is_none(), "a key is there twice");
    }
    records
}

/// Reads tab-separated lines in their order.
///
/// # Panics
/// When they are none.
pub fn tsv_lines(bytes: &[u8]) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
    let lines = bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    lines.map(|line| {
        let mut fields = line.split(|b| *b == b'\t').map(unescape);
        let (key, value) = (fields.next(), fields.next());
        let (Some(key), Some(value), None) = (key, value, fields.next()) else {
            panic!("not a line of two fields: {}", line.escape_ascii());
        };
        (key, value)
    })
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut bytes = field.iter();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'\\' => match bytes.next() {
                Some(b't') => b'\t',
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b'\\') => b'\\',
                other => panic!("no escape: {other:?}"),
            },
            other => *other,
        });
    }
    out
}

/// Compares, and says what differs without printing a megabyte.
///
/// # Panics
/// When they differ.
#[track_caller]
pub fn assert_same(got: &Records, want: &Records) {
    for (key, value) in want {
        let name = || {
            format!(
                "key of {} bytes, `{}`",
                key.len(),
                String::from_utf8_lossy(&key[..key.len().min(40)])
            )
        };
        match got.get(key) {
            None => panic!("{} is missing", name()),
            Some(other) => assert!(
                other == value,
                "{}: {} bytes instead of {}, first difference at {:?}",
                name(),
                other.len(),
                value.len(),
                other.iter().zip(value).position(|(a, b)| a != b)
            ),
        }
    }
    assert_eq!(got.len(), want.len(), "there are keys that nobody stored");
}
