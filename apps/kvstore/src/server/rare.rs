//! Operations whose answers are put together: pages of objects and tables, statistics; and what is done to tables.

use alloc::vec::Vec;

use hyv_verbs::{Payload, RemoteAddr, SendOp};

use super::connection::{Held, Link};
use super::limits::{PAGE_BYTES, SCAN_BUCKETS, SCAN_STEP};
use super::region::scratch as scratch_slice;
use super::requests::{Fate, Place};
use super::{LogRegion, Server, scratch};
use crate::limits::{MAX_KEY_BYTES, MAX_TABLE_NAME_BYTES};
use crate::proto::{
    PageBuilder, RemoteBuffer, Reply, ReplyKind, Request, StatsReply, Status, TABLE_ENTRY_BYTES,
    TABLES_HEADER_BYTES, TableEntry, TablesBuilder, emit_stats, immediate,
};
use crate::store::{CleanerMode, Cursor, Store, StoreError};

/// A reply to DROP that waits until no one-sided reader can find an object of the table.
#[derive(Debug, Clone, Copy)]
pub(super) struct PendingDrop {
    slot: usize,
    serial: u32,
    tag: u16,
    table: u32,
}

/// Why a page could not be made.
enum PageError {
    /// The buffer is too small: bytes needed.
    Needs(usize),
    Store(StoreError),
}

impl Server {
    #[inline(never)]
    pub(super) fn execute_rare(
        &mut self,
        link: &mut Link,
        tag: u16,
        request: &Request<'_>,
        place: Place,
    ) -> Fate {
        self.counters.others += 1;
        match *request {
            Request::Enumerate {
                table,
                cursor,
                limit,
                values,
                buffer,
            } => {
                let now = self.clock.now;
                return self.answer(link, tag, ReplyKind::Page, buffer, |server, out| {
                    server.counters.pages += 1;
                    build_page(&server.store, (table, values), out, cursor, limit, now)
                });
            }
            Request::Tables { after, buffer } => {
                return self.answer(link, tag, ReplyKind::Tables, buffer, |server, out| {
                    build_tables(server, out, after)
                });
            }
            Request::Stats => {
                return self.answer(link, tag, ReplyKind::Stats, None, |server, out| {
                    emit_stats(&server.stats(), &server.times, out)
                        .map_err(|_| PageError::Needs(crate::proto::MAX_REPLY_BYTES))
                });
            }
            Request::Multi { .. } => return self.begin_multi(link, tag, request, place),
            Request::CreateTable { name } => match self.store.create_table(name, self.clock.now) {
                Ok(id) => self.reply(link, tag, &Reply::Table { id, created: true }),
                Err(StoreError::TableExists { table: id }) => {
                    self.reply(link, tag, &Reply::Table { id, created: false });
                }
                Err(e) => self.store_error(link, tag, None, e),
            },
            Request::FindTable { name } => match self.store.table_id(name) {
                Some(id) => self.reply(link, tag, &Reply::Table { id, created: false }),
                None => self.failed(link, tag, Status::NotFound, 0),
            },
            Request::DropTable { table } => self.drop_table(link, tag, table),
            Request::Cleaner { mode } => {
                self.store.set_cleaner_mode(mode);
                self.cleaner_set_by = (mode != CleanerMode::Auto).then_some(link.serial);
                self.reply(link, tag, &Reply::Empty);
            }
            // Seen to by `execute`.
            _ => {}
        }
        Fate::Done
    }

    fn drop_table(&mut self, link: &mut Link, tag: u16, table: u32) {
        match self.store.drop_table(table, self.clock.now) {
            Ok(()) => self.counts.forget(table),
            // Asked again while its objects are taken out.
            Err(_) if self.store.is_dropping(table) => {}
            Err(e) => return self.store_error(link, tag, None, e),
        }
        if self.store.is_dropping(table) {
            self.drops.push(PendingDrop {
                slot: link.slot(),
                serial: link.serial,
                tag,
                table,
            });
        } else {
            self.reply(link, tag, &Reply::Empty);
        }
    }

    /// Answers drops whose tables are empty by now.
    #[cold]
    pub(super) fn finish_drops(&mut self) {
        let mut at = 0;
        while let Some(&drop) = self.drops.get(at) {
            if self.store.is_dropping(drop.table) {
                at += 1;
                continue;
            }
            self.drops.swap_remove(at);
            let conn = self.conns.get_mut(drop.slot).and_then(Option::take);
            if let Some(mut conn) = conn {
                if conn.link.serial == drop.serial && !conn.link.broken {
                    self.reply(&mut conn.link, drop.tag, &Reply::Empty);
                }
                self.any_broken |= conn.link.broken;
                self.conns[drop.slot] = Some(conn);
            }
        }
    }

    /// Answers with something that is put together in a scratch buffer: in the reply, or in the client's buffer.
    fn answer(
        &mut self,
        link: &mut Link,
        tag: u16,
        kind: ReplyKind,
        to: Option<RemoteBuffer>,
        build: impl FnOnce(&mut Self, &mut [u8]) -> Result<usize, PageError>,
    ) -> Fate {
        let taken = match to {
            Some(_) => self.scratch.take_large(link),
            None => self.scratch.take_small(),
        };
        let Some(buffer) = taken else {
            self.counters.others -= 1;
            return Fate::Defer;
        };
        let region = self.scratch.region();
        let room = to.map_or(usize::MAX, |to| to.len as usize);
        let room = room.min(scratch::size(buffer));
        let out = scratch_slice(&region, scratch::offset(buffer), room);
        match build(self, out) {
            Ok(len) => self.send_built(link, tag, kind, to, (buffer, len)),
            Err(error) => {
                self.scratch.give_back(link, buffer);
                match error {
                    PageError::Needs(bytes) => {
                        self.fail(link, tag, Status::TooLargeForEager, bytes as u64);
                    }
                    PageError::Store(e) => self.store_error(link, tag, None, e),
                }
            }
        }
        Fate::Done
    }

    /// Sends what was put together in a scratch buffer.
    pub(super) fn send_built(
        &mut self,
        link: &mut Link,
        tag: u16,
        kind: ReplyKind,
        to: Option<RemoteBuffer>,
        (buffer, len): (u32, usize),
    ) {
        let Some(to) = to else {
            let built = [self.scratch.sge(buffer, len)];
            let imm = immediate(tag, Status::Ok, kind);
            if !link.reply(imm, Payload::Sges(&built), Held::scratch(buffer)) {
                self.scratch.give_back(link, buffer);
            }
            return;
        };
        self.send_packed(link, tag, to, (buffer, len), len);
    }

    /// WRITEs what was put together in a scratch buffer, and says how much of it there is in all.
    pub(super) fn send_packed(
        &mut self,
        link: &mut Link,
        tag: u16,
        to: RemoteBuffer,
        (buffer, len): (u32, usize),
        total: usize,
    ) {
        let built = [self.scratch.sge(buffer, len)];
        let op = SendOp::Write(RemoteAddr {
            addr: to.addr,
            rkey: to.rkey,
        });
        if link.send(op, Payload::Sges(&built), Held::scratch(buffer)) {
            let len = total as u32;
            self.reply(link, tag, &Reply::PackedWritten { len });
        } else {
            self.scratch.give_back(link, buffer);
        }
    }

    /// What there is to say about server and store.
    #[must_use]
    pub fn stats(&self) -> StatsReply {
        let c = self.counters;
        let mut stats = StatsReply {
            gets: c.gets,
            misses: c.misses,
            puts: c.puts,
            dels: c.dels,
            increments: c.increments,
            rejects: c.rejects,
            duplicates: c.duplicates,
            multis: c.multis,
            pages: c.pages,
            errors: c.errors,
            connections: self.connected as u64,
            accepted: c.connections,
            expelled: c.expelled,
            connection_bytes: self.connection_bytes(),
            ..StatsReply::default()
        };
        stats.set_store(&self.store.stats());
        stats
    }
}

/// Fills a page of objects; gives its length.
fn build_page(
    store: &Store<LogRegion>,
    (table, values): (u32, bool),
    out: &mut [u8],
    cursor: u64,
    limit: u16,
    now: u64,
) -> Result<usize, PageError> {
    let short = out.len().min(PAGE_BYTES);
    match fill_page(
        store,
        (table, values),
        &mut out[..short],
        cursor,
        limit,
        now,
    ) {
        // The first object is a long one.
        Err(PageError::Needs(bytes)) if bytes <= out.len() => fill_page(
            store,
            (table, values),
            &mut out[..bytes],
            cursor,
            limit,
            now,
        ),
        other => other,
    }
}

fn fill_page(
    store: &Store<LogRegion>,
    (table, values): (u32, bool),
    out: &mut [u8],
    mut cursor: u64,
    limit: u16,
    now: u64,
) -> Result<usize, PageError> {
    let least = crate::proto::PAGE_HEADER_BYTES + 2 + MAX_KEY_BYTES;
    let mut page = PageBuilder::new(out, values).map_err(|_| PageError::Needs(least))?;
    let mut too_long = None;
    let mut buckets = SCAN_BUCKETS;
    let next = loop {
        let mut full = false;
        let from = Cursor::from_raw(cursor);
        let progress = store.enumerate(table, from, SCAN_STEP, now, |found| {
            let (key, value) = (store.bytes(found.key()), store.bytes(found.value()));
            let enough = limit != 0 && page.len() >= usize::from(limit);
            full = enough || !page.push(key, found.version, value);
            if full && page.is_empty() {
                too_long = Some(page.needed(found.key_len, found.value_len));
            }
            !full
        });
        let next = progress.map_err(PageError::Store)?.next.map(Cursor::raw);
        buckets = buckets.saturating_sub(SCAN_STEP);
        match next {
            Some(c) if !full && buckets > 0 => cursor = c,
            next => break next,
        }
    };
    match too_long {
        Some(bytes) => Err(PageError::Needs(bytes)),
        None => Ok(page.finish(next)),
    }
}

/// Fills a page of tables; gives its length.
fn build_tables(server: &Server, out: &mut [u8], after: Option<u32>) -> Result<usize, PageError> {
    let needs = PageError::Needs(TABLES_HEADER_BYTES + TABLE_ENTRY_BYTES + MAX_TABLE_NAME_BYTES);
    let Ok(mut page) = TablesBuilder::new(out) else {
        return Err(needs);
    };
    let mut tables: Vec<_> = server
        .store
        .tables()
        .filter(|table| after.is_none_or(|after| table.id > after))
        .collect();
    tables.sort_unstable_by_key(|table| table.id);
    for (index, table) in tables.iter().enumerate() {
        let entry = TableEntry {
            id: table.id,
            objects: table.objects,
            live_bytes: table.live_bytes,
            operations: server.counts.get(table.id),
            name: table.name,
        };
        if !page.push(&entry) {
            if index == 0 {
                return Err(needs);
            }
            return Ok(page.finish(true));
        }
    }
    Ok(page.finish(false))
}
