//! Bare sockets against carriers over the same path, in alternating slices of one run: `carrier_floor [MTU [SECONDS]]`.
//!
//! Makes two network namespaces joined by a veth pair, so it needs root and the `ip` program.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use hyv_carrier::Choice;
use hyv_carrier::floor::{End, Pair};
use hyv_carrier::veth::Veth;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const ROUNDS: usize = 2_000;
const SLICE: Duration = Duration::from_millis(50);
const SIZE: usize = 64;

/// Two hosts, each on a CPU of its own where there are two.
fn hosts(mtu: usize) -> Outcome<(Veth, End, End)> {
    let veth = Veth::new(mtu)?;
    let cpus = std::thread::available_parallelism()?.get();
    let [mut a, mut b] = veth.ends();
    if cpus > 1 {
        (a.cpu, b.cpu) = (Some(0), Some(1));
    }
    Ok((veth, a, b))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn measure(mtu: usize, how_long: Duration) -> Outcome<()> {
    let (_veth, a, b) = hosts(mtu)?;
    let segment = mtu - 28;
    println!(
        "MTU {mtu}; {SIZE} B round trips in us, {segment} B packets one way in GB/s; medians of slices\n"
    );
    println!(
        "| carrier | bare p50 | p99 | carrier p50 | p99 | ratio | bare GB/s | carrier GB/s | ratio |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for choice in [Choice::Udp, Choice::Packet] {
        let mut bare = match choice {
            Choice::Udp => Pair::udp(&a, &b, false)?,
            _ => Pair::packet(&a, &b)?,
        };
        let mut wide = match choice {
            Choice::Udp => Pair::udp(&a, &b, true)?,
            _ => Pair::packet(&a, &b)?,
        };
        let mut carriers = Pair::carriers(choice, &a, &b)?;
        for pair in [&mut bare, &mut carriers] {
            pair.pingpong(SIZE, ROUNDS)?;
        }
        let (mut trips, mut rates) = (Vec::new(), Vec::new());
        let end = Instant::now() + how_long;
        while Instant::now() < end || trips.len() < 3 {
            let one = bare.pingpong(SIZE, ROUNDS)?;
            let other = carriers.pingpong(SIZE, ROUNDS)?;
            trips.push([
                one.quantile(0.5),
                one.quantile(0.99),
                other.quantile(0.5),
                other.quantile(0.99),
            ]);
            rates.push((
                wide.one_way(segment, SLICE)?.gb_per_s(),
                carriers.one_way(segment, SLICE)?.gb_per_s(),
            ));
        }
        let us =
            |column: usize| median(trips.iter().map(|trip| trip[column] as f64 / 1e3).collect());
        let slower = median(
            trips
                .iter()
                .map(|trip| trip[2] as f64 / trip[0] as f64)
                .collect(),
        );
        let name = if choice == Choice::Udp {
            "udp"
        } else {
            "packet"
        };
        println!(
            "| {name} | {:.1} | {:.1} | {:.1} | {:.1} | {slower:.2} | {:.2} | {:.2} | {:.2} |",
            us(0),
            us(1),
            us(2),
            us(3),
            median(rates.iter().map(|rate| rate.0).collect()),
            median(rates.iter().map(|rate| rate.1).collect()),
            median(rates.iter().map(|rate| rate.1 / rate.0).collect()),
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, otherwise: u64| match arguments.get(index) {
        None => Some(otherwise),
        Some(text) => text.parse().ok(),
    };
    let (Some(mtu @ 576..=65_535), Some(seconds), true) =
        (number(0, 1_500), number(1, 5), arguments.len() <= 2)
    else {
        eprintln!("usage: carrier_floor [MTU from 576 to 65535 [SECONDS for each carrier]]");
        return ExitCode::from(2);
    };
    match measure(mtu as usize, Duration::from_secs(seconds)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("carrier_floor: {error}");
            ExitCode::FAILURE
        }
    }
}
