//! What an analysis finds in captures of Linux's rdma_rxe, whole and damaged, and in packets made up to show one thing each.

mod common;

use common::*;
use hyv_roce::{
    carrier::Gid,
    pcap::{LinkType, Record, analysis::Analysis, finding::Finding, frame::Other},
    wire::{Aeth, Deth, Extension, Opcode, Repr, Reth, Syndrome, bth::Bth},
};

fn ack(qpn: u32, psn: u32, syndrome: Syndrome) -> Vec<u8> {
    let aeth = Aeth { syndrome, msn: 1 };
    let opcode = Opcode::RcAcknowledge;
    between(&B, &A, opcode, Extension::Aeth(aeth), qpn, psn, &[])
}

fn read_request(psn: u32, dma_len: u32) -> Vec<u8> {
    let reth = Reth {
        address: 0x1000,
        rkey: 7,
        dma_len,
    };
    with(Opcode::RcReadRequest, Extension::Reth(reth), 0x11, psn, &[])
}

fn send(psn: u32) -> Vec<u8> {
    plain(Opcode::RcSendOnly, 0x11, psn, b"seven b")
}

fn detail(analysis: &Analysis, finding: Finding) -> &str {
    let (_, tally) = analysis
        .findings
        .iter()
        .find(|(f, _)| *f == finding)
        .unwrap();
    &tally.examples[0].detail
}

#[test]
fn captures_of_linux_have_no_errors() {
    let vec = analyse(frames("vec.pcap"));
    assert_eq!((vec.records, vec.packets), (298, 296));
    assert_eq!(vec.passed_over.get(&Other::NotIp), Some(&2));
    assert_eq!(found(&vec), [("retransmission", 21), ("psn-wrap", 1)]);
    // All opcodes but CNP.
    assert_eq!(vec.opcodes.len(), Opcode::ALL.len() - 1);
    assert_eq!(
        vec.syndromes.keys().copied().collect::<Vec<_>>(),
        [0x1f, 0x2e, 0x34, 0x62, 0x63]
    );
    let mtus: Vec<_> = vec.streams().filter_map(|s| s.mtu).collect();
    assert!([256, 512, 1024].iter().all(|m| mtus.contains(m)));

    let pingpong = analyse(frames("pingpong.pcap"));
    assert_eq!(
        found(&pingpong),
        [("retransmission", 31), ("repeated-response", 30)]
    );
    assert!(
        pingpong
            .streams()
            .all(|s| s.responses > 0 || s.kind != hyv_roce::pcap::analysis::StreamKind::Rc)
    );

    let cm = analyse(frames("cm.pcap"));
    assert_eq!(found(&cm), []);
    assert_eq!(cm.messages.get("REQ"), Some(&3));
    assert_eq!(cm.messages.values().sum::<u64>(), 14);
}

#[test]
fn one_flipped_bit_anywhere_is_found() {
    for (n, frame) in frames("vec.pcap").into_iter().enumerate() {
        if frame[12..14] != [8, 0] {
            continue;
        }
        for byte in 14..frame.len() {
            let mut frame = frame.clone();
            frame[byte] ^= 1 << (byte % 8);
            let analysis = analyse([frame]);
            let another_protocols =
                analysis.passed_over.len() == 1 && [14, 20, 21, 23, 36, 37].contains(&byte);
            // Masked in the ICRC: BTH byte 4, and the UDP checksum, which is reported but may be offload's doing.
            let masked = [V4_FRONT + 4, 40, 41].contains(&byte);
            if !another_protocols && !masked {
                assert!(analysis.findings.errors() > 0, "frame {n} byte {byte}");
            }
        }
        if n > 40 {
            break;
        }
    }
}

#[test]
fn every_cut_is_named() {
    let all = frames("cm.pcap");
    for frame in &all[..8] {
        for len in 0..frame.len() {
            let mut analysis = Analysis::new();
            analysis.record(&Record {
                original_len: frame.len(),
                ..record(LinkType::Ethernet, &frame[..len])
            });
            if len < 38 {
                // Nobody can tell that it is RoCEv2.
                assert_eq!(analysis.passed_over.get(&Other::Short), Some(&1), "{len}");
            } else {
                assert_eq!(analysis.findings.count(Finding::Cut), 1, "{len}");
                assert_eq!(analysis.findings.errors(), 1, "{len}");
            }
        }
    }
}

#[test]
fn damaged_headers_are_named() {
    let mut checksum = send(1);
    checksum[24] ^= 1;
    let mut udp_len = send(1);
    udp_len[39] ^= 4;
    let mut total = send(1);
    total[17] += 80;
    total[24..26].fill(0);
    let sum = hyv_roce::wire::ip::checksum(&total[14..34]);
    total[24..26].copy_from_slice(&sum.to_be_bytes());
    for frame in [checksum, udp_len, total] {
        assert_eq!(found(&analyse([frame])), [("header", 1)]);
    }
}

#[test]
fn fragments_are_named() {
    let mut first = send(1);
    first[20] = 0x20;
    let mut later = send(1);
    later[20..22].copy_from_slice(&[0, 10]);
    for frame in [&mut first, &mut later] {
        frame[24..26].fill(0);
        let sum = hyv_roce::wire::ip::checksum(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    let analysis = analyse([first, later]);
    assert_eq!(found(&analysis), [("fragment", 1)]);
    assert_eq!(analysis.passed_over.get(&Other::Fragment), Some(&1));
}

#[test]
fn what_is_no_roce_is_passed_over() {
    let mut dns = send(1);
    dns[36..38].copy_from_slice(&53u16.to_be_bytes());
    let mut tcp = send(1);
    tcp[23] = 6;
    let mut arp = send(1);
    arp[12..14].copy_from_slice(&[8, 6]);
    let analysis = analyse([dns, tcp, arp, vec![1; 13]]);
    assert_eq!(analysis.packets, 0);
    assert_eq!(found(&analysis), []);
    let want = [Other::NotIp, Other::NotUdp, Other::OtherPort, Other::Short];
    assert!(analysis.passed_over.keys().eq(&want));
}

#[test]
fn all_kinds_of_frames() {
    for (src, dst) in [(&A, &B), (&A6, &B6)] {
        let repr = Repr {
            bth: Bth::new(Opcode::UcSendOnly, 5, 9),
            ext: Extension::None,
        };
        let ip = ip_packet(src, dst, 77, &packet(src, dst, 77, &repr, b"hello"));
        let ethertype = if src == &A { [8, 0] } else { [0x86, 0xdd] };
        let sll = [&[0; 14], &ethertype[..], &ip].concat();
        let sll2 = [&ethertype[..], &[0; 18], &ip].concat();
        let ethernet = frame(&ip);
        let vlan = [&ethernet[..12], &[0x81, 0, 0, 5], &ethernet[12..]].concat();
        let qinq = [&ethernet[..12], &[0x88, 0xa8, 0, 5], &vlan[12..]].concat();
        for (link, data) in [
            (LinkType::RawIp, ip),
            (LinkType::LinuxSll, sll),
            (LinkType::LinuxSll2, sll2),
            (LinkType::Ethernet, ethernet),
            (LinkType::Ethernet, vlan),
            (LinkType::Ethernet, qinq),
        ] {
            let analysis = analyse_link(link, [data]);
            assert_eq!(
                (analysis.packets, found(&analysis)),
                (1, vec![]),
                "{link:?}"
            );
        }
    }
    let unknown = analyse_link(LinkType::Other(147), [send(1)]);
    assert_eq!(unknown.passed_over.get(&Other::LinkType), Some(&1));
}

#[test]
fn pad_that_is_not_zero_is_not_what_would_be_emitted() {
    let mut frame = send(1);
    frame[V4_FRONT + 12 + 7] = 9;
    reseal(&mut frame);
    assert_eq!(found(&analyse([frame])), [("re-encode", 1)]);
}

#[test]
fn reserved_bits_survive() {
    let mut frame = send(1);
    frame[V4_FRONT + 4] = 0xff;
    frame[V4_FRONT + 8] = 0xff;
    reseal(&mut frame);
    assert_eq!(found(&analyse([frame])), []);
}

#[test]
fn malformed_and_unknown() {
    let mut version = send(1);
    version[V4_FRONT + 1] |= 3;
    let mut pad = plain(Opcode::RcSendOnly, 1, 1, &[]);
    pad[V4_FRONT + 1] |= 0x10;
    let mut excess = send(1);
    excess[V4_FRONT] = Opcode::RcAcknowledge.byte();
    let mut short = send(1);
    short[V4_FRONT] = Opcode::RcCompareSwap.byte();
    for mut frame in [version, pad, excess, short] {
        reseal(&mut frame);
        assert_eq!(found(&analyse([frame])), [("malformed", 1)]);
    }
    for opcode in [0x15, 0x1d, 0x44, 0xa0, 0xff] {
        let mut frame = send(1);
        frame[V4_FRONT] = opcode;
        reseal(&mut frame);
        assert_eq!(found(&analyse([frame])), [("unknown-opcode", 1)]);
    }
}

#[test]
fn the_right_identification_is_named() {
    let repr = Repr {
        bth: Bth::new(Opcode::RcSendOnly, 1, 1),
        ext: Extension::None,
    };
    let bytes = packet(&A, &B, 4711, &repr, b"1234");
    let analysis = analyse([frame(&ip_packet(&A, &B, 9, &bytes))]);
    assert_eq!(found(&analysis), [("icrc", 1)]);
    let said = detail(&analysis, Finding::Icrc);
    assert!(said.contains("4711"), "{said}");
}

#[test]
fn offloaded_sends_are_taken_apart() {
    for (src, dst) in [(&A, &B), (&A6, &B6)] {
        for (len, last, count) in [(1024, 1024, 5), (1024, 17, 3), (8, 8, 40), (0, 0, 2)] {
            let mut bytes = vec![];
            for i in 0..count {
                let repr = Repr {
                    bth: Bth::new(Opcode::RcSendOnly, 0x4711, 0xff_fffe + i),
                    ext: Extension::None,
                };
                let payload = vec![i as u8; if i + 1 == count { last } else { len }];
                bytes.extend(packet(src, dst, 3 + i as u16, &repr, &payload));
            }
            let analysis = analyse([frame(&ip_packet(src, dst, 3, &bytes))]);
            let wraps = count > 2;
            let want = [("offload", 1), ("psn-wrap", 1)];
            assert_eq!(found(&analysis), want[..1 + usize::from(wraps)]);
            assert_eq!(analysis.packets, u64::from(count));

            // One of them damaged: that one is found.
            let at = bytes.len() / 2 + 3;
            bytes[at] ^= 0x10;
            let analysis = analyse([frame(&ip_packet(src, dst, 3, &bytes))]);
            assert_ne!(analysis.findings.errors(), 0);
        }
    }
}

#[test]
fn udp_checksums_are_looked_at() {
    let mut right = send(1);
    let sum =
        hyv_roce::wire::udp::checksum(&[192, 0, 2, 1], &[192, 0, 2, 2], &right[34..34 + 8 + 24]);
    right[40..42].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(found(&analyse([&right])), []);
    right[41] ^= 1;
    assert_eq!(found(&analyse([&right])), [("udp-checksum", 1)]);
}

#[test]
fn loss_and_what_follows() {
    // 3 is lost, and sent again with what came after it.
    let mut frames: Vec<_> = [1, 2, 4, 5, 3].map(send).into();
    let mut again: Vec<_> = [4, 5, 6].map(send).into();
    for frame in &mut again {
        // Another identification.
        frame[18] ^= 0x40;
        frame[24..26].fill(0);
        let sum = hyv_roce::wire::ip::checksum(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        reseal(frame);
    }
    frames.extend(again);
    let analysis = analyse(&frames);
    assert_eq!(
        found(&analysis),
        [("gap", 1), ("gap-filled", 1), ("retransmission", 2)]
    );
    // The network's own doing: the same packet twice.
    frames.insert(1, frames[0].clone());
    assert_eq!(
        found(&analyse(&frames))[2..],
        [("retransmission", 2), ("duplicate", 1)]
    );
}

#[test]
fn answered_and_never_seen() {
    let mut frames: Vec<_> = [1, 2, 5, 6].map(send).into();
    assert_eq!(found(&analyse(&frames)), [("gap", 1)]);
    frames.push(ack(0x22, 6, Syndrome::ACK));
    assert_eq!(found(&analyse(&frames)), [("missing", 2), ("gap", 1)]);
    frames.push(send(3));
    frames.push(send(4));
    assert_eq!(found(&analyse(&frames)), [("gap", 1), ("gap-filled", 2)]);
}

#[test]
fn answers_to_what_was_not_sent() {
    let mut frames = vec![send(1), ack(0x22, 1, Syndrome::ACK), send(2)];
    // A NAK names what is expected.
    let nak = Syndrome::Nak(hyv_roce::wire::NakCode::PsnSequence);
    frames.push(ack(0x22, 3, nak));
    assert_eq!(found(&analyse(&frames)), []);
    frames.push(ack(0x22, 4, Syndrome::ACK));
    assert_eq!(found(&analyse(&frames)), [("ack-ahead", 1)]);
    // Without any request.
    assert_eq!(
        found(&analyse([ack(0x22, 1, Syndrome::ACK)])),
        [("unpaired", 1)]
    );
}

#[test]
fn reads_take_as_many_psns_as_their_answers_have_packets() {
    // Whatever the path MTU, as long as it is not known.
    for (next, ok) in [
        (9, true),
        (5, true),
        (3, true),
        (2, true),
        (4, false),
        (1, false),
    ] {
        let analysis = analyse([read_request(1, 2048), send(next)]);
        assert_eq!(found(&analysis).is_empty(), ok, "{next}");
    }
    let first = plain(Opcode::RcSendFirst, 0x11, 1, &[0; 1024]);
    let last = plain(Opcode::RcSendLast, 0x11, 2, &[0; 1]);
    for (next, ok) in [(5, true), (11, false), (4, false)] {
        let frames = [
            first.clone(),
            last.clone(),
            read_request(3, 2048),
            send(next),
        ];
        assert_eq!(found(&analyse(frames)).is_empty(), ok, "{next}");
    }
    // A READ of nothing takes one.
    assert_eq!(found(&analyse([read_request(1, 0), send(2)])), []);
}

#[test]
fn messages_have_an_order() {
    let p = |opcode, psn, len: usize| plain(opcode, 0x11, psn, &vec![0; len]);
    let ok = [
        p(Opcode::RcSendOnly, 1, 4),
        p(Opcode::RcSendFirst, 2, 256),
        p(Opcode::RcSendMiddle, 3, 256),
        p(Opcode::RcSendLast, 4, 3),
    ];
    assert_eq!(found(&analyse(&ok)), []);
    for (at, opcode) in [
        (1, Opcode::RcSendMiddle),
        (2, Opcode::RcWriteMiddle),
        (2, Opcode::RcSendFirst),
        (3, Opcode::RcSendOnly),
    ] {
        let mut frames = ok.clone();
        frames[at] = p(opcode, at as u32 + 1, 256);
        assert!(
            analyse(&frames).findings.count(Finding::OpcodeSequence) > 0,
            "{opcode:?}"
        );
    }
    for len in [0, 100, 512, 300] {
        let mut frames = ok.clone();
        frames[2] = p(Opcode::RcSendMiddle, 3, len);
        assert_eq!(found(&analyse(&frames)), [("payload-length", 1)], "{len}");
    }
}

#[test]
fn restarts_and_wraps() {
    let frames = [
        send(0xff_fffe),
        send(0xff_ffff),
        send(0),
        send(0x80_0000),
        send(0x80_0001),
    ];
    assert_eq!(found(&analyse(frames)), [("restart", 1), ("psn-wrap", 1)]);
}

#[test]
fn datagrams_are_numbered_by_their_sender() {
    let deth = Extension::Deth(Deth {
        qkey: 1,
        reserved: 0,
        src_qpn: 0x33,
    });
    let to = |dst: &Gid, psn| between(&A, dst, Opcode::UdSendOnly, deth, psn, psn, b"x");
    let other = hyv_roce::wire::ip::map_v4([192, 0, 2, 9]);
    let mut frames = vec![to(&B, 1), to(&other, 2), to(&B, 3)];
    assert_eq!(found(&analyse(&frames)), []);
    frames.push(to(&B, 5));
    assert_eq!(found(&analyse(&frames)), [("gap", 1)]);
}

#[test]
fn mads_are_checked() {
    let mut broken = 0;
    for frame in frames("cm.pcap") {
        // To QP1: class, and a reserved bit behind the header of a REQ.
        if frame[V4_FRONT + 5..V4_FRONT + 8] != [0, 0, 1] {
            continue;
        }
        let src: [u8; 4] = frame[26..30].try_into().unwrap();
        let dst: [u8; 4] = frame[30..34].try_into().unwrap();
        let port = u16::from_be_bytes([frame[34], frame[35]]);
        let ident = u16::from_be_bytes([frame[18], frame[19]]);
        let seal = |frame: &mut Vec<u8>| {
            let flow = hyv_roce::icrc::Flow::new(
                &hyv_roce::wire::ip::map_v4(src),
                &hyv_roce::wire::ip::map_v4(dst),
                port,
            );
            flow.seal(&mut frame[V4_FRONT..], ident);
        };
        let mad = V4_FRONT + 20;
        for (at, finding) in [
            (mad + 1, "other-mad"),
            (mad + 2, "mad"),
            (mad, "mad"),
            (mad + 18, "mad-re-encode"),
        ] {
            let mut frame = frame.clone();
            frame[at] ^= 0x40;
            seal(&mut frame);
            assert_eq!(found(&analyse([frame])), [(finding, 1)]);
            broken += 1;
        }
    }
    assert_eq!(broken, 14 * 4);
}
