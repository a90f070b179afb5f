//! The poll loop. One [`Engine::poll`] is a turn: the hot set's next slots, the users' doorbell summaries,
//! queues that had more than their share last time, now and then the timers, and at the end the events.

use std::collections::VecDeque;

use hyv_abi::queue::{INLINE_EXT, seq};
use hyv_abi::sync::{Ordering, fence};
use hyv_abi::types::QpState;
use hyv_abi::window::summary;
use hyv_roce::carrier::Carrier;

use crate::limits::{
    BATCH, ERROR_WATCH_NS, HOT_IDLE_TURNS, HOT_SET, SLICE, SUMMARY_TURNS, TIMER_TURNS,
    USERS_PER_TURN,
};
use crate::mem::{Bytes, Watch};
use crate::objects::{Cq, Qp, User, Wait, WaitFor, Wr};
use crate::recv::{RecvFrom, RecvWr, Srq};
use crate::wire::Wire;

const _: () = assert!(INLINE_EXT == 56);

/// What the engine does not decide itself.
pub struct EngineConfig {
    /// Monotonic time in ns. Asked only while something waits.
    pub clock: Box<dyn Fn() -> u64 + Send>,
    /// The device's GID.
    pub gid: [u8; 16],
    /// The device's GUID.
    pub node_guid: u64,
    /// What carries packets to other hosts; its address is the device's GID then. `None`: all peers are on this host.
    pub carrier: Option<Box<dyn Carrier>>,
    /// Called by the driver when connection-management datagrams have arrived ([`Engine::take_mads`]); must not block.
    pub mad_bell: Box<dyn Fn() + Send>,
}

/// What the engine did since it was made.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Send work requests completed, with success or not.
    pub work_requests: u64,
    /// Payload bytes moved.
    pub bytes: u64,
    /// Work requests that ended in an error.
    pub errors: u64,
    /// Times that a work request had to wait for a receive.
    pub rnr_waits: u64,
    /// Completion events raised.
    pub events: u64,
    /// Doorbells taken from the bitmap.
    pub doorbells: u64,
}

struct Hot {
    watch: Watch,
    slot: usize,
    last_active: u32,
    /// The head work request waits for a timer: its doorbell word says nothing new.
    paused: bool,
}

/// The device.
pub struct Engine {
    pub(crate) config: EngineConfig,
    pub(crate) users: Vec<Option<User>>,
    pub(crate) qps: Vec<Option<Box<Qp>>>,
    /// The oldest first.
    pub(crate) free_qps: VecDeque<usize>,
    pub(crate) cqs: Vec<Option<Cq>>,
    pub(crate) srqs: Vec<Option<Srq>>,
    pub(crate) generation: u32,
    /// By slot: the last one's.
    pub(crate) qpn_generations: Vec<u8>,
    pub(crate) dozing: bool,
    /// CQs that got entries in this turn.
    pub(crate) touched: Vec<usize>,
    /// QPs that lost a completion while a work request runs: they fail once it is over.
    pub(crate) doomed: Vec<usize>,
    counters: Counters,
    /// Of QPs that are gone.
    pub(crate) past: hyv_abi::control::Counters,
    pub(crate) src: Vec<Bytes>,
    pub(crate) dst: Vec<Bytes>,
    /// Where the next receive is copied to: no allocation per message.
    pub(crate) spare_recv: Option<Box<RecvWr>>,
    hot: Vec<Hot>,
    backlog: VecDeque<usize>,
    waiting: Vec<usize>,
    /// Queues in error and until when (ns) receives posted to them are looked for: those ring no doorbell.
    errored: Vec<(usize, u64)>,
    scratch: Option<Box<Wr>>,
    rung: Vec<u32>,
    turn: u32,
    next_user: usize,
    /// Turns until packets are looked for.
    wire_turns: u32,
    /// The time of this turn, ns; 0 until it is asked for. None between turns.
    now: Option<u64>,
    pub(crate) wire: Option<Box<Wire>>,
}

/// How a work request fared.
pub(crate) enum Step {
    /// It is over, with this many bytes moved.
    Done(u64),
    /// Its slice is used up; go on next turn.
    More(u64),
    /// Wait.
    Wait(WaitFor),
    /// It failed; the QP is in error.
    Failed,
}

impl Engine {
    /// A device without users.
    #[must_use]
    pub fn new(mut config: EngineConfig) -> Self {
        let wire = config.carrier.take().map(|c| Box::new(Wire::new(c)));
        if let Some(wire) = &wire {
            config.gid = wire.local();
        }
        Self {
            wire_turns: 1,
            now: None,
            wire,
            config,
            users: Vec::new(),
            qps: (0..crate::limits::FIRST_QP_SLOT).map(|_| None).collect(),
            free_qps: VecDeque::new(),
            cqs: Vec::new(),
            srqs: Vec::new(),
            generation: 0,
            qpn_generations: Vec::new(),
            dozing: false,
            touched: Vec::with_capacity(64),
            doomed: Vec::new(),
            counters: Counters::default(),
            past: crate::wire::zeroed(),
            src: Vec::with_capacity(hyv_abi::queue::MAX_SEND_SGE),
            dst: Vec::with_capacity(hyv_abi::queue::MAX_SEND_SGE),
            spare_recv: None,
            hot: Vec::with_capacity(HOT_SET),
            backlog: VecDeque::new(),
            waiting: Vec::new(),
            errored: Vec::new(),
            scratch: Some(Box::new(Wr::new())),
            rung: Vec::new(),
            turn: 0,
            next_user: 0,
        }
    }

    /// What it did so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let sum = self.device_counters();
        Counters {
            work_requests: sum.work_requests,
            bytes: sum.bytes,
            errors: sum.errors,
            rnr_waits: sum.rnr_waits,
            ..self.counters
        }
    }

    /// What it keeps for users: themselves, their objects, and their queues' places in its lists. 0 once all are gone.
    #[must_use]
    pub fn held(&self) -> usize {
        let some = |n: &mut dyn Iterator<Item = bool>| n.filter(|&b| b).count();
        some(&mut self.users.iter().map(Option::is_some))
            + some(&mut self.qps.iter().map(Option::is_some))
            + some(&mut self.cqs.iter().map(Option::is_some))
            + some(&mut self.srqs.iter().map(Option::is_some))
            + self.hot.len()
            + self.backlog.len()
            + self.waiting.len()
            + self.errored.len()
            + self.touched.len()
            + self.doomed.len()
    }

    #[inline]
    pub(crate) fn user(&self, u: usize) -> &User {
        self.users[u]
            .as_ref()
            .expect("a QP's, CQ's or checked user")
    }

    #[inline]
    pub(crate) fn user_mut(&mut self, u: usize) -> &mut User {
        self.users[u]
            .as_mut()
            .expect("a QP's, CQ's or checked user")
    }

    #[inline]
    pub(crate) fn qp(&self, slot: usize) -> &Qp {
        self.qps[slot].as_ref().expect("a live QP's slot")
    }

    #[inline]
    pub(crate) fn qp_mut(&mut self, slot: usize) -> &mut Qp {
        self.qps[slot].as_mut().expect("a live QP's slot")
    }

    pub(crate) fn cq(&self, slot: usize) -> &Cq {
        self.cqs[slot].as_ref().expect("a live CQ's slot")
    }

    #[inline]
    pub(crate) fn cq_mut(&mut self, slot: usize) -> &mut Cq {
        self.cqs[slot].as_mut().expect("a live CQ's slot")
    }

    #[inline]
    pub(crate) fn find_qpn(&self, qpn: u32) -> Option<usize> {
        let slot = (qpn & 0xffff) as usize;
        (self.qps.get(slot)?.as_ref()?.qpn == qpn).then_some(slot)
    }

    /// One turn. Returns how many work requests moved; 0 says that there was nothing to do.
    #[inline]
    pub fn poll(&mut self) -> usize {
        self.turn = self.turn.wrapping_add(1);
        self.now = Some(0);
        let mut moved = 0;
        let mut i = 0;
        while i < self.hot.len() {
            let hot = &self.hot[i];
            if !hot.paused && hot.watch.rung() {
                let slot = hot.slot;
                self.hot[i].last_active = self.turn;
                moved += self.run(slot);
            }
            i += 1;
        }
        if self.hot.is_empty() || self.turn.is_multiple_of(SUMMARY_TURNS) {
            moved += self.poll_summaries();
        }
        if !self.backlog.is_empty() {
            moved += self.poll_backlog();
        }
        self.wire_turns = self.wire_turns.wrapping_sub(1);
        if self.wire_turns == 0 {
            let found = self.poll_wire();
            self.wire_turns = found.1;
            moved += found.0;
        }
        if self.turn.is_multiple_of(TIMER_TURNS)
            && !(self.waiting.is_empty() && self.errored.is_empty())
        {
            moved += self.poll_timers();
        }
        // Not while there is work: the fence would stand in its way. Sleepers hear of it a few turns later.
        if !self.touched.is_empty() && (moved == 0 || self.turn.is_multiple_of(SUMMARY_TURNS)) {
            self.finish_turn();
        }
        self.now = None;
        moved
    }

    /// The time, ns. The clock is asked once a turn: with what the kernel leaves of the caches that takes as long as a packet.
    pub(crate) fn now(&mut self) -> u64 {
        match self.now {
            Some(0) => {
                let now = (self.config.clock)();
                self.now = Some(now);
                now
            }
            Some(now) => now,
            None => (self.config.clock)(),
        }
    }

    fn poll_summaries(&mut self) -> usize {
        let mut moved = 0;
        for _ in 0..self.users.len().min(USERS_PER_TURN) {
            self.next_user += 1;
            if self.next_user >= self.users.len() {
                self.next_user = 0;
            }
            let u = self.next_user;
            let Some(user) = &self.users[u] else { continue };
            let doorbells = &user.mem.window().doorbells;
            if !doorbells.pending() {
                continue;
            }
            let mut rung = std::mem::take(&mut self.rung);
            doorbells.take(|qp| rung.push(qp));
            self.counters.doorbells += rung.len() as u64;
            for index in rung.drain(..) {
                if let Some(&slot) = self.user(u).qps.at(index as usize) {
                    moved += self.activate(slot);
                }
            }
            self.rung = rung;
        }
        moved
    }

    fn poll_backlog(&mut self) -> usize {
        let mut moved = 0;
        for _ in 0..self.backlog.len() {
            let Some(slot) = self.backlog.pop_front() else {
                break;
            };
            self.qp_mut(slot).in_backlog = false;
            moved += self.run(slot);
        }
        moved
    }

    #[cold]
    fn poll_timers(&mut self) -> usize {
        let mut moved = 0;
        let mut waiting = std::mem::take(&mut self.waiting);
        for slot in waiting.drain(..) {
            // `run` puts it back if it still has to wait.
            moved += self.run(slot);
        }
        waiting.append(&mut self.waiting);
        self.waiting = waiting;
        if !self.errored.is_empty() {
            for i in 0..self.errored.len() {
                let slot = self.errored[i].0;
                self.flush(slot);
            }
            let now = (self.config.clock)();
            self.errored.retain(|&(_, until)| now < until);
        }
        moved
    }

    /// A doorbell rang, or a QP became able to send.
    pub(crate) fn activate(&mut self, slot: usize) -> usize {
        if self.qp(slot).state == QpState::Rts && !self.qp(slot).is_hot {
            self.heat(slot);
        }
        self.run(slot)
    }

    /// Gives a queue a place in the hot set, if there is one.
    fn heat(&mut self, slot: usize) {
        if self.hot.len() == HOT_SET {
            let turn = self.turn;
            let idle = |h: &Hot| turn.wrapping_sub(h.last_active);
            let Some(i) = (0..HOT_SET).max_by_key(|&i| idle(&self.hot[i])) else {
                return;
            };
            if idle(&self.hot[i]) < HOT_IDLE_TURNS || self.hot[i].paused {
                return;
            }
            let victim = self.qp(self.hot[i].slot);
            let polled = &self.user(victim.user).mem.window().doorbells.polled[victim.doorbell()];
            if hyv_abi::doorbell::cool(polled, || victim.has_send()) {
                return;
            }
            let victim = self.hot.swap_remove(i).slot;
            self.qp_mut(victim).is_hot = false;
        }
        let (turn, dozing) = (self.turn, self.dozing);
        let qp = self.qp_mut(slot);
        qp.is_hot = true;
        let watch = Watch::new(&qp.sq, qp.next_sq_word(), seq(qp.sq_head));
        let (user, doorbell) = (qp.user, qp.doorbell());
        self.hot.push(Hot {
            watch,
            slot,
            last_active: turn,
            paused: false,
        });
        if !dozing {
            self.user(user).mem.window().doorbells.polled[doorbell].store(1, Ordering::SeqCst);
        }
    }

    /// Whether queues had work lately.
    pub(crate) fn is_busy(&self) -> bool {
        let idle = |h: &Hot| self.turn.wrapping_sub(h.last_active);
        self.hot.iter().any(|h| idle(h) < TIMER_TURNS)
    }

    pub(crate) fn cool(&mut self, slot: usize) {
        let Some(i) = self.hot.iter().position(|h| h.slot == slot) else {
            return;
        };
        self.hot.swap_remove(i);
        let qp = self.qp_mut(slot);
        qp.is_hot = false;
        let (user, doorbell) = (qp.user, qp.doorbell());
        self.user(user).mem.window().doorbells.polled[doorbell].store(0, Ordering::SeqCst);
    }

    /// Removes a QP from every list: it is reset, dropped or in error.
    pub(crate) fn forget(&mut self, slot: usize) {
        self.cool(slot);
        self.backlog.retain(|&s| s != slot);
        self.waiting.retain(|&s| s != slot);
        self.errored.retain(|&(s, _)| s != slot);
        self.qp_mut(slot).in_backlog = false;
    }

    /// Runs a queue's work requests until none is left, its share is used up, or it must wait.
    pub(crate) fn run(&mut self, slot: usize) -> usize {
        if self.qp(slot).wire.is_some() {
            return self.run_wire(slot);
        }
        match self.qp(slot).state {
            QpState::Rts => {}
            // Draining: what has begun is finished, nothing else begins (IBA 1.4, 10.3.1.5).
            QpState::Sqd if self.qp(slot).current.is_some() => {}
            QpState::Err => {
                self.flush(slot);
                return 0;
            }
            QpState::Sqe => {
                self.flush_sends(slot);
                return 0;
            }
            // Posted early: looked at again when the QP becomes ready to send.
            _ => {
                self.cool(slot);
                return 0;
            }
        }
        let mut wr = self.scratch.take().unwrap_or_else(|| Box::new(Wr::new()));
        let (mut moved, mut bytes) = (0u32, 0u64);
        let mut paused = false;
        loop {
            if moved >= BATCH || bytes >= u64::from(SLICE) {
                self.run_later(slot);
                break;
            }
            let qp = self.qp_mut(slot);
            if let Some(current) = qp.current.take() {
                wr = current;
            } else if qp.state != QpState::Rts {
                break;
            } else {
                match qp.fetch(&mut wr) {
                    None => break,
                    Some(true) => {}
                    Some(false) => {
                        self.complete_error(slot, &wr, hyv_abi::queue::WcStatus::LocQpOpErr);
                        break;
                    }
                }
            }
            match self.execute(slot, &mut wr) {
                Step::Done(n) => {
                    moved += 1;
                    bytes += n;
                    let slots = u32::from(wr.head.slots);
                    let qp = self.qp_mut(slot);
                    qp.counters.bytes += n;
                    qp.counters.work_requests += 1;
                    qp.wait = None;
                    qp.sq_head = qp.sq_head.wrapping_add(slots);
                }
                Step::More(n) => {
                    moved += 1;
                    let qp = self.qp_mut(slot);
                    qp.counters.bytes += n;
                    qp.wait = None;
                    qp.current = Some(std::mem::replace(&mut wr, Box::new(Wr::new())));
                    // Its doorbell word does not change until it is done: the backlog carries it.
                    self.put_in_backlog(slot);
                    paused = true;
                    break;
                }
                Step::Wait(what) => {
                    if self.wait(slot, &wr, what) {
                        paused = true;
                        // What was copied stays valid; a request that moved nothing is fetched again, which costs no box.
                        if wr.done > 0 {
                            self.qp_mut(slot).current =
                                Some(std::mem::replace(&mut wr, Box::new(Wr::new())));
                        }
                    }
                    break;
                }
                Step::Failed => break,
            }
            if !self.doomed.is_empty() {
                break;
            }
        }
        self.scratch = Some(wr);
        if !self.doomed.is_empty() {
            self.fail_doomed();
            // It may have been the peer: what this queue still has rings no second doorbell.
            if self.qp(slot).state == QpState::Rts {
                self.run_later(slot);
            }
        }
        self.rewatch(slot, paused);
        moved as usize
    }

    /// Puts QPs that lost a completion into the error state.
    #[cold]
    pub(crate) fn fail_doomed(&mut self) {
        while let Some(lost) = self.doomed.pop() {
            self.raise(lost, summary::QP_FATAL);
            if self.qp(lost).state != QpState::Err {
                self.set_error(lost);
            }
        }
    }

    /// Has a queue run in the next turn, unless its doorbell is polled anyway.
    fn run_later(&mut self, slot: usize) {
        if !self.qp(slot).is_hot {
            self.put_in_backlog(slot);
        }
    }

    /// Has a queue run in the next turn.
    pub(crate) fn put_in_backlog(&mut self, slot: usize) {
        let qp = self.qp_mut(slot);
        if !qp.in_backlog {
            qp.in_backlog = true;
            self.backlog.push_back(slot);
        }
    }

    /// Sets the hot set's entry to the queue's next slot.
    #[inline]
    pub(crate) fn rewatch(&mut self, slot: usize, paused: bool) {
        let Some(qp) = &self.qps[slot] else { return };
        if !qp.is_hot {
            return;
        }
        if let Some(hot) = self.hot.iter_mut().find(|h| h.slot == slot) {
            hot.watch.set(&qp.sq, qp.next_sq_word(), seq(qp.sq_head));
            hot.paused = paused;
        }
    }

    /// Lets a queue's head wait. False if it has waited enough: the QP is in error then.
    #[cold]
    fn wait(&mut self, slot: usize, wr: &Wr, what: WaitFor) -> bool {
        use hyv_abi::queue::WcStatus;
        use hyv_abi::types::{RNR_RETRY_INFINITE, ack_timeout_ns, rnr_timer_ns};
        let now = (self.config.clock)();
        let peer_timer = self
            .find_qpn(self.qp(slot).attr.dest_qp_num)
            .map(|p| self.qp(p).attr.min_rnr_timer);
        let qp = self.qp_mut(slot);
        let period = match what {
            WaitFor::Receive => Some(rnr_timer_ns(peer_timer.unwrap_or(0))),
            WaitFor::Peer => ack_timeout_ns(qp.attr.timeout),
        };
        let deadline_ns = period.map(|p| now + p);
        let tries = match &mut qp.wait {
            Some(w) if w.what == what => {
                if w.deadline_ns.is_some_and(|d| now >= d) {
                    w.tries += 1;
                    w.deadline_ns = deadline_ns;
                }
                w.tries
            }
            _ => {
                qp.wait = Some(Wait {
                    what,
                    deadline_ns,
                    tries: 0,
                });
                if what == WaitFor::Receive {
                    qp.counters.rnr_waits += 1;
                }
                0
            }
        };
        // A peer that is not ready says so at once; one that does not answer shows it by the end of the time-out.
        let (limit, refused, status) = match what {
            WaitFor::Receive => (qp.attr.rnr_retry, tries + 1, WcStatus::RnrRetryExcErr),
            WaitFor::Peer => (qp.attr.retry_cnt, tries, WcStatus::RetryExcErr),
        };
        let forever = what == WaitFor::Receive && limit == RNR_RETRY_INFINITE;
        if refused > limit && !forever {
            qp.current = None;
            self.complete_error(slot, wr, status);
            return false;
        }
        if !self.waiting.contains(&slot) {
            self.waiting.push(slot);
        }
        true
    }

    /// Puts a QP into the error state by the device's own doing: an event says so.
    pub(crate) fn fail(&mut self, slot: usize, kind: u64) {
        if self.qp(slot).state != QpState::Err {
            self.raise(slot, kind);
            self.set_error(slot);
        }
    }

    /// Raises an event of a QP.
    #[cold]
    pub(crate) fn raise(&self, slot: usize, kind: u64) {
        let qp = self.qp(slot);
        let (index, user) = (qp.doorbell(), self.user(qp.user));
        let events = &user.mem.window().events;
        let words = match kind {
            summary::QP_REQUEST_ERROR => &events.qp_request_error,
            summary::QP_ACCESS_ERROR => &events.qp_access_error,
            summary::QP_COMM_ESTABLISHED => &events.qp_comm_established,
            summary::QP_LAST_WQE => &events.qp_last_wqe,
            _ => &events.qp_fatal,
        };
        words[index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
        events.summary.fetch_or(kind, Ordering::SeqCst);
        user.wake.wake();
    }

    /// The error state: everything posted, and everything posted later, flushes.
    pub(crate) fn set_error(&mut self, slot: usize) {
        self.forget(slot);
        let qp = self.qp_mut(slot);
        let before = std::mem::replace(&mut qp.state, QpState::Err);
        qp.wait = None;
        qp.current = None;
        if let Some(first) = qp.wire.as_mut().and_then(|w| w.hang_up()) {
            // What was fetched and is not acknowledged still lies in its slots: it flushes from there.
            qp.sq_head = first;
        }
        let until = (self.config.clock)() + ERROR_WATCH_NS;
        self.errored.push((slot, until));
        self.flush(slot);
        if before != QpState::Err && matches!(self.qp(slot).recv, RecvFrom::Shared(_)) {
            // It takes no more of them (IBA 1.4, 11.6.3.3).
            self.raise(slot, summary::QP_LAST_WQE);
        }
    }

    /// Raises the completion events of this turn. Must follow every change outside [`Engine::poll`].
    pub(crate) fn finish_turn(&mut self) {
        if self.touched.is_empty() {
            return;
        }
        // Pairs with the fence between arming and polling again on the user's side.
        fence(Ordering::SeqCst);
        while let Some(slot) = self.touched.pop() {
            let cq = self.cq_mut(slot);
            cq.touched = false;
            if !cq.take_arm() {
                continue;
            }
            let (u, index) = (cq.user, cq.index as usize);
            self.counters.events += 1;
            let user = self.user(u);
            let events = &user.mem.window().events;
            events.cq_completion[index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
            events
                .summary
                .fetch_or(summary::CQ_COMPLETION, Ordering::SeqCst);
            user.wake.wake();
        }
    }

    /// Tells all users that nobody polls. False if there is work after all (nobody was told then).
    /// On true the driver sleeps until a kick, at most for [`Engine::next_timer_ns`], and calls [`Engine::wake_up`].
    #[must_use]
    pub fn doze(&mut self) -> bool {
        if !self.backlog.is_empty() || self.wire.as_ref().is_some_and(|w| w.is_waiting()) {
            return false;
        }
        self.dozing = true;
        for user in self.users.iter().flatten() {
            user.mem
                .window()
                .doorbells
                .need_wakeup
                .store(1, Ordering::Relaxed);
        }
        for hot in &self.hot {
            let qp = self.qp(hot.slot);
            self.user(qp.user).mem.window().doorbells.polled[qp.doorbell()]
                .store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        let work = self.hot.iter().any(|h| !h.paused && h.watch.rung())
            || self
                .users
                .iter()
                .flatten()
                .any(|u| u.mem.window().doorbells.pending());
        if work {
            self.wake_up();
        }
        !work
    }

    /// Undoes [`Engine::doze`].
    pub fn wake_up(&mut self) {
        self.dozing = false;
        for user in self.users.iter().flatten() {
            user.mem
                .window()
                .doorbells
                .need_wakeup
                .store(0, Ordering::Relaxed);
        }
        for hot in &self.hot {
            let qp = self.qp(hot.slot);
            self.user(qp.user).mem.window().doorbells.polled[qp.doorbell()]
                .store(1, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Whether users were told to kick.
    #[must_use]
    pub fn is_dozing(&self) -> bool {
        self.dozing
    }

    /// How long the driver may sleep, ns; `None` for ever.
    #[must_use]
    pub fn next_timer_ns(&self) -> Option<u64> {
        let local = self.next_local_timer_ns();
        let wire = self
            .wire
            .as_ref()
            .and_then(|w| w.next_deadline())
            .map(|d| d.saturating_sub((self.config.clock)()));
        match (local, wire) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn next_local_timer_ns(&self) -> Option<u64> {
        if !self.errored.is_empty() {
            // Receives posted to a queue in error ring no doorbell.
            return Some(1_000_000);
        }
        if self.waiting.is_empty() {
            return None;
        }
        // A receive may be posted before the timer ends, without a doorbell.
        Some(50_000)
    }

    /// Runs the timers now, whatever the turn: after a sleep.
    pub fn tick(&mut self) {
        self.poll_timers();
        self.wire_turns = self.poll_wire().1;
        self.finish_turn();
    }
}
