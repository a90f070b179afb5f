//! Which record is next: the request distributions of YCSB, and names of records.

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use rand_distr::{Distribution as _, Zipf};

use super::limits::{HEX_DIGITS, KEY_BYTES, KEY_PREFIX};

/// Exponent of the zipfian distributions (Cooper et al., SoCC 2010, section 5.1).
pub const THETA: f64 = 0.99;

/// How often a draw beyond the records that exist is made again, before one is taken from those that do.
const REDRAWS: u32 = 100;

/// Randomness that a seed replays.
#[derive(Debug)]
pub struct Random(SmallRng);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    /// Uniform in 0..`n`; `n` is positive.
    pub fn below(&mut self, n: u32) -> u32 {
        self.0.random_range(0..n)
    }

    /// Uniform in [0, 1).
    pub fn share(&mut self) -> f64 {
        self.0.random()
    }
}

/// How requests are spread over records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Each record alike.
    Uniform,
    /// A few records are asked for most; which ones has nothing to do with their age.
    Zipfian,
    /// As zipfian, the newest record the most popular.
    Latest,
}

/// Draws records.
#[derive(Debug)]
pub struct Chooser {
    spread: Spread,
    /// Of ranks: 1 is the most popular.
    ranks: Zipf<f64>,
    /// Ranks there are.
    span: u32,
    scatter: Scatter,
}

impl Chooser {
    /// For `records` that exist, and `reserve` that may be added; both together fit 32 bits.
    ///
    /// A zipfian chooser spans the reserve too, so that popularity does not move when records are added (as YCSB does it).
    #[must_use]
    pub fn new(spread: Spread, records: u32, reserve: u32) -> Self {
        let span = match spread {
            Spread::Zipfian => records.saturating_add(reserve),
            Spread::Uniform | Spread::Latest => records,
        }
        .max(1);
        Self {
            spread,
            ranks: zipf(span),
            span,
            scatter: Scatter::over(span),
        }
    }

    /// A record below `count`, which is positive: how many exist.
    pub fn draw(&mut self, random: &mut Random, count: u32) -> u32 {
        match self.spread {
            Spread::Uniform => random.below(count),
            Spread::Latest => {
                if self.span != count {
                    (self.span, self.ranks) = (count, zipf(count));
                }
                count - 1 - self.rank(random).min(count - 1)
            }
            Spread::Zipfian => {
                for _ in 0..REDRAWS {
                    let record = self.scatter.place(self.rank(random));
                    if record < count {
                        return record;
                    }
                }
                random.below(count)
            }
        }
    }

    /// From 0, the most popular.
    fn rank(&self, random: &mut Random) -> u32 {
        self.ranks.sample(&mut random.0) as u32 - 1
    }
}

fn zipf(n: u32) -> Zipf<f64> {
    Zipf::new(f64::from(n), THETA).expect("at least one rank, and a positive exponent")
}

/// Spreads neighbouring ranks over all records, each to another: popular records are of any age.
#[derive(Clone, Copy, Debug)]
struct Scatter {
    n: u64,
    step: u64,
}

impl Scatter {
    fn over(n: u32) -> Self {
        let n = u64::from(n);
        // A step near the golden ratio keeps neighbours apart; without a common divisor it visits all.
        let mut step = ((n as f64 * 0.618_033_988_749_895) as u64).max(1);
        while gcd(step, n) != 1 {
            step += 1;
        }
        Self { n, step }
    }

    fn place(&self, rank: u32) -> u32 {
        ((u64::from(rank) * self.step + self.n / 2) % self.n) as u32
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Name of record `index`: [`KEY_PREFIX`] and hexadecimal digits that follow no order. Different for different records.
#[must_use]
#[inline]
pub fn key(index: u32) -> [u8; KEY_BYTES] {
    let mut name = [0; KEY_BYTES];
    name[..KEY_PREFIX.len()].copy_from_slice(KEY_PREFIX);
    let digits = hex(scramble(index) << (64 - 4 * HEX_DIGITS));
    name[KEY_PREFIX.len()..].copy_from_slice(&digits[..HEX_DIGITS]);
    name
}

/// Where a scan that begins at record `index` starts among all 64-bit positions.
#[must_use]
pub fn position(index: u32) -> u64 {
    scramble(index) << (64 - 4 * HEX_DIGITS)
}

/// 56 bits in which every bit depends on all of `index`; a bijection, since odd factors and right shifts can be undone.
fn scramble(index: u32) -> u64 {
    const MASK: u64 = (1 << (4 * HEX_DIGITS)) - 1;
    let mut x = (u64::from(index) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) & MASK;
    x ^= x >> 28;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9) & MASK;
    x ^= x >> 28;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb) & MASK;
    x ^ (x >> 28)
}

/// The sixteen digits of `x`.
#[inline]
fn hex(x: u64) -> [u8; 16] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut out = [0; 16];
    for (pair, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(x.to_be_bytes()) {
        *pair = [
            DIGITS[usize::from(byte >> 4)],
            DIGITS[usize::from(byte & 15)],
        ];
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const DRAWS: u32 = 2_000_000;

    /// Counts of [`DRAWS`] draws over `n` records.
    fn counts(spread: Spread, n: u32, seed: u64) -> Vec<u32> {
        let (mut chooser, mut random) = (Chooser::new(spread, n, 0), Random::new(seed));
        let mut counts = vec![0; n as usize];
        for _ in 0..DRAWS {
            counts[chooser.draw(&mut random, n) as usize] += 1;
        }
        counts
    }

    /// Chi-square of counts against probabilities, in standard deviations from its mean.
    fn deviation(counts: &[u32], probability: impl Fn(usize) -> f64) -> f64 {
        let chi: f64 = counts
            .iter()
            .enumerate()
            .map(|(i, &seen)| {
                let expected = probability(i) * f64::from(DRAWS);
                (f64::from(seen) - expected).powi(2) / expected
            })
            .sum();
        let freedom = counts.len() as f64 - 1.0;
        (chi - freedom) / (2.0 * freedom).sqrt()
    }

    /// Probability of a rank, from 0: the definition.
    fn exact(n: u32) -> impl Fn(usize) -> f64 {
        let sum: f64 = (1..=n).map(|r| f64::from(r).powf(-THETA)).sum();
        move |rank| (rank as f64 + 1.0).powf(-THETA) / sum
    }

    const SEEDS: [u64; 3] = [1, 0x5eed, 0xdead_beef_0000_0001];

    #[test]
    fn zipfian_has_the_exact_probabilities_of_its_ranks() {
        for (n, seed) in [10, 1_000, 10_000].into_iter().zip(SEEDS) {
            let (counts, exact) = (counts(Spread::Zipfian, n, seed), exact(n));
            let scatter = Scatter::over(n);
            let by_rank: Vec<u32> = (0..n)
                .map(|rank| counts[scatter.place(rank) as usize])
                .collect();
            let off = deviation(&by_rank, &exact);
            assert!(off.abs() < 5.0, "{n} records, seed {seed}: {off}");
            // The same counts are not those of another exponent: the test can fail.
            let other: f64 = (1..=n).map(|r| f64::from(r).powf(-0.9)).sum();
            let off = deviation(&by_rank, |r| (r as f64 + 1.0).powf(-0.9) / other);
            assert!(off > 50.0, "{n} records, seed {seed}: {off}");
        }
    }

    #[test]
    fn latest_is_zipfian_from_the_newest() {
        for (n, seed) in [7, 500, 10_000].into_iter().zip(SEEDS) {
            let exact = exact(n);
            let off = deviation(&counts(Spread::Latest, n, seed), |i| {
                exact(n as usize - 1 - i)
            });
            assert!(off.abs() < 5.0, "{n} records, seed {seed}: {off}");
        }
    }

    #[test]
    fn uniform_is() {
        for (n, seed) in [1, 3, 10_000].into_iter().zip(SEEDS) {
            let counts = counts(Spread::Uniform, n, seed);
            if n == 1 {
                assert_eq!(counts, [DRAWS]);
                continue;
            }
            let off = deviation(&counts, |_| 1.0 / f64::from(n));
            assert!(off.abs() < 5.0, "{n} records, seed {seed}: {off}");
        }
    }

    #[test]
    fn latest_follows_records_that_are_added() {
        let (mut chooser, mut random) = (Chooser::new(Spread::Latest, 100, 50), Random::new(9));
        for count in 100..150 {
            let newest = (0..2_000)
                .filter(|_| chooser.draw(&mut random, count) == count - 1)
                .count() as f64
                / 2_000.0;
            let want = exact(count)(0);
            let spread = 5.0 * (want * (1.0 - want) / 2_000.0).sqrt();
            assert!((newest - want).abs() < spread, "{count}: {newest}, {want}");
        }
    }

    /// Popularity stays where it was while records are added, and nothing that does not exist is drawn.
    #[test]
    fn zipfian_does_not_move_when_records_are_added() {
        let favourite = |count: u32| {
            let (mut chooser, mut random) =
                (Chooser::new(Spread::Zipfian, 1_000, 100), Random::new(4));
            let mut counts = vec![0u32; 1_100];
            for _ in 0..100_000 {
                counts[chooser.draw(&mut random, count) as usize] += 1;
            }
            assert_eq!(counts[count as usize..].iter().sum::<u32>(), 0);
            (0..1_000).max_by_key(|&i| counts[i])
        };
        assert_eq!(favourite(1_000), favourite(1_100));
    }

    #[test]
    fn scattering_is_one_to_one_and_far() {
        for n in [1, 2, 3, 4, 10, 1_000, 65_536, 99_991] {
            let scatter = Scatter::over(n);
            let places: HashSet<u32> = (0..n).map(|r| scatter.place(r)).collect();
            assert_eq!(places.len(), n as usize, "{n}");
            assert!(places.iter().all(|p| *p < n));
            if n >= 1_000 {
                let (a, b) = (scatter.place(0), scatter.place(1));
                assert!(a.abs_diff(b) > n / 4, "{n}: {a}, {b}");
            }
        }
    }

    #[test]
    fn keys_differ_and_are_plain() {
        let keys: HashSet<_> = (0..300_000)
            .chain(u32::MAX - 1_000..=u32::MAX)
            .map(key)
            .collect();
        assert_eq!(keys.len(), 301_001);
        for name in keys.iter().take(1_000) {
            assert!(name.starts_with(KEY_PREFIX));
            assert!(name[KEY_PREFIX.len()..].iter().all(u8::is_ascii_hexdigit));
        }
        assert_eq!(&hex(0x0123_4567_89ab_cdef), b"0123456789abcdef");
    }
}
