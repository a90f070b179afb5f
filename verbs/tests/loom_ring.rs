//! The rings and the doorbell under every interleaving: run with `RUSTFLAGS="--cfg loom"`.
#![cfg(loom)]

use hyv_abi::doorbell::{Ring, cool, doze, ring};
use hyv_abi::queue::{Cqe, SLOT_WORDS, SendHead, seq};
use hyv_abi::sync::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use hyv_verbs::ring::{Body, CompletionRing, RecvRing, SendRing, Words};
use loom::sync::Arc;
use loom::thread;

#[derive(Clone)]
struct Mem(Arc<Vec<AtomicU64>>);

impl Mem {
    fn new(words: usize) -> Self {
        Self(Arc::new((0..words).map(|_| AtomicU64::new(0)).collect()))
    }
}

impl Words for Mem {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn head(wr_id: u64) -> SendHead {
    SendHead {
        opcode: 2,
        flags: 0,
        num_sge: 0,
        slots: 0,
        imm: 0,
        wr_id,
        remote_addr: 0,
        rkey: 0,
        inline_len: 0,
    }
}

/// Waits for a word's low half, giving the others a turn.
fn await_seq(word: &AtomicU64, expect: u32) -> u64 {
    loop {
        let v = word.load(Ordering::Acquire);
        if v as u32 == expect {
            return v;
        }
        thread::yield_now();
    }
}

/// Who sees the head of a work request sees all of it, extension slots included.
#[test]
fn a_posted_work_request_is_whole() {
    loom::model(|| {
        let mem = Mem::new(4 * SLOT_WORDS);
        let device = mem.clone();
        let engine = thread::spawn(move || {
            let w = device.words();
            await_seq(&w[7], seq(0));
            assert_eq!(w[0].load(Ordering::Relaxed) >> 24 & 0xff, 2, "slots");
            assert_eq!(w[1].load(Ordering::Relaxed), 77, "wr_id");
            assert_eq!(w[4].load(Ordering::Relaxed), u64::from_le_bytes([1; 8]));
            assert_eq!(
                w[8].load(Ordering::Relaxed),
                u64::from_le_bytes([1; 8]),
                "the extension's data"
            );
            assert_eq!(
                w[15].load(Ordering::Relaxed),
                u64::from(seq(1)),
                "its stamp"
            );
        });
        let mut ring = SendRing::new(mem, 4).unwrap();
        ring.push(head(77), Body::Inline(&[1; 32]));
        engine.join().unwrap();
    });
}

/// The same for receives.
#[test]
fn a_posted_receive_is_whole() {
    loom::model(|| {
        let mem = Mem::new(2 * 4);
        let device = mem.clone();
        let engine = thread::spawn(move || {
            let w = device.words();
            assert_eq!(await_seq(&w[3], seq(0)) >> 32, 1 | 9 << 16);
            assert_eq!(w[0].load(Ordering::Relaxed), 5);
            assert_eq!(w[1].load(Ordering::Relaxed), 0x1000);
        });
        let mut ring = RecvRing::new(mem, 2, 32).unwrap();
        ring.push(
            5,
            &[hyv_abi::queue::Sge {
                addr: 0x1000,
                len: 8,
                lkey: 1,
            }],
            9,
        );
        engine.join().unwrap();
    });
}

/// Completions arrive whole and in order, and an entry is written again only after it was taken.
#[test]
fn completions_are_whole_and_never_overwritten() {
    loom::model(|| {
        let mem = Mem::new(2 * SLOT_WORDS);
        let control = Mem::new(SLOT_WORDS);
        let (device, line) = (mem.clone(), control.clone());
        let engine = thread::spawn(move || {
            let w = device.words();
            for i in 0..3u32 {
                // Room: the consumer index, as published.
                while i.wrapping_sub(line.words()[0].load(Ordering::Acquire) as u32) >= 2 {
                    thread::yield_now();
                }
                let cqe = Cqe {
                    wr_id: u64::from(i) + 10,
                    status: 0,
                    opcode: 0,
                    flags: 0,
                    syndrome: 0,
                    qpn: 1,
                    byte_len: i,
                    imm: 0,
                    data: [u64::from(i); 4],
                    wqe: 0,
                    qp: 0,
                };
                let words = cqe.to_words(i);
                let slot = &w[(i as usize % 2) * 8..][..8];
                for k in 0..7 {
                    slot[k].store(words[k], Ordering::Relaxed);
                }
                slot[7].store(words[7], Ordering::Release);
            }
        });
        let mut ring = CompletionRing::new(mem, control, 1, 1).unwrap();
        for i in 0..3u32 {
            let cqe = loop {
                match ring.pop() {
                    Some(cqe) => break cqe,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(
                (cqe.wr_id, cqe.byte_len, cqe.data),
                (u64::from(i) + 10, i, [u64::from(i); 4])
            );
        }
        engine.join().unwrap();
    });
}

/// Arm, fence, look again: against a device that writes an entry, fences and looks at the arm word, either the
/// entry is seen here or the event is raised there.
#[test]
fn a_completion_after_arming_is_seen_or_announced() {
    loom::model(|| {
        let mem = Mem::new(2 * SLOT_WORDS);
        let control = Mem::new(SLOT_WORDS);
        let (device, line) = (mem.clone(), control.clone());
        let engine = thread::spawn(move || {
            device.words()[7].store(u64::from(seq(0)), Ordering::Release);
            fence(Ordering::SeqCst);
            line.words()[1].load(Ordering::Relaxed) != 0
        });
        let mut ring = CompletionRing::new(mem, control, 1, 1).unwrap();
        ring.arm(2);
        fence(Ordering::SeqCst);
        let seen = ring.pop().is_some();
        let announced = engine.join().unwrap();
        assert!(seen || announced);
    });
}

struct Bell {
    polled: AtomicU8,
    l0: AtomicU64,
    l1: AtomicU64,
    need_wakeup: AtomicU32,
}

/// A work request posted while the engine cools the queue down and goes to sleep is seen by the engine, or its user is
/// told to kick.
#[test]
fn a_post_is_never_missed() {
    loom::model(|| {
        let mem = Mem::new(2 * SLOT_WORDS);
        let bell = Arc::new(Bell {
            polled: AtomicU8::new(1),
            l0: AtomicU64::new(0),
            l1: AtomicU64::new(0),
            need_wakeup: AtomicU32::new(0),
        });
        let (device, flags) = (mem.clone(), Arc::clone(&bell));
        let engine = thread::spawn(move || {
            let posted = || device.words()[7].load(Ordering::Acquire) as u32 == seq(0);
            cool(&flags.polled, posted)
                || doze(&flags.need_wakeup, || flags.l1.load(Ordering::Relaxed) != 0)
        });
        let mut send = SendRing::new(mem, 2).unwrap();
        send.push(head(1), Body::None);
        let told = ring(
            &bell.polled,
            (&bell.l0, 1),
            (&bell.l1, 1),
            &bell.need_wakeup,
        );
        let awake = engine.join().unwrap();
        assert!(
            awake || told == Ring::Kick,
            "the engine sleeps and nobody kicks it"
        );
    });
}
