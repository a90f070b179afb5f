//! What the engine keeps of users and their objects.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hyv_abi::control::{Counters, QpAttr};
use hyv_abi::queue::{
    Cqe, INLINE_EXT, MAX_INLINE, MAX_SEND_SGE, SLOT_WORDS, SendHead, Sge, arm, seq,
};
use hyv_abi::types::{Access, QpState, QpType};

use crate::Wake;
use crate::limits::MAX_MRS;
use crate::mem::{Bytes, UserMemory, Words};
use crate::recv::{RecvFrom, RecvWr};
use crate::table::Table;
use crate::wire::WireQp;

/// Names a user of the engine; never reused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct UserId {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

pub(crate) struct User {
    pub generation: u32,
    pub mem: Arc<UserMemory>,
    pub wake: Arc<dyn Wake>,
    pub pds: Table<Pd>,
    pub mrs: Table<Mr>,
    /// Slots of the engine's CQs.
    pub cqs: Table<usize>,
    /// Slots of the engine's QPs; a handle's index is the doorbell index.
    pub qps: Table<usize>,
    /// Slots of the engine's SRQs.
    pub srqs: Table<usize>,
    pub ahs: Table<Ah>,
    pub mws: Table<Mw>,
    pub mr_keys: Keys,
    pub mw_keys: Keys,
    pub mr_bytes: u64,
    pub max_mr_bytes: u64,
    /// Of its QPs that are gone.
    pub past: Counters,
}

/// A protection domain: only how many objects use it.
#[derive(Default)]
pub(crate) struct Pd {
    pub refs: u32,
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ah {
    pub pd: u32,
    pub dest_gid: [u8; 16],
    pub traffic_class: u8,
    /// Never 0.
    pub hop_limit: u8,
    pub flow_label: u32,
}

pub(crate) struct Mr {
    pub key: u32,
    pub pd: u32,
    pub iova: u64,
    pub access: Access,
    pub bytes: Bytes,
    /// Memory windows bound to it.
    pub windows: u32,
}

/// A memory window of type 2B (IBA 1.4, 10.6.7): opens a part of a region to one QP's peer.
pub(crate) struct Mw {
    /// Works while it is bound. The low byte is the user's choice at each bind.
    pub key: u32,
    pub pd: u32,
    pub bound: Option<Binding>,
}

pub(crate) struct Binding {
    /// Index of the region.
    pub mr: usize,
    /// Handle of the QP.
    pub qp: u32,
    /// Place in that QP's list.
    pub place: usize,
    /// Remote rights.
    pub access: Access,
    pub iova: u64,
    pub bytes: Bytes,
}

/// Keys from this index on are those of windows.
pub(crate) const FIRST_WINDOW: u32 = MAX_MRS as u32;

/// Generations of keys by index; they go on when an object's place is reused.
#[derive(Default)]
pub(crate) struct Keys(Vec<u8>);

impl Keys {
    /// A new key for an index: another one than the last.
    pub fn renew(&mut self, index: usize, base: u32) -> u32 {
        if self.0.len() <= index {
            self.0.resize(index + 1, 0);
        }
        let generation = self.0[index].wrapping_add(1);
        self.0[index] = generation;
        (base + index as u32) << 8 | u32::from(generation)
    }

    /// The user chose a key's low byte itself.
    pub fn set(&mut self, index: usize, key: u32) {
        if let Some(g) = self.0.get_mut(index) {
            *g = key as u8;
        }
    }
}

impl User {
    /// The bytes that a key opens at `addr` to its owner, or `None` if anything about it is wrong. A window's key opens nothing here.
    #[inline]
    pub fn open(&self, pd: u32, key: u32, addr: u64, len: u64, need: Access) -> Option<Bytes> {
        let mr = self.mrs.at((key >> 8) as usize)?;
        if mr.key != key || mr.pd != pd || !mr.access.contains(need) {
            return None;
        }
        mr.bytes.sub(addr.checked_sub(mr.iova)?, len)
    }

    /// The bytes that a key opens at `addr` to the peer of the QP of PD `pd` and handle `qp`.
    #[inline]
    pub fn open_remote(
        &self,
        pd: u32,
        qp: u32,
        key: u32,
        addr: u64,
        len: u64,
        need: Access,
    ) -> Option<Bytes> {
        if key >> 8 < FIRST_WINDOW {
            return self.open(pd, key, addr, len, need);
        }
        let mw = self.mws.at((key >> 8) as usize - FIRST_WINDOW as usize)?;
        let bound = mw.bound.as_ref()?;
        if mw.key != key || mw.pd != pd || bound.qp != qp || !bound.access.contains(need) {
            return None;
        }
        bound.bytes.sub(addr.checked_sub(bound.iova)?, len)
    }
}

pub(crate) struct Cq {
    pub user: usize,
    pub index: u32,
    pub ring: Words,
    pub mask: u32,
    pub head: u32,
    ctrl: Words,
    consumed: u32,
    pub refs: u32,
    pub overrun: bool,
    /// In the engine's list of CQs to look after at the end of the turn.
    pub touched: bool,
    /// Something that a solicited-only arm waits for.
    pub solicited: bool,
}

impl Cq {
    pub fn new(user: usize, index: u32, ring: Words, ctrl: Words) -> Self {
        let mask = (ring.count() / SLOT_WORDS) as u32 - 1;
        Self {
            user,
            index,
            ring,
            mask,
            head: 0,
            ctrl,
            consumed: 0,
            refs: 0,
            overrun: false,
            touched: false,
            solicited: false,
        }
    }

    /// Writes an entry; false if the user has not polled enough of the earlier ones.
    #[inline(always)]
    pub fn push(&mut self, cqe: &Cqe) -> bool {
        if self.head.wrapping_sub(self.consumed) > self.mask {
            self.consumed = self.ctrl.at(0).load(Ordering::Acquire) as u32;
            if self.overrun || self.head.wrapping_sub(self.consumed) > self.mask {
                self.overrun = true;
                return false;
            }
        }
        self.ring.publish(
            (self.head & self.mask) as usize * SLOT_WORDS,
            &cqe.to_words(self.head),
        );
        self.head = self.head.wrapping_add(1);
        true
    }

    /// Entries that the user has not polled, by what it published; `None` if that is impossible.
    pub fn waiting(&self) -> Option<u32> {
        let consumed = self.ctrl.at(0).load(Ordering::Acquire) as u32;
        let n = self.head.wrapping_sub(consumed);
        (n <= self.mask + 1).then_some(n)
    }

    /// Moves the last `n` entries to the beginning of another ring and goes on there. Positions start at 0 again, and so does the
    /// user's consumer index. The arm word stays as it is.
    pub fn move_to(&mut self, ring: Words, n: u32) {
        for i in 0..n {
            let from = (self.head.wrapping_sub(n).wrapping_add(i) & self.mask) as usize;
            let entry = self.ring.array::<SLOT_WORDS>(from * SLOT_WORDS);
            let words = std::array::from_fn(|k| entry[k].load(Ordering::Relaxed));
            let mut cqe = Cqe::from_words(words).to_words(i);
            // The rest of the words is the user's own, whatever it has made of it.
            cqe[..SLOT_WORDS - 1].copy_from_slice(&words[..SLOT_WORDS - 1]);
            ring.publish(i as usize * SLOT_WORDS, &cqe);
        }
        self.mask = (ring.count() / SLOT_WORDS) as u32 - 1;
        self.ring = ring;
        self.head = n;
        self.consumed = 0;
        self.ctrl.at(0).store(0, Ordering::Release);
    }

    /// Takes the arm word if it asks for what happened. Call after a full fence.
    pub fn take_arm(&mut self) -> bool {
        let word = self.ctrl.at(1);
        let fire = match word.load(Ordering::Relaxed) {
            arm::ANY => true,
            arm::SOLICITED => self.solicited,
            _ => false,
        };
        self.solicited = false;
        fire && word.swap(arm::NONE, Ordering::AcqRel) != arm::NONE
    }
}

/// Why a QP's first work request waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WaitFor {
    /// The peer has no receive posted.
    Receive,
    /// The peer does not answer.
    Peer,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    pub what: WaitFor,
    pub deadline_ns: Option<u64>,
    pub tries: u32,
}

pub(crate) struct Qp {
    pub user: usize,
    pub handle: u32,
    pub qpn: u32,
    pub ty: QpType,
    pub pd: u32,
    pub sig_all: bool,
    pub state: QpState,
    pub attr: QpAttr,
    pub send_cq: usize,
    pub recv_cq: usize,
    pub sq: Words,
    pub sq_mask: u32,
    pub sq_head: u32,
    pub recv: RecvFrom,
    /// A receive that was taken and not completed: of a message that takes many turns, or of one that was dropped.
    pub receiving: Option<Box<RecvWr>>,
    /// A work request that was fetched and is not done.
    pub current: Option<Box<Wr>>,
    pub wait: Option<Wait>,
    /// The event of its first message in RTR was raised.
    pub established: bool,
    pub is_hot: bool,
    pub in_backlog: bool,
    /// Indices of the memory windows bound to it.
    pub windows: Vec<u16>,
    /// PSN of the next datagram (UD).
    pub datagram_psn: u32,
    /// Its peer is on another host.
    pub wire: Option<Box<WireQp>>,
    pub counters: Counters,
}

impl Qp {
    #[inline]
    pub fn doorbell(&self) -> usize {
        crate::table::index(self.handle)
    }

    /// Word that becomes `seq(sq_head)` when the next request is posted.
    #[inline]
    pub fn next_sq_word(&self) -> usize {
        (self.sq_head & self.sq_mask) as usize * SLOT_WORDS + SLOT_WORDS - 1
    }

    #[inline]
    pub fn has_send(&self) -> bool {
        self.sq.at(self.next_sq_word()).load(Ordering::Acquire) as u32 == seq(self.sq_head)
    }

    /// Fetches the next send work request. `None`: none posted. `Some(false)`: it makes no sense.
    #[inline]
    pub fn fetch(&self, wr: &mut Wr) -> Option<bool> {
        let slot = |k: u32| (self.sq_head.wrapping_add(k) & self.sq_mask) as usize * SLOT_WORDS;
        let w = self.sq.array::<SLOT_WORDS>(slot(0));
        // Its extension, or the one that is watched next: two lines of the user's come at the cost of one.
        self.sq.prefetch(slot(1));
        if w[7].load(Ordering::Acquire) as u32 != seq(self.sq_head) {
            return None;
        }
        let at = |i: usize| w[i].load(Ordering::Relaxed);
        let head = SendHead::from_words([at(0), at(1), at(2), at(3)]);
        wr.head = head;
        wr.index = self.sq_head;
        wr.done = 0;
        wr.total = 0;
        wr.data[..3].copy_from_slice(&[at(4), at(5), at(6)]);
        let slots = usize::from(head.slots);
        let inline = head.flags & hyv_abi::queue::flags::INLINE != 0;
        let inline_len = if inline { head.inline_len as usize } else { 0 };
        let num_sge = usize::from(head.num_sge);
        if inline_len > MAX_INLINE
            || num_sge > MAX_SEND_SGE
            || (inline && num_sge != 0)
            || slots < SendHead::slots_for(num_sge, inline_len, false)
            || slots > hyv_abi::queue::MAX_SLOTS
            || slots > self.sq_mask as usize + 1
        {
            wr.head.slots = 1;
            return Some(false);
        }
        for k in 1..slots {
            let base = (self.sq_head.wrapping_add(k as u32) & self.sq_mask) as usize * SLOT_WORDS;
            let ext = self.sq.array::<SLOT_WORDS>(base);
            let data = &mut wr.data[3 + (k - 1) * (INLINE_EXT / 8)..];
            for (to, from) in data.iter_mut().zip(&ext[..SLOT_WORDS - 1]) {
                *to = from.load(Ordering::Relaxed);
            }
        }
        Some(true)
    }
}

/// A send work request, copied out of its slots once.
pub(crate) struct Wr {
    pub head: SendHead,
    /// Position of its head slot.
    pub index: u32,
    /// Bytes moved so far.
    pub done: u64,
    /// Bytes of the message, once known.
    pub total: u64,
    /// Words 4 to 6 of the head slot, then 7 of each extension slot.
    pub data: [u64; 3 + 7 * 7],
}

impl Wr {
    pub fn new() -> Self {
        Self {
            head: SendHead::from_words([0; 4]),
            index: 0,
            done: 0,
            total: 0,
            data: [0; 52],
        }
    }

    #[inline]
    pub fn sge(&self, i: usize) -> Sge {
        if i == 0 {
            return Sge::from_words([self.data[0], self.data[1]]);
        }
        let (slot, k) = ((i - 1) / 3, (i - 1) % 3);
        let at = 3 + slot * 7 + 2 * k;
        Sge::from_words([self.data[at], self.data[at + 1]])
    }
}
