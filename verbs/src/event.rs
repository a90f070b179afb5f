//! Asynchronous events: one pending bit per object and kind, set by the host, taken here.

use core::sync::atomic::{AtomicU64, Ordering};

use hyv_abi::window::{Events, device_event, summary};

use crate::context::ContextInner;

/// Something happened to an object. Indices are the low 16 bits of handles: `index()` of a CQ or QP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
pub enum Event {
    /// An armed CQ got a completion.
    CqCompletion(u16),
    /// A CQ overran: its QPs are in error.
    CqError(u16),
    /// An SRQ fell below its limit.
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
    /// A connection event can be fetched from an [`crate::cm::EventChannel`].
    Cm,
    /// The port went up.
    PortActive,
    /// The port went down.
    PortError,
    /// The device is gone.
    DeviceFatal,
}

/// The kinds with a bitmap of their own.
const KINDS: [u64; 8] = [
    summary::CQ_COMPLETION,
    summary::CQ_ERROR,
    summary::SRQ_LIMIT,
    summary::QP_FATAL,
    summary::QP_REQUEST_ERROR,
    summary::QP_ACCESS_ERROR,
    summary::QP_LAST_WQE,
    summary::QP_COMM_ESTABLISHED,
];

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
    Some(match kind {
        summary::CQ_COMPLETION => Event::CqCompletion(index),
        summary::CQ_ERROR => Event::CqError(index),
        summary::SRQ_LIMIT => Event::SrqLimit(index),
        summary::QP_FATAL => Event::QpFatal(index),
        summary::QP_REQUEST_ERROR => Event::QpRequestError(index),
        summary::QP_ACCESS_ERROR => Event::QpAccessError(index),
        summary::QP_LAST_WQE => Event::QpLastWqe(index),
        summary::QP_COMM_ESTABLISHED => Event::QpCommEstablished(index),
        _ => match 1u64.checked_shl(u32::from(index))? {
            device_event::PORT_ACTIVE => Event::PortActive,
            device_event::PORT_ERROR => Event::PortError,
            device_event::DEVICE_FATAL => Event::DeviceFatal,
            _ => return None,
        },
    })
}

/// Events taken from the window, given one by one.
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
    pub(crate) fn take(context: &'a ContextInner) -> Self {
        let word = &context.window.events.summary;
        let kinds = if word.load(Ordering::Relaxed) == 0 {
            0
        } else {
            word.swap(0, Ordering::AcqRel)
        };
        Self {
            context,
            kinds,
            kind: 0,
            word: 0,
            bits: 0,
        }
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
                    self.word += 1;
                    if word.load(Ordering::Relaxed) != 0 {
                        self.bits = word.swap(0, Ordering::AcqRel);
                    }
                    continue;
                }
                self.kind = 0;
            }
            if self.kinds & summary::CM != 0 {
                self.kinds &= !summary::CM;
                self.context.cm_pending.store(true, Ordering::Release);
                return Some(Event::Cm);
            }
            self.kind = KINDS
                .into_iter()
                .chain([summary::DEVICE])
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
        let back = self.kinds | self.kind;
        if back != 0 {
            events.summary.fetch_or(back, Ordering::AcqRel);
        }
    }
}
