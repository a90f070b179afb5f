//! The server's side of QEMU's `ivshmem-doorbell` protocol.
//!
//! All messages go out before QEMU starts, into the socket's buffer: a guest cannot ring before its doorbells are known. A
//! message is a little-endian `i64`, some with a descriptor:
//!
//! | value | descriptor | meaning |
//! | --- | --- | --- |
//! | 0 | | version of the protocol |
//! | [`PEER_GUEST`] | | the device's own peer id |
//! | [`PEER_HOST`] | eventfd, one message a vector | what the guest raises by a doorbell |
//! | -1 | memory file | the window, BAR 2 |
//! | [`PEER_GUEST`] | eventfd, one message a vector | what raises an interrupt in the guest |
//!
//! QEMU reads up to the memory file while it makes the device, and what follows from its main loop. The host's vectors go before the memory,
//! so that they stand when the guest's first instruction runs; the guest's own need the interrupt table, made after it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hyv_abi::window::{KICK_VECTORS, PEER_GUEST, PEER_HOST};

use crate::sys::event::EventFd;
use crate::sys::socket::{SocketError, send_with_fds, stream_pair};

const PROTOCOL_VERSION: i64 = 0;
const SHARED_MEMORY: i64 = -1;

/// Interrupt vectors of the device: ivshmem has one number for both directions, so it is the larger of the two.
pub const VECTORS: u32 = KICK_VECTORS;

/// The eventfds between one guest and the host.
#[derive(Debug)]
pub struct Doorbells {
    /// Raised by the guest: a request on the control queue, or a timer set.
    pub kick_control: EventFd,
    /// Raised by the guest: work for an engine that sleeps.
    pub kick_data: EventFd,
    /// Raised by the host: interrupt [`hyv_abi::window::WAKE_VECTOR`].
    pub wake: EventFd,
}

impl Doorbells {
    /// New ones, none raised.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            kick_control: EventFd::new()?,
            kick_data: EventFd::new()?,
            wake: EventFd::new()?,
        })
    }
}

/// The server's end of the socket; QEMU has the other. Keep it as long as the guest runs.
#[derive(Debug)]
pub struct Server {
    _socket: OwnedFd,
}

impl Server {
    /// Makes the socket and fills it with the whole conversation. The second result is QEMU's end.
    ///
    /// # Errors
    /// When no descriptor is left or the socket's buffer is too small.
    pub fn start(
        window: BorrowedFd<'_>,
        bells: &Doorbells,
    ) -> Result<(Self, OwnedFd), SocketError> {
        let (socket, client) = stream_pair()?;
        let say = |value: i64, fd: Option<BorrowedFd<'_>>| {
            send_with_fds(&socket, &value.to_le_bytes(), fd.as_slice())
        };
        say(PROTOCOL_VERSION, None)?;
        say(PEER_GUEST.into(), None)?;
        // In the order of their vectors: KICK_CONTROL, KICK_DATA.
        say(PEER_HOST.into(), Some(bells.kick_control.as_fd()))?;
        say(PEER_HOST.into(), Some(bells.kick_data.as_fd()))?;
        say(SHARED_MEMORY, Some(window))?;
        say(PEER_GUEST.into(), Some(bells.wake.as_fd()))?;
        Ok((Self { _socket: socket }, client))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket::recv_with_fds;
    use crate::sys::window::SharedWindow;

    #[test]
    fn the_conversation() {
        let window = SharedWindow::create().unwrap();
        let bells = Doorbells::new().unwrap();
        let (_server, client) = Server::start(window.as_fd(), &bells).unwrap();
        let mut said = Vec::new();
        for _ in 0..6 {
            let mut b = [0; 8];
            let (n, mut fds) = recv_with_fds(&client, &mut b).unwrap();
            assert_eq!(n, 8);
            said.push((i64::from_le_bytes(b), fds.pop()));
            assert!(fds.is_empty());
        }
        let values: Vec<_> = said.iter().map(|(v, f)| (*v, f.is_some())).collect();
        assert_eq!(
            values,
            [
                (0, false),
                (1, false),
                (0, true),
                (0, true),
                (-1, true),
                (1, true)
            ]
        );
        let raise = |i: usize| {
            let fd = said[i].1.as_ref().unwrap().try_clone().unwrap();
            EventFd::from(fd).signal().unwrap();
        };
        raise(3);
        assert_eq!(
            (
                bells.kick_control.take().unwrap(),
                bells.kick_data.take().unwrap()
            ),
            (0, 1)
        );
        raise(2);
        assert_eq!(bells.kick_control.take().unwrap(), 1);
        raise(5);
        assert_eq!(bells.wake.take().unwrap(), 1);
    }
}
