//! AF_PACKET with a mapped receive ring and segmentation offload by virtio-net headers: the fast carrier, and the one that sees
//! the IPv4 identification. Needs CAP_NET_RAW.
//!
//! The kernel's own stack sees every packet too. It is kept from answering with ICMP by a UDP socket on port 4791 of the same
//! address, whose filter drops everything; that also says who owns the port. A packet socket sees what arrives before the
//! machine's packet filter (nftables, iptables) does.

use std::io::IoSlice;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use hyv_roce::carrier::{Arrival, Carrier, DEFAULT_HOP_LIMIT, Flow, Gid, Sent, UDP_PORT};
use hyv_roce::icrc;
use hyv_roce::wire::{ethernet, ip, udp};

use crate::addr::{self, ListenAddr, Owned, gid_of};
use crate::error::OpenError;
use crate::limits;
use crate::link::LinkState;
use crate::netlink::{Link, Netlink};
use crate::next_hop::{Live, Mac, NextHops, Resolved};
use crate::sys::ring::{
    Frame, Ring, VNET_BYTES, VNET_GSO_ECN, VNET_GSO_NONE, VNET_GSO_UDP_L4, VNET_NEEDS_CSUM,
};
use crate::sys::socket::{RawAddr, Socket};
use crate::udp::{Senders, bind_roce_port, header_bytes, judge};
use crate::{Counters, Info, Kind, Options};

/// Bytes in front of the payload at most: virtio-net, Ethernet, IPv6 and UDP headers.
pub(crate) const HEADERS: usize = VNET_BYTES + ethernet::LEN + ip::V6_LEN + udp::LEN;
/// First Linux that takes and gives UDP segmentation in virtio-net headers.
const FIRST_LINUX: (u32, u32) = (6, 2);

/// Carries packets over AF_PACKET.
#[derive(Debug)]
pub struct PacketCarrier {
    own: Owned,
    gid: Gid,
    /// That of the interface, and one of `lo` for peers on this machine.
    rings: Vec<Ring>,
    sender: Socket,
    /// For peers on this machine: its stack does not take a frame with one of its own addresses as source, as a packet socket
    /// would send it through `lo`.
    local_senders: Senders,
    link: LinkState,
    hops: NextHops<Live>,
    /// Looks that found nothing, since the sockets were last asked for errors.
    idle: u32,
    counters: Arc<Counters>,
}

impl PacketCarrier {
    /// Opens AF_PACKET sockets on the interface that has an address of this machine, and takes its UDP port 4791.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(addr: &ListenAddr, options: &Options) -> Result<(PacketCarrier, Info), OpenError> {
        let netlink = || Netlink::open().map_err(OpenError::system("opening rtnetlink"));
        let mut first = netlink()?;
        let own = addr::find(&mut first, addr)?;
        check_kernel()?;
        check_ethernet(&own.link)?;
        let sender = open_sender(own.ip)?;
        let guard = bind_roce_port(&own)?;
        guard
            .drop_everything()
            .map_err(OpenError::system("attaching a filter"))?;
        let loopback = find_loopback(&mut first, &own)?;
        let mut rings = vec![open_ring(
            &own,
            UDP_PORT,
            own.link.index,
            options.ring_slots,
        )?];
        if loopback != own.link.index {
            let slots = options.ring_slots.min(limits::LOOPBACK_SLOTS);
            rings.push(open_ring(&own, UDP_PORT, loopback, slots)?);
        }
        let local_senders = Senders::bind(&own)?;
        let counters = Arc::new(Counters::default());
        let sizes: Vec<String> = rings.iter().map(|ring| ring.slots().to_string()).collect();
        let fds: std::io::Result<Vec<_>> = rings.iter().map(|ring| ring.socket().dup()).collect();
        let info = Info {
            carrier: Kind::Packet,
            local: own.ip,
            interface: own.link.name.clone(),
            mtu: own.link.mtu,
            icrc_bits: 32,
            receive: format!(
                "AF_PACKET with UDP segmentation, receive ring of {} slots of {} KiB",
                sizes.join(" + "),
                limits::SLOT_BYTES >> 10
            ),
            source_ports: local_senders.ports(),
            wait_fds: fds.map_err(OpenError::system("duplicating a descriptor"))?,
            note: None,
            counters: counters.clone(),
        };
        let carrier = PacketCarrier {
            gid: gid_of(own.ip),
            rings,
            sender,
            local_senders,
            link: LinkState::new(netlink()?, &own.link),
            hops: NextHops::new(Live::new(first, own.clone(), loopback, guard)),
            idle: 0,
            counters,
            own,
        };
        Ok((carrier, info))
    }

    /// Cold: what an idle carrier does now and then.
    #[cold]
    fn look_after_sockets(&mut self) {
        self.idle = 0;
        for ring in &self.rings {
            // An interface that went down leaves an error that would wake every sleeper at once, for ever.
            if let Some(error) = ring.socket().take_error() {
                tracing::debug!(interface = self.own.link.name, "packet socket: {error}");
            }
        }
    }
}

/// Index of `lo`.
pub(crate) fn find_loopback(netlink: &mut Netlink, own: &Owned) -> Result<u32, OpenError> {
    let links = netlink
        .links()
        .map_err(OpenError::system("asking the kernel for interfaces"))?;
    let lo = links
        .iter()
        .find(|link| link.hardware == libc::ARPHRD_LOOPBACK);
    Ok(lo.map_or(own.link.index, |link| link.index))
}

fn check_kernel() -> Result<(), OpenError> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|number| number.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < FIRST_LINUX => Err(OpenError::OldKernel {
            release: release.into(),
        }),
        // Without /proc nothing is known; the sockets will tell.
        _ => Ok(()),
    }
}

fn check_ethernet(link: &Link) -> Result<(), OpenError> {
    match link.hardware {
        libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK => Ok(()),
        hardware => Err(OpenError::NotEthernet {
            interface: link.name.clone(),
            hardware,
        }),
    }
}

/// A packet socket that receives nothing until it is bound.
fn packet_socket(ip: IpAddr) -> Result<Socket, OpenError> {
    Socket::new(libc::AF_PACKET, libc::SOCK_RAW, 0).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => OpenError::NotPermitted { ip },
        _ => OpenError::System {
            what: "making an AF_PACKET socket".into(),
            error,
        },
    })
}

/// A socket that sends frames with virtio-net headers and receives nothing.
pub(crate) fn open_sender(ip: IpAddr) -> Result<Socket, OpenError> {
    let sender = packet_socket(ip)?;
    sender
        .set_int(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)
        .map_err(OpenError::system("asking for virtio-net headers"))?;
    let _ = sender.grow_buffer(false, limits::SEND_BUFFER);
    Ok(sender)
}

pub(crate) fn ethertype(ip: IpAddr) -> u16 {
    match ip {
        IpAddr::V4(_) => ethernet::IPV4,
        IpAddr::V6(_) => ethernet::IPV6,
    }
}

pub(crate) fn open_ring(
    own: &Owned,
    port: u16,
    interface: u32,
    slots: usize,
) -> Result<Ring, OpenError> {
    let socket = packet_socket(own.ip)?;
    // First the filter, then the binding, so that nothing else ever gets in.
    socket
        .attach_filter(&filter(own.ip, port))
        .map_err(OpenError::system("attaching a filter to a packet socket"))?;
    socket
        .set_int(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)
        .map_err(OpenError::system("leaving out outgoing packets"))?;
    let ring = Ring::new(socket, slots).map_err(OpenError::system(format!(
        "mapping a receive ring of {slots} slots of {} KiB",
        limits::SLOT_BYTES >> 10
    )))?;
    ring.socket()
        .bind(&RawAddr::link(interface, ethertype(own.ip)))
        .map_err(OpenError::system(format!(
            "binding a packet socket to {}",
            own.link.name
        )))?;
    Ok(ring)
}

/// A BPF program that lets through what is for this host (by MAC), without VLAN tag, not a fragment, and UDP to `port` of `ip`.
fn filter(ip: IpAddr, port: u16) -> Vec<(u16, u8, u8, u32)> {
    // Offsets from the network header, whatever lies in front; and the kernel's own facts about a packet.
    const NET: u32 = libc::SKF_NET_OFF as u32;
    const FACTS: u32 = libc::SKF_AD_OFF as u32;
    const PACKET_HOST: u32 = 0;
    let load = |size: u32, at: u32| ((libc::BPF_LD | size | libc::BPF_ABS) as u16, at);
    let fact = |which: i32| load(libc::BPF_W, FACTS.wrapping_add(which as u32));
    let word = |at: u32| load(libc::BPF_W, NET.wrapping_add(at));
    let half = |at: u32| load(libc::BPF_H, NET.wrapping_add(at));
    let byte = |at: u32| load(libc::BPF_B, NET.wrapping_add(at));
    // (what to load, its mask, what it must be)
    let mut conditions = vec![
        (fact(libc::SKF_AD_PKTTYPE), !0, PACKET_HOST),
        (fact(libc::SKF_AD_VLAN_TAG_PRESENT), !0, 0),
    ];
    match ip {
        IpAddr::V4(ip) => conditions.extend([
            (byte(0), !0, 0x45),
            (byte(9), !0, ip::UDP.into()),
            (word(16), !0, u32::from(ip)),
            (half(6), 0x3fff, 0),
            (half(ip::V4_LEN as u32 + 2), !0, port.into()),
        ]),
        IpAddr::V6(ip) => {
            conditions.push((byte(6), !0, ip::UDP.into()));
            for (index, part) in ip.octets().chunks_exact(4).enumerate() {
                let part = u32::from_be_bytes([part[0], part[1], part[2], part[3]]);
                conditions.push((word(24 + 4 * index as u32), !0, part));
            }
            conditions.push((half(ip::V6_LEN as u32 + 2), !0, port.into()));
        }
    }
    let mut program = Vec::new();
    for (index, &((code, at), mask, wanted)) in conditions.iter().enumerate() {
        program.push((code, 0, 0, at));
        if mask != !0 {
            program.push((
                (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16,
                0,
                0,
                mask,
            ));
        }
        // Else to the last instruction: over what the conditions behind this one take, and over "let through".
        let behind: usize = conditions[index + 1..]
            .iter()
            .map(|&(_, mask, _)| if mask == !0 { 2 } else { 3 })
            .sum();
        let jump = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        program.push((jump, 0, behind as u8 + 1, wanted));
    }
    let give = (libc::BPF_RET | libc::BPF_K) as u16;
    program.extend([(give, 0, 0, u32::MAX), (give, 0, 0, 0)]);
    program
}

/// Hands over the packets of a frame; gives how many and their bytes, `None` if it is no proper UDP packet.
fn unpack(
    frame: &Frame<'_>,
    dst: &Gid,
    take: &mut dyn FnMut(&Arrival<'_>),
) -> Option<(usize, usize)> {
    if frame.cut {
        return None;
    }
    let (src, traffic_class, hop_limit, ident, rest);
    if frame.network.first()? >> 4 == 4 {
        let (header, behind) = ip::V4::parse(frame.network).ok()?;
        if header.is_fragment() || header.protocol != ip::UDP {
            return None;
        }
        src = ip::map_v4(header.src);
        (traffic_class, hop_limit) = (header.tos, header.ttl);
        (ident, rest) = (Some(header.ident), behind);
    } else {
        let (header, behind) = ip::V6::parse(frame.network).ok()?;
        if header.next_header != ip::UDP {
            return None;
        }
        src = header.src;
        (traffic_class, hop_limit) = (header.traffic_class, header.hop_limit);
        (ident, rest) = (None, behind);
    }
    let (header, payloads) = udp::Udp::parse(rest).ok()?;
    let segment = match frame.gso_type & !VNET_GSO_ECN {
        VNET_GSO_NONE => payloads.len().max(1),
        VNET_GSO_UDP_L4 if frame.gso_size > 0 => frame.gso_size,
        _ => return None,
    };
    let counting =
        ident.is_none_or(|ident| counts_on(ident, &src, dst, &header, payloads, segment));
    let mut packets = 0;
    for payload in payloads.chunks(segment) {
        take(&Arrival {
            src,
            dst: *dst,
            src_port: header.src_port,
            traffic_class,
            hop_limit,
            ident: ident.map(|ident: u16| {
                let step = if counting { packets as u16 } else { 0 };
                ident.wrapping_add(step)
            }),
            payload,
        });
        packets += 1;
    }
    Some((packets, payloads.len()))
}

/// Whether the identifications of a superframe's segments count on from its own. Segmentation does so; but a superframe may also be
/// packets of one identification that were merged on the way in (`rx-udp-gro-forwarding`). The second packet's ICRC tells.
fn counts_on(
    ident: u16,
    src: &Gid,
    dst: &Gid,
    header: &udp::Udp,
    payloads: &[u8],
    segment: usize,
) -> bool {
    match payloads.chunks(segment).nth(1) {
        None => true,
        Some(second) => {
            let flow = icrc::Flow::new(src, dst, header.src_port);
            flow.check(second, ident.wrapping_add(1)) || !flow.check(second, ident)
        }
    }
}

/// One's complement sum of a UDP pseudo header, not inverted: what offloading hardware and the kernel add the rest to.
fn pseudo_sum(src: &[u8], dst: &[u8], udp_len: usize) -> u16 {
    let words = src.chunks_exact(2).chain(dst.chunks_exact(2));
    let mut sum: u64 = words
        .map(|word| u64::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    sum += u64::from(ip::UDP) + udp_len as u64;
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// Writes virtio-net, Ethernet, IP and UDP headers of a burst between two MACs, addresses and ports; gives their bytes.
pub(crate) fn write_headers(
    out: &mut [u8; HEADERS],
    (from, to): (Mac, Mac),
    (src, dst): (&Gid, &Gid),
    flow: &Flow,
    dst_port: u16,
    segment_len: Option<usize>,
    bytes: usize,
) -> usize {
    let udp_len = udp::LEN + bytes;
    let hop_limit = match flow.hop_limit {
        0 => DEFAULT_HOP_LIMIT,
        limit => limit,
    };
    let v4 = ip::mapped_v4(src).zip(ip::mapped_v4(dst));
    let ethertype = if v4.is_some() {
        ethernet::IPV4
    } else {
        ethernet::IPV6
    };
    let (vnet, rest) = out.split_at_mut(VNET_BYTES);
    let (ether, rest) = rest.split_at_mut(ethernet::LEN);
    ethernet::Ethernet {
        dst: to,
        src: from,
        ethertype,
        header_len: ethernet::LEN,
    }
    .emit(ether);
    let ip_len = match v4 {
        Some((src, dst)) => {
            ip::V4 {
                tos: flow.traffic_class,
                total_len: (ip::V4_LEN + udp_len) as u16,
                ident: 0,
                flags_fragment: ip::DONT_FRAGMENT,
                ttl: hop_limit,
                protocol: ip::UDP,
                src,
                dst,
            }
            .emit(rest);
            ip::V4_LEN
        }
        None => {
            ip::V6 {
                traffic_class: flow.traffic_class,
                flow_label: flow.flow_label,
                payload_len: udp_len as u16,
                next_header: ip::UDP,
                hop_limit,
                src: *src,
                dst: *dst,
            }
            .emit(rest);
            ip::V6_LEN
        }
    };
    let checksum = match (segment_len, v4) {
        // As Linux's rxe and NICs do: the ICRC does the checksum's work.
        (None, _) => 0,
        (Some(_), Some((src, dst))) => pseudo_sum(&src, &dst, udp_len),
        (Some(_), None) => pseudo_sum(src, dst, udp_len),
    };
    udp::Udp {
        src_port: flow.src_port,
        dst_port,
        len: udp_len as u16,
        checksum,
    }
    .emit(&mut rest[ip_len..]);
    let headers = ethernet::LEN + ip_len + udp::LEN;
    if let Some(segment_len) = segment_len {
        // struct virtio_net_hdr: flags, gso_type; hdr_len, gso_size, csum_start, csum_offset in the machine's order.
        vnet[0] = VNET_NEEDS_CSUM;
        vnet[1] = VNET_GSO_UDP_L4;
        let words = [headers, segment_len, ethernet::LEN + ip_len, 6];
        for (word, value) in vnet[2..].chunks_exact_mut(2).zip(words) {
            word.copy_from_slice(&(value as u16).to_ne_bytes());
        }
    }
    VNET_BYTES + headers
}

impl Carrier for PacketCarrier {
    fn local(&self) -> Gid {
        self.gid
    }

    fn link_mtu(&self) -> usize {
        self.link.get().mtu
    }

    fn burst(&self, _: &Flow) -> (usize, usize) {
        let bytes = limits::SUPERFRAME - header_bytes(self.own.ip);
        (self.local_senders.segments(), bytes)
    }

    fn source_ports(&self) -> (u16, u16) {
        self.local_senders.ports()
    }

    fn ident(&self, index: usize) -> u16 {
        // Superframes leave with identification 0, and segmentation counts on.
        index as u16
    }

    fn send(&mut self, flow: &Flow, segment_len: usize, payloads: &[u8]) -> Sent {
        let v4 = self.own.ip.is_ipv4();
        if v4 != ip::mapped_v4(&flow.dst).is_some() || payloads.is_empty() || segment_len == 0 {
            return self.counters.failed(Sent::Lost);
        }
        let link = self.link.get();
        let segments = payloads.len().div_ceil(segment_len);
        let (most, most_bytes) = self.burst(flow);
        // The kernel segments to any length, also to one that the link does not take.
        if segment_len.min(payloads.len()) + header_bytes(self.own.ip) > link.mtu
            || segments > most
            || payloads.len() > most_bytes
        {
            return self.counters.failed(Sent::Lost);
        }
        let mac = match self.hops.resolve(&flow.dst, Instant::now()) {
            Resolved::Here => {
                let sent = self
                    .local_senders
                    .send(flow, segment_len, payloads, link.mtu);
                return match sent {
                    Sent::All => self.counters.sent(segments, payloads.len()),
                    how => self.counters.failed(how),
                };
            }
            Resolved::To(mac) => mac,
            Resolved::Wait => return self.counters.failed(Sent::Busy),
            Resolved::Nowhere => return self.counters.failed(Sent::Lost),
        };
        let mut headers = [0; HEADERS];
        let len = write_headers(
            &mut headers,
            (link.mac, mac),
            (&self.gid, &flow.dst),
            flow,
            UDP_PORT,
            (segments > 1).then_some(segment_len),
            payloads.len(),
        );
        let to = RawAddr::link(self.own.link.index, ethertype(self.own.ip));
        let parts = [IoSlice::new(&headers[..len]), IoSlice::new(payloads)];
        match self.sender.send(Some(&to), &parts, &Default::default()) {
            Ok(_) => self.counters.sent(segments, payloads.len()),
            Err(error) => self.counters.failed(judge(&error)),
        }
    }

    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize {
        let mut total = 0;
        for ring in &mut self.rings {
            let mut got = (0, 0);
            let mut malformed = 0;
            for _ in 0..limits::SLOTS_PER_RECEIVE {
                let more = ring.next(|frame| match unpack(frame, &self.gid, take) {
                    Some((packets, bytes)) => got = (got.0 + packets, got.1 + bytes),
                    None => malformed += 1,
                });
                if !more {
                    break;
                }
            }
            if malformed > 0 {
                Counters::add(&self.counters.malformed, malformed);
            }
            if ring.take_losing()
                && let Ok(drops) = ring.take_drops()
            {
                Counters::add(&self.counters.ring_full, drops as usize);
            }
            self.counters.received(got.0, got.1);
            total += got.0;
        }
        if total == 0 {
            self.idle += 1;
            if self.idle >= limits::LOOKS_PER_ERROR_CHECK {
                self.look_after_sockets();
            }
        }
        total
    }

    fn takes_company(&self) -> bool {
        // A superframe of two packets takes the kernel half as long again as one packet.
        false
    }

    fn cheap_poll(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: [u8; 4] = [10, 0, 0, 1];
    const B: [u8; 4] = [10, 0, 0, 2];

    fn flow(dst: Gid) -> Flow {
        Flow {
            dst,
            src_port: 0xc003,
            traffic_class: 0xb8,
            hop_limit: 0,
            flow_label: 0x12345,
        }
    }

    fn gids() -> [(Gid, Gid); 2] {
        let v6 = |last: u8| {
            let mut gid = [0xfd; 16];
            gid[15] = last;
            gid
        };
        [(ip::map_v4(A), ip::map_v4(B)), (v6(1), v6(2))]
    }

    /// A frame as a sender makes it: `gso_type`, `gso_size`, and what is behind the Ethernet header.
    fn frame(src: &Gid, dst: &Gid, segment: usize, payloads: &[u8]) -> (u8, usize, Vec<u8>) {
        let mut headers = [0; HEADERS];
        let macs = ([2; 6], [4; 6]);
        let burst = payloads.len() > segment;
        let len = write_headers(
            &mut headers,
            macs,
            (src, dst),
            &flow(*dst),
            UDP_PORT,
            burst.then_some(segment),
            payloads.len(),
        );
        let (vnet, rest) = headers[..len].split_at(VNET_BYTES);
        let size = u16::from_ne_bytes([vnet[4], vnet[5]]).into();
        assert_eq!((&rest[..6], &rest[6..12]), (&[4; 6][..], &[2; 6][..]));
        let mut network = rest[ethernet::LEN..].to_vec();
        network.extend_from_slice(payloads);
        (vnet[1], size, network)
    }

    fn taken(
        gso_type: u8,
        gso_size: usize,
        network: &[u8],
        dst: &Gid,
    ) -> Option<Vec<(Option<u16>, Vec<u8>)>> {
        let mut got = Vec::new();
        let frame = Frame {
            gso_type,
            gso_size,
            network,
            cut: false,
        };
        let counted = unpack(&frame, dst, &mut |arrival| {
            assert_eq!((arrival.src_port, arrival.traffic_class), (0xc003, 0xb8));
            assert_eq!((arrival.hop_limit, arrival.dst), (DEFAULT_HOP_LIMIT, *dst));
            got.push((arrival.ident, arrival.payload.to_vec()));
        })?;
        assert_eq!(counted.0, got.len());
        Some(got)
    }

    #[test]
    fn what_is_sent_is_unpacked() {
        for (src, dst) in gids() {
            for (segment, len) in [(16, 16), (100, 301), (1044, 40 * 1044), (4000, 4000)] {
                let payloads: Vec<u8> = (0..len).map(|at| at as u8).collect();
                let (kind, size, network) = frame(&src, &dst, segment, &payloads);
                let got = taken(kind, size, &network, &dst).unwrap();
                let v4 = ip::mapped_v4(&src).is_some();
                let wanted: Vec<_> = payloads
                    .chunks(segment)
                    .enumerate()
                    .map(|(index, part)| (v4.then_some(index as u16), part.to_vec()))
                    .collect();
                assert!(got == wanted, "{len} bytes by {segment}");
            }
        }
    }

    #[test]
    fn checksums_of_superframes_are_those_that_offload_completes() {
        for (src, dst) in gids() {
            let payloads: Vec<u8> = (0..1000u32).map(|at| (at * 7) as u8).collect();
            let (_, _, network) = frame(&src, &dst, 100, &payloads);
            let v4 = ip::mapped_v4(&src).zip(ip::mapped_v4(&dst));
            let (_, datagram) = network.split_at(if v4.is_some() { 20 } else { 40 });
            // The sum over everything, the prepared field included, is the right checksum.
            let completed = ip::checksum(datagram);
            let right = match v4 {
                Some((src, dst)) => udp::checksum(&src, &dst, datagram),
                None => udp::checksum(&src, &dst, datagram),
            };
            assert_eq!(completed, right);
        }
    }

    #[test]
    fn merged_packets_of_one_identification_keep_it() {
        let (src, dst) = gids()[0];
        let icrc = icrc::Flow::new(&src, &dst, 0xc003);
        for (first, step) in [(0, 0), (0, 1), (7, 0), (u16::MAX - 1, 1)] {
            let mut payloads = vec![0x33; 5 * 64];
            let mut wanted = Vec::new();
            for (index, packet) in payloads.chunks_mut(64).enumerate() {
                let ident = first.wrapping_add(step * index as u16);
                icrc.seal(packet, ident);
                wanted.push(Some(ident));
            }
            let (kind, size, mut network) = frame(&src, &dst, 64, &payloads);
            let (mut header, _) = ip::V4::parse(&network).unwrap();
            header.ident = first;
            header.emit(&mut network);
            let got = taken(kind, size, &network, &dst).unwrap();
            let idents: Vec<_> = got.iter().map(|(ident, _)| *ident).collect();
            assert_eq!(idents, wanted);
        }
    }

    #[test]
    fn frames_that_are_no_packets_are_refused() {
        for (src, dst) in gids() {
            let (kind, size, network) = frame(&src, &dst, 100, &[1; 100]);
            assert!(taken(kind, size, &network, &dst).is_some());
            // Cut anywhere; with bytes behind, which are padding; with every byte of the headers changed.
            for len in 0..network.len() {
                assert!(taken(kind, size, &network[..len], &dst).is_none(), "{len}");
            }
            let mut padded = network.clone();
            padded.extend_from_slice(&[0; 18]);
            assert!(taken(kind, size, &padded, &dst).is_some());
            let headers = header_bytes(addr::ip_of(&src));
            for at in 0..headers {
                let mut broken = network.clone();
                broken[at] ^= 0x21;
                let frame = Frame {
                    gso_type: kind,
                    gso_size: size,
                    network: &broken,
                    cut: false,
                };
                let _ = unpack(&frame, &dst, &mut |arrival| {
                    assert!(arrival.payload.len() <= broken.len());
                });
            }
            // Kinds of segmentation that are not UDP's, or of no size.
            assert!(taken(1, 50, &network, &dst).is_none());
            assert!(taken(VNET_GSO_UDP_L4, 0, &network, &dst).is_none());
            let two = taken(VNET_GSO_UDP_L4 | VNET_GSO_ECN, 50, &network, &dst);
            assert_eq!(two.unwrap().len(), 2);
        }
    }
}
