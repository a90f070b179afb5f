//! One side of the comparison, and its slices.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_host::backend::UserMemory;
use hyv_host::sys::clock;
use hyv_lab::{Latencies, Slice, median};
use hyv_tools::perf::{Command, Kind, Partner, REGION, Samples};
use hyv_verbs::probe::{self, Lines};

use super::Case;
use super::report::ResultLine;
use super::wire::{Bare, Driving};

/// Rounds of the floor's ping-pong at either end of a slice, after as many to warm up.
const FLOOR_ROUNDS: u32 = 1_000;
/// Silence after which a probe has failed, ns.
const SILENCE_NS: u64 = 1_000_000_000;
/// How long engines are driven after the last word, so that its acknowledgement gets there and nobody waits for it while bare
/// sockets or the probe line are measured.
const SETTLE: Duration = Duration::from_micros(100);

/// One side.
pub(super) struct Lane {
    pub(super) place: &'static str,
    pub(super) partner: Partner,
    memory: UserMemory,
    /// One for each slice, in order; unsteady ones have a floor that pairs with none.
    pub(super) slices: Vec<Slice>,
    all: Latencies,
    min_ns: f64,
    ops: u64,
    /// What was reached of the bare path's or a memcpy's bandwidth, by slice.
    shares: Vec<f64>,
    /// Slice medians in units of their floors.
    in_floors: Vec<f64>,
    /// Slice medians in units of a request and its reply in two lines.
    in_exchanges: Vec<f64>,
    /// Those, ns.
    exchanges: Vec<f64>,
}

impl Lane {
    /// A lane between an agent with `memory` and a partner with `own`. Large pages on all sides, or the comparison is unfair;
    /// where the kernel has none, the spread shows it.
    pub(super) fn on_large_pages(
        place: &'static str,
        partner: Partner,
        memory: UserMemory,
        own: &UserMemory,
    ) -> Result<Self> {
        for (memory, offset) in [(&memory, partner.agent_offset()), (own, partner.offset()?)] {
            if let Err(e) = memory.ram.collapse(offset, REGION as u64) {
                tracing::debug!("{place} stays on small pages: {e}");
            }
        }
        Ok(Self {
            place,
            partner,
            memory,
            slices: Vec::new(),
            all: Latencies::new(),
            min_ns: f64::INFINITY,
            ops: 0,
            shares: Vec::new(),
            in_floors: Vec::new(),
            in_exchanges: Vec::new(),
            exchanges: Vec::new(),
        })
    }

    pub(super) fn clear(&mut self) {
        self.slices.clear();
        self.all.clear();
        self.shares.clear();
        self.in_floors.clear();
        self.in_exchanges.clear();
        self.exchanges.clear();
        (self.min_ns, self.ops) = (f64::INFINITY, 0);
    }

    /// One cache line to the measured side's core and back, ns.
    pub(super) fn cache_line(&mut self, driving: &mut Driving<'_>) -> Result<f64> {
        self.probe(driving, |rounds| Kind::Floor { rounds })
    }

    /// A line to the measured side's core and another one back, ns.
    fn exchange(&mut self, driving: &mut Driving<'_>) -> Result<f64> {
        self.probe(driving, |rounds| Kind::Exchange { rounds })
    }

    fn probe(&mut self, driving: &mut Driving<'_>, kind: impl Fn(u32) -> Kind) -> Result<f64> {
        let step = 32;
        let batches = FLOOR_ROUNDS / step;
        let kind = kind(FLOOR_ROUNDS + batches * step);
        let lines = match kind {
            Kind::Exchange { .. } => Lines::two(&self.memory.window),
            _ => Lines::one(&self.memory.window),
        };
        lines.reset();
        self.partner.probe(kind, || {
            driving.turn();
        })?;
        settle(driving);
        let bounce = |from, rounds| -> Result<()> {
            if probe::bounce(lines, from, rounds, SILENCE_NS, clock::monotonic_ns) {
                return Ok(());
            }
            bail!("the measured side does not answer on the probe line");
        };
        bounce(0, FLOOR_ROUNDS)?;
        let mut samples = Vec::new();
        for k in 0..batches {
            let start = clock::tsc();
            bounce(FLOOR_ROUNDS + k * step, step)?;
            samples.push((clock::tsc() - start) as f64 / f64::from(step));
        }
        Ok(median(&mut samples) * 1e9 / clock::tsc_hz() as f64)
    }

    /// Measures one slice, and the floor before and after it: of the path, or of the caches where there is no wire.
    pub(super) fn slice(
        &mut self,
        command: &Command,
        driving: &mut Driving<'_>,
        own: &UserMemory,
        mut bare: Option<&mut Bare>,
        steady: f64,
    ) -> Result<()> {
        let before = self.floor(driving, bare.as_deref_mut())?;
        let samples: Samples = self.partner.measure(command, || driving.turn())?;
        settle(driving);
        let mut ns = samples.ns;
        if ns.is_empty() {
            bail!(
                "{} of {} bytes: not one sample in {} ms",
                command.verb.name(),
                command.size,
                command.slice_ns / 1_000_000
            );
        }
        let p50_ns = median(&mut ns);
        if command.kind == Kind::Bandwidth {
            let ideal_ns = match bare.as_deref_mut() {
                Some(bare) => f64::from(command.size) * 1e9 / bare.bandwidth()?,
                None => self.memcpy(own, command.size)?,
            };
            self.shares.push(ideal_ns / p50_ns);
        }
        let wire = bare.is_some();
        let after = self.floor(driving, bare)?;
        let floor_ns = f64::midpoint(before, after);
        let steady = before / after < steady && after / before < steady;
        // A wire's floor moves by itself; what it did beside the verbs still counts for the verbs.
        if steady || wire {
            self.ops += samples.ops;
            for &t in &ns {
                // The histogram counts whole units: tenths of ns, so that two fast sides can be told apart.
                self.all.record((t * 10.0) as u64);
                self.min_ns = self.min_ns.min(t);
            }
            self.in_floors.push(p50_ns / floor_ns);
            if !wire && command.kind == Kind::Latency {
                let exchange_ns = self.exchange(driving)?;
                self.exchanges.push(exchange_ns);
                self.in_exchanges.push(p50_ns / exchange_ns);
            }
        }
        let at = (ns.len() * 99).div_ceil(100) - 1;
        let p99_ns = *ns.select_nth_unstable_by(at, f64::total_cmp).1;
        self.slices.push(Slice {
            p50_ns,
            p99_ns,
            floor_ns: if steady { floor_ns } else { f64::INFINITY },
        });
        Ok(())
    }

    fn floor(&mut self, driving: &mut Driving<'_>, bare: Option<&mut Bare>) -> Result<f64> {
        match bare {
            Some(bare) => bare.floor(),
            None => self.cache_line(driving),
        }
    }

    /// Median time of a memcpy between the very buffers, on this core, ns.
    fn memcpy(&self, own: &UserMemory, size: u32) -> Result<f64> {
        let (from, to) = (self.partner.agent_offset(), self.partner.offset()?);
        let mut samples = Vec::new();
        for _ in 0..32 {
            let start = clock::tsc();
            self.memory
                .ram
                .copy_to(from, &own.ram, to, u64::from(size))
                .context("the buffers lie outside the RAM")?;
            samples.push((clock::tsc() - start) as f64);
        }
        Ok(median(&mut samples) * 1e9 / clock::tsc_hz() as f64)
    }

    pub(super) fn floors(&self) -> impl Iterator<Item = f64> {
        self.slices
            .iter()
            .map(|s| s.floor_ns)
            .filter(|f| f.is_finite())
    }

    pub(super) fn exchanges(&self) -> impl Iterator<Item = f64> {
        self.exchanges.iter().copied()
    }

    pub(super) fn line(&mut self, case: Case, bw: bool, wire: bool) -> Result<ResultLine> {
        if self.in_floors.is_empty() {
            bail!(
                "{} of {} bytes: no slice was steady: give more --time, or use a quieter machine",
                case.verb.name(),
                case.size
            );
        }
        let quantile = |q| self.all.quantile_ns(q) as f64 / 10.0;
        let p50_ns = quantile(0.5);
        let share = (!self.shares.is_empty()).then(|| median(&mut self.shares));
        Ok(ResultLine {
            verb: case.verb.name(),
            size: case.size,
            place: self.place,
            min_ns: self.min_ns,
            p50_ns,
            p99_ns: quantile(0.99),
            p999_ns: quantile(0.999),
            iterations: self.ops,
            floors: median(&mut self.in_floors),
            exchanges: (!self.in_exchanges.is_empty()).then(|| median(&mut self.in_exchanges)),
            bytes_per_s: bw.then(|| f64::from(case.size) * 1e9 / p50_ns),
            of_memcpy: share.filter(|_| !wire),
            of_bare: share.filter(|_| wire),
        })
    }
}

/// Drives until what is under way has arrived.
fn settle(driving: &mut Driving<'_>) {
    let start = Instant::now();
    while start.elapsed() < SETTLE {
        driving.turn();
    }
}
