//! Memory windows of type 2B: bound by a work request, opened to one QP's peer, invalidated from either side.

mod common;

use common::*;
use hyv_abi::control::{AllocMw, MrReply};

const REMOTE: Access = Access::REMOTE_READ
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_ATOMIC);
const DATA: u64 = 1 << 16;

const SMALL: Cap = Cap {
    sq_log2: 2,
    rq_log2: 0,
    stride: 32,
    sig_all: false,
    ty: QpType::Rc,
    srq: u32::MAX,
};

/// A connection whose B owns a region that only windows open, and a window.
struct Rig {
    p: Pair,
    /// B's, without remote rights of its own.
    mr: Mr,
    mw: MrReply,
    key: u32,
}

impl Rig {
    fn new() -> Self {
        Self::of(QpType::Rc)
    }

    fn of(ty: QpType) -> Self {
        let cap = Cap {
            ty,
            ..Cap::default()
        };
        let mut p = Pair::with(DATA, cap, &Conn::default());
        let access = Access::LOCAL_WRITE | Access::MW_BIND;
        let mr = p.b.user.mr(&mut p.e, p.b.pd, DATA, access);
        let mw = alloc(&mut p, 2).expect("alloc_mw");
        Self {
            p,
            mr,
            mw,
            key: mw.rkey,
        }
    }

    /// B binds; gives the status. The key changes if that is success.
    fn bind(&mut self, access: Access, at: u64, len: u64) -> WcStatus {
        let new = next(self.key);
        let wr = Wr::bind(1, self.key, new, access, &self.mr, at, len);
        let s = self.b_posts(&wr);
        if s == WcStatus::Success {
            self.key = new;
        }
        s
    }

    fn b_posts(&mut self, wr: &Wr) -> WcStatus {
        self.p.b.qp.post(wr);
        self.p.pump();
        let c = self.p.b.scq.one();
        assert_eq!(
            c.opcode,
            WrOpcode::from_u8(wr.op).expect("an opcode").wc() as u8
        );
        assert_eq!((c.wr_id, c.byte_len), (wr.wr_id, 0));
        status(&c)
    }

    /// A reaches through a key.
    fn reach(&mut self, op: WrOpcode, key: u32, at: u64, len: u32) -> WcStatus {
        let wr = Wr::new(op, 2).sge(self.p.a.mr.sge(0, len));
        self.p.a.qp.post(&wr.remote(self.mr.iova + at, key));
        self.p.pump();
        status(&self.p.a.scq.one())
    }
}

fn alloc(p: &mut Pair, mw_type: u32) -> Result<MrReply, VerbError> {
    p.e.alloc_mw(
        p.b.user.id,
        &AllocMw {
            pd: p.b.pd,
            mw_type,
        },
    )
}

/// The same index, another low byte.
fn next(key: u32) -> u32 {
    key & !0xff | key.wrapping_add(1) & 0xff
}

#[test]
fn control_of_windows_is_checked() {
    let mut r = Rig::new();
    let (id, pd) = (r.p.b.user.id, r.p.b.pd);
    for mw_type in [0, 1, 3, u32::MAX] {
        let refused = VerbError::new(Errno::Inval, Reason::BadMwType);
        assert_eq!(alloc(&mut r.p, mw_type), Err(refused));
    }
    let gone = VerbError::new(Errno::NoEnt, Reason::BadHandle);
    for pd in [pd ^ 0x1_0000, pd + 7, u32::MAX] {
        let req = AllocMw { pd, mw_type: 2 };
        assert_eq!(r.p.e.alloc_mw(id, &req), Err(gone));
    }
    assert_eq!(r.mw.lkey, 0, "a window has no local key");
    assert_eq!(r.bind(REMOTE, 0, 64), WcStatus::Success);
    // The region stays while a window is bound to it.
    let bound = VerbError::new(Errno::Busy, Reason::WindowsBound);
    let e = &mut r.p.e;
    assert_eq!(e.dereg_mr(id, r.mr.handle), Err(bound));
    let req = hyv_abi::control::ReregMr {
        mr: r.mr.handle,
        flags: 4,
        pd,
        access: 1,
        iova: 0,
        ram_offset: 0,
        len: 0,
    };
    assert_eq!(e.rereg_mr(id, &req), Err(bound));
    assert_eq!(r.reach(WrOpcode::Read, r.key, 0, 8), WcStatus::Success);
    // Dropped while bound: its key is dead, its region free.
    let e = &mut r.p.e;
    assert_eq!(e.dealloc_mw(r.p.a.user.id, r.mw.handle), Err(gone));
    e.dealloc_mw(id, r.mw.handle).expect("dealloc_mw");
    assert_eq!(r.reach(WrOpcode::Read, r.key, 0, 8), WcStatus::RemAccessErr);
    r.p.e.dereg_mr(id, r.mr.handle).expect("dereg_mr");
    // It keeps its PD.
    let e = &mut r.p.e;
    let pd = e.alloc_pd(id).expect("alloc_pd");
    let mw = e.alloc_mw(id, &AllocMw { pd, mw_type: 2 }).expect("mw");
    let busy = VerbError::new(Errno::Busy, Reason::InUse);
    assert_eq!(e.dealloc_pd(id, pd), Err(busy));
    e.dealloc_mw(id, mw.handle).expect("dealloc_mw");
    e.dealloc_pd(id, pd).expect("dealloc_pd");
}

#[test]
fn many_windows_of_many_queue_pairs_come_and_go() {
    println!("seed 51");
    let mut rng = Rng(51);
    let mut r = Rig::new();
    let p = &mut r.p;
    let (id, pd) = (p.b.user.id, p.b.pd);
    let mut qps: Vec<(Qp, Qp)> = Vec::new();
    let mut windows: Vec<(MrReply, u32, Option<u32>)> = Vec::new();
    let mut bound = 0u32;
    for _ in 0..4_000 {
        if qps.len() < 3 {
            let mut x = p.a.extra_qp(&mut p.e, SMALL);
            let mut y = p.b.extra_qp(&mut p.e, SMALL);
            (x.sq_tail, y.sq_tail) = (0, 0);
            connect(&mut p.e, &x, &y, &Conn::default());
            qps.push((x, y));
        }
        let q = rng.next() as usize % qps.len();
        match rng.next() % 8 {
            0 if windows.len() < 40 => {
                let req = AllocMw { pd, mw_type: 2 };
                let mw = p.e.alloc_mw(id, &req).expect("alloc_mw");
                windows.push((mw, mw.rkey, None));
            }
            1 if !windows.is_empty() => {
                let w = windows.swap_remove(rng.next() as usize % windows.len());
                p.e.dealloc_mw(id, w.0.handle).expect("dealloc_mw");
                bound -= u32::from(w.2.is_some());
            }
            2 if qps.len() == 3 && rng.below(16) == 0 && p.b.user.room() > 4096 => {
                let (x, y) = qps.swap_remove(q);
                p.e.destroy_qp(id, y.handle).expect("destroy_qp");
                p.e.destroy_qp(x.owner, x.handle).expect("destroy_qp");
                for w in &mut windows {
                    if w.2 == Some(y.handle) {
                        w.2 = None;
                        bound -= 1;
                    }
                }
            }
            _ if !windows.is_empty() => {
                let i = rng.next() as usize % windows.len();
                let w = &mut windows[i];
                let y = &mut qps[q].1;
                let wr = match w.2 {
                    None => {
                        w.2 = Some(y.handle);
                        bound += 1;
                        let new = next(w.1);
                        let present = std::mem::replace(&mut w.1, new);
                        Wr::bind(1, present, w.1, REMOTE, &r.mr, 0, 8)
                    }
                    Some(h) if h == y.handle => {
                        w.2 = None;
                        bound -= 1;
                        Wr::new(WrOpcode::LocalInv, 1).imm(w.1)
                    }
                    Some(_) => continue,
                };
                y.post_silently(&wr);
                let _ = y.ring();
                pump(&mut p.e);
                assert_eq!(status(&p.b.scq.one()), WcStatus::Success);
            }
            _ => {}
        }
        // The region may go only when nothing is bound to it.
        if bound > 0 {
            let busy = VerbError::new(Errno::Busy, Reason::WindowsBound);
            assert_eq!(p.e.dereg_mr(id, r.mr.handle), Err(busy));
        }
    }
    for (mw, ..) in windows {
        p.e.dealloc_mw(id, mw.handle).expect("dealloc_mw");
    }
    p.e.dereg_mr(id, r.mr.handle).expect("nothing is bound");
}
