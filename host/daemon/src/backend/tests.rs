use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hyv_abi::control::{
    AllocPd, CmAccept, CmBindAddr, CmConnect, CmCreateId, CmDestroyId, CmDisconnect, CmEstablish,
    CmEventKind, CmListen, CmParam, CmResolveAddr, CmResolveRoute, CreateQp, DeallocPd, DestroyQp,
    Empty, MAX_REPLY, MAX_REQUEST, PortSpace, QueryDevice, QueryGid, QueryPort, REPLY_HEADER_LEN,
    RequestHeader, VERBS,
};
use hyv_abi::types::{Errno, Reason, VerbError};
use proptest::prelude::*;
use zerocopy::{FromZeros, IntoBytes};

use super::testing::*;
use super::*;
use crate::cm::CmConfig;

const RAM: u64 = 2 << 20;

struct Host {
    backend: Backend,
    fake: Arc<Fake>,
}

impl Host {
    fn with(quotas: Quotas) -> Self {
        let fake = Arc::new(Fake::default());
        let config = BackendConfig {
            runtime_dir: None,
            quotas,
            ..BackendConfig::default()
        };
        Self {
            backend: Backend::spawn(config, fake.clone()).unwrap(),
            fake,
        }
    }

    fn new() -> Self {
        Self::with(Quotas::default())
    }

    fn user(&self, name: &str) -> (UserKey, Driver) {
        let (key, parts) = self.backend.add_internal(name, RAM).unwrap();
        (key, Driver::new(&parts))
    }
}

fn err<T>(errno: Errno, reason: Reason) -> Result<T, VerbError> {
    Err(VerbError::new(errno, reason))
}

/// The user still gets correct answers.
fn assert_served(d: &mut Driver) {
    let pd = d.call(AllocPd {}).unwrap().handle;
    assert_eq!(d.call(DeallocPd { pd }), Ok(Empty {}));
    assert_eq!(
        d.call(DeallocPd { pd }),
        err(Errno::NoEnt, Reason::BadHandle)
    );
}

#[test]
fn verbs_reach_the_provider_of_their_user() {
    let host = Host::new();
    let (_, mut a) = host.user("a");
    let (_, mut b) = host.user("b");
    let guid = |d: &mut Driver| d.call(QueryDevice {}).unwrap().node_guid;
    assert_eq!((guid(&mut a), guid(&mut b)), (1, 2));
    assert_eq!(
        a.call(QueryGid { port: 1, index: 0 }).unwrap().gid,
        FAKE_GID
    );
    assert_eq!(
        a.call(QueryGid { port: 1, index: 1 }),
        err(Errno::Inval, Reason::BadGid)
    );
    assert_eq!(
        a.call(QueryPort { port: 2 }),
        err(Errno::Inval, Reason::BadGid)
    );
    assert_eq!(a.call(QueryPort { port: 1 }).unwrap().state, 4);
    for _ in 0..100 {
        assert_served(&mut a);
        assert_served(&mut b);
    }
    let stats = host.backend.stats();
    assert_eq!(
        (stats.users, stats.requests, stats.broken_queues),
        (2, 606, 0)
    );
}

#[test]
fn every_verb_is_refused_when_short_or_without_room() {
    let host = Host::new();
    let (_, mut d) = host.user("a");
    for verb in VERBS {
        let header = |len: usize| RequestHeader {
            opcode: verb.opcode as u16,
            version: hyv_abi::ABI_VERSION as u16,
            len: len as u32,
            cookie: 0xc0ffee,
        };
        let bad = (Errno::Inval as u32, Reason::BadLength as u32, 0xc0ffee);
        let status =
            |(r, _): (hyv_abi::control::ReplyHeader, Vec<u8>)| (r.status, r.reason, r.cookie);
        let full = vec![0; verb.request_len];
        if verb.request_len > 0 {
            // The header says less than the verb needs; the header says more than there is.
            let short = [header(verb.request_len - 1).as_bytes(), &full[1..]].concat();
            assert_eq!(
                status(d.raw(&short, MAX_REPLY as u32)),
                bad,
                "{}",
                verb.name
            );
            let lies = [header(verb.request_len).as_bytes(), &full[1..]].concat();
            assert_eq!(
                status(d.raw(&lies, MAX_REPLY as u32)).1,
                Reason::BadLength as u32,
                "{}",
                verb.name
            );
        }
        if verb.reply_len > 0 {
            let room = (REPLY_HEADER_LEN + verb.reply_len - 1) as u32;
            let request = [header(verb.request_len).as_bytes(), &full].concat();
            let objects = host.fake.objects();
            assert_eq!(status(d.raw(&request, room)), bad, "{}", verb.name);
            assert_eq!(
                host.fake.objects(),
                objects,
                "{} was carried out",
                verb.name
            );
        }
        // Later fields are ignored, up to any length.
        let mut long = [header(MAX_REQUEST + 100).as_bytes(), &full].concat();
        long.resize(MAX_REQUEST + 200, 0xff);
        assert_ne!(
            status(d.raw(&long, MAX_REPLY as u32)).1,
            Reason::BadLength as u32,
            "{}",
            verb.name
        );
    }
    assert_served(&mut d);
}

#[test]
fn versions_opcodes_and_headers() {
    let host = Host::new();
    let (_, mut d) = host.user("a");
    let good = d.header::<AllocPd>();
    let answer = |d: &mut Driver, h: RequestHeader| {
        let r = d.raw(h.as_bytes(), MAX_REPLY as u32).0;
        (
            Errno::from_u32(r.status),
            Reason::from_u32(r.reason),
            r.cookie,
        )
    };
    let c = good.cookie;
    assert_eq!(
        answer(
            &mut d,
            RequestHeader {
                version: good.version + 1,
                ..good
            }
        ),
        (Errno::ProtoNoSupport, Reason::BadVersion, c)
    );
    for opcode in [0, 9, 59, 72, u16::MAX] {
        assert_eq!(
            answer(&mut d, RequestHeader { opcode, ..good }),
            (Errno::NoSys, Reason::BadOpcode, c)
        );
    }
    // Less than a header: no cookie to give back.
    for len in 0..size_of::<RequestHeader>() {
        let r = d.raw(&good.as_bytes()[..len], MAX_REPLY as u32).0;
        assert_eq!(
            (Reason::from_u32(r.reason), r.cookie),
            (Reason::BadLength, 0),
            "{len}"
        );
    }
    assert_served(&mut d);
}

#[test]
fn chains_that_make_no_sense_get_an_error_where_there_is_room() {
    let host = Host::new();
    let (_, mut d) = host.user("a");
    let header = d.header::<AllocPd>();
    d.ram.write_at(REQUEST, header.as_bytes()).unwrap();
    let len = header.as_bytes().len() as u32;
    let room = MAX_REPLY as u32;
    let fault = Some((Errno::Fault, Reason::OutsideRam));
    let bad = Some((Errno::Inval, Reason::BadLength));
    let (req, reply) = ((REQUEST, len, NEXT, 1), (REPLY, room, WRITE, 0));
    type Case = (&'static str, Vec<Desc>, Option<(Errno, Reason)>);
    let cases: Vec<Case> = vec![
        ("no reply", vec![(REQUEST, len, 0, 0)], None),
        (
            "reply too small",
            vec![req, (REPLY, HEADER_ONLY - 1, WRITE, 0)],
            None,
        ),
        ("reply outside", vec![req, (RAM - 8, room, WRITE, 0)], None),
        (
            "reply at the end of addresses",
            vec![req, (u64::MAX - 8, room, WRITE, 0)],
            None,
        ),
        ("request outside", vec![(RAM, 1, NEXT, 1), reply], fault),
        (
            "request around the end of addresses",
            vec![(u64::MAX, 1 << 30, NEXT, 1), reply],
            fault,
        ),
        (
            "4 GiB in all, which virtio forbids: the reply is never reached",
            vec![(0, u32::MAX, NEXT, 1), reply],
            None,
        ),
        (
            "one reply piece outside",
            vec![req, (REPLY, room, WRITE | NEXT, 2), (RAM, 8, WRITE, 0)],
            fault,
        ),
        (
            "request after reply",
            vec![req, (REPLY, room, WRITE | NEXT, 2), (REQUEST, 8, 0, 0)],
            bad,
        ),
        (
            "next does not exist",
            vec![req, (REPLY, room, WRITE | NEXT, 999)],
            bad,
        ),
        ("circle", vec![req, (REPLY, room, WRITE | NEXT, 1)], bad),
        ("no request", vec![(REPLY, room, WRITE, 0)], bad),
        ("empty request", vec![(REQUEST, 0, NEXT, 1), reply], bad),
        (
            "indirect table outside",
            vec![req, (RAM * 2, 64, 4 | NEXT, 2), reply],
            None,
        ),
    ];
    for (name, chain, expected) in cases {
        d.ram.write_at(REPLY, &[0xaa; 64]).unwrap();
        d.submit(&chain);
        let written = d.wait_used();
        let got = (written > 0).then(|| {
            let (r, body) = d.reply(written);
            assert!(body.is_empty());
            (Errno::from_u32(r.status), Reason::from_u32(r.reason))
        });
        assert_eq!(got, expected, "{name}");
    }
    assert_eq!(host.fake.objects(), 0, "none of them was carried out");
    // Request and reply in many pieces are fine, up to the limit.
    let pieces = limits::MAX_REPLY_SEGMENTS as u16;
    let mut chain: Vec<Desc> = vec![(REQUEST, 3, NEXT, 1), (REQUEST + 3, len - 3, NEXT, 2)];
    chain.extend((0..13).map(|i| (REPLY + 4 * i, 4, WRITE | NEXT, 3 + i as u16)));
    chain.push((REPLY + 52, 100, WRITE, 0));
    assert!(chain.len() <= usize::from(pieces));
    d.submit(&chain);
    let written = d.wait_used();
    assert_eq!(d.reply(written).0.status, 0);
    assert_served(&mut d);
    assert_eq!(host.backend.stats().broken_queues, 0);
}

#[test]
fn queues_that_cannot_be_are_not_served_until_set_up_again() {
    let host = Host::new();
    let (_, mut d) = host.user("a");
    let (_, mut other) = host.user("b");
    assert_served(&mut d);
    let bad = [
        (DESC, AVAIL, USED, 0),
        (DESC, AVAIL, USED, 3),
        (DESC, AVAIL, USED, 512),
        (DESC, AVAIL, USED, 0x1_0010),
        (DESC + 8, AVAIL, USED, 16),
        (DESC, AVAIL + 1, USED, 16),
        (DESC, AVAIL, USED + 2, 16),
        (0, AVAIL, USED, 16),
        (DESC, 0, USED, 16),
        (RAM - 16, AVAIL, USED, 16),
        (DESC, RAM - 16, USED, 16),
        (DESC, AVAIL, u64::MAX - 3, 16),
        (!15, AVAIL, USED, 16),
    ];
    for (n, (desc, avail, used, size)) in bad.into_iter().enumerate() {
        d.disable();
        d.enable(desc, avail, used, size);
        let broken = || host.backend.stats().broken_queues == n as u64 + 1;
        other.wait("the queue to be found broken", broken);
        assert_served(&mut other);
    }
    d.disable();
    d.enable(DESC, AVAIL, USED, QUEUE_SIZE.into());
    assert_served(&mut d);
    // Enabled once more, where it is: nothing changes.
    d.enable(DESC, AVAIL, USED, QUEUE_SIZE.into());
    assert_served(&mut d);
    assert_eq!(host.backend.stats().broken_queues, bad.len() as u64);
    // Enabled elsewhere without ever having been seen disabled: moved. There it is refused, here it goes on.
    d.enable(0, 1, 2, 3);
    other.wait("the queue to be found broken", || {
        host.backend.stats().broken_queues == bad.len() as u64 + 1
    });
    d.enable(DESC, AVAIL, USED, QUEUE_SIZE.into());
    assert_served(&mut d);
}

#[test]
fn a_queue_may_be_left_and_taken_up_again() {
    let host = Host::new();
    let (_, mut d) = host.user("a");
    for _ in 0..3 {
        assert_served(&mut d);
        d.window.user.control.enable.store(0, Ordering::Release);
        d.kick.signal().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        // The same rings, with the indices they had.
        d.enable(DESC, AVAIL, USED, QUEUE_SIZE.into());
    }
    assert_served(&mut d);
    assert_eq!(host.backend.stats().broken_queues, 0);
}

#[test]
fn rings_that_contradict_themselves_end_the_service_of_that_user_only() {
    let host = Host::new();
    let (_, mut d) = host.user("a");
    let (_, mut other) = host.user("b");
    let mut broken = 0;
    let mut expect_broken = |other: &mut Driver| {
        broken += 1;
        other.wait("the queue to be found broken", || {
            host.backend.stats().broken_queues == broken
        });
        assert_served(other);
    };
    d.set_avail(QUEUE_SIZE + 1);
    expect_broken(&mut other);
    d.disable();
    d.enable(DESC, AVAIL, USED, QUEUE_SIZE.into());
    assert_served(&mut d);
    d.make_available(QUEUE_SIZE);
    expect_broken(&mut other);
    // Nothing is served now, whatever is kicked.
    let used = d.used_index();
    d.set_avail(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(d.used_index(), used);
    d.disable();
    d.enable(DESC, AVAIL, USED, QUEUE_SIZE.into());
    assert_served(&mut d);
}

#[test]
fn requests_per_second_are_limited_per_user() {
    let quotas = Quotas {
        requests_per_second: 50,
        request_burst: 20,
        ..Quotas::default()
    };
    let host = Host::with(quotas);
    let (_, mut d) = host.user("a");
    let (_, mut other) = host.user("b");
    let start = Instant::now();
    let results: Vec<_> = (0..200)
        .map(|_| d.call(QueryPort { port: 1 }).map(|p| p.state))
        .collect();
    let allowed = results.iter().filter(|r| **r == Ok(4)).count();
    let refused = results
        .iter()
        .filter(|r| **r == err(Errno::DQuot, Reason::QuotaRate))
        .count();
    assert_eq!(allowed + refused, 200);
    let most = 20 + (start.elapsed().as_millis() as usize * 50).div_ceil(1000) + 1;
    assert!(
        (20..=most).contains(&allowed),
        "{allowed} of at most {most}"
    );
    assert!(other.call(QueryPort { port: 1 }).is_ok());
    std::thread::sleep(Duration::from_millis(60));
    assert!(d.call(QueryPort { port: 1 }).is_ok(), "it comes back");
}

#[test]
fn quotas_of_the_provider_and_of_identifiers_come_through() {
    let quotas = Quotas {
        cm: CmConfig {
            max_ids: 5,
            ..CmConfig::default()
        },
        ..Quotas::default()
    };
    let host = Host::with(quotas);
    let (_, mut d) = host.user("a");
    let full = err(Errno::NoMem, Reason::QuotaObjects);
    for _ in 0..FAKE_OBJECTS {
        d.call(AllocPd {}).unwrap();
    }
    assert_eq!(d.call(AllocPd {}), full);
    let ids: Vec<u32> = (0..5)
        .map(|_| {
            d.call(CmCreateId {
                port_space: PortSpace::Tcp as u32,
                reserved: 0,
            })
            .unwrap()
            .handle
        })
        .collect();
    assert_eq!(
        d.call(CmCreateId {
            port_space: PortSpace::Tcp as u32,
            reserved: 0
        }),
        full
    );
    d.call(CmDestroyId { id: ids[0] }).unwrap();
    d.call(CmCreateId {
        port_space: PortSpace::Tcp as u32,
        reserved: 0,
    })
    .unwrap();
    let _more: Vec<_> = (1..FAKE_USERS).map(|_| host.user("x")).collect();
    let e = host.backend.add_internal("late", RAM).unwrap_err();
    assert!(matches!(e, BackendError::Refused { .. }), "{e}");
    assert!(e.to_string().contains("late"), "{e}");
    let e = host.backend.add_internal("none", 0).unwrap_err();
    assert!(e.to_string().contains("no bytes"), "{e}");
    let e = host.backend.add_internal("huge", u64::MAX).unwrap_err();
    assert!(
        matches!(e, BackendError::Refused { source, .. } if source.reason == Reason::QuotaMemory),
        "{e}"
    );
}

fn qp(d: &mut Driver) -> (u32, u32) {
    let r = d.call(CreateQp::new_zeroed()).unwrap();
    (r.handle, r.qpn)
}

fn with_qpn(qpn: u32) -> CmParam {
    CmParam {
        qpn,
        ..CmParam::EMPTY
    }
}

/// Listener in `b`, request of `a` fetched by `b`: (client's id, server's id).
fn requested(a: &mut Driver, b: &mut Driver, qpn: u32) -> (u32, u32) {
    let listener = b
        .call(CmCreateId {
            port_space: PortSpace::Tcp as u32,
            reserved: 0,
        })
        .unwrap()
        .handle;
    let addr = b
        .call(CmBindAddr {
            id: listener,
            port: 0,
            gid: [0; 16],
        })
        .unwrap();
    b.call(CmListen {
        id: listener,
        backlog: 2,
    })
    .unwrap();
    let id = a
        .call(CmCreateId {
            port_space: PortSpace::Tcp as u32,
            reserved: 0,
        })
        .unwrap()
        .handle;
    a.call(CmResolveAddr {
        id,
        port: addr.port,
        gid: addr.gid,
        timeout_ms: 10,
        reserved: 0,
    })
    .unwrap();
    a.event(CmEventKind::AddrResolved);
    a.call(CmResolveRoute { id, timeout_ms: 10 }).unwrap();
    a.event(CmEventKind::RouteResolved);
    a.call(CmConnect {
        id,
        param: with_qpn(qpn),
    })
    .unwrap();
    let e = b.event(CmEventKind::ConnectRequest);
    assert_eq!((e.listen_id, e.param.qpn), (listener, qpn));
    (id, e.id)
}

#[test]
fn two_users_meet_and_part() {
    let host = Host::new();
    let (_, mut a) = host.user("a");
    let (_, mut b) = host.user("b");
    let ((a_handle, a_qpn), (_, b_qpn)) = (qp(&mut a), qp(&mut b));
    let (client, server) = requested(&mut a, &mut b, a_qpn);
    assert_eq!(
        b.call(CmAccept {
            id: server,
            param: with_qpn(a_qpn)
        }),
        err(Errno::NoEnt, Reason::BadHandle),
        "another user's queue pair"
    );
    b.call(CmAccept {
        id: server,
        param: with_qpn(b_qpn),
    })
    .unwrap();
    assert_eq!(a.event(CmEventKind::ConnectResponse).param.qpn, b_qpn);
    a.call(CmEstablish { id: client }).unwrap();
    a.event(CmEventKind::Established);
    b.event(CmEventKind::Established);
    assert!(host.fake.log().is_empty());
    // A queue pair that is gone is not failed.
    a.call(DestroyQp { qp: a_handle }).unwrap();
    b.call(CmDisconnect { id: server }).unwrap();
    // By the time of the answer it is done.
    assert_eq!(host.fake.log(), [format!("fail 2:{b_qpn}")]);
    a.event(CmEventKind::Disconnected);
    b.event(CmEventKind::Disconnected);
}

#[test]
fn a_dead_users_peers_are_told_and_their_queue_pairs_fail_first() {
    let host = Host::new();
    let (_, mut a) = host.user("a");
    let (key, mut b) = host.user("b");
    let ((_, a_qpn), (_, b_qpn)) = (qp(&mut a), qp(&mut b));
    let (client, server) = requested(&mut a, &mut b, a_qpn);
    b.call(CmAccept {
        id: server,
        param: with_qpn(b_qpn),
    })
    .unwrap();
    a.event(CmEventKind::ConnectResponse);
    a.call(CmEstablish { id: client }).unwrap();
    a.event(CmEventKind::Established);
    let _ = a.wake.take().unwrap();
    assert!(host.backend.remove_user(key).unwrap());
    assert!(!host.backend.remove_user(key).unwrap());
    assert_eq!(
        host.fake.log(),
        [format!("fail 1:{a_qpn}"), "remove 2".into()]
    );
    assert!(
        a.wake.wait(Some(PATIENCE)).unwrap() > 0,
        "woken without asking"
    );
    a.event(CmEventKind::Disconnected);
    assert_eq!(host.backend.users().len(), 1);
    assert_served(&mut a);
}

#[test]
fn half_open_connections_time_out_by_the_clock() {
    let cm = CmConfig {
        connect_timeout_ns: 30_000_000,
        ..CmConfig::default()
    };
    let host = Host::with(Quotas {
        cm,
        ..Quotas::default()
    });
    let (_, mut a) = host.user("a");
    let (_, mut b) = host.user("b");
    let (_, qpn) = qp(&mut a);
    requested(&mut a, &mut b, qpn);
    let start = Instant::now();
    a.event(CmEventKind::Unreachable);
    b.event(CmEventKind::Rejected);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_user_is_woken_when_it_asked_to_be() {
    let host = Host::new();
    let (_, d) = host.user("a");
    let word = &d.window.user.wake_in_ns;
    let ask = |ns| {
        word.store(ns, Ordering::Release);
        d.kick.signal().unwrap();
        d.wait("the request to be taken", || {
            word.load(Ordering::Acquire) == 0
        });
    };
    let _ = d.wake.take().unwrap();
    let start = Instant::now();
    ask(20_000_000);
    assert!(d.wake.wait(Some(PATIENCE)).unwrap() > 0);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(20), "{took:?}");
    // Said before the wake-up is seen, or the user would not ask again.
    let fired = &d.window.header.timer_fired;
    assert_eq!(fired.load(Ordering::Acquire), 1);
    // A later one takes the place of an earlier one; one that never comes does no harm.
    ask(u64::MAX);
    assert_eq!(d.wake.wait(Some(Duration::from_millis(30))).unwrap(), 0);
    assert_eq!(fired.load(Ordering::Acquire), 1);
    ask(1);
    assert!(d.wake.wait(Some(PATIENCE)).unwrap() > 0);
    assert_eq!(fired.load(Ordering::Acquire), 2);
}

#[test]
fn replies_wake_only_who_wants_it() {
    let host = Host::new();
    let (_, mut d) = host.user("a");
    d.call(QueryPort { port: 1 }).unwrap();
    assert!(d.wake.wait(Some(PATIENCE)).unwrap() > 0);
    // VIRTQ_AVAIL_F_NO_INTERRUPT
    d.ram.write_at(AVAIL, &1u16.to_le_bytes()).unwrap();
    for _ in 0..20 {
        d.call(QueryPort { port: 1 }).unwrap();
    }
    assert_eq!(d.wake.wait(Some(Duration::from_millis(20))).unwrap(), 0);
    // What is no reply wakes all the same.
    let id = d
        .call(CmCreateId {
            port_space: PortSpace::Tcp as u32,
            reserved: 0,
        })
        .unwrap()
        .handle;
    d.call(CmResolveAddr {
        id,
        port: 1,
        gid: FAKE_GID,
        timeout_ms: 1,
        reserved: 0,
    })
    .unwrap();
    assert!(d.wake.wait(Some(PATIENCE)).unwrap() > 0);
}

#[test]
fn the_beat_goes_on_and_stopping_tells_everyone() {
    let mut host = Host::new();
    let (_, d) = host.user("a");
    let header = &d.window.header;
    let (first, start) = (header.host_beat.load(Ordering::Acquire), Instant::now());
    d.wait("beats", || {
        header.host_beat.load(Ordering::Acquire) >= first + 6
    });
    assert!(
        start.elapsed() < Duration::from_millis(1500),
        "{:?} for six beats",
        start.elapsed()
    );
    assert!(host.backend.is_running());
    host.backend.stop();
    host.backend.stop();
    assert_eq!(header.shutdown.load(Ordering::Acquire), 1);
    assert!(d.wake.wait(Some(PATIENCE)).unwrap() > 0);
    assert_eq!((host.fake.users(), host.backend.users().len()), (0, 0));
    assert!(!host.backend.is_running());
    assert!(matches!(
        host.backend.add_internal("late", RAM),
        Err(BackendError::Stopped)
    ));
}

#[test]
fn many_requests_at_once_are_shared_out() {
    let host = Host::new();
    let (_, mut a) = host.user("a");
    let (_, mut b) = host.user("b");
    let header = a.header::<QueryPort>();
    let request = [header.as_bytes(), QueryPort { port: 1 }.as_bytes()].concat();
    a.ram.write_at(REQUEST, &request).unwrap();
    // The same chain, a ring full at a time.
    for round in 1..=50u16 {
        a.submit(&[
            (REQUEST, request.len() as u32, NEXT, 1),
            (REPLY, MAX_REPLY as u32, WRITE, 0),
        ]);
        for _ in 1..QUEUE_SIZE {
            a.make_available(0);
        }
        if round % 10 == 0 {
            assert_served(&mut b);
        }
        a.wait("all replies", || a.used_index() == round * QUEUE_SIZE);
    }
}

/// A hostile user: bytes for its rings, descriptors, requests and queue set-up.
#[derive(Clone, Debug)]
enum Mischief {
    Ram(u64, Vec<u8>),
    Setup([u64; 3], u32, u32),
    Avail(u16),
    Descriptor(u16, Desc),
    Request(Vec<u8>),
    Wake(u64),
}

fn mischief() -> impl Strategy<Value = Mischief> {
    let near = prop_oneof![0..0x8000u64, RAM - 0x100..RAM + 0x100, any::<u64>()];
    let desc = (
        near.clone(),
        prop_oneof![0..1024u32, any::<u32>()],
        0..8u16,
        0..20u16,
    );
    let header = (
        0..80u16,
        0..3u16,
        prop_oneof![0..512u32, any::<u32>()],
        any::<u64>(),
    );
    prop_oneof![
        (
            0x1000..0x6000u64,
            proptest::collection::vec(any::<u8>(), 1..64)
        )
            .prop_map(|(o, b)| Mischief::Ram(o, b)),
        (
            proptest::array::uniform3(near),
            prop_oneof![Just(16u32), any::<u32>()],
            0..3u32
        )
            .prop_map(|(a, s, e)| Mischief::Setup(a, s, e)),
        prop_oneof![0..40u16, any::<u16>()].prop_map(Mischief::Avail),
        (0..16u16, desc).prop_map(|(i, d)| Mischief::Descriptor(i, d)),
        (header, proptest::collection::vec(any::<u8>(), 0..496)).prop_map(
            |((opcode, version, len, cookie), body)| {
                let h = RequestHeader {
                    opcode,
                    version,
                    len,
                    cookie,
                };
                Mischief::Request([h.as_bytes(), &body].concat())
            }
        ),
        any::<u64>().prop_map(Mischief::Wake),
    ]
}

fn make(d: &mut Driver, what: &Mischief) {
    let ram = &d.ram;
    match what {
        Mischief::Ram(offset, bytes) => ram.write_at(*offset, bytes).unwrap(),
        Mischief::Setup([desc, avail, used], size, enable) => {
            let (desc, avail, used) = if *enable == 2 {
                (DESC, AVAIL, USED)
            } else {
                (*desc, *avail, *used)
            };
            d.window.user.control.enable.store(0, Ordering::Release);
            d.kick.signal().unwrap();
            if *enable != 0 {
                d.enable(desc, avail, used, *size);
            }
        }
        Mischief::Avail(index) => d.set_avail(*index),
        Mischief::Descriptor(i, (addr, len, flags, next)) => {
            let bytes = [
                &addr.to_le_bytes()[..],
                &len.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ];
            ram.write_at(DESC + 16 * u64::from(*i), &bytes.concat())
                .unwrap();
        }
        Mischief::Request(bytes) => {
            ram.write_at(REQUEST, bytes).unwrap();
            d.submit(&[
                (REQUEST, bytes.len() as u32, NEXT, 1),
                (REPLY, MAX_REPLY as u32, WRITE, 0),
            ]);
        }
        Mischief::Wake(ns) => d.window.user.wake_in_ns.store(*ns, Ordering::Release),
    }
    d.kick.signal().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Whatever one user does, the host and the other user go on.
    #[test]
    fn garbage_harms_only_its_author(acts in proptest::collection::vec(mischief(), 1..60)) {
        let host = Host::new();
        let (key, mut bad) = host.user("bad");
        let (_, mut good) = host.user("good");
        for (i, act) in acts.iter().enumerate() {
            make(&mut bad, act);
            if i % 8 == 0 {
                assert_served(&mut good);
            }
        }
        assert_served(&mut good);
        prop_assert!(host.backend.is_running());
        prop_assert!(host.backend.remove_user(key).unwrap());
        assert_served(&mut good);
        prop_assert_eq!(host.fake.users(), 1);
    }
}
