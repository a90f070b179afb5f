//! The invariant CRC (IBA 1.4, 7.8.1; A17.3.3): CRC-32 over what routers do not change.
//!
//! Over RoCEv2 it covers 8 bytes of ones (in place of InfiniBand's own link header), the IP header, the UDP header and the packet
//! up to the ICRC, with ones in the place of: TOS, TTL and checksum (IPv4); traffic class, flow label and hop limit (IPv6); the UDP
//! checksum; BTH byte 4. The IPv4 identification is **not** masked: who makes or checks an ICRC must know it. Where a receiver
//! cannot see it (UDP sockets), [`solve_ident`] finds it from the CRC, which leaves a check of 16 of the 32 bits.
//!
//! A CRC is linear over bits. So what does not change in a flow is computed once ([`Flow::new`]), and length and identification are
//! added per packet by table.

mod field;

use crc32fast::Hasher;

use crate::{
    carrier::{Gid, UDP_PORT},
    wire::{ICRC_LEN, bth, ip, udp},
};

pub use field::{IdentSolver, solve_ident};

/// The part of an ICRC that all packets between two addresses, from one source port, have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// CRC of the masked headers with lengths and identification 0.
    base: u32,
    v4: bool,
}

impl Flow {
    /// Of packets from `src` and `src_port` to `dst`: IPv4 if both are mapped IPv4 addresses (don't fragment set, as every RoCEv2
    /// sender does), else IPv6.
    pub fn new(src: &Gid, dst: &Gid, src_port: u16) -> Flow {
        Flow::to_port(src, dst, src_port, UDP_PORT)
    }

    /// The same for another destination port than 4791.
    pub fn to_port(src: &Gid, dst: &Gid, src_port: u16, dst_port: u16) -> Flow {
        match (ip::mapped_v4(src), ip::mapped_v4(dst)) {
            (Some(src), Some(dst)) => Flow::v4(src, dst, ip::DONT_FRAGMENT, src_port, dst_port),
            _ => Flow::v6(src, dst, src_port, dst_port),
        }
    }

    /// Over IPv4, with any flags.
    pub fn v4(src: [u8; 4], dst: [u8; 4], flags: u16, src_port: u16, dst_port: u16) -> Flow {
        let mut h = Hasher::new();
        h.update(&[0xff; 8]);
        let mut b = [0; ip::V4_LEN + udp::LEN];
        b[0] = 0x45;
        b[1] = 0xff;
        b[6..8].copy_from_slice(&flags.to_be_bytes());
        b[8] = 0xff;
        b[9] = ip::UDP;
        b[10..12].fill(0xff);
        b[12..16].copy_from_slice(&src);
        b[16..20].copy_from_slice(&dst);
        masked_udp(&mut b[ip::V4_LEN..], src_port, dst_port);
        h.update(&b);
        Flow {
            base: h.finalize(),
            v4: true,
        }
    }

    /// Over IPv6.
    pub fn v6(src: &[u8; 16], dst: &[u8; 16], src_port: u16, dst_port: u16) -> Flow {
        let mut h = Hasher::new();
        h.update(&[0xff; 8]);
        let mut b = [0; ip::V6_LEN + udp::LEN];
        b[..4].copy_from_slice(&[0x6f, 0xff, 0xff, 0xff]);
        b[6] = ip::UDP;
        b[7] = 0xff;
        b[8..24].copy_from_slice(src);
        b[24..40].copy_from_slice(dst);
        masked_udp(&mut b[ip::V6_LEN..], src_port, dst_port);
        h.update(&b);
        Flow {
            base: h.finalize(),
            v4: false,
        }
    }

    /// Whether the identification counts.
    pub fn is_v4(&self) -> bool {
        self.v4
    }

    /// Begins the ICRC of a packet of `packet_len` bytes from BTH to ICRC, both included. `ident` is the IPv4 identification, and of no
    /// matter over IPv6.
    #[inline]
    pub fn start(&self, packet_len: usize, ident: u16) -> Icrc {
        // No IP packet is longer, so the sums fit 16 bits for whatever was received or can be sent.
        let udp_len = (packet_len + udp::LEN) as u16;
        let crc = if self.v4 {
            let total_len = udp_len.wrapping_add(ip::V4_LEN as u16);
            self.base
                ^ field::V4_TOTAL_LEN.of(total_len)
                ^ field::V4_IDENT.of(ident)
                ^ field::UDP_LEN.of(udp_len)
        } else {
            self.base ^ field::V6_PAYLOAD_LEN.of(udp_len) ^ field::UDP_LEN.of(udp_len)
        };
        Icrc { crc }
    }

    /// The ICRC that belongs at the end of `packet`, which is the bytes from BTH to ICRC, the last four being of no matter.
    #[inline]
    pub fn of(&self, packet: &[u8], ident: u16) -> u32 {
        let mut icrc = self.start(packet.len(), ident);
        let end = packet.len().saturating_sub(ICRC_LEN);
        icrc.headers(&packet[..end]);
        icrc.finish()
    }

    /// Writes the ICRC into the last four bytes of `packet`.
    #[inline]
    pub fn seal(&self, packet: &mut [u8], ident: u16) {
        let icrc = self.of(packet, ident);
        let at = packet.len() - ICRC_LEN;
        packet[at..].copy_from_slice(&icrc.to_le_bytes());
    }

    /// How the ICRC at the end of `packet` differs from the right one for `ident`: 0 if it is right. What [`solve_ident`] takes,
    /// with `ident` 0.
    #[inline]
    pub fn residual(&self, packet: &[u8], ident: u16) -> u32 {
        let mut found = [0; ICRC_LEN];
        match packet.len().checked_sub(ICRC_LEN) {
            Some(at) => found.copy_from_slice(&packet[at..]),
            None => return u32::MAX,
        }
        self.of(packet, ident) ^ u32::from_le_bytes(found)
    }

    /// Whether the ICRC at the end of `packet` is right.
    #[inline]
    pub fn check(&self, packet: &[u8], ident: u16) -> bool {
        self.residual(packet, ident) == 0
    }
}

fn masked_udp(b: &mut [u8], src_port: u16, dst_port: u16) {
    b[..2].copy_from_slice(&src_port.to_be_bytes());
    b[2..4].copy_from_slice(&dst_port.to_be_bytes());
    b[6..8].fill(0xff);
}

/// An ICRC in the making: [`Icrc::headers`] once, then the rest of the packet in any number of pieces.
#[derive(Clone, Copy, Debug)]
pub struct Icrc {
    crc: u32,
}

impl Icrc {
    /// Takes the first bytes of the packet: at least the BTH, whose byte 4 counts as ones.
    #[inline]
    pub fn headers(&mut self, bytes: &[u8]) {
        if let Some(byte) = bytes.get(bth::MASKED_BYTE) {
            self.crc ^= field::MASKED_BYTE[usize::from(byte ^ 0xff)];
        }
        self.update(bytes);
    }

    /// Takes the next bytes.
    #[inline]
    pub fn update(&mut self, bytes: &[u8]) {
        let mut hasher = Hasher::new_with_initial(self.crc);
        hasher.update(bytes);
        self.crc = hasher.finalize();
    }

    /// Takes the next bytes, whose CRC was computed beforehand: while they were copied, or for several packets that carry them.
    #[inline]
    pub fn append(&mut self, part: &Part) {
        let mut hasher = Hasher::new_with_initial(self.crc);
        hasher.combine(&part.hasher);
        self.crc = hasher.finalize();
    }

    /// The ICRC; on the wire its little-endian bytes.
    #[inline]
    pub fn finish(self) -> u32 {
        self.crc
    }
}

/// CRC of a piece of a packet, made without knowing what is in front of it.
#[derive(Clone, Debug, Default)]
pub struct Part {
    hasher: Hasher,
}

impl Part {
    /// Of no bytes.
    pub fn new() -> Part {
        Part::default()
    }

    /// Takes the next bytes.
    #[inline]
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }
}

#[cfg(test)]
mod tests;
