//! Unix sockets: pairs without a name, listeners that keep message boundaries, descriptors in messages.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::limits::{MAX_FDS_PER_MESSAGE, MAX_SOCKET_PATH};

/// What can go wrong with a unix socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Longer than `sun_path`.
    #[error(
        "{path} is too long for a socket ({MAX_SOCKET_PATH} bytes at most); set XDG_RUNTIME_DIR to a shorter folder"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Nobody listens there, or not for this user.
    #[error("cannot connect to {path}: {source} (is it running, and as the same user?)")]
    Connect {
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The name could not be taken.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A message with more descriptors than allowed; those that came were closed.
    #[error("a message carries more than {MAX_FDS_PER_MESSAGE} descriptors")]
    TooManyFds,
    /// A message longer than the buffer.
    #[error("a message is longer than {limit} bytes")]
    TooLong {
        /// Size of the buffer.
        limit: usize,
    },
    /// Any other failure of the socket.
    #[error("unix socket: {0}")]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for SocketError {
    fn from(e: rustix::io::Errno) -> Self {
        Self::Io(e.into())
    }
}

/// Who is at the other end, as the kernel knows it since the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCred {
    /// Process id.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Two connected stream sockets without a name, closed on exec.
///
/// # Errors
/// When no descriptor is left.
pub fn stream_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

fn address(path: &Path) -> Result<SocketAddrUnix, SocketError> {
    SocketAddrUnix::new(path).map_err(|_| SocketError::PathTooLong {
        path: path.to_owned(),
    })
}

fn seqpacket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags | SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Listens on `path` with message boundaries kept (`SOCK_SEQPACKET`); `accept` on it does not block. Who may connect is a
/// matter of the folder that `path` is in.
///
/// # Errors
/// `PathTooLong`, `Listen`.
pub fn listen(path: &Path) -> Result<OwnedFd, SocketError> {
    let addr = address(path)?;
    let refuse = |source: io::Error| SocketError::Listen {
        path: path.to_owned(),
        source,
    };
    let fd = seqpacket(SocketFlags::NONBLOCK).map_err(refuse)?;
    rustix::net::bind(&fd, &addr).map_err(|e| refuse(e.into()))?;
    rustix::net::listen(&fd, 64).map_err(|e| refuse(e.into()))?;
    Ok(fd)
}

/// The next connection, if one waits.
///
/// # Errors
/// `Io`.
pub fn accept(listener: impl AsFd) -> Result<Option<OwnedFd>, SocketError> {
    use rustix::io::Errno;
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Connects to a listener of [`listen`].
///
/// # Errors
/// `PathTooLong`, `Connect`.
pub fn connect(path: &Path) -> Result<OwnedFd, SocketError> {
    let addr = address(path)?;
    let refuse = |source: io::Error| SocketError::Connect {
        path: path.to_owned(),
        source,
    };
    let fd = seqpacket(SocketFlags::empty()).map_err(refuse)?;
    rustix::net::connect(&fd, &addr).map_err(|e| refuse(e.into()))?;
    Ok(fd)
}

/// Who connected.
///
/// # Errors
/// When `socket` is no connected unix socket.
pub fn peer_cred(socket: impl AsFd) -> io::Result<PeerCred> {
    let c = rustix::net::sockopt::socket_peercred(socket)?;
    Ok(PeerCred {
        pid: c.pid.as_raw_nonzero().get(),
        uid: c.uid.as_raw(),
        gid: c.gid.as_raw(),
    })
}

/// Sends `bytes` and `fds` as one message; a peer that has gone is an error and no signal.
///
/// # Errors
/// `TooManyFds`; `Io`, also when only a part could be sent.
pub fn send_with_fds(
    socket: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), SocketError> {
    if fds.len() > MAX_FDS_PER_MESSAGE {
        return Err(SocketError::TooManyFds);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS_PER_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(SocketError::TooManyFds);
    }
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(
            &socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    })?;
    if sent != bytes.len() {
        return Err(io::Error::from(io::ErrorKind::WriteZero).into());
    }
    Ok(())
}

/// Receives one message into `buf`: its length (0: the peer closed) and the descriptors that came with it, closed on exec.
/// On a socket with message boundaries a message that does not fit is an error.
///
/// # Errors
/// `TooManyFds`, `TooLong`, `Io`.
pub fn recv_with_fds(
    socket: impl AsFd,
    buf: &mut [u8],
) -> Result<(usize, Vec<OwnedFd>), SocketError> {
    let limit = buf.len();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS_PER_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(buf)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS_PER_MESSAGE {
        return Err(SocketError::TooManyFds);
    }
    if got.flags.contains(ReturnFlags::TRUNC) {
        return Err(SocketError::TooLong { limit });
    }
    Ok((got.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::event::EventFd;

    #[test]
    fn descriptors_arrive_in_order_and_work() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = listen(&path).unwrap();
        assert!(accept(&listener).unwrap().is_none());
        let client = connect(&path).unwrap();
        let server = accept(&listener).unwrap().unwrap();
        let me = peer_cred(&server).unwrap();
        assert_eq!(me.pid, i32::try_from(std::process::id()).unwrap());
        assert_eq!(me.uid, rustix::process::getuid().as_raw());

        let events = [EventFd::new().unwrap(), EventFd::new().unwrap()];
        send_with_fds(&client, b"hi", &[events[0].as_fd(), events[1].as_fd()]).unwrap();
        let mut buf = [0; 16];
        let (n, fds) = recv_with_fds(&server, &mut buf).unwrap();
        assert_eq!((&buf[..n], fds.len()), (&b"hi"[..], 2));
        let mut fds = fds.into_iter().map(EventFd::from);
        fds.nth(1).unwrap().signal().unwrap();
        assert_eq!(
            (events[0].take().unwrap(), events[1].take().unwrap()),
            (0, 1)
        );

        send_with_fds(&client, &[7; 17], &[]).unwrap();
        assert!(matches!(
            recv_with_fds(&server, &mut buf),
            Err(SocketError::TooLong { limit: 16 })
        ));
        drop(client);
        assert_eq!(recv_with_fds(&server, &mut buf).unwrap().0, 0);
        assert!(send_with_fds(&server, b"x", &[]).is_err());
    }

    #[test]
    fn bad_paths_say_so() {
        let e = connect(Path::new("/nonexistent/socket"))
            .unwrap_err()
            .to_string();
        assert!(e.contains("/nonexistent/socket"), "{e}");
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
        assert!(matches!(
            listen(&long),
            Err(SocketError::PathTooLong { .. })
        ));
    }

    #[test]
    fn too_many_descriptors_are_refused() {
        let (a, _b) = stream_pair().unwrap();
        let e = EventFd::new().unwrap();
        let many = [e.as_fd(); MAX_FDS_PER_MESSAGE + 1];
        assert!(matches!(
            send_with_fds(&a, b"x", &many),
            Err(SocketError::TooManyFds)
        ));
    }
}
