//! Every limit of connection management, with its reason.

/// Identifiers per user: one for each queue pair that a user may have, and some hundreds of listeners.
pub const MAX_IDS: usize = hyv_abi::window::MAX_QPS + 1024;
/// Largest backlog: what the ABI promises; each waiting request costs the listener's user one identifier.
pub const MAX_BACKLOG: u32 = 1024;
/// First port that a bind to port 0 is given; the range is the upper half of the port space, clear of named services.
pub const FIRST_EPHEMERAL_PORT: u16 = 0x8000;
/// Time for the listener's side to answer a request: InfiniBand's usual REQ (15 retries of 1.07 s) gives up after 16 s.
pub const CONNECT_TIMEOUT_NS: u64 = 16_000_000_000;
/// Time for the connecting side to establish once its request is accepted, for the same reason.
pub const ESTABLISH_TIMEOUT_NS: u64 = 16_000_000_000;

/// Time that a peer on another host gets for its answer, as a 5-bit code (4.096 us x 2^n): 0.54 s. A lost MAD costs that much;
/// Linux gives 4.3 s (20). Applications that need longer are covered by MRA.
pub const RESPONSE_TIMEOUT: u8 = 17;
/// Retries of a MAD: all that the message's 4 bits can say, as Linux does. Together 8.6 s until a peer counts as unreachable.
pub const MAX_CM_RETRIES: u8 = 15;
/// Shortest response time-out of a peer that is believed (33 ms): a peer that says less would have its answers repeated in a storm.
pub const MIN_PEER_TIMEOUT: u8 = 13;
/// Longest response time-out of a peer that is believed (4.3 s, what Linux says): a peer may not put off its own death for hours.
pub const MAX_PEER_TIMEOUT: u8 = 20;
/// How long the answer to a request may take once we have asked for patience: 17 s. We ask again after half of it, as long as the
/// application thinks; Linux hears only the first time, and with its 15 retries waits five minutes.
pub const MRA_REQ_TIMEOUT: u8 = 22;
/// The same for making a connection ready that was accepted: 4.3 s. Shorter, because if the RTU that follows gets lost, that is
/// how long the peer waits before it asks again.
pub const MRA_REP_TIMEOUT: u8 = 20;
/// Longest patience that a peer gets for asking (69 s, what Linux asks for); with all retries some 17 minutes.
pub const MAX_PEER_SERVICE_TIMEOUT: u8 = 24;
/// How long an ended conversation is remembered: as long as the slowest peer that is believed waits before it repeats something.
pub const TIME_WAIT_NS: u64 = response_ns(MAX_PEER_TIMEOUT);
/// Conversations without an identifier, all users together: each has a MAD to repeat (some 400 bytes), and is gone after 8.6 s.
pub const MAX_LINGERING: usize = 4096;
/// ACK timeout of a connection whose user names none: 0.54 s. With 7 retries a peer whose machine stands still for four seconds, or whose
/// packets meet a full queue as often, keeps its connections. A short one would find losses no sooner: a device of ours asks a silent peer long
/// before, and losses with packets behind them are NAKed at once.
pub const ACK_TIMEOUT: u8 = 17;
/// How long this device takes to acknowledge, as a 5-bit code: 2 ms, one sleep of the engine's thread on a busy machine.
pub const TARGET_ACK_DELAY: u8 = 9;

/// The time that a 5-bit code stands for, ns.
#[must_use]
pub const fn response_ns(code: u8) -> u64 {
    4096 << code
}
