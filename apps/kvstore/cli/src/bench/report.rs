//! What a measurement found out: one JSON object, and a table.

use std::fmt::Write as _;

use hyv_lab::{Interval, values};
use kvstore::client::OneSidedCounters;
use serde::Serialize;

use super::filled::{OverwriteLine, TailLine};
use super::lines::Crossings;
use super::slice::Tally;
use super::workload::{Kind, Workload};
use crate::report::{Accel, Mode};

/// Everything. Times are in ns, rates in operations a second.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What ran the guest's instructions; null where no guest was booted for this.
    pub accel: Option<Accel>,
    /// Who drove the engine; null where another process did.
    pub mode: Option<Mode>,
    /// What was asked for.
    pub settings: Settings,
    /// The machine's own limits in this run; null where no server's window is in reach.
    pub floor: Option<Floors>,
    /// One for each workload and place.
    pub results: Vec<WorkloadLine>,
    /// One for each workload, with `--where guest,native`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ratios: Vec<RatioLine>,
    /// With `--cleaner-tail`: one for each place.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cleaner_tail: Vec<TailLine>,
    /// Of workload `overwrite`: one for each place.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub overwrite: Vec<OverwriteLine>,
    /// Cache lines that go from one core to the other for an operation of each kind, by construction; null where another process drives the
    /// engine.
    pub cache_lines: Option<Crossings>,
    /// With `--vs redis`: what was found of it beyond `results`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redis: Option<RedisLine>,
    /// With `--vs redis`: Redis ÷ this store, so that more than 1 says how many times faster this store is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speedup: Option<Speedup>,
}

/// What nothing on this machine can be faster than, medians over the run, ns.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floors {
    /// One cache line to the server's core and back.
    pub cache_line_rtt_ns: f64,
    /// A line of either side's, there and back; null with several requests under way.
    pub two_lines_rtt_ns: Option<f64>,
    /// A read's request and reply as bare SENDs of their sizes, between this process and another where the server runs.
    pub send_rtt_ns: Option<f64>,
    /// Bytes of these two messages.
    pub send_bytes: [u32; 2],
    /// A bare READ of what a one-sided read takes, from the same process; null with several requests under way.
    pub read_rtt_ns: Option<f64>,
    /// Bytes of it.
    pub read_bytes: u32,
}

/// What was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    /// Records loaded.
    pub records: u32,
    /// Bytes of a value.
    pub value_size: usize,
    /// Bytes of a key.
    pub key_size: usize,
    /// Requests under way at once, each client.
    pub in_flight: u32,
    /// Connections.
    pub clients: u16,
    /// Share of reads in `get-put`.
    pub read_share: f64,
    /// What replays the draws.
    pub seed: u64,
    /// Whether writes execute once, whatever happens to their replies: each then takes a result record in the log.
    pub exactly_once: bool,
}

/// One workload in one place.
#[derive(Clone, Debug, Serialize)]
pub struct WorkloadLine {
    /// Its name.
    pub workload: &'static str,
    /// `guest`, `native`, `instance` (one that ran before), each of them with `-one-sided`; `redis-unix`, `redis-tcp`.
    #[serde(rename = "where")]
    pub place: &'static str,
    /// Operations measured.
    pub ops: u64,
    /// Of all kinds together.
    pub ops_per_s: f64,
    /// Median over all kinds.
    pub p50_ns: u64,
    /// The median in units of the floor of the same slices; null without one.
    pub floors: Option<f64>,
    /// The median of reads in units of bare verbs that move the same: the two SENDs, or, one-sided, the READ; null without.
    pub bare: Option<f64>,
    /// What reads came to, where they are one-sided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_sided: Option<OneSidedLine>,
    /// By kind of operation, those that the workload has.
    pub operations: Vec<OperationLine>,
}

/// What one-sided reads came to, warm-up included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OneSidedLine {
    /// Found by one READ, at a place known from before.
    pub cached: u64,
    /// Looked up in the hash table: found, or found not to exist.
    pub looked_up: u64,
    /// In doubt, and asked of the server.
    pub doubts: u64,
    /// Lookups that took longer than what they read rests: begun again, or among the doubts.
    pub too_long: u64,
}

impl OneSidedLine {
    /// What came between two looks at a client's counters.
    #[must_use]
    pub fn between(before: &OneSidedCounters, after: &OneSidedCounters) -> Self {
        let looked_up = |c: &OneSidedCounters| c.by_table + c.misses;
        Self {
            cached: after.direct - before.direct,
            looked_up: looked_up(after) - looked_up(before),
            doubts: after.doubts - before.doubts,
            too_long: after.too_long - before.too_long,
        }
    }
}

/// One kind of operation.
#[derive(Clone, Debug, Serialize)]
pub struct OperationLine {
    /// `read`, `update`, `insert`, `scan` or `read_modify_write`.
    pub operation: &'static str,
    /// How many.
    pub ops: u64,
    /// A second.
    pub ops_per_s: f64,
    /// Median.
    pub p50_ns: u64,
    /// 95th percentile.
    pub p95_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// Refused, or answered wrongly.
    pub errors: u64,
    /// No record was found.
    pub missing: u64,
}

/// Guest ÷ native for one workload; null where too few slices were comparable.
#[derive(Clone, Debug, Serialize)]
pub struct RatioLine {
    /// Its name.
    pub workload: &'static str,
    /// Of medians.
    pub p50: Option<Interval>,
    /// Of operations a second.
    pub throughput: Option<Interval>,
    /// Of the time an operation takes, all in all: throughput turned round, so that as for p50 less is better.
    pub time_per_op: Option<Interval>,
    /// Native ÷ native, medians: what the method makes of no difference.
    pub aa_p50: Option<Interval>,
    /// Native ÷ native, time an operation takes.
    pub aa_time_per_op: Option<Interval>,
}

/// What was found of Redis.
#[derive(Clone, Debug, Serialize)]
pub struct RedisLine {
    /// As it names itself.
    pub version: String,
    /// Throughput of many under way.
    pub throughput: Throughput,
}

/// Throughput with many requests under way, medians of alternating slices, operations a second.
#[derive(Clone, Debug, Serialize)]
pub struct Throughput {
    /// The mix.
    pub workload: &'static str,
    /// Share of reads in it.
    pub read_share: f64,
    /// Requests under way, this store and `redis_unix`.
    pub in_flight: u32,
    /// This store.
    pub store: f64,
    /// Redis, by the same client program, pipelining.
    pub redis_unix: f64,
    /// `redis-benchmark -P 16 -c 50` over the unix socket: GET and SET, weighted by the mix.
    pub redis_benchmark_unix: f64,
    /// The same over TCP.
    pub redis_benchmark_tcp: f64,
}

/// Redis ÷ this store (times), or this store ÷ Redis (rates): how many times faster this store is.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Speedup {
    /// Median of a read by request, against Redis over its unix socket.
    pub rpc_p50: f64,
    /// Median of a one-sided read; null if none were measured.
    pub one_sided_p50: Option<f64>,
    /// Rate, against the best of `redis-benchmark`.
    pub throughput: f64,
}

impl WorkloadLine {
    /// Of what was seen.
    #[must_use]
    pub fn new(
        workload: Workload,
        place: &'static str,
        tally: &Tally,
        floor_ns: Option<f64>,
    ) -> Self {
        let all = tally.all();
        let lines = Kind::ALL.into_iter().filter_map(|kind| {
            let seen = &tally.kinds[kind.index()];
            let s = seen.latencies.summary(tally.time);
            (s.ops > 0).then(|| OperationLine {
                operation: kind.name(),
                ops: s.ops,
                ops_per_s: s.ops_per_s,
                p50_ns: s.p50_ns,
                p95_ns: seen.latencies.quantile_ns(0.95),
                p99_ns: s.p99_ns,
                p999_ns: s.p999_ns,
                max_ns: s.max_ns,
                errors: seen.errors,
                missing: seen.missing,
            })
        });
        Self {
            workload: workload.name(),
            place,
            ops: all.ops,
            ops_per_s: all.ops_per_s,
            p50_ns: all.p50_ns,
            floors: floor_ns.map(|f| all.p50_ns as f64 / f),
            bare: None,
            one_sided: None,
            operations: lines.collect(),
        }
    }

    /// Median of reads, if the workload has any.
    fn reads_p50_ns(&self) -> Option<u64> {
        let read = |o: &&OperationLine| o.operation == Kind::Read.name();
        self.operations.iter().find(read).map(|o| o.p50_ns)
    }

    /// Median of reads, or of all operations where the workload has none.
    #[must_use]
    pub fn read_p50_ns(&self) -> u64 {
        self.reads_p50_ns().unwrap_or(self.p50_ns)
    }

    /// Whether its reads are one-sided.
    #[must_use]
    pub const fn is_one_sided(&self) -> bool {
        self.one_sided.is_some()
    }

    /// Sets reads against bare verbs.
    pub fn set_against(&mut self, floors: &Floors) {
        let bare = if self.is_one_sided() {
            floors.read_rtt_ns
        } else {
            floors.send_rtt_ns
        };
        self.bare = self
            .reads_p50_ns()
            .zip(bare)
            .map(|(read, bare)| read as f64 / bare);
    }
}

/// Head of the table.
#[must_use]
pub fn head() -> String {
    format!(
        "{:<8} {:<16} {:<17} {:>10} {:>11} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7}",
        "workload",
        "where",
        "operation",
        "count",
        "ops/s",
        "p50",
        "p95",
        "p99",
        "p99.9",
        "errors",
        "missing"
    )
}

/// Lines of the table for one workload in one place.
#[must_use]
pub fn rows(line: &WorkloadLine) -> String {
    let mut text = String::new();
    for o in &line.operations {
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:<8} {:<16} {:<17} {:>10} {:>11.0} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7}",
            line.workload,
            line.place,
            o.operation,
            o.ops,
            o.ops_per_s,
            values::nanos(o.p50_ns),
            values::nanos(o.p95_ns),
            values::nanos(o.p99_ns),
            values::nanos(o.p999_ns),
            o.errors,
            o.missing
        );
    }
    // A workload of nothing but writes and scans has none.
    if let Some(o) = line.one_sided.filter(|o| *o != OneSidedLine::default()) {
        let _ = writeln!(
            text,
            "  {}: {} by one READ, {} looked up, {} in doubt and asked of the server",
            line.place, o.cached, o.looked_up, o.doubts
        );
    }
    text
}

/// A ratio as people read it.
#[must_use]
pub fn interval(name: &str, interval: Option<Interval>) -> String {
    match interval {
        Some(i) => format!(
            "{name}: {:.3} (95% interval {:.3} to {:.3})",
            i.median, i.low, i.high
        ),
        None => format!(
            "{name}: too few slices with the same floor; give more --for, or use a quieter machine"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn tally() -> Tally {
        let mut tally = Tally {
            time: Duration::from_secs(2),
            ..Tally::default()
        };
        for ns in 1..=1_000 {
            tally.kinds[Kind::Read.index()].latencies.record(ns);
        }
        tally.kinds[Kind::Update.index()]
            .latencies
            .record_many(5_000, 100);
        tally.kinds[Kind::Update.index()].errors = 3;
        tally
    }

    #[test]
    fn names_are_those_that_readers_of_reports_rely_on() {
        let mut line = WorkloadLine::new(Workload::A, "guest", &tally(), Some(100.0));
        assert_eq!(line.read_p50_ns(), 500);
        let before = OneSidedCounters {
            direct: 3,
            ..OneSidedCounters::default()
        };
        let after = OneSidedCounters {
            direct: 10,
            by_table: 6,
            misses: 4,
            doubts: 1,
            too_long: 0,
        };
        let floors = Floors {
            cache_line_rtt_ns: 100.0,
            two_lines_rtt_ns: Some(120.0),
            send_rtt_ns: None,
            send_bytes: [26, 152],
            read_rtt_ns: Some(250.0),
            read_bytes: 152,
        };
        // By requests, and bare SENDs were not measured.
        line.set_against(&floors);
        assert_eq!(line.bare, None);
        line.one_sided = Some(OneSidedLine::between(&before, &after));
        line.set_against(&floors);
        assert!(rows(&line).contains("7 by one READ, 10 looked up, 1 in doubt"));
        let speedup = Speedup {
            rpc_p50: 100.0,
            one_sided_p50: None,
            throughput: 5.0,
        };
        let interval = Interval {
            median: 1.0,
            low: 0.9,
            high: 1.1,
        };
        let report = Report {
            accel: Some(Accel::Kvm),
            mode: Some(Mode::Inline),
            settings: Settings {
                records: 10,
                value_size: 100,
                key_size: 20,
                in_flight: 1,
                clients: 1,
                read_share: 0.95,
                seed: 7,
                exactly_once: true,
            },
            floor: Some(floors),
            results: vec![line],
            ratios: vec![RatioLine {
                workload: "a",
                p50: Some(interval),
                throughput: Some(interval),
                time_per_op: Some(interval),
                aa_p50: None,
                aa_time_per_op: None,
            }],
            cleaner_tail: vec![],
            overwrite: vec![],
            cache_lines: None,
            redis: None,
            speedup: Some(speedup),
        };
        let i = serde_json::json!({ "median": 1.0, "low": 0.9, "high": 1.1 });
        let expected = serde_json::json!({
            "accel": "kvm", "mode": "inline",
            "settings": { "records": 10, "value_size": 100, "key_size": 20, "in_flight": 1, "clients": 1,
                          "read_share": 0.95, "seed": 7, "exactly_once": true },
            "floor": { "cache_line_rtt_ns": 100.0, "two_lines_rtt_ns": 120.0, "send_rtt_ns": null,
                       "send_bytes": [26, 152], "read_rtt_ns": 250.0, "read_bytes": 152 },
            "results": [{
                "workload": "a", "where": "guest", "ops": 1100, "ops_per_s": 550.0, "p50_ns": 550, "floors": 5.5, "bare": 2.0,
                "one_sided": { "cached": 7, "looked_up": 10, "doubts": 1, "too_long": 0 },
                "operations": [
                    { "operation": "read", "ops": 1000, "ops_per_s": 500.0, "p50_ns": 500, "p95_ns": 950,
                      "p99_ns": 990, "p999_ns": 999, "max_ns": 1000, "errors": 0, "missing": 0 },
                    { "operation": "update", "ops": 100, "ops_per_s": 50.0, "p50_ns": 5000, "p95_ns": 5000,
                      "p99_ns": 5000, "p999_ns": 5000, "max_ns": 5000, "errors": 3, "missing": 0 },
                ],
            }],
            "ratios": [{ "workload": "a", "p50": i, "throughput": i, "time_per_op": i, "aa_p50": null,
                         "aa_time_per_op": null }],
            "cache_lines": null,
            "speedup": { "rpc_p50": 100.0, "one_sided_p50": null, "throughput": 5.0 },
        });
        assert_eq!(serde_json::to_value(&report).unwrap(), expected);
    }

    #[test]
    fn the_table_has_a_line_for_each_operation() {
        let line = WorkloadLine::new(Workload::A, "guest", &tally(), None);
        let text = rows(&line);
        assert_eq!(text.lines().count(), 2);
        for (row, words) in text
            .lines()
            .zip([["read", "500 ns"], ["update", "5000 ns"]])
        {
            assert!(words.iter().all(|w| row.contains(w)), "{row}");
            assert_eq!(row.len(), head().len());
        }
        assert_eq!(line.read_p50_ns(), 500);
    }
}
