//! What the verbs themselves cost in the same run: messages of the sizes of a read's request and reply, without a store.

use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_host::program;
use hyv_host::sys::process::spawn_bound;
use hyv_host::sys::window::SharedWindow;
use hyv_host::sys::{clock, cpu};
use hyv_lab::median;
use hyv_rnic::cell::Inline;
use hyv_tools::perf::{Agent, Clock, Command as Task, Kind, Partner, Verb};
use hyv_verbs::probe::{self, Lines};
use hyv_verbs::{Context, Gid, Platform, Process};
use rustix::process::{Pid, Signal, kill_process};

use super::super::appliance::Appliance;
use crate::bench::limits::FLOOR_ROUNDS;

/// RAM of the other side: buffers, samples and rings on whole large pages.
const AGENT_RAM: u64 = 24 << 20;
/// RAM that this side takes of its process's.
pub(super) const PARTNER_RAM: u64 = 24 << 20;
/// Length of a slice: there are two a round.
const SLICE: Duration = Duration::from_millis(20);
/// Shortest time of one sample, ns: a clock's tick does not show in it.
const BATCH_NS: u64 = 10_000;
/// Silence after which a probe has failed, ns.
const SILENCE_NS: u64 = 200_000_000;
/// How long the other side may take to come up.
const PATIENCE: Duration = Duration::from_secs(10);
/// Rest after it was woken from SIGSTOP.
const SETTLE: Duration = Duration::from_millis(2);

#[derive(clap::Args, Debug)]
pub(in crate::commands) struct AgentArgs {
    /// Folder of the instance whose device to use
    #[arg(long)]
    dir: PathBuf,
    /// Port to listen on
    #[arg(long)]
    port: u16,
    /// CPUs to run on
    #[arg(long)]
    pin: String,
}

/// Runs the other side, in a process of its own where the measured servers run.
pub(in crate::commands) fn agent(args: &AgentArgs) -> Result<ExitCode> {
    program::start_log("warn")?;
    let stop = program::stop_flag()?;
    cpu::pin_current(&cpu::parse_list(&args.pin, &cpu::allowed()?)?)?;
    let process = Process::connect(&args.dir, AGENT_RAM, NAME)?;
    let platform: Arc<dyn Platform> = Arc::<Process>::clone(&process);
    let context = Context::open(platform).context("cannot open the device")?;
    let clock = Clock {
        ticks: clock::tsc,
        hz: clock::tsc_hz(),
    };
    Agent::new(&context, clock, args.port)?.serve(
        || stop.load(Ordering::Relaxed),
        |e| tracing::warn!("a measurement ended: {e}"),
    )?;
    Ok(ExitCode::SUCCESS)
}

/// Name that the host's log shows.
const NAME: &str = "bare";

/// The other side of bare verbs; killed when dropped.
pub(super) struct Bare {
    other: Other,
    partner: Partner,
    window: Arc<SharedWindow>,
    /// Bytes of a read's request and reply.
    sizes: [u32; 2],
    sends: Vec<f64>,
    two_lines: Vec<f64>,
}

struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        // KILL also ends a stopped process.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Other {
    fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.0), signal).context("cannot stop and continue a process")
    }
}

impl Bare {
    /// Starts it, and stops it again until the first round.
    pub fn start(appliance: &Appliance, port: u16, sizes: [u32; 2]) -> Result<Self> {
        let exe = std::env::current_exe().context("cannot find this program's own path")?;
        let pin: Vec<String> = appliance
            .roles
            .guest
            .iter()
            .map(ToString::to_string)
            .collect();
        let mut command = Command::new(exe);
        command
            .args([
                "bench-agent",
                "--port",
                &port.to_string(),
                "--pin",
                &pin.join(","),
            ])
            .arg("--dir")
            .arg(appliance.instance.dir().path())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = spawn_bound(command, &[]).context("cannot start a native process")?;
        let mut other = Other(child);
        let start = Instant::now();
        let partner = loop {
            match Partner::connect(&appliance.context, (Gid::LOCAL, port)) {
                Ok(partner) => break partner,
                Err(e) if start.elapsed() > PATIENCE => {
                    return Err(e).context("the other side of bare verbs does not serve");
                }
                Err(_) => {}
            }
            if let Some(status) = other.0.try_wait()? {
                bail!("the other side of bare verbs ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let memory = appliance
            .instance
            .backend()
            .user_memory(NAME)
            .context("the other side of bare verbs is gone")?;
        other.signal(Signal::STOP)?;
        Ok(Self {
            other,
            partner,
            window: memory.window,
            sizes,
            sends: Vec::new(),
            two_lines: Vec::new(),
        })
    }

    /// Measures once.
    pub fn round(&mut self, mut inline: Option<Inline<'_>>) -> Result<()> {
        self.other.signal(Signal::CONT)?;
        std::thread::sleep(SETTLE);
        let outcome = self.measure(&mut || {
            if let Some(inline) = &mut inline {
                inline.driver().poll();
            }
        });
        self.other.signal(Signal::STOP)?;
        outcome
    }

    fn measure(&mut self, turn: &mut dyn FnMut()) -> Result<()> {
        let mut both = 0.0;
        for size in self.sizes {
            let task = Task {
                kind: Kind::Latency,
                verb: Verb::Send,
                size,
                slice_ns: SLICE.as_nanos() as u64,
                batch_ns: BATCH_NS,
            };
            let mut ns = self.partner.measure(&task, &mut *turn)?.ns;
            if ns.is_empty() {
                return Ok(());
            }
            both += median(&mut ns);
        }
        // A round trip of either size is two ways; a request goes one, its reply the other.
        self.sends.push(both / 2.0);
        let (step, lines) = (32, Lines::two(&self.window));
        let batches = FLOOR_ROUNDS / step;
        lines.reset();
        let rounds = FLOOR_ROUNDS + batches * step;
        self.partner.probe(Kind::Exchange { rounds }, &mut *turn)?;
        let bounce =
            |from, rounds| probe::bounce(lines, from, rounds, SILENCE_NS, clock::monotonic_ns);
        // What has been sent arrives before the lines are all that moves.
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(100) {
            turn();
        }
        let mut whole = bounce(0, FLOOR_ROUNDS);
        let mut samples = Vec::new();
        for k in 0..batches {
            let start = clock::tsc();
            whole = whole && bounce(FLOOR_ROUNDS + k * step, step);
            samples.push((clock::tsc() - start) as f64 / f64::from(step));
        }
        if whole {
            self.two_lines
                .push(median(&mut samples) * 1e9 / clock::tsc_hz() as f64);
        }
        Ok(())
    }

    /// Medians over all rounds, ns: a request one way and a reply the other as bare SENDs; a line each way.
    pub fn found(&mut self) -> (Option<f64>, Option<f64>) {
        let of = |list: &mut Vec<f64>| (!list.is_empty()).then(|| median(list));
        (of(&mut self.sends), of(&mut self.two_lines))
    }
}
