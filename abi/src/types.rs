//! Types that both sides share: states, access flags, attribute masks.

use bitflags::bitflags;

bitflags! {
    /// Access rights of a memory region, numbered as `enum ibv_access_flags`. Local read is always allowed.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Access: u32 {
        /// The device may write locally (receives, READ results).
        const LOCAL_WRITE = 1 << 0;
        /// Peers may write.
        const REMOTE_WRITE = 1 << 1;
        /// Peers may read.
        const REMOTE_READ = 1 << 2;
        /// Peers may use atomics.
        const REMOTE_ATOMIC = 1 << 3;
        /// Memory windows may be bound to it.
        const MW_BIND = 1 << 4;
    }

    /// Which attributes `modify_qp` sets, numbered as `enum ibv_qp_attr_mask`.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct QpAttrMask: u32 {
        /// `state`.
        const STATE = 1 << 0;
        /// `cur_state`.
        const CUR_STATE = 1 << 1;
        /// Whether SQ-drained raises an event.
        const EN_SQD_ASYNC_NOTIFY = 1 << 2;
        /// `access`.
        const ACCESS_FLAGS = 1 << 3;
        /// `pkey_index`.
        const PKEY_INDEX = 1 << 4;
        /// `port_num`.
        const PORT = 1 << 5;
        /// `qkey`.
        const QKEY = 1 << 6;
        /// `dest_gid` and what else is an address.
        const AV = 1 << 7;
        /// `path_mtu`.
        const PATH_MTU = 1 << 8;
        /// `timeout`.
        const TIMEOUT = 1 << 9;
        /// `retry_cnt`.
        const RETRY_CNT = 1 << 10;
        /// `rnr_retry`.
        const RNR_RETRY = 1 << 11;
        /// `rq_psn`.
        const RQ_PSN = 1 << 12;
        /// `max_rd_atomic`.
        const MAX_QP_RD_ATOMIC = 1 << 13;
        /// The alternate path; not supported.
        const ALT_PATH = 1 << 14;
        /// `min_rnr_timer`.
        const MIN_RNR_TIMER = 1 << 15;
        /// `sq_psn`.
        const SQ_PSN = 1 << 16;
        /// `max_dest_rd_atomic`.
        const MAX_DEST_RD_ATOMIC = 1 << 17;
        /// Path migration; not supported.
        const PATH_MIG_STATE = 1 << 18;
        /// Queue sizes; not supported.
        const CAP = 1 << 19;
        /// `dest_qp_num`.
        const DEST_QPN = 1 << 20;
    }
}

/// QP states, numbered as `enum ibv_qp_state` (InfiniBand Architecture 1.4, section 10.3.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum QpState {
    /// Made or reset.
    #[default]
    Reset = 0,
    /// Receives may be posted.
    Init = 1,
    /// Ready to receive.
    Rtr = 2,
    /// Ready to send.
    Rts = 3,
    /// Send queue drained.
    Sqd = 4,
    /// Send queue in error (UC, UD).
    Sqe = 5,
    /// In error: everything flushes.
    Err = 6,
}

impl QpState {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [
        Self::Reset,
        Self::Init,
        Self::Rtr,
        Self::Rts,
        Self::Sqd,
        Self::Sqe,
        Self::Err,
    ];

    /// The state a number stands for, if any.
    #[must_use]
    pub fn from_u32(v: u32) -> Option<Self> {
        Self::ALL.get(v as usize).copied()
    }
}

/// QP types, numbered as `enum ibv_qp_type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum QpType {
    /// Reliable connection.
    Rc = 2,
    /// Unreliable connection.
    Uc = 3,
    /// Unreliable datagram.
    Ud = 4,
}

impl QpType {
    /// The type a number stands for, if any.
    #[must_use]
    pub const fn from_u32(v: u32) -> Option<Self> {
        Some(match v {
            2 => Self::Rc,
            3 => Self::Uc,
            4 => Self::Ud,
            _ => return None,
        })
    }
}

/// `rnr_retry` that means for ever.
pub const RNR_RETRY_INFINITE: u32 = 7;

/// The RNR timer field's time in ns (InfiniBand Architecture 1.4, table 45: 5-bit code).
#[must_use]
pub const fn rnr_timer_ns(code: u32) -> u64 {
    const HUNDREDTHS_MS: [u64; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024,
        1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    HUNDREDTHS_MS[(code & 31) as usize] * 10_000
}

/// The local ACK timeout field's time in ns: 4.096 us x 2^code; 0 means for ever.
#[must_use]
pub const fn ack_timeout_ns(code: u32) -> Option<u64> {
    if code == 0 {
        None
    } else {
        Some(4096u64 << (code & 31))
    }
}

/// Errno values that control verbs answer with, numbered as Linux does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted.
    Perm = 1,
    /// No such object.
    NoEnt = 2,
    /// Nothing there now; try again.
    Again = 11,
    /// A quota or the memory is exhausted.
    NoMem = 12,
    /// Access denied.
    Acces = 13,
    /// An address outside the user's memory.
    Fault = 14,
    /// Still in use.
    Busy = 16,
    /// An argument makes no sense.
    Inval = 22,
    /// No such verb.
    NoSys = 38,
    /// Another ABI version.
    ProtoNoSupport = 93,
    /// Not supported by this device.
    OpNotSupp = 95,
    /// The port is taken.
    AddrInUse = 98,
    /// Nobody there.
    HostUnreach = 113,
    /// Wrong state for it.
    IsConn = 106,
    /// Not connected.
    NotConn = 107,
    /// Refused by the peer.
    ConnRefused = 111,
    /// Too many requests per second.
    DQuot = 122,
}

impl Errno {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Perm,
        Self::NoEnt,
        Self::Again,
        Self::NoMem,
        Self::Acces,
        Self::Fault,
        Self::Busy,
        Self::Inval,
        Self::NoSys,
        Self::ProtoNoSupport,
        Self::OpNotSupp,
        Self::AddrInUse,
        Self::HostUnreach,
        Self::IsConn,
        Self::NotConn,
        Self::ConnRefused,
        Self::DQuot,
    ];

    /// The errno a number stands for; unknown ones are [`Errno::Inval`].
    #[must_use]
    pub fn from_u32(v: u32) -> Self {
        Self::ALL
            .into_iter()
            .find(|e| *e as u32 == v)
            .unwrap_or(Self::Inval)
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $num:literal, $text:literal;)*) => {
        /// Why a control verb failed, beside its errno: what a user can act on.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum Reason { $(#[doc = $text] $name = $num,)* }
        impl Reason {
            /// The reason a number stands for; unknown ones are [`Reason::None`].
            #[must_use]
            pub const fn from_u32(v: u32) -> Self {
                match v { $($num => Self::$name,)* _ => Self::None }
            }
            /// In words.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    None = 0, "no further reason";
    BadVersion = 1, "the ABI version differs: rebuild guest and host from one source";
    BadOpcode = 2, "no such control verb";
    BadLength = 3, "the request is shorter than its verb needs";
    BadHandle = 4, "no such object, or an object of another generation";
    WrongPd = 5, "the objects belong to different protection domains";
    InUse = 6, "other objects still use it: destroy those first";
    QuotaObjects = 7, "the quota of objects of this kind is used up";
    QuotaMemory = 8, "the quota of registered memory is used up";
    QuotaRate = 9, "too many control requests per second";
    OutsideRam = 10, "the range is not inside the user's memory";
    Misaligned = 11, "the address is not aligned as a ring needs";
    BadRingSize = 12, "a ring is not a power of two, or is too large";
    BadStride = 13, "the receive stride is not 32, 64, 128 or 256 bytes";
    BadAccess = 14, "unknown access flags, or remote write or atomic without local write";
    BadTransition = 15, "the state machine has no such transition";
    MissingAttr = 16, "the transition needs attributes that the mask does not name";
    ExtraAttr = 17, "the mask names attributes that the transition does not allow";
    BadAttr = 18, "an attribute's value is out of range";
    BadQpType = 19, "unknown or unsupported QP type";
    CurrentState = 20, "the QP is not in the state that cur_state names";
    PortInUse = 21, "another listener has this port";
    NotListening = 22, "nobody listens on this port";
    BacklogFull = 23, "the listener's backlog is full";
    CmState = 24, "the connection identifier is in the wrong state for it";
    PrivateDataTooLong = 25, "the private data is longer than the message allows";
    NoEvent = 26, "no event is pending";
    ZeroLength = 27, "a memory region of no bytes";
    QpInUseByCm = 28, "another connection identifier owns this QP";
    BadGid = 29, "no such GID or port on this device";
    Overflow = 30, "address plus length overflows";
    BadMwType = 31, "only memory windows of type 2 exist";
    WindowsBound = 32, "memory windows are bound to the region: unbind or drop them first";
    BadFlags = 33, "unknown or empty flags";
    RingTooSmall = 34, "the new ring has less room than entries wait";
    BadPortSpace = 35, "unknown port space, or not one for this call";
    NoRoute = 36, "no route to that address from this device's: see --listen and the host's routes";
    MwBindForbidden = 37, "windows cannot be bound with that access or to that region";
}

/// A control verb's failure: the errno that ibverbs would give, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VerbError {
    /// As Linux numbers it.
    pub errno: Errno,
    /// What a user can act on.
    pub reason: Reason,
}

impl VerbError {
    /// Both parts.
    #[must_use]
    pub const fn new(errno: Errno, reason: Reason) -> Self {
        Self { errno, reason }
    }
}

impl core::fmt::Display for VerbError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "{} ({:?}, errno {})",
            self.reason.text(),
            self.errno,
            self.errno as u32
        )
    }
}

impl core::error::Error for VerbError {}
