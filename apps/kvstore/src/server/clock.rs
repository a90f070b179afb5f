//! The server's time: ns since 1970, never going back, read from the platform's clock every few turns.

use hyv_verbs::Context;

use super::limits::{LONGEST_ROUND_NS, TIME_TURNS};

#[derive(Debug)]
pub(super) struct Clock {
    /// The time.
    pub now: u64,
    /// What the platform's clock lacks.
    offset: u64,
    turns: u32,
    /// For how long the server has run, ns, as of the latest round of maintenance.
    pub ran: u64,
    /// When that round was.
    round: u64,
}

impl Clock {
    /// A clock that shows `unix_ns` now.
    pub fn new(context: &Context, unix_ns: u64) -> Self {
        Self {
            now: unix_ns,
            offset: unix_ns.wrapping_sub(context.now_ns()),
            turns: 0,
            ran: 0,
            round: unix_ns,
        }
    }

    /// Once a turn of the server: reads the clock in some of them.
    #[inline]
    pub fn turn(&mut self, context: &Context) {
        self.turns += 1;
        if self.turns >= TIME_TURNS {
            self.refresh(context);
        }
    }

    /// Reads the clock.
    #[inline]
    pub fn refresh(&mut self, context: &Context) {
        self.turns = 0;
        self.now = self.now.max(context.now_ns().wrapping_add(self.offset));
    }

    /// Reads the clock, at the beginning of a round of maintenance.
    pub fn round(&mut self, context: &Context) {
        self.refresh(context);
        let since = self.now - self.round;
        self.round = self.now;
        self.ran += since.min(LONGEST_ROUND_NS);
    }
}
