//! Event channels.

use alloc::collections::VecDeque;
use alloc::sync::{Arc, Weak};
use core::fmt;
use core::sync::atomic::Ordering;
use core::time::Duration;

use hyv_abi::control::{
    self, CmDestroyId, CmEventKind, CmGetEvent, CmParam, PRIVATE_LEN, PortSpace,
};
use hyv_abi::types::Errno;
use spin::mutex::SpinMutex;

use crate::ah::AhAttr;
use crate::cm::id::CmId;
use crate::cm::reason::RejectReason;
use crate::context::{Context, Gid};
use crate::error::Error;
use crate::limits::CM_SLEEP_NS;

pub(crate) struct ChannelInner {
    queue: SpinMutex<VecDeque<CmEvent>>,
}

/// A connection event (`struct rdma_cm_event`).
#[derive(Debug)]
pub struct CmEvent {
    /// What happened.
    pub kind: CmEventKind,
    /// To which identifier ([`CmId::handle`]); for a connection request, the new one.
    pub id: u32,
    /// For a connection request, the listener.
    pub listener: Option<u32>,
    /// 0, or why: an errno or the reason of a reject.
    pub status: u32,
    /// The peer's GID, where there is one.
    pub peer: Gid,
    /// The peer's parameters, where there are any.
    pub param: CmParam,
    space: PortSpace,
    request: Option<CmId>,
}

/// Where datagrams for a service go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DatagramPeer {
    /// For [`crate::ProtectionDomain::create_ah`].
    pub addr: AhAttr,
    /// The queue pair there.
    pub qpn: u32,
    /// The Q_Key that it takes.
    pub qkey: u32,
}

impl CmEvent {
    /// The peer's private data.
    #[must_use]
    pub fn private_data(&self) -> &[u8] {
        &self.param.private[..(self.param.private_len as usize).min(PRIVATE_LEN)]
    }

    /// What `Established` says in [`PortSpace::Udp`]: where datagrams go.
    #[must_use]
    pub fn datagram_peer(&self) -> Option<DatagramPeer> {
        (self.space == PortSpace::Udp && self.kind == CmEventKind::Established).then_some(
            DatagramPeer {
                addr: AhAttr::to(self.peer),
                qpn: self.param.qpn,
                qkey: self.param.qkey,
            },
        )
    }

    /// Why the peer said no, if this is a refusal.
    #[must_use]
    pub const fn reject_reason(&self) -> Option<RejectReason> {
        match (self.space, self.kind) {
            (PortSpace::Tcp, CmEventKind::Rejected) => Some(RejectReason::of_rej(self.status)),
            (PortSpace::Udp, CmEventKind::Unreachable) => RejectReason::of_sidr(self.status),
            _ => None,
        }
    }

    /// Takes the identifier of a connection request, to accept it. Left here, it is dropped with the event, which
    /// refuses the request.
    pub fn take_request(&mut self) -> Option<CmId> {
        self.request.take()
    }
}

/// Where connection events of its identifiers arrive (`struct rdma_event_channel`). Clones are the same channel.
/// Keep one as long as its identifiers: events for a channel that is gone are dropped, and connection requests refused.
#[derive(Clone)]
pub struct EventChannel {
    context: Context,
    inner: Arc<ChannelInner>,
}

impl fmt::Debug for EventChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventChannel")
            .field("waiting", &self.inner.queue.lock().len())
            .finish_non_exhaustive()
    }
}

impl EventChannel {
    /// A channel of its own for the identifiers made on it.
    #[must_use]
    pub fn new(context: &Context) -> Self {
        let inner = ChannelInner {
            queue: SpinMutex::new(VecDeque::new()),
        };
        Self {
            context: context.clone(),
            inner: Arc::new(inner),
        }
    }

    /// The device.
    #[must_use]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// Makes an identifier for reliable connections (`rdma_create_id`, `RDMA_PS_TCP`).
    ///
    /// # Errors
    /// As any control verb; ENOMEM beyond the quota.
    pub fn create_id(&self) -> Result<CmId, Error> {
        self.create_id_in(PortSpace::Tcp)
    }

    /// Makes an identifier in a port space (`rdma_create_id`).
    ///
    /// # Errors
    /// As any control verb; ENOMEM beyond the quota.
    pub fn create_id_in(&self, space: PortSpace) -> Result<CmId, Error> {
        CmId::create(&self.context, &Arc::downgrade(&self.inner), space)
    }

    /// Takes the oldest event, if there is one (`rdma_get_cm_event` of a non-blocking channel). Costs two loads when
    /// there is none.
    ///
    /// # Errors
    /// As any control verb.
    pub fn poll_event(&self) -> Result<Option<CmEvent>, Error> {
        loop {
            if let Some(event) = self.inner.queue.lock().pop_front() {
                return Ok(Some(event));
            }
            if !self.fetch()? {
                return Ok(self.inner.queue.lock().pop_front());
            }
        }
    }

    /// Takes the oldest event, sleeping as long as there is none; `None` after `timeout`.
    ///
    /// # Errors
    /// As any control verb; [`Error::HostGone`].
    pub fn get_event(&self, timeout: Option<Duration>) -> Result<Option<CmEvent>, Error> {
        self.context
            .inner
            .wait_until(timeout, CM_SLEEP_NS, || {}, || self.poll_event())
    }

    /// Fetches one event from the host and hands it to its channel; false if there was none to fetch.
    fn fetch(&self) -> Result<bool, Error> {
        let inner = &self.context.inner;
        self.context.take_cm_bit();
        if !inner.cm_pending.load(Ordering::Acquire) {
            return Ok(false);
        }
        // Whoever holds it hands out what there is.
        let Some(_guard) = inner.cm_fetch.try_lock() else {
            return Ok(false);
        };
        // Cleared first: an event that comes later sets the window's bit again.
        inner.cm_pending.store(false, Ordering::Release);
        let event = match inner.call(&CmGetEvent {}) {
            Ok(event) => event,
            Err(Error::Verb(e)) if e.errno == Errno::Again => return Ok(false),
            Err(e) => {
                inner.cm_pending.store(true, Ordering::Release);
                return Err(e);
            }
        };
        inner.cm_pending.store(true, Ordering::Release);
        self.hand_out(&event);
        Ok(true)
    }

    fn hand_out(&self, raw: &control::CmEvent) {
        let inner = &self.context.inner;
        let Some(mut kind) = CmEventKind::from_u32(raw.event) else {
            return;
        };
        let request = kind == CmEventKind::ConnectRequest;
        let owner = if request { raw.listen_id } else { raw.id };
        let id = inner.ids.lock().get(&owner).cloned();
        let Some((id, channel)) = id.and_then(|id| Weak::upgrade(&id.channel).map(|c| (id, c)))
        else {
            // Its identifier or channel was dropped meanwhile.
            if request {
                let _ = inner.call(&CmDestroyId { id: raw.id });
            }
            return;
        };
        let mut event = CmEvent {
            kind,
            id: raw.id,
            listener: request.then_some(raw.listen_id),
            status: raw.status,
            peer: Gid(raw.peer_gid),
            param: raw.param,
            space: id.space,
            request: None,
        };
        match kind {
            CmEventKind::ConnectRequest => {
                let new = CmId::adopt(&self.context, &id.channel, id.space, raw.id);
                let mut dialogue = new.shared().dialogue.lock();
                dialogue.remote = raw.param;
                dialogue.peer = event.peer;
                drop(dialogue);
                event.request = Some(new);
            }
            CmEventKind::AddrResolved => id.dialogue.lock().peer = event.peer,
            CmEventKind::ConnectResponse => {
                let mut dialogue = id.dialogue.lock();
                dialogue.remote = raw.param;
                dialogue.peer = event.peer;
                drop(dialogue);
                if let Some(qp) = id.qp() {
                    match id.establish(&qp) {
                        // `Established` follows; as in librdmacm, this step shows only without a queue pair.
                        Ok(()) => return,
                        Err(e) => (kind, event.status) = (CmEventKind::ConnectError, e.errno()),
                    }
                }
            }
            CmEventKind::Established if id.space == PortSpace::Udp => {
                let mut dialogue = id.dialogue.lock();
                (dialogue.remote, dialogue.peer) = (raw.param, event.peer);
            }
            CmEventKind::Established => {
                // What the peer said came with its answer.
                let dialogue = id.dialogue.lock();
                (event.param, event.peer) = (dialogue.remote, dialogue.peer);
            }
            CmEventKind::Disconnected => id.fail_qp(),
            _ => {}
        }
        event.kind = kind;
        channel.queue.lock().push_back(event);
    }
}
