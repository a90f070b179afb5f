//! The exchange of `rping` (librdmacm's example) over RDMA CM: either end may be the stock program.
//!
//! Each round the client advertises a buffer with ping data, the server READs it and says so; the client advertises a second buffer,
//! the server WRITEs the data there and says so; the client compares.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;

use hyv_verbs::cm::{self, CmId, ConnParam, ConnectOptions, EventChannel};
use hyv_verbs::{
    Access, CmEventKind, CompletionQueue, Context, Gid, MemoryRegion, Payload, PostError,
    ProtectionDomain, QpCaps, QueuePair, RecvWr, RemoteAddr, SendOp, SendWr, WcStatus,
    WorkCompletion,
};

/// Bytes of an advertisement: address, rkey and length, big-endian.
const INFO: usize = 16;
/// The least length of ping data: its text.
pub const MIN_SIZE: u32 = 24;
/// The largest.
pub const MAX_SIZE: u32 = 1 << 20;
/// Layout of the region: advertisements out and in, ping data, echoed data.
const SEND_AT: u64 = 0;
const RECV_AT: u64 = 64;
const PING_AT: u64 = 128;
/// The name of receives.
const RECV: u64 = 1;
/// How long a client waits for the answer to its disconnection: several times what a lost one takes to be sent again.
const LEAVING: Duration = Duration::from_secs(20);

/// What is exchanged.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of ping data (`-S`).
    pub size: u32,
    /// Rounds (`-C`); a server goes on until the client leaves.
    pub count: u32,
    /// Compare what comes back (`-V`).
    pub validate: bool,
    /// Longest silence before giving up.
    pub patience: Duration,
}

/// Why it ended early.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A verb, or the connection.
    Verbs(hyv_verbs::Error),
    /// A work request could not be posted.
    Post(PostError),
    /// A work request failed.
    Completion(WcStatus),
    /// The peer's message is no advertisement.
    Message {
        /// Its length.
        len: u32,
    },
    /// The peer advertised more than this side has room for.
    TooLong {
        /// Bytes it advertised.
        len: u32,
        /// Room here.
        room: u32,
    },
    /// What came back differs.
    Data {
        /// In which round.
        round: u32,
        /// Where.
        at: usize,
    },
    /// Nothing happened for long.
    Silent,
    /// The connection ended in mid-round.
    Disconnected,
    /// An option that makes no sense.
    Option(&'static str),
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Verbs(e) => write!(f, "{e}"),
            Self::Post(e) => write!(f, "cannot post a work request: {e}"),
            Self::Completion(s) => write!(f, "a work request completed with {s:?}"),
            Self::Message { len } => {
                write!(f, "a message of {len} bytes is no rping advertisement")
            }
            Self::TooLong { len, room } => {
                write!(
                    f,
                    "the peer advertised {len} bytes; there is room for {room}: give -S {len}"
                )
            }
            Self::Data { round, at } => {
                write!(
                    f,
                    "round {round}: byte {at} came back different from what was sent"
                )
            }
            Self::Silent => f.write_str("the peer fell silent"),
            Self::Disconnected => f.write_str("the peer disconnected in the middle of a round"),
            Self::Option(what) => f.write_str(what),
        }
    }
}

impl core::error::Error for Error {}

impl From<hyv_verbs::Error> for Error {
    fn from(e: hyv_verbs::Error) -> Self {
        Self::Verbs(e)
    }
}

impl From<PostError> for Error {
    fn from(e: PostError) -> Self {
        Self::Post(e)
    }
}

struct Side {
    context: Context,
    options: Options,
    cq: CompletionQueue,
    qp: QueuePair,
    region: MemoryRegion,
    channel: EventChannel,
    id: CmId,
    /// Advertisements that came and were not looked at yet.
    inbox: Vec<Info>,
}

#[derive(Clone, Copy)]
struct Info {
    remote: RemoteAddr,
    len: u32,
}

fn check(options: &Options) -> Result<(), Error> {
    if !(MIN_SIZE..=MAX_SIZE).contains(&options.size) {
        return Err(Error::Option("-S must be from 24 bytes to 1 MiB"));
    }
    Ok(())
}

fn region(pd: &ProtectionDomain, size: u32) -> Result<MemoryRegion, Error> {
    let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
    Ok(pd.alloc_mr(PING_AT as usize + 2 * size as usize, access)?)
}

fn caps() -> QpCaps {
    QpCaps {
        max_send_wr: 16,
        max_recv_wr: 2,
        ..QpCaps::default()
    }
}

fn param() -> ConnParam<'static> {
    // As the stock program's: one READ or WRITE at a time.
    ConnParam {
        responder_resources: 1,
        initiator_depth: 1,
        ..ConnParam::default()
    }
}

/// Connects to the server on `port` at `gid` and runs the rounds; `shown` is told each round's data. Gives the rounds done.
///
/// # Errors
/// See [`Error`].
pub fn client(
    context: &Context,
    options: Options,
    (gid, port): (Gid, u16),
    shown: &mut dyn FnMut(&str),
) -> Result<u32, Error> {
    check(&options)?;
    let pd = context.alloc_pd()?;
    let region = region(&pd, options.size)?;
    let cq = context.create_cq(32)?;
    let connect = ConnectOptions {
        caps: caps(),
        param: param(),
        timeout: options.patience,
    };
    let mut connection = cm::connect(context, (gid, port), &pd, (&cq, &cq), &connect, |qp| {
        post_recv(qp, &region).map_err(Error::Post)
    })?;
    let qp = connection
        .id
        .take_qp()
        .ok_or(hyv_verbs::Error::NoQueuePair)?;
    let mut side = Side {
        context: context.clone(),
        options,
        cq,
        qp,
        region,
        channel: connection.channel,
        id: connection.id,
        inbox: Vec::new(),
    };
    let size = options.size as usize;
    let mut start = b'A';
    for round in 0..options.count {
        let ping = ping_data(round, start, size);
        start = if start == b'z' { b'A' } else { start + 1 };
        side.put(PING_AT, &ping)?;
        side.advertise(PING_AT)?;
        side.hear()?.ok_or(Error::Disconnected)?;
        side.put(PING_AT + size as u64, &vec![0; size])?;
        side.advertise(PING_AT + size as u64)?;
        side.hear()?.ok_or(Error::Disconnected)?;
        let echo = side.get(PING_AT + size as u64, size)?;
        if options.validate
            && let Some(at) = (0..size).find(|&i| ping[i] != echo[i])
        {
            return Err(Error::Data { round, at });
        }
        shown(&text_of(&echo));
    }
    side.leave()?;
    Ok(options.count)
}

/// Serves one client that connects to `port` at `gid` until it leaves. `shown` is told each round's data; `listening` is called
/// once clients may connect; `stop` ends the wait for one. Gives the rounds done.
///
/// # Errors
/// See [`Error`].
pub fn server(
    context: &Context,
    options: Options,
    (gid, port): (Gid, u16),
    listening: &mut dyn FnMut(),
    stop: &mut dyn FnMut() -> bool,
    shown: &mut dyn FnMut(&str),
) -> Result<u32, Error> {
    check(&options)?;
    let (_listener, channel) = cm::listen(context, (gid, port), 1)?;
    listening();
    let mut id = loop {
        if stop() {
            return Ok(0);
        }
        let Some(mut event) = channel.get_event(Some(Duration::from_millis(100)))? else {
            continue;
        };
        if event.kind == CmEventKind::ConnectRequest
            && let Some(id) = event.take_request()
        {
            break id;
        }
    };
    let pd = context.alloc_pd()?;
    let region = region(&pd, options.size)?;
    let cq = context.create_cq(32)?;
    id.create_qp(&pd, &cq, &cq, &caps())?;
    let mut qp = id.take_qp().ok_or(hyv_verbs::Error::NoQueuePair)?;
    post_recv(&mut qp, &region)?;
    id.accept(&param())?;
    let mut side = Side {
        context: context.clone(),
        options,
        cq,
        qp,
        region,
        channel,
        id,
        inbox: Vec::new(),
    };
    let mut rounds = 0;
    loop {
        let Some(from) = side.hear()? else {
            return Ok(rounds);
        };
        if from.len > options.size {
            return Err(Error::TooLong {
                len: from.len,
                room: options.size,
            });
        }
        side.transfer(SendOp::Read(from.remote), from.len)?;
        let ping = side.get(PING_AT, from.len as usize)?;
        shown(&text_of(&ping));
        side.advertise(PING_AT)?;
        let to = side.hear()?.ok_or(Error::Disconnected)?;
        // The text and its NUL, as the stock program does; never more than was advertised.
        let text = ping
            .iter()
            .position(|&b| b == 0)
            .map_or(ping.len(), |n| n + 1);
        side.transfer(SendOp::Write(to.remote), (text as u32).min(to.len))?;
        rounds += 1;
        match side.advertise(PING_AT) {
            // A client that has done its rounds leaves on hearing this, at times before its acknowledgement is here.
            Err(Error::Completion(WcStatus::WrFlushErr | WcStatus::RetryExcErr)) => {
                return Ok(rounds);
            }
            told => told?,
        }
    }
}

/// The stock program's ping data: a title, then letters that move on by one each round, and a NUL.
fn ping_data(round: u32, start: u8, size: usize) -> Vec<u8> {
    let mut data = format!("rdma-ping-{round}: ").into_bytes();
    let mut c = start;
    while data.len() < size {
        data.push(c);
        c = if c == b'z' { b'A' } else { c + 1 };
    }
    data.truncate(size);
    data[size - 1] = 0;
    data
}

fn text_of(data: &[u8]) -> String {
    let end = data.iter().position(|&b| b == 0).unwrap_or(data.len());
    String::from_utf8_lossy(&data[..end]).into_owned()
}

fn post_recv(qp: &mut QueuePair, region: &MemoryRegion) -> Result<(), PostError> {
    let sges = [region.sge(RECV_AT, INFO as u32)];
    qp.post_recv(&RecvWr {
        wr_id: RECV,
        sges: &sges,
    })
}

const NO_ROOM: Error = Error::Option("the data does not fit its buffer");

impl Side {
    fn put(&self, at: u64, data: &[u8]) -> Result<(), Error> {
        self.region.write(at as usize, data).map_err(|_| NO_ROOM)
    }

    fn get(&self, at: u64, len: usize) -> Result<Vec<u8>, Error> {
        let mut data = vec![0; len];
        self.region
            .read(at as usize, &mut data)
            .map_err(|_| NO_ROOM)?;
        Ok(data)
    }

    /// Tells the peer of the buffer at `at`.
    fn advertise(&mut self, at: u64) -> Result<(), Error> {
        let buffer = self.region.remote(at);
        let mut info = [0; INFO];
        info[..8].copy_from_slice(&buffer.addr.to_be_bytes());
        info[8..12].copy_from_slice(&buffer.rkey.to_be_bytes());
        info[12..].copy_from_slice(&self.options.size.to_be_bytes());
        self.put(SEND_AT, &info)?;
        let sges = [self.region.sge(SEND_AT, INFO as u32)];
        self.work(SendOp::Send, &sges)
    }

    /// READs into the ping buffer, or WRITEs from it.
    fn transfer(&mut self, op: SendOp, len: u32) -> Result<(), Error> {
        let sges = [self.region.sge(PING_AT, len)];
        self.work(op, &sges)
    }

    fn work(&mut self, op: SendOp, sges: &[hyv_verbs::Sge]) -> Result<(), Error> {
        self.qp
            .post_send(&SendWr::new(0, op, Payload::Sges(sges)))?;
        loop {
            let wc = self.next()?.ok_or(Error::Silent)?;
            if !wc.is_ok() {
                return Err(Error::Completion(wc.status));
            }
            if wc.wr_id == RECV {
                self.take(&wc)?;
            } else {
                return Ok(());
            }
        }
    }

    /// The next advertisement; `None` when the peer has left.
    fn hear(&mut self) -> Result<Option<Info>, Error> {
        loop {
            if let Some(info) = self.inbox.pop() {
                return Ok(Some(info));
            }
            match self.next()? {
                Some(wc) if wc.status == WcStatus::WrFlushErr => return Ok(None),
                Some(wc) if !wc.is_ok() => return Err(Error::Completion(wc.status)),
                Some(wc) if wc.wr_id == RECV => self.take(&wc)?,
                Some(_) => {}
                None => return Err(Error::Silent),
            }
        }
    }

    fn take(&mut self, wc: &WorkCompletion) -> Result<(), Error> {
        if wc.byte_len as usize != INFO {
            return Err(Error::Message { len: wc.byte_len });
        }
        let b = self.get(RECV_AT, INFO)?;
        let word = |at: usize| u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        self.inbox.push(Info {
            remote: RemoteAddr {
                addr: u64::from(word(0)) << 32 | u64::from(word(4)),
                rkey: word(8),
            },
            len: word(12),
        });
        Ok(post_recv(&mut self.qp, &self.region)?)
    }

    /// Disconnects, and waits until the peer has answered that it knows: who ends at once cannot say again what was lost.
    fn leave(&mut self) -> Result<(), Error> {
        self.id.disconnect()?;
        let start = self.context.now_ns();
        while self.context.now_ns().saturating_sub(start) < LEAVING.as_nanos() as u64 {
            let event = self.channel.get_event(Some(Duration::from_millis(50)))?;
            if event.is_some_and(|event| event.kind == CmEventKind::Disconnected) {
                break;
            }
        }
        Ok(())
    }

    /// The next completion. A peer that disconnects makes everything posted flush.
    fn next(&mut self) -> Result<Option<WorkCompletion>, Error> {
        let start = self.context.now_ns();
        loop {
            let mut done = [WorkCompletion::EMPTY; 1];
            if self.cq.wait(&mut done, Some(Duration::from_millis(50)))? == 1 {
                return Ok(Some(done[0]));
            }
            while self.channel.poll_event()?.is_some() {
                // A disconnection shows as flushed receives.
            }
            let waited = self.context.now_ns().saturating_sub(start);
            if waited > self.options.patience.as_nanos() as u64 {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ping_data_is_the_stock_programs() {
        let data = ping_data(0, b'A', 64);
        assert_eq!(data.len(), 64);
        assert_eq!(
            text_of(&data),
            "rdma-ping-0: ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqr"
        );
        assert_eq!(data[63], 0);
    }
}
