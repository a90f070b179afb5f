//! How instances, guests and clients begin and end, in order and by force.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::time::Duration;

use hyv_e2e::records::{self, assert_same};
use hyv_e2e::{
    Accelerator, Appliance, PATIENCE, Random, Sandbox, eventually, on_each_accelerator, seed,
};
use rustix::process::{Pid, Signal, kill_process};

on_each_accelerator! {
    fn ctrl_c_ends_in_order(accelerator) {
        let sandbox = Sandbox::new();
        for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
            let mut store = Appliance::start(&sandbox, accelerator);
            sandbox.kv(["put", "a", "b"]).ok();
            store.running().signal(signal);
            let run = store.wait().ok();
            for word in [accelerator.name(), "up in", "./run.sh kv put", "Ctrl-C"] {
                // Without the build command's variable it names itself as it was called.
                let word = if word == "./run.sh kv put" { "kv put" } else { word };
                assert!(run.err.contains(word), "no {word}: {}", run.story());
            }
            sandbox.assert_clean();
        }
    }

    fn ctrl_c_in_a_measurement_ends_it_as_unfinished(accelerator) {
        let sandbox = Sandbox::new();
        let report = sandbox.file("report.json");
        let mut store = Appliance::start_with(
            &sandbox,
            accelerator,
            ["--memory".as_ref(), "64M".as_ref(), "--bench".as_ref(), "60s".as_ref(), "--json".as_ref(), report.as_os_str()],
        );
        std::thread::sleep(Duration::from_millis(300));
        store.running().signal(Signal::INT);
        store.wait().fails(&["interrupted"]);
        assert!(!report.exists(), "a report of half a measurement");
        sandbox.assert_clean();
    }

    fn two_instances_at_once(accelerator) {
        let sandbox = Sandbox::new();
        let first = Appliance::start(&sandbox, accelerator);
        let second = Appliance::start(&sandbox, accelerator);
        assert_eq!((first.name(), second.name()), ("kvstore", "kvstore-2"));
        sandbox.kv(["put", "k", "v"]).fails(&["several instances", "kvstore, kvstore-2", "--instance"]);
        for name in ["kvstore", "kvstore-2"] {
            sandbox.kv(["put", "--instance", name, "who", name]).ok();
        }
        for name in ["kvstore", "kvstore-2"] {
            assert_eq!(sandbox.kv(["get", "--instance", name, "who"]).ok().text(), name);
        }
        sandbox.kv(["get", "--instance", "other", "who"]).fails(&["`other`", "kvstore, kvstore-2"]);
        let taken = sandbox.kv(["appliance", "--accel", accelerator.name(), "--memory", "64M", "--name", "kvstore"]);
        taken.fails(&["`kvstore` is running already", "process "]);
        assert!(first.interrupt().err.contains("shutting down"));
        // The only one now; and the free name is given again.
        assert_eq!(sandbox.kv(["get", "who"]).ok().text(), "kvstore-2");
        let third = Appliance::start(&sandbox, accelerator);
        assert_eq!(third.name(), "kvstore");
        let named = Appliance::start_with(&sandbox, accelerator, ["--memory", "64M", "--name", "mine", "--port", "9"]);
        assert_eq!(named.name(), "mine");
        sandbox.kv(["put", "--instance", "mine", "--port", "9", "a", "b"]).ok();
        sandbox.kv(["put", "--instance", "mine", "a", "b"]).fails(&["7070"]);
        for store in [second, third, named] {
            let _ = store.interrupt();
        }
        sandbox.assert_clean();
    }

    /// Clients killed in the middle of whatever they do: nobody else notices, and what they held is released.
    fn killed_clients_harm_nobody(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start_with(&sandbox, accelerator, ["--memory", "256M"]);
        let mut random = Random::new(seed());
        let kept = records::many(&mut random, "kept", 200, 20_000);
        sandbox.kv_with_input(["load", "-", "--format", "jsonl"], &records::to_jsonl(&kept)).ok();
        let large = records::many(&mut random, "victim", 400, 200_000);
        let file = sandbox.write("large.jsonl", records::to_jsonl(&large));
        let file = file.to_str().expect("a plain path");
        let commands: [&[&str]; 5] = [
            &["load", file],
            &["bench", "--workload", "get-put", "--records", "200", "--for", "60s"],
            &["bench", "--workload", "get-put", "--records", "200", "--for", "60s", "--in-flight", "16"],
            &["bench", "--workload", "get-put", "--records", "200", "--for", "60s", "--value-size", "100000", "--in-flight", "4"],
            &["dump", "-"],
        ];
        for round in 0..2 {
            for args in commands {
                let mut client = sandbox.spawn(sandbox.kv_command(args));
                std::thread::sleep(Duration::from_millis(60 + random.next_u64() % 150));
                // A file may be loaded by now; then there is nothing to kill.
                if client.runs() {
                    client.kill();
                }
                let probe = format!("round {round}");
                sandbox.kv(["put", "probe", &probe]).ok();
                assert_eq!(sandbox.kv(["get", "probe"]).ok().text(), probe);
            }
        }
        eventually("only the asking client is connected", || sandbox.counter("connections") == 1);
        let out = sandbox.kv(["dump", "-", "--format", "jsonl"]).ok().out;
        let mut got = records::from_jsonl(&out);
        got.retain(|key, _| key.starts_with(b"kept"));
        assert_same(&got, &kept);
        store.end();
    }

    /// The process that serves is killed: its QEMU and its clients end too, and the next one cleans up.
    fn a_killed_host_leaves_nothing(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        sandbox.kv(["put", "a", "b"]).ok();
        let mut client = sandbox.spawn(sandbox.kv_command(["bench", "--workload", "get-put", "--records", "200", "--for", "60s"]));
        eventually("the client measures", || sandbox.counter("gets") > 0);
        assert_eq!(sandbox.guests().len(), 1);
        assert!(client.runs());
        store.kill();
        client.wait(PATIENCE).fails(&["hyv-host"]);
        sandbox.assert_no_process();
        sandbox.kv(["get", "a"]).fails(&["no instance is running", "./run.sh kvstore"]);
        let next = Appliance::start(&sandbox, accelerator);
        assert_eq!(next.name(), "kvstore");
        assert_eq!(sandbox.kv(["list"]).ok().out, b"", "a new store is empty");
        next.end();
    }

    /// Somebody kills QEMU: the command says so and fails; clients are told.
    fn a_killed_qemu_is_reported(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start(&sandbox, accelerator);
        sandbox.kv(["put", "a", "b"]).ok();
        let client = sandbox.spawn(sandbox.kv_command(["bench", "--workload", "get-put", "--records", "200", "--for", "60s"]));
        eventually("the client measures", || sandbox.counter("gets") > 0);
        let qemu = Pid::from_raw(sandbox.guests()[0].cast_signed()).expect("a process id");
        kill_process(qemu, Signal::KILL).expect("it runs");
        store.wait().fails(&["ended from outside by signal 9"]);
        client.wait(PATIENCE).fails(&["the store"]);
        sandbox.assert_clean();
    }
}

/// Others may not enter the folder, and so not reach the socket.
#[test]
fn nobody_else_may_connect() {
    let sandbox = Sandbox::new();
    let store = Appliance::start(&sandbox, Accelerator::best());
    let folder = sandbox.instance("kvstore");
    for path in [&folder, &sandbox.path().join("hyv")] {
        let mode = fs::metadata(path)
            .expect("it is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700, "{}", path.display());
    }
    let sockets = fs::read_dir(&folder).expect("it can be read").flatten();
    let sockets = sockets
        .filter(|e| e.file_type().is_ok_and(|t| t.is_socket()))
        .count();
    assert_eq!(sockets, 1);
    store.end();
}

/// A runtime folder that somebody else could have prepared is not used.
#[test]
fn an_unsafe_runtime_folder_is_refused() {
    let sandbox = Sandbox::new();
    let folder = sandbox.path().join("hyv");
    fs::create_dir(&folder).expect("it is not there yet");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).expect("it is ours");
    sandbox
        .kv(["get", "a"])
        .fails(&["others may enter it", "XDG_RUNTIME_DIR"]);
    fs::remove_dir(&folder).expect("it is empty");
    std::os::unix::fs::symlink("/tmp", &folder).expect("it is gone");
    sandbox.kv(["get", "a"]).fails(&["symbolic link"]);
}
