//! The calls of a user: one for each control verb of connection management.

use hyv_abi::control::{
    CmAccept, CmAddr, CmBindAddr, CmConnect, CmEventKind, CmListen, CmParam, CmReject,
    CmResolveAddr, CmResolveRoute, MAX_PRIVATE_REJ, MAX_PRIVATE_REP, MAX_PRIVATE_REQ,
    MAX_PRIVATE_SIDR_REP, MAX_PRIVATE_SIDR_REQ, PortSpace,
};
use hyv_abi::types::{Errno, Reason, VerbError};

use super::message::{Message, To};
use super::{Cm, Effect, Gid, Id, IdKey, Peer, State, Terms, UserKey, limits, no_id, rej, sidr};

const MAX_PSN: u32 = (1 << 24) - 1;
/// Both retry counts have three bits.
const MAX_RETRY: u8 = 7;
/// An ACK timeout has five.
const MAX_ACK_TIMEOUT: u32 = 31;
/// Path MTU between queue pairs of one host, where packets are only counted.
const MAX_MTU: u32 = 4096;

/// The error for a call that the identifier's state does not allow.
fn wrong_state(state: State) -> VerbError {
    let errno = match state {
        State::Idle
        | State::Bound
        | State::Listening
        | State::AddrResolved
        | State::RouteResolved
        | State::Closed => Errno::Inval,
        State::Connecting
        | State::ReqReceived
        | State::RepReceived
        | State::Accepted
        | State::Established
        | State::Disconnecting
        | State::Disconnected => Errno::IsConn,
    };
    VerbError::new(errno, Reason::CmState)
}

/// The error for a call that needs a connection (or the making of one) where there is none.
const NOT_CONNECTED: VerbError = VerbError::new(Errno::NotConn, Reason::CmState);

/// Checks what a user says about its side, and clears what lies behind the private data.
fn checked(param: &CmParam, max_private: usize) -> Result<CmParam, VerbError> {
    let len = param.private_len as usize;
    if len > max_private {
        return Err(VerbError::new(Errno::Inval, Reason::PrivateDataTooLong));
    }
    let mtu = param.path_mtu;
    if param.psn > MAX_PSN
        || param.retry_count > MAX_RETRY
        || param.rnr_retry_count > MAX_RETRY
        || param.ack_timeout > MAX_ACK_TIMEOUT
        || mtu != 0 && !(mtu.is_power_of_two() && (256..=4096).contains(&mtu))
    {
        return Err(VerbError::new(Errno::Inval, Reason::BadAttr));
    }
    let mut param = *param;
    param.private[len..].fill(0);
    // The wire has no length: a message's private data are as long as they can be, filled up with zeros. Between two
    // sides of one host it is the same, or a program could tell.
    param.private_len = max_private as u32;
    Ok(param)
}

fn port(port: u32) -> Result<u16, VerbError> {
    u16::try_from(port).map_err(|_| VerbError::new(Errno::Inval, Reason::BadAttr))
}

impl Cm {
    /// `CmCreateId`. `space` is a [`PortSpace`]; 0 stands for [`PortSpace::Tcp`].
    ///
    /// # Errors
    /// `NoMem`/`QuotaObjects`; `Inval` for an unknown port space; `NoEnt` for an unknown user.
    pub fn create_id(&mut self, user: UserKey, space: u32) -> Result<u32, VerbError> {
        let space = match space {
            0 => PortSpace::Tcp,
            n => PortSpace::from_u32(n).ok_or(VerbError::new(Errno::Inval, Reason::BadAttr))?,
        };
        let ids = &mut self.users.get_mut(&user).ok_or_else(no_id)?.ids;
        ids.insert(Id::new(State::Idle, space))
            .map_err(|_| VerbError::new(Errno::NoMem, Reason::QuotaObjects))
    }

    /// `CmDestroyId`: ends what the identifier is in, and takes back its events.
    ///
    /// # Errors
    /// `NoEnt`/`BadHandle`.
    pub fn destroy_id(&mut self, user: UserKey, handle: u32) -> Result<(), VerbError> {
        let key = IdKey { user, handle };
        self.id(key).ok_or_else(no_id)?;
        self.forget(key);
        self.settle();
        Ok(())
    }

    /// `CmBindAddr`: port 0 is given a free one.
    ///
    /// # Errors
    /// `AddrInUse`/`PortInUse`; `Inval` for a foreign GID, a port of more than 16 bits or an identifier that is not new.
    pub fn bind_addr(&mut self, user: UserKey, verb: &CmBindAddr) -> Result<CmAddr, VerbError> {
        let key = IdKey {
            user,
            handle: verb.id,
        };
        let id = self.id(key).ok_or_else(no_id)?;
        let (state, space) = (id.state, id.space);
        if state != State::Idle {
            return Err(wrong_state(state));
        }
        let wanted = port(verb.port)?;
        // A device has one address, so "any" is that one; other users' devices have ports of their own.
        let gid = self
            .local_gid(user, verb.gid)
            .filter(|gid| *gid == self.gid_of(user))
            .ok_or(VerbError::new(Errno::Inval, Reason::BadGid))?;
        let in_use = VerbError::new(Errno::AddrInUse, Reason::PortInUse);
        let port = self.ports(space).claim(gid, wanted, key).ok_or(in_use)?;
        let id = self.id_mut(key).ok_or_else(no_id)?;
        (id.gid, id.port, id.holds_port, id.state) = (gid, port, true, State::Bound);
        Ok(CmAddr {
            gid,
            port: port.into(),
            reserved: 0,
        })
    }

    /// `CmListen`.
    ///
    /// # Errors
    /// `Inval` for an identifier that is not bound, or a backlog outside its limits.
    pub fn listen(&mut self, user: UserKey, verb: &CmListen) -> Result<(), VerbError> {
        let id = self
            .id_mut(IdKey {
                user,
                handle: verb.id,
            })
            .ok_or_else(no_id)?;
        if id.state != State::Bound {
            return Err(wrong_state(id.state));
        }
        if !(1..=limits::MAX_BACKLOG).contains(&verb.backlog) {
            return Err(VerbError::new(Errno::Inval, Reason::BadAttr));
        }
        (id.state, id.backlog) = (State::Listening, verb.backlog);
        Ok(())
    }

    /// `CmResolveAddr`: answers with `AddrResolved` or `AddrError`. An address of this host needs no time for it; for any
    /// other, `has_route` says whether packets can go from the first address to the second.
    ///
    /// # Errors
    /// `Inval` for a port that is 0 or has more than 16 bits; a state past it.
    pub fn resolve_addr(
        &mut self,
        user: UserKey,
        verb: &CmResolveAddr,
        has_route: impl FnOnce(&Gid, &Gid) -> bool,
    ) -> Result<(), VerbError> {
        let key = IdKey {
            user,
            handle: verb.id,
        };
        let id = self.id(key).ok_or_else(no_id)?;
        let (state, space) = (id.state, id.space);
        if !matches!(state, State::Idle | State::Bound) {
            return Err(wrong_state(state));
        }
        let port = port(verb.port)?;
        if port == 0 {
            return Err(VerbError::new(Errno::Inval, Reason::BadAttr));
        }
        let own = self.gid_of(user);
        let there = || {
            let reachable = self.wire.is_some() && is_unicast(&verb.gid);
            (reachable && has_route(&own, &verb.gid)).then_some(verb.gid)
        };
        let Some(remote) = self.local_gid(user, verb.gid).or_else(there) else {
            self.raise(
                key,
                CmEventKind::AddrError,
                Errno::HostUnreach as u32,
                &CmParam::EMPTY,
            );
            return Ok(());
        };
        let source = (state == State::Idle).then(|| self.ports(space).ephemeral());
        let id = self.id_mut(key).ok_or_else(no_id)?;
        if let Some(port) = source {
            (id.gid, id.port) = (own, port);
        }
        (id.remote, id.state) = ((remote, port), State::AddrResolved);
        self.raise(key, CmEventKind::AddrResolved, 0, &CmParam::EMPTY);
        Ok(())
    }

    /// `CmResolveRoute`: answers with `RouteResolved`.
    ///
    /// # Errors
    /// `Inval`/`CmState` before the address is resolved; a state past it.
    pub fn resolve_route(&mut self, user: UserKey, verb: &CmResolveRoute) -> Result<(), VerbError> {
        let key = IdKey {
            user,
            handle: verb.id,
        };
        let id = self.id_mut(key).ok_or_else(no_id)?;
        if id.state != State::AddrResolved {
            return Err(wrong_state(id.state));
        }
        id.state = State::RouteResolved;
        self.raise(key, CmEventKind::RouteResolved, 0, &CmParam::EMPTY);
        Ok(())
    }

    /// The queue pair that a side brings: the user's own, and of no other connection.
    fn claim_qp(
        &mut self,
        key: IdKey,
        qpn: u32,
        owns_qpn: impl FnOnce(u32) -> bool,
    ) -> Result<(), VerbError> {
        if self.id(key).is_some_and(|id| id.space == PortSpace::Udp) {
            // One datagram queue pair serves any number of peers, and nothing of theirs ends it.
            return match owns_qpn(qpn) {
                true => Ok(()),
                false => Err(VerbError::new(Errno::NoEnt, Reason::BadHandle)),
            };
        }
        if self.qps.contains_key(&(key.user, qpn)) {
            return Err(VerbError::new(Errno::Busy, Reason::QpInUseByCm));
        }
        if !owns_qpn(qpn) {
            return Err(VerbError::new(Errno::NoEnt, Reason::BadHandle));
        }
        let id = self.id_mut(key).ok_or_else(no_id)?;
        id.qpn = Some(qpn);
        self.qps.insert((key.user, qpn), key);
        Ok(())
    }

    /// `CmConnect`: answers with `ConnectResponse`, `Rejected` or `Unreachable`. `owns_qpn` says whether a queue pair is
    /// this user's.
    ///
    /// # Errors
    /// `Inval` before the route is resolved or for parameters out of range; `Busy`/`QpInUseByCm`; `NoEnt` for a queue
    /// pair that is not this user's.
    pub fn connect(
        &mut self,
        user: UserKey,
        verb: &CmConnect,
        now_ns: u64,
        owns_qpn: impl FnOnce(u32) -> bool,
    ) -> Result<(), VerbError> {
        let key = IdKey {
            user,
            handle: verb.id,
        };
        let id = self.id(key).ok_or_else(no_id)?;
        if id.state != State::RouteResolved {
            return Err(wrong_state(id.state));
        }
        let (space, to) = (id.space, id.remote);
        let source = (id.gid, id.port);
        let mut param = match space {
            PortSpace::Tcp => checked(&verb.param, MAX_PRIVATE_REQ)?,
            PortSpace::Udp => checked(&verb.param, MAX_PRIVATE_SIDR_REQ)?,
        };
        let here = self.gids.contains(&to.0) || to.0 == self.gid_of(user);
        let most = match (&self.wire, here) {
            (Some(wire), false) => wire.path_mtu,
            _ => MAX_MTU,
        };
        param.path_mtu = match param.path_mtu {
            0 => most,
            mtu => mtu.min(most),
        };
        if param.ack_timeout == 0 {
            param.ack_timeout = limits::ACK_TIMEOUT.into();
        }
        // Whoever asks for a datagram's queue pair need not have one yet.
        if space == PortSpace::Tcp || param.qpn != 0 {
            self.claim_qp(key, param.qpn, owns_qpn)?;
        }
        self.tick(now_ns);
        if let Some(id) = self.id_mut(key) {
            (id.state, id.terms) = (State::Connecting, Terms::of(&param));
        }
        let param = Box::new(param);
        if here {
            self.set_deadline(
                key,
                Some(now_ns.saturating_add(self.config.connect_timeout_ns)),
            );
            self.send(
                Peer::Here(key),
                To::Port(space, to.0, to.1),
                Message::Req {
                    from: source,
                    param,
                },
            );
        } else {
            self.call_out(key, &param);
        }
        self.settle();
        Ok(())
    }

    /// The state of an identifier that stands for a request, or why it does not (any more).
    fn request(&self, key: IdKey) -> Result<(), VerbError> {
        match self.id(key).ok_or_else(no_id)?.state {
            State::ReqReceived => Ok(()),
            State::Closed => Err(NOT_CONNECTED),
            state => Err(wrong_state(state)),
        }
    }

    /// `CmAccept`: the connecting side gets `ConnectResponse`; when it is ready, this side gets `Established`.
    ///
    /// # Errors
    /// `NotConn` when the other side gave up; otherwise as [`Cm::connect`].
    pub fn accept(
        &mut self,
        user: UserKey,
        verb: &CmAccept,
        now_ns: u64,
        owns_qpn: impl FnOnce(u32) -> bool,
    ) -> Result<(), VerbError> {
        let key = IdKey {
            user,
            handle: verb.id,
        };
        self.request(key)?;
        let id = self.id(key).ok_or_else(no_id)?;
        let (space, terms, peer) = (id.space, id.terms, id.peer);
        let mut param = match space {
            PortSpace::Tcp => checked(&verb.param, MAX_PRIVATE_REP)?,
            PortSpace::Udp => checked(&verb.param, MAX_PRIVATE_SIDR_REP)?,
        };
        self.claim_qp(key, param.qpn, owns_qpn)?;
        self.tick(now_ns);
        self.leave_backlog(key);
        // More than the other side makes or takes would never be used.
        param.responder_resources = param.responder_resources.min(terms.initiator_depth);
        param.initiator_depth = param.initiator_depth.min(terms.responder_resources);
        let param = Box::new(param);
        let (state, answer) = match space {
            PortSpace::Tcp => (State::Accepted, Message::Rep { param }),
            PortSpace::Udp => (
                State::Established,
                Message::SidrRep {
                    status: sidr::OK,
                    param,
                },
            ),
        };
        if let Some(id) = self.id_mut(key) {
            id.state = state;
        }
        if state == State::Accepted && matches!(peer, Some(Peer::Here(_))) {
            // A link has time limits of its own.
            self.set_deadline(
                key,
                Some(now_ns.saturating_add(self.config.establish_timeout_ns)),
            );
        }
        self.send_to_peer(key, answer);
        self.settle();
        Ok(())
    }

    /// `CmReject`: the other side gets `Rejected`. For a request, or by the connecting side for a response.
    ///
    /// # Errors
    /// `Inval` for private data that is too long; a state without anything to reject.
    pub fn reject(&mut self, user: UserKey, verb: &CmReject) -> Result<(), VerbError> {
        let key = IdKey {
            user,
            handle: verb.id,
        };
        let response = self
            .id(key)
            .is_some_and(|id| id.state == State::RepReceived);
        if !response {
            self.request(key)?;
        }
        let space = self.id(key).ok_or_else(no_id)?.space;
        let param = CmParam {
            private_len: verb.private_len,
            private: verb.private,
            ..CmParam::EMPTY
        };
        let answer = match space {
            PortSpace::Tcp => Message::Rej {
                reason: rej::CONSUMER,
                param: Box::new(checked(&param, MAX_PRIVATE_REJ)?),
            },
            PortSpace::Udp => Message::SidrRep {
                status: sidr::REJECTED,
                param: Box::new(checked(&param, MAX_PRIVATE_SIDR_REP)?),
            },
        };
        self.send_to_peer(key, answer);
        self.finish(key, State::Closed, true);
        self.settle();
        Ok(())
    }

    /// `CmEstablish`: the connecting side is ready to send. Both sides get `Established`. On the accepting side: something
    /// came over the queue pair (`IBV_EVENT_COMM_EST`), so the other side is ready, whatever became of its RTU.
    ///
    /// # Errors
    /// `NotConn` without an accepted request; `IsConn` when it stands already.
    pub fn establish(&mut self, user: UserKey, handle: u32) -> Result<(), VerbError> {
        let key = IdKey { user, handle };
        let id = self.id_mut(key).ok_or_else(no_id)?;
        match id.state {
            State::RepReceived => self.send_to_peer(key, Message::Rtu),
            State::Accepted => {
                if let Some(Peer::There(link)) = id.peer {
                    self.link_established(link);
                }
                self.set_deadline(key, None);
            }
            State::Established => return Err(wrong_state(id.state)),
            _ => return Err(NOT_CONNECTED),
        }
        if let Some(id) = self.id_mut(key) {
            id.state = State::Established;
        }
        self.raise(key, CmEventKind::Established, 0, &CmParam::EMPTY);
        self.settle();
        Ok(())
    }

    /// `CmDisconnect`: both queue pairs go to the error state, both sides get `Disconnected`. Once more changes nothing.
    ///
    /// # Errors
    /// `NotConn` without a connection.
    pub fn disconnect(&mut self, user: UserKey, handle: u32) -> Result<(), VerbError> {
        let key = IdKey { user, handle };
        let id = self.id_mut(key).ok_or_else(no_id)?;
        match id.state {
            // Datagrams go without a connection.
            State::Established if id.space == PortSpace::Udp => return Err(NOT_CONNECTED),
            State::RepReceived | State::Accepted | State::Established => {}
            // Both sides may end it at once.
            State::Disconnecting | State::Disconnected => return Ok(()),
            _ => return Err(NOT_CONNECTED),
        }
        id.state = State::Disconnecting;
        if let Some(qpn) = id.qpn {
            self.effects.push(Effect::FailQp { user, qpn });
        }
        self.set_deadline(key, None);
        self.send_to_peer(key, Message::Dreq);
        self.settle();
        Ok(())
    }
}

/// Whether a GID can be the address of one host.
fn is_unicast(gid: &Gid) -> bool {
    let ip = std::net::Ipv6Addr::from(*gid);
    match ip.to_ipv4_mapped() {
        Some(v4) => !v4.is_unspecified() && !v4.is_multicast() && !v4.is_broadcast(),
        None => !ip.is_unspecified() && !ip.is_multicast(),
    }
}
