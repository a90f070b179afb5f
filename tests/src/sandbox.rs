//! A runtime folder of a test's own.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal, kill_process};

use crate::run::{Run, Running, input};
use crate::{PATIENCE, eventually, programs};

/// Memory of guests and windows is in files of 2 MiB and more.
const SMALLEST_OF_OURS: u64 = 2 << 20;

/// A runtime folder of a test's own: instances started in it meet no others. When it goes, so does every process that
/// was started in it.
#[derive(Debug)]
pub struct Sandbox {
    folder: tempfile::TempDir,
    shm: BTreeSet<OsString>,
    runs: AtomicU32,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    /// An empty one.
    ///
    /// # Panics
    /// When there is no room for it.
    #[must_use]
    pub fn new() -> Self {
        // Short, because a socket's path is; mode 0700.
        let folder = tempfile::Builder::new().prefix("hyv-e2e-").tempdir();
        let folder = folder.expect("a temporary folder can be made");
        fs::create_dir(folder.path().join("files")).expect("a folder can be made in it");
        Self {
            folder,
            shm: shared_memory_files(),
            runs: AtomicU32::new(0),
        }
    }

    /// What `XDG_RUNTIME_DIR` is for commands in it.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Path of a file for the test's own use.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("files").join(name)
    }

    /// Writes such a file.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.file(name);
        fs::write(&path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }

    /// `program` as a command of this sandbox, in the folder of its files.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("XDG_RUNTIME_DIR", self.path())
            .env("HYV_IMAGE", programs::image())
            .env("RUST_BACKTRACE", "1")
            .env_remove("HYV_COMMAND")
            .current_dir(self.file(""))
            .stdin(Stdio::null());
        command
    }

    /// Starts a command.
    #[must_use]
    pub fn spawn(&self, command: Command) -> Running {
        let name = format!("run-{}", self.runs.fetch_add(1, Ordering::Relaxed));
        Running::start(command, self.path(), &name)
    }

    /// Runs a command to its end.
    #[must_use]
    pub fn run(&self, command: Command) -> Run {
        self.spawn(command).wait(4 * PATIENCE)
    }

    /// `kv` with `args`.
    #[must_use]
    pub fn kv_command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = self.command(programs::kv());
        command.args(args);
        command
    }

    /// Runs `kv ARGS`.
    #[must_use]
    pub fn kv<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Run {
        self.run(self.kv_command(args))
    }

    /// Runs `kv ARGS` with `bytes` on standard input.
    #[must_use]
    pub fn kv_with_input<A: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
        bytes: &[u8],
    ) -> Run {
        let mut command = self.kv_command(args);
        command.stdin(input(bytes));
        self.run(command)
    }

    /// Runs `hyv-host ARGS`.
    #[must_use]
    pub fn hyv_host<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Run {
        self.run(self.hyv_host_command(args))
    }

    /// `hyv-host` with `args`.
    #[must_use]
    pub fn hyv_host_command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = self.command(programs::hyv_host());
        command.args(args);
        command
    }

    /// The counters of the store, as `kv stats --json` gives them.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn stats(&self) -> serde_json::Value {
        let run = self.kv(["stats", "--json"]).ok();
        serde_json::from_slice(&run.out).unwrap_or_else(|e| panic!("{e}: {}", run.story()))
    }

    /// One counter of the store.
    ///
    /// # Panics
    /// When there is none of this name.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        self.stats()[name]
            .as_u64()
            .unwrap_or_else(|| panic!("no counter {name}"))
    }

    /// Folder of instance `name`.
    #[must_use]
    pub fn instance(&self, name: &str) -> PathBuf {
        self.path().join("hyv").join(name)
    }

    /// Processes of this sandbox by their environment, which children inherit: id and command line.
    #[must_use]
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mark = [
            b"XDG_RUNTIME_DIR=",
            self.path().as_os_str().as_bytes(),
            b"\0",
        ]
        .concat();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            // Gone meanwhile, or a zombie: neither has an environment.
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            if pid != std::process::id() && environment.windows(mark.len()).any(|w| w == mark) {
                let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let line: String = String::from_utf8_lossy(&line).replace('\0', " ");
                found.push((pid, line));
            }
        }
        found
    }

    /// Process ids of the QEMUs that run guests here. (A trial of KVM is a QEMU without a guest.)
    #[must_use]
    pub fn guests(&self) -> Vec<u32> {
        let all = self.processes().into_iter();
        let guests =
            all.filter(|(_, line)| line.contains("qemu-system") && line.contains("-kernel"));
        guests.map(|(pid, _)| pid).collect()
    }

    /// Nothing is left of what ran here: no process, no instance's folder, no shared memory.
    ///
    /// # Panics
    /// When something is.
    pub fn assert_clean(&self) {
        self.assert_no_process();
        let left: Vec<_> = fs::read_dir(self.path().join("hyv"))
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| e.path().is_dir())
            .map(|e| e.path())
            .collect();
        assert!(left.is_empty(), "runtime folders are left: {left:?}");
    }

    /// Nothing runs here and no shared memory is left; a killed instance's folder may be, until the next start.
    ///
    /// # Panics
    /// When something is.
    pub fn assert_no_process(&self) {
        eventually("every process of the sandbox has ended", || {
            self.processes().is_empty()
        });
        let left: Vec<_> = shared_memory_files()
            .difference(&self.shm)
            .cloned()
            .collect();
        assert!(left.is_empty(), "left in /dev/shm: {left:?}");
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        for (pid, line) in self.processes() {
            if !std::thread::panicking() {
                eprintln!("killed at the end of the test: {line}");
            }
            if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Files in /dev/shm that could hold a guest's memory.
fn shared_memory_files() -> BTreeSet<OsString> {
    let ours = |e: &fs::DirEntry| e.metadata().is_ok_and(|m| m.size() >= SMALLEST_OF_OURS);
    let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    entries.filter(ours).map(|e| e.file_name()).collect()
}
