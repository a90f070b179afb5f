//! UDP header (RFC 768).

use super::{ParseError, Result, be16, ip, need, put16};

/// Bytes of a UDP header.
pub const LEN: usize = 8;

/// A UDP header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Udp {
    /// Source port.
    pub src_port: u16,
    /// Destination port; 4791 for RoCEv2.
    pub dst_port: u16,
    /// Bytes of header and payload.
    pub len: u16,
    /// Checksum; 0 says that there is none (RoCEv2 sends 0; offloading senders fill it).
    pub checksum: u16,
}

impl Udp {
    /// Parses a header that fills `bytes` with its payload. Gives the payload.
    pub fn parse(bytes: &[u8]) -> Result<(Udp, &[u8])> {
        need(bytes, LEN, "UDP header")?;
        let repr = Udp::parse_header(bytes);
        if usize::from(repr.len) != bytes.len() {
            return Err(ParseError::Length {
                what: "UDP header",
                says: usize::from(repr.len),
                have: bytes.len(),
            });
        }
        Ok((repr, &bytes[LEN..]))
    }

    /// The first [`LEN`] bytes, which must be there, whatever follows.
    pub(crate) fn parse_header(bytes: &[u8]) -> Udp {
        Udp {
            src_port: be16(bytes, 0),
            dst_port: be16(bytes, 2),
            len: be16(bytes, 4),
            checksum: be16(bytes, 6),
        }
    }

    /// Writes the first [`LEN`] bytes.
    pub fn emit(&self, bytes: &mut [u8]) {
        let b = &mut bytes[..LEN];
        put16(b, 0, self.src_port);
        put16(b, 2, self.dst_port);
        put16(b, 4, self.len);
        put16(b, 6, self.checksum);
    }
}

/// The checksum of a datagram (header with whatever checksum, and payload) between two addresses of one family; right if it equals
/// the header's. `src` and `dst` are 4 or 16 bytes.
pub fn checksum(src: &[u8], dst: &[u8], datagram: &[u8]) -> u16 {
    let mut sum = ip::sum(0, src);
    sum = ip::sum(sum, dst);
    sum += u64::from(ip::UDP) + datagram.len() as u64;
    sum = ip::sum(sum, datagram);
    // Without the header's own checksum.
    sum += u64::from(!be16(datagram, 6));
    match !ip::fold(sum) {
        0 => 0xffff,
        sum => sum,
    }
}
