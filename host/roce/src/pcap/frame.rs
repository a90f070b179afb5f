//! Finds the RoCEv2 packet in a captured frame.

use crate::{
    carrier::{Gid, UDP_PORT},
    wire::{ParseError, ethernet, ip, udp},
};

use super::{LinkType, Record};

/// Why a frame is of no interest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Other {
    /// Neither IPv4 nor IPv6: ARP, LLDP, RoCE version 1.
    NotIp,
    /// IP that carries something else than UDP: ICMP, TCP.
    NotUdp,
    /// UDP to another port than 4791.
    OtherPort,
    /// A fragment that does not show its ports.
    Fragment,
    /// The frame begins with a link-layer header that is not known here.
    LinkType,
    /// Too short to tell.
    Short,
    /// The headers of a frame that is not known to be RoCEv2 contradict themselves.
    Malformed,
}

impl Other {
    /// For reports.
    pub const fn name(self) -> &'static str {
        match self {
            Other::NotIp => "not-ip",
            Other::NotUdp => "not-udp",
            Other::OtherPort => "other-port",
            Other::Fragment => "later-fragment",
            Other::LinkType => "link-type",
            Other::Short => "short",
            Other::Malformed => "malformed",
        }
    }
}

/// The IP header of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ip {
    /// IPv4.
    V4(ip::V4),
    /// IPv6.
    V6(ip::V6),
}

impl Ip {
    /// Sender.
    pub fn src(&self) -> Gid {
        match self {
            Ip::V4(v4) => ip::map_v4(v4.src),
            Ip::V6(v6) => v6.src,
        }
    }

    /// Receiver.
    pub fn dst(&self) -> Gid {
        match self {
            Ip::V4(v4) => ip::map_v4(v4.dst),
            Ip::V6(v6) => v6.dst,
        }
    }

    /// IPv4 identification; 0 over IPv6.
    pub fn ident(&self) -> u16 {
        match self {
            Ip::V4(v4) => v4.ident,
            Ip::V6(_) => 0,
        }
    }

    /// Bytes of the header.
    pub fn header_len(&self) -> usize {
        match self {
            Ip::V4(_) => ip::V4_LEN,
            Ip::V6(_) => ip::V6_LEN,
        }
    }

    /// Writes the header.
    pub fn emit(&self, bytes: &mut [u8]) {
        match self {
            Ip::V4(v4) => v4.emit(bytes),
            Ip::V6(v6) => v6.emit(bytes),
        }
    }

    /// The CRC that its packets begin with.
    pub fn icrc_flow(&self, udp: &udp::Udp) -> crate::icrc::Flow {
        use crate::icrc::Flow;
        match self {
            Ip::V4(v4) => Flow::v4(
                v4.src,
                v4.dst,
                v4.flags_fragment,
                udp.src_port,
                udp.dst_port,
            ),
            Ip::V6(v6) => Flow::v6(&v6.src, &v6.dst, udp.src_port, udp.dst_port),
        }
    }
}

/// A RoCEv2 packet with the headers that it travelled in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame<'a> {
    /// IP header.
    pub ip: Ip,
    /// UDP header.
    pub udp: udp::Udp,
    /// From the IP header to the ICRC.
    pub ip_packet: &'a [u8],
    /// From BTH to ICRC: as much as was captured.
    pub packet: &'a [u8],
    /// Bytes of `packet` that the snap length cut off.
    pub missing: usize,
}

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen<'a> {
    /// RoCEv2.
    Roce(Frame<'a>),
    /// Something else.
    Other(Other),
    /// RoCEv2 whose IP or UDP header is wrong, or that was fragmented.
    Broken(ParseError),
}

/// Looks into a frame.
pub fn dissect<'a>(record: &Record<'a>) -> Seen<'a> {
    let data = record.data;
    let cut = record.original_len.saturating_sub(data.len());
    match record.link {
        LinkType::Ethernet => match ethernet::Ethernet::parse(data) {
            Ok((header, rest)) => by_ethertype(header.ethertype, rest, cut),
            Err(_) => Seen::Other(Other::Short),
        },
        LinkType::LinuxSll if data.len() >= 16 => {
            by_ethertype(crate::wire::be16(data, 14), &data[16..], cut)
        }
        LinkType::LinuxSll2 if data.len() >= 20 => {
            by_ethertype(crate::wire::be16(data, 0), &data[20..], cut)
        }
        LinkType::LinuxSll | LinkType::LinuxSll2 => Seen::Other(Other::Short),
        LinkType::RawIp => match data.first() {
            None => Seen::Other(Other::Short),
            Some(first) => match first >> 4 {
                4 => v4(data, cut),
                6 => v6(data, cut),
                _ => Seen::Other(Other::NotIp),
            },
        },
        LinkType::Other(_) => Seen::Other(Other::LinkType),
    }
}

fn by_ethertype(ethertype: u16, rest: &[u8], cut: usize) -> Seen<'_> {
    match ethertype {
        ethernet::IPV4 => v4(rest, cut),
        ethernet::IPV6 => v6(rest, cut),
        _ => Seen::Other(Other::NotIp),
    }
}

/// Whether the bytes behind an IP header are a UDP header to port 4791, as far as can be seen.
fn is_roce(datagram: &[u8]) -> Result<(), Other> {
    if datagram.len() < 4 {
        return Err(Other::Short);
    }
    if crate::wire::be16(datagram, 2) != UDP_PORT {
        return Err(Other::OtherPort);
    }
    Ok(())
}

fn v4(data: &[u8], cut: usize) -> Seen<'_> {
    if data.len() < ip::V4_LEN {
        return Seen::Other(Other::Short);
    }
    if data[0] >> 4 != 4 {
        return Seen::Other(Other::Malformed);
    }
    if data[9] != ip::UDP {
        return Seen::Other(Other::NotUdp);
    }
    let offset = crate::wire::be16(data, 6) & 0x1fff;
    if offset != 0 {
        return Seen::Other(Other::Fragment);
    }
    let header_len = usize::from(data[0] & 0xf) * 4;
    if header_len < ip::V4_LEN {
        return Seen::Other(Other::Malformed);
    }
    match data.get(header_len..).ok_or(Other::Short).and_then(is_roce) {
        Ok(()) => {}
        Err(other) => return Seen::Other(other),
    }
    let header = match ip::V4::parse_header(data) {
        Ok(header) => header,
        Err(error) => return Seen::Broken(error),
    };
    if header.is_fragment() {
        return Seen::Broken(ParseError::Fragment);
    }
    finish(data, usize::from(header.total_len), Ip::V4(header), cut)
}

fn v6(data: &[u8], cut: usize) -> Seen<'_> {
    /// Next header: fragment (RFC 8200, 4.5).
    const FRAGMENT: u8 = 44;
    if data.len() < ip::V6_LEN {
        return Seen::Other(Other::Short);
    }
    let header = match ip::V6::parse_header(data) {
        Ok(header) => header,
        Err(_) => return Seen::Other(Other::Malformed),
    };
    let rest = &data[ip::V6_LEN..];
    if header.next_header == FRAGMENT {
        if rest.len() < 8 {
            return Seen::Other(Other::Short);
        }
        if rest[0] != ip::UDP {
            return Seen::Other(Other::NotUdp);
        }
        return match (crate::wire::be16(rest, 2) >> 3, is_roce(&rest[8..])) {
            (0, Ok(())) => Seen::Broken(ParseError::Fragment),
            (0, Err(other)) => Seen::Other(other),
            _ => Seen::Other(Other::Fragment),
        };
    }
    if header.next_header != ip::UDP {
        return Seen::Other(Other::NotUdp);
    }
    if let Err(other) = is_roce(rest) {
        return Seen::Other(other);
    }
    let end = ip::V6_LEN + usize::from(header.payload_len);
    finish(data, end, Ip::V6(header), cut)
}

/// `end`: bytes of the IP packet by its header.
fn finish(data: &[u8], end: usize, ip: Ip, cut: usize) -> Seen<'_> {
    let at = ip.header_len();
    let missing = end.saturating_sub(data.len());
    if missing > cut {
        return Seen::Broken(ParseError::Length {
            what: "IP header",
            says: end,
            have: data.len() + cut,
        });
    }
    let ip_packet = &data[..end.min(data.len())];
    let datagram = &ip_packet[at.min(ip_packet.len())..];
    if datagram.len() < udp::LEN {
        return Seen::Broken(ParseError::Truncated {
            what: "UDP header",
            need: udp::LEN,
            have: datagram.len(),
        });
    }
    let udp = udp::Udp::parse_header(datagram);
    if usize::from(udp.len) != datagram.len() + missing {
        return Seen::Broken(ParseError::Length {
            what: "UDP header",
            says: usize::from(udp.len),
            have: datagram.len() + missing,
        });
    }
    Seen::Roce(Frame {
        ip,
        udp,
        ip_packet,
        packet: &datagram[udp::LEN..],
        missing,
    })
}

/// Bytes of the longest IP and UDP headers.
pub const HEADERS_MAX: usize = ip::V6_LEN + udp::LEN;

/// IP and UDP headers of a packet of `packet_len` bytes (from BTH to ICRC), without UDP checksum; and how many bytes they have. For
/// writing captures of link type [`LinkType::RawIp`].
pub fn headers(
    flow: &crate::carrier::Flow,
    src: &Gid,
    ident: u16,
    packet_len: usize,
) -> ([u8; HEADERS_MAX], usize) {
    let mut bytes = [0; HEADERS_MAX];
    let udp_len = u16::try_from(packet_len + udp::LEN).unwrap_or(u16::MAX);
    let at = match (ip::mapped_v4(src), ip::mapped_v4(&flow.dst)) {
        (Some(src), Some(dst)) => {
            ip::V4 {
                tos: flow.traffic_class,
                total_len: udp_len.saturating_add(ip::V4_LEN as u16),
                ident,
                flags_fragment: ip::DONT_FRAGMENT,
                ttl: flow.hop_limit,
                protocol: ip::UDP,
                src,
                dst,
            }
            .emit(&mut bytes);
            ip::V4_LEN
        }
        _ => {
            ip::V6 {
                traffic_class: flow.traffic_class,
                flow_label: flow.flow_label,
                payload_len: udp_len,
                next_header: ip::UDP,
                hop_limit: flow.hop_limit,
                src: *src,
                dst: flow.dst,
            }
            .emit(&mut bytes);
            ip::V6_LEN
        }
    };
    udp::Udp {
        src_port: flow.src_port,
        dst_port: UDP_PORT,
        len: udp_len,
        checksum: 0,
    }
    .emit(&mut bytes[at..]);
    (bytes, at + udp::LEN)
}
