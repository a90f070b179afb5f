//! What RDMA CM adds to CM (IBA 1.4, annex A11): service identifiers made of port space and port, and 36 bytes with both IP addresses in front
//! of a user's private data in REQ and SIDR_REQ.

use crate::{
    carrier::Gid,
    wire::{ParseError, Result, array, be16, ip, need, put16},
};

/// Bytes of the header in front of a user's private data.
pub const HEADER_LEN: usize = 36;
/// Bytes of private data that a user of RDMA CM may give to a connection request.
pub const USER_REQ: usize = super::Req::PRIVATE - HEADER_LEN;
/// Bytes of private data that a user of RDMA CM may give to a datagram request.
pub const USER_SIDR_REQ: usize = super::SidrReq::PRIVATE - HEADER_LEN;

/// Port spaces, as they stand in service identifiers (A11.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u16)]
pub enum PortSpace {
    /// Connections.
    Tcp = 0x0106,
    /// Datagrams.
    Udp = 0x0111,
    /// Datagrams of IP over InfiniBand.
    Ipoib = 0x0002,
    /// Any protocol of InfiniBand.
    Ib = 0x013f,
}

/// The service identifier of a port.
pub const fn service_id(space: PortSpace, port: u16) -> u64 {
    (space as u64) << 16 | port as u64
}

/// The port space and port of a service identifier that RDMA CM made.
pub const fn port_of(service_id: u64) -> Option<(PortSpace, u16)> {
    let space = match service_id >> 16 {
        0x0106 => PortSpace::Tcp,
        0x0111 => PortSpace::Udp,
        0x0002 => PortSpace::Ipoib,
        0x013f => PortSpace::Ib,
        _ => return None,
    };
    Some((space, service_id as u16))
}

/// The header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Header {
    /// Sender's port.
    pub src_port: u16,
    /// Sender's address; both are IPv4 (mapped) or both IPv6.
    pub src: Gid,
    /// Receiver's address.
    pub dst: Gid,
}

impl Header {
    /// Parses the first bytes of private data. Gives what the user put behind.
    pub fn parse(private: &[u8]) -> Result<(Header, &[u8])> {
        const WHAT: &str = "RDMA CM header";
        need(private, HEADER_LEN, WHAT)?;
        // Major and minor version: only 0.0 exists.
        if private[0] != 0 {
            return Err(ParseError::Version {
                what: WHAT,
                version: private[0],
            });
        }
        let address = |at: usize| match private[1] >> 4 {
            // An IPv4 address is the last of four words.
            4 => Ok(ip::map_v4(array(private, at + 12))),
            6 => Ok(array(private, at)),
            version => Err(ParseError::Value {
                what: "IP version of an RDMA CM header",
                value: u32::from(version),
            }),
        };
        let header = Header {
            src_port: be16(private, 2),
            src: address(4)?,
            dst: address(20)?,
        };
        Ok((header, &private[HEADER_LEN..]))
    }

    /// Writes the first [`HEADER_LEN`] bytes.
    pub fn emit(&self, private: &mut [u8]) {
        let b = &mut private[..HEADER_LEN];
        b.fill(0);
        put16(b, 2, self.src_port);
        match (ip::mapped_v4(&self.src), ip::mapped_v4(&self.dst)) {
            (Some(src), Some(dst)) => {
                b[1] = 4 << 4;
                b[16..20].copy_from_slice(&src);
                b[32..36].copy_from_slice(&dst);
            }
            _ => {
                b[1] = 6 << 4;
                b[4..20].copy_from_slice(&self.src);
                b[20..36].copy_from_slice(&self.dst);
            }
        }
    }
}
