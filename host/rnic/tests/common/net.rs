//! A network between engines: packets in a queue, delivered by the virtual clock, with faults by a seed.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use hyv_abi::types::{QpState, QpType};
use hyv_rnic::{Engine, EngineConfig};
use hyv_roce::carrier::{Arrival, Carrier, Flow, Gid, Sent};

use super::{Cap, Clock, Conn, M, Qp, RTR, RTS, Rng, Side, attr};

/// Percentages, and a delay.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub loss: u64,
    pub double: u64,
    pub reorder: u64,
    pub corrupt: u64,
    /// Sends that find no room.
    pub busy: u64,
}

#[derive(Clone, Debug)]
pub struct Sent1 {
    pub at: u64,
    pub src: Gid,
    pub dst: Gid,
    pub src_port: u16,
    pub ident: u16,
    pub traffic_class: u8,
    pub hop_limit: u8,
    pub bytes: Vec<u8>,
}

/// What lies between carriers.
pub struct Net {
    pub queues: HashMap<Gid, VecDeque<Sent1>>,
    pub faults: Faults,
    pub rng: Rng,
    pub clock: Clock,
    /// Packets that were sent, before faults.
    pub sent: u64,
    /// One way, ns.
    pub delay: u64,
    pub log: Option<Vec<Sent1>>,
}

pub type SharedNet = Arc<Mutex<Net>>;

/// A network on a clock.
pub fn net(clock: &Clock, seed: u64, faults: Faults) -> SharedNet {
    Arc::new(Mutex::new(Net {
        queues: HashMap::new(),
        faults,
        rng: Rng(seed),
        clock: clock.clone(),
        sent: 0,
        delay: 2_000,
        log: None,
    }))
}

/// One end of the network.
pub struct Port {
    pub net: SharedNet,
    pub gid: Gid,
    /// Whether a receiver sees the IPv4 identification.
    pub sees_ident: bool,
    pub burst: (usize, usize),
    pub mtu: usize,
}

impl Carrier for Port {
    fn local(&self) -> Gid {
        self.gid
    }
    fn link_mtu(&self) -> usize {
        self.mtu
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
        let mut net = self.net.lock().unwrap();
        let f = net.faults;
        if net.rng.below(100) < f.busy {
            return Sent::Busy;
        }
        assert!(payloads.len() <= self.burst.1 || payloads.len() == segment);
        assert!(payloads.len().div_ceil(segment) <= self.burst.0.max(1));
        let now = net.clock.0.load(Ordering::SeqCst);
        for (i, bytes) in payloads.chunks(segment).enumerate() {
            net.sent += 1;
            let mut packet = Sent1 {
                at: now + net.delay,
                src: self.gid,
                dst: flow.dst,
                src_port: flow.src_port,
                ident: i as u16,
                traffic_class: flow.traffic_class,
                hop_limit: flow.hop_limit,
                bytes: bytes.to_vec(),
            };
            if let Some(log) = &mut net.log {
                log.push(packet.clone());
            }
            if net.rng.below(100) < f.loss {
                continue;
            }
            if net.rng.below(100) < f.corrupt {
                let at = net.rng.below(packet.bytes.len() as u64) as usize;
                // Not the byte that the ICRC does not cover.
                let at = if at == 4 { 5 } else { at };
                packet.bytes[at] ^= 1 << net.rng.below(8);
            }
            let copies = 1 + u64::from(net.rng.below(100) < f.double);
            for _ in 0..copies {
                let mut packet = packet.clone();
                if net.rng.below(100) < f.reorder {
                    packet.at += net.rng.below(30_000);
                }
                let queue = net.queues.entry(flow.dst).or_default();
                let at = queue.partition_point(|p| p.at <= packet.at);
                queue.insert(at, packet);
            }
        }
        Sent::All
    }
    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize {
        let mut batch = Vec::new();
        {
            let mut net = self.net.lock().unwrap();
            let now = net.clock.0.load(Ordering::SeqCst);
            let queue = net.queues.entry(self.gid).or_default();
            while batch.len() < 16 && queue.front().is_some_and(|p| p.at <= now) {
                batch.extend(queue.pop_front());
            }
        }
        for p in &batch {
            take(&Arrival {
                src: p.src,
                dst: p.dst,
                src_port: p.src_port,
                traffic_class: p.traffic_class,
                hop_limit: p.hop_limit,
                ident: self.sees_ident.then_some(p.ident),
                payload: &p.bytes,
            });
        }
        batch.len()
    }
    fn cheap_poll(&self) -> bool {
        true
    }
    fn takes_company(&self) -> bool {
        // As of the real ones: AF_PACKET sees identifications, and sends acknowledgements alone.
        !self.sees_ident
    }
}

/// An IPv4 address as a GID.
pub const fn v4(last: u8) -> Gid {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 9, 0, last]
}

/// An engine at an address of a network.
pub fn wired_engine(port: Port) -> Engine {
    let time = Arc::clone(&port.net.lock().unwrap().clock.0);
    Engine::new(EngineConfig {
        clock: Box::new(move || time.load(Ordering::SeqCst)),
        gid: [0; 16],
        node_guid: 5,
        carrier: Some(Box::new(port)),
        mad_bell: Box::new(|| {}),
    })
}

/// Paths: MTU, first PSNs, and the other end.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    pub mtu: u32,
    pub psn: u32,
    pub conn: Conn,
}

impl Default for Path {
    fn default() -> Self {
        Self {
            mtu: 1024,
            psn: 0xff_fff0,
            conn: Conn::default(),
        }
    }
}

/// RESET to RTS against a QP of another host.
pub fn join(e: &mut Engine, qp: &Qp, peer: (Gid, u32), p: &Path) {
    qp.init(e, &p.conn);
    let mut a = attr();
    a.state = QpState::Rtr as u32;
    (a.path_mtu, a.dest_qp_num, a.rq_psn) = (p.mtu, peer.1, p.psn);
    (a.max_dest_rd_atomic, a.min_rnr_timer) = (p.conn.rd_atomic, p.conn.min_rnr_timer);
    a.dest_gid = peer.0;
    let (mut rtr, mut rts) = (RTR, RTS);
    match qp.cap.ty {
        QpType::Rc => {}
        QpType::Uc => {
            rtr = M::STATE | M::AV | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN;
            rts = M::STATE | M::SQ_PSN;
        }
        QpType::Ud => {
            rtr = M::STATE;
            rts = M::STATE | M::SQ_PSN;
        }
    }
    qp.modify(e, rtr, a).expect("RTR");
    let mut a = attr();
    (a.state, a.sq_psn) = (QpState::Rts as u32, p.psn);
    (a.timeout, a.retry_cnt, a.rnr_retry) = (p.conn.timeout, p.conn.retry_cnt, p.conn.rnr_retry);
    a.max_rd_atomic = p.conn.rd_atomic;
    qp.modify(e, rts, a).expect("RTS");
}

/// Two engines with a connection over a network.
pub struct WirePair {
    pub net: SharedNet,
    pub clock: Clock,
    pub ea: Engine,
    pub eb: Engine,
    pub a: Side,
    pub b: Side,
}

impl WirePair {
    pub fn new(data_len: u64) -> Self {
        Self::with(
            data_len,
            Cap::default(),
            &Path::default(),
            1,
            Faults::default(),
        )
    }

    pub fn with(data_len: u64, cap: Cap, path: &Path, seed: u64, faults: Faults) -> Self {
        let clock = Clock(Arc::new(1_000_000.into()));
        let net = net(&clock, seed, faults);
        let port = |last| Port {
            net: Arc::clone(&net),
            gid: v4(last),
            sees_ident: last == 1,
            burst: (16, 60_000),
            mtu: 9_000,
        };
        let (mut ea, mut eb) = (wired_engine(port(1)), wired_engine(port(2)));
        let a = Side::new(&mut ea, data_len, cap);
        let b = Side::new(&mut eb, data_len, cap);
        join(&mut ea, &a.qp, (v4(2), b.qp.qpn), path);
        join(&mut eb, &b.qp, (v4(1), a.qp.qpn), path);
        Self {
            net,
            clock,
            ea,
            eb,
            a,
            b,
        }
    }

    /// A few turns of both, then some time.
    pub fn step(&mut self) -> usize {
        let mut moved = 0;
        for _ in 0..3 {
            moved += self.ea.poll() + self.eb.poll();
        }
        self.clock.advance(1_000);
        moved
    }

    /// Until nothing moves and no timer is due for `quiet_ns`.
    pub fn run(&mut self, quiet_ns: u64) {
        let mut idle = 0;
        let mut turns = 0u64;
        while idle * 1_000 < quiet_ns {
            turns += 1;
            assert!(turns < 3_000_000, "the engines never come to rest");
            idle = if self.step() > 0 { 0 } else { idle + 1 };
        }
    }

    pub fn pump(&mut self) {
        self.run(200_000);
    }
}
