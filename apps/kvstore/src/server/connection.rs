//! One client's connection: its queue pair and what is in flight; and the group of connections that it shares receives with.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;

use hyv_verbs::cm::CmId;
use hyv_verbs::{
    Access, CompletionQueue, Context, Error, MemoryRegion, Payload, PostError, ProtectionDomain,
    QpCaps, QpInitAttr, QpType, QueuePair, RecvWr, SendOp, SendWr, Sge, SharedReceiveQueue,
    SrqCaps,
};

use super::limits::{REPOST_BATCH, STUCK_NS, Tier};
use crate::proto::MAX_REQUEST_BYTES;

/// No segment, no buffer.
pub const NONE: u32 = u32::MAX;

/// What a work request on the send queue holds until it is done.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Pinned segment of the log, or [`NONE`].
    pub segment: u32,
    /// Scratch buffer, or [`NONE`].
    pub scratch: u32,
}

impl Held {
    /// Nothing.
    pub const NOTHING: Self = Self {
        segment: NONE,
        scratch: NONE,
    };

    /// A scratch buffer.
    pub const fn scratch(buffer: u32) -> Self {
        Self {
            scratch: buffer,
            ..Self::NOTHING
        }
    }
}

/// Kinds of work request, in the low byte of `wr_id`.
pub mod kind {
    /// A receive; the index is the buffer.
    pub const RECV: u64 = 0;
    /// A send; the index counts them.
    pub const SEND: u64 = 1;
    /// A READ of the client's memory; the index is the transfer.
    pub const READ: u64 = 2;
    /// A READ or WRITE of a multi-operation; the index is the job.
    pub const JOB: u64 = 3;
}

/// `wr_id` of a work request.
#[inline]
pub const fn wr_id(kind: u64, index: u32) -> u64 {
    (index as u64) << 32 | kind
}

/// Kind and index of a `wr_id`.
#[inline]
pub const fn split(wr_id: u64) -> (u64, u32) {
    (wr_id & 0xff, (wr_id >> 32) as u32)
}

/// Connections that share a completion queue, a shared receive queue and its buffers.
pub struct Group {
    pub cq: CompletionQueue,
    srq: SharedReceiveQueue,
    pub buffers: Arc<MemoryRegion>,
    first: Sge,
    /// Buffers to post again.
    free: Vec<u32>,
    pub tier: Tier,
    /// Connections.
    pub used: usize,
}

impl Group {
    pub fn new(context: &Context, pd: &ProtectionDomain, tier: Tier) -> Result<Self, Error> {
        let cq = context.create_cq(tier.completions())?;
        let srq = pd.create_srq(&SrqCaps {
            max_wr: tier.receives() as u32,
            max_sge: 1,
        })?;
        let buffers = pd.alloc_mr(tier.receives() * MAX_REQUEST_BYTES, Access::LOCAL_WRITE)?;
        let mut group = Self {
            cq,
            srq,
            first: buffers.sge(0, MAX_REQUEST_BYTES as u32),
            buffers: Arc::new(buffers),
            free: (0..tier.receives() as u32).collect(),
            tier,
            used: 0,
        };
        group.repost();
        Ok(group)
    }

    /// Gives a buffer back; the device gets it with the next batch.
    #[inline]
    pub fn release(&mut self, buffer: u32) {
        self.free.push(buffer);
        if self.free.len() >= REPOST_BATCH {
            self.repost();
        }
    }

    fn repost(&mut self) {
        while self.free.len() >= REPOST_BATCH {
            let batch = self.free.len() - REPOST_BATCH;
            let sges: [[Sge; 1]; REPOST_BATCH] = core::array::from_fn(|i| {
                let at = u64::from(self.free[batch + i]) * MAX_REQUEST_BYTES as u64;
                [Sge {
                    addr: self.first.addr + at,
                    ..self.first
                }]
            });
            let list: [RecvWr<'_>; REPOST_BATCH] = core::array::from_fn(|i| RecvWr {
                wr_id: wr_id(kind::RECV, self.free[batch + i]),
                sges: &sges[i],
            });
            let posted = match self.srq.post_recv_list(&list) {
                Ok(()) => REPOST_BATCH,
                // Cannot be, with as many entries as buffers; the rest waits for the next batch.
                Err(e) => e.posted,
            };
            self.free.drain(batch..batch + posted);
            if posted < REPOST_BATCH {
                return;
            }
        }
    }

    /// Makes the queue pair of a connection.
    pub fn create_qp(&self, pd: &ProtectionDomain, id: &mut CmId) -> Result<QueuePair, Error> {
        let caps = QpCaps {
            max_send_wr: (self.tier.sends + self.tier.window) as u32,
            max_recv_wr: 1,
            max_send_sge: 2,
            max_recv_sge: 1,
            max_inline_data: super::requests::INLINE_REPLY as u32,
            signal_all: false,
        };
        let attr = QpInitAttr::new(QpType::Rc, &self.cq, &self.cq)
            .with_srq(&self.srq)
            .with_caps(caps);
        id.create_qp_ex(pd, &attr)?;
        id.take_qp().ok_or(Error::NoQueuePair)
    }
}

/// A connection: where requests arrive, and the link that answers them.
///
/// Fields drop in order: the queue pair before the memory that it uses, and the identifier last.
pub struct Connection {
    pub link: Link,
    pub buffers: Arc<MemoryRegion>,
    pub id: CmId,
}

impl Connection {
    pub fn new(link: Link, buffers: Arc<MemoryRegion>, id: CmId) -> Self {
        Self { link, buffers, id }
    }
}

/// Who a connection is of.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Its id.
    pub id: u64,
    /// Until when its lease was renewed, ns; 0: it has none.
    pub lease_until: u64,
}

/// The queue pair of a connection, and what is in flight on it.
pub struct Link {
    slot: usize,
    /// Counts connections: tells this one from others in the same slot.
    pub serial: u32,
    pub group: usize,
    qp: QueuePair,
    tier: Tier,
    /// Sends posted and not known to be done, oldest first, each with its count.
    sent: VecDeque<(u32, Held)>,
    posted: u32,
    unsignaled: u32,
    /// Requests that arrived and have no reply yet.
    pub outstanding: usize,
    /// Requests that arrived when the send queue was full, or no scratch buffer was free: buffer and length.
    pub deferred: VecDeque<(u32, u32)>,
    /// Since when the first of those waits for room in the log, ns.
    pub busy_since: Option<u64>,
    /// Large scratch buffers that it holds.
    pub large: u32,
    pub client: Client,
    /// When it last gave a sign of life, ns.
    pub heard: u64,
    /// Its peer went away or broke the rules: to be closed.
    pub broken: bool,
    /// Sends leave their doorbell to [`Self::ring`]: more requests of the same batch follow.
    batching: bool,
    /// Sends were posted whose doorbell was not rung.
    unrung: bool,
    /// Its oldest send that was not done in the last maintenance round, and how long the server had run when that was first so, ns.
    stalled: Option<(u32, u64)>,
}

impl Link {
    pub fn new(
        slot: usize,
        serial: u32,
        (group, tier): (usize, Tier),
        qp: QueuePair,
        client: Client,
        now: u64,
    ) -> Self {
        Self {
            slot,
            serial,
            group,
            qp,
            tier,
            sent: VecDeque::with_capacity(tier.sends),
            posted: 0,
            unsignaled: 0,
            outstanding: 0,
            deferred: VecDeque::new(),
            busy_since: None,
            large: 0,
            client,
            heard: now,
            broken: false,
            batching: false,
            unrung: false,
            stalled: None,
        }
    }

    /// Its connection's place in the server.
    pub const fn slot(&self) -> usize {
        self.slot
    }

    /// Its queue pair's number and index.
    pub fn qp(&self) -> (u32, usize) {
        (self.qp.qpn(), usize::from(self.qp.index()))
    }

    /// Books a request that arrived. False: more than its window allows.
    #[inline]
    pub const fn arrived(&mut self, now: u64) -> bool {
        self.heard = now;
        self.outstanding += 1;
        self.outstanding <= self.tier.window
    }

    /// Whether another request's work requests (at most 3) fit.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.sent.len() + 3 <= self.tier.sends
    }

    /// Posts the reply to a request, which holds something until it is done.
    #[inline]
    pub fn reply(&mut self, imm: u32, payload: Payload<'_>, held: Held) -> bool {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.send(SendOp::SendImm(imm), payload, held)
    }

    /// Posts a send that holds something until it is done. False, with the connection broken: it cannot be posted, and nothing is held.
    #[inline]
    pub fn send(&mut self, op: SendOp, payload: Payload<'_>, held: Held) -> bool {
        let signal = self.unsignaled + 1 >= self.tier.signal_every || held.scratch != NONE;
        let count = self.posted;
        let wr = SendWr::new(wr_id(kind::SEND, count), op, payload);
        let wr = if signal { wr } else { wr.unsignaled() };
        let posted = if self.batching {
            self.unrung = true;
            self.qp.post_send_unrung(&wr)
        } else {
            self.qp.post_send(&wr)
        };
        if posted.is_err() {
            self.broken = true;
            return false;
        }
        self.posted = count.wrapping_add(1);
        self.unsignaled = if signal { 0 } else { self.unsignaled + 1 };
        self.sent.push_back((count, held));
        true
    }

    /// Sends leave their doorbell, and the fence before it, to [`Self::ring`].
    #[inline]
    pub const fn begin_batch(&mut self) {
        self.batching = true;
    }

    /// The batch goes on elsewhere: later sends ring again. Returns whether [`Self::ring`] is due.
    #[inline]
    pub const fn end_batch(&mut self) -> bool {
        self.batching = false;
        self.unrung
    }

    /// Rings for what a batch has posted.
    #[inline]
    pub fn ring(&mut self) {
        if core::mem::take(&mut self.unrung) {
            self.qp.ring_doorbell();
        }
    }

    /// Posts a READ or WRITE of the client's memory that completes by itself, as `kind` and `index`.
    pub fn transfer(
        &mut self,
        (kind, index): (u64, u32),
        op: SendOp,
        local: Sge,
    ) -> Result<(), PostError> {
        let wr = SendWr::new(
            wr_id(kind, index),
            op,
            Payload::Sges(core::slice::from_ref(&local)),
        );
        self.qp.post_send(&wr).inspect_err(|_| self.broken = true)
    }

    /// All sends up to `count` are done: hands out what they held, one by one.
    #[inline]
    pub fn take_done(&mut self, count: u32) -> Option<Held> {
        let (c, held) = *self.sent.front()?;
        if count.wrapping_sub(c) >= 1 << 31 {
            return None;
        }
        self.sent.pop_front();
        Some(held)
    }

    /// What is still held, at the end of the connection.
    pub fn take_held(&mut self) -> Option<Held> {
        self.sent.pop_front().map(|(_, held)| held)
    }

    /// In each maintenance round: whether the client has not taken its replies for too long. RNR retries are without end, because a
    /// client may be descheduled for long; who never takes a reply must not hold segments for ever. `ran` is for how long the server has
    /// run, ns: while it stands still it takes no completions.
    pub fn is_stuck(&mut self, ran: u64) -> bool {
        self.stalled = match (self.sent.front(), self.stalled) {
            (Some(&(count, _)), Some((before, since))) if before == count => Some((count, since)),
            (Some(&(count, _)), _) => Some((count, ran)),
            (None, _) => None,
        };
        self.stalled
            .is_some_and(|(_, since)| ran - since > STUCK_NS)
    }

    /// Asks for a completion of what was sent without one, or just for a sign of life: a WRITE of no bytes, which nobody sees. True: it was
    /// the latter.
    pub fn flush(&mut self, for_life: bool) -> bool {
        // Whatever is signaled and not done yet will be a sign of life.
        let asks = for_life && self.sent.is_empty();
        if (self.unsignaled == 0 && !asks) || !self.has_room() {
            return false;
        }
        self.unsignaled = self.tier.signal_every;
        let nowhere = hyv_verbs::RemoteAddr { addr: 0, rkey: 0 };
        self.send(SendOp::Write(nowhere), Payload::Inline(&[]), Held::NOTHING);
        asks
    }

    /// Brings the queue pair into the error state: what it took of the shared receive queue completes.
    pub fn stop(&mut self) {
        // A device that is gone has nothing more to say.
        let _ = self.qp.to_err();
    }
}
