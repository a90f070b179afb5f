//! A soak's own histories: right as they are, wrong once a store in the middle is made to have lied in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kvstore_check::op::{Operation, Outcome};
use kvstore_check::{History, KeyHistory, Op, check, check_key};

fn kv(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kv"));
    command
        .args(args)
        .current_dir(folder)
        .env("XDG_RUNTIME_DIR", folder)
        .env_remove("HYV_COMMAND");
    command.output().unwrap()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    entries
        .filter(|path| path.extension().is_some_and(|e| e == "hyvh"))
        .collect()
}

fn read(folder: &Path) -> History {
    let mut history = History::new();
    for file in files(folder) {
        if fs::metadata(&file).unwrap().len() > 0 {
            history.read_file(&file).unwrap();
        }
    }
    history
}

/// A read is told what was there before the last write that was acknowledged before it.
fn stale_read(history: &mut KeyHistory) -> bool {
    let written = |at: usize, ops: &[kvstore_check::Op]| match (&ops[at].operation, ops[at].outcome)
    {
        (Operation::Write { value, .. }, Some(Outcome::Written { version })) => {
            Some((*value, version))
        }
        _ => None,
    };
    let ops = &history.ops;
    for read in 0..ops.len() {
        let Some(Outcome::Found { version: found, .. }) = ops[read].outcome else {
            continue;
        };
        let before = |at: &usize| ops[*at].returned < ops[read].invoked;
        let mut earlier = (0..ops.len())
            .filter(before)
            .filter_map(|at| written(at, ops));
        let Some((value, version)) = earlier.find(|(_, version)| *version < found) else {
            continue;
        };
        let overwritten = (0..ops.len())
            .filter(before)
            .filter_map(|at| written(at, ops))
            .any(|(_, later)| later > version);
        if overwritten {
            history.ops[read].outcome = Some(Outcome::Found { value, version });
            return true;
        }
    }
    false
}

/// A write that was read never happened.
fn unheard_of(history: &mut KeyHistory) -> bool {
    let found = history.ops.iter().find_map(|op| match op.outcome {
        Some(Outcome::Found { version, .. }) => Some(version),
        _ => None,
    });
    let write = history.ops.iter().position(
        |op| matches!(op.outcome, Some(Outcome::Written { version }) if Some(version) == found),
    );
    if let Some(at) = write {
        history.ops.remove(at);
    }
    write.is_some()
}

/// An increment was executed twice.
fn twice(history: &mut KeyHistory) -> bool {
    let ops = history.ops.iter_mut();
    let mut added = ops.filter_map(|op| match (&op.operation, &mut op.outcome) {
        (Operation::Increment { by, .. }, Some(Outcome::Added { value, .. }))
            if by.add_to(*value) != *value =>
        {
            Some((*by, value))
        }
        _ => None,
    });
    // Not the last one: somebody goes on from what it was told.
    let Some((by, value)) = added.next() else {
        return false;
    };
    *value = by.add_to(*value);
    added.next().is_some()
}

/// Something acknowledged is gone.
fn lost(history: &mut KeyHistory) -> bool {
    let ops = &mut history.ops;
    let write = ops.iter().position(|op| {
        let stays = matches!(op.operation, Operation::Write { expires, .. } if expires == u64::MAX);
        stays && matches!(op.outcome, Some(Outcome::Written { .. }))
    });
    let Some((at, Some(Outcome::Written { version }))) = write.map(|at| (at, ops[at].outcome))
    else {
        return false;
    };
    let returned = ops[at].returned;
    // What changes the key while it is read, or was never answered, may have removed it.
    let alone = |read: &Op| {
        ops.iter().all(|op| {
            matches!(op.operation, Operation::Read { .. })
                || op.invoked > read.returned
                || (op.outcome.is_some() && op.returned < read.invoked)
        })
    };
    let read = ops.iter().position(|op| {
        op.invoked > returned
            && alone(op)
            && matches!(op.operation, Operation::Read { .. })
            && matches!(op.outcome, Some(Outcome::Found { version: v, .. }) if v == version)
    });
    if let Some(read) = read {
        ops[read].outcome = Some(Outcome::Absent);
    }
    read.is_some()
}

type Lie = fn(&mut KeyHistory) -> bool;

/// All that can be told wrong.
const LIES: [(&str, Lie); 4] = [
    ("a stale read", stale_read),
    ("a write that never happened", unheard_of),
    ("an increment executed twice", twice),
    ("a write that was lost", lost),
];

/// Lets a soak run for so long, tells every lie on up to five keys of its first round, and gives the first one that found no place.
fn lies_of_a_soak(seconds: u32) -> Option<&'static str> {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let time = format!("{seconds}s");
    let mut words = vec!["soak", "--native", "--histories", "h", "--clients", "3"];
    words.extend(["--hot-keys", "16", "--utilisation", "20", "--memory", "32M"]);
    words.extend(["--for", &time, "--check-every", &time]);
    let soak = kv(folder, &words);
    let said = String::from_utf8_lossy(&soak.stdout);
    let error = String::from_utf8_lossy(&soak.stderr);
    assert!(soak.status.success(), "{said}{error}");
    let again = kv(folder, &["check-history", "h/round-0"]);
    let error = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.success(), "{error}");
    let right = read(&folder.join("h/round-0"));
    assert!(check(&right).failures.is_empty());
    let mut nowhere = None;
    for (name, lie) in LIES {
        let mut told = 0;
        for (key, history) in right.iter().filter(|(key, _)| !key.starts_with(b"fill/")) {
            let mut wrong = history.clone();
            if told < 5 && lie(&mut wrong) {
                told += 1;
                let verdict = check_key(&wrong, right.clock_slack);
                let key = String::from_utf8_lossy(key);
                assert!(verdict.is_err(), "{name} was not noticed on {key}: {said}");
            }
        }
        if told == 0 {
            nowhere.get_or_insert(name);
        }
    }
    nowhere
}

#[test]
fn a_lie_in_a_recorded_history_is_found() {
    // A machine that is busy with other things needs longer for as much to happen.
    let enough = [2, 4, 8, 16]
        .into_iter()
        .any(|seconds| lies_of_a_soak(seconds).is_none());
    assert!(enough, "too little happened for each lie to be told");
}
