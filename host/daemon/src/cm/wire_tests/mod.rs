//! Hosts that talk by MADs over a network that loses, doubles, delays and reorders, on a virtual clock.

mod directed;
mod hostile;
mod random;
mod replay;

use std::collections::{BTreeMap, HashSet};

use hyv_abi::control::{
    CmAccept, CmBindAddr, CmConnect, CmEvent, CmEventKind, CmListen, CmParam, CmReject,
    CmResolveAddr, CmResolveRoute, PRIVATE_LEN, PortSpace,
};
use hyv_abi::types::VerbError;
use hyv_roce::mad::Mad as Cmd;

use super::*;

const PORT: u16 = 7471;
const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
/// After so long without an event, none will come: more than all retries with all the patience of one MRA.
const LONG: u64 = 200 * SECOND;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True `per_mille` times of a thousand.
    fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

/// The one user of each host.
const U: UserKey = UserKey(1);

struct Node {
    cm: Cm,
    gid: Gid,
    failed: HashSet<u32>,
    told: bool,
}

/// What the network does, per mille and ns.
#[derive(Clone, Copy)]
struct Faults {
    loss: u64,
    doubling: u64,
    delay: u64,
}

const NONE: Faults = Faults {
    loss: 0,
    doubling: 0,
    delay: MS,
};

struct Net {
    nodes: Vec<Node>,
    air: BTreeMap<(u64, u64), (Gid, Gid, Box<Mad>)>,
    /// Everything that was sent, lost or not: time, from, name.
    log: Vec<(u64, usize, &'static str)>,
    now: u64,
    sent: u64,
    rng: Rng,
    faults: Faults,
    /// Nodes that do not take part any more.
    dead: HashSet<usize>,
}

fn gid(n: usize) -> Gid {
    std::net::Ipv4Addr::new(10, 0, 0, n as u8 + 1)
        .to_ipv6_mapped()
        .octets()
}

fn param(qpn: u32, text: &[u8]) -> CmParam {
    let mut private = [0; PRIVATE_LEN];
    private[..text.len()].copy_from_slice(text);
    CmParam {
        qpn,
        psn: qpn + 1,
        responder_resources: 16,
        initiator_depth: 16,
        retry_count: 7,
        rnr_retry_count: 7,
        private_len: text.len() as u32,
        private,
        ..CmParam::EMPTY
    }
}

impl Net {
    fn new(nodes: usize, seed: u64, faults: Faults) -> Self {
        let nodes = (0..nodes).map(|n| {
            let mut cm = Cm::new(CmConfig::default(), vec![gid(n)]);
            cm.set_wire(CmWire {
                ca_guid: n as u64 + 0x100,
                path_mtu: 4096,
                traffic_class: 0,
                seed: seed ^ n as u64,
            });
            cm.add_user(U);
            Node {
                cm,
                gid: gid(n),
                failed: HashSet::new(),
                told: false,
            }
        });
        Self {
            nodes: nodes.collect(),
            air: BTreeMap::new(),
            log: Vec::new(),
            now: 0,
            sent: 0,
            rng: Rng(seed),
            faults,
            dead: HashSet::new(),
        }
    }

    fn cm(&mut self, n: usize) -> &mut Cm {
        let now = self.now;
        let cm = &mut self.nodes[n].cm;
        cm.tick(now);
        cm
    }

    /// Puts what the hosts have to say on its way.
    fn collect(&mut self) {
        for n in 0..self.nodes.len() {
            for effect in self.nodes[n].cm.take_effects() {
                match effect {
                    Effect::Notify(_) => self.nodes[n].told = true,
                    Effect::FailQp { qpn, .. } => {
                        self.nodes[n].failed.insert(qpn);
                    }
                    Effect::SendMad { src, dst, mad } => {
                        let name = Cmd::parse(&*mad).expect("a MAD of ours").message.name();
                        self.log.push((self.now, n, name));
                        self.inject(src, dst, mad);
                    }
                }
            }
        }
    }

    /// A MAD is on the wire.
    fn inject(&mut self, src: Gid, dst: Gid, mad: Box<Mad>) {
        let copies = 1 + u64::from(self.rng.chance(self.faults.doubling));
        for _ in 0..copies {
            if self.rng.chance(self.faults.loss) {
                continue;
            }
            let at = self.now + 1 + self.rng.below(self.faults.delay);
            self.sent += 1;
            self.air.insert((at, self.sent), (src, dst, mad.clone()));
        }
    }

    /// The next thing happens, if it does until `until`.
    fn step(&mut self, until: u64) -> bool {
        self.collect();
        let timer = (0..self.nodes.len())
            .filter(|n| !self.dead.contains(n))
            .filter_map(|n| Some((self.nodes[n].cm.next_timeout()?, n)))
            .min();
        let arrival = self.air.keys().next().copied();
        let at = timer.map(|t| t.0).into_iter().chain(arrival.map(|a| a.0));
        let Some(at) = at.min().filter(|at| *at <= until) else {
            self.now = self.now.max(until);
            return false;
        };
        self.now = self.now.max(at);
        if let Some(key) = arrival.filter(|a| a.0 == at) {
            let Some((src, dst, mad)) = self.air.remove(&key) else {
                return true;
            };
            let to = self.nodes.iter().position(|n| n.gid == dst);
            if let Some(n) = to.filter(|n| !self.dead.contains(n)) {
                self.nodes[n].cm.handle_mad(&src, &mad, self.now);
            }
        } else if let Some((_, n)) = timer {
            self.nodes[n].cm.handle_timeout(self.now);
        }
        true
    }

    fn run_until(&mut self, until: u64) {
        while self.step(until) {}
    }

    fn run_for(&mut self, ns: u64) {
        self.run_until(self.now + ns);
    }

    /// The next event of a host, if one comes.
    fn event(&mut self, n: usize) -> Option<CmEvent> {
        let until = self.now + LONG;
        loop {
            self.collect();
            if let Ok(event) = self.nodes[n].cm.get_event(U) {
                assert!(self.nodes[n].told, "an event that nobody was told of");
                return Some(event);
            }
            if !self.step(until) {
                return None;
            }
        }
    }

    fn expect(&mut self, n: usize, id: u32, kind: CmEventKind) -> CmEvent {
        let event = self.event(n);
        let event = event.unwrap_or_else(|| panic!("no {kind:?} at {n}"));
        assert_eq!(
            (CmEventKind::from_u32(event.event), event.id),
            (Some(kind), id),
            "status {}",
            event.status
        );
        event
    }

    fn quiet(&mut self, n: usize) {
        self.collect();
        assert!(self.nodes[n].cm.get_event(U).is_err());
    }

    fn listen(&mut self, n: usize, space: PortSpace, backlog: u32) -> u32 {
        let id = self.cm(n).create_id(U, space as u32).unwrap();
        let bind = CmBindAddr {
            id,
            port: PORT.into(),
            gid: [0; 16],
        };
        self.cm(n).bind_addr(U, &bind).unwrap();
        self.cm(n).listen(U, &CmListen { id, backlog }).unwrap();
        id
    }

    /// An identifier of `n` that may connect to `to`.
    fn resolved(&mut self, n: usize, to: usize, space: PortSpace) -> u32 {
        let id = self.cm(n).create_id(U, space as u32).unwrap();
        let verb = CmResolveAddr {
            id,
            port: PORT.into(),
            gid: gid(to),
            timeout_ms: 100,
            reserved: 0,
        };
        self.cm(n).resolve_addr(U, &verb, |_, _| true).unwrap();
        let e = self.expect(n, id, CmEventKind::AddrResolved);
        assert_eq!(e.peer_gid, gid(to));
        let verb = CmResolveRoute { id, timeout_ms: 1 };
        self.cm(n).resolve_route(U, &verb).unwrap();
        self.expect(n, id, CmEventKind::RouteResolved);
        id
    }

    fn connect_with(&mut self, n: usize, id: u32, param: CmParam) -> Result<(), VerbError> {
        let now = self.now;
        self.cm(n)
            .connect(U, &CmConnect { id, param }, now, |_| true)
    }

    fn connect(&mut self, n: usize, id: u32, qpn: u32) {
        self.connect_with(n, id, param(qpn, b"hello")).unwrap();
    }

    fn accept_with(&mut self, n: usize, id: u32, param: CmParam) -> Result<(), VerbError> {
        let now = self.now;
        self.cm(n).accept(U, &CmAccept { id, param }, now, |_| true)
    }

    fn accept(&mut self, n: usize, id: u32, qpn: u32) {
        self.accept_with(n, id, param(qpn, b"welcome")).unwrap();
    }

    fn reject(&mut self, n: usize, id: u32, text: &[u8]) {
        let p = param(0, text);
        let verb = CmReject {
            id,
            private_len: p.private_len,
            private: p.private,
        };
        self.cm(n).reject(U, &verb).unwrap();
    }

    fn request(&mut self, n: usize, listener: u32) -> CmEvent {
        let e = self.event(n).expect("a request");
        assert_eq!(
            CmEventKind::from_u32(e.event),
            Some(CmEventKind::ConnectRequest)
        );
        assert_eq!(e.listen_id, listener);
        e
    }

    /// How often a host sent a kind of message.
    fn count(&self, n: usize, name: &str) -> usize {
        self.log.iter().filter(|l| l.1 == n && l.2 == name).count()
    }

    /// When time has passed, nothing is left of any conversation.
    fn assert_over(&mut self) {
        self.run_for(LONG);
        for (n, node) in self.nodes.iter().enumerate() {
            assert_eq!(node.cm.links.len(), 0, "links of {n}");
            assert_eq!(node.cm.next_timeout(), None, "time limits of {n}");
            assert!(node.cm.qps.is_empty(), "queue pairs of {n}");
        }
    }
}

/// A client on host 0 and a server on host 1.
struct Pair {
    net: Net,
    listener: u32,
    client: u32,
    server: u32,
}

const CLIENT_QP: u32 = 100;
const SERVER_QP: u32 = 200;

impl Pair {
    fn requested(faults: Faults) -> Self {
        let mut net = Net::new(2, 1, faults);
        let listener = net.listen(1, PortSpace::Tcp, 8);
        let client = net.resolved(0, 1, PortSpace::Tcp);
        net.connect(0, client, CLIENT_QP);
        let server = net.request(1, listener).id;
        Self {
            net,
            listener,
            client,
            server,
        }
    }

    fn accepted() -> Self {
        let mut p = Self::requested(NONE);
        p.net.accept(1, p.server, SERVER_QP);
        p.net.expect(0, p.client, CmEventKind::ConnectResponse);
        p
    }

    fn established() -> Self {
        let mut p = Self::accepted();
        p.net.cm(0).establish(U, p.client).unwrap();
        p.net.expect(0, p.client, CmEventKind::Established);
        p.net.expect(1, p.server, CmEventKind::Established);
        assert_eq!(p.net.nodes[0].cm.next_timeout(), None);
        assert_eq!(p.net.nodes[1].cm.next_timeout(), None);
        p
    }

    fn ids(&self) -> [(usize, u32); 3] {
        [(0, self.client), (1, self.server), (1, self.listener)]
    }

    fn destroy_all(mut self) {
        for (n, id) in self.ids() {
            // Some are gone already.
            let _ = self.net.cm(n).destroy_id(U, id);
        }
        self.net.assert_over();
    }
}
