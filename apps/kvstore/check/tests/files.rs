//! Files: what is written is read, and damage is found where it is.

mod common;

use std::path::Path;

use common::{Config, Sim};
use kvstore_check::op::{Addend, NEVER, Operation, Outcome, Reason, RequestId, Rules, Value};
use kvstore_check::reader::ReadError;
use kvstore_check::recorder::Recorder;
use kvstore_check::{History, Initial, check};
use proptest::prelude::*;

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u64>().prop_map(Value::Number),
        any::<(u32, u64)>().prop_map(|(len, hash)| Value::Digest { len, hash }),
    ]
}

fn rules() -> impl Strategy<Value = Rules> {
    any::<(bool, bool, Option<u64>, Option<u64>)>().prop_map(
        |(exists, absent, at_most, other_than)| Rules {
            exists,
            absent,
            at_most,
            other_than,
        },
    )
}

fn operation() -> impl Strategy<Value = Operation> {
    let plain = prop_oneof![
        Just(Operation::READ),
        Just(Operation::REMOVE),
        (value(), prop_oneof![Just(NEVER), any::<u64>()]).prop_map(|(value, expires)| {
            Operation::Write {
                value,
                expires,
                rules: None,
            }
        }),
        any::<i64>().prop_map(Operation::add),
        any::<u64>().prop_map(|bits| Operation::Increment {
            by: Addend::F64(bits),
            rules: None,
        }),
    ];
    (plain, rules()).prop_map(|(operation, rules)| operation.unless(rules))
}

fn outcome() -> impl Strategy<Value = Outcome> {
    let reason = prop_oneof![
        Just(Reason::Exists),
        Just(Reason::Absent),
        Just(Reason::Version)
    ];
    prop_oneof![
        (value(), any::<u64>()).prop_map(|(value, version)| Outcome::Found { value, version }),
        Just(Outcome::Absent),
        any::<u64>().prop_map(|version| Outcome::Written { version }),
        any::<u64>().prop_map(|version| Outcome::Removed { version }),
        any::<(u64, u64)>().prop_map(|(value, version)| Outcome::Added { value, version }),
        (reason, any::<u64>()).prop_map(|(reason, version)| Outcome::Rejected { reason, version }),
        Just(Outcome::NotANumber),
        Just(Outcome::Refused),
    ]
}

fn initial() -> impl Strategy<Value = Initial> {
    prop_oneof![
        Just(Initial::Fresh),
        Just(Initial::Unknown),
        (1..=u64::MAX).prop_map(Initial::AbsentAbove),
        (value(), any::<u64>(), any::<u64>()).prop_map(|(value, version, expires)| {
            Initial::Present {
                value,
                version,
                expires,
            }
        }),
    ]
}

/// An operation as it is recorded, with the answer if there is one.
type Recorded = (Vec<u8>, Operation, RequestId, Option<Option<Outcome>>);

fn recorded() -> impl Strategy<Value = Vec<Recorded>> {
    let request = any::<(u64, u64)>().prop_map(|(client, sequence)| match sequence {
        0 => RequestId::NONE,
        _ => RequestId { client, sequence },
    });
    prop::collection::vec(
        (
            prop::collection::vec(any::<u8>(), 1..20),
            operation(),
            request,
            prop::option::of(prop::option::of(outcome())),
        ),
        1..20,
    )
}

fn record(ops: &[Recorded]) -> Vec<u8> {
    let mut recorder = Recorder::new(Vec::new(), 7, 5);
    for (at, (key, operation, request, answer)) in ops.iter().enumerate() {
        let now = 100 * at as u64;
        let id = recorder.invoke_once(now, key, operation, *request);
        match answer {
            None => {}
            Some(None) => recorder.lost(id),
            Some(Some(outcome)) => recorder.respond(now + 50, id, outcome),
        }
    }
    recorder.finish().unwrap()
}

fn read(bytes: &[u8]) -> Result<History, ReadError> {
    let mut history = History::new();
    history.read(Path::new("file"), bytes)?;
    Ok(history)
}

proptest! {
    #[test]
    fn what_is_written_is_read(ops in recorded(), key in prop::collection::vec(any::<u8>(), 1..20), initial in initial()) {
        let mut file = record(&ops);
        let mut history = History::new();
        let summary = history.read(Path::new("file"), &file[..]).unwrap();
        prop_assert_eq!((summary.client, summary.operations, summary.ended), (7, ops.len() as u64, true));
        prop_assert_eq!(history.clock_slack, 5);
        prop_assert_eq!(history.len(), ops.len());
        for (at, (key, operation, request, answer)) in ops.iter().enumerate() {
            let op = history.get(key).unwrap().ops.iter().find(|op| op.number == at as u64).unwrap();
            prop_assert_eq!(&op.operation, operation);
            prop_assert_eq!(op.request, *request);
            prop_assert_eq!(op.invoked, 100 * at as u64);
            prop_assert_eq!(op.outcome, answer.flatten());
            prop_assert_eq!(op.returned, op.outcome.map_or(NEVER, |_| op.invoked + 50));
        }
        let mut recorder = Recorder::new(&mut file, 1, 0);
        recorder.initial(&key, &initial);
        recorder.finish().unwrap();
        // Two files one after the other are no file.
        prop_assert!(matches!(read(&file), Err(ReadError::Damaged { .. })), "{}", String::from_utf8_lossy(&file));
    }

    #[test]
    fn what_keys_held_is_read(key in prop::collection::vec(any::<u8>(), 1..20), initial in initial()) {
        let mut recorder = Recorder::new(Vec::new(), 1, 0);
        recorder.initial(&key, &initial);
        let history = read(&recorder.finish().unwrap()).unwrap();
        prop_assert_eq!(history.get(&key).unwrap().initial, initial);
    }

    #[test]
    fn damage_is_found_in_its_line(ops in recorded(), at in any::<prop::sample::Index>(), flip in 1u8..=255) {
        let mut file = record(&ops);
        let at = at.index(file.len());
        // A missing last newline is what a client that is killed leaves.
        prop_assume!(at + 1 < file.len());
        let line = 1 + file[..at].iter().filter(|b| **b == b'\n').count() as u64;
        file[at] ^= flip;
        match read(&file) {
            Err(ReadError::Damaged { line: told, .. }) => prop_assert!(told == line, "line {told} instead of {line}"),
            Err(ReadError::NotAHistory { .. }) => prop_assert_eq!(line, 1),
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn missing_doubled_and_swapped_lines_are_found(ops in recorded(), at in any::<prop::sample::Index>(), how in 0..3) {
        let file = String::from_utf8(record(&ops)).unwrap();
        let mut lines: Vec<&str> = file.lines().collect();
        prop_assume!(lines.len() > 3);
        let at = 1 + at.index(lines.len() - 2);
        match how {
            0 => { lines.remove(at); }
            1 => lines.insert(at, lines[at]),
            _ => lines.swap(at, at + 1),
        }
        let damaged = lines.join("\n") + "\n";
        let first = if how == 1 { at + 2 } else { at + 1 } as u64;
        match read(damaged.as_bytes()) {
            Err(ReadError::Damaged { line, .. }) => prop_assert_eq!(line, first),
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn a_file_that_is_cut_short_is_a_client_that_was_killed(ops in recorded(), at in any::<prop::sample::Index>()) {
        let file = record(&ops);
        let header = file.iter().position(|b| *b == b'\n').unwrap() + 1;
        let at = header + at.index(file.len() - header);
        let mut history = History::new();
        let summary = history.read(Path::new("file"), &file[..at]).unwrap();
        prop_assert!(!summary.ended);
        let whole = file[..at].split(|b| *b == b'\n').filter(|l| l.starts_with(b"i ")).count();
        prop_assert!(summary.operations as usize == whole || summary.operations as usize + 1 == whole);
    }

    #[test]
    fn anything_else_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(read(&bytes).is_err());
    }
}

#[test]
fn several_files_are_one_history() {
    let mut sim = Sim::new(
        11,
        Config {
            lost: 5,
            ..Config::default()
        },
    );
    sim.run(500);
    let mut files: Vec<(u32, Vec<u8>)> = Vec::new();
    let mut clients: Vec<u32> = sim.history.ops.iter().map(|op| op.client).collect();
    clients.sort_unstable();
    clients.dedup();
    for client in clients {
        let mut recorder = Recorder::new(Vec::new(), client, 0);
        let mut ops: Vec<_> = sim
            .history
            .ops
            .iter()
            .filter(|op| op.client == client)
            .collect();
        ops.sort_by_key(|op| op.invoked);
        for op in ops {
            let id = recorder.invoke(op.invoked, b"key", &op.operation);
            if let Some(outcome) = &op.outcome {
                recorder.respond(op.returned, id, outcome);
            }
        }
        files.push((client, recorder.finish().unwrap()));
    }
    let mut history = History::new();
    for (client, file) in &files {
        let summary = history.read(Path::new("file"), &file[..]).unwrap();
        assert_eq!(summary.client, *client);
    }
    let report = check(&history);
    assert_eq!((report.keys, report.operations), (1, 500));
    assert!(report.unanswered > 0);
    assert_eq!(report.failures, []);
}

#[test]
fn errors_name_the_file_and_the_line() {
    let mut recorder = Recorder::new(Vec::new(), 1, 0);
    let id = recorder.invoke(5, b"k", &Operation::READ);
    recorder.respond(6, id, &Outcome::Absent);
    recorder.respond(7, id, &Outcome::Absent);
    let file = recorder.finish().unwrap();
    assert_eq!(
        read(&file).unwrap_err().to_string(),
        format!(
            "file, line 4 (byte {}): no such operation is under way; the file is damaged, record it again",
            file.split_inclusive(|b| *b == b'\n')
                .take(3)
                .map(<[u8]>::len)
                .sum::<usize>()
        )
    );
    assert!(
        read(b"hello\n")
            .unwrap_err()
            .to_string()
            .contains("this is no history")
    );
    let error = History::new()
        .read_file(Path::new("/nonexistent/history"))
        .unwrap_err();
    assert!(error.to_string().starts_with("/nonexistent/history: "));
}
