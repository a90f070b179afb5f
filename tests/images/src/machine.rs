//! Life and death of an image, its arguments and its clock.

use alloc::format;
use alloc::string::ToString;
use core::time::Duration;

use hyv_unikernel::log::{debug, error, info, warn};
use hyv_unikernel::time::{self, Instant};
use hyv_unikernel::{memory, rt};

use crate::Verdict;

/// Logs at four levels, floats among them, and succeeds.
pub(crate) fn hello() -> Verdict {
    error!("hello at error");
    warn!("hello at warn");
    info!(
        "hello at info, {} MiB of RAM, up {} us",
        rt::ram_len() >> 20,
        time::now_ns() / 1000
    );
    debug!("hello at debug");
    info!(
        "pi is {:.6}, e is {:e}",
        core::f64::consts::PI,
        core::f32::consts::E
    );
    info!(
        "overhead {} KiB, heap {} KiB",
        memory::overhead() >> 10,
        memory::heap_size() >> 10
    );
    rt::ready();
    Ok(())
}

/// Ends with the code in `code=N`.
pub(crate) fn exit_code() -> i32 {
    rt::args()
        .get("code")
        .and_then(|c| c.parse().ok())
        .unwrap_or(3)
}

/// Logs `arg <word>` for each of the application's words, and `line <text>`.
pub(crate) fn args() -> Verdict {
    for w in rt::args().words() {
        info!("arg {w}");
    }
    info!("line {}", rt::args().text());
    Ok(())
}

/// The clock never goes back, has a sane rate against the host's clock, and waits end.
pub(crate) fn time() -> Verdict {
    let header = &rt::window().header;
    let host_now = || {
        header
            .host_time_ns
            .load(core::sync::atomic::Ordering::Acquire)
    };
    // Start at a beat, so that both clocks are read at the same moment to some microseconds.
    let next_beat = |last: u64| loop {
        let t = host_now();
        if t != last {
            return (t, time::now_ns());
        }
    };
    let (host0, guest0) = next_beat(host_now());
    let mut last = time::now_ns();
    let mut reads = 0_u64;
    let (mut host1, mut guest1) = (host0, guest0);
    while host1 - host0 < 1_000_000_000 {
        (host1, guest1) = {
            loop {
                let now = time::now_ns();
                if now < last {
                    return Err(format!("the clock went back from {last} to {now}"));
                }
                last = now;
                reads += 1;
                let t = host_now();
                if t != host1 {
                    break (t, now);
                }
            }
        };
    }
    let (host, guest) = (host1 - host0, guest1 - guest0);
    let off_ppm = (guest as i64 - host as i64) * 1_000_000 / host as i64;
    info!(
        "tsc {} Hz, guest {guest} ns, host {host} ns, {off_ppm} ppm, {reads} readings",
        time::tsc_hz()
    );
    // Either side may lose its core between a beat and its reading: 50 ms on a busy machine.
    if off_ppm.abs() > 50_000 {
        return Err(format!("guest and host clocks differ by {off_ppm} ppm"));
    }
    let start = Instant::now();
    let end = start + Duration::from_millis(1);
    while Instant::now() < end {}
    if start.elapsed() < Duration::from_millis(1) {
        return Err("an Instant ended early".to_string());
    }
    Ok(())
}
