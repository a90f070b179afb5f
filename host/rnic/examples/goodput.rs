//! Goodput of a reliable connection under loss beside go-back-N's bound, on a simulated network and a virtual clock:
//! `goodput [SECONDS]`, the virtual time of each row (default 0.2).
//!
//! One side writes without pause to the other over a link of a given rate and delay that loses packets in both directions. Goodput is new
//! payload per second, as a part of what the same link carries without loss. *W* is the mean number of packets that were out when sending went
//! back, from the lost one on: what goes again. With it go-back-N cannot do better than (1-p)/(1-p+pW). Computing takes no virtual time, so the machine does not matter, and
//! the same arguments give the same figures.

#[path = "../tests/common/mod.rs"]
mod common;
#[allow(dead_code, reason = "this program needs a part of the network only")]
#[path = "../tests/sim/net.rs"]
mod net;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::net::{Path, join, v4};
use common::{Cap, Clock, Side, Wr};
use hyv_abi::queue::WrOpcode;
use hyv_rnic::{Engine, EngineConfig};
use net::{Event, Port, SharedNet};

/// Bytes of a WRITE.
const MESSAGE: u64 = 64 << 10;
/// WRITEs that are posted at a time.
const AHEAD: usize = 16;
/// Turns without work after which nothing happens before the next packet or timer.
const IDLE: u32 = 9;

/// A link.
#[derive(Clone, Copy)]
struct Link {
    mtu: u32,
    /// One way, ns.
    delay: u64,
    /// Gbit/s.
    rate: f64,
}

/// What was measured.
struct Measured {
    /// New payload, bytes per virtual second.
    goodput: f64,
    /// Mean packets that went again when sending went back.
    window: f64,
    retransmitted: f64,
}

/// What was seen of the sender's packets.
#[derive(Default)]
struct Flight {
    /// PSN of the last one.
    last: Option<u32>,
    /// One past the highest PSN.
    next: u32,
    /// How often sending went back, and how far in all.
    backs: u64,
    packets: u64,
}

fn since(a: u32, b: u32) -> i32 {
    ((a.wrapping_sub(b) << 8) as i32) >> 8
}

impl Flight {
    fn see(&mut self, event: &Event<'_>) {
        const ACKNOWLEDGE: u8 = 17;
        let (Event::Sent(p) | Event::Lost(p)) = *event else {
            return;
        };
        if p[0] == ACKNOWLEDGE {
            return;
        }
        let psn = u32::from_be_bytes([0, p[9], p[10], p[11]]);
        if self.last.is_some_and(|last| since(psn, last) <= 0) {
            self.backs += 1;
            self.packets += since(self.next, psn).max(0) as u64;
        }
        self.last = Some(psn);
        if self.backs == 0 || since(psn.wrapping_add(1), self.next) > 0 {
            self.next = psn.wrapping_add(1);
        }
    }
}

fn engine(net: &SharedNet, time: &Arc<AtomicU64>, last: u8) -> Engine {
    let time = Arc::clone(time);
    Engine::new(EngineConfig {
        clock: Box::new(move || time.load(Ordering::SeqCst)),
        gid: [0; 16],
        node_guid: 1,
        carrier: Some(Box::new(Port {
            net: net.clone(),
            gid: v4(last),
            burst: (64, 60_000),
            cheap: true,
        })),
        mad_bell: Box::new(|| {}),
    })
}

fn measure(link: Link, per_mille: u64, ns: u64) -> Measured {
    let time = Arc::new(AtomicU64::new(1_000_000));
    let clock = Clock(Arc::clone(&time));
    let net = SharedNet::new(7 + per_mille, &clock);
    let path = Path {
        mtu: link.mtu,
        ..Path::default()
    };
    let flight = Arc::new(Mutex::new(Flight::default()));
    {
        let mut n = net.lock();
        n.delay = link.delay;
        n.per_byte = (1_024.0 * 8.0 / link.rate) as u64;
        n.faults.loss = per_mille;
        let flight = Arc::clone(&flight);
        n.tap = Some(Box::new(move |e| {
            if let Ok(mut f) = flight.lock() {
                f.see(e);
            }
        }));
    }
    let (mut ea, mut eb) = (engine(&net, &time, 1), engine(&net, &time, 2));
    let cap = Cap::default();
    let mut a = Side::new(&mut ea, MESSAGE, cap);
    let b = Side::new(&mut eb, MESSAGE, cap);
    join(&mut ea, &a.qp, (v4(2), b.qp.qpn), &path);
    join(&mut eb, &b.qp, (v4(1), a.qp.qpn), &path);
    let (mut posted, mut done) = (0, 0);
    let start = time.load(Ordering::SeqCst);
    let mut idle = 0;
    while time.load(Ordering::SeqCst) - start < ns {
        while posted < done + AHEAD {
            let wr = Wr::new(WrOpcode::Write, posted as u64);
            a.qp.post_silently(&wr.sge(a.mr.sge(0, MESSAGE as u32)).to(&b.mr, 0));
            let _ = a.qp.ring();
            posted += 1;
        }
        let moved = ea.poll() + eb.poll();
        for c in a.scq.drain() {
            assert_eq!(
                c.status, 0,
                "a WRITE failed at {per_mille} in 1000 lost: {c:?}"
            );
            done += 1;
        }
        idle = if moved > 0 { 0 } else { idle + 1 };
        if idle >= IDLE {
            idle = 0;
            let now = time.load(Ordering::SeqCst);
            let arrivals = [v4(1), v4(2)].map(|g| net.lock().next(&g));
            let timers = [&ea, &eb].map(|e| e.next_timer_ns().map(|t| now + t));
            // An acknowledgement that waits for company has no timer to ask for.
            let next = arrivals.into_iter().chain(timers).flatten().min();
            let next = next.unwrap_or(u64::MAX).clamp(now + 1, now + 1_000);
            time.store(next, Ordering::SeqCst);
        }
    }
    let spent = (time.load(Ordering::SeqCst) - start) as f64 / 1e9;
    let c = ea.device_counters();
    let flight = flight.lock().expect("nobody panics with it");
    Measured {
        goodput: done as f64 * MESSAGE as f64 / spent,
        window: flight.packets as f64 / flight.backs.max(1) as f64,
        retransmitted: c.retransmissions as f64 / c.tx_packets.max(1) as f64,
    }
}

fn main() -> ExitCode {
    let seconds = match std::env::args().nth(1).map(|s| s.parse::<f64>()) {
        None => 0.2,
        Some(Ok(s)) if s > 0.0 && s.is_finite() => s,
        _ => {
            eprintln!(
                "usage: goodput [SECONDS], virtual time of each row; for instance: goodput 0.5"
            );
            return ExitCode::from(2);
        }
    };
    println!(
        "  MTU   delay us  Gbit/s  loss %  goodput MB/s  of no loss      W   bound   of bound  sent again"
    );
    let mut worst = f64::INFINITY;
    for (mtu, delay, rate) in [
        (1_024, 2_000, 25.0),
        (4_096, 2_000, 25.0),
        (4_096, 5_000, 100.0),
        (4_096, 20_000, 25.0),
    ] {
        let link = Link { mtu, delay, rate };
        let ns = (seconds * 1e9) as u64;
        let full = measure(link, 0, ns);
        for per_mille in [1, 10, 50] {
            let m = measure(link, per_mille, ns);
            let p = per_mille as f64 / 1e3;
            let bound = (1.0 - p) / (1.0 - p + p * m.window);
            let part = m.goodput / full.goodput;
            worst = worst.min(part / bound);
            println!(
                "{mtu:5} {:10.1} {rate:7.0} {:7.1} {:13.0} {part:11.3} {:6.1} {bound:7.3} {:10.2} {:10.3}",
                delay as f64 / 1e3,
                p * 100.0,
                m.goodput / 1e6,
                m.window,
                part / bound,
                m.retransmitted
            );
        }
        println!(
            "{mtu:5} {:10.1} {rate:7.0}     0.0 {:13.0}       1.000",
            delay as f64 / 1e3,
            full.goodput / 1e6
        );
    }
    println!("lowest part of the bound: {worst:.2}");
    ExitCode::SUCCESS
}
