//! The subcommands of `kv`.

mod appliance;
mod bench;
mod check_history;
mod client;
mod kvbench;
mod native;
mod object;
mod soak;
mod stats;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use hyv_host::program;

/// A key-value store in a unikernel, served over RDMA.
#[derive(Parser, Debug)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Boot the store as a unikernel in QEMU and serve until Ctrl-C; with --verify, --bench or --json do that and end
    Appliance(appliance::Args),
    /// Store a value
    Put(object::PutArgs),
    /// Print a key's value
    Get(object::GetArgs),
    /// Remove a key
    Del(object::DelArgs),
    /// Add to a number and print it
    Incr(object::IncrArgs),
    /// Make, remove and list tables
    Table(object::TableArgs),
    /// Print all keys, one a line
    List(client::ListArgs),
    /// Store every record of a file
    Load(client::LoadArgs),
    /// Write every record to a file that `load` reads
    Dump(client::DumpArgs),
    /// Print what the server and each table hold and did
    Stats(stats::Args),
    /// Measure YCSB's workloads, or reads and writes, on a store; beside a native one, beside Redis
    Bench(kvbench::Args),
    /// The other side of bare verbs
    #[command(hide = true)]
    BenchAgent(kvbench::AgentArgs),
    /// Serve a store from a Linux process on a running instance's device
    NativeServer(native::Args),
    /// Tell whether what clients recorded is linearizable
    CheckHistory(check_history::Args),
    /// Run a store under clients that fight and are killed, and check all that they were told
    Soak(soak::Args),
    /// One client of a soak
    #[command(hide = true)]
    SoakClient(soak::ClientArgs),
    /// The device of a soak without a guest
    #[command(hide = true)]
    SoakDevice(soak::DeviceArgs),
}

/// Runs the command line; gives the exit code.
#[must_use]
pub fn run() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    let result = match cli.command {
        Command::Appliance(args) => appliance::run(&args),
        Command::Put(args) => object::put(&args),
        Command::Get(args) => object::get(&args),
        Command::Del(args) => object::del(&args),
        Command::Incr(args) => object::incr(&args),
        Command::Table(args) => object::table(&args),
        Command::List(args) => client::list(&args),
        Command::Load(args) => client::load(&args),
        Command::Dump(args) => client::dump(&args),
        Command::Stats(args) => stats::run(&args),
        Command::Bench(args) => kvbench::run(&args),
        Command::BenchAgent(args) => kvbench::agent(&args),
        Command::NativeServer(args) => native::run(&args),
        Command::CheckHistory(args) => check_history::run(&args),
        Command::Soak(args) => soak::run(args),
        Command::SoakClient(args) => soak::client(args),
        Command::SoakDevice(args) => soak::device(args),
    };
    match result {
        Ok(code) => code,
        // Whoever reads us has enough, as `head` does.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", hyv_host::message::of(&e));
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Cli, clap::Error> {
    let command = Cli::command();
    let mut args = std::env::args_os().skip(1).peekable();
    // A command of its own there, so that usage and errors name no other.
    if let Some(typed) = program::typed_name().filter(|t| t.ends_with(" kvstore"))
        && args.next_if(|arg| arg == "appliance").is_some()
        && let Some(command) = command.find_subcommand("appliance")
    {
        let command = command.clone().bin_name(&typed);
        let matches = command.try_get_matches_from(std::iter::once(typed.into()).chain(args))?;
        let command = Command::Appliance(appliance::Args::from_arg_matches(&matches)?);
        return Ok(Cli { command });
    }
    Cli::from_arg_matches(&program::matches(command)?)
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().any(|c| {
        c.downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
    })
}
