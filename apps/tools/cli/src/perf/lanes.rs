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
use hyv_lab::{Interval, Slice, median, pair_slices, paired_ratio, values};
use hyv_tools::perf::{Command, Kind, Partner, REGISTERED, Verb};
use hyv_verbs::{Context, Gid, Process};

use super::idle::{self, Crowd};
use super::lane::Lane;
use super::report::{Aa, ControlLine, Floor, Idle, RatioLine, Report};
use super::show::{footer, header, show};
use super::wire::{Bare, Driver, Driving, InlineAgent, Network};
use super::{Args, Case, What, Where};
use crate::machine::{self, Native, Roles};

/// How slices are measured and compared.
#[derive(Clone, Copy)]
struct Method {
    /// Length of a slice: short against the machine's own drift.
    slice: Duration,
    /// Shortest time of one sample, ns.
    batch_ns: u64,
    /// Slices are paired when their floors differ by no more: else the cores lay elsewhere.
    same_floor: f64,
    /// Slices whose floors before and after differ by more pair with none: the machine changed in between.
    steady: f64,
}

/// Memory to memory: the clock's tick of 10 ns must not show.
const MEMORY: Method = Method {
    slice: Duration::from_millis(20),
    batch_ns: 10_000,
    same_floor: 1.2,
    steady: 1.25,
};

/// Over the wire one round trip is a sample: it takes microseconds, and bare ones are timed one by one too. System calls
/// scatter more than cache lines.
const WIRE: Method = Method {
    slice: Duration::from_millis(20),
    batch_ns: 0,
    same_floor: 1.3,
    steady: 1.5,
};

/// The same for bandwidth, where a sample is sixteen messages.
const WIRE_BANDWIDTH: Method = Method {
    slice: Duration::from_millis(60),
    ..WIRE
};

/// RAM of the partners in this process: two buffers of 4 MiB and samples for each of three.
pub(super) const PARTNER_RAM: u64 = 48 << 20;
/// RAM of the guest: buffers and the runtime, and what `reg_mr` is measured with (never touched, so never backed).
const GUEST_RAM: u64 = (256 << 20) + REGISTERED as u64;
/// Length of the slices in which VM exits are counted.
const EXITS_SLICE: Duration = Duration::from_secs(2);
/// Port of the first agent; the others take the next ones.
const PORT: u16 = 7072;

/// Everything that runs, in the order in which it is to end.
struct Machine {
    lanes: Vec<Lane>,
    natives: Vec<Native>,
    inline: Vec<InlineAgent>,
    guest: Option<Guest>,
    crowd: Option<Crowd>,
    process: Arc<Process>,
    bare: Option<Bare>,
    /// The partner's host.
    instance: Instance,
    /// The measured side's, where it is another one.
    peer: Option<Instance>,
    network: Option<Network>,
    method: Method,
    path_mtu: Option<u32>,
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
        mode: match &machine.network {
            Some(network) => network.mode(),
            None => "inline".into(),
        },
        carrier: machine.network.as_ref().map(|n| n.carrier.to_string()),
        path_mtu: machine.path_mtu,
        vm_exits_per_million_ops: None,
        control: Vec::new(),
        idle: args.idle_qps.map(|queue_pairs| Idle {
            queue_pairs,
            ratios: Vec::new(),
        }),
    };
    let mut twins = Vec::new();
    let mut floors = Vec::new();
    let mut exchanges = Vec::new();
    header(args.what, args.wire);
    for &case in cases {
        machine.alternate(args, case, stop)?;
        machine.summarize(args, case, &mut report, &mut twins, &mut floors)?;
        exchanges.extend(machine.lanes.iter().flat_map(Lane::exchanges));
    }
    if args.what == What::Lat {
        report.vm_exits_per_million_ops = machine.count_exits(cases)?;
        if !args.wire {
            report.control = machine.control()?;
        }
    }
    if let Some(bare) = &mut machine.bare {
        bare.report(&mut report.floor);
    }
    if !floors.is_empty() {
        report.floor.cache_line_rtt_ns = Some(median(&mut floors));
    }
    if !exchanges.is_empty() {
        report.floor.two_lines_rtt_ns = Some(median(&mut exchanges));
    }
    if !twins.is_empty() {
        report.aa = machine.ratio("A/A", &twins)?.map(|aa| Aa {
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

/// One host.
pub(super) fn memory_to_memory(roles: &Roles) -> Result<Instance> {
    Ok(Instance::start(InstanceConfig {
        name: None,
        prefix: "perf".into(),
        engine_cpus: roles.engine.clone(),
        spin: Duration::from_micros(50),
        quotas: Quotas::default(),
        wire: WireConfig::default(),
    })?)
}

/// The measured side's host, if the partner's thread drives its engine too.
fn also_driven<'a>(peer: &'a Option<Instance>, network: &Option<Network>) -> Option<&'a Instance> {
    let both = |n: &Network| n.driver == Driver::Partner;
    peer.as_ref().filter(|_| network.as_ref().is_some_and(both))
}

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
        let network = match args.wire {
            true => Some(Network::new(args, roles)?),
            false => None,
        };
        let (instance, peer) = match &network {
            Some(network) => (network.partner(roles)?, Some(network.measured(roles)?)),
            None => (memory_to_memory(roles)?, None),
        };
        let process = Process::connect(instance.dir().path(), PARTNER_RAM, "perf")?;
        let platform: Arc<dyn hyv_verbs::Platform> = Arc::<Process>::clone(&process);
        let context = Context::open(platform).context("cannot open the device")?;
        let (mut bare, mut path_mtu) = (None, None);
        if let Some(network) = &network {
            let mtu = context.query_port(1)?.active_mtu;
            (bare, path_mtu) = (Some(Bare::new(network, mtu)?), Some(mtu));
        }
        let gid = network.as_ref().map_or(Gid::LOCAL, Network::gid);
        let mut machine = Self {
            lanes: Vec::new(),
            natives: Vec::new(),
            inline: Vec::new(),
            guest: None,
            crowd: None,
            process,
            bare,
            instance,
            peer,
            network,
            method: match (args.wire, args.what) {
                (false, _) => MEMORY,
                (true, What::Lat) => WIRE,
                (true, What::Bw) => WIRE_BANDWIDTH,
            },
            path_mtu,
        };
        let dir = machine.measured().dir().path().to_owned();
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
            let guest = machine::boot(machine.measured(), &config, (&qemu, &accel), roles)?;
            eprintln!("guest: up under {accel}");
            let partner = Partner::connect(&context, (gid, PORT))?;
            machine.guest = Some(guest);
            machine.add("guest", "guest", partner)?;
        }
        if wants(Where::Native) {
            // The same again, for the A/A comparison.
            for (i, place) in [(1u16, "native"), (2, "twin")] {
                let name = format!("native-{i}");
                let address = (gid, PORT + i);
                if machine.driver() == Some(Driver::Own) {
                    let mut agent = InlineAgent::start(machine.measured(), roles, &name, PORT + i)?;
                    let partner = machine::wait_for(
                        Duration::from_secs(10),
                        || Partner::connect(&context, address),
                        || agent.check(),
                    )?;
                    machine.inline.push(agent);
                    machine.add(place, &name, partner)?;
                    continue;
                }
                let mut native = Native::agent(&dir, PORT + i, &name, roles)?;
                let partner = native.wait_for(Duration::from_secs(10), || {
                    Partner::connect(&context, address)
                })?;
                machine.natives.push(native);
                machine.add(place, &name, partner)?;
            }
        }
        if let Some(count) = args.idle_qps {
            let (crowd, partner) = Crowd::start(count, roles, PORT)?;
            let (theirs, mine) = crowd.memories()?;
            let lane = Lane::on_large_pages(idle::PLACE, partner, theirs, &mine)?;
            machine.lanes.push(lane);
            machine.crowd = Some(crowd);
        }
        Ok(machine)
    }

    fn add(&mut self, place: &'static str, user: &str, partner: Partner) -> Result<()> {
        let memory = self
            .measured()
            .backend()
            .user_memory(user)
            .with_context(|| format!("{user} is gone"))?;
        let mine = self.own_memory()?;
        self.lanes
            .push(Lane::on_large_pages(place, partner, memory, &mine)?);
        Ok(())
    }

    /// The host on which the measured side runs.
    fn measured(&self) -> &Instance {
        self.peer.as_ref().unwrap_or(&self.instance)
    }

    fn driver(&self) -> Option<Driver> {
        self.network.as_ref().map(|n| n.driver)
    }

    /// A ratio with its interval. Over the wire the floor itself may be too restless for one.
    fn ratio(&self, what: &str, pairs: &[(f64, f64)]) -> Result<Option<Interval>> {
        match paired_ratio(pairs) {
            Ok(interval) => Ok(Some(interval)),
            Err(_) if self.network.is_some() => {
                eprintln!("  no ratio {what}: {FEW}");
                Ok(None)
            }
            Err(e) => Err(e).context(FEW),
        }
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
                batch_ns: 200_000,
            };
            let also = also_driven(&self.peer, &self.network);
            let mut driving = Driving::start(&self.instance, also);
            let lane = &mut self.lanes[i];
            ops += lane.partner.measure(&command, || driving.turn())?.ops;
        }
        let after = self.vcpu_exits()?.unwrap_or(before);
        Ok(Some((after - before) as f64 * 1e6 / ops.max(1) as f64))
    }

    /// What `create_qp` to RTS and `reg_mr` of 1 GiB take. The engine's own thread drives: control needs a core too.
    fn control(&mut self) -> Result<Vec<ControlLine>> {
        let mut lines = Vec::new();
        let shown = |l: &&mut Lane| l.place != "twin" && l.place != idle::PLACE;
        for lane in self.lanes.iter_mut().filter(shown) {
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
            lane.clear();
        }
        let command = Command {
            kind: match args.what {
                What::Lat => Kind::Latency,
                What::Bw => Kind::Bandwidth,
            },
            verb: case.verb,
            size: case.size,
            slice_ns: self.method.slice.as_nanos() as u64,
            batch_ns: self.method.batch_ns,
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
                let also = also_driven(&self.peer, &self.network);
                let host = match &self.crowd {
                    Some(crowd) if self.lanes[i].place == idle::PLACE => &crowd.instance,
                    _ => &self.instance,
                };
                let mut driving = Driving::start(host, also);
                let bare = self.bare.as_mut();
                self.lanes[i].slice(&command, &mut driving, &own, bare, self.method.steady)?;
            }
            if let Some(bare) = &mut self.bare {
                bare.other()?;
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

    /// A figure of slices that were measured at about the same time on the same floor.
    fn pairs(&self, a: &Lane, b: &Lane, of: impl Fn(&Slice) -> f64) -> Vec<(f64, f64)> {
        pair_slices(&a.slices, &b.slices, self.method.same_floor)
            .iter()
            .map(|(a, b)| (of(a), of(b)))
            .collect()
    }

    fn ratio_line(&self, case: Case, a: &Lane, b: &Lane) -> Result<Option<RatioLine>> {
        let what = format!("{} / {}", a.place, b.place);
        let p50 = self.ratio(&what, &self.pairs(a, b, |s| s.p50_ns))?;
        let p99 = self.ratio(&what, &self.pairs(a, b, |s| s.p99_ns))?;
        Ok(p50.zip(p99).map(|(ratio, p99)| RatioLine {
            verb: case.verb.name(),
            size: case.size,
            median: ratio.median,
            low: ratio.low,
            high: ratio.high,
            p99,
        }))
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
            if lane.place == "twin" || lane.place == idle::PLACE {
                continue;
            }
            let line = lane.line(case, bw, args.wire)?;
            if args.wire {
                let also = also_driven(&self.peer, &self.network);
                let mut driving = Driving::start(&self.instance, also);
                floors.push(lane.cache_line(&mut driving)?);
            } else {
                floors.extend(lane.floors());
            }
            show(&line);
            report.results.push(line);
        }
        if let (Some(twin), Some(native)) = (self.lane("twin"), self.lane("native")) {
            twins.extend(self.pairs(twin, native, |s| s.p50_ns));
        }
        if let (Some(crowded), Some(native), Some(idle)) = (
            self.lane(idle::PLACE),
            self.lane("native"),
            &mut report.idle,
        ) && let Some(line) = self.ratio_line(case, crowded, native)?
        {
            line.show(&format!("beside {} idle QPs / without", idle.queue_pairs));
            idle.ratios.push(line);
        }
        if let (Some(guest), Some(native)) = (self.lane("guest"), self.lane("native"))
            && let Some(line) = self.ratio_line(case, guest, native)?
        {
            line.show("guest / native");
            report.ratios.push(line);
        }
        Ok(())
    }

    fn end(self) -> Result<()> {
        drop(self.lanes);
        drop(self.natives);
        drop(self.inline);
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
