//! Connection identifiers.

use alloc::sync::{Arc, Weak};
use core::fmt;
use core::time::Duration;

use hyv_abi::control::{
    CmAccept, CmBindAddr, CmConnect, CmCreateId, CmDestroyId, CmDisconnect, CmEstablish, CmListen,
    CmParam, CmReject, CmResolveAddr, CmResolveRoute, MAX_PRIVATE_REJ, MAX_PRIVATE_REP,
    MAX_PRIVATE_REQ, MAX_PRIVATE_SIDR_REP, MAX_PRIVATE_SIDR_REQ, PRIVATE_LEN, PortSpace,
};
use hyv_abi::types::{Access, QpState, QpType};
use spin::mutex::SpinMutex;

use crate::cm::channel::ChannelInner;
use crate::context::{Context, Gid};
use crate::cq::CompletionQueue;
use crate::error::Error;
use crate::mr::ProtectionDomain;
use crate::qp::{QpCaps, QpControl, QpInitAttr, QueuePair, RtrParams, RtsParams};

/// Parameters of `connect` and `accept`, as `struct rdma_conn_param`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnParam<'a> {
    /// Bytes for the peer: at most 56 with `connect`, 196 with `accept`; in [`PortSpace::Udp`] 180 and 136.
    pub private_data: &'a [u8],
    /// READs and atomics that the peer may have outstanding here.
    pub responder_resources: u8,
    /// READs and atomics that this side may have outstanding.
    pub initiator_depth: u8,
    /// Retries when no answer comes, at most 7.
    pub retry_count: u8,
    /// Retries when the peer has no receive posted; 7 is for ever.
    pub rnr_retry_count: u8,
    /// With `connect`: the largest path MTU that is wanted, bytes; 0 takes what the port has.
    pub path_mtu: u32,
    /// With `connect`: ACK timeout for both sides, a 5-bit code (4.096 us x 2^code); 0 leaves it to the host.
    pub ack_timeout: u32,
    /// In [`PortSpace::Udp`], with `accept`: the Q_Key that this side's queue pair takes.
    pub qkey: u32,
}

/// Q_Key of the datagram queue pairs that [`CmId::create_qp`] makes (`RDMA_UDP_QKEY`).
pub const UDP_QKEY: u32 = 0x0123_4567;

impl Default for ConnParam<'_> {
    fn default() -> Self {
        Self {
            private_data: &[],
            responder_resources: 16,
            initiator_depth: 16,
            retry_count: 7,
            rnr_retry_count: 7,
            path_mtu: 0,
            ack_timeout: 0,
            qkey: UDP_QKEY,
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
    pub(crate) space: PortSpace,
    pub(crate) channel: Weak<ChannelInner>,
    pub(crate) qp: SpinMutex<Weak<QpControl>>,
    pub(crate) dialogue: SpinMutex<Dialogue>,
}

impl IdShared {
    pub(crate) fn new(handle: u32, space: PortSpace, channel: Weak<ChannelInner>) -> Self {
        let nothing = Dialogue {
            local: CmParam::EMPTY,
            remote: CmParam::EMPTY,
            peer: Gid::LOCAL,
        };
        Self {
            handle,
            space,
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
        // Each side says which PSN it expects first, and sends from what the other has said (12.7.31).
        let rtr = RtrParams::to(peer, remote.qpn, local.psn);
        qp.to_rtr(&RtrParams {
            path_mtu: or(remote.path_mtu, rtr.path_mtu),
            max_dest_rd_atomic: depth(local.responder_resources, remote.initiator_depth),
            ..rtr
        })?;
        let rts = RtsParams::from_psn(remote.psn);
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
        if self.space == PortSpace::Tcp
            && let Some(qp) = self.qp()
        {
            qp.shared.set_state(QpState::Err);
        }
    }

    /// The peer's answer came: ready the queue pair and say so.
    pub(crate) fn establish(&self, qp: &QpControl) -> Result<(), Error> {
        self.ready(qp)?;
        let id = self.handle;
        qp.context.call(&CmEstablish { id }).map(|_| ())
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
    pub(crate) fn create(
        context: &Context,
        channel: &Weak<ChannelInner>,
        space: PortSpace,
    ) -> Result<Self, Error> {
        let request = CmCreateId {
            port_space: space as u32,
            reserved: 0,
        };
        let handle = context.inner.call(&request)?.handle;
        Ok(Self::adopt(context, channel, space, handle))
    }

    /// Owns an identifier that the host has made.
    pub(crate) fn adopt(
        context: &Context,
        channel: &Weak<ChannelInner>,
        space: PortSpace,
        handle: u32,
    ) -> Self {
        let shared = Arc::new(IdShared::new(handle, space, Weak::clone(channel)));
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

    /// Reliable connections or datagrams.
    #[must_use]
    pub fn port_space(&self) -> PortSpace {
        self.shared.space
    }

    /// The peer's GID; [`Gid::LOCAL`] before it is known.
    #[must_use]
    pub fn peer(&self) -> Gid {
        self.shared.dialogue.lock().peer
    }

    /// Gives it a local address (a GID or an IP address, [`Gid::LOCAL`] for any) and port, 0 for any (`rdma_bind_addr`); says
    /// which they are.
    ///
    /// # Errors
    /// As any control verb: EADDRINUSE for a taken port, EINVAL for an address that is not this device's.
    pub fn bind_addr(&mut self, addr: impl Into<Gid>, port: u16) -> Result<(Gid, u16), Error> {
        let request = CmBindAddr {
            id: self.handle(),
            port: u32::from(port),
            gid: addr.into().0,
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

    /// Finds the way to a listener at a GID or an IP address ([`Gid::LOCAL`] for this host); answers with `AddrResolved` or `AddrError` (`rdma_resolve_addr`).
    ///
    /// # Errors
    /// As any control verb.
    pub fn resolve_addr(
        &mut self,
        addr: impl Into<Gid>,
        port: u16,
        timeout: Duration,
    ) -> Result<(), Error> {
        let request = CmResolveAddr {
            id: self.handle(),
            port: u32::from(port),
            gid: addr.into().0,
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

    /// Makes its queue pair (`rdma_create_qp`): of a reliable connection, in INIT, so that receives may be posted; in
    /// [`PortSpace::Udp`] of datagrams with [`UDP_QKEY`], ready to send. Replaces one that is there.
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
        let attr = QpInitAttr::new(QpType::Rc, send_cq, recv_cq).with_caps(*caps);
        self.create_qp_ex(pd, &attr)
    }

    /// The same with everything to choose but the type, which is the port space's.
    ///
    /// # Errors
    /// As [`ProtectionDomain::create_qp_ex`].
    pub fn create_qp_ex(
        &mut self,
        pd: &ProtectionDomain,
        attr: &QpInitAttr<'_>,
    ) -> Result<&mut QueuePair, Error> {
        let qp_type = match self.shared.space {
            PortSpace::Tcp => QpType::Rc,
            PortSpace::Udp => QpType::Ud,
        };
        let mut qp = pd.create_qp_ex(&QpInitAttr { qp_type, ..*attr })?;
        match self.shared.space {
            PortSpace::Tcp => qp.to_init(QP_ACCESS)?,
            PortSpace::Udp => qp.ready_datagram(UDP_QKEY, self.context.fresh_psn())?,
        }
        *self.shared.qp.lock() = Arc::downgrade(qp.control());
        Ok(self.qp.insert(qp))
    }

    /// In [`PortSpace::Udp`]: names a queue pair that is ready already and may serve any number of identifiers, instead of one
    /// of its own.
    pub fn use_qp(&mut self, qp: &QueuePair) {
        *self.shared.qp.lock() = Arc::downgrade(qp.control());
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

    fn offer(&self, param: &ConnParam<'_>, max: usize) -> Result<CmParam, Error> {
        let (private_len, private) = private(param.private_data, max)?;
        let udp = self.shared.space == PortSpace::Udp;
        let offer = CmParam {
            qpn: self.shared.qp().map_or(0, |qp| qp.shared.qpn),
            psn: self.context.fresh_psn(),
            responder_resources: param.responder_resources,
            initiator_depth: param.initiator_depth,
            retry_count: param.retry_count.min(7),
            rnr_retry_count: param.rnr_retry_count.min(7),
            path_mtu: param.path_mtu,
            ack_timeout: param.ack_timeout,
            qkey: if udp { param.qkey } else { 0 },
            private_len,
            private,
        };
        self.shared.dialogue.lock().local = offer;
        Ok(offer)
    }

    /// Asks for a connection; answers with `Established`, `Rejected`, `Unreachable` or `ConnectError`
    /// (`rdma_connect`). Call [`create_qp`](Self::create_qp) and post receives before.
    ///
    /// In [`PortSpace::Udp`] it asks which queue pair serves there, and needs none of its own yet: `Established` brings the
    /// answer ([`crate::cm::CmEvent::datagram_peer`]), `Unreachable` a refusal.
    ///
    /// # Errors
    /// [`Error::NoQueuePair`], [`Error::PrivateData`] for too much of it, and as any control verb.
    pub fn connect(&mut self, param: &ConnParam<'_>) -> Result<(), Error> {
        let max = match self.shared.space {
            PortSpace::Tcp if self.shared.qp().is_none() => return Err(Error::NoQueuePair),
            PortSpace::Tcp => MAX_PRIVATE_REQ,
            PortSpace::Udp => MAX_PRIVATE_SIDR_REQ,
        };
        let (id, param) = (self.handle(), self.offer(param, max)?);
        self.context
            .inner
            .call(&CmConnect { id, param })
            .map(|_| ())
    }

    /// Accepts the connection request that this identifier came with (`rdma_accept`): brings the queue pair to RTS
    /// and answers. `Established` follows when the peer is ready too. Call [`create_qp`](Self::create_qp) and
    /// post receives before.
    ///
    /// In [`PortSpace::Udp`] it answers with the queue pair, of [`create_qp`](Self::create_qp) or
    /// [`use_qp`](Self::use_qp), and that is all: no event follows.
    ///
    /// # Errors
    /// [`Error::NoQueuePair`], [`Error::PrivateData`] for too much of it, and as any control verb.
    pub fn accept(&mut self, param: &ConnParam<'_>) -> Result<(), Error> {
        let qp = self.shared.qp().ok_or(Error::NoQueuePair)?;
        let max = match self.shared.space {
            PortSpace::Tcp => MAX_PRIVATE_REP,
            PortSpace::Udp => MAX_PRIVATE_SIDR_REP,
        };
        let (id, param) = (self.handle(), self.offer(param, max)?);
        if self.shared.space == PortSpace::Tcp {
            self.shared.ready(&qp)?;
        }
        self.context.inner.call(&CmAccept { id, param }).map(|_| ())
    }

    /// Says that the connection stands (`rdma_establish`, `rdma_notify` of `IBV_EVENT_COMM_EST`): on the connecting side after a
    /// `ConnectResponse`, which shows only without a queue pair of the identifier's; on the accepting side when
    /// [`crate::AsyncEvent::QpCommEstablished`] comes before `Established`.
    ///
    /// # Errors
    /// As any control verb; EISCONN when it is known already.
    pub fn establish(&mut self) -> Result<(), Error> {
        let id = self.handle();
        self.context.inner.call(&CmEstablish { id }).map(|_| ())
    }

    /// Refuses the connection request that this identifier came with (`rdma_reject`). Dropping it refuses too.
    ///
    /// # Errors
    /// [`Error::PrivateData`] for more than 148 bytes (136 in [`PortSpace::Udp`]), and as any control verb.
    pub fn reject(&mut self, private_data: &[u8]) -> Result<(), Error> {
        let max = match self.shared.space {
            PortSpace::Tcp => MAX_PRIVATE_REJ,
            PortSpace::Udp => MAX_PRIVATE_SIDR_REP,
        };
        let (private_len, private) = private(private_data, max)?;
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
