//! The ratio of two servers measured in alternating slices, with an interval that assumes nothing
//! about how latencies are distributed.
//!
//! Slices that lie side by side in time see the same machine, so their ratio is free of its drift. The
//! pairs' ratios are taken as independent draws with some median. Each lies below that median with
//! probability ½, whatever their distribution, so the number that do is binomial, and the k-th
//! smallest and k-th largest ratio enclose the median with a probability that can be computed: the
//! sign test's interval. No randomness, no normality, outliers harmless.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::limits::{MAX_PAIR_DISTANCE, MIN_PAIRS};

/// The probability that the interval misses, on each side, at most.
const TAIL: f64 = 0.025;

/// A ratio and the interval that holds its true median with at least 95%.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The median of the pairs' ratios.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Interval {
    /// Whether `ratio` lies in the interval.
    #[must_use]
    pub fn contains(&self, ratio: f64) -> bool {
        (self.low..=self.high).contains(&ratio)
    }
}

/// Too few pairs of slices for an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "{have} comparable pairs of slices are too few for a 95% interval (needed: {MIN_PAIRS}): \
     measure for longer"
)]
pub struct TooFewPairs {
    /// Pairs there were.
    pub have: usize,
}

/// The median of `numerator / denominator` over pairs, with its 95% interval. Pairs with a side that
/// is not positive and finite (a slice without operations) are left out.
///
/// # Errors
/// [`TooFewPairs`] where no interval of 95% exists: below six pairs.
pub fn paired_ratio(pairs: &[(f64, f64)]) -> Result<Interval, TooFewPairs> {
    let usable = |x: f64| x.is_finite() && x > 0.0;
    let mut ratios: Vec<f64> = pairs
        .iter()
        .filter(|(a, b)| usable(*a) && usable(*b))
        .map(|(a, b)| a / b)
        .collect();
    ratios.sort_by(f64::total_cmp);
    let n = ratios.len();
    let k = order_statistic(n).ok_or(TooFewPairs { have: n })?;
    let middle = n / 2;
    let median = if n % 2 == 1 {
        ratios[middle]
    } else {
        // In logarithms, so that the ratio turned round has the median turned round.
        (ratios[middle - 1] * ratios[middle]).sqrt()
    };
    Ok(Interval {
        median,
        low: ratios[k - 1],
        high: ratios[n - k],
    })
}

/// The largest k for which the k-th smallest and k-th largest of `n` draws enclose the median with
/// at least 95%: P(X < k) ≤ 2.5% for X binomial(n, ½). `None` where even k = 1 does not.
fn order_statistic(n: usize) -> Option<usize> {
    // In logarithms: 2⁻ⁿ is no double any more beyond n = 1,074.
    let mut ln_term = -(n as f64) * std::f64::consts::LN_2;
    let mut below = 0.0;
    let mut k = 0;
    while k < n {
        below += ln_term.exp();
        if below > TAIL {
            break;
        }
        // C(n, k + 1) = C(n, k) (n - k) / (k + 1)
        ln_term += ((n - k) as f64).ln() - ((k + 1) as f64).ln();
        k += 1;
    }
    (k > 0).then_some(k)
}

/// One slice of measurement on one side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slice {
    /// Median latency within the slice, ns.
    pub p50_ns: f64,
    /// 99th percentile within the slice, ns.
    pub p99_ns: f64,
    /// Round trip of one cache line between the same two cores, measured within the slice, ns.
    pub floor_ns: f64,
}

/// Pairs slices of two sides that alternated in time: `a[i]` was followed or preceded by `b[i]`. Two
/// slices make a pair only if their floors differ by at most the factor `max_floor_ratio` (above 1):
/// otherwise the cores lay elsewhere and the ratio would compare machines, not servers. A slice whose
/// neighbour does not match takes the nearest unused one that does, up to four slices away; what is
/// left over is dropped. Each slice is used at most once.
#[must_use]
pub fn pair_slices(a: &[Slice], b: &[Slice], max_floor_ratio: f64) -> Vec<(Slice, Slice)> {
    let mut of_a = vec![None; a.len()];
    let mut used = vec![false; b.len()];
    // Nearest first over all slices, so that no slice takes the neighbour of another.
    for distance in 0..=MAX_PAIR_DISTANCE {
        for (i, left) in a.iter().enumerate() {
            if of_a[i].is_some() {
                continue;
            }
            let candidates = [i.checked_add(distance), i.checked_sub(distance)];
            let free =
                |j: &usize| *j < b.len() && !used[*j] && same_floor(left, &b[*j], max_floor_ratio);
            if let Some(j) = candidates.into_iter().flatten().find(free) {
                used[j] = true;
                of_a[i] = Some(j);
            }
        }
    }
    of_a.iter()
        .zip(a)
        .filter_map(|(j, left)| j.map(|j| (*left, b[j])))
        .collect()
}

fn same_floor(a: &Slice, b: &Slice, max_ratio: f64) -> bool {
    let ratio = a.floor_ns / b.floor_ns;
    ratio.is_finite() && ratio <= max_ratio && ratio >= 1.0 / max_ratio
}
