//! Control verbs over a split virtqueue (virtio 1.2, section 2.7), driver side: one request at a time.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use hyv_abi::ABI_VERSION;
use hyv_abi::control::{
    MAX_REPLY, MAX_REQUEST, Opcode, REPLY_HEADER_LEN, REQUEST_HEADER_LEN, ReplyHeader,
    RequestHeader, Verb,
};
use hyv_abi::types::{Errno, Reason, VerbError};
use hyv_abi::window::KICK_CONTROL;
use spin::mutex::SpinMutex;
use virtio_spec::virtq::{Avail, AvailF, Desc, DescF, Used, UsedElem, UsedF};
use zerocopy::{FromBytes, IntoBytes};

use crate::dma::{DmaBuf, WindowRef};
use crate::error::Error;
use crate::limits::{
    CLOCK_TURNS, CONTROL_QUEUE_SIZE, CONTROL_SPIN_NS, CONTROL_TIMEOUT_NS, MAX_SLEEP_NS,
};
use crate::platform::Platform;

/// Where the parts lie in the one allocation.
struct Layout {
    avail: usize,
    used: usize,
    request: usize,
    reply: usize,
    total: usize,
}

impl Layout {
    fn new() -> Self {
        let avail = size_of::<Desc>() * usize::from(CONTROL_QUEUE_SIZE);
        let used = (avail + Avail::layout(CONTROL_QUEUE_SIZE, false).size()).next_multiple_of(64);
        let request = (used + Used::layout(CONTROL_QUEUE_SIZE, false).size()).next_multiple_of(64);
        let reply = request + MAX_REQUEST.next_multiple_of(64);
        Self {
            avail,
            used,
            request,
            reply,
            total: reply + MAX_REPLY.next_multiple_of(64),
        }
    }
}

// Offsets inside the rings, which `virtio_spec` has as unsized structs.
const IDX: usize = 2;
const RING: usize = 4;
/// Descriptor that starts the one chain; 1 is its second.
const HEAD: u16 = 0;

struct State {
    /// Chains ever made available.
    available: u16,
    cookie: u64,
    /// The host owes an answer that nobody waits for any more: the buffers are its own.
    broken: bool,
}

/// The control queue of a context.
pub(crate) struct ControlQueue {
    window: WindowRef,
    mem: DmaBuf,
    at: Layout,
    state: SpinMutex<State>,
}

impl ControlQueue {
    /// Lays the queue out in shared memory and tells the host.
    pub(crate) fn new(window: WindowRef) -> Result<Self, Error> {
        let at = Layout::new();
        let mem = DmaBuf::new(window.platform(), at.total, 4096)?;
        let user = &window.user.control;
        if user.enable.swap(0, Ordering::AcqRel) != 0 {
            user.enable.store(1, Ordering::Release);
            return Err(Error::AlreadyOpen);
        }
        // The host may look at it for as long as it lives, so it is never given back.
        mem.retain();
        user.desc.store(mem.offset(), Ordering::Relaxed);
        user.avail
            .store(mem.offset() + at.avail as u64, Ordering::Relaxed);
        user.used
            .store(mem.offset() + at.used as u64, Ordering::Relaxed);
        user.size
            .store(u32::from(CONTROL_QUEUE_SIZE), Ordering::Relaxed);
        user.enable.store(1, Ordering::Release);
        window.platform().kick(KICK_CONTROL);
        let cookie = u64::from(window.header.generation.load(Ordering::Relaxed)) << 32;
        let state = SpinMutex::new(State {
            available: 0,
            cookie,
            broken: false,
        });
        Ok(Self {
            window,
            mem,
            at,
            state,
        })
    }

    /// Sends a verb and waits for its reply.
    ///
    /// # Errors
    /// What the host answers as [`Error::Verb`]; [`Error::HostGone`], [`Error::NoAnswer`] and [`Error::BadReply`].
    pub(crate) fn call<V: Verb>(&self, body: &V) -> Result<V::Reply, Error> {
        self.call_then(body, || {})
    }

    /// The same; runs `then` if it went well, before any other verb is sent.
    pub(crate) fn call_then<V: Verb>(
        &self,
        body: &V,
        then: impl FnOnce(),
    ) -> Result<V::Reply, Error> {
        let bytes = body.as_bytes();
        let mut request = [0; MAX_REQUEST];
        let header = RequestHeader {
            opcode: V::OPCODE as u16,
            version: ABI_VERSION as u16,
            len: bytes.len() as u32,
            cookie: 0,
        };
        let len = REQUEST_HEADER_LEN + bytes.len();
        request[REQUEST_HEADER_LEN..len].copy_from_slice(bytes);
        let mut reply = [0; MAX_REPLY];
        let reply_len = REPLY_HEADER_LEN + size_of::<V::Reply>();
        let written = self.exchange(
            V::OPCODE,
            header,
            &mut request[..len],
            &mut reply[..reply_len],
            then,
        )?;
        let bad = || Error::BadReply { verb: V::OPCODE };
        let (head, body) = ReplyHeader::read_from_prefix(&reply[..written]).map_err(|_| bad())?;
        if head.status != 0 {
            return Err(VerbError::new(
                Errno::from_u32(head.status),
                Reason::from_u32(head.reason),
            )
            .into());
        }
        let body = body.get(..head.len as usize).ok_or_else(bad)?;
        V::Reply::read_from_prefix(body)
            .map(|(reply, _)| reply)
            .map_err(|_| bad())
    }

    /// One exchange; gives the bytes of the reply, which belongs to this request.
    fn exchange(
        &self,
        verb: Opcode,
        mut header: RequestHeader,
        request: &mut [u8],
        reply: &mut [u8],
        then: impl FnOnce(),
    ) -> Result<usize, Error> {
        let platform = self.window.platform();
        let mut state = loop {
            if let Some(state) = self.state.try_lock() {
                break state;
            }
            platform.relax()?;
        };
        if state.broken {
            return Err(Error::HostGone);
        }
        state.cookie = state.cookie.wrapping_add(1);
        header.cookie = state.cookie;
        request[..REQUEST_HEADER_LEN].copy_from_slice(header.as_bytes());
        self.mem.write(self.at.request, request);
        // An answer that is not written would otherwise be the previous one.
        self.mem.write(self.at.reply, &[0; REPLY_HEADER_LEN]);
        self.describe(0, self.at.request, request.len(), DescF::NEXT, 1);
        self.describe(1, self.at.reply, reply.len(), DescF::WRITE, 0);
        let slot = usize::from(state.available % CONTROL_QUEUE_SIZE);
        self.mem
            .u16_at(self.at.avail + RING + 2 * slot)
            .store(HEAD.to_le(), Ordering::Relaxed);
        self.mem.u16_at(self.at.avail).store(
            AvailF::NO_INTERRUPT.bits().to_ne().to_le(),
            Ordering::Relaxed,
        );
        state.available = state.available.wrapping_add(1);
        self.mem
            .u16_at(self.at.avail + IDX)
            .store(state.available.to_le(), Ordering::Release);
        // Between publishing the index and reading the host's flag (virtio 1.2, section 2.7.13.4.1).
        fence(Ordering::SeqCst);
        if u16::from_le(self.mem.u16_at(self.at.used).load(Ordering::Relaxed))
            & UsedF::NO_NOTIFY.bits().to_ne()
            == 0
        {
            platform.kick(KICK_CONTROL);
        }
        if let Err(e) = self.wait(state.available, verb) {
            state.broken = true;
            return Err(e);
        }
        let elem = self.at.used + RING + size_of::<UsedElem>() * slot;
        let id = u32::from_le(self.mem.u32_at(elem).load(Ordering::Relaxed));
        let len = u32::from_le(self.mem.u32_at(elem + 4).load(Ordering::Relaxed)) as usize;
        if id != u32::from(HEAD) || len < REPLY_HEADER_LEN || len > reply.len() {
            return Err(Error::BadReply { verb });
        }
        let reply = &mut reply[..len];
        self.mem.read(self.at.reply, reply);
        let (head, _) =
            ReplyHeader::read_from_prefix(reply).map_err(|_| Error::BadReply { verb })?;
        if head.cookie != state.cookie {
            return Err(Error::BadReply { verb });
        }
        if head.status == 0 {
            then();
        }
        Ok(len)
    }

    fn describe(&self, index: usize, at: usize, len: usize, flags: DescF, next: u16) {
        let desc = index * size_of::<Desc>();
        let addr = self.mem.offset() + at as u64;
        self.mem.u64_at(desc).store(addr.to_le(), Ordering::Relaxed);
        let rest = (len as u64) | u64::from(flags.bits().to_ne()) << 32 | u64::from(next) << 48;
        self.mem
            .u64_at(desc + 8)
            .store(rest.to_le(), Ordering::Relaxed);
    }

    /// Waits until the host has used `count` chains.
    fn wait(&self, count: u16, verb: Opcode) -> Result<(), Error> {
        let platform: &Arc<dyn Platform> = self.window.platform();
        let used = self.mem.u16_at(self.at.used + IDX);
        let answered = || u16::from_le(used.load(Ordering::Acquire)) == count;
        let start = platform.now_ns();
        let mut turns = 0u32;
        loop {
            if answered() {
                return Ok(());
            }
            platform.relax()?;
            turns = turns.wrapping_add(1);
            if !turns.is_multiple_of(CLOCK_TURNS) {
                continue;
            }
            let passed = platform.now_ns().saturating_sub(start);
            if passed > CONTROL_TIMEOUT_NS {
                return Err(Error::NoAnswer { verb });
            }
            if passed > CONTROL_SPIN_NS {
                self.mem.u16_at(self.at.avail).store(0, Ordering::Relaxed);
                let seen = platform.wake_seen();
                fence(Ordering::SeqCst);
                if !answered() {
                    platform.wait(seen, Some(MAX_SLEEP_NS))?;
                }
            }
        }
    }
}

impl Drop for ControlQueue {
    fn drop(&mut self) {
        self.window.user.control.enable.store(0, Ordering::Release);
        self.window.platform().kick(KICK_CONTROL);
    }
}

/// Ever-growing numbers for what needs to differ.
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}
