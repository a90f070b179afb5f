//! Our programs against themselves: on two hosts in namespaces, over both carriers, natively and in guests, with and without
//! loss; and on one host, memory to memory.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::time::Duration;

use hyv_abi::window::UserState;
use hyv_e2e::linux::matrix::{self, Exchange, Program, Role};
use hyv_e2e::linux::{Family, Host, Net, Ours, Side};
use hyv_e2e::{Accelerator, PATIENCE, Sandbox, eventually, on_each_accelerator, or_skip, programs};
use hyv_host::backend::Quotas;
use hyv_host::instance::{Guest, Instance, InstanceConfig};
use hyv_host::vmm::{Forward, GuestConfig, NetConfig};
use hyv_host::wire::WireConfig;
use rustix::process::Signal;

const WHAT: &str = "two hosts in namespaces";

/// A row between two ends of ours; [`matrix::meet`] is told who is the client.
fn row(program: Program, family: Family, path_mtu: u32) -> Exchange {
    Exchange::new(program, Role::Client, family, path_mtu)
}

/// Every program over both IPs, with a large path MTU here and a small one there; one after the other, each on a port of its
/// own.
fn every_program(client: &Ours<'_>, server: &Ours<'_>) {
    let mut port = 20_000;
    for program in Program::ALL {
        for (family, path_mtu) in [(Family::V4, 1024), (Family::V6, 4096)] {
            // rping takes what the link gives, and tells of no MTU.
            let row = row(program, family, path_mtu);
            eprintln!("{row}");
            matrix::meet(client, server, &row, port);
            port += 1;
        }
    }
}

fn hosts() -> Result<(Host, Host), hyv_e2e::linux::Skip> {
    let net = Net::new(4300)?;
    Ok((net.host()?, net.host()?))
}

/// Runs the programs both ways between two hosts.
fn both_ways(one: Side, two: Side, carrier: &str) {
    let (a, b) = or_skip!(hosts(), WHAT);
    let sandbox = Sandbox::new();
    let a = Ours::new(&a, &sandbox, one, carrier, &[]);
    let b = Ours::new(&b, &sandbox, two, carrier, &[]);
    every_program(&a, &b);
    if one != two {
        every_program(&b, &a);
    }
    sandbox.assert_clean();
}

#[test]
fn native_to_native_by_packet_sockets() {
    both_ways(Side::Native, Side::Native, "packet");
}

#[test]
fn native_to_native_by_udp_sockets() {
    both_ways(Side::Native, Side::Native, "udp");
}

on_each_accelerator! {
    fn guest_and_native(accelerator) {
        both_ways(Side::Guest(accelerator), Side::Native, "packet");
    }

    fn guest_to_guest(accelerator) {
        both_ways(Side::Guest(accelerator), Side::Guest(accelerator), "udp");
    }

    /// One host, two guests: the same words as for two hosts, but no carrier.
    fn two_guests_on_one_host(accelerator) {
        for kind in ["rc", "uc", "ud"] {
            memory_to_memory(accelerator, kind);
        }
    }
}

/// The two carriers are one wire.
#[test]
fn the_carriers_understand_each_other() {
    let (a, b) = or_skip!(hosts(), WHAT);
    let sandbox = Sandbox::new();
    let udp = Ours::new(&a, &sandbox, Side::Native, "udp", &[]);
    let packet = Ours::new(&b, &sandbox, Side::Native, "packet", &[]);
    every_program(&udp, &packet);
    every_program(&packet, &udp);
    sandbox.assert_clean();
}

/// One packet in a hundred is lost each way, and nobody notices but the counters.
#[test]
fn one_percent_of_loss() {
    let (a, b) = or_skip!(hosts(), WHAT);
    or_skip!(a.loss(1.0), WHAT);
    or_skip!(b.loss(1.0), WHAT);
    let sandbox = Sandbox::new();
    let best = Side::Guest(Accelerator::best());
    let mut port = 20_000;
    for (carrier, client) in [
        ("packet", Side::Native),
        ("udp", Side::Native),
        ("packet", best),
    ] {
        let client = Ours::new(&a, &sandbox, client, carrier, &[]);
        let server = Ours::new(&b, &sandbox, Side::Native, carrier, &[]);
        let lost = a.lost() + b.lost();
        for program in [Program::RcPingpong, Program::Rping] {
            for family in [Family::V4, Family::V6] {
                let row = Exchange {
                    iterations: 200,
                    ..row(program, family, 1024)
                };
                eprintln!("{row}");
                matrix::meet(&client, &server, &row, port);
                port += 1;
            }
        }
        // Some 2,000 packets: none lost has a probability of 10^-8.
        assert!(a.lost() + b.lost() > lost, "nothing was lost by {carrier}");
    }
    sandbox.assert_clean();
}

/// What a device records is whole and right, also under loss.
#[test]
fn a_recording_has_nothing_wrong() {
    let (a, b) = or_skip!(hosts(), WHAT);
    or_skip!(b.loss(3.0), WHAT);
    let sandbox = Sandbox::new();
    for (n, carrier) in ["packet", "udp"].into_iter().enumerate() {
        for (m, program) in [Program::RcPingpong, Program::Rping]
            .into_iter()
            .enumerate()
        {
            let name = format!("{carrier}-{m}.pcap");
            let record = ["--pcap", &*name];
            let client = Ours::new(&a, &sandbox, Side::Native, carrier, &record);
            let server = Ours::new(&b, &sandbox, Side::Native, carrier, &[]);
            let row = row(program, Family::V4, 1024);
            matrix::meet(&client, &server, &row, 20_000 + 10 * n as u16 + m as u16);
            let mut check = sandbox.command(programs::tools());
            check.args(["pcap", "check", "--json", "-", &name]);
            let run = sandbox.run(check).ok();
            let report: serde_json::Value =
                serde_json::from_slice(&run.out).unwrap_or_else(|e| panic!("{e}: {}", run.story()));
            let packets = report["packets"].as_u64();
            let least = u64::from(row.iterations);
            assert!(packets.is_some_and(|p| p > least), "{}", run.story());
        }
    }
    sandbox.assert_clean();
}

/// Nobody listens, nobody is there, or somebody stops: an error with a remedy, and nothing left.
#[test]
fn ends_that_are_not_there() {
    let (a, b) = or_skip!(hosts(), WHAT);
    let sandbox = Sandbox::new();
    let (own, other) = (a.node().v4().to_string(), b.node().v4().to_string());
    let tools = |words: &[&str]| {
        let mut command = sandbox.command(programs::tools());
        command.args(words);
        a.enter(&command)
    };
    let nobody = tools(&["pingpong", "rc", &other, "--listen", &own]);
    sandbox
        .run(nobody)
        .fails(&["cannot connect to", &other, "is the server started"]);
    let nobody = tools(&[
        "rping",
        "-c",
        "-a",
        &other,
        "--listen",
        &own,
        "--patience",
        "3s",
    ]);
    sandbox.run(nobody).fails(&["error: "]);
    // No address of this machine.
    let foreign = tools(&["pingpong", "rc", "--listen", &other]);
    sandbox.run(foreign).fails(&["error: ", &other]);
    for (words, wrong) in [
        (&["pingpong", "rc", "--carrier", "udp"][..], "--listen"),
        (&["pingpong", "xx"], "xx"),
        (&["pingpong", "rc", "-m", "1000"], "the path MTU is"),
        (&["pingpong", "rc", "-r", "0"], "-r 0"),
        (&["pingpong", "rc", "-n", "0"], "at least one message"),
        (&["pingpong", "rc", "--net", "user"], "--guest"),
        (&["rping", "-c"], "--address"),
        (&["rping", "-s", "-S", "1"], "-S 1"),
        (&["rping"], "--server"),
        (&["pingpong", "rc", "--listen", "nonsense"], "nonsense"),
        (
            &["pingpong", "rc", "--listen", &own, "--carrier", "smoke"],
            "smoke",
        ),
        (&["pcap", "check", "nowhere.pcap"], "nowhere.pcap"),
    ] {
        sandbox.run(tools(words)).fails(&[wrong]);
    }

    for words in [
        &["pingpong", "rc", "--listen", &own][..],
        &["rping", "-s", "--listen", &own],
    ] {
        let mut waiting = sandbox.spawn(tools(words));
        waiting.until(PATIENCE, |err| {
            err.contains("waiting for a client on").then_some(())
        });
        waiting.signal(Signal::INT);
        let run = waiting.wait(PATIENCE);
        assert!(!run.err.contains("panicked"), "{}", run.story());
    }
    sandbox.assert_clean();
}

/// A free TCP port of this host's.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a free port");
    listener.local_addr().expect("it has an address").port()
}

fn launch(
    instance: &Instance,
    accelerator: Accelerator,
    name: &str,
    words: &str,
    net: NetConfig,
) -> Guest {
    let (qemu, accel) = accelerator.probe();
    let config = GuestConfig {
        name: name.into(),
        image: programs::tools_image(),
        symbols: None,
        args: format!("tool=pingpong {words} hyv.log=info"),
        memory: 64 << 20,
        watchdog: None,
        spin_hint: 1,
        net: Some(net),
        ips: Vec::new(),
    };
    let guest = instance.launch(&config, &qemu, &accel);
    let guest = guest.unwrap_or_else(|e| panic!("{name}: {e}"));
    if let Err(e) = guest.qemu().wait_state(UserState::Ready, PATIENCE) {
        panic!("{name} did not come up: {e}");
    }
    guest
}

fn memory_to_memory(accelerator: Accelerator, kind: &str) {
    let instance = Instance::start(InstanceConfig {
        name: None,
        prefix: format!("hyv-e2e-{}", std::process::id()),
        engine_cpus: Vec::new(),
        spin: Duration::from_micros(200),
        quotas: Quotas::default(),
        wire: WireConfig::default(),
    })
    .unwrap_or_else(|e| panic!("{e}"));
    let port = free_port();
    let words =
        format!("port={port} kind={kind} size=1000 mtu=1024 iters=50 check=1 patience_s=20");
    let forwards = vec![Forward {
        host: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
        guest: port,
    }];
    let server = launch(
        &instance,
        accelerator,
        "server",
        &words,
        NetConfig::User { forwards },
    );
    let words = format!("{words} server=10.0.2.2");
    let client = launch(
        &instance,
        accelerator,
        "client",
        &words,
        NetConfig::User {
            forwards: Vec::new(),
        },
    );
    eventually("both guests have ended", || {
        [&client, &server]
            .iter()
            .all(|g| g.qemu().exit_report().is_some())
    });
    for (name, guest) in [("client", client), ("server", server)] {
        let report = guest.wait();
        assert!(report.is_success(), "{kind}, {name}: {report}");
    }
}
