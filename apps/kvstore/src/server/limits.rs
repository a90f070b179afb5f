//! Every limit of the server, with its reason.

/// A group of connections that share a completion queue and a shared receive queue. Each client of a group may have `window`
/// requests outstanding, and the group has a receive buffer for each of them: whatever the others do, no request of a client that
/// keeps to its window finds none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tier {
    /// Connections of a group.
    pub clients: usize,
    /// Requests that each may have outstanding.
    pub window: usize,
    /// Work requests of one connection that may be unfinished; no further request of it is taken up beyond.
    pub sends: usize,
    /// A completion is asked for every so many sends: often enough to free slots and unpin segments, rare enough to cost nothing.
    pub signal_every: u32,
}

impl Tier {
    /// Receive buffers: all windows, and a batch that is not posted again yet.
    #[must_use]
    pub const fn receives(&self) -> usize {
        self.clients * self.window + REPOST_BATCH
    }

    /// Completions that may wait: all receives; of each client its signaled sends, a flush, and READs; and what scratch buffers hold.
    #[must_use]
    pub const fn completions(&self) -> u32 {
        let each = self.sends.div_ceil(self.signal_every as usize) + 1 + self.window;
        (self.receives() + self.clients * each + LARGE_BUFFERS + SMALL_BUFFERS) as u32
    }

    /// Bytes that a whole group takes: receive buffers, completions, receive ring, send rings.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        let receives = self.receives() * (crate::proto::MAX_REQUEST_BYTES + 64);
        let completions = (self.completions() as usize * 5 / 4 + 1).next_power_of_two() * 64;
        receives + completions + self.clients * self.send_ring_bytes()
    }

    /// Bytes of a connection's send ring: two slots for each work request.
    const fn send_ring_bytes(&self) -> usize {
        (2 * (self.sends + self.window)).next_power_of_two() * 64
    }
}

/// The first groups, for as many clients as machines have cores: one so small that its rings stay in a first-level cache, two that
/// fit beside the store of the smallest guest. With a window of 16 the wire's latency is hidden.
pub const FIRST_TIERS: [Tier; 3] = [of_16(6), of_16(26), of_16(32)];

const fn of_16(clients: usize) -> Tier {
    Tier {
        clients,
        window: 16,
        sends: 48,
        signal_every: 16,
    }
}

/// All further groups: 11 KiB of receive buffers and 1 KiB of send ring a client, so that 1,000 fit a small guest. With so many
/// clients two requests of each keep a server busy.
pub const LAST_TIER: Tier = Tier {
    clients: 240,
    window: 2,
    sends: 6,
    signal_every: 2,
};

/// The group that comes after `groups` others.
#[must_use]
pub const fn tier(groups: usize) -> Tier {
    if groups < FIRST_TIERS.len() {
        FIRST_TIERS[groups]
    } else {
        LAST_TIER
    }
}

/// Bytes of registered memory that a server for so many connections takes beside the store. (Besides, each takes some 1 KiB of heap, and
/// each lease 3 KiB.)
#[must_use]
pub const fn memory_for(connections: usize) -> usize {
    let (mut bytes, mut room, mut groups) = (SCRATCH_REGION_BYTES, 0, 0);
    while room < connections {
        let tier = tier(groups);
        // Large regions begin at large pages.
        bytes += tier.bytes() + hyv_verbs::limits::HUGE;
        room += tier.clients;
        groups += 1;
    }
    bytes
}

/// Receives reposted at once: one more line of the ring for several receives.
pub const REPOST_BATCH: usize = 8;
/// Connections at once, by default.
pub const MAX_CONNECTIONS: usize = 1_024;
/// Completions taken from a queue in one go.
pub const POLL_BATCH: usize = 16;
/// Large scratch buffers: keys that the server READs, pages and results that it WRITEs, elements of multi-operations.
pub const LARGE_BUFFERS: usize = 12;
/// Bytes of one: the longest key, or a page with at least one such key and an eager value.
pub const LARGE_BYTES: usize = 128 << 10;
/// Large scratch buffers that one client may hold at a time: two multi-operations, so that nobody takes them all.
pub const LARGE_PER_CLIENT: u32 = 4;
/// Small scratch buffers: replies that are put together and do not fit a work request.
pub const SMALL_BUFFERS: usize = 32;
/// Bytes of one.
pub const SMALL_BYTES: usize = crate::proto::MAX_REPLY_BYTES;
/// Bytes of all scratch buffers.
pub const SCRATCH_REGION_BYTES: usize = LARGE_BUFFERS * LARGE_BYTES + SMALL_BUFFERS * SMALL_BYTES;
/// Bytes of a value that arrived by address which are summed before others have their turn: some 10 us.
pub const SUM_SLICE: usize = 64 << 10;
/// What making one of them current is charged, in bytes to sum.
pub const SUM_LEAST: usize = 1 << 10;
/// Leases renewed in one round of maintenance, each a small write: those of as many clients as a server takes in 16 rounds, within the time
/// that [`LEASE_LEFT_NS`] leaves.
pub const RENEWALS_PER_ROUND: usize = 64;
/// Bytes cleaned between two turns at most, where as much is overwritten, and on behalf of one write: some 80 us where objects are small.
pub const CLEAN_SLICE: usize = 64 << 10;
/// Bytes cleaned between two turns at least: some 5 us, what a read may wait behind it.
pub const TIDY_SLICE: usize = 4 << 10;
/// Bytes cleaned for each byte that was overwritten while free segments are scarce: at 90% of a small log live it takes 9, what is
/// only looked at included.
pub const CLEANED_PER_DEAD: usize = 16;
/// How often connections with unsignaled sends are asked to finish them, ns.
pub const MAINTENANCE_NS: u64 = 10_000_000;
/// Idle turns between looks at the clock by the serving loop.
pub const CLOCK_TURNS: u32 = 256;
/// Turns for which a time read from the clock serves: reading it takes some 15 ns. A turn takes 30 us at most, so the time is
/// never older than the store allows ([`crate::limits::QUARANTINE_MARGIN`]).
pub const TIME_TURNS: u32 = 8;
/// Longest sleep, ns: looks for a request to end this often even if no wake-up came.
pub const MAX_SLEEP_NS: u64 = 100_000_000;
/// Buckets searched for one page of an enumeration: bounds one request's time, also in an empty table.
pub const SCAN_BUCKETS: usize = 1 << 10;
/// Buckets searched between two looks at whether that is enough.
pub const SCAN_STEP: usize = 64;
/// A page is full with so many bytes, unless its first object is longer: some 250 small objects, 30 us.
pub const PAGE_BYTES: usize = 32 << 10;
/// Elements of a multi-operation executed before others have their turn: some 5 us.
pub const SLICE_ELEMENTS: usize = 32;
/// Bytes of elements and results after which the same happens.
pub const SLICE_BYTES: usize = 32 << 10;
/// How long a write waits for room that is being made before its client is told to ask again, ns: the cleaner makes a segment's worth in
/// less, and only its own connection waits behind it.
pub const BUSY_PATIENCE_NS: u64 = 100_000_000;
/// A probe that hears nothing for so long is over, ns.
pub const PROBE_SILENCE_NS: u64 = 50_000_000;
/// A client whose oldest reply is not taken for so long is given up, ns: long enough for a machine that stands still for some seconds, or a
/// network that loses every packet several times in a row. Only time in which the server itself ran counts.
pub const STUCK_NS: u64 = 5_000_000_000;
/// Time between two rounds of maintenance that counts as time in which the server ran, ns at most: twice its longest sleep. Of a round that
/// comes later the rest is time in which it did not: its processor did something else.
pub const LONGEST_ROUND_NS: u64 = 2 * MAX_SLEEP_NS;
/// A client that was not heard for so long is asked for a sign of life, ns: a WRITE of no bytes, which its device answers.
pub const KEEPALIVE_NS: u64 = 2_000_000_000;
/// Clients asked for that in one round: all at once would be more packets than a carrier's receive ring has slots (256), and a thousand
/// have their turn in 16 rounds.
pub const KEEPALIVES_PER_ROUND: usize = 64;
/// Until each of as many clients as a server takes had its turn, ns, if nothing else keeps it awake.
const KEEPALIVE_TURN_NS: u64 = MAX_CONNECTIONS.div_ceil(KEEPALIVES_PER_ROUND) as u64 * MAX_SLEEP_NS;
/// Length of a lease, ns. It is renewed while the client's connection lives, when half of it is over.
pub const LEASE_NS: u64 = 30_000_000_000;
/// How long results are kept after a connection ended at least, ns: time to connect again. Only when as many clients have leases as may,
/// those that left first lose theirs earlier.
pub const LEASE_LEFT_NS: u64 = LEASE_NS / 2 - KEEPALIVE_NS;

const _: () = assert!(FIRST_TIERS[0].completions() * 5 / 4 < 512);
// A client that is gone is found before its results may be forgotten.
const _: () = assert!(KEEPALIVE_NS + KEEPALIVE_TURN_NS + STUCK_NS < LEASE_LEFT_NS);
const _: () = assert!(KEEPALIVE_TURN_NS < KEEPALIVE_NS);
