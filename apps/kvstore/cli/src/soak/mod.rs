//! `kv soak`: clients that fight over keys, lose their connections, are stopped and killed; a store so full that its cleaner never rests;
//! and a check of everything that they were told.
//!
//! The run goes in rounds. In each, clients record what they do; at its end the keys they fought for are read back, all histories are
//! checked together, and the next round begins with what was read. What was never answered in one round may still take effect in the
//! one after.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`limits`] | every limit, with its reason |
//! | [`workload`] | what a client does next |
//! | [`client`] | a client process |
//! | [`counts`] | what clients met, known even of those that were killed |
//! | [`store`] | requests and answers of the client library, as a history has them |
//! | `place` | the store under test: a guest, or a native server |
//! | `workers` | client processes: started, stopped, killed |
//! | `rounds` | the rounds |
//! | `scan` | enumerations beside all that |

pub mod client;
pub mod counts;
pub mod limits;
pub mod store;
pub mod workload;

mod place;
mod rounds;
mod scan;
mod workers;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use counts::Counts;
use hyv_lab::values;
use rounds::Soak;
use store::Figures;

/// Which store to test.
#[derive(Clone, Debug)]
pub enum Where {
    /// A guest, with these arguments for `kv appliance`.
    Guest(Vec<String>),
    /// A native server.
    Native {
        /// Memory of its store, bytes.
        memory: u64,
    },
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// How long in all.
    pub time: Duration,
    /// Length of a round.
    pub round: Duration,
    /// Whether to go on until there is nothing of [`Totals::missing`], but no longer than [`limits::LONGER`] times as long.
    pub until_all: bool,
    /// Clients at once.
    pub clients: u32,
    /// Most requests of a client under way.
    pub in_flight: usize,
    /// Mean time between two clients killed; none: nobody is killed.
    pub kill_every: Option<Duration>,
    /// Mean time between two clients stopped for a while; none: nobody is stopped.
    pub stop_every: Option<Duration>,
    /// Mean time between two connections that a client cuts; none: never.
    pub cut_every: Option<Duration>,
    /// Part of the store's capacity that is live.
    pub utilisation: f64,
    /// Keys that clients fight for; of those whose objects expire there are [`limits::FADING_FACTOR`] times as many.
    pub hot_keys: u64,
    /// Seed of clients and faults.
    pub seed: u64,
    /// Where histories go and stay; otherwise to a temporary folder that stays if something is wrong.
    pub histories: Option<PathBuf>,
    /// Which store.
    pub place: Where,
    /// Port of the store.
    pub port: u16,
}

/// What happened in all.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Totals {
    /// Rounds.
    pub rounds: u64,
    /// Operations that were checked.
    pub operations: u64,
    /// Operations without an answer.
    pub unanswered: u64,
    /// Clients killed.
    pub killed: u64,
    /// Times that a client was stopped for a while.
    pub stopped: u64,
    /// Whole enumerations.
    pub scans: u64,
    /// What the clients counted.
    pub counts: Counts,
    /// What the server counted, from the beginning of the first round on.
    pub server: Figures,
    /// Time of all rounds, s.
    pub seconds: f64,
}

impl Totals {
    /// Every figure with its name, for a report.
    #[must_use]
    pub fn fields(&self) -> Vec<(&'static str, u64)> {
        let own = [
            ("rounds", self.rounds),
            ("operations", self.operations),
            ("unanswered", self.unanswered),
            ("killed", self.killed),
            ("stopped", self.stopped),
            ("scans", self.scans),
            ("expired", self.server.expired),
            ("duplicates", self.server.duplicates),
            ("expelled", self.server.expelled),
            ("cleaned_bytes", self.server.cleaned_bytes),
        ];
        own.into_iter().chain(self.counts.fields()).collect()
    }

    /// What has not happened, of all that a soak is for.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        // Depends on the machine, not on the soak.
        let rare = ["full", "busy", "expelled", "too_long"];
        let fields = self.fields().into_iter();
        let missing = fields.filter(|(name, n)| *n == 0 && !rare.contains(name));
        missing.map(|(name, _)| name).collect()
    }

    fn print(&self) {
        let c = &self.counts;
        let line = |what: &str, figures: String| println!("  {what:<20} {figures}");
        line(
            "operations",
            format!(
                "{} ({:.0}/s), {} multi-operations, {} unanswered, {} of them because of a client that does without exactly-once",
                self.operations,
                self.operations as f64 / self.seconds.max(1e-9),
                c.multis,
                self.unanswered,
                c.unknown
            ),
        );
        line(
            "refused",
            format!(
                "{} by reject rules, {} because the store was full, {} for the moment",
                c.rejected, c.full, c.busy
            ),
        );
        line(
            "one-sided reads",
            format!(
                "{} with one READ, {} by the hash table, {} of no object; {} in doubt, {} took too long",
                c.direct, c.by_table, c.misses, c.doubts, c.too_long
            ),
        );
        line(
            "connections",
            format!(
                "{} cut, {} ended by the server, {} made anew; {} requests sent again, {} answered with a kept result",
                c.cuts, self.server.expelled, c.reconnects, c.repeats, self.server.duplicates
            ),
        );
        line(
            "clients",
            format!("{} killed, {} times stopped", self.killed, self.stopped),
        );
        line(
            "store",
            format!(
                "{} moved by the cleaner, {} objects expired, {} enumerations",
                values::bytes(self.server.cleaned_bytes),
                self.server.expired,
                self.scans
            ),
        );
        let missing = self.missing();
        if !missing.is_empty() {
            line("never happened", missing.join(", "));
        }
    }
}

/// Runs until the time is over, `stop` is raised, or something is wrong. Prints a line for each round and a summary. `totals` is filled
/// in either case.
///
/// # Errors
/// What is wrong: a history that is not linearizable, a store or client that ended or failed.
pub fn run(config: &Config, stop: &AtomicBool, totals: &mut Totals) -> Result<()> {
    let started = Instant::now();
    let (folder, temporary) = folder(config)?;
    println!("seed {}; histories in {}", config.seed, folder.display());
    let outcome = Soak::run(config, &folder, stop, totals);
    if totals.rounds > 0 {
        totals.print();
    }
    println!(
        "{} in {} rounds: {}",
        duration(started.elapsed()),
        totals.rounds,
        match &outcome {
            Ok(()) => "nothing wrong",
            Err(_) => "something is wrong",
        }
    );
    let first = folder.join("round-0");
    let recorded = !temporary || (outcome.is_err() && first.is_dir());
    if !recorded {
        let _ = fs::remove_dir_all(&folder);
    }
    outcome.with_context(|| {
        let place = match recorded {
            true => format!("what was recorded is in {}", folder.display()),
            false => "nothing was recorded".to_owned(),
        };
        format!("the soak with seed {} ended; {place}", config.seed)
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

fn round_folder(folder: &Path, number: u64) -> Result<PathBuf> {
    let folder = folder.join(format!("round-{number}"));
    fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// Hours, minutes, seconds.
fn duration(time: Duration) -> String {
    let s = time.as_secs();
    format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}
