//! The store under test, in processes of its own, so that nothing of it is in the supervisor: `kv appliance`, or a device and a native
//! server on it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use hyv_host::sys::process::spawn_bound;
use hyv_host::sys::runtime_dir::RuntimeRoot;
use kvstore::client::Client;
use rustix::process::{Pid, Signal, kill_process};

use super::limits::{BOOT, DYING, LINES_SHOWN, LOOK, STORE_ENDING};
use super::{Config, Where, store};

/// A process of the store's.
struct Part {
    what: &'static str,
    child: Child,
    /// What it says, for when it ends by itself.
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Part {
    fn start(what: &'static str, words: &[String], folder: &Path) -> Result<Self> {
        let exe = std::env::current_exe().context("cannot find this program's own path")?;
        let log = folder.join(format!("{}.log", what.replace(' ', "-")));
        let said =
            File::create_new(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut command = Command::new(exe);
        command
            .args(words)
            .env_remove("HYV_COMMAND")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said);
        let child =
            spawn_bound(command, &[]).with_context(|| format!("cannot start the {what}"))?;
        Ok(Self {
            what,
            child,
            log,
            ended: None,
        })
    }

    fn look(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self
                .child
                .try_wait()
                .with_context(|| format!("cannot wait for the {}", self.what))?;
        }
        Ok(self.ended)
    }

    fn check(&mut self) -> Result<()> {
        match self.look()? {
            None => Ok(()),
            Some(status) => bail!(
                "the {} ended by itself ({status}){}",
                self.what,
                self.said()
            ),
        }
    }

    fn end(&mut self) -> Result<()> {
        self.check()?;
        kill_process(Pid::from_child(&self.child), Signal::TERM)
            .with_context(|| format!("cannot end the {}", self.what))?;
        let deadline = Instant::now() + STORE_ENDING;
        loop {
            match self.look()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!(
                    "the {} did not end well ({status}){}",
                    self.what,
                    self.said()
                ),
                None if Instant::now() > deadline => {
                    bail!("the {} did not end within {STORE_ENDING:?}", self.what)
                }
                None => std::thread::sleep(LOOK),
            }
        }
    }

    fn said(&self) -> String {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        match lines.len() {
            0 => " and said nothing".to_owned(),
            n => format!(
                "; it said:\n{}",
                lines[n.saturating_sub(LINES_SHOWN)..].join("\n")
            ),
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

pub(super) struct Place {
    /// The last first: it needs the others.
    parts: Vec<Part>,
    dir: PathBuf,
    port: u16,
}

impl Place {
    /// Starts it; what it says goes to files in `folder`. It does not serve yet.
    pub fn start(config: &Config, folder: &Path, stop: &AtomicBool) -> Result<Self> {
        let name = format!("soak-{}", std::process::id());
        let dir = RuntimeRoot::open()?.path().join(&name);
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let port = config.port.to_string();
        let mut this = Self {
            parts: Vec::new(),
            dir,
            port: config.port,
        };
        match &config.place {
            Where::Guest(more) => {
                let mut words = words(&["appliance", "--name", &name, "--port", &port]);
                words.extend_from_slice(more);
                this.parts.push(Part::start("appliance", &words, folder)?);
            }
            Where::Native { memory } => {
                let device = Part::start("device", &words(&["soak-device", &name]), folder)?;
                this.parts.push(device);
                this.wait("the device is not there", stop, |this| {
                    let socket = this.dir.join("verbs.sock");
                    fs::metadata(&socket)
                        .map(|_| ())
                        .with_context(|| socket.display().to_string())
                })?;
                let memory = memory.to_string();
                let words = words(&[
                    "native-server",
                    "--instance",
                    &name,
                    "--port",
                    &port,
                    "--memory",
                    &memory,
                ]);
                let server = Part::start("native server", &words, folder)?;
                this.parts.insert(0, server);
            }
        }
        Ok(this)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until it serves.
    pub fn connect(&mut self, stop: &AtomicBool) -> Result<Client> {
        self.wait("the store does not serve", stop, |this| {
            store::connect(&this.dir, this.port, "soak", true)
        })
    }

    fn wait<T>(
        &mut self,
        what: &'static str,
        stop: &AtomicBool,
        mut attempt: impl FnMut(&Self) -> Result<T>,
    ) -> Result<T> {
        let begin = Instant::now();
        loop {
            let error = match attempt(self) {
                Ok(done) => return Ok(done),
                Err(e) => e,
            };
            self.check()?;
            if stop.load(Ordering::Relaxed) {
                bail!("interrupted while the store started");
            }
            if begin.elapsed() > BOOT {
                return Err(error.context(what));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// An error if it has ended.
    pub fn check(&mut self) -> Result<()> {
        self.parts.iter_mut().try_for_each(Part::check)
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

    /// Ends it in order. An error if it does not, or had ended before.
    pub fn end(&mut self) -> Result<()> {
        self.parts.iter_mut().try_for_each(Part::end)
    }
}
