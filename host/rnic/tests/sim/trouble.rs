//! What goes wrong beside single packets: links, queue pairs, regions, users and hosts that fail or go.

use hyv_abi::queue::{WcOpcode, WcStatus, WrOpcode};
use hyv_abi::types::{Errno, QpState, QpType};

use crate::common::Wr;
use crate::ends::{Kind, Life, bit};
use crate::plan::Link;
use crate::run::Sim;
use crate::windows::{MemoryWindow, State};
use crate::world::engine;

impl Sim {
    /// The network fails between two hosts for a while.
    pub fn part(&mut self) {
        let n = self.w.hosts.len() as u64;
        let (a, b) = (self.w.rng.below(n) as usize, self.w.rng.below(n) as usize);
        let until = self.w.now() + self.w.rng.below(3_000_000);
        let (a, b) = (self.w.hosts[a].gid, self.w.hosts[b].gid);
        self.w.net.lock().parted = Some((a, b, until));
    }

    pub fn trouble(&mut self) {
        let e = self.someone();
        if !self.ends[e].is_open() {
            return;
        }
        match self.w.rng.below(10) {
            0 => self.destroy(e),
            1 => self.give_up(e),
            2..5 => self.deregister(e),
            5 => self.leave(self.ends[e].person),
            6 => self.restart(self.w.people[self.ends[e].person].host),
            _ => self.ask_for_what_is_forbidden(e),
        }
    }

    /// A QP is destroyed, whatever it is doing.
    fn destroy(&mut self, e: usize) {
        self.is_ending(e);
        self.untidy = true;
        let person = self.ends[e].person;
        let (host, id) = (self.w.people[person].host, self.w.people[person].user.id);
        let qp = self.ends[e].qp.handle;
        self.w.hosts[host]
            .engine
            .destroy_qp(id, qp)
            .expect("destroy_qp");
        self.nudge(person);
        self.ends[e].life = Life::Closed;
        for pool in self.ends[e].pools() {
            pool.mem.freeze();
        }
    }

    /// A user puts its QP into the error state.
    pub fn give_up(&mut self, e: usize) {
        let person = self.ends[e].person;
        let host = self.w.people[person].host;
        let engine = &mut self.w.hosts[host].engine;
        self.ends[e]
            .qp
            .go(engine, QpState::Err)
            .expect("to the error state");
        self.nudge(person);
        self.is_ending(e);
    }

    /// A region goes while it is used.
    fn deregister(&mut self, e: usize) {
        let (peer, person) = (self.ends[e].peer, self.ends[e].person);
        let which = self.w.rng.below(3) as usize;
        let end = &mut self.ends[e];
        let pool = match which {
            0 => &mut end.out,
            1 => &mut end.inn,
            _ => &mut end.rcv,
        };
        if pool.dead {
            return;
        }
        let mr = pool.mr.handle;
        let (host, id) = (self.w.people[person].host, self.w.people[person].user.id);
        let bound = end.windows.iter().any(|w| w.state != State::Gone);
        let engine = &mut self.w.hosts[host].engine;
        match engine.dereg_mr(id, mr) {
            Ok(()) => {}
            // Not while a window is bound to it.
            Err(e) if which == 1 && bound && e.errno == Errno::Busy => return,
            Err(e) => panic!("dereg_mr: {e}"),
        }
        let end = &mut self.ends[e];
        let pool = match which {
            0 => &mut end.out,
            1 => &mut end.inn,
            _ => &mut end.rcv,
        };
        pool.dead = true;
        pool.mem.freeze();
        match which {
            0 => self.ends[e].may |= bit(WcStatus::LocProtErr),
            1 => {
                self.ends[peer].may |= bit(WcStatus::RemAccessErr);
                self.ends[e].may |= bit(WcStatus::MwBindErr);
            }
            _ => {
                self.receive_may |= bit(WcStatus::LocProtErr);
                self.ends[peer].may |= bit(WcStatus::RemOpErr);
            }
        }
        self.is_ending(e);
        self.nudge(person);
    }

    /// A user vanishes with all it has.
    fn leave(&mut self, person: usize) {
        if self.w.people[person].gone.is_some() {
            return;
        }
        for e in 0..self.ends.len() {
            if self.ends[e].person == person && self.ends[e].is_open() {
                self.is_ending(e);
                self.ends[e].life = Life::Closed;
                for pool in self.ends[e].pools() {
                    pool.mem.freeze();
                }
            }
        }
        let p = &mut self.w.people[person];
        self.w.hosts[p.host].engine.remove_user(p.user.id);
        p.words.mem.freeze();
        let used = p.user.alloc(0);
        p.gone = Some(p.user.ram.read(0, used));
        self.nudge(person);
    }

    /// A host stops at once and comes back with nothing but its address; others make new connections to it.
    fn restart(&mut self, host: usize) {
        let before: Vec<usize> = (0..self.w.people.len())
            .filter(|&p| self.w.people[p].host == host && self.w.people[p].gone.is_none())
            .collect();
        self.tell(host);
        for &person in &before {
            self.leave(person);
        }
        let gid = self.w.hosts[host].gid;
        let e = engine(&self.w.net, &self.w.clock, gid, &self.w.plan);
        self.w.hosts[host].renew(e);
        self.w.net.lock().forget(&gid);
        for _ in before {
            let person = self.w.person(host);
            self.w.people.push(person);
            let new = self.w.people.len() - 1;
            let others: Vec<usize> = (0..new)
                .filter(|&p| self.w.people[p].host != host && self.w.people[p].gone.is_none())
                .collect();
            if others.is_empty() {
                continue;
            }
            let far = |rng: &mut crate::common::Rng| 0x20_0000 + rng.below(0x40_0000) as u32;
            let rng = &mut self.w.rng;
            let link = rng.below(self.w.plan.links.len() as u64) as usize;
            // Packets of before find QPs of the same numbers: only PSNs tell them apart, so those are not near, and an unreliable connection
            // could not tell.
            let link = Link {
                ty: QpType::Rc,
                users: (new, rng.pick(&others)),
                psn: (far(rng), far(rng)),
                retry_cnt: 7,
                ..self.w.plan.links[link]
            };
            self.link(link);
        }
    }

    /// A request that must fail, and must change nothing.
    fn ask_for_what_is_forbidden(&mut self, e: usize) {
        let end = &self.ends[e];
        let peer = end.peer;
        if end.link.ty != QpType::Rc
            || end.room() == 0
            || end.out.dead
            || self.ends[peer].inn.dead
            || !self.is_whole(e)
        {
            return;
        }
        let id = self.w.id();
        let (ours, theirs) = (self.ends[e].out.mr, self.ends[peer].inn.mr);
        let (op, opcode) = self.w.rng.pick(&[
            (WrOpcode::Write, WcOpcode::Write),
            (WrOpcode::Read, WcOpcode::Read),
            (WrOpcode::FetchAdd, WcOpcode::FetchAdd),
        ]);
        let atomic = op == WrOpcode::FetchAdd;
        let mut wr = Wr::new(op, id).sge(ours.sge(0, 8)).to(&theirs, 0);
        let status = match self.w.rng.below(5) {
            // A byte too far on either side.
            0 if !atomic => {
                wr.remote = theirs.iova + theirs.len - 7;
                WcStatus::RemAccessErr
            }
            1 if !atomic => {
                wr.remote = theirs.iova - 1;
                WcStatus::RemAccessErr
            }
            // A key that was, or will be.
            2 => {
                let gone = |w: &&MemoryWindow| w.state == State::Gone;
                match self.ends[peer].windows.iter().find(gone) {
                    Some(window) => wr.rkey = window.key,
                    None => wr.rkey ^= 1 + self.w.rng.below(255) as u32,
                }
                WcStatus::RemAccessErr
            }
            3 if atomic => {
                wr.remote += 4;
                WcStatus::RemInvReqErr
            }
            _ => {
                wr.sges[0].lkey ^= 0x80;
                WcStatus::LocProtErr
            }
        };
        if self.put(e, wr, opcode, Kind::Forbidden, (None, None), 8) {
            self.ends[e].may |= bit(status);
            self.is_ending(e);
            self.is_ending(peer);
        }
    }
}
