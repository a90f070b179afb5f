//! MADs that nobody should send.

use hyv_roce::mad::{
    Drep, Dreq, Message as Body, Mra, Rejected, Rep, Rtu, SidrRep, SidrReq, SidrStatus, rdma_cm,
};

use super::*;

/// All MADs that host `from` sent to host `to` so far would be these.
fn last_of(net: &mut Net, name: &str) -> Box<Mad> {
    net.collect();
    let found = net
        .air
        .values()
        .find(|(_, _, mad)| Cmd::parse(&**mad).unwrap().message.name() == name);
    found.expect("a message in the air").2.clone()
}

fn mad(body: Body) -> Mad {
    Cmd::new(77, body).to_bytes()
}

/// What a host says to one MAD, and to whom.
fn answer(net: &mut Net, n: usize, src: Gid, mad: &Mad) -> Vec<(Gid, Body)> {
    net.collect();
    let now = net.now;
    net.nodes[n].cm.handle_mad(&src, mad, now);
    net.nodes[n]
        .cm
        .take_effects()
        .into_iter()
        .filter_map(|e| match e {
            Effect::SendMad { dst, mad, .. } => Some((dst, Cmd::parse(&*mad).unwrap().message)),
            _ => None,
        })
        .collect()
}

#[test]
fn conversations_that_do_not_exist() {
    let mut p = Pair::established();
    let stranger = gid(7);
    let dreq = mad(Body::Dreq(Dreq {
        local_comm_id: 5,
        remote_comm_id: 6,
        remote_qpn: SERVER_QP,
        private: [0; Dreq::PRIVATE],
    }));
    let got = answer(&mut p.net, 1, stranger, &dreq);
    let expected = Drep {
        local_comm_id: 6,
        remote_comm_id: 5,
        private: [0; Drep::PRIVATE],
    };
    assert_eq!(got, [(stranger, Body::Drep(expected))]);
    let rtu = mad(Body::Rtu(Rtu {
        local_comm_id: 5,
        remote_comm_id: 6,
        private: [0; Rtu::PRIVATE],
    }));
    assert_eq!(answer(&mut p.net, 1, stranger, &rtu), []);
    let mra = mad(Body::Mra(Mra {
        local_comm_id: 5,
        remote_comm_id: 6,
        message: Rejected::Req,
        service_timeout: 31,
        private: [0; Mra::PRIVATE],
    }));
    assert_eq!(answer(&mut p.net, 1, stranger, &mra), []);
    let sidr = mad(Body::SidrRep(SidrRep {
        request_id: 6,
        status: SidrStatus(0),
        info_len: 0,
        qpn: 9,
        service_id: 0,
        qkey: 0,
        info: [0; SidrRep::INFO],
        private: [0; SidrRep::PRIVATE],
    }));
    assert_eq!(answer(&mut p.net, 1, stranger, &sidr), []);
    p.net.quiet(0);
    p.net.quiet(1);
    assert_eq!(p.net.nodes[1].cm.links.len(), 1);
    p.destroy_all();
}

#[test]
fn nobody_speaks_for_a_peer_from_another_address() {
    // Everything that the peer itself says next, from somebody else.
    let mut p = Pair::established();
    p.net.cm(0).disconnect(U, p.client).unwrap();
    let dreq = last_of(&mut p.net, "DREQ");
    let got = answer(&mut p.net, 1, gid(6), &dreq);
    assert!(matches!(got[..], [(to, Body::Drep(_))] if to == gid(6)));
    p.net.quiet(1);
    assert_eq!(p.net.nodes[1].cm.state(U, p.server), Ok(State::Established));
    // With the right numbers, but of another queue pair.
    let mut wrong = Cmd::parse(&*dreq).unwrap();
    if let Body::Dreq(d) = &mut wrong.message {
        d.remote_qpn += 1;
    }
    assert_eq!(answer(&mut p.net, 1, gid(0), &wrong.to_bytes()), []);
    p.net.quiet(1);
    p.net.expect(1, p.server, CmEventKind::Disconnected);
    p.destroy_all();

    let mut p = Pair::requested(NONE);
    p.net.accept(1, p.server, SERVER_QP);
    let rep = last_of(&mut p.net, "REP");
    assert_eq!(answer(&mut p.net, 0, gid(6), &rep), []);
    p.net.quiet(0);
    p.net.expect(0, p.client, CmEventKind::ConnectResponse);
    p.destroy_all();
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let mut net = Net::new(2, 4, NONE);
    let listener = net.listen(1, PortSpace::Tcp, 8);
    let client = net.resolved(0, 1, PortSpace::Tcp);
    net.connect(0, client, CLIENT_QP);
    let good = Cmd::parse(&*last_of(&mut net, "REQ")).unwrap();
    net.air.clear();
    let Body::Req(req) = good.message else {
        panic!("a REQ")
    };
    let service = rdma_cm::service_id(rdma_cm::PortSpace::Tcp, PORT);
    let mut cases: Vec<(u32, Body)> = Vec::new();
    let mut case = |reason: u32, change: &dyn Fn(&mut hyv_roce::mad::Req)| {
        let mut req = req;
        change(&mut req);
        cases.push((reason, Body::Req(req)));
    };
    case(rej::INVALID_SERVICE_ID, &|r| r.service_id = service + 1);
    case(rej::INVALID_SERVICE_ID, &|r| r.service_id = u64::from(PORT));
    case(rej::INVALID_SERVICE_ID, &|r| {
        r.service_id = rdma_cm::service_id(rdma_cm::PortSpace::Udp, PORT);
    });
    case(rej::UNSUPPORTED, &|r| r.private[0] = 1);
    case(rej::UNSUPPORTED, &|r| r.private[1] = 0x50);
    case(rej::UNSUPPORTED, &|r| r.local_comm_id = 0);
    case(rej::UNSUPPORTED, &|r| r.local_qpn = 1);
    case(rej::UNSUPPORTED, &|r| r.local_qpn = 0xff_ffff);
    case(rej::INVALID_GID, &|r| r.private[35] = 99);
    case(rej::INVALID_MTU, &|r| r.path_mtu = 0);
    case(rej::INVALID_MTU, &|r| r.path_mtu = 6);
    case(rej::INVALID_TRANSPORT_TYPE, &|r| {
        r.transport = hyv_roce::mad::TransportType::Rd;
    });
    for (i, (reason, body)) in cases.into_iter().enumerate() {
        let got = answer(&mut net, 1, gid(0), &mad(body));
        let [(to, Body::Rej(no))] = got[..] else {
            panic!("case {i}: {got:?}")
        };
        assert_eq!(
            (to, u32::from(no.reason.0), no.message),
            (gid(0), reason, Rejected::Req),
            "case {i}"
        );
        assert_eq!(net.nodes[1].cm.links.len(), 0, "case {i}");
    }
    net.quiet(1);
    let _ = listener;
}

#[test]
fn a_flood_of_requests_is_bounded_and_harms_nobody_else() {
    let mut p = Pair::established();
    let next = p.net.resolved(0, 1, PortSpace::Tcp);
    p.net.connect(0, next, 300);
    let req = last_of(&mut p.net, "REQ");
    p.net.air.clear();
    let good = Cmd::parse(&*req).unwrap();
    let Body::Req(req) = good.message else {
        panic!("a REQ")
    };
    let attacker = gid(66);
    let mut refused = 0;
    for i in 0..20_000 {
        let mut req = req;
        (req.local_comm_id, req.local_qpn) = (1 + i, 1000 + i);
        let got = answer(&mut p.net, 1, attacker, &mad(Body::Req(req)));
        assert!(got.len() <= 1);
        refused += got.len();
    }
    // The backlog is 8.
    assert_eq!(refused, 20_000 - 8);
    assert_eq!(p.net.nodes[1].cm.links.len(), 1 + 8);
    // The application refuses them; the links that remain for a while are bounded, too.
    for round in 0..2000 {
        while let Ok(e) = p.net.nodes[1].cm.get_event(U) {
            assert_eq!(e.peer_gid, attacker);
            p.net.nodes[1].cm.destroy_id(U, e.id).unwrap();
        }
        for i in 0..8 {
            let mut req = req;
            (req.local_comm_id, req.local_qpn) = (100_000 + round * 8 + i, 1000 + i);
            answer(&mut p.net, 1, attacker, &mad(Body::Req(req)));
        }
        assert!(p.net.nodes[1].cm.links.len() <= 1 + 8 + limits::MAX_LINGERING);
    }
    while let Ok(e) = p.net.nodes[1].cm.get_event(U) {
        p.net.nodes[1].cm.destroy_id(U, e.id).unwrap();
    }
    // An honest peer connects, and the connection that stood still stands.
    let third = p.net.resolved(0, 1, PortSpace::Tcp);
    p.net.connect(0, third, 301);
    let request = p.net.request(1, p.listener);
    assert_eq!(request.peer_gid, gid(0));
    p.net.cm(0).disconnect(U, p.client).unwrap();
    p.net.expect(1, p.server, CmEventKind::Disconnected);
    p.net.cm(0).destroy_id(U, third).unwrap();
    p.net.cm(0).destroy_id(U, next).unwrap();
    p.net.cm(1).destroy_id(U, request.id).unwrap();
    p.destroy_all();
}

#[test]
fn patience_has_an_end() {
    let mut p = Pair::requested(NONE);
    p.net.run_for(SECOND);
    p.net.dead.insert(1);
    // Somebody who answers nothing but "wait", as long as may be.
    let id = p.net.nodes[0].cm.id(IdKey {
        user: U,
        handle: p.client,
    });
    let Some(Peer::There(link)) = id.unwrap().peer else {
        panic!("a link")
    };
    let mra = mad(Body::Mra(Mra {
        local_comm_id: 9,
        remote_comm_id: link.0,
        message: Rejected::Req,
        service_timeout: 31,
        private: [0; Mra::PRIVATE],
    }));
    let start = p.net.now;
    let event = loop {
        p.net.inject(gid(1), gid(0), Box::new(mra));
        p.net.run_for(80 * SECOND);
        if let Ok(e) = p.net.nodes[0].cm.get_event(U) {
            break e;
        }
        assert!(p.net.now - start < 3600 * SECOND, "waited for an hour");
    };
    assert_eq!(event.event, CmEventKind::Unreachable as u32);
}

#[test]
fn noise_changes_nothing() {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let mut p = Pair::established();
    p.net.listen(0, PortSpace::Udp, 4);
    // Real messages of every kind, to be damaged.
    let mut seeds: Vec<Box<Mad>> = Vec::new();
    let mut other = Pair::requested(NONE);
    other.net.accept(1, other.server, SERVER_QP);
    other
        .net
        .expect(0, other.client, CmEventKind::ConnectResponse);
    other.net.cm(0).establish(U, other.client).unwrap();
    seeds.push(last_of(&mut other.net, "RTU"));
    other.net.run_for(SECOND);
    other.net.cm(0).disconnect(U, other.client).unwrap();
    seeds.push(last_of(&mut other.net, "DREQ"));
    for body in [
        Body::SidrReq(SidrReq {
            request_id: 3,
            pkey: 0xffff,
            service_id: rdma_cm::service_id(rdma_cm::PortSpace::Udp, PORT),
            private: [0x40; SidrReq::PRIVATE],
        }),
        Body::Rep(Rep {
            local_comm_id: 3,
            remote_comm_id: 4,
            local_qkey: 0,
            local_qpn: 5,
            local_eecn: 0,
            starting_psn: 0,
            responder_resources: 0,
            initiator_depth: 0,
            target_ack_delay: 0,
            failover: 0,
            flow_control: false,
            rnr_retry_count: 0,
            srq: false,
            local_ca_guid: 0,
            private: [0; Rep::PRIVATE],
        }),
    ] {
        seeds.push(Box::new(mad(body)));
    }
    let next = p.net.resolved(0, 1, PortSpace::Tcp);
    p.net.connect(0, next, 300);
    seeds.push(last_of(&mut p.net, "REQ"));
    p.net.run_for(SECOND);
    for _ in 0..100_000 {
        let mut bytes = seeds[rng.below(seeds.len() as u64) as usize].clone();
        if rng.chance(50) {
            bytes.iter_mut().for_each(|b| *b = rng.next() as u8);
        }
        for _ in 0..rng.below(4) {
            bytes[rng.below(256) as usize] = rng.next() as u8;
        }
        if rng.chance(500) {
            // Every attribute, on every body.
            bytes[17] = 0x0f + rng.below(14) as u8;
        }
        let n = rng.below(2) as usize;
        let now = p.net.now;
        p.net.nodes[n].cm.handle_mad(&gid(20), &bytes, now);
        p.net.nodes[n].cm.take_effects();
        assert!(p.net.nodes[n].cm.mail.is_empty());
    }
    for (n, id) in [(0, p.client), (1, p.server)] {
        assert_eq!(p.net.nodes[n].cm.state(U, id), Ok(State::Established));
        assert!(p.net.nodes[n].cm.links.len() < 16 + limits::MAX_LINGERING);
        // The rest are those who asked and gave up.
        assert!(p.net.nodes[n].cm.ids(U) < 16);
    }
    assert!(p.net.nodes[0].cm.mad_stats().malformed > 1000);
}

#[test]
fn the_corpus_of_conversations() {
    let folder =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/conversation");
    let mut seen: Vec<Vec<u8>> = Vec::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        println!("{}", path.display());
        checks::conversation(&bytes);
        seen.push(bytes);
    }
    assert!(seen.len() >= 11);
    // And what comes of them when they are cut up and put together.
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    let seed = std::env::var("CM_SEED").map_or(seed, |s| s.parse().unwrap());
    println!("CM_SEED={seed}");
    let mut rng = Rng(seed);
    for _ in 0..3000 {
        let mut bytes = Vec::new();
        for _ in 0..1 + rng.below(6) {
            if rng.chance(300) {
                let steps = [3, 4, 0xfd, 0x2d];
                bytes.push(steps[rng.below(4) as usize]);
            } else if rng.chance(500) {
                bytes.extend([
                    1,
                    rng.next() as u8,
                    rng.next() as u8,
                    0,
                    6,
                    rng.next() as u8,
                ]);
            } else {
                bytes.extend(&seen[rng.below(seen.len() as u64) as usize]);
            }
        }
        for _ in 0..rng.below(6) {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] = rng.next() as u8;
        }
        checks::conversation(&bytes);
    }
}
