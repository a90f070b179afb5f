//! One client of a soak, a process that may be stopped, or killed, at any instruction.
//!
//! Odd clients read one-sidedly. Every fourth does without exactly-once, so that what it had under way when its connection was lost
//! stays unanswered in the history. All cut their own connection now and then, with requests under way.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use kvstore::client::{Client, ClientError, Ticket};
use kvstore::proto::{Reply, Results};
use kvstore_check::Initial;
use kvstore_check::op::{Nanos, Outcome};
use kvstore_check::recorder::{OpId, Recorder, monotonic_ns};

use super::counts::Counts;
use super::limits::MAX_IN_FLIGHT;
use super::store::{self, Answer, Clock};
use super::workload::{Keys, Random, Step, Turn, Workload};

/// Longest wait between a request and a cut, ns: longer than an answer takes, so that what is lost may be the request or the reply.
const LONGEST_WAIT_NS: u64 = 400_000;

/// What a client is told.
#[derive(Clone, Debug)]
pub struct Orders {
    /// Folder of the instance.
    pub dir: PathBuf,
    /// Port of the store.
    pub port: u16,
    /// Its number in the history.
    pub client: u32,
    /// Where to record.
    pub history: PathBuf,
    /// Seed of the run.
    pub seed: u64,
    /// When to end, `CLOCK_MONOTONIC`.
    pub until: Nanos,
    /// The keys.
    pub keys: Keys,
    /// The store's clock.
    pub clock: Clock,
    /// How far it may be off.
    pub clock_slack: Nanos,
    /// Most requests under way.
    pub in_flight: usize,
    /// Mean time between two cuts; none: never.
    pub cut_every: Option<Duration>,
}

/// Where a client with this history counts.
#[must_use]
pub fn counts_file(history: &Path) -> PathBuf {
    history.with_extension("counts")
}

/// Works until its time is over or `stop` is raised, and ends the history.
///
/// # Errors
/// When the history cannot be written, nobody serves any more, or the server did what it may not.
pub fn run(orders: &Orders, stop: &AtomicBool) -> Result<()> {
    let log = Log::create(orders)?;
    let over = || stop.load(Ordering::Relaxed) || monotonic_ns() >= orders.until;
    let name = format!("soak-{}", orders.client);
    let client = match store::connect(&orders.dir, orders.port, &name, orders.client % 4 != 2) {
        Ok(client) => client,
        Err(_) if over() => return log.finish(),
        Err(e) => return Err(e.context(format!("client {} cannot connect", orders.client))),
    };
    let mut random = Random(orders.seed ^ u64::from(orders.client));
    let mut worker = Worker {
        orders,
        log,
        client,
        one_sided: orders.client % 2 == 1,
        in_flight: 1 + random.below(orders.in_flight as u64) as usize,
        workload: Workload::new(orders.seed, orders.client, orders.keys),
        random,
        waiting: VecDeque::new(),
        flights: [const { None }; MAX_IN_FLIGHT],
    };
    worker.work(over)?;
    worker.count();
    worker.log.finish()
}

/// The history, and the counts beside it.
struct Log {
    recorder: Recorder<File>,
    named: PathBuf,
    counts: Counts,
    counts_file: File,
    fill_seen: HashSet<u64>,
}

impl Log {
    fn create(orders: &Orders) -> Result<Self> {
        let named = |path: &Path| format!("cannot write {}", path.display());
        let counts = counts_file(&orders.history);
        let counts_file = File::create_new(&counts).with_context(|| named(&counts))?;
        let file = File::create_new(&orders.history).with_context(|| named(&orders.history))?;
        let mut this = Self {
            recorder: Recorder::new(file, orders.client, orders.clock_slack),
            named: orders.history.clone(),
            counts: Counts::default(),
            counts_file,
            fill_seen: HashSet::new(),
        };
        this.flush()?;
        Ok(this)
    }

    /// Records that a turn is about to be asked for.
    fn asked(&mut self, turn: Turn) -> Flight {
        let ids = turn.steps.iter().map(|step| self.asked_one(step)).collect();
        Flight { turn, ids }
    }

    fn asked_one(&mut self, step: &Step) -> OpId {
        let key = step.spot.recorded();
        if let Some(n) = Keys::fill_number(&step.spot.key)
            && self.fill_seen.insert(n)
        {
            self.recorder.initial(&key, &Initial::Unknown);
        }
        let operation = step.request.operation(step.rules);
        self.recorder.invoke(monotonic_ns(), &key, &operation)
    }

    /// Records an answer; gives the outcome if the workload may learn from it.
    fn answered(&mut self, id: OpId, answer: Answer) -> Result<Option<Outcome>, ClientError> {
        let outcome = match answer {
            Answer::Outcome(outcome) => outcome,
            Answer::Busy => {
                self.counts.busy += 1;
                Outcome::Refused
            }
            Answer::Full => {
                self.counts.full += 1;
                Outcome::Refused
            }
            Answer::Unknown => {
                self.counts.unknown += 1;
                self.recorder.lost(id);
                return Ok(None);
            }
            Answer::Wrong(e) => {
                self.recorder.lost(id);
                return Err(e);
            }
        };
        if let Outcome::Rejected { .. } = outcome {
            self.counts.rejected += 1;
        }
        self.recorder.respond(monotonic_ns(), id, &outcome);
        Ok(Some(outcome))
    }

    fn flush(&mut self) -> Result<()> {
        self.recorder
            .flush()
            .and_then(|()| self.counts.save(&self.counts_file))
            .with_context(|| format!("cannot write {}", self.named.display()))
    }

    fn finish(mut self) -> Result<()> {
        self.flush()?;
        let named = self.named;
        self.recorder
            .finish()
            .with_context(|| format!("cannot write {}", named.display()))?;
        Ok(())
    }
}

/// A request that was recorded.
struct Flight {
    turn: Turn,
    ids: Vec<OpId>,
}

struct Worker<'a> {
    orders: &'a Orders,
    log: Log,
    client: Client,
    one_sided: bool,
    in_flight: usize,
    workload: Workload,
    random: Random,
    /// Recorded, and not submitted yet.
    waiting: VecDeque<Flight>,
    /// Submitted, by ticket.
    flights: [Option<Flight>; MAX_IN_FLIGHT],
}

impl Worker<'_> {
    fn work(&mut self, over: impl Fn() -> bool) -> Result<()> {
        let mut next_cut = self.next_cut();
        loop {
            if !over() {
                let room = self.in_flight.saturating_sub(self.client.outstanding());
                while self.waiting.len() < room {
                    let turn = self.workload.next(monotonic_ns());
                    let flight = self.log.asked(turn);
                    self.waiting.push_back(flight);
                }
            } else if self.waiting.is_empty() && self.client.outstanding() == 0 {
                return Ok(());
            }
            self.count();
            // Whoever kills this process after a request was sent finds it in the history.
            self.log.flush()?;
            self.submit()?;
            if next_cut.is_some_and(|at| Instant::now() >= at) && self.client.outstanding() > 0 {
                let wait = Duration::from_nanos(self.random.skewed(LONGEST_WAIT_NS));
                let begin = Instant::now();
                while begin.elapsed() < wait {
                    std::hint::spin_loop();
                }
                self.client.reconnect();
                self.log.counts.cuts += 1;
                next_cut = self.next_cut();
            }
            self.take()?;
        }
    }

    /// From nothing to twice the mean.
    fn next_cut(&mut self) -> Option<Instant> {
        let mean = self.orders.cut_every?.as_nanos() as u64;
        let pause = self.random.below(mean.saturating_mul(2).max(1));
        Some(Instant::now() + Duration::from_nanos(pause))
    }

    fn submit(&mut self) -> Result<()> {
        while let Some(flight) = self.waiting.front() {
            let clock = &self.orders.clock;
            match store::submit(&mut self.client, &flight.turn, clock, self.one_sided) {
                Ok(ticket) => {
                    self.log.counts.multis += u64::from(flight.turn.multi.is_some());
                    self.flights[usize::from(ticket)] = self.waiting.pop_front();
                }
                Err(ClientError::WindowFull) if self.client.outstanding() > 0 => return Ok(()),
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(())
    }

    /// Waits for answers, and records them.
    fn take(&mut self) -> Result<()> {
        if self.client.outstanding() == 0 {
            return Ok(());
        }
        let (flights, log, workload) = (&mut self.flights, &mut self.log, &mut self.workload);
        let mut wrong = None;
        let waited = self.client.wait(|ticket, reply| {
            if let Err(e) = completed(flights, log, workload, ticket, reply) {
                wrong.get_or_insert(e);
            }
        });
        match (wrong, waited) {
            (Some(e), _) => {
                self.log.flush()?;
                Err(e)
            }
            (None, Err(e)) => Err(self.failed(e)),
            (None, Ok(_)) => Ok(()),
        }
    }

    /// The connection is lost for good.
    fn failed(&mut self, error: ClientError) -> anyhow::Error {
        let error = anyhow::Error::from(error).context(format!(
            "client {} lost the store with {} requests under way",
            self.orders.client,
            self.flights.iter().flatten().count()
        ));
        self.log.flush().err().unwrap_or(error)
    }

    fn count(&mut self) {
        let counts = &mut self.log.counts;
        let one_sided = self.client.one_sided_counters();
        counts.direct = one_sided.direct;
        counts.by_table = one_sided.by_table;
        counts.misses = one_sided.misses;
        counts.doubts = one_sided.doubts;
        counts.too_long = one_sided.too_long;
        counts.reconnects = self.client.reconnects();
        counts.repeats = self.client.repeats();
    }
}

fn completed(
    flights: &mut [Option<Flight>; MAX_IN_FLIGHT],
    log: &mut Log,
    workload: &mut Workload,
    ticket: Ticket,
    reply: Result<Reply<'_>, ClientError>,
) -> Result<()> {
    let Some(flight) = flights[usize::from(ticket)].take() else {
        bail!("the client library completed a request that was not made");
    };
    let mut told = |step: &Step, id, answer| {
        match log.answered(id, answer) {
            Ok(Some(outcome)) => workload.told(&step.spot, &outcome),
            Ok(None) => {}
            Err(e) => {
                let operation = step.request.operation(step.rules);
                let key = String::from_utf8_lossy(&step.spot.key).into_owned();
                return Err(anyhow::Error::from(e).context(format!("{operation} on {key}")));
            }
        }
        Ok(())
    };
    let all = flight.turn.steps.iter().zip(&flight.ids);
    let Some(op) = flight.turn.multi else {
        let mut reply = Some(reply);
        for ((step, &id), reply) in all.zip(reply.take()) {
            told(step, id, store::answer(&step.request, reply))?;
        }
        return Ok(());
    };
    match reply {
        Ok(Reply::Results(bytes)) => {
            let results = Results::parse(op, flight.ids.len(), bytes)?;
            for ((step, &id), result) in all.zip(results.iter()) {
                told(step, id, store::element_answer(&step.request, &result))?;
            }
            Ok(())
        }
        Ok(other) => Err(anyhow!("a multi-operation was answered with {other:?}")),
        Err(e) => {
            for (step, &id) in all {
                told(step, id, store::answer(&step.request, Err(e.clone())))?;
            }
            Ok(())
        }
    }
}
