use std::io::{self, BufRead, BufReader, Read, Write as _};

use proptest::prelude::*;

use super::*;
use crate::limits::{MAX_JSON_LINE_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES};

/// Key, value and line, or line and error.
type Outcome = Result<(Vec<u8>, Vec<u8>, u64), (u64, String)>;

fn read(format: Format, bytes: &[u8]) -> Vec<Outcome> {
    read_in_pieces(format, bytes, 1 << 20)
}

fn read_in_pieces(format: Format, bytes: &[u8], piece: usize) -> Vec<Outcome> {
    Reader::new(BufReader::with_capacity(piece, bytes), format, "in")
        .map(|r| match r {
            Ok(r) => Ok((r.key, r.value, r.line)),
            Err(e) => Err((e.line, e.to_string())),
        })
        .collect()
}

fn write(format: Format, records: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), format, "out");
    for (key, value) in records {
        writer.write(key, value).unwrap();
    }
    assert_eq!(writer.written(), records.len() as u64);
    writer.finish().unwrap()
}

fn assert_one_error(format: Format, line: &[u8], expected: &str) {
    let mut file = b"".to_vec();
    let good: &[u8] = match format {
        Format::Tsv => b"a\tb\n",
        Format::Jsonl => b"{\"key\":\"a\",\"value\":\"b\"}\n",
    };
    file.extend_from_slice(good);
    file.extend_from_slice(line);
    // With and without a line after it: what follows is read, and its number is right.
    for tail in [&b""[..], b"\n", &[b"\n", good].concat()] {
        for piece in [1, 3, 1 << 20] {
            let got = read_in_pieces(format, &[file.as_slice(), tail].concat(), piece);
            let shown = String::from_utf8_lossy(line);
            assert_eq!(got[0], Ok((b"a".to_vec(), b"b".to_vec(), 1)), "{shown}");
            let Err((at, text)) = &got[1] else {
                panic!("{shown} was taken: {got:?}")
            };
            assert_eq!(*at, 2, "{shown}: {text}");
            assert!(text.starts_with("in, line 2: "), "{text}");
            assert!(text.contains(expected), "{shown}: {text}");
            if tail.len() > 1 {
                assert_eq!(got[2], Ok((b"a".to_vec(), b"b".to_vec(), 3)), "{shown}");
            }
            assert_eq!(
                got.len(),
                if tail.len() > 1 { 3 } else { 2 },
                "{shown}: {got:?}"
            );
        }
    }
}

#[test]
fn bad_tsv_lines_are_named_with_number_and_reason() {
    for (line, expected) in [
        (&b"no tab here"[..], "no tab"),
        (b"k\tv\tw", "second tab"),
        (b"\tvalue", "key is empty"),
        (b"k\ta\\qb", "bad escape \\q"),
        (b"k\\x41\tv", "bad escape \\x;"),
        (b"k\t\\\xff", "bad escape \\\\xff"),
        (b"k\tends in \\", "bad escape at the end"),
        (b"k\\\tv", "bad escape at the end"),
    ] {
        assert_one_error(Format::Tsv, line, expected);
    }
    // An empty line between records: often what an unescaped newline in a value looks like.
    let got = read(Format::Tsv, b"a\tb\n\nc\td\n");
    assert!(
        matches!(&got[1], Err((2, text)) if text.contains("no tab")),
        "{got:?}"
    );
}

#[test]
fn bad_json_lines_are_named_with_number_and_reason() {
    for (line, expected) in [
        (&b"{"[..], "EOF"),
        (b"[\"a\",\"b\"]", "expected an object"),
        (b"{\"key\":\"k\"}", "no \"value\""),
        (b"{\"value\":\"v\"}", "no \"key\""),
        (b"{\"key\":\"\",\"value\":\"v\"}", "key is empty"),
        (
            b"{\"key\":\"k\",\"key\":\"k\",\"value\":\"v\"}",
            "\"key\" is given twice",
        ),
        (
            b"{\"key\":\"k\",\"value\":\"v\",\"value_b64\":\"\"}",
            "\"value\" is given twice",
        ),
        (
            b"{\"key\":\"k\",\"value\":\"v\",\"ttl\":3}",
            "unknown field \"ttl\"",
        ),
        (
            b"{\"key\":\"k\",\"value\":17}",
            "expected a string (column 21)",
        ),
        (b"{\"key\":\"k\",\"value\":null}", "expected a string"),
        (b"{\"key\":\"k\",\"value\":\"\xff\"}", "column"),
        (b"{\"key\":\"k\",\"value\":\"\\ud800\"}", "malformed"),
        (
            b"{\"key\":\"k\",\"value_b64\":\"a b=\"}",
            "\"value_b64\" is not base64",
        ),
        (
            b"{\"key_b64\":\"/\",\"value\":\"\"}",
            "\"key_b64\" is not base64",
        ),
        (b"{\"key\":\"k\",\"value\":\"v\"} {}", "trailing characters"),
        (b"{\"key\":\"k\",\"value\":\"v\"", "EOF"),
    ] {
        assert_one_error(Format::Jsonl, line, expected);
    }
}

#[test]
fn an_unknown_field_of_any_length_is_quoted_in_part() {
    let line = format!("{{\"{}\":1}}", "x".repeat(100_000));
    let got = read(Format::Jsonl, line.as_bytes());
    assert!(
        matches!(&got[0], Err((1, text)) if text.len() < 200),
        "{got:?}"
    );
}

#[test]
fn limits_are_exact_in_both_formats() {
    let key = vec![b'k'; MAX_KEY_BYTES];
    let value = vec![b'v'; MAX_VALUE_BYTES];
    for format in [Format::Tsv, Format::Jsonl] {
        let records = [(key.clone(), value.clone()), (b"k".to_vec(), Vec::new())];
        let file = write(format, &records);
        let got = read(format, &file);
        assert!(
            got == [
                Ok((key.clone(), value.clone(), 1)),
                Ok((b"k".to_vec(), vec![], 2))
            ]
        );
    }
    let (long_key, large_value) = ([&key[..], b"k"].concat(), [&value[..], b"v"].concat());
    for (key, value, expected) in [
        (&long_key, &b"v".to_vec(), "longer than 65535 bytes"),
        (
            &b"k".to_vec(),
            &large_value,
            "larger than 1048576 bytes (1 MiB)",
        ),
    ] {
        let tsv = [key, &b"\t"[..], value].concat();
        assert_one_error(Format::Tsv, &tsv, expected);
        let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
        let json = format!(
            "{{\"key\":\"{}\",\"value\":\"{}\"}}",
            text(key),
            text(value)
        );
        assert_one_error(Format::Jsonl, json.as_bytes(), expected);
        for format in [Format::Tsv, Format::Jsonl] {
            let mut writer = Writer::new(Vec::new(), format, "out");
            writer.write(b"a", b"b").unwrap();
            let error = writer.write(key, value).unwrap_err().to_string();
            assert!(
                error.contains("record 2") && error.contains(expected),
                "{error}"
            );
            // A refused record leaves no trace.
            let file = writer.finish().unwrap();
            assert_eq!(read(format, &file), [Ok((b"a".to_vec(), b"b".to_vec(), 1))]);
        }
    }
}

#[test]
fn the_longest_spelling_of_the_largest_record_is_read() {
    let spelt = |n: usize| "\\u0001".repeat(n);
    let line = format!(
        "{{\"key\":\"{}\",\"value\":\"{}\"}}",
        spelt(MAX_KEY_BYTES),
        spelt(MAX_VALUE_BYTES)
    );
    let got = read(Format::Jsonl, line.as_bytes());
    assert!(got == [Ok((vec![1; MAX_KEY_BYTES], vec![1; MAX_VALUE_BYTES], 1))]);
}

/// A line of `left` times `x`, then a good record; it remembers nothing that it gave out.
struct Endless {
    left: u64,
    tail: &'static [u8],
}

impl Read for Endless {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = (out.len() as u64).min(self.left) as usize;
        if count == 0 {
            return self.tail.read(out);
        }
        out[..count].fill(b'x');
        self.left -= count as u64;
        Ok(count)
    }
}

#[test]
fn a_line_of_gigabytes_is_an_error_and_takes_no_memory() {
    for (format, start, tail, expected) in [
        (Format::Tsv, &b""[..], &b"\na\tb\n"[..], "key is longer"),
        (Format::Tsv, b"k\t", b"\na\tb\n", "value is larger"),
        (
            Format::Jsonl,
            b"{\"key\":\"",
            b"\n{\"key\":\"a\",\"value\":\"b\"}",
            "longer than 6688762 bytes",
        ),
    ] {
        let input = start.chain(Endless {
            left: 3 << 30,
            tail,
        });
        let mut reader = Reader::new(BufReader::with_capacity(1 << 16, input), format, "in");
        let mut record = Record::default();
        let error = reader.read_into(&mut record).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(reader.read_into(&mut record).unwrap());
        assert_eq!(
            (&record.key[..], &record.value[..], record.line),
            (&b"a"[..], &b"b"[..], 2)
        );
        assert!(!reader.read_into(&mut record).unwrap());
        // Buffers double as they grow: at most twice the limit each.
        assert!(record.key.capacity() <= 2 * MAX_KEY_BYTES);
        assert!(record.value.capacity() <= 2 * MAX_VALUE_BYTES);
        assert!(reader.scratch_capacity() <= 2 * MAX_JSON_LINE_BYTES);
    }
}

#[test]
fn an_error_of_the_system_ends_the_reading() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the disk is gone"))
        }
    }
    for format in [Format::Tsv, Format::Jsonl] {
        let input = BufReader::new((&b"{\"key\":\"a\",\"value\":\"b\"}\n"[..]).chain(Broken));
        let got: Vec<_> = Reader::new(input, format, "in").collect();
        let last = got.last().unwrap().as_ref().unwrap_err();
        assert_eq!(got.len(), 2);
        assert!(
            last.to_string()
                .contains("line 2: cannot read: the disk is gone"),
            "{last}"
        );
    }
}

#[test]
fn an_interrupted_system_call_is_asked_again() {
    struct Interrupting(bool, &'static [u8]);
    impl Read for Interrupting {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.0 = !self.0;
            if self.0 {
                Err(io::ErrorKind::Interrupted.into())
            } else {
                self.1.read(out)
            }
        }
    }
    let input = BufReader::with_capacity(2, Interrupting(false, b"key\tvalue\nk\tv"));
    let got: Vec<_> = Reader::new(input, Format::Tsv, "in")
        .map(Result::unwrap)
        .collect();
    assert_eq!(
        (got[0].value.as_slice(), got[1].value.as_slice()),
        (&b"value"[..], &b"v"[..])
    );
}

#[test]
fn spellings_that_others_write_are_read() {
    let file = b"\n  \r\n{ \"value\" : \"v\\u00e9\\n\" , \"key\" : \"k\" }\r\n\
        {\"key_b64\":\"/wA\",\"value_b64\":\"AP8=\"}\n\n";
    assert_eq!(
        read(Format::Jsonl, file),
        [
            Ok((b"k".to_vec(), "vé\n".as_bytes().to_vec(), 3)),
            Ok((vec![0xff, 0], vec![0, 0xff], 4)),
        ]
    );
    assert_eq!(
        read(Format::Tsv, b"k\\t\\n\\r\\\\\t\xff\x00\r\nlast\t"),
        [
            Ok((b"k\t\n\r\\".to_vec(), b"\xff\0\r".to_vec(), 1)),
            Ok((b"last".to_vec(), vec![], 2))
        ]
    );
    assert_eq!(read(Format::Tsv, b""), []);
    assert_eq!(read(Format::Jsonl, b""), []);
}

#[test]
fn what_is_text_is_written_as_text_and_the_rest_in_base64() {
    let records = [
        (b"k".to_vec(), vec![0xff]),
        (vec![0xc3], "é\"\\".as_bytes().to_vec()),
    ];
    assert_eq!(
        String::from_utf8(write(Format::Jsonl, &records)).unwrap(),
        "{\"key\":\"k\",\"value_b64\":\"/w==\"}\n{\"key_b64\":\"ww==\",\"value\":\"é\\\"\\\\\"}\n"
    );
    assert_eq!(
        write(Format::Tsv, &records),
        b"k\t\xff\n\xc3\t\xc3\xa9\"\\\\\n"
    );
}

#[test]
fn every_byte_value_survives() {
    let all: Vec<u8> = (0..=255).collect();
    let mut records: Vec<_> = all.iter().map(|b| (vec![*b], vec![*b])).collect();
    records.push((all.clone(), all));
    for format in [Format::Tsv, Format::Jsonl] {
        let got = read(format, &write(format, &records));
        let got: Vec<_> = got
            .into_iter()
            .map(|r| r.map(|(k, v, _)| (k, v)).unwrap())
            .collect();
        assert_eq!(got, records);
    }
}

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    // Half of it made of what needs an escape, or is about to be cut in the middle of a character.
    let byte = prop_oneof![
        any::<u8>(),
        prop::sample::select(b"\t\n\r\\\"\0tnr{}\xc3\xa9\xe2\x80\xa8".to_vec()),
    ];
    prop::collection::vec(byte, 0..most)
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        records in prop::collection::vec((bytes(40), bytes(120)), 0..20),
        piece in 1_usize..64,
    ) {
        let records: Vec<_> =
            records.into_iter().map(|(k, v)| ([&b"k"[..], &k].concat(), v)).collect();
        for format in [Format::Tsv, Format::Jsonl] {
            let file = write(format, &records);
            prop_assert_eq!(file.iter().filter(|b| **b == b'\n').count(), records.len());
            let got = read_in_pieces(format, &file, piece);
            prop_assert_eq!(got.len(), records.len());
            for (i, (got, (key, value))) in got.into_iter().zip(&records).enumerate() {
                prop_assert_eq!(got, Ok((key.clone(), value.clone(), i as u64 + 1)));
            }
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused_line_by_line_the_same_in_any_pieces(
        file in bytes(300),
        piece in 1_usize..16,
    ) {
        for format in [Format::Tsv, Format::Jsonl] {
            let got = read_in_pieces(format, &file, piece);
            prop_assert_eq!(&got, &read(format, &file));
            let mut last = 0;
            for result in &got {
                let line = match result { Ok((.., line)) | Err((line, _)) => *line };
                prop_assert!(line > last);
                last = line;
            }
            // Each line once; JSON may skip blank ones.
            let lines = file.split(|b| *b == b'\n').count() - usize::from(file.ends_with(b"\n"));
            let lines = if file.is_empty() { 0 } else { lines };
            match format {
                Format::Tsv => prop_assert_eq!(got.len(), lines),
                Format::Jsonl => prop_assert!(got.len() <= lines),
            }
        }
    }
}

#[test]
fn the_format_is_chosen_by_option_then_ending() {
    let choose = |name: &str, explicit| Format::choose(Path::new(name), explicit);
    for (name, format) in [
        ("a.tsv", Format::Tsv),
        ("dir.jsonl/A.TXT", Format::Tsv),
        ("a.jsonl", Format::Jsonl),
        ("a.b.ndjson", Format::Jsonl),
        ("a.json", Format::Jsonl),
        ("-", Format::Tsv),
    ] {
        assert_eq!(choose(name, None).unwrap(), format, "{name}");
        assert_eq!(choose(name, Some(Format::Jsonl)).unwrap(), Format::Jsonl);
    }
    for name in ["data", "data.csv", ".tsv"] {
        let error = choose(name, None).unwrap_err().to_string();
        assert!(
            error.contains(name) && error.contains("--format tsv"),
            "{error}"
        );
        assert_eq!(choose(name, Some(Format::Tsv)).unwrap(), Format::Tsv);
    }
}

#[test]
fn files_are_opened_and_replaced_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.jsonl");
    let missing = open(&path, None).err().unwrap().to_string();
    assert!(
        missing.contains("data.jsonl") && missing.contains("No such file"),
        "{missing}"
    );
    let directory = open(folder.path(), Some(Format::Tsv))
        .err()
        .unwrap()
        .to_string();
    assert!(directory.contains("is a directory"), "{directory}");

    let mut writer = create(&path, None).unwrap();
    writer.write(b"key", b"value").unwrap();
    assert!(!path.exists());
    writer.finish().unwrap();
    let mut broken_off = create(&path, None).unwrap();
    broken_off.write(b"other", b"value").unwrap();
    drop(broken_off);
    let got: Vec<_> = open(&path, None).unwrap().map(Result::unwrap).collect();
    assert_eq!((got.len(), got[0].key.as_slice()), (1, &b"key"[..]));
    assert_eq!(folder.path().read_dir().unwrap().count(), 1);

    let error = create(&folder.path().join("no/data.tsv"), None)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("no/data.tsv") && error.contains("No such file"),
        "{error}"
    );
}

#[test]
fn a_full_device_is_reported() {
    let mut writer = create(Path::new("/dev/full"), Some(Format::Tsv)).unwrap();
    writer.write(b"key", b"value").unwrap();
    let error = writer.finish().unwrap_err().to_string();
    assert!(
        error.contains("/dev/full: cannot write: No space left"),
        "{error}"
    );
}

impl<R: BufRead> Reader<R> {
    fn scratch_capacity(&self) -> usize {
        self.scratch.capacity()
    }
}

#[test]
fn lines_are_passed_without_a_look() {
    let file = "broken\na\t1\n\nb\t2\nc\t3";
    let read = |from: u64| {
        let mut reader = Reader::new(file.as_bytes(), Format::Tsv, "file");
        let there = reader.skip_to(from).expect("readable");
        (there, reader.next().map(|r| r.map(|r| (r.key, r.line))))
    };
    assert!(matches!(
        read(1),
        (true, Some(Err(ReadError { line: 1, .. })))
    ));
    assert!(matches!(read(2), (true, Some(Ok((key, 2)))) if key == b"a"));
    assert!(matches!(
        read(3),
        (true, Some(Err(ReadError { line: 3, .. })))
    ));
    assert!(matches!(read(5), (true, Some(Ok((key, 5)))) if key == b"c"));
    // One past the end: nothing is left. Further: there are fewer lines.
    assert!(matches!(read(6), (true, None)));
    assert!(matches!(read(7), (false, None)));
}

/// Reading ends when it is told to, also where nothing ever comes.
#[test]
fn a_silent_pipe_can_be_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe.tsv");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    // Open for both: there is a writer, which writes one record and then nothing.
    let mut writer = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    writer.write_all(b"a\t1\n").unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (mut reader, watch) = open_watched(&path, None, &stop).unwrap();
    assert_eq!(watch.total, None);
    assert_eq!(reader.next().unwrap().unwrap().key, b"a");
    assert_eq!(watch.read(), 4);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = reader.next().unwrap().unwrap_err();
    assert!(error.to_string().contains("interrupted"), "{error}");
}
