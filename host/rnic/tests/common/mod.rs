//! A raw user of the device: it lays rings out in its own RAM and fills them word by word, as the contract in
//! `hyv_abi::queue` says, without the verbs library in between.
#![allow(dead_code, reason = "each test file uses its own part of the harness")]
#![allow(
    unsafe_code,
    reason = "a user's RAM is raw memory shared with the engine"
)]
#![allow(
    unused_imports,
    reason = "the contract's names, for whichever file needs them"
)]

pub mod net;
mod queues;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hyv_abi::control::{CreateCq, CreateQp, CreateSrq, QpAttr, RegMr};
pub use hyv_abi::doorbell::Ring;
use hyv_abi::queue::Cqe;
pub use hyv_abi::queue::{Sge, WcOpcode, WcStatus, WrOpcode, arm, cqe_flags, flags};
pub use hyv_abi::types::{Access, Errno, QpAttrMask as M, QpState, QpType, Reason, VerbError};
pub use hyv_abi::window::{Window, summary};
use hyv_rnic::{Engine, EngineConfig, UserId, UserMemory, Wake};
pub use queues::{Cap, Cq, Qp, Srq, Wr};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// The device's GID in these tests.
pub const GID: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
/// The Q_Key of datagram QPs in these tests.
pub const QKEY: u32 = 0x1111_1111;
/// A region's virtual address lies so far from its RAM offset: nobody may mix the two up.
pub const IOVA: u64 = 0x7f00_0000_0000;
/// Everything a peer or the device may do.
pub const FULL: Access = Access::LOCAL_WRITE
    .union(Access::REMOTE_READ)
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_ATOMIC);

/// A window and RAM: zeroed pages that appear when touched.
pub struct Ram {
    window: NonNull<u8>,
    ram: NonNull<u8>,
    pub len: u64,
}

// SAFETY: plain shared memory; readers and writers agree by the protocol under test.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

fn map(len: usize) -> NonNull<u8> {
    // SAFETY: a new private mapping, nobody else's.
    let p = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    };
    NonNull::new(p.expect("memory for a test user").cast()).expect("not at 0")
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; the last owner of this object is going.
        unsafe {
            let _ = munmap(self.window.as_ptr().cast(), size_of::<Window>());
            let _ = munmap(self.ram.as_ptr().cast(), self.len as usize);
        }
    }
}

impl Ram {
    pub fn new(len: u64) -> Arc<Self> {
        Arc::new(Self {
            window: map(size_of::<Window>()),
            ram: map(len as usize),
            len,
        })
    }

    pub fn window(&self) -> &Window {
        // SAFETY: mapped, page aligned, and all atomics.
        unsafe { self.window.cast().as_ref() }
    }

    /// Bytes of the window, for who scribbles over it.
    pub fn window_word(&self, i: usize) -> &AtomicU64 {
        assert!(i < size_of::<Window>() / 8);
        // SAFETY: inside the mapping, aligned.
        unsafe { self.window.cast::<AtomicU64>().add(i).as_ref() }
    }

    pub fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: inside the mapping, aligned.
        unsafe { self.ram.add(offset as usize).cast().as_ref() }
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.len);
        // SAFETY: inside the mapping; the source is this process's own.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.ram.add(offset as usize).as_ptr(),
                bytes.len(),
            );
        }
    }

    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        assert!(offset + len <= self.len);
        let mut v = vec![0u8; len as usize];
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.ram.add(offset as usize).as_ptr(),
                v.as_mut_ptr(),
                v.len(),
            );
        }
        v
    }

    pub fn all(&self) -> Vec<u8> {
        self.read(0, self.len)
    }
}

/// Counts wake-ups.
#[derive(Default)]
pub struct Wakes(pub AtomicU64);

impl Wake for Wakes {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Virtual time, ns.
#[derive(Clone)]
pub struct Clock(pub Arc<AtomicU64>);

impl Clock {
    pub fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::SeqCst);
    }
}

/// An engine on virtual time.
pub fn engine() -> (Engine, Clock) {
    engine_at(GID)
}

/// The same with another GID.
pub fn engine_at(gid: [u8; 16]) -> (Engine, Clock) {
    let clock = Clock(Arc::new(AtomicU64::new(1_000_000)));
    let time = Arc::clone(&clock.0);
    let config = EngineConfig {
        clock: Box::new(move || time.load(Ordering::SeqCst)),
        gid,
        node_guid: 0x1234,
        carrier: None,
        mad_bell: Box::new(|| {}),
    };
    (Engine::new(config), clock)
}

/// Polls until nothing moves for long enough that timers were looked at too. Gives how many turns it took.
pub fn pump(e: &mut Engine) -> u32 {
    let (mut idle, mut turns) = (0, 0);
    while idle < 160 {
        turns += 1;
        assert!(turns < 10_000_000, "the engine never comes to rest");
        idle = if e.poll() > 0 { 0 } else { idle + 1 };
    }
    turns
}

/// A registered region as its owner sees it.
#[derive(Clone, Copy, Debug)]
pub struct Mr {
    pub handle: u32,
    pub lkey: u32,
    pub rkey: u32,
    pub iova: u64,
    pub offset: u64,
    pub len: u64,
}

impl Mr {
    /// A piece of it, from byte `at` of it on.
    pub fn sge(&self, at: u64, len: u32) -> Sge {
        Sge {
            addr: self.iova + at,
            len,
            lkey: self.lkey,
        }
    }
}

fn add_user(e: &mut Engine, ram: &Arc<Ram>, wakes: &Arc<Wakes>) -> Result<UserId, VerbError> {
    let keep = Box::new(Arc::clone(ram));
    // SAFETY: mapped until `ram` is dropped, which the memory holds; only atomics refer to it.
    let mem = unsafe { UserMemory::new(ram.window.cast(), ram.ram, ram.len, keep) };
    let wake: Arc<dyn Wake> = Arc::clone(wakes) as Arc<dyn Wake>;
    e.add_user(Arc::new(mem), wake)
}

/// A user with nothing but its memory, if there is a place for it.
pub fn try_user(e: &mut Engine, ram: Arc<Ram>) -> Result<UserId, VerbError> {
    add_user(e, &ram, &Arc::default())
}

/// A user: RAM, what it woke by, and where its next free byte is.
pub struct User {
    pub id: UserId,
    pub ram: Arc<Ram>,
    pub wakes: Arc<Wakes>,
    next: u64,
}

impl User {
    pub fn new(e: &mut Engine, ram_len: u64) -> Self {
        Self::with_ram(e, Ram::new(ram_len))
    }

    pub fn with_ram(e: &mut Engine, ram: Arc<Ram>) -> Self {
        let wakes = Arc::new(Wakes::default());
        let id = add_user(e, &ram, &wakes).expect("a place for a user");
        Self {
            id,
            ram,
            wakes,
            next: 0,
        }
    }

    /// The same user's memory, for another thread.
    pub fn twin(other: &Self) -> Self {
        Self {
            id: other.id,
            ram: Arc::clone(&other.ram),
            wakes: Arc::clone(&other.wakes),
            next: other.ram.len,
        }
    }

    /// RAM of the user's own, zeroed, aligned to 64.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let at = self.next;
        self.next = (at + len).next_multiple_of(64);
        assert!(
            self.next <= self.ram.len,
            "the test user's RAM is too small"
        );
        at
    }

    /// Bytes that are left.
    pub fn room(&self) -> u64 {
        self.ram.len - self.next
    }

    pub fn pd(&self, e: &mut Engine) -> u32 {
        e.alloc_pd(self.id).expect("alloc_pd")
    }

    /// Registers a piece of RAM at [`IOVA`] plus its offset.
    pub fn mr_at(&self, e: &mut Engine, pd: u32, offset: u64, len: u64, access: Access) -> Mr {
        let req = RegMr {
            pd,
            access: access.bits(),
            iova: IOVA + offset,
            ram_offset: offset,
            len,
        };
        let r = e.reg_mr(self.id, &req).expect("reg_mr");
        Mr {
            handle: r.handle,
            lkey: r.lkey,
            rkey: r.rkey,
            iova: req.iova,
            offset,
            len,
        }
    }

    pub fn mr(&mut self, e: &mut Engine, pd: u32, len: u64, access: Access) -> Mr {
        let offset = self.alloc(len);
        self.mr_at(e, pd, offset, len, access)
    }

    pub fn cq(&mut self, e: &mut Engine, log2: u32) -> Cq {
        let req = CreateCq {
            ring: self.alloc(64 << log2),
            ctrl: self.alloc(64),
            log2,
            reserved: 0,
        };
        Cq {
            handle: e.create_cq(self.id, &req).expect("create_cq"),
            ram: Arc::clone(&self.ram),
            ring: req.ring,
            ctrl: req.ctrl,
            mask: (1 << log2) - 1,
            head: 0,
        }
    }

    pub fn srq(&mut self, e: &mut Engine, pd: u32, log2: u32, stride: u32) -> Srq {
        let req = CreateSrq {
            pd,
            log2,
            ring: self.alloc(u64::from(stride) << log2),
            ctrl: self.alloc(64),
            stride,
            reserved: 0,
        };
        Srq {
            owner: self.id,
            handle: e.create_srq(self.id, &req).expect("create_srq"),
            ram: Arc::clone(&self.ram),
            ring: req.ring,
            ctrl: req.ctrl,
            log2,
            stride,
            tail: 0,
        }
    }

    pub fn qp(&mut self, e: &mut Engine, pd: u32, scq: &Cq, rcq: &Cq, cap: Cap) -> Qp {
        let memory = self.qp_memory(cap);
        self.qp_at(e, pd, (scq, rcq), cap, memory)
    }

    /// Room for a QP's rings.
    pub fn qp_memory(&mut self, cap: Cap) -> (u64, u64) {
        let sq = self.alloc(64 << cap.sq_log2);
        (sq, self.alloc(u64::from(cap.stride) << cap.rq_log2))
    }

    /// A QP whose rings are there.
    pub fn qp_at(
        &self,
        e: &mut Engine,
        pd: u32,
        cqs: (&Cq, &Cq),
        cap: Cap,
        memory: (u64, u64),
    ) -> Qp {
        let req = CreateQp {
            pd,
            qp_type: cap.ty as u32,
            send_cq: cqs.0.handle,
            recv_cq: cqs.1.handle,
            srq: cap.srq,
            sig_all: u32::from(cap.sig_all),
            sq_ring: memory.0,
            rq_ring: memory.1,
            sq_log2: cap.sq_log2,
            rq_log2: cap.rq_log2,
            rq_stride: cap.stride,
            reserved: 0,
        };
        let r = e.create_qp(self.id, &req).expect("create_qp");
        Qp {
            owner: self.id,
            handle: r.handle,
            qpn: r.qpn,
            ram: Arc::clone(&self.ram),
            sq: req.sq_ring,
            rq: req.rq_ring,
            cap,
            sq_tail: 0,
            rq_tail: 0,
        }
    }
}

/// What RESET to INIT needs.
pub const INIT: M = M::STATE
    .union(M::PKEY_INDEX)
    .union(M::PORT)
    .union(M::ACCESS_FLAGS);
/// What INIT to RTR needs.
pub const RTR: M = M::STATE
    .union(M::AV)
    .union(M::PATH_MTU)
    .union(M::DEST_QPN)
    .union(M::RQ_PSN)
    .union(M::MAX_DEST_RD_ATOMIC)
    .union(M::MIN_RNR_TIMER);
/// What RTR to RTS needs.
pub const RTS: M = M::STATE
    .union(M::SQ_PSN)
    .union(M::TIMEOUT)
    .union(M::RETRY_CNT)
    .union(M::RNR_RETRY)
    .union(M::MAX_QP_RD_ATOMIC);

/// Attributes, all 0.
pub fn attr() -> QpAttr {
    zerocopy::FromZeros::new_zeroed()
}

/// How QPs are connected.
#[derive(Clone, Copy, Debug)]
pub struct Conn {
    pub access: Access,
    /// Path MTU, bytes.
    pub mtu: u32,
    pub rd_atomic: u32,
    pub min_rnr_timer: u32,
    pub timeout: u32,
    pub retry_cnt: u32,
    pub rnr_retry: u32,
}

impl Default for Conn {
    fn default() -> Self {
        Self {
            access: FULL,
            mtu: 1024,
            rd_atomic: 16,
            min_rnr_timer: 1,
            timeout: 14,
            retry_cnt: 7,
            rnr_retry: 7,
        }
    }
}

/// One end of a connection, with a region and two CQs.
pub struct Side {
    pub user: User,
    pub pd: u32,
    pub mr: Mr,
    pub scq: Cq,
    pub rcq: Cq,
    pub qp: Qp,
}

impl Side {
    pub fn new(e: &mut Engine, data_len: u64, cap: Cap) -> Self {
        let mut user = User::new(e, (data_len + (256 << 10)).next_multiple_of(4096));
        let pd = user.pd(e);
        // Unregistered bytes lie before and after the region.
        user.alloc(4096);
        let mr = user.mr(e, pd, data_len, FULL);
        user.alloc(4096);
        let (scq, rcq) = (user.cq(e, 8), user.cq(e, 8));
        let qp = user.qp(e, pd, &scq, &rcq, cap);
        Self {
            user,
            pd,
            mr,
            scq,
            rcq,
            qp,
        }
    }

    /// Bytes of the region.
    pub fn data(&self, at: u64, len: u64) -> Vec<u8> {
        self.user.ram.read(self.mr.offset + at, len)
    }

    pub fn fill(&self, at: u64, bytes: &[u8]) {
        self.user.ram.write(self.mr.offset + at, bytes);
    }

    /// Another QP on the same CQs.
    pub fn extra_qp(&mut self, e: &mut Engine, cap: Cap) -> Qp {
        self.user.qp(e, self.pd, &self.scq, &self.rcq, cap)
    }
}

/// Two users with a connection.
pub struct Pair {
    pub e: Engine,
    pub clock: Clock,
    pub a: Side,
    pub b: Side,
}

impl Pair {
    pub fn new(data_len: u64) -> Self {
        Self::with(data_len, Cap::default(), &Conn::default())
    }

    pub fn with(data_len: u64, cap: Cap, conn: &Conn) -> Self {
        let (mut e, clock) = engine();
        let a = Side::new(&mut e, data_len, cap);
        let b = Side::new(&mut e, data_len, cap);
        connect(&mut e, &a.qp, &b.qp, conn);
        Self { e, clock, a, b }
    }

    pub fn pump(&mut self) {
        pump(&mut self.e);
    }
}

pub fn connect(e: &mut Engine, a: &Qp, b: &Qp, conn: &Conn) {
    for (x, y) in [(a, b), (b, a)] {
        x.init(e, conn);
        x.rtr(e, y.qpn, conn);
    }
    a.rts(e, conn);
    b.rts(e, conn);
}

/// Takes an object's event: its bit, and its kind's.
pub fn event(ram: &Ram, kind: u64, index: usize) -> bool {
    let ev = &ram.window().events;
    let words: &[AtomicU64] = match kind {
        summary::CQ_COMPLETION => &ev.cq_completion,
        summary::CQ_ERROR => &ev.cq_error,
        summary::QP_FATAL => &ev.qp_fatal,
        summary::QP_REQUEST_ERROR => &ev.qp_request_error,
        summary::QP_ACCESS_ERROR => &ev.qp_access_error,
        summary::QP_COMM_ESTABLISHED => &ev.qp_comm_established,
        summary::QP_LAST_WQE => &ev.qp_last_wqe,
        summary::SRQ_LIMIT => &ev.srq_limit,
        _ => panic!("no such kind"),
    };
    let any = ev.summary.fetch_and(!kind, Ordering::SeqCst) & kind != 0;
    let bit = 1 << (index % 64);
    let mine = words[index / 64].fetch_and(!bit, Ordering::SeqCst) & bit != 0;
    assert_eq!(any, mine, "the kind's bit and the object's differ");
    mine
}

/// Kinds that wait, without taking them.
pub fn pending(ram: &Ram) -> u64 {
    ram.window().events.summary.load(Ordering::SeqCst)
}

pub fn status(c: &Cqe) -> WcStatus {
    WcStatus::from_u8(c.status)
}

/// The first `n` bytes of a completion's payload.
pub fn cqe_data(c: &Cqe, n: usize) -> Vec<u8> {
    c.data
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .take(n)
        .collect()
}

/// What a receiver ends up with: payload in the completion is scattered to the SGEs, as the library does.
pub fn received(ram: &Ram, c: &Cqe, sges: &[Sge], iova_to_offset: u64) -> Vec<u8> {
    if c.flags & cqe_flags::DATA != 0 {
        assert!(
            c.byte_len <= 32,
            "payload in a completion is 32 bytes at most"
        );
        return cqe_data(c, c.byte_len as usize);
    }
    let mut out = Vec::new();
    for s in sges {
        let n = u64::from(s.len).min(u64::from(c.byte_len) - out.len() as u64);
        out.extend(ram.read(s.addr - iova_to_offset, n));
    }
    out
}

/// A small generator (SplitMix64): tests print its seed.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut v = Vec::with_capacity(n + 8);
        while v.len() < n {
            v.extend(self.next().to_le_bytes());
        }
        v.truncate(n);
        v
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}
