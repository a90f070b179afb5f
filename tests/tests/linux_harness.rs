//! The Linux peer itself: two of them talk to each other, without anything of ours between.

use std::time::Instant;

use hyv_e2e::linux::{Family, Kit, Net, Peer};
use hyv_e2e::{PATIENCE, or_skip};

const WHAT: &str = "Linux peers";

#[test]
fn two_peers_talk_to_each_other() {
    let start = Instant::now();
    let step = |name: &str| eprintln!("{:6.1} s  {name}", start.elapsed().as_secs_f32());
    let kit = or_skip!(Kit::get(), WHAT);
    step("kit");
    let net = or_skip!(Net::new(4300), WHAT);
    let host = or_skip!(net.host(), WHAT);
    let (one, two) = (
        or_skip!(Peer::start(&kit, &net), WHAT),
        or_skip!(Peer::start(&kit, &net), WHAT),
    );
    step("started");
    let (one, two) = (one.ready(), two.ready());
    step("both are up");
    eprintln!("{}", one.console());
    eprintln!(
        "{}",
        one.sh("ibv_devinfo -v | head -30; ls -l /dev/infiniband; lsmod")
    );
    for family in [Family::V4, Family::V6] {
        let address = two.node().ip(family);
        eprintln!("gid {}", two.gid_index(address));
        let ping = host
            .command("ping")
            .args(["-c1", &address.to_string()])
            .status();
        eprintln!("{ping:?}");
    }
    let g1 = one.gid_index(one.node().ip(Family::V4));
    let server = one.spawn(&format!("ibv_rc_pingpong -g {g1} -m 4096 -n 100 -c"));
    one.until_tcp(18515);
    step("listens");
    let client = two.run(
        &format!(
            "ibv_rc_pingpong -g {g1} -m 4096 -n 100 -c {}",
            one.node().v4()
        ),
        PATIENCE,
    );
    step("rc");
    eprintln!("{}\n{}", client.text, server.wait(PATIENCE).text);
    let server = one.spawn("rping -s -a 0.0.0.0 -C 3 -v");
    one.until_cm(7174);
    step("cm listens");
    let client = two.run(
        &format!("rping -c -a {} -C 3 -v", one.node().v4()),
        PATIENCE,
    );
    step("rping");
    eprintln!("{}\n{}", client.text, server.wait(PATIENCE).text);
    one.loss(4.0);
    eprintln!(
        "{}",
        one.sh("tc -s qdisc; tc filter show dev eth0; tc filter show dev eth0 ingress")
    );
    step("loss");
    let capture = one.capture();
    eprintln!("{:?} {}", capture.opcodes(), capture.others);
    eprintln!(
        "{:?}",
        capture.packets.iter().filter(|p| !p.icrc_is_right).count()
    );
    drop((one, two));
    step("gone");
}
