//! What moves: every operation at every interesting length and shape, and the completions it leaves.

mod common;

use common::*;
use hyv_abi::queue::Cqe;

fn check_send(c: &Cqe, wr_id: u64, op: WcOpcode, qp: &Qp) {
    assert_eq!(status(c), WcStatus::Success);
    assert_eq!((c.wr_id, c.opcode), (wr_id, op as u8));
    assert_eq!((c.qpn, usize::from(c.qp)), (qp.qpn, qp.index()));
    assert_eq!(c.syndrome, 0);
}

#[test]
fn rings_wrap_far_beyond_their_size() {
    let mut rng = Rng(7);
    // 1 slot is the smallest ring, and each of its positions is the same slot.
    for (sq_log2, rq_log2, cq_log2) in [(0, 0, 0), (1, 2, 1), (4, 3, 2), (3, 1, 4)] {
        let (mut e, _clock) = engine();
        let cap = Cap {
            sq_log2,
            rq_log2,
            ..Cap::default()
        };
        let mut sides: Vec<Side> = (0..2).map(|_| Side::new(&mut e, 1 << 16, cap)).collect();
        for s in &mut sides {
            s.scq = s.user.cq(&mut e, cq_log2);
            s.rcq = s.user.cq(&mut e, cq_log2);
            s.qp = s.user.qp(&mut e, s.pd, &s.scq, &s.rcq, cap);
        }
        let mut b = sides.pop().expect("two");
        let mut a = sides.pop().expect("two");
        connect(&mut e, &a.qp, &b.qp, &Conn::default());
        for i in 0..2_000u64 {
            let room = 1usize << sq_log2;
            let max = match room {
                1 => 24,
                2 => 80,
                _ => 192,
            };
            let data = rng.bytes(rng.0 as usize % (max + 1));
            let sge = b.mr.sge(0, 256);
            b.qp.post_recv(i, &[sge]);
            a.qp.post(&Wr::new(WrOpcode::Send, i).inline(&data));
            while a.scq.head < i as u32 + 1 {
                e.poll();
                if let Some(c) = a.scq.poll() {
                    assert_eq!((c.wr_id, c.status), (i, 0));
                }
            }
            let r = b.rcq.one();
            assert_eq!(
                (r.wr_id, r.status, u32::from(r.wqe)),
                (i, 0, i as u32 & 0xffff)
            );
            assert_eq!(received(&b.user.ram, &r, &[sge], IOVA), data, "message {i}");
        }
    }
}

#[test]
fn positions_in_completions_are_modulo_65536() {
    let mut p = Pair::new(4096);
    for i in 0..70_000u32 {
        p.a.qp.post(
            &Wr::new(WrOpcode::Write, u64::from(i))
                .inline(&[1])
                .to(&p.b.mr, 0),
        );
        p.e.poll();
        let c = p.a.scq.one();
        assert_eq!((c.wr_id, c.wqe), (u64::from(i), i as u16));
    }
}

#[test]
fn a_queue_pair_connected_to_itself() {
    let (mut e, _clock) = engine();
    let mut s = Side::new(&mut e, 1 << 20, Cap::default());
    let qpn = s.qp.qpn;
    s.qp.connect(&mut e, qpn, &Conn::default());
    let mut rng = Rng(8);
    for len in [0u32, 10, 32, 33, 200_000] {
        let data = rng.bytes(len as usize);
        s.fill(0, &data);
        let sge = s.mr.sge(500_000, len);
        s.qp.post_recv(1, &[sge]);
        s.qp.post(&Wr::new(WrOpcode::Send, 2).sge(s.mr.sge(0, len)));
        pump(&mut e);
        check_send(&s.scq.one(), 2, WcOpcode::Send, &s.qp);
        let r = s.rcq.one();
        assert_eq!((r.wr_id, r.status), (1, 0));
        assert_eq!(received(&s.user.ram, &r, &[sge], IOVA), data);
    }
    // Overlapping source and destination: some bytes, and nothing outside.
    s.fill(0, &[7; 4096]);
    s.qp.post(
        &Wr::new(WrOpcode::Write, 3)
            .sge(s.mr.sge(0, 2048))
            .to(&s.mr, 1000),
    );
    pump(&mut e);
    check_send(&s.scq.one(), 3, WcOpcode::Write, &s.qp);
    assert_eq!(s.data(0, 4096), [7; 4096]);
}

#[test]
fn one_completion_queue_for_everything() {
    let (mut e, _clock) = engine();
    let mut s = Side::new(&mut e, 1 << 16, Cap::default());
    let cap = Cap {
        sig_all: true,
        ..Cap::default()
    };
    let mut x = s.user.qp(&mut e, s.pd, &s.scq, &s.scq, cap);
    let mut y = s.user.qp(&mut e, s.pd, &s.scq, &s.scq, cap);
    connect(&mut e, &x, &y, &Conn::default());
    for i in 0..100u64 {
        y.post_recv(i, &[s.mr.sge(0, 64)]);
        x.post(&Wr::new(WrOpcode::Send, 1000 + i).inline(&i.to_le_bytes()));
        pump(&mut e);
        let got = s.scq.drain();
        let mut ids: Vec<(u64, u32)> = got.iter().map(|c| (c.wr_id, c.qpn)).collect();
        ids.sort_unstable();
        assert_eq!(ids, [(i, y.qpn), (1000 + i, x.qpn)]);
    }
}

#[test]
fn a_small_message_does_not_wait_for_a_large_one() {
    let mut p = Pair::new(40 << 20);
    let mut x = p.a.extra_qp(&mut p.e, Cap::default());
    let y = p.b.extra_qp(&mut p.e, Cap::default());
    connect(&mut p.e, &x, &y, &Conn::default());
    let len = 32u32 << 20;
    let data = Rng(10).bytes(len as usize);
    p.a.fill(0, &data);
    p.a.qp.post(
        &Wr::new(WrOpcode::Write, 1)
            .sge(p.a.mr.sge(0, len))
            .to(&p.b.mr, 0),
    );
    p.e.poll();
    let mut small = 0;
    loop {
        x.post(
            &Wr::new(WrOpcode::Write, 2)
                .inline(&[9; 8])
                .to(&p.b.mr, u64::from(len)),
        );
        p.e.poll();
        let done = p.a.scq.drain();
        if done.iter().any(|c| c.wr_id == 1) {
            break;
        }
        assert_eq!(
            done.len(),
            1,
            "the small WRITE completes in the turn that sees it"
        );
        assert_eq!((done[0].wr_id, done[0].status), (2, 0));
        small += 1;
    }
    assert!(small >= 64, "32 MiB were moved in {small} turns");
    p.pump();
    assert!(
        p.b.data(0, u64::from(len)) == data,
        "the large one arrived whole"
    );
}
