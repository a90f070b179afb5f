//! `hyv-host`: runs any image as a guest with an RDMA device, until it ends or Ctrl-C.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{CommandFactory, FromArgMatches, Parser};
use hyv_host::accel::{self, AccelRequest};
use hyv_host::backend::Quotas;
use hyv_host::instance::{Instance, InstanceConfig};
use hyv_host::program;
use hyv_host::sys::cpu;
use hyv_host::sys::runtime_dir::RuntimeRoot;
use hyv_host::vmm::{Forward, GuestConfig, GuestIp, NetConfig};
use hyv_host::wire::WireConfig;

/// Run a unikernel image in QEMU with a software RNIC. Native processes join by the socket in its runtime folder.
#[derive(Parser, Debug)]
#[command(version, max_term_width = 100)]
struct Args {
    /// The image to boot; without one, only native processes are served
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    /// Its symbols (default: beside the image)
    #[arg(long, value_name = "PATH")]
    symbols: Option<PathBuf>,
    /// What runs the guest: auto, kvm or tcg
    #[arg(long, value_name = "auto|kvm|tcg", default_value = "auto")]
    accel: AccelRequest,
    /// The guest's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u64).range(64..=131_072))]
    memory: u64,
    /// CPUs to use, for example 0,1: the first for the engine, the second for the guest
    #[arg(long, value_name = "CPUS")]
    pin: Option<String>,
    /// Name of this instance (default: hyv, or hyv-2 and so on if that is taken)
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// How long the engine polls without finding work before it sleeps, microseconds
    #[arg(long, value_name = "US", default_value_t = 50)]
    spin_us: u64,
    /// The guest's network card: user (QEMU's user networking), tap:NAME (an existing tap) or none
    #[arg(long, value_name = "user|tap:NAME|none", requires = "image")]
    net: Option<String>,
    /// Forward a TCP port of this host to one of the guest: [ADDRESS:]PORT:GUESTPORT; port 0 takes a free one (may repeat)
    #[arg(long, value_name = "HOST:GUEST", requires = "image")]
    forward: Vec<Forward>,
    /// The guest's address, instead of DHCP: ADDRESS/PREFIX[,GATEWAY], one of each family (may repeat)
    #[arg(long, value_name = "ADDRESS/PREFIX", requires = "image")]
    ip: Vec<GuestIp>,
    /// End the guest after so many seconds
    #[arg(long, value_name = "SECONDS")]
    limit: Option<u64>,
    #[command(flatten)]
    wire: WireConfig,
    /// What to log: error, warn, info, debug or trace, or a filter such as hyv_host=debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: String,
    /// The guest's command line: KEY=VALUE words
    #[arg(trailing_var_arg = true, value_name = "WORD")]
    words: Vec<String>,
}

fn main() -> ExitCode {
    let args = match parse() {
        Ok(args) => args,
        Err(e) => e.exit(),
    };
    match run(&args) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {}", hyv_host::message::of(&e));
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Args, clap::Error> {
    Args::from_arg_matches(&program::matches(Args::command())?)
}

fn run(args: &Args) -> Result<ExitCode> {
    program::start_log(&args.log)?;
    let stop = program::stop_flag()?;
    let allowed = cpu::allowed().context("cannot read the CPU affinity")?;
    let cpus = match &args.pin {
        Some(list) => cpu::parse_list(list, &allowed).with_context(|| format!("--pin {list}"))?,
        None => Vec::new(),
    };
    let net = NetConfig::from_options(args.net.as_deref(), &args.forward, !args.ip.is_empty())?;
    let root = RuntimeRoot::open()?;
    let instance = Instance::start(InstanceConfig {
        name: args.name.clone(),
        prefix: "hyv".into(),
        engine_cpus: cpus.first().copied().into_iter().collect(),
        spin: Duration::from_micros(args.spin_us),
        quotas: Quotas::default(),
        wire: args.wire.clone(),
    })?;
    println!(
        "{}: {}",
        instance.dir().name(),
        instance.dir().path().display()
    );
    let Some(image) = &args.image else {
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
        }
        return Ok(ExitCode::SUCCESS);
    };
    let (qemu, accel) = accel::probe(args.accel, Some(root.path()))?;
    println!(
        "{}: booting {} under {accel}",
        instance.dir().name(),
        image.display()
    );
    let guest = instance.launch(
        &GuestConfig {
            name: instance.dir().name().to_owned(),
            image: image.clone(),
            symbols: args.symbols.clone(),
            args: args.words.join(" "),
            memory: args.memory << 20,
            watchdog: None,
            spin_hint: u32::from(allowed.len() > 1),
            net,
            ips: args.ip.clone(),
        },
        &qemu,
        &accel,
    )?;
    if let Some(&cpu) = cpus.get(1)
        && let Err(e) = guest.qemu().pin_vcpus(&[cpu])
    {
        tracing::warn!("the guest runs on any CPU: {e}");
    }
    if !args.forward.is_empty() {
        for Forward { host, guest } in guest.qemu().forwards()? {
            println!(
                "{}: {host} leads to the guest's port {guest}",
                instance.dir().name()
            );
        }
    }
    let start = std::time::Instant::now();
    let over = || {
        args.limit
            .is_some_and(|s| start.elapsed() > Duration::from_secs(s))
    };
    while !stop.load(Ordering::Relaxed) && !over() {
        if guest
            .qemu()
            .wait_timeout(Duration::from_millis(50))
            .is_some()
        {
            break;
        }
    }
    let late = over();
    let report = if guest.qemu().exit_report().is_some() {
        guest.wait()
    } else {
        guest.shutdown()
    };
    if report.is_success() && !late {
        println!("{report}");
        return Ok(ExitCode::SUCCESS);
    }
    if late {
        eprintln!(
            "error: the guest did not end within {} s",
            args.limit.unwrap_or_default()
        );
        return Ok(ExitCode::FAILURE);
    }
    eprintln!("error: {report}");
    Ok(ExitCode::from(
        u8::try_from(report.exit_code())
            .ok()
            .filter(|c| *c != 0)
            .unwrap_or(1),
    ))
}
