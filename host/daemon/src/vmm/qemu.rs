//! One guest's QEMU: its start, what can be asked of it, its end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hyv_abi::window::UserState;
use rustix::process::{Pid, PidfdFlags};

use super::config::{ConfigError, GuestConfig, Inherited, command_line};
use super::console::{LogDrain, Recent};
use super::exit::{ExitReport, Verdict};
use super::ivshmem::{Doorbells, Server};
use super::layout::{HeaderInfo, RamRegion, next_generation, q35_regions, write_header};
use super::net::{self, Backend, Forward};
use super::qmp::{Qmp, QmpError, VcpuStats};
use super::supervisor::{Shared, Stream, Supervisor};
use super::symbols::Symbols;
use crate::accel::{Accel, AccelKind, QemuBinary};
use crate::limits::SHUTDOWN_GRACE;
use crate::sys::memory::{Mapping, MemoryError, check_available, sealed_memfd};
use crate::sys::process::spawn_bound;
use crate::sys::socket::{SocketError, stream_pair};
use crate::sys::window::SharedWindow;
use crate::sys::{clock, cpu};

/// A guest that could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// Something in its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its RAM or window.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its sockets.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Descriptors or threads.
    #[error("cannot start a guest: {0}")]
    Io(#[from] io::Error),
    /// QEMU did not start.
    #[error("cannot start {path}: {source}")]
    Spawn {
        /// The program.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A guest that did not get where it was waited for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// It ended first.
    #[error("{0}")]
    Ended(Arc<ExitReport>),
    /// Time was up; it still runs.
    #[error(
        "the guest is not {wanted:?} after {:.0?}; its state is {state:?}",
        limit
    )]
    Timeout {
        /// What was waited for.
        wanted: UserState,
        /// The limit.
        limit: Duration,
        /// Where it is, if that makes sense.
        state: Option<UserState>,
    },
}

/// A running guest. Dropping it ends the guest at once.
pub struct Qemu {
    shared: Arc<Shared>,
    ram: Arc<Mapping>,
    ram_fd: OwnedFd,
    regions: Vec<RamRegion>,
    bells: Doorbells,
    _ivshmem: Server,
    supervisor: Option<JoinHandle<()>>,
    pid: u32,
    kind: AccelKind,
    generation: u32,
    started: Instant,
    started_ns: u64,
}

impl std::fmt::Debug for Qemu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qemu")
            .field("pid", &self.pid)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl Qemu {
    /// Creates the guest's memory and window and starts QEMU on them.
    ///
    /// # Errors
    /// One variant for each thing that was needed. What QEMU itself finds wrong shows in the [`ExitReport`].
    pub fn launch(
        config: &GuestConfig,
        binary: &QemuBinary,
        accel: &Accel,
    ) -> Result<Self, LaunchError> {
        config.check()?;
        let ram_len = config.ram_bytes();
        check_available(ram_len)?;
        let ram_fd = sealed_memfd("hyv-ram", ram_len)?;
        let ram = Arc::new(Mapping::new(&ram_fd, ram_len)?);
        let window = Arc::new(SharedWindow::create()?);
        let regions = q35_regions(ram_len);
        let generation = next_generation();
        // TCG's counter has a zero of its own, and no promise of a rate.
        let tsc_hz = if accel.kind == AccelKind::Kvm {
            clock::tsc_hz()
        } else {
            0
        };
        let info = HeaderInfo {
            generation,
            regions: &regions,
            tsc_hz,
            spin_hint: config.spin_hint,
        };

        let bells = Doorbells::new()?;
        let (ivshmem, ivshmem_fd) = Server::start(window.as_fd(), &bells)?;
        let (qmp, qmp_fd) = stream_pair()?;
        let (com1, com1_fd) = stream_pair()?;
        let qmp = Qmp::new(qmp)?;
        let com1 = Stream::new(com1)?;

        let backend = config.net.as_ref().map(Backend::open).transpose();
        let tap = match backend.map_err(ConfigError::Net)? {
            Some(Backend::Tap(tap)) => Some(tap),
            Some(Backend::User) | None => None,
        };

        let mut inherited = vec![
            ram_fd.as_fd(),
            ivshmem_fd.as_fd(),
            qmp_fd.as_fd(),
            com1_fd.as_fd(),
        ];
        inherited.extend(tap.iter().map(|t| t.fd().as_fd()));
        let numbers = Inherited {
            ram: ram_fd.as_raw_fd(),
            ivshmem: ivshmem_fd.as_raw_fd(),
            qmp: qmp_fd.as_raw_fd(),
            com1: com1_fd.as_raw_fd(),
            tap: tap.as_ref().map(|t| (t.fd().as_raw_fd(), t.mtu())),
        };
        let mut command = Command::new(&binary.path);
        command.args(command_line(config, binary, accel, numbers, generation));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        tracing::debug!(?command, "starting QEMU");

        write_header(&window, &info);
        let started_ns = clock::monotonic_ns();
        let started = Instant::now();
        let spawned = spawn_bound(command, &inherited);
        let mut child = spawned.map_err(|source| LaunchError::Spawn {
            path: binary.path.clone(),
            source,
        })?;
        let pid = child.id();
        let prepared = (|| {
            let raw = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::InvalidData)?;
            let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty())?;
            let stderr = child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
            Ok::<_, io::Error>((pidfd, Stream::new(stderr.into())?))
        })();
        let (pidfd, stderr) = match prepared {
            Ok(p) => p,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(e.into());
            }
        };
        let shared = Arc::new(Shared::new(window, qmp, pidfd));
        let supervisor = Supervisor {
            name: config.name.clone(),
            shared: Arc::clone(&shared),
            child,
            started,
            watchdog: config.watchdog(),
            slow: false,
            symbols: Symbols::new(&config.image, config.symbols.as_deref()),
            com1,
            stderr,
            qmp_open: true,
            log: LogDrain::default(),
            recent: Recent::default(),
            last_word: None,
        };
        let thread = std::thread::Builder::new().name("hyv-supervisor".into());
        let supervisor = match thread.spawn(move || supervisor.run()) {
            Ok(handle) => handle,
            Err(e) => {
                shared.kill(Verdict::Stopped);
                return Err(e.into());
            }
        };
        Ok(Self {
            shared,
            ram,
            ram_fd,
            regions,
            bells,
            _ivshmem: ivshmem,
            supervisor: Some(supervisor),
            pid,
            kind: accel.kind,
            generation,
            started,
            started_ns,
        })
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// When QEMU's process was started.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The same, in ns of `CLOCK_MONOTONIC`.
    #[must_use]
    pub fn started_ns(&self) -> u64 {
        self.started_ns
    }

    /// What runs it.
    #[must_use]
    pub fn accel(&self) -> AccelKind {
        self.kind
    }

    /// The generation in its window.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Its RAM, by RAM offset.
    #[must_use]
    pub fn ram(&self) -> &Arc<Mapping> {
        &self.ram
    }

    /// Its RAM's file.
    #[must_use]
    pub fn ram_fd(&self) -> BorrowedFd<'_> {
        self.ram_fd.as_fd()
    }

    /// Where its RAM lies in guest-physical addresses.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Its window.
    #[must_use]
    pub fn window(&self) -> &Arc<SharedWindow> {
        &self.shared.window
    }

    /// Its doorbells.
    #[must_use]
    pub fn doorbells(&self) -> &Doorbells {
        &self.bells
    }

    /// The guest's own word about itself; `None` when it is garbage.
    #[must_use]
    pub fn state(&self) -> Option<UserState> {
        self.shared.state()
    }

    /// Waits until the guest says that it is at least as far as `wanted` (`Booting`, `Running` or `Ready`).
    ///
    /// # Errors
    /// `Ended` if it ended first, `Timeout`.
    pub fn wait_state(&self, wanted: UserState, limit: Duration) -> Result<(), WaitError> {
        let deadline = Instant::now() + limit;
        loop {
            let state = self.state();
            let alive = |s: UserState| !matches!(s, UserState::Exited | UserState::Panicked);
            if state.is_some_and(|s| alive(s) && s as u32 >= wanted as u32) {
                return Ok(());
            }
            // Short while it boots, which takes some 100 ms: this is part of what a user waits for.
            let nap = Instant::now() + Duration::from_micros(500);
            if let Some(report) = self.shared.wait_report_until(nap.min(deadline)) {
                return Err(WaitError::Ended(report));
            }
            if Instant::now() >= deadline {
                return Err(WaitError::Timeout {
                    wanted,
                    limit,
                    state,
                });
            }
        }
    }

    /// KVM's exit counters so far.
    ///
    /// # Errors
    /// As [`Qmp::vcpu_stats`]; under TCG QEMU refuses.
    pub fn vcpu_stats(&self) -> Result<VcpuStats, QmpError> {
        self.shared.qmp.vcpu_stats()
    }

    /// The ports of this host that lead to the guest, as QEMU has them: where port 0 was asked for, the one that was free.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn forwards(&self) -> Result<Vec<Forward>, QmpError> {
        let arguments = serde_json::json!({"command-line": "info usernet"});
        let answer = self
            .shared
            .qmp
            .execute("human-monitor-command", arguments)?;
        Ok(net::parse_usernet(answer.as_str().unwrap_or_default()))
    }

    /// Thread ids of its vCPUs.
    ///
    /// # Errors
    /// As [`Qmp::vcpu_threads`].
    pub fn vcpu_threads(&self) -> Result<Vec<i32>, QmpError> {
        self.shared.qmp.vcpu_threads()
    }

    /// Lets its vCPUs run on `cpus` only.
    ///
    /// # Errors
    /// As [`Qmp::vcpu_threads`], and `Io` when the CPUs cannot be used.
    pub fn pin_vcpus(&self, cpus: &[usize]) -> Result<(), QmpError> {
        for tid in self.vcpu_threads()? {
            cpu::pin_thread(tid, cpus)?;
        }
        Ok(())
    }

    /// Lets every other thread of QEMU (its main loop, its workers) run on `cpus` only, so that none of them takes
    /// time from a vCPU or an engine that has a CPU of its own.
    ///
    /// # Errors
    /// As [`Self::pin_vcpus`].
    pub fn pin_others(&self, cpus: &[usize]) -> Result<(), QmpError> {
        let vcpus = self.vcpu_threads()?;
        for entry in std::fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let tid = entry?.file_name().to_str().and_then(|n| n.parse().ok());
            let Some(tid) = tid.filter(|t| !vcpus.contains(t)) else {
                continue;
            };
            match cpu::pin_thread(tid, cpus) {
                // Workers come and go.
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// QEMU's monitor, for what has no method here.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.shared.qmp
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exit_report(&self) -> Option<Arc<ExitReport>> {
        self.shared.report()
    }

    /// Waits for its end.
    #[must_use]
    pub fn wait(&self) -> Arc<ExitReport> {
        self.shared.wait_report()
    }

    /// Waits for its end, at most for `limit`.
    #[must_use]
    pub fn wait_timeout(&self, limit: Duration) -> Option<Arc<ExitReport>> {
        self.shared.wait_report_until(Instant::now() + limit)
    }

    /// Asks the guest to end, and kills it if it has not done so in [`SHUTDOWN_GRACE`]. Returns at once.
    ///
    /// # Errors
    /// When the guest cannot be woken; it is killed in time all the same.
    pub fn request_shutdown(&self) -> io::Result<()> {
        self.shared
            .window
            .header
            .shutdown
            .store(1, Ordering::Release);
        self.shared.expect_end(SHUTDOWN_GRACE);
        self.bells.wake.signal()
    }

    /// Asks the guest to end and waits until it has.
    #[must_use]
    pub fn shutdown(&self) -> Arc<ExitReport> {
        if let Err(e) = self.request_shutdown() {
            tracing::warn!("cannot wake the guest: {e}");
        }
        self.wait()
    }

    /// Ends it at once.
    #[must_use]
    pub fn kill(&self) -> Arc<ExitReport> {
        self.shared.kill(Verdict::Stopped);
        self.wait()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.shared.kill(Verdict::Stopped);
        if let Some(thread) = self.supervisor.take() {
            let _ = thread.join();
        }
    }
}
