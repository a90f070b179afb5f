//! Stores side by side: who is measured when, and what comes of it.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hyv_host::sys::clock;
use hyv_lab::limits::MIN_PAIRS;
use hyv_lab::{Interval, Slice, median, pair_slices, paired_ratio};
use hyv_rnic::cell::Inline;
use kvstore::client::OneSidedCounters;
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::limits::{MAX_PREPARED, MIN_PREPARED, SAME_FLOOR, SLICE, STEADY, WARM_UP};
use crate::bench::report::{OneSidedLine, RatioLine, WorkloadLine};
use crate::bench::rpc::Rpc;
use crate::bench::slice::{Measured, Runner, Tally, Wanted};
use crate::bench::workload::{Drawn, Generator, Kind, Workload};
use crate::commands::client::Progress;
use crate::redis::client::Redis;

/// The second native server, for the A/A comparison.
pub(super) const TWIN: &str = "twin";
/// Rest after a server was woken from SIGSTOP.
const SETTLE: Duration = Duration::from_millis(2);
/// Requests under way while records are loaded or removed.
pub(super) const LOADING: u32 = 16;

/// A way to a store.
pub(super) enum Store<'a> {
    Rpc(Rpc<'a>),
    Redis(Redis),
}

/// One store, and what was found of it.
pub(super) struct Lane<'a> {
    pub place: &'static str,
    /// Stopped while others are measured.
    pid: Option<Pid>,
    pub store: Store<'a>,
    /// One for each slice, in order; unsteady ones have a floor that pairs with none.
    slices: Vec<Slice>,
    /// The same with the time an operation takes, all in all, in place of the median.
    rates: Vec<Slice>,
    pub tally: Tally,
    /// Of all workloads.
    floors: Vec<f64>,
    /// Where those of this workload begin.
    floors_from: usize,
    /// What one-sided reads had come to when this workload began.
    counted: Option<OneSidedCounters>,
}

impl<'a> Lane<'a> {
    pub fn new(place: &'static str, pid: Option<Pid>, store: Store<'a>) -> Self {
        Self {
            place,
            pid,
            store,
            slices: Vec::new(),
            rates: Vec::new(),
            tally: Tally::default(),
            floors: Vec::new(),
            floors_from: 0,
            counted: None,
        }
    }

    /// Lets this thread drive the engine, or its own again.
    pub fn drive(&mut self, inline: Option<Inline<'a>>) {
        if let Store::Rpc(rpc) = &mut self.store {
            rpc.inline = inline;
        }
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        match self.pid {
            Some(pid) => kill_process(pid, signal).context("cannot stop and continue a server"),
            None => Ok(()),
        }
    }

    /// Stops its server.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Continues its server.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn clear(&mut self) {
        self.slices.clear();
        self.rates.clear();
        self.tally = Tally::default();
        self.floors_from = self.floors.len();
        self.counted = self.counters();
    }

    /// This project's store.
    pub fn rpc(&mut self) -> Result<&mut Rpc<'a>> {
        match &mut self.store {
            Store::Rpc(rpc) => Ok(rpc),
            Store::Redis(_) => anyhow::bail!("Redis has no such measurement"),
        }
    }

    /// The last slice: its median, 99th percentile and floor.
    pub fn last(&self) -> Option<Slice> {
        self.slices.last().copied()
    }

    fn counters(&self) -> Option<OneSidedCounters> {
        match &self.store {
            Store::Rpc(rpc) => rpc.one_sided_counters(),
            Store::Redis(_) => None,
        }
    }

    fn floor(&mut self) -> Result<Option<f64>> {
        match &mut self.store {
            Store::Rpc(rpc) => rpc.floor(),
            Store::Redis(_) => Ok(None),
        }
    }

    /// One slice, with the floor before and after it.
    pub fn slice(
        &mut self,
        runner: &mut Runner,
        drawn: &[Drawn],
        length: Duration,
    ) -> Result<Measured> {
        let before = self.floor()?;
        let measured = match &mut self.store {
            Store::Rpc(rpc) => runner.slice(rpc, drawn, length, &mut self.tally),
            Store::Redis(redis) => runner.slice(redis, drawn, length, &mut self.tally),
        }?;
        let after = self.floor()?;
        let floor_ns = match before.zip(after) {
            Some((a, b)) if a / b < STEADY && b / a < STEADY => f64::midpoint(a, b),
            _ => f64::INFINITY,
        };
        if floor_ns.is_finite() {
            self.floors.push(floor_ns);
        }
        let slice = Slice {
            floor_ns,
            ..measured.slice
        };
        self.slices.push(slice);
        self.rates.push(Slice {
            p50_ns: measured.elapsed.as_secs_f64() * 1e9 / measured.ops.max(1) as f64,
            ..slice
        });
        Ok(measured)
    }

    /// Stores and removes records.
    pub fn all(
        &mut self,
        runner: &mut Runner,
        requests: impl Iterator<Item = Wanted>,
        each: impl FnMut(u64) -> Result<()>,
    ) -> Result<u64> {
        match &mut self.store {
            Store::Rpc(rpc) => runner.all(rpc, requests, each),
            Store::Redis(redis) => runner.all(redis, requests, each),
        }
    }

    /// What was found of the last workload.
    pub fn line(&self, workload: Workload) -> WorkloadLine {
        let mut floors = self.floors[self.floors_from..].to_vec();
        let floor = (!floors.is_empty()).then(|| median(&mut floors));
        WorkloadLine {
            one_sided: self
                .counted
                .zip(self.counters())
                .map(|(before, after)| OneSidedLine::between(&before, &after)),
            ..WorkloadLine::new(workload, self.place, &self.tally, floor)
        }
    }

    /// All floors that were steady.
    pub fn floors(&self) -> impl Iterator<Item = f64> {
        self.floors.iter().copied()
    }
}

impl Drop for Lane<'_> {
    /// However this ends: a guest that is stopped cannot be asked to end.
    fn drop(&mut self) {
        let _ = self.resume();
    }
}

/// How long.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    /// In each lane.
    Time(Duration),
    /// In each lane.
    Operations(u64),
}

/// Asked between slices: whether there is still something to measure.
pub(super) type Check<'c> = dyn Fn() -> Result<()> + 'c;

/// Who drives the engine during a slice.
pub(super) type Driver<'d, 'a> = &'d dyn Fn() -> Option<Inline<'a>>;

/// What all lanes have in common.
pub(super) struct Plan<'a> {
    pub records: u32,
    pub value_size: usize,
    pub read_share: f64,
    /// On all connections together.
    pub in_flight: u32,
    pub seed: u64,
    pub stop: &'a AtomicBool,
}

impl Plan<'_> {
    /// Stores the records.
    pub fn load(&self, lane: &mut Lane<'_>, check: &Check<'_>) -> Result<()> {
        let mut progress = Progress::new();
        let mut runner = Runner::new(LOADING, self.value_size);
        let (place, records, start) = (lane.place, self.records, Instant::now());
        let outcome = lane.all(&mut runner, (0..records).map(Wanted::Stored), |n| {
            super::interrupted(self.stop)?;
            progress.show(|| {
                let rate = n as f64 / start.elapsed().as_secs_f64();
                format!("{place}: loading: {n} of {records} records, {rate:.0}/s")
            });
            Ok(())
        });
        progress.end();
        outcome.with_context(|| {
            format!(
                "{place}: cannot load {records} records of {} bytes",
                self.value_size
            )
        })?;
        check()
    }

    /// Removes the records, as far as they are there.
    pub fn unload(&self, lane: &mut Lane<'_>) -> Result<()> {
        let mut runner = Runner::new(LOADING, self.value_size);
        let gone = lane.all(&mut runner, (0..self.records).map(Wanted::Removed), |_| {
            Ok(())
        });
        gone.context(
            "the records of the measurement (their keys begin with `bench:`) could not be removed",
        )?;
        Ok(())
    }

    /// Runs a workload on all lanes in turn, in another order each round, and `beside` once a round.
    pub fn alternate<'a>(
        &self,
        workload: Workload,
        lanes: &mut [Lane<'a>],
        until: Until,
        inline: Option<Driver<'_, 'a>>,
        check: &Check<'_>,
        beside: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        for lane in lanes.iter_mut() {
            lane.clear();
        }
        let compared = lanes.iter().any(|l| l.place == TWIN);
        let mut generator = Generator::new(
            workload,
            self.records,
            self.read_share,
            if self.in_flight > 1 {
                self.in_flight
            } else {
                0
            },
            self.seed,
        );
        let mut runner = Runner::new(self.in_flight, self.value_size);
        let mut drawn = Vec::new();
        // As many as the fastest can do in a slice; known after the first.
        let mut prepared = MIN_PREPARED;
        let mut random = clock::tsc() | 1;
        let mut order: Vec<usize> = (0..lanes.len()).collect();
        let mut progress = Progress::new();
        let mut rounds = 0;
        let (start, mut done) = (Instant::now(), vec![0u64; lanes.len()]);
        loop {
            let over = match until {
                Until::Time(time) => lanes.iter().all(|l| l.tally.time >= time),
                Until::Operations(n) => done.iter().all(|d| *d >= n),
            };
            // An interval needs some rounds, however short the time.
            let enough =
                !compared || rounds >= 2 * MIN_PAIRS || matches!(until, Until::Operations(_));
            if over && enough {
                progress.end();
                return Ok(());
            }
            generator.draw(prepared, &mut drawn);
            shuffle(&mut order, &mut random);
            let mut most = 0;
            for &i in &order {
                let lane = &mut lanes[i];
                let (length, count) = match until {
                    Until::Time(time) => (SLICE.min(time), drawn.len()),
                    Until::Operations(n) => {
                        let left = n.saturating_sub(done[i]);
                        if left == 0 {
                            continue;
                        }
                        // The warm-up is a quarter of few.
                        let left = usize::try_from(left).unwrap_or(usize::MAX);
                        let with = (left + left.div_ceil(3)).min(left.saturating_add(WARM_UP));
                        (SLICE, with.min(drawn.len()))
                    }
                };
                lane.resume()?;
                if lane.pid.is_some() {
                    std::thread::sleep(SETTLE);
                }
                lane.drive(inline.and_then(|f| f()));
                let measured =
                    lane.slice(&mut runner, &drawn[..count], length)
                        .and_then(|measured| {
                            self.undo(lane, &drawn[..measured.begun])?;
                            Ok(measured)
                        });
                lane.drive(None);
                if lanes.len() > 1 || inline.is_some() {
                    lanes[i].pause()?;
                }
                let measured = measured?;
                done[i] += measured.ops;
                let per_slice =
                    measured.ops as f64 * SLICE.as_secs_f64() / measured.elapsed.as_secs_f64();
                most = most.max(per_slice as usize);
                super::interrupted(self.stop)?;
                check()?;
            }
            beside()?;
            prepared = (most + most / 3 + 2 * WARM_UP).clamp(MIN_PREPARED, MAX_PREPARED);
            rounds += 1;
            progress.show(|| {
                let all: u64 = done.iter().sum();
                format!(
                    "workload {workload}: {:.0} s, {all} operations",
                    start.elapsed().as_secs_f64()
                )
            });
        }
    }

    /// Removes what a slice added, so that each begins with the same records.
    pub fn undo(&self, lane: &mut Lane<'_>, begun: &[Drawn]) -> Result<()> {
        let added = begun.iter().filter(|d| d.kind == Kind::Insert);
        let mut added = added.map(|d| Wanted::Removed(d.record)).peekable();
        if added.peek().is_some() {
            let mut runner = Runner::new(LOADING, self.value_size);
            lane.all(&mut runner, added, |_| Ok(()))
                .context("cannot remove what a slice added")?;
        }
        Ok(())
    }
}

/// Another order: nobody always comes after the same neighbour.
pub(super) fn shuffle(order: &mut [usize], random: &mut u64) {
    for i in (1..order.len()).rev() {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        order.swap(i, (*random % (i as u64 + 1)) as usize);
    }
}

/// Guest ÷ native and native ÷ native, if all of them were measured.
pub(super) fn ratios(workload: Workload, lanes: &[Lane<'_>]) -> Option<RatioLine> {
    let lane = |place| lanes.iter().find(|l| l.place == place);
    let (native, twin) = (lane("native")?, lane(TWIN)?);
    let ratio = |a: &[Slice], b: &[Slice]| {
        let pairs = pair_slices(a, b, SAME_FLOOR);
        let pairs: Vec<(f64, f64)> = pairs.iter().map(|(a, b)| (a.p50_ns, b.p50_ns)).collect();
        paired_ratio(&pairs).ok()
    };
    let guest = lane("guest");
    let time_per_op = guest.and_then(|g| ratio(&g.rates, &native.rates));
    Some(RatioLine {
        workload: workload.name(),
        p50: guest.and_then(|g| ratio(&g.slices, &native.slices)),
        throughput: time_per_op.map(|i| Interval {
            median: 1.0 / i.median,
            low: 1.0 / i.high,
            high: 1.0 / i.low,
        }),
        time_per_op,
        aa_p50: ratio(&twin.slices, &native.slices),
        aa_time_per_op: ratio(&twin.rates, &native.rates),
    })
}
