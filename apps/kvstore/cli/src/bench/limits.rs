//! Every limit of measuring a store, each with its reason.

use std::time::Duration;

/// What names of the measurement's records begin with, so that they are told from a user's own.
pub const KEY_PREFIX: &[u8] = b"bench:";

/// Digits after it: 56 bits, which 32-bit numbers of records scramble into without a collision.
pub const HEX_DIGITS: usize = 14;

/// Bytes of a name: with them the request for a value still comes within a completion.
pub const KEY_BYTES: usize = KEY_PREFIX.len() + HEX_DIGITS;

/// Most records: their numbers, and those added by inserts, are 32-bit.
pub const MAX_RECORDS: u32 = 1 << 31;

/// Records where none are asked for: more than caches hold of 1 KB values, and loaded within seconds.
pub const DEFAULT_RECORDS: u32 = 100_000;

/// Share of a store's capacity that records without `--records` fill at most: overwriting needs room.
pub const DEFAULT_FILL: f64 = 0.4;

/// Shares of the log that workload `overwrite` fills where none are asked for, per cent: the first is what the others are set against.
pub const DEFAULT_UTILISATIONS: [u8; 3] = [30, 80, 90];

/// Share of the log that is filled where latency beside a busy cleaner is measured, per cent.
pub const DEFAULT_TAIL_UTILISATION: u8 = 80;

/// Highest share that may be asked for, per cent: beyond, no store has room for the segments that its cleaner works with.
pub const MAX_UTILISATION: u8 = 96;

/// Memory of a guest whose log is filled to some share: 60 segments or so, and more than caches hold.
pub const FILLED_MEMORY: u64 = 512 << 20;

/// How often the log is written over before overwriting is measured: after once, what the first fill left behind is gone.
pub const TURN_OVERS: f64 = 1.5;

/// Requests under way of workload `overwrite` where none are asked for.
pub const OVERWRITE_IN_FLIGHT: u8 = 16;

/// Longest scan, records (workload E: uniform from 1).
pub const MAX_SCAN: u8 = 100;

/// Connections at once.
pub const MAX_CLIENTS: u16 = 64;

/// Length of a slice: short against the machine's own drift.
pub const SLICE: Duration = Duration::from_millis(80);

/// Operations that are drawn for a slice before it starts, at least: also the slowest server does some.
pub const MIN_PREPARED: usize = 1 << 12;

/// At most: 8 bytes each, read in order, they leave the caches to the store.
pub const MAX_PREPARED: usize = 1 << 21;

/// Operations before those that count: they refill caches and predictors.
pub const WARM_UP: usize = 500;

/// Operations whose mean counts as one sample for ratios, one at a time: at least some 10 us, so that the clock's tick does
/// not show.
pub const BATCH: usize = 64;

/// Rounds of the floor's ping-pong at either end of a slice, after as many to warm up.
pub const FLOOR_ROUNDS: u32 = 2_000;

/// Slices whose floors before and after differ by more take no part in ratios: the machine changed in between.
pub const STEADY: f64 = 1.25;

/// Slices are paired when their floors differ by no more: else the cores lay elsewhere.
pub const SAME_FLOOR: f64 = 1.2;

/// How long a server may be silent.
pub const SILENCE: Duration = Duration::from_secs(30);

/// Places that a one-sided client remembers for each record: with 4, of eight records looked up at random seven keep theirs.
pub const LOCATIONS_PER_RECORD: usize = 4;

/// Most places that it remembers: 128 MiB of them.
pub const MAX_LOCATIONS: usize = 1 << 22;
