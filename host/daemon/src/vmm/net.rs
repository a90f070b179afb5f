//! The guest's network card: what it is connected to, and its addresses.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::RawFd;
use std::str::FromStr;

use crate::sys::tap::{Tap, TapError, check_name};

/// PCI slot of the card, which the guest tries first.
pub const NET_SLOT: &str = "0x5";
/// QEMU's name for the card's other end.
const NETDEV: &str = "net";
/// What QEMU's user networking calls its guest when nobody says otherwise, for IPv6: there is no server that would tell it.
const USER_IPV6: &str = "fec0::15/64,fec0::2";
/// The same for IPv4: the first address of its DHCP server.
const USER_IPV4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// A network that cannot be given to a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// What `--net` says.
    #[error("`{0}` is no network: user, tap:NAME or none")]
    Kind(String),
    /// What `--forward` says.
    #[error(
        "`{0}` is no forward: [ADDRESS:]PORT:GUESTPORT, such as 8080:80, with an IPv4 address and port 0 for any free one"
    )]
    Forward(String),
    /// What `--ip` says.
    #[error("`{0}` is no address: ADDRESS/PREFIX[,GATEWAY], such as 10.1.0.2/24,10.1.0.1")]
    Ip(String),
    /// Two addresses, or gateways, of a kind that there may be one of.
    #[error("--ip: {0}")]
    Ips(&'static str),
    /// Options without the network that they are for.
    #[error("{option} needs --net {net}")]
    Needs {
        /// The option.
        option: &'static str,
        /// What it needs.
        net: &'static str,
    },
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A port of the host that is taken.
    #[error(
        "cannot forward {address}: {source}; another program may have the port: name another, or 0 for any free one"
    )]
    Port {
        /// Address and port.
        address: SocketAddrV4,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A TCP port of this host whose connections go to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Address and port here; port 0 is any free one, see [`super::Qemu::forwards`].
    pub host: SocketAddrV4,
    /// The guest's port.
    pub guest: u16,
}

impl FromStr for Forward {
    type Err = NetError;

    /// `[ADDRESS:]PORT:GUESTPORT`; without an address, 127.0.0.1.
    fn from_str(text: &str) -> Result<Self, NetError> {
        let wrong = || NetError::Forward(text.to_owned());
        let (host, guest) = text.rsplit_once(':').ok_or_else(wrong)?;
        let (address, port) = host.rsplit_once(':').unwrap_or(("127.0.0.1", host));
        let number = |n: &str| n.parse::<u16>().map_err(|_| wrong());
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let guest = number(guest)?;
        if guest == 0 {
            return Err(wrong());
        }
        Ok(Self {
            host: SocketAddrV4::new(address, number(port)?),
            guest,
        })
    }
}

/// What the guest's card is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetConfig {
    /// QEMU's user networking: no privilege, behind this host's own addresses.
    User {
        /// Ports of this host that lead to the guest.
        forwards: Vec<Forward>,
    },
    /// An existing tap.
    Tap {
        /// Its name.
        name: String,
    },
}

impl NetConfig {
    /// What `--net` says: `user`, `tap:NAME`, or `none`.
    ///
    /// # Errors
    /// `Kind`, `Tap` for a name that cannot be one.
    pub fn parse(text: &str) -> Result<Option<Self>, NetError> {
        match (text, text.strip_prefix("tap:")) {
            ("none", _) => Ok(None),
            ("user", _) => Ok(Some(Self::User {
                forwards: Vec::new(),
            })),
            (_, Some(name)) => {
                check_name(name)?;
                Ok(Some(Self::Tap {
                    name: name.to_owned(),
                }))
            }
            _ => Err(NetError::Kind(text.to_owned())),
        }
    }

    /// What the options `--net`, `--forward` and `--ip` say together: forwards and addresses without a network are for user networking.
    ///
    /// # Errors
    /// `Kind`, `Tap`, `Needs`.
    pub fn from_options(
        net: Option<&str>,
        forwards: &[Forward],
        has_ip: bool,
    ) -> Result<Option<Self>, NetError> {
        let implied = if !forwards.is_empty() || has_ip {
            "user"
        } else {
            "none"
        };
        match Self::parse(net.unwrap_or(implied))? {
            Some(Self::User { .. }) => Ok(Some(Self::User {
                forwards: forwards.to_vec(),
            })),
            _ if !forwards.is_empty() => Err(NetError::Needs {
                option: "--forward",
                net: "user",
            }),
            None if has_ip => Err(NetError::Needs {
                option: "--ip",
                net: "user or --net tap:NAME",
            }),
            other => Ok(other),
        }
    }
}

/// One address of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestIp {
    /// The address.
    pub address: IpAddr,
    /// Bits that are the network's.
    pub prefix: u8,
    /// Where everything else goes.
    pub gateway: Option<IpAddr>,
}

impl FromStr for GuestIp {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let wrong = || NetError::Ip(text.to_owned());
        let (own, gateway) = match text.split_once(',') {
            Some((own, gateway)) => (own, Some(gateway)),
            None => (text, None),
        };
        let (address, prefix) = own.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let gateway: Option<IpAddr> = gateway.map(str::parse).transpose().map_err(|_| wrong())?;
        let host = |a: &IpAddr| !(a.is_unspecified() || a.is_multicast() || a.is_loopback());
        let family = |a: &IpAddr| a.is_ipv4() == address.is_ipv4() && host(a);
        let bits = if address.is_ipv4() { 32 } else { 128 };
        if !host(&address) || prefix > bits || !gateway.as_ref().is_none_or(family) {
            return Err(wrong());
        }
        Ok(Self {
            address,
            prefix,
            gateway,
        })
    }
}

impl fmt::Display for GuestIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)?;
        self.gateway.map_or(Ok(()), |g| write!(f, ",{g}"))
    }
}

/// Checks what the guest would refuse.
pub(crate) fn check(net: Option<&NetConfig>, ips: &[GuestIp]) -> Result<(), NetError> {
    match net {
        Some(NetConfig::Tap { name }) => check_name(name)?,
        Some(NetConfig::User { .. }) => {}
        None if ips.is_empty() => {}
        None => {
            return Err(NetError::Needs {
                option: "--ip",
                net: "user or --net tap:NAME",
            });
        }
    }
    let of = |v4| ips.iter().filter(move |ip| ip.address.is_ipv4() == v4);
    if of(true).count() > 1 || of(false).count() > 2 {
        return Err(NetError::Ips(
            "one IPv4 address and two of IPv6 are all there may be",
        ));
    }
    if [true, false]
        .iter()
        .any(|v4| of(*v4).filter(|ip| ip.gateway.is_some()).count() > 1)
    {
        return Err(NetError::Ips("two gateways of one family"));
    }
    Ok(())
}

/// The guest's word about its addresses, if it needs one: without, it asks a DHCP server.
pub(crate) fn guest_word(net: Option<&NetConfig>, ips: &[GuestIp]) -> Option<String> {
    let mut parts: Vec<String> = ips.iter().map(GuestIp::to_string).collect();
    match net? {
        NetConfig::Tap { .. } if parts.is_empty() => return None,
        NetConfig::Tap { .. } => {}
        NetConfig::User { .. } => {
            if !ips.iter().any(|ip| ip.address.is_ipv4()) {
                parts.push("dhcp".to_owned());
            }
            if !ips.iter().any(|ip| ip.address.is_ipv6()) {
                parts.push(USER_IPV6.to_owned());
            }
        }
    }
    Some(format!("hyv.net={}", parts.join(";")))
}

/// The card's other end, opened.
#[derive(Debug)]
pub(crate) enum Backend {
    User,
    Tap(Tap),
}

impl Backend {
    pub(crate) fn open(net: &NetConfig) -> Result<Self, NetError> {
        match net {
            NetConfig::Tap { name } => Ok(Self::Tap(Tap::open(name)?)),
            NetConfig::User { forwards } => {
                // QEMU ends with a line of its own if a port is taken; found out here, the remedy can be said.
                for forward in forwards {
                    TcpListener::bind(forward.host).map_err(|source| NetError::Port {
                        address: forward.host,
                        source,
                    })?;
                }
                Ok(Self::User)
            }
        }
    }
}

/// QEMU's options for the card. `tap` is the number of the tap's descriptor and its MTU.
pub(crate) fn options(
    net: &NetConfig,
    ips: &[GuestIp],
    tap: Option<(RawFd, u16)>,
    generation: u32,
) -> [String; 4] {
    let mut netdev = match (net, tap) {
        (NetConfig::Tap { .. }, Some((fd, _))) => format!("tap,id={NETDEV},fd={fd}"),
        _ => format!("user,id={NETDEV}"),
    };
    if let NetConfig::User { forwards } = net {
        let mut to = USER_IPV4;
        for ip in ips {
            if let IpAddr::V4(address) = ip.address {
                to = address;
                netdev += &format!(",net={address}/{}", ip.prefix);
                if let Some(gateway) = ip.gateway {
                    netdev += &format!(",host={gateway}");
                }
            }
        }
        for Forward { host, guest } in forwards {
            netdev += &format!(",hostfwd=tcp:{host}-{to}:{guest}");
        }
    }
    // Of its own, so that guests on one network differ: locally administered, and a number that no guest before had.
    let [_, a, b, c] = generation.to_be_bytes();
    let mut device = format!(
        "virtio-net-pci,netdev={NETDEV},bus=pcie.0,addr={NET_SLOT},disable-legacy=on,vectors=1,\
         mac=52:54:00:{a:02x}:{b:02x}:{c:02x}"
    );
    // No boot ROM: nothing boots from the network. No offload: the guest takes none, and then the queues need no control either.
    device += ",romfile=,ctrl_vq=off,mq=off";
    if let Some((_, mtu)) = tap {
        device += &format!(",host_mtu={mtu}");
    }
    ["-netdev".into(), netdev, "-device".into(), device]
}

/// The forwards in QEMU's `info usernet`: where each of this host's ports leads.
pub(crate) fn parse_usernet(text: &str) -> Vec<Forward> {
    let forward = |line: &str| {
        let mut words = line.split_whitespace();
        words.next().filter(|w| *w == "TCP[HOST_FORWARD]")?;
        let address = words.nth(1)?.parse().ok()?;
        let port = words.next()?.parse().ok()?;
        Some(Forward {
            host: SocketAddrV4::new(address, port),
            guest: words.nth(1)?.parse().ok()?,
        })
    };
    text.lines().filter_map(forward).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> GuestIp {
        text.parse().unwrap()
    }

    fn user(forwards: &[&str]) -> NetConfig {
        NetConfig::User {
            forwards: forwards.iter().map(|f| f.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn networks_as_typed() {
        assert_eq!(NetConfig::parse("none").unwrap(), None);
        assert_eq!(NetConfig::parse("user").unwrap(), Some(user(&[])));
        let tap = NetConfig::Tap { name: "t0".into() };
        assert_eq!(NetConfig::parse("tap:t0").unwrap(), Some(tap));
        for bad in ["", "tap", "users", "bridge:br0"] {
            assert!(
                matches!(NetConfig::parse(bad), Err(NetError::Kind(_))),
                "{bad}"
            );
        }
        for bad in ["tap:", "tap:a,fd=3", "tap:a b"] {
            assert!(
                matches!(NetConfig::parse(bad), Err(NetError::Tap(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn options_together() {
        let forwards: Vec<Forward> = vec!["8080:80".parse().unwrap()];
        let options = NetConfig::from_options;
        assert_eq!(options(None, &[], false).unwrap(), None);
        assert_eq!(options(None, &[], true).unwrap(), Some(user(&[])));
        assert_eq!(
            options(None, &forwards, false).unwrap(),
            Some(user(&["8080:80"]))
        );
        assert_eq!(
            options(Some("user"), &forwards, false).unwrap(),
            Some(user(&["8080:80"]))
        );
        for (net, forwards, has_ip) in [
            ("tap:t", &forwards[..], false),
            ("none", &forwards[..], false),
            ("none", &[], true),
        ] {
            let e = options(Some(net), forwards, has_ip).unwrap_err();
            assert!(matches!(e, NetError::Needs { .. }), "{e}");
        }
    }

    #[test]
    fn forwards_as_typed() {
        let f: Forward = "8080:80".parse().unwrap();
        assert_eq!(
            (f.host.to_string().as_str(), f.guest),
            ("127.0.0.1:8080", 80)
        );
        let f: Forward = "0.0.0.0:0:65535".parse().unwrap();
        assert_eq!((f.host.to_string().as_str(), f.guest), ("0.0.0.0:0", 65535));
        for bad in [
            "",
            "80",
            "80:",
            ":80",
            "80:0",
            "80:65536",
            "1.2.3:80:80",
            "[::1]:80:80",
            "a:80:80",
            "80:80,id=x",
        ] {
            assert!(
                matches!(bad.parse::<Forward>(), Err(NetError::Forward(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn addresses_as_typed() {
        for good in [
            "10.0.0.2/24",
            "10.0.0.2/24,10.0.0.1",
            "fd00::2/64",
            "fd00::2/64,fd00::1",
        ] {
            assert_eq!(ip(good).to_string(), good);
        }
        for bad in [
            "",
            "10.0.0.2",
            "10.0.0.2/33",
            "fd00::2/129",
            "0.0.0.0/0",
            "127.0.0.1/8",
            "224.0.0.1/4",
            "10.0.0.2/24,",
            "10.0.0.2/24,fd00::1",
            "10.0.0.2/24 hyv.log=off",
            "10.0.0.2/24;dhcp",
        ] {
            assert!(
                matches!(bad.parse::<GuestIp>(), Err(NetError::Ip(_))),
                "{bad}"
            );
        }
        let check = |ips: &[&str]| {
            let ips: Vec<_> = ips.iter().map(|t| ip(t)).collect();
            super::check(Some(&user(&[])), &ips)
        };
        check(&["10.0.0.2/24", "fd00::2/64", "fd01::2/64"]).unwrap();
        assert!(matches!(
            check(&["10.0.0.2/24", "10.0.0.3/24"]),
            Err(NetError::Ips(_))
        ));
        assert!(matches!(
            check(&["fd00::2/64,fd00::1", "fd01::2/64,fd01::1"]),
            Err(NetError::Ips(_))
        ));
        assert!(matches!(
            super::check(None, &[ip("10.0.0.2/24")]),
            Err(NetError::Needs { .. })
        ));
    }

    #[test]
    fn the_guest_is_told_what_it_cannot_find_out() {
        let tap = NetConfig::Tap { name: "t".into() };
        assert_eq!(guest_word(None, &[]), None);
        assert_eq!(guest_word(Some(&tap), &[]), None);
        let said = |net: &NetConfig, ips: &[GuestIp]| guest_word(Some(net), ips).unwrap();
        assert_eq!(said(&user(&[]), &[]), "hyv.net=dhcp;fec0::15/64,fec0::2");
        assert_eq!(
            said(&tap, &[ip("10.0.0.2/24"), ip("fd00::2/64")]),
            "hyv.net=10.0.0.2/24;fd00::2/64"
        );
        assert_eq!(
            said(&user(&[]), &[ip("10.0.0.2/24")]),
            "hyv.net=10.0.0.2/24;fec0::15/64,fec0::2"
        );
    }

    #[test]
    fn qemus_options() {
        let [_, netdev, _, device] =
            options(&user(&["0:7", "1.2.3.4:8:9"]), &[], None, 0x1234_5678);
        assert_eq!(
            netdev,
            "user,id=net,hostfwd=tcp:127.0.0.1:0-10.0.2.15:7,hostfwd=tcp:1.2.3.4:8-10.0.2.15:9"
        );
        assert!(
            device.contains("mac=52:54:00:34:56:78") && !device.contains("host_mtu"),
            "{device}"
        );
        let ips = [ip("fd00::2/64"), ip("10.1.0.9/24,10.1.0.1")];
        let [_, netdev, ..] = options(&user(&["5:6"]), &ips, None, 1);
        assert_eq!(
            netdev,
            "user,id=net,net=10.1.0.9/24,host=10.1.0.1,hostfwd=tcp:127.0.0.1:5-10.1.0.9:6"
        );
        let tap = NetConfig::Tap { name: "t".into() };
        let [_, netdev, _, device] = options(&tap, &[], Some((7, 9000)), 1);
        assert_eq!(netdev, "tap,id=net,fd=7");
        assert!(device.ends_with(",host_mtu=9000"), "{device}");
    }

    #[test]
    fn a_taken_port_is_found_before_qemu_starts() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let e = Backend::open(&user(&[&format!("{port}:80")])).unwrap_err();
        assert!(e.to_string().contains(&format!("127.0.0.1:{port}")), "{e}");
        Backend::open(&user(&["0:80"])).unwrap();
    }

    #[test]
    fn forwards_in_qemus_words() {
        let text = "Hub -1 (net):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                    TCP[HOST_FORWARD]   8       127.0.0.1 46799       10.0.2.15  7000     0     0\r\n  \
                    TCP[ESTABLISHED]    9       127.0.0.1 46799       10.0.2.15  7000     0     0\r\n  TCP[HOST_FORWARD] x\r\n";
        let found = parse_usernet(text);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].host.to_string().as_str(), found[0].guest),
            ("127.0.0.1:46799", 7000)
        );
    }
}
