//! A short soak: clients that fight, lose their connections, are stopped and killed, a full store, and a check of all that they were told.

use std::fs;

use hyv_e2e::{Accelerator, Sandbox, eventually};
use rustix::process::{Pid, Signal, kill_process};

const SHORT: [&str; 14] = [
    "soak",
    "--for",
    "5s",
    "--until-all",
    "--check-every",
    "2500ms",
    "--kill-every",
    "400ms",
    "--stop-every",
    "200ms",
    "--cut-every",
    "200ms",
    "--clients",
    "4",
];

/// Runs a short one, in which each kind of operation, answer and fault must have happened.
fn short(more: &[&str]) {
    let sandbox = Sandbox::new();
    let report = sandbox.file("report.json");
    let mut words: Vec<&str> = SHORT.to_vec();
    words.extend_from_slice(more);
    words.extend(["--json", "report.json"]);
    let soak = sandbox.kv(words).ok().text();
    assert!(soak.trim_end().ends_with("nothing wrong"), "{soak}");
    let report = fs::read(report).expect("the report is written");
    let report: serde_json::Value = serde_json::from_slice(&report).expect("it is JSON");
    assert_eq!(report["verdict"], "nothing wrong");
    for count in [
        "operations",
        "unanswered",
        "killed",
        "stopped",
        "scans",
        "expired",
        "duplicates",
        "cleaned_bytes",
        "multis",
        "rejected",
        "cuts",
        "reconnects",
        "repeats",
        "unknown",
        "direct",
        "by_table",
        "misses",
        "doubts",
    ] {
        assert!(
            report[count].as_u64() > Some(0),
            "{count} never happened: {soak}"
        );
    }
    sandbox.assert_clean();
}

#[test]
fn a_short_one_under_kvm() {
    Accelerator::Kvm.run(|accelerator| short(&["--accel", accelerator.name()]));
}

#[test]
fn a_short_one_under_tcg() {
    Accelerator::Tcg.run(|accelerator| short(&["--accel", accelerator.name()]));
}

#[test]
fn a_short_one_of_the_native_server() {
    short(&["--native"]);
}

#[test]
fn a_store_that_dies_is_named() {
    let sandbox = Sandbox::new();
    let mut soak = sandbox.kv_command(["soak", "--native", "--clients", "2"]);
    soak.env("TMPDIR", sandbox.file(""));
    let soak = sandbox.spawn(soak);
    let server = || {
        let all = sandbox.processes().into_iter();
        let mut servers = all.filter(|(_, line)| line.contains("native-server"));
        servers.next().map(|(pid, _)| pid)
    };
    eventually("clients work", || {
        let all = sandbox.processes();
        all.iter().any(|(_, line)| line.contains("soak-client"))
    });
    let pid = server().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    kill_process(pid.expect("it serves"), Signal::KILL).expect("it is ours");
    soak.wait(4 * hyv_e2e::PATIENCE).fails(&[
        "the native server ended by itself",
        "what was recorded is in",
    ]);
    sandbox.assert_no_process();
}

#[test]
fn ctrl_c_ends_it_with_a_summary() {
    let sandbox = Sandbox::new();
    let mut soak = sandbox.spawn(sandbox.kv_command(["soak", "--native", "--clients", "2"]));
    eventually("clients work", || {
        let all = sandbox.processes();
        all.iter().any(|(_, line)| line.contains("soak-client"))
    });
    soak.signal(Signal::INT);
    let said = soak.wait(4 * hyv_e2e::PATIENCE).ok().text();
    assert!(said.contains("one-sided reads"), "{said}");
    assert!(said.trim_end().ends_with("nothing wrong"), "{said}");
    sandbox.assert_clean();
}

#[test]
fn what_cannot_be_is_said() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.file("full")).expect("it is not there yet");
    sandbox.write("full/file", "");
    for (args, words) in [
        (
            &["--histories", "full"][..],
            &["--histories full", "not empty"][..],
        ),
        (&["--for", "5x"], &["--for", "unknown unit"]),
        (&["--kill-every", "often"], &["--kill-every", "never"]),
        (
            &["--native", "--memory", "1M"],
            &["--memory 1.0 MiB", "16M"],
        ),
        (&["--native", "--accel", "kvm"], &["--native", "--accel"]),
        (&["--memory", "1M"], &["64M"]),
        (&["--utilisation", "100"], &["--utilisation", "95"]),
    ] {
        let all = ["soak"].iter().chain(args);
        let run = sandbox.kv(all);
        run.fails(words);
    }
    sandbox.assert_clean();
}
