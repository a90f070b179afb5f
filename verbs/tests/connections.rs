//! Connection management against a host that plays its part.
#![cfg(not(loom))]

mod common;

use std::time::Duration;

use common::FakeHost;
use hyv_abi::control::Opcode;
use hyv_abi::types::Errno;
use hyv_verbs::cm::{
    self, CmId, ConnParam, ConnectOptions, Connection, EventChannel, RejectReason,
};
use hyv_verbs::{
    Access, CmEventKind, CompletionQueue, Context, Error, Event, Gid, Payload, ProtectionDomain,
    QpCaps, QpState, RecvWr, SendOp, SendWr, WcStatus,
};

const PORT: u16 = 7471;
const SECOND: Option<Duration> = Some(Duration::from_secs(1));

struct Side {
    pd: ProtectionDomain,
    cq: CompletionQueue,
}

fn side(context: &Context) -> Side {
    Side {
        pd: context.alloc_pd().unwrap(),
        cq: context.create_cq(64).unwrap(),
    }
}

/// One thread plays both sides, so the client's steps are taken one by one.
fn begin(context: &Context, side: &Side, private: &[u8]) -> (CmId, EventChannel) {
    let channel = EventChannel::new(context);
    let mut id = channel.create_id().unwrap();
    id.resolve_addr(Gid::LOCAL, PORT, Duration::from_secs(1))
        .unwrap();
    assert_eq!(next(&channel).kind, CmEventKind::AddrResolved);
    id.resolve_route(Duration::from_secs(1)).unwrap();
    assert_eq!(next(&channel).kind, CmEventKind::RouteResolved);
    id.create_qp(&side.pd, &side.cq, &side.cq, &QpCaps::default())
        .unwrap();
    id.connect(&ConnParam {
        private_data: private,
        initiator_depth: 4,
        ..ConnParam::default()
    })
    .unwrap();
    (id, channel)
}

fn next(channel: &EventChannel) -> cm::CmEvent {
    channel.get_event(SECOND).unwrap().expect("an event")
}

fn request(channel: &EventChannel) -> (CmId, Vec<u8>) {
    let mut event = next(channel);
    assert_eq!(event.kind, CmEventKind::ConnectRequest);
    let private = event.private_data().to_vec();
    (event.take_request().unwrap(), private)
}

#[test]
fn two_sides_meet_talk_and_part() {
    let (host, context) = FakeHost::open();
    let (mut server, mut client) = (side(&context), side(&context));
    let (listener, incoming) = cm::listen(&context, (Gid::LOCAL, PORT), 8).unwrap();
    let (mut theirs, outgoing) = begin(&context, &client, b"hello");

    let (mut ours, said) = request(&incoming);
    assert_eq!(said, b"hello");
    assert_eq!(ours.peer(), Gid([5; 16]));
    let mr = server.pd.alloc_mr(64, Access::LOCAL_WRITE).unwrap();
    let qp = ours
        .create_qp(&server.pd, &server.cq, &server.cq, &QpCaps::default())
        .unwrap();
    qp.post_recv(&RecvWr {
        wr_id: 1,
        sges: &[mr.sge(0, 64)],
    })
    .unwrap();
    ours.accept(&ConnParam {
        private_data: b"welcome",
        responder_resources: 2,
        ..ConnParam::default()
    })
    .unwrap();

    let event = next(&outgoing);
    assert_eq!(
        (event.kind, event.id),
        (CmEventKind::Established, theirs.handle())
    );
    assert_eq!(event.private_data(), b"welcome");
    let event = next(&incoming);
    assert_eq!(
        (event.kind, event.id),
        (CmEventKind::Established, ours.handle())
    );
    assert_eq!(event.private_data(), b"hello");

    let (mine, yours) = (
        theirs.qp().unwrap().query().unwrap(),
        ours.qp().unwrap().query().unwrap(),
    );
    assert_eq!(
        (mine.state, yours.state),
        (QpState::Rts as u32, QpState::Rts as u32)
    );
    assert_eq!(
        (mine.dest_qp_num, yours.dest_qp_num),
        (ours.qp().unwrap().qpn(), theirs.qp().unwrap().qpn())
    );
    assert_eq!((mine.sq_psn, yours.sq_psn), (yours.rq_psn, mine.rq_psn));
    assert_ne!(mine.sq_psn, yours.sq_psn);
    assert_eq!(
        (mine.max_rd_atomic, yours.max_dest_rd_atomic),
        (2, 2),
        "the smaller of offer and request"
    );
    assert_eq!((yours.max_rd_atomic, mine.max_dest_rd_atomic), (16, 16));

    let wr = SendWr::new(2, SendOp::Send, Payload::Inline(b"first words"));
    theirs.qp_mut().unwrap().post_send(&wr).unwrap();
    host.step();
    assert_eq!(
        server.cq.poll_one().unwrap().inline_data(),
        Some(&b"first words"[..])
    );
    assert!(client.cq.poll_one().unwrap().is_ok());

    // A queue pair that was taken out follows its connection all the same.
    let mut qp = ours.take_qp().unwrap();
    qp.post_recv(&RecvWr {
        wr_id: 3,
        sges: &[],
    })
    .unwrap();
    theirs.disconnect().unwrap();
    assert_eq!(theirs.qp().unwrap().state(), QpState::Err);
    assert_eq!(next(&outgoing).kind, CmEventKind::Disconnected);
    assert_eq!(next(&incoming).kind, CmEventKind::Disconnected);
    assert_eq!(qp.state(), QpState::Err);
    host.step();
    assert_eq!(server.cq.poll_one().unwrap().status, WcStatus::WrFlushErr);
    assert_eq!(
        theirs.disconnect().unwrap_err().errno(),
        Errno::NotConn as u32
    );
    drop((theirs, ours, qp, listener));
    assert!(host.device().ids.is_empty() && host.device().qps.is_empty());
}

#[test]
fn requests_are_refused_by_word_or_by_dropping() {
    let (host, context) = FakeHost::open();
    let me = side(&context);
    let (_listener, incoming) = cm::listen(&context, (Gid::LOCAL, PORT), 8).unwrap();
    let (_id, outgoing) = begin(&context, &me, b"");
    let (mut request_id, _) = request(&incoming);
    request_id.reject(b"too many").unwrap();
    let event = next(&outgoing);
    assert_eq!(
        (event.kind, event.status, event.private_data()),
        (CmEventKind::Rejected, 28, &b"too many"[..])
    );
    let (_id, outgoing) = begin(&context, &me, b"");
    drop(next(&incoming));
    assert_eq!(next(&outgoing).kind, CmEventKind::Rejected);
    // A channel that is gone refuses too.
    drop(incoming);
    let (_id, outgoing) = begin(&context, &me, b"");
    assert_eq!(next(&outgoing).kind, CmEventKind::Rejected);
    drop(request_id);
    assert_eq!(host.device().ids.len(), 4, "the listener and three clients");
}

#[test]
fn connecting_in_one_call_fails_with_the_reason() {
    let (host, context) = FakeHost::open();
    let me = side(&context);
    let dial = |options: &ConnectOptions<'_>| -> Result<Connection, Error> {
        cm::connect(
            &context,
            (Gid::LOCAL, PORT),
            &me.pd,
            (&me.cq, &me.cq),
            options,
            |_| Ok::<_, Error>(()),
        )
    };
    let error = dial(&ConnectOptions::default()).unwrap_err();
    assert_eq!(
        error,
        Error::Rejected {
            reason: RejectReason::NoListener,
            private: [0; 8]
        }
    );
    let long = [0; 57];
    let options = ConnectOptions {
        param: ConnParam {
            private_data: &long,
            ..ConnParam::default()
        },
        ..ConnectOptions::default()
    };
    assert_eq!(
        dial(&options).unwrap_err(),
        Error::PrivateData { len: 57, max: 56 }
    );
    // A listener that never answers.
    let (_listener, _incoming) = cm::listen(&context, (Gid::LOCAL, PORT), 1).unwrap();
    let options = ConnectOptions {
        timeout: Duration::from_millis(300),
        ..ConnectOptions::default()
    };
    let start = context.now_ns();
    assert_eq!(dial(&options).unwrap_err(), Error::Timeout);
    let took = context.now_ns() - start;
    assert!((300_000_000..600_000_000).contains(&took), "{took} ns");
    let failed = cm::connect(
        &context,
        (Gid::LOCAL, PORT),
        &me.pd,
        (&me.cq, &me.cq),
        &options,
        |_| Err::<(), _>(Error::InUse),
    );
    assert_eq!(failed.unwrap_err(), Error::InUse, "what `prepare` gives");
    assert!(host.device().qps.is_empty());
}

#[test]
fn addresses_are_bound_once() {
    let (_host, context) = FakeHost::open();
    let channel = EventChannel::new(&context);
    let mut a = channel.create_id().unwrap();
    let mut b = channel.create_id().unwrap();
    assert_eq!(a.bind_addr(Gid::LOCAL, PORT).unwrap(), (Gid([9; 16]), PORT));
    assert_eq!(
        b.bind_addr(Gid::LOCAL, PORT).unwrap_err().errno(),
        Errno::AddrInUse as u32
    );
    assert_ne!(b.bind_addr(Gid::LOCAL, 0).unwrap().1, 0);
    assert_eq!(
        a.connect(&ConnParam::default()).unwrap_err(),
        Error::NoQueuePair
    );
    assert_eq!(
        a.accept(&ConnParam::default()).unwrap_err(),
        Error::NoQueuePair
    );
    assert!(channel.poll_event().unwrap().is_none());
}

#[test]
fn a_queue_pair_that_cannot_be_readied_is_an_error_event() {
    let (host, context) = FakeHost::open();
    let (server, client) = (side(&context), side(&context));
    let (_listener, incoming) = cm::listen(&context, (Gid::LOCAL, PORT), 8).unwrap();
    let (mut id, outgoing) = begin(&context, &client, b"");
    let (mut ours, _) = request(&incoming);
    ours.create_qp(&server.pd, &server.cq, &server.cq, &QpCaps::default())
        .unwrap();
    ours.accept(&ConnParam::default()).unwrap();
    id.qp_mut().unwrap().to_err().unwrap();
    let event = next(&outgoing);
    assert_eq!(
        (event.kind, event.status),
        (CmEventKind::ConnectError, Errno::Inval as u32)
    );
    // Without a queue pair the step shows, as in librdmacm.
    let (mut id, outgoing) = begin(&context, &client, b"");
    let (mut ours, _) = request(&incoming);
    ours.create_qp(&server.pd, &server.cq, &server.cq, &QpCaps::default())
        .unwrap();
    ours.accept(&ConnParam::default()).unwrap();
    drop(id.take_qp());
    assert_eq!(next(&outgoing).kind, CmEventKind::ConnectResponse);
    drop(host);
}

#[test]
fn no_event_costs_no_verb_and_none_is_lost() {
    let (host, context) = FakeHost::open();
    let channel = EventChannel::new(&context);
    assert!(channel.poll_event().unwrap().is_none());
    host.device().log.clear();
    for _ in 0..100 {
        assert!(channel.poll_event().unwrap().is_none());
    }
    assert_eq!(host.device().log, []);
    let other = EventChannel::new(&context);
    let mut a = channel.create_id().unwrap();
    let mut b = other.create_id().unwrap();
    for _ in 0..10 {
        a.resolve_route(Duration::from_secs(1)).unwrap();
        b.resolve_route(Duration::from_secs(1)).unwrap();
    }
    assert_eq!(context.poll_events().collect::<Vec<_>>(), [Event::Cm]);
    // A refusal on the way loses nothing.
    host.device().refuse.insert(
        Opcode::CmGetEvent as u16,
        (Errno::DQuot, hyv_verbs::Reason::QuotaRate),
    );
    assert_eq!(
        channel.poll_event().unwrap_err().errno(),
        Errno::DQuot as u32
    );
    for (channel, id) in [(&channel, &a), (&other, &b)] {
        for _ in 0..10 {
            assert_eq!(next(channel).id, id.handle());
        }
        assert!(channel.poll_event().unwrap().is_none());
    }
    a.resolve_route(Duration::from_secs(1)).unwrap();
    drop(a);
    assert!(
        channel.poll_event().unwrap().is_none(),
        "events of a dropped identifier are dropped"
    );
}

#[test]
fn datagrams_find_the_queue_pair_that_serves() {
    use hyv_verbs::{AhAttr, PortSpace, QpType};
    let (_host, context) = FakeHost::open();
    let (server, mut client) = (side(&context), side(&context));
    let (listener, incoming) =
        cm::listen_datagram(&context, (std::net::Ipv4Addr::UNSPECIFIED, PORT), 8).unwrap();
    assert_eq!(listener.port_space(), PortSpace::Udp);
    // One queue pair serves two requests, the first of which asks without one of its own.
    let outgoing = EventChannel::new(&context);
    let ask = |client: &Side, with_qp: bool| {
        let mut id = outgoing.create_id_in(PortSpace::Udp).unwrap();
        id.resolve_addr(
            std::net::Ipv6Addr::UNSPECIFIED,
            PORT,
            Duration::from_secs(1),
        )
        .unwrap();
        assert_eq!(next(&outgoing).kind, CmEventKind::AddrResolved);
        id.resolve_route(Duration::from_secs(1)).unwrap();
        assert_eq!(next(&outgoing).kind, CmEventKind::RouteResolved);
        if with_qp {
            let qp = id
                .create_qp(&client.pd, &client.cq, &client.cq, &QpCaps::default())
                .unwrap();
            assert_eq!((qp.qp_type(), qp.state()), (QpType::Ud, QpState::Rts));
            assert_eq!(qp.query().unwrap().qkey, cm::UDP_QKEY);
        }
        let long = [7; 180];
        let param = ConnParam {
            private_data: &long,
            ..ConnParam::default()
        };
        id.connect(&param).unwrap();
        let too_long = ConnParam {
            private_data: &[0; 181],
            ..param
        };
        assert_eq!(
            id.connect(&too_long),
            Err(Error::PrivateData { len: 181, max: 180 })
        );
        id
    };
    let attr = hyv_verbs::QpInitAttr::new(QpType::Ud, &server.cq, &server.cq);
    let mut shared = server.pd.create_qp_ex(&attr).unwrap();
    shared.ready_datagram(0x77, 1).unwrap();
    for with_qp in [false, true] {
        let mut theirs = ask(&client, with_qp);
        let (mut ours, said) = request(&incoming);
        assert_eq!(said, [7; 180]);
        assert_eq!(ours.accept(&ConnParam::default()), Err(Error::NoQueuePair));
        ours.use_qp(&shared);
        ours.accept(&ConnParam {
            private_data: b"here",
            qkey: 0x77,
            ..ConnParam::default()
        })
        .unwrap();
        let event = next(&outgoing);
        assert_eq!(
            (event.kind, event.private_data()),
            (CmEventKind::Established, &b"here"[..])
        );
        let peer = event.datagram_peer().unwrap();
        assert_eq!((peer.qpn, peer.qkey), (shared.qpn(), 0x77));
        assert_eq!(peer.addr, AhAttr::to(Gid([5; 16])));
        if !with_qp {
            continue;
        }
        // And back.
        let qp = theirs.qp_mut().unwrap();
        let ah = client.pd.create_ah(&peer.addr).unwrap();
        let op = SendOp::SendTo(ah.to(peer.qpn, peer.qkey));
        let mr = server.pd.alloc_mr(64, Access::LOCAL_WRITE).unwrap();
        shared
            .post_recv(&RecvWr {
                wr_id: 3,
                sges: &[mr.sge(0, 64)],
            })
            .unwrap();
        qp.post_send(&SendWr::new(4, op, Payload::Inline(b"datagram")))
            .unwrap();
        let mut done = [hyv_verbs::WorkCompletion::EMPTY; 2];
        assert_eq!(client.cq.wait(&mut done, SECOND).unwrap(), 1);
        assert!(done[0].is_ok());
    }
    // Refusals, by word and because nobody listens.
    let _id = ask(&client, false);
    let (mut ours, _) = request(&incoming);
    assert!(ours.reject(&[0; 137]).is_err());
    ours.reject(b"no").unwrap();
    let event = next(&outgoing);
    assert_eq!(event.kind, CmEventKind::Unreachable);
    assert_eq!(event.reject_reason(), Some(RejectReason::Consumer));
    assert_eq!(event.datagram_peer(), None);
    drop(listener);
    let find = cm::find_datagram(&context, (Gid::LOCAL, PORT), b"", Duration::from_secs(1));
    let error = find.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Rejected {
                reason: RejectReason::NoListener,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("nobody listens"), "{error}");
}
