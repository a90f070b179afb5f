//! Base transport header (IBA 1.4, 9.2): the first 12 bytes of every packet.

use super::{Opcode, ParseError, Result, be16, be24, need, put16, put24};

/// Bytes of a BTH.
pub const LEN: usize = 12;
/// The partition that every port is a full member of.
pub const DEFAULT_PKEY: u16 = 0xffff;
/// Bits of a QPN, a PSN, an MSN.
pub const MASK: u32 = 0x00ff_ffff;
/// Where the byte lies that the ICRC takes as ones: FECN, BECN and six reserved bits.
pub const MASKED_BYTE: usize = field::RESV8A;

mod field {
    use core::ops::Range;

    pub const OPCODE: usize = 0;
    pub const FLAGS: usize = 1;
    pub const PKEY: Range<usize> = 2..4;
    pub const RESV8A: usize = 4;
    pub const DEST_QP: Range<usize> = 5..8;
    pub const ACK_REQ: usize = 8;
    pub const PSN: Range<usize> = 9..12;
}

/// A parsed BTH. Reserved bits are kept, so that it is emitted to the bytes it came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Bth {
    /// What the packet is.
    pub opcode: Opcode,
    /// Solicited event: the receiver wants to be woken.
    pub solicited: bool,
    /// Migration state is `Migrated`; Linux rxe sends 0, others 1.
    pub migreq: bool,
    /// Bytes of pad behind the payload, 0 to 3.
    pub pad: u8,
    /// Partition key.
    pub pkey: u16,
    /// Forward explicit congestion notification. Not under the ICRC.
    pub fecn: bool,
    /// Backward explicit congestion notification. Not under the ICRC.
    pub becn: bool,
    /// Reserved, 6 bits. Not under the ICRC.
    pub reserved6: u8,
    /// Destination queue pair number, 24 bits.
    pub dest_qpn: u32,
    /// The responder is to acknowledge this packet.
    pub ack_req: bool,
    /// Reserved, 7 bits.
    pub reserved7: u8,
    /// Packet sequence number, 24 bits.
    pub psn: u32,
}

impl Bth {
    /// A header with the default partition, no pad and no flag set.
    #[inline]
    pub const fn new(opcode: Opcode, dest_qpn: u32, psn: u32) -> Bth {
        Bth {
            opcode,
            solicited: false,
            migreq: false,
            pad: 0,
            pkey: DEFAULT_PKEY,
            fecn: false,
            becn: false,
            reserved6: 0,
            dest_qpn: dest_qpn & MASK,
            ack_req: false,
            reserved7: 0,
            psn: psn & MASK,
        }
    }

    /// Parses the first [`LEN`] bytes.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Bth> {
        need(bytes, LEN, "BTH")?;
        let opcode = Opcode::from_byte(bytes[field::OPCODE])
            .ok_or(ParseError::Opcode(bytes[field::OPCODE]))?;
        Bth::read(bytes, opcode)
    }

    /// The fields behind the opcode; the bytes are there.
    #[inline]
    pub(super) fn read(bytes: &[u8], opcode: Opcode) -> Result<Bth> {
        let b = &bytes[..LEN];
        let flags = b[field::FLAGS];
        if flags & 0x0f != 0 {
            return Err(ParseError::TransportVersion(flags & 0x0f));
        }
        let resv8a = b[field::RESV8A];
        let ack = b[field::ACK_REQ];
        Ok(Bth {
            opcode,
            solicited: flags & 0x80 != 0,
            migreq: flags & 0x40 != 0,
            pad: flags >> 4 & 3,
            pkey: be16(b, field::PKEY.start),
            fecn: resv8a & 0x80 != 0,
            becn: resv8a & 0x40 != 0,
            reserved6: resv8a & 0x3f,
            dest_qpn: be24(b, field::DEST_QP.start),
            ack_req: ack & 0x80 != 0,
            reserved7: ack & 0x7f,
            psn: be24(b, field::PSN.start),
        })
    }

    /// Writes the first [`LEN`] bytes. Fields keep to their bits: what is beyond is cut off.
    #[inline]
    pub fn emit(&self, bytes: &mut [u8]) {
        let b = &mut bytes[..LEN];
        b[field::OPCODE] = self.opcode.byte();
        b[field::FLAGS] =
            u8::from(self.solicited) << 7 | u8::from(self.migreq) << 6 | (self.pad & 3) << 4;
        put16(b, field::PKEY.start, self.pkey);
        b[field::RESV8A] =
            u8::from(self.fecn) << 7 | u8::from(self.becn) << 6 | self.reserved6 & 0x3f;
        put24(b, field::DEST_QP.start, self.dest_qpn);
        b[field::ACK_REQ] = u8::from(self.ack_req) << 7 | self.reserved7 & 0x7f;
        put24(b, field::PSN.start, self.psn);
    }
}
