//! One stream of PSNs: what a queue pair sends to another, or answers it.

use alloc::{format, vec::Vec};

use crate::{
    limits,
    transport::Psn,
    wire::{Operation, Position, Repr, opcode::Info},
};

use super::finding::{Finding, Findings};

/// Path MTUs (IBA 1.4, 9.4).
pub(super) const MTUS: [u32; 5] = [256, 512, 1024, 2048, 4096];

/// What a stream needs to know of a packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen<'a> {
    pub record: u64,
    pub psn: Psn,
    pub repr: &'a Repr,
    pub info: &'static Info,
    /// Bytes, if all were captured.
    pub payload_len: Option<usize>,
    /// With the IPv4 identification under it, it tells a packet from its retransmission.
    pub icrc: Option<u32>,
    /// IPv4 identification; 0 where senders do not number.
    pub ident: u16,
}

/// Recent packets that are remembered to know duplicates, which come close behind.
const RECENT: usize = 8;

/// Requests of RC and UC, or datagrams: PSNs go up by one, but after an RDMA READ request by as many as the answer has packets.
#[derive(Clone, Debug)]
pub(super) struct Requests {
    /// The PSN of the first packet.
    pub first: Psn,
    /// The PSN that comes next; with an RDMA READ request last and the path MTU not known, the lowest that may.
    pub next: Psn,
    /// The highest PSN so far.
    last: Option<Psn>,
    /// Length of the RDMA READ that the last packet asked for.
    read_len: Option<u32>,
    read_psn: Psn,
    pub mtu: Option<usize>,
    /// Whether a message has begun and not ended, and of which operation.
    open: Option<Operation>,
    /// After a gap nobody knows.
    in_step: bool,
    /// First PSN and count of what was passed over.
    gaps: Vec<(Psn, u32)>,
    recent: [(Option<Psn>, u16, u32); RECENT],
    recent_at: usize,
    pub packets: u64,
    pub retransmissions: u64,
    /// A CM said where it begins.
    announced: bool,
    /// It is known which responses belong to it.
    pub answered: bool,
}

impl Requests {
    pub fn new(first: Psn) -> Requests {
        Requests {
            first,
            next: first,
            last: None,
            read_len: None,
            read_psn: first,
            mtu: None,
            open: None,
            in_step: false,
            gaps: Vec::new(),
            recent: [(None, 0, 0); RECENT],
            recent_at: 0,
            packets: 0,
            retransmissions: 0,
            announced: false,
            answered: false,
        }
    }

    /// A stream that CM said begins at `first`.
    pub fn announced(first: Psn) -> Requests {
        Requests {
            in_step: true,
            announced: true,
            ..Requests::new(first)
        }
    }

    /// Whether `psn` has been sent, or asked for by an RDMA READ.
    pub fn has_sent(&self, psn: Psn) -> bool {
        psn.since(self.first) >= 0 && psn.since(self.end()) < 0
    }

    /// One beyond the highest PSN that may be answered.
    pub fn end(&self) -> Psn {
        match self.read_len {
            None => self.next,
            Some(len) => {
                let mtu = self.mtu.map_or(MTUS[0], |m| m as u32);
                self.read_psn.add(packets_of(len, mtu))
            }
        }
    }

    /// Follows a packet.
    pub fn follow(
        &mut self,
        seen: &Seen<'_>,
        who: &dyn core::fmt::Display,
        findings: &mut Findings,
    ) {
        self.packets += 1;
        let ahead = self.ahead(seen.psn);
        if ahead.abs() > limits::PSN_RESTART {
            if self.packets > 1 || self.announced {
                findings.note(Finding::Restart, seen.record, || {
                    format!(
                        "{who}: PSN {:#08x}, after {:#08x}",
                        seen.psn,
                        self.next.prev()
                    )
                });
            }
            *self = Requests {
                packets: self.packets,
                retransmissions: self.retransmissions,
                answered: self.answered,
                ..Requests::new(seen.psn)
            };
            self.advance(seen, who, findings);
            return;
        }
        match ahead {
            0 => self.advance(seen, who, findings),
            1.. => {
                findings.note_many(Finding::Gap, 1, seen.record, || {
                    format!(
                        "{who}: {ahead} from PSN {:#08x} on, before {:#08x}",
                        self.next, seen.psn
                    )
                });
                if self.gaps.len() == limits::GAPS_MAX {
                    self.gaps.remove(0);
                }
                self.gaps.push((self.next, ahead.unsigned_abs()));
                self.in_step = false;
                self.advance(seen, who, findings);
            }
            _ => self.again(seen, who, findings),
        }
    }

    /// How far ahead of what is expected a PSN is.
    fn ahead(&self, found: Psn) -> i32 {
        if let Some(len) = self.read_len {
            let mtus = match &self.mtu {
                Some(mtu) => &[*mtu as u32][..],
                None => &MTUS[..],
            };
            if mtus
                .iter()
                .any(|mtu| self.read_psn.add(packets_of(len, *mtu)) == found)
            {
                return 0;
            }
            if self.mtu.is_none() && found.since(self.next) > 0 {
                // Beyond the shortest answer, and no path MTU fits: so far beyond the longest.
                return found.since(self.end());
            }
        }
        found.since(self.next)
    }

    /// A packet that is next, or beyond a gap.
    fn advance(&mut self, seen: &Seen<'_>, who: &dyn core::fmt::Display, findings: &mut Findings) {
        if self.last.is_some_and(|last| seen.psn.get() < last.get()) {
            findings.note(Finding::Wrap, seen.record, || format!("{who}"));
        }
        self.last = Some(seen.psn);
        self.sequence(seen, who, findings);
        self.length(seen, who, findings);
        self.next = seen.psn.add(1);
        self.read_len = None;
        if seen.info.operation == Operation::ReadRequest
            && let Some(reth) = seen.repr.ext.reth()
        {
            self.read_psn = seen.psn;
            self.read_len = Some(reth.dma_len);
            let mtu = self.mtu.map_or(MTUS[4], |m| m as u32);
            self.next = seen.psn.add(packets_of(reth.dma_len, mtu));
        }
        self.remember(seen);
    }

    fn sequence(&mut self, seen: &Seen<'_>, who: &dyn core::fmt::Display, findings: &mut Findings) {
        let Info {
            operation,
            position,
            ..
        } = *seen.info;
        let fits = match self.open {
            None => position.begins(),
            Some(open) => !position.begins() && open == operation,
        };
        if !fits && self.in_step {
            findings.note(Finding::OpcodeSequence, seen.record, || {
                let state = match self.open {
                    None => "between messages",
                    Some(_) => "inside a message",
                };
                format!("{who}: {} {state}", seen.info.opcode.name())
            });
        }
        self.in_step = true;
        self.open = (!position.ends()).then_some(operation);
    }

    fn length(&mut self, seen: &Seen<'_>, who: &dyn core::fmt::Display, findings: &mut Findings) {
        let Some(len) = seen.payload_len else { return };
        if seen.info.position.ends() {
            return;
        }
        check_mtu(&mut self.mtu, len, seen, who, findings);
    }

    /// A PSN of the past.
    fn again(&mut self, seen: &Seen<'_>, who: &dyn core::fmt::Display, findings: &mut Findings) {
        let found = seen.psn;
        let bits = (Some(found), seen.ident, seen.icrc.unwrap_or(0));
        if seen.ident != 0 && seen.icrc.is_some() && self.recent.contains(&bits) {
            findings.note(Finding::Duplicate, seen.record, || {
                format!("{who}: PSN {found:#08x}, identification {}", seen.ident)
            });
            return;
        }
        self.remember(seen);
        if self.fill(found, seen) {
            findings.note(Finding::Filled, seen.record, || {
                format!("{who}: PSN {found:#08x}")
            });
            return;
        }
        self.retransmissions += 1;
        findings.note(Finding::Retransmission, seen.record, || {
            format!("{who}: PSN {found:#08x}")
        });
    }

    /// Takes a packet's PSNs out of the gaps; whether it was in one.
    fn fill(&mut self, found: Psn, seen: &Seen<'_>) -> bool {
        let Some(at) = self.gaps.iter().position(|(first, count)| {
            let ahead = found.since(*first);
            ahead >= 0 && ahead.unsigned_abs() < *count
        }) else {
            return false;
        };
        let (first, count) = self.gaps.remove(at);
        let before = found.since(first).unsigned_abs();
        let taken = match (seen.info.operation, seen.repr.ext.reth()) {
            (Operation::ReadRequest, Some(reth)) => {
                packets_of(reth.dma_len, self.mtu.map_or(MTUS[0], |m| m as u32))
            }
            _ => 1,
        };
        let after = count.saturating_sub(before + taken);
        if after > 0 {
            self.gaps.insert(at, (first.add(count - after), after));
        }
        if before > 0 {
            self.gaps.insert(at, (first, before));
        }
        true
    }

    /// PSNs that were passed over and, by what was answered, must have arrived.
    pub fn missing(&self, answered: Psn) -> Option<(Psn, u32)> {
        let mut total = 0;
        let mut first = None;
        for (start, count) in &self.gaps {
            if answered.since(start.add(*count)) >= 0 {
                total += count;
                first.get_or_insert(*start);
            }
        }
        first.map(|first| (first, total))
    }

    fn remember(&mut self, seen: &Seen<'_>) {
        self.recent[self.recent_at] = (Some(seen.psn), seen.ident, seen.icrc.unwrap_or(0));
        self.recent_at = (self.recent_at + 1) % RECENT;
    }
}

/// Answers of RC: each names the PSN of a request, or of a part of an RDMA READ.
#[derive(Clone, Debug)]
pub(super) struct Responses {
    /// Which requests they answer, once that is known.
    pub partner: Option<usize>,
    /// Highest PSN that has been answered and not refused.
    pub answered: Option<Psn>,
    /// Last packet of a message of RDMA READ responses that has not ended.
    open_read: Option<Psn>,
    pub mtu: Option<usize>,
    pub packets: u64,
}

impl Responses {
    pub fn new() -> Responses {
        Responses {
            partner: None,
            answered: None,
            open_read: None,
            mtu: None,
            packets: 0,
        }
    }

    pub fn follow(
        &mut self,
        seen: &Seen<'_>,
        who: &dyn core::fmt::Display,
        findings: &mut Findings,
    ) {
        use crate::wire::Syndrome;
        self.packets += 1;
        if let Some(answered) = self.answered
            && seen.psn.since(answered).abs() > limits::PSN_RESTART
        {
            let partner = self.partner;
            *self = Responses {
                packets: self.packets,
                partner,
                ..Responses::new()
            };
        }
        let read = seen.info.operation == Operation::ReadResponse;
        if read {
            let follows = self.open_read.is_some_and(|last| last.add(1) == seen.psn);
            if !seen.info.position.begins() && !follows {
                findings.note(Finding::Gap, seen.record, || {
                    format!(
                        "{who}: {} {:#08x} without what is before it",
                        seen.info.opcode.name(),
                        seen.psn
                    )
                });
            }
            self.open_read = (!seen.info.position.ends()).then_some(seen.psn);
            if !matches!(seen.info.position, Position::Last | Position::Only)
                && let Some(len) = seen.payload_len
            {
                check_mtu(&mut self.mtu, len, seen, who, findings);
            }
        }
        let positive = seen
            .repr
            .ext
            .aeth()
            .is_none_or(|a| matches!(a.syndrome, Syndrome::Ack { .. }));
        if !positive {
            return;
        }
        match self.answered {
            Some(answered) if seen.psn.since(answered) <= 0 => {
                findings.note(Finding::RepeatedResponse, seen.record, || {
                    format!("{who}: PSN {:#08x}", seen.psn)
                });
            }
            _ => self.answered = Some(seen.psn),
        }
    }
}

/// A First or Middle packet carries a path MTU, and the same each time.
fn check_mtu(
    mtu: &mut Option<usize>,
    len: usize,
    seen: &Seen<'_>,
    who: &dyn core::fmt::Display,
    findings: &mut Findings,
) {
    let known = MTUS.iter().any(|m| *m as usize == len);
    match *mtu {
        Some(mtu) if mtu != len => findings.note(Finding::PayloadLength, seen.record, || {
            format!(
                "{who}: {} with {len} bytes, path MTU {mtu}",
                seen.info.opcode.name()
            )
        }),
        None if !known => findings.note(Finding::PayloadLength, seen.record, || {
            format!("{who}: {} with {len} bytes", seen.info.opcode.name())
        }),
        Some(_) => {}
        None => *mtu = Some(len),
    }
}

/// Packets of an answer of `len` bytes.
fn packets_of(len: u32, mtu: u32) -> u32 {
    len.div_ceil(mtu).max(1)
}
