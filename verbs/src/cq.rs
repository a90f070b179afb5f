//! Completion queues.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{Ordering, fence};
use core::time::Duration;

use hyv_abi::control::{CreateCq, DestroyCq, ResizeCq};
use hyv_abi::queue::{Cqe, SLOT_LEN, WcStatus, arm};
use hyv_abi::window::KICK_DATA;
use hyv_abi::{doorbell::Ring, sync::AtomicU64};
use spin::mutex::SpinMutex;

use crate::channel::ChannelInner;
use crate::context::{Context, ContextInner};
use crate::dma::DmaBuf;
use crate::error::Error;
use crate::event::forget;
use crate::limits::{MAX_CQE, MAX_SLEEP_NS, MIN_CQ_RING};
use crate::ring::{CompletionRing, Words};
use crate::shadow::QpShared;
use crate::wc::WorkCompletion;

/// QPs made since the poller last looked.
type Attached = SpinMutex<Vec<Arc<QpShared>>>;

/// What queue pairs keep alive of their CQ.
pub(crate) struct CqInner {
    pub(crate) context: Arc<ContextInner>,
    pub(crate) handle: u32,
    /// The ring; another one once it was resized.
    mem: SpinMutex<Arc<DmaBuf>>,
    control: Arc<DmaBuf>,
    destroyed: bool,
    attached: Arc<Attached>,
    channel: Option<Arc<ChannelInner>>,
}

impl CqInner {
    /// From now on completions of this QP are known. Before the QP can complete anything.
    pub(crate) fn attach(&self, qp: Arc<QpShared>) {
        self.attached.lock().push(qp);
    }

    fn index(&self) -> u16 {
        self.handle as u16
    }

    fn destroy(&mut self) -> Result<(), Error> {
        if core::mem::replace(&mut self.destroyed, true) {
            return Ok(());
        }
        let (events, index) = (&self.context.window.events, self.index());
        let (channel, verb) = (&self.channel, DestroyCq { cq: self.handle });
        let done = self.context.control.call_then(&verb, || {
            forget(&events.cq_completion, index);
            forget(&events.cq_error, index);
            if let Some(channel) = channel {
                channel.remove(index);
            }
        });
        if done.is_err() {
            // The device may still write to it.
            self.mem.lock().retain();
            self.control.retain();
        }
        done.map(|_| ())
    }
}

impl Drop for CqInner {
    fn drop(&mut self) {
        let _ = self.destroy();
    }
}

impl Words for Arc<DmaBuf> {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }
}

/// A destroyed QP with a shared receive queue, whose last completions wait in the ring.
#[derive(Debug)]
struct Retired {
    qp: Arc<QpShared>,
    /// The ring's position from which on none of them can be.
    until: u32,
}

/// The polling thread's part.
#[derive(Debug)]
struct Poller {
    ring: CompletionRing<Arc<DmaBuf>>,
    /// By doorbell index.
    qps: Vec<Option<Arc<QpShared>>>,
    retired: Vec<Retired>,
    attached: Arc<Attached>,
}

/// A completion queue. One thread polls it; queue pairs of any thread report to it. It is destroyed when it and
/// all its queue pairs are dropped.
pub struct CompletionQueue {
    poller: Poller,
    pub(crate) inner: Arc<CqInner>,
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue")
            .field("handle", &self.inner.handle)
            .field("entries", &self.poller.ring.slots())
            .finish_non_exhaustive()
    }
}

/// A ring for so many completions: its log2 and how often to tell the consumer index.
fn ring_for(entries: u32) -> Result<(u32, u32), Error> {
    if entries == 0 || entries > MAX_CQE {
        return Err(Error::BadSize {
            what: "entries of a completion queue",
            asked: entries,
            max: MAX_CQE,
        });
    }
    // A quarter more: the consumer index is told that late.
    let slots = (entries + entries / 4 + 1)
        .next_power_of_two()
        .max(MIN_CQ_RING);
    Ok((slots.trailing_zeros(), entries / 4))
}

impl Context {
    /// Makes a CQ for at least `entries` completions (`ibv_create_cq`): as many as all work requests that may be
    /// outstanding on its queue pairs. Its events come from [`Context::poll_events`].
    ///
    /// # Errors
    /// [`Error::BadSize`] for 0 or more than 26,000 entries, [`Error::OutOfMemory`], and as any control verb.
    pub fn create_cq(&self, entries: u32) -> Result<CompletionQueue, Error> {
        self.make_cq(entries, None)
    }

    pub(crate) fn make_cq(
        &self,
        entries: u32,
        channel: Option<Arc<ChannelInner>>,
    ) -> Result<CompletionQueue, Error> {
        let (log2, publish_every) = ring_for(entries)?;
        let len = SLOT_LEN << log2;
        let mem = Arc::new(DmaBuf::new(self.platform(), len, SLOT_LEN)?);
        let control = Arc::new(DmaBuf::new(self.platform(), SLOT_LEN, SLOT_LEN)?);
        let ring = CompletionRing::new(Arc::clone(&mem), Arc::clone(&control), log2, publish_every)
            .ok_or(Error::OutOfMemory { len })?;
        let request = CreateCq {
            ring: mem.offset(),
            ctrl: control.offset(),
            log2,
            reserved: 0,
        };
        let handle = self.inner.call(&request)?.handle;
        let attached = Arc::new(Attached::new(Vec::new()));
        let inner = Arc::new(CqInner {
            context: Arc::clone(&self.inner),
            handle,
            mem: SpinMutex::new(mem),
            control,
            destroyed: false,
            attached: Arc::clone(&attached),
            channel,
        });
        if let Some(channel) = &inner.channel {
            channel.insert(inner.index());
        }
        let poller = Poller {
            ring,
            qps: Vec::new(),
            retired: Vec::new(),
            attached,
        };
        Ok(CompletionQueue { poller, inner })
    }
}

impl CompletionQueue {
    /// Its index in events ([`crate::Event::CqCompletion`]).
    #[must_use]
    pub fn index(&self) -> u16 {
        self.inner.index()
    }

    /// Entries of its ring: at least as many as were asked for.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.poller.ring.slots()
    }

    /// Takes up to `out.len()` completions and says how many (`ibv_poll_cq`). Payload that came in a completion is
    /// in its work request's buffer when this returns. Completions of destroyed queue pairs are passed over.
    #[inline]
    pub fn poll(&mut self, out: &mut [WorkCompletion]) -> usize {
        let mut n = 0;
        while n < out.len() {
            let Some(cqe) = self.poller.ring.pop() else {
                break;
            };
            match self.poller.book(&cqe, &self.inner) {
                Booked::Good => {
                    out[n] = WorkCompletion::from_cqe(&cqe);
                    n += 1;
                }
                Booked::Undelivered => {
                    out[n] = WorkCompletion::undelivered(&cqe);
                    n += 1;
                }
                Booked::Stale => {}
            }
        }
        n
    }

    /// Takes one completion.
    #[inline]
    pub fn poll_one(&mut self) -> Option<WorkCompletion> {
        loop {
            let cqe = self.poller.ring.pop()?;
            match self.poller.book(&cqe, &self.inner) {
                Booked::Good => return Some(WorkCompletion::from_cqe(&cqe)),
                Booked::Undelivered => return Some(WorkCompletion::undelivered(&cqe)),
                Booked::Stale => {}
            }
        }
    }

    /// Makes it larger or smaller (`ibv_resize_cq`); what was not polled yet stays.
    ///
    /// # Errors
    /// [`Error::BadSize`], [`Error::OutOfMemory`], and as any control verb: EINVAL when more completions wait than the new
    /// ring holds. The queue is as it was then.
    pub fn resize(&mut self, entries: u32) -> Result<(), Error> {
        let (log2, publish_every) = ring_for(entries)?;
        let context = &self.inner.context;
        let len = SLOT_LEN << log2;
        let mem = Arc::new(DmaBuf::new(context.platform(), len, SLOT_LEN)?);
        self.poller.ring.publish();
        let request = ResizeCq {
            cq: self.inner.handle,
            log2,
            ring: mem.offset(),
        };
        if let Err(e) = context.call(&request) {
            if !matches!(e, Error::Verb(_)) {
                // Nobody knows which ring it writes to now.
                mem.retain();
                self.inner.mem.lock().retain();
            }
            return Err(e);
        }
        // As long as the call above promises.
        let replaced = self
            .poller
            .ring
            .replace(Arc::clone(&mem), log2, publish_every);
        *self.inner.mem.lock() = mem;
        for old in &mut self.poller.retired {
            // Positions start again.
            old.until = 1 << log2;
        }
        replaced.map(drop).map_err(|_| Error::OutOfMemory { len })
    }

    /// Asks for an event at the next completion, or the next solicited one or error (`ibv_req_notify_cq`).
    /// Then **poll again** before sleeping: what came before this call raises no event.
    ///
    /// A wish for any completion stays when one for solicited ones follows. Solicited is what a sender flagged so
    /// ([`crate::SendFlags::SOLICITED`]), and what completes with an error.
    pub fn req_notify(&mut self, solicited_only: bool) {
        let ring = &self.poller.ring;
        if !solicited_only {
            ring.arm(arm::ANY);
        } else if ring.armed() != arm::ANY {
            ring.arm(arm::SOLICITED);
        }
        fence(Ordering::SeqCst);
    }

    /// Takes at least one completion, sleeping as long as there is none; 0 after `timeout` or for no room in `out`.
    ///
    /// # Errors
    /// [`Error::HostGone`].
    pub fn wait(
        &mut self,
        out: &mut [WorkCompletion],
        timeout: Option<Duration>,
    ) -> Result<usize, Error> {
        if out.is_empty() {
            return Ok(0);
        }
        let n = self.poll(out);
        if n > 0 {
            return Ok(n);
        }
        let context = Arc::clone(&self.inner.context);
        let index = usize::from(self.index());
        let events = context.window.events.cq_completion.get(index / 64);
        let ring = core::cell::RefCell::new(self);
        let arm = || {
            // The event of an earlier arming is taken by what follows.
            if let Some(word) = events {
                word.fetch_and(!(1 << (index % 64)), Ordering::AcqRel);
            }
            ring.borrow_mut().req_notify(false);
        };
        let poll = || {
            let n = ring.borrow_mut().poll(out);
            Ok((n > 0).then_some(n))
        };
        Ok(context
            .wait_until(timeout, MAX_SLEEP_NS, arm, poll)?
            .unwrap_or(0))
    }

    /// Destroys it and says how that went (`ibv_destroy_cq`). Dropping does the same in silence.
    ///
    /// # Errors
    /// [`Error::InUse`] while queue pairs report to it: it is destroyed with the last of them then.
    pub fn destroy(self) -> Result<(), Error> {
        let Self { inner, poller } = self;
        drop(poller);
        match Arc::into_inner(inner) {
            None => Err(Error::InUse),
            Some(mut inner) => inner.destroy(),
        }
    }
}

/// What became of a completion.
#[derive(PartialEq, Eq)]
enum Booked {
    Good,
    /// Its payload has no place any more.
    Undelivered,
    /// Of a queue pair that is no more.
    Stale,
}

impl Poller {
    /// Books a completion with its QP.
    #[inline]
    fn book(&mut self, cqe: &Cqe, inner: &CqInner) -> Booked {
        let at = usize::from(cqe.qp);
        let known = |qps: &[Option<Arc<QpShared>>]| {
            qps.get(at)
                .is_some_and(|q| q.as_ref().is_some_and(|q| q.qpn == cqe.qpn))
        };
        if !known(&self.qps) {
            self.refresh();
            if !known(&self.qps) {
                return self.book_retired(cqe);
            }
        }
        let Some(Some(qp)) = self.qps.get(at) else {
            return Booked::Stale;
        };
        if qp.dead.load(Ordering::Acquire) {
            return self.book_dead(cqe);
        }
        let delivered = qp.complete(cqe);
        if cqe.status != WcStatus::Success as u8 && qp.fail(cqe) {
            // A receive posted while the QP went to error may have been missed: have it looked at again.
            let window = &inner.context.window;
            if window.doorbells.ring(u32::from(cqe.qp)) == Ring::Kick {
                window.platform().kick(KICK_DATA);
            }
        }
        if delivered {
            Booked::Good
        } else {
            Booked::Undelivered
        }
    }

    /// A completion of a QP that was destroyed: a shared receive queue gets its entry back.
    #[cold]
    fn book_dead(&mut self, cqe: &Cqe) -> Booked {
        if let Some(place) = self.qps.get_mut(usize::from(cqe.qp))
            && let Some(qp) = place
        {
            if qp.srq.is_some() {
                qp.give_back(cqe);
            } else {
                *place = None;
            }
        }
        Booked::Stale
    }

    /// The same, of one whose index is another's by now.
    #[cold]
    fn book_retired(&mut self, cqe: &Cqe) -> Booked {
        if let Some(old) = self.retired.iter().find(|r| r.qp.qpn == cqe.qpn) {
            old.qp.give_back(cqe);
        }
        Booked::Stale
    }

    /// Learns of new QPs and forgets destroyed ones.
    #[cold]
    fn refresh(&mut self) {
        let new = core::mem::take(&mut *self.attached.lock());
        let now = self.ring.next();
        self.retired
            .retain(|r| (r.until.wrapping_sub(now) as i32) > 0);
        for slot in &mut self.qps {
            if slot
                .as_ref()
                .is_some_and(|q| q.srq.is_none() && q.dead.load(Ordering::Acquire))
            {
                *slot = None;
            }
        }
        for qp in new {
            if qp.srq.is_none() && qp.dead.load(Ordering::Acquire) {
                continue;
            }
            let at = usize::from(qp.index);
            if self.qps.len() <= at {
                self.qps.resize(at + 1, None);
            }
            let old = self.qps[at].replace(qp);
            if let Some(qp) = old.filter(|q| q.srq.is_some()) {
                // Destroyed before its index was given anew: its completions are all in the ring already.
                let until = now.wrapping_add(self.ring.slots());
                self.retired.push(Retired { qp, until });
            }
        }
    }
}

impl Drop for Poller {
    /// Takes what is left, so that shared receive queues get back what is theirs.
    fn drop(&mut self) {
        self.refresh();
        while let Some(cqe) = self.ring.pop() {
            let known = self.qps.get(usize::from(cqe.qp)).and_then(Option::as_ref);
            match known.filter(|q| q.qpn == cqe.qpn) {
                Some(qp) => qp.give_back(&cqe),
                None => drop(self.book_retired(&cqe)),
            }
        }
    }
}
