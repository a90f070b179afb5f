//! TCP in a guest, through QEMU's user networking and through a tap, as server and as client.

use std::process::Command;
use std::time::Duration;

use hyv_abi::window::UserState;
use hyv_e2e::{Accelerator, PATIENCE, Run, Running, Sandbox, on_each_accelerator, programs};
use hyv_host::sys::memory::available_bytes;
use hyv_host::vmm::{Ending, GuestConfig, NetConfig, Qemu};
use rustix::process::Signal;

mod namespace;
mod peer;

use namespace::Namespace;
use peer::{Peer, check_server};

/// MiB of a guest whose RAM lies on both sides of the hole below 4 GiB.
const LARGE: &str = "5120";

/// Arguments of `hyv-host` that start the test image with `options` and `words` on its command line.
fn arguments(command: &mut Command, accelerator: Accelerator, options: &[&str], words: &[&str]) {
    command
        .arg("--image")
        .arg(programs::test_image())
        .args(["--accel", accelerator.name(), "--limit", "120"])
        .args(["--log", "debug", "--memory"])
        .args(if options.contains(&LARGE) {
            None
        } else {
            Some("64")
        })
        .args(options)
        .arg("--")
        .args(words);
}

/// Starts the test image.
fn start(sandbox: &Sandbox, accelerator: Accelerator, options: &[&str], words: &[&str]) -> Running {
    let mut command = sandbox.command(programs::hyv_host());
    arguments(&mut command, accelerator, options, words);
    sandbox.spawn(command)
}

/// Ends a guest that serves.
fn end(mut guest: Running) -> Run {
    guest.signal(Signal::INT);
    let run = guest.wait(PATIENCE).ok();
    assert!(run.err.contains("pass netserve"), "{}", run.story());
    run
}

/// The port of this host that leads to the guest's `port`.
fn forwarded(guest: &mut Running, port: u16) -> u16 {
    let end = format!("leads to the guest's port {port}");
    hyv_e2e::eventually("the forward is named", || guest.out().contains(&end));
    let out = guest.out();
    let line = out
        .lines()
        .find(|l| l.ends_with(&end))
        .expect("the line is there");
    let address = line.split(' ').find_map(|w| w.strip_prefix("127.0.0.1:"));
    address
        .and_then(|p| p.parse().ok())
        .unwrap_or_else(|| panic!("{line}"))
}

fn said<'a>(words: &'a str) -> impl Fn(&str) -> Option<()> + 'a {
    move |err| err.contains(words).then_some(())
}

on_each_accelerator! {
    fn a_guest_serves_through_user_networking(accelerator) {
        let sandbox = Sandbox::new();
        let mut guest = start(&sandbox, accelerator, &["--net", "user", "--forward", "0:7000"], &["test=netserve"]);
        let port = forwarded(&mut guest, 7000);
        guest.until(PATIENCE, said("address 10.0.2.15/24"));
        check_server(([127, 0, 0, 1], port).into(), false);
        end(guest);
        sandbox.assert_clean();
    }

    fn a_guest_calls_through_user_networking(accelerator) {
        let sandbox = Sandbox::new();
        let peer = Peer::start(([127, 0, 0, 1], 0).into()).expect("there is a free port");
        let (port, closed) = (format!("port={}", peer.port()), format!("closed={}", peer::closed_port()));
        let words = ["test=netcalls", "to=10.0.2.2", &port, &closed, "silent=10.0.2.99"];
        let run = start(&sandbox, accelerator, &["--net", "user"], &words).wait(4 * PATIENCE).ok();
        assert!(run.err.contains("pass netcalls"), "{}", run.story());
        sandbox.assert_clean();
    }

    /// The prefix that user networking has for IPv6 leads to this host's loopback address too.
    fn ipv6_through_user_networking(accelerator) {
        let Ok(peer) = Peer::start("[::1]:0".parse().expect("an address")) else {
            eprintln!("skipped: this host has no IPv6");
            return;
        };
        let sandbox = Sandbox::new();
        let port = format!("port={}", peer.port());
        let words = ["test=netcalls", "to=fec0::2", &port, "len=100000"];
        let run = start(&sandbox, accelerator, &["--net", "user"], &words).wait(4 * PATIENCE).ok();
        assert!(run.err.contains("pass netcalls"), "{}", run.story());
    }

    /// The guest sleeps between two requests: one interrupt lost between its look and its halt, and it sleeps for good.
    fn no_frame_is_slept_through(accelerator) {
        let sandbox = Sandbox::new();
        let options = ["--net", "user", "--forward", "0:7000"];
        let mut guest = start(&sandbox, accelerator, &options, &["test=netserve", "hyv.nap=100000"]);
        let port = forwarded(&mut guest, 7000);
        guest.until(PATIENCE, said("address 10.0.2.15/24"));
        peer::pauses(([127, 0, 0, 1], port).into(), 1000);
        end(guest);
    }

    fn a_static_address_in_user_networking(accelerator) {
        let sandbox = Sandbox::new();
        let options = ["--ip", "10.9.8.7/24,10.9.8.1", "--forward", "127.0.0.1:0:7000"];
        let mut guest = start(&sandbox, accelerator, &options, &["test=netserve"]);
        let port = forwarded(&mut guest, 7000);
        guest.until(PATIENCE, said("address 10.9.8.7/24"));
        check_server(([127, 0, 0, 1], port).into(), false);
        assert!(!end(guest).err.contains("DHCP"));
    }

    /// Buffers above 4 GiB: the card is told other addresses than the guest uses.
    fn buffers_where_addresses_differ(accelerator) {
        match available_bytes() {
            Some(free) if free > 6 << 30 => {}
            free => {
                eprintln!("skipped: 6 GiB are needed, {:?} MiB are free", free.map(|f| f >> 20));
                return;
            }
        }
        let sandbox = Sandbox::new();
        let words = ["test=netserve", "hog=3000"];
        let mut guest = start(&sandbox, accelerator, &[LARGE, "--forward", "0:7000"], &words);
        let port = forwarded(&mut guest, 7000);
        guest.until(PATIENCE, said("address 10.0.2.15/24"));
        check_server(([127, 0, 0, 1], port).into(), false);
        end(guest);
    }

    fn a_guest_serves_through_a_tap(accelerator) {
        let Some(namespace) = Namespace::new() else { return };
        let sandbox = Sandbox::new();
        let mut command = namespace.command(&sandbox, programs::hyv_host());
        let options = ["--net", "tap:tap0", "--ip", "10.77.0.2/24", "--ip", "fd00:77::2/64"];
        arguments(&mut command, accelerator, &options, &["test=netserve"]);
        let mut guest = sandbox.spawn(command);
        guest.until(PATIENCE, said("address fd00:77::2/64"));
        namespace.run(|| {
            check_server("10.77.0.2:7000".parse().expect("an address"), true);
            check_server("[fd00:77::2]:7000".parse().expect("an address"), true);
        });
        end(guest);
        sandbox.assert_clean();
    }

    fn a_guest_calls_through_a_tap(accelerator) {
        let Some(namespace) = Namespace::new() else { return };
        let sandbox = Sandbox::new();
        for (own, to, silent) in [
            ("10.77.0.2/24", "10.77.0.1", "10.77.0.99"),
            ("fd00:77::2/64", "fd00:77::1", "fd00:77::99"),
            // Beyond the gateway, which sends such packets on to nobody.
            ("10.77.0.2/24,10.77.0.1", "10.77.0.1", "192.0.2.1"),
        ] {
            let (peer, closed) = namespace.run(|| {
                let at = (to.parse::<std::net::IpAddr>().expect("an address"), 0);
                (Peer::start(at.into()).expect("the namespace has it"), peer::closed_port())
            });
            let words = [
                "test=netcalls", &format!("to={to}"), &format!("port={}", peer.port()),
                &format!("closed={closed}"), &format!("silent={silent}"),
            ];
            let mut command = namespace.command(&sandbox, programs::hyv_host());
            arguments(&mut command, accelerator, &["--net", "tap:tap0", "--ip", own], &words);
            let run = sandbox.spawn(command).wait(4 * PATIENCE).ok();
            assert!(run.err.contains("pass netcalls"), "{}", run.story());
        }
        sandbox.assert_clean();
    }

    /// Frames as large as the tap takes: the card says its MTU, and the guest keeps to it.
    fn a_tap_with_jumbo_frames(accelerator) {
        let Some(namespace) = Namespace::new() else { return };
        namespace.ip(&["link", "set", "tap0", "mtu", "9000"]);
        let sandbox = Sandbox::new();
        let mut command = namespace.command(&sandbox, programs::hyv_host());
        let options = ["--net", "tap:tap0", "--ip", "10.77.0.2/24"];
        arguments(&mut command, accelerator, &options, &["test=netserve", "hyv.log=debug"]);
        let mut guest = sandbox.spawn(command);
        guest.until(PATIENCE, said("MTU 9000"));
        guest.until(PATIENCE, said("address 10.77.0.2/24"));
        namespace.run(|| check_server("10.77.0.2:7000".parse().expect("an address"), true));
        end(guest);
    }

    fn no_dhcp_server_is_an_error_with_its_remedy(accelerator) {
        let Some(namespace) = Namespace::new() else { return };
        let sandbox = Sandbox::new();
        let mut command = namespace.command(&sandbox, programs::hyv_host());
        arguments(&mut command, accelerator, &["--net", "tap:tap0"], &["test=netnone"]);
        let run = sandbox.spawn(command).wait(4 * PATIENCE).ok();
        assert!(run.err.contains("no DHCP server answered") && run.err.contains("--ip"), "{}", run.story());
    }

    fn without_a_card_there_is_no_network(accelerator) {
        let sandbox = Sandbox::new();
        let run = start(&sandbox, accelerator, &[], &["test=netnone"]).wait(PATIENCE).ok();
        assert!(run.err.contains("start it with --net"), "{}", run.story());
        let words = ["test=netnone", "hyv.net=10.0.0.1"];
        let run = start(&sandbox, accelerator, &["--net", "user"], &words).wait(PATIENCE).ok();
        assert!(run.err.contains("not `dhcp` and not ADDRESS/PREFIX"), "{}", run.story());
    }
}

#[test]
fn what_the_user_typed_wrong_is_named_with_its_remedy() {
    let sandbox = Sandbox::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let taken = taken.local_addr().expect("it has an address").port();
    let rows: [(&[&str], &[&str]); 8] = [
        (&["--net", "bridge"], &["`bridge`", "tap:NAME"]),
        (
            &["--net", "tap:no-such-tap"],
            &[
                "no tap `no-such-tap`",
                "ip tuntap add dev no-such-tap mode tap user",
            ],
        ),
        (&["--net", "tap:a,b"], &["`a,b`", "no name for a tap"]),
        (&["--forward", "80"], &["`80`", "8080:80"]),
        (
            &["--forward", &format!("{taken}:80")],
            &[&format!("127.0.0.1:{taken}"), "0 for any free one"],
        ),
        (
            &["--net", "none", "--forward", "0:80"],
            &["--forward needs --net user"],
        ),
        (&["--ip", "10.0.0.1"], &["`10.0.0.1`", "10.1.0.2/24"]),
        (
            &["--ip", "10.0.0.2/24", "--ip", "10.0.0.3/24"],
            &["one IPv4 address"],
        ),
    ];
    for (options, words) in rows {
        let run = start(&sandbox, Accelerator::best(), options, &["test=netnone"]);
        run.wait(PATIENCE).fails(words);
    }
    sandbox.assert_clean();
}

/// A guest that waits for a connection leaves the processor to others.
#[test]
fn a_waiting_guest_sleeps() {
    Accelerator::Kvm.run(|accelerator| {
        let (qemu, accel) = accelerator.probe();
        let config = GuestConfig {
            name: "sleeper".into(),
            image: programs::test_image(),
            symbols: None,
            args: "test=netserve".into(),
            memory: 64 << 20,
            watchdog: None,
            spin_hint: 1,
            net: Some(NetConfig::User {
                forwards: Vec::new(),
            }),
            ips: Vec::new(),
        };
        // Nobody serves its timer here, so only a frame or an interrupt of this test wakes it.
        let guest = Qemu::launch(&config, &qemu, &accel).unwrap_or_else(|e| panic!("{e}"));
        guest
            .wait_state(UserState::Ready, PATIENCE)
            .unwrap_or_else(|e| panic!("{e}"));
        std::thread::sleep(Duration::from_millis(200));
        let stats = || guest.vcpu_stats().expect("KVM's counters can be read");
        let before = stats();
        std::thread::sleep(Duration::from_secs(1));
        let delta = stats().since(&before);
        // User networking sends a router's advertisement now and then; a guest that polls or wakes by itself exits thousands of times.
        assert!(delta.by_guest() <= 200, "{delta:?} in a second of waiting");
        let report = guest.shutdown();
        assert_eq!(report.ending, Ending::Exited { code: 0 }, "{report}");
    });
}
