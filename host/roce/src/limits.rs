//! Every limit, with its reason: first the transport's, then those of reading captures.

/// Request packets in flight per QP, at most. 128 packets of 4 KiB are 512 KiB: what a socket's default buffer with its
/// overhead doubled to holds, and several times the product of delay and bandwidth between two hosts.
pub const MAX_WINDOW: u32 = 128;
/// Window after a time-out: enough that a lost head is followed by packets that show the loss.
pub const MIN_WINDOW: u32 = 4;
/// Round trips after which the rate of a path begins to be forgotten: enough that one between two losses is among them.
pub const RATE_SAMPLES: u32 = 16;
/// Round trips after which the shortest begins to be forgotten. It shows only while queues are empty, so it is kept for long: paths change
/// seldom.
pub const RTT_SAMPLES: u32 = 1_024;
/// Response packets that one READ request asks for. Longer READs are cut into several requests at multiples of this, so that
/// the requester paces what it gets and a lost response costs little. Boundaries never move: responders refuse a duplicate
/// READ that is not inside the original.
pub const READ_CHUNK: u32 = 64;
/// Messages begun and not acknowledged, per QP. Bounds what a QP keeps copies of.
pub const MAX_MESSAGES: usize = 128;
/// PSNs given out and not acknowledged: half of the half space that tells new from old, so that one message of 2^30 bytes at
/// an MTU of 256 still fits.
pub const MAX_PSN_SPAN: u32 = 1 << 22;
/// Acknowledgements asked for inside a long message, per window: with fewer, a window that just fills the path would wait for its last
/// packet's before the next one goes.
pub const ACK_REQUESTS: u32 = 4;
/// Packets that a responder takes before it acknowledges unasked.
pub const ACK_INTERVAL: u32 = 32;
/// The shortest wait before a silent peer is asked with one packet, ns: a few round trips between two hosts' engines. Asking in vain costs
/// that packet and an acknowledgement.
pub const MIN_ASK_NS: u64 = 20_000;
/// The shortest wait before everything goes to a silent peer again, ns: several round trips between two hosts' engines.
pub const MIN_PROBE_NS: u64 = 100_000;
/// That wait before any round trip was measured, ns.
pub const FIRST_PROBE_NS: u64 = 5_000_000;
/// Its longest, ns, for QPs without an ACK timeout.
pub const MAX_PROBE_NS: u64 = 1_000_000_000;
/// Waits of different connections differ by up to one in so many. A thousand that lost something at one moment come 0.1 ms apart with an ACK
/// timeout of 0.5 s, several times what a packet costs, and one that is alone waits hardly longer. (IBA 1.4, 9.7.6.1.3 allows four times the
/// ACK timeout.)
pub const MAX_APART: u64 = 4;

/// Largest record of a capture file, in bytes. tcpdump's own largest snap length is 262,144; a file that asks for more is damaged.
pub const CAPTURE_RECORD_MAX: usize = 1 << 18;

/// Largest block of a pcapng file, in bytes: a packet, or name resolution and decryption secrets, which are longer.
pub const CAPTURE_BLOCK_MAX: usize = 1 << 24;

/// Interfaces that a pcapng file may describe. `tcpdump -i any` and Wireshark write one for each device.
pub const CAPTURE_INTERFACES_MAX: usize = 1 << 12;

/// A jump of more PSNs than this is a queue pair that has started anew, not loss: no sender has so many packets outstanding.
pub const PSN_RESTART: i32 = 1 << 15;

/// Gaps of one stream of packets that are remembered at a time; the oldest gives way. Each takes 8 bytes, and a sender goes back at its first.
pub const GAPS_MAX: usize = 64;

/// Streams that an analysis follows, over all queue pairs: some 200 MiB. Packets of further ones are counted and not followed.
pub const STREAMS_MAX: usize = 1 << 20;

/// Packets that a finding names as examples.
pub const EXAMPLES_MAX: usize = 5;

/// Queue pairs between two hosts that are looked at to find whose answer a packet is. Looking at all would make a large capture of unpaired
/// answers take quadratic time.
pub const PARTNERS_MAX: usize = 1 << 12;
