//! Random programs leave the same behind on every carrier: completions with all their fields, memory, states and events. What one
//! device does from memory to memory is the measure.

use std::collections::HashMap;

use crate::common::*;
use crate::fabric::{Link, On, patient};
use hyv_abi::queue::Cqe;

/// A quarter of each region: what the peer reaches, what is sent, where answers land, where messages land.
const PART: u64 = 96 << 10;
const LEN: u64 = 4 * PART;
const CAP: Cap = Cap {
    sq_log2: 7,
    rq_log2: 5,
    stride: 64,
    sig_all: false,
    ty: QpType::Rc,
    srq: u32::MAX,
};
/// The last request of each side.
const LAST: u64 = u64::MAX;

/// One user's part of the program.
struct Player {
    posted: u64,
    received: u64,
    slots: u32,
    next_id: u64,
    is_done: bool,
    /// Where the receives of each number go.
    buffers: Vec<Vec<Sge>>,
    /// The local pieces of each request.
    pieces: HashMap<u64, Vec<Sge>>,
    /// Bytes of the third quarter in which answers land: each has its own place, for some come in the completion, and so into
    /// memory when that is polled.
    landed: u64,
    /// What follows must wait for a READ: it may change what that reads (IBA 1.4, table 79).
    must_wait: bool,
}

impl Player {
    fn new() -> Self {
        Self {
            posted: 0,
            received: 0,
            slots: 0,
            next_id: 1,
            is_done: false,
            buffers: Vec::new(),
            pieces: HashMap::new(),
            landed: 0,
            must_wait: false,
        }
    }

    fn recv(&mut self, side: &mut Side, rng: &mut Rng) {
        if self.posted - self.received == 32 {
            return;
        }
        let n = 1 + rng.below(3);
        let each = PART / n;
        let sges: Vec<Sge> = (0..n)
            .map(|i| side.mr.sge(3 * PART + i * each, each as u32))
            .collect();
        side.qp.post_recv(self.posted, &sges);
        self.buffers.push(sges);
        self.posted += 1;
    }

    fn send(&mut self, side: &mut Side, peer: &Mr, rng: &mut Rng) {
        use WrOpcode::{CmpSwp, FetchAdd, Read, Send, SendImm, Write, WriteImm};
        let mut op = rng.pick(&[Send, SendImm, Write, WriteImm, Read, FetchAdd, CmpSwp]);
        if self.landed > PART - 10_000 {
            op = rng.pick(&[Send, SendImm, Write, WriteImm]);
        }
        let atomic = matches!(op, FetchAdd | CmpSwp);
        let len = match rng.below(4) {
            _ if atomic => 8,
            0 => rng.below(70),
            1 => 1024 * rng.below(5) + rng.below(3),
            2 => rng.below(5_000),
            _ if op == Read => rng.below(10_000),
            _ => rng.below(PART / 2),
        };
        let at = if atomic {
            8 * rng.below(PART / 8)
        } else {
            rng.below(PART - len + 1)
        };
        let mut wr = Wr::new(op, self.next_id).to(peer, at);
        wr.imm = rng.next() as u32;
        if std::mem::replace(&mut self.must_wait, op == Read) {
            wr = wr.with(flags::FENCE);
        }
        let inline = len <= 200 && !atomic && op != Read && rng.below(2) == 0;
        if inline {
            wr = wr.inline(&rng.bytes(len as usize));
        } else {
            let answered = atomic || op == Read;
            let n = if atomic { 1 } else { 1 + rng.below(4) };
            let mut left = len;
            for i in 0..n {
                let part = if i + 1 == n {
                    left
                } else {
                    rng.below(left + 1)
                };
                left -= part;
                let at = if answered {
                    self.landed += part;
                    2 * PART + self.landed - part
                } else {
                    PART + rng.below(PART - part + 1)
                };
                wr = wr.sge(side.mr.sge(at, part as u32));
            }
        }
        wr = wr.atomic(rng.below(3), rng.next());
        for flag in [flags::FENCE, flags::SOLICITED] {
            if rng.below(4) == 0 {
                wr = wr.with(flag);
            }
        }
        if rng.below(3) == 0 {
            wr = wr.unsignaled();
        }
        self.post(side, &wr);
    }

    fn post(&mut self, side: &mut Side, wr: &Wr) {
        self.next_id += 1;
        self.pieces.insert(wr.wr_id, wr.sges.clone());
        self.slots += wr.slots().len() as u32;
        side.qp.post(wr);
    }

    /// Takes completions down, payload in them to where the library would put it.
    fn take(&mut self, who: char, side: &mut Side, trace: &mut Vec<String>) {
        for c in side.scq.drain() {
            self.is_done |= c.wr_id == LAST || c.status != 0;
            if c.status == 0 && c.flags & cqe_flags::DATA != 0 {
                let data = cqe_data(&c, c.byte_len as usize);
                scatter(side, &self.pieces[&c.wr_id], &data);
            }
            trace.push(format!("{who} send {}", line(&c)));
        }
        for c in side.rcq.drain() {
            if c.status == 0 && c.flags & cqe_flags::DATA != 0 {
                let data = cqe_data(&c, c.byte_len as usize);
                scatter(side, &self.buffers[c.wr_id as usize], &data);
            }
            self.received += 1;
            trace.push(format!("{who} recv {}", line(&c)));
        }
    }
}

fn scatter(side: &Side, sges: &[Sge], mut data: &[u8]) {
    for s in sges {
        let n = data.len().min(s.len as usize);
        side.user.ram.write(s.addr - IOVA, &data[..n]);
        data = &data[n..];
    }
}

/// All fields but those that name the device's own numbers. Of a failed request only number, QP and status mean anything (IBA 1.4,
/// 11.4.2.1).
fn line(c: &Cqe) -> String {
    let place = (c.wr_id, c.wqe, c.qp);
    if c.status != 0 {
        return format!("{place:?} {:?}", status(c));
    }
    format!(
        "{place:?} opcode {} len {} imm {:x} flags {:x} syndrome {}",
        c.opcode,
        c.byte_len,
        c.imm,
        c.flags & !cqe_flags::DATA,
        c.syndrome
    )
}

/// Ways for a program to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Well,
    RemoteKey,
    RemoteBounds,
    Unaligned,
    LocalKey,
    TooLong,
    ReceiveKey,
    OwnError,
    PeerError,
    PeerDestroyed,
}

const ENDS: [End; 10] = [
    End::Well,
    End::RemoteKey,
    End::RemoteBounds,
    End::Unaligned,
    End::LocalKey,
    End::TooLong,
    End::ReceiveKey,
    End::OwnError,
    End::PeerError,
    End::PeerDestroyed,
];

fn program(on: On, seed: u64, end: End) -> Vec<String> {
    let mut rng = Rng(seed);
    let mtu = 256u32 << rng.below(5);
    let conn = Conn {
        mtu,
        rd_atomic: 1 + rng.below(16) as u32,
        retry_cnt: 2,
        ..patient()
    };
    let mut p = Link::with(on, LEN, CAP, &conn);
    for s in [&p.a, &p.b] {
        s.fill(0, &rng.bytes(LEN as usize));
    }
    let mut trace = Vec::new();
    let (mut a, mut b) = (Player::new(), Player::new());
    let (ma, mb) = (p.a.mr, p.b.mr);
    for _ in 0..rng.below(120) {
        match rng.below(8) {
            0 | 1 => a.recv(&mut p.a, &mut rng),
            2 | 3 => b.recv(&mut p.b, &mut rng),
            4 | 5 if a.slots < 100 => a.send(&mut p.a, &mb, &mut rng),
            6 if b.slots < 100 => b.send(&mut p.b, &ma, &mut rng),
            _ => {
                p.f.pass(2_000_000);
                a.take('a', &mut p.a, &mut trace);
                b.take('b', &mut p.b, &mut trace);
            }
        }
    }
    // All of it comes to its end, with as many receives as it takes.
    for (s, player, peer) in [(&mut p.a, &mut a, &mb), (&mut p.b, &mut b, &ma)] {
        let last = Wr::new(WrOpcode::Write, LAST).to(peer, 0);
        player.post(s, &last.with(flags::FENCE));
    }
    let mut rounds = 0;
    while !(a.is_done && b.is_done) {
        rounds += 1;
        assert!(rounds < 500, "{on:?}: it never ends");
        a.recv(&mut p.a, &mut rng);
        b.recv(&mut p.b, &mut rng);
        p.f.pass(2_000_000);
        a.take('a', &mut p.a, &mut trace);
        b.take('b', &mut p.b, &mut trace);
    }
    finish(&mut p, &mut a, end, &mut rng);
    p.f.pass(2_000_000);
    for _ in 0..4 {
        p.f.pass(100_000_000);
    }
    a.take('a', &mut p.a, &mut trace);
    b.take('b', &mut p.b, &mut trace);
    // Each queue has its order; between queues there is none.
    trace.sort_by_key(|l| l[..6].to_owned());
    let destroyed = end == End::PeerDestroyed;
    for (who, s, e) in [('a', &p.a, p.f.ra()), ('b', &p.b, p.f.rb())] {
        if who == 'a' || !destroyed {
            trace.push(format!("{who} {:?}", s.qp.state(e)));
        }
        let ev = &s.user.ram.window().events;
        let of = |words: &[std::sync::atomic::AtomicU64]| {
            let i = s.qp.index();
            words[i / 64].load(std::sync::atomic::Ordering::SeqCst) >> (i % 64) & 1
        };
        trace.push(format!(
            "{who} kinds {:x}, fatal {} request {} access {} established {} last {}",
            pending(&s.user.ram),
            of(&ev.qp_fatal),
            of(&ev.qp_request_error),
            of(&ev.qp_access_error),
            of(&ev.qp_comm_established),
            of(&ev.qp_last_wqe),
        ));
        // What a READ or receive that fails leaves where it was to land is undefined.
        let known = match (who, end) {
            (_, End::Well) => LEN,
            ('a', _) => 2 * PART,
            _ => 3 * PART,
        };
        for (i, part) in s.data(0, known).chunks(1024).enumerate() {
            trace.push(format!("{who} memory {i} {:x}", digest(part)));
        }
    }
    trace
}

/// The one thing that goes wrong, with good requests around it.
fn finish(p: &mut Link, a: &mut Player, end: End, rng: &mut Rng) {
    let (ma, mb) = (p.a.mr, p.b.mr);
    let len = rng.pick(&[8u32, 33, 5_000, 60_000]);
    let write = |id: u64| {
        Wr::new(WrOpcode::Write, id)
            .inline(&[id as u8; 9])
            .to(&mb, 0)
    };
    let mut wr = Wr::new(rng.pick(&[WrOpcode::Write, WrOpcode::Read]), 500)
        .sge(ma.sge(2 * PART, len))
        .to(&mb, 0);
    match end {
        End::Well => {}
        End::RemoteKey => wr.rkey ^= 1,
        End::RemoteBounds => wr.remote = mb.iova + LEN - u64::from(len) + 1,
        End::Unaligned => {
            wr = Wr::new(WrOpcode::FetchAdd, 500)
                .sge(ma.sge(2 * PART, 8))
                .to(&mb, 4);
        }
        End::LocalKey => wr.sges[0].lkey ^= 1,
        End::TooLong | End::ReceiveKey => {
            // Behind what is posted already, which good messages take.
            let mut sge = mb.sge(3 * PART, len);
            match end {
                End::TooLong => sge.len -= 1,
                _ => sge.lkey ^= 1,
            }
            let had = p.b.qp.rq_tail;
            let mut left = 0;
            while left < 32 && p.b.rcq.head.wrapping_add(left) != had {
                p.a.qp.post(&Wr::new(WrOpcode::Send, 400).inline(b"take"));
                p.pump();
                left += 1;
            }
            p.b.qp.post_recv(0, &[sge]);
            p.b.qp.post_recv(0, &[]);
            wr.op = WrOpcode::Send as u8;
        }
        End::OwnError => p.a.qp.go(p.f.a(), QpState::Err).expect("ERR"),
        End::PeerError => p.b.qp.go(p.f.b(), QpState::Err).expect("ERR"),
        End::PeerDestroyed => {
            p.f.b()
                .destroy_qp(p.b.user.id, p.b.qp.handle)
                .expect("destroy_qp")
        }
    }
    let behind = write(501).unsignaled().with(flags::FENCE);
    for wr in [write(499), wr, behind, write(502)] {
        a.post(&mut p.a, &wr);
    }
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn programs_end_alike(on: On) {
    let seeds = if on == On::Network { 120 } else { 40 };
    for seed in 0..seeds {
        let end = ENDS[seed as usize % ENDS.len()];
        println!("seed {seed}, {end:?}");
        let want = program(On::Memory, seed, end);
        let got = program(on, seed, end);
        if let Some(i) = (0..want.len().max(got.len())).find(|&i| want.get(i) != got.get(i)) {
            let from = i.saturating_sub(3);
            panic!(
                "seed {seed}, {end:?}: line {i} on {on:?} is {:?}, in memory {:?}; before it {:#?}",
                got.get(i),
                want.get(i),
                &want[from..i]
            );
        }
    }
}

on_every_carrier! {
    programs_end_alike
}
