//! The store as the soak sees it: how to ask, and what the answers are to a history.

use std::path::Path;

use anyhow::{Context as _, Result};
use hyv_verbs::{Context, Gid, Process};
use kvstore::client::{Client, ClientConfig, ClientError, Operation, Ticket};
use kvstore::proto::{Element, ElementResult, Reply, Status};
use kvstore::store::{Increment, NEVER as STAYS, RejectReason, RejectRules};
use kvstore_check::op::{Addend, NEVER, Nanos, Outcome, Reason, Rules, Value};
use kvstore_check::recorder::monotonic_ns;

use super::limits::{CLIENT_RAM, CLOCK_LOOKS, PATIENCE, RECONNECT};
use super::workload::{Request, Step, Turn};

/// Connects to the store of an instance.
///
/// # Errors
/// When nobody serves there.
pub fn connect(dir: &Path, port: u16, name: &str, exactly_once: bool) -> Result<Client> {
    let process = Process::connect(dir, CLIENT_RAM, name)?;
    let context = Context::open(process).context("cannot open the device")?;
    let config = ClientConfig {
        timeout: PATIENCE,
        reconnect: Some(RECONNECT),
        exactly_once,
        ..ClientConfig::default()
    };
    Ok(Client::connect_with(&context, Gid::LOCAL, port, config)?)
}

/// What the store's clock is ahead of the history's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Clock {
    /// By so much, ns.
    pub ahead: u64,
    /// Give or take so much.
    pub doubt: u64,
}

impl Clock {
    /// Looks at the store's clock, by connecting anew a few times.
    ///
    /// # Errors
    /// When the store does not answer.
    pub fn look(client: &mut Client) -> Result<Self> {
        let mut best: Option<Self> = None;
        for _ in 0..CLOCK_LOOKS {
            let asked = monotonic_ns();
            client.reconnect();
            client.ping()?;
            let told = monotonic_ns();
            // The client's guess is that it was read when it began to connect: the latest that it can be by now.
            let latest = client.server_time();
            let doubt = (monotonic_ns() - asked) / 2 + 1;
            let ahead = latest.wrapping_sub(told).wrapping_sub(doubt);
            if best.is_none_or(|best| doubt < best.doubt) {
                best = Some(Self { ahead, doubt });
            }
        }
        Ok(best.unwrap_or_default())
    }

    /// A time of the history's clock on the store's.
    #[must_use]
    pub const fn of_store(&self, time: Nanos) -> u64 {
        match time {
            NEVER => STAYS,
            time => time.wrapping_add(self.ahead),
        }
    }

    /// A time that an earlier look put on the history's clock.
    #[must_use]
    pub const fn again(&self, before: &Self, time: Nanos) -> Nanos {
        match time {
            NEVER => NEVER,
            time => time.wrapping_add(before.ahead).wrapping_sub(self.ahead),
        }
    }
}

const fn rules(rules: &Rules) -> RejectRules {
    RejectRules {
        exists: rules.exists,
        absent: rules.absent,
        at_most: rules.at_most,
        other_than: rules.other_than,
    }
}

const fn increment(by: Addend) -> Increment {
    match by {
        Addend::I64(by) => Increment::I64(by),
        Addend::F64(bits) => Increment::F64(f64::from_bits(bits)),
    }
}

/// Submits a turn; single reads without conditions one-sidedly, if that is wanted.
///
/// # Errors
/// As [`Client::submit`].
pub fn submit(
    client: &mut Client,
    turn: &Turn,
    clock: &Clock,
    one_sided: bool,
) -> Result<Ticket, ClientError> {
    if let Some(op) = turn.multi {
        let elements: Vec<Element<'_>> = turn.steps.iter().map(|s| element(s, clock)).collect();
        return client.submit(&Operation::Multi {
            op,
            elements: &elements,
        });
    }
    let Some(step) = turn.steps.first() else {
        return client.submit(&Operation::Ping);
    };
    let (table, key, rules) = (step.spot.table, &step.spot.key[..], rules(&step.rules));
    match &step.request {
        Request::Read if one_sided && rules.is_none() => client.submit_one_sided(table, key),
        Request::Read => client.submit(&Operation::Read { table, key, rules }),
        Request::Write { value, expires } => client.submit(&Operation::Write {
            table,
            key,
            value,
            rules,
            expires: clock.of_store(*expires),
        }),
        Request::Remove => client.submit(&Operation::Remove { table, key, rules }),
        Request::Increment(by) => client.submit(&Operation::Increment {
            table,
            key,
            by: increment(*by),
            rules,
        }),
    }
}

fn element<'a>(step: &'a Step, clock: &Clock) -> Element<'a> {
    let mut element = Element {
        rules: rules(&step.rules),
        ..Element::new(step.spot.table, &step.spot.key)
    };
    match &step.request {
        Request::Read | Request::Remove => {}
        Request::Write { value, expires } => {
            element.value = value;
            element.expires = clock.of_store(*expires);
        }
        Request::Increment(by) => element.by = increment(*by),
    }
    element
}

/// What an answer is to a history.
#[derive(Debug)]
pub enum Answer {
    /// This.
    Outcome(Outcome),
    /// Refused for the moment: without effect.
    Busy,
    /// Refused because the store is full: without effect.
    Full,
    /// Nobody knows whether it was executed.
    Unknown,
    /// The store did what it may not, or is gone.
    Wrong(ClientError),
}

/// What the answer to a request of its own is.
#[must_use]
pub fn answer(request: &Request, reply: Result<Reply<'_>, ClientError>) -> Answer {
    match reply {
        Ok(Reply::Value { version, value, .. }) => found(version, value),
        Ok(Reply::Version(version)) => changed(request, version),
        Ok(Reply::Incremented { version, bits }) => added(version, bits),
        Ok(other) => wrong_kind(&other),
        Err(e) => failure(e),
    }
}

/// What the answer to an element of a multi-operation is.
#[must_use]
pub fn element_answer(request: &Request, result: &ElementResult<'_>) -> Answer {
    match *result {
        ElementResult::Value { version, value } => found(version, value),
        ElementResult::Version(version) => changed(request, version),
        ElementResult::Incremented { version, bits } => added(version, bits),
        // It is too large for its share of the reply: nothing is learnt.
        ElementResult::Failed {
            status: Status::TooLargeForEager,
            ..
        } => Answer::Outcome(Outcome::Refused),
        ElementResult::Failed { status, detail } => failure(ClientError::of(status, detail)),
    }
}

fn found(version: u64, value: &[u8]) -> Answer {
    Answer::Outcome(Outcome::Found {
        value: Value::of(value),
        version,
    })
}

const fn added(version: u64, value: u64) -> Answer {
    Answer::Outcome(Outcome::Added { value, version })
}

const fn changed(request: &Request, version: u64) -> Answer {
    Answer::Outcome(match request {
        Request::Remove => Outcome::Removed { version },
        _ => Outcome::Written { version },
    })
}

fn wrong_kind(reply: &Reply<'_>) -> Answer {
    tracing::error!("a reply of another kind than the request: {reply:?}");
    Answer::Wrong(ClientError::Disconnected(
        "its reply is of another kind than the request",
    ))
}

fn failure(error: ClientError) -> Answer {
    match error {
        ClientError::Rejected { reason, version } => Answer::Outcome(Outcome::Rejected {
            reason: match reason {
                RejectReason::Exists => Reason::Exists,
                RejectReason::Absent => Reason::Absent,
                RejectReason::Version => Reason::Version,
            },
            version,
        }),
        ClientError::Status { status, .. } => match status {
            Status::NotFound => Answer::Outcome(Outcome::Absent),
            Status::NotANumber => Answer::Outcome(Outcome::NotANumber),
            Status::Busy => Answer::Busy,
            Status::Full => Answer::Full,
            _ => Answer::Wrong(error),
        },
        ClientError::OutcomeUnknown => Answer::Unknown,
        _ => Answer::Wrong(error),
    }
}

/// Figures of the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    /// Bytes of live objects.
    pub live_bytes: u64,
    /// Bytes that may be live.
    pub capacity_bytes: u64,
    /// Bytes that the cleaner has moved.
    pub cleaned_bytes: u64,
    /// Objects taken out because they had expired.
    pub expired: u64,
    /// Requests answered with a result that was kept.
    pub duplicates: u64,
    /// Connections that the server ended.
    pub expelled: u64,
}

impl Figures {
    /// Asks the server.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn of(client: &mut Client) -> Result<Self, ClientError> {
        let stats = client.stats()?;
        Ok(Self {
            live_bytes: stats.live_bytes + stats.tombstone_bytes + stats.pending_bytes,
            capacity_bytes: stats.capacity_bytes,
            cleaned_bytes: stats.cleaner_moved_bytes,
            expired: stats.objects_expired,
            duplicates: stats.duplicates,
            expelled: stats.expelled,
        })
    }

    /// Part of the store's capacity that is live.
    #[must_use]
    pub fn utilisation(&self) -> f64 {
        self.live_bytes as f64 / self.capacity_bytes.max(1) as f64
    }

    /// What was counted since an earlier look; what is now stays.
    #[must_use]
    pub const fn since(&self, before: &Self) -> Self {
        Self {
            cleaned_bytes: self.cleaned_bytes - before.cleaned_bytes,
            expired: self.expired - before.expired,
            duplicates: self.duplicates - before.duplicates,
            expelled: self.expelled - before.expelled,
            ..*self
        }
    }
}
