//! Connection management between identifiers of the same host.

use std::sync::atomic::Ordering;

use hyv_abi::control::{self as c, CmEvent, CmEventKind, CmParam, HandleReply, Opcode, PortSpace};
use hyv_abi::types::{Errno, QpState, Reason, VerbError};
use hyv_abi::window::summary;
use hyv_verbs::Platform;
use zerocopy::IntoBytes;

use super::control::{BAD_HANDLE, Done, arg};
use super::{Device, FakeHost};

/// An identifier as the host sees it.
#[derive(Default)]
pub struct Id {
    pub space: u32,
    pub port: u32,
    pub listening: bool,
    pub target: u32,
    pub peer: Option<u32>,
    pub qpn: u32,
}

pub fn announce(
    host: &FakeHost,
    d: &mut Device,
    kind: CmEventKind,
    id: u32,
    listen: u32,
    param: CmParam,
    status: u32,
) {
    d.events.push_back(CmEvent {
        event: kind as u32,
        status,
        id,
        listen_id: listen,
        peer_gid: [5; 16],
        param,
    });
    host.window()
        .events
        .summary
        .fetch_or(summary::CM, Ordering::SeqCst);
    host.wake();
}

fn errored(d: &mut Device, qpn: u32) {
    if let Some(qp) = d.qps.values_mut().find(|q| q.qpn == qpn) {
        qp.attr.state = QpState::Err as u32;
    }
}

pub fn execute(host: &FakeHost, d: &mut Device, opcode: Opcode, body: &[u8]) -> Done {
    let done = || Ok(Vec::new());
    let none = CmParam::EMPTY;
    match opcode {
        Opcode::CmCreateId => {
            let (h, space) = (d.handle(), arg::<c::CmCreateId>(body).port_space);
            d.ids.insert(
                h,
                Id {
                    space,
                    ..Id::default()
                },
            );
            Ok(HandleReply {
                handle: h,
                reserved: 0,
            }
            .as_bytes()
            .to_vec())
        }
        Opcode::CmDestroyId => {
            let id = d
                .ids
                .remove(&arg::<c::CmDestroyId>(body).id)
                .ok_or(BAD_HANDLE)?;
            if let Some(peer) = id.peer {
                let (qpn, kind) = match d.ids.get_mut(&peer) {
                    Some(p) => {
                        p.peer = None;
                        // Not answered yet: a refusal.
                        (
                            p.qpn,
                            if id.qpn == 0 {
                                CmEventKind::Rejected
                            } else {
                                CmEventKind::Disconnected
                            },
                        )
                    }
                    None => return done(),
                };
                if kind == CmEventKind::Disconnected {
                    errored(d, qpn);
                    errored(d, id.qpn);
                }
                announce(host, d, kind, peer, 0, none, 0);
            }
            done()
        }
        Opcode::CmBindAddr => {
            let r = arg::<c::CmBindAddr>(body);
            if r.port != 0 && d.ids.values().any(|i| i.port == r.port) {
                return Err(VerbError::new(Errno::AddrInUse, Reason::PortInUse));
            }
            let port = if r.port == 0 {
                49_152 + r.id % 1000
            } else {
                r.port
            };
            d.ids.get_mut(&r.id).ok_or(BAD_HANDLE)?.port = port;
            Ok(c::CmAddr {
                gid: [9; 16],
                port,
                reserved: 0,
            }
            .as_bytes()
            .to_vec())
        }
        Opcode::CmListen => {
            d.ids
                .get_mut(&arg::<c::CmListen>(body).id)
                .ok_or(BAD_HANDLE)?
                .listening = true;
            done()
        }
        Opcode::CmResolveAddr => {
            let r = arg::<c::CmResolveAddr>(body);
            d.ids.get_mut(&r.id).ok_or(BAD_HANDLE)?.target = r.port;
            announce(host, d, CmEventKind::AddrResolved, r.id, 0, none, 0);
            done()
        }
        Opcode::CmResolveRoute => {
            let r = arg::<c::CmResolveRoute>(body);
            announce(host, d, CmEventKind::RouteResolved, r.id, 0, none, 0);
            done()
        }
        Opcode::CmConnect => {
            let r = arg::<c::CmConnect>(body);
            let from = d.ids.get_mut(&r.id).ok_or(BAD_HANDLE)?;
            from.qpn = r.param.qpn;
            let (target, space) = (from.target, from.space);
            let Some(listener) = d
                .ids
                .iter()
                .find(|(_, i)| i.listening && i.port == target && i.space == space)
                .map(|(h, _)| *h)
            else {
                let (kind, status) = if space == PortSpace::Udp as u32 {
                    (CmEventKind::Unreachable, 1)
                } else {
                    (CmEventKind::Rejected, 8)
                };
                announce(host, d, kind, r.id, 0, none, status);
                return done();
            };
            let new = d.handle();
            d.ids.insert(
                new,
                Id {
                    space,
                    peer: Some(r.id),
                    ..Id::default()
                },
            );
            d.ids.get_mut(&r.id).ok_or(BAD_HANDLE)?.peer = Some(new);
            announce(
                host,
                d,
                CmEventKind::ConnectRequest,
                new,
                listener,
                r.param,
                0,
            );
            done()
        }
        Opcode::CmAccept => {
            let r = arg::<c::CmAccept>(body);
            let id = d.ids.get_mut(&r.id).ok_or(BAD_HANDLE)?;
            id.qpn = r.param.qpn;
            let peer = id
                .peer
                .ok_or(VerbError::new(Errno::NotConn, Reason::CmState))?;
            let kind = if id.space == PortSpace::Udp as u32 {
                CmEventKind::Established
            } else {
                CmEventKind::ConnectResponse
            };
            announce(host, d, kind, peer, 0, r.param, 0);
            done()
        }
        Opcode::CmReject => {
            let r = arg::<c::CmReject>(body);
            let id = d.ids.get_mut(&r.id).ok_or(BAD_HANDLE)?;
            let peer = id
                .peer
                .take()
                .ok_or(VerbError::new(Errno::NotConn, Reason::CmState))?;
            let param = CmParam {
                private_len: r.private_len,
                private: r.private,
                ..none
            };
            let (kind, status) = if id.space == PortSpace::Udp as u32 {
                (CmEventKind::Unreachable, 2)
            } else {
                (CmEventKind::Rejected, 28)
            };
            announce(host, d, kind, peer, 0, param, status);
            done()
        }
        Opcode::CmEstablish => {
            let id = arg::<c::CmEstablish>(body).id;
            let peer = d.ids.get(&id).and_then(|i| i.peer).ok_or(BAD_HANDLE)?;
            announce(host, d, CmEventKind::Established, id, 0, none, 0);
            announce(host, d, CmEventKind::Established, peer, 0, none, 0);
            done()
        }
        Opcode::CmDisconnect => {
            let id = arg::<c::CmDisconnect>(body).id;
            let this = d.ids.get_mut(&id).ok_or(BAD_HANDLE)?;
            let (peer, qpn) = (
                this.peer
                    .take()
                    .ok_or(VerbError::new(Errno::NotConn, Reason::CmState))?,
                this.qpn,
            );
            errored(d, qpn);
            announce(host, d, CmEventKind::Disconnected, id, 0, none, 0);
            if let Some(p) = d.ids.get_mut(&peer) {
                p.peer = None;
                let qpn = p.qpn;
                errored(d, qpn);
                announce(host, d, CmEventKind::Disconnected, peer, 0, none, 0);
            }
            done()
        }
        Opcode::CmGetEvent => match d.events.pop_front() {
            Some(event) => Ok(event.as_bytes().to_vec()),
            None => Err(VerbError::new(Errno::Again, Reason::NoEvent)),
        },
        other => panic!("{other:?} is not of this part"),
    }
}
