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
