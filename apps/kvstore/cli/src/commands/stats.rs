//! `kv stats`: what the server says of itself and of each table.

use std::process::ExitCode;

use anyhow::Result;
use kvstore::client::{ServiceTimes, Table};
use serde_json::{Map, Value, json};

use super::client::Where;
use hyv_lab::values;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    place: Where,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let mut client = args.place.connect()?;
    let (stats, times) = client.stats_and_times()?;
    let tables = client.tables()?;
    if args.json {
        let mut map: Map<String, Value> = stats
            .fields()
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        let times = times
            .iter()
            .map(|t| (t.class.name().to_owned(), of_class(t)));
        map.insert("service_ns".to_owned(), Value::Object(times.collect()));
        map.insert("by_table".to_owned(), tables.iter().map(of_table).collect());
        println!("{}", Value::from(map));
        return Ok(ExitCode::SUCCESS);
    }
    for (name, value) in stats.fields() {
        let human = if name.ends_with("_bytes") {
            format!("  ({})", values::bytes(value))
        } else {
            String::new()
        };
        println!("{name:<22} {value}{human}");
    }
    println!("\nservice times, ns     p50      p90      p99    p99.9  samples");
    for t in &times {
        let [p50, p90, p99, p999] = t.quantiles;
        println!(
            "{:<14} {p50:>10} {p90:>8} {p99:>8} {p999:>8} {:>8}",
            t.class.name(),
            t.samples
        );
    }
    println!(
        "\ntable                 objects   live bytes      reads     writes    removes increments"
    );
    for t in &tables {
        let ops = t.operations;
        println!(
            "{:<18} {:>10} {:>12} {:>10} {:>10} {:>10} {:>10}",
            t.name, t.objects, t.live_bytes, ops.reads, ops.writes, ops.removes, ops.increments
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn of_class(t: &ServiceTimes) -> Value {
    let [p50, p90, p99, p999] = t.quantiles;
    let buckets: Vec<Value> = t.buckets.iter().map(|b| json!([b.0, b.1])).collect();
    json!({
        "samples": t.samples, "p50": p50, "p90": p90, "p99": p99, "p999": p999, "buckets": buckets,
    })
}

fn of_table(t: &Table) -> Value {
    json!({
        "id": t.id, "name": t.name, "objects": t.objects, "live_bytes": t.live_bytes,
        "reads": t.operations.reads, "writes": t.operations.writes,
        "removes": t.operations.removes, "increments": t.operations.increments,
    })
}
