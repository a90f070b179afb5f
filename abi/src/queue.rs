//! Work-queue and completion-queue entries: words in the user's RAM.
//!
//! All rings are powers of two, aligned to 64 bytes. An entry is valid when its last word's low half
//! holds the *sequence number* of its position: `index + 1` modulo 2^32, where `index` counts slots since
//! the queue was made. The word is stored last (release) and is the doorbell; there is no producer index.
//! Memory starts zeroed, and slot `i` never holds its next sequence number by accident, because extension
//! slots are stamped too.
//!
//! # Send queue: slots of 64 bytes (8 words)
//!
//! | word | head slot | atomic | UD |
//! | --- | --- | --- | --- |
//! | 0 | opcode, flags, number of SGEs, number of slots (8 bits each), then immediate or invalidated rkey | | |
//! | 1 | `wr_id` | | |
//! | 2 | remote address | remote address | address handle, then remote QPN |
//! | 3 | rkey, then inline length | rkey, 0 | Q_Key, then inline length |
//! | 4, 5 | first SGE: address; lkey, then length | the same | the same |
//! | 6 | 0 | swap or addend | 0 |
//! | 7 | sequence number, 0 | | |
//!
//! LOCAL_INV and SEND_INV have the key to invalidate in word 0's high half. BIND_MW has there the window's new key (the old
//! one's index, another low byte), the new [`crate::types::Access`] in word 2, the window's present key in word 3, the first address and the
//! region's lkey in words 4 and 5 (the SGE's length 0), and the length in bytes in word 6; length 0 unbinds.
//!
//! With [`flags::INLINE`], words 4 to 6 hold the first 24 bytes of data. Extension slots carry 7 words (three
//! SGEs in six of them, or 56 bytes of inline data, or the compare operand in word 0) and a stamp in word 7:
//! their own position's sequence number.
//!
//! # Receive queue: slots of a stride of 32, 64, 128 or 256 bytes
//!
//! Word 0 is `wr_id`, then two words per SGE, and in the last word the sequence number, the number of SGEs (bits 32 to 39):
//! `(stride - 16) / 16` at most, and the *tag* (bits 48 to 63). Receives of a shared queue complete in any order and through
//! several completion queues, so their completions name them by the tag, which means nothing to the device.
//!
//! # Completion queue: 64 bytes
//!
//! | word | |
//! | --- | --- |
//! | 0 | `wr_id` |
//! | 1 | status, opcode, flags, syndrome (8 bits each), then QPN |
//! | 2 | byte count, then immediate or invalidated rkey |
//! | 3 to 6 | up to 32 bytes of payload ([`cqe_flags::DATA`]); for UD word 3 is the source QPN and no payload |
//! | 7 | sequence number, then position of the work request in its queue modulo 2^16 (for receives of an SRQ: its tag), QP's doorbell index |
//!
//! A CQ has a control line: word 0 consumer index (how many entries were ever polled, modulo 2^32, published now and
//! then), word 1 the arm word ([`arm`]).

/// Words in a send-queue slot and in a completion-queue entry.
pub const SLOT_WORDS: usize = 8;
/// Bytes in a send-queue slot and in a completion-queue entry.
pub const SLOT_LEN: usize = 64;
/// Inline bytes that the head slot holds.
pub const INLINE_HEAD: usize = 24;
/// Inline bytes that an extension slot holds.
pub const INLINE_EXT: usize = 56;
/// SGEs that an extension slot holds.
pub const SGES_EXT: usize = 3;
/// Slots that one work request may take.
pub const MAX_SLOTS: usize = 8;
/// Inline bytes of one work request at most.
pub const MAX_INLINE: usize = INLINE_HEAD + (MAX_SLOTS - 1) * INLINE_EXT;
/// SGEs of one send work request at most.
pub const MAX_SEND_SGE: usize = 16;
/// SGEs of one receive work request at most.
pub const MAX_RECV_SGE: usize = 15;
/// Payload bytes that a completion can carry.
pub const CQE_DATA: usize = 32;
/// log2 of the largest ring, in slots: positions modulo 2^16 stay unambiguous.
pub const MAX_RING_LOG2: u32 = 15;
/// Receive strides in bytes.
pub const RECV_STRIDES: [u32; 4] = [32, 64, 128, 256];

/// Work-request opcodes, numbered as `enum ibv_wr_opcode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum WrOpcode {
    /// RDMA WRITE.
    Write = 0,
    /// RDMA WRITE with immediate.
    WriteImm = 1,
    /// SEND.
    Send = 2,
    /// SEND with immediate.
    SendImm = 3,
    /// RDMA READ.
    Read = 4,
    /// Compare and swap, 8 bytes.
    CmpSwp = 5,
    /// Fetch and add, 8 bytes.
    FetchAdd = 6,
    /// Invalidate a local key.
    LocalInv = 7,
    /// Bind a memory window.
    BindMw = 8,
    /// SEND with invalidate.
    SendInv = 9,
}

impl WrOpcode {
    /// The opcode a byte stands for, if any.
    #[must_use]
    pub const fn from_u8(v: u8) -> Option<Self> {
        Some(match v {
            0 => Self::Write,
            1 => Self::WriteImm,
            2 => Self::Send,
            3 => Self::SendImm,
            4 => Self::Read,
            5 => Self::CmpSwp,
            6 => Self::FetchAdd,
            7 => Self::LocalInv,
            8 => Self::BindMw,
            9 => Self::SendInv,
            _ => return None,
        })
    }

    /// The opcode of its completion.
    #[must_use]
    pub const fn wc(self) -> WcOpcode {
        match self {
            Self::Write | Self::WriteImm => WcOpcode::Write,
            Self::Send | Self::SendImm | Self::SendInv => WcOpcode::Send,
            Self::Read => WcOpcode::Read,
            Self::CmpSwp => WcOpcode::CmpSwp,
            Self::FetchAdd => WcOpcode::FetchAdd,
            Self::LocalInv => WcOpcode::LocalInv,
            Self::BindMw => WcOpcode::BindMw,
        }
    }
}

/// Send flags (word 0, bits 8 to 15), numbered as `enum ibv_send_flags`.
pub mod flags {
    /// Wait for earlier READs and atomics of this queue.
    pub const FENCE: u8 = 1 << 0;
    /// Write a completion.
    pub const SIGNALED: u8 = 1 << 1;
    /// Raise a solicited event at the receiver.
    pub const SOLICITED: u8 = 1 << 2;
    /// The data is in the slots.
    pub const INLINE: u8 = 1 << 3;
}

/// Completion statuses, numbered as `enum ibv_wc_status`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum WcStatus {
    /// Done.
    Success = 0,
    /// A local buffer is too small, or a message too long.
    LocLenErr = 1,
    /// The work request makes no sense to this QP.
    LocQpOpErr = 2,
    /// A local SGE's key, range or access is wrong.
    LocProtErr = 4,
    /// The QP was in the error state.
    WrFlushErr = 5,
    /// A memory window could not be bound.
    MwBindErr = 6,
    /// The responder answered nonsense.
    BadRespErr = 7,
    /// A protection error on a local buffer during a remote write with immediate.
    LocAccessErr = 8,
    /// The responder saw an invalid request.
    RemInvReqErr = 9,
    /// The responder's key, range or access forbade it.
    RemAccessErr = 10,
    /// The responder could not complete it.
    RemOpErr = 11,
    /// No answer.
    RetryExcErr = 12,
    /// The responder had no receive posted for too long.
    RnrRetryExcErr = 13,
    /// The responder aborted.
    RemAbortErr = 16,
    /// The device failed.
    FatalErr = 19,
    /// Something else.
    GeneralErr = 21,
}

impl WcStatus {
    /// The status a byte stands for; unknown ones are [`WcStatus::GeneralErr`].
    #[must_use]
    pub const fn from_u8(v: u8) -> Self {
        match v {
            0 => Self::Success,
            1 => Self::LocLenErr,
            2 => Self::LocQpOpErr,
            4 => Self::LocProtErr,
            5 => Self::WrFlushErr,
            6 => Self::MwBindErr,
            7 => Self::BadRespErr,
            8 => Self::LocAccessErr,
            9 => Self::RemInvReqErr,
            10 => Self::RemAccessErr,
            11 => Self::RemOpErr,
            12 => Self::RetryExcErr,
            13 => Self::RnrRetryExcErr,
            16 => Self::RemAbortErr,
            19 => Self::FatalErr,
            _ => Self::GeneralErr,
        }
    }
}

/// Completion opcodes, numbered as `enum ibv_wc_opcode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum WcOpcode {
    /// A SEND of any kind.
    Send = 0,
    /// An RDMA WRITE of any kind.
    Write = 1,
    /// An RDMA READ.
    Read = 2,
    /// A compare and swap.
    CmpSwp = 3,
    /// A fetch and add.
    FetchAdd = 4,
    /// A memory-window bind.
    BindMw = 5,
    /// A local invalidate.
    LocalInv = 6,
    /// A receive.
    Recv = 128,
    /// A receive consumed by a WRITE with immediate.
    RecvRdmaWithImm = 129,
}

impl WcOpcode {
    /// The opcode a byte stands for, if any.
    #[must_use]
    pub const fn from_u8(v: u8) -> Option<Self> {
        Some(match v {
            0 => Self::Send,
            1 => Self::Write,
            2 => Self::Read,
            3 => Self::CmpSwp,
            4 => Self::FetchAdd,
            5 => Self::BindMw,
            6 => Self::LocalInv,
            128 => Self::Recv,
            129 => Self::RecvRdmaWithImm,
            _ => return None,
        })
    }
}

/// Flags of a completion (word 1, bits 16 to 23).
pub mod cqe_flags {
    /// A GRH precedes the data (UD); numbered as `enum ibv_wc_flags`.
    pub const GRH: u8 = 1 << 0;
    /// `imm` holds immediate data.
    pub const WITH_IMM: u8 = 1 << 1;
    /// `imm` holds an rkey that was invalidated.
    pub const WITH_INV: u8 = 1 << 3;
    /// Words 3 to 6 hold the payload; the library scatters it to the work request's SGEs.
    pub const DATA: u8 = 1 << 7;
}

/// Values of a CQ's arm word.
pub mod arm {
    /// No event is wanted.
    pub const NONE: u64 = 0;
    /// An event for the next solicited completion or error.
    pub const SOLICITED: u64 = 1;
    /// An event for the next completion.
    pub const ANY: u64 = 2;
}

/// Sequence number of ring position `index`.
#[inline]
#[must_use]
pub const fn seq(index: u32) -> u32 {
    index.wrapping_add(1)
}

/// A scatter/gather element: a piece of registered memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sge {
    /// Virtual address as registered.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Local key.
    pub lkey: u32,
}

impl Sge {
    /// As two words.
    #[inline]
    #[must_use]
    pub const fn to_words(self) -> [u64; 2] {
        [self.addr, self.lkey as u64 | (self.len as u64) << 32]
    }

    /// From two words.
    #[inline]
    #[must_use]
    pub const fn from_words(w: [u64; 2]) -> Self {
        Self {
            addr: w[0],
            lkey: w[1] as u32,
            len: (w[1] >> 32) as u32,
        }
    }
}

/// The head slot of a send work request, without its data words (4 to 6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SendHead {
    /// Raw opcode; [`WrOpcode::from_u8`].
    pub opcode: u8,
    /// See [`flags`].
    pub flags: u8,
    /// SGEs (0 with [`flags::INLINE`]).
    pub num_sge: u8,
    /// Slots, this one included.
    pub slots: u8,
    /// Immediate data, or the rkey to invalidate.
    pub imm: u32,
    /// The user's name for it.
    pub wr_id: u64,
    /// Remote address; for UD address handle and remote QPN.
    pub remote_addr: u64,
    /// Remote key; for UD the Q_Key.
    pub rkey: u32,
    /// Inline bytes.
    pub inline_len: u32,
}

impl SendHead {
    /// As words 0 to 3.
    #[inline]
    #[must_use]
    pub const fn to_words(&self) -> [u64; 4] {
        [
            self.opcode as u64
                | (self.flags as u64) << 8
                | (self.num_sge as u64) << 16
                | (self.slots as u64) << 24
                | (self.imm as u64) << 32,
            self.wr_id,
            self.remote_addr,
            self.rkey as u64 | (self.inline_len as u64) << 32,
        ]
    }

    /// From words 0 to 3. Nothing is checked.
    #[inline]
    #[must_use]
    pub const fn from_words(w: [u64; 4]) -> Self {
        Self {
            opcode: w[0] as u8,
            flags: (w[0] >> 8) as u8,
            num_sge: (w[0] >> 16) as u8,
            slots: (w[0] >> 24) as u8,
            imm: (w[0] >> 32) as u32,
            wr_id: w[1],
            remote_addr: w[2],
            rkey: w[3] as u32,
            inline_len: (w[3] >> 32) as u32,
        }
    }

    /// Slots that a request with so many SGEs or inline bytes takes.
    #[inline]
    #[must_use]
    pub const fn slots_for(num_sge: usize, inline_len: usize, extra_word: bool) -> usize {
        let sge = if num_sge > 1 {
            (num_sge - 1).div_ceil(SGES_EXT)
        } else {
            0
        };
        let data = if inline_len > INLINE_HEAD {
            (inline_len - INLINE_HEAD).div_ceil(INLINE_EXT)
        } else {
            0
        };
        let ext = if sge > data { sge } else { data };
        1 + if ext == 0 && extra_word { 1 } else { ext }
    }
}

/// A completion-queue entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cqe {
    /// Of the work request.
    pub wr_id: u64,
    /// Raw status; [`WcStatus::from_u8`].
    pub status: u8,
    /// Raw opcode; [`WcOpcode::from_u8`].
    pub opcode: u8,
    /// See [`cqe_flags`].
    pub flags: u8,
    /// Vendor's syndrome; 0 from the soft device.
    pub syndrome: u8,
    /// The local QP's number.
    pub qpn: u32,
    /// Bytes received or read.
    pub byte_len: u32,
    /// Immediate data or invalidated rkey.
    pub imm: u32,
    /// Payload ([`cqe_flags::DATA`]).
    pub data: [u64; 4],
    /// Position of the work request in its queue, modulo 2^16: SQ slots, or RQ entries. For receives of an SRQ: the tag.
    pub wqe: u16,
    /// Doorbell index of the local QP: the low 16 bits of its handle.
    pub qp: u16,
}

impl Cqe {
    /// As eight words, valid at CQ position `index`.
    #[inline]
    #[must_use]
    pub const fn to_words(&self, index: u32) -> [u64; SLOT_WORDS] {
        [
            self.wr_id,
            self.status as u64
                | (self.opcode as u64) << 8
                | (self.flags as u64) << 16
                | (self.syndrome as u64) << 24
                | (self.qpn as u64) << 32,
            self.byte_len as u64 | (self.imm as u64) << 32,
            self.data[0],
            self.data[1],
            self.data[2],
            self.data[3],
            seq(index) as u64 | (self.wqe as u64) << 32 | (self.qp as u64) << 48,
        ]
    }

    /// From eight words.
    #[inline]
    #[must_use]
    pub const fn from_words(w: [u64; SLOT_WORDS]) -> Self {
        Self {
            wr_id: w[0],
            status: w[1] as u8,
            opcode: (w[1] >> 8) as u8,
            flags: (w[1] >> 16) as u8,
            syndrome: (w[1] >> 24) as u8,
            qpn: (w[1] >> 32) as u32,
            byte_len: w[2] as u32,
            imm: (w[2] >> 32) as u32,
            data: [w[3], w[4], w[5], w[6]],
            wqe: (w[7] >> 32) as u16,
            qp: (w[7] >> 48) as u16,
        }
    }
}

const _: () = {
    assert!(MAX_INLINE == 416);
    assert!(MAX_SEND_SGE <= 1 + (MAX_SLOTS - 1) * SGES_EXT);
    assert!(RECV_STRIDES[3] as usize == 16 + 16 * MAX_RECV_SGE);
    assert!(SendHead::slots_for(16, 0, false) == 6);
    assert!(SendHead::slots_for(0, 416, false) == 8);
};
