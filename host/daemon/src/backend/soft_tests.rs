//! The control verbs of the software RNIC through a real control queue: what each refuses, and with which reason.

use std::sync::Arc;

use hyv_abi::control::{
    AllocPd, CmAccept, CmBindAddr, CmConnect, CmCreateId, CmDisconnect, CmEstablish, CmEventKind,
    CmListen, CmParam, CmResolveAddr, CmResolveRoute, CreateCq, CreateQp, DeallocPd, DeregMr,
    DestroyCq, DestroyQp, Empty, ModifyQp, PortSpace, QpAttr, QueryDevice, QueryGid, QueryPort,
    QueryQp, RegMr, Verb,
};
use hyv_abi::types::{Access, Errno, QpAttrMask, QpState, QpType, Reason, VerbError};
use hyv_rnic::thread::Kicks;
use hyv_rnic::{Engine, EngineCell, EngineConfig};
use zerocopy::FromZeros;

use super::soft::SoftRnic;
use super::testing::Driver;
use super::*;

const RAM: u64 = 4 << 20;
const CQ_RING: u64 = 0x1_0000;
const CQ_CTRL: u64 = 0x2_0000;
const SQ: u64 = 0x3_0000;
const RQ: u64 = 0x4_0000;
const GID: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 9, 8, 7];

/// A host whose engine nobody polls: control verbs need no turn of it.
fn host() -> Backend {
    let config = EngineConfig {
        clock: Box::new(crate::sys::clock::monotonic_ns),
        gid: GID,
        node_guid: 42,
        carrier: None,
        mad_bell: Box::new(|| {}),
    };
    let rnic = SoftRnic::new(EngineCell::new(Engine::new(config)), Kicks::new().unwrap());
    Backend::spawn(BackendConfig::default(), Arc::new(rnic)).unwrap()
}

fn user(host: &Backend) -> (UserKey, Driver) {
    let (key, parts) = host.add_internal("user", RAM).unwrap();
    (key, Driver::new(&parts))
}

fn refuses<V: Verb>(d: &mut Driver, verb: V, errno: Errno, reason: Reason)
where
    V::Reply: std::fmt::Debug + PartialEq,
{
    assert_eq!(
        d.call(verb),
        Err(VerbError::new(errno, reason)),
        "{:?}",
        V::OPCODE
    );
}

const MR: RegMr = RegMr {
    pd: 0,
    access: 1,
    iova: 0x7000_0000,
    ram_offset: 0,
    len: 4096,
};
const CQ: CreateCq = CreateCq {
    ring: CQ_RING,
    ctrl: CQ_CTRL,
    log2: 4,
    reserved: 0,
};

fn qp_verb(pd: u32, cq: u32) -> CreateQp {
    CreateQp {
        pd,
        qp_type: QpType::Rc as u32,
        send_cq: cq,
        recv_cq: cq,
        srq: u32::MAX,
        sig_all: 0,
        sq_ring: SQ,
        rq_ring: RQ,
        sq_log2: 4,
        rq_log2: 4,
        rq_stride: 32,
        reserved: 0,
    }
}

/// A PD, a CQ and a QP of its own: (PD, CQ, QP's handle, QPN).
fn objects(d: &mut Driver) -> (u32, u32, u32, u32) {
    let pd = d.call(AllocPd {}).unwrap().handle;
    let cq = d.call(CQ).unwrap().handle;
    let qp = d.call(qp_verb(pd, cq)).unwrap();
    (pd, cq, qp.handle, qp.qpn)
}

#[test]
fn device_port_and_gid() {
    let host = host();
    let (_, mut d) = user(&host);
    let attr = d.call(QueryDevice {}).unwrap();
    assert_eq!(
        (attr.node_guid, attr.max_mr_size, attr.phys_port_cnt),
        (42, RAM, 1)
    );
    assert_eq!(d.call(QueryPort { port: 1 }).unwrap().state, 4);
    assert_eq!(d.call(QueryGid { port: 1, index: 0 }).unwrap().gid, GID);
    for port in [0, 2, u32::MAX] {
        refuses(&mut d, QueryPort { port }, Errno::Inval, Reason::BadGid);
        refuses(
            &mut d,
            QueryGid { port, index: 0 },
            Errno::Inval,
            Reason::BadGid,
        );
    }
    refuses(
        &mut d,
        QueryGid { port: 1, index: 1 },
        Errno::Inval,
        Reason::BadGid,
    );
}

#[test]
fn memory_regions() {
    let host = host();
    let (_, mut d) = user(&host);
    let pd = d.call(AllocPd {}).unwrap().handle;
    let mr = RegMr { pd, ..MR };
    let d = &mut d;
    refuses(
        d,
        RegMr { pd: pd ^ 1, ..mr },
        Errno::NoEnt,
        Reason::BadHandle,
    );
    refuses(
        d,
        RegMr {
            access: 1 << 20,
            ..mr
        },
        Errno::Inval,
        Reason::BadAccess,
    );
    refuses(
        d,
        RegMr {
            access: Access::REMOTE_WRITE.bits(),
            ..mr
        },
        Errno::Inval,
        Reason::BadAccess,
    );
    refuses(
        d,
        RegMr {
            access: Access::REMOTE_ATOMIC.bits(),
            ..mr
        },
        Errno::Inval,
        Reason::BadAccess,
    );
    refuses(d, RegMr { len: 0, ..mr }, Errno::Inval, Reason::ZeroLength);
    refuses(
        d,
        RegMr {
            iova: u64::MAX - 4095,
            len: 4097,
            ..mr
        },
        Errno::Inval,
        Reason::Overflow,
    );
    for (ram_offset, len) in [
        (RAM, 1),
        (RAM - 1, 2),
        (0, RAM + 1),
        (u64::MAX, 1),
        (1, u64::MAX - 0x8000_0000),
    ] {
        refuses(
            d,
            RegMr {
                ram_offset,
                len,
                ..mr
            },
            Errno::Fault,
            Reason::OutsideRam,
        );
    }
    let all = d.call(RegMr { len: RAM, ..mr }).unwrap();
    refuses(d, DeallocPd { pd }, Errno::Busy, Reason::InUse);
    assert_eq!(d.call(DeregMr { mr: all.handle }), Ok(Empty {}));
    refuses(
        d,
        DeregMr { mr: all.handle },
        Errno::NoEnt,
        Reason::BadHandle,
    );
    let quota = d.call(QueryDevice {}).unwrap().max_mr_bytes;
    let most: Vec<u32> = (0..quota / RAM)
        .map(|_| d.call(RegMr { len: RAM, ..mr }).unwrap().handle)
        .collect();
    refuses(d, RegMr { len: 1, ..mr }, Errno::NoMem, Reason::QuotaMemory);
    for mr in most {
        d.call(DeregMr { mr }).unwrap();
    }
    assert_eq!(d.call(DeallocPd { pd }), Ok(Empty {}));
    refuses(d, DeallocPd { pd }, Errno::NoEnt, Reason::BadHandle);
    let max_pd = d.call(QueryDevice {}).unwrap().max_pd;
    for _ in 0..max_pd {
        d.call(AllocPd {}).unwrap();
    }
    refuses(d, AllocPd {}, Errno::NoMem, Reason::QuotaObjects);
}

#[test]
fn completion_queues() {
    let host = host();
    let (_, mut d) = user(&host);
    let d = &mut d;
    refuses(
        d,
        CreateCq {
            ring: CQ_RING + 8,
            ..CQ
        },
        Errno::Inval,
        Reason::Misaligned,
    );
    refuses(
        d,
        CreateCq {
            ctrl: CQ_CTRL + 1,
            ..CQ
        },
        Errno::Inval,
        Reason::Misaligned,
    );
    refuses(
        d,
        CreateCq {
            ring: RAM - 64,
            ..CQ
        },
        Errno::Fault,
        Reason::OutsideRam,
    );
    refuses(
        d,
        CreateCq { ctrl: !63, ..CQ },
        Errno::Fault,
        Reason::OutsideRam,
    );
    for log2 in [25, 31, 63, 64, u32::MAX] {
        refuses(
            d,
            CreateCq { log2, ..CQ },
            Errno::Inval,
            Reason::BadRingSize,
        );
    }
    let (_, cq, qp, _) = objects(d);
    refuses(d, DestroyCq { cq }, Errno::Busy, Reason::InUse);
    d.call(DestroyQp { qp }).unwrap();
    d.call(DestroyCq { cq }).unwrap();
    refuses(d, DestroyCq { cq }, Errno::NoEnt, Reason::BadHandle);
}

#[test]
fn queue_pairs() {
    let host = host();
    let (_, mut d) = user(&host);
    let (_, mut other) = user(&host);
    let d = &mut d;
    let (pd, cq, qp, qpn) = objects(d);
    let good = qp_verb(pd, cq);
    for bad in [
        CreateQp {
            pd: pd ^ 0xffff,
            ..good
        },
        CreateQp {
            send_cq: cq ^ 0xffff,
            ..good
        },
        CreateQp {
            recv_cq: cq ^ 0xffff,
            ..good
        },
        CreateQp { srq: 0, ..good },
    ] {
        refuses(d, bad, Errno::NoEnt, Reason::BadHandle);
    }
    refuses(
        d,
        CreateQp {
            qp_type: 99,
            ..good
        },
        Errno::Inval,
        Reason::BadQpType,
    );
    refuses(
        d,
        CreateQp {
            rq_stride: 48,
            ..good
        },
        Errno::Inval,
        Reason::BadStride,
    );
    refuses(
        d,
        CreateQp {
            sq_log2: 30,
            ..good
        },
        Errno::Inval,
        Reason::BadRingSize,
    );
    refuses(
        d,
        CreateQp {
            rq_log2: u32::MAX,
            ..good
        },
        Errno::Inval,
        Reason::BadRingSize,
    );
    refuses(
        d,
        CreateQp {
            sq_ring: SQ + 4,
            ..good
        },
        Errno::Inval,
        Reason::Misaligned,
    );
    refuses(
        d,
        CreateQp {
            rq_ring: RAM,
            ..good
        },
        Errno::Fault,
        Reason::OutsideRam,
    );
    refuses(&mut other, qp_verb(pd, cq), Errno::NoEnt, Reason::BadHandle);
    refuses(
        &mut other,
        DestroyQp { qp },
        Errno::NoEnt,
        Reason::BadHandle,
    );
    refuses(&mut other, QueryQp { qp }, Errno::NoEnt, Reason::BadHandle);
    refuses(d, DeallocPd { pd }, Errno::Busy, Reason::InUse);

    let attr = QpAttr {
        state: QpState::Rts as u32,
        ..QpAttr::new_zeroed()
    };
    let state = QpAttrMask::STATE.bits();
    refuses(
        d,
        ModifyQp {
            qp,
            mask: state,
            attr,
        },
        Errno::Inval,
        Reason::BadTransition,
    );
    let init = QpAttr {
        state: QpState::Init as u32,
        port_num: 1,
        ..QpAttr::new_zeroed()
    };
    refuses(
        d,
        ModifyQp {
            qp,
            mask: state,
            attr: init,
        },
        Errno::Inval,
        Reason::MissingAttr,
    );
    refuses(
        d,
        ModifyQp {
            qp,
            mask: u32::MAX,
            attr: init,
        },
        Errno::Inval,
        Reason::ExtraAttr,
    );
    refuses(
        &mut other,
        ModifyQp {
            qp,
            mask: state,
            attr: init,
        },
        Errno::NoEnt,
        Reason::BadHandle,
    );
    assert_eq!(d.call(QueryQp { qp }).unwrap().state, QpState::Reset as u32);
    connect_states(d, qp, qpn);
    assert_eq!(d.call(QueryQp { qp }).unwrap().state, QpState::Rts as u32);
    d.call(DestroyQp { qp }).unwrap();
    refuses(d, DestroyQp { qp }, Errno::NoEnt, Reason::BadHandle);
    refuses(d, QueryQp { qp }, Errno::NoEnt, Reason::BadHandle);
}

/// Moves a queue pair to RTS, with `peer` at its other end.
fn connect_states(d: &mut Driver, qp: u32, peer: u32) {
    use QpAttrMask as M;
    let mut attr = QpAttr {
        port_num: 1,
        path_mtu: 1024,
        dest_qp_num: peer,
        max_dest_rd_atomic: 1,
        max_rd_atomic: 1,
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        dest_gid: GID,
        ..QpAttr::new_zeroed()
    };
    let rtr =
        M::AV | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN | M::MAX_DEST_RD_ATOMIC | M::MIN_RNR_TIMER;
    let rts = M::SQ_PSN | M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::MAX_QP_RD_ATOMIC;
    for (state, mask) in [
        (QpState::Init, M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS),
        (QpState::Rtr, rtr),
        (QpState::Rts, rts),
    ] {
        attr.state = state as u32;
        assert_eq!(
            d.call(ModifyQp {
                qp,
                mask: (mask | M::STATE).bits(),
                attr
            }),
            Ok(Empty {}),
            "{state:?}"
        );
    }
}

fn state_of(d: &mut Driver, qp: u32) -> Option<QpState> {
    QpState::from_u32(d.call(QueryQp { qp }).unwrap().state)
}

struct Met {
    host: Backend,
    server_key: UserKey,
    client: Driver,
    server: Driver,
    client_qp: u32,
    server_qp: u32,
    client_id: u32,
}

/// Two users whose queue pairs met through connection management.
fn met() -> Met {
    let host = host();
    let (_, mut a) = user(&host);
    let (server_key, mut b) = user(&host);
    let (_, _, a_qp, a_qpn) = objects(&mut a);
    let (_, _, b_qp, b_qpn) = objects(&mut b);
    let listener = b
        .call(CmCreateId {
            port_space: PortSpace::Tcp as u32,
            reserved: 0,
        })
        .unwrap()
        .handle;
    b.call(CmBindAddr {
        id: listener,
        port: 18_515,
        gid: GID,
    })
    .unwrap();
    b.call(CmListen {
        id: listener,
        backlog: 1,
    })
    .unwrap();
    let id = a
        .call(CmCreateId {
            port_space: PortSpace::Tcp as u32,
            reserved: 0,
        })
        .unwrap()
        .handle;
    a.call(CmResolveAddr {
        id,
        port: 18_515,
        gid: GID,
        timeout_ms: 1,
        reserved: 0,
    })
    .unwrap();
    a.event(CmEventKind::AddrResolved);
    a.call(CmResolveRoute { id, timeout_ms: 1 }).unwrap();
    a.event(CmEventKind::RouteResolved);
    a.call(CmConnect {
        id,
        param: CmParam {
            qpn: a_qpn,
            ..CmParam::EMPTY
        },
    })
    .unwrap();
    let request = b.event(CmEventKind::ConnectRequest);
    connect_states(&mut b, b_qp, request.param.qpn);
    b.call(CmAccept {
        id: request.id,
        param: CmParam {
            qpn: b_qpn,
            ..CmParam::EMPTY
        },
    })
    .unwrap();
    let response = a.event(CmEventKind::ConnectResponse);
    connect_states(&mut a, a_qp, response.param.qpn);
    a.call(CmEstablish { id }).unwrap();
    a.event(CmEventKind::Established);
    b.event(CmEventKind::Established);
    Met {
        host,
        server_key,
        client: a,
        server: b,
        client_qp: a_qp,
        server_qp: b_qp,
        client_id: id,
    }
}

#[test]
fn disconnecting_moves_both_queue_pairs_to_error() {
    let mut m = met();
    assert_eq!(state_of(&mut m.client, m.client_qp), Some(QpState::Rts));
    m.client.call(CmDisconnect { id: m.client_id }).unwrap();
    assert_eq!(state_of(&mut m.client, m.client_qp), Some(QpState::Err));
    assert_eq!(state_of(&mut m.server, m.server_qp), Some(QpState::Err));
    m.server.event(CmEventKind::Disconnected);
}

#[test]
fn a_user_that_dies_takes_its_peers_queue_pair_to_error_and_leaves_nothing() {
    let mut m = met();
    m.host.remove_user(m.server_key).unwrap();
    assert_eq!(state_of(&mut m.client, m.client_qp), Some(QpState::Err));
    m.client.event(CmEventKind::Disconnected);
    // Its port is free, and its objects are gone: the next user starts from nothing.
    let (_, mut next) = user(&m.host);
    refuses(
        &mut next,
        QueryQp { qp: m.server_qp },
        Errno::NoEnt,
        Reason::BadHandle,
    );
    let id = next
        .call(CmCreateId {
            port_space: PortSpace::Tcp as u32,
            reserved: 0,
        })
        .unwrap()
        .handle;
    next.call(CmBindAddr {
        id,
        port: 18_515,
        gid: GID,
    })
    .unwrap();
}

#[test]
fn many_users_come_and_go() {
    let host = host();
    for round in 0..40 {
        let (a, mut da) = user(&host);
        let (b, mut db) = user(&host);
        objects(&mut da);
        objects(&mut db);
        assert!(
            host.remove_user(if round % 2 == 0 { a } else { b })
                .unwrap()
        );
        assert!(
            host.remove_user(if round % 2 == 0 { b } else { a })
                .unwrap()
        );
    }
    assert!(host.users().is_empty());
}
