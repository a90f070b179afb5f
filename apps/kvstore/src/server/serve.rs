//! The loop around a server: poll, clean a little, and sleep when there is nothing to do.

use hyv_verbs::{Errno, Error};

use super::limits::{CLOCK_TURNS, MAINTENANCE_NS, MAX_SLEEP_NS};
use super::{Server, ServerError, verb};

/// What the loop asks of its surroundings.
pub trait Surroundings {
    /// Whether to end.
    fn should_stop(&mut self) -> bool;
    /// Called every 10 ms or so: counters for whoever watches.
    fn publish(&mut self, server: &Server);
}

/// How eagerly the loop waits.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// How long to poll without finding anything before sleeping, ns.
    pub spin_ns: u64,
}

impl Server {
    /// Serves until told to stop.
    ///
    /// # Errors
    /// When the device or its host is gone.
    pub fn serve(
        &mut self,
        options: ServeOptions,
        surroundings: &mut impl Surroundings,
    ) -> Result<(), ServerError> {
        let context = self.context.clone();
        let platform = context.platform();
        let mut idle_turns = 0u32;
        let mut busy_turns = 0u32;
        let mut idle_since = platform.now_ns();
        let mut maintained = idle_since;
        let gone = |_| ServerError::Verb {
            what: "the host is gone",
            source: hyv_verbs::Error::HostGone,
        };
        loop {
            if self.poll() > 0 {
                busy_turns += 1;
                if !busy_turns.is_multiple_of(CLOCK_TURNS) {
                    if busy_turns.is_multiple_of(4) {
                        self.clean();
                    }
                    idle_turns = 0;
                    continue;
                }
            } else {
                idle_turns += 1;
                if idle_turns == 1 {
                    idle_since = platform.now_ns();
                }
                if !idle_turns.is_multiple_of(CLOCK_TURNS) {
                    // No pause here: it takes longer than half a cache line's round trip.
                    continue;
                }
                platform.relax().map_err(gone)?;
            }
            let now = platform.now_ns();
            self.clock.refresh(&context);
            self.poll_connections()?;
            if now.saturating_sub(maintained) >= MAINTENANCE_NS || self.want_flush {
                maintained = now;
                self.want_flush = false;
                self.flush();
                surroundings.publish(self);
                if surroundings.should_stop() {
                    return Ok(());
                }
            }
            let cleaned = self.clean();
            if idle_turns >= CLOCK_TURNS
                && !cleaned
                && !self.has_work()
                && now.saturating_sub(idle_since) >= options.spin_ns
            {
                // Whatever comes after this read wakes the sleep below.
                let seen = platform.wake_seen();
                for group in &mut self.groups {
                    group.cq.req_notify(false);
                }
                self.flush();
                surroundings.publish(self);
                if surroundings.should_stop() {
                    return Ok(());
                }
                if self.poll() == 0 && !self.has_work() && !self.events_pending() {
                    platform.wait(seen, Some(MAX_SLEEP_NS)).map_err(gone)?;
                }
                for _ in context.poll_events() {
                    // Completions and connections are looked at in any case.
                }
                self.poll_connections()?;
                self.clock.refresh(&context);
                idle_turns = 0;
            }
        }
    }

    fn events_pending(&self) -> bool {
        use hyv_abi::window::summary;
        let bits = self
            .context
            .platform()
            .window()
            .events
            .summary
            .load(core::sync::atomic::Ordering::Acquire);
        bits & summary::CM != 0
    }

    /// Ends all connections, so that clients learn of it at once.
    ///
    /// # Errors
    /// When the device is gone; clients learn it from the host then.
    pub fn close(mut self) -> Result<(), ServerError> {
        for conn in self.conns.iter_mut().flatten() {
            match conn.id.disconnect() {
                // Its client died before the connection stood, or while it ended.
                Err(Error::Verb(refusal)) if refusal.errno == Errno::NotConn => {}
                ended => ended.map_err(verb("cannot disconnect"))?,
            }
        }
        Ok(())
    }
}
