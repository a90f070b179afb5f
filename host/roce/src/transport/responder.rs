//! The receiving half of a reliable connection (IBA 1.4, 9.7.4 and 9.7.5.2).
//!
//! A request packet is first [`Responder::check`]ed: what it is by its PSN and opcode. If it is the expected one ([`Check::Go`]), the
//! driver looks at keys and receives and then says which of the four it was: [`Responder::accept`], [`Responder::accept_read`],
//! [`Responder::accept_atomic`], or not: [`Responder::not_ready`], [`Responder::refuse`]. Answers leave through a queue in
//! the order of the requests; acknowledgements that nothing separates become one.

use alloc::collections::VecDeque;

use super::{Psn, Remote, packets};
use crate::limits::ACK_INTERVAL;
use crate::wire::{NakCode, Position};

/// What a responder is set up with.
#[derive(Clone, Copy, Debug)]
pub struct ResponderConfig {
    /// First PSN expected.
    pub psn: Psn,
    /// Path MTU, bytes.
    pub mtu: u32,
    /// READs and atomics that it keeps in order to answer them again.
    pub max_dest_rd_atomic: u32,
}

/// What a request packet asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestOp {
    /// A packet of a SEND.
    Send,
    /// A packet of a WRITE; the first says where to and how much.
    Write(Option<(Remote, u32)>),
    /// A READ of so many bytes.
    Read(Remote, u32),
    /// An atomic.
    Atomic(Remote),
}

/// A request packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Its PSN.
    pub psn: Psn,
    /// What it asks for.
    pub op: RequestOp,
    /// Its position in the message.
    pub position: Position,
    /// Bytes of payload.
    pub len: u32,
    /// An acknowledgement is wanted.
    pub ack_req: bool,
}

/// The expected request: what the driver must do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Go {
    /// Put the payload at `offset` of the receive; take one from the queue first if the message begins here.
    Send {
        /// Byte offset in the message.
        offset: u32,
    },
    /// Put the payload at `offset` of the `total` bytes that begin at `remote`.
    Write {
        /// The message's address and key.
        remote: Remote,
        /// Byte offset in the message.
        offset: u32,
        /// Bytes of the message.
        total: u32,
    },
    /// Check that the bytes may be read; [`Answer::ReadData`] asks for them later.
    Read {
        /// Where.
        remote: Remote,
        /// Bytes.
        len: u32,
    },
    /// Execute it.
    Atomic {
        /// Where.
        remote: Remote,
    },
}

/// What a request packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Check {
    /// The expected one.
    Go(Go),
    /// Seen before; an answer is queued if there is one to give.
    Duplicate,
    /// Packets before it are missing. True: a NAK is queued.
    Ahead(bool),
    /// It breaks the protocol: a NAK is queued and the connection is over.
    Refused(NakCode),
    /// The connection is over.
    Over,
}

/// An answer to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// An acknowledgement.
    Ack {
        /// The last packet taken.
        psn: Psn,
        /// Messages completed.
        msn: u32,
    },
    /// A sequence NAK or an error.
    Nak {
        /// The packet expected, or refused.
        psn: Psn,
        /// Messages completed.
        msn: u32,
        /// Why.
        code: NakCode,
    },
    /// No receive.
    RnrNak {
        /// The packet not taken.
        psn: Psn,
        /// Messages completed.
        msn: u32,
        /// Code of the time to wait.
        timer: u8,
    },
    /// A run of READ response packets, all of `mtu` bytes but the last.
    ReadData {
        /// PSN of the first.
        psn: Psn,
        /// Packets in the run.
        packets: u32,
        /// Whether the first of the run is the first of the answer.
        begins: bool,
        /// Where the bytes of the run lie.
        remote: Remote,
        /// Bytes of the run.
        len: u32,
        /// Messages completed.
        msn: u32,
    },
    /// An atomic's result.
    AtomicValue {
        /// The atomic's PSN.
        psn: Psn,
        /// Messages completed.
        msn: u32,
        /// What was there before.
        value: u64,
    },
}

#[derive(Clone, Copy, Debug)]
enum Inbound {
    Send {
        offset: u32,
    },
    Write {
        remote: Remote,
        total: u32,
        offset: u32,
    },
}

#[derive(Clone, Copy, Debug)]
struct Resource {
    first: Psn,
    packets: u32,
    kind: ResourceKind,
}

#[derive(Clone, Copy, Debug)]
enum ResourceKind {
    Read { remote: Remote, len: u32 },
    Atomic { value: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// First PSN of the request that it answers, which names it.
    resource: Psn,
    /// It answers a duplicate.
    replay: bool,
    /// First PSN of this answer.
    begin: Psn,
    /// Next PSN.
    next: Psn,
    /// One past the last PSN.
    end: Psn,
    /// Where the byte at `next` lies.
    remote: Remote,
    /// Bytes from there on.
    len: u32,
    msn: u32,
}

#[derive(Clone, Copy, Debug)]
enum Out {
    Plain(Answer),
    /// An atomic's; whether for the first time.
    Atomic(Answer, bool),
    Read(Stream),
}

/// Why packets that are ahead stay unanswered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Quiet {
    No,
    /// A sequence NAK is out; the last packet ahead had this PSN.
    Sequence(Psn),
    /// An RNR NAK is out.
    Rnr,
}

/// See the module's text.
#[derive(Debug)]
pub struct Responder {
    config: ResponderConfig,
    expected: Psn,
    msn: u32,
    inbound: Option<Inbound>,
    quiet: Quiet,
    resources: VecDeque<Resource>,
    out: VecDeque<Out>,
    /// READs and atomics whose first answer has not left.
    unanswered: u32,
    /// Packets taken since the last acknowledgement.
    unacknowledged: u32,
    over: bool,
}

impl Responder {
    /// A responder that has received nothing.
    #[must_use]
    pub fn new(config: ResponderConfig) -> Self {
        Self {
            config,
            expected: config.psn,
            msn: 0,
            inbound: None,
            quiet: Quiet::No,
            resources: VecDeque::new(),
            out: VecDeque::new(),
            unanswered: 0,
            unacknowledged: 0,
            over: false,
        }
    }

    /// The PSN expected next.
    #[must_use]
    pub fn expected(&self) -> Psn {
        self.expected
    }

    /// Messages completed, modulo 2^24.
    #[must_use]
    pub fn msn(&self) -> u32 {
        self.msn
    }

    /// Whether a message has begun and not ended.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        self.inbound.is_some()
    }

    /// Changes how many READs and atomics are kept (SQD).
    pub fn set_max_dest_rd_atomic(&mut self, n: u32) {
        self.config.max_dest_rd_atomic = n;
    }

    /// The connection is over, and its last answer has left.
    #[inline]
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.over && self.out.is_empty()
    }

    /// Whether the connection is over: an error was queued as its last answer.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// What this packet is. Nothing is taken yet.
    pub fn check(&mut self, r: &Request) -> Check {
        if self.over {
            return Check::Over;
        }
        let ahead = r.psn.since(self.expected);
        if ahead > 0 {
            return Check::Ahead(self.out_of_sequence(r.psn));
        }
        if ahead < 0 {
            self.duplicate(r);
            return Check::Duplicate;
        }
        match self.classify(r) {
            Some(go) => Check::Go(go),
            None => {
                self.refuse(NakCode::InvalidRequest);
                Check::Refused(NakCode::InvalidRequest)
            }
        }
    }

    /// IBA 1.4, 9.7.4.1.2: sequence of opcodes, lengths.
    fn classify(&self, r: &Request) -> Option<Go> {
        let mtu = self.config.mtu;
        if matches!(r.op, RequestOp::Send | RequestOp::Write(_)) {
            let fits = match r.position {
                Position::First | Position::Middle => r.len == mtu,
                Position::Last => r.len > 0 && r.len <= mtu,
                Position::Only => r.len <= mtu,
            };
            if !fits || r.position.begins() == self.inbound.is_some() {
                return None;
            }
        } else if self.inbound.is_some() || self.unanswered >= self.config.max_dest_rd_atomic {
            return None;
        }
        match (r.op, self.inbound) {
            (RequestOp::Send, None) => Some(Go::Send { offset: 0 }),
            (RequestOp::Send, Some(Inbound::Send { offset })) => {
                offset.checked_add(r.len)?;
                Some(Go::Send { offset })
            }
            (RequestOp::Write(Some((remote, total))), None) => {
                let fits = match r.position {
                    Position::Only => total == r.len,
                    _ => total > mtu,
                };
                fits.then_some(Go::Write {
                    remote,
                    offset: 0,
                    total,
                })
            }
            (
                RequestOp::Write(None),
                Some(Inbound::Write {
                    remote,
                    total,
                    offset,
                }),
            ) => {
                let left = total - offset;
                let fits = if r.position.ends() {
                    r.len == left
                } else {
                    r.len < left
                };
                fits.then_some(Go::Write {
                    remote,
                    offset,
                    total,
                })
            }
            (RequestOp::Read(remote, len), None) => {
                (len <= 1 << 31).then_some(Go::Read { remote, len })
            }
            (RequestOp::Atomic(remote), None) => Some(Go::Atomic { remote }),
            _ => None,
        }
    }

    /// True if a NAK goes out: one a gap, and one more if the requester has gone back and the packet was lost again.
    fn out_of_sequence(&mut self, psn: Psn) -> bool {
        let say = match self.quiet {
            Quiet::No => true,
            Quiet::Sequence(last) => psn.since(last) <= 0,
            Quiet::Rnr => return false,
        };
        self.quiet = Quiet::Sequence(psn);
        if say {
            self.answer_last(Answer::Nak {
                psn: self.expected,
                msn: self.msn,
                code: NakCode::PsnSequence,
            });
        }
        say
    }

    /// Queues an answer that implies the acknowledgement before it, if one waits at the end of the queue.
    fn answer_last(&mut self, answer: Answer) {
        if let Some(Out::Plain(Answer::Ack { .. })) = self.out.back() {
            self.out.pop_back();
        }
        if let (Some(Out::Plain(Answer::Nak { psn, .. })), Answer::Nak { psn: new, .. }) =
            (self.out.back(), answer)
            && *psn == new
        {
            self.out.pop_back();
        }
        self.unacknowledged = 0;
        self.out.push_back(Out::Plain(answer));
    }

    fn acknowledge(&mut self) {
        self.answer_last(Answer::Ack {
            psn: self.expected.prev(),
            msn: self.msn,
        });
    }

    /// IBA 1.4, 9.7.5.1.4: SENDs and WRITEs are acknowledged again, READs answered again from memory, atomics from what was kept.
    fn duplicate(&mut self, r: &Request) {
        if matches!(r.op, RequestOp::Send | RequestOp::Write(_)) {
            self.acknowledge();
            return;
        }
        let Some(kept) = self
            .resources
            .iter()
            .find(|k| r.psn.within(k.first, k.first.add(k.packets)))
            .copied()
        else {
            // Too long ago: the requester has had the answer.
            return;
        };
        match (r.op, kept.kind) {
            (RequestOp::Atomic(_), ResourceKind::Atomic { value }) => {
                let same = |o: &Out| matches!(o, Out::Atomic(Answer::AtomicValue { psn, .. }, _) if *psn == r.psn);
                if !self.out.iter().any(same) {
                    let answer = Answer::AtomicValue {
                        psn: r.psn,
                        msn: self.msn,
                        value,
                    };
                    self.out.push_back(Out::Atomic(answer, false));
                }
            }
            (
                RequestOp::Read(remote, len),
                ResourceKind::Read {
                    remote: was,
                    len: all,
                },
            ) => {
                let offset = (r.psn.since(kept.first) as u32).wrapping_mul(self.config.mtu);
                let end = r.psn.add(packets(len, self.config.mtu));
                let inside = remote.rkey == was.rkey
                    && remote.addr == was.addr.wrapping_add(u64::from(offset))
                    && offset.checked_add(len).is_some_and(|e| e <= all)
                    && end.since(kept.first.add(kept.packets)) <= 0;
                if inside {
                    self.replay(kept.first, r.psn, end, remote, len);
                }
            }
            _ => {}
        }
    }

    fn replay(&mut self, resource: Psn, psn: Psn, end: Psn, remote: Remote, len: u32) {
        let stream = Stream {
            resource,
            replay: true,
            begin: psn,
            next: psn,
            end,
            remote,
            len,
            msn: self.msn,
        };
        for out in &mut self.out {
            let Out::Read(s) = out else { continue };
            if s.resource != resource {
                continue;
            }
            if s.next.since(psn) <= 0 {
                // It is still to come.
                return;
            }
            if s.replay {
                *s = stream;
                return;
            }
        }
        self.out.push_back(Out::Read(stream));
    }

    fn took(&mut self, n: u32) {
        self.expected = self.expected.add(n);
        self.quiet = Quiet::No;
    }

    fn completed(&mut self) {
        self.msn = self.msn.wrapping_add(1) & 0xff_ffff;
    }

    /// The expected packet of a SEND or a WRITE was taken.
    pub fn accept(&mut self, r: &Request) {
        self.took(1);
        if r.position.ends() {
            self.inbound = None;
            self.completed();
        } else {
            self.inbound = match (r.op, self.inbound) {
                (RequestOp::Write(Some((remote, total))), _) => Some(Inbound::Write {
                    remote,
                    total,
                    offset: r.len,
                }),
                (
                    RequestOp::Write(None),
                    Some(Inbound::Write {
                        remote,
                        total,
                        offset,
                    }),
                ) => Some(Inbound::Write {
                    remote,
                    total,
                    offset: offset + r.len,
                }),
                (_, Some(Inbound::Send { offset })) => Some(Inbound::Send {
                    offset: offset + r.len,
                }),
                _ => Some(Inbound::Send { offset: r.len }),
            };
        }
        self.unacknowledged += 1;
        if r.ack_req || r.position.ends() || self.unacknowledged >= ACK_INTERVAL {
            self.acknowledge();
        }
    }

    fn keep(&mut self, resource: Resource) {
        self.resources.push_back(resource);
        while self.resources.len() > self.config.max_dest_rd_atomic.max(1) as usize {
            self.resources.pop_front();
        }
        self.unanswered += 1;
        self.unacknowledged = 0;
        self.completed();
    }

    /// The expected READ may be answered.
    pub fn accept_read(&mut self, remote: Remote, len: u32) {
        let n = packets(len, self.config.mtu);
        let first = self.expected;
        self.keep(Resource {
            first,
            packets: n,
            kind: ResourceKind::Read { remote, len },
        });
        self.took(n);
        self.drop_implied();
        self.out.push_back(Out::Read(Stream {
            resource: first,
            replay: false,
            begin: first,
            next: first,
            end: first.add(n),
            remote,
            len,
            msn: self.msn,
        }));
    }

    /// The expected atomic was executed; `value` was there before.
    pub fn accept_atomic(&mut self, value: u64) {
        let psn = self.expected;
        self.keep(Resource {
            first: psn,
            packets: 1,
            kind: ResourceKind::Atomic { value },
        });
        self.took(1);
        self.drop_implied();
        let answer = Answer::AtomicValue {
            psn,
            msn: self.msn,
            value,
        };
        self.out.push_back(Out::Atomic(answer, true));
    }

    /// An answer with data acknowledges everything before it.
    fn drop_implied(&mut self) {
        if let Some(Out::Plain(Answer::Ack { .. })) = self.out.back() {
            self.out.pop_back();
        }
    }

    /// No receive is posted for the expected packet.
    pub fn not_ready(&mut self, timer: u8) {
        self.quiet = Quiet::Rnr;
        self.answer_last(Answer::RnrNak {
            psn: self.expected,
            msn: self.msn,
            timer,
        });
    }

    /// The expected packet is refused: the connection is over once this has left.
    pub fn refuse(&mut self, code: NakCode) {
        self.over = true;
        self.inbound = None;
        self.answer_last(Answer::Nak {
            psn: self.expected,
            msn: self.msn,
            code,
        });
    }

    /// Whether an answer waits.
    #[inline]
    #[must_use]
    pub fn has_answer(&self) -> bool {
        !self.out.is_empty()
    }

    /// The acknowledgement that waits, if nothing else does.
    #[inline]
    #[must_use]
    pub fn lone_ack(&self) -> Option<Answer> {
        match self.out.front() {
            Some(Out::Plain(ack @ Answer::Ack { .. })) if self.out.len() == 1 => Some(*ack),
            _ => None,
        }
    }

    /// The next answer; of READ data at most `most` packets.
    #[must_use]
    pub fn answer(&self, most: u32) -> Option<Answer> {
        Some(match self.out.front()? {
            Out::Plain(a) | Out::Atomic(a, _) => *a,
            Out::Read(s) => {
                let left = s.end.since(s.next) as u32;
                let n = left.min(most.max(1));
                Answer::ReadData {
                    psn: s.next,
                    packets: n,
                    begins: s.next == s.begin,
                    remote: s.remote,
                    len: if n == left {
                        s.len
                    } else {
                        n * self.config.mtu
                    },
                    msn: s.msn,
                }
            }
        })
    }

    /// Whether the run that [`Responder::answer`] gave, or its first `n` packets, ends the answer.
    #[must_use]
    pub fn ends(&self, n: u32) -> bool {
        match self.out.front() {
            Some(Out::Read(s)) => s.end.since(s.next) as u32 <= n,
            _ => true,
        }
    }

    /// The answer (of READ data the first `n` packets) left.
    pub fn sent(&mut self, n: u32) {
        let mtu = self.config.mtu;
        let first = match self.out.front_mut() {
            None => return,
            Some(Out::Plain(_)) => false,
            Some(Out::Atomic(_, first)) => *first,
            Some(Out::Read(s)) => {
                let left = s.end.since(s.next) as u32;
                if n < left {
                    s.next = s.next.add(n);
                    s.remote.addr = s.remote.addr.wrapping_add(u64::from(n * mtu));
                    s.len -= n * mtu;
                    return;
                }
                !s.replay
            }
        };
        self.out.pop_front();
        if first {
            self.unanswered = self.unanswered.saturating_sub(1);
        }
    }

    /// The bytes of the answer at the front cannot be read any more: an error takes its place and the connection is over. Not
    /// so if a duplicate asked for it: most requesters have had the answer before they had the region taken away, and what the network
    /// held back must not end their connection. One that still waits for it is told.
    pub fn abort(&mut self, code: NakCode) {
        let msn = self.msn;
        let psn = match self.out.front_mut() {
            Some(Out::Read(s)) if s.replay => {
                let psn = s.next;
                self.out[0] = Out::Plain(Answer::Nak { psn, msn, code });
                return;
            }
            Some(Out::Read(s)) => s.next,
            _ => self.expected,
        };
        self.over = true;
        self.inbound = None;
        self.out.clear();
        self.out
            .push_back(Out::Plain(Answer::Nak { psn, msn, code }));
    }
}
