//! The store as the soak's clients see it: one blocking operation at a time, over whatever client library there is.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow};
use kvstore::client::{Client, ClientError};
use kvstore::proto::Status;
use kvstore_check::op::{Addend, NEVER, Nanos, Operation, Outcome, Rules, Value};

use crate::session;

/// How long a client waits for an answer: far longer than any slice of cleaning, so that its end means a fault.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What a client asks for, with the value itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Read.
    Read,
    /// Write.
    Write {
        /// The value.
        value: Vec<u8>,
        /// When it expires, on the clock of the history; [`NEVER`]: it stays.
        expires: Nanos,
    },
    /// Remove.
    Remove,
    /// Add to a number.
    Increment(Addend),
}

impl Request {
    /// As a history has it.
    #[must_use]
    pub fn operation(&self, rules: Rules) -> Operation {
        match self {
            Self::Read => Operation::READ,
            Self::Write { value, expires } => Operation::Write {
                value: Value::of(value),
                expires: *expires,
                rules: None,
            },
            Self::Remove => Operation::REMOVE,
            Self::Increment(by) => Operation::Increment {
                by: *by,
                rules: None,
            },
        }
        .unless(rules)
    }
}

/// What a client library can do; a workload uses what there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Abilities {
    /// Conditions on the version.
    pub rules: bool,
    /// Increments.
    pub increments: bool,
    /// Objects that expire.
    pub expiry: bool,
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
}

/// Why there is no outcome.
#[derive(Debug)]
pub enum StoreFault {
    /// The connection is gone: nobody knows whether the request was executed. Connect again.
    Lost(anyhow::Error),
    /// The server did what it may not.
    Wrong(anyhow::Error),
}

/// A connection to the store.
pub trait Store {
    /// What it can do.
    fn abilities(&self) -> Abilities;

    /// Executes one request and waits for its outcome.
    ///
    /// # Errors
    /// When there is none.
    fn execute(
        &mut self,
        key: &[u8],
        request: &Request,
        rules: &Rules,
    ) -> Result<Outcome, StoreFault>;

    /// Asks for the server's figures.
    ///
    /// # Errors
    /// As [`Store::execute`].
    fn figures(&mut self) -> Result<Figures, StoreFault>;
}

/// Connects to the store of an instance.
///
/// # Errors
/// When nobody serves there.
pub fn connect(dir: &Path, port: u16, name: &str) -> Result<Box<dyn Store>> {
    Ok(Box::new(Blocking(session::connect(
        dir, port, TIMEOUT, name,
    )?)))
}

struct Blocking(Client);

fn fault(error: ClientError) -> Result<Outcome, StoreFault> {
    match error {
        // Refused before anything was done.
        ClientError::Status {
            status: Status::Full | Status::Busy,
            ..
        } => Ok(Outcome::Refused),
        ClientError::Disconnected(_) | ClientError::Timeout(_) | ClientError::Verb { .. } => {
            Err(StoreFault::Lost(error.into()))
        }
        _ => Err(StoreFault::Wrong(error.into())),
    }
}

impl Store for Blocking {
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn execute(
        &mut self,
        key: &[u8],
        request: &Request,
        rules: &Rules,
    ) -> Result<Outcome, StoreFault> {
        let unable = |what: &str| {
            Err(StoreFault::Wrong(anyhow!(
                "this client library has no {what}"
            )))
        };
        if !rules.is_none() {
            return unable("conditions");
        }
        let outcome = match request {
            Request::Read => self.0.get(key).map(|found| match found {
                Some(object) => Outcome::Found {
                    value: Value::of(&object.value),
                    version: object.version,
                },
                None => Outcome::Absent,
            }),
            Request::Write { expires, .. } if *expires != NEVER => return unable("expiry"),
            Request::Write { value, .. } => self
                .0
                .put(key, value)
                .map(|version| Outcome::Written { version }),
            Request::Remove => self.0.del(key).map(|removed| match removed {
                Some(version) => Outcome::Removed { version },
                None => Outcome::Absent,
            }),
            Request::Increment(_) => return unable("increments"),
        };
        outcome.or_else(fault)
    }

    fn figures(&mut self) -> Result<Figures, StoreFault> {
        match self.0.stats() {
            Ok(stats) => Ok(Figures {
                live_bytes: stats.live_bytes + stats.tombstone_bytes + stats.pending_bytes,
                capacity_bytes: stats.capacity_bytes,
                cleaned_bytes: stats.cleaner_moved_bytes,
            }),
            Err(e) => Err(StoreFault::Lost(e.into())),
        }
    }
}
