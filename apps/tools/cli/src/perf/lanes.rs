//! Sides that alternate: a guest, a native process and the same again, each an agent on the same core.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_host::accel::AccelKind;
use hyv_host::backend::{Quotas, UserMemory};
use hyv_host::instance::{Guest, Instance, InstanceConfig};
use hyv_host::sys::{clock, cpu};
use hyv_host::vmm::GuestConfig;
use hyv_host::wire::WireConfig;
use hyv_lab::limits::MIN_PAIRS;
use hyv_lab::{Interval, Latencies, Slice, median, pair_slices, paired_ratio, values};
use hyv_rnic::cell::Inline;
use hyv_tools::perf::{Command, Kind, Partner, REGION, REGISTERED, Samples, Verb};
use hyv_verbs::{Context, Gid, Process, probe};

use super::report::{Aa, ControlLine, Floor, RatioLine, Report, ResultLine};
use super::{Args, Case, What, Where};
use crate::machine::{self, Native, Roles};

/// Length of a slice: short against the machine's own drift.
const SLICE: Duration = Duration::from_millis(20);
/// Shortest time of one sample, so that the clock's tick of 10 ns does not show.
const BATCH_NS: u64 = 10_000;
/// Slices are paired when their floors differ by no more: else the cores lay elsewhere.
const SAME_FLOOR: f64 = 1.2;
/// Slices whose floors before and after differ by more are dropped: the machine changed in between.
const STEADY: f64 = 1.25;
/// Rounds of the floor's ping-pong at either end of a slice, after as many to warm up.
const FLOOR_ROUNDS: u32 = 1_000;
/// Silence after which a probe has failed, ns.
const SILENCE_NS: u64 = 1_000_000_000;
/// RAM of the partners in this process: two buffers of 4 MiB and samples for each of three.
const PARTNER_RAM: u64 = 48 << 20;
/// RAM of the guest: buffers and the runtime, and what `reg_mr` is measured with (never touched, so never backed).
const GUEST_RAM: u64 = (256 << 20) + REGISTERED as u64;
/// Length of the slices in which VM exits are counted.
const EXITS_SLICE: Duration = Duration::from_millis(400);
/// Port of the first agent; the others take the next ones.
const PORT: u16 = 7072;

/// One side.
struct Lane {
    place: &'static str,
    partner: Partner,
    memory: UserMemory,
    /// One for each slice, in order; unsteady ones have a floor that pairs with none.
    slices: Vec<Slice>,
    all: Latencies,
    min_ns: f64,
    ops: u64,
    /// Medians of memcpy between the same buffers, ns.
    copies: Vec<f64>,
}

/// Everything that runs, in the order in which it is to end.
struct Machine {
    lanes: Vec<Lane>,
    natives: Vec<Native>,
    guest: Option<Guest>,
    process: Arc<Process>,
    instance: Instance,
}

pub(super) fn measure(
    args: &Args,
    cases: &[Case],
    roles: &Roles,
    stop: &AtomicBool,
) -> Result<Report> {
    let mut machine = Machine::start(args, roles)?;
    cpu::pin_current(&roles.engine).context("cannot run on the chosen CPU")?;
    let mut report = Report {
        what: match args.what {
            What::Lat => "latency",
            What::Bw => "bandwidth",
        },
        accel: machine
            .guest
            .as_ref()
            .map(|g| format!("{:?}", g.qemu().accel()).to_lowercase()),
        results: Vec::new(),
        ratios: Vec::new(),
        aa: None,
        floor: Floor::default(),
        mode: "inline",
        vm_exits_per_million_ops: None,
        control: Vec::new(),
    };
    let mut twins = Vec::new();
    let mut floors = Vec::new();
    header(args.what);
    for &case in cases {
        machine.alternate(args, case, stop)?;
        machine.summarize(args, case, &mut report, &mut twins, &mut floors)?;
    }
    if args.what == What::Lat {
        report.vm_exits_per_million_ops = machine.count_exits(cases)?;
        report.control = machine.control()?;
    }
    if !floors.is_empty() {
        report.floor.cache_line_rtt_ns = Some(median(&mut floors));
    }
    if !twins.is_empty() {
        let aa = paired_ratio(&twins).context(FEW)?;
        report.aa = Some(Aa {
            median: aa.median,
            low: aa.low,
            high: aa.high,
        });
    }
    footer(&report);
    machine.end()?;
    Ok(report)
}

const FEW: &str = "too few slices with the same floor: give more --time, or use a quieter machine";

impl Machine {
    fn start(args: &Args, roles: &Roles) -> Result<Self> {
        let wants = |place| args.places.contains(&place);
        let guest_tools = if wants(Where::Guest) {
            let image = machine::image(args.image.as_ref())?;
            Some((image, machine::accelerator(args.accel)?))
        } else {
            None
        };
        let _ = clock::tsc_hz();
        let instance = Instance::start(InstanceConfig {
            name: None,
            prefix: "perf".into(),
            engine_cpus: roles.engine.clone(),
            spin: Duration::from_micros(50),
            quotas: Quotas::default(),
            wire: WireConfig::default(),
        })?;
        let dir = instance.dir().path().to_owned();
        let process = Process::connect(&dir, PARTNER_RAM, "perf")?;
        let platform: Arc<dyn hyv_verbs::Platform> = Arc::<Process>::clone(&process);
        let context = Context::open(platform).context("cannot open the device")?;
        let mut machine = Self {
            lanes: Vec::new(),
            natives: Vec::new(),
            guest: None,
            process,
            instance,
        };
        if let Some((image, (qemu, accel))) = guest_tools {
            let config = GuestConfig {
                name: "guest".into(),
                image,
                symbols: None,
                args: format!("tool=perf port={PORT}"),
                memory: GUEST_RAM,
                watchdog: None,
                spin_hint: 1,
                ips: Vec::new(),
                net: None,
            };
            let guest = machine::boot(&machine.instance, &config, (&qemu, &accel), roles)?;
            eprintln!("guest: up under {accel}");
            let partner = Partner::connect(&context, (Gid::LOCAL, PORT))?;
            machine.guest = Some(guest);
            machine.add("guest", "guest", partner)?;
        }
        if wants(Where::Native) {
            // The same again, for the A/A comparison.
            for (i, place) in [(1u16, "native"), (2, "twin")] {
                let name = format!("native-{i}");
                let pin: Vec<String> = roles.measured.iter().map(ToString::to_string).collect();
                let mut native = Native::start(&[
                    "perf-agent".into(),
                    "--dir".into(),
                    dir.display().to_string(),
                    "--port".into(),
                    (PORT + i).to_string(),
                    "--name".into(),
                    name.clone(),
                    "--pin".into(),
                    pin.join(","),
                ])?;
                let partner = native.wait_for(Duration::from_secs(10), || {
                    Partner::connect(&context, (Gid::LOCAL, PORT + i))
                })?;
                machine.natives.push(native);
                machine.add(place, &name, partner)?;
            }
        }
        Ok(machine)
    }

    fn add(&mut self, place: &'static str, user: &str, partner: Partner) -> Result<()> {
        let memory = self
            .instance
            .backend()
            .user_memory(user)
            .with_context(|| format!("{user} is gone"))?;
        // Large pages on all sides, or the comparison is unfair; where the kernel has none, the spread shows it.
        let mine = self.own_memory()?;
        for (memory, offset) in [
            (&memory, partner.agent_offset()),
            (&mine, partner.offset()?),
        ] {
            if let Err(e) = memory.ram.collapse(offset, REGION as u64) {
                tracing::debug!("{user} stays on small pages: {e}");
            }
        }
        self.lanes.push(Lane {
            place,
            partner,
            memory,
            slices: Vec::new(),
            all: Latencies::new(),
            min_ns: f64::INFINITY,
            ops: 0,
            copies: Vec::new(),
        });
        Ok(())
    }

    fn own_memory(&self) -> Result<UserMemory> {
        self.instance
            .backend()
            .user_memory("perf")
            .context("this process lost its device")
    }

    fn vcpu_exits(&self) -> Result<Option<u64>> {
        match &self.guest {
            Some(g) if g.qemu().accel() == AccelKind::Kvm => {
                let stats = g
                    .qemu()
                    .vcpu_stats()
                    .context("cannot read KVM's counters")?;
                Ok(Some(stats.by_guest()))
            }
            _ => Ok(None),
        }
    }

    /// VM exits in a long slice of each case: sleeping between slices is not what data verbs cost.
    fn count_exits(&mut self, cases: &[Case]) -> Result<Option<f64>> {
        let Some(before) = self.vcpu_exits()? else {
            return Ok(None);
        };
        let Some(i) = self.lanes.iter().position(|l| l.place == "guest") else {
            return Ok(None);
        };
        let mut ops = 0;
        for case in cases {
            let command = Command {
                kind: Kind::Latency,
                verb: case.verb,
                size: case.size,
                slice_ns: EXITS_SLICE.as_nanos() as u64,
                // So that the samples' memory holds the whole slice.
                batch_ns: 4 * BATCH_NS,
            };
            let mut inline = self.instance.engine().drive_inline();
            let samples = self.lanes[i].partner.measure(&command, || {
                inline.driver().poll();
            })?;
            ops += samples.ops;
        }
        let after = self.vcpu_exits()?.unwrap_or(before);
        Ok(Some((after - before) as f64 * 1e6 / ops.max(1) as f64))
    }

    /// What `create_qp` to RTS and `reg_mr` of 1 GiB take. The engine's own thread drives: control needs a core too.
    fn control(&mut self) -> Result<Vec<ControlLine>> {
        let mut lines = Vec::new();
        for lane in self.lanes.iter_mut().filter(|l| l.place != "twin") {
            for (what, kind) in [
                ("create_qp to RTS", Kind::Connect { rounds: 200 }),
                ("reg_mr 1 GiB", Kind::Register { rounds: 200 }),
            ] {
                let command = Command {
                    kind,
                    verb: Verb::Write,
                    size: 0,
                    slice_ns: 0,
                    batch_ns: 0,
                };
                let mut samples = lane
                    .partner
                    .measure(&command, || std::thread::sleep(Duration::from_micros(200)))?;
                let line = ControlLine {
                    what,
                    place: lane.place,
                    p50_ns: median(&mut samples.ns),
                };
                eprintln!(
                    "{:>26} {:>7} {:>9}",
                    line.what,
                    line.place,
                    values::nanos(line.p50_ns as u64)
                );
                lines.push(line);
            }
        }
        Ok(lines)
    }

    fn alternate(&mut self, args: &Args, case: Case, stop: &AtomicBool) -> Result<()> {
        for lane in &mut self.lanes {
            lane.slices.clear();
            lane.all.clear();
            lane.copies.clear();
            (lane.min_ns, lane.ops) = (f64::INFINITY, 0);
        }
        let command = Command {
            kind: match args.what {
                What::Lat => Kind::Latency,
                What::Bw => Kind::Bandwidth,
            },
            verb: case.verb,
            size: case.size,
            slice_ns: SLICE.as_nanos() as u64,
            batch_ns: BATCH_NS,
        };
        let own = self.own_memory()?;
        let start = Instant::now();
        let budget = args.time * self.lanes.len() as u32;
        let mut random = clock::tsc() | 1;
        let mut order: Vec<usize> = (0..self.lanes.len()).collect();
        // An interval needs some rounds, however short the time.
        while start.elapsed() < budget || self.lanes.iter().any(|l| l.slices.len() < 2 * MIN_PAIRS)
        {
            // Another order each round: nobody always comes after the same neighbour.
            for i in (1..order.len()).rev() {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                order.swap(i, (random % (i as u64 + 1)) as usize);
            }
            for &i in &order {
                let mut inline = self.instance.engine().drive_inline();
                self.lanes[i].slice(&command, &mut inline, &own)?;
            }
            if stop.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            if self
                .guest
                .as_ref()
                .is_some_and(|g| g.qemu().exit_report().is_some())
            {
                bail!("the guest ended");
            }
        }
        Ok(())
    }

    fn lane(&self, place: &str) -> Option<&Lane> {
        self.lanes.iter().find(|l| l.place == place)
    }

    fn summarize(
        &mut self,
        args: &Args,
        case: Case,
        report: &mut Report,
        twins: &mut Vec<(f64, f64)>,
        floors: &mut Vec<f64>,
    ) -> Result<()> {
        let bw = args.what == What::Bw;
        for lane in &mut self.lanes {
            if lane.place == "twin" {
                continue;
            }
            let line = lane.line(case, bw)?;
            floors.extend(lane.floors());
            show(&line);
            report.results.push(line);
        }
        let p50 = |a: &Lane, b: &Lane| -> Vec<(f64, f64)> {
            pair_slices(&a.slices, &b.slices, SAME_FLOOR)
                .iter()
                .map(|(a, b)| (a.p50_ns, b.p50_ns))
                .collect()
        };
        if let (Some(twin), Some(native)) = (self.lane("twin"), self.lane("native")) {
            twins.extend(p50(twin, native));
        }
        if let (Some(guest), Some(native)) = (self.lane("guest"), self.lane("native")) {
            let ratio: Interval = paired_ratio(&p50(guest, native)).context(FEW)?;
            let tails: Vec<(f64, f64)> = pair_slices(&guest.slices, &native.slices, SAME_FLOOR)
                .iter()
                .map(|(a, b)| (a.p99_ns, b.p99_ns))
                .collect();
            let p99 = paired_ratio(&tails).context(FEW)?;
            eprintln!(
                "  {:>46}  guest / native {:.3} ({:.3} to {:.3}), p99 {:.3} ({:.3} to {:.3})",
                "", ratio.median, ratio.low, ratio.high, p99.median, p99.low, p99.high
            );
            report.ratios.push(RatioLine {
                verb: case.verb.name(),
                size: case.size,
                median: ratio.median,
                low: ratio.low,
                high: ratio.high,
                p99,
            });
        }
        Ok(())
    }

    fn end(self) -> Result<()> {
        drop(self.lanes);
        drop(self.natives);
        if let Some(guest) = self.guest {
            let report = guest.shutdown();
            if !report.is_success() {
                bail!("the guest did not end well: {report}");
            }
        }
        drop(self.process);
        Ok(())
    }
}

impl Lane {
    fn floor(&mut self, inline: &mut Inline<'_>) -> Result<f64> {
        let line = &self.memory.window.probe.line;
        line.store(0, Ordering::SeqCst);
        let step = 32;
        let batches = FLOOR_ROUNDS / step;
        self.partner.floor(FLOOR_ROUNDS + batches * step, || {
            inline.driver().poll();
        })?;
        let bounce = |from, rounds| -> Result<()> {
            if probe::bounce(line, from, rounds, SILENCE_NS, clock::monotonic_ns) {
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

    fn slice(
        &mut self,
        command: &Command,
        inline: &mut Inline<'_>,
        own: &UserMemory,
    ) -> Result<()> {
        let before = self.floor(inline)?;
        let samples: Samples = self.partner.measure(command, || {
            inline.driver().poll();
        })?;
        if command.kind == Kind::Bandwidth {
            self.copies.push(self.memcpy(own, command.size)?);
        }
        let after = self.floor(inline)?;
        let mut ns = samples.ns;
        if ns.is_empty() {
            bail!(
                "{} of {} bytes: not one sample in {SLICE:?}",
                command.verb.name(),
                command.size
            );
        }
        let steady = before / after < STEADY && after / before < STEADY;
        if steady {
            self.ops += samples.ops;
            for &t in &ns {
                // The histogram counts whole units: tenths of ns, so that two fast sides can be told apart.
                self.all.record((t * 10.0) as u64);
                self.min_ns = self.min_ns.min(t);
            }
        }
        let at = (ns.len() * 99).div_ceil(100) - 1;
        let p99_ns = *ns.select_nth_unstable_by(at, f64::total_cmp).1;
        self.slices.push(Slice {
            p50_ns: median(&mut ns),
            p99_ns,
            floor_ns: if steady {
                f64::midpoint(before, after)
            } else {
                f64::INFINITY
            },
        });
        Ok(())
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

    fn floors(&self) -> impl Iterator<Item = f64> {
        self.slices
            .iter()
            .map(|s| s.floor_ns)
            .filter(|f| f.is_finite())
    }

    fn line(&mut self, case: Case, bw: bool) -> Result<ResultLine> {
        let mut floors: Vec<f64> = self.floors().collect();
        if floors.is_empty() {
            bail!(
                "{} of {} bytes: no slice was steady: give more --time, or use a quieter machine",
                case.verb.name(),
                case.size
            );
        }
        let floor = median(&mut floors);
        let quantile = |q| self.all.quantile_ns(q) as f64 / 10.0;
        let p50_ns = quantile(0.5);
        let copy = (!self.copies.is_empty()).then(|| median(&mut self.copies));
        Ok(ResultLine {
            verb: case.verb.name(),
            size: case.size,
            place: self.place,
            min_ns: self.min_ns,
            p50_ns,
            p99_ns: quantile(0.99),
            p999_ns: quantile(0.999),
            iterations: self.ops,
            floors: p50_ns / floor,
            bytes_per_s: bw.then(|| f64::from(case.size) * 1e9 / p50_ns),
            of_memcpy: copy.map(|c| c / p50_ns),
        })
    }
}

fn header(what: What) {
    eprintln!(
        "{:>9} {:>8} {:>7} {:>9} {:>9} {:>9} {:>9} {:>7}{}",
        "verb",
        "size",
        "where",
        "min",
        "typical",
        "p99",
        "p99.9",
        "floors",
        if what == What::Bw {
            "       GB/s  memcpy"
        } else {
            ""
        }
    );
}

fn show(line: &ResultLine) {
    let time = |ns: f64| values::nanos(ns.round() as u64);
    let mut text = format!(
        "{:>9} {:>8} {:>7} {:>9} {:>9} {:>9} {:>9} {:>7.2}",
        line.verb,
        values::bytes(u64::from(line.size)),
        line.place,
        time(line.min_ns),
        time(line.p50_ns),
        time(line.p99_ns),
        time(line.p999_ns),
        line.floors
    );
    if let Some(rate) = line.bytes_per_s {
        text.push_str(&format!(" {:>10.2}", rate / 1e9));
    }
    if let Some(share) = line.of_memcpy {
        text.push_str(&format!(" {:>6.0}%", share * 100.0));
    }
    eprintln!("{text}");
}

fn footer(report: &Report) {
    if let Some(aa) = report.aa {
        eprintln!(
            "A/A: native / native {:.3} ({:.3} to {:.3})",
            aa.median, aa.low, aa.high
        );
    }
    if let Some(floor) = report.floor.cache_line_rtt_ns {
        eprintln!("floor: {floor:.0} ns for one cache line to the measured side's core and back");
    }
    if let Some(exits) = report.vm_exits_per_million_ops {
        eprintln!("VM exits that the guest caused: {exits:.1} per million data verbs");
    }
}
