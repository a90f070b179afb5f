//! A user's queues: rings in its RAM.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use hyv_abi::control::{ModifyQp, ModifySrq, QpAttr, SrqAttr};
use hyv_abi::doorbell::Ring;
use hyv_abi::queue::{Cqe, SendHead, Sge, WrOpcode, flags, seq};
use hyv_abi::types::{Access, QpAttrMask as M, QpState, QpType, VerbError};
use hyv_rnic::{Engine, UserId};

use super::{Conn, GID, Mr, QKEY, Ram, attr};

/// Where each direction of a connection begins: it wraps soon.
const FIRST_PSN: u32 = 0xff_fff0;

/// How large a QP's rings are.
#[derive(Clone, Copy, Debug)]
pub struct Cap {
    pub sq_log2: u32,
    pub rq_log2: u32,
    pub stride: u32,
    pub sig_all: bool,
    pub ty: QpType,
    /// Handle of the SRQ, or `u32::MAX`.
    pub srq: u32,
}

impl Default for Cap {
    fn default() -> Self {
        Self {
            sq_log2: 5,
            rq_log2: 5,
            stride: 64,
            sig_all: false,
            ty: QpType::Rc,
            srq: u32::MAX,
        }
    }
}

/// A completion queue, polled by its owner.
pub struct Cq {
    pub handle: u32,
    pub(super) ram: Arc<Ram>,
    pub ring: u64,
    pub ctrl: u64,
    pub(super) mask: u32,
    pub head: u32,
}

impl Cq {
    /// One more view of a ring somewhere in RAM; it has no handle.
    pub fn named(ram: &Arc<Ram>, ring: u64, ctrl: u64) -> Self {
        Self {
            handle: u32::MAX,
            ram: Arc::clone(ram),
            ring,
            ctrl,
            mask: 0,
            head: 0,
        }
    }

    pub fn index(&self) -> usize {
        (self.handle & 0xffff) as usize
    }

    fn entry(&self) -> u64 {
        self.ring + 64 * u64::from(self.head & self.mask)
    }

    /// The next completion; publishes the consumer index.
    pub fn poll(&mut self) -> Option<Cqe> {
        let cqe = self.poll_quietly()?;
        self.publish();
        Some(cqe)
    }

    /// The next completion, without telling the device that its place is free.
    pub fn poll_quietly(&mut self) -> Option<Cqe> {
        let at = self.entry();
        let last = self.ram.word(at + 56).load(Ordering::Acquire);
        if last as u32 != seq(self.head) {
            return None;
        }
        let mut w = [0; 8];
        for (i, w) in w.iter_mut().enumerate() {
            *w = self.ram.word(at + 8 * i as u64).load(Ordering::Relaxed);
        }
        self.head = self.head.wrapping_add(1);
        Some(Cqe::from_words(w))
    }

    pub fn publish(&self) {
        self.ram
            .word(self.ctrl)
            .store(u64::from(self.head), Ordering::Release);
    }

    /// It was resized: another ring, and positions from 0 on.
    pub fn moved(&mut self, ring: u64, log2: u32) {
        (self.ring, self.mask, self.head) = (ring, (1 << log2) - 1, 0);
    }

    /// All that is there.
    pub fn drain(&mut self) -> Vec<Cqe> {
        std::iter::from_fn(|| self.poll()).collect()
    }

    /// Exactly one, which must be there.
    pub fn one(&mut self) -> Cqe {
        let c = self.poll().expect("a completion");
        assert!(self.poll().is_none(), "one completion only");
        c
    }

    /// Asks for an event; the full fence precedes the user's last look at the ring.
    pub fn arm(&self, how: u64) {
        self.ram.word(self.ctrl + 8).store(how, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// Fills slot `tail` of a receive ring of (offset, log2 of its slots, stride in bytes).
fn fill_recv(ram: &Ram, ring: (u64, u32, u32), tail: u32, wr_id: u64, sges: &[Sge]) {
    let (offset, log2, stride) = (ring.0, ring.1, u64::from(ring.2));
    assert!(sges.len() as u64 <= (stride - 16) / 16);
    let at = offset + stride * u64::from(tail & ((1 << log2) - 1));
    ram.word(at).store(wr_id, Ordering::Relaxed);
    for (i, sge) in sges.iter().enumerate() {
        let [a, b] = sge.to_words();
        let at = at + 8 + 16 * i as u64;
        ram.word(at).store(a, Ordering::Relaxed);
        ram.word(at + 8).store(b, Ordering::Relaxed);
    }
    // The tag, which only a shared ring's completions show, is the position too.
    let last = u64::from(seq(tail)) | (sges.len() as u64) << 32 | u64::from(tail as u16) << 48;
    ram.word(at + stride - 8).store(last, Ordering::Release);
}

/// A shared receive queue, posted to by its owner.
pub struct Srq {
    pub owner: UserId,
    pub handle: u32,
    pub(super) ram: Arc<Ram>,
    pub ring: u64,
    pub ctrl: u64,
    pub log2: u32,
    pub stride: u32,
    /// Receives ever posted.
    pub tail: u32,
}

impl Srq {
    pub fn index(&self) -> usize {
        (self.handle & 0xffff) as usize
    }

    /// Fills the next slot and publishes the count.
    pub fn post_recv(&mut self, wr_id: u64, sges: &[Sge]) {
        fill_recv(
            &self.ram,
            (self.ring, self.log2, self.stride),
            self.tail,
            wr_id,
            sges,
        );
        self.tail = self.tail.wrapping_add(1);
        self.ram
            .word(self.ctrl)
            .store(u64::from(self.tail), Ordering::Release);
    }

    pub fn arm(&self, e: &mut Engine, limit: u32) -> Result<(), VerbError> {
        let srq = self.handle;
        e.modify_srq(self.owner, &ModifySrq { srq, limit })
    }

    pub fn query(&self, e: &Engine) -> SrqAttr {
        e.query_srq(self.owner, self.handle).expect("query_srq")
    }
}

/// A queue pair, posted to by its owner.
pub struct Qp {
    pub owner: UserId,
    pub handle: u32,
    pub qpn: u32,
    pub(super) ram: Arc<Ram>,
    pub sq: u64,
    pub rq: u64,
    pub cap: Cap,
    /// Slots ever filled.
    pub sq_tail: u32,
    /// Receives ever posted.
    pub rq_tail: u32,
}

/// A send work request.
#[derive(Clone, Debug)]
pub struct Wr {
    pub op: u8,
    pub flags: u8,
    pub imm: u32,
    pub wr_id: u64,
    pub remote: u64,
    pub rkey: u32,
    pub sges: Vec<Sge>,
    pub inline: Option<Vec<u8>>,
    /// Word 6: the addend, or what is swapped in.
    pub operand: u64,
    pub compare: u64,
}

impl Wr {
    /// Signaled, without data.
    pub fn new(op: WrOpcode, wr_id: u64) -> Self {
        Self {
            op: op as u8,
            flags: flags::SIGNALED,
            imm: 0,
            wr_id,
            remote: 0,
            rkey: 0,
            sges: Vec::new(),
            inline: None,
            operand: 0,
            compare: 0,
        }
    }

    pub fn sge(mut self, sge: Sge) -> Self {
        self.sges.push(sge);
        self
    }

    pub fn inline(mut self, data: &[u8]) -> Self {
        self.flags |= flags::INLINE;
        self.inline = Some(data.to_vec());
        self
    }

    pub fn imm(mut self, imm: u32) -> Self {
        self.imm = imm;
        self
    }

    pub fn to(mut self, mr: &Mr, at: u64) -> Self {
        (self.remote, self.rkey) = (mr.iova + at, mr.rkey);
        self
    }

    pub fn remote(mut self, addr: u64, rkey: u32) -> Self {
        (self.remote, self.rkey) = (addr, rkey);
        self
    }

    pub fn with(mut self, flags: u8) -> Self {
        self.flags |= flags;
        self
    }

    pub fn unsignaled(mut self) -> Self {
        self.flags &= !flags::SIGNALED;
        self
    }

    /// Binds the window of key `present` to bytes of a region, under the key `new`.
    pub fn bind(
        wr_id: u64,
        present: u32,
        new: u32,
        access: Access,
        mr: &Mr,
        at: u64,
        len: u64,
    ) -> Self {
        let mut wr = Self::new(WrOpcode::BindMw, wr_id).sge(mr.sge(at, 0));
        (wr.imm, wr.rkey) = (new, present);
        (wr.remote, wr.operand) = (u64::from(access.bits()), len);
        wr
    }

    pub fn atomic(mut self, compare: u64, operand: u64) -> Self {
        (self.compare, self.operand) = (compare, operand);
        self
    }

    /// As the slots of a ring, without their last words.
    pub fn slots(&self) -> Vec<[u64; 7]> {
        let inline = self.inline.as_deref().unwrap_or_default();
        let cas = self.op == WrOpcode::CmpSwp as u8;
        let n = SendHead::slots_for(self.sges.len(), inline.len(), cas);
        let head = SendHead {
            opcode: self.op,
            flags: self.flags,
            num_sge: self.sges.len() as u8,
            slots: n as u8,
            imm: self.imm,
            wr_id: self.wr_id,
            remote_addr: self.remote,
            rkey: self.rkey,
            inline_len: inline.len() as u32,
        };
        let mut slots = vec![[0u64; 7]; n];
        slots[0][..4].copy_from_slice(&head.to_words());
        let mut words = inline.chunks(8).map(|c| {
            let mut b = [0u8; 8];
            b[..c.len()].copy_from_slice(c);
            u64::from_ne_bytes(b)
        });
        for w in &mut slots[0][4..7] {
            *w = words.next().unwrap_or(0);
        }
        for ext in &mut slots[1..] {
            for w in ext {
                *w = words.next().unwrap_or(0);
            }
        }
        for (i, sge) in self.sges.iter().enumerate() {
            let (slot, at) = match i {
                0 => (0, 4),
                _ => (1 + (i - 1) / 3, 2 * ((i - 1) % 3)),
            };
            slots[slot][at..at + 2].copy_from_slice(&sge.to_words());
        }
        let atomic = cas || self.op == WrOpcode::FetchAdd as u8;
        if atomic || self.op == WrOpcode::BindMw as u8 {
            slots[0][6] = self.operand;
        }
        if cas {
            slots[1][0] = self.compare;
        }
        slots
    }
}

impl Qp {
    /// One more view of rings somewhere in RAM; it has no handle.
    pub fn named(owner: UserId, ram: &Arc<Ram>, sq: u64, rq: u64, cap: Cap) -> Self {
        let (handle, qpn) = (u32::MAX, u32::MAX);
        Self {
            owner,
            handle,
            qpn,
            ram: Arc::clone(ram),
            sq,
            rq,
            cap,
            sq_tail: 0,
            rq_tail: 0,
        }
    }

    /// Its doorbell index.
    pub fn index(&self) -> usize {
        (self.handle & 0xffff) as usize
    }

    /// Fills slots and rings the doorbell of a device that polls.
    pub fn post(&mut self, wr: &Wr) {
        self.post_silently(wr);
        assert_eq!(self.ring(), Ring::Seen, "a kick, though the device polls");
    }

    pub fn ring(&self) -> Ring {
        self.ram.window().doorbells.ring(self.index() as u32)
    }

    /// Fills slots; the head's last word is stored last.
    pub fn post_silently(&mut self, wr: &Wr) {
        self.post_slots(&wr.slots());
    }

    pub fn post_slots(&mut self, slots: &[[u64; 7]]) {
        let mask = (1 << self.cap.sq_log2) - 1;
        for (k, slot) in slots.iter().enumerate().rev() {
            let index = self.sq_tail.wrapping_add(k as u32);
            let at = self.sq + 64 * u64::from(index & mask);
            for (i, w) in slot.iter().enumerate() {
                self.ram
                    .word(at + 8 * i as u64)
                    .store(*w, Ordering::Relaxed);
            }
            self.ram
                .word(at + 56)
                .store(u64::from(seq(index)), Ordering::Release);
        }
        self.sq_tail = self.sq_tail.wrapping_add(slots.len() as u32);
    }

    pub fn post_recv(&mut self, wr_id: u64, sges: &[Sge]) {
        let ring = (self.rq, self.cap.rq_log2, self.cap.stride);
        fill_recv(&self.ram, ring, self.rq_tail, wr_id, sges);
        self.rq_tail = self.rq_tail.wrapping_add(1);
    }

    pub fn modify(&self, e: &mut Engine, mask: M, attr: QpAttr) -> Result<(), VerbError> {
        e.modify_qp(
            self.owner,
            &ModifyQp {
                qp: self.handle,
                mask: mask.bits(),
                attr,
            },
        )
    }

    pub fn go(&self, e: &mut Engine, to: QpState) -> Result<(), VerbError> {
        let mut a = attr();
        a.state = to as u32;
        self.modify(e, M::STATE, a)
    }

    /// RESET to RTS, connected to the QP of that number.
    pub fn connect(&self, e: &mut Engine, peer: u32, c: &Conn) {
        self.init(e, c);
        self.rtr(e, peer, c);
        self.rts(e, c);
    }

    fn to(&self, e: &mut Engine, from: QpState, to: QpState, mut a: QpAttr) {
        let masks = hyv_rnic::state::transition(self.cap.ty, from, to).expect("a transition");
        a.state = to as u32;
        self.modify(e, M::STATE | masks.required, a)
            .unwrap_or_else(|error| panic!("{from:?} to {to:?}: {error}"));
    }

    pub fn init(&self, e: &mut Engine, c: &Conn) {
        let mut a = attr();
        (a.port_num, a.access, a.qkey) = (1, c.access.bits(), QKEY);
        self.to(e, QpState::Reset, QpState::Init, a);
    }

    pub fn rtr(&self, e: &mut Engine, peer: u32, c: &Conn) {
        self.rtr_at(e, (GID, peer), c);
    }

    /// With a peer at that GID.
    pub fn rtr_at(&self, e: &mut Engine, peer: ([u8; 16], u32), c: &Conn) {
        let mut a = attr();
        (a.path_mtu, a.dest_qp_num, a.rq_psn) = (c.mtu, peer.1, FIRST_PSN);
        (a.max_dest_rd_atomic, a.min_rnr_timer) = (c.rd_atomic, c.min_rnr_timer);
        a.dest_gid = peer.0;
        self.to(e, QpState::Init, QpState::Rtr, a);
    }

    pub fn rts(&self, e: &mut Engine, c: &Conn) {
        let mut a = attr();
        a.sq_psn = FIRST_PSN;
        (a.timeout, a.retry_cnt, a.rnr_retry) = (c.timeout, c.retry_cnt, c.rnr_retry);
        a.max_rd_atomic = c.rd_atomic;
        self.to(e, QpState::Rtr, QpState::Rts, a);
    }

    pub fn state(&self, e: &Engine) -> QpState {
        let a = e.query_qp(self.owner, self.handle).expect("query_qp");
        QpState::from_u32(a.state).expect("a state")
    }

    /// To RESET, with rings zeroed, as a new QP is.
    pub fn reset(&mut self, e: &mut Engine) {
        self.go(e, QpState::Reset).expect("RESET");
        let words = (
            8u64 << self.cap.sq_log2,
            u64::from(self.cap.stride / 8) << self.cap.rq_log2,
        );
        for i in 0..words.0 {
            self.ram.word(self.sq + 8 * i).store(0, Ordering::Relaxed);
        }
        for i in 0..words.1 {
            self.ram.word(self.rq + 8 * i).store(0, Ordering::Relaxed);
        }
        (self.sq_tail, self.rq_tail) = (0, 0);
    }
}
