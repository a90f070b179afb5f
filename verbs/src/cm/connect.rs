//! The usual course in one call each: connect to a listener, and listen.

use alloc::vec::Vec;
use core::time::Duration;

use hyv_abi::control::{CmEventKind, PortSpace};

use crate::cm::{CmEvent, CmId, ConnParam, DatagramPeer, EventChannel};
use crate::context::{Context, Gid};
use crate::cq::CompletionQueue;
use crate::error::Error;
use crate::mr::ProtectionDomain;
use crate::qp::{QpCaps, QueuePair};

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct ConnectOptions<'a> {
    /// What the queue pair is made for.
    pub caps: QpCaps,
    /// What the peer is told.
    pub param: ConnParam<'a>,
    /// For all of it.
    pub timeout: Duration,
}

impl Default for ConnectOptions<'_> {
    fn default() -> Self {
        Self {
            caps: QpCaps::default(),
            param: ConnParam::default(),
            timeout: Duration::from_secs(5),
        }
    }
}

/// An established connection.
#[derive(Debug)]
pub struct Connection {
    /// Its identifier, with the queue pair.
    pub id: CmId,
    /// Where `Disconnected` will arrive.
    pub channel: EventChannel,
    /// What the peer said when it accepted.
    pub private_data: Vec<u8>,
}

impl Connection {
    /// Whether the connection has ended; takes the events that are pending. Costs two loads when there are none.
    ///
    /// # Errors
    /// As any control verb.
    pub fn ended(&self) -> Result<bool, Error> {
        while let Some(event) = self.channel.poll_event()? {
            if matches!(
                event.kind,
                CmEventKind::Disconnected | CmEventKind::DeviceRemoval
            ) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Connects to the listener on `port` at a GID or an IP address ([`Gid::LOCAL`] for this host's own). `prepare` runs when the queue
/// pair can take receives, before the peer knows of it: post those that the peer's first messages need.
///
/// # Errors
/// [`Error::Timeout`]; [`Error::Rejected`] by the peer; [`Error::Connection`] when there is no way or nobody
/// listens; what `prepare` gives; and as any control verb.
pub fn connect<E: From<Error>>(
    context: &Context,
    (gid, port): (impl Into<Gid>, u16),
    pd: &ProtectionDomain,
    (send_cq, recv_cq): (&CompletionQueue, &CompletionQueue),
    options: &ConnectOptions<'_>,
    prepare: impl FnOnce(&mut QueuePair) -> Result<(), E>,
) -> Result<Connection, E> {
    let steps = Steps::new(context, options.timeout);
    let mut id = steps.route(PortSpace::Tcp, (gid.into(), port))?;
    prepare(id.create_qp(pd, send_cq, recv_cq, &options.caps)?)?;
    id.connect(&options.param)?;
    let private_data = steps
        .expect(CmEventKind::Established)?
        .private_data()
        .to_vec();
    Ok(Connection {
        id,
        channel: steps.channel,
        private_data,
    })
}

/// The course that connecting takes, within a time.
struct Steps<'a> {
    context: &'a Context,
    channel: EventChannel,
    start: u64,
    timeout: Duration,
}

impl<'a> Steps<'a> {
    fn new(context: &'a Context, timeout: Duration) -> Self {
        Self {
            context,
            channel: EventChannel::new(context),
            start: context.now_ns(),
            timeout,
        }
    }

    fn left(&self) -> Result<Duration, Error> {
        let passed = Duration::from_nanos(self.context.now_ns().saturating_sub(self.start));
        match self.timeout.checked_sub(passed) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(Error::Timeout),
        }
    }

    /// Waits for an event; another one is an error.
    fn expect(&self, kind: CmEventKind) -> Result<CmEvent, Error> {
        let event = self
            .channel
            .get_event(Some(self.left()?))?
            .ok_or(Error::Timeout)?;
        if event.kind == kind {
            return Ok(event);
        }
        if let Some(reason) = event.reject_reason() {
            let mut private = [0; 8];
            for (to, from) in private.iter_mut().zip(event.private_data()) {
                *to = *from;
            }
            return Err(Error::Rejected { reason, private });
        }
        Err(Error::Connection {
            event: event.kind,
            status: event.status,
        })
    }

    /// An identifier with a route.
    fn route(&self, space: PortSpace, (gid, port): (Gid, u16)) -> Result<CmId, Error> {
        let mut id = self.channel.create_id_in(space)?;
        id.resolve_addr(gid, port, self.left()?)?;
        self.expect(CmEventKind::AddrResolved)?;
        id.resolve_route(self.left()?)?;
        self.expect(CmEventKind::RouteResolved)?;
        Ok(id)
    }
}

/// What answered to a datagram's request.
#[derive(Clone, Debug)]
pub struct DatagramService {
    /// Where datagrams go.
    pub peer: DatagramPeer,
    /// What it said beside that.
    pub private_data: Vec<u8>,
}

/// Asks which queue pair takes datagrams for `port` at a GID or an IP address, and tells the program there at most 180
/// bytes.
///
/// # Errors
/// [`Error::Timeout`]; [`Error::Rejected`] by the peer, or when nobody listens; [`Error::Connection`] when there is no way;
/// [`Error::PrivateData`], and as any control verb.
pub fn find_datagram(
    context: &Context,
    (addr, port): (impl Into<Gid>, u16),
    private_data: &[u8],
    timeout: Duration,
) -> Result<DatagramService, Error> {
    let steps = Steps::new(context, timeout);
    let mut id = steps.route(PortSpace::Udp, (addr.into(), port))?;
    id.connect(&ConnParam {
        private_data,
        ..ConnParam::default()
    })?;
    let event = steps.expect(CmEventKind::Established)?;
    let peer = event.datagram_peer().ok_or(Error::Connection {
        event: event.kind,
        status: event.status,
    })?;
    Ok(DatagramService {
        peer,
        private_data: event.private_data().to_vec(),
    })
}

/// Listens on `port` at a GID or an IP address ([`Gid::LOCAL`] for any of this device's): a listener and the channel where
/// connection requests arrive.
///
/// # Errors
/// As any control verb: EADDRINUSE for a taken port.
pub fn listen(
    context: &Context,
    addr: (impl Into<Gid>, u16),
    backlog: u32,
) -> Result<(CmId, EventChannel), Error> {
    listen_in(context, PortSpace::Tcp, addr, backlog)
}

/// Listens for datagrams' requests likewise; each comes as [`CmEventKind::ConnectRequest`], to be accepted with a queue
/// pair ([`CmId::use_qp`]).
///
/// # Errors
/// As [`listen`].
pub fn listen_datagram(
    context: &Context,
    addr: (impl Into<Gid>, u16),
    backlog: u32,
) -> Result<(CmId, EventChannel), Error> {
    listen_in(context, PortSpace::Udp, addr, backlog)
}

fn listen_in(
    context: &Context,
    space: PortSpace,
    (addr, port): (impl Into<Gid>, u16),
    backlog: u32,
) -> Result<(CmId, EventChannel), Error> {
    let channel = EventChannel::new(context);
    let mut id = channel.create_id_in(space)?;
    id.bind_addr(addr, port)?;
    id.listen(backlog)?;
    Ok((id, channel))
}
