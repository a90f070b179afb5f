//! Every limit of the device, with its reason.

/// PDs per user: appliances use a handful; a thousand tenants still fit.
pub const MAX_PDS: usize = 1_024;
/// MRs per user: the key's index has 24 bits, a handle's 16.
pub const MAX_MRS: usize = 32_768;
/// Memory windows per user: as many as regions; their keys' indices come after those.
pub const MAX_MWS: usize = 32_768;
/// Places of a table that must be free before one is used again, while others were never used: keys and QPNs have 8 bits of
/// generation, so a stale one is right again only after 256 times as many.
pub const MIN_FREE: usize = 1_024;
/// Address handles per user: one for each peer of a server of datagrams, and a handle's index has 16 bits.
pub const MAX_AHS: usize = 65_536;
/// QPs of all users: the QPN's low 16 bits are the slot; 0 and 1 are reserved (IBA 1.4, 10.2.4.4).
pub const MAX_QPS_TOTAL: usize = 65_534;
/// First slot of an ordinary QP.
pub const FIRST_QP_SLOT: usize = 2;
/// Users at once: each costs the engine a look at one cache line.
pub const MAX_USERS: usize = 512;
/// Bytes of the longest message: 2^30, what `max_msg_sz` of common NICs is.
pub const MAX_MSG: u32 = 1 << 30;
/// READs and atomics outstanding per QP and direction; what rxe offers.
pub const MAX_RD_ATOMIC: u32 = 128;
/// Queues whose slots are polled directly: a model found no cost up to 16, and each is one line to read.
pub const HOT_SET: usize = 16;
/// A hot queue yields its place to another only after so many idle turns, so that more than [`HOT_SET`] busy
/// queues do not push each other out at every turn.
pub const HOT_IDLE_TURNS: u32 = 4_096;
/// Work requests of one queue before the next queue gets its turn.
pub const BATCH: u32 = 16;
/// Bytes copied for one queue before the next gets its turn: 64 KiB take some 10 us, the most that a small
/// request waits behind a large one.
pub const SLICE: u32 = 64 << 10;
/// Users whose doorbell summary is read in one turn: bounds a turn when there are very many.
pub const USERS_PER_TURN: usize = 16;
/// Turns between looks at timers (RNR, retry): some microseconds.
pub const TIMER_TURNS: u32 = 64;
/// Path MTU of the port, bytes.
pub const MAX_MTU: u32 = 4_096;
/// How long receives posted to a queue in error are looked for without a doorbell, ns; after that a doorbell is needed.
pub const ERROR_WATCH_NS: u64 = 1_000_000_000;
/// Turns between looks at the doorbell summaries while hot queues have work: a queue that is not hot waits so much longer.
pub const SUMMARY_TURNS: u32 = 8;
/// Turns between looks for packets while none come and looking takes a system call: some 0.4 us, four times the floor of a request
/// between two QPs of this host.
pub const WIRE_IDLE_TURNS: u32 = 64;
/// The same while packets come: beside queues of this host that are busy, and alone.
pub const WIRE_BUSY_TURNS: u32 = 4;
/// Turns without packets after which they count as not coming.
pub const WIRE_QUIET_TURNS: u32 = 4_096;
/// Datagrams of connection management that wait for the control thread: more than a host's worth of simultaneous connects; beyond
/// it the oldest goes, as the network might have lost it.
pub const MAX_MADS: usize = 4_096;
/// Bytes of one burst: what fits an IP packet, which a burst is for the kernel until it is cut up.
pub const MAX_BURST: usize = 65_000;
/// Entries beyond two for each QP that the heap of timers may have before those that count no more are swept out: so sweeping
/// costs little for each entry, however few QPs there are.
pub const STALE_TIMERS: usize = 64;
/// Copies of work requests kept for reuse.
pub const WR_POOL: usize = 1_024;
/// How long the acknowledgement of a message that was delivered to a user waits for the user's reply, to travel with it, ns: what
/// sending it alone would keep the engine from sending the reply.
pub const ACK_DELAY_NS: u64 = 4_000;
