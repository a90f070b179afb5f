//! Histories: what happened to each key, put together from what several clients recorded.

use std::collections::HashMap;
use std::fmt;

use crate::op::{NEVER, Nanos, Operation, Outcome, RequestId, Value, Version};

/// One operation of a history.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Op {
    /// Which client did it, as the history names it.
    pub client: u32,
    /// The client's number for it.
    pub number: u64,
    /// When it was asked for, at the latest.
    pub invoked: Nanos,
    /// When its result was there, at the earliest; [`NEVER`]: nobody knows whether and when it took effect.
    pub returned: Nanos,
    /// What was asked.
    pub operation: Operation,
    /// What was told; none if the client was killed or the reply was lost.
    pub outcome: Option<Outcome>,
    /// Retries of one request have the same.
    pub request: RequestId,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "client {} #{}: {}",
            self.client, self.number, self.operation
        )?;
        match &self.outcome {
            Some(outcome) => write!(f, " -> {outcome}"),
            None => f.write_str(" -> no answer"),
        }
    }
}

/// What a key held before its first operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Initial {
    /// Nothing, and never did.
    #[default]
    Fresh,
    /// Nobody knows.
    Unknown,
    /// Nothing, and what it held had versions up to this.
    AbsentAbove(Version),
    /// An object.
    Present {
        /// Its value.
        value: Value,
        /// Its version; 0: not known.
        version: Version,
        /// When it expires.
        expires: Nanos,
    },
}

/// The operations on one key.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KeyHistory {
    /// What it held before.
    pub initial: Initial,
    /// In no particular order.
    pub ops: Vec<Op>,
}

/// The operations of some clients on some keys.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct History {
    index: HashMap<Box<[u8]>, usize>,
    keys: Vec<KeyHistory>,
    /// How far the store's clock may be off the history's, either way, when it says that an object expired.
    pub clock_slack: Nanos,
}

impl History {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What happened to `key`, for adding to.
    pub fn key(&mut self, key: &[u8]) -> &mut KeyHistory {
        let at = self.place(key);
        &mut self.keys[at]
    }

    /// Number of `key` in this history.
    pub(crate) fn place(&mut self, key: &[u8]) -> usize {
        if let Some(&at) = self.index.get(key) {
            return at;
        }
        let at = self.keys.len();
        self.index.insert(key.into(), at);
        self.keys.push(KeyHistory::default());
        at
    }

    pub(crate) fn at(&mut self, place: usize) -> &mut KeyHistory {
        &mut self.keys[place]
    }

    /// What happened to `key`, if it is part of the history.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&KeyHistory> {
        self.index.get(key).map(|&at| &self.keys[at])
    }

    /// The keys in their order, each with what happened to it.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &KeyHistory)> {
        let mut keys: Vec<_> = self.index.iter().collect();
        keys.sort_unstable();
        keys.into_iter().map(|(key, &at)| (&**key, &self.keys[at]))
    }

    /// Operations of all keys, retries counted apart.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.iter().map(|k| k.ops.len()).sum()
    }

    /// Whether there is no operation.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Two answers to one request that differ: it was executed twice, or its result was not kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TwoAnswers(pub Op, pub Op);

impl KeyHistory {
    /// The operations in the order of their invocation, the attempts of one request as one operation. It was asked for with the
    /// first attempt, and done when the first reply came.
    pub(crate) fn merged(&self) -> Result<Vec<Op>, Box<TwoAnswers>> {
        let mut first: HashMap<RequestId, usize> = HashMap::new();
        let mut merged: Vec<Op> = Vec::with_capacity(self.ops.len());
        for op in &self.ops {
            if op.request.is_some() {
                if let Some(&at) = first.get(&op.request) {
                    merge(&mut merged[at], op)?;
                    continue;
                }
                first.insert(op.request, merged.len());
            }
            merged.push(op.clone());
        }
        merged.sort_by_key(|op| (op.invoked, op.returned, op.client, op.number));
        Ok(merged)
    }
}

fn merge(into: &mut Op, other: &Op) -> Result<(), Box<TwoAnswers>> {
    let differ = |a: &Op| Err(Box::new(TwoAnswers(a.clone(), other.clone())));
    if into.operation != other.operation {
        return differ(into);
    }
    // A refused attempt had no effect and says nothing about the others.
    match (into.outcome, other.outcome) {
        (Some(Outcome::Refused), _) => {
            into.outcome = other.outcome;
            into.returned = other.returned;
        }
        (_, Some(Outcome::Refused)) => {}
        (Some(a), Some(b)) if a != b => return differ(into),
        (a, b) => {
            into.outcome = a.or(b);
            into.returned = into.returned.min(other.returned);
        }
    }
    into.invoked = into.invoked.min(other.invoked);
    if into.outcome.is_none() {
        into.returned = NEVER;
    }
    Ok(())
}
