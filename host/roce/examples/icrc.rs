//! What an ICRC costs: `cargo run --release -p hyv-roce --example icrc`. Medians of batches, ns a packet, and the payload's CRC alone beside it.

use std::{hint::black_box, time::Instant};

use hyv_roce::{
    icrc::{Flow, IdentSolver},
    wire::{Packet, ip},
};

fn median_ns(mut f: impl FnMut()) -> f64 {
    const BATCH: u32 = 2000;
    let mut times: Vec<_> = (0..51)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..BATCH {
                f();
            }
            start.elapsed().as_nanos() as f64 / f64::from(BATCH)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let flow = Flow::new(
        &ip::map_v4([10, 0, 0, 1]),
        &ip::map_v4([10, 0, 0, 2]),
        0xc000,
    );
    println!(
        "{:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "bytes", "crc", "icrc", "icrc/crc", "solve", "parse"
    );
    for len in [16, 20, 80, 272, 1040, 4112] {
        // An RC SEND Only.
        let mut packet = vec![0x33; len];
        packet[..4].copy_from_slice(&[4, 0, 0xff, 0xff]);
        flow.seal(&mut packet, 5);
        let crc = median_ns(|| {
            black_box(crc32fast::hash(black_box(&packet)));
        });
        let icrc = median_ns(|| {
            black_box(flow.of(black_box(&packet), 5));
        });
        let mut solver = IdentSolver::new();
        let residual = flow.residual(&packet, 0);
        let solve = median_ns(|| {
            black_box(solver.solve(black_box(residual), len));
        });
        let parse = median_ns(|| {
            let packet = Packet::new_checked(black_box(&packet));
            let _ = black_box(packet.and_then(|p| p.repr()));
        });
        println!(
            "{len:>8} {crc:>8.1} {icrc:>8.1} {:>8.2} {solve:>8.1} {parse:>8.1}",
            icrc / crc
        );
    }
}
