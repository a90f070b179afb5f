//! The 40 bytes in front of what a UD receiver gets (IBA 1.4, 8.3; A17.4.1.6): an IPv6 header, or 20 bytes that say nothing and an
//! IPv4 header, as they came off the wire.

use crate::carrier::Gid;

use super::{Result, ip, udp};

/// Bytes of the GRH area.
pub const LEN: usize = 40;

/// What a UD receiver learns of where a datagram came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Grh {
    /// Sender.
    pub src: Gid,
    /// Receiver.
    pub dst: Gid,
    /// TOS or traffic class.
    pub traffic_class: u8,
    /// Flow label; 0 over IPv4.
    pub flow_label: u32,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// IPv4 identification; 0 where it is not known, and over IPv6.
    pub ident: u16,
    /// Bytes from BTH to ICRC.
    pub packet_len: u16,
}

impl Grh {
    /// Writes the area: over IPv4 (both addresses mapped) 20 zeros and the IPv4 header, over IPv6 that header.
    pub fn emit(&self, bytes: &mut [u8; LEN]) {
        let udp_len = self.packet_len.saturating_add(udp::LEN as u16);
        if let (Some(src), Some(dst)) = (ip::mapped_v4(&self.src), ip::mapped_v4(&self.dst)) {
            bytes[..LEN - ip::V4_LEN].fill(0);
            ip::V4 {
                tos: self.traffic_class,
                total_len: udp_len.saturating_add(ip::V4_LEN as u16),
                ident: self.ident,
                flags_fragment: ip::DONT_FRAGMENT,
                ttl: self.hop_limit,
                protocol: ip::UDP,
                src,
                dst,
            }
            .emit(&mut bytes[LEN - ip::V4_LEN..]);
        } else {
            ip::V6 {
                traffic_class: self.traffic_class,
                flow_label: self.flow_label,
                payload_len: udp_len,
                next_header: ip::UDP,
                hop_limit: self.hop_limit,
                src: self.src,
                dst: self.dst,
            }
            .emit(bytes);
        }
    }

    /// Reads an area that [`Grh::emit`] or a real device wrote.
    pub fn parse(bytes: &[u8; LEN]) -> Result<Grh> {
        if bytes[0] >> 4 == 6 {
            // What follows the header lies elsewhere, so its length is not checked against these bytes.
            let mut header = *bytes;
            let udp_len = super::be16(&header, 4);
            super::put16(&mut header, 4, 0);
            let (v6, _) = ip::V6::parse(&header)?;
            return Ok(Grh {
                src: v6.src,
                dst: v6.dst,
                traffic_class: v6.traffic_class,
                flow_label: v6.flow_label,
                hop_limit: v6.hop_limit,
                ident: 0,
                packet_len: udp_len.saturating_sub(udp::LEN as u16),
            });
        }
        let v4 = &bytes[LEN - ip::V4_LEN..];
        if v4[0] != 0x45 {
            return Err(super::ParseError::Version {
                what: "GRH area",
                version: v4[0] >> 4,
            });
        }
        if ip::checksum(v4) != 0 {
            return Err(super::ParseError::IpChecksum);
        }
        Ok(Grh {
            src: ip::map_v4(super::array(v4, 12)),
            dst: ip::map_v4(super::array(v4, 16)),
            traffic_class: v4[1],
            flow_label: 0,
            hop_limit: v4[8],
            ident: super::be16(v4, 4),
            packet_len: super::be16(v4, 2).saturating_sub((ip::V4_LEN + udp::LEN) as u16),
        })
    }
}
