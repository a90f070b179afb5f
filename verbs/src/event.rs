//! Asynchronous events: one pending bit per object and kind, set by the host, taken here.
//!
//! Three takers, none of which takes another's: [`Context::poll_events`] has everything but what channels have;
//! [`Context::poll_async_event`] and [`Context::get_async_event`] leave completion and connection events alone; a
//! [`crate::CompletionChannel`] has the completion events of its own queues. Each event goes to whoever takes it first.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use hyv_abi::window::{Events, device_event, summary};

use crate::context::{Context, ContextInner};
use crate::error::Error;
use crate::limits::MAX_SLEEP_NS;

/// Something happened to an object or the device (`struct ibv_async_event`). Indices are the low 16 bits of handles:
/// `index()` of a CQ, QP or SRQ. Events of a destroyed object go with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
pub enum AsyncEvent {
    /// A CQ overran: its QPs are in error.
    CqError(u16),
    /// An SRQ fell below its limit ([`crate::SharedReceiveQueue::set_limit`]).
    SrqLimit(u16),
    /// A QP went to the error state by itself.
    QpFatal(u16),
    /// A QP got an invalid request.
    QpRequestError(u16),
    /// A QP got a request that keys or flags forbid.
    QpAccessError(u16),
    /// A QP in error took its last receive from an SRQ.
    QpLastWqe(u16),
    /// A QP in RTR got its first message.
    QpCommEstablished(u16),
    /// The port went up.
    PortActive,
    /// The port went down.
    PortError,
    /// The device is gone.
    DeviceFatal,
}

/// Something that a program may sleep for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
pub enum Event {
    /// An armed CQ got a completion.
    CqCompletion(u16),
    /// A connection event can be fetched from an [`crate::cm::EventChannel`].
    Cm,
    /// Something happened to an object or the device.
    Async(AsyncEvent),
}

/// The asynchronous kinds.
const ASYNC: [u64; 8] = [
    summary::CQ_ERROR,
    summary::SRQ_LIMIT,
    summary::QP_FATAL,
    summary::QP_REQUEST_ERROR,
    summary::QP_ACCESS_ERROR,
    summary::QP_LAST_WQE,
    summary::QP_COMM_ESTABLISHED,
    summary::DEVICE,
];

/// All of [`ASYNC`].
const ASYNC_MASK: u64 = {
    let (mut mask, mut i) = (0, 0);
    while i < ASYNC.len() {
        mask |= ASYNC[i];
        i += 1;
    }
    mask
};

fn bitmap(events: &Events, kind: u64) -> &[AtomicU64] {
    match kind {
        summary::CQ_COMPLETION => &events.cq_completion,
        summary::CQ_ERROR => &events.cq_error,
        summary::SRQ_LIMIT => &events.srq_limit,
        summary::QP_FATAL => &events.qp_fatal,
        summary::QP_REQUEST_ERROR => &events.qp_request_error,
        summary::QP_ACCESS_ERROR => &events.qp_access_error,
        summary::QP_LAST_WQE => &events.qp_last_wqe,
        summary::QP_COMM_ESTABLISHED => &events.qp_comm_established,
        _ => core::slice::from_ref(&events.device),
    }
}

fn event(kind: u64, index: u16) -> Option<Event> {
    Some(Event::Async(match kind {
        summary::CQ_COMPLETION => return Some(Event::CqCompletion(index)),
        summary::CQ_ERROR => AsyncEvent::CqError(index),
        summary::SRQ_LIMIT => AsyncEvent::SrqLimit(index),
        summary::QP_FATAL => AsyncEvent::QpFatal(index),
        summary::QP_REQUEST_ERROR => AsyncEvent::QpRequestError(index),
        summary::QP_ACCESS_ERROR => AsyncEvent::QpAccessError(index),
        summary::QP_LAST_WQE => AsyncEvent::QpLastWqe(index),
        summary::QP_COMM_ESTABLISHED => AsyncEvent::QpCommEstablished(index),
        _ => match 1u64.checked_shl(u32::from(index))? {
            device_event::PORT_ACTIVE => AsyncEvent::PortActive,
            device_event::PORT_ERROR => AsyncEvent::PortError,
            device_event::DEVICE_FATAL => AsyncEvent::DeviceFatal,
            _ => return None,
        },
    }))
}

/// Takes back the event of an object that is no more, before its index can be another's.
pub(crate) fn forget(bitmap: &[AtomicU64], index: u16) {
    if let Some(word) = bitmap.get(usize::from(index) / 64) {
        word.fetch_and(!(1 << (index % 64)), Ordering::AcqRel);
    }
}

/// Events taken from the window, given one by one. What was not given when it is dropped stays pending.
pub struct EventSet<'a> {
    context: &'a ContextInner,
    /// Kinds taken from the summary and not looked at yet.
    kinds: u64,
    /// The kind at hand, its next word, and what is left of the word before.
    kind: u64,
    word: usize,
    bits: u64,
}

impl<'a> EventSet<'a> {
    /// Takes the kinds that `which` names.
    pub(crate) fn take(context: &'a ContextInner, which: u64) -> Self {
        let word = &context.window.events.summary;
        let kinds = if word.load(Ordering::Relaxed) & which == 0 {
            0
        } else {
            word.fetch_and(!which, Ordering::AcqRel) & which
        };
        Self {
            context,
            kinds,
            kind: 0,
            word: 0,
            bits: 0,
        }
    }

    /// Takes what is pending in a word of the kind at hand, but not what channels have.
    fn load(&self, word: &AtomicU64, at: usize) -> u64 {
        let keep = if self.kind == summary::CQ_COMPLETION {
            self.context.channels.of(at)
        } else {
            0
        };
        if word.load(Ordering::Relaxed) & !keep == 0 {
            return 0;
        }
        word.fetch_and(keep, Ordering::AcqRel) & !keep
    }
}

impl Iterator for EventSet<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let events = &self.context.window.events;
        loop {
            if self.bits != 0 {
                let bit = self.bits.trailing_zeros();
                self.bits &= self.bits - 1;
                match event(self.kind, ((self.word - 1) * 64) as u16 + bit as u16) {
                    Some(event) => return Some(event),
                    None => continue,
                }
            }
            if self.kind != 0 {
                if let Some(word) = bitmap(events, self.kind).get(self.word) {
                    self.bits = self.load(word, self.word);
                    self.word += 1;
                    continue;
                }
                self.kind = 0;
            }
            if self.kinds & summary::CM != 0 {
                self.kinds &= !summary::CM;
                self.context.cm_pending.store(true, Ordering::Release);
                return Some(Event::Cm);
            }
            self.kind = [summary::CQ_COMPLETION]
                .into_iter()
                .chain(ASYNC)
                .find(|k| self.kinds & k != 0)?;
            self.kinds &= !self.kind;
            self.word = 0;
        }
    }
}

impl Drop for EventSet<'_> {
    fn drop(&mut self) {
        let events = &self.context.window.events;
        if self.bits != 0 {
            bitmap(events, self.kind)[self.word - 1].fetch_or(self.bits, Ordering::AcqRel);
        }
        // A bit set from here on brings its summary bit with it.
        let rest = bitmap(events, self.kind).iter().skip(self.word);
        let more = self.bits != 0 || rest.map(|w| w.load(Ordering::Acquire)).any(|w| w != 0);
        let back = self.kinds | if more { self.kind } else { 0 };
        if back != 0 {
            events.summary.fetch_or(back, Ordering::AcqRel);
        }
    }
}

impl Context {
    /// Takes the events that are pending. Each event goes to one caller; what the iterator has not given when
    /// it is dropped stays pending. Costs one load when nothing is pending.
    pub fn poll_events(&self) -> EventSet<'_> {
        EventSet::take(&self.inner, u64::MAX)
    }

    /// Takes one asynchronous event, if there is one (`ibv_get_async_event` of a non-blocking device). Costs one load when
    /// there is none.
    pub fn poll_async_event(&self) -> Option<AsyncEvent> {
        EventSet::take(&self.inner, ASYNC_MASK).find_map(|e| match e {
            Event::Async(event) => Some(event),
            _ => None,
        })
    }

    /// Takes one asynchronous event, sleeping as long as there is none; `None` after `timeout` (`ibv_get_async_event`).
    ///
    /// # Errors
    /// [`Error::HostGone`].
    pub fn get_async_event(&self, timeout: Option<Duration>) -> Result<Option<AsyncEvent>, Error> {
        let ready = || Ok(self.poll_async_event());
        self.inner.wait_until(timeout, MAX_SLEEP_NS, || {}, ready)
    }

    /// Sleeps until an event is pending or `timeout` has passed; whether one is.
    ///
    /// # Errors
    /// [`Error::HostGone`].
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool, Error> {
        let pending = || Ok(self.pending().then_some(()));
        Ok(self
            .inner
            .wait_until(timeout, MAX_SLEEP_NS, || {}, pending)?
            .is_some())
    }

    /// Whether [`poll_events`](Self::poll_events) would give something.
    fn pending(&self) -> bool {
        let events = &self.inner.window.events;
        let kinds = events.summary.load(Ordering::Acquire);
        if kinds != summary::CQ_COMPLETION {
            return kinds != 0;
        }
        // It may be channels' alone, which do not look at the summary.
        events
            .summary
            .fetch_and(!summary::CQ_COMPLETION, Ordering::AcqRel);
        let ours = |(at, word): (usize, &AtomicU64)| {
            word.load(Ordering::Acquire) & !self.inner.channels.of(at) != 0
        };
        let pending = events.cq_completion.iter().enumerate().any(ours);
        if pending {
            events
                .summary
                .fetch_or(summary::CQ_COMPLETION, Ordering::AcqRel);
        }
        pending
    }
}
