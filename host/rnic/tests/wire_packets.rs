//! Single packets, made by hand: what is answered, what is dropped, and what each adds to the counters.

mod common;

use std::sync::Arc;

use common::net::*;
use common::*;
use hyv_abi::control::Counters;
use hyv_rnic::Engine;
use hyv_roce::icrc;
use hyv_roce::wire::{Aeth, Bth, Deth, Extension, NakCode, Opcode, Packet, Repr, Reth, Syndrome};

const LEN: u64 = 1 << 20;
const PSN: u32 = 0xff_fff0;
const PEER_QPN: u32 = 0x77;

/// A device whose peer is this test.
struct Rig {
    e: Engine,
    net: SharedNet,
    clock: Clock,
    side: Side,
}

impl Rig {
    fn new(ty: QpType, conn: &Conn) -> Self {
        let clock = Clock(Arc::new(1_000_000.into()));
        let net = net(&clock, 0, Faults::default());
        net.lock().unwrap().delay = 0;
        let port = Port {
            net: Arc::clone(&net),
            gid: v4(1),
            sees_ident: true,
            burst: (64, 60_000),
            mtu: 9000,
        };
        let mut e = wired_engine(port);
        let cap = Cap {
            ty,
            ..Cap::default()
        };
        let side = Side::new(&mut e, LEN, cap);
        let path = Path {
            conn: *conn,
            ..Path::default()
        };
        join(&mut e, &side.qp, (v4(2), PEER_QPN), &path);
        Self {
            e,
            net,
            clock,
            side,
        }
    }

    fn rc() -> Self {
        Self::new(QpType::Rc, &Conn::default())
    }

    fn repr(&self, opcode: Opcode, psn: u32, ext: Extension) -> Repr {
        let mut bth = Bth::new(opcode, self.side.qp.qpn, psn);
        bth.ack_req = true;
        Repr { bth, ext }
    }

    /// A packet from `src`; `spoil` may change its bytes after the ICRC was made.
    fn raw(&mut self, src: u8, repr: &Repr, payload: &[u8], spoil: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = vec![0; repr.buffer_len(payload.len())];
        repr.emit(payload, &mut bytes);
        icrc::Flow::new(&v4(src), &v4(1), 0xc001).seal(&mut bytes, 5);
        spoil(&mut bytes);
        let packet = Sent1 {
            at: 0,
            src: v4(src),
            dst: v4(1),
            src_port: 0xc001,
            ident: 5,
            traffic_class: 0,
            hop_limit: 64,
            bytes,
        };
        let mut net = self.net.lock().unwrap();
        net.queues.entry(v4(1)).or_default().push_back(packet);
    }

    fn put(&mut self, opcode: Opcode, psn: u32, ext: Extension, payload: &[u8]) {
        let repr = self.repr(opcode, psn, ext);
        self.raw(2, &repr, payload, |_| {});
    }

    /// Lets the device work, and gives what it sent.
    fn take(&mut self) -> Vec<(Repr, Vec<u8>)> {
        for _ in 0..4 {
            self.e.poll();
            // Acknowledgements wait a little for company.
            self.clock.advance(2_000);
        }
        let sent = self.net.lock().unwrap().queues.remove(&v4(2));
        sent.unwrap_or_default()
            .iter()
            .map(|p| {
                assert!(
                    icrc::Flow::new(&v4(1), &v4(2), p.src_port).check(&p.bytes, p.ident),
                    "an ICRC of ours"
                );
                let packet = Packet::new_checked(&p.bytes).unwrap();
                (packet.repr().unwrap(), packet.payload().to_vec())
            })
            .collect()
    }

    /// As opcodes, PSNs and syndromes.
    fn answers(&mut self) -> Vec<(u32, Syndrome, u32)> {
        self.take()
            .iter()
            .map(|(r, _)| {
                let a = r.ext.aeth().expect("an AETH");
                (r.bth.psn, a.syndrome, a.msn)
            })
            .collect()
    }

    fn counters(&self) -> Counters {
        self.e.device_counters()
    }
}

fn add(psn: u32, n: u32) -> u32 {
    psn.wrapping_add(n) & 0xff_ffff
}

const NAK: fn(NakCode) -> Syndrome = Syndrome::Nak;

#[test]
fn packets_that_belong_nowhere() {
    let mut r = Rig::rc();
    r.side.qp.post_recv(1, &[r.side.mr.sge(0, 1000)]);
    let good = r.repr(Opcode::RcSendOnly, PSN, Extension::None);
    // Each of these is dropped in silence and counted once.
    let mut n = 0;
    let mut check = |r: &mut Rig, what: &str, count: fn(&Counters) -> u64| {
        n += 1;
        assert!(r.take().is_empty(), "{what}: answered");
        assert_eq!(count(&r.counters()), 1, "{what}");
        assert!(r.side.rcq.poll().is_none(), "{what}: taken");
    };
    r.raw(2, &good, b"x", |b| b[13] ^= 1);
    check(&mut r, "ICRC", |c| c.icrc_errors);
    let mut wrong = good;
    wrong.bth.dest_qpn ^= 0x1_0000;
    r.raw(2, &wrong, b"x", |_| {});
    check(&mut r, "QPN of another generation", |c| c.drops_no_qp);
    r.raw(3, &good, b"x", |_| {});
    check(&mut r, "source", |c| c.drops_source);
    let mut wrong = good;
    wrong.bth.pkey = 0x8001;
    r.raw(2, &wrong, b"x", |_| {});
    check(&mut r, "P_Key", |c| c.drops_pkey);
    let uc = r.repr(Opcode::UcSendOnly, PSN, Extension::None);
    r.raw(2, &uc, b"x", |_| {});
    check(&mut r, "another service", |c| c.drops_state);
    r.raw(2, &good, b"x", |b| b.truncate(13));
    check(&mut r, "truncated", |c| c.drops_malformed);
    // A limited member of the partition is one.
    let mut limited = good;
    limited.bth.pkey = 0x7fff;
    // So is who sets MigReq, or congestion bits that routers may set.
    limited.bth.migreq = true;
    r.raw(2, &limited, b"x", |b| b[4] = 0xc0);
    assert_eq!(r.answers(), [(PSN, Syndrome::ACK, 1)]);
    assert_eq!(r.side.rcq.one().byte_len, 1);
    // In error nothing is answered.
    r.side.qp.go(&mut r.e, QpState::Err).unwrap();
    r.raw(2, &good, b"x", |_| {});
    assert!(r.take().is_empty());
    assert_eq!(r.counters().drops_state, 2);
}

#[test]
fn every_bit_is_covered() {
    let mut r = Rig::rc();
    r.side.qp.post_recv(1, &[r.side.mr.sge(0, 1000)]);
    let good = r.repr(Opcode::RcSendOnly, PSN, Extension::None);
    let len = good.buffer_len(33) * 8;
    let mut dropped = 0;
    for bit in 0..len {
        if (32..40).contains(&bit) {
            continue;
        }
        r.raw(2, &good, &[7; 33], |b| b[bit / 8] ^= 1 << (bit % 8));
        dropped += 1;
    }
    for _ in 0..60 {
        r.e.poll();
    }
    assert!(r.take().is_empty());
    let c = r.counters();
    assert_eq!(c.icrc_errors + c.drops_malformed, dropped);
    assert!(r.side.rcq.poll().is_none());
}

#[test]
fn one_sequence_nak_a_gap() {
    let mut r = Rig::rc();
    for _ in 0..8 {
        r.side.qp.post_recv(1, &[r.side.mr.sge(0, 1000)]);
    }
    let send = |r: &mut Rig, n: u32| r.put(Opcode::RcSendOnly, add(PSN, n), Extension::None, b"m");
    send(&mut r, 0);
    send(&mut r, 2);
    send(&mut r, 3);
    assert_eq!(r.answers(), [(add(PSN, 1), NAK(NakCode::PsnSequence), 1)]);
    send(&mut r, 4);
    assert!(r.answers().is_empty(), "told already");
    // The requester goes back, and the first packet is lost again.
    send(&mut r, 2);
    assert_eq!(r.answers(), [(add(PSN, 1), NAK(NakCode::PsnSequence), 1)]);
    // Another gap after the first is closed.
    send(&mut r, 1);
    send(&mut r, 3);
    assert_eq!(r.answers(), [(add(PSN, 2), NAK(NakCode::PsnSequence), 2)]);
    // Duplicates are acknowledged again, with what was taken last.
    send(&mut r, 0);
    assert_eq!(r.answers(), [(add(PSN, 1), Syndrome::ACK, 2)]);
    assert_eq!(r.side.rcq.drain().len(), 2);
    assert_eq!(r.counters().duplicates, 1);
    assert_eq!(r.counters().sequence_naks_sent, 3);
}

#[test]
fn acknowledgements_are_coalesced() {
    let mut r = Rig::rc();
    for _ in 0..16 {
        r.side.qp.post_recv(1, &[r.side.mr.sge(0, 1000)]);
    }
    for n in 0..10 {
        r.put(Opcode::RcSendOnly, add(PSN, n), Extension::None, b"m");
    }
    assert_eq!(r.answers(), [(add(PSN, 9), Syndrome::ACK, 10)]);
    // A READ between two of them keeps the order.
    let reth = Reth {
        address: r.side.mr.iova,
        rkey: r.side.mr.rkey,
        dma_len: 2_500,
    };
    r.put(Opcode::RcSendOnly, add(PSN, 10), Extension::None, b"m");
    r.put(
        Opcode::RcReadRequest,
        add(PSN, 11),
        Extension::Reth(reth),
        b"",
    );
    r.put(Opcode::RcSendOnly, add(PSN, 14), Extension::None, b"m");
    let sent = r.take();
    let kinds: Vec<_> = sent
        .iter()
        .map(|(r, p)| (r.bth.opcode, r.bth.psn, p.len()))
        .collect();
    assert_eq!(
        kinds,
        [
            (Opcode::RcReadResponseFirst, add(PSN, 11), 1024),
            (Opcode::RcReadResponseMiddle, add(PSN, 12), 1024),
            (Opcode::RcReadResponseLast, add(PSN, 13), 452),
            (Opcode::RcAcknowledge, add(PSN, 14), 0),
        ]
    );
}

#[test]
fn protocol_violations_are_refused() {
    use Extension::None as No;
    let reth = |r: &Rig, len| {
        Extension::Reth(Reth {
            address: r.side.mr.iova,
            rkey: r.side.mr.rkey,
            dma_len: len,
        })
    };
    type Case = (&'static str, fn(&mut Rig, &dyn Fn(&Rig, u32) -> Extension));
    let cases: [Case; 11] = [
        ("middle without first", |r, _| {
            r.put(Opcode::RcSendMiddle, PSN, No, &[0; 1024])
        }),
        ("last without first", |r, _| {
            r.put(Opcode::RcWriteLast, PSN, No, &[0; 8])
        }),
        ("first of half an MTU", |r, _| {
            r.put(Opcode::RcSendFirst, PSN, No, &[0; 512])
        }),
        ("only beyond the MTU", |r, _| {
            r.put(Opcode::RcSendOnly, PSN, No, &[0; 1028])
        }),
        ("a first within a message", |r, _| {
            r.put(Opcode::RcSendFirst, PSN, No, &[0; 1024]);
            r.put(Opcode::RcSendFirst, add(PSN, 1), No, &[0; 1024]);
        }),
        ("a WRITE's packet within a SEND", |r, _| {
            r.put(Opcode::RcSendFirst, PSN, No, &[0; 1024]);
            r.put(Opcode::RcWriteLast, add(PSN, 1), No, &[0; 8]);
        }),
        ("a READ within a SEND", |r, reth| {
            r.put(Opcode::RcSendFirst, PSN, No, &[0; 1024]);
            let e = reth(r, 8);
            r.put(Opcode::RcReadRequest, add(PSN, 1), e, &[]);
        }),
        ("an empty last", |r, _| {
            r.put(Opcode::RcSendFirst, PSN, No, &[0; 1024]);
            r.put(Opcode::RcSendLast, add(PSN, 1), No, &[]);
        }),
        ("a WRITE shorter than it says", |r, reth| {
            let e = reth(r, 9);
            r.put(Opcode::RcWriteOnly, PSN, e, &[0; 8]);
        }),
        ("a WRITE longer than it says", |r, reth| {
            let e = reth(r, 1025);
            r.put(Opcode::RcWriteFirst, PSN, e, &[0; 1024]);
            r.put(Opcode::RcWriteLast, add(PSN, 1), No, &[0; 2]);
        }),
        ("a WRITE that goes on too long", |r, reth| {
            let e = reth(r, 1025);
            r.put(Opcode::RcWriteFirst, PSN, e, &[0; 1024]);
            r.put(Opcode::RcWriteMiddle, add(PSN, 1), No, &[0; 1024]);
        }),
    ];
    for (name, case) in cases {
        let mut r = Rig::rc();
        r.side.qp.post_recv(1, &[r.side.mr.sge(0, 8000)]);
        let before = r.side.data(0, 64);
        case(&mut r, &reth);
        let answers = r.answers();
        let (_, syndrome, _) = *answers.last().unwrap_or_else(|| panic!("{name}: silence"));
        assert_eq!(syndrome, NAK(NakCode::InvalidRequest), "{name}");
        assert_eq!(r.side.qp.state(&r.e), QpState::Err, "{name}");
        assert!(
            event(
                &r.side.user.ram,
                summary::QP_REQUEST_ERROR,
                r.side.qp.index()
            ),
            "{name}"
        );
        assert_eq!(r.counters().invalid_naks_sent, 1, "{name}");
        assert_eq!(r.side.data(8000, 64), before, "{name}");
        let flushed = r.side.rcq.drain();
        assert!(
            flushed.iter().all(|c| status(c) == WcStatus::WrFlushErr),
            "{name}"
        );
    }
}

#[test]
fn more_reads_than_agreed() {
    let conn = Conn {
        rd_atomic: 2,
        ..Conn::default()
    };
    let mut r = Rig::new(QpType::Rc, &conn);
    let reth = Extension::Reth(Reth {
        address: r.side.mr.iova,
        rkey: r.side.mr.rkey,
        dma_len: 8,
    });
    for n in 0..3 {
        r.put(Opcode::RcReadRequest, add(PSN, n), reth, b"");
    }
    let sent = r.take();
    let last = sent.last().unwrap().0;
    assert_eq!(sent.len(), 3, "what was agreed is answered first");
    assert_eq!(
        last.ext.aeth().unwrap().syndrome,
        NAK(NakCode::InvalidRequest)
    );
    assert_eq!(last.bth.psn, add(PSN, 2));
}

#[test]
fn duplicates_of_reads_and_atomics() {
    let mut r = Rig::rc();
    r.side.fill(0, &[5; 4096]);
    let reth = |r: &Rig, at: u64, len: u32| {
        Extension::Reth(Reth {
            address: r.side.mr.iova + at,
            rkey: r.side.mr.rkey,
            dma_len: len,
        })
    };
    let whole = reth(&r, 0, 3000);
    r.put(Opcode::RcReadRequest, PSN, whole, b"");
    assert_eq!(r.take().len(), 3);
    // From its second packet on; the memory of now.
    r.side.fill(0, &[6; 4096]);
    let rest = reth(&r, 1024, 3000 - 1024);
    r.put(Opcode::RcReadRequest, add(PSN, 1), rest, b"");
    let again = r.take();
    assert_eq!(again.len(), 2);
    assert_eq!(again[0].0.bth.opcode, Opcode::RcReadResponseFirst);
    assert_eq!(again[0].1, [6; 1024]);
    // Outside the original: nothing.
    for (psn, ext) in [
        (1, reth(&r, 1024, 3000)),
        (1, reth(&r, 1000, 100)),
        (2, reth(&r, 1024, 8)),
    ] {
        r.put(Opcode::RcReadRequest, add(PSN, psn), ext, b"");
        assert!(r.take().is_empty());
    }
    // An atomic is executed once.
    let atomic = Extension::Atomic(hyv_roce::wire::AtomicEth {
        address: r.side.mr.iova + 4096,
        rkey: r.side.mr.rkey,
        swap_add: 1,
        compare: 0,
    });
    for _ in 0..3 {
        r.put(Opcode::RcFetchAdd, add(PSN, 3), atomic, b"");
        let a = r.take();
        assert_eq!(a.len(), 1);
        assert!(matches!(a[0].0.ext, Extension::AethAtomicAck(_, 0)));
    }
    assert_eq!(r.side.data(4096, 8), 1u64.to_le_bytes());
    assert_eq!(r.counters().duplicates, 6);
}

#[test]
fn ghosts_change_nothing() {
    let mut r = Rig::rc();
    let aeth = |syndrome| Extension::Aeth(Aeth { syndrome, msn: 0 });
    r.side
        .qp
        .post(&Wr::new(WrOpcode::Write, 1).inline(b"x").remote(0x1000, 9));
    assert_eq!(r.take().len(), 1);
    let ghosts = [
        (add(PSN, 1), Syndrome::ACK),
        (add(PSN, 0x80_0000), Syndrome::ACK),
        (PSN - 1, Syndrome::ACK),
        (add(PSN, 1), NAK(NakCode::RemoteAccess)),
        (PSN - 1, NAK(NakCode::RemoteAccess)),
        (PSN - 1, NAK(NakCode::PsnSequence)),
        (add(PSN, 5), Syndrome::RnrNak { timer: 1 }),
    ];
    for (psn, s) in ghosts {
        r.put(Opcode::RcAcknowledge, psn, aeth(s), b"");
        assert!(r.take().is_empty());
    }
    assert_eq!(r.counters().ghosts, ghosts.len() as u64);
    assert!(r.side.scq.poll().is_none());
    // A reserved syndrome is no answer.
    r.put(
        Opcode::RcAcknowledge,
        PSN,
        aeth(Syndrome::Reserved(0x5f)),
        b"",
    );
    assert!(r.take().is_empty());
    assert!(r.side.scq.poll().is_none());
    r.put(Opcode::RcAcknowledge, PSN, aeth(Syndrome::ACK), b"");
    r.take();
    assert_eq!(status(&r.side.scq.one()), WcStatus::Success);
    r.put(Opcode::RcAcknowledge, PSN, aeth(Syndrome::ACK), b"");
    r.take();
    assert!(r.side.scq.poll().is_none(), "once");
}

#[test]
fn answers_that_are_nonsense() {
    let aeth = Extension::Aeth(Aeth {
        syndrome: Syndrome::ACK,
        msn: 1,
    });
    let cases: [(&str, Opcode, Extension, usize); 4] = [
        ("too short", Opcode::RcReadResponseOnly, aeth, 99),
        ("too long", Opcode::RcReadResponseOnly, aeth, 101),
        ("not the last", Opcode::RcReadResponseFirst, aeth, 100),
        (
            "an atomic's",
            Opcode::RcAtomicAcknowledge,
            Extension::AethAtomicAck(
                Aeth {
                    syndrome: Syndrome::ACK,
                    msn: 1,
                },
                5,
            ),
            0,
        ),
    ];
    for (name, opcode, ext, len) in cases {
        let mut r = Rig::rc();
        r.side.qp.post(
            &Wr::new(WrOpcode::Read, 1)
                .sge(r.side.mr.sge(0, 100))
                .remote(0x1000, 9),
        );
        assert_eq!(r.take().len(), 1);
        r.put(opcode, PSN, ext, &vec![9; len]);
        r.take();
        assert_eq!(status(&r.side.scq.one()), WcStatus::BadRespErr, "{name}");
        assert_eq!(r.side.qp.state(&r.e), QpState::Err, "{name}");
        assert_eq!(r.side.data(100, 8), [0; 8], "{name}");
    }
}

#[test]
fn implied_acknowledgement_and_implied_nak() {
    let aeth = Extension::Aeth(Aeth {
        syndrome: Syndrome::ACK,
        msn: 3,
    });
    let post = |r: &mut Rig| {
        let write = |id| Wr::new(WrOpcode::Write, id).inline(b"x").remote(0x1000, 9);
        r.side.qp.post(&write(1));
        r.side.qp.post(
            &Wr::new(WrOpcode::Read, 2)
                .sge(r.side.mr.sge(0, 8))
                .remote(0x1000, 9),
        );
        r.side.qp.post(&write(3));
        assert_eq!(r.take().len(), 3);
    };
    // The READ's answer says that the WRITE before it arrived.
    let mut r = Rig::rc();
    post(&mut r);
    r.put(Opcode::RcReadResponseOnly, add(PSN, 1), aeth, &[7; 8]);
    r.take();
    let ids: Vec<u64> = r.side.scq.drain().iter().map(|c| c.wr_id).collect();
    assert_eq!(ids, [1, 2]);
    // An acknowledgement of what is behind it says that its answer was lost: it is asked for again, once.
    let mut r = Rig::rc();
    post(&mut r);
    for _ in 0..3 {
        r.put(Opcode::RcAcknowledge, add(PSN, 2), aeth, b"");
    }
    let again = r.take();
    let psns: Vec<u32> = again.iter().map(|(r, _)| r.bth.psn).collect();
    assert_eq!(psns, [add(PSN, 1), add(PSN, 2)]);
    assert_eq!(r.side.scq.one().wr_id, 1);
    assert_eq!(r.counters().retransmissions, 2);
}

#[test]
fn datagrams_need_their_key() {
    let mut r = Rig::new(QpType::Ud, &Conn::default());
    r.side.qp.post_recv(1, &[r.side.mr.sge(0, 1000)]);
    let deth = |qkey| {
        Extension::Deth(Deth {
            qkey,
            reserved: 0,
            src_qpn: 0x1234,
        })
    };
    r.put(Opcode::UdSendOnly, 5, deth(QKEY ^ 1), b"no");
    r.take();
    assert_eq!(r.counters().drops_qkey, 1);
    // Any source, any PSN.
    let repr = r.repr(Opcode::UdSendOnly, 99, deth(QKEY));
    r.raw(44, &repr, b"yes", |_| {});
    r.take();
    let c = r.side.rcq.one();
    assert_eq!((c.byte_len, c.data[0]), (43, 0x1234));
}
