//! Opcodes of RC, UC and UD (IBA 1.4, table 38), with the headers that each one has.

use super::{bth, ext};

/// Transport service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Service {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
    /// Unreliable datagram.
    Ud,
    /// Congestion notification (A17.9): of no QP's service.
    Cnp,
}

/// What a packet is part of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Operation {
    /// SEND.
    Send,
    /// RDMA WRITE.
    Write,
    /// RDMA READ request.
    ReadRequest,
    /// RDMA READ response.
    ReadResponse,
    /// Acknowledge: ACK, NAK and RNR NAK.
    Acknowledge,
    /// Answer to an atomic.
    AtomicAcknowledge,
    /// Atomic compare and swap.
    CompareSwap,
    /// Atomic fetch and add.
    FetchAdd,
    /// Congestion notification.
    Cnp,
}

/// Where in its message a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Position {
    /// First of several.
    First,
    /// Neither first nor last.
    Middle,
    /// Last of several.
    Last,
    /// The whole message.
    Only,
}

impl Position {
    /// Whether a message begins here.
    #[inline]
    pub const fn begins(self) -> bool {
        matches!(self, Position::First | Position::Only)
    }

    /// Whether a message ends here.
    #[inline]
    pub const fn ends(self) -> bool {
        matches!(self, Position::Last | Position::Only)
    }
}

/// What the last packet of a message carries besides.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Suffix {
    /// Nothing.
    None,
    /// Immediate data.
    Imm,
    /// An R_Key to invalidate.
    Invalidate,
}

/// Which extended headers follow the BTH, in their order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Layout {
    /// None.
    None,
    /// ImmDt.
    Imm,
    /// IETH.
    Ieth,
    /// RETH.
    Reth,
    /// RETH, ImmDt.
    RethImm,
    /// AETH.
    Aeth,
    /// AETH, AtomicAckETH.
    AethAtomicAck,
    /// AtomicETH.
    Atomic,
    /// DETH.
    Deth,
    /// DETH, ImmDt.
    DethImm,
}

impl Layout {
    /// Bytes of these headers.
    #[inline]
    pub const fn len(self) -> usize {
        match self {
            Layout::None => 0,
            Layout::Imm | Layout::Ieth => ext::IMM_LEN,
            Layout::Reth => ext::RETH_LEN,
            Layout::RethImm => ext::RETH_LEN + ext::IMM_LEN,
            Layout::Aeth => ext::AETH_LEN,
            Layout::AethAtomicAck => ext::AETH_LEN + ext::ATOMIC_ACK_LEN,
            Layout::Atomic => ext::ATOMIC_LEN,
            Layout::Deth => ext::DETH_LEN,
            Layout::DethImm => ext::DETH_LEN + ext::IMM_LEN,
        }
    }

    /// Whether there are none.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// What there is to know about an opcode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Info {
    /// The opcode itself.
    pub opcode: Opcode,
    /// Transport service.
    pub service: Service,
    /// What it is part of.
    pub operation: Operation,
    /// Where in its message.
    pub position: Position,
    /// What it carries besides.
    pub suffix: Suffix,
    /// Extended headers.
    pub layout: Layout,
    /// Whether bytes of payload may follow the headers.
    pub payload: bool,
    /// Bytes of BTH and extended headers.
    pub header_len: usize,
}

macro_rules! opcodes {
    ($($name:ident = $value:literal, $text:literal, $service:ident $operation:ident $position:ident $suffix:ident $layout:ident $payload:literal;)*) => {
        /// An opcode (BTH byte 0) of a transport that is spoken here.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
        #[repr(u8)]
        pub enum Opcode {
            $(#[doc = $text] $name = $value,)*
        }

        const TABLE: [Option<Info>; 256] = {
            let mut table = [None; 256];
            $(table[$value] = Some(Info {
                opcode: Opcode::$name,
                service: Service::$service,
                operation: Operation::$operation,
                position: Position::$position,
                suffix: Suffix::$suffix,
                layout: Layout::$layout,
                payload: $payload,
                header_len: bth::LEN + Layout::$layout.len(),
            });)*
            table
        };

        impl Opcode {
            /// All of them, in order of their values.
            pub const ALL: &'static [Opcode] = &[$(Opcode::$name),*];

            /// The specification's name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Opcode::$name => $text,)*
                }
            }
        }
    };
}

opcodes! {
    RcSendFirst = 0x00, "RC SEND First", Rc Send First None None true;
    RcSendMiddle = 0x01, "RC SEND Middle", Rc Send Middle None None true;
    RcSendLast = 0x02, "RC SEND Last", Rc Send Last None None true;
    RcSendLastImm = 0x03, "RC SEND Last with Immediate", Rc Send Last Imm Imm true;
    RcSendOnly = 0x04, "RC SEND Only", Rc Send Only None None true;
    RcSendOnlyImm = 0x05, "RC SEND Only with Immediate", Rc Send Only Imm Imm true;
    RcWriteFirst = 0x06, "RC RDMA WRITE First", Rc Write First None Reth true;
    RcWriteMiddle = 0x07, "RC RDMA WRITE Middle", Rc Write Middle None None true;
    RcWriteLast = 0x08, "RC RDMA WRITE Last", Rc Write Last None None true;
    RcWriteLastImm = 0x09, "RC RDMA WRITE Last with Immediate", Rc Write Last Imm Imm true;
    RcWriteOnly = 0x0a, "RC RDMA WRITE Only", Rc Write Only None Reth true;
    RcWriteOnlyImm = 0x0b, "RC RDMA WRITE Only with Immediate", Rc Write Only Imm RethImm true;
    RcReadRequest = 0x0c, "RC RDMA READ Request", Rc ReadRequest Only None Reth false;
    RcReadResponseFirst = 0x0d, "RC RDMA READ Response First", Rc ReadResponse First None Aeth true;
    RcReadResponseMiddle = 0x0e, "RC RDMA READ Response Middle", Rc ReadResponse Middle None None true;
    RcReadResponseLast = 0x0f, "RC RDMA READ Response Last", Rc ReadResponse Last None Aeth true;
    RcReadResponseOnly = 0x10, "RC RDMA READ Response Only", Rc ReadResponse Only None Aeth true;
    RcAcknowledge = 0x11, "RC Acknowledge", Rc Acknowledge Only None Aeth false;
    RcAtomicAcknowledge = 0x12, "RC ATOMIC Acknowledge", Rc AtomicAcknowledge Only None AethAtomicAck false;
    RcCompareSwap = 0x13, "RC CmpSwap", Rc CompareSwap Only None Atomic false;
    RcFetchAdd = 0x14, "RC FetchAdd", Rc FetchAdd Only None Atomic false;
    RcSendLastInvalidate = 0x16, "RC SEND Last with Invalidate", Rc Send Last Invalidate Ieth true;
    RcSendOnlyInvalidate = 0x17, "RC SEND Only with Invalidate", Rc Send Only Invalidate Ieth true;
    UcSendFirst = 0x20, "UC SEND First", Uc Send First None None true;
    UcSendMiddle = 0x21, "UC SEND Middle", Uc Send Middle None None true;
    UcSendLast = 0x22, "UC SEND Last", Uc Send Last None None true;
    UcSendLastImm = 0x23, "UC SEND Last with Immediate", Uc Send Last Imm Imm true;
    UcSendOnly = 0x24, "UC SEND Only", Uc Send Only None None true;
    UcSendOnlyImm = 0x25, "UC SEND Only with Immediate", Uc Send Only Imm Imm true;
    UcWriteFirst = 0x26, "UC RDMA WRITE First", Uc Write First None Reth true;
    UcWriteMiddle = 0x27, "UC RDMA WRITE Middle", Uc Write Middle None None true;
    UcWriteLast = 0x28, "UC RDMA WRITE Last", Uc Write Last None None true;
    UcWriteLastImm = 0x29, "UC RDMA WRITE Last with Immediate", Uc Write Last Imm Imm true;
    UcWriteOnly = 0x2a, "UC RDMA WRITE Only", Uc Write Only None Reth true;
    UcWriteOnlyImm = 0x2b, "UC RDMA WRITE Only with Immediate", Uc Write Only Imm RethImm true;
    UdSendOnly = 0x64, "UD SEND Only", Ud Send Only None Deth true;
    UdSendOnlyImm = 0x65, "UD SEND Only with Immediate", Ud Send Only Imm DethImm true;
    Cnp = 0x81, "CNP", Cnp Cnp Only None None true;
}

static INFO: [Option<Info>; 256] = TABLE;

impl Opcode {
    /// What the byte says, if it is an opcode that is spoken here.
    #[inline]
    pub fn info_of(byte: u8) -> Option<&'static Info> {
        INFO[usize::from(byte)].as_ref()
    }

    /// The opcode of a byte.
    #[inline]
    pub fn from_byte(byte: u8) -> Option<Opcode> {
        Opcode::info_of(byte).map(|i| i.opcode)
    }

    /// BTH byte 0.
    #[inline]
    pub const fn byte(self) -> u8 {
        self as u8
    }

    /// What there is to know about it.
    #[inline]
    pub fn info(self) -> &'static Info {
        // The table has an entry for each variant, by the macro that makes both.
        match &INFO[self as usize] {
            Some(info) => info,
            None => unreachable!(),
        }
    }

    /// The opcode of a SEND packet; `None` for combinations that do not exist (a suffix before the end, UC with invalidate, UD
    /// other than whole messages).
    #[inline]
    pub const fn send(service: Service, position: Position, suffix: Suffix) -> Option<Opcode> {
        use Position::{First, Last, Middle, Only};
        Some(match (service, position, suffix) {
            (Service::Rc, First, Suffix::None) => Opcode::RcSendFirst,
            (Service::Rc, Middle, Suffix::None) => Opcode::RcSendMiddle,
            (Service::Rc, Last, Suffix::None) => Opcode::RcSendLast,
            (Service::Rc, Last, Suffix::Imm) => Opcode::RcSendLastImm,
            (Service::Rc, Last, Suffix::Invalidate) => Opcode::RcSendLastInvalidate,
            (Service::Rc, Only, Suffix::None) => Opcode::RcSendOnly,
            (Service::Rc, Only, Suffix::Imm) => Opcode::RcSendOnlyImm,
            (Service::Rc, Only, Suffix::Invalidate) => Opcode::RcSendOnlyInvalidate,
            (Service::Uc, First, Suffix::None) => Opcode::UcSendFirst,
            (Service::Uc, Middle, Suffix::None) => Opcode::UcSendMiddle,
            (Service::Uc, Last, Suffix::None) => Opcode::UcSendLast,
            (Service::Uc, Last, Suffix::Imm) => Opcode::UcSendLastImm,
            (Service::Uc, Only, Suffix::None) => Opcode::UcSendOnly,
            (Service::Uc, Only, Suffix::Imm) => Opcode::UcSendOnlyImm,
            (Service::Ud, Only, Suffix::None) => Opcode::UdSendOnly,
            (Service::Ud, Only, Suffix::Imm) => Opcode::UdSendOnlyImm,
            _ => return None,
        })
    }

    /// The opcode of an RDMA WRITE packet; `None` for combinations that do not exist.
    #[inline]
    pub const fn write(service: Service, position: Position, suffix: Suffix) -> Option<Opcode> {
        use Position::{First, Last, Middle, Only};
        Some(match (service, position, suffix) {
            (Service::Rc, First, Suffix::None) => Opcode::RcWriteFirst,
            (Service::Rc, Middle, Suffix::None) => Opcode::RcWriteMiddle,
            (Service::Rc, Last, Suffix::None) => Opcode::RcWriteLast,
            (Service::Rc, Last, Suffix::Imm) => Opcode::RcWriteLastImm,
            (Service::Rc, Only, Suffix::None) => Opcode::RcWriteOnly,
            (Service::Rc, Only, Suffix::Imm) => Opcode::RcWriteOnlyImm,
            (Service::Uc, First, Suffix::None) => Opcode::UcWriteFirst,
            (Service::Uc, Middle, Suffix::None) => Opcode::UcWriteMiddle,
            (Service::Uc, Last, Suffix::None) => Opcode::UcWriteLast,
            (Service::Uc, Last, Suffix::Imm) => Opcode::UcWriteLastImm,
            (Service::Uc, Only, Suffix::None) => Opcode::UcWriteOnly,
            (Service::Uc, Only, Suffix::Imm) => Opcode::UcWriteOnlyImm,
            _ => return None,
        })
    }

    /// The opcode of an RDMA READ response packet.
    #[inline]
    pub const fn read_response(position: Position) -> Opcode {
        match position {
            Position::First => Opcode::RcReadResponseFirst,
            Position::Middle => Opcode::RcReadResponseMiddle,
            Position::Last => Opcode::RcReadResponseLast,
            Position::Only => Opcode::RcReadResponseOnly,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_each_opcode_and_nothing_else() {
        for byte in 0..=255u8 {
            match Opcode::info_of(byte) {
                Some(info) => {
                    assert_eq!(info.opcode.byte(), byte);
                    assert_eq!(info.opcode.info(), info);
                }
                None => assert!(Opcode::ALL.iter().all(|o| o.byte() != byte)),
            }
        }
        assert_eq!(Opcode::ALL.len(), 23 + 12 + 2 + 1);
    }

    #[test]
    fn parts_lead_back_to_the_opcode() {
        for &opcode in Opcode::ALL {
            let i = opcode.info();
            let made = match i.operation {
                Operation::Send => Opcode::send(i.service, i.position, i.suffix),
                Operation::Write => Opcode::write(i.service, i.position, i.suffix),
                Operation::ReadResponse => Some(Opcode::read_response(i.position)),
                _ => continue,
            };
            assert_eq!(made, Some(opcode));
        }
    }
}
