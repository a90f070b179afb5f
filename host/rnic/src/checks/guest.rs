//! A raw user of the device: rings in its own RAM, filled word by word, and a shadow of every byte that must not change.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hyv_abi::control::{AllocMw, CreateAh, CreateCq, CreateQp, CreateSrq, ModifyQp, QpAttr, RegMr};
use hyv_abi::queue::{Cqe, SLOT_WORDS, Sge, WcOpcode, WcStatus, seq};
use hyv_abi::types::{Access, QpAttrMask as M, QpState, QpType, VerbError};
use hyv_roce::carrier::Gid;

use crate::engine::Engine;
use crate::mem::{UserMemory, Words};
use crate::{UserId, Wake, state};

/// Bytes of RAM.
pub(super) const RAM: u64 = 32 << 10;
/// A region's virtual address lies so far from its RAM offset.
pub(super) const IOVA: u64 = 0x7f00_0000_0000;
/// The Q_Key of datagram queue pairs.
pub(super) const QKEY: u32 = 0x1111_1111;
/// First PSN of both directions, shortly before the wrap.
pub(super) const PSN: u32 = 0xff_fff8;

const FULL: Access = Access::LOCAL_WRITE
    .union(Access::REMOTE_READ)
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_ATOMIC)
    .union(Access::MW_BIND);

/// The regions: offset, length, rights, and whether they are in the queue pairs' protection domain. Bytes between them belong to none.
const REGIONS: [(u64, u64, Access, bool); 7] = [
    (0x0100, 0x1200, FULL, true),
    (
        0x1400,
        0x300,
        Access::LOCAL_WRITE.union(Access::MW_BIND),
        true,
    ),
    (
        0x1800,
        0x300,
        Access::REMOTE_READ.union(Access::MW_BIND),
        true,
    ),
    (0x1c00, 0x300, Access::empty(), true),
    (SECRET, SECRET_LEN, FULL, false),
    (PROBE, 0x200, Access::LOCAL_WRITE, false),
    (0x2600, 0x300, FULL, true),
];
/// What nobody may read: a region whose protection domain has no queue pair of the hostile ones.
const SECRET: u64 = 0x2000;
const SECRET_LEN: u64 = 0x200;
/// What the probes use.
const PROBE: u64 = 0x2300;
const PROBE_REGION: usize = 5;
/// The one that comes and goes.
pub(super) const FLEETING: usize = 6;

/// Rings of the hostile queue pairs: 16 slots to send, 8 of 128 bytes to receive.
const RINGS: u64 = 0x3000;
const SQ_LOG2: u32 = 4;
const RQ_LOG2: u32 = 3;
const RQ_STRIDE: u64 = 128;
const QP_RINGS: u64 = (64 << SQ_LOG2) + (RQ_STRIDE << RQ_LOG2);
const SRQ_RING: u64 = RINGS + 5 * QP_RINGS;
const SRQ_CTRL: u64 = SRQ_RING + (RQ_STRIDE << RQ_LOG2);
const RINGS_END: u64 = SRQ_CTRL + 64;
/// The probes' rings.
const PROBE_RINGS: u64 = 0x6000;
/// What the device writes: completion queues and their control lines.
const CQ_RING: u64 = 0x7000;
const CQ_LOG2: u32 = 5;
const CQ_CTRL: u64 = CQ_RING + (64 << CQ_LOG2);
const PROBE_CQ: u64 = CQ_CTRL + 64;
const PROBE_CQ_LOG2: u32 = 3;
const PROBE_CTRL: u64 = PROBE_CQ + (64 << PROBE_CQ_LOG2);
const CQS_END: u64 = PROBE_CTRL + 64;

const _: () = assert!(RINGS_END <= PROBE_RINGS && CQS_END <= RAM);

/// Hostile queue pairs of a user.
pub(super) const QPS: usize = 5;
/// Its own ring, shared ring, unreliable, datagrams, and one connected to itself.
const KINDS: [QpType; QPS] = [QpType::Rc, QpType::Rc, QpType::Uc, QpType::Ud, QpType::Rc];
const SHARED: usize = 1;
/// The one that is its own peer.
pub(super) const OWN_PEER: usize = 4;

/// Nobody sleeps.
struct Awake;

impl Wake for Awake {
    fn wake(&self) {}
}

#[derive(Clone, Copy)]
pub(super) struct Region {
    pub offset: u64,
    pub len: u64,
    pub key: u32,
    pub handle: Option<u32>,
}

#[derive(Clone, Copy)]
pub(super) struct Qp {
    pub handle: u32,
    pub qpn: u32,
    pub ty: QpType,
    pub sq: u64,
    pub sq_log2: u32,
    pub sq_tail: u32,
    pub rq: u64,
    pub rq_log2: u32,
    pub rq_tail: u32,
}

/// How a queue pair is connected.
#[derive(Clone, Copy)]
pub(super) struct Path {
    pub to: (Gid, u32),
    pub mtu: u32,
    pub access: Access,
    pub timeout: u32,
    pub retries: u32,
    pub rd_atomic: u32,
}

impl Path {
    pub fn new(to: (Gid, u32)) -> Self {
        Self {
            to,
            mtu: 256,
            access: FULL.difference(Access::MW_BIND),
            timeout: 1,
            retries: 2,
            rd_atomic: 4,
        }
    }
}

pub(super) struct Guest {
    pub id: UserId,
    pub mem: Arc<UserMemory>,
    ram: Words,
    shadow: Vec<u8>,
    now: Vec<u8>,
    pub pd: u32,
    private_pd: u32,
    pub regions: [Region; REGIONS.len()],
    pub qps: Vec<Qp>,
    pub probe: Qp,
    /// Queue pairs for whoever the test wants to be left alone.
    pub friend: Qp,
    pub srq: u32,
    srq_tail: u32,
    cq: u32,
    cq_head: u32,
    /// The user wrote nonsense into its control line.
    cq_spoilt: bool,
    probe_cq_head: u32,
    probes: u32,
    /// Ends of slots that the user stored: as many work requests there are at most.
    stamps: u64,
    /// Keys that it heard of.
    pub keys: Vec<u32>,
    /// Handles and keys of memory windows.
    pub windows: Vec<(u32, u32)>,
    pub ahs: Vec<u32>,
    marker: [u8; 8],
}

impl Guest {
    /// `marker` fills what is secret.
    pub fn new(e: &mut Engine, marker: [u8; 8], peers: &[Gid]) -> Self {
        let mem = Arc::new(UserMemory::zeroed(RAM).expect("memory for a user"));
        let ram = mem.words(0, RAM as usize / 8).expect("all of it");
        let id = e
            .add_user(Arc::clone(&mem), Arc::new(Awake))
            .expect("a place for a user");
        let pd = e.alloc_pd(id).expect("a PD");
        let private_pd = e.alloc_pd(id).expect("a PD");
        let mut cq = |ring, ctrl, log2| {
            let verb = CreateCq {
                ring,
                ctrl,
                log2,
                reserved: 0,
            };
            e.create_cq(id, &verb).expect("a CQ")
        };
        let (cq, probe_cq) = (
            cq(CQ_RING, CQ_CTRL, CQ_LOG2),
            cq(PROBE_CQ, PROBE_CTRL, PROBE_CQ_LOG2),
        );
        let srq = CreateSrq {
            pd,
            log2: RQ_LOG2,
            ring: SRQ_RING,
            ctrl: SRQ_CTRL,
            stride: RQ_STRIDE as u32,
            reserved: 0,
        };
        let srq = e.create_srq(id, &srq).expect("an SRQ");
        let mut qp = |ty, srq, pd, cq, sq, (sq_log2, rq_log2): (u32, u32)| {
            let rq = sq + (64 << sq_log2);
            let verb = CreateQp {
                pd,
                qp_type: ty as u32,
                send_cq: cq,
                recv_cq: cq,
                srq,
                sig_all: 0,
                sq_ring: sq,
                rq_ring: rq,
                sq_log2,
                rq_log2,
                rq_stride: RQ_STRIDE as u32,
                reserved: 0,
            };
            let made = e.create_qp(id, &verb).expect("a QP");
            Qp {
                handle: made.handle,
                qpn: made.qpn,
                ty,
                sq,
                sq_log2,
                sq_tail: 0,
                rq,
                rq_log2,
                rq_tail: 0,
            }
        };
        let qps = (0..QPS)
            .map(|i| {
                let srq = if i == SHARED { srq } else { u32::MAX };
                let at = RINGS + QP_RINGS * i as u64;
                qp(KINDS[i], srq, pd, cq, at, (SQ_LOG2, RQ_LOG2))
            })
            .collect();
        let mut own = |at| qp(QpType::Rc, u32::MAX, private_pd, probe_cq, at, (2, 2));
        let (probe, friend) = (own(PROBE_RINGS), own(PROBE_RINGS + 0x400));
        let regions = REGIONS.map(|(offset, len, ..)| Region {
            offset,
            len,
            key: 0,
            handle: None,
        });
        let mut it = Self {
            id,
            mem,
            ram,
            shadow: vec![0; RAM as usize],
            now: vec![0; RAM as usize],
            pd,
            private_pd,
            regions,
            qps,
            probe,
            friend,
            srq,
            srq_tail: 0,
            cq,
            cq_head: 0,
            cq_spoilt: false,
            probe_cq_head: 0,
            probes: 0,
            stamps: 0,
            keys: Vec::new(),
            windows: Vec::new(),
            ahs: Vec::new(),
            marker,
        };
        for i in 0..REGIONS.len() {
            it.register(e, i);
        }
        it.keys = it.regions.iter().map(|r| r.key).collect();
        it.keys.extend([0, u32::MAX]);
        for (gid, pd) in peers
            .iter()
            .map(|g| (*g, pd))
            .chain([(peers[0], private_pd)])
        {
            let verb = CreateAh {
                pd,
                port_num: 1,
                dest_gid: gid,
                sgid_index: 0,
                traffic_class: 0,
                hop_limit: 0,
                flow_label: 0,
            };
            it.ahs.push(e.create_ah(id, &verb).expect("an AH"));
        }
        let words: Vec<u64> = (0..SECRET_LEN / 8)
            .map(|_| u64::from_ne_bytes(marker))
            .collect();
        for (i, w) in words.into_iter().enumerate() {
            it.put(SECRET + 8 * i as u64, w);
        }
        it
    }

    /// Stores a word, and remembers it.
    pub fn put(&mut self, at: u64, value: u64) {
        let at = (at % RAM) & !7;
        if (RINGS..RINGS_END).contains(&at) && at % 64 == 56 && value as u32 != 0 {
            self.stamps += 1;
        }
        self.ram.at(at as usize / 8).store(value, Ordering::Release);
        self.shadow[at as usize..at as usize + 8].copy_from_slice(&value.to_ne_bytes());
    }

    fn get(&self, at: u64) -> u64 {
        self.ram.at(at as usize / 8).load(Ordering::Acquire)
    }

    /// A word of the hostile queue pairs' rings or of a completion queue's control line, by number.
    pub fn scribble(&mut self, which: u16, value: u64) {
        let words = (RINGS_END - RINGS) / 8;
        let which = u64::from(which);
        if which < words {
            self.put(RINGS + 8 * which, value);
        } else {
            self.cq_spoilt = true;
            self.put(CQ_CTRL + 8 * (which % 2), value);
        }
    }

    /// Registers a region that is not.
    pub fn register(&mut self, e: &mut Engine, i: usize) {
        let (offset, len, access, shared) = REGIONS[i];
        let verb = RegMr {
            pd: if shared { self.pd } else { self.private_pd },
            access: access.bits(),
            iova: IOVA + offset,
            ram_offset: offset,
            len,
        };
        let mr = e.reg_mr(self.id, &verb).expect("a region");
        let region = &mut self.regions[i];
        (region.handle, region.key) = (Some(mr.handle), mr.rkey);
        if let Some(key) = self.keys.get_mut(i) {
            *key = mr.rkey;
        }
    }

    /// Registers the fleeting region, or deregisters it: its bytes stay as they are from then on.
    pub fn toggle(&mut self, e: &mut Engine) {
        let Some(handle) = self.regions[FLEETING].handle else {
            return self.register(e, FLEETING);
        };
        if e.dereg_mr(self.id, handle).is_err() {
            // A window is bound to it.
            return;
        }
        let Region { offset, len, .. } = self.regions[FLEETING];
        self.regions[FLEETING].handle = None;
        for at in (offset..offset + len).step_by(8) {
            let word = self.get(at);
            self.put(at, word);
        }
    }

    /// Makes a memory window, or drops one.
    pub fn window(&mut self, e: &mut Engine, choice: u8) {
        if choice & 1 == 0 {
            let verb = AllocMw {
                pd: self.pd,
                mw_type: 2,
            };
            if self.windows.len() < 8
                && let Ok(mw) = e.alloc_mw(self.id, &verb)
            {
                self.windows.push((mw.handle, mw.rkey));
                self.hear(mw.rkey);
            }
        } else if !self.windows.is_empty() {
            let i = usize::from(choice >> 1) % self.windows.len();
            let (handle, _) = self.windows.swap_remove(i);
            e.dealloc_mw(self.id, handle).expect("its own");
        }
    }

    /// Remembers a key.
    pub fn hear(&mut self, key: u32) {
        if self.keys.len() < 32 {
            self.keys.push(key);
        } else {
            let i = REGIONS.len() + key as usize % (32 - REGIONS.len());
            self.keys[i] = key;
        }
    }

    /// Moves a queue pair from RESET to RTS.
    pub fn connect(&self, e: &mut Engine, qp: &Qp, path: &Path) -> Result<(), VerbError> {
        let mut now = QpState::Reset;
        for to in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let needs = state::transition(qp.ty, now, to).expect("a transition");
            let attr = QpAttr {
                state: to as u32,
                access: path.access.bits(),
                port_num: 1,
                qkey: QKEY,
                path_mtu: path.mtu,
                dest_qp_num: path.to.1,
                dest_gid: path.to.0,
                rq_psn: PSN,
                sq_psn: PSN,
                max_rd_atomic: path.rd_atomic,
                max_dest_rd_atomic: path.rd_atomic,
                min_rnr_timer: 1,
                timeout: path.timeout,
                retry_cnt: path.retries,
                rnr_retry: path.retries,
                ..QpAttr::EMPTY
            };
            self.modify(e, qp.handle, M::STATE | needs.required, attr)?;
            now = to;
        }
        Ok(())
    }

    pub fn modify(&self, e: &mut Engine, qp: u32, mask: M, attr: QpAttr) -> Result<(), VerbError> {
        let mask = mask.bits();
        e.modify_qp(self.id, &ModifyQp { qp, mask, attr })
    }

    /// Resets a hostile queue pair, with empty rings, and connects it anew.
    pub fn revive(&mut self, e: &mut Engine, i: usize, path: &Path) {
        let attr = QpAttr::EMPTY;
        self.modify(e, self.qps[i].handle, M::STATE, attr)
            .expect("RESET");
        let Qp { sq, .. } = self.qps[i];
        for at in (sq..sq + QP_RINGS).step_by(8) {
            self.put(at, 0);
        }
        (self.qps[i].sq_tail, self.qps[i].rq_tail) = (0, 0);
        self.connect(e, &self.qps[i], path).expect("RTS");
    }

    /// Fills slots; the first one's last word is stored last, and only if `whole`.
    pub fn post(&mut self, qp: &mut Qp, slots: &[[u64; SLOT_WORDS - 1]], whole: bool) {
        let mask = (1 << qp.sq_log2) - 1;
        for (k, slot) in slots.iter().enumerate().rev() {
            let index = qp.sq_tail.wrapping_add(k as u32);
            let at = qp.sq + 64 * u64::from(index & mask);
            for (i, w) in slot.iter().enumerate() {
                self.put(at + 8 * i as u64, *w);
            }
            if k > 0 || whole {
                self.put(at + 56, u64::from(seq(index)));
            }
        }
        if whole {
            qp.sq_tail = qp.sq_tail.wrapping_add(slots.len() as u32);
        }
    }

    /// As [`Guest::post`] to a hostile queue pair.
    pub fn post_to(&mut self, i: usize, slots: &[[u64; SLOT_WORDS - 1]], whole: bool) {
        let mut qp = self.qps[i];
        self.post(&mut qp, slots, whole);
        self.qps[i] = qp;
    }

    /// Tells the device, as far as it wants to be told.
    pub fn ring(&self, qp: u32) {
        // Whoever polls needs no kick.
        let _ = self.mem.window().doorbells.ring(qp & 0xffff);
    }

    fn fill_recv(&mut self, ring: (u64, u32), tail: u32, wr_id: u64, count: u32, sges: &[Sge]) {
        let at = ring.0 + RQ_STRIDE * u64::from(tail & ((1 << ring.1) - 1));
        self.put(at, wr_id);
        for (i, sge) in sges.iter().take(7).enumerate() {
            let [a, b] = sge.to_words();
            self.put(at + 8 + 16 * i as u64, a);
            self.put(at + 16 + 16 * i as u64, b);
        }
        let last = u64::from(seq(tail)) | u64::from(count) << 32;
        self.put(at + RQ_STRIDE - 8, last);
    }

    /// Posts a receive to a hostile queue pair, or to what it shares. `count` is what the slot says that it has.
    pub fn post_recv(&mut self, i: usize, wr_id: u64, count: u32, sges: &[Sge]) {
        if i == SHARED {
            self.fill_recv((SRQ_RING, RQ_LOG2), self.srq_tail, wr_id, count, sges);
            self.srq_tail = self.srq_tail.wrapping_add(1);
            self.put(SRQ_CTRL, u64::from(self.srq_tail));
        } else {
            let qp = self.qps[i];
            self.fill_recv((qp.rq, qp.rq_log2), qp.rq_tail, wr_id, count, sges);
            self.qps[i].rq_tail = qp.rq_tail.wrapping_add(1);
        }
    }

    fn cqe(&self, ring: u64, log2: u32, head: u32) -> Option<Cqe> {
        let at = ring + 64 * u64::from(head & ((1 << log2) - 1));
        if self.get(at + 56) as u32 != seq(head) {
            return None;
        }
        Some(Cqe::from_words(std::array::from_fn(|i| {
            self.get(at + 8 * i as u64)
        })))
    }

    /// Takes the hostile queue pairs' completions.
    pub fn drain(&mut self, e: &Engine) {
        let slot = *e
            .user(self.id.slot as usize)
            .cqs
            .get(self.cq)
            .expect("a CQ");
        let made = e.cq(slot).head;
        assert!(
            u64::from(made) <= self.stamps,
            "{made} completions of {} work requests",
            self.stamps
        );
        while !self.cq_spoilt
            && let Some(c) = self.cqe(CQ_RING, CQ_LOG2, self.cq_head)
        {
            self.cq_head = self.cq_head.wrapping_add(1);
            assert!(
                self.qps.iter().any(|q| q.qpn == c.qpn),
                "a completion of QP {:#x}",
                c.qpn
            );
            assert_eq!(WcStatus::from_u8(c.status) as u8, c.status);
            assert!(WcOpcode::from_u8(c.opcode).is_some() || c.status != 0);
        }
        if self.cq_spoilt {
            self.cq_head = made;
            self.cq_spoilt = false;
        }
        assert_eq!(self.cq_head, made, "completions that cannot be seen");
        self.put(CQ_CTRL, u64::from(self.cq_head));
    }

    /// Looks for bytes that changed and must not.
    pub fn check(&mut self) {
        let all = self.mem.bytes(0, RAM).expect("all of it");
        all.read_into(&mut self.now);
        let mut at = 0;
        let loose = [0, 1, FLEETING]
            .into_iter()
            .filter(|&i| self.regions[i].handle.is_some())
            .map(|i| (self.regions[i].offset, self.regions[i].len))
            .chain([(CQ_RING, CQS_END - CQ_RING)]);
        for (from, len) in loose.chain([(RAM, 0)]) {
            let range = at..from as usize;
            if self.now[range.clone()] != self.shadow[range.clone()] {
                let first = range
                    .into_iter()
                    .find(|&i| self.now[i] != self.shadow[i])
                    .unwrap_or(0);
                panic!(
                    "byte {first:#x} changed from {:#x} to {:#x}",
                    self.shadow[first], self.now[first]
                );
            }
            at = (from + len) as usize;
        }
    }

    /// Looks for what another's key would have opened. Call after [`Guest::check`].
    pub fn check_secret(&self, other: [u8; 8]) {
        let open = [0, 1, FLEETING].map(|i| self.regions[i]);
        let open = open.map(|r| (r.offset, r.len));
        for (offset, len) in open.into_iter().chain([(CQ_RING, CQS_END - CQ_RING)]) {
            let bytes = &self.now[offset as usize..(offset + len) as usize];
            assert!(!holds(bytes, self.marker), "its own secret leaked");
            assert!(!holds(bytes, other), "the other's secret leaked");
        }
    }

    pub fn marker(&self) -> [u8; 8] {
        self.marker
    }

    /// Nobody but this refers to its memory any more.
    pub fn alone(self) {
        let Self { mem, ram, .. } = self;
        drop(ram);
        assert_eq!(
            Arc::strong_count(&mem),
            1,
            "the memory is still referred to"
        );
    }

    /// One end of a probe: a receive of `len` bytes.
    fn expect_probe(&mut self, len: u32) {
        let (key, at) = (self.regions[PROBE_REGION].key, PROBE + 0x100);
        for i in 0..0x20 {
            self.put(at + 8 * i, 0);
        }
        let sge = Sge {
            addr: IOVA + at,
            len,
            lkey: key,
        };
        let qp = self.probe;
        let id = u64::from(self.probes);
        self.fill_recv((qp.rq, qp.rq_log2), qp.rq_tail, id, 1, &[sge]);
        self.probe.rq_tail = qp.rq_tail.wrapping_add(1);
    }

    fn send_probe(&mut self, len: u32) {
        use hyv_abi::queue::{SendHead, WrOpcode, flags};
        self.probes += 1;
        let id = u64::from(self.probes);
        for i in 0..8 {
            self.put(PROBE + 8 * i, id << 32 | i);
        }
        let head = SendHead {
            opcode: WrOpcode::Send as u8,
            flags: flags::SIGNALED,
            num_sge: 1,
            slots: 1,
            imm: 0,
            wr_id: id,
            remote_addr: 0,
            rkey: 0,
            inline_len: 0,
        };
        let sge = Sge {
            addr: IOVA + PROBE,
            len,
            lkey: self.regions[PROBE_REGION].key,
        };
        let mut slot = [0; SLOT_WORDS - 1];
        slot[..4].copy_from_slice(&head.to_words());
        slot[4..6].copy_from_slice(&sge.to_words());
        let mut qp = self.probe;
        self.post(&mut qp, &[slot], true);
        self.probe = qp;
        self.ring(qp.handle);
    }

    pub fn probe_cqe(&mut self) -> Option<Cqe> {
        let c = self.cqe(PROBE_CQ, PROBE_CQ_LOG2, self.probe_cq_head)?;
        self.probe_cq_head = self.probe_cq_head.wrapping_add(1);
        self.put(PROBE_CTRL, u64::from(self.probe_cq_head));
        Some(c)
    }

    /// The honest queue pairs still talk: a message of `len` bytes, at most 64, from `from` to `to`.
    pub fn probe(e: &mut Engine, from: &mut Self, to: &mut Self, len: u32) {
        to.expect_probe(len);
        from.send_probe(len);
        let (mut turns, mut sent, mut got) = (0, None, None);
        while sent.is_none() || got.is_none() {
            assert!(turns < 100_000, "the probe is stuck: {sent:?}, {got:?}");
            turns += 1;
            e.poll();
            sent = sent.or_else(|| from.probe_cqe());
            got = got.or_else(|| to.probe_cqe());
        }
        let (sent, got) = (sent.expect("seen"), got.expect("seen"));
        assert_eq!((sent.status, sent.qpn), (0, from.probe.qpn));
        assert_eq!((got.status, got.qpn, got.byte_len), (0, to.probe.qpn, len));
        // It came with the completion, or lies where it was to go.
        let inline = got.flags & hyv_abi::queue::cqe_flags::DATA != 0;
        for i in 0..u64::from(len / 8) {
            let want = u64::from(from.probes) << 32 | i;
            let at = PROBE + 0x100 + 8 * i;
            let word = if inline {
                got.data[i as usize]
            } else {
                to.get(at)
            };
            assert_eq!(word, want, "word {i} of the probe");
            if !inline {
                to.put(at, want);
            }
        }
    }
}

/// Whether a marker is in there.
pub(super) fn holds(bytes: &[u8], marker: [u8; 8]) -> bool {
    bytes.windows(8).any(|w| w == marker)
}
