//! The store under test: `kv appliance` as a process of its own, so that nothing of it is in the supervisor.

use std::fs::{self, File};
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
/// How long after its guest it may take to notice and report.
const DYING: Duration = Duration::from_secs(2);
/// Last lines of what it said that an error shows.
const LINES_SHOWN: usize = 20;
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(50);

pub(super) struct Appliance {
    child: Child,
    dir: PathBuf,
    port: u16,
    /// What it says, for when it ends by itself.
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Appliance {
    /// Starts it; what it says goes to a file in `folder`. It does not serve yet.
    pub fn start(config: &Config, folder: &Path) -> Result<Self> {
        let name = format!("soak-{}", std::process::id());
        let dir = RuntimeRoot::open()?.path().join(&name);
        let exe = std::env::current_exe().context("cannot find this program's own path")?;
        let log = folder.join("appliance.log");
        let said =
            File::create_new(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut command = Command::new(exe);
        command
            .args(["appliance", "--name", &name])
            .args(["--port", &config.port.to_string()])
            .args(&config.appliance)
            .env_remove("HYV_COMMAND")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said);
        let child = spawn_bound(command, &[]).context("cannot start the appliance")?;
        Ok(Self {
            child,
            dir,
            port: config.port,
            log,
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
            Some(status) => bail!(
                "the appliance ended by itself ({status}); it said:\n{}",
                self.said()
            ),
            None => Ok(()),
        }
    }

    /// The same, if it is just ending too.
    pub fn check_soon(&mut self) -> Result<()> {
        let deadline = Instant::now() + DYING;
        while Instant::now() < deadline {
            self.check()?;
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn said(&self) -> String {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n")
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
                Some(status) => bail!(
                    "the appliance did not end well ({status}); it said:\n{}",
                    self.said()
                ),
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
