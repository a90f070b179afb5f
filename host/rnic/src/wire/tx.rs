//! Work requests and answers into bursts of packets.

use hyv_abi::queue::{WcStatus, WrOpcode, flags};
use hyv_abi::types::{Access, QpState, QpType};
use hyv_abi::window::summary;
use hyv_roce::carrier::Sent;
use hyv_roce::transport::{Answer, Effect, Message, MessageKind, Remote, Segment};
use hyv_roce::wire::{
    Aeth, AtomicEth, Bth, Extension, NakCode, Opcode, Position, Repr, Reth, Service, Suffix,
    Syndrome,
};

use super::qp::Receiver;
use super::{End, Wire, WireQp, gather};
use crate::engine::Engine;
use crate::exec::receives;
use crate::limits::SLICE;
use crate::objects::Wr;

/// How one burst fared.
enum Step {
    /// Nothing to send.
    Idle,
    /// So many bytes went.
    Sent(usize),
    /// The carrier takes nothing now.
    Busy,
}

impl Engine {
    /// Sends what a QP has to send: answers first, then work requests, until nothing is left or its share is used up.
    pub(crate) fn run_wire(&mut self, slot: usize) -> usize {
        let state = self.qp(slot).state;
        if state == QpState::Err {
            self.flush(slot);
            return 0;
        }
        if state == QpState::Sqe {
            self.flush_sends(slot);
            return 0;
        }
        if !receives(state) {
            self.cool(slot);
            return 0;
        }
        let now = self.now();
        self.with_wire(slot, |e, w, q| e.transmit(w, slot, q, now))
    }

    /// A timer of the QP is due.
    pub(super) fn timer(&mut self, slot: usize, now: u64) {
        self.with_wire(slot, |e, w, q| {
            let Some(requester) = q.requester.as_mut() else {
                return (0, End::Open);
            };
            match requester.on_timer(now) {
                Effect::Fail { index, status } => return (0, End::Failed(index, status)),
                Effect::TimedOut => e.qp_mut(slot).counters.timeouts += 1,
                _ => {}
            }
            e.transmit(w, slot, q, now)
        });
    }

    /// Runs `f` with the device's and the QP's part of the wire lent out, and does what follows from its end.
    pub(super) fn with_wire(
        &mut self,
        slot: usize,
        f: impl FnOnce(&mut Self, &mut Wire, &mut WireQp) -> (usize, End),
    ) -> usize {
        let Some(mut w) = self.wire.take() else {
            return 0;
        };
        let Some(mut q) = self.qp_mut(slot).wire.take() else {
            self.wire = Some(w);
            return 0;
        };
        let (moved, end) = f(self, &mut w, &mut q);
        self.settle(&mut w, slot, &mut q, end.before());
        // Room for more, or nothing to fetch until an acknowledgement comes.
        let paused = q.stuck.is_some() || q.requester.as_ref().is_none_or(|r| !r.wants_message());
        self.qp_mut(slot).wire = Some(q);
        self.wire = Some(w);
        self.end(slot, end);
        if !self.doomed.is_empty() {
            self.fail_doomed();
        }
        self.arm(slot);
        self.rewatch(slot, paused);
        moved
    }

    /// Does what follows when a QP's packets were handled and what is complete was popped.
    pub(super) fn end(&mut self, slot: usize, end: End) {
        match end {
            End::Open => {
                let Some(q) = self.qp_mut(slot).wire.as_mut() else {
                    return;
                };
                if let (Some((index, status)), Some(front)) = (q.stuck, q.wrs.front())
                    && front.index == index
                {
                    match status {
                        WcStatus::Success => self.operate_front(slot),
                        _ => self.fail_front(slot, status),
                    }
                }
            }
            End::Failed(_, status) => self.fail_front(slot, status),
            End::Refused(event) => self.fail(slot, event),
        }
    }

    fn fail_front(&mut self, slot: usize, status: WcStatus) {
        let front = self.qp_mut(slot).wire.as_mut().and_then(|q| {
            q.stuck = None;
            if q.service == Service::Uc
                && let Some(r) = q.requester.as_mut()
            {
                r.abandon();
            }
            q.wrs.pop_front()
        });
        if let Some(wr) = front {
            self.complete_error(slot, &wr, status);
        }
    }

    /// Executes what needs no peer, once all before it is complete; what follows may go then.
    fn operate_front(&mut self, slot: usize) {
        let front = self.qp_mut(slot).wire.as_mut().and_then(|q| {
            q.stuck = None;
            q.wrs.pop_front()
        });
        let Some(wr) = front else { return };
        let op = WrOpcode::from_u8(wr.head.opcode).unwrap_or(WrOpcode::LocalInv);
        match self.operate(slot, &wr, op) {
            Ok(()) => {
                self.complete_wire(slot, &wr);
                self.put_in_backlog(slot);
            }
            Err(status) => {
                self.complete_error(slot, &wr, status);
            }
        }
    }

    fn complete_wire(&mut self, slot: usize, wr: &Wr) {
        let qp = self.qp_mut(slot);
        qp.counters.work_requests += 1;
        qp.counters.bytes += wr.total;
        self.complete_ok(slot, wr, None);
    }

    /// Completes work requests whose messages are acknowledged, at most `most`.
    pub(super) fn settle(&mut self, w: &mut Wire, slot: usize, q: &mut WireQp, most: usize) {
        for _ in 0..most {
            if !q.requester.as_mut().is_some_and(|r| r.pop_completed()) {
                break;
            }
            let Some(wr) = q.wrs.pop_front() else { break };
            self.complete_wire(slot, &wr);
            w.give_back(wr);
        }
    }

    fn transmit(&mut self, w: &mut Wire, slot: usize, q: &mut WireQp, now: u64) -> (usize, End) {
        let (mut bytes, mut moved) = (0, 0);
        loop {
            if bytes >= SLICE as usize {
                self.put_in_backlog(slot);
                break;
            }
            let company = q.lazy.is_some_and(|until| now < until);
            let answer = if company {
                Step::Idle
            } else {
                self.send_answer(w, slot, q)
            };
            let step = match answer {
                Step::Idle => {
                    if let Receiver::Rc(r) = &q.receiver
                        && r.is_finished()
                    {
                        return (moved, End::Refused(q.event));
                    }
                    self.send_requests(w, slot, q, now)
                }
                step => step,
            };
            match step {
                Step::Idle => break,
                Step::Sent(n) => {
                    moved += 1;
                    bytes += n;
                }
                Step::Busy => {
                    self.put_in_backlog(slot);
                    break;
                }
            }
            if !self.doomed.is_empty() {
                break;
            }
        }
        (moved, End::Open)
    }

    /// Hands the burst to the carrier.
    fn send_burst(&mut self, w: &mut Wire, slot: usize, q: &WireQp) -> Sent {
        let carrier = w.carrier.as_mut().expect("absent only while it hands over");
        let sent = w.burst.send(carrier.as_mut(), &q.flow);
        let counters = &mut self.qp_mut(slot).counters;
        let (packets, bytes) = (w.burst.count as u64, w.burst.used as u64);
        match sent {
            Sent::All => {
                counters.tx_packets += packets;
                counters.tx_bytes += bytes;
            }
            Sent::Lost => counters.tx_dropped += packets,
            Sent::Busy => {}
        }
        sent
    }

    fn send_answer(&mut self, w: &mut Wire, slot: usize, q: &mut WireQp) -> Step {
        let Receiver::Rc(r) = &mut q.receiver else {
            return Step::Idle;
        };
        let most = w.carrier().burst(&q.flow);
        w.burst.begin(most);
        let fits = (most.1 / q.mtu as usize).max(1).min(most.0.max(1)) as u32;
        let Some(answer) = r.answer(fits) else {
            return Step::Idle;
        };
        let aeth = |syndrome, msn| Aeth { syndrome, msn };
        let plain = |psn: hyv_roce::transport::Psn, aeth| Repr {
            bth: Bth::new(Opcode::RcAcknowledge, q.dest_qpn, psn.get()),
            ext: Extension::Aeth(aeth),
        };
        let mut n = 1;
        let mut repr = match answer {
            Answer::Ack { psn, msn } => plain(psn, aeth(Syndrome::ACK, msn)),
            Answer::Nak { psn, msn, code } => plain(psn, aeth(Syndrome::Nak(code), msn)),
            Answer::RnrNak { psn, msn, timer } => plain(psn, aeth(Syndrome::RnrNak { timer }, msn)),
            Answer::AtomicValue { psn, msn, value } => Repr {
                bth: Bth::new(Opcode::RcAtomicAcknowledge, q.dest_qpn, psn.get()),
                ext: Extension::AethAtomicAck(aeth(Syndrome::ACK, msn), value),
            },
            Answer::ReadData {
                psn,
                packets,
                begins,
                remote,
                len,
                msn,
            } => {
                let ends = r.ends(packets);
                let qp = self.qp(slot);
                let source = if len == 0 {
                    Some(crate::mem::Bytes::EMPTY)
                } else {
                    self.user(qp.user).open_remote(
                        qp.pd,
                        qp.handle,
                        remote.rkey,
                        remote.addr,
                        u64::from(len),
                        Access::REMOTE_READ,
                    )
                };
                let Some(source) = source else {
                    r.abort(NakCode::RemoteAccess);
                    q.event = summary::QP_ACCESS_ERROR;
                    self.qp_mut(slot).counters.access_naks_sent += 1;
                    return self.send_answer(w, slot, q);
                };
                n = 0;
                for i in 0..packets {
                    let at = match (begins && i == 0, ends && i + 1 == packets) {
                        (true, true) => Position::Only,
                        (true, false) => Position::First,
                        (false, true) => Position::Last,
                        (false, false) => Position::Middle,
                    };
                    let offset = i * q.mtu;
                    let payload = (len - offset).min(q.mtu) as usize;
                    let mut repr = Repr {
                        bth: Bth::new(Opcode::read_response(at), q.dest_qpn, psn.add(i).get()),
                        ext: if at == Position::Middle {
                            Extension::None
                        } else {
                            Extension::Aeth(aeth(Syndrome::ACK, msn))
                        },
                    };
                    if !w.burst.fits(repr.buffer_len(payload)) {
                        break;
                    }
                    let ident = w.next_ident();
                    w.burst.append(&q.crc, ident, &mut repr, payload, |out| {
                        gather(std::slice::from_ref(&source), u64::from(offset), out);
                    });
                    n += 1;
                }
                return self.finish_answer(w, slot, q, n);
            }
        };
        let ident = w.next_ident();
        w.burst.append(&q.crc, ident, &mut repr, 0, |_| {});
        if let Answer::RnrNak { .. } = answer {
            self.qp_mut(slot).counters.rnr_naks_sent += 1;
        }
        self.finish_answer(w, slot, q, n)
    }

    fn finish_answer(&mut self, w: &mut Wire, slot: usize, q: &mut WireQp, n: u32) -> Step {
        if self.send_burst(w, slot, q) == Sent::Busy {
            return Step::Busy;
        }
        if let Receiver::Rc(r) = &mut q.receiver {
            r.sent(n);
        }
        q.lazy = None;
        Step::Sent(w.burst.used)
    }

    /// Sends one burst of request packets.
    fn send_requests(&mut self, w: &mut Wire, slot: usize, q: &mut WireQp, now: u64) -> Step {
        if q.requester.is_none() {
            return Step::Idle;
        }
        let most = w.carrier().burst(&q.flow);
        w.burst.begin(most);
        // Which message's pieces are open in `self.src`.
        let mut open = None;
        let mut again = 0;
        let mut start = None;
        loop {
            if q.stuck.is_none()
                && q.requester.as_ref().is_some_and(|r| r.wants_message())
                && let Some(index) = self.fetch_wire(w, slot, q)
            {
                open = Some(index);
            }
            let Some(r) = q.requester.as_mut() else {
                break;
            };
            let mark = r.mark();
            let Some(segment) = r.next(now) else { break };
            if start.is_none() {
                start = Some(mark);
            }
            let payload = if segment.kind.is_answered() {
                0
            } else {
                segment.len as usize
            };
            let mut repr = request(q.service, q.dest_qpn, &segment, &q.wrs[segment.index]);
            let fits = w.burst.fits(repr.buffer_len(payload));
            if fits && payload > 0 && open != Some(segment.index) {
                let mut wr = q.wrs.remove(segment.index).expect("a message's");
                let opened = self.open_local(slot, &mut wr, Access::empty());
                let position = wr.index;
                q.wrs.insert(segment.index, wr);
                open = Some(segment.index);
                if let Err(status) = opened {
                    // The key was there when the message began: it fails once those before it are through.
                    q.stuck = Some((position, status));
                }
            }
            if !fits
                || q.stuck
                    .is_some_and(|(at, _)| at == q.wrs[segment.index].index)
            {
                if let Some(r) = q.requester.as_mut() {
                    r.rewind(&mark);
                }
                break;
            }
            let ident = w.next_ident();
            let pieces = &self.src;
            w.burst.append(&q.crc, ident, &mut repr, payload, |out| {
                gather(pieces, u64::from(segment.offset), out);
            });
            again += u64::from(segment.again);
        }
        if w.burst.count == 0 {
            return Step::Idle;
        }
        let ack = self.append_ack(w, q);
        let sent = self.send_burst(w, slot, q);
        if sent != Sent::Busy {
            if w.company {
                // What did not fit goes right behind.
                q.lazy = None;
            }
            if ack && let Receiver::Rc(r) = &mut q.receiver {
                r.sent(1);
            }
        }
        let Some(r) = q.requester.as_mut() else {
            return Step::Idle;
        };
        if sent == Sent::Busy {
            if let Some(mark) = &start {
                r.rewind(mark);
            }
            return Step::Busy;
        }
        self.qp_mut(slot).counters.retransmissions += again;
        if q.service == Service::Uc {
            r.confirm_sent();
            self.settle(w, slot, q, usize::MAX);
        }
        Step::Sent(w.burst.used)
    }

    /// Puts an acknowledgement that waits for company at the end of a burst, if it fits there.
    fn append_ack(&self, w: &mut Wire, q: &WireQp) -> bool {
        if !w.company {
            return false;
        }
        let Receiver::Rc(r) = &q.receiver else {
            return false;
        };
        let Some(Answer::Ack { psn, msn }) = r.lone_ack() else {
            return false;
        };
        let mut repr = Repr {
            bth: Bth::new(Opcode::RcAcknowledge, q.dest_qpn, psn.get()),
            ext: Extension::Aeth(Aeth {
                syndrome: Syndrome::ACK,
                msn,
            }),
        };
        let fits = w.burst.fits(repr.buffer_len(0));
        if fits {
            let ident = w.next_ident();
            w.burst.append(&q.crc, ident, &mut repr, 0, |_| {});
        }
        fits
    }

    /// Fetches the next work request and makes a message of it; gives its place in flight. What cannot go becomes
    /// [`WireQp::stuck`].
    fn fetch_wire(&mut self, w: &mut Wire, slot: usize, q: &mut WireQp) -> Option<usize> {
        let qp = self.qps[slot].as_mut().expect("a live QP's slot");
        if qp.state != QpState::Rts {
            return None;
        }
        let mut wr = w.pool.pop().unwrap_or_else(|| Box::new(Wr::new()));
        let Some(sound) = qp.fetch(&mut wr) else {
            w.give_back(wr);
            return None;
        };
        qp.sq_head = qp.sq_head.wrapping_add(u32::from(wr.head.slots));
        let message = if sound {
            self.message(slot, &mut wr)
        } else {
            Err(WcStatus::LocQpOpErr)
        };
        let index = q.wrs.len();
        match (message, q.requester.as_mut()) {
            (Ok(message), Some(r)) => {
                r.push(message);
                q.wrs.push_back(wr);
                Some(index)
            }
            (message, _) => {
                q.stuck = Some((wr.index, message.err().unwrap_or(WcStatus::FatalErr)));
                q.wrs.push_back(wr);
                None
            }
        }
    }

    /// Checks a work request and opens its pieces.
    fn message(&mut self, slot: usize, wr: &mut Wr) -> Result<Message, WcStatus> {
        const BAD: WcStatus = WcStatus::LocQpOpErr;
        let op = WrOpcode::from_u8(wr.head.opcode).ok_or(BAD)?;
        let remote = Remote {
            addr: wr.head.remote_addr,
            rkey: wr.head.rkey,
        };
        let kind = match op {
            WrOpcode::Send | WrOpcode::SendImm | WrOpcode::SendInv => MessageKind::Send,
            WrOpcode::Write | WrOpcode::WriteImm => MessageKind::Write(remote),
            WrOpcode::Read => MessageKind::Read(remote),
            WrOpcode::CmpSwp | WrOpcode::FetchAdd => MessageKind::Atomic(remote),
            // No message: it waits until it is the first.
            WrOpcode::LocalInv | WrOpcode::BindMw => return Err(WcStatus::Success),
        };
        let qp = self.qp(slot);
        let answered = kind.is_answered();
        if answered && (wr.head.flags & flags::INLINE != 0 || qp.attr.max_rd_atomic == 0)
            || qp.ty != QpType::Rc && (answered || op == WrOpcode::SendInv)
        {
            return Err(BAD);
        }
        if matches!(kind, MessageKind::Atomic(_))
            && (wr.head.num_sge != 1
                || wr.sge(0).len != 8
                || (op == WrOpcode::CmpSwp && wr.head.slots < 2))
        {
            return Err(BAD);
        }
        let need = if answered {
            Access::LOCAL_WRITE
        } else {
            Access::empty()
        };
        let total = self.open_local(slot, wr, need)?;
        Ok(Message {
            kind,
            len: total as u32,
            fence: wr.head.flags & flags::FENCE != 0,
        })
    }
}

/// The headers of a request packet.
fn request(service: Service, dest_qpn: u32, s: &Segment, wr: &Wr) -> Repr {
    let op = WrOpcode::from_u8(wr.head.opcode);
    let ends = s.position.ends();
    let suffix = match op {
        Some(WrOpcode::SendImm | WrOpcode::WriteImm) if ends => Suffix::Imm,
        Some(WrOpcode::SendInv) if ends => Suffix::Invalidate,
        _ => Suffix::None,
    };
    let reth = |remote: Remote, dma_len| Reth {
        address: remote.addr,
        rkey: remote.rkey,
        dma_len,
    };
    let imm = wr.head.imm;
    let (opcode, ext) = match s.kind {
        MessageKind::Send => (
            Opcode::send(service, s.position, suffix),
            match suffix {
                Suffix::None => Extension::None,
                Suffix::Imm => Extension::Imm(imm),
                Suffix::Invalidate => Extension::Ieth(imm),
            },
        ),
        MessageKind::Write(remote) => (
            Opcode::write(service, s.position, suffix),
            match (s.position.begins(), suffix) {
                (true, Suffix::Imm) => Extension::RethImm(reth(remote, wr.total as u32), imm),
                (true, _) => Extension::Reth(reth(remote, wr.total as u32)),
                (false, Suffix::Imm) => Extension::Imm(imm),
                (false, _) => Extension::None,
            },
        ),
        MessageKind::Read(remote) => (
            Some(Opcode::RcReadRequest),
            Extension::Reth(reth(remote, s.len)),
        ),
        MessageKind::Atomic(remote) => (
            Some(if op == Some(WrOpcode::CmpSwp) {
                Opcode::RcCompareSwap
            } else {
                Opcode::RcFetchAdd
            }),
            Extension::Atomic(AtomicEth {
                address: remote.addr,
                rkey: remote.rkey,
                swap_add: wr.data[2],
                compare: if op == Some(WrOpcode::CmpSwp) {
                    wr.data[3]
                } else {
                    0
                },
            }),
        ),
    };
    // Every combination that `Engine::message` lets through has an opcode.
    let mut bth = Bth::new(opcode.unwrap_or(Opcode::RcSendOnly), dest_qpn, s.psn.get());
    bth.ack_req = s.ack_req;
    bth.solicited = ends
        && wr.head.flags & flags::SOLICITED != 0
        && (s.kind == MessageKind::Send || suffix == Suffix::Imm);
    Repr { bth, ext }
}
