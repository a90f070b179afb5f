//! Shared receive queues: one ring, many QPs.

mod common;

use common::*;
use hyv_abi::control::{CreateCq, CreateSrq, ModifySrq};
use hyv_rnic::Engine;

/// A user with an SRQ and several QPs on it, each connected to a QP of the other.
struct Rig {
    e: Engine,
    clock: Clock,
    /// Sends.
    a: Side,
    /// Receives.
    b: Side,
    srq: Srq,
    from: Vec<Qp>,
    to: Vec<Qp>,
}

impl Rig {
    fn new(pairs: usize, log2: u32, data_len: u64, conn: &Conn) -> Self {
        let (mut e, clock) = engine();
        let mut a = Side::new(&mut e, data_len, Cap::default());
        let mut b = Side::new(&mut e, data_len, Cap::default());
        let srq = b.user.srq(&mut e, b.pd, log2, 64);
        let cap = Cap {
            srq: srq.handle,
            ..Cap::default()
        };
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            let x = a.extra_qp(&mut e, Cap::default());
            let y = b.extra_qp(&mut e, cap);
            connect(&mut e, &x, &y, conn);
            from.push(x);
            to.push(y);
        }
        Self {
            e,
            clock,
            a,
            b,
            srq,
            from,
            to,
        }
    }

    fn send(&mut self, i: usize, wr_id: u64, at: u64, len: u32) {
        let wr = Wr::new(WrOpcode::Send, wr_id).sge(self.a.mr.sge(at, len));
        self.from[i].post(&wr);
    }

    fn pump(&mut self) {
        pump(&mut self.e);
    }
}

fn never() -> Conn {
    Conn {
        rnr_retry: 0,
        ..Conn::default()
    }
}

#[test]
fn whoever_gets_a_message_takes_the_next_receive() {
    let mut r = Rig::new(3, 3, 1 << 20, &Conn::default());
    let mut rng = Rng(11);
    // Many times around the ring of eight.
    for round in 0..300u32 {
        let sizes: Vec<u32> = (0..3)
            .map(|_| [0, 8, 32, 33, 4096, 20_000][rng.next() as usize % 6])
            .collect();
        let data = rng.bytes(32 << 10);
        r.a.fill(0, &data);
        for k in 0..3u64 {
            let id = u64::from(round) * 3 + k;
            r.srq.post_recv(id, &[r.b.mr.sge(k * (32 << 10), 32 << 10)]);
        }
        let mut order = [0usize, 1, 2];
        order.swap(0, rng.next() as usize % 3);
        for (k, &i) in order.iter().enumerate() {
            r.send(i, k as u64, 0, sizes[k]);
            r.pump();
            assert_eq!(status(&r.a.scq.one()), WcStatus::Success);
            let c = r.b.rcq.one();
            let n = round * 3 + k as u32;
            assert_eq!(status(&c), WcStatus::Success);
            assert_eq!((c.wr_id, c.byte_len), (u64::from(n), sizes[k]));
            assert_eq!(u32::from(c.wqe), n & 0xffff, "position in the SRQ");
            assert_eq!(
                (c.qpn, usize::from(c.qp)),
                (r.to[i].qpn, r.to[i].index()),
                "the QP that took it"
            );
            let sge = r.b.mr.sge(k as u64 * (32 << 10), 32 << 10);
            let got = received(&r.b.user.ram, &c, &[sge], IOVA);
            assert_eq!(got, data[..sizes[k] as usize]);
        }
    }
    assert_eq!(pending(&r.b.user.ram) & !summary::QP_COMM_ESTABLISHED, 0);
}

#[test]
fn an_empty_srq_is_not_ready() {
    let mut r = Rig::new(2, 3, 1 << 16, &never());
    r.send(0, 1, 0, 64);
    r.pump();
    assert!(r.a.scq.poll().is_none(), "it waits first");
    r.clock.advance(rnr_ns(1));
    r.pump();
    assert_eq!(status(&r.a.scq.one()), WcStatus::RnrRetryExcErr);
    assert_eq!(r.from[0].state(&r.e), QpState::Err);
    assert_eq!(r.to[0].state(&r.e), QpState::Rts, "the responder goes on");
    // The same for a WRITE with immediate, and nothing was written.
    r.b.fill(0, &[7; 64]);
    let wr = Wr::new(WrOpcode::WriteImm, 2).sge(r.a.mr.sge(0, 64));
    r.from[1].post(&wr.to(&r.b.mr, 0));
    r.pump();
    assert_eq!(r.b.data(0, 64), [7; 64]);
    r.srq.post_recv(9, &[]);
    r.clock.advance(rnr_ns(1));
    // Found before the time is judged over: a receive that is there is taken.
    r.pump();
    assert_eq!(status(&r.a.scq.one()), WcStatus::Success);
    assert_eq!(r.b.rcq.one().wr_id, 9);
    assert_eq!(r.b.data(0, 64), [0; 64]);
}

fn rnr_ns(code: u32) -> u64 {
    hyv_abi::types::rnr_timer_ns(code)
}

#[test]
fn a_long_message_keeps_its_own_receive_while_others_take_the_next() {
    const LONG: u32 = 1 << 20;
    let mut r = Rig::new(2, 4, 2 << 20, &Conn::default());
    let data = Rng(12).bytes(LONG as usize);
    r.a.fill(0, &data);
    r.srq.post_recv(100, &[r.b.mr.sge(0, LONG)]);
    r.srq.post_recv(101, &[r.b.mr.sge(u64::from(LONG), 4096)]);
    r.send(0, 1, 0, LONG);
    r.e.poll();
    assert!(r.a.scq.poll().is_none(), "it takes many turns");
    // What the user does to the slot now changes nothing: it was copied.
    r.b.user.ram.write(r.srq.ring, &[0xff; 56]);
    r.send(1, 2, 0, 4096);
    r.pump();
    let c = r.b.rcq.drain();
    assert_eq!(
        c.iter().map(|c| (c.wr_id, c.wqe)).collect::<Vec<_>>(),
        [(101, 1), (100, 0)],
        "the short one overtakes, each with its own receive"
    );
    assert!(c.iter().all(|c| status(c) == WcStatus::Success));
    assert_eq!(r.b.data(0, u64::from(LONG)), data);
    assert_eq!(r.b.data(u64::from(LONG), 4096), data[..4096]);
}

#[test]
fn a_queue_in_error_flushes_what_it_took_and_leaves_the_rest() {
    let mut r = Rig::new(2, 4, 4 << 20, &Conn::default());
    r.srq.post_recv(100, &[r.b.mr.sge(0, 2 << 20)]);
    r.srq.post_recv(101, &[r.b.mr.sge(0, 4096)]);
    r.send(0, 1, 0, 2 << 20);
    r.e.poll();
    r.to[0].go(&mut r.e, QpState::Err).expect("ERR");
    let c = r.b.rcq.one();
    assert_eq!((status(&c), c.wr_id), (WcStatus::WrFlushErr, 100));
    assert_eq!((c.wqe, c.qpn), (0, r.to[0].qpn));
    assert!(event(&r.b.user.ram, summary::QP_LAST_WQE, r.to[0].index()));
    r.to[0].go(&mut r.e, QpState::Err).expect("ERR once more");
    r.pump();
    assert!(
        !event(&r.b.user.ram, summary::QP_LAST_WQE, r.to[0].index()),
        "once"
    );
    assert!(r.b.rcq.poll().is_none(), "the rest stays");
    r.send(1, 2, 0, 64);
    r.pump();
    assert_eq!(r.b.rcq.one().wr_id, 101);
}

#[test]
fn an_error_of_the_responder_raises_both_events() {
    let mut r = Rig::new(1, 4, 1 << 16, &Conn::default());
    r.srq.post_recv(100, &[r.b.mr.sge(0, 16)]);
    r.srq.post_recv(101, &[r.b.mr.sge(0, 16)]);
    r.send(0, 1, 0, 17);
    r.pump();
    assert_eq!(status(&r.a.scq.one()), WcStatus::RemInvReqErr);
    let c = r.b.rcq.one();
    assert_eq!((status(&c), c.wr_id), (WcStatus::LocLenErr, 100));
    let (ram, i) = (&r.b.user.ram, r.to[0].index());
    assert!(event(ram, summary::QP_REQUEST_ERROR, i));
    assert!(event(ram, summary::QP_LAST_WQE, i));
    assert_eq!(r.to[0].state(&r.e), QpState::Err);
}

#[test]
fn receives_of_a_queue_that_is_reset_or_dropped_go_back() {
    for drop_it in [false, true] {
        let mut r = Rig::new(2, 4, 4 << 20, &Conn::default());
        r.srq.post_recv(100, &[r.b.mr.sge(0, 2 << 20)]);
        r.srq.post_recv(101, &[r.b.mr.sge(0, 4096)]);
        r.send(0, 1, 0, 2 << 20);
        r.e.poll();
        if drop_it {
            r.e.destroy_qp(r.to[0].owner, r.to[0].handle).expect("drop");
        } else {
            r.to[0].go(&mut r.e, QpState::Reset).expect("RESET");
        }
        r.send(1, 2, 0, 64);
        r.send(1, 3, 0, 64);
        r.pump();
        let ids: Vec<_> =
            r.b.rcq
                .drain()
                .iter()
                .map(|c| (c.wr_id, c.wqe, c.qpn))
                .collect();
        let qpn = r.to[1].qpn;
        assert_eq!(ids, [(100, 0, qpn), (101, 1, qpn)], "drop {drop_it}");
    }
}

#[test]
fn keys_are_those_of_the_srqs_protection_domain() {
    let mut r = Rig::new(0, 3, 1 << 16, &Conn::default());
    let other = r.b.user.pd(&mut r.e);
    let srq = r.b.user.srq(&mut r.e, other, 3, 32);
    let mine = r.b.user.mr(&mut r.e, other, 4096, FULL);
    let cap = Cap {
        srq: srq.handle,
        ..Cap::default()
    };
    let mut srq = srq;
    for (small, len) in [(true, 8), (false, 4000)] {
        let mut x = r.a.extra_qp(&mut r.e, Cap::default());
        let y = r.b.extra_qp(&mut r.e, cap);
        connect(&mut r.e, &x, &y, &Conn::default());
        let wr = Wr::new(WrOpcode::Send, 1).sge(r.a.mr.sge(0, len));
        srq.post_recv(5, &[mine.sge(0, 4096)]);
        x.post(&wr);
        r.pump();
        assert_eq!(status(&r.b.rcq.one()), WcStatus::Success, "small {small}");
        assert_eq!(status(&r.a.scq.one()), WcStatus::Success);
        // A region of the QP's domain will not do.
        srq.post_recv(6, &[r.b.mr.sge(0, 4096)]);
        x.post(&wr);
        r.pump();
        assert_eq!(status(&r.b.rcq.one()), WcStatus::LocProtErr);
        assert_eq!(status(&r.a.scq.one()), WcStatus::RemOpErr);
    }
}

#[test]
fn the_limit_event_comes_once() {
    let mut r = Rig::new(1, 3, 1 << 16, &Conn::default());
    let ram = r.b.user.ram.clone();
    let limit = |r: &Rig| event(&r.b.user.ram, summary::SRQ_LIMIT, r.srq.index());
    for i in 0..6 {
        r.srq.post_recv(i, &[r.b.mr.sge(0, 64)]);
    }
    assert_eq!(r.srq.query(&r.e).limit, 0);
    r.srq.arm(&mut r.e, 4).expect("modify_srq");
    assert!(!limit(&r));
    assert_eq!(r.srq.query(&r.e).limit, 4);
    for left in [5, 4] {
        r.send(0, 1, 0, 8);
        r.pump();
        assert!(!limit(&r), "{left} are left");
    }
    let before = r.b.user.wakes.0.load(std::sync::atomic::Ordering::SeqCst);
    r.send(0, 1, 0, 8);
    r.pump();
    assert!(limit(&r), "three are left");
    let after = r.b.user.wakes.0.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(after - before, 1);
    assert_eq!(r.srq.query(&r.e).limit, 0, "no longer armed");
    r.send(0, 1, 0, 8);
    r.pump();
    assert!(!limit(&r));
    // Armed above what is posted: at once.
    r.srq.arm(&mut r.e, 3).expect("modify_srq");
    assert!(limit(&r));
    // Armed and disarmed.
    r.srq.arm(&mut r.e, 2).expect("modify_srq");
    r.srq.arm(&mut r.e, 0).expect("modify_srq");
    r.send(0, 1, 0, 8);
    r.pump();
    assert!(!limit(&r));
    // A count that lies is no reason to fall over: it is bounded by the ring.
    for lie in [u64::MAX, 0, 1 << 31] {
        ram.word(r.srq.ctrl)
            .store(lie, std::sync::atomic::Ordering::SeqCst);
        r.srq.arm(&mut r.e, 8).expect("modify_srq");
        limit(&r);
    }
}

#[test]
fn what_is_asked_of_an_srq_is_checked() {
    let mut r = Rig::new(1, 3, 1 << 16, &Conn::default());
    let (e, b) = (&mut r.e, &mut r.b);
    let id = b.user.id;
    let good = CreateSrq {
        pd: b.pd,
        log2: 3,
        ring: b.user.alloc(64 << 3),
        ctrl: b.user.alloc(64),
        stride: 64,
        reserved: 0,
    };
    let mut refused = |what: CreateSrq, errno, reason| {
        assert_eq!(
            e.create_srq(id, &what),
            Err(VerbError::new(errno, reason)),
            "{what:?}"
        );
    };
    for pd in [good.pd ^ 0x1_0000, good.pd + 1, u32::MAX] {
        refused(CreateSrq { pd, ..good }, Errno::NoEnt, Reason::BadHandle);
    }
    for log2 in [16, 31, 32, u32::MAX] {
        refused(
            CreateSrq { log2, ..good },
            Errno::Inval,
            Reason::BadRingSize,
        );
    }
    for stride in [0, 16, 33, 48, 512, u32::MAX] {
        refused(
            CreateSrq { stride, ..good },
            Errno::Inval,
            Reason::BadStride,
        );
    }
    for bad in [1, 8, 32] {
        let ring = CreateSrq {
            ring: good.ring + bad,
            ..good
        };
        let ctrl = CreateSrq {
            ctrl: good.ctrl + bad,
            ..good
        };
        refused(ring, Errno::Inval, Reason::Misaligned);
        refused(ctrl, Errno::Inval, Reason::Misaligned);
    }
    let len = b.user.ram.len;
    for at in [len, len - 64, !63] {
        let ring = CreateSrq { ring: at, ..good };
        refused(ring, Errno::Fault, Reason::OutsideRam);
    }
    for at in [len, !63] {
        let ctrl = CreateSrq { ctrl: at, ..good };
        refused(ctrl, Errno::Fault, Reason::OutsideRam);
    }
    // The QPs keep it, it keeps its PD.
    let (srq, qp) = (&r.srq, &r.to[0]);
    let busy = VerbError::new(Errno::Busy, Reason::InUse);
    let gone = VerbError::new(Errno::NoEnt, Reason::BadHandle);
    assert_eq!(e.destroy_srq(id, srq.handle), Err(busy));
    let attr = srq.query(e);
    assert_eq!((attr.max_wr, attr.max_sge, attr.limit), (8, 3, 0));
    let limit = |limit| ModifySrq {
        srq: srq.handle,
        limit,
    };
    assert_eq!(
        e.modify_srq(id, &limit(9)),
        Err(VerbError::new(Errno::Inval, Reason::BadAttr))
    );
    e.modify_srq(id, &limit(8)).expect("all of it");
    // Another user's handle, or none.
    assert_eq!(e.query_srq(r.a.user.id, srq.handle), Err(gone));
    assert_eq!(e.modify_srq(r.a.user.id, &limit(1)), Err(gone));
    assert_eq!(e.destroy_srq(r.a.user.id, srq.handle), Err(gone));
    e.destroy_qp(id, qp.handle).expect("destroy_qp");
    e.destroy_srq(id, srq.handle).expect("destroy_srq");
    for handle in [srq.handle, u32::MAX - 1, 0] {
        assert_eq!(e.query_srq(id, handle), Err(gone));
        assert_eq!(e.destroy_srq(id, handle), Err(gone));
    }
    let pd = b.user.pd(e);
    let srq = b.user.srq(e, pd, 0, 32);
    assert_eq!(e.dealloc_pd(id, pd), Err(busy));
    e.destroy_srq(id, srq.handle).expect("destroy_srq");
    e.dealloc_pd(id, pd).expect("dealloc_pd");
}

#[test]
fn as_many_as_the_device_says() {
    let (mut e, _) = engine();
    let user = User::new(&mut e, 1 << 20);
    let pd = user.pd(&mut e);
    let max = e.device_attr(user.id).expect("device_attr").max_srq;
    let req = CreateSrq {
        pd,
        log2: 0,
        ring: 0,
        ctrl: 64,
        stride: 32,
        reserved: 0,
    };
    let all: Vec<u32> = (0..max)
        .map(|i| {
            e.create_srq(user.id, &req)
                .unwrap_or_else(|error| panic!("SRQ {i}: {error}"))
        })
        .collect();
    let full = VerbError::new(Errno::NoMem, Reason::QuotaObjects);
    assert_eq!(e.create_srq(user.id, &req), Err(full));
    e.destroy_srq(user.id, all[7]).expect("destroy_srq");
    let again = e.create_srq(user.id, &req).expect("its place is free");
    assert!(!all.contains(&again));
    e.remove_user(user.id);
    // A user after it has all of them again.
    let mut next = User::new(&mut e, 1 << 20);
    let pd = next.pd(&mut e);
    let cq = CreateCq {
        ring: next.alloc(64),
        ctrl: next.alloc(64),
        log2: 0,
        reserved: 0,
    };
    e.create_cq(next.id, &cq).expect("create_cq");
    next.srq(&mut e, pd, 4, 32);
}
