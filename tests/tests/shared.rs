//! What host and guest share: interrupts, doorbells, atomics, memory. The test itself is the guest's host.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::{Duration, Instant};

use hyv_abi::window::UserState;
use hyv_e2e::{Accelerator, PATIENCE, Random, eventually, on_each_accelerator, programs, seed};
use hyv_host::accel::AccelKind;
use hyv_host::sys::memory::available_bytes;
use hyv_host::vmm::{Ending, GuestConfig, Qemu};

fn launch(accelerator: Accelerator, words: &str, memory: u64) -> Qemu {
    let (qemu, accel) = accelerator.probe();
    let config = GuestConfig {
        name: "shared".into(),
        image: programs::test_image(),
        symbols: None,
        args: words.into(),
        memory,
        watchdog: None,
        spin_hint: 1,
        net: None,
        ips: Vec::new(),
    };
    Qemu::launch(&config, &qemu, &accel).unwrap_or_else(|e| panic!("{e}"))
}

fn boot(accelerator: Accelerator, words: &str) -> Qemu {
    let guest = launch(accelerator, words, 64 << 20);
    guest
        .wait_state(UserState::Ready, PATIENCE)
        .unwrap_or_else(|e| panic!("{e}"));
    guest
}

fn app(guest: &Qemu, i: usize) -> &AtomicU64 {
    &guest.window().user.app[i]
}

fn passes(guest: &Qemu) {
    let report = guest
        .wait_timeout(PATIENCE)
        .expect("the guest ends by itself");
    assert_eq!(report.ending, Ending::Exited { code: 0 }, "{report}");
}

fn swap_add(word: &AtomicU64) {
    let mut seen = word.load(Relaxed);
    while let Err(now) = word.compare_exchange_weak(seen, seen + 1, SeqCst, Relaxed) {
        seen = now;
    }
}

on_each_accelerator! {
    /// The guest sleeps between two posts: one interrupt lost between its look and its halt, and it sleeps for good.
    fn no_wake_up_is_lost(accelerator) {
        const POSTS: u64 = 4_000;
        let guest = boot(accelerator, &format!("test=wake n={POSTS}"));
        let mut random = Random::new(seed());
        for post in 1..=POSTS {
            let start = Instant::now();
            while app(&guest, 1).load(Acquire) != post - 1 {
                assert!(guest.exit_report().is_none(), "the guest ended after post {post}");
                assert!(start.elapsed() < PATIENCE, "post {} of {POSTS} was never answered", post - 1);
                std::hint::spin_loop();
            }
            // At every moment of the guest's way back to sleep, and sometimes long after.
            for _ in 0..random.below(if post % 8 == 0 { 60_000 } else { 3_000 }) {
                std::hint::spin_loop();
            }
            app(&guest, 0).store(post, Release);
            guest.doorbells().wake.signal().expect("an eventfd takes a signal");
        }
        passes(&guest);
        assert_eq!(app(&guest, 1).load(Acquire), POSTS);
    }

    /// Both sides update the same words, in the window and in RAM: not one update may be lost.
    fn atomics_are_atomic_between_guest_and_host(accelerator) {
        const UPDATES: u64 = 400_000;
        let guest = boot(accelerator, &format!("test=atomics n={UPDATES}"));
        eventually("the guest starts", || app(&guest, 6).load(Acquire) == 1);
        let offset = app(&guest, 5).load(Acquire);
        let ram = |at: u64| guest.ram().atomic_u64(offset + at).expect("an offset in RAM");
        for _ in 0..UPDATES {
            app(&guest, 3).fetch_add(1, SeqCst);
            swap_add(app(&guest, 4));
            ram(0).fetch_add(1, SeqCst);
            swap_add(ram(8));
        }
        app(&guest, 8).store(1, Release);
        passes(&guest);
        for word in [app(&guest, 3), app(&guest, 4), ram(0), ram(8)] {
            assert_eq!(word.load(Acquire), 2 * UPDATES);
        }
    }

    fn every_doorbell_is_heard(accelerator) {
        const RINGS: u64 = 200;
        let guest = boot(accelerator, &format!("test=kicks n={RINGS}"));
        let start = Instant::now();
        let mut heard = 0;
        while guest.exit_report().is_none() && start.elapsed() < PATIENCE {
            let more = guest.doorbells().kick_data.wait(Some(Duration::from_millis(100)));
            heard += more.expect("an eventfd can be waited for");
            app(&guest, 0).store(heard, Release);
        }
        passes(&guest);
        assert_eq!(heard, RINGS);
    }

    fn a_guest_asked_to_end_ends(accelerator) {
        let guest = boot(accelerator, "test=shutdown");
        let report = guest.shutdown();
        assert_eq!(report.ending, Ending::Exited { code: 0 }, "{report}");
    }

    /// RAM on both sides of the hole below 4 GiB, at its own offset in the file, once.
    fn more_than_4_gib_is_all_there(accelerator) {
        const MEMORY: u64 = 5 << 30;
        match available_bytes() {
            Some(free) if free > MEMORY + (1 << 30) => {}
            free => {
                eprintln!("skipped: 6 GiB are needed, {:?} MiB are free", free.map(|f| f >> 20));
                return;
            }
        }
        let guest = launch(accelerator, "test=big", MEMORY);
        passes(&guest);
        let (start, len) = (app(&guest, 0).load(Acquire), app(&guest, 1).load(Acquire));
        assert!(start < MEMORY / 8 && start + len == MEMORY, "{len:#x} bytes from {start:#x}");
        for offset in (start..start + len).step_by(2 << 20).chain([start + len - 8]) {
            let word = guest.ram().atomic_u64(offset).expect("an offset in RAM").load(Relaxed);
            assert_eq!(word, offset, "the word at {offset:#x}");
        }
    }
}

/// A guest that polls leaves the processor to nobody: no exit but the host's own timer ticks.
#[test]
fn a_polling_guest_causes_no_exits() {
    Accelerator::Kvm.run(|accelerator| {
        let guest = boot(accelerator, "test=spin ms=1500");
        assert_eq!(guest.accel(), AccelKind::Kvm);
        std::thread::sleep(Duration::from_millis(200));
        let before = guest.vcpu_stats().expect("KVM's counters can be read");
        std::thread::sleep(Duration::from_secs(1));
        let delta = guest
            .vcpu_stats()
            .expect("KVM's counters can be read")
            .since(&before);
        // Asking kicks the vCPU out of the guest now and then; a guest that exits does so thousands of times.
        assert!(
            delta.by_guest() <= 20,
            "{} exits in a second of polling",
            delta.by_guest()
        );
        passes(&guest);
    });
}
