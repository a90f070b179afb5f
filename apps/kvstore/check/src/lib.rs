//! Histories of what clients of the store saw, and a checker that tells whether they are linearizable: whether each operation
//! can have taken effect at one instant between its invocation and its return, so that all answers fit.
//!
//! Each key is checked by itself, which suffices: linearizability is local. The object that a key names is RAMCloud's: a value with a
//! version that never goes back, conditional operations, increments, expiry. An operation without an answer (the client was
//! killed, the reply was lost) may have taken effect at any time after it was asked for, or never; attempts with the same
//! request id are one operation.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`op`] | operations and outcomes |
//! | [`history`] | who did what when, by key |
//! | [`recorder`] | writes a client's history, cheaply |
//! | [`reader`] | reads it back; names the line of damage |
//! | [`limits`] | every limit, with its reason |
//!
//! ```
//! use kvstore_check::op::{Operation, Outcome, Value};
//! use kvstore_check::recorder::Recorder;
//! use kvstore_check::{History, check};
//!
//! let mut file = Vec::new();
//! let mut recorder = Recorder::new(&mut file, 1, 0);
//! let id = recorder.invoke(10, b"key", &Operation::write(Value::of(b"one")));
//! recorder.respond(20, id, &Outcome::Written { version: 1 });
//! let id = recorder.invoke(30, b"key", &Operation::READ);
//! recorder.respond(40, id, &Outcome::Absent);
//! recorder.finish()?;
//!
//! let mut history = History::new();
//! history.read("client-1".as_ref(), &file[..]).map_err(std::io::Error::other)?;
//! let report = check(&history);
//! assert!(report.failures[0].to_string().contains("read -> no such object"));
//! # Ok::<(), std::io::Error>(())
//! ```

#![forbid(unsafe_code)]

mod clock;
mod explain;
mod format;
pub mod history;
pub mod limits;
mod model;
pub mod op;
pub mod reader;
pub mod recorder;
mod search;
mod seen;
mod unanswered;

use std::fmt;

use clock::Slack;
pub use history::{History, Initial, KeyHistory, Op};
use limits::{MAX_SHOWN, MAX_STATES_SHOWN};
use model::{Action, State};
use op::{NEVER, Nanos, Operation, Outcome};
use search::{Item, Verdict, Width, generous, search};

/// What was checked, and what was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Keys.
    pub keys: usize,
    /// Operations, attempts counted apart.
    pub operations: usize,
    /// Of these, such whose answer nobody got.
    pub unanswered: usize,
    /// Configurations that were looked at, of all keys and in all searches: what checking cost.
    pub visited: u64,
    /// Keys whose history is not linearizable, or that could not be judged; in the order of the keys.
    pub failures: Vec<Failure>,
}

/// A key whose history was not found to be linearizable.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The key.
    pub key: Vec<u8>,
    /// Why.
    pub why: Why,
}

/// Why a history was not accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Why {
    /// No order explains the operations.
    NotLinearizable(Violation),
    /// There are too many orders to look at all; nothing is known. An error like any other: what is not proved does not count.
    Undecided {
        /// Operations on the key.
        operations: usize,
        /// Configurations that were looked at.
        visited: u64,
        /// The one at whose return it was.
        at: Op,
    },
}

/// Operations that contradict each other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// What is wrong with them.
    pub what: String,
    /// As few as were found, in the order of their invocation.
    pub ops: Vec<Op>,
    /// Others at the same time that do not explain it.
    pub others: usize,
    /// What the object can have been before the last of the operations that could not take effect.
    pub states: Vec<String>,
}

impl Report {
    /// How many keys are not linearizable, and how many could not be judged.
    #[must_use]
    pub fn wrong_and_undecided(&self) -> (usize, usize) {
        let wrong = |f: &&Failure| matches!(f.why, Why::NotLinearizable(_));
        let wrong = self.failures.iter().filter(wrong).count();
        (wrong, self.failures.len() - wrong)
    }
}

/// Checks every key.
#[must_use]
pub fn check(history: &History) -> Report {
    let mut report = Report::default();
    for (key, key_history) in history.iter() {
        report.keys += 1;
        report.operations += key_history.ops.len();
        report.unanswered += key_history
            .ops
            .iter()
            .filter(|op| op.outcome.is_none())
            .count();
        if let Err(why) = judge(key_history, history.clock_slack, &mut report.visited) {
            report.failures.push(Failure {
                key: key.to_vec(),
                why,
            });
        }
    }
    report
}

/// Checks one key. `clock_slack` as [`History::clock_slack`].
///
/// # Errors
/// What contradicts itself, or that too much would have to be looked at.
pub fn check_key(history: &KeyHistory, clock_slack: Nanos) -> Result<(), Why> {
    judge(history, clock_slack, &mut 0)
}

/// The same, adding what was looked at to `visited`.
fn judge(history: &KeyHistory, clock_slack: Nanos, visited: &mut u64) -> Result<(), Why> {
    let before = *visited;
    let found = |what: &str, ops: Vec<Op>| {
        Why::NotLinearizable(Violation {
            what: what.to_owned(),
            ops,
            others: 0,
            states: Vec::new(),
        })
    };
    for op in &history.ops {
        if let Some(outcome) = &op.outcome
            && !op.operation.may_return(outcome)
        {
            return Err(found(
                "this is no answer to what was asked",
                vec![op.clone()],
            ));
        }
    }
    let ops = history.merged().map_err(|two| {
        found(
            "one request was answered differently: it was executed twice, or its result was not kept",
            vec![two.0, two.1],
        )
    })?;
    let initial = initial_state(history.initial);
    let items = Items::of(&ops, history.initial);
    let slack = Slack(clock_slack);
    let op = |item: usize| items.origin[item].map(|at| ops[at].clone());
    if let Some(item) = explain::never_written(&items.items, initial) {
        return Err(found(
            "a value that nobody wrote",
            op(item).into_iter().collect(),
        ));
    }
    if let Some((a, b)) = explain::same_version(&items.items) {
        return Err(found(
            "two changes with the same version",
            [a, b].into_iter().filter_map(op).collect(),
        ));
    }
    let mut stuck = None;
    for width in Width::STEPS {
        let given = generous(items.items.len());
        let mut left = given;
        let verdict = search(&items.items, initial, slack, &mut left, width);
        *visited += given - left;
        match verdict {
            Verdict::Linearizable => return Ok(()),
            Verdict::GaveUp { item } => {
                stuck = Some(item);
                break;
            }
            Verdict::Violation {
                item,
                states,
                proved,
            } => {
                stuck = Some(item);
                // To look a little wider costs less than to look for a window that proves it.
                if !proved && width == Width::STEPS[0] {
                    continue;
                }
                let whole = proved.then_some(states);
                let window = explain::shorten(&items.items, initial, slack, item, whole, visited);
                if let Some(window) = window {
                    return Err(Why::NotLinearizable(violation(&window, op)));
                }
            }
        }
    }
    Err(Why::Undecided {
        operations: ops.len(),
        visited: *visited - before,
        at: stuck.and_then(op).unwrap_or_else(|| ops[0].clone()),
    })
}

fn violation(window: &explain::Window, op: impl Fn(usize) -> Option<Op>) -> Violation {
    let last = op(window.last).map_or_else(String::new, |op| {
        format!("; client {} #{} does not fit", op.client, op.number)
    });
    let mut states: Vec<String> = window.states.iter().map(ToString::to_string).collect();
    states.sort_unstable();
    states.dedup();
    Violation {
        what: format!("no order of these operations explains their answers{last}"),
        ops: window.needed.iter().filter_map(|i| op(*i)).collect(),
        others: window.others,
        states,
    }
}

const fn initial_state(initial: Initial) -> State {
    match initial {
        Initial::Fresh => State::FRESH,
        Initial::Unknown => State::unknown(0),
        Initial::AbsentAbove(version) => State::absent_above(version),
        Initial::Present {
            value,
            version,
            expires,
        } => State::present(value, version, expires),
    }
}

/// Operations as steps of a search.
struct Items {
    items: Vec<Item>,
    /// Which operation a step is; none for what may happen to an object of which nothing is known.
    origin: Vec<Option<usize>>,
}

impl Items {
    fn of(ops: &[Op], initial: Initial) -> Self {
        let mut this = Self {
            items: Vec::with_capacity(ops.len()),
            origin: Vec::with_capacity(ops.len()),
        };
        for (at, op) in ops.iter().enumerate() {
            let learnt_nothing = match op.outcome {
                None => matches!(op.operation, Operation::Read { .. }),
                Some(outcome) => outcome == Outcome::Refused,
            };
            if learnt_nothing {
                continue;
            }
            this.items.push(Item {
                action: Action::Operation(op.operation.clone()),
                outcome: op.outcome,
                invoked: op.invoked,
                returned: op.returned,
                must: op.outcome.is_some(),
            });
            this.origin.push(Some(at));
        }
        if initial == Initial::Unknown {
            this.items.push(Item::VANISH);
            this.origin.push(None);
        }
        this
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = String::from_utf8_lossy(&self.key);
        let key = key.escape_debug();
        match &self.why {
            Why::Undecided {
                operations,
                visited,
                at,
            } => write!(
                f,
                "key `{key}`: undecided after {visited} states, so nothing is known: too many of its {operations} operations were under \
                 way at once and told nothing that orders them, up to client {} #{}; record versions, or use fewer clients a key",
                at.client, at.number
            ),
            Why::NotLinearizable(violation) => write!(f, "key `{key}`: {violation}"),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        let start = self.ops.iter().map(|op| op.invoked).min().unwrap_or(0);
        let micros = |time: Nanos| (time - start) as f64 / 1e3;
        for op in self.ops.iter().take(MAX_SHOWN) {
            write!(f, "\n  {:>12.3} us to ", micros(op.invoked))?;
            match op.returned {
                NEVER => write!(f, "{:>12}   ", "?")?,
                t => write!(f, "{:>12.3} us", micros(t.max(start)))?,
            }
            write!(f, "  {op}")?;
        }
        if self.ops.len() > MAX_SHOWN {
            write!(f, "\n  and {} more", self.ops.len() - MAX_SHOWN)?;
        }
        if self.others > 0 {
            write!(
                f,
                "\n  {} more may have taken effect in between and do not explain it",
                self.others
            )?;
        }
        match self.states.split_first() {
            None => {}
            Some((one, [])) => write!(f, "\n  before it, the object was: {one}")?,
            Some((one, others)) => {
                write!(f, "\n  before it, the object was one of: {one}")?;
                for state in others.iter().take(MAX_STATES_SHOWN - 1) {
                    write!(f, ", {state}")?;
                }
                if others.len() >= MAX_STATES_SHOWN {
                    write!(f, ", or {} others", others.len() + 1 - MAX_STATES_SHOWN)?;
                }
            }
        }
        write!(f, "\n  0 is at {start} ns of the history's clock")
    }
}
