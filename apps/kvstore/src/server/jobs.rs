//! Multi-operations: executed in slices between other requests, however many elements they have.
//!
//! Elements lie in the request, or are READ from the client's memory in pieces; results go into the reply, or are WRITTEN to the
//! client's memory in pieces. So a job holds one or two scratch buffers, whatever its size. At any time a job either has one
//! READ or WRITE under way, or stands in the queue of those that are ready.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use hyv_verbs::{MemoryRegion, RemoteAddr, SendOp};

use super::connection::{Connection, Link, NONE, kind};
use super::limits::{BUSY_PATIENCE_NS, SLICE_BYTES, SLICE_ELEMENTS};
use super::region::{received, scratch as scratch_slice};
use super::requests::{Fate, Place, failure_of};
use super::{Server, buffer_offset, scratch};
use crate::proto::{
    Element, ElementResult, Elements, MultiOp, Once, ProtoError, RemoteBuffer, ReplyKind, Request,
    ResultWriter, Status,
};
use crate::store::{Outcome, Progress, RequestId, Write};

/// Jobs, by index, and the order of those that are ready.
#[derive(Default)]
pub(super) struct Jobs {
    list: Vec<Option<Job>>,
    ready: VecDeque<u32>,
}

impl Jobs {
    /// Whether some job can go on.
    #[inline]
    pub fn any_ready(&self) -> bool {
        !self.ready.is_empty()
    }
}

/// A multi-operation under way.
#[derive(Debug)]
struct Job {
    slot: usize,
    tag: u16,
    op: MultiOp,
    /// Elements left.
    left: u16,
    /// Number of the next element.
    once: Option<Once>,
    source: Source,
    out: Out,
    /// Since when its next element waits for room.
    busy_since: Option<u64>,
    /// Its elements cannot be followed any more: what all that are left get.
    failed: Option<(Status, u64)>,
}

/// Where the elements are.
#[derive(Debug)]
enum Source {
    /// In the request.
    Received { place: Place, at: Range<usize> },
    /// In the client's memory.
    Remote {
        from: RemoteBuffer,
        /// Scratch buffer that pieces come into.
        scratch: u32,
        /// Bytes of `from` before the piece that is there.
        before: usize,
        /// What is left of the piece, in the scratch buffer.
        piece: Range<usize>,
    },
}

/// Where the results go.
#[derive(Debug)]
struct Out {
    to: Option<RemoteBuffer>,
    scratch: u32,
    /// Bytes of results in the scratch buffer.
    len: usize,
    /// Bytes of results that were WRITTEN before.
    written: usize,
}

/// How a slice ended.
enum Step {
    /// All elements are done.
    Finished,
    /// Others have their turn.
    Yield,
    /// The next piece of elements is needed.
    Fetch,
    /// The results so far must go out.
    Flush,
}

/// What became of one element.
enum Done {
    Yes,
    /// No room for the result in the scratch buffer.
    Full,
    /// The store is busy.
    Busy,
}

impl Server {
    /// Takes a multi-operation up.
    pub(super) fn begin_multi(
        &mut self,
        link: &mut Link,
        tag: u16,
        request: &Request<'_>,
        place: Place,
    ) -> Fate {
        let Request::Multi {
            op,
            count,
            elements,
            once,
            buffer: to,
        } = *request
        else {
            return Fate::Done;
        };
        if once.is_some() && link.client.lease_until == 0 {
            self.fail(link, tag, Status::NoLease, 0);
            return Fate::Done;
        }
        let least = usize::from(count) * op.result_bytes();
        let room = to.map_or(crate::proto::MAX_REPLY_BYTES, |to| to.len as usize);
        if least > room {
            self.fail(link, tag, Status::TooLargeForEager, least as u64);
            return Fate::Done;
        }
        let out = match to {
            Some(_) => self.scratch.take_large(link),
            None => self.scratch.take_small(),
        };
        let source = match elements {
            Elements::Remote(_) => self.scratch.take_large(link),
            Elements::Inline(_) => Some(NONE),
        };
        let (Some(out), Some(piece)) = (out, source) else {
            self.counters.others -= 1;
            for buffer in [out, source].into_iter().flatten() {
                self.scratch.give_back(link, buffer);
            }
            return Fate::Defer;
        };
        self.counters.multis += 1;
        let (source, fate) = match elements {
            Elements::Inline(bytes) => {
                let len = place.len as usize;
                let at = len - bytes.len()..len;
                (Source::Received { place, at }, Fate::Keep)
            }
            Elements::Remote(from) => {
                let source = Source::Remote {
                    from,
                    scratch: piece,
                    before: 0,
                    piece: 0..0,
                };
                (source, Fate::Done)
            }
        };
        let job = Job {
            slot: link.slot(),
            tag,
            op,
            left: count,
            once,
            source,
            out: Out {
                to,
                scratch: out,
                len: 0,
                written: 0,
            },
            busy_since: None,
            failed: None,
        };
        let index = match self.jobs.list.iter().position(Option::is_none) {
            Some(i) => i,
            None => {
                self.jobs.list.push(None);
                self.jobs.list.len() - 1
            }
        };
        self.jobs.list[index] = Some(job);
        self.jobs.ready.push_back(index as u32);
        fate
    }

    /// Runs a slice of the job whose turn it is.
    #[inline(never)]
    pub(super) fn run_jobs(&mut self) {
        let Some(index) = self.jobs.ready.pop_front() else {
            return;
        };
        let Some(mut job) = self.jobs.list[index as usize].take() else {
            return;
        };
        let Some(mut conn) = self.conns.get_mut(job.slot).and_then(Option::take) else {
            // Its connection's end takes its jobs along.
            return;
        };
        let slot = job.slot;
        if conn.link.broken {
            self.jobs.list[index as usize] = Some(job);
        } else {
            let step = self.slice(&mut conn, &mut job);
            self.after_slice(&mut conn.link, index, job, &step);
        }
        self.any_broken |= conn.link.broken;
        self.conns[slot] = Some(conn);
    }

    fn after_slice(&mut self, link: &mut Link, index: u32, mut job: Job, step: &Step) {
        match step {
            Step::Finished if link.has_room() => return self.finish_job(link, job),
            Step::Finished | Step::Yield => self.jobs.ready.push_back(index),
            Step::Fetch => {
                if let Source::Remote {
                    from,
                    scratch: buffer,
                    before,
                    piece,
                } = &mut job.source
                {
                    // From the first element that is not done on.
                    *before += piece.start;
                    let len = (from.len as usize - *before).min(scratch::size(*buffer));
                    *piece = 0..len;
                    let op = SendOp::Read(RemoteAddr {
                        addr: from.addr.wrapping_add(*before as u64),
                        rkey: from.rkey,
                    });
                    let to = self.scratch.sge(*buffer, len);
                    // A failure breaks the connection, and its end takes the job along.
                    let _ = link.transfer((kind::JOB, index), op, to);
                }
            }
            Step::Flush => {
                if let Some(to) = job.out.to {
                    let op = SendOp::Write(RemoteAddr {
                        addr: to.addr.wrapping_add(job.out.written as u64),
                        rkey: to.rkey,
                    });
                    let from = self.scratch.sge(job.out.scratch, job.out.len);
                    job.out.written += job.out.len;
                    job.out.len = 0;
                    let _ = link.transfer((kind::JOB, index), op, from);
                }
            }
        }
        self.jobs.list[index as usize] = Some(job);
    }

    /// A READ or WRITE of a job has completed.
    pub(super) fn job_transferred(&mut self, index: u32) {
        if self
            .jobs
            .list
            .get(index as usize)
            .is_some_and(Option::is_some)
        {
            self.jobs.ready.push_back(index);
        }
    }

    /// Sends the rest of the results, and the reply.
    fn finish_job(&mut self, link: &mut Link, job: Job) {
        self.drop_source(link, &job.source);
        let Out {
            to,
            scratch,
            len,
            written,
        } = job.out;
        let (kind, tag) = (ReplyKind::Results, job.tag);
        match to {
            None => self.send_built(link, tag, kind, None, (scratch, len)),
            Some(to) => {
                let rest = RemoteBuffer {
                    addr: to.addr.wrapping_add(written as u64),
                    ..to
                };
                self.send_packed(link, tag, rest, (scratch, len), written + len);
            }
        }
    }

    fn drop_source(&mut self, link: &mut Link, source: &Source) {
        match *source {
            Source::Received { place, .. } => self.groups[link.group].release(place.buffer),
            Source::Remote { scratch, .. } => self.scratch.give_back(link, scratch),
        }
    }

    /// Drops what a connection has under way, at its end.
    pub(super) fn drop_jobs(&mut self, link: &mut Link) {
        for index in 0..self.jobs.list.len() {
            if self.jobs.list[index]
                .as_ref()
                .is_some_and(|job| job.slot == link.slot())
                && let Some(job) = self.jobs.list[index].take()
            {
                self.jobs.ready.retain(|ready| *ready != index as u32);
                self.drop_source(link, &job.source);
                self.scratch.give_back(link, job.out.scratch);
            }
        }
    }

    fn slice(&mut self, conn: &mut Connection, job: &mut Job) -> Step {
        let (requests, buffers) = (Arc::clone(&conn.buffers), self.scratch.region());
        let out = scratch_slice(
            &buffers,
            scratch::offset(job.out.scratch),
            scratch::size(job.out.scratch),
        );
        let (mut elements, mut bytes) = (0, 0);
        while job.left > 0 {
            if elements >= SLICE_ELEMENTS || bytes >= SLICE_BYTES {
                return Step::Yield;
            }
            let before = job.out.len;
            let (element, used) = match job.next(&requests, &buffers) {
                Ok(Some(next)) => (Some(next.0), next.1),
                Ok(None) => return Step::Fetch,
                Err(error) => {
                    job.failed = Some((error.status(), 0));
                    (None, 0)
                }
            };
            match self.element(&conn.link, job, element.as_ref(), out) {
                Done::Full => return Step::Flush,
                Done::Busy => {
                    let since = *job.busy_since.get_or_insert(self.clock.now);
                    if self.clock.now.saturating_sub(since) < BUSY_PATIENCE_NS {
                        self.clean();
                        return Step::Yield;
                    }
                    let busy = ElementResult::Failed {
                        status: Status::Busy,
                        detail: 0,
                    };
                    let mut writer = ResultWriter::new(out, job.out.len);
                    if !writer.push(&busy) {
                        return Step::Flush;
                    }
                    job.out.len = writer.len();
                }
                Done::Yes => {}
            }
            job.busy_since = None;
            job.advance(used);
            elements += 1;
            bytes += used + job.out.len - before;
        }
        Step::Finished
    }

    /// Executes an element and writes its result to `out`.
    fn element(
        &mut self,
        link: &Link,
        job: &mut Job,
        element: Option<&Element<'_>>,
        out: &mut [u8],
    ) -> Done {
        let mut writer = ResultWriter::new(out, job.out.len);
        // Room for the longest result but a value, so that nothing is executed whose result cannot be said.
        let size = scratch::size(job.out.scratch);
        if size - job.out.len < MultiOp::Increment.result_bytes() {
            return Done::Full;
        }
        let result = match (element, job.failed) {
            (Some(element), None) => match self.execute_element(link, job, element) {
                Ok(Some(result)) => result,
                Ok(None) => return Done::Busy,
                Err((status, detail)) => ElementResult::Failed { status, detail },
            },
            (_, failed) => {
                let (status, detail) = failed.unwrap_or((Status::Malformed, 0));
                ElementResult::Failed { status, detail }
            }
        };
        let needed = ResultWriter::needed(&result);
        let result = match result {
            // What is left of the client's buffer must do for the elements that follow, too.
            ElementResult::Value { value, .. }
                if needed > size || needed > job.room_for_value(size) =>
            {
                ElementResult::Failed {
                    status: Status::TooLargeForEager,
                    detail: value.len() as u64,
                }
            }
            result => result,
        };
        if !writer.push(&result) {
            return Done::Full;
        }
        job.out.len = writer.len();
        Done::Yes
    }

    /// The element's result; none if the store is busy.
    fn execute_element(
        &mut self,
        link: &Link,
        job: &Job,
        element: &Element<'_>,
    ) -> Result<Option<ElementResult<'_>>, (Status, u64)> {
        let now = self.clock.now;
        let &Element {
            table,
            key,
            ref rules,
            expires,
            value,
            by,
        } = element;
        if job.op == MultiOp::Read {
            self.counters.gets += 1;
            let found = self.store.read(table, key, rules, now);
            if found.is_ok() {
                self.counts.of(table).reads += 1;
            }
            return match found {
                Ok(Some(found)) => Ok(Some(ElementResult::Value {
                    version: found.version,
                    value: self.store.bytes(found.value()),
                })),
                Ok(None) => {
                    self.counters.misses += 1;
                    Err((Status::NotFound, 0))
                }
                Err(e) => Err(self.refusal(None, &e)),
            };
        }
        let once = match job.once {
            None => None,
            Some(once) => match self.known(once, link.client.id)? {
                Known::New(id) => Some(id),
                Known::Executed(outcome) => return result_of(outcome).map(Some),
            },
        };
        let outcome = match job.op {
            MultiOp::Read | MultiOp::Write => {
                let write = Write {
                    table,
                    key,
                    value,
                    expires,
                    rules: *rules,
                    once,
                };
                let written = self.store.write(&write, now);
                self.counters.puts += u64::from(written.is_ok());
                written.map(|version| Outcome::Written { version })
            }
            MultiOp::Remove => {
                let removed = self.store.remove(table, key, rules, once, now);
                self.counters.dels += u64::from(matches!(removed, Ok(Some(_))));
                self.counters.misses += u64::from(matches!(removed, Ok(None)));
                removed.map(|version| match version {
                    Some(version) => Outcome::Removed { version },
                    None => Outcome::Absent,
                })
            }
            MultiOp::Increment => {
                let done = self.store.increment(table, key, by, rules, once, now);
                self.counters.increments += u64::from(done.is_ok());
                done.map(|done| Outcome::Incremented {
                    value: done.value,
                    version: done.version,
                })
            }
        };
        match outcome {
            Ok(outcome) => {
                let counts = self.counts.of(table);
                match outcome {
                    Outcome::Written { .. } => counts.writes += 1,
                    Outcome::Removed { .. } => counts.removes += 1,
                    Outcome::Incremented { .. } => counts.increments += 1,
                    _ => {}
                }
                result_of(outcome).map(Some)
            }
            Err(e) => match self.refusal(once, &e) {
                (Status::Busy, _) => Ok(None),
                refusal => Err(refusal),
            },
        }
    }

    /// Looks an element's id up.
    fn known(&mut self, once: Once, client: u64) -> Result<Known, (Status, u64)> {
        let id = once.id(client);
        match self.store.check(id, once.first_incomplete, self.clock.now) {
            Ok(Progress::New) => Ok(Known::New(id)),
            Ok(Progress::Done(outcome)) => {
                self.counters.duplicates += 1;
                Ok(Known::Executed(outcome))
            }
            Ok(Progress::InProgress) => Err((Status::Busy, 0)),
            Ok(Progress::Stale) => Err((Status::Stale, 0)),
            Err(e) => Err(self.refusal(None, &e)),
        }
    }
}

enum Known {
    New(RequestId),
    Executed(Outcome),
}

fn result_of(outcome: Outcome) -> Result<ElementResult<'static>, (Status, u64)> {
    if let Some(failure) = failure_of(outcome) {
        return Err(failure);
    }
    Ok(match outcome {
        Outcome::Incremented { value, version } => ElementResult::Incremented {
            version,
            bits: value.bits(),
        },
        Outcome::Written { version } | Outcome::Removed { version } => {
            ElementResult::Version(version)
        }
        _ => return Err((Status::Internal, 0)),
    })
}

impl Job {
    /// The next element, and its bytes. None: its piece is not here yet.
    fn next<'a>(
        &self,
        requests: &'a MemoryRegion,
        buffers: &'a MemoryRegion,
    ) -> Result<Option<(Element<'a>, usize)>, ProtoError> {
        if self.failed.is_some() {
            // Not looked at any more.
            return Err(ProtoError::Field("elements"));
        }
        match &self.source {
            Source::Received { place, at } => {
                let bytes = received(requests, buffer_offset(place.buffer), place.len as usize);
                let bytes = bytes.get(at.clone()).unwrap_or_default();
                Element::parse(self.op, bytes).map(Some)
            }
            Source::Remote {
                from,
                scratch: buffer,
                before,
                piece,
            } => {
                let at = scratch::offset(*buffer) + piece.start;
                let bytes = received(buffers, at, piece.len());
                match Element::parse(self.op, bytes) {
                    // Cut off by the end of the piece, and not of a piece of its own.
                    Err(ProtoError::Truncated { .. })
                        if before + piece.end < from.len as usize
                            && (piece.start > 0 || piece.is_empty()) =>
                    {
                        Ok(None)
                    }
                    Err(ProtoError::Truncated { .. }) if piece.len() == scratch::size(*buffer) => {
                        Err(ProtoError::ValueNotEager { bytes: piece.len() })
                    }
                    other => other.map(Some),
                }
            }
        }
    }

    /// An element of `bytes` is done.
    fn advance(&mut self, bytes: usize) {
        self.left -= 1;
        if let Some(once) = &mut self.once {
            once.sequence += 1;
        }
        match &mut self.source {
            Source::Received { at, .. } => at.start += bytes,
            Source::Remote { piece, .. } => piece.start += bytes,
        }
    }

    /// Bytes that a value's result may take, in a scratch buffer of `size`.
    fn room_for_value(&self, size: usize) -> usize {
        let whole = self.out.to.map_or(size, |to| to.len as usize);
        let rest = usize::from(self.left - 1) * self.op.result_bytes();
        whole.saturating_sub(self.out.written + self.out.len + rest)
    }
}
