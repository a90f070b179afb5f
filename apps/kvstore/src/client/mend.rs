//! Connecting, and getting a lost connection back: attempts with growing pauses, and what becomes of the requests.

use alloc::boxed::Box;
use core::time::Duration;

use super::link::{Connecting, Parts, Progress};
use super::{Client, ClientError, Repeat, State, Ticket, WINDOW};
use crate::proto::{Hello, Refusal, Reply, Welcome};

/// Pause after the first failed attempt; each further one is twice as long.
const FIRST_PAUSE_NS: u64 = 1_000_000;
/// Longest pause.
const LAST_PAUSE_NS: u64 = 200_000_000;
/// What clocks at both ends may differ by in rate: one part in so many.
const DRIFT: u64 = 1_000;

/// How far it is with the connection, and what is known of the server.
pub(super) struct Mending {
    connecting: Option<Box<Connecting>>,
    /// When the connection was lost, ns; 0: it stands.
    lost_at: u64,
    /// When to try again, ns.
    retry_at: u64,
    pause: u64,
    /// What came of the last attempt.
    last: Option<ClientError>,
    /// What every call gets: the connection is lost for good, or the server has lost its memory.
    pub refuses: Option<ClientError>,
    pub reconnects: u64,
    pub repeats: u64,
    /// This client's id; 0 at first.
    client: u64,
    pub welcome: Option<Welcome>,
    /// When the last attempt began, ns: the server's time in `welcome` was read later.
    asked_at: u64,
}

impl Mending {
    pub const fn new(now: u64) -> Self {
        Self {
            connecting: None,
            lost_at: now,
            retry_at: 0,
            pause: FIRST_PAUSE_NS,
            last: None,
            refuses: None,
            reconnects: 0,
            repeats: 0,
            client: 0,
            welcome: None,
            asked_at: 0,
        }
    }

    /// The latest time that the server's clock may show when this one's shows `now`, ns.
    pub fn latest_server_time(&self, now: u64) -> u64 {
        let passed = now.saturating_sub(self.asked_at);
        self.welcome.map_or(u64::MAX, |welcome| {
            welcome
                .now_ns
                .saturating_add(passed + passed / DRIFT + FIRST_PAUSE_NS)
        })
    }
}

type Each<'e> = &'e mut dyn FnMut(Ticket, Result<Reply<'_>, ClientError>);

impl Client {
    /// Makes the first connection, waiting for it.
    pub(super) fn connect_first(&mut self) -> Result<(), ClientError> {
        let start = self.context.now_ns();
        self.begin()?;
        loop {
            self.step(&mut |_, _| {})?;
            if self.link.is_some() {
                return Ok(());
            }
            let passed = Duration::from_nanos(self.context.now_ns().saturating_sub(start));
            if passed >= self.config.timeout {
                return Err(ClientError::Timeout(self.config.timeout));
            }
            self.pause(Duration::from_millis(1))?;
        }
    }

    /// The server's clock now, ns since 1970, as far as can be told: at most a round trip ahead, or behind by what the clocks' rates differ.
    /// An object that is to live for a second is written with this and a second as its expiry.
    #[must_use]
    pub fn server_time(&self) -> u64 {
        let passed = self.context.now_ns().saturating_sub(self.mending.asked_at);
        self.mending
            .welcome
            .map_or(0, |welcome| welcome.now_ns.saturating_add(passed))
    }

    /// The random number of the server's life.
    #[must_use]
    pub fn server_epoch(&self) -> u64 {
        self.mending.welcome.map_or(0, |welcome| welcome.epoch)
    }

    /// This client's id at the server; another one after its lease expired or the server was started again.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.mending.client
    }

    /// How often a lost connection was made anew.
    #[must_use]
    pub const fn reconnects(&self) -> u64 {
        self.mending.reconnects
    }

    /// How many requests were to be sent again after their connection was lost.
    #[must_use]
    pub const fn repeats(&self) -> u64 {
        self.mending.repeats
    }

    /// Says that the caller knows of the server's restart, after [`ClientError::ServerRestarted`]: ids of tables, versions and places from
    /// before mean nothing any more. From now on operations are for the new life of the server.
    pub fn accept_restart(&mut self) {
        if self.mending.refuses == Some(ClientError::ServerRestarted) {
            self.mending.refuses = None;
        }
    }

    /// Drops the connection and makes another, as if it had been lost, with whatever is under way: of that, what repeats are recognised of is
    /// sent again. For tests of what a lost reply leads to.
    pub fn reconnect(&mut self) {
        self.broken.get_or_insert("reconnecting");
    }

    /// Goes on with making a lost connection anew. Returns the requests completed.
    #[cold]
    pub(super) fn mend(
        &mut self,
        each: &mut impl FnMut(Ticket, Result<Reply<'_>, ClientError>),
    ) -> Result<usize, ClientError> {
        let before = self.outstanding();
        if let Some(why) = self.broken.take() {
            self.lose(why);
        }
        if let Some(error) = self.mending.refuses.clone()
            && self.link.is_none()
            && error != ClientError::ServerRestarted
        {
            return Err(error);
        }
        let now = self.context.now_ns();
        let patience = self.config.reconnect.map(|time| time.as_nanos() as u64);
        let passed = now.saturating_sub(self.mending.lost_at);
        if patience.is_none_or(|patience| passed >= patience) {
            self.give_up(each);
        } else if self.mending.connecting.is_some() || now >= self.mending.retry_at {
            let stepped = if self.mending.connecting.is_none() {
                self.begin()
            } else {
                self.step(each)
            };
            match stepped {
                Ok(()) => {}
                Err(ClientError::Refused(Refusal::Version | Refusal::Malformed)) => {
                    self.give_up(each);
                }
                Err(error) => {
                    let mending = &mut self.mending;
                    mending.last = Some(error);
                    mending.retry_at = now + mending.pause;
                    mending.pause = (2 * mending.pause).min(LAST_PAUSE_NS);
                }
            }
        }
        Ok(before - self.outstanding().min(before))
    }

    /// The connection is lost: what was sent waits to be sent again.
    fn lose(&mut self, why: &'static str) {
        if self.link.take().is_some() {
            let now = self.context.now_ns();
            self.mending.lost_at = now;
            self.mending.retry_at = now;
            self.mending.pause = FIRST_PAUSE_NS;
        }
        self.mending.last = Some(ClientError::Disconnected(why));
        self.mending.connecting = None;
        self.sent = 0;
    }

    fn begin(&mut self) -> Result<(), ClientError> {
        let hello = Hello {
            lease: self.config.exactly_once,
            client: self.mending.client,
        };
        self.mending.asked_at = self.context.now_ns();
        let connecting = Connecting::begin(&self.context, self.to, hello, self.config.timeout)?;
        self.mending.connecting = Some(connecting);
        Ok(())
    }

    fn step(&mut self, each: Each<'_>) -> Result<(), ClientError> {
        let Some(connecting) = self.mending.connecting.take() else {
            return Ok(());
        };
        let parts = Parts {
            context: &self.context,
            pd: &self.pd,
            cq: &self.cq,
            recv: &self.recv,
        };
        match connecting.step(&parts, self.to.1)? {
            Progress::Waiting(connecting) => self.mending.connecting = Some(connecting),
            Progress::Done(done) => {
                let (link, welcome) = *done;
                self.link = Some(link);
                self.broken = None;
                self.welcomed(&welcome, each);
            }
        }
        Ok(())
    }

    /// The connection stands: decides what becomes of the requests that wait.
    fn welcomed(&mut self, welcome: &Welcome, each: Each<'_>) {
        let mending = &mut self.mending;
        let before = mending.welcome.replace(*welcome);
        mending.client = welcome.client;
        mending.pause = FIRST_PAUSE_NS;
        mending.lost_at = 0;
        mending.last = None;
        self.window = usize::from(welcome.window).min(WINDOW);
        let Some(before) = before else {
            return;
        };
        self.mending.reconnects += 1;
        let restarted = before.epoch != welcome.epoch;
        if restarted {
            self.mending.refuses = Some(ClientError::ServerRestarted);
        }
        self.forget_places(restarted);
        self.queue.clear();
        self.unstaged.clear();
        let mut again = no_order();
        let mut count = 0;
        for tag in 0..WINDOW as u16 {
            let slot = self.slots[usize::from(tag)];
            if slot.state == State::Free {
                continue;
            }
            let lost = slot.tried
                && match slot.repeat {
                    Repeat::Always => false,
                    Repeat::Numbered(..) => !welcome.known,
                    Repeat::Never => true,
                };
            if restarted {
                self.end(tag, ClientError::ServerRestarted, each);
            } else if lost {
                self.end(tag, ClientError::OutcomeUnknown, each);
            } else {
                let waiting = &mut self.slots[usize::from(tag)];
                waiting.state = State::Queued;
                waiting.again |= waiting.tried;
                self.mending.repeats += u64::from(waiting.tried);
                again[count] = (slot.order, tag);
                count += 1;
            }
        }
        let again = &mut again[..count];
        again.sort_unstable();
        self.queue.extend(again.iter().map(|(_, tag)| *tag));
    }

    /// Nobody can be reached: all requests end.
    fn give_up(&mut self, each: Each<'_>) {
        let error = match self.mending.last.take() {
            Some(error) => error,
            None => ClientError::Disconnected("it could not be made"),
        };
        self.mending.connecting = None;
        self.queue.clear();
        self.unstaged.clear();
        for tag in 0..WINDOW as u16 {
            let slot = self.slots[usize::from(tag)];
            match slot.state {
                State::Free => {}
                _ if slot.tried && slot.repeat != Repeat::Always => {
                    self.end(tag, ClientError::OutcomeUnknown, each);
                }
                _ => self.end(tag, error.clone(), each),
            }
        }
        self.mending.refuses = Some(error);
    }

    fn end(&mut self, tag: u16, error: ClientError, each: Each<'_>) {
        let slot = self.slots[usize::from(tag)];
        each(Ticket(tag), Err(error));
        self.release(tag, &slot);
    }
}

/// Room for all slots with their order.
const fn no_order() -> [(u64, u16); WINDOW] {
    [(0, 0); WINDOW]
}
