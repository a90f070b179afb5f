//! Boots small guests and looks at how they run and end, under every accelerator that this machine has.
//!
//! The guest is 50 lines of assembly, so that nothing here depends on the unikernel.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hyv_abi::window::UserState;
use hyv_host::accel::{self, Accel, AccelKind, AccelRequest, QemuBinary};
use hyv_host::vmm::{Ending, GuestConfig, LaunchError, Qemu, QmpError, WaitError};

const LIMIT: Duration = Duration::from_secs(10);

/// The guest that behaves as the number in `guest.s` says.
fn guest(dir: &Path, behaviour: u32) -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vmm/guest.s");
    let (object, image) = (
        dir.join(format!("{behaviour}.o")),
        dir.join(format!("{behaviour}.elf")),
    );
    let run = |command: &mut Command| {
        let out = command
            .output()
            .expect("binutils are installed wherever Rust links");
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
    };
    let symbol = format!("BEHAVIOUR={behaviour}");
    run(Command::new("as")
        .args(["--32", "--defsym", &symbol, "-o"])
        .arg(&object)
        .arg(source));
    let place = [
        "-m",
        "elf_i386",
        "-n",
        "--section-start=.note.pvh=0x100000",
        "-Ttext=0x101000",
        "-o",
    ];
    run(Command::new("ld").args(place).arg(&image).arg(&object));
    image
}

fn config(image: PathBuf) -> GuestConfig {
    GuestConfig {
        name: "test".into(),
        image,
        symbols: None,
        args: "a b".into(),
        memory: 64 << 20,
        watchdog: None,
        spin_hint: 0,
        net: None,
        ips: Vec::new(),
    }
}

/// Runs `test` under TCG, and under KVM where that works.
fn each_accelerator(test: impl Fn(&QemuBinary, &Accel, &Path)) {
    let dir = tempfile::tempdir().unwrap();
    for request in [AccelRequest::Tcg, AccelRequest::Auto] {
        let (qemu, accel) = accel::probe(request, None).unwrap();
        match (&accel.fallback_reason, request) {
            (Some(reason), _) => eprintln!("KVM is not tested: {reason}"),
            _ => {
                eprintln!("under {accel} with {}", accel.cpu);
                test(&qemu, &accel, dir.path());
            }
        }
    }
}

#[test]
fn early_words_and_the_exit_port() {
    each_accelerator(|qemu, accel, dir| {
        let q = Qemu::launch(&config(guest(dir, 1)), qemu, accel).unwrap();
        let r = q.wait();
        assert_eq!(r.ending, Ending::EarlyFailure { value: 21 }, "{r}");
        assert_eq!(r.console, "hi\nx\n");
        assert_ne!(r.exit_code(), 0);
        assert!(r.to_string().contains("hi"), "{r}");
        assert!(r.lived < LIMIT);
    });
}

#[test]
fn a_triple_fault_is_called_one() {
    each_accelerator(|qemu, accel, dir| {
        let q = Qemu::launch(&config(guest(dir, 2)), qemu, accel).unwrap();
        let r = q.wait_timeout(LIMIT).expect("it ends by itself");
        // Without hardware under it, KVM may find the fault impossible to emulate instead.
        let expected = [Ending::TripleFault, Ending::KvmInternalError];
        let expected = if accel.kind == AccelKind::Kvm {
            &expected[..]
        } else {
            &expected[..1]
        };
        assert!(expected.contains(&r.ending), "{r}");
    });
}

#[test]
fn a_guest_that_hangs_meets_the_watchdog() {
    each_accelerator(|qemu, accel, dir| {
        let limit = Duration::from_millis(700);
        let c = GuestConfig {
            watchdog: Some(limit),
            ..config(guest(dir, 3))
        };
        let q = Qemu::launch(&c, qemu, accel).unwrap();
        match q.wait_state(UserState::Running, LIMIT) {
            Err(WaitError::Ended(r)) => {
                assert_eq!(
                    r.ending,
                    Ending::Watchdog {
                        limit,
                        state: Some(UserState::Off)
                    }
                );
                assert!(r.to_string().contains("nothing of it ran"), "{r}");
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn window_doorbells_counters_and_an_orderly_end() {
    each_accelerator(|qemu, accel, dir| {
        let q = Qemu::launch(&config(guest(dir, 4)), qemu, accel).unwrap();
        q.wait_state(UserState::Ready, LIMIT).unwrap();
        eprintln!(
            "{accel}: ready {} ms after QEMU's start",
            q.started().elapsed().as_millis()
        );
        let user = &q.window().user;
        assert_eq!(user.app[0].load(Ordering::Relaxed), 64 << 20);
        let hz = user.app[1].load(Ordering::Relaxed);
        assert_eq!(hz == 0, accel.kind == AccelKind::Tcg, "{hz}");
        assert_eq!(
            q.ram()
                .atomic_u32(0x200_0000)
                .unwrap()
                .load(Ordering::Relaxed),
            0x600d_cafe
        );
        assert_eq!(q.doorbells().kick_control.wait(Some(LIMIT)).unwrap(), 1);
        assert_eq!(q.doorbells().kick_data.wait(Some(LIMIT)).unwrap(), 1);

        let beat = || q.window().header.host_beat.load(Ordering::Relaxed);
        let before = beat();
        std::thread::sleep(Duration::from_millis(250));
        assert!(beat() - before >= 2);
        // The supervisor has taken the record.
        assert_eq!(q.window().log.tail.load(Ordering::Relaxed), 16);

        let threads = q.vcpu_threads().unwrap();
        assert_eq!(threads.len(), 1);
        let cpu = hyv_host::sys::cpu::allowed().unwrap()[0];
        q.pin_vcpus(&[cpu]).unwrap();
        let status =
            std::fs::read_to_string(format!("/proc/{}/task/{}/status", q.pid(), threads[0]))
                .unwrap();
        assert!(
            status.contains(&format!("Cpus_allowed_list:\t{cpu}\n")),
            "{status}"
        );
        q.pin_others(&hyv_host::sys::cpu::allowed().unwrap())
            .unwrap();
        let comm =
            std::fs::read_to_string(format!("/proc/{}/task/{}/comm", q.pid(), threads[0])).unwrap();
        assert!(comm.starts_with("CPU 0/"), "{comm}");
        match (q.vcpu_stats(), accel.kind) {
            (Ok(s), AccelKind::Kvm) => {
                assert!(s.exits > 0 && s.exits >= s.irq_exits, "{s:?}");
                std::thread::sleep(Duration::from_millis(100));
                let later = q.vcpu_stats().unwrap().since(&s);
                eprintln!("exits so far {s:?}, in 100 ms of spinning {later:?}");
            }
            (Err(e), AccelKind::Tcg) => assert!(!matches!(e, QmpError::Timeout { .. }), "{e}"),
            (other, kind) => panic!("{kind}: {other:?}"),
        }

        let r = q.shutdown();
        assert_eq!(r.ending, Ending::Exited { code: 5 }, "{r}");
        assert_eq!(r.exit_code(), 5);
        assert!(matches!(q.vcpu_stats(), Err(QmpError::Closed)));
    });
}

#[test]
fn a_garbled_window_harms_nobody() {
    each_accelerator(|qemu, accel, dir| {
        let q = Qemu::launch(&config(guest(dir, 5)), qemu, accel).unwrap();
        let r = q
            .wait_timeout(Duration::from_secs(20))
            .expect("it ends by itself");
        assert_eq!(r.ending, Ending::Exited { code: 9 }, "{r}");
    });
}

#[test]
fn a_guest_that_lingers_after_its_last_word_is_ended() {
    each_accelerator(|qemu, accel, dir| {
        let q = Qemu::launch(&config(guest(dir, 6)), qemu, accel).unwrap();
        let r = q.wait_timeout(LIMIT).expect("the supervisor ends it");
        assert_eq!(r.ending, Ending::Panicked { code: 101 }, "{r}");
        assert_eq!(r.exit_code(), 101);
    });
}

#[test]
fn the_region_table_is_what_qemu_does() {
    let dir = tempfile::tempdir().unwrap();
    let image = guest(dir.path(), 4);
    let (qemu, accel) = accel::probe(AccelRequest::Tcg, None).unwrap();
    let free = hyv_host::sys::memory::available_bytes().unwrap();
    for mib in [64_u64, 2814, 2816, 3072, 6144] {
        if free < (mib + 512) << 20 {
            eprintln!("{mib} MiB are not tested: only {} MiB are free", free >> 20);
            continue;
        }
        let q = Qemu::launch(
            &GuestConfig {
                memory: mib << 20,
                ..config(image.clone())
            },
            &qemu,
            &accel,
        )
        .unwrap();
        q.wait_state(UserState::Ready, LIMIT).unwrap();
        let arguments = serde_json::json!({"command-line": "info mtree -f"});
        let text = q.qmp().execute("human-monitor-command", arguments).unwrap();
        // Lines like `0000000100000000-000000017fffffff (prio 0, ram): ram @0000000080000000 KVM`.
        let mut pieces = Vec::new();
        for line in text.as_str().unwrap().lines() {
            let Some((range, rest)) = line.trim().split_once(' ') else {
                continue;
            };
            let (Some((start, end)), true) = (range.split_once('-'), rest.contains("ram): ram"))
            else {
                continue;
            };
            let offset = rest
                .split_once('@')
                .map_or("0", |(_, o)| o.split(' ').next().unwrap());
            let hex = |t: &str| u64::from_str_radix(t, 16).unwrap();
            pieces.push((hex(start), hex(end) + 1, hex(offset)));
        }
        for r in q.regions() {
            for at in [r.file_offset + (1 << 20), r.file_offset + r.len - 4096] {
                let address = at - r.file_offset + r.guest_addr;
                let piece = pieces.iter().find(|p| (p.0..p.1).contains(&address));
                let piece = piece
                    .unwrap_or_else(|| panic!("{mib} MiB: no RAM at {address:#x} in {pieces:x?}"));
                assert_eq!(address - piece.0 + piece.2, at, "{mib} MiB: {pieces:x?}");
            }
        }
        assert_eq!(q.regions().iter().map(|r| r.len).sum::<u64>(), mib << 20);
        assert_eq!(q.shutdown().ending, Ending::Exited { code: 5 });
    }
}

#[test]
fn what_cannot_start_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let (qemu, accel) = accel::probe(AccelRequest::Tcg, None).unwrap();
    let launch = |c: &GuestConfig, q: &QemuBinary, a: &Accel| Qemu::launch(c, q, a);
    let good = config(guest(dir.path(), 4));

    let missing = GuestConfig {
        image: dir.path().join("none"),
        ..good.clone()
    };
    assert!(matches!(
        launch(&missing, &qemu, &accel),
        Err(LaunchError::Config(_))
    ));

    let gone = QemuBinary {
        path: dir.path().join("qemu"),
        ..qemu.clone()
    };
    assert!(matches!(
        launch(&good, &gone, &accel),
        Err(LaunchError::Spawn { .. })
    ));

    if hyv_host::sys::memory::available_bytes().unwrap() < 120 << 30 {
        let huge = GuestConfig {
            memory: 120 << 30,
            ..good.clone()
        };
        let e = launch(&huge, &qemu, &accel).unwrap_err().to_string();
        assert!(e.contains("--memory"), "{e}");
    }

    let wrong_cpu = Accel {
        cpu: "no-such-cpu".into(),
        ..accel.clone()
    };
    let r = launch(&good, &qemu, &wrong_cpu).unwrap().wait();
    assert!(matches!(r.ending, Ending::QemuFailed { .. }), "{r}");
    assert!(r.to_string().contains("no-such-cpu"), "{r}");

    let no_note = GuestConfig {
        image: "/proc/self/exe".into(),
        ..good
    };
    let r = launch(&no_note, &qemu, &accel).unwrap().wait();
    assert!(
        matches!(r.ending, Ending::QemuFailed { .. }) && r.qemu_stderr.contains("PVH"),
        "{r}"
    );
}

#[test]
fn dropping_or_killing_qemu_ends_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let (qemu, accel) = accel::probe(AccelRequest::Auto, None).unwrap();
    let c = config(guest(dir.path(), 4));
    let q = Qemu::launch(&c, &qemu, &accel).unwrap();
    let pid = q.pid();
    drop(q);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());

    let q = Qemu::launch(&c, &qemu, &accel).unwrap();
    q.wait_state(UserState::Ready, LIMIT).unwrap();
    signal(q.pid(), rustix::process::Signal::KILL);
    assert_eq!(q.wait().ending, Ending::Killed { signal: 9 });

    let q = Qemu::launch(&c, &qemu, &accel).unwrap();
    q.wait_state(UserState::Ready, LIMIT).unwrap();
    signal(q.pid(), rustix::process::Signal::TERM);
    assert_eq!(q.wait().ending, Ending::Killed { signal: 15 });
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

const IMAGE_VARIABLE: &str = "HYV_TEST_IMAGE";

/// Not a test of its own: the process that the next test kills.
#[test]
#[ignore = "runs as a child of hyv_host_killed_takes_its_guest_along"]
fn a_launcher_to_be_killed() {
    let image = std::env::var_os(IMAGE_VARIABLE).expect("started by its test");
    let (qemu, accel) = accel::probe(AccelRequest::Auto, None).unwrap();
    let q = Qemu::launch(&config(image.into()), &qemu, &accel).unwrap();
    q.wait_state(UserState::Ready, LIMIT).unwrap();
    println!("pid={}", q.pid());
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn hyv_host_killed_takes_its_guest_along() {
    let dir = tempfile::tempdir().unwrap();
    let mut launcher = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_launcher_to_be_killed",
            "--ignored",
            "--nocapture",
        ])
        .env(IMAGE_VARIABLE, guest(dir.path(), 4))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
    let pid = lines
        .map_while(Result::ok)
        .find_map(|l| l.split_once("pid=").map(|(_, p)| p.trim().to_owned()));
    let process = PathBuf::from(format!(
        "/proc/{}",
        pid.expect("the launcher says its guest's process")
    ));
    assert!(process.exists());
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    let deadline = Instant::now() + LIMIT;
    // Its entry goes when whoever inherited it has reaped it; a zombie runs no more.
    let ended = || {
        let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with('Z'))
    };
    while !ended() {
        assert!(Instant::now() < deadline, "QEMU outlives hyv-host");
        std::thread::sleep(Duration::from_millis(10));
    }
}
