//! Latencies and the comparison of two servers.

mod latency;
mod paired;

#[cfg(test)]
mod tests;

pub use latency::{Latencies, LatencySummary};
pub use paired::{Interval, Slice, TooFewPairs, pair_slices, paired_ratio};
