//! QEMU's monitor: as much of QMP as a launcher needs.
//!
//! The supervisor reads and calls [`Qmp::feed`]; anyone may ask, and waits for the answer with a time limit.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::limits::{MAX_QMP_LINE, QMP_TIMEOUT};

/// What can go wrong with the monitor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// QEMU ended.
    #[error("QEMU has ended, so its monitor answers no more")]
    Closed,
    /// No answer.
    #[error("QEMU's monitor did not answer `{command}` within {} s", QMP_TIMEOUT.as_secs())]
    Timeout {
        /// The command.
        command: String,
    },
    /// QEMU said no.
    #[error("QEMU's monitor refused `{command}`: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// Its words.
        reason: String,
    },
    /// An answer of another form than documented.
    #[error("QEMU's monitor answered `{command}` in an unknown form: {what} is missing")]
    Unexpected {
        /// The command.
        command: String,
        /// What was looked for.
        what: &'static str,
    },
    /// The monitor could not be written to.
    #[error("cannot reach QEMU's monitor: {0}")]
    Io(#[from] io::Error),
}

/// KVM's counters of VM exits since the guest started, summed over its vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuStats {
    /// All exits.
    pub exits: u64,
    /// Exits for the host's interrupts: its timer ticks, mostly.
    pub irq_exits: u64,
    /// Exits for device memory.
    pub mmio_exits: u64,
    /// Exits for ports.
    pub io_exits: u64,
    /// Exits because the guest had nothing to do.
    pub halt_exits: u64,
}

impl VcpuStats {
    /// Exits that the guest's own doing caused.
    #[must_use]
    pub const fn by_guest(&self) -> u64 {
        self.exits.saturating_sub(self.irq_exits)
    }

    /// What happened between `earlier` and `self`.
    #[must_use]
    pub const fn since(&self, earlier: &Self) -> Self {
        Self {
            exits: self.exits.saturating_sub(earlier.exits),
            irq_exits: self.irq_exits.saturating_sub(earlier.irq_exits),
            mmio_exits: self.mmio_exits.saturating_sub(earlier.mmio_exits),
            io_exits: self.io_exits.saturating_sub(earlier.io_exits),
            halt_exits: self.halt_exits.saturating_sub(earlier.halt_exits),
        }
    }
}

/// What QEMU said by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Reason of the last `SHUTDOWN`: `guest-reset`, `guest-shutdown`, `host-signal`, `host-qmp-quit`, …
    pub shutdown: Option<String>,
    /// The guest stopped running: KVM could not go on, since nobody here asks for it.
    pub stopped: bool,
}

#[derive(Default)]
struct State {
    partial: Vec<u8>,
    greeted: bool,
    closed: bool,
    next_id: u64,
    waiting: HashMap<u64, Option<Value>>,
    events: Events,
}

/// The monitor of one QEMU.
pub struct Qmp {
    socket: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Qmp {
    /// Wraps this side's end of the monitor's socket, and leaves it non-blocking. Commands are accepted once QEMU has greeted.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what QEMU wrote. A line that is no JSON, or far too long, is dropped.
    pub fn feed(&self, bytes: &[u8]) {
        let mut s = self.lock();
        for part in bytes.split_inclusive(|b| *b == b'\n') {
            if s.partial.len() + part.len() > MAX_QMP_LINE {
                s.partial.clear();
            }
            s.partial.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut s.partial);
                if let Ok(message) = serde_json::from_slice::<Value>(&line) {
                    self.dispatch(&mut s, message);
                }
            }
        }
        drop(s);
        self.changed.notify_all();
    }

    fn dispatch(&self, s: &mut State, message: Value) {
        if message.get("QMP").is_some() {
            // Until this is answered QEMU accepts nothing else. The socket is empty, so it cannot be full.
            let _ = self.write(&json!({"execute": "qmp_capabilities"}));
            s.greeted = true;
        } else if let Some(event) = message.get("event").and_then(Value::as_str) {
            match event {
                "SHUTDOWN" => {
                    let reason = message.pointer("/data/reason").and_then(Value::as_str);
                    s.events.shutdown = Some(reason.unwrap_or("unknown").to_owned());
                }
                "STOP" if s.events.shutdown.is_none() => s.events.stopped = true,
                "RESUME" => s.events.stopped = false,
                _ => {}
            }
        } else if let Some(id) = message.get("id").and_then(Value::as_u64)
            && let Some(slot) = s.waiting.get_mut(&id)
        {
            *slot = Some(message);
        }
    }

    /// Says that QEMU has ended: who waits gets an error.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// What QEMU has said by itself so far.
    #[must_use]
    pub fn events(&self) -> Events {
        self.lock().events.clone()
    }

    fn write(&self, message: &Value) -> io::Result<()> {
        let mut line = message.to_string();
        line.push('\n');
        let sent = rustix::net::send(
            &self.socket,
            line.as_bytes(),
            rustix::net::SendFlags::NOSIGNAL,
        )?;
        if sent == line.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// Runs one command and gives what it returns.
    ///
    /// # Errors
    /// `Closed`, `Timeout`, `Refused`, `Io`.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, QMP_TIMEOUT)
    }

    fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let deadline = Instant::now() + limit;
        let mut s = self.wait_for(self.lock(), deadline, command, |s| s.greeted)?;
        s.next_id += 1;
        let id = s.next_id;
        let mut request = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        s.waiting.insert(id, None);
        let waited = match self.write(&request) {
            Ok(()) => self.wait_for(s, deadline, command, |s| {
                s.waiting.get(&id).is_none_or(Option::is_some)
            }),
            Err(e) => {
                drop(s);
                let gone = matches!(
                    e.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                );
                Err(if gone { QmpError::Closed } else { e.into() })
            }
        };
        let answer = match waited {
            Ok(mut s) => s.waiting.remove(&id).flatten(),
            Err(e) => {
                self.lock().waiting.remove(&id);
                return Err(e);
            }
        };
        let mut answer = answer.unwrap_or_default();
        if let Some(e) = answer.get("error") {
            let reason = e
                .get("desc")
                .and_then(Value::as_str)
                .unwrap_or("no reason given")
                .to_owned();
            return Err(QmpError::Refused {
                command: command.to_owned(),
                reason,
            });
        }
        match answer.get_mut("return") {
            Some(v) => Ok(v.take()),
            None => Err(QmpError::Unexpected {
                command: command.to_owned(),
                what: "return",
            }),
        }
    }

    fn wait_for<'a>(
        &self,
        mut s: MutexGuard<'a, State>,
        deadline: Instant,
        command: &str,
        done: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'a, State>, QmpError> {
        loop {
            if done(&s) {
                return Ok(s);
            }
            if s.closed {
                return Err(QmpError::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::Timeout {
                    command: command.to_owned(),
                });
            }
            s = self
                .changed
                .wait_timeout(s, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// KVM's exit counters. Under TCG there are none, and QEMU refuses.
    ///
    /// # Errors
    /// As [`Self::execute`]; `Unexpected` when a counter is missing.
    pub fn vcpu_stats(&self) -> Result<VcpuStats, QmpError> {
        let names = ["exits", "irq_exits", "mmio_exits", "io_exits", "halt_exits"];
        let command = "query-stats";
        let arguments =
            json!({"target": "vcpu", "providers": [{"provider": "kvm", "names": names}]});
        let answer = self.execute(command, arguments)?;
        let mut sums = [None::<u64>; 5];
        for vcpu in answer.as_array().into_iter().flatten() {
            for stat in vcpu
                .get("stats")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                let name = stat.get("name").and_then(Value::as_str);
                let value = stat.get("value").and_then(Value::as_u64);
                if let (Some(i), Some(v)) = (names.iter().position(|n| Some(*n) == name), value) {
                    sums[i] = Some(sums[i].unwrap_or(0) + v);
                }
            }
        }
        let get = |i: usize| {
            sums[i].ok_or_else(|| QmpError::Unexpected {
                command: command.to_owned(),
                what: names[i],
            })
        };
        Ok(VcpuStats {
            exits: get(0)?,
            irq_exits: get(1)?,
            mmio_exits: get(2)?,
            io_exits: get(3)?,
            halt_exits: get(4)?,
        })
    }

    /// Thread ids of the vCPUs, by their number.
    ///
    /// # Errors
    /// As [`Self::execute`]; `Unexpected` when there are none.
    pub fn vcpu_threads(&self) -> Result<Vec<i32>, QmpError> {
        let command = "query-cpus-fast";
        let answer = self.execute(command, Value::Null)?;
        let thread = |cpu: &Value| i32::try_from(cpu.get("thread-id")?.as_i64()?).ok();
        let threads: Vec<i32> = answer
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(thread)
            .collect();
        if threads.is_empty() {
            return Err(QmpError::Unexpected {
                command: command.to_owned(),
                what: "thread-id",
            });
        }
        Ok(threads)
    }

    /// Ends QEMU in order.
    ///
    /// # Errors
    /// As [`Self::execute`]. QEMU may end before it has answered: `Closed`.
    pub fn quit(&self) -> Result<(), QmpError> {
        self.execute("quit", Value::Null).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket::stream_pair;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

    /// A monitor that answers each command with what `answer` makes of it; its words arrive three bytes at a time.
    fn fake(answer: impl Fn(&str, u64) -> String + Send + 'static) -> Arc<Qmp> {
        let (ours, theirs) = stream_pair().unwrap();
        let qmp = Arc::new(Qmp::new(ours).unwrap());
        let feeder = Arc::clone(&qmp);
        std::thread::spawn(move || {
            let mut theirs = BufReader::new(UnixStream::from(theirs));
            let say = |text: &str| text.as_bytes().chunks(3).for_each(|c| feeder.feed(c));
            say(GREETING);
            let mut line = String::new();
            while theirs.read_line(&mut line).is_ok_and(|n| n > 0) {
                let request: Value = serde_json::from_str(&line).unwrap();
                let command = request["execute"].as_str().unwrap();
                if let Some(id) = request["id"].as_u64() {
                    say("{\"event\": \"STOP\"}\nnonsense\n");
                    say(&format!("{}\n", answer(command, id)));
                } else {
                    assert_eq!(command, "qmp_capabilities");
                    theirs.get_mut().flush().unwrap();
                }
                line.clear();
            }
        });
        qmp
    }

    #[test]
    fn answers_are_matched_and_events_kept() {
        let qmp = fake(|command, id| match command {
            "query-cpus-fast" => {
                json!({"id": id, "return": [{"thread-id": 42}, {"thread-id": 43}]}).to_string()
            }
            "query-stats" => {
                let stats = |n| {
                    json!([{"name": "exits", "value": n}, {"name": "irq_exits", "value": 2}, {"name": "mmio_exits", "value": 3},
                    {"name": "io_exits", "value": 4}, {"name": "halt_exits", "value": 5}])
                };
                json!({"id": id, "return": [{"stats": stats(10)}, {"stats": stats(20)}]})
                    .to_string()
            }
            _ => json!({"id": id, "error": {"desc": "no such command"}}).to_string(),
        });
        assert_eq!(qmp.vcpu_threads().unwrap(), [42, 43]);
        let s = qmp.vcpu_stats().unwrap();
        assert_eq!(
            (s.exits, s.irq_exits, s.halt_exits, s.by_guest()),
            (30, 4, 10, 26)
        );
        assert_eq!(s.since(&s), VcpuStats::default());
        let e = qmp.execute("nothing", Value::Null).unwrap_err().to_string();
        assert!(e.contains("no such command"), "{e}");
        assert!(qmp.events().stopped);
        qmp.feed(b"{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}\n");
        assert_eq!(qmp.events().shutdown.as_deref(), Some("guest-reset"));
    }

    #[test]
    fn missing_counters_are_named() {
        let qmp = fake(|_, id| {
            json!({"id": id, "return": [{"stats": [{"name": "exits", "value": 1}]}]}).to_string()
        });
        let e = qmp.vcpu_stats().unwrap_err().to_string();
        assert!(e.contains("irq_exits"), "{e}");
    }

    #[test]
    fn silence_and_death_have_an_end() {
        let (ours, theirs) = stream_pair().unwrap();
        let qmp = Qmp::new(ours).unwrap();
        let short = Duration::from_millis(20);
        let e = qmp
            .execute_within("query-cpus-fast", Value::Null, short)
            .unwrap_err();
        assert!(matches!(e, QmpError::Timeout { .. }), "{e}");
        qmp.feed(GREETING.as_bytes());
        let e = qmp
            .execute_within("query-cpus-fast", Value::Null, short)
            .unwrap_err();
        assert!(matches!(e, QmpError::Timeout { .. }), "{e}");
        drop(theirs);
        let e = qmp
            .execute_within("query-cpus-fast", Value::Null, short)
            .unwrap_err();
        assert!(matches!(e, QmpError::Closed), "{e}");
        qmp.close();
        let e = qmp.quit().unwrap_err();
        assert!(matches!(e, QmpError::Closed), "{e}");
        assert!(qmp.lock().waiting.is_empty());
    }
}
