//! Every limit of this crate, with its reason.

/// Descriptors of the control queue: one request is outstanding at a time and takes two; a power of two that
/// leaves the rest of the page for the buffers.
pub const CONTROL_QUEUE_SIZE: u16 = 8;
/// How long a control verb may take, ns. The host answers in microseconds; this long means that it is broken.
pub const CONTROL_TIMEOUT_NS: u64 = 10_000_000_000;
/// How long to spin for a control verb's reply before sleeping, ns: about what a sleep and a wake cost.
pub const CONTROL_SPIN_NS: u64 = 30_000;
/// How long to spin on an empty completion queue before sleeping, ns, where a CPU is free for it.
pub const CQ_SPIN_NS: u64 = 50_000;
/// Longest single sleep, ns: looks at the host's pulse this often.
pub const MAX_SLEEP_NS: u64 = 100_000_000;
/// Longest sleep for a connection event, ns: another thread may fetch an event meant for this one's channel.
pub const CM_SLEEP_NS: u64 = 5_000_000;
/// Turns of a wait loop between looks at the clock: a look costs as much as some turns.
pub const CLOCK_TURNS: u32 = 32;
/// Smallest completion ring, entries: a page holds 64, so fewer save nothing worth having.
pub const MIN_CQ_RING: u32 = 16;
/// Completions of a CQ: the largest ring with its spare quarter.
pub const MAX_CQE: u32 = 26_000;
/// Ring slots, as the ABI limits them.
pub const MAX_RING: u32 = 1 << hyv_abi::queue::MAX_RING_LOG2;
/// Smallest send ring, slots: one work request of the largest kind fits.
pub const MIN_SEND_RING: u32 = hyv_abi::queue::MAX_SLOTS as u32;
/// Memory of a dropped region is reused by sizes of powers of two from here on, bytes.
pub const MIN_MR_ALLOC: usize = 64;
/// Alignment of allocated memory regions from this size on, bytes: a large page, so that engine and user walk few tables.
pub const HUGE: usize = 2 << 20;

#[cfg(feature = "std")]
mod process {
    /// Turns of a wait loop of a process between looks at its socket: a look is a system call of some 300 ns.
    pub const PULSE_TURNS: u32 = 16_384;
    /// Turns after which a process without a CPU of its own gives way to others.
    pub const YIELD_TURNS: u32 = 64;
    /// How long the host's pulse may stand still before it counts as dead, ns; it beats every 100 ms.
    pub const PULSE_LIMIT_NS: u64 = 10_000_000_000;
    /// How long the host may take to answer the greeting, ms.
    pub const GREETING_MS: u64 = 5_000;
    /// Least RAM of a process, bytes: one large page.
    pub const MIN_RAM: u64 = 2 << 20;
}
#[cfg(feature = "std")]
pub use process::*;
