//! `--wire`: two hosts in two network namespaces, the partner's and the measured side's, and bare sockets on the same path.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyv_carrier::addr::gid_of;
use hyv_carrier::floor::{End, Pair};
use hyv_carrier::veth::Veth;
use hyv_carrier::{Choice, Kind, Options};
use hyv_host::backend::Quotas;
use hyv_host::instance::{Instance, InstanceConfig};
use hyv_host::sys::{clock, cpu};
use hyv_host::wire::WireConfig;
use hyv_lab::median;
use hyv_rnic::cell::{EngineCell, Inline};
use hyv_tools::perf::{Agent, Clock, Drive};
use hyv_verbs::{Context, Gid, Platform, Process};

use super::report::Floor;
use super::{Args, Where};
use crate::machine::Roles;

/// Bytes of a bare packet behind the UDP header.
const BARE: usize = 64;
/// Round trips of bare packets at either end of a slice: some milliseconds.
const ROUNDS: usize = 200;
/// How long bare sockets send one way in each slice of a bandwidth run.
const ONE_WAY: Duration = Duration::from_millis(25);
/// BTH and ICRC: what a packet in the middle of a message has besides its payload.
const AROUND: usize = 16;
/// RAM of an agent in this process: buffers, samples and rings on whole large pages.
const AGENT_RAM: u64 = 24 << 20;

/// Who drives the measured side's engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Driver {
    /// The measured side's own thread, as the partner's drives the partner's.
    Own,
    /// The partner's thread drives both, because there is no third CPU.
    Partner,
    /// A thread on a CPU of its own.
    Thread,
}

/// The two hosts' network.
pub(super) struct Network {
    _veth: Veth,
    partner: End,
    measured: End,
    pub(super) carrier: Kind,
    pub(super) driver: Driver,
}

impl Network {
    pub(super) fn new(args: &Args, roles: &Roles) -> Result<Self> {
        let (&[here], &[there]) = (&roles.engine[..], &roles.measured[..]) else {
            bail!("--wire needs two CPUs: either host polls on its own");
        };
        if here == there {
            bail!("--wire needs two CPUs: either host polls on its own");
        }
        let veth = Veth::new(usize::from(args.mtu)).context("--wire")?;
        let [mut partner, mut measured] = veth.ends();
        partner.cpu = Some(here);
        measured.cpu = Some(there);
        // What `auto` means is found out once, so that bare sockets are of the same kind.
        let opened = partner.run(|| {
            hyv_carrier::open(args.carrier, &partner.addr, &Options::default())
                .map(|(_, info)| (info.carrier, info.note))
        });
        let (carrier, note) = opened
            .and_then(|r| r)
            .with_context(|| format!("--wire --carrier {}", name(args.carrier)))?;
        if let Some(note) = note {
            tracing::warn!("{note}");
        }
        let driver = if !args.places.contains(&Where::Guest) {
            Driver::Own
        } else if roles.third.is_some() {
            Driver::Thread
        } else {
            Driver::Partner
        };
        Ok(Self {
            _veth: veth,
            partner,
            measured,
            carrier,
            driver,
        })
    }

    fn choice(&self) -> Choice {
        match self.carrier {
            Kind::Udp => Choice::Udp,
            Kind::Packet => Choice::Packet,
        }
    }

    fn start(&self, end: &End, prefix: &str, engine_cpus: Vec<usize>) -> Result<Instance> {
        let config = InstanceConfig {
            name: None,
            prefix: prefix.into(),
            engine_cpus,
            spin: Duration::from_micros(50),
            quotas: Quotas::default(),
            wire: WireConfig {
                listen: Some(end.addr.clone()),
                carrier: self.choice(),
                ..WireConfig::default()
            },
        };
        // Its threads are not bound to the end's CPU, unless they say so.
        let anywhere = End {
            cpu: None,
            ..end.clone()
        };
        Ok(anywhere.run(|| Instance::start(config))??)
    }

    /// The partner's host.
    pub(super) fn partner(&self, roles: &Roles) -> Result<Instance> {
        self.start(&self.partner, "perf", roles.engine.clone())
    }

    /// The measured side's host.
    pub(super) fn measured(&self, roles: &Roles) -> Result<Instance> {
        let cpus = match (self.driver, &roles.third) {
            (Driver::Own, _) => &roles.measured,
            (Driver::Thread, Some(third)) => third,
            _ => &roles.engine,
        };
        self.start(&self.measured, "perf-peer", cpus.clone())
    }

    /// Where agents listen.
    pub(super) fn gid(&self) -> Gid {
        Gid(gid_of(self.measured.addr.ip))
    }

    /// What the report says about who runs where.
    pub(super) fn mode(&self) -> String {
        let driver = match self.driver {
            Driver::Own => "inline on both hosts",
            Driver::Partner => "both hosts inline on the partner's thread",
            Driver::Thread => "inline on the partner's host, thread on the measured side's",
        };
        format!("wire, {}, {driver}", self.carrier)
    }
}

const fn name(choice: Choice) -> &'static str {
    match choice {
        Choice::Auto => "auto",
        Choice::Udp => "udp",
        Choice::Packet => "packet",
    }
}

/// Bare sockets on the same path, on the same CPUs.
pub(super) struct Bare {
    carrier: Kind,
    udp: Pair,
    /// None where packet sockets do not work.
    packet: Option<Pair>,
    /// For bandwidth: with offload.
    wide: Pair,
    segment: usize,
    /// Medians of slices, ns.
    udp_ns: Vec<f64>,
    packet_ns: Vec<f64>,
    /// Bytes a second.
    rates: Vec<f64>,
}

impl Bare {
    /// `path_mtu`: payload of a packet.
    pub(super) fn new(network: &Network, path_mtu: u32) -> Result<Self> {
        let (a, b) = (&network.measured, &network.partner);
        let packet = match (Pair::packet(a, b), network.carrier) {
            (Ok(pair), _) => Some(pair),
            (Err(e), Kind::Udp) => {
                tracing::debug!("no bare packet sockets: {e}");
                None
            }
            (Err(e), Kind::Packet) => return Err(e).context("bare packet sockets"),
        };
        let wide = match network.carrier {
            Kind::Udp => Pair::udp(a, b, true),
            Kind::Packet => Pair::packet(a, b),
        };
        Ok(Self {
            carrier: network.carrier,
            udp: Pair::udp(a, b, false).context("bare UDP sockets")?,
            packet,
            wide: wide.context("bare sockets")?,
            segment: path_mtu as usize + AROUND,
            udp_ns: Vec::new(),
            packet_ns: Vec::new(),
            rates: Vec::new(),
        })
    }

    /// Median round trip of bare sockets of the carrier's kind, ns.
    pub(super) fn floor(&mut self) -> Result<f64> {
        match (self.carrier, &mut self.packet) {
            (Kind::Packet, Some(pair)) => bounce(pair, &mut self.packet_ns),
            _ => bounce(&mut self.udp, &mut self.udp_ns),
        }
    }

    /// The same of the other kind, for the report.
    pub(super) fn other(&mut self) -> Result<()> {
        match (self.carrier, &mut self.packet) {
            (Kind::Packet, _) => bounce(&mut self.udp, &mut self.udp_ns).map(drop),
            (Kind::Udp, Some(pair)) => bounce(pair, &mut self.packet_ns).map(drop),
            (Kind::Udp, None) => Ok(()),
        }
    }

    /// Bytes a second that arrive, sent one way with offload in packets of a message's size.
    pub(super) fn bandwidth(&mut self) -> Result<f64> {
        let sent = self.wide.one_way(self.segment, ONE_WAY)?;
        let rate = sent.gb_per_s() * 1e9;
        self.rates.push(rate);
        Ok(rate)
    }

    /// What was measured in all slices.
    pub(super) fn report(&mut self, floor: &mut Floor) {
        let of = |v: &mut Vec<f64>| (!v.is_empty()).then(|| median(v));
        floor.udp_rtt_ns = of(&mut self.udp_ns);
        floor.packet_rtt_ns = of(&mut self.packet_ns);
        floor.bandwidth = of(&mut self.rates);
    }
}

fn bounce(pair: &mut Pair, all: &mut Vec<f64>) -> Result<f64> {
    let ns = pair.pingpong(BARE, ROUNDS)?.quantile(0.5) as f64;
    all.push(ns);
    Ok(ns)
}

/// An agent on a thread of this process, which drives its host's engine itself. Ends when dropped.
pub(super) struct InlineAgent {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl InlineAgent {
    pub(super) fn start(host: &Instance, roles: &Roles, name: &str, port: u16) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let dir = host.dir().path().to_owned();
        let thread = std::thread::Builder::new().name(name.into()).spawn({
            let (stop, cell) = (Arc::clone(&stop), Arc::clone(host.engine()));
            let (cpus, name) = (roles.measured.clone(), name.to_owned());
            move || serve(&stop, &cell, &cpus, &dir, &name, port)
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Why it has ended, if it has.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(thread) = self.thread.take_if(|t| t.is_finished()) {
            match thread.join() {
                Ok(ended) => ended?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
            bail!("the measured side ended");
        }
        Ok(())
    }
}

impl Drop for InlineAgent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the measured side's thread failed; please report this");
        }
    }
}

fn serve(
    stop: &AtomicBool,
    cell: &EngineCell,
    cpus: &[usize],
    dir: &Path,
    name: &str,
    port: u16,
) -> Result<()> {
    cpu::pin_current(cpus)?;
    let process = Process::connect(dir, AGENT_RAM, name)?;
    let platform: Arc<dyn Platform> = process;
    let context = Context::open(platform).context("cannot open the device")?;
    let clock = Clock {
        ticks: clock::tsc,
        hz: clock::tsc_hz(),
    };
    let mut agent = Agent::new(&context, clock, port)?;
    let mut drive = Driven { cell, held: None };
    Ok(agent.serve_driving(
        &mut drive,
        || stop.load(Ordering::Relaxed),
        |e| tracing::warn!("a measurement ended: {e}"),
    )?)
}

/// An engine that is taken from its thread when it is first needed.
struct Driven<'a> {
    cell: &'a EngineCell,
    held: Option<Inline<'a>>,
}

impl Drive for Driven<'_> {
    #[inline]
    fn turn(&mut self) {
        let cell = self.cell;
        self.held
            .get_or_insert_with(|| cell.drive_inline())
            .driver()
            .poll();
    }

    fn rest(&mut self) {
        self.held = None;
    }
}

/// The engines that this thread drives.
pub(super) struct Driving<'a> {
    partner: Inline<'a>,
    measured: Option<Inline<'a>>,
}

impl<'a> Driving<'a> {
    /// Takes the partner's engine from its thread, and the other one too if `measured` is given.
    pub(super) fn start(partner: &'a Instance, measured: Option<&'a Instance>) -> Self {
        Self {
            partner: partner.engine().drive_inline(),
            measured: measured.map(|i| i.engine().drive_inline()),
        }
    }

    /// One turn of each.
    #[inline]
    pub(super) fn turn(&mut self) {
        self.partner.driver().poll();
        if let Some(measured) = &mut self.measured {
            measured.driver().poll();
        }
    }
}
