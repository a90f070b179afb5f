//! Life and death of an image, its arguments and its clock.

use alloc::format;
use alloc::string::{String, ToString};
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
    let mut last = time::now_ns();
    let mut reads = 0_u64;
    let mut seen = host_now();
    let mut next_beat = || loop {
        let now = time::now_ns();
        if now < last {
            return Err(format!("the clock went back from {last} to {now}"));
        }
        last = now;
        reads += 1;
        let beat = host_now();
        if beat != seen {
            seen = beat;
            return Ok((beat, now));
        }
    };
    // A beat is seen too late when either side loses its core between the host's clock and this one, never too early: the least
    // difference of a second is the one to believe.
    let mut least = || {
        let (from, now) = next_beat()?;
        let (mut at, mut difference) = (from, now as i64 - from as i64);
        let mut best = at;
        while at - from < 1_000_000_000 {
            let (beat, now) = next_beat()?;
            at = beat;
            if now as i64 - (beat as i64) < difference {
                (difference, best) = (now as i64 - beat as i64, beat);
            }
        }
        Ok::<_, String>((best, difference))
    };
    let (from, before) = least()?;
    let (to, after) = least()?;
    let off_ppm = (after - before) * 1_000_000 / (to - from) as i64;
    info!(
        "tsc {} Hz, {off_ppm} ppm off the host's clock, {reads} readings",
        time::tsc_hz()
    );
    if off_ppm.abs() > 20_000 {
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
