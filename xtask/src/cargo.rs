//! Calls of cargo.

use std::io::{BufRead, BufReader, IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

/// Variables that change how rustc is called. Guest code is built with exactly the flags of
/// `build.rs`, and host code does not inherit what somebody set for something else.
const FLAG_VARIABLES: [&str; 5] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
];

/// A call of cargo in `root`, with no flags for rustc from the environment.
pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).stdin(Stdio::null());
    for name in FLAG_VARIABLES {
        command.env_remove(name);
    }
    command
}

/// Runs a build and gives the paths of the programs it made (or found up to date). Shows what cargo does, and
/// nothing if it had nothing to do.
pub fn build(mut command: Command, what: &str) -> Result<Vec<PathBuf>> {
    if std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    command.arg("--message-format=json-render-diagnostics");
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let shown = child
        .stderr
        .take()
        .map(|stderr| std::thread::spawn(move || show(stderr)));
    let mut messages = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout
            .read_to_string(&mut messages)
            .context("cannot read what cargo says")?;
    }
    let status = child.wait().context("cannot wait for cargo")?;
    if let Some(shown) = shown {
        // It only copies lines; should it have failed, the build's status still counts.
        let _ = shown.join();
    }
    if !status.success() {
        bail!("building {what} failed (see above)");
    }
    Ok(executables(&messages))
}

/// Copies cargo's lines, except the one that it always prints.
fn show(stderr: impl std::io::Read) {
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        if !is_finished(&line) {
            eprintln!("{line}");
        }
    }
}

/// Whether this is `    Finished …`, with or without colours.
fn is_finished(line: &str) -> bool {
    let mut plain = String::new();
    let mut in_escape = false;
    for c in line.chars().take(64) {
        match (in_escape, c) {
            (false, '\x1b') => in_escape = true,
            (false, c) => plain.push(c),
            (true, c) => in_escape = !c.is_ascii_alphabetic(),
        }
    }
    plain.trim_start().starts_with("Finished ")
}

fn executables(messages: &str) -> Vec<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        #[serde(default)]
        executable: Option<PathBuf>,
    }
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok()?.executable)
        .collect()
}

/// A test target of the workspace.
#[derive(Debug, PartialEq, Eq)]
pub struct TestTarget {
    /// Its package.
    pub package: String,
    /// Its name.
    pub name: String,
}

/// The integration tests of all packages.
pub fn test_targets(root: &Path) -> Result<Vec<TestTarget>> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        targets: Vec<Target>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    let output = cargo(root)
        .args(["metadata", "--no-deps", "--format-version=1"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo metadata failed (see above)");
    }
    let metadata: Metadata =
        serde_json::from_slice(&output.stdout).context("cannot read cargo metadata")?;
    Ok(metadata
        .packages
        .into_iter()
        .flat_map(|package| {
            let name = package.name;
            package
                .targets
                .into_iter()
                .filter(|target| target.kind.iter().any(|kind| kind == "test"))
                .map(move |target| TestTarget {
                    package: name.clone(),
                    name: target.name,
                })
        })
        .collect())
}

/// Whether cargo knows the subcommand `name`.
pub fn has_subcommand(root: &Path, name: &str) -> bool {
    cargo(root)
        .args([name, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs `command` with its output shown as it is. The error says which call failed.
pub fn run(command: Command) -> Result<()> {
    start(command)?.finish()
}

/// A call that runs beside others.
pub struct Started {
    child: Child,
    call: String,
}

/// Starts `command` with its output shown as it is.
pub fn start(mut command: Command) -> Result<Started> {
    let words: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy())
        .collect();
    let call = words.join(" ");
    let child = command.spawn().context("cannot run cargo")?;
    Ok(Started { child, call })
}

impl Started {
    /// Waits for its end. The error says which call failed.
    pub fn finish(mut self) -> Result<()> {
        let status = self.child.wait().context("cannot wait for cargo")?;
        if !status.success() {
            bail!("cargo {} failed", self.call);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_closing_line_is_left_out() {
        assert!(is_finished(
            "    Finished `release` profile [optimized] target(s) in 0.1s"
        ));
        assert!(is_finished(
            "\x1b[1m\x1b[92m    Finished\x1b[0m `dev` profile"
        ));
        assert!(!is_finished("   Compiling finished v1.0.0"));
        assert!(!is_finished("error: Finished is no type"));
        assert!(!is_finished(""));
    }

    #[test]
    fn programs_are_taken_from_messages_of_any_kind() {
        let messages = r#"
            {"reason":"compiler-artifact","executable":null,"fresh":true}
            {"reason":"compiler-artifact","executable":"/t/a","fresh":true}
            {"reason":"build-script-executed"}
            not json
            {"reason":"build-finished","success":true}"#;
        assert_eq!(executables(messages), [PathBuf::from("/t/a")]);
    }

    #[test]
    fn this_workspace_lists_its_tests() {
        let root = crate::paths::Paths::find().root;
        let tests = test_targets(&root).unwrap();
        let name = |package: &str, name: &str| TestTarget {
            package: package.to_owned(),
            name: name.to_owned(),
        };
        assert!(
            tests.contains(&name("kvstore-cli", "dumpavail")),
            "{tests:?}"
        );
    }
}
