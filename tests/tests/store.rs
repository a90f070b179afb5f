//! What users do with a store: put, get, delete, list, load, dump, measure.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use hyv_e2e::records::{self, Records, assert_same};
use hyv_e2e::{Accelerator, Appliance, Random, Sandbox, eventually, on_each_accelerator, seed};
use hyv_host::sys::memory::available_bytes;
use serde_json::Value;

/// What the store holds, by way of a dump as JSON lines.
fn dump(sandbox: &Sandbox) -> Records {
    let path = sandbox.file("dump.jsonl");
    sandbox.kv([&"dump".into(), &path]).ok();
    records::from_jsonl(&fs::read(path).expect("the dump is there"))
}

on_each_accelerator! {
    fn put_get_del_list(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        assert_eq!(sandbox.kv(["list"]).ok().out, b"");
        sandbox.kv(["put", "hello", "world"]).ok();
        assert_eq!(sandbox.kv(["get", "hello"]).ok().out, b"world");
        sandbox.kv(["put", "hello", ""]).ok();
        assert_eq!(sandbox.kv(["get", "hello"]).ok().out, b"");
        sandbox.kv(["put", "Schlüssel mit Leerzeichen", "ä\tb\nc"]).ok();
        assert_eq!(sandbox.kv(["get", "Schlüssel mit Leerzeichen"]).ok().text(), "ä\tb\nc");
        // A key and a value that look like flags.
        sandbox.kv(["put", "--", "--key", "-1"]).ok();
        assert_eq!(sandbox.kv(["get", "--", "--key"]).ok().out, b"-1");
        let listed = sandbox.kv(["list"]).ok().text();
        let listed: BTreeSet<&str> = listed.lines().collect();
        assert_eq!(listed, BTreeSet::from(["hello", "Schlüssel mit Leerzeichen", "--key"]));
        let first = sandbox.kv(["get", "--version", "hello"]).ok().err;
        sandbox.kv(["put", "hello", "again"]).ok();
        let second = sandbox.kv(["get", "--version", "hello"]).ok().err;
        let version = |text: &str| text.trim().trim_start_matches("version ").parse::<u64>().expect("a version");
        assert!(version(&second) > version(&first), "{first} then {second}");
        sandbox.kv(["del", "hello"]).ok();
        for command in ["get", "del"] {
            sandbox.kv([command, "hello"]).fails(&["no such key", "hello"]);
        }
        let stats = sandbox.stats();
        for (name, value) in [("objects", 2), ("dels", 1), ("puts", 5), ("connections", 1)] {
            assert_eq!(stats[name], value, "{name} of {stats}");
        }
        let people = sandbox.kv(["stats"]).ok().text();
        assert!(people.contains("objects") && people.contains("MiB"), "{people}");
        store.end();
    }

    /// Every size of key and value, binary, through files and back, in both formats.
    fn load_and_dump_every_size(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        let mut random = Random::new(seed());
        let all = records::of_every_size(&mut random);
        let file = sandbox.write("all.jsonl", records::to_jsonl(&all));
        let said = sandbox.kv([&"load".into(), &file]).ok().err;
        assert!(said.contains(&format!("{} records", all.len())), "{said}");
        assert_same(&dump(&sandbox), &all);
        let tsv = sandbox.file("dump.tsv");
        sandbox.kv([&"dump".into(), &tsv]).ok();
        assert_same(&records::from_tsv(&fs::read(&tsv).expect("the dump is there")), &all);

        // The dump is what load takes: into an emptied store, by standard input and output.
        for key in all.keys().filter(|k| k.len() < 1000 && !k.contains(&0)) {
            use std::os::unix::ffi::OsStrExt;
            let key = std::ffi::OsStr::from_bytes(key);
            if key.to_str().is_some() {
                sandbox.kv(["del".as_ref(), "--".as_ref(), key]).ok();
            }
        }
        sandbox.kv_with_input(["load", "-"], &fs::read(&tsv).expect("the dump is there")).ok();
        let out = sandbox.kv(["dump", "-", "--format", "jsonl"]).ok().out;
        assert_same(&records::from_jsonl(&out), &all);
        store.end();
    }

    /// Values by the command line and by standard input, up to the largest.
    fn values_by_hand(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        let mut random = Random::new(seed());
        for size in records::VALUE_SIZES {
            let value = random.bytes(size);
            let key = format!("key of {size}");
            sandbox.kv_with_input(["put", &key, "-"], &value).ok();
            assert!(sandbox.kv(["get", &key]).ok().out == value, "a value of {size} bytes");
        }
        let long = "k".repeat(65_535);
        sandbox.kv(["put", &long, "v"]).ok();
        assert_eq!(sandbox.kv(["get", &long]).ok().out, b"v");
        assert!(sandbox.kv(["list"]).ok().text().lines().any(|l| l == long));
        let value = random.bytes(1_048_577);
        sandbox.kv_with_input(["put", "k", "-"], &value).fails(&["1048576", "1 MiB"]);
        sandbox.kv(["get", "k"]).fails(&["no such key"]);
        sandbox.kv(["put", &"k".repeat(65_536), "v"]).fails(&["65536", "65535"]);
        sandbox.kv(["put", "", "v"]).fails(&["the key is empty", "65535"]);
        store.end();
    }

    /// Overwritten keys: the last one of the file wins, with many in flight.
    fn the_last_of_equal_keys_wins(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        let mut random = Random::new(seed());
        let mut file = Vec::new();
        let mut last = Records::new();
        for round in 0..2000 {
            let key = format!("key{}", random.below(20)).into_bytes();
            let mut value = format!("{round}:").into_bytes();
            value.extend(random.bytes([10, 100, 5000][round % 3]));
            file.extend(records::to_tsv([(&key, &value)]));
            last.insert(key, value);
        }
        sandbox.kv_with_input(["load", "-"], &file).ok();
        assert_same(&dump(&sandbox), &last);
        store.end();
    }

    /// The whole of `--load --verify --bench --json`, and every field of the report.
    fn the_report_has_every_field(accelerator) {
        let sandbox = Sandbox::new();
        let mut random = Random::new(seed());
        let all = records::many(&mut random, "package-", 3000, 6000);
        let file = sandbox.write("in.jsonl", records::to_jsonl(&all));
        let report = sandbox.file("report.json");
        let mut command = sandbox.kv_command(["appliance", "--accel", accelerator.name(), "--memory", "128M"]);
        command.arg("--load").arg(&file).args(["--verify", "--bench", "1s", "--json"]).arg(&report);
        let run = sandbox.run(command).ok();
        sandbox.assert_clean();
        let text = fs::read(&report).expect("the report is there");
        let report: Value = serde_json::from_slice(&text).expect("one JSON object");
        let number = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("{name} of {report}"));
        assert_eq!(report["accel"], accelerator.name());
        assert!(number("boot_ms") > 1.0 && number("boot_ms") < 30_000.0, "{report}");
        let image = fs::metadata(hyv_e2e::programs::image()).expect("the image is there").len();
        assert_eq!(report["image_bytes"], image);
        assert!(image <= 2 << 20, "the image has {image} bytes");
        let overhead = number("guest_overhead_bytes");
        assert!(overhead > 4096.0 && overhead <= (16 << 20) as f64, "{overhead} bytes beyond the store's");
        assert_eq!((&report["loaded"], &report["verified"]), (&3000.into(), &3000.into()), "{}", run.story());
        assert_latencies(&report["get"]);
        assert_latencies(&report["put"]);
        assert!(["inline", "thread"].contains(&report["mode"].as_str().unwrap_or("")), "{report}");
        assert!(report["floor"]["cache_line_rtt_ns"].as_f64().is_some_and(|ns| ns > 0.0), "{report}");
        let exits = ["vm_exits_per_million_ops", "host_irq_exits_per_second"];
        match accelerator {
            Accelerator::Kvm => assert!(exits.iter().all(|name| number(name) >= 0.0), "{report}"),
            Accelerator::Tcg => assert!(exits.iter().all(|name| report.get(name) == Some(&Value::Null)), "{report}"),
        }
        for absent in ["native", "ratio_p50", "ratio_p99", "aa_p50"] {
            assert!(report.get(absent).is_none(), "{absent} without --compare: {report}");
        }
    }

    fn compare_native_reports_intervals(accelerator) {
        let sandbox = Sandbox::new();
        let measure = |time| {
            let args = ["appliance", "--accel", accelerator.name(), "--memory", "64M", "--bench", time];
            sandbox.kv([&args[..], &["--compare", "native", "--json", "-"]].concat())
        };
        let mut run = measure("2s");
        if run.err.contains("too few slices") {
            // A busy machine; the message says what to do.
            run = measure("8s");
        }
        let run = run.ok();
        sandbox.assert_clean();
        let report: Value = serde_json::from_slice(&run.out).expect("one JSON object and nothing else");
        for name in ["get", "put"] {
            assert_latencies(&report[name]);
            assert_latencies(&report["native"][name]);
        }
        assert!(report["native"]["floor"]["cache_line_rtt_ns"].as_f64().is_some_and(|ns| ns > 0.0), "{report}");
        assert_eq!(report["native"]["mode"], report["mode"]);
        for name in ["ratio_p50", "ratio_p99", "aa_p50"] {
            let part = |p: &str| report[name][p].as_f64().unwrap_or_else(|| panic!("{name}.{p} of {report}"));
            assert!(0.0 < part("low") && part("low") <= part("median") && part("median") <= part("high"), "{report}");
        }
    }

    fn memory_of_any_size(accelerator) {
        let sandbox = Sandbox::new();
        let mut sizes = vec![("65537K", 64_u64 << 20), ("200M", 200 << 20), ("5G", 5 << 30)];
        if available_bytes().is_none_or(|free| free < 6 << 30) {
            eprintln!("skipped: 5G, because less than 6 GiB are free");
            sizes.pop();
        }
        for (size, bytes) in sizes {
            let store = Appliance::start_with(&sandbox, accelerator, ["--memory", size]);
            let stats = sandbox.stats();
            let log = stats["log_bytes"].as_u64().expect("a number");
            assert!(log > bytes * 6 / 10 && log < bytes + (2 << 20), "{log} bytes of log with --memory {size}");
            sandbox.kv(["put", "key", "value"]).ok();
            assert_eq!(sandbox.kv(["get", "key"]).ok().out, b"value");
            store.end();
        }
    }

    /// More than fits: an error with a count, and service goes on.
    fn a_full_store_says_so_and_serves_on(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        let value = vec![b'v'; 16_000];
        let file: Vec<u8> = (0..6000).flat_map(|i| records::to_tsv([(&format!("k{i:05}").into_bytes(), &value)])).collect();
        let file = sandbox.write("too-much.tsv", file);
        let run = sandbox.kv([&"load".into(), &file]);
        let run = run.fails(&["records were stored", "too-much.tsv", "line ", "the store is full", "memory"]);
        let stored: u64 = run.err.split_once("error: ").and_then(|(_, r)| r.split(' ').next()?.parse().ok()).expect("a count");
        assert_eq!(stored, sandbox.counter("objects"), "{}", run.err);
        assert!(stored > 1000, "{}", run.err);
        assert!(sandbox.kv(["get", "k00000"]).ok().out == value);
        sandbox.kv_with_input(["put", "large", "-"], &vec![1; 1 << 20]).fails(&["the store is full"]);
        // Overwriting takes no more room in the end; deleting makes some.
        sandbox.kv(["put", "k00000", "small"]).ok();
        assert_eq!(sandbox.kv(["get", "k00000"]).ok().out, b"small");
        for i in 1..100 {
            sandbox.kv(["del", &format!("k{i:05}")]).ok();
        }
        sandbox.kv_with_input(["put", "large", "-"], &vec![1; 1 << 20]).ok();
        assert!(sandbox.kv(["get", "large"]).ok().out == vec![1; 1 << 20]);
        store.end();
    }

    /// Many times the memory is written; each key keeps its last value.
    fn overwriting_never_runs_out(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        let mut random = Random::new(seed());
        // 18 MiB of 64, written ten times, in sizes on both sides of the limit of a message.
        let mut last = Records::new();
        for round in 0..10 {
            last = records::many(&mut random, "o", 600, if round % 2 == 0 { 60_000 } else { 4_000 });
            let file = sandbox.write("round.jsonl", records::to_jsonl(&last));
            sandbox.kv([&"load".into(), &file]).ok();
        }
        assert_same(&dump(&sandbox), &last);
        sandbox.kv(["bench", "--workload", "a", "--for", "1s", "--value-size", "4096", "--in-flight", "16"]).ok();
        let stats = sandbox.stats();
        assert!(stats["cleaned_segments"].as_u64().is_some_and(|n| n > 10), "{stats}");
        assert_eq!(stats["errors"], 0, "{stats}");
        assert_same(&dump(&sandbox), &last);
        store.end();
    }
}

/// Debian's whole package index by the README's own line: loaded and verified in one go, and dumped without a difference.
#[test]
fn the_package_index_in_one_go() {
    let readme =
        fs::read_to_string(hyv_e2e::programs::root().join("README.md")).expect("there is a README");
    let line = readme
        .lines()
        .find(|l| l.starts_with("    apt-cache dumpavail |"));
    let line = line.expect("the README shows how to make the file").trim();
    let sandbox = Sandbox::new();
    let mut shell = sandbox.command("sh");
    shell.args(["-c", line]);
    let run = sandbox.run(shell);
    let file = fs::read(sandbox.file("debian.tsv")).unwrap_or_default();
    let lines = file.iter().filter(|b| **b == b'\n').count();
    if lines < 1000 {
        eprintln!(
            "skipped: apt-cache knows {lines} packages (apt-get update gives more)\n{}",
            run.err
        );
        return;
    }
    let wanted: Records = records::tsv_lines(&file).collect();
    assert!(
        wanted
            .iter()
            .all(|(key, value)| value.starts_with(b"Package: ") && key.contains(&b' '))
    );

    let args = [
        "appliance",
        "--accel",
        Accelerator::best().name(),
        "--load",
        "debian.tsv",
        "--verify",
        "--json",
        "-",
    ];
    let run = sandbox.kv(args).ok();
    let report: Value = serde_json::from_slice(&run.out).expect("one JSON object and nothing else");
    assert_eq!(
        (&report["loaded"], &report["verified"]),
        (&lines.into(), &wanted.len().into()),
        "{report}"
    );
    sandbox.assert_clean();

    let store = Appliance::start_with(&sandbox, Accelerator::best(), ["--load", "debian.tsv"]);
    eventually("everything is loaded", || {
        sandbox.counter("objects") == wanted.len() as u64
    });
    assert_same(
        &records::from_tsv(&sandbox.kv(["dump", "-"]).ok().out),
        &wanted,
    );
    store.end();
}

/// A dump is whole or not there, and is for whoever made it.
#[test]
fn a_dump_replaces_a_file_whole() {
    let sandbox = Sandbox::new();
    let store = Appliance::start(&sandbox, Accelerator::best());
    sandbox.kv(["put", "a", "1"]).ok();
    let old = sandbox.write("old.tsv", "what was there");
    fs::set_permissions(&old, fs::Permissions::from_mode(0o640)).expect("it is ours");
    sandbox.kv([&"dump".into(), &old]).ok();
    assert_eq!(fs::read(&old).expect("it is there"), b"a\t1\n");
    store.end();
    let before = fs::read_dir(sandbox.file(""))
        .expect("the folder is there")
        .count();
    sandbox
        .kv([&"dump".into(), &old])
        .fails(&["no instance is running", "./run.sh kvstore"]);
    assert_eq!(
        fs::read(&old).expect("it is there"),
        b"a\t1\n",
        "a dump that fails leaves the file as it was"
    );
    assert_eq!(
        fs::read_dir(sandbox.file(""))
            .expect("the folder is there")
            .count(),
        before
    );
}

/// Whoever reads our output may stop reading.
#[test]
fn a_closed_pipe_is_no_failure() {
    let sandbox = Sandbox::new();
    let store = Appliance::start(&sandbox, Accelerator::best());
    let mut random = Random::new(seed());
    let all = records::many(&mut random, "a-rather-long-key-", 20_000, 10);
    sandbox
        .kv_with_input(["load", "-", "--format", "jsonl"], &records::to_jsonl(&all))
        .ok();
    for command in ["list", "dump -"] {
        let mut shell = sandbox.command("sh");
        let kv = hyv_e2e::programs::kv();
        shell
            .arg("-c")
            .arg(format!("'{}' {command} | head -n 1", kv.display()));
        let run = sandbox.run(shell).ok();
        assert!(
            run.text().lines().count() == 1 && run.err.is_empty(),
            "{}",
            run.story()
        );
    }
    store.end();
}

#[track_caller]
fn assert_latencies(of: &Value) {
    let field = |name: &str| {
        of[name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name} of {of}"))
    };
    assert!(field("ops") >= 1.0 && field("ops_per_s") > 0.0, "{of}");
    let order = ["p50_ns", "p99_ns", "p999_ns", "max_ns"].map(field);
    // The histogram keeps three digits, so the exact maximum may lie a thousandth below the last percentile.
    assert!(
        order[0] > 0.0 && order.windows(2).all(|w| w[0] <= w[1] * 1.002),
        "{of}"
    );
}
