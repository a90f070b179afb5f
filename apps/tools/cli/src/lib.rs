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

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use hyv_host::program;

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

fn parse() -> Result<Cli, clap::Error> {
    Cli::from_arg_matches(&program::matches(Cli::command())?)
}
