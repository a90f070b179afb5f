//! What each operation does.

use hyv_verbs::probe::{Lines, respond};
use hyv_verbs::{Payload, RemoteAddr, SendOp};

use super::connection::{Held, Link, NONE};
use super::transfers::Stage;
use super::{Server, limits};
use crate::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES};
use crate::proto::{
    Key, Once, RemoteBuffer, Reply, Request, Status, Value, entry_reply, error_detail, request_tag,
};
use crate::store::{
    Found, Increment, Outcome, Progress, RejectRules, RequestId, StoreError, Write,
};

/// Longest reply that goes inline: what the head of a work request has room for.
pub(super) const INLINE_REPLY: usize = 24;

/// Where a request is: its receive buffer, and its length.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub buffer: u32,
    pub len: u32,
}

/// What becomes of a request's receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// The request does not need it any more.
    Done,
    /// Somebody keeps it, and gives it back.
    Keep,
    /// The request has to wait: for a scratch buffer, or for room in the log.
    Defer,
}

/// What to do with a request that has an id.
enum Admitted {
    /// Execute it.
    Yes(Option<RequestId>),
    /// It is answered already.
    Answered,
}

impl Server {
    /// Runs a request that lies at `place`; `bytes` is what it says.
    #[inline]
    pub(super) fn request(&mut self, link: &mut Link, place: Place, bytes: &[u8]) -> Fate {
        let (tag, request) = match Request::parse(bytes) {
            Ok(r) => r,
            Err(e) => {
                match request_tag(bytes) {
                    Some(tag) => self.fail(link, tag, e.status(), 0),
                    // Nobody could tell which request an answer belongs to.
                    None => self.expel(link),
                }
                return Fate::Done;
            }
        };
        if let Some(Key::Remote(key)) = request.key() {
            return self.fetch_key(link, place, key);
        }
        self.execute(link, tag, &request, place)
    }

    /// Executes a request whose key is at hand.
    #[inline]
    pub(super) fn execute(
        &mut self,
        link: &mut Link,
        tag: u16,
        request: &Request<'_>,
        place: Place,
    ) -> Fate {
        match *request {
            Request::Read {
                table,
                key: Key::Inline(key),
                ref rules,
                buffer,
            } => self.read(link, tag, (table, key), rules, buffer),
            Request::Write {
                table,
                key: Key::Inline(key),
                value,
                rules,
                expires,
                once,
            } => {
                let (value, remote) = match value {
                    Value::Inline(value) => (value, None),
                    Value::Remote(from) => (&[][..], Some(from)),
                };
                let Admitted::Yes(once) = self.admit(link, tag, once) else {
                    return Fate::Done;
                };
                let write = Write {
                    table,
                    key,
                    value,
                    expires,
                    rules,
                    once,
                };
                return match remote {
                    None => self.write(link, tag, &write),
                    Some(from) => self.write_remote(link, tag, &write, from),
                };
            }
            Request::Remove {
                table,
                key: Key::Inline(key),
                ref rules,
                once,
            } => return self.remove(link, tag, (table, key), rules, once),
            Request::Increment {
                table,
                key: Key::Inline(key),
                by,
                ref rules,
                once,
            } => return self.increment(link, tag, (table, key), by, rules, once),
            // Sent to `fetch_key` before.
            Request::Read { .. }
            | Request::Write { .. }
            | Request::Remove { .. }
            | Request::Increment { .. } => {}
            Request::Ping => {
                self.counters.others += 1;
                self.reply(link, tag, &Reply::Empty);
            }
            Request::Probe { rounds } => self.probe(link, tag, rounds),
            Request::EndLease => self.end_lease(link, tag),
            _ => return self.execute_rare(link, tag, request, place),
        }
        Fate::Done
    }

    #[inline]
    fn read(
        &mut self,
        link: &mut Link,
        tag: u16,
        (table, key): (u32, &[u8]),
        rules: &RejectRules,
        to: Option<RemoteBuffer>,
    ) {
        self.counters.gets += 1;
        let found = match self.store.read(table, key, rules, self.clock.now) {
            Ok(Some(found)) => found,
            Ok(None) => {
                self.counters.misses += 1;
                self.counts.of(table).reads += 1;
                return self.failed(link, tag, Status::NotFound, 0);
            }
            Err(e) => return self.store_error(link, tag, None, e),
        };
        self.counts.of(table).reads += 1;
        if found.value_len > EAGER_VALUE_BYTES {
            self.read_large(link, tag, &found, to);
            return;
        }
        let region = self.store.region().mr();
        let held = Held {
            segment: self.segment_of(&found),
            ..Held::NOTHING
        };
        let at = |r: core::ops::Range<usize>| region.sge(r.start as u64, r.len() as u32);
        let with_key = found.key_len <= EAGER_KEY_BYTES;
        let imm = entry_reply(tag, with_key);
        let span = found.span();
        let sent = if with_key {
            link.reply(imm, Payload::Sges(&[at(span)]), held)
        } else {
            let rest = found.value_offset..span.end;
            link.reply(imm, Payload::Sges(&[at(found.header()), at(rest)]), held)
        };
        if sent && held.segment != NONE {
            self.store.pin(held.segment);
        }
    }

    #[inline]
    fn segment_of(&self, found: &Found) -> u32 {
        self.store.segment_of(found.entry_offset).unwrap_or(NONE)
    }

    #[cold]
    fn read_large(&mut self, link: &mut Link, tag: u16, found: &Found, to: Option<RemoteBuffer>) {
        let Some(to) = to.filter(|to| to.len as usize >= found.value_len) else {
            return self.failed(link, tag, Status::TooLargeForEager, found.value_len as u64);
        };
        let held = Held {
            segment: self.segment_of(found),
            ..Held::NOTHING
        };
        let region = self.store.region().mr();
        let value = region.sge(found.value_offset as u64, found.value_len as u32);
        let op = SendOp::Write(RemoteAddr {
            addr: to.addr,
            rkey: to.rkey,
        });
        if link.send(op, Payload::Sges(&[value]), held) {
            if held.segment != NONE {
                self.store.pin(held.segment);
            }
            // Ordered behind the WRITE: when the client sees it, the value is there.
            let reply = Reply::Written {
                version: found.version,
                value_len: found.value_len as u32,
            };
            self.reply(link, tag, &reply);
        }
    }

    /// Looks a request's id up: executes it, or answers it with what it came to when it was executed.
    #[inline]
    fn admit(&mut self, link: &mut Link, tag: u16, once: Option<Once>) -> Admitted {
        let Some(once) = once else {
            return Admitted::Yes(None);
        };
        let id = once.id(link.client.id);
        if link.client.lease_until == 0 {
            self.fail(link, tag, Status::NoLease, 0);
            return Admitted::Answered;
        }
        match self.store.check(id, once.first_incomplete, self.clock.now) {
            Ok(Progress::New) => return Admitted::Yes(Some(id)),
            Ok(Progress::Done(outcome)) => {
                self.counters.duplicates += 1;
                self.reply_outcome(link, tag, outcome);
            }
            // Its value is still on its way.
            Ok(Progress::InProgress) => self.fail(link, tag, Status::Busy, 0),
            Ok(Progress::Stale) => self.fail(link, tag, Status::Stale, 0),
            Err(e) => self.store_error(link, tag, None, e),
        }
        Admitted::Answered
    }

    fn reply_outcome(&mut self, link: &mut Link, tag: u16, outcome: Outcome) {
        match failure_of(outcome) {
            Some((status, detail)) => self.failed(link, tag, status, detail),
            None => match outcome {
                Outcome::Incremented { value, version } => {
                    let bits = value.bits();
                    self.reply(link, tag, &Reply::Incremented { version, bits });
                }
                Outcome::Written { version } | Outcome::Removed { version } => {
                    self.reply(link, tag, &Reply::Version(version));
                }
                _ => self.fail(link, tag, Status::Internal, 0),
            },
        }
    }

    #[inline]
    fn write(&mut self, link: &mut Link, tag: u16, write: &Write<'_>) -> Fate {
        match self.store.write(write, self.clock.now) {
            Ok(version) => {
                self.counters.puts += 1;
                self.counts.of(write.table).writes += 1;
                self.reply(link, tag, &Reply::Version(version));
                Fate::Done
            }
            Err(e) => self.refused(link, tag, write.once, e),
        }
    }

    /// What becomes of a request that the store refused: while room is being made it waits, for a while.
    #[cold]
    fn refused(
        &mut self,
        link: &mut Link,
        tag: u16,
        once: Option<RequestId>,
        e: StoreError,
    ) -> Fate {
        if e == StoreError::Busy {
            let since = *link.busy_since.get_or_insert(self.clock.now);
            if self.clock.now.saturating_sub(since) < limits::BUSY_PATIENCE_NS {
                // Segments may only be waiting for sends that nobody asked about.
                self.want_flush = true;
                return Fate::Defer;
            }
        }
        self.store_error(link, tag, once, e);
        Fate::Done
    }

    fn write_remote(
        &mut self,
        link: &mut Link,
        tag: u16,
        write: &Write<'_>,
        from: RemoteBuffer,
    ) -> Fate {
        let reserved = self.store.reserve(write, from.len as usize, self.clock.now);
        let reservation = match reserved {
            Ok(r) => r,
            Err(e) => return self.refused(link, tag, write.once, e),
        };
        let region = self.store.region().mr();
        let to = region.sge(reservation.value().start as u64, from.len);
        let stage = Stage::Value {
            tag,
            once: write.once,
            reservation,
        };
        self.read_remote(link, from, to, stage);
        Fate::Done
    }

    /// The value of a large write has arrived in the log.
    pub(super) fn commit(
        &mut self,
        link: &mut Link,
        tag: u16,
        once: Option<RequestId>,
        reservation: crate::store::Reservation,
    ) {
        let table = reservation.table();
        match self.store.commit(reservation, self.clock.now) {
            Ok(version) => {
                self.counters.puts += 1;
                self.counts.of(table).writes += 1;
                self.reply(link, tag, &Reply::Version(version));
            }
            Err(e) => self.store_error(link, tag, once, e),
        }
    }

    fn remove(
        &mut self,
        link: &mut Link,
        tag: u16,
        (table, key): (u32, &[u8]),
        rules: &RejectRules,
        once: Option<Once>,
    ) -> Fate {
        let Admitted::Yes(once) = self.admit(link, tag, once) else {
            return Fate::Done;
        };
        match self.store.remove(table, key, rules, once, self.clock.now) {
            Ok(Some(version)) => {
                self.counters.dels += 1;
                self.counts.of(table).removes += 1;
                self.reply(link, tag, &Reply::Version(version));
            }
            Ok(None) => {
                self.counters.misses += 1;
                self.failed(link, tag, Status::NotFound, 0);
            }
            Err(e) => return self.refused(link, tag, once, e),
        }
        Fate::Done
    }

    fn increment(
        &mut self,
        link: &mut Link,
        tag: u16,
        (table, key): (u32, &[u8]),
        by: Increment,
        rules: &RejectRules,
        once: Option<Once>,
    ) -> Fate {
        let Admitted::Yes(once) = self.admit(link, tag, once) else {
            return Fate::Done;
        };
        let now = self.clock.now;
        match self.store.increment(table, key, by, rules, once, now) {
            Ok(done) => {
                self.counters.increments += 1;
                self.counts.of(table).increments += 1;
                let reply = Reply::Incremented {
                    version: done.version,
                    bits: done.value.bits(),
                };
                self.reply(link, tag, &reply);
            }
            Err(e) => return self.refused(link, tag, once, e),
        }
        Fate::Done
    }

    fn end_lease(&mut self, link: &mut Link, tag: u16) {
        self.counters.others += 1;
        match self.store.end_lease(link.client.id, self.clock.now) {
            Ok(()) => {
                link.client.lease_until = 0;
                self.reply(link, tag, &Reply::Empty);
            }
            Err(e) => self.store_error(link, tag, None, e),
        }
    }

    /// Bounces the window's probe line with a client that shares the machine: the floor under all latencies here.
    fn probe(&mut self, link: &mut Link, tag: u16, rounds: u32) {
        self.counters.others += 1;
        self.reply(link, tag, &Reply::Probe { rounds });
        link.ring();
        if !link.broken {
            let platform = self.context.platform();
            respond(
                Lines::one(platform.window()),
                rounds,
                limits::PROBE_SILENCE_NS,
                || platform.now_ns(),
            );
            self.clock.refresh(&self.context);
        }
    }

    /// Answers what the store refused. The refusal of a request with an id is kept, as a result: a copy of the request that comes late must
    /// not be executed after its client was told that it failed.
    #[cold]
    pub(super) fn store_error(
        &mut self,
        link: &mut Link,
        tag: u16,
        once: Option<RequestId>,
        e: StoreError,
    ) {
        let (status, detail) = self.refusal(once, &e);
        self.failed(link, tag, status, detail);
    }

    /// What to say of an error of the store; books it, and keeps it as the result of the request `once`.
    pub(super) fn refusal(&mut self, once: Option<RequestId>, e: &StoreError) -> (Status, u64) {
        let (status, detail) = (Status::from(*e), error_detail(e));
        if matches!(e, StoreError::Full { .. } | StoreError::Busy) {
            // Segments may only be waiting for sends that nobody asked about.
            self.want_flush = true;
        }
        if status.rejected().is_some() {
            self.counters.rejects += 1;
            // The store has kept it itself.
            return (status, detail);
        }
        self.counters.errors += 1;
        if let Some(id) = once
            && is_final(status)
        {
            // Without a lease there is nothing to be kept.
            let _ = self
                .store
                .refuse(id, code_of(status, detail), self.clock.now);
        }
        (status, detail)
    }

    /// Answers a request that cannot be served.
    #[cold]
    pub(super) fn fail(&mut self, link: &mut Link, tag: u16, status: Status, detail: u64) {
        self.counters.errors += 1;
        self.failed(link, tag, status, detail);
    }

    /// Answers a request that came to nothing.
    #[inline]
    pub(super) fn failed(&mut self, link: &mut Link, tag: u16, status: Status, detail: u64) {
        self.reply(link, tag, &Reply::Error { status, detail });
    }

    #[inline]
    pub(super) fn reply(&mut self, link: &mut Link, tag: u16, reply: &Reply<'_>) {
        let mut out = [0; INLINE_REPLY];
        match reply.emit(tag, &mut out) {
            Ok((imm, n)) => drop(link.reply(imm, Payload::Inline(&out[..n]), Held::NOTHING)),
            Err(_) => link.broken = true,
        }
    }
}

/// Whether a request that failed so must not be executed when it comes again.
const fn is_final(status: Status) -> bool {
    !matches!(
        status,
        Status::Busy | Status::NoLease | Status::TooManyResults | Status::Stale
    )
}

/// A failure as the number that the store keeps.
const fn code_of(status: Status, detail: u64) -> u64 {
    status as u64 | detail << 8
}

/// The failure that a result is, if it is one.
pub(super) fn failure_of(outcome: Outcome) -> Option<(Status, u64)> {
    match outcome {
        Outcome::Absent => Some((Status::NotFound, 0)),
        Outcome::Rejected { reason, version } => Some((reason.into(), version)),
        Outcome::Refused { code } => {
            let status = Status::from_raw(code as u8).unwrap_or(Status::Internal);
            Some((status, code >> 8))
        }
        Outcome::Written { .. } | Outcome::Removed { .. } | Outcome::Incremented { .. } => None,
    }
}
