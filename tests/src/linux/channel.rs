//! The conversation with a peer's first process, `init.sh`, over a serial port.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::limits::{PEER_ANSWER, PEER_COMMAND};

/// Names of jobs: a number.
pub(super) type Id = u32;

/// How a command in a peer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) status: i32,
    pub(super) out: Vec<u8>,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Silence {
    /// Not in time.
    Late,
    /// The other end has gone.
    Gone,
}

#[derive(Debug, Default)]
struct State {
    ready: bool,
    gone: bool,
    jobs: HashMap<Id, JobState>,
}

#[derive(Debug, Default)]
struct JobState {
    started: bool,
    text: String,
    status: Option<i32>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a line of the peer's. What is none of ours (a program that writes to the port) is left out.
    fn line(&self, line: &str) {
        let mut words = line.split_whitespace();
        let (verb, id) = (words.next(), words.next().and_then(|w| w.parse().ok()));
        let mut state = self.lock();
        match (verb, id) {
            (Some("ready"), None) => state.ready = true,
            (Some(verb), Some(id)) => {
                let Some(job) = state.jobs.get_mut(&id) else {
                    return;
                };
                match verb {
                    "started" => job.started = true,
                    "data" => job.text.extend(words),
                    "done" => job.status = words.next().and_then(|w| w.parse().ok()),
                    _ => return,
                }
            }
            _ => return,
        }
        drop(state);
        self.news.notify_all();
    }

    fn wait<T>(
        &self,
        limit: Duration,
        show: impl Fn(&mut State) -> Option<T>,
    ) -> Result<T, Silence> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(found) = show(&mut state) {
                return Ok(found);
            }
            if state.gone {
                return Err(Silence::Gone);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Silence::Late);
            }
            let waited = self.news.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Our end. Many commands may run at once.
#[derive(Clone, Debug)]
pub(super) struct Channel {
    shared: Arc<Shared>,
    /// Number of the next job. Held while a command is given: the peer's terminal has room for one.
    next: Arc<Mutex<Id>>,
    port: Arc<UnixStream>,
}

impl Channel {
    /// Takes `port`; a thread reads it until the other end goes.
    pub(super) fn new(port: UnixStream) -> std::io::Result<Self> {
        let reader = BufReader::new(port.try_clone()?);
        let shared = Arc::new(Shared::default());
        let listener = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("linux-peer".into())
            .spawn(move || {
                for line in reader.split(b'\n').map_while(Result::ok) {
                    listener.line(&String::from_utf8_lossy(&line));
                }
                listener.lock().gone = true;
                listener.news.notify_all();
            })?;
        Ok(Self {
            shared,
            next: Arc::default(),
            port: Arc::new(port),
        })
    }

    /// Waits until the peer takes commands.
    pub(super) fn ready(&self, limit: Duration) -> Result<(), Silence> {
        self.shared.wait(limit, |s| s.ready.then_some(()))
    }

    /// Starts `command`, a line or several of shell.
    pub(super) fn start(&self, command: &str) -> Result<Id, Silence> {
        assert!(
            command.len() <= PEER_COMMAND,
            "a command for a peer has at most {PEER_COMMAND} bytes: {command}"
        );
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let id = *next;
        *next += 1;
        self.shared.lock().jobs.insert(id, JobState::default());
        let text = BASE64_STANDARD.encode(command);
        self.send(&format!("run {id} {text}\n"))?;
        self.shared
            .wait(PEER_ANSWER, |s| s.jobs.get(&id)?.started.then_some(id))
    }

    /// Ends what job `id` runs.
    pub(super) fn kill(&self, id: Id) -> Result<(), Silence> {
        let _one_at_a_time = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.send(&format!("kill {id}\n"))
    }

    fn send(&self, line: &str) -> Result<(), Silence> {
        let sent = (&*self.port).write_all(line.as_bytes());
        sent.map_err(|_| Silence::Gone)
    }

    /// Whether job `id` has ended.
    pub(super) fn ended(&self, id: Id) -> bool {
        let state = self.shared.lock();
        state.gone || state.jobs.get(&id).is_none_or(|j| j.status.is_some())
    }

    /// Waits for the end of job `id`, and forgets it.
    pub(super) fn wait(&self, id: Id, limit: Duration) -> Result<Ended, Silence> {
        self.shared.wait(limit, |s| {
            let status = s.jobs.get(&id)?.status?;
            let text = s.jobs.remove(&id)?.text;
            // A line that another program spoiled: what is readable of it is of use in a message.
            let out = BASE64_STANDARD
                .decode(&text)
                .unwrap_or_else(|_| text.into_bytes());
            Some(Ended { status, out })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn answers_find_their_jobs() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours).unwrap();
        let peer = std::thread::spawn(move || {
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            let say = |text: &str| (&theirs).write_all(text.as_bytes()).unwrap();
            say("noise\nready\n");
            assert_eq!(lines.next().unwrap().unwrap(), "run 0 ZWNobyBh");
            say("started 0\n");
            assert_eq!(lines.next().unwrap().unwrap(), "run 1 bHM=");
            say("started 1\ndata 1 eA==\ndata 0 YWJ\ndone 1 2\n");
            assert_eq!(lines.next().unwrap().unwrap(), "kill 0");
            say("data 0 j\ndata 7 eA==\ndone 0 137\n");
        });
        channel.ready(SOON).unwrap();
        let first = channel.start("echo a").unwrap();
        let second = channel.start("ls").unwrap();
        let ended = channel.wait(second, SOON).unwrap();
        assert_eq!((ended.status, &*ended.out), (2, &b"x"[..]));
        assert_eq!(channel.wait(first, Duration::ZERO), Err(Silence::Late));
        assert!(!channel.ended(first));
        channel.kill(first).unwrap();
        let ended = channel.wait(first, SOON).unwrap();
        assert_eq!((ended.status, &*ended.out), (137, &b"abc"[..]));
        peer.join().unwrap();
        assert_eq!(channel.start("ls"), Err(Silence::Gone));
    }
}
