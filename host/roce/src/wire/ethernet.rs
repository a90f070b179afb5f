//! Ethernet header.

use super::{Result, array, be16, need, put16};

/// Bytes of an Ethernet header without VLAN tags.
pub const LEN: usize = 14;
/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;
/// EtherTypes of VLAN tags (802.1Q, 802.1ad).
pub const VLAN: [u16; 2] = [0x8100, 0x88a8];

/// An Ethernet header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Ethernet {
    /// Receiver's address.
    pub dst: [u8; 6],
    /// Sender's address.
    pub src: [u8; 6],
    /// What it carries, behind its VLAN tags.
    pub ethertype: u16,
    /// Bytes in front of the payload: 14, and 4 for each VLAN tag.
    pub header_len: usize,
}

impl Ethernet {
    /// Parses a header and up to two VLAN tags, whose contents are passed over. Gives the bytes behind them.
    pub fn parse(bytes: &[u8]) -> Result<(Ethernet, &[u8])> {
        need(bytes, LEN, "Ethernet header")?;
        let mut header_len = LEN;
        let mut ethertype = be16(bytes, 12);
        for _ in 0..2 {
            if !VLAN.contains(&ethertype) {
                break;
            }
            header_len += 4;
            need(bytes, header_len, "VLAN tag")?;
            ethertype = be16(bytes, header_len - 2);
        }
        let repr = Ethernet {
            dst: array(bytes, 0),
            src: array(bytes, 6),
            ethertype,
            header_len,
        };
        Ok((repr, &bytes[header_len..]))
    }

    /// Writes the first [`LEN`] bytes, without VLAN tags.
    pub fn emit(&self, bytes: &mut [u8]) {
        let b = &mut bytes[..LEN];
        b[..6].copy_from_slice(&self.dst);
        b[6..12].copy_from_slice(&self.src);
        put16(b, 12, self.ethertype);
    }
}
