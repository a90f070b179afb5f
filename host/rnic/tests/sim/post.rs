//! Posting: what users ask for, and what the model notes of it.

use std::rc::Rc;

use hyv_abi::queue::{WcOpcode, WrOpcode, flags};
use hyv_abi::types::QpType;

use crate::common::{QKEY, Rng, Wr};
use crate::ends::{Kind, Life, Message, NUMBER, Sent, pieces};
use crate::run::Sim;
use crate::world::{Receive, reliable};

/// SGEs that a receive of the rings' stride has room for.
const RECEIVE_PIECES: usize = 3;
/// Bytes that two slots carry inline.
const INLINE: u64 = 80;

/// A length: nothing, tiny, about a packet's border, anything.
fn length(rng: &mut Rng, mtu: u64, least: u64, most: u64) -> u64 {
    let n = match rng.below(8) {
        0 => 0,
        1 | 2 => rng.below(33),
        3 | 4 => mtu * rng.below(5) + rng.below(3),
        _ => rng.below(most + 1),
    };
    n.saturating_sub(u64::from(rng.below(2) == 0))
        .clamp(least.min(most), most)
}

impl Sim {
    /// Posts a receive to an end's queue, if there is room. Gives whether there was.
    pub fn receive(&mut self, e: usize) -> bool {
        let id = self.w.id();
        let end = &mut self.ends[e];
        let p = &mut self.w.people[end.person];
        if !end.is_open() || p.gone.is_some() {
            return false;
        }
        let shared = end.link.shared;
        let (pool, room) = match (&mut p.srq_pool, &p.srq) {
            (Some(pool), Some(srq)) if shared => (pool, p.srq_posted.len() < 1 << srq.log2),
            _ => (&mut end.rcv, end.posted.len() < 1 << end.link.rq_log2),
        };
        if !room {
            return false;
        }
        // From a region that is gone, too: whoever sends to it must learn.
        let Some(cell) = pool.free.pop() else {
            return false;
        };
        let at = pool.at(cell);
        // All of the cell, so that every message fits.
        let pieces = pieces(&mut self.w.rng, at, pool.cell, pool.cell, RECEIVE_PIECES);
        let sges: Vec<_> = pieces.iter().map(|&(at, n)| pool.sge(at, n)).collect();
        for &(at, n) in pieces.iter().filter(|_| !pool.dead) {
            pool.mem.lend(at, n.into());
        }
        let receive = Receive { id, pieces, cell };
        if shared && let Some(srq) = &mut p.srq {
            srq.post_recv(id, &sges);
            p.srq_posted.push(receive);
        } else {
            end.qp.post_recv(id, &sges);
            end.posted.push_back(receive);
        }
        true
    }

    fn wr_op(&mut self, e: usize) -> WrOpcode {
        let rng = &mut self.w.rng;
        match self.ends[e].link.ty {
            QpType::Rc => rng.pick(&[
                WrOpcode::Send,
                WrOpcode::Send,
                WrOpcode::SendImm,
                WrOpcode::Write,
                WrOpcode::Write,
                WrOpcode::WriteImm,
                WrOpcode::Read,
                WrOpcode::Read,
                WrOpcode::CmpSwp,
                WrOpcode::FetchAdd,
            ]),
            QpType::Uc => rng.pick(&[
                WrOpcode::Send,
                WrOpcode::SendImm,
                WrOpcode::Write,
                WrOpcode::WriteImm,
            ]),
            QpType::Ud => rng.pick(&[WrOpcode::Send, WrOpcode::SendImm]),
        }
    }

    /// Posts a work request, if there is room for it. Gives whether there was.
    pub fn send(&mut self, e: usize) -> bool {
        let end = &self.ends[e];
        let peer_open = self.ends[end.peer].is_open();
        if !end.is_open() || end.room() == 0 || end.out.dead {
            return false;
        }
        if self.w.rng.below(10) == 0 && self.window(e) {
            return true;
        }
        let mut op = self.wr_op(e);
        if !peer_open || self.ends[self.ends[e].peer].inn.dead {
            op = WrOpcode::Send;
        }
        match op {
            WrOpcode::Read => self.read(e),
            WrOpcode::CmpSwp | WrOpcode::FetchAdd => self.atomic(e, op),
            WrOpcode::Write | WrOpcode::WriteImm => self.write(e, op),
            _ => self.message(e, op),
        }
    }

    /// A source of `len` bytes: fresh ones in a cell of the end. Gives the cell, its pieces and the bytes.
    fn source(
        &mut self,
        e: usize,
        len: u64,
        number: Option<u64>,
    ) -> Option<(usize, Wr, Rc<Vec<u8>>)> {
        let end = &mut self.ends[e];
        let rng = &mut self.w.rng;
        let mut data = rng.bytes(len as usize);
        if let Some(n) = number {
            data[..NUMBER as usize].copy_from_slice(&n.to_le_bytes());
        }
        let cell = end.out.take()?;
        let wr = Wr::new(WrOpcode::Send, 0);
        let wr = if len <= INLINE && rng.below(3) == 0 {
            wr.inline(&data)
        } else {
            let at = end.out.at(cell);
            let mut wr = wr;
            let most = if end.room() > 1 { 4 } else { 1 };
            let mut done = 0;
            for (at, n) in pieces(rng, at, end.out.cell, len, most) {
                end.out.mem.put(at, &data[done..done + n as usize]);
                done += n as usize;
                wr = wr.sge(end.out.sge(at, n));
            }
            wr
        };
        Some((cell, wr, Rc::new(data)))
    }

    fn message(&mut self, e: usize, op: WrOpcode) -> bool {
        let end = &self.ends[e];
        let (ty, mtu, id) = (end.link.ty, u64::from(end.link.mtu), self.w.id());
        let (least, most) = match ty {
            QpType::Rc => (0, end.link.cell),
            QpType::Uc => (NUMBER, end.link.cell),
            QpType::Ud => (NUMBER, end.link.cell.min(4_096)),
        };
        let len = length(&mut self.w.rng, mtu, least, most);
        let number = (!reliable(ty)).then_some(id);
        let Some((cell, mut wr, data)) = self.source(e, len, number) else {
            return false;
        };
        wr.op = op as u8;
        wr.wr_id = id;
        let imm = (op == WrOpcode::SendImm).then_some(self.w.rng.next() as u32);
        wr = wr.imm(imm.unwrap_or(0));
        let mut peer = self.ends[e].peer;
        if ty == QpType::Ud {
            peer = self.someone_with_datagrams();
            let (gid, qpn) = (self.gid(peer), self.ends[peer].qp.qpn);
            let ah = self.ends[e].ah(&mut self.w, gid);
            wr = wr.remote(u64::from(ah) | u64::from(qpn) << 32, QKEY);
        }
        let message = Message {
            seq: self.ends[e].seq,
            data: Some(data),
            len: len as u32,
            imm,
            invalidates: None,
            from_qpn: self.ends[e].qp.qpn,
            from: self.gid(e),
        };
        let ok = self.put(
            e,
            wr,
            WcOpcode::Send,
            Kind::Send,
            (Some(cell), None),
            len as u32,
        );
        if ok {
            self.ends[peer].coming.push_back(message);
        }
        ok
    }

    fn write(&mut self, e: usize, op: WrOpcode) -> bool {
        let end = &self.ends[e];
        let (peer, mtu, most) = (end.peer, u64::from(end.link.mtu), end.link.cell);
        let len = length(&mut self.w.rng, mtu, 0, most);
        let window = self.try_window(e);
        let Some(to) = window.map(|w| w.1).or_else(|| self.ends[peer].inn.take()) else {
            return false;
        };
        let give_up = |sim: &mut Self| {
            if window.is_none() {
                sim.ends[peer].inn.give(to);
            }
        };
        let Some((cell, mut wr, data)) = self.source(e, len, None) else {
            give_up(self);
            return false;
        };
        wr.op = op as u8;
        wr.wr_id = self.w.id();
        let target = &mut self.ends[peer];
        let at = target.inn.at(to) + self.w.rng.below(target.inn.cell - len + 1);
        wr = wr.to(&target.inn.mr, at - target.inn.mr.offset);
        if let Some((_, _, key)) = window {
            wr.rkey = key;
        }
        let with_imm = op == WrOpcode::WriteImm;
        let imm = self.w.rng.next() as u32;
        if with_imm {
            wr = wr.imm(imm);
        }
        let message = Message {
            seq: self.ends[e].seq,
            data: None,
            len: len as u32,
            imm: Some(imm),
            invalidates: None,
            from_qpn: self.ends[e].qp.qpn,
            from: self.gid(e),
        };
        let kind = Kind::Write {
            at,
            data,
            landed: false,
        };
        // What an unreliable network doubles may be written again, much later: such a cell is used once.
        let again = reliable(self.ends[e].link.ty) && window.is_none();
        let cells = (Some(cell), again.then_some(to));
        if !self.put(e, wr, WcOpcode::Write, kind, cells, len as u32) {
            if !again {
                give_up(self);
            }
            return false;
        }
        self.uses(e, window, false);
        let target = &mut self.ends[peer];
        target.inn.mem.lend(at, len);
        if with_imm {
            target.coming.push_back(message);
        }
        true
    }

    /// Now and then a window of the peer, if there is one: its place, cell and key.
    fn try_window(&mut self, e: usize) -> Option<(usize, usize, u32)> {
        let peer = self.ends[e].peer;
        let free = self.free_window(peer)?;
        (self.w.rng.below(2) == 0).then_some(free)
    }

    /// What was just posted goes by a window of the peer.
    fn uses(&mut self, e: usize, window: Option<(usize, usize, u32)>, read: bool) {
        let peer = self.ends[e].peer;
        if let (Some((i, ..)), Some(s)) = (window, self.ends[e].sent.back_mut()) {
            s.window = Some(i);
            let window = &mut self.ends[peer].windows[i];
            (window.busy, window.read) = (true, read);
        }
    }

    fn read(&mut self, e: usize) -> bool {
        let end = &self.ends[e];
        let (peer, mtu, most) = (end.peer, u64::from(end.link.mtu), end.link.cell);
        let room = end.room();
        let len = length(&mut self.w.rng, mtu, 0, most);
        let window = self.try_window(e);
        let Some(from) = window.map(|w| w.1).or_else(|| self.ends[peer].inn.take()) else {
            return false;
        };
        let Some(cell) = self.ends[e].out.take() else {
            if window.is_none() {
                self.ends[peer].inn.give(from);
            }
            return false;
        };
        let source = &mut self.ends[peer].inn;
        let at = source.at(from) + self.w.rng.below(source.cell - len + 1);
        let data = Rc::new(self.w.rng.bytes(len as usize));
        source.mem.put(at, &data);
        let mut wr = Wr::new(WrOpcode::Read, self.w.id()).to(&source.mr, at - source.mr.offset);
        if let Some((_, _, key)) = window {
            wr.rkey = key;
        }
        let out = &mut self.ends[e].out;
        let most = if room > 1 { 4 } else { 1 };
        let pieces = pieces(&mut self.w.rng, out.at(cell), out.cell, len, most);
        for &(at, n) in &pieces {
            wr = wr.sge(out.sge(at, n));
        }
        let kind = Kind::Read {
            pieces: pieces.clone(),
            data: Rc::clone(&data),
        };
        // Now and then the answer goes on at once, fenced.
        let relay = self.w.rng.below(4) == 0 && room > 3 && (len > 32 || self.is_wire(e));
        let first = (
            if relay { None } else { Some(cell) },
            window.is_none().then_some(from),
        );
        if !self.put(e, wr.clone(), WcOpcode::Read, kind, first, len as u32) {
            if relay {
                self.ends[e].out.give(cell);
            }
            return false;
        }
        self.uses(e, window, true);
        for &(at, n) in &pieces {
            self.ends[e].out.mem.lend(at, n.into());
        }
        if relay && !self.relay(e, &wr, cell, data) {
            // Whoever completes it gives the cell back.
            if let Some(read) = self.ends[e].sent.back_mut() {
                read.out_cell = Some(cell);
            }
        }
        true
    }

    /// Sends on what a READ that was just posted brings.
    fn relay(&mut self, e: usize, read: &Wr, cell: usize, data: Rc<Vec<u8>>) -> bool {
        let mut wr = Wr::new(WrOpcode::Send, self.w.id()).with(flags::FENCE);
        wr.sges.clone_from(&read.sges);
        let len = data.len() as u32;
        let message = Message {
            seq: self.ends[e].seq,
            data: Some(data),
            len,
            imm: None,
            invalidates: None,
            from_qpn: self.ends[e].qp.qpn,
            from: self.gid(e),
        };
        let n = wr.slots().len() as u32;
        let end = &self.ends[e];
        if n > end.room() || !self.put(e, wr, WcOpcode::Send, Kind::Send, (Some(cell), None), len) {
            return false;
        }
        let peer = self.ends[e].peer;
        self.ends[peer].coming.push_back(message);
        true
    }

    fn atomic(&mut self, e: usize, op: WrOpcode) -> bool {
        let end = &mut self.ends[e];
        let Some(cell) = end.out.take() else {
            return false;
        };
        let rng = &mut self.w.rng;
        let at = end.out.at(cell) + rng.below(end.out.cell - 8 + 1);
        let (peer, was) = (end.peer, end.chain);
        let mut wr = Wr::new(op, self.w.next_id + 1).sge(end.out.sge(at, 8));
        let (opcode, kind) = if op == WrOpcode::FetchAdd && rng.below(2) == 0 {
            let word = rng.below(4) as usize;
            let person = self.ends[peer].person;
            let mr = self.w.people[person].words.mr;
            wr = wr.to(&mr, 8 * word as u64).atomic(0, 1);
            (WcOpcode::FetchAdd, Kind::Add { landing: at, word })
        } else {
            let operand = rng.next();
            let hit = rng.below(3) > 0;
            let compare = if hit { was } else { was ^ 1 };
            let becomes = match op {
                WrOpcode::FetchAdd => was.wrapping_add(operand),
                _ if hit => operand,
                _ => was,
            };
            wr = wr.to(&self.ends[peer].word.mr, 0).atomic(compare, operand);
            let kind = Kind::Chain {
                landing: at,
                was,
                becomes,
            };
            match op {
                WrOpcode::FetchAdd => (WcOpcode::FetchAdd, kind),
                _ => (WcOpcode::CmpSwp, kind),
            }
        };
        self.w.id();
        let next = match kind {
            Kind::Chain { becomes, .. } => becomes,
            _ => was,
        };
        if !self.put(e, wr, opcode, kind, (Some(cell), None), 8) {
            return false;
        }
        let end = &mut self.ends[e];
        end.chain = next;
        end.out.mem.lend(at, 8);
        true
    }

    /// A last request that says when all before it is complete.
    pub fn barrier(&mut self, e: usize) -> bool {
        let id = self.w.id();
        let end = &self.ends[e];
        if end.room() == 0 {
            return false;
        }
        let (op, opcode) = match end.link.ty {
            QpType::Ud => return false,
            _ => (WrOpcode::Write, WcOpcode::Write),
        };
        self.put(e, Wr::new(op, id), opcode, Kind::Bare, (None, None), 0)
    }

    /// Fills slots and rings, if there is room; else the cells go back.
    pub fn put(
        &mut self,
        e: usize,
        mut wr: Wr,
        opcode: WcOpcode,
        kind: Kind,
        cells: (Option<usize>, Option<usize>),
        len: u32,
    ) -> bool {
        let n = wr.slots().len() as u32;
        let end = &mut self.ends[e];
        let room = end.room();
        if n > room {
            if let Some(cell) = cells.0 {
                end.out.give(cell);
            }
            if let Some(cell) = cells.1 {
                let peer = end.peer;
                self.ends[peer].inn.give(cell);
            }
            return false;
        }
        let rng = &mut self.w.rng;
        if rng.below(6) == 0 {
            wr = wr.with(flags::FENCE);
        }
        if rng.below(6) == 0 {
            wr = wr.with(flags::SOLICITED);
        }
        // The next one must find room once this one's completion has been seen.
        let bare = matches!(
            kind,
            Kind::Bare | Kind::Forbidden | Kind::Bind(_) | Kind::Unbind(_)
        );
        if room - n >= 4 && !bare && rng.below(2) == 0 {
            wr = wr.unsignaled();
        }
        let signaled = end.qp.cap.sig_all || wr.flags & flags::SIGNALED != 0;
        if self.w.trace {
            let (qpn, now) = (end.qp.qpn, self.w.now());
            eprintln!(
                "{now} end {e} qpn {qpn:x} posts {} seq {} {opcode:?} len {len} flags {:#x}",
                wr.wr_id, end.seq, wr.flags
            );
        }
        end.qp.post_silently(&wr);
        end.used += n;
        end.sent.push_back(Sent {
            id: wr.wr_id,
            seq: end.seq,
            slots: n,
            signaled,
            opcode,
            len,
            kind,
            window: None,
            out_cell: cells.0,
            in_cell: cells.1,
        });
        end.seq += 1;
        let ring = end.qp.ring();
        let host = self.w.people[end.person].host;
        self.w.rang(host, ring);
        true
    }

    /// An end of a datagram QP, any.
    fn someone_with_datagrams(&mut self) -> usize {
        let ends: Vec<usize> = (0..self.ends.len())
            .filter(|&e| self.ends[e].link.ty == QpType::Ud)
            .collect();
        self.w.rng.pick(&ends)
    }

    /// Tops up receives wherever messages may come.
    pub fn receive_all(&mut self) {
        for e in 0..self.ends.len() {
            while self.receive(e) {}
        }
    }

    /// Whether an end still sends and the other still answers.
    pub fn is_whole(&self, e: usize) -> bool {
        let (a, b) = (&self.ends[e], &self.ends[self.ends[e].peer]);
        [a, b].iter().all(|x| x.life == Life::Live && !x.ending)
    }
}
