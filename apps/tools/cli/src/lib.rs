//! The `hyv-tools` command: RDMA tools for hosts and guests.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`machine`] | a device with its guests and native agents, on chosen CPUs |
//! | [`exchange`] | pingpong and rping, with the stock programs as peers |
//! | [`pcap`] | checks captures of RoCEv2 |
//! | [`perf`] | latency and bandwidth of each verb, guest beside native |

pub mod exchange;
pub mod machine;
pub mod pcap;
pub mod perf;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// RDMA tools: measure verbs in a guest and on Linux, check captures.
#[derive(Parser, Debug)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Measure verbs: latency or bandwidth, in a guest and as a Linux process
    Perf(perf::Args),
    /// Exchange messages with ibv_rc_pingpong, ibv_uc_pingpong or ibv_ud_pingpong
    Pingpong(exchange::PingpongArgs),
    /// Exchange messages with rping over RDMA CM
    Rping(exchange::RpingArgs),
    /// Check captures of RoCEv2: every ICRC, every byte, every PSN
    #[command(arg_required_else_help = true)]
    Pcap(pcap::Args),
    /// What `perf` starts as the Linux process under measurement
    #[command(hide = true)]
    PerfAgent(perf::AgentArgs),
}

/// Runs the command line; gives the exit code.
#[must_use]
pub fn run() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    let result = match cli.command {
        Command::Perf(args) => perf::run(&args),
        Command::Pingpong(args) => exchange::pingpong(&args),
        Command::Rping(args) => exchange::rping(&args),
        Command::Pcap(args) => pcap::run(&args),
        Command::PerfAgent(args) => perf::agent(&args),
    };
    result.unwrap_or_else(|e| {
        eprintln!("error: {}", hyv_host::message::of(&e));
        ExitCode::FAILURE
    })
}

/// Reads the command line. `HYV_COMMAND` is what the user typed before it, if that was another command.
fn parse() -> Result<Cli, clap::Error> {
    let command = Cli::command();
    let typed = std::env::var_os("HYV_COMMAND").and_then(|n| n.into_string().ok());
    let matches = match typed {
        Some(typed) => command.bin_name(typed).try_get_matches()?,
        None => command.try_get_matches()?,
    };
    Cli::from_arg_matches(&matches)
}

/// Starts logging at a level (`error`, `warn`, `info`, `debug`, `trace`, or a filter like `hyv_host=debug`).
fn start_log(level: &str) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(level).map_err(|e| {
        anyhow::anyhow!("--log {level}: {e}; say error, warn, info, debug or trace")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
    Ok(())
}
