//! Clients in numbers, and from elsewhere: a thousand at once of a guest; and `kv` on a host that is not the store's.

use std::path::Path;

use hyv_e2e::linux::{Host, Net, Skip};
use hyv_e2e::{Accelerator, Appliance, PATIENCE, Running, Sandbox, eventually};
use hyv_e2e::{on_each_accelerator, or_skip};
use hyv_verbs::{Context, Gid, Process};
use kvstore::client::{Client, ClientConfig, ClientError, Operation};
use kvstore::proto::Reply;
use kvstore::store::{DEFAULT_TABLE, Increment};
use rustix::process::Signal;

const PORT: u16 = 7070;
/// With the command that looks at the server's counters there are a few more; a server takes 1,024.
const CROWD: usize = 1000;
/// Processes that they are in, as far as the device can tell.
const PROCESSES: usize = 10;
/// Memory of one of those: rings and buffers of a hundred clients take some 30 MiB.
const PROCESS_RAM: u64 = 128 << 20;
/// Most bytes that a server registers for one client, on the average.
const EACH: u64 = 28 << 10;

/// Many clients, before the devices that they use.
struct Crowd {
    clients: Vec<Client>,
    _contexts: Vec<Context>,
}

impl Crowd {
    /// Connects them all, by the device of the instance at `dir`.
    fn gather(dir: &Path, store: Gid) -> Self {
        let config = ClientConfig {
            timeout: PATIENCE,
            // A machine that stands still for a second loses connections over a network.
            reconnect: Some(PATIENCE),
            ..ClientConfig::default()
        };
        let contexts: Vec<Context> = (0..PROCESSES)
            .map(|_| {
                let process = Process::connect(dir, PROCESS_RAM, "crowd").expect("a session");
                Context::open(process).expect("a device")
            })
            .collect();
        let clients = (0..CROWD)
            .map(|i| {
                Client::connect_with(&contexts[i % PROCESSES], store, PORT, config)
                    .unwrap_or_else(|e| panic!("client {i}: {e}"))
            })
            .collect();
        Self {
            clients,
            _contexts: contexts,
        }
    }

    /// Each client does something.
    fn all<T>(&mut self, mut what: impl FnMut(usize, &mut Client) -> Result<T, ClientError>) {
        for (i, client) in self.clients.iter_mut().enumerate() {
            what(i, client).unwrap_or_else(|e| panic!("client {i}: {e}"));
        }
    }

    /// Each gets so many replies.
    fn answered(&mut self, count: usize, check: impl Fn(usize, &Reply<'_>)) {
        self.all(|i, client| {
            let mut seen = 0;
            while client.outstanding() > 0 {
                client.wait(|_, reply| {
                    check(i, &reply.unwrap_or_else(|e| panic!("client {i}: {e}")));
                    seen += 1;
                })?;
            }
            assert_eq!(seen, count, "client {i}");
            Ok(())
        });
    }

    /// All ask at once, and all get what they asked for.
    fn work(&mut self, round: usize) {
        let value = |i: usize| vec![(i * 7 + round) as u8; 100];
        let key = |i: usize| format!("client {i}").into_bytes();
        // Two requests of each under way: all that a server allows clients when there are many.
        self.all(|i, client| {
            let (key, value) = (key(i), value(i));
            client.submit(&Operation::put(&key, &value))?;
            client.submit(&Operation::get(&key))
        });
        self.answered(2, |i, reply| match reply {
            Reply::Version(_) => {}
            Reply::Value { value: got, .. } => assert_eq!(*got, value(i), "client {i}"),
            other => panic!("client {i}: {other:?}"),
        });
        self.all(|_, client| {
            let one = Increment::I64(1);
            client.submit(&Operation::increment(DEFAULT_TABLE, b"all", one))
        });
        self.answered(1, |i, reply| {
            assert!(
                matches!(reply, Reply::Incremented { .. }),
                "client {i}: {reply:?}"
            );
        });
        self.all(|i, client| {
            let found = client.read_one_sided(DEFAULT_TABLE, &key(i))?;
            assert_eq!(found.expect("it is there").value, value(i), "client {i}");
            Ok(())
        });
    }
}

/// A crowd comes, works, and leaves; `count` gives a counter of the server, over a connection of its own.
fn come_and_go(dir: &Path, store: Gid, count: impl Fn(&str) -> u64) {
    let mut crowd = Crowd::gather(dir, store);
    let all = CROWD as u64;
    // And the one that asks.
    eventually("they are all connected", || {
        crowd.all(|_, client| client.ping());
        count("connections") == all + 1
    });
    // Those of commands that have ended stay for a while.
    assert!(count("leases") > all);
    for round in 1..=3 {
        crowd.work(round);
        let sum = crowd.clients[round]
            .increment(DEFAULT_TABLE, b"all", Increment::I64(0))
            .expect("the sum");
        assert_eq!(sum.value, Increment::I64((round * CROWD) as i64));
    }
    let bytes = count("connection_bytes");
    eprintln!("{} bytes registered for each of {CROWD}", bytes / all);
    assert!(bytes / all < EACH, "{bytes} bytes for {CROWD} clients");
    assert_eq!(count("objects"), all + 1);
    // Half of them without a word.
    let left = crowd.clients.split_off(CROWD / 2);
    left.into_iter()
        .for_each(|client| client.close().expect("a farewell"));
    drop(crowd);
    eventually("they are all gone", || count("connections") == 1);
    assert_eq!(count("connection_bytes"), bytes, "kept for the next ones");
    let mut crowd = Crowd::gather(dir, store);
    crowd.work(4);
    assert_eq!(count("connection_bytes"), bytes);
}

on_each_accelerator! {
    /// Of the guest that `./run.sh kvstore` makes.
    fn a_thousand_at_once_of_a_guest(accelerator) {
        let sandbox = Sandbox::new();
        let store = Appliance::start_with(&sandbox, accelerator, ["--memory", "256M"]);
        come_and_go(&sandbox.instance(store.name()), Gid::LOCAL, |name| sandbox.counter(name));
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
