//! TCP in a guest, through QEMU's user networking and through a tap, as server and as client.

use hyv_e2e::{Accelerator, PATIENCE, Running, Sandbox, on_each_accelerator, programs};

mod peer;

use peer::{Peer, check_server};

/// Starts the test image with `options` of `hyv-host` and `words` on its command line.
fn start(sandbox: &Sandbox, accelerator: Accelerator, options: &[&str], words: &[&str]) -> Running {
    let mut command = sandbox.hyv_host_command(["--image"]);
    command
        .arg(programs::test_image())
        .args([
            "--accel",
            accelerator.name(),
            "--memory",
            "64",
            "--limit",
            "120",
        ])
        .args(options)
        .arg("--")
        .args(words);
    sandbox.spawn(command)
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
        check_server(([127, 0, 0, 1], port).into());
        guest.signal(rustix::process::Signal::INT);
        let run = guest.wait(PATIENCE).ok();
        assert!(run.err.contains("pass netserve"), "{}", run.story());
        sandbox.assert_clean();
    }

    fn a_guest_calls_through_user_networking(accelerator) {
        let sandbox = Sandbox::new();
        let peer = Peer::start(([127, 0, 0, 1], 0).into());
        let (port, closed) = (format!("port={}", peer.port()), format!("closed={}", peer::closed_port()));
        let words = ["test=netcalls", "to=10.0.2.2", &port, &closed, "silent=10.0.2.99"];
        let run = start(&sandbox, accelerator, &["--net", "user"], &words).wait(4 * PATIENCE).ok();
        assert!(run.err.contains("pass netcalls"), "{}", run.story());
        sandbox.assert_clean();
    }
}
