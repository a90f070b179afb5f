//! Every limit of measuring, with its reason.

/// Longest latency that a histogram tells apart, ns: a minute. Longer ones count as a minute; no
/// operation takes one, and a bounded range bounds the histogram's memory (about 200 KiB).
pub const MAX_LATENCY_NS: u64 = 60_000_000_000;

/// Significant decimal digits of a latency in a histogram: 0.1%, far below what two runs differ by.
pub const LATENCY_DIGITS: u8 = 3;

/// Fewest pairs for which an interval of 95% exists: with five, even the whole range of the pairs
/// holds the median with only 1 - 2 × 2⁻⁵ = 93.75%.
pub const MIN_PAIRS: usize = 6;

/// How far apart in time, counted in slices, two slices may lie and still be paired: the machine's
/// own drift over a second or so is what pairing is there to cancel.
pub const MAX_PAIR_DISTANCE: usize = 4;
