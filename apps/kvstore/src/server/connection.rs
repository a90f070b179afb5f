//! One client's connection: its queue pair, its receive buffers, and what is in flight.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;

use hyv_verbs::cm::CmId;
use hyv_verbs::{MemoryRegion, Payload, PostError, QueuePair, RecvWr, SendOp, SendWr, Sge};

use super::limits::{MAX_SENDS, MAX_STALLS, RECV_BUFFERS, REPOST_BATCH, SIGNAL_EVERY};
use crate::proto::MAX_REQUEST_BYTES;

/// No segment, no buffer.
pub const NONE: u32 = u32::MAX;

/// What a work request on the send queue holds until it is done.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Pinned segment of the log, or [`NONE`].
    pub segment: u32,
    /// Receive buffer that its reply lies in, or [`NONE`].
    pub buffer: u32,
    /// Scratch buffer, or [`NONE`].
    pub scratch: u32,
}

impl Held {
    /// Nothing.
    pub const NOTHING: Self = Self {
        segment: NONE,
        buffer: NONE,
        scratch: NONE,
    };
}

/// Kinds of work request, in the low byte of `wr_id`.
pub mod kind {
    /// A receive; the index is the buffer.
    pub const RECV: u64 = 0;
    /// A send; the index counts them.
    pub const SEND: u64 = 1;
    /// A READ of the client's memory; the index is the transfer.
    pub const READ: u64 = 2;
}

/// `wr_id` of a work request of connection `slot`.
#[inline]
pub const fn wr_id(slot: usize, kind: u64, index: u32) -> u64 {
    (index as u64) << 32 | (slot as u64) << 8 | kind
}

/// Connection slot, kind and index of a `wr_id`.
#[inline]
pub const fn split(wr_id: u64) -> (usize, u64, u32) {
    (
        (wr_id >> 8) as usize & 0xff_ffff,
        wr_id & 0xff,
        (wr_id >> 32) as u32,
    )
}

/// A connection: where requests arrive, and the link that answers them.
///
/// Fields drop in order: the queue pair before the memory that it uses, and the identifier last.
pub struct Connection {
    pub link: Link,
    pub buffers: Arc<MemoryRegion>,
    pub id: CmId,
    /// Which of the server's completion queues it uses.
    pub share: usize,
}

impl Connection {
    pub fn new(slot: usize, share: usize, id: CmId, qp: QueuePair, buffers: MemoryRegion) -> Self {
        let buffers = Arc::new(buffers);
        let link = Link::new(slot, qp, Arc::clone(&buffers));
        Self {
            link,
            buffers,
            id,
            share,
        }
    }
}

/// The queue pair of a connection, and what is in flight on it.
pub struct Link {
    slot: usize,
    qp: QueuePair,
    buffers: Arc<MemoryRegion>,
    first: Sge,
    /// Sends posted and not known to be done, oldest first, each with its count.
    sent: VecDeque<(u32, Held)>,
    posted: u32,
    unsignaled: u32,
    /// Buffers to post again.
    free: Vec<u32>,
    /// Requests that arrived when the send queue was full, or no scratch buffer was free: buffer and length.
    pub deferred: VecDeque<(u32, u32)>,
    /// Its peer went away or broke the rules: to be closed.
    pub broken: bool,
    /// Maintenance rounds since its oldest send made progress, and which that was.
    stalls: (u32, u32),
}

impl Link {
    fn new(slot: usize, qp: QueuePair, buffers: Arc<MemoryRegion>) -> Self {
        Self {
            slot,
            qp,
            first: buffers.sge(0, MAX_REQUEST_BYTES as u32),
            buffers,
            sent: VecDeque::with_capacity(MAX_SENDS + 8),
            posted: 0,
            unsignaled: 0,
            free: Vec::with_capacity(RECV_BUFFERS),
            deferred: VecDeque::with_capacity(RECV_BUFFERS),
            broken: false,
            stalls: (0, 0),
        }
    }

    /// Its connection's place in the server.
    pub const fn slot(&self) -> usize {
        self.slot
    }

    /// The receive buffers.
    pub const fn buffers(&self) -> &Arc<MemoryRegion> {
        &self.buffers
    }

    /// Posts all receives.
    pub fn post_all(&mut self) -> Result<(), PostError> {
        self.free.extend(0..RECV_BUFFERS as u32);
        self.repost()
    }

    /// Gives a buffer back; the device gets it with the next batch.
    #[inline]
    pub fn release(&mut self, buffer: u32) {
        self.free.push(buffer);
        if self.free.len() >= REPOST_BATCH && self.repost().is_err() {
            self.broken = true;
        }
    }

    fn repost(&mut self) -> Result<(), PostError> {
        for &b in &self.free {
            let sge = buffer_sge(self.first, b, MAX_REQUEST_BYTES);
            self.qp.post_recv(&RecvWr {
                wr_id: wr_id(self.slot, kind::RECV, b),
                sges: &[sge],
            })?;
        }
        self.free.clear();
        Ok(())
    }

    /// A receive buffer's first `len` bytes.
    #[inline]
    pub fn sge(&self, buffer: u32, len: usize) -> Sge {
        buffer_sge(self.first, buffer, len)
    }

    /// Whether another request's work requests (at most 3) fit.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.sent.len() + 3 <= MAX_SENDS
    }

    /// Posts a send that holds something until it is done.
    #[inline]
    pub fn send(&mut self, op: SendOp, payload: Payload<'_>, held: Held) -> Result<(), PostError> {
        let signal =
            self.unsignaled + 1 >= SIGNAL_EVERY || held.scratch != NONE || held.buffer != NONE;
        let count = self.posted;
        let wr = SendWr::new(wr_id(self.slot, kind::SEND, count), op, payload);
        self.qp
            .post_send(&if signal { wr } else { wr.unsignaled() })?;
        self.posted = count.wrapping_add(1);
        self.unsignaled = if signal { 0 } else { self.unsignaled + 1 };
        self.sent.push_back((count, held));
        Ok(())
    }

    /// Posts a READ of the client's memory; signaled, it completes as a transfer.
    pub fn read(
        &mut self,
        transfer: u32,
        from: hyv_verbs::RemoteAddr,
        to: Sge,
    ) -> Result<(), PostError> {
        self.qp.post_send(&SendWr::new(
            wr_id(self.slot, kind::READ, transfer),
            SendOp::Read(from),
            Payload::Sges(&[to]),
        ))
    }

    /// All sends up to `count` are done: hands out what they held.
    #[inline]
    pub fn done(&mut self, count: u32, mut f: impl FnMut(Held)) {
        while let Some(&(c, held)) = self.sent.front()
            && count.wrapping_sub(c) < 1 << 31
        {
            self.sent.pop_front();
            f(held);
        }
    }

    /// Everything still held, at the end of the connection.
    pub fn take_held(&mut self) -> impl Iterator<Item = Held> + '_ {
        self.sent.drain(..).map(|(_, held)| held)
    }

    /// Once a maintenance round: whether the client has not taken its replies for too long. RNR retries are without end, because a
    /// client may be descheduled for long; who never takes a reply must not hold segments for ever.
    pub fn is_stuck(&mut self) -> bool {
        match self.sent.front() {
            Some(&(count, _)) if self.stalls.1 == count => self.stalls.0 += 1,
            Some(&(count, _)) => self.stalls = (0, count),
            None => self.stalls.0 = 0,
        }
        self.stalls.0 > MAX_STALLS
    }

    /// Asks for a completion of what was sent without one: a WRITE of no bytes, which nobody sees.
    pub fn flush(&mut self) -> Result<(), PostError> {
        if self.unsignaled == 0 || !self.has_room() {
            return Ok(());
        }
        self.unsignaled = SIGNAL_EVERY;
        let nowhere = hyv_verbs::RemoteAddr { addr: 0, rkey: 0 };
        self.send(SendOp::Write(nowhere), Payload::Inline(&[]), Held::NOTHING)
    }
}

#[inline]
fn buffer_sge(first: Sge, buffer: u32, len: usize) -> Sge {
    Sge {
        addr: first.addr + u64::from(buffer) * MAX_REQUEST_BYTES as u64,
        len: len as u32,
        lkey: first.lkey,
    }
}
