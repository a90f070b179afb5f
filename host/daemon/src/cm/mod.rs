//! Connection management: identifiers, ports and the handshake that lets two queue pairs meet.
//!
//! A state machine without I/O and without a clock, in librdmacm's shape. Calls come from the control queue, time
//! comes as an argument, and what is to be done outside comes back as [`Effect`]s. The two sides of a connection
//! talk in messages (REQ, REP, RTU, REJ, DREQ, DREP) even when both are here: each side changes its own state only,
//! on a call or on a message. Between two identifiers of this host a message is delivered at once. A peer on another
//! host has a *link* in its place ([`wire`]), which makes a reliable conversation out of MADs that may be lost,
//! doubled, late or made up (InfiniBand Architecture 1.4, chapter 12 and annex A11).
//!
//! Events are kept per identifier and kind, at most one of each: what can wait is bounded by the identifiers.

mod arrive;
mod calls;
pub mod checks;
mod link;
mod message;
mod ports;
mod slots;
mod wire;

pub mod limits;

#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod wire_tests;

use std::collections::{BTreeSet, HashMap, VecDeque};

use hyv_abi::control::{CmEvent, CmEventKind, CmParam, PortSpace};
use hyv_abi::types::{Errno, Reason, VerbError};

use link::{LinkId, Links};
use message::Envelope;
use ports::Ports;
use slots::Slots;
pub use wire::{CmWire, MadStats};

/// A GID: an IPv6 address, or an IPv4 address mapped into one.
pub type Gid = [u8; 16];

/// A user of the device. Never used again for another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct UserKey(pub u64);

impl std::fmt::Display for UserKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// One identifier of all there are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct IdKey {
    /// Whose it is.
    pub user: UserKey,
    /// Its handle there.
    pub handle: u32,
}

/// What an identifier can be doing. In brackets the state of InfiniBand Architecture 1.4, section 12.9.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Made.
    Idle,
    /// Has a local port.
    Bound,
    /// Listens (Listen).
    Listening,
    /// Knows its peer's address.
    AddrResolved,
    /// Knows the route.
    RouteResolved,
    /// Sent a request (REQ Sent).
    Connecting,
    /// Has a request to accept or reject (REQ Rcvd).
    ReqReceived,
    /// Its request was accepted (REP Rcvd).
    RepReceived,
    /// Accepted, and waits for the other side (REP Sent).
    Accepted,
    /// The connection stands (Established).
    Established,
    /// Told the peer to end (DREQ Sent).
    Disconnecting,
    /// The connection ended (TimeWait).
    Disconnected,
    /// Rejected, timed out or gave up: only good for being destroyed.
    Closed,
}

/// A management datagram: the payload of a packet to QP1.
pub type Mad = [u8; hyv_roce::mad::LEN];

/// What has to be done outside this state machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Tell a user that an event can be fetched.
    Notify(UserKey),
    /// Move a queue pair to the error state, so that everything in it flushes.
    FailQp {
        /// Whose it is.
        user: UserKey,
        /// Its number.
        qpn: u32,
    },
    /// Send a MAD to a peer's QP1. It may get lost.
    SendMad {
        /// From which address of this host.
        src: Gid,
        /// To which.
        dst: Gid,
        /// What.
        mad: Box<Mad>,
    },
}

/// What can be set about connection management.
#[derive(Clone, Copy, Debug)]
pub struct CmConfig {
    /// Identifiers per user.
    pub max_ids: usize,
    /// Time for a request to be answered, ns.
    pub connect_timeout_ns: u64,
    /// Time between accepting and the other side's readiness, ns.
    pub establish_timeout_ns: u64,
}

impl Default for CmConfig {
    fn default() -> Self {
        Self {
            max_ids: limits::MAX_IDS,
            connect_timeout_ns: limits::CONNECT_TIMEOUT_NS,
            establish_timeout_ns: limits::ESTABLISH_TIMEOUT_NS,
        }
    }
}

/// Reasons of a REJ message, numbered as InfiniBand Architecture 1.4, table 123; the status of a `Rejected` event.
pub mod rej {
    /// The listener's backlog or its user's quota of identifiers is used up.
    pub const NO_RESOURCES: u32 = 3;
    /// The other side gave up waiting.
    pub const TIMEOUT: u32 = 4;
    /// The message cannot be understood or served.
    pub const UNSUPPORTED: u32 = 5;
    /// The other side no longer knows the connection.
    pub const INVALID_COMM_ID: u32 = 6;
    /// Nobody listens on the port.
    pub const INVALID_SERVICE_ID: u32 = 8;
    /// Not a reliable connection.
    pub const INVALID_TRANSPORT_TYPE: u32 = 9;
    /// The other side has an older connection with the same queue pair.
    pub const STALE_CONNECTION: u32 = 10;
    /// The address is not of the host that was asked.
    pub const INVALID_GID: u32 = 12;
    /// The other side's port does not take packets of that size.
    pub const INVALID_MTU: u32 = 26;
    /// The application rejected, or ended.
    pub const CONSUMER: u32 = 28;
}

/// How a datagram's request ended, numbered as InfiniBand Architecture 1.4, section 12.11.2.1; the status of an
/// `Unreachable` event in [`PortSpace::Udp`], as in librdmacm.
pub mod sidr {
    /// Here is the queue pair.
    pub const OK: u32 = 0;
    /// Nobody listens on the port.
    pub const UNSUPPORTED: u32 = 1;
    /// The application rejected.
    pub const REJECTED: u32 = 2;
    /// The listener's backlog or its user's quota of identifiers is used up.
    pub const NO_QP: u32 = 3;
}

/// Status of an event that a time limit caused: `ETIMEDOUT`.
pub const STATUS_TIMED_OUT: u32 = 110;

/// The other side of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Peer {
    /// An identifier of this host.
    Here(IdKey),
    /// Somebody elsewhere, for whom a link stands.
    There(LinkId),
}

/// What the connecting side chose for both.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Terms {
    path_mtu: u32,
    ack_timeout: u32,
    retry_count: u8,
    /// READs and atomics that it takes and makes at once.
    responder_resources: u8,
    initiator_depth: u8,
}

impl Terms {
    fn of(param: &CmParam) -> Self {
        Self {
            path_mtu: param.path_mtu,
            ack_timeout: param.ack_timeout,
            retry_count: param.retry_count,
            responder_resources: param.responder_resources,
            initiator_depth: param.initiator_depth,
        }
    }
}

#[derive(Debug)]
struct Id {
    state: State,
    space: PortSpace,
    terms: Terms,
    /// Local address, once there is one.
    gid: Gid,
    port: u16,
    /// Whether the port is held in [`Ports`].
    holds_port: bool,
    remote: (Gid, u16),
    /// The other side's identifier.
    peer: Option<Peer>,
    /// The queue pair of this connection.
    qpn: Option<u32>,
    deadline: Option<u64>,
    /// Bit per [`CmEventKind`] that waits to be fetched.
    pending: u16,
    /// The listener, while the request is neither accepted nor rejected.
    listener: Option<u32>,
    /// A listener's limit, and how many requests wait.
    backlog: u32,
    waiting: u32,
}

impl Id {
    fn new(state: State, space: PortSpace) -> Self {
        Self {
            state,
            space,
            terms: Terms::default(),
            gid: [0; 16],
            port: 0,
            holds_port: false,
            remote: ([0; 16], 0),
            peer: None,
            qpn: None,
            deadline: None,
            pending: 0,
            listener: None,
            backlog: 0,
            waiting: 0,
        }
    }

    fn is_pending(&self, kind: CmEventKind) -> bool {
        self.pending & 1 << kind as u32 != 0
    }
}

#[derive(Debug)]
struct User {
    /// The address of its device.
    gid: Gid,
    ids: Slots<Id>,
    events: VecDeque<Box<CmEvent>>,
}

/// Connection management of one host: all users and their identifiers.
#[derive(Debug)]
pub struct Cm {
    config: CmConfig,
    /// This host's GIDs; the first is the default.
    gids: Vec<Gid>,
    users: HashMap<UserKey, User>,
    /// Of [`PortSpace::Tcp`] and [`PortSpace::Udp`].
    ports: [Ports; 2],
    wire: Option<CmWire>,
    links: Links,
    stats: MadStats,
    /// The latest time that was told.
    now_ns: u64,
    /// Which identifier a queue pair belongs to.
    qps: HashMap<(UserKey, u32), IdKey>,
    deadlines: BTreeSet<(u64, IdKey)>,
    mail: VecDeque<Envelope>,
    effects: Vec<Effect>,
}

/// Whether an address means whoever asks.
fn is_loopback(gid: &Gid) -> bool {
    *gid == std::net::Ipv6Addr::LOCALHOST.octets()
        || (gid[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff] && gid[12] == 127)
}

fn no_id() -> VerbError {
    VerbError::new(Errno::NoEnt, Reason::BadHandle)
}

impl Cm {
    /// For a host with these GIDs; the first is the default, zeros if there is none.
    #[must_use]
    pub fn new(config: CmConfig, gids: Vec<Gid>) -> Self {
        Self {
            config,
            gids,
            users: HashMap::new(),
            ports: [Ports::default(), Ports::default()],
            wire: None,
            links: Links::new(0),
            stats: MadStats::default(),
            now_ns: 0,
            qps: HashMap::new(),
            deadlines: BTreeSet::new(),
            mail: VecDeque::new(),
            effects: Vec::new(),
        }
    }

    /// Peers on other hosts can be reached, and reach this one.
    pub fn set_wire(&mut self, wire: CmWire) {
        self.links = Links::new(wire.seed);
        self.wire = Some(wire);
    }

    /// Largest path MTU that the link takes now, bytes.
    pub fn set_path_mtu(&mut self, bytes: u32) {
        if let Some(wire) = &mut self.wire {
            wire.path_mtu = bytes;
        }
    }

    /// Whether peers on other hosts can be reached.
    #[must_use]
    pub const fn has_wire(&self) -> bool {
        self.wire.is_some()
    }

    /// Tells the time, ns on a clock that does not go back. Calls without a time of their own reckon from here.
    pub fn tick(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
    }

    /// A new user of the first GID.
    pub fn add_user(&mut self, user: UserKey) {
        self.add_user_at(user, self.gids.first().copied().unwrap_or_default());
    }

    /// A new user whose device has this GID, one of the host's.
    pub fn add_user_at(&mut self, user: UserKey, gid: Gid) {
        let max_ids = self.config.max_ids;
        self.users.entry(user).or_insert_with(|| User {
            gid,
            ids: Slots::new(max_ids),
            events: VecDeque::new(),
        });
    }

    /// A user is gone: its identifiers are destroyed and their peers told.
    pub fn remove_user(&mut self, user: UserKey) {
        let handles: Vec<u32> = self
            .users
            .get(&user)
            .map(|u| u.ids.handles().collect())
            .unwrap_or_default();
        for handle in handles {
            self.forget(IdKey { user, handle });
        }
        self.settle();
        self.users.remove(&user);
        self.effects.retain(
            |e| !matches!(e, Effect::Notify(u) | Effect::FailQp { user: u, .. } if *u == user),
        );
    }

    /// A queue pair is gone: no connection may fail a later one of the same number.
    pub fn qp_destroyed(&mut self, user: UserKey, qpn: u32) {
        if let Some(key) = self.qps.remove(&(user, qpn))
            && let Some(id) = self.id_mut(key)
        {
            id.qpn = None;
        }
    }

    /// What is to be done outside, since the last call.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// When [`Cm::handle_timeout`] wants to be called, on the clock of its argument.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        let ids = self.deadlines.first().map(|(at, _)| *at);
        let links = self.links.next_timeout().map(|(at, _)| at);
        ids.into_iter().chain(links).min()
    }

    /// Takes the oldest event of a user.
    ///
    /// # Errors
    /// `Again`/`NoEvent` if there is none.
    pub fn get_event(&mut self, user: UserKey) -> Result<CmEvent, VerbError> {
        let none = VerbError::new(Errno::Again, Reason::NoEvent);
        let u = self.users.get_mut(&user).ok_or(none)?;
        let event = u.events.pop_front().ok_or(none)?;
        if let Some(id) = u.ids.get_mut(event.id) {
            id.pending &= !(1 << event.event);
        }
        Ok(*event)
    }

    /// What an identifier is doing.
    ///
    /// # Errors
    /// `NoEnt`/`BadHandle`.
    pub fn state(&self, user: UserKey, handle: u32) -> Result<State, VerbError> {
        self.id(IdKey { user, handle })
            .map(|id| id.state)
            .ok_or_else(no_id)
    }

    /// Identifiers of a user.
    #[must_use]
    pub fn ids(&self, user: UserKey) -> usize {
        self.users.get(&user).map_or(0, |u| u.ids.len())
    }

    /// What was received, sent and refused.
    #[must_use]
    pub const fn mad_stats(&self) -> MadStats {
        self.stats
    }

    fn ports(&mut self, space: PortSpace) -> &mut Ports {
        match space {
            PortSpace::Tcp => &mut self.ports[0],
            PortSpace::Udp => &mut self.ports[1],
        }
    }

    /// The GID of a user's device.
    fn gid_of(&self, user: UserKey) -> Gid {
        self.users.get(&user).map_or([0; 16], |u| u.gid)
    }

    /// The local GID that an address means to a user; `None` when it is not this host's.
    fn local_gid(&self, user: UserKey, gid: Gid) -> Option<Gid> {
        let own = self.gid_of(user);
        // `--listen 127.0.0.1` makes a loopback address one that others may have, too.
        if gid == own || self.gids.contains(&gid) {
            Some(gid)
        } else if gid == [0; 16] || is_loopback(&gid) && !is_loopback(&own) {
            Some(own)
        } else {
            None
        }
    }

    fn id(&self, key: IdKey) -> Option<&Id> {
        self.users.get(&key.user)?.ids.get(key.handle)
    }

    fn id_mut(&mut self, key: IdKey) -> Option<&mut Id> {
        self.users.get_mut(&key.user)?.ids.get_mut(key.handle)
    }

    /// Queues an event, unless one of its kind waits already for the same identifier, and has its user told.
    fn raise(&mut self, key: IdKey, kind: CmEventKind, status: u32, param: &CmParam) {
        let Some(user) = self.users.get_mut(&key.user) else {
            return;
        };
        let Some(id) = user.ids.get_mut(key.handle) else {
            return;
        };
        if !id.is_pending(kind) {
            id.pending |= 1 << kind as u32;
            user.events.push_back(Box::new(CmEvent {
                event: kind as u32,
                status,
                id: key.handle,
                listen_id: id.listener.unwrap_or(0),
                peer_gid: id.remote.0,
                param: *param,
            }));
        }
        self.notify(key.user);
    }

    fn notify(&mut self, user: UserKey) {
        if !self.effects.contains(&Effect::Notify(user)) {
            self.effects.push(Effect::Notify(user));
        }
    }

    fn set_deadline(&mut self, key: IdKey, at: Option<u64>) {
        let Some(id) = self.id_mut(key) else { return };
        let old = std::mem::replace(&mut id.deadline, at);
        if let Some(old) = old {
            self.deadlines.remove(&(old, key));
        }
        if let Some(at) = at {
            self.deadlines.insert((at, key));
        }
    }

    /// The identifier's part in a connection is over: it gives back its queue pair, its time limit and its place in
    /// the backlog. With `fail`, the queue pair goes to the error state.
    fn finish(&mut self, key: IdKey, state: State, fail: bool) {
        self.set_deadline(key, None);
        self.leave_backlog(key);
        let Some(id) = self.id_mut(key) else { return };
        id.state = state;
        if let Some(qpn) = id.qpn.take() {
            self.qps.remove(&(key.user, qpn));
            if fail {
                self.effects.push(Effect::FailQp {
                    user: key.user,
                    qpn,
                });
            }
        }
    }

    /// The request of `key` no longer waits at its listener.
    fn leave_backlog(&mut self, key: IdKey) {
        if let Some(listener) = self.id_mut(key).and_then(|id| id.listener.take())
            && let Some(l) = self.id_mut(IdKey {
                user: key.user,
                handle: listener,
            })
        {
            l.waiting = l.waiting.saturating_sub(1);
        }
    }

    /// Removes an identifier and its events; tells nobody.
    fn erase(&mut self, key: IdKey) {
        self.finish(key, State::Closed, false);
        let Some(user) = self.users.get_mut(&key.user) else {
            return;
        };
        let Some(id) = user.ids.remove(key.handle) else {
            return;
        };
        if id.pending != 0 {
            user.events.retain(|e| e.id != key.handle);
        }
        if id.holds_port {
            self.ports(id.space).release(id.gid, id.port, key);
        }
        if let Some(Peer::There(link)) = id.peer {
            self.links.orphan(link);
        }
    }
}
