//! Every bound of the network, with its reason.

use core::time::Duration;

/// Buffers for frames that arrive. A window of 64 KiB is 45 frames of 1500 bytes; some connections at once fit.
pub const RX_BUFFERS: u16 = 128;
/// Buffers for frames that leave. A full one delays a frame, and loses none.
pub const TX_BUFFERS: u16 = 64;
/// Frames taken in at one poll before sockets may send: a sender faster than this guest must not starve them.
pub const FRAMES_PER_POLL: u32 = 64;
/// Bytes of an Ethernet header.
pub const ETHERNET_HEADER: usize = 14;
/// MTU without a word of the device: Ethernet's.
pub const DEFAULT_MTU: u16 = 1500;
/// Least MTU that IPv6 allows (RFC 8200, section 5).
pub const MIN_MTU: u16 = 1280;
/// Largest MTU: jumbo frames. Buffers are sized by it, and there are some two hundred.
pub const MAX_MTU: u16 = 9216;

/// Bytes of each of a connection's two buffers: the largest window without scaling.
pub const SOCKET_BUFFER: usize = 64 << 10;
/// Connections that wait to be accepted.
pub const BACKLOG: usize = 4;
/// A connection that nobody accepted and whose peer is silent is given up.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a connection that was closed without waiting may take to tell its peer.
pub const LINGER: Duration = Duration::from_secs(10);

/// Connections that may be closing at a time, at two buffers each; then the oldest is broken off.
pub const MAX_LEFTOVERS: usize = 16;

/// First of the local ports of outgoing connections (RFC 6335, section 6), and their number.
pub const FIRST_EPHEMERAL: u16 = 49_152;
/// See [`FIRST_EPHEMERAL`].
pub const EPHEMERAL: u16 = 16_384;

/// Addresses that a configuration may name, the one of DHCP included. With the link-local one of every card there are four, which
/// is what smoltcp is built for (`iface-max-addr-count-4`).
pub const MAX_ADDRESSES: usize = 3;
