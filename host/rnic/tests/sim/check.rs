//! Completions, and what must be true of each.

use hyv_abi::control::{CounterScope, Counters, QueryCounters};
use hyv_abi::queue::{Cqe, WcOpcode, WcStatus, cqe_flags};
use hyv_abi::types::{QpState, QpType, RNR_RETRY_INFINITE};
use hyv_roce::wire::grh::{self, Grh};

use crate::common::{cqe_data, status};
use crate::ends::{End, GRH, Kind, Life, Message, NUMBER, Sent, bit};
use crate::run::Sim;
use crate::windows::{MemoryWindow, State};
use crate::world::{Receive, reliable};

impl Sim {
    /// Polls all of a user's CQs, at most so many completions each.
    pub fn poll(&mut self, person: usize, most: usize) {
        if self.w.people[person].gone.is_some() {
            return;
        }
        for q in 0..self.w.people[person].cqs.len() {
            for _ in 0..most {
                let Some(c) = self.w.people[person].cqs[q].poll() else {
                    break;
                };
                let e = *self.by_qpn.get(&(person, c.qpn)).unwrap_or_else(|| {
                    panic!("user {person}: a completion of a QP that never was: {c:?}")
                });
                if self.w.trace {
                    eprintln!("{} end {e} completes {c:?}", self.w.now());
                }
                let receive = c.opcode >= WcOpcode::Recv as u8;
                let cqs = self.ends[e].cqs;
                assert_eq!(
                    q,
                    if receive { cqs.1 } else { cqs.0 },
                    "the right CQ: {c:?}"
                );
                if receive {
                    self.received(e, &c);
                } else {
                    self.completed(e, &c);
                }
            }
        }
    }

    /// The counters of an end's QP.
    pub fn counters(&self, e: usize) -> Counters {
        let end = &self.ends[e];
        let p = &self.w.people[end.person];
        let req = QueryCounters {
            scope: CounterScope::Qp as u32,
            handle: end.qp.handle,
        };
        let e = &self.w.hosts[p.host].engine;
        e.query_counters(p.user.id, &req)
            .expect("counters of a live QP")
    }

    /// Whether an end's first failure may have this status.
    fn is_legitimate(&self, e: usize, status: WcStatus) -> bool {
        let end = &self.ends[e];
        if end.may & bit(status) != 0 {
            return true;
        }
        match status {
            WcStatus::RetryExcErr => {
                let peer = &self.ends[end.peer];
                let net = self.w.net.lock();
                let harm =
                    net.harm(&self.gid(e), end.qp.qpn) + net.harm(&self.gid(end.peer), peer.qp.qpn);
                harm > u64::from(end.link.retry_cnt)
            }
            WcStatus::RnrRetryExcErr => {
                let tries = u64::from(end.link.rnr_retry);
                end.link.rnr_retry != RNR_RETRY_INFINITE
                    && (!self.is_wire(e)
                        || !end.is_open()
                        || self.counters(e).rnr_naks_received > tries)
            }
            _ => false,
        }
    }

    /// Whether an end's peer is on another host.
    pub fn is_wire(&self, e: usize) -> bool {
        self.gid(e) != self.gid(self.ends[e].peer)
    }

    fn completed(&mut self, e: usize, c: &Cqe) {
        let status = status(c);
        self.told.completions += 1;
        loop {
            let Some(s) = self.ends[e].sent.pop_front() else {
                panic!("end {e}: a completion and nothing outstanding: {c:?}");
            };
            self.ends[e].used -= s.slots;
            if s.id != c.wr_id {
                assert!(
                    !s.signaled && self.ends[e].life != Life::Failed,
                    "end {e}: {} completes before {}: {c:?}",
                    c.wr_id,
                    s.id
                );
                self.succeeded(e, s, None);
                continue;
            }
            assert_eq!(c.opcode, s.opcode as u8, "end {e}: {c:?} for {s:?}");
            if status == WcStatus::Success {
                assert!(
                    self.ends[e].life != Life::Failed,
                    "end {e}: success after an error: {c:?}"
                );
                assert!(
                    s.signaled,
                    "end {e}: a completion that nobody asked for: {c:?}"
                );
                assert_eq!(c.byte_len, s.len, "end {e}: {c:?}");
                self.succeeded(e, s, Some(c));
            } else {
                self.failure(e, status);
                self.failed(e, s);
            }
            return;
        }
    }

    fn failure(&mut self, e: usize, status: WcStatus) {
        if self.ends[e].life == Life::Failed {
            assert_eq!(
                status,
                WcStatus::WrFlushErr,
                "end {e}: after the first failure all flush"
            );
            return;
        }
        assert!(
            self.is_legitimate(e, status),
            "end {e} (qpn {:x}) fails with {status:?} for no reason that is known",
            self.ends[e].qp.qpn
        );
        self.told.failed[status as usize % 16] += 1;
        if self.ends[e].is_open() {
            let end = &self.ends[e];
            let state = end
                .qp
                .state(&self.w.hosts[self.w.people[end.person].host].engine);
            let want = match end.link.ty {
                QpType::Rc => [QpState::Err; 2],
                _ => [QpState::Sqe, QpState::Err],
            };
            assert!(
                want.contains(&state),
                "end {e}: {status:?}, and the QP is in {state:?}"
            );
            self.ends[e].life = Life::Failed;
        }
        self.is_ending(e);
    }

    /// An end is in error, or will be: what this makes of the other.
    pub fn is_ending(&mut self, e: usize) {
        let peer = self.ends[e].peer;
        self.ends[e].ending |= reliable(self.ends[e].link.ty);
        self.ends[e].may |= bit(WcStatus::WrFlushErr);
        self.ends[peer].may |= bit(WcStatus::RetryExcErr);
        if !self.is_wire(e) {
            self.ends[peer].may |= bit(WcStatus::WrFlushErr);
        }
    }

    fn give_back(&mut self, e: usize, s: &Sent) {
        if let Some(cell) = s.out_cell {
            self.ends[e].out.give(cell);
        }
        if let Some(cell) = s.in_cell {
            let peer = self.ends[e].peer;
            self.ends[peer].inn.give(cell);
        }
    }

    /// A WRITE is complete, or a message behind it has arrived.
    fn landed(&mut self, peer: usize, s: &mut Sent) {
        if let Kind::Write { at, data, landed } = &mut s.kind
            && !*landed
        {
            *landed = true;
            let what = format!("WRITE {} of {} bytes", s.id, data.len());
            let inn = &mut self.ends[peer].inn;
            inn.mem.written(*at, data, &what);
            inn.mem.take_back(*at);
        }
    }

    fn succeeded(&mut self, e: usize, mut s: Sent, c: Option<&Cqe>) {
        let peer = self.ends[e].peer;
        let sure = reliable(self.ends[e].link.ty);
        self.ends[e].done = Some(s.seq);
        let place = |end: &mut End, at: u64, data: &[u8], what: &str| {
            end.out.mem.written(at, data, what);
            end.out.mem.take_back(at);
        };
        if sure {
            self.landed(peer, &mut s);
        }
        let what = format!("end {e}: {:?} {}", s.opcode, s.id);
        match &s.kind {
            Kind::Read { pieces, data } => {
                let in_completion = c.is_some_and(|c| c.flags & cqe_flags::DATA != 0);
                if let (true, Some(c)) = (in_completion, c) {
                    assert_eq!(cqe_data(c, data.len()), **data, "{what}");
                }
                let mut from = 0;
                for &(at, n) in pieces {
                    let part = &data[from..from + n as usize];
                    from += n as usize;
                    if in_completion {
                        // As the library does.
                        self.ends[e].out.mem.put(at, part);
                    }
                    place(&mut self.ends[e], at, part, &what);
                }
            }
            Kind::Chain { landing, was, .. } => {
                place(&mut self.ends[e], *landing, &was.to_le_bytes(), &what);
            }
            Kind::Add { landing, word } => {
                let end = &mut self.ends[e];
                let ram = &self.w.people[end.person].user.ram;
                let seen = ram.read(*landing, 8);
                place(end, *landing, &seen, &what);
                let there = self.ends[peer].person;
                let added = &mut self.w.people[there].added[*word];
                added.sure += 1;
                added
                    .seen
                    .push(u64::from_le_bytes(seen.try_into().expect("8 bytes")));
            }
            Kind::Write { at, data, .. } if !sure => self.leaks.push((peer, *at, data.clone())),
            Kind::Bind(i) => self.ends[e].windows[*i].state = State::Open,
            &Kind::Unbind(i) => self.closed(e, i),
            Kind::Forbidden => panic!("{what} was allowed"),
            Kind::Send | Kind::Write { .. } | Kind::Bare => {}
        }
        self.unused(peer, s.window);
        self.give_back(e, &s);
    }

    /// It may have been done, in part or not at all. Its cells are not used again.
    fn failed(&mut self, e: usize, s: Sent) {
        let what = format!("end {e}: {:?} {} (failed)", s.opcode, s.id);
        match s.kind {
            Kind::Write {
                at, data, landed, ..
            } => {
                if !landed {
                    let peer = self.ends[e].peer;
                    self.leaks.push((peer, at, data));
                }
            }
            Kind::Read { pieces, data } => {
                let mut from = 0;
                for (at, n) in pieces {
                    let part = &data[from..from + n as usize];
                    from += n as usize;
                    self.ends[e].out.mem.perhaps(at, n.into(), &[part], &what);
                }
            }
            Kind::Chain {
                landing,
                was,
                becomes,
            } => {
                let end = &mut self.ends[e];
                end.out
                    .mem
                    .perhaps(landing, 8, &[&was.to_le_bytes()], &what);
                if end.chain_ends.is_empty() {
                    end.chain_ends.push(was);
                }
                end.chain_ends.push(becomes);
            }
            Kind::Add { landing, word } => {
                let peer = self.ends[e].peer;
                let end = &mut self.ends[e];
                let ram = &self.w.people[end.person].user.ram;
                let seen = ram.read(landing, 8);
                end.out.mem.perhaps(landing, 8, &[&seen], &what);
                let there = self.ends[peer].person;
                self.w.people[there].added[word].perhaps += 1;
            }
            Kind::Send | Kind::Bare | Kind::Forbidden | Kind::Bind(_) | Kind::Unbind(_) => {}
        }
    }

    fn take_receive(&mut self, e: usize, c: &Cqe) -> Receive {
        let end = &mut self.ends[e];
        if end.link.shared {
            let posted = &mut self.w.people[end.person].srq_posted;
            let i = posted.iter().position(|r| r.id == c.wr_id);
            let i = i.unwrap_or_else(|| panic!("end {e}: a receive that is not posted: {c:?}"));
            return posted.remove(i);
        }
        let Some(r) = end.posted.pop_front() else {
            panic!("end {e}: a receive completes and none is posted: {c:?}");
        };
        assert_eq!(r.id, c.wr_id, "end {e}: receives complete in order: {c:?}");
        r
    }

    fn received(&mut self, e: usize, c: &Cqe) {
        self.told.completions += 1;
        let r = self.take_receive(e, c);
        let status = status(c);
        if status != WcStatus::Success {
            self.receive_failed(e, &r, status);
            return;
        }
        let message = self.message_of(e, c, &r);
        let sender = self.sender_of(e, &message);
        let end = &self.ends[e];
        assert_eq!(
            c.flags & cqe_flags::WITH_IMM != 0,
            message.imm.is_some(),
            "end {e}: {c:?}"
        );
        let invalid = c.flags & cqe_flags::WITH_INV != 0;
        assert_eq!(invalid, message.invalidates.is_some(), "end {e}: {c:?}");
        let word = message.imm.or(message.invalidates);
        assert_eq!(c.imm, word.unwrap_or(0), "end {e}: {c:?}");
        let grh = if end.link.ty == QpType::Ud {
            GRH as u32
        } else {
            0
        };
        assert_eq!(c.byte_len, message.len + grh, "end {e}: {c:?}");
        let opcode = match message.data {
            Some(_) => WcOpcode::Recv,
            None => WcOpcode::RecvRdmaWithImm,
        };
        assert_eq!(c.opcode, opcode as u8, "end {e}: {c:?}");
        // What was written before it is there.
        if let Some(sender) = sender {
            let mut sent = std::mem::take(&mut self.ends[sender].sent);
            for s in sent.iter_mut().take_while(|s| s.seq <= message.seq) {
                self.landed(e, s);
            }
            self.ends[sender].sent = sent;
        }
        let mut bytes = Vec::new();
        if c.flags & cqe_flags::GRH != 0 {
            assert_eq!(c.data[0] as u32, message.from_qpn, "end {e}: source QP");
            bytes = self.grh(e, &r, &message);
        }
        if let Some(data) = &message.data {
            bytes.extend_from_slice(data);
        }
        if c.flags & cqe_flags::DATA != 0 {
            assert_eq!(cqe_data(c, bytes.len()), bytes, "end {e}: {c:?}");
            bytes.clear();
        }
        self.finish_receive(e, &r, &bytes);
        if let Some(key) = message.invalidates {
            let of = |w: &MemoryWindow| w.key == key && w.state == State::Closing;
            let i = self.ends[e].windows.iter().position(of);
            self.closed(e, i.expect("a window of that key"));
        }
    }

    /// Checks a datagram's GRH area and gives it.
    fn grh(&self, e: usize, r: &Receive, message: &Message) -> Vec<u8> {
        let mut area = self.bytes_of(e, r);
        area.truncate(GRH as usize);
        let head: &[u8; grh::LEN] = area[..].try_into().expect("40 bytes");
        let got = Grh::parse(head).expect("a GRH area");
        assert_eq!(
            (got.src, got.dst),
            (message.from, self.gid(e)),
            "end {e}: GRH"
        );
        area
    }

    fn bytes_of(&self, e: usize, r: &Receive) -> Vec<u8> {
        let ram = &self.w.people[self.ends[e].person].user.ram;
        r.pieces
            .iter()
            .flat_map(|&(at, n)| ram.read(at, n.into()))
            .collect()
    }

    /// Which message a receive got.
    fn message_of(&mut self, e: usize, c: &Cqe, r: &Receive) -> Message {
        let ty = self.ends[e].link.ty;
        if reliable(ty) {
            let next = self.ends[e].coming.pop_front();
            return next.unwrap_or_else(|| panic!("end {e}: a message that nobody sent: {c:?}"));
        }
        // Any that was sent: the network doubles and drops, and a receiver without acknowledgements cannot tell.
        let same = |m: &&Message| {
            if c.opcode == WcOpcode::RecvRdmaWithImm as u8 {
                return m.data.is_none() && m.imm == Some(c.imm);
            }
            let skip = if ty == QpType::Ud { GRH } else { 0 } as usize;
            let number = if c.flags & cqe_flags::DATA != 0 {
                cqe_data(c, NUMBER as usize)
            } else {
                self.bytes_of(e, r)[skip..skip + NUMBER as usize].to_vec()
            };
            m.data
                .as_ref()
                .is_some_and(|d| d[..NUMBER as usize] == number)
        };
        let found = self.ends[e].coming.iter().find(same).cloned();
        found.unwrap_or_else(|| panic!("end {e}: a message that nobody sent: {c:?}"))
    }

    /// The end whose earlier WRITEs are in place once this message is there.
    fn sender_of(&self, e: usize, _: &Message) -> Option<usize> {
        reliable(self.ends[e].link.ty).then_some(self.ends[e].peer)
    }

    /// `bytes` are in the receive's pieces; the rest of them is as it was.
    fn finish_receive(&mut self, e: usize, r: &Receive, bytes: &[u8]) {
        let end = &mut self.ends[e];
        let p = &mut self.w.people[end.person];
        // A message that was dropped may have left its bytes behind.
        let clean = reliable(end.link.ty) && !(end.link.shared && self.untidy);
        let pool = match &mut p.srq_pool {
            Some(pool) if end.link.shared => pool,
            _ => &mut end.rcv,
        };
        let what = format!("end {e}: receive {}", r.id);
        let mut from = 0;
        for &(at, n) in &r.pieces {
            let part = &bytes[from..bytes.len().min(from + n as usize)];
            from = (from + n as usize).min(bytes.len());
            pool.mem.written(at, part, &what);
            let rest = at + part.len() as u64;
            let left = u64::from(n) - part.len() as u64;
            if clean {
                pool.mem.perhaps(rest, left, &[], &what);
            } else {
                let now = p.user.ram.read(rest, left);
                pool.mem.perhaps(rest, left, &[&now], &what);
            }
            pool.mem.take_back(at);
        }
        pool.give(r.cell);
    }

    fn receive_failed(&mut self, e: usize, r: &Receive, status: WcStatus) {
        let end = &self.ends[e];
        let state = end.is_open().then(|| {
            end.qp
                .state(&self.w.hosts[self.w.people[end.person].host].engine)
        });
        assert!(
            state.is_none_or(|s| s == QpState::Err),
            "end {e}: a receive fails with {status:?}, and the QP is in {state:?}"
        );
        if status != WcStatus::WrFlushErr {
            assert!(
                self.receive_may & bit(status) != 0,
                "end {e}: a receive fails with {status:?} for no reason that is known"
            );
            let peer = end.peer;
            self.ends[peer].may |= bit(WcStatus::RemOpErr) | bit(WcStatus::RemInvReqErr);
        }
        self.is_ending(e);
        let end = &mut self.ends[e];
        let p = &mut self.w.people[end.person];
        let pool = match &mut p.srq_pool {
            Some(pool) if end.link.shared => pool,
            _ => &mut end.rcv,
        };
        // Of a message that was on its way a part may be there.
        let what = format!("end {e}: receive {} (failed)", r.id);
        let clean = reliable(end.link.ty) && !(end.link.shared && self.untidy);
        let mut from = 0;
        for &(at, n) in &r.pieces {
            let now = p.user.ram.read(at, n.into());
            let mut any: Vec<&[u8]> = Vec::new();
            if clean {
                let sent = end.coming.front().and_then(|m| m.data.as_ref());
                any.extend(sent.and_then(|d| d.get(from..)));
            } else {
                any.push(&now);
            }
            from += n as usize;
            pool.mem.perhaps(at, n.into(), &any, &what);
        }
        pool.give(r.cell);
    }
}
