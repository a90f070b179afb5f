//! Every bound of the runtime, with its reason.

/// Largest RAM: one page directory a GiB comes from a pool of this many pages (`linker/image.ld`), and
/// the first GiB has its own. The pool costs address space in the image's area, and no memory until used.
pub const MAX_RAM_GIB: u64 = 129;

/// Least RAM: the image's area is 6 MiB, and a heap and an application need something.
pub const MIN_RAM: u64 = 16 << 20;

/// The heap gets this fraction of RAM (1/8) ...
pub const HEAP_SHARE: u64 = 8;
/// ... but at least this much, as queues of a few hundred connections and code that formats text need
/// megabytes,
pub const HEAP_MIN: u64 = 8 << 20;
/// ... and at most this much: what is large belongs to the application's own region, which is not
/// parcelled out.
pub const HEAP_MAX: u64 = 256 << 20;

/// Bytes of arguments that are kept; what QEMU's loaders have room for.
pub const MAX_ARGS: usize = 4096;

/// Bytes of one log record; longer messages are cut. A 32nd of the ring, so that one message cannot empty it.
pub const MAX_LOG_RECORD: usize = 2048;

/// Frames in a backtrace: enough for any stack of ours, bounded in case a frame pointer leads astray.
pub const MAX_FRAMES: usize = 48;

/// The host's heartbeat is looked at no more often than this. It beats every 100 ms.
pub const HOST_BEAT_PERIOD_NS: u64 = 300_000_000;
/// The host is gone when so many looks in a row found the beat unmoved: 2.4 s. Looks are counted rather
/// than time,
/// so that a guest that was itself stopped for long does not blame the host.
pub const HOST_BEAT_MISSES: u32 = 8;

/// Polls of COM1's transmitter before a byte is given up: a console that nobody drains must not hold up
/// the end.
pub const COM1_POLLS: u32 = 20_000;

/// How long the calibration against the interval timer takes, as a fraction of a second. Only where
/// neither the host nor
/// KVM's clock says the frequency; 1/250 s gives it to some 100 ppm.
pub const CALIBRATION_HZ: u64 = 250;

/// Copies of at least this many bytes use `rep movsb` where it is fast: it starts slowly, and then
/// moves whole lines
/// without reading the destination.
pub const REP_MIN: u64 = 4096;

/// Measurements that are begun again when the vCPU was kept from running in them, until the guest gives up: on a machine that takes 60 ms
/// away at a time and leaves 6, one in three succeeds.
pub const CALIBRATION_TRIES: u32 = 200;

/// Readings of the interval timer of which the tightest counts.
pub const CALIBRATION_READINGS: u32 = 8;

/// How long a wait for the network polls before it sleeps: about what a sleep and a wake-up cost.
pub const NET_SPIN_NS: u64 = 50_000;
/// Longest sleep in a wait for the network: the host's heartbeat and its request to end are looked at so often.
pub const NET_SLEEP_NS: u64 = 500_000_000;
/// How long to wait for a DHCP server.
pub const LEASE_TIMEOUT: core::time::Duration = core::time::Duration::from_secs(10);
