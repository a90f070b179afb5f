//! One seed, from its hosts' birth to the last look at every byte.

use std::collections::HashMap;
use std::rc::Rc;

use hyv_abi::queue::WcStatus;
use hyv_abi::types::QpType;
use hyv_roce::carrier::Gid;

use crate::ends::{End, Life};
use crate::net::Faults;
use crate::plan::{Link, Plan};
use crate::world::{World, reliable};

/// Within so long of virtual time everything is done once the network is well: twenty times what the longest ACK timeout here takes with all its
/// retries, for those who wait for one another.
const SETTLED_NS: u64 = 10_000_000_000;
/// After so long of it users end what they need not wait for.
const PATIENCE_NS: u64 = 1_000_000_000;
/// How long stragglers may take afterwards.
const AFTER_NS: u64 = 5_000_000;

/// What many seeds did: shows that they did something.
#[derive(Clone, Default, Debug)]
pub struct Told {
    pub seeds: u64,
    pub completions: u64,
    pub packets: u64,
    pub retransmissions: u64,
    pub duplicates: u64,
    pub icrc_errors: u64,
    pub rnr_naks: u64,
    /// By status: first failures of a QP.
    pub failed: [u64; 16],
}

impl Told {
    pub fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.completions += other.completions;
        self.packets += other.packets;
        self.retransmissions += other.retransmissions;
        self.duplicates += other.duplicates;
        self.icrc_errors += other.icrc_errors;
        self.rnr_naks += other.rnr_naks;
        for (a, b) in self.failed.iter_mut().zip(other.failed) {
            *a += b;
        }
    }

    /// The known seeds reach what they are for.
    pub fn must_cover(&self) {
        for (what, n) in [
            ("completions", self.completions),
            ("retransmissions", self.retransmissions),
            ("duplicates", self.duplicates),
            ("ICRC errors", self.icrc_errors),
            ("RNR NAKs", self.rnr_naks),
            ("flushes", self.failed[WcStatus::WrFlushErr as usize]),
            ("time-outs", self.failed[WcStatus::RetryExcErr as usize]),
        ] {
            assert!(n > 10, "only {n} {what} in {} seeds", self.seeds);
        }
    }
}

pub struct Sim {
    pub w: World,
    pub ends: Vec<End>,
    /// Ends by user and QPN.
    pub by_qpn: HashMap<(usize, u32), usize>,
    pub told: Told,
    /// Receives of an SRQ may hold parts of messages that were dropped.
    pub untidy: bool,
    /// Statuses that are right for receives that fail, by bit.
    pub receive_may: u32,
    /// WRITEs that may have been done: at whose end, where, what.
    pub leaks: Vec<(usize, u64, Rc<Vec<u8>>)>,
}

/// Runs a seed to its end.
pub fn run(seed: u64, plan: Plan, trace: bool) -> Told {
    let mut sim = Sim::new(seed, plan, trace);
    sim.act();
    sim.converge();
    sim.close();
    sim.finish()
}

impl Sim {
    fn new(seed: u64, plan: Plan, trace: bool) -> Self {
        let w = World::new(seed, plan, trace);
        let mut sim = Self {
            w,
            ends: Vec::new(),
            by_qpn: HashMap::new(),
            told: Told {
                seeds: 1,
                ..Told::default()
            },
            untidy: false,
            receive_may: 0,
            leaks: Vec::new(),
        };
        for link in sim.w.plan.links.clone() {
            sim.link(link);
        }
        if sim.w.plan.datagrams {
            for person in 0..sim.w.people.len() {
                sim.datagram_end(person);
            }
        }
        sim.w.net.lock().faults = sim.w.plan.faults;
        sim
    }

    pub fn gid(&self, e: usize) -> Gid {
        self.w.hosts[self.w.people[self.ends[e].person].host].gid
    }

    fn add(&mut self, person: usize, link: Link) -> usize {
        let end = End::new(&mut self.w, person, link);
        self.by_qpn.insert((person, end.qp.qpn), self.ends.len());
        self.ends.push(end);
        self.ends.len() - 1
    }

    /// Runs a control verb's after-effects: whoever calls one wakes the engine.
    pub fn nudge(&mut self, person: usize) {
        let host = self.w.people[person].host;
        self.w.rang(host, crate::common::Ring::Kick);
    }

    /// Makes a connection.
    pub fn link(&mut self, link: Link) {
        let a = self.add(link.users.0, link);
        let b = self.add(link.users.1, link);
        for (x, y, psn) in [(a, b, link.psn), (b, a, (link.psn.1, link.psn.0))] {
            self.ends[x].peer = y;
            // The chain is of the word at the other end.
            let to = (self.gid(y), self.ends[y].qp.qpn);
            let person = self.ends[x].person;
            let host = self.w.people[person].host;
            self.ends[x].connect(&mut self.w.hosts[host].engine, to, psn);
            self.nudge(person);
        }
        let (x, y) = (self.ends[a].chain, self.ends[b].chain);
        (self.ends[a].chain, self.ends[b].chain) = (y, x);
    }

    fn datagram_end(&mut self, person: usize) {
        let link = Link {
            ty: QpType::Ud,
            users: (person, person),
            shared: false,
            mtu: 4096,
            ..self.w.plan.links[0]
        };
        let e = self.add(person, link);
        self.ends[e].peer = e;
        let host = self.w.people[person].host;
        self.ends[e].connect(&mut self.w.hosts[host].engine, ([0; 16], 0), (7, 7));
        self.nudge(person);
    }

    pub fn someone(&mut self) -> usize {
        self.w.rng.below(self.ends.len() as u64) as usize
    }

    fn act(&mut self) {
        for _ in 0..self.w.plan.actions {
            match self.w.rng.below(10) {
                0..5 => {
                    let e = self.someone();
                    for _ in 0..=self.w.rng.below(6) {
                        self.send(e);
                    }
                }
                5 | 6 => {
                    for _ in 0..self.ends.len().div_ceil(2) {
                        let e = self.someone();
                        for _ in 0..=self.w.rng.below(6) {
                            self.receive(e);
                        }
                    }
                }
                7 | 8 => {
                    for _ in 0..self.w.people.len().div_ceil(2) {
                        let person = self.w.rng.below(self.w.people.len() as u64) as usize;
                        let most = 1 + self.w.rng.below(20) as usize;
                        self.poll(person, most);
                    }
                }
                _ => {
                    let ns = self.w.rng.below(20 * self.w.plan.pace + 2_000);
                    self.w.pass(ns);
                }
            }
            if self.w.rng.below(1_000) < self.w.plan.trouble {
                self.trouble();
            }
            if self.w.rng.below(1_000) < self.w.plan.parting {
                self.part();
            }
            let ns = self.w.rng.below(self.w.plan.pace + 500);
            self.w.pass(ns);
        }
    }

    /// The network is well again: everything ends one way or another.
    fn converge(&mut self) {
        {
            let mut net = self.w.net.lock();
            net.faults = Faults::default();
            net.parted = None;
        }
        let limit = self.w.now() + SETTLED_NS;
        let mut asked = vec![false; self.ends.len()];
        let mut step = 1_000;
        loop {
            self.receive_all();
            for person in 0..self.w.people.len() {
                self.poll(person, usize::MAX);
            }
            let mut busy = false;
            for (e, asked) in asked.iter_mut().enumerate() {
                if !self.ends[e].is_open() {
                    continue;
                }
                if !*asked {
                    *asked = self.barrier(e) || self.ends[e].link.ty == QpType::Ud;
                }
                busy |= !*asked || self.ends[e].sent.iter().any(|s| s.signaled);
            }
            if !busy {
                return;
            }
            let now = self.w.now();
            if now >= limit - SETTLED_NS + PATIENCE_NS {
                self.let_go();
            }
            if now >= limit {
                for (e, end) in self
                    .ends
                    .iter()
                    .enumerate()
                    .filter(|(_, end)| end.is_open() && !end.sent.is_empty())
                {
                    eprintln!(
                        "end {e} qpn {:x} {:?} waits for {:?}; {:?}",
                        end.qp.qpn,
                        end.link,
                        end.sent,
                        self.counters(e)
                    );
                }
                panic!("the network is well and not everything ends");
            }
            self.w.pass(step);
            step = (step * 3 / 2).min(50_000_000);
        }
    }

    /// Ends users' QPs whose peers are gone or may have lost the end of a message: one that stopped in the middle holds a receive that others of
    /// its SRQ wait for.
    fn let_go(&mut self) {
        for e in 0..self.ends.len() {
            let (end, peer) = (&self.ends[e], &self.ends[self.ends[e].peer]);
            let over = peer.life != Life::Live || peer.ending || !reliable(end.link.ty);
            if end.link.shared && end.is_open() && !end.ending && over {
                self.give_up(e);
            }
        }
    }

    /// Stragglers come; then every QP is put into the error state and flushes.
    fn close(&mut self) {
        self.w.pass(AFTER_NS);
        self.poll_all();
        for (e, end) in self.ends.iter().enumerate() {
            if self.is_whole(e) && reliable(end.link.ty) {
                let late = end.coming.front();
                assert!(late.is_none(), "end {e}: never received {late:?}");
            }
        }
        for e in 0..self.ends.len() {
            if self.ends[e].is_open() {
                self.give_up(e);
            }
        }
        self.w.pass(AFTER_NS);
        self.poll_all();
        for (e, end) in self.ends.iter().enumerate() {
            if end.is_open() {
                let unsignaled = end.life == Life::Live && end.sent.iter().all(|s| !s.signaled);
                assert!(
                    end.sent.is_empty() || unsignaled,
                    "end {e}: not flushed: {:?}",
                    end.sent
                );
                assert!(
                    end.posted.is_empty(),
                    "end {e}: receives that were not flushed"
                );
            }
        }
    }

    fn poll_all(&mut self) {
        for person in 0..self.w.people.len() {
            self.poll(person, usize::MAX);
        }
    }

    fn finish(mut self) -> Told {
        for (e, at, data) in std::mem::take(&mut self.leaks) {
            let what = format!("end {e}: a WRITE that failed");
            self.ends[e]
                .inn
                .mem
                .perhaps(at, data.len() as u64, &[&data], &what);
        }
        self.check_messages();
        self.check_atomics();
        for end in &mut self.ends {
            for pool in end.pools() {
                pool.mem.check();
            }
        }
        for (i, p) in self.w.people.iter().enumerate() {
            p.words.mem.check();
            if let Some(pool) = &p.srq_pool {
                pool.mem.check();
            }
            if let Some(then) = &p.gone {
                let now = p.user.ram.read(0, then.len() as u64);
                assert!(now == *then, "user {i} is gone, and its memory changed");
            }
        }
        for host in 0..self.w.hosts.len() {
            self.tell(host);
        }
        self.told.packets = self.w.net.lock().packets;
        self.told
    }

    /// Looks at what a host has counted, and adds it up.
    pub fn tell(&mut self, host: usize) {
        let host = &self.w.hosts[host];
        let c = host.engine.device_counters();
        let damaged = self.w.net.lock().damaged(&host.gid);
        assert_eq!(
            c.icrc_errors + c.drops_malformed,
            damaged,
            "every damaged packet, and no other, is counted"
        );
        self.told.retransmissions += c.retransmissions;
        self.told.duplicates += c.duplicates;
        self.told.icrc_errors += c.icrc_errors;
        self.told.rnr_naks += c.rnr_naks_sent;
    }

    /// A message whose sender was told that it arrived has arrived.
    fn check_messages(&self) {
        for (e, end) in self.ends.iter().enumerate() {
            if !reliable(end.link.ty) || self.w.people[end.person].gone.is_some() {
                continue;
            }
            let done = self.ends[end.peer].done;
            let lost = end.coming.front().filter(|m| Some(m.seq) <= done);
            assert!(
                lost.is_none(),
                "end {e}: acknowledged and never received: {lost:?}"
            );
        }
    }

    fn check_atomics(&self) {
        for (e, end) in self.ends.iter().enumerate() {
            let peer = &self.ends[end.peer];
            if end.link.ty != QpType::Rc
                || !end.is_open()
                || self.w.people[peer.person].gone.is_some()
            {
                continue;
            }
            let now = self.word(peer.person, peer.word.mr.offset);
            let right = match &end.chain_ends[..] {
                [] => end.chain == now,
                any => any.contains(&now),
            };
            assert!(
                right,
                "end {e}: atomics ended at {now:#x}, not {:#x} or one of {:x?}",
                end.chain, end.chain_ends
            );
        }
        for (i, p) in self.w.people.iter().enumerate() {
            if p.gone.is_some() {
                continue;
            }
            for (word, added) in p.added.iter().enumerate() {
                let n = self
                    .word(i, p.words.mr.offset + 8 * word as u64)
                    .wrapping_sub(added.first);
                let unknown = self.w.people.iter().any(|p| p.gone.is_some()) || self.untidy;
                assert!(
                    n >= added.sure && (unknown || n <= added.sure + added.perhaps),
                    "user {i}: a word was added to {n} times, {} for sure and {} perhaps",
                    added.sure,
                    added.perhaps
                );
                let mut seen: Vec<u64> = added
                    .seen
                    .iter()
                    .map(|s| s.wrapping_sub(added.first))
                    .collect();
                seen.sort_unstable();
                let doubled = seen.windows(2).any(|w| w[0] == w[1]);
                assert!(
                    !doubled && seen.last().is_none_or(|&s| s < n),
                    "user {i}: atomics saw {seen:?} of {n}"
                );
            }
        }
    }

    fn word(&self, person: usize, at: u64) -> u64 {
        let bytes = self.w.people[person].user.ram.read(at, 8);
        u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
    }
}
