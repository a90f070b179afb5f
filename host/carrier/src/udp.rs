//! UDP sockets with segmentation offload on both sides: no privilege, and the IPv4 identification stays hidden.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyv_roce::carrier::{Arrival, Carrier, DEFAULT_HOP_LIMIT, Flow, Gid, Sent, UDP_PORT};
use hyv_roce::wire::ip;

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
    senders: Senders,
    batch: Batch,
    /// Datagrams to ask for next: one while there is little to do, since each further empty look costs.
    want: usize,
    link: LinkState,
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
        let senders = Senders::bind(&own)?;
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
            source_ports: senders.ports(),
            wait_fds: vec![fd],
            note: None,
            counters: counters.clone(),
        };
        let carrier = UdpCarrier {
            gid: gid_of(own.ip),
            receiver,
            senders,
            batch: Batch::new(limits::RECEIVE_BATCH),
            want: 1,
            link: LinkState::new(netlink, &own.link),
            counters,
            own,
        };
        Ok((carrier, info))
    }
}

/// Binds UDP port 4791 of an address.
pub(crate) fn bind_roce_port(own: &Owned) -> Result<Socket, OpenError> {
    let socket = Socket::udp(own.ip).map_err(OpenError::system("making a UDP socket"))?;
    let patience = Instant::now() + limits::PORT_WAIT;
    loop {
        let Err(error) = socket.bind(&RawAddr::ip(own.ip, UDP_PORT, own.scope)) else {
            return Ok(socket);
        };
        if error.raw_os_error() != Some(libc::EADDRINUSE) {
            return Err(OpenError::System {
                what: format!("binding UDP port {UDP_PORT} of {}", own.ip),
                error,
            });
        }
        if Instant::now() > patience {
            return Err(OpenError::PortTaken {
                ip: own.ip,
                owner: owner::of_udp_port(own.ip, UDP_PORT),
            });
        }
        std::thread::sleep(Duration::from_millis(5));
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

/// Sockets that send, one for each source port.
#[derive(Debug)]
pub(crate) struct Senders {
    own: Owned,
    sockets: Vec<Socket>,
    first_port: u16,
    /// Whether the kernel segments.
    offload: bool,
}

impl Senders {
    /// Binds a block of contiguous source ports that are all free.
    pub fn bind(own: &Owned) -> Result<Senders, OpenError> {
        let count = limits::SOURCE_PORTS;
        let mut last = None;
        for first_port in (limits::FIRST_SOURCE_PORT..=u16::MAX - count).step_by(usize::from(count))
        {
            let block: io::Result<Vec<Socket>> = (first_port..first_port + count)
                .map(|port| bind_sender(own, port))
                .collect();
            match block {
                Ok(sockets) => {
                    return Ok(Senders {
                        own: own.clone(),
                        sockets,
                        first_port,
                        offload: true,
                    });
                }
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

    /// First and count.
    pub fn ports(&self) -> (u16, u16) {
        (self.first_port, self.sockets.len() as u16)
    }

    /// Most packets of a burst.
    pub fn segments(&self) -> usize {
        if self.offload {
            limits::BURST_SEGMENTS
        } else {
            1
        }
    }

    /// Sends a burst that is not empty, to an address of the own one's family; `mtu` is that of the link.
    pub fn send(&mut self, flow: &Flow, segment_len: usize, payloads: &[u8], mtu: usize) -> Sent {
        let port = usize::from(flow.src_port.wrapping_sub(self.first_port));
        let Some(sender) = self.sockets.get(port) else {
            return Sent::Lost;
        };
        let dst = ip_of(&flow.dst);
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
                return Sent::Lost;
            };
            control.push(libc::SOL_UDP, libc::UDP_SEGMENT, &len.to_ne_bytes());
        }
        let scope = if is_link_local(dst) {
            self.own.link.index
        } else {
            0
        };
        let to = RawAddr::ip(dst, UDP_PORT, scope);
        match sender.send(Some(&to), &[IoSlice::new(payloads)], &control) {
            Ok(_) => Sent::All,
            Err(error) => {
                if segments > 1
                    && matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL))
                    && segment_len + header_bytes(dst) <= mtu
                    && segments <= limits::BURST_SEGMENTS
                    && self.offload
                {
                    self.offload = false;
                    tracing::warn!(
                        interface = self.own.link.name,
                        "the kernel does not segment UDP here ({error}): packets go one by one"
                    );
                }
                judge(&error)
            }
        }
    }
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
        (self.senders.segments(), bytes)
    }

    fn source_ports(&self) -> (u16, u16) {
        self.senders.ports()
    }

    fn ident(&self, index: usize) -> u16 {
        // The kernel numbers the segments of a superframe from that of the superframe, which is 0.
        index as u16
    }

    fn send(&mut self, flow: &Flow, segment_len: usize, payloads: &[u8]) -> Sent {
        let v4 = ip::mapped_v4(&flow.dst).is_some();
        if v4 != self.own.ip.is_ipv4() || payloads.is_empty() || segment_len == 0 {
            return self.counters.failed(Sent::Lost);
        }
        let mtu = self.link.get().mtu;
        match self.senders.send(flow, segment_len, payloads, mtu) {
            Sent::All => self
                .counters
                .sent(payloads.len().div_ceil(segment_len), payloads.len()),
            how => self.counters.failed(how),
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

    fn takes_company(&self) -> bool {
        true
    }
}
