//! Every limit of the launcher, with its reason.

use std::time::Duration;

/// Smallest guest: the image, its heap and a store of a few segments fit.
pub const MIN_GUEST_MEMORY: u64 = 64 << 20;
/// Largest guest: what the page directories in an image can link.
pub const MAX_GUEST_MEMORY: u64 = 128 << 30;
/// Guest memory comes in whole 2 MiB pages, so that host and guest can map it with them.
pub const GUEST_MEMORY_STEP: u64 = 2 << 20;
/// Memory that stays free for the host beside the guest's (QEMU itself takes some 60 MiB).
pub const HOST_MEMORY_RESERVE: u64 = 128 << 20;

/// q35 keeps RAM of less than this in one piece.
pub const Q35_SPLIT_FROM: u64 = 0xb000_0000;
/// q35 puts this much below 4 GiB once it splits.
pub const Q35_SPLIT_BELOW: u64 = 0x8000_0000;
/// Where q35 continues.
pub const FOUR_GIB: u64 = 1 << 32;

/// Descriptors in one message of a unix socket; the session's handshake passes five.
pub const MAX_FDS_PER_MESSAGE: usize = 8;

/// Length of an instance's name: it is part of a socket's path, which has 107 bytes.
pub const MAX_INSTANCE_NAME: usize = 32;
/// Longest path of a unix socket: `sun_path` less its terminating zero.
pub const MAX_SOCKET_PATH: usize = 107;
/// How many names `claim_free` tries before it gives up.
pub const MAX_INSTANCES_PER_NAME: usize = 64;

/// Oldest QEMU: `query-stats` needs 7.1 and AVX2 under TCG 7.2.
pub const MIN_QEMU: (u32, u32) = (7, 2);
/// Time for `qemu --version`; it takes 25 ms, and a loaded machine is slow.
pub const QEMU_VERSION_TIMEOUT: Duration = Duration::from_secs(15);
/// Time for one trial start under KVM; it takes 60 ms, on a machine that others load more than 5 s.
pub const KVM_TRIAL_TIMEOUT: Duration = Duration::from_secs(15);
/// Text kept from a trial's standard error: enough for the line that says why.
pub const MAX_TRIAL_STDERR: usize = 4 << 10;

/// Watchdog of a start: a boot takes 0.1 s under KVM and 0.3 s under TCG, and a CPU that wedges never ends by itself. On a machine
/// whose two CPUs five others wanted, boots of more than 10 s were seen.
pub const WATCHDOG: Duration = Duration::from_secs(60);
/// A start that takes longer is said to be slow.
pub const SLOW_START: Duration = Duration::from_secs(5);
/// Time between the guest's last word in the window and the end of its QEMU.
pub const EXIT_GRACE: Duration = Duration::from_secs(2);
/// How long a guest has after a request to shut down: it takes milliseconds, on a machine that others load more than 5 s.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);

/// Period of the supervisor once the guest runs: the log's latency, and ten beats in the
/// 100 ms that the window promises.
pub const SUPERVISOR_PERIOD: Duration = Duration::from_millis(10);

/// Time for one answer of QMP.
pub const QMP_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest line of QMP that is kept; `query-stats` answers some 2 KiB, `query-stats-schemas` 30 KiB.
pub const MAX_QMP_LINE: usize = 1 << 20;

/// Text of COM1 kept for the report: registers and a backtrace take 3 KiB.
pub const MAX_CONSOLE_TAIL: usize = 64 << 10;
/// Longest line taken from the guest; a longer one is cut.
pub const MAX_LINE: usize = 2 << 10;
/// Lines of the guest's log taken per turn of the supervisor, so that a guest that floods its log delays nothing else.
pub const MAX_RECORDS_PER_DRAIN: usize = 256;
/// Bytes of COM1, standard error or QMP taken per turn of the supervisor.
pub const MAX_BYTES_PER_TURN: usize = 64 << 10;
/// Lines of the guest's log remembered, so that COM1 does not say them again.
pub const REMEMBERED_LINES: usize = 64;
/// Depth of inlining shown for one address of a backtrace.
pub const MAX_INLINED: usize = 8;

/// Time for which the TSC is compared with the clock: two readings within 100 ns over 20 ms are 10 ppm.
pub const TSC_CALIBRATION: Duration = Duration::from_millis(20);
/// Longest command line of a guest: what boot protocols on x86 promise to carry.
pub const MAX_COMMAND_LINE: usize = 2047;
/// Highest address that can hold code: the end of the lower half.
pub const MAX_CODE_ADDRESS: u64 = (1 << 47) - 1;
