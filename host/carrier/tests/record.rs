//! Recordings: every packet, sent and received, as it went over the wire.

mod common;

use hyv_carrier::{ListenAddr, Options, Recorded, UdpCarrier};
use hyv_roce::carrier::Carrier;
use hyv_roce::icrc::Flow;
use hyv_roce::wire::{ip, udp};

/// Packets of a recording: (nanoseconds since 1970, IP packet).
fn read(path: &std::path::Path) -> Vec<(u64, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(20)), (0xa1b2_3c4d, 101));
    let mut packets = Vec::new();
    let mut at = 24;
    while at < bytes.len() {
        let (seconds, nanos, kept, len) = (word(at), word(at + 4), word(at + 8), word(at + 12));
        assert_eq!(kept, len);
        at += 16;
        let when = u64::from(seconds) * 1_000_000_000 + u64::from(nanos);
        packets.push((when, bytes[at..at + len as usize].to_vec()));
        at += len as usize;
    }
    packets
}

#[test]
fn both_ends_record_the_same_packets_with_right_icrcs() {
    let folder = tempfile::tempdir().unwrap();
    let open = |ip: &str, file: &str| {
        let addr = ip.parse::<ListenAddr>().unwrap();
        let (carrier, info) = UdpCarrier::open(&addr, &Options::default()).unwrap();
        let path = folder.path().join(file);
        let boxed: Box<dyn Carrier> = Box::new(carrier);
        (Recorded::new(boxed, &path).unwrap(), path, info)
    };
    let (mut a, path_a, _) = open("127.0.76.1", "a.pcap");
    let (mut b, path_b, _) = open("127.0.76.2", "b.pcap");
    let mut sent = Vec::new();
    for (round, (count, segment, last)) in [(1, 16, 16), (5, 1044, 20), (60, 1044, 1044), (1, 4, 4)]
        .into_iter()
        .enumerate()
    {
        let flow = common::flow(&a, &b, round as u16, 0x68, 33);
        let icrc = Flow::new(&a.local(), &b.local(), flow.src_port);
        let mut bytes = common::pattern(round as u64, (count - 1) * segment + last);
        for (index, packet) in bytes.chunks_mut(segment).enumerate() {
            icrc.seal(packet, a.ident(index));
            sent.push((flow.src_port, index as u16, packet.to_vec()));
        }
        common::send(&mut a, &flow, segment, &bytes);
        assert_eq!(common::receive(&mut b, count).len(), count);
    }
    drop((a, b));
    let (at_a, at_b) = (read(&path_a), read(&path_b));
    assert!(at_a.is_sorted_by_key(|(when, _)| *when));
    let bare = |packets: &[(u64, Vec<u8>)]| -> Vec<Vec<u8>> {
        packets.iter().map(|(_, packet)| packet.clone()).collect()
    };
    assert!(bare(&at_a) == bare(&at_b));
    assert_eq!(at_a.len(), sent.len());
    for ((_, packet), (src_port, ident, payload)) in at_a.iter().zip(&sent) {
        let (header, rest) = ip::V4::parse(packet).unwrap();
        let (datagram, got) = udp::Udp::parse(rest).unwrap();
        assert_eq!((header.tos, header.ttl, header.ident), (0x68, 33, *ident));
        assert_eq!((header.src, header.dst), ([127, 0, 76, 1], [127, 0, 76, 2]));
        assert_eq!((datagram.src_port, datagram.dst_port), (*src_port, 4791));
        assert!(got == payload);
    }
}

#[test]
fn a_file_that_cannot_be_made_is_an_error() {
    let addr = "127.0.77.1".parse::<ListenAddr>().unwrap();
    let (carrier, _) = UdpCarrier::open(&addr, &Options::default()).unwrap();
    let error = Recorded::new(carrier, "/proc/none/such.pcap".as_ref()).err();
    assert_eq!(error.unwrap().kind(), std::io::ErrorKind::NotFound);
}
