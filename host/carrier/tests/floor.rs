//! The measurements measure: every round is timed, bytes arrive, over bare sockets and through carriers.

mod common;

use std::time::Duration;

use hyv_carrier::Choice;
use hyv_carrier::floor::{self, End, Pair};

fn ends(a: &str, b: &str) -> (End, End) {
    let end = |addr: &str| End {
        addr: addr.parse().unwrap(),
        netns: None,
        cpu: None,
    };
    (end(a), end(b))
}

fn works(pair: &mut Pair) {
    for bytes in [16, 1000] {
        let trips = pair.pingpong(bytes, 50).unwrap();
        assert_eq!(trips.ns.len(), 50);
        assert!(trips.ns.iter().all(|ns| *ns > 0));
        assert!(trips.quantile(0.0) <= trips.quantile(0.5));
        assert!(trips.quantile(0.5) <= trips.quantile(1.0));
    }
    for segment in [100, 1472 - 20] {
        // On a busy machine the receiver's thread may not run at all in one slice.
        let mut slices =
            (0..200).map(|_| pair.one_way(segment, Duration::from_millis(30)).unwrap());
        let way = slices.find(|way| way.received_bytes > 0).unwrap();
        assert!(way.gb_per_s() > 0.0, "{way:?}");
        assert!(way.received_bytes <= way.sent_bytes, "{way:?}");
        assert_eq!(way.received_bytes, way.received_packets * segment as u64);
    }
}

#[test]
fn over_loopback() {
    let (a, b) = ends("127.0.78.1", "127.0.78.2");
    works(&mut Pair::udp(&a, &b, true).unwrap());
    works(&mut Pair::carriers(Choice::Udp, &a, &b).unwrap());
    assert_eq!(floor::udp_pingpong(&a, &b, 64, 20).unwrap().ns.len(), 20);
}

#[test]
fn between_namespaces() {
    need_namespaces!();
    let (one, other) = common::net::pair(1500);
    for (at_a, at_b) in [("10.71.0.1", "10.71.0.2"), ("fd71::1", "fd71::2")] {
        let (mut a, mut b) = ends(at_a, at_b);
        a.netns = Some(one.path());
        b.netns = Some(other.path());
        works(&mut Pair::udp(&a, &b, true).unwrap());
        works(&mut Pair::packet(&a, &b).unwrap());
        works(&mut Pair::carriers(Choice::Packet, &a, &b).unwrap());
        // Bare sockets beside carriers on the same addresses.
        let _open = Pair::carriers(Choice::Udp, &a, &b).unwrap();
        let trips = floor::packet_pingpong(&a, &b, 64, 20).unwrap();
        assert_eq!(trips.ns.len(), 20);
        let how_long = Duration::from_millis(20);
        for kind in [Choice::Udp, Choice::Packet] {
            let mut slices =
                (0..200).map(|_| floor::bandwidth(kind, &a, &b, 1000, how_long).unwrap());
            assert!(slices.any(|way| way.received_packets > 0));
        }
    }
}

#[test]
fn what_is_wrong_is_said() {
    let (mut a, b) = ends("127.0.79.1", "127.0.79.2");
    a.netns = Some("/var/run/netns/none-such".into());
    let error = Pair::udp(&a, &b, false).unwrap_err().to_string();
    assert!(error.contains("/var/run/netns/none-such"), "{error}");
    // Also when it goes wrong only at one end, and later.
    let (one, mut gone) = ends("127.0.79.3", "127.0.79.4");
    let (left, _) = hyv_carrier::open(Choice::Udp, &one.addr, &Default::default()).unwrap();
    let (right, _) = hyv_carrier::open(Choice::Udp, &gone.addr, &Default::default()).unwrap();
    gone.cpu = Some(usize::MAX);
    let mut pair = Pair::over(&one, &gone, left, right);
    let error = pair.pingpong(64, 1).unwrap_err().to_string();
    assert!(error.contains("CPU"), "{error}");
    assert!(pair.one_way(64, Duration::from_millis(1)).is_err());
    a.netns = None;
    a.cpu = Some(usize::MAX);
    let error = Pair::udp(&a, &b, false).unwrap_err().to_string();
    assert!(error.contains("CPU"), "{error}");
}

#[test]
fn a_namespace_without_a_name_lives_as_long_as_its_owner() {
    use hyv_carrier::sys::netns::Namespace;
    need_namespaces!();
    let made = Namespace::new().unwrap();
    let path = made.path();
    let (mut a, b) = ends("127.0.80.1", "127.0.80.2");
    a.netns = Some(path.clone());
    // Its loopback is down, so the address is not there; this namespace's is.
    let error = Pair::udp(&a, &b, false).unwrap_err().to_string();
    assert!(error.contains("127.0.80.1"), "{error}");
    drop(made);
    let error = Pair::udp(&a, &b, false).unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    a.netns = None;
    works(&mut Pair::udp(&a, &b, true).unwrap());
}
