//! The rings, device side: executes work requests between queue pairs of the same host.

use std::sync::atomic::Ordering;

use hyv_abi::queue::{Cqe, Sge, WcOpcode, WcStatus, WrOpcode, arm, cqe_flags, flags};
use hyv_abi::types::QpState;
use hyv_abi::window::summary;
use hyv_verbs::Platform;

use super::{Device, FakeHost};

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
    if state != QpState::Rts {
        return false;
    }
    let Some(wr) = next_send(host, qp.request.sq_ring, qp.request.sq_log2, qp.sq_head) else {
        return false;
    };
    let (peer, sq_head) = (qp.attr.dest_qp_num, qp.sq_head);
    let signaled = wr.flags & flags::SIGNALED != 0 || qp.request.sig_all != 0;
    let Some(peer) = d.qps.iter().find(|(_, q)| q.qpn == peer).map(|(h, _)| *h) else {
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
            if write {
                if !reachable(d, wr.remote, data.len()) {
                    return fail(host, d, handle, &wr, WcStatus::RemAccessErr);
                }
                host.write(host.offset_of(wr.remote), &data);
            }
            if wr.opcode != WrOpcode::Write {
                match receive(host, d, peer, &wr, &data, write) {
                    Received::Done => {}
                    Received::Wait => return false,
                    Received::TooLong => return fail(host, d, handle, &wr, WcStatus::RemInvReqErr),
                }
            }
        }
        WrOpcode::Read => {
            len = wr.sges.iter().map(|s| s.len as usize).sum();
            if !reachable(d, wr.remote, len) {
                return fail(host, d, handle, &wr, WcStatus::RemAccessErr);
            }
            back = Some(host.read(host.offset_of(wr.remote), len));
        }
        WrOpcode::CmpSwp | WrOpcode::FetchAdd => {
            len = 8;
            if !reachable(d, wr.remote, 8) {
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
        WrOpcode::LocalInv | WrOpcode::BindMw => {}
    }
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

fn reachable(d: &Device, addr: u64, len: usize) -> bool {
    d.mrs
        .values()
        .any(|m| addr >= m.iova && addr + len as u64 <= m.iova + m.len)
}

fn gather(host: &FakeHost, d: &Device, wr: &Wr) -> Option<Vec<u8>> {
    if let Some(inline) = &wr.inline {
        return Some(inline.clone());
    }
    let mut data = Vec::new();
    for sge in &wr.sges {
        let mr = d.mrs.iter().find(|(h, _)| **h << 8 == sge.lkey)?.1;
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

fn next_recv(host: &FakeHost, d: &Device, handle: u32) -> Option<(u64, Vec<Sge>)> {
    let qp = &d.qps[&handle];
    let stride = u64::from(qp.request.rq_stride);
    let at = qp.request.rq_ring + u64::from(qp.rq_head & ((1 << qp.request.rq_log2) - 1)) * stride;
    let last = host.load(at + stride - 8);
    if last as u32 != qp.rq_head.wrapping_add(1) {
        return None;
    }
    let num = last >> 32;
    assert!(num <= (stride - 16) / 16);
    let sges = (0..num)
        .map(|i| Sge::from_words([host.load(at + 8 + 16 * i), host.load(at + 16 + 16 * i)]));
    Some((host.load(at), sges.collect()))
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
    let Some((wr_id, sges)) = next_recv(host, d, peer) else {
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
        wqe: d.qps[&peer].rq_head as u16,
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
    d.qps.get_mut(&peer).unwrap().rq_head += 1;
    let cq = d.qps[&peer].request.recv_cq;
    complete(host, d, cq, &cqe, wr.flags & flags::SOLICITED != 0);
    Received::Done
}

fn fail(host: &FakeHost, d: &mut Device, handle: u32, wr: &Wr, status: WcStatus) -> bool {
    let qp = d.qps.get_mut(&handle).unwrap();
    qp.attr.state = QpState::Err as u32;
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
    let events = &host.window().events;
    let index = handle as usize & 0xffff;
    events.qp_fatal[index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
    events.summary.fetch_or(summary::QP_FATAL, Ordering::SeqCst);
    complete(host, d, cq, &cqe, true);
    true
}

/// Flushes one work request of a queue pair in error.
fn flush(host: &FakeHost, d: &mut Device, handle: u32) -> bool {
    let qp = &d.qps[&handle];
    if let Some(wr) = next_send(host, qp.request.sq_ring, qp.request.sq_log2, qp.sq_head) {
        return fail(host, d, handle, &wr, WcStatus::WrFlushErr);
    }
    let Some((wr_id, _)) = next_recv(host, d, handle) else {
        return false;
    };
    let qp = d.qps.get_mut(&handle).unwrap();
    let cqe = Cqe {
        wr_id,
        status: WcStatus::WrFlushErr as u8,
        opcode: WcOpcode::Recv as u8,
        flags: 0,
        syndrome: 0,
        qpn: qp.qpn,
        byte_len: 0,
        imm: 0,
        data: [0; 4],
        wqe: qp.rq_head as u16,
        qp: handle as u16,
    };
    qp.rq_head += 1;
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
