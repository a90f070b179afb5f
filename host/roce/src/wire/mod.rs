//! Packet formats, in the style of smoltcp's `wire`: a checked view over bytes (`Packet`), and a `Repr` that holds what was
//! parsed and is emitted to the same bytes.
//!
//! | module | format | source |
//! | --- | --- | --- |
//! | [`opcode`] | opcodes of RC, UC and UD, and the headers that each one has | IBA 1.4, 9.2.1, table 38 |
//! | [`bth`] | base transport header | 9.2 |
//! | [`ext`] | RETH, AETH, AtomicETH, AtomicAckETH, ImmDt, IETH, DETH | 9.3 |
//! | [`packet`] | BTH .. extended headers .. payload .. pad .. ICRC | 9.1, A17 |
//! | [`grh`] | the 40 bytes in front of what a UD receiver gets | 8.3, A17.4.1.6 |
//! | [`ip`], [`udp`], [`ethernet`] | what RoCEv2 travels in | RFC 791, 8200, 768 |
//!
//! Multi-byte fields are big-endian, the ICRC little-endian. After a view's `new_checked` has succeeded no accessor panics.

pub mod bth;
pub mod ethernet;
pub mod ext;
pub mod grh;
pub mod ip;
pub mod opcode;
pub mod packet;
pub mod udp;

pub use bth::Bth;
pub use ext::{Aeth, AtomicEth, Deth, Extension, NakCode, Reth, Syndrome};
pub use opcode::{Layout, Opcode, Operation, Position, Service, Suffix};
pub use packet::{ICRC_LEN, Packet, Repr};

/// Bytes of the largest transport packet: the longest headers, a payload of the largest path MTU, no pad (it is a multiple of
/// four), ICRC.
pub const MAX_PACKET_LEN: usize = bth::LEN + ext::MAX_LEN + 4096 + ICRC_LEN;

/// Why bytes are no packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParseError {
    /// Fewer bytes than the header, or the packet that the header describes, has.
    #[error("{what} needs {need} bytes and has {have}")]
    Truncated {
        /// Which format.
        what: &'static str,
        /// Bytes needed.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// An opcode that is reserved, or of a transport that is not spoken here (RD, XRC).
    #[error("opcode {0:#04x} is reserved or of no transport that is spoken here")]
    Opcode(u8),
    /// A transport header version other than 0 (IBA 1.4, 9.6.1.1.1: to be dropped in silence).
    #[error("transport header version {0} (only 0 exists)")]
    TransportVersion(u8),
    /// BTH to ICRC is not a multiple of four bytes.
    #[error("{0} bytes from BTH to ICRC are not a multiple of 4")]
    Unaligned(usize),
    /// The pad count exceeds what the payload has.
    #[error("pad count {pad} exceeds the {have} bytes behind the headers")]
    Pad {
        /// From the BTH.
        pad: usize,
        /// Bytes between headers and ICRC.
        have: usize,
    },
    /// Bytes behind the headers of an opcode that carries no payload.
    #[error("{opcode:?} carries no payload, and there are {excess} bytes of it")]
    Excess {
        /// The opcode.
        opcode: Opcode,
        /// Bytes between headers and ICRC.
        excess: usize,
    },
    /// A version field that is not the format's.
    #[error("{what} says version {version}")]
    Version {
        /// Which format.
        what: &'static str,
        /// Found.
        version: u8,
    },
    /// A length field that contradicts the bytes.
    #[error("{what} says {says} bytes and there are {have}")]
    Length {
        /// Which format.
        what: &'static str,
        /// From the header.
        says: usize,
        /// Bytes there are.
        have: usize,
    },
    /// A fragment of an IP packet: RoCEv2 packets are never fragmented (A17).
    #[error("a fragment of an IP packet")]
    Fragment,
    /// The IPv4 header's checksum is wrong.
    #[error("wrong IPv4 header checksum")]
    IpChecksum,
    /// IP carries something other than UDP.
    #[error("IP protocol {0} is not UDP")]
    Protocol(u8),
    /// A field has a value that the format does not permit.
    #[error("{what} cannot be {value}")]
    Value {
        /// Which field.
        what: &'static str,
        /// Found.
        value: u32,
    },
}

/// Result of parsing.
pub type Result<T> = core::result::Result<T, ParseError>;

/// Fails if `bytes` has fewer than `need` bytes.
#[inline]
pub(crate) fn need(bytes: &[u8], need: usize, what: &'static str) -> Result<()> {
    if bytes.len() < need {
        return Err(ParseError::Truncated {
            what,
            need,
            have: bytes.len(),
        });
    }
    Ok(())
}

#[inline]
pub(crate) fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

#[inline]
pub(crate) fn be24(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([0, b[at], b[at + 1], b[at + 2]])
}

#[inline]
pub(crate) fn be32(b: &[u8], at: usize) -> u32 {
    let mut a = [0; 4];
    a.copy_from_slice(&b[at..at + 4]);
    u32::from_be_bytes(a)
}

#[inline]
pub(crate) fn be64(b: &[u8], at: usize) -> u64 {
    let mut a = [0; 8];
    a.copy_from_slice(&b[at..at + 8]);
    u64::from_be_bytes(a)
}

#[inline]
pub(crate) fn array<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut a = [0; N];
    a.copy_from_slice(&b[at..at + N]);
    a
}

#[inline]
pub(crate) fn put16(b: &mut [u8], at: usize, v: u16) {
    b[at..at + 2].copy_from_slice(&v.to_be_bytes());
}

/// The low 24 bits of `v`.
#[inline]
pub(crate) fn put24(b: &mut [u8], at: usize, v: u32) {
    b[at..at + 3].copy_from_slice(&v.to_be_bytes()[1..]);
}

#[inline]
pub(crate) fn put32(b: &mut [u8], at: usize, v: u32) {
    b[at..at + 4].copy_from_slice(&v.to_be_bytes());
}

#[inline]
pub(crate) fn put64(b: &mut [u8], at: usize, v: u64) {
    b[at..at + 8].copy_from_slice(&v.to_be_bytes());
}
