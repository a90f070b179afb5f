//! The way out: an identifier's messages become MADs, which are repeated until they are answered (InfiniBand
//! Architecture 1.4, sections 12.6, 12.9.7 and 12.11).

use hyv_abi::control::{CmParam, PortSpace};
use hyv_roce::mad::{
    Drep, Dreq, Mad as Cmd, Message as Body, Mra, Path, Rej, RejectReason, Rejected, Rep, Req, Rtu,
    SidrRep, SidrReq, SidrStatus, TransportType, rdma_cm,
};

use super::link::{Answers, Link, LinkId, Phase};
use super::message::{Message, To};
use super::{Cm, Effect, Gid, IdKey, Mad, Peer, limits, rej};

/// The full partition, the only one that there is (InfiniBand Architecture 1.4, 10.9.2).
const DEFAULT_PKEY: u16 = 0xffff;
/// What stands for a LID where there are none.
const NO_LID: u16 = 0xffff;

/// What connection management says of this host to others.
#[derive(Clone, Copy, Debug)]
pub struct CmWire {
    /// GUID of the device.
    pub ca_guid: u64,
    /// Largest path MTU that the link takes, bytes: 256 to 4096.
    pub path_mtu: u32,
    /// IPv4 TOS or IPv6 traffic class of connections: DSCP and ECN.
    pub traffic_class: u8,
    /// Where communication IDs begin; unpredictable, so that nobody else can speak for a peer.
    pub seed: u64,
}

/// Counts since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MadStats {
    /// MADs received.
    pub received: u64,
    /// Of those: not to be understood, or from where none can come.
    pub malformed: u64,
    /// Of those: repetitions of something that was dealt with.
    pub duplicates: u64,
    /// Of those: about conversations that do not exist (any more), or out of place in theirs.
    pub strays: u64,
    /// MADs sent, repetitions included.
    pub sent: u64,
    /// MADs sent again because no answer came.
    pub repeated: u64,
    /// Conversations given up because no answer came.
    pub timed_out: u64,
}

/// The code of a path MTU: 1 is 256, 5 is 4096.
pub(super) const fn mtu_code(bytes: u32) -> u8 {
    (bytes.ilog2() as u8).saturating_sub(7)
}

/// The transaction ID of the exchanges that this side begins.
const fn own_tid(id: LinkId) -> u64 {
    1 << 32 | id.0 as u64
}

/// The first bytes of a user's private data.
fn private<const N: usize>(param: &CmParam) -> [u8; N] {
    let mut bytes = [0; N];
    let len = N.min(param.private.len());
    bytes[..len].copy_from_slice(&param.private[..len]);
    bytes
}

/// RDMA CM's header and behind it a user's private data.
fn with_header<const N: usize>(header: &rdma_cm::Header, param: &CmParam) -> [u8; N] {
    let mut bytes = [0; N];
    header.emit(&mut bytes);
    let len = N - rdma_cm::HEADER_LEN;
    bytes[rdma_cm::HEADER_LEN..].copy_from_slice(&param.private[..len]);
    bytes
}

impl Cm {
    fn emit(&mut self, src: Gid, dst: Gid, mad: Box<Mad>) {
        self.stats.sent += 1;
        self.effects.push(Effect::SendMad { src, dst, mad });
    }

    /// Sends a MAD that nothing is kept of.
    pub(super) fn reply(&mut self, src: Gid, dst: Gid, tid: u64, body: Body) {
        self.emit(src, dst, Box::new(Cmd::new(tid, body).to_bytes()));
    }

    /// Sends a link's last MAD (once more).
    pub(super) fn link_resend(&mut self, id: LinkId) {
        if let Some(link) = self.links.get(id)
            && let Some(mad) = link.last.clone()
        {
            let (src, dst) = (link.local, link.peer);
            self.emit(src, dst, mad);
        }
    }

    /// Sends a MAD of a link and keeps it: to be repeated, or for duplicates of what it answers.
    fn link_say(&mut self, id: LinkId, phase: Phase, answers: Option<Answers>, body: Body) {
        let now = self.now_ns;
        let Some(link) = self.links.get_mut(id) else {
            return;
        };
        link.phase = phase;
        link.answers = answers;
        link.last = Some(Box::new(Cmd::new(link.tid, body).to_bytes()));
        link.retries_left = link.max_retries;
        let deadline = phase
            .repeats()
            .then(|| now.saturating_add(link.interval_ns));
        match phase {
            Phase::TimeWait => self.link_time_wait(id),
            _ => self.links.set_deadline(id, deadline),
        }
        self.link_resend(id);
    }

    /// The conversation ended without a last word of this side: nothing of it is answered any more.
    pub(super) fn link_over(&mut self, id: LinkId) {
        if let Some(link) = self.links.get_mut(id) {
            (link.last, link.answers) = (None, None);
        }
        self.link_time_wait(id);
    }

    fn link_time_wait(&mut self, id: LinkId) {
        // A peer that was asked for patience may be silent for as long before it says something again.
        let patience = match self.links.get(id) {
            Some(link) if link.asked_patience => limits::response_ns(limits::MRA_REQ_TIMEOUT),
            _ => 0,
        };
        let until = self.now_ns + limits::TIME_WAIT_NS + patience;
        self.links.time_wait(id, until);
    }

    /// Passes a message of the peer on to the identifier.
    pub(super) fn link_tell(&mut self, id: LinkId, message: Message) {
        if let Some(owner) = self.links.get(id).and_then(|l| l.owner) {
            self.send(Peer::There(id), To::Peer(Peer::Here(owner)), message);
            self.settle();
        }
    }

    /// A request found its listener, which has an identifier for it.
    pub(super) fn link_owned(&mut self, id: LinkId, owner: IdKey) {
        if let Some(link) = self.links.get_mut(id) {
            link.owner = Some(owner);
        }
    }

    /// The peer sends, so it is ready.
    pub(super) fn link_established(&mut self, id: LinkId) {
        if let Some(link) = self.links.get_mut(id)
            && link.phase == Phase::RepSent
        {
            link.phase = Phase::Established;
            self.links.set_deadline(id, None);
        }
    }

    /// An identifier asks a peer on another host.
    pub(super) fn call_out(&mut self, key: IdKey, param: &CmParam) {
        let (Some(id), Some(wire)) = (self.id(key), self.wire) else {
            return;
        };
        let (space, local, (peer, port)) = (id.space, id.gid, id.remote);
        let header = rdma_cm::Header {
            src_port: id.port,
            src: local,
            dst: peer,
        };
        let mut link = Link::new(Some(key), local, peer, Phase::ReqSent);
        link.sidr = space == PortSpace::Udp;
        link.local_qpn = param.qpn;
        let link_id = self.links.insert(link);
        if let Some(link) = self.links.get_mut(link_id) {
            link.tid = own_tid(link_id);
        }
        if let Some(id) = self.id_mut(key) {
            id.peer = Some(Peer::There(link_id));
        }
        let body = match space {
            PortSpace::Udp => Body::SidrReq(SidrReq {
                request_id: link_id.0,
                pkey: DEFAULT_PKEY,
                service_id: rdma_cm::service_id(rdma_cm::PortSpace::Udp, port),
                private: with_header(&header, param),
            }),
            PortSpace::Tcp => Body::Req(Req {
                local_comm_id: link_id.0,
                service_id: rdma_cm::service_id(rdma_cm::PortSpace::Tcp, port),
                local_ca_guid: wire.ca_guid,
                local_qkey: 0,
                local_qpn: param.qpn,
                responder_resources: param.responder_resources,
                local_eecn: 0,
                initiator_depth: param.initiator_depth,
                remote_eecn: 0,
                remote_cm_timeout: limits::RESPONSE_TIMEOUT,
                transport: TransportType::Rc,
                flow_control: false,
                starting_psn: param.psn,
                local_cm_timeout: limits::RESPONSE_TIMEOUT,
                retry_count: param.retry_count,
                pkey: DEFAULT_PKEY,
                path_mtu: mtu_code(param.path_mtu),
                rdc_exists: false,
                rnr_retry_count: param.rnr_retry_count,
                max_cm_retries: limits::MAX_CM_RETRIES,
                srq: false,
                extended_transport: 0,
                primary: Path {
                    local_lid: NO_LID,
                    remote_lid: NO_LID,
                    local_gid: local,
                    remote_gid: peer,
                    traffic_class: wire.traffic_class,
                    hop_limit: hyv_roce::carrier::DEFAULT_HOP_LIMIT,
                    local_ack_timeout: param.ack_timeout as u8,
                    ..Path::default()
                },
                alternate: Path::default(),
                private: with_header(&header, param),
            }),
        };
        self.link_say(link_id, Phase::ReqSent, None, body);
    }

    /// A message of the identifier for its peer on another host.
    pub(super) fn link_send(&mut self, id: LinkId, message: Message) {
        let Some(link) = self.links.get(id) else {
            // It is over. The identifier need not wait for an answer.
            return;
        };
        let (local, remote, phase) = (id.0, link.remote, link.phase);
        let ca_guid = self.wire.map_or(0, |w| w.ca_guid);
        match (message, phase) {
            (Message::SidrRep { status, param }, Phase::ReqRcvd) => {
                let service = link.service;
                let reply = SidrRep {
                    request_id: remote,
                    status: SidrStatus(status as u8),
                    info_len: 0,
                    qpn: param.qpn,
                    service_id: service,
                    qkey: param.qkey,
                    info: [0; SidrRep::INFO],
                    private: private(&param),
                };
                self.link_end(id, Some(Answers::Req), Body::SidrRep(reply));
            }
            (Message::Rep { param }, Phase::ReqRcvd) => {
                if let Some(link) = self.links.get_mut(id) {
                    link.local_qpn = param.qpn;
                }
                let reply = Rep {
                    local_comm_id: local,
                    remote_comm_id: remote,
                    local_qkey: 0,
                    local_qpn: param.qpn,
                    local_eecn: 0,
                    starting_psn: param.psn,
                    responder_resources: param.responder_resources,
                    initiator_depth: param.initiator_depth,
                    target_ack_delay: limits::TARGET_ACK_DELAY,
                    failover: 0,
                    flow_control: false,
                    rnr_retry_count: param.rnr_retry_count,
                    srq: false,
                    local_ca_guid: ca_guid,
                    private: private(&param),
                };
                self.link_say(id, Phase::RepSent, Some(Answers::Req), Body::Rep(reply));
            }
            (Message::Rtu, Phase::RepRcvd) => {
                let rtu = Rtu {
                    local_comm_id: local,
                    remote_comm_id: remote,
                    private: [0; Rtu::PRIVATE],
                };
                self.link_say(id, Phase::Established, Some(Answers::Rep), Body::Rtu(rtu));
            }
            // A request for a datagram's queue pair cannot be taken back.
            (Message::Rej { .. }, _) if link.sidr => self.links.remove(id),
            (
                Message::Rej { reason, param },
                Phase::ReqSent | Phase::ReqRcvd | Phase::RepRcvd | Phase::RepSent,
            ) => {
                let (message, answers, comm_id) = match phase {
                    // As Linux does: it has told nobody its number yet.
                    Phase::ReqRcvd => (Rejected::Req, Some(Answers::Req), 0),
                    Phase::RepRcvd => (Rejected::Rep, Some(Answers::Rep), local),
                    _ => (Rejected::Other, None, local),
                };
                let mut reject = rejection(comm_id, remote, message, reason);
                reject.private = private(&param);
                if reason == rej::TIMEOUT {
                    // Section 12.6.7.2: who gave up, for a peer that has never seen our number.
                    reject.info_len = 8;
                    reject.info[..8].copy_from_slice(&ca_guid.to_be_bytes());
                }
                self.link_end(id, answers, Body::Rej(reject));
                if phase == Phase::ReqSent {
                    self.links.remove(id);
                }
            }
            (Message::Dreq, Phase::RepSent | Phase::RepRcvd | Phase::Established) => {
                let remote_qpn = link.remote_qpn;
                if let Some(link) = self.links.get_mut(id) {
                    link.tid = own_tid(id);
                }
                let dreq = Dreq {
                    local_comm_id: local,
                    remote_comm_id: remote,
                    remote_qpn,
                    private: [0; Dreq::PRIVATE],
                };
                self.link_say(id, Phase::DreqSent, None, Body::Dreq(dreq));
            }
            (
                Message::Drep,
                Phase::RepSent | Phase::RepRcvd | Phase::Established | Phase::DreqSent,
            ) => {
                let drep = Drep {
                    local_comm_id: local,
                    remote_comm_id: remote,
                    private: [0; Drep::PRIVATE],
                };
                self.link_end(id, Some(Answers::Dreq), Body::Drep(drep));
            }
            // The conversation has moved on, and the identifier is being told.
            _ => {}
        }
    }

    /// The last word of a conversation. Nothing is kept of one that never had an identifier: whoever repeats a refused
    /// request is refused anew, at no cost of memory.
    fn link_end(&mut self, id: LinkId, answers: Option<Answers>, body: Body) {
        self.link_say(id, Phase::TimeWait, answers, body);
        if self.links.get(id).is_some_and(|l| l.owner.is_none()) {
            self.links.remove(id);
        }
    }

    /// Asks the peer for patience: the application takes its time.
    pub(super) fn link_patience(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(id) else {
            return;
        };
        let (message, service_timeout) = match link.phase {
            Phase::ReqRcvd if !link.sidr => (Rejected::Req, limits::MRA_REQ_TIMEOUT),
            Phase::RepRcvd => (Rejected::Rep, limits::MRA_REP_TIMEOUT),
            _ => return,
        };
        let mra = Mra {
            local_comm_id: id.0,
            remote_comm_id: link.remote,
            message,
            service_timeout,
            private: [0; Mra::PRIVATE],
        };
        link.asked_patience = true;
        let (src, dst, tid) = (link.local, link.peer, link.tid);
        self.reply(src, dst, tid, Body::Mra(mra));
        let half = limits::response_ns(service_timeout) / 2;
        self.links
            .set_deadline(id, Some(self.now_ns.saturating_add(half)));
    }

    /// Repeats, gives up and forgets what it is time for.
    pub(super) fn link_timeouts(&mut self) {
        while let Some((at, id)) = self.links.next_timeout() {
            if at > self.now_ns {
                break;
            }
            self.links.set_deadline(id, None);
            self.link_timeout(id);
        }
    }

    fn link_timeout(&mut self, id: LinkId) {
        let now = self.now_ns;
        let Some(link) = self.links.get_mut(id) else {
            return;
        };
        match link.phase {
            phase if phase.repeats() && link.retries_left > 0 => {
                link.retries_left -= 1;
                let next = now.saturating_add(link.interval_ns);
                self.links.set_deadline(id, Some(next));
                self.stats.repeated += 1;
                self.link_resend(id);
            }
            Phase::ReqSent | Phase::RepSent => {
                self.stats.timed_out += 1;
                // Told first: afterwards the link may be no more.
                self.link_tell(id, Message::Lost);
                self.link_send(id, Message::rej(rej::TIMEOUT));
            }
            Phase::DreqSent => {
                self.stats.timed_out += 1;
                self.link_tell(id, Message::Drep);
                self.links.remove(id);
            }
            Phase::ReqRcvd | Phase::RepRcvd => self.link_patience(id),
            Phase::TimeWait => self.links.remove(id),
            Phase::Established => {}
        }
    }
}

/// A REJ without private data.
pub(super) fn rejection(local: u32, remote: u32, message: Rejected, reason: u32) -> Rej {
    Rej {
        local_comm_id: local,
        remote_comm_id: remote,
        message,
        info_len: 0,
        reason: RejectReason(reason as u16),
        info: [0; Rej::INFO],
        private: [0; Rej::PRIVATE],
    }
}
