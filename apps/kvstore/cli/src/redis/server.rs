//! `redis-server` for one measurement: a socket, a port and a folder of its own, nothing on disk, no file of the machine's
//! read or written.

use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_host::sys::cpu;
use hyv_host::sys::process::spawn_bound;
use rustix::process::{Pid, Signal, kill_process};

use super::client::Redis;

/// How long it may take to serve, or to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often another port is tried when somebody took the one that was free.
const PORTS: u32 = 5;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A port of the loopback.
    Tcp(SocketAddrV4),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// A running server. It ends when this is dropped, and when this process ends however that happens.
#[derive(Debug)]
pub struct Server {
    child: Child,
    folder: tempfile::TempDir,
    port: u16,
    /// What `redis-server` calls itself.
    pub version: String,
}

/// The program `name` by PATH.
///
/// # Errors
/// That it is missing, and how to get it.
pub fn program(name: &str) -> Result<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
        .with_context(|| {
            format!(
                "{name} is missing; install it (Debian, Ubuntu: apt-get install --no-install-recommends redis-server), or, \
                 as root, have ./run.sh kv bench --vs redis do that"
            )
        })
}

impl Server {
    /// Starts one on `cpus`.
    ///
    /// # Errors
    /// When it is missing or does not come up; the message has what it said.
    pub fn start(cpus: &[usize]) -> Result<Self> {
        let program = program("redis-server")?;
        let mut tries = 0;
        loop {
            tries += 1;
            match Self::try_start(&program, cpus) {
                Err(e) if tries < PORTS && format!("{e:#}").contains("in use") => {}
                other => return other,
            }
        }
    }

    fn try_start(program: &Path, cpus: &[usize]) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("hyv-redis-")
            .tempdir()
            .context("cannot make a folder for Redis")?;
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
        let port = free.local_addr().context("no port is free")?.port();
        drop(free);
        let mut command = Command::new(program);
        let path = |name: &str| folder.path().join(name);
        command
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .arg("--unixsocket")
            .arg(path("socket"))
            .args(["--unixsocketperm", "700"])
            .arg("--dir")
            .arg(folder.path())
            .arg("--logfile")
            .arg(path("log"))
            // Memory alone, as the store: no snapshots, no log.
            .args(["--save", "", "--appendonly", "no"])
            .args(["--daemonize", "no", "--supervised", "no"])
            .args(["--databases", "1"])
            // A title is written over the environment, by which processes are told apart.
            .args(["--set-proc-title", "no"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = spawn_bound(command, &[])
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut server = Self {
            child,
            folder,
            port,
            version: String::new(),
        };
        server.until_up()?;
        // Best effort: where it may not be pinned it runs on any CPU, as by default.
        for thread in threads(server.child.id()) {
            if let Err(e) = cpu::pin_thread(thread, cpus) {
                tracing::debug!("redis-server runs anywhere: {e}");
            }
        }
        Ok(server)
    }

    fn until_up(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for Redis")? {
                bail!("redis-server ended: {status}{}", self.last_words());
            }
            let up = Redis::connect(&self.unix(), 1).and_then(|mut redis| {
                redis.ask(&[b"PING"])?;
                redis.ask(&[b"INFO", b"server"])
            });
            match up {
                Ok(info) => {
                    let line = info.lines().find_map(|l| l.strip_prefix("redis_version:"));
                    self.version = line.unwrap_or("unknown").trim().to_owned();
                    return Ok(());
                }
                Err(e) if start.elapsed() > PATIENCE => {
                    return Err(e)
                        .context(format!("redis-server does not serve{}", self.last_words()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// The end of its log.
    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(3).collect();
        if lines.is_empty() {
            return String::new();
        }
        let lines: Vec<&str> = lines.into_iter().rev().collect();
        format!("; it said: {}", lines.join(" / "))
    }

    /// Its unix socket.
    #[must_use]
    pub fn unix(&self) -> Address {
        Address::Unix(self.folder.path().join("socket"))
    }

    /// Its port.
    #[must_use]
    pub const fn tcp(&self) -> Address {
        Address::Tcp(SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.port))
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// Threads of a process: Redis has some beside the one that serves.
fn threads(pid: u32) -> Vec<i32> {
    let folder = fs::read_dir(format!("/proc/{pid}/task"));
    let names = folder.into_iter().flatten().flatten();
    names
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect()
}

impl Drop for Server {
    fn drop(&mut self) {
        // In order at first; it has nothing to save, so that is quick.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(1) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
