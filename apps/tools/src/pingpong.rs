//! The exchange of `ibv_rc_pingpong`, `ibv_uc_pingpong` and `ibv_ud_pingpong` (rdma-core's examples): either end may be the
//! stock program.
//!
//! Over TCP both sides tell QPN, PSN and GID as one line of text of 52 bytes, the client first; the client then says
//! `done`. Each side then sends `iterations` messages: the client starts, and a side sends again once its send has
//! completed and the peer's message has come.

use alloc::format;
use alloc::string::String;
use core::time::Duration;

use hyv_verbs::{
    Access, AddressHandle, AhAttr, CompletionQueue, Context, Gid, Grh, MemoryRegion, Payload,
    PostError, QpCaps, QpInitAttr, QpType, QueuePair, RecvWr, RtrParams, RtsParams, SendOp, SendWr,
    WcStatus, WorkCompletion,
};

/// Bytes of what each side tells: `llll:qqqqqq:pppppp:` and the GID, in hexadecimal, and a NUL.
const HELLO: usize = 52;
/// What the client says last, with its NUL.
const DONE: [u8; 5] = *b"done\0";
/// Q_Key of datagrams.
const QKEY: u32 = 0x1111_1111;
/// Bytes in front of a datagram.
const GRH: usize = Grh::LEN;
/// A receive's name; sends have another.
const RECV: u64 = 1;
const SEND: u64 = 2;

/// Which of the three programs the peer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// `ibv_rc_pingpong`.
    Rc,
    /// `ibv_uc_pingpong`.
    Uc,
    /// `ibv_ud_pingpong`.
    Ud,
}

/// What is exchanged. The defaults are the stock programs'.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which program.
    pub transport: Transport,
    /// Bytes of a message.
    pub size: u32,
    /// Path MTU, bytes (not UD).
    pub mtu: u32,
    /// Receives posted.
    pub rx_depth: u32,
    /// Messages each way.
    pub iterations: u32,
    /// Sleep on completion events instead of polling.
    pub events: bool,
    /// Look at every byte of every message.
    pub check: bool,
    /// Longest silence before giving up.
    pub patience: Duration,
}

impl Options {
    /// The stock program's.
    #[must_use]
    pub const fn new(transport: Transport) -> Self {
        Self {
            transport,
            size: match transport {
                Transport::Ud => 1024,
                _ => 4096,
            },
            mtu: 1024,
            rx_depth: 500,
            iterations: 1000,
            events: false,
            check: false,
            patience: Duration::from_secs(30),
        }
    }
}

/// The TCP connection on which the two sides introduce themselves.
pub trait Stream {
    /// Sends all of it.
    ///
    /// # Errors
    /// In words, with the peer's name.
    fn send(&mut self, bytes: &[u8]) -> Result<(), String>;
    /// Receives as much as there is room.
    ///
    /// # Errors
    /// In words, with the peer's name.
    fn receive(&mut self, bytes: &mut [u8]) -> Result<(), String>;
}

/// Who this side is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Accepted the connection.
    Server,
    /// Made the connection, and sends first.
    Client,
}

/// How long a side answers after its last completion: four times the peer's time-out (the stock programs' 67 ms). If the
/// acknowledgement of the peer's last message was lost, it sends that again, and Soft-RoCE does so for ever.
const LINGER: Duration = Duration::from_millis(270);

/// What a side tells the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// LID; 0 on Ethernet.
    pub lid: u16,
    /// QPN.
    pub qpn: u32,
    /// First PSN.
    pub psn: u32,
    /// GID.
    pub gid: Gid,
}

impl Endpoint {
    /// As it travels.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO] {
        let mut text = format!("{:04x}:{:06x}:{:06x}:", self.lid, self.qpn, self.psn);
        for byte in self.gid.0 {
            text.push_str(&format!("{byte:02x}"));
        }
        let mut bytes = [0; HELLO];
        bytes[..HELLO - 1].copy_from_slice(text.as_bytes());
        bytes
    }

    /// From what came.
    #[must_use]
    pub fn decode(bytes: &[u8; HELLO]) -> Option<Self> {
        let text = core::str::from_utf8(&bytes[..HELLO - 1]).ok()?;
        let mut parts = text.split(':');
        let mut number = |digits: usize| {
            let part = parts.next()?;
            (part.len() == digits).then_some(part)
        };
        let lid = u16::from_str_radix(number(4)?, 16).ok()?;
        let qpn = u32::from_str_radix(number(6)?, 16).ok()?;
        let psn = u32::from_str_radix(number(6)?, 16).ok()?;
        let gid = u128::from_str_radix(number(32)?, 16).ok()?;
        parts.next().is_none().then_some(Self {
            lid,
            qpn,
            psn,
            gid: Gid(gid.to_be_bytes()),
        })
    }
}

/// How it went.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Messages each way.
    pub iterations: u32,
    /// Bytes both ways.
    pub bytes: u64,
    /// Time, ns.
    pub elapsed_ns: u64,
    /// The peer did not acknowledge the last message, of which nothing more was to come: it has ended, or its
    /// acknowledgement was lost and then it ended.
    pub unacknowledged: bool,
}

/// Why it ended early.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The TCP side.
    Stream(String),
    /// What the peer said is not what the stock program says.
    Hello,
    /// A control verb.
    Verbs(hyv_verbs::Error),
    /// A work request could not be posted.
    Post(PostError),
    /// A work request failed.
    Completion {
        /// Which kind.
        receive: bool,
        /// How.
        status: WcStatus,
    },
    /// A message has other bytes than the peer sent.
    Data {
        /// Which message.
        message: u32,
        /// Where.
        at: usize,
    },
    /// A message has another length.
    Length {
        /// Bytes that came.
        got: u32,
        /// Bytes that should have.
        want: u32,
    },
    /// Nothing happened for long.
    Silent {
        /// Messages received until then.
        received: u32,
    },
    /// An option that this device or program cannot serve.
    Option(&'static str),
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Stream(e) => f.write_str(e),
            Self::Hello => f.write_str(
                "the peer introduced itself in a way that no pingpong program does: is it the same kind (rc, uc, ud)?",
            ),
            Self::Verbs(e) => write!(f, "{e}"),
            Self::Post(e) => write!(f, "cannot post a work request: {e}"),
            Self::Completion { receive, status } => write!(
                f,
                "a {} completed with {status:?}",
                if *receive { "receive" } else { "send" }
            ),
            Self::Data { message, at } => write!(
                f,
                "message {message} differs at byte {at} from what the peer sent"
            ),
            Self::Length { got, want } => write!(
                f,
                "a message has {got} bytes in place of {want}: give both sides the same -s"
            ),
            Self::Silent { received } => write!(
                f,
                "the peer fell silent after {received} messages: was it started with the same options, and is the way to it open?"
            ),
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

struct Side<'a> {
    context: &'a Context,
    options: Options,
    role: Role,
    cq: CompletionQueue,
    qp: QueuePair,
    region: MemoryRegion,
    /// Datagrams: where they go.
    to: Option<(AddressHandle, u32)>,
}

/// Exchanges QPNs over `stream`, then messages. `met` is told both sides once they know each other.
///
/// # Errors
/// See [`Error`].
pub fn run(
    context: &Context,
    options: Options,
    role: Role,
    stream: &mut dyn Stream,
    met: &mut dyn FnMut(&Endpoint, &Endpoint),
) -> Result<Outcome, Error> {
    if options.size == 0 || options.iterations == 0 || options.rx_depth == 0 {
        return Err(Error::Option(
            "size, iterations and receives must be at least 1",
        ));
    }
    let datagrams = options.transport == Transport::Ud;
    if datagrams && options.size > context.query_port(1)?.active_mtu {
        return Err(Error::Option(
            "a datagram must fit into one packet: give a smaller -s",
        ));
    }
    let pd = context.alloc_pd()?;
    let head = if datagrams { GRH } else { 0 };
    // First what is sent, then what comes.
    let len = 2 * options.size as usize + head;
    let region = pd.alloc_mr(len, Access::LOCAL_WRITE)?;
    let cq = context.create_cq(options.rx_depth + 1)?;
    let ty = match options.transport {
        Transport::Rc => QpType::Rc,
        Transport::Uc => QpType::Uc,
        Transport::Ud => QpType::Ud,
    };
    let caps = QpCaps {
        max_send_wr: 2,
        max_recv_wr: options.rx_depth,
        ..QpCaps::default()
    };
    let mut qp = pd.create_qp_ex(&QpInitAttr::new(ty, &cq, &cq).with_caps(caps))?;
    if datagrams {
        qp.to_init_datagram(QKEY)?;
    } else {
        qp.to_init(Access::empty())?;
    }
    let mut side = Side {
        context,
        options,
        role,
        cq,
        qp,
        region,
        to: None,
    };
    for _ in 0..options.rx_depth {
        side.post_recv()?;
    }
    let mine = Endpoint {
        lid: 0,
        qpn: side.qp.qpn(),
        psn: context.fresh_psn(),
        gid: context.query_gid(1, 0)?,
    };
    let theirs = match role {
        Role::Client => {
            stream.send(&mine.encode()).map_err(Error::Stream)?;
            let theirs = hello(stream)?;
            side.connect(&pd, &mine, &theirs)?;
            stream.send(&DONE).map_err(Error::Stream)?;
            theirs
        }
        Role::Server => {
            let theirs = hello(stream)?;
            side.connect(&pd, &mine, &theirs)?;
            stream.send(&mine.encode()).map_err(Error::Stream)?;
            let mut done = [0; DONE.len()];
            stream.receive(&mut done).map_err(Error::Stream)?;
            theirs
        }
    };
    met(&mine, &theirs);
    side.exchange()
}

fn hello(stream: &mut dyn Stream) -> Result<Endpoint, Error> {
    let mut bytes = [0; HELLO];
    stream.receive(&mut bytes).map_err(Error::Stream)?;
    Endpoint::decode(&bytes).ok_or(Error::Hello)
}

/// What message `n` of a side has at `i`: a different byte in every message and place, and never the other side's.
fn pattern(role: Role, n: u32, i: usize) -> u8 {
    let salt: u8 = if role == Role::Server { 0x7c } else { 0x7b };
    salt.wrapping_add((n as u8).wrapping_mul(31))
        .wrapping_add((i as u8).wrapping_mul(7))
        .wrapping_add((i >> 8) as u8)
}

impl Side<'_> {
    fn connect(
        &mut self,
        pd: &hyv_verbs::ProtectionDomain,
        mine: &Endpoint,
        theirs: &Endpoint,
    ) -> Result<(), Error> {
        if self.options.transport == Transport::Ud {
            self.qp.ready_datagram(QKEY, mine.psn)?;
            self.to = Some((pd.create_ah(&AhAttr::to(theirs.gid))?, theirs.qpn));
            return Ok(());
        }
        // The stock programs' attributes.
        let rtr = RtrParams {
            path_mtu: self.options.mtu,
            max_dest_rd_atomic: 1,
            min_rnr_timer: 12,
            ..RtrParams::to(theirs.gid, theirs.qpn, theirs.psn)
        };
        self.qp.to_rtr(&rtr)?;
        self.qp.to_rts(&RtsParams {
            max_rd_atomic: 1,
            ..RtsParams::from_psn(mine.psn)
        })?;
        Ok(())
    }

    fn post_recv(&mut self) -> Result<(), Error> {
        let head = if self.options.transport == Transport::Ud {
            GRH as u32
        } else {
            0
        };
        let sges = [self
            .region
            .sge(u64::from(self.options.size), self.options.size + head)];
        Ok(self.qp.post_recv(&RecvWr {
            wr_id: RECV,
            sges: &sges,
        })?)
    }

    fn post_send(&mut self, n: u32) -> Result<(), Error> {
        if self.options.check {
            for i in 0..self.options.size as usize {
                self.region
                    .write(i, &[pattern(self.role, n, i)])
                    .map_err(|_| Error::Option("the message does not fit its buffer"))?;
            }
        }
        let sges = [self.region.sge(0, self.options.size)];
        let op = match &self.to {
            Some((ah, qpn)) => SendOp::SendTo(ah.to(*qpn, QKEY)),
            None => SendOp::Send,
        };
        Ok(self
            .qp
            .post_send(&SendWr::new(SEND, op, Payload::Sges(&sges)))?)
    }

    fn exchange(&mut self) -> Result<Outcome, Error> {
        let n = self.options.iterations;
        let (mut sent, mut received, mut posted) = (0u32, 0u32, 0u32);
        let (mut sending, mut heard) = (false, false);
        if self.role == Role::Client {
            self.post_send(0)?;
            posted = 1;
            sending = true;
        }
        let start = self.context.now_ns();
        let mut unacknowledged = false;
        while sent < n || received < n {
            let wc = self.next(received)?;
            let last = wc.wr_id == SEND && sent + 1 == n && received == n;
            if last && wc.status == WcStatus::RetryExcErr {
                // A peer that has all it waits for ends, whether or not its last acknowledgement arrives.
                unacknowledged = true;
                break;
            }
            if !wc.is_ok() {
                return Err(Error::Completion {
                    receive: wc.wr_id == RECV,
                    status: wc.status,
                });
            }
            if wc.wr_id == RECV {
                self.look_at(&wc, received)?;
                received += 1;
                heard = true;
                self.post_recv()?;
            } else {
                sent += 1;
                sending = false;
            }
            if heard && !sending && posted < n {
                self.post_send(posted)?;
                posted += 1;
                sending = true;
                heard = false;
            }
        }
        let elapsed_ns = self.context.now_ns().saturating_sub(start);
        if self.options.transport == Transport::Rc && !unacknowledged {
            // Nothing is to come but a flushed receive, should the host go.
            let mut done = [WorkCompletion::EMPTY; 1];
            self.cq.wait(&mut done, Some(LINGER))?;
        }
        Ok(Outcome {
            iterations: n,
            bytes: 2 * u64::from(n) * u64::from(self.options.size),
            elapsed_ns,
            unacknowledged,
        })
    }

    fn next(&mut self, received: u32) -> Result<WorkCompletion, Error> {
        let mut done = [WorkCompletion::EMPTY; 1];
        if self.options.events {
            return match self.cq.wait(&mut done, Some(self.options.patience))? {
                0 => Err(Error::Silent { received }),
                _ => Ok(done[0]),
            };
        }
        let platform = self.context.platform();
        let start = self.context.now_ns();
        let mut turns = 0u32;
        loop {
            if let Some(wc) = self.cq.poll_one() {
                return Ok(wc);
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(1 << 10) {
                platform.relax().map_err(|_| hyv_verbs::Error::HostGone)?;
                let waited = self.context.now_ns().saturating_sub(start);
                if waited > self.options.patience.as_nanos() as u64 {
                    return Err(Error::Silent { received });
                }
            }
        }
    }

    fn look_at(&self, wc: &WorkCompletion, n: u32) -> Result<(), Error> {
        let head = if self.options.transport == Transport::Ud {
            GRH
        } else {
            0
        };
        let want = self.options.size + head as u32;
        if wc.byte_len != want {
            return Err(Error::Length {
                got: wc.byte_len,
                want,
            });
        }
        if !self.options.check {
            return Ok(());
        }
        let peer = match self.role {
            Role::Client => Role::Server,
            Role::Server => Role::Client,
        };
        let mut byte = [0; 1];
        for i in 0..self.options.size as usize {
            let at = self.options.size as usize + head + i;
            self.region
                .read(at, &mut byte)
                .map_err(|_| Error::Option("the message does not fit its buffer"))?;
            if byte[0] != pattern(peer, n, i) {
                return Err(Error::Data { message: n, at: i });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stock_program_says_is_understood() {
        let text = b"0000:000011:8f1b2c:00000000000000000000ffff0a000001\0";
        let endpoint = Endpoint::decode(text).expect("valid");
        assert_eq!(endpoint.qpn, 0x11);
        assert_eq!(endpoint.psn, 0x8f_1b2c);
        assert_eq!(endpoint.gid, Gid::from_ipv4([10, 0, 0, 1]));
        assert_eq!(&endpoint.encode(), text);
        for bad in [
            b"0000:00011:88f1b2c:00000000000000000000ffff0a000001\0",
            b"0000:000011:8f1b2c:00000000000000000000ffff0a00000g\0",
            b"GET / HTTP/1.1\r\nHost: somewhere\r\nAccept: */*\r\n\r\n....",
        ] {
            assert_eq!(Endpoint::decode(bad), None);
        }
    }

    #[test]
    fn messages_differ_between_sides_and_rounds() {
        let bytes = |role, n| {
            (0..64)
                .map(|i| pattern(role, n, i))
                .collect::<alloc::vec::Vec<_>>()
        };
        assert_ne!(bytes(Role::Client, 0), bytes(Role::Server, 0));
        assert_ne!(bytes(Role::Client, 0), bytes(Role::Client, 1));
    }
}
