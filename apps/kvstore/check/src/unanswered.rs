//! Operations without an answer: which do the same, so that it does not matter which of them took effect.

use std::collections::VecDeque;

use crate::model::Action;
use crate::op::{NEVER, Nanos, Operation, Outcome};
use crate::seen::UNSEEN;

/// Unanswered operations that do the same.
pub(crate) struct Class {
    pub action: Action,
    pub outcome: Option<Outcome>,
    /// Those asked for so far that have not taken effect in every configuration, the oldest first: when.
    pub asked: VecDeque<Nanos>,
    /// Nothing that took effect right before it matters.
    pub overwrites: bool,
    /// The class that it has become the same as.
    pub alias: Option<u32>,
}

/// Rewrites the rules of an operation for an object whose version is at least `lowest` if it exists.
pub(crate) fn forget_versions(action: &mut Action, lowest: u64) {
    let Action::Operation(operation) = action else {
        return;
    };
    let mut rules = operation.rules();
    if rules.is_none() {
        return;
    }
    if rules.at_most.is_some_and(|v| v < lowest) {
        rules.at_most = None;
    }
    // It can only have another one.
    if rules.other_than.is_some_and(|v| v < lowest) {
        rules.other_than = None;
        rules.exists = true;
    }
    if rules.exists {
        rules.at_most = None;
        rules.other_than = None;
    }
    *operation = operation.clone().unless(rules);
}

/// Makes a write the same as others that differ in nothing but an expiry that has passed by `clock`, or that cannot have by `end`; tells
/// whether it has passed.
pub(crate) fn forget_expiry(action: &mut Action, clock: Nanos, end: Nanos) -> bool {
    let Action::Operation(Operation::Write { value, expires, .. }) = action else {
        return false;
    };
    if *expires > end {
        *expires = NEVER;
    }
    let passed = *expires <= clock;
    if passed {
        (*value, *expires) = (UNSEEN, 0);
    }
    passed
}

/// When what a write makes expires; never, if it has expired as soon as it is there.
pub(crate) const fn written_expiry(action: &Action) -> Nanos {
    match action {
        Action::Operation(Operation::Write { expires, .. }) if *expires != 0 => *expires,
        _ => NEVER,
    }
}

/// Nothing that took effect right before it matters.
pub(crate) fn overwrites(action: &Action, outcome: Option<&Outcome>) -> bool {
    match action {
        Action::Operation(operation @ (Operation::Write { .. } | Operation::Remove { .. })) => {
            operation.rules().is_none() && outcome.is_none()
        }
        _ => false,
    }
}
