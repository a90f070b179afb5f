//! Clients in numbers, and from elsewhere: a thousand at once of a guest; and `kv` on a host that is not the store's.

mod crowd;

use hyv_e2e::linux::{Host, Net, Skip};
use hyv_e2e::{Accelerator, Appliance, PATIENCE, Running, Sandbox, eventually};
use hyv_e2e::{on_each_accelerator, or_skip};
use hyv_verbs::Gid;
use rustix::process::Signal;

/// With the command that looks at the server's counters there are a few more; a server takes 1,024.
const CROWD: usize = 1000;
/// Most bytes that a server registers for one client, on the average.
const EACH: u64 = 28 << 10;

on_each_accelerator! {
    /// Of the guest that `./run.sh kvstore` makes.
    fn a_thousand_at_once_of_a_guest(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start_with(&sandbox, accelerator, ["--memory", "256M"]);
        let device = sandbox.instance(store.name());
        let each = crowd::come_and_go(&device, Gid::LOCAL, CROWD, |name| sandbox.counter(name));
        eprintln!("{each} bytes registered for each of {CROWD}");
        assert!(each < EACH, "{each} bytes for each client");
        store.end();
    }
}

const WHAT: &str = "two hosts in namespaces";

fn hosts() -> Result<(Host, Host), Skip> {
    let net = Net::new(1500)?;
    Ok((net.host()?, net.host()?))
}

/// A device with the address of `host`.
fn device(sandbox: &Sandbox, host: &Host, name: &str) -> Running {
    let listen = host.node().v4().to_string();
    let command = sandbox.hyv_host_command(["--name", name, "--listen", &listen]);
    let running = sandbox.spawn(host.enter(&command));
    let folder = sandbox.instance(name);
    eventually("the device offers sessions", || {
        folder.join("verbs.sock").exists()
    });
    running
}

fn end(mut running: Running) {
    running.signal(Signal::INT);
    let _ = running.wait(PATIENCE).code(0);
}

/// As the README has it: a store with an address, and `kv` on another host, by a device of its own or that of an instance there.
#[test]
fn kv_reaches_the_store_of_another_host() {
    let (here, there) = or_skip!(hosts(), WHAT);
    // Instances of two hosts do not see each other.
    let (mine, its) = (Sandbox::new(), Sandbox::new());
    let (own, address) = (here.node().v4().to_string(), there.node().v4().to_string());
    let accelerator = Accelerator::best();
    let command = its.kv_command([
        "appliance",
        "--accel",
        accelerator.name(),
        "--memory",
        "64M",
        "--listen",
        &address,
    ]);
    let mut store = its.spawn(there.enter(&command));
    store.until(PATIENCE, |err| err.contains(": up in ").then_some(()));
    let kv = |words: &[&str]| mine.run(here.enter(&mine.kv_command(words)));

    let by_listen = ["--host", &address, "--listen", &own];
    let with = |words: &[&str], place: &[&str]| kv(&[words, place].concat());
    with(&["put", "hello", "world"], &by_listen).ok();
    assert_eq!(with(&["get", "hello"], &by_listen).ok().out, b"world");
    let records: String = (0..2000).map(|i| format!("key {i}\tvalue {i}\n")).collect();
    let file = mine.write("records.tsv", &records);
    let file = file.to_str().expect("a path of ASCII");
    with(&["load", file], &by_listen).ok();
    let large = mine.write("large.tsv", format!("large\t{}\n", "x".repeat(1 << 20)));
    with(&["load", large.to_str().expect("ASCII")], &by_listen).ok();

    // No instance here, and then one without an address.
    with(&["get", "hello"], &["--host", &address]).fails(&["no instance is running"]);
    let deaf = mine.spawn(here.enter(&mine.hyv_host_command(["--name", "deaf"])));
    eventually("the device offers sessions", || {
        mine.instance("deaf").join("verbs.sock").exists()
    });
    with(&["get", "hello"], &["--host", &address]).fails(&["cannot reach", &address, "--listen"]);
    end(deaf);
    let device = device(&mine, &here, "mine");
    let place = ["--host", &address];
    assert_eq!(with(&["get", "hello"], &place).ok().out, b"world");
    assert_eq!(with(&["get", "large"], &place).ok().out.len(), 1 << 20);
    let dumped = with(&["dump", "-"], &place).ok();
    assert_eq!(dumped.out.iter().filter(|b| **b == b'\n').count(), 2002);
    let bench = [
        "bench",
        "--workload",
        "c",
        "--records",
        "200",
        "--operations",
        "500",
        "--one-sided",
    ];
    with(&bench, &place).ok();
    // The address has a device already.
    with(&["get", "hello"], &by_listen).fails(&["error: ", &own]);
    end(device);
    // Nobody there, and no address of this machine.
    let nobody = ["--host", &own, "--listen", &own, "--timeout", "2s"];
    with(&["get", "hello"], &nobody).fails(&["cannot reach", &own]);
    with(&["get", "hello"], &["--host", &own, "--listen", &address]).fails(&["error: ", &address]);
    with(&["get", "hello"], &["--listen", &own]).fails(&["--host"]);
    end(store);
    mine.assert_clean();
    its.assert_clean();
}
