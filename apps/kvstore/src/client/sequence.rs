//! Numbers of requests that execute once: which is next, and which is the first that is not complete.

use crate::limits::MAX_RESULTS;
use crate::proto::Once;

/// The numbers of one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sequence {
    first_incomplete: u64,
    next: u64,
    /// Bit n: `first_incomplete + n` is complete.
    complete: u64,
}

const _: () = assert!(MAX_RESULTS <= 64);

impl Sequence {
    pub const fn new() -> Self {
        Self {
            first_incomplete: 1,
            next: 1,
            complete: 0,
        }
    }

    /// The next `count` numbers. None: too many are incomplete.
    pub const fn take(&mut self, count: usize) -> Option<Once> {
        let sequence = self.next;
        if sequence + count as u64 - self.first_incomplete > MAX_RESULTS as u64 {
            return None;
        }
        self.next += count as u64;
        Some(Once {
            sequence,
            first_incomplete: self.first_incomplete,
        })
    }

    /// Takes back the last `count` numbers, which nobody has heard of.
    pub const fn untake(&mut self, once: Once) {
        self.next = once.sequence;
    }

    /// The results of `count` requests from `sequence` on were seen.
    pub const fn complete(&mut self, sequence: u64, count: usize) {
        let behind = sequence - self.first_incomplete;
        let bits = if count >= 64 {
            u64::MAX
        } else {
            (1 << count) - 1
        };
        self.complete |= bits << behind;
        let done = self.complete.trailing_ones();
        self.first_incomplete += done as u64;
        self.complete = if done == 64 { 0 } else { self.complete >> done };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_given_as_long_as_results_may_be_kept() {
        let mut s = Sequence::new();
        let all: alloc::vec::Vec<Once> = (0..MAX_RESULTS).map(|_| s.take(1).unwrap()).collect();
        assert_eq!(all[0].sequence, 1);
        assert_eq!(s.take(1), None);
        // Out of order: nothing is acknowledged before the first is complete.
        for once in all.iter().skip(1) {
            s.complete(once.sequence, 1);
        }
        assert_eq!(s.take(1), None);
        s.complete(1, 1);
        let next = s.take(1).unwrap();
        assert_eq!(next.sequence, MAX_RESULTS as u64 + 1);
        assert_eq!(next.first_incomplete, next.sequence);
    }

    #[test]
    fn many_at_once_and_back() {
        let mut s = Sequence::new();
        assert_eq!(s.take(MAX_RESULTS + 1), None);
        let many = s.take(MAX_RESULTS).unwrap();
        s.complete(many.sequence, MAX_RESULTS);
        let before = s;
        let one = s.take(3).unwrap();
        assert_eq!(one.first_incomplete, one.sequence);
        s.untake(one);
        assert_eq!(s, before);
    }
}
