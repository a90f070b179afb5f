//! Addresses to listen on: which interface has them, and how they are written as GIDs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::time::Instant;

use hyv_roce::carrier::Gid;

use crate::error::OpenError;
use crate::limits;
use crate::netlink::{Link, LocalAddress, Netlink, RTN_LOCAL};

/// An address of this machine to listen on: `10.0.0.1`, `2001:db8::1`, `fe80::1%eth0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAddr {
    /// The address; never an IPv4 address mapped into IPv6.
    pub ip: IpAddr,
    /// Interface by name; only link-local addresses need one.
    pub interface: Option<String>,
}

impl From<IpAddr> for ListenAddr {
    fn from(ip: IpAddr) -> ListenAddr {
        ListenAddr {
            ip: ip.to_canonical(),
            interface: None,
        }
    }
}

impl FromStr for ListenAddr {
    type Err = OpenError;

    fn from_str(text: &str) -> Result<ListenAddr, OpenError> {
        let bad = |reason| OpenError::BadAddress {
            text: text.into(),
            reason,
        };
        let (ip, interface) = match text.split_once('%') {
            Some((_, "")) => return Err(bad("an interface's name should follow the %")),
            Some((ip, interface)) => (ip, Some(interface.to_string())),
            None => (text, None),
        };
        let ip: IpAddr = ip.parse().map_err(|_| bad("not an IPv4 or IPv6 address"))?;
        let addr = ListenAddr {
            ip: ip.to_canonical(),
            interface,
        };
        addr.check()?;
        Ok(addr)
    }
}

impl std::fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.interface {
            Some(interface) => write!(f, "{}%{interface}", self.ip),
            None => write!(f, "{}", self.ip),
        }
    }
}

impl ListenAddr {
    fn check(&self) -> Result<(), OpenError> {
        let reason = match self.ip {
            ip if ip.is_unspecified() => {
                "a device needs one address, not the wildcard: its GID is that address"
            }
            ip if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) => {
                "a group's address cannot be a device's own"
            }
            _ => return Ok(()),
        };
        Err(OpenError::BadAddress {
            text: self.to_string(),
            reason,
        })
    }
}

/// A GID for an address: itself, or the IPv4 address mapped into IPv6 (IBA 1.4, A17.4.5.2).
#[must_use]
pub fn gid_of(ip: IpAddr) -> Gid {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The address that a GID stands for.
#[must_use]
pub fn ip_of(gid: &Gid) -> IpAddr {
    Ipv6Addr::from(*gid).to_canonical()
}

/// Whether an address only means something together with an interface.
#[must_use]
pub fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// An address of this machine, found.
#[derive(Clone, Debug)]
pub(crate) struct Owned {
    pub ip: IpAddr,
    pub link: Link,
    /// For `sockaddr_in6`: the interface's index where the address is link-local, else 0.
    pub scope: u32,
}

/// Finds the interface that has an address; waits for an IPv6 address that is being tested for duplicates.
pub(crate) fn find(netlink: &mut Netlink, addr: &ListenAddr) -> Result<Owned, OpenError> {
    addr.check()?;
    let asking = || OpenError::system("asking the kernel for this machine's addresses");
    let patience = Instant::now() + limits::TENTATIVE_WAIT;
    loop {
        let links = netlink.links().map_err(asking())?;
        let addresses = netlink.addresses().map_err(asking())?;
        let (owner, tentative) = choose(addr, &addresses, &links, |ip| {
            let route = netlink.route(ip, None, None).ok()?;
            (route.kind == RTN_LOCAL).then_some(route.interface)
        })?;
        if !tentative {
            return Ok(owner);
        }
        if Instant::now() > patience {
            return Err(OpenError::Tentative {
                ip: addr.ip,
                interface: owner.link.name,
            });
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// Picks the owner of `addr`; `local` gives the interface of an address that is local without being listed (127.0.0.2).
fn choose(
    addr: &ListenAddr,
    addresses: &[LocalAddress],
    links: &[Link],
    local: impl FnOnce(IpAddr) -> Option<u32>,
) -> Result<(Owned, bool), OpenError> {
    let link = |index: u32| links.iter().find(|link| link.index == index);
    let named = |link: &Link| {
        addr.interface
            .as_ref()
            .is_none_or(|name| *name == link.name)
    };
    let owners: Vec<(&Link, bool)> = addresses
        .iter()
        .filter(|address| address.ip == addr.ip)
        .filter_map(|address| Some((link(address.interface)?, address.tentative)))
        .collect();
    let mut fitting = owners.iter().filter(|(link, _)| named(link));
    let (first, second) = (fitting.next().copied(), fitting.next());
    let found = match (first, second) {
        (Some(_), Some(_)) if is_link_local(addr.ip) => None,
        (Some(found), _) => Some(found),
        (None, _) if owners.is_empty() => local(addr.ip)
            .and_then(link)
            .filter(|link| named(link))
            .map(|link| (link, false)),
        (None, _) => None,
    };
    if let Some((link, tentative)) = found {
        let owned = Owned {
            ip: addr.ip,
            scope: if is_link_local(addr.ip) {
                link.index
            } else {
                0
            },
            link: link.clone(),
        };
        return Ok((owned, tentative));
    }
    if is_link_local(addr.ip) && !owners.is_empty() {
        return Err(OpenError::NeedsScope {
            ip: addr.ip,
            choices: owners
                .iter()
                .map(|(link, _)| format!("{}%{}", addr.ip, link.name))
                .collect(),
        });
    }
    let have = addresses.iter().map(|address| {
        let name = link(address.interface).map_or("?", |link| link.name.as_str());
        match is_link_local(address.ip) {
            true => format!("{}%{name}", address.ip),
            false => format!("{} ({name})", address.ip),
        }
    });
    Err(OpenError::NotHere {
        ip: addr.ip,
        have: have.collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.into(),
            hardware: libc::ARPHRD_ETHER,
            flags: 0,
            mtu: 1500,
            mac: [2, 0, 0, 0, 0, index as u8],
        }
    }

    fn address(ip: &str, interface: u32) -> LocalAddress {
        LocalAddress {
            ip: ip.parse().unwrap(),
            interface,
            tentative: false,
        }
    }

    fn pick(text: &str) -> Result<Owned, OpenError> {
        let links = [link(1, "lo"), link(2, "eth0"), link(3, "eth1")];
        let addresses = [
            address("127.0.0.1", 1),
            address("10.0.0.1", 2),
            address("fe80::1", 2),
            address("fe80::1", 3),
            address("fe80::2", 3),
        ];
        let local = |ip: IpAddr| ip.is_loopback().then_some(1);
        choose(&text.parse()?, &addresses, &links, local).map(|(owned, _)| owned)
    }

    #[test]
    fn the_owner_is_found() {
        assert_eq!(pick("10.0.0.1").unwrap().link.name, "eth0");
        assert_eq!(pick("::ffff:10.0.0.1").unwrap().link.name, "eth0");
        assert_eq!(pick("127.0.0.7").unwrap().link.name, "lo");
        let scoped = pick("fe80::1%eth1").unwrap();
        assert_eq!((scoped.link.name.as_str(), scoped.scope), ("eth1", 3));
        assert_eq!(pick("fe80::2").unwrap().scope, 3);
    }

    #[test]
    fn errors_name_the_remedy() {
        let text = |text: &str| pick(text).unwrap_err().to_string();
        assert!(text("fe80::1").contains("fe80::1%eth0, fe80::1%eth1"));
        assert!(text("fe80::2%eth0").contains("fe80::2%eth1"));
        assert!(text("10.0.0.2").contains("10.0.0.1 (eth0)"));
        assert!(text("10.0.0.1%eth1").contains("not an address"));
        assert!(text("0.0.0.0").contains("wildcard"));
        assert!(text("::").contains("wildcard"));
        assert!(text("224.0.0.1").contains("group"));
        assert!(text("example").contains("not an IPv4 or IPv6 address"));
        assert!(text("fe80::1%").contains("interface"));
    }

    #[test]
    fn gids_round_trip() {
        for text in ["10.1.2.3", "2001:db8::1"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(ip_of(&gid_of(ip)), ip);
        }
    }
}
