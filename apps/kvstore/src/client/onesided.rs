//! One-sided reads: the hash table and the log are READ, without the server's CPU. What can be believed of them is in
//! [`crate::store::onesided`]; what cannot is asked of the server, under the same ticket.

use alloc::boxed::Box;

use hyv_verbs::{Access, MemoryRegion, RemoteAddr};

use super::error::{check_key, verb};
use super::places::{Place, Places};
use super::{Client, ClientError, FREE, State, Ticket, WINDOW, staging};
use crate::limits::EAGER_KEY_BYTES;
use crate::proto::{Key, LogKey, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Reply, Request, Status};
use crate::store::RejectRules;
use crate::store::SUPERBLOCK_BYTES;
use crate::store::entry::ENTRY_HEADER_BYTES;
use crate::store::onesided::{Candidates, Verdict, View, candidates, verify_entry};

/// Bytes of a bucket.
const BUCKET_BYTES: usize = 64;
/// Bytes of memory for one slot's READs: a bucket, or an entry no longer than a reply could be.
const ROOM: usize = MAX_REPLY_BYTES.next_multiple_of(64);
/// What is READ of an entry whose length is not known: most small objects whole.
const FIRST_READ: usize = 256;
/// Overflow buckets that are followed; a longer chain is asked of the server.
const MAX_CHAIN: u32 = 4;
/// Lookups for which one look at the clock serves as their beginning, while they follow one another.
const STALE_POLLS: u32 = 32;
/// The slot of the READ of the superblock.
const SUPERBLOCK: u16 = WINDOW as u16;

/// A lookup under way, and the READ that it waits for.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Look {
    hash: u64,
    /// When it began, ns; not later than in truth.
    started: u64,
    /// Of the entry that is READ.
    offset: u64,
    /// Which generation is known to have been there, if the entry is READ at a [`Place`].
    generation: u64,
    /// Of the entry, as far as they are READ.
    bytes: u32,
    table: u32,
    key_len: u16,
    /// Whether `started` was read from the clock for this lookup.
    exact: bool,
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A bucket is READ.
    Bucket,
    /// An entry is READ where a bucket said.
    Candidate,
    /// An entry is READ where it was found before.
    Place,
}

const NO_LOOK: Look = Look {
    hash: 0,
    started: 0,
    offset: 0,
    generation: 0,
    bytes: 0,
    table: 0,
    key_len: 0,
    exact: false,
    step: Step::Bucket,
};

const _: () = assert!(size_of::<Look>() == 64 && EAGER_KEY_BYTES <= u16::MAX as usize);

/// How far a lookup is with the hash table, if it goes by that.
#[derive(Debug, Clone, Copy)]
struct Chain {
    /// What the last bucket said; none: it is no part of a chain any more.
    candidates: Option<Candidates>,
    /// The next candidate.
    next: usize,
    /// Overflow buckets so far.
    followed: u32,
}

const NO_CHAIN: Chain = Chain {
    candidates: None,
    next: 0,
    followed: 0,
};

/// What one-sided reads came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OneSidedCounters {
    /// Objects found by one READ, at a place known from before.
    pub direct: u64,
    /// Objects found by way of the hash table.
    pub by_table: u64,
    /// Keys found not to exist.
    pub misses: u64,
    /// Lookups that were asked of the server instead.
    pub doubts: u64,
    /// Those among them, or tried again, because they took longer than the store's memory keeps.
    pub too_long: u64,
}

/// What a client needs for one-sided reads.
pub(super) struct OneSided {
    mr: MemoryRegion,
    key: Option<LogKey>,
    view: Option<View>,
    asked: bool,
    looks: [Look; WINDOW],
    chains: [Chain; WINDOW],
    places: Places,
    counters: OneSidedCounters,
    /// The last time read from the clock, ns, and submissions since.
    now: u64,
    since: u32,
}

/// What to do next with a lookup.
enum Next {
    Bucket(u64),
    /// READ the entry at this offset, so many bytes of it.
    Candidate(u64, u32),
    Place(Place),
    Ask,
    Miss,
}

impl Client {
    /// Submits a read of `key` of `table` that does without the server's CPU, if it can. The reply is as that of a read; a table that
    /// does not exist has no objects. The server must let its clients READ.
    ///
    /// # Errors
    /// As [`Client::submit`].
    #[inline]
    pub fn submit_one_sided(&mut self, table: u32, key: &[u8]) -> Result<Ticket, ClientError> {
        check_key(key)?;
        let ready = self.one_sided.as_ref().is_some_and(|o| o.view.is_some())
            && self.link.is_some()
            && self.broken.is_none()
            && self.mending.refuses.is_none()
            && key.len() <= EAGER_KEY_BYTES;
        if !ready {
            return self.submit_instead(table, key);
        }
        let request = Request::Read {
            table,
            key: Key::Inline(key),
            rules: RejectRules::NONE,
            buffer: None,
        };
        let tag = self.occupy(&request, FREE)?;
        self.slots[usize::from(tag)].state = State::Looking;
        let (started, exact) = self.one_sided_clock();
        let Some(one_sided) = &mut self.one_sided else {
            return Err(ClientError::Disconnected("no view"));
        };
        let Some(view) = &one_sided.view else {
            return Err(ClientError::Disconnected("no view"));
        };
        let hash = view.hash(table, key);
        one_sided.looks[usize::from(tag)] = Look {
            hash,
            started,
            table,
            key_len: key.len() as u16,
            exact,
            ..NO_LOOK
        };
        let next = match one_sided.places.get(hash) {
            Some(place) => Next::Place(place),
            None => {
                one_sided.chains[usize::from(tag)] = NO_CHAIN;
                Next::Bucket(view.bucket_range(hash).start)
            }
        };
        self.look(tag, next);
        Ok(Ticket(tag))
    }

    /// Reads `key` with the server's help, and has a look at the store's superblock for the next time.
    #[cold]
    fn submit_instead(&mut self, table: u32, key: &[u8]) -> Result<Ticket, ClientError> {
        let ticket = self.submit(&super::Operation::read(table, key))?;
        self.prepare_one_sided()?;
        Ok(ticket)
    }

    /// Prepares for one-sided reads: memory, and a READ of the superblock, which the next calls of [`Client::poll`] complete. Otherwise
    /// the first one-sided read does it, and is done by the server. Takes a control verb, once.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn prepare_one_sided(&mut self) -> Result<(), ClientError> {
        if self.one_sided.is_none() {
            let mr = self
                .pd
                .alloc_mr(WINDOW * ROOM + SUPERBLOCK_BYTES, Access::LOCAL_WRITE)
                .map_err(verb("cannot register memory for READs"))?;
            self.one_sided = Some(Box::new(OneSided {
                mr,
                key: None,
                view: None,
                asked: false,
                looks: [NO_LOOK; WINDOW],
                chains: [NO_CHAIN; WINDOW],
                places: Places::new(self.config.locations),
                counters: OneSidedCounters::default(),
                now: 0,
                since: u32::MAX,
            }));
        }
        let key = self.mending.welcome.and_then(|welcome| welcome.log);
        let (Some(one_sided), Some(link), Some(key)) = (&mut self.one_sided, &mut self.link, key)
        else {
            return Ok(());
        };
        one_sided.key = Some(key);
        if !one_sided.asked && one_sided.view.is_none() && self.broken.is_none() {
            let to = one_sided
                .mr
                .sge((WINDOW * ROOM) as u64, SUPERBLOCK_BYTES as u32);
            let from = RemoteAddr {
                addr: key.addr,
                rkey: key.rkey,
            };
            one_sided.asked = link.read(SUPERBLOCK, from, to).is_ok();
        }
        Ok(())
    }

    /// What one-sided reads came to so far.
    #[must_use]
    pub fn one_sided_counters(&self) -> OneSidedCounters {
        self.one_sided
            .as_ref()
            .map_or_else(OneSidedCounters::default, |o| o.counters)
    }

    /// Whether one-sided reads go to the store's memory by now.
    #[must_use]
    pub fn is_one_sided(&self) -> bool {
        self.one_sided.as_ref().is_some_and(|o| o.view.is_some())
    }

    /// After a new connection: the view is READ anew; places are forgotten if the store is another one.
    pub(super) fn forget_places(&mut self, restarted: bool) {
        if let Some(one_sided) = &mut self.one_sided {
            one_sided.view = None;
            one_sided.asked = false;
            one_sided.key = None;
            if restarted {
                one_sided.places.clear();
            }
        }
    }

    /// A time that is not later than now, and whether it is now.
    #[inline]
    fn one_sided_clock(&mut self) -> (u64, bool) {
        let Some(one_sided) = &mut self.one_sided else {
            return (0, false);
        };
        one_sided.since = one_sided.since.saturating_add(1);
        if one_sided.since > STALE_POLLS {
            one_sided.now = self.context.now_ns();
            one_sided.since = 0;
            return (one_sided.now, true);
        }
        (one_sided.now, false)
    }

    /// Goes on with a lookup: posts its next READ, or asks the server.
    #[inline]
    fn look(&mut self, tag: u16, next: Next) {
        let Some(one_sided) = &mut self.one_sided else {
            return self.ask(tag);
        };
        let (Some(view), Some(key), Some(link)) =
            (&one_sided.view, one_sided.key, self.link.as_mut())
        else {
            return self.ask(tag);
        };
        let look = &mut one_sided.looks[usize::from(tag)];
        let range = match next {
            Next::Bucket(offset) => {
                look.step = Step::Bucket;
                Some(offset..offset + BUCKET_BYTES as u64)
            }
            Next::Candidate(offset, bytes) => {
                (look.step, look.offset) = (Step::Candidate, offset);
                view.entry_range(offset, bytes as usize)
            }
            Next::Place(place) => {
                (look.step, look.offset) = (Step::Place, place.offset);
                look.generation = place.generation;
                view.entry_range(place.offset, place.bytes as usize)
            }
            Next::Ask | Next::Miss => None,
        };
        let Some(range) = range.filter(|range| range.end <= key.len) else {
            return self.ask(tag);
        };
        let len = (range.end - range.start) as u32;
        look.bytes = len;
        let from = RemoteAddr {
            addr: key.addr.wrapping_add(range.start),
            rkey: key.rkey,
        };
        let to = one_sided.mr.sge(u64::from(tag) * ROOM as u64, len);
        if link.read(tag, from, to).is_err() {
            self.ask(tag);
        }
    }

    /// Leaves a lookup to the server: its request is in its slot.
    #[cold]
    fn ask(&mut self, tag: u16) {
        if let Some(one_sided) = &mut self.one_sided {
            one_sided.counters.doubts += 1;
        }
        self.slots[usize::from(tag)].state = State::Queued;
        self.queue.push_back(tag);
        // An error has broken the connection, which shows at the next call.
        let _ = self.post_queued();
    }

    /// A READ has completed. Returns the requests that it completes.
    #[inline]
    pub(super) fn looked_up(
        &mut self,
        tag: u16,
        each: &mut impl FnMut(Ticket, Result<Reply<'_>, ClientError>),
    ) -> usize {
        if tag == SUPERBLOCK {
            self.take_view();
            return 0;
        }
        match self.slots.get(usize::from(tag)) {
            Some(slot) if slot.state == State::Looking => {}
            _ => return 0,
        }
        let ended = self.context.now_ns();
        let Some(one_sided) = &mut self.one_sided else {
            return 0;
        };
        (one_sided.now, one_sided.since) = (ended, 0);
        let OneSided {
            mr,
            view: Some(view),
            looks,
            chains,
            places,
            counters,
            ..
        } = &mut **one_sided
        else {
            self.ask(tag);
            return 0;
        };
        let (look, chain) = (&looks[usize::from(tag)], &mut chains[usize::from(tag)]);
        let at = usize::from(tag) * ROOM;
        let in_time = view.in_time(look.started, ended);
        let next = match look.step {
            Step::Bucket => {
                let bytes = staging::received(mr, at, BUCKET_BYTES);
                chain.candidates = bytes
                    .first_chunk()
                    .and_then(|bucket| candidates(bucket, look.hash));
                chain.next = 0;
                chain.following(view)
            }
            Step::Candidate | Step::Place => {
                let known = look.step == Step::Place;
                let read = staging::received(mr, at, look.bytes as usize);
                let request = usize::from(tag) * MAX_REQUEST_BYTES;
                let sent = staging::received(&self.send, request, MAX_REQUEST_BYTES);
                let len = self.slots[usize::from(tag)].len as usize;
                let key = &sent[len - usize::from(look.key_len)..len];
                let generation = known.then_some(look.generation);
                let mending = &self.mending;
                let latest = || mending.latest_server_time(ended);
                match verify_entry(read, look.table, key, generation, latest) {
                    Verdict::Hit(hit) if in_time => {
                        let reply = Reply::Value {
                            version: hit.version,
                            value: hit.value,
                            key: None,
                        };
                        each(Ticket(tag), Ok(reply));
                        if known {
                            counters.direct += 1;
                        } else {
                            counters.by_table += 1;
                            places.put(Place {
                                hash: look.hash,
                                offset: look.offset,
                                generation: hit.generation,
                                bytes: hit.bytes as u32,
                            });
                        }
                        self.release(tag, &FREE);
                        return 1;
                    }
                    Verdict::Hit(_) => Next::Ask,
                    // What is known of a place says how long its entry is.
                    Verdict::Longer { bytes } if bytes <= ROOM && !known => {
                        Next::Candidate(look.offset, bytes as u32)
                    }
                    Verdict::Other if !known => chain.following(view),
                    Verdict::Longer { .. } | Verdict::Other | Verdict::Doubt => {
                        places.forget(look.hash);
                        Next::Ask
                    }
                }
            }
        };
        if !in_time {
            return self.too_long(tag);
        }
        if let Next::Miss = next {
            counters.misses += 1;
            self.finish(tag, Err(ClientError::of(Status::NotFound, 0)), each);
            return 1;
        }
        self.look(tag, next);
        0
    }

    /// A lookup took longer than the memory that it read rests. If it only seemed so, because its beginning was not looked at the
    /// clock for, it begins again; otherwise the server is asked.
    #[cold]
    fn too_long(&mut self, tag: u16) -> usize {
        let now = self.context.now_ns();
        let Some(one_sided) = &mut self.one_sided else {
            return 0;
        };
        one_sided.counters.too_long += 1;
        let look = &mut one_sided.looks[usize::from(tag)];
        let bucket = one_sided
            .view
            .as_ref()
            .map(|view| view.bucket_range(look.hash).start);
        let next = match bucket {
            Some(bucket) if !look.exact => {
                (look.started, look.exact) = (now, true);
                one_sided.chains[usize::from(tag)] = NO_CHAIN;
                Next::Bucket(bucket)
            }
            _ => Next::Ask,
        };
        self.look(tag, next);
        0
    }

    /// The superblock has been READ.
    #[cold]
    fn take_view(&mut self) {
        let epoch = self.server_epoch();
        let Some(one_sided) = &mut self.one_sided else {
            return;
        };
        let bytes = staging::received(&one_sided.mr, WINDOW * ROOM, SUPERBLOCK_BYTES);
        // A store of another format, or of another life, is left to the server.
        one_sided.view = View::parse(bytes)
            .ok()
            .filter(|view| view.quarantine_ns() > 0 && view.incarnation() == epoch);
    }
}

impl Chain {
    /// The next candidate, or the next bucket of the chain.
    #[inline]
    fn following(&mut self, view: &View) -> Next {
        let Some(found) = &self.candidates else {
            return Next::Ask;
        };
        if let Some(&offset) = found.offsets().get(self.next) {
            self.next += 1;
            return Next::Candidate(offset, FIRST_READ as u32);
        }
        match found.overflow {
            None => Next::Miss,
            Some(offset) => {
                self.followed += 1;
                match view.overflow_range(offset) {
                    Some(range) if self.followed <= MAX_CHAIN => Next::Bucket(range.start),
                    _ => Next::Ask,
                }
            }
        }
    }
}

const _: () = assert!(FIRST_READ > ENTRY_HEADER_BYTES && FIRST_READ <= ROOM);
