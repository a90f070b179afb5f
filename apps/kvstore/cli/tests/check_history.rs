//! `kv check-history` as a user runs it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use kvstore_check::op::{Operation, Outcome, Value};
use kvstore_check::recorder::Recorder;

/// A client that writes at `start`, and reads `found` a little later.
fn client(dir: &Path, client: u32, start: u64, version: u64, found: u64, ended: bool) {
    let name = dir.join(format!("{client}.hyvh"));
    let mut recorder = Recorder::new(fs::File::create(name).unwrap(), client, 0);
    let value = |n: u64| Value::of(format!("value {n}").as_bytes());
    let id = recorder.invoke(start, b"key", &Operation::write(value(version)));
    recorder.respond(start + 10, id, &Outcome::Written { version });
    let id = recorder.invoke(start + 20, b"key", &Operation::READ);
    let outcome = Outcome::Found {
        value: value(found),
        version: found,
    };
    recorder.respond(start + 30, id, &outcome);
    recorder.invoke(start + 40, b"key", &Operation::REMOVE);
    if ended {
        recorder.finish().unwrap();
    } else {
        recorder.flush().unwrap();
    }
}

fn check(dir: &Path, files: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kv"))
        .arg("check-history")
        .args(files)
        .current_dir(dir)
        .env_remove("HYV_COMMAND")
        .output()
        .unwrap()
}

#[test]
fn right_wrong_and_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    client(dir, 1, 100, 1, 1, true);
    client(dir, 2, 200, 2, 2, false);
    let right = check(dir, &["1.hyvh", "2.hyvh"]);
    let (out, err) = (
        String::from_utf8_lossy(&right.stdout),
        String::from_utf8_lossy(&right.stderr),
    );
    assert_eq!(right.status.code(), Some(0), "{err}");
    assert_eq!(
        out,
        "6 operations of 2 clients on 1 keys, 2 unanswered: linearizable\n"
    );
    assert_eq!(
        err,
        "2.hyvh: client 2 was killed; what it had under way counts as unanswered\n"
    );

    // The last one reads what was replaced.
    client(dir, 3, 300, 3, 2, true);
    let wrong = check(dir, &["1.hyvh", "2.hyvh", "3.hyvh"]);
    let err = String::from_utf8_lossy(&wrong.stderr);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(
        err.contains("error: key `key`: no order of these operations explains"),
        "{err}"
    );
    assert!(err.contains("client 3 #1: read -> 7 B"), "{err}");
    assert!(!err.contains("client 1 #"), "not part of it: {err}");

    let mut damaged = fs::read(dir.join("1.hyvh")).unwrap();
    let at = damaged.len() / 2;
    damaged[at] ^= 1;
    fs::write(dir.join("1.hyvh"), damaged).unwrap();
    for (files, expected) in [
        (&["1.hyvh"][..], "1.hyvh, line "),
        (&["2.hyvh", "2.hyvh"], "both of client 2"),
        (&["none"], "error: none: No such file"),
    ] {
        let output = check(dir, files);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{files:?}");
        assert!(err.contains(expected), "{files:?}: {err}");
    }
}
