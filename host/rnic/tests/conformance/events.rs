//! Completion events, overruns, and the other things that set a bit and wake the user.

use std::sync::atomic::Ordering;

use crate::common::*;
use crate::fabric::{Link, On, patient};

const LEN: u64 = 1 << 16;

fn wakes(u: &User) -> u64 {
    u.wakes.0.load(Ordering::SeqCst)
}

fn send(p: &mut Link, solicited: bool) {
    p.b.qp.post_recv(1, &[p.b.mr.sge(0, 64)]);
    let wr = Wr::new(WrOpcode::Send, 2).inline(b"event");
    p.a.qp.post(&if solicited {
        wr.with(flags::SOLICITED)
    } else {
        wr
    });
    p.pump();
    assert_eq!(p.a.scq.one().status, 0);
}

fn one_event_for_each_time_it_is_asked_for(on: On) {
    let mut p = Link::new(on, LEN);
    let index = p.b.rcq.index();
    send(&mut p, false);
    assert_eq!(
        (pending(&p.b.user.ram), wakes(&p.b.user)),
        (0, 0),
        "not armed"
    );
    for round in 0..5u64 {
        p.b.rcq.arm(arm::ANY);
        p.pump();
        assert_eq!(
            pending(&p.b.user.ram),
            0,
            "armed after the completion: polling finds it"
        );
        send(&mut p, false);
        assert!(
            event(&p.b.user.ram, summary::CQ_COMPLETION, index),
            "round {round}"
        );
        assert_eq!(wakes(&p.b.user), round + 1);
        assert_eq!(
            p.b.user.ram.word(p.b.rcq.ctrl + 8).load(Ordering::SeqCst),
            arm::NONE
        );
        send(&mut p, true);
        assert_eq!(pending(&p.b.user.ram), 0, "one arm, one event");
        assert_eq!(wakes(&p.b.user), round + 1);
    }
    assert_eq!(p.b.rcq.drain().len(), 11, "every message completed");
    assert_eq!(wakes(&p.a.user), 0);
}

fn solicited_only(on: On) {
    let mut p = Link::new(on, LEN);
    let index = p.b.rcq.index();
    p.b.rcq.arm(arm::SOLICITED);
    for _ in 0..3 {
        send(&mut p, false);
    }
    assert_eq!(pending(&p.b.user.ram), 0, "nobody solicited");
    send(&mut p, true);
    assert!(event(&p.b.user.ram, summary::CQ_COMPLETION, index));
    // An earlier solicited completion does not answer a later arm.
    p.b.rcq.arm(arm::SOLICITED);
    send(&mut p, false);
    assert_eq!(pending(&p.b.user.ram), 0);
    // WRITE with immediate can solicit too.
    p.b.qp.post_recv(1, &[]);
    let wr = Wr::new(WrOpcode::WriteImm, 2).inline(b"x").to(&p.b.mr, 0);
    p.a.qp.post(&wr.with(flags::SOLICITED));
    p.pump();
    assert!(event(&p.b.user.ram, summary::CQ_COMPLETION, index));
    // On the sender's side the flag means nothing, an error does.
    p.a.scq.drain();
    p.a.scq.arm(arm::SOLICITED);
    send(&mut p, true);
    assert_eq!(
        pending(&p.a.user.ram),
        0,
        "a send's success is not solicited"
    );
    p.b.rcq.arm(arm::SOLICITED);
    p.b.qp.post_recv(1, &[]);
    p.a.qp
        .post(&Wr::new(WrOpcode::Send, 2).inline(b"too long").unsignaled());
    p.pump();
    assert!(
        event(&p.b.user.ram, summary::CQ_COMPLETION, index),
        "errors solicit"
    );
    assert!(
        event(&p.a.user.ram, summary::CQ_COMPLETION, p.a.scq.index()),
        "errors solicit"
    );
}

fn a_flush_by_a_control_verb_raises_the_event_too(on: On) {
    let mut p = Link::new(on, LEN);
    p.b.qp.post_recv(1, &[]);
    p.b.rcq.arm(arm::SOLICITED);
    p.b.qp.go(p.f.b(), QpState::Err).expect("ERR");
    assert!(event(
        &p.b.user.ram,
        summary::CQ_COMPLETION,
        p.b.rcq.index()
    ));
    assert_eq!(wakes(&p.b.user), 1);
    // A disconnect, likewise.
    p.a.qp.post_recv(1, &[]);
    p.a.rcq.arm(arm::ANY);
    p.f.a().fail_qpn(p.a.user.id, p.a.qp.qpn);
    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err);
    assert!(event(
        &p.a.user.ram,
        summary::CQ_COMPLETION,
        p.a.rcq.index()
    ));
}

/// A third user's connection, which must go on whatever happens to the first.
fn others_go_on(p: &mut Link, x: &mut Side, y: &mut Side) {
    y.qp.post_recv(1, &[y.mr.sge(0, 64)]);
    x.qp.post(&Wr::new(WrOpcode::Send, 2).inline(b"on"));
    p.pump();
    assert_eq!((x.scq.one().status, y.rcq.one().status), (0, 0));
}

fn a_send_queues_cq_overruns(on: On) {
    let mut p = Link::new(on, LEN);
    let mut x = Side::new(p.f.a(), LEN, Cap::default());
    let mut y = Side::new(p.f.b(), LEN, Cap::default());
    p.f.connect(&x.qp, &y.qp, &patient());
    let mut cq = p.a.user.cq(p.f.a(), 2);
    let mut q = p.a.user.qp(p.f.a(), p.a.pd, &cq, &p.a.rcq, Cap::default());
    let mut r = p.b.extra_qp(p.f.b(), Cap::default());
    p.f.connect(&q, &r, &patient());
    r.post_recv(9, &[]);
    q.post_recv(8, &[]);
    for i in 0..10u64 {
        let wr = Wr::new(WrOpcode::Write, i)
            .inline(&[0xaa; 8])
            .to(&p.b.mr, 64 * i);
        q.post_silently(&wr);
    }
    let _ = q.ring();
    p.pump();
    assert!(event(&p.a.user.ram, summary::CQ_ERROR, cq.index()));
    assert!(event(&p.a.user.ram, summary::QP_FATAL, q.index()));
    assert!(wakes(&p.a.user) > 0);
    assert_eq!(q.state(p.f.ra()), QpState::Err);
    for i in 0..10u64 {
        let moved = p.b.data(64 * i, 8) == [0xaa; 8];
        match i {
            0..4 => assert!(moved, "WRITE {i}"),
            // It moved before its completion found no place.
            4 => {}
            // So did those that were on their way with it, if there is a way.
            _ => assert!(on != On::Memory || !moved, "WRITE {i}"),
        }
    }
    let ids: Vec<u64> = std::iter::from_fn(|| cq.poll_quietly())
        .map(|c| c.wr_id)
        .collect();
    assert_eq!(ids, [0, 1, 2, 3], "what was written stays");
    cq.publish();
    let c = p.a.rcq.one();
    assert_eq!(
        (c.wr_id, status(&c)),
        (8, WcStatus::WrFlushErr),
        "its receives flush"
    );
    let _ = q.ring();
    q.post_silently(&Wr::new(WrOpcode::Write, 11).inline(&[1]).to(&p.b.mr, 0));
    let _ = q.ring();
    p.pump();
    assert!(cq.poll().is_none(), "an overrun CQ takes nothing more");
    others_go_on(&mut p, &mut x, &mut y);
    // Also the same users' other queues.
    p.b.qp.post_recv(1, &[p.b.mr.sge(0, 64)]);
    p.a.qp.post(&Wr::new(WrOpcode::Send, 2).inline(b"on"));
    p.pump();
    assert_eq!(p.a.scq.one().status, 0);
    assert_eq!(pending(&p.a.user.ram), 0, "one event each");
    // Destroyed and made anew, it works.
    p.f.a()
        .destroy_qp(p.a.user.id, q.handle)
        .expect("destroy_qp");
    p.f.a()
        .destroy_cq(p.a.user.id, cq.handle)
        .expect("destroy_cq");
}

fn a_receive_queues_cq_overruns(on: On) {
    let mut p = Link::new(on, LEN);
    let mut x = Side::new(p.f.a(), LEN, Cap::default());
    let mut y = Side::new(p.f.b(), LEN, Cap::default());
    p.f.connect(&x.qp, &y.qp, &patient());
    let mut cq = p.b.user.cq(p.f.b(), 1);
    let mut r = p.b.user.qp(p.f.b(), p.b.pd, &p.b.scq, &cq, Cap::default());
    let mut q = p.a.extra_qp(p.f.a(), Cap::default());
    p.f.connect(&q, &r, &patient());
    for i in 0..6 {
        r.post_recv(i, &[p.b.mr.sge(0, 64)]);
    }
    for i in 0..3u64 {
        q.post(&Wr::new(WrOpcode::Send, i).inline(b"x"));
        p.pump();
    }
    assert!(event(&p.b.user.ram, summary::CQ_ERROR, cq.index()));
    assert!(event(&p.b.user.ram, summary::QP_FATAL, r.index()));
    assert_eq!(r.state(p.f.rb()), QpState::Err);
    assert_eq!(pending(&p.a.user.ram), 0);
    let got: Vec<u64> = cq.drain().iter().map(|c| c.wr_id).collect();
    assert_eq!(got, [0, 1]);
    p.pump();
    assert!(cq.poll().is_none());
    let sends = p.a.scq.drain();
    assert!(
        sends.len() >= 2 && sends[..2].iter().all(|c| c.status == 0),
        "{sends:?}"
    );
    others_go_on(&mut p, &mut x, &mut y);
}

fn a_full_cq_that_is_polled_in_time_loses_nothing(on: On) {
    let mut p = Link::new(on, LEN);
    let mut cq = p.a.user.cq(p.f.a(), 2);
    let mut q = p.a.user.qp(p.f.a(), p.a.pd, &cq, &p.a.rcq, Cap::default());
    let r = p.b.extra_qp(p.f.b(), Cap::default());
    p.f.connect(&q, &r, &patient());
    for round in 0..200u64 {
        for i in 0..4 {
            q.post(
                &Wr::new(WrOpcode::Write, 4 * round + i)
                    .inline(&[1])
                    .to(&p.b.mr, 0),
            );
        }
        p.pump();
        let got: Vec<u64> = cq.drain().iter().map(|c| c.wr_id).collect();
        assert_eq!(got, (4 * round..4 * round + 4).collect::<Vec<_>>());
    }
    assert_eq!(pending(&p.a.user.ram), 0);
}

/// The first message to a QP in RTR says that the other side is established (IBA 1.4, 11.6.3.2).
fn communication_established(on: On) {
    for op in [WrOpcode::Send, WrOpcode::Write, WrOpcode::Read] {
        let c = patient();
        let mut p = Link::unconnected(on, LEN, Cap::default());
        p.f.rtr_a(&p.a.qp, p.b.qp.qpn, &c);
        p.f.rtr_b(&p.b.qp, p.a.qp.qpn, &c);
        p.a.qp.rts(p.f.a(), &c);
        p.pump();
        let Link { f, a, b } = &mut p;
        assert_eq!(pending(&b.user.ram), 0);
        for i in 0..3 {
            b.qp.post_recv(1, &[b.mr.sge(0, 64)]);
            a.qp.post(&Wr::new(op, 2).sge(a.mr.sge(0, 8)).to(&b.mr, 0));
            f.pump();
            assert_eq!(a.scq.one().status, 0);
            let raised = pending(&b.user.ram) != 0
                && event(&b.user.ram, summary::QP_COMM_ESTABLISHED, b.qp.index());
            assert_eq!(raised, i == 0, "{op:?}, message {i}");
            assert_eq!(wakes(&b.user), 1);
        }
        b.qp.rts(f.b(), &c);
        a.qp.post_recv(1, &[a.mr.sge(0, 64)]);
        b.qp.post(&Wr::new(WrOpcode::Send, 2));
        f.pump();
        assert_eq!(pending(&a.user.ram), 0, "in RTS: no news");
    }
}

on_every_carrier! {
    one_event_for_each_time_it_is_asked_for
    solicited_only
    a_flush_by_a_control_verb_raises_the_event_too
    a_send_queues_cq_overruns
    a_receive_queues_cq_overruns
    a_full_cq_that_is_polled_in_time_loses_nothing
    communication_established
}
