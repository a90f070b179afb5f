//! Every way to reach what one may not: the statuses on both sides, and that no byte outside what was
//! permitted ever changes.

use std::ops::Range;

use crate::common::*;
use crate::fabric::{Link, On, patient};
use hyv_abi::queue::Cqe;

const LEN: u64 = 64 << 10;
const OPS: [WrOpcode; 5] = [
    WrOpcode::Write,
    WrOpcode::WriteImm,
    WrOpcode::Read,
    WrOpcode::FetchAdd,
    WrOpcode::CmpSwp,
];

/// A pair whose regions hold a pattern, with a receive posted on either side.
fn pair(on: On, conn: &Conn) -> Link {
    let mut p = Link::with(on, LEN, Cap::default(), conn);
    let mut rng = Rng(42);
    for s in [&mut p.a, &mut p.b] {
        let bytes = rng.bytes((LEN + 8192) as usize);
        s.user.ram.write(s.mr.offset - 4096, &bytes);
        s.qp.post_recv(70, &[s.mr.sge(0, 4096)]);
        s.qp.post_recv(71, &[s.mr.sge(0, 4096)]);
    }
    p
}

fn ring(cq: &Cq) -> Range<u64> {
    cq.ring..cq.ring + (64 << 8)
}

fn assert_same(name: &str, before: &[u8], s: &Side, except: &[Range<u64>]) {
    let mut now = s.user.ram.all();
    for r in except {
        let r = r.start as usize..r.end as usize;
        now[r.clone()].copy_from_slice(&before[r]);
    }
    if let Some(i) = before.iter().zip(&now).position(|(x, y)| x != y) {
        panic!(
            "{name}: byte {i:#x} of RAM changed; the region is {:#x}+{LEN:#x}",
            s.mr.offset
        );
    }
}

/// All of an operation but where it goes. 8 bytes, so that atomics fit in.
fn request(p: &Link, op: WrOpcode) -> Wr {
    Wr::new(op, 1).sge(p.a.mr.sge(128, 8)).atomic(0, 1)
}

fn flushed(cqes: &[Cqe], ids: &[u64]) {
    let got: Vec<(u64, WcStatus)> = cqes.iter().map(|c| (c.wr_id, status(c))).collect();
    let want: Vec<(u64, WcStatus)> = ids.iter().map(|&i| (i, WcStatus::WrFlushErr)).collect();
    assert_eq!(got, want, "flushed, in order");
}

/// Posts `wr` and one behind it; the peer refuses: `mine` at the requester, `kind` of event at the responder.
fn refused(name: &str, p: &mut Link, wr: &Wr, mine: WcStatus, kind: u64) {
    let (ram_a, ram_b) = (p.a.user.ram.all(), p.b.user.ram.all());
    let woken = p.b.user.wakes.0.load(std::sync::atomic::Ordering::SeqCst);
    p.a.qp.post_silently(wr);
    let behind = Wr::new(WrOpcode::Write, 2).inline(&[1]).to(&p.b.mr, 0);
    p.a.qp.post_silently(&behind.unsignaled());
    let _ = p.a.qp.ring();
    p.pump();
    let done = p.a.scq.drain();
    assert_eq!(
        done.iter()
            .map(|c| (c.wr_id, status(c)))
            .collect::<Vec<_>>(),
        [(1, mine), (2, WcStatus::WrFlushErr)],
        "{name}"
    );
    flushed(&p.a.rcq.drain(), &[70, 71]);
    flushed(&p.b.rcq.drain(), &[70, 71]);
    assert!(p.b.scq.poll().is_none(), "{name}");
    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err, "{name}");
    assert_eq!(p.b.qp.state(p.f.rb()), QpState::Err, "{name}");
    assert!(
        event(&p.b.user.ram, kind, p.b.qp.index()),
        "{name}: event at the responder; pending kinds {:#x}",
        pending(&p.b.user.ram)
    );
    assert_eq!(pending(&p.b.user.ram), 0, "{name}: no other event there");
    assert_eq!(
        pending(&p.a.user.ram),
        0,
        "{name}: the requester has its completion"
    );
    let now = p.b.user.wakes.0.load(std::sync::atomic::Ordering::SeqCst);
    assert!(now > woken, "{name}: the event wakes the user");
    let a = &p.a;
    let sq = a.qp.sq..a.qp.sq + 64 * 32;
    let marks = a.scq.ctrl..a.scq.ctrl + 64;
    let mark2 = a.rcq.ctrl..a.rcq.ctrl + 64;
    let mut own = vec![ring(&a.scq), ring(&a.rcq), sq, marks, mark2];
    if wr.op == WrOpcode::Read as u8 {
        // What a READ that fails leaves where its answer was to land is undefined (IBA 1.4, 9.9.2.3).
        let landing = |s: &Sge| s.addr - IOVA..s.addr - IOVA + u64::from(s.len);
        own.extend(wr.sges.iter().map(landing));
    }
    assert_same(name, &ram_a, a, &own);
    let mark = p.b.rcq.ctrl..p.b.rcq.ctrl + 64;
    assert_same(name, &ram_b, &p.b, &[ring(&p.b.rcq), mark]);
    let what = format!("{name}, posted later");
    p.a.qp.post(&Wr::new(WrOpcode::Send, 90));
    p.b.qp.post(&Wr::new(WrOpcode::Send, 91).unsignaled());
    p.a.qp.post_recv(92, &[]);
    p.b.qp.post_recv(93, &[]);
    p.pump();
    for (side, send, recv) in [(&mut p.a, 90, 92), (&mut p.b, 91, 93)] {
        for (c, id) in [(side.scq.one(), send), (side.rcq.one(), recv)] {
            assert_eq!((c.wr_id, status(&c)), (id, WcStatus::WrFlushErr), "{what}");
        }
    }
}

fn remote_ranges(on: On) {
    type Address = fn(&Mr) -> u64;
    let cases: [(&str, Address); 12] = [
        ("starts 8 before", |m| m.iova - 8),
        ("starts a page before", |m| m.iova - 4096),
        ("ends 8 behind", |m| m.iova + m.len),
        ("starts in the last word's middle", |m| m.iova + m.len - 4),
        ("starts 4 before", |m| m.iova - 4),
        ("a page behind", |m| m.iova + m.len + 4096),
        ("address 0", |_| 0),
        ("the RAM offset in place of the address", |m| m.offset),
        ("the last word of the address space", |_| u64::MAX - 7),
        ("wraps", |_| u64::MAX - 3),
        ("wraps into the region", |m| (m.iova).wrapping_sub(1 << 63)),
        ("negative", |m| m.iova.wrapping_neg()),
    ];
    for op in OPS {
        for (name, addr) in cases {
            let mut p = pair(on, &patient());
            let addr = addr(&p.b.mr);
            let wr = request(&p, op).remote(addr, p.b.mr.rkey);
            let atomic = matches!(op, WrOpcode::FetchAdd | WrOpcode::CmpSwp);
            // An unaligned atomic is no valid request, wherever it goes (IBA 1.4, 9.4.5.2).
            let (mine, kind) = if atomic && !addr.is_multiple_of(8) {
                (WcStatus::RemInvReqErr, summary::QP_REQUEST_ERROR)
            } else {
                (WcStatus::RemAccessErr, summary::QP_ACCESS_ERROR)
            };
            refused(&format!("{op:?}: {name}"), &mut p, &wr, mine, kind);
        }
    }
}

fn long_remote_ranges(on: On) {
    for op in [WrOpcode::Write, WrOpcode::WriteImm, WrOpcode::Read] {
        for (at, len) in [
            (0, LEN + 1),
            (1, LEN),
            (LEN - 1, 2),
            (LEN, 1),
            (LEN / 2, LEN),
        ] {
            let mut p = pair(on, &patient());
            // Local pieces that are long enough together.
            let half = (len / 2) as u32;
            let mut wr = Wr::new(op, 1).to(&p.b.mr, at);
            wr.sges = vec![p.a.mr.sge(0, half), p.a.mr.sge(0, len as u32 - half)];
            refused(
                &format!("{op:?} of {len} at {at}"),
                &mut p,
                &wr,
                WcStatus::RemAccessErr,
                summary::QP_ACCESS_ERROR,
            );
        }
    }
}

fn remote_keys(on: On) {
    type Make = fn(&mut Link) -> (u64, u32);
    let cases: [(&str, Make); 9] = [
        ("another index", |p| (p.b.mr.iova, p.b.mr.rkey ^ 0x100)),
        ("another generation", |p| (p.b.mr.iova, p.b.mr.rkey ^ 1)),
        ("0", |p| (p.b.mr.iova, 0)),
        ("all ones", |p| (p.b.mr.iova, u32::MAX)),
        ("high bits", |p| (p.b.mr.iova, p.b.mr.rkey | 0xff00_0000)),
        ("deregistered", |p| {
            p.f.b().dereg_mr(p.b.user.id, p.b.mr.handle).expect("dereg");
            (p.b.mr.iova, p.b.mr.rkey)
        }),
        ("deregistered, its place taken", |p| {
            let (b, m) = (&p.b, p.b.mr);
            p.f.b().dereg_mr(b.user.id, m.handle).expect("dereg");
            let new = b.user.mr_at(p.f.b(), b.pd, m.offset, m.len, FULL);
            assert_ne!(new.rkey, m.rkey);
            (m.iova, m.rkey)
        }),
        ("another PD's", |p| {
            let pd = p.b.user.pd(p.f.b());
            let m = p.b.user.mr_at(p.f.b(), pd, p.b.mr.offset, LEN, FULL);
            (m.iova, m.rkey)
        }),
        ("another user's", |p| {
            let c = User::new(p.f.b(), 2 * LEN);
            let pd = c.pd(p.f.b());
            c.mr_at(p.f.b(), pd, 0, LEN, FULL);
            let m = c.mr_at(p.f.b(), pd, 0, LEN, FULL);
            assert_ne!(m.rkey, p.b.mr.rkey);
            (m.iova, m.rkey)
        }),
    ];
    for op in OPS {
        for (name, make) in cases {
            let mut p = pair(on, &patient());
            let (addr, key) = make(&mut p);
            let wr = request(&p, op).remote(addr, key);
            refused(
                &format!("{op:?}, key: {name}"),
                &mut p,
                &wr,
                WcStatus::RemAccessErr,
                summary::QP_ACCESS_ERROR,
            );
        }
    }
}

fn needs(op: WrOpcode) -> Access {
    match op {
        WrOpcode::Read => Access::REMOTE_READ,
        WrOpcode::FetchAdd | WrOpcode::CmpSwp => Access::REMOTE_ATOMIC,
        _ => Access::REMOTE_WRITE,
    }
}

fn regions_without_the_right(on: On) {
    for op in OPS {
        for access in [FULL - needs(op), Access::LOCAL_WRITE, Access::empty()] {
            let mut p = pair(on, &patient());
            let b = &p.b;
            let m = b.user.mr_at(p.f.b(), b.pd, b.mr.offset, LEN, access);
            let wr = request(&p, op).to(&m, 0);
            refused(
                &format!("{op:?} to a region with {access:?}"),
                &mut p,
                &wr,
                WcStatus::RemAccessErr,
                summary::QP_ACCESS_ERROR,
            );
        }
    }
}

/// A function that the QP was not set up for is an unsupported opcode to it: invalid request (IBA 1.4,
/// table 60), unlike a region that lacks the right.
fn queue_pairs_without_the_right(on: On) {
    for op in OPS {
        for access in [FULL - needs(op), Access::LOCAL_WRITE, Access::empty()] {
            let mut p = pair(
                on,
                &Conn {
                    access,
                    ..patient()
                },
            );
            let wr = request(&p, op).to(&p.b.mr, 0);
            refused(
                &format!("{op:?} to a QP with {access:?}"),
                &mut p,
                &wr,
                WcStatus::RemInvReqErr,
                summary::QP_REQUEST_ERROR,
            );
        }
    }
}

fn responders_without_resources_for_reads_and_atomics(on: On) {
    for op in [WrOpcode::Read, WrOpcode::FetchAdd, WrOpcode::CmpSwp] {
        let mut p = pair(on, &patient());
        let (c, none) = (
            patient(),
            Conn {
                rd_atomic: 0,
                ..patient()
            },
        );
        p.a.qp.reset(p.f.a());
        p.b.qp.reset(p.f.b());
        p.f.rtr_a(&p.a.qp, p.b.qp.qpn, &c);
        p.f.rtr_b(&p.b.qp, p.a.qp.qpn, &none);
        p.a.qp.rts(p.f.a(), &c);
        p.b.qp.rts(p.f.b(), &none);
        for s in [&mut p.a, &mut p.b] {
            s.qp.post_recv(70, &[]);
            s.qp.post_recv(71, &[]);
        }
        let wr = request(&p, op).to(&p.b.mr, 0);
        refused(
            &format!("{op:?}"),
            &mut p,
            &wr,
            WcStatus::RemInvReqErr,
            summary::QP_REQUEST_ERROR,
        );
    }
}

/// Only what would move is checked: a request of no bytes names no memory (IBA 1.4, C9-88).
fn a_request_of_no_bytes_needs_no_key(on: On) {
    for op in [WrOpcode::Write, WrOpcode::Read] {
        let mut p = pair(on, &patient());
        let (a, b) = (p.a.user.ram.all(), p.b.user.ram.all());
        p.a.qp.post(&Wr::new(op, 1).remote(3, 0xdead_beef));
        let none = Sge {
            addr: 77,
            len: 0,
            lkey: 0xdead,
        };
        p.a.qp.post(&Wr::new(op, 2).sge(none).remote(u64::MAX, 0));
        p.pump();
        let done = p.a.scq.drain();
        assert_eq!(
            done.iter()
                .map(|c| (c.wr_id, c.status, c.byte_len))
                .collect::<Vec<_>>(),
            [(1, 0, 0), (2, 0, 0)]
        );
        let own = p.a.scq.ring..p.a.scq.ctrl + 64;
        let sq = p.a.qp.sq..p.a.qp.sq + 64 * 32;
        assert_same("requester", &a, &p.a, &[own, sq]);
        assert_same("responder", &b, &p.b, &[]);
    }
}

/// Pieces of local memory that a work request may not use.
fn bad_sges(p: &mut Link, len: u32, write: bool) -> Vec<(&'static str, Sge)> {
    let m = p.a.mr;
    let at = |addr: u64| Sge {
        addr,
        len,
        lkey: m.lkey,
    };
    let key = |lkey: u32| Sge {
        addr: m.iova,
        len,
        lkey,
    };
    let pd = p.a.user.pd(p.f.a());
    let other = p.a.user.mr_at(p.f.a(), pd, m.offset, LEN, FULL);
    let stale = p.a.user.mr_at(p.f.a(), p.a.pd, m.offset, LEN, FULL);
    p.f.a().dereg_mr(p.a.user.id, stale.handle).expect("dereg");
    let mut v = vec![
        ("1 before", at(m.iova - 1)),
        ("1 behind", at(m.iova + m.len - u64::from(len) + 1)),
        ("outside", at(m.iova + m.len)),
        ("RAM offset", at(m.offset)),
        ("0", at(0)),
        ("wraps", at(u64::MAX - 2)),
        ("another index", key(m.lkey ^ 0x100)),
        ("another generation", key(m.lkey ^ 1)),
        ("key 0", key(0)),
        ("all ones", key(u32::MAX)),
        ("another PD's", key(other.lkey)),
        ("stale", key(stale.lkey)),
    ];
    if write {
        let ro =
            p.a.user
                .mr_at(p.f.a(), p.a.pd, m.offset, LEN, Access::REMOTE_READ);
        v.push(("read only", key(ro.lkey)));
    }
    v
}

fn local_pieces(on: On) {
    let ops = [
        (WrOpcode::Send, false),
        (WrOpcode::SendImm, false),
        (WrOpcode::Write, false),
        (WrOpcode::WriteImm, false),
        (WrOpcode::Read, true),
        (WrOpcode::FetchAdd, true),
        (WrOpcode::CmpSwp, true),
    ];
    for (op, write) in ops {
        let atomic = matches!(op, WrOpcode::FetchAdd | WrOpcode::CmpSwp);
        let lens: &[u32] = if atomic { &[8] } else { &[8, 33, 5000] };
        for &len in lens {
            // Alone, as the second, and as the last of 16.
            let places: &[usize] = if atomic { &[0] } else { &[0, 1, 15] };
            for &before in places {
                let count = bad_sges(&mut pair(on, &patient()), len, write).len();
                for k in 0..count {
                    let mut p = pair(on, &patient());
                    let (name, bad) = bad_sges(&mut p, len, write)[k];
                    let name = format!("{op:?} of {len}, piece {before}: {name}");
                    let mut wr = Wr::new(op, 1).to(&p.b.mr, 0);
                    wr.sges = vec![p.a.mr.sge(256, 1); before];
                    wr.sges.push(bad);
                    let (a, b) = (p.a.user.ram.all(), p.b.user.ram.all());
                    p.a.qp.post(&wr);
                    p.pump();
                    let c = p.a.scq.one();
                    assert_eq!((c.wr_id, status(&c)), (1, WcStatus::LocProtErr), "{name}");
                    flushed(&p.a.rcq.drain(), &[70, 71]);
                    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err, "{name}");
                    assert_eq!(
                        p.b.qp.state(p.f.rb()),
                        QpState::Rts,
                        "{name}: the peer saw nothing"
                    );
                    assert_eq!(pending(&p.b.user.ram), 0, "{name}");
                    assert!(p.b.rcq.poll().is_none(), "{name}");
                    let own = p.a.scq.ring..p.a.qp.sq + 64 * 32;
                    assert_same(&name, &a, &p.a, &[own]);
                    assert_same(&name, &b, &p.b, &[]);
                }
            }
        }
    }
}

/// The receiver's own buffers are at fault: a local protection error there, a remote operational error here.
fn receive_buffers(on: On) {
    for op in [WrOpcode::Send, WrOpcode::SendImm] {
        for len in [1u32, 8, 32, 33, 5000] {
            let mut names = Link::new(on, LEN);
            std::mem::swap(&mut names.a, &mut names.b);
            let count = bad_sges(&mut names, len, true).len();
            for (k, second) in (0..count).flat_map(|k| [(k, false), (k, true)]) {
                let mut p = Link::new(on, LEN);
                // The one who attacks its own receive is `a` here: `b` sends.
                let (name, bad) = bad_sges(&mut p, len, true)[k];
                let name = format!("{op:?} of {len} into {name}, second {second}");
                if bad.addr == u64::MAX - 2 && len <= 3 {
                    continue;
                }
                p.b.fill(0, &Rng(3).bytes(5000));
                let mut sges = vec![bad];
                if second {
                    if len < 2 {
                        continue;
                    }
                    sges.insert(0, p.a.mr.sge(0, 1));
                }
                let (a, b) = (p.a.user.ram.all(), p.b.user.ram.all());
                p.a.qp.post_recv(70, &sges);
                p.a.qp.post_recv(71, &[]);
                p.b.qp.post(&Wr::new(op, 1).sge(p.b.mr.sge(0, len)));
                p.pump();
                let c = p.b.scq.one();
                assert_eq!((c.wr_id, status(&c)), (1, WcStatus::RemOpErr), "{name}");
                let got = p.a.rcq.drain();
                assert_eq!(
                    got.iter().map(|c| (c.wr_id, status(c))).collect::<Vec<_>>(),
                    [(70, WcStatus::LocProtErr), (71, WcStatus::WrFlushErr)],
                    "{name}"
                );
                assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err, "{name}");
                assert_eq!(p.b.qp.state(p.f.rb()), QpState::Err, "{name}");
                let own = p.a.scq.ring..p.a.user.ram.len;
                let sent = p.b.scq.ring..p.b.user.ram.len;
                // Only the good first piece may have got its byte.
                let first = p.a.mr.offset..p.a.mr.offset + u64::from(second);
                assert_same(&name, &a, &p.a, &[own, first]);
                assert_same(&name, &b, &p.b, std::slice::from_ref(&sent));
            }
        }
    }
}

fn receives_that_are_too_small(on: On) {
    for (len, room) in [
        (1u32, 0u32),
        (9, 8),
        (32, 31),
        (33, 32),
        (5000, 4999),
        (60_000, 100),
    ] {
        let mut p = pair(on, &patient());
        p.a.qp.reset(p.f.a());
        p.b.qp.reset(p.f.b());
        p.f.connect(&p.a.qp, &p.b.qp, &patient());
        let before = p.b.user.ram.all();
        p.b.qp.post_recv(70, &[p.b.mr.sge(0, room)]);
        p.b.qp.post_recv(71, &[p.b.mr.sge(0, 4096)]);
        p.a.qp
            .post(&Wr::new(WrOpcode::Send, 1).sge(p.a.mr.sge(0, len)));
        p.pump();
        assert_eq!(
            status(&p.a.scq.one()),
            WcStatus::RemInvReqErr,
            "{len} into {room}"
        );
        let got: Vec<_> =
            p.b.rcq
                .drain()
                .iter()
                .map(|c| (c.wr_id, status(c)))
                .collect();
        assert_eq!(got, [(70, WcStatus::LocLenErr), (71, WcStatus::WrFlushErr)]);
        assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err);
        assert_eq!(p.b.qp.state(p.f.rb()), QpState::Err);
        // A real device may have filled the receive before it noticed; nothing beyond it.
        let buffer = p.b.mr.offset..p.b.mr.offset + u64::from(room);
        let own = p.b.scq.ring..p.b.user.ram.len;
        assert_same("too small", &before, &p.b, &[buffer, own]);
    }
}

fn requests_that_make_no_sense(on: On) {
    type Spoil = fn(&mut Vec<[u64; 7]>);
    fn byte(slots: &mut [[u64; 7]], n: u32, v: u64) {
        slots[0][0] = slots[0][0] & !(0xff << (8 * n)) | v << (8 * n);
    }
    let cases: [(&str, Spoil); 13] = [
        ("opcode 10", |s| byte(s, 0, 10)),
        ("opcode 200", |s| byte(s, 0, 200)),
        ("local invalidate", |s| byte(s, 0, 7)),
        ("no slots", |s| byte(s, 3, 0)),
        ("9 slots", |s| byte(s, 3, 9)),
        ("255 slots", |s| byte(s, 3, 255)),
        ("17 SGEs", |s| {
            byte(s, 2, 17);
            byte(s, 3, 8);
        }),
        ("255 SGEs", |s| byte(s, 2, 255)),
        ("2 SGEs in one slot", |s| byte(s, 2, 2)),
        ("inline and SGEs", |s| byte(s, 1, 0xa)),
        ("inline, longer than its slots", |s| {
            byte(s, 1, 0xa);
            byte(s, 2, 0);
            s[0][3] = s[0][3] & 0xffff_ffff | 25 << 32;
        }),
        ("417 inline", |s| {
            byte(s, 1, 0xa);
            byte(s, 2, 0);
            byte(s, 3, 8);
            s[0][3] = s[0][3] & 0xffff_ffff | 417 << 32;
        }),
        ("4 GiB inline", |s| {
            byte(s, 1, 0xa);
            byte(s, 2, 0);
            s[0][3] |= 0xffff_ffff << 32;
        }),
    ];
    for (name, spoil) in cases {
        let mut p = pair(on, &patient());
        let before = p.b.user.ram.all();
        let mut slots = Wr::new(WrOpcode::Write, 1)
            .sge(p.a.mr.sge(0, 8))
            .to(&p.b.mr, 0)
            .slots();
        spoil(&mut slots);
        p.a.qp.post_slots(&slots);
        let _ = p.a.qp.ring();
        p.pump();
        let c = p.a.scq.one();
        assert_eq!((c.wr_id, status(&c)), (1, WcStatus::LocQpOpErr), "{name}");
        assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err, "{name}");
        assert_eq!(p.b.qp.state(p.f.rb()), QpState::Rts, "{name}");
        assert_same(name, &before, &p.b, &[]);
    }
}

fn more_slots_than_the_ring_has(on: On) {
    let cap = Cap {
        sq_log2: 1,
        ..Cap::default()
    };
    let mut p = Link::with(on, LEN, cap, &patient());
    let mut slots = Wr::new(WrOpcode::Write, 1)
        .inline(&[1; 8])
        .to(&p.b.mr, 0)
        .slots();
    slots[0][0] = slots[0][0] & !(0xff << 24) | 3 << 24;
    p.a.qp.post_slots(&slots);
    let _ = p.a.qp.ring();
    p.pump();
    assert_eq!(status(&p.a.scq.drain()[0]), WcStatus::LocQpOpErr);
    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err);
}

fn atomics_and_reads_of_the_wrong_shape(on: On) {
    let local = [WcStatus::LocQpOpErr, WcStatus::LocLenErr];
    for op in [WrOpcode::FetchAdd, WrOpcode::CmpSwp] {
        for lens in [&[4u32][..], &[16], &[0], &[], &[4, 4], &[8, 8]] {
            let mut p = pair(on, &patient());
            let before = p.b.user.ram.all();
            let mut wr = Wr::new(op, 1).to(&p.b.mr, 0).atomic(0, 1);
            wr.sges = lens.iter().map(|&l| p.a.mr.sge(0, l)).collect();
            p.a.qp.post(&wr);
            p.pump();
            let got = status(&p.a.scq.one());
            assert!(local.contains(&got), "{op:?} into {lens:?}: {got:?}");
            assert_same("atomic", &before, &p.b, &[]);
        }
    }
    for op in [WrOpcode::Read, WrOpcode::FetchAdd, WrOpcode::CmpSwp] {
        let mut p = pair(on, &patient());
        let before = p.b.user.ram.all();
        p.a.qp.post(&Wr::new(op, 1).inline(&[0; 8]).to(&p.b.mr, 0));
        p.pump();
        assert_eq!(
            status(&p.a.scq.one()),
            WcStatus::LocQpOpErr,
            "{op:?} inline"
        );
        assert_same("inline", &before, &p.b, &[]);
    }
}

/// What a key opened is closed at once, even for a request that is half done.
fn deregistered_in_the_middle(on: On) {
    const BIG: u64 = 4 << 20;
    for op in [WrOpcode::Write, WrOpcode::Read, WrOpcode::Send] {
        for remote in [false, true] {
            let name = format!("{op:?}, remote {remote}");
            let mut p = Link::new(on, BIG);
            let data = Rng(1).bytes(BIG as usize);
            let (from, into) = if op == WrOpcode::Read {
                (&p.b, &p.a)
            } else {
                (&p.a, &p.b)
            };
            from.fill(0, &data);
            let into = (into.user.ram.clone(), into.mr);
            p.b.qp.post_recv(70, &[p.b.mr.sge(0, BIG as u32)]);
            p.a.qp
                .post(&Wr::new(op, 1).sge(p.a.mr.sge(0, BIG as u32)).to(&p.b.mr, 0));
            p.f.turn_until(|| into.0.read(into.1.offset, 1000) == data[..1000]);
            assert!(p.a.scq.poll().is_none(), "{name}: still under way");
            let half = into.0.read(into.1.offset, BIG);
            assert!(half != data, "{name}: not done");
            let (e, side) = if remote {
                (p.f.b(), &p.b)
            } else {
                (p.f.a(), &p.a)
            };
            e.dereg_mr(side.user.id, side.mr.handle).expect("dereg");
            p.pump();
            let now = into.0.read(into.1.offset, BIG);
            if remote == (op != WrOpcode::Read) {
                assert!(now == half, "{name}: closed at once");
            } else {
                // What had been read may have been under way.
                assert!(now != data, "{name}: not read any more");
            }
            let mine = status(&p.a.scq.one());
            let theirs: Vec<_> = p.b.rcq.drain().iter().map(status).collect();
            match (remote, op) {
                (false, _) => assert_eq!(mine, WcStatus::LocProtErr, "{name}"),
                (true, WrOpcode::Send) => {
                    assert_eq!(mine, WcStatus::RemOpErr, "{name}");
                    assert_eq!(theirs, [WcStatus::LocProtErr], "{name}");
                }
                (true, _) => {
                    assert_eq!(mine, WcStatus::RemAccessErr, "{name}");
                    assert_eq!(theirs, [WcStatus::WrFlushErr], "{name}");
                }
            }
            assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err, "{name}");
        }
    }
}

fn the_error_state_by_request_flushes_everything_in_order(on: On) {
    let mut p = pair(on, &patient());
    p.a.qp.go(p.f.a(), QpState::Sqd).expect("SQD");
    for i in 0..10 {
        let wr = Wr::new(WrOpcode::Send, i).sge(p.a.mr.sge(0, 8));
        p.a.qp.post(&if i % 2 == 0 { wr } else { wr.unsignaled() });
    }
    // A request of several slots flushes as one.
    p.a.qp.post(&Wr::new(WrOpcode::Write, 10).inline(&[3; 400]));
    p.pump();
    assert!(p.a.scq.poll().is_none());
    p.a.qp.go(p.f.a(), QpState::Err).expect("ERR");
    flushed(&p.a.scq.drain(), &(0..=10).collect::<Vec<_>>());
    flushed(&p.a.rcq.drain(), &[70, 71]);
    assert_eq!(p.a.qp.state(p.f.ra()), QpState::Err);
    assert_eq!(
        p.b.qp.state(p.f.rb()),
        QpState::Rts,
        "nobody told the peer yet"
    );
    assert_eq!(pending(&p.a.user.ram), 0, "it was asked for: no event");
    // Once reset and connected again, it works as a new one.
    p.a.qp.reset(p.f.a());
    p.b.qp.reset(p.f.b());
    p.f.connect(&p.a.qp, &p.b.qp, &patient());
    p.b.qp.post_recv(5, &[p.b.mr.sge(0, 64)]);
    p.a.qp.post(&Wr::new(WrOpcode::Send, 6).inline(b"again"));
    p.pump();
    assert_eq!((p.a.scq.one().status, p.b.rcq.one().wr_id), (0, 5));
}

on_every_carrier! {
    remote_ranges
    long_remote_ranges
    remote_keys
    regions_without_the_right
    queue_pairs_without_the_right
    responders_without_resources_for_reads_and_atomics
    a_request_of_no_bytes_needs_no_key
    local_pieces
    receive_buffers
    receives_that_are_too_small
    requests_that_make_no_sense
    more_slots_than_the_ring_has
    atomics_and_reads_of_the_wrong_shape
    deregistered_in_the_middle
    the_error_state_by_request_flushes_everything_in_order
}
