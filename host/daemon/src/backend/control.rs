//! The control virtqueue of one user, device side (virtio 1.2, section 2.7, split): takes requests out of the
//! user's RAM and puts replies back.
//!
//! All of it is the user's word. A ring that contradicts itself stops being served until it is set up again; a
//! chain that does gets an error reply where it has room for one. A request is copied out once.

use std::sync::atomic::{Ordering, fence};

use hyv_abi::control::{MAX_REPLY, MAX_REQUEST, REPLY_HEADER_LEN, REQUEST_HEADER_LEN};
use hyv_abi::control::{ReplyHeader, RequestHeader};
use hyv_abi::types::{Errno, Reason, VerbError};
use hyv_abi::window;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::limits::{MAX_QUEUE_SIZE, MAX_REPLY_SEGMENTS};
use super::memory::RamView;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver polls the used ring.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// What is wrong with a user's control queue. Ends its service until the user sets it up again.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum QueueError {
    #[error("its size is {0}, not a power of two from 1 to {MAX_QUEUE_SIZE}")]
    Size(u32),
    #[error("its {part} at RAM offset {offset:#x} is misaligned, at 0, or not inside the RAM")]
    Place { part: &'static str, offset: u64 },
    #[error("its rings contradict themselves: {0}")]
    Ring(String),
}

/// The device side of one user's control queue.
#[derive(Debug, Default)]
pub(super) struct ControlQueue {
    state: Setup,
}

#[derive(Debug, Default)]
enum Setup {
    /// Not enabled.
    #[default]
    Off,
    /// In service.
    On(Place, Queue),
    /// Was found broken; waits to be disabled or moved.
    Broken(Place),
}

/// Where a user says that its queue is: RAM offsets, and entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    desc: u64,
    avail: u64,
    used: u64,
    size: u32,
}

impl Place {
    fn load(words: &window::ControlQueue) -> Self {
        Self {
            desc: words.desc.load(Ordering::Acquire),
            avail: words.avail.load(Ordering::Acquire),
            used: words.used.load(Ordering::Acquire),
            size: words.size.load(Ordering::Acquire),
        }
    }

    /// The place of an enabled queue. None if it is disabled, or changing right now: then a kick follows.
    fn enabled(words: &window::ControlQueue) -> Option<Self> {
        let enabled = || words.enable.load(Ordering::Acquire) == 1;
        if !enabled() {
            return None;
        }
        // A user that moves its queue disables it, writes the new place and enables it. Who sees a word of the new place
        // and then an enabled queue sees all of it.
        let first = Self::load(words);
        (enabled() && Self::load(words) == first).then_some(first)
    }
}

/// How a turn at a queue ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Served {
    /// Requests taken.
    pub(super) requests: usize,
    /// There are more.
    pub(super) more: bool,
    /// The user wants to be woken for what it got.
    pub(super) notify: bool,
}

/// A reply under construction.
pub(super) struct Reply {
    bytes: [u8; MAX_REPLY],
    len: usize,
}

impl Reply {
    fn new(cookie: u64, status: Result<&[u8], VerbError>) -> Self {
        let (status, reason, body) = match status {
            Ok(body) => (0, 0, body),
            Err(e) => (e.errno as u32, e.reason as u32, &[][..]),
        };
        let mut bytes = [0; MAX_REPLY];
        let len = REPLY_HEADER_LEN + body.len();
        let header = ReplyHeader {
            status,
            reason,
            len: body.len() as u32,
            reserved: 0,
            cookie,
        };
        bytes[..REPLY_HEADER_LEN].copy_from_slice(header.as_bytes());
        bytes[REPLY_HEADER_LEN..len].copy_from_slice(body);
        Self { bytes, len }
    }

    /// `body` must fit beside the header, which the table of verbs asserts.
    pub(super) fn ok(cookie: u64, body: &[u8]) -> Self {
        Self::new(cookie, Ok(body))
    }

    pub(super) fn error(cookie: u64, error: VerbError) -> Self {
        Self::new(cookie, Err(error))
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// A request, copied out of the user's memory.
pub(super) struct Request {
    bytes: [u8; MAX_REQUEST],
    len: usize,
    /// Bytes that a reply's body may have.
    pub(super) room: usize,
}

impl Request {
    /// Header and body; without a header, what to answer.
    pub(super) fn parse(&self) -> Result<(RequestHeader, &[u8]), VerbError> {
        let short = VerbError::new(Errno::Inval, Reason::BadLength);
        let (header, rest) =
            RequestHeader::read_from_prefix(&self.bytes[..self.len]).map_err(|_| short)?;
        // A body longer than the largest one is a later version's; what is known of it is here.
        let len = (header.len as usize).min(MAX_REQUEST - REQUEST_HEADER_LEN);
        let body = rest.get(..len).ok_or(short)?;
        Ok((header, body))
    }

    /// The cookie, if the header came at all.
    pub(super) fn cookie(&self) -> u64 {
        RequestHeader::read_from_prefix(&self.bytes[..self.len]).map_or(0, |(h, _)| h.cookie)
    }
}

/// One descriptor chain, taken apart.
struct Chain {
    request: Request,
    /// Pieces for the reply: address and length, all inside the RAM.
    reply: [(u64, usize); MAX_REPLY_SEGMENTS],
    pieces: usize,
    /// Why the chain as such cannot be served.
    fault: Option<VerbError>,
}

impl Chain {
    fn read(
        chain: virtio_queue::DescriptorChain<&GuestMemoryMmap<()>>,
        memory: &GuestMemoryMmap<()>,
        ram_len: u64,
    ) -> Self {
        let mut it = Self {
            request: Request {
                bytes: [0; MAX_REQUEST],
                len: 0,
                room: 0,
            },
            reply: [(0, 0); MAX_REPLY_SEGMENTS],
            pieces: 0,
            fault: None,
        };
        let mut complete = false;
        let mut writable = 0usize;
        for d in chain {
            complete = !d.has_next();
            let (addr, len) = (d.addr().0, d.len() as usize);
            if addr.checked_add(len as u64).is_none_or(|end| end > ram_len) {
                it.fail(Errno::Fault, Reason::OutsideRam);
                continue;
            }
            if d.is_write_only() {
                if it.pieces == MAX_REPLY_SEGMENTS {
                    it.fail(Errno::Inval, Reason::BadLength);
                    continue;
                }
                it.reply[it.pieces] = (addr, len);
                it.pieces += 1;
                writable = writable.saturating_add(len);
            } else if it.pieces > 0 {
                it.fail(Errno::Inval, Reason::BadLength);
            } else {
                let n = len.min(MAX_REQUEST - it.request.len);
                let to = &mut it.request.bytes[it.request.len..it.request.len + n];
                if memory.read_slice(to, GuestAddress(addr)).is_err() {
                    it.fail(Errno::Fault, Reason::OutsideRam);
                    continue;
                }
                it.request.len += n;
            }
        }
        if !complete {
            // It goes in circles, or names a descriptor that does not exist.
            it.fail(Errno::Inval, Reason::BadLength);
        }
        it.request.room = writable.saturating_sub(REPLY_HEADER_LEN);
        if writable < REPLY_HEADER_LEN {
            // Nowhere to answer to; doing it silently would leave the user with objects that it knows nothing of.
            it.fail(Errno::Inval, Reason::BadLength);
            it.pieces = 0;
        }
        it
    }

    fn fail(&mut self, errno: Errno, reason: Reason) {
        self.fault.get_or_insert(VerbError::new(errno, reason));
    }

    /// Writes a reply and says how many bytes were written.
    fn answer(&self, reply: &Reply, memory: &GuestMemoryMmap<()>) -> u32 {
        let mut rest = reply.bytes();
        for (addr, len) in &self.reply[..self.pieces] {
            let (now, later) = rest.split_at((*len).min(rest.len()));
            if memory.write_slice(now, GuestAddress(*addr)).is_err() {
                break;
            }
            rest = later;
        }
        (reply.bytes().len() - rest.len()) as u32
    }
}

impl ControlQueue {
    /// Follows what the user says about its queue: sets it up when it is enabled or enabled elsewhere, forgets it when
    /// it is disabled.
    pub(super) fn refresh(
        &mut self,
        words: &window::ControlQueue,
        ram: &RamView,
    ) -> Result<(), QueueError> {
        let Some(place) = Place::enabled(words) else {
            self.state = Setup::Off;
            return Ok(());
        };
        match &self.state {
            Setup::On(now, _) | Setup::Broken(now) if *now == place => return Ok(()),
            _ => {}
        }
        match set_up(place, ram) {
            Ok(queue) => {
                self.state = Setup::On(place, queue);
                Ok(())
            }
            Err(e) => {
                self.state = Setup::Broken(place);
                Err(e)
            }
        }
    }

    /// Serves up to `limit` requests.
    pub(super) fn serve(
        &mut self,
        ram: &RamView,
        limit: usize,
        mut handle: impl FnMut(&Request) -> Reply,
    ) -> Result<Served, QueueError> {
        let Setup::On(place, queue) = &mut self.state else {
            return Ok(Served::default());
        };
        match serve(queue, ram, limit, &mut handle) {
            Ok(served) => Ok(served),
            Err(e) => {
                self.state = Setup::Broken(*place);
                Err(QueueError::Ring(e.to_string()))
            }
        }
    }
}

fn set_up(place: Place, ram: &RamView) -> Result<Queue, QueueError> {
    let Place {
        desc,
        avail,
        used,
        size,
    } = place;
    let bad_size = QueueError::Size(size);
    let size = u16::try_from(size).map_err(|_| bad_size.clone())?;
    if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
        return Err(bad_size);
    }
    let n = u64::from(size);
    // Lengths of virtio 1.2, section 2.7, with the event fields at the rings' ends.
    let parts = [
        ("descriptor table", desc, 16, 16 * n),
        ("available ring", avail, 2, 6 + 2 * n),
        ("used ring", used, 4, 6 + 8 * n),
    ];
    for (part, offset, align, len) in parts {
        let end = offset.checked_add(len);
        if offset == 0 || !offset.is_multiple_of(align) || end.is_none_or(|e| e > ram.len()) {
            return Err(QueueError::Place { part, offset });
        }
    }
    let broken = |e: virtio_queue::Error| QueueError::Ring(e.to_string());
    let mut queue = Queue::new(MAX_QUEUE_SIZE).map_err(broken)?;
    queue.try_set_size(size).map_err(broken)?;
    queue
        .try_set_desc_table_address(GuestAddress(desc))
        .map_err(broken)?;
    queue
        .try_set_avail_ring_address(GuestAddress(avail))
        .map_err(broken)?;
    queue
        .try_set_used_ring_address(GuestAddress(used))
        .map_err(broken)?;
    // Requests are answered one by one, so the used index says how far an earlier set-up of these rings came; it is 0
    // in new ones.
    let done = queue
        .used_idx(ram.memory(), Ordering::Acquire)
        .map_err(broken)?;
    queue.set_next_avail(done.0);
    queue.set_next_used(done.0);
    queue.set_ready(true);
    Ok(queue)
}

fn serve(
    queue: &mut Queue,
    ram: &RamView,
    limit: usize,
    handle: &mut impl FnMut(&Request) -> Reply,
) -> Result<Served, virtio_queue::Error> {
    let memory = ram.memory();
    let mut served = Served::default();
    loop {
        if served.requests == limit {
            served.more = true;
            break;
        }
        let Some(chain) = queue.iter(memory)?.next() else {
            break;
        };
        let head = chain.head_index();
        if head >= queue.size() {
            return Err(virtio_queue::Error::InvalidDescriptorIndex);
        }
        let chain = Chain::read(chain, memory, ram.len());
        let written = if chain.pieces == 0 {
            0
        } else {
            let reply = match chain.fault {
                Some(e) => Reply::error(chain.request.cookie(), e),
                None => handle(&chain.request),
            };
            chain.answer(&reply, memory)
        };
        queue.add_used(memory, head, written)?;
        served.requests += 1;
    }
    if served.requests > 0 {
        // The used index must be visible before the driver's wish is read: it looks in the other order.
        fence(Ordering::SeqCst);
        let flags: u16 = memory
            .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        served.notify = u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0;
    }
    Ok(served)
}
