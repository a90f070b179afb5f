//! Every limit of a soak, each with its reason.

use std::time::Duration;

/// How far the store's clock may be off the history's when objects expire, ns. The store reads its clock every few turns of its loop, and
/// a busy machine may stop its thread in between.
pub const CLOCK_SLACK_NS: u64 = 500_000_000;
/// Attempts to tell the store's clock: the one that took the least time counts.
pub const CLOCK_LOOKS: u32 = 8;

/// Longest time until an object expires, ns: several times [`CLOCK_SLACK_NS`], so that a store that hides objects too early, or never, is
/// found out; and short enough for objects to expire within the shortest round.
pub const LIFETIME_NS: u64 = 2_000_000_000;
/// Shortest time: with less nobody could tell whether the object had expired when it was written.
pub const SHORTEST_LIFETIME_NS: u64 = CLOCK_SLACK_NS + CLOCK_SLACK_NS / 4;
/// Keys whose objects expire, for each that everybody fights for: few writes each, or objects would be overwritten before they expire.
pub const FADING_FACTOR: u64 = 4;

/// Longest value under a key that clients fight for, bytes: far beyond what travels in a message.
pub const HOT_BYTES: u64 = 64 << 10;
/// A value that takes the server many slices, bytes: the longest that there is.
pub const HUGE_BYTES: u64 = 1 << 20;
/// Longest value that fills the store, bytes.
pub const FILL_BYTES: u64 = 2048;
/// Bytes of a key that does not fit a message.
pub const LONG_KEY_BYTES: usize = 1500;
/// Most elements of a multi-operation; more than those that execute once would not fit one request.
pub const MAX_ELEMENTS: u64 = 12;

/// Requests in flight that a client may be told to have: the library's most.
pub const MAX_IN_FLIGHT: usize = 16;

/// How long a client waits for an answer: far longer than any slice of cleaning and any pause of this command's making, so that its end means a
/// fault.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long a client tries to get a connection back.
pub const RECONNECT: Duration = Duration::from_secs(20);
/// RAM of a client: rings and buffers, staging for large values, memory for one-sided reads.
pub const CLIENT_RAM: u64 = 16 << 20;

/// How many times longer than wanted a soak may be that goes on until everything has happened: a busy machine's.
pub const LONGER: u32 = 10;

/// How often the supervisor looks after its processes.
pub const LOOK: Duration = Duration::from_millis(5);
/// A client that is started with less time than this would only be in the way.
pub const SHORTEST_LIFE: Duration = Duration::from_millis(300);
/// How long clients may take to end after their time; longer than their own patience with the store.
pub const ENDING: Duration = Duration::from_secs(60);
/// Longest time that a client is stopped: longer than the server waits for a sign of life of a silent one's device (2 s), which must not take
/// it for dead.
pub const LONG_STOP: Duration = Duration::from_millis(2500);
/// Longest of most stops: many times what freed memory rests (4 ms), which one-sided readers may not exceed.
pub const SHORT_STOP: Duration = Duration::from_millis(60);
/// Of so many stops one is a long one.
pub const LONG_STOPS: u64 = 12;

/// Keys that are written to fill the store between two looks at how full it is.
pub const FILL_BATCH: u64 = 256;

/// How long the store may take to serve, under TCG on a busy machine.
pub const BOOT: Duration = Duration::from_secs(60);
/// How long it may take to end: it gives its guest 5 s.
pub const STORE_ENDING: Duration = Duration::from_secs(15);
/// How long after its guest it may take to notice and report.
pub const DYING: Duration = Duration::from_secs(2);
/// Last lines of what it said that an error shows.
pub const LINES_SHOWN: usize = 20;
