//! How long a long history takes: `cargo run --release -p kvstore-check --example million [OPERATIONS [soak]]`.
//!
//! One key, sixteen clients, one operation in a hundred without an answer, or as a soak has it, with objects that expire and clients that are
//! killed; written to memory, read back, checked.

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::time::Instant;

use common::{Config, Sim};
use kvstore_check::History;
use kvstore_check::check;
use kvstore_check::recorder::Recorder;

fn main() {
    let operations = std::env::args()
        .nth(1)
        .map_or(1_000_000, |n| n.parse().expect("a number of operations"));
    let config = match std::env::args().nth(2).as_deref() {
        None => Config {
            clients: 16,
            lost: 1,
            floats: false,
            ..Config::default()
        },
        Some("soak") => Config::soak(),
        Some(other) => panic!("no kind of history: {other}"),
    };
    let slack = config.slack;
    let mut sim = Sim::new(1, config);
    sim.run(operations);

    // In the order of invocation, as one client that has many operations under way would.
    let mut lines: Vec<(u64, bool, usize)> = Vec::new();
    for (at, op) in sim.history.ops.iter().enumerate() {
        lines.push((op.invoked, false, at));
        if op.outcome.is_some() {
            lines.push((op.returned, true, at));
        }
    }
    lines.sort_unstable();
    let mut ids = vec![None; sim.history.ops.len()];
    let begin = Instant::now();
    let mut recorder = Recorder::new(Vec::new(), 1, slack);
    for (time, returns, at) in lines {
        let op = &sim.history.ops[at];
        match (returns, ids[at], &op.outcome) {
            (true, Some(id), Some(outcome)) => recorder.respond(time, id, outcome),
            _ => ids[at] = Some(recorder.invoke(time, b"key", &op.operation)),
        }
    }
    let file = recorder.finish().expect("memory does not fail");
    println!(
        "recorded {operations} operations in {:?}, {} bytes",
        begin.elapsed(),
        file.len()
    );

    let begin = Instant::now();
    let mut history = History::new();
    history
        .read(Path::new("memory"), &file[..])
        .expect("what was just written is read");
    println!("read in {:?}", begin.elapsed());

    let begin = Instant::now();
    let report = check(&history);
    println!(
        "checked in {:?}: {} configurations, {} unanswered, {} failures",
        begin.elapsed(),
        report.visited,
        report.unanswered,
        report.failures.len()
    );
    for failure in &report.failures {
        println!("{failure}");
    }
}
