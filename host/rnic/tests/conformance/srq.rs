//! Shared receive queues: one ring, many QPs.

use crate::common::*;
use crate::fabric::{Fabric, Link, On, patient};

/// A user with an SRQ and several QPs on it, each connected to a QP of the other.
struct Rig {
    f: Fabric,
    /// Sends.
    a: Side,
    /// Receives.
    b: Side,
    srq: Srq,
    from: Vec<Qp>,
    to: Vec<Qp>,
}

impl Rig {
    fn new(on: On, pairs: usize, log2: u32, data_len: u64, conn: &Conn) -> Self {
        let Link {
            mut f,
            mut a,
            mut b,
        } = Link::unconnected(on, data_len, Cap::default());
        let srq = b.user.srq(f.b(), b.pd, log2, 64);
        let cap = Cap {
            srq: srq.handle,
            ..Cap::default()
        };
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            let x = a.extra_qp(f.a(), Cap::default());
            let y = b.extra_qp(f.b(), cap);
            f.connect(&x, &y, conn);
            from.push(x);
            to.push(y);
        }
        Self {
            f,
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

    /// Turns until bytes of a message that are not 0 come to B's region.
    fn begun(&mut self) {
        let (ram, at) = (self.b.user.ram.clone(), self.b.mr.offset);
        self.f.turn_until(|| ram.read(at, 8) != [0; 8]);
    }

    fn pump(&mut self) {
        self.f.pump();
    }
}

fn whoever_gets_a_message_takes_the_next_receive(on: On) {
    let mut r = Rig::new(on, 3, 3, 1 << 20, &patient());
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

fn an_empty_srq_is_not_ready(on: On) {
    let conn = |rnr_retry| Conn {
        rnr_retry,
        ..patient()
    };
    // Without retries the first refusal is the last.
    let mut r = Rig::new(on, 1, 3, 1 << 16, &conn(0));
    r.send(0, 1, 0, 64);
    r.pump();
    assert_eq!(status(&r.a.scq.one()), WcStatus::RnrRetryExcErr);
    assert_eq!(r.from[0].state(r.f.ra()), QpState::Err);
    assert_eq!(
        r.to[0].state(r.f.rb()),
        QpState::Rts,
        "the responder goes on"
    );
    // A WRITE with immediate waits too, and nothing is written.
    let mut r = Rig::new(on, 1, 3, 1 << 16, &conn(1));
    r.b.fill(0, &[7; 64]);
    let wr = Wr::new(WrOpcode::WriteImm, 2).sge(r.a.mr.sge(0, 64));
    r.from[0].post(&wr.to(&r.b.mr, 0));
    r.pump();
    assert_eq!(r.b.data(0, 64), [7; 64]);
    r.srq.post_recv(9, &[]);
    r.f.clock.advance(rnr_ns(14));
    r.pump();
    assert_eq!(status(&r.a.scq.one()), WcStatus::Success);
    assert_eq!(r.b.rcq.one().wr_id, 9);
    assert_eq!(r.b.data(0, 64), [0; 64]);
}

fn rnr_ns(code: u32) -> u64 {
    hyv_abi::types::rnr_timer_ns(code)
}

fn a_long_message_keeps_its_own_receive_while_others_take_the_next(on: On) {
    const LONG: u32 = 1 << 20;
    let mut r = Rig::new(on, 2, 4, 2 << 20, &patient());
    let data = Rng(12).bytes(LONG as usize);
    r.a.fill(0, &data);
    r.srq.post_recv(100, &[r.b.mr.sge(0, LONG)]);
    r.srq.post_recv(101, &[r.b.mr.sge(u64::from(LONG), 4096)]);
    r.send(0, 1, 0, LONG);
    r.begun();
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

fn a_queue_in_error_flushes_what_it_took_and_leaves_the_rest(on: On) {
    let mut r = Rig::new(on, 2, 4, 4 << 20, &patient());
    r.a.fill(0, &vec![9; 2 << 20]);
    r.srq.post_recv(100, &[r.b.mr.sge(0, 2 << 20)]);
    r.srq.post_recv(101, &[r.b.mr.sge(0, 4096)]);
    r.send(0, 1, 0, 2 << 20);
    r.begun();
    r.to[0].go(r.f.b(), QpState::Err).expect("ERR");
    let c = r.b.rcq.one();
    assert_eq!((status(&c), c.wr_id), (WcStatus::WrFlushErr, 100));
    assert_eq!((c.wqe, c.qpn), (0, r.to[0].qpn));
    assert!(event(&r.b.user.ram, summary::QP_LAST_WQE, r.to[0].index()));
    r.to[0].go(r.f.b(), QpState::Err).expect("ERR once more");
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

fn an_error_of_the_responder_raises_both_events(on: On) {
    let mut r = Rig::new(on, 1, 4, 1 << 16, &patient());
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
    assert_eq!(r.to[0].state(r.f.rb()), QpState::Err);
}

fn receives_of_a_queue_that_is_reset_or_dropped_go_back(on: On) {
    for drop_it in [false, true] {
        let mut r = Rig::new(on, 2, 4, 4 << 20, &patient());
        r.a.fill(0, &vec![9; 2 << 20]);
        r.srq.post_recv(100, &[r.b.mr.sge(0, 2 << 20)]);
        r.srq.post_recv(101, &[r.b.mr.sge(0, 4096)]);
        r.send(0, 1, 0, 2 << 20);
        r.begun();
        if drop_it {
            r.f.b()
                .destroy_qp(r.to[0].owner, r.to[0].handle)
                .expect("drop");
        } else {
            r.to[0].go(r.f.b(), QpState::Reset).expect("RESET");
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

fn keys_are_those_of_the_srqs_protection_domain(on: On) {
    let mut r = Rig::new(on, 0, 3, 1 << 16, &patient());
    let other = r.b.user.pd(r.f.b());
    let srq = r.b.user.srq(r.f.b(), other, 3, 32);
    let mine = r.b.user.mr(r.f.b(), other, 4096, FULL);
    let cap = Cap {
        srq: srq.handle,
        ..Cap::default()
    };
    let mut srq = srq;
    for (small, len) in [(true, 8), (false, 4000)] {
        let mut x = r.a.extra_qp(r.f.a(), Cap::default());
        let y = r.b.extra_qp(r.f.b(), cap);
        r.f.connect(&x, &y, &patient());
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

fn the_limit_event_comes_once(on: On) {
    let mut r = Rig::new(on, 1, 3, 1 << 16, &patient());
    let ram = r.b.user.ram.clone();
    let limit = |r: &Rig| event(&r.b.user.ram, summary::SRQ_LIMIT, r.srq.index());
    for i in 0..6 {
        r.srq.post_recv(i, &[r.b.mr.sge(0, 64)]);
    }
    assert_eq!(r.srq.query(r.f.rb()).limit, 0);
    r.srq.arm(r.f.b(), 4).expect("modify_srq");
    assert!(!limit(&r));
    assert_eq!(r.srq.query(r.f.rb()).limit, 4);
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
    assert_eq!(r.srq.query(r.f.rb()).limit, 0, "no longer armed");
    r.send(0, 1, 0, 8);
    r.pump();
    assert!(!limit(&r));
    // Armed above what is posted: at once.
    r.srq.arm(r.f.b(), 3).expect("modify_srq");
    assert!(limit(&r));
    // Armed and disarmed.
    r.srq.arm(r.f.b(), 2).expect("modify_srq");
    r.srq.arm(r.f.b(), 0).expect("modify_srq");
    r.send(0, 1, 0, 8);
    r.pump();
    assert!(!limit(&r));
    // A count that lies is no reason to fall over: it is bounded by the ring.
    for lie in [u64::MAX, 0, 1 << 31] {
        ram.word(r.srq.ctrl)
            .store(lie, std::sync::atomic::Ordering::SeqCst);
        r.srq.arm(r.f.b(), 8).expect("modify_srq");
        limit(&r);
    }
}

on_every_carrier! {
    whoever_gets_a_message_takes_the_next_receive
    an_empty_srq_is_not_ready
    a_long_message_keeps_its_own_receive_while_others_take_the_next
    a_queue_in_error_flushes_what_it_took_and_leaves_the_rest
    an_error_of_the_responder_raises_both_events
    receives_of_a_queue_that_is_reset_or_dropped_go_back
    keys_are_those_of_the_srqs_protection_domain
    the_limit_event_comes_once
}
