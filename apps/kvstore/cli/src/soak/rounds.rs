//! The rounds of a soak.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use hyv_lab::values;
use kvstore::client::Client;
use kvstore::proto::{Element, MultiOp, Status};
use kvstore_check::op::{NEVER, Nanos, Operation, Outcome, Value, Version};
use kvstore_check::recorder::{Recorder, monotonic_ns};
use kvstore_check::{History, Initial, KeyHistory, check};

use super::limits::{
    CLOCK_SLACK_NS, ENDING, FADING_FACTOR, FILL_BATCH, FILL_BYTES, LONGER, LOOK, SHORTEST_LIFE,
};
use super::place::Place;
use super::scan::Scan;
use super::store::{Clock, Figures};
use super::workers::{Common, Workers};
use super::workload::{Keys, Random};
use super::{Config, Totals, duration, round_folder};

/// The supervisor's own number in a history.
const SUPERVISOR: u32 = 0;
/// Name of the table that every second key is in.
const TABLE: &str = "soak";

pub(super) struct Soak<'a> {
    config: &'a Config,
    place: Place,
    client: Client,
    folder: &'a Path,
    random: Random,
    keys: Keys,
    clock: Clock,
    scan: Scan,
    /// What the keys that are read back held after the last round.
    held: HashMap<Vec<u8>, Initial>,
    /// What was never answered in the last round.
    carried: Vec<(Vec<u8>, Operation)>,
    next_client: u32,
    figures: Figures,
}

/// When the next of a kind of fault is due.
struct Due {
    mean: Option<Duration>,
    next: Option<Instant>,
}

impl Due {
    fn new(mean: Option<Duration>, random: &mut Random) -> Self {
        let mut this = Self { mean, next: None };
        this.draw(random);
        this
    }

    /// From nothing to twice the mean.
    fn draw(&mut self, random: &mut Random) {
        self.next = self.mean.map(|mean| {
            let most = (mean.as_nanos() as u64).saturating_mul(2).max(1);
            Instant::now() + Duration::from_nanos(random.below(most))
        });
    }

    fn is_now(&mut self, random: &mut Random) -> bool {
        let now = self.next.is_some_and(|at| Instant::now() >= at);
        if now {
            self.draw(random);
        }
        now
    }
}

impl<'a> Soak<'a> {
    /// Starts a store, fills it, and goes through the rounds.
    pub fn run(
        config: &'a Config,
        folder: &'a Path,
        stop: &AtomicBool,
        totals: &mut Totals,
    ) -> Result<()> {
        let mut place = Place::start(config, folder, stop)?;
        let mut client = place.connect(stop)?;
        let (table, _) = client.create_table(TABLE)?;
        let mut soak = Self {
            config,
            place,
            client,
            folder,
            random: Random(config.seed),
            keys: Keys {
                hot: config.hot_keys,
                fading: config.hot_keys * FADING_FACTOR,
                fill: 0,
                table,
            },
            clock: Clock::default(),
            scan: Scan::default(),
            held: HashMap::new(),
            carried: Vec::new(),
            next_client: SUPERVISOR + 1,
            figures: Figures::default(),
        };
        let outcome = soak.fill(stop).and_then(|()| soak.rounds(stop, totals));
        drop(soak.client);
        match outcome {
            Ok(()) => soak.place.end(),
            // That the store is lost says less than why it ended.
            Err(e) => soak.place.check_soon().and(Err(e)),
        }
    }

    /// Writes objects until as much of the store is live as is wanted.
    fn fill(&mut self, stop: &AtomicBool) -> Result<()> {
        loop {
            self.figures = Figures::of(&mut self.client)?;
            let wanted = self.config.utilisation;
            if self.figures.utilisation() >= wanted || stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let spots: Vec<_> = (0..FILL_BATCH)
                .map(|n| Keys::fill(self.keys.fill + n))
                .collect();
            let values: Vec<_> = spots
                .iter()
                .map(|_| {
                    let len = 9 + self.random.below(FILL_BYTES - 9);
                    vec![self.random.next() as u8; len as usize]
                })
                .collect();
            let elements: Vec<_> = spots
                .iter()
                .zip(&values)
                .map(|(spot, value)| Element {
                    value,
                    ..Element::new(spot.table, &spot.key)
                })
                .collect();
            let written = self.client.multi(MultiOp::Write, &elements)?;
            for result in written {
                match result {
                    Ok(_) => {}
                    Err(e) if e.status() == Some(Status::Full) => bail!(
                        "the store is full at {:.0}%: ask for less with --utilisation",
                        100.0 * self.figures.utilisation()
                    ),
                    Err(e) => return Err(anyhow::Error::from(e).context("cannot fill the store")),
                }
            }
            self.keys.fill += FILL_BATCH;
        }
    }

    fn rounds(&mut self, stop: &AtomicBool, totals: &mut Totals) -> Result<()> {
        let begin = Instant::now();
        let first = self.figures;
        let mut end = self.config.time;
        let longest = end * if self.config.until_all { LONGER } else { 1 };
        while begin.elapsed() < longest && !stop.load(Ordering::Relaxed) {
            if begin.elapsed() >= end {
                if totals.missing().is_empty() {
                    break;
                }
                end += self.config.round;
            }
            let left = end.saturating_sub(begin.elapsed());
            // A last round too short to tell anything is added to the one before.
            let time = if left < self.config.round * 3 / 2 {
                left
            } else {
                self.config.round
            };
            let before = (*totals, self.figures);
            let keys = self.round(time, stop, totals)?;
            totals.scans = self.scan.whole;
            totals.server = self.figures.since(&first);
            let (figures, seconds) = (
                self.figures.since(&before.1),
                totals.seconds - before.0.seconds,
            );
            let new = |f: fn(&Totals) -> u64| f(totals) - f(&before.0);
            println!(
                "{}  {} operations ({:.0}/s), {} unanswered; {} killed, {} stopped, {} connections made anew; {:.0}% live, cleaner {}/s; {keys} keys linearizable",
                duration(begin.elapsed()),
                new(|t| t.operations),
                new(|t| t.operations) as f64 / seconds,
                new(|t| t.unanswered),
                new(|t| t.killed),
                new(|t| t.stopped),
                new(|t| t.counts.reconnects),
                100.0 * self.figures.utilisation(),
                values::bytes((figures.cleaned_bytes as f64 / seconds) as u64),
            );
        }
        Ok(())
    }

    /// Lets clients work for a while, and checks what they were told. Returns how many keys that was about.
    fn round(&mut self, time: Duration, stop: &AtomicBool, totals: &mut Totals) -> Result<usize> {
        let folder = round_folder(self.folder, totals.rounds)?;
        let own = folder.join("supervisor.hyvh");
        let named = || format!("cannot write {}", own.display());
        let slack = self.look_at_clock()?;
        let file = fs::File::create_new(&own).with_context(named)?;
        let mut recorder = Recorder::new(file, SUPERVISOR, slack);
        for (key, initial) in &self.held {
            recorder.initial(key, initial);
        }
        for (key, operation) in &self.carried {
            recorder.invoke(monotonic_ns(), key, operation);
        }

        let begin = Instant::now();
        let dir = self.place.dir().to_owned();
        let mut workers = Workers::new(Common {
            config: self.config,
            folder: &folder,
            dir: &dir,
            until: monotonic_ns() + time.as_nanos() as u64,
            keys: self.keys,
            clock: self.clock,
            clock_slack: slack,
        });
        self.work(&mut workers, begin, time, stop)?;
        for spot in self.keys.read_back() {
            let id = recorder.invoke(monotonic_ns(), &spot.recorded(), &Operation::READ);
            let outcome = match self.client.read(spot.table, &spot.key)? {
                Some(object) => Outcome::Found {
                    value: Value::of(&object.value),
                    version: object.version,
                },
                None => Outcome::Absent,
            };
            recorder.respond(monotonic_ns(), id, &outcome);
        }
        recorder.finish().with_context(named)?;
        self.figures = Figures::of(&mut self.client)?;

        totals.seconds += begin.elapsed().as_secs_f64();
        totals.killed += workers.killed;
        totals.stopped += workers.stopped;
        totals.counts.add(&workers.counts()?);
        let mut history = History::new();
        history.read_file(&own)?;
        for file in &workers.files {
            // One that was killed before it recorded anything did nothing.
            if fs::metadata(file).is_ok_and(|m| m.len() > 0) {
                history.read_file(file)?;
            }
        }
        let report = check(&history);
        totals.rounds += 1;
        totals.operations += report.operations as u64;
        totals.unanswered += (report.unanswered - self.carried.len()) as u64;
        if !report.failures.is_empty() {
            for failure in &report.failures {
                eprintln!("error: {failure}");
            }
            return Err(match report.wrong_and_undecided() {
                (0, undecided) => anyhow!(
                    "undecided: the histories of {undecided} keys took too much to judge; the store was not found to be wrong"
                ),
                _ => anyhow!("the store is not linearizable"),
            });
        }
        self.remember(&history);
        if self.config.histories.is_none() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        Ok(report.keys)
    }

    /// Looks at the store's clock, and puts what is known of times before on the new footing. Returns how far they may be off.
    fn look_at_clock(&mut self) -> Result<Nanos> {
        let before = self.clock;
        let clock = Clock::look(&mut self.client).context("cannot ask for the store's time")?;
        self.clock = clock;
        for initial in self.held.values_mut() {
            if let Initial::Present { expires, .. } = initial {
                *expires = clock.again(&before, *expires);
            }
        }
        for (_, operation) in &mut self.carried {
            if let Operation::Write { expires, .. } = operation {
                *expires = clock.again(&before, *expires);
            }
        }
        Ok(CLOCK_SLACK_NS + before.doubt + clock.doubt)
    }

    /// Keeps clients running, stops and kills some, and enumerates beside them.
    fn work(
        &mut self,
        workers: &mut Workers<'_>,
        begin: Instant,
        time: Duration,
        stop: &AtomicBool,
    ) -> Result<()> {
        let mut kill = Due::new(self.config.kill_every, &mut self.random);
        let mut pause = Due::new(self.config.stop_every, &mut self.random);
        loop {
            self.place.check()?;
            let left = time.saturating_sub(begin.elapsed());
            if left.is_zero() || stop.load(Ordering::Relaxed) {
                break;
            }
            workers.reap(left > SHORTEST_LIFE)?;
            if left > SHORTEST_LIFE {
                while workers.len() < self.config.clients as usize {
                    workers.start(self.next_client)?;
                    self.next_client += 1;
                }
            }
            if kill.is_now(&mut self.random) {
                workers.kill(&mut self.random)?;
            }
            if pause.is_now(&mut self.random) {
                workers.stop(&mut self.random);
            }
            workers.go_on(false);
            self.scan.step(&mut self.client, self.keys.fill)?;
            std::thread::sleep(LOOK);
        }
        workers.go_on(true);
        if stop.load(Ordering::Relaxed) {
            workers.ask_to_end();
        }
        let deadline = Instant::now() + ENDING;
        while let Some(client) = workers.any() {
            self.place.check()?;
            workers.reap(false)?;
            if Instant::now() > deadline {
                bail!(
                    "client {client} did not end within {ENDING:?} after its time: it waits for the store"
                );
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// What the next round begins with.
    fn remember(&mut self, history: &History) {
        self.carried.clear();
        let mut held = HashMap::new();
        for spot in self.keys.read_back() {
            let key = spot.recorded();
            let Some(seen) = history.get(&key) else {
                continue;
            };
            let before = self.held.get(&key);
            held.insert(key.clone(), now_held(seen, before));
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

/// What a key holds after a round in which this was seen of it.
fn now_held(seen: &KeyHistory, before: Option<&Initial>) -> Initial {
    let own = |op: &&kvstore_check::Op| op.client == SUPERVISOR && op.outcome.is_some();
    let last = seen.ops.iter().filter(own).max_by_key(|op| op.returned);
    match last.and_then(|op| op.outcome) {
        Some(Outcome::Found { value, version }) => Initial::Present {
            value,
            version,
            expires: expiry_of(seen, before, value, version),
        },
        _ => {
            let told = seen.ops.iter().filter_map(|op| op.outcome.as_ref());
            let versions = told.map(Outcome::version);
            Initial::AbsentAbove(versions.chain(before.map(last_version)).max().unwrap_or(0))
        }
    }
}

const fn last_version(initial: &Initial) -> Version {
    match *initial {
        Initial::AbsentAbove(version) | Initial::Present { version, .. } => version,
        Initial::Fresh | Initial::Unknown => 0,
    }
}

/// When the object with this value and version expires: what was said when it was written. Only values of one write have an expiry; numbers
/// stay.
fn expiry_of(seen: &KeyHistory, before: Option<&Initial>, found: Value, version: Version) -> Nanos {
    if let Some(Initial::Present {
        version: held,
        expires,
        ..
    }) = before
        && *held == version
    {
        return *expires;
    }
    let written = seen.ops.iter().find_map(|op| match op.operation {
        Operation::Write { value, expires, .. } if value == found => Some(expires),
        _ => None,
    });
    written.unwrap_or(NEVER)
}
