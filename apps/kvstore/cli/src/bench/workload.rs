//! The core workloads of YCSB (Cooper et al., *Benchmarking Cloud Serving Systems with YCSB*, SoCC 2010, table 2), and a mix
//! of reads and writes.

use std::fmt;
use std::str::FromStr;

use super::limits::MAX_SCAN;
use super::random::{Chooser, Random, Spread};

/// What is asked of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read one record.
    Read,
    /// Write all of a record that is there.
    Update,
    /// Write a record that is not there yet.
    Insert,
    /// Read up to [`MAX_SCAN`] records from a place on.
    Scan,
    /// Read a record, then write it.
    ReadModifyWrite,
}

impl Kind {
    /// All, in the order in which they are reported.
    pub const ALL: [Self; 5] = [
        Self::Read,
        Self::Update,
        Self::Insert,
        Self::Scan,
        Self::ReadModifyWrite,
    ];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Update => "update",
            Self::Insert => "insert",
            Self::Scan => "scan",
            Self::ReadModifyWrite => "read_modify_write",
        }
    }

    /// Its place in [`Self::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// A mix of operations and how they are spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Workload {
    /// Update heavy: reads and updates half and half, zipfian.
    A,
    /// Read mostly: 95% reads, 5% updates, zipfian.
    B,
    /// Read only, zipfian.
    C,
    /// Read latest: 95% reads, 5% inserts, the newest most popular.
    D,
    /// Short ranges: 95% scans, 5% inserts; start zipfian, length uniform.
    E,
    /// Read-modify-write: half reads, half read-modify-writes, zipfian.
    F,
    /// Reads and updates in some share, uniform.
    GetPut,
    /// Updates, uniform: a store whose log is filled to some share.
    Overwrite,
}

impl Workload {
    /// YCSB's six.
    pub const YCSB: [Self; 6] = [Self::A, Self::B, Self::C, Self::D, Self::E, Self::F];

    /// As users type it and reports name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::C => "c",
            Self::D => "d",
            Self::E => "e",
            Self::F => "f",
            Self::GetPut => "get-put",
            Self::Overwrite => "overwrite",
        }
    }

    /// How requests are spread.
    #[must_use]
    pub const fn spread(self) -> Spread {
        match self {
            Self::D => Spread::Latest,
            Self::GetPut | Self::Overwrite => Spread::Uniform,
            Self::A | Self::B | Self::C | Self::E | Self::F => Spread::Zipfian,
        }
    }

    /// The first operation, its share, and the other one. `read_share` is for [`Self::GetPut`].
    #[must_use]
    pub const fn mix(self, read_share: f64) -> (Kind, f64, Kind) {
        match self {
            Self::A => (Kind::Read, 0.5, Kind::Update),
            Self::B => (Kind::Read, 0.95, Kind::Update),
            Self::C => (Kind::Read, 1.0, Kind::Update),
            Self::D => (Kind::Read, 0.95, Kind::Insert),
            Self::E => (Kind::Scan, 0.95, Kind::Insert),
            Self::F => (Kind::Read, 0.5, Kind::ReadModifyWrite),
            Self::GetPut => (Kind::Read, read_share, Kind::Update),
            Self::Overwrite => (Kind::Update, 1.0, Kind::Update),
        }
    }

    /// Whether it adds records.
    #[must_use]
    pub const fn inserts(self) -> bool {
        matches!(self, Self::D | Self::E)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One of `--workload`: several in the case of `all`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice {
    /// YCSB's six.
    All,
    /// This one.
    One(Workload),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let mut all = Workload::YCSB
            .into_iter()
            .chain([Workload::GetPut, Workload::Overwrite]);
        match lower.as_str() {
            "all" | "ycsb" => Ok(Self::All),
            name => all
                .find(|w| w.name() == name)
                .map(Self::One)
                .ok_or_else(|| {
                    "one of a, b, c, d, e, f, get-put, overwrite, or all for a to f".to_owned()
                }),
        }
    }
}

/// The workloads that `choices` name, each once, in their order.
#[must_use]
pub fn chosen(choices: &[Choice]) -> Vec<Workload> {
    let mut list = Vec::new();
    for choice in choices {
        let named: &[Workload] = match choice {
            Choice::All => &Workload::YCSB,
            Choice::One(workload) => std::slice::from_ref(workload),
        };
        for &workload in named {
            if !list.contains(&workload) {
                list.push(workload);
            }
        }
    }
    list
}

/// One operation that was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drawn {
    /// Number of the record.
    pub record: u32,
    /// Records that a scan reads.
    pub length: u8,
    /// What is done.
    pub kind: Kind,
}

/// Draws operations of a workload.
#[derive(Debug)]
pub struct Generator {
    workload: Workload,
    mix: (Kind, f64, Kind),
    chooser: Chooser,
    random: Random,
    records: u32,
    /// Requests outstanding at once: the newest so many records may not be there yet.
    in_flight: u32,
}

impl Generator {
    /// For a store that holds `records`, which is positive.
    #[must_use]
    pub fn new(
        workload: Workload,
        records: u32,
        read_share: f64,
        in_flight: u32,
        seed: u64,
    ) -> Self {
        let reserve = if workload.inserts() {
            records / 10 + 1
        } else {
            0
        };
        Self {
            workload,
            mix: workload.mix(read_share),
            chooser: Chooser::new(workload.spread(), records, reserve),
            random: Random::new(seed),
            records,
            in_flight,
        }
    }

    /// The workload.
    #[must_use]
    pub const fn workload(&self) -> Workload {
        self.workload
    }

    /// Draws `count` operations into `out`, as of a store with the loaded records only.
    pub fn draw(&mut self, count: usize, out: &mut Vec<Drawn>) {
        out.clear();
        let (first, share, second) = self.mix;
        let mut added = 0;
        for _ in 0..count {
            let kind = if self.random.share() < share {
                first
            } else {
                second
            };
            let record = if kind == Kind::Insert {
                added += 1;
                self.records + added - 1
            } else {
                let there = self.records + added.saturating_sub(self.in_flight);
                self.chooser.draw(&mut self.random, there)
            };
            let length = if kind == Kind::Scan {
                1 + self.random.below(u32::from(MAX_SCAN)) as u8
            } else {
                0
            };
            out.push(Drawn {
                record,
                length,
                kind,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWS: usize = 400_000;

    fn drawn(workload: Workload, read_share: f64, seed: u64) -> Vec<Drawn> {
        let mut out = Vec::new();
        Generator::new(workload, 1_000, read_share, 1, seed).draw(DRAWS, &mut out);
        out
    }

    /// The table of the paper, written down a second time: shares in Kind::ALL's order.
    #[test]
    fn mixes_are_those_of_the_paper() {
        let table = [
            (Workload::A, [0.5, 0.5, 0.0, 0.0, 0.0]),
            (Workload::B, [0.95, 0.05, 0.0, 0.0, 0.0]),
            (Workload::C, [1.0, 0.0, 0.0, 0.0, 0.0]),
            (Workload::D, [0.95, 0.0, 0.05, 0.0, 0.0]),
            (Workload::E, [0.0, 0.0, 0.05, 0.95, 0.0]),
            (Workload::F, [0.5, 0.0, 0.0, 0.0, 0.5]),
            (Workload::GetPut, [0.8, 0.2, 0.0, 0.0, 0.0]),
            (Workload::Overwrite, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ];
        for (workload, shares) in table {
            let all = drawn(workload, 0.8, 77);
            for (kind, share) in Kind::ALL.into_iter().zip(shares) {
                let seen = all.iter().filter(|d| d.kind == kind).count() as f64 / DRAWS as f64;
                let sigma = (share * (1.0 - share) / DRAWS as f64).sqrt();
                assert!(
                    (seen - share).abs() <= 5.0 * sigma,
                    "{workload} {kind:?}: {seen}"
                );
            }
        }
    }

    #[test]
    fn spreads_are_those_of_the_paper() {
        for workload in Workload::YCSB {
            let want = match workload {
                Workload::D => Spread::Latest,
                _ => Spread::Zipfian,
            };
            assert_eq!(workload.spread(), want);
        }
        assert_eq!(Workload::GetPut.spread(), Spread::Uniform);
        assert_eq!(Workload::Overwrite.spread(), Spread::Uniform);
    }

    #[test]
    fn scans_have_uniform_lengths() {
        let mut counts = [0u32; 101];
        let scans: Vec<_> = drawn(Workload::E, 0.0, 3)
            .into_iter()
            .filter(|d| d.kind == Kind::Scan)
            .collect();
        for scan in &scans {
            counts[usize::from(scan.length)] += 1;
        }
        assert_eq!(counts[0], 0);
        let expected = scans.len() as f64 / 100.0;
        let chi: f64 = counts[1..]
            .iter()
            .map(|&c| (f64::from(c) - expected).powi(2) / expected)
            .sum();
        assert!((chi - 99.0).abs() < 5.0 * 198f64.sqrt(), "{chi}");
    }

    #[test]
    fn inserts_are_new_each_time_and_reads_find_what_is_there() {
        for workload in [Workload::D, Workload::E] {
            let (mut out, mut generator) = (Vec::new(), Generator::new(workload, 100, 0.0, 16, 5));
            // Each slice starts from the loaded records again.
            for _ in 0..3 {
                generator.draw(20_000, &mut out);
                let mut next = 100;
                for d in &out {
                    if d.kind == Kind::Insert {
                        assert_eq!(d.record, next);
                        next += 1;
                    } else {
                        assert!(d.record < 100 + (next - 100u32).saturating_sub(16), "{d:?}");
                    }
                }
                assert!(next > 500);
            }
        }
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let same = drawn(Workload::A, 0.0, 11) == drawn(Workload::A, 0.0, 11);
        assert!(same && drawn(Workload::A, 0.0, 11) != drawn(Workload::A, 0.0, 12));
    }

    #[test]
    fn names() {
        let others = [Workload::GetPut, Workload::Overwrite];
        for workload in Workload::YCSB.into_iter().chain(others) {
            assert_eq!(workload.name().parse(), Ok(Choice::One(workload)));
            assert_eq!(
                workload.name().to_uppercase().parse(),
                Ok(Choice::One(workload))
            );
        }
        let choices = ["c", "all", "a"].map(|t| t.parse().expect("known"));
        let names: Vec<_> = chosen(&choices).iter().map(|w| w.name()).collect();
        assert_eq!(names, ["c", "a", "b", "d", "e", "f"]);
        assert!("g".parse::<Choice>().is_err_and(|e| e.contains("get-put")));
    }
}
