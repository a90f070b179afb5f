//! Wrong histories are rejected: each way in which a store can break its word, with concurrent operations before and after it.

mod common;

use common::{Config, Sim, seeds};
use kvstore_check::op::{NEVER, Operation, Outcome, RequestId, Rules, Value};
use kvstore_check::{History, KeyHistory, Op, Why, check, check_key};

const SLACK: u64 = 10;

fn digest(n: u64) -> Value {
    Value::Digest {
        len: 7,
        hash: 0xabcd_0000 + n,
    }
}

fn version_of(op: &Op) -> u64 {
    op.outcome.as_ref().map_or(0, Outcome::version)
}

/// What goes wrong while nothing else goes on. Each does something correct, and tells what to change: number of the operation, its
/// wrong answer.
type Fault = fn(&mut Sim) -> (usize, Outcome);

fn found(of: &Op, value: Value) -> Outcome {
    Outcome::Found {
        value,
        version: version_of(of),
    }
}

const FAULTS: &[(&str, Fault)] = &[
    ("stale read", |sim| {
        let a = sim.alone(Operation::write(digest(1)));
        sim.alone(Operation::write(digest(2)));
        let r = sim.alone(Operation::READ);
        (r, found(&sim.history.ops[a], digest(1)))
    }),
    ("lost write", |sim| {
        let a = sim.alone(Operation::write(digest(1)));
        sim.alone(Operation::READ);
        sim.alone(Operation::write(digest(2)));
        let r = sim.alone(Operation::READ);
        (r, found(&sim.history.ops[a], digest(1)))
    }),
    ("double increment", |sim| {
        sim.alone(Operation::write(Value::Number(10)));
        sim.alone(Operation::add(1_000_003));
        let r = sim.alone(Operation::READ);
        let version = version_of(&sim.history.ops[r]);
        let value = Value::Number(10 + 2 * 1_000_003);
        (r, Outcome::Found { value, version })
    }),
    ("lost increment", |sim| {
        sim.alone(Operation::write(Value::Number(10)));
        sim.alone(Operation::add(1_000_003));
        let second = sim.alone(Operation::add(1_000_005));
        let version = version_of(&sim.history.ops[second]);
        let value = 10 + 1_000_005;
        (second, Outcome::Added { value, version })
    }),
    ("resurrected remove", |sim| {
        let a = sim.alone(Operation::write(digest(1)));
        sim.alone(Operation::REMOVE);
        let r = sim.alone(Operation::READ);
        (r, found(&sim.history.ops[a], digest(1)))
    }),
    ("removed twice", |sim| {
        let a = sim.alone(Operation::write(digest(1)));
        sim.alone(Operation::REMOVE);
        let again = sim.alone(Operation::REMOVE);
        let version = version_of(&sim.history.ops[a]).max(1);
        (again, Outcome::Removed { version })
    }),
    ("value never written", |sim| {
        sim.alone(Operation::write(digest(1)));
        let r = sim.alone(Operation::READ);
        (r, found(&sim.history.ops[r], digest(77)))
    }),
    ("conditional write let through", |sim| {
        sim.alone(Operation::write(digest(1)));
        let w = sim.alone(Operation::write(digest(2)).unless(Rules {
            exists: true,
            ..Rules::NONE
        }));
        let version = version_of(&sim.history.ops[w]) + u64::from(sim.config.versions);
        sim.object.floor += 1;
        sim.object.held = Some((digest(2), sim.object.floor, NEVER));
        (w, Outcome::Written { version })
    }),
    ("conditional write refused without cause", |sim| {
        sim.alone(Operation::write(digest(1)));
        sim.alone(Operation::REMOVE);
        let w = sim.alone(Operation::write(digest(2)).unless(Rules {
            exists: true,
            ..Rules::NONE
        }));
        sim.object.held = None;
        let reason = kvstore_check::op::Reason::Exists;
        (w, Outcome::Rejected { reason, version: 0 })
    }),
    ("expired object still there", |sim| {
        let expires = sim.now + 100;
        let a = sim.alone(Operation::Write {
            value: digest(1),
            expires,
            rules: None,
        });
        sim.now = expires + 2 * SLACK;
        let r = sim.alone(Operation::READ);
        (r, found(&sim.history.ops[a], digest(1)))
    }),
];

/// Faults that only versions show.
const VERSION_FAULTS: &[(&str, Fault)] = &[
    ("version goes back", |sim| {
        let a = sim.alone(Operation::write(digest(1)));
        let b = sim.alone(Operation::write(digest(2)));
        let version = version_of(&sim.history.ops[a]) - 1;
        assert!(version > 0);
        (b, Outcome::Written { version })
    }),
    ("version used twice", |sim| {
        let a = sim.alone(Operation::write(digest(1)));
        let b = sim.alone(Operation::write(digest(2)));
        let version = version_of(&sim.history.ops[a]);
        (b, Outcome::Written { version })
    }),
    ("version goes back over a removal", |sim| {
        sim.alone(Operation::write(digest(1)));
        let a = sim.alone(Operation::write(digest(2)));
        sim.alone(Operation::REMOVE);
        let b = sim.alone(Operation::write(digest(3)));
        let version = version_of(&sim.history.ops[a]) - 1;
        (b, Outcome::Written { version })
    }),
    ("read of another version", |sim| {
        sim.alone(Operation::write(digest(1)));
        let r = sim.alone(Operation::READ);
        let version = version_of(&sim.history.ops[r]) + 1;
        let value = digest(1);
        (r, Outcome::Found { value, version })
    }),
    ("compare and swap of an old version", |sim| {
        let a = sim.alone(Operation::write(digest(1)));
        sim.alone(Operation::write(digest(2)));
        let wanted = version_of(&sim.history.ops[a]);
        let w = sim.alone(Operation::write(digest(3)).unless(Rules {
            absent: true,
            other_than: Some(wanted),
            ..Rules::NONE
        }));
        sim.object.floor += 1;
        sim.object.held = Some((digest(3), sim.object.floor, NEVER));
        let version = sim.object.floor;
        (w, Outcome::Written { version })
    }),
];

fn reject(what: &str, seed: u64, history: &KeyHistory) -> Vec<Op> {
    match check_key(history, SLACK) {
        Err(Why::NotLinearizable(violation)) => {
            assert!(!violation.ops.is_empty(), "{what}: explains nothing");
            violation.ops
        }
        other => panic!("{what}, HYV_CHECK_SEED={seed}: a wrong history gave {other:?}"),
    }
}

fn faults(config: &Config, list: &[(&str, Fault)]) {
    for (what, fault) in list {
        for seed in seeds(15) {
            let mut sim = Sim::new(seed, config.clone());
            sim.run(60);
            sim.settle();
            let (at, outcome) = fault(&mut sim);
            sim.run(60);
            check_key(&sim.history, SLACK)
                .err()
                .filter(|_| !what.starts_with("conditional") && !what.starts_with("compare"))
                .inspect(|why| panic!("{what}, HYV_CHECK_SEED={seed}: not even without: {why:?}"));
            let was = sim.history.ops[at].outcome.replace(outcome);
            assert_ne!(was, sim.history.ops[at].outcome, "{what}");
            let ops = reject(what, seed, &sim.history);
            if config.lost == 0 {
                assert!(
                    ops.len() <= 5,
                    "{what}, HYV_CHECK_SEED={seed}: {} operations are no short explanation",
                    ops.len()
                );
            }
        }
    }
}

#[test]
fn every_fault() {
    let plain = Config {
        slack: SLACK,
        ..Config::default()
    };
    faults(&plain, FAULTS);
    faults(&plain, VERSION_FAULTS);
}

#[test]
fn every_fault_without_versions() {
    let config = Config {
        versions: false,
        clients: 3,
        conditional: false,
        ..Config::default()
    };
    faults(&config, FAULTS);
}

#[test]
fn faults_among_lost_replies() {
    // What a removal or a conditional operation was told may be the doing of an operation that nobody was answered: those left out.
    let list: Vec<_> = FAULTS
        .iter()
        .filter(|(what, _)| !what.starts_with("conditional") && !what.starts_with("removed twice"))
        .copied()
        .collect();
    let config = Config {
        lost: 8,
        ..Config::default()
    };
    faults(&config, &list);
    faults(&config, VERSION_FAULTS);
}

#[test]
fn a_stale_read_anywhere() {
    // In the midst of concurrent operations: any read that began after the object was replaced twice.
    let mut tried = 0;
    for seed in seeds(20) {
        for versions in [true, false] {
            let mut sim = Sim::new(
                seed,
                Config {
                    versions,
                    clients: 4,
                    increments: false,
                    conditional: false,
                    ..Config::default()
                },
            );
            sim.run(80);
            let ops = sim.history.ops.clone();
            let is_write = |op: &&Op| matches!(op.operation, Operation::Write { .. });
            for (at, read) in ops.iter().enumerate() {
                if !matches!(read.outcome, Some(Outcome::Found { .. } | Outcome::Absent)) {
                    continue;
                }
                let newer = ops
                    .iter()
                    .filter(is_write)
                    .filter(|w| w.returned < read.invoked)
                    .max_by_key(|w| w.invoked);
                let Some(older) = newer.and_then(|newer| {
                    ops.iter()
                        .filter(is_write)
                        .find(|w| w.returned < newer.invoked)
                }) else {
                    continue;
                };
                let (Operation::Write { value, .. }, Operation::Read { .. }) =
                    (&older.operation, &read.operation)
                else {
                    continue;
                };
                tried += 1;
                let mut wrong = sim.history.clone();
                wrong.ops[at].outcome = Some(Outcome::Found {
                    value: *value,
                    version: version_of(older),
                });
                reject("stale read", seed, &wrong);
            }
        }
    }
    assert!(tried > 100, "only {tried} histories");
}

#[test]
fn order_against_time() {
    let mut sim = Sim::new(3, Config::default());
    sim.run(50);
    sim.settle();
    let a = sim.alone(Operation::write(digest(1)));
    let b = sim.alone(Operation::write(digest(2)));
    sim.run(50);
    let (va, vb) = (sim.history.ops[a].outcome, sim.history.ops[b].outcome);
    (sim.history.ops[a].outcome, sim.history.ops[b].outcome) = (vb, va);
    let ops = reject("versions swapped", 3, &sim.history);
    assert_eq!(ops.len(), 2, "{ops:?}");
}

/// Two writes at once; readers see b, a, b.
#[test]
fn a_value_cannot_come_back() {
    let mut sim = Sim::new(
        4,
        Config {
            versions: false,
            ..Config::default()
        },
    );
    let (a, b) = (digest(1), digest(2));
    let first = sim.alone(Operation::write(a));
    let second = sim.alone(Operation::write(b));
    let reads = [a, b, a].map(|value| {
        let at = sim.alone(Operation::READ);
        sim.history.ops[at].outcome = Some(Outcome::Found { value, version: 0 });
        at
    });
    let start = sim.history.ops[first].invoked;
    for w in [first, second] {
        sim.history.ops[w].invoked = start;
        sim.history.ops[w].returned = NEVER - 1;
    }
    reject("a, b, a", 4, &sim.history);
    // Without the last it is fine.
    sim.history.ops.remove(reads[2]);
    check_key(&sim.history, 0).unwrap();
    // An unanswered write happens once at most, too.
    sim.history.ops[first].outcome = None;
    sim.history.ops[first].returned = NEVER;
    check_key(&sim.history, 0).unwrap();
    let again = sim.alone(Operation::READ);
    sim.history.ops[again].outcome = Some(Outcome::Found {
        value: a,
        version: 0,
    });
    reject("a, b, a", 4, &sim.history);
}

#[test]
fn a_retry_with_another_answer() {
    let mut sim = Sim::new(5, Config::default());
    sim.run(30);
    sim.settle();
    sim.alone(Operation::write(Value::Number(10)));
    let first = sim.alone(Operation::add(1));
    let second = sim.alone(Operation::add(1));
    check_key(&sim.history, 0).unwrap();
    for at in [first, second] {
        sim.history.ops[at].request = RequestId {
            client: 1,
            sequence: 9,
        };
    }
    assert_eq!(reject("executed twice", 5, &sim.history).len(), 2);
    // The same with the first answer lost: that both took effect is seen by the answer of the second.
    sim.history.ops[first].outcome = None;
    sim.history.ops[first].returned = NEVER;
    reject("executed twice", 5, &sim.history);
}

#[test]
fn an_object_that_vanishes_before_its_time() {
    let mut sim = Sim::new(6, Config::default());
    let expires = sim.now + 1_000;
    sim.alone(Operation::Write {
        value: digest(1),
        expires,
        rules: None,
    });
    let read = sim.alone(Operation::READ);
    check_key(&sim.history, SLACK).unwrap();
    sim.history.ops[read].outcome = Some(Outcome::Absent);
    reject("too early", 6, &sim.history);
    // Within the clocks' difference it may be either.
    let (from, to) = (expires - 5, expires - 1);
    (
        sim.history.ops[read].invoked,
        sim.history.ops[read].returned,
    ) = (from, to);
    check_key(&sim.history, SLACK).unwrap();
    check_key(&sim.history, 0).unwrap_err();
}

#[test]
fn an_answer_to_another_question() {
    let mut sim = Sim::new(7, Config::default());
    let w = sim.alone(Operation::write(digest(1)));
    sim.history.ops[w].outcome = Some(Outcome::Removed { version: 1 });
    reject("removed", 7, &sim.history);
    sim.history.ops[w].outcome = Some(Outcome::Rejected {
        reason: kvstore_check::op::Reason::Exists,
        version: 1,
    });
    reject("rejected without a rule", 7, &sim.history);
}

#[test]
fn too_much_is_an_error_of_its_own() {
    // Forty increments at once by different amounts, whose sums nobody was told, and one read that no subset explains.
    let mut sim = Sim::new(8, Config::default());
    for i in 0..40 {
        let at = sim.alone(Operation::add(2 << i));
        sim.history.ops[at].outcome = None;
        sim.history.ops[at].returned = NEVER;
    }
    let read = sim.alone(Operation::READ);
    sim.history.ops[read].outcome = Some(Outcome::Found {
        value: Value::Number(1),
        version: 0,
    });
    match check_key(&sim.history, 0) {
        Err(Why::Undecided {
            operations: 41,
            visited,
            at,
        }) => {
            assert_eq!(at, sim.history.ops[read]);
            assert!(visited > 10_000, "{visited}");
        }
        other => panic!("{other:?}"),
    }
    let mut history = History::new();
    *history.key(b"sums") = sim.history;
    sim = Sim::new(9, Config::default());
    sim.alone(Operation::write(digest(1)));
    let read = sim.alone(Operation::READ);
    sim.history.ops[read].outcome = Some(Outcome::Absent);
    *history.key(b"wrong") = sim.history;
    let report = check(&history);
    assert_eq!(report.wrong_and_undecided(), (1, 1));
    let undecided = report.failures[0].to_string();
    assert!(
        undecided.starts_with("key `sums`: undecided after "),
        "{undecided}"
    );
    assert!(undecided.contains("nothing is known"), "{undecided}");
}
