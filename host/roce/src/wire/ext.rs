//! Extended transport headers (IBA 1.4, 9.3).

use super::{Layout, Result, be24, be32, be64, need, put24, put32, put64};

/// Bytes of a RETH.
pub const RETH_LEN: usize = 16;
/// Bytes of an AETH.
pub const AETH_LEN: usize = 4;
/// Bytes of an AtomicETH.
pub const ATOMIC_LEN: usize = 28;
/// Bytes of an AtomicAckETH.
pub const ATOMIC_ACK_LEN: usize = 8;
/// Bytes of an ImmDt, and of an IETH.
pub const IMM_LEN: usize = 4;
/// Bytes of a DETH.
pub const DETH_LEN: usize = 8;
/// Bytes of the longest set of extended headers: AtomicETH.
pub const MAX_LEN: usize = ATOMIC_LEN;

/// RDMA extended transport header (9.3.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Reth {
    /// Virtual address at the responder.
    pub address: u64,
    /// Its key.
    pub rkey: u32,
    /// Bytes of the whole message.
    pub dma_len: u32,
}

impl Reth {
    fn read(b: &[u8]) -> Reth {
        Reth {
            address: be64(b, 0),
            rkey: be32(b, 8),
            dma_len: be32(b, 12),
        }
    }

    fn write(&self, b: &mut [u8]) {
        put64(b, 0, self.address);
        put32(b, 8, self.rkey);
        put32(b, 12, self.dma_len);
    }
}

/// What kind of negative acknowledgement (9.7.5.2, table 45: NAK codes).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum NakCode {
    /// A packet is missing; the PSN in the BTH is the one that is expected.
    PsnSequence = 0,
    /// The responder cannot do this: length, opcode sequence, resources.
    InvalidRequest = 1,
    /// Key, range or permission.
    RemoteAccess = 2,
    /// The responder failed by itself.
    RemoteOperational = 3,
    /// RD only.
    InvalidRd = 4,
}

impl NakCode {
    /// From the low five bits of a NAK's syndrome.
    #[inline]
    pub const fn from_code(code: u8) -> Option<NakCode> {
        Some(match code {
            0 => NakCode::PsnSequence,
            1 => NakCode::InvalidRequest,
            2 => NakCode::RemoteAccess,
            3 => NakCode::RemoteOperational,
            4 => NakCode::InvalidRd,
            _ => return None,
        })
    }
}

/// The syndrome of an AETH (9.7.5.2, table 44).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Syndrome {
    /// Positive, with an encoded credit count, 5 bits; 31 says that credits are not used.
    Ack {
        /// Encoded (table 46).
        credits: u8,
    },
    /// Receiver not ready, with how long to wait, 5 bits encoded (table 45).
    RnrNak {
        /// Encoded.
        timer: u8,
    },
    /// Negative.
    Nak(NakCode),
    /// Any other value, as it is.
    Reserved(u8),
}

impl Syndrome {
    /// Positive, without credits: what Linux sends.
    pub const ACK: Syndrome = Syndrome::Ack { credits: 31 };

    /// From the byte.
    #[inline]
    pub const fn from_byte(byte: u8) -> Syndrome {
        let low = byte & 0x1f;
        match byte >> 5 {
            0 => Syndrome::Ack { credits: low },
            1 => Syndrome::RnrNak { timer: low },
            3 => match NakCode::from_code(low) {
                Some(code) => Syndrome::Nak(code),
                None => Syndrome::Reserved(byte),
            },
            _ => Syndrome::Reserved(byte),
        }
    }

    /// To the byte.
    #[inline]
    pub const fn byte(self) -> u8 {
        match self {
            Syndrome::Ack { credits } => credits & 0x1f,
            Syndrome::RnrNak { timer } => 0x20 | timer & 0x1f,
            Syndrome::Nak(code) => 0x60 | code as u8,
            Syndrome::Reserved(byte) => byte,
        }
    }
}

/// Acknowledge extended transport header (9.3.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Aeth {
    /// What kind of answer.
    pub syndrome: Syndrome,
    /// Message sequence number, 24 bits: messages that the responder has completed.
    pub msn: u32,
}

impl Aeth {
    fn read(b: &[u8]) -> Aeth {
        Aeth {
            syndrome: Syndrome::from_byte(b[0]),
            msn: be24(b, 1),
        }
    }

    fn write(&self, b: &mut [u8]) {
        b[0] = self.syndrome.byte();
        put24(b, 1, self.msn);
    }
}

/// Atomic extended transport header (9.3.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct AtomicEth {
    /// Virtual address at the responder, a multiple of 8.
    pub address: u64,
    /// Its key.
    pub rkey: u32,
    /// CmpSwap: the new value. FetchAdd: what to add.
    pub swap_add: u64,
    /// CmpSwap: the value that must be there. FetchAdd: ignored.
    pub compare: u64,
}

impl AtomicEth {
    fn read(b: &[u8]) -> AtomicEth {
        AtomicEth {
            address: be64(b, 0),
            rkey: be32(b, 8),
            swap_add: be64(b, 12),
            compare: be64(b, 20),
        }
    }

    fn write(&self, b: &mut [u8]) {
        put64(b, 0, self.address);
        put32(b, 8, self.rkey);
        put64(b, 12, self.swap_add);
        put64(b, 20, self.compare);
    }
}

/// Datagram extended transport header (9.3.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Deth {
    /// Must equal the receiving queue pair's.
    pub qkey: u32,
    /// Reserved byte, kept.
    pub reserved: u8,
    /// Sender's queue pair, 24 bits.
    pub src_qpn: u32,
}

impl Deth {
    fn read(b: &[u8]) -> Deth {
        Deth {
            qkey: be32(b, 0),
            reserved: b[4],
            src_qpn: be24(b, 5),
        }
    }

    fn write(&self, b: &mut [u8]) {
        put32(b, 0, self.qkey);
        b[4] = self.reserved;
        put24(b, 5, self.src_qpn);
    }
}

/// The extended headers of a packet: one variant for each [`Layout`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Extension {
    /// None.
    None,
    /// Immediate data, in host order.
    Imm(u32),
    /// R_Key to invalidate.
    Ieth(u32),
    /// RETH.
    Reth(Reth),
    /// RETH and immediate data.
    RethImm(Reth, u32),
    /// AETH.
    Aeth(Aeth),
    /// AETH, and the value that was there before.
    AethAtomicAck(Aeth, u64),
    /// AtomicETH.
    Atomic(AtomicEth),
    /// DETH.
    Deth(Deth),
    /// DETH and immediate data.
    DethImm(Deth, u32),
}

impl Extension {
    /// Which headers these are.
    #[inline]
    pub const fn layout(&self) -> Layout {
        match self {
            Extension::None => Layout::None,
            Extension::Imm(_) => Layout::Imm,
            Extension::Ieth(_) => Layout::Ieth,
            Extension::Reth(_) => Layout::Reth,
            Extension::RethImm(..) => Layout::RethImm,
            Extension::Aeth(_) => Layout::Aeth,
            Extension::AethAtomicAck(..) => Layout::AethAtomicAck,
            Extension::Atomic(_) => Layout::Atomic,
            Extension::Deth(_) => Layout::Deth,
            Extension::DethImm(..) => Layout::DethImm,
        }
    }

    /// Parses the bytes behind the BTH.
    #[inline]
    pub fn parse(layout: Layout, bytes: &[u8]) -> Result<Extension> {
        need(bytes, layout.len(), "extended headers")?;
        let b = bytes;
        Ok(match layout {
            Layout::None => Extension::None,
            Layout::Imm => Extension::Imm(be32(b, 0)),
            Layout::Ieth => Extension::Ieth(be32(b, 0)),
            Layout::Reth => Extension::Reth(Reth::read(b)),
            Layout::RethImm => Extension::RethImm(Reth::read(b), be32(b, RETH_LEN)),
            Layout::Aeth => Extension::Aeth(Aeth::read(b)),
            Layout::AethAtomicAck => Extension::AethAtomicAck(Aeth::read(b), be64(b, AETH_LEN)),
            Layout::Atomic => Extension::Atomic(AtomicEth::read(b)),
            Layout::Deth => Extension::Deth(Deth::read(b)),
            Layout::DethImm => Extension::DethImm(Deth::read(b), be32(b, DETH_LEN)),
        })
    }

    /// Writes them; `bytes` has room for `self.layout().len()`.
    #[inline]
    pub fn emit(&self, b: &mut [u8]) {
        match self {
            Extension::None => {}
            Extension::Imm(v) | Extension::Ieth(v) => put32(b, 0, *v),
            Extension::Reth(reth) => reth.write(b),
            Extension::RethImm(reth, imm) => {
                reth.write(b);
                put32(b, RETH_LEN, *imm);
            }
            Extension::Aeth(aeth) => aeth.write(b),
            Extension::AethAtomicAck(aeth, original) => {
                aeth.write(b);
                put64(b, AETH_LEN, *original);
            }
            Extension::Atomic(atomic) => atomic.write(b),
            Extension::Deth(deth) => deth.write(b),
            Extension::DethImm(deth, imm) => {
                deth.write(b);
                put32(b, DETH_LEN, *imm);
            }
        }
    }

    /// The RETH, if there is one.
    #[inline]
    pub const fn reth(&self) -> Option<&Reth> {
        match self {
            Extension::Reth(reth) | Extension::RethImm(reth, _) => Some(reth),
            _ => None,
        }
    }

    /// The AETH, if there is one.
    #[inline]
    pub const fn aeth(&self) -> Option<&Aeth> {
        match self {
            Extension::Aeth(aeth) | Extension::AethAtomicAck(aeth, _) => Some(aeth),
            _ => None,
        }
    }

    /// The DETH, if there is one.
    #[inline]
    pub const fn deth(&self) -> Option<&Deth> {
        match self {
            Extension::Deth(deth) | Extension::DethImm(deth, _) => Some(deth),
            _ => None,
        }
    }

    /// The immediate data, if there are any.
    #[inline]
    pub const fn imm(&self) -> Option<u32> {
        match self {
            Extension::Imm(imm) | Extension::RethImm(_, imm) | Extension::DethImm(_, imm) => {
                Some(*imm)
            }
            _ => None,
        }
    }
}
