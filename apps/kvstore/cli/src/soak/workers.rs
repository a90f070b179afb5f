//! The client processes of a round: started, stopped for a while, killed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_host::sys::process::spawn_bound;
use rustix::process::{Pid, Signal, kill_process};

use super::limits::{LONG_STOP, LONG_STOPS, SHORT_STOP};
use super::store::Clock;
use super::workload::{Keys, Random};
use super::{Config, client};

/// A client process.
struct Worker {
    client: u32,
    history: PathBuf,
    child: Child,
    /// Until when it is stopped.
    stopped: Option<Instant>,
}

impl Worker {
    fn signal(&self, signal: Signal) {
        // It may have ended meanwhile, which shows elsewhere.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    fn go_on(&mut self) {
        self.stopped = None;
        self.signal(Signal::CONT);
    }
}

/// What all clients of a round are told.
pub(super) struct Common<'a> {
    pub config: &'a Config,
    pub folder: &'a Path,
    pub dir: &'a Path,
    pub until: u64,
    pub keys: Keys,
    pub clock: Clock,
    pub clock_slack: u64,
}

pub(super) struct Workers<'a> {
    common: Common<'a>,
    running: Vec<Worker>,
    pub files: Vec<PathBuf>,
    pub killed: u64,
    pub stopped: u64,
}

impl<'a> Workers<'a> {
    pub const fn new(common: Common<'a>) -> Self {
        Self {
            common,
            running: Vec::new(),
            files: Vec::new(),
            killed: 0,
            stopped: 0,
        }
    }

    pub const fn len(&self) -> usize {
        self.running.len()
    }

    /// One that runs.
    pub fn any(&self) -> Option<u32> {
        self.running.first().map(|worker| worker.client)
    }

    pub fn start(&mut self, client: u32) -> Result<()> {
        let Common {
            config,
            folder,
            dir,
            until,
            keys,
            clock,
            clock_slack,
        } = &self.common;
        let history = folder.join(format!("client-{client}.hyvh"));
        let exe = std::env::current_exe().context("cannot find this program's own path")?;
        let mut command = Command::new(exe);
        command
            .arg("soak-client")
            .arg("--dir")
            .arg(dir)
            .arg("--history")
            .arg(&history);
        let numbers = [
            ("--port", u64::from(config.port)),
            ("--client", u64::from(client)),
            ("--seed", config.seed),
            ("--until", *until),
            ("--hot-keys", keys.hot),
            ("--fading-keys", keys.fading),
            ("--fill-keys", keys.fill),
            ("--table", u64::from(keys.table)),
            ("--clock-ahead", clock.ahead),
            ("--clock-slack", *clock_slack),
            ("--in-flight", config.in_flight as u64),
        ];
        for (flag, number) in numbers {
            command.arg(flag).arg(number.to_string());
        }
        if let Some(time) = config.cut_every {
            command.arg("--cut-every-ns");
            command.arg(time.as_nanos().to_string());
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = spawn_bound(command, &[]).context("cannot start a client")?;
        self.files.push(history.clone());
        self.running.push(Worker {
            client,
            history,
            child,
            stopped: None,
        });
        Ok(())
    }

    /// Kills one.
    pub fn kill(&mut self, random: &mut Random) -> Result<()> {
        if self.running.is_empty() {
            return Ok(());
        }
        let which = random.below(self.running.len() as u64) as usize;
        let mut worker = self.running.swap_remove(which);
        worker.child.kill().context("cannot kill a client")?;
        worker.child.wait().context("cannot wait for a client")?;
        self.killed += 1;
        tracing::debug!("killed client {}", worker.client);
        Ok(())
    }

    /// Stops one for a while, wherever it is: between two READs of a lookup, say.
    pub fn stop(&mut self, random: &mut Random) {
        if self.running.is_empty() {
            return;
        }
        let which = random.below(self.running.len() as u64) as usize;
        let worker = &mut self.running[which];
        let time = if random.below(LONG_STOPS) == 0 {
            LONG_STOP
        } else {
            Duration::from_nanos(random.skewed(SHORT_STOP.as_nanos() as u64))
        };
        worker.signal(Signal::STOP);
        worker.stopped = Some(Instant::now() + time);
        self.stopped += 1;
    }

    /// Lets those go on whose time is over, or all.
    pub fn go_on(&mut self, all: bool) {
        for worker in &mut self.running {
            if worker.stopped.is_some_and(|at| all || Instant::now() >= at) {
                worker.go_on();
            }
        }
    }

    /// Takes note of clients that ended, which `early` says they should not have yet.
    pub fn reap(&mut self, early: bool) -> Result<()> {
        let mut at = 0;
        while at < self.running.len() {
            let worker = &mut self.running[at];
            let Some(status) = worker
                .child
                .try_wait()
                .context("cannot wait for a client")?
            else {
                at += 1;
                continue;
            };
            let worker = self.running.swap_remove(at);
            if !status.success() || early {
                bail!(
                    "client {} ended before its time ({status}); its history: {}",
                    worker.client,
                    worker.history.display()
                );
            }
        }
        Ok(())
    }

    pub fn ask_to_end(&self) {
        for worker in &self.running {
            worker.signal(Signal::TERM);
        }
    }

    /// On an error nothing is left running.
    pub fn end_all(&mut self) {
        for worker in &mut self.running {
            let _ = worker.child.kill();
            let _ = worker.child.wait();
        }
        self.running.clear();
    }

    /// What they counted.
    pub fn counts(&self) -> Result<super::counts::Counts> {
        let mut sum = super::counts::Counts::default();
        for file in &self.files {
            let path = client::counts_file(file);
            let counts = super::counts::Counts::load(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            sum.add(&counts);
        }
        Ok(sum)
    }
}

impl Drop for Workers<'_> {
    fn drop(&mut self) {
        self.end_all();
    }
}
