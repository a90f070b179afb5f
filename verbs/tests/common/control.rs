//! The control queue, device side.

use std::sync::atomic::Ordering;

use hyv_abi::control::{
    self as c, DeviceAttr, GidReply, HandleReply, MrReply, Opcode, PortAttr, QpReply,
    REPLY_HEADER_LEN, ReplyHeader, RequestHeader,
};
use hyv_abi::types::{Errno, QpAttrMask, QpState, QpType, Reason, VerbError};
use hyv_abi::window::summary;
use hyv_verbs::Platform;
use zerocopy::{FromBytes, IntoBytes};

use super::engine::Fault;
use super::{Cq, Device, FakeHost, Mw, Qp, Srq, cm, engine};

fn le<const N: usize>(host: &FakeHost, at: u64) -> [u8; N] {
    host.read(at, N).try_into().unwrap()
}

fn u16_at(host: &FakeHost, at: u64) -> u16 {
    u16::from_le_bytes(le(host, at))
}

/// Serves what is available.
pub fn serve(host: &FakeHost) {
    let queue = &host.window().user.control;
    if queue.enable.load(Ordering::Acquire) != 1 {
        host.device().next_avail = 0;
        return;
    }
    let [desc, avail, used] =
        [&queue.desc, &queue.avail, &queue.used].map(|w| w.load(Ordering::Relaxed));
    let size = u64::from(queue.size.load(Ordering::Relaxed));
    assert!(size.is_power_of_two() && size <= 256);
    assert!(desc.is_multiple_of(16) && avail.is_multiple_of(2) && used.is_multiple_of(4));
    let fault = std::mem::take(&mut host.device().fault);
    if fault == Fault::Mute {
        return;
    }
    loop {
        let next = host.device().next_avail;
        if u16_at(host, avail + 2) == next {
            return;
        }
        let slot = u64::from(next) % size;
        let head = u16_at(host, avail + 4 + 2 * slot);
        let part = |i: u16| {
            let at = desc + 16 * u64::from(i);
            let addr = u64::from_le_bytes(le(host, at));
            (
                addr,
                u32::from_le_bytes(le(host, at + 8)),
                u16_at(host, at + 12),
                u16_at(host, at + 14),
            )
        };
        let (req_at, req_len, flags, second) = part(head);
        assert_eq!(flags, 1, "a device-readable part that goes on");
        let (reply_at, reply_len, flags, _) = part(second);
        assert_eq!(flags, 2, "a device-writable last part");
        let request = host.read(req_at, req_len as usize);
        let mut reply = answer(host, &request);
        match fault {
            Fault::Cookie => reply[16] ^= 1,
            Fault::Short => reply.truncate(REPLY_HEADER_LEN - 8),
            Fault::Lie => reply[8..12].copy_from_slice(&400u32.to_le_bytes()),
            _ => {}
        }
        assert!(reply.len() <= reply_len as usize, "room for the reply");
        host.write(reply_at, &reply);
        let elem = used + 4 + 8 * slot;
        let id = u32::from(head) + u32::from(fault == Fault::Id);
        host.write(elem, &id.to_le_bytes());
        host.write(elem + 4, &(reply.len() as u32).to_le_bytes());
        host.write(used + 2, &next.wrapping_add(1).to_le_bytes());
        host.device().next_avail = next.wrapping_add(1);
        if u16_at(host, avail) & 1 == 0 {
            host.wake();
        }
    }
}

fn answer(host: &FakeHost, request: &[u8]) -> Vec<u8> {
    let (header, body) = RequestHeader::read_from_prefix(request).unwrap();
    assert_eq!(u32::from(header.version), hyv_abi::ABI_VERSION);
    assert_eq!(header.len as usize, body.len());
    let opcode = Opcode::from_u16(header.opcode).expect("a verb of the table");
    let mut device = host.device();
    device.log.push(opcode);
    let done = match device.refuse.remove(&header.opcode) {
        Some((errno, reason)) => Err(VerbError::new(errno, reason)),
        None => execute(host, &mut device, opcode, body),
    };
    let (status, reason, body) = match done {
        Ok(body) => (0, 0, body),
        Err(e) => (e.errno as u32, e.reason as u32, Vec::new()),
    };
    let head = ReplyHeader {
        status,
        reason,
        len: body.len() as u32,
        reserved: 0,
        cookie: header.cookie,
    };
    let mut reply = head.as_bytes().to_vec();
    reply.extend(body);
    reply
}

pub type Done = Result<Vec<u8>, VerbError>;

pub fn arg<T: FromBytes>(body: &[u8]) -> T {
    T::read_from_bytes(body).expect("a body of the verb's length")
}

pub const BAD_HANDLE: VerbError = VerbError::new(Errno::Inval, Reason::BadHandle);
const IN_USE: VerbError = VerbError::new(Errno::Busy, Reason::InUse);

impl Device {
    pub fn handle(&mut self) -> u32 {
        let h = self.next_handle;
        self.next_handle += 1;
        // An index, and a generation that is not 0.
        h | 3 << 16
    }

    /// A region's lkey; its rkey has the lowest bit set too.
    pub fn lkey(&self, mr: u32) -> u32 {
        mr << 8 | self.rereg.get(&mr).copied().unwrap_or(0) << 1
    }

    fn keys(&self, mr: u32) -> Vec<u8> {
        MrReply {
            handle: mr,
            lkey: self.lkey(mr),
            rkey: self.lkey(mr) | 1,
            reserved: 0,
        }
        .as_bytes()
        .to_vec()
    }

    fn has_windows(&self, mr: u32) -> bool {
        self.mws
            .values()
            .any(|w| w.bound.is_some_and(|b| b.mr == mr))
    }
}

const WINDOWS: VerbError = VerbError::new(Errno::Busy, Reason::WindowsBound);

fn execute(host: &FakeHost, d: &mut Device, opcode: Opcode, body: &[u8]) -> Done {
    let done = || Ok(Vec::new());
    let handle = |h: u32| {
        Ok(HandleReply {
            handle: h,
            reserved: 0,
        }
        .as_bytes()
        .to_vec())
    };
    match opcode {
        Opcode::QueryDevice => {
            let mut attr = DeviceAttr::read_from_bytes(&[0; size_of::<DeviceAttr>()]).unwrap();
            (attr.max_qp, attr.max_inline, attr.phys_port_cnt) = (100, 416, 1);
            Ok(attr.as_bytes().to_vec())
        }
        Opcode::QueryPort => match arg::<c::QueryPort>(body).port {
            1 => {
                let mut attr = PortAttr::read_from_bytes(&[0; size_of::<PortAttr>()]).unwrap();
                (attr.state, attr.active_mtu) = (4, 4096);
                Ok(attr.as_bytes().to_vec())
            }
            _ => Err(VerbError::new(Errno::Inval, Reason::BadGid)),
        },
        Opcode::QueryGid => Ok(GidReply { gid: [9; 16] }.as_bytes().to_vec()),
        Opcode::AllocPd => {
            let h = d.handle();
            d.pds.insert(h, ());
            handle(h)
        }
        Opcode::DeallocPd => {
            let pd = arg::<c::DeallocPd>(body).pd;
            if d.mrs.values().any(|m| m.pd == pd)
                || d.qps.values().any(|q| q.request.pd == pd)
                || d.srqs.values().any(|s| s.request.pd == pd)
                || d.ahs.values().any(|a| a.pd == pd)
                || d.mws.values().any(|w| w.pd == pd)
            {
                return Err(IN_USE);
            }
            d.pds.remove(&pd).ok_or(BAD_HANDLE)?;
            done()
        }
        Opcode::RegMr => {
            let request = arg::<c::RegMr>(body);
            if request.len == 0 {
                return Err(VerbError::new(Errno::Inval, Reason::ZeroLength));
            }
            d.pds.get(&request.pd).ok_or(BAD_HANDLE)?;
            let h = d.handle();
            d.mrs.insert(h, request);
            Ok(d.keys(h))
        }
        Opcode::DeregMr => {
            let mr = arg::<c::DeregMr>(body).mr;
            if d.has_windows(mr) {
                return Err(WINDOWS);
            }
            d.mrs.remove(&mr).ok_or(BAD_HANDLE)?;
            done()
        }
        Opcode::ReregMr => {
            let r = arg::<c::ReregMr>(body);
            if d.has_windows(r.mr) {
                return Err(WINDOWS);
            }
            let mut new = *d.mrs.get(&r.mr).ok_or(BAD_HANDLE)?;
            assert!(r.flags != 0 && r.flags & !c::rereg::ALL == 0);
            if r.flags & c::rereg::TRANSLATION != 0 {
                if r.len == 0 {
                    return Err(VerbError::new(Errno::Inval, Reason::ZeroLength));
                }
                (new.iova, new.ram_offset, new.len) = (r.iova, r.ram_offset, r.len);
            }
            if r.flags & c::rereg::PD != 0 {
                d.pds.get(&r.pd).ok_or(BAD_HANDLE)?;
                new.pd = r.pd;
            }
            if r.flags & c::rereg::ACCESS != 0 {
                new.access = r.access;
            }
            d.mrs.insert(r.mr, new);
            *d.rereg.entry(r.mr).or_default() += 1;
            Ok(d.keys(r.mr))
        }
        Opcode::AllocMw => {
            let r = arg::<c::AllocMw>(body);
            d.pds.get(&r.pd).ok_or(BAD_HANDLE)?;
            assert_eq!(r.mw_type, 2);
            let h = d.handle();
            let rkey = h << 8 | 0xfe;
            let (pd, bound) = (r.pd, None);
            d.mws.insert(h, Mw { pd, rkey, bound });
            Ok(MrReply {
                handle: h,
                lkey: 0,
                rkey,
                reserved: 0,
            }
            .as_bytes()
            .to_vec())
        }
        Opcode::DeallocMw => {
            d.mws
                .remove(&arg::<c::DeallocMw>(body).mw)
                .ok_or(BAD_HANDLE)?;
            done()
        }
        Opcode::CreateAh => {
            let r = arg::<c::CreateAh>(body);
            d.pds.get(&r.pd).ok_or(BAD_HANDLE)?;
            if r.port_num != 1 || r.sgid_index != 0 {
                return Err(VerbError::new(Errno::Inval, Reason::BadGid));
            }
            let h = d.handle();
            d.ahs.insert(h, r);
            handle(h)
        }
        Opcode::DestroyAh => {
            d.ahs
                .remove(&arg::<c::DestroyAh>(body).ah)
                .ok_or(BAD_HANDLE)?;
            done()
        }
        Opcode::CreateSrq => {
            let request = arg::<c::CreateSrq>(body);
            assert!(request.ring.is_multiple_of(64) && request.ctrl.is_multiple_of(64));
            d.pds.get(&request.pd).ok_or(BAD_HANDLE)?;
            let h = d.handle();
            let srq = Srq {
                request,
                head: 0,
                limit: 0,
                returned: Default::default(),
            };
            d.srqs.insert(h, srq);
            handle(h)
        }
        Opcode::ModifySrq => {
            let r = arg::<c::ModifySrq>(body);
            d.srqs.get_mut(&r.srq).ok_or(BAD_HANDLE)?.limit = r.limit;
            engine::check_limit(host, d, r.srq);
            done()
        }
        Opcode::QuerySrq => {
            let srq = d
                .srqs
                .get(&arg::<c::QuerySrq>(body).srq)
                .ok_or(BAD_HANDLE)?;
            Ok(c::SrqAttr {
                max_wr: 1 << srq.request.log2,
                max_sge: (srq.request.stride - 16) / 16,
                limit: srq.limit,
                reserved: 0,
            }
            .as_bytes()
            .to_vec())
        }
        Opcode::DestroySrq => {
            let srq = arg::<c::DestroySrq>(body).srq;
            if d.qps.values().any(|q| q.request.srq == srq) {
                return Err(IN_USE);
            }
            d.srqs.remove(&srq).ok_or(BAD_HANDLE)?;
            done()
        }
        Opcode::ResizeCq => {
            let r = arg::<c::ResizeCq>(body);
            let cq = d.cqs.get_mut(&r.cq).ok_or(BAD_HANDLE)?;
            let (old, mask) = (cq.request.ring, (1u32 << cq.request.log2) - 1);
            let consumed = host.load(cq.request.ctrl) as u32;
            let waiting = cq.tail.wrapping_sub(consumed);
            if waiting > 1 << r.log2 {
                return Err(VerbError::new(Errno::Inval, Reason::RingTooSmall));
            }
            for i in 0..waiting {
                let from = old + 64 * u64::from(consumed.wrapping_add(i) & mask);
                let words = std::array::from_fn(|k| host.load(from + 8 * k as u64));
                let moved = hyv_abi::queue::Cqe::from_words(words).to_words(i);
                for (k, w) in moved.into_iter().enumerate() {
                    host.store(r.ring + 64 * u64::from(i) + 8 * k as u64, w);
                }
            }
            (cq.request.ring, cq.request.log2, cq.tail) = (r.ring, r.log2, waiting);
            done()
        }
        Opcode::QueryPkey => match arg::<c::QueryPkey>(body) {
            c::QueryPkey { port: 1, index: 0 } => Ok(c::PkeyReply {
                pkey: 0xffff,
                reserved: 0,
            }
            .as_bytes()
            .to_vec()),
            _ => Err(VerbError::new(Errno::Inval, Reason::BadGid)),
        },
        Opcode::QueryCounters => {
            let r = arg::<c::QueryCounters>(body);
            let mut counters =
                c::Counters::read_from_bytes(&[0; size_of::<c::Counters>()]).unwrap();
            // What was asked for, so that a test sees it.
            (counters.errors, counters.bytes) = (r.scope.into(), r.handle.into());
            counters.work_requests = d.posts_seen;
            Ok(counters.as_bytes().to_vec())
        }
        Opcode::CreateCq => {
            let request = arg::<c::CreateCq>(body);
            assert!(request.ring.is_multiple_of(64) && request.ctrl.is_multiple_of(64));
            for i in 0..(8u64 << request.log2) {
                assert_eq!(host.load(request.ring + 8 * i), 0, "a zeroed ring");
            }
            let h = d.handle();
            d.cqs.insert(
                h,
                Cq {
                    request,
                    tail: 0,
                    overrun: false,
                },
            );
            handle(h)
        }
        Opcode::DestroyCq => {
            let cq = arg::<c::DestroyCq>(body).cq;
            if d.qps
                .values()
                .any(|q| q.request.send_cq == cq || q.request.recv_cq == cq)
            {
                return Err(IN_USE);
            }
            d.cqs.remove(&cq).ok_or(BAD_HANDLE)?;
            done()
        }
        Opcode::CreateQp => {
            let request = arg::<c::CreateQp>(body);
            assert!(request.sq_ring.is_multiple_of(64) && request.rq_ring.is_multiple_of(64));
            d.pds.get(&request.pd).ok_or(BAD_HANDLE)?;
            d.cqs
                .get(&request.send_cq)
                .and(d.cqs.get(&request.recv_cq))
                .ok_or(BAD_HANDLE)?;
            if request.srq != u32::MAX {
                d.srqs.get(&request.srq).ok_or(BAD_HANDLE)?;
            }
            let h = d.handle();
            let qpn = 0x10_0000 + (h & 0xffff);
            let attr = c::QpAttr::read_from_bytes(&[0; size_of::<c::QpAttr>()]).unwrap();
            d.qps.insert(
                h,
                Qp {
                    request,
                    qpn,
                    attr,
                    sq_head: 0,
                    rq_head: 0,
                    held: None,
                },
            );
            Ok(QpReply { handle: h, qpn }.as_bytes().to_vec())
        }
        Opcode::ModifyQp => modify(host, d, &arg::<c::ModifyQp>(body)),
        Opcode::QueryQp => {
            let qp = d.qps.get(&arg::<c::QueryQp>(body).qp).ok_or(BAD_HANDLE)?;
            Ok(qp.attr.as_bytes().to_vec())
        }
        Opcode::DestroyQp => {
            let qp = d
                .qps
                .remove(&arg::<c::DestroyQp>(body).qp)
                .ok_or(BAD_HANDLE)?;
            if let Some(srq) = d.srqs.get_mut(&qp.request.srq) {
                srq.returned.extend(qp.held);
            }
            done()
        }
        _ => cm::execute(host, d, opcode, body),
    }
}

fn modify(host: &FakeHost, d: &mut Device, request: &c::ModifyQp) -> Done {
    let qp = d.qps.get_mut(&request.qp).ok_or(BAD_HANDLE)?;
    let mask = QpAttrMask::from_bits(request.mask).expect("known attributes");
    let from = QpState::from_u32(qp.attr.state).unwrap();
    let to = if mask.contains(QpAttrMask::STATE) {
        QpState::from_u32(request.attr.state).unwrap()
    } else {
        from
    };
    use QpAttrMask as M;
    let ty = QpType::from_u32(qp.request.qp_type).unwrap();
    let connected = M::AV | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN;
    let need = match (from, to, ty) {
        (_, QpState::Reset | QpState::Err, _) => M::empty(),
        (QpState::Reset, QpState::Init, QpType::Ud) => M::PKEY_INDEX | M::PORT | M::QKEY,
        (QpState::Reset, QpState::Init, _) => M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS,
        (QpState::Init, QpState::Rtr, QpType::Rc) => {
            connected | M::MAX_DEST_RD_ATOMIC | M::MIN_RNR_TIMER
        }
        (QpState::Init, QpState::Rtr, QpType::Uc) => connected,
        (QpState::Init, QpState::Rtr, QpType::Ud) => M::empty(),
        (QpState::Rtr, QpState::Rts, QpType::Rc) => {
            M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::SQ_PSN | M::MAX_QP_RD_ATOMIC
        }
        (QpState::Rtr, QpState::Rts, _) => M::SQ_PSN,
        (QpState::Sqe, QpState::Rts, QpType::Uc | QpType::Ud) => M::CUR_STATE,
        _ => return Err(VerbError::new(Errno::Inval, Reason::BadTransition)),
    };
    match mask {
        m if m == need | M::STATE => {}
        m if !m.contains(need) => return Err(VerbError::new(Errno::Inval, Reason::MissingAttr)),
        _ => return Err(VerbError::new(Errno::Inval, Reason::ExtraAttr)),
    }
    let a = request.attr;
    qp.attr.state = to as u32;
    if to == QpState::Reset {
        (qp.sq_head, qp.rq_head) = (0, 0);
        if let Some(srq) = d.srqs.get_mut(&qp.request.srq) {
            srq.returned.extend(qp.held.take());
        }
    }
    if to == QpState::Init && ty == QpType::Ud {
        qp.attr.qkey = a.qkey;
    }
    if to == QpState::Err && qp.request.srq != u32::MAX {
        engine::raise(host, request.qp, |e| {
            (&e.qp_last_wqe[..], summary::QP_LAST_WQE)
        });
    }
    let qp = d.qps.get_mut(&request.qp).ok_or(BAD_HANDLE)?;
    if to == QpState::Rtr {
        (qp.attr.dest_qp_num, qp.attr.rq_psn, qp.attr.dest_gid) =
            (a.dest_qp_num, a.rq_psn, a.dest_gid);
        qp.attr.max_dest_rd_atomic = a.max_dest_rd_atomic;
    }
    if to == QpState::Rts {
        (qp.attr.sq_psn, qp.attr.max_rd_atomic, qp.attr.rnr_retry) =
            (a.sq_psn, a.max_rd_atomic, a.rnr_retry);
    }
    Ok(Vec::new())
}
