//! UDP sockets with segmentation offload on both sides: no privilege, and the IPv4 identification stays hidden.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::sync::Arc;

use hyv_roce::carrier::{Arrival, Carrier, DEFAULT_HOP_LIMIT, Flow, Gid, Sent, UDP_PORT};

use crate::addr::{self, ListenAddr, Owned, gid_of, ip_of, is_link_local};
use crate::error::OpenError;
use crate::limits;
use crate::link::LinkState;
use crate::netlink::Netlink;
use crate::owner;
use crate::sys::socket::{Batch, Control, RawAddr, Socket};
use crate::{Counters, Info, Kind, Options};

/// Bytes of IP and UDP headers.
pub(crate) fn header_bytes(ip: IpAddr) -> usize {
    match ip {
        IpAddr::V4(_) => 20 + 8,
        IpAddr::V6(_) => 40 + 8,
    }
}

/// The kernel's answer to a failed send, as the transport sees it.
pub(crate) fn judge(error: &io::Error) -> Sent {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR) => Sent::Busy,
        _ => Sent::Lost,
    }
}

/// Carries packets over UDP sockets.
#[derive(Debug)]
pub struct UdpCarrier {
    own: Owned,
    gid: Gid,
    receiver: Socket,
    senders: Vec<Socket>,
    first_port: u16,
    batch: Batch,
    /// Datagrams to ask for next: one while there is little to do, since each further empty look costs.
    want: usize,
    link: LinkState,
    /// Whether the kernel segments for this path.
    offload: bool,
    counters: Arc<Counters>,
}

impl UdpCarrier {
    /// Opens UDP port 4791 of an address of this machine, and sockets for several source ports.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(addr: &ListenAddr, options: &Options) -> Result<(UdpCarrier, Info), OpenError> {
        let mut netlink = Netlink::open().map_err(OpenError::system("opening rtnetlink"))?;
        let own = addr::find(&mut netlink, addr)?;
        let receiver = bind_roce_port(&own)?;
        let options_of = OpenError::system(format!("setting socket options on {}", own.ip));
        set_receive_options(&receiver, own.ip).map_err(options_of)?;
        let buffer = receiver.grow_buffer(true, options.receive_buffer);
        let (first_port, senders) = bind_senders(&own)?;
        let counters = Arc::new(Counters::default());
        let fd = receiver
            .dup()
            .map_err(OpenError::system("duplicating a descriptor"))?;
        let info = Info {
            carrier: Kind::Udp,
            local: own.ip,
            interface: own.link.name.clone(),
            mtu: own.link.mtu,
            icrc_bits: if own.ip.is_ipv4() { 16 } else { 32 },
            receive: format!("UDP sockets with GSO and GRO, {} KiB buffer", buffer >> 10),
            source_ports: (first_port, limits::SOURCE_PORTS),
            wait_fds: vec![fd],
            note: None,
            counters: counters.clone(),
        };
        let carrier = UdpCarrier {
            gid: gid_of(own.ip),
            receiver,
            senders,
            first_port,
            batch: Batch::new(limits::RECEIVE_BATCH),
            want: 1,
            link: LinkState::new(netlink, &own.link),
            offload: true,
            counters,
            own,
        };
        Ok((carrier, info))
    }

    fn address(&self, ip: IpAddr) -> RawAddr {
        let scope = if is_link_local(ip) {
            self.own.link.index
        } else {
            0
        };
        RawAddr::ip(ip, UDP_PORT, scope)
    }
}

/// Binds UDP port 4791 of an address.
pub(crate) fn bind_roce_port(own: &Owned) -> Result<Socket, OpenError> {
    let socket = Socket::udp(own.ip).map_err(OpenError::system("making a UDP socket"))?;
    match socket.bind(&RawAddr::ip(own.ip, UDP_PORT, own.scope)) {
        Ok(()) => Ok(socket),
        Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => Err(OpenError::PortTaken {
            ip: own.ip,
            owner: owner::of_udp_port(own.ip, UDP_PORT),
        }),
        Err(error) => Err(OpenError::System {
            what: format!("binding UDP port {UDP_PORT} of {}", own.ip),
            error,
        }),
    }
}

fn set_receive_options(socket: &Socket, ip: IpAddr) -> io::Result<()> {
    socket.set_int(libc::SOL_UDP, libc::UDP_GRO, 1)?;
    if ip.is_ipv4() {
        socket.set_int(libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
        socket.set_int(libc::IPPROTO_IP, libc::IP_RECVTTL, 1)
    } else {
        socket.set_int(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
        socket.set_int(libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1)?;
        // Linux's rxe, and NICs, send without a UDP checksum; the ICRC does its work.
        socket.set_int(libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1)
    }
}

/// Binds a block of contiguous source ports that are all free.
fn bind_senders(own: &Owned) -> Result<(u16, Vec<Socket>), OpenError> {
    let count = limits::SOURCE_PORTS;
    let mut last = None;
    for first in (limits::FIRST_SOURCE_PORT..=u16::MAX - count).step_by(usize::from(count)) {
        let block: io::Result<Vec<Socket>> = (first..first + count)
            .map(|port| bind_sender(own, port))
            .collect();
        match block {
            Ok(senders) => return Ok((first, senders)),
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => last = Some(error),
            Err(error) => {
                return Err(OpenError::System {
                    what: format!("making a socket for a source port of {}", own.ip),
                    error,
                });
            }
        }
    }
    Err(OpenError::System {
        what: format!(
            "finding {count} free UDP ports from 0xC000 up on {}",
            own.ip
        ),
        error: last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()),
    })
}

fn bind_sender(own: &Owned, port: u16) -> io::Result<Socket> {
    let socket = Socket::udp(own.ip)?;
    // Nothing is ever received here: RoCEv2 always answers to port 4791.
    socket.drop_everything()?;
    // With path MTU discovery an unconnected socket sends identification 0, which the ICRC counts on; PROBE does not believe
    // what ICMP says about the path, which anybody can send.
    if own.ip.is_ipv4() {
        let probe = libc::IP_PMTUDISC_PROBE;
        socket.set_int(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, probe)?;
    } else {
        let probe = libc::IPV6_PMTUDISC_PROBE;
        socket.set_int(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, probe)?;
        socket.set_int(libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 1)?;
    }
    let _ = socket.grow_buffer(false, limits::SEND_BUFFER);
    socket.bind(&RawAddr::ip(own.ip, port, own.scope))?;
    Ok(socket)
}

impl Carrier for UdpCarrier {
    fn local(&self) -> Gid {
        self.gid
    }

    fn link_mtu(&self) -> usize {
        self.link.get().mtu
    }

    fn burst(&self, _: &Flow) -> (usize, usize) {
        let bytes = limits::SUPERFRAME - header_bytes(self.own.ip);
        let segments = if self.offload {
            limits::BURST_SEGMENTS
        } else {
            1
        };
        (segments, bytes)
    }

    fn source_ports(&self) -> (u16, u16) {
        (self.first_port, limits::SOURCE_PORTS)
    }

    fn ident(&self, index: usize) -> u16 {
        // The kernel numbers the segments of a superframe from that of the superframe, which is 0.
        index as u16
    }

    fn send(&mut self, flow: &Flow, segment_len: usize, payloads: &[u8]) -> Sent {
        let dst = ip_of(&flow.dst);
        let port = usize::from(flow.src_port.wrapping_sub(self.first_port));
        let Some(sender) = self.senders.get(port) else {
            return self
                .counters
                .lost("a source port that is none of the carrier's");
        };
        if dst.is_ipv4() != self.own.ip.is_ipv4() || payloads.is_empty() || segment_len == 0 {
            return self
                .counters
                .lost("an empty burst, or one to another family");
        }
        let mut control = Control::default();
        let hop_limit = match flow.hop_limit {
            0 => DEFAULT_HOP_LIMIT,
            limit => limit,
        };
        if dst.is_ipv4() {
            control.push_int(libc::IPPROTO_IP, libc::IP_TOS, flow.traffic_class.into());
            control.push_int(libc::IPPROTO_IP, libc::IP_TTL, hop_limit.into());
        } else {
            let class = i32::from(flow.traffic_class);
            control.push_int(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class);
            control.push_int(libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT, hop_limit.into());
        }
        let segments = payloads.len().div_ceil(segment_len);
        if segments > 1 {
            let Ok(len) = u16::try_from(segment_len) else {
                return self.counters.lost("segments that no IP packet holds");
            };
            control.push(libc::SOL_UDP, libc::UDP_SEGMENT, &len.to_ne_bytes());
        }
        let to = self.address(dst);
        match sender.send(Some(&to), &[IoSlice::new(payloads)], &control) {
            Ok(_) => self.counters.sent(segments, payloads.len()),
            Err(error) => {
                if segments > 1
                    && matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL))
                    && segment_len + header_bytes(dst) <= self.link.get().mtu
                    && segments <= limits::BURST_SEGMENTS
                    && self.offload
                {
                    self.offload = false;
                    tracing::warn!(
                        interface = self.own.link.name,
                        "the kernel does not segment UDP here ({error}): packets go one by one"
                    );
                }
                self.counters.failed(judge(&error))
            }
        }
    }

    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize {
        let mut packets = 0;
        let mut bytes = 0;
        let UdpCarrier {
            batch,
            receiver,
            gid,
            ..
        } = self;
        let got = batch.receive(receiver, self.want, |datagram| {
            let Some((src, src_port)) = datagram.from.to_ip() else {
                return;
            };
            let src = gid_of(src);
            let whole = datagram.bytes.len().max(1);
            let segment = match datagram.ancillary.segment_len {
                Some(len) if len > 0 => len,
                _ => whole,
            };
            bytes += datagram.bytes.len();
            for payload in datagram.bytes.chunks(segment) {
                packets += 1;
                take(&Arrival {
                    src,
                    dst: *gid,
                    src_port,
                    traffic_class: datagram.ancillary.traffic_class,
                    hop_limit: datagram.ancillary.hop_limit,
                    ident: None,
                    payload,
                });
            }
        });
        self.want = match got {
            Ok(got) if got >= self.want => (self.want * 2).min(limits::RECEIVE_BATCH),
            Ok(got) => got.max(1),
            // None there, or an error that an earlier packet left behind: reading it has cleared it.
            Err(_) => 1,
        };
        self.counters.received(packets, bytes);
        packets
    }

    fn cheap_poll(&self) -> bool {
        false
    }
}
