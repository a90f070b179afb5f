//! Many requests in flight: loading a file into a store, and reading it back.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use hyv_rnic::cell::Inline;
use kvstore::client::{Client, ClientError, Operation, Ticket};
use kvstore::proto::{Reply, Status};

/// How long a store may be silent while requests are outstanding.
const SILENCE: Duration = Duration::from_secs(30);
/// Pause before a busy store is asked again.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// How often one request is made again because the store is busy.
const BUSY_RETRIES: u32 = 5_000;

/// A client, and whoever drives the engine for it: this thread, or the engine's own.
pub struct Pump<'a> {
    /// The connection.
    pub client: &'a mut Client,
    /// With it, this thread drives the engine.
    pub inline: Option<Inline<'a>>,
    /// The table that is loaded or read.
    pub table: u32,
}

impl Pump<'_> {
    /// Waits until at least one reply came.
    ///
    /// # Errors
    /// When the connection ended, or the store is silent for [`SILENCE`].
    pub fn step(
        &mut self,
        mut each: impl FnMut(Ticket, Result<Reply<'_>, ClientError>),
    ) -> Result<usize, ClientError> {
        let Some(inline) = &mut self.inline else {
            return self.client.wait(each);
        };
        let start = Instant::now();
        let mut turns = 0u32;
        loop {
            inline.driver().poll();
            let n = self.client.poll(&mut each)?;
            if n > 0 {
                return Ok(n);
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(1 << 14) && start.elapsed() > SILENCE {
                return Err(ClientError::Timeout(SILENCE));
            }
        }
    }
}

/// A value's fingerprint: 128 bits, and its length.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fingerprint {
    len: u32,
    halves: [u64; 2],
}

impl Fingerprint {
    /// Of a value.
    #[must_use]
    pub fn of(value: &[u8]) -> Self {
        let half = |salt: u64| {
            let mut h = DefaultHasher::new();
            salt.hash(&mut h);
            h.write(value);
            h.finish()
        };
        Self {
            len: value.len() as u32,
            halves: [half(1), half(2)],
        }
    }
}

/// A record on its way.
#[derive(Debug, Default, Clone)]
struct InFlight {
    key: Vec<u8>,
    value: Vec<u8>,
    line: u64,
    retries: u32,
}

/// What a write that the store refused was.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {error}")]
pub struct Refused {
    /// Line of the record.
    pub line: u64,
    /// What the store said.
    #[source]
    pub error: ClientError,
}

/// Puts records with many in flight; two of the same key never at once, so that the last one wins.
pub struct Loader<'a, 'b> {
    pump: &'b mut Pump<'a>,
    flight: Vec<Option<InFlight>>,
    stored: u64,
    first_missing: Option<u64>,
}

impl<'a, 'b> Loader<'a, 'b> {
    /// Over a pump with nothing outstanding.
    pub fn new(pump: &'b mut Pump<'a>) -> Self {
        let window = pump.client.window();
        Self {
            pump,
            flight: vec![None; window],
            stored: 0,
            first_missing: None,
        }
    }

    /// The first line whose record is not known to be stored, after a failure and [`Self::drain`]; none if all are.
    #[must_use]
    pub const fn first_missing(&self) -> Option<u64> {
        self.first_missing
    }

    fn miss(&mut self, line: u64) {
        self.first_missing = Some(self.first_missing.map_or(line, |first| first.min(line)));
    }

    /// Records that the store has acknowledged.
    #[must_use]
    pub const fn stored(&self) -> u64 {
        self.stored
    }

    /// Sends a record; may wait for replies to earlier ones.
    ///
    /// # Errors
    /// The first record that the store refused, maybe an earlier one.
    pub fn put(&mut self, key: &[u8], value: &[u8], line: u64) -> Result<(), Refused> {
        while self.flight.iter().flatten().any(|f| f.key == key) {
            self.step(line)?;
        }
        self.send(InFlight {
            key: key.to_vec(),
            value: value.to_vec(),
            line,
            retries: 0,
        })
    }

    fn send(&mut self, record: InFlight) -> Result<(), Refused> {
        loop {
            match self.pump.client.submit(&Operation::write(
                self.pump.table,
                &record.key,
                &record.value,
            )) {
                Ok(tag) => {
                    self.flight[usize::from(tag)] = Some(record);
                    return Ok(());
                }
                Err(ClientError::WindowFull) => self.step(record.line)?,
                Err(error) => {
                    self.miss(record.line);
                    return Err(Refused {
                        line: record.line,
                        error,
                    });
                }
            }
        }
    }

    fn step(&mut self, line: u64) -> Result<(), Refused> {
        let (flight, stored) = (&mut self.flight, &mut self.stored);
        let mut missing = Vec::new();
        let mut again = Vec::new();
        let mut refused = None;
        self.pump
            .step(|tag, reply| {
                let Some(record) = flight.get_mut(usize::from(tag)).and_then(Option::take) else {
                    return;
                };
                match reply {
                    Ok(_) => *stored += 1,
                    Err(ClientError::Status {
                        status: Status::Busy,
                        ..
                    }) if record.retries < BUSY_RETRIES => {
                        again.push(InFlight {
                            retries: record.retries + 1,
                            ..record
                        });
                    }
                    Err(error) => {
                        missing.push(record.line);
                        refused.get_or_insert(Refused {
                            line: record.line,
                            error,
                        });
                    }
                }
            })
            .map_err(|error| Refused { line, error })?;
        missing.into_iter().for_each(|line| self.miss(line));
        if let Some(refused) = refused {
            again.iter().for_each(|record| self.miss(record.line));
            return Err(refused);
        }
        if !again.is_empty() && self.pump.inline.is_none() {
            std::thread::sleep(BUSY_PAUSE);
        }
        again.into_iter().try_for_each(|record| self.send(record))
    }

    /// Waits for everything outstanding; gives how many records the store has acknowledged.
    ///
    /// # Errors
    /// As [`Loader::put`].
    pub fn finish(&mut self) -> Result<u64, Refused> {
        while self.pump.client.outstanding() > 0 {
            self.step(0)?;
        }
        Ok(self.stored)
    }

    /// Waits for everything outstanding, whatever becomes of it; for the account after a failure.
    pub fn drain(&mut self) -> u64 {
        while self.pump.client.outstanding() > 0 {
            if let Err(Refused {
                error: ClientError::Disconnected(_) | ClientError::Timeout(_),
                ..
            }) = self.step(0)
            {
                break;
            }
        }
        let lost: Vec<u64> = self.flight.iter().flatten().map(|f| f.line).collect();
        lost.into_iter().for_each(|line| self.miss(line));
        self.stored
    }
}

/// Reads all keys with many in flight and hands out each value. Values too large for a message are asked for again.
///
/// # Errors
/// What the store or the connection says; `each` may end it early by an error of its own.
pub fn read_all<'k, E: From<ClientError>>(
    pump: &mut Pump<'_>,
    keys: impl IntoIterator<Item = &'k [u8]>,
    mut each: impl FnMut(&'k [u8], Option<&[u8]>) -> Result<(), E>,
) -> Result<(), E> {
    let mut flight: Vec<Option<&[u8]>> = vec![None; pump.client.window()];
    let mut large: Vec<&[u8]> = Vec::new();
    let mut keys = keys.into_iter();
    let mut next = keys.next();
    let mut failed: Option<E> = None;
    loop {
        loop {
            // Large values first: there are few staging buffers, and small ones fill the rest of the window.
            let started = if let Some(&key) = large.last() {
                match pump.client.submit_large_read(pump.table, key) {
                    Ok(tag) => {
                        large.pop();
                        Some((tag, key))
                    }
                    Err(ClientError::WindowFull) => None,
                    Err(e) => return Err(e.into()),
                }
            } else {
                None
            };
            let started = match (started, next) {
                (None, Some(key)) if large.len() < 64 => {
                    match pump.client.submit(&Operation::read(pump.table, key)) {
                        Ok(tag) => {
                            next = keys.next();
                            Some((tag, key))
                        }
                        Err(ClientError::WindowFull) => None,
                        Err(e) => return Err(e.into()),
                    }
                }
                (started, _) => started,
            };
            let Some((tag, key)) = started else { break };
            flight[usize::from(tag)] = Some(key);
        }
        if pump.client.outstanding() == 0 {
            if next.is_none() && large.is_empty() {
                return failed.map_or(Ok(()), Err);
            }
            return Err(ClientError::WindowFull.into());
        }
        pump.step(|tag, reply| {
            let Some(key) = flight.get_mut(usize::from(tag)).and_then(Option::take) else {
                return;
            };
            let outcome = match reply {
                Ok(Reply::Value { value, .. }) => each(key, Some(value)),
                Err(ClientError::Status {
                    status: Status::NotFound,
                    ..
                }) => each(key, None),
                Err(ClientError::Status {
                    status: Status::TooLargeForEager,
                    ..
                }) => {
                    large.push(key);
                    Ok(())
                }
                Ok(_) => Err(ClientError::Disconnected(
                    "its reply is of another kind than the request",
                )
                .into()),
                Err(e) => Err(e.into()),
            };
            if let Err(e) = outcome {
                failed.get_or_insert(e);
            }
        })?;
        if failed.is_some() {
            // Nothing new; take what is outstanding, then tell.
            next = None;
            large.clear();
        }
    }
}
