//! `kv bench`: on a store that runs, with a guest of its own, beside native servers, beside Redis; what it reports, refuses
//! and leaves behind. And the ends of `load` and `dump` by Ctrl-C.

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use hyv_e2e::{Accelerator, Appliance, PATIENCE, Run, Sandbox, eventually, on_each_accelerator};
use rustix::process::Signal;
use serde_json::Value;

fn report(run: &Run) -> Value {
    serde_json::from_slice(&run.out).unwrap_or_else(|e| panic!("{e}: {}", run.story()))
}

fn number(value: &Value, pointer: &str) -> f64 {
    value
        .pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("{pointer} in {value:#}"))
}

/// The kinds of operations of each workload, as in the paper.
const KINDS: [(&str, &[&str]); 7] = [
    ("a", &["read", "update"]),
    ("b", &["read", "update"]),
    ("c", &["read"]),
    ("d", &["read", "insert"]),
    ("e", &["insert", "scan"]),
    ("f", &["read", "read_modify_write"]),
    ("get-put", &["read", "update"]),
];

/// A line has counters of one-sided reads where its place says that there are some, and they account for all of them.
fn check_one_sided(line: &Value, reads: Option<&Value>) {
    let place = line["where"].as_str().expect("a name");
    let counters = line.get("one_sided");
    assert_eq!(counters.is_some(), place.ends_with("-one-sided"), "{line}");
    let (Some(_), Some(reads)) = (counters, reads) else {
        return;
    };
    let seen: f64 = ["cached", "looked_up", "doubts"]
        .map(|name| number(line, &format!("/one_sided/{name}")))
        .iter()
        .sum();
    // Warm-up reads are counted too.
    assert!(seen >= number(reads, "/ops"), "{line}");
}

/// One line of results for each workload and place, in this order, with all that belongs to it.
fn check(report: &Value, workloads: &[&str], places: &[&str]) {
    let lines = report["results"].as_array().expect("a list");
    let mut wanted = workloads
        .iter()
        .flat_map(|w| places.iter().map(move |p| (*w, *p)));
    assert_eq!(lines.len(), workloads.len() * places.len(), "{report:#}");
    for line in lines {
        let (workload, place) = wanted.next().expect("as many");
        assert_eq!(
            (&line["workload"], &line["where"]),
            (&workload.into(), &place.into())
        );
        let (_, kinds) = KINDS
            .iter()
            .find(|(w, _)| *w == workload)
            .expect("a known workload");
        let operations = line["operations"].as_array().expect("a list");
        let mut ops = 0.0;
        for o in operations {
            let kind = o["operation"].as_str().expect("a name");
            assert!(kinds.contains(&kind), "{kind} in {workload}");
            let order = ["p50_ns", "p95_ns", "p99_ns", "p999_ns", "max_ns"]
                .map(|f| number(o, &format!("/{f}")));
            // The histogram keeps three digits, so the maximum may lie a thousandth below the last percentile.
            assert!(
                order[0] > 0.0 && order.windows(2).all(|w| w[0] <= w[1] * 1.002),
                "{o}"
            );
            assert_eq!((&o["errors"], &o["missing"]), (&0.into(), &0.into()), "{o}");
            ops += number(o, "/ops");
        }
        assert_eq!(ops, number(line, "/ops"), "{line}");
        let reads = operations.iter().find(|o| o["operation"] == "read");
        check_one_sided(line, reads);
        assert!(number(line, "/ops_per_s") > 0.0 && number(line, "/p50_ns") > 0.0);
    }
}

on_each_accelerator! {
    /// A store that runs is measured and keeps what it had, and nothing else.
    fn a_running_store_keeps_its_own(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        sandbox.kv(["put", "mine", "1"]).ok();
        for args in [
            &["--workload", "get-put", "--records", "500"][..],
            &["--workload", "d,e", "--records", "300", "--in-flight", "16"],
            &["--workload", "f", "--records", "200", "--clients", "3", "--in-flight", "4"],
            &["--workload", "a", "--value-size", "0", "--records", "50"],
            &["--workload", "a,e", "--records", "100", "--one-sided", "--in-flight", "4", "--clients", "2"],
            // Longer than what is read one-sidedly, and than what a page holds.
            &["--workload", "b,e", "--records", "50", "--one-sided", "--value-size", "20000"],
            // As many as there is room for.
            &["--workload", "c", "--value-size", "1M"],
            &["--workload", "get-put", "--value-size", "5000", "--read-share", "0", "--records", "100"],
        ] {
            let run = sandbox.kv([&["bench", "--for", "100ms", "--json"], args].concat()).ok();
            let report = report(&run);
            let workloads: Vec<&str> = args[1].split(',').collect();
            let places = ["instance", "instance-one-sided"];
            let places = if args.contains(&"--one-sided") { &places[..] } else { &places[..1] };
            check(&report, &workloads, places);
            assert!(run.err.contains("p99.9"), "{}", run.story());
            assert_eq!(sandbox.counter("objects"), 1, "{args:?}");
        }
        assert_eq!(sandbox.kv(["get", "mine"]).ok().text(), "1");
        // More than there is room for: the message says so, and nothing of it stays.
        sandbox
            .kv(["bench", "--workload", "a", "--value-size", "1M", "--records", "1000"])
            .fails(&["cannot load 1000 records", "the store is full"]);
        assert_eq!(sandbox.counter("objects"), 1);
        store.end();
    }

    /// Without a store to talk to it boots one; all of YCSB.
    fn a_guest_of_its_own(accelerator) {
        let sandbox = Sandbox::new();
        let file = sandbox.file("r.json");
        let run = sandbox.kv([
            "bench", "--accel", accelerator.name(), "--records", "1000", "--operations", "100", "--seed", "7", "--json",
            file.to_str().expect("a plain path"),
        ]).ok();
        let text = run.text();
        assert!(text.contains("p99.9") && text.contains("read_modify_write"), "{}", run.story());
        let report: Value = serde_json::from_slice(&fs::read(&file).expect("a report")).expect("JSON");
        check(&report, &["a", "b", "c", "d", "e", "f"], &["guest"]);
        assert_eq!(report["accel"], accelerator.name());
        let settings = &report["settings"];
        assert_eq!((&settings["seed"], &settings["value_size"]), (&7.into(), &1000.into()));
        for line in report["results"].as_array().expect("a list") {
            assert!(number(line, "/ops") >= 100.0, "{line}");
        }
        sandbox.assert_clean();
    }
}

/// A store at rest: once their places are known, all records are read by one READ each, and a bare READ is beside them.
#[test]
fn one_sided_reads_of_a_store_at_rest() {
    let sandbox = Sandbox::new();
    for (place, lanes) in [
        ("guest", ["guest", "guest-one-sided"]),
        ("native", ["native", "native-one-sided"]),
    ] {
        let run = sandbox
            .kv([
                "bench",
                "--where",
                place,
                "--one-sided",
                "--workload",
                "c",
                "--records",
                "100",
                "--value-size",
                "100",
                "--operations",
                "2000",
                "--json",
            ])
            .ok();
        let report = report(&run);
        check(&report, &["c"], &lanes);
        let count = |name| number(&report, &format!("/results/1/one_sided/{name}"));
        assert!(
            count("cached") > count("looked_up") + count("doubts"),
            "{report:#}"
        );
        // Header, key and value; padding where it is READ.
        let floor = &report["floor"];
        assert_eq!(floor["send_bytes"], serde_json::json!([26, 152]));
        assert_eq!(floor["read_bytes"], 152);
        for (i, name) in ["send_rtt_ns", "read_rtt_ns"].into_iter().enumerate() {
            // A busy machine may keep the other side from running.
            if floor[name].is_null() {
                assert!(run.err.contains("not measured"), "{}", run.story());
                continue;
            }
            let read = number(&report, &format!("/results/{i}/operations/0/p50_ns"));
            let bare = number(&report, &format!("/results/{i}/bare"));
            assert!((bare - read / number(floor, &format!("/{name}"))).abs() < 1e-9);
        }
    }
    sandbox.assert_clean();
}

#[test]
fn guest_and_native_side_by_side() {
    let sandbox = Sandbox::new();
    let run = sandbox
        .kv([
            "bench",
            "--where",
            "guest,native",
            "--workload",
            "b,get-put",
            "--records",
            "500",
            "--value-size",
            "100",
            "--for",
            "100ms",
            "--json",
        ])
        .ok();
    let report = report(&run);
    check(&report, &["b", "get-put"], &["guest", "native"]);
    let ratios = report["ratios"].as_array().expect("a list");
    assert_eq!(ratios.len(), 2);
    for line in ratios {
        for name in [
            "p50",
            "throughput",
            "time_per_op",
            "aa_p50",
            "aa_time_per_op",
        ] {
            // A busy machine may have too few like slices: then it is null, and a line says so.
            if line[name].is_null() {
                assert!(run.err.contains("too few slices"), "{}", run.story());
                continue;
            }
            let [low, median, high] =
                ["low", "median", "high"].map(|f| number(line, &format!("/{name}/{f}")));
            assert!(0.0 < low && low <= median && median <= high, "{line}");
        }
    }
    sandbox.assert_clean();
}

/// Reads beside a cleaner that never rests: it works when it shall, and rests when it shall.
#[test]
fn reads_beside_a_busy_cleaner() {
    let sandbox = Sandbox::new();
    let run = sandbox
        .kv([
            "bench",
            "--cleaner-tail",
            "--where",
            "guest,native",
            "--memory",
            "64M",
            "--utilisation",
            "60",
            // Few records: a machine may have little time for this.
            "--value-size",
            "4000",
            "--for",
            "100ms",
            "--seed",
            "5",
            "--json",
        ])
        .ok();
    let report = report(&run);
    assert_eq!(report["results"], serde_json::json!([]));
    let lines = report["cleaner_tail"].as_array().expect("a list");
    for (line, place) in lines.iter().zip(["guest", "native"]) {
        assert_eq!(
            (&line["where"], &line["workload"]),
            (&place.into(), &"c".into())
        );
        let of_log = number(line, "/fill/of_log");
        assert!((0.59..=0.6).contains(&of_log), "{line}");
        assert_eq!(line["off"]["cleaner_moved_bytes"], 0);
        assert!(number(line, "/always/cleaner_moved_bytes") > 0.0, "{line}");
        for side in ["off", "always"] {
            let order = ["p50_ns", "p99_ns", "p999_ns", "max_ns"]
                .map(|f| number(&line[side], &format!("/{f}")));
            assert!(
                order[0] > 0.0 && order.windows(2).all(|w| w[0] <= w[1] * 1.002),
                "{line}"
            );
        }
        for name in ["p50", "p99", "p999", "aa_p999"] {
            // A busy machine may have too few like slices.
            if line[name].is_null() {
                assert!(run.err.contains("too few slices"), "{}", run.story());
                continue;
            }
            let [low, median, high] =
                ["low", "median", "high"].map(|f| number(line, &format!("/{name}/{f}")));
            assert!(0.0 < low && low <= median && median <= high, "{line}");
        }
    }
    assert_eq!(lines.len(), 2);
    sandbox.assert_clean();
}

/// Overwriting: each share is reached, the log was written over, the fuller it is the more the cleaner moves.
#[test]
fn overwriting_at_shares_of_the_log() {
    let sandbox = Sandbox::new();
    let run = sandbox
        .kv([
            "bench",
            "--workload",
            "overwrite",
            "--utilisation",
            "30,75",
            "--where",
            "guest,native",
            "--memory",
            "64M",
            "--value-size",
            "4000",
            "--for",
            "200ms",
            "--json",
        ])
        .ok();
    let report = report(&run);
    assert_eq!(report["settings"]["exactly_once"], true);
    assert_eq!(report["settings"]["in_flight"], 16);
    let lines = report["overwrite"].as_array().expect("a list");
    for (line, place) in lines.iter().zip(["guest", "native"]) {
        assert_eq!(line["where"], place);
        let at = line["at"].as_array().expect("a list");
        assert_eq!(at.len(), 3);
        for (share, wanted) in at.iter().zip([0.30, 0.75, 0.30]) {
            let of_log = number(share, "/fill/of_log");
            assert!((wanted - 0.01..=wanted).contains(&of_log), "{share}");
            assert!(number(share, "/turned_over") >= 1.5, "{share}");
            assert!(
                number(share, "/ops_per_s_low") <= number(share, "/ops_per_s"),
                "{share}"
            );
            assert!(
                number(share, "/ops_per_s") <= number(share, "/ops_per_s_high"),
                "{share}"
            );
        }
        let [first, full, last] = [0, 1, 2].map(|i| number(&at[i], "/moved_per_written"));
        // Of what is found in a segment at 75% the cleaner cannot but move a good part, at 30% hardly any.
        assert!(
            full > 0.3 && full > 2.0 * first && full > 2.0 * last,
            "{line:#}"
        );
        let rate = |i: usize| number(&at[i], "/ops_per_s");
        assert!((number(line, "/drift") - rate(2) / rate(0)).abs() < 1e-9);
    }
    assert_eq!(lines.len(), 2);
    sandbox.assert_clean();

    // More than a store accepts: said before anything is filled.
    sandbox
        .kv([
            "bench",
            "--workload",
            "overwrite",
            "--utilisation",
            "30,95",
            "--memory",
            "64M",
        ])
        .fails(&["--utilisation 95", "accepts", "--memory"]);
    sandbox.assert_clean();
}

/// Processes whose command line names Redis's server, of this sandbox.
fn servers(sandbox: &Sandbox) -> usize {
    let all = sandbox.processes();
    all.iter()
        .filter(|(_, line)| line.contains("redis-server") && !line.contains("kv bench"))
        .count()
}

fn has_redis() -> bool {
    let there = |name: &str| {
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|folder| folder.join(name).is_file())
    };
    let both = there("redis-server") && there("redis-benchmark");
    if !both {
        eprintln!(
            "skipped: redis-server is not installed (apt-get install --no-install-recommends redis-server)"
        );
    }
    both
}

#[test]
fn beside_redis() {
    if !has_redis() {
        return;
    }
    let sandbox = Sandbox::new();
    let run = sandbox
        .kv([
            "bench",
            "--vs",
            "redis",
            "--records",
            "500",
            "--for",
            "200ms",
            "--json",
        ])
        .ok();
    let report = report(&run);
    check(
        &report,
        &["get-put"],
        &["guest", "guest-one-sided", "redis-unix", "redis-tcp"],
    );
    let speedup = &report["speedup"];
    assert!(number(speedup, "/rpc_p50") > 0.0 && number(speedup, "/throughput") > 0.0);
    let p50 = |i: usize| number(&report, &format!("/results/{i}/operations/0/p50_ns"));
    assert!((number(speedup, "/rpc_p50") - p50(2) / p50(0)).abs() < 1e-9);
    assert!((number(speedup, "/one_sided_p50") - p50(2) / p50(1)).abs() < 1e-9);
    let count = |name| number(&report, &format!("/results/1/one_sided/{name}"));
    assert!(count("cached") + count("looked_up") > 0.0, "{report:#}");
    assert!(report["results"][2]["bare"].is_null());
    for rate in [
        "store",
        "redis_unix",
        "redis_benchmark_unix",
        "redis_benchmark_tcp",
    ] {
        assert!(number(&report, &format!("/redis/throughput/{rate}")) > 0.0);
    }
    assert!(run.err.contains("faster than Redis"), "{}", run.story());
    sandbox.assert_clean();

    // Ctrl-C in the middle: no report, no server, no guest.
    let file = sandbox.file("half.json");
    let mut command = sandbox.kv_command([
        "bench",
        "--vs",
        "redis",
        "--workload",
        "a,e",
        "--for",
        "60s",
        "--records",
        "500",
        "--json",
    ]);
    command.arg(&file);
    let mut running = sandbox.spawn(command);
    eventually("Redis runs", || servers(&sandbox) > 0);
    std::thread::sleep(Duration::from_millis(500));
    running.signal(Signal::INT);
    running.wait(PATIENCE).fails(&["interrupted"]);
    assert!(!file.exists());
    sandbox.assert_clean();

    // Killed: the kernel ends what it started.
    let running = sandbox.spawn(sandbox.kv_command([
        "bench",
        "--vs",
        "redis",
        "--records",
        "500",
        "--for",
        "60s",
    ]));
    eventually("Redis runs", || servers(&sandbox) > 0);
    running.kill();
    sandbox.assert_no_process();
}

#[test]
fn without_redis_the_message_names_the_package() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.kv_command(["bench", "--vs", "redis", "--records", "10"]);
    command.env("PATH", sandbox.file(""));
    sandbox
        .run(command)
        .fails(&["redis-server is missing", "apt-get install"]);
    sandbox.assert_clean();
}

/// Ctrl-C ends a load between two records, and says where to go on; going on there gives the whole.
#[test]
fn an_interrupted_load_says_where_to_go_on() {
    let sandbox = Sandbox::new();
    let store = Appliance::start(&sandbox, Accelerator::best());
    let line = |i: u32| format!("key-{i:07}\tvalue of {i}\n");
    let whole: String = (1..=3_000).map(line).collect();
    let file = sandbox.write("all.tsv", &whole);

    // A pipe that stays open after 1,234 lines and a half: the load waits for more until it is told to end.
    let mut command = sandbox.kv_command(["load", "-"]);
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    command.stdin(reader);
    let mut loading = sandbox.spawn(command);
    let mut writer = fs::File::from(writer);
    let half: String = (1..=1_234).map(line).collect();
    writer
        .write_all(format!("{half}key-00").as_bytes())
        .expect("it is read");
    eventually("all whole lines are stored", || {
        sandbox.counter("objects") == 1_234
    });
    loading.signal(Signal::INT);
    let run = loading.wait(PATIENCE).fails(&[
        "1234 records were stored",
        "interrupted before line 1235",
        "--from-line 1235",
    ]);
    assert!(!run.err.contains("malformed"), "{}", run.story());
    drop(writer);

    let run = sandbox
        .kv([
            "load".as_ref(),
            "--from-line".as_ref(),
            "1235".as_ref(),
            file.as_os_str(),
        ])
        .ok();
    assert!(run.err.contains("1766 records stored"), "{}", run.story());
    let mut lines: Vec<String> = sandbox
        .kv(["dump", "-"])
        .ok()
        .text()
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort_unstable();
    assert!(lines.iter().map(String::as_str).eq(whole.lines()));
    sandbox
        .kv([
            "load".as_ref(),
            "--from-line".as_ref(),
            "3002".as_ref(),
            file.as_os_str(),
        ])
        .fails(&["all.tsv", "fewer than 3002 lines"]);
    store.end();
}

/// Ctrl-C ends a dump, and the file is as it was.
#[test]
fn an_interrupted_dump_leaves_the_file_as_it_was() {
    let sandbox = Sandbox::new();
    let store = Appliance::start_with(&sandbox, Accelerator::best(), ["--memory", "256M"]);
    let value = "v".repeat(100_000);
    let all: String = (0..1_000).map(|i| format!("key-{i}\t{value}\n")).collect();
    sandbox.kv_with_input(["load", "-"], all.as_bytes()).ok();
    let old = sandbox.write("old.tsv", "what was there");
    // A dump is quick; one of some is met in the middle.
    let mut met = false;
    for tries in 0..30u64 {
        let mut dump = sandbox.spawn(sandbox.kv_command(["dump".as_ref(), old.as_os_str()]));
        std::thread::sleep(Duration::from_millis(40 + 7 * tries));
        if dump.runs() {
            dump.signal(Signal::INT);
        }
        let run = dump.wait(PATIENCE);
        if run.err.contains("interrupted after") {
            run.fails(&["of 1000 records", "old.tsv was not changed"]);
            assert_eq!(fs::read(&old).expect("it is there"), b"what was there");
            met = true;
            break;
        }
        fs::write(&old, "what was there").expect("it can be written");
    }
    assert!(met, "no dump was met in the middle");
    let files: Vec<_> = fs::read_dir(sandbox.file(""))
        .expect("the folder is there")
        .flatten()
        .map(|e| e.file_name())
        .collect();
    assert!(
        files
            .iter()
            .all(|f| !f.to_string_lossy().starts_with(".hyv-")),
        "{files:?}"
    );
    store.end();
}
