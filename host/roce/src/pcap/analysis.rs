//! Checks what a capture holds: each packet's ICRC, that it is emitted to the same bytes, and PSNs over packets.

use alloc::{collections::BTreeMap, format, vec::Vec};
use core::fmt;

use crate::{
    carrier::Gid,
    icrc::{Flow, solve_ident},
    limits,
    mad::{self, Mad, Message},
    transport::Psn,
    wire::{ICRC_LEN, Opcode, Operation, Packet, ParseError, Repr, Service, bth, ip, udp},
};

use super::{
    Record,
    finding::{Finding, Findings},
    frame::{Frame, Other, Seen as SeenFrame, dissect},
    stream::{Requests, Responses, Seen},
};

/// Where packets of a stream go, and from where.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct StreamKey {
    /// Sender.
    pub src: Gid,
    /// Receiver.
    pub dst: Gid,
    /// The receiving queue pair; of datagrams, the sending one.
    pub qpn: u32,
}

/// A GID as people write it: an IPv4 or IPv6 address.
struct Address<'a>(&'a Gid);

impl fmt::Display for Address<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match ip::mapped_v4(self.0) {
            Some(v4) => core::net::Ipv4Addr::from(v4).fmt(f),
            None => core::net::Ipv6Addr::from(*self.0).fmt(f),
        }
    }
}

impl fmt::Display for StreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (src, dst) = (Address(&self.src), Address(&self.dst));
        write!(f, "{src} > {dst} QP {:#x}", self.qpn)
    }
}

/// What a stream's packets are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum StreamKind {
    /// Requests of RC.
    Rc,
    /// Packets of UC.
    Uc,
    /// Datagrams.
    Ud,
}

/// What became of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamSummary {
    /// Which.
    pub key: StreamKey,
    /// Of what.
    pub kind: StreamKind,
    /// Packets, those sent again included.
    pub packets: u64,
    /// Packets of PSNs that had been sent before.
    pub retransmissions: u64,
    /// Responses to it.
    pub responses: u64,
    /// PSN of the first packet, since the stream last started anew.
    pub first_psn: u32,
    /// PSN that comes next.
    pub next_psn: u32,
    /// Path MTU, where a message of several packets has shown it.
    pub mtu: Option<usize>,
}

/// A queue pair that a CM message named: its number, and the PSN that it expects.
type Named = (u32, u32);

/// Takes the records of a capture one by one.
#[derive(Clone, Debug, Default)]
pub struct Analysis {
    /// Records so far.
    pub records: u64,
    /// RoCEv2 packets; one for each packet of an offloaded send.
    pub packets: u64,
    /// Their bytes, from BTH to ICRC.
    pub bytes: u64,
    /// Time of the first and the last record, nanoseconds since 1970.
    pub time_ns: Option<(u64, u64)>,
    /// Records that are no RoCEv2.
    pub passed_over: BTreeMap<Other, u64>,
    /// Packets by opcode.
    pub opcodes: BTreeMap<u8, u64>,
    /// Acknowledgements (opcode 0x11) by syndrome.
    pub syndromes: BTreeMap<u8, u64>,
    /// CM messages by name.
    pub messages: BTreeMap<&'static str, u64>,
    /// What was found.
    pub findings: Findings,
    requests: Vec<(StreamKey, StreamKind, Requests)>,
    by_key: BTreeMap<StreamKey, usize>,
    responses: BTreeMap<StreamKey, Responses>,
    datagrams: BTreeMap<StreamKey, usize>,
    calls: BTreeMap<(Gid, u32), Named>,
}

impl Analysis {
    /// Of nothing yet.
    pub fn new() -> Analysis {
        Analysis::default()
    }

    /// Takes the next record.
    pub fn record(&mut self, record: &Record<'_>) {
        self.records += 1;
        let first = self.time_ns.map_or(record.time_ns, |(first, _)| first);
        self.time_ns = Some((first, record.time_ns));
        match dissect(record) {
            SeenFrame::Other(other) => *self.passed_over.entry(other).or_default() += 1,
            SeenFrame::Broken(error) => {
                let finding = match error {
                    ParseError::Fragment => Finding::Fragment,
                    ParseError::Truncated { .. } if record.original_len > record.data.len() => {
                        Finding::Cut
                    }
                    _ => Finding::Header,
                };
                let number = self.records;
                self.findings.note(finding, number, || format!("{error}"));
            }
            SeenFrame::Roce(frame) => self.frame(&frame),
        }
    }

    /// Says that there are no more records: what is still missing stays so.
    pub fn finish(&mut self) {
        let Analysis {
            requests,
            responses,
            findings,
            records,
            ..
        } = self;
        for response in responses.values() {
            let (Some(partner), Some(answered)) = (response.partner, response.answered) else {
                continue;
            };
            let (key, _, stream) = &requests[partner];
            if let Some((first, count)) = stream.missing(answered) {
                findings.note_many(Finding::Missing, u64::from(count), *records, || {
                    format!(
                        "{key}: {count}, from PSN {first:#08x} on, answered up to {answered:#08x}"
                    )
                });
            }
        }
    }

    /// The streams that were followed: RC and UC by receiving queue pair, datagrams by sending one.
    pub fn streams(&self) -> impl Iterator<Item = StreamSummary> {
        let mut answers: BTreeMap<usize, u64> = BTreeMap::new();
        for response in self.responses.values() {
            if let Some(partner) = response.partner {
                *answers.entry(partner).or_default() += response.packets;
            }
        }
        self.requests
            .iter()
            .enumerate()
            .filter(|(_, (_, _, stream))| stream.packets > 0)
            .map(move |(at, (key, kind, stream))| StreamSummary {
                key: *key,
                kind: *kind,
                packets: stream.packets,
                retransmissions: stream.retransmissions,
                responses: answers.get(&at).copied().unwrap_or(0),
                first_psn: stream.first.get(),
                next_psn: stream.next.get(),
                mtu: stream.mtu,
            })
    }

    fn frame(&mut self, frame: &Frame<'_>) {
        let flow = frame.ip.icrc_flow(&frame.udp);
        let ident = frame.ip.ident();
        self.headers(frame);
        if frame.missing > 0 {
            let number = self.records;
            let (have, all) = (frame.packet.len(), frame.packet.len() + frame.missing);
            self.findings.note(Finding::Cut, number, || {
                format!("{have} of {all} bytes from BTH to ICRC")
            });
            self.packet(frame, frame.packet, None, ident);
            return;
        }
        let whole = flow.residual(frame.packet, ident) == 0;
        if !whole && let Some(segment) = segment_len(&flow, frame.packet, ident) {
            let number = self.records;
            self.findings.note(Finding::Offload, number, || {
                format!(
                    "{} packets of {segment} bytes",
                    frame.packet.len().div_ceil(segment)
                )
            });
            for (i, packet) in frame.packet.chunks(segment).enumerate() {
                self.packet(frame, packet, Some(&flow), ident.wrapping_add(i as u16));
            }
            return;
        }
        self.packet(frame, frame.packet, Some(&flow), ident);
    }

    /// IP and UDP header: emitted to the same bytes, and the checksum.
    fn headers(&mut self, frame: &Frame<'_>) {
        let number = self.records;
        let at = frame.ip.header_len();
        let mut bytes = [0; super::frame::HEADERS_MAX];
        frame.ip.emit(&mut bytes);
        frame.udp.emit(&mut bytes[at..]);
        let end = at + udp::LEN;
        if bytes[..end] != frame.ip_packet[..end] {
            self.findings.note(Finding::Reencode, number, || {
                format!("IP and UDP headers: {:?}, {:?}", frame.ip, frame.udp)
            });
        }
        if frame.udp.checksum == 0 || frame.missing > 0 {
            return;
        }
        let datagram = &frame.ip_packet[at..];
        let right = match &frame.ip {
            super::frame::Ip::V4(v4) => udp::checksum(&v4.src, &v4.dst, datagram),
            super::frame::Ip::V6(v6) => udp::checksum(&v6.src, &v6.dst, datagram),
        };
        if right != frame.udp.checksum {
            self.findings.note(Finding::UdpChecksum, number, || {
                format!("{:#06x}, right is {right:#06x}", frame.udp.checksum)
            });
        }
    }

    /// A transport packet; with `flow` if all of it was captured.
    fn packet(&mut self, frame: &Frame<'_>, bytes: &[u8], flow: Option<&Flow>, ident: u16) {
        let number = self.records;
        self.packets += 1;
        self.bytes += bytes.len() as u64;
        let mut icrc = None;
        let mut sound = true;
        if let Some(flow) = flow
            && bytes.len() >= bth::LEN + ICRC_LEN
        {
            sound = self.icrc(flow, bytes, ident);
            let mut trailer = [0; ICRC_LEN];
            trailer.copy_from_slice(&bytes[bytes.len() - ICRC_LEN..]);
            icrc = Some(u32::from_le_bytes(trailer));
        }
        let Some(&byte) = bytes.first() else {
            if flow.is_some() {
                self.findings.note(Finding::Malformed, number, || {
                    "no byte behind the UDP header".into()
                });
            }
            return;
        };
        *self.opcodes.entry(byte).or_default() += 1;
        let parsed = match flow {
            Some(_) => Packet::new_checked(bytes).and_then(|p| Ok((p.repr()?, Some(p.payload())))),
            None => Repr::parse_headers(bytes).map(|r| (r, None)),
        };
        let (repr, payload) = match parsed {
            Ok(parsed) => parsed,
            // What the snap length cut off is no fault of the packet.
            Err(ParseError::Truncated { .. }) if flow.is_none() => return,
            Err(error) => {
                let finding = match error {
                    ParseError::Opcode(_) => Finding::UnknownOpcode,
                    _ => Finding::Malformed,
                };
                self.findings.note(finding, number, || format!("{error}"));
                return;
            }
        };
        if let (Some(payload), Some(flow)) = (payload, flow) {
            let mut again = alloc::vec![0; repr.buffer_len(payload.len())];
            repr.emit(payload, &mut again);
            flow.seal(&mut again, ident);
            // A wrong ICRC is one finding, not two.
            let compared = bytes.len() - if sound { 0 } else { ICRC_LEN };
            if again.len() != bytes.len() || again[..compared] != bytes[..compared] {
                self.findings
                    .note(Finding::Reencode, number, || format!("{repr:?}"));
            }
        }
        if let Some(aeth) = repr.ext.aeth()
            && repr.bth.opcode == Opcode::RcAcknowledge
        {
            *self.syndromes.entry(aeth.syndrome.byte()).or_default() += 1;
        }
        if !sound {
            // Its PSN may be what is corrupt: a receiver would not have seen the packet.
            return;
        }
        self.follow(
            &StreamKey {
                src: frame.ip.src(),
                dst: frame.ip.dst(),
                qpn: repr.bth.dest_qpn,
            },
            &Seen {
                record: number,
                psn: Psn::new(repr.bth.psn),
                repr: &repr,
                info: repr.bth.opcode.info(),
                payload_len: payload.map(<[u8]>::len),
                icrc,
                ident: frame.ip.ident(),
            },
        );
        if repr.bth.dest_qpn == mad::GSI_QPN
            && let (Some(deth), Some(payload)) = (repr.ext.deth(), payload)
            && deth.qkey == mad::GSI_QKEY
        {
            self.mad(frame, payload);
        }
    }

    fn icrc(&mut self, flow: &Flow, bytes: &[u8], ident: u16) -> bool {
        let difference = flow.residual(bytes, ident);
        if difference == 0 {
            return true;
        }
        let number = self.records;
        self.findings.note(Finding::Icrc, number, || {
            let right = flow.of(bytes, ident);
            let found = right ^ difference;
            let hint = match solve_ident(flow.residual(bytes, 0), bytes.len()) {
                Some(other) if flow.is_v4() => {
                    format!("; right for IPv4 identification {other}, the header says {ident}")
                }
                _ => "".into(),
            };
            format!("{found:#010x}, right is {right:#010x}{hint}")
        });
        false
    }

    fn follow(&mut self, key: &StreamKey, seen: &Seen<'_>) {
        match (seen.info.service, seen.info.operation) {
            (
                Service::Rc,
                Operation::Acknowledge | Operation::AtomicAcknowledge | Operation::ReadResponse,
            ) => self.response(key, seen),
            (Service::Rc, _) => self.request(key, StreamKind::Rc, seen),
            (Service::Uc, _) => self.request(key, StreamKind::Uc, seen),
            (Service::Ud, _) => {
                let src_qpn = seen.repr.ext.deth().map_or(0, |d| d.src_qpn);
                // A datagram queue pair numbers all that it sends, whoever gets it.
                let key = StreamKey {
                    dst: [0; 16],
                    qpn: src_qpn,
                    ..*key
                };
                self.request(&key, StreamKind::Ud, seen);
            }
            (Service::Cnp, _) => {}
        }
    }

    fn full(&mut self, record: u64, key: &StreamKey) -> bool {
        let full = self.requests.len() + self.responses.len() >= limits::STREAMS_MAX;
        if full {
            self.findings
                .note(Finding::NotFollowed, record, || format!("{key}"));
        }
        full
    }

    fn request(&mut self, key: &StreamKey, kind: StreamKind, seen: &Seen<'_>) {
        let index = match kind {
            StreamKind::Ud => &self.datagrams,
            _ => &self.by_key,
        };
        let at = match index.get(key) {
            Some(&at) => at,
            None => {
                if self.full(seen.record, key) {
                    return;
                }
                self.add(*key, kind, Requests::new(seen.psn))
            }
        };
        let (_, _, stream) = &mut self.requests[at];
        stream.follow(seen, &Who { key, kind }, &mut self.findings);
    }

    fn add(&mut self, key: StreamKey, kind: StreamKind, stream: Requests) -> usize {
        let at = self.requests.len();
        self.requests.push((key, kind, stream));
        match kind {
            StreamKind::Ud => self.datagrams.insert(key, at),
            _ => self.by_key.insert(key, at),
        };
        at
    }

    fn response(&mut self, key: &StreamKey, seen: &Seen<'_>) {
        if !self.responses.contains_key(key) {
            if self.full(seen.record, key) {
                return;
            }
            self.responses.insert(*key, Responses::new());
        }
        let found = seen.psn;
        let bound = self.responses.get(key).and_then(|r| r.partner);
        let partner = bound.or_else(|| self.partner_of(key, found));
        let Some(response) = self.responses.get_mut(key) else {
            return;
        };
        match partner {
            None => self.findings.note(Finding::Unpaired, seen.record, || {
                format!("{key}: {} {found:#08x}", seen.info.opcode.name())
            }),
            Some(at) => {
                response.partner = Some(at);
                let (_, _, stream) = &mut self.requests[at];
                stream.answered = true;
                stream.mtu = stream.mtu.or(response.mtu);
                let end = stream.end();
                let ahead = found.since(end);
                // A NAK may name the PSN that is to come; one of a stream that was made again is that stream's.
                let allowed = i32::from(seen.info.operation == Operation::Acknowledge);
                if ahead >= allowed && ahead < limits::PSN_RESTART && stream.packets > 0 {
                    self.findings.note(Finding::AckAhead, seen.record, || {
                        format!(
                            "{key}: {} {found:#08x}, sent up to {:#08x}",
                            seen.info.opcode.name(),
                            end.prev().get()
                        )
                    });
                }
            }
        }
        response.follow(seen, &ResponseWho(key), &mut self.findings);
    }

    /// The one stream of requests from the responses' receiver to their sender that has sent `psn` and that no other responses
    /// belong to.
    fn partner_of(&self, key: &StreamKey, psn: Psn) -> Option<usize> {
        let from = StreamKey {
            src: key.dst,
            dst: key.src,
            qpn: 0,
        };
        let to = StreamKey {
            qpn: u32::MAX,
            ..from
        };
        let mut candidates = self
            .by_key
            .range(from..=to)
            .take(limits::PARTNERS_MAX)
            .map(|(_, &at)| at)
            .filter(|&at| {
                let (_, kind, stream) = &self.requests[at];
                *kind == StreamKind::Rc
                    && !stream.answered
                    && stream.packets > 0
                    && stream.has_sent(psn)
            });
        match (candidates.next(), candidates.next()) {
            (Some(at), None) => Some(at),
            _ => None,
        }
    }

    fn mad(&mut self, frame: &Frame<'_>, payload: &[u8]) {
        let number = self.records;
        if payload.len() == mad::LEN && payload[1] != mad::CLASS_CM {
            self.findings.note(Finding::OtherMad, number, || {
                format!("management class {:#04x}", payload[1])
            });
            return;
        }
        let parsed = match Mad::parse(payload) {
            Ok(parsed) => parsed,
            Err(error) => {
                self.findings
                    .note(Finding::Mad, number, || format!("{error}"));
                return;
            }
        };
        *self.messages.entry(parsed.message.name()).or_default() += 1;
        if parsed.to_bytes() != payload {
            self.findings.note(Finding::MadReencode, number, || {
                format!("{} with reserved bits set", parsed.message.name())
            });
        }
        let (src, dst) = (frame.ip.src(), frame.ip.dst());
        match &parsed.message {
            Message::Req(req) if self.calls.len() < limits::STREAMS_MAX => {
                let named = (req.local_qpn, req.starting_psn);
                self.calls.insert((src, req.local_comm_id), named);
            }
            Message::Rep(rep) => {
                if let Some(caller) = self.calls.remove(&(dst, rep.remote_comm_id)) {
                    self.connect((dst, caller), (src, (rep.local_qpn, rep.starting_psn)));
                }
            }
            _ => {}
        }
    }

    /// Two queue pairs have been connected: what each is sent begins at the PSN that it expects.
    fn connect(&mut self, caller: (Gid, Named), callee: (Gid, Named)) {
        let mut streams = [0; 2];
        for (i, (to, from)) in [(caller, callee), (callee, caller)].into_iter().enumerate() {
            let (dst, (qpn, first)) = to;
            let key = StreamKey {
                src: from.0,
                dst,
                qpn,
            };
            if self.requests.len() >= limits::STREAMS_MAX {
                return;
            }
            // A queue pair of that number that was connected before is another one.
            streams[i] = self.add(key, StreamKind::Rc, Requests::announced(Psn::new(first)));
            self.responses.remove(&key);
        }
        let [to_caller, to_callee] = streams;
        for (answers, requests) in [(to_caller, to_callee), (to_callee, to_caller)] {
            let mut response = Responses::new();
            response.partner = Some(requests);
            self.requests[requests].2.answered = true;
            self.responses.insert(self.requests[answers].0, response);
        }
    }
}

/// A stream of requests or datagrams, for people.
struct Who<'a> {
    key: &'a StreamKey,
    kind: StreamKind,
}

impl fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            StreamKind::Ud => write!(
                f,
                "{} QP {:#x}, datagrams",
                Address(&self.key.src),
                self.key.qpn
            ),
            _ => self.key.fmt(f),
        }
    }
}

/// A stream of responses, for people.
struct ResponseWho<'a>(&'a StreamKey);

impl fmt::Display for ResponseWho<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, responses", self.0)
    }
}

/// Candidates that are tried on a packet whose ICRC is wrong: a corrupt packet whose payload looks like headers must not cost seconds.
const SEGMENT_TRIES: usize = 64;

/// Bytes of each packet of a send that was captured before segmentation offload cut it: the first length whose ICRC is right and behind
/// which another packet to the same queue pair begins. `None` if there is none.
fn segment_len(flow: &Flow, bytes: &[u8], ident: u16) -> Option<usize> {
    const MIN: usize = bth::LEN + ICRC_LEN;
    if bytes.len() < 2 * MIN {
        return None;
    }
    (MIN..=bytes.len() - MIN)
        .step_by(4)
        .filter(|&at| {
            bytes[at + 5..at + 8] == bytes[5..8]
                && bytes[at + 2..at + 4] == bytes[2..4]
                && Opcode::from_byte(bytes[at]).is_some()
        })
        .take(SEGMENT_TRIES)
        .find(|&at| flow.check(&bytes[..at], ident))
}
