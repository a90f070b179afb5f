//! The usual course in one call each: connect to a listener, and listen.

use alloc::vec::Vec;
use core::time::Duration;

use hyv_abi::control::CmEventKind;

use crate::cm::{CmEvent, CmId, ConnParam, EventChannel};
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

/// Connects to the listener on `port` at `gid` ([`Gid::LOCAL`] for this host's own). `prepare` runs when the queue
/// pair can take receives, before the peer knows of it: post those that the peer's first messages need.
///
/// # Errors
/// [`Error::Timeout`]; [`Error::Rejected`] by the peer; [`Error::Connection`] when there is no way or nobody
/// listens; what `prepare` gives; and as any control verb.
pub fn connect<E: From<Error>>(
    context: &Context,
    (gid, port): (Gid, u16),
    pd: &ProtectionDomain,
    (send_cq, recv_cq): (&CompletionQueue, &CompletionQueue),
    options: &ConnectOptions<'_>,
    prepare: impl FnOnce(&mut QueuePair) -> Result<(), E>,
) -> Result<Connection, E> {
    let start = context.now_ns();
    let left = || {
        let passed = Duration::from_nanos(context.now_ns().saturating_sub(start));
        match options.timeout.checked_sub(passed) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(Error::Timeout),
        }
    };
    let channel = EventChannel::new(context);
    let expect = |kind: CmEventKind| -> Result<CmEvent, Error> {
        let event = channel.get_event(Some(left()?))?.ok_or(Error::Timeout)?;
        match event.kind {
            got if got == kind => Ok(event),
            CmEventKind::Rejected => {
                let mut private = [0; 8];
                for (to, from) in private.iter_mut().zip(event.private_data()) {
                    *to = *from;
                }
                Err(Error::Rejected {
                    status: event.status,
                    private,
                })
            }
            other => Err(Error::Connection {
                event: other,
                status: event.status,
            }),
        }
    };
    let mut id = channel.create_id()?;
    id.resolve_addr(gid, port, left()?)?;
    expect(CmEventKind::AddrResolved)?;
    id.resolve_route(left()?)?;
    expect(CmEventKind::RouteResolved)?;
    prepare(id.create_qp(pd, send_cq, recv_cq, &options.caps)?)?;
    id.connect(&options.param)?;
    let private_data = expect(CmEventKind::Established)?.private_data().to_vec();
    Ok(Connection {
        id,
        channel,
        private_data,
    })
}

/// Listens on `port` at `gid` ([`Gid::LOCAL`] for any of this device's): a listener and the channel where
/// connection requests arrive.
///
/// # Errors
/// As any control verb: EADDRINUSE for a taken port.
pub fn listen(
    context: &Context,
    (gid, port): (Gid, u16),
    backlog: u32,
) -> Result<(CmId, EventChannel), Error> {
    let channel = EventChannel::new(context);
    let mut id = channel.create_id()?;
    id.bind_addr(gid, port)?;
    id.listen(backlog)?;
    Ok((id, channel))
}
