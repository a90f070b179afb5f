//! Every call in every state, and any order of calls.

use super::tests::{A, B, Host, PORT, Pair, err};
use super::*;
use hyv_abi::control::{CmListen, CmResolveRoute};
use proptest::prelude::*;

#[test]
fn foreign_and_stale_identifiers_are_refused_by_every_call() {
    let mut h = Host::new();
    let foreign = h.cm.create_id(B, 0).unwrap();
    let stale = h.cm.create_id(A, 0).unwrap();
    h.cm.destroy_id(A, stale).unwrap();
    for id in [foreign, stale, 0, u32::MAX] {
        for (name, result) in every_call(&mut h, A, id) {
            assert_eq!(
                result.map_err(|e| e.reason),
                Err(Reason::BadHandle),
                "{name} of {id:#x}"
            );
        }
    }
}

/// Runs every call on one identifier, from the harmless to the destructive.
fn every_call(h: &mut Host, user: UserKey, id: u32) -> Vec<(&'static str, Result<(), VerbError>)> {
    (0..CALLS.len())
        .map(|i| (CALLS[i], one_call(h, user, id, i)))
        .collect()
}

const CALLS: [&str; 10] = [
    "bind",
    "listen",
    "resolve_addr",
    "resolve_route",
    "connect",
    "accept",
    "reject",
    "establish",
    "disconnect",
    "destroy",
];

fn one_call(h: &mut Host, user: UserKey, id: u32, call: usize) -> Result<(), VerbError> {
    match CALLS[call] {
        "bind" => h.bind(user, id, 0).map(drop),
        "listen" => h.cm.listen(user, &CmListen { id, backlog: 3 }),
        "resolve_addr" => h.resolve(user, id),
        "resolve_route" => {
            h.cm.resolve_route(user, &CmResolveRoute { id, timeout_ms: 1 })
        }
        "connect" => h.connect(user, id, 77),
        "accept" => h.accept(user, id, 77),
        "reject" => h.reject(user, id, b""),
        "establish" => h.cm.establish(user, id),
        "disconnect" => h.cm.disconnect(user, id),
        _ => h.cm.destroy_id(user, id),
    }
}

#[test]
fn every_call_in_every_state() {
    const OK: Option<Errno> = None;
    const INVAL: Option<Errno> = Some(Errno::Inval);
    const ISCONN: Option<Errno> = Some(Errno::IsConn);
    const NOTCONN: Option<Errno> = Some(Errno::NotConn);
    // Columns as in CALLS, without destroy, which always works.
    let table: [(State, [Option<Errno>; 9]); 13] = [
        (
            State::Idle,
            [OK, INVAL, OK, INVAL, INVAL, INVAL, INVAL, NOTCONN, NOTCONN],
        ),
        (
            State::Bound,
            [INVAL, OK, OK, INVAL, INVAL, INVAL, INVAL, NOTCONN, NOTCONN],
        ),
        (
            State::Listening,
            [
                INVAL, INVAL, INVAL, INVAL, INVAL, INVAL, INVAL, NOTCONN, NOTCONN,
            ],
        ),
        (
            State::AddrResolved,
            [
                INVAL, INVAL, INVAL, OK, INVAL, INVAL, INVAL, NOTCONN, NOTCONN,
            ],
        ),
        (
            State::RouteResolved,
            [
                INVAL, INVAL, INVAL, INVAL, OK, INVAL, INVAL, NOTCONN, NOTCONN,
            ],
        ),
        (
            State::Connecting,
            [
                ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, NOTCONN, NOTCONN,
            ],
        ),
        (
            State::ReqReceived,
            [
                ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, OK, OK, NOTCONN, NOTCONN,
            ],
        ),
        (
            State::RepReceived,
            [ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, OK, OK, OK],
        ),
        (
            State::Accepted,
            [
                ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, OK, OK,
            ],
        ),
        (
            State::Established,
            [
                ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, OK,
            ],
        ),
        (
            State::Disconnecting,
            [
                ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, NOTCONN, OK,
            ],
        ),
        (
            State::Disconnected,
            [
                ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, ISCONN, NOTCONN, OK,
            ],
        ),
        (
            State::Closed,
            [
                INVAL, INVAL, INVAL, INVAL, INVAL, NOTCONN, NOTCONN, NOTCONN, NOTCONN,
            ],
        ),
    ];
    for (state, row) in table {
        for (call, expected) in row.into_iter().enumerate() {
            let (mut h, user, id) = in_state(state);
            let result = one_call(&mut h, user, id, call);
            let at = format!("{} in {state:?}", CALLS[call]);
            match expected {
                None => assert_eq!(result, Ok(()), "{at}"),
                Some(errno) => {
                    assert_eq!(result, err(errno, Reason::CmState), "{at}");
                    assert_eq!(h.cm.state(user, id), Ok(state), "{at} changed the state");
                }
            }
            assert_eq!(
                one_call(&mut h, user, id, CALLS.len() - 1),
                Ok(()),
                "destroy after {at}"
            );
            h.cm.remove_user(A);
            h.cm.remove_user(B);
            h.assert_clean();
        }
    }
}

fn in_state(state: State) -> (Host, UserKey, u32) {
    let mut h = Host::new();
    let fresh = h.cm.create_id(A, 0).unwrap();
    match state {
        State::Idle => {}
        State::Bound => drop(h.bind(A, fresh, 1).unwrap()),
        State::Listening => {
            return {
                let id = h.listen(A, 1);
                (h, A, id)
            };
        }
        State::AddrResolved => h.resolve(A, fresh).unwrap(),
        State::RouteResolved => {
            return {
                let id = h.resolved(A);
                (h, A, id)
            };
        }
        State::Connecting | State::ReqReceived => {
            let p = Pair::requested();
            return if state == State::Connecting {
                (p.host, A, p.client)
            } else {
                (p.host, B, p.server)
            };
        }
        State::RepReceived | State::Accepted => {
            let p = Pair::accepted();
            return if state == State::RepReceived {
                (p.host, A, p.client)
            } else {
                (p.host, B, p.server)
            };
        }
        State::Established => {
            return {
                let p = Pair::established();
                (p.host, A, p.client)
            };
        }
        State::Disconnecting => {
            // Lasts as long as the answer is on its way, which on one host is no time at all.
            let mut p = Pair::established();
            p.host.cm.disconnect(A, p.client).unwrap();
            p.host
                .cm
                .id_mut(IdKey {
                    user: A,
                    handle: p.client,
                })
                .unwrap()
                .state = State::Disconnecting;
            return (p.host, A, p.client);
        }
        State::Disconnected => {
            let mut p = Pair::established();
            p.host.cm.disconnect(A, p.client).unwrap();
            return (p.host, A, p.client);
        }
        State::Closed => {
            let mut p = Pair::requested();
            p.host.reject(B, p.server, b"").unwrap();
            return (p.host, B, p.server);
        }
    }
    (h, A, fresh)
}

proptest! {
    /// Whatever users call, in whatever order: nothing panics, what waits is bounded, and when they are gone
    /// nothing is left.
    #[test]
    fn any_order_of_calls(
        calls in proptest::collection::vec((0usize..13, any::<bool>(), 0usize..8), 1..200),
    ) {
        let mut h = Host::with(CmConfig { max_ids: 8, ..CmConfig::default() });
        let mut ids: Vec<(UserKey, u32)> = Vec::new();
        for (call, side, pick) in calls {
            let user = if side { A } else { B };
            let chosen = ids.get(pick % ids.len().max(1)).copied();
            match (call, chosen) {
                (10, _) => ids.extend(h.cm.create_id(user, 0).ok().map(|id| (user, id))),
                (11, _) => {
                    if let Ok(e) = h.cm.get_event(user)
                        && e.event == CmEventKind::ConnectRequest as u32
                    {
                        ids.push((user, e.id));
                    }
                }
                (12, _) => {
                    h.now += limits::CONNECT_TIMEOUT_NS / 3;
                    h.cm.handle_timeout(h.now);
                }
                // All on one port, and a queue pair for each identifier.
                (0, Some((u, id))) => { let _ = h.bind(u, id, PORT); }
                (4, Some((u, id))) => { let _ = h.connect(u, id, id); }
                (5, Some((u, id))) => { let _ = h.accept(u, id, id); }
                (call, Some((u, id))) => { let _ = one_call(&mut h, u, id, call); }
                (_, None) => {}
            }
            h.cm.take_effects();
            prop_assert!(h.cm.mail.is_empty());
            for u in h.cm.users.values() {
                prop_assert!(u.ids.len() <= 8 && u.events.len() <= 12 * u.ids.len());
                for handle in u.ids.handles() {
                    let id = u.ids.get(handle).unwrap();
                    let waiting = u.ids.handles().filter(|c| u.ids.get(*c).unwrap().listener == Some(handle)).count();
                    prop_assert_eq!(id.waiting as usize, waiting);
                    prop_assert!(id.waiting <= id.backlog);
                    let pending = u.events.iter().filter(|e| e.id == handle).count();
                    prop_assert_eq!(id.pending.count_ones() as usize, pending);
                }
                prop_assert!(u.events.iter().all(|e| u.ids.get(e.id).is_some()));
            }
        }
        h.cm.remove_user(A);
        h.cm.remove_user(B);
        h.assert_clean();
        prop_assert!(h.cm.take_effects().is_empty());
    }
}
