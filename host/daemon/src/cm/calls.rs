//! The calls of a user: one for each control verb of connection management.

use hyv_abi::control::{
    CmAccept, CmAddr, CmBindAddr, CmConnect, CmEventKind, CmListen, CmParam, CmReject,
    CmResolveAddr, CmResolveRoute, MAX_PRIVATE_REJ, MAX_PRIVATE_REP, MAX_PRIVATE_REQ,
};
use hyv_abi::types::{Errno, Reason, VerbError};

use super::message::{Message, To};
use super::{Cm, Effect, Id, IdKey, State, UserKey, limits, no_id, rej};

const MAX_PSN: u32 = (1 << 24) - 1;
/// Both retry counts have three bits.
const MAX_RETRY: u8 = 7;

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

/// Checks what a user says about its side, and drops what lies behind the private data.
fn checked(param: &CmParam, max_private: usize) -> Result<CmParam, VerbError> {
    let len = param.private_len as usize;
    if len > max_private {
        return Err(VerbError::new(Errno::Inval, Reason::PrivateDataTooLong));
    }
    if param.psn > MAX_PSN || param.retry_count > MAX_RETRY || param.rnr_retry_count > MAX_RETRY {
        return Err(VerbError::new(Errno::Inval, Reason::BadAttr));
    }
    let mut param = *param;
    param.private[len..].fill(0);
    Ok(param)
}

fn port(port: u32) -> Result<u16, VerbError> {
    u16::try_from(port).map_err(|_| VerbError::new(Errno::Inval, Reason::BadAttr))
}

impl Cm {
    /// `CmCreateId`.
    ///
    /// # Errors
    /// `NoMem`/`QuotaObjects`; `NoEnt` for an unknown user.
    pub fn create_id(&mut self, user: UserKey) -> Result<u32, VerbError> {
        let ids = &mut self.users.get_mut(&user).ok_or_else(no_id)?.ids;
        ids.insert(Id::new(State::Idle))
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
        let state = self.id(key).ok_or_else(no_id)?.state;
        if state != State::Idle {
            return Err(wrong_state(state));
        }
        let wanted = port(verb.port)?;
        let gid = if verb.gid == [0; 16] {
            None
        } else {
            Some(
                self.local_gid(verb.gid)
                    .ok_or(VerbError::new(Errno::Inval, Reason::BadGid))?,
            )
        };
        let in_use = VerbError::new(Errno::AddrInUse, Reason::PortInUse);
        let port = self.ports.claim(gid, wanted, key).ok_or(in_use)?;
        let id = self.id_mut(key).ok_or_else(no_id)?;
        (id.gid, id.port, id.holds_port, id.state) = (gid, port, true, State::Bound);
        Ok(CmAddr {
            gid: gid.unwrap_or_else(|| self.default_gid()),
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

    /// `CmResolveAddr`: answers with `AddrResolved` or `AddrError`. An address of this host needs no time for it.
    ///
    /// # Errors
    /// `Inval` for a port that is 0 or has more than 16 bits; a state past it.
    pub fn resolve_addr(&mut self, user: UserKey, verb: &CmResolveAddr) -> Result<(), VerbError> {
        let key = IdKey {
            user,
            handle: verb.id,
        };
        let state = self.id(key).ok_or_else(no_id)?.state;
        if !matches!(state, State::Idle | State::Bound) {
            return Err(wrong_state(state));
        }
        let port = port(verb.port)?;
        if port == 0 {
            return Err(VerbError::new(Errno::Inval, Reason::BadAttr));
        }
        let Some(remote) = self.local_gid(verb.gid) else {
            self.raise(
                key,
                CmEventKind::AddrError,
                Errno::HostUnreach as u32,
                &CmParam::EMPTY,
            );
            return Ok(());
        };
        let source = if state == State::Idle {
            Some((self.default_gid(), self.ports.ephemeral()))
        } else {
            None
        };
        let id = self.id_mut(key).ok_or_else(no_id)?;
        if let Some((gid, port)) = source {
            (id.gid, id.port) = (Some(gid), port);
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
        let (to, source) = (id.remote, id.gid.unwrap_or_else(|| self.default_gid()));
        let param = checked(&verb.param, MAX_PRIVATE_REQ)?;
        self.claim_qp(key, param.qpn, owns_qpn)?;
        if let Some(id) = self.id_mut(key) {
            id.state = State::Connecting;
        }
        self.set_deadline(
            key,
            Some(now_ns.saturating_add(self.config.connect_timeout_ns)),
        );
        self.send(
            key,
            To::Port(to.0, to.1),
            Message::Req {
                gid: source,
                param: Box::new(param),
            },
        );
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
        let param = checked(&verb.param, MAX_PRIVATE_REP)?;
        self.claim_qp(key, param.qpn, owns_qpn)?;
        self.leave_backlog(key);
        if let Some(id) = self.id_mut(key) {
            id.state = State::Accepted;
        }
        self.set_deadline(
            key,
            Some(now_ns.saturating_add(self.config.establish_timeout_ns)),
        );
        self.send_to_peer(
            key,
            Message::Rep {
                param: Box::new(param),
            },
        );
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
        let param = CmParam {
            private_len: verb.private_len,
            private: verb.private,
            ..CmParam::EMPTY
        };
        let param = checked(&param, MAX_PRIVATE_REJ)?;
        self.send_to_peer(
            key,
            Message::Rej {
                reason: rej::CONSUMER,
                param: Box::new(param),
            },
        );
        self.finish(key, State::Closed, true);
        self.settle();
        Ok(())
    }

    /// `CmEstablish`: the connecting side is ready to send. Both sides get `Established`.
    ///
    /// # Errors
    /// `NotConn` without an accepted request; `IsConn` when it stands already.
    pub fn establish(&mut self, user: UserKey, handle: u32) -> Result<(), VerbError> {
        let key = IdKey { user, handle };
        let id = self.id_mut(key).ok_or_else(no_id)?;
        match id.state {
            State::RepReceived => {}
            State::Established => return Err(wrong_state(id.state)),
            _ => return Err(NOT_CONNECTED),
        }
        id.state = State::Established;
        self.send_to_peer(key, Message::Rtu);
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
