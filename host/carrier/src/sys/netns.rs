//! Threads in other network namespaces.
#![allow(unsafe_code, reason = "setns and sched_setaffinity")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// A network namespace without a name: gone when this is dropped or the process ends, however it ends, as soon as no socket of it is
/// left.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// Makes one; its `lo` is down.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN.
    pub fn new() -> io::Result<Namespace> {
        // A thread that ends moves there, so that the calling one stays where it is.
        let thread = std::thread::Builder::new().spawn(|| {
            // SAFETY: no memory is passed; it changes only the calling thread's namespace.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            File::open("/proc/thread-self/ns/net")
        })?;
        let file = thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(Namespace { file })
    }

    /// What [`enter`] takes, and `ip link … netns PATH` too.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let fd = self.file.as_raw_fd();
        format!("/proc/{}/fd/{fd}", std::process::id()).into()
    }
}

/// Moves the calling thread, and only it, into the network namespace that the file `path` stands for
/// (`/var/run/netns/NAME`, `/proc/PID/ns/net`). Sockets stay in the namespace in which they were made.
///
/// # Errors
/// When there is no such file, or it is no network namespace, or CAP_SYS_ADMIN is missing.
pub fn enter(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: a system call on a descriptor that lives through it; it changes only the calling thread's namespace.
    match unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps the calling thread on CPU `cpu`.
///
/// # Errors
/// When there is no such CPU, or this process may not use it.
pub fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `set` is a plain bit set, valid when zeroed; the index was checked; 0 is the calling thread.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set)
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
