//! What `pcap check` says, for people and as JSON.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use hyv_roce::pcap::analysis::{Analysis, StreamKind};
use hyv_roce::pcap::finding::Finding;
use hyv_roce::wire::{NakCode, Opcode, Syndrome, ip};
use serde::Serialize;

/// The whole report. Names of fields are part of the interface.
#[derive(Serialize, Debug)]
pub(super) struct Report<'a> {
    file: &'a str,
    /// Nothing is wrong.
    pub ok: bool,
    /// How many findings are errors; a damaged file counts as one.
    errors: u64,
    /// What is wrong with the file itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    file_error: Option<&'a str>,
    records: u64,
    /// RoCEv2 packets; an offloaded send that was captured as one record counts each of its packets.
    packets: u64,
    /// Their bytes, from BTH to ICRC.
    bytes: u64,
    /// From the first to the last record.
    seconds: f64,
    opcodes: Vec<OpcodeLine>,
    acknowledgements: Vec<SyndromeLine>,
    cm_messages: Vec<CountLine>,
    passed_over: Vec<CountLine>,
    findings: Vec<FindingLine>,
    stream_count: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    streams: Option<Vec<StreamLine>>,
}

#[derive(Serialize, Debug)]
struct OpcodeLine {
    opcode: u8,
    name: &'static str,
    count: u64,
}

#[derive(Serialize, Debug)]
struct SyndromeLine {
    syndrome: u8,
    name: String,
    count: u64,
}

#[derive(Serialize, Debug)]
struct CountLine {
    name: &'static str,
    count: u64,
}

#[derive(Serialize, Debug)]
struct FindingLine {
    finding: &'static str,
    error: bool,
    count: u64,
    meaning: &'static str,
    /// The first few.
    examples: Vec<ExampleLine>,
}

#[derive(Serialize, Debug)]
struct ExampleLine {
    /// From 1.
    record: u64,
    detail: String,
}

#[derive(Serialize, Debug)]
struct StreamLine {
    service: &'static str,
    src: String,
    /// Of datagrams none: they may go to many.
    #[serde(skip_serializing_if = "Option::is_none")]
    dst: Option<String>,
    /// The receiving queue pair; of datagrams the sending one.
    qpn: u32,
    packets: u64,
    retransmissions: u64,
    responses: u64,
    first_psn: u32,
    next_psn: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_mtu: Option<usize>,
}

impl<'a> Report<'a> {
    pub(super) fn new(
        file: &'a str,
        analysis: &Analysis,
        file_error: Option<&'a str>,
        streams: bool,
    ) -> Report<'a> {
        let errors = analysis.findings.errors() + u64::from(file_error.is_some());
        let count = |(name, count)| CountLine { name, count };
        let (first, last) = analysis.time_ns.unwrap_or_default();
        Report {
            file,
            ok: errors == 0,
            errors,
            file_error,
            records: analysis.records,
            packets: analysis.packets,
            bytes: analysis.bytes,
            seconds: last.saturating_sub(first) as f64 / 1e9,
            opcodes: analysis
                .opcodes
                .iter()
                .map(|(&opcode, &count)| OpcodeLine {
                    opcode,
                    name: Opcode::from_byte(opcode).map_or("unknown", Opcode::name),
                    count,
                })
                .collect(),
            acknowledgements: analysis
                .syndromes
                .iter()
                .map(|(&syndrome, &count)| SyndromeLine {
                    syndrome,
                    name: syndrome_name(syndrome),
                    count,
                })
                .collect(),
            cm_messages: analysis
                .messages
                .iter()
                .map(|(n, c)| count((n, *c)))
                .collect(),
            passed_over: analysis
                .passed_over
                .iter()
                .map(|(other, c)| count((other.name(), *c)))
                .collect(),
            findings: findings(analysis),
            stream_count: analysis.streams().count(),
            streams: streams.then(|| lines(analysis)),
        }
    }

    /// Writes it to standard output; a reader that has gone away is no error.
    pub(super) fn print(&self) -> Result<()> {
        match std::io::stdout().write_all(self.text().as_bytes()) {
            Err(e) if e.kind() != ErrorKind::BrokenPipe => {
                Err(e).context("cannot write the report to standard output")
            }
            _ => Ok(()),
        }
    }

    pub(super) fn save(&self, path: &Path) -> Result<()> {
        crate::perf::save_json(path, self)
    }

    fn text(&self) -> String {
        let mut t = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut t);
        t
    }

    fn write(&self, t: &mut String) -> std::fmt::Result {
        let passed: u64 = self.passed_over.iter().map(|l| l.count).sum();
        writeln!(
            t,
            "{}: {} in {} of {:.1} s; {}, {}",
            self.file,
            plural(self.packets, "RoCEv2 packet"),
            plural(self.records, "record"),
            self.seconds,
            plural(self.bytes, "byte"),
            plural(self.stream_count as u64, "PSN stream"),
        )?;
        if !self.opcodes.is_empty() {
            writeln!(t, "\n{:>9}  opcode", "packets")?;
        }
        for line in &self.opcodes {
            writeln!(t, "{:>9}  {:#04x} {}", line.count, line.opcode, line.name)?;
        }
        let counts = |lines: &[CountLine]| {
            let items: Vec<_> = lines
                .iter()
                .map(|l| format!("{} {}", l.name, l.count))
                .collect();
            items.join(", ")
        };
        let acks: Vec<_> = self
            .acknowledgements
            .iter()
            .map(|l| format!("{} {}", l.name, l.count))
            .collect();
        for (title, items) in [
            ("acknowledgements", acks.join(", ")),
            ("CM messages", counts(&self.cm_messages)),
            ("passed over", counts(&self.passed_over)),
        ] {
            if !items.is_empty() {
                writeln!(t, "\n{title}: {items}")?;
            }
        }
        if !self.findings.is_empty() {
            writeln!(t, "\n{:>9}  finding", "count")?;
        }
        for line in &self.findings {
            let kind = if line.error { "ERROR" } else { "info" };
            writeln!(
                t,
                "{:>9}  {kind:5} {}: {}",
                line.count, line.finding, line.meaning
            )?;
            // What is normal needs no evidence, unless it is asked for.
            let shown = if line.error { line.examples.len() } else { 1 };
            for example in line.examples.iter().take(shown) {
                writeln!(t, "{:17} record {}: {}", "", example.record, example.detail)?;
            }
        }
        if let Some(streams) = &self.streams {
            writeln!(t, "\n{:>9}  stream", "packets")?;
            for s in streams {
                let to = s
                    .dst
                    .as_deref()
                    .map(|d| format!(" > {d}"))
                    .unwrap_or_default();
                write!(
                    t,
                    "{:>9}  {} {}{to} QP {:#x}: PSN {:#08x} to {:#08x}, {} sent again, {}",
                    s.packets,
                    s.service,
                    s.src,
                    s.qpn,
                    s.first_psn,
                    s.next_psn.wrapping_sub(1) & 0xff_ffff,
                    s.retransmissions,
                    plural(s.responses, "response"),
                )?;
                match s.path_mtu {
                    Some(mtu) => writeln!(t, ", path MTU {mtu}")?,
                    None => writeln!(t)?,
                }
            }
        }
        writeln!(t)?;
        if let Some(error) = self.file_error {
            writeln!(t, "ERROR: the file {error}")?;
        }
        match (self.errors, self.packets) {
            (0, 0) => writeln!(
                t,
                "no RoCEv2 packet among {}: nothing was checked",
                plural(passed, "record")
            ),
            (0, _) => writeln!(t, "nothing wrong"),
            (n, _) => writeln!(t, "{} wrong", plural(n, "thing")),
        }
    }
}

fn plural(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn syndrome_name(byte: u8) -> String {
    match Syndrome::from_byte(byte) {
        Syndrome::Ack { credits: 31 } => "ACK".into(),
        Syndrome::Ack { credits } => format!("ACK (credits {credits})"),
        Syndrome::RnrNak { timer } => format!("RNR NAK (timer {timer})"),
        Syndrome::Nak(code) => match code {
            NakCode::PsnSequence => "NAK PSN sequence",
            NakCode::InvalidRequest => "NAK invalid request",
            NakCode::RemoteAccess => "NAK remote access",
            NakCode::RemoteOperational => "NAK remote operational",
            NakCode::InvalidRd => "NAK invalid RD request",
        }
        .into(),
        Syndrome::Reserved(byte) => format!("reserved syndrome {byte:#04x}"),
    }
}

fn findings(analysis: &Analysis) -> Vec<FindingLine> {
    let line = |(finding, tally): (Finding, &hyv_roce::pcap::finding::Tally)| FindingLine {
        finding: finding.name(),
        error: finding.is_error(),
        count: tally.count,
        meaning: finding.explain(),
        examples: tally
            .examples
            .iter()
            .map(|e| ExampleLine {
                record: e.record,
                detail: e.detail.clone(),
            })
            .collect(),
    };
    analysis.findings.iter().map(line).collect()
}

fn lines(analysis: &Analysis) -> Vec<StreamLine> {
    let address = |gid: &[u8; 16]| match ip::mapped_v4(gid) {
        Some(v4) => std::net::Ipv4Addr::from(v4).to_string(),
        None => std::net::Ipv6Addr::from(*gid).to_string(),
    };
    analysis
        .streams()
        .map(|s| StreamLine {
            service: match s.kind {
                StreamKind::Rc => "RC",
                StreamKind::Uc => "UC",
                StreamKind::Ud => "UD",
            },
            src: address(&s.key.src),
            dst: (s.kind != StreamKind::Ud).then(|| address(&s.key.dst)),
            qpn: s.key.qpn,
            packets: s.packets,
            retransmissions: s.retransmissions,
            responses: s.responses,
            first_psn: s.first_psn,
            next_psn: s.next_psn,
            path_mtu: s.mtu,
        })
        .collect()
}
