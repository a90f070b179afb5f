//! One request at a time, waiting for its reply.

use alloc::vec::Vec;
use core::time::Duration;

use hyv_verbs::WorkCompletion;

use super::{Client, ClientError, Simple, check, verb};
use crate::proto::{Reply, StatsReply, Status};

/// A value with its version.
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

/// Times that a busy server is asked again, with [`BUSY_PAUSE`] in between.
const BUSY_RETRIES: u32 = 200;
const BUSY_PAUSE: Duration = Duration::from_millis(5);

impl Client {
    /// Waits for replies, sleeping when none come, at most for the client's time limit. Returns how many came.
    ///
    /// # Errors
    /// As [`Client::poll`], and [`ClientError::Timeout`].
    pub fn wait(
        &mut self,
        mut each: impl FnMut(u16, Result<Reply<'_>, ClientError>),
    ) -> Result<usize, ClientError> {
        let mut wcs = [WorkCompletion::EMPTY; 8];
        let start = self.context.now_ns();
        loop {
            let passed = Duration::from_nanos(self.context.now_ns().saturating_sub(start));
            let Some(left) = self.timeout.checked_sub(passed).filter(|l| !l.is_zero()) else {
                return Err(ClientError::Timeout(self.timeout));
            };
            let n = self
                .cq
                .wait(&mut wcs, Some(left))
                .map_err(verb("cannot wait for the store"))?;
            let mut replies = 0;
            for wc in &wcs[..n] {
                replies += self.complete(wc, &mut each)?;
            }
            if replies > 0 {
                return Ok(replies);
            }
        }
    }

    /// Waits for the reply with this tag; there must be no other request outstanding.
    fn wait_for<T>(
        &mut self,
        tag: u16,
        mut take: impl FnMut(Reply<'_>) -> Option<T>,
    ) -> Result<T, ClientError> {
        let mut result = None;
        while result.is_none() {
            self.wait(|t, reply| {
                if t == tag {
                    result = Some(reply.map(&mut take));
                }
            })?;
        }
        match result {
            Some(Ok(Some(t))) => Ok(t),
            Some(Err(e)) => Err(e),
            _ => Err(self.fail("the store's reply is of another kind than the request")),
        }
    }

    fn patiently<T>(
        &mut self,
        mut f: impl FnMut(&mut Self) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        for _ in 0..BUSY_RETRIES {
            match f(self) {
                Err(ClientError::Status {
                    status: Status::Busy,
                    ..
                }) => self.pause(BUSY_PAUSE)?,
                other => return other,
            }
        }
        f(self)
    }

    fn pause(&self, time: Duration) -> Result<(), ClientError> {
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

    /// Reads a key's value.
    ///
    /// # Errors
    /// As the server says; a missing key is `Ok(None)`.
    pub fn get(&mut self, key: &[u8]) -> Result<Option<Object>, ClientError> {
        check(key, 0)?;
        let take = |r: Reply<'_>| match r {
            Reply::Value { version, value, .. } => Some(Object {
                version,
                value: value.to_vec(),
            }),
            _ => None,
        };
        let tag = self.start_get(key)?;
        let first = match self.wait_for(tag, take) {
            Err(ClientError::Status {
                status: Status::TooLargeForEager,
                ..
            }) => {
                let tag = self.start_get_large(key)?;
                self.wait_for(tag, take)
            }
            other => other,
        };
        match first {
            Ok(object) => Ok(Some(object)),
            Err(ClientError::Status {
                status: Status::NotFound,
                ..
            }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Stores a value; gives its version.
    ///
    /// # Errors
    /// As the server says: `Full` when there is no room.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<u64, ClientError> {
        check(key, value.len())?;
        self.patiently(|c| {
            let tag = c.start_put(key, value)?;
            c.wait_for(tag, version)
        })
    }

    /// Removes a key; gives the version that was removed, or none if there was no such key.
    ///
    /// # Errors
    /// As the server says.
    pub fn del(&mut self, key: &[u8]) -> Result<Option<u64>, ClientError> {
        check(key, 0)?;
        let removed = self.patiently(|c| {
            let tag = c.start_del(key)?;
            c.wait_for(tag, version)
        });
        match removed {
            Ok(v) => Ok(Some(v)),
            Err(ClientError::Status {
                status: Status::NotFound,
                ..
            }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// A page of keys, in no particular order; the first with cursor 0. A key that exists all the time is on exactly one page.
    ///
    /// # Errors
    /// As the server says.
    pub fn list(&mut self, cursor: u64) -> Result<PageOfKeys, ClientError> {
        let tag = self.start_list(cursor)?;
        self.wait_for(tag, |r| match r {
            Reply::Page(page) => Some(PageOfKeys {
                keys: page.keys().map(<[u8]>::to_vec).collect(),
                next: page.next(),
            }),
            _ => None,
        })
    }

    /// The server's counters.
    ///
    /// # Errors
    /// As the server says.
    pub fn stats(&mut self) -> Result<StatsReply, ClientError> {
        let tag = self.start_simple(Simple::Stats)?;
        self.wait_for(tag, |r| match r {
            Reply::Stats(s) => Some(s.get()),
            _ => None,
        })
    }

    /// Asks for nothing but an answer.
    ///
    /// # Errors
    /// When there is none.
    pub fn ping(&mut self) -> Result<(), ClientError> {
        let tag = self.start_simple(Simple::Ping)?;
        self.wait_for(tag, |r| matches!(r, Reply::Empty).then_some(()))
    }
}

fn version(reply: Reply<'_>) -> Option<u64> {
    match reply {
        Reply::Version(v) => Some(v),
        _ => None,
    }
}
