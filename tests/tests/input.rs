//! Bad input: a clear message that names the input and the remedy, a non-zero exit, nothing lost.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;

use hyv_e2e::records::{self, Records, assert_same};
use hyv_e2e::{Accelerator, Appliance, Random, Sandbox, programs};

/// Runs each row; fails with all that failed.
fn refused(sandbox: &Sandbox, rows: &[(&[&str], &[&str])]) {
    let mut failed = Vec::new();
    for (args, words) in rows {
        let run = sandbox.kv(*args);
        let missing: Vec<_> = words.iter().filter(|w| !run.err.contains(**w)).collect();
        let code = run.status.code();
        if code.is_none_or(|c| c == 0) || !missing.is_empty() || run.err.contains("panicked at") {
            failed.push(format!(
                "{args:?}: not in the message: {missing:?}\n{}",
                run.story()
            ));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

#[test]
fn what_the_command_line_does_not_know() {
    let sandbox = Sandbox::new();
    refused(
        &sandbox,
        &[
            (&[], &["Usage"]),
            (&["frobnicate"], &["frobnicate", "--help"]),
            (&["--frobnicate"], &["--frobnicate"]),
            (&["appliance", "--frobnicate"], &["--frobnicate", "--help"]),
            (&["get"], &["KEY"]),
            (&["put", "key"], &["VALUE"]),
            (&["get", "a", "b"], &["'b'"]),
            (&["bench", "--for", "soon"], &["--for", "soon", "5s"]),
            (&["bench", "--for", "0s"], &["--for", "1ms"]),
            (&["bench", "--in-flight", "0"], &["--in-flight", "1..=16"]),
            (&["bench", "--in-flight", "17"], &["--in-flight", "1..=16"]),
            (&["bench", "--value-size", "-1"], &["-1"]),
            (&["bench", "--workload", "g"], &["--workload", "get-put"]),
            (&["bench", "--read-share", "2"], &["--read-share", "0.95"]),
            (&["bench", "--records", "0"], &["--records", "1.."]),
            (&["bench", "--where", "moon"], &["--where", "guest"]),
            (
                &["bench", "--where", "guest", "--records", "2000000000"],
                &["free memory", "--records"],
            ),
            (&["load", "--from-line", "0", "f.tsv"], &["--from-line"]),
            (
                &["bench", "--json", "missing/r.json"],
                &["missing", "no folder"],
            ),
            (
                &["bench", "--value-size", "1048577"],
                &["--value-size", "1048576"],
            ),
            (&["get", "--port", "65536", "k"], &["--port", "65535"]),
            (
                &["load", "--format", "xml", "f.tsv"],
                &["--format", "xml", "tsv", "jsonl"],
            ),
        ],
    );
    sandbox.assert_clean();
}

#[test]
fn what_the_appliance_cannot_start_with() {
    let sandbox = Sandbox::new();
    sandbox.write("not-elf", "#!/bin/sh\necho no image\n");
    sandbox.write("empty", "");
    // An ELF file, but no guest of ours.
    fs::copy(programs::kv(), sandbox.file("other.elf")).expect("it can be copied");
    sandbox.write("good.tsv", "a\tb\n");
    sandbox.write("data.xyz", "a\tb\n");
    let best = Accelerator::best().name();
    refused(
        &sandbox,
        &[
            (&["appliance", "--memory", "63M"], &["--memory", "64M"]),
            (&["appliance", "--memory", "0"], &["--memory", "64M"]),
            (&["appliance", "--memory", "129G"], &["--memory", "128 GiB"]),
            (&["appliance", "--memory", "127G"], &["--memory", "MiB"]),
            (
                &["appliance", "--memory", "99999999999G"],
                &["--memory", "too large"],
            ),
            (
                &["appliance", "--memory", "much"],
                &["--memory", "much", "256M"],
            ),
            (&["appliance", "--memory", "-1"], &["'-1'", "--help"]),
            (&["appliance", "--memory", "1.5G"], &["--memory", "1.5G"]),
            (
                &["appliance", "--image", "missing.elf"],
                &["missing.elf", "--image"],
            ),
            (
                &["appliance", "--image", "not-elf"],
                &["not-elf", "ELF", "--image"],
            ),
            (
                &["appliance", "--image", "empty"],
                &["empty", "ELF", "--image"],
            ),
            (
                &["appliance", "--image", "/"],
                &["cannot read the image", "--image"],
            ),
            (
                &["appliance", "--image", "other.elf", "--accel", best],
                &["PVH"],
            ),
            (
                &["appliance", "--pin", "nonsense"],
                &["--pin", "nonsense", "0,2-3"],
            ),
            (&["appliance", "--pin", ""], &["--pin", "0,2-3"]),
            (&["appliance", "--pin", "1-0"], &["--pin", "1-0"]),
            (
                &["appliance", "--pin", "0,1000"],
                &["--pin", "1000", "there are"],
            ),
            (
                &["appliance", "--accel", "xen"],
                &["--accel", "xen", "auto, kvm or tcg"],
            ),
            (
                &["appliance", "--mode", "other"],
                &["--mode", "other", "inline"],
            ),
            (&["appliance", "--log", "a=b=c"], &["--log", "a=b=c"]),
            (&["appliance", "--name", "a/b"], &["a/b"]),
            (&["appliance", "--name", ""], &["name"]),
            (&["appliance", "--name", ".hidden"], &[".hidden"]),
            (&["appliance", "--port", "99999"], &["--port", "65535"]),
            (
                &["appliance", "--bench", "forever"],
                &["--bench", "forever"],
            ),
            (&["appliance", "--verify"], &["--load"]),
            (&["appliance", "--compare", "native"], &["--bench"]),
            (
                &["appliance", "--compare", "other", "--bench", "1s"],
                &["--compare", "other", "native"],
            ),
            (
                &["appliance", "--load", "missing.tsv"],
                &["missing.tsv", "No such file"],
            ),
            (
                &["appliance", "--load", "data.xyz"],
                &["data.xyz", "--format"],
            ),
            (
                &["appliance", "--load", "/tmp", "--format", "tsv"],
                &["/tmp", "directory"],
            ),
            (
                &[
                    "appliance",
                    "--load",
                    "good.tsv",
                    "--json",
                    "no/such/r.json",
                ],
                &["no/such", "--json"],
            ),
            (&["appliance", "--json", "/"], &["--json", "/"]),
        ],
    );
    sandbox.assert_clean();
}

#[test]
fn nothing_to_talk_to() {
    let sandbox = Sandbox::new();
    sandbox.write("good.tsv", "a\tb\n");
    let none: &[&str] = &["no instance is running", "./run.sh kvstore"];
    refused(
        &sandbox,
        &[
            (&["put", "a", "b"], none),
            (&["get", "a"], none),
            (&["del", "a"], none),
            (&["list"], none),
            (&["stats"], none),
            (&["bench", "--instance", "other"], none),
            (&["load", "good.tsv"], none),
            (&["dump", "out.tsv"], none),
            (&["get", "--instance", "other", "a"], none),
            (&["native-server"], none),
            (&["load", "missing.tsv"], &["missing.tsv", "No such file"]),
        ],
    );
    assert!(!sandbox.file("out.tsv").exists());
    // A device without a store on it.
    let mut host = sandbox.spawn(sandbox.hyv_host_command(["--name", "bare"]));
    hyv_e2e::eventually("the device is there", || {
        sandbox.instance("bare").join("verbs.sock").exists()
    });
    sandbox
        .kv(["get", "a"])
        .fails(&["7070", "./run.sh kvstore"]);
    host.signal(rustix::process::Signal::INT);
    host.wait(hyv_e2e::PATIENCE).ok();
    sandbox.assert_clean();
}

/// Without the program, with one that is broken, and with one that is too old.
#[test]
fn qemu_that_cannot_be_used() {
    let sandbox = Sandbox::new();
    let folder = sandbox.file("bin");
    fs::create_dir(&folder).expect("it is not there yet");
    let run = |words: &[&str]| {
        let mut command = sandbox.kv_command(["appliance"]);
        command.env("PATH", &folder);
        sandbox.run(command).fails(words);
    };
    run(&[
        "qemu-system-x86_64",
        "PATH",
        "apt-get install qemu-system-x86",
    ]);
    let fake = |script: &str| {
        let path = sandbox.write("bin/qemu-system-x86_64", script);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    };
    fake("#!/bin/sh\nexit 3\n");
    run(&["--version failed", "qemu-system-x86"]);
    fake("#!/bin/sh\necho 'QEMU emulator version 6.2.0 (Debian 1:6.2)'\n");
    run(&["6.2.0", "7.2 or newer"]);
    fake("not a program");
    run(&["qemu-system-x86_64", "reinstall"]);
    sandbox.assert_clean();
}

/// A KVM that refuses every CPU model: `auto` goes on with TCG and says why, `kvm` fails and says why.
#[test]
fn kvm_that_refuses_the_processor() {
    if let Err(e) = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        eprintln!("skipped: /dev/kvm: {e}");
        return;
    }
    let sandbox = Sandbox::new();
    let (real, _) = Accelerator::Tcg.probe();
    fs::create_dir(sandbox.file("bin")).expect("it is not there yet");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *'-accel kvm'*) echo 'error: no such feature here' >&2; exit 1;; esac\nexec '{}' \"$@\"\n",
        real.path.display()
    );
    let path = sandbox.write("bin/qemu-system-x86_64", script);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let run = |accel| {
        let mut command = sandbox.kv_command([
            "appliance",
            "--memory",
            "64M",
            "--json",
            "-",
            "--accel",
            accel,
        ]);
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let paths = [sandbox.file("bin")]
            .into_iter()
            .chain(std::env::split_paths(&paths));
        command.env(
            "PATH",
            std::env::join_paths(paths).expect("no colon in them"),
        );
        sandbox.run(command)
    };
    let run_kvm = run("kvm");
    run_kvm.fails(&[
        "--accel kvm",
        "KVM refuses every CPU model",
        "no such feature here",
        "--accel tcg",
    ]);
    let run_auto = run("auto").ok();
    assert!(
        run_auto
            .err
            .contains("under tcg, because KVM refuses every CPU model")
            && run_auto.err.contains("no such feature here"),
        "{}",
        run_auto.story()
    );
    sandbox.assert_clean();
}

/// A user who may not open /dev/kvm. Only root can become one.
#[test]
fn kvm_that_may_not_be_opened() {
    const NOBODY: u32 = 65_534;
    let others =
        |path: &Path| fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o005 == 0o005);
    let reachable = [programs::kv(), programs::image()]
        .iter()
        .all(|p| p.ancestors().skip(1).all(others));
    let closed = fs::metadata("/dev/kvm").is_ok_and(|m| m.permissions().mode() & 0o006 == 0);
    if !rustix::process::getuid().is_root() || !reachable || !closed {
        eprintln!(
            "skipped: needs root, a /dev/kvm closed to others, and programs that they can reach"
        );
        return;
    }
    let sandbox = Sandbox::new();
    for path in [sandbox.path().to_owned(), sandbox.file("")] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("root may");
    }
    let run = |accel| {
        let mut command = sandbox.kv_command([
            "appliance",
            "--memory",
            "64M",
            "--json",
            "-",
            "--accel",
            accel,
        ]);
        command.uid(NOBODY).gid(NOBODY);
        sandbox.run(command)
    };
    let why = "/dev/kvm may not be opened by this user (join the group kvm";
    run("kvm").fails(&["--accel kvm", why, "--accel tcg"]);
    let auto = run("auto").ok();
    assert!(
        auto.err.contains(&format!("under tcg, because {why}")),
        "{}",
        auto.story()
    );
    sandbox.assert_clean();
}

#[test]
fn hyv_host_says_what_is_wrong() {
    let sandbox = Sandbox::new();
    sandbox.write("not-elf", "hello");
    let rows: [(&[&str], &[&str]); 8] = [
        (&["--image", "missing.elf"], &["missing.elf", "--image"]),
        (&["--image", "not-elf"], &["not-elf", "ELF"]),
        (&["--memory", "1"], &["--memory", "131072"]),
        (&["--memory", "lots"], &["--memory", "lots"]),
        (&["--pin", "x"], &["--pin", "0,2-3"]),
        (&["--accel", "xen"], &["xen", "auto, kvm or tcg"]),
        (&["--name", "a b"], &["a b"]),
        (&["--log", "x=y=z"], &["--log"]),
    ];
    for (args, words) in rows {
        sandbox.hyv_host(args).fails(words);
    }
    let mut command = sandbox.hyv_host_command(["--memory", "32", "--image"]);
    command.arg(programs::test_image());
    sandbox.run(command).fails(&["--memory", "64"]);
    sandbox.assert_clean();
}

/// What came before the bad line is stored, and counted; the message names file, line and reason.
#[test]
fn malformed_files() {
    let sandbox = Sandbox::new();
    let store = Appliance::start(&sandbox, Accelerator::best());
    let mut random = Random::new(1);
    let before = records::many(&mut random, "before-", 50, 3000);
    let huge = "v".repeat(1_048_577);
    let long = "k".repeat(65_536);
    let rows: [(&str, String, &[&str]); 14] = [
        (
            "no-tab.tsv",
            "no tab here\n".into(),
            &["no tab", "key<TAB>value"],
        ),
        ("two-tabs.tsv", "a\tb\tc\n".into(), &["second tab", "\\t"]),
        ("escape.tsv", "a\\x\tb\n".into(), &["bad escape", "\\x"]),
        ("end-escape.tsv", "a\tb\\\n".into(), &["bad escape"]),
        ("empty-line.tsv", "\n".into(), &["no tab"]),
        (
            "empty-key.tsv",
            "\tvalue\n".into(),
            &["the key is empty", "1 to 65535"],
        ),
        ("huge.tsv", format!("k\t{huge}\n"), &["1048576", "1 MiB"]),
        ("long.tsv", format!("{long}\tv\n"), &["65535"]),
        ("array.jsonl", "[1]\n".into(), &["malformed", "\"key\""]),
        (
            "cut.jsonl",
            "{\"key\":\"a\",\n".into(),
            &["malformed", "column"],
        ),
        (
            "no-value.jsonl",
            "{\"key\":\"a\"}\n".into(),
            &["no \"value\""],
        ),
        (
            "field.jsonl",
            "{\"key\":\"a\",\"value\":\"b\",\"ttl\":1}\n".into(),
            &["unknown field", "ttl"],
        ),
        (
            "base64.jsonl",
            "{\"key\":\"a\",\"value_b64\":\"*\"}\n".into(),
            &["not base64"],
        ),
        (
            "huge.jsonl",
            format!("{{\"key\":\"a\",\"value\":\"{huge}\"}}\n"),
            &["1 MiB"],
        ),
    ];
    let mut failed = Vec::new();
    for (name, bad, words) in &rows {
        // Other keys for each file, so that what is stored is this one's.
        let mine: Records = before
            .iter()
            .map(|(k, v)| ([name.as_bytes(), k].concat(), v.clone()))
            .collect();
        let good = if name.ends_with("tsv") {
            records::to_tsv(&mine)
        } else {
            records::to_jsonl(&mine)
        };
        let after = if name.ends_with("tsv") {
            "after\tx\n"
        } else {
            "{\"key\":\"after\",\"value\":\"x\"}\n"
        };
        let file = sandbox.write(name, [&good, bad.as_bytes(), after.as_bytes()].concat());
        let run = sandbox.kv([&"load".into(), &file]);
        let mut words = words.to_vec();
        words.extend([name, "line 51", "50 records were stored", "--from-line 51"]);
        words.retain(|w| !run.err.contains(w));
        if run.status.code() != Some(1) || !words.is_empty() || run.err.contains("panicked at") {
            failed.push(format!("not in the message: {words:?}: {}", run.story()));
        }
        let out = sandbox.kv(["dump", "-", "--format", "jsonl"]).ok().out;
        let mut got = records::from_jsonl(&out);
        got.retain(|key, _| key.starts_with(name.as_bytes()));
        assert_same(&got, &mine);
        sandbox.kv(["get", "after"]).fails(&["no such key"]);
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
    // The appliance's own loading says the same, and leaves nothing behind.
    let file = sandbox.file("no-tab.tsv");
    let mut command = sandbox.kv_command(["appliance", "--memory", "64M", "--verify", "--load"]);
    command.arg(file);
    sandbox
        .run(command)
        .fails(&["no-tab.tsv", "line 51", "50 records were stored"]);
    store.end();
}
