//! Queue pairs and completion queues against a host that plays the device.
#![cfg(not(loom))]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::FakeHost;
use hyv_verbs::{
    Access, AsyncEvent, CompletionQueue, Context, Event, Gid, MemoryRegion, Payload, PostError,
    ProtectionDomain, QpCaps, QpState, QueuePair, RecvWr, RtrParams, RtsParams, SendFlags, SendOp,
    SendWr, WcOpcode, WcStatus, WorkCompletion,
};

struct Pair {
    host: Arc<FakeHost>,
    context: Context,
    pd: ProtectionDomain,
    mr: MemoryRegion,
    send_cq: CompletionQueue,
    recv_cq: CompletionQueue,
    a: QueuePair,
    b: QueuePair,
}

fn everything() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC
}

fn join(a: &mut QueuePair, b: &mut QueuePair) {
    let (qa, qb) = (a.qpn(), b.qpn());
    for (qp, peer) in [(a, qb), (b, qa)] {
        qp.to_init(everything()).unwrap();
        qp.to_rtr(&RtrParams::to(Gid::LOCAL, peer, 0)).unwrap();
        qp.to_rts(&RtsParams::from_psn(0)).unwrap();
        assert_eq!(qp.state(), QpState::Rts);
    }
}

fn pair(caps: QpCaps, cqe: u32) -> Pair {
    let (host, context) = FakeHost::open();
    let pd = context.alloc_pd().unwrap();
    let mr = pd.alloc_mr(1 << 20, everything()).unwrap();
    let send_cq = context.create_cq(cqe).unwrap();
    let recv_cq = context.create_cq(cqe).unwrap();
    let mut a = pd.create_qp(&send_cq, &recv_cq, &caps).unwrap();
    let mut b = pd.create_qp(&send_cq, &recv_cq, &caps).unwrap();
    join(&mut a, &mut b);
    Pair {
        host,
        context,
        pd,
        mr,
        send_cq,
        recv_cq,
        a,
        b,
    }
}

fn wide() -> QpCaps {
    QpCaps {
        max_send_sge: 16,
        max_recv_sge: 15,
        max_inline_data: 416,
        ..QpCaps::default()
    }
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + 1) as u8).collect()
}

impl Pair {
    fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut to = vec![0; len];
        self.mr.read(offset, &mut to).unwrap();
        to
    }

    fn sent(&mut self) -> WorkCompletion {
        self.host.step();
        self.send_cq.poll_one().expect("a send completion")
    }

    fn received(&mut self) -> WorkCompletion {
        self.host.step();
        self.recv_cq.poll_one().expect("a receive completion")
    }
}

#[test]
fn inline_sends_of_every_length_arrive() {
    let mut p = pair(wide(), 64);
    for len in 0..=416usize {
        p.mr.write(0, &[0; 512]).unwrap();
        p.b.post_recv(&RecvWr {
            wr_id: 1,
            sges: &[p.mr.sge(0, 512)],
        })
        .unwrap();
        let data = bytes(len);
        let parts: Vec<&[u8]> = data.chunks(100).collect();
        let payload = if len % 2 == 0 {
            Payload::Inline(&data)
        } else {
            Payload::InlineParts(&parts)
        };
        p.a.post_send(&SendWr::new(2, SendOp::Send, payload))
            .unwrap();
        let wc = p.received();
        assert_eq!(
            (wc.wr_id, wc.status, wc.opcode),
            (1, WcStatus::Success, WcOpcode::Recv)
        );
        assert_eq!(wc.byte_len as usize, len);
        assert_eq!(wc.inline_data(), (len <= 32).then_some(&data[..]));
        assert_eq!(p.get(0, len), data, "{len} bytes in the buffer");
        assert_eq!(p.get(len, 96), [0; 96], "and none after");
        assert_eq!(p.sent().wr_id, 2);
    }
}

#[test]
fn sges_gather_and_scatter() {
    for data_in_cqe in [true, false] {
        let mut p = pair(wide(), 64);
        p.host.data_in_cqe.store(data_in_cqe, Ordering::Relaxed);
        for n in 1..=16usize {
            let mut expect = Vec::new();
            let mut sges = Vec::new();
            for i in 0..n {
                let piece = vec![i as u8 + 1; i + 1];
                p.mr.write(i * 64, &piece).unwrap();
                sges.push(p.mr.sge(i as u64 * 64, i as u32 + 1));
                expect.extend(piece);
            }
            let into: Vec<_> = (0..15).map(|i| p.mr.sge(0x8000 + i * 16, 10)).collect();
            p.mr.write(0x8000, &[0; 256]).unwrap();
            p.b.post_recv(&RecvWr {
                wr_id: 5,
                sges: &into,
            })
            .unwrap();
            p.a.post_send(&SendWr::new(
                6,
                SendOp::SendImm(0xfeed),
                Payload::Sges(&sges),
            ))
            .unwrap();
            let wc = p.received();
            assert_eq!((wc.byte_len as usize, wc.imm), (expect.len(), Some(0xfeed)));
            let got: Vec<u8> = (0..15).flat_map(|i| p.get(0x8000 + i * 16, 10)).collect();
            assert_eq!(&got[..expect.len()], &expect[..], "{n} SGEs");
            assert!(p.sent().is_ok());
        }
    }
}

#[test]
fn reads_writes_and_atomics() {
    for data_in_cqe in [true, false] {
        let mut p = pair(QpCaps::default(), 64);
        p.host.data_in_cqe.store(data_in_cqe, Ordering::Relaxed);
        for len in [1u32, 8, 31, 32, 33, 4096] {
            let data = bytes(len as usize);
            p.mr.write(0, &data).unwrap();
            let write = SendOp::Write(p.mr.remote(0x10000));
            p.a.post_send(&SendWr::new(1, write, Payload::Sges(&[p.mr.sge(0, len)])))
                .unwrap();
            assert_eq!(p.sent().opcode, WcOpcode::Write);
            assert_eq!(p.get(0x10000, len as usize), data);
            let read = SendOp::Read(p.mr.remote(0x10000));
            p.b.post_send(&SendWr::new(
                2,
                read,
                Payload::Sges(&[p.mr.sge(0x20000, len)]),
            ))
            .unwrap();
            let wc = p.sent();
            assert_eq!(
                (wc.opcode, wc.byte_len, wc.is_ok()),
                (WcOpcode::Read, len, true)
            );
            assert_eq!(p.get(0x20000, len as usize), data);
        }
        // An empty SGE takes nothing, also of payload that comes in the completion.
        p.mr.write(0x20000, &[0; 64]).unwrap();
        let sges = [p.mr.sge(0, 0), p.mr.sge(0x20000, 20)];
        let read = SendOp::Read(p.mr.remote(0x10000));
        let mut q = p.pd.create_qp(&p.send_cq, &p.recv_cq, &wide()).unwrap();
        let mut r = p.pd.create_qp(&p.send_cq, &p.recv_cq, &wide()).unwrap();
        join(&mut q, &mut r);
        q.post_send(&SendWr::new(2, read, Payload::Sges(&sges)))
            .unwrap();
        assert!(p.sent().is_ok());
        assert_eq!(p.get(0x20000, 20), bytes(20));
        let word = p.mr.atomic_u64(0x100).unwrap();
        word.store(40, Ordering::Relaxed);
        let remote = p.mr.remote(0x100);
        let local = [p.mr.sge(0x200, 8)];
        p.a.post_send(&SendWr::new(
            3,
            SendOp::FetchAdd { remote, add: 2 },
            Payload::Sges(&local),
        ))
        .unwrap();
        assert_eq!(p.sent().opcode, WcOpcode::FetchAdd);
        let swap = SendOp::CmpSwp {
            remote,
            compare: 42,
            swap: 7,
        };
        assert_eq!(p.get(0x200, 8), 40u64.to_le_bytes());
        p.a.post_send(&SendWr::new(4, swap, Payload::Sges(&local)))
            .unwrap();
        assert_eq!(p.sent().opcode, WcOpcode::CmpSwp);
        assert_eq!(p.get(0x200, 8), 42u64.to_le_bytes());
        assert_eq!(p.get(0x100, 8), 7u64.to_le_bytes());
        let wrong = SendWr::new(5, swap, Payload::Inline(&[0; 8]));
        assert_eq!(p.a.post_send(&wrong), Err(PostError::BadPayload));
    }
}

#[test]
fn write_with_immediate_takes_a_receive() {
    let mut p = pair(QpCaps::default(), 64);
    p.b.post_recv(&RecvWr {
        wr_id: 9,
        sges: &[],
    })
    .unwrap();
    let op = SendOp::WriteImm(p.mr.remote(64), 0xabcd);
    p.a.post_send(&SendWr::new(1, op, Payload::Inline(b"hello")))
        .unwrap();
    let wc = p.received();
    assert_eq!(
        (wc.opcode, wc.imm, wc.byte_len),
        (WcOpcode::RecvRdmaWithImm, Some(0xabcd), 5)
    );
    assert!(wc.is_recv());
    assert_eq!(p.get(64, 5), b"hello");
    p.b.post_recv(&RecvWr {
        wr_id: 10,
        sges: &[p.mr.sge(0, 64)],
    })
    .unwrap();
    p.a.post_send(&SendWr::new(
        2,
        SendOp::SendInv(0x77),
        Payload::Inline(b"x"),
    ))
    .unwrap();
    let wc = p.received();
    assert_eq!((wc.invalidated_rkey, wc.imm), (Some(0x77), None));
}

#[test]
fn a_full_send_queue_says_so_and_empties_with_a_signaled_completion() {
    let caps = QpCaps {
        max_send_wr: 16,
        ..QpCaps::default()
    };
    let mut p = pair(caps, 64);
    p.host.manual.store(true, Ordering::Relaxed);
    let room = p.a.send_room();
    let wr = SendWr::new(1, SendOp::Write(p.mr.remote(0)), Payload::Inline(b"abc"));
    for _ in 0..room - 1 {
        p.a.post_send(&wr.unsignaled()).unwrap();
    }
    p.a.post_send(&wr).unwrap();
    assert_eq!(p.a.post_send(&wr), Err(PostError::QueueFull));
    p.host.step();
    assert_eq!(
        p.a.post_send(&wr),
        Err(PostError::QueueFull),
        "executed, but no completion polled yet"
    );
    assert!(p.send_cq.poll_one().is_some());
    assert_eq!(
        p.send_cq.poll_one().map(|w| w.wr_id),
        None,
        "unsignaled ones complete in silence"
    );
    assert_eq!(p.a.send_room(), room);
    // Unsignaled only: nothing frees their slots.
    for _ in 0..room {
        p.a.post_send(&wr.unsignaled()).unwrap();
    }
    p.host.step();
    assert_eq!(p.a.post_send(&wr), Err(PostError::QueueFull));
    assert_eq!(p.a.send_room(), 0);
}

#[test]
fn slots_are_counted_over_many_laps_with_work_requests_of_every_size() {
    let mut p = pair(
        QpCaps {
            max_send_wr: 8,
            ..wide()
        },
        256,
    );
    let ring = p.a.send_room();
    let data = bytes(416);
    let mut used = 0u64;
    for i in 0..20_000u64 {
        let len = (i * 37 % 417) as usize;
        let wr = SendWr::new(
            i,
            SendOp::Write(p.mr.remote(0)),
            Payload::Inline(&data[..len]),
        );
        let wr = if i % 3 == 0 { wr } else { wr.unsignaled() };
        p.a.post_send(&wr).unwrap();
        used += 1 + len.saturating_sub(24).div_ceil(56) as u64;
        if i % 3 == 0 {
            assert_eq!(p.sent().wr_id, i);
            assert_eq!(p.a.send_room(), ring, "after {used} slots");
        }
    }
    assert!(used > 1 << 16, "positions wrapped around their 16 bits");
}

#[test]
fn a_full_receive_queue_says_so() {
    let mut p = pair(
        QpCaps {
            max_recv_wr: 4,
            ..QpCaps::default()
        },
        64,
    );
    let sges = [p.mr.sge(0, 64)];
    for lap in 0..40_000u64 {
        while p.b.recv_room() > 0 {
            p.b.post_recv(&RecvWr {
                wr_id: lap,
                sges: &sges,
            })
            .unwrap();
        }
        if lap < 3 {
            assert_eq!(
                p.b.post_recv(&RecvWr {
                    wr_id: 0,
                    sges: &sges
                }),
                Err(PostError::QueueFull)
            );
        }
        p.a.post_send(&SendWr::new(0, SendOp::Send, Payload::Inline(b"m")))
            .unwrap();
        assert!(p.received().is_ok());
        assert!(p.sent().is_ok());
    }
    let too_many = [sges[0]; 2];
    assert_eq!(
        p.b.post_recv(&RecvWr {
            wr_id: 0,
            sges: &too_many
        }),
        Err(PostError::TooManySges)
    );
}

#[test]
fn lists_ring_one_doorbell_and_say_where_they_stopped() {
    let mut p = pair(
        QpCaps {
            max_send_wr: 8,
            max_recv_wr: 8,
            ..QpCaps::default()
        },
        64,
    );
    p.host.manual.store(true, Ordering::Relaxed);
    p.host.step();
    p.host.window_need_wakeup(1);
    let before = p.host.kicks[1].load(Ordering::Relaxed);
    let sges = [p.mr.sge(0, 64)];
    let recvs: Vec<_> = (0..10)
        .map(|i| RecvWr {
            wr_id: i,
            sges: &sges,
        })
        .collect();
    let full = p.b.post_recv_list(&recvs).unwrap_err();
    assert_eq!((full.posted, full.error), (8, PostError::QueueFull));
    assert_eq!(
        p.host.kicks[1].load(Ordering::Relaxed),
        before,
        "receives ring no doorbell"
    );
    let sends: Vec<_> = (0..4)
        .map(|i| SendWr::new(i, SendOp::Send, Payload::Inline(b"q")))
        .collect();
    p.a.post_send_list(&sends).unwrap();
    assert_eq!(p.host.kicks[1].load(Ordering::Relaxed), before + 1);
    p.a.post_send_list(&[]).unwrap();
    assert_eq!(p.host.kicks[1].load(Ordering::Relaxed), before + 1);
    let mut batch = p.a.batch();
    for wr in &sends {
        batch.post_send(wr).unwrap();
    }
    let full = (0..).find_map(|_| batch.post_send(&sends[0]).err());
    assert_eq!(full, Some(PostError::QueueFull));
    assert_eq!(p.host.kicks[1].load(Ordering::Relaxed), before + 1);
    drop(batch);
    assert_eq!(p.host.kicks[1].load(Ordering::Relaxed), before + 2);
    drop(p.a.batch());
    assert_eq!(p.host.kicks[1].load(Ordering::Relaxed), before + 2);
    let mut out = [WorkCompletion::EMPTY; 16];
    p.host.step();
    assert_eq!(p.recv_cq.poll(&mut out), 8);
    assert_eq!(p.send_cq.poll(&mut out), 8);
    p.b.post_recv_list(&recvs[..8]).unwrap();
    p.host.window_need_wakeup(0);
    let long = [0; 25];
    let bad = SendWr::new(9, SendOp::Send, Payload::Inline(&long));
    let stopped = p.a.post_send_list(&[sends[0], bad, sends[1]]).unwrap_err();
    assert_eq!(
        (stopped.posted, stopped.error),
        (1, PostError::InlineTooLong)
    );
    p.host.step();
    assert_eq!(p.recv_cq.poll(&mut out), 1);
    assert_eq!(p.send_cq.poll(&mut out), 1);
}

#[test]
fn posting_depends_on_the_state() {
    let (_host, context) = FakeHost::open();
    let pd = context.alloc_pd().unwrap();
    let cq = context.create_cq(10).unwrap();
    let mut qp = pd.create_qp(&cq, &cq, &QpCaps::default()).unwrap();
    let send = SendWr::new(1, SendOp::Send, Payload::Inline(b"x"));
    let recv = RecvWr {
        wr_id: 2,
        sges: &[],
    };
    assert_eq!(qp.post_recv(&recv), Err(PostError::BadState));
    qp.to_init(Access::empty()).unwrap();
    assert_eq!(qp.post_send(&send), Err(PostError::BadState));
    qp.post_recv(&recv).unwrap();
    qp.to_rtr(&RtrParams::to(Gid::LOCAL, 1, 0)).unwrap();
    assert_eq!(qp.post_send(&send), Err(PostError::BadState));
    qp.to_rts(&RtsParams::from_psn(3)).unwrap();
    qp.post_send(&send).unwrap();
    assert_eq!(qp.query().unwrap().sq_psn, 3);
    assert!(
        qp.to_init(Access::empty()).is_err(),
        "no way back but RESET"
    );
    assert_eq!(qp.state(), QpState::Rts);
}

#[test]
fn errors_flush_and_free() {
    let mut p = pair(
        QpCaps {
            max_send_wr: 8,
            max_recv_wr: 4,
            ..QpCaps::default()
        },
        64,
    );
    let sges = [p.mr.sge(0, 64)];
    for i in 0..4 {
        p.a.post_recv(&RecvWr {
            wr_id: 100 + i,
            sges: &sges,
        })
        .unwrap();
    }
    let outside = SendOp::Write(hyv_verbs::RemoteAddr { addr: 16, rkey: 1 });
    p.host.manual.store(true, Ordering::Relaxed);
    p.a.post_send(&SendWr::new(1, outside, Payload::Inline(b"x")))
        .unwrap();
    p.a.post_send(&SendWr::new(2, SendOp::Send, Payload::Inline(b"y")).unsignaled())
        .unwrap();
    p.host.step();
    let mut out = [WorkCompletion::EMPTY; 16];
    assert_eq!(p.send_cq.poll(&mut out), 2);
    assert_eq!((out[0].wr_id, out[0].status), (1, WcStatus::RemAccessErr));
    assert_eq!(
        (out[1].wr_id, out[1].status),
        (2, WcStatus::WrFlushErr),
        "unsignaled ones flush loudly"
    );
    assert_eq!(p.a.state(), QpState::Err);
    assert_eq!(p.recv_cq.poll(&mut out), 4);
    assert!(
        out[..4]
            .iter()
            .all(|w| w.status == WcStatus::WrFlushErr && w.is_recv())
    );
    assert_eq!((p.a.send_room(), p.a.recv_room()), (8, 4));
    let events: Vec<_> = p.context.poll_events().collect();
    assert_eq!(events, [Event::Async(AsyncEvent::QpFatal(p.a.index()))]);
    // What is posted now flushes too, and the device is told of it.
    let rung = |p: &Pair| p.host.doorbell_pending();
    assert!(
        !rung(&p) || {
            p.host.step();
            true
        }
    );
    p.a.post_recv(&RecvWr {
        wr_id: 7,
        sges: &[],
    })
    .unwrap();
    assert!(rung(&p), "a receive of a failed queue pair rings");
    assert_eq!(p.received().wr_id, 7);
    // Back to life.
    p.a.to_reset().unwrap();
    p.b.to_reset().unwrap();
    join(&mut p.a, &mut p.b);
    p.b.post_recv(&RecvWr {
        wr_id: 8,
        sges: &sges,
    })
    .unwrap();
    p.a.post_send(&SendWr::new(9, SendOp::Send, Payload::Inline(b"again")))
        .unwrap();
    assert_eq!(p.received().inline_data(), Some(&b"again"[..]));
    assert_eq!(p.sent().wr_id, 9);
    assert_eq!((p.a.send_room(), p.a.state()), (8, QpState::Rts));
}

#[test]
fn completions_of_destroyed_queue_pairs_are_passed_over() {
    let mut p = pair(QpCaps::default(), 64);
    let before = p.host.live_allocations();
    let mut c =
        p.pd.create_qp(&p.send_cq, &p.recv_cq, &QpCaps::default())
            .unwrap();
    let mut d =
        p.pd.create_qp(&p.send_cq, &p.recv_cq, &QpCaps::default())
            .unwrap();
    join(&mut c, &mut d);
    let buffer = p.pd.alloc_mr(64, everything()).unwrap();
    // One exchange, so that the queues know both.
    d.post_recv(&RecvWr {
        wr_id: 1,
        sges: &[buffer.sge(0, 64)],
    })
    .unwrap();
    c.post_send(&SendWr::new(2, SendOp::Send, Payload::Inline(b"gone")))
        .unwrap();
    p.host.step();
    assert_eq!((p.received().wr_id, p.sent().wr_id), (1, 2));
    d.post_recv(&RecvWr {
        wr_id: 1,
        sges: &[buffer.sge(0, 64)],
    })
    .unwrap();
    c.post_send(&SendWr::new(2, SendOp::Send, Payload::Inline(b"gone")))
        .unwrap();
    p.host.step();
    // Both completions wait in the queues, one with payload for a buffer that will be gone.
    drop(d);
    c.destroy().unwrap();
    drop(buffer);
    assert_eq!(
        p.host.live_allocations(),
        before + 1,
        "the rings went back; the buffer is for regions only"
    );
    let reused = p.pd.alloc_mr(64, everything()).unwrap();
    p.b.post_recv(&RecvWr {
        wr_id: 3,
        sges: &[p.mr.sge(0, 64)],
    })
    .unwrap();
    p.a.post_send(&SendWr::new(4, SendOp::Send, Payload::Inline(b"here")))
        .unwrap();
    let wc = p.received();
    assert_eq!((wc.wr_id, wc.qpn), (3, p.b.qpn()));
    assert_eq!(p.sent().wr_id, 4);
    let mut now = [1; 64];
    reused.read(0, &mut now).unwrap();
    assert_eq!(now, [0; 64]);
}

#[test]
fn a_completion_queue_is_never_overrun_within_what_was_asked_for() {
    for entries in [1u32, 2, 3, 12, 13, 16, 100, 819] {
        let caps = QpCaps {
            max_send_wr: entries,
            max_recv_wr: 1,
            ..QpCaps::default()
        };
        let mut p = pair(caps, entries);
        assert!(p.send_cq.capacity() >= entries);
        let wr = SendWr::new(0, SendOp::Write(p.mr.remote(0)), Payload::Inline(b"z"));
        // As many outstanding as were asked for, however few are polled at a time.
        let mut outstanding = 0;
        for lap in 0..500u32 {
            while outstanding < entries {
                p.a.post_send(&wr).unwrap();
                outstanding += 1;
            }
            p.host.step();
            let mut out = vec![WorkCompletion::EMPTY; (lap as usize % 7) + 1];
            let n = p.send_cq.poll(&mut out) as u32;
            assert_eq!(n, entries.min(lap % 7 + 1), "in lap {lap} of {entries}");
            outstanding -= n;
        }
        assert_eq!(p.context.poll_events().collect::<Vec<_>>(), []);
    }
}

#[test]
fn an_overrun_is_an_event() {
    let mut p = pair(
        QpCaps {
            max_send_wr: 64,
            ..QpCaps::default()
        },
        4,
    );
    let wr = SendWr::new(0, SendOp::Write(p.mr.remote(0)), Payload::Inline(b"z"));
    for _ in 0..40 {
        p.a.post_send(&wr).unwrap();
    }
    p.host.step();
    assert_eq!(
        p.context.poll_events().collect::<Vec<_>>(),
        [Event::Async(AsyncEvent::CqError(p.send_cq.index()))]
    );
}

#[test]
fn events_of_a_dropped_iterator_stay() {
    let mut p = pair(QpCaps::default(), 16);
    p.send_cq.req_notify(false);
    p.recv_cq.req_notify(true);
    p.b.post_recv(&RecvWr {
        wr_id: 1,
        sges: &[p.mr.sge(0, 64)],
    })
    .unwrap();
    let wr = SendWr::new(0, SendOp::Send, Payload::Inline(b"z"));
    p.a.post_send(&wr.with_flags(SendFlags::SOLICITED)).unwrap();
    p.host.step();
    assert!(p.context.wait(Some(Duration::from_secs(1))).unwrap());
    let first = p.context.poll_events().next().unwrap();
    let second = p.context.poll_events().next().unwrap();
    let mut both = [first, second];
    both.sort_by_key(|e| format!("{e:?}"));
    let mut expect = [
        Event::CqCompletion(p.send_cq.index()),
        Event::CqCompletion(p.recv_cq.index()),
    ];
    expect.sort_by_key(|e| format!("{e:?}"));
    assert_eq!(both, expect);
    assert_eq!(p.context.poll_events().next(), None);
    assert!(!p.context.wait(Some(Duration::from_millis(5))).unwrap());
    // Unsolicited messages raise nothing at a queue that waits for solicited ones.
    p.recv_cq.req_notify(true);
    p.b.post_recv(&RecvWr {
        wr_id: 1,
        sges: &[p.mr.sge(0, 64)],
    })
    .unwrap();
    p.a.post_send(&wr).unwrap();
    p.host.step();
    assert_eq!(p.context.poll_events().next(), None);
}

#[test]
fn waiting_gives_completions_or_a_timeout() {
    let mut p = pair(QpCaps::default(), 16);
    let mut out = [WorkCompletion::EMPTY; 4];
    let start = p.context.now_ns();
    assert_eq!(
        p.send_cq
            .wait(&mut out, Some(Duration::from_millis(50)))
            .unwrap(),
        0
    );
    assert!(p.context.now_ns() - start >= 50_000_000);
    p.a.post_send(&SendWr::new(
        5,
        SendOp::Write(p.mr.remote(0)),
        Payload::Inline(b"z"),
    ))
    .unwrap();
    assert_eq!(p.send_cq.wait(&mut out, None).unwrap(), 1);
    assert_eq!(out[0].wr_id, 5);
    assert_eq!(p.send_cq.wait(&mut [], None).unwrap(), 0);
    p.host.gone.store(true, Ordering::Relaxed);
    assert_eq!(
        p.send_cq.wait(&mut out, None),
        Err(hyv_verbs::Error::HostGone)
    );
}
