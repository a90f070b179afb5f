//! Finds QEMU, and decides between KVM and TCG by trying.
//!
//! Whether `/dev/kvm` works shows only in a start: a KVM without hardware under it refuses CPU models that claim features it
//! cannot give. So a machine that never runs is started once (some 60 ms), and what worked is remembered in the runtime folder until
//! the next boot of this host or another QEMU.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::limits::{KVM_TRIAL_TIMEOUT, MAX_TRIAL_STDERR, MIN_QEMU, QEMU_VERSION_TIMEOUT};
use crate::sys::process::spawn_bound;

/// The program's name in `PATH`.
const QEMU: &str = "qemu-system-x86_64";
/// The boot ROM: SeaBIOS, QEMU's default, takes 4 to 6 s where KVM has no hardware under it.
const ROM: &str = "qboot.rom";
/// File in the runtime folder that remembers the last trial.
const CACHE_FILE: &str = ".accel.json";
/// CPU models to try under KVM, best first. `arch-capabilities` is a feature that KVM without hardware cannot set, and
/// no guest of ours reads; `vmx` and `svm` are in `max` and would let the guest nest.
const KVM_CPUS: [&str; 2] = [
    "host,-arch-capabilities",
    "max,-arch-capabilities,-vmx,-svm",
];
/// CPU model under TCG.
const TCG_CPU: &str = "max";
/// The machine of every guest: PCI by ports CF8/CFC, and nothing that costs time at boot.
pub const MACHINE: &str = "q35,acpi=off,smm=off,sata=off,smbus=off,usb=off,hpet=off";

/// What `--accel` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AccelRequest {
    /// KVM where it works, else TCG.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// TCG.
    Tcg,
}

impl FromStr for AccelRequest {
    type Err = AccelError;

    fn from_str(s: &str) -> Result<Self, AccelError> {
        match s {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err(AccelError::UnknownName(s.to_owned())),
        }
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccelKind {
    /// The kernel.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl AccelKind {
    /// `kvm` or `tcg`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for AccelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accel {
    /// KVM or TCG.
    pub kind: AccelKind,
    /// QEMU's `-cpu`.
    pub cpu: String,
    /// Why it is TCG although nobody asked for that: one line.
    pub fallback_reason: Option<String>,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fallback_reason {
            Some(reason) => write!(f, "{}, because {reason}", self.kind),
            None => write!(f, "{}", self.kind),
        }
    }
}

/// Where KVM does not work, why.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvmProblem {
    /// No device file.
    #[error(
        "/dev/kvm is missing (load the module kvm_intel or kvm_amd, or switch virtualisation on in the firmware)"
    )]
    Missing,
    /// The file may not be opened.
    #[error(
        "/dev/kvm may not be opened by this user (join the group kvm: `sudo usermod -aG kvm $USER`, then log in again)"
    )]
    Permission,
    /// The file cannot be opened for another reason.
    #[error("/dev/kvm cannot be opened: {0}")]
    Open(String),
    /// Every CPU model was refused.
    #[error("KVM refuses every CPU model that was tried: {0}")]
    CpuRefused(String),
    /// QEMU hung in the trial.
    #[error("a trial start under KVM did not end within {} s", KVM_TRIAL_TIMEOUT.as_secs())]
    Hung,
}

/// What can go wrong before a guest starts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccelError {
    /// Not a word of `--accel`.
    #[error("`{0}` is no accelerator; use auto, kvm or tcg")]
    UnknownName(String),
    /// No QEMU in `PATH`.
    #[error("{QEMU} is not in PATH; install it: `apt-get install qemu-system-x86`")]
    QemuMissing,
    /// QEMU did not say its version.
    #[error("{path} --version failed: {reason}; reinstall the package qemu-system-x86")]
    QemuBroken {
        /// The program.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
    /// Too old.
    #[error("{path} is version {found}, but {}.{} or newer is needed; install Debian 12's or a newer one", MIN_QEMU.0, MIN_QEMU.1)]
    QemuTooOld {
        /// The program.
        path: PathBuf,
        /// Its version.
        found: String,
    },
    /// QEMU without its ROM.
    #[error(
        "{ROM} is not among the files of {path} (looked in {searched:?}); install the package qemu-system-x86, or qemu-system-data"
    )]
    RomMissing {
        /// The program.
        path: PathBuf,
        /// Folders looked in.
        searched: Vec<PathBuf>,
    },
    /// `--accel kvm`, and it does not work.
    #[error("--accel kvm: {0}; or use --accel tcg")]
    Kvm(KvmProblem),
}

/// The QEMU to use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuBinary {
    /// The program.
    pub path: PathBuf,
    /// Major, minor, micro.
    pub version: (u32, u32, u32),
    /// The boot ROM.
    pub rom: PathBuf,
}

/// What a trial found, and for which host, kernel and QEMU.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Cached {
    boot_id: String,
    qemu: QemuBinary,
    qemu_stamp: Stamp,
    kvm_stamp: Option<Stamp>,
    kvm_cpu: Option<String>,
}

/// What changes when a file is replaced or its access is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

fn stamp(path: &Path) -> Option<Stamp> {
    let m = fs::metadata(path).ok()?;
    Some(Stamp {
        device: m.dev(),
        inode: m.ino(),
        size: m.size(),
        changed: (m.ctime(), m.ctime_nsec()),
    })
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Finds QEMU and decides how to run it. `cache` is a private folder (the parent of the runtime folders) that remembers the trial.
///
/// # Errors
/// QEMU missing, broken, too old or without its ROM; KVM asked for and not usable.
pub fn probe(
    request: AccelRequest,
    cache: Option<&Path>,
) -> Result<(QemuBinary, Accel), AccelError> {
    let path = find_in_path(QEMU).ok_or(AccelError::QemuMissing)?;
    let cache = cache.map(|dir| dir.join(CACHE_FILE));
    let known = cache.as_deref().and_then(|f| recall(f, &path));
    let qemu = match &known {
        Some(k) => k.qemu.clone(),
        None => inspect(path)?,
    };
    let tcg = |fallback_reason| Accel {
        kind: AccelKind::Tcg,
        cpu: TCG_CPU.to_owned(),
        fallback_reason,
    };
    let kvm_cpu = match request {
        AccelRequest::Tcg => Err(None),
        AccelRequest::Auto | AccelRequest::Kvm => open_kvm()
            .and_then(|()| match known.as_ref().and_then(|k| k.kvm_cpu.clone()) {
                Some(cpu) => Ok(cpu),
                None => try_kvm(&qemu),
            })
            .map_err(Some),
    };
    if let Some(file) = &cache {
        let kvm_cpu = kvm_cpu
            .as_ref()
            .ok()
            .cloned()
            .or_else(|| known.as_ref().and_then(|k| k.kvm_cpu.clone()));
        remember(file, &qemu, kvm_cpu, known.as_ref());
    }
    let accel = match (kvm_cpu, request) {
        (Ok(cpu), _) => Accel {
            kind: AccelKind::Kvm,
            cpu,
            fallback_reason: None,
        },
        (Err(Some(problem)), AccelRequest::Kvm) => return Err(AccelError::Kvm(problem)),
        (Err(problem), _) => tcg(problem.map(|p| p.to_string())),
    };
    Ok((qemu, accel))
}

fn recall(file: &Path, path: &Path) -> Option<Cached> {
    let cached: Cached = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    let fresh = cached.boot_id == boot_id()
        && cached.qemu.path == path
        && Some(&cached.qemu_stamp) == stamp(path).as_ref()
        && cached.kvm_stamp == stamp(Path::new("/dev/kvm"))
        && cached.qemu.rom.is_file();
    fresh.then_some(cached)
}

fn remember(file: &Path, qemu: &QemuBinary, kvm_cpu: Option<String>, known: Option<&Cached>) {
    let Some(qemu_stamp) = stamp(&qemu.path) else {
        return;
    };
    let entry = Cached {
        boot_id: boot_id(),
        qemu: qemu.clone(),
        qemu_stamp,
        kvm_stamp: stamp(Path::new("/dev/kvm")),
        kvm_cpu,
    };
    if known == Some(&entry) {
        return;
    }
    // Written beside and renamed: another instance may read it meanwhile. Failure costs the next start 100 ms.
    let temporary = file.with_extension(format!("{}", std::process::id()));
    let write = || -> io::Result<()> {
        let text = serde_json::to_vec(&entry)?;
        let mut f = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        f.write_all(&text)?;
        fs::rename(&temporary, file)
    };
    if let Err(e) = write() {
        let _ = fs::remove_file(&temporary);
        tracing::debug!(file = %file.display(), "cannot remember the accelerator: {e}");
    }
}

fn find_in_path(program: &str) -> Option<PathBuf> {
    let executable =
        |p: &PathBuf| fs::metadata(p).is_ok_and(|m| m.is_file() && m.mode() & 0o111 != 0);
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|d| d.join(program))
        .find(executable)
}

fn inspect(path: PathBuf) -> Result<QemuBinary, AccelError> {
    let broken = |reason: String| AccelError::QemuBroken {
        path: path.clone(),
        reason,
    };
    let run = |args: &[&str]| {
        let mut c = Command::new(&path);
        c.args(args);
        run_limited(c, b"", QEMU_VERSION_TIMEOUT).map_err(|e| broken(e.to_string()))
    };
    let answer = run(&["--version"])?.ok_or_else(|| broken("no answer in time".into()))?;
    let version = parse_version(&answer.stdout).ok_or_else(|| {
        let said = if answer.stdout.is_empty() {
            &answer.stderr
        } else {
            &answer.stdout
        };
        broken(format!(
            "{}, it said `{}`",
            answer.status,
            said.lines().next().unwrap_or_default()
        ))
    })?;
    if (version.0, version.1) < MIN_QEMU {
        let found = format!("{}.{}.{}", version.0, version.1, version.2);
        return Err(AccelError::QemuTooOld { path, found });
    }
    let mut searched = vec![
        PathBuf::from("/usr/share/qemu"),
        PathBuf::from("/usr/share/seabios"),
    ];
    let is_there = |dirs: &[PathBuf]| dirs.iter().map(|d| d.join(ROM)).find(|r| r.is_file());
    let rom = match is_there(&searched) {
        Some(rom) => rom,
        None => {
            let dirs = run(&["-L", "help"])?.map(|a| a.stdout).unwrap_or_default();
            searched.extend(dirs.lines().map(PathBuf::from));
            is_there(&searched).ok_or(AccelError::RomMissing {
                path: path.clone(),
                searched,
            })?
        }
    };
    Ok(QemuBinary { path, version, rom })
}

/// `QEMU emulator version 7.2.22 (Debian …)`.
fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let number = text.split_once("version ")?.1;
    let end = number
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(number.len());
    let mut parts = number[..end].split('.').map(|p| p.parse::<u32>().ok());
    Some((
        parts.next()??,
        parts.next()??,
        parts.next().flatten().unwrap_or(0),
    ))
}

fn open_kvm() -> Result<(), KvmProblem> {
    match fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => Ok(()),
        Err(e) => Err(match e.kind() {
            io::ErrorKind::NotFound => KvmProblem::Missing,
            io::ErrorKind::PermissionDenied => KvmProblem::Permission,
            // ENXIO and ENODEV: the file is there, the driver is not.
            _ if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
                KvmProblem::Missing
            }
            _ => KvmProblem::Open(e.to_string()),
        }),
    }
}

/// The first CPU model that a machine can be made with.
fn try_kvm(qemu: &QemuBinary) -> Result<String, KvmProblem> {
    let mut refusal = String::new();
    for cpu in KVM_CPUS {
        let mut c = Command::new(&qemu.path);
        c.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-machine",
            MACHINE,
        ]);
        c.args([
            "-accel", "kvm", "-cpu", cpu, "-m", "16", "-S", "-qmp", "stdio", "-bios",
        ])
        .arg(&qemu.rom);
        let orders = br#"{"execute":"qmp_capabilities"}{"execute":"quit"}"#;
        match run_limited(c, orders, KVM_TRIAL_TIMEOUT) {
            Ok(Some(a)) if a.status.success() => return Ok(cpu.to_owned()),
            Ok(Some(a)) => {
                let line = a
                    .stderr
                    .lines()
                    .find(|l| !l.trim().is_empty())
                    .unwrap_or("no reason given");
                let line = line
                    .strip_prefix(QEMU)
                    .map_or(line, |l| l.trim_start_matches([':', ' ']));
                refusal = format!("`{cpu}`: {line} ({})", a.status);
            }
            Ok(None) => return Err(KvmProblem::Hung),
            Err(e) => refusal = format!("`{cpu}`: {e}"),
        }
    }
    Err(KvmProblem::CpuRefused(refusal))
}

struct Answer {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

/// Runs a program to its end with a time limit: `None` when it had to be killed.
fn run_limited(mut command: Command, input: &[u8], limit: Duration) -> io::Result<Option<Answer>> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = spawn_bound(command, &[])?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ended early does not read; its status tells.
        let _ = stdin.write_all(input);
        // Kept open until it answers: QEMU takes the end of its monitor's input as the end of the conversation.
        let out = reader(child.stdout.take());
        let err = reader(child.stderr.take());
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() >= deadline {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let text = |r: std::thread::JoinHandle<String>| r.join().unwrap_or_default();
        return Ok(Some(Answer {
            status,
            stdout: text(out),
            stderr: text(err),
        }));
    }
    Err(io::Error::other("no pipe to the program"))
}

fn reader(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut f) = from {
            let _ = f
                .by_ref()
                .take(MAX_TRIAL_STDERR as u64)
                .read_to_end(&mut bytes);
            // What is not kept is read all the same, or the program would wait for room in the pipe.
            let _ = io::copy(&mut f, &mut io::sink());
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(dir: &Path, body: &str) -> PathBuf {
        let p = dir.join("fake-qemu");
        fs::write(&p, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&p, fs::Permissions::from_mode(0o755)).unwrap();
        p
    }

    #[test]
    fn versions() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)\n"),
            Some((7, 2, 22))
        );
        assert_eq!(
            parse_version("QEMU emulator version 10.0"),
            Some((10, 0, 0))
        );
        assert_eq!(
            parse_version("QEMU emulator version 11.1.0-rc1"),
            Some((11, 1, 0))
        );
        assert_eq!(parse_version("something else"), None);
    }

    #[test]
    fn old_and_broken_qemus_are_named() {
        let d = tempfile::tempdir().unwrap();
        let p = script(d.path(), "echo QEMU emulator version 6.2.0");
        let e = inspect(p).unwrap_err();
        assert!(matches!(e, AccelError::QemuTooOld { .. }), "{e}");
        assert!(
            e.to_string().contains("6.2.0") && e.to_string().contains("7.2"),
            "{e}"
        );
        let p = script(d.path(), "echo lib missing >&2; exit 127");
        let e = inspect(p).unwrap_err().to_string();
        assert!(e.contains("lib missing"), "{e}");
    }

    #[test]
    fn a_hang_has_an_end() {
        let d = tempfile::tempdir().unwrap();
        let p = script(d.path(), "exec sleep 60");
        let started = Instant::now();
        assert!(
            run_limited(Command::new(p), b"", Duration::from_millis(50))
                .unwrap()
                .is_none()
        );
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_refused_cpu_model_is_explained() {
        let d = tempfile::tempdir().unwrap();
        let path = script(
            d.path(),
            "echo 'qemu-system-x86_64: error: failed to set MSR 0x10a to 0x0' >&2; exit 134",
        );
        let qemu = QemuBinary {
            path,
            version: (7, 2, 0),
            rom: "/dev/null".into(),
        };
        let e = try_kvm(&qemu).unwrap_err().to_string();
        assert!(e.contains("MSR 0x10a") && e.contains("max,"), "{e}");
    }

    #[test]
    fn tcg_needs_no_kvm_and_the_second_probe_remembers() {
        let d = tempfile::tempdir().unwrap();
        let (qemu, accel) = probe(AccelRequest::Tcg, Some(d.path())).unwrap();
        assert_eq!((accel.kind, accel.fallback_reason), (AccelKind::Tcg, None));
        let cached = recall(&d.path().join(CACHE_FILE), &qemu.path).unwrap();
        assert_eq!(cached.kvm_cpu, None);
        let (again, auto) = probe(AccelRequest::Auto, Some(d.path())).unwrap();
        assert_eq!(again, qemu);
        if auto.kind == AccelKind::Kvm {
            let started = Instant::now();
            let (_, cached) = probe(AccelRequest::Kvm, Some(d.path())).unwrap();
            assert_eq!(cached, auto);
            assert!(
                started.elapsed() < Duration::from_millis(50),
                "{:?}",
                started.elapsed()
            );
        } else {
            assert!(auto.fallback_reason.is_some());
        }
    }

    #[test]
    fn a_stale_or_broken_memory_is_ignored() {
        let d = tempfile::tempdir().unwrap();
        let file = d.path().join(CACHE_FILE);
        let (qemu, _) = probe(AccelRequest::Tcg, Some(d.path())).unwrap();
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace(&boot_id(), "another-boot")).unwrap();
        assert!(recall(&file, &qemu.path).is_none());
        fs::write(&file, "{").unwrap();
        assert!(recall(&file, &qemu.path).is_none());
        probe(AccelRequest::Tcg, Some(d.path())).unwrap();
        assert!(recall(&file, &qemu.path).is_some());
    }

    #[test]
    fn words() {
        assert_eq!("kvm".parse::<AccelRequest>().unwrap(), AccelRequest::Kvm);
        assert!(
            "hvf"
                .parse::<AccelRequest>()
                .unwrap_err()
                .to_string()
                .contains("auto, kvm or tcg")
        );
    }
}
