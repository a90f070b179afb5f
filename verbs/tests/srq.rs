//! Shared receive queues against a host that plays the device.
#![cfg(not(loom))]

mod common;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use common::FakeHost;
use hyv_abi::control::Opcode;
use hyv_verbs::{
    Access, AsyncEvent, CompletionQueue, Context, Error, Gid, MemoryRegion, Payload, PostError,
    ProtectionDomain, QpInitAttr, QpType, QueuePair, RecvWr, RtrParams, RtsParams, SendOp, SendWr,
    SharedReceiveQueue, SrqCaps, WcStatus,
};
use proptest::prelude::*;

/// Senders, and receivers that share a queue; each receiver has a completion queue of its own.
struct Rig {
    host: Arc<FakeHost>,
    context: Context,
    pd: ProtectionDomain,
    mr: MemoryRegion,
    srq: SharedReceiveQueue,
    send_cq: CompletionQueue,
    cqs: Vec<CompletionQueue>,
    senders: Vec<QueuePair>,
    receivers: Vec<Option<QueuePair>>,
}

/// Bytes of a receive buffer; one for each wr_id.
const BUFFER: u64 = 64;

impl Rig {
    fn new(pairs: usize, max_wr: u32) -> Self {
        let (host, context) = FakeHost::open();
        let pd = context.alloc_pd().unwrap();
        let mut rig = Self {
            mr: pd.alloc_mr(1 << 20, Access::LOCAL_WRITE).unwrap(),
            srq: pd.create_srq(&SrqCaps { max_wr, max_sge: 1 }).unwrap(),
            send_cq: context.create_cq(256).unwrap(),
            cqs: Vec::new(),
            senders: Vec::new(),
            receivers: Vec::new(),
            host,
            context,
            pd,
        };
        for _ in 0..pairs {
            rig.add();
        }
        rig
    }

    fn add(&mut self) {
        let cq = self.context.create_cq(2048).unwrap();
        let sends = QpInitAttr::new(QpType::Rc, &self.send_cq, &self.send_cq);
        let mut sender = self.pd.create_qp_ex(&sends).unwrap();
        let takes = QpInitAttr::new(QpType::Rc, &cq, &cq).with_srq(&self.srq);
        let mut receiver = self.pd.create_qp_ex(&takes).unwrap();
        let (a, b) = (sender.qpn(), receiver.qpn());
        for (qp, peer) in [(&mut sender, b), (&mut receiver, a)] {
            qp.to_init(Access::empty()).unwrap();
            qp.to_rtr(&RtrParams::to(Gid::LOCAL, peer, 0)).unwrap();
            qp.to_rts(&RtsParams::from_psn(0)).unwrap();
        }
        self.cqs.push(cq);
        self.senders.push(sender);
        self.receivers.push(Some(receiver));
    }

    fn post(&mut self, wr_id: u64) -> Result<(), PostError> {
        self.srq.post_recv(&RecvWr {
            wr_id,
            sges: &[self.mr.sge(wr_id * BUFFER, BUFFER as u32)],
        })
    }

    fn send(&mut self, i: usize, data: &[u8]) {
        let wr = SendWr::new(0, SendOp::Send, Payload::Inline(data));
        self.senders[i].post_send(&wr).unwrap();
        self.host.step();
        while self.send_cq.poll_one().is_some() {}
    }

    fn buffer(&self, wr_id: u64, len: usize) -> Vec<u8> {
        let mut to = vec![0; len];
        self.mr.read((wr_id * BUFFER) as usize, &mut to).unwrap();
        to
    }

    fn qpn(&self, i: usize) -> u32 {
        self.receivers[i].as_ref().unwrap().qpn()
    }
}

#[test]
fn messages_to_several_queue_pairs_take_receives_of_one() {
    let mut rig = Rig::new(3, 8);
    for i in 0..6 {
        rig.post(i).unwrap();
    }
    for i in 0..6u64 {
        let (at, text) = (i as usize % 3, format!("message {i}"));
        rig.send(at, text.as_bytes());
        let wc = rig.cqs[at].poll_one().unwrap();
        assert_eq!((wc.wr_id, wc.status), (i, WcStatus::Success));
        assert_eq!(wc.qpn, rig.qpn(at));
        assert_eq!(rig.buffer(i, text.len()), text.as_bytes());
    }
    let wr = RecvWr {
        wr_id: 0,
        sges: &[],
    };
    let qp = rig.receivers[0].as_mut().unwrap();
    assert_eq!(qp.post_recv(&wr), Err(PostError::SharedReceives));
    let sges = [rig.mr.sge(0, 1); 2];
    let wr = RecvWr {
        wr_id: 0,
        sges: &sges,
    };
    assert_eq!(rig.srq.post_recv(&wr), Err(PostError::TooManySges));
}

#[test]
fn a_full_queue_says_so_and_lists_say_where_they_stopped() {
    let mut rig = Rig::new(1, 4);
    assert_eq!((rig.srq.capacity(), rig.srq.room()), (4, 4));
    let sges = [rig.mr.sge(0, 8)];
    let list: Vec<_> = (0..6).map(|wr_id| RecvWr { wr_id, sges: &sges }).collect();
    let stopped = rig.srq.post_recv_list(&list).unwrap_err();
    assert_eq!((stopped.posted, stopped.error), (4, PostError::QueueFull));
    let ctrl = rig.host.device().srqs.values().next().unwrap().request.ctrl;
    assert_eq!(rig.host.load(ctrl), 4, "posted ones are counted");
    assert_eq!(rig.srq.room(), 0);
    rig.send(0, b"x");
    assert_eq!(rig.post(9), Err(PostError::QueueFull), "not polled yet");
    assert!(rig.cqs[0].poll_one().is_some());
    rig.post(9).unwrap();
    assert_eq!(rig.post(9), Err(PostError::QueueFull));
    assert_eq!(rig.host.load(ctrl), 5);
    let query = rig.srq.query().unwrap();
    assert_eq!((query.max_wr, query.max_sge, query.limit), (4, 1, 0));
}

/// What a long message has taken does not hold up the others, however often the ring goes around, and its payload goes where
/// its own receive says.
#[test]
fn a_message_that_takes_long_holds_up_nobody() {
    let mut rig = Rig::new(2, 4);
    for i in 0..4 {
        rig.post(i).unwrap();
    }
    rig.host.begin_message(rig.qpn(1));
    let mut next = 4;
    for lap in 1..200u64 {
        rig.send(0, &lap.to_le_bytes());
        let wc = rig.cqs[0].poll_one().unwrap();
        assert_eq!(rig.buffer(wc.wr_id, 8), lap.to_le_bytes());
        rig.post(next).unwrap();
        next += 1;
    }
    rig.host.end_message(rig.qpn(1), b"at last");
    let wc = rig.cqs[1].poll_one().unwrap();
    assert_eq!((wc.wr_id, wc.status), (0, WcStatus::Success));
    assert_eq!(rig.buffer(0, 7), b"at last");
    rig.post(next).unwrap();
    assert_eq!(rig.post(next + 1), Err(PostError::QueueFull));
}

/// What a queue pair had taken when it went is there for the next message.
#[test]
fn receives_that_went_with_a_queue_pair_are_taken_again() {
    for reset in [true, false] {
        let mut rig = Rig::new(2, 4);
        for i in 0..4 {
            rig.post(i).unwrap();
        }
        rig.host.begin_message(rig.qpn(1));
        if reset {
            rig.receivers[1].as_mut().unwrap().to_reset().unwrap();
        } else {
            rig.receivers[1] = None;
        }
        for i in 0..10_000u64 {
            assert_eq!(rig.srq.room(), 0);
            rig.send(0, &i.to_le_bytes());
            let wc = rig.cqs[0].poll_one().unwrap();
            assert_eq!(wc.wr_id, i % 4);
            assert_eq!(rig.buffer(wc.wr_id, 8), i.to_le_bytes());
            rig.post(wc.wr_id).unwrap();
        }
    }
}

/// A completion that nobody polls and a message that does not end cost a place each, however many others go by.
#[test]
fn a_completion_that_is_not_polled_holds_up_nobody() {
    let mut rig = Rig::new(3, 4);
    for i in 0..4 {
        rig.post(i).unwrap();
    }
    rig.send(1, b"waits");
    rig.host.begin_message(rig.qpn(2));
    for i in 0..200_000u64 {
        rig.send(0, &i.to_le_bytes());
        let wc = rig.cqs[0].poll_one().unwrap();
        assert_eq!(rig.buffer(wc.wr_id, 8), i.to_le_bytes());
        rig.post(wc.wr_id).unwrap();
        assert_eq!(rig.post(9), Err(PostError::QueueFull));
    }
    rig.host.end_message(rig.qpn(2), b"at last");
    for (cq, wr_id, text) in [(1, 0, &b"waits"[..]), (2, 1, b"at last")] {
        assert_eq!(rig.cqs[cq].poll_one().unwrap().wr_id, wr_id);
        assert_eq!(rig.buffer(wr_id, text.len()), text);
    }
    assert_eq!(rig.srq.room(), 2);
}

/// Completions of a destroyed queue pair are not shown, but what they took can be posted again: when they are polled, when the
/// index is another's by then, and when the completion queue is dropped with them.
#[test]
fn completions_of_destroyed_queue_pairs_give_receives_back() {
    let mut rig = Rig::new(1, 4);
    for round in 0..3 {
        while rig.srq.room() > 0 {
            rig.post(round).unwrap();
        }
        for _ in 0..4 {
            rig.send(0, b"z");
        }
        rig.receivers[0] = None;
        if round == 1 {
            let used = rig.host.device().next_handle;
            // Whoever comes next gets the index of the one that went.
            rig.host.device().next_handle = used - 1;
        }
        assert_eq!(rig.srq.room(), 0);
        if round == 2 {
            rig.cqs.clear();
        } else {
            assert!(rig.cqs[0].poll_one().is_none());
        }
        assert_eq!(rig.srq.room(), 4, "round {round}");
        rig.cqs.clear();
        rig.senders.clear();
        rig.receivers.clear();
        rig.add();
    }
}

#[test]
fn an_index_that_is_anothers_by_now_does_not_hide_the_old_completions() {
    let mut rig = Rig::new(1, 4);
    for i in 0..4 {
        rig.post(i).unwrap();
    }
    // Known to its completion queue before it goes.
    rig.send(0, b"a");
    assert_eq!(rig.cqs[0].poll_one().unwrap().wr_id, 0);
    for _ in 0..3 {
        rig.send(0, b"b");
    }
    let old = rig.receivers[0].take().unwrap();
    let index = old.index();
    drop(old);
    rig.host.device().next_handle = u32::from(index);
    let takes = QpInitAttr::new(QpType::Rc, &rig.cqs[0], &rig.cqs[0]).with_srq(&rig.srq);
    let new = rig.pd.create_qp_ex(&takes).unwrap();
    assert_eq!(new.index(), index);
    // A third one makes the completion queue learn of both while old completions wait in front.
    assert!(rig.cqs[0].poll_one().is_none());
    assert_eq!(rig.srq.room(), 4);
}

#[test]
fn the_limit_is_an_event_once() {
    let mut rig = Rig::new(1, 8);
    for i in 0..4 {
        rig.post(i).unwrap();
    }
    rig.srq.set_limit(3).unwrap();
    assert_eq!(rig.srq.query().unwrap().limit, 3);
    rig.send(0, b"1");
    assert_eq!(rig.context.poll_async_event(), None);
    rig.send(0, b"2");
    rig.send(0, b"3");
    let second = Some(Duration::from_secs(1));
    assert_eq!(
        rig.context.get_async_event(second).unwrap(),
        Some(AsyncEvent::SrqLimit(rig.srq.index()))
    );
    assert_eq!(rig.context.poll_async_event(), None);
    assert_eq!(rig.srq.query().unwrap().limit, 0);
    // Events of a queue that is gone are not another's.
    rig.srq.set_limit(8).unwrap();
    rig.senders.clear();
    rig.receivers.clear();
    rig.srq.destroy().unwrap();
    assert_eq!(rig.context.poll_async_event(), None);
}

#[test]
fn a_queue_pair_in_error_says_that_it_takes_no_more() {
    let mut rig = Rig::new(1, 8);
    rig.post(1).unwrap();
    let qp = rig.receivers[0].as_mut().unwrap();
    qp.to_err().unwrap();
    let last = AsyncEvent::QpLastWqe(qp.index());
    assert_eq!(rig.context.poll_async_event(), Some(last));
    rig.host.step();
    assert!(rig.cqs[0].poll_one().is_none(), "the rest is for others");
    assert_eq!(rig.srq.room(), 7);
}

#[test]
fn queues_live_as_long_as_they_are_used() {
    let rig = Rig::new(1, 8);
    let before = rig.host.device().log.len();
    let Rig {
        host,
        context,
        pd,
        mr,
        srq,
        send_cq,
        cqs,
        senders,
        receivers,
    } = rig;
    drop((pd, mr, send_cq, cqs, senders));
    assert_eq!(srq.destroy(), Err(Error::InUse));
    assert!(!host.device().log[before..].contains(&Opcode::DestroySrq));
    drop(receivers);
    let log = host.device().log[before..].to_vec();
    let at = |verb: Opcode| log.iter().rposition(|v| *v == verb).unwrap();
    assert!(at(Opcode::DestroySrq) > at(Opcode::DestroyQp));
    assert!(at(Opcode::DeallocPd) > at(Opcode::DestroySrq));
    let d = host.device();
    assert!(d.srqs.is_empty() && d.qps.is_empty() && d.pds.is_empty());
    drop(d);
    let (other_host, other) = FakeHost::open();
    let (pd, cq) = (context.alloc_pd().unwrap(), context.create_cq(4).unwrap());
    let foreign = other
        .alloc_pd()
        .unwrap()
        .create_srq(&SrqCaps::default())
        .unwrap();
    let attr = QpInitAttr::new(QpType::Rc, &cq, &cq).with_srq(&foreign);
    assert_eq!(pd.create_qp_ex(&attr).unwrap_err(), Error::OtherContext);
    drop(other_host);
    for caps in [(0, 1), (32_769, 1), (1, 16)] {
        let (max_wr, max_sge) = caps;
        assert!(matches!(
            pd.create_srq(&SrqCaps { max_wr, max_sge }),
            Err(Error::BadSize { .. })
        ));
    }
}

#[derive(Clone, Debug)]
enum Op {
    Post,
    Send(usize),
    Begin(usize),
    End(usize),
    Poll(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::Post),
        3 => (0..3usize).prop_map(Op::Send),
        1 => (0..3usize).prop_map(Op::Begin),
        1 => (0..3usize).prop_map(Op::End),
        3 => (0..3usize).prop_map(Op::Poll),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the order: as long as fewer receives are outstanding than were asked for, one more can be posted, each
    /// completes once, and payload is where its own receive says.
    #[test]
    fn a_receive_fits_for_each_that_completed(ops in prop::collection::vec(op(), 1..400)) {
        const WR: u32 = 8;
        let mut rig = Rig::new(3, WR);
        let mut names: VecDeque<u64> = (0..1000).collect();
        let mut outstanding = std::collections::BTreeMap::new();
        let mut taken = 0u32;
        let mut posted = 0u32;
        let mut busy = [false; 3];
        let mut expected: [VecDeque<u64>; 3] = Default::default();
        let mut stamp = 0u64;
        for op in ops {
            match op {
                Op::Post if (outstanding.len() as u32) < WR => {
                    let name = names.pop_front().unwrap();
                    prop_assert_eq!(rig.post(name), Ok(()));
                    outstanding.insert(name, ());
                    posted += 1;
                }
                Op::Send(i) if taken < posted && !busy[i] => {
                    stamp += 1;
                    rig.send(i, &stamp.to_le_bytes());
                    expected[i].push_back(stamp);
                    taken += 1;
                }
                Op::Begin(i) if taken < posted && !busy[i] => {
                    rig.host.begin_message(rig.qpn(i));
                    busy[i] = true;
                    taken += 1;
                }
                Op::End(i) if busy[i] => {
                    stamp += 1;
                    rig.host.end_message(rig.qpn(i), &stamp.to_le_bytes());
                    expected[i].push_back(stamp);
                    busy[i] = false;
                }
                Op::Poll(i) => {
                    let wc = rig.cqs[i].poll_one();
                    prop_assert_eq!(wc.is_some(), !expected[i].is_empty());
                    if let Some(wc) = wc {
                        let stamp = expected[i].pop_front().unwrap();
                        prop_assert!(wc.is_ok());
                        prop_assert_eq!(rig.buffer(wc.wr_id, 8), stamp.to_le_bytes());
                        prop_assert!(outstanding.remove(&wc.wr_id).is_some());
                        names.push_back(wc.wr_id);
                    }
                }
                _ => {}
            }
        }
    }
}
