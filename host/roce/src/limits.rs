//! Limits, each with its reason.

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
