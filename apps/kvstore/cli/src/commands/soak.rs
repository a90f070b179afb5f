//! `kv soak` and the processes that it starts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyv_host::accel::AccelRequest;
use hyv_host::backend::Quotas;
use hyv_host::instance::{Instance, InstanceConfig};
use hyv_host::program;
use hyv_host::wire::WireConfig;
use hyv_lab::values;

use crate::report;
use crate::soak::client::Orders;
use crate::soak::limits::MAX_IN_FLIGHT;
use crate::soak::store::Clock;
use crate::soak::workload::Keys;
use crate::soak::{self, Config, Totals, Where};

/// Least memory of a store that is worth filling: some segments of the smallest size.
const MIN_NATIVE: u64 = 16 << 20;
/// How long the device's engine polls without finding work: as in an appliance.
const SPIN: Duration = Duration::from_micros(50);

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// How long
    #[arg(long = "for", value_name = "TIME", value_parser = values::duration, default_value = "1h")]
    time: Duration,
    /// How often to stop, check all histories and print a line
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "10s")]
    check_every: Duration,
    /// Go on until each kind of operation, answer and fault has been seen, at most ten times as long
    #[arg(long)]
    until_all: bool,
    /// Client processes at once
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=256))]
    clients: u32,
    /// Most requests of a client under way; each client draws a number up to this
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=MAX_IN_FLIGHT as i64))]
    in_flight: u8,
    /// Mean time between two clients killed, or never
    #[arg(long, value_name = "TIME|never", value_parser = every, default_value = "2s")]
    kill_every: Every,
    /// Mean time between two clients stopped for a while (SIGSTOP), or never
    #[arg(long, value_name = "TIME|never", value_parser = every, default_value = "300ms")]
    stop_every: Every,
    /// Mean time between two connections that a client cuts with requests under way, or never
    #[arg(long, value_name = "TIME|never", value_parser = every, default_value = "500ms")]
    cut_every: Every,
    /// How much of the store to keep in use, percent; the more, the harder the cleaner works
    #[arg(long, value_name = "PERCENT", default_value_t = 85, value_parser = clap::value_parser!(u8).range(0..=95))]
    utilisation: u8,
    /// Keys that all clients fight for; four times as many have objects that expire
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    hot_keys: u64,
    /// Seed of clients and faults (default: from the clock; it is printed)
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Empty or new folder for the histories, which all stay there, some MB a second (default: a temporary one; what was right is removed)
    #[arg(long, value_name = "DIR")]
    histories: Option<PathBuf>,
    /// Write what was counted, and the verdict, to a file (`-`: standard output)
    #[arg(long, value_name = "REPORT")]
    json: Option<PathBuf>,
    /// Test the server as a Linux process, without QEMU
    #[arg(long, conflicts_with = "accel")]
    native: bool,
    /// What runs the guest: auto, kvm or tcg
    #[arg(long, value_name = "auto|kvm|tcg", default_value = "auto")]
    accel: AccelRequest,
    /// The guest's memory; with --native the store's
    #[arg(long, value_name = "SIZE", value_parser = values::size, default_value = "64M")]
    memory: u64,
    /// The image to boot
    #[arg(long, value_name = "PATH", env = "HYV_IMAGE", hide_env = true)]
    image: Option<PathBuf>,
    /// Port that the store listens on
    #[arg(long, default_value_t = 7070)]
    port: u16,
    /// What to log: error, warn, info, debug or trace, or a filter
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log: String,
}

/// A mean time between faults; none: there are none.
#[derive(Clone, Copy, Debug)]
struct Every(Option<Duration>);

fn every(text: &str) -> Result<Every, String> {
    match text {
        "never" => Ok(Every(None)),
        _ => values::duration(text)
            .map(|time| Every(Some(time)))
            .map_err(|e| format!("{e}; or never")),
    }
}

#[derive(serde::Serialize)]
struct Report<'a> {
    seed: u64,
    seconds: f64,
    verdict: &'a str,
    #[serde(flatten)]
    counts: std::collections::BTreeMap<&'static str, u64>,
}

pub(super) fn run(args: Args) -> Result<ExitCode> {
    program::start_log(&args.log)?;
    let stop = program::stop_flag()?;
    if let Some(path) = args.json.as_deref() {
        report::check_target(path).map_err(anyhow::Error::msg)?;
    }
    let json = args.json.clone();
    let config = config(args)?;
    let mut totals = Totals::default();
    let outcome = soak::run(&config, &stop, &mut totals);
    if let Some(path) = json {
        let report = Report {
            seed: config.seed,
            seconds: totals.seconds,
            verdict: match &outcome {
                Ok(()) => "nothing wrong",
                Err(_) => "something is wrong",
            },
            counts: totals.fields().into_iter().collect(),
        };
        report::save(&report, &path)?;
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

fn config(args: Args) -> Result<Config> {
    let place = if args.native {
        if args.memory < MIN_NATIVE {
            bail!(
                "--memory {}: a store of 16M or more is worth filling",
                values::bytes(args.memory)
            );
        }
        Where::Native {
            memory: args.memory,
        }
    } else {
        Where::Guest(guest_words(&args))
    };
    Ok(Config {
        time: args.time,
        round: args.check_every,
        until_all: args.until_all,
        clients: args.clients,
        in_flight: usize::from(args.in_flight),
        kill_every: args.kill_every.0,
        stop_every: args.stop_every.0,
        cut_every: args.cut_every.0,
        utilisation: f64::from(args.utilisation) / 100.0,
        hot_keys: args.hot_keys,
        seed: args
            .seed
            .unwrap_or_else(|| hyv_host::sys::clock::realtime_ns() % 1_000_000_007),
        histories: args.histories,
        place,
        port: args.port,
    })
}

fn guest_words(args: &Args) -> Vec<String> {
    let accel = match args.accel {
        AccelRequest::Auto => "auto",
        AccelRequest::Kvm => "kvm",
        AccelRequest::Tcg => "tcg",
    };
    let memory = args.memory.to_string();
    let words = ["--accel", accel, "--memory", &memory, "--log", &args.log];
    let mut words: Vec<String> = words.map(str::to_owned).to_vec();
    if let Some(image) = &args.image {
        words.push("--image".into());
        words.push(image.to_string_lossy().into_owned());
    }
    words
}

#[derive(clap::Args, Debug)]
pub(super) struct ClientArgs {
    /// Folder of the instance
    #[arg(long)]
    dir: PathBuf,
    /// Port of the store
    #[arg(long)]
    port: u16,
    /// Its number in the history
    #[arg(long)]
    client: u32,
    /// Where to record
    #[arg(long)]
    history: PathBuf,
    /// Seed of the run
    #[arg(long)]
    seed: u64,
    /// When to end: ns of CLOCK_MONOTONIC
    #[arg(long)]
    until: u64,
    /// Keys that all clients fight for
    #[arg(long)]
    hot_keys: u64,
    /// Keys whose objects expire
    #[arg(long)]
    fading_keys: u64,
    /// Keys that fill the store
    #[arg(long)]
    fill_keys: u64,
    /// Table of every second key of the first two kinds
    #[arg(long)]
    table: u32,
    /// What the store's clock is ahead of CLOCK_MONOTONIC, ns
    #[arg(long)]
    clock_ahead: u64,
    /// How far that may be off, ns
    #[arg(long)]
    clock_slack: u64,
    /// Most requests under way
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=MAX_IN_FLIGHT as i64))]
    in_flight: u8,
    /// Mean time between two cuts, ns
    #[arg(long)]
    cut_every_ns: Option<u64>,
}

pub(super) fn client(args: ClientArgs) -> Result<ExitCode> {
    program::start_log("warn")?;
    let stop = program::stop_flag()?;
    let orders = Orders {
        dir: args.dir,
        port: args.port,
        client: args.client,
        history: args.history,
        seed: args.seed,
        until: args.until,
        keys: Keys {
            hot: args.hot_keys,
            fading: args.fading_keys,
            fill: args.fill_keys,
            table: args.table,
        },
        clock: Clock {
            ahead: args.clock_ahead,
            doubt: 0,
        },
        clock_slack: args.clock_slack,
        in_flight: usize::from(args.in_flight),
        cut_every: args.cut_every_ns.map(Duration::from_nanos),
    };
    soak::client::run(&orders, &stop)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(clap::Args, Debug)]
pub(super) struct DeviceArgs {
    /// Name of the instance
    name: String,
}

/// A device for native processes, until it is told to end.
pub(super) fn device(args: DeviceArgs) -> Result<ExitCode> {
    program::start_log("warn")?;
    let stop = program::stop_flag()?;
    let _instance = Instance::start(InstanceConfig {
        name: Some(args.name),
        prefix: "soak".into(),
        engine_cpus: Vec::new(),
        spin: SPIN,
        quotas: Quotas::default(),
        wire: WireConfig::default(),
    })
    .context("cannot start a device")?;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(ExitCode::SUCCESS)
}
