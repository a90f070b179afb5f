//! IPv4 and IPv6 headers, as far as RoCEv2 needs them: no options, no fragments, no extension headers are ever sent.

use crate::carrier::Gid;

use super::{ParseError, Result, array, be16, be32, need, put16, put32};

/// Bytes of an IPv4 header without options.
pub const V4_LEN: usize = 20;
/// Bytes of an IPv6 header.
pub const V6_LEN: usize = 40;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
const V4_WHAT: &str = "IPv4 header";
const V6_WHAT: &str = "IPv6 header";
/// Don't fragment, nothing else: flags and fragment offset of every RoCEv2 packet.
pub const DONT_FRAGMENT: u16 = 0x4000;

/// The IPv4 address mapped into a GID (`::ffff:a.b.c.d`), if it is one.
#[inline]
pub fn mapped_v4(gid: &Gid) -> Option<[u8; 4]> {
    const PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    (gid[..12] == PREFIX).then(|| array(gid, 12))
}

/// The GID of an IPv4 address.
#[inline]
pub const fn map_v4(a: [u8; 4]) -> Gid {
    [
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3],
    ]
}

/// An IPv4 header without options.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct V4 {
    /// Type of service: DSCP and ECN.
    pub tos: u8,
    /// Bytes of header and payload.
    pub total_len: u16,
    /// Identification.
    pub ident: u16,
    /// Flags and fragment offset.
    pub flags_fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// What it carries.
    pub protocol: u8,
    /// Sender.
    pub src: [u8; 4],
    /// Receiver.
    pub dst: [u8; 4],
}

impl V4 {
    /// Parses a header; its checksum, version and lengths must be right. Gives the bytes behind it, without what lies behind the
    /// packet's end (Ethernet's padding).
    pub fn parse(bytes: &[u8]) -> Result<(V4, &[u8])> {
        let repr = V4::parse_header(bytes)?;
        let total_len = usize::from(repr.total_len);
        if total_len > bytes.len() {
            return Err(ParseError::Length {
                what: V4_WHAT,
                says: total_len,
                have: bytes.len(),
            });
        }
        Ok((repr, &bytes[V4_LEN..total_len]))
    }

    /// Parses a header whose packet may have been cut.
    pub fn parse_header(bytes: &[u8]) -> Result<V4> {
        need(bytes, V4_LEN, V4_WHAT)?;
        if bytes[0] >> 4 != 4 {
            return Err(ParseError::Version {
                what: V4_WHAT,
                version: bytes[0] >> 4,
            });
        }
        if bytes[0] & 0xf != 5 {
            // Options are not under the ICRC's rules; nothing that speaks RoCEv2 sends them.
            return Err(ParseError::Value {
                what: "IPv4 header length",
                value: u32::from(bytes[0] & 0xf) * 4,
            });
        }
        if checksum(&bytes[..V4_LEN]) != 0 {
            return Err(ParseError::IpChecksum);
        }
        let total_len = be16(bytes, 2);
        if usize::from(total_len) < V4_LEN {
            return Err(ParseError::Length {
                what: V4_WHAT,
                says: usize::from(total_len),
                have: bytes.len(),
            });
        }
        Ok(V4 {
            tos: bytes[1],
            total_len,
            ident: be16(bytes, 4),
            flags_fragment: be16(bytes, 6),
            ttl: bytes[8],
            protocol: bytes[9],
            src: array(bytes, 12),
            dst: array(bytes, 16),
        })
    }

    /// Whether it is a part of a packet.
    pub fn is_fragment(&self) -> bool {
        self.flags_fragment & 0x3fff != 0
    }

    /// Writes the first [`V4_LEN`] bytes, checksum included.
    pub fn emit(&self, bytes: &mut [u8]) {
        let b = &mut bytes[..V4_LEN];
        b[0] = 0x45;
        b[1] = self.tos;
        put16(b, 2, self.total_len);
        put16(b, 4, self.ident);
        put16(b, 6, self.flags_fragment);
        b[8] = self.ttl;
        b[9] = self.protocol;
        put16(b, 10, 0);
        b[12..16].copy_from_slice(&self.src);
        b[16..20].copy_from_slice(&self.dst);
        let sum = checksum(b);
        put16(b, 10, sum);
    }
}

/// An IPv6 header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct V6 {
    /// Traffic class: DSCP and ECN.
    pub traffic_class: u8,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Bytes behind the header.
    pub payload_len: u16,
    /// What it carries.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Sender.
    pub src: [u8; 16],
    /// Receiver.
    pub dst: [u8; 16],
}

impl V6 {
    /// Parses a header. Gives the bytes behind it, without what lies behind the packet's end.
    pub fn parse(bytes: &[u8]) -> Result<(V6, &[u8])> {
        let repr = V6::parse_header(bytes)?;
        let end = V6_LEN + usize::from(repr.payload_len);
        if end > bytes.len() {
            return Err(ParseError::Length {
                what: V6_WHAT,
                says: end,
                have: bytes.len(),
            });
        }
        Ok((repr, &bytes[V6_LEN..end]))
    }

    /// Parses a header whose packet may have been cut.
    pub fn parse_header(bytes: &[u8]) -> Result<V6> {
        need(bytes, V6_LEN, V6_WHAT)?;
        let first = be32(bytes, 0);
        if first >> 28 != 6 {
            return Err(ParseError::Version {
                what: V6_WHAT,
                version: bytes[0] >> 4,
            });
        }
        Ok(V6 {
            traffic_class: (first >> 20) as u8,
            flow_label: first & 0xf_ffff,
            payload_len: be16(bytes, 4),
            next_header: bytes[6],
            hop_limit: bytes[7],
            src: array(bytes, 8),
            dst: array(bytes, 24),
        })
    }

    /// Writes the first [`V6_LEN`] bytes.
    pub fn emit(&self, bytes: &mut [u8]) {
        let b = &mut bytes[..V6_LEN];
        put32(
            b,
            0,
            6 << 28 | u32::from(self.traffic_class) << 20 | self.flow_label & 0xf_ffff,
        );
        put16(b, 4, self.payload_len);
        b[6] = self.next_header;
        b[7] = self.hop_limit;
        b[8..24].copy_from_slice(&self.src);
        b[24..40].copy_from_slice(&self.dst);
    }
}

/// The Internet checksum of `bytes` (RFC 1071); 0 over a header whose checksum is right.
pub fn checksum(bytes: &[u8]) -> u16 {
    !fold(sum(0, bytes))
}

/// Adds `bytes` to a running sum of the Internet checksum; every part but the last has an even length.
pub(crate) fn sum(start: u64, bytes: &[u8]) -> u64 {
    let mut sum = start;
    let mut words = bytes.chunks_exact(2);
    for w in &mut words {
        sum += u64::from(u16::from_be_bytes([w[0], w[1]]));
    }
    if let [last] = words.remainder() {
        sum += u64::from(*last) << 8;
    }
    sum
}

/// Folds a running sum to 16 bits.
pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
