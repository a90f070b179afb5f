//! Two devices on a network: every verb between them as between QPs of one host.

mod common;

use common::net::*;
use common::*;

const LEN: u64 = 1 << 20;

#[test]
fn a_send_and_a_write_cross() {
    let mut p = WirePair::new(LEN);
    p.a.fill(
        0,
        b"over the wire, not in memory, and longer than a completion",
    );
    p.b.qp.post_recv(7, &[p.b.mr.sge(100, 200)]);
    p.a.qp
        .post(&Wr::new(WrOpcode::Send, 1).sge(p.a.mr.sge(0, 58)));
    p.a.qp.post(
        &Wr::new(WrOpcode::Write, 2)
            .sge(p.a.mr.sge(0, 13))
            .to(&p.b.mr, 1000),
    );
    p.pump();
    let done = p.a.scq.drain();
    assert_eq!(
        done.iter()
            .map(|c| (c.wr_id, status(c)))
            .collect::<Vec<_>>(),
        [(1, WcStatus::Success), (2, WcStatus::Success)]
    );
    let r = p.b.rcq.one();
    assert_eq!((r.wr_id, r.status, r.byte_len), (7, 0, 58));
    assert_eq!(p.b.data(100, 58), p.a.data(0, 58));
    assert_eq!(p.b.data(1000, 14), *b"over the wire\0");
}

/// One request of a random run, and what it must do.
struct Want {
    id: u64,
    op: WrOpcode,
    local: u64,
    len: u32,
    /// What a READ or an atomic must bring.
    brings: Option<Vec<u8>>,
}

/// A random run of every verb in one direction, against a model of both memories.
fn every_verb(seed: u64, faults: Faults, ops: usize, most: u64) {
    println!("seed {seed} {faults:?} ops {ops} most {most}");
    let mut rng = Rng(seed);
    let path = Path {
        mtu: 256 << rng.below(5),
        psn: 0x100_0000 - rng.below(200) as u32 - 1,
        ..Path::default()
    };
    let cap = Cap {
        sq_log2: 7,
        rq_log2: 7,
        ..Cap::default()
    };
    let mut p = WirePair::with(LEN, cap, &path, seed ^ 0xfau64, faults);
    let data = rng.bytes(LEN as usize / 2);
    p.a.fill(0, &data);
    // The peer: READs go to its upper half, the rest below; atomics to the last word.
    let theirs = rng.bytes(LEN as usize);
    p.b.fill(0, &theirs);
    let mut model = theirs;
    let mut wants = Vec::new();
    let mut receives = Vec::new();
    let (half, word) = (LEN / 2, LEN - 8);
    for i in 0..ops {
        let op = rng.pick(&[
            WrOpcode::Send,
            WrOpcode::SendImm,
            WrOpcode::Write,
            WrOpcode::WriteImm,
            WrOpcode::Read,
            WrOpcode::CmpSwp,
            WrOpcode::FetchAdd,
        ]);
        let len = match rng.below(4) {
            0 => rng.below(33),
            1 => u64::from(path.mtu) * rng.below(4),
            _ => rng.below(most + 1),
        } as u32;
        let id = 100 + i as u64;
        let local = rng.below(half - 120_000);
        let remote = rng.below(half - 120_000);
        let mut wr = Wr::new(op, id);
        if rng.below(5) == 0 {
            wr = wr.with(flags::FENCE);
        }
        if i + 1 < ops && rng.below(3) == 0 {
            wr = wr.unsignaled();
        }
        let split = |len: u32, at: u64, rng: &mut Rng| {
            let cut = rng.below(u64::from(len) + 1) as u32;
            [
                p.a.mr.sge(at, cut),
                p.a.mr.sge(at + u64::from(cut), len - cut),
            ]
        };
        let payload = data[local as usize..][..len as usize].to_vec();
        let mut want = Want {
            id,
            op,
            local,
            len,
            brings: None,
        };
        match op {
            WrOpcode::Send | WrOpcode::SendImm => {
                for s in split(len, local, &mut rng) {
                    wr = wr.sge(s);
                }
                receives.push((id as u32, Some(payload), op));
            }
            WrOpcode::Write | WrOpcode::WriteImm => {
                for s in split(len, local, &mut rng) {
                    wr = wr.sge(s);
                }
                wr = wr.to(&p.b.mr, remote);
                model[remote as usize..][..len as usize].copy_from_slice(&payload);
                if op == WrOpcode::WriteImm {
                    receives.push((id as u32, None, op));
                }
            }
            WrOpcode::Read => {
                // Into the upper half of this side, each its own place.
                want.local = half + (i as u64 % 4) * 110_000;
                let from = half + rng.below(half - 120_000);
                wr = wr.sge(p.a.mr.sge(want.local, len)).to(&p.b.mr, from);
                want.brings = Some(model[from as usize..][..len as usize].to_vec());
            }
            _ => {
                want.local = LEN - 64 * 8 + (i as u64 % 64) * 8;
                want.len = 8;
                let now = u64::from_le_bytes(model[word as usize..].try_into().unwrap());
                let operand = rng.next();
                let compare = if rng.below(2) == 0 { now } else { now ^ 1 };
                wr = wr
                    .sge(p.a.mr.sge(want.local, 8))
                    .to(&p.b.mr, word)
                    .atomic(compare, operand);
                let after = match op {
                    WrOpcode::FetchAdd => now.wrapping_add(operand),
                    _ if compare == now => operand,
                    _ => now,
                };
                model[word as usize..].copy_from_slice(&after.to_le_bytes());
                want.brings = Some(now.to_le_bytes().to_vec());
            }
        }
        wr = wr.imm(id as u32);
        let signaled = wr.flags & flags::SIGNALED != 0;
        // Receives come late now and then: RNR.
        let late = rng.below(4) == 0;
        let post = |p: &mut WirePair| {
            if matches!(op, WrOpcode::Send | WrOpcode::SendImm | WrOpcode::WriteImm) {
                let r = p.b.mr.sge(half, 120_000);
                p.b.qp.post_recv(id, &[r]);
            }
        };
        if !late {
            post(&mut p);
        }
        p.a.qp.post(&wr);
        wants.push((want, signaled));
        if late {
            for _ in 0..rng.below(40) {
                p.step();
            }
            post(&mut p);
        }
        // READs of one place must not overlap in time with what the model takes for done: finish now and then.
        let reads = op == WrOpcode::Read;
        if reads || i % 16 == 15 || matches!(op, WrOpcode::Send | WrOpcode::SendImm) {
            p.run(12_000_000);
            if let Some((_, Some(payload), _)) = receives.last()
                && matches!(op, WrOpcode::Send | WrOpcode::SendImm)
            {
                let r = p.b.rcq.drain();
                let last = r.last().unwrap_or_else(|| {
                    panic!("seed {seed}: nothing received; {:?}", p.a.scq.drain())
                });
                assert_eq!((last.wr_id, last.status, last.byte_len), (id, 0, len));
                let got = received(&p.b.user.ram, last, &[p.b.mr.sge(half, 120_000)], IOVA);
                assert!(got == *payload, "seed {seed}: message {id}");
                let imm = last.flags & cqe_flags::WITH_IMM != 0;
                assert_eq!(imm, op == WrOpcode::SendImm);
                assert!(!imm || last.imm == id as u32);
                // The receive's place is the READs' too: the model follows.
                if last.flags & cqe_flags::DATA == 0 {
                    model[half as usize..][..payload.len()].copy_from_slice(payload);
                }
            }
            if let (true, Some(w)) = (reads, wants.last()) {
                let got = p.a.data(w.0.local, u64::from(w.0.len));
                let want = w.0.brings.as_ref().unwrap();
                let small = want.len() <= 32;
                assert!(small || got == *want, "seed {seed}: READ {id}");
            }
        }
    }
    p.run(80_000_000);
    let mut done = p.a.scq.drain();
    for c in &done {
        assert_eq!(status(c), WcStatus::Success, "seed {seed}: {c:?}");
    }
    done.retain(|c| wants.iter().any(|(w, s)| w.id == c.wr_id && *s));
    let order: Vec<u64> = done.iter().map(|c| c.wr_id).collect();
    let all: Vec<u64> = wants
        .iter()
        .filter(|(_, s)| *s)
        .map(|(w, _)| w.id)
        .collect();
    assert_eq!(order, all, "seed {seed}: once each, in order");
    assert!(p.b.data(0, LEN) == model, "seed {seed}: memory");
    for (w, _) in &wants[wants.len().saturating_sub(60)..] {
        if matches!(w.op, WrOpcode::CmpSwp | WrOpcode::FetchAdd) {
            let got = p.a.data(w.local, 8);
            assert_eq!(Some(got), w.brings, "seed {seed}: atomic {}", w.id);
        }
    }
}

#[test]
fn every_verb_on_a_clean_network() {
    for seed in 0..8 {
        every_verb(seed, Faults::default(), 60, 100 << 10);
    }
}

#[test]
fn every_verb_on_a_bad_network() {
    for seed in 100..112 {
        let mut rng = Rng(seed);
        let faults = Faults {
            loss: rng.below(6),
            double: rng.below(5),
            reorder: rng.below(10),
            corrupt: rng.below(4),
            busy: rng.below(20),
        };
        every_verb(seed, faults, 50, 30_000);
    }
}

#[test]
fn management_datagrams_cross() {
    let mut p = WirePair::new(4096);
    let mut mad = [0u8; 256];
    mad[0] = 1;
    mad[255] = 9;
    p.ea.send_mad(&v4(2), 1, &mad);
    mad[255] = 10;
    p.ea.send_mad(&v4(2), 1, &mad);
    p.pump();
    let got = p.eb.take_mads();
    assert_eq!(got.len(), 2);
    assert_eq!((got[0].src, got[0].src_qpn, got[0].mad[255]), (v4(1), 1, 9));
    assert_eq!(*got[1].mad, mad);
    assert!(p.eb.take_mads().is_empty());
    // To a host that is not there: lost, as datagrams are.
    p.ea.send_mad(&v4(77), 1, &mad);
    p.pump();
    // A bounded queue: the oldest goes.
    for i in 0..5_000u32 {
        mad[..4].copy_from_slice(&i.to_le_bytes());
        p.ea.send_mad(&v4(2), 1, &mad);
    }
    p.pump();
    let got = p.eb.take_mads();
    assert_eq!(got.len(), 4096);
    assert_eq!(got[0].mad[..4], (5_000u32 - 4096).to_le_bytes());
    assert_eq!(p.eb.device_counters().drops_receive, 5_000 - 4096);
}
