use super::*;
use hyv_abi::control::{
    CmAccept, CmBindAddr, CmConnect, CmListen, CmReject, CmResolveAddr, CmResolveRoute,
    MAX_PRIVATE_REJ, MAX_PRIVATE_REP, MAX_PRIVATE_REQ, PRIVATE_LEN,
};

const GID: Gid = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1];
pub(super) const A: UserKey = UserKey(1);
pub(super) const B: UserKey = UserKey(2);
pub(super) const PORT: u32 = 7000;

/// A host with two users, the time, and what it was told to do.
pub(super) struct Host {
    pub(super) cm: Cm,
    pub(super) now: u64,
    effects: Vec<Effect>,
}

/// A connection in the making: A connects, B listens.
pub(super) struct Pair {
    pub(super) host: Host,
    listener: u32,
    pub(super) client: u32,
    pub(super) server: u32,
}

const CLIENT_QP: u32 = 100;
const SERVER_QP: u32 = 200;

fn param(qpn: u32, text: &[u8]) -> CmParam {
    let mut private = [0; PRIVATE_LEN];
    private[..text.len()].copy_from_slice(text);
    CmParam {
        qpn,
        psn: qpn + 1,
        private_len: text.len() as u32,
        private,
        ..CmParam::EMPTY
    }
}

/// What the other side sees of it: what was left open is chosen, and private data have no length.
fn offer(qpn: u32, text: &[u8], private_len: usize) -> CmParam {
    CmParam {
        path_mtu: 4096,
        ack_timeout: limits::ACK_TIMEOUT.into(),
        private_len: private_len as u32,
        ..param(qpn, text)
    }
}

impl Host {
    pub(super) fn with(config: CmConfig) -> Self {
        let mut cm = Cm::new(config, vec![GID]);
        cm.add_user(A);
        cm.add_user(B);
        Self {
            cm,
            now: 0,
            effects: Vec::new(),
        }
    }

    pub(super) fn new() -> Self {
        Self::with(CmConfig::default())
    }

    pub(super) fn bind(
        &mut self,
        user: UserKey,
        id: u32,
        port: u32,
    ) -> Result<CmAddrPort, VerbError> {
        self.cm
            .bind_addr(
                user,
                &CmBindAddr {
                    id,
                    port,
                    gid: [0; 16],
                },
            )
            .map(|a| a.port)
    }

    pub(super) fn listen(&mut self, user: UserKey, backlog: u32) -> u32 {
        let id = self.cm.create_id(user, 0).unwrap();
        assert_eq!(self.bind(user, id, PORT), Ok(PORT));
        self.cm.listen(user, &CmListen { id, backlog }).unwrap();
        id
    }

    pub(super) fn resolve(&mut self, user: UserKey, id: u32) -> Result<(), VerbError> {
        self.cm.resolve_addr(
            user,
            &CmResolveAddr {
                id,
                port: PORT,
                gid: [0; 16],
                timeout_ms: 100,
                reserved: 0,
            },
            |_, _| false,
        )
    }

    pub(super) fn resolved(&mut self, user: UserKey) -> u32 {
        let id = self.cm.create_id(user, 0).unwrap();
        self.resolve(user, id).unwrap();
        self.expect(user, id, CmEventKind::AddrResolved);
        self.cm
            .resolve_route(
                user,
                &CmResolveRoute {
                    id,
                    timeout_ms: 100,
                },
            )
            .unwrap();
        self.expect(user, id, CmEventKind::RouteResolved);
        id
    }

    pub(super) fn connect(&mut self, user: UserKey, id: u32, qpn: u32) -> Result<(), VerbError> {
        self.cm.connect(
            user,
            &CmConnect {
                id,
                param: param(qpn, b"hello"),
            },
            self.now,
            |_| true,
        )
    }

    pub(super) fn accept(&mut self, user: UserKey, id: u32, qpn: u32) -> Result<(), VerbError> {
        self.cm.accept(
            user,
            &CmAccept {
                id,
                param: param(qpn, b"welcome"),
            },
            self.now,
            |_| true,
        )
    }

    pub(super) fn reject(&mut self, user: UserKey, id: u32, text: &[u8]) -> Result<(), VerbError> {
        let p = param(0, text);
        self.cm.reject(
            user,
            &CmReject {
                id,
                private_len: p.private_len,
                private: p.private,
            },
        )
    }

    /// The oldest event must be this one, and its user must have been told.
    fn expect(&mut self, user: UserKey, id: u32, kind: CmEventKind) -> CmEvent {
        self.drain();
        assert!(
            self.effects.contains(&Effect::Notify(user)),
            "{user} was not told of {kind:?}"
        );
        let event = self
            .cm
            .get_event(user)
            .unwrap_or_else(|e| panic!("no {kind:?}: {e}"));
        assert_eq!(
            (CmEventKind::from_u32(event.event), event.id),
            (Some(kind), id)
        );
        event
    }

    fn none(&mut self, user: UserKey) {
        assert_eq!(
            self.cm.get_event(user),
            Err(VerbError::new(Errno::Again, Reason::NoEvent))
        );
    }

    fn drain(&mut self) {
        self.effects.extend(self.cm.take_effects());
    }

    fn failed(&mut self, user: UserKey, qpn: u32) -> bool {
        self.drain();
        self.effects.contains(&Effect::FailQp { user, qpn })
    }

    /// Nothing is left of any connection.
    pub(super) fn assert_clean(&self) {
        assert!(self.cm.deadlines.is_empty() && self.cm.qps.is_empty() && self.cm.mail.is_empty());
        assert!(self.cm.ports.iter().all(|p| p.len() == 0));
        assert_eq!(self.cm.links.len(), 0);
        assert!(
            self.cm
                .users
                .values()
                .all(|u| u.ids.len() == 0 && u.events.is_empty())
        );
    }
}

pub(super) type CmAddrPort = u32;

impl Pair {
    /// Up to the point where B has fetched the request.
    pub(super) fn requested() -> Self {
        let mut host = Host::new();
        let listener = host.listen(B, 4);
        let client = host.resolved(A);
        host.connect(A, client, CLIENT_QP).unwrap();
        let server = host.cm.users[&B].events[0].id;
        let e = host.expect(B, server, CmEventKind::ConnectRequest);
        assert_eq!(
            (e.listen_id, e.peer_gid, e.param),
            (listener, GID, offer(CLIENT_QP, b"hello", MAX_PRIVATE_REQ))
        );
        Self {
            host,
            listener,
            client,
            server,
        }
    }

    pub(super) fn accepted() -> Self {
        let mut it = Self::requested();
        it.host.accept(B, it.server, SERVER_QP).unwrap();
        let e = it.host.expect(A, it.client, CmEventKind::ConnectResponse);
        assert_eq!(e.param, offer(SERVER_QP, b"welcome", MAX_PRIVATE_REP));
        it
    }

    pub(super) fn established() -> Self {
        let mut it = Self::accepted();
        it.host.cm.establish(A, it.client).unwrap();
        it.host.expect(A, it.client, CmEventKind::Established);
        it.host.expect(B, it.server, CmEventKind::Established);
        assert_eq!(it.host.cm.next_timeout(), None);
        it.host.effects.clear();
        it
    }

    pub(super) fn states(&self) -> (State, State) {
        (
            self.host.cm.state(A, self.client).unwrap(),
            self.host.cm.state(B, self.server).unwrap(),
        )
    }
}

pub(super) fn err<T>(errno: Errno, reason: Reason) -> Result<T, VerbError> {
    Err(VerbError::new(errno, reason))
}

#[test]
fn connect_exchange_disconnect_destroy() {
    for disconnector in [A, B] {
        let mut p = Pair::established();
        assert_eq!(p.states(), (State::Established, State::Established));
        let id = if disconnector == A {
            p.client
        } else {
            p.server
        };
        p.host.cm.disconnect(disconnector, id).unwrap();
        assert!(p.host.failed(A, CLIENT_QP) && p.host.failed(B, SERVER_QP));
        p.host.expect(A, p.client, CmEventKind::Disconnected);
        p.host.expect(B, p.server, CmEventKind::Disconnected);
        assert_eq!(p.states(), (State::Disconnected, State::Disconnected));
        p.host.cm.disconnect(A, p.client).unwrap();
        p.host.cm.disconnect(B, p.server).unwrap();
        p.host.none(A);
        p.host.none(B);
        for (u, id) in [(A, p.client), (B, p.server), (B, p.listener)] {
            p.host.cm.destroy_id(u, id).unwrap();
            assert_eq!(
                p.host.cm.destroy_id(u, id),
                err(Errno::NoEnt, Reason::BadHandle)
            );
        }
        p.host.assert_clean();
    }
}

#[test]
fn one_user_may_connect_to_itself() {
    let mut h = Host::new();
    let l = h.listen(A, 1);
    let c = h.resolved(A);
    h.connect(A, c, 1).unwrap();
    let s = h.cm.get_event(A).unwrap().id;
    assert_eq!(h.accept(A, s, 1), err(Errno::Busy, Reason::QpInUseByCm));
    h.accept(A, s, 2).unwrap();
    h.expect(A, c, CmEventKind::ConnectResponse);
    h.cm.establish(A, c).unwrap();
    h.expect(A, c, CmEventKind::Established);
    h.expect(A, s, CmEventKind::Established);
    h.cm.remove_user(A);
    let _ = l;
    h.cm.remove_user(B);
    h.assert_clean();
    assert!(h.cm.take_effects().is_empty(), "nobody is left to be told");
}

#[test]
fn nobody_listens_backlog_full_and_ids_used_up() {
    let mut h = Host::with(CmConfig {
        max_ids: 4,
        ..CmConfig::default()
    });
    let c = h.resolved(A);
    h.connect(A, c, 1).unwrap();
    assert_eq!(
        h.expect(A, c, CmEventKind::Rejected).status,
        rej::INVALID_SERVICE_ID
    );
    h.cm.destroy_id(A, c).unwrap();
    // Bound is not listening.
    let id = h.cm.create_id(B, 0).unwrap();
    h.bind(B, id, PORT).unwrap();
    let c = h.resolved(A);
    h.connect(A, c, 1).unwrap();
    assert_eq!(
        h.expect(A, c, CmEventKind::Rejected).status,
        rej::INVALID_SERVICE_ID
    );
    h.cm.destroy_id(A, c).unwrap();

    h.cm.listen(B, &CmListen { id, backlog: 1 }).unwrap();
    let first = h.resolved(A);
    h.connect(A, first, 1).unwrap();
    let second = h.resolved(A);
    h.connect(A, second, 2).unwrap();
    assert_eq!(
        h.expect(A, second, CmEventKind::Rejected).status,
        rej::NO_RESOURCES
    );
    // Once the first is answered there is room.
    let s = h.cm.get_event(B).unwrap().id;
    h.reject(B, s, b"no").unwrap();
    let e = h.expect(A, first, CmEventKind::Rejected);
    assert_eq!(
        (e.status, &e.param.private[..2], e.param.private_len),
        (rej::CONSUMER, &b"no"[..], MAX_PRIVATE_REJ as u32)
    );
    let third = h.resolved(A);
    h.connect(A, third, 3).unwrap();
    h.none(A);
    // B's identifiers: the listener, the rejected one, the waiting one, and then it is full.
    let last = h.cm.create_id(B, 0).unwrap();
    assert_eq!(
        h.cm.create_id(B, 0),
        err(Errno::NoMem, Reason::QuotaObjects)
    );
    let waiting = h.cm.get_event(B).unwrap().id;
    h.accept(B, waiting, 9).unwrap();
    h.cm.destroy_id(A, first).unwrap();
    h.expect(A, third, CmEventKind::ConnectResponse);
    let fourth = h.resolved(A);
    h.connect(A, fourth, 4).unwrap();
    assert_eq!(
        h.expect(A, fourth, CmEventKind::Rejected).status,
        rej::NO_RESOURCES
    );
    h.cm.destroy_id(B, last).unwrap();
}

#[test]
fn a_request_that_nobody_answers_times_out() {
    let mut p = Pair::requested();
    let at = p.host.cm.next_timeout().unwrap();
    assert_eq!(at, limits::CONNECT_TIMEOUT_NS);
    p.host.cm.handle_timeout(at - 1);
    assert_eq!(p.states(), (State::Connecting, State::ReqReceived));
    p.host.cm.handle_timeout(at);
    assert_eq!(
        p.host.expect(A, p.client, CmEventKind::Unreachable).status,
        STATUS_TIMED_OUT
    );
    assert_eq!(
        p.host.expect(B, p.server, CmEventKind::Rejected).status,
        rej::TIMEOUT
    );
    assert_eq!(
        p.host.accept(B, p.server, SERVER_QP),
        err(Errno::NotConn, Reason::CmState)
    );
    assert_eq!(
        (p.host.cm.next_timeout(), p.states()),
        (None, (State::Closed, State::Closed))
    );

    // The same before B has fetched the request: it never hears of it.
    let mut h = Host::new();
    let l = h.listen(B, 1);
    let c = h.resolved(A);
    h.connect(A, c, CLIENT_QP).unwrap();
    h.cm.handle_timeout(u64::MAX);
    h.expect(A, c, CmEventKind::Unreachable);
    h.none(B);
    assert_eq!(h.cm.ids(B), 1);
    h.cm.destroy_id(A, c).unwrap();
    h.cm.destroy_id(B, l).unwrap();
    h.assert_clean();
}

#[test]
fn an_accepted_connection_that_is_never_established_times_out() {
    let mut p = Pair::accepted();
    p.host.cm.handle_timeout(limits::ESTABLISH_TIMEOUT_NS);
    assert_eq!(
        p.host.expect(B, p.server, CmEventKind::ConnectError).status,
        STATUS_TIMED_OUT
    );
    assert_eq!(
        p.host.expect(A, p.client, CmEventKind::Rejected).status,
        rej::TIMEOUT
    );
    assert!(p.host.failed(A, CLIENT_QP) && p.host.failed(B, SERVER_QP));
    assert_eq!(
        p.host.cm.establish(A, p.client),
        err(Errno::NotConn, Reason::CmState)
    );
    // Both queue pairs are free for another connection.
    assert!(p.host.cm.qps.is_empty());
}

#[test]
fn the_connecting_side_may_reject_the_response() {
    let mut p = Pair::accepted();
    p.host.reject(A, p.client, b"changed my mind").unwrap();
    let e = p.host.expect(B, p.server, CmEventKind::Rejected);
    assert_eq!(
        (e.status, &e.param.private[..16]),
        (rej::CONSUMER, &b"changed my mind\0"[..])
    );
    assert!(p.host.failed(B, SERVER_QP));
    assert_eq!(p.states(), (State::Closed, State::Closed));
}

#[test]
fn destroying_at_every_stage_tells_the_peer() {
    // (stage, who destroys, what the other side gets, with which status)
    type Case = (fn() -> Pair, UserKey, CmEventKind, u32);
    let cases: [Case; 6] = [
        (Pair::requested, A, CmEventKind::Rejected, rej::TIMEOUT),
        (Pair::requested, B, CmEventKind::Rejected, rej::CONSUMER),
        (Pair::accepted, A, CmEventKind::Rejected, rej::CONSUMER),
        (Pair::accepted, B, CmEventKind::Disconnected, 0),
        (Pair::established, A, CmEventKind::Disconnected, 0),
        (Pair::established, B, CmEventKind::Disconnected, 0),
    ];
    for (i, (stage, who, kind, status)) in cases.into_iter().enumerate() {
        for death in [false, true] {
            let mut p = stage();
            let (mine, (peer, theirs)) = if who == A {
                (p.client, (B, p.server))
            } else {
                (p.server, (A, p.client))
            };
            if death {
                p.host.cm.remove_user(who);
            } else {
                p.host.cm.destroy_id(who, mine).unwrap();
            }
            assert_eq!(
                p.host.expect(peer, theirs, kind).status,
                status,
                "case {i}, death {death}"
            );
            p.host.none(peer);
            let connected = i >= 2;
            let (peer_qp, my_qp) = if who == A {
                (SERVER_QP, CLIENT_QP)
            } else {
                (CLIENT_QP, SERVER_QP)
            };
            assert_eq!(
                p.host.failed(peer, peer_qp),
                connected || peer == A,
                "case {i}, death {death}"
            );
            // A dead user's queue pairs go with it.
            assert_eq!(
                p.host.failed(who, my_qp),
                connected && !death,
                "case {i}, death {death}"
            );
            assert_eq!(
                p.host.cm.disconnect(peer, theirs).is_ok(),
                kind == CmEventKind::Disconnected
            );
            p.host.cm.destroy_id(peer, theirs).unwrap();
            p.host.cm.remove_user(A);
            p.host.cm.remove_user(B);
            p.host.assert_clean();
        }
    }
}

#[test]
fn a_listener_that_goes_rejects_what_it_has_not_fetched() {
    let mut p = Pair::requested();
    let second = p.host.resolved(A);
    p.host.connect(A, second, 101).unwrap();
    assert_eq!(p.host.cm.ids(B), 3);
    p.host.cm.destroy_id(B, p.listener).unwrap();
    assert_eq!(
        p.host.expect(A, second, CmEventKind::Rejected).status,
        rej::INVALID_SERVICE_ID
    );
    p.host.none(B);
    assert_eq!(p.host.cm.ids(B), 1);
    // The fetched one lives on, and the port is free.
    p.host.accept(B, p.server, SERVER_QP).unwrap();
    p.host.expect(A, p.client, CmEventKind::ConnectResponse);
    p.host.listen(B, 1);
}

#[test]
fn ports_and_addresses() {
    let mut h = Host::new();
    let a = h.cm.create_id(A, 0).unwrap();
    let b = h.cm.create_id(B, 0).unwrap();
    h.bind(A, a, 80).unwrap();
    assert_eq!(h.bind(B, b, 80), err(Errno::AddrInUse, Reason::PortInUse));
    assert_eq!(h.bind(B, b, 65_536), err(Errno::Inval, Reason::BadAttr));
    let foreign = CmBindAddr {
        id: b,
        port: 81,
        gid: [7; 16],
    };
    assert_eq!(
        h.cm.bind_addr(B, &foreign),
        err(Errno::Inval, Reason::BadGid)
    );
    let any =
        h.cm.bind_addr(
            B,
            &CmBindAddr {
                id: b,
                port: 0,
                gid: GID,
            },
        )
        .unwrap();
    assert!(any.gid == GID && any.port >= u32::from(limits::FIRST_EPHEMERAL_PORT));
    h.cm.destroy_id(A, a).unwrap();
    let again = h.cm.create_id(B, 0).unwrap();
    h.bind(B, again, 80).unwrap();

    let c = h.cm.create_id(A, 0).unwrap();
    let far = CmResolveAddr {
        id: c,
        port: 80,
        gid: [7; 16],
        timeout_ms: 1,
        reserved: 0,
    };
    for _ in 0..1000 {
        h.cm.resolve_addr(A, &far, |_, _| true).unwrap();
    }
    assert_eq!(
        h.expect(A, c, CmEventKind::AddrError).status,
        Errno::HostUnreach as u32
    );
    h.none(A);
    assert_eq!(
        h.cm.resolve_addr(A, &CmResolveAddr { port: 0, ..far }, |_, _| true),
        err(Errno::Inval, Reason::BadAttr)
    );
    for gid in [
        [0; 16],
        GID,
        std::net::Ipv6Addr::LOCALHOST.octets(),
        std::net::Ipv4Addr::new(127, 0, 0, 9)
            .to_ipv6_mapped()
            .octets(),
    ] {
        let c = h.cm.create_id(A, 0).unwrap();
        h.cm.resolve_addr(A, &CmResolveAddr { id: c, gid, ..far }, |_, _| false)
            .unwrap();
        h.expect(A, c, CmEventKind::AddrResolved);
    }
}

#[test]
fn parameters_are_checked_before_anything_happens() {
    let mut p = Pair::requested();
    let h = &mut p.host;
    let c = h.resolved(A);
    let good = param(300, b"");
    let connect = |h: &mut Host, param, owned: bool| {
        h.cm.connect(A, &CmConnect { id: c, param }, 0, |_| owned)
    };
    assert_eq!(
        connect(h, good, false),
        err(Errno::NoEnt, Reason::BadHandle)
    );
    assert_eq!(
        connect(
            h,
            CmParam {
                qpn: CLIENT_QP,
                ..good
            },
            true
        ),
        err(Errno::Busy, Reason::QpInUseByCm)
    );
    let long = err(Errno::Inval, Reason::PrivateDataTooLong);
    assert_eq!(
        connect(
            h,
            CmParam {
                private_len: 57,
                ..good
            },
            true
        ),
        long
    );
    assert_eq!(
        connect(
            h,
            CmParam {
                private_len: u32::MAX,
                ..good
            },
            true
        ),
        long
    );
    for bad in [
        CmParam {
            psn: 1 << 24,
            ..good
        },
        CmParam {
            retry_count: 8,
            ..good
        },
        CmParam {
            rnr_retry_count: 8,
            ..good
        },
    ] {
        assert_eq!(connect(h, bad, true), err(Errno::Inval, Reason::BadAttr));
    }
    let accept = |h: &mut Host, param| {
        h.cm.accept(
            B,
            &CmAccept {
                id: p.server,
                param,
            },
            0,
            |_| true,
        )
    };
    assert_eq!(
        accept(
            h,
            CmParam {
                private_len: 197,
                ..good
            }
        ),
        long
    );
    assert_eq!(h.reject(B, p.server, &[1; 149]), long);
    // All of that changed nothing: both still work. What lies behind the private data does not travel.
    accept(
        h,
        CmParam {
            private_len: 196,
            private: [9; PRIVATE_LEN],
            ..good
        },
    )
    .unwrap();
    h.expect(A, p.client, CmEventKind::ConnectResponse);
    connect(
        h,
        CmParam {
            private_len: 2,
            private: [9; PRIVATE_LEN],
            ..good
        },
        true,
    )
    .unwrap();
    let e = h.cm.get_event(B).unwrap();
    assert_eq!(e.param.private[..4], [9, 9, 0, 0]);
}

#[test]
fn a_destroyed_queue_pair_is_not_failed_later() {
    let mut p = Pair::established();
    p.host.cm.qp_destroyed(A, CLIENT_QP);
    // Its number may come back for another connection.
    let c = p.host.resolved(A);
    p.host.connect(A, c, CLIENT_QP).unwrap();
    p.host.cm.disconnect(B, p.server).unwrap();
    assert!(p.host.failed(B, SERVER_QP) && !p.host.failed(A, CLIENT_QP));
}
