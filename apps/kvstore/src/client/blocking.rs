//! One operation at a time, waiting for its reply.

use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

use hyv_verbs::WorkCompletion;

use super::many::with_bits;
use super::{Client, ClientError, FREE, Operation, Ticket, verb};
use crate::proto::{Class, Reply, Request, StatsReply, Status, TableOperations};
use crate::store::{CleanerMode, DEFAULT_TABLE, Increment, Incremented, RejectRules};

/// An object that was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Object {
    /// Version of the object.
    pub version: u64,
    /// The value.
    pub value: Vec<u8>,
}

/// Some keys, and where to go on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageOfKeys {
    /// The keys.
    pub keys: Vec<Vec<u8>>,
    /// Cursor of the next page; none at the end.
    pub next: Option<u64>,
}

/// Some objects, and where to go on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageOfObjects {
    /// Keys with their objects.
    pub objects: Vec<(Vec<u8>, Object)>,
    /// Cursor of the next page; none at the end.
    pub next: Option<u64>,
}

/// A table, and what it holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    /// Id.
    pub id: u32,
    /// Name.
    pub name: String,
    /// Objects.
    pub objects: u64,
    /// Bytes of their log entries.
    pub live_bytes: u64,
    /// What was done to it.
    pub operations: TableOperations,
}

/// How long the server took for the requests of a class, of which it samples some: from a request's completion to its reply's work
/// request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceTimes {
    /// Which requests.
    pub class: Class,
    /// Requests sampled.
    pub samples: u64,
    /// Median, 90th, 99th and 99.9th percentile, ns: upper bounds, 12% too high at most.
    pub quantiles: [u64; 4],
    /// The histogram: upper bound in ns, and samples, of each bucket that has any.
    pub buckets: Vec<(u64, u32)>,
}

/// Times that a busy server is asked again, with [`BUSY_PAUSE`] in between.
const BUSY_RETRIES: u32 = 200;
pub(super) const BUSY_PAUSE: Duration = Duration::from_millis(5);
/// Pause between looks at a connection that is being made.
const MENDING_PAUSE: Duration = Duration::from_micros(200);

impl Client {
    /// Waits for completions, sleeping when none come, at most for the client's time limit. Returns how many came.
    ///
    /// # Errors
    /// As [`Client::poll`], and [`ClientError::Timeout`].
    pub fn wait(
        &mut self,
        mut each: impl FnMut(Ticket, Result<Reply<'_>, ClientError>),
    ) -> Result<usize, ClientError> {
        let mut wcs = [WorkCompletion::EMPTY; 8];
        let start = self.context.now_ns();
        loop {
            let completed = self.poll(&mut each)?;
            if completed > 0 {
                return Ok(completed);
            }
            let passed = Duration::from_nanos(self.context.now_ns().saturating_sub(start));
            let Some(left) = self
                .config
                .timeout
                .checked_sub(passed)
                .filter(|l| !l.is_zero())
            else {
                return Err(ClientError::Timeout(self.config.timeout));
            };
            if !self.is_connected() {
                self.pause(MENDING_PAUSE.min(left))?;
                continue;
            }
            let n = self
                .cq
                .wait(&mut wcs, Some(left))
                .map_err(verb("cannot wait for the store"))?;
            let mut completed = 0;
            for wc in &wcs[..n] {
                completed += self.complete(wc, &mut each);
            }
            if completed > 0 {
                return Ok(completed);
            }
        }
    }

    /// Waits for the completion of this ticket; other requests' completions are lost.
    fn wait_for<T>(
        &mut self,
        ticket: Ticket,
        mut take: impl FnMut(Reply<'_>) -> Option<T>,
    ) -> Result<T, ClientError> {
        let mut result = None;
        while result.is_none() {
            self.wait(|t, reply| {
                if t == ticket {
                    result = Some(reply.map(&mut take));
                }
            })?;
        }
        match result {
            Some(Ok(Some(t))) => Ok(t),
            Some(Err(e)) => Err(e),
            _ => {
                let why = "the store's reply is of another kind than the request";
                self.broken.get_or_insert(why);
                Err(ClientError::Disconnected(why))
            }
        }
    }

    /// Executes an operation and waits for its reply, of which `take` keeps something; none: it is of the wrong kind. A store
    /// that is busy is asked again for a while.
    ///
    /// # Errors
    /// As the server says, and as [`Client::submit`] and [`Client::wait`].
    pub fn execute<T>(
        &mut self,
        operation: &Operation<'_>,
        mut take: impl FnMut(Reply<'_>) -> Option<T>,
    ) -> Result<T, ClientError> {
        let mut retries = 0;
        loop {
            let ticket = self.submit(operation)?;
            match self.wait_for(ticket, &mut take) {
                Err(ClientError::Status {
                    status: Status::Busy,
                    ..
                }) if retries < BUSY_RETRIES => {
                    retries += 1;
                    self.pause(BUSY_PAUSE)?;
                }
                other => return other,
            }
        }
    }

    pub(super) fn pause(&self, time: Duration) -> Result<(), ClientError> {
        let platform = self.context.platform();
        let end = platform.now_ns() + time.as_nanos() as u64;
        loop {
            let now = platform.now_ns();
            if now >= end {
                return Ok(());
            }
            platform
                .wait(platform.wake_seen(), Some(end - now))
                .map_err(|e| verb("cannot wait for the store")(e.into()))?;
        }
    }

    /// Reads an object.
    ///
    /// # Errors
    /// As the server says; a missing key is `Ok(None)`.
    pub fn read(&mut self, table: u32, key: &[u8]) -> Result<Option<Object>, ClientError> {
        self.read_if(table, key, RejectRules::NONE)
    }

    /// Reads an object, unless a rule refuses.
    ///
    /// # Errors
    /// [`ClientError::Rejected`], and as [`Client::read`].
    pub fn read_if(
        &mut self,
        table: u32,
        key: &[u8],
        rules: RejectRules,
    ) -> Result<Option<Object>, ClientError> {
        found(self.execute(&Operation::Read { table, key, rules }, object))
    }

    /// Reads an object without the server's CPU, if that can be ([`Client::submit_one_sided`]).
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn read_one_sided(
        &mut self,
        table: u32,
        key: &[u8],
    ) -> Result<Option<Object>, ClientError> {
        let ticket = self.submit_one_sided(table, key)?;
        found(self.wait_for(ticket, object))
    }

    /// Writes an object; gives its version.
    ///
    /// # Errors
    /// As the server says: `Full` when there is no room.
    pub fn write(&mut self, table: u32, key: &[u8], value: &[u8]) -> Result<u64, ClientError> {
        self.execute(&Operation::write(table, key, value), version)
    }

    /// Writes an object, unless a rule refuses; from `expires` on ([`Client::server_time`]) it does not exist any more,
    /// [`crate::store::NEVER`]: it stays.
    ///
    /// # Errors
    /// [`ClientError::Rejected`], and as [`Client::write`].
    pub fn write_if(
        &mut self,
        table: u32,
        key: &[u8],
        value: &[u8],
        rules: RejectRules,
        expires: u64,
    ) -> Result<u64, ClientError> {
        let operation = Operation::Write {
            table,
            key,
            value,
            rules,
            expires,
        };
        self.execute(&operation, version)
    }

    /// Removes an object; gives the version that was removed, or none if there was no such key.
    ///
    /// # Errors
    /// As the server says.
    pub fn remove(&mut self, table: u32, key: &[u8]) -> Result<Option<u64>, ClientError> {
        self.remove_if(table, key, RejectRules::NONE)
    }

    /// Removes an object, unless a rule refuses.
    ///
    /// # Errors
    /// [`ClientError::Rejected`], and as [`Client::remove`].
    pub fn remove_if(
        &mut self,
        table: u32,
        key: &[u8],
        rules: RejectRules,
    ) -> Result<Option<u64>, ClientError> {
        found(self.execute(&Operation::Remove { table, key, rules }, version))
    }

    /// Adds to a number of 8 bytes; one that does not exist counts as 0. Integers wrap around.
    ///
    /// # Errors
    /// `NotANumber` for a value of another length, and as the server says.
    pub fn increment(
        &mut self,
        table: u32,
        key: &[u8],
        by: Increment,
    ) -> Result<Incremented, ClientError> {
        self.increment_if(table, key, by, RejectRules::NONE)
    }

    /// Adds to a number, unless a rule refuses.
    ///
    /// # Errors
    /// [`ClientError::Rejected`], and as [`Client::increment`].
    pub fn increment_if(
        &mut self,
        table: u32,
        key: &[u8],
        by: Increment,
        rules: RejectRules,
    ) -> Result<Incremented, ClientError> {
        let operation = Operation::Increment {
            table,
            key,
            by,
            rules,
        };
        self.execute(&operation, |reply| match reply {
            Reply::Incremented { version, bits } => Some(Incremented {
                value: with_bits(by, bits),
                version,
            }),
            _ => None,
        })
    }

    /// A page of a table's keys, in no particular order; the first with cursor 0. A key that exists all the time is on exactly one
    /// page.
    ///
    /// # Errors
    /// As the server says.
    pub fn keys(&mut self, table: u32, cursor: u64) -> Result<PageOfKeys, ClientError> {
        let operation = Operation::Enumerate {
            table,
            cursor,
            limit: 0,
            values: false,
        };
        self.execute(&operation, |reply| match reply {
            Reply::Page(page) => Some(PageOfKeys {
                keys: page.keys().map(<[u8]>::to_vec).collect(),
                next: page.next(),
            }),
            _ => None,
        })
    }

    /// A page of a table's objects, at most `limit` (0: as many as fit), as [`Client::keys`]. Values too long for a page are read one
    /// by one; an object removed meanwhile is left out then.
    ///
    /// # Errors
    /// As the server says.
    pub fn enumerate(
        &mut self,
        table: u32,
        cursor: u64,
        limit: u16,
    ) -> Result<PageOfObjects, ClientError> {
        let operation = Operation::Enumerate {
            table,
            cursor,
            limit,
            values: true,
        };
        let (objects, next) = self.execute(&operation, |reply| match reply {
            Reply::Page(page) => {
                let objects: Vec<_> = page
                    .objects()
                    .map(|o| (o.key.to_vec(), o.version, o.value.map(<[u8]>::to_vec)))
                    .collect();
                Some((objects, page.next()))
            }
            _ => None,
        })?;
        let mut all = Vec::with_capacity(objects.len());
        for (key, version, value) in objects {
            let object = match value {
                Some(value) => Some(Object { version, value }),
                None => self.read(table, &key)?,
            };
            all.extend(object.map(|object| (key, object)));
        }
        Ok(PageOfObjects { objects: all, next })
    }

    /// Creates a table, if there is none of that name; gives its id, and whether it was created just now.
    ///
    /// # Errors
    /// `TableName`, `TooManyTables`, and as the server says.
    pub fn create_table(&mut self, name: &str) -> Result<(u32, bool), ClientError> {
        self.execute(&Operation::CreateTable { name }, |reply| match reply {
            Reply::Table { id, created } => Some((id, created)),
            _ => None,
        })
    }

    /// Drops a table with everything in it. When this returns nobody finds any of it any more, one-sided readers included.
    ///
    /// # Errors
    /// `UnknownTable`, `DefaultTable`, and as the server says.
    pub fn drop_table(&mut self, table: u32) -> Result<(), ClientError> {
        self.execute(&Operation::DropTable { table }, empty)
    }

    /// The id of a table; none if there is none of that name.
    ///
    /// # Errors
    /// As the server says.
    pub fn table(&mut self, name: &str) -> Result<Option<u32>, ClientError> {
        found(
            self.execute(&Operation::FindTable { name }, |reply| match reply {
                Reply::Table { id, .. } => Some(id),
                _ => None,
            }),
        )
    }

    /// All tables, by id.
    ///
    /// # Errors
    /// As the server says.
    pub fn tables(&mut self) -> Result<Vec<Table>, ClientError> {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let (page, next) = self.execute(&Operation::Tables { after }, |reply| match reply {
                Reply::Tables(tables) => {
                    let page: Vec<_> = tables
                        .iter()
                        .map(|table| Table {
                            id: table.id,
                            name: table.name.into(),
                            objects: table.objects,
                            live_bytes: table.live_bytes,
                            operations: table.operations,
                        })
                        .collect();
                    Some((page, tables.next()))
                }
                _ => None,
            })?;
            all.extend(page);
            match next {
                Some(next) => after = Some(next),
                None => return Ok(all),
            }
        }
    }

    /// The server's counters.
    ///
    /// # Errors
    /// As the server says.
    pub fn stats(&mut self) -> Result<StatsReply, ClientError> {
        self.execute(&Operation::Stats, |reply| match reply {
            Reply::Stats(stats) => Some(stats.get()),
            _ => None,
        })
    }

    /// The server's counters, and the service times of each class of requests.
    ///
    /// # Errors
    /// As the server says.
    pub fn stats_and_times(&mut self) -> Result<(StatsReply, Vec<ServiceTimes>), ClientError> {
        self.execute(&Operation::Stats, |reply| match reply {
            Reply::Stats(stats) => {
                let times = Class::ALL.into_iter().map(|class| {
                    let times = stats.times(class);
                    ServiceTimes {
                        class,
                        samples: times.total(),
                        quantiles: [500, 900, 990, 999].map(|p| times.quantile(p)),
                        buckets: times.buckets().collect(),
                    }
                });
                Some((stats.get(), times.collect()))
            }
            _ => None,
        })
    }

    /// Asks for nothing but an answer.
    ///
    /// # Errors
    /// When there is none.
    pub fn ping(&mut self) -> Result<(), ClientError> {
        self.execute(&Operation::Ping, empty)
    }

    /// Says when the server's cleaner works, until this connection ends or any client asks for something else ([`Operation::Cleaner`]).
    ///
    /// # Errors
    /// When there is no answer.
    pub fn set_cleaner(&mut self, mode: CleanerMode) -> Result<(), ClientError> {
        self.execute(&Operation::Cleaner { mode }, empty)
    }

    /// Gives the lease back.
    pub(super) fn end_lease(&mut self) -> Result<(), ClientError> {
        let ticket = self.start(&Request::EndLease, FREE)?;
        self.wait_for(ticket, empty)
    }

    /// Reads a key of the default table.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn get(&mut self, key: &[u8]) -> Result<Option<Object>, ClientError> {
        self.read(DEFAULT_TABLE, key)
    }

    /// Writes to the default table; gives the version.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<u64, ClientError> {
        self.write(DEFAULT_TABLE, key, value)
    }

    /// Removes a key of the default table.
    ///
    /// # Errors
    /// As [`Client::remove`].
    pub fn del(&mut self, key: &[u8]) -> Result<Option<u64>, ClientError> {
        self.remove(DEFAULT_TABLE, key)
    }

    /// A page of the default table's keys.
    ///
    /// # Errors
    /// As [`Client::keys`].
    pub fn list(&mut self, cursor: u64) -> Result<PageOfKeys, ClientError> {
        self.keys(DEFAULT_TABLE, cursor)
    }
}

fn object(reply: Reply<'_>) -> Option<Object> {
    match reply {
        Reply::Value { version, value, .. } => Some(Object {
            version,
            value: value.to_vec(),
        }),
        _ => None,
    }
}

fn version(reply: Reply<'_>) -> Option<u64> {
    match reply {
        Reply::Version(version) => Some(version),
        _ => None,
    }
}

fn empty(reply: Reply<'_>) -> Option<()> {
    matches!(reply, Reply::Empty).then_some(())
}

/// A status that says that there is nothing, as none.
fn found<T>(result: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match result {
        Ok(t) => Ok(Some(t)),
        Err(ClientError::Status {
            status: Status::NotFound,
            ..
        }) => Ok(None),
        Err(e) => Err(e),
    }
}
