//! Captures and made-up packets, for several test files.
#![allow(dead_code, reason = "not every test file needs all of it")]

use hyv_roce::{
    carrier::Gid,
    icrc::Flow,
    pcap::{Decoder, LinkType, Record, Step, analysis::Analysis},
    wire::{Extension, Opcode, Repr, bth::Bth, ethernet, ip, udp},
};

/// The frames of one of our captures.
pub fn frames(name: &str) -> Vec<Vec<u8>> {
    let path = format!("{}/tests/captures/{name}", env!("CARGO_MANIFEST_DIR"));
    let file = std::fs::read(&path).unwrap();
    let mut decoder = Decoder::new();
    let mut frames = vec![];
    let mut at = 0;
    loop {
        match decoder.step(&file[at..]).unwrap() {
            Step::Record(record, len) => {
                assert_eq!(record.link, LinkType::Ethernet);
                assert_eq!(record.original_len, record.data.len());
                frames.push(record.data.to_vec());
                at += len;
            }
            Step::Skip(len) => at += len,
            Step::Need(need) => {
                decoder.end(&file[at..], need).unwrap();
                return frames;
            }
        }
    }
}

pub fn record(link: LinkType, data: &[u8]) -> Record<'_> {
    Record {
        time_ns: 0,
        link,
        original_len: data.len(),
        data,
    }
}

/// What becomes of Ethernet frames.
pub fn analyse<T: AsRef<[u8]>>(frames: impl IntoIterator<Item = T>) -> Analysis {
    analyse_link(LinkType::Ethernet, frames)
}

pub fn analyse_link<T: AsRef<[u8]>>(
    link: LinkType,
    frames: impl IntoIterator<Item = T>,
) -> Analysis {
    let mut analysis = Analysis::new();
    for frame in frames {
        analysis.record(&record(link, frame.as_ref()));
    }
    analysis.finish();
    analysis
}

/// Findings as (name, count).
pub fn found(analysis: &Analysis) -> Vec<(&'static str, u64)> {
    analysis
        .findings
        .iter()
        .map(|(f, t)| (f.name(), t.count))
        .collect()
}

pub const A: Gid = ip::map_v4([192, 0, 2, 1]);
pub const B: Gid = ip::map_v4([192, 0, 2, 2]);
pub const A6: Gid = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
pub const B6: Gid = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];

/// A packet from BTH to ICRC.
pub fn packet(src: &Gid, dst: &Gid, ident: u16, repr: &Repr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; repr.buffer_len(payload.len())];
    repr.emit(payload, &mut bytes);
    Flow::new(src, dst, 0xc000).seal(&mut bytes, ident);
    bytes
}

/// An IP packet around bytes of a transport packet, or of several.
pub fn ip_packet(src: &Gid, dst: &Gid, ident: u16, bytes: &[u8]) -> Vec<u8> {
    let flow = hyv_roce::carrier::Flow {
        dst: *dst,
        src_port: 0xc000,
        traffic_class: 0x68,
        hop_limit: 64,
        flow_label: if ip::mapped_v4(dst).is_some() { 0 } else { 7 },
    };
    let (headers, len) = hyv_roce::pcap::frame::headers(&flow, src, ident, bytes.len());
    [&headers[..len], bytes].concat()
}

/// An Ethernet frame around an IP packet.
pub fn frame(ip_packet: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; ethernet::LEN];
    ethernet::Ethernet {
        dst: [2; 6],
        src: [4; 6],
        ethertype: if ip_packet[0] >> 4 == 4 {
            ethernet::IPV4
        } else {
            ethernet::IPV6
        },
        header_len: ethernet::LEN,
    }
    .emit(&mut bytes);
    bytes.extend(ip_packet);
    // Ethernet's shortest frame is padded.
    bytes.resize(bytes.len().max(60), 0);
    bytes
}

/// A frame with one packet without extended headers, from A to B.
pub fn plain(opcode: Opcode, qpn: u32, psn: u32, payload: &[u8]) -> Vec<u8> {
    with(opcode, Extension::None, qpn, psn, payload)
}

/// A frame with one packet from A to B.
pub fn with(opcode: Opcode, ext: Extension, qpn: u32, psn: u32, payload: &[u8]) -> Vec<u8> {
    between(&A, &B, opcode, ext, qpn, psn, payload)
}

/// A frame with one packet.
pub fn between(
    src: &Gid,
    dst: &Gid,
    opcode: Opcode,
    ext: Extension,
    qpn: u32,
    psn: u32,
    payload: &[u8],
) -> Vec<u8> {
    let repr = Repr {
        bth: Bth::new(opcode, qpn, psn),
        ext,
    };
    let ident = psn as u16 | 1;
    frame(&ip_packet(
        src,
        dst,
        ident,
        &packet(src, dst, ident, &repr, payload),
    ))
}

/// Bytes in front of the BTH of an IPv4 frame.
pub const V4_FRONT: usize = ethernet::LEN + ip::V4_LEN + udp::LEN;

/// Makes the ICRC of an IPv4 frame of [`plain`] or [`with`] right again after its bytes were changed.
pub fn reseal(frame: &mut [u8]) {
    let ident = u16::from_be_bytes([frame[18], frame[19]]);
    let end = ethernet::LEN + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    Flow::new(&A, &B, 0xc000).seal(&mut frame[V4_FRONT..end], ident);
}
