//! What a QP keeps whose peer is on another host.

use std::collections::VecDeque;

use hyv_abi::control::QpAttr;
use hyv_abi::queue::WcStatus;
use hyv_abi::types::{QpType, ack_timeout_ns};
use hyv_roce::carrier::{DEFAULT_HOP_LIMIT, Flow, Gid};
use hyv_roce::icrc;
use hyv_roce::transport::{
    Psn, Requester, RequesterConfig, Responder, ResponderConfig, Unreliable,
};
use hyv_roce::wire::Service;

use crate::objects::{Qp, Wr};

/// The receiving half.
pub(super) enum Receiver {
    Rc(Responder),
    Uc(Unreliable),
}

pub(crate) struct WireQp {
    pub(super) flow: Flow,
    pub(super) crc: icrc::Flow,
    pub(super) mtu: u32,
    pub(super) dest_qpn: u32,
    pub(super) service: Service,
    pub(super) receiver: Receiver,
    /// From RTS on.
    pub(super) requester: Option<Requester>,
    /// Work requests in flight: those of the requester's messages, and at the end perhaps one that cannot go.
    pub(super) wrs: VecDeque<Box<Wr>>,
    /// The work request (by its position in the queue) that cannot go on, and why: it fails once those before it are complete.
    /// With [`WcStatus::Success`] it is one that needs no peer, and is executed then.
    pub(super) stuck: Option<(u32, WcStatus)>,
    /// The event of a refusal, raised once the NAK has left.
    pub(super) event: u64,
    /// When its entry in the heap of timers is due.
    pub(super) armed: Option<u64>,
    /// An acknowledgement waits until then (ns) for something to travel with.
    pub(super) lazy: Option<u64>,
    /// It is in the list of QPs that have something to send.
    pub(super) is_ready: bool,
}

impl WireQp {
    /// For a QP that enters RTR.
    pub fn new(qp: &Qp, local: &Gid, ports: (u16, u16)) -> Self {
        let attr = &qp.attr;
        let psn = Psn::new(attr.rq_psn);
        let port = source_port(ports, qp.qpn);
        let (service, receiver) = if qp.ty == QpType::Uc {
            (
                Service::Uc,
                Receiver::Uc(Unreliable::new(psn, attr.path_mtu)),
            )
        } else {
            let config = ResponderConfig {
                psn,
                mtu: attr.path_mtu,
                max_dest_rd_atomic: attr.max_dest_rd_atomic,
            };
            (Service::Rc, Receiver::Rc(Responder::new(config)))
        };
        Self {
            flow: flow(attr, port),
            crc: icrc::Flow::new(local, &attr.dest_gid, port),
            mtu: attr.path_mtu,
            dest_qpn: attr.dest_qp_num,
            service,
            receiver,
            requester: None,
            wrs: VecDeque::new(),
            stuck: None,
            event: 0,
            armed: None,
            lazy: None,
            is_ready: false,
        }
    }

    /// Takes new attributes over: on the way to RTS, in RTS and in SQD.
    pub fn update(&mut self, qpn: u32, attr: &QpAttr, local: &Gid) {
        let config = RequesterConfig {
            qpn,
            psn: Psn::new(attr.sq_psn),
            mtu: attr.path_mtu,
            retry_cnt: attr.retry_cnt,
            rnr_retry: attr.rnr_retry,
            timeout_ns: ack_timeout_ns(attr.timeout),
            max_rd_atomic: attr.max_rd_atomic,
            reliable: self.service == Service::Rc,
        };
        match &mut self.requester {
            None => self.requester = Some(Requester::new(config)),
            Some(r) => r.reconfigure(config),
        }
        if let Receiver::Rc(r) = &mut self.receiver {
            r.set_max_dest_rd_atomic(attr.max_dest_rd_atomic);
        }
        self.flow = flow(attr, self.flow.src_port);
        self.crc = icrc::Flow::new(local, &attr.dest_gid, self.flow.src_port);
    }

    /// The QP is in error: nothing is sent or taken any more. Gives the position of the oldest work request in flight.
    pub fn hang_up(&mut self) -> Option<u32> {
        let first = self.wrs.front().map(|wr| wr.index);
        self.wrs.clear();
        self.stuck = None;
        self.requester = None;
        first
    }

    /// When it wants a timer, ns.
    pub fn deadline(&self) -> Option<u64> {
        self.requester.as_ref().and_then(Requester::deadline)
    }
}

/// A QP's source port. Neighbours get different ones: receive-side scaling and equal-cost paths spread by them.
pub(super) fn source_port(ports: (u16, u16), qpn: u32) -> u16 {
    ports.0 + (qpn % u32::from(ports.1.max(1))) as u16
}

/// Where a QP's packets go.
pub(super) fn flow(attr: &QpAttr, src_port: u16) -> Flow {
    Flow {
        dst: attr.dest_gid,
        src_port,
        traffic_class: attr.traffic_class as u8,
        hop_limit: match attr.hop_limit as u8 {
            0 => DEFAULT_HOP_LIMIT,
            n => n,
        },
        flow_label: attr.flow_label & 0xf_ffff,
    }
}
