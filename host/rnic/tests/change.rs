//! What changes an object that stays: rereg_mr and resize_cq; and how long old keys and numbers stay wrong.

mod common;

use std::collections::HashSet;

use common::*;
use hyv_abi::control::{RegMr, ReregMr, ResizeCq, rereg};
use hyv_rnic::Engine;

const DATA: u64 = 1 << 16;

fn pair() -> Pair {
    Pair::new(DATA)
}

/// What leaves everything as it is, once flags are set.
fn same(p: &Pair) -> ReregMr {
    ReregMr {
        mr: p.b.mr.handle,
        flags: 0,
        pd: p.b.pd,
        access: FULL.bits(),
        iova: p.b.mr.iova,
        ram_offset: p.b.mr.offset,
        len: p.b.mr.len,
    }
}

/// A reads 8 bytes of B's.
fn reads(p: &mut Pair, key: u32, addr: u64) -> bool {
    let wr = Wr::new(WrOpcode::Read, 1).sge(p.a.mr.sge(0, 64));
    p.a.qp.post(&wr.remote(addr, key));
    p.pump();
    let ok = match status(&p.a.scq.one()) {
        WcStatus::Success => true,
        WcStatus::RemAccessErr => false,
        other => panic!("{other:?}"),
    };
    if !ok {
        p.a.qp.reset(&mut p.e);
        p.b.qp.reset(&mut p.e);
        connect(&mut p.e, &p.a.qp, &p.b.qp, &Conn::default());
    }
    ok
}

#[test]
fn every_combination_of_changes() {
    for flags in 1..=rereg::ALL {
        let mut p = pair();
        let id = p.b.user.id;
        let other = p.b.user.pd(&mut p.e);
        let at = p.b.user.alloc(4096);
        p.b.user.ram.write(at, &[0xab; 4096]);
        p.b.fill(0, &[0xcd; 4096]);
        let (old, addr) = (p.b.mr.rkey, p.b.mr.iova);
        assert!(reads(&mut p, old, addr));
        let req = ReregMr {
            flags,
            pd: other,
            access: Access::LOCAL_WRITE.bits(),
            iova: 0x1000,
            ram_offset: at,
            len: 4096,
            ..same(&p)
        };
        let new = p.e.rereg_mr(id, &req).expect("rereg_mr");
        assert_eq!(new.handle, p.b.mr.handle);
        assert_eq!(new.lkey, new.rkey);
        assert_ne!(new.rkey, old, "the keys change");
        let moved = flags & rereg::TRANSLATION != 0;
        let now = if moved { 0x1000 } else { addr };
        assert!(!reads(&mut p, old, now), "the old key is dead");
        assert!(!reads(&mut p, old, addr));
        let open = flags & (rereg::PD | rereg::ACCESS) == 0;
        assert_eq!(reads(&mut p, new.rkey, now), open, "flags {flags}");
        if open {
            let byte = if moved { 0xab } else { 0xcd };
            assert_eq!(p.a.data(0, 64), [byte; 64]);
        }
        if moved {
            assert!(!reads(&mut p, new.rkey, addr), "only the new addresses");
        }
        // The PD that it is in is the one that it keeps.
        let busy = Err(VerbError::new(Errno::Busy, Reason::InUse));
        let kept = flags & rereg::PD != 0;
        assert_eq!(p.e.dealloc_pd(id, other), if kept { busy } else { Ok(()) });
        // And back again.
        let back = p.e.rereg_mr(
            id,
            &ReregMr {
                flags: rereg::ALL,
                ..same(&p)
            },
        );
        let back = back.expect("rereg_mr");
        assert!(reads(&mut p, back.rkey, addr));
        assert!(!reads(&mut p, new.rkey, addr));
        if kept {
            p.e.dealloc_pd(id, other).expect("dealloc_pd");
        }
    }
}

#[test]
fn what_is_refused_leaves_the_region_as_it_was() {
    let mut p = pair();
    let (id, end) = (p.b.user.id, p.b.user.ram.len);
    let all = ReregMr {
        flags: rereg::ALL,
        ..same(&p)
    };
    let quota = p.e.device_attr(id).expect("device_attr").max_mr_bytes;
    assert!(quota >= end);
    let cases = [
        (ReregMr { flags: 0, ..all }, Errno::Inval, Reason::BadFlags),
        (ReregMr { flags: 8, ..all }, Errno::Inval, Reason::BadFlags),
        (
            ReregMr {
                flags: rereg::ALL | 1 << 31,
                ..all
            },
            Errno::Inval,
            Reason::BadFlags,
        ),
        (
            ReregMr {
                mr: all.mr ^ 0x1_0000,
                ..all
            },
            Errno::NoEnt,
            Reason::BadHandle,
        ),
        (
            ReregMr {
                pd: all.pd ^ 0x1_0000,
                ..all
            },
            Errno::NoEnt,
            Reason::BadHandle,
        ),
        (
            ReregMr {
                access: 1 << 7,
                ..all
            },
            Errno::Inval,
            Reason::BadAccess,
        ),
        (
            ReregMr {
                access: Access::REMOTE_WRITE.bits(),
                ..all
            },
            Errno::Inval,
            Reason::BadAccess,
        ),
        (ReregMr { len: 0, ..all }, Errno::Inval, Reason::ZeroLength),
        (
            ReregMr {
                iova: u64::MAX,
                ..all
            },
            Errno::Inval,
            Reason::Overflow,
        ),
        (
            ReregMr {
                ram_offset: end,
                ..all
            },
            Errno::Fault,
            Reason::OutsideRam,
        ),
        (
            ReregMr {
                len: end + 1,
                ..all
            },
            Errno::Fault,
            Reason::OutsideRam,
        ),
    ];
    let (key, addr) = (p.b.mr.rkey, p.b.mr.iova);
    for (req, errno, reason) in cases {
        let e = p.e.rereg_mr(id, &req).expect_err("refused");
        assert_eq!(e, VerbError::new(errno, reason), "{req:?}");
        assert!(reads(&mut p, key, addr), "{reason:?}");
    }
    assert_eq!(
        p.e.rereg_mr(p.a.user.id, &ReregMr { mr: 99, ..all }),
        Err(VerbError::new(Errno::NoEnt, Reason::BadHandle))
    );
    // What a flag does not name is not looked at.
    let req = ReregMr {
        flags: rereg::ACCESS,
        pd: u32::MAX,
        iova: u64::MAX,
        ram_offset: u64::MAX,
        len: 0,
        ..all
    };
    p.e.rereg_mr(id, &req).expect("access only");
}

#[test]
fn the_quota_of_memory_follows() {
    let (mut e, _) = engine();
    let user = User::new(&mut e, 1 << 16);
    let pd = user.pd(&mut e);
    let reg = RegMr {
        pd,
        access: 1,
        iova: 0,
        ram_offset: 0,
        len: 1 << 16,
    };
    // Sixteen times the RAM may be registered.
    let all: Vec<_> = (0..16)
        .map(|_| e.reg_mr(user.id, &reg).expect("reg_mr"))
        .collect();
    let full = VerbError::new(Errno::NoMem, Reason::QuotaMemory);
    assert_eq!(e.reg_mr(user.id, &RegMr { len: 1, ..reg }), Err(full));
    let change = |len| ReregMr {
        mr: all[3].handle,
        flags: rereg::TRANSLATION,
        pd: 0,
        access: 0,
        iova: 0,
        ram_offset: 0,
        len,
    };
    e.rereg_mr(user.id, &change(1 << 16)).expect("as long");
    e.rereg_mr(user.id, &change((1 << 16) - 100)).expect("less");
    let small = e
        .reg_mr(user.id, &RegMr { len: 100, ..reg })
        .expect("room for 100");
    assert_eq!(e.rereg_mr(user.id, &change(1 << 16)), Err(full));
    e.dereg_mr(user.id, small.handle).expect("dereg_mr");
    e.rereg_mr(user.id, &change(1 << 16)).expect("room again");
    assert_eq!(e.reg_mr(user.id, &RegMr { len: 1, ..reg }), Err(full));
    for mr in all {
        e.dereg_mr(user.id, mr.handle).expect("dereg_mr");
    }
    e.dealloc_pd(user.id, pd).expect("dealloc_pd");
}

#[test]
fn a_message_under_way_meets_the_new_key() {
    let mut p = Pair::new(4 << 20);
    let wr = Wr::new(WrOpcode::Write, 1).sge(p.a.mr.sge(0, 2 << 20));
    p.a.qp.post(&wr.to(&p.b.mr, 0));
    p.e.poll();
    let req = ReregMr {
        flags: rereg::ACCESS,
        ..same(&p)
    };
    p.e.rereg_mr(p.b.user.id, &req).expect("rereg_mr");
    let before = p.b.user.ram.all();
    p.pump();
    assert_eq!(status(&p.a.scq.one()), WcStatus::RemAccessErr);
    let after = p.b.user.ram.all();
    let (from, to) = (
        p.b.mr.offset as usize,
        (p.b.mr.offset + p.b.mr.len) as usize,
    );
    assert!(before[from..to] == after[from..to], "no byte came after");
}

/// Moves the CQ as the library does; the test's view of it follows.
/// The new ring is the next of the region's second half, which nothing else uses.
fn resize(e: &mut Engine, side: &mut Side, used: &mut u64, log2: u32) -> Result<(), VerbError> {
    let ring = side.mr.offset + side.mr.len / 2 + *used;
    *used += 64 << log2;
    assert!(*used <= side.mr.len / 2);
    side.scq.publish();
    let req = ResizeCq {
        cq: side.scq.handle,
        log2,
        ring,
    };
    e.resize_cq(side.user.id, &req)?;
    side.scq.moved(ring, log2);
    Ok(())
}

#[test]
fn no_completion_is_lost_when_a_queue_is_resized() {
    let mut p = Pair::with(
        64 * DATA,
        Cap {
            sq_log2: 8,
            ..Cap::default()
        },
        &Conn::default(),
    );
    let mut rng = Rng(41);
    let mut used = 0;
    let (mut next, mut seen) = (0u64, 0u64);
    for round in 0..200 {
        for _ in 0..rng.next() % 9 {
            let wr = Wr::new(WrOpcode::Write, next).sge(p.a.mr.sge(0, 8));
            p.a.qp.post(&wr.to(&p.b.mr, 0));
            next += 1;
        }
        p.pump();
        let waiting = next - seen;
        for _ in 0..rng.next() % (waiting + 1) {
            let c = p.a.scq.poll().expect("a completion");
            assert_eq!((c.wr_id, status(&c)), (seen, WcStatus::Success));
            seen += 1;
        }
        let waiting = next - seen;
        let log2 = (rng.next() % 8) as u32;
        let r = resize(&mut p.e, &mut p.a, &mut used, log2);
        if waiting > 1 << log2 {
            let small = VerbError::new(Errno::Inval, Reason::RingTooSmall);
            assert_eq!(r, Err(small), "round {round}: {waiting} in {log2}");
            // All of them are still there: take them out, and then it fits.
            while seen < next {
                assert_eq!(p.a.scq.poll().expect("a completion").wr_id, seen);
                seen += 1;
            }
            resize(&mut p.e, &mut p.a, &mut used, 6).expect("resize_cq");
        } else {
            r.expect("resize_cq");
            if log2 < 5 {
                while seen < next {
                    assert_eq!(p.a.scq.poll().expect("a completion").wr_id, seen);
                    seen += 1;
                }
                resize(&mut p.e, &mut p.a, &mut used, 6).expect("resize_cq");
            }
        }
        if next - seen > 40 {
            while seen < next {
                assert_eq!(p.a.scq.poll().expect("a completion").wr_id, seen);
                seen += 1;
            }
        }
    }
    assert_eq!(pending(&p.a.user.ram) & summary::CQ_ERROR, 0);
}

#[test]
fn an_armed_queue_stays_armed() {
    let mut p = pair();
    p.a.scq.arm(arm::ANY);
    let mut used = 0;
    resize(&mut p.e, &mut p.a, &mut used, 3).expect("resize_cq");
    let i = p.a.scq.index();
    assert!(!event(&p.a.user.ram, summary::CQ_COMPLETION, i));
    let wr = Wr::new(WrOpcode::Write, 1).sge(p.a.mr.sge(0, 8));
    p.a.qp.post(&wr.to(&p.b.mr, 0));
    p.pump();
    assert!(event(&p.a.user.ram, summary::CQ_COMPLETION, i));
    assert_eq!(p.a.scq.one().wr_id, 1);
}

#[test]
fn a_resized_queue_overruns_at_its_new_size() {
    let mut p = pair();
    let mut used = 0;
    resize(&mut p.e, &mut p.a, &mut used, 1).expect("resize_cq");
    for id in 0..3 {
        let wr = Wr::new(WrOpcode::Write, id).sge(p.a.mr.sge(0, 8));
        p.a.qp.post(&wr.to(&p.b.mr, 0));
    }
    p.pump();
    let i = p.a.scq.index();
    assert!(event(&p.a.user.ram, summary::CQ_ERROR, i));
    assert_eq!(p.a.qp.state(&p.e), QpState::Err);
    assert_eq!(p.a.scq.drain().len(), 2);
}

#[test]
fn what_is_asked_of_resize_cq_is_checked() {
    let mut p = pair();
    let (id, end) = (p.a.user.id, p.a.user.ram.len);
    let good = ResizeCq {
        cq: p.a.scq.handle,
        log2: 4,
        ring: p.a.user.alloc(64 << 4),
    };
    let refused = |e: &mut Engine, req: ResizeCq, errno, reason| {
        assert_eq!(
            e.resize_cq(id, &req),
            Err(VerbError::new(errno, reason)),
            "{req:?}"
        );
    };
    use Errno::{Fault, Inval, NoEnt};
    let e = &mut p.e;
    for cq in [good.cq ^ 0x1_0000, good.cq + 9, u32::MAX] {
        refused(e, ResizeCq { cq, ..good }, NoEnt, Reason::BadHandle);
    }
    for log2 in [16, 32, u32::MAX] {
        refused(e, ResizeCq { log2, ..good }, Inval, Reason::BadRingSize);
    }
    for ring in [good.ring + 8, 1] {
        refused(e, ResizeCq { ring, ..good }, Inval, Reason::Misaligned);
    }
    for ring in [end, end - 64, !63] {
        refused(e, ResizeCq { ring, ..good }, Fault, Reason::OutsideRam);
    }
    // A consumer index that cannot be.
    for lie in [1u64, 1 << 20, 1 << 31] {
        p.a.user
            .ram
            .word(p.a.scq.ctrl)
            .store(lie, std::sync::atomic::Ordering::SeqCst);
        refused(e, good, Inval, Reason::BadAttr);
    }
    p.a.scq.publish();
    e.resize_cq(id, &good).expect("resize_cq");
}

#[test]
fn stale_keys_and_numbers_stay_wrong_for_long() {
    const MANY: usize = 100_000;
    let mut p = pair();
    let (id, pd) = (p.b.user.id, p.b.pd);
    let reg = RegMr {
        pd,
        access: FULL.bits(),
        iova: p.b.mr.iova,
        ram_offset: p.b.mr.offset,
        len: 64,
    };
    let first = p.e.reg_mr(id, &reg).expect("reg_mr");
    p.e.dereg_mr(id, first.handle).expect("dereg_mr");
    let (mut keys, mut at) = (HashSet::new(), p.b.mr.iova);
    keys.insert(first.rkey);
    for i in 0..MANY {
        let mr = p.e.reg_mr(id, &reg).expect("reg_mr");
        assert!(keys.insert(mr.rkey), "key {:x} again after {i}", mr.rkey);
        p.e.dereg_mr(id, mr.handle).expect("dereg_mr");
    }
    assert!(!reads(&mut p, first.rkey, std::mem::take(&mut at)));
    let mut numbers = HashSet::new();
    let (sq, rq) = (p.b.user.alloc(64), p.b.user.alloc(64));
    let req = hyv_abi::control::CreateQp {
        pd,
        qp_type: 2,
        send_cq: p.b.scq.handle,
        recv_cq: p.b.rcq.handle,
        srq: u32::MAX,
        sig_all: 0,
        sq_ring: sq,
        rq_ring: rq,
        sq_log2: 0,
        rq_log2: 0,
        rq_stride: 32,
        reserved: 0,
    };
    for i in 0..MANY {
        let qp = p.e.create_qp(id, &req).expect("create_qp");
        assert!(qp.qpn < 1 << 24 && qp.qpn > 1);
        assert!(numbers.insert(qp.qpn), "QPN {:x} again after {i}", qp.qpn);
        p.e.destroy_qp(id, qp.handle).expect("destroy_qp");
    }
}
