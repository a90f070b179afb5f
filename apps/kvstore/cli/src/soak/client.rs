//! One client of a soak, a process that may be killed at any instruction.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kvstore_check::Initial;
use kvstore_check::op::Nanos;
use kvstore_check::recorder::{Recorder, monotonic_ns};

use super::store::{self, Store, StoreFault};
use super::workload::{Keys, Workload};

/// Pause before connecting again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

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
    /// How far the store's clock may be off when objects expire.
    pub clock_slack: Nanos,
}

/// Works until its time is over or `stop` is raised, and ends the history.
///
/// # Errors
/// When the history cannot be written, nobody serves any more, or the server did what it may not.
pub fn run(orders: &Orders, stop: &AtomicBool) -> Result<()> {
    let named = || format!("cannot write {}", orders.history.display());
    let file = File::create_new(&orders.history).with_context(named)?;
    let mut recorder = Recorder::new(file, orders.client, orders.clock_slack);
    recorder.flush().with_context(named)?;
    let over = || stop.load(Ordering::Relaxed) || monotonic_ns() >= orders.until;
    let mut workload = None;
    let mut fill_seen = std::collections::HashSet::new();
    let mut store: Option<Box<dyn Store>> = None;
    while !over() {
        let store_now = match &mut store {
            Some(store) => store,
            none => match connect(&orders.dir, orders) {
                Ok(connected) => none.insert(connected),
                Err(_) if over() => break,
                Err(e) => return Err(e),
            },
        };
        let abilities = store_now.abilities();
        let workload = workload.get_or_insert_with(|| {
            Workload::new(orders.seed, orders.client, orders.keys, abilities)
        });
        let step = workload.next(monotonic_ns());
        if Keys::is_fill(&step.key) && fill_seen.insert(step.key.clone()) {
            recorder.initial(&step.key, &Initial::Unknown);
        }
        let operation = step.request.operation(step.rules);
        let id = recorder.invoke(monotonic_ns(), &step.key, &operation);
        // Whoever kills this process after the request was sent finds it here.
        recorder.flush().with_context(named)?;
        match store_now.execute(&step.key, &step.request, &step.rules) {
            Ok(outcome) => {
                recorder.respond(monotonic_ns(), id, &outcome);
                workload.told(&step.key, &outcome);
            }
            Err(StoreFault::Lost(_)) => {
                recorder.lost(id);
                store = None;
                std::thread::sleep(RECONNECT_PAUSE);
            }
            Err(StoreFault::Wrong(e)) => {
                recorder.flush().with_context(named)?;
                return Err(e.context(format!(
                    "client {}: {operation} on {}",
                    orders.client,
                    String::from_utf8_lossy(&step.key)
                )));
            }
        }
    }
    recorder.finish().with_context(named)?;
    Ok(())
}

fn connect(dir: &Path, orders: &Orders) -> Result<Box<dyn Store>> {
    store::connect(dir, orders.port, &format!("soak-{}", orders.client))
        .with_context(|| format!("client {} cannot connect", orders.client))
}
