//! Service times as a histogram with logarithmic buckets, in memory and in a message.

use super::cursor::{Reader, Writer};
use super::{Class, ProtoError};

/// Sub-buckets per power of two: 12% resolution.
const SUB: usize = 8;
const LOG_SUB: usize = SUB.ilog2() as usize;
/// Up to 4 s; what takes longer counts as that.
pub(super) const BUCKETS: usize = 30 * SUB;

/// A histogram of ns.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: [u32; BUCKETS],
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// Without samples.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            counts: [0; BUCKETS],
            total: 0,
        }
    }

    /// Counts a sample. When a bucket is full all are halved: old samples fade.
    #[inline]
    pub fn add(&mut self, ns: u64) {
        let count = &mut self.counts[bucket(ns)];
        *count += 1;
        self.total += 1;
        if *count == u32::MAX {
            self.fade();
        }
    }

    /// Halves all counts.
    pub fn fade(&mut self) {
        for count in &mut self.counts {
            *count /= 2;
        }
        self.total = self.counts.iter().map(|&count| u64::from(count)).sum();
    }

    /// Samples.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// Upper bound of the bucket below which `permille` of the samples lie, ns; 0 without samples.
    #[must_use]
    pub fn quantile(&self, permille: u32) -> u64 {
        let samples = self.counts.iter().enumerate();
        quantile(samples.map(|(i, &count)| (i, count)), self.total, permille)
    }

    /// Those with samples: u16 how many, then bucket (u16) and count (u32) of each.
    pub(super) fn emit(&self, out: &mut Writer<'_>) -> Result<(), ProtoError> {
        let used = || {
            self.counts
                .iter()
                .enumerate()
                .filter(|(_, count)| **count > 0)
        };
        out.put(&(used().count() as u16).to_le_bytes())?;
        for (index, count) in used() {
            out.put(&(index as u16).to_le_bytes())?;
            out.put(&count.to_le_bytes())?;
        }
        Ok(())
    }
}

/// A histogram in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistogramView<'a> {
    bytes: &'a [u8],
}

impl<'a> HistogramView<'a> {
    pub(super) const EMPTY: Self = Self { bytes: &[] };

    pub(super) fn parse(input: &mut Reader<'a>) -> Result<Self, ProtoError> {
        let used = usize::from(input.u16()?);
        let bytes = input.take(6 * used)?;
        let view = Self { bytes };
        let mut least = 0;
        for (index, count) in view.pairs() {
            if index < least || index >= BUCKETS || count == 0 {
                return Err(ProtoError::Field("histogram"));
            }
            least = index + 1;
        }
        Ok(view)
    }

    fn pairs(self) -> impl Iterator<Item = (usize, u32)> + use<'a> {
        let mut input = Reader { bytes: self.bytes };
        core::iter::from_fn(move || {
            let index = input.u16().ok()?;
            Some((usize::from(index), input.u32().ok()?))
        })
    }

    /// Buckets with samples: upper bound in ns, and samples.
    pub fn buckets(self) -> impl Iterator<Item = (u64, u32)> + use<'a> {
        self.pairs().map(|(index, count)| (upper(index), count))
    }

    /// Samples.
    #[must_use]
    pub fn total(self) -> u64 {
        self.pairs().map(|(_, count)| u64::from(count)).sum()
    }

    /// As [`Histogram::quantile`].
    #[must_use]
    pub fn quantile(self, permille: u32) -> u64 {
        quantile(self.pairs(), self.total(), permille)
    }
}

/// Bytes of all classes' histograms at most.
pub(super) const MAX_HISTOGRAM_BYTES: usize = Class::ALL.len() * (2 + 6 * BUCKETS);

fn quantile(counts: impl Iterator<Item = (usize, u32)>, total: u64, permille: u32) -> u64 {
    let mut left = (total * u64::from(permille)).div_ceil(1000);
    for (index, count) in counts {
        left = left.saturating_sub(u64::from(count));
        if left == 0 {
            return upper(index);
        }
    }
    0
}

fn bucket(ns: u64) -> usize {
    if ns < SUB as u64 {
        return ns as usize;
    }
    let log = ns.ilog2() as usize;
    let sub = (ns >> (log - LOG_SUB)) as usize & (SUB - 1);
    ((log - LOG_SUB + 1) * SUB + sub).min(BUCKETS - 1)
}

fn upper(index: usize) -> u64 {
    if index < SUB {
        return index as u64;
    }
    let (log, sub) = (index / SUB + LOG_SUB - 1, index % SUB);
    (((SUB + sub + 1) as u64) << (log - LOG_SUB)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_they_say() {
        for ns in (0..100_000).chain((17..32).map(|shift| (1u64 << shift) + 3)) {
            let index = bucket(ns);
            assert!(ns <= upper(index), "{ns} is above its bucket {index}");
            assert!(
                index == 0 || ns > upper(index - 1),
                "{ns} belongs below bucket {index}"
            );
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_a_ramp_also_from_a_message() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile(500), 0);
        for ns in 1..=1000 {
            histogram.add(ns);
        }
        let median = histogram.quantile(500);
        assert!((500..=575).contains(&median), "{median}");
        let high = histogram.quantile(990);
        assert!((990..=1150).contains(&high), "{high}");

        let mut bytes = [0; MAX_HISTOGRAM_BYTES];
        let mut out = Writer {
            out: &mut bytes,
            at: 0,
        };
        histogram.emit(&mut out).unwrap();
        let len = out.at;
        let view = HistogramView::parse(&mut Reader {
            bytes: &bytes[..len],
        })
        .unwrap();
        assert_eq!(view.total(), 1000);
        assert_eq!(view.quantile(500), median);
        assert_eq!(view.quantile(990), high);
        assert_eq!(view.buckets().map(|(_, n)| u64::from(n)).sum::<u64>(), 1000);
        histogram.fade();
        assert!(histogram.total() < 501);
    }
}
