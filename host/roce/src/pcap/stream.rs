//! One stream of PSNs: what a queue pair sends to another, or answers it.

use alloc::{format, vec::Vec};

use crate::{
    limits,
    wire::{Operation, Position, Repr, opcode::Info, psn},
};

use super::finding::{Finding, Findings};

/// Path MTUs (IBA 1.4, 9.4).
pub(super) const MTUS: [u32; 5] = [256, 512, 1024, 2048, 4096];

/// What a stream needs to know of a packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen<'a> {
    pub record: u64,
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
    pub first: u32,
    /// The PSN that comes next; with an RDMA READ request last and the path MTU not known, the lowest that may.
    pub next: u32,
    /// The highest PSN so far.
    last: Option<u32>,
    /// Length of the RDMA READ that the last packet asked for.
    read_len: Option<u32>,
    read_psn: u32,
    pub mtu: Option<usize>,
    /// Whether a message has begun and not ended, and of which operation.
    open: Option<Operation>,
    /// After a gap nobody knows.
    in_step: bool,
    /// First PSN and count of what was passed over.
    gaps: Vec<(u32, u32)>,
    recent: [(u32, u16, u32); RECENT],
    recent_at: usize,
    pub packets: u64,
    pub retransmissions: u64,
    /// A CM said where it begins.
    announced: bool,
    /// It is known which responses belong to it.
    pub answered: bool,
}

impl Requests {
    pub fn new(first: u32) -> Requests {
        Requests {
            first,
            next: first,
            last: None,
            read_len: None,
            read_psn: 0,
            mtu: None,
            open: None,
            in_step: false,
            gaps: Vec::new(),
            recent: [(u32::MAX, 0, 0); RECENT],
            recent_at: 0,
            packets: 0,
            retransmissions: 0,
            announced: false,
            answered: false,
        }
    }

    /// A stream that CM said begins at `first`.
    pub fn announced(first: u32) -> Requests {
        Requests {
            in_step: true,
            announced: true,
            ..Requests::new(first)
        }
    }

    /// Whether `psn` has been sent, or asked for by an RDMA READ.
    pub fn has_sent(&self, psn: u32) -> bool {
        psn::diff(psn, self.first) >= 0 && psn::diff(psn, self.end()) < 0
    }

    /// One beyond the highest PSN that may be answered.
    pub fn end(&self) -> u32 {
        match self.read_len {
            None => self.next,
            Some(len) => {
                let mtu = self.mtu.map_or(MTUS[0], |m| m as u32);
                psn::add(self.read_psn, packets_of(len, mtu))
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
        let bth = &seen.repr.bth;
        self.packets += 1;
        let ahead = self.ahead(bth.psn);
        if ahead.abs() > limits::PSN_RESTART {
            if self.packets > 1 || self.announced {
                findings.note(Finding::Restart, seen.record, || {
                    format!(
                        "{who}: PSN {:#08x}, after {:#08x}",
                        bth.psn,
                        psn::sub(self.next, 1)
                    )
                });
            }
            *self = Requests {
                packets: self.packets,
                retransmissions: self.retransmissions,
                answered: self.answered,
                ..Requests::new(bth.psn)
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
                        self.next, bth.psn
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
    fn ahead(&self, found: u32) -> i32 {
        if let Some(len) = self.read_len {
            let mtus = match &self.mtu {
                Some(mtu) => &[*mtu as u32][..],
                None => &MTUS[..],
            };
            if mtus
                .iter()
                .any(|mtu| psn::add(self.read_psn, packets_of(len, *mtu)) == found)
            {
                return 0;
            }
            if self.mtu.is_none() && psn::diff(found, self.next) > 0 {
                // Beyond the shortest answer, and no path MTU fits: so far beyond the longest.
                return psn::diff(found, self.end());
            }
        }
        psn::diff(found, self.next)
    }

    /// A packet that is next, or beyond a gap.
    fn advance(&mut self, seen: &Seen<'_>, who: &dyn core::fmt::Display, findings: &mut Findings) {
        let bth = &seen.repr.bth;
        if self.last.is_some_and(|last| bth.psn < last) {
            findings.note(Finding::Wrap, seen.record, || format!("{who}"));
        }
        self.last = Some(bth.psn);
        self.sequence(seen, who, findings);
        self.length(seen, who, findings);
        self.next = psn::add(bth.psn, 1);
        self.read_len = None;
        if seen.info.operation == Operation::ReadRequest
            && let Some(reth) = seen.repr.ext.reth()
        {
            self.read_psn = bth.psn;
            self.read_len = Some(reth.dma_len);
            let mtu = self.mtu.map_or(MTUS[4], |m| m as u32);
            self.next = psn::add(bth.psn, packets_of(reth.dma_len, mtu));
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
        let found = seen.repr.bth.psn;
        let bits = (found, seen.ident, seen.icrc.unwrap_or(0));
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
    fn fill(&mut self, found: u32, seen: &Seen<'_>) -> bool {
        let Some(at) = self.gaps.iter().position(|(first, count)| {
            let ahead = psn::diff(found, *first);
            ahead >= 0 && ahead.unsigned_abs() < *count
        }) else {
            return false;
        };
        let (first, count) = self.gaps.remove(at);
        let before = psn::diff(found, first).unsigned_abs();
        let taken = match (seen.info.operation, seen.repr.ext.reth()) {
            (Operation::ReadRequest, Some(reth)) => {
                packets_of(reth.dma_len, self.mtu.map_or(MTUS[0], |m| m as u32))
            }
            _ => 1,
        };
        let after = count.saturating_sub(before + taken);
        if after > 0 {
            self.gaps
                .insert(at, (psn::sub(psn::add(first, count), after), after));
        }
        if before > 0 {
            self.gaps.insert(at, (first, before));
        }
        true
    }

    /// PSNs that were passed over and, by what was answered, must have arrived.
    pub fn missing(&self, answered: u32) -> Option<(u32, u32)> {
        let mut total = 0;
        let mut first = None;
        for (start, count) in &self.gaps {
            if psn::diff(answered, psn::add(*start, *count)) >= 0 {
                total += count;
                first.get_or_insert(*start);
            }
        }
        first.map(|first| (first, total))
    }

    fn remember(&mut self, seen: &Seen<'_>) {
        self.recent[self.recent_at] = (seen.repr.bth.psn, seen.ident, seen.icrc.unwrap_or(0));
        self.recent_at = (self.recent_at + 1) % RECENT;
    }
}

/// Answers of RC: each names the PSN of a request, or of a part of an RDMA READ.
#[derive(Clone, Debug)]
pub(super) struct Responses {
    /// Which requests they answer, once that is known.
    pub partner: Option<usize>,
    /// Highest PSN that has been answered and not refused.
    pub answered: Option<u32>,
    /// Last packet of a message of RDMA READ responses that has not ended.
    open_read: Option<u32>,
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
        let bth = &seen.repr.bth;
        self.packets += 1;
        if let Some(answered) = self.answered
            && psn::diff(bth.psn, answered).abs() > limits::PSN_RESTART
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
            let follows = self
                .open_read
                .is_some_and(|last| psn::add(last, 1) == bth.psn);
            if !seen.info.position.begins() && !follows {
                findings.note(Finding::Gap, seen.record, || {
                    format!(
                        "{who}: {} {:#08x} without what is before it",
                        seen.info.opcode.name(),
                        bth.psn
                    )
                });
            }
            self.open_read = (!seen.info.position.ends()).then_some(bth.psn);
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
            Some(answered) if psn::diff(bth.psn, answered) <= 0 => {
                findings.note(Finding::RepeatedResponse, seen.record, || {
                    format!("{who}: PSN {:#08x}", bth.psn)
                });
            }
            _ => self.answered = Some(bth.psn),
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
