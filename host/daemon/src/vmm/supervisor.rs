//! The thread beside each guest: beats the window's heart, reads what guest and QEMU say, keeps the time limits, and tells the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyv_abi::window::UserState;
use rustix::event::{PollFd, PollFlags};
use tracing::Level;

use super::console::{Lines, LogDrain, Recent, Tail, show};
use super::exit::{Ending, ExitReport, Verdict, judge};
use super::layout;
use super::qmp::Qmp;
use super::symbols::Symbols;
use crate::limits::{EXIT_GRACE, MAX_BYTES_PER_TURN, SLOW_START, SUPERVISOR_PERIOD};
use crate::sys::event::timespec;
use crate::sys::window::SharedWindow;

/// What the supervisor and the guest's handle share.
pub(crate) struct Shared {
    pub window: Arc<SharedWindow>,
    pub qmp: Qmp,
    pidfd: OwnedFd,
    progress: Mutex<Progress>,
    ended: Condvar,
}

#[derive(Default)]
struct Progress {
    verdict: Option<Verdict>,
    shutdown_by: Option<(Instant, Duration)>,
    report: Option<Arc<ExitReport>>,
}

impl Shared {
    pub fn new(window: Arc<SharedWindow>, qmp: Qmp, pidfd: OwnedFd) -> Self {
        Self {
            window,
            qmp,
            pidfd,
            progress: Mutex::default(),
            ended: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's state word as far as it makes sense.
    pub fn state(&self) -> Option<UserState> {
        UserState::from_u32(self.window.user.state.load(Ordering::Acquire))
    }

    /// How it ended, if it has.
    pub fn report(&self) -> Option<Arc<ExitReport>> {
        self.lock().report.clone()
    }

    /// Waits for the end.
    pub fn wait_report(&self) -> Arc<ExitReport> {
        let mut p = self.lock();
        loop {
            if let Some(report) = &p.report {
                return Arc::clone(report);
            }
            p = self.ended.wait(p).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for the end, at most until `deadline`.
    pub fn wait_report_until(&self, deadline: Instant) -> Option<Arc<ExitReport>> {
        let mut p = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if p.report.is_some() || left.is_zero() {
                return p.report.clone();
            }
            p = self
                .ended
                .wait_timeout(p, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Sets the limit for an end that was asked for; the earliest counts.
    pub fn expect_end(&self, limit: Duration) {
        let by = Instant::now() + limit;
        let mut p = self.lock();
        if p.shutdown_by.is_none_or(|(earlier, _)| by < earlier) {
            p.shutdown_by = Some((by, limit));
        }
    }

    /// Kills QEMU for the reason given, unless it ended or another reason came first.
    pub fn kill(&self, verdict: Verdict) {
        let mut p = self.lock();
        if p.report.is_none() && p.verdict.is_none() {
            p.verdict = Some(verdict);
            // A process that has just ended by itself cannot be signalled, and needs not.
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        }
    }
}

/// The thread's own side.
pub(crate) struct Supervisor {
    pub name: String,
    pub shared: Arc<Shared>,
    pub child: Child,
    pub started: Instant,
    pub watchdog: Duration,
    /// Whether it was said that the start takes long.
    pub slow: bool,
    pub symbols: Symbols,
    pub com1: Stream,
    pub stderr: Stream,
    pub qmp_open: bool,
    pub log: LogDrain,
    pub recent: Recent,
    pub last_word: Option<Instant>,
}

/// Whatever happens to the supervisor, nobody waits for ever and no guest goes on without it.
struct TellOnUnwind(Arc<Shared>);

impl Drop for TellOnUnwind {
    fn drop(&mut self) {
        if self.0.report().is_some() {
            return;
        }
        self.0.kill(Verdict::Stopped);
        self.0.qmp.close();
        self.0.lock().report = Some(Arc::new(ExitReport {
            ending: Ending::QemuFailed {
                status: "its supervisor failed, and it was killed; please report this".into(),
            },
            console: String::new(),
            qemu_stderr: String::new(),
            lived: Duration::ZERO,
        }));
        self.0.ended.notify_all();
    }
}

/// One stream of text: its descriptor until its end, and its last lines.
pub(crate) struct Stream {
    fd: Option<OwnedFd>,
    lines: Lines,
    tail: Tail,
}

impl Stream {
    /// Wraps a descriptor and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self {
            fd: Some(fd),
            lines: Lines::default(),
            tail: Tail::default(),
        })
    }

    /// Reads what is there, a bounded amount, and closes at the end of the stream.
    fn read(&mut self) -> Vec<String> {
        let mut got = Vec::new();
        if let Some(fd) = &self.fd
            && read_some(fd.as_fd(), |bytes| self.lines.feed(bytes, |l| got.push(l)))
        {
            self.lines.finish(|l| got.push(l));
            self.fd = None;
        }
        got
    }

    /// What is left without an end of line.
    fn rest(&mut self) -> Vec<String> {
        let mut rest = Vec::new();
        self.lines.finish(|l| rest.push(l));
        rest
    }
}

/// Reads what is there, a bounded amount; `true` at the end of the stream.
fn read_some(fd: BorrowedFd<'_>, mut take: impl FnMut(&[u8])) -> bool {
    let mut buf = [0; 4096];
    for _ in 0..MAX_BYTES_PER_TURN / buf.len() {
        match rustix::io::read(fd, &mut buf) {
            Ok(0) => return true,
            Ok(n) => take(&buf[..n]),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return false,
            Err(_) => return true,
        }
    }
    false
}

impl Supervisor {
    /// Runs until QEMU has ended and its story is told.
    pub fn run(mut self) {
        let _guard = TellOnUnwind(Arc::clone(&self.shared));
        let status = loop {
            layout::beat(&self.shared.window);
            self.wait_for_something();
            self.read_all();
            match self.child.try_wait() {
                Ok(None) => self.check_limits(),
                Ok(Some(status)) => break Ok(status),
                Err(e) => break Err(e),
            }
        };
        // What QEMU wrote before its end is still in the sockets; nobody writes any more, so this ends.
        while self.read_all() {}
        for line in self.com1.rest() {
            self.console_line(line);
        }
        self.shared.qmp.close();
        let state = self.shared.state();
        let code = self
            .shared
            .window
            .user
            .exit_code
            .load(Ordering::Acquire)
            .cast_signed();
        let mut progress = self.shared.lock();
        let ending = match status {
            Ok(status) => judge(
                status,
                state,
                code,
                &self.shared.qmp.events(),
                progress.verdict,
            ),
            Err(e) => Ending::QemuFailed {
                status: format!("cannot be waited for: {e}"),
            },
        };
        progress.report = Some(Arc::new(ExitReport {
            ending,
            console: self.com1.tail.text(),
            qemu_stderr: self.stderr.tail.text(),
            lived: self.started.elapsed(),
        }));
        drop(progress);
        self.shared.ended.notify_all();
    }

    fn wait_for_something(&self) {
        let mut fds = vec![PollFd::new(&self.shared.pidfd, PollFlags::IN)];
        fds.extend(
            [&self.com1.fd, &self.stderr.fd]
                .into_iter()
                .flatten()
                .map(|f| PollFd::new(f, PollFlags::IN)),
        );
        if self.qmp_open {
            fds.push(PollFd::new(&self.shared.qmp, PollFlags::IN));
        }
        let _ = rustix::event::poll(&mut fds, Some(&timespec(SUPERVISOR_PERIOD)));
    }

    /// Reads everything once; `true` if anything was there.
    fn read_all(&mut self) -> bool {
        // COM1 is read before the log and shown after it: the guest writes a panic to the log first, so what COM1
        // repeats is known by then.
        let console = self.com1.read();
        let mut any = !console.is_empty();
        let Self {
            log,
            shared,
            symbols,
            recent,
            name,
            ..
        } = self;
        log.drain(&shared.window.log, |r| {
            any = true;
            for line in r.text.split('\n') {
                recent.add(line);
                let meaning = symbols.annotate(line);
                show(name, r.level, meaning.as_deref().unwrap_or(line));
            }
        });
        for line in console {
            self.console_line(line);
        }
        for line in self.stderr.read() {
            any = true;
            // Under TCG QEMU names each feature of the CPU model that it has not; nobody can act on that.
            if line.contains("TCG doesn't support requested feature") {
                tracing::debug!(guest = self.name, "{line}");
                continue;
            }
            tracing::warn!(guest = self.name, "{line}");
            self.stderr.tail.push(line);
        }
        if self.qmp_open {
            let qmp = &self.shared.qmp;
            let closed = read_some(qmp.as_fd(), |bytes| {
                any = true;
                qmp.feed(bytes);
            });
            if closed {
                qmp.close();
                self.qmp_open = false;
            }
        }
        any
    }

    fn console_line(&mut self, line: String) {
        let seen = self.recent.take(&line);
        let text = self.symbols.annotate(&line).unwrap_or(line);
        if !seen {
            show(&self.name, Level::WARN, &text);
        }
        self.com1.tail.push(text);
    }

    fn check_limits(&mut self) {
        let state = self.shared.state();
        if matches!(state, Some(UserState::Exited | UserState::Panicked)) {
            let since = *self.last_word.get_or_insert_with(Instant::now);
            if since.elapsed() > EXIT_GRACE {
                self.shared.kill(Verdict::Lingering);
            }
            return;
        }
        self.last_word = None;
        if self.shared.qmp.events().stopped {
            self.shared.kill(Verdict::KvmInternalError);
            return;
        }
        let main_runs = matches!(state, Some(UserState::Running | UserState::Ready));
        if !main_runs && !self.slow && self.started.elapsed() > SLOW_START {
            self.slow = true;
            tracing::warn!(
                guest = self.name,
                "it takes long to start, and gets {:.0?}: others use this machine's CPUs, or it hangs",
                self.watchdog
            );
        }
        if !main_runs && self.started.elapsed() > self.watchdog {
            self.shared.kill(Verdict::Watchdog {
                limit: self.watchdog,
                state,
            });
            return;
        }
        let shutdown_by = self.shared.lock().shutdown_by;
        if let Some((by, limit)) = shutdown_by
            && Instant::now() > by
        {
            self.shared.kill(Verdict::ShutdownTimeout { limit });
        }
    }
}
