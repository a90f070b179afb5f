//! The simulated network: packets in flight by time, and what befalls them by a seed.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyv_roce::carrier::{Arrival, Carrier, Flow, Gid, Sent};

use crate::common::{Clock, Rng};

/// Packets handed over in one call.
const BATCH: usize = 16;

/// What befalls packets: in thousandths, unless another unit is named.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub loss: u64,
    pub double: u64,
    pub late: u64,
    /// How late, ns, at most.
    pub lateness: u64,
    /// One to three bits turn.
    pub flip: u64,
    /// The end is missing.
    pub cut: u64,
    /// Sends that find no room.
    pub busy: u64,
    /// Sends that the host itself loses.
    pub refused: u64,
    /// Packets on their way to one host, at most; further ones are lost. 0: any number.
    pub queue: usize,
}

#[derive(Clone, PartialEq, Eq)]
struct Packet {
    at: u64,
    order: u64,
    src: Gid,
    dst: Gid,
    src_port: u16,
    ident: u16,
    traffic_class: u8,
    hop_limit: u8,
    damaged: bool,
    bytes: Vec<u8>,
}

impl Ord for Packet {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// What happens to a packet.
#[allow(dead_code, reason = "only some programs look")]
pub enum Event<'a> {
    Sent(&'a [u8]),
    Lost(&'a [u8]),
    Arrived(&'a [u8]),
}

/// Sees every packet.
pub type Tap = Box<dyn FnMut(&Event<'_>) + Send>;

/// What lies between hosts.
pub struct Net {
    flying: HashMap<Gid, BinaryHeap<Reverse<Packet>>>,
    rng: Rng,
    clock: Clock,
    order: u64,
    pub faults: Faults,
    /// One way, ns.
    pub delay: u64,
    /// Time that a byte takes on a link, in 1/1024 ns; 0 is none.
    pub per_byte: u64,
    /// When a link into a host is free again.
    free: HashMap<Gid, u64>,
    /// Two hosts that cannot reach each other until then.
    pub parted: Option<(Gid, Gid, u64)>,
    /// Packets that were lost, delayed or damaged, by the host and QP that they were for.
    harm: HashMap<(Gid, u32), u64>,
    /// Damaged packets that a host got.
    damaged: HashMap<Gid, u64>,
    pub packets: u64,
    pub trace: bool,
    pub tap: Option<Tap>,
}

#[derive(Clone)]
pub struct SharedNet(Arc<Mutex<Net>>);

impl SharedNet {
    pub fn new(seed: u64, clock: &Clock) -> Self {
        Self(Arc::new(Mutex::new(Net {
            flying: HashMap::new(),
            rng: Rng(seed),
            clock: clock.clone(),
            order: 0,
            faults: Faults::default(),
            delay: 1_000,
            per_byte: 0,
            free: HashMap::new(),
            parted: None,
            harm: HashMap::new(),
            damaged: HashMap::new(),
            packets: 0,
            trace: false,
            tap: None,
        })))
    }

    pub fn lock(&self) -> MutexGuard<'_, Net> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn dest_qpn(bytes: &[u8]) -> u32 {
    match bytes.get(5..8) {
        Some(&[a, b, c]) => u32::from_be_bytes([0, a, b, c]),
        _ => 0,
    }
}

impl Net {
    fn now(&self) -> u64 {
        self.clock.0.load(Ordering::SeqCst)
    }

    fn chance(&mut self, thousandths: u64) -> bool {
        thousandths > 0 && self.rng.below(1_000) < thousandths
    }

    /// When the next packet for a host arrives, ns.
    pub fn next(&self, gid: &Gid) -> Option<u64> {
        self.flying.get(gid)?.peek().map(|p| p.0.at)
    }

    /// What befell packets to a QP.
    pub fn harm(&self, gid: &Gid, qpn: u32) -> u64 {
        self.harm.get(&(*gid, qpn)).copied().unwrap_or(0)
    }

    /// Damaged packets that a host has got.
    pub fn damaged(&self, gid: &Gid) -> u64 {
        self.damaged.get(gid).copied().unwrap_or(0)
    }

    /// Forgets what is counted of a host that starts anew.
    pub fn forget(&mut self, gid: &Gid) {
        self.damaged.remove(gid);
    }

    fn travel(&mut self, mut p: Packet) {
        self.packets += 1;
        let (f, now, whom) = (self.faults, self.now(), (p.dst, dest_qpn(&p.bytes)));
        let parted = self.parted.is_some_and(|(a, b, until)| {
            now < until && ((a, b) == (p.src, p.dst) || (b, a) == (p.src, p.dst))
        });
        let full = f.queue > 0 && self.flying.get(&p.dst).is_some_and(|q| q.len() >= f.queue);
        if parted || full || self.chance(f.loss) {
            *self.harm.entry(whom).or_default() += 1;
            self.say("lost", &p);
            if let Some(tap) = &mut self.tap {
                tap(&Event::Lost(&p.bytes));
            }
            return;
        }
        if let Some(tap) = &mut self.tap {
            tap(&Event::Sent(&p.bytes));
        }
        let free = self.free.entry(p.dst).or_default();
        let wire = (p.bytes.len() as u64 + 66) * self.per_byte / 1_024;
        *free = now.max(*free) + wire;
        p.at = *free + self.delay;
        let copies = 1 + usize::from(self.chance(f.double));
        for copy in 0..copies {
            let mut p = p.clone();
            self.order += 1;
            p.order = self.order;
            let mut harmed = copy > 0;
            if self.chance(f.late) {
                p.at += self.rng.below(f.lateness + 1);
                harmed = true;
            }
            if self.chance(f.flip) {
                let before = p.bytes.clone();
                for _ in 0..=self.rng.below(3) {
                    let bit = self.rng.below(8 * p.bytes.len() as u64);
                    // The ICRC does not cover byte 4 (IBA 1.4, A17.3.3).
                    let at = (bit / 8) as usize;
                    if at != 4 {
                        p.bytes[at] ^= 1 << (bit % 8);
                    }
                }
                p.damaged = p.bytes != before;
                harmed |= p.damaged;
            }
            if self.chance(f.cut) {
                let keep = self.rng.below(p.bytes.len() as u64) as usize;
                p.bytes.truncate(keep);
                p.damaged = true;
                harmed = true;
            }
            *self.harm.entry(whom).or_default() += u64::from(harmed);
            self.say(if p.damaged { "damaged" } else { "sent" }, &p);
            self.flying.entry(p.dst).or_default().push(Reverse(p));
        }
    }

    fn say(&self, what: &str, p: &Packet) {
        if self.trace {
            let (op, psn) = (p.bytes.first(), p.bytes.get(9..12));
            eprintln!(
                "{} {what} {}->{} qpn {:x} op {op:x?} psn {psn:x?} bytes {} at {}",
                self.now(),
                p.src[15],
                p.dst[15],
                dest_qpn(&p.bytes),
                p.bytes.len(),
                p.at
            );
        }
    }
}

/// A host's end of the network.
pub struct Port {
    pub net: SharedNet,
    pub gid: Gid,
    /// Packets and bytes of a burst.
    pub burst: (usize, usize),
    /// Whether looking for packets counts as a load.
    pub cheap: bool,
}

impl Carrier for Port {
    fn local(&self) -> Gid {
        self.gid
    }
    fn link_mtu(&self) -> usize {
        9_000
    }
    fn burst(&self, _: &Flow) -> (usize, usize) {
        self.burst
    }
    fn source_ports(&self) -> (u16, u16) {
        (0xc000, 8)
    }
    fn ident(&self, index: usize) -> u16 {
        index as u16
    }
    fn send(&mut self, flow: &Flow, segment: usize, payloads: &[u8]) -> Sent {
        let mut net = self.net.lock();
        let f = net.faults;
        if net.chance(f.busy) {
            return Sent::Busy;
        }
        assert!(payloads.len() <= self.burst.1 || payloads.len() == segment);
        assert!(payloads.len().div_ceil(segment) <= self.burst.0.max(1));
        let refused = net.chance(f.refused);
        for (i, bytes) in payloads.chunks(segment).enumerate() {
            if refused {
                let whom = (flow.dst, dest_qpn(bytes));
                *net.harm.entry(whom).or_default() += 1;
                continue;
            }
            net.travel(Packet {
                at: 0,
                order: 0,
                src: self.gid,
                dst: flow.dst,
                src_port: flow.src_port,
                ident: i as u16,
                traffic_class: flow.traffic_class,
                hop_limit: flow.hop_limit,
                damaged: false,
                bytes: bytes.to_vec(),
            });
        }
        if refused { Sent::Lost } else { Sent::All }
    }
    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize {
        let mut batch = Vec::new();
        {
            let mut net = self.net.lock();
            let (now, mut damaged) = (net.now(), 0);
            let Some(queue) = net.flying.get_mut(&self.gid) else {
                return 0;
            };
            while batch.len() < BATCH && queue.peek().is_some_and(|p| p.0.at <= now) {
                batch.extend(queue.pop().map(|p| p.0));
            }
            for p in &batch {
                damaged += u64::from(p.damaged);
                if let Some(tap) = &mut net.tap {
                    tap(&Event::Arrived(&p.bytes));
                }
            }
            *net.damaged.entry(self.gid).or_default() += damaged;
        }
        for p in &batch {
            take(&Arrival {
                src: p.src,
                dst: p.dst,
                src_port: p.src_port,
                traffic_class: p.traffic_class,
                hop_limit: p.hop_limit,
                ident: Some(p.ident),
                payload: &p.bytes,
            });
        }
        batch.len()
    }
    fn cheap_poll(&self) -> bool {
        self.cheap
    }
    fn takes_company(&self) -> bool {
        !self.cheap
    }
}
