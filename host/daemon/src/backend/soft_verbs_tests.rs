//! The verbs beyond the basic ones of the software RNIC through a real control queue: that each reaches the device, and what each
//! refuses there. How the device carries them out is tested where it lives.

use std::sync::Arc;

use hyv_abi::control::{
    AllocMw, AllocPd, CounterScope, CreateAh, CreateCq, CreateQp, CreateSrq, DeallocMw, DeallocPd,
    DeregMr, DestroyAh, DestroyQp, DestroySrq, Empty, ModifySrq, QueryCounters, QueryDevice,
    QueryPkey, QuerySrq, RegMr, ReregMr, ResizeCq, Verb, rereg,
};
use hyv_abi::types::{Access, Errno, QpType, Reason, VerbError};
use hyv_rnic::thread::Kicks;
use hyv_rnic::{Engine, EngineCell, EngineConfig};

use super::soft::SoftRnic;
use super::testing::Driver;
use super::*;

const RAM: u64 = 4 << 20;
const GID: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 9, 8, 7];

/// A user of a host whose engine nobody polls: control verbs need no turn of it.
struct World {
    _host: Backend,
    d: Driver,
    pd: u32,
}

impl World {
    fn new() -> Self {
        let config = EngineConfig {
            clock: Box::new(crate::sys::clock::monotonic_ns),
            gid: GID,
            node_guid: 42,
            carrier: None,
            mad_bell: Box::new(|| {}),
        };
        let rnic = SoftRnic::new(EngineCell::new(Engine::new(config)), Kicks::new().unwrap());
        let host = Backend::spawn(BackendConfig::default(), Arc::new(rnic)).unwrap();
        let (_, parts) = host.add_internal("user", RAM).unwrap();
        let mut d = Driver::new(&parts);
        let pd = d.call(AllocPd {}).unwrap().handle;
        Self { _host: host, d, pd }
    }

    #[track_caller]
    fn refuses<V: Verb>(&mut self, verb: V, errno: Errno, reason: Reason)
    where
        V::Reply: std::fmt::Debug + PartialEq,
    {
        let refused = Err(VerbError::new(errno, reason));
        assert_eq!(self.d.call(verb), refused, "{:?}", V::OPCODE);
    }

    fn cq(&mut self) -> u32 {
        let verb = CreateCq {
            ring: 0x1_0000,
            ctrl: 0x2_0000,
            log2: 4,
            reserved: 0,
        };
        self.d.call(verb).unwrap().handle
    }

    fn qp(&mut self, cq: u32, ty: QpType, srq: u32) -> u32 {
        let verb = CreateQp {
            pd: self.pd,
            qp_type: ty as u32,
            send_cq: cq,
            recv_cq: cq,
            srq,
            sig_all: 0,
            sq_ring: 0x3_0000,
            rq_ring: 0x4_0000,
            sq_log2: 4,
            rq_log2: 4,
            rq_stride: 32,
            reserved: 0,
        };
        self.d.call(verb).unwrap().handle
    }
}

#[test]
fn partitions() {
    let mut w = World::new();
    let key = w.d.call(QueryPkey { port: 1, index: 0 }).unwrap();
    assert_eq!((key.pkey, key.reserved), (0xffff, 0));
    for (port, index) in [(0, 0), (2, 0), (1, 1), (1, u32::MAX)] {
        w.refuses(QueryPkey { port, index }, Errno::Inval, Reason::BadGid);
    }
}

#[test]
fn shared_receive_queues() {
    let mut w = World::new();
    let good = CreateSrq {
        pd: w.pd,
        log2: 5,
        ring: 0x8_0000,
        ctrl: 0x9_0000,
        stride: 64,
        reserved: 0,
    };
    let max = w.d.call(QueryDevice {}).unwrap().max_srq;
    assert!(max > 0);
    for bad in [
        CreateSrq { log2: 16, ..good },
        CreateSrq { stride: 48, ..good },
        CreateSrq {
            ring: 0x8_0008,
            ..good
        },
        CreateSrq { ctrl: RAM, ..good },
        CreateSrq { pd: 99, ..good },
    ] {
        w.d.call(bad).unwrap_err();
    }
    let srq = w.d.call(good).unwrap().handle;
    let attr = w.d.call(QuerySrq { srq }).unwrap();
    assert_eq!((attr.max_wr, attr.max_sge, attr.limit), (32, 3, 0));
    w.refuses(ModifySrq { srq, limit: 33 }, Errno::Inval, Reason::BadAttr);
    // Nothing is posted: the event is due at once, and the limit armed no more.
    w.d.call(ModifySrq { srq, limit: 3 }).unwrap();
    assert_eq!(w.d.call(QuerySrq { srq }).unwrap().limit, 0);
    let cq = w.cq();
    for ty in [QpType::Rc, QpType::Uc, QpType::Ud] {
        let qp = w.qp(cq, ty, srq);
        w.refuses(DestroySrq { srq }, Errno::Busy, Reason::InUse);
        w.d.call(DestroyQp { qp }).unwrap();
    }
    assert_eq!(w.d.call(DestroySrq { srq }), Ok(Empty {}));
    w.refuses(DestroySrq { srq }, Errno::NoEnt, Reason::BadHandle);
    w.refuses(QuerySrq { srq }, Errno::NoEnt, Reason::BadHandle);
    w.refuses(ModifySrq { srq, limit: 0 }, Errno::NoEnt, Reason::BadHandle);
}

#[test]
fn address_handles() {
    let mut w = World::new();
    let good = CreateAh {
        pd: w.pd,
        port_num: 1,
        dest_gid: GID,
        sgid_index: 0,
        traffic_class: 0,
        hop_limit: 0,
        flow_label: 0,
    };
    let mut far = good;
    far.dest_gid[15] ^= 1;
    w.refuses(far, Errno::HostUnreach, Reason::NoRoute);
    w.refuses(
        CreateAh {
            port_num: 2,
            ..good
        },
        Errno::Inval,
        Reason::BadGid,
    );
    let ah = w.d.call(good).unwrap().handle;
    let pd = w.pd;
    w.refuses(DeallocPd { pd }, Errno::Busy, Reason::InUse);
    assert_eq!(w.d.call(DestroyAh { ah }), Ok(Empty {}));
    w.refuses(DestroyAh { ah }, Errno::NoEnt, Reason::BadHandle);
    w.d.call(DeallocPd { pd }).unwrap();
}

#[test]
fn windows_and_changed_regions() {
    let mut w = World::new();
    let pd = w.pd;
    w.refuses(AllocMw { pd, mw_type: 1 }, Errno::Inval, Reason::BadMwType);
    let mw = w.d.call(AllocMw { pd, mw_type: 2 }).unwrap();
    let access = (Access::LOCAL_WRITE | Access::MW_BIND).bits();
    let mr =
        w.d.call(RegMr {
            pd,
            access,
            iova: 0x7000_0000,
            ram_offset: 0,
            len: 4096,
        })
        .unwrap();
    assert_ne!(mw.rkey >> 8, mr.rkey >> 8, "one space of keys");
    let change = ReregMr {
        mr: mr.handle,
        flags: rereg::TRANSLATION,
        pd: 0,
        access: 0,
        iova: 0,
        ram_offset: 4096,
        len: 8192,
    };
    w.refuses(
        ReregMr { flags: 0, ..change },
        Errno::Inval,
        Reason::BadFlags,
    );
    w.refuses(
        ReregMr {
            ram_offset: RAM,
            ..change
        },
        Errno::Fault,
        Reason::OutsideRam,
    );
    let new = w.d.call(change).unwrap();
    assert_eq!(new.handle, mr.handle);
    assert_ne!((new.lkey, new.rkey), (mr.lkey, mr.rkey));
    w.d.call(DeallocMw { mw: mw.handle }).unwrap();
    w.refuses(DeallocMw { mw: mw.handle }, Errno::NoEnt, Reason::BadHandle);
    w.d.call(DeregMr { mr: mr.handle }).unwrap();
    w.refuses(change, Errno::NoEnt, Reason::BadHandle);
    w.d.call(DeallocPd { pd }).unwrap();
}

#[test]
fn resized_queues_and_counters() {
    let mut w = World::new();
    let cq = w.cq();
    let good = ResizeCq {
        cq,
        log2: 8,
        ring: 0x10_0000,
    };
    w.refuses(
        ResizeCq { log2: 16, ..good },
        Errno::Inval,
        Reason::BadRingSize,
    );
    w.refuses(
        ResizeCq { ring: RAM, ..good },
        Errno::Fault,
        Reason::OutsideRam,
    );
    assert_eq!(w.d.call(good), Ok(Empty {}));
    let qp = w.qp(cq, QpType::Rc, u32::MAX);
    let mut ask = |scope, handle| w.d.call(QueryCounters { scope, handle });
    for scope in [CounterScope::Device, CounterScope::User] {
        let c = ask(scope as u32, 0).unwrap();
        assert_eq!((c.work_requests, c.errors, c.drops_no_qp), (0, 0, 0));
    }
    assert_eq!(ask(CounterScope::Qp as u32, qp).unwrap().bytes, 0);
    let none = VerbError::new(Errno::NoEnt, Reason::BadHandle);
    assert_eq!(ask(CounterScope::Qp as u32, qp ^ 1), Err(none));
    let what = VerbError::new(Errno::Inval, Reason::BadFlags);
    assert_eq!(ask(3, 0), Err(what));
}
