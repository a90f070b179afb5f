//! `kv native-server`: the same server as a Linux process, on the same device.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use hyv_host::program;
use hyv_host::sys::cpu;
use hyv_verbs::{Context, Platform, Process};
use kvstore::server::serve::{ServeOptions, Surroundings};
use kvstore::server::{Server, ServerConfig, limits};
use kvstore::status::Status;

use hyv_lab::values;

/// RAM of the process beside the store: rings, buffers, completion queues of all clients, and what regions lose by alignment.
const BESIDE_STORE: u64 =
    (limits::memory_for(limits::MAX_CONNECTIONS) as u64).next_multiple_of(2 << 20) + (8 << 20);

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Instance whose device to use (default: the only one that runs)
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    /// Port to listen on
    #[arg(long, default_value_t = 7071)]
    port: u16,
    /// Memory for the store
    #[arg(long, value_name = "SIZE", value_parser = values::size, default_value = "256M")]
    memory: u64,
    /// Name that the host's log shows
    #[arg(long, default_value = "native-server")]
    name: String,
    /// CPUs to run on, for example 1 or 1,3
    #[arg(long, value_name = "CPUS")]
    pin: Option<String>,
    /// How long to poll without finding work before sleeping, microseconds
    #[arg(long, value_name = "US", default_value_t = 200)]
    spin_us: u64,
}

struct Process1 {
    process: Arc<Process>,
    stop: Arc<AtomicBool>,
}

impl Surroundings for Process1 {
    fn should_stop(&mut self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn publish(&mut self, server: &Server) {
        Status::of(server).publish(&self.process.window().user);
    }
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    program::start_log("warn")?;
    let stop = program::stop_flag()?;
    if let Some(list) = &args.pin {
        let cpus = cpu::parse_list(list, &cpu::allowed()?)?;
        cpu::pin_current(&cpus)?;
    }
    let dir = crate::session::find(args.instance.as_deref())?;
    let process = Process::connect(&dir, args.memory + BESIDE_STORE, &args.name)?;
    let platform: Arc<dyn Platform> = Arc::<Process>::clone(&process);
    let context = Context::open(platform).context("cannot open the device")?;
    let config = ServerConfig {
        port: args.port,
        store_bytes: args.memory as usize,
        seed: hyv_host::sys::clock::tsc() ^ hyv_host::sys::clock::realtime_ns(),
        max_connections: limits::MAX_CONNECTIONS,
        unix_ns: hyv_host::sys::clock::realtime_ns(),
        one_sided: true,
    };
    let mut server = Server::new(&context, config).with_context(|| {
        let memory = values::bytes(args.memory);
        format!("cannot serve on port {} from --memory {memory}", args.port)
    })?;
    let mut surroundings = Process1 { process, stop };
    surroundings.publish(&server);
    println!("serving on port {} of {}", args.port, dir.display());
    server.serve(
        ServeOptions {
            spin_ns: args.spin_us * 1000,
        },
        &mut surroundings,
    )?;
    server.close()?;
    Ok(ExitCode::SUCCESS)
}
