//! Images that judge themselves or do wrong, run by `hyv-host` as a user runs it.

use std::time::{Duration, Instant};

use hyv_e2e::{Accelerator, PATIENCE, Run, Sandbox, eventually, on_each_accelerator, programs};
use rustix::process::{Pid, Signal, kill_process};

/// Arguments of `hyv-host` for the test image and its `words`.
fn arguments<'a>(accelerator: Accelerator, words: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec![
        "--accel",
        accelerator.name(),
        "--memory",
        "64",
        "--limit",
        "60",
    ];
    args.extend(["--log", "debug", "--"]);
    args.extend(words);
    args
}

/// Runs the test image with `words` on its command line.
fn image(sandbox: &Sandbox, accelerator: Accelerator, words: &[&str]) -> Run {
    let mut command = sandbox.hyv_host_command(["--image"]);
    command
        .arg(programs::test_image())
        .args(arguments(accelerator, words));
    sandbox.run(command)
}

/// Runs each row, and fails with all that failed: words, exit code, what standard error must have.
fn table(accelerator: Accelerator, rows: &[(&[&str], i32, &[&str])]) {
    let sandbox = Sandbox::new();
    let mut failed = Vec::new();
    for (words, code, expected) in rows {
        let run = image(&sandbox, accelerator, words);
        let missing: Vec<_> = expected.iter().filter(|w| !run.err.contains(**w)).collect();
        if run.status.code() != Some(*code) || !missing.is_empty() {
            failed.push(format!(
                "{words:?}: expected code {code}, missing {missing:?}: {}",
                run.story()
            ));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
    sandbox.assert_clean();
}

/// A guest that cannot ask for its clock's rate measures it, also where it is kept from running most of the time: the interval timer that
/// it measures with goes round every 55 ms.
#[test]
fn a_clock_is_right_that_was_measured_while_the_guest_was_stopped_again_and_again() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.hyv_host_command(["--image"]);
    command
        .arg(programs::test_image())
        .args(arguments(Accelerator::Tcg, &["test=time"]));
    let running = sandbox.spawn(command);
    let mut qemu = None;
    eventually("QEMU runs", || {
        qemu = sandbox.guests().first().copied();
        qemu.is_some()
    });
    let pid = qemu
        .and_then(|pid| Pid::from_raw(pid.cast_signed()))
        .unwrap();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1) {
        // It may have ended.
        let _ = kill_process(pid, Signal::STOP);
        std::thread::sleep(Duration::from_millis(60));
        let _ = kill_process(pid, Signal::CONT);
        std::thread::sleep(Duration::from_millis(6));
    }
    // The image's own verdict suffers from the stops too: its rate is compared with that of a guest which was left alone.
    let rate = |run: &Run| -> f64 {
        let words = run.err.split_whitespace();
        let mut after = words.skip_while(|word| *word != "tsc");
        let hz = after.nth(1).and_then(|hz| hz.parse().ok());
        hz.unwrap_or_else(|| panic!("no rate: {}", run.story()))
    };
    let stopped = running.wait(PATIENCE);
    let calm = image(&sandbox, Accelerator::Tcg, &["test=time"]);
    let ratio = rate(&stopped) / rate(&calm);
    assert!(
        (0.95..1.05).contains(&ratio),
        "{ratio}: {}",
        stopped.story()
    );
}

on_each_accelerator! {
    fn exit_codes_reach_the_host(accelerator) {
        let row = |code| (vec!["test=exit", code], code.trim_start_matches("code=").parse().unwrap_or(1));
        let rows = ["code=0", "code=1", "code=3", "code=35", "code=255"].map(row);
        let rows: Vec<(&[&str], i32, &[&str])> = rows.iter().map(|(w, c)| (&w[..], *c, &[][..])).collect();
        table(accelerator, &rows);
    }

    /// What an exit status cannot hold is still no success.
    fn no_exit_code_turns_into_success(accelerator) {
        let rows: [(&[&str], i32, &[&str]); 4] = [
            (&["test=exit", "code=256"], 1, &["exited with code 256"]),
            (&["test=exit", "code=-1"], 1, &["exited with code -1"]),
            (&["test=nonsense"], 1, &["fail nonsense"]),
            (&[], 2, &["say test=NAME"]),
        ];
        table(accelerator, &rows);
    }

    fn images_that_judge_themselves(accelerator) {
        let rows: [(&[&str], i32, &[&str]); 10] = [
            (
                &["test=hello"],
                0,
                &["hello at error", "hello at warn", "hello at info, 64 MiB", "pi is 3.141593", "e is 2.7182", "pass hello"],
            ),
            (&["test=hello", "hyv.log=debug"], 0, &["hello at debug"]),
            (&["test=time"], 0, &["pass time"]),
            (&["test=mem"], 0, &["pass mem"]),
            (&["test=mem", "hyv.rep=300"], 0, &["pass mem"]),
            (&["test=heap"], 0, &["pass heap"]),
            (&["test=rest"], 0, &["pass rest"]),
            (&["test=big"], 0, &["pass big", "of 64 MiB"]),
            (&["test=sleep"], 0, &["pass sleep"]),
            (&["test=link"], 0, &["pass link"]),
        ];
        table(accelerator, &rows);
    }

    fn log_levels_are_the_users_choice(accelerator) {
        let sandbox = Sandbox::new();
        let run = image(&sandbox, accelerator, &["test=hello"]).ok();
        assert!(!run.err.contains("hello at debug"), "{}", run.story());
        let run = image(&sandbox, accelerator, &["test=hello", "hyv.log=error"]).ok();
        assert!(run.err.contains("hello at error") && !run.err.contains("hello at warn"), "{}", run.story());
    }

    fn arguments_arrive_as_given(accelerator) {
        let sandbox = Sandbox::new();
        let words = ["test=args", "alpha", "key=value", "k=", "a,b=c", "quote='x\"", "ä=ö"];
        let run = image(&sandbox, accelerator, &words).ok();
        for word in &words[1..] {
            assert!(run.err.contains(&format!("arg {word}")), "no {word}: {}", run.story());
        }
        assert!(run.err.contains(&format!("line {}", words.join(" "))), "{}", run.story());
        // As much as fits arrives whole; more is refused before anything is started.
        let long = format!("x={}", "y".repeat(1900));
        let run = image(&sandbox, accelerator, &["test=args", &long]).ok();
        assert!(run.err.contains(&format!("arg {long}")), "{}", run.story());
        let run = image(&sandbox, accelerator, &["test=args", &"z".repeat(2100)]);
        run.fails(&["arguments", "2047"]);
    }

    /// Each ends with a report: what, registers, and a backtrace with functions and lines.
    fn panics_are_reported_with_a_backtrace(accelerator) {
        let rows: [(&[&str], i32, &[&str]); 3] = [
            (
                &["test=panic"],
                101,
                &["as asked, with a number: 42", "  at 0x", "faults::run", "faults.rs:", "the guest panicked (code 101)"],
            ),
            (&["test=index"], 101, &["index out of bounds", "faults::run", "faults.rs:"]),
            (&["test=oom"], 101, &["the heap is exhausted", "--memory", "memory.rs:"]),
        ];
        table(accelerator, &rows);
    }

    /// Memory that is not the application's: the null page, the image, the stack's guard page, the nucleus, devices.
    fn memory_is_protected(accelerator) {
        let rows: [(&[&str], i32, &[&str]); 11] = [
            (
                &["test=null"],
                102,
                &["page fault", "writing", "null pointer", "rbp", "rsp", "  at 0x", "faults::run", "faults.rs:"],
            ),
            (&["test=nullread"], 102, &["page fault", "reading", "null pointer", "faults::run"]),
            (&["test=text"], 102, &["writing", "the image", "faults::run"]),
            (&["test=rodata"], 102, &["writing", "the image", "faults::run"]),
            (&["test=jump"], 102, &["executing"]),
            (&["test=stack"], 102, &["stack overflow", "faults::dig"]),
            (&["test=nucleus"], 102, &["the nucleus"]),
            (&["test=nucleusread"], 102, &["the nucleus"]),
            (&["test=lapic"], 102, &["the device area"]),
            (&["test=beyond"], 102, &["beyond RAM"]),
            (&["test=rsp"], 102, &["null pointer"]),
        ];
        table(accelerator, &rows);
    }

    /// What only ring 0 may do, and exceptions of every other kind.
    fn privileges_are_refused(accelerator) {
        let general: &[&str] = &["general protection", "faults::run"];
        let rows: [(&[&str], i32, &[&str]); 10] = [
            (&["test=noncanonical"], 102, general),
            (&["test=hlt"], 102, general),
            (&["test=cli"], 102, general),
            (&["test=cr3"], 102, general),
            (&["test=rdmsr"], 102, general),
            (&["test=port"], 102, general),
            (&["test=highport"], 102, general),
            (&["test=int3"], 102, &["breakpoint", "faults::run"]),
            (&["test=ud2"], 102, &["invalid opcode", "faults::run"]),
            (&["test=divide"], 102, &["divide error", "faults::run"]),
        ];
        table(accelerator, &rows);
    }

    /// A register that does not exist: TCG, and a KVM told to ignore such accesses, answer zero.
    fn an_absent_register_does_no_harm(accelerator) {
        let sandbox = Sandbox::new();
        let run = image(&sandbox, accelerator, &["test=msr"]);
        match run.status.code() {
            Some(0) => assert!(run.err.contains("pass msr"), "{}", run.story()),
            Some(102) if accelerator == Accelerator::Kvm => {
                assert!(run.err.contains("general protection"), "{}", run.story());
            }
            _ => panic!("{}", run.story()),
        }
    }

    /// More than the ring holds: what arrives is whole and in order, what does not is counted.
    fn a_flood_of_log_lines_loses_nothing_silently(accelerator) {
        const LINES: usize = 20_000;
        let sandbox = Sandbox::new();
        let run = image(&sandbox, accelerator, &["test=logflood", &format!("n={LINES}")]).ok();
        let mut next = 0;
        let mut seen = 0;
        let mut dropped = 0;
        for line in run.err.lines() {
            if let Some((_, rest)) = line.split_once("flood ") {
                let Some(Ok(i)) = rest.split(' ').next().map(str::parse::<usize>) else { continue };
                assert!(i >= next, "line {i} came when {next} was due");
                (next, seen) = (i + 1, seen + 1);
            } else if let Some((_, rest)) = line.split_once("the guest dropped ") {
                dropped += rest.split(' ').next().and_then(|n| n.parse::<usize>().ok()).expect("a number");
            }
        }
        assert_eq!(seen + dropped, LINES, "{seen} lines seen, {dropped} dropped");
        assert!(seen > 0);
        let long = run.err.lines().find(|l| l.contains("long ä")).expect("the line after the flood");
        let letters = long.matches('ä').count();
        assert!((900..=1024).contains(&letters), "{letters} letters of the long line");
    }

    fn a_guest_whose_host_falls_silent_ends_itself(accelerator) {
        let sandbox = Sandbox::new();
        let mut command = sandbox.hyv_host_command(["--image"]);
        command.arg(programs::test_image()).args(arguments(accelerator, &["test=hostlost"]));
        let mut host = sandbox.spawn(command);
        eventually("QEMU runs", || sandbox.guests().len() == 1);
        // It boots in 0.2 s; silence is noticed only once it runs.
        std::thread::sleep(std::time::Duration::from_secs(2));
        host.signal(Signal::STOP);
        // As a child of the stopped host it stays a zombie, which has no environment.
        eventually("QEMU ended although its host is stopped", || sandbox.guests().is_empty());
        host.signal(Signal::CONT);
        let run = host.wait(PATIENCE);
        assert_eq!(run.status.code(), Some(103), "{}", run.story());
        sandbox.assert_clean();
    }

    fn ctrl_c_ends_a_guest_in_order(accelerator) {
        let sandbox = Sandbox::new();
        let mut command = sandbox.hyv_host_command(["--image"]);
        command.arg(programs::test_image()).args(arguments(accelerator, &["test=shutdown"]));
        let mut host = sandbox.spawn(command);
        eventually("QEMU runs", || sandbox.guests().len() == 1);
        std::thread::sleep(std::time::Duration::from_secs(1));
        host.signal(Signal::INT);
        let run = host.wait(PATIENCE).ok();
        assert!(run.err.contains("pass shutdown"), "{}", run.story());
        sandbox.assert_clean();
    }
}
