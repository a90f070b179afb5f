//! Taps: Ethernet interfaces whose other end is a descriptor.
#![allow(
    unsafe_code,
    reason = "network ioctls take a struct of the C library's"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Where taps come from.
const TUN: &str = "/dev/net/tun";

/// A tap that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// A name that the kernel would not take.
    #[error("`{0}` is no name for a tap: 1 to 15 letters, digits, `-`, `_` and `.`")]
    Name(String),
    /// There is none of this name.
    #[error(
        "there is no tap `{name}`; make it, as root: ip tuntap add dev {name} mode tap user {uid} && ip link set {name} up"
    )]
    Missing {
        /// Its name.
        name: String,
        /// Who wants it.
        uid: u32,
    },
    /// It belongs to somebody else.
    #[error(
        "no permission for tap `{name}`: it belongs to another user; as root, delete it and make it again with: ip tuntap add dev {name} mode tap user {uid}"
    )]
    Permission {
        /// Its name.
        name: String,
        /// Who wants it.
        uid: u32,
    },
    /// It has its other end already.
    #[error("tap `{name}` is in use by another program: give each guest its own")]
    Busy {
        /// Its name.
        name: String,
    },
    /// An interface of another kind.
    #[error(
        "`{name}` is no tap that a guest can use (another kind of interface, or one with several queues)"
    )]
    NoTap {
        /// Its name.
        name: String,
    },
    /// No way to taps at all.
    #[error(
        "cannot open {TUN}: {source}; load the kernel's module (modprobe tun) and let this user open it, or use --net user"
    )]
    Tun {
        /// The kernel's answer.
        source: io::Error,
    },
    /// Any other failure.
    #[error("cannot use tap `{name}`: {source}")]
    Io {
        /// Its name.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// An open tap: frames with a virtio-net header go in and out of the descriptor.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    mtu: u16,
}

/// Checks a name before it stands in an error or a command line.
///
/// # Errors
/// `Name`.
pub fn check_name(name: &str) -> Result<(), TapError> {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len()) && name != "." && name != "..";
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if fits && name.bytes().all(plain) {
        Ok(())
    } else {
        Err(TapError::Name(name.to_owned()))
    }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data of integers, for which zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One shorter than the field at most, so a zero ends it (`check_name`).
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed() as libc::c_char;
    }
    request
}

fn ioctl(fd: &impl AsRawFd, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: each of the calls below takes a pointer to an `ifreq`, and writes nothing beyond it.
    match unsafe { libc::ioctl(fd.as_raw_fd(), what, std::ptr::from_mut(request)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl Tap {
    /// Opens the existing tap `name`.
    ///
    /// # Errors
    /// One variant for each thing that a user can do something about.
    pub fn open(name: &str) -> Result<Self, TapError> {
        check_name(name)?;
        let uid = rustix::process::getuid().as_raw();
        let other = |source| TapError::Io {
            name: name.to_owned(),
            source,
        };
        // Asked first, because whoever may would create it below, and it would be gone with the guest.
        let socket = rustix::net::socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| other(e.into()))?;
        let mut flags = request(name);
        ioctl(&socket, libc::SIOCGIFFLAGS, &mut flags).map_err(|e| match e.raw_os_error() {
            Some(libc::ENODEV) => TapError::Missing {
                name: name.to_owned(),
                uid,
            },
            _ => other(e),
        })?;
        let mut mtu = request(name);
        ioctl(&socket, libc::SIOCGIFMTU, &mut mtu).map_err(other)?;
        // SAFETY: the kernel filled the member of each call.
        let (flags, mtu) = unsafe { (flags.ifr_ifru.ifru_flags, mtu.ifr_ifru.ifru_mtu) };
        if libc::c_int::from(flags) & libc::IFF_UP == 0 {
            tracing::warn!(
                "tap {name} is down: the guest reaches nobody before `ip link set {name} up`"
            );
        }
        let tun: File = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN)
            .map_err(|source| TapError::Tun { source })?;
        let mut attach = request(name);
        attach.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        ioctl(&tun, libc::TUNSETIFF, &mut attach).map_err(|e| {
            let name = name.to_owned();
            match e.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, uid },
                Some(libc::EBUSY) => TapError::Busy { name },
                Some(libc::EINVAL | libc::EEXIST) => TapError::NoTap { name },
                _ => TapError::Io { name, source: e },
            }
        })?;
        Ok(Self {
            fd: tun.into(),
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        })
    }

    /// Its descriptor.
    #[must_use]
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Its MTU when it was opened.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["t", "tap0", "hyv-tap_1.2", "fifteen-letters"] {
            check_name(good).unwrap();
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a,fd=3",
            "a b",
            "sixteen-letters!",
            "sixteen-letterss",
            "ä",
        ] {
            assert!(
                matches!(check_name(bad), Err(TapError::Name(n)) if n == bad),
                "{bad}"
            );
        }
    }

    #[test]
    fn what_is_missing_is_said_with_the_line_that_makes_it() {
        let e = Tap::open("hyv-no-such-tap").unwrap_err();
        let said = e.to_string();
        assert!(matches!(e, TapError::Missing { .. }), "{said}");
        assert!(
            said.contains("ip tuntap add dev hyv-no-such-tap mode tap user "),
            "{said}"
        );
        // Not made by asking for it.
        assert!(matches!(
            Tap::open("hyv-no-such-tap"),
            Err(TapError::Missing { .. })
        ));
    }

    #[test]
    fn another_interface_is_no_tap() {
        // Where there is no /dev/net/tun, or no permission to attach, that is the error.
        let e = Tap::open("lo").unwrap_err();
        assert!(
            matches!(
                e,
                TapError::NoTap { .. } | TapError::Permission { .. } | TapError::Tun { .. }
            ),
            "{e}"
        );
    }
}
