//! Tests in which the host takes part, through the `app` words of the user page.

use alloc::format;
use alloc::string::ToString;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::time::Duration;

use hyv_unikernel::log::info;
use hyv_unikernel::time::Instant;
use hyv_unikernel::{rt, time};

use crate::Verdict;

fn app(i: usize) -> &'static AtomicU64 {
    &rt::window().user.app[i]
}

fn arg(key: &str, default: u64) -> u64 {
    rt::args()
        .get(key)
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// The host posts 1, 2, ... `n` in `app[0]`, each with one interrupt and only after `app[1]` confirmed
/// the one before. The
/// guest sleeps between them: one lost wake-up and it sleeps for good. `app[2]` counts the halts that
/// returned.
pub(crate) fn wake() -> Verdict {
    let n = arg("n", 10_000);
    rt::ready();
    let mut done = 0;
    while done < n {
        let seen = rt::wake_count();
        let posted = app(0).load(Acquire);
        if posted == done + 1 {
            done = posted;
            app(1).store(done, Release);
        } else if posted == done {
            rt::halt(seen);
            app(2).fetch_add(1, Relaxed);
        } else {
            return Err(format!("after {done} came {posted}"));
        }
    }
    info!("{done} posts, {} wake-ups counted", rt::wake_count());
    Ok(())
}

/// Waits of 1 to 50 ms by the host's timer: none may end early without a wake-up, none be forgotten.
pub(crate) fn sleep() -> Verdict {
    for ms in [1_u64, 5, 20, 50] {
        let start = Instant::now();
        let end = start + Duration::from_millis(ms);
        let mut halts = 0;
        while Instant::now() < end {
            rt::wait(rt::wake_count(), Some(end));
            halts += 1;
        }
        let took = start.elapsed();
        info!(
            "asked for {ms} ms, slept {} us in {halts} waits",
            took.as_micros()
        );
        if took > Duration::from_millis(ms + 500) {
            return Err(format!("a wait of {ms} ms took {took:?}"));
        }
        if halts > 100 {
            return Err(format!("a wait of {ms} ms returned {halts} times"));
        }
    }
    Ok(())
}

/// Both sides do `n` updates of each kind on the same words: `app[3]` fetch-and-add 1, `app[4]` add 1 by
/// compare-and-swap, and the same two on words in RAM whose offset `app[5]` names. The guest sets
/// `app[6]` = 1 to start and `app[7]` = 1
/// when it is done, waits for `app[8]` = 1 from the host, and checks that all four sums are `2 n`.
pub(crate) fn atomics() -> Verdict {
    let n = arg("n", 2_000_000);
    // The address is the offset in the RAM file.
    let in_ram = crate::memory::shared_words();
    app(5).store(in_ram.as_ptr().addr() as u64, Release);
    app(6).store(1, Release);
    rt::ready();
    let swap_add = |w: &AtomicU64| {
        let mut v = w.load(Relaxed);
        while let Err(now) = w.compare_exchange_weak(v, v + 1, SeqCst, Relaxed) {
            v = now;
        }
    };
    for _ in 0..n {
        app(3).fetch_add(1, SeqCst);
        swap_add(app(4));
        in_ram[0].fetch_add(1, SeqCst);
        swap_add(&in_ram[1]);
    }
    app(7).store(1, Release);
    while app(8).load(Acquire) != 1 {
        rt::check_host();
    }
    for (name, w) in [
        ("window, fetch-and-add", app(3)),
        ("window, compare-and-swap", app(4)),
        ("RAM, fetch-and-add", &in_ram[0]),
        ("RAM, compare-and-swap", &in_ram[1]),
    ] {
        let v = w.load(Acquire);
        if v != 2 * n {
            return Err(format!("{name}: {v} of {}", 2 * n));
        }
    }
    Ok(())
}

/// Logs `n` numbered lines as fast as it can: more than the ring holds. What the host reads plus
/// `dropped` must be `n`
/// and the test's own last line.
pub(crate) fn log_flood() -> Verdict {
    let n = arg("n", 20_000);
    for i in 0..n {
        info!("flood {i} {:width$}", "", width = (i % 61) as usize);
    }
    let log = &rt::window().log;
    // Let the host make room, so that the end is seen.
    let end = Instant::now() + Duration::from_secs(5);
    while log.tail.load(Acquire) != log.head.load(Relaxed) && Instant::now() < end {
        rt::check_host();
    }
    app(0).store(log.dropped.load(Relaxed), Release);
    // A message longer than a record is cut between two characters.
    info!("long {}", "\u{e4}".repeat(4096));
    Ok(())
}

/// Serves until the host asks it to end.
pub(crate) fn shutdown() -> Verdict {
    rt::ready();
    while !rt::shutdown_requested() {
        let seen = rt::wake_count();
        rt::wait(seen, Some(Instant::now() + Duration::from_millis(50)));
    }
    Ok(())
}

/// Polls while the host beats; the runtime ends the guest with code 103 when it stops.
pub(crate) fn host_lost() -> Verdict {
    rt::ready();
    let end = Instant::now() + Duration::from_secs(30);
    while Instant::now() < end {
        rt::check_host();
    }
    Err("the host's silence went unnoticed for 30 s".to_string())
}

/// Rings the data doorbell `n` times, one at a time: the host adds to `app[0]` what its eventfd counted.
pub(crate) fn kicks() -> Verdict {
    let n = arg("n", 200);
    rt::ready();
    let start = time::now_ns();
    for i in 0..n {
        rt::kick(hyv_abi::window::KICK_DATA);
        let patience = Instant::now() + Duration::from_secs(5);
        while app(0).load(Acquire) <= i {
            if Instant::now() > patience {
                return Err(format!("doorbell {i} was not heard"));
            }
        }
    }
    info!(
        "{n} doorbells answered, {} ns each",
        (time::now_ns() - start) / n
    );
    Ok(())
}

/// Polls for `ms` milliseconds and does nothing else: a polling guest must cause no VM exit.
pub(crate) fn spin() -> Verdict {
    rt::ready();
    let end = Instant::now() + Duration::from_millis(arg("ms", 1000));
    while Instant::now() < end {
        core::hint::spin_loop();
    }
    Ok(())
}
