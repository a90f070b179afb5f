//! The stock programs of libibverbs and librdmacm in a Linux with Soft-RoCE, against ours as Linux processes.

use hyv_e2e::linux::matrix::{self, Exchange, Program, Role};
use hyv_e2e::linux::{Family, Kit, Net, Ours, Peer, Side};
use hyv_e2e::{Sandbox, or_skip};

const WHAT: &str = "native processes with Linux";

#[test]
fn native_processes_and_linux() {
    let net = or_skip!(Net::new(4300), WHAT);
    let host = or_skip!(net.host(), WHAT);
    let kit = or_skip!(Kit::get(), WHAT);
    let peer = or_skip!(Peer::boot(&kit, &net), WHAT);
    let sandbox = Sandbox::new();
    let packet = Ours::new(&host, &sandbox, Side::Native, "packet", &[]);
    let udp = Ours::new(&host, &sandbox, Side::Native, "udp", &[]);

    // rping and its like take their path MTU from the link.
    for (link, path_mtu) in [(4300u32, 4096), (1500, 1024)] {
        peer.link_mtu(link);
        host.ip(&["link", "set", "eth0", "mtu", &link.to_string()]);
        matrix::run(&packet, &peer, &Exchange::all(path_mtu));

        use Family::{V4, V6};
        use Role::{Client, Server};
        let row = |program, ours, family| Exchange::new(program, ours, family, path_mtu);
        let rows = [
            row(Program::RcPingpong, Client, V4),
            row(Program::RcPingpong, Server, V4),
            row(Program::RcPingpong, Client, V6),
            row(Program::UcPingpong, Server, V6),
            row(Program::UdPingpong, Client, V4),
            row(Program::UdPingpong, Server, V6),
            row(Program::Rping, Client, V6),
            row(Program::Rping, Server, V4),
            row(Program::RcPingpong, Client, V4).with_loss(4.0),
        ];
        matrix::run(&udp, &peer, &rows);
    }
    sandbox.assert_clean();
}
