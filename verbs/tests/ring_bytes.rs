//! The rings' bytes, against the tables of `hyv_abi::queue` written out by hand.
#![cfg(not(loom))]

use std::sync::atomic::{AtomicU64, Ordering};

use hyv_abi::queue::{Cqe, MAX_INLINE, SLOT_WORDS, SendHead, Sge, flags};
use hyv_verbs::ring::{Body, CompletionRing, RecvRing, SendRing};
use proptest::prelude::*;

fn zeroed(words: usize) -> Vec<AtomicU64> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

fn values(words: &[AtomicU64]) -> Vec<u64> {
    words.iter().map(|w| w.load(Ordering::Relaxed)).collect()
}

fn head(opcode: u8, flags: u8) -> SendHead {
    SendHead {
        opcode,
        flags,
        num_sge: 0,
        slots: 0,
        imm: 0x1122_3344,
        wr_id: 0x0102_0304_0506_0708,
        remote_addr: 0xaaaa_bbbb_cccc_dddd,
        rkey: 0x5566_7788,
        inline_len: 0,
    }
}

fn sge(i: u32) -> Sge {
    Sge {
        addr: 0x1000_0000 + u64::from(i),
        len: 0x100 + i,
        lkey: 0x70 + i,
    }
}

#[test]
fn a_send_of_one_sge_is_one_slot() {
    let mem = zeroed(64);
    let mut ring = SendRing::new(&mem[..], 8).unwrap();
    assert_eq!(
        ring.push(head(3, flags::SIGNALED), Body::Sges(&[sge(1)])),
        0
    );
    let expect = [
        0x1122_3344_0101_0203,
        0x0102_0304_0506_0708,
        0xaaaa_bbbb_cccc_dddd,
        0x5566_7788,
        0x1000_0001,
        0x0000_0101_0000_0071,
        0,
        1,
    ];
    assert_eq!(values(&mem[..8]), expect);
    assert_eq!(values(&mem[8..]), [0; 56]);
    assert_eq!((ring.next(), ring.room(0), ring.room(1)), (1, 7, 8));
}

#[test]
fn further_sges_go_three_to_an_extension() {
    for n in 1..=16u32 {
        let mem = zeroed(64);
        let mut ring = SendRing::new(&mem[..], 8).unwrap();
        let sges: Vec<Sge> = (0..n).map(sge).collect();
        ring.push(head(2, 0), Body::Sges(&sges));
        let w = values(&mem);
        let slots = 1 + (n - 1).div_ceil(3);
        assert_eq!(
            w[0] >> 16 & 0xffff,
            u64::from(n | slots << 8),
            "SGEs and slots of {n}"
        );
        assert_eq!([w[4], w[5]], sge(0).to_words());
        for i in 1..n {
            let at = 8 * (1 + (i as usize - 1) / 3) + 2 * ((i as usize - 1) % 3);
            assert_eq!([w[at], w[at + 1]], sge(i).to_words(), "SGE {i} of {n}");
        }
        for slot in 0..8u64 {
            let stamp = if slot < u64::from(slots) { slot + 1 } else { 0 };
            assert_eq!(
                w[8 * slot as usize + 7],
                stamp,
                "stamp of slot {slot} with {n} SGEs"
            );
        }
    }
}

#[test]
fn inline_data_of_every_length() {
    let data: Vec<u8> = (0..MAX_INLINE).map(|i| (i % 251) as u8 + 1).collect();
    for len in 0..=MAX_INLINE {
        let mem = zeroed(64);
        let mut ring = SendRing::new(&mem[..], 8).unwrap();
        ring.push(head(2, flags::INLINE), Body::Inline(&data[..len]));
        let w = values(&mem);
        let slots = 1 + len.saturating_sub(24).div_ceil(56);
        assert_eq!(w[0] >> 24 & 0xff, slots as u64, "slots of {len} bytes");
        assert_eq!(w[3] >> 32, len as u64);
        let mut bytes: Vec<u8> = w[4..7].iter().flat_map(|x| x.to_le_bytes()).collect();
        for slot in 1..slots {
            assert_eq!(w[8 * slot + 7], slot as u64 + 1);
            bytes.extend(
                w[8 * slot..8 * slot + 7]
                    .iter()
                    .flat_map(|x| x.to_le_bytes()),
            );
        }
        assert_eq!(&bytes[..len], &data[..len]);
        assert!(
            bytes[len..].iter().all(|b| *b == 0),
            "zeros after {len} bytes"
        );
        assert_eq!(ring.next() as usize, slots);
    }
}

#[test]
fn atomics_carry_their_operands() {
    let mem = zeroed(64);
    let mut ring = SendRing::new(&mem[..], 8).unwrap();
    ring.push(
        head(6, 0),
        Body::Atomic {
            sge: sge(3),
            operand: 99,
            compare: None,
        },
    );
    ring.push(
        head(5, 0),
        Body::Atomic {
            sge: sge(4),
            operand: 7,
            compare: Some(1234),
        },
    );
    let w = values(&mem);
    assert_eq!((w[0] >> 16 & 0xffff, w[6], w[7]), (0x0101, 99, 1));
    assert_eq!((w[8] >> 16 & 0xffff, w[14], w[15]), (0x0201, 7, 2));
    assert_eq!((w[16], w[23]), (1234, 3));
}

#[test]
fn work_requests_wrap_around_the_ring() {
    let mem = zeroed(64);
    let mut ring = SendRing::new(&mem[..], 8).unwrap();
    let data = [0x5a; 100];
    for round in 0..100u32 {
        let position = ring.push(head(2, 0), Body::Inline(&data));
        assert_eq!(position, 3 * round);
        for i in 0..3 {
            let slot = ((position + i) % 8) as usize;
            assert_eq!(
                mem[8 * slot + 7].load(Ordering::Relaxed),
                u64::from(position + i + 1)
            );
        }
        assert_eq!(ring.room(position + 3), 8);
        assert_eq!(ring.room(position), 5);
    }
}

#[test]
fn receives_of_every_stride() {
    for (stride, max) in [(32u32, 1usize), (64, 3), (128, 7), (256, 15)] {
        let words = stride as usize / 8;
        let mem = zeroed(4 * words);
        let mut ring = RecvRing::new(&mem[..], 4, stride).unwrap();
        assert_eq!(ring.max_sge(), max);
        for round in 0..10usize {
            let n = round % (max + 1);
            let sges: Vec<Sge> = (0..n as u32).map(sge).collect();
            assert_eq!(
                ring.push(round as u64 + 500, &sges, 0xfff0 + round as u16),
                round as u32
            );
            let w = values(&mem[words * (round % 4)..][..words]);
            assert_eq!(w[0], round as u64 + 500);
            for (i, s) in sges.iter().enumerate() {
                assert_eq!([w[1 + 2 * i], w[2 + 2 * i]], s.to_words());
            }
            let tag = 0xfff0 + round as u64;
            assert_eq!(
                w[words - 1],
                (round as u64 + 1) | (n as u64) << 32 | tag << 48
            );
        }
        assert!(
            RecvRing::new(&mem[..], 8, stride).is_none(),
            "more entries than memory"
        );
    }
    assert!(RecvRing::new(&zeroed(64)[..], 4, 48).is_none());
}

#[test]
fn rings_refuse_sizes_that_are_none() {
    let mem = zeroed(64);
    assert!(SendRing::new(&mem[..], 6).is_none());
    assert!(SendRing::new(&mem[..], 16).is_none());
    assert!(SendRing::new(&mem[..], 0).is_none());
    assert!(CompletionRing::new(&mem[..], &mem[..7], 3, 1).is_none());
    assert!(CompletionRing::new(&mem[..63], &mem[..], 3, 1).is_none());
    let mut ring = CompletionRing::new(&mem[..], &mem[..8], 3, 1).unwrap();
    assert!(ring.replace(&mem[..], 4, 1).is_err());
    assert!(ring.replace(&mem[..], 32, 1).is_err());
    assert_eq!(ring.slots(), 8);
}

#[test]
fn completions_are_taken_in_order_and_told_now_and_then() {
    let (mem, control) = (zeroed(8 * SLOT_WORDS), zeroed(SLOT_WORDS));
    let mut ring = CompletionRing::new(&mem[..], &control[..], 3, 3).unwrap();
    assert_eq!(ring.pop(), None);
    for i in 0..50u32 {
        let cqe = Cqe {
            wr_id: u64::from(i) << 32 | 5,
            status: (i % 3) as u8,
            opcode: 128,
            flags: 2,
            syndrome: 9,
            qpn: 0x12_3456,
            byte_len: i,
            imm: !i,
            data: [1, 2, 3, u64::from(i)],
            wqe: i as u16,
            qp: 77,
        };
        for (k, w) in cqe.to_words(i).into_iter().enumerate() {
            mem[(i as usize % 8) * 8 + k].store(w, Ordering::Relaxed);
        }
        assert_eq!(ring.pop(), Some(cqe));
        assert_eq!(ring.pop(), None, "the entry of the lap before is not new");
        assert_eq!(
            control[0].load(Ordering::Relaxed),
            u64::from((i + 1) / 3 * 3),
            "the consumer index"
        );
    }
    ring.arm(2);
    assert_eq!(control[1].load(Ordering::Relaxed), 2);
    assert_eq!(ring.armed(), 2);
}

#[test]
fn a_ring_goes_on_with_another_one_from_its_first_position() {
    let (old, control, new) = (
        zeroed(8 * SLOT_WORDS),
        zeroed(SLOT_WORDS),
        zeroed(16 * SLOT_WORDS),
    );
    let mut ring = CompletionRing::new(&old[..], &control[..], 3, 100).unwrap();
    let at = |ring: &[AtomicU64], position: u32, wr_id: u64| {
        let mut words = Cqe::from_words([0; SLOT_WORDS]).to_words(position);
        words[0] = wr_id;
        for (k, w) in words.into_iter().enumerate() {
            ring[position as usize % (ring.len() / 8) * 8 + k].store(w, Ordering::Relaxed);
        }
    };
    for i in 0..5 {
        at(&old, i, u64::from(i));
    }
    assert_eq!(ring.pop().unwrap().wr_id, 0);
    assert_eq!(ring.pop().unwrap().wr_id, 1);
    ring.publish();
    assert_eq!(control[0].load(Ordering::Relaxed), 2);
    ring.arm(1);
    for i in 0..3 {
        at(&new, i, u64::from(i) + 2);
    }
    assert_eq!(ring.replace(&new[..], 4, 100).unwrap().len(), old.len());
    assert_eq!((ring.slots(), control[0].load(Ordering::Relaxed)), (16, 0));
    assert_eq!(ring.armed(), 1, "the arm word stays");
    for i in 2..5 {
        assert_eq!(ring.pop().unwrap().wr_id, i);
    }
    assert_eq!(ring.pop(), None);
}

#[test]
fn a_bind_is_one_slot() {
    let mem = zeroed(64);
    let mut ring = SendRing::new(&mem[..], 8).unwrap();
    let bind = SendHead {
        remote_addr: 0b110,
        ..head(8, flags::SIGNALED)
    };
    let body = Body::Bind {
        addr: 0xa000,
        lkey: 0x99,
        len: 1 << 40,
    };
    assert_eq!((body.slots(), ring.push(bind, body)), (1, 0));
    let expect = [
        0x1122_3344_0101_0208,
        0x0102_0304_0506_0708,
        0b110,
        0x5566_7788,
        0xa000,
        0x99,
        1 << 40,
        1,
    ];
    assert_eq!(values(&mem[..8]), expect);
}

proptest! {
    /// No sequence of work requests leaves a slot whose stamp is that of a position not yet written.
    #[test]
    fn no_slot_looks_posted_before_it_is(bodies in prop::collection::vec((0usize..=416, 0usize..=16), 1..200)) {
        let mem = zeroed(16 * SLOT_WORDS);
        let mut ring = SendRing::new(&mem[..], 16).unwrap();
        let data = [0xff; MAX_INLINE];
        let sges = [sge(0); 16];
        for (len, n) in bodies {
            let body = if n == 0 { Body::Inline(&data[..len]) } else { Body::Sges(&sges[..n]) };
            ring.push(head(2, 0), body);
            for ahead in 0..16u32 {
                let position = ring.next().wrapping_add(ahead);
                let stamp = mem[8 * (position % 16) as usize + 7].load(Ordering::Relaxed) as u32;
                prop_assert_ne!(stamp, position.wrapping_add(1));
            }
        }
    }
}
