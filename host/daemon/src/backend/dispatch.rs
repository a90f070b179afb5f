//! From a request's bytes to its verb, and from the verb to whoever carries it out.

use std::collections::HashMap;

use hyv_abi::control::{
    AllocMw, AllocPd, CmAccept, CmBindAddr, CmConnect, CmCreateId, CmDestroyId, CmDisconnect,
    CmEstablish, CmGetEvent, CmListen, CmReject, CmResolveAddr, CmResolveRoute, CreateAh, CreateCq,
    CreateQp, CreateSrq, DeallocMw, DeallocPd, DeregMr, DestroyAh, DestroyCq, DestroyQp,
    DestroySrq, Empty, GidReply, HandleReply, MAX_REPLY, ModifyQp, ModifySrq, Opcode,
    QueryCounters, QueryDevice, QueryGid, QueryPkey, QueryPort, QueryQp, QuerySrq,
    REPLY_HEADER_LEN, RegMr, ReregMr, ResizeCq, Verb,
};
use hyv_abi::types::{Errno, Reason, VerbError};
use zerocopy::IntoBytes;

use super::control::{Reply, Request};
use super::provider::{Provider, UserId};
use crate::cm::{Cm, UserKey};

/// Who asks, and what it takes to answer.
pub(super) struct Caller<'a> {
    pub(super) provider: &'a dyn Provider,
    pub(super) cm: &'a mut Cm,
    pub(super) key: UserKey,
    pub(super) id: UserId,
    /// Numbers of this user's queue pairs, by handle.
    pub(super) qpns: &'a mut HashMap<u32, u32>,
    pub(super) now_ns: u64,
}

type Body = ([u8; MAX_REPLY - REPLY_HEADER_LEN], usize);

fn empty(r: Result<(), VerbError>) -> Result<Empty, VerbError> {
    r.map(|()| Empty {})
}

fn handle(r: Result<u32, VerbError>) -> Result<HandleReply, VerbError> {
    r.map(|handle| HandleReply {
        handle,
        reserved: 0,
    })
}

/// Carries out one request; every way out is a reply. `allowed` is false when the user has used up its rate.
pub(super) fn dispatch(caller: &mut Caller<'_>, request: &Request, allowed: bool) -> Reply {
    let (header, body) = match request.parse() {
        Ok(parsed) => parsed,
        Err(e) => return Reply::error(request.cookie(), e),
    };
    let result = if !allowed {
        Err(VerbError::new(Errno::DQuot, Reason::QuotaRate))
    } else if u32::from(header.version) != hyv_abi::ABI_VERSION {
        Err(VerbError::new(Errno::ProtoNoSupport, Reason::BadVersion))
    } else if let Some(opcode) = Opcode::from_u16(header.opcode) {
        call(caller, opcode, body, request.room)
    } else {
        Err(VerbError::new(Errno::NoSys, Reason::BadOpcode))
    };
    match result {
        Ok((bytes, len)) => Reply::ok(header.cookie, &bytes[..len]),
        Err(e) => {
            tracing::debug!(user = %caller.key, opcode = header.opcode, "control verb refused: {e}");
            Reply::error(header.cookie, e)
        }
    }
}

/// Reads a verb's request, runs it, and writes its reply. Nothing runs whose reply has no room.
fn run<V: Verb>(
    body: &[u8],
    room: usize,
    f: impl FnOnce(V) -> Result<V::Reply, VerbError>,
) -> Result<Body, VerbError> {
    let short = VerbError::new(Errno::Inval, Reason::BadLength);
    let (verb, _later_fields) = V::read_from_prefix(body).map_err(|_| short)?;
    if room < size_of::<V::Reply>() {
        return Err(short);
    }
    let reply = f(verb)?;
    let bytes = reply.as_bytes();
    let mut out = [0; MAX_REPLY - REPLY_HEADER_LEN];
    out[..bytes.len()].copy_from_slice(bytes);
    Ok((out, bytes.len()))
}

fn call(
    caller: &mut Caller<'_>,
    opcode: Opcode,
    body: &[u8],
    room: usize,
) -> Result<Body, VerbError> {
    let Caller {
        provider,
        cm,
        key,
        id,
        qpns,
        now_ns,
    } = caller;
    let (p, user, u, now) = (*provider, *key, *id, *now_ns);
    let owns = |qpn| p.owns_qpn(u, qpn);
    match opcode {
        Opcode::QueryDevice => run(body, room, |_: QueryDevice| p.device_attr(u)),
        Opcode::QueryPort => run(body, room, |v: QueryPort| p.port_attr(v.port)),
        Opcode::QueryGid => run(body, room, |v: QueryGid| {
            p.gid(v.port, v.index).map(|gid| GidReply { gid })
        }),
        Opcode::QueryPkey => run(body, room, |v: QueryPkey| p.pkey(v.port, v.index)),
        Opcode::AllocPd => run(body, room, |_: AllocPd| handle(p.alloc_pd(u))),
        Opcode::DeallocPd => run(body, room, |v: DeallocPd| empty(p.dealloc_pd(u, v.pd))),
        Opcode::RegMr => run(body, room, |v: RegMr| p.reg_mr(u, &v)),
        Opcode::DeregMr => run(body, room, |v: DeregMr| empty(p.dereg_mr(u, v.mr))),
        Opcode::CreateCq => run(body, room, |v: CreateCq| handle(p.create_cq(u, &v))),
        Opcode::DestroyCq => run(body, room, |v: DestroyCq| empty(p.destroy_cq(u, v.cq))),
        Opcode::CreateQp => run(body, room, |v: CreateQp| {
            let qp = p.create_qp(u, &v)?;
            qpns.insert(qp.handle, qp.qpn);
            Ok(qp)
        }),
        Opcode::ModifyQp => run(body, room, |v: ModifyQp| empty(p.modify_qp(u, &v))),
        Opcode::QueryQp => run(body, room, |v: QueryQp| p.query_qp(u, v.qp)),
        Opcode::DestroyQp => run(body, room, |v: DestroyQp| {
            p.destroy_qp(u, v.qp)?;
            if let Some(qpn) = qpns.remove(&v.qp) {
                cm.qp_destroyed(user, qpn);
            }
            Ok(Empty {})
        }),
        Opcode::CreateSrq => run(body, room, |v: CreateSrq| handle(p.create_srq(u, &v))),
        Opcode::ModifySrq => run(body, room, |v: ModifySrq| empty(p.modify_srq(u, &v))),
        Opcode::QuerySrq => run(body, room, |v: QuerySrq| p.query_srq(u, v.srq)),
        Opcode::DestroySrq => run(body, room, |v: DestroySrq| empty(p.destroy_srq(u, v.srq))),
        Opcode::QueryCounters => run(body, room, |v: QueryCounters| p.query_counters(u, &v)),
        Opcode::ReregMr => run(body, room, |v: ReregMr| p.rereg_mr(u, &v)),
        Opcode::AllocMw => run(body, room, |v: AllocMw| p.alloc_mw(u, &v)),
        Opcode::DeallocMw => run(body, room, |v: DeallocMw| empty(p.dealloc_mw(u, v.mw))),
        Opcode::ResizeCq => run(body, room, |v: ResizeCq| empty(p.resize_cq(u, &v))),
        Opcode::CreateAh => run(body, room, |v: CreateAh| handle(p.create_ah(u, &v))),
        Opcode::DestroyAh => run(body, room, |v: DestroyAh| empty(p.destroy_ah(u, v.ah))),
        Opcode::CmCreateId => run(body, room, |v: CmCreateId| {
            handle(cm.create_id(user, v.port_space))
        }),
        Opcode::CmDestroyId => run(body, room, |v: CmDestroyId| {
            empty(cm.destroy_id(user, v.id))
        }),
        Opcode::CmBindAddr => run(body, room, |v: CmBindAddr| cm.bind_addr(user, &v)),
        Opcode::CmListen => run(body, room, |v: CmListen| empty(cm.listen(user, &v))),
        Opcode::CmResolveAddr => run(body, room, |v: CmResolveAddr| {
            empty(cm.resolve_addr(user, &v, |from, to| p.has_route(from, to)))
        }),
        Opcode::CmResolveRoute => run(body, room, |v: CmResolveRoute| {
            empty(cm.resolve_route(user, &v))
        }),
        Opcode::CmConnect => run(body, room, |v: CmConnect| {
            if cm.has_wire() {
                // The link's may have changed.
                cm.set_path_mtu(p.port_attr(1)?.active_mtu);
            }
            empty(cm.connect(user, &v, now, owns))
        }),
        Opcode::CmAccept => run(body, room, |v: CmAccept| {
            empty(cm.accept(user, &v, now, owns))
        }),
        Opcode::CmReject => run(body, room, |v: CmReject| empty(cm.reject(user, &v))),
        Opcode::CmEstablish => run(body, room, |v: CmEstablish| empty(cm.establish(user, v.id))),
        Opcode::CmDisconnect => run(body, room, |v: CmDisconnect| {
            empty(cm.disconnect(user, v.id))
        }),
        Opcode::CmGetEvent => run(body, room, |_: CmGetEvent| cm.get_event(user)),
    }
}
