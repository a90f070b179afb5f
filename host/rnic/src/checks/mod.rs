//! What holds whatever users write into their queues and peers send: the fuzz targets and the tests over their corpora call
//! the same functions.
//!
//! An input is a list of steps, so that a change of a byte changes one thing and gets deep. Two users share an engine; each has
//! five hostile queue pairs, and one that minds its own business.
//!
//! What must hold, beside that nothing panics:
//! - a byte outside the regions that are registered and may be written never changes, in neither user's RAM;
//! - what lies in another protection domain is not to be found anywhere else;
//! - there are no more completions than work requests, and each is of its user;
//! - the engine comes to rest; the honest queue pairs then still talk to each other;
//! - when the users are gone, nothing of them is left.

mod guest;
mod transport;
mod workqueue;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hyv_abi::queue::{MAX_SEND_SGE, SLOT_WORDS, SendHead, Sge, WrOpcode, flags};
use hyv_abi::types::{Access, QpAttrMask as M, QpType};
use hyv_roce::carrier::{Carrier, Gid};

use crate::engine::{Engine, EngineConfig};
use guest::{Guest, IOVA, OWN_PEER, Path, QKEY, QPS};

pub use transport::transport;
pub use workqueue::workqueue;

/// Steps of one input: more find nothing new and only take time.
const MAX_STEPS: usize = 256;
/// Steps between looks at all of the RAM.
const CHECK_STEPS: usize = 8;
/// This device's address.
const US: Gid = gid(1);

/// An IPv4 address.
const fn gid(last: u8) -> Gid {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, last]
}

/// The rest of an input.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// A byte, 0 when there are no more.
    fn or0(&mut self) -> u8 {
        self.byte().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.or0(), self.or0()])
    }

    /// A word: of few bytes, or of all.
    fn word(&mut self) -> u64 {
        let how = self.or0();
        let n = usize::from(how & 7) + 1;
        let mut b = [0; 8];
        b[..n].fill_with(|| self.or0());
        u64::from_le_bytes(b).rotate_left(u32::from(how >> 3) * 2)
    }
}

/// Two users of one engine.
struct World {
    e: Engine,
    clock: Arc<AtomicU64>,
    guests: [Guest; 2],
    /// Where the hostile queue pairs' peers are: here, or at an address that has QPNs from so many on.
    elsewhere: Option<(Gid, u32)>,
    steps: usize,
}

impl World {
    fn new(bytes: &[u8], carrier: Option<Box<dyn Carrier>>, elsewhere: Option<(Gid, u32)>) -> Self {
        let clock = Arc::new(AtomicU64::new(1_000_000));
        let time = Arc::clone(&clock);
        let mut e = Engine::new(EngineConfig {
            clock: Box::new(move || time.load(Ordering::Relaxed)),
            gid: US,
            node_guid: 1,
            carrier,
            mad_bell: Box::new(|| {}),
        });
        // Of the whole input, so that no input holds it but by chance.
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
        });
        let peers: Vec<Gid> = std::iter::once(US)
            .chain(elsewhere.map(|(gid, _)| gid))
            .collect();
        let mut guest = |k: u64| {
            let marker = hash.wrapping_mul(2 * k + 0x9e37_79b9_7f4a_7c15);
            Guest::new(&mut e, marker.to_ne_bytes(), &peers)
        };
        let guests = [guest(1), guest(2)];
        let mut it = Self {
            e,
            clock,
            guests,
            elsewhere,
            steps: 0,
        };
        for g in 0..2 {
            let heard: Vec<u32> = it.guests[1 - g].regions.iter().map(|r| r.key).collect();
            it.guests[g].keys.extend(heard);
            for q in 0..QPS {
                let path = it.path(g, q);
                it.guests[g].revive(&mut it.e, q, &path);
            }
            let mut path = Path::new((US, it.guests[1 - g].probe.qpn));
            // Nothing but an error ends it.
            (path.timeout, path.retries) = (0, 7);
            let probe = it.guests[g].probe;
            it.guests[g]
                .connect(&mut it.e, &probe, &path)
                .expect("the probe's RTS");
        }
        it
    }

    /// Where a hostile queue pair is connected to.
    fn path(&self, g: usize, q: usize) -> Path {
        Path::new(match self.elsewhere {
            _ if q == OWN_PEER => (US, self.guests[g].qps[q].qpn),
            None => (US, self.guests[1 - g].qps[q].qpn),
            Some((gid, qpn)) => (gid, qpn + (QPS * g + q) as u32),
        })
    }

    fn poll(&mut self, turns: usize) {
        for _ in 0..turns {
            self.e.poll();
        }
        for g in &mut self.guests {
            g.drain(&self.e);
        }
    }

    fn pass(&mut self, ns: u64) {
        self.clock.fetch_add(ns, Ordering::Relaxed);
    }

    fn check(&mut self) {
        for g in &mut self.guests {
            g.check();
        }
    }

    /// One step of a user; `None` at the input's end.
    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        if self.steps == MAX_STEPS {
            return None;
        }
        let op = input.byte()?;
        self.steps += 1;
        let (g, q) = (usize::from(op >> 7), usize::from(op >> 4 & 7) % QPS);
        match op & 0xf {
            0..=4 => self.post(input, g, q),
            5 | 6 => {
                let how = input.or0();
                let count = u32::from(how & 7);
                let sges: Vec<Sge> = (0..count).map(|_| self.sge(input, g)).collect();
                // What the slot says is not what it has.
                let says = if how >> 6 == 3 { u32::from(how) } else { count };
                let id = self.steps as u64;
                self.guests[g].post_recv(q, id, says, &sges);
            }
            7 => {
                let (which, value) = (input.u16() % 0x800, input.word());
                self.guests[g].scribble(which, value);
            }
            8 => self.spoil_window(input, g),
            9 => self.poll(usize::from(input.or0() % 80)),
            10 => {
                let how = input.or0();
                self.pass(1 << (how % 33));
                self.poll(if how & 0x80 == 0 { 65 } else { 1 });
            }
            11 => {
                let (a, b) = (input.or0(), input.or0());
                let mut path = self.path(g, q);
                path.retries = u32::from(a & 7);
                path.timeout = u32::from(a >> 3);
                path.rd_atomic = u32::from(b & 7);
                path.mtu = [256, 512, 1024, 4096][usize::from(b >> 6)];
                if b & 0x20 != 0 {
                    path.access = Access::REMOTE_READ;
                }
                self.guests[g].revive(&mut self.e, q, &path);
            }
            12 => self.verb(input, g, q),
            13 => self.probe(input.or0()),
            _ => {
                // A slot of any bytes, or several.
                let n = usize::from(input.or0() % 3) + 1;
                let mut slots = [[0; SLOT_WORDS - 1]; 3];
                for slot in &mut slots[..n] {
                    slot.fill_with(|| input.word());
                }
                self.guests[g].post_to(q, &slots[..n], true);
                self.ring(g, q);
            }
        }
        if op & 0xf < 9 && self.steps.is_multiple_of(2) {
            self.poll(2);
        }
        if self.steps.is_multiple_of(CHECK_STEPS) {
            self.check();
        }
        Some(())
    }

    fn ring(&self, g: usize, q: usize) {
        self.guests[g].ring(self.guests[g].qps[q].handle);
    }

    /// A key that the user knows.
    fn key(&self, g: usize, choice: u8) -> u32 {
        let keys = &self.guests[g].keys;
        keys[usize::from(choice) % keys.len()]
    }

    /// A key, an address and a length; most of them of one of `owner`'s regions.
    fn piece(&self, input: &mut Input<'_>, g: usize, owner: usize) -> (u32, u64, u32) {
        let (what, at) = (input.or0(), input.or0());
        let regions = &self.guests[owner].regions;
        let region = &regions[usize::from(what & 7) % regions.len()];
        let len = [8, 0, 1, 32, 33, 256, 700, 4096][usize::from(what >> 3 & 7)];
        let at = u64::from(at);
        let (key, from) = match what >> 6 {
            0 | 1 => (region.key, 8 * at % region.len),
            2 => (region.key, (region.len + at).wrapping_sub(0x88)),
            _ => (self.key(g, input.or0()), 3 * at),
        };
        (key, (IOVA + region.offset).wrapping_add(from), len)
    }

    fn sge(&self, input: &mut Input<'_>, g: usize) -> Sge {
        let (lkey, addr, len) = self.piece(input, g, g);
        Sge { addr, len, lkey }
    }

    /// A work request that makes sense, mostly.
    fn post(&mut self, input: &mut Input<'_>, g: usize, q: usize) {
        let (what, how) = (input.or0(), input.or0());
        let opcode = what & 0xf;
        let op = WrOpcode::from_u8(opcode);
        let ty = self.guests[g].qps[q].ty;
        let mut head = SendHead {
            opcode,
            flags: what >> 4,
            num_sge: 0,
            slots: 0,
            imm: 0x0102_0304,
            wr_id: self.steps as u64,
            remote_addr: 0,
            rkey: 0,
            inline_len: 0,
        };
        if ty == QpType::Ud {
            let choice = input.or0();
            let ahs = &self.guests[g].ahs;
            let ah = ahs[usize::from(choice & 3) % ahs.len()];
            let of = &self.guests[usize::from(choice >> 2 & 1)];
            let to = of.qps[usize::from(choice >> 3 & 7) % QPS].qpn;
            head.remote_addr = u64::from(ah) | u64::from(to) << 32;
            head.rkey = if choice < 0xc0 { QKEY } else { 0x8000_0000 };
        } else if !matches!(op, Some(WrOpcode::Send | WrOpcode::SendImm)) {
            let owner = if q == OWN_PEER { g } else { 1 - g };
            (head.rkey, head.remote_addr, _) = self.piece(input, g, owner);
        }
        let mut operand = 0x5a5a;
        match op {
            Some(WrOpcode::SendInv | WrOpcode::LocalInv) => head.imm = self.key(g, input.or0()),
            Some(WrOpcode::BindMw) => {
                let choice = input.or0();
                let windows = self.guests[g].windows.len();
                if windows > 0 {
                    let i = usize::from(choice) % windows;
                    let (_, key) = self.guests[g].windows[i];
                    head.rkey = key;
                    head.imm = key & !0xff | u32::from(input.or0());
                    self.guests[g].windows[i].1 = head.imm;
                    self.guests[g].hear(head.imm);
                }
                head.remote_addr = u64::from(choice & 0x1f);
                operand = u64::from(input.u16());
            }
            _ => {}
        }
        let mut data: Vec<u64> = Vec::new();
        if head.flags & flags::INLINE != 0 {
            head.inline_len = 2 * u32::from(how);
            data.resize(head.inline_len.div_ceil(8) as usize, 0x1111_2222_3333_4444);
        } else {
            head.num_sge = (how & 0x1f).min(MAX_SEND_SGE as u8 + 1);
        }
        let cas = op == Some(WrOpcode::CmpSwp);
        let n = usize::from(head.num_sge);
        let slots = SendHead::slots_for(n, head.inline_len as usize, cas).min(10);
        head.slots = slots as u8;
        let mut words = [[0u64; SLOT_WORDS - 1]; 10];
        words[0][..4].copy_from_slice(&head.to_words());
        let rest = words[0][4..].len();
        for (i, w) in data.into_iter().enumerate() {
            match i.checked_sub(rest) {
                None => words[0][4 + i] = w,
                Some(i) => words[(1 + i / 7).min(9)][i % 7] = w,
            }
        }
        for i in 0..n {
            let sge = self.sge(input, g);
            let (slot, at) = match i {
                0 => (0, 4),
                _ => (1 + (i - 1) / 3, 2 * ((i - 1) % 3)),
            };
            words[slot][at..at + 2].copy_from_slice(&sge.to_words());
        }
        if matches!(
            op,
            Some(WrOpcode::CmpSwp | WrOpcode::FetchAdd | WrOpcode::BindMw)
        ) {
            words[0][6] = operand;
        }
        if how & 0x20 != 0 {
            // One word of it is something else.
            let at = usize::from(input.or0());
            words[at / 7 % slots][at % 7] ^= input.word();
        }
        self.guests[g].post_to(q, &words[..slots], how & 0x40 == 0);
        if how & 0x80 == 0 {
            self.ring(g, q);
        }
    }

    /// The user writes into the pages of its window that the engine reads.
    fn spoil_window(&mut self, input: &mut Input<'_>, g: usize) {
        let (which, at, value) = (input.or0(), input.or0(), input.word());
        let w = self.guests[g].mem.window();
        let (bells, at) = (&w.doorbells, usize::from(at));
        match which % 6 {
            0 => bells.level1[at % bells.level1.len()].store(value, Ordering::Relaxed),
            1 => {
                bells.level0[at].store(value, Ordering::Relaxed);
                bells.level1[at / 64].store(1 << (at % 64), Ordering::Relaxed);
            }
            2 => bells.polled[at].store(value as u8, Ordering::Relaxed),
            3 => bells.need_wakeup.store(value as u32, Ordering::Relaxed),
            4 => w.events.summary.store(value, Ordering::Relaxed),
            _ => w.events.qp_fatal[at].store(value, Ordering::Relaxed),
        }
    }

    /// A control verb, of those that change what the queues do.
    fn verb(&mut self, input: &mut Input<'_>, g: usize, q: usize) {
        let (what, value) = (input.or0(), input.or0());
        let guest = &mut self.guests[g];
        let handle = guest.qps[q].handle;
        match what % 6 {
            0 => guest.toggle(&mut self.e),
            1 => guest.window(&mut self.e, value),
            2 => {
                let attr = hyv_abi::control::QpAttr {
                    state: u32::from(value % 7),
                    ..hyv_abi::control::QpAttr::EMPTY
                };
                // Not to RESET: its rings must be empty then.
                if attr.state != 0 {
                    let _ = guest.modify(&mut self.e, handle, M::STATE, attr);
                }
            }
            3 => {
                let verb = hyv_abi::control::ModifySrq {
                    srq: guest.srq,
                    limit: u32::from(value),
                };
                let _ = self.e.modify_srq(guest.id, &verb);
            }
            4 => self.e.fail_qpn(guest.id, guest.qps[q].qpn),
            _ => {
                if self.e.doze() {
                    self.e.wake_up();
                    self.e.tick();
                }
            }
        }
    }

    fn probe(&mut self, how: u8) {
        let [a, b] = &mut self.guests;
        let (from, to) = if how & 1 == 0 { (a, b) } else { (b, a) };
        Guest::probe(&mut self.e, from, to, 8 * u32::from(how >> 1 & 7) + 8);
    }

    /// Until nothing moves.
    fn settle(&mut self) {
        let (mut idle, mut turns) = (0, 0);
        while idle < 130 {
            assert!(turns < 100_000, "the engine never comes to rest");
            turns += 1;
            idle = if self.e.poll() > 0 { 0 } else { idle + 1 };
        }
        self.poll(0);
    }

    /// All is over.
    fn end(mut self) {
        self.settle();
        self.check();
        for how in [12, 1, 0, 13] {
            self.probe(how);
        }
        self.check();
        let [a, b] = &mut self.guests;
        a.check_secret(b.marker());
        b.check_secret(a.marker());
        // The first goes: the other's probe is told, and nothing else of it changes.
        let Self { mut e, guests, .. } = self;
        let [first, mut second] = guests;
        e.remove_user(first.id);
        first.alone();
        for _ in 0..130 {
            e.poll();
        }
        second.drain(&e);
        second.check();
        let fatal = &second.mem.window().events.qp_fatal;
        let probe = (second.probe.handle & 0xffff) as usize;
        assert!(fatal[probe / 64].load(Ordering::Relaxed) & 1 << (probe % 64) != 0);
        e.remove_user(second.id);
        second.alone();
        assert_eq!(e.held(), 0, "something of the users is left");
    }
}
