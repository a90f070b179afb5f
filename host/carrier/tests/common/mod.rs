//! What the tests share: bursts of all shapes, sent by one carrier and checked as they arrive at another.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod net;

use std::time::{Duration, Instant};

use hyv_roce::carrier::{Carrier, Flow, Sent};

/// A packet as it arrived.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Got {
    pub src: [u8; 16],
    pub dst: [u8; 16],
    pub src_port: u16,
    pub traffic_class: u8,
    pub hop_limit: u8,
    pub ident: Option<u16>,
    pub payload: Vec<u8>,
}

/// A flow from one carrier to another.
pub fn flow(
    from: &dyn Carrier,
    to: &dyn Carrier,
    port: u16,
    traffic_class: u8,
    hop_limit: u8,
) -> Flow {
    Flow {
        dst: to.local(),
        src_port: from.source_ports().0 + port,
        traffic_class,
        hop_limit,
        flow_label: 0,
    }
}

/// Sends a burst; waits for room and for the neighbour to be known.
pub fn send(from: &mut dyn Carrier, flow: &Flow, segment: usize, payloads: &[u8]) {
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        match from.send(flow, segment, payloads) {
            Sent::All => return,
            Sent::Busy if Instant::now() < patience => {
                std::thread::sleep(Duration::from_micros(100))
            }
            other => panic!(
                "{} bytes in segments of {segment}: {other:?}",
                payloads.len()
            ),
        }
    }
}

/// Receives until `want` packets came; the test fails if they do not within 10 s.
pub fn receive(at: &mut dyn Carrier, want: usize) -> Vec<Got> {
    let mut got = Vec::new();
    let patience = Instant::now() + Duration::from_secs(10);
    while got.len() < want {
        let before = got.len();
        let packets = at.receive(&mut |arrival| {
            got.push(Got {
                src: arrival.src,
                dst: arrival.dst,
                src_port: arrival.src_port,
                traffic_class: arrival.traffic_class,
                hop_limit: arrival.hop_limit,
                ident: arrival.ident,
                payload: arrival.payload.to_vec(),
            });
        });
        assert_eq!(packets, got.len() - before);
        assert!(
            Instant::now() < patience,
            "{} of {want} packets came",
            got.len()
        );
        if packets == 0 {
            std::thread::yield_now();
        }
    }
    got
}

/// Bytes that differ from packet to packet.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// Bursts as (packets, bytes of each, bytes of the last) that fit `mtu`: one, few, all, with short and even last ones.
pub fn shapes(mtu: usize, limit: (usize, usize), headers: usize) -> Vec<(usize, usize, usize)> {
    let mut shapes = Vec::new();
    for segment in [
        16,
        20,
        64,
        256 + 16,
        1024 + 32,
        2048 + 16,
        4096 + 44,
        mtu - headers,
    ] {
        if segment > mtu - headers {
            continue;
        }
        let most = limit.0.min(limit.1 / segment);
        for count in [1, 2, 3, 7, most.saturating_sub(1), most] {
            if count == 0 || count > most {
                continue;
            }
            for last in [segment, segment / 2, 16] {
                if last <= segment {
                    shapes.push((count, segment, last));
                }
            }
        }
    }
    shapes.sort_unstable();
    shapes.dedup();
    shapes
}

/// Sends every shape of burst and checks that each packet arrives whole and in order, with what its headers said.
pub fn bursts_arrive(from: &mut dyn Carrier, to: &mut dyn Carrier) {
    let ipv4 = from.local()[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    let headers = if ipv4 { 28 } else { 48 };
    let mtu = from.link_mtu();
    let (_, ports) = from.source_ports();
    let probe = flow(from, to, 0, 0, 64);
    let shapes = shapes(mtu.min(9000), from.burst(&probe), headers);
    assert!(shapes.len() > 20, "{shapes:?}");
    for (round, (count, segment, last)) in shapes.into_iter().enumerate() {
        let class = [0, 0xb8, 0x02, 0xff][round % 4];
        let hop_limit = [64, 1, 255][round % 3];
        let flow = flow(from, to, round as u16 % ports, class, hop_limit);
        let payloads = pattern(round as u64, (count - 1) * segment + last);
        send(from, &flow, segment, &payloads);
        let got = receive(to, count);
        let shape = format!("{count} packets of {segment}, the last of {last}");
        assert_eq!(got.len(), count, "{shape}");
        for (index, (got, sent)) in got.iter().zip(payloads.chunks(segment)).enumerate() {
            assert_eq!(got.payload.len(), sent.len(), "{shape}: packet {index}");
            assert!(got.payload == sent, "{shape}: packet {index} differs");
            assert_eq!(got.src, from.local());
            assert_eq!(got.dst, to.local());
            assert_eq!(got.src_port, flow.src_port);
            assert_eq!(got.traffic_class, class, "{shape}");
            assert_eq!(got.hop_limit, hop_limit, "{shape}");
            if let Some(ident) = got.ident {
                assert_eq!(ident, from.ident(index), "{shape}: packet {index}");
            }
            assert!(ipv4 || got.ident.is_none());
        }
    }
}

/// Whether `poll` says that a descriptor has something, be it an error.
pub fn readable(fd: &std::os::fd::OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).unwrap() > 0
}
