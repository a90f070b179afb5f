//! The UDP carrier over loopback: no privilege, no namespace.

mod common;

use std::net::IpAddr;

use hyv_carrier::{Info, ListenAddr, OpenError, Options, UdpCarrier};
use hyv_roce::carrier::{Carrier, Flow, Sent};

fn open(ip: &str) -> Result<(UdpCarrier, Info), OpenError> {
    UdpCarrier::open(&ip.parse::<ListenAddr>()?, &Options::default())
}

#[test]
fn bursts_arrive_between_two_addresses() {
    let (mut a, info) = open("127.0.71.1").unwrap();
    let (mut b, _) = open("127.0.71.2").unwrap();
    assert_eq!((info.icrc_bits, info.interface.as_str()), (16, "lo"));
    let line = info.to_string();
    assert!(
        line.contains("127.0.71.1") && line.contains("16 of 32"),
        "{line}"
    );
    common::bursts_arrive(&mut a, &mut b);
    common::bursts_arrive(&mut b, &mut a);
}

#[test]
fn what_cannot_be_sent_is_lost() {
    let (mut a, info) = open("127.0.72.1").unwrap();
    let good = Flow {
        dst: a.local(),
        src_port: a.source_ports().0,
        traffic_class: 0,
        hop_limit: 64,
        flow_label: 0,
    };
    let v6 = "2001:db8::1".parse::<IpAddr>().unwrap();
    let bad = [
        Flow {
            src_port: 1,
            ..good
        },
        Flow {
            dst: hyv_carrier::addr::gid_of(v6),
            ..good
        },
        // Addresses that no route leads to, or that need a permission that the socket does not have.
        Flow {
            dst: hyv_carrier::addr::gid_of([255, 255, 255, 255].into()),
            ..good
        },
    ];
    for flow in bad {
        assert_eq!(a.send(&flow, 16, &[0; 16]), Sent::Lost, "{flow:?}");
    }
    assert_eq!(a.send(&good, 0, &[0; 16]), Sent::Lost);
    assert_eq!(a.send(&good, 16, &[]), Sent::Lost);
    assert_eq!(a.send(&good, 70_000, &vec![0; 70_000]), Sent::Lost);
    // None of it did any harm.
    let counters = &info.counters;
    assert_eq!(counters.lost.load(std::sync::atomic::Ordering::Relaxed), 6);
    assert_eq!(a.send(&good, 16, &[7; 40]), Sent::All);
    assert_eq!(common::receive(&mut a, 3).len(), 3);
}

#[test]
fn errors_say_what_helps() {
    let (_first, _) = open("127.0.73.1").unwrap();
    let taken = open("127.0.73.1").unwrap_err().to_string();
    let pid = format!("(pid {})", std::process::id());
    assert!(
        taken.contains("taken by") && taken.contains(&pid),
        "{taken}"
    );
    let elsewhere = open("192.0.2.77").unwrap_err().to_string();
    assert!(elsewhere.contains("127.0.0.1 (lo)"), "{elsewhere}");
    assert!(
        open("0.0.0.0")
            .unwrap_err()
            .to_string()
            .contains("wildcard")
    );
}

#[test]
fn source_ports_of_two_carriers_on_one_address_block_do_not_clash() {
    let (a, _) = open("127.0.74.1").unwrap();
    let taken = a.source_ports().0;
    // Somebody holds a port of what would be the block of the next carrier.
    let _holder = std::net::UdpSocket::bind(("127.0.74.2", taken + 3)).unwrap();
    let (b, _) = open("127.0.74.2").unwrap();
    let (first, count) = b.source_ports();
    assert!(first >= 0xC000 && count >= 2);
    assert!(!(first..first + count).contains(&(taken + 3)));
}
