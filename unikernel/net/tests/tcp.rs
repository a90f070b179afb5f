//! Two stacks on one wire with a virtual clock: every call as an appliance makes it, without faults and with.

mod world;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use hyv_net::limits::{BACKLOG, LINGER, MAX_LEFTOVERS};
use hyv_net::{Error, IpAddress, Net, TcpListener, TcpStream};
use proptest::prelude::*;
use world::{Faults, Random, World};

const A: &str = "10.0.0.1/24;fd00::1/64";
const B: &str = "10.0.0.2/24;fd00::2/64";
const PORT: u16 = 7;
const LIMIT: Duration = Duration::from_secs(120);

fn b4() -> IpAddress {
    IpAddress::v4(10, 0, 0, 2)
}

fn b6() -> IpAddress {
    IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, 2)
}

/// Side 1 echoes what it is sent, and closes when its peer does. It gives up a connection that fails.
fn echo(world: &World, net: &Net) {
    let mut listener = TcpListener::bind(net, PORT).unwrap();
    let mut streams: Vec<(TcpStream, Vec<u8>, bool)> = Vec::new();
    world.act(move || {
        if let Some(mut stream) = listener.try_accept() {
            stream.set_timeout(Some(Duration::ZERO));
            streams.push((stream, Vec::new(), false));
        }
        streams.retain_mut(|(stream, pending, ended)| {
            let mut piece = [0; 3000];
            if pending.is_empty() && !*ended {
                match stream.read(&mut piece) {
                    Ok(0) => *ended = true,
                    Ok(n) => pending.extend(&piece[..n]),
                    Err(Error::TimedOut) => {}
                    Err(_) => return false,
                }
            }
            match stream.write(pending) {
                Ok(n) => drop(pending.drain(..n)),
                Err(Error::TimedOut) => {}
                Err(_) => return false,
            }
            !(*ended && pending.is_empty())
        });
    });
}

/// Sends `len` bytes and reads them back, as a client that waits must: a piece at a time.
fn exchange(stream: &mut TcpStream, len: usize, seed: u64) -> Result<(), Error> {
    let mut random = Random::new(seed);
    let mut left = len;
    while left > 0 {
        let n = left.min(1 + random.below(20_000) as usize);
        let mut sent = vec![0; n];
        random.fill(&mut sent);
        stream.write_all(&sent)?;
        let mut got = vec![0; n];
        stream.read_exact(&mut got)?;
        assert!(sent == got, "{n} bytes came back changed");
        left -= n;
    }
    Ok(())
}

/// Side 1 serves its network and does nothing else.
fn polls(world: &World, net: &Net) {
    let net = net.clone();
    world.act(move || {
        net.poll();
    });
}

fn connect(net: &Net, to: IpAddress) -> Result<TcpStream, Error> {
    let mut stream = TcpStream::connect(net, to, PORT, Some(LIMIT))?;
    stream.set_timeout(Some(LIMIT));
    Ok(stream)
}

fn pair(seed: u64, faults: Faults) -> (Rc<World>, Net, Net) {
    let world = World::new(seed, faults);
    let (a, b) = (world.net(0, A), world.net(1, B));
    (world, a, b)
}

#[test]
fn bytes_come_back_over_both_families() {
    let (world, a, b) = pair(1, Faults::default());
    echo(&world, &b);
    for to in [b4(), b6()] {
        let mut stream = connect(&a, to).unwrap();
        assert_eq!(stream.peer().map(|e| (e.addr, e.port)), Some((to, PORT)));
        assert!(stream.local().unwrap().port >= 49_152);
        exchange(&mut stream, 1 << 20, 2).unwrap();
        stream.finish();
        assert_eq!(stream.read(&mut [0; 8]), Ok(0));
        assert_eq!(stream.write(b"x"), Err(Error::Closed));
        stream.close().unwrap();
    }
    assert!(world.sleeps.get() > 0);
}

#[test]
fn an_empty_buffer_is_no_end() {
    let (world, a, b) = pair(1, Faults::default());
    echo(&world, &b);
    let mut stream = connect(&a, b4()).unwrap();
    assert_eq!((stream.read(&mut []), stream.write(&[])), (Ok(0), Ok(0)));
    exchange(&mut stream, 10, 1).unwrap();
}

#[test]
fn nobody_listens() {
    let (world, a, b) = pair(1, Faults::default());
    polls(&world, &b);
    assert_eq!(connect(&a, b4()).unwrap_err(), Error::Refused);
    assert_eq!(connect(&a, b6()).unwrap_err(), Error::Refused);
}

#[test]
fn nobody_is_there() {
    let (world, a, b) = pair(1, Faults::default());
    polls(&world, &b);
    let start = world.now_ns();
    let silent = IpAddress::v4(10, 0, 0, 77);
    let limit = Duration::from_millis(700);
    let e = TcpStream::connect(&a, silent, PORT, Some(limit)).unwrap_err();
    assert_eq!(e, Error::TimedOut);
    let took = world.now_ns() - start;
    assert!(
        (700_000_000..800_000_000).contains(&took),
        "{took} ns of its own clock"
    );
}

/// The clock here only goes while a side sleeps, so a stack that tries without a pause would never come back.
#[test]
fn no_way_there_is_waited_for_asleep() {
    let world = World::new(1, Faults::default());
    let a = world.net(0, "10.0.0.1/24");
    let limit = Some(Duration::from_secs(2));
    for to in [IpAddress::v4(192, 0, 2, 1), b6()] {
        let e = TcpStream::connect(&a, to, PORT, limit).unwrap_err();
        assert_eq!(e, Error::TimedOut);
    }
    // Nobody takes frames from the wire: it is full soon, and then there is nothing to do but to wait.
    for _ in 0..3 * BACKLOG {
        let e = TcpStream::connect(&a, b4(), PORT, limit).unwrap_err();
        assert_eq!(e, Error::TimedOut);
    }
}

#[test]
fn no_address_to_call_from_or_to() {
    let world = World::new(1, Faults::default());
    let a = world.net(0, "10.0.0.1/24");
    let to = |address| TcpStream::connect(&a, address, PORT, Some(LIMIT)).unwrap_err();
    for none in [[0, 0, 0, 0], [224, 0, 0, 1], [255, 255, 255, 255]] {
        assert_eq!(to(IpAddress::Ipv4(none.into())), Error::Unaddressable);
    }
    assert_eq!(
        to(IpAddress::v6(0xff02, 0, 0, 0, 0, 0, 0, 1)),
        Error::Unaddressable
    );
    assert_eq!(
        TcpStream::connect(&a, b4(), 0, Some(LIMIT)).unwrap_err(),
        Error::Unaddressable
    );
}

#[test]
fn a_peer_that_breaks_off_is_told_from_one_that_ends() {
    let (world, a, b) = pair(1, Faults::default());
    let mut listener = TcpListener::bind(&b, PORT).unwrap();
    let mut turn = 0;
    world.act(move || {
        if let Some(stream) = listener.try_accept() {
            turn += 1;
            if turn == 1 {
                stream.reset();
            } else {
                drop(stream);
            }
        }
    });
    let mut stream = connect(&a, b4()).unwrap();
    assert_eq!(stream.read(&mut [0; 8]), Err(Error::Reset));
    assert_eq!(stream.write(b"x"), Err(Error::Reset));
    assert_eq!(stream.peer(), None);
    let mut stream = connect(&a, b4()).unwrap();
    assert_eq!(stream.read(&mut [0; 8]), Ok(0));
    assert_eq!(stream.read_exact(&mut [0; 8]), Err(Error::UnexpectedEnd));
}

#[test]
fn a_limit_ends_a_call_and_not_the_connection() {
    let (world, a, b) = pair(1, Faults::default());
    echo(&world, &b);
    let mut stream = connect(&a, b4()).unwrap();
    stream.set_timeout(Some(Duration::from_millis(50)));
    assert_eq!(stream.read(&mut [0; 8]), Err(Error::TimedOut));
    exchange(&mut stream, 100, 1).unwrap();
    let mut listener = TcpListener::bind(&a, 9).unwrap();
    let e = listener
        .accept(Some(Duration::from_millis(50)))
        .unwrap_err();
    assert_eq!(e, Error::TimedOut);
}

#[test]
fn a_host_that_wants_the_end_ends_what_waits() {
    let (world, a, b) = pair(1, Faults::default());
    echo(&world, &b);
    let mut stream = connect(&a, b4()).unwrap();
    stream.write_all(b"abc").unwrap();
    world.ending.set(true);
    let mut listener = TcpListener::bind(&a, 9).unwrap();
    assert_eq!(listener.accept(None).unwrap_err(), Error::Ending);
    // What is there is still given, and the end is in order.
    let mut got = [0; 3];
    let mut have = 0;
    while have < 3 {
        match stream.read(&mut got[have..]) {
            Ok(n) => have += n,
            Err(e) => {
                assert_eq!(e, Error::Ending);
                a.wait(Duration::from_millis(1));
            }
        }
    }
    assert_eq!(&got, b"abc");
    stream.close().unwrap();
}

#[test]
fn a_port_has_one_listener() {
    let (_, a, _) = pair(1, Faults::default());
    let bind = |port| TcpListener::bind(&a, port);
    let first = bind(9).unwrap();
    assert_eq!(first.port(), 9);
    assert_eq!(bind(9).unwrap_err(), Error::PortInUse(9));
    assert_eq!(bind(0).unwrap_err(), Error::PortInUse(0));
    drop(first);
    bind(9).unwrap();
}

/// As many as the backlog holds connect before anybody accepts; one of them gives up, and is never seen.
#[test]
fn a_backlog_holds_connections_and_survives_those_that_give_up() {
    let (world, a, b) = pair(1, Faults::default());
    let mut listener = TcpListener::bind(&b, PORT).unwrap();
    polls(&world, &b);
    let mut streams: Vec<_> = (0..BACKLOG).map(|_| connect(&a, b4()).unwrap()).collect();
    let limit = Duration::from_secs(1);
    let full = TcpStream::connect(&a, b4(), PORT, Some(limit)).unwrap_err();
    assert_eq!(full, Error::Refused);
    streams.remove(1).reset();
    for stream in &mut streams {
        stream.write_all(b"hi").unwrap();
    }
    a.wait(Duration::from_millis(5));
    a.poll();
    let mut accepted = Vec::new();
    while let Some(mut stream) = listener.try_accept() {
        stream.set_timeout(Some(Duration::ZERO));
        let mut said = [0; 2];
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hi");
        accepted.push(stream);
    }
    assert_eq!(accepted.len(), BACKLOG - 1);
    // All places are free again.
    for _ in 0..BACKLOG {
        drop(connect(&a, b4()).unwrap());
    }
}

/// A listener that goes refuses what it has not accepted.
#[test]
fn a_listener_that_goes_breaks_off_what_waits() {
    let (world, a, b) = pair(1, Faults::default());
    let listener = TcpListener::bind(&b, PORT).unwrap();
    polls(&world, &b);
    let mut stream = connect(&a, b4()).unwrap();
    drop(listener);
    assert_eq!(stream.read(&mut [0; 8]), Err(Error::Reset));
    assert_eq!(connect(&a, b4()).unwrap_err(), Error::Refused);
}

/// Connections that were dropped with a peer that never closes: they are bounded in number and in time.
#[test]
fn what_was_dropped_does_not_pile_up() {
    let (world, a, b) = pair(1, Faults::default());
    let mut listener = TcpListener::bind(&b, PORT).unwrap();
    let kept = Rc::new(RefCell::new(Vec::new()));
    let keep = Rc::clone(&kept);
    world.act(move || keep.borrow_mut().extend(listener.try_accept()));
    for _ in 0..4 * MAX_LEFTOVERS {
        drop(connect(&a, b4()).unwrap());
        a.wait(Duration::from_millis(5));
        a.poll();
    }
    // The peer sees an end, and a reset once the other side has waited long enough.
    let end = world.now_ns() + LINGER.as_nanos() as u64 + 1_000_000_000;
    while world.now_ns() < end {
        a.wait(Duration::from_millis(100));
        a.poll();
    }
    assert_eq!(kept.borrow().len(), 4 * MAX_LEFTOVERS);
    for mut stream in kept.take() {
        stream.set_timeout(Some(Duration::ZERO));
        assert_eq!(stream.write(b"x").unwrap_err(), Error::Reset);
    }
}

/// A caller without patience leaves nothing behind at the peer.
#[test]
fn a_connect_that_is_given_up_is_never_accepted() {
    let (world, a, b) = pair(1, Faults::default());
    let mut listener = TcpListener::bind(&a, PORT).unwrap();
    let to = IpAddress::v4(10, 0, 0, 1);
    let calls = Rc::new(RefCell::new(Vec::new()));
    let noted = Rc::clone(&calls);
    world.act(move || {
        let e = TcpStream::connect(&b, to, PORT, Some(Duration::ZERO)).unwrap_err();
        noted.borrow_mut().push(e);
    });
    let e = listener
        .accept(Some(Duration::from_millis(20)))
        .unwrap_err();
    assert_eq!(e, Error::TimedOut);
    let calls = calls.take();
    assert!(
        calls.len() > 10 && calls.iter().all(|e| *e == Error::TimedOut),
        "{calls:?}"
    );
}

/// The whole of what was written arrives although the writer drops the connection at once.
#[test]
fn what_was_written_before_a_drop_arrives() {
    let (world, a, b) = pair(1, Faults::default());
    let mut listener = TcpListener::bind(&b, PORT).unwrap();
    let mut sent = false;
    world.act(move || {
        b.poll();
        if let Some(mut stream) = listener.try_accept() {
            stream.set_timeout(Some(Duration::ZERO));
            assert_eq!(stream.write(&vec![7; 50_000]), Ok(50_000));
            assert!(!sent);
            sent = true;
        }
    });
    let mut stream = connect(&a, b4()).unwrap();
    let mut got = vec![0; 50_000];
    stream.read_exact(&mut got).unwrap();
    assert!(got.iter().all(|b| *b == 7));
    assert_eq!(stream.read(&mut [0; 8]), Ok(0));
}

#[test]
fn nobody_gives_a_lease() {
    let world = World::new(1, Faults::default());
    let a = world.net(0, "dhcp;fd00::1/64");
    let e = a.wait_configured(Duration::from_secs(3)).unwrap_err();
    assert_eq!(e, Error::NoLease);
    // Asked more than once.
    assert!(world.now_ns() >= 3_000_000_000);
    world.net(0, A).wait_configured(Duration::ZERO).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Loss, duplicates, swaps, flipped bits: what arrives is what was sent.
    #[test]
    fn faults_change_nothing_but_time(
        seed: u64,
        lost in 0..60_u64,
        doubled in 0..60_u64,
        corrupted in 0..30_u64,
        swapped in 0..60_u64,
        v6: bool,
    ) {
        let (world, a, b) = pair(seed, Faults { lost, doubled, corrupted, swapped });
        echo(&world, &b);
        let mut stream = connect(&a, if v6 { b6() } else { b4() }).unwrap();
        exchange(&mut stream, 200_000, seed).unwrap();
        world.heal();
        stream.close().unwrap();
    }

    /// Whatever comes from the wire, nobody panics, and the next connection works.
    #[test]
    fn no_frame_does_harm(seed: u64) {
        let (world, a, b) = pair(seed, Faults::default());
        echo(&world, &b);
        let mut stream = connect(&a, b4()).unwrap();
        exchange(&mut stream, 5_000, seed).unwrap();
        let mut stream6 = connect(&a, b6()).unwrap();
        exchange(&mut stream6, 5_000, seed).unwrap();
        let frames = world.heard.take();
        let mut random = Random::new(seed);
        for _ in 0..400 {
            let mut frame = match random.below(4) {
                0 => {
                    let mut noise = vec![0; 14 + random.below(1500) as usize];
                    random.fill(&mut noise);
                    // To us, and of a kind that is looked at.
                    noise[..6].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 1]);
                    let kinds = [[8, 0], [8, 6], [0x86, 0xdd]];
                    noise[12..14].copy_from_slice(&kinds[random.below(3) as usize]);
                    noise
                }
                _ => frames[random.below(frames.len() as u64) as usize].clone(),
            };
            for _ in 0..random.below(4) {
                let at = random.below(frame.len() as u64) as usize;
                frame[at] = (random.next() >> 56) as u8;
            }
            if random.below(3) == 0 {
                frame.truncate(14 + random.below(frame.len() as u64 - 13) as usize);
            }
            fix_checksums(&mut frame);
            world.inject(0, &frame);
            a.poll();
        }
        drop(stream);
        drop(stream6);
        let mut stream = connect(&a, b4()).unwrap();
        exchange(&mut stream, 5_000, seed).unwrap();
    }
}

/// Makes IPv4 header and TCP checksums right, so that changed fields are looked at and not only their checksums.
fn fix_checksums(frame: &mut [u8]) {
    use smoltcp::wire::{
        EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket,
    };
    let Ok(mut ethernet) = EthernetFrame::new_checked(frame) else {
        return;
    };
    match ethernet.ethertype() {
        EthernetProtocol::Ipv4 => {
            let Ok(mut ip) = Ipv4Packet::new_checked(ethernet.payload_mut()) else {
                return;
            };
            ip.fill_checksum();
            let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
            if ip.next_header() == IpProtocol::Tcp
                && let Ok(mut tcp) = TcpPacket::new_checked(ip.payload_mut())
            {
                tcp.fill_checksum(&from, &to);
            }
        }
        EthernetProtocol::Ipv6 => {
            let Ok(mut ip) = Ipv6Packet::new_checked(ethernet.payload_mut()) else {
                return;
            };
            let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
            if ip.next_header() == IpProtocol::Tcp
                && let Ok(mut tcp) = TcpPacket::new_checked(ip.payload_mut())
            {
                tcp.fill_checksum(&from, &to);
            }
        }
        _ => {}
    }
}
