//! A network namespace with a tap in it, for this test alone.

use std::ffi::OsStr;
use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use hyv_e2e::Sandbox;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::os::fd::AsFd;

/// A namespace with loopback and `tap0`: 10.77.0.1/24 and fd00:77::1/64.
pub struct Namespace {
    name: String,
}

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", args.join(" "), said.trim()))
}

impl Namespace {
    /// None, with the reason on standard error, where this user may not make one.
    ///
    /// # Panics
    /// When it can be made, and not filled.
    pub fn new() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "hyv-net-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Relaxed)
        );
        if let Err(e) = run("ip", &["netns", "add", &name]) {
            eprintln!("skipped: no network namespace can be made: {e}");
            return None;
        }
        let namespace = Self { name };
        if !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: this host has no /dev/net/tun");
            return None;
        }
        for line in [
            "link set lo up",
            "tuntap add dev tap0 mode tap",
            "addr add 10.77.0.1/24 dev tap0",
            "addr add fd00:77::1/64 dev tap0 nodad",
            "link set tap0 up",
        ] {
            namespace.ip(&line.split(' ').collect::<Vec<_>>());
        }
        Some(namespace)
    }

    /// Runs `ip ARGS` in it.
    ///
    /// # Panics
    /// When that fails.
    pub fn ip(&self, args: &[&str]) {
        let all: Vec<&str> = ["-n", &self.name].iter().chain(args).copied().collect();
        run("ip", &all).unwrap_or_else(|e| panic!("{e}"));
    }

    /// A command of `sandbox` that runs in it.
    pub fn command(&self, sandbox: &Sandbox, program: impl AsRef<OsStr>) -> Command {
        let mut command = sandbox.command("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs `f` in it. Sockets and threads made there stay there.
    ///
    /// # Panics
    /// As `f`.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.name)).expect("the namespace is there");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("root may enter a namespace");
                f()
            });
            thread
                .join()
                .unwrap_or_else(|e| std::panic::resume_unwind(e))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(e) = run("ip", &["netns", "delete", &self.name]) {
            eprintln!("{e}");
        }
    }
}
