//! Every test there is, in steps, with a summary that says what was not run and why.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::build::{self, GUEST_PACKAGES};
use crate::cargo::{self, cargo};
use crate::limits::{E2E_AT_ONCE, SIMULATION_S, STORE_S};
use crate::paths::Paths;
use crate::setup::{self, Need};

/// The package of end-to-end tests.
const E2E: &str = "hyv-e2e";

/// What to test.
#[derive(clap::Args)]
pub struct Options {
    /// Run only tests whose name contains this; formatting and lints are left out.
    filter: Option<String>,
    /// Leave out what takes long: images, loom, end-to-end tests. Needs no QEMU.
    #[arg(long)]
    quick: bool,
}

/// Formatting and lints of host and guest.
pub fn check(paths: &Paths) -> Result<ExitCode> {
    setup::require(&[Need::Linker])?;
    let mut steps = Steps::default();
    check_steps(paths, &mut steps);
    Ok(steps.finish())
}

/// Every test that `options` leave in. A step that fails does not keep others from running, unless
/// they need what it makes.
pub fn run(paths: &Paths, options: &Options) -> Result<ExitCode> {
    let needs: &[Need] = if options.quick {
        &[Need::Linker]
    } else {
        &[Need::Linker, Need::Qemu, Need::Networks]
    };
    setup::require(needs)?;
    let mut steps = Steps::default();
    let filter = options.filter.as_deref();

    if filter.is_none() {
        check_steps(paths, &mut steps);
    }
    let built = if options.quick {
        steps.skip("build", "--quick");
        false
    } else {
        steps.run("build", || build::everything(paths))
    };
    let nextest = cargo::has_subcommand(&paths.root, "nextest");
    let units = |filter: Option<&str>| host_tests(paths, nextest, filter, false);
    steps.run("unit and property tests", || cargo::run(units(filter)));
    // Three minutes for the transport and about one for the store, on one core, while the next steps compile little by little.
    let fresh = (!options.quick && filter.is_none()).then(|| {
        let mut command = units(Some("fresh_seeds"));
        command.env("HYV_SIM_SECONDS", SIMULATION_S);
        command.env("HYV_STORE_SECONDS", STORE_S);
        if !nextest {
            command.arg("--");
        }
        command.args(["--test-threads", "1"]);
        cargo::start(command)
    });
    if nextest && filter.is_none() {
        // cargo test runs these with the others, nextest does not know them.
        steps.run("examples in documentation", || cargo::run(doc_tests(paths)));
    }
    if options.quick {
        steps.skip("loom", "--quick");
        steps.skip("end to end", "--quick");
    } else {
        loom_step(paths, &mut steps, filter);
        if let Some(started) = fresh {
            steps.run("random schedules, fresh seeds", || started?.finish());
        }
        if built {
            // Tests that pass are not shown, and some pass because they are skipped: they write it down.
            let skipped = paths.target.join("skipped");
            let _ = std::fs::remove_file(&skipped);
            steps.run("end to end", || {
                let mut command = host_tests(paths, nextest, filter, true);
                command.env("HYV_SKIPPED", &skipped);
                if !nextest {
                    command.arg("--");
                }
                command.args(["--test-threads", E2E_AT_ONCE]);
                cargo::run(command)
            });
            steps.skip_all(&std::fs::read_to_string(&skipped).unwrap_or_default());
            if let Some(reason) = no_kvm() {
                steps.skip("end to end under KVM", &reason);
            }
        } else {
            steps.skip("end to end", "the build failed");
        }
    }
    Ok(steps.finish())
}

fn check_steps(paths: &Paths, steps: &mut Steps) {
    steps.run("formatting", || {
        let mut command = cargo(&paths.root);
        command.args(["fmt", "--all", "--check", "--", "--files-with-diff"]);
        cargo::run(command)
    });
    steps.run("lints, host", || {
        let mut command = cargo(&paths.root);
        command.args(["clippy", "--quiet", "--workspace", "--all-targets"]);
        for package in GUEST_PACKAGES {
            command.args(["--exclude", package]);
        }
        command.args(["--", "-Dwarnings"]);
        cargo::run(command)
    });
    steps.run("lints, guest", || {
        let mut command = build::guest_cargo(paths, "clippy");
        command.arg("--quiet");
        for package in GUEST_PACKAGES {
            command.args(["-p", package]);
        }
        command.args(["--", "-Dwarnings"]);
        cargo::run(command)
    });
}

/// A call that runs the end-to-end tests, or all others of this machine's packages.
fn host_tests(paths: &Paths, nextest: bool, filter: Option<&str>, end_to_end: bool) -> Command {
    let mut command = cargo(&paths.root);
    if nextest {
        // A crate without tests, or a filter that leaves none, is no failure.
        command.args(["nextest", "run", "--no-fail-fast", "--no-tests=pass"]);
        // One selection of packages, so that both calls agree on features: otherwise the second compiles everything again.
        command.arg("--workspace");
        for package in GUEST_PACKAGES {
            command.args(["--exclude", package]);
        }
        let not = if end_to_end { "" } else { "not " };
        command.args(["-E", &format!("{not}package({E2E})")]);
    } else {
        command.args(["test", "--no-fail-fast"]);
        if end_to_end {
            command.args(["-p", E2E]);
        } else {
            command.arg("--workspace");
            for package in GUEST_PACKAGES.iter().chain([&E2E]) {
                command.args(["--exclude", package]);
            }
        }
    }
    command.args(filter);
    command.envs(paths.environment());
    command
}

fn doc_tests(paths: &Paths) -> Command {
    let mut command = cargo(&paths.root);
    command.args(["test", "--quiet", "--doc", "--workspace", "--no-fail-fast"]);
    for package in GUEST_PACKAGES {
        command.args(["--exclude", package]);
    }
    command
}

/// Tests under loom are integration tests whose name begins with `loom`, in any crate. They need code that
/// is built for it, so they have a target folder of their own; and optimised, since they try out so many
/// interleavings.
fn loom_step(paths: &Paths, steps: &mut Steps, filter: Option<&str>) {
    const NAME: &str = "loom";
    let tests = match cargo::test_targets(&paths.root) {
        Ok(tests) => tests,
        Err(error) => {
            steps.run(NAME, || Err(error));
            return;
        }
    };
    let tests: Vec<_> = tests
        .into_iter()
        .filter(|test| test.name.starts_with("loom"))
        .collect();
    if tests.is_empty() {
        steps.skip(NAME, "no crate has a test named loom*");
    }
    for test in tests {
        steps.run(&format!("{NAME}, {} {}", test.package, test.name), || {
            let mut command = cargo(&paths.root);
            // Not this project's release profile: its link-time optimisation takes longer than the test.
            command.args([
                "test",
                "--config",
                "profile.test.opt-level=3",
                "-p",
                &test.package,
            ]);
            command
                .args(["--test", &test.name, "--target-dir"])
                .arg(paths.loom_target());
            command.args(filter);
            command.env("RUSTFLAGS", "--cfg loom");
            cargo::run(command)
        });
    }
}

/// Why there can be no guests under KVM here. Whether KVM takes the processor's model is seen only by
/// trying: the tests do, and say so.
fn no_kvm() -> Option<String> {
    match std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => None,
        Err(error) => Some(format!("/dev/kvm: {error}; everything ran under TCG")),
    }
}

/// What was run, and how it went.
#[derive(Default)]
struct Steps {
    done: Vec<(String, Outcome)>,
}

enum Outcome {
    Passed(Duration),
    Failed(Duration),
    Skipped(String),
}

impl Steps {
    /// Runs a step and says whether it passed.
    fn run(&mut self, name: &str, step: impl FnOnce() -> Result<()>) -> bool {
        eprintln!("==> {name}");
        let start = Instant::now();
        let result = step();
        let time = start.elapsed();
        let passed = result.is_ok();
        if let Err(error) = result {
            eprintln!("error: {error:#}");
        }
        let outcome = if passed {
            Outcome::Passed(time)
        } else {
            Outcome::Failed(time)
        };
        self.done.push((name.to_owned(), outcome));
        passed
    }

    fn skip(&mut self, name: &str, reason: &str) {
        self.done
            .push((name.to_owned(), Outcome::Skipped(reason.to_owned())));
    }

    /// Lines of `WHAT: REASON`.
    fn skip_all(&mut self, lines: &str) {
        for line in lines.lines() {
            let (what, reason) = line.split_once(": ").unwrap_or((line, "no reason"));
            self.skip(&format!("end to end, {what}"), reason);
        }
    }

    fn summary(&self) -> String {
        let mut text = String::from("Steps:\n");
        for (name, outcome) in &self.done {
            text += &match outcome {
                Outcome::Passed(time) => {
                    format!("  passed   {name} ({:.1} s)\n", time.as_secs_f64())
                }
                Outcome::Failed(time) => {
                    format!("  FAILED   {name} ({:.1} s)\n", time.as_secs_f64())
                }
                Outcome::Skipped(reason) => format!("  skipped  {name}: {reason}\n"),
            };
        }
        text
    }

    fn failed(&self) -> bool {
        self.done
            .iter()
            .any(|(_, outcome)| matches!(outcome, Outcome::Failed(_)))
    }

    fn finish(self) -> ExitCode {
        eprint!("\n{}", self.summary());
        if self.failed() {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn one_failure_fails_the_whole_and_the_rest_is_run() {
        let mut steps = Steps::default();
        assert!(steps.run("first", || Ok(())));
        assert!(!steps.failed());
        assert!(!steps.run("second", || bail!("broken")));
        assert!(steps.run("third", || Ok(())));
        steps.skip("fourth", "no reason");
        assert!(steps.failed());
        let summary = steps.summary();
        let lines: Vec<_> = summary.lines().collect();
        assert_eq!(lines.len(), 5);
        assert!(lines[1].starts_with("  passed   first ("));
        assert!(lines[2].starts_with("  FAILED   second ("));
        assert!(lines[3].starts_with("  passed   third ("));
        assert_eq!(lines[4], "  skipped  fourth: no reason");
    }

    #[test]
    fn what_is_skipped_is_no_failure() {
        let mut steps = Steps::default();
        steps.skip("all", "a reason");
        steps.skip_all("one: no x: not root\ntwo: no y\n");
        assert!(!steps.failed());
        assert_eq!(
            steps.summary(),
            "Steps:\n  skipped  all: a reason\n  skipped  end to end, one: no x: not root\n  \
             skipped  end to end, two: no y\n"
        );
    }
}
