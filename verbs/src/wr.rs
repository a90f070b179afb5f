//! Work requests.

use bitflags::bitflags;
use hyv_abi::queue::{Sge, WrOpcode, flags};
use hyv_abi::types::Access;

/// A piece of a peer's registered memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RemoteAddr {
    /// Virtual address as the peer registered it.
    pub addr: u64,
    /// The peer's rkey.
    pub rkey: u32,
}

bitflags! {
    /// Flags of a send work request, numbered as `enum ibv_send_flags`.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct SendFlags: u8 {
        /// Wait for earlier READs and atomics of this queue.
        const FENCE = flags::FENCE;
        /// Write a completion. Without it the slots are free again only when a later signaled one completes.
        const SIGNALED = flags::SIGNALED;
        /// Raise a solicited event at the receiver.
        const SOLICITED = flags::SOLICITED;
    }
}

/// Where a datagram goes: made by [`crate::AddressHandle::to`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Datagram {
    /// Of the address handle, which must live until the send completes.
    pub(crate) ah: u32,
    /// The peer's QPN, 24 bits.
    pub qpn: u32,
    /// The peer's Q_Key. With the highest bit set, the sending queue pair's own is sent instead (IBA 1.4, 10.2.5).
    pub qkey: u32,
}

/// What binds a memory window: made by [`crate::MemoryWindow::bind`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bind {
    /// The window's present key.
    pub(crate) rkey: u32,
    /// Its key once it is bound.
    pub new_rkey: u32,
    /// What peers may do.
    pub access: Access,
    pub(crate) lkey: u32,
    pub(crate) addr: u64,
    pub(crate) len: u64,
}

/// What a send work request does.
///
/// Immediate data is a number in host order at both ends; on the wire it is big-endian. A peer that uses libibverbs has it
/// as `be32`: what is 0x01020304 here is `htonl(0x01020304)` in its `imm_data`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum SendOp {
    /// SEND.
    Send,
    /// SEND with immediate data.
    SendImm(u32),
    /// SEND that invalidates a key of the peer.
    SendInv(u32),
    /// RDMA WRITE.
    Write(RemoteAddr),
    /// RDMA WRITE with immediate data, which takes a receive of the peer.
    WriteImm(RemoteAddr, u32),
    /// RDMA READ.
    Read(RemoteAddr),
    /// Compare 8 bytes of the peer with `compare`, and swap in `swap` if equal. The old value comes back.
    CmpSwp {
        /// Where.
        remote: RemoteAddr,
        /// Compare with.
        compare: u64,
        /// Swap in.
        swap: u64,
    },
    /// Add to 8 bytes of the peer. The old value comes back.
    FetchAdd {
        /// Where.
        remote: RemoteAddr,
        /// How much.
        add: u64,
    },
    /// Invalidate a local key: a bound memory window's. Its payload is no SGEs.
    LocalInv(u32),
    /// Bind a memory window, or unbind it ([`crate::QueuePair::bind_mw`] is the short way). Its payload is no SGEs.
    BindMw(Bind),
    /// SEND of a datagram, at most the port's MTU long.
    SendTo(Datagram),
    /// SEND of a datagram with immediate data.
    SendImmTo(Datagram, u32),
}

impl SendOp {
    /// Its number.
    #[inline]
    #[must_use]
    pub const fn opcode(&self) -> WrOpcode {
        match self {
            Self::Send | Self::SendTo(_) => WrOpcode::Send,
            Self::SendImm(_) | Self::SendImmTo(..) => WrOpcode::SendImm,
            Self::SendInv(_) => WrOpcode::SendInv,
            Self::Write(_) => WrOpcode::Write,
            Self::WriteImm(..) => WrOpcode::WriteImm,
            Self::Read(_) => WrOpcode::Read,
            Self::CmpSwp { .. } => WrOpcode::CmpSwp,
            Self::FetchAdd { .. } => WrOpcode::FetchAdd,
            Self::LocalInv(_) => WrOpcode::LocalInv,
            Self::BindMw(_) => WrOpcode::BindMw,
        }
    }

    /// The bit of datagrams, whatever their opcode.
    pub(crate) const DATAGRAM: u32 = 1 << 31;

    /// A bit of its own for each opcode, another one for datagrams.
    #[inline]
    pub(crate) const fn bit(&self) -> u32 {
        match self {
            Self::SendTo(_) | Self::SendImmTo(..) => Self::DATAGRAM,
            other => 1 << other.opcode() as u32,
        }
    }

    #[inline]
    pub(crate) const fn remote(&self) -> RemoteAddr {
        match self {
            Self::Write(r)
            | Self::WriteImm(r, _)
            | Self::Read(r)
            | Self::CmpSwp { remote: r, .. }
            | Self::FetchAdd { remote: r, .. } => *r,
            // Word 2 and the low half of word 3 hold these instead (`hyv_abi::queue`).
            Self::SendTo(d) | Self::SendImmTo(d, _) => RemoteAddr {
                addr: d.ah as u64 | (d.qpn as u64) << 32,
                rkey: d.qkey,
            },
            Self::BindMw(b) => RemoteAddr {
                addr: b.access.bits() as u64,
                rkey: b.rkey,
            },
            _ => RemoteAddr { addr: 0, rkey: 0 },
        }
    }

    #[inline]
    pub(crate) const fn imm(&self) -> u32 {
        match self {
            Self::SendImm(v)
            | Self::SendInv(v)
            | Self::WriteImm(_, v)
            | Self::LocalInv(v)
            | Self::SendImmTo(_, v) => *v,
            Self::BindMw(b) => b.new_rkey,
            _ => 0,
        }
    }
}

/// The data of a send work request.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    /// Pieces of registered memory: gathered for SEND and WRITE, filled by READ and atomics. The memory must not
    /// change until the completion.
    Sges(&'a [Sge]),
    /// The bytes themselves, copied into the work queue now: no memory region needed, free again at once.
    Inline(&'a [u8]),
    /// Several pieces of bytes, copied into the work queue now one after the other.
    InlineParts(&'a [&'a [u8]]),
}

/// A send work request.
#[derive(Clone, Copy, Debug)]
pub struct SendWr<'a> {
    /// The owner's name for it; comes back in the completion.
    pub wr_id: u64,
    /// What to do.
    pub op: SendOp,
    /// With which data.
    pub payload: Payload<'a>,
    /// And how.
    pub flags: SendFlags,
}

impl<'a> SendWr<'a> {
    /// A signaled work request.
    #[inline]
    #[must_use]
    pub const fn new(wr_id: u64, op: SendOp, payload: Payload<'a>) -> Self {
        Self {
            wr_id,
            op,
            payload,
            flags: SendFlags::SIGNALED,
        }
    }

    /// A signaled work request that invalidates a local key.
    #[inline]
    #[must_use]
    pub const fn local_inv(wr_id: u64, rkey: u32) -> SendWr<'static> {
        SendWr::new(wr_id, SendOp::LocalInv(rkey), Payload::Sges(&[]))
    }

    /// The same without a completion of its own.
    #[inline]
    #[must_use]
    pub const fn unsignaled(mut self) -> Self {
        self.flags = self.flags.difference(SendFlags::SIGNALED);
        self
    }

    /// The same with further flags.
    #[inline]
    #[must_use]
    pub const fn with_flags(mut self, flags: SendFlags) -> Self {
        self.flags = self.flags.union(flags);
        self
    }
}

/// A receive work request.
#[derive(Clone, Copy, Debug)]
pub struct RecvWr<'a> {
    /// The owner's name for it; comes back in the completion.
    pub wr_id: u64,
    /// Where a message goes. The memory belongs to the device until the completion.
    pub sges: &'a [Sge],
}
