//! QPs whose peer is on another host: what lies between the rings of [`crate::objects`], the state machines of
//! [`hyv_roce::transport`] and a [`Carrier`].
//!
//! | module | does |
//! | --- | --- |
//! | this | the device's side: turns, timers, which QP has something to send |
//! | `qp` | what a QP keeps: requester, receiver, work requests in flight |
//! | `tx` | work requests and answers into bursts of packets |
//! | `rx` | packets that arrive: to their QP, and into users' memory |
//! | `datagram` | UD, and QP 1 for connection management |
//! | `counters` | what is counted, by device, user and QP |
//!
//! Keys are checked whenever memory is touched: a region that is deregistered in flight is an error of the message that needs it.

mod counters;
mod datagram;
mod qp;
mod rx;
mod tx;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use hyv_abi::control::{Counters, QpAttr};
use hyv_abi::types::{Errno, QpState, QpType, Reason, VerbError};
use hyv_roce::carrier::{Carrier, Flow, Gid, Sent};
use hyv_roce::icrc::{self, IdentSolver};
use hyv_roce::wire::{Repr, ip, udp};

use crate::engine::Engine;
use crate::limits::{
    MAX_BURST, MAX_MTU, STALE_TIMERS, WIRE_BUSY_TURNS, WIRE_IDLE_TURNS, WIRE_QUIET_TURNS, WR_POOL,
};
use crate::mem::Bytes;
use crate::objects::Wr;

pub(crate) use counters::{add, zeroed};
pub use datagram::MadArrival;
use datagram::Mads;
pub(crate) use qp::WireQp;

/// ICRC states of senders, by a hash of address and port: most packets of a moment come from few of them.
const CRC_CACHE: usize = 64;

/// The device's side of the wire.
pub(crate) struct Wire {
    /// Absent while it hands packets over.
    carrier: Option<Box<dyn Carrier>>,
    local: Gid,
    cheap: bool,
    /// Acknowledgements go at the end of bursts ([`Carrier::takes_company`]).
    company: bool,
    burst: Burst,
    /// When which QP wants a timer, by its slot and number. A QP has at most one entry that counts ([`WireQp::armed`]).
    timers: BinaryHeap<Reverse<(u64, usize, u32)>>,
    /// QPs with something to send after packets came.
    ready: Vec<usize>,
    /// QPs whose acknowledgement waits for company, by when it stops to ([`WireQp::lazy`]).
    lazy: VecDeque<(u64, usize)>,
    /// Turns since the last packet, in looks.
    quiet_turns: u32,
    solver: IdentSolver,
    /// The next packet's identification, perhaps, where the carrier does not see it.
    guess: u16,
    crcs: Vec<Option<(Gid, u16, icrc::Flow)>>,
    #[allow(clippy::vec_box, reason = "they come from and go to queues of boxes")]
    pool: Vec<Box<Wr>>,
    mads: Mads,
    /// Of packets that belong to no QP.
    counters: Counters,
    now: u64,
}

impl Wire {
    pub fn new(carrier: Box<dyn Carrier>) -> Self {
        Self {
            local: carrier.local(),
            cheap: carrier.cheap_poll(),
            company: carrier.takes_company(),
            carrier: Some(carrier),
            burst: Burst::new(),
            timers: BinaryHeap::new(),
            ready: Vec::new(),
            lazy: VecDeque::new(),
            quiet_turns: WIRE_QUIET_TURNS,
            solver: IdentSolver::new(),
            guess: 0,
            crcs: vec![None; CRC_CACHE],
            pool: Vec::new(),
            mads: Mads::default(),
            counters: zeroed(),
            now: 0,
        }
    }

    /// The device's GID.
    pub fn local(&self) -> Gid {
        self.local
    }

    /// Whether something waits that is due in a moment.
    pub fn is_waiting(&self) -> bool {
        !self.lazy.is_empty() || self.mads.waits()
    }

    /// When the first timer is due, ns.
    pub fn next_deadline(&self) -> Option<u64> {
        self.timers.peek().map(|t| t.0.0)
    }

    fn carrier(&mut self) -> &mut dyn Carrier {
        self.carrier
            .as_mut()
            .expect("absent only while it hands packets over")
            .as_mut()
    }

    /// The IPv4 identification of the burst's next packet.
    fn next_ident(&mut self) -> u16 {
        let index = self.burst.count;
        self.carrier().ident(index)
    }

    /// What a packet from there has in common with others for its ICRC.
    fn crc_of(&mut self, src: &Gid, src_port: u16) -> icrc::Flow {
        let i =
            (usize::from(src_port) ^ usize::from(src[15]) ^ usize::from(src[14]) << 3) % CRC_CACHE;
        match &self.crcs[i] {
            Some((s, p, crc)) if s == src && *p == src_port => *crc,
            _ => {
                let crc = icrc::Flow::new(src, &self.local, src_port);
                self.crcs[i] = Some((*src, src_port, crc));
                crc
            }
        }
    }

    fn give_back(&mut self, wr: Box<Wr>) {
        if self.pool.len() < WR_POOL {
            self.pool.push(wr);
        }
    }
}

/// Packets of one flow, back to back, on their way to the carrier.
struct Burst {
    bytes: Box<[u8]>,
    used: usize,
    /// Bytes of each packet but the last.
    segment: usize,
    count: usize,
    /// A shorter one ended it.
    closed: bool,
    most: (usize, usize),
}

impl Burst {
    fn new() -> Self {
        Self {
            bytes: vec![0; MAX_BURST].into_boxed_slice(),
            used: 0,
            segment: 0,
            count: 0,
            closed: false,
            most: (1, MAX_BURST),
        }
    }

    fn begin(&mut self, most: (usize, usize)) {
        (self.used, self.segment, self.count, self.closed) = (0, 0, 0, false);
        self.most = (most.0.max(1), most.1.min(MAX_BURST));
    }

    /// Whether a packet of `len` bytes may follow.
    fn fits(&self, len: usize) -> bool {
        self.count == 0
            || (!self.closed
                && len <= self.segment
                && self.count < self.most.0
                && self.used + len <= self.most.1)
    }

    /// Adds a packet; `fill` writes its payload.
    fn append(
        &mut self,
        crc: &icrc::Flow,
        ident: u16,
        repr: &mut Repr,
        payload: usize,
        fill: impl FnOnce(&mut [u8]),
    ) {
        repr.set_pad(payload);
        let len = repr.buffer_len(payload);
        let packet = &mut self.bytes[self.used..self.used + len];
        let header = repr.emit_headers(packet);
        let end = len - hyv_roce::wire::ICRC_LEN;
        fill(&mut packet[header..header + payload]);
        packet[header + payload..end].fill(0);
        // While the bytes are in the nearest cache.
        crc.seal(packet, ident);
        if self.count == 0 {
            self.segment = len;
        }
        self.closed |= len < self.segment;
        self.used += len;
        self.count += 1;
    }

    fn send(&self, carrier: &mut dyn Carrier, flow: &Flow) -> Sent {
        carrier.send(flow, self.segment, &self.bytes[..self.used])
    }
}

/// Copies `out.len()` bytes from byte `offset` of `pieces` on.
fn gather(pieces: &[Bytes], mut offset: u64, out: &mut [u8]) {
    let mut at = 0;
    for piece in pieces {
        if offset >= piece.len() {
            offset -= piece.len();
            continue;
        }
        let Some(rest) = piece.sub(offset, piece.len() - offset) else {
            return;
        };
        offset = 0;
        at += rest.read_into(&mut out[at..]);
        if at == out.len() {
            return;
        }
    }
}

/// Copies `data` to byte `offset` of `pieces` and on. False if there is no room for all of it: then what fits was copied.
fn scatter(data: &[u8], pieces: &[Bytes], mut offset: u64) -> bool {
    let mut data = data;
    for piece in pieces {
        if data.is_empty() {
            break;
        }
        if offset >= piece.len() {
            offset -= piece.len();
            continue;
        }
        let Some(rest) = piece.sub(offset, piece.len() - offset) else {
            return false;
        };
        offset = 0;
        let n = data.len().min(rest.len() as usize);
        Bytes::own(&data[..n]).copy_to(&rest);
        data = &data[n..];
    }
    data.is_empty()
}

/// How a QP fares after packets were handled or sent.
enum End {
    Open,
    /// The work request at this place in flight failed.
    Failed(usize, hyv_abi::queue::WcStatus),
    /// The responder refused something and has said so: an event of this kind.
    Refused(u64),
}

impl End {
    /// Work requests in flight that are complete before it matters, at most.
    fn before(&self) -> usize {
        match self {
            End::Failed(index, _) => *index,
            _ => usize::MAX,
        }
    }
}

impl Engine {
    /// Whether peers on other hosts can be reached.
    #[must_use]
    pub fn has_wire(&self) -> bool {
        self.wire.is_some()
    }

    /// The largest path MTU that the link takes, bytes.
    #[must_use]
    pub fn active_mtu(&self) -> u32 {
        /// The longest headers in front of a payload of the path MTU, ICRC included (WRITE with immediate).
        const OVERHEAD: usize = ip::V6_LEN + udp::LEN + 12 + 20 + 4;
        let Some(carrier) = self.wire.as_ref().and_then(|w| w.carrier.as_ref()) else {
            return MAX_MTU;
        };
        let room = carrier.link_mtu().saturating_sub(OVERHEAD);
        [4096u32, 2048, 1024, 512]
            .into_iter()
            .find(|&m| m as usize <= room)
            .unwrap_or(256)
    }

    /// Checks what a QP's path asks for, before it is taken over.
    pub(crate) fn check_path(
        &self,
        slot: usize,
        to: QpState,
        attr: &QpAttr,
    ) -> Result<(), VerbError> {
        let qp = self.qp(slot);
        if qp.ty == QpType::Ud || !matches!(to, QpState::Rtr | QpState::Sqd) {
            return Ok(());
        }
        let local = self.is_local(&attr.dest_gid);
        let moved = qp.state != QpState::Init && local == qp.wire.is_some();
        if !local && attr.path_mtu > self.active_mtu() || moved {
            return Err(VerbError::new(Errno::Inval, Reason::BadAttr));
        }
        Ok(())
    }

    /// Gives a QP that enters RTR or RTS its part of the wire, if its peer is not on this host.
    pub(crate) fn set_up_wire(&mut self, slot: usize, from: QpState) {
        let Some(wire) = self.wire.as_mut() else {
            return;
        };
        let qp = self.qps[slot].as_mut().expect("a live QP's slot");
        if qp.ty == QpType::Ud {
            return;
        }
        if from == QpState::Init && qp.state == QpState::Rtr {
            let local = wire.local;
            let ports = wire.carrier().source_ports();
            let attr = qp.attr;
            if !self.is_local(&attr.dest_gid) {
                let qp = self.qp_mut(slot);
                qp.wire = Some(Box::new(WireQp::new(qp, &local, ports)));
            }
            return;
        }
        let (qpn, attr) = (qp.qpn, qp.attr);
        if let Some(w) = qp.wire.as_mut() {
            w.update(qpn, &attr, &wire.local);
        }
    }

    /// Looks at timers and packets; sends what they lead to. Gives how much was done, and turns until the next look.
    pub(crate) fn poll_wire(&mut self) -> (usize, u32) {
        let Some(mut w) = self.wire.take() else {
            return (0, u32::MAX);
        };
        let mut moved = 0;
        let timers = !w.timers.is_empty() || !w.lazy.is_empty();
        // Timers go by the time before the look for packets: whoever is kept from running in between finds the answer first.
        let before = if timers { self.now() } else { 0 };
        let mut carrier = w.carrier.take();
        if let Some(c) = carrier.as_mut() {
            let mut first = true;
            moved += c.receive(&mut |arrival| {
                if std::mem::take(&mut first) {
                    w.now = self.now();
                }
                self.arrival(&mut w, arrival);
            });
        }
        w.carrier = carrier;
        if moved > 0 {
            w.quiet_turns = 0;
        } else {
            w.quiet_turns = w.quiet_turns.saturating_add(1);
        }
        if w.mads.bell {
            w.mads.bell = false;
            (self.config.mad_bell)();
        }
        w.send_mads();
        let mut ready = std::mem::take(&mut w.ready);
        self.wire = Some(w);
        for slot in ready.drain(..) {
            let Some(qp) = self.qps[slot].as_mut() else {
                continue;
            };
            if let Some(q) = qp.wire.as_mut() {
                q.is_ready = false;
            }
            moved += self.run(slot);
        }
        if timers {
            moved += self.poll_lazy(before);
            moved += self.poll_wire_timers(before);
        }
        if !self.doomed.is_empty() {
            self.fail_doomed();
        }
        let Some(w) = self.wire.as_mut() else {
            return (moved, 1);
        };
        w.ready = ready;
        let turns = if w.cheap || w.is_waiting() {
            1
        } else if w.quiet_turns < WIRE_QUIET_TURNS {
            if self.is_busy() { WIRE_BUSY_TURNS } else { 1 }
        } else {
            WIRE_IDLE_TURNS
        };
        (moved, turns)
    }

    /// Sends acknowledgements that have waited long enough.
    fn poll_lazy(&mut self, now: u64) -> usize {
        let mut moved = 0;
        while let Some(w) = self.wire.as_mut()
            && let Some(&(until, slot)) = w.lazy.front()
            && until <= now
        {
            w.lazy.pop_front();
            let waits = |q: &WireQp| q.lazy == Some(until);
            let qp = self.qps[slot].as_ref();
            if qp.is_some_and(|qp| qp.wire.as_deref().is_some_and(waits)) {
                moved += self.run(slot);
            }
        }
        moved
    }

    fn poll_wire_timers(&mut self, now: u64) -> usize {
        let mut moved = 0;
        while let Some(w) = self.wire.as_mut()
            && let Some(&Reverse((at, slot, qpn))) = w.timers.peek()
            && at <= now
        {
            w.timers.pop();
            let Some(qp) = self.qps[slot].as_mut().filter(|qp| qp.qpn == qpn) else {
                continue;
            };
            let Some(q) = qp.wire.as_mut().filter(|q| q.armed == Some(at)) else {
                continue;
            };
            q.armed = None;
            if q.deadline().is_some_and(|d| d <= now) {
                moved += 1;
                self.timer(slot, now);
            } else {
                self.arm(slot);
            }
        }
        moved
    }

    /// Makes sure that a QP's timer is in the heap.
    fn arm(&mut self, slot: usize) {
        let Some(qp) = self.qps[slot].as_mut() else {
            return;
        };
        let (Some(q), Some(w)) = (qp.wire.as_mut(), self.wire.as_mut()) else {
            return;
        };
        let Some(deadline) = q.deadline() else {
            return;
        };
        if q.armed.is_none_or(|at| deadline < at) {
            q.armed = Some(deadline);
            w.timers.push(Reverse((deadline, slot, qp.qpn)));
            if w.timers.len() > 2 * self.qps.len() + STALE_TIMERS {
                // Those of connections that are over: a time-out may be hours away, and a QP is reset in microseconds.
                let qps = &self.qps;
                w.timers.retain(|&Reverse((at, slot, qpn))| {
                    let qp = qps[slot].as_ref().filter(|qp| qp.qpn == qpn);
                    qp.and_then(|qp| qp.wire.as_ref())
                        .is_some_and(|q| q.armed == Some(at))
                });
            }
        }
    }

    /// Entries in the heap of timers.
    pub(crate) fn timers(&self) -> usize {
        self.wire.as_ref().map_or(0, |w| w.timers.len())
    }

    /// The next PSN that a QP with a peer on another host expects.
    pub(crate) fn expected_psn(&self, qpn: u32) -> Option<u32> {
        let wire = self.qp(self.find_qpn(qpn)?).wire.as_ref()?;
        Some(match &wire.receiver {
            qp::Receiver::Rc(r) => r.expected().get(),
            qp::Receiver::Uc(r) => r.expected().get(),
        })
    }
}
