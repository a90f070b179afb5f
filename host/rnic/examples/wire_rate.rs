//! The engine over its carriers beside bare sockets over the same path, in alternating slices of one run:
//! `wire_rate [MTU [SECONDS]]`.
//!
//! Makes two network namespaces joined by a veth pair, so it needs root and the `ip` program.

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::net::{Path, join};
use common::{Cap, Side, Wr};
use hyv_abi::queue::WrOpcode;
use hyv_carrier::floor::{End, Pair};
use hyv_carrier::sys::netns;
use hyv_carrier::{Choice, Options};
use hyv_rnic::{Engine, EngineConfig};

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const ROUNDS: usize = 2_000;
const SLICE: Duration = Duration::from_millis(50);
const SIZE: u32 = 64;
const LARGE: u32 = 1 << 20;

/// Namespaces that go when this does.
struct Namespaces(Vec<String>);

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(arguments: &str) -> Outcome<()> {
    let output = Command::new("ip")
        .args(arguments.split_ascii_whitespace())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!("ip {arguments}: {}", error.trim()).into())
}

fn namespaces(mtu: usize) -> Outcome<(Namespaces, [End; 2])> {
    let names: Vec<String> = ["a", "b"]
        .iter()
        .map(|end| format!("transport-{}-{end}", std::process::id()))
        .collect();
    let made = Namespaces(names.clone());
    for name in &names {
        ip(&format!("netns add {name}"))?;
    }
    let (a, b) = (&names[0], &names[1]);
    ip(&format!(
        "link add hyvt0 netns {a} type veth peer name hyvt0 netns {b}"
    ))?;
    let mut ends = Vec::new();
    let cpus = std::thread::available_parallelism()?.get();
    for (index, name) in names.iter().enumerate() {
        let addr = format!("10.75.0.{}", index + 1);
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!("-n {name} addr add {addr}/24 dev hyvt0"))?;
        ip(&format!("-n {name} link set hyvt0 mtu {mtu} up"))?;
        ends.push(End {
            addr: addr.parse()?,
            netns: Some(PathBuf::from(format!("/var/run/netns/{name}"))),
            cpu: (cpus > 1).then_some(index % cpus),
        });
    }
    let ends = ends.try_into().map_err(|_| "two ends")?;
    Ok((made, ends))
}

/// A device at an end, with one user and a QP; on a thread that is in the end's namespace and on its CPU.
fn device(end: &End, choice: Choice) -> Outcome<(Engine, Side)> {
    if let Some(path) = &end.netns {
        netns::enter(path)?;
    }
    if let Some(cpu) = end.cpu {
        netns::pin(cpu)?;
    }
    let (carrier, info) = hyv_carrier::open(choice, &end.addr, &Options::default())?;
    eprintln!("{info}");
    let start = Instant::now();
    let mut e = Engine::new(EngineConfig {
        clock: Box::new(move || start.elapsed().as_nanos() as u64),
        gid: [0; 16],
        node_guid: 1,
        carrier: Some(carrier),
        mad_bell: Box::new(|| {}),
    });
    let cap = Cap {
        sq_log2: 7,
        rq_log2: 7,
        ..Cap::default()
    };
    let side = Side::new(&mut e, 4 << 20, cap);
    Ok((e, side))
}

/// What the two threads tell each other.
#[derive(Default)]
struct Shared {
    gid: [AtomicU64; 4],
    qpn: [AtomicU64; 2],
    region: [AtomicU64; 2],
    ready: AtomicU64,
    stop: AtomicBool,
}

/// Median, 99% (ns), and GB/s.
type Figures = [f64; 3];

fn connect(e: &mut Engine, side: &Side, shared: &Shared, me: usize) -> Outcome<()> {
    let gid = e.gid(1, 0)?;
    let (high, low) = gid.split_at(8);
    let word = |b: &[u8]| u64::from_be_bytes(b.try_into().unwrap_or_default());
    shared.gid[2 * me].store(word(high), Ordering::SeqCst);
    shared.gid[2 * me + 1].store(word(low), Ordering::SeqCst);
    shared.qpn[me].store(u64::from(side.qp.qpn), Ordering::SeqCst);
    if me == 1 {
        shared.region[0].store(side.mr.iova, Ordering::SeqCst);
        shared.region[1].store(u64::from(side.mr.rkey), Ordering::SeqCst);
    }
    shared.ready.fetch_add(1, Ordering::SeqCst);
    while shared.ready.load(Ordering::SeqCst) < 2 {
        std::thread::yield_now();
    }
    let peer = 1 - me;
    let mut gid = [0; 16];
    gid[..8].copy_from_slice(&shared.gid[2 * peer].load(Ordering::SeqCst).to_be_bytes());
    gid[8..].copy_from_slice(
        &shared.gid[2 * peer + 1]
            .load(Ordering::SeqCst)
            .to_be_bytes(),
    );
    let path = Path {
        mtu: e.active_mtu(),
        ..Path::default()
    };
    let qpn = shared.qpn[peer].load(Ordering::SeqCst) as u32;
    join(e, &side.qp, (gid, qpn), &path);
    shared.ready.fetch_add(1, Ordering::SeqCst);
    while shared.ready.load(Ordering::SeqCst) < 4 {
        std::thread::yield_now();
    }
    Ok(())
}

fn echo(end: &End, choice: Choice, shared: &Shared) -> Outcome<()> {
    let (mut e, mut side) = device(end, choice)?;
    for _ in 0..64 {
        side.qp.post_recv(0, &[side.mr.sge(0, SIZE)]);
    }
    connect(&mut e, &side, shared, 1)?;
    let answer = Wr::new(WrOpcode::Send, 0)
        .inline(&[7; SIZE as usize])
        .unsignaled();
    while !shared.stop.load(Ordering::Relaxed) {
        e.poll();
        while side.rcq.poll().is_some() {
            side.qp.post_recv(0, &[side.mr.sge(0, SIZE)]);
            side.qp.post(&answer);
        }
    }
    Ok(())
}

fn slice(e: &mut Engine, side: &mut Side, shared: &Shared) -> Outcome<Figures> {
    let ask = Wr::new(WrOpcode::Send, 0)
        .inline(&[7; SIZE as usize])
        .unsignaled();
    let mut trips = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        side.qp.post_recv(0, &[side.mr.sge(0, SIZE)]);
        let start = Instant::now();
        side.qp.post(&ask);
        while side.rcq.poll().is_none() {
            e.poll();
        }
        trips.push(start.elapsed().as_nanos() as f64);
    }
    let region = &shared.region;
    let (addr, key) = (
        region[0].load(Ordering::Relaxed),
        region[1].load(Ordering::Relaxed) as u32,
    );
    let write = Wr::new(WrOpcode::Write, 1)
        .sge(side.mr.sge(0, LARGE))
        .remote(addr, key);
    let (mut posted, mut done) = (0u64, 0u64);
    let start = Instant::now();
    while start.elapsed() < SLICE || done < posted {
        while posted < done + 4 && start.elapsed() < SLICE {
            side.qp.post(&write);
            posted += 1;
        }
        e.poll();
        for c in side.scq.drain() {
            if c.status != 0 {
                return Err(format!("a WRITE ended with status {}", c.status).into());
            }
            done += 1;
        }
    }
    let rate = done as f64 * f64::from(LARGE) / start.elapsed().as_nanos() as f64;
    trips.sort_by(f64::total_cmp);
    Ok([trips[ROUNDS / 2], trips[ROUNDS * 99 / 100], rate])
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn measure(mtu: usize, how_long: Duration) -> Outcome<()> {
    let (_made, [a, b]) = namespaces(mtu)?;
    println!(
        "MTU {mtu}; {SIZE} B SEND round trip in us, {LARGE} B WRITE in GB/s; medians of slices\n"
    );
    println!("| carrier | bare p50 | engine p50 | p99 | ratio | bare GB/s | engine GB/s | ratio |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for choice in [Choice::Udp, Choice::Packet] {
        let (mut bare, mut wide) = match choice {
            Choice::Udp => (Pair::udp(&a, &b, false)?, Pair::udp(&a, &b, true)?),
            _ => (Pair::packet(&a, &b)?, Pair::packet(&a, &b)?),
        };
        let shared = Arc::new(Shared::default());
        let rows = std::thread::scope(|scope| {
            let echo = scope.spawn(|| echo(&b, choice, &shared));
            let asks = scope.spawn(|| -> Outcome<_> {
                let (mut e, mut side) = device(&a, choice)?;
                connect(&mut e, &side, &shared, 0)?;
                slice(&mut e, &mut side, &shared)?;
                let end = Instant::now() + how_long;
                let mut rows = Vec::new();
                while Instant::now() < end || rows.len() < 3 {
                    let trips = bare.pingpong(SIZE as usize, ROUNDS)?;
                    let one_way = wide.one_way(mtu - 28, SLICE)?.gb_per_s();
                    let [p50, p99, rate] = slice(&mut e, &mut side, &shared)?;
                    rows.push([trips.quantile(0.5) as f64, p50, p99, one_way, rate]);
                }
                eprintln!("{:?}", e.device_counters());
                Ok(rows)
            });
            let rows = asks.join().expect("measures");
            shared.stop.store(true, Ordering::SeqCst);
            let echoed = echo.join().expect("echoes");
            echoed.and(rows)
        })?;
        let us = |i: usize| median(rows.iter().map(|r| r[i] / 1e3));
        println!(
            "| {choice:?} | {:.1} | {:.1} | {:.1} | {:.2} | {:.2} | {:.2} | {:.2} |",
            us(0),
            us(1),
            us(2),
            median(rows.iter().map(|r| r[1] / r[0])),
            median(rows.iter().map(|r| r[3])),
            median(rows.iter().map(|r| r[4])),
            median(rows.iter().map(|r| r[4] / r[3])),
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
        eprintln!("usage: wire_rate [MTU from 576 to 65535 [SECONDS for each carrier]]");
        return ExitCode::from(2);
    };
    match measure(mtu as usize, Duration::from_secs(seconds)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wire_rate: {error}");
            ExitCode::FAILURE
        }
    }
}
