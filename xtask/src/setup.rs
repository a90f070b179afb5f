//! What has to be on the machine, and how it gets there.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::limits::MIN_QEMU;

/// Something that a command cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// `cc`, by which rustc links.
    Linker,
    /// QEMU for x86-64, recent enough, with its firmware for fast boots.
    Qemu,
    /// `ip`, by which tests make networks. Only root can, so nobody else needs it.
    Networks,
    /// `redis-server` and `redis-benchmark`, which the store is compared with.
    Redis,
}

/// Makes sure that `needs` are there: as root installs what is missing with apt.
///
/// # Errors
/// What is missing and the one line that installs it, where this process may not; what is too old.
pub fn require(needs: &[Need]) -> Result<()> {
    let machine = Machine::this();
    let missing = machine.missing(needs)?;
    if missing.is_empty() {
        return Ok(());
    }
    let packages = packages(&missing);
    if !machine.has("apt-get") {
        bail!(
            "{}; install it with this system's package manager",
            Named(&missing)
        );
    }
    if !machine.root {
        bail!(
            "{}; run this line, then this command again:\n    {}",
            Named(&missing),
            machine.apt_line(&packages)
        );
    }
    eprintln!("Installing {} (apt-get)", packages.join(" "));
    machine.install(&packages)?;
    let still = machine.missing(needs)?;
    if !still.is_empty() {
        bail!(
            "{}, although apt-get installed {}",
            Named(&still),
            packages.join(" ")
        );
    }
    Ok(())
}

/// What is missing, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    Linker,
    Qemu,
    Firmware,
    Ip,
    Redis,
}

impl Missing {
    /// The packages of Debian and Ubuntu that have it.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Linker => &["gcc", "libc6-dev"],
            // The firmware comes in a package that this one depends on.
            Self::Qemu => &["qemu-system-x86"],
            Self::Firmware => &["qemu-system-x86", "qemu-system-data"],
            Self::Ip => &["iproute2"],
            // The instrument comes in a package that this one depends on.
            Self::Redis => &["redis-server"],
        }
    }
}

struct Named<'a>(&'a [Missing]);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, missing) in self.0.iter().enumerate() {
            let separator = if i > 0 { ", " } else { "" };
            match missing {
                Missing::Linker => write!(f, "{separator}a C linker (cc) is missing")?,
                Missing::Qemu => {
                    let (major, minor) = MIN_QEMU;
                    write!(
                        f,
                        "{separator}QEMU (qemu-system-x86_64, {major}.{minor} or newer) is missing"
                    )?;
                }
                Missing::Firmware => {
                    write!(f, "{separator}QEMU's firmware qboot.rom is missing")?;
                }
                Missing::Ip => write!(f, "{separator}iproute2 (ip) is missing")?,
                Missing::Redis => write!(
                    f,
                    "{separator}Redis (redis-server, redis-benchmark) is missing"
                )?,
            }
        }
        Ok(())
    }
}

fn packages(missing: &[Missing]) -> Vec<&'static str> {
    let mut packages: Vec<&str> = Vec::new();
    for package in missing.iter().flat_map(|m| m.packages()) {
        if !packages.contains(package) {
            packages.push(package);
        }
    }
    packages
}

/// The machine as far as this module looks at it; tests make others.
struct Machine {
    path: OsString,
    root: bool,
    /// Where distributions put QEMU's firmware.
    firmware: Vec<PathBuf>,
    /// apt's package lists.
    lists: PathBuf,
}

impl Machine {
    fn this() -> Self {
        Self {
            path: std::env::var_os("PATH").unwrap_or_default(),
            root: rustix::process::geteuid().is_root(),
            firmware: vec!["/usr/share/qemu".into(), "/usr/local/share/qemu".into()],
            lists: "/var/lib/apt/lists".into(),
        }
    }

    /// The program `name` by PATH.
    fn find(&self, name: &str) -> Option<PathBuf> {
        std::env::split_paths(&self.path)
            .map(|folder| folder.join(name))
            .find(|file| {
                file.metadata()
                    .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
            })
    }

    fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    fn missing(&self, needs: &[Need]) -> Result<Vec<Missing>> {
        let mut missing = Vec::new();
        if needs.contains(&Need::Linker) && !self.has("cc") {
            missing.push(Missing::Linker);
        }
        if needs.contains(&Need::Qemu) {
            match self.find("qemu-system-x86_64") {
                None => missing.push(Missing::Qemu),
                Some(qemu) => {
                    check_version(&qemu)?;
                    if !self.has_firmware(&qemu) {
                        missing.push(Missing::Firmware);
                    }
                }
            }
        }
        if needs.contains(&Need::Networks) && self.root && !self.has("ip") {
            missing.push(Missing::Ip);
        }
        let redis = ["redis-server", "redis-benchmark"];
        if needs.contains(&Need::Redis) && !redis.iter().all(|name| self.has(name)) {
            missing.push(Missing::Redis);
        }
        Ok(missing)
    }

    fn has_firmware(&self, qemu: &Path) -> bool {
        let there = |folder: &Path| folder.join("qboot.rom").is_file();
        if self.firmware.iter().any(|folder| there(folder)) {
            return true;
        }
        // A QEMU of somebody's own names the folders it looks in.
        said(qemu, &["-L", "help"]).is_ok_and(|text| text.lines().any(|line| there(line.as_ref())))
    }

    /// The one line that installs `packages`.
    fn apt_line(&self, packages: &[&str]) -> String {
        let update = if self.has_lists() {
            ""
        } else {
            "sudo apt-get update && "
        };
        format!(
            "{update}sudo apt-get install --no-install-recommends {}",
            packages.join(" ")
        )
    }

    /// Whether apt knows any packages: a fresh container has no lists.
    fn has_lists(&self) -> bool {
        let is_list = |name: &str| name.contains("_Packages");
        self.lists.read_dir().is_ok_and(|files| {
            files
                .filter_map(Result::ok)
                .any(|f| f.file_name().to_str().is_some_and(is_list))
        })
    }

    fn install(&self, packages: &[&str]) -> Result<()> {
        // Lists that are there may still be older than the archive: then update, and try again.
        if self.has_lists() && self.try_install(packages)? {
            return Ok(());
        }
        if !self.apt_get(&["update", "-q"])? {
            bail!("apt-get update failed (see above)");
        }
        if !self.try_install(packages)? {
            bail!(
                "apt-get could not install {} (see above)",
                packages.join(" ")
            );
        }
        Ok(())
    }

    fn try_install(&self, packages: &[&str]) -> Result<bool> {
        self.apt_get(
            &[
                &["install", "-q", "-y", "--no-install-recommends"][..],
                packages,
            ]
            .concat(),
        )
    }

    fn apt_get(&self, args: &[&str]) -> Result<bool> {
        let program = self.find("apt-get").context("apt-get is missing")?;
        let status = Command::new(program)
            .args(args)
            .env("PATH", &self.path)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            // Standard output is the command's own, and may be a file or a pipe.
            .stdout(std::io::stderr())
            .status()
            .context("cannot run apt-get")?;
        Ok(status.success())
    }
}

/// What `program` prints.
fn said(program: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn check_version(qemu: &Path) -> Result<()> {
    let text = said(qemu, &["--version"])?;
    let (major, minor) = MIN_QEMU;
    let Some(version) = version(&text) else {
        bail!(
            "{} --version says {text:?}, which names no version of QEMU",
            qemu.display()
        );
    };
    if version < MIN_QEMU {
        bail!(
            "{} is QEMU {}.{}; {major}.{minor} or newer is needed (Debian 12, Ubuntu 23.04 and newer have it)",
            qemu.display(),
            version.0,
            version.1,
        );
    }
    Ok(())
}

/// The version in "QEMU emulator version 7.2.22 (Debian …)".
fn version(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.lines().next()?.split_once("version ")?;
    let mut parts = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A machine in a folder, with programs that are shell scripts.
    struct Fake {
        folder: tempfile::TempDir,
    }

    impl Fake {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            for name in ["bin", "firmware", "lists"] {
                fs::create_dir(folder.path().join(name)).unwrap();
            }
            Self { folder }
        }

        fn file(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        /// Adds a program; its script finds the machine's folder in $M and shell tools in PATH.
        fn program(&self, name: &str, script: &str) -> &Self {
            let m = self.folder.path().display();
            let path = self.file(&format!("bin/{name}"));
            // Written by a child: a file that this process writes may be "busy" when run, if another
            // test's fork holds it open for a moment.
            let status = Command::new("/bin/sh")
                .args([
                    "-c",
                    "printf '%s' \"$1\" > \"$2\" && chmod 755 \"$2\"",
                    "sh",
                ])
                .arg(format!("#!/bin/sh\nM={m}\nPATH=/usr/bin:/bin\n{script}\n"))
                .arg(&path)
                .status()
                .unwrap();
            assert!(status.success());
            self
        }

        fn qemu(&self, version: &str) -> &Self {
            let script = format!(
                "case $1 in --version) echo 'QEMU emulator version {version} (Debian x)';; \
                 -L) echo $M/own;; esac"
            );
            self.program("qemu-system-x86_64", &script)
        }

        fn machine(&self, root: bool) -> Machine {
            Machine {
                path: self.file("bin").into(),
                root,
                firmware: vec![self.file("firmware")],
                lists: self.file("lists"),
            }
        }
    }

    const ALL: [Need; 2] = [Need::Linker, Need::Qemu];

    #[test]
    fn what_is_missing_depends_on_what_is_needed() {
        let fake = Fake::new();
        let machine = fake.machine(false);
        assert_eq!(
            machine.missing(&ALL).unwrap(),
            [Missing::Linker, Missing::Qemu]
        );
        assert_eq!(machine.missing(&[Need::Linker]).unwrap(), [Missing::Linker]);
        fake.program("cc", "");
        assert_eq!(machine.missing(&ALL).unwrap(), [Missing::Qemu]);
        assert_eq!(machine.missing(&[Need::Linker]).unwrap(), []);
        fake.qemu("7.2.22");
        assert_eq!(machine.missing(&ALL).unwrap(), [Missing::Firmware]);
        fs::write(fake.file("firmware/qboot.rom"), "").unwrap();
        assert_eq!(machine.missing(&ALL).unwrap(), []);
    }

    #[test]
    fn networks_are_for_root() {
        let fake = Fake::new();
        let needs = [Need::Networks];
        assert_eq!(fake.machine(false).missing(&needs).unwrap(), []);
        assert_eq!(fake.machine(true).missing(&needs).unwrap(), [Missing::Ip]);
        assert_eq!(packages(&[Missing::Ip]), ["iproute2"]);
        fake.program("ip", "");
        assert_eq!(fake.machine(true).missing(&needs).unwrap(), []);
    }

    #[test]
    fn redis_is_its_server_and_its_instrument() {
        let fake = Fake::new();
        let missing = |fake: &Fake| fake.machine(false).missing(&[Need::Redis]).unwrap();
        assert_eq!(missing(&fake), [Missing::Redis]);
        assert_eq!(packages(&missing(&fake)), ["redis-server"]);
        fake.program("redis-server", "");
        assert_eq!(missing(&fake), [Missing::Redis]);
        fake.program("redis-benchmark", "");
        assert_eq!(missing(&fake), []);
    }

    #[test]
    fn firmware_is_also_found_where_qemu_itself_looks() {
        let fake = Fake::new();
        fake.qemu("10.0.0");
        fs::create_dir(fake.file("own")).unwrap();
        fs::write(fake.file("own/qboot.rom"), "").unwrap();
        assert_eq!(fake.machine(false).missing(&[Need::Qemu]).unwrap(), []);
    }

    #[test]
    fn a_file_that_is_no_program_does_not_count() {
        let fake = Fake::new();
        fs::write(fake.file("bin/cc"), "").unwrap();
        fs::create_dir(fake.file("bin/qemu-system-x86_64")).unwrap();
        assert_eq!(
            fake.machine(true).missing(&ALL).unwrap(),
            [Missing::Linker, Missing::Qemu]
        );
    }

    #[test]
    fn a_qemu_that_is_too_old_or_no_qemu_is_refused() {
        for (text, expected) in [
            ("7.1.9", "is QEMU 7.1; 7.2 or newer"),
            ("6.2.0", "is QEMU 6.2"),
        ] {
            let fake = Fake::new();
            let error = fake
                .qemu(text)
                .machine(true)
                .missing(&ALL)
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{error}");
        }
        let fake = Fake::new();
        fake.program("qemu-system-x86_64", "echo hello");
        let error = fake.machine(true).missing(&ALL).unwrap_err().to_string();
        assert!(error.contains("names no version"), "{error}");
        for text in ["7.2.0", "7.10.1", "8.0.0", "11.1.0-rc2"] {
            let fake = Fake::new();
            assert!(
                fake.qemu(text).machine(true).missing(&ALL).is_ok(),
                "{text}"
            );
        }
    }

    #[test]
    fn one_line_installs_everything() {
        let fake = Fake::new();
        let machine = fake.machine(false);
        let all = packages(&[Missing::Linker, Missing::Qemu, Missing::Firmware]);
        assert_eq!(
            all,
            ["gcc", "libc6-dev", "qemu-system-x86", "qemu-system-data"]
        );
        assert_eq!(
            machine.apt_line(&["qemu-system-x86"]),
            "sudo apt-get update && sudo apt-get install --no-install-recommends qemu-system-x86"
        );
        fs::write(
            fake.file("lists/deb.debian.org_dists_x_binary-amd64_Packages.lz4"),
            "",
        )
        .unwrap();
        assert_eq!(
            machine.apt_line(&["qemu-system-x86"]),
            "sudo apt-get install --no-install-recommends qemu-system-x86"
        );
    }

    /// An apt-get that writes down its calls, and installs only after an update.
    const APT: &str = "echo \"$@\" >> $M/calls\n\
        case $1 in update) touch $M/updated;; \
        install) [ -e $M/updated ] || exit 100; printf '#!/bin/sh' > $M/bin/cc; chmod 755 $M/bin/cc;; esac";

    #[test]
    fn lists_that_are_missing_or_old_are_updated() {
        for has_lists in [false, true] {
            let fake = Fake::new();
            if has_lists {
                fs::write(fake.file("lists/x_Packages"), "").unwrap();
            }
            let machine = fake.program("apt-get", APT).machine(true);
            machine.install(&["gcc"]).unwrap();
            assert_eq!(machine.missing(&[Need::Linker]).unwrap(), []);
            let install = "install -q -y --no-install-recommends gcc\n";
            let first = if has_lists { install } else { "" };
            let calls = fs::read_to_string(fake.file("calls")).unwrap();
            assert_eq!(calls, format!("{first}update -q\n{install}"));
        }
    }

    #[test]
    fn an_apt_that_fails_is_an_error() {
        let fake = Fake::new();
        let machine = fake.program("apt-get", "exit 100").machine(true);
        let error = machine.install(&["gcc"]).unwrap_err().to_string();
        assert!(error.contains("apt-get update failed"), "{error}");
        fake.program("apt-get", "[ $1 = update ]");
        let error = machine.install(&["gcc"]).unwrap_err().to_string();
        assert!(error.contains("could not install gcc"), "{error}");
    }
}
