//! The store's clock, as far as it decides what has expired.
//!
//! It goes forward, and at any time is off the history's by no more than the slack. How far it has come is one number for each
//! configuration: the time that must have passed by now. It has if something took effect that was asked for when it had in any case,
//! or that was told that an object had expired; and an object may have expired as soon as the store's clock may have come so far.
//! What has a lower number may do all that the same with a higher one may.

use std::collections::BTreeMap;

use crate::op::{NEVER, Nanos};

/// The relation of the two clocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slack(pub Nanos);

impl Slack {
    /// The store's clock has come so far in whatever takes effect at `time` or after it.
    pub const fn passed(self, time: Nanos) -> Nanos {
        // At the last instant of the slack it may be either.
        time.saturating_sub(self.0).saturating_sub(1)
    }

    /// It may have come so far by `time`.
    pub const fn may_have_passed(self, time: Nanos) -> Nanos {
        time.saturating_add(self.0)
    }
}

/// The times at which objects may expire that are not written yet. Whether any other time has passed is of no interest, except for the
/// object that there is.
#[derive(Debug, Default)]
pub(crate) struct Expiries(BTreeMap<Nanos, usize>);

impl Expiries {
    /// One more write may make an object that expires then.
    pub fn add(&mut self, time: Nanos) {
        if time != NEVER {
            *self.0.entry(time).or_default() += 1;
        }
    }

    /// So many of these have been written, in all configurations, or make objects that have expired.
    pub fn remove(&mut self, time: Nanos, writes: usize) {
        if let Some(left) = self.0.get_mut(&time) {
            *left -= writes;
            if *left == 0 {
                self.0.remove(&time);
            }
        }
    }

    /// The lowest of all times that make no difference from `clock`.
    pub fn lowest_like(&self, clock: Nanos) -> Nanos {
        self.0
            .range(..=clock)
            .next_back()
            .map_or(0, |(time, _)| *time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_at_the_ends_of_the_slack() {
        let slack = Slack(10);
        assert!(slack.passed(110) < 100 && slack.passed(111) == 100);
        assert!(slack.may_have_passed(89) < 100 && slack.may_have_passed(90) == 100);
        assert_eq!(slack.passed(3), 0);
        assert_eq!(slack.may_have_passed(NEVER), NEVER);
    }

    #[test]
    fn a_clock_is_as_low_as_makes_no_difference() {
        let mut expiries = Expiries::default();
        for time in [20, 30, 30, NEVER] {
            expiries.add(time);
        }
        let all = |e: &Expiries| [19, 20, 29, 30, NEVER].map(|t| e.lowest_like(t));
        assert_eq!(all(&expiries), [0, 20, 20, 30, 30]);
        expiries.remove(30, 1);
        assert_eq!(all(&expiries), [0, 20, 20, 30, 30]);
        expiries.remove(30, 1);
        assert_eq!(all(&expiries), [0, 20, 20, 20, 20]);
        expiries.remove(25, 1);
        assert_eq!(all(&expiries), [0, 20, 20, 20, 20]);
    }
}
