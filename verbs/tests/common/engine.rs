//! The rings, device side: executes work requests between queue pairs of the same host.

use std::sync::atomic::Ordering;

use hyv_abi::queue::{Cqe, Sge, WcOpcode, WcStatus, WrOpcode, arm, cqe_flags, flags};
use hyv_abi::sync::AtomicU64;
use hyv_abi::types::{QpState, QpType};
use hyv_abi::window::{Events, summary};
use hyv_verbs::Platform;

use super::{Bound, Device, FakeHost};

/// What is wrong with the next answer on the control queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Fault {
    #[default]
    None,
    /// It never comes.
    Mute,
    /// It belongs to another request.
    Cookie,
    /// It names another descriptor.
    Id,
    /// It is shorter than a header.
    Short,
    /// Its header claims a body that is not there.
    Lie,
}

struct Wr {
    opcode: WrOpcode,
    flags: u8,
    slots: u32,
    imm: u32,
    wr_id: u64,
    remote: u64,
    rkey: u32,
    inline: Option<Vec<u8>>,
    sges: Vec<Sge>,
    operand: u64,
    compare: u64,
}

/// Serves every queue once.
pub fn turn(host: &FakeHost) {
    let mut device = host.device();
    host.window().doorbells.take(|_| {});
    let handles: Vec<u32> = device.qps.keys().copied().collect();
    for handle in handles {
        while serve(host, &mut device, handle) {}
    }
}

/// Executes one work request; false if there is none, or it must wait.
fn serve(host: &FakeHost, d: &mut Device, handle: u32) -> bool {
    let qp = &d.qps[&handle];
    let state = QpState::from_u32(qp.attr.state).unwrap();
    if state == QpState::Err {
        return flush(host, d, handle);
    }
    if state == QpState::Sqe {
        let wr = next_send(host, qp.request.sq_ring, qp.request.sq_log2, qp.sq_head);
        return wr.is_some_and(|wr| fail(host, d, handle, &wr, WcStatus::WrFlushErr));
    }
    if state != QpState::Rts {
        return false;
    }
    let Some(wr) = next_send(host, qp.request.sq_ring, qp.request.sq_log2, qp.sq_head) else {
        return false;
    };
    let mut peer = qp.attr.dest_qp_num;
    let ty = QpType::from_u32(qp.request.qp_type).unwrap();
    if ty == QpType::Ud {
        if !d.ahs.contains_key(&(wr.remote as u32)) {
            return fail(host, d, handle, &wr, WcStatus::LocQpOpErr);
        }
        peer = (wr.remote >> 32) as u32;
    }
    let own = matches!(wr.opcode, WrOpcode::LocalInv | WrOpcode::BindMw);
    let Some(peer) = d
        .qps
        .iter()
        .find(|(_, q)| q.qpn == peer)
        .map(|(h, _)| *h)
        .or(own.then_some(handle))
    else {
        return fail(host, d, handle, &wr, WcStatus::RetryExcErr);
    };
    let mut back = None;
    let mut len = 0;
    match wr.opcode {
        WrOpcode::Send
        | WrOpcode::SendImm
        | WrOpcode::Write
        | WrOpcode::WriteImm
        | WrOpcode::SendInv => {
            let Some(data) = gather(host, d, &wr) else {
                return fail(host, d, handle, &wr, WcStatus::LocProtErr);
            };
            len = data.len();
            let write = matches!(wr.opcode, WrOpcode::Write | WrOpcode::WriteImm);
            if ty == QpType::Ud {
                datagram(host, d, handle, peer, &wr, &data);
                return succeed(host, d, handle, &wr, len, None);
            }
            if write {
                if !reachable(d, &wr, data.len()) {
                    return fail(host, d, handle, &wr, WcStatus::RemAccessErr);
                }
                host.write(host.offset_of(wr.remote), &data);
            }
            if wr.opcode != WrOpcode::Write {
                match receive(host, d, peer, &wr, &data, write) {
                    Received::Done => {}
                    Received::Wait if ty == QpType::Uc => {}
                    Received::Wait => return false,
                    Received::TooLong => return fail(host, d, handle, &wr, WcStatus::RemInvReqErr),
                }
            }
        }
        WrOpcode::Read => {
            len = wr.sges.iter().map(|s| s.len as usize).sum();
            if !reachable(d, &wr, len) {
                return fail(host, d, handle, &wr, WcStatus::RemAccessErr);
            }
            back = Some(host.read(host.offset_of(wr.remote), len));
        }
        WrOpcode::CmpSwp | WrOpcode::FetchAdd => {
            len = 8;
            if !reachable(d, &wr, 8) {
                return fail(host, d, handle, &wr, WcStatus::RemAccessErr);
            }
            let at = host.offset_of(wr.remote);
            let old = host.load(at);
            let new = match wr.opcode {
                WrOpcode::FetchAdd => old.wrapping_add(wr.operand),
                _ if old == wr.compare => wr.operand,
                _ => old,
            };
            host.store(at, new);
            back = Some(old.to_le_bytes().to_vec());
        }
        WrOpcode::LocalInv => {
            if !invalidate(d, wr.imm) {
                return fail(host, d, handle, &wr, WcStatus::LocQpOpErr);
            }
        }
        WrOpcode::BindMw => {
            if !bind(d, &wr) {
                return fail(host, d, handle, &wr, WcStatus::MwBindErr);
            }
        }
    }
    if wr.opcode == WrOpcode::SendInv {
        invalidate(d, wr.imm);
    }
    succeed(host, d, handle, &wr, len, back)
}

fn succeed(
    host: &FakeHost,
    d: &mut Device,
    handle: u32,
    wr: &Wr,
    len: usize,
    back: Option<Vec<u8>>,
) -> bool {
    let qp = &d.qps[&handle];
    let signaled = wr.flags & flags::SIGNALED != 0 || qp.request.sig_all != 0;
    let sq_head = qp.sq_head;
    let mut data = [0; 4];
    let mut cqe_flag = 0;
    if let Some(back) = back {
        if small(host, &back, &wr.sges) && signaled {
            data = words(&back);
            cqe_flag = cqe_flags::DATA;
        } else {
            scatter(host, &wr.sges, &back);
        }
    }
    let qp = d.qps.get_mut(&handle).unwrap();
    qp.sq_head = sq_head.wrapping_add(wr.slots);
    d.posts_seen += 1;
    if signaled {
        let cqe = Cqe {
            wr_id: wr.wr_id,
            status: 0,
            opcode: wr.opcode.wc() as u8,
            flags: cqe_flag,
            syndrome: 0,
            qpn: d.qps[&handle].qpn,
            byte_len: len as u32,
            imm: 0,
            data,
            wqe: sq_head as u16,
            qp: handle as u16,
        };
        let cq = d.qps[&handle].request.send_cq;
        complete(host, d, cq, &cqe, false);
    }
    true
}

/// Ends what a window's key gives.
fn invalidate(d: &mut Device, rkey: u32) -> bool {
    let window = d.mws.values_mut().find(|w| w.rkey == rkey);
    window.is_some_and(|w| w.bound.take().is_some())
}

fn bind(d: &mut Device, wr: &Wr) -> bool {
    let [sge] = wr.sges[..] else { return false };
    let Some(mr) = d.mrs.keys().copied().find(|h| d.lkey(*h) == sge.lkey) else {
        return false;
    };
    let region = d.mrs[&mr];
    let len = wr.operand;
    let inside = sge.addr >= region.iova && sge.addr + len <= region.iova + region.len;
    let Some(window) = d.mws.values_mut().find(|w| w.rkey == wr.rkey) else {
        return false;
    };
    if !inside || sge.len != 0 || wr.imm >> 8 != window.rkey >> 8 || wr.imm == window.rkey {
        return false;
    }
    window.rkey = wr.imm;
    window.bound = (len > 0).then_some(Bound {
        mr,
        addr: sge.addr,
        len,
        access: wr.remote as u32,
    });
    true
}

/// Delivers a datagram, or drops it.
fn datagram(host: &FakeHost, d: &mut Device, from: u32, to: u32, wr: &Wr, data: &[u8]) {
    let peer = &d.qps[&to];
    let qkey = if wr.rkey >> 31 == 1 {
        d.qps[&from].attr.qkey
    } else {
        wr.rkey
    };
    let hears = matches!(
        QpState::from_u32(peer.attr.state),
        Some(QpState::Rtr | QpState::Rts)
    );
    if !hears || peer.attr.qkey != qkey {
        return;
    }
    let Some(recv) = take_recv(host, d, to) else {
        return;
    };
    let ah = d.ahs[&(wr.remote as u32)];
    let mut grh = [0; 40];
    grh[20] = 0x45;
    grh[21] = ah.traffic_class as u8;
    grh[28] = ah.hop_limit as u8;
    grh[32..36].copy_from_slice(&[127, 0, 0, 9]);
    grh[36..].copy_from_slice(&ah.dest_gid[12..]);
    let whole: Vec<u8> = grh.iter().chain(data).copied().collect();
    scatter(host, &recv.sges, &whole);
    let qp = &d.qps[&to];
    let cqe = Cqe {
        wr_id: recv.wr_id,
        status: 0,
        opcode: WcOpcode::Recv as u8,
        flags: cqe_flags::GRH
            | if wr.opcode == WrOpcode::SendImm {
                cqe_flags::WITH_IMM
            } else {
                0
            },
        syndrome: 0,
        qpn: qp.qpn,
        byte_len: whole.len() as u32,
        imm: wr.imm,
        data: [u64::from(d.qps[&from].qpn), 0, 0, 0],
        wqe: recv.name,
        qp: to as u16,
    };
    let cq = qp.request.recv_cq;
    complete(host, d, cq, &cqe, wr.flags & flags::SOLICITED != 0);
}

fn next_send(host: &FakeHost, ring: u64, log2: u32, head: u32) -> Option<Wr> {
    let mask = (1u32 << log2) - 1;
    let at = |position: u32, word: u64| ring + u64::from(position & mask) * 64 + word * 8;
    if host.load(at(head, 7)) as u32 != head.wrapping_add(1) {
        return None;
    }
    assert_eq!(
        host.load(at(head, 7)) >> 32,
        0,
        "nothing beside a send's sequence number"
    );
    let w: [u64; 7] = std::array::from_fn(|i| host.load(at(head, i as u64)));
    let slots = (w[0] >> 24) as u8;
    let mut ext = Vec::new();
    for i in 1..u32::from(slots) {
        let position = head.wrapping_add(i);
        assert_eq!(
            host.load(at(position, 7)),
            u64::from(position.wrapping_add(1)),
            "a stamped extension"
        );
        ext.extend((0..7).map(|k| host.load(at(position, k))));
    }
    let wr_flags = (w[0] >> 8) as u8;
    let opcode = WrOpcode::from_u8(w[0] as u8).expect("a known opcode");
    let num_sge = usize::from((w[0] >> 16) as u8);
    let atomic = matches!(opcode, WrOpcode::CmpSwp | WrOpcode::FetchAdd);
    let inline_len = (w[3] >> 32) as usize;
    let inline = (wr_flags & flags::INLINE != 0).then(|| {
        let all: Vec<u8> = w[4..]
            .iter()
            .chain(&ext)
            .flat_map(|x| x.to_le_bytes())
            .collect();
        all[..inline_len].to_vec()
    });
    let mut sges = Vec::new();
    if num_sge > 0 {
        sges.push(Sge::from_words([w[4], w[5]]));
        for group in ext.chunks(7) {
            for pair in group[..6].chunks(2) {
                if sges.len() < num_sge {
                    sges.push(Sge::from_words([pair[0], pair[1]]));
                }
            }
        }
    }
    Some(Wr {
        opcode,
        flags: wr_flags,
        slots: u32::from(slots),
        imm: (w[0] >> 32) as u32,
        wr_id: w[1],
        remote: w[2],
        rkey: w[3] as u32,
        inline,
        sges,
        operand: w[6],
        compare: if atomic {
            ext.first().copied().unwrap_or(0)
        } else {
            0
        },
    })
}

fn reachable(d: &Device, wr: &Wr, len: usize) -> bool {
    let end = wr.remote + len as u64;
    let region = |(h, m): (&u32, &hyv_abi::control::RegMr)| {
        wr.rkey == d.lkey(*h) | 1 && wr.remote >= m.iova && end <= m.iova + m.len
    };
    let window = |w: &super::Mw| {
        w.rkey == wr.rkey
            && w.bound
                .is_some_and(|b| wr.remote >= b.addr && end <= b.addr + b.len)
    };
    d.mrs.iter().any(region) || d.mws.values().any(window)
}

fn gather(host: &FakeHost, d: &Device, wr: &Wr) -> Option<Vec<u8>> {
    if let Some(inline) = &wr.inline {
        return Some(inline.clone());
    }
    let mut data = Vec::new();
    for sge in &wr.sges {
        let mr = d.mrs.iter().find(|(h, _)| d.lkey(**h) == sge.lkey)?.1;
        if sge.addr < mr.iova || sge.addr + u64::from(sge.len) > mr.iova + mr.len {
            return None;
        }
        data.extend(host.read(host.offset_of(sge.addr), sge.len as usize));
    }
    Some(data)
}

fn scatter(host: &FakeHost, sges: &[Sge], mut data: &[u8]) {
    for sge in sges {
        let (now, rest) = data.split_at(data.len().min(sge.len as usize));
        if !now.is_empty() {
            host.write(host.offset_of(sge.addr), now);
        }
        data = rest;
    }
}

fn small(host: &FakeHost, data: &[u8], sges: &[Sge]) -> bool {
    host.data_in_cqe.load(Ordering::Relaxed)
        && data.len() <= 32
        && sges
            .iter()
            .find(|s| s.len > 0)
            .map_or(0, |s| s.len as usize)
            >= data.len()
}

fn words(data: &[u8]) -> [u64; 4] {
    let mut bytes = [0; 32];
    bytes[..data.len()].copy_from_slice(data);
    std::array::from_fn(|i| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap()))
}

enum Received {
    Done,
    Wait,
    TooLong,
}

/// A receive that was taken from its ring.
#[derive(Clone, Debug)]
pub struct Taken {
    pub wr_id: u64,
    pub sges: Vec<Sge>,
    /// Position in its ring, or in a shared one its tag.
    pub name: u16,
}

/// Takes the next receive of a queue pair, from its ring or from a shared one.
fn take_recv(host: &FakeHost, d: &mut Device, handle: u32) -> Option<Taken> {
    let taken = next_recv(host, d, handle)?;
    let qp = d.qps.get_mut(&handle).unwrap();
    let srq = qp.request.srq;
    if srq == u32::MAX {
        qp.rq_head += 1;
    } else {
        let shared = d.srqs.get_mut(&srq).unwrap();
        if shared.returned.pop_front().is_none() {
            shared.head = shared.head.wrapping_add(1);
        }
        check_limit(host, d, srq);
    }
    Some(taken)
}

fn next_recv(host: &FakeHost, d: &Device, handle: u32) -> Option<Taken> {
    let qp = &d.qps[&handle];
    let shared = d.srqs.get(&qp.request.srq);
    if let Some(taken) = shared.and_then(|s| s.returned.front()) {
        return Some(taken.clone());
    }
    let (ring, log2, stride, position) = match shared {
        Some(s) => (s.request.ring, s.request.log2, s.request.stride, s.head),
        None => {
            let r = &qp.request;
            (r.rq_ring, r.rq_log2, r.rq_stride, qp.rq_head)
        }
    };
    let stride = u64::from(stride);
    let at = ring + u64::from(position & ((1 << log2) - 1)) * stride;
    let last = host.load(at + stride - 8);
    if last as u32 != position.wrapping_add(1) {
        return None;
    }
    let num = last >> 32 & 0xff;
    assert!(num <= (stride - 16) / 16);
    let sges = (0..num)
        .map(|i| Sge::from_words([host.load(at + 8 + 16 * i), host.load(at + 16 + 16 * i)]));
    Some(Taken {
        wr_id: host.load(at),
        sges: sges.collect(),
        name: shared.map_or(position as u16, |_| (last >> 48) as u16),
    })
}

/// Raises an object's event.
pub fn raise(host: &FakeHost, handle: u32, which: impl Fn(&Events) -> (&[AtomicU64], u64)) {
    let events = &host.window().events;
    let (words, kind) = which(events);
    let index = handle as usize & 0xffff;
    words[index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
    events.summary.fetch_or(kind, Ordering::SeqCst);
    host.wake();
}

pub fn check_limit(host: &FakeHost, d: &mut Device, handle: u32) {
    let srq = d.srqs.get_mut(&handle).unwrap();
    let posted = (host.load(srq.request.ctrl) as u32).wrapping_sub(srq.head);
    if posted < srq.limit {
        srq.limit = 0;
        raise(host, handle, |e| (&e.srq_limit[..], summary::SRQ_LIMIT));
    }
}

fn by_qpn(d: &Device, qpn: u32) -> u32 {
    *d.qps.iter().find(|(_, q)| q.qpn == qpn).unwrap().0
}

pub fn begin_message(host: &FakeHost, qpn: u32) {
    let d = &mut *host.device();
    let handle = by_qpn(d, qpn);
    let taken = take_recv(host, d, handle);
    assert!(taken.is_some(), "a receive is posted");
    d.qps.get_mut(&handle).unwrap().held = taken;
}

pub fn end_message(host: &FakeHost, qpn: u32, data: &[u8]) {
    let d = &mut *host.device();
    let handle = by_qpn(d, qpn);
    let held = d.qps.get_mut(&handle).unwrap().held.take();
    let held = held.expect("a message that began");
    assert!(small(host, data, &held.sges));
    let cqe = Cqe {
        wr_id: held.wr_id,
        status: 0,
        opcode: WcOpcode::Recv as u8,
        flags: cqe_flags::DATA,
        syndrome: 0,
        qpn,
        byte_len: data.len() as u32,
        imm: 0,
        data: words(data),
        wqe: held.name,
        qp: handle as u16,
    };
    let cq = d.qps[&handle].request.recv_cq;
    complete(host, d, cq, &cqe, false);
}

fn receive(
    host: &FakeHost,
    d: &mut Device,
    peer: u32,
    wr: &Wr,
    data: &[u8],
    write: bool,
) -> Received {
    if !matches!(
        QpState::from_u32(d.qps[&peer].attr.state),
        Some(QpState::Rtr | QpState::Rts)
    ) {
        return Received::Wait;
    }
    let Some(Taken { wr_id, sges, .. }) = next_recv(host, d, peer) else {
        return Received::Wait;
    };
    let mut cqe = Cqe {
        wr_id,
        status: 0,
        opcode: if write {
            WcOpcode::RecvRdmaWithImm
        } else {
            WcOpcode::Recv
        } as u8,
        flags: 0,
        syndrome: 0,
        qpn: d.qps[&peer].qpn,
        byte_len: data.len() as u32,
        imm: wr.imm,
        data: [0; 4],
        wqe: 0,
        qp: peer as u16,
    };
    match wr.opcode {
        WrOpcode::SendImm | WrOpcode::WriteImm => cqe.flags |= cqe_flags::WITH_IMM,
        WrOpcode::SendInv => cqe.flags |= cqe_flags::WITH_INV,
        _ => {}
    }
    if !write {
        if sges.iter().map(|s| s.len as usize).sum::<usize>() < data.len() {
            return Received::TooLong;
        }
        if small(host, data, &sges) {
            cqe.flags |= cqe_flags::DATA;
            cqe.data = words(data);
        } else {
            scatter(host, &sges, data);
        }
    }
    cqe.wqe = take_recv(host, d, peer).unwrap().name;
    let cq = d.qps[&peer].request.recv_cq;
    complete(host, d, cq, &cqe, wr.flags & flags::SOLICITED != 0);
    Received::Done
}

fn fail(host: &FakeHost, d: &mut Device, handle: u32, wr: &Wr, status: WcStatus) -> bool {
    let qp = d.qps.get_mut(&handle).unwrap();
    let reliable = qp.request.qp_type == QpType::Rc as u32;
    let failed = qp.attr.state == QpState::Err as u32;
    if !failed {
        let state = if reliable { QpState::Err } else { QpState::Sqe };
        qp.attr.state = state as u32;
    }
    let cqe = Cqe {
        wr_id: wr.wr_id,
        status: status as u8,
        opcode: wr.opcode.wc() as u8,
        flags: 0,
        syndrome: 0,
        qpn: qp.qpn,
        byte_len: 0,
        imm: 0,
        data: [0; 4],
        wqe: qp.sq_head as u16,
        qp: handle as u16,
    };
    qp.sq_head = qp.sq_head.wrapping_add(wr.slots);
    let cq = qp.request.send_cq;
    if reliable {
        raise(host, handle, |e| (&e.qp_fatal[..], summary::QP_FATAL));
    }
    complete(host, d, cq, &cqe, true);
    true
}

/// Flushes one work request of a queue pair in error.
fn flush(host: &FakeHost, d: &mut Device, handle: u32) -> bool {
    let qp = &d.qps[&handle];
    if let Some(wr) = next_send(host, qp.request.sq_ring, qp.request.sq_log2, qp.sq_head) {
        return fail(host, d, handle, &wr, WcStatus::WrFlushErr);
    }
    if d.qps[&handle].request.srq != u32::MAX {
        return false;
    }
    let Some(taken) = take_recv(host, d, handle) else {
        return false;
    };
    let qp = &d.qps[&handle];
    let cqe = Cqe {
        wr_id: taken.wr_id,
        status: WcStatus::WrFlushErr as u8,
        opcode: WcOpcode::Recv as u8,
        flags: 0,
        syndrome: 0,
        qpn: qp.qpn,
        byte_len: 0,
        imm: 0,
        data: [0; 4],
        wqe: taken.name,
        qp: handle as u16,
    };
    let cq = qp.request.recv_cq;
    complete(host, d, cq, &cqe, true);
    true
}

fn complete(host: &FakeHost, d: &mut Device, cq_handle: u32, cqe: &Cqe, solicited: bool) {
    d.completions += 1;
    let cq = d.cqs.get_mut(&cq_handle).unwrap();
    let events = &host.window().events;
    let index = cq_handle as usize & 0xffff;
    let (word, bit) = (index / 64, 1 << (index % 64));
    let consumed = host.load(cq.request.ctrl) as u32;
    let slots = 1 << cq.request.log2;
    if cq.tail.wrapping_sub(consumed) >= slots {
        cq.overrun = true;
        events.cq_error[word].fetch_or(bit, Ordering::SeqCst);
        events.summary.fetch_or(summary::CQ_ERROR, Ordering::SeqCst);
        return;
    }
    let at = cq.request.ring + u64::from(cq.tail & (slots - 1)) * 64;
    let words = cqe.to_words(cq.tail);
    for (i, w) in words.into_iter().enumerate() {
        host.store(at + 8 * i as u64, w);
    }
    cq.tail = cq.tail.wrapping_add(1);
    let armed = host.load(cq.request.ctrl + 8);
    if armed == arm::ANY || (armed == arm::SOLICITED && solicited) {
        host.store(cq.request.ctrl + 8, arm::NONE);
        events.cq_completion[word].fetch_or(bit, Ordering::SeqCst);
        events
            .summary
            .fetch_or(summary::CQ_COMPLETION, Ordering::SeqCst);
        host.wake();
    }
}
