//! What the path itself costs: bare busy-polled sockets, beside the same traffic through a carrier.
//!
//! Both ends run in this process, each on a thread of its own, which may be in a network namespace and on a CPU of its own. The
//! bare sockets have ports of their own, so a carrier may be open on the same addresses meanwhile.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hyv_roce::carrier::{Carrier, DEFAULT_HOP_LIMIT, Flow, Gid, Sent, UDP_PORT};

use crate::addr::{self, ListenAddr, Owned, gid_of};
use crate::next_hop::{Live, NextHops, Resolved};
use crate::packet::{HEADERS, ethertype, find_loopback, open_ring, open_sender, write_headers};
use crate::sys::netns;
use crate::sys::ring::Ring;
use crate::sys::socket::{Batch, Control, RawAddr, Socket};
use crate::udp::header_bytes;
use crate::{Choice, OpenError, Options, limits, netlink::Netlink, open};

/// How long a round trip may take before its packet counts as lost and is sent again: longer than a busy machine keeps a thread
/// waiting, since a late reply would be taken for the next one.
const LOST_AFTER: Duration = Duration::from_secs(1);
/// How long a peer's neighbour entry may take to be resolved.
const RESOLVE_WITHIN: Duration = Duration::from_secs(5);
/// How long nothing has come when nothing more is on its way.
const QUIET: Duration = Duration::from_millis(5);
/// Bytes of the least packet: no carrier or NIC cares, but an Ethernet frame has so many.
const LEAST: usize = 4;
/// Lost packets in a row after which a measurement ends: nothing comes through.
const GIVE_UP: u64 = 10;

/// One end of a path.
#[derive(Clone, Debug)]
pub struct End {
    /// Its address.
    pub addr: ListenAddr,
    /// The network namespace that has it (`/var/run/netns/NAME`), if not this thread's.
    pub netns: Option<PathBuf>,
    /// The CPU for its thread, if not any.
    pub cpu: Option<usize>,
}

impl End {
    /// Runs something on a thread that is in the end's namespace and on its CPU. Sockets and threads made there stay there.
    ///
    /// # Errors
    /// When the namespace or the CPU cannot be had.
    pub fn run<R: Send>(&self, what: impl FnOnce() -> R + Send) -> Result<R, OpenError> {
        let enter = || -> Result<(), OpenError> {
            if let Some(path) = &self.netns {
                netns::enter(path).map_err(OpenError::system(format!(
                    "entering network namespace {}",
                    path.display()
                )))?;
            }
            if let Some(cpu) = self.cpu {
                netns::pin(cpu).map_err(OpenError::system(format!("moving to CPU {cpu}")))?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| enter().map(|()| what()));
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Round trips.
#[derive(Clone, Debug, Default)]
pub struct RoundTrips {
    /// Nanoseconds of each, in order.
    pub ns: Vec<u64>,
    /// Packets that were lost and sent again.
    pub lost: u64,
}

impl RoundTrips {
    /// The value that the share `q` (0 to 1) of the round trips does not exceed, in nanoseconds; 0 if there are none.
    #[must_use]
    pub fn quantile(&self, q: f64) -> u64 {
        let mut sorted = self.ns.clone();
        sorted.sort_unstable();
        let last = sorted.len().saturating_sub(1);
        let at = (q.clamp(0.0, 1.0) * last as f64).round() as usize;
        sorted.get(at).copied().unwrap_or(0)
    }
}

/// One way, as fast as it goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneWay {
    /// Bytes that left, from BTH to ICRC.
    pub sent_bytes: u64,
    /// Bytes that arrived.
    pub received_bytes: u64,
    /// Packets that arrived.
    pub received_packets: u64,
    /// Nanoseconds from the first send to the end of counting.
    pub ns: u64,
}

impl OneWay {
    /// Bytes that arrived per nanosecond, which is GB/s.
    #[must_use]
    pub fn gb_per_s(&self) -> f64 {
        self.received_bytes as f64 / self.ns.max(1) as f64
    }
}

/// One end, open: a bare socket or a carrier.
trait Pipe: Send {
    /// Sends a burst of packets of `segment` bytes; `false` if there is no room.
    fn send(&mut self, segment: usize, bytes: &[u8]) -> io::Result<bool>;
    /// Takes what is there: packets and bytes.
    fn receive(&mut self) -> io::Result<(u64, u64)>;
}

/// Two ends that send to each other.
pub struct Pair {
    ends: [(End, Box<dyn Pipe>); 2],
    headers: usize,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b] = &self.ends;
        write!(f, "Pair({:?}, {:?})", a.0, b.0)
    }
}

impl Pair {
    /// Bare unconnected UDP sockets; with segmentation offload on both sides if `offload`.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn udp(a: &End, b: &End, offload: bool) -> Result<Pair, OpenError> {
        let bind = |end: &End| end.run(|| bare_udp(&end.addr, offload))?;
        let ((at_a, one), (at_b, other)) = (bind(a)?, bind(b)?);
        let pipe = |socket, peer| -> Box<dyn Pipe> {
            Box::new(UdpPipe {
                socket,
                peer,
                offload: offload.then(|| Batch::new(1)),
                buffer: vec![0; limits::DATAGRAM],
            })
        };
        Ok(Pair {
            headers: header_bytes(a.addr.ip),
            ends: [(a.clone(), pipe(one, at_b)), (b.clone(), pipe(other, at_a))],
        })
    }

    /// Bare AF_PACKET sockets with a receive ring, frames prepared beforehand.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn packet(a: &End, b: &End) -> Result<Pair, OpenError> {
        let bind = |end: &End, peer: &End| end.run(|| PacketPipe::open(&end.addr, peer.addr.ip))?;
        let (mut one, mut other) = (bind(a, b)?, bind(b, a)?);
        one.peer_port = other.port;
        other.peer_port = one.port;
        Ok(Pair {
            headers: header_bytes(a.addr.ip),
            ends: [(a.clone(), Box::new(one)), (b.clone(), Box::new(other))],
        })
    }

    /// Carriers.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn carriers(choice: Choice, a: &End, b: &End) -> Result<Pair, OpenError> {
        let bind = |end: &End| end.run(|| open(choice, &end.addr, &Options::default()))?;
        let ((one, _), (other, _)) = (bind(a)?, bind(b)?);
        Ok(Pair::over(a, b, one, other))
    }

    /// Carriers that are open already.
    #[must_use]
    pub fn over(a: &End, b: &End, one: Box<dyn Carrier>, other: Box<dyn Carrier>) -> Pair {
        let flow = |from: &dyn Carrier, to: &dyn Carrier| Flow {
            dst: to.local(),
            src_port: from.source_ports().0,
            traffic_class: 0,
            hop_limit: DEFAULT_HOP_LIMIT,
            flow_label: 0,
        };
        let there = flow(&*one, &*other);
        let back = flow(&*other, &*one);
        let pipe = |carrier, flow| -> Box<dyn Pipe> { Box::new(CarrierPipe { carrier, flow }) };
        Pair {
            headers: header_bytes(a.addr.ip),
            ends: [
                (a.clone(), pipe(one, there)),
                (b.clone(), pipe(other, back)),
            ],
        }
    }

    /// Bounces a packet of `bytes` bytes (behind the UDP header) between the ends, both busy-polling, `rounds` times.
    ///
    /// # Errors
    /// When a socket fails, or nothing comes through.
    pub fn pingpong(&mut self, bytes: usize, rounds: usize) -> Result<RoundTrips, OpenError> {
        let packet = vec![0x5a; bytes.max(LEAST)];
        let [(a, client), (b, server)] = &mut self.ends;
        drain(client.as_mut())?;
        drain(server.as_mut())?;
        let echo = |stop: &AtomicBool| {
            while !stop.load(Ordering::Relaxed) {
                let (packets, _) = server.receive()?;
                for _ in 0..packets {
                    while !server.send(packet.len(), &packet)? {}
                }
            }
            Ok(())
        };
        let client = || bounce(client.as_mut(), &packet, rounds);
        let (trips, ()) = together("bouncing packets", (a, client), (b, echo))?;
        Ok(trips)
    }

    /// Sends packets of `segment` bytes from the first end to the second for so long, in bursts as large as they may be.
    ///
    /// # Errors
    /// When a socket fails.
    pub fn one_way(&mut self, segment: usize, how_long: Duration) -> Result<OneWay, OpenError> {
        let segment = segment.max(LEAST);
        let room = limits::SUPERFRAME - self.headers;
        let count = (room / segment).clamp(1, limits::BURST_SEGMENTS);
        let burst = vec![0x5a; count * segment];
        let [(a, sender), (b, receiver)] = &mut self.ends;
        drain(receiver.as_mut())?;
        let send = || {
            let mut sent_bytes = 0;
            let began = Instant::now();
            while began.elapsed() < how_long {
                if sender.send(segment, &burst)? {
                    sent_bytes += burst.len() as u64;
                }
            }
            Ok((began, sent_bytes))
        };
        let receive = |stop: &AtomicBool| {
            let mut got = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                let more = receiver.receive()?;
                got = (got.0 + more.0, got.1 + more.1);
            }
            let until = Instant::now();
            // What is still on its way belongs to no later measurement.
            let mut quiet_since = until;
            while quiet_since.elapsed() < QUIET {
                if receiver.receive()?.0 > 0 {
                    quiet_since = Instant::now();
                }
            }
            Ok((got, until))
        };
        let ((began, sent_bytes), (got, until)) =
            together("sending one way", (a, send), (b, receive))?;
        Ok(OneWay {
            sent_bytes,
            received_packets: got.0,
            received_bytes: got.1,
            ns: until.duration_since(began).as_nanos() as u64,
        })
    }
}

/// Runs `client` at one end and `server` at the other, which starts before and is told to stop when the client has ended.
fn together<R: Send, S: Send>(
    what: &str,
    (a, client): (&End, impl FnOnce() -> io::Result<R> + Send),
    (b, server): (&End, impl FnOnce(&AtomicBool) -> io::Result<S> + Send),
) -> Result<(R, S), OpenError> {
    /// Stops the server also when the client panics.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (ready, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            b.run(|| {
                ready.store(true, Ordering::Relaxed);
                server(&stop)
            })
        });
        let result = {
            let _stop = Stop(&stop);
            while !ready.load(Ordering::Relaxed) && !serving.is_finished() {
                std::thread::yield_now();
            }
            // A server that has ended already says why below; the client then finds nobody.
            match serving.is_finished() {
                true => None,
                false => Some(a.run(client)),
            }
        };
        let served = serving
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let served = served?.map_err(OpenError::system(what))?;
        match result {
            Some(result) => Ok((result?.map_err(OpenError::system(what))?, served)),
            None => Err(OpenError::system(what)(io::ErrorKind::BrokenPipe.into())),
        }
    })
}

/// Round trips of bare unconnected UDP sockets, both ends busy-polling.
///
/// # Errors
/// As [`Pair::udp`] and [`Pair::pingpong`].
pub fn udp_pingpong(
    a: &End,
    b: &End,
    bytes: usize,
    rounds: usize,
) -> Result<RoundTrips, OpenError> {
    Pair::udp(a, b, false)?.pingpong(bytes, rounds)
}

/// Round trips of bare AF_PACKET sockets, both ends busy-polling.
///
/// # Errors
/// As [`Pair::packet`] and [`Pair::pingpong`].
pub fn packet_pingpong(
    a: &End,
    b: &End,
    bytes: usize,
    rounds: usize,
) -> Result<RoundTrips, OpenError> {
    Pair::packet(a, b)?.pingpong(bytes, rounds)
}

/// One way over bare sockets of the kind that a carrier uses, with its offload. [`Choice::Auto`] is AF_PACKET.
///
/// # Errors
/// As [`Pair::packet`], [`Pair::udp`] and [`Pair::one_way`].
pub fn bandwidth(
    kind: Choice,
    a: &End,
    b: &End,
    segment: usize,
    how_long: Duration,
) -> Result<OneWay, OpenError> {
    let mut pair = match kind {
        Choice::Udp => Pair::udp(a, b, true)?,
        Choice::Auto | Choice::Packet => Pair::packet(a, b)?,
    };
    pair.one_way(segment, how_long)
}

/// Takes what earlier measurements left behind.
fn drain(pipe: &mut dyn Pipe) -> Result<(), OpenError> {
    loop {
        match pipe.receive() {
            Ok((0, _)) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(OpenError::system("receiving")(error)),
        }
    }
}

fn bounce(client: &mut dyn Pipe, packet: &[u8], rounds: usize) -> io::Result<RoundTrips> {
    let mut trips = RoundTrips {
        ns: Vec::with_capacity(rounds),
        lost: 0,
    };
    let mut lost_in_a_row = 0;
    while trips.ns.len() < rounds {
        let began = Instant::now();
        while !client.send(packet.len(), packet)? {
            if began.elapsed() > RESOLVE_WITHIN {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        loop {
            if client.receive()?.0 > 0 {
                trips.ns.push(began.elapsed().as_nanos() as u64);
                lost_in_a_row = 0;
                break;
            }
            if began.elapsed() > LOST_AFTER {
                trips.lost += 1;
                lost_in_a_row += 1;
                if lost_in_a_row == GIVE_UP {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                break;
            }
        }
    }
    Ok(trips)
}

/// Whether a send found no room; other errors are passed on.
fn went(sent: io::Result<usize>) -> io::Result<bool> {
    match sent {
        Ok(_) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS) => Ok(false),
            _ => Err(error),
        },
    }
}

/// Whether anything came; other errors than "nothing there" are passed on.
fn came<T: Default>(got: io::Result<T>) -> io::Result<T> {
    match got {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(T::default()),
        got => got,
    }
}

/// A bound UDP socket on a port of its own, and the address to reach it by.
fn bind_any(own: &Owned) -> Result<(SocketAddr, Socket), OpenError> {
    let any = match own.ip {
        IpAddr::V4(ip) => SocketAddr::from((ip, 0)),
        IpAddr::V6(ip) => SocketAddrV6::new(ip, 0, 0, own.scope).into(),
    };
    let failed = || OpenError::system(format!("binding a UDP port of {}", own.ip));
    let socket = UdpSocket::bind(any).map_err(failed())?;
    let bound = socket.local_addr().map_err(failed())?;
    Ok((bound, Socket::from(std::os::fd::OwnedFd::from(socket))))
}

fn bare_udp(addr: &ListenAddr, offload: bool) -> Result<(RawAddr, Socket), OpenError> {
    let mut netlink = Netlink::open().map_err(OpenError::system("opening rtnetlink"))?;
    let own = addr::find(&mut netlink, addr)?;
    let (bound, socket) = bind_any(&own)?;
    if offload {
        socket
            .set_int(libc::SOL_UDP, libc::UDP_GRO, 1)
            .map_err(OpenError::system("asking for UDP GRO"))?;
    }
    let _ = socket.grow_buffer(true, limits::RECEIVE_BUFFER);
    let _ = socket.grow_buffer(false, limits::SEND_BUFFER);
    Ok((RawAddr::ip(own.ip, bound.port(), own.scope), socket))
}

struct UdpPipe {
    socket: Socket,
    peer: RawAddr,
    /// With offload: where to receive.
    offload: Option<Batch>,
    buffer: Vec<u8>,
}

impl Pipe for UdpPipe {
    fn send(&mut self, segment: usize, bytes: &[u8]) -> io::Result<bool> {
        let mut control = Control::default();
        if bytes.len() > segment {
            control.push(
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                &(segment as u16).to_ne_bytes(),
            );
        }
        let parts = [IoSlice::new(bytes)];
        went(self.socket.send(Some(&self.peer), &parts, &control))
    }

    fn receive(&mut self) -> io::Result<(u64, u64)> {
        let Some(batch) = &mut self.offload else {
            let got = came(
                self.socket
                    .receive(&mut self.buffer, false)
                    .map(|(len, _)| (1, len as u64)),
            );
            return got;
        };
        let mut got = (0, 0);
        came(batch.receive(&self.socket, 1, |datagram| {
            let len = datagram.bytes.len();
            let segment = datagram.ancillary.segment_len.unwrap_or(len).max(1);
            got.0 += len.div_ceil(segment) as u64;
            got.1 += len as u64;
        }))?;
        Ok(got)
    }
}

struct PacketPipe {
    sender: Socket,
    to: RawAddr,
    macs: ([u8; 6], [u8; 6]),
    gids: (Gid, Gid),
    ring: Ring,
    port: u16,
    peer_port: u16,
    headers: [u8; HEADERS],
    headers_len: usize,
    /// (segment, bytes) that the headers are for.
    made_for: (usize, usize),
    _hops: NextHops<Live>,
}

impl PacketPipe {
    fn open(addr: &ListenAddr, peer: IpAddr) -> Result<PacketPipe, OpenError> {
        let mut netlink = Netlink::open().map_err(OpenError::system("opening rtnetlink"))?;
        let own = addr::find(&mut netlink, addr)?;
        let sender = open_sender(own.ip)?;
        let loopback = find_loopback(&mut netlink, &own)?;
        // The port is this socket's; what comes there is not for it.
        let (bound, guard) = bind_any(&own)?;
        guard
            .drop_everything()
            .map_err(OpenError::system("attaching a filter"))?;
        let mut hops = NextHops::new(Live::new(netlink, own.clone(), loopback, guard));
        let peer = peer.to_canonical();
        let patience = Instant::now() + RESOLVE_WITHIN;
        let (interface, macs) = loop {
            match hops.resolve(&gid_of(peer), Instant::now()) {
                Resolved::To(mac) => break (own.link.index, (own.link.mac, mac)),
                Resolved::Here => break (loopback, ([0; 6], [0; 6])),
                _ if Instant::now() < patience => std::thread::sleep(Duration::from_millis(1)),
                _ => {
                    return Err(OpenError::System {
                        what: format!("finding the next hop from {} to {peer}", own.ip),
                        error: io::ErrorKind::HostUnreachable.into(),
                    });
                }
            }
        };
        Ok(PacketPipe {
            sender,
            to: RawAddr::link(interface, ethertype(own.ip)),
            macs,
            gids: (gid_of(own.ip), gid_of(peer)),
            ring: open_ring(&own, bound.port(), interface, limits::RING_SLOTS)?,
            port: bound.port(),
            peer_port: UDP_PORT,
            headers: [0; HEADERS],
            headers_len: 0,
            made_for: (0, 0),
            _hops: hops,
        })
    }
}

impl Pipe for PacketPipe {
    fn send(&mut self, segment: usize, bytes: &[u8]) -> io::Result<bool> {
        if self.made_for != (segment, bytes.len()) {
            let flow = Flow {
                dst: self.gids.1,
                src_port: self.port,
                traffic_class: 0,
                hop_limit: DEFAULT_HOP_LIMIT,
                flow_label: 0,
            };
            self.headers = [0; HEADERS];
            self.headers_len = write_headers(
                &mut self.headers,
                self.macs,
                (&self.gids.0, &self.gids.1),
                &flow,
                self.peer_port,
                (bytes.len() > segment).then_some(segment),
                bytes.len(),
            );
            self.made_for = (segment, bytes.len());
        }
        let parts = [
            IoSlice::new(&self.headers[..self.headers_len]),
            IoSlice::new(bytes),
        ];
        went(
            self.sender
                .send(Some(&self.to), &parts, &Control::default()),
        )
    }

    fn receive(&mut self) -> io::Result<(u64, u64)> {
        let headers = if is_v4(&self.gids.0) { 28 } else { 48 };
        let mut got = (0, 0);
        while got.0 < limits::BURST_SEGMENTS as u64
            && self.ring.next(|frame| {
                let len = frame.network.len().saturating_sub(headers);
                let segment = match frame.gso_size {
                    0 => len.max(1),
                    size => size,
                };
                got.0 += len.div_ceil(segment) as u64;
                got.1 += len as u64;
            })
        {}
        Ok(got)
    }
}

fn is_v4(gid: &Gid) -> bool {
    hyv_roce::wire::ip::mapped_v4(gid).is_some()
}

struct CarrierPipe {
    carrier: Box<dyn Carrier>,
    flow: Flow,
}

impl Pipe for CarrierPipe {
    fn send(&mut self, segment: usize, bytes: &[u8]) -> io::Result<bool> {
        match self.carrier.send(&self.flow, segment, bytes) {
            Sent::All => Ok(true),
            Sent::Busy => Ok(false),
            Sent::Lost => Err(io::ErrorKind::HostUnreachable.into()),
        }
    }

    fn receive(&mut self) -> io::Result<(u64, u64)> {
        let mut bytes = 0;
        let packets = self
            .carrier
            .receive(&mut |arrival| bytes += arrival.payload.len() as u64);
        Ok((packets as u64, bytes))
    }
}
