//! Both carriers between network namespaces. Needs root; says so where it is missing.

mod common;

use std::net::UdpSocket;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::net::{Netns, join, pair};
use hyv_carrier::{Choice, Info, Kind, Options, PacketCarrier, open};
use hyv_roce::carrier::{Carrier, Sent};
use hyv_roce::icrc::{self, solve_ident};

const BOTH: [Choice; 2] = [Choice::Udp, Choice::Packet];

/// Every shape of burst, both ways, between every two carriers.
fn everything_arrives(mtu: usize, at_a: &str, at_b: &str) {
    let (a, b) = pair(mtu);
    for one in BOTH {
        for other in BOTH {
            let (mut left, info) = a.open(one, at_a);
            let (mut right, _) = b.open(other, at_b);
            assert_eq!((left.link_mtu(), info.mtu), (mtu, mtu));
            assert!(matches!(
                (one, info.carrier),
                (Choice::Udp, Kind::Udp) | (Choice::Packet, Kind::Packet)
            ));
            common::bursts_arrive(&mut *left, &mut *right);
            common::bursts_arrive(&mut *right, &mut *left);
            icrcs_are_right(&mut *left, &mut *right);
            icrcs_are_right(&mut *right, &mut *left);
        }
    }
}

/// Each packet's ICRC, made with the identification that the carrier promised, is right for the one that the receiver sees or finds.
fn icrcs_are_right(from: &mut dyn Carrier, to: &mut dyn Carrier) {
    let flow = common::flow(from, to, 3, 0xb8, 64);
    let icrc = icrc::Flow::new(&from.local(), &to.local(), flow.src_port);
    for (count, segment, last) in [(1, 16, 16), (1, 1044, 1044), (40, 1044, 20), (64, 272, 272)] {
        let mut bytes = common::pattern(count as u64, (count - 1) * segment + last);
        for (index, packet) in bytes.chunks_mut(segment).enumerate() {
            icrc.seal(packet, from.ident(index));
        }
        common::send(from, &flow, segment, &bytes);
        for (index, got) in common::receive(to, count).iter().enumerate() {
            let seen = icrc::Flow::new(&got.src, &got.dst, got.src_port);
            match got.ident {
                Some(ident) => assert!(seen.check(&got.payload, ident)),
                None if !seen.is_v4() => assert!(seen.check(&got.payload, 0)),
                None => {
                    let residual = seen.residual(&got.payload, 0);
                    let found = solve_ident(residual, got.payload.len());
                    assert_eq!(found, Some(from.ident(index)), "packet {index} of {count}");
                }
            }
        }
    }
}

macro_rules! matrix {
    ($($name:ident: $mtu:literal, $a:literal, $b:literal;)*) => {$(
        #[test]
        fn $name() {
            need_namespaces!();
            everything_arrives($mtu, $a, $b);
        }
    )*};
}

matrix! {
    ipv4_mtu_1500: 1500, "10.71.0.1", "10.71.0.2";
    ipv4_mtu_4300: 4300, "10.71.0.1", "10.71.0.2";
    ipv4_mtu_9000: 9000, "10.71.0.1", "10.71.0.2";
    ipv6_mtu_1500: 1500, "fd71::1", "fd71::2";
    ipv6_mtu_4300: 4300, "fd71::1", "fd71::2";
    ipv6_mtu_9000: 9000, "fd71::1", "fd71::2";
}

#[test]
fn through_a_router() {
    need_namespaces!();
    let (a, router, b) = (Netns::new(), Netns::new(), Netns::new());
    join(
        &a,
        &router,
        "hyvc0",
        1500,
        &["10.72.0.1/24", "fd72::1/64"],
        &["10.72.0.9/24", "fd72::9/64"],
    );
    join(
        &router,
        &b,
        "hyvc1",
        1500,
        &["10.73.0.9/24", "fd73::9/64"],
        &["10.73.0.1/24", "fd73::1/64"],
    );
    a.ip("route add default via 10.72.0.9");
    a.ip("-6 route add default via fd72::9");
    b.ip("route add default via 10.73.0.9");
    b.ip("-6 route add default via fd73::9");
    router.run(|| {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    });
    for (at_a, at_b) in [("10.72.0.1", "10.73.0.1"), ("fd72::1", "fd73::1")] {
        for one in BOTH {
            let (mut left, _) = a.open(one, at_a);
            let (mut right, _) = b.open(Choice::Packet, at_b);
            icrcs_are_right(&mut *left, &mut *right);
            icrcs_are_right(&mut *right, &mut *left);
            let flow = common::flow(&*left, &*right, 0, 0, 17);
            common::send(&mut *left, &flow, 64, &[1; 64]);
            assert_eq!(common::receive(&mut *right, 1)[0].hop_limit, 16);
        }
    }
}

#[test]
fn link_local_addresses_need_their_interface() {
    need_namespaces!();
    let (a, b) = (Netns::new(), Netns::new());
    join(&a, &b, "hyvc0", 1500, &["fe80::71/64"], &["fe80::72/64"]);
    join(&a, &b, "hyvc1", 1500, &["fe80::71/64"], &["fe80::73/64"]);
    let error = a.run(|| {
        open(
            Choice::Auto,
            &"fe80::71".parse().unwrap(),
            &Options::default(),
        )
        .err()
    });
    let error = error.unwrap().to_string();
    assert!(error.contains("fe80::71%hyvc0, fe80::71%hyvc1"), "{error}");
    for one in BOTH {
        for other in BOTH {
            let (mut left, _) = a.open(one, "fe80::71%hyvc0");
            let (mut right, _) = b.open(other, "fe80::72");
            icrcs_are_right(&mut *left, &mut *right);
            icrcs_are_right(&mut *right, &mut *left);
        }
    }
}

#[test]
fn two_addresses_of_one_interface_meet() {
    need_namespaces!();
    let (a, b) = pair(1500);
    a.ip("addr add 10.71.0.3/24 dev hyvc0");
    for one in BOTH {
        for other in BOTH {
            let (mut left, _) = a.open(one, "10.71.0.1");
            let (mut right, _) = a.open(other, "10.71.0.3");
            let (mut far, _) = b.open(one, "10.71.0.2");
            icrcs_are_right(&mut *left, &mut *right);
            icrcs_are_right(&mut *right, &mut *left);
            // While somebody on another machine is served too.
            icrcs_are_right(&mut *far, &mut *left);
            icrcs_are_right(&mut *left, &mut *far);
        }
    }
}

fn open_packet(netns: &Netns, addr: &str, ring_slots: usize) -> (PacketCarrier, Info) {
    let options = Options {
        ring_slots,
        ..Options::default()
    };
    netns.run(|| PacketCarrier::open(&addr.parse().unwrap(), &options).unwrap())
}

#[test]
fn the_stack_of_the_host_does_not_answer() {
    need_namespaces!();
    let (a, b) = pair(1500);
    let (mut carrier, _) = open_packet(&a, "10.71.0.1", 16);
    let socket = b.run(|| {
        let socket = UdpSocket::bind("10.71.0.2:0").unwrap();
        socket.connect("10.71.0.1:4791").unwrap();
        socket
    });
    for _ in 0..3 {
        socket.send(&[7; 32]).unwrap();
        assert_eq!(common::receive(&mut carrier, 1)[0].payload, [7; 32]);
    }
    // An ICMP "port unreachable" would show as an error here, as it does for another port of that host.
    assert!(socket.take_error().unwrap().is_none());
    socket.connect("10.71.0.1:4792").unwrap();
    socket.send(&[7; 32]).unwrap();
    let patience = Instant::now() + Duration::from_secs(10);
    while socket.take_error().unwrap().is_none() {
        assert!(
            Instant::now() < patience,
            "no ICMP: this test shows nothing"
        );
        std::thread::yield_now();
    }
    // And what is for another port is not the carrier's.
    assert_eq!(carrier.receive(&mut |_| ()), 0);
}

#[test]
fn a_peer_that_does_not_exist_costs_packets_and_nothing_else() {
    need_namespaces!();
    let (a, b) = pair(1500);
    let (mut left, _) = open_packet(&a, "10.71.0.1", 16);
    let (mut right, _) = b.open(Choice::Udp, "10.71.0.2");
    let mut nobody = common::flow(&left, &*right, 0, 0, 64);
    nobody.dst[15] = 77;
    let patience = Instant::now() + Duration::from_secs(10);
    while left.send(&nobody, 64, &[0; 64]) != Sent::Lost {
        assert!(Instant::now() < patience);
        std::thread::yield_now();
    }
    icrcs_are_right(&mut left, &mut *right);
    // No route at all.
    nobody.dst = hyv_carrier::addr::gid_of("192.0.2.1".parse().unwrap());
    assert_eq!(left.send(&nobody, 64, &[0; 64]), Sent::Lost);
    // Larger than the link takes, alone or in a burst.
    let flow = common::flow(&left, &*right, 0, 0, 64);
    assert_eq!(left.send(&flow, 1500, &[0; 1500]), Sent::Lost);
    assert_eq!(left.send(&flow, 1480, &[0; 3000]), Sent::Lost);
    assert_eq!(left.send(&flow, 16, &[0; 65 * 16]), Sent::Lost);
    icrcs_are_right(&mut *right, &mut left);
}

#[test]
fn a_full_ring_drops_and_counts() {
    need_namespaces!();
    let (a, b) = pair(1500);
    let (mut left, info) = open_packet(&a, "10.71.0.1", 16);
    let (mut right, _) = b.open(Choice::Packet, "10.71.0.2");
    let flow = common::flow(&*right, &left, 0, 0, 64);
    for _ in 0..40 {
        common::send(&mut *right, &flow, 64, &[3; 64]);
    }
    assert_eq!(common::receive(&mut left, 16).len(), 16);
    // The next frame tells of the loss.
    common::send(&mut *right, &flow, 64, &[4; 64]);
    assert_eq!(common::receive(&mut left, 1)[0].payload, [4; 64]);
    assert_eq!(info.counters.ring_full.load(Ordering::Relaxed), 24);
    assert_eq!(info.counters.received_packets.load(Ordering::Relaxed), 17);
}

#[test]
fn an_interface_that_comes_back_works_again_and_wakes_nobody_meanwhile() {
    need_namespaces!();
    for choice in BOTH {
        let (a, b) = pair(1500);
        let (mut left, info) = a.open(choice, "10.71.0.1");
        let (mut right, _) = b.open(choice, "10.71.0.2");
        icrcs_are_right(&mut *left, &mut *right);
        a.ip("link set hyvc0 down");
        let flow = common::flow(&*left, &*right, 0, 0, 64);
        let patience = Instant::now() + Duration::from_secs(10);
        while left.send(&flow, 64, &[0; 64]) != Sent::Lost {
            assert!(Instant::now() < patience);
        }
        // A driver looks, finds nothing, and sleeps: before long the descriptors are quiet.
        let quiet = |left: &mut dyn Carrier| {
            while left.receive(&mut |_| ()) > 0 {}
            info.wait_fds.iter().all(|fd| !common::readable(fd))
        };
        while !quiet(&mut *left) {
            assert!(
                Instant::now() < patience,
                "{choice:?}: a descriptor stays readable"
            );
        }
        a.ip("link set hyvc0 up");
        icrcs_are_right(&mut *left, &mut *right);
        icrcs_are_right(&mut *right, &mut *left);
    }
}

#[test]
fn descriptors_become_readable_and_stay_so_until_all_is_taken() {
    need_namespaces!();
    let (a, b) = pair(1500);
    for choice in BOTH {
        let (mut left, _) = a.open(choice, "10.71.0.1");
        let (mut right, info) = b.open(choice, "10.71.0.2");
        let any = || info.wait_fds.iter().any(common::readable);
        assert!(!any());
        let flow = common::flow(&*left, &*right, 0, 0, 64);
        for round in 1..40u8 {
            for _ in 0..round {
                common::send(&mut *left, &flow, 64, &[round; 64]);
            }
            let patience = Instant::now() + Duration::from_secs(10);
            let mut got = 0;
            while got < usize::from(round) {
                while !any() {
                    assert!(
                        Instant::now() < patience,
                        "{choice:?}: {got} of {round} came"
                    );
                }
                got += right.receive(&mut |_| ());
            }
            assert!(!any());
        }
    }
}

#[test]
fn no_packet_is_ever_fragmented() {
    need_namespaces!();
    let (a, b) = pair(1500);
    for (at_a, at_b, headers) in [("10.71.0.1", "10.71.0.2", 28), ("fd71::1", "fd71::2", 48)] {
        for choice in BOTH {
            let (mut left, _) = a.open(choice, at_a);
            let (mut right, _) = b.open(choice, at_b);
            let flow = common::flow(&*left, &*right, 0, 0, 64);
            let fits = 1500 - headers;
            common::send(&mut *left, &flow, fits, &vec![1; fits]);
            assert_eq!(common::receive(&mut *right, 1)[0].payload.len(), fits);
            assert_eq!(left.send(&flow, fits + 1, &vec![1; fits + 1]), Sent::Lost);
            assert_eq!(left.send(&flow, fits + 1, &vec![1; 3 * fits]), Sent::Lost);
            // A refused burst does not end offload.
            assert_eq!(left.burst(&flow).0, 64);
        }
    }
}

#[test]
fn without_the_capability_auto_falls_back_and_packet_says_why() {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    need_namespaces!();
    let (a, b) = pair(1500);
    let (mut left, info, error) = a.run(|| {
        // Of this thread alone.
        let none = CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, none).unwrap();
        let addr = "10.71.0.1".parse().unwrap();
        let error = open(Choice::Packet, &addr, &Options::default()).err();
        let (carrier, info) = open(Choice::Auto, &addr, &Options::default()).unwrap();
        (carrier, info, error.unwrap().to_string())
    });
    assert!(
        error.contains("CAP_NET_RAW") && error.contains("--carrier udp"),
        "{error}"
    );
    assert_eq!(info.carrier, Kind::Udp);
    let line = info.to_string();
    assert!(
        line.contains("CAP_NET_RAW") && line.contains("16 of 32"),
        "{line}"
    );
    let (mut right, _) = b.open(Choice::Auto, "10.71.0.2");
    icrcs_are_right(&mut *left, &mut *right);
    icrcs_are_right(&mut *right, &mut *left);
}

#[test]
fn interfaces_without_ethernet_are_for_udp() {
    need_namespaces!();
    let a = Netns::new();
    if let Err(error) = a.try_ip("tuntap add dev hyvc0 mode tun") {
        eprintln!("skipped: no tun interface: {error}");
        return;
    }
    a.ip("addr add 10.75.0.1/24 dev hyvc0");
    a.ip("link set hyvc0 up");
    let addr = "10.75.0.1".parse().unwrap();
    let error = a.run(|| open(Choice::Packet, &addr, &Options::default()).err());
    let error = error.unwrap().to_string();
    assert!(
        error.contains("hyvc0") && error.contains("--carrier udp"),
        "{error}"
    );
    let (_, info) = a.open(Choice::Auto, "10.75.0.1");
    assert_eq!((info.carrier, info.note.is_some()), (Kind::Udp, true));
}

#[test]
fn a_changed_mtu_is_seen() {
    need_namespaces!();
    let (a, _b) = pair(1500);
    for choice in BOTH {
        a.ip("link set hyvc0 mtu 1500");
        let (left, _) = a.open(choice, "10.71.0.1");
        assert_eq!(left.link_mtu(), 1500);
        a.ip("link set hyvc0 mtu 4300");
        let patience = Instant::now() + Duration::from_secs(10);
        while left.link_mtu() != 4300 {
            assert!(Instant::now() < patience);
            std::thread::yield_now();
        }
    }
}
