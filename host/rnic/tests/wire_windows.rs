//! Memory windows, invalidation and shared receive queues between two hosts.

mod common;

use common::net::*;
use common::*;
use hyv_abi::control::AllocMw;

const LEN: u64 = 1 << 20;
const REMOTE: Access = Access::REMOTE_READ
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_ATOMIC);

/// Answers that are lost are missed soon.
fn path() -> Path {
    Path {
        conn: Conn {
            timeout: 5,
            ..Conn::default()
        },
        ..Path::default()
    }
}

/// Until everything has come through, however often it was lost.
fn settle(p: &mut WirePair) {
    p.run(2_000_000);
}

/// A connection; B has a region that only windows open, and one window.
struct Rig {
    p: WirePair,
    mr: Mr,
    key: u32,
}

impl Rig {
    fn new(seed: u64, faults: Faults) -> Self {
        let cap = Cap {
            sq_log2: 8,
            rq_log2: 8,
            ..Cap::default()
        };
        let mut p = WirePair::with(LEN, cap, &path(), seed, faults);
        let access = Access::LOCAL_WRITE | Access::MW_BIND;
        // The same bytes as B's region, under another key.
        let mr =
            p.b.user
                .mr_at(&mut p.eb, p.b.pd, p.b.mr.offset, LEN, access);
        let req = AllocMw {
            pd: p.b.pd,
            mw_type: 2,
        };
        let mw = p.eb.alloc_mw(p.b.user.id, &req).expect("alloc_mw");
        Self {
            p,
            mr,
            key: mw.rkey,
        }
    }

    fn bind(&mut self, at: u64, len: u64) {
        let new = self.key & !0xff | (self.key + 1) & 0xff;
        self.p
            .b
            .qp
            .post(&Wr::bind(1, self.key, new, REMOTE, &self.mr, at, len));
        settle(&mut self.p);
        assert_eq!(status(&self.p.b.scq.one()), WcStatus::Success);
        self.key = new;
    }

    fn reach(&mut self, op: WrOpcode, at: u64, len: u32) -> WcStatus {
        let wr = Wr::new(op, 2).sge(self.p.a.mr.sge(0, len));
        self.p.a.qp.post(&wr.remote(self.mr.iova + at, self.key));
        settle(&mut self.p);
        status(&self.p.a.scq.one())
    }
}

#[test]
fn send_with_invalidate_takes_the_key_away_whatever_is_lost() {
    for seed in 0..8 {
        let faults = Faults {
            loss: seed,
            double: 5,
            reorder: 5,
            ..Faults::default()
        };
        let mut r = Rig::new(seed, faults);
        let mut rng = Rng(seed + 100);
        for i in 0..20u32 {
            r.bind(64, 128);
            let len = [0, 8, 33, 3000][rng.next() as usize % 4];
            let data = rng.bytes(len);
            r.p.a.fill(0, &data);
            let sge = r.p.b.mr.sge(8192, 4096);
            r.p.b.qp.post_recv(u64::from(i), &[sge]);
            let wr = Wr::new(WrOpcode::SendInv, 6).imm(r.key);
            r.p.a.qp.post(&wr.sge(r.p.a.mr.sge(0, len as u32)));
            settle(&mut r.p);
            assert_eq!(status(&r.p.a.scq.one()), WcStatus::Success, "seed {seed}");
            let c = r.p.b.rcq.one();
            assert_eq!((status(&c), c.imm), (WcStatus::Success, r.key));
            assert_eq!(c.flags & !cqe_flags::DATA, cqe_flags::WITH_INV);
            assert_eq!(received(&r.p.b.user.ram, &c, &[sge], IOVA), data);
        }
        let s = r.reach(WrOpcode::Read, 64, 8);
        assert_eq!(s, WcStatus::RemAccessErr, "seed {seed}");
        let (id, h) = (r.p.b.user.id, r.mr.handle);
        r.p.eb.dereg_mr(id, h).expect("no window is bound");
    }
}

#[test]
fn local_operations_keep_their_place_among_messages() {
    let mut r = Rig::new(3, Faults::default());
    let (k, n) = (r.key, r.key & !0xff | (r.key + 1) & 0xff);
    r.p.a.qp.post_recv(7, &[r.p.a.mr.sge(0, 8)]);
    r.p.a.fill(5000, &[1; 5000]);
    let read = Wr::new(WrOpcode::Read, 1).sge(r.p.b.mr.sge(0, 5000));
    let read = read.to(&r.p.a.mr, 5000);
    let write = |id| Wr::new(WrOpcode::Write, id).inline(&[id as u8; 9]);
    for wr in [
        read,
        write(2).to(&r.p.a.mr, 100),
        Wr::bind(3, k, n, REMOTE, &r.mr, 0, 64),
        Wr::new(WrOpcode::Send, 4).inline(&n.to_ne_bytes()),
        Wr::new(WrOpcode::LocalInv, 5).imm(n),
        write(6).to(&r.p.a.mr, 100),
        Wr::new(WrOpcode::LocalInv, 7).imm(n),
        write(8).to(&r.p.a.mr, 100),
    ] {
        r.p.b.qp.post_silently(&wr);
    }
    assert_eq!(r.p.b.qp.ring(), Ring::Seen);
    settle(&mut r.p);
    let got: Vec<_> =
        r.p.b
            .scq
            .drain()
            .iter()
            .map(|c| (c.wr_id, status(c)))
            .collect();
    let ok = WcStatus::Success;
    let want = [
        (1, ok),
        (2, ok),
        (3, ok),
        (4, ok),
        (5, ok),
        (6, ok),
        (7, WcStatus::LocQpOpErr),
        (8, WcStatus::WrFlushErr),
    ];
    assert_eq!(got, want);
    assert_eq!(r.p.b.data(0, 5000), [1; 5000]);
    assert_eq!(r.p.a.data(100, 9), [6; 9]);
    assert_eq!(status(&r.p.a.rcq.one()), ok);
}

#[test]
fn an_srq_serves_peers_on_another_host() {
    for seed in 0..4 {
        let faults = Faults {
            loss: 2 * seed,
            double: 2,
            ..Faults::default()
        };
        let mut p = WirePair::with(LEN, Cap::default(), &path(), seed, faults);
        let mut srq = p.b.user.srq(&mut p.eb, p.b.pd, 4, 32);
        let cap = Cap {
            srq: srq.handle,
            ..Cap::default()
        };
        let gids = (p.ea.gid(1, 0).unwrap(), p.eb.gid(1, 0).unwrap());
        let mut from = Vec::new();
        let mut to = Vec::new();
        for _ in 0..3 {
            let x = p.a.extra_qp(&mut p.ea, Cap::default());
            let y = p.b.extra_qp(&mut p.eb, cap);
            join(&mut p.ea, &x, (gids.1, y.qpn), &path());
            join(&mut p.eb, &y, (gids.0, x.qpn), &path());
            from.push(x);
            to.push(y);
        }
        let data = Rng(seed).bytes(20_000);
        p.a.fill(0, &data);
        let mut left = 0u32;
        for i in 0..60u64 {
            let at = 32_768 * (i % 16);
            srq.post_recv(i, &[p.b.mr.sge(at, 32_768)]);
            left += 1;
            if left == 3 {
                // All three at once: each takes one.
                for (k, q) in from.iter_mut().enumerate() {
                    let len = [20_000, 40, 7_000][k];
                    q.post(&Wr::new(WrOpcode::Send, k as u64).sge(p.a.mr.sge(0, len)));
                }
                settle(&mut p);
                assert_eq!(p.a.scq.drain().len(), 3, "seed {seed}");
                let mut got = p.b.rcq.drain();
                got.sort_by_key(|c| c.wr_id);
                let ids: Vec<_> = got.iter().map(|c| c.wr_id).collect();
                assert_eq!(ids, [i - 2, i - 1, i], "seed {seed}");
                for c in got {
                    assert_eq!(status(&c), WcStatus::Success);
                    assert_eq!(u64::from(c.wqe), c.wr_id);
                    let k = to.iter().position(|q| q.qpn == c.qpn).expect("one of them");
                    assert_eq!(c.byte_len, [20_000, 40, 7_000][k]);
                    let n = u64::from(c.byte_len);
                    assert!(p.b.data(32_768 * (c.wr_id % 16), n) == data[..n as usize]);
                }
                left = 0;
            }
        }
        // One message under way when its QP goes to error: its receive flushes, the next one stays.
        for id in [100, 101] {
            srq.post_recv(id, &[p.b.mr.sge(0, 32_768)]);
        }
        to[0].go(&mut p.eb, QpState::Err).expect("ERR");
        assert!(event(&p.b.user.ram, summary::QP_LAST_WQE, to[0].index()));
        assert!(p.b.rcq.poll().is_none());
        from[1].post(&Wr::new(WrOpcode::Send, 9).sge(p.a.mr.sge(0, 64)));
        settle(&mut p);
        assert_eq!(p.b.rcq.one().wr_id, 100);
    }
}
