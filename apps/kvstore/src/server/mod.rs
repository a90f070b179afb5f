//! The server: answers requests that arrive over RC queue pairs, from a [`Store`] whose region the device reads.
//!
//! One thread polls the completion queues. A reply to a READ is gathered straight from the log; the segment
//! stays pinned until the send has completed. Values larger than a message travel by READ and WRITE between
//! the log and the client's memory. Receives come from queues that connections share; each client has a window, and each window its
//! receive buffers, so that nobody starves another.
//!
//! | module | holds |
//! | --- | --- |
//! | `connection` | one client: queue pair, what is in flight; and the groups that share receives |
//! | `requests` | what each operation does to the store |
//! | `rare` | pages, tables, statistics |
//! | `counts` | what was done to each table |
//! | `jobs` | multi-operations, in slices |
//! | `transfers` | values and keys that travel by address |
//! | `scratch` | buffers for what is put together or READ |
//! | `accept` | connections that come and go |
//! | `clock` | the time |
//! | [`serve`] | the loop around it: spin, clean, sleep |
//! | [`limits`] | every limit, with its reason |

mod accept;
mod clock;
mod connection;
mod counts;
mod jobs;
pub mod limits;
mod rare;
mod region;
mod requests;
mod scratch;
pub mod serve;
mod transfers;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use hyv_verbs::{Access, Context, Error, ProtectionDomain, WorkCompletion};

use crate::limits::QUARANTINE_NS;
use crate::proto::{Class, Histogram, LogKey};
use crate::store::{CleanState, Config, Store, StoreError, hash64};
use clock::Clock;
use connection::{Connection, Group, Held, Link, NONE, kind, split};
use limits::POLL_BATCH;
pub use region::LogRegion;
use requests::{Fate, Place};
use scratch::Scratch;
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

/// What the server did so far. Elements of multi-operations count one by one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Reads, hits and misses.
    pub gets: u64,
    /// Writes that were stored.
    pub puts: u64,
    /// Removes that removed something.
    pub dels: u64,
    /// Increments done.
    pub increments: u64,
    /// Reads and removes of keys that do not exist.
    pub misses: u64,
    /// Operations that a reject rule refused.
    pub rejects: u64,
    /// Requests that were executed before and got the result kept for them.
    pub duplicates: u64,
    /// Multi-operations.
    pub multis: u64,
    /// Pages of enumerations.
    pub pages: u64,
    /// Requests of other kinds.
    pub others: u64,
    /// Requests refused, for whatever reason.
    pub errors: u64,
    /// Connections accepted.
    pub connections: u64,
    /// Connections ended because their client broke the protocol or took no replies.
    pub expelled: u64,
}

/// What [`Server::new`] needs to know.
#[derive(Clone, Copy, Debug)]
pub struct ServerConfig {
    /// Port that clients connect to.
    pub port: u16,
    /// Bytes for the store: hash table and log.
    pub store_bytes: usize,
    /// Seed of the key hash, of clients' ids and of the epoch, from a random source: another one in each life of a server.
    pub seed: u64,
    /// Connections at once.
    pub max_connections: usize,
    /// The time now, ns since 1970: what expiries are compared with.
    pub unix_ns: u64,
    /// Whether clients may READ the store themselves. Whoever has the key for that can read every table.
    pub one_sided: bool,
}

/// A store and its clients.
pub struct Server {
    context: Context,
    pd: ProtectionDomain,
    groups: Vec<Group>,
    store: Store<LogRegion>,
    log: Option<LogKey>,
    /// Boxes: a connection is taken out while one of its requests runs.
    conns: Vec<Option<Box<Connection>>>,
    free_conns: Vec<usize>,
    /// Connections' slots by their queue pairs' indices.
    by_qp: Vec<u32>,
    serial: u32,
    scratch: Scratch,
    transfers: Vec<Option<Transfer>>,
    /// Those whose value is in the log and not summed yet.
    arrived: VecDeque<u32>,
    jobs: jobs::Jobs,
    drops: Vec<rare::PendingDrop>,
    /// The slot of the connection whose turn it is to be asked for a sign of life.
    next_asked: usize,
    listener: accept::Listener,
    config: ServerConfig,
    counters: Counters,
    counts: counts::Counts,
    connected: usize,
    completions: Box<[WorkCompletion; POLL_BATCH]>,
    /// Connections whose doorbells are due at the end of a batch.
    unrung: Vec<u32>,
    /// Some connection has requests that wait for room.
    any_deferred: bool,
    /// Some connection is to be closed.
    any_broken: bool,
    /// A write failed for want of space that sends in flight may hold.
    want_flush: bool,
    /// [`Store::died_bytes`] when cleaning was last thought of.
    died_before: u64,
    clock: Clock,
    epoch: u64,
    /// What clients' ids are made of, and how many were given.
    secret: u64,
    clients: u64,
    /// Clients that left and still have a lease, those that left first in front: id, and when it expires.
    former: VecDeque<(u64, u64)>,
    times: Box<[Histogram; Class::ALL.len()]>,
    until_sample: u32,
    /// The connection (its serial) at whose wish the cleaner rests, or never does.
    cleaner_set_by: Option<u32>,
}

/// One request in so many is timed: two looks at the clock cost some 30 ns.
const SAMPLE: u32 = 64;

impl Server {
    /// A server on a device, listening.
    ///
    /// # Errors
    /// When memory, device objects or the port cannot be had.
    pub fn new(context: &Context, config: ServerConfig) -> Result<Self, ServerError> {
        let pd = context
            .alloc_pd()
            .map_err(verb("cannot make a protection domain"))?;
        // Local write for the READs that bring large values. Clients never write the log.
        let access = if config.one_sided {
            Access::LOCAL_WRITE | Access::REMOTE_READ
        } else {
            Access::LOCAL_WRITE
        };
        let region = pd
            .alloc_mr(config.store_bytes, access)
            .map_err(verb("cannot register the store's region"))?;
        let log = config.one_sided.then(|| LogKey {
            addr: region.addr(),
            len: region.len() as u64,
            rkey: region.rkey(),
        });
        let scratch = Scratch::new(&pd).map_err(verb("cannot register scratch buffers"))?;
        let derive = |what: &[u8]| hash64(config.seed, what);
        let epoch = derive(b"epoch");
        let store = Store::new(
            LogRegion::new(region),
            Config {
                seed: derive(b"key hash"),
                quarantine_ns: if config.one_sided { QUARANTINE_NS } else { 0 },
                incarnation: epoch,
                clean_for_write: Some(limits::CLEAN_SLICE),
                ..Config::default()
            },
        )?;
        let listener = accept::Listener::new(context, config.port)?;
        Ok(Self {
            context: context.clone(),
            pd,
            groups: Vec::new(),
            store,
            log,
            conns: Vec::new(),
            free_conns: Vec::new(),
            by_qp: Vec::new(),
            serial: 0,
            scratch,
            transfers: Vec::new(),
            arrived: VecDeque::new(),
            jobs: jobs::Jobs::default(),
            drops: Vec::new(),
            next_asked: 0,
            listener,
            config,
            counters: Counters::default(),
            counts: counts::Counts::new(),
            connected: 0,
            completions: Box::new([WorkCompletion::EMPTY; POLL_BATCH]),
            unrung: Vec::with_capacity(POLL_BATCH),
            any_deferred: false,
            any_broken: false,
            want_flush: false,
            died_before: 0,
            clock: Clock::new(context, config.unix_ns),
            epoch,
            secret: derive(b"clients"),
            clients: 0,
            former: VecDeque::new(),
            times: Box::new([const { Histogram::new() }; Class::ALL.len()]),
            until_sample: SAMPLE,
            cleaner_set_by: None,
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

    /// The random number of this server's life, which clients tell restarts by.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Service times of sampled requests of a class, ns: from a request's completion to its reply's work request.
    #[must_use]
    pub const fn times(&self, class: Class) -> &Histogram {
        &self.times[class as usize]
    }

    /// Bytes registered for connections: rings, receive and scratch buffers.
    #[must_use]
    pub fn connection_bytes(&self) -> u64 {
        let groups = self.groups.iter().map(|group| group.tier.bytes() as u64);
        groups.sum::<u64>() + limits::SCRATCH_REGION_BYTES as u64
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
        self.clock.turn(&self.context);
        let mut n = 0;
        for group in 0..self.groups.len() {
            n += self.poll_group(group);
        }
        if !self.arrived.is_empty() {
            self.sum_arrived();
        }
        if self.jobs.any_ready() {
            self.run_jobs();
        }
        if self.any_deferred {
            self.retry_deferred();
        }
        if self.any_broken {
            self.close_broken();
        }
        if !self.drops.is_empty() {
            self.finish_drops();
        }
        n
    }

    /// Whether there is something to do though nothing arrives.
    fn has_work(&self) -> bool {
        self.jobs.any_ready()
            || !self.arrived.is_empty()
            || self.any_deferred
            || self.any_broken
            || !self.drops.is_empty()
    }

    #[inline]
    fn poll_group(&mut self, group: usize) -> usize {
        let polled = self.groups[group].cq.poll(&mut self.completions[..]);
        if polled > 1 {
            self.complete_batch(group, polled);
        } else if polled == 1 {
            let wc = self.completions[0];
            self.complete(group, &wc, false);
        }
        polled
    }

    /// Takes several completions: their requests' lines, which the device has just written, are fetched together, and their replies
    /// share a doorbell.
    fn complete_batch(&mut self, group: usize, polled: usize) {
        for wc in &self.completions[..polled] {
            let (kind, index) = split(wc.wr_id);
            if kind == kind::RECV && wc.inline_data().is_none() {
                let len = wc.byte_len as usize;
                region::prefetch(&self.groups[group].buffers, buffer_offset(index), len);
            }
        }
        for i in 0..polled {
            let wc = self.completions[i];
            self.complete(group, &wc, true);
        }
        while let Some(slot) = self.unrung.pop() {
            if let Some(conn) = &mut self.conns[slot as usize] {
                conn.link.ring();
            }
        }
    }

    #[inline]
    fn complete(&mut self, group: usize, wc: &WorkCompletion, batch: bool) {
        let (kind, index) = split(wc.wr_id);
        let slot = self.by_qp.get(usize::from(wc.qp_index));
        let slot = slot.map_or(usize::MAX, |slot| *slot as usize);
        let Some(mut conn) = self.conns.get_mut(slot).and_then(Option::take) else {
            if kind == kind::RECV {
                self.groups[group].release(index);
            }
            return;
        };
        let link = &mut conn.link;
        if kind == kind::RECV {
            let place = Place {
                buffer: index,
                len: wc.byte_len,
            };
            if !wc.is_ok() || link.broken {
                link.broken = true;
                self.groups[group].release(index);
            } else if !link.arrived(self.clock.now) {
                self.expel(link);
                self.groups[group].release(index);
            } else if link.has_room() && link.deferred.is_empty() {
                let bytes = match wc.inline_data() {
                    Some(bytes) => bytes,
                    None => {
                        region::received(&conn.buffers, buffer_offset(index), wc.byte_len as usize)
                    }
                };
                self.until_sample -= 1;
                if batch {
                    link.begin_batch();
                }
                let fate = if self.until_sample == 0 {
                    self.sampled_request(link, place, bytes)
                } else {
                    self.request(link, place, bytes)
                };
                self.settle(link, place, fate);
                if link.end_batch() && self.unrung.last() != Some(&(slot as u32)) {
                    self.unrung.push(slot as u32);
                }
            } else {
                link.deferred.push_back((index, wc.byte_len));
                self.any_deferred = true;
            }
        } else if !wc.is_ok() {
            // Its end gives back what it held.
            link.broken = true;
        } else if kind == kind::SEND {
            link.heard = self.clock.now;
            while let Some(held) = link.take_done(index) {
                give_back(&mut self.store, &mut self.scratch, link, held);
            }
        } else if kind == kind::READ {
            self.transfer_done(&mut conn, index);
        } else {
            self.job_transferred(index);
        }
        self.any_broken |= conn.link.broken;
        self.conns[slot] = Some(conn);
    }

    #[cold]
    fn sampled_request(&mut self, link: &mut Link, place: Place, bytes: &[u8]) -> Fate {
        self.until_sample = SAMPLE;
        let class = match bytes.first() {
            Some(&op) if op == crate::proto::Op::Read as u8 => Class::Read,
            Some(&op)
                if op == crate::proto::Op::Write as u8
                    || op == crate::proto::Op::Remove as u8
                    || op == crate::proto::Op::Increment as u8 =>
            {
                Class::Write
            }
            _ => Class::Other,
        };
        let start = self.context.now_ns();
        let fate = self.request(link, place, bytes);
        let end = self.context.now_ns();
        self.times[class as usize].add(end.saturating_sub(start));
        fate
    }

    /// Does with a request's receive buffer what is to be done.
    #[inline]
    fn settle(&mut self, link: &mut Link, place: Place, fate: Fate) {
        match fate {
            Fate::Done => {
                link.busy_since = None;
                self.groups[link.group].release(place.buffer);
            }
            Fate::Keep => {}
            Fate::Defer => {
                link.deferred.push_front((place.buffer, place.len));
                self.any_deferred = true;
            }
        }
    }

    #[cold]
    fn retry_deferred(&mut self) {
        self.any_deferred = false;
        // They may wait for room.
        self.clean();
        for slot in 0..self.conns.len() {
            let waiting = self.conns[slot].take_if(|conn| !conn.link.deferred.is_empty());
            let Some(mut conn) = waiting else {
                continue;
            };
            while !conn.link.broken
                && conn.link.has_room()
                && let Some((buffer, len)) = conn.link.deferred.pop_front()
            {
                let place = Place { buffer, len };
                let bytes = region::received(&conn.buffers, buffer_offset(buffer), len as usize);
                let fate = self.request(&mut conn.link, place, bytes);
                self.settle(&mut conn.link, place, fate);
                if fate == Fate::Defer {
                    break;
                }
            }
            self.any_deferred |= !conn.link.deferred.is_empty();
            self.any_broken |= conn.link.broken;
            self.conns[slot] = Some(conn);
        }
    }

    /// Ends the connection of a client that breaks the rules.
    #[cold]
    fn expel(&mut self, link: &mut Link) {
        self.counters.expelled += 1;
        link.broken = true;
    }

    /// A round of maintenance, every 10 ms or so: asks for completions of sends that would otherwise pin their segments for as
    /// long as a client is idle, gives up clients that take no replies, asks silent ones for a sign of life, some in each round, and
    /// renews leases.
    pub fn flush(&mut self) {
        self.clock.round(&self.context);
        let now = self.clock.now;
        let mut renewals = limits::RENEWALS_PER_ROUND;
        let mut asks = limits::KEEPALIVES_PER_ROUND;
        let first = self.next_asked.min(self.conns.len());
        let (before, rest) = self.conns.split_at_mut(first);
        for conn in rest.iter_mut().chain(before).flatten() {
            let link = &mut conn.link;
            let silent = now.saturating_sub(link.heard) >= limits::KEEPALIVE_NS;
            if link.flush(silent && asks > 0) {
                asks -= 1;
                self.next_asked = link.slot() + 1;
            }
            if link.is_stuck(self.clock.ran) {
                self.counters.expelled += 1;
                link.broken = true;
            }
            self.any_broken |= link.broken;
            let client = &mut link.client;
            // Also of one that is silent: its connection ends soon, and the lease goes on from there.
            if renewals > 0
                && client.lease_until != 0
                && client.lease_until < now + limits::LEASE_NS / 2
            {
                renewals -= 1;
                let until = now + limits::LEASE_NS;
                // Busy now: again in the next round, of which there are hundreds before it expires.
                if self.store.take_lease(client.id, until, now).is_ok() {
                    client.lease_until = until;
                }
            }
        }
    }

    /// Does a slice of the cleaner's work, if there is any. True if it did some.
    pub fn clean(&mut self) -> bool {
        let now = self.clock.now;
        let died = self.store.died_bytes();
        let new = died - core::mem::replace(&mut self.died_before, died);
        if !self.store.wants_cleaning(now) {
            return false;
        }
        // As much as what was overwritten since asks for: who only reads waits behind the least.
        let slice = if self.store.is_scarce() {
            (new as usize)
                .saturating_mul(limits::CLEANED_PER_DEAD)
                .clamp(limits::TIDY_SLICE, limits::CLEAN_SLICE)
        } else {
            limits::TIDY_SLICE
        };
        let progress = self.store.clean(slice, now);
        self.want_flush |= progress.state == CleanState::Blocked;
        progress.state == CleanState::More
    }
}

/// Gives back what a finished send held.
#[inline]
fn give_back(store: &mut Store<LogRegion>, scratch: &mut Scratch, link: &mut Link, held: Held) {
    if held.segment != NONE {
        store.unpin(held.segment);
    }
    if held.scratch != NONE {
        scratch.give_back(link, held.scratch);
    }
}

const fn buffer_offset(buffer: u32) -> usize {
    buffer as usize * crate::proto::MAX_REQUEST_BYTES
}
