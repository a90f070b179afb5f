//! A device with what runs on it: a guest with the tools' image, native processes, and who runs on which CPU.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hyv_abi::window::UserState;
use hyv_host::accel::{self, Accel, AccelKind, AccelRequest, QemuBinary};
use hyv_host::instance::{Guest, Instance};
use hyv_host::sys::cpu;
use hyv_host::sys::process::spawn_bound;
use hyv_host::sys::runtime_dir::RuntimeRoot;
use hyv_host::vmm::GuestConfig;

/// Which CPU does what: the engine (and whoever drives it inline) on one, the side under measurement on another.
#[derive(Clone, Debug)]
pub struct Roles {
    /// The engine, and the partner that drives it inline.
    pub engine: Vec<usize>,
    /// The side under measurement.
    pub measured: Vec<usize>,
    /// A third one, if there is.
    pub third: Option<Vec<usize>>,
}

impl Roles {
    /// From a list on the command line, or from what this process may use.
    ///
    /// # Errors
    /// A list that makes no sense.
    pub fn new(pin: Option<&str>) -> Result<Self> {
        let allowed = cpu::allowed().context("cannot read the CPU affinity")?;
        let cpus = match pin {
            Some(list) => {
                cpu::parse_list(list, &allowed).with_context(|| format!("--pin {list}"))?
            }
            None => allowed,
        };
        Ok(match *cpus {
            [a, b, ref rest @ ..] => Self {
                engine: vec![a],
                measured: vec![b],
                third: rest.first().map(|&c| vec![c]),
            },
            _ => Self {
                engine: cpus.clone(),
                measured: cpus,
                third: None,
            },
        })
    }
}

/// The tools' image: `--image`, or where the build puts it.
///
/// # Errors
/// When there is none.
pub fn image(given: Option<&PathBuf>) -> Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path.clone());
    }
    // target/release/hyv-tools -> target/image/hyv-tools.elf
    let exe = std::env::current_exe().context("cannot find this program's own path")?;
    exe.parent()
        .and_then(|p| p.parent())
        .map(|p| p.join("image/hyv-tools.elf"))
        .filter(|p| p.is_file())
        .context("no image: build it with ./run.sh build, or name one with --image PATH")
}

/// What runs guests here.
///
/// # Errors
/// When nothing does.
pub fn accelerator(request: AccelRequest) -> Result<(QemuBinary, Accel)> {
    let root = RuntimeRoot::open()?;
    Ok(accel::probe(request, Some(root.path()))?)
}

/// Boots a guest of the tools' image on `instance` and waits until it serves.
///
/// # Errors
/// When it does not come up; its own story is in the message.
pub fn boot(
    instance: &Instance,
    config: &GuestConfig,
    (qemu, accel): (&QemuBinary, &Accel),
    roles: &Roles,
) -> Result<Guest> {
    let guest = instance.launch(config, qemu, accel)?;
    let limit = Duration::from_secs(if accel.kind == AccelKind::Kvm { 15 } else { 30 });
    if let Err(e) = guest.qemu().wait_state(UserState::Ready, limit) {
        // A guest that is just ending gets the time to say so.
        let _ = guest.qemu().wait_timeout(Duration::from_millis(500));
        if guest.qemu().exit_report().is_some() {
            bail!("{}", guest.wait());
        }
        return Err(e).context("the guest did not come up");
    }
    if let Err(e) = guest.qemu().pin_vcpus(&roles.measured) {
        tracing::warn!("the guest runs on any CPU: {e}");
    }
    if let Err(e) = guest.qemu().pin_others(&roles.engine) {
        tracing::debug!("QEMU's other threads run anywhere: {e}");
    }
    Ok(guest)
}

/// A Linux process of this program; killed when dropped.
#[derive(Debug)]
pub struct Native {
    child: Child,
}

impl Native {
    /// Starts the measured side of `perf` on the instance of a folder.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn agent(dir: &Path, port: u16, name: &str, roles: &Roles) -> Result<Self> {
        let pin: Vec<String> = roles.measured.iter().map(ToString::to_string).collect();
        Self::start(&[
            "perf-agent".into(),
            "--dir".into(),
            dir.display().to_string(),
            "--port".into(),
            port.to_string(),
            "--name".into(),
            name.into(),
            "--pin".into(),
            pin.join(","),
        ])
    }

    /// Starts this program with other arguments.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(args: &[String]) -> Result<Self> {
        let exe = std::env::current_exe().context("cannot find this program's own path")?;
        let mut command = Command::new(exe);
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = spawn_bound(command, &[]).context("cannot start a native process")?;
        Ok(Self { child })
    }

    /// Tries `connect` until it works, the process ends, or `limit` has passed.
    ///
    /// # Errors
    /// The last error of `connect`, or that the process ended.
    pub fn wait_for<T, E: Into<anyhow::Error>>(
        &mut self,
        limit: Duration,
        connect: impl FnMut() -> Result<T, E>,
    ) -> Result<T> {
        wait_for(limit, connect, || match self.child.try_wait()? {
            Some(status) => bail!("the native process ended: {status}"),
            None => Ok(()),
        })
    }
}

/// Tries `connect` until it works, `alive` says otherwise, or `limit` has passed.
///
/// # Errors
/// The last error of `connect`, or what `alive` says.
pub fn wait_for<T, E: Into<anyhow::Error>>(
    limit: Duration,
    mut connect: impl FnMut() -> Result<T, E>,
    mut alive: impl FnMut() -> Result<()>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        match connect() {
            Ok(it) => return Ok(it),
            Err(e) if start.elapsed() > limit => {
                return Err(e.into()).context("the native side does not serve");
            }
            Err(_) => {}
        }
        alive()?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
