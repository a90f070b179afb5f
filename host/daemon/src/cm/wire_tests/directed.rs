//! Each exchange, each refusal, each loss.

use super::*;

#[test]
fn a_connection_is_agreed_used_and_ended() {
    for disconnector in [0, 1] {
        let mut net = Net::new(2, 7, NONE);
        net.nodes[0].cm.set_wire(CmWire {
            ca_guid: 1,
            path_mtu: 1024,
            traffic_class: 0,
            seed: 3,
        });
        let listener = net.listen(1, PortSpace::Tcp, 8);
        let client = net.resolved(0, 1, PortSpace::Tcp);
        let asked = CmParam {
            initiator_depth: 4,
            responder_resources: 3,
            retry_count: 6,
            rnr_retry_count: 5,
            ack_timeout: 18,
            psn: 0xff_fffe,
            ..param(CLIENT_QP, b"hello")
        };
        net.connect_with(0, client, asked).unwrap();
        let request = net.request(1, listener);
        assert_eq!(request.peer_gid, gid(0));
        let expected = CmParam {
            path_mtu: 1024,
            private_len: 56,
            ..asked
        };
        assert_eq!(request.param, expected);
        let offered = CmParam {
            initiator_depth: 9,
            responder_resources: 9,
            rnr_retry_count: 1,
            retry_count: 0,
            psn: 0,
            ..param(SERVER_QP, b"welcome")
        };
        net.accept_with(1, request.id, offered).unwrap();
        let response = net.expect(0, client, CmEventKind::ConnectResponse);
        let expected = CmParam {
            initiator_depth: 3,
            responder_resources: 4,
            retry_count: 6,
            path_mtu: 1024,
            ack_timeout: 18,
            private_len: 196,
            ..offered
        };
        assert_eq!(response.param, expected);
        assert_eq!(response.peer_gid, gid(1));
        net.cm(0).establish(U, client).unwrap();
        net.expect(0, client, CmEventKind::Established);
        net.expect(1, request.id, CmEventKind::Established);

        let ids = [client, request.id];
        net.cm(disconnector)
            .disconnect(U, ids[disconnector])
            .unwrap();
        for n in [0, 1] {
            net.expect(n, ids[n], CmEventKind::Disconnected);
            net.quiet(n);
        }
        assert!(net.nodes[0].failed.contains(&CLIENT_QP));
        assert!(net.nodes[1].failed.contains(&SERVER_QP));
        let names: Vec<_> = net.log.iter().map(|l| l.2).collect();
        assert_eq!(names, ["REQ", "REP", "RTU", "DREQ", "DREP"]);
        for (n, id) in [(0, client), (1, request.id), (1, listener)] {
            net.cm(n).destroy_id(U, id).unwrap();
        }
        net.assert_over();
    }
}

#[test]
fn both_sides_may_end_it_at_once() {
    let mut p = Pair::established();
    p.net.cm(0).disconnect(U, p.client).unwrap();
    p.net.cm(1).disconnect(U, p.server).unwrap();
    p.net.expect(0, p.client, CmEventKind::Disconnected);
    p.net.expect(1, p.server, CmEventKind::Disconnected);
    p.destroy_all();
}

#[test]
fn refusals_say_why() {
    let mut net = Net::new(2, 2, NONE);
    // Nobody listens.
    let c = net.resolved(0, 1, PortSpace::Tcp);
    net.connect(0, c, 10);
    let e = net.expect(0, c, CmEventKind::Rejected);
    assert_eq!(e.status, rej::INVALID_SERVICE_ID);
    // The backlog is full.
    let listener = net.listen(1, PortSpace::Tcp, 1);
    let first = net.resolved(0, 1, PortSpace::Tcp);
    net.connect(0, first, 11);
    net.run_for(10 * MS);
    let second = net.resolved(0, 1, PortSpace::Tcp);
    net.connect(0, second, 12);
    let e = net.expect(0, second, CmEventKind::Rejected);
    assert_eq!(e.status, rej::NO_RESOURCES);
    assert_eq!(
        net.nodes[1].cm.links.len(),
        1,
        "nothing is kept of refusals"
    );
    // The application does not want it.
    let request = net.request(1, listener);
    net.reject(1, request.id, b"not today");
    let e = net.expect(0, first, CmEventKind::Rejected);
    assert_eq!((e.status, e.param.private_len), (rej::CONSUMER, 148));
    assert_eq!(&e.param.private[..10], b"not today\0");
    // Its packets are too large for us.
    net.nodes[1].cm.wire = Some(CmWire {
        ca_guid: 1,
        path_mtu: 1024,
        traffic_class: 0,
        seed: 3,
    });
    let large = net.resolved(0, 1, PortSpace::Tcp);
    net.connect(0, large, 13);
    let e = net.expect(0, large, CmEventKind::Rejected);
    assert_eq!(e.status, rej::INVALID_MTU);
    for id in [c, first, second, large] {
        net.cm(0).destroy_id(U, id).unwrap();
    }
    net.cm(1).destroy_id(U, request.id).unwrap();
    net.cm(1).destroy_id(U, listener).unwrap();
    net.assert_over();
}

#[test]
fn the_connecting_side_may_reject_the_response() {
    let mut p = Pair::accepted();
    p.net.reject(0, p.client, b"changed my mind");
    let e = p.net.expect(1, p.server, CmEventKind::Rejected);
    assert_eq!(
        (e.status, &e.param.private[..16]),
        (rej::CONSUMER, &b"changed my mind\0"[..])
    );
    assert!(p.net.nodes[1].failed.contains(&SERVER_QP));
    p.destroy_all();
}

#[test]
fn without_a_way_there_is_no_address() {
    let mut net = Net::new(1, 1, NONE);
    let id = net.cm(0).create_id(U, 0).unwrap();
    let verb = CmResolveAddr {
        id,
        port: PORT.into(),
        gid: gid(5),
        timeout_ms: 1,
        reserved: 0,
    };
    net.cm(0)
        .resolve_addr(U, &verb, |from, to| {
            assert_eq!((*from, *to), (gid(0), gid(5)));
            false
        })
        .unwrap();
    let e = net.expect(0, id, CmEventKind::AddrError);
    assert_eq!(e.status, Errno::HostUnreach as u32);
    for bad in [
        std::net::Ipv4Addr::BROADCAST.to_ipv6_mapped().octets(),
        std::net::Ipv4Addr::new(224, 0, 0, 1)
            .to_ipv6_mapped()
            .octets(),
        [0xff; 16],
    ] {
        let verb = CmResolveAddr { gid: bad, ..verb };
        net.cm(0).resolve_addr(U, &verb, |_, _| true).unwrap();
        net.expect(0, id, CmEventKind::AddrError);
    }
}

/// Loses the first `n` messages of a kind, everything else arrives.
fn losing(p: &mut Pair, kind: &str, mut n: usize, until: u64) {
    loop {
        p.net.collect();
        p.net.air.retain(|_, (_, _, mad)| {
            let lose = n > 0 && Cmd::parse(&**mad).unwrap().message.name() == kind;
            n -= usize::from(lose);
            !lose
        });
        if !p.net.step(until) {
            return;
        }
    }
}

/// The same, if it is one of those that are said now.
fn lose_of(p: &mut Pair, kind: &str, n: usize, now: &[&str]) {
    if now.contains(&kind) {
        let until = p.net.now + 10 * SECOND;
        losing(p, kind, n, until);
    }
}

#[test]
fn whatever_is_lost_is_said_again() {
    for kind in ["REQ", "REP", "RTU", "DREQ", "DREP"] {
        for lost in [1, 5, 15] {
            let mut net = Net::new(2, 3, NONE);
            let listener = net.listen(1, PortSpace::Tcp, 8);
            let client = net.resolved(0, 1, PortSpace::Tcp);
            net.connect(0, client, CLIENT_QP);
            let mut p = Pair {
                net,
                listener,
                client,
                server: 0,
            };
            lose_of(&mut p, kind, lost, &["REQ"]);
            p.server = p.net.request(1, listener).id;
            p.net.accept(1, p.server, SERVER_QP);
            lose_of(&mut p, kind, lost, &["REP"]);
            p.net.expect(0, client, CmEventKind::ConnectResponse);
            p.net.cm(0).establish(U, client).unwrap();
            p.net.expect(0, client, CmEventKind::Established);
            lose_of(&mut p, kind, lost, &["RTU"]);
            p.net.expect(1, p.server, CmEventKind::Established);
            p.net.cm(1).disconnect(U, p.server).unwrap();
            lose_of(&mut p, kind, lost, &["DREQ", "DREP"]);
            p.net.expect(0, client, CmEventKind::Disconnected);
            p.net.expect(1, p.server, CmEventKind::Disconnected);
            p.net.quiet(0);
            p.net.quiet(1);
            let said = p.net.count(0, kind) + p.net.count(1, kind);
            assert!(said > lost, "{kind} was said {said} times");
            p.destroy_all();
        }
    }
}

#[test]
fn a_lost_rtu_is_made_good_by_the_first_data() {
    let mut p = Pair::accepted();
    p.net.cm(0).establish(U, p.client).unwrap();
    p.net.collect();
    p.net.air.clear();
    p.net.cm(1).establish(U, p.server).unwrap();
    p.net.expect(1, p.server, CmEventKind::Established);
    p.net.run_for(LONG);
    p.net.quiet(1);
    assert_eq!(p.net.count(1, "REP"), 1, "nothing is left to repeat");
    p.destroy_all();
}

#[test]
fn a_lost_rtu_does_not_keep_a_connection_from_ending() {
    let mut p = Pair::accepted();
    p.net.cm(0).establish(U, p.client).unwrap();
    p.net.expect(0, p.client, CmEventKind::Established);
    p.net.air.clear();
    p.net.cm(0).disconnect(U, p.client).unwrap();
    p.net.expect(1, p.server, CmEventKind::Disconnected);
    p.net.expect(0, p.client, CmEventKind::Disconnected);
    p.destroy_all();
}

#[test]
fn peers_that_vanish_are_given_up() {
    // Before the request, before the answer, after it.
    let mut net = Net::new(2, 1, NONE);
    net.dead.insert(1);
    let c = net.resolved(0, 1, PortSpace::Tcp);
    net.connect(0, c, 10);
    let e = net.expect(0, c, CmEventKind::Unreachable);
    assert_eq!(e.status, STATUS_TIMED_OUT);
    assert_eq!(net.count(0, "REQ"), 1 + usize::from(limits::MAX_CM_RETRIES));
    assert_eq!(
        net.now,
        (1 + u64::from(limits::MAX_CM_RETRIES)) * limits::response_ns(limits::RESPONSE_TIMEOUT)
    );
    net.cm(0).destroy_id(U, c).unwrap();
    net.dead.clear();
    net.assert_over();

    let mut p = Pair::requested(NONE);
    p.net.dead.insert(0);
    p.net.accept(1, p.server, SERVER_QP);
    let e = p.net.expect(1, p.server, CmEventKind::ConnectError);
    assert_eq!(e.status, STATUS_TIMED_OUT);
    assert!(p.net.nodes[1].failed.contains(&SERVER_QP));

    let mut p = Pair::established();
    p.net.dead.insert(0);
    p.net.cm(1).disconnect(U, p.server).unwrap();
    p.net.expect(1, p.server, CmEventKind::Disconnected);
    p.net.cm(1).destroy_id(U, p.server).unwrap();
    p.net.run_for(LONG);
    assert_eq!(p.net.nodes[1].cm.links.len(), 0);
}

#[test]
fn a_slow_application_is_covered_by_patience() {
    let mut p = Pair::requested(NONE);
    p.net.run_for(150 * SECOND);
    assert_eq!(p.net.count(0, "REQ"), 1, "it waited");
    assert!(p.net.count(1, "MRA") >= 3);
    p.net.accept(1, p.server, SERVER_QP);
    p.net.expect(0, p.client, CmEventKind::ConnectResponse);
    p.net.run_for(150 * SECOND);
    assert!(p.net.count(0, "MRA") >= 3);
    assert_eq!(p.net.count(1, "REP"), 1);
    p.net.cm(0).establish(U, p.client).unwrap();
    p.net.expect(0, p.client, CmEventKind::Established);
    p.net.expect(1, p.server, CmEventKind::Established);
    p.destroy_all();
}

#[test]
fn destroying_at_every_stage_tells_the_peer() {
    type Case = (fn() -> Pair, usize, CmEventKind, u32);
    let requested = || Pair::requested(NONE);
    let cases: [Case; 6] = [
        (requested, 0, CmEventKind::Rejected, rej::TIMEOUT),
        (requested, 1, CmEventKind::Rejected, rej::CONSUMER),
        (Pair::accepted, 0, CmEventKind::Rejected, rej::CONSUMER),
        (Pair::accepted, 1, CmEventKind::Disconnected, 0),
        (Pair::established, 0, CmEventKind::Disconnected, 0),
        (Pair::established, 1, CmEventKind::Disconnected, 0),
    ];
    for (i, (stage, who, kind, status)) in cases.into_iter().enumerate() {
        for death in [false, true] {
            let mut p = stage();
            let ids = [p.client, p.server];
            if death {
                p.net.cm(who).remove_user(U);
            } else {
                p.net.cm(who).destroy_id(U, ids[who]).unwrap();
            }
            let peer = 1 - who;
            let e = p.net.expect(peer, ids[peer], kind);
            assert_eq!(e.status, status, "case {i}, death {death}");
            p.net.quiet(peer);
            p.destroy_all();
        }
    }
}

#[test]
fn who_destroys_goes_on_telling_a_peer_that_does_not_hear() {
    let mut p = Pair::established();
    p.net.cm(0).destroy_id(U, p.client).unwrap();
    p.net.cm(0).remove_user(U);
    losing(&mut p, "DREQ", 9, 20 * SECOND);
    p.net.expect(1, p.server, CmEventKind::Disconnected);
    p.destroy_all();
}

#[test]
fn a_queue_pair_that_comes_back_ends_the_old_connection() {
    let mut p = Pair::established();
    // The peer's host starts anew, and uses the same queue pair.
    let mut cm = Cm::new(CmConfig::default(), vec![gid(0)]);
    cm.set_wire(CmWire {
        ca_guid: 1,
        path_mtu: 4096,
        traffic_class: 0,
        seed: 99,
    });
    cm.add_user(U);
    p.net.nodes[0].cm = cm;
    let again = p.net.resolved(0, 1, PortSpace::Tcp);
    p.net.connect(0, again, CLIENT_QP);
    let e = p.net.expect(0, again, CmEventKind::Rejected);
    assert_eq!(e.status, rej::STALE_CONNECTION);
    p.net.expect(1, p.server, CmEventKind::Disconnected);
    assert!(p.net.nodes[1].failed.contains(&SERVER_QP));
    // Then there is room for the new one.
    let third = p.net.resolved(0, 1, PortSpace::Tcp);
    p.net.connect(0, third, CLIENT_QP);
    let request = p.net.request(1, p.listener);
    p.net.accept(1, request.id, SERVER_QP);
    p.net.expect(0, third, CmEventKind::ConnectResponse);
    p.net.cm(0).destroy_id(U, third).unwrap();
    p.net.cm(0).destroy_id(U, again).unwrap();
    p.net.expect(1, request.id, CmEventKind::Rejected);
    p.destroy_all();
}

#[test]
fn datagram_queue_pairs_are_found_by_port() {
    for lost in [0, 3] {
        let mut net = Net::new(2, 5, NONE);
        // Nobody listens, though somebody does in the other port space.
        let tcp = net.listen(1, PortSpace::Tcp, 1);
        let c = net.resolved(0, 1, PortSpace::Udp);
        net.connect_with(0, c, param(0, b"who")).unwrap();
        let e = net.expect(0, c, CmEventKind::Unreachable);
        assert_eq!(e.status, sidr::UNSUPPORTED);
        net.cm(0).destroy_id(U, c).unwrap();

        let listener = net.listen(1, PortSpace::Udp, 4);
        let no = net.resolved(0, 1, PortSpace::Udp);
        let mut long = param(0, &[7; 180]);
        long.private_len = 180;
        net.connect_with(0, no, long).unwrap();
        let request = net.request(1, listener);
        assert_eq!(
            (request.param.private_len, &request.param.private[..180]),
            (180, &[7; 180][..])
        );
        net.reject(1, request.id, b"busy");
        let e = net.expect(0, no, CmEventKind::Unreachable);
        assert_eq!(
            (e.status, &e.param.private[..5]),
            (sidr::REJECTED, &b"busy\0"[..])
        );
        net.cm(0).destroy_id(U, no).unwrap();
        net.cm(1).destroy_id(U, request.id).unwrap();

        let yes = net.resolved(0, 1, PortSpace::Udp);
        net.connect_with(0, yes, param(0, b"please")).unwrap();
        let mut p = Pair {
            net,
            listener,
            client: yes,
            server: 0,
        };
        let soon = p.net.now + 3 * SECOND;
        losing(&mut p, "SIDR_REQ", lost, soon);
        p.server = p.net.request(1, listener).id;
        let answer = CmParam {
            qkey: 0x1234_5678,
            ..param(SERVER_QP, b"here")
        };
        p.net.accept_with(1, p.server, answer).unwrap();
        let soon = p.net.now + 3 * SECOND;
        losing(&mut p, "SIDR_REP", lost, soon);
        let e = p.net.expect(0, yes, CmEventKind::Established);
        assert_eq!(
            (e.param.qpn, e.param.qkey, &e.param.private[..5]),
            (SERVER_QP, 0x1234_5678, &b"here\0"[..])
        );
        assert_eq!(e.peer_gid, gid(1));
        p.net.quiet(1);
        // One datagram queue pair serves many, and no connection ends it.
        let other = p.net.resolved(0, 1, PortSpace::Udp);
        p.net.connect_with(0, other, param(0, b"me too")).unwrap();
        let second = p.net.request(1, listener).id;
        p.net.accept_with(1, second, answer).unwrap();
        p.net.expect(0, other, CmEventKind::Established);
        assert!(p.net.cm(0).disconnect(U, other).is_err());
        for (n, id) in [(0, other), (1, second), (1, tcp)] {
            p.net.cm(n).destroy_id(U, id).unwrap();
        }
        assert!(p.net.nodes.iter().all(|n| n.failed.is_empty()));
        p.destroy_all();
    }
}

#[test]
fn a_datagram_request_that_nobody_answers_is_given_up() {
    let mut net = Net::new(2, 5, NONE);
    net.dead.insert(1);
    let c = net.resolved(0, 1, PortSpace::Udp);
    net.connect_with(0, c, param(0, b"")).unwrap();
    let e = net.expect(0, c, CmEventKind::Unreachable);
    assert_eq!(e.status, STATUS_TIMED_OUT);
    let c2 = net.resolved(0, 1, PortSpace::Udp);
    net.connect_with(0, c2, param(0, b"")).unwrap();
    net.cm(0).destroy_id(U, c).unwrap();
    net.cm(0).destroy_id(U, c2).unwrap();
    net.assert_over();
}

#[test]
fn users_of_one_host_with_addresses_of_their_own() {
    // Two devices, one host: each has all ports, and they meet without a MAD.
    let (a, b) = (gid(0), gid(9));
    let mut cm = Cm::new(CmConfig::default(), vec![a, b]);
    cm.set_wire(CmWire {
        ca_guid: 1,
        path_mtu: 1024,
        traffic_class: 0,
        seed: 1,
    });
    let (ua, ub) = (UserKey(1), UserKey(2));
    cm.add_user_at(ua, a);
    cm.add_user_at(ub, b);
    for (user, gid) in [(ua, a), (ub, b)] {
        let id = cm.create_id(user, 0).unwrap();
        let bind = |gid| CmBindAddr { id, port: 7, gid };
        let foreign = if gid == a { b } else { a };
        assert!(cm.bind_addr(user, &bind(foreign)).is_err());
        assert_eq!(cm.bind_addr(user, &bind([0; 16])).unwrap().gid, gid);
        cm.listen(user, &CmListen { id, backlog: 1 }).unwrap();
    }
    let id = cm.create_id(ua, 0).unwrap();
    let verb = CmResolveAddr {
        id,
        port: 7,
        gid: b,
        timeout_ms: 1,
        reserved: 0,
    };
    cm.resolve_addr(ua, &verb, |_, _| panic!("it is here"))
        .unwrap();
    let verb = CmResolveRoute { id, timeout_ms: 1 };
    cm.resolve_route(ua, &verb).unwrap();
    let verb = CmConnect {
        id,
        param: param(5, b""),
    };
    cm.connect(ua, &verb, 0, |_| true).unwrap();
    let request = cm.get_event(ub).unwrap();
    assert_eq!(
        (request.event, request.peer_gid, request.param.path_mtu),
        (CmEventKind::ConnectRequest as u32, a, 4096)
    );
    assert!(
        cm.take_effects()
            .iter()
            .all(|e| !matches!(e, Effect::SendMad { .. }))
    );
}
