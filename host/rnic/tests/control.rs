//! Control verbs: every way to get them wrong, and the state machine from end to end.

mod common;

use common::*;
use hyv_abi::control::{CreateCq, CreateQp, ModifyQp, QpAttr, RegMr};
use hyv_rnic::{Engine, UserId};

const RAM: u64 = 1 << 20;

#[track_caller]
fn refused<T: std::fmt::Debug>(what: &str, r: Result<T, VerbError>, errno: Errno, reason: Reason) {
    assert_eq!(r.expect_err(what), VerbError::new(errno, reason), "{what}");
}

#[track_caller]
fn bad_handle<T: std::fmt::Debug>(what: &str, r: Result<T, VerbError>) {
    refused(what, r, Errno::NoEnt, Reason::BadHandle);
}

/// Two users with one of everything each.
struct World {
    e: Engine,
    a: Side,
    b: Side,
}

impl World {
    fn new() -> Self {
        let p = Pair::new(RAM);
        Self {
            e: p.e,
            a: p.a,
            b: p.b,
        }
    }

    fn id(&self) -> UserId {
        self.a.user.id
    }

    /// Handles that name nothing of `a`'s, given a live one of `a`'s and one of `b`'s that `a` has not.
    fn wrong(mine: u32, theirs: u32) -> [u32; 6] {
        assert_ne!(mine, theirs);
        [
            mine ^ 0x1_0000,
            mine ^ 0x8000,
            theirs,
            0,
            u32::MAX,
            mine | 0xffff_0000,
        ]
    }
}

fn mr(w: &World) -> RegMr {
    RegMr {
        pd: w.a.pd,
        access: 1,
        iova: IOVA,
        ram_offset: 0,
        len: 4096,
    }
}

fn cq(ring: u64, ctrl: u64, log2: u32) -> CreateCq {
    CreateCq {
        ring,
        ctrl,
        log2,
        reserved: 0,
    }
}

fn qp(w: &World) -> CreateQp {
    CreateQp {
        pd: w.a.pd,
        qp_type: QpType::Rc as u32,
        send_cq: w.a.scq.handle,
        recv_cq: w.a.rcq.handle,
        srq: u32::MAX,
        sig_all: 0,
        sq_ring: 0,
        rq_ring: 4096,
        sq_log2: 2,
        rq_log2: 2,
        rq_stride: 64,
        reserved: 0,
    }
}

#[test]
fn what_the_device_says_of_itself() {
    let w = World::new();
    let d = w.e.device_attr(w.id()).expect("device_attr");
    assert_eq!((d.node_guid, d.phys_port_cnt), (0x1234, 1));
    assert_eq!(
        (d.max_send_sge, d.max_recv_sge, d.max_inline),
        (16, 15, 416)
    );
    assert_eq!(
        (d.max_qp_wr, d.max_cqe, d.max_qp, d.max_cq),
        (1 << 15, 1 << 15, 16_384, 4_096)
    );
    assert_eq!(d.max_msg_len, 1 << 30);
    assert_eq!(d.max_mr_size, w.a.user.ram.len);
    let p = w.e.port_attr(1).expect("port 1");
    assert_eq!(
        (p.state, p.active_mtu, p.gid_tbl_len, p.max_msg_len),
        (4, 4096, 1, 1 << 30)
    );
    assert_eq!(w.e.gid(1, 0), Ok(GID));
    for port in [0, 2, u32::MAX] {
        refused("port", w.e.port_attr(port), Errno::Inval, Reason::BadGid);
        refused("gid", w.e.gid(port, 0), Errno::Inval, Reason::BadGid);
    }
    refused("gid index", w.e.gid(1, 1), Errno::Inval, Reason::BadGid);
    let mapped = |a: [u8; 4]| std::net::Ipv4Addr::from(a).to_ipv6_mapped().octets();
    for gid in [
        GID,
        [0; 16],
        std::net::Ipv6Addr::LOCALHOST.octets(),
        mapped([127, 0, 0, 1]),
    ] {
        assert!(w.e.is_local(&gid), "{gid:?}");
    }
    for gid in [[1; 16], mapped([10, 0, 0, 1])] {
        assert!(!w.e.is_local(&gid), "{gid:?}");
    }
}

#[test]
fn protection_domains() {
    let mut w = World::new();
    let id = w.id();
    let spare = w.e.alloc_pd(w.b.user.id).expect("b's second");
    for h in World::wrong(w.a.pd, spare) {
        bad_handle("dealloc_pd", w.e.dealloc_pd(id, h));
    }
    refused(
        "in use",
        w.e.dealloc_pd(id, w.a.pd),
        Errno::Busy,
        Reason::InUse,
    );
    w.e.destroy_qp(id, w.a.qp.handle).expect("destroy_qp");
    refused(
        "by an MR",
        w.e.dealloc_pd(id, w.a.pd),
        Errno::Busy,
        Reason::InUse,
    );
    w.e.dereg_mr(id, w.a.mr.handle).expect("dereg_mr");
    w.e.dealloc_pd(id, w.a.pd).expect("nothing uses it");
    bad_handle("twice", w.e.dealloc_pd(id, w.a.pd));
    let max = w.e.device_attr(id).expect("attr").max_pd;
    let all: Vec<u32> = (0..max)
        .map(|_| w.e.alloc_pd(id).expect("within the quota"))
        .collect();
    refused(
        "quota",
        w.e.alloc_pd(id),
        Errno::NoMem,
        Reason::QuotaObjects,
    );
    w.e.alloc_pd(w.b.user.id)
        .expect("another user's quota is its own");
    w.e.dealloc_pd(id, all[7]).expect("dealloc");
    let new = w.e.alloc_pd(id).expect("room again");
    assert_ne!(new, all[7], "a handle is not used twice");
    bad_handle("stale", w.e.dealloc_pd(id, all[7]));
}

#[test]
fn memory_regions() {
    let mut w = World::new();
    let id = w.id();
    let end = w.a.user.ram.len;
    let reg = |w: &mut World, f: &dyn Fn(&mut RegMr)| {
        let mut r = mr(w);
        f(&mut r);
        w.e.reg_mr(id, &r)
    };
    for bits in [1 << 5, 1 << 31, 0xff, u32::MAX] {
        let r = reg(&mut w, &|r| r.access = bits);
        refused("unknown access", r, Errno::Inval, Reason::BadAccess);
    }
    for a in [
        Access::REMOTE_WRITE,
        Access::REMOTE_ATOMIC,
        FULL - Access::LOCAL_WRITE,
    ] {
        let r = reg(&mut w, &|r| r.access = a.bits());
        refused(
            "remote without local write",
            r,
            Errno::Inval,
            Reason::BadAccess,
        );
    }
    let r = reg(&mut w, &|r| r.len = 0);
    refused("no bytes", r, Errno::Inval, Reason::ZeroLength);
    for iova in [u64::MAX, u64::MAX - 4094] {
        let r = reg(&mut w, &|r| r.iova = iova);
        refused("iova wraps", r, Errno::Inval, Reason::Overflow);
    }
    for (at, len) in [
        (end, 1),
        (end - 1, 2),
        (0, end + 1),
        (1, end),
        (u64::MAX, 1),
        (u64::MAX - 4095, 4096),
        (end - 4096, u64::MAX - 8192),
        (1 << 63, 1 << 63),
    ] {
        let r = reg(&mut w, &|r| (r.iova, r.ram_offset, r.len) = (0, at, len));
        refused("outside RAM", r, Errno::Fault, Reason::OutsideRam);
    }
    let spare = w.e.alloc_pd(w.b.user.id).expect("b's second");
    for pd in World::wrong(w.a.pd, spare) {
        let r = reg(&mut w, &|r| r.pd = pd);
        bad_handle("PD", r);
    }
    let theirs = w.b.user.mr_at(&mut w.e, w.b.pd, 0, 1, FULL).handle;
    for h in World::wrong(w.a.mr.handle, theirs) {
        bad_handle("dereg_mr", w.e.dereg_mr(id, h));
    }
    // Any alignment, the whole of RAM, read only, iova 0 and as high as there is.
    for (iova, at, len, access) in [
        (0, 3, 1, Access::empty()),
        (u64::MAX - 5000, 1, 5000, FULL),
        (7, 0, end, Access::REMOTE_READ),
        (0, 0, end, Access::MW_BIND),
    ] {
        let r = reg(&mut w, &|r| {
            (r.iova, r.ram_offset, r.len, r.access) = (iova, at, len, access.bits());
        })
        .expect("legitimate");
        w.e.dereg_mr(id, r.handle).expect("dereg");
        bad_handle("twice", w.e.dereg_mr(id, r.handle));
    }
}

#[test]
fn quotas_of_memory_regions() {
    let mut w = World::new();
    let id = w.id();
    let d = w.e.device_attr(id).expect("attr");
    let whole = RegMr {
        len: d.max_mr_size,
        ..mr(&w)
    };
    let mut bytes = w.a.mr.len;
    let mut last = 0;
    while bytes + whole.len <= d.max_mr_bytes {
        last = w.e.reg_mr(id, &whole).expect("within the quota").handle;
        bytes += whole.len;
    }
    refused(
        "bytes",
        w.e.reg_mr(id, &whole),
        Errno::NoMem,
        Reason::QuotaMemory,
    );
    let theirs = RegMr {
        pd: w.b.pd,
        ..whole
    };
    w.e.reg_mr(w.b.user.id, &theirs)
        .expect("another user's quota is its own");
    w.e.dereg_mr(id, last).expect("dereg");
    let h = w.e.reg_mr(id, &whole).expect("room again").handle;
    w.e.dereg_mr(id, h).expect("dereg");

    let mut w = World::new();
    let id = w.id();
    let small = RegMr { len: 1, ..mr(&w) };
    let mut keys = std::collections::HashSet::from([w.a.mr.rkey]);
    for i in 1..d.max_mr {
        let m =
            w.e.reg_mr(id, &small)
                .unwrap_or_else(|e| panic!("MR {i}: {e}"));
        assert!(keys.insert(m.rkey), "keys differ");
        assert_eq!(m.lkey, m.rkey);
    }
    refused(
        "objects",
        w.e.reg_mr(id, &small),
        Errno::NoMem,
        Reason::QuotaObjects,
    );
}

#[test]
fn completion_queues() {
    let mut w = World::new();
    let id = w.id();
    let end = w.a.user.ram.len;
    for log2 in [16, 17, 31, 32, 58, 64, u32::MAX] {
        refused(
            "log2",
            w.e.create_cq(id, &cq(0, 0, log2)),
            Errno::Inval,
            Reason::BadRingSize,
        );
    }
    for at in [1, 8, 32, 63, 4097] {
        let r = w.e.create_cq(id, &cq(at, 0, 0));
        refused("ring", r, Errno::Inval, Reason::Misaligned);
        let r = w.e.create_cq(id, &cq(0, at, 0));
        refused("ctrl", r, Errno::Inval, Reason::Misaligned);
    }
    let top = u64::MAX - 63;
    for (ring, ctrl, log2) in [
        (end, 0, 0),
        (0, end, 0),
        (end - 64, 0, 1),
        (end - (1 << 20), 0, 15),
        (top, 0, 0),
        (top, 0, 15),
        (0, top, 0),
    ] {
        let r = w.e.create_cq(id, &cq(ring, ctrl, log2));
        refused("outside", r, Errno::Fault, Reason::OutsideRam);
    }
    let theirs = (0..3)
        .map(|_| w.b.user.cq(&mut w.e, 0).handle)
        .last()
        .expect("3");
    for h in World::wrong(w.a.scq.handle, theirs) {
        bad_handle("destroy_cq", w.e.destroy_cq(id, h));
    }
    for h in [w.a.scq.handle, w.a.rcq.handle] {
        refused("in use", w.e.destroy_cq(id, h), Errno::Busy, Reason::InUse);
    }
    w.e.destroy_qp(id, w.a.qp.handle).expect("destroy_qp");
    for h in [w.a.scq.handle, w.a.rcq.handle] {
        w.e.destroy_cq(id, h).expect("nothing uses it");
        bad_handle("twice", w.e.destroy_cq(id, h));
    }
    // The smallest and the largest; the last bytes of RAM.
    for (ring, ctrl, log2) in [(0, 64, 0), (end - 64, end - 128, 0), (64, 0, 13)] {
        let h =
            w.e.create_cq(id, &cq(ring, ctrl, log2))
                .expect("legitimate");
        w.e.destroy_cq(id, h).expect("destroy");
    }
    let max = w.e.device_attr(id).expect("attr").max_cq;
    for i in 0..max {
        w.e.create_cq(id, &cq(0, 64, 0))
            .unwrap_or_else(|e| panic!("CQ {i}: {e}"));
    }
    refused(
        "quota",
        w.e.create_cq(id, &cq(0, 64, 0)),
        Errno::NoMem,
        Reason::QuotaObjects,
    );
    w.b.user.cq(&mut w.e, 0);
}

#[test]
fn queue_pairs() {
    let mut w = World::new();
    let id = w.id();
    let end = w.a.user.ram.len;
    let make = |w: &mut World, f: &dyn Fn(&mut CreateQp)| {
        let mut r = qp(w);
        f(&mut r);
        w.e.create_qp(id, &r)
    };
    for ty in [0, 1, 5, 8, u32::MAX] {
        let r = make(&mut w, &|r| r.qp_type = ty);
        refused("type", r, Errno::Inval, Reason::BadQpType);
    }
    let pd = w.e.alloc_pd(w.b.user.id).expect("b's second");
    for h in World::wrong(w.a.pd, pd) {
        let r = make(&mut w, &|r| r.pd = h);
        bad_handle("PD", r);
    }
    let theirs = (0..3)
        .map(|_| w.b.user.cq(&mut w.e, 0).handle)
        .last()
        .expect("3");
    for h in World::wrong(w.a.scq.handle, theirs) {
        if h == w.a.rcq.handle {
            continue;
        }
        let r = make(&mut w, &|r| r.send_cq = h);
        bad_handle("send CQ", r);
        let r = make(&mut w, &|r| r.recv_cq = h);
        bad_handle("receive CQ", r);
    }
    for h in [0, 1, 0x1_0000] {
        let r = make(&mut w, &|r| r.srq = h);
        bad_handle("SRQ", r);
    }
    for log2 in [16, 32, 63, u32::MAX] {
        let r = make(&mut w, &|r| r.sq_log2 = log2);
        refused("SQ", r, Errno::Inval, Reason::BadRingSize);
        let r = make(&mut w, &|r| r.rq_log2 = log2);
        refused("RQ", r, Errno::Inval, Reason::BadRingSize);
    }
    for stride in [0, 8, 16, 31, 33, 48, 96, 512, u32::MAX] {
        let r = make(&mut w, &|r| r.rq_stride = stride);
        refused("stride", r, Errno::Inval, Reason::BadStride);
    }
    for at in [8, 32, 65] {
        let r = make(&mut w, &|r| r.sq_ring = at);
        refused("SQ", r, Errno::Inval, Reason::Misaligned);
        let r = make(&mut w, &|r| r.rq_ring = at);
        refused("RQ", r, Errno::Inval, Reason::Misaligned);
    }
    for at in [end - 192, end, u64::MAX - 63] {
        let r = make(&mut w, &|r| r.sq_ring = at);
        refused("SQ", r, Errno::Fault, Reason::OutsideRam);
        let r = make(&mut w, &|r| r.rq_ring = at);
        refused("RQ", r, Errno::Fault, Reason::OutsideRam);
    }
    let r = make(&mut w, &|r| (r.rq_log2, r.rq_stride) = (15, 256));
    refused("RQ longer than RAM", r, Errno::Fault, Reason::OutsideRam);
    // What failed used nothing up.
    w.e.destroy_qp(id, w.a.qp.handle).expect("destroy");
    w.e.dereg_mr(id, w.a.mr.handle).expect("dereg");
    w.e.dealloc_pd(id, w.a.pd)
        .expect("no reference left behind");
    for h in [w.a.scq.handle, w.a.rcq.handle] {
        w.e.destroy_cq(id, h).expect("no reference left behind");
    }
}

#[test]
fn handles_of_queue_pairs() {
    let mut w = World::new();
    let id = w.id();
    let theirs = (0..3)
        .map(|_| w.b.extra_qp(&mut w.e, Cap::default()).handle)
        .last()
        .expect("3");
    let mut handles = World::wrong(w.a.qp.handle, theirs).to_vec();
    let spare = w.e.create_qp(id, &qp(&w)).expect("QP").handle;
    w.e.destroy_qp(id, spare).expect("destroy");
    handles.push(spare);
    let again = w.e.create_qp(id, &qp(&w)).expect("QP");
    assert_ne!(again.handle, spare);
    assert!(
        again.qpn > 1 && again.qpn < 1 << 24,
        "0 and 1 are reserved, 24 bits"
    );
    for h in handles {
        bad_handle("destroy_qp", w.e.destroy_qp(id, h));
        bad_handle("query_qp", w.e.query_qp(id, h));
        let m = ModifyQp {
            qp: h,
            mask: M::STATE.bits(),
            attr: attr(),
        };
        bad_handle("modify_qp", w.e.modify_qp(id, &m));
    }
    assert_eq!(
        w.a.qp.state(&w.e),
        QpState::Rts,
        "none of it touched the live one"
    );
    assert_eq!(w.b.qp.state(&w.e), QpState::Rts);
}

#[test]
fn quotas_of_queue_pairs_and_users() {
    let (mut e, _clock) = engine();
    let mut total = 0;
    let mut full = None;
    for n in 0..4 {
        let mut u = User::new(&mut e, 1 << 16);
        let pd = u.pd(&mut e);
        let cq = u.cq(&mut e, 2);
        let mut req = CreateQp {
            pd,
            qp_type: 2,
            send_cq: cq.handle,
            recv_cq: cq.handle,
            srq: u32::MAX,
            sig_all: 0,
            sq_ring: 8192,
            rq_ring: 12_288,
            sq_log2: 0,
            rq_log2: 0,
            rq_stride: 32,
            reserved: 0,
        };
        req.sig_all = n;
        let mut mine = 0;
        let err = loop {
            match e.create_qp(u.id, &req) {
                Ok(_) => mine += 1,
                Err(err) => break err,
            }
        };
        assert_eq!(err, VerbError::new(Errno::NoMem, Reason::QuotaObjects));
        total += mine;
        assert!(
            mine == 16_384 || total == 65_534,
            "{mine} of user {n}, {total} in all"
        );
        full = Some(u);
    }
    assert_eq!(total, 65_534, "the device's own limit");
    e.remove_user(full.expect("four").id);
    let mut users = Vec::new();
    let err = loop {
        let ram = Ram::new(4096);
        match try_user(&mut e, ram) {
            Ok(id) => users.push(id),
            Err(err) => break err,
        }
    };
    assert_eq!((users.len(), err.reason), (512 - 3, Reason::QuotaObjects));
    e.remove_user(users[0]);
    try_user(&mut e, Ram::new(4096)).expect("room again");
    bad_handle("removed", e.alloc_pd(users[0]));
}

#[test]
fn a_removed_user_can_do_nothing() {
    let mut w = World::new();
    let id = w.id();
    w.e.remove_user(id);
    w.e.remove_user(id);
    bad_handle("device_attr", w.e.device_attr(id));
    bad_handle("alloc_pd", w.e.alloc_pd(id));
    bad_handle("dealloc_pd", w.e.dealloc_pd(id, w.a.pd));
    bad_handle("reg_mr", w.e.reg_mr(id, &mr(&w)));
    bad_handle("dereg_mr", w.e.dereg_mr(id, w.a.mr.handle));
    bad_handle("create_cq", w.e.create_cq(id, &cq(0, 64, 0)));
    bad_handle("destroy_cq", w.e.destroy_cq(id, w.a.scq.handle));
    bad_handle("create_qp", w.e.create_qp(id, &qp(&w)));
    bad_handle("query_qp", w.e.query_qp(id, w.a.qp.handle));
    bad_handle("destroy_qp", w.e.destroy_qp(id, w.a.qp.handle));
    bad_handle("modify_qp", w.a.qp.go(&mut w.e, QpState::Reset));
    assert!(!w.e.owns_qpn(id, w.a.qp.qpn));
    w.e.fail_qpn(id, w.b.qp.qpn);
}

/// What `modify_qp` needs and allows for RC (IBA 1.4, 11.2.5.2): from, to, required, optional. A change of
/// nothing but the state to RESET or ERR is possible from everywhere.
fn table() -> Vec<(QpState, QpState, M, M)> {
    use QpState::{Init, Reset, Rtr, Rts, Sqd};
    let init = M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS;
    let none = M::empty();
    let live = M::ACCESS_FLAGS | M::MIN_RNR_TIMER;
    let path = M::AV | M::PORT | M::PKEY_INDEX | M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY;
    let rd = M::MAX_QP_RD_ATOMIC | M::MAX_DEST_RD_ATOMIC;
    vec![
        (Reset, Init, init, none),
        (Init, Init, none, init),
        (Init, Rtr, RTR - M::STATE, M::ACCESS_FLAGS | M::PKEY_INDEX),
        (Rtr, Rts, RTS - M::STATE, live),
        (Rts, Rts, none, live),
        (Rts, Sqd, none, M::EN_SQD_ASYNC_NOTIFY),
        (Sqd, Sqd, none, path | rd | live),
        (Sqd, Rts, none, live),
    ]
}

fn good_attr(to: QpState, peer: u32) -> QpAttr {
    let mut a = attr();
    (a.state, a.port_num, a.access, a.path_mtu) = (to as u32, 1, FULL.bits(), 1024);
    (a.dest_qp_num, a.rq_psn, a.sq_psn, a.dest_gid) = (peer, 5, 6, GID);
    (a.max_rd_atomic, a.max_dest_rd_atomic, a.min_rnr_timer) = (1, 2, 3);
    (a.timeout, a.retry_cnt, a.rnr_retry) = (4, 5, 6);
    (a.traffic_class, a.hop_limit) = (8, 64);
    a
}

/// A fresh QP in a state.
fn at(w: &mut World, state: QpState) -> Qp {
    let cap = Cap {
        sq_log2: 0,
        rq_log2: 0,
        stride: 32,
        ..Cap::default()
    };
    let q = w.a.extra_qp(&mut w.e, cap);
    let (c, peer) = (Conn::default(), w.b.qp.qpn);
    if state == QpState::Err {
        q.go(&mut w.e, state).expect("ERR");
        return q;
    }
    let n = state as u32;
    if n >= 1 {
        q.init(&mut w.e, &c);
    }
    if n >= 2 {
        q.rtr(&mut w.e, peer, &c);
    }
    if n >= 3 {
        q.rts(&mut w.e, &c);
    }
    if n == 4 {
        q.go(&mut w.e, state).expect("SQD");
    }
    assert_eq!(q.state(&w.e), state);
    q
}

const STATES: [QpState; 6] = [
    QpState::Reset,
    QpState::Init,
    QpState::Rtr,
    QpState::Rts,
    QpState::Sqd,
    QpState::Err,
];

#[test]
fn the_state_machine() {
    let mut w = World::new();
    let peer = w.b.qp.qpn;
    for from in STATES {
        for to in QpState::ALL {
            let free = matches!(to, QpState::Reset | QpState::Err);
            let row = table().into_iter().find(|r| (r.0, r.1) == (from, to));
            let Some((_, _, required, optional)) =
                row.or(free.then_some((from, to, M::empty(), M::empty())))
            else {
                let q = at(&mut w, from);
                let before = w.e.query_qp(q.owner, q.handle).expect("query");
                for mask in [M::STATE, INIT, RTR, RTS] {
                    let r = q.modify(&mut w.e, mask, good_attr(to, peer));
                    let what = format!("{from:?} to {to:?}");
                    refused(&what, r, Errno::Inval, Reason::BadTransition);
                }
                assert_eq!(w.e.query_qp(q.owner, q.handle), Ok(before));
                w.e.destroy_qp(q.owner, q.handle).expect("destroy");
                continue;
            };
            for bit in M::all().iter() {
                if bit == M::STATE || bit == M::CUR_STATE {
                    continue;
                }
                let q = at(&mut w, from);
                let before = w.e.query_qp(q.owner, q.handle).expect("query");
                let what = format!("{from:?} to {to:?}, {bit:?}");
                let full = M::STATE | required;
                let now = if required.contains(bit) {
                    let r = q.modify(&mut w.e, full - bit, good_attr(to, peer));
                    refused(&what, r, Errno::Inval, Reason::MissingAttr);
                    from
                } else if optional.contains(bit) {
                    q.modify(&mut w.e, full | bit, good_attr(to, peer))
                        .expect(&what);
                    to
                } else {
                    let r = q.modify(&mut w.e, full | bit, good_attr(to, peer));
                    refused(&what, r, Errno::Inval, Reason::ExtraAttr);
                    from
                };
                assert_eq!(q.state(&w.e), now, "{what}");
                if now == from && from != to {
                    assert_eq!(w.e.query_qp(q.owner, q.handle), Ok(before), "{what}");
                }
                w.e.destroy_qp(q.owner, q.handle).expect("destroy");
            }
            let q = at(&mut w, from);
            let mut a = good_attr(to, peer);
            let full = M::STATE | M::CUR_STATE | required;
            a.cur_state = if from == QpState::Rts { 0 } else { 3 };
            let r = q.modify(&mut w.e, full, a);
            refused("cur_state", r, Errno::Inval, Reason::CurrentState);
            a.cur_state = from as u32;
            q.modify(&mut w.e, full, a).expect("cur_state");
            assert_eq!(q.state(&w.e), to);
            w.e.destroy_qp(q.owner, q.handle).expect("destroy");
        }
    }
}

#[test]
fn attributes_out_of_range() {
    type Spoil = fn(&mut QpAttr);
    let cases: [(QpState, M, &str, Spoil); 24] = [
        (QpState::Reset, INIT, "access", |a| a.access = 1 << 4),
        (QpState::Reset, INIT, "access", |a| a.access = 1 << 31),
        (QpState::Reset, INIT, "P_Key", |a| a.pkey_index = 1),
        (QpState::Reset, INIT, "port", |a| a.port_num = 0),
        (QpState::Reset, INIT, "port", |a| a.port_num = 2),
        (QpState::Init, RTR, "MTU", |a| a.path_mtu = 0),
        (QpState::Init, RTR, "MTU", |a| a.path_mtu = 128),
        (QpState::Init, RTR, "MTU", |a| a.path_mtu = 1500),
        (QpState::Init, RTR, "MTU", |a| a.path_mtu = 8192),
        (QpState::Init, RTR, "QPN", |a| a.dest_qp_num = 1 << 24),
        (QpState::Init, RTR, "PSN", |a| a.rq_psn = 1 << 24),
        (QpState::Init, RTR, "PSN", |a| a.rq_psn = u32::MAX),
        (QpState::Init, RTR, "rd_atomic", |a| {
            a.max_dest_rd_atomic = 129;
        }),
        (QpState::Init, RTR, "RNR timer", |a| a.min_rnr_timer = 32),
        (QpState::Rtr, RTS, "PSN", |a| a.sq_psn = 1 << 24),
        (QpState::Rtr, RTS, "timeout", |a| a.timeout = 32),
        (QpState::Rtr, RTS, "retries", |a| a.retry_cnt = 8),
        (QpState::Rtr, RTS, "RNR retries", |a| a.rnr_retry = 8),
        (QpState::Rtr, RTS, "rd_atomic", |a| a.max_rd_atomic = 129),
        (QpState::Rtr, RTS, "rd_atomic", |a| {
            a.max_rd_atomic = u32::MAX;
        }),
        (QpState::Rtr, RTS, "state", |a| a.state = 7),
        (QpState::Rtr, RTS, "state", |a| a.state = u32::MAX),
        (
            QpState::Rts,
            M::STATE.union(M::MIN_RNR_TIMER),
            "timer",
            |a| a.min_rnr_timer = 99,
        ),
        (
            QpState::Rts,
            M::STATE.union(M::ACCESS_FLAGS),
            "access",
            |a| a.access = u32::MAX,
        ),
    ];
    let mut w = World::new();
    let peer = w.b.qp.qpn;
    for (from, mask, name, spoil) in cases {
        let q = at(&mut w, from);
        let before = w.e.query_qp(q.owner, q.handle).expect("query");
        let to = [1, 2, 3, 3][from as usize];
        let to = QpState::from_u32(to).expect("a state");
        let mut a = good_attr(to, peer);
        spoil(&mut a);
        let r = q.modify(&mut w.e, mask, a);
        refused(name, r, Errno::Inval, Reason::BadAttr);
        assert_eq!(
            w.e.query_qp(q.owner, q.handle),
            Ok(before),
            "{name}: unchanged"
        );
    }
    let q = at(&mut w, QpState::Init);
    let mut a = good_attr(QpState::Rtr, peer);
    a.dest_gid = [9; 16];
    let r = q.modify(&mut w.e, RTR, a);
    refused("GID", r, Errno::HostUnreach, Reason::NoRoute);
    for bit in 21..32 {
        let m = ModifyQp {
            qp: q.handle,
            mask: RTR.bits() | 1 << bit,
            attr: a,
        };
        refused(
            "mask",
            w.e.modify_qp(q.owner, &m),
            Errno::Inval,
            Reason::ExtraAttr,
        );
    }
    assert_eq!(q.state(&w.e), QpState::Init);
}

#[test]
fn what_was_set_is_what_is_queried() {
    let mut w = World::new();
    let q = at(&mut w, QpState::Reset);
    let mut want = good_attr(QpState::Rts, w.b.qp.qpn);
    for (to, mask) in [
        (QpState::Init, INIT),
        (QpState::Rtr, RTR),
        (QpState::Rts, RTS),
    ] {
        let mut a = good_attr(to, w.b.qp.qpn);
        a.qkey = 77;
        q.modify(&mut w.e, mask, a).expect("modify");
    }
    want.cur_state = QpState::Rts as u32;
    assert_eq!(w.e.query_qp(q.owner, q.handle), Ok(want));
    let mut a = attr();
    (a.access, a.min_rnr_timer) = (Access::REMOTE_READ.bits(), 31);
    q.modify(&mut w.e, M::ACCESS_FLAGS | M::MIN_RNR_TIMER, a)
        .expect("without STATE");
    (want.access, want.min_rnr_timer) = (a.access, 31);
    assert_eq!(w.e.query_qp(q.owner, q.handle), Ok(want));
    q.go(&mut w.e, QpState::Reset).expect("RESET");
    assert_eq!(w.e.query_qp(q.owner, q.handle), Ok(attr()), "as made");
}
