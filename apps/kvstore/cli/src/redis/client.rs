//! A client of Redis as a [`Target`]: requests are pipelined, a connection's replies come in the order of its requests.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::resp::{self, Reply};
use super::server::Address;
use crate::bench::limits::SILENCE;
use crate::bench::target::{Outcome, Request, Target};

/// Bytes that a connection's buffer takes at once: many small replies, or a part of a large one.
const RECEIVE_BYTES: usize = 64 << 10;

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(address: &Address) -> std::io::Result<Self> {
        let stream = match address {
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?),
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                Self::Tcp(stream)
            }
        };
        match &stream {
            Self::Unix(s) => s.set_read_timeout(Some(SILENCE))?,
            Self::Tcp(s) => s.set_read_timeout(Some(SILENCE))?,
        }
        Ok(stream)
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(s) => s.as_fd(),
            Self::Tcp(s) => s.as_fd(),
        }
    }

    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(s) => s.read(to),
            Self::Tcp(s) => s.read(to),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Unix(s) => s.write_all(bytes),
            Self::Tcp(s) => s.write_all(bytes),
        }
    }
}

/// What the next reply of a connection belongs to.
#[derive(Clone, Copy, Debug)]
enum Due {
    /// A ticket's only request.
    Ticket(u32),
    /// The keys of a scan of this length.
    Keys(u32, u8),
    /// The values of a scan.
    Values(u32),
}

struct Lane {
    stream: Stream,
    out: Vec<u8>,
    /// Received; valid up to `filled`.
    input: Vec<u8>,
    filled: usize,
    due: VecDeque<Due>,
}

/// Connections to one server.
pub struct Redis {
    lanes: Vec<Lane>,
}

impl Redis {
    /// Connects `count` times.
    ///
    /// # Errors
    /// When nobody serves there.
    pub fn connect(address: &Address, count: u16) -> Result<Self> {
        let one = |_| -> Result<Lane> {
            Ok(Lane {
                stream: Stream::connect(address)
                    .with_context(|| format!("cannot connect to Redis at {address}"))?,
                out: Vec::new(),
                input: vec![0; 2 * RECEIVE_BYTES],
                filled: 0,
                due: VecDeque::new(),
            })
        };
        Ok(Self {
            lanes: (0..count.max(1)).map(one).collect::<Result<_>>()?,
        })
    }

    /// Sends one command and gives its reply as text; for what is not measured.
    ///
    /// # Errors
    /// When Redis refuses it, or is silent.
    pub fn ask(&mut self, words: &[&[u8]]) -> Result<String> {
        let lane = &mut self.lanes[0];
        resp::request(&mut lane.out, words);
        lane.flush()?;
        loop {
            if let Some((reply, used)) = resp::parse(&lane.input[..lane.filled])? {
                let text = match reply {
                    Reply::Simple(t) | Reply::Bulk(Some(t)) => {
                        Ok(String::from_utf8_lossy(t).into_owned())
                    }
                    Reply::Integer(n) => Ok(n.to_string()),
                    Reply::Error(e) => Err(String::from_utf8_lossy(e).into_owned()),
                    Reply::Bulk(None) | Reply::Array(_) => Ok(String::new()),
                };
                lane.consume(used);
                return text.map_err(|e| anyhow::anyhow!("Redis: {e}"));
            }
            lane.receive()?;
        }
    }
}

impl Lane {
    fn flush(&mut self) -> Result<()> {
        if !self.out.is_empty() {
            self.stream
                .write_all(&self.out)
                .context("cannot send to Redis")?;
            self.out.clear();
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        if self.input.len() - self.filled < RECEIVE_BYTES {
            let more = self.input.len().max(RECEIVE_BYTES);
            self.input.resize(self.input.len() + more, 0);
        }
        match self.stream.read(&mut self.input[self.filled..]) {
            Ok(0) => bail!("Redis closed the connection"),
            Ok(n) => self.filled += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                bail!("Redis did not answer within {SILENCE:?}")
            }
            Err(e) => return Err(e).context("cannot receive from Redis"),
        }
        Ok(())
    }

    fn consume(&mut self, used: usize) {
        self.input.copy_within(used..self.filled, 0);
        self.filled -= used;
    }

    /// Hands out replies that are there; gives how many requests came to their end.
    fn take(&mut self, each: &mut impl FnMut(u32, Outcome<'_>)) -> Result<usize> {
        let (mut at, mut ended) = (0, 0);
        while let Some((reply, used)) = resp::parse(&self.input[at..self.filled])? {
            let Some(due) = self.due.pop_front() else {
                bail!("Redis answered what was not asked");
            };
            at += used;
            match (due, reply) {
                (Due::Keys(ticket, length), Reply::Array(list)) => {
                    let keys = list.iter().nth(1);
                    let Some(Reply::Array(keys)) = keys else {
                        bail!("Redis answered SCAN with something else");
                    };
                    let count = keys.len().min(usize::from(length));
                    if count == 0 {
                        ended += 1;
                        each(ticket, Outcome::Done);
                        continue;
                    }
                    resp::begin(&mut self.out, count + 1);
                    resp::word(&mut self.out, b"MGET");
                    for key in keys.iter().take(count) {
                        let Reply::Bulk(Some(key)) = key else {
                            bail!("Redis answered SCAN with something else");
                        };
                        resp::word(&mut self.out, key);
                    }
                    self.due.push_back(Due::Values(ticket));
                }
                (Due::Ticket(ticket) | Due::Keys(ticket, _) | Due::Values(ticket), reply) => {
                    ended += 1;
                    each(ticket, outcome(reply));
                }
            }
        }
        self.consume(at);
        Ok(ended)
    }
}

fn outcome(reply: Reply<'_>) -> Outcome<'_> {
    match reply {
        Reply::Bulk(Some(value)) => Outcome::Value(value),
        Reply::Bulk(None) | Reply::Integer(0) => Outcome::Missing,
        Reply::Simple(_) | Reply::Integer(_) | Reply::Array(_) => Outcome::Done,
        Reply::Error(e) => Outcome::Refused(String::from_utf8_lossy(e).into_owned()),
    }
}

impl Target for Redis {
    fn submit(&mut self, ticket: u32, request: Request<'_>) -> Result<bool> {
        let at = ticket as usize % self.lanes.len();
        let lane = &mut self.lanes[at];
        let due = match request {
            Request::Read(key) => {
                resp::request(&mut lane.out, &[b"GET", key]);
                Due::Ticket(ticket)
            }
            Request::Write(key, value) => {
                resp::request(&mut lane.out, &[b"SET", key, value]);
                Due::Ticket(ticket)
            }
            Request::Remove(key) => {
                resp::request(&mut lane.out, &[b"DEL", key]);
                Due::Ticket(ticket)
            }
            Request::Scan { position, length } => {
                let (cursor, count) = (position.to_string(), length.to_string());
                let words: [&[u8]; 4] = [b"SCAN", cursor.as_bytes(), b"COUNT", count.as_bytes()];
                resp::request(&mut lane.out, &words);
                Due::Keys(ticket, length)
            }
        };
        lane.due.push_back(due);
        Ok(true)
    }

    fn wait(&mut self, each: &mut impl FnMut(u32, Outcome<'_>)) -> Result<()> {
        loop {
            for lane in &mut self.lanes {
                lane.flush()?;
            }
            let mut ended = 0;
            if let [lane] = self.lanes.as_mut_slice() {
                lane.receive()?;
                ended += lane.take(each)?;
            } else {
                for i in ready(&self.lanes)? {
                    self.lanes[i].receive()?;
                    ended += self.lanes[i].take(each)?;
                }
            }
            if ended > 0 {
                return Ok(());
            }
        }
    }

    fn prepare(&mut self, _: u32) {}
}

/// Connections with something to read.
fn ready(lanes: &[Lane]) -> Result<Vec<usize>> {
    let mut fds: Vec<PollFd<'_>> = lanes
        .iter()
        .map(|l| PollFd::from_borrowed_fd(l.stream.as_fd(), PollFlags::IN))
        .collect();
    let limit: Timespec = Timespec {
        tv_sec: SILENCE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    match poll(&mut fds, Some(&limit)) {
        Ok(0) => bail!("Redis did not answer within {SILENCE:?}"),
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return Err(e).context("cannot wait for Redis"),
    }
    let busy = fds
        .iter()
        .enumerate()
        .filter(|(_, f)| !f.revents().is_empty());
    Ok(busy.map(|(i, _)| i).collect())
}
