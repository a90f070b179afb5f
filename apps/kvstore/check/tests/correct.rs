//! Correct histories are accepted.

mod common;

use common::{Config, Sim, seeds};
use kvstore_check::op::{Operation, Outcome, Rules, Value};
use kvstore_check::{History, Initial, KeyHistory, check, check_key};

fn accept(what: &str, seed: u64, history: &KeyHistory, slack: u64) {
    if let Err(why) = check_key(history, slack) {
        panic!("{what}, HYV_CHECK_SEED={seed}: a correct history was not accepted: {why:?}");
    }
}

#[test]
fn of_any_kind() {
    let kinds = [
        ("plain", Config::default()),
        (
            "many clients",
            Config {
                clients: 24,
                ..Config::default()
            },
        ),
        (
            "lost replies",
            Config {
                lost: 10,
                ..Config::default()
            },
        ),
        (
            "lost replies, many clients",
            Config {
                lost: 10,
                clients: 16,
                ..Config::default()
            },
        ),
        (
            "without versions",
            Config {
                versions: false,
                clients: 4,
                ..Config::default()
            },
        ),
        (
            "without versions, lost replies",
            Config {
                versions: false,
                clients: 3,
                lost: 5,
                conditional: false,
                ..Config::default()
            },
        ),
        (
            "few values",
            Config {
                values: 3,
                lost: 5,
                ..Config::default()
            },
        ),
        (
            "expiry",
            Config {
                expiring: 40,
                slack: 30,
                ..Config::default()
            },
        ),
        ("a soak's", Config::soak()),
        (
            "expiry, lost replies",
            Config {
                expiring: 30,
                lost: 3,
                slack: 30,
                clients: 4,
                ..Config::default()
            },
        ),
    ];
    for (what, config) in kinds {
        for seed in seeds(40) {
            let slack = config.slack;
            let mut sim = Sim::new(seed, config.clone());
            sim.run(300);
            accept(what, seed, &sim.history, slack);
        }
    }
}

#[test]
fn long_on_one_key() {
    // Clients die all the time: thousands of operations that may still take effect.
    for seed in seeds(1) {
        let mut sim = Sim::new(
            seed,
            Config {
                clients: 16,
                lost: 3,
                floats: false,
                ..Config::default()
            },
        );
        sim.run(60_000);
        accept("long", seed, &sim.history, 0);
    }
}

/// Many clients, objects that expire, and clients killed with requests under way: what is looked at is in proportion to the length.
#[test]
fn what_is_looked_at_grows_with_the_length() {
    // Of the last one a search that leaves out much does not find the order.
    let of_note = seeds(3).into_iter().chain([1_795_443_059_344_811_126]);
    for seed in of_note {
        for length in [10_000, 20_000, 40_000] {
            let mut sim = Sim::new(
                seed,
                Config {
                    kills: 1_000,
                    ..Config::soak()
                },
            );
            sim.run(length);
            let unanswered = sim.history.ops.iter().filter(|op| op.outcome.is_none());
            let unanswered = unanswered.count();
            assert!(unanswered > length / 500, "{unanswered}");
            let mut history = History::new();
            history.clock_slack = sim.config.slack;
            *history.key(b"hot") = sim.history;
            let report = check(&history);
            assert_eq!(report.failures, [], "HYV_CHECK_SEED={seed}");
            println!(
                "{length} operations, {unanswered} unanswered: {}",
                report.visited
            );
            assert!(
                report.visited < 50 * length as u64,
                "HYV_CHECK_SEED={seed}: {length} operations, {} configurations",
                report.visited
            );
        }
    }
}

#[test]
fn that_begin_with_an_object() {
    for seed in seeds(20) {
        let mut sim = Sim::new(seed, Config::default());
        sim.run(100);
        sim.settle();
        sim.history.ops.clear();
        sim.history.initial = match sim.object.held {
            Some((value, version, expires)) => Initial::Present {
                value,
                version,
                expires,
            },
            None => Initial::AbsentAbove(sim.object.floor),
        };
        sim.run(100);
        accept("known start", seed, &sim.history, 0);
        sim.history.initial = Initial::Unknown;
        accept("unknown start", seed, &sim.history, 0);
    }
}

#[test]
fn retries_are_one_operation() {
    use kvstore_check::op::RequestId;
    let mut sim = Sim::new(1, Config::default());
    let add = sim.alone(Operation::add(1));
    sim.alone(Operation::READ);
    let request = RequestId {
        client: 5,
        sequence: 1,
    };
    // The first attempt's reply was lost, the second was answered with the recorded result, the third was refused.
    let mut first = sim.history.ops[add].clone();
    first.request = request;
    first.outcome = None;
    first.returned = u64::MAX;
    first.client = 998;
    sim.history.ops[add].request = request;
    sim.history.ops[add].invoked += 1;
    let mut third = sim.history.ops[add].clone();
    third.outcome = Some(Outcome::Refused);
    sim.history.ops.push(first);
    sim.history.ops.push(third);
    accept("retries", 1, &sim.history, 0);
}

#[test]
fn a_refused_operation_says_nothing() {
    let mut sim = Sim::new(1, Config::default());
    sim.alone(Operation::write(Value::of(b"one")));
    let refused = sim.alone(Operation::write(Value::of(b"two")).unless(Rules {
        exists: true,
        ..Rules::NONE
    }));
    sim.history.ops[refused].outcome = Some(Outcome::Refused);
    sim.alone(Operation::READ);
    accept("refused", 1, &sim.history, 0);
}

/// Forty times under way at once: nobody can try all their orders.
#[test]
fn objects_that_expire_at_nearly_the_same_time() {
    use kvstore_check::op::RequestId;
    const SLACK: u64 = 1_000_000;
    const EXPIRY: u64 = 10_000_000;
    let mut history = KeyHistory::default();
    let mut now = 1_000;
    let mut add = |operation, outcome| {
        history.ops.push(kvstore_check::Op {
            client: 1,
            number: history.ops.len() as u64,
            invoked: now,
            returned: now + 5,
            operation,
            outcome: Some(outcome),
            request: RequestId::NONE,
        });
        now += 10;
        if history.ops.len() == 80 {
            now = EXPIRY;
        }
    };
    let value = |n: u64| Value::of(&[n as u8; 20]);
    for n in 1..=40 {
        let write = Operation::Write {
            value: value(n),
            expires: EXPIRY + n,
            rules: None,
        };
        add(write, Outcome::Written { version: n });
        let (value, version) = (value(n), n);
        add(Operation::READ, Outcome::Found { value, version });
    }
    // Any of these may be: the clocks differ by more than all of it takes.
    let (value, version) = (value(40), 40);
    add(Operation::READ, Outcome::Found { value, version });
    add(Operation::READ, Outcome::Absent);
    add(Operation::READ, Outcome::Absent);
    accept("nearly at once", 1, &history, SLACK);
    // But not that it comes back.
    add_last(&mut history, value, version);
    assert!(check_key(&history, SLACK).is_err());
}

fn add_last(history: &mut KeyHistory, value: Value, version: u64) {
    let mut again = history.ops.last().expect("some were added").clone();
    again.number += 1;
    again.invoked = again.returned + 1;
    again.returned = again.invoked + 1;
    again.outcome = Some(Outcome::Found { value, version });
    history.ops.push(again);
}
