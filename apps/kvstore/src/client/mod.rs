//! The client: operations over an RC queue pair to a [`crate::server`].
//!
//! The core is driven by polling: [`Client::submit`] sends a request and gives its [`Ticket`], and [`Client::poll`] hands out
//! completions, in any order, each ticket's exactly once. Up to [`Client::window`] requests may be outstanding. [`Client::read`]
//! and its sisters (in `blocking`) wait for one reply. Keys and values that are too large for a message travel by address: they
//! are copied into a staging buffer, which the server READs or WRITEs.
//!
//! **A lost connection** is made anew, with growing pauses, while requests wait in their slots; then they are sent again under the same
//! numbers, and what was executed before is not executed again. If the server has lost its memory meanwhile, all of them end
//! with [`ClientError::ServerRestarted`], and so does every call until [`Client::accept_restart`].
//!
//! **One-sided reads** ([`Client::submit_one_sided`]) READ the store's hash table and log without the server's CPU: one READ if
//! the object's place is known from before, otherwise two. What they cannot vouch for is asked of the server.

mod blocking;
mod error;
mod link;
mod many;
mod mend;
mod onesided;
mod operation;
mod places;
mod sequence;
mod staging;
mod submit;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::time::Duration;

use hyv_verbs::{
    Access, CompletionQueue, Context, Gid, MemoryRegion, Payload, PostError, ProtectionDomain,
    WorkCompletion,
};

use crate::limits::{EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_RESULTS};
use crate::proto::{
    Key, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, MultiOp, Once, Page, ProtoError, Reply, Request,
    Results, Status, Value,
};
pub use blocking::{Object, PageOfKeys, PageOfObjects, ServiceTimes, Table};
pub use error::ClientError;
use error::verb;
use link::{Link, WR_READ};
pub use many::{MultiResult, OwnedElement};
use mend::Mending;
use onesided::OneSided;
pub use onesided::OneSidedCounters;
pub use operation::Operation;
use sequence::Sequence;
use staging::Staging;

/// Requests outstanding at once, if the server allows as many.
const WINDOW: usize = 16;
/// Receive buffers: the window twice, so that they can be posted again in batches.
const RECV_BUFFERS: usize = 2 * WINDOW;
/// Receives posted again at once.
const REPOST_BATCH: usize = 8;
/// Requests up to this many bytes go inline: a head slot and three more.
const MAX_INLINE: usize = 192;
/// Send work requests at once: the window, what is not known to be done, and READs.
const MAX_SENDS: u32 = 64;
/// Most elements of one multi-operation whose elements execute once: so that two of them fit what a server keeps.
pub const MAX_ONCE_ELEMENTS: usize = MAX_RESULTS / 2;
/// Most bytes of one multi-operation's elements: half of a staging buffer; the results get the other half.
pub const MAX_ELEMENTS_BYTES: usize = staging::ROOM / 2;
/// Results that fit a reply without a buffer: those of so many elements, if they are no values.
const SMALL_RESULTS: usize = 128;

const _: () = assert!(SMALL_RESULTS * 17 <= MAX_REPLY_BYTES);

/// A request that was submitted. Its number is below [`Client::window`]'s maximum of 16, and free for another request once its
/// completion was handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u16);

impl From<Ticket> for usize {
    fn from(ticket: Ticket) -> Self {
        Self::from(ticket.0)
    }
}

/// How to be a client.
#[derive(Debug, Clone, Copy)]
pub struct ClientConfig {
    /// Bounds every blocking call, and each attempt to connect.
    pub timeout: Duration,
    /// For how long to try to get a lost connection back; none: not at all.
    pub reconnect: Option<Duration>,
    /// Whether writes, removes and increments execute once, whatever happens to their replies. Costs the server a record of 72 bytes for each,
    /// until its result is acknowledged. Without, such a request ends with [`ClientError::OutcomeUnknown`] if the connection is lost.
    pub exactly_once: bool,
    /// Places of objects to remember for one-sided reads: 32 bytes each, taken when the first is made. Rounded up to a power of two.
    pub locations: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            reconnect: Some(Duration::from_secs(10)),
            exactly_once: true,
            locations: 1 << 14,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    /// Waits to be sent: for the connection, or for room in the server's window.
    Queued,
    /// Waits for a staging buffer, to be sent again with it.
    Unstaged,
    /// Sent.
    Sent,
    /// Being looked up one-sidedly.
    Looking,
}

/// What to do with a request whose connection was lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Repeat {
    /// Send it again.
    Always,
    /// Send it again if the server still knows this client.
    Numbered(Once, u16),
    /// Nobody knows what became of it.
    Never,
}

/// A request: what was sent lies in the send region, at its slot.
#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    repeat: Repeat,
    /// Whether it was sent: it may have been executed.
    tried: bool,
    /// Whether it was sent on an earlier connection.
    again: bool,
    /// Bytes of the request.
    len: u32,
    /// Its staging buffer.
    staged: Option<u32>,
    /// Where in it the answer goes.
    answer_at: u32,
    /// Of a multi-operation.
    multi: Option<(MultiOp, u16)>,
    /// Counts requests: the order to send them again in.
    order: u64,
}

const FREE: Slot = Slot {
    state: State::Free,
    repeat: Repeat::Always,
    tried: false,
    again: false,
    len: 0,
    staged: None,
    answer_at: 0,
    multi: None,
    order: 0,
};

/// A connection to a store.
pub struct Client {
    // Fields drop in order: the queue pair before the memory it uses.
    link: Option<Link>,
    mending: Mending,
    context: Context,
    cq: CompletionQueue,
    recv: MemoryRegion,
    send: MemoryRegion,
    staging: Option<Staging>,
    one_sided: Option<Box<OneSided>>,
    pd: ProtectionDomain,
    to: (Gid, u16),
    config: ClientConfig,
    slots: [Slot; WINDOW],
    free: Vec<u16>,
    /// Slots that wait to be sent.
    queue: VecDeque<u16>,
    /// Slots that wait for a staging buffer.
    unstaged: VecDeque<u16>,
    /// Requests that the server has.
    sent: usize,
    /// Requests that it may have.
    window: usize,
    submitted: u64,
    sequence: Sequence,
    /// Why the connection is of no use any more.
    broken: Option<&'static str>,
}

impl core::fmt::Debug for Client {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Client")
            .field("outstanding", &self.outstanding())
            .field("connected", &self.link.is_some())
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the store that listens on a port, with everything as usual. `timeout` bounds this and every later blocking
    /// call, and how long a lost connection is tried to be made anew.
    ///
    /// # Errors
    /// As [`Client::connect_with`].
    pub fn connect(
        context: &Context,
        gid: Gid,
        port: u16,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        let config = ClientConfig {
            timeout,
            reconnect: Some(timeout),
            ..ClientConfig::default()
        };
        Self::connect_with(context, gid, port, config)
    }

    /// Connects to the store that listens on a port.
    ///
    /// # Errors
    /// [`ClientError::NoServer`], [`ClientError::Refused`], and what the device says.
    pub fn connect_with(
        context: &Context,
        gid: Gid,
        port: u16,
        config: ClientConfig,
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
        let mut client = Self {
            link: None,
            mending: Mending::new(context.now_ns()),
            context: context.clone(),
            cq,
            recv,
            send,
            staging: None,
            one_sided: None,
            pd,
            to: (gid, port),
            config,
            slots: [FREE; WINDOW],
            free: (0..WINDOW as u16).rev().collect(),
            queue: VecDeque::with_capacity(WINDOW),
            unstaged: VecDeque::with_capacity(WINDOW),
            sent: 0,
            window: WINDOW,
            submitted: 0,
            sequence: Sequence::new(),
            broken: None,
        };
        client.connect_first()?;
        Ok(client)
    }

    /// Requests that may be outstanding at once.
    #[must_use]
    pub const fn window(&self) -> usize {
        self.window
    }

    /// Requests outstanding now.
    #[must_use]
    pub const fn outstanding(&self) -> usize {
        WINDOW - self.free.len()
    }

    /// The device.
    #[must_use]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// Whether a connection stands, as far as is known.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.link.is_some() && self.broken.is_none()
    }

    /// For how long to try to get a lost connection back from now on; none: not at all. Making a connection takes control verbs: whoever
    /// drives the engine itself must not wait for one.
    pub const fn set_reconnect(&mut self, time: Option<Duration>) {
        self.config.reconnect = time;
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

    /// Submits an operation; gives its ticket. It is sent at once if there is a connection.
    ///
    /// # Errors
    /// [`ClientError::WindowFull`]: take replies first; an impossible key or value; a connection that is lost for good, or
    /// [`ClientError::ServerRestarted`]. Nothing is submitted then.
    #[inline]
    pub fn submit(&mut self, operation: &Operation<'_>) -> Result<Ticket, ClientError> {
        match *operation {
            Operation::Read { table, key, rules } if key.len() <= EAGER_KEY_BYTES => {
                let request = Request::Read {
                    table,
                    key: Key::Inline(key),
                    rules,
                    buffer: None,
                };
                self.start(&request, FREE)
            }
            Operation::Write {
                table,
                key,
                value,
                rules,
                expires,
            } if key.len() <= EAGER_KEY_BYTES && value.len() <= EAGER_VALUE_BYTES => self
                .start_once(1, |once| Request::Write {
                    table,
                    key: Key::Inline(key),
                    value: Value::Inline(value),
                    rules,
                    expires,
                    once,
                }),
            _ => self.submit_any(operation),
        }
    }

    #[inline]
    fn start_once<'r>(
        &mut self,
        count: usize,
        request: impl FnOnce(Option<Once>) -> Request<'r>,
    ) -> Result<Ticket, ClientError> {
        self.start_numbered(FREE, count, request)
    }

    /// Starts a request that changes something: with a number, if it is to execute once.
    #[inline]
    fn start_numbered<'r>(
        &mut self,
        mut slot: Slot,
        count: usize,
        request: impl FnOnce(Option<Once>) -> Request<'r>,
    ) -> Result<Ticket, ClientError> {
        if !self.config.exactly_once {
            slot.repeat = Repeat::Never;
            return self.start(&request(None), slot);
        }
        let Some(once) = self.sequence.take(count) else {
            self.unstage(slot.staged);
            return Err(ClientError::WindowFull);
        };
        slot.repeat = Repeat::Numbered(once, count as u16);
        let started = self.start(&request(Some(once)), slot);
        if started.is_err() {
            self.sequence.untake(once);
        }
        started
    }

    fn unstage(&mut self, staged: Option<u32>) {
        if let (Some(s), Some(staging)) = (staged, &mut self.staging) {
            staging.give_back(s);
        }
    }

    #[inline]
    fn start(&mut self, request: &Request<'_>, slot: Slot) -> Result<Ticket, ClientError> {
        let started = self.try_start(request, slot);
        if started.is_err() {
            self.unstage(slot.staged);
        }
        started
    }

    #[inline]
    fn try_start(&mut self, request: &Request<'_>, slot: Slot) -> Result<Ticket, ClientError> {
        if let Some(error) = &self.mending.refuses {
            return Err(error.clone());
        }
        if self.sent + self.queue.len() >= self.window {
            return Err(ClientError::WindowFull);
        }
        let tag = self.occupy(request, slot)?;
        if self.link.is_some() && self.broken.is_none() && self.queue.is_empty() {
            self.post(tag)?;
        } else {
            self.queue.push_back(tag);
        }
        Ok(Ticket(tag))
    }

    /// Puts a request into a slot.
    #[inline]
    fn occupy(&mut self, request: &Request<'_>, slot: Slot) -> Result<u16, ClientError> {
        let &tag = self.free.last().ok_or(ClientError::WindowFull)?;
        let at = usize::from(tag) * MAX_REQUEST_BYTES;
        let len = match request.emit(tag, staging::own(&self.send, at, MAX_REQUEST_BYTES)) {
            Ok(len) => len,
            Err(ProtoError::EmptyKey) => return Err(ClientError::EmptyKey),
            Err(e) => return Err(e.into()),
        };
        self.free.pop();
        self.submitted += 1;
        self.slots[usize::from(tag)] = Slot {
            state: State::Queued,
            len: len as u32,
            order: self.submitted,
            ..slot
        };
        Ok(tag)
    }

    /// Sends the request in a slot.
    #[inline]
    fn post(&mut self, tag: u16) -> Result<(), ClientError> {
        let Some(link) = &mut self.link else {
            self.queue.push_back(tag);
            return Ok(());
        };
        let slot = &mut self.slots[usize::from(tag)];
        let (at, len) = (usize::from(tag) * MAX_REQUEST_BYTES, slot.len as usize);
        let posted = if len <= MAX_INLINE {
            link.send(Payload::Inline(staging::received(&self.send, at, len)))
        } else {
            link.send(Payload::Sges(&[self.send.sge(at as u64, len as u32)]))
        };
        match posted {
            Ok(()) => {
                slot.state = State::Sent;
                slot.tried = true;
                self.sent += 1;
            }
            Err(error) => {
                slot.state = State::Queued;
                self.queue.push_front(tag);
                // A full queue has room again when completions were polled.
                if error != PostError::QueueFull {
                    self.broken = Some("its queue pair does not take requests");
                }
            }
        }
        Ok(())
    }

    /// Sends what waits to be sent, as far as the server's window allows.
    fn post_queued(&mut self) -> Result<(), ClientError> {
        while self.sent < self.window
            && self.link.is_some()
            && self.broken.is_none()
            && let Some(tag) = self.queue.pop_front()
        {
            let before = self.sent;
            self.post(tag)?;
            if self.sent == before {
                break;
            }
        }
        Ok(())
    }

    /// Hands out completions that have arrived, each with its ticket. Returns how many. Also goes on with making a lost connection
    /// anew, so it is to be called as long as something is outstanding.
    ///
    /// # Errors
    /// When the connection is lost for good. What was outstanding was handed out before, with an error each.
    #[inline]
    pub fn poll(
        &mut self,
        mut each: impl FnMut(Ticket, Result<Reply<'_>, ClientError>),
    ) -> Result<usize, ClientError> {
        let mut completed = 0;
        loop {
            let polled = self.cq.poll_one();
            // Looked at where it lies: moving it, by wide loads of what was stored a moment ago, waits for all stores before.
            let Some(wc) = &polled else { break };
            completed += self.complete(wc, &mut each);
        }
        if self.broken.is_some() || self.link.is_none() {
            completed += self.mend(&mut each)?;
        }
        if !self.queue.is_empty() || !self.unstaged.is_empty() {
            self.post_waiting(&mut each);
        }
        Ok(completed)
    }

    /// Goes on with requests that waited.
    #[cold]
    fn post_waiting(&mut self, each: &mut impl FnMut(Ticket, Result<Reply<'_>, ClientError>)) {
        while let Some(tag) = self.unstaged.pop_front() {
            match self.stage() {
                Ok(staged) => self.restage(tag, staged),
                Err(ClientError::WindowFull) => {
                    self.unstaged.push_front(tag);
                    break;
                }
                Err(e) => self.finish(tag, Err(e), each),
            }
        }
        // An error has broken the connection, which shows at the next call.
        let _ = self.post_queued();
    }

    /// Takes a completion. Returns the requests that it completes.
    #[inline]
    fn complete(
        &mut self,
        wc: &WorkCompletion,
        each: &mut impl FnMut(Ticket, Result<Reply<'_>, ClientError>),
    ) -> usize {
        if !wc.is_ok() {
            self.broken.get_or_insert("the store closed it or died");
            return 0;
        }
        if !wc.is_recv() {
            if wc.wr_id & WR_READ != 0 {
                return self.looked_up(wc.wr_id as u16, each);
            }
            return 0;
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
        let (tag, reply) = match Reply::parse(wc.imm.unwrap_or(u32::MAX), payload) {
            Ok(r) => r,
            Err(_) => {
                self.broken.get_or_insert("the store's reply made no sense");
                return 0;
            }
        };
        let slot = match self.slots.get_mut(usize::from(tag)) {
            Some(slot) if slot.state == State::Sent => slot,
            _ => {
                self.broken
                    .get_or_insert("the store answered a request that was not made");
                return 0;
            }
        };
        let slot = core::mem::replace(slot, FREE);
        self.sent -= 1;
        let mut completed = 1;
        let ticket = Ticket(tag);
        match reply {
            Reply::Error { status, detail } => {
                if self.failed(tag, &slot, status) {
                    completed = 0;
                } else if status == Status::UnknownTable && self.dropped_before(tag, &slot) {
                    each(ticket, Ok(Reply::Empty));
                } else {
                    each(ticket, Err(ClientError::of(status, detail)));
                }
            }
            Reply::Written { version, value_len } if let Some(s) = slot.staged => {
                let staging = self.staging.as_ref().expect("taken for this request");
                let value = staging.written(s, Staging::VALUE_AT, value_len as usize);
                let reply = Reply::Value {
                    version,
                    value,
                    key: None,
                };
                each(ticket, Ok(reply));
            }
            Reply::PackedWritten { len } if let Some(s) = slot.staged => {
                let staging = self.staging.as_ref().expect("taken for this request");
                let bytes = staging.written(s, slot.answer_at as usize, len as usize);
                each(ticket, check_packed(slot.multi, bytes));
            }
            Reply::Results(bytes) => each(ticket, check_packed(slot.multi, bytes)),
            reply => each(ticket, Ok(reply)),
        }
        if let Some(link) = &mut self.link
            && !link.spend(&self.recv, buffer)
        {
            self.broken = Some("a receive could not be posted");
        }
        if completed > 0 {
            self.release(tag, &slot);
        }
        if !self.queue.is_empty() {
            // An error has broken the connection, which shows at the next call.
            let _ = self.post_queued();
        }
        completed
    }

    /// Whether a failure is none for the caller, because the request goes on: a read of a value that needs a buffer.
    #[cold]
    fn failed(&mut self, tag: u16, slot: &Slot, status: Status) -> bool {
        let small_read = status == Status::TooLargeForEager
            && slot.staged.is_none()
            && matches!(self.request(tag, slot), Some(Request::Read { .. }));
        if small_read {
            self.slots[usize::from(tag)] = Slot {
                state: State::Unstaged,
                ..*slot
            };
            self.unstaged.push_back(tag);
        }
        small_read
    }

    /// Whether a drop that was sent before found nothing because it had been executed then.
    fn dropped_before(&self, tag: u16, slot: &Slot) -> bool {
        slot.again && matches!(self.request(tag, slot), Some(Request::DropTable { .. }))
    }

    /// What a slot's request says.
    fn request(&self, tag: u16, slot: &Slot) -> Option<Request<'_>> {
        let at = usize::from(tag) * MAX_REQUEST_BYTES;
        let bytes = staging::received(&self.send, at, slot.len as usize);
        Request::parse(bytes).ok().map(|(_, request)| request)
    }

    /// Gives a read a staging buffer, and has it sent again.
    #[cold]
    fn restage(&mut self, tag: u16, staged: u32) {
        let slot = self.slots[usize::from(tag)];
        let to = self.staging().value(staged, crate::limits::MAX_VALUE_BYTES);
        let mut out = [0; MAX_REQUEST_BYTES];
        let emitted = match self.request(tag, &slot) {
            Some(Request::Read {
                table, key, rules, ..
            }) => {
                let request = Request::Read {
                    table,
                    key,
                    rules,
                    buffer: Some(to),
                };
                request.emit(tag, &mut out).unwrap_or(0)
            }
            _ => 0,
        };
        let at = usize::from(tag) * MAX_REQUEST_BYTES;
        staging::own(&self.send, at, emitted).copy_from_slice(&out[..emitted]);
        self.slots[usize::from(tag)] = Slot {
            state: State::Queued,
            staged: Some(staged),
            answer_at: Staging::VALUE_AT as u32,
            len: emitted as u32,
            ..slot
        };
        self.queue.push_back(tag);
    }

    /// A slot's request is complete: its number, staging buffer and slot are free again.
    #[inline]
    fn release(&mut self, tag: u16, slot: &Slot) {
        if let Repeat::Numbered(once, count) = slot.repeat {
            self.sequence.complete(once.sequence, usize::from(count));
        }
        if slot.staged.is_some() {
            self.unstage(slot.staged);
        }
        self.slots[usize::from(tag)] = FREE;
        self.free.push(tag);
    }

    /// Completes a request without a reply.
    fn finish(
        &mut self,
        tag: u16,
        result: Result<Reply<'_>, ClientError>,
        each: &mut impl FnMut(Ticket, Result<Reply<'_>, ClientError>),
    ) {
        let slot = self.slots[usize::from(tag)];
        each(Ticket(tag), result);
        self.release(tag, &slot);
    }

    /// Reads `key` of the default table: [`Client::submit`] of a read.
    ///
    /// # Errors
    /// As [`Client::submit`].
    #[inline]
    pub fn start_get(&mut self, key: &[u8]) -> Result<Ticket, ClientError> {
        self.submit(&Operation::get(key))
    }

    /// Writes to the default table: [`Client::submit`] of a write.
    ///
    /// # Errors
    /// As [`Client::submit`].
    #[inline]
    pub fn start_put(&mut self, key: &[u8], value: &[u8]) -> Result<Ticket, ClientError> {
        self.submit(&Operation::put(key, value))
    }

    /// Ends the connection in order. A client that is dropped instead keeps its lease at the server for a while.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn close(mut self) -> Result<(), ClientError> {
        if self.config.exactly_once && self.is_connected() && self.outstanding() == 0 {
            self.config.reconnect = None;
            // If that fails the lease expires by itself.
            let _ = self.end_lease();
        }
        match self.link.take() {
            Some(link) => link.close(),
            None => Ok(()),
        }
    }
}

/// What the server wrote to a buffer, or packed into a reply.
fn check_packed(multi: Option<(MultiOp, u16)>, bytes: &[u8]) -> Result<Reply<'_>, ClientError> {
    match multi {
        Some((op, count)) => {
            Results::parse(op, usize::from(count), bytes)?;
            Ok(Reply::Results(bytes))
        }
        None => Ok(Reply::Page(Page::parse(bytes)?)),
    }
}
