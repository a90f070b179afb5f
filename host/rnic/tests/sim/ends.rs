//! Queue pairs as their users see them: what was posted, what is to come.

use std::collections::VecDeque;
use std::rc::Rc;

use hyv_abi::control::{CreateAh, QpAttr};
use hyv_abi::queue::{WcOpcode, WcStatus};
use hyv_abi::types::{QpAttrMask as M, QpState, QpType};
use hyv_rnic::Engine;
use hyv_roce::carrier::Gid;

use crate::common::{Cap, Conn, Qp, RTR, RTS, attr};
use crate::plan::Link;
use crate::windows::MemoryWindow;
use crate::world::{Pool, Receive, STRIDE, World, pool};

/// Room for the completions of all queues of a user, so that no CQ overruns.
const CQ_LOG2: u32 = 11;
/// Bytes of a datagram's GRH area.
pub const GRH: u64 = 40;
/// A message of an unreliable service begins with its number.
pub const NUMBER: u64 = 8;

/// What a work request does, as far as its end is checked.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A message that takes a receive.
    Send,
    Write {
        at: u64,
        data: Rc<Vec<u8>>,
        landed: bool,
    },
    Read {
        pieces: Vec<(u64, u32)>,
        data: Rc<Vec<u8>>,
    },
    /// An atomic on the peer's word for this end alone.
    Chain {
        landing: u64,
        was: u64,
        becomes: u64,
    },
    /// Adds 1 to a word that others add to, too.
    Add {
        landing: u64,
        word: usize,
    },
    /// BIND_MW and LOCAL_INV of a window of this end.
    Bind(usize),
    Unbind(usize),
    /// Nothing but its completion.
    Bare,
    /// It must fail.
    Forbidden,
}

/// A work request that is posted and not known to be complete.
#[derive(Clone, Debug)]
pub struct Sent {
    pub id: u64,
    /// Its place among all that this end has posted.
    pub seq: u64,
    pub slots: u32,
    pub signaled: bool,
    pub opcode: WcOpcode,
    pub len: u32,
    pub kind: Kind,
    /// The peer's window that it goes by.
    pub window: Option<usize>,
    pub out_cell: Option<usize>,
    pub in_cell: Option<usize>,
}

/// A message that takes a receive of the other end.
#[derive(Clone, Debug)]
pub struct Message {
    pub seq: u64,
    /// `None` for a WRITE with immediate.
    pub data: Option<Rc<Vec<u8>>>,
    pub len: u32,
    pub imm: Option<u32>,
    pub invalidates: Option<u32>,
    pub from_qpn: u32,
    pub from: Gid,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Life {
    Live,
    /// A send completed with an error.
    Failed,
    /// The QP is gone.
    Closed,
}

pub struct End {
    pub person: usize,
    pub qp: Qp,
    pub link: Link,
    pub peer: usize,
    /// Send and receive CQ among its user's.
    pub cqs: (usize, usize),
    pub life: Life,
    /// Its user has put it into the error state, or a receive failed.
    pub ending: bool,
    /// Statuses that are right for the first send that fails, by bit.
    pub may: u32,
    pub sent: VecDeque<Sent>,
    pub used: u32,
    pub seq: u64,
    /// All up to here are complete.
    pub done: Option<u64>,
    pub posted: VecDeque<Receive>,
    pub coming: VecDeque<Message>,
    /// Sources and landing places.
    pub out: Pool,
    /// What the peer may write and read.
    pub inn: Pool,
    pub rcv: Pool,
    /// The peer's word in its first 8 bytes.
    pub word: Pool,
    /// What the peer's word is, once all that was posted is done.
    pub chain: u64,
    /// What it may be after a failure.
    pub chain_ends: Vec<u64>,
    pub ahs: Vec<(Gid, u32)>,
    pub windows: Vec<MemoryWindow>,
}

pub fn bit(status: WcStatus) -> u32 {
    1 << status as u32
}

impl End {
    pub fn slots(&self) -> u32 {
        1 << self.qp.cap.sq_log2
    }

    pub fn room(&self) -> u32 {
        self.slots() - self.used
    }

    pub fn is_open(&self) -> bool {
        self.life != Life::Closed
    }

    pub fn pools(&mut self) -> [&mut Pool; 4] {
        [&mut self.out, &mut self.inn, &mut self.rcv, &mut self.word]
    }

    /// A QP of a user, in RESET.
    pub fn new(w: &mut World, person: usize, link: Link) -> Self {
        let rng = &mut crate::common::Rng(w.rng.next());
        let p = &mut w.people[person];
        let host = p.host;
        let e = &mut w.hosts[host].engine;
        if link.shared && p.srq.is_none() {
            p.srq = Some(p.user.srq(e, p.pd, link.rq_log2, STRIDE));
            let cells = (largest(&w.plan), 1 << link.rq_log2);
            let name = format!("user {person}'s shared receives");
            p.srq_pool = Some(pool(e, &mut p.user, p.pd, rng, cells, name));
        }
        if p.cqs.is_empty() || rng.below(3) == 0 {
            p.cqs.push(p.user.cq(e, CQ_LOG2));
        }
        let any = |rng: &mut crate::common::Rng, n: usize| rng.below(n as u64) as usize;
        let cqs = (any(rng, p.cqs.len()), any(rng, p.cqs.len()));
        let cap = Cap {
            sq_log2: link.sq_log2,
            rq_log2: link.rq_log2,
            stride: STRIDE,
            sig_all: link.sig_all,
            ty: link.ty,
            srq: match &p.srq {
                Some(srq) if link.shared => srq.handle,
                _ => u32::MAX,
            },
        };
        let qp = p.user.qp(e, p.pd, &p.cqs[cqs.0], &p.cqs[cqs.1], cap);
        let mut pool = |rng: &mut crate::common::Rng, what: &str, cell: u64, cells: usize| {
            let name = format!("host {host} user {person} qpn {:x} {what}", qp.qpn);
            pool(e, &mut p.user, p.pd, rng, (cell, cells), name)
        };
        let out = pool(rng, "out", link.cell, link.cells);
        let inn = pool(rng, "in", link.cell, link.cells);
        let receives = if link.shared { 1 } else { 2 << link.rq_log2 };
        let rcv = pool(rng, "receives", link.cell + GRH, receives);
        let mut word = pool(rng, "word", 64, 1);
        let at = word.mr.offset;
        let chain = u64::from_le_bytes(word.mem.get(at, 8).try_into().expect("8 bytes"));
        word.mem.lend(at, 8);
        Self {
            person,
            qp,
            link,
            peer: 0,
            cqs,
            life: Life::Live,
            ending: false,
            may: 0,
            sent: VecDeque::new(),
            used: 0,
            seq: 0,
            done: None,
            posted: VecDeque::new(),
            coming: VecDeque::new(),
            out,
            inn,
            rcv,
            word,
            chain,
            chain_ends: Vec::new(),
            ahs: Vec::new(),
            windows: Vec::new(),
        }
    }

    /// To RTS, against a QP of that host.
    pub fn connect(&self, e: &mut Engine, to: (Gid, u32), psn: (u32, u32)) {
        let l = &self.link;
        let conn = Conn {
            rd_atomic: l.rd_atomic,
            min_rnr_timer: l.min_rnr_timer,
            timeout: l.timeout,
            retry_cnt: l.retry_cnt,
            rnr_retry: l.rnr_retry,
            ..Conn::default()
        };
        self.qp.init(e, &conn);
        let mut a: QpAttr = attr();
        a.state = QpState::Rtr as u32;
        (a.path_mtu, a.dest_qp_num, a.rq_psn) = (l.mtu, to.1, psn.1);
        (a.max_dest_rd_atomic, a.min_rnr_timer) = (l.rd_atomic, l.min_rnr_timer);
        a.dest_gid = to.0;
        let (rtr, rts) = match l.ty {
            QpType::Rc => (RTR, RTS),
            QpType::Uc => (
                M::STATE | M::AV | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN,
                M::STATE | M::SQ_PSN,
            ),
            QpType::Ud => (M::STATE, M::STATE | M::SQ_PSN),
        };
        self.qp.modify(e, rtr, a).expect("RTR");
        let mut a = attr();
        (a.state, a.sq_psn) = (QpState::Rts as u32, psn.0);
        (a.timeout, a.retry_cnt, a.rnr_retry) = (l.timeout, l.retry_cnt, l.rnr_retry);
        a.max_rd_atomic = l.rd_atomic;
        self.qp.modify(e, rts, a).expect("RTS");
    }

    /// The address handle of a host.
    pub fn ah(&mut self, w: &mut World, gid: Gid) -> u32 {
        if let Some((_, ah)) = self.ahs.iter().find(|(g, _)| *g == gid) {
            return *ah;
        }
        let p = &w.people[self.person];
        let req = CreateAh {
            pd: p.pd,
            port_num: 1,
            dest_gid: gid,
            sgid_index: 0,
            traffic_class: 0,
            hop_limit: 0,
            flow_label: 0,
        };
        let e = &mut w.hosts[p.host].engine;
        let ah = e.create_ah(p.user.id, &req).expect("create_ah");
        self.ahs.push((gid, ah));
        ah
    }
}

/// The longest message of all connections.
pub fn largest(plan: &crate::plan::Plan) -> u64 {
    plan.links.iter().map(|l| l.cell).max().unwrap_or(64)
}

/// Pieces of `len` bytes inside `room` bytes at `at`, some of them empty.
pub fn pieces(
    rng: &mut crate::common::Rng,
    at: u64,
    room: u64,
    len: u64,
    most: usize,
) -> Vec<(u64, u32)> {
    let n = 1 + rng.below(most as u64);
    let mut slack = room - len;
    let (mut at, mut left) = (at, len);
    let mut out = Vec::new();
    for i in 0..n {
        let skip = match rng.below(3) {
            0 => rng.below(slack + 1),
            1 => rng.below(slack.min(8) + 1),
            _ => 0,
        };
        slack -= skip;
        at += skip;
        let size = if i + 1 == n {
            left
        } else {
            rng.below(left + 1)
        };
        out.push((at, size as u32));
        at += size;
        left -= size;
    }
    out
}
