//! `kv soak`: clients that fight over keys and are killed, a store so full that its cleaner never rests, and a check of everything that
//! they were told.
//!
//! The run goes in rounds. In each, clients record what they do; at its end the keys they fought for are read back, all histories are
//! checked together, and the next round begins with what was read. What a killed client had under way may still take effect in the
//! round after.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`store`] | the store as clients see it, over the client library |
//! | [`workload`] | what a client does next |
//! | [`client`] | a client process |

pub mod client;
pub mod store;
pub mod workload;

mod appliance;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use hyv_host::sys::process::spawn_bound;
use hyv_lab::values;
use kvstore_check::op::{NEVER, Operation, Outcome, Rules, Value, Version};
use kvstore_check::recorder::{Recorder, monotonic_ns};
use kvstore_check::{History, Initial, Why, check};
use rustix::process::{Pid, Signal, kill_process};

use appliance::Appliance;
use store::{Figures, Request, Store, StoreFault};
use workload::{Keys, Random};

/// How far the guest's clock may be off this machine's, in ns, when objects expire: it is set once, at boot.
pub const CLOCK_SLACK_NS: u64 = 20_000_000;
/// How often the supervisor looks after its processes.
const LOOK: Duration = Duration::from_millis(10);
/// A client that is started with less time than this would only be in the way.
const SHORTEST_LIFE: Duration = Duration::from_millis(300);
/// How long clients may take to end after their time; longer than their own patience with the store.
const ENDING: Duration = Duration::from_secs(20);
/// Puts between two looks at how full the store is.
const FILL_BATCH: u64 = 256;
/// The supervisor's own number in a history.
const SUPERVISOR: u32 = 0;

/// What to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// How long in all.
    pub time: Duration,
    /// Length of a round.
    pub round: Duration,
    /// Clients at once.
    pub clients: u32,
    /// Mean time between two clients killed; none: nobody is killed.
    pub kill_every: Option<Duration>,
    /// Part of the store's capacity that is live.
    pub utilisation: f64,
    /// Keys that clients fight for.
    pub hot_keys: u64,
    /// Seed of clients and kills.
    pub seed: u64,
    /// Where histories go and stay; otherwise to a temporary folder that stays if something is wrong.
    pub histories: Option<PathBuf>,
    /// Arguments for `kv appliance`.
    pub appliance: Vec<String>,
    /// Port of the store.
    pub port: u16,
}

/// What happened in all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Totals {
    rounds: u64,
    operations: u64,
    unanswered: u64,
    killed: u64,
    cleaned_bytes: u64,
}

/// Runs until the time is over, `stop` is raised, or something is wrong. Prints a line for each round and a summary.
///
/// # Errors
/// What is wrong: a history that is not linearizable, a store or client that ended or failed.
pub fn run(config: &Config, stop: &AtomicBool) -> Result<()> {
    let started = Instant::now();
    let (folder, temporary) = folder(config)?;
    println!("seed {}; histories in {}", config.seed, folder.display());
    let mut totals = Totals::default();
    let outcome = Soak::start(config, &folder, stop).and_then(|mut soak| {
        let outcome = soak
            .fill(stop)
            .and_then(|()| soak.rounds(stop, &mut totals));
        drop(soak.store);
        match outcome {
            Ok(()) => soak.appliance.end(),
            // That the store is lost says less than why it ended.
            Err(e) => soak.appliance.check_soon().and(Err(e)),
        }
    });
    println!(
        "{} in {} rounds: {} operations, {} clients killed, {} operations unanswered, {} moved by the cleaner: {}",
        duration(started.elapsed()),
        totals.rounds,
        totals.operations,
        totals.killed,
        totals.unanswered,
        values::bytes(totals.cleaned_bytes),
        match &outcome {
            Ok(()) => "nothing wrong",
            Err(_) => "something is wrong",
        }
    );
    if outcome.is_ok() && temporary {
        let _ = fs::remove_dir_all(&folder);
    }
    outcome.with_context(|| {
        format!(
            "the soak with seed {} ended; what was recorded is in {}",
            config.seed,
            folder.display()
        )
    })
}

fn folder(config: &Config) -> Result<(PathBuf, bool)> {
    let Some(folder) = &config.histories else {
        let folder = tempfile::Builder::new()
            .prefix("kv-soak-")
            .tempdir()
            .context("cannot make a temporary folder")?;
        return Ok((folder.keep(), true));
    };
    fs::create_dir_all(folder)
        .with_context(|| format!("--histories {}: cannot be made", folder.display()))?;
    if fs::read_dir(folder)?.next().is_some() {
        bail!("--histories {}: is not empty", folder.display());
    }
    Ok((folder.clone(), false))
}

/// A client process.
struct Worker {
    client: u32,
    history: PathBuf,
    child: Child,
}

struct Soak<'a> {
    config: &'a Config,
    appliance: Appliance,
    store: Box<dyn Store>,
    folder: &'a Path,
    random: Random,
    keys: Keys,
    /// What the keys that clients fight for held after the last round.
    held: HashMap<Vec<u8>, Initial>,
    /// What was never answered in the last round.
    carried: Vec<(Vec<u8>, Operation)>,
    next_client: u32,
    figures: Figures,
}

/// How a round went.
struct Round {
    operations: u64,
    unanswered: u64,
    killed: u64,
    keys: usize,
    time: Duration,
}

impl<'a> Soak<'a> {
    fn start(config: &'a Config, folder: &'a Path, stop: &AtomicBool) -> Result<Self> {
        let mut appliance = Appliance::start(config, folder)?;
        let store = appliance.connect(stop)?;
        Ok(Self {
            config,
            appliance,
            store,
            folder,
            random: Random(config.seed),
            keys: Keys {
                hot: config.hot_keys,
                fill: 0,
            },
            held: HashMap::new(),
            carried: Vec::new(),
            next_client: SUPERVISOR + 1,
            figures: Figures::default(),
        })
    }

    /// Writes objects until as much of the store is live as is wanted.
    fn fill(&mut self, stop: &AtomicBool) -> Result<()> {
        loop {
            self.figures = self.store.figures().map_err(failed)?;
            let wanted = self.figures.capacity_bytes as f64 * self.config.utilisation;
            if self.figures.live_bytes as f64 >= wanted || stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            for _ in 0..FILL_BATCH {
                let len = 1 + self.random.below(workload::FILL_BYTES);
                let request = Request::Write {
                    value: vec![self.random.next() as u8; len as usize],
                    expires: NEVER,
                };
                let key = Keys::fill(self.keys.fill);
                match self.store.execute(&key, &request, &Rules::NONE) {
                    Ok(Outcome::Written { .. }) => self.keys.fill += 1,
                    Ok(Outcome::Refused) => bail!(
                        "the store is full at {:.0}%: ask for less with --utilisation",
                        100.0 * self.figures.live_bytes as f64 / self.figures.capacity_bytes as f64
                    ),
                    Ok(other) => bail!("a write was answered with: {other}"),
                    Err(e) => return Err(failed(e)),
                }
            }
        }
    }

    fn rounds(&mut self, stop: &AtomicBool, totals: &mut Totals) -> Result<()> {
        let begin = Instant::now();
        let cleaned_before = self.figures.cleaned_bytes;
        while begin.elapsed() < self.config.time && !stop.load(Ordering::Relaxed) {
            let left = self.config.time.saturating_sub(begin.elapsed());
            // A last round too short to tell anything is added to the one before.
            let time = if left < self.config.round * 3 / 2 {
                left
            } else {
                self.config.round
            };
            let before = self.figures;
            let round = self.round(totals.rounds, time, stop)?;
            totals.rounds += 1;
            totals.operations += round.operations;
            totals.unanswered += round.unanswered;
            totals.killed += round.killed;
            totals.cleaned_bytes = self.figures.cleaned_bytes.saturating_sub(cleaned_before);
            let seconds = round.time.as_secs_f64();
            println!(
                "{}  {} operations ({:.0}/s), {} clients killed, {} unanswered, {:.0}% live, cleaner {}/s; {} keys linearizable",
                duration(begin.elapsed()),
                round.operations,
                round.operations as f64 / seconds,
                round.killed,
                round.unanswered,
                100.0 * self.figures.live_bytes as f64 / self.figures.capacity_bytes.max(1) as f64,
                values::bytes(
                    ((self.figures.cleaned_bytes - before.cleaned_bytes) as f64 / seconds) as u64
                ),
                round.keys,
            );
        }
        Ok(())
    }

    fn round(&mut self, number: u64, time: Duration, stop: &AtomicBool) -> Result<Round> {
        let folder = self.folder.join(format!("round-{number}"));
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let own = folder.join("supervisor.hyvh");
        let named = || format!("cannot write {}", own.display());
        let mut recorder = Recorder::new(
            fs::File::create_new(&own).with_context(named)?,
            SUPERVISOR,
            CLOCK_SLACK_NS,
        );
        for (key, initial) in &self.held {
            recorder.initial(key, initial);
        }
        for (key, operation) in &self.carried {
            recorder.invoke(monotonic_ns(), key, operation);
        }

        let begin = Instant::now();
        let mut workers = Workers {
            folder: &folder,
            dir: self.appliance.dir().to_owned(),
            until: monotonic_ns() + time.as_nanos() as u64,
            running: Vec::new(),
            files: Vec::new(),
            killed: 0,
        };
        let worked = self.work(&mut workers, begin, time, stop);
        workers.end_all();
        worked?;

        for n in 0..self.keys.hot {
            let key = Keys::hot(n);
            let id = recorder.invoke(monotonic_ns(), &key, &Operation::READ);
            let outcome = self
                .store
                .execute(&key, &Request::Read, &Rules::NONE)
                .map_err(failed)?;
            recorder.respond(monotonic_ns(), id, &outcome);
        }
        recorder.finish().with_context(named)?;
        self.figures = self.store.figures().map_err(failed)?;
        let time = begin.elapsed();

        let mut history = History::new();
        history.read_file(&own)?;
        for file in &workers.files {
            // One that was killed before it recorded anything did nothing.
            if fs::metadata(file).is_ok_and(|m| m.len() > 0) {
                history.read_file(file)?;
            }
        }
        let report = check(&history);
        let unanswered = report.unanswered - self.carried.len();
        if let Some(worst) = report.failures.first() {
            for failure in &report.failures {
                eprintln!("error: {failure}");
            }
            return Err(match &worst.why {
                Why::NotLinearizable(_) => anyhow!("the store is not linearizable"),
                Why::GaveUp { .. } => anyhow!("a history could not be judged"),
            });
        }
        self.remember(&history);
        if self.config.histories.is_none() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        Ok(Round {
            operations: report.operations as u64,
            unanswered: unanswered as u64,
            killed: workers.killed,
            keys: report.keys,
            time,
        })
    }

    /// Keeps clients running, and kills some.
    fn work(
        &mut self,
        workers: &mut Workers<'_>,
        begin: Instant,
        time: Duration,
        stop: &AtomicBool,
    ) -> Result<()> {
        let mut next_kill = self.pause_until_kill();
        loop {
            self.appliance.check()?;
            let left = time.saturating_sub(begin.elapsed());
            if left.is_zero() || stop.load(Ordering::Relaxed) {
                break;
            }
            workers.reap(left > SHORTEST_LIFE)?;
            if left > SHORTEST_LIFE {
                while workers.running.len() < self.config.clients as usize {
                    let client = self.next_client;
                    self.next_client += 1;
                    workers.start(client, self.config, self.keys)?;
                }
            }
            if next_kill.is_some_and(|at| begin.elapsed() >= at) {
                let pause = self.pause_until_kill().unwrap_or(Duration::MAX);
                next_kill = Some(begin.elapsed().saturating_add(pause));
                let which = self.random.below(workers.running.len().max(1) as u64) as usize;
                if which < workers.running.len() {
                    workers.kill(which)?;
                }
            }
            std::thread::sleep(LOOK);
        }
        if stop.load(Ordering::Relaxed) {
            workers.ask_to_end();
        }
        let deadline = Instant::now() + ENDING;
        while !workers.running.is_empty() {
            self.appliance.check()?;
            workers.reap(false)?;
            if Instant::now() > deadline {
                bail!(
                    "client {} did not end within {ENDING:?} after its time: it waits for the store",
                    workers.running[0].client
                );
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// From nothing to twice the mean.
    fn pause_until_kill(&mut self) -> Option<Duration> {
        let mean = self.config.kill_every?.as_nanos() as u64;
        Some(Duration::from_nanos(
            self.random.below(mean.saturating_mul(2).max(1)),
        ))
    }

    /// What the next round begins with.
    fn remember(&mut self, history: &History) {
        self.carried.clear();
        let mut held = HashMap::new();
        for n in 0..self.keys.hot {
            let key = Keys::hot(n);
            let Some(seen) = history.get(&key) else {
                continue;
            };
            let own = |op: &&kvstore_check::Op| op.client == SUPERVISOR && op.outcome.is_some();
            let last = seen.ops.iter().filter(own).max_by_key(|op| op.returned);
            let floor = seen
                .ops
                .iter()
                .filter_map(|op| op.outcome.as_ref().map(Outcome::version))
                .chain(self.held.get(&key).map(last_version))
                .max()
                .unwrap_or(0);
            let initial = match last.and_then(|op| op.outcome) {
                // When it expires is known of the write that it was read from.
                Some(Outcome::Found { value, version }) => Initial::Present {
                    value,
                    version,
                    expires: expiry_of(seen, self.held.get(&key), value),
                },
                _ => Initial::AbsentAbove(floor),
            };
            held.insert(key.clone(), initial);
            let under_way = seen.ops.iter().filter(|op| {
                op.outcome.is_none()
                    && op.client != SUPERVISOR
                    && !matches!(op.operation, Operation::Read { .. })
            });
            self.carried
                .extend(under_way.map(|op| (key.clone(), op.operation.clone())));
        }
        self.held = held;
    }
}

const fn last_version(initial: &Initial) -> Version {
    match *initial {
        Initial::AbsentAbove(version) | Initial::Present { version, .. } => version,
        Initial::Fresh | Initial::Unknown => 0,
    }
}

/// When the object with this value expires. Only one write has it, or it is a number, and numbers stay.
fn expiry_of(seen: &kvstore_check::KeyHistory, before: Option<&Initial>, found: Value) -> u64 {
    let written = seen.ops.iter().find_map(|op| match op.operation {
        Operation::Write { value, expires, .. } if value == found => Some(expires),
        _ => None,
    });
    match (written, before) {
        (Some(expires), _) => expires,
        (None, Some(Initial::Present { value, expires, .. })) if *value == found => *expires,
        _ => NEVER,
    }
}

/// The client processes of a round.
struct Workers<'a> {
    folder: &'a Path,
    dir: PathBuf,
    until: u64,
    running: Vec<Worker>,
    files: Vec<PathBuf>,
    killed: u64,
}

impl Workers<'_> {
    fn start(&mut self, client: u32, config: &Config, keys: Keys) -> Result<()> {
        let history = self.folder.join(format!("client-{client}.hyvh"));
        let exe = std::env::current_exe().context("cannot find this program's own path")?;
        let mut command = Command::new(exe);
        command
            .arg("soak-client")
            .arg("--dir")
            .arg(&self.dir)
            .arg("--history")
            .arg(&history)
            .args(["--port", &config.port.to_string()])
            .args(["--client", &client.to_string()])
            .args(["--seed", &config.seed.to_string()])
            .args(["--until", &self.until.to_string()])
            .args(["--hot-keys", &keys.hot.to_string()])
            .args(["--fill-keys", &keys.fill.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = spawn_bound(command, &[]).context("cannot start a client")?;
        self.files.push(history.clone());
        self.running.push(Worker {
            client,
            history,
            child,
        });
        Ok(())
    }

    fn kill(&mut self, which: usize) -> Result<()> {
        let mut worker = self.running.swap_remove(which);
        worker.child.kill().context("cannot kill a client")?;
        worker.child.wait().context("cannot wait for a client")?;
        self.killed += 1;
        tracing::debug!("killed client {}", worker.client);
        Ok(())
    }

    /// Takes note of clients that ended, which `early` says they should not have yet.
    fn reap(&mut self, early: bool) -> Result<()> {
        let mut at = 0;
        while at < self.running.len() {
            let worker = &mut self.running[at];
            let Some(status) = worker
                .child
                .try_wait()
                .context("cannot wait for a client")?
            else {
                at += 1;
                continue;
            };
            if !status.success() || early {
                bail!(
                    "client {} ended before its time ({status}); its history: {}",
                    worker.client,
                    worker.history.display()
                );
            }
            self.running.swap_remove(at);
        }
        Ok(())
    }

    fn ask_to_end(&self) {
        for worker in &self.running {
            let _ = kill_process(Pid::from_child(&worker.child), Signal::TERM);
        }
    }

    /// On an error nothing is left running.
    fn end_all(&mut self) {
        for worker in &mut self.running {
            let _ = worker.child.kill();
            let _ = worker.child.wait();
        }
        self.running.clear();
    }
}

fn failed(fault: StoreFault) -> anyhow::Error {
    match fault {
        StoreFault::Lost(e) => e.context("the supervisor lost the store"),
        StoreFault::Wrong(e) => e.context("the store did what it may not"),
    }
}

/// Hours, minutes, seconds.
fn duration(time: Duration) -> String {
    let s = time.as_secs();
    format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}
