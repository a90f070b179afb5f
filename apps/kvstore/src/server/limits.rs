//! Every limit of the server, with its reason.

/// Requests that a client may have outstanding: with less the wire's latency is not hidden, with more a connection costs more memory.
pub const WINDOW: usize = 16;
/// Receive buffers of a connection: the window, and a batch that is not posted again yet.
pub const RECV_BUFFERS: usize = WINDOW + REPOST_BATCH;
/// Work requests of one connection that may be unfinished; no further request of it is taken up beyond.
pub const MAX_SENDS: usize = 64;
/// Slots of a connection's send ring: [`MAX_SENDS`] of the largest kind used here (a STATS reply, 4 slots).
pub const SEND_RING: u32 = 256;
/// A completion is asked for every so many sends: often enough to free slots and unpin segments, rare enough to cost nothing.
pub const SIGNAL_EVERY: u32 = 16;
/// Receives reposted at once: one more line of the ring for several receives.
pub const REPOST_BATCH: usize = 8;
/// Connections at once, by default.
pub const MAX_CONNECTIONS: usize = 1_024;
/// Completions taken from the queue in one go.
pub const POLL_BATCH: usize = 16;
/// Entries of the first completion queue: its ring of 32 KiB stays in a first-level cache.
pub const CQ_ENTRIES: u32 = 300;
/// Each further completion queue is so many times larger.
pub const CQ_GROWTH: u32 = 8;
/// Entries of the largest completion queue.
pub const CQ_MAX: u32 = 24_000;
/// Entries that one connection may fill: all its receives, and its signaled sends and READs.
pub const CQ_SHARE: usize = RECV_BUFFERS + MAX_SENDS / SIGNAL_EVERY as usize + WINDOW;
/// Buffers for keys that the server READs and pages that it WRITEs.
pub const SCRATCH_BUFFERS: usize = 4;
/// Bytes of such a buffer: the longest key, or a page with at least one such key.
pub const SCRATCH_BYTES: usize = 128 << 10;
/// Bytes cleaned between two turns when the log wants cleaning: some 20 us, what a request may wait behind it.
pub const CLEAN_SLICE: usize = 64 << 10;
/// The same while free segments are plenty: some 2 us, which nobody notices.
pub const TIDY_SLICE: usize = 4 << 10;
/// How often connections with unsignaled sends are asked to finish them, ns.
pub const MAINTENANCE_NS: u64 = 10_000_000;
/// Idle turns between looks at the clock.
pub const CLOCK_TURNS: u32 = 256;
/// Longest sleep, ns: looks for a request to end this often even if no wake-up came.
pub const MAX_SLEEP_NS: u64 = 100_000_000;
/// Keys of a LIST page found by one scan step, buckets: bounds one request's time.
pub const SCAN_BUCKETS: usize = 1 << 14;
/// A probe that hears nothing for so long is over, ns.
pub const PROBE_SILENCE_NS: u64 = 50_000_000;
/// Maintenance rounds without progress of a client's sends before it is given up: 2 s of not taking its replies.
pub const MAX_STALLS: u32 = 200;
