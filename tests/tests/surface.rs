//! `run.sh` and every `--help`: what they say is what there is.

use std::process::Command;

use hyv_e2e::{Run, Sandbox, programs};

/// `run.sh` with the target folder that the programs under test lie in, so that it has nothing to build.
fn run_sh(sandbox: &Sandbox, args: &[&str]) -> Run {
    let target = programs::kv();
    let target = target
        .parent()
        .and_then(|p| p.parent())
        .expect("target/release/kv");
    let mut command: Command = sandbox.command(programs::root().join("run.sh"));
    command.env("CARGO_TARGET_DIR", target).args(args);
    sandbox.run(command)
}

/// Flags that a help text names at the beginning of a line, without `--help` and `--version`.
fn flags(help: &str) -> Vec<&str> {
    let long = |line: &'_ str| line.trim_start().starts_with('-');
    help.lines()
        .filter(|l| long(l))
        .filter_map(|l| l.split([' ', ',']).find(|w| w.starts_with("--")))
        .filter(|f| !["--help", "--version"].contains(f))
        .collect()
}

const APPLIANCE: [&str; 13] = [
    "--load",
    "--format",
    "--verify",
    "--bench",
    "--compare",
    "--json",
    "--accel",
    "--memory",
    "--pin",
    "--image",
    "--name",
    "--port",
    "--log",
];

#[test]
fn help_names_every_command() {
    let sandbox = Sandbox::new();
    let help = run_sh(&sandbox, &["--help"]).ok().text();
    for word in [
        "kvstore",
        "kv",
        "host",
        "setup",
        "build",
        "check",
        "test",
        "./run.sh kvstore",
        "./run.sh kv put",
    ] {
        assert!(help.contains(word), "no {word} in\n{help}");
    }
    for command in ["setup", "build", "check", "test"] {
        run_sh(&sandbox, &[command, "--help"]).ok();
    }
    run_sh(&sandbox, &["frobnicate"]).fails(&["frobnicate", "--help"]);
    assert!(run_sh(&sandbox, &[]).fails(&[]).err.contains("kvstore"));
}

/// What every command has whose device may have an address.
const WIRE: [&str; 4] = ["--listen", "--carrier", "--pcap", "--dscp"];

#[test]
fn help_of_each_command_names_its_flags() {
    let sandbox = Sandbox::new();
    let place = ["--instance", "--port", "--timeout", "--host", "--listen"];
    let with = |more: &[&'static str]| [&place[..], more].concat();
    let table: [(&[&str], Vec<&str>); 13] = [
        (
            &["kvstore"],
            [&APPLIANCE[..], &["--mode"], &WIRE[..]].concat(),
        ),
        (
            &["kv", "put"],
            with(&[
                "--table",
                "--ttl",
                "--expires",
                "--if-absent",
                "--if-version",
            ]),
        ),
        (&["kv", "get"], with(&["--table"])),
        (&["kv", "del"], with(&["--table", "--if-version"])),
        (&["kv", "incr"], with(&["--table", "--if-version"])),
        (&["kv", "table", "list"], with(&[])),
        (&["kv", "list"], with(&["--table"])),
        (
            &["kv", "load"],
            with(&["--table", "--format", "--from-line"]),
        ),
        (&["kv", "dump"], with(&["--table", "--format"])),
        (&["kv", "stats"], with(&["--json"])),
        (
            &["kv", "bench"],
            with(&[
                "--workload",
                "--records",
                "--value-size",
                "--read-share",
                "--for",
                "--operations",
                "--in-flight",
                "--clients",
                "--where",
                "--one-sided",
                "--exactly-once",
                "--cleaner-tail",
                "--utilisation",
                "--vs",
                "--json",
                "--seed",
                "--accel",
                "--memory",
                "--pin",
                "--mode",
                "--image",
                "--log",
            ]),
        ),
        (
            &["kv", "native-server"],
            vec![
                "--instance",
                "--port",
                "--memory",
                "--name",
                "--pin",
                "--spin-us",
            ],
        ),
        (
            &["host"],
            [
                &[
                    "--image",
                    "--symbols",
                    "--accel",
                    "--memory",
                    "--pin",
                    "--name",
                    "--spin-us",
                    "--limit",
                    "--log",
                    "--net",
                    "--forward",
                    "--ip",
                ],
                &WIRE[..],
            ]
            .concat(),
        ),
    ];
    for (command, mut wanted) in table {
        let run = run_sh(&sandbox, &[command, &["--help"]].concat()).ok();
        let text = run.text();
        let mut named = flags(&text);
        // `get` has a flag --version of its own.
        named.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(named, wanted, "{command:?}:\n{text}");
        let usage = format!("Usage: ./run.sh {}", command.join(" "));
        assert!(text.contains(&usage), "no `{usage}` in\n{text}");
    }
    let kv = run_sh(&sandbox, &["kv", "--help"]).ok().text();
    for word in [
        "put", "get", "del", "list", "load", "dump", "stats", "bench",
    ] {
        assert!(kv.contains(word), "no {word} in\n{kv}");
    }
}

/// Errors come through, with their exit codes, in the caller's own folder.
#[test]
fn errors_of_commands_are_passed_on() {
    let sandbox = Sandbox::new();
    run_sh(&sandbox, &["kv", "get", "a"]).fails(&["no instance is running", "./run.sh kvstore"]);
    run_sh(&sandbox, &["kv", "load", "missing.tsv"]).fails(&["missing.tsv"]);
    run_sh(&sandbox, &["kvstore", "--frobnicate"]).fails(&["--frobnicate", "./run.sh kvstore"]);
    run_sh(&sandbox, &["kvstore", "--memory", "1M"]).fails(&["--memory", "64M"]);
    run_sh(&sandbox, &["host", "--image", "missing.elf"]).fails(&["missing.elf"]);
}
