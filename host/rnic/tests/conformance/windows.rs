//! Memory windows of type 2B: bound by a work request, opened to one QP's peer, invalidated from either side.

use crate::common::*;
use crate::fabric::{Link, On, patient};
use hyv_abi::control::{AllocMw, MrReply};

const REMOTE: Access = Access::REMOTE_READ
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_ATOMIC);
const DATA: u64 = 1 << 16;

/// A connection whose B owns a region that only windows open, and a window.
struct Rig {
    p: Link,
    /// B's, without remote rights of its own.
    mr: Mr,
    mw: MrReply,
    key: u32,
}

impl Rig {
    fn new(on: On) -> Self {
        Self::of(on, QpType::Rc)
    }

    fn of(on: On, ty: QpType) -> Self {
        let cap = Cap {
            ty,
            ..Cap::default()
        };
        let mut p = Link::with(on, DATA, cap, &patient());
        let access = Access::LOCAL_WRITE | Access::MW_BIND;
        let mr = p.b.user.mr(p.f.b(), p.b.pd, DATA, access);
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

    /// Both sides anew, and the window as it is.
    fn reconnect(&mut self) {
        let p = &mut self.p;
        p.a.qp.reset(p.f.a());
        p.b.qp.reset(p.f.b());
        p.f.connect(&p.a.qp, &p.b.qp, &patient());
        p.b.rcq.drain();
        for kind in [summary::QP_ACCESS_ERROR, summary::QP_REQUEST_ERROR] {
            event(&p.b.user.ram, kind, p.b.qp.index());
        }
    }

    fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        self.p.b.user.ram.read(self.mr.offset + at, len)
    }
}

fn alloc(p: &mut Link, mw_type: u32) -> Result<MrReply, VerbError> {
    p.f.b().alloc_mw(
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

fn a_window_opens_what_it_says_and_no_more(on: On) {
    use WrOpcode::{FetchAdd, Read, Write};
    let mut r = Rig::new(on);
    r.p.a.fill(0, &[7; 4096]);
    assert_eq!(r.reach(Write, r.mr.rkey, 0, 8), WcStatus::RemAccessErr);
    r.reconnect();
    // Not bound yet.
    assert_eq!(r.reach(Write, r.key, 0, 8), WcStatus::RemAccessErr);
    r.reconnect();
    assert_eq!(r.bind(REMOTE, 4096, 1024), WcStatus::Success);
    for op in [Write, Read] {
        assert_eq!(r.reach(op, r.key, 4096, 1024), WcStatus::Success);
        assert_eq!(r.reach(op, r.key, 5119, 1), WcStatus::Success);
    }
    assert_eq!(r.bytes(4096, 1024), [7; 1024]);
    assert_eq!(r.reach(FetchAdd, r.key, 4096 + 1016, 8), WcStatus::Success);
    for op in [Write, Read] {
        for (at, len) in [(4095, 1), (4095, 2), (5119, 2), (5120, 1), (4096, 1025)] {
            let s = r.reach(op, r.key, at, len);
            assert_eq!(s, WcStatus::RemAccessErr, "{op:?} {at} {len}");
            assert!(event(
                &r.p.b.user.ram,
                summary::QP_ACCESS_ERROR,
                r.p.b.qp.index()
            ));
            r.reconnect();
        }
    }
    // Another low byte, another index.
    for key in [next(r.key), r.mw.rkey, r.key ^ 0x100, r.key & 0xff] {
        assert_eq!(r.reach(Read, key, 4096, 8), WcStatus::RemAccessErr);
        r.reconnect();
    }
    assert_eq!(r.reach(Read, r.key, 4096, 8), WcStatus::Success);
}

fn a_window_gives_the_rights_it_was_bound_with(on: On) {
    use WrOpcode::{CmpSwp, FetchAdd, Read, Write};
    let (none, read) = (Access::empty(), Access::REMOTE_READ);
    let (write, atomic) = (Access::REMOTE_WRITE, Access::REMOTE_ATOMIC);
    for rights in [none, read, write, atomic, read | write, write | atomic] {
        let mut r = Rig::new(on);
        assert_eq!(r.bind(rights, 0, 64), WcStatus::Success);
        for (op, need) in [
            (Read, read),
            (Write, write),
            (FetchAdd, atomic),
            (CmpSwp, atomic),
        ] {
            let want = if rights.contains(need) {
                WcStatus::Success
            } else {
                WcStatus::RemAccessErr
            };
            assert_eq!(r.reach(op, r.key, 8, 8), want, "{rights:?} {op:?}");
            r.reconnect();
        }
    }
}

fn a_windows_key_is_no_local_key(on: On) {
    let mut r = Rig::new(on);
    assert_eq!(r.bind(REMOTE, 0, 64), WcStatus::Success);
    let sge = Sge {
        addr: r.mr.iova,
        len: 8,
        lkey: r.key,
    };
    let wr = Wr::new(WrOpcode::Write, 1).sge(sge).to(&r.p.a.mr, 0);
    assert_eq!(r.b_posts(&wr), WcStatus::LocProtErr);
    r.reconnect();
    for len in [8, 64] {
        r.p.b.qp.post_recv(1, &[Sge { len, ..sge }]);
        let wr = Wr::new(WrOpcode::Send, 2).sge(r.p.a.mr.sge(0, len));
        r.p.a.qp.post(&wr);
        r.p.pump();
        assert_eq!(status(&r.p.a.scq.one()), WcStatus::RemOpErr);
        assert_eq!(status(&r.p.b.rcq.one()), WcStatus::LocProtErr);
        r.reconnect();
    }
    // Nor does it bind another window.
    let other = alloc(&mut r.p, 2).expect("alloc_mw").rkey;
    let mut wr = Wr::bind(1, other, next(other), REMOTE, &r.mr, 0, 8);
    wr.sges[0].lkey = r.key;
    assert_eq!(r.b_posts(&wr), WcStatus::MwBindErr);
}

fn a_window_is_one_queue_pairs(on: On) {
    let mut r = Rig::new(on);
    assert_eq!(r.bind(REMOTE, 0, 64), WcStatus::Success);
    // Another connection of the same two, in the same PD.
    let p = &mut r.p;
    let mut x = p.a.extra_qp(p.f.a(), Cap::default());
    let mut y = p.b.extra_qp(p.f.b(), Cap::default());
    p.f.connect(&x, &y, &patient());
    let wr = Wr::new(WrOpcode::Read, 1).sge(p.a.mr.sge(0, 8));
    let wr = wr.remote(r.mr.iova, r.key);
    x.post(&wr);
    p.pump();
    assert_eq!(status(&p.a.scq.one()), WcStatus::RemAccessErr);
    x.reset(p.f.a());
    y.reset(p.f.b());
    p.f.connect(&x, &y, &patient());
    // Nor can it be unbound or invalidated there.
    let unbind = Wr::bind(2, r.key, next(r.key), REMOTE, &r.mr, 0, 0);
    y.post(&unbind);
    p.pump();
    assert_eq!(status(&p.b.scq.one()), WcStatus::MwBindErr);
    y.reset(p.f.b());
    p.f.connect_b(&y, x.qpn, &patient());
    y.post(&Wr::new(WrOpcode::LocalInv, 3).imm(r.key));
    p.pump();
    assert_eq!(status(&p.b.scq.one()), WcStatus::LocQpOpErr);
    assert_eq!(r.reach(WrOpcode::Read, r.key, 0, 8), WcStatus::Success);
    // The QP goes, and with it the binding: a QP in its place has none of it.
    let p = &mut r.p;
    p.f.b()
        .destroy_qp(p.b.qp.owner, p.b.qp.handle)
        .expect("drop");
    let (id, pd) = (p.b.user.id, p.b.pd);
    p.f.b()
        .dereg_mr(id, r.mr.handle)
        .expect("nothing is bound to it");
    p.f.b().dealloc_mw(id, r.mw.handle).expect("dealloc_mw");
    let gone = Err(VerbError::new(Errno::NoEnt, Reason::BadHandle));
    assert_eq!(p.f.b().dealloc_mw(id, r.mw.handle), gone);
    assert!(p.f.b().dealloc_pd(id, pd).is_err(), "others use it");
}

fn binds_that_break_a_rule(on: On) {
    let mut r = Rig::new(on);
    let (id, pd) = (r.p.b.user.id, r.p.b.pd);
    let elsewhere = r.p.b.user.pd(r.p.f.b());
    let (e, user) = (r.p.f.b(), &r.p.b.user);
    let bind_only = user.mr_at(e, pd, r.mr.offset, DATA, Access::MW_BIND);
    let no_bind = user.mr_at(e, pd, r.mr.offset, DATA, Access::LOCAL_WRITE);
    let full = Access::MW_BIND | Access::LOCAL_WRITE;
    let other_pd = user.mr_at(e, elsewhere, r.mr.offset, DATA, full);
    let foreign = e
        .alloc_mw(
            id,
            &AllocMw {
                pd: elsewhere,
                mw_type: 2,
            },
        )
        .expect("alloc_mw")
        .rkey;
    let (k, n, mr) = (r.key, next(r.key), r.mr);
    let read = Access::REMOTE_READ;
    let good = |access, mr: &Mr, at, len| Wr::bind(9, k, n, access, mr, at, len);
    let bad_access = |bits: u64| {
        let mut wr = good(read, &mr, 0, 8);
        wr.remote = bits;
        wr
    };
    let mut before_it = good(read, &mr, 0, 8);
    before_it.sges[0].addr -= 1;
    let mut stale = mr;
    stale.lkey ^= 0x55;
    let cases = [
        ("the region does not allow it", good(read, &no_bind, 0, 8)),
        ("another PD's region", good(read, &other_pd, 0, 8)),
        ("no such region", good(read, &stale, 0, 8)),
        (
            "remote write without local write",
            good(Access::REMOTE_WRITE, &bind_only, 0, 8),
        ),
        (
            "remote atomic without local write",
            good(Access::REMOTE_ATOMIC, &bind_only, 0, 8),
        ),
        ("behind the end", good(read, &mr, DATA - 7, 8)),
        ("longer", good(read, &mr, 0, DATA + 1)),
        ("endless", good(read, &mr, 0, u64::MAX)),
        ("before the beginning", before_it),
        ("local access", bad_access(1)),
        ("bind access", bad_access(1 << 4)),
        ("unknown access", bad_access(1 << 9)),
        ("wide access", bad_access(1 << 33)),
        ("the same key", Wr::bind(9, k, k, read, &mr, 0, 8)),
        ("another index", Wr::bind(9, k, n + 0x100, read, &mr, 0, 8)),
        ("a stale key", Wr::bind(9, n, k, read, &mr, 0, 8)),
        (
            "no such window",
            Wr::bind(9, k + 0x100, n + 0x100, read, &mr, 0, 8),
        ),
        (
            "a region's key",
            Wr::bind(9, mr.rkey, next(mr.rkey), read, &mr, 0, 8),
        ),
        (
            "another PD's window",
            Wr::bind(9, foreign, next(foreign), read, &mr, 0, 8),
        ),
    ];
    for (name, wr) in cases {
        assert_eq!(r.b_posts(&wr), WcStatus::MwBindErr, "{name}");
        assert_eq!(r.p.b.qp.state(r.p.f.rb()), QpState::Err, "{name}");
        r.reconnect();
    }
    let mut wr = good(read, &mr, 0, 8);
    wr.sges.clear();
    assert_eq!(r.b_posts(&wr.inline(&[0; 8])), WcStatus::LocQpOpErr);
    r.reconnect();
    // None of that changed anything; read needs no local write.
    let wr = good(read, &bind_only, 16, 8);
    assert_eq!(r.b_posts(&wr), WcStatus::Success);
    r.key = n;
    // Bound: not once more.
    assert_eq!(r.bind(read, 0, 8), WcStatus::MwBindErr);
    r.reconnect();
    assert_eq!(r.reach(WrOpcode::Read, r.key, 16, 8), WcStatus::Success);
}

fn unbinding_takes_the_key_away(on: On) {
    let mut r = Rig::new(on);
    for round in 0..300u64 {
        let before = r.key;
        assert_eq!(r.bind(REMOTE, 8 * round, 64), WcStatus::Success);
        assert_ne!(r.key, before);
        assert_eq!(
            r.reach(WrOpcode::Write, r.key, 8 * round, 64),
            WcStatus::Success
        );
        let bound = r.key;
        match round % 3 {
            // A bind of nothing; another one changes only the key.
            0 => {
                assert_eq!(r.bind(Access::empty(), 0, 0), WcStatus::Success);
                assert_eq!(r.bind(Access::empty(), 0, 0), WcStatus::Success);
            }
            1 => {
                let wr = Wr::new(WrOpcode::LocalInv, 4).imm(r.key);
                assert_eq!(r.b_posts(&wr), WcStatus::Success);
            }
            _ => {
                r.p.b.qp.post_recv(5, &[]);
                let wr = Wr::new(WrOpcode::SendInv, 6).imm(r.key);
                r.p.a.qp.post(&wr);
                r.p.pump();
                let s = r.p.a.scq.one();
                assert_eq!(status(&s), WcStatus::Success);
                assert_eq!(s.opcode, WcOpcode::Send as u8);
                let c = r.p.b.rcq.one();
                assert_eq!((status(&c), c.wr_id), (WcStatus::Success, 5));
                assert_eq!(c.flags & !cqe_flags::DATA, cqe_flags::WITH_INV);
                assert_eq!(c.imm, r.key, "the key that was invalidated");
            }
        }
        if round % 50 < 3 {
            for key in [bound, r.key] {
                let s = r.reach(WrOpcode::Read, key, 8 * round, 8);
                assert_eq!(s, WcStatus::RemAccessErr, "round {round}");
                r.reconnect();
            }
        }
    }
    // Nothing is bound: the region may go.
    let (p, h) = (&mut r.p, r.mr.handle);
    p.f.b().dereg_mr(p.b.user.id, h).expect("dereg_mr");
}

fn send_with_invalidate_moves_data_of_any_length(on: On) {
    for len in [0, 8, 32, 33, 4096, 65_536 - 64] {
        let mut r = Rig::new(on);
        assert_eq!(r.bind(REMOTE, 0, 64), WcStatus::Success);
        let data = Rng(31).bytes(len as usize);
        r.p.a.fill(0, &data);
        let sge = r.p.b.mr.sge(0, len);
        r.p.b.qp.post_recv(5, &[sge]);
        let wr = Wr::new(WrOpcode::SendInv, 6).imm(r.key);
        r.p.a.qp.post(&wr.sge(r.p.a.mr.sge(0, len)));
        r.p.pump();
        assert_eq!(status(&r.p.a.scq.one()), WcStatus::Success);
        let c = r.p.b.rcq.one();
        assert_eq!((c.byte_len, c.imm), (len, r.key));
        assert_eq!(received(&r.p.b.user.ram, &c, &[sge], IOVA), data);
        assert_eq!(r.reach(WrOpcode::Read, r.key, 0, 8), WcStatus::RemAccessErr);
    }
}

fn keys_that_cannot_be_invalidated(on: On) {
    let mut r = Rig::new(on);
    let unbound = alloc(&mut r.p, 2).expect("alloc_mw").rkey;
    assert_eq!(r.bind(REMOTE, 0, 64), WcStatus::Success);
    let (own, theirs) = (r.mr.rkey, r.p.a.mr.rkey);
    let far = next(r.key);
    for key in [own, theirs, unbound, far, 0, u32::MAX] {
        let wr = Wr::new(WrOpcode::LocalInv, 4).imm(key);
        assert_eq!(r.b_posts(&wr), WcStatus::LocQpOpErr, "{key:x}");
        assert_eq!(r.p.b.qp.state(r.p.f.rb()), QpState::Err);
        r.reconnect();
        for len in [8, 4096] {
            r.p.b.qp.post_recv(5, &[r.p.b.mr.sge(0, 4096)]);
            let wr = Wr::new(WrOpcode::SendInv, 6).imm(key);
            r.p.a.qp.post(&wr.sge(r.p.a.mr.sge(0, len)));
            r.p.pump();
            assert_eq!(status(&r.p.a.scq.one()), WcStatus::RemAccessErr);
            let c = r.p.b.rcq.one();
            assert_eq!((status(&c), c.wr_id), (WcStatus::RemInvReqErr, 5));
            let i = r.p.b.qp.index();
            assert!(event(&r.p.b.user.ram, summary::QP_ACCESS_ERROR, i));
            assert_eq!(r.p.b.qp.state(r.p.f.rb()), QpState::Err);
            r.reconnect();
        }
    }
    // Regions still stand, and so does the window.
    assert_eq!(r.reach(WrOpcode::Read, r.key, 0, 64), WcStatus::Success);
    r.p.b.qp.post_recv(5, &[]);
    r.p.a.qp.post(&Wr::new(WrOpcode::SendInv, 6).imm(r.key));
    r.p.pump();
    assert_eq!(status(&r.p.b.rcq.one()), WcStatus::Success);
}

fn local_operations_keep_their_place_in_the_queue(on: On) {
    let mut r = Rig::new(on);
    let (k, n) = (r.key, next(r.key));
    // All at once: bind, tell the peer, take it back.
    let bind = Wr::bind(1, k, n, REMOTE, &r.mr, 0, 64).unsignaled();
    let tell = Wr::new(WrOpcode::Send, 2).inline(&n.to_ne_bytes());
    let back = Wr::new(WrOpcode::LocalInv, 3).imm(n).with(flags::FENCE);
    let twice = Wr::new(WrOpcode::LocalInv, 4).imm(n);
    let late = Wr::new(WrOpcode::Send, 5).inline(&[1]);
    r.p.a.qp.post_recv(7, &[r.p.a.mr.sge(0, 8)]);
    for wr in [bind, tell, back, twice, late] {
        r.p.b.qp.post_silently(&wr);
    }
    assert_eq!(r.p.b.qp.ring(), Ring::Seen);
    r.p.pump();
    let got: Vec<_> =
        r.p.b
            .scq
            .drain()
            .iter()
            .map(|c| (c.wr_id, status(c)))
            .collect();
    let ok = WcStatus::Success;
    let want = [
        (2, ok),
        (3, ok),
        (4, WcStatus::LocQpOpErr),
        (5, WcStatus::WrFlushErr),
    ];
    assert_eq!(got, want);
    assert_eq!(r.p.a.rcq.drain().len(), 1);
}

fn windows_of_unreliable_connections(on: On) {
    let mut r = Rig::of(on, QpType::Uc);
    r.p.a.fill(0, &[3; 64]);
    assert_eq!(r.bind(REMOTE, 0, 64), WcStatus::Success);
    assert_eq!(r.reach(WrOpcode::Write, r.key, 0, 64), WcStatus::Success);
    assert_eq!(r.bytes(0, 64), [3; 64]);
    let wr = Wr::new(WrOpcode::LocalInv, 1).imm(r.key);
    assert_eq!(r.b_posts(&wr), WcStatus::Success);
    r.p.a.fill(0, &[4; 64]);
    assert_eq!(r.reach(WrOpcode::Write, r.key, 0, 64), WcStatus::Success);
    assert_eq!(r.bytes(0, 64), [3; 64], "dropped");
    assert_eq!(r.b_posts(&wr), WcStatus::LocQpOpErr);
    assert_eq!(r.p.b.qp.state(r.p.f.rb()), QpState::Sqe);
}

on_every_carrier! {
    a_window_opens_what_it_says_and_no_more
    a_window_gives_the_rights_it_was_bound_with
    a_windows_key_is_no_local_key
    a_window_is_one_queue_pairs
    binds_that_break_a_rule
    unbinding_takes_the_key_away
    send_with_invalidate_moves_data_of_any_length
    keys_that_cannot_be_invalidated
    local_operations_keep_their_place_in_the_queue
    windows_of_unreliable_connections
}
