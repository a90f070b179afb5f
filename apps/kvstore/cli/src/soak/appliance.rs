//! The store under test: `kv appliance` as a process of its own, so that nothing of it is in the supervisor.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_host::sys::process::spawn_bound;
use hyv_host::sys::runtime_dir::RuntimeRoot;
use rustix::process::{Pid, Signal, kill_process};

use super::Config;
use super::store::{self, Store};

/// How long it may take to boot, under TCG on a busy machine.
const BOOT: Duration = Duration::from_secs(60);
/// How long it may take to end: it gives its guest 5 s.
const ENDING: Duration = Duration::from_secs(15);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(50);

pub(super) struct Appliance {
    child: Child,
    dir: PathBuf,
    port: u16,
    ended: Option<ExitStatus>,
}

impl Appliance {
    /// Starts it. Its folder appears a little later.
    pub fn start(config: &Config) -> Result<Self> {
        let name = format!("soak-{}", std::process::id());
        let dir = RuntimeRoot::open()?.path().join(&name);
        let exe = std::env::current_exe().context("cannot find this program's own path")?;
        let mut command = Command::new(exe);
        command
            .args(["appliance", "--name", &name])
            .args(["--port", &config.port.to_string()])
            .args(&config.appliance)
            // It tells its users how to talk to it, and draws a line a second; only what is wrong matters here.
            .env_remove("HYV_COMMAND")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = spawn_bound(command, &[]).context("cannot start the appliance")?;
        Ok(Self {
            child,
            dir,
            port: config.port,
            ended: None,
        })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until it serves.
    pub fn connect(&mut self, stop: &AtomicBool) -> Result<Box<dyn Store>> {
        let begin = Instant::now();
        loop {
            let error = match store::connect(&self.dir, self.port, "soak") {
                Ok(store) => return Ok(store),
                Err(e) => e,
            };
            self.check()?;
            if stop.load(Ordering::Relaxed) {
                bail!("interrupted while the appliance booted");
            }
            if begin.elapsed() > BOOT {
                return Err(error.context("the appliance does not serve"));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// An error if it has ended.
    pub fn check(&mut self) -> Result<()> {
        if self.ended.is_none() {
            self.ended = self
                .child
                .try_wait()
                .context("cannot wait for the appliance")?;
        }
        match self.ended {
            Some(status) => bail!("the appliance ended by itself ({status})"),
            None => Ok(()),
        }
    }

    /// Ends it in order. An error if it does not, or had ended before.
    pub fn end(&mut self) -> Result<()> {
        self.check()?;
        kill_process(Pid::from_child(&self.child), Signal::TERM)
            .context("cannot end the appliance")?;
        let deadline = Instant::now() + ENDING;
        loop {
            self.ended = self
                .child
                .try_wait()
                .context("cannot wait for the appliance")?;
            match self.ended {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("the appliance did not end well ({status})"),
                None if Instant::now() > deadline => {
                    bail!("the appliance did not end within {ENDING:?}")
                }
                None => std::thread::sleep(LOOK),
            }
        }
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
