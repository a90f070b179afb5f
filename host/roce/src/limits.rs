//! Every limit of the transport, with its reason.

/// Request packets in flight per QP, at most. 128 packets of 4 KiB are 512 KiB: what a socket's default buffer with its
/// overhead doubled to holds, and several times the product of delay and bandwidth between two hosts.
pub const MAX_WINDOW: u32 = 128;
/// Window after a time-out: enough that a lost head is followed by packets that show the loss.
pub const MIN_WINDOW: u32 = 4;
/// Response packets that one READ request asks for. Longer READs are cut into several requests at multiples of this, so that
/// the requester paces what it gets and a lost response costs little. Boundaries never move: responders refuse a duplicate
/// READ that is not inside the original.
pub const READ_CHUNK: u32 = 64;
/// Messages begun and not acknowledged, per QP. Bounds what a QP keeps copies of.
pub const MAX_MESSAGES: usize = 128;
/// PSNs given out and not acknowledged: half of the half space that tells new from old, so that one message of 2^30 bytes at
/// an MTU of 256 still fits.
pub const MAX_PSN_SPAN: u32 = 1 << 22;
/// Packets between two requests for an acknowledgement inside a long message: a quarter of the window.
pub const ACK_REQUEST_INTERVAL: u32 = 32;
/// Packets that a responder takes before it acknowledges unasked.
pub const ACK_INTERVAL: u32 = 32;
/// The shortest wait before a silent peer is asked again, ns: several round trips between two hosts' engines.
pub const MIN_PROBE_NS: u64 = 100_000;
/// That wait before any round trip was measured, ns.
pub const FIRST_PROBE_NS: u64 = 5_000_000;
/// Its longest, ns, for QPs without an ACK timeout.
pub const MAX_PROBE_NS: u64 = 1_000_000_000;
