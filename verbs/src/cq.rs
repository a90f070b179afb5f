//! Completion queues.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{Ordering, fence};
use core::time::Duration;

use hyv_abi::control::{CreateCq, DestroyCq};
use hyv_abi::queue::{Cqe, SLOT_LEN, WcStatus, arm};
use hyv_abi::window::KICK_DATA;
use hyv_abi::{doorbell::Ring, sync::AtomicU64};
use spin::mutex::SpinMutex;

use crate::context::{Context, ContextInner};
use crate::dma::DmaBuf;
use crate::error::Error;
use crate::limits::{MAX_CQE, MAX_SLEEP_NS, MIN_CQ_RING};
use crate::ring::{CompletionRing, Words};
use crate::shadow::QpShared;
use crate::wc::WorkCompletion;

/// What queue pairs keep alive of their CQ.
pub(crate) struct CqInner {
    pub(crate) context: Arc<ContextInner>,
    pub(crate) handle: u32,
    mem: Arc<DmaBuf>,
    destroyed: bool,
    /// QPs made since the poller last looked.
    attached: SpinMutex<Vec<Arc<QpShared>>>,
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
        let done = self.context.call(&DestroyCq { cq: self.handle });
        if done.is_err() {
            // The device may still write to it.
            self.mem.retain();
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

/// A completion queue. One thread polls it; queue pairs of any thread report to it. It is destroyed when it and
/// all its queue pairs are dropped.
pub struct CompletionQueue {
    pub(crate) inner: Arc<CqInner>,
    ring: CompletionRing<Arc<DmaBuf>>,
    /// By doorbell index.
    qps: Vec<Option<Arc<QpShared>>>,
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue")
            .field("handle", &self.inner.handle)
            .field("entries", &self.ring.slots())
            .finish_non_exhaustive()
    }
}

impl Context {
    /// Makes a CQ for at least `entries` completions (`ibv_create_cq`): as many as all work requests that may be
    /// outstanding on its queue pairs.
    ///
    /// # Errors
    /// [`Error::BadSize`] for 0 or more than 26,000 entries, [`Error::OutOfMemory`], and as any control verb.
    pub fn create_cq(&self, entries: u32) -> Result<CompletionQueue, Error> {
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
        let log2 = slots.trailing_zeros();
        let len = (slots as usize + 1) * SLOT_LEN;
        let mem = Arc::new(DmaBuf::new(self.platform(), len, SLOT_LEN)?);
        let ctrl = mem.offset() + (slots as usize * SLOT_LEN) as u64;
        let ring = CompletionRing::new(Arc::clone(&mem), log2, entries / 4)
            .ok_or(Error::OutOfMemory { len })?;
        let request = CreateCq {
            ring: mem.offset(),
            ctrl,
            log2,
            reserved: 0,
        };
        let handle = self.inner.call(&request)?.handle;
        let context = Arc::clone(&self.inner);
        let inner = Arc::new(CqInner {
            context,
            handle,
            mem,
            destroyed: false,
            attached: SpinMutex::new(Vec::new()),
        });
        Ok(CompletionQueue {
            inner,
            ring,
            qps: Vec::new(),
        })
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
        self.ring.slots()
    }

    /// Takes up to `out.len()` completions and says how many (`ibv_poll_cq`). Payload that came in a completion is
    /// in its work request's buffer when this returns. Completions of destroyed queue pairs are passed over.
    #[inline]
    pub fn poll(&mut self, out: &mut [WorkCompletion]) -> usize {
        let mut n = 0;
        while n < out.len() {
            let Some(cqe) = self.ring.pop() else { break };
            if self.book(&cqe) {
                out[n] = WorkCompletion::from_cqe(&cqe);
                n += 1;
            }
        }
        n
    }

    /// Takes one completion.
    #[inline]
    pub fn poll_one(&mut self) -> Option<WorkCompletion> {
        loop {
            let cqe = self.ring.pop()?;
            if self.book(&cqe) {
                return Some(WorkCompletion::from_cqe(&cqe));
            }
        }
    }

    /// Books a completion with its QP; false if that is no more.
    #[inline]
    fn book(&mut self, cqe: &Cqe) -> bool {
        let at = usize::from(cqe.qp);
        let known = |qps: &[Option<Arc<QpShared>>]| {
            qps.get(at)
                .is_some_and(|q| q.as_ref().is_some_and(|q| q.qpn == cqe.qpn))
        };
        if !known(&self.qps) {
            self.refresh();
            if !known(&self.qps) {
                return false;
            }
        }
        let Some(Some(qp)) = self.qps.get(at) else {
            return false;
        };
        if qp.dead.load(Ordering::Acquire) {
            self.qps[at] = None;
            return false;
        }
        qp.complete(cqe);
        if cqe.status != WcStatus::Success as u8 && !qp.errored.swap(true, Ordering::Relaxed) {
            // A receive posted while the QP went to error may have been missed: have it looked at again.
            let window = &self.inner.context.window;
            if window.doorbells.ring(u32::from(cqe.qp)) == Ring::Kick {
                window.platform().kick(KICK_DATA);
            }
        }
        true
    }

    /// Learns of new QPs and forgets destroyed ones.
    #[cold]
    fn refresh(&mut self) {
        let new = core::mem::take(&mut *self.inner.attached.lock());
        for slot in &mut self.qps {
            if slot
                .as_ref()
                .is_some_and(|q| q.dead.load(Ordering::Acquire))
            {
                *slot = None;
            }
        }
        for qp in new {
            if qp.dead.load(Ordering::Acquire) {
                continue;
            }
            let at = usize::from(qp.index);
            if self.qps.len() <= at {
                self.qps.resize(at + 1, None);
            }
            self.qps[at] = Some(qp);
        }
    }

    /// Asks for an event at the next completion, or the next solicited one or error (`ibv_req_notify_cq`).
    /// Then **poll again** before sleeping: what came before this call raises no event.
    pub fn req_notify(&mut self, solicited_only: bool) {
        self.ring.arm(if solicited_only {
            arm::SOLICITED
        } else {
            arm::ANY
        });
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
        let Self { inner, ring, qps } = self;
        drop((ring, qps));
        match Arc::into_inner(inner) {
            None => Err(Error::InUse),
            Some(mut inner) => inner.destroy(),
        }
    }
}
