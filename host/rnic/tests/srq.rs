//! Shared receive queues: one ring, many QPs.

mod common;

use common::*;
use hyv_abi::control::{CreateCq, CreateSrq, ModifySrq};
use hyv_rnic::Engine;

/// A user with an SRQ and several QPs on it, each connected to a QP of the other.
struct Rig {
    e: Engine,
    /// Sends.
    a: Side,
    /// Receives.
    b: Side,
    srq: Srq,
    to: Vec<Qp>,
}

impl Rig {
    fn new(pairs: usize, log2: u32, data_len: u64, conn: &Conn) -> Self {
        let (mut e, _) = engine();
        let mut a = Side::new(&mut e, data_len, Cap::default());
        let mut b = Side::new(&mut e, data_len, Cap::default());
        let srq = b.user.srq(&mut e, b.pd, log2, 64);
        let cap = Cap {
            srq: srq.handle,
            ..Cap::default()
        };
        let mut to = Vec::new();
        for _ in 0..pairs {
            let x = a.extra_qp(&mut e, Cap::default());
            let y = b.extra_qp(&mut e, cap);
            connect(&mut e, &x, &y, conn);
            to.push(y);
        }
        Self { e, a, b, srq, to }
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
