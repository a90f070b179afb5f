//! Two users, and what lies between them.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyv_carrier::{Choice, Options};
use hyv_rnic::{Engine, EngineConfig};
use hyv_roce::carrier::{Arrival, Carrier, Flow, Gid, Sent};

use crate::common::net::{Faults, Port, net, v4};
use crate::common::{Cap, Clock, Conn, Qp, Side};

/// Where a scenario runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum On {
    /// One device, memory to memory.
    Memory,
    /// Two devices, packets in queues.
    Network,
    /// Two devices, UDP sockets on loopback.
    Udp,
    /// Two devices, AF_PACKET rings on loopback.
    Packet,
}

/// Turns without work after which all is at rest: more than any look at timers, doorbells or sockets is put off.
const REST: u32 = 200;
/// Virtual time passes while the devices turn, so that acknowledgements that wait for company go: this much in so many turns.
const STEP: (u32, u64) = (16, 1_000);
/// How long packets may be under way between sockets of this machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Slots of a receive ring: what two queue pairs here have in flight, four times over.
const SLOTS: usize = 64;

/// Runs a scenario, unless this machine or its user cannot.
pub fn run(on: On, scenario: fn(On)) {
    if on == On::Packet {
        // It says why it is not the one for which privileges are needed.
        let (_, info) = open(Choice::Auto);
        if let Some(note) = info.note {
            println!("skipped: {note}");
            return;
        }
    }
    scenario(on);
}

fn open(choice: Choice) -> (Box<dyn Carrier>, hyv_carrier::Info) {
    hyv_carrier::open(choice, &address(), &options())
        .unwrap_or_else(|e| panic!("a carrier on loopback: {e}"))
}

fn options() -> Options {
    Options {
        ring_slots: SLOTS,
        ..Options::default()
    }
}

/// An address of loopback that nobody else has: other runs of this may go on beside it.
fn address() -> hyv_carrier::ListenAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let host = (std::process::id().wrapping_mul(1024).wrapping_add(n)) & 0x003f_ffff;
    let ip = std::net::Ipv4Addr::from_bits(0x7f40_0000 | host);
    ip.to_string().parse().expect("an address")
}

/// A carrier that outlives its device, and counts.
struct Lane {
    carrier: Mutex<Box<dyn Carrier>>,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Lane {
    fn new(carrier: Box<dyn Carrier>) -> Arc<Self> {
        Arc::new(Self {
            carrier: Mutex::new(carrier),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        })
    }

    fn open(choice: Choice) -> Arc<Self> {
        Self::new(open(choice).0)
    }
}

type Lanes = [Arc<Lane>; 2];

/// Packets that were sent and did not arrive yet.
fn under_way(lanes: &Lanes) -> u64 {
    let sum = |f: fn(&Lane) -> &AtomicU64| -> u64 {
        lanes.iter().map(|l| f(l).load(Ordering::Relaxed)).sum()
    };
    sum(|l| &l.sent) - sum(|l| &l.received)
}

/// One device's view of it.
struct Lent(Arc<Lane>);

impl Lent {
    fn with<R>(&self, f: impl FnOnce(&mut dyn Carrier) -> R) -> R {
        f(self.0.carrier.lock().expect("a carrier").as_mut())
    }
}

impl Carrier for Lent {
    fn local(&self) -> Gid {
        self.with(|c| c.local())
    }
    fn link_mtu(&self) -> usize {
        self.with(|c| c.link_mtu())
    }
    fn burst(&self, flow: &Flow) -> (usize, usize) {
        self.with(|c| c.burst(flow))
    }
    fn source_ports(&self) -> (u16, u16) {
        self.with(|c| c.source_ports())
    }
    fn ident(&self, index: usize) -> u16 {
        self.with(|c| c.ident(index))
    }
    fn send(&mut self, flow: &Flow, segment: usize, payloads: &[u8]) -> Sent {
        let sent = self.with(|c| c.send(flow, segment, payloads));
        assert_ne!(sent, Sent::Lost, "loopback loses nothing");
        if sent == Sent::All {
            let n = payloads.len().div_ceil(segment) as u64;
            self.0.sent.fetch_add(n, Ordering::Relaxed);
        }
        sent
    }
    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize {
        let mut n = 0;
        let work = self.with(|c| {
            c.receive(&mut |arrival| {
                n += 1;
                take(arrival);
            })
        });
        self.0.received.fetch_add(n, Ordering::Relaxed);
        work
    }
    fn cheap_poll(&self) -> bool {
        self.with(|c| c.cheap_poll())
    }
    fn takes_company(&self) -> bool {
        self.with(|c| c.takes_company())
    }
}

thread_local! {
    /// Carriers of pairs that ended: opening sockets and rings for each of hundreds takes long.
    static IDLE: RefCell<Vec<(On, Lanes)>> = const { RefCell::new(Vec::new()) };
}

/// Connections whose peers wait long enough before they try again that a scenario may look in between: `min_rnr_timer` 14 is 1.28 ms,
/// `timeout` 14 is 67 ms.
pub fn patient() -> Conn {
    Conn {
        min_rnr_timer: 14,
        ..Conn::default()
    }
}

/// One device or two, and what carries packets between them.
pub struct Fabric {
    pub on: On,
    pub clock: Clock,
    engines: Vec<Engine>,
    gids: [Gid; 2],
    lanes: Option<Lanes>,
}

impl Fabric {
    pub fn new(on: On) -> Self {
        let clock = Clock(Arc::new(1_000_000.into()));
        let lanes = Self::lanes(on, &clock);
        let engine = |carrier: Option<Box<dyn Carrier>>| {
            let time = Arc::clone(&clock.0);
            Engine::new(EngineConfig {
                clock: Box::new(move || time.load(Ordering::SeqCst)),
                gid: v4(1),
                node_guid: 5,
                carrier,
                mad_bell: Box::new(|| {}),
            })
        };
        let engines: Vec<Engine> = match &lanes {
            None => vec![engine(None)],
            Some(lanes) => lanes
                .iter()
                .map(|l| engine(Some(Box::new(Lent(Arc::clone(l))))))
                .collect(),
        };
        let gid = |e: Option<&Engine>| e.expect("a device").gid(1, 0).expect("its GID");
        Self {
            on,
            gids: [gid(engines.first()), gid(engines.last())],
            clock,
            engines,
            lanes,
        }
    }

    fn lanes(on: On, clock: &Clock) -> Option<Lanes> {
        let choice = match on {
            On::Memory => return None,
            On::Network => {
                let net = net(clock, 1, Faults::default());
                net.lock().unwrap().delay = 0;
                return Some([1, 2].map(|last| {
                    Lane::new(Box::new(Port {
                        net: Arc::clone(&net),
                        gid: v4(last),
                        sees_ident: last == 1,
                        burst: (16, 60_000),
                        mtu: 9_000,
                    }))
                }));
            }
            On::Udp => Choice::Udp,
            On::Packet => Choice::Packet,
        };
        let idle = IDLE.with_borrow_mut(|idle| {
            let at = idle.iter().position(|(had, _)| *had == on)?;
            Some(idle.swap_remove(at).1)
        });
        let lanes = idle.unwrap_or_else(|| [Lane::open(choice), Lane::open(choice)]);
        // What their last users left under way is not for the next.
        let start = Instant::now();
        while under_way(&lanes) > 0 {
            assert!(start.elapsed() < PATIENCE, "packets were lost on loopback");
            for lane in &lanes {
                Lent(Arc::clone(lane)).receive(&mut |_| {});
            }
        }
        Some(lanes)
    }

    /// The first user's device.
    pub fn a(&mut self) -> &mut Engine {
        self.engines.first_mut().expect("a device")
    }

    /// The second user's device.
    pub fn b(&mut self) -> &mut Engine {
        self.engines.last_mut().expect("a device")
    }

    /// The first user's, to ask.
    pub fn ra(&self) -> &Engine {
        self.engines.first().expect("a device")
    }

    /// The second user's, to ask.
    pub fn rb(&self) -> &Engine {
        self.engines.last().expect("a device")
    }

    /// The GID of the first user's device.
    pub fn gid_a(&self) -> Gid {
        self.gids[0]
    }

    /// The GID of the second user's device.
    pub fn gid_b(&self) -> Gid {
        self.gids[1]
    }

    /// INIT and RTR of a QP of the first user.
    pub fn rtr_a(&mut self, a: &Qp, peer: u32, conn: &Conn) {
        let gid = self.gids[1];
        a.init(self.a(), conn);
        a.rtr_at(self.a(), (gid, peer), conn);
    }

    /// INIT and RTR of a QP of the second user.
    pub fn rtr_b(&mut self, b: &Qp, peer: u32, conn: &Conn) {
        let gid = self.gids[0];
        b.init(self.b(), conn);
        b.rtr_at(self.b(), (gid, peer), conn);
    }

    /// RESET to RTS of a QP of the second user, with a peer of that number.
    pub fn connect_b(&mut self, b: &Qp, peer: u32, conn: &Conn) {
        self.rtr_b(b, peer, conn);
        b.rts(self.b(), conn);
    }

    /// RESET to RTS of a QP of either.
    pub fn connect(&mut self, a: &Qp, b: &Qp, conn: &Conn) {
        self.rtr_a(a, b.qpn, conn);
        self.rtr_b(b, a.qpn, conn);
        a.rts(self.a(), conn);
        b.rts(self.b(), conn);
    }

    /// A turn of each device; gives how much was done.
    pub fn turn(&mut self) -> usize {
        self.engines.iter_mut().map(Engine::poll).sum()
    }

    /// Turns until that is so.
    pub fn turn_until(&mut self, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < PATIENCE, "it never comes about");
            self.turn();
        }
    }

    /// Turns until nothing moves. Some microseconds pass.
    pub fn pump(&mut self) {
        let (mut idle, mut turns) = (0, 0u32);
        let mut waiting: Option<Instant> = None;
        while idle < REST {
            turns += 1;
            assert!(turns < 50_000_000, "the devices never come to rest");
            let moved = self.turn() > 0;
            if self.lanes.as_ref().is_some_and(|l| under_way(l) > 0) {
                // The kernel has them; virtual time stands still meanwhile.
                let since = waiting.get_or_insert_with(Instant::now);
                assert!(since.elapsed() < PATIENCE, "packets were lost on loopback");
                idle = 0;
                continue;
            }
            waiting = None;
            idle = if moved { 0 } else { idle + 1 };
            if turns.is_multiple_of(STEP.0) {
                self.clock.advance(STEP.1);
            }
        }
    }

    /// Lets time pass.
    pub fn pass(&mut self, ns: u64) {
        self.clock.advance(ns);
        self.pump();
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        self.engines.clear();
        let real = matches!(self.on, On::Udp | On::Packet);
        if let Some(lanes) = self.lanes.take()
            && real
            && !std::thread::panicking()
        {
            IDLE.with_borrow_mut(|idle| idle.push((self.on, lanes)));
        }
    }
}

/// Two users with a connection.
pub struct Link {
    pub f: Fabric,
    pub a: Side,
    pub b: Side,
}

impl Link {
    pub fn new(on: On, data_len: u64) -> Self {
        Self::with(on, data_len, Cap::default(), &patient())
    }

    pub fn with(on: On, data_len: u64, cap: Cap, conn: &Conn) -> Self {
        let mut p = Self::unconnected(on, data_len, cap);
        p.f.connect(&p.a.qp, &p.b.qp, conn);
        p
    }

    /// Both QPs in RESET.
    pub fn unconnected(on: On, data_len: u64, cap: Cap) -> Self {
        let mut f = Fabric::new(on);
        let a = Side::new(f.a(), data_len, cap);
        let b = Side::new(f.b(), data_len, cap);
        Self { f, a, b }
    }

    pub fn pump(&mut self) {
        self.f.pump();
    }
}
