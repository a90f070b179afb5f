//! Making the explanation of a violation short: the operations of the smallest window of the history that no order explains,
//! whatever came before it.

use std::cell::Cell;
use std::collections::HashSet;

use crate::clock::Slack;
use crate::limits::{MAX_SHORTENING_STEPS, MAX_SHORTENING_STEPS_IN_ALL, STEPS_PER_OPERATION};
use crate::model::{Action, State};
use crate::op::{NEVER, Nanos, Operation, Outcome, Value};
use crate::search::{Item, Verdict, Width, search};

/// What remains of a history that is not linearizable.
pub(crate) struct Window {
    /// Items that contradict each other, as indices, in the order of their invocation.
    pub needed: Vec<usize>,
    /// Items that overlap them and do not explain it, whether they took effect or not.
    pub others: usize,
    /// The item that could not take effect, and what the object may have been before it.
    pub last: usize,
    pub states: Vec<State>,
}

/// Configurations that may still be looked at, and how many were in all.
struct Budget<'a> {
    left: Cell<u64>,
    visited: &'a Cell<u64>,
}

impl Budget<'_> {
    fn get(&self) -> u64 {
        self.left.get()
    }

    fn take(&self, looked_at: u64) {
        self.left.set(self.left.get().saturating_sub(looked_at));
        self.visited.update(|v| v + looked_at);
    }
}

/// One candidate: items with their indices in the whole history.
#[derive(Clone)]
struct Part {
    items: Vec<Item>,
    origin: Vec<usize>,
    initial: State,
    slack: Slack,
}

impl Part {
    fn fails(&self, budget: &Budget<'_>) -> Option<(usize, Vec<State>)> {
        let needed = STEPS_PER_OPERATION * self.items.len() as u64;
        let given = (MAX_SHORTENING_STEPS + needed).min(budget.get() + needed);
        let mut left = given;
        let verdict = search(
            &self.items,
            self.initial,
            self.slack,
            &mut left,
            Width::WHOLE,
        );
        budget.take(given - left);
        match verdict {
            Verdict::Violation { item, states, .. } => Some((item, states)),
            Verdict::Linearizable | Verdict::GaveUp { .. } => None,
        }
    }

    /// What is known at `time`: what was asked for until then, and what had returned.
    fn until(&self, time: Nanos) -> Self {
        self.map(|mut item| {
            if item.invoked > time {
                return None;
            }
            if item.returned > time {
                item.must = false;
                item.outcome = None;
            }
            has_use(&item).then_some(item)
        })
    }

    /// What happened from `time` on, with anything before.
    fn from(&self, time: Nanos) -> Self {
        let mut part = self.map(|mut item| {
            if item.must && item.returned < time {
                return None;
            }
            if item.invoked < time {
                item.must = false;
            }
            has_use(&item).then_some(item)
        });
        part.initial = State::unknown(self.slack.passed(time));
        if self.initial.expires != NEVER || self.items.iter().any(Item::expires) {
            part.items.push(Item::VANISH);
            // It is no item of the whole, and not one that must.
            part.origin.push(usize::MAX);
        }
        part
    }

    /// The same with some items that may take effect or not.
    fn weakened(&self, which: &HashSet<usize>) -> Self {
        let mut at = 0;
        self.map(|mut item| {
            if which.contains(&at) {
                item.must = false;
            }
            at += 1;
            has_use(&item).then_some(item)
        })
    }

    fn map(&self, mut f: impl FnMut(Item) -> Option<Item>) -> Self {
        let (mut items, mut origin) = (Vec::new(), Vec::new());
        for (item, from) in self.items.iter().zip(&self.origin) {
            if let Some(item) = f(item.clone()) {
                items.push(item);
                origin.push(*from);
            }
        }
        Self {
            items,
            origin,
            ..*self
        }
    }
}

/// An observation that need not have been made, or that nobody was told, allows nothing.
fn has_use(item: &Item) -> bool {
    if item.must {
        return true;
    }
    match (&item.action, &item.outcome) {
        (Action::Operation(Operation::Read { .. }), _) => false,
        (_, Some(outcome)) => !outcome.is_observation(),
        (_, None) => true,
    }
}

/// The smallest window found of a history in which the item `stuck` could not take effect. `proved`: the states that were possible
/// before it, if that proves that the history is not linearizable; otherwise only a window does, and if there is none the answer
/// is none. What was looked at is added to `visited`.
pub(crate) fn shorten(
    items: &[Item],
    initial: State,
    slack: Slack,
    stuck: usize,
    proved: Option<Vec<State>>,
    visited: &mut u64,
) -> Option<Window> {
    let whole = Part {
        items: items.to_vec(),
        origin: (0..items.len()).collect(),
        initial,
        slack,
    };
    // It was evident at that return, or later, when it was seen that something before it was still to come.
    let seen = items[stuck].returned;
    let mut ends: Vec<Nanos> = items
        .iter()
        .filter(|i| i.must && i.returned >= seen)
        .map(|i| i.returned)
        .collect();
    ends.sort_unstable();
    ends.dedup();
    let mut starts: Vec<Nanos> = items
        .iter()
        .map(|i| i.invoked)
        .filter(|t| *t <= seen)
        .collect();
    starts.sort_unstable_by(|a, b| b.cmp(a));
    starts.dedup();

    let budget = &Budget {
        left: Cell::new(MAX_SHORTENING_STEPS_IN_ALL),
        visited: Cell::from_mut(visited),
    };
    // Short windows first: a long one may be too much to look at.
    let (end, start) = (ends.len().checked_sub(1)?, starts.len().checked_sub(1)?);
    let mut size = 1;
    let around = loop {
        let (e, s) = (size.min(end), size.min(start));
        let part = whole.until(ends[e]).from(starts[s]);
        if let Some(why) = part.fails(budget) {
            break Some((e, s, part, why));
        }
        if (e, s) == (end, start) {
            break None;
        }
        size *= 2;
    };
    let (mut part, mut failure) = match around {
        Some((e, s, part, why)) => {
            let mut best = (part, why);
            let sooner = first_failing(&ends[..=e], budget, |t| whole.until(t).from(starts[s]));
            let until = match sooner {
                Some((at, sooner)) => {
                    best = sooner;
                    ends[at]
                }
                None => ends[e],
            };
            if let Some((_, later)) =
                first_failing(&starts[..=s], budget, |t| whole.until(until).from(t))
            {
                best = later;
            }
            best
        }
        // It takes what the key held at first.
        None => {
            let states = proved?;
            first_failing(&ends, budget, |t| whole.until(t))
                .map_or((whole, (stuck, states)), |(_, sooner)| sooner)
        }
    };

    // What takes no part in it.
    let mut size = part.items.len();
    while size > 0 && budget.get() > 0 {
        let mut at = 0;
        while at < part.items.len() && budget.get() > 0 {
            let chunk: HashSet<usize> = (at..(at + size).min(part.items.len()))
                .filter(|i| part.items[*i].must)
                .collect();
            at += size;
            if chunk.is_empty() {
                continue;
            }
            let shorter = part.weakened(&chunk);
            if let Some(why) = shorter.fails(budget) {
                // Observations are gone now, and what follows has moved up.
                at -= part.items.len() - shorter.items.len();
                (part, failure) = (shorter, why);
            }
        }
        size /= 2;
    }

    let (item, states) = failure;
    let mut needed: Vec<usize> = part
        .items
        .iter()
        .zip(&part.origin)
        .filter(|(i, _)| i.must)
        .map(|(_, o)| *o)
        .collect();
    needed.sort_by_key(|i| (items[*i].invoked, items[*i].returned));
    Some(Window {
        others: part.items.len() - needed.len(),
        needed,
        last: part.origin[item],
        states,
    })
}

/// A part that fails, and at which item.
type Failing = (Part, (usize, Vec<State>));

/// The first of `times` whose part fails, given that parts of later ones fail too.
fn first_failing(
    times: &[Nanos],
    budget: &Budget<'_>,
    part: impl Fn(Nanos) -> Part,
) -> Option<(usize, Failing)> {
    let mut best = None;
    let (mut lo, mut hi) = (0, times.len());
    // Twice as far each time, then by halves.
    let mut probe = 0;
    while lo < hi {
        let at = if best.is_none() {
            probe.min(hi - 1)
        } else {
            lo + (hi - lo) / 2
        };
        let candidate = part(times[at]);
        match candidate.fails(budget) {
            Some(why) => {
                best = Some((at, (candidate, why)));
                hi = at;
            }
            None => {
                lo = at + 1;
                probe = 2 * at + 1;
            }
        }
    }
    best
}

/// Values that reads found and nobody can have written: index of the item.
pub(crate) fn never_written(items: &[Item], initial: State) -> Option<usize> {
    let mut written = HashSet::new();
    let mut any_number = false;
    for item in items {
        match (&item.action, item.outcome) {
            (Action::Operation(Operation::Write { value, .. }), _) => {
                written.insert(*value);
            }
            (_, Some(Outcome::Added { value, .. })) => {
                written.insert(Value::Number(value));
            }
            (Action::Operation(Operation::Increment { .. }), None) => any_number = true,
            _ => {}
        }
    }
    match initial.content {
        crate::model::Content::Present(value) => {
            written.insert(value);
        }
        crate::model::Content::Absent => {}
        crate::model::Content::Unknown | crate::model::Content::Exists => return None,
    }
    items.iter().position(|item| match item.outcome {
        Some(Outcome::Found { value, .. }) => {
            !(written.contains(&value) || any_number && matches!(value, Value::Number(_)))
        }
        _ => false,
    })
}

/// Two changes that were told the same version, as indices of items.
pub(crate) fn same_version(items: &[Item]) -> Option<(usize, usize)> {
    let mut changes: Vec<(u64, usize)> = items
        .iter()
        .enumerate()
        .filter_map(|(at, i)| match i.outcome {
            Some(Outcome::Written { version } | Outcome::Added { version, .. }) if version != 0 => {
                Some((version, at))
            }
            _ => None,
        })
        .collect();
    changes.sort_unstable();
    changes
        .windows(2)
        .find(|w| w[0].0 == w[1].0)
        .map(|w| (w[0].1, w[1].1))
}
