//! One running hyv-host: a device, its users' control, and the guests it starts.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyv_rnic::thread::{EngineThread, Kicks};
use hyv_rnic::{Counters, Engine, EngineCell, EngineConfig};

use crate::accel::{Accel, QemuBinary};
use crate::backend::soft::SoftRnic;
use crate::backend::{Backend, BackendConfig, BackendError, BackendWire, CmWire, Quotas};
use crate::sys::event::EventFd;
use crate::sys::runtime_dir::{RuntimeDir, RuntimeDirError, RuntimeRoot};
use crate::sys::{clock, cpu};
use crate::vmm::{ExitReport, GuestConfig, LaunchError, Qemu};
use crate::wire::{WireConfig, WireError};

/// What makes a GUID for the connection manager of an address.
const NODE_GUID: u64 = 0x0268_79ff_fe76_0001;

/// GUID and GID of a device: one of its own. Without an address on any network the GID is `fe80::` and the GUID: peers are users of the same
/// device, and who is given the GID of another device finds no way there, rather than the queue pair of the same number here. The GUID's first
/// byte says that it is administered locally.
fn identity(seed: u64) -> (u64, [u8; 16]) {
    let guid = 0x02 << 56 | seed >> 8;
    let gid = 0xfe80_u128 << 112 | u128::from(guid);
    (guid, gid.to_be_bytes())
}

/// Why an instance, or a guest of it, did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstanceError {
    /// No runtime folder.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// No way to other hosts.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// No control backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// No engine.
    #[error("cannot start the engine: {0} (see `ulimit -n` and `ulimit -u`)")]
    Engine(std::io::Error),
    /// No guest.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// A number that nobody else knows.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library keys it from the system's source of randomness.
    std::hash::RandomState::new().build_hasher().finish()
}

/// How to set up an instance.
#[derive(Clone, Debug)]
pub struct InstanceConfig {
    /// Its name, which must be free; without one the first free of `prefix`, `prefix-2` and so on.
    pub name: Option<String>,
    /// See `name`.
    pub prefix: String,
    /// CPUs of the engine's thread; empty: any.
    pub engine_cpus: Vec<usize>,
    /// How long the engine's thread polls without finding work before it sleeps.
    pub spin: Duration,
    /// What users may have.
    pub quotas: Quotas,
    /// The way to other hosts; by default none.
    pub wire: WireConfig,
}

/// A running device with its users.
pub struct Instance {
    // Fields drop in order: guests are gone before this; then control, the engine, and last the folder.
    backend: Arc<Backend>,
    _engine: EngineThread,
    cell: Arc<EngineCell>,
    dir: RuntimeDir,
}

impl Instance {
    /// Claims a runtime folder and starts the device.
    ///
    /// # Errors
    /// One variant for each thing that was needed.
    pub fn start(config: InstanceConfig) -> Result<Self, InstanceError> {
        let root = RuntimeRoot::open()?;
        let dir = match &config.name {
            Some(name) => root.claim(name)?,
            None => root.claim_free(&config.prefix)?,
        };
        let kicks = Kicks::new().map_err(InstanceError::Engine)?;
        let mad_bell = Arc::new(EventFd::new().map_err(BackendError::Descriptor)?);
        let (mut carrier, mut routes, mut identity) = (None, None, None);
        if let Some(opened) = config.wire.open()? {
            for fd in opened.wait_fds {
                kicks.watch(fd).map_err(InstanceError::Engine)?;
            }
            let gid = opened.carrier.local();
            identity = Some(CmWire {
                // Unique as the address is: peers tell hosts apart by it.
                ca_guid: u64::from_be_bytes(gid[8..].try_into().unwrap_or_default()) ^ NODE_GUID,
                path_mtu: 256,
                traffic_class: config.wire.traffic_class(),
                seed: fresh_seed(),
            });
            (carrier, routes) = (Some(opened.carrier), Some(opened.routes));
        }
        let (node_guid, gid) = self::identity(fresh_seed());
        let cell = EngineCell::new(Engine::new(EngineConfig {
            clock: clock::quick_ns(),
            gid,
            node_guid,
            carrier,
            mad_bell: Box::new({
                let bell = Arc::clone(&mad_bell);
                // Fails only for a descriptor that is no eventfd.
                move || drop(bell.signal())
            }),
        }));
        let cpus = config.engine_cpus;
        let setup = move || {
            if !cpus.is_empty()
                && let Err(e) = cpu::pin_current(&cpus)
            {
                tracing::warn!("the engine runs on any CPU: {e}");
            }
        };
        let engine = EngineThread::spawn(Arc::clone(&cell), Arc::clone(&kicks), config.spin, setup)
            .map_err(InstanceError::Engine)?;
        let provider = Arc::new(SoftRnic::new(Arc::clone(&cell), kicks).with_routes(routes));
        let backend = Backend::spawn(
            BackendConfig {
                runtime_dir: Some(dir.path().to_owned()),
                quotas: config.quotas,
                wire: identity.map(|identity| BackendWire { mad_bell, identity }),
            },
            provider,
        )?;
        Ok(Self {
            backend: Arc::new(backend),
            _engine: engine,
            cell,
            dir,
        })
    }

    /// Its name and folder.
    #[must_use]
    pub fn dir(&self) -> &RuntimeDir {
        &self.dir
    }

    /// The engine, to drive it inline or to ask it.
    #[must_use]
    pub fn engine(&self) -> &Arc<EngineCell> {
        &self.cell
    }

    /// The control backend.
    #[must_use]
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// What the engine did so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.cell.control(|e| e.counters())
    }

    /// Starts a guest as a user of the device. When it ends, however it ends, what it owned is released and its peers'
    /// queue pairs go to the error state.
    ///
    /// The calling thread must live as long as the guest: QEMU dies with it.
    ///
    /// # Errors
    /// As [`Qemu::launch`] and [`Backend::add_guest`].
    pub fn launch(
        &self,
        config: &GuestConfig,
        binary: &QemuBinary,
        accel: &Accel,
    ) -> Result<Guest, InstanceError> {
        let qemu = Arc::new(Qemu::launch(config, binary, accel)?);
        let bells = qemu.doorbells();
        let clone =
            |fd: &crate::sys::event::EventFd| fd.try_clone().map_err(BackendError::Descriptor);
        let memory = crate::backend::UserMemory {
            window: Arc::clone(qemu.window()),
            ram: Arc::clone(qemu.ram()),
        };
        let key = self.backend.add_guest(
            &config.name,
            memory,
            clone(&bells.kick_control)?,
            clone(&bells.kick_data)?,
            clone(&bells.wake)?,
        )?;
        let watcher = std::thread::Builder::new()
            .name("hyv-reaper".into())
            .spawn({
                let (qemu, backend) = (Arc::clone(&qemu), Arc::clone(&self.backend));
                move || {
                    let report = qemu.wait();
                    if let Err(e) = backend.remove_user(key) {
                        tracing::debug!("the guest's objects went with the backend: {e}");
                    }
                    report
                }
            })
            .map_err(InstanceError::Engine)?;
        Ok(Guest {
            qemu,
            watcher: Some(watcher),
        })
    }
}

/// A guest that is a user of the device. Dropping it ends the guest at once.
pub struct Guest {
    qemu: Arc<Qemu>,
    watcher: Option<JoinHandle<Arc<ExitReport>>>,
}

impl Guest {
    /// Its QEMU.
    #[must_use]
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// Waits for its end and until its objects are released.
    #[must_use]
    pub fn wait(mut self) -> Arc<ExitReport> {
        let report = self.qemu.wait();
        self.join();
        report
    }

    /// Asks it to end, waits until it has and its objects are released.
    #[must_use]
    pub fn shutdown(mut self) -> Arc<ExitReport> {
        let report = self.qemu.shutdown();
        self.join();
        report
    }

    fn join(&mut self) {
        if let Some(w) = self.watcher.take()
            && w.join().is_err()
        {
            tracing::error!("the guest's reaper failed; please report this");
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.watcher.is_some() {
            let _ = self.qemu.kill();
            self.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_without_an_address_has_a_gid_of_its_own() {
        let (guid, gid) = identity(fresh_seed());
        assert_eq!(gid[..8], [0xfe, 0x80, 0, 0, 0, 0, 0, 0]);
        assert_eq!(gid[8..], guid.to_be_bytes());
        assert_eq!(guid >> 56, 2);
        assert_ne!((guid, gid), identity(fresh_seed()));
    }
}
