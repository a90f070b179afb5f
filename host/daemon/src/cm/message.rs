//! The messages between the two sides of a connection, and what each does to the side that gets it.

use hyv_abi::control::{CmEventKind, CmParam, PortSpace};

use super::{Cm, Gid, Id, IdKey, Peer, STATUS_TIMED_OUT, State, Terms, rej, sidr};

/// What one side tells the other, named as in InfiniBand Architecture 1.4, section 12.6.
#[derive(Clone, Debug)]
pub(super) enum Message {
    /// Connect? In [`PortSpace::Udp`]: which queue pair serves?
    Req {
        /// Address and port that the request comes from.
        from: (Gid, u16),
        /// Parameters of the connecting side.
        param: Box<CmParam>,
    },
    /// Yes.
    Rep {
        /// Parameters of the accepting side.
        param: Box<CmParam>,
    },
    /// Ready.
    Rtu,
    /// No.
    Rej {
        /// One of [`rej`].
        reason: u32,
        /// Private data.
        param: Box<CmParam>,
    },
    /// The end.
    Dreq,
    /// Agreed.
    Drep,
    /// The answer to a request in [`PortSpace::Udp`], yes or no.
    SidrRep {
        /// One of [`sidr`].
        status: u32,
        /// Queue pair, Q_Key and private data.
        param: Box<CmParam>,
    },
    /// From a link: the peer did not answer, however often it was asked.
    Lost,
}

/// Where a message goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum To {
    /// Whoever listens on a port of this host.
    Port(PortSpace, Gid, u16),
    /// The other side of a connection.
    Peer(Peer),
}

/// A message on its way.
#[derive(Clone, Debug)]
pub(super) struct Envelope {
    from: Peer,
    to: To,
    message: Message,
}

impl Message {
    /// A REJ without private data.
    pub(super) fn rej(reason: u32) -> Self {
        Self::Rej {
            reason,
            param: Box::new(CmParam::EMPTY),
        }
    }

    /// The answer no in a port space, without private data.
    fn no(space: PortSpace, reason: u32, status: u32) -> Self {
        match space {
            PortSpace::Tcp => Self::rej(reason),
            PortSpace::Udp => Self::SidrRep {
                status,
                param: Box::new(CmParam::EMPTY),
            },
        }
    }
}

impl Cm {
    /// Sends a message; [`Cm::settle`] delivers it.
    pub(super) fn send(&mut self, from: Peer, to: To, message: Message) {
        self.mail.push_back(Envelope { from, to, message });
    }

    /// Sends a message to the other side of a connection, if there is one.
    pub(super) fn send_to_peer(&mut self, from: IdKey, message: Message) {
        if let Some(peer) = self.id(from).and_then(|id| id.peer) {
            self.send(Peer::Here(from), To::Peer(peer), message);
        }
    }

    /// Delivers every message, and those that come of it. Ends, because each is answered by at most one and no
    /// answer is answered again.
    pub(super) fn settle(&mut self) {
        while let Some(Envelope { from, to, message }) = self.mail.pop_front() {
            match (to, message) {
                (
                    To::Port(space, gid, port),
                    Message::Req {
                        from: source,
                        param,
                    },
                ) => self.on_req(from, (space, gid, port), source, &param),
                (To::Port(..), _) => {}
                (To::Peer(Peer::There(link)), message) => self.link_send(link, message),
                // From itself: the answer to a request that found nobody.
                (To::Peer(Peer::Here(to)), message) => {
                    if self
                        .id(to)
                        .is_some_and(|id| from == Peer::Here(to) || id.peer == Some(from))
                    {
                        self.deliver(from, to, message);
                    } else {
                        self.undeliverable(from, to, &message);
                    }
                }
            }
        }
    }

    fn on_req(
        &mut self,
        from: Peer,
        (space, gid, port): (PortSpace, Gid, u16),
        source: (Gid, u16),
        param: &CmParam,
    ) {
        let holder = self.ports(space).holder(gid, port);
        let listener = holder
            .and_then(|key| Some((key, self.id(key)?)))
            .filter(|(_, id)| id.state == State::Listening);
        let Some((key, listener)) = listener else {
            let no = Message::no(space, rej::INVALID_SERVICE_ID, sidr::UNSUPPORTED);
            return self.send(from, To::Peer(from), no);
        };
        let full = listener.waiting >= listener.backlog;
        let child = Id {
            gid,
            port,
            remote: source,
            peer: Some(from),
            listener: Some(key.handle),
            terms: Terms::of(param),
            ..Id::new(State::ReqReceived, space)
        };
        let handle = if full {
            None
        } else {
            self.users
                .get_mut(&key.user)
                .and_then(|u| u.ids.insert(child).ok())
        };
        let Some(handle) = handle else {
            let no = Message::no(space, rej::NO_RESOURCES, sidr::NO_QP);
            return self.send(from, To::Peer(from), no);
        };
        if let Some(l) = self.id_mut(key) {
            l.waiting += 1;
        }
        let child = IdKey {
            user: key.user,
            handle,
        };
        match from {
            Peer::Here(from) => {
                if let Some(id) = self.id_mut(from) {
                    id.peer = Some(Peer::Here(child));
                }
            }
            Peer::There(link) => self.link_owned(link, child),
        }
        self.raise(child, CmEventKind::ConnectRequest, 0, param);
    }

    fn deliver(&mut self, from: Peer, to: IdKey, message: Message) {
        let Some(state) = self.id(to).map(|id| id.state) else {
            return;
        };
        match (message, state) {
            (Message::Rep { mut param }, State::Connecting) => {
                self.set_deadline(to, None);
                if let Some(id) = self.id_mut(to) {
                    id.state = State::RepReceived;
                    // What this side chose for both.
                    param.path_mtu = id.terms.path_mtu;
                    param.ack_timeout = id.terms.ack_timeout;
                    param.retry_count = id.terms.retry_count;
                }
                self.raise(to, CmEventKind::ConnectResponse, 0, &param);
            }
            (Message::Rtu, State::Accepted) => {
                self.set_deadline(to, None);
                if let Some(id) = self.id_mut(to) {
                    id.state = State::Established;
                }
                self.raise(to, CmEventKind::Established, 0, &CmParam::EMPTY);
            }
            (
                Message::Rej { reason, param },
                State::Connecting | State::RepReceived | State::Accepted,
            ) => {
                self.finish(to, State::Closed, true);
                self.raise(to, CmEventKind::Rejected, reason, &param);
            }
            (Message::Rej { reason, param }, State::ReqReceived) => {
                // Nobody has seen the request yet: it never was.
                if self
                    .id(to)
                    .is_some_and(|id| id.is_pending(CmEventKind::ConnectRequest))
                {
                    self.erase(to);
                } else {
                    self.finish(to, State::Closed, false);
                    self.raise(to, CmEventKind::Rejected, reason, &param);
                }
            }
            // Data came over the queue pair before this did.
            (Message::Rej { .. }, State::Established) => {
                self.finish(to, State::Disconnected, true);
                self.raise(to, CmEventKind::Disconnected, 0, &CmParam::EMPTY);
            }
            (Message::SidrRep { status, param }, State::Connecting) => {
                if status == sidr::OK {
                    self.set_deadline(to, None);
                    if let Some(id) = self.id_mut(to) {
                        id.state = State::Established;
                    }
                    self.raise(to, CmEventKind::Established, 0, &param);
                } else {
                    self.finish(to, State::Closed, true);
                    self.raise(to, CmEventKind::Unreachable, status, &param);
                }
            }
            (Message::Lost, State::Connecting) => {
                self.finish(to, State::Closed, false);
                self.raise(
                    to,
                    CmEventKind::Unreachable,
                    STATUS_TIMED_OUT,
                    &CmParam::EMPTY,
                );
            }
            (Message::Lost, State::Accepted) => {
                self.finish(to, State::Closed, true);
                self.raise(
                    to,
                    CmEventKind::ConnectError,
                    STATUS_TIMED_OUT,
                    &CmParam::EMPTY,
                );
            }
            (
                Message::Dreq,
                State::Accepted | State::RepReceived | State::Established | State::Disconnecting,
            ) => {
                self.finish(to, State::Disconnected, true);
                self.raise(to, CmEventKind::Disconnected, 0, &CmParam::EMPTY);
                self.send(Peer::Here(to), To::Peer(from), Message::Drep);
            }
            (Message::Dreq, _) => self.send(Peer::Here(to), To::Peer(from), Message::Drep),
            (Message::Drep, State::Disconnecting) => {
                self.finish(to, State::Disconnected, false);
                self.raise(to, CmEventKind::Disconnected, 0, &CmParam::EMPTY);
            }
            // A message that crossed another one: the receiver has moved on, and its sender is being told.
            (
                Message::Req { .. }
                | Message::Rep { .. }
                | Message::Rtu
                | Message::Rej { .. }
                | Message::Drep
                | Message::SidrRep { .. }
                | Message::Lost,
                _,
            ) => {}
        }
    }

    /// The receiver does not know this connection (any more).
    pub(super) fn undeliverable(&mut self, from: Peer, to: IdKey, message: &Message) {
        let answer = match message {
            Message::Dreq => Message::Drep,
            Message::Rep { .. } | Message::Rtu => Message::rej(rej::INVALID_COMM_ID),
            Message::Req { .. }
            | Message::Rej { .. }
            | Message::Drep
            | Message::SidrRep { .. }
            | Message::Lost => return,
        };
        self.send(Peer::Here(to), To::Peer(from), answer);
    }

    /// The identifier is going away, on its user's wish or with its user: ends what it is in and erases it.
    pub(super) fn forget(&mut self, key: IdKey) {
        let Some((state, space)) = self.id(key).map(|id| (id.state, id.space)) else {
            return;
        };
        match state {
            State::Listening => self.stop_listening(key),
            State::Connecting => self.send_to_peer(key, Message::rej(rej::TIMEOUT)),
            State::ReqReceived | State::RepReceived => {
                self.send_to_peer(key, Message::no(space, rej::CONSUMER, sidr::REJECTED));
            }
            State::Established if space == PortSpace::Udp => {}
            State::Accepted | State::Established => self.send_to_peer(key, Message::Dreq),
            State::Idle
            | State::Bound
            | State::AddrResolved
            | State::RouteResolved
            | State::Disconnecting
            | State::Disconnected
            | State::Closed => {}
        }
        let connected = matches!(
            state,
            State::RepReceived | State::Accepted | State::Established
        );
        self.finish(key, State::Closed, connected);
        // Before the identifier goes, so that its peer still knows who is speaking.
        self.settle();
        self.erase(key);
    }

    /// Rejects the requests that the listener's user has not fetched. Fetched ones no longer need the listener.
    fn stop_listening(&mut self, listener: IdKey) {
        let Some(user) = self.users.get(&listener.user) else {
            return;
        };
        let space = user
            .ids
            .get(listener.handle)
            .map_or(PortSpace::Tcp, |id| id.space);
        let children: Vec<u32> = user
            .ids
            .handles()
            .filter(|h| {
                user.ids
                    .get(*h)
                    .is_some_and(|id| id.listener == Some(listener.handle))
            })
            .collect();
        for handle in children {
            let child = IdKey {
                user: listener.user,
                handle,
            };
            if self
                .id(child)
                .is_some_and(|id| id.is_pending(CmEventKind::ConnectRequest))
            {
                let no = Message::no(space, rej::INVALID_SERVICE_ID, sidr::UNSUPPORTED);
                self.send_to_peer(child, no);
                self.settle();
                self.erase(child);
            } else if let Some(id) = self.id_mut(child) {
                id.listener = None;
            }
        }
    }

    /// Ends what has waited too long. Call at [`Cm::next_timeout`] or later, with the time it is.
    pub fn handle_timeout(&mut self, now_ns: u64) {
        self.tick(now_ns);
        self.link_timeouts();
        while let Some(&(at, key)) = self.deadlines.first() {
            if at > now_ns {
                break;
            }
            self.set_deadline(key, None);
            let Some(state) = self.id(key).map(|id| id.state) else {
                continue;
            };
            self.send_to_peer(key, Message::rej(rej::TIMEOUT));
            let (kind, fail) = match state {
                State::Connecting => (CmEventKind::Unreachable, false),
                _ => (CmEventKind::ConnectError, true),
            };
            self.finish(key, State::Closed, fail);
            self.settle();
            self.raise(key, kind, STATUS_TIMED_OUT, &CmParam::EMPTY);
        }
    }
}
