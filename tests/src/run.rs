//! Commands under a time limit, and what they said.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use hyv_host::sys::process::spawn_bound;
use rustix::process::{Pid, Signal, kill_process};

/// A command that was started. Dropped while it runs, it is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    what: String,
    out: PathBuf,
    err: PathBuf,
    over: Option<ExitStatus>,
}

impl Running {
    /// Starts `command` with its output in files of `folder` that begin with `name`, so that no pipe fills up. It dies
    /// with this process.
    pub(crate) fn start(mut command: Command, folder: &Path, name: &str) -> Self {
        let what = format!("{command:?}");
        let file = |ending: &str| folder.join(format!("{name}.{ending}"));
        let (out, err) = (file("out"), file("err"));
        let create = |path: &Path| File::create(path).expect("the sandbox can be written to");
        command.stdout(create(&out)).stderr(create(&err));
        let child = spawn_bound(command, &[]).unwrap_or_else(|e| panic!("{what}: {e}"));
        Self {
            child,
            what,
            out,
            err,
            over: None,
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output so far.
    #[must_use]
    pub fn out(&self) -> String {
        text(&self.out)
    }

    /// Its standard error so far.
    #[must_use]
    pub fn err(&self) -> String {
        text(&self.err)
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        if self.over.is_none() {
            self.over = self.child.try_wait().expect("a child can be waited for");
        }
        self.over.is_none()
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When it has ended.
    pub fn signal(&mut self, signal: Signal) {
        assert!(self.runs(), "{} has ended\n{}", self.what, self.err());
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap_or_else(|e| panic!("{}: {e}", self.what));
    }

    /// Waits until `show` finds something in what standard error says.
    ///
    /// # Panics
    /// When it ends first, or after `limit`.
    pub fn until<T>(&mut self, limit: Duration, show: impl Fn(&str) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            // Asked first: what was said before the end counts.
            let runs = self.runs();
            if let Some(found) = show(&self.err()) {
                return found;
            }
            let late = start.elapsed() > limit;
            assert!(
                runs && !late,
                "{}: not said in time\n{}",
                self.what,
                self.err()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// After `limit`; it is killed then.
    #[must_use]
    pub fn wait(mut self, limit: Duration) -> Run {
        let start = Instant::now();
        while self.runs() {
            if start.elapsed() > limit {
                let _ = self.child.kill();
                panic!(
                    "{} did not end within {limit:?}\n{}{}",
                    self.what,
                    self.out(),
                    self.err()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = self.over.expect("it has ended");
        let out = std::fs::read(&self.out).expect("its output is there");
        Run {
            what: self.what.clone(),
            status,
            out,
            err: self.err(),
        }
    }

    /// Kills it without a chance to clean up, as the kernel does when memory is short.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.runs() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = std::fs::remove_file(&self.out);
        let _ = std::fs::remove_file(&self.err);
    }
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

/// A command that has ended.
#[derive(Clone, Debug)]
pub struct Run {
    /// What was run.
    pub what: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub out: Vec<u8>,
    /// Its standard error.
    pub err: String,
}

impl Run {
    /// Its standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    /// Both of its outputs with what was run, for messages.
    #[must_use]
    pub fn story(&self) -> String {
        let shown: String = self.text().chars().take(4000).collect();
        format!(
            "{}\n{}\n--- out\n{shown}\n--- err\n{}",
            self.what, self.status, self.err
        )
    }

    /// It ended with 0, and well.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.code(0)
    }

    /// It ended with `code`.
    ///
    /// # Panics
    /// When it did not, or has panicked.
    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert!(
            self.status.code() == Some(code),
            "expected {code}: {}",
            self.story()
        );
        self.no_panic()
    }

    /// It ended by itself, not with 0, and its standard error has each of `words`.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn fails(self, words: &[&str]) -> Self {
        let code = self.status.code();
        assert!(
            code.is_some_and(|c| c != 0),
            "expected an error: {}",
            self.story()
        );
        for word in words {
            assert!(
                self.err.contains(word),
                "`{word}` is not in the message: {}",
                self.story()
            );
        }
        self.no_panic()
    }

    #[track_caller]
    fn no_panic(self) -> Self {
        assert!(
            !self.err.contains("panicked at"),
            "a panic reached the user: {}",
            self.story()
        );
        self
    }
}

/// Standard input with `bytes`, from an unnamed file.
pub(crate) fn input(bytes: &[u8]) -> Stdio {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile().expect("a temporary file can be made");
    file.write_all(bytes)
        .expect("a temporary file can be written");
    file.rewind().expect("a temporary file can be read");
    file.into()
}
