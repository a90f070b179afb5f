//! Hosts on a virtual clock and a simulated network that loses, doubles, delays, reorders and damages packets. Each seed makes its own hosts, users,
//! connections and troubles; a model beside the engines knows what must come of them.
//!
//! `HYV_SIM_SEED=N` runs one seed, `HYV_SIM_TRACE=1` shows what happens in it, `HYV_SIM_SECONDS=N` spends so long on fresh seeds.

mod check;
#[path = "../common/mod.rs"]
mod common;
mod ends;
mod memory;
mod net;
mod plan;
mod post;
mod run;
mod trouble;
mod windows;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime};

use plan::Plan;

/// Seeds that are always run: a cross section, and those that once found something.
const ALWAYS: std::ops::Range<u64> = 0..300;
const FOUND: [u64; 1] = [
    // The duplicate of a READ, held back until its window was invalidated, ended the responder's connection.
    176_345_314_647_015,
];
/// Time for fresh seeds where `HYV_SIM_SECONDS` says nothing.
const FRESH: Duration = Duration::from_secs(3);

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let n = text.parse();
    assert!(n.is_ok(), "{name}={text} is not a number");
    n.ok()
}

fn one(seed: u64) -> run::Told {
    let trace = number("HYV_SIM_TRACE").is_some_and(|t| t != 0);
    let result = catch_unwind(AssertUnwindSafe(|| run::run(seed, Plan::new(seed), trace)));
    match result {
        Ok(told) => told,
        Err(cause) => {
            eprintln!(
                "replay: HYV_SIM_SEED={seed} cargo test -p hyv-rnic --test sim replay -- --nocapture"
            );
            std::panic::resume_unwind(cause);
        }
    }
}

#[test]
fn known_seeds() {
    let mut told = run::Told::default();
    for seed in ALWAYS.chain(FOUND) {
        told.add(&one(seed));
    }
    println!("{told:?}");
    told.must_cover();
}

#[test]
fn fresh_seeds() {
    let limit = number("HYV_SIM_SECONDS").map_or(FRESH, Duration::from_secs);
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let first = since_epoch.expect("a clock after 1970").as_nanos() as u64 & 0xffff_ffff_ffff;
    println!("seeds from {first} on");
    let (start, mut told) = (Instant::now(), run::Told::default());
    let (mut seed, mut slowest) = (first, (Duration::ZERO, first));
    while start.elapsed() < limit {
        let began = Instant::now();
        told.add(&one(seed));
        slowest = slowest.max((began.elapsed(), seed));
        seed += 1;
    }
    println!("{} seeds, the slowest {slowest:?}: {told:?}", seed - first);
}

#[test]
fn replay() {
    if let Some(seed) = number("HYV_SIM_SEED") {
        println!("{:#?}", Plan::new(seed));
        println!("{:?}", one(seed));
    }
}
