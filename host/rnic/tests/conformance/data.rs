//! What moves: every operation at every interesting length and shape, and the completions it leaves.

use crate::common::*;
use crate::fabric::{Link, On, patient};
use hyv_abi::queue::Cqe;

const LENGTHS: [u32; 25] = [
    0,
    1,
    7,
    8,
    23,
    24,
    25,
    31,
    32,
    33,
    63,
    64,
    65,
    255,
    1023,
    1024,
    1025,
    2048,
    4095,
    4096,
    4097,
    65_535,
    65_536,
    65_537,
    1 << 20,
];

fn check_send(c: &Cqe, wr_id: u64, op: WcOpcode, qp: &Qp) {
    assert_eq!(status(c), WcStatus::Success);
    assert_eq!((c.wr_id, c.opcode), (wr_id, op as u8));
    assert_eq!((c.qpn, usize::from(c.qp)), (qp.qpn, qp.index()));
    assert_eq!(c.syndrome, 0);
}

fn send_and_receive_at_every_length(on: On) {
    let mut p = Link::new(on, 4 << 20);
    let mut rng = Rng(1);
    for (i, len) in LENGTHS.into_iter().enumerate() {
        let data = rng.bytes(len as usize);
        p.a.fill(3, &data);
        p.b.fill(0, &vec![0xee; len as usize + 64]);
        let (id, imm) = (1000 + i as u64, 7 * i as u32 + 1);
        let sge = p.b.mr.sge(32, len);
        p.b.qp.post_recv(id, &[sge]);
        let with_imm = i % 2 == 1;
        let op = if with_imm {
            WrOpcode::SendImm
        } else {
            WrOpcode::Send
        };
        let index = p.a.qp.sq_tail;
        let wr = Wr::new(op, id + 1).sge(p.a.mr.sge(3, len)).imm(imm);
        p.a.qp.post(&wr);
        p.pump();

        let s = p.a.scq.one();
        check_send(&s, id + 1, WcOpcode::Send, &p.a.qp);
        assert_eq!(u32::from(s.wqe), index);
        let r = p.b.rcq.one();
        assert_eq!(status(&r), WcStatus::Success);
        assert_eq!((r.wr_id, r.byte_len), (id, len));
        assert_eq!(r.opcode, WcOpcode::Recv as u8);
        assert_eq!((r.qpn, usize::from(r.qp)), (p.b.qp.qpn, p.b.qp.index()));
        assert_eq!(usize::from(r.wqe), i);
        assert_eq!(r.flags & cqe_flags::WITH_IMM != 0, with_imm);
        assert!(!with_imm || r.imm == imm);
        assert!(r.flags & cqe_flags::DATA == 0 || len <= 32);
        assert_eq!(
            received(&p.b.user.ram, &r, &[sge], IOVA),
            data,
            "length {len}"
        );
        assert_eq!(p.b.data(0, 32), [0xee; 32], "before the receive buffer");
        assert_eq!(p.b.data(32 + u64::from(len), 32), [0xee; 32], "behind it");
    }
}

fn inline_at_every_length(on: On) {
    let mut p = Link::with(
        on,
        1 << 20,
        Cap {
            sq_log2: 6,
            ..Cap::default()
        },
        &patient(),
    );
    let mut rng = Rng(2);
    for len in 0..=416usize {
        let data = rng.bytes(len);
        let sge = p.b.mr.sge(64, 512);
        p.b.qp.post_recv(len as u64, &[sge]);
        p.a.qp.post(&Wr::new(WrOpcode::Send, 5).inline(&data));
        // A WRITE of the same bytes, behind it.
        p.b.fill(4096, &[0xee; 512]);
        p.a.qp.post(
            &Wr::new(WrOpcode::Write, 6)
                .inline(&data)
                .to(&p.b.mr, 4096 + 40),
        );
        p.pump();
        let ids: Vec<u64> = p.a.scq.drain().iter().map(|c| c.wr_id).collect();
        assert_eq!(ids, [5, 6]);
        let r = p.b.rcq.one();
        assert_eq!((r.wr_id, r.byte_len as usize), (len as u64, len));
        assert_eq!(
            received(&p.b.user.ram, &r, &[sge], IOVA),
            data,
            "inline SEND of {len}"
        );
        let mut want = vec![0xee; 512];
        want[40..40 + len].copy_from_slice(&data);
        assert_eq!(p.b.data(4096, 512), want, "inline WRITE of {len}");
    }
}

fn write_and_read_at_every_length(on: On) {
    let mut p = Link::new(on, 4 << 20);
    let mut rng = Rng(3);
    for (i, len) in LENGTHS.into_iter().enumerate() {
        let data = rng.bytes(len as usize);
        p.a.fill(5, &data);
        p.b.fill(0, &vec![0xee; len as usize + 64]);
        p.a.qp.post(
            &Wr::new(WrOpcode::Write, 1)
                .sge(p.a.mr.sge(5, len))
                .to(&p.b.mr, 33),
        );
        p.pump();
        check_send(&p.a.scq.one(), 1, WcOpcode::Write, &p.a.qp);
        assert!(p.b.rcq.poll().is_none(), "a WRITE consumes no receive");
        let mut want = vec![0xee; len as usize + 64];
        want[33..33 + len as usize].copy_from_slice(&data);
        assert_eq!(p.b.data(0, len as u64 + 64), want, "WRITE of {len}");

        let (id, imm) = (100 + i as u64, 0x8000_0000 + i as u32);
        p.b.qp.post_recv(id, &[]);
        let wr = Wr::new(WrOpcode::WriteImm, 2).imm(imm);
        p.a.qp
            .post(&wr.sge(p.a.mr.sge(5, len)).to(&p.b.mr, 2 << 20));
        p.pump();
        check_send(&p.a.scq.one(), 2, WcOpcode::Write, &p.a.qp);
        let r = p.b.rcq.one();
        assert_eq!((r.wr_id, r.byte_len, r.imm), (id, len, imm));
        assert_eq!(r.opcode, WcOpcode::RecvRdmaWithImm as u8);
        assert_eq!(r.flags & cqe_flags::WITH_IMM, cqe_flags::WITH_IMM);
        assert_eq!(
            r.flags & cqe_flags::DATA,
            0,
            "its data went where the WRITE said"
        );
        assert_eq!(p.b.data(2 << 20, len as u64), data);

        p.a.fill(1 << 20, &vec![0xdd; len as usize + 64]);
        let sge = p.a.mr.sge((1 << 20) + 32, len);
        p.a.qp
            .post(&Wr::new(WrOpcode::Read, 3).sge(sge).to(&p.b.mr, 33));
        p.pump();
        let c = p.a.scq.one();
        check_send(&c, 3, WcOpcode::Read, &p.a.qp);
        assert_eq!(c.byte_len, len);
        assert_eq!(
            received(&p.a.user.ram, &c, &[sge], IOVA),
            data,
            "READ of {len}"
        );
        assert_eq!(p.a.data(1 << 20, 32), [0xdd; 32]);
        assert_eq!(p.a.data((1 << 20) + 32 + u64::from(len), 32), [0xdd; 32]);
    }
}

fn an_unsignaled_read_of_any_length_lands_in_memory(on: On) {
    let mut p = Link::new(on, 1 << 20);
    let mut rng = Rng(4);
    for len in [1u32, 8, 31, 32, 33, 64] {
        let data = rng.bytes(len as usize);
        p.b.fill(0, &data);
        p.a.fill(0, &[0; 64]);
        let wr = Wr::new(WrOpcode::Read, 3)
            .sge(p.a.mr.sge(0, len))
            .to(&p.b.mr, 0);
        p.a.qp.post(&wr.unsignaled());
        p.pump();
        assert!(p.a.scq.poll().is_none());
        assert_eq!(p.a.data(0, u64::from(len)), data, "{len}");
    }
}

fn atomics_change_what_they_say_and_give_what_was(on: On) {
    let mut p = Link::new(on, 1 << 20);
    let word = |p: &Link| u64::from_ne_bytes(p.b.data(64, 8).try_into().expect("8 bytes"));
    let cases = [
        (WrOpcode::FetchAdd, 0, 5, 10, 15),
        (WrOpcode::FetchAdd, 0, u64::MAX, 10, 9),
        (WrOpcode::FetchAdd, 0, 1, u64::MAX, 0),
        (WrOpcode::CmpSwp, 10, 77, 10, 77),
        (WrOpcode::CmpSwp, 11, 77, 10, 10),
        (WrOpcode::CmpSwp, 0, u64::MAX, 0, u64::MAX),
    ];
    for signaled in [true, false] {
        for (op, compare, operand, before, after) in cases {
            p.b.fill(0, &[0xab; 256]);
            p.b.fill(64, &u64::to_ne_bytes(before));
            p.a.fill(0, &[0xcd; 64]);
            let sge = p.a.mr.sge(16, 8);
            let mut wr = Wr::new(op, 9)
                .sge(sge)
                .to(&p.b.mr, 64)
                .atomic(compare, operand);
            if !signaled {
                wr = wr.unsignaled();
            }
            p.a.qp.post(&wr);
            p.pump();
            assert_eq!(word(&p), after, "{op:?} {compare} {operand} on {before}");
            assert_eq!(p.b.data(0, 64), [0xab; 64]);
            assert_eq!(p.b.data(72, 64), [0xab; 64]);
            let got = if signaled {
                let c = p.a.scq.one();
                check_send(&c, 9, op.wc(), &p.a.qp);
                assert_eq!(c.byte_len, 8);
                received(&p.a.user.ram, &c, &[sge], IOVA)
            } else {
                assert!(p.a.scq.poll().is_none());
                p.a.data(16, 8)
            };
            assert_eq!(got, before.to_ne_bytes(), "{op:?} gives what was");
            assert_eq!(p.a.data(24, 8), [0xcd; 8]);
        }
    }
}

fn gathers_from_every_number_of_sges_and_scatters_to_as_many(on: On) {
    let mut rng = Rng(5);
    for (stride, max) in [(32u32, 1usize), (64, 3), (128, 7), (256, 15)] {
        let cap = Cap {
            sq_log2: 6,
            stride,
            ..Cap::default()
        };
        let mut p = Link::with(on, 1 << 20, cap, &patient());
        for n in 1..=16usize {
            for small in [true, false] {
                let lens: Vec<u32> = (0..n)
                    .map(|_| rng.below(if small { 4 } else { 3000 }) as u32)
                    .collect();
                let total: u32 = lens.iter().sum();
                let mut want = Vec::new();
                let mut wr = Wr::new(WrOpcode::Send, n as u64);
                for (i, &len) in lens.iter().enumerate() {
                    let data = rng.bytes(len as usize);
                    p.a.fill(i as u64 * 4096, &data);
                    want.extend(data);
                    wr = wr.sge(p.a.mr.sge(i as u64 * 4096, len));
                }
                let pieces = 1 + n % max;
                let each = total.div_ceil(pieces as u32) + rng.below(3) as u32;
                let sges: Vec<Sge> = (0..pieces)
                    .map(|i| p.b.mr.sge(i as u64 * 65_536, each))
                    .collect();
                p.b.qp.post_recv(7, &sges);
                p.a.qp.post(&wr);
                p.pump();
                check_send(&p.a.scq.one(), n as u64, WcOpcode::Send, &p.a.qp);
                let r = p.b.rcq.one();
                assert_eq!((status(&r), r.byte_len), (WcStatus::Success, total));
                let got = received(&p.b.user.ram, &r, &sges, IOVA);
                assert_eq!(got, want, "{n} pieces of {lens:?} into {pieces} of {each}");
            }
        }
    }
}

fn reads_scatter_and_writes_gather(on: On) {
    let mut p = Link::with(
        on,
        1 << 20,
        Cap {
            sq_log2: 6,
            ..Cap::default()
        },
        &patient(),
    );
    let mut rng = Rng(6);
    for n in 1..=16usize {
        let lens: Vec<u32> = (0..n).map(|_| rng.below(10_000) as u32 + 40).collect();
        let total: u32 = lens.iter().sum();
        let sges = |p: &Link| -> Vec<Sge> {
            let at = |i: usize| i as u64 * 16_384 + 1;
            lens.iter()
                .enumerate()
                .map(|(i, &l)| p.a.mr.sge(at(i), l))
                .collect()
        };
        let data = rng.bytes(total as usize);
        p.b.fill(100, &data);
        let mut read = Wr::new(WrOpcode::Read, 1).to(&p.b.mr, 100);
        // What was read is sent: not before it is there.
        let mut write = Wr::new(WrOpcode::Write, 2)
            .to(&p.b.mr, 500_000)
            .with(flags::FENCE);
        read.sges = sges(&p);
        write.sges = sges(&p);
        p.a.qp.post(&read);
        p.a.qp.post(&write);
        p.pump();
        let done = p.a.scq.drain();
        assert_eq!(
            done.iter().map(|c| (c.wr_id, c.status)).collect::<Vec<_>>(),
            [(1, 0), (2, 0)]
        );
        assert_eq!(done[0].byte_len, total);
        assert_eq!(
            p.b.data(500_000, u64::from(total)),
            data,
            "READ then WRITE of {lens:?}"
        );
    }
}

fn completions_come_in_order_and_only_when_asked_for(on: On) {
    for sig_all in [false, true] {
        let cap = Cap {
            sig_all,
            ..Cap::default()
        };
        let mut p = Link::with(on, 1 << 20, cap, &patient());
        let mut want = Vec::new();
        for i in 0..20u64 {
            let mut wr = Wr::new(WrOpcode::Write, i)
                .sge(p.a.mr.sge(0, 8))
                .to(&p.b.mr, 8 * i);
            if i % 3 != 0 {
                wr = wr.unsignaled();
            }
            if i % 3 == 0 || sig_all {
                want.push((i, i as u16));
            }
            p.a.fill(0, &i.to_ne_bytes());
            p.a.qp.post(&wr);
            if i % 4 == 3 {
                p.pump();
            }
        }
        p.pump();
        let got: Vec<(u64, u16)> = p.a.scq.drain().iter().map(|c| (c.wr_id, c.wqe)).collect();
        assert_eq!(got, want, "sig_all {sig_all}");
    }
}

fn both_directions_at_once(on: On) {
    let mut p = Link::new(on, 1 << 20);
    let mut rng = Rng(9);
    let (mut got_a, mut got_b) = (0u64, 0u64);
    for round in 0..300u64 {
        let n = 1 + rng.below(8);
        for k in 0..n {
            p.a.qp.post_recv(round, &[p.a.mr.sge(0, 64)]);
            p.b.qp.post_recv(round, &[p.b.mr.sge(0, 64)]);
            let _ = k;
        }
        for k in 0..n {
            let tag = (round << 8 | k).to_le_bytes();
            p.a.qp.post(&Wr::new(WrOpcode::Send, k).inline(&tag));
            p.b.qp.post(&Wr::new(WrOpcode::Send, k).inline(&tag));
        }
        p.pump();
        for (side, got) in [(&mut p.a, &mut got_a), (&mut p.b, &mut got_b)] {
            assert_eq!(side.scq.drain().len() as u64, n);
            for (k, c) in side.rcq.drain().into_iter().enumerate() {
                assert_eq!((c.status, c.byte_len), (0, 8));
                assert_eq!(c.data[0], round << 8 | k as u64, "messages arrive in order");
                *got += 1;
            }
        }
    }
    assert_eq!(got_a, got_b);
    assert!(got_a > 1000);
}

fn the_longest_message_and_one_byte_more(on: On) {
    // 16 pieces of one region: more bytes than there is RAM, none of which is touched.
    let mut p = Link::with(
        on,
        68 << 20,
        Cap {
            sq_log2: 4,
            ..Cap::default()
        },
        &patient(),
    );
    let mut wr = Wr::new(WrOpcode::Write, 1).to(&p.b.mr, 0);
    for _ in 0..15 {
        wr = wr.sge(p.a.mr.sge(0, 64 << 20));
    }
    p.a.qp.post(&wr.sge(p.a.mr.sge(0, (64 << 20) + 1)));
    p.pump();
    let c = p.a.scq.one();
    assert_eq!((status(&c), c.wr_id), (WcStatus::LocLenErr, 1));
    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err);
    assert_eq!(p.b.qp.state(p.f.rb()), QpState::Rts);
}

fn what_was_posted_before_the_queue_may_send_goes_out_when_it_may(on: On) {
    let c = patient();
    let mut p = Link::unconnected(on, 1 << 16, Cap::default());
    p.f.rtr_a(&p.a.qp, p.b.qp.qpn, &c);
    p.f.rtr_b(&p.b.qp, p.a.qp.qpn, &c);
    let sge = p.b.mr.sge(0, 64);
    p.b.qp.post_recv(3, &[sge]);
    p.a.qp.post(&Wr::new(WrOpcode::Send, 4).inline(b"early"));
    p.pump();
    assert!(
        p.a.scq.poll().is_none() && p.b.rcq.poll().is_none(),
        "not in RTS yet"
    );
    p.a.qp.rts(p.f.a(), &c);
    p.pump();
    let r = p.b.rcq.one();
    assert_eq!(
        (
            p.a.scq.one().status,
            received(&p.b.user.ram, &r, &[sge], IOVA)
        ),
        (0, b"early".to_vec())
    );
}

fn the_send_queue_rests_while_draining_and_goes_on_afterwards(on: On) {
    let mut p = Link::new(on, 4 << 20);
    let data = Rng(11).bytes(2 << 20);
    p.a.fill(0, &data);
    p.a.qp.post(
        &Wr::new(WrOpcode::Write, 1)
            .sge(p.a.mr.sge(0, 2 << 20))
            .to(&p.b.mr, 0),
    );
    let (ram, at) = (p.b.user.ram.clone(), p.b.mr.offset);
    p.f.turn_until(|| ram.read(at, 8) != [0; 8]);
    assert!(p.a.scq.poll().is_none(), "in the middle of the transfer");
    p.a.qp.go(p.f.a(), QpState::Sqd).expect("SQD");
    p.a.qp.post(
        &Wr::new(WrOpcode::Write, 2)
            .inline(b"later")
            .to(&p.b.mr, 3 << 20),
    );
    p.pump();
    let c = p.a.scq.one();
    assert_eq!(
        (c.wr_id, c.status),
        (1, 0),
        "what was under way ends, what was posted later waits"
    );
    assert!(p.b.data(0, 2 << 20) == data);
    // It still receives.
    p.a.qp.post_recv(5, &[p.a.mr.sge(3 << 20, 64)]);
    p.b.qp.post(&Wr::new(WrOpcode::Send, 6).inline(b"hello"));
    p.pump();
    assert_eq!((p.b.scq.one().status, p.a.rcq.one().wr_id), (0, 5));
    p.a.qp.go(p.f.a(), QpState::Rts).expect("RTS");
    p.pump();
    assert_eq!(
        (p.a.scq.one().wr_id, p.b.data(3 << 20, 5)),
        (2, b"later".to_vec())
    );
}

on_every_carrier! {
    send_and_receive_at_every_length
    inline_at_every_length
    write_and_read_at_every_length
    an_unsignaled_read_of_any_length_lands_in_memory
    atomics_change_what_they_say_and_give_what_was
    gathers_from_every_number_of_sges_and_scatters_to_as_many
    reads_scatter_and_writes_gather
    completions_come_in_order_and_only_when_asked_for
    both_directions_at_once
    the_longest_message_and_one_byte_more
    what_was_posted_before_the_queue_may_send_goes_out_when_it_may
    the_send_queue_rests_while_draining_and_goes_on_afterwards
}
