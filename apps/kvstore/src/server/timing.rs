//! Service times of sampled requests, for the live line.

/// One request in so many is timed: two looks at the clock cost some 20 ns.
pub(super) const SAMPLE: u32 = 64;
/// Sub-buckets per power of two: 12% resolution.
const SUB: usize = 8;
const BUCKETS: usize = 40 * SUB;

/// A histogram of ns with logarithmic buckets; old samples fade.
#[derive(Debug)]
pub(super) struct ServiceTimes {
    counts: [u32; BUCKETS],
    total: u32,
}

impl ServiceTimes {
    pub const fn new() -> Self {
        Self {
            counts: [0; BUCKETS],
            total: 0,
        }
    }

    pub fn add(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.total += 1;
        if self.total >= 8192 {
            for c in &mut self.counts {
                *c /= 2;
            }
            self.total = self.counts.iter().sum();
        }
    }

    /// Upper bound of the bucket below which `permille` of the samples lie; 0 without samples.
    pub fn quantile(&self, permille: u32) -> u64 {
        let mut left = (u64::from(self.total) * u64::from(permille)).div_ceil(1000);
        for (i, &c) in self.counts.iter().enumerate() {
            left = left.saturating_sub(u64::from(c));
            if left == 0 && self.total > 0 {
                return upper(i);
            }
        }
        0
    }
}

fn bucket(ns: u64) -> usize {
    if ns < SUB as u64 {
        return ns as usize;
    }
    let log = ns.ilog2() as usize;
    let sub = (ns >> (log - 3)) as usize & (SUB - 1);
    ((log - 2) * SUB + sub).min(BUCKETS - 1)
}

fn upper(i: usize) -> u64 {
    if i < SUB {
        return i as u64;
    }
    let (log, sub) = (i / SUB + 2, i % SUB);
    (((SUB + sub + 1) as u64) << (log - 3)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_they_say() {
        for ns in (0..100_000).chain((17..40).map(|s| (1u64 << s) + 3)) {
            let b = bucket(ns);
            assert!(ns <= upper(b), "{ns} is above its bucket {b}");
            assert!(b == 0 || ns > upper(b - 1), "{ns} belongs below bucket {b}");
        }
    }

    #[test]
    fn quantiles_of_a_ramp() {
        let mut t = ServiceTimes::new();
        assert_eq!(t.quantile(500), 0);
        for ns in 1..=1000 {
            t.add(ns);
        }
        assert!(
            (500..=575).contains(&t.quantile(500)),
            "{}",
            t.quantile(500)
        );
        assert!(
            (990..=1150).contains(&t.quantile(990)),
            "{}",
            t.quantile(990)
        );
    }
}
