//! A store in a guest, started by the command that users type.

use std::ffi::OsStr;

use rustix::process::Signal;

use crate::{Accelerator, PATIENCE, Run, Running, Sandbox};

/// A running `kv appliance`.
#[derive(Debug)]
pub struct Appliance<'a> {
    sandbox: &'a Sandbox,
    running: Running,
    name: String,
}

impl<'a> Appliance<'a> {
    /// Starts one with 64 MiB and waits until it serves.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start(sandbox: &'a Sandbox, accelerator: Accelerator) -> Self {
        Self::start_with(sandbox, accelerator, ["--memory", "64M"])
    }

    /// The same with other arguments.
    ///
    /// # Panics
    /// When it does not serve.
    #[must_use]
    pub fn start_with<A: AsRef<OsStr>>(
        sandbox: &'a Sandbox,
        accelerator: Accelerator,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        let mut command = sandbox.kv_command(["appliance", "--accel", accelerator.name()]);
        command.args(args);
        let mut running = sandbox.spawn(command);
        let name = running.until(PATIENCE, |err| {
            let line = err.lines().find(|l| l.contains(": up in "))?;
            Some(line.split_once(": ")?.0.to_owned())
        });
        Self {
            sandbox,
            running,
            name,
        }
    }

    /// Its instance's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The command that serves it.
    pub fn running(&mut self) -> &mut Running {
        &mut self.running
    }

    /// Ctrl-C: it ends in order. Gives what it said.
    ///
    /// # Panics
    /// When it does not end with 0.
    pub fn interrupt(mut self) -> Run {
        self.running.signal(Signal::INT);
        self.running.wait(PATIENCE).ok()
    }

    /// Ctrl-C, and nothing is left of it.
    ///
    /// # Panics
    /// When something is.
    pub fn end(self) {
        let sandbox = self.sandbox;
        self.interrupt();
        sandbox.assert_clean();
    }

    /// Kills the command that serves it.
    pub fn kill(self) {
        self.running.kill();
    }

    /// Waits for an end of its own doing, or somebody else's.
    #[must_use]
    pub fn wait(self) -> Run {
        self.running.wait(PATIENCE)
    }
}
