//! Management datagrams of connection management: what two CMs say to each other over QP1 (IBA 1.4, 13.4 and chapter 12).
//!
//! A MAD has 256 bytes: a header of 24 and 232 of a [`Message`], which ends in private data. [`rdma_cm`] is what RDMA CM puts in front of a
//! user's private data (annex A11). All parsed forms own their bytes; none of them allocates.

mod cm;
pub mod rdma_cm;

use crate::wire::{ParseError, Result, be16, be32, be64, put16, put32, put64};

pub use cm::{
    Drep, Dreq, Mra, Path, Rej, RejectReason, Rejected, Rep, Req, Rtu, SidrRep, SidrReq,
    SidrStatus, TransportType,
};

/// Bytes of a MAD.
pub const LEN: usize = 256;
/// Bytes of the header that all MADs have.
pub const HEADER_LEN: usize = 24;
/// Bytes behind it.
pub const DATA_LEN: usize = LEN - HEADER_LEN;

/// Management class of communication management.
pub const CLASS_CM: u8 = 0x07;
/// Its version.
pub const CLASS_VERSION_CM: u8 = 2;
/// Version of the header.
pub const BASE_VERSION: u8 = 1;
/// Method `Send`: the only one of CM messages.
pub const METHOD_SEND: u8 = 0x03;

/// The queue pair of the general services interface.
pub const GSI_QPN: u32 = 1;
/// The Q_Key of QP1 (10.2.5).
pub const GSI_QKEY: u32 = 0x8001_0000;

mod field {
    pub const BASE_VERSION: usize = 0;
    pub const CLASS: usize = 1;
    pub const CLASS_VERSION: usize = 2;
    pub const METHOD: usize = 3;
    pub const STATUS: usize = 4;
    pub const CLASS_SPECIFIC: usize = 6;
    pub const TRANSACTION: usize = 8;
    pub const ATTRIBUTE: usize = 16;
    pub const MODIFIER: usize = 20;
}

/// Attribute identifiers of class CM (16.7.2).
pub mod attribute {
    /// ConnectRequest.
    pub const REQ: u16 = 0x0010;
    /// MsgRcptAck.
    pub const MRA: u16 = 0x0011;
    /// ConnectReject.
    pub const REJ: u16 = 0x0012;
    /// ConnectReply.
    pub const REP: u16 = 0x0013;
    /// ReadyToUse.
    pub const RTU: u16 = 0x0014;
    /// DisconnectRequest.
    pub const DREQ: u16 = 0x0015;
    /// DisconnectReply.
    pub const DREP: u16 = 0x0016;
    /// ServiceIDResReq.
    pub const SIDR_REQ: u16 = 0x0017;
    /// ServiceIDResReqResp.
    pub const SIDR_REP: u16 = 0x0018;
}

/// What a MAD of class CM carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    /// Asks for a connection.
    Req(Req),
    /// Asks for patience.
    Mra(Mra),
    /// Refuses.
    Rej(Rej),
    /// Accepts.
    Rep(Rep),
    /// Confirms: ready to use.
    Rtu(Rtu),
    /// Asks for the connection's end.
    Dreq(Dreq),
    /// Confirms its end.
    Drep(Drep),
    /// Asks for a datagram queue pair.
    SidrReq(SidrReq),
    /// Names one, or refuses.
    SidrRep(SidrRep),
    /// Any other attribute (LAP, APR, ClassPortInfo), as it is.
    Other {
        /// Attribute identifier.
        attribute: u16,
        /// All bytes behind the header.
        data: [u8; DATA_LEN],
    },
}

impl Message {
    /// Attribute identifier.
    pub const fn attribute(&self) -> u16 {
        match self {
            Message::Req(_) => attribute::REQ,
            Message::Mra(_) => attribute::MRA,
            Message::Rej(_) => attribute::REJ,
            Message::Rep(_) => attribute::REP,
            Message::Rtu(_) => attribute::RTU,
            Message::Dreq(_) => attribute::DREQ,
            Message::Drep(_) => attribute::DREP,
            Message::SidrReq(_) => attribute::SIDR_REQ,
            Message::SidrRep(_) => attribute::SIDR_REP,
            Message::Other { attribute, .. } => *attribute,
        }
    }

    /// The specification's short name, for logs.
    pub const fn name(&self) -> &'static str {
        match self {
            Message::Req(_) => "REQ",
            Message::Mra(_) => "MRA",
            Message::Rej(_) => "REJ",
            Message::Rep(_) => "REP",
            Message::Rtu(_) => "RTU",
            Message::Dreq(_) => "DREQ",
            Message::Drep(_) => "DREP",
            Message::SidrReq(_) => "SIDR_REQ",
            Message::SidrRep(_) => "SIDR_REP",
            Message::Other { .. } => "other",
        }
    }
}

/// A MAD of class CM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mad {
    /// Method; CM knows only [`METHOD_SEND`].
    pub method: u8,
    /// Status; 0 in CM messages.
    pub status: u16,
    /// Class specific; 0 in CM messages.
    pub class_specific: u16,
    /// Ties a request to its answers.
    pub transaction: u64,
    /// Attribute modifier; 0 in CM messages.
    pub modifier: u32,
    /// What it says.
    pub message: Message,
}

impl Mad {
    /// A CM message as CMs send it.
    pub const fn new(transaction: u64, message: Message) -> Mad {
        Mad {
            method: METHOD_SEND,
            status: 0,
            class_specific: 0,
            transaction,
            modifier: 0,
            message,
        }
    }

    /// Parses the payload of a datagram to QP1: exactly [`LEN`] bytes, of class CM.
    pub fn parse(bytes: &[u8]) -> Result<Mad> {
        if bytes.len() != LEN {
            return Err(ParseError::Length {
                what: "MAD",
                says: LEN,
                have: bytes.len(),
            });
        }
        for (what, at, want) in [
            ("MAD base", field::BASE_VERSION, BASE_VERSION),
            ("MAD class", field::CLASS_VERSION, CLASS_VERSION_CM),
        ] {
            if at == field::CLASS_VERSION && bytes[field::CLASS] != CLASS_CM {
                return Err(ParseError::Value {
                    what: "management class of a CM message",
                    value: u32::from(bytes[field::CLASS]),
                });
            }
            if bytes[at] != want {
                return Err(ParseError::Version {
                    what,
                    version: bytes[at],
                });
            }
        }
        let data = &bytes[HEADER_LEN..];
        let message = match be16(bytes, field::ATTRIBUTE) {
            attribute::REQ => Message::Req(Req::read(data)),
            attribute::MRA => Message::Mra(Mra::read(data)),
            attribute::REJ => Message::Rej(Rej::read(data)),
            attribute::REP => Message::Rep(Rep::read(data)),
            attribute::RTU => Message::Rtu(Rtu::read(data)),
            attribute::DREQ => Message::Dreq(Dreq::read(data)),
            attribute::DREP => Message::Drep(Drep::read(data)),
            attribute::SIDR_REQ => Message::SidrReq(SidrReq::read(data)),
            attribute::SIDR_REP => Message::SidrRep(SidrRep::read(data)),
            attribute => Message::Other {
                attribute,
                data: crate::wire::array(data, 0),
            },
        };
        Ok(Mad {
            method: bytes[field::METHOD],
            status: be16(bytes, field::STATUS),
            class_specific: be16(bytes, field::CLASS_SPECIFIC),
            transaction: be64(bytes, field::TRANSACTION),
            modifier: be32(bytes, field::MODIFIER),
            message,
        })
    }

    /// Writes it; reserved bits are 0.
    pub fn emit(&self, bytes: &mut [u8; LEN]) {
        let b = &mut bytes[..];
        b.fill(0);
        b[field::BASE_VERSION] = BASE_VERSION;
        b[field::CLASS] = CLASS_CM;
        b[field::CLASS_VERSION] = CLASS_VERSION_CM;
        b[field::METHOD] = self.method;
        put16(b, field::STATUS, self.status);
        put16(b, field::CLASS_SPECIFIC, self.class_specific);
        put64(b, field::TRANSACTION, self.transaction);
        put16(b, field::ATTRIBUTE, self.message.attribute());
        put32(b, field::MODIFIER, self.modifier);
        let data = &mut b[HEADER_LEN..];
        match &self.message {
            Message::Req(m) => m.write(data),
            Message::Mra(m) => m.write(data),
            Message::Rej(m) => m.write(data),
            Message::Rep(m) => m.write(data),
            Message::Rtu(m) => m.write(data),
            Message::Dreq(m) => m.write(data),
            Message::Drep(m) => m.write(data),
            Message::SidrReq(m) => m.write(data),
            Message::SidrRep(m) => m.write(data),
            Message::Other { data: d, .. } => data.copy_from_slice(d),
        }
    }

    /// Its bytes.
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        self.emit(&mut bytes);
        bytes
    }
}
