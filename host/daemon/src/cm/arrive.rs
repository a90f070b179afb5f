//! The way in: what a peer's MADs do. All of it is input that anybody can make up: a message counts only in the
//! conversation that it names rightly, from the address that the conversation is with, where it has its place.

use hyv_abi::control::{CmParam, PRIVATE_LEN, PortSpace};
use hyv_roce::mad::{
    Drep, Dreq, METHOD_SEND, Mad as Cmd, Message as Body, Mra, Rej, Rejected, Rep, Req, Rtu,
    SidrRep, SidrReq, SidrStatus, TransportType, rdma_cm,
};

use super::link::{Answers, Link, LinkId, Phase};
use super::message::{Message, To};
use super::wire::{mtu_code, rejection};
use super::{Cm, Gid, Mad, Peer, limits, rej, sidr};

/// Queue pairs 0 and 1 are for management.
const FIRST_QPN: u32 = 2;
/// The group that queue pair numbers of multicast have.
const MULTICAST_QPN: u32 = 0xff_ffff;

fn is_qpn(qpn: u32) -> bool {
    (FIRST_QPN..MULTICAST_QPN).contains(&qpn)
}

/// The bytes behind a header, as private data of an event.
fn with_private(mut param: CmParam, bytes: &[u8]) -> Box<CmParam> {
    let len = bytes.len().min(PRIVATE_LEN);
    param.private[..len].copy_from_slice(&bytes[..len]);
    param.private_len = len as u32;
    Box::new(param)
}

impl Cm {
    /// A MAD came to QP1 from a peer's QP1. Whatever it holds, it ends no more than the conversation it belongs to.
    pub fn handle_mad(&mut self, src: &Gid, mad: &Mad, now_ns: u64) {
        self.tick(now_ns);
        self.stats.received += 1;
        let Some(wire) = self.wire else { return };
        let parsed = Cmd::parse(mad).ok().filter(|m| m.method == METHOD_SEND);
        let Some(Cmd {
            transaction: tid,
            message,
            ..
        }) = parsed.filter(|_| !self.gids.contains(src))
        else {
            self.stats.malformed += 1;
            return;
        };
        match message {
            Body::Req(m) => self.on_mad_req(*src, tid, &m, wire.path_mtu),
            Body::Rep(m) => self.on_mad_rep(*src, tid, &m),
            Body::Rtu(m) => self.on_mad_rtu(*src, &m),
            Body::Mra(m) => self.on_mad_mra(*src, &m),
            Body::Rej(m) => self.on_mad_rej(*src, &m),
            Body::Dreq(m) => self.on_mad_dreq(*src, tid, &m),
            Body::Drep(m) => self.on_mad_drep(*src, &m),
            Body::SidrReq(m) => self.on_mad_sidr_req(*src, tid, &m),
            Body::SidrRep(m) => self.on_mad_sidr_rep(*src, &m),
            // LAP and APR: there are no alternate paths, as with Linux.
            Body::Other { .. } => self.stats.strays += 1,
        }
        self.settle();
    }

    /// The conversation that both numbers and the address name.
    fn known(&self, src: Gid, ours: u32, theirs: u32) -> Option<(LinkId, &Link)> {
        let id = LinkId(ours);
        let link = self.links.get(id)?;
        (link.peer == src && !link.sidr && link.remote == theirs && theirs != 0)
            .then_some((id, link))
    }

    /// The address of this host from which something nobody asked for is answered.
    fn answering(&self, wanted: Gid) -> Gid {
        if self.gids.contains(&wanted) {
            wanted
        } else {
            self.gids.first().copied().unwrap_or_default()
        }
    }

    fn stray(&mut self) {
        self.stats.strays += 1;
    }

    /// A repetition of something: the answer is repeated, or patience is asked for where there is none yet.
    fn repeat(&mut self, id: LinkId, what: Answers) {
        self.stats.duplicates += 1;
        let Some(link) = self.links.get(id) else {
            return;
        };
        if link.answers == Some(what) {
            self.link_resend(id);
        } else if (link.phase, what) == (Phase::ReqRcvd, Answers::Req)
            || (link.phase, what) == (Phase::RepRcvd, Answers::Rep)
        {
            self.link_patience(id);
        }
    }

    /// The peer has forgotten a connection: it uses the same queue pair for another.
    fn drop_stale(&mut self, id: LinkId) {
        let waiting = self.links.get(id).map(|l| l.phase) == Some(Phase::ReqRcvd);
        self.link_over(id);
        let message = if waiting {
            Message::rej(rej::STALE_CONNECTION)
        } else {
            Message::Dreq
        };
        self.link_tell(id, message);
    }

    fn on_mad_req(&mut self, src: Gid, tid: u64, req: &Req, most: u32) {
        if let Some(id) = self.links.of_remote(src, false, req.local_comm_id) {
            return self.repeat(id, Answers::Req);
        }
        let local = self.answering(req.primary.remote_gid);
        let verdict = self.judge(req, most);
        let stale = self.links.of_qpn(src, req.local_qpn);
        let reason = match (verdict, stale) {
            (Err(reason), _) => reason,
            (Ok(_), Some(old)) => {
                self.drop_stale(old);
                rej::STALE_CONNECTION
            }
            (Ok((header, port)), None) => {
                let code = |c: u8| c.clamp(limits::MIN_PEER_TIMEOUT, limits::MAX_PEER_TIMEOUT);
                let mut link = Link::new(None, header.dst, src, Phase::ReqRcvd);
                (link.tid, link.remote) = (tid, req.local_comm_id);
                link.remote_qpn = req.local_qpn;
                link.max_retries = req.max_cm_retries;
                link.interval_ns = limits::response_ns(code(req.local_cm_timeout));
                link.patience_ns = limits::response_ns(code(req.remote_cm_timeout));
                let patience = link.patience_ns / 2;
                let id = self.links.insert(link);
                // Before the peer thinks that its request was lost.
                self.links
                    .set_deadline(id, Some(self.now_ns.saturating_add(patience)));
                let param = CmParam {
                    qpn: req.local_qpn,
                    psn: req.starting_psn,
                    responder_resources: req.responder_resources,
                    initiator_depth: req.initiator_depth,
                    retry_count: req.retry_count,
                    rnr_retry_count: req.rnr_retry_count,
                    path_mtu: 128 << req.path_mtu,
                    ack_timeout: req.primary.local_ack_timeout.into(),
                    ..CmParam::EMPTY
                };
                return self.send(
                    Peer::There(id),
                    To::Port(PortSpace::Tcp, header.dst, port),
                    Message::Req {
                        from: (src, header.src_port),
                        param: with_private(param, &req.private[rdma_cm::HEADER_LEN..]),
                    },
                );
            }
        };
        let no = rejection(0, req.local_comm_id, Rejected::Req, reason);
        self.reply(local, src, tid, Body::Rej(no));
    }

    /// Whether a request can be served at all: its addresses and port, or the reason for a REJ.
    fn judge(&self, req: &Req, most: u32) -> Result<(rdma_cm::Header, u16), u32> {
        let Some((rdma_cm::PortSpace::Tcp, port)) = rdma_cm::port_of(req.service_id) else {
            return Err(rej::INVALID_SERVICE_ID);
        };
        let (header, _) =
            rdma_cm::Header::parse(&req.private).map_err(|_malformed| rej::UNSUPPORTED)?;
        if !self.gids.contains(&header.dst) {
            return Err(rej::INVALID_GID);
        }
        if req.transport != TransportType::Rc {
            return Err(rej::INVALID_TRANSPORT_TYPE);
        }
        if !(1..=mtu_code(most)).contains(&req.path_mtu) {
            return Err(rej::INVALID_MTU);
        }
        if req.local_comm_id == 0 || !is_qpn(req.local_qpn) {
            return Err(rej::UNSUPPORTED);
        }
        Ok((header, port))
    }

    fn on_mad_rep(&mut self, src: Gid, tid: u64, rep: &Rep) {
        if let Some((id, link)) = self.known(src, rep.remote_comm_id, rep.local_comm_id)
            && link.phase != Phase::ReqSent
        {
            return self.repeat(id, Answers::Rep);
        }
        let id = LinkId(rep.remote_comm_id);
        let link = self.links.get(id).filter(|l| l.peer == src && !l.sidr);
        let Some(link) = link.filter(|l| l.phase == Phase::ReqSent) else {
            self.stray();
            if self.links.get(id).is_none() {
                // It waits for an answer; this one saves it the repetitions.
                let no = rejection(
                    rep.remote_comm_id,
                    rep.local_comm_id,
                    Rejected::Rep,
                    rej::INVALID_COMM_ID,
                );
                let local = self.answering([0; 16]);
                self.reply(local, src, tid, Body::Rej(no));
            }
            return;
        };
        let local = link.local;
        if rep.local_comm_id == 0 || !is_qpn(rep.local_qpn) {
            self.stats.malformed += 1;
            return;
        }
        let stale = self
            .links
            .of_remote(src, false, rep.local_comm_id)
            .or_else(|| self.links.of_qpn(src, rep.local_qpn));
        if let Some(old) = stale {
            self.drop_stale(old);
            let no = rejection(
                id.0,
                rep.local_comm_id,
                Rejected::Rep,
                rej::STALE_CONNECTION,
            );
            self.reply(local, src, tid, Body::Rej(no));
            self.link_tell(id, Message::rej(rej::STALE_CONNECTION));
            return self.links.remove(id);
        }
        self.links.learn(id, rep.local_comm_id, rep.local_qpn);
        let half = self.links.get_mut(id).map_or(0, |link| {
            link.phase = Phase::RepRcvd;
            (link.last, link.answers) = (None, None);
            link.patience_ns / 2
        });
        self.links
            .set_deadline(id, Some(self.now_ns.saturating_add(half)));
        let param = CmParam {
            qpn: rep.local_qpn,
            psn: rep.starting_psn,
            responder_resources: rep.responder_resources,
            initiator_depth: rep.initiator_depth,
            rnr_retry_count: rep.rnr_retry_count,
            ..CmParam::EMPTY
        };
        let param = with_private(param, &rep.private);
        self.link_tell(id, Message::Rep { param });
    }

    fn on_mad_rtu(&mut self, src: Gid, rtu: &Rtu) {
        match self.known(src, rtu.remote_comm_id, rtu.local_comm_id) {
            Some((id, link)) if link.phase == Phase::RepSent => {
                self.link_established(id);
                self.link_tell(id, Message::Rtu);
            }
            Some((_, link)) if link.phase == Phase::Established => self.stats.duplicates += 1,
            _ => self.stray(),
        }
    }

    fn on_mad_mra(&mut self, src: Gid, mra: &Mra) {
        let id = LinkId(mra.remote_comm_id);
        let link = self.links.get(id).filter(|l| l.peer == src && !l.sidr);
        let rightly = link.is_some_and(|l| match l.phase {
            Phase::ReqSent => mra.message == Rejected::Req,
            Phase::RepSent => mra.message == Rejected::Rep && l.remote == mra.local_comm_id,
            _ => false,
        });
        let (Some(link), true) = (link, rightly) else {
            return self.stray();
        };
        // Retries are used up all the same, so a peer that never answers is given up in the end.
        let service =
            limits::response_ns(mra.service_timeout.min(limits::MAX_PEER_SERVICE_TIMEOUT));
        let at = self
            .now_ns
            .saturating_add(service)
            .saturating_add(link.interval_ns);
        self.links.set_deadline(id, Some(at));
    }

    fn on_mad_rej(&mut self, src: Gid, reject: &Rej) {
        // A peer that gave up on its request has never seen our number; one that refuses ours may have none itself.
        let id = match reject.remote_comm_id {
            0 => self.links.of_remote(src, false, reject.local_comm_id),
            n => Some(LinkId(n)),
        };
        let link = id.and_then(|id| Some((id, self.links.get(id)?)));
        let link = link.filter(|(_, l)| {
            let theirs = reject.local_comm_id;
            l.peer == src && !l.sidr && (l.remote == theirs || l.phase == Phase::ReqSent)
        });
        let Some((id, link)) = link else {
            return self.stray();
        };
        let phase = link.phase;
        if phase == Phase::TimeWait {
            self.stats.duplicates += 1;
            return;
        }
        self.link_over(id);
        let message = if phase == Phase::DreqSent {
            Message::Drep
        } else {
            Message::Rej {
                reason: u32::from(reject.reason.0),
                param: with_private(CmParam::EMPTY, &reject.private),
            }
        };
        self.link_tell(id, message);
        if phase == Phase::ReqSent {
            self.links.remove(id);
        }
    }

    fn on_mad_dreq(&mut self, src: Gid, tid: u64, dreq: &Dreq) {
        let Some((id, link)) = self.known(src, dreq.remote_comm_id, dreq.local_comm_id) else {
            self.stray();
            // Section 12.9.8.3: whoever no longer knows a connection agrees to its end.
            let drep = Drep {
                local_comm_id: dreq.remote_comm_id,
                remote_comm_id: dreq.local_comm_id,
                private: [0; Drep::PRIVATE],
            };
            let local = self.answering([0; 16]);
            return self.reply(local, src, tid, Body::Drep(drep));
        };
        if link.answers == Some(Answers::Dreq) {
            return self.repeat(id, Answers::Dreq);
        }
        let right = dreq.remote_qpn == link.local_qpn;
        let (phase, owned) = (link.phase, link.owner.is_some());
        match phase {
            Phase::RepSent | Phase::RepRcvd | Phase::Established | Phase::DreqSent if right => {
                if let Some(link) = self.links.get_mut(id) {
                    link.tid = tid;
                }
                if owned {
                    self.link_tell(id, Message::Dreq);
                } else {
                    self.link_send(id, Message::Drep);
                }
            }
            _ => self.stray(),
        }
    }

    fn on_mad_drep(&mut self, src: Gid, drep: &Drep) {
        match self.known(src, drep.remote_comm_id, drep.local_comm_id) {
            Some((id, link)) if link.phase == Phase::DreqSent => {
                self.link_over(id);
                self.link_tell(id, Message::Drep);
            }
            Some((_, link)) if link.phase == Phase::TimeWait => self.stats.duplicates += 1,
            _ => self.stray(),
        }
    }

    fn on_mad_sidr_req(&mut self, src: Gid, tid: u64, req: &SidrReq) {
        if let Some(id) = self.links.of_remote(src, true, req.request_id) {
            return self.repeat(id, Answers::Req);
        }
        let port = match rdma_cm::port_of(req.service_id) {
            Some((rdma_cm::PortSpace::Udp, port)) => Some(port),
            _ => None,
        };
        let header = rdma_cm::Header::parse(&req.private).ok();
        let header = header.filter(|(h, _)| self.gids.contains(&h.dst));
        let (Some(port), Some((header, private))) = (port, header) else {
            let no = SidrRep {
                request_id: req.request_id,
                status: SidrStatus(sidr::UNSUPPORTED as u8),
                info_len: 0,
                qpn: 0,
                service_id: req.service_id,
                qkey: 0,
                info: [0; SidrRep::INFO],
                private: [0; SidrRep::PRIVATE],
            };
            let local = self.answering([0; 16]);
            return self.reply(local, src, tid, Body::SidrRep(no));
        };
        let mut link = Link::new(None, header.dst, src, Phase::ReqRcvd);
        (link.sidr, link.service) = (true, req.service_id);
        (link.tid, link.remote) = (tid, req.request_id);
        let id = self.links.insert(link);
        self.send(
            Peer::There(id),
            To::Port(PortSpace::Udp, header.dst, port),
            Message::Req {
                from: (src, header.src_port),
                param: with_private(CmParam::EMPTY, private),
            },
        );
    }

    fn on_mad_sidr_rep(&mut self, src: Gid, rep: &SidrRep) {
        let id = LinkId(rep.request_id);
        let link = self.links.get(id);
        if !link.is_some_and(|l| l.sidr && l.peer == src && l.phase == Phase::ReqSent) {
            return self.stray();
        }
        let status = u32::from(rep.status.0);
        if status == sidr::OK && !is_qpn(rep.qpn) {
            self.stats.malformed += 1;
            return;
        }
        let param = CmParam {
            qpn: rep.qpn,
            qkey: rep.qkey,
            ..CmParam::EMPTY
        };
        let param = with_private(param, &rep.private);
        self.link_tell(id, Message::SidrRep { status, param });
        self.links.remove(id);
    }
}
