//! Connection identifiers.

use alloc::sync::{Arc, Weak};
use core::fmt;
use core::time::Duration;

use hyv_abi::control::{
    CmAccept, CmBindAddr, CmConnect, CmCreateId, CmDestroyId, CmDisconnect, CmEstablish, CmListen,
    CmParam, CmReject, CmResolveAddr, CmResolveRoute, MAX_PRIVATE_REJ, MAX_PRIVATE_REP,
    MAX_PRIVATE_REQ, PRIVATE_LEN, PortSpace,
};
use hyv_abi::types::{Access, QpState};
use spin::mutex::SpinMutex;

use crate::cm::channel::ChannelInner;
use crate::context::{Context, Gid};
use crate::cq::CompletionQueue;
use crate::error::Error;
use crate::mr::ProtectionDomain;
use crate::qp::{QpCaps, QpControl, QueuePair, RtrParams, RtsParams};

/// Parameters of `connect` and `accept`, as `struct rdma_conn_param`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnParam<'a> {
    /// Bytes for the peer: at most 56 with `connect`, 196 with `accept`.
    pub private_data: &'a [u8],
    /// READs and atomics that the peer may have outstanding here.
    pub responder_resources: u8,
    /// READs and atomics that this side may have outstanding.
    pub initiator_depth: u8,
    /// Retries when no answer comes, at most 7.
    pub retry_count: u8,
    /// Retries when the peer has no receive posted; 7 is for ever.
    pub rnr_retry_count: u8,
}

impl Default for ConnParam<'_> {
    fn default() -> Self {
        Self {
            private_data: &[],
            responder_resources: 16,
            initiator_depth: 16,
            retry_count: 7,
            rnr_retry_count: 7,
        }
    }
}

/// Access that peers have to a connection's queue pair; each memory region narrows it down.
const QP_ACCESS: Access = Access::REMOTE_READ
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_ATOMIC);

/// What both sides said so far.
#[derive(Clone, Copy)]
pub(crate) struct Dialogue {
    /// What this side offered.
    pub(crate) local: CmParam,
    /// What the peer offered: with a request, or with its answer.
    pub(crate) remote: CmParam,
    pub(crate) peer: Gid,
}

/// What the event channel needs of an identifier.
pub(crate) struct IdShared {
    pub(crate) handle: u32,
    pub(crate) channel: Weak<ChannelInner>,
    pub(crate) qp: SpinMutex<Weak<QpControl>>,
    pub(crate) dialogue: SpinMutex<Dialogue>,
}

impl IdShared {
    pub(crate) fn new(handle: u32, channel: Weak<ChannelInner>) -> Self {
        let nothing = Dialogue {
            local: CmParam::EMPTY,
            remote: CmParam::EMPTY,
            peer: Gid::LOCAL,
        };
        Self {
            handle,
            channel,
            qp: SpinMutex::new(Weak::new()),
            dialogue: SpinMutex::new(nothing),
        }
    }

    pub(crate) fn qp(&self) -> Option<Arc<QpControl>> {
        let weak = self.qp.lock().clone();
        weak.upgrade()
    }

    /// Brings the queue pair from INIT to RTS, with what both sides offered.
    pub(crate) fn ready(&self, qp: &QpControl) -> Result<(), Error> {
        let Dialogue {
            local,
            remote,
            peer,
        } = *self.dialogue.lock();
        let depth = |a: u8, b: u8| u32::from(a.min(b));
        let or = |said: u32, usual: u32| if said == 0 { usual } else { said };
        let rtr = RtrParams::to(peer, remote.qpn, remote.psn);
        qp.to_rtr(&RtrParams {
            path_mtu: or(remote.path_mtu, rtr.path_mtu),
            max_dest_rd_atomic: depth(local.responder_resources, remote.initiator_depth),
            ..rtr
        })?;
        let rts = RtsParams::from_psn(local.psn);
        qp.to_rts(&RtsParams {
            max_rd_atomic: depth(local.initiator_depth, remote.responder_resources),
            timeout: or(remote.ack_timeout, rts.timeout),
            // The connecting side chooses for both; its own word comes back to it with the answer.
            retry_cnt: u32::from(remote.retry_count),
            rnr_retry: u32::from(remote.rnr_retry_count),
            ..rts
        })
    }

    /// The connection is over: the host has brought the queue pair to error, and what is posted completes as flushed.
    pub(crate) fn fail_qp(&self) {
        if let Some(qp) = self.qp() {
            qp.shared.set_state(QpState::Err);
        }
    }

    /// The peer's answer came: ready the queue pair and say so.
    pub(crate) fn establish(&self, qp: &QpControl) -> Result<(), Error> {
        self.ready(qp)?;
        qp.context
            .call(&CmEstablish { id: self.handle })
            .map(|_| ())
    }
}

/// A connection identifier (`struct rdma_cm_id`): a listener, or one side of a connection. Dropping it ends the
/// connection, and destroys its queue pair unless that was taken out.
pub struct CmId {
    context: Context,
    shared: Arc<IdShared>,
    qp: Option<QueuePair>,
}

impl fmt::Debug for CmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CmId")
            .field("handle", &self.shared.handle)
            .field("qp", &self.qp)
            .finish_non_exhaustive()
    }
}

fn private(data: &[u8], max: usize) -> Result<(u32, [u8; PRIVATE_LEN]), Error> {
    let mut bytes = [0; PRIVATE_LEN];
    if data.len() > max {
        return Err(Error::PrivateData {
            len: data.len(),
            max,
        });
    }
    bytes[..data.len()].copy_from_slice(data);
    Ok((data.len() as u32, bytes))
}

fn ms(timeout: Duration) -> u32 {
    u32::try_from(timeout.as_millis())
        .unwrap_or(u32::MAX)
        .max(1)
}

impl CmId {
    pub(crate) fn create(context: &Context, channel: &Weak<ChannelInner>) -> Result<Self, Error> {
        let handle = context
            .inner
            .call(&CmCreateId {
                port_space: PortSpace::Tcp as u32,
                reserved: 0,
            })?
            .handle;
        Ok(Self::adopt(context, channel, handle))
    }

    /// Owns an identifier that the host has made.
    pub(crate) fn adopt(context: &Context, channel: &Weak<ChannelInner>, handle: u32) -> Self {
        let shared = Arc::new(IdShared::new(handle, Weak::clone(channel)));
        context.inner.ids.lock().insert(handle, Arc::clone(&shared));
        Self {
            context: context.clone(),
            shared,
            qp: None,
        }
    }

    pub(crate) const fn shared(&self) -> &Arc<IdShared> {
        &self.shared
    }

    /// Its handle, as events name it.
    #[must_use]
    pub fn handle(&self) -> u32 {
        self.shared.handle
    }

    /// The peer's GID; [`Gid::LOCAL`] before it is known.
    #[must_use]
    pub fn peer(&self) -> Gid {
        self.shared.dialogue.lock().peer
    }

    /// Gives it a local address and port, 0 for any (`rdma_bind_addr`); says which they are.
    ///
    /// # Errors
    /// As any control verb: EADDRINUSE for a taken port, EINVAL for an address that is not this device's.
    pub fn bind_addr(&mut self, gid: Gid, port: u16) -> Result<(Gid, u16), Error> {
        let request = CmBindAddr {
            id: self.handle(),
            port: u32::from(port),
            gid: gid.0,
        };
        let bound = self.context.inner.call(&request)?;
        Ok((Gid(bound.gid), bound.port as u16))
    }

    /// Listens on the bound port; `backlog` connection requests may wait (`rdma_listen`). Each comes as a
    /// [`hyv_abi::control::CmEventKind::ConnectRequest`].
    ///
    /// # Errors
    /// As any control verb.
    pub fn listen(&mut self, backlog: u32) -> Result<(), Error> {
        self.context
            .inner
            .call(&CmListen {
                id: self.handle(),
                backlog,
            })
            .map(|_| ())
    }

    /// Finds the way to a listener; answers with `AddrResolved` or `AddrError` (`rdma_resolve_addr`).
    ///
    /// # Errors
    /// As any control verb.
    pub fn resolve_addr(&mut self, gid: Gid, port: u16, timeout: Duration) -> Result<(), Error> {
        let request = CmResolveAddr {
            id: self.handle(),
            port: u32::from(port),
            gid: gid.0,
            timeout_ms: ms(timeout),
            reserved: 0,
        };
        self.context.inner.call(&request).map(|_| ())
    }

    /// Finds the route; answers with `RouteResolved` or `RouteError` (`rdma_resolve_route`).
    ///
    /// # Errors
    /// As any control verb.
    pub fn resolve_route(&mut self, timeout: Duration) -> Result<(), Error> {
        self.context
            .inner
            .call(&CmResolveRoute {
                id: self.handle(),
                timeout_ms: ms(timeout),
            })
            .map(|_| ())
    }

    /// Makes its queue pair and brings it to INIT (`rdma_create_qp`): receives may be posted. Replaces one that
    /// is there.
    ///
    /// # Errors
    /// As [`ProtectionDomain::create_qp`].
    pub fn create_qp(
        &mut self,
        pd: &ProtectionDomain,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        caps: &QpCaps,
    ) -> Result<&mut QueuePair, Error> {
        let mut qp = pd.create_qp(send_cq, recv_cq, caps)?;
        qp.to_init(QP_ACCESS)?;
        *self.shared.qp.lock() = Arc::downgrade(qp.control());
        Ok(self.qp.insert(qp))
    }

    /// Its queue pair.
    #[must_use]
    pub const fn qp(&self) -> Option<&QueuePair> {
        self.qp.as_ref()
    }

    /// Its queue pair, to post to.
    #[inline]
    #[must_use]
    pub const fn qp_mut(&mut self) -> Option<&mut QueuePair> {
        self.qp.as_mut()
    }

    /// Takes its queue pair out, so that another part of the program (or thread) owns it. The identifier goes on
    /// to move it through its states, and must live as long as the connection.
    pub const fn take_qp(&mut self) -> Option<QueuePair> {
        self.qp.take()
    }

    fn offer(&self, param: &ConnParam<'_>, max: usize) -> Result<(Arc<QpControl>, CmParam), Error> {
        let (private_len, private) = private(param.private_data, max)?;
        let qp = self.shared.qp().ok_or(Error::NoQueuePair)?;
        let offer = CmParam {
            qpn: qp.shared.qpn,
            psn: self.context.fresh_psn(),
            responder_resources: param.responder_resources,
            initiator_depth: param.initiator_depth,
            retry_count: param.retry_count.min(7),
            rnr_retry_count: param.rnr_retry_count.min(7),
            private_len,
            private,
            ..CmParam::EMPTY
        };
        self.shared.dialogue.lock().local = offer;
        Ok((qp, offer))
    }

    /// Asks for a connection; answers with `Established`, `Rejected`, `Unreachable` or `ConnectError`
    /// (`rdma_connect`). Call [`create_qp`](Self::create_qp) and post receives before.
    ///
    /// # Errors
    /// [`Error::NoQueuePair`], [`Error::PrivateData`] for more than 56 bytes, and as any control verb.
    pub fn connect(&mut self, param: &ConnParam<'_>) -> Result<(), Error> {
        let (_, param) = self.offer(param, MAX_PRIVATE_REQ)?;
        self.context
            .inner
            .call(&CmConnect {
                id: self.handle(),
                param,
            })
            .map(|_| ())
    }

    /// Accepts the connection request that this identifier came with (`rdma_accept`): brings the queue pair to RTS
    /// and answers. `Established` follows when the peer is ready too. Call [`create_qp`](Self::create_qp) and
    /// post receives before.
    ///
    /// # Errors
    /// [`Error::NoQueuePair`], [`Error::PrivateData`] for more than 196 bytes, and as any control verb.
    pub fn accept(&mut self, param: &ConnParam<'_>) -> Result<(), Error> {
        let (qp, param) = self.offer(param, MAX_PRIVATE_REP)?;
        self.shared.ready(&qp)?;
        self.context
            .inner
            .call(&CmAccept {
                id: self.handle(),
                param,
            })
            .map(|_| ())
    }

    /// Refuses the connection request that this identifier came with (`rdma_reject`). Dropping it refuses too.
    ///
    /// # Errors
    /// [`Error::PrivateData`] for more than 148 bytes, and as any control verb.
    pub fn reject(&mut self, private_data: &[u8]) -> Result<(), Error> {
        let (private_len, private) = private(private_data, MAX_PRIVATE_REJ)?;
        self.context
            .inner
            .call(&CmReject {
                id: self.handle(),
                private_len,
                private,
            })
            .map(|_| ())
    }

    /// Ends the connection: both queue pairs go to the error state, both sides get `Disconnected`
    /// (`rdma_disconnect`).
    ///
    /// # Errors
    /// As any control verb; ENOTCONN without a connection.
    pub fn disconnect(&mut self) -> Result<(), Error> {
        self.context
            .inner
            .call(&CmDisconnect { id: self.handle() })?;
        self.shared.fail_qp();
        Ok(())
    }
}

impl Drop for CmId {
    fn drop(&mut self) {
        let inner = &self.context.inner;
        inner.ids.lock().remove(&self.shared.handle);
        let _ = inner.call(&CmDestroyId {
            id: self.shared.handle,
        });
    }
}
