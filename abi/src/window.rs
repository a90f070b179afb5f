//! The window: 2 MiB of memory shared between one user and `hyv-host`.
//!
//! In a VM it is BAR 2 of the HyV function (QEMU's `ivshmem-doorbell`); for a process it is a sealed
//! memfd. Every field is an atomic: the other side may write at any time, so a value is loaded once and
//! then checked. Offsets are part of the contract.

use core::mem::{offset_of, size_of};

use crate::doorbell::Doorbells;
use crate::sync::{AtomicU8, AtomicU32, AtomicU64};

/// `b"HYVWIN01"`, little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"HYVWIN01");
/// Size of the window in bytes; one 2 MiB page.
pub const WINDOW_LEN: usize = 2 << 20;
/// QPs per user: bits in the doorbell bitmap.
pub const MAX_QPS: usize = 16_384;
/// CQs per user: bits in the completion-event bitmap.
pub const MAX_CQS: usize = 4_096;
/// SRQs per user.
pub const MAX_SRQS: usize = 4_096;
/// RAM regions a header can name.
pub const MAX_REGIONS: usize = 4;
/// Bytes of text in the log ring; a power of two.
pub const LOG_LEN: usize = 64 << 10;

/// Doorbell vector, user to host: the control queue has a request (or a timer was set).
pub const KICK_CONTROL: u32 = 0;
/// Doorbell vector, user to host: a work queue has entries and the engine sleeps.
pub const KICK_DATA: u32 = 1;
/// Doorbell vectors, user to host.
pub const KICK_VECTORS: u32 = 2;
/// Interrupt vector, host to user: something in [`Events`] or on the control queue changed.
pub const WAKE_VECTOR: u32 = 0;
/// ivshmem peer id of `hyv-host`.
pub const PEER_HOST: u16 = 0;
/// ivshmem peer id of the guest.
pub const PEER_GUEST: u16 = 1;

/// One contiguous piece of guest-physical memory and where it lies in the user's RAM file.
#[repr(C)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub guest_addr: AtomicU64,
    /// Length in bytes.
    pub len: AtomicU64,
    /// Offset of its first byte in the RAM file.
    pub file_offset: AtomicU64,
}

/// Written by the host before the user starts, read by the user; from `host_beat` on the host keeps writing.
#[repr(C, align(4096))]
pub struct Header {
    /// [`MAGIC`], stored last with release ordering.
    pub magic: AtomicU64,
    /// [`crate::ABI_VERSION`].
    pub version: AtomicU32,
    /// Differs for every user that this host ever served; a stale window shows itself by it.
    pub generation: AtomicU32,
    /// [`WINDOW_LEN`].
    pub window_len: AtomicU64,
    /// Bytes of RAM: the sum of the regions' lengths.
    pub ram_len: AtomicU64,
    /// TSC ticks per second as the user sees them; 0: a guest must calibrate (TCG), a process read the system's clock.
    pub tsc_hz: AtomicU64,
    /// Wall clock at `tsc_at_boot`, ns since 1970.
    pub realtime_ns: AtomicU64,
    /// How many of `regions` count.
    pub num_regions: AtomicU32,
    /// CPUs the user may spin on without sharing one with the engine: 0 means sleep soon.
    pub spin_hint: AtomicU32,
    /// RAM regions, ascending by file offset, without gaps.
    pub regions: [Region; MAX_REGIONS],
    _pad0: [AtomicU8; 256 - 56 - MAX_REGIONS * 24],
    /// Counts up at least every 100 ms while the host lives. A line of its own.
    pub host_beat: AtomicU64,
    /// Host's monotonic clock in ns at that beat.
    pub host_time_ns: AtomicU64,
    /// Nonzero: the host asks the user to end (1: exit 0).
    pub shutdown: AtomicU32,
    /// Counts up when the wake-up asked for in [`UserPage::wake_in_ns`] is given. The clocks of host and user differ: the user's own
    /// does not tell whether it was.
    pub timer_fired: AtomicU32,
    _pad1: [AtomicU8; 4096 - 256 - 24],
}

/// What a user's `state` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum UserState {
    /// Nothing ran yet.
    Off = 0,
    /// The runtime found the window and is setting up.
    Booting = 1,
    /// The application's `main` runs.
    Running = 2,
    /// The application says that it serves.
    Ready = 3,
    /// Ended; `exit_code` holds.
    Exited = 4,
    /// Ended by a panic or an exception; `exit_code` holds.
    Panicked = 5,
}

impl UserState {
    /// The state a word stands for, if any.
    #[must_use]
    pub const fn from_u32(v: u32) -> Option<Self> {
        Some(match v {
            0 => Self::Off,
            1 => Self::Booting,
            2 => Self::Running,
            3 => Self::Ready,
            4 => Self::Exited,
            5 => Self::Panicked,
            _ => return None,
        })
    }
}

/// Where the user laid its control virtqueue (virtio 1.2, section 2.7, split). Offsets into its RAM.
#[repr(C)]
pub struct ControlQueue {
    /// Descriptor table.
    pub desc: AtomicU64,
    /// Available ring.
    pub avail: AtomicU64,
    /// Used ring.
    pub used: AtomicU64,
    /// Entries, a power of two, at most 256.
    pub size: AtomicU32,
    /// Set to 1, after the rest, and followed by a kick.
    pub enable: AtomicU32,
}

/// Written by the user, read by the host (which trusts none of it).
#[repr(C, align(4096))]
pub struct UserPage {
    /// A [`UserState`].
    pub state: AtomicU32,
    /// The application's exit code, an `i32`.
    pub exit_code: AtomicU32,
    /// Counts up while the user lives; informational.
    pub beat: AtomicU64,
    /// Ask for one wake-up after so many ns; write, then kick [`KICK_CONTROL`]. The host takes it (stores 0).
    pub wake_in_ns: AtomicU64,
    /// Heap and other RAM in use that is not the application's store, bytes; for the report.
    pub overhead_bytes: AtomicU64,
    /// The control virtqueue.
    pub control: ControlQueue,
    /// Free for the application: what it wants the host to show (no meaning to hyv-host).
    pub app: [AtomicU64; 32],
    _pad: [AtomicU8; 4096 - 32 - 32 - 256],
}

/// Bits of [`Events::summary`]: which kinds of event wait.
pub mod summary {
    /// Some bit of `cq_completion`.
    pub const CQ_COMPLETION: u64 = 1 << 0;
    /// A connection-manager event can be fetched with `CmGetEvent`.
    pub const CM: u64 = 1 << 1;
    /// Some bit of `qp_fatal`.
    pub const QP_FATAL: u64 = 1 << 2;
    /// Some bit of `qp_request_error`.
    pub const QP_REQUEST_ERROR: u64 = 1 << 3;
    /// Some bit of `qp_access_error`.
    pub const QP_ACCESS_ERROR: u64 = 1 << 4;
    /// Some bit of `qp_last_wqe`.
    pub const QP_LAST_WQE: u64 = 1 << 5;
    /// Some bit of `cq_error`.
    pub const CQ_ERROR: u64 = 1 << 6;
    /// Some bit of `srq_limit`.
    pub const SRQ_LIMIT: u64 = 1 << 7;
    /// Some bit of `device`.
    pub const DEVICE: u64 = 1 << 8;
    /// Some bit of `qp_comm_established`.
    pub const QP_COMM_ESTABLISHED: u64 = 1 << 9;
}

/// Bits of [`Events::device`].
pub mod device_event {
    /// The port went up.
    pub const PORT_ACTIVE: u64 = 1 << 0;
    /// The port went down.
    pub const PORT_ERROR: u64 = 1 << 1;
    /// The device is gone.
    pub const DEVICE_FATAL: u64 = 1 << 2;
}

/// Pending events: the host sets an object's bit and then its kind's bit in `summary`; the user takes
/// `summary` (swap 0) and then the objects' words. One bit per object and kind: nothing is lost, nothing piles up.
#[repr(C, align(4096))]
pub struct Events {
    /// Kinds with something pending; see [`summary`].
    pub summary: AtomicU64,
    _pad0: [AtomicU64; 7],
    /// See [`device_event`].
    pub device: AtomicU64,
    _pad1: [AtomicU64; 7],
    /// An armed CQ got a completion; by CQ index.
    pub cq_completion: [AtomicU64; MAX_CQS / 64],
    /// A CQ overran; by CQ index.
    pub cq_error: [AtomicU64; MAX_CQS / 64],
    /// An SRQ fell below its limit; by SRQ index.
    pub srq_limit: [AtomicU64; MAX_SRQS / 64],
    /// A QP went to the error state by itself; by QP index.
    pub qp_fatal: [AtomicU64; MAX_QPS / 64],
    /// A QP got an invalid request.
    pub qp_request_error: [AtomicU64; MAX_QPS / 64],
    /// A QP got a request that its keys or flags forbid.
    pub qp_access_error: [AtomicU64; MAX_QPS / 64],
    /// A QP in error took its last receive from an SRQ.
    pub qp_last_wqe: [AtomicU64; MAX_QPS / 64],
    /// A QP in RTR got its first message.
    pub qp_comm_established: [AtomicU64; MAX_QPS / 64],
    _pad2: [AtomicU64; 3 * 512 - 16 - 3 * (MAX_CQS / 64) - 5 * (MAX_QPS / 64)],
}

/// Lines that two parties bounce, to measure the floor of what any queue can do on this machine.
#[repr(C, align(4096))]
pub struct Probe {
    /// Odd: the prober's turn ended; even: the responder's.
    pub line: AtomicU64,
    _pad0: [AtomicU64; 31],
    /// Even: the responder's turn ended, where it answers in a line of its own. Some lines away, so that no prefetcher takes
    /// the two for one.
    pub reply: AtomicU64,
    _pad1: [AtomicU64; 479],
}

/// Text from the user to the host's log. Records are 8-byte aligned: a little-endian `u32` of
/// `len | level << 24`, then `len` bytes (UTF-8), padded. Levels as in the `log` crate: 1 error … 5 trace.
#[repr(C, align(4096))]
pub struct LogRing {
    /// Bytes ever written, by the user.
    pub head: AtomicU64,
    /// Records dropped because the ring was full.
    pub dropped: AtomicU64,
    _pad0: [AtomicU64; 6],
    /// Bytes ever read, by the host.
    pub tail: AtomicU64,
    _pad1: [AtomicU64; 503],
    /// The ring.
    pub text: [AtomicU64; LOG_LEN / 8],
}

/// The whole window.
#[repr(C, align(4096))]
pub struct Window {
    /// Host to user: what there is.
    pub header: Header,
    /// User to host: state, control queue.
    pub user: UserPage,
    /// Host to user: pending events.
    pub events: Events,
    /// Doorbells: the bitmap, the summary and the flags that say who looks.
    pub doorbells: Doorbells,
    /// The floor's line.
    pub probe: Probe,
    /// The user's log.
    pub log: LogRing,
    _pad: [AtomicU64; (WINDOW_LEN - USED) / 8],
}

const USED: usize = size_of::<Header>()
    + size_of::<UserPage>()
    + size_of::<Events>()
    + size_of::<Doorbells>()
    + size_of::<Probe>()
    + size_of::<LogRing>();

const _: () = {
    assert!(size_of::<Header>() == 4096);
    assert!(offset_of!(Header, regions) == 56);
    assert!(offset_of!(Header, host_beat) == 256);
    assert!(size_of::<UserPage>() == 4096);
    assert!(offset_of!(UserPage, control) == 32);
    assert!(offset_of!(UserPage, app) == 64);
    assert!(size_of::<Events>() == 3 * 4096);
    assert!(size_of::<Doorbells>() == 6 * 4096);
    assert!(offset_of!(Window, user) == 0x1000);
    assert!(offset_of!(Window, events) == 0x2000);
    assert!(offset_of!(Window, doorbells) == 0x5000);
    assert!(offset_of!(Window, probe) == 0xb000);
    assert!(offset_of!(Probe, reply) == 256);
    assert!(offset_of!(Window, log) == 0xc000);
    assert!(offset_of!(LogRing, text) == 4096);
    assert!(size_of::<Window>() == WINDOW_LEN);
};
