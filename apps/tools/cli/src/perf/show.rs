//! What people see on standard error while it runs.

use hyv_lab::values;

use super::What;
use super::report::{Report, ResultLine};

pub(super) fn header(what: What, wire: bool) {
    eprintln!(
        "{:>9} {:>8} {:>7} {:>9} {:>9} {:>9} {:>9} {:>7}{}",
        "verb",
        "size",
        "where",
        "min",
        "typical",
        "p99",
        "p99.9",
        "floors",
        match (what, wire) {
            (What::Lat, false) => "  2-line",
            (What::Lat, true) => "",
            (What::Bw, false) => "       GB/s  memcpy",
            (What::Bw, true) => "       GB/s    bare",
        }
    );
}

pub(super) fn show(line: &ResultLine) {
    let time = |ns: f64| values::nanos(ns.round() as u64);
    let mut text = format!(
        "{:>9} {:>8} {:>7} {:>9} {:>9} {:>9} {:>9} {:>7.2}",
        line.verb,
        values::bytes(u64::from(line.size)),
        line.place,
        time(line.min_ns),
        time(line.p50_ns),
        time(line.p99_ns),
        time(line.p999_ns),
        line.floors
    );
    if let Some(exchanges) = line.exchanges {
        text.push_str(&format!(" {exchanges:>7.2}"));
    }
    if let Some(rate) = line.bytes_per_s {
        text.push_str(&format!(" {:>10.2}", rate / 1e9));
    }
    if let Some(share) = line.of_memcpy.or(line.of_bare) {
        text.push_str(&format!(" {:>6.0}%", share * 100.0));
    }
    eprintln!("{text}");
}

pub(super) fn footer(report: &Report) {
    if let Some(aa) = report.aa {
        eprintln!(
            "A/A: native / native {:.3} ({:.3} to {:.3})",
            aa.median, aa.low, aa.high
        );
    }
    if let Some(floor) = report.floor.cache_line_rtt_ns {
        eprintln!("floor: {floor:.0} ns for one cache line to the measured side's core and back");
    }
    if let Some(two) = report.floor.two_lines_rtt_ns {
        eprintln!(
            "2-line: {two:.0} ns for one line there and another one back, the least for a request and its completion"
        );
    }
    let us = |ns: f64| ns / 1e3;
    for (socket, floor) in [
        ("UDP", report.floor.udp_rtt_ns),
        ("AF_PACKET", report.floor.packet_rtt_ns),
    ] {
        if let Some(ns) = floor {
            eprintln!(
                "floor: {:.1} us for 64 B by bare {socket} sockets and back",
                us(ns)
            );
        }
    }
    if let Some(rate) = report.floor.bandwidth {
        eprintln!("floor: {:.2} GB/s one way by bare sockets", rate / 1e9);
    }
    if let Some(exits) = report.vm_exits_per_million_ops {
        eprintln!("VM exits that the guest caused: {exits:.1} per million data verbs");
    }
}
