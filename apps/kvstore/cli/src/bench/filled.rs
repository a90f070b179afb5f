//! What was found out about a store whose log is filled to some share: reads beside a cleaner that never rests, and overwriting.

use std::fmt::Write as _;

use hyv_lab::{Interval, LatencySummary, values};
use serde::Serialize;

use super::report::interval;

/// How full a log is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fill {
    /// Per cent of the log's bytes that shall be live.
    pub utilisation: u8,
    /// Live bytes ÷ bytes of the log, as the server says.
    pub of_log: f64,
    /// Live bytes ÷ what the store accepts.
    pub of_capacity: f64,
    /// Records.
    pub records: u32,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Bytes of a segment.
    pub segment_bytes: u64,
}

/// Reads with the cleaner off and with one that never rests, in alternating slices.
#[derive(Clone, Debug, Serialize)]
pub struct TailLine {
    /// `guest` or `native`.
    #[serde(rename = "where")]
    pub place: &'static str,
    /// The mix.
    pub workload: &'static str,
    /// What is in the store.
    pub fill: Fill,
    /// The cleaner does nothing.
    pub off: TailSide,
    /// The cleaner cleans segment after segment.
    pub always: TailSide,
    /// Always ÷ off, over pairs of slices: 99.9th percentiles of reads.
    pub p999: Option<Interval>,
    /// The same of 99th percentiles, of all operations.
    pub p99: Option<Interval>,
    /// The same of medians, of all operations.
    pub p50: Option<Interval>,
    /// Off ÷ off, 99.9th percentiles: what the method makes of no difference.
    pub aa_p999: Option<Interval>,
    /// 99.9th percentiles over all slices: always ÷ off.
    pub p999_of_all: f64,
}

/// Reads in all slices of one side.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TailSide {
    /// Reads.
    pub ops: u64,
    /// Time measured.
    pub seconds: f64,
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// Bytes that the cleaner moved in these slices.
    pub cleaner_moved_bytes: u64,
    /// Segments that it cleaned.
    pub cleaned_segments: u64,
}

impl TailSide {
    /// Of a summary of reads and of what the cleaner did meanwhile.
    #[must_use]
    pub fn new(
        reads: &LatencySummary,
        seconds: f64,
        cleaner_moved_bytes: u64,
        cleaned_segments: u64,
    ) -> Self {
        Self {
            ops: reads.ops,
            seconds,
            p50_ns: reads.p50_ns,
            p99_ns: reads.p99_ns,
            p999_ns: reads.p999_ns,
            max_ns: reads.max_ns,
            cleaner_moved_bytes,
            cleaned_segments,
        }
    }
}

/// For people.
#[must_use]
pub fn tail(line: &TailLine) -> String {
    let mut text = format!(
        "{}: reads beside a cleaner that never rests, workload {}, {} records, {:.1}% of the log live ({:.1}% of what the store accepts)\n",
        line.place,
        line.workload,
        line.fill.records,
        100.0 * line.fill.of_log,
        100.0 * line.fill.of_capacity
    );
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "  {:<8} {:>11} {:>9} {:>9} {:>9} {:>9} {:>12} {:>9}",
        "cleaner", "reads", "p50", "p99", "p99.9", "max", "moved", "segments"
    );
    for (name, side) in [("off", &line.off), ("always", &line.always)] {
        let _ = writeln!(
            text,
            "  {:<8} {:>11} {:>9} {:>9} {:>9} {:>9} {:>10}/s {:>9}",
            name,
            side.ops,
            values::nanos(side.p50_ns),
            values::nanos(side.p99_ns),
            values::nanos(side.p999_ns),
            values::nanos(side.max_ns),
            values::bytes((side.cleaner_moved_bytes as f64 / side.seconds.max(1e-9)) as u64),
            side.cleaned_segments
        );
    }
    for (name, ratio) in [
        ("always / off, p99.9", line.p999),
        ("always / off, p99", line.p99),
        ("always / off, p50", line.p50),
        ("off / off, p99.9", line.aa_p999),
    ] {
        let _ = writeln!(text, "  {}", interval(name, ratio));
    }
    let _ = writeln!(
        text,
        "  always / off, p99.9 of all slices together: {:.3}",
        line.p999_of_all
    );
    text
}

/// Overwriting at several shares of the log, and at the first of them again.
#[derive(Clone, Debug, Serialize)]
pub struct OverwriteLine {
    /// `guest` or `native`.
    #[serde(rename = "where")]
    pub place: &'static str,
    /// One for each share that was asked for, in this order, and the first of them again.
    pub at: Vec<OverwriteAt>,
    /// Rate of the last ÷ rate of the first, which are the same: what the machine did meanwhile.
    pub drift: f64,
}

/// Overwriting at one share.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct OverwriteAt {
    /// What is in the store.
    pub fill: Fill,
    /// Writes measured.
    pub ops: u64,
    /// A second: the median of slices.
    pub ops_per_s: f64,
    /// Rates of slices, the tenth part that was slowest left out.
    pub ops_per_s_low: f64,
    /// The same, the tenth part that was fastest.
    pub ops_per_s_high: f64,
    /// Median latency.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p999_ns: u64,
    /// The rate ÷ the mean of the first and the last.
    pub of_first: f64,
    /// Bytes that were written for each write: its entry, and its result record where there is one.
    pub written_bytes_per_op: f64,
    /// Bytes that the cleaner moved for each byte written.
    pub moved_per_written: f64,
    /// How often the log was written over before.
    pub turned_over: f64,
}

/// Sets rates against those of the first share: gives the drift.
pub fn set_against_first(at: &mut [OverwriteAt]) -> f64 {
    let (Some(first), Some(last)) = (at.first(), at.last()) else {
        return f64::NAN;
    };
    let (first, last) = (first.ops_per_s, last.ops_per_s);
    for line in at {
        line.of_first = line.ops_per_s / f64::midpoint(first, last);
    }
    last / first
}

/// For people.
#[must_use]
pub fn overwrite(line: &OverwriteLine) -> String {
    let mut text = format!(
        "{}: overwriting at random\n  {:>7} {:>9} {:>10} {:>10} {:>20} {:>9} {:>9} {:>9} {:>9}\n",
        line.place,
        "of log",
        "of store",
        "records",
        "ops/s",
        "(slices)",
        "of first",
        "p50",
        "p99.9",
        "moved/B"
    );
    for at in &line.at {
        let slices = format!("{:.0} to {:.0}", at.ops_per_s_low, at.ops_per_s_high);
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "  {:>6.1}% {:>8.1}% {:>10} {:>10.0} {:>20} {:>9.3} {:>9} {:>9} {:>9.2}",
            100.0 * at.fill.of_log,
            100.0 * at.fill.of_capacity,
            at.fill.records,
            at.ops_per_s,
            slices,
            at.of_first,
            values::nanos(at.p50_ns),
            values::nanos(at.p999_ns),
            at.moved_per_written
        );
    }
    let _ = writeln!(
        text,
        "  drift: the last rate is {:.3} times the first",
        line.drift
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILL: Fill = Fill {
        utilisation: 30,
        of_log: 0.3,
        of_capacity: 0.32,
        records: 1_000,
        log_bytes: 1 << 20,
        segment_bytes: 1 << 14,
    };

    const AT: OverwriteAt = OverwriteAt {
        fill: FILL,
        ops: 10,
        ops_per_s: 100.0,
        ops_per_s_low: 90.0,
        ops_per_s_high: 110.0,
        p50_ns: 1,
        p99_ns: 2,
        p999_ns: 3,
        of_first: f64::NAN,
        written_bytes_per_op: 152.0,
        moved_per_written: 0.5,
        turned_over: 1.5,
    };

    #[test]
    fn rates_are_set_against_the_mean_of_first_and_last() {
        let rates = [100.0, 60.0, 45.0, 80.0];
        let mut at = rates.map(|ops_per_s| OverwriteAt { ops_per_s, ..AT });
        let drift = set_against_first(&mut at);
        assert!((drift - 0.8).abs() < 1e-9);
        let shares = at.map(|a| a.of_first);
        for (share, rate) in shares.iter().zip(rates) {
            assert!((share - rate / 90.0).abs() < 1e-9);
        }
        let line = OverwriteLine {
            place: "guest",
            at: at.to_vec(),
            drift,
        };
        let text = overwrite(&line);
        assert_eq!(text.lines().count(), 7);
        assert!(text.contains("0.667") && text.contains("0.800 times the first"));
    }

    #[test]
    fn names_are_those_that_readers_of_reports_rely_on() {
        let reads = LatencySummary {
            ops: 5,
            ops_per_s: 2.5,
            p50_ns: 1,
            p99_ns: 2,
            p999_ns: 3,
            max_ns: 4,
        };
        let side = TailSide::new(&reads, 2.0, 4 << 20, 3);
        let line = TailLine {
            place: "native",
            workload: "c",
            fill: FILL,
            off: TailSide {
                cleaner_moved_bytes: 0,
                ..side
            },
            always: side,
            p999: None,
            p99: None,
            p50: None,
            aa_p999: None,
            p999_of_all: 1.0,
        };
        let json = serde_json::to_value(&line).expect("plain data");
        assert_eq!(json["where"], "native");
        assert_eq!(json["always"]["cleaner_moved_bytes"], 4 << 20);
        assert_eq!(json["fill"]["utilisation"], 30);
        assert!(json["p999"].is_null() && json["aa_p999"].is_null());
        assert!(tail(&line).contains("2.0 MiB/s"), "{}", tail(&line));
        let json = serde_json::to_value(AT).expect("plain data");
        for name in ["ops_per_s", "of_first", "moved_per_written", "turned_over"] {
            assert!(json.get(name).is_some(), "{name}");
        }
    }
}
