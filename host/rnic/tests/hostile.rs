//! A user that writes whatever it likes into everything it can reach, next to users that mind their own
//! business: their messages stay right, their memory stays theirs, the device goes on.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use hyv_abi::control::{
    AllocMw, CreateAh, CreateCq, CreateQp, CreateSrq, ModifyQp, ModifySrq, QueryCounters, RegMr,
    ReregMr, ResizeCq,
};
use hyv_abi::doorbell::Doorbells;
use hyv_rnic::Engine;

const CAP: Cap = Cap {
    sq_log2: 4,
    rq_log2: 4,
    stride: 64,
    sig_all: false,
    ty: QpType::Rc,
    srq: u32::MAX,
};

/// Two honest users with a connection, and one of them serves the hostile one too.
struct World {
    e: Engine,
    clock: Clock,
    a: Side,
    b: Side,
    /// `a`'s QP that the hostile user is connected to, in a PD of its own with one open page.
    door: Qp,
    door_cq: Cq,
    open: Mr,
    h: Hostile,
    secrets: [Vec<u8>; 2],
    messages: u64,
}

struct Hostile {
    side: Side,
    qps: Vec<Qp>,
    mrs: Vec<Mr>,
    /// Keys and addresses that it heard of.
    keys: Vec<u32>,
    addrs: Vec<u64>,
}

const SECRET: u64 = 16 << 10;
const DATA: u64 = 64 << 10;

impl World {
    fn new(rng: &mut Rng) -> Self {
        let (mut e, clock) = engine();
        let mut a = Side::new(&mut e, 256 << 10, CAP);
        let b = Side::new(&mut e, 256 << 10, CAP);
        // The connection under test never times out: it must not need to.
        let c = Conn {
            timeout: 0,
            ..Conn::default()
        };
        connect(&mut e, &a.qp, &b.qp, &c);
        let secrets = [rng.bytes(SECRET as usize), rng.bytes(SECRET as usize)];
        a.fill(0, &secrets[0]);
        b.fill(0, &secrets[1]);
        let pd = a.user.pd(&mut e);
        let open = a.user.mr(&mut e, pd, 4096, FULL);
        let door_cq = a.user.cq(&mut e, 10);
        let door = a.user.qp(&mut e, pd, &door_cq, &door_cq, CAP);
        let mut side = Side::new(&mut e, 256 << 10, CAP);
        let mut qps = Vec::new();
        let mut mrs = vec![side.mr];
        for i in 0..6 {
            if i % 2 == 0 {
                side.scq = side.user.cq(&mut e, 3 + i);
            }
            qps.push(side.extra_qp(&mut e, CAP));
            let at = side.mr.offset + 4096 * u64::from(i);
            let access = [FULL, Access::LOCAL_WRITE, Access::empty()][i as usize % 3];
            mrs.push(side.user.mr_at(&mut e, side.pd, at, 5000, access));
        }
        let keys = vec![open.rkey, a.mr.rkey, b.mr.rkey, side.mr.lkey, 0, u32::MAX];
        let addrs = vec![
            open.iova,
            a.mr.iova,
            b.mr.iova,
            side.mr.iova,
            IOVA,
            0,
            u64::MAX,
        ];
        let h = Hostile {
            side,
            qps,
            mrs,
            keys,
            addrs,
        };
        let mut w = Self {
            e,
            clock,
            a,
            b,
            door,
            door_cq,
            open,
            h,
            secrets,
            messages: 0,
        };
        for i in 0..6 {
            w.reconnect(i);
        }
        w
    }

    /// Its QPs: to the door, to each other, to itself, to somebody who does not want it, to nobody.
    fn reconnect(&mut self, i: usize) {
        let c = Conn {
            rnr_retry: 1,
            retry_cnt: 1,
            timeout: 1,
            ..Conn::default()
        };
        let peer = match i {
            0 => self.door.qpn,
            1 => self.h.qps[2].qpn,
            2 => self.h.qps[1].qpn,
            3 => self.h.qps[3].qpn,
            4 => self.b.qp.qpn,
            _ => 0x12_3456,
        };
        let q = &mut self.h.qps[i];
        if self.e.query_qp(q.owner, q.handle).is_err() {
            return;
        }
        q.reset(&mut self.e);
        q.connect(&mut self.e, peer, &c);
        if i == 0 {
            self.open_door();
        }
    }

    /// What a good server does when a client's connection broke.
    fn open_door(&mut self) {
        self.door.reset(&mut self.e);
        self.door
            .connect(&mut self.e, self.h.qps[0].qpn, &Conn::default());
        for i in 0..8 {
            self.door.post_recv(i, &[self.open.sge(512 * i, 512)]);
        }
    }

    /// One exchange of the honest users, checked to the byte.
    fn honest(&mut self, rng: &mut Rng) {
        self.messages += 1;
        let n = [0, 8, 32, 33, 500, 4096, 40_000][rng.below(7) as usize];
        let data = rng.bytes(n as usize);
        let (out, back) = (rng.below(2) == 0, rng.below(2) == 0);
        let (x, y) = if out {
            (&mut self.a, &mut self.b)
        } else {
            (&mut self.b, &mut self.a)
        };
        x.fill(DATA, &data);
        y.fill(DATA, &vec![0x5a; n as usize + 64]);
        let sge = y.mr.sge(DATA, n);
        let id = self.messages;
        if back {
            y.qp.post_recv(id, &[sge]);
            x.qp.post(&Wr::new(WrOpcode::Send, id).sge(x.mr.sge(DATA, n)));
        } else {
            x.qp.post(
                &Wr::new(WrOpcode::Write, id)
                    .sge(x.mr.sge(DATA, n))
                    .to(&y.mr, DATA),
            );
        }
        let mut turns = 0;
        let done = loop {
            self.e.poll();
            if let Some(c) = x.scq.poll() {
                break c;
            }
            turns += 1;
            assert!(turns < 10_000, "the honest users' message {id} is stuck");
        };
        assert_eq!((done.wr_id, done.status), (id, 0));
        let got = if back {
            let r = y.rcq.one();
            assert_eq!((r.wr_id, r.status, r.byte_len), (id, 0, n));
            received(&y.user.ram, &r, &[sge], IOVA)
        } else {
            y.data(DATA, u64::from(n))
        };
        assert!(got == data, "message {id} of {n} bytes arrived changed");
        assert_eq!(y.data(DATA + u64::from(n), 64), [0x5a; 64], "message {id}");
    }

    fn check_secrets(&self) {
        assert!(
            self.a.data(0, SECRET) == self.secrets[0],
            "a's memory changed"
        );
        assert!(
            self.b.data(0, SECRET) == self.secrets[1],
            "b's memory changed"
        );
        assert_eq!(self.a.qp.state(&self.e), QpState::Rts);
        assert_eq!(self.b.qp.state(&self.e), QpState::Rts);
        assert_eq!(pending(&self.b.user.ram), 0, "b had nothing to do with it");
    }

    fn serve(&mut self) {
        self.door_cq.drain();
        if self.door.state(&self.e) == QpState::Err {
            self.open_door();
        }
        let door = self.door.index();
        let mine = summary::QP_FATAL | summary::QP_ACCESS_ERROR | summary::QP_REQUEST_ERROR;
        let kinds = pending(&self.a.user.ram);
        assert_eq!(kinds & !mine, 0, "events of a's other objects");
        for kind in [
            summary::QP_FATAL,
            summary::QP_ACCESS_ERROR,
            summary::QP_REQUEST_ERROR,
        ] {
            if kinds & kind != 0 {
                assert!(
                    event(&self.a.user.ram, kind, door),
                    "an event of another QP"
                );
            }
        }
    }
}

impl Hostile {
    fn sge(&self, rng: &mut Rng) -> Sge {
        let m = rng.pick(&self.mrs);
        match rng.below(4) {
            0 => Sge {
                addr: rng
                    .pick(&self.addrs)
                    .wrapping_add(rng.below(9000))
                    .wrapping_sub(4000),
                len: rng.next() as u32 >> rng.below(32),
                lkey: rng.pick(&self.keys),
            },
            1 => Sge {
                addr: rng.next(),
                len: rng.next() as u32,
                lkey: rng.next() as u32,
            },
            _ => m.sge(rng.below(1000), rng.below(4000) as u32),
        }
    }

    /// A work request that is half sensible, and sometimes spoilt.
    fn slots(&self, rng: &mut Rng) -> Vec<[u64; 7]> {
        let mut wr = Wr::new(WrOpcode::Send, rng.next());
        wr.op = rng.below(11) as u8;
        wr.flags = rng.next() as u8 & 0x17;
        (wr.compare, wr.operand, wr.imm) = (rng.next(), rng.next(), rng.next() as u32);
        wr.remote = rng
            .pick(&self.addrs)
            .wrapping_add(rng.below(6000))
            .wrapping_sub(500);
        wr.rkey = rng.pick(&self.keys);
        if wr.op >= 7 && rng.below(2) == 0 {
            // A key to invalidate, or one to bind anew with the next low byte.
            wr.imm = if wr.op == 8 { wr.rkey ^ 1 } else { wr.rkey };
            wr.remote = rng.below(32);
        }
        if rng.below(3) == 0 {
            let n = rng.below(417) as usize;
            wr = wr.inline(&rng.bytes(n));
        } else {
            wr.sges = (0..rng.below(17)).map(|_| self.sge(rng)).collect();
        }
        if wr.op == 5 || wr.op == 6 {
            wr.sges = vec![self.mrs[0].sge(8 * rng.below(100), 8)];
            wr.inline = None;
            wr.remote &= !7;
        }
        let mut slots = wr.slots();
        if rng.below(3) == 0 {
            let (i, k) = (
                rng.below(slots.len() as u64) as usize,
                rng.below(7) as usize,
            );
            slots[i][k] ^= 1 << rng.below(64);
        }
        slots
    }

    /// Words that make a difference more often than others.
    fn scribble(&self, rng: &mut Rng) {
        let ram = &self.side.user.ram;
        let value = match rng.below(4) {
            0 => rng.next(),
            1 => rng.below(64),
            2 => u64::MAX,
            _ => rng.below(32) | rng.next() << 32,
        };
        let q = &self.qps[rng.below(6) as usize];
        let at = match rng.below(6) {
            0 => 8 * rng.below(ram.len / 8),
            1 => q.sq + 8 * rng.below(128),
            2 => q.rq + 8 * rng.below(128),
            3 => self.side.scq.ring + 8 * rng.below(64),
            4 => self.side.rcq.ctrl + 8 * rng.below(2),
            _ => self.side.scq.ctrl + 8 * rng.below(2),
        };
        ram.word(at).store(value, Ordering::Relaxed);
        let window = size_of::<Window>() as u64 / 8;
        let bells = size_of::<Doorbells>() as u64 / 8;
        let word = match rng.below(3) {
            0 => rng.below(window),
            1 => 0x5000 / 8 + rng.below(bells),
            // The summary, the flag, the first QPs' words.
            _ => 0x5000 / 8 + rng.pick(&[0, 1, 2, 3, 8, 512, 1024]),
        };
        ram.window_word(word as usize)
            .store(value, Ordering::Relaxed);
    }
}

impl World {
    fn verb(&mut self, rng: &mut Rng) {
        let id = self.h.side.user.id;
        let handle = |rng: &mut Rng, h: &Hostile| match rng.below(4) {
            0 => rng.next() as u32,
            1 => rng.below(8) as u32 | 0x1_0000,
            2 => h.side.pd,
            _ => h.qps[rng.below(6) as usize].handle,
        };
        let some = handle(rng, &self.h);
        match rng.below(17) {
            0 => {
                let _ = self.e.alloc_pd(id);
            }
            1 => {
                let _ = self.e.dealloc_pd(id, some);
            }
            2 => {
                let req = RegMr {
                    pd: self.h.side.pd,
                    access: rng.next() as u32 & 0x1f | 1,
                    iova: rng.pick(&self.h.addrs),
                    ram_offset: rng.next() >> rng.below(64),
                    len: rng.next() >> rng.below(64),
                };
                if let Ok(m) = self.e.reg_mr(id, &req) {
                    self.h.keys.push(m.rkey);
                    self.h.keys.truncate(32);
                }
            }
            3 => {
                let h = rng.below(12) as u32 | 0x1_0000;
                let _ = self
                    .e
                    .dereg_mr(id, if rng.below(2) == 0 { h } else { some });
            }
            4 => {
                let req = CreateCq {
                    ring: 64 * rng.below(8192),
                    ctrl: 64 * rng.below(8192),
                    log2: rng.below(17) as u32,
                    reserved: 0,
                };
                let _ = self.e.create_cq(id, &req);
            }
            5 => {
                let _ = self.e.destroy_cq(id, some);
            }
            6 => {
                // Rings that overlap with others and with themselves.
                let req = CreateQp {
                    pd: self.h.side.pd,
                    qp_type: rng.pick(&[2, 2, 3, 4]),
                    send_cq: self.h.side.scq.handle,
                    recv_cq: self.h.side.rcq.handle,
                    srq: rng.pick(&[u32::MAX, u32::MAX, 0x1_0000, 0x1_0001]),
                    sig_all: 1,
                    sq_ring: 64 * rng.below(4096),
                    rq_ring: 64 * rng.below(4096),
                    sq_log2: rng.below(8) as u32,
                    rq_log2: rng.below(8) as u32,
                    rq_stride: 32 << rng.below(4),
                    reserved: 0,
                };
                if let Ok(r) = self.e.create_qp(id, &req) {
                    let mut q = self.spare();
                    (q.handle, q.qpn) = (r.handle, r.qpn);
                    q.cap.ty = QpType::from_u32(req.qp_type).expect("a type");
                    q.connect(&mut self.e, r.qpn, &Conn::default());
                    if rng.below(2) == 0 {
                        self.e.destroy_qp(id, r.handle).expect("its own");
                    }
                }
            }
            7 => {
                let mut a = attr();
                let state = rng.below(8) as u32;
                (a.state, a.access, a.dest_qp_num) = (state, rng.next() as u32, self.b.qp.qpn);
                (a.path_mtu, a.port_num) = (1024, 1);
                let masks = [M::STATE.bits(), INIT.bits(), RTR.bits(), RTS.bits()];
                let mask = if rng.below(2) == 0 {
                    rng.pick(&masks)
                } else {
                    rng.next() as u32
                };
                let _ = self.e.modify_qp(
                    id,
                    &ModifyQp {
                        qp: some,
                        mask,
                        attr: a,
                    },
                );
            }
            8 => {
                let req = CreateSrq {
                    pd: self.h.side.pd,
                    log2: rng.below(9) as u32,
                    ring: 64 * rng.below(8192),
                    ctrl: 64 * rng.below(8192),
                    stride: 32 << rng.below(4),
                    reserved: 0,
                };
                let _ = self.e.create_srq(id, &req);
            }
            9 => {
                let srq = rng.below(4) as u32 | 0x1_0000;
                let limit = rng.below(64) as u32;
                let _ = self.e.modify_srq(id, &ModifySrq { srq, limit });
                let _ = self.e.query_srq(id, srq);
                if rng.below(4) == 0 {
                    let _ = self.e.destroy_srq(id, srq);
                }
            }
            10 => {
                let pd = self.h.side.pd;
                if let Ok(m) = self.e.alloc_mw(id, &AllocMw { pd, mw_type: 2 }) {
                    self.h.keys.insert(6, m.rkey);
                    self.h.keys.truncate(32);
                }
            }
            11 => {
                let _ = self.e.dealloc_mw(id, rng.below(8) as u32 | 0x1_0000);
            }
            12 => {
                let req = ReregMr {
                    mr: rng.below(12) as u32 | 0x1_0000,
                    flags: rng.below(9) as u32,
                    pd: self.h.side.pd,
                    access: rng.next() as u32 & 0x1f | 1,
                    iova: rng.pick(&self.h.addrs),
                    ram_offset: rng.next() >> rng.below(64),
                    len: rng.next() >> rng.below(64),
                };
                if let Ok(m) = self.e.rereg_mr(id, &req) {
                    self.h.keys.insert(6, m.rkey);
                    self.h.keys.truncate(32);
                }
            }
            13 => {
                let cq = rng.pick(&[self.h.side.scq.handle, self.h.side.rcq.handle, some]);
                let req = ResizeCq {
                    cq,
                    log2: rng.below(9) as u32,
                    ring: 64 * rng.below(8192),
                };
                let _ = self.e.resize_cq(id, &req);
            }
            14 => {
                let req = CreateAh {
                    pd: self.h.side.pd,
                    port_num: 1,
                    dest_gid: rng.pick(&[GID, [0; 16], [1; 16]]),
                    sgid_index: rng.below(2) as u32,
                    traffic_class: rng.below(300) as u32,
                    hop_limit: rng.below(300) as u32,
                    flow_label: rng.next() as u32 >> rng.below(32),
                };
                let _ = self.e.create_ah(id, &req);
                let _ = self.e.destroy_ah(id, rng.below(4) as u32 | 0x1_0000);
            }
            15 => {
                let req = QueryCounters {
                    scope: rng.below(4) as u32,
                    handle: some,
                };
                let _ = self.e.query_counters(id, &req);
            }
            _ => {
                let _ = self.e.query_qp(id, some);
                self.e.fail_qpn(id, self.a.qp.qpn);
                self.e.fail_qpn(id, self.b.qp.qpn);
            }
        }
    }

    fn spare(&self) -> Qp {
        let q = &self.h.qps[5];
        Qp::named(q.owner, &self.h.side.user.ram, q.sq, q.rq, CAP)
    }

    fn attack(&mut self, rng: &mut Rng) {
        let i = rng.below(6) as usize;
        match rng.below(10) {
            0..=3 => {
                let slots = self.h.slots(rng);
                self.h.qps[i].post_slots(&slots);
                let _ = self.h.qps[i].ring();
            }
            4 => {
                let sges: Vec<Sge> = (0..rng.below(4)).map(|_| self.h.sge(rng)).collect();
                self.h.qps[i].post_recv(rng.next(), &sges);
            }
            5 | 6 => {
                for _ in 0..rng.below(10) {
                    self.h.scribble(rng);
                }
            }
            7 => {
                let ram = &self.h.side.user.ram;
                let n = rng.below(20_000);
                let at = rng.below(ram.len - n);
                ram.write(at, &rng.bytes(n as usize));
            }
            8 => self.verb(rng),
            _ => self.clock.advance(rng.below(1 << 24)),
        }
        if rng.below(4) == 0 {
            let q = &self.h.qps[i];
            let lost = self
                .e
                .query_qp(q.owner, q.handle)
                .is_ok_and(|a| a.state != 3);
            if lost || rng.below(8) == 0 {
                self.reconnect(i);
            }
        }
        self.h.side.scq.publish();
    }
}

fn run(seed: u64, rounds: u64) {
    println!("seed {seed:#x}");
    let mut rng = Rng(seed);
    let mut w = World::new(&mut rng);
    for _ in 0..rounds {
        for _ in 0..rng.below(12) {
            w.attack(&mut rng);
            if rng.below(3) == 0 {
                w.e.poll();
            }
        }
        w.serve();
        w.honest(&mut rng);
        w.check_secrets();
        if rng.below(50) == 0 && w.e.doze() {
            w.e.wake_up();
            w.e.tick();
        }
    }
    let c = w.e.counters();
    assert!(
        c.work_requests > w.messages && c.errors > rounds / 20,
        "an attack at all: {c:?}"
    );
    // It goes; the others stay.
    w.e.remove_user(w.h.side.user.id);
    for _ in 0..50 {
        w.serve();
        w.honest(&mut rng);
        w.check_secrets();
    }
}

/// A new seed at every run; `HYV_SEED` repeats one.
fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::env::var("HYV_SEED").ok().map_or_else(
        || {
            std::collections::hash_map::RandomState::new()
                .build_hasher()
                .finish()
        },
        |s| {
            let s = s.trim_start_matches("0x");
            u64::from_str_radix(s, 16).expect("HYV_SEED is a hexadecimal number")
        },
    )
}

#[test]
fn garbage_in_rings_windows_and_verbs() {
    for s in [1, 2, 3, 4] {
        run(s, 1_500);
    }
    run(seed(), 3_000);
}

/// The same from another thread, at any instant.
#[test]
fn garbage_while_the_engine_looks() {
    let seed = seed();
    println!("seed {seed:#x}");
    let mut rng = Rng(seed);
    let mut w = World::new(&mut rng);
    let stop = AtomicBool::new(false);
    let until = Instant::now() + Duration::from_millis(1_500);
    let twin = Hostile {
        side: Side {
            user: User::twin(&w.h.side.user),
            scq: Cq::named(&w.h.side.user.ram, w.h.side.scq.ring, w.h.side.scq.ctrl),
            rcq: Cq::named(&w.h.side.user.ram, w.h.side.rcq.ring, w.h.side.rcq.ctrl),
            qp: w.spare(),
            ..Side::new(&mut w.e, 4096, CAP)
        },
        qps: w
            .h
            .qps
            .iter()
            .map(|q| Qp::named(q.owner, &w.h.side.user.ram, q.sq, q.rq, CAP))
            .collect(),
        mrs: w.h.mrs.clone(),
        keys: w.h.keys.clone(),
        addrs: w.h.addrs.clone(),
    };
    std::thread::scope(|s| {
        let (twin, stop) = (&twin, &stop);
        s.spawn(move || {
            let mut rng = Rng(seed ^ 0xffff);
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..100 {
                    twin.scribble(&mut rng);
                }
            }
        });
        let _stop = StopOnDrop(stop);
        while Instant::now() < until {
            for _ in 0..rng.below(6) {
                w.attack(&mut rng);
                w.e.poll();
            }
            w.serve();
            w.honest(&mut rng);
            w.check_secrets();
        }
    });
    assert!(w.messages > 100, "{} messages only", w.messages);
}

/// Ends the other thread also when an assertion fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
