//! Two devices over the carriers themselves, on loopback: bursts, identifications and ICRCs as the kernel makes and shows them.

mod common;

use std::time::{Duration, Instant};

use common::net::{Path, join};
use common::*;
use hyv_carrier::{Choice, ListenAddr, Options};
use hyv_rnic::{Engine, EngineConfig};

const LEN: u64 = 4 << 20;

fn device(choice: Choice, addr: &str) -> Option<Engine> {
    let addr: ListenAddr = addr.parse().expect("an address");
    let asked = match choice {
        // It says why it is not the one for which privileges are needed.
        Choice::Packet => Choice::Auto,
        other => other,
    };
    let (carrier, info) =
        hyv_carrier::open(asked, &addr, &Options::default()).unwrap_or_else(|e| panic!("{e}"));
    if let (Choice::Packet, Some(note)) = (choice, &info.note) {
        println!("skipped: {note}");
        return None;
    }
    println!("{info}");
    let start = Instant::now();
    Some(Engine::new(EngineConfig {
        clock: Box::new(move || start.elapsed().as_nanos() as u64),
        gid: [0; 16],
        node_guid: 1,
        carrier: Some(carrier),
        mad_bell: Box::new(|| {}),
    }))
}

/// Every verb in several sizes, at every MTU, between two devices.
fn exchange(mut ea: Engine, mut eb: Engine) {
    let cap = Cap {
        sq_log2: 7,
        rq_log2: 7,
        ..Cap::default()
    };
    let mut a = Side::new(&mut ea, LEN, cap);
    let mut b = Side::new(&mut eb, LEN, cap);
    let (ga, gb) = (ea.gid(1, 0).unwrap(), eb.gid(1, 0).unwrap());
    for mtu in [256, 512, 1024, 2048, 4096] {
        let path = Path {
            mtu,
            ..Path::default()
        };
        a.qp.reset(&mut ea);
        b.qp.reset(&mut eb);
        join(&mut ea, &a.qp, (gb, b.qp.qpn), &path);
        join(&mut eb, &b.qp, (ga, a.qp.qpn), &path);
        let mut rng = Rng(u64::from(mtu));
        for len in [0u32, 1, 31, 1000, 4096, 70_000, 1 << 20] {
            let (ours, theirs) = (rng.bytes(len as usize), rng.bytes(len as usize));
            a.fill(0, &ours);
            b.fill(2 << 20, &theirs);
            let there = b.mr.sge(3 << 20, 1 << 20);
            b.qp.post_recv(9, &[there]);
            let sge = |at, len| a.mr.sge(at, len);
            let wrs = [
                Wr::new(WrOpcode::SendImm, 1).sge(sge(0, len)).imm(mtu),
                Wr::new(WrOpcode::Write, 2).sge(sge(0, len)).to(&b.mr, 0),
                Wr::new(WrOpcode::Read, 3)
                    .sge(sge(2 << 20, len))
                    .to(&b.mr, 2 << 20),
                Wr::new(WrOpcode::FetchAdd, 4)
                    .sge(sge(3 << 20, 8))
                    .to(&b.mr, (2 << 20) - 8)
                    .atomic(0, 3),
            ];
            for wr in &wrs {
                a.qp.post(wr);
            }
            let deadline = Instant::now() + Duration::from_secs(60);
            let mut done = Vec::new();
            while done.len() < wrs.len() {
                assert!(
                    Instant::now() < deadline,
                    "MTU {mtu}, {len} bytes: {done:?}"
                );
                ea.poll();
                eb.poll();
                done.extend(a.scq.drain().iter().map(|c| (c.wr_id, status(c))));
            }
            let good: Vec<_> = (1..5).map(|id| (id, WcStatus::Success)).collect();
            assert_eq!(done, good, "MTU {mtu}, {len} bytes");
            let r = b.rcq.one();
            assert_eq!((r.byte_len, r.imm), (len, mtu));
            assert!(received(&b.user.ram, &r, &[there], IOVA) == ours);
            assert!(b.data(0, u64::from(len)) == ours, "WRITE of {len}");
            assert!(a.data(2 << 20, u64::from(len)) == theirs, "READ of {len}");
        }
    }
    let counted = (ea.device_counters(), eb.device_counters());
    for c in [counted.0, counted.1] {
        let drops = c.icrc_errors + c.drops_malformed + c.drops_no_qp + c.drops_source;
        assert_eq!((drops, c.tx_dropped), (0, 0), "{c:?}");
    }
    assert_eq!(b.data((2 << 20) - 8, 8), 105u64.to_le_bytes(), "7 x 5 x 3");
}

fn both(choice: Choice, a: &str, b: &str) {
    if let (Some(ea), Some(eb)) = (device(choice, a), device(choice, b)) {
        exchange(ea, eb);
    }
}

#[test]
fn over_udp() {
    both(Choice::Udp, "127.0.76.1", "127.0.76.2");
}

#[test]
fn over_packets() {
    both(Choice::Packet, "127.0.77.1", "127.0.77.2");
}

#[test]
fn over_one_of_each() {
    let a = device(Choice::Udp, "127.0.78.1");
    if let (Some(ea), Some(eb)) = (a, device(Choice::Packet, "127.0.78.2")) {
        exchange(ea, eb);
    }
}
