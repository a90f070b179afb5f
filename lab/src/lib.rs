//! Measuring two things against each other on a noisy machine.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `latency` | histograms of latencies and their summary |
//! | `paired` | the ratio of two sides that alternate in slices, with its 95% interval |
//! | `replace` | files that are there whole or not at all |
//! | [`values`] | sizes and times as users type and read them |
//! | [`limits`] | every limit, with its reason |

mod latency;
pub mod limits;
mod paired;
mod replace;
pub mod values;

#[cfg(test)]
mod tests;

pub use latency::{Latencies, LatencySummary};
pub use paired::{Interval, Slice, TooFewPairs, pair_slices, paired_ratio};
pub use replace::Replacement;

/// Middle value; of an even number the upper of the two in the middle.
///
/// # Panics
/// Without any value.
#[must_use]
pub fn median(values: &mut [f64]) -> f64 {
    let mid = values.len() / 2;
    *values.select_nth_unstable_by(mid, f64::total_cmp).1
}
