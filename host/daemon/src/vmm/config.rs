//! What a guest is started with, and the command line that this makes.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::accel::{Accel, AccelKind, MACHINE, QemuBinary};
use crate::limits::{
    GUEST_MEMORY_STEP, MAX_COMMAND_LINE, MAX_GUEST_MEMORY, MIN_GUEST_MEMORY, WATCHDOG,
};
use crate::vmm::ivshmem;
use crate::vmm::net::{self, GuestIp, NetConfig, NetError};

/// PCI slot of the HyV function, which the guest tries first.
pub const HYV_SLOT: &str = "0x4";
/// Port of `isa-debug-exit`.
pub const EXIT_PORT: u16 = 0xf4;

/// A guest that cannot be started as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Too little or too much RAM.
    #[error(
        "--memory {} MiB is out of range; give {} MiB to {} GiB",
        asked >> 20, MIN_GUEST_MEMORY >> 20, MAX_GUEST_MEMORY >> 30
    )]
    Memory {
        /// Bytes asked for.
        asked: u64,
    },
    /// The image cannot be read.
    #[error("cannot read the image {path}: {source}; build it, or name another with --image")]
    Image {
        /// The image.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The image is something else.
    #[error("{path} is no ELF file; --image takes a unikernel image")]
    NotElf {
        /// The image.
        path: PathBuf,
    },
    /// Arguments that cannot be passed on.
    #[error(
        "the guest's arguments take {len} bytes or hold a zero byte; {MAX_COMMAND_LINE} bytes is the limit"
    )]
    Arguments {
        /// Their length in bytes.
        len: usize,
    },
    /// A name that cannot stand in QEMU's options.
    #[error("`{0}` is no name for a guest: use letters, digits, `-`, `_` and `.`")]
    Name(String),
    /// The network.
    #[error(transparent)]
    Net(#[from] NetError),
}

/// One guest.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Name in logs and in the process list.
    pub name: String,
    /// ELF file with a PVH note.
    pub image: PathBuf,
    /// Symbols for backtraces; without it what lies beside the image is tried ([`super::symbols::Symbols::new`]).
    pub symbols: Option<PathBuf>,
    /// The guest's command line.
    pub args: String,
    /// RAM in bytes; rounded up to 2 MiB.
    pub memory: u64,
    /// Time until the guest's `main` must run; without it the accelerator's usual limit.
    pub watchdog: Option<Duration>,
    /// See `hyv_abi::window::Header::spin_hint`.
    pub spin_hint: u32,
    /// The network card; most guests need none.
    pub net: Option<NetConfig>,
    /// The card's addresses; without them the guest asks a DHCP server.
    pub ips: Vec<GuestIp>,
}

impl GuestConfig {
    /// RAM in bytes as QEMU gets it.
    #[must_use]
    pub fn ram_bytes(&self) -> u64 {
        self.memory.saturating_add(GUEST_MEMORY_STEP - 1) / GUEST_MEMORY_STEP * GUEST_MEMORY_STEP
    }

    /// Time until the guest's `main` must run.
    #[must_use]
    pub fn watchdog(&self) -> Duration {
        self.watchdog.unwrap_or(WATCHDOG)
    }

    /// The guest's command line: what the runtime is told, then the arguments, which may say otherwise.
    #[must_use]
    pub fn command_line(&self) -> String {
        match net::guest_word(self.net.as_ref(), &self.ips) {
            Some(word) if self.args.is_empty() => word,
            Some(word) => format!("{word} {}", self.args),
            None => self.args.clone(),
        }
    }

    /// Checks everything that can be checked before anything is started.
    ///
    /// # Errors
    /// One variant for each field that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.name.is_empty()
            || !self
                .name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        {
            return Err(ConfigError::Name(self.name.clone()));
        }
        if !(MIN_GUEST_MEMORY..=MAX_GUEST_MEMORY).contains(&self.memory) {
            return Err(ConfigError::Memory { asked: self.memory });
        }
        net::check(self.net.as_ref(), &self.ips)?;
        let args = self.command_line();
        if args.len() > MAX_COMMAND_LINE || args.contains('\0') {
            return Err(ConfigError::Arguments { len: args.len() });
        }
        let mut magic = [0; 4];
        let path = || self.image.clone();
        match File::open(&self.image).and_then(|mut f| f.read_exact(&mut magic)) {
            Ok(()) if &magic == b"\x7fELF" => Ok(()),
            Ok(()) => Err(ConfigError::NotElf { path: path() }),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(ConfigError::NotElf { path: path() })
            }
            Err(source) => Err(ConfigError::Image {
                path: path(),
                source,
            }),
        }
    }
}

/// Descriptors that QEMU inherits, by number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inherited {
    pub ram: RawFd,
    pub ivshmem: RawFd,
    pub qmp: RawFd,
    pub com1: RawFd,
    /// The tap, and its MTU.
    pub tap: Option<(RawFd, u16)>,
}

/// QEMU's arguments, without its own name.
pub(crate) fn command_line(
    config: &GuestConfig,
    qemu: &QemuBinary,
    accel: &Accel,
    fds: Inherited,
    generation: u32,
) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: &dyn AsRef<std::ffi::OsStr>| {
        args.push(option.into());
        args.push(value.as_ref().into());
    };
    let ram = config.ram_bytes();
    add("-name", &format!("guest={},debug-threads=on", config.name));
    add("-display", &"none");
    add("-monitor", &"none");
    add("-machine", &format!("{MACHINE},memory-backend=ram"));
    add("-accel", &accel.kind.name());
    add("-cpu", &accel.cpu);
    // With a single possible CPU, TCG drops the atomicity of locked instructions, which the host relies on.
    let smp = if accel.kind == AccelKind::Tcg {
        "1,maxcpus=2"
    } else {
        "1"
    };
    add("-smp", &smp);
    add("-m", &format!("{}M", ram >> 20));
    let backend = format!(
        "memory-backend-file,id=ram,size={ram},mem-path=/proc/self/fd/{}",
        fds.ram
    );
    // Aligned: without it the guest's 2 MiB pages and the host's do not coincide, and neither gets any.
    add(
        "-object",
        &format!("{backend},share=on,prealloc=off,merge=off,dump=off,align=2M"),
    );
    add("-bios", &qemu.rom);
    add("-kernel", &config.image);
    let words = config.command_line();
    if !words.is_empty() {
        add("-append", &words);
    }
    add("-chardev", &format!("socket,id=hyv,fd={}", fds.ivshmem));
    let vectors = ivshmem::VECTORS;
    add(
        "-device",
        &format!("ivshmem-doorbell,chardev=hyv,vectors={vectors},bus=pcie.0,addr={HYV_SLOT}"),
    );
    add(
        "-device",
        &format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=0x04"),
    );
    add("-chardev", &format!("socket,id=com1,fd={}", fds.com1));
    add("-serial", &"chardev:com1");
    add("-chardev", &format!("socket,id=qmp,fd={}", fds.qmp));
    add("-mon", &"chardev=qmp,mode=control");
    if let Some(net) = &config.net {
        args.extend(net::options(net, &config.ips, fds.tap, generation).map(OsString::from));
    }
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GuestConfig {
        GuestConfig {
            name: "t".into(),
            image: "/proc/self/exe".into(),
            symbols: None,
            args: String::new(),
            memory: 64 << 20,
            watchdog: None,
            spin_hint: 0,
            net: None,
            ips: Vec::new(),
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        config().check().unwrap();
        let wrong = |f: &dyn Fn(&mut GuestConfig)| {
            let mut c = config();
            f(&mut c);
            c.check().unwrap_err()
        };
        assert!(matches!(
            wrong(&|c| c.memory = (64 << 20) - 1),
            ConfigError::Memory { .. }
        ));
        assert!(matches!(
            wrong(&|c| c.memory = u64::MAX),
            ConfigError::Memory { .. }
        ));
        assert!(matches!(
            wrong(&|c| c.image = "/nonexistent".into()),
            ConfigError::Image { .. }
        ));
        assert!(matches!(
            wrong(&|c| c.image = "/".into()),
            ConfigError::Image { .. }
        ));
        assert!(matches!(
            wrong(&|c| c.image = "/proc/self/status".into()),
            ConfigError::NotElf { .. }
        ));
        assert!(matches!(
            wrong(&|c| c.image = "/dev/null".into()),
            ConfigError::NotElf { .. }
        ));
        assert!(matches!(
            wrong(&|c| c.args = "x".repeat(5000)),
            ConfigError::Arguments { .. }
        ));
        assert!(matches!(
            wrong(&|c| c.args = "a\0b".into()),
            ConfigError::Arguments { .. }
        ));
        assert!(matches!(
            wrong(&|c| c.name = "a,debug-threads=off".into()),
            ConfigError::Name(_)
        ));
    }

    #[test]
    fn memory_is_rounded_up() {
        let c = GuestConfig {
            memory: (64 << 20) + 1,
            ..config()
        };
        assert_eq!(c.ram_bytes(), 66 << 20);
        assert_eq!(config().ram_bytes(), 64 << 20);
    }

    #[test]
    fn the_accelerator_decides_cpus() {
        let qemu = QemuBinary {
            path: "q".into(),
            version: (7, 2, 0),
            rom: "r".into(),
        };
        let fds = Inherited {
            ram: 5,
            ivshmem: 6,
            qmp: 7,
            com1: 8,
            tap: None,
        };
        let text = |kind| {
            let accel = Accel {
                kind,
                cpu: "c".into(),
                fallback_reason: None,
            };
            command_line(&config(), &qemu, &accel, fds, 1)
                .join(" ".as_ref())
                .into_string()
                .unwrap()
        };
        let (kvm, tcg) = (text(AccelKind::Kvm), text(AccelKind::Tcg));
        assert!(
            kvm.contains("-accel kvm") && kvm.contains("-smp 1 "),
            "{kvm}"
        );
        assert!(
            tcg.contains("-accel tcg") && tcg.contains("-smp 1,maxcpus=2"),
            "{tcg}"
        );
        assert!(
            kvm.contains("mem-path=/proc/self/fd/5") && kvm.contains("size=67108864"),
            "{kvm}"
        );
        assert!(!kvm.contains("-append") && !kvm.contains("net"), "{kvm}");
    }
}
