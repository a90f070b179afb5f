//! Finding a running instance, and connecting to the store in it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyv_host::sys::runtime_dir::RuntimeRoot;
use hyv_verbs::{Context, Gid, Process};
use kvstore::client::Client;

/// RAM of a client: rings and buffers take some 300 KiB, staging for large values 4.4 MiB.
const CLIENT_RAM: u64 = 16 << 20;

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

/// Opens the device of the instance at `dir` and connects to the store on `port`.
///
/// # Errors
/// When nobody serves there.
pub fn connect(dir: &Path, port: u16, timeout: Duration, name: &str) -> Result<Client> {
    let process = Process::connect(dir, CLIENT_RAM, name)?;
    let context = Context::open(process).context("cannot open the device")?;
    Ok(Client::connect(&context, Gid::LOCAL, port, timeout)?)
}
