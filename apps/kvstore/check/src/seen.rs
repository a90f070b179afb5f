//! Values that nobody saw, made alike: fewer classes of unanswered operations for the search.

use std::collections::{BTreeSet, HashSet};

use crate::model::Action;
use crate::op::{Addend, Operation, Outcome, Value};
use crate::search::Item;

/// Which values anybody saw. Unanswered writes of all others differ in nothing that can be noticed.
pub(crate) struct Seen {
    values: HashSet<Value>,
    numbers: BTreeSet<i64>,
    /// What unanswered increments may add to a number in all, from and to; none: anything.
    reach: Option<(i64, i64)>,
    /// A number that stands for all from which no sum reaches one that was seen.
    unseen: Option<u64>,
}

/// The value that stands for all that are no numbers and that nobody saw.
pub(crate) const UNSEEN: Value = Value::Digest {
    len: u32::MAX,
    hash: 0,
};

impl Seen {
    pub fn of(items: &[Item]) -> Self {
        let mut this = Self {
            values: HashSet::new(),
            numbers: BTreeSet::new(),
            reach: Some((0, 0)),
            unseen: None,
        };
        for item in items {
            match (&item.action, item.outcome) {
                (_, Some(Outcome::Found { value, .. })) => {
                    this.values.insert(value);
                    if let Value::Number(n) = value {
                        this.numbers.insert(n as i64);
                    }
                }
                (
                    Action::Operation(Operation::Increment { by, .. }),
                    Some(Outcome::Added { value, .. }),
                ) => match by {
                    // It saw what was there before.
                    Addend::I64(by) => {
                        this.numbers.insert((value as i64).wrapping_sub(*by));
                    }
                    Addend::F64(_) => this.reach = None,
                },
                (Action::Operation(Operation::Increment { by, .. }), None) => {
                    this.reach = this.reach.and_then(|(from, to)| match *by {
                        Addend::I64(by) => {
                            Some((from.checked_add(by.min(0))?, to.checked_add(by.max(0))?))
                        }
                        Addend::F64(_) => None,
                    });
                }
                _ => {}
            }
        }
        for item in items.iter().filter(|i| !i.must) {
            if let Action::Operation(Operation::Write {
                value: Value::Number(n),
                ..
            }) = item.action
                && !this.can_be_seen(n)
            {
                this.unseen = Some(n);
                break;
            }
        }
        this
    }

    fn can_be_seen(&self, number: u64) -> bool {
        let sums = self.reach.and_then(|(from, to)| {
            let n = number as i64;
            Some(n.checked_add(from)?..=n.checked_add(to)?)
        });
        sums.is_none_or(|sums| self.numbers.range(sums).next().is_some())
    }

    pub fn simplified(&self, action: &Action) -> Action {
        let mut action = action.clone();
        if let Action::Operation(Operation::Write { value, .. }) = &mut action {
            match *value {
                Value::Number(n) if !self.can_be_seen(n) => {
                    *value = Value::Number(self.unseen.unwrap_or(n));
                }
                Value::Digest { .. } if !self.values.contains(value) => *value = UNSEEN,
                Value::Number(_) | Value::Digest { .. } => {}
            }
        }
        action
    }
}
