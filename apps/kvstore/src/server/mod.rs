//! The server: answers requests that arrive over RC queue pairs, from a [`Store`] whose region the device reads.
//!
//! One thread polls one completion queue. A reply to a GET is gathered straight from the log; the segment
//! stays pinned until the send has completed. Values larger than a message travel by READ and WRITE between
//! the log and the client's memory.
//!
//! | module | holds |
//! | --- | --- |
//! | `connection` | one client: queue pair, buffers, what is in flight |
//! | `requests` | what each operation does |
//! | `transfers` | values and keys that travel by address |
//! | `accept` | connections that come and go |
//! | `timing` | service times, sampled |
//! | [`serve`] | the loop around it: spin, clean, sleep |
//! | [`limits`] | every limit, with its reason |

mod accept;
mod connection;
pub mod limits;
mod region;
mod requests;
pub mod serve;
mod timing;
mod transfers;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use hyv_verbs::{
    Access, CompletionQueue, Context, Error, MemoryRegion, PostError, ProtectionDomain, WcOpcode,
    WorkCompletion,
};

use crate::store::{CleanState, Config, Store, StoreError};
use connection::{Connection, Held, NONE, kind, split};
use limits::{POLL_BATCH, SCRATCH_BUFFERS, SCRATCH_BYTES};
pub use region::LogRegion;
use transfers::Transfer;

/// Why a server could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// A verb failed.
    #[error("{what}: {source}")]
    Verb {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: Error,
    },
    /// The store's region is of no use.
    #[error("the store cannot use its region: {0}")]
    Store(#[from] StoreError),
}

fn verb(what: &'static str) -> impl FnOnce(Error) -> ServerError {
    move |source| ServerError::Verb { what, source }
}

/// What the server did so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// GETs, hits and misses.
    pub gets: u64,
    /// PUTs that were stored.
    pub puts: u64,
    /// DELs that removed something.
    pub dels: u64,
    /// GETs and DELs of keys that do not exist.
    pub misses: u64,
    /// Requests of other kinds.
    pub others: u64,
    /// Requests refused, for whatever reason.
    pub errors: u64,
    /// Connections accepted.
    pub connections: u64,
}

/// What [`Server::new`] needs to know.
#[derive(Clone, Copy, Debug)]
pub struct ServerConfig {
    /// Port that clients connect to.
    pub port: u16,
    /// Bytes for the store: hash table and log.
    pub store_bytes: usize,
    /// Seed of the key hash, from a random source.
    pub seed: u64,
    /// Connections at once.
    pub max_connections: usize,
}

/// A completion queue and the connections on it. The first is small, so that with few clients its ring stays in
/// the caches of both sides; each further one is larger.
struct CqShare {
    cq: CompletionQueue,
    used: usize,
    room: usize,
}

/// A store and its clients.
pub struct Server {
    context: Context,
    pd: ProtectionDomain,
    cqs: Vec<CqShare>,
    store: Store<LogRegion>,
    /// Boxes: a connection is taken out while one of its requests runs.
    conns: Vec<Option<Box<Connection>>>,
    free_conns: Vec<usize>,
    scratch: Arc<MemoryRegion>,
    free_scratch: Vec<u32>,
    transfers: Vec<Option<Transfer>>,
    listener: accept::Listener,
    config: ServerConfig,
    counters: Counters,
    connected: usize,
    completions: Box<[WorkCompletion; POLL_BATCH]>,
    /// Some connection has requests that wait for room.
    any_deferred: bool,
    /// Some connection is to be closed.
    any_broken: bool,
    /// A write failed for want of space that sends in flight may hold.
    want_flush: bool,
    times: timing::ServiceTimes,
    until_sample: u32,
}

impl Server {
    /// A server on a device, listening.
    ///
    /// # Errors
    /// When memory, device objects or the port cannot be had.
    pub fn new(context: &Context, config: ServerConfig) -> Result<Self, ServerError> {
        let pd = context
            .alloc_pd()
            .map_err(verb("cannot make a protection domain"))?;
        // Local write for the READs that bring large values; no remote access: clients never touch the log.
        let log = pd
            .alloc_mr(config.store_bytes, Access::LOCAL_WRITE)
            .map_err(verb("cannot register the store's region"))?;
        let scratch = pd
            .alloc_mr(SCRATCH_BUFFERS * SCRATCH_BYTES, Access::LOCAL_WRITE)
            .map_err(verb("cannot register scratch buffers"))?;
        let store = Store::new(
            LogRegion::new(log),
            Config {
                seed: config.seed,
                ..Config::default()
            },
        )?;
        let listener = accept::Listener::new(context, config.port)?;
        Ok(Self {
            context: context.clone(),
            pd,
            cqs: Vec::new(),
            store,
            conns: Vec::new(),
            free_conns: Vec::new(),
            scratch: Arc::new(scratch),
            free_scratch: (0..SCRATCH_BUFFERS as u32).collect(),
            transfers: Vec::new(),
            listener,
            config,
            counters: Counters::default(),
            connected: 0,
            completions: Box::new([WorkCompletion::EMPTY; POLL_BATCH]),
            any_deferred: false,
            any_broken: false,
            want_flush: false,
            times: timing::ServiceTimes::new(),
            until_sample: timing::SAMPLE,
        })
    }

    /// The store.
    #[must_use]
    pub const fn store(&self) -> &Store<LogRegion> {
        &self.store
    }

    /// What it did so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Clients connected now.
    #[must_use]
    pub const fn connected(&self) -> usize {
        self.connected
    }

    /// The device.
    #[must_use]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// Median and 99th percentile of the service times of recent sampled requests, ns.
    #[must_use]
    pub fn service_times(&self) -> (u64, u64) {
        (self.times.quantile(500), self.times.quantile(990))
    }

    /// Where the store lies: RAM offset and bytes.
    #[must_use]
    pub fn store_range(&self) -> (u64, u64) {
        let mr = self.store.region().mr();
        (
            self.context
                .platform()
                .ram_offset(mr.as_ptr(), mr.len())
                .unwrap_or(0),
            mr.len() as u64,
        )
    }

    /// Answers what has arrived. Returns the number of completions handled; 0 says that there was nothing to do.
    #[inline]
    pub fn poll(&mut self) -> usize {
        let mut n = 0;
        for q in 0..self.cqs.len() {
            let polled = self.cqs[q].cq.poll(&mut self.completions[..]);
            for i in 0..polled {
                let wc = self.completions[i];
                self.complete(&wc);
            }
            n += polled;
        }
        if self.any_deferred {
            self.retry_deferred();
        }
        if self.any_broken {
            self.close_broken();
        }
        n
    }

    #[inline]
    fn complete(&mut self, wc: &WorkCompletion) {
        let (slot, kind, index) = split(wc.wr_id);
        let Some(mut conn) = self.conns.get_mut(slot).and_then(Option::take) else {
            return;
        };
        if !wc.is_ok() {
            conn.link.broken = true;
            if kind == kind::READ {
                self.transfer_failed(index);
            }
        } else if kind == kind::RECV {
            debug_assert_eq!(wc.opcode, WcOpcode::Recv);
            if conn.link.has_room() && conn.link.deferred.is_empty() {
                let bytes = match wc.inline_data() {
                    Some(bytes) => bytes,
                    None => {
                        region::received(&conn.buffers, buffer_offset(index), wc.byte_len as usize)
                    }
                };
                self.until_sample -= 1;
                if self.until_sample == 0 {
                    self.until_sample = timing::SAMPLE;
                    let start = self.context.now_ns();
                    self.request(&mut conn.link, index, bytes);
                    self.times.add(self.context.now_ns().saturating_sub(start));
                } else {
                    self.request(&mut conn.link, index, bytes);
                }
            } else {
                conn.link.deferred.push_back((index, wc.byte_len));
                self.any_deferred = true;
            }
        } else if kind == kind::SEND {
            let Self {
                store,
                free_scratch,
                ..
            } = self;
            let mut buffers = [NONE; limits::RECV_BUFFERS];
            let mut n = 0;
            conn.link.done(index, |held| {
                release(store, free_scratch, held);
                if held.buffer != NONE && n < buffers.len() {
                    buffers[n] = held.buffer;
                    n += 1;
                }
            });
            for &b in &buffers[..n] {
                conn.link.release(b);
            }
        } else {
            self.transfer_done(&mut conn.link, index);
        }
        self.any_broken |= conn.link.broken;
        self.conns[slot] = Some(conn);
    }

    #[cold]
    fn retry_deferred(&mut self) {
        let mut waiting = false;
        for slot in 0..self.conns.len() {
            let Some(mut conn) = self.conns[slot].take() else {
                continue;
            };
            while !conn.link.broken
                && conn.link.has_room()
                && let Some((buffer, len)) = conn.link.deferred.pop_front()
            {
                let bytes = region::received(&conn.buffers, buffer_offset(buffer), len as usize);
                if !self.request(&mut conn.link, buffer, bytes) {
                    break;
                }
            }
            waiting |= !conn.link.deferred.is_empty();
            self.any_broken |= conn.link.broken;
            self.conns[slot] = Some(conn);
        }
        self.any_deferred = waiting;
    }

    /// A round of maintenance, every 10 ms or so: asks for completions of sends that would otherwise pin their segments for as
    /// long as a client is idle, and gives up clients that take no replies.
    pub fn flush(&mut self) {
        for conn in self.conns.iter_mut().flatten() {
            let flushed = matches!(conn.link.flush(), Ok(()) | Err(PostError::QueueFull));
            conn.link.broken |= !flushed || conn.link.is_stuck();
            self.any_broken |= conn.link.broken;
        }
    }

    /// Does a slice of the cleaner's work, if there is any. True if it did some.
    pub fn clean(&mut self) -> bool {
        if !self.store.wants_cleaning(requests::NOW) {
            return false;
        }
        let slice = if self.store.is_scarce() {
            limits::CLEAN_SLICE
        } else {
            limits::TIDY_SLICE
        };
        let progress = self.store.clean(slice, requests::NOW);
        self.want_flush |= progress.state == CleanState::Blocked;
        progress.state == CleanState::More
    }
}

/// Gives back what a finished send held, but for its receive buffer.
fn release(store: &mut Store<LogRegion>, free_scratch: &mut Vec<u32>, held: Held) {
    if held.segment != NONE {
        store.unpin(held.segment);
    }
    if held.scratch != NONE {
        free_scratch.push(held.scratch);
    }
}

const fn buffer_offset(buffer: u32) -> usize {
    buffer as usize * crate::proto::MAX_REQUEST_BYTES
}
