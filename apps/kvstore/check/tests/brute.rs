//! The search agrees with one that tries every order, on small histories, right and wrong ones.

mod common;

use common::{Config, Object, Rng, Sim, fresh_seed, seeds, without_version};
use kvstore_check::op::{NEVER, Operation, Outcome, Rules, Value};
use kvstore_check::{Initial, KeyHistory, Op, Why, check_key};

const SLACK: u64 = 40;

/// Something that happens once, between two times.
enum Step<'a> {
    Op(&'a Op),
    Tick(u64),
}

impl Step<'_> {
    fn times(&self) -> (u64, u64) {
        match self {
            Step::Op(op) => (op.invoked, op.returned),
            Step::Tick(t) => (t - SLACK, t + SLACK),
        }
    }

    fn must(&self) -> bool {
        match self {
            Step::Op(op) => op.outcome.is_some(),
            Step::Tick(_) => true,
        }
    }
}

/// Whether some order of all that must happen and some of what may explains every answer. Versions that nobody was told are tried,
/// up to `most`.
fn explained(
    steps: &[Step<'_>],
    done: &mut Vec<bool>,
    object: &Object,
    clock: u64,
    most: u64,
) -> bool {
    let first_return = steps
        .iter()
        .zip(done.iter())
        .filter(|(s, d)| s.must() && !**d)
        .map(|(s, _)| s.times().1)
        .min();
    let Some(first_return) = first_return else {
        return true;
    };
    for at in 0..steps.len() {
        if done[at] || steps[at].times().0 > first_return {
            continue;
        }
        done[at] = true;
        let ok = match &steps[at] {
            Step::Tick(t) => explained(steps, done, object, clock.max(*t), most),
            Step::Op(op) => {
                // The version of a change is the next one, or any later.
                (object.floor..most).any(|below| {
                    let mut next = object.clone();
                    next.floor = below;
                    let outcome = next.execute(&op.operation, clock);
                    let changed = !outcome.is_observation();
                    if !changed || matches!(outcome, Outcome::Removed { .. }) {
                        // Versions do not move.
                        if below != object.floor {
                            return false;
                        }
                    }
                    op.outcome.is_none_or(|told| fits(&told, &outcome))
                        && explained(steps, done, &next, clock, most)
                })
            }
        };
        done[at] = false;
        if ok {
            return true;
        }
    }
    false
}

/// Whether what was told is what happened, as far as it was told.
fn fits(told: &Outcome, outcome: &Outcome) -> bool {
    if told.version() == 0 {
        let strip = |o: &Outcome| match *o {
            Outcome::Rejected { reason, .. } => Outcome::Rejected { reason, version: 0 },
            o => without_version(o),
        };
        strip(told) == strip(outcome)
    } else {
        told == outcome
    }
}

fn brute(history: &KeyHistory) -> bool {
    let mut steps: Vec<Step<'_>> = history.ops.iter().map(Step::Op).collect();
    let mut times: Vec<u64> = history
        .ops
        .iter()
        .filter_map(|op| match op.operation {
            Operation::Write { expires, .. } if expires != NEVER => Some(expires),
            _ => None,
        })
        .collect();
    if let Initial::Present { expires, .. } = history.initial
        && expires != NEVER
    {
        times.push(expires);
    }
    times.sort_unstable();
    times.dedup();
    steps.extend(times.into_iter().map(Step::Tick));
    let told = history
        .ops
        .iter()
        .filter_map(|op| op.outcome.as_ref().map(Outcome::version))
        .max();
    let ruled = history
        .ops
        .iter()
        .map(|op| {
            let rules = op.operation.rules();
            rules.at_most.max(rules.other_than).unwrap_or(0)
        })
        .max();
    let most = told.max(ruled).unwrap_or(0) + history.ops.len() as u64 + 1;
    let mut done = vec![false; steps.len()];
    let (held, floor) = match history.initial {
        Initial::Present {
            value,
            version,
            expires,
        } => (Some((value, version, expires)), version),
        Initial::AbsentAbove(floor) => (None, floor),
        Initial::Fresh => (None, 0),
        Initial::Unknown => panic!("there are too many"),
    };
    let object = Object { held, floor };
    explained(&steps, &mut done, &object, 0, most + floor)
}

/// Makes some answer another one.
fn disturb(history: &mut KeyHistory, rng: &mut Rng) {
    let at = rng.below(history.ops.len() as u64) as usize;
    let other = rng.below(history.ops.len() as u64) as usize;
    let op = &history.ops[at];
    let version = rng.below(5);
    let any = |rng: &mut Rng| match rng.below(4) {
        0 => Value::Number(1_000 * rng.below(3) + rng.below(3)),
        _ => Value::Digest {
            len: 100,
            hash: rng.below(3),
        },
    };
    let outcome = match (&op.operation, rng.below(4)) {
        (_, 0) => None,
        (Operation::Read { .. }, 1) | (Operation::Remove { .. }, 1) => Some(Outcome::Absent),
        (Operation::Read { .. }, _) => Some(Outcome::Found {
            value: any(rng),
            version,
        }),
        (Operation::Write { .. }, _) => Some(Outcome::Written { version }),
        (Operation::Remove { .. }, _) => Some(Outcome::Removed { version }),
        (Operation::Increment { .. }, 1) => Some(Outcome::NotANumber),
        (Operation::Increment { .. }, _) => Some(Outcome::Added {
            value: 1_000 * rng.below(3) + rng.below(4),
            version,
        }),
    };
    match rng.below(3) {
        0 => {
            // Another time.
            let moved = history.ops[other].invoked;
            let op = &mut history.ops[at];
            let length = op.returned.saturating_sub(op.invoked).min(300);
            op.invoked = moved;
            if op.outcome.is_some() {
                op.returned = moved + length;
            }
        }
        _ => {
            let op = &mut history.ops[at];
            op.outcome = outcome;
            op.returned = match outcome {
                None => NEVER,
                Some(_) => op.returned.min(op.invoked + 300),
            };
        }
    }
}

/// Compares the checker's judgement with that of the other search, and gives it.
fn judged_alike(seed: u64, history: &KeyHistory) -> bool {
    let expected = brute(history);
    match check_key(history, SLACK) {
        Ok(()) => assert!(
            expected,
            "HYV_CHECK_SEED={seed}: accepted, but wrong: {history:#?}"
        ),
        Err(Why::NotLinearizable(violation)) => assert!(
            !expected,
            "HYV_CHECK_SEED={seed}: rejected, but right: {violation}\n{history:#?}"
        ),
        Err(gave_up) => panic!("HYV_CHECK_SEED={seed}: {gave_up:?}"),
    }
    expected
}

#[test]
fn agrees_with_trying_every_order() {
    let (mut right, mut wrong) = (0u64, 0u64);
    for seed in seeds(30_000) {
        let mut rng = Rng(seed ^ 0x5eed);
        let mut sim = Sim::new(
            seed,
            Config {
                clients: 2 + rng.below(3),
                lost: rng.below(2) * 25,
                versions: true,
                expiring: if rng.chance(25) { 50 } else { 0 },
                values: 3,
                increments: rng.chance(60),
                floats: true,
                conditional: rng.chance(60),
                slack: SLACK,
                ..Config::default()
            },
        );
        sim.run(3 + rng.below(4) as usize);
        let mut history = sim.history;
        if rng.chance(50) {
            for op in &mut history.ops {
                if rng.chance(70) {
                    op.outcome = op.outcome.map(without_version);
                }
            }
        }
        for _ in 0..rng.below(3) {
            disturb(&mut history, &mut rng);
        }
        let expected = judged_alike(seed, &history);
        *if expected { &mut right } else { &mut wrong } += 1;
    }
    if std::env::var_os("HYV_CHECK_SEED").is_none() {
        assert!(
            right > 5_000 && wrong > 5_000,
            "{right} right, {wrong} wrong"
        );
    }
}

/// What changed the object shows only in what others were told: the refusal of a condition tells a version and no value.
#[test]
fn agrees_where_no_change_is_answered() {
    let (mut right, mut wrong) = (0u64, 0u64);
    for seed in seeds(20_000) {
        let mut rng = Rng(seed ^ 0x105e);
        let mut sim = Sim::new(seed, Config::default());
        for _ in 0..3 + rng.below(4) {
            let change = match rng.below(4) {
                0 => Operation::write(Value::Number(rng.below(3))),
                _ => Operation::add(1 << rng.below(3)),
            };
            match rng.below(5) {
                0 | 1 => {
                    if rng.chance(80) {
                        let at = sim.alone(change);
                        let op = &mut sim.history.ops[at];
                        (op.outcome, op.returned) = (None, NEVER);
                    } else {
                        sim.alone(change);
                    }
                }
                2 => {
                    sim.alone(Operation::READ);
                }
                _ => {
                    let version = rng.below(4);
                    sim.alone(change.unless(match rng.below(3) {
                        0 => Rules {
                            exists: true,
                            ..Rules::NONE
                        },
                        1 => Rules {
                            at_most: Some(version + 2),
                            ..Rules::NONE
                        },
                        _ => Rules {
                            other_than: Some(version),
                            ..Rules::NONE
                        },
                    }));
                }
            }
        }
        let mut history = sim.history;
        if rng.chance(40) {
            disturb(&mut history, &mut rng);
        }
        let expected = judged_alike(seed, &history);
        *if expected { &mut right } else { &mut wrong } += 1;
    }
    if std::env::var_os("HYV_CHECK_SEED").is_none() {
        assert!(
            right > 5_000 && wrong > 2_000,
            "{right} right, {wrong} wrong"
        );
    }
}

/// A key under which nearly everything expires, with a store whose clock is off, and clients that die: few values and short times, so
/// that what expired, what was removed and what nobody answered look alike.
fn fading(seed: u64) -> KeyHistory {
    let mut rng = Rng(seed ^ 0xfade);
    let mut sim = Sim::new(
        seed,
        Config {
            clients: 1 + rng.below(3),
            lost: rng.below(4) * 15,
            expiring: 80,
            lifetime: (0, 100 + rng.below(400)),
            over: rng.below(2) * 20,
            ahead: rng.below(2 * SLACK + 1) as i64 - SLACK as i64,
            values: 2,
            increments: rng.chance(60),
            floats: false,
            conditional: rng.chance(60),
            slack: SLACK,
            ..Config::default()
        },
    );
    if rng.chance(30) {
        // What it held before, or what that left.
        let value = sim.value();
        let expires = sim.now + rng.below(300);
        sim.object.held = rng.chance(70).then_some((value, 2, expires));
        sim.object.floor = 2;
        sim.history.initial = match sim.object.held {
            Some((value, version, expires)) => Initial::Present {
                value,
                version,
                expires,
            },
            None => Initial::AbsentAbove(2),
        };
    }
    sim.run(3 + rng.below(3) as usize);
    let mut history = sim.history;
    // Numbers expire too; short times between operations, so that several objects may expire in one.
    for op in &mut history.ops {
        if let Operation::Write { value, .. } = &mut op.operation
            && rng.chance(30)
        {
            *value = Value::Number(1);
        }
    }
    let forgetful = rng.chance(50);
    for op in &mut history.ops {
        if forgetful && rng.chance(70) {
            op.outcome = op.outcome.map(without_version);
        }
        if rng.chance(10) {
            (op.outcome, op.returned) = (None, NEVER);
        }
        if rng.chance(10)
            && let Operation::Write { expires, .. } = &mut op.operation
        {
            *expires = op.invoked + rng.below(300);
        }
    }
    for _ in 0..rng.below(3) {
        disturb(&mut history, &mut rng);
    }
    history
}

#[test]
fn agrees_where_objects_expire() {
    let fresh = fresh_seed();
    println!("seeds from {fresh}");
    let (mut right, mut wrong) = (0u64, 0u64);
    for seed in seeds(20_000) {
        let seed = seed.wrapping_add(fresh);
        let expected = judged_alike(seed, &fading(seed));
        *if expected { &mut right } else { &mut wrong } += 1;
    }
    if std::env::var_os("HYV_CHECK_SEED").is_none() {
        assert!(
            right > 5_000 && wrong > 3_000,
            "{right} right, {wrong} wrong"
        );
    }
}
