//! What an analysis can find.

use alloc::{string::String, vec::Vec};

use crate::limits;

/// Kinds of findings.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Finding {
    /// Wrong ICRC.
    Icrc,
    /// Emitting what was parsed gives other bytes.
    Reencode,
    /// IP or UDP header of a packet to port 4791 is wrong.
    Header,
    /// A fragment: RoCEv2 is not fragmented.
    Fragment,
    /// The capture's snap length cut the packet, so that its ICRC cannot be checked.
    Cut,
    /// The transport packet does not parse.
    Malformed,
    /// An opcode that is reserved, or of RD, XRC or a vendor.
    UnknownOpcode,
    /// A CM MAD does not parse.
    Mad,
    /// Emitting a parsed CM MAD gives other bytes: reserved bits are set.
    MadReencode,
    /// First, Middle, Last and Only in an order that makes no messages.
    OpcodeSequence,
    /// A First or Middle packet whose payload is not the path MTU.
    PayloadLength,
    /// An answer to a PSN that was not sent.
    AckAhead,
    /// PSNs that were answered and are not in the capture.
    Missing,
    /// Several packets of one send with segmentation offload, captured as one; checked one by one.
    Offload,
    /// PSNs were passed over: lost before the capture, or on their way.
    Gap,
    /// A packet filled a gap: sent again, or overtaken.
    Filled,
    /// A PSN that was sent before, sent again.
    Retransmission,
    /// The same IP packet twice.
    Duplicate,
    /// A response to a PSN that had been answered before.
    RepeatedResponse,
    /// A stream of PSNs that started anew: the queue pair was made again.
    Restart,
    /// The PSN wrapped from 0xffffff to 0.
    Wrap,
    /// A UDP checksum that is neither 0 nor right: offload leaves it to the device.
    UdpChecksum,
    /// A MAD of another class than CM on QP1.
    OtherMad,
    /// Responses whose requests are not in the capture.
    Unpaired,
    /// Packets of more streams than are followed.
    NotFollowed,
}

impl Finding {
    /// All of them, errors first.
    pub const ALL: [Finding; 25] = [
        Finding::Icrc,
        Finding::Reencode,
        Finding::Header,
        Finding::Fragment,
        Finding::Cut,
        Finding::Malformed,
        Finding::UnknownOpcode,
        Finding::Mad,
        Finding::MadReencode,
        Finding::OpcodeSequence,
        Finding::PayloadLength,
        Finding::AckAhead,
        Finding::Missing,
        Finding::Offload,
        Finding::Gap,
        Finding::Filled,
        Finding::Retransmission,
        Finding::Duplicate,
        Finding::RepeatedResponse,
        Finding::Restart,
        Finding::Wrap,
        Finding::UdpChecksum,
        Finding::OtherMad,
        Finding::Unpaired,
        Finding::NotFollowed,
    ];

    /// Whether something is wrong: with packets, or with the capture. All else is what networks do.
    pub const fn is_error(self) -> bool {
        (self as u8) <= Finding::Missing as u8
    }

    /// For reports; the same in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Finding::Icrc => "icrc",
            Finding::Reencode => "re-encode",
            Finding::Header => "header",
            Finding::Fragment => "fragment",
            Finding::Cut => "cut-by-snap-length",
            Finding::Malformed => "malformed",
            Finding::UnknownOpcode => "unknown-opcode",
            Finding::Mad => "mad",
            Finding::MadReencode => "mad-re-encode",
            Finding::OpcodeSequence => "opcode-sequence",
            Finding::PayloadLength => "payload-length",
            Finding::AckAhead => "ack-ahead",
            Finding::Missing => "missing",
            Finding::Offload => "offload",
            Finding::Gap => "gap",
            Finding::Filled => "gap-filled",
            Finding::Retransmission => "retransmission",
            Finding::Duplicate => "duplicate",
            Finding::RepeatedResponse => "repeated-response",
            Finding::Restart => "restart",
            Finding::Wrap => "psn-wrap",
            Finding::UdpChecksum => "udp-checksum",
            Finding::OtherMad => "other-mad",
            Finding::Unpaired => "unpaired",
            Finding::NotFollowed => "not-followed",
        }
    }

    /// One line for people.
    pub const fn explain(self) -> &'static str {
        match self {
            Finding::Icrc => "wrong ICRC",
            Finding::Reencode => "emitting what was parsed gives other bytes",
            Finding::Header => "wrong IP or UDP header",
            Finding::Fragment => "IP fragment: RoCEv2 may not be fragmented",
            Finding::Cut => {
                "cut by the capture's snap length, ICRC not checked (capture with: tcpdump -s 0)"
            }
            Finding::Malformed => "not a transport packet",
            Finding::UnknownOpcode => "opcode that is reserved, or of RD, XRC or a vendor",
            Finding::Mad => "CM MAD that does not parse",
            Finding::MadReencode => "emitting a parsed CM MAD gives other bytes",
            Finding::OpcodeSequence => {
                "First, Middle, Last and Only in no order that makes messages"
            }
            Finding::PayloadLength => "First or Middle packet whose payload is not the path MTU",
            Finding::AckAhead => "answer to a PSN that was not sent",
            Finding::Missing => "PSNs that were answered and are not in the capture",
            Finding::Offload => "packets captured as one before segmentation, checked one by one",
            Finding::Gap => "PSNs passed over",
            Finding::Filled => "gap filled later",
            Finding::Retransmission => "PSN sent again",
            Finding::Duplicate => "the same IP packet twice",
            Finding::RepeatedResponse => "response to a PSN that had been answered",
            Finding::Restart => "stream of PSNs started anew",
            Finding::Wrap => "PSN wrapped to 0",
            Finding::UdpChecksum => "UDP checksum neither 0 nor right (left to offload)",
            Finding::OtherMad => "MAD of another class than CM",
            Finding::Unpaired => "response without its request in the capture",
            Finding::NotFollowed => "of more streams than are followed",
        }
    }
}

/// One finding, told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Example {
    /// Number of the record in the capture, from 1, as Wireshark counts.
    pub record: u64,
    /// What was found.
    pub detail: String,
}

/// All findings of a kind.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// How many.
    pub count: u64,
    /// The first of them.
    pub examples: Vec<Example>,
}

/// Findings by kind.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    tallies: alloc::collections::BTreeMap<Finding, Tally>,
}

impl Findings {
    /// Notes one. `detail` is asked only for the first few.
    pub fn note(&mut self, finding: Finding, record: u64, detail: impl FnOnce() -> String) {
        self.note_many(finding, 1, record, detail);
    }

    /// Notes several at once.
    pub fn note_many(
        &mut self,
        finding: Finding,
        count: u64,
        record: u64,
        detail: impl FnOnce() -> String,
    ) {
        let tally = self.tallies.entry(finding).or_default();
        tally.count += count;
        if tally.examples.len() < limits::EXAMPLES_MAX {
            tally.examples.push(Example {
                record,
                detail: detail(),
            });
        }
    }

    /// How many of a kind.
    pub fn count(&self, finding: Finding) -> u64 {
        self.tallies.get(&finding).map_or(0, |t| t.count)
    }

    /// How many that are errors.
    pub fn errors(&self) -> u64 {
        self.iter()
            .filter(|(f, _)| f.is_error())
            .map(|(_, t)| t.count)
            .sum()
    }

    /// All kinds of which there are any, errors first.
    pub fn iter(&self) -> impl Iterator<Item = (Finding, &Tally)> {
        self.tallies.iter().map(|(f, t)| (*f, t))
    }
}
