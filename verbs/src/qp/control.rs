//! A queue pair's states: attributes, transitions, and what each type of queue pair needs for them.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use hyv_abi::control::{DestroyQp, ModifyQp, QpAttr, QueryQp};
use hyv_abi::types::{Access, QpAttrMask, QpState, QpType};
use hyv_abi::window::Events;

use crate::context::{ContextInner, Gid};
use crate::cq::CqInner;
use crate::error::Error;
use crate::event::forget;
use crate::mr::PdInner;
use crate::shadow::QpShared;
use crate::srq::SrqInner;

/// What INIT → RTR needs of a connected queue pair: the peer and how to hear it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RtrParams {
    /// The peer's GID.
    pub dest_gid: Gid,
    /// The peer's QPN.
    pub dest_qpn: u32,
    /// First PSN that the peer sends, 24 bits.
    pub rq_psn: u32,
    /// Path MTU, bytes: 256 to 4096. Both sides take the same.
    pub path_mtu: u32,
    /// READs and atomics that the peer may have outstanding here (RC).
    pub max_dest_rd_atomic: u32,
    /// What the peer is told to wait for when no receive is posted (RC): a 5-bit code
    /// ([`hyv_abi::types::rnr_timer_ns`]).
    pub min_rnr_timer: u32,
    /// Traffic class of what is sent (DSCP and ECN).
    pub traffic_class: u8,
    /// Hop limit of what is sent; 0 takes the device's.
    pub hop_limit: u8,
    /// IPv6 flow label of what is sent, 20 bits.
    pub flow_label: u32,
    /// Index of the GID to send from ([`crate::Context::query_gid`]).
    pub sgid_index: u32,
}

impl RtrParams {
    /// To a peer, with the usual rest: an MTU of 4096, which peers on this host and on networks with large frames take.
    /// Elsewhere give the port's ([`crate::PortAttr::active_mtu`]).
    #[must_use]
    pub const fn to(dest_gid: Gid, dest_qpn: u32, rq_psn: u32) -> Self {
        Self {
            dest_gid,
            dest_qpn,
            rq_psn,
            path_mtu: 4096,
            max_dest_rd_atomic: 16,
            min_rnr_timer: 1,
            traffic_class: 0,
            hop_limit: 64,
            flow_label: 0,
            sgid_index: 0,
        }
    }

    /// The same with another path MTU, bytes.
    #[must_use]
    pub const fn with_mtu(mut self, path_mtu: u32) -> Self {
        self.path_mtu = path_mtu;
        self
    }
}

/// What RTR → RTS needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RtsParams {
    /// First PSN that this side sends, 24 bits.
    pub sq_psn: u32,
    /// READs and atomics that this side may have outstanding (RC).
    pub max_rd_atomic: u32,
    /// ACK timeout, a 5-bit code: 4.096 us x 2^code (RC).
    pub timeout: u32,
    /// Retries when no answer comes (RC).
    pub retry_cnt: u32,
    /// Retries when the peer has no receive posted; 7 is for ever (RC).
    pub rnr_retry: u32,
}

impl RtsParams {
    /// With the usual rest.
    #[must_use]
    pub const fn from_psn(sq_psn: u32) -> Self {
        Self {
            sq_psn,
            max_rd_atomic: 16,
            timeout: 14,
            retry_cnt: 7,
            rnr_retry: 7,
        }
    }
}

/// A queue pair's control side: what connection management needs of it.
pub(crate) struct QpControl {
    pub(crate) context: Arc<ContextInner>,
    pub(crate) handle: u32,
    pub(crate) shared: Arc<QpShared>,
    pub(super) _pd: Arc<PdInner>,
    pub(super) _send_cq: Arc<CqInner>,
    pub(super) _recv_cq: Arc<CqInner>,
    pub(super) _srq: Option<Arc<SrqInner>>,
}

impl QpControl {
    pub(crate) fn modify(&self, attr: &QpAttr, mask: QpAttrMask) -> Result<(), Error> {
        if self.shared.dead.load(Ordering::Acquire) {
            return Err(Error::NoQueuePair);
        }
        self.context.call(&ModifyQp {
            qp: self.handle,
            mask: mask.bits(),
            attr: *attr,
        })?;
        if mask.contains(QpAttrMask::STATE) {
            let state = QpState::from_u32(attr.state).unwrap_or(QpState::Err);
            self.shared.set_state(state);
        }
        Ok(())
    }

    pub(crate) fn to_init(&self, access: Access) -> Result<(), Error> {
        let attr = QpAttr {
            state: QpState::Init as u32,
            access: access.bits(),
            port_num: 1,
            ..QpAttr::EMPTY
        };
        let mask = QpAttrMask::STATE | QpAttrMask::PKEY_INDEX | QpAttrMask::PORT;
        self.modify(&attr, mask | QpAttrMask::ACCESS_FLAGS)
    }

    pub(crate) fn to_init_datagram(&self, qkey: u32) -> Result<(), Error> {
        let attr = QpAttr {
            state: QpState::Init as u32,
            qkey,
            port_num: 1,
            ..QpAttr::EMPTY
        };
        let mask = QpAttrMask::STATE | QpAttrMask::PKEY_INDEX | QpAttrMask::PORT;
        self.modify(&attr, mask | QpAttrMask::QKEY)
    }

    pub(crate) fn to_rtr(&self, p: &RtrParams) -> Result<(), Error> {
        // IBA 1.4, table 21, and its rows for UC and UD.
        let connected =
            QpAttrMask::AV | QpAttrMask::PATH_MTU | QpAttrMask::DEST_QPN | QpAttrMask::RQ_PSN;
        let mask = match self.shared.ty {
            QpType::Rc => connected | QpAttrMask::MAX_DEST_RD_ATOMIC | QpAttrMask::MIN_RNR_TIMER,
            QpType::Uc => connected,
            QpType::Ud => QpAttrMask::empty(),
        };
        let attr = QpAttr {
            state: QpState::Rtr as u32,
            dest_gid: p.dest_gid.0,
            dest_qp_num: p.dest_qpn,
            rq_psn: p.rq_psn,
            path_mtu: p.path_mtu,
            max_dest_rd_atomic: p.max_dest_rd_atomic,
            min_rnr_timer: p.min_rnr_timer,
            traffic_class: u32::from(p.traffic_class),
            hop_limit: u32::from(p.hop_limit),
            flow_label: p.flow_label,
            sgid_index: p.sgid_index,
            ..QpAttr::EMPTY
        };
        self.modify(&attr, mask | QpAttrMask::STATE)
    }

    pub(crate) fn to_rts(&self, p: &RtsParams) -> Result<(), Error> {
        let mask = match self.shared.ty {
            QpType::Rc => {
                QpAttrMask::SQ_PSN
                    | QpAttrMask::TIMEOUT
                    | QpAttrMask::RETRY_CNT
                    | QpAttrMask::RNR_RETRY
                    | QpAttrMask::MAX_QP_RD_ATOMIC
            }
            QpType::Uc | QpType::Ud => QpAttrMask::SQ_PSN,
        };
        let attr = QpAttr {
            state: QpState::Rts as u32,
            sq_psn: p.sq_psn,
            max_rd_atomic: p.max_rd_atomic,
            timeout: p.timeout,
            retry_cnt: p.retry_cnt,
            rnr_retry: p.rnr_retry,
            ..QpAttr::EMPTY
        };
        self.modify(&attr, mask | QpAttrMask::STATE)
    }

    /// A datagram queue pair from RESET to RTS.
    pub(crate) fn ready_datagram(&self, qkey: u32, sq_psn: u32) -> Result<(), Error> {
        self.to_init_datagram(qkey)?;
        self.to_rtr(&RtrParams::to(Gid::LOCAL, 0, 0))?;
        self.to_rts(&RtsParams::from_psn(sq_psn))
    }

    pub(super) fn query(&self) -> Result<QpAttr, Error> {
        let attr = self.context.call(&QueryQp { qp: self.handle })?;
        if let Some(state) = QpState::from_u32(attr.state) {
            self.shared.set_state(state);
        }
        Ok(attr)
    }

    pub(super) fn destroy(&self) -> Result<(), Error> {
        self.shared.dead.store(true, Ordering::Release);
        let events = &self.context.window.events;
        let index = self.shared.index;
        let kinds = |e: &Events| {
            for bitmap in [
                &e.qp_fatal,
                &e.qp_request_error,
                &e.qp_access_error,
                &e.qp_last_wqe,
                &e.qp_comm_established,
            ] {
                forget(bitmap, index);
            }
        };
        self.context
            .control
            .call_then(&DestroyQp { qp: self.handle }, || kinds(events))?;
        self.context.parked.retry(&self.context);
        Ok(())
    }
}
