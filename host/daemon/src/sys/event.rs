//! Eventfds: a counter that one side raises and the other waits for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

/// An eventfd, non-blocking and closed on exec.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one, at zero.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Another descriptor of the same eventfd.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Raises it. A counter that is full already wakes its reader too, so that is no error.
    ///
    /// # Errors
    /// When the descriptor is none of an eventfd.
    pub fn signal(&self) -> io::Result<()> {
        match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes the count, 0 if nobody raised it.
    ///
    /// # Errors
    /// When the descriptor is none of an eventfd.
    pub fn take(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until it is raised or `timeout` (for ever, if none) has passed, then takes the count.
    ///
    /// # Errors
    /// When the descriptor is none of an eventfd.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<u64> {
        let timeout = timeout.map(timespec);
        match rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => self.take(),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for EventFd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<EventFd> for OwnedFd {
    fn from(e: EventFd) -> Self {
        e.0
    }
}

/// A duration as the kernel takes it; one of centuries is cut.
pub(crate) fn timespec(d: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(d.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_wakes() {
        let e = EventFd::new().unwrap();
        assert_eq!(e.take().unwrap(), 0);
        assert_eq!(e.wait(Some(Duration::from_millis(1))).unwrap(), 0);
        let other = e.try_clone().unwrap();
        let t = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            other.signal().unwrap();
            other.signal().unwrap();
        });
        assert!(e.wait(None).unwrap() >= 1);
        t.join().unwrap();
    }
}
