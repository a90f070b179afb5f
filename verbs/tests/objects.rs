//! Datagrams, unreliable connections, memory windows, regions and queues that change, channels and events: against a host
//! that plays the device.
#![cfg(not(loom))]

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::FakeHost;
use hyv_abi::control::{CounterScope, Opcode};
use hyv_abi::window::{device_event, summary};
use hyv_verbs::{
    Access, AhAttr, AsyncEvent, CompletionQueue, Context, Errno, Error, Event, Gid, Grh,
    MemoryRegion, Payload, Platform, PostError, ProtectionDomain, QpInitAttr, QpState, QpType,
    QueuePair, RecvWr, RemoteAddr, Rereg, RtrParams, RtsParams, SendFlags, SendOp, SendWr,
    WcOpcode, WcStatus, WorkCompletion, inc_rkey,
};

struct Rig {
    host: Arc<FakeHost>,
    context: Context,
    pd: ProtectionDomain,
    mr: MemoryRegion,
    cq: CompletionQueue,
}

fn everything() -> Access {
    Access::LOCAL_WRITE
        | Access::REMOTE_WRITE
        | Access::REMOTE_READ
        | Access::REMOTE_ATOMIC
        | Access::MW_BIND
}

fn rig() -> Rig {
    let (host, context) = FakeHost::open();
    let pd = context.alloc_pd().unwrap();
    Rig {
        mr: pd.alloc_mr(1 << 16, everything()).unwrap(),
        cq: context.create_cq(256).unwrap(),
        host,
        context,
        pd,
    }
}

impl Rig {
    fn qp(&self, ty: QpType) -> QueuePair {
        self.pd
            .create_qp_ex(&QpInitAttr::new(ty, &self.cq, &self.cq))
            .unwrap()
    }

    fn pair(&self, ty: QpType) -> (QueuePair, QueuePair) {
        let (mut a, mut b) = (self.qp(ty), self.qp(ty));
        let (qa, qb) = (a.qpn(), b.qpn());
        for (qp, peer) in [(&mut a, qb), (&mut b, qa)] {
            qp.to_init(everything() & !(Access::LOCAL_WRITE | Access::MW_BIND))
                .unwrap();
            qp.to_rtr(&RtrParams::to(Gid::LOCAL, peer, 0).with_mtu(1024))
                .unwrap();
            qp.to_rts(&RtsParams::from_psn(0)).unwrap();
        }
        (a, b)
    }

    fn done(&mut self) -> WorkCompletion {
        self.host.step();
        self.cq.poll_one().expect("a completion")
    }

    fn recv(&self, qp: &mut QueuePair, wr_id: u64, at: u64) {
        qp.post_recv(&RecvWr {
            wr_id,
            sges: &[self.mr.sge(at, 128)],
        })
        .unwrap();
    }

    fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut to = vec![0; len];
        self.mr.read(at, &mut to).unwrap();
        to
    }
}

#[test]
fn datagrams_come_with_their_header_and_source() {
    let mut r = rig();
    let (mut a, mut b) = (r.qp(QpType::Ud), r.qp(QpType::Ud));
    a.ready_datagram(0x11, 5).unwrap();
    b.ready_datagram(0x8000_0022, 6).unwrap();
    assert_eq!((a.state(), a.qp_type()), (QpState::Rts, QpType::Ud));
    let attr = AhAttr {
        traffic_class: 0x28,
        hop_limit: 7,
        ..AhAttr::to(Gid::from(Ipv4Addr::new(10, 0, 0, 1)))
    };
    let ah = r.pd.create_ah(&attr).unwrap();
    r.recv(&mut b, 1, 0);
    let op = SendOp::SendImmTo(ah.to(b.qpn(), 0x8000_0022), 0xfeed);
    // The sender's own Q_Key goes with the highest bit set, which is not the receiver's.
    a.post_send(&SendWr::new(2, op, Payload::Inline(b"hi")))
        .unwrap();
    let sent = r.done();
    assert_eq!((sent.wr_id, sent.opcode), (2, WcOpcode::Send));
    assert!(r.cq.poll_one().is_none());
    b.to_reset().unwrap();
    b.ready_datagram(0x11, 6).unwrap();
    r.recv(&mut b, 1, 0);
    a.post_send(&SendWr::new(3, op, Payload::Inline(b"hi")))
        .unwrap();
    let (x, y) = (r.done(), r.done());
    let (sent, got) = if x.is_recv() { (y, x) } else { (x, y) };
    assert_eq!((sent.wr_id, got.wr_id), (3, 1));
    assert_eq!((got.byte_len, got.imm, got.grh), (42, Some(0xfeed), true));
    assert_eq!((got.src_qp, got.qpn), (a.qpn(), b.qpn()));
    assert_eq!(got.inline_data(), None);
    assert_eq!(r.bytes(40, 2), b"hi");
    let grh = Grh::parse(&r.bytes(0, 40).try_into().unwrap()).unwrap();
    assert_eq!(grh.src.ip(), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9)));
    assert_eq!(grh.dest.ip(), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)));
    assert_eq!((grh.traffic_class, grh.hop_limit), (0x28, 7));
    assert_eq!(AhAttr::reply_to(&grh).dest_gid, grh.src);
    // No receive: gone, and the sender does not learn of it.
    a.post_send(&SendWr::new(4, op, Payload::Inline(b"hi")))
        .unwrap();
    assert!(r.done().is_ok());
    assert!(r.cq.poll_one().is_none());
    // The handle is looked at when the send executes.
    ah.destroy().unwrap();
    a.post_send(&SendWr::new(5, op, Payload::Inline(b"hi")))
        .unwrap();
    a.post_send(&SendWr::new(6, op, Payload::Inline(b"hi")))
        .unwrap();
    assert_eq!(r.done().status, WcStatus::LocQpOpErr);
    assert_eq!(a.state(), QpState::Sqe);
    assert_eq!(r.done().status, WcStatus::WrFlushErr);
    assert_eq!((a.state(), a.send_room()), (QpState::Sqe, 64));
    a.resume_sends().unwrap();
    assert_eq!(a.state(), QpState::Rts);
    let ah = r.pd.create_ah(&attr).unwrap();
    let op = SendOp::SendTo(ah.to(b.qpn(), 0x11));
    a.post_send(&SendWr::new(7, op, Payload::Inline(b"hi")))
        .unwrap();
    assert!(r.done().is_ok());
    let wrong = AhAttr {
        sgid_index: 3,
        ..attr
    };
    let error = r.pd.create_ah(&wrong).unwrap_err();
    assert_eq!(error.errno(), Errno::Inval as u32);
}

#[test]
fn headers_of_both_families_are_read() {
    let mut area = [0xee; 40];
    area[0] = 0x4e;
    area[20..].copy_from_slice(&[
        0x45, 0x02, 0, 60, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 168, 7, 1, 192, 168, 7, 2,
    ]);
    let v4 = Grh::parse(&area).unwrap();
    assert_eq!(v4.src, Gid::from(Ipv4Addr::new(192, 168, 7, 1)));
    assert_eq!((v4.traffic_class, v4.hop_limit, v4.flow_label), (2, 64, 0));
    // Remains of something else make the first byte look like version 6: the checksum decides.
    area[0] = 0x6e;
    assert_eq!(Grh::parse(&area).unwrap().flow_label, 0xe_eeee);
    let sum: u32 = area[20..]
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    area[30..32].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(Grh::parse(&area), Some(v4));
    let mut v6 = [0; 40];
    v6[..8].copy_from_slice(&[0x6a, 0xb1, 0x23, 0x45, 0, 20, 0x1b, 9]);
    let (src, dest) = (
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
    );
    v6[8..24].copy_from_slice(&src.octets());
    v6[24..].copy_from_slice(&dest.octets());
    let grh = Grh::parse(&v6).unwrap();
    assert_eq!(
        (grh.src.ip(), grh.dest.ip()),
        (IpAddr::V6(src), IpAddr::V6(dest))
    );
    assert_eq!(
        (grh.traffic_class, grh.flow_label, grh.hop_limit),
        (0xab, 0x1_2345, 9)
    );
    assert_eq!(Grh::parse(&[0; 40]), None);
    assert_eq!(Gid::from(Ipv4Addr::UNSPECIFIED), Gid::LOCAL);
    assert_eq!(Gid::from(Ipv6Addr::UNSPECIFIED), Gid::LOCAL);
}

#[test]
fn types_have_the_operations_that_they_have() {
    let r = rig();
    let (mut rc, _peer) = r.pair(QpType::Rc);
    let (mut uc, _other) = r.pair(QpType::Uc);
    let mut ud = r.qp(QpType::Ud);
    ud.ready_datagram(1, 1).unwrap();
    let ah = r.pd.create_ah(&AhAttr::to(Gid::LOCAL)).unwrap();
    let remote = RemoteAddr { addr: 0, rkey: 0 };
    let sge = [r.mr.sge(0, 8)];
    let ops = [
        (SendOp::Send, true, true, false),
        (SendOp::SendImm(1), true, true, false),
        (SendOp::SendInv(1), true, false, false),
        (SendOp::Write(remote), true, true, false),
        (SendOp::WriteImm(remote, 1), true, true, false),
        (SendOp::Read(remote), true, false, false),
        (SendOp::FetchAdd { remote, add: 1 }, true, false, false),
        (SendOp::SendTo(ah.to(1, 1)), false, false, true),
        (SendOp::SendImmTo(ah.to(1, 1), 2), false, false, true),
    ];
    for (op, on_rc, on_uc, on_ud) in ops {
        let wr = SendWr::new(0, op, Payload::Sges(&sge));
        for (qp, has) in [(&mut rc, on_rc), (&mut uc, on_uc), (&mut ud, on_ud)] {
            let expect = if has {
                Ok(())
            } else {
                Err(PostError::BadOperation)
            };
            assert_eq!(qp.post_send(&wr), expect, "{op:?} on {qp:?}");
        }
    }
    let inv = SendWr::local_inv(1, 7);
    assert_eq!(ud.post_send(&inv), Err(PostError::BadOperation));
    rc.post_send(&inv).unwrap();
    let with_data = SendWr {
        payload: Payload::Inline(b"x"),
        ..inv
    };
    assert_eq!(rc.post_send(&with_data), Err(PostError::BadPayload));
}

#[test]
fn unreliable_connections_drop_and_go_on() {
    let mut r = rig();
    let (mut a, mut b) = r.pair(QpType::Uc);
    let send = SendWr::new(1, SendOp::Send, Payload::Inline(b"lost"));
    a.post_send(&send).unwrap();
    let wc = r.done();
    assert!(wc.is_ok() && !wc.is_recv(), "nobody says that it was lost");
    r.recv(&mut b, 2, 0);
    a.post_send(&send).unwrap();
    assert_eq!(
        [r.done(), r.done()].iter().filter(|w| w.is_recv()).count(),
        1
    );
    // A local error stops sends only.
    let mut bad = r.mr.sge(0, 8);
    bad.lkey ^= 0x5500;
    a.post_send(&SendWr::new(3, SendOp::Send, Payload::Sges(&[bad])))
        .unwrap();
    assert_eq!(r.done().status, WcStatus::LocProtErr);
    assert_eq!(a.state(), QpState::Sqe);
    r.recv(&mut a, 4, 0);
    a.resume_sends().unwrap();
    r.recv(&mut b, 5, 0);
    a.post_send(&send).unwrap();
    assert!(r.done().is_ok() && r.done().is_ok());
    // Flushed sends of a queue pair that was brought to error are not that.
    a.to_err().unwrap();
    a.post_send(&send).unwrap();
    assert_eq!(r.done().status, WcStatus::WrFlushErr);
    assert_eq!(a.state(), QpState::Err);
}

#[test]
fn windows_are_bound_and_taken_back() {
    let mut r = rig();
    let (mut a, mut b) = r.pair(QpType::Rc);
    let mut window = r.pd.alloc_mw().unwrap();
    let first = window.rkey();
    let write = |window_key: u32, at: u64| {
        let remote = RemoteAddr {
            addr: r.mr.addr() + at,
            rkey: window_key,
        };
        SendWr::new(9, SendOp::Write(remote), Payload::Inline(b"w"))
    };
    let (good, outside) = (write, |k| write(k, 5000));
    let access = Access::REMOTE_WRITE;
    let key = b
        .bind_mw(
            &mut window,
            1,
            (&r.mr, 4096, 64),
            access,
            SendFlags::SIGNALED,
        )
        .unwrap();
    assert_eq!((key, window.rkey()), (inc_rkey(first), inc_rkey(first)));
    r.host.step();
    assert_eq!(r.cq.poll_one().unwrap().opcode, WcOpcode::BindMw);
    {
        let d = r.host.device();
        let bound = d.mws.values().next().unwrap().bound.unwrap();
        assert_eq!(
            (bound.addr, bound.len, bound.access),
            (r.mr.addr() + 4096, 64, access.bits())
        );
    }
    a.post_send(&good(key, 4100)).unwrap();
    r.host.step();
    assert!(r.cq.poll_one().unwrap().is_ok());
    // A peer's SEND with invalidate.
    let buffer = r.mr.sge(0, 8);
    b.post_recv(&RecvWr {
        wr_id: 2,
        sges: &[buffer],
    })
    .unwrap();
    a.post_send(&SendWr::new(3, SendOp::SendInv(key), Payload::Inline(b"x")))
        .unwrap();
    r.host.step();
    let both = [r.cq.poll_one().unwrap(), r.cq.poll_one().unwrap()];
    let got = both.iter().find(|w| w.is_recv()).unwrap();
    assert_eq!((got.invalidated_rkey, got.imm), (Some(key), None));
    // Bound again, and invalidated by its owner.
    let key = b
        .bind_mw(
            &mut window,
            1,
            (&r.mr, 4096, 64),
            access,
            SendFlags::SIGNALED,
        )
        .unwrap();
    b.post_send(&SendWr::local_inv(4, key)).unwrap();
    r.host.step();
    assert_eq!(r.cq.poll_one().unwrap().opcode, WcOpcode::BindMw);
    assert_eq!(r.cq.poll_one().unwrap().opcode, WcOpcode::LocalInv);
    // Bound and unbound by hand, in a list.
    let on = window.bind(&r.mr, 4096, 64, access);
    window.set_rkey(on.new_rkey);
    let off = window.bind(&r.mr, 0, 0, Access::empty());
    window.set_rkey(off.new_rkey);
    let list = [on, off].map(|b| SendWr::new(5, SendOp::BindMw(b), Payload::Sges(&[])));
    b.post_send_list(&list).unwrap();
    r.host.step();
    assert!(r.cq.poll_one().unwrap().is_ok() && r.cq.poll_one().unwrap().is_ok());
    assert_eq!(r.host.device().mws.values().next().unwrap().bound, None);
    // A full queue leaves the key alone.
    r.host.manual.store(true, Ordering::Relaxed);
    while b.post_send(&SendWr::local_inv(1, 1)).is_ok() {}
    let before = window.rkey();
    let full = b.bind_mw(&mut window, 1, (&r.mr, 0, 8), access, SendFlags::SIGNALED);
    assert_eq!((full, window.rkey()), (Err(PostError::QueueFull), before));
    // What the key does not cover.
    a.post_send(&outside(window.rkey())).unwrap();
    r.host.step();
    let mut out = [WorkCompletion::EMPTY; 128];
    let n = r.cq.poll(&mut out);
    assert!(out[..n].iter().any(|w| w.status == WcStatus::RemAccessErr));
    window.dealloc_now().unwrap();
    assert!(r.host.device().mws.is_empty());
    assert_eq!(inc_rkey(0x1234_56ff), 0x1234_5600);
}

#[test]
fn a_region_with_windows_waits_for_them() {
    let mut r = rig();
    let (mut a, _b) = r.pair(QpType::Rc);
    let live = r.host.live_allocations();
    for explicit in [true, false] {
        let region = r.pd.alloc_mr(256, everything()).unwrap();
        let mut window = r.pd.alloc_mw().unwrap();
        a.bind_mw(
            &mut window,
            1,
            (&region, 0, 8),
            Access::REMOTE_READ,
            SendFlags::SIGNALED,
        )
        .unwrap();
        assert!(r.done().is_ok());
        let mut region = region;
        let access = Some(Access::LOCAL_WRITE);
        let change = Rereg {
            access,
            ..Rereg::default()
        };
        let keys = (region.lkey(), region.rkey());
        assert_eq!(
            region.rereg(&change).unwrap_err().errno(),
            Errno::Busy as u32
        );
        assert_eq!((region.lkey(), region.rkey()), keys);
        if explicit {
            let error = region.deregister_now().unwrap_err();
            assert_eq!(error.errno(), Errno::Busy as u32);
            assert!(error.to_string().contains("windows"), "{error}");
        } else {
            drop(region);
        }
        assert_eq!(r.host.device().mrs.len(), 2);
        drop(window);
        assert_eq!(r.host.device().mrs.len(), 1, "it went with its window");
    }
    assert_eq!(r.host.live_allocations(), live + 1, "memory is for regions");
    let Rig {
        host,
        context,
        pd,
        mr,
        cq,
    } = r;
    drop((a, _b, context, pd, mr, cq));
    assert!(host.device().pds.is_empty() && host.device().mrs.is_empty());
    assert_eq!(Arc::strong_count(&host), 1);
}

#[test]
fn regions_change_and_their_keys_with_them() {
    let r = rig();
    let mut region = r.pd.alloc_mr(100, Access::LOCAL_WRITE).unwrap();
    region.write(0, &[7; 100]).unwrap();
    let (addr, lkey) = (region.addr(), region.lkey());
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    region
        .rereg(&Rereg {
            access: Some(access),
            ..Rereg::default()
        })
        .unwrap();
    assert_eq!((region.addr(), region.len()), (addr, 100));
    assert_ne!(region.lkey(), lkey);
    let mut old = [0; 100];
    region.read(0, &mut old).unwrap();
    assert_eq!(old, [7; 100], "the memory is the same");
    let other = r.context.alloc_pd().unwrap();
    region
        .rereg(&Rereg {
            pd: Some(&other),
            len: Some(5000),
            access: None,
        })
        .unwrap();
    assert_eq!(region.len(), 5000);
    assert_ne!(region.addr(), addr);
    let mut new = [1; 5000];
    region.read(0, &mut new).unwrap();
    assert_eq!(new, [0; 5000]);
    {
        let d = r.host.device();
        let seen = d.mrs.values().find(|m| m.len == 5000).unwrap();
        assert_eq!((seen.iova, seen.access), (region.addr(), access.bits()));
        assert_eq!(seen.ram_offset, r.host.offset_of(region.addr()));
    }
    // The first domain is free of it; the second is not.
    let again = r.pd.alloc_mr(100, Access::LOCAL_WRITE).unwrap();
    assert_eq!(again.addr(), addr, "its old memory is for other regions");
    let (addr, lkey, live) = (region.addr(), region.lkey(), r.host.live_allocations());
    let none = Rereg {
        len: Some(0),
        ..Rereg::default()
    };
    assert_eq!(
        region.rereg(&none).unwrap_err().errno(),
        Errno::Inval as u32
    );
    assert_eq!((region.addr(), region.lkey()), (addr, lkey));
    assert_eq!(region.len(), 5000);
    assert!(r.host.live_allocations() <= live + 1);
    let (_h, foreign) = FakeHost::open();
    let foreign = foreign.alloc_pd().unwrap();
    let change = Rereg {
        pd: Some(&foreign),
        ..Rereg::default()
    };
    assert_eq!(region.rereg(&change), Err(Error::OtherContext));
    drop(other);
    assert_eq!(r.host.device().pds.len(), 2);
    drop(region);
    assert_eq!(r.host.device().pds.len(), 1);
}

#[test]
fn completions_move_along_when_their_queue_is_resized() {
    let mut r = rig();
    let (mut a, _b) = r.pair(QpType::Rc);
    let mut cq = std::mem::replace(&mut r.cq, r.context.create_cq(1).unwrap());
    let write = |id: u64| {
        SendWr::new(
            id,
            SendOp::Write(RemoteAddr {
                addr: r.mr.addr(),
                rkey: r.mr.rkey(),
            }),
            Payload::Inline(b"r"),
        )
    };
    let (mut next, mut seen) = (0u64, 0u64);
    let live = r.host.live_allocations();
    for entries in [300, 20, 1000, 17, 17, 256] {
        for _ in 0..15 {
            a.post_send(&write(next)).unwrap();
            next += 1;
        }
        r.host.step();
        for _ in 0..7 {
            assert_eq!(cq.poll_one().unwrap().wr_id, seen);
            seen += 1;
        }
        cq.req_notify(false);
        cq.resize(entries).unwrap();
        assert!(cq.capacity() > entries);
        // Still armed.
        a.post_send(&write(next)).unwrap();
        next += 1;
        r.host.step();
        let events: Vec<_> = r.context.poll_events().collect();
        assert_eq!(events, [Event::CqCompletion(cq.index())]);
        while let Some(wc) = cq.poll_one() {
            assert_eq!(wc.wr_id, seen);
            seen += 1;
        }
        assert_eq!(seen, next);
    }
    assert_eq!(r.host.live_allocations(), live, "old rings went back");
    // Many laps of the last ring: the consumer index is told.
    for _ in 0..2000 {
        a.post_send(&write(next)).unwrap();
        next += 1;
        r.host.step();
        assert_eq!(cq.poll_one().unwrap().wr_id, seen);
        seen += 1;
    }
    // Too small for what waits.
    for _ in 0..40 {
        a.post_send(&write(next)).unwrap();
        next += 1;
    }
    r.host.step();
    let error = cq.resize(10).unwrap_err();
    assert!(error.to_string().contains("less room"), "{error}");
    assert!(matches!(cq.resize(0), Err(Error::BadSize { .. })));
    for _ in 0..40 {
        assert_eq!(cq.poll_one().unwrap().wr_id, seen);
        seen += 1;
    }
    assert_eq!(r.host.live_allocations(), live);
}

#[test]
fn a_channel_has_the_events_of_its_queues_and_no_others() {
    let mut r = rig();
    let channel = r.context.create_comp_channel();
    let mut ours: Vec<_> = (0..3)
        .map(|_| r.context.create_cq_on(64, &channel).unwrap())
        .collect();
    let mut qps: Vec<_> = ours
        .iter()
        .map(|cq| {
            let attr = QpInitAttr::new(QpType::Rc, cq, cq);
            let mut qp = r.pd.create_qp_ex(&attr).unwrap();
            qp.to_init(Access::empty()).unwrap();
            let to = RtrParams::to(Gid::LOCAL, qp.qpn(), 0);
            qp.to_rtr(&to).unwrap();
            qp.to_rts(&RtsParams::from_psn(0)).unwrap();
            qp
        })
        .collect();
    let (mut other, _peer) = r.pair(QpType::Rc);
    let remote = r.mr.remote(0);
    let write = SendWr::new(1, SendOp::Write(remote), Payload::Inline(b"c"));
    for cq in &mut ours {
        cq.req_notify(false);
    }
    r.cq.req_notify(false);
    for qp in &mut qps {
        qp.post_send(&write).unwrap();
    }
    other.post_send(&write).unwrap();
    r.host.step();
    let all: Vec<_> = r.context.poll_events().collect();
    assert_eq!(all, [Event::CqCompletion(r.cq.index())]);
    let mut seen: Vec<_> = std::iter::from_fn(|| channel.poll_event()).collect();
    seen.sort_unstable();
    let mut expect: Vec<_> = ours.iter().map(CompletionQueue::index).collect();
    expect.sort_unstable();
    assert_eq!(seen, expect);
    assert_eq!(channel.get_event(Some(Duration::from_millis(1))), Ok(None));
    // A queue that always has something does not hide the others.
    for cq in &mut ours {
        while cq.poll_one().is_some() {}
        cq.req_notify(false);
    }
    for qp in &mut qps {
        qp.post_send(&write).unwrap();
    }
    r.host.step();
    let first = channel.poll_event().unwrap();
    let at = ours.iter().position(|cq| cq.index() == first).unwrap();
    ours[at].req_notify(false);
    qps[at].post_send(&write).unwrap();
    r.host.step();
    let second = Some(Duration::from_secs(1));
    let next = channel.get_event(second).unwrap().unwrap();
    assert_ne!(next, first);
    // Nothing that a sleeper of the context would wait for.
    assert_eq!(r.context.wait(Some(Duration::from_millis(1))), Ok(false));
    // A destroyed queue leaves the channel, with its event.
    let gone = ours.remove(0).index();
    drop(qps);
    assert!(std::iter::from_fn(|| channel.poll_event()).all(|i| i != gone));
    let (_h, foreign) = FakeHost::open();
    assert_eq!(
        foreign.create_cq_on(4, &channel).unwrap_err(),
        Error::OtherContext
    );
}

#[test]
fn a_wish_for_any_completion_outlives_one_for_solicited_ones() {
    let mut r = rig();
    let (mut a, mut b) = r.pair(QpType::Rc);
    let event = Event::CqCompletion(r.cq.index());
    let quiet = SendWr::new(1, SendOp::Send, Payload::Inline(b"q"));
    let message = |r: &mut Rig, a: &mut QueuePair, b: &mut QueuePair, wr: &SendWr<'_>| {
        r.recv(b, 2, 0);
        a.post_send(wr).unwrap();
        r.host.step();
        r.context.poll_events().collect::<Vec<_>>()
    };
    r.cq.req_notify(false);
    r.cq.req_notify(true);
    assert_eq!(message(&mut r, &mut a, &mut b, &quiet), [event]);
    r.cq.req_notify(true);
    assert_eq!(message(&mut r, &mut a, &mut b, &quiet), []);
    let loud = quiet.with_flags(SendFlags::SOLICITED);
    assert_eq!(message(&mut r, &mut a, &mut b, &loud), [event]);
    r.cq.req_notify(true);
    r.cq.req_notify(false);
    assert_eq!(message(&mut r, &mut a, &mut b, &quiet), [event]);
}

#[test]
fn asynchronous_events_are_taken_one_by_one_and_none_is_lost() {
    let r = rig();
    let events = &r.host.window().events;
    let set = |bit: u64| events.summary.fetch_or(bit, Ordering::SeqCst);
    // By hand: every kind, at the ends of the bitmaps.
    events.qp_fatal[0].store(1 << 5, Ordering::SeqCst);
    events.qp_request_error[255].store(1 << 63, Ordering::SeqCst);
    events.qp_access_error[3].store(3, Ordering::SeqCst);
    events.qp_last_wqe[1].store(1, Ordering::SeqCst);
    events.qp_comm_established[0].store(2, Ordering::SeqCst);
    events.cq_error[63].store(1 << 63, Ordering::SeqCst);
    events.srq_limit[0].store(1, Ordering::SeqCst);
    let device =
        device_event::PORT_ACTIVE | device_event::PORT_ERROR | device_event::DEVICE_FATAL | 1 << 40;
    events.device.store(device, Ordering::SeqCst);
    events.cq_completion[0].store(1, Ordering::SeqCst);
    set(summary::QP_FATAL | summary::QP_REQUEST_ERROR | summary::QP_ACCESS_ERROR);
    set(summary::QP_LAST_WQE | summary::QP_COMM_ESTABLISHED | summary::CQ_ERROR);
    set(summary::SRQ_LIMIT | summary::DEVICE | summary::CQ_COMPLETION | summary::CM);
    let all = [
        AsyncEvent::CqError(4095),
        AsyncEvent::SrqLimit(0),
        AsyncEvent::QpFatal(5),
        AsyncEvent::QpRequestError(16_383),
        AsyncEvent::QpAccessError(192),
        AsyncEvent::QpAccessError(193),
        AsyncEvent::QpLastWqe(64),
        AsyncEvent::QpCommEstablished(1),
        AsyncEvent::PortActive,
        AsyncEvent::PortError,
        AsyncEvent::DeviceFatal,
    ];
    // Each taken alone, with the rest put back in between.
    for expect in all {
        assert_eq!(r.context.get_async_event(None), Ok(Some(expect)));
    }
    assert_eq!(r.context.poll_async_event(), None);
    let short = Some(Duration::from_millis(5));
    assert_eq!(r.context.get_async_event(short), Ok(None));
    let rest: Vec<_> = r.context.poll_events().collect();
    assert_eq!(rest, [Event::Cm, Event::CqCompletion(0)], "left alone");
    assert_eq!(r.context.wait(short), Ok(false));
}

#[test]
fn events_go_with_their_objects() {
    let r = rig();
    let (a, _b) = r.pair(QpType::Rc);
    let events = &r.host.window().events;
    let (word, bit) = (usize::from(a.index()) / 64, 1 << (a.index() % 64));
    for map in [
        &events.qp_fatal,
        &events.qp_request_error,
        &events.qp_access_error,
        &events.qp_last_wqe,
        &events.qp_comm_established,
    ] {
        map[word].fetch_or(bit, Ordering::SeqCst);
    }
    let kinds = summary::QP_FATAL
        | summary::QP_REQUEST_ERROR
        | summary::QP_ACCESS_ERROR
        | summary::QP_LAST_WQE
        | summary::QP_COMM_ESTABLISHED;
    events.summary.fetch_or(kinds, Ordering::SeqCst);
    drop(a);
    assert_eq!(r.context.poll_async_event(), None);
    let cq = r.context.create_cq(4).unwrap();
    let (word, bit) = (usize::from(cq.index()) / 64, 1 << (cq.index() % 64));
    events.cq_error[word].fetch_or(bit, Ordering::SeqCst);
    events.cq_completion[word].fetch_or(bit, Ordering::SeqCst);
    let kinds = summary::CQ_ERROR | summary::CQ_COMPLETION;
    events.summary.fetch_or(kinds, Ordering::SeqCst);
    cq.destroy().unwrap();
    assert_eq!(r.context.poll_events().count(), 0);
}

#[test]
fn counters_and_keys_are_asked_for() {
    let r = rig();
    let (qp, _b) = r.pair(QpType::Rc);
    assert_eq!(r.context.query_pkey(1, 0), Ok(0xffff));
    assert!(r.context.query_pkey(1, 1).is_err());
    let scope = |c: hyv_verbs::Counters| (c.errors, c.bytes as u16);
    let user = r.context.counters().unwrap();
    assert_eq!(scope(user), (CounterScope::User as u64, 0));
    let device = r.context.device_counters().unwrap();
    assert_eq!(scope(device), (CounterScope::Device as u64, 0));
    let own = qp.counters().unwrap();
    assert_eq!(scope(own), (CounterScope::Qp as u64, qp.index()));
    let asked = r
        .host
        .device()
        .log
        .iter()
        .filter(|v| **v == Opcode::QueryCounters)
        .count();
    assert_eq!(asked, 3);
}
