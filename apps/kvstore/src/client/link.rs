//! The way to the server: a queue pair and its receives, and how it is made, without waiting.

use core::time::Duration;

use hyv_verbs::cm::{CmId, ConnParam, EventChannel};
use hyv_verbs::{
    CmEventKind, CompletionQueue, Context, Error, Gid, MemoryRegion, Payload, PostError,
    ProtectionDomain, QpCaps, QueuePair, RecvWr, SendOp, SendWr, Sge,
};

use super::error::verb;
use super::{ClientError, MAX_INLINE, MAX_SENDS, RECV_BUFFERS, REPOST_BATCH};
use crate::proto::{Hello, MAX_REPLY_BYTES, Refusal, Welcome};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// A completion is asked for every so many requests.
const SIGNAL_EVERY: u32 = 16;

/// Kinds of work request, in the high half of `wr_id`; the low half is a buffer or a slot.
pub(super) const WR_READ: u64 = 1 << 32;

/// An established connection.
pub(super) struct Link {
    // Fields drop in order: the queue pair before the identifier.
    qp: QueuePair,
    id: CmId,
    /// Kept open: events for a channel that is gone are dropped. That the connection has ended shows at the receives, which fail.
    _channel: EventChannel,
    unsignaled: u32,
    /// Receive buffers to post again.
    spent: Vec<u32>,
}

impl Link {
    /// Posts a request.
    #[inline]
    pub fn send(&mut self, payload: Payload<'_>) -> Result<(), PostError> {
        let signal = self.unsignaled + 1 >= SIGNAL_EVERY;
        let wr = SendWr::new(0, SendOp::Send, payload);
        self.qp
            .post_send(&if signal { wr } else { wr.unsignaled() })?;
        self.unsignaled = if signal { 0 } else { self.unsignaled + 1 };
        Ok(())
    }

    /// Posts a READ for a request slot.
    #[inline]
    pub fn read(
        &mut self,
        slot: u16,
        from: hyv_verbs::RemoteAddr,
        to: Sge,
    ) -> Result<(), PostError> {
        let wr_id = WR_READ | u64::from(slot);
        self.qp.post_send(&SendWr::new(
            wr_id,
            SendOp::Read(from),
            Payload::Sges(&[to]),
        ))
    }

    /// Gives a receive buffer back. False: it cannot be posted.
    #[inline]
    pub fn spend(&mut self, recv: &MemoryRegion, buffer: u32) -> bool {
        self.spent.push(buffer);
        if self.spent.len() < REPOST_BATCH {
            return true;
        }
        let qp = &mut self.qp;
        self.spent
            .drain(..)
            .all(|buffer| post_recv(qp, recv, buffer).is_ok())
    }

    /// Ends the connection in order.
    pub fn close(mut self) -> Result<(), ClientError> {
        self.id.disconnect().map_err(verb("cannot disconnect"))
    }
}

/// A connection that is being made.
pub(super) struct Connecting {
    // Before the channel: an identifier without one gets no events.
    id: CmId,
    channel: EventChannel,
    hello: Hello,
    deadline: u64,
}

/// What a step of connecting came to.
pub(super) enum Progress {
    /// Nothing has happened.
    Waiting(Box<Connecting>),
    /// It stands.
    Done(Box<(Link, Welcome)>),
}

/// What connecting needs of the client.
pub(super) struct Parts<'a> {
    pub context: &'a Context,
    pub pd: &'a ProtectionDomain,
    pub cq: &'a CompletionQueue,
    pub recv: &'a MemoryRegion,
}

impl Connecting {
    /// Begins to connect.
    pub fn begin(
        context: &Context,
        (gid, port): (Gid, u16),
        hello: Hello,
        timeout: Duration,
    ) -> Result<Box<Self>, ClientError> {
        let channel = EventChannel::new(context);
        let mut id = channel
            .create_id()
            .map_err(verb("cannot make a connection identifier"))?;
        id.resolve_addr(gid, port, timeout)
            .map_err(verb("cannot find the way to the store"))?;
        let deadline = context.now_ns() + timeout.as_nanos() as u64;
        Ok(Box::new(Self {
            id,
            channel,
            hello,
            deadline,
        }))
    }

    /// Goes on with what has happened. Control verbs are called, but nothing is waited for.
    pub fn step(
        mut self: Box<Self>,
        parts: &Parts<'_>,
        port: u16,
    ) -> Result<Progress, ClientError> {
        let event = self
            .channel
            .poll_event()
            .map_err(verb("cannot take connection events"))?;
        let Some(event) = event else {
            if parts.context.now_ns() >= self.deadline {
                return Err(verb("cannot connect")(Error::Timeout));
            }
            return Ok(Progress::Waiting(self));
        };
        let left = Duration::from_nanos(self.deadline.saturating_sub(parts.context.now_ns()));
        match event.kind {
            CmEventKind::AddrResolved => {
                self.id
                    .resolve_route(left)
                    .map_err(verb("cannot find the way to the store"))?;
                Ok(Progress::Waiting(self))
            }
            CmEventKind::RouteResolved => {
                self.ask(parts)?;
                Ok(Progress::Waiting(self))
            }
            CmEventKind::Established => {
                let welcome = Welcome::parse(event.private_data())
                    .map_err(|_| ClientError::Refused(Refusal::Version))?;
                let Self {
                    mut id, channel, ..
                } = *self;
                let qp = id
                    .take_qp()
                    .ok_or(ClientError::Disconnected("no queue pair"))?;
                let link = Link {
                    qp,
                    id,
                    _channel: channel,
                    unsignaled: 0,
                    spent: Vec::with_capacity(REPOST_BATCH),
                };
                Ok(Progress::Done(Box::new((link, welcome))))
            }
            // A CM without a listener rejects with no private data.
            CmEventKind::Rejected => Err(Refusal::parse(event.private_data())
                .map_or(ClientError::NoServer { port }, ClientError::Refused)),
            _ => Err(verb("cannot connect")(Error::Connection {
                event: event.kind,
                status: event.status,
            })),
        }
    }

    fn ask(&mut self, parts: &Parts<'_>) -> Result<(), ClientError> {
        let caps = QpCaps {
            max_send_wr: MAX_SENDS,
            max_recv_wr: RECV_BUFFERS as u32,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: MAX_INLINE as u32,
            signal_all: false,
        };
        let qp = self
            .id
            .create_qp(parts.pd, parts.cq, parts.cq, &caps)
            .map_err(verb("cannot make a queue pair"))?;
        for buffer in 0..RECV_BUFFERS as u32 {
            post_recv(qp, parts.recv, buffer).map_err(verb("cannot post receives"))?;
        }
        let param = ConnParam {
            private_data: &self.hello.to_bytes(),
            ..ConnParam::default()
        };
        self.id.connect(&param).map_err(verb("cannot connect"))
    }
}

#[inline]
fn post_recv(qp: &mut QueuePair, recv: &MemoryRegion, buffer: u32) -> Result<(), Error> {
    let sge = recv.sge(
        u64::from(buffer) * MAX_REPLY_BYTES as u64,
        MAX_REPLY_BYTES as u32,
    );
    qp.post_recv(&RecvWr {
        wr_id: u64::from(buffer),
        sges: &[sge],
    })
    .map_err(|_| Error::NoQueuePair)
}
