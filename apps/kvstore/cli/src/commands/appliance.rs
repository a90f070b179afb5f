//! `kv appliance`: boots the store in QEMU; serves until Ctrl-C, or loads, verifies, measures and ends.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_abi::window::UserState;
use hyv_host::accel::{self, AccelKind, AccelRequest};
use hyv_host::backend::Quotas;
use hyv_host::instance::{Guest, Instance, InstanceConfig};
use hyv_host::program;
use hyv_host::sys::runtime_dir::RuntimeRoot;
use hyv_host::sys::{clock, cpu};
use hyv_host::vmm::GuestConfig;
use hyv_host::wire::WireConfig;
use hyv_verbs::{Context, Gid, Process};
use kvstore::client::Client;
use kvstore::status::Status;

use super::bench;
use super::client::{Progress, Source, load_file};
use crate::format::{self, Format};
use crate::pump::{Fingerprint, Pump, read_all};
use crate::report::{self, Mode, Report};
use hyv_lab::values;

/// RAM of the client in this process: enough for three connections with their staging buffers.
const CLIENT_RAM: u64 = 48 << 20;
/// Least RAM in which the guest serves: runtime, heap, and a store worth having.
const MIN_MEMORY: u64 = 64 << 20;
/// How long requests may take while loading and measuring.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Store every record of FILE (.tsv or .jsonl; `-` is standard input) after the boot
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// Format of FILE (default: by its ending)
    #[arg(long)]
    format: Option<Format>,
    /// Read everything back in another order and compare; then end
    #[arg(long, requires = "load")]
    verify: bool,
    /// Measure GET and PUT of 100 B, this long in all; then end
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    bench: Option<Duration>,
    /// Measure the same server as a Linux process too, alternating with the guest, and report the ratio
    #[arg(long, value_name = "WHAT", requires = "bench")]
    compare: Option<Compare>,
    /// Write a report (`-`: standard output); then end
    #[arg(long, value_name = "REPORT")]
    json: Option<PathBuf>,
    /// What runs the guest: auto, kvm or tcg
    #[arg(long, value_name = "auto|kvm|tcg", default_value = "auto")]
    accel: AccelRequest,
    /// The guest's memory, 64M or more; most of it is for the store
    #[arg(long, value_name = "SIZE", value_parser = values::size, allow_negative_numbers = true, default_value = "256M")]
    memory: u64,
    /// CPUs to use, for example 0,1: the first for engine and client, the second for the guest, a third for the client
    #[arg(long, value_name = "CPUS")]
    pin: Option<String>,
    /// Who drives the engine while loading and measuring: this process's client (inline) or a thread
    #[arg(long, value_name = "auto|inline|thread", default_value = "auto")]
    mode: ModeChoice,
    /// The image to boot
    #[arg(long, value_name = "PATH", env = "HYV_IMAGE", hide_env = true)]
    image: Option<PathBuf>,
    /// Name of this instance (default: kvstore, or kvstore-2 and so on if that is taken)
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Port that the store listens on
    #[arg(long, default_value_t = 7070)]
    port: u16,
    #[command(flatten)]
    wire: WireConfig,
    /// What to log: error, warn, info, debug or trace, or a filter such as hyv_host=debug
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Compare {
    Native,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum ModeChoice {
    Auto,
    Inline,
    Thread,
}

/// Which CPU does what.
#[derive(Clone, Debug)]
pub(super) struct Roles {
    pub engine: Vec<usize>,
    pub guest: Vec<usize>,
    pub client: Vec<usize>,
}

impl Roles {
    fn of(cpus: &[usize]) -> Self {
        match *cpus {
            [a, b, c, ..] => Self {
                engine: vec![a],
                guest: vec![b],
                client: vec![c],
            },
            [a, b] => Self {
                engine: vec![a],
                guest: vec![b],
                client: vec![a],
            },
            _ => Self {
                engine: cpus.to_vec(),
                guest: cpus.to_vec(),
                client: cpus.to_vec(),
            },
        }
    }
}

/// A booted appliance.
pub(super) struct Appliance {
    pub guest: Guest,
    pub instance: Instance,
    pub roles: Roles,
    pub mode: Mode,
    pub context: Context,
    pub stop: Arc<AtomicBool>,
    /// What runs the guest, for people.
    pub accel: String,
    /// From the start of QEMU's process to the first request answered, ms.
    pub boot_ms: f64,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    program::start_log(&args.log)?;
    let stop = program::stop_flag()?;
    let batch = args.verify || args.bench.is_some() || args.json.is_some();
    // Everything that can be wrong without a guest is found before one is started.
    if args.memory < MIN_MEMORY {
        bail!(
            "--memory {}: the appliance needs 64M or more",
            values::bytes(args.memory)
        );
    }
    if let Some(file) = args.load.as_deref().filter(|f| !format::is_standard(f)) {
        drop(format::open(file, args.format)?);
    }
    if let Some(path) = args.json.as_deref() {
        report::check_target(path).map_err(anyhow::Error::msg)?;
    }
    let image = image_path(args.image.as_ref())?;
    let image_bytes = std::fs::metadata(&image).map_or(0, |m| m.len());
    let started = boot(Boot {
        name: args.name.clone(),
        prefix: "kvstore",
        image,
        pin: args.pin.as_deref(),
        mode: args.mode,
        accel: args.accel,
        memory: args.memory,
        port: args.port,
        wire: args.wire.clone(),
        log: &args.log,
        measured: args.bench.is_some(),
        client_ram: CLIENT_RAM,
        stop,
    })?;
    let (mut appliance, mut client) = match started {
        Booted::Up(up) => *up,
        Booted::Failed(guest, e) => return guest_failed(guest, e),
    };
    let boot_ms = appliance.boot_ms;
    let overhead = guest_overhead(&appliance.guest);
    let name = appliance.instance.dir().name().to_owned();
    eprintln!(
        "{name}: up in {boot_ms:.0} ms under {}, {} of memory",
        appliance.accel,
        values::bytes(args.memory)
    );
    client.prepare_large()?;
    // This thread may drive the engine: it must not wait for what a new connection takes.
    client.set_reconnect(None);
    let outcome = if batch || args.load.is_some() {
        work(
            args,
            &mut appliance,
            &mut client,
            Facts {
                boot_ms,
                image_bytes,
                overhead,
            },
        )
    } else {
        Ok(())
    };
    drop(client);
    if let Err(e) = outcome {
        return match appliance.guest.qemu().exit_report() {
            Some(_) => guest_failed(appliance.guest, e),
            None => {
                end(appliance)?;
                Err(e)
            }
        };
    }
    if batch {
        end(appliance)?;
        return Ok(ExitCode::SUCCESS);
    }
    serve(args, appliance, &name)
}

/// How to boot an appliance.
pub(super) struct Boot<'a> {
    /// Name of the instance.
    pub name: Option<String>,
    /// What its name begins with, if it has none.
    pub prefix: &'a str,
    pub image: PathBuf,
    /// CPUs to use.
    pub pin: Option<&'a str>,
    pub mode: ModeChoice,
    pub accel: AccelRequest,
    /// The guest's, bytes.
    pub memory: u64,
    pub port: u16,
    pub wire: WireConfig,
    pub log: &'a str,
    /// It will be measured: it does not sleep between slices.
    pub measured: bool,
    /// Memory for connections of this process, bytes.
    pub client_ram: u64,
    pub stop: Arc<AtomicBool>,
}

/// What became of it.
pub(super) enum Booted {
    Up(Box<(Appliance, Client)>),
    /// It did not come up, or does not serve.
    Failed(Guest, anyhow::Error),
}

/// Boots an appliance and connects to it.
pub(super) fn boot(options: Boot<'_>) -> Result<Booted> {
    let allowed = cpu::allowed().context("cannot read the CPU affinity")?;
    let cpus = match options.pin {
        Some(list) => cpu::parse_list(list, &allowed).with_context(|| format!("--pin {list}"))?,
        None => allowed,
    };
    let roles = Roles::of(&cpus);
    let mode = match options.mode {
        ModeChoice::Inline => Mode::Inline,
        ModeChoice::Thread => Mode::Thread,
        ModeChoice::Auto if cpus.len() < 3 => Mode::Inline,
        ModeChoice::Auto => Mode::Thread,
    };
    let root = RuntimeRoot::open()?;
    let (qemu, accel) = accel::probe(options.accel, Some(root.path()))?;
    let _ = clock::tsc_hz();
    let instance = Instance::start(InstanceConfig {
        name: options.name,
        prefix: options.prefix.into(),
        engine_cpus: roles.engine.clone(),
        spin: Duration::from_micros(if cpus.len() < 3 { 50 } else { 1_000 }),
        quotas: Quotas::default(),
        wire: options.wire,
    })?;
    let process = Process::connect(instance.dir().path(), options.client_ram, "kv")?;
    let context = Context::open(process).context("cannot open the device")?;
    let guest = instance.launch(
        &GuestConfig {
            name: instance.dir().name().to_owned(),
            image: options.image,
            symbols: None,
            args: format!(
                "port={} spin_us={} seed={} hyv.log={}",
                options.port,
                spin_us(options.measured),
                clock::realtime_ns() ^ clock::tsc(),
                guest_level(options.log)
            ),
            memory: options.memory,
            watchdog: None,
            spin_hint: u32::from(cpus.len() > 1),
            net: None,
            ips: Vec::new(),
        },
        &qemu,
        &accel,
    )?;
    let limit = Duration::from_secs(if accel.kind == AccelKind::Kvm { 15 } else { 30 });
    let ready = guest
        .qemu()
        .wait_state(UserState::Ready, limit)
        .map_err(anyhow::Error::from)
        .and_then(|()| {
            Ok(Client::connect(
                &context,
                Gid::LOCAL,
                options.port,
                TIMEOUT,
            )?)
        })
        .and_then(|mut client| {
            client.ping()?;
            Ok(client)
        });
    let client = match ready {
        Ok(client) => client,
        Err(e) => return Ok(Booted::Failed(guest, e)),
    };
    let boot_ms = guest.qemu().started().elapsed().as_secs_f64() * 1e3;
    if let Err(e) = guest.qemu().pin_vcpus(&roles.guest) {
        tracing::warn!("the guest runs on any CPU: {e}");
    }
    let appliance = Appliance {
        guest,
        instance,
        roles,
        mode,
        context,
        stop: options.stop,
        accel: accel.to_string(),
        boot_ms,
    };
    Ok(Booted::Up(Box::new((appliance, client))))
}

pub(super) fn image_path(named: Option<&PathBuf>) -> Result<PathBuf> {
    if let Some(image) = named {
        return Ok(image.clone());
    }
    // target/release/kv -> target/image/kvstore.elf
    let exe = std::env::current_exe().context("cannot find this program's own path")?;
    let image = exe
        .parent()
        .and_then(|p| p.parent())
        .map(|p| p.join("image/kvstore.elf"));
    image
        .filter(|p| p.is_file())
        .context("no image: build it with ./run.sh build, or name one with --image PATH")
}

/// How long a server polls without finding work before it sleeps. While it is measured, for longer than the pauses between two
/// slices: going to sleep and waking up are not what is measured.
pub(super) const fn spin_us(bench: bool) -> u64 {
    if bench { 100_000 } else { 200 }
}

/// The guest's own level: it knows no filters.
fn guest_level(filter: &str) -> &'static str {
    ["trace", "debug", "warn", "error"]
        .into_iter()
        .find(|l| filter.contains(l))
        .unwrap_or("info")
}

/// The guest did not come up, or ended: its own story says why, if it has one.
pub(super) fn guest_failed(guest: Guest, e: anyhow::Error) -> Result<ExitCode> {
    // A guest that is just ending gets the time to say so.
    let _ = guest.qemu().wait_timeout(Duration::from_millis(500));
    if guest.qemu().exit_report().is_none() {
        let report = guest.shutdown();
        tracing::debug!("{report}");
        return Err(e);
    }
    let report = guest.wait();
    eprintln!("error: {report}");
    Ok(ExitCode::from(
        u8::try_from(report.exit_code())
            .ok()
            .filter(|c| *c != 0)
            .unwrap_or(1),
    ))
}

/// Ends the guest in order.
pub(super) fn end(appliance: Appliance) -> Result<()> {
    let report = appliance.guest.shutdown();
    if !report.is_success() {
        bail!("the guest did not end well: {report}");
    }
    Ok(())
}

/// Bytes of guest RAM in use outside the store's region: what the host gave pages for.
fn guest_overhead(guest: &Guest) -> u64 {
    use rustix::fs::{SeekFrom, seek};
    let status = Status::read(&guest.qemu().window().user);
    let store = status.store_offset..status.store_offset.saturating_add(status.store_bytes);
    let fd = guest.qemu().ram_fd();
    let (mut at, mut used) = (0u64, 0u64);
    while let Ok(start) = seek(fd, SeekFrom::Data(at)) {
        let Ok(end) = seek(fd, SeekFrom::Hole(start)) else {
            break;
        };
        let inside = end.min(store.end).saturating_sub(start.max(store.start));
        used += (end - start) - inside.min(end - start);
        at = end;
    }
    used
}

struct Facts {
    boot_ms: f64,
    image_bytes: u64,
    overhead: u64,
}

/// Load, verify, measure, report.
fn work(args: &Args, appliance: &mut Appliance, client: &mut Client, facts: Facts) -> Result<()> {
    let (mut loaded, mut verified) = (0, 0);
    if let Some(file) = &args.load {
        let mut seen: HashMap<Vec<u8>, Fingerprint> = HashMap::new();
        let mut pump = Pump {
            client,
            inline: appliance.inline(),
            table: kvstore::store::DEFAULT_TABLE,
        };
        let start = Instant::now();
        let stored = load_file(
            &mut pump,
            &Source {
                path: file,
                format: args.format,
                from_line: 1,
            },
            &appliance.stop,
            |key, value| {
                if args.verify {
                    seen.insert(key.to_vec(), Fingerprint::of(value));
                }
            },
        )?;
        loaded = stored;
        let s = start.elapsed().as_secs_f64();
        eprintln!(
            "loaded {loaded} records in {s:.2} s ({:.0}/s)",
            loaded as f64 / s
        );
        if args.verify {
            let start = Instant::now();
            verified = verify(&mut pump, &seen, &appliance.stop)?;
            eprintln!(
                "verified {verified} keys in {:.2} s: nothing differs",
                start.elapsed().as_secs_f64()
            );
        }
    }
    let measured = match args.bench {
        None => None,
        Some(time) => Some(bench::run(
            appliance,
            client,
            time,
            args.compare.is_some(),
            args.port,
        )?),
    };
    if let Some(path) = &args.json {
        let m = measured.unwrap_or_default();
        let report = Report {
            accel: match appliance.guest.qemu().accel() {
                AccelKind::Kvm => report::Accel::Kvm,
                AccelKind::Tcg => report::Accel::Tcg,
            },
            boot_ms: facts.boot_ms,
            image_bytes: facts.image_bytes,
            guest_overhead_bytes: facts.overhead,
            loaded,
            verified,
            get: m.get,
            put: m.put,
            vm_exits_per_million_ops: m.exits_per_million,
            host_irq_exits_per_second: m.irq_exits_per_second,
            mode: m.floor.map(|_| appliance.mode),
            floor: m.floor,
            native: m.native,
            ratio_p50: m.ratio_p50,
            ratio_p99: m.ratio_p99,
            aa_p50: m.aa_p50,
        };
        report.save(path)?;
    }
    Ok(())
}

impl Appliance {
    /// Drives the engine in this thread, if that is the mode.
    pub fn inline(&self) -> Option<hyv_rnic::cell::Inline<'_>> {
        (self.mode == Mode::Inline).then(|| self.instance.engine().drive_inline())
    }
}

/// Reads every key in another order than it was stored in, and compares.
fn verify(
    pump: &mut Pump<'_>,
    want: &HashMap<Vec<u8>, Fingerprint>,
    stop: &AtomicBool,
) -> Result<u64> {
    let mut keys: Vec<&[u8]> = want.keys().map(Vec::as_slice).collect();
    // From a fixed order, so that two runs read alike: by a hash of the key, which no file is sorted by.
    keys.sort_by_cached_key(|k| kvstore::store::hash64(0x9e37_79b9_7f4a_7c15, k));
    let mut verified = 0u64;
    let mut progress = Progress::new();
    let total = keys.len();
    read_all(pump, keys, |key, value| -> Result<()> {
        let name = || String::from_utf8_lossy(key).into_owned();
        match value {
            None => bail!("verify: key `{}` was stored but is not there", name()),
            Some(v) if want.get(key) != Some(&Fingerprint::of(v)) => {
                bail!(
                    "verify: the value of key `{}` differs from what was stored",
                    name()
                )
            }
            Some(_) => verified += 1,
        }
        if stop.load(Ordering::Relaxed) {
            bail!("verify: interrupted after {verified} of {total} keys");
        }
        progress.show(|| format!("verifying: {verified} of {total}"));
        Ok(())
    })?;
    progress.end();
    Ok(verified)
}

/// Serves until a signal, with a line that shows what happens.
fn serve(args: &Args, appliance: Appliance, name: &str) -> Result<ExitCode> {
    let command = if program::typed_name().is_some() {
        "./run.sh kv"
    } else {
        "kv"
    };
    let instance = if name == "kvstore" {
        String::new()
    } else {
        format!(" --instance {name}")
    };
    let port = if args.port == 7070 {
        String::new()
    } else {
        format!(" --port {}", args.port)
    };
    eprintln!(
        "talk to it:  {command} put{instance}{port} KEY VALUE   (or get, del, list, load, dump, stats, bench)"
    );
    eprintln!("Ctrl-C ends it");
    let terminal = io::stdout().is_terminal();
    // Without a terminal a line now and then is enough.
    let period = Duration::from_secs(if terminal { 1 } else { 10 });
    let mut shown = Instant::now();
    let mut before = Status::read(&appliance.guest.qemu().window().user);
    while !appliance.stop.load(Ordering::Relaxed) {
        if appliance
            .guest
            .qemu()
            .wait_timeout(Duration::from_millis(100))
            .is_some()
        {
            break;
        }
        if shown.elapsed() < period {
            continue;
        }
        let now = Status::read(&appliance.guest.qemu().window().user);
        let rate =
            now.requests.saturating_sub(before.requests) as f64 / shown.elapsed().as_secs_f64();
        let time = |ns| {
            if ns == 0 {
                "-".to_owned()
            } else {
                values::nanos(ns)
            }
        };
        let line = format!(
            "{rate:.0} ops/s   {} keys   {} of {} in use   service p50 {} p99 {}   {} clients",
            now.objects,
            values::bytes(now.live_bytes),
            values::bytes(now.capacity_bytes),
            time(now.service_p50_ns),
            time(now.service_p99_ns),
            now.connections
        );
        let mut out = io::stdout().lock();
        // Nobody may be reading any more; that is no reason to end.
        let _ = if terminal {
            write!(out, "\r\x1b[K{line}")
        } else {
            writeln!(out, "{line}")
        };
        let _ = out.flush();
        (shown, before) = (Instant::now(), now);
    }
    if terminal {
        println!();
    }
    if !appliance.stop.load(Ordering::Relaxed) {
        let report = appliance.guest.wait();
        eprintln!("error: the guest ended by itself: {report}");
        return Ok(ExitCode::from(
            u8::try_from(report.exit_code())
                .ok()
                .filter(|c| *c != 0)
                .unwrap_or(1),
        ));
    }
    eprintln!("shutting down");
    end(appliance)?;
    Ok(ExitCode::SUCCESS)
}
