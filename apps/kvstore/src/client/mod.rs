//! The client: requests over an RC queue pair to a [`crate::server`].
//!
//! The core is driven by polling: [`Client::start_get`] and its sisters send a request and give its tag, and
//! [`Client::poll`] hands out replies. Up to [`Client::window`] requests may be outstanding, and replies come in
//! any order. [`Client::get`] and its sisters (in `blocking`) wait for one reply.
//!
//! Keys and values that are too large for a message travel by address: they are copied into a staging buffer,
//! which the server READs or WRITEs.

mod blocking;
mod staging;

use alloc::vec::Vec;
use core::time::Duration;

use hyv_verbs::cm::{ConnParam, ConnectOptions, Connection};
use hyv_verbs::{
    Access, CompletionQueue, Context, Error, Gid, MemoryRegion, Payload, PostError,
    ProtectionDomain, QpCaps, QueuePair, RecvWr, SendOp, SendWr, WorkCompletion,
};

use crate::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crate::proto::{
    Key, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, MIN_LIST_BUFFER_BYTES, PROTOCOL_VERSION, Page,
    ProtoError, PutValue, Refusal, Reply, Request, Status,
};
pub use blocking::{Object, PageOfKeys};
use staging::Staging;

/// Requests outstanding at once, if the server allows as many.
const WINDOW: usize = 16;
/// Receive buffers: the window twice, so that they can be posted again in batches.
const RECV_BUFFERS: usize = 2 * WINDOW;
/// Receives posted again at once.
const REPOST_BATCH: usize = 8;
/// Requests up to this many bytes go inline: a head slot and two more.
const MAX_INLINE: usize = 136;
/// A completion is asked for every so many requests.
const SIGNAL_EVERY: u32 = 16;
/// Send work requests at once: the window, and what is not known to be done.
const MAX_SENDS: u32 = 64;

/// Why a request, or the connection, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The server answered with a failure. The number belongs to the status (a limit, or bytes needed).
    #[error("{status}")]
    Status {
        /// What it said.
        status: Status,
        /// The number.
        detail: u64,
    },
    /// The server refused the connection.
    #[error("{0}")]
    Refused(Refusal),
    /// Nobody serves on that port.
    #[error("no store listens on port {port} of this host: start one with ./run.sh kvstore")]
    NoServer {
        /// The port.
        port: u16,
    },
    /// A verb failed.
    #[error("{what}: {source}")]
    Verb {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: Error,
    },
    /// The connection ended: the server went away, or one side broke the rules.
    #[error("the connection to the store ended ({0}); start the store again if it has stopped")]
    Disconnected(&'static str),
    /// No answer in time.
    #[error("the store did not answer within {0:?}")]
    Timeout(Duration),
    /// As many requests are outstanding as may be, or no staging buffer is free: poll first.
    #[error("too many requests are outstanding: take replies first")]
    WindowFull,
    /// The request cannot be said in the protocol, or a reply made no sense.
    #[error("{0}")]
    Proto(#[from] ProtoError),
    /// The key is too long.
    #[error("the key has {len} bytes; the limit is {MAX_KEY_BYTES}")]
    KeyTooLong {
        /// Its bytes.
        len: usize,
    },
    /// The key is empty.
    #[error("the key is empty; a key has 1 to {MAX_KEY_BYTES} bytes")]
    EmptyKey,
    /// The value is too large.
    #[error("the value has {len} bytes; the limit is {MAX_VALUE_BYTES} (1 MiB)")]
    ValueTooLarge {
        /// Its bytes.
        len: usize,
    },
}

fn verb(what: &'static str) -> impl FnOnce(Error) -> ClientError {
    move |source| ClientError::Verb { what, source }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pending {
    Free,
    /// Waits for a plain reply.
    Plain,
    /// Waits, with a staging buffer.
    Staged(u32),
}

/// A connection to a store.
pub struct Client {
    // Fields drop in order: the queue pair before the memory it uses, the identifier after it.
    qp: QueuePair,
    connection: Connection,
    context: Context,
    cq: CompletionQueue,
    recv: MemoryRegion,
    send: MemoryRegion,
    staging: Option<Staging>,
    pd: ProtectionDomain,
    pending: Vec<Pending>,
    free: Vec<u16>,
    outstanding: usize,
    /// Receive buffers to post again.
    spent: Vec<u32>,
    unsignaled: u32,
    broken: Option<&'static str>,
    timeout: Duration,
}

impl core::fmt::Debug for Client {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Client")
            .field("outstanding", &self.outstanding)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the store that listens on a port. `timeout` bounds this and every later blocking call.
    ///
    /// # Errors
    /// [`ClientError::NoServer`], [`ClientError::Refused`], and what the device says.
    pub fn connect(
        context: &Context,
        gid: Gid,
        port: u16,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        let pd = context
            .alloc_pd()
            .map_err(verb("cannot make a protection domain"))?;
        let cq = context
            .create_cq(4 * MAX_SENDS)
            .map_err(verb("cannot make a completion queue"))?;
        let alloc = |len| {
            pd.alloc_mr(len, Access::LOCAL_WRITE)
                .map_err(verb("cannot register buffers"))
        };
        let recv = alloc(RECV_BUFFERS * MAX_REPLY_BYTES)?;
        let send = alloc(WINDOW * MAX_REQUEST_BYTES)?;
        let options = ConnectOptions {
            caps: QpCaps {
                max_send_wr: MAX_SENDS,
                max_recv_wr: RECV_BUFFERS as u32,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: MAX_INLINE as u32,
                signal_all: false,
            },
            param: ConnParam {
                private_data: &[PROTOCOL_VERSION],
                ..ConnParam::default()
            },
            timeout,
        };
        let connected =
            hyv_verbs::cm::connect(context, (gid, port), &pd, (&cq, &cq), &options, |qp| {
                (0..RECV_BUFFERS as u32).try_for_each(|b| post_recv(qp, &recv, b))
            });
        let mut connection = match connected {
            Ok(c) => c,
            // A CM without a listener rejects with no private data.
            Err(Error::Rejected { private, .. }) => {
                return Err(Refusal::parse(&private)
                    .map_or(ClientError::NoServer { port }, ClientError::Refused));
            }
            Err(e) => return Err(verb("cannot connect")(e)),
        };
        let window = match *connection.private_data {
            [PROTOCOL_VERSION, window, ..] if window > 0 => usize::from(window).min(WINDOW),
            _ => return Err(ClientError::Refused(Refusal::Version)),
        };
        let qp = connection
            .id
            .take_qp()
            .ok_or(ClientError::Disconnected("no queue pair"))?;
        Ok(Self {
            qp,
            connection,
            context: context.clone(),
            cq,
            recv,
            send,
            staging: None,
            pd,
            pending: alloc::vec![Pending::Free; window],
            free: (0..window as u16).rev().collect(),
            outstanding: 0,
            spent: Vec::with_capacity(RECV_BUFFERS),
            unsignaled: 0,
            broken: None,
            timeout,
        })
    }

    /// Requests that may be outstanding at once.
    #[must_use]
    pub fn window(&self) -> usize {
        self.pending.len()
    }

    /// Requests outstanding now.
    #[must_use]
    pub const fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// The device.
    #[must_use]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// Sends a GET; gives its tag. The reply is [`Reply::Value`], or an error status: `NotFound`, or `TooLargeForEager`
    /// for a value over [`EAGER_VALUE_BYTES`] (ask again with [`Client::start_get_large`]).
    ///
    /// # Errors
    /// [`ClientError::WindowFull`], an impossible key, or a broken connection.
    #[inline]
    pub fn start_get(&mut self, key: &[u8]) -> Result<u16, ClientError> {
        if key.len() > EAGER_KEY_BYTES {
            return self.start_get_large(key);
        }
        self.start(
            &Request::Get {
                key: Key::Inline(key),
                buffer: None,
            },
            Pending::Plain,
        )
    }

    /// Sends a GET with a buffer for a value of any size.
    ///
    /// # Errors
    /// As [`Client::start_get`].
    pub fn start_get_large(&mut self, key: &[u8]) -> Result<u16, ClientError> {
        let s = self.stage(key, 0)?;
        let (key, buffer) = self.staged(s, key, MAX_VALUE_BYTES);
        self.start(
            &Request::Get {
                key,
                buffer: Some(buffer),
            },
            Pending::Staged(s),
        )
    }

    /// Sends a PUT. The reply is [`Reply::Version`] or an error status.
    ///
    /// # Errors
    /// As [`Client::start_get`], and [`ClientError::ValueTooLarge`].
    #[inline]
    pub fn start_put(&mut self, key: &[u8], value: &[u8]) -> Result<u16, ClientError> {
        if key.len() <= EAGER_KEY_BYTES && value.len() <= EAGER_VALUE_BYTES {
            let request = Request::Put {
                key: Key::Inline(key),
                value: PutValue::Inline(value),
            };
            return self.start(&request, Pending::Plain);
        }
        let s = self.stage(key, value.len())?;
        if let Some(staging) = &self.staging {
            staging.fill_value(s, value);
        }
        let (key, buffer) = self.staged(s, key, value.len());
        let value = if value.len() <= EAGER_VALUE_BYTES {
            PutValue::Inline(value)
        } else {
            PutValue::Remote(buffer)
        };
        self.start(&Request::Put { key, value }, Pending::Staged(s))
    }

    /// Sends a DEL. The reply is [`Reply::Version`] or an error status.
    ///
    /// # Errors
    /// As [`Client::start_get`].
    pub fn start_del(&mut self, key: &[u8]) -> Result<u16, ClientError> {
        if key.len() <= EAGER_KEY_BYTES {
            return self.start(
                &Request::Del {
                    key: Key::Inline(key),
                },
                Pending::Plain,
            );
        }
        let s = self.stage(key, 0)?;
        let (key, _) = self.staged(s, key, 0);
        self.start(&Request::Del { key }, Pending::Staged(s))
    }

    /// Sends a LIST with a buffer for a page. The reply is [`Reply::Page`].
    ///
    /// # Errors
    /// As [`Client::start_get`].
    pub fn start_list(&mut self, cursor: u64) -> Result<u16, ClientError> {
        let s = self.stage(&[0], 0)?;
        let (_, buffer) = self.staged(s, &[0], MIN_LIST_BUFFER_BYTES);
        self.start(
            &Request::List {
                cursor,
                limit: 0,
                buffer: Some(buffer),
            },
            Pending::Staged(s),
        )
    }

    /// Sends a request for counters, a PING or a PROBE.
    ///
    /// # Errors
    /// As [`Client::start_get`].
    pub fn start_simple(&mut self, what: Simple) -> Result<u16, ClientError> {
        let request = match what {
            Simple::Stats => Request::Stats,
            Simple::Ping => Request::Ping,
            Simple::Probe { rounds } => Request::Probe { rounds },
        };
        self.start(&request, Pending::Plain)
    }

    /// Registers the staging buffers for keys and values that travel by address, which otherwise happens when the first is
    /// needed. Registering is a control verb: whoever drives the engine itself must not wait for one, and calls this before.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn prepare_large(&mut self) -> Result<(), ClientError> {
        if self.staging.is_none() {
            self.staging =
                Some(Staging::new(&self.pd).map_err(verb("cannot register a staging buffer"))?);
        }
        Ok(())
    }

    #[cold]
    fn stage(&mut self, key: &[u8], value_len: usize) -> Result<u32, ClientError> {
        check(key, value_len)?;
        self.prepare_large()?;
        self.staging
            .as_mut()
            .and_then(Staging::take)
            .ok_or(ClientError::WindowFull)
    }

    /// Key and buffer of a request with staging buffer `s`.
    fn staged<'k>(
        &self,
        s: u32,
        key: &'k [u8],
        len: usize,
    ) -> (Key<'k>, crate::proto::RemoteBuffer) {
        let staging = self.staging.as_ref().expect("a staging buffer was taken");
        let key = if key.len() > EAGER_KEY_BYTES {
            Key::Remote(staging.fill_key(s, key))
        } else {
            Key::Inline(key)
        };
        (key, staging.value(s, len))
    }

    #[inline]
    fn start(&mut self, request: &Request<'_>, pending: Pending) -> Result<u16, ClientError> {
        let result = self.try_start(request, pending);
        if let (Err(_), Pending::Staged(s)) = (&result, pending)
            && let Some(staging) = &mut self.staging
        {
            staging.give_back(s);
        }
        result
    }

    #[inline]
    fn try_start(&mut self, request: &Request<'_>, pending: Pending) -> Result<u16, ClientError> {
        if let Some(why) = self.broken {
            return Err(ClientError::Disconnected(why));
        }
        let &tag = self.free.last().ok_or(ClientError::WindowFull)?;
        let signal = self.unsignaled + 1 >= SIGNAL_EVERY;
        // Most requests are small: do not clear and copy more than they need.
        let mut small = [0; MAX_INLINE];
        let posted = match request.emit(tag, &mut small) {
            Ok(n) => post(&mut self.qp, signal, Payload::Inline(&small[..n])),
            Err(ProtoError::NoRoom { .. }) => {
                let at = usize::from(tag) * MAX_REQUEST_BYTES;
                let mut large = [0; MAX_REQUEST_BYTES];
                let n = request.emit(tag, &mut large)?;
                self.send
                    .write(at, &large[..n])
                    .map_err(|_| ClientError::WindowFull)?;
                post(
                    &mut self.qp,
                    signal,
                    Payload::Sges(&[self.send.sge(at as u64, n as u32)]),
                )
            }
            Err(ProtoError::EmptyKey) => return Err(ClientError::EmptyKey),
            Err(e) => return Err(e.into()),
        };
        match posted {
            Ok(()) => {}
            Err(PostError::QueueFull) => return Err(ClientError::WindowFull),
            Err(_) => return Err(self.fail("its queue pair does not take requests")),
        }
        self.unsignaled = if signal { 0 } else { self.unsignaled + 1 };
        self.free.pop();
        self.pending[usize::from(tag)] = pending;
        self.outstanding += 1;
        Ok(tag)
    }

    fn fail(&mut self, why: &'static str) -> ClientError {
        ClientError::Disconnected(self.broken.get_or_insert(why))
    }

    /// Hands out replies that have arrived, each with its tag. Returns how many.
    ///
    /// # Errors
    /// When the connection has ended: outstanding requests get no reply, and whether a write among them was
    /// executed is not known.
    #[inline]
    pub fn poll(
        &mut self,
        mut each: impl FnMut(u16, Result<Reply<'_>, ClientError>),
    ) -> Result<usize, ClientError> {
        let mut replies = 0;
        while let Some(wc) = self.cq.poll_one() {
            replies += self.complete(&wc, &mut each)?;
        }
        if self.broken.is_some() {
            return Err(self.fail("broken"));
        }
        Ok(replies)
    }

    #[inline]
    fn complete(
        &mut self,
        wc: &WorkCompletion,
        each: &mut impl FnMut(u16, Result<Reply<'_>, ClientError>),
    ) -> Result<usize, ClientError> {
        if !wc.is_ok() {
            return Err(self.fail("the store closed it or died"));
        }
        if !wc.is_recv() {
            return Ok(0);
        }
        let buffer = wc.wr_id as u32;
        let payload = match wc.inline_data() {
            Some(data) => data,
            None => staging::received(
                &self.recv,
                buffer as usize * MAX_REPLY_BYTES,
                wc.byte_len as usize,
            ),
        };
        let parsed = Reply::parse(wc.imm.unwrap_or(u32::MAX), payload);
        let (tag, reply) = match parsed {
            Ok(r) => r,
            Err(_) => return Err(self.fail("the store's reply made no sense")),
        };
        let Some(pending) = self.pending.get_mut(usize::from(tag)) else {
            return Err(self.fail("the store answered a request that was not made"));
        };
        let was = core::mem::replace(pending, Pending::Free);
        match (was, reply) {
            (Pending::Free, _) => return Err(self.fail("the store answered a request twice")),
            (_, Reply::Error { status, detail }) => {
                each(tag, Err(ClientError::Status { status, detail }))
            }
            (Pending::Staged(s), Reply::Written { version, value_len }) => {
                let staging = self.staging.as_ref().expect("taken for this request");
                let value = staging.written(s, value_len as usize);
                each(
                    tag,
                    Ok(Reply::Value {
                        version,
                        value,
                        key: None,
                    }),
                );
            }
            (Pending::Staged(s), Reply::PageWritten { len }) => {
                let staging = self.staging.as_ref().expect("taken for this request");
                each(
                    tag,
                    Page::parse(staging.written(s, len as usize))
                        .map(Reply::Page)
                        .map_err(ClientError::from),
                );
            }
            (_, reply) => each(tag, Ok(reply)),
        }
        if let (Pending::Staged(s), Some(staging)) = (was, &mut self.staging) {
            staging.give_back(s);
        }
        self.free.push(tag);
        self.outstanding -= 1;
        self.spent.push(buffer);
        if self.spent.len() >= REPOST_BATCH {
            for b in self.spent.drain(..) {
                if post_recv(&mut self.qp, &self.recv, b).is_err() {
                    self.broken = Some("a receive could not be posted");
                }
            }
        }
        Ok(1)
    }

    /// Ends the connection in order.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn close(mut self) -> Result<(), ClientError> {
        self.connection
            .id
            .disconnect()
            .map_err(verb("cannot disconnect"))
    }
}

/// Requests without a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Simple {
    /// Counters: [`Reply::Stats`].
    Stats,
    /// Nothing but a reply: [`Reply::Empty`].
    Ping,
    /// Bounce the probe line: [`Reply::Probe`], then see [`hyv_verbs::probe`].
    Probe {
        /// How often.
        rounds: u32,
    },
}

#[inline]
fn post(qp: &mut QueuePair, signal: bool, payload: Payload<'_>) -> Result<(), PostError> {
    let wr = SendWr::new(0, SendOp::Send, payload);
    qp.post_send(&if signal { wr } else { wr.unsignaled() })
}

#[inline]
fn post_recv(qp: &mut QueuePair, recv: &MemoryRegion, buffer: u32) -> Result<(), Error> {
    let sge = recv.sge(
        u64::from(buffer) * MAX_REPLY_BYTES as u64,
        MAX_REPLY_BYTES as u32,
    );
    qp.post_recv(&RecvWr {
        wr_id: u64::from(buffer),
        sges: &[sge],
    })
    .map_err(|_| Error::NoQueuePair)
}

fn check(key: &[u8], value_len: usize) -> Result<(), ClientError> {
    if key.is_empty() {
        return Err(ClientError::EmptyKey);
    }
    if key.len() > MAX_KEY_BYTES {
        return Err(ClientError::KeyTooLong { len: key.len() });
    }
    if value_len > MAX_VALUE_BYTES {
        return Err(ClientError::ValueTooLarge { len: value_len });
    }
    Ok(())
}
