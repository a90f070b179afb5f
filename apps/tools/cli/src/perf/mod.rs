//! `perf`: what each verb costs in a guest and in a Linux process, in alternating slices of one run.

mod idle;
mod lane;
mod lanes;
mod report;
mod show;
mod wire;

pub(crate) use report::{check_target, save_json};

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyv_carrier::Choice;
use hyv_host::accel::AccelRequest;
use hyv_host::program;
use hyv_host::sys::{clock, cpu};
use hyv_lab::values;
use hyv_tools::perf::{Agent, Clock, MAX_SIZE, Verb};
use hyv_verbs::{Context, Platform, Process};

use crate::machine;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum What {
    /// One work request at a time
    Lat,
    /// Sixteen work requests at a time
    Bw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum VerbChoice {
    Send,
    Write,
    Read,
    FetchAdd,
    CmpSwp,
    All,
}

impl VerbChoice {
    fn verb(self) -> Option<Verb> {
        match self {
            Self::Send => Some(Verb::Send),
            Self::Write => Some(Verb::Write),
            Self::Read => Some(Verb::Read),
            Self::FetchAdd => Some(Verb::FetchAdd),
            Self::CmpSwp => Some(Verb::CmpSwp),
            Self::All => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Where {
    Guest,
    Native,
}

/// Arguments of `perf`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Latency (one work request at a time) or bandwidth (sixteen)
    what: What,
    /// The verbs (default: all)
    #[arg(value_name = "VERB")]
    verbs: Vec<VerbChoice>,
    /// Message sizes; atomics have 8 bytes whatever this says
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = values::size)]
    sizes: Vec<u64>,
    /// Where the measured side runs; with both, the ratio is reported
    #[arg(
        long = "where",
        value_name = "WHERE",
        value_delimiter = ',',
        default_value = "guest,native"
    )]
    places: Vec<Where>,
    /// Time for each verb and size on each side
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "1s")]
    time: Duration,
    /// Write a report (`-`: standard output)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What runs the guest: auto, kvm or tcg
    #[arg(long, value_name = "auto|kvm|tcg", default_value = "auto")]
    accel: AccelRequest,
    /// Measure between two hosts in two network namespaces, beside bare sockets on the same path (as root)
    #[arg(long)]
    wire: bool,
    /// What carries packets: packet (AF_PACKET), udp, or auto
    #[arg(
        long,
        value_name = "auto|udp|packet",
        default_value = "auto",
        requires = "wire"
    )]
    carrier: Choice,
    /// Largest IP packet of the link between the namespaces, bytes; the path MTU follows from it
    #[arg(long, value_name = "BYTES", default_value = "1500", requires = "wire", value_parser = clap::value_parser!(u16).range(576..))]
    mtu: u16,
    /// Compare with the same beside so many idle queue pairs (lat, one host, native)
    #[arg(long, value_name = "N", conflicts_with = "wire", value_parser = clap::value_parser!(u32).range(1..=16_000))]
    idle_qps: Option<u32>,
    /// CPUs to use, for example 0,1: the first for the engine, the second for the measured side; with --wire a third for the
    /// measured side's engine, where a guest is measured
    #[arg(long, value_name = "CPUS")]
    pin: Option<String>,
    /// The image to boot
    #[arg(long, value_name = "PATH", env = "HYV_TOOLS_IMAGE", hide_env = true)]
    image: Option<PathBuf>,
    /// What to log: error, warn, info, debug or trace, or a filter such as hyv_host=debug
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log: String,
}

/// One thing to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Case {
    pub(crate) verb: Verb,
    pub(crate) size: u32,
}

impl Args {
    fn cases(&self) -> Result<Vec<Case>> {
        let verbs: Vec<Verb> = if self.verbs.is_empty() || self.verbs.contains(&VerbChoice::All) {
            Verb::ALL.to_vec()
        } else {
            self.verbs.iter().filter_map(|v| v.verb()).collect()
        };
        let default: &[u64] = match self.what {
            What::Lat => &[8, 64, 1 << 10, 4 << 10, 64 << 10],
            What::Bw => &[4 << 10, 64 << 10, 1 << 20],
        };
        let sizes = if self.sizes.is_empty() {
            default
        } else {
            &self.sizes
        };
        let mut cases = Vec::new();
        for verb in verbs {
            for &size in if verb.is_atomic() { &[8][..] } else { sizes } {
                if size == 0 || size > MAX_SIZE as u64 {
                    bail!(
                        "--sizes {size}: from 1 byte to {}",
                        values::bytes(MAX_SIZE as u64)
                    );
                }
                let case = Case {
                    verb,
                    size: size as u32,
                };
                if !cases.contains(&case) {
                    cases.push(case);
                }
            }
        }
        Ok(cases)
    }
}

/// Runs `perf`.
///
/// # Errors
/// A wrong argument; a device, guest or process that does not come up; a verb that fails.
pub fn run(args: &Args) -> Result<ExitCode> {
    program::start_log(&args.log)?;
    let stop = program::stop_flag()?;
    let cases = args.cases()?;
    if args.idle_qps.is_some() && (args.what == What::Bw || !args.places.contains(&Where::Native)) {
        bail!("--idle-qps: goes with lat and with a native side (--where native)");
    }
    if let Some(path) = args.json.as_deref() {
        report::check_target(path)?;
    }
    let roles = machine::Roles::new(args.pin.as_deref())?;
    let report = lanes::measure(args, &cases, &roles, &stop)?;
    if let Some(path) = &args.json {
        report.save(path)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Arguments of the native side.
#[derive(clap::Args, Debug)]
pub struct AgentArgs {
    /// Folder of the instance whose device to use
    #[arg(long)]
    dir: PathBuf,
    /// Port to listen on
    #[arg(long)]
    port: u16,
    /// Name that the host's log shows
    #[arg(long)]
    name: String,
    /// CPUs to run on
    #[arg(long)]
    pin: String,
}

/// RAM of a native agent: buffers, samples and rings on whole large pages, and what `reg_mr` is measured with.
const AGENT_RAM: u64 = (24 << 20) + hyv_tools::perf::REGISTERED as u64;

/// Runs the native side.
///
/// # Errors
/// As the guest's image.
pub fn agent(args: &AgentArgs) -> Result<ExitCode> {
    program::start_log("warn")?;
    let stop = program::stop_flag()?;
    let cpus = cpu::parse_list(&args.pin, &cpu::allowed()?)?;
    cpu::pin_current(&cpus)?;
    let process = Process::connect(&args.dir, AGENT_RAM, &args.name)?;
    let platform: Arc<dyn Platform> = Arc::<Process>::clone(&process);
    let context = Context::open(platform).context("cannot open the device")?;
    let clock = Clock {
        ticks: clock::tsc,
        hz: clock::tsc_hz(),
    };
    let mut agent = Agent::new(&context, clock, args.port)?;
    agent.serve(
        || stop.load(std::sync::atomic::Ordering::Relaxed),
        |e| tracing::warn!("a measurement ended: {e}"),
    )?;
    Ok(ExitCode::SUCCESS)
}
