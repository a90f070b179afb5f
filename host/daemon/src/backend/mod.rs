//! The control backend: who the users are, what they may do, and the thread that answers their control verbs.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`provider`] | what executes verbs, as a trait |
//! | [`soft`] | the software RNIC as a provider |
//! | `memory` | a user's window and RAM |
//! | `control` | the control virtqueue, device side |
//! | `dispatch` | from a request's bytes to its verb |
//! | `rate` | requests per second |
//! | `users` | the users and what is to be done for all of them |
//! | [`checks`] | what holds whatever a user writes, for fuzzing |
//! | `service` | the thread: kicks, sessions, timers, the beat |
//! | [`limits`] | every limit, with its reason |
//!
//! Nothing here is on the data path. A user is a guest (added by the launcher) or a process (added by
//! [`crate::session`]); from here on they are the same.

mod control;
mod dispatch;
mod memory;
mod rate;
mod service;
mod users;

pub mod checks;
pub mod limits;
pub mod provider;
pub mod soft;

#[cfg(test)]
mod soft_tests;
#[cfg(test)]
mod soft_verbs_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use hyv_abi::types::VerbError;

pub use crate::cm::{CmWire, UserKey};
use crate::session::Parts;
use crate::sys::event::EventFd;
use crate::sys::memory::MemoryError;
use crate::sys::socket::SocketError;
pub use limits::Quotas;
pub use memory::UserMemory;
pub use provider::{Provider, UserId, Wake};

/// What can go wrong in the backend itself; what goes wrong in a user's request is that user's [`VerbError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The provider has no room for another user, or a quota is used up.
    #[error("cannot add {name}: {source}")]
    Refused {
        /// The user's name.
        name: String,
        /// Why.
        source: VerbError,
    },
    /// A descriptor could not be made or watched.
    #[error("cannot watch a descriptor: {0} (see `ulimit -n`)")]
    Descriptor(#[from] io::Error),
    /// Memory could not be shared.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// RAM that the control queue's implementation does not take.
    #[error("the RAM of {name} cannot be used: {reason}")]
    Ram {
        /// The user's name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The sessions' socket.
    #[error("cannot offer sessions: {0}")]
    Session(#[from] SocketError),
    /// The thread could not be started.
    #[error("cannot start the control thread: {0} (see `ulimit -u`)")]
    Thread(io::Error),
    /// The control thread has ended.
    #[error("the control backend has stopped")]
    Stopped,
}

/// How the backend is set up.
#[derive(Clone, Debug, Default)]
pub struct BackendConfig {
    /// The instance's private folder, in which processes find the socket. None: no sessions from outside.
    pub runtime_dir: Option<PathBuf>,
    /// What users may take.
    pub quotas: Quotas,
    /// Connection management with other hosts; none: all peers are on this one.
    pub wire: Option<BackendWire>,
}

/// How connection management reaches other hosts.
#[derive(Clone, Debug)]
pub struct BackendWire {
    /// Raised when MADs have arrived ([`Provider::take_mads`]).
    pub mad_bell: Arc<EventFd>,
    /// What other hosts are told of this one.
    pub identity: CmWire,
}

/// What kind of user it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UserKind {
    /// A virtual machine.
    Guest,
    /// A process that came over the sessions' socket.
    Process,
    /// A part of this process.
    Internal,
}

impl std::fmt::Display for UserKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Guest => "guest",
            Self::Process => "process",
            Self::Internal => "internal user",
        })
    }
}

/// A user to be added whose window is set up: its header is filled, and this is where its kicks arrive.
#[derive(Debug)]
pub struct UserSpec {
    /// For logs.
    pub name: String,
    /// What it is.
    pub kind: UserKind,
    /// Window and RAM.
    pub memory: UserMemory,
    /// Raised by the user: the control queue has a request, or a timer was set.
    pub kick_control: EventFd,
    /// Raised by the user: a work queue has entries, and the engine sleeps.
    pub kick_data: EventFd,
    /// Raised for the user.
    pub wake: EventFd,
}

/// What is known of a user, for logs and status lines.
#[derive(Clone, Debug)]
pub struct UserInfo {
    /// Its key.
    pub key: UserKey,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: UserKind,
    /// Bytes of RAM.
    pub ram_len: u64,
    /// Its window and RAM; stays mapped as long as the clone lives.
    pub memory: UserMemory,
}

/// Counts since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackendStats {
    /// Users now.
    pub users: usize,
    /// Control requests answered, errors included.
    pub requests: u64,
    /// Sessions that were given.
    pub sessions: u64,
    /// Sessions that were refused.
    pub refused_sessions: u64,
    /// Control queues found broken.
    pub broken_queues: u64,
}

/// What the handle and the thread share.
#[derive(Debug, Default)]
struct Shared {
    users: Mutex<BTreeMap<UserKey, UserInfo>>,
    requests: AtomicU64,
    sessions: AtomicU64,
    refused_sessions: AtomicU64,
    broken_queues: AtomicU64,
}

enum Command {
    Add(Box<UserSpec>, Sender<Result<UserKey, BackendError>>),
    Remove(UserKey, Sender<bool>),
    Stop,
}

/// The control backend. Dropping it stops it: every user is removed and told.
#[derive(Debug)]
pub struct Backend {
    commands: Sender<Command>,
    bell: EventFd,
    shared: Arc<Shared>,
    quotas: Quotas,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// Starts the control thread.
    ///
    /// # Errors
    /// `Session` when the socket cannot be made; `Descriptor`, `Thread` when the system has no room.
    pub fn spawn(config: BackendConfig, provider: Arc<dyn Provider>) -> Result<Self, BackendError> {
        let (commands, inbox): (_, Receiver<Command>) = channel();
        let bell = EventFd::new()?;
        let shared = Arc::new(Shared::default());
        let quotas = config.quotas;
        let service =
            service::Service::new(config, provider, inbox, bell.try_clone()?, shared.clone())?;
        let thread = std::thread::Builder::new()
            .name("hyv-control".into())
            .spawn(move || service.run())
            .map_err(BackendError::Thread)?;
        Ok(Self {
            commands,
            bell,
            shared,
            quotas,
            thread: Some(thread),
        })
    }

    fn ask<T>(&self, command: Command, answer: &Receiver<T>) -> Result<T, BackendError> {
        self.commands
            .send(command)
            .map_err(|_| BackendError::Stopped)?;
        self.bell.signal()?;
        answer.recv().map_err(|_| BackendError::Stopped)
    }

    /// Adds a user whose window and descriptors exist.
    ///
    /// # Errors
    /// `Refused` by a quota; `Descriptor`; `Stopped`.
    pub fn add_user(&self, spec: UserSpec) -> Result<UserKey, BackendError> {
        let (reply, answer) = channel();
        self.ask(Command::Add(Box::new(spec), reply), &answer)?
    }

    /// Adds a guest.
    ///
    /// # Errors
    /// As [`Backend::add_user`].
    pub fn add_guest(
        &self,
        name: &str,
        memory: UserMemory,
        kick_control: EventFd,
        kick_data: EventFd,
        wake: EventFd,
    ) -> Result<UserKey, BackendError> {
        let name = name.to_owned();
        self.add_user(UserSpec {
            name,
            kind: UserKind::Guest,
            memory,
            kick_control,
            kick_data,
            wake,
        })
    }

    /// Adds a user inside this process with a window and RAM of its own: what a session is for another process.
    ///
    /// # Errors
    /// `Memory`; as [`Backend::add_user`].
    pub fn add_internal(&self, name: &str, ram_len: u64) -> Result<(UserKey, Parts), BackendError> {
        let parts = Parts::create(crate::session::round_ram(ram_len, &self.quotas).map_err(
            |source| BackendError::Refused {
                name: name.to_owned(),
                source,
            },
        )?)?;
        let key = self.add_user(parts.spec(name.to_owned(), UserKind::Internal)?)?;
        Ok((key, parts))
    }

    /// Removes a user: all it owned is released, its peers' connections end. False if it is gone already.
    /// Its memory is not touched any more once this returns.
    ///
    /// # Errors
    /// `Stopped`.
    pub fn remove_user(&self, key: UserKey) -> Result<bool, BackendError> {
        let (reply, answer) = channel();
        self.ask(Command::Remove(key, reply), &answer)
    }

    /// Window and RAM of the first user of that name; for who measures a server from outside.
    #[must_use]
    pub fn user_memory(&self, name: &str) -> Option<UserMemory> {
        self.users()
            .into_iter()
            .find(|u| u.name == name)
            .map(|u| u.memory)
    }

    /// The users there are, the oldest first.
    #[must_use]
    pub fn users(&self) -> Vec<UserInfo> {
        self.shared
            .users
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// Counts.
    #[must_use]
    pub fn stats(&self) -> BackendStats {
        BackendStats {
            users: self
                .shared
                .users
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .len(),
            requests: self.shared.requests.load(Ordering::Relaxed),
            sessions: self.shared.sessions.load(Ordering::Relaxed),
            refused_sessions: self.shared.refused_sessions.load(Ordering::Relaxed),
            broken_queues: self.shared.broken_queues.load(Ordering::Relaxed),
        }
    }

    /// Whether the control thread runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Stops the control thread after removing every user, and waits for it. Once more does nothing.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let _ = self.commands.send(Command::Stop);
        let _ = self.bell.signal();
        if thread.join().is_err() {
            tracing::error!("the control thread panicked; every user has lost its device");
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop();
    }
}
