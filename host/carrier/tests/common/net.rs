//! Network namespaces joined by veth pairs; gone when dropped.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hyv_carrier::{Choice, Info, Options, open, sys::netns};
use hyv_roce::carrier::Carrier;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A namespace.
pub struct Netns {
    name: String,
}

fn try_ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip")
        .args(arguments.split_ascii_whitespace())
        .output()
        .unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn ip(arguments: &str) {
    if let Err(error) = try_ip(arguments) {
        panic!("ip {arguments}: {error}");
    }
}

/// Why there can be no namespaces here, if so.
pub fn unavailable() -> Option<String> {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("hyvc-{}-probe{number}", std::process::id());
    match Command::new("ip").args(["netns", "add", &name]).output() {
        Err(error) => Some(format!("no `ip` program ({error})")),
        Ok(output) if !output.status.success() => Some(format!(
            "no network namespaces: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Ok(_) => {
            ip(&format!("netns del {name}"));
            None
        }
    }
}

/// Held by a test while it lasts: a child that another test forks holds copies of all sockets, and so their ports, until it
/// becomes another program, which on a busy machine takes a while.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says why and returns from the test, where namespaces cannot be had; else the test has them to itself.
#[macro_export]
macro_rules! need_namespaces {
    () => {
        let _turn = $crate::common::net::one_at_a_time();
        if let Some(reason) = $crate::common::net::unavailable() {
            eprintln!("skipped: {reason}");
            return;
        }
    };
}

impl Netns {
    pub fn new() -> Netns {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hyvc-{}-{number}", std::process::id());
        ip(&format!("netns add {name}"));
        let netns = Netns { name };
        netns.ip("link set lo up");
        netns
    }

    /// Runs `ip` inside.
    pub fn ip(&self, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.name));
    }

    /// The same, where it may fail.
    pub fn try_ip(&self, arguments: &str) -> Result<(), String> {
        try_ip(&format!("-n {} {arguments}", self.name))
    }

    pub fn path(&self) -> PathBuf {
        format!("/var/run/netns/{}", self.name).into()
    }

    /// Runs something on a thread that is inside.
    pub fn run<R: Send>(&self, what: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                netns::enter(&self.path()).unwrap();
                what()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub fn open(&self, choice: Choice, addr: &str) -> (Box<dyn Carrier>, Info) {
        self.open_with(choice, addr, &Options::default())
    }

    pub fn open_with(
        &self,
        choice: Choice,
        addr: &str,
        options: &Options,
    ) -> (Box<dyn Carrier>, Info) {
        self.run(|| open(choice, &addr.parse().unwrap(), options).unwrap())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .output();
    }
}

/// Joins two namespaces by a veth pair, `name` on both sides, with addresses (each with its prefix length).
pub fn join(a: &Netns, b: &Netns, name: &str, mtu: usize, at_a: &[&str], at_b: &[&str]) {
    ip(&format!(
        "link add {name} netns {} type veth peer name {name} netns {}",
        a.name, b.name
    ));
    for (netns, addresses) in [(a, at_a), (b, at_b)] {
        netns.ip(&format!("link set {name} mtu {mtu}"));
        for address in addresses {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            netns.ip(&format!("addr add {address} dev {name} {nodad}"));
        }
        netns.ip(&format!("link set {name} up"));
    }
}

/// Two joined namespaces with 10.71.0.1 and 10.71.0.2, fd71::1 and fd71::2.
pub fn pair(mtu: usize) -> (Netns, Netns) {
    let (a, b) = (Netns::new(), Netns::new());
    let at_a = ["10.71.0.1/24", "fd71::1/64"];
    let at_b = ["10.71.0.2/24", "fd71::2/64"];
    join(&a, &b, "hyvc0", mtu, &at_a, &at_b);
    (a, b)
}
