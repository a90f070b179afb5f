//! Clients in numbers on another host than the store's: what many of them send at one moment is more than a network holds.

mod crowd;

use std::process::Command;

use hyv_e2e::linux::{Host, Net, Skip};
use hyv_e2e::{Accelerator, PATIENCE, Running, Sandbox, eventually, or_skip};
use hyv_verbs::Gid;
use rustix::process::Signal;

/// Clients at once, if the environment does not say otherwise (`HYV_CROWD=1000`): a thousand take up to two minutes on a busy machine.
const CROWD: usize = 300;

/// Where a device is, and the address that it has there.
struct Place<'a> {
    host: Option<&'a Host>,
    address: [u8; 4],
}

impl<'a> Place<'a> {
    /// An address of this machine's loopback.
    const fn here(last: u8) -> Self {
        Self {
            host: None,
            address: [127, 0, 77, last],
        }
    }

    fn of(host: &'a Host) -> Self {
        Self {
            host: Some(host),
            address: host.node().v4().octets(),
        }
    }

    /// `command`, there.
    fn start(&self, sandbox: &Sandbox, mut command: Command, carrier: &str) -> Running {
        let [a, b, c, d] = self.address;
        command.args(["--listen", &format!("{a}.{b}.{c}.{d}")]);
        command.args(["--carrier", carrier]);
        sandbox.spawn(match self.host {
            Some(host) => host.enter(&command),
            None => command,
        })
    }
}

/// A crowd at one place comes and goes at a store at another.
fn come_and_go(carrier: &str, store: &Place<'_>, clients: &Place<'_>) {
    let size = std::env::var("HYV_CROWD").map_or(CROWD, |n| n.parse().expect("a number"));
    // Instances of two hosts do not see each other.
    let (its, mine) = (Sandbox::new(), Sandbox::new());
    let accelerator = Accelerator::best().name();
    let command = its.kv_command(["appliance", "--accel", accelerator, "--memory", "256M"]);
    let mut appliance = store.start(&its, command, carrier);
    appliance.until(PATIENCE, |err| err.contains(": up in ").then_some(()));
    let command = mine.hyv_host_command(["--name", "crowd"]);
    let device = clients.start(&mine, command, carrier);
    let folder = mine.instance("crowd");
    eventually("the device offers sessions", || {
        folder.join("verbs.sock").exists()
    });
    let [a, b, c, d] = store.address;
    let gid = Gid(std::net::Ipv4Addr::new(a, b, c, d)
        .to_ipv6_mapped()
        .octets());
    crowd::come_and_go(&folder, gid, size, |name| its.counter(name));
    for mut running in [device, appliance] {
        running.signal(Signal::INT);
        let _ = running.wait(PATIENCE).code(0);
    }
    mine.assert_clean();
    its.assert_clean();
}

#[test]
fn a_crowd_over_udp_on_loopback() {
    come_and_go("udp", &Place::here(1), &Place::here(2));
}

fn hosts() -> Result<(Host, Host), Skip> {
    let net = Net::new(1500)?;
    Ok((net.host()?, net.host()?))
}

#[test]
fn a_crowd_over_packet_sockets_between_namespaces() {
    let (store, clients) = or_skip!(hosts(), "a crowd of clients on a host of their own");
    come_and_go("packet", &Place::of(&store), &Place::of(&clients));
}
