//! Deadlines by key: at most one per key, the earliest first. No clock of its own.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

/// A set of deadlines. Time is any monotonic count of ns.
#[derive(Debug)]
pub struct Timers<K> {
    order: BTreeSet<(u64, K)>,
    at: HashMap<K, u64>,
}

impl<K: Copy + Ord + Hash> Timers<K> {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            order: BTreeSet::new(),
            at: HashMap::new(),
        }
    }

    /// Sets the deadline of `key`, in place of an earlier one.
    pub fn set(&mut self, key: K, at_ns: u64) {
        if let Some(old) = self.at.insert(key, at_ns) {
            self.order.remove(&(old, key));
        }
        self.order.insert((at_ns, key));
    }

    /// Takes the deadline of `key` back, if there is one.
    pub fn cancel(&mut self, key: K) {
        if let Some(old) = self.at.remove(&key) {
            self.order.remove(&(old, key));
        }
    }

    /// The earliest deadline.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Takes out a key whose deadline is not after `now_ns`, the earliest first.
    pub fn expired(&mut self, now_ns: u64) -> Option<K> {
        let (at, key) = *self.order.first()?;
        if at > now_ns {
            return None;
        }
        self.cancel(key);
        Some(key)
    }

    /// Deadlines set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.at.len()
    }

    /// Whether none is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.at.is_empty()
    }
}

impl<K: Copy + Ord + Hash> Default for Timers<K> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_one_deadline_and_the_earliest_comes_first() {
        let mut t = Timers::new();
        assert!(t.is_empty() && t.expired(u64::MAX).is_none());
        t.set('a', 30);
        t.set('b', 20);
        t.set('a', 10);
        t.set('c', 15);
        t.cancel('c');
        t.cancel('c');
        assert_eq!((t.len(), t.next()), (2, Some(10)));
        assert_eq!(
            (t.expired(9), t.expired(10), t.expired(10)),
            (None, Some('a'), None)
        );
        assert_eq!((t.expired(u64::MAX), t.next()), (Some('b'), None));
        assert!(t.is_empty() && t.order.is_empty());
    }
}
