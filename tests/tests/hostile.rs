//! Users that break every rule, while others' traffic through the same hyv-host must stay correct.

use std::time::{Duration, Instant};

use hyv_abi::session::SOCKET_NAME;
use hyv_e2e::records::{self, Records, assert_same};
use hyv_e2e::{
    Accelerator, Appliance, PATIENCE, Random, Sandbox, eventually, on_each_accelerator, seed,
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType};

/// How long each storm lasts.
const STORM: Duration = Duration::from_secs(5);

/// One round of a well-behaved client, every byte of it checked; `round` makes its values differ.
fn traffic(sandbox: &Sandbox, random: &mut Random, round: u64) {
    let all: Records = records::many(random, "victim-", 150, 12_000);
    sandbox
        .kv_with_input(["load", "-", "--format", "jsonl"], &records::to_jsonl(&all))
        .ok();
    let out = sandbox.kv(["dump", "-", "--format", "jsonl"]).ok().out;
    let mut got = records::from_jsonl(&out);
    // What a hostile user stored in its own name is its own affair.
    got.retain(|key, _| key.starts_with(b"victim-"));
    assert_same(&got, &all);
    let value = format!("round {round}");
    sandbox.kv(["put", "probe", &value]).ok();
    assert_eq!(sandbox.kv(["get", "probe"]).ok().text(), value);
}

on_each_accelerator! {
    fn garbage_in_every_ring(accelerator) {
        let seed = seed();
        let sandbox = Sandbox::new();
        let store = Appliance::start_with(&sandbox, accelerator, ["--memory", "64M"]);
        let folder = sandbox.instance(store.name());
        let mut random = Random::new(seed);
        let start = Instant::now();
        let (mut round, mut users) = (0, Vec::new());
        while start.elapsed() < STORM {
            for user in 0..2 {
                let mut command = sandbox.command(env!("CARGO_BIN_EXE_hyv-hostile"));
                let its_seed = seed.wrapping_add(2 * round + user).to_string();
                command.arg(&folder).args([its_seed.as_str(), "700"]);
                users.push(sandbox.spawn(command));
            }
            traffic(&sandbox, &mut random, round);
            round += 1;
            // One in two dies in the middle of what it does.
            let mut first = users.remove(0);
            if first.runs() {
                first.kill();
            }
            for user in users.drain(..) {
                let run = user.wait(PATIENCE).ok();
                eprintln!("{}", run.text().trim());
            }
        }
        assert!(round > 0);
        // All that the hostile users had is released, and the store serves on.
        eventually("only the asking client is connected", || sandbox.counter("connections") == 1);
        traffic(&sandbox, &mut random, round);
        let run = store.interrupt();
        assert!(!run.err.contains("please report this"), "{}", run.story());
        sandbox.assert_clean();
    }
}

/// Greetings that are none, and connections that say nothing.
#[test]
fn garbage_on_the_socket() {
    let sandbox = Sandbox::new();
    let store = Appliance::start(&sandbox, Accelerator::best());
    let address = SocketAddrUnix::new(sandbox.instance(store.name()).join(SOCKET_NAME))
        .expect("a short path");
    let mut random = Random::new(seed());
    let mut silent = Vec::new();
    for i in 0..200 {
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)
            .expect("a socket");
        if rustix::net::connect(&socket, &address).is_err() {
            // Too many at once: the well-behaved wait, too.
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        let len = random.below(200);
        let mut message = random.bytes(len);
        if i % 3 == 0 && message.len() >= 8 {
            // The right magic and version, and nonsense after them.
            message[..4].copy_from_slice(b"HYVS");
            message[4..8].copy_from_slice(&hyv_abi::ABI_VERSION.to_le_bytes());
        }
        match i % 10 {
            0 if silent.len() < 8 => silent.push(socket),
            _ => {
                // The other side may have closed already.
                let _ = rustix::net::send(&socket, &message, SendFlags::NOSIGNAL);
                let mut answer = [0; 64];
                let _ = rustix::net::recv(&socket, &mut answer, RecvFlags::DONTWAIT);
            }
        }
        if i % 50 == 0 {
            sandbox.kv(["put", "probe", &i.to_string()]).ok();
            assert_eq!(sandbox.kv(["get", "probe"]).ok().text(), i.to_string());
        }
    }
    drop(silent);
    traffic(&sandbox, &mut random, 1);
    store.end();
}
