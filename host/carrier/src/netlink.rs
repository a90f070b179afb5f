//! What the kernel knows about addresses, links, routes and neighbours (rtnetlink, `rtnetlink(7)`).

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::sys::socket::{Control, RawAddr, Socket};

/// An address of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalAddress {
    /// The address.
    pub ip: IpAddr,
    /// Index of its interface.
    pub interface: u32,
    /// The kernel still looks whether somebody else has it (IPv6 duplicate address detection); it cannot be bound yet.
    pub tentative: bool,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// ARP hardware type (`ARPHRD_ETHER`, `ARPHRD_LOOPBACK`, …).
    pub hardware: u16,
    /// `IFF_*`.
    pub flags: u32,
    /// Bytes of the largest IP packet.
    pub mtu: usize,
    /// Hardware address, where it has one of 6 bytes.
    pub mac: [u8; 6],
}

/// Where a packet goes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// `RTN_UNICAST`, `RTN_LOCAL`, …
    pub kind: u8,
    /// Index of the interface it leaves by.
    pub interface: u32,
    /// Next hop, if it is not the destination itself.
    pub gateway: Option<IpAddr>,
}

/// A neighbour's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// `NUD_*` bits.
    pub state: u16,
    /// Hardware address, if known.
    pub mac: Option<[u8; 6]>,
}

/// `NUD_*`: what a [`Neighbour`]'s state says.
pub mod nud {
    /// Asked, no answer yet.
    pub const INCOMPLETE: u16 = 0x01;
    /// Confirmed lately.
    pub const REACHABLE: u16 = 0x02;
    /// Not confirmed lately, to be verified when used.
    pub const STALE: u16 = 0x04;
    /// No answer.
    pub const FAILED: u16 = 0x20;
    /// Needs no resolution.
    pub const NOARP: u16 = 0x40;
    /// Entered by hand.
    pub const PERMANENT: u16 = 0x80;
}

/// Route type of an ordinary destination.
pub const RTN_UNICAST: u8 = 1;
/// Route type of this machine's own addresses.
pub const RTN_LOCAL: u8 = 2;

const HEADER: usize = 16;
/// Bytes of a reply: the kernel fills at most 32 KiB of a dump into one.
const REPLY: usize = 64 << 10;
/// Seconds to wait for a reply, which is there when the request returns; against a kernel that never answers.
const PATIENCE_S: i64 = 2;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFA_F_OPTIMISTIC: u32 = 0x04;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_VIA: u16 = 18;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// A conversation with the kernel's rtnetlink.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

fn family(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes).ok()?;
    Some(Ipv6Addr::from(v6).into())
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn push_attribute(body: &mut Vec<u8>, kind: u16, data: &[u8]) {
    body.extend_from_slice(&(4 + data.len() as u16).to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(data);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Calls `each` with the type and data of each attribute after a fixed header of `skip` bytes.
fn attributes<'a>(message: &'a [u8], skip: usize, mut each: impl FnMut(u16, &'a [u8])) {
    let mut rest = message.get(skip..).unwrap_or(&[]);
    while let (Some(len), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let len = usize::from(len);
        let Some(data) = rest.get(4..len) else {
            return;
        };
        each(kind & 0x3fff, data);
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
}

impl Netlink {
    /// Opens one. Needs no privilege. It speaks of the network namespace of the calling thread.
    ///
    /// # Errors
    /// When there is no such socket (a sandbox may refuse it).
    pub fn open() -> io::Result<Netlink> {
        let socket = Socket::new(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
        socket.bind(&RawAddr::netlink())?;
        let mut patience = [0; 16];
        patience[..8].copy_from_slice(&PATIENCE_S.to_ne_bytes());
        socket.set_bytes(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)?;
        Ok(Netlink {
            socket,
            sequence: 0,
            buffer: vec![0; REPLY],
        })
    }

    /// Sends a request and hands over each message of the reply: type and what follows its header.
    fn ask(
        &mut self,
        kind: u16,
        dump: bool,
        body: &[u8],
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let flags = NLM_F_REQUEST | if dump { NLM_F_DUMP } else { 0 };
        let mut header = [0; HEADER];
        header[0..4].copy_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
        header[4..6].copy_from_slice(&kind.to_ne_bytes());
        header[6..8].copy_from_slice(&flags.to_ne_bytes());
        header[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        let parts = [IoSlice::new(&header), IoSlice::new(body)];
        self.socket
            .send(Some(&RawAddr::netlink()), &parts, &Control::default())?;
        loop {
            let (got, _) = self.socket.receive(&mut self.buffer, true)?;
            let mut rest = &self.buffer[..got.min(REPLY)];
            while let (Some(len), Some(kind)) = (u32_at(rest, 0), u16_at(rest, 4)) {
                let len = len as usize;
                let Some(message) = rest.get(HEADER..len) else {
                    return Err(io::ErrorKind::InvalidData.into());
                };
                let ours = u32_at(rest, 8) == Some(self.sequence);
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
                if !ours {
                    continue;
                }
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = u32_at(message, 0).unwrap_or(0) as i32;
                        return match code {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    kind => each(kind, message),
                }
                if !dump {
                    return Ok(());
                }
            }
        }
    }

    /// This machine's addresses.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn addresses(&mut self) -> io::Result<Vec<LocalAddress>> {
        let mut found = Vec::new();
        self.ask(RTM_GETADDR, true, &[0; 8], |kind, message| {
            let (RTM_NEWADDR, Some(interface)) = (kind, u32_at(message, 4)) else {
                return;
            };
            let mut flags = u32::from(message[2]);
            let (mut address, mut local) = (None, None);
            attributes(message, 8, |kind, data| match kind {
                IFA_ADDRESS => address = ip_of(data),
                IFA_LOCAL => local = ip_of(data),
                IFA_FLAGS => flags = u32_at(data, 0).unwrap_or(flags),
                _ => {}
            });
            // On point-to-point links the address is the peer's and the local one ours.
            if let Some(ip) = local.or(address) {
                found.push(LocalAddress {
                    ip,
                    interface,
                    tentative: flags & IFA_F_TENTATIVE != 0 && flags & IFA_F_OPTIMISTIC == 0,
                });
            }
        })?;
        Ok(found)
    }

    /// This machine's interfaces.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let mut found = Vec::new();
        self.ask(RTM_GETLINK, true, &[0; 16], |kind, message| {
            if kind == RTM_NEWLINK {
                found.extend(parse_link(message));
            }
        })?;
        Ok(found)
    }

    /// One interface.
    ///
    /// # Errors
    /// ENODEV when there is none of this index (any more).
    pub fn link(&mut self, index: u32) -> io::Result<Link> {
        let mut body = [0; 16];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut found = None;
        self.ask(RTM_GETLINK, false, &body, |kind, message| {
            if kind == RTM_NEWLINK {
                found = parse_link(message);
            }
        })?;
        found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Where a packet from `src` to `dst` goes; `interface` if it must leave by that one (link-local addresses).
    ///
    /// # Errors
    /// ENETUNREACH, EHOSTUNREACH, EACCES: as the routing table says.
    pub fn route(
        &mut self,
        dst: IpAddr,
        src: Option<IpAddr>,
        interface: Option<u32>,
    ) -> io::Result<Route> {
        let bits = |ip: IpAddr| if ip.is_ipv4() { 32 } else { 128 };
        let mut body = vec![family(dst), bits(dst), src.map_or(0, bits), 0, 0, 0, 0, 0];
        body.extend_from_slice(&[0; 4]);
        push_attribute(&mut body, RTA_DST, &octets(dst));
        if let Some(src) = src {
            push_attribute(&mut body, RTA_SRC, &octets(src));
        }
        if let Some(interface) = interface {
            push_attribute(&mut body, RTA_OIF, &interface.to_ne_bytes());
        }
        let mut found = None;
        self.ask(RTM_GETROUTE, false, &body, |kind, message| {
            if kind != RTM_NEWROUTE || message.len() < 12 {
                return;
            }
            let (mut interface, mut gateway) = (None, None);
            attributes(message, 12, |kind, data| match kind {
                RTA_OIF => interface = u32_at(data, 0),
                RTA_GATEWAY => gateway = ip_of(data),
                RTA_VIA => gateway = ip_of(data.get(2..).unwrap_or(&[])),
                _ => {}
            });
            found = interface.map(|interface| Route {
                kind: message[7],
                interface,
                gateway,
            });
        })?;
        found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENETUNREACH))
    }

    /// What is known of the neighbour `ip` on an interface.
    ///
    /// # Errors
    /// ENOENT when nothing is.
    pub fn neighbour(&mut self, interface: u32, ip: IpAddr) -> io::Result<Neighbour> {
        let mut body = vec![0; 12];
        body[0] = family(ip);
        body[4..8].copy_from_slice(&interface.to_ne_bytes());
        push_attribute(&mut body, NDA_DST, &octets(ip));
        let mut found = None;
        self.ask(RTM_GETNEIGH, false, &body, |kind, message| {
            let (RTM_NEWNEIGH, Some(state)) = (kind, u16_at(message, 8)) else {
                return;
            };
            let mut mac = None;
            attributes(message, 12, |kind, data| {
                if kind == NDA_LLADDR {
                    mac = data.try_into().ok();
                }
            });
            found = Some(Neighbour { state, mac });
        })?;
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn parse_link(message: &[u8]) -> Option<Link> {
    let mut link = Link {
        hardware: u16_at(message, 2)?,
        index: u32_at(message, 4)?,
        flags: u32_at(message, 8)?,
        name: String::new(),
        mtu: 0,
        mac: [0; 6],
    };
    attributes(message, 16, |kind, data| match kind {
        IFLA_IFNAME => {
            let name = data.split(|&byte| byte == 0).next().unwrap_or(&[]);
            link.name = String::from_utf8_lossy(name).into_owned();
        }
        IFLA_MTU => link.mtu = u32_at(data, 0).unwrap_or(0) as usize,
        IFLA_ADDRESS => link.mac = data.try_into().unwrap_or([0; 6]),
        _ => {}
    });
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_known() {
        let mut netlink = Netlink::open().unwrap();
        let links = netlink.links().unwrap();
        let lo = links.iter().find(|link| link.name == "lo").unwrap();
        assert_eq!(netlink.link(lo.index).unwrap(), *lo);
        assert_eq!(lo.hardware, libc::ARPHRD_LOOPBACK);
        assert!(lo.mtu >= 1500, "{lo:?}");
        let home: IpAddr = "127.0.0.1".parse().unwrap();
        let addresses = netlink.addresses().unwrap();
        assert!(addresses.iter().any(|address| address.ip == home));
        let route = netlink.route("127.0.0.2".parse().unwrap(), Some(home), None);
        let route = route.unwrap();
        assert_eq!((route.kind, route.interface), (RTN_LOCAL, lo.index));
    }

    #[test]
    fn errors_of_the_kernel_come_through() {
        let mut netlink = Netlink::open().unwrap();
        assert_eq!(
            netlink.link(0x00ff_fff0).unwrap_err().raw_os_error(),
            Some(libc::ENODEV)
        );
        // The conversation goes on after an error.
        assert!(!netlink.links().unwrap().is_empty());
    }

    #[test]
    fn lengths_that_lie_end_the_walk() {
        let mut seen = 0;
        for bytes in [&[0, 0, 1, 0][..], &[255, 255, 1, 0], &[3, 0, 1, 0], &[4, 0]] {
            attributes(bytes, 0, |_, _| seen += 1);
        }
        attributes(&[1, 2, 3], 9, |_, _| seen += 1);
        assert_eq!(seen, 0);
    }
}
