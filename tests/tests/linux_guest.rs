//! The stock programs of libibverbs and librdmacm in a Linux with Soft-RoCE, against ours in a unikernel.

use hyv_e2e::linux::matrix::{self, Exchange, Program, Role};
use hyv_e2e::linux::{Family, Kit, Net, Ours, Peer, Side};
use hyv_e2e::{Accelerator, Sandbox, or_skip};

const WHAT: &str = "guests with Linux";

#[test]
fn guests_and_linux() {
    let net = or_skip!(Net::new(4300), WHAT);
    let host = or_skip!(net.host(), WHAT);
    let kit = or_skip!(Kit::get(), WHAT);
    let peer = or_skip!(Peer::boot(&kit, &net), WHAT);
    let sandbox = Sandbox::new();
    let side = Side::Guest(Accelerator::best());
    let packet = Ours::new(&host, &sandbox, side, "packet", &[]);
    let udp = Ours::new(&host, &sandbox, side, "udp", &[]);

    for (link, path_mtu) in [(4300u32, 4096), (1500, 1024)] {
        peer.link_mtu(link);
        host.ip(&["link", "set", "eth0", "mtu", &link.to_string()]);
        matrix::run(&packet, &peer, &Exchange::all(path_mtu));

        let row = |program, ours, family| Exchange::new(program, ours, family, path_mtu);
        let rows = [
            row(Program::RcPingpong, Role::Client, Family::V4),
            row(Program::RcPingpong, Role::Server, Family::V6),
            row(Program::Rping, Role::Server, Family::V4),
        ];
        matrix::run(&udp, &peer, &rows);
    }
    sandbox.assert_clean();
}
