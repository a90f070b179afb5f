//! What each operation does.

use alloc::sync::Arc;

use hyv_verbs::probe::{Lines, respond};
use hyv_verbs::{Payload, RemoteAddr, SendOp};

use super::connection::{Held, Link, NONE};
use super::region::scratch;
use super::transfers::Stage;
use super::{Server, buffer_offset, limits};
use crate::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_KEY_BYTES};
use crate::proto::{
    Key, MAX_REPLY_BYTES, PageBuilder, PutValue, RemoteBuffer, Reply, Request, StatsReply,
    StatsView, Status, entry_reply, error_detail, request_tag,
};
use crate::store::{Cursor, DEFAULT_TABLE, Found, RejectRules, StoreError, Write};

/// Nothing that this server writes expires, and nobody reads its region: the engine needs no clock.
pub(super) const NOW: u64 = 0;

/// Longest reply that goes inline: a STATS reply.
const INLINE_REPLY: usize = 192;

impl Server {
    /// Runs a request that lies in receive buffer `buffer`. False if it has to wait for a scratch buffer (it is
    /// then the first of the deferred).
    #[inline]
    pub(super) fn request(&mut self, link: &mut Link, buffer: u32, bytes: &[u8]) -> bool {
        let (tag, request) = match Request::parse(bytes) {
            Ok(r) => r,
            Err(e) => {
                if let Some(tag) = request_tag(bytes) {
                    self.fail(link, tag, e.status(), 0);
                } else {
                    // Nobody could tell which request an answer belongs to.
                    link.broken = true;
                }
                link.release(buffer);
                return true;
            }
        };
        let remote_key = match request {
            Request::Get {
                key: Key::Remote(k),
                ..
            }
            | Request::Put {
                key: Key::Remote(k),
                ..
            }
            | Request::Del {
                key: Key::Remote(k),
            } => Some(k),
            _ => None,
        };
        if let Some(key) = remote_key {
            return self.fetch_key(link, buffer, bytes.len(), key);
        }
        match request {
            Request::Get {
                key: Key::Inline(key),
                buffer: to,
            } => self.get(link, tag, key, to),
            Request::Put {
                key: Key::Inline(key),
                value: PutValue::Inline(value),
            } => {
                self.put(link, tag, key, value);
            }
            Request::Put {
                key: Key::Inline(key),
                value: PutValue::Remote(from),
            } => {
                self.put_remote(link, tag, key, from);
            }
            Request::Del {
                key: Key::Inline(key),
            } => self.del(link, tag, key),
            Request::List {
                cursor,
                limit,
                buffer: to,
            } => {
                return self.list(link, tag, (buffer, bytes.len()), cursor, limit, to);
            }
            Request::Stats => self.stats(link, tag),
            Request::Ping => {
                self.counters.others += 1;
                self.reply(link, tag, &Reply::Empty);
            }
            Request::Probe { rounds } => self.probe(link, tag, rounds),
            // Sent to `fetch_key` above.
            Request::Get { .. } | Request::Put { .. } | Request::Del { .. } => {}
        }
        link.release(buffer);
        true
    }

    /// Runs a request again whose key has arrived in a scratch buffer.
    pub(super) fn request_with_key(&mut self, link: &mut Link, bytes: &[u8], key: &[u8]) {
        let Ok((tag, request)) = Request::parse(bytes) else {
            return;
        };
        match request {
            Request::Get { buffer, .. } => self.get(link, tag, key, buffer),
            Request::Put {
                value: PutValue::Inline(value),
                ..
            } => self.put(link, tag, key, value),
            Request::Put {
                value: PutValue::Remote(from),
                ..
            } => self.put_remote(link, tag, key, from),
            Request::Del { .. } => self.del(link, tag, key),
            _ => {}
        }
    }

    #[inline]
    fn get(&mut self, link: &mut Link, tag: u16, key: &[u8], to: Option<RemoteBuffer>) {
        self.counters.gets += 1;
        let Some(found) = self.store.get(DEFAULT_TABLE, key, NOW) else {
            self.counters.misses += 1;
            self.reply(
                link,
                tag,
                &Reply::Error {
                    status: Status::NotFound,
                    detail: 0,
                },
            );
            return;
        };
        if found.value_len > EAGER_VALUE_BYTES {
            self.get_large(link, tag, &found, to);
            return;
        }
        let region = self.store.region().mr();
        let held = Held {
            segment: self.pin(&found),
            ..Held::NOTHING
        };
        let at = |r: core::ops::Range<usize>| region.sge(r.start as u64, r.len() as u32);
        let with_key = found.key_len <= EAGER_KEY_BYTES;
        let op = SendOp::SendImm(entry_reply(tag, with_key));
        let sent = if with_key {
            link.send(op, Payload::Sges(&[at(found.span())]), held)
        } else {
            link.send(
                op,
                Payload::Sges(&[at(found.header()), at(found.value())]),
                held,
            )
        };
        match sent {
            Ok(()) => {
                if held.segment != NONE {
                    self.store.pin(held.segment);
                }
            }
            Err(_) => link.broken = true,
        }
    }

    #[inline]
    fn pin(&self, found: &Found) -> u32 {
        self.store.segment_of(found.entry_offset).unwrap_or(NONE)
    }

    #[cold]
    fn get_large(&mut self, link: &mut Link, tag: u16, found: &Found, to: Option<RemoteBuffer>) {
        let Some(to) = to.filter(|to| to.len as usize >= found.value_len) else {
            let detail = found.value_len as u64;
            self.reply(
                link,
                tag,
                &Reply::Error {
                    status: Status::TooLargeForEager,
                    detail,
                },
            );
            return;
        };
        let held = Held {
            segment: self.pin(found),
            ..Held::NOTHING
        };
        let value = self
            .store
            .region()
            .mr()
            .sge(found.value_offset as u64, found.value_len as u32);
        let op = SendOp::Write(RemoteAddr {
            addr: to.addr,
            rkey: to.rkey,
        });
        match link.send(op, Payload::Sges(&[value]), held) {
            Ok(()) => {
                if held.segment != NONE {
                    self.store.pin(held.segment);
                }
                // Ordered behind the WRITE: when the client sees it, the value is there.
                self.reply(
                    link,
                    tag,
                    &Reply::Written {
                        version: found.version,
                        value_len: found.value_len as u32,
                    },
                );
            }
            Err(_) => link.broken = true,
        }
    }

    #[inline]
    fn put(&mut self, link: &mut Link, tag: u16, key: &[u8], value: &[u8]) {
        match self.store.put(DEFAULT_TABLE, key, value, NOW) {
            Ok(version) => {
                self.counters.puts += 1;
                self.reply(link, tag, &Reply::Version(version));
            }
            Err(e) => self.store_error(link, tag, e),
        }
    }

    fn put_remote(&mut self, link: &mut Link, tag: u16, key: &[u8], from: RemoteBuffer) {
        let reservation =
            match self
                .store
                .reserve(&Write::new(DEFAULT_TABLE, key, &[]), from.len as usize, NOW)
            {
                Ok(r) => r,
                Err(e) => return self.store_error(link, tag, e),
            };
        let to = self
            .store
            .region()
            .mr()
            .sge(reservation.value().start as u64, from.len);
        self.read(
            link,
            RemoteAddr {
                addr: from.addr,
                rkey: from.rkey,
            },
            to,
            Stage::Value { tag, reservation },
        );
    }

    /// The value of a large PUT has arrived in the log.
    pub(super) fn commit(
        &mut self,
        link: &mut Link,
        tag: u16,
        reservation: crate::store::Reservation,
    ) {
        match self.store.commit(reservation, NOW) {
            Ok(version) => {
                self.counters.puts += 1;
                self.reply(link, tag, &Reply::Version(version));
            }
            Err(e) => self.store_error(link, tag, e),
        }
    }

    fn del(&mut self, link: &mut Link, tag: u16, key: &[u8]) {
        match self
            .store
            .remove(DEFAULT_TABLE, key, &RejectRules::NONE, None, NOW)
        {
            Ok(Some(version)) => {
                self.counters.dels += 1;
                self.reply(link, tag, &Reply::Version(version));
            }
            Ok(None) => {
                self.counters.misses += 1;
                self.reply(
                    link,
                    tag,
                    &Reply::Error {
                        status: Status::NotFound,
                        detail: 0,
                    },
                );
            }
            Err(e) => self.store_error(link, tag, e),
        }
    }

    /// A page of keys: in the receive buffer of its own request, or by a scratch buffer into the client's memory.
    fn list(
        &mut self,
        link: &mut Link,
        tag: u16,
        (buffer, len): (u32, usize),
        cursor: u64,
        limit: u16,
        to: Option<RemoteBuffer>,
    ) -> bool {
        let scratch_buffer = match to {
            None => None,
            Some(_) => match self.free_scratch.pop() {
                None => {
                    link.deferred.push_front((buffer, len as u32));
                    self.any_deferred = true;
                    return false;
                }
                some => some,
            },
        };
        self.counters.others += 1;
        let (own, pages) = (Arc::clone(link.buffers()), Arc::clone(&self.scratch));
        let page = match (scratch_buffer, to) {
            (Some(s), Some(to)) => {
                let room = (to.len as usize).min(limits::SCRATCH_BYTES);
                scratch(&pages, s as usize * limits::SCRATCH_BYTES, room)
            }
            // Its request has been parsed, and the buffer is ours until it is posted again.
            _ => scratch(&own, buffer_offset(buffer), MAX_REPLY_BYTES),
        };
        let built = build_page(&self.store, page, cursor, limit);
        match (built, scratch_buffer, to) {
            (Err(needed), s, _) => {
                self.free_scratch.extend(s);
                self.reply(
                    link,
                    tag,
                    &Reply::Error {
                        status: Status::TooLargeForEager,
                        detail: needed,
                    },
                );
                link.release(buffer);
            }
            (Ok(n), Some(s), Some(to)) => {
                let from = self
                    .scratch
                    .sge(u64::from(s) * limits::SCRATCH_BYTES as u64, n as u32);
                let held = Held {
                    scratch: s,
                    ..Held::NOTHING
                };
                let op = SendOp::Write(RemoteAddr {
                    addr: to.addr,
                    rkey: to.rkey,
                });
                match link.send(op, Payload::Sges(&[from]), held) {
                    Ok(()) => self.reply(link, tag, &Reply::PageWritten { len: n as u32 }),
                    Err(_) => {
                        self.free_scratch.push(s);
                        link.broken = true;
                    }
                }
                link.release(buffer);
            }
            (Ok(n), ..) => {
                let imm = crate::proto::immediate(tag, Status::Ok, crate::proto::ReplyKind::Page);
                let held = Held {
                    buffer,
                    ..Held::NOTHING
                };
                if link
                    .send(
                        SendOp::SendImm(imm),
                        Payload::Sges(&[link.sge(buffer, n)]),
                        held,
                    )
                    .is_err()
                {
                    link.broken = true;
                }
            }
        }
        true
    }

    fn stats(&mut self, link: &mut Link, tag: u16) {
        self.counters.others += 1;
        let c = self.counters;
        let mut stats = StatsReply {
            gets: c.gets,
            misses: c.misses,
            puts: c.puts,
            dels: c.dels,
            errors: c.errors,
            connections: self.connected as u64,
            ..StatsReply::default()
        };
        stats.set_store(&self.store.stats());
        self.reply(link, tag, &Reply::Stats(StatsView::new(&stats.to_bytes())));
    }

    /// Bounces the window's probe line with a client that shares the machine: the floor under all latencies here.
    fn probe(&mut self, link: &mut Link, tag: u16, rounds: u32) {
        self.counters.others += 1;
        self.reply(link, tag, &Reply::Probe { rounds });
        if !link.broken {
            let platform = self.context.platform();
            respond(
                Lines::one(platform.window()),
                rounds,
                limits::PROBE_SILENCE_NS,
                || platform.now_ns(),
            );
        }
    }

    fn store_error(&mut self, link: &mut Link, tag: u16, e: StoreError) {
        if matches!(e, StoreError::Full { .. } | StoreError::Busy) {
            // Segments may only be waiting for sends that nobody asked about.
            self.want_flush = true;
        }
        let detail = error_detail(&e);
        self.fail(link, tag, Status::from(e), detail);
    }

    #[cold]
    fn fail(&mut self, link: &mut Link, tag: u16, status: Status, detail: u64) {
        self.counters.errors += 1;
        self.reply(link, tag, &Reply::Error { status, detail });
    }

    #[inline]
    fn reply(&mut self, link: &mut Link, tag: u16, reply: &Reply<'_>) {
        let mut out = [0; INLINE_REPLY];
        match reply.emit(tag, &mut out) {
            Ok((imm, n)) => {
                if link
                    .send(
                        SendOp::SendImm(imm),
                        Payload::Inline(&out[..n]),
                        Held::NOTHING,
                    )
                    .is_err()
                {
                    link.broken = true;
                }
            }
            Err(_) => link.broken = true,
        }
    }
}

/// Fills a page; gives its length, or how large the buffer must be for the next key.
fn build_page(
    store: &crate::store::Store<super::LogRegion>,
    out: &mut [u8],
    mut cursor: u64,
    limit: u16,
) -> Result<usize, u64> {
    let needed = |key: usize| (crate::proto::PAGE_HEADER_BYTES + 2 + key) as u64;
    let mut page = PageBuilder::new(out).map_err(|_| needed(MAX_KEY_BYTES))?;
    let mut too_long = None;
    let mut next;
    let mut budget = limits::SCAN_BUCKETS;
    loop {
        // Few buckets at a time: an empty table must not keep others waiting.
        let step = budget.min(256);
        let mut full = false;
        let from = Cursor::from_raw(cursor);
        let progress = store.enumerate(DEFAULT_TABLE, from, step, NOW, |found| {
            let enough = limit != 0 && page.len() >= usize::from(limit);
            full = enough || !page.push(store.bytes(found.key()));
            if full && page.is_empty() {
                too_long = Some(found.key_len);
            }
            !full
        });
        next = progress.ok().and_then(|p| p.next).map(Cursor::raw);
        budget -= step;
        match next {
            Some(c) if !full && budget > 0 => cursor = c,
            _ => break,
        }
    }
    match too_long {
        Some(key) => Err(needed(key)),
        None => Ok(page.finish(next)),
    }
}
