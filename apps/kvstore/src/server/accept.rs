//! Connections that come and go.

use alloc::boxed::Box;

use hyv_verbs::cm::{CmId, ConnParam, EventChannel};
use hyv_verbs::{Access, CmEventKind, Context, Error, Gid, QpCaps};

use super::connection::Connection;
use super::limits::{CQ_ENTRIES, CQ_GROWTH, CQ_MAX, CQ_SHARE, RECV_BUFFERS, SEND_RING, WINDOW};
use super::{CqShare, Server, ServerError, release, verb};
use crate::proto::{MAX_REQUEST_BYTES, PROTOCOL_VERSION};

/// Requests to connect that may wait.
const BACKLOG: u32 = 128;
/// Slots of the largest send: header and value apart are two SGEs, inline data of a STATS reply takes four slots.
const MAX_INLINE: u32 = 192;

/// The listening side.
pub(super) struct Listener {
    /// Kept open: dropping it would end listening.
    _id: CmId,
    channel: EventChannel,
}

impl Listener {
    pub fn new(context: &Context, port: u16) -> Result<Self, ServerError> {
        let (id, channel) = hyv_verbs::cm::listen(context, (Gid::LOCAL, port), BACKLOG)
            .map_err(verb("cannot listen"))?;
        Ok(Self { _id: id, channel })
    }
}

impl Server {
    /// Takes connection events: new clients, and those that left. Costs one load when there are none.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn poll_connections(&mut self) -> Result<(), ServerError> {
        while let Some(mut event) = self
            .listener
            .channel
            .poll_event()
            .map_err(verb("cannot take connection events"))?
        {
            match event.kind {
                CmEventKind::ConnectRequest => {
                    let version = event.private_data().first().copied();
                    if let Some(id) = event.take_request() {
                        self.accept(id, version);
                    }
                }
                CmEventKind::Disconnected
                | CmEventKind::ConnectError
                | CmEventKind::Unreachable => {
                    let found = self
                        .conns
                        .iter_mut()
                        .flatten()
                        .find(|c| c.id.handle() == event.id);
                    if let Some(conn) = found {
                        conn.link.broken = true;
                        self.any_broken = true;
                    }
                }
                _ => {}
            }
        }
        if self.any_broken {
            self.close_broken();
        }
        Ok(())
    }

    /// A client that is refused learns why from the reject's private data: one byte, see [`crate::proto::Refusal`].
    fn accept(&mut self, mut id: CmId, version: Option<u8>) {
        use crate::proto::Refusal;
        let refusal = if version != Some(PROTOCOL_VERSION) {
            Some(Refusal::Version)
        } else if self.connected >= self.config.max_connections {
            Some(Refusal::TooMany)
        } else {
            None
        };
        if let Some(why) = refusal {
            // If the client is gone already, nobody needs to know.
            let _ = id.reject(&[why as u8, PROTOCOL_VERSION]);
            return;
        }
        let slot = self.free_conns.pop().unwrap_or_else(|| {
            self.conns.push(None);
            self.conns.len() - 1
        });
        let made = self
            .cq_share()
            .and_then(|share| Ok((share, self.make_connection(&mut id, share)?)));
        match made {
            Ok((share, (qp, buffers))) => {
                let mut conn = Box::new(Connection::new(slot, share, id, qp, buffers));
                let ready = conn.link.post_all().is_ok();
                let param = ConnParam {
                    private_data: &[PROTOCOL_VERSION, WINDOW as u8],
                    ..ConnParam::default()
                };
                if ready && conn.id.accept(&param).is_ok() {
                    self.conns[slot] = Some(conn);
                    self.cqs[share].used += 1;
                    self.connected += 1;
                    self.counters.connections += 1;
                    return;
                }
                drop(conn);
            }
            Err(_) => {
                let _ = id.reject(&[Refusal::NoResources as u8, PROTOCOL_VERSION]);
            }
        }
        self.free_conns.push(slot);
    }

    /// A completion queue with room for another connection.
    fn cq_share(&mut self) -> Result<usize, Error> {
        if let Some(i) = self.cqs.iter().position(|s| s.used < s.room) {
            return Ok(i);
        }
        let entries = self.cqs.last().map_or(CQ_ENTRIES, |s| {
            (s.cq.capacity() * CQ_GROWTH / 2).min(CQ_MAX)
        });
        let cq = self.context.create_cq(entries)?;
        self.cqs.push(CqShare {
            cq,
            used: 0,
            room: entries as usize / CQ_SHARE,
        });
        Ok(self.cqs.len() - 1)
    }

    fn make_connection(
        &self,
        id: &mut CmId,
        share: usize,
    ) -> Result<(hyv_verbs::QueuePair, hyv_verbs::MemoryRegion), Error> {
        let buffers = self
            .pd
            .alloc_mr(RECV_BUFFERS * MAX_REQUEST_BYTES, Access::LOCAL_WRITE)?;
        let caps = QpCaps {
            max_send_wr: SEND_RING / 4,
            max_recv_wr: RECV_BUFFERS as u32,
            max_send_sge: 2,
            max_recv_sge: 1,
            max_inline_data: MAX_INLINE,
            signal_all: false,
        };
        let cq = &self.cqs[share].cq;
        id.create_qp(&self.pd, cq, cq, &caps)?;
        let qp = id.take_qp().ok_or(Error::NoQueuePair)?;
        Ok((qp, buffers))
    }

    /// Ends connections that broke; what they held is given back.
    #[cold]
    pub(super) fn close_broken(&mut self) {
        self.any_broken = false;
        for slot in 0..self.conns.len() {
            if !self.conns[slot].as_ref().is_some_and(|c| c.link.broken) {
                continue;
            }
            let Some(mut conn) = self.conns[slot].take() else {
                continue;
            };
            // The peer may be gone already; then there is nobody to tell.
            let _ = conn.id.disconnect();
            self.drop_transfers(slot);
            for held in conn.link.take_held() {
                release(&mut self.store, &mut self.free_scratch, held);
            }
            self.cqs[conn.share].used -= 1;
            self.connected -= 1;
            self.free_conns.push(slot);
        }
    }
}
