//! `perf --wire`: what it reports over both carriers, what it refuses, and that it leaves no network behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use hyv_e2e::linux::{Net, Skip};
use hyv_e2e::{PATIENCE, Run, Sandbox, eventually, on_each_accelerator, or_skip, programs};
use rustix::process::Signal;
use serde_json::Value;

const WHAT: &str = "perf between two hosts in namespaces";

/// Ends the test where there are no namespaces, or one CPU.
fn possible() -> Result<(), Skip> {
    drop(Net::new(1500)?);
    match std::thread::available_parallelism().map_or(1, usize::from) {
        1 => Err(Skip::Network("one CPU".into())),
        _ => Ok(()),
    }
}

fn perf(sandbox: &Sandbox, words: &[&str]) -> Command {
    let mut command = sandbox.command(programs::tools());
    command
        .env("HYV_TOOLS_IMAGE", programs::tools_image())
        .arg("perf")
        .args(words);
    command
}

fn report(run: &Run) -> Value {
    serde_json::from_slice(&run.out).unwrap_or_else(|e| panic!("{e}: {}", run.story()))
}

fn positive(report: &Value, pointer: &str) -> f64 {
    let value = report.pointer(pointer).and_then(Value::as_f64);
    match value {
        Some(v) if v > 0.0 => v,
        _ => panic!("{pointer} is {value:?} in {report:#}"),
    }
}

fn check(report: &Value, carrier: &str, places: &[&str], cases: &[(&str, u64)]) {
    let mode = report["mode"].as_str().unwrap_or_default();
    assert!(mode.starts_with(&format!("wire, {carrier}, ")), "{mode}");
    assert_eq!(report["carrier"], carrier);
    for floor in ["cache_line_rtt_ns", "udp_rtt_ns", "packet_rtt_ns"] {
        positive(report, &format!("/floor/{floor}"));
    }
    let lines = report["results"].as_array().expect("a list");
    assert_eq!(lines.len(), places.len() * cases.len(), "{report:#}");
    for (i, line) in lines.iter().enumerate() {
        let (verb, size) = cases[i / places.len()];
        assert_eq!(line["verb"], verb);
        assert_eq!(line["size"], size);
        assert_eq!(line["where"], places[i % places.len()]);
        let at = |field| positive(report, &format!("/results/{i}/{field}"));
        assert!(at("min_ns") <= at("p50_ns"), "{line:#}");
        assert!(at("p50_ns") <= at("p99_ns"), "{line:#}");
        assert!(at("p99_ns") <= at("p999_ns"), "{line:#}");
        at("iterations");
        at("floors");
    }
}

fn latency_over(carrier: &str) {
    or_skip!(possible(), WHAT);
    let sandbox = Sandbox::new();
    let words = "lat all --sizes 64,5000 --wire --where native --time 1ms --json - --carrier";
    let mut words: Vec<&str> = words.split(' ').collect();
    words.push(carrier);
    let report = report(&sandbox.run(perf(&sandbox, &words)).ok());
    let mut cases = Vec::new();
    for verb in ["send", "write", "read"] {
        cases.extend([(verb, 64), (verb, 5000)]);
    }
    cases.extend([("fetch-add", 8), ("cmp-swp", 8)]);
    check(&report, carrier, &["native"], &cases);
    assert_eq!(report["path_mtu"], 1024);
    assert_eq!(
        report["mode"],
        format!("wire, {carrier}, inline on both hosts")
    );
    // A wire cannot be faster than the caches beneath it.
    assert!(positive(&report, "/results/0/min_ns") > positive(&report, "/floor/cache_line_rtt_ns"));
    sandbox.assert_clean();
}

fn bandwidth_over(carrier: &str) {
    or_skip!(possible(), WHAT);
    let sandbox = Sandbox::new();
    let words =
        "bw write --sizes 64K --wire --where native --time 1ms --json - --mtu 4300 --carrier";
    let mut words: Vec<&str> = words.split(' ').collect();
    words.push(carrier);
    let report = report(&sandbox.run(perf(&sandbox, &words)).ok());
    check(&report, carrier, &["native"], &[("write", 65536)]);
    assert_eq!(report["path_mtu"], 4096);
    positive(&report, "/floor/bandwidth");
    positive(&report, "/results/0/bytes_per_s");
    positive(&report, "/results/0/of_bare");
    assert_eq!(report["results"][0].get("of_memcpy"), None);
    sandbox.assert_clean();
}

#[test]
fn latency_by_packet_sockets() {
    latency_over("packet");
}

#[test]
fn latency_by_udp_sockets() {
    latency_over("udp");
}

#[test]
fn bandwidth_by_packet_sockets() {
    bandwidth_over("packet");
}

#[test]
fn bandwidth_by_udp_sockets() {
    bandwidth_over("udp");
}

on_each_accelerator! {
    fn guest_beside_native(accelerator) {
        or_skip!(possible(), WHAT);
        let sandbox = Sandbox::new();
        let words = "lat send write --sizes 64 --wire --time 1ms --json - --accel";
        let mut words: Vec<&str> = words.split(' ').collect();
        words.push(accelerator.name());
        let report = report(&sandbox.run(perf(&sandbox, &words)).ok());
        // Packet sockets are what `auto` takes where namespaces can be made.
        check(&report, "packet", &["guest", "native"], &[("send", 64), ("write", 64)]);
        assert_eq!(report["accel"], accelerator.name());
        for ratio in report["ratios"].as_array().expect("a list") {
            assert!(ratio["low"].as_f64() <= ratio["high"].as_f64(), "{ratio:#}");
        }
        sandbox.assert_clean();
    }
}

/// Network namespaces that a process's threads are in, as the kernel names them.
fn namespaces(pid: u32) -> BTreeSet<PathBuf> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    threads
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|t| fs::read_link(t.path().join("ns/net")).ok())
        .collect()
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok())
}

/// Whether anything holds one of these namespaces: a thread in it, or a descriptor.
fn held(which: &BTreeSet<PathBuf>) -> bool {
    processes().any(|pid| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
        let mut descriptors = descriptors.into_iter().flatten().flatten();
        !namespaces(pid).is_disjoint(which)
            || descriptors.any(|d| fs::read_link(d.path()).is_ok_and(|l| which.contains(&l)))
    })
}

fn leaves_nothing(signal: Signal) {
    or_skip!(possible(), WHAT);
    let sandbox = Sandbox::new();
    let words = "lat send --sizes 64 --wire --where native --time 10m";
    let words: Vec<&str> = words.split(' ').collect();
    let mut running = sandbox.spawn(perf(&sandbox, &words));
    running.until(PATIENCE, |err| err.contains("typical").then_some(()));
    let mut made = namespaces(running.pid());
    made.retain(|n| !namespaces(std::process::id()).contains(n));
    assert_eq!(made.len(), 2, "{made:?}");
    assert!(held(&made));
    // In the middle of a slice as well as between two.
    std::thread::sleep(Duration::from_millis(50));
    if signal == Signal::KILL {
        running.kill();
        sandbox.assert_no_process();
    } else {
        running.signal(signal);
        let run = running.wait(PATIENCE).code(1);
        assert!(run.err.contains("interrupted"), "{}", run.story());
        sandbox.assert_clean();
    }
    eventually("nobody holds the namespaces", || !held(&made));
}

#[test]
fn an_interrupt_leaves_nothing() {
    leaves_nothing(Signal::INT);
}

#[test]
fn a_kill_leaves_no_network() {
    leaves_nothing(Signal::KILL);
}

#[test]
fn what_perf_refuses() {
    let sandbox = Sandbox::new();
    for (words, wrong) in [
        ("lat --carrier udp", "--wire"),
        ("lat --mtu 1500", "--wire"),
        ("lat --wire --carrier smoke", "smoke"),
        ("lat --wire --mtu 100", "576"),
        ("lat --wire --mtu 65536", "65535"),
        ("lat --wire --where native --pin 0", "two CPUs"),
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        sandbox.run(perf(&sandbox, &words)).fails(&[wrong]);
    }
    sandbox.assert_clean();
}

/// Without the right to make namespaces the message says who has it.
#[test]
fn without_the_right_to_make_networks() {
    or_skip!(possible(), WHAT);
    let sandbox = Sandbox::new();
    if Command::new("setpriv").arg("--version").output().is_err() {
        eprintln!("skipped: `setpriv` (util-linux) is missing");
        return;
    }
    let inner = perf(&sandbox, &["lat", "--wire", "--where", "native"]);
    let mut command = sandbox.command("setpriv");
    command
        .arg("--bounding-set=-sys_admin")
        .arg(inner.get_program())
        .args(inner.get_args());
    sandbox
        .run(command)
        .fails(&["error: --wire", "run as root", "CAP_SYS_ADMIN"]);
    sandbox.assert_clean();
}
