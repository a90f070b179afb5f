//! `kv soak` and the processes that it starts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use hyv_host::accel::AccelRequest;
use hyv_host::program;
use hyv_lab::values;

use crate::soak::client::Orders;
use crate::soak::workload::Keys;
use crate::soak::{self, CLOCK_SLACK_NS, Config};

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// How long
    #[arg(long = "for", value_name = "TIME", value_parser = values::duration, default_value = "1h")]
    time: Duration,
    /// How often to stop, check all histories and print a line
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "10s")]
    check_every: Duration,
    /// Client processes at once
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=256))]
    clients: u32,
    /// Mean time between two clients killed, or never
    #[arg(long, value_name = "TIME|never", value_parser = kill_every, default_value = "2s")]
    kill_every: KillEvery,
    /// How much of the store to keep in use, percent; the more, the harder the cleaner works
    #[arg(long, value_name = "PERCENT", default_value_t = 80, value_parser = clap::value_parser!(u8).range(0..=95))]
    utilisation: u8,
    /// Keys that all clients fight for
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    hot_keys: u64,
    /// Seed of clients and kills (default: from the clock; it is printed)
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Empty or new folder for the histories, which stay there (default: a temporary one, kept if something is wrong)
    #[arg(long, value_name = "DIR")]
    histories: Option<PathBuf>,
    /// What runs the guest: auto, kvm or tcg
    #[arg(long, value_name = "auto|kvm|tcg", default_value = "auto")]
    accel: AccelRequest,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", value_parser = values::size, default_value = "128M")]
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

#[derive(Clone, Copy, Debug)]
struct KillEvery(Option<Duration>);

fn kill_every(text: &str) -> Result<KillEvery, String> {
    match text {
        "never" => Ok(KillEvery(None)),
        _ => values::duration(text).map(|t| KillEvery(Some(t))),
    }
}

pub(super) fn run(args: Args) -> Result<ExitCode> {
    program::start_log(&args.log)?;
    let stop = program::stop_flag()?;
    let accel = match args.accel {
        AccelRequest::Auto => "auto",
        AccelRequest::Kvm => "kvm",
        AccelRequest::Tcg => "tcg",
    };
    let mut appliance: Vec<String> = [
        "--accel",
        accel,
        "--memory",
        &args.memory.to_string(),
        "--log",
        &args.log,
    ]
    .map(str::to_owned)
    .to_vec();
    if let Some(image) = &args.image {
        appliance.push("--image".into());
        appliance.push(image.to_string_lossy().into_owned());
    }
    let config = Config {
        time: args.time,
        round: args.check_every,
        clients: args.clients,
        kill_every: args.kill_every.0,
        utilisation: f64::from(args.utilisation) / 100.0,
        hot_keys: args.hot_keys,
        seed: args
            .seed
            .unwrap_or_else(|| hyv_host::sys::clock::realtime_ns() % 1_000_000_007),
        histories: args.histories,
        appliance,
        port: args.port,
    };
    soak::run(&config, &stop)?;
    Ok(ExitCode::SUCCESS)
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
    /// Keys that fill the store
    #[arg(long)]
    fill_keys: u64,
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
            fill: args.fill_keys,
        },
        clock_slack: CLOCK_SLACK_NS,
    };
    soak::client::run(&orders, &stop)?;
    Ok(ExitCode::SUCCESS)
}
