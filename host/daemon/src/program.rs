//! What every program of the project does first: its command line under the name that the user typed, its log, its signals.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, Result, anyhow};
use clap::{ArgMatches, Command};

/// What the user typed before the arguments, if that was another command (`HYV_COMMAND`): `./run.sh perf`, say.
#[must_use]
pub fn typed_name() -> Option<String> {
    std::env::var_os("HYV_COMMAND").and_then(|n| n.into_string().ok())
}

/// Reads the command line; usage and errors name what the user typed.
///
/// # Errors
/// As clap's.
pub fn matches(mut command: Command) -> Result<ArgMatches, clap::Error> {
    if let Some(typed) = typed_name() {
        command = command.bin_name(typed);
    }
    command.try_get_matches()
}

/// Starts logging to standard error at a level (`error`, `warn`, `info`, `debug`, `trace`, or a filter like `hyv_host=debug`).
///
/// # Errors
/// A level that is none.
pub fn start_log(level: &str) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(level)
        .map_err(|e| anyhow!("--log {level}: {e}; say error, warn, info, debug or trace"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
    Ok(())
}

/// A flag that SIGINT, SIGTERM and SIGHUP raise. A second one ends the program at once; QEMU dies with it.
///
/// # Errors
/// When signals cannot be watched.
pub fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
            .context("cannot watch for signals")?;
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .context("cannot watch for signals")?;
    }
    Ok(stop)
}
