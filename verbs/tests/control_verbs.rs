//! Control verbs: the queue, replies that make no sense, who keeps whom alive, and what errors say.
#![cfg(not(loom))]

mod common;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{FakeHost, Fault};
use hyv_abi::control::Opcode;
use hyv_verbs::{Access, Context, Errno, Error, Gid, HostGone, Platform, QpCaps, Reason};

#[test]
fn queries_come_back() {
    let (_host, context) = FakeHost::open();
    assert_eq!(context.query_device().unwrap().max_inline, 416);
    assert_eq!(context.query_port(1).unwrap().active_mtu, 4096);
    assert_eq!(context.query_gid(1, 0).unwrap(), Gid([9; 16]));
    let error = context.query_port(2).unwrap_err();
    assert!(
        matches!(error, Error::Verb(e) if e.errno == Errno::Inval && e.reason == Reason::BadGid)
    );
    assert!(error.to_string().contains("no such GID or port"), "{error}");
    // More requests than the queue has entries, and than its index has values.
    for _ in 0..70_000 {
        context.query_gid(1, 0).unwrap();
    }
}

#[test]
fn windows_that_are_none_are_refused() {
    let host = FakeHost::new();
    host.window().header.version.store(99, Ordering::Relaxed);
    let error = Context::open(host.clone()).unwrap_err();
    assert_eq!(error, Error::BadWindow { version: 99 });
    assert!(error.to_string().contains("version 99"), "{error}");
    host.window().header.magic.store(0, Ordering::Relaxed);
    assert_eq!(
        Context::open(host).unwrap_err(),
        Error::BadWindow { version: 0 }
    );
}

#[test]
fn a_platform_has_one_context_at_a_time() {
    let (host, context) = FakeHost::open();
    assert_eq!(Context::open(host.clone()).unwrap_err(), Error::AlreadyOpen);
    context.query_device().unwrap();
    drop(context);
    Context::open(host).unwrap();
}

#[test]
fn replies_that_make_no_sense_are_errors() {
    for fault in [Fault::Cookie, Fault::Id, Fault::Short, Fault::Lie] {
        let (host, context) = FakeHost::open();
        host.device().fault = fault;
        let error = context.query_device().unwrap_err();
        assert_eq!(
            error,
            Error::BadReply {
                verb: Opcode::QueryDevice
            },
            "{fault:?}"
        );
        context.query_device().unwrap();
    }
}

#[test]
fn a_host_that_does_not_answer_is_given_up_and_its_buffers_left_alone() {
    let (host, context) = FakeHost::open();
    host.device().fault = Fault::Mute;
    assert_eq!(
        context.query_device().unwrap_err(),
        Error::NoAnswer {
            verb: Opcode::QueryDevice
        }
    );
    assert_eq!(context.query_device().unwrap_err(), Error::HostGone);
}

#[test]
fn a_dead_host_is_an_error_and_keeps_the_memory() {
    let (host, context) = FakeHost::open();
    let pd = context.alloc_pd().unwrap();
    let cq = context.create_cq(10).unwrap();
    let qp = pd.create_qp(&cq, &cq, &QpCaps::default()).unwrap();
    let mr = pd.alloc_mr(100, Access::LOCAL_WRITE).unwrap();
    let live = host.live_allocations();
    host.device().fault = Fault::Mute;
    host.gone.store(true, Ordering::Relaxed);
    let error = context.query_device().unwrap_err();
    assert_eq!(error, Error::HostGone);
    assert_eq!(error.to_string(), HostGone.to_string());
    drop((mr, qp, cq, pd, context));
    assert_eq!(
        host.live_allocations(),
        live,
        "what the device may still touch is not reused"
    );
}

#[test]
fn objects_go_in_dependency_order_whatever_the_drop_order() {
    let (host, context) = FakeHost::open();
    let before = host.live_allocations();
    let pd = context.alloc_pd().unwrap();
    let send_cq = context.create_cq(10).unwrap();
    let recv_cq = context.create_cq(10).unwrap();
    let qp = pd
        .create_qp(&send_cq, &recv_cq, &QpCaps::default())
        .unwrap();
    let mr = pd.alloc_mr(4096, Access::LOCAL_WRITE).unwrap();
    host.device().log.clear();
    drop(pd);
    drop(recv_cq);
    assert_eq!(send_cq.destroy(), Err(Error::InUse));
    assert_eq!(host.device().log, []);
    drop(mr);
    drop(qp);
    let log = std::mem::take(&mut host.device().log);
    assert_eq!(log[..2], [Opcode::DeregMr, Opcode::DestroyQp]);
    let mut rest = log[2..].to_vec();
    rest.sort_by_key(|o| *o as u16);
    assert_eq!(
        rest,
        [Opcode::DeallocPd, Opcode::DestroyCq, Opcode::DestroyCq]
    );
    let d = host.device();
    assert!(d.pds.is_empty() && d.cqs.is_empty() && d.qps.is_empty() && d.mrs.is_empty());
    drop(d);
    drop(context);
    assert_eq!(
        host.live_allocations(),
        before,
        "all but the control queue went back"
    );
    assert_eq!(Arc::strong_count(&host), 1);
}

#[test]
fn explicit_ends_say_how_it_went() {
    let (host, context) = FakeHost::open();
    let pd = context.alloc_pd().unwrap();
    let cq = context.create_cq(10).unwrap();
    let refuse = |verb: Opcode| {
        host.device()
            .refuse
            .insert(verb as u16, (Errno::Busy, Reason::InUse))
    };
    let qp = pd.create_qp(&cq, &cq, &QpCaps::default()).unwrap();
    refuse(Opcode::DestroyQp);
    assert_eq!(qp.destroy().unwrap_err().errno(), Errno::Busy as u32);
    let qp = pd.create_qp(&cq, &cq, &QpCaps::default()).unwrap();
    qp.destroy().unwrap();
    let mr = pd.alloc_mr(10, Access::empty()).unwrap();
    refuse(Opcode::DeregMr);
    assert_eq!(mr.deregister_now().unwrap_err().errno(), Errno::Busy as u32);
    let other = context.create_cq(10).unwrap();
    other.destroy().unwrap();
    assert_eq!(host.device().cqs.len(), 1);
}

#[test]
fn failed_creations_leave_nothing_behind() {
    let (host, context) = FakeHost::open();
    let pd = context.alloc_pd().unwrap();
    let cq = context.create_cq(10).unwrap();
    let before = host.live_allocations();
    for verb in [
        Opcode::CreateCq,
        Opcode::CreateQp,
        Opcode::RegMr,
        Opcode::AllocPd,
    ] {
        host.device()
            .refuse
            .insert(verb as u16, (Errno::NoMem, Reason::QuotaObjects));
        let error = match verb {
            Opcode::CreateCq => context.create_cq(10).unwrap_err(),
            Opcode::CreateQp => pd.create_qp(&cq, &cq, &QpCaps::default()).unwrap_err(),
            Opcode::RegMr => pd.alloc_mr(64, Access::empty()).unwrap_err(),
            _ => context.alloc_pd().unwrap_err(),
        };
        assert_eq!(error.errno(), Errno::NoMem as u32, "{verb:?}");
        assert!(error.to_string().contains("quota"), "{error}");
        assert_eq!(host.live_allocations(), before, "{verb:?}");
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_here() {
    let (_host, context) = FakeHost::open();
    let pd = context.alloc_pd().unwrap();
    let cq = context.create_cq(10).unwrap();
    for entries in [0, 26_001, u32::MAX] {
        assert!(
            matches!(context.create_cq(entries), Err(Error::BadSize { asked, .. }) if asked == entries)
        );
    }
    let base = QpCaps::default();
    for caps in [
        QpCaps {
            max_send_wr: 0,
            ..base
        },
        QpCaps {
            max_recv_wr: 0,
            ..base
        },
        QpCaps {
            max_send_wr: u32::MAX,
            ..base
        },
        QpCaps {
            max_send_wr: 32_769,
            ..base
        },
        QpCaps {
            max_recv_wr: 32_769,
            ..base
        },
        QpCaps {
            max_send_wr: 4_097,
            max_inline_data: 416,
            ..base
        },
        QpCaps {
            max_send_sge: 17,
            ..base
        },
        QpCaps {
            max_recv_sge: 16,
            ..base
        },
        QpCaps {
            max_inline_data: 417,
            ..base
        },
    ] {
        let error = pd.create_qp(&cq, &cq, &caps).unwrap_err();
        assert!(matches!(error, Error::BadSize { .. }), "{caps:?}: {error}");
    }
    assert_eq!(
        pd.alloc_mr(0, Access::empty()).unwrap_err().errno(),
        Errno::Inval as u32
    );
    for len in [64 << 20, usize::MAX] {
        assert_eq!(
            pd.alloc_mr(len, Access::empty()).unwrap_err(),
            Error::OutOfMemory { len }
        );
    }
}

#[test]
#[allow(unsafe_code, reason = "registers memory of the test's own")]
fn regions_stay_inside_and_memory_must_be_shared() {
    let (host, context) = FakeHost::open();
    let pd = context.alloc_pd().unwrap();
    let mr = pd.alloc_mr(100, Access::LOCAL_WRITE).unwrap();
    assert_eq!((mr.len(), mr.addr() % 64), (100, 0));
    for (offset, len) in [
        (0, 101),
        (100, 1),
        (101, 0),
        (usize::MAX, 2),
        (1, usize::MAX),
    ] {
        assert!(
            mr.read(offset, &mut vec![0; len.min(200)]).is_err() || len > 200,
            "{offset} {len}"
        );
        // SAFETY: nothing posts to the region.
        assert!(unsafe { mr.slice(offset, len) }.is_err(), "{offset} {len}");
    }
    for start in 0..20 {
        for len in 0..20 {
            let data: Vec<u8> = (1..=len as u8).collect();
            mr.write(0, &[0; 50]).unwrap();
            mr.write(start, &data).unwrap();
            let mut all = [9; 50];
            mr.read(0, &mut all).unwrap();
            assert_eq!(all[start..start + len], data[..]);
            assert!(
                all[..start]
                    .iter()
                    .chain(&all[start + len..])
                    .all(|b| *b == 0)
            );
        }
    }
    assert!(
        mr.atomic_u64(4).is_none() && mr.atomic_u64(96).is_none() && mr.atomic_u64(88).is_some()
    );
    let mut own = [0u8; 64];
    // SAFETY: refused, so the device never learns of it.
    let refused = unsafe { pd.reg_mr(NonNull::from(&mut own).cast(), 64, Access::empty()) };
    assert_eq!(refused.unwrap_err(), Error::NotShared);
    let inside = NonNull::new(mr.as_ptr()).unwrap();
    // SAFETY: part of another region, which outlives this one; nothing posts to either.
    let again = unsafe { pd.reg_mr(inside, 50, Access::REMOTE_READ) }.unwrap();
    assert_eq!(again.addr(), mr.addr());
    assert_ne!(again.lkey(), mr.lkey());
    let registered = host
        .device()
        .mrs
        .values()
        .map(|m| (m.iova, m.ram_offset, m.len, m.access))
        .collect::<Vec<_>>();
    let at = host.offset_of(mr.addr());
    assert_eq!(
        registered,
        [(mr.addr(), at, 100, 1), (mr.addr(), at, 50, 4)]
    );
}

#[test]
fn memory_of_a_dropped_region_comes_back_zeroed() {
    let (host, context) = FakeHost::open();
    let pd = context.alloc_pd().unwrap();
    let mr = pd.alloc_mr(100, Access::LOCAL_WRITE).unwrap();
    mr.write(0, &[7; 100]).unwrap();
    let (addr, lkey, live) = (mr.addr(), mr.lkey(), host.live_allocations());
    drop(mr);
    let mr = pd.alloc_mr(128, Access::LOCAL_WRITE).unwrap();
    assert_eq!((mr.addr(), host.live_allocations()), (addr, live));
    assert_ne!(mr.lkey(), lkey);
    let mut all = [1; 128];
    mr.read(0, &mut all).unwrap();
    assert_eq!(all, [0; 128]);
    let huge = pd.alloc_mr((2 << 20) + 1, Access::empty()).unwrap();
    assert_eq!(huge.addr() % (2 << 20), 0);
}
