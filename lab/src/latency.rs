//! A distribution of latencies, and its summary.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::limits::{LATENCY_DIGITS, MAX_LATENCY_NS};

/// Latencies of one kind of operation, to 0.1%.
#[derive(Clone, Debug)]
pub struct Latencies {
    histogram: Histogram<u64>,
    /// The longest one exactly, also beyond what the histogram tells apart.
    max_ns: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

impl Latencies {
    /// No latencies yet.
    #[must_use]
    pub fn new() -> Self {
        // The bounds are constants that the crate accepts; a test creates one.
        let histogram = Histogram::new_with_bounds(1, MAX_LATENCY_NS, LATENCY_DIGITS)
            .expect("constant bounds are legal");
        Self {
            histogram,
            max_ns: 0,
        }
    }

    /// Counts one operation of `ns`.
    pub fn record(&mut self, ns: u64) {
        self.record_many(ns, 1);
    }

    /// Counts `ops` operations that took `ns` each: what a batch gives that was timed as a whole.
    pub fn record_many(&mut self, ns: u64, ops: u64) {
        if ops > 0 {
            self.histogram
                .saturating_record_n(ns.clamp(1, MAX_LATENCY_NS), ops);
            self.max_ns = self.max_ns.max(ns);
        }
    }

    /// Adds all of `other`.
    pub fn add(&mut self, other: &Self) {
        self.histogram
            .add(&other.histogram)
            .expect("all histograms have the same bounds");
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// Forgets all, and keeps the memory.
    pub fn clear(&mut self) {
        self.histogram.reset();
        self.max_ns = 0;
    }

    /// How many operations were counted.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.histogram.len()
    }

    /// The latency in ns that a share `quantile` (0 to 1) of operations did not exceed; 0 for none.
    #[must_use]
    pub fn quantile_ns(&self, quantile: f64) -> u64 {
        if self.ops() == 0 {
            return 0;
        }
        // The histogram gives the upper end of a cell, which may lie above the longest one counted.
        self.histogram
            .value_at_quantile(quantile)
            .min(self.max_ns.max(1))
    }

    /// The summary of operations that took `elapsed` in all.
    #[must_use]
    pub fn summary(&self, elapsed: Duration) -> LatencySummary {
        let ops = self.ops();
        let seconds = elapsed.as_secs_f64();
        LatencySummary {
            ops,
            ops_per_s: if seconds > 0.0 {
                ops as f64 / seconds
            } else {
                0.0
            },
            p50_ns: self.quantile_ns(0.5),
            p99_ns: self.quantile_ns(0.99),
            p999_ns: self.quantile_ns(0.999),
            max_ns: self.max_ns,
        }
    }
}

/// What a report says about one kind of operation. All zero where there was none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Operations measured.
    pub ops: u64,
    /// Operations per second of the time they were measured in.
    pub ops_per_s: f64,
    /// Median latency, ns.
    pub p50_ns: u64,
    /// 99th percentile, ns.
    pub p99_ns: u64,
    /// 99.9th percentile, ns.
    pub p999_ns: u64,
    /// The longest one, ns.
    pub max_ns: u64,
}
