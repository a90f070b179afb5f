//! Properties that hold for any bytes. The fuzz targets and the tests that run over their corpora call the same functions.
//!
//! Each panics where a property is broken, and only there.

use alloc::vec;

use crate::{
    icrc::Flow,
    mad::{self, Mad, Message, rdma_cm},
    pcap::{Decoder, LinkType, Record, Step, analysis::Analysis},
    wire::{Packet, Syndrome, grh, ip},
};

/// A transport packet, from BTH to ICRC: what parses is emitted to the same bytes, but for the pad and the ICRC.
///
/// # Panics
/// If it is not.
pub fn packet(bytes: &[u8]) {
    let src = ip::map_v4([192, 0, 2, 1]);
    let flow = Flow::new(&src, &[0xfe; 16], 0xc000);
    let _ = flow.check(bytes, 0);
    let Ok(packet) = Packet::new_checked(bytes) else {
        return;
    };
    let (payload, pad) = (packet.payload(), packet.pad());
    assert_eq!(
        packet.headers().len() + payload.len() + pad.len() + 4,
        bytes.len()
    );
    let Ok(repr) = packet.repr() else {
        return;
    };
    let mut again = vec![0x5a; repr.buffer_len(payload.len())];
    repr.emit(payload, &mut again);
    let parsed = Packet::new_checked(&again).and_then(|p| p.repr());
    assert_eq!(parsed, Ok(repr));
    assert_eq!(again.len(), bytes.len());
    let end = bytes.len() - 4 - pad.len();
    assert_eq!(again[..end], bytes[..end]);
    flow.seal(&mut again, 0);
    assert!(flow.check(&again, 0));
    if let Some(aeth) = repr.ext.aeth() {
        assert_eq!(Syndrome::from_byte(aeth.syndrome.byte()), aeth.syndrome);
    }
    if let Some(area) = bytes.first_chunk::<{ grh::LEN }>()
        && let Ok(grh) = grh::Grh::parse(area)
    {
        let mut area = [0; grh::LEN];
        grh.emit(&mut area);
        assert_eq!(grh::Grh::parse(&area), Ok(grh));
    }
}

/// A MAD: what parses is emitted to bytes that parse to the same, and are the same but for reserved bits.
///
/// # Panics
/// If they are not.
pub fn mad(bytes: &[u8]) {
    let Ok(parsed) = Mad::parse(bytes) else {
        return;
    };
    let again = parsed.to_bytes();
    assert_eq!(Mad::parse(&again), Ok(parsed));
    for (i, (was, is)) in bytes.iter().zip(&again).enumerate() {
        // Reserved bits become 0, and nothing else changes.
        assert_eq!(was & is, *is, "byte {i}");
    }
    let private = match &parsed.message {
        Message::Req(req) => &req.private[..],
        Message::SidrReq(req) => &req.private[..],
        _ => return,
    };
    if let Ok((header, user)) = rdma_cm::Header::parse(private) {
        assert_eq!(user.len(), private.len() - rdma_cm::HEADER_LEN);
        let mut again = [0; rdma_cm::HEADER_LEN];
        header.emit(&mut again);
        // An IPv6 header with IPv4 addresses mapped into it says the same as an IPv4 one.
        assert_eq!(rdma_cm::Header::parse(&again).map(|(h, _)| h), Ok(header));
    }
    assert_eq!(again.len(), mad::LEN);
}

/// A capture file: whatever it holds, reading ends and the analysis takes it.
///
/// # Panics
/// If a step takes nothing, or more than there is.
pub fn capture(file: &[u8]) {
    let mut decoder = Decoder::new();
    let mut analysis = Analysis::new();
    let mut at = 0;
    loop {
        let rest = &file[at..];
        match decoder.step(rest) {
            Ok(Step::Record(record, len)) => {
                assert!(len > 0 && len <= rest.len());
                analysis.record(&record);
                at += len;
            }
            Ok(Step::Skip(len)) => {
                assert!(len > 0 && len <= rest.len());
                at += len;
            }
            Ok(Step::Need(need)) => {
                assert!(need > rest.len());
                let ended = decoder.end(rest, need);
                assert!(ended.is_ok() || !rest.is_empty() || at == 0);
                break;
            }
            Err(_) => break,
        }
    }
    analysis.finish();
}

/// Frames back to back, each with its length in front (one byte counts 16): more of them get past the file's format.
pub fn frames(mut bytes: &[u8]) {
    let mut analysis = Analysis::new();
    while let Some((&len, rest)) = bytes.split_first() {
        let (data, rest) = rest.split_at(rest.len().min(usize::from(len) * 16));
        analysis.record(&Record {
            time_ns: 0,
            link: LinkType::RawIp,
            original_len: data.len(),
            data,
        });
        bytes = rest;
    }
    analysis.finish();
    assert!(analysis.streams().count() as u64 <= analysis.packets);
}
