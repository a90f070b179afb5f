//! Measuring the guest, and the same server as a Linux process beside it.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_host::accel::AccelKind;
use hyv_host::sys::process::spawn_bound;
use hyv_host::sys::{clock, cpu};
use hyv_verbs::Gid;
use kvstore::client::{Client, ClientConfig};
use kvstore::status::Status;
use rustix::process::{Pid, Signal, kill_process};

use super::appliance::Appliance;
use crate::measure::{Operation, Target};
use crate::pump::Pump;
use crate::report::{Floor, Mode, Native};
use hyv_lab::{
    Interval, Latencies, LatencySummary, Slice, median, pair_slices, paired_ratio, values,
};

/// Length of a slice: short against the machine's own drift.
const SLICE: Duration = Duration::from_millis(80);
/// Slices are paired when their floors differ by no more: else the cores lay elsewhere.
const SAME_FLOOR: f64 = 1.2;
/// Rest after a server was woken from SIGSTOP.
const SETTLE: Duration = Duration::from_millis(2);

/// Everything that was measured.
#[derive(Default, Debug)]
pub(super) struct Results {
    pub get: Option<LatencySummary>,
    pub put: Option<LatencySummary>,
    pub exits_per_million: Option<f64>,
    pub irq_exits_per_second: Option<f64>,
    pub floor: Option<Floor>,
    pub native: Option<Native>,
    pub ratio_p50: Option<Interval>,
    pub ratio_p99: Option<Interval>,
    pub aa_p50: Option<Interval>,
}

/// A native server, stopped or running; killed when dropped.
pub(super) struct Server {
    child: std::process::Child,
    pub pid: Pid,
}

impl Server {
    pub fn start(appliance: &Appliance, port: u16, name: &str, store_bytes: u64) -> Result<Self> {
        let exe = std::env::current_exe().context("cannot find this program's own path")?;
        let mut command = Command::new(exe);
        let pin = appliance
            .roles
            .guest
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(",");
        command
            .args([
                "native-server",
                "--instance",
                appliance.instance.dir().name(),
                "--name",
                name,
                "--pin",
                &pin,
            ])
            .args([
                "--port",
                &port.to_string(),
                "--memory",
                &store_bytes.to_string(),
                "--spin-us",
                &super::appliance::spin_us(true).to_string(),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = spawn_bound(command, &[]).context("cannot start the native server")?;
        let pid = Pid::from_child(&child);
        Ok(Self { child, pid })
    }

    /// Connects when it serves.
    pub fn connect(&mut self, appliance: &Appliance, port: u16) -> Result<Client> {
        self.connect_with(appliance, port, ClientConfig::default())
    }

    /// The same, as `config` says.
    pub fn connect_with(
        &mut self,
        appliance: &Appliance,
        port: u16,
        config: ClientConfig,
    ) -> Result<Client> {
        let start = Instant::now();
        loop {
            match Client::connect_with(&appliance.context, Gid::LOCAL, port, config) {
                Ok(mut client) => {
                    // The measuring thread drives the engine: it must not wait for what a new connection takes.
                    client.set_reconnect(None);
                    return Ok(client);
                }
                Err(e) if start.elapsed() > Duration::from_secs(10) => {
                    return Err(e).context("the native server does not serve");
                }
                Err(_) => {}
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the native server ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // KILL also ends a stopped process.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Who serves at a time.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Guest,
    Native,
    /// The same again, for the A/A comparison.
    Twin,
}

struct Lane<'a> {
    side: Side,
    pid: Pid,
    target: Target<'a>,
    get: Vec<Slice>,
    put: Vec<Slice>,
    get_all: Latencies,
    put_all: Latencies,
    get_time: Duration,
    put_time: Duration,
    get_ops: u64,
    put_ops: u64,
}

impl<'a> Lane<'a> {
    fn new(side: Side, pid: Pid, target: Target<'a>) -> Self {
        Self {
            side,
            pid,
            target,
            get: Vec::new(),
            put: Vec::new(),
            get_all: Latencies::new(),
            put_all: Latencies::new(),
            get_time: Duration::ZERO,
            put_time: Duration::ZERO,
            get_ops: 0,
            put_ops: 0,
        }
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid, signal).context("cannot stop and continue a server")
    }

    fn measure(&mut self, appliance: &'a Appliance, operation: Operation) -> Result<()> {
        self.target.pump.inline = appliance.inline();
        let all = if operation == Operation::Get {
            &mut self.get_all
        } else {
            &mut self.put_all
        };
        let measured = self.target.slice(operation, SLICE, all);
        self.target.pump.inline = None;
        let measured = measured?;
        let (slices, time, ops) = match operation {
            Operation::Get => (&mut self.get, &mut self.get_time, &mut self.get_ops),
            Operation::Put => (&mut self.put, &mut self.put_time, &mut self.put_ops),
        };
        *time += measured.elapsed;
        *ops += measured.ops;
        // An unsteady slice keeps its place with a floor that pairs with none.
        let floor_ns = if measured.steady {
            measured.slice.floor_ns
        } else {
            f64::INFINITY
        };
        slices.push(Slice {
            floor_ns,
            ..measured.slice
        });
        Ok(())
    }

    fn get_summary(&self) -> LatencySummary {
        self.get_all.summary(self.get_time)
    }

    fn put_summary(&self) -> LatencySummary {
        self.put_all.summary(self.put_time)
    }

    fn floor(&self) -> Floor {
        let mut floors: Vec<f64> = self
            .get
            .iter()
            .chain(&self.put)
            .map(|s| s.floor_ns)
            .filter(|f| f.is_finite())
            .collect();
        Floor {
            cache_line_rtt_ns: if floors.is_empty() {
                f64::NAN
            } else {
                median(&mut floors)
            },
        }
    }
}

/// Measures for `time`, half GET and half PUT; with `compare` as long again for each of three servers.
pub(super) fn run(
    appliance: &mut Appliance,
    client: &mut Client,
    time: Duration,
    compare: bool,
    port: u16,
) -> Result<Results> {
    let appliance: &Appliance = appliance;
    cpu::pin_current(&appliance.roles.client).context("cannot run on the chosen CPU")?;
    if let Err(e) = appliance.guest.qemu().pin_others(&appliance.roles.client) {
        tracing::debug!("QEMU's other threads run anywhere: {e}");
    }
    let guest_pid =
        Pid::from_raw(appliance.guest.qemu().pid().cast_signed()).context("QEMU has no pid")?;
    let mut guest = {
        let pump = Pump {
            client,
            inline: appliance.inline(),
            table: kvstore::store::DEFAULT_TABLE,
        };
        let mut target = Target::new(pump, Arc::clone(appliance.guest.qemu().window()))?;
        target.pump.inline = None;
        Lane::new(Side::Guest, guest_pid, target)
    };
    collapse(appliance);

    // The guest alone, with KVM's counters around it.
    let kvm = appliance.guest.qemu().accel() == AccelKind::Kvm;
    let stats = || {
        if kvm {
            Some(appliance.guest.qemu().vcpu_stats()).transpose()
        } else {
            Ok(None)
        }
    };
    let before = stats().context("cannot read KVM's counters")?;
    let start = Instant::now();
    while start.elapsed() < time {
        guest.measure(appliance, Operation::Get)?;
        guest.measure(appliance, Operation::Put)?;
        check(appliance)?;
    }
    let after = stats().context("cannot read KVM's counters")?;
    let ops = guest.get_ops + guest.put_ops;
    let mut results = Results {
        get: Some(guest.get_summary()),
        put: Some(guest.put_summary()),
        floor: Some(guest.floor()),
        ..Results::default()
    };
    if let (Some(before), Some(after)) = (before, after) {
        let delta = after.since(&before);
        results.exits_per_million = Some(delta.by_guest() as f64 * 1e6 / ops as f64);
        results.irq_exits_per_second = Some(delta.irq_exits as f64 / start.elapsed().as_secs_f64());
    }
    let status = Status::read(&appliance.guest.qemu().window().user);
    tracing::info!(
        p50_ns = status.service_p50_ns,
        p99_ns = status.service_p99_ns,
        "the guest's own service time"
    );
    show(&results, appliance.mode);
    if compare {
        self::compare(appliance, guest, time, port, &mut results)?;
    }
    let all = cpu::allowed().unwrap_or_default();
    cpu::pin_current(&all).context("cannot run on all CPUs again")?;
    Ok(results)
}

/// Ends the measurement when it is told to, or when there is nothing left to measure.
pub(super) fn check(appliance: &Appliance) -> Result<()> {
    if appliance.stop.load(std::sync::atomic::Ordering::Relaxed) {
        bail!("bench: interrupted");
    }
    if appliance.guest.qemu().exit_report().is_some() {
        bail!("bench: the guest ended");
    }
    Ok(())
}

/// Puts the guest's RAM that is in use on large pages, as a native server's is.
pub(super) fn collapse(appliance: &Appliance) {
    let status = Status::read(&appliance.guest.qemu().window().user);
    // What the kernel has no large page for stays on small ones; the comparison says so by its spread.
    if let Err(e) = appliance
        .guest
        .qemu()
        .ram()
        .collapse(status.store_offset, status.store_bytes)
    {
        tracing::debug!("the guest's store stays on small pages: {e}");
    }
}

fn compare<'a>(
    appliance: &'a Appliance,
    guest: Lane<'a>,
    time: Duration,
    port: u16,
    results: &mut Results,
) -> Result<()> {
    let store_bytes = Status::read(&appliance.guest.qemu().window().user).store_bytes;
    let mut servers = Vec::new();
    let mut clients = Vec::new();
    for i in 1..=2u16 {
        let (port, name) = (port.wrapping_add(i).max(1), format!("native-{i}"));
        let mut server = Server::start(appliance, port, &name, store_bytes)?;
        clients.push(server.connect(appliance, port)?);
        servers.push((server, name));
    }
    let mut lanes = vec![guest];
    for ((server, name), client) in servers.iter().zip(&mut clients) {
        let memory = appliance
            .instance
            .backend()
            .user_memory(name)
            .context("the native server is gone")?;
        let mut target = {
            let pump = Pump {
                client,
                inline: appliance.inline(),
                table: kvstore::store::DEFAULT_TABLE,
            };
            Target::new(pump, Arc::clone(&memory.window))?
        };
        target.pump.inline = None;
        let status = Status::read(&memory.window.user);
        if let Err(e) = memory.ram.collapse(status.store_offset, status.store_bytes) {
            tracing::debug!("a native store stays on small pages: {e}");
        }
        let side = if lanes.len() == 1 {
            Side::Native
        } else {
            Side::Twin
        };
        lanes.push(Lane::new(side, server.pid, target));
    }
    lanes[0].get.clear();
    lanes[0].put.clear();
    // Only one server runs at a time, on the same core; the others are stopped.
    for lane in &lanes {
        lane.signal(Signal::STOP)?;
    }
    let outcome = alternate(appliance, &mut lanes, time);
    for lane in &lanes {
        lane.signal(Signal::CONT)?;
    }
    outcome?;
    let [guest, native, twin] = &lanes[..] else {
        bail!("three servers were started")
    };
    debug_assert!(guest.side == Side::Guest && twin.side == Side::Twin);
    let pairs = pair_slices(&guest.get, &native.get, SAME_FLOOR);
    let ratio = |f: fn(&Slice) -> f64, pairs: &[(Slice, Slice)]| {
        let values: Vec<(f64, f64)> = pairs.iter().map(|(a, b)| (f(a), f(b))).collect();
        paired_ratio(&values)
    };
    let few = "too few slices with the same floor: measure longer, or on a quieter machine";
    results.ratio_p50 = Some(ratio(|s| s.p50_ns, &pairs).context(few)?);
    results.ratio_p99 = Some(ratio(|s| s.p99_ns, &pairs).context(few)?);
    let twins = pair_slices(&twin.get, &native.get, SAME_FLOOR);
    results.aa_p50 = Some(ratio(|s| s.p50_ns, &twins).context(few)?);
    results.native = Some(Native {
        loaded: 0,
        verified: 0,
        get: Some(native.get_summary()),
        put: Some(native.put_summary()),
        mode: Some(appliance.mode),
        floor: Some(native.floor()),
    });
    let show = |name: &str, i: Option<Interval>| {
        if let Some(i) = i {
            eprintln!(
                "{name}: {:.3} (95% interval {:.3} to {:.3})",
                i.median, i.low, i.high
            );
        }
    };
    show("guest / native, GET p50", results.ratio_p50);
    show("guest / native, GET p99", results.ratio_p99);
    show("native / native, GET p50", results.aa_p50);
    Ok(())
}

fn alternate<'a>(appliance: &'a Appliance, lanes: &mut [Lane<'a>], time: Duration) -> Result<()> {
    let start = Instant::now();
    let mut random = clock::tsc() | 1;
    let mut order: Vec<usize> = (0..lanes.len()).collect();
    let all = time * lanes.len() as u32;
    // An interval needs some rounds, however short the time.
    while start.elapsed() < all || lanes[0].get.len() < 2 * hyv_lab::limits::MIN_PAIRS {
        // Another order each round: nobody always comes after the same neighbour.
        for i in (1..order.len()).rev() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            order.swap(i, (random % (i as u64 + 1)) as usize);
        }
        for operation in [Operation::Get, Operation::Put] {
            for &i in &order {
                lanes[i].signal(Signal::CONT)?;
                std::thread::sleep(SETTLE);
                let measured = lanes[i].measure(appliance, operation);
                lanes[i].signal(Signal::STOP)?;
                measured?;
            }
        }
        check(appliance)?;
    }
    Ok(())
}

fn show(results: &Results, mode: Mode) {
    let floor = results.floor.map_or(f64::NAN, |f| f.cache_line_rtt_ns);
    eprintln!(
        "floor: {floor:.0} ns for one cache line to the guest's core and back; engine: {mode:?}"
    );
    for (name, s) in [("GET", results.get), ("PUT", results.put)] {
        let Some(s) = s else { continue };
        eprintln!(
            "{name}: {:.0} ops/s, p50 {} ({:.2} floors), p99 {}, p99.9 {}, max {}",
            s.ops_per_s,
            values::nanos(s.p50_ns),
            s.p50_ns as f64 / floor,
            values::nanos(s.p99_ns),
            values::nanos(s.p999_ns),
            values::nanos(s.max_ns)
        );
    }
    if let Some(exits) = results.exits_per_million {
        eprintln!(
            "VM exits that the guest caused: {exits:.2} per million operations; timer ticks of the host: {:.0} per second",
            results.irq_exits_per_second.unwrap_or(f64::NAN)
        );
    }
}
