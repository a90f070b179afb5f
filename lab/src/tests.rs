use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::limits::{MAX_LATENCY_NS, MIN_PAIRS};

#[test]
fn no_operations_make_a_summary_of_zeros() {
    assert_eq!(
        Latencies::new().summary(Duration::from_secs(1)),
        LatencySummary::default()
    );
    let mut one = Latencies::new();
    one.record_many(5, 0);
    assert_eq!(one.summary(Duration::ZERO), LatencySummary::default());
}

#[test]
fn what_lies_beyond_the_histogram_is_counted_and_its_maximum_kept() {
    let mut latencies = Latencies::new();
    latencies.record(0);
    latencies.record(3 * MAX_LATENCY_NS);
    let summary = latencies.summary(Duration::from_secs(2));
    assert_eq!((summary.ops, summary.max_ns), (2, 3 * MAX_LATENCY_NS));
    assert!((summary.ops_per_s - 1.0).abs() < 1e-9);
    latencies.clear();
    assert_eq!(
        latencies.summary(Duration::from_secs(2)),
        LatencySummary::default()
    );
}

proptest! {
    #[test]
    fn quantiles_are_those_of_the_sorted_latencies(
        values in prop::collection::vec(1_u64..10_000_000, 1..500),
        split in any::<prop::sample::Index>(),
    ) {
        // Two halves added up are the same as all in one.
        let (left, right) = values.split_at(split.index(values.len()));
        let (mut all, mut other) = (Latencies::new(), Latencies::new());
        left.iter().for_each(|v| all.record(*v));
        right.iter().for_each(|v| other.record(*v));
        all.add(&other);
        let mut sorted = values.clone();
        sorted.sort_unstable();
        let summary = all.summary(Duration::from_secs(1));
        prop_assert_eq!(summary.ops, values.len() as u64);
        prop_assert_eq!(summary.max_ns, *sorted.last().unwrap());
        for (share, got) in [(0.5, summary.p50_ns), (0.99, summary.p99_ns), (0.999, summary.p999_ns)] {
            let rank = ((share * values.len() as f64).ceil() as usize).clamp(1, values.len());
            let exact = sorted[rank - 1] as f64;
            prop_assert!((got as f64 - exact).abs() <= exact * 0.001 + 1.0, "{share}: {got}, {exact}");
        }
    }

    #[test]
    fn the_interval_holds_its_median_and_turns_round_with_the_ratio(
        pairs in prop::collection::vec((1.0_f64..1e4, 1.0_f64..1e4), MIN_PAIRS..200),
    ) {
        let ratio = paired_ratio(&pairs).unwrap();
        prop_assert!(ratio.low <= ratio.median && ratio.median <= ratio.high);
        let turned: Vec<_> = pairs.iter().map(|(a, b)| (*b, *a)).collect();
        let turned = paired_ratio(&turned).unwrap();
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
        prop_assert!(close(turned.median, 1.0 / ratio.median));
        prop_assert!(close(turned.low, 1.0 / ratio.high));
        prop_assert!(close(turned.high, 1.0 / ratio.low));
    }

    #[test]
    fn a_common_factor_of_both_sides_cancels(
        pairs in prop::collection::vec((1.0_f64..1e4, 1.0_f64..1e4, 0.1_f64..10.0), MIN_PAIRS..100),
    ) {
        let plain: Vec<_> = pairs.iter().map(|(a, b, _)| (*a, *b)).collect();
        let drifted: Vec<_> = pairs.iter().map(|(a, b, drift)| (a * drift, b * drift)).collect();
        let (plain, drifted) = (paired_ratio(&plain).unwrap(), paired_ratio(&drifted).unwrap());
        prop_assert!((plain.median / drifted.median - 1.0).abs() < 1e-9);
        prop_assert!((plain.low / drifted.low - 1.0).abs() < 1e-9);
    }

    #[test]
    fn pairs_match_in_floor_lie_near_and_use_each_slice_once(
        near_a in prop::collection::vec(any::<bool>(), 0..40),
        near_b in prop::collection::vec(any::<bool>(), 0..40),
    ) {
        // The latency carries the slice's place, the floor whether the cores were near.
        let slices = |near: &[bool]| -> Vec<Slice> {
            near.iter().enumerate().map(|(i, near)| Slice {
                p50_ns: i as f64,
                p99_ns: 0.0,
                floor_ns: if *near { 100.0 } else { 450.0 } * (1.0 + 0.01 * (i % 5) as f64),
            }).collect()
        };
        let (a, b) = (slices(&near_a), slices(&near_b));
        let pairs = pair_slices(&a, &b, 1.25);
        let (mut seen_a, mut seen_b) = (vec![], vec![]);
        for (left, right) in &pairs {
            prop_assert!((left.floor_ns > 300.0) == (right.floor_ns > 300.0));
            prop_assert!((left.p50_ns - right.p50_ns).abs() <= 4.0);
            seen_a.push(left.p50_ns as usize);
            seen_b.push(right.p50_ns as usize);
        }
        for seen in [&mut seen_a, &mut seen_b] {
            let pairs = seen.len();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), pairs);
        }
        // Neighbours that match are always paired.
        let matching = near_a.iter().zip(&near_b).filter(|(a, b)| a == b).count();
        prop_assert!(pairs.len() >= matching);
    }
}

#[test]
fn below_six_pairs_there_is_no_interval() {
    let pairs = vec![(1.0, 1.0); MIN_PAIRS];
    assert!(paired_ratio(&pairs).is_ok());
    assert_eq!(
        paired_ratio(&pairs[1..]),
        Err(TooFewPairs {
            have: MIN_PAIRS - 1
        })
    );
    let mut with_empty_slice = pairs;
    with_empty_slice[0].1 = 0.0;
    assert_eq!(
        paired_ratio(&with_empty_slice),
        Err(TooFewPairs {
            have: MIN_PAIRS - 1
        })
    );
}

#[test]
fn the_interval_is_that_of_the_tables() {
    // Ranks from tables of the sign test's 95% interval for the median.
    for (n, k) in [(6, 1), (8, 1), (9, 2), (20, 6), (50, 18), (100, 40)] {
        let pairs: Vec<_> = (1..=n).map(|i| (f64::from(i), 1.0)).collect();
        let ratio = paired_ratio(&pairs).unwrap();
        assert_eq!(
            (ratio.low, ratio.high),
            (f64::from(k), f64::from(n + 1 - k)),
            "n = {n}"
        );
    }
    // Far beyond where 2⁻ⁿ underflows: the normal approximation, n/2 - 0.98 √n.
    let pairs: Vec<_> = (1..=10_000).map(|i| (f64::from(i), 1.0)).collect();
    let ratio = paired_ratio(&pairs).unwrap();
    assert!((ratio.low - 4902.0).abs() <= 1.0, "{ratio:?}");
    assert!(ratio.contains(5000.5) && !ratio.contains(4900.0));
}

/// A fixed stream of uniform numbers in (0, 1) (SplitMix64), so that coverage is the same every time.
struct Uniform(u64);

impl Uniform {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64 + f64::EPSILON
    }
}

/// How often the interval of `n` pairs holds the true median ratio `truth`: both sides drift together,
/// and each has latencies with a long tail of its own.
fn coverage(n: usize, truth: f64, random: &mut Uniform) -> f64 {
    const RUNS: usize = 4000;
    let mut held = 0;
    for _ in 0..RUNS {
        let pairs: Vec<_> = (0..n)
            .map(|i| {
                let drift = 100.0 * (1.0 + (i as f64 / 7.0).sin().abs());
                // Exponential tails, the same law on both sides: the median of the ratio is 1.
                let (a, b) = (1.0 - random.next().ln(), 1.0 - random.next().ln());
                (truth * drift * a, drift * b)
            })
            .collect();
        held += usize::from(paired_ratio(&pairs).unwrap().contains(truth));
    }
    held as f64 / RUNS as f64
}

#[test]
fn the_interval_holds_the_truth_about_95_times_in_a_hundred() {
    let mut random = Uniform(2);
    for n in [6, 10, 25, 60, 200] {
        let share = coverage(n, 1.05, &mut random);
        // At least 95% by construction (less three standard errors of 4,000 runs); with few pairs the
        // ranks are coarse and it is more.
        let most = if n < 20 { 0.99 } else { 0.975 };
        assert!((0.94..=most).contains(&share), "n = {n}: {share}");
    }
}

#[test]
fn a_difference_that_is_there_is_seen() {
    // 1.1 against a spread of 1%: no interval of 30 pairs may hold 1.0.
    let mut random = Uniform(3);
    let pairs: Vec<_> = (0..30)
        .map(|_| {
            (
                110.0 * (1.0 + 0.01 * random.next()),
                100.0 * (1.0 + 0.01 * random.next()),
            )
        })
        .collect();
    let ratio = paired_ratio(&pairs).unwrap();
    assert!(!ratio.contains(1.0) && ratio.contains(1.1), "{ratio:?}");
}
