//! What Linux `rdma_rxe` put on the wire, as a measure: our responder answers its requests as its own peer did, and our
//! requester asks for the same things in the same bytes.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::net::*;
use common::*;
use hyv_abi::control::AllocMw;
use hyv_roce::carrier::Gid;
use hyv_roce::icrc;
use hyv_roce::pcap::frame::{Seen, dissect};
use hyv_roce::pcap::{Decoder, Step};
use hyv_roce::wire::{Extension, Operation, Packet, Repr, Service, Suffix, Syndrome};

/// Where the capture's responder had its memory, by its keys; 16 KiB.
const THEIR_BASE: u64 = 0x55f5_7d36_f000;
const THEIR_KEY: u32 = 0x28b;
const THEIR_LEN: u64 = 16 << 10;
const ASKING: Gid = v4_of([10, 77, 0, 1]);
const ANSWERING: Gid = v4_of([10, 77, 0, 2]);

const fn v4_of(a: [u8; 4]) -> Gid {
    [
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3],
    ]
}

/// A packet of the capture, from BTH to ICRC.
struct Seen1 {
    src: Gid,
    repr: Repr,
    bytes: Vec<u8>,
}

impl Seen1 {
    fn payload(&self) -> Vec<u8> {
        Packet::new_checked(&self.bytes).unwrap().payload().to_vec()
    }
}

fn capture() -> Vec<Seen1> {
    let path = format!(
        "{}/../roce/tests/captures/vec.pcap",
        env!("CARGO_MANIFEST_DIR")
    );
    let file = std::fs::read(path).unwrap();
    let mut decoder = Decoder::new();
    let (mut at, mut out) = (0, Vec::new());
    loop {
        match decoder.step(&file[at..]).unwrap() {
            Step::Record(record, len) => {
                at += len;
                let Seen::Roce(f) = dissect(&record) else {
                    continue;
                };
                let packet = Packet::new_checked(f.packet).unwrap();
                out.push(Seen1 {
                    src: f.ip.src(),
                    repr: packet.repr().unwrap(),
                    bytes: f.packet.to_vec(),
                });
            }
            Step::Skip(len) => at += len,
            Step::Need(need) => {
                decoder.end(&file[at..], need).unwrap();
                return out;
            }
        }
    }
}

fn is_request(s: &Seen1) -> bool {
    !matches!(
        s.repr.bth.opcode.info().operation,
        Operation::Acknowledge | Operation::ReadResponse | Operation::AtomicAcknowledge
    )
}

/// By the responder's QPN: each request packet with the answers that followed it.
fn exchanges(service: Service) -> BTreeMap<u32, Vec<(Seen1, Vec<Seen1>)>> {
    let mut by_qp: BTreeMap<u32, Vec<(Seen1, Vec<Seen1>)>> = BTreeMap::new();
    // Both sides numbered their QPs alike: the answers' destination is the number again.
    for s in capture() {
        if s.repr.bth.opcode.info().service != service {
            continue;
        }
        let qp = by_qp.entry(s.repr.bth.dest_qpn).or_default();
        if s.src == ASKING && is_request(&s) {
            qp.push((s, Vec::new()));
        } else {
            qp.last_mut().unwrap().1.push(s);
        }
    }
    by_qp
}

/// The path MTU that a QP's packets show: the payload of one that is neither last nor only.
fn mtu(packets: &[(Seen1, Vec<Seen1>)]) -> u32 {
    packets
        .iter()
        .flat_map(|(r, a)| std::iter::once(r).chain(a))
        .filter(|s| !s.repr.bth.opcode.info().position.ends())
        .map(|s| s.payload().len() as u32)
        .max()
        .unwrap_or(1024)
}

fn device(gid: Gid) -> (hyv_rnic::Engine, SharedNet, Clock) {
    let clock = Clock(Arc::new(1_000_000.into()));
    let net = net(&clock, 0, Faults::default());
    net.lock().unwrap().delay = 0;
    let port = Port {
        net: Arc::clone(&net),
        gid,
        sees_ident: true,
        burst: (64, 60_000),
        mtu: 1500,
    };
    (wired_engine(port), net, clock)
}

fn takes_receive(r: &Repr) -> bool {
    let info = r.bth.opcode.info();
    match info.operation {
        Operation::Send => info.position.begins(),
        _ => info.suffix == Suffix::Imm,
    }
}

#[test]
fn our_responder_answers_as_linux_did() {
    let mut checked = 0;
    let exchanges = exchanges(Service::Rc);
    let answers: usize = exchanges.values().flatten().map(|(_, a)| a.len()).sum();
    for (qpn, exchange) in exchanges {
        let (mut e, net, clock) = device(ANSWERING);
        let mut side = Side::new(&mut e, THEIR_LEN, Cap::default());
        let scratch = side.user.mr(&mut e, side.pd, 8192, FULL);
        // A region that peers may not write (QP 0x1d), and one that a SEND with invalidate closes (0x14).
        let closed = side.user.mr(&mut e, side.pd, 4096, Access::REMOTE_READ);
        let access = Access::LOCAL_WRITE | Access::MW_BIND;
        let bindable = side.user.mr(&mut e, side.pd, 4096, access);
        let rnr =
            exchange
                .iter()
                .flat_map(|(_, a)| a)
                .find_map(|a| match a.repr.ext.aeth()?.syndrome {
                    Syndrome::RnrNak { timer } => Some(u32::from(timer)),
                    _ => None,
                });
        let path = Path {
            mtu: mtu(&exchange),
            psn: exchange[0].0.repr.bth.psn,
            conn: Conn {
                min_rnr_timer: rnr.unwrap_or(12),
                ..Conn::default()
            },
        };
        join(&mut e, &side.qp, (ASKING, qpn), &path);
        let crc = icrc::Flow::new(&ASKING, &ANSWERING, 0xc123);
        // A memory window, which Linux bound before each SEND that invalidates it.
        let mw = AllocMw {
            pd: side.pd,
            mw_type: 2,
        };
        let mut window = e.alloc_mw(side.user.id, &mw).unwrap().rkey;
        let (mut bound, mut known) = (None, Vec::new());
        let mut got = Vec::new();
        for (request, answers) in &exchange {
            let syndrome = answers
                .iter()
                .find_map(|a| Some(a.repr.ext.aeth()?.syndrome));
            // Each key of theirs was bound once; what is invalidated stays so.
            let named = match request.repr.ext {
                Extension::Reth(r) => Some(r.rkey),
                Extension::Ieth(key) => Some(key),
                _ => None,
            };
            if let (Some(key), 0x14) = (named, qpn)
                && !known.contains(&key)
            {
                known.push(key);
                let next = window & !0xff | window.wrapping_add(1) & 0xff;
                let remote = Access::REMOTE_WRITE;
                side.qp
                    .post(&Wr::bind(1, window, next, remote, &bindable, 0, 4096));
                e.poll();
                assert_eq!(status(&side.scq.one()), WcStatus::Success);
                (window, bound) = (next, Some(key));
            }
            if takes_receive(&request.repr) && !matches!(syndrome, Some(Syndrome::RnrNak { .. })) {
                let mut sge = scratch.sge(0, 8192);
                // QP 0x1c: a receive with a key that is none.
                sge.lkey ^= u32::from(qpn == 0x1c);
                side.qp.post_recv(1, &[sge]);
            }
            // The same request, with our numbers, addresses and keys.
            let mut repr = request.repr;
            repr.bth.dest_qpn = side.qp.qpn;
            let translate = |addr: &mut u64, key: &mut u32| {
                let (base, rkey) = match (*key, qpn) {
                    (THEIR_KEY, _) => (side.mr.iova, side.mr.rkey),
                    (key, 0x14) if Some(key) == bound => (bindable.iova, window),
                    (_, 0x1d) => (closed.iova, closed.rkey),
                    _ => (side.mr.iova, side.mr.rkey ^ 0x7700),
                };
                let their = if qpn == 0x1d {
                    0x55f5_7d37_4000
                } else {
                    THEIR_BASE
                };
                (*addr, *key) = (*addr - their + base, rkey);
            };
            match &mut repr.ext {
                Extension::Reth(r) | Extension::RethImm(r, _) => {
                    translate(&mut r.address, &mut r.rkey);
                }
                Extension::Atomic(a) => translate(&mut a.address, &mut a.rkey),
                Extension::Ieth(key) => {
                    assert_eq!(Some(*key), bound.take(), "QP {qpn:#x}");
                    *key = window;
                }
                _ => {}
            }
            let payload = request.payload();
            let mut bytes = vec![0; repr.buffer_len(payload.len())];
            repr.emit(&payload, &mut bytes);
            crc.seal(&mut bytes, 9);
            net.lock()
                .unwrap()
                .queues
                .entry(ANSWERING)
                .or_default()
                .push_back(Sent1 {
                    at: 0,
                    src: ASKING,
                    dst: ANSWERING,
                    src_port: 0xc123,
                    ident: 9,
                    traffic_class: 0,
                    hop_limit: 64,
                    bytes,
                });
            for _ in 0..8 {
                e.poll();
                clock.advance(1000);
            }
            got.extend(
                net.lock()
                    .unwrap()
                    .queues
                    .remove(&ASKING)
                    .unwrap_or_default(),
            );
            if answers.is_empty() {
                // Linux answered after the next packet: so may we have now.
                continue;
            }
            let name = format!("QP {qpn:#x} PSN {:#x} {:?}", repr.bth.psn, repr.bth.opcode);
            assert_eq!(got.len(), answers.len(), "{name}: {got:x?}");
            for (ours, theirs) in got.drain(..).zip(answers) {
                let covered = theirs.bytes.len() - 4;
                assert_eq!(ours.bytes[..covered], theirs.bytes[..covered], "{name}");
                checked += 1;
            }
        }
        let refused = exchange.iter().flat_map(|(_, a)| a).any(|a| {
            matches!(
                a.repr.ext.aeth().map(|a| a.syndrome),
                Some(Syndrome::Nak(_))
            )
        });
        assert!(got.is_empty(), "QP {qpn:#x}: {got:x?}");
        let state = side.qp.state(&e);
        assert_eq!(state == QpState::Err, refused, "QP {qpn:#x}");
    }
    assert_eq!((checked, answers), (118, 118), "answers compared");
}

/// The work request that made Linux send these packets: one message.
fn work_request(packets: &[&Seen1], local: Sge) -> Wr {
    let first = &packets[0].repr;
    let last = &packets[packets.len() - 1].repr;
    let info = last.bth.opcode.info();
    let op = match (info.operation, info.suffix) {
        (Operation::Send, Suffix::None) => WrOpcode::Send,
        (Operation::Send, Suffix::Imm) => WrOpcode::SendImm,
        (Operation::Send, Suffix::Invalidate) => WrOpcode::SendInv,
        (Operation::Write, Suffix::None) => WrOpcode::Write,
        (Operation::Write, _) => WrOpcode::WriteImm,
        (Operation::ReadRequest, _) => WrOpcode::Read,
        (Operation::CompareSwap, _) => WrOpcode::CmpSwp,
        (Operation::FetchAdd, _) => WrOpcode::FetchAdd,
        other => panic!("{other:?} asks for nothing"),
    };
    let mut wr = Wr::new(op, 1);
    if last.bth.solicited {
        wr = wr.with(flags::SOLICITED);
    }
    if let Some(imm) = last.ext.imm() {
        wr = wr.imm(imm);
    }
    if let Extension::Ieth(key) = last.ext {
        wr = wr.imm(key);
    }
    let mut len: usize = packets.iter().map(|p| p.payload().len()).sum();
    match first.ext {
        Extension::Reth(r) | Extension::RethImm(r, _) => {
            wr = wr.remote(r.address, r.rkey);
            len = r.dma_len as usize;
        }
        Extension::Atomic(a) => {
            wr = wr.remote(a.address, a.rkey).atomic(a.compare, a.swap_add);
            len = 8;
        }
        _ => {}
    }
    wr.sge(Sge {
        len: len as u32,
        ..local
    })
}

#[test]
fn our_requester_asks_as_linux_did() {
    let mut checked = 0;
    for service in [Service::Rc, Service::Uc] {
        for (qpn, exchange) in exchanges(service) {
            let (mut e, net, clock) = device(ASKING);
            let cap = Cap {
                ty: if service == Service::Rc {
                    QpType::Rc
                } else {
                    QpType::Uc
                },
                ..Cap::default()
            };
            let mut side = Side::new(&mut e, THEIR_LEN, cap);
            let path = Path {
                mtu: mtu(&exchange),
                psn: exchange[0].0.repr.bth.psn,
                conn: Conn::default(),
            };
            join(&mut e, &side.qp, (ANSWERING, qpn), &path);
            let mut i = 0;
            while i < exchange.len() {
                let end = exchange[i..]
                    .iter()
                    .position(|(r, _)| r.repr.bth.opcode.info().position.ends())
                    .unwrap()
                    + i;
                let packets: Vec<&Seen1> = exchange[i..=end].iter().map(|(r, _)| r).collect();
                let answers = &exchange[end].1;
                i = end + 1;
                let mut at = 0;
                for p in &packets {
                    side.fill(at, &p.payload());
                    at += p.payload().len() as u64;
                }
                // A refused one goes again by itself.
                let again = i > 1
                    && exchange[i - 2].0.repr.bth.psn == packets[0].repr.bth.psn
                    && packets.len() == 1;
                if !again {
                    side.qp.post(&work_request(&packets, side.mr.sge(0, 0)));
                }
                for _ in 0..3 {
                    e.poll();
                }
                let sent: Vec<Sent1> = net
                    .lock()
                    .unwrap()
                    .queues
                    .remove(&ANSWERING)
                    .unwrap_or_default()
                    .into();
                let name = format!("QP {qpn:#x} PSN {:#x}", packets[0].repr.bth.psn);
                assert_eq!(sent.len(), packets.len(), "{name}");
                for (ours, theirs) in sent.iter().zip(&packets) {
                    let covered = theirs.bytes.len() - 4;
                    assert_eq!(ours.bytes[..covered], theirs.bytes[..covered], "{name}");
                    checked += 1;
                }
                // Linux's own answers complete it.
                let crc = icrc::Flow::new(&ANSWERING, &ASKING, 0xc321);
                for a in answers {
                    let mut bytes = a.bytes.clone();
                    let mut repr = a.repr;
                    repr.bth.dest_qpn = side.qp.qpn;
                    repr.set_pad(a.payload().len());
                    repr.emit_headers(&mut bytes);
                    crc.seal(&mut bytes, 1);
                    net.lock()
                        .unwrap()
                        .queues
                        .entry(ASKING)
                        .or_default()
                        .push_back(Sent1 {
                            at: 0,
                            src: ANSWERING,
                            dst: ASKING,
                            src_port: 0xc321,
                            ident: 1,
                            traffic_class: 0,
                            hop_limit: 64,
                            bytes,
                        });
                }
                for _ in 0..3 {
                    e.poll();
                }
                let aeth = answers.iter().find_map(|a| a.repr.ext.aeth());
                let done = side.scq.drain();
                match aeth.map(|a| a.syndrome) {
                    Some(Syndrome::RnrNak { .. }) => {
                        assert!(done.is_empty(), "{name}");
                        // Code 20 is 10.24 ms, 14 is 1.28 ms; Linux gave up after the third of the latter.
                        clock.advance(11_000_000);
                        for _ in 0..3 {
                            e.poll();
                        }
                    }
                    Some(Syndrome::Nak(code)) => {
                        let want = match code as u8 {
                            2 => WcStatus::RemAccessErr,
                            3 => WcStatus::RemOpErr,
                            _ => WcStatus::RemInvReqErr,
                        };
                        assert_eq!(done.len(), 1, "{name}");
                        assert_eq!(status(&done[0]), want, "{name}");
                    }
                    _ => {
                        assert_eq!(done.len(), 1, "{name}");
                        assert_eq!(status(&done[0]), WcStatus::Success, "{name}");
                    }
                }
                let data: Vec<u8> = answers
                    .iter()
                    .filter(|a| a.repr.bth.opcode.info().operation == Operation::ReadResponse)
                    .flat_map(Seen1::payload)
                    .collect();
                assert_eq!(side.data(0, data.len() as u64), data, "{name}");
            }
        }
    }
    assert_eq!(checked, 170, "requests compared");
}
