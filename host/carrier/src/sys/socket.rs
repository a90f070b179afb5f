//! Sockets: options, addresses, control messages, sending and receiving.
#![allow(
    unsafe_code,
    reason = "socket calls that take raw addresses, vectors and control messages"
)]

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::limits;

/// A socket address in the kernel's form (`sockaddr_in`, `sockaddr_in6`, `sockaddr_ll` or `sockaddr_nl`).
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct RawAddr {
    bytes: [u8; 32],
    len: u32,
}

impl RawAddr {
    /// `sockaddr_in` or `sockaddr_in6`; `scope` is an interface's index, for link-local IPv6 addresses, else 0.
    #[must_use]
    pub fn ip(ip: IpAddr, port: u16, scope: u32) -> RawAddr {
        let mut bytes = [0; 32];
        bytes[2..4].copy_from_slice(&port.to_be_bytes());
        let (family, len) = match ip {
            IpAddr::V4(ip) => {
                bytes[4..8].copy_from_slice(&ip.octets());
                (libc::AF_INET, size_of::<libc::sockaddr_in>())
            }
            IpAddr::V6(ip) => {
                bytes[8..24].copy_from_slice(&ip.octets());
                bytes[24..28].copy_from_slice(&scope.to_ne_bytes());
                (libc::AF_INET6, size_of::<libc::sockaddr_in6>())
            }
        };
        bytes[0..2].copy_from_slice(&(family as u16).to_ne_bytes());
        RawAddr {
            bytes,
            len: len as u32,
        }
    }

    /// `sockaddr_ll`: interface by index, EtherType.
    #[must_use]
    pub fn link(interface: u32, ethertype: u16) -> RawAddr {
        let mut bytes = [0; 32];
        bytes[0..2].copy_from_slice(&(libc::AF_PACKET as u16).to_ne_bytes());
        bytes[2..4].copy_from_slice(&ethertype.to_be_bytes());
        bytes[4..8].copy_from_slice(&interface.to_ne_bytes());
        RawAddr {
            bytes,
            len: size_of::<libc::sockaddr_ll>() as u32,
        }
    }

    /// `sockaddr_nl` of the kernel.
    #[must_use]
    pub fn netlink() -> RawAddr {
        let mut bytes = [0; 32];
        bytes[0..2].copy_from_slice(&(libc::AF_NETLINK as u16).to_ne_bytes());
        RawAddr {
            bytes,
            len: size_of::<libc::sockaddr_nl>() as u32,
        }
    }

    /// IP address and port, if it is such an address.
    #[must_use]
    pub fn to_ip(&self) -> Option<(IpAddr, u16)> {
        let b = &self.bytes;
        let port = u16::from_be_bytes([b[2], b[3]]);
        match i32::from(u16::from_ne_bytes([b[0], b[1]])) {
            libc::AF_INET => Some((Ipv4Addr::new(b[4], b[5], b[6], b[7]).into(), port)),
            libc::AF_INET6 => {
                let mut octets = [0; 16];
                octets.copy_from_slice(&b[8..24]);
                Some((Ipv6Addr::from(octets).into(), port))
            }
            _ => None,
        }
    }
}

/// Control messages to send with a datagram, in the kernel's form (`cmsghdr` and data, each on 8 bytes).
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Control {
    bytes: [u8; 96],
    len: usize,
}

const CMSG_HEADER: usize = 16;

impl Default for Control {
    fn default() -> Control {
        Control {
            bytes: [0; 96],
            len: 0,
        }
    }
}

impl Control {
    /// Adds a message of at most 8 bytes. No call of this crate adds more than four.
    pub fn push(&mut self, level: i32, kind: i32, data: &[u8]) {
        let at = self.len;
        let space = CMSG_HEADER + data.len().next_multiple_of(8);
        debug_assert!(at + space <= self.bytes.len());
        let Some(room) = self.bytes.get_mut(at..at + space) else {
            return;
        };
        room[0..8].copy_from_slice(&(CMSG_HEADER + data.len()).to_ne_bytes());
        room[8..12].copy_from_slice(&level.to_ne_bytes());
        room[12..16].copy_from_slice(&kind.to_ne_bytes());
        room[CMSG_HEADER..CMSG_HEADER + data.len()].copy_from_slice(data);
        self.len += space;
    }

    /// Adds a message that is an `int`.
    pub fn push_int(&mut self, level: i32, kind: i32, value: i32) {
        self.push(level, kind, &value.to_ne_bytes());
    }
}

/// Walks control messages as received: (level, type, data).
fn walk_control(mut bytes: &[u8], mut each: impl FnMut(i32, i32, &[u8])) {
    while let Some((header, _)) = bytes.split_first_chunk::<CMSG_HEADER>() {
        let word = |at: usize| {
            i32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let mut len = [0; 8];
        len.copy_from_slice(&header[..8]);
        let len = usize::from_ne_bytes(len);
        let Some(data) = bytes.get(CMSG_HEADER..len) else {
            return;
        };
        each(word(8), word(12), data);
        bytes = bytes.get(len.next_multiple_of(8)..).unwrap_or(&[]);
    }
}

/// An `int` or a byte of a control message.
fn value_of(data: &[u8]) -> i32 {
    match *data {
        [a, b, c, d, ..] => i32::from_ne_bytes([a, b, c, d]),
        [a, ..] => i32::from(a),
        [] => 0,
    }
}

/// A socket of any family.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

impl From<OwnedFd> for Socket {
    fn from(fd: OwnedFd) -> Socket {
        Socket { fd }
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

impl Socket {
    /// Makes a socket, closed at `exec`.
    ///
    /// # Errors
    /// As `socket(2)`: EPERM without the capability, EAFNOSUPPORT.
    pub fn new(family: i32, kind: i32, protocol: i32) -> io::Result<Socket> {
        // SAFETY: no memory is passed.
        let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
        // SAFETY: a descriptor just made, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Socket { fd })
    }

    /// A UDP socket of the address's family.
    ///
    /// # Errors
    /// As [`Socket::new`].
    pub fn udp(ip: IpAddr) -> io::Result<Socket> {
        let family = match ip {
            IpAddr::V4(_) => libc::AF_INET,
            IpAddr::V6(_) => libc::AF_INET6,
        };
        let socket = Socket::new(family, libc::SOCK_DGRAM, 0)?;
        if family == libc::AF_INET6 {
            socket.set_int(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
        }
        Ok(socket)
    }

    /// Another descriptor of the same socket.
    ///
    /// # Errors
    /// When the process has too many.
    pub fn dup(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    pub(super) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// `bind(2)`.
    ///
    /// # Errors
    /// As there.
    pub fn bind(&self, addr: &RawAddr) -> io::Result<()> {
        // SAFETY: the address is `len` initialised bytes.
        check(unsafe { libc::bind(self.raw(), addr.bytes.as_ptr().cast(), addr.len) })?;
        Ok(())
    }

    /// `connect(2)`.
    ///
    /// # Errors
    /// As there.
    pub fn connect(&self, addr: &RawAddr) -> io::Result<()> {
        // SAFETY: the address is `len` initialised bytes.
        check(unsafe { libc::connect(self.raw(), addr.bytes.as_ptr().cast(), addr.len) })?;
        Ok(())
    }

    /// Sets an option whose value is an `int`.
    ///
    /// # Errors
    /// As `setsockopt(2)`.
    pub fn set_int(&self, level: i32, name: i32, value: i32) -> io::Result<()> {
        self.set_bytes(level, name, &value.to_ne_bytes())
    }

    /// Sets an option whose value is plain bytes in the kernel's form, without pointers in it.
    ///
    /// # Errors
    /// As `setsockopt(2)`.
    pub fn set_bytes(&self, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
        let len = value.len() as libc::socklen_t;
        // SAFETY: the kernel reads `len` bytes of `value`.
        check(unsafe { libc::setsockopt(self.raw(), level, name, value.as_ptr().cast(), len) })?;
        Ok(())
    }

    /// An option whose value is an `int`.
    ///
    /// # Errors
    /// As `getsockopt(2)`.
    pub fn get_int(&self, level: i32, name: i32) -> io::Result<i32> {
        let mut value = [0; 4];
        self.get_bytes(level, name, &mut value)?;
        Ok(i32::from_ne_bytes(value))
    }

    /// An option whose value is plain bytes; gives how many.
    ///
    /// # Errors
    /// As `getsockopt(2)`.
    pub fn get_bytes(&self, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
        let mut len = value.len() as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes of `value`, and how many to `len`.
        check(unsafe {
            libc::getsockopt(
                self.raw(),
                level,
                name,
                value.as_mut_ptr().cast(),
                &raw mut len,
            )
        })?;
        Ok(len as usize)
    }

    /// Takes the error that an earlier packet or the interface left behind.
    #[must_use]
    pub fn take_error(&self) -> Option<io::Error> {
        match self.get_int(libc::SOL_SOCKET, libc::SO_ERROR) {
            Ok(0) => None,
            Ok(error) => Some(io::Error::from_raw_os_error(error)),
            Err(error) => Some(error),
        }
    }

    /// Attaches a classic BPF program: (code, jump if true, jump if false, operand).
    ///
    /// # Errors
    /// As `setsockopt(2)`: EINVAL for a program that the kernel's checker refuses.
    pub fn attach_filter(&self, program: &[(u16, u8, u8, u32)]) -> io::Result<()> {
        let mut code: Vec<libc::sock_filter> = program
            .iter()
            .map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k })
            .collect();
        let program = libc::sock_fprog {
            len: code.len() as u16,
            filter: code.as_mut_ptr(),
        };
        // SAFETY: the kernel reads the header and the `len` instructions that it points to; both live through the call.
        check(unsafe {
            libc::setsockopt(
                self.raw(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        })?;
        Ok(())
    }

    /// Has the kernel drop whatever arrives.
    ///
    /// # Errors
    /// As [`Socket::attach_filter`].
    pub fn drop_everything(&self) -> io::Result<()> {
        self.attach_filter(&[((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0)])
    }

    /// Asks for a buffer of `bytes`, beyond the system's limit if permitted; gives what it became (as the kernel accounts it).
    #[must_use]
    pub fn grow_buffer(&self, receive: bool, bytes: usize) -> usize {
        let (force, plain) = if receive {
            (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF)
        } else {
            (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)
        };
        let value = i32::try_from(bytes).unwrap_or(i32::MAX);
        if self.set_int(libc::SOL_SOCKET, force, value).is_err() {
            // Cut to the system's limit; what it became is read below.
            let _ = self.set_int(libc::SOL_SOCKET, plain, value);
        }
        self.get_int(libc::SOL_SOCKET, plain)
            .map_or(0, |got| got.max(0) as usize)
    }

    /// Sends one message of several parts; never blocks.
    ///
    /// # Errors
    /// As `sendmsg(2)`.
    pub fn send(
        &self,
        to: Option<&RawAddr>,
        parts: &[IoSlice<'_>],
        control: &Control,
    ) -> io::Result<usize> {
        // SAFETY: all zeros is an empty `msghdr`.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        if let Some(to) = to {
            header.msg_name = to.bytes.as_ptr().cast_mut().cast();
            header.msg_namelen = to.len;
        }
        // `IoSlice` has the layout of `iovec`, as its documentation promises.
        header.msg_iov = parts.as_ptr().cast_mut().cast();
        header.msg_iovlen = parts.len();
        if control.len > 0 {
            header.msg_control = control.bytes.as_ptr().cast_mut().cast();
            header.msg_controllen = control.len;
        }
        // SAFETY: every pointer in the header is to memory borrowed through this call, which only reads it.
        let sent = unsafe {
            libc::sendmsg(
                self.raw(),
                &raw const header,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Receives one message into `buffer`, cut to it; blocks if `wait`. Gives its whole length and sender.
    ///
    /// # Errors
    /// As `recvfrom(2)`; `WouldBlock` when there is none.
    pub fn receive(&self, buffer: &mut [u8], wait: bool) -> io::Result<(usize, RawAddr)> {
        let mut from = RawAddr {
            bytes: [0; 32],
            len: 32,
        };
        let flags = libc::MSG_TRUNC | if wait { 0 } else { libc::MSG_DONTWAIT };
        // SAFETY: the kernel writes at most the given lengths.
        let got = unsafe {
            libc::recvfrom(
                self.raw(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                flags,
                from.bytes.as_mut_ptr().cast(),
                &raw mut from.len,
            )
        };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        Ok((got, from))
    }
}

/// What the control messages of a datagram said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ancillary {
    /// Bytes of each segment, where several datagrams came as one (UDP GRO).
    pub segment_len: Option<usize>,
    /// IPv4 TOS or IPv6 traffic class.
    pub traffic_class: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
}

/// A datagram, or several of one flow and length that came as one.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// Sender.
    pub from: &'a RawAddr,
    /// What its control messages said.
    pub ancillary: Ancillary,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// Buffers for several datagrams, received in one call.
#[derive(Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    names: Vec<RawAddr>,
    controls: Vec<Control>,
}

impl Batch {
    /// Room for `datagrams` of [`limits::DATAGRAM`] bytes.
    #[must_use]
    pub fn new(datagrams: usize) -> Batch {
        let name = RawAddr {
            bytes: [0; 32],
            len: 0,
        };
        Batch {
            bytes: vec![0; datagrams * limits::DATAGRAM],
            names: vec![name; datagrams],
            controls: vec![Control::default(); datagrams],
        }
    }

    /// Receives up to `want` datagrams without blocking and hands each over; gives how many. One that was cut is left out.
    ///
    /// # Errors
    /// As `recvmmsg(2)`; `WouldBlock` when there is none.
    pub fn receive(
        &mut self,
        socket: &Socket,
        want: usize,
        mut take: impl FnMut(Datagram<'_>),
    ) -> io::Result<usize> {
        let want = want.clamp(1, self.names.len().min(limits::RECEIVE_BATCH));
        // SAFETY: all zeros is an empty `iovec`, an empty `mmsghdr`.
        let mut vectors: [libc::iovec; limits::RECEIVE_BATCH] = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut headers: [libc::mmsghdr; limits::RECEIVE_BATCH] = unsafe { std::mem::zeroed() };
        let parts = self.bytes.chunks_exact_mut(limits::DATAGRAM);
        let places = parts.zip(&mut self.names).zip(&mut self.controls);
        for ((header, vector), ((bytes, name), control)) in
            headers.iter_mut().zip(&mut vectors).zip(places).take(want)
        {
            vector.iov_base = bytes.as_mut_ptr().cast();
            vector.iov_len = bytes.len();
            let message = &mut header.msg_hdr;
            message.msg_name = name.bytes.as_mut_ptr().cast();
            message.msg_namelen = name.bytes.len() as u32;
            message.msg_iov = vector;
            message.msg_iovlen = 1;
            message.msg_control = control.bytes.as_mut_ptr().cast();
            message.msg_controllen = control.bytes.len();
        }
        // SAFETY: the first `want` headers point to buffers of `self`, mutably borrowed through the call, with their lengths.
        let got = unsafe {
            libc::recvmmsg(
                socket.raw(),
                headers.as_mut_ptr(),
                want as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        for (index, header) in headers.iter().take(got).enumerate() {
            if header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
                continue;
            }
            let from = &mut self.names[index];
            from.len = header.msg_hdr.msg_namelen;
            let control = &self.controls[index].bytes;
            let control = &control[..header.msg_hdr.msg_controllen.min(control.len())];
            let start = index * limits::DATAGRAM;
            let len = (header.msg_len as usize).min(limits::DATAGRAM);
            take(Datagram {
                from,
                ancillary: ancillary(control),
                bytes: &self.bytes[start..start + len],
            });
        }
        Ok(got)
    }
}

fn ancillary(control: &[u8]) -> Ancillary {
    let mut found = Ancillary::default();
    walk_control(control, |level, kind, data| {
        let value = value_of(data);
        match (level, kind) {
            (libc::SOL_UDP, libc::UDP_GRO) => found.segment_len = usize::try_from(value).ok(),
            (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                found.traffic_class = value as u8;
            }
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                found.hop_limit = value as u8;
            }
            _ => {}
        }
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_messages_survive_the_walk() {
        let mut control = Control::default();
        control.push_int(libc::IPPROTO_IP, libc::IP_TTL, 63);
        control.push(libc::IPPROTO_IP, libc::IP_TOS, &[0xb9]);
        control.push_int(libc::SOL_UDP, libc::UDP_GRO, 1082);
        let found = ancillary(&control.bytes[..control.len]);
        assert_eq!(found.hop_limit, 63);
        assert_eq!(found.traffic_class, 0xb9);
        assert_eq!(found.segment_len, Some(1082));
        // Lengths that lie end the walk and do not panic.
        for len in [0u64, 3, 15, 17, 1 << 40, u64::MAX] {
            let mut bytes = control.bytes;
            bytes[..8].copy_from_slice(&len.to_ne_bytes());
            let _ = ancillary(&bytes[..control.len]);
        }
    }

    #[test]
    fn addresses_survive() {
        for ip in ["10.1.2.3", "fe80::1:2"] {
            let ip: IpAddr = ip.parse().unwrap();
            assert_eq!(RawAddr::ip(ip, 4791, 3).to_ip(), Some((ip, 4791)));
        }
        assert_eq!(RawAddr::link(3, 0x800).to_ip(), None);
    }
}
