//! Sessions of native processes: a unix socket that hands out a window, RAM and eventfds, and whose end is the
//! end of the session. What the messages are is in [`hyv_abi::session`].

#[cfg(test)]
mod native_tests;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyv_abi::session::{HELLO_MAGIC, Hello, NUM_FDS, SOCKET_NAME, Welcome};
use hyv_abi::types::{Errno, Reason, VerbError};
use zerocopy::{FromBytes, IntoBytes};

use crate::backend::limits::{Quotas, RAM_STEP};
use crate::backend::{BackendError, UserKind, UserMemory, UserSpec};
use crate::sys::event::EventFd;
use crate::sys::memory::{Mapping, sealed_memfd};
use crate::sys::socket::{self, SocketError};
use crate::sys::window::SharedWindow;
use crate::sys::{clock, memory};
use crate::vmm::layout::{HeaderInfo, flat_region, next_generation, write_header};

/// The socket on which sessions are offered. Its name goes when this does.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Offers sessions in an instance's private folder. What an earlier instance left there is replaced: the folder's
    /// lock says that it is dead.
    ///
    /// # Errors
    /// `PathTooLong`, `Listen`.
    pub fn bind(dir: &Path) -> Result<Self, SocketError> {
        let path = dir.join(SOCKET_NAME);
        if std::fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_socket()) {
            // If it cannot be removed, listening says so.
            let _ = std::fs::remove_file(&path);
        }
        let fd = socket::listen(&path)?;
        Ok(Self { fd, path })
    }

    /// The next connection, if one waits.
    ///
    /// # Errors
    /// `Io`, when no descriptor is left.
    pub fn accept(&self) -> Result<Option<OwnedFd>, SocketError> {
        let Some(fd) = socket::accept(&self.fd)? else {
            return Ok(None);
        };
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Some(fd))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether a process of user `peer` may have a session with a host of user `own`.
#[must_use]
pub fn may_connect(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

/// What a process asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ask {
    /// RAM it gets, bytes.
    pub ram_len: u64,
    /// What it calls itself; printable.
    pub name: String,
}

/// RAM for a session that asks for `len` bytes: whole 2 MiB pages.
///
/// # Errors
/// `Inval`/`ZeroLength` for none, `NoMem`/`QuotaMemory` for more than a session may have.
pub fn round_ram(len: u64, quotas: &Quotas) -> Result<u64, VerbError> {
    if len == 0 {
        return Err(VerbError::new(Errno::Inval, Reason::ZeroLength));
    }
    len.checked_next_multiple_of(RAM_STEP)
        .filter(|len| *len <= quotas.session_ram)
        .ok_or(VerbError::new(Errno::NoMem, Reason::QuotaMemory))
}

/// Reads a hello.
///
/// # Errors
/// `ProtoNoSupport`/`BadVersion` from another version (whatever else its message holds), `Inval` for what is no hello,
/// and as [`round_ram`].
pub fn judge(message: &[u8], quotas: &Quotas) -> Result<Ask, VerbError> {
    let not_hello = VerbError::new(Errno::Inval, Reason::BadLength);
    let words = <[u32; 2]>::read_from_prefix(message)
        .map_err(|_| not_hello)?
        .0;
    if words[0] != HELLO_MAGIC {
        return Err(VerbError::new(Errno::Inval, Reason::None));
    }
    if words[1] != hyv_abi::ABI_VERSION {
        return Err(VerbError::new(Errno::ProtoNoSupport, Reason::BadVersion));
    }
    let hello = Hello::read_from_bytes(message).map_err(|_| not_hello)?;
    let ram_len = round_ram(hello.ram_len, quotas)?;
    let name = hello.name.split(|b| *b == 0).next().unwrap_or_default();
    let name: String = String::from_utf8_lossy(name)
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect();
    let name = if name.is_empty() {
        "process".into()
    } else {
        name
    };
    Ok(Ask { ram_len, name })
}

fn send(
    socket: impl AsFd,
    answer: Result<u64, VerbError>,
    fds: &[BorrowedFd<'_>],
) -> Result<(), SocketError> {
    let (status, reason, ram_len) = match answer {
        Ok(len) => (0, 0, len),
        Err(e) => (e.errno as u32, e.reason as u32, 0),
    };
    let welcome = Welcome {
        magic: HELLO_MAGIC,
        version: hyv_abi::ABI_VERSION,
        status,
        reason,
        ram_len,
    };
    socket::send_with_fds(socket, welcome.as_bytes(), fds)
}

/// Tells a process why it gets no session. A process that has gone already does not matter.
pub fn refuse(socket: &OwnedFd, error: VerbError) {
    let _ = send(socket, Err(error), &[]);
}

/// What a session is made of: a window with its header filled, RAM, and eventfds.
#[derive(Debug)]
pub struct Parts {
    /// Window and RAM, mapped.
    pub memory: UserMemory,
    /// The RAM's file.
    pub ram_fd: OwnedFd,
    /// Raised by the user for its control queue.
    pub kick_control: EventFd,
    /// Raised by the user for its work queues.
    pub kick_data: EventFd,
    /// Raised for the user.
    pub wake: EventFd,
}

impl Parts {
    /// Makes them, with `ram_len` bytes of zeroed RAM.
    ///
    /// # Errors
    /// `Memory` when there is not enough, `Descriptor` when none is left.
    pub fn create(ram_len: u64) -> Result<Self, BackendError> {
        memory::check_available(ram_len)?;
        let window = SharedWindow::create()?;
        let ram_fd = sealed_memfd("hyv-ram", ram_len)?;
        let ram = Mapping::new(&ram_fd, ram_len)?;
        // The engine has one CPU; what is left is there to be spun on.
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let info = HeaderInfo {
            generation: next_generation(),
            regions: &flat_region(ram_len),
            tsc_hz: clock::steady_tsc_hz(),
            spin_hint: cpus.saturating_sub(2) as u32,
        };
        write_header(&window, &info);
        Ok(Self {
            memory: UserMemory {
                window: Arc::new(window),
                ram: Arc::new(ram),
            },
            ram_fd,
            kick_control: EventFd::new()?,
            kick_data: EventFd::new()?,
            wake: EventFd::new()?,
        })
    }

    /// The backend's part of them.
    ///
    /// # Errors
    /// `Descriptor` when none is left.
    pub fn spec(&self, name: String, kind: UserKind) -> Result<UserSpec, BackendError> {
        Ok(UserSpec {
            name,
            kind,
            memory: self.memory.clone(),
            kick_control: self.kick_control.try_clone()?,
            kick_data: self.kick_data.try_clone()?,
            wake: self.wake.try_clone()?,
        })
    }

    /// Hands them to the process at the other end.
    ///
    /// # Errors
    /// `Io` when it has gone.
    pub fn welcome(&self, socket: impl AsFd) -> Result<(), SocketError> {
        let fds: [BorrowedFd<'_>; NUM_FDS] = [
            self.memory.window.as_fd(),
            self.ram_fd.as_fd(),
            self.kick_control.as_fd(),
            self.kick_data.as_fd(),
            self.wake.as_fd(),
        ];
        send(socket, Ok(self.memory.ram.len() as u64), &fds)
    }
}

/// Ends a session when it is dropped: the process sees its socket close.
#[derive(Debug)]
pub struct Session {
    socket: OwnedFd,
    /// Bytes of its RAM.
    pub ram_len: u64,
}

impl Session {
    /// For a connection that was welcomed.
    #[must_use]
    pub fn new(socket: OwnedFd, ram_len: u64) -> Self {
        Self { socket, ram_len }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
