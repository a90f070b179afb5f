//! Every limit of the carriers, with its reason.

use std::time::Duration;

/// UDP source ports of a carrier: enough for the hash of a multi-path network or of a NIC's receive queues to spread flows.
pub const SOURCE_PORTS: u16 = 8;
/// First UDP source port that RoCEv2 uses (IBA 1.4, A17.9.1: 0xC000 to 0xFFFF).
pub const FIRST_SOURCE_PORT: u16 = 0xC000;
/// Segments of one burst: what Linux takes in one superframe (`UDP_MAX_SEGMENTS`; 128 in newer kernels).
pub const BURST_SEGMENTS: usize = 64;
/// Bytes of the largest IP packet that Linux segments (`IP_MAX_MTU`); headers count.
pub const SUPERFRAME: usize = 65_520;
/// Bytes that one receive of a UDP socket may give: a superframe.
pub const DATAGRAM: usize = 65_536;
/// Datagrams of one receive call at most: 16 superframes are some 100 us of work, and a MiB of buffer.
pub const RECEIVE_BATCH: usize = 16;
/// Bytes asked for a receive socket's buffer: the windows of some dozen busy QPs, at the kernel's accounting of twice the bytes.
pub const RECEIVE_BUFFER: usize = 16 << 20;
/// Bytes asked for a send socket's buffer: some 30 superframes in a slow NIC's queue.
pub const SEND_BUFFER: usize = 4 << 20;
/// Bytes of a slot of a receive ring: the power of two that holds a superframe and its headers.
pub const SLOT_BYTES: usize = 128 << 10;
/// Slots of a receive ring: a peer without segmentation offload fills one a packet, and sends windows of 128 and more.
pub const RING_SLOTS: usize = 256;
/// Slots of the second ring, for peers on this machine when the address lies on another interface than `lo`.
pub const LOOPBACK_SLOTS: usize = 64;
/// Slots below which a ring is of no use; memory is asked for in halves down to here.
pub const MIN_SLOTS: usize = 16;
/// Slots handed over by one call of `receive` at most, so that the driver gets round to sending acknowledgements.
pub const SLOTS_PER_RECEIVE: usize = 16;
/// Destinations whose next hop is remembered: some thousand peers; each is 100 bytes.
pub const NEXT_HOPS: usize = 4_096;
/// How long a resolved next hop is used before the kernel is asked again: an ARP entry is good for 15 to 45 s there.
pub const NEXT_HOP_FRESH: Duration = Duration::from_secs(5);
/// How long between two questions about a destination whose neighbour is being resolved: an ARP answer takes well under that.
pub const NEXT_HOP_RETRY: Duration = Duration::from_millis(1);
/// How long a destination's neighbour is waited for before packets to it count as lost.
pub const NEXT_HOP_PATIENCE: Duration = Duration::from_millis(20);
/// How long between two questions about a destination that cannot be reached.
pub const NEXT_HOP_DEAD: Duration = Duration::from_millis(100);
/// How long between two datagrams that ask the kernel to resolve or verify a neighbour; the kernel repeats ARP by itself.
pub const NUDGE_EVERY: Duration = Duration::from_secs(1);
/// How long an interface's MTU is believed.
pub const MTU_FRESH: Duration = Duration::from_secs(1);
/// How often an idle ring's socket is asked for a pending error (interface down), in empty looks: the question costs 0.3 us.
pub const LOOKS_PER_ERROR_CHECK: u32 = 1_024;
/// How long an IPv6 address that the kernel still tests for duplicates is waited for; it takes 1 to 2 s.
pub const TENTATIVE_WAIT: Duration = Duration::from_secs(4);
/// Bytes of a recording that may wait for the disk; beyond that packets are left out of the file and counted.
pub const PCAP_PENDING: usize = 64 << 20;
/// Bytes that wake the recording's writer.
pub const PCAP_CHUNK: usize = 1 << 20;
/// How often a recording reaches the disk at least.
pub const PCAP_FLUSH: Duration = Duration::from_secs(1);
/// How long a taken port is tried again: one whose owner just ended, or is a child between `fork` and `exec`, becomes free at once,
/// which on a busy machine may take some scheduler slices.
pub const PORT_WAIT: Duration = Duration::from_millis(500);
