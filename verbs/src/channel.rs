//! Completion channels: one place to wait for several completion queues.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::time::Duration;

use hyv_abi::window::MAX_CQS;

use crate::context::{Context, ContextInner};
use crate::cq::CompletionQueue;
use crate::error::Error;
use crate::limits::MAX_SLEEP_NS;

/// A set of completion queues, by index.
pub(crate) struct CqSet(Box<[AtomicU64]>);

impl CqSet {
    pub(crate) fn new() -> Self {
        Self((0..MAX_CQS / 64).map(|_| AtomicU64::new(0)).collect())
    }

    /// Those whose indices start at `64 * word`.
    #[inline]
    pub(crate) fn of(&self, word: usize) -> u64 {
        self.0.get(word).map_or(0, |w| w.load(Ordering::Acquire))
    }

    fn insert(&self, index: u16) {
        if let Some(word) = self.0.get(usize::from(index) / 64) {
            word.fetch_or(1 << (index % 64), Ordering::AcqRel);
        }
    }

    pub(crate) fn remove(&self, index: u16) {
        if let Some(word) = self.0.get(usize::from(index) / 64) {
            word.fetch_and(!(1 << (index % 64)), Ordering::AcqRel);
        }
    }
}

pub(crate) struct ChannelInner {
    context: Arc<ContextInner>,
    members: CqSet,
    /// Index to look at first, so that a busy queue does not hide the others.
    turn: AtomicU32,
}

impl ChannelInner {
    pub(crate) fn insert(&self, index: u16) {
        self.context.channels.insert(index);
        self.members.insert(index);
    }

    pub(crate) fn remove(&self, index: u16) {
        self.members.remove(index);
        self.context.channels.remove(index);
    }
}

/// Where the completion events of several queues arrive (`struct ibv_comp_channel`). Clones are the same channel. Events
/// need no acknowledgement, and one that is pending does not pile up: it says to look at the queue.
///
/// ```no_run
/// # use hyv_verbs::{Context, Error, WorkCompletion};
/// # fn serve(context: &Context) -> Result<(), Error> {
/// let channel = context.create_comp_channel();
/// let mut queues = [context.create_cq_on(64, &channel)?, context.create_cq_on(64, &channel)?];
/// for cq in &mut queues {
///     cq.req_notify(false);
/// }
/// let mut done = [WorkCompletion::EMPTY; 16];
/// while let Some(index) = channel.get_event(None)? {
///     let Some(cq) = queues.iter_mut().find(|cq| cq.index() == index) else { continue };
///     // Armed first: what comes while it is polled raises the next event.
///     cq.req_notify(false);
///     while cq.poll(&mut done) > 0 {}
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct CompletionChannel {
    pub(crate) inner: Arc<ChannelInner>,
}

impl fmt::Debug for CompletionChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CompletionChannel")
    }
}

impl Context {
    /// Makes a completion channel (`ibv_create_comp_channel`).
    #[must_use]
    pub fn create_comp_channel(&self) -> CompletionChannel {
        CompletionChannel {
            inner: Arc::new(ChannelInner {
                context: Arc::clone(&self.inner),
                members: CqSet::new(),
                turn: AtomicU32::new(0),
            }),
        }
    }

    /// Makes a CQ whose events arrive at a channel (`ibv_create_cq` with a channel). [`Context::poll_events`] does not
    /// show them then.
    ///
    /// # Errors
    /// [`Error::OtherContext`] for a channel of another one, and as [`create_cq`](Self::create_cq).
    pub fn create_cq_on(
        &self,
        entries: u32,
        channel: &CompletionChannel,
    ) -> Result<CompletionQueue, Error> {
        if !Arc::ptr_eq(&channel.inner.context, &self.inner) {
            return Err(Error::OtherContext);
        }
        self.make_cq(entries, Some(Arc::clone(&channel.inner)))
    }
}

impl CompletionChannel {
    /// Takes an event, if there is one: the index of a queue that was armed and got a completion
    /// ([`CompletionQueue::index`]). Costs a load for each 64 queues of the context that there may be.
    pub fn poll_event(&self) -> Option<u16> {
        let words = &self.inner.context.window.events.cq_completion;
        let first = self.inner.turn.load(Ordering::Relaxed) as usize % MAX_CQS;
        let above = u64::MAX << (first % 64);
        let whole = (1..words.len()).map(|i| ((first / 64 + i) % words.len(), u64::MAX));
        let order = [(first / 64, above)]
            .into_iter()
            .chain(whole)
            .chain([(first / 64, !above)]);
        for (at, part) in order {
            let mut ours = self.inner.members.of(at) & part;
            if ours != 0 {
                ours &= words[at].load(Ordering::Relaxed);
            }
            while ours != 0 {
                let bit = ours & ours.wrapping_neg();
                ours &= !bit;
                // Another thread may be taking from the same channel.
                if words[at].fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
                    let index = (at * 64) as u32 + bit.trailing_zeros();
                    self.inner.turn.store(index + 1, Ordering::Relaxed);
                    return Some(index as u16);
                }
            }
        }
        None
    }

    /// Takes an event, sleeping as long as there is none; `None` after `timeout` (`ibv_get_cq_event`).
    ///
    /// # Errors
    /// [`Error::HostGone`].
    pub fn get_event(&self, timeout: Option<Duration>) -> Result<Option<u16>, Error> {
        let ready = || Ok(self.poll_event());
        self.inner
            .context
            .wait_until(timeout, MAX_SLEEP_NS, || {}, ready)
    }
}
