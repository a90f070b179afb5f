use alloc::vec::Vec;

use super::*;

/// The bytes that the specification lists, put together one by one.
fn by_the_book(src: &Gid, dst: &Gid, src_port: u16, ident: u16, packet: &[u8]) -> u32 {
    let mut b: Vec<u8> = [0xff; 8].into();
    let udp_len = (packet.len() + 8) as u16;
    if let (Some(src), Some(dst)) = (ip::mapped_v4(src), ip::mapped_v4(dst)) {
        b.extend([0x45, 0xff]);
        b.extend((udp_len + 20).to_be_bytes());
        b.extend(ident.to_be_bytes());
        b.extend([0x40, 0, 0xff, 17, 0xff, 0xff]);
        b.extend(src);
        b.extend(dst);
    } else {
        b.extend([0x6f, 0xff, 0xff, 0xff]);
        b.extend(udp_len.to_be_bytes());
        b.extend([17, 0xff]);
        b.extend(src);
        b.extend(dst);
    }
    b.extend(src_port.to_be_bytes());
    b.extend(4791u16.to_be_bytes());
    b.extend(udp_len.to_be_bytes());
    b.extend([0xff, 0xff]);
    let at = b.len();
    b.extend(&packet[..packet.len() - 4]);
    b[at + 4] = 0xff;
    crc32fast::hash(&b)
}

fn gids() -> [(Gid, Gid); 2] {
    [
        (ip::map_v4([10, 0, 0, 1]), ip::map_v4([10, 0, 0, 2])),
        ([0xfe; 16], core::array::from_fn(|i| i as u8)),
    ]
}

fn packet(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 37 + len) as u8).collect()
}

#[test]
fn tables_agree_with_the_book() {
    for (src, dst) in gids() {
        for port in [0xc000, 0xffff] {
            let flow = Flow::new(&src, &dst, port);
            for len in [16, 20, 24, 52, 300, 1040, 4140, 60_000] {
                for ident in [0, 1, 255, 256, 0xbeef, 0xffff] {
                    let mut p = packet(len);
                    assert_eq!(
                        flow.of(&p, ident),
                        by_the_book(&src, &dst, port, ident, &p),
                        "{len} {ident}"
                    );
                    flow.seal(&mut p, ident);
                    assert!(flow.check(&p, ident));
                    p[len / 2] ^= 4;
                    assert!(!flow.check(&p, ident));
                }
            }
        }
    }
}

#[test]
fn in_pieces_and_in_parts() {
    let (src, dst) = gids()[0];
    let flow = Flow::new(&src, &dst, 0xc123);
    let p = packet(1040);
    let whole = flow.of(&p, 7);
    for cut in [12, 13, 28, 500, 1036] {
        for second in [cut, 1000.max(cut), 1036] {
            let mut pieces = flow.start(p.len(), 7);
            pieces.headers(&p[..cut]);
            let mut parts = pieces;
            pieces.update(&p[cut..second]);
            pieces.update(&p[second..1036]);
            assert_eq!(pieces.finish(), whole);

            let mut part = Part::new();
            part.update(&p[cut..second]);
            part.update(&p[second..1036]);
            parts.append(&part);
            assert_eq!(parts.finish(), whole);
        }
    }
}

#[test]
fn masked_bits_do_not_count() {
    let (src, dst) = gids()[0];
    let flow = Flow::new(&src, &dst, 0xc123);
    let mut p = packet(64);
    let icrc = flow.of(&p, 9);
    p[bth::MASKED_BYTE] ^= 0xff;
    assert_eq!(flow.of(&p, 9), icrc);
}

#[test]
fn every_identification_is_found() {
    let (src, dst) = gids()[0];
    let flow = Flow::new(&src, &dst, 0xc123);
    let mut solver = IdentSolver::new();
    for len in [16, 20, 64, 1040, 4140] {
        let mut p = packet(len);
        for ident in (0..=0xffff).step_by(if len == 64 { 1 } else { 257 }) {
            flow.seal(&mut p, ident);
            let residual = flow.residual(&p, 0);
            assert_eq!(solver.solve(residual, len), Some(ident));
            assert_eq!(solve_ident(residual, len), Some(ident));
        }
        // A burst of errors of up to 16 bits is no identification's doing: a CRC of 32 bits sees it.
        flow.seal(&mut p, 3);
        p[len / 2] ^= 1;
        assert_eq!(solver.solve(flow.residual(&p, 0), len), None);
    }
}

#[test]
fn too_short_to_have_one() {
    let (src, dst) = gids()[1];
    let flow = Flow::new(&src, &dst, 0xc123);
    for len in 0..4 {
        assert!(!flow.check(&packet(len), 0));
        assert_eq!(solve_ident(0, len), None);
    }
}
