//! The sending half of a connection (IBA 1.4, 9.7.3, 9.7.5, 9.7.7).
//!
//! Messages get their PSNs when they are pushed. `una` is the oldest PSN not acknowledged, `cursor` the next to send, `high` the
//! first never sent; going back to send again sets `cursor` to `una`. Messages whose PSNs are all below `una` are
//! complete, in order, until the driver pops them.
//!
//! Three clocks: the ACK timeout and the RNR timer of the specification, and a *probe*: when a peer is silent for longer than
//! its round trips explain, its oldest packet goes again and asks for an answer, and if that brings none, sending goes back; neither counts as a
//! retry. It finds a lost last packet, acknowledgement or NAK in a fraction of the ACK timeout, which is tens of milliseconds in common settings. Whoever sets `retry_cnt` to 0 gets none.
//!
//! What is lost at one moment is often lost by many connections, in a queue that they share; with equal timers their repeats would meet there
//! again, until the retries run out. So each connection waits longer by a part of its own.
//!
//! The window is as large as it may be until something is lost. Then it becomes what the path holds: the rate at which packets were lately
//! acknowledged times the shortest round trip. A packet lost by chance so costs no throughput beyond what is sent again, and where queues
//! overflow the rate itself says how much gets through.

use alloc::collections::VecDeque;

use hyv_abi::queue::WcStatus;
use hyv_abi::types::{RNR_RETRY_INFINITE, rnr_timer_ns};

use super::{Message, MessageKind, Psn, Remote, Reply, packets, position};
use crate::limits::{
    ACK_REQUESTS, FIRST_PROBE_NS, MAX_APART, MAX_MESSAGES, MAX_PROBE_NS, MAX_PSN_SPAN, MAX_WINDOW,
    MIN_ASK_NS, MIN_PROBE_NS, MIN_WINDOW, RATE_SAMPLES, READ_CHUNK, RTT_SAMPLES,
};
use crate::wire::{NakCode, Position};

/// What a requester is set up with.
#[derive(Clone, Copy, Debug)]
pub struct RequesterConfig {
    /// Its QP's number, by which its timers differ from those of others.
    pub qpn: u32,
    /// First PSN.
    pub psn: Psn,
    /// Path MTU, bytes.
    pub mtu: u32,
    /// Time-outs and sequence errors without progress before it gives up.
    pub retry_cnt: u32,
    /// RNR NAKs without progress before it gives up; 7 is never.
    pub rnr_retry: u32,
    /// The ACK timeout, ns; `None` is never. Time is up after that, or up to 1/[`MAX_APART`] later.
    pub timeout_ns: Option<u64>,
    /// READs and atomics outstanding.
    pub max_rd_atomic: u32,
    /// Of a reliable connection; else nothing is acknowledged and what was sent is done.
    pub reliable: bool,
}

/// One packet to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Index of its message, from the oldest not popped on.
    pub index: usize,
    /// What the message does; the remote address is the message's for WRITEs, this request's for READs.
    pub kind: MessageKind,
    /// Position in the message. A READ's request is always the whole message.
    pub position: Position,
    /// Its PSN.
    pub psn: Psn,
    /// Where its bytes begin in the message.
    pub offset: u32,
    /// Its bytes; for a READ those asked for.
    pub len: u32,
    /// Ask for an acknowledgement.
    pub ack_req: bool,
    /// It was sent before.
    pub again: bool,
}

/// What an answer or a timer led to, beyond completions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Nothing to do.
    None,
    /// The answer belongs to nothing outstanding.
    Ghost,
    /// Write the packet's payload to the message's buffers at `offset`.
    Place {
        /// As in [`Segment`].
        index: usize,
        /// Byte offset in the message.
        offset: u32,
    },
    /// Write an atomic's result.
    Atomic {
        /// As in [`Segment`].
        index: usize,
        /// What was there before.
        value: u64,
    },
    /// The message failed; those before it are complete, those after it are not.
    Fail {
        /// As in [`Segment`].
        index: usize,
        /// Of its completion.
        status: WcStatus,
    },
    /// Time was up; packets go again.
    TimedOut,
}

#[derive(Clone, Copy, Debug)]
struct Out {
    message: Message,
    first: Psn,
    packets: u32,
}

impl Out {
    fn end(&self) -> Psn {
        self.first.add(self.packets)
    }
}

/// Undoes what was taken since: see [`Requester::mark`].
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    cursor: Psn,
    cursor_index: usize,
    high: Psn,
    reads_out: usize,
    unasked: u32,
    asking: bool,
    timed: Option<Timed>,
    ack_deadline: Option<u64>,
    probe_deadline: Option<u64>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Requester {
    config: RequesterConfig,
    /// Its part of what waits may differ by ([`MAX_APART`]), in 1/2^16.
    part: u64,
    messages: VecDeque<Out>,
    /// Messages at the front that are complete.
    done: usize,
    next_psn: Psn,
    una: Psn,
    cursor: Psn,
    /// The message that `cursor` is in.
    cursor_index: usize,
    high: Psn,
    /// Ends of the READ and atomic requests sent since `una`, in order.
    reads_out: VecDeque<Psn>,
    /// Packets sent since an acknowledgement was asked for.
    unasked: u32,
    window: u32,
    threshold: u32,
    /// Acknowledged packets that count towards the next step of the window.
    credit: u32,
    retries: u32,
    rnr_tries: u32,
    rnr_until: Option<u64>,
    ack_deadline: Option<u64>,
    probe_deadline: Option<u64>,
    backoff: u32,
    /// The packet at `una` goes again, before anything else.
    asking: bool,
    /// `una` at which sending last went back because of a gap, and when.
    gap: Option<(Psn, u64)>,
    /// A packet whose round trip is being measured.
    timed: Option<Timed>,
    /// Smoothed round trip and its deviation, ns.
    rtt: Option<(u64, u64)>,
    /// Packets ever acknowledged.
    acknowledged: u64,
    /// When the last of them was, ns.
    progress_at: u64,
    path: Path,
}

/// A packet on its way, by which a round trip is measured.
#[derive(Clone, Copy, Debug)]
struct Timed {
    psn: Psn,
    /// When it left, ns.
    at: u64,
    /// Packets that were acknowledged by then, and since when, ns.
    acknowledged: u64,
    since: u64,
}

/// What a path carries.
#[derive(Clone, Copy, Default, Debug)]
struct Path {
    /// Highest rates of acknowledgements, packets per 2^20 ns: of the latest samples, and of as many before them.
    rates: [u64; 2],
    rate_samples: u32,
    /// Shortest round trips, ns, likewise.
    shortest: [Option<u64>; 2],
    rtt_samples: u32,
    /// The shortest are about to be forgotten: the path's queues should run empty once, to show it again.
    stale: bool,
}

/// A QP's part, in 1/2^16. Multiples of the golden ratio: neighbours' are far apart, and however many there are fill the range evenly.
const fn part(qpn: u32) -> u64 {
    (qpn.wrapping_mul(0x9e37_79b9) >> 16) as u64
}

impl Path {
    /// A packet took `rtt` ns, and `packets` were acknowledged in `elapsed` ns.
    fn sample(&mut self, rtt: u64, packets: u64, elapsed: u64) {
        if self.rate_samples >= RATE_SAMPLES {
            (self.rates, self.rate_samples) = ([0, self.rates[0]], 0);
        }
        self.rate_samples += 1;
        self.rates[0] = self.rates[0].max((packets << 20) / elapsed.max(1));
        if self.rtt_samples >= RTT_SAMPLES {
            (self.shortest, self.rtt_samples) = ([None, self.shortest[0]], 0);
            self.stale = true;
        }
        self.rtt_samples += 1;
        self.shortest[0] = Some(self.shortest[0].map_or(rtt, |r| r.min(rtt)));
    }

    /// Packets that fill it, once known.
    fn holds(&self) -> Option<u32> {
        let rtt = match self.shortest {
            [Some(a), Some(b)] => a.min(b),
            [a, b] => a.or(b)?,
        };
        let rate = self.rates[0].max(self.rates[1]);
        u32::try_from(rate.saturating_mul(rtt) >> 20).ok()
    }
}

impl Requester {
    /// A requester that has sent nothing.
    #[must_use]
    pub fn new(config: RequesterConfig) -> Self {
        let psn = config.psn;
        Self {
            config,
            part: part(config.qpn),
            messages: VecDeque::new(),
            done: 0,
            next_psn: psn,
            una: psn,
            cursor: psn,
            cursor_index: 0,
            high: psn,
            reads_out: VecDeque::new(),
            unasked: 0,
            window: MAX_WINDOW,
            threshold: MAX_WINDOW,
            credit: 0,
            retries: 0,
            rnr_tries: 0,
            rnr_until: None,
            ack_deadline: None,
            probe_deadline: None,
            backoff: 0,
            asking: false,
            gap: None,
            timed: None,
            rtt: None,
            acknowledged: 0,
            progress_at: 0,
            path: Path::default(),
        }
    }

    /// Its settings.
    #[must_use]
    pub fn config(&self) -> &RequesterConfig {
        &self.config
    }

    /// Changes retry counts, timeout and READs outstanding (SQD); number, PSN and MTU stay.
    pub fn reconfigure(&mut self, config: RequesterConfig) {
        self.config = RequesterConfig {
            qpn: self.config.qpn,
            psn: self.config.psn,
            mtu: self.config.mtu,
            reliable: self.config.reliable,
            ..config
        };
    }

    /// Whether another message could go out now: all pushed ones are sent and the window is open.
    #[inline]
    #[must_use]
    pub fn wants_message(&self) -> bool {
        self.cursor == self.next_psn
            && self.rnr_until.is_none()
            && self.in_flight() < self.window
            && self.messages.len() < MAX_MESSAGES
            && (self.next_psn.since(self.una) as u32) < MAX_PSN_SPAN
    }

    /// Whether nothing is outstanding.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Messages pushed and not popped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Packets in flight at most, now.
    #[must_use]
    pub fn window(&self) -> u32 {
        self.window
    }

    /// Smoothed round trip, ns, once measured.
    #[must_use]
    pub fn rtt_ns(&self) -> Option<u64> {
        self.rtt.map(|(s, _)| s)
    }

    /// The PSN that the next message begins with.
    #[must_use]
    pub fn next_psn(&self) -> Psn {
        self.next_psn
    }

    /// Adds a message behind the others.
    pub fn push(&mut self, message: Message) {
        let n = if matches!(message.kind, MessageKind::Atomic(_)) {
            1
        } else {
            packets(message.len, self.config.mtu)
        };
        self.messages.push_back(Out {
            message,
            first: self.next_psn,
            packets: n,
        });
        self.next_psn = self.next_psn.add(n);
    }

    /// Removes the oldest message if it is complete.
    #[inline]
    pub fn pop_completed(&mut self) -> bool {
        if self.done == 0 {
            return false;
        }
        self.done -= 1;
        self.cursor_index -= 1;
        self.messages.pop_front();
        true
    }

    #[inline]
    fn in_flight(&self) -> u32 {
        self.cursor.since(self.una) as u32
    }

    /// Remembers where sending stands, to come back with [`Requester::rewind`] if the packets taken since could not be
    /// handed to the carrier.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            cursor: self.cursor,
            cursor_index: self.cursor_index,
            high: self.high,
            reads_out: self.reads_out.len(),
            unasked: self.unasked,
            asking: self.asking,
            timed: self.timed,
            ack_deadline: self.ack_deadline,
            probe_deadline: self.probe_deadline,
        }
    }

    /// Undoes every [`Requester::next`] since `mark`; nothing else may have been called in between.
    pub fn rewind(&mut self, mark: &Mark) {
        self.cursor = mark.cursor;
        self.cursor_index = mark.cursor_index;
        self.high = mark.high;
        self.reads_out.truncate(mark.reads_out);
        self.unasked = mark.unasked;
        self.asking = mark.asking;
        self.timed = mark.timed;
        self.ack_deadline = mark.ack_deadline;
        self.probe_deadline = mark.probe_deadline;
    }

    /// The next packet to send at time `now` (ns), if one may go.
    pub fn next(&mut self, now: u64) -> Option<Segment> {
        if self.rnr_until.is_some() {
            return None;
        }
        if core::mem::take(&mut self.asking) {
            return self.oldest();
        }
        let out = *self.messages.get(self.cursor_index)?;
        let i = self.cursor.since(out.first) as u32;
        let mtu = self.config.mtu;
        let in_flight = self.in_flight();
        if out.message.fence && i == 0 && !self.reads_out.is_empty() {
            return None;
        }
        let psn = self.cursor;
        let offset = i * mtu;
        let mut kind = out.message.kind;
        let (run, position, len) =
            if let MessageKind::Read(remote) | MessageKind::Atomic(remote) = kind {
                let run = (READ_CHUNK - i % READ_CHUNK).min(out.packets - i);
                if self.reads_out.len() >= self.config.max_rd_atomic.max(1) as usize
                    || (in_flight > 0 && in_flight + run > self.window.max(READ_CHUNK))
                {
                    return None;
                }
                self.reads_out.push_back(psn.add(run));
                let len = if matches!(kind, MessageKind::Read(_)) {
                    kind = MessageKind::Read(Remote {
                        addr: remote.addr.wrapping_add(u64::from(offset)),
                        rkey: remote.rkey,
                    });
                    (out.message.len - offset).min(run * mtu)
                } else {
                    out.message.len
                };
                (run, Position::Only, len)
            } else {
                if in_flight >= self.window {
                    return None;
                }
                let place = position(i, out.packets);
                (1, place, (out.message.len - offset).min(mtu))
            };
        self.cursor = psn.add(run);
        if self.cursor == out.end() {
            self.cursor_index += 1;
        }
        let again = self.high.since(psn) > 0;
        if self.cursor.since(self.high) > 0 {
            self.high = self.cursor;
        }
        if !self.config.reliable {
            return Some(Segment {
                index: self.position(&out),
                kind,
                position,
                psn,
                offset,
                len,
                ack_req: false,
                again: false,
            });
        }
        self.unasked += 1;
        // The first of many on an empty path shows how long that is; of a few the last does.
        let ack_req = position.ends()
            || (in_flight == 0 && out.packets > MIN_WINDOW * ACK_REQUESTS)
            || self.unasked >= (self.window / ACK_REQUESTS).max(1)
            || self.in_flight() >= self.window;
        if ack_req {
            self.unasked = 0;
            if self.timed.is_none() && !again {
                self.timed = Some(Timed {
                    psn,
                    at: now,
                    acknowledged: self.acknowledged,
                    since: if in_flight == 0 {
                        now
                    } else {
                        self.progress_at
                    },
                });
            }
        }
        if self.ack_deadline.is_none() {
            self.ack_deadline = self.time_out(now);
        }
        if self.probe_deadline.is_none() && self.config.retry_cnt > 0 {
            self.probe_deadline = Some(now + self.probe_ns());
        }
        Some(Segment {
            index: self.position(&out),
            kind,
            position,
            psn,
            offset,
            len,
            ack_req,
            again,
        })
    }

    /// The oldest packet on its way once more.
    fn oldest(&self) -> Option<Segment> {
        let out = self.messages.get(self.done)?;
        let (i, mtu) = (self.una.since(out.first) as u32, self.config.mtu);
        Some(Segment {
            index: self.done,
            kind: out.message.kind,
            position: position(i, out.packets),
            psn: self.una,
            offset: i * mtu,
            len: (out.message.len - i * mtu).min(mtu),
            ack_req: true,
            again: true,
        })
    }

    /// The index of the message whose last packet `next` may just have passed.
    fn position(&self, out: &Out) -> usize {
        if self.cursor == out.end() {
            self.cursor_index - 1
        } else {
            self.cursor_index
        }
    }

    /// For an unreliable connection: all that was taken with [`Requester::next`] went out.
    pub fn confirm_sent(&mut self) {
        debug_assert!(!self.config.reliable);
        self.una = self.cursor;
        self.done = self.cursor_index;
        self.window = MAX_WINDOW;
    }

    /// For an unreliable connection: the messages that are left will not be sent. The next one begins at the PSN that stands there.
    pub fn abandon(&mut self) {
        debug_assert!(!self.config.reliable);
        self.messages.clear();
        (self.done, self.cursor_index) = (0, 0);
        (self.una, self.high, self.next_psn) = (self.cursor, self.cursor, self.cursor);
    }

    /// Whether the message at the front has begun (SQD finishes what has).
    #[must_use]
    pub fn has_outstanding(&self) -> bool {
        self.una != self.high
    }

    /// How long a silent peer is waited for, ns: first to ask it, then to go back, each time longer.
    fn probe_ns(&self) -> u64 {
        let (least, doublings) = match self.backoff {
            0 => (MIN_ASK_NS, 0),
            n => (MIN_PROBE_NS, n - 1),
        };
        let base = self
            .rtt
            .map_or(FIRST_PROBE_NS, |(s, v)| (s + 4 * v).max(least));
        let wait = (base << doublings.min(20)).min(MAX_PROBE_NS);
        // What this connection alone lost comes at once; what many lost is in step only once it was repeated.
        if doublings == 0 {
            wait
        } else {
            self.apart(wait)
        }
    }

    /// A wait of `ns` or more, and others' another one.
    fn apart(&self, ns: u64) -> u64 {
        ns + ((ns / MAX_APART * self.part) >> 16)
    }

    /// When time is up for what leaves at `now`.
    fn time_out(&self, now: u64) -> Option<u64> {
        self.config.timeout_ns.map(|t| now + self.apart(t))
    }

    /// When [`Requester::on_timer`] wants to be called, ns.
    #[inline]
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        let min = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        min(self.rnr_until, min(self.ack_deadline, self.probe_deadline))
    }

    /// Time has come to `now`.
    pub fn on_timer(&mut self, now: u64) -> Effect {
        if let Some(until) = self.rnr_until {
            if now < until {
                return Effect::None;
            }
            self.rnr_until = None;
            self.go_back();
            return Effect::None;
        }
        if self.ack_deadline.is_some_and(|d| now >= d) {
            if self.retries >= self.config.retry_cnt {
                return self.fail(WcStatus::RetryExcErr);
            }
            self.retries += 1;
            self.ask();
            self.go_back();
            self.ack_deadline = self.time_out(now);
            self.backoff += 1;
            self.probe_deadline = Some(now + self.probe_ns());
            return Effect::TimedOut;
        }
        if self.probe_deadline.is_some_and(|d| now >= d) {
            let sent = self.cursor.since(self.una) > 0;
            let answered = |out: &Out| out.message.kind.is_answered();
            if self.backoff == 0 && sent && !self.messages.get(self.done).is_some_and(answered) {
                self.asking = true;
                if self.timed.is_some_and(|t| t.psn == self.una) {
                    self.timed = None;
                }
            } else {
                self.ask();
                self.go_back();
            }
            self.backoff += 1;
            self.probe_deadline = Some(now + self.probe_ns());
        }
        Effect::None
    }

    fn go_back(&mut self) {
        self.cursor = self.una;
        self.cursor_index = self.done;
        self.reads_out.clear();
        self.unasked = 0;
        self.asking = false;
        self.timed = None;
    }

    /// Something was lost: the window becomes what the path holds, and a little more to see whether that is more now.
    fn lost(&mut self) {
        let holds = match self.path.holds() {
            Some(n) => n + n / 4 + 1,
            None => self.window / 2,
        };
        self.window = holds.clamp(MIN_WINDOW, self.window.max(MIN_WINDOW));
        self.threshold = self.window;
        self.credit = 0;
        if core::mem::take(&mut self.path.stale) {
            self.window = MIN_WINDOW;
        }
    }

    /// Nothing comes back: a few packets ask, and the window opens again as they are acknowledged.
    fn ask(&mut self) {
        self.lost();
        self.window = MIN_WINDOW;
    }

    fn fail(&mut self, status: WcStatus) -> Effect {
        self.ack_deadline = None;
        self.probe_deadline = None;
        self.rnr_until = None;
        Effect::Fail {
            index: self.done,
            status,
        }
    }

    /// Takes an answer in at time `now` (ns).
    pub fn on_reply(&mut self, reply: &Reply, now: u64) -> Effect {
        let (Reply::Ack { psn }
        | Reply::RnrNak { psn, .. }
        | Reply::Nak { psn, .. }
        | Reply::ReadData { psn, .. }
        | Reply::AtomicValue { psn, .. }) = *reply;
        if !psn.within(self.una, self.high) {
            return Effect::Ghost;
        }
        let through = if matches!(reply, Reply::Ack { .. }) {
            psn.add(1)
        } else {
            psn
        };
        if !self.acknowledge(through, now) {
            // An answer before this one was lost (IBA 1.4, 9.7.5.1.2: implied NAK).
            return self.gap(now, false);
        }
        match *reply {
            Reply::Ack { .. } => Effect::None,
            Reply::RnrNak { timer, .. } => self.receiver_not_ready(timer, now),
            Reply::Nak {
                code: NakCode::PsnSequence,
                ..
            } => self.gap(now, true),
            Reply::Nak { code, .. } => self.fail(match code {
                NakCode::RemoteAccess => WcStatus::RemAccessErr,
                NakCode::RemoteOperational | NakCode::InvalidRd => WcStatus::RemOpErr,
                NakCode::InvalidRequest | NakCode::PsnSequence => WcStatus::RemInvReqErr,
            }),
            Reply::ReadData { position, len, .. } => self.read_data(position, len, now),
            Reply::AtomicValue { value, .. } => {
                let out = &self.messages[self.done];
                if !matches!(out.message.kind, MessageKind::Atomic(_)) {
                    return self.fail(WcStatus::BadRespErr);
                }
                let index = self.done;
                self.done += 1;
                self.advance(self.una.add(1), now);
                Effect::Atomic { index, value }
            }
        }
    }

    fn read_data(&mut self, position: Position, len: u32, now: u64) -> Effect {
        let out = self.messages[self.done];
        let i = self.una.since(out.first) as u32;
        let last = i + 1 == out.packets || (i + 1).is_multiple_of(READ_CHUNK);
        let offset = i * self.config.mtu;
        let want = out.message.len.wrapping_sub(offset).min(self.config.mtu);
        if !matches!(out.message.kind, MessageKind::Read(_))
            || position.ends() != last
            || len != want
        {
            return self.fail(WcStatus::BadRespErr);
        }
        let index = self.done;
        if i + 1 == out.packets {
            self.done += 1;
        }
        self.advance(self.una.add(1), now);
        Effect::Place { index, offset }
    }

    fn receiver_not_ready(&mut self, timer: u8, now: u64) -> Effect {
        if self.rnr_until.is_some() {
            return Effect::None;
        }
        if self.config.rnr_retry != RNR_RETRY_INFINITE {
            if self.rnr_tries >= self.config.rnr_retry {
                return self.fail(WcStatus::RnrRetryExcErr);
            }
            self.rnr_tries += 1;
        }
        self.go_back();
        self.rnr_until = Some(now + rnr_timer_ns(u32::from(timer)));
        self.ack_deadline = None;
        self.probe_deadline = None;
        // The peer answers: that is no time-out.
        self.retries = 0;
        Effect::None
    }

    /// Packets or answers from `una` on were lost: sends them again.
    /// A responder that says so (`told`) twice, a while apart, has lost what was sent again; answers behind a gap come in numbers.
    fn gap(&mut self, now: u64, told: bool) -> Effect {
        if self.rnr_until.is_some() {
            return Effect::None;
        }
        if let Some((at, when)) = self.gap
            && at == self.una
            && (!told || now.saturating_sub(when) < self.rtt.map_or(MIN_PROBE_NS, |(s, _)| s / 2))
        {
            return Effect::None;
        }
        if self.retries >= self.config.retry_cnt {
            return self.fail(WcStatus::RetryExcErr);
        }
        self.retries += 1;
        self.gap = Some((self.una, now));
        self.lost();
        self.go_back();
        self.ack_deadline = self.time_out(now);
        if self.config.retry_cnt > 0 {
            self.probe_deadline = Some(now + self.probe_ns());
        }
        Effect::None
    }

    /// Everything before `end` arrived. False if a READ or an atomic before it has no answer yet: it stops there.
    fn acknowledge(&mut self, end: Psn, now: u64) -> bool {
        let mut to = self.una;
        let mut whole = true;
        while end.since(to) > 0 {
            let out = &self.messages[self.done];
            if out.message.kind.is_answered() {
                whole = false;
                break;
            }
            if end.since(out.end()) < 0 {
                to = end;
            } else {
                to = out.end();
                self.done += 1;
            }
        }
        if to != self.una {
            self.advance(to, now);
        }
        whole
    }

    /// Moves `una`: progress.
    fn advance(&mut self, to: Psn, now: u64) {
        let n = to.since(self.una) as u32;
        self.una = to;
        self.asking = false;
        self.acknowledged += u64::from(n);
        self.progress_at = now;
        if self.cursor.since(to) < 0 {
            self.cursor = to;
            self.cursor_index = self.done;
        }
        self.cursor_index = self.cursor_index.max(self.done);
        while self.reads_out.front().is_some_and(|end| end.since(to) <= 0) {
            self.reads_out.pop_front();
        }
        self.retries = 0;
        self.rnr_tries = 0;
        self.rnr_until = None;
        self.backoff = 0;
        self.gap = None;
        if let Some(timed) = self.timed
            && to.since(timed.psn) > 0
        {
            self.timed = None;
            let sample = now.saturating_sub(timed.at);
            self.path.sample(
                sample,
                self.acknowledged - timed.acknowledged,
                now.saturating_sub(timed.since),
            );
            self.rtt = Some(match self.rtt {
                None => (sample, sample / 2),
                Some((s, v)) => ((7 * s + sample) / 8, (3 * v + s.abs_diff(sample)) / 4),
            });
        }
        if self.window < self.threshold {
            self.window = (self.window + n).min(self.threshold);
        } else {
            self.credit += n;
            if self.credit >= self.window {
                self.credit = 0;
                self.window = (self.window + 1).min(MAX_WINDOW);
            }
        }
        if to == self.high {
            self.ack_deadline = None;
            self.probe_deadline = None;
        } else {
            self.ack_deadline = self.time_out(now);
            if self.config.retry_cnt > 0 {
                self.probe_deadline = Some(now + self.probe_ns());
            }
        }
    }
}
