//! Finding a running instance, and the devices that clients of the store use.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyv_host::backend::Quotas;
use hyv_host::instance::{Instance, InstanceConfig};
use hyv_host::sys::runtime_dir::RuntimeRoot;
use hyv_host::wire::{ListenAddr, WireConfig};
use hyv_verbs::{Context, Process};
use kvstore::client::Client;

/// RAM of a client: rings and buffers take some 300 KiB, staging for large values 4.4 MiB.
pub const CLIENT_RAM: u64 = 16 << 20;
/// How long the engine of a device of one's own polls without work before it sleeps.
const SPIN: Duration = Duration::from_micros(200);

/// The folder of the instance that `name` names, or of the only one that runs.
///
/// # Errors
/// When there is none, or several and no name.
pub fn find(name: Option<&str>) -> Result<PathBuf> {
    let root = RuntimeRoot::open()?;
    let running = root.instances()?;
    let names = || {
        running
            .iter()
            .map(|i| i.name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    match (name, running.as_slice()) {
        (Some(name), _) => match running.iter().find(|i| i.name == name) {
            Some(i) => Ok(i.path.clone()),
            None if running.is_empty() => {
                bail!("no instance is running: start one with ./run.sh kvstore")
            }
            None => bail!(
                "no instance named `{name}` is running; running: {}",
                names()
            ),
        },
        (None, []) => bail!("no instance is running: start one with ./run.sh kvstore"),
        (None, [only]) => Ok(only.path.clone()),
        (None, _) => bail!(
            "several instances are running ({}): say which with --instance NAME",
            names()
        ),
    }
}

/// Whether any instance runs.
///
/// # Errors
/// When the folder of instances cannot be read.
pub fn any_runs() -> Result<bool> {
    Ok(!RuntimeRoot::open()?.instances()?.is_empty())
}

/// A device that this process uses: of an instance that runs, or its own.
pub struct Device {
    /// Its verbs.
    pub context: Context,
    /// Whose it is, for people.
    pub whose: String,
    // After what uses it.
    _own: Option<Instance>,
}

impl Device {
    /// That of the instance at `dir`, with so many bytes of memory.
    ///
    /// # Errors
    /// When the instance lets nobody in.
    pub fn of(dir: &Path, ram: u64) -> Result<Self> {
        Ok(Self {
            context: open(dir, ram)?,
            whose: format!("the instance in {}", dir.display()),
            _own: None,
        })
    }

    /// One of its own, with an address of this machine.
    ///
    /// # Errors
    /// When the address is none of this machine's, or taken by another device.
    pub fn own(address: &ListenAddr, ram: u64) -> Result<Self> {
        let own = Instance::start(InstanceConfig {
            name: None,
            prefix: "kv".into(),
            engine_cpus: Vec::new(),
            spin: SPIN,
            quotas: Quotas::default(),
            wire: WireConfig {
                listen: Some(address.clone()),
                ..WireConfig::default()
            },
        })?;
        Ok(Self {
            context: open(own.dir().path(), ram)?,
            whose: format!("a device on {}", address.ip),
            _own: Some(own),
        })
    }
}

fn open(dir: &Path, ram: u64) -> Result<Context> {
    Context::open(Process::connect(dir, ram, "kv")?).context("cannot open the device")
}

/// A client, and the device that it needs. It ends in order: a script that runs a hundred commands a second would leave
/// more leases behind than a server keeps.
pub struct Connected {
    /// There until the end.
    client: Option<Client>,
    // After the client.
    _device: Device,
}

impl Connected {
    /// Keeps both.
    #[must_use]
    pub const fn new(client: Client, device: Device) -> Self {
        Self {
            client: Some(client),
            _device: device,
        }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
            // If that fails the lease expires by itself.
            let _ = client.close();
        }
    }
}

impl Deref for Connected {
    type Target = Client;
    fn deref(&self) -> &Client {
        self.client.as_ref().expect("taken when dropped")
    }
}

impl DerefMut for Connected {
    fn deref_mut(&mut self) -> &mut Client {
        self.client.as_mut().expect("taken when dropped")
    }
}
