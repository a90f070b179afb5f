//! Addresses as the command line gives them.

use alloc::vec::Vec;
use core::str::FromStr;

use smoltcp::wire::{IpAddress, IpCidr};

use crate::error::Error;
use crate::limits::MAX_ADDRESSES;

/// How a guest gets its addresses: words between `;`, each `dhcp` or `ADDRESS/PREFIX[,GATEWAY]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Ask for an IPv4 address.
    pub dhcp: bool,
    /// Fixed addresses.
    pub addresses: Vec<IpCidr>,
    /// At most one default gateway of each family.
    pub gateways: Vec<IpAddress>,
}

impl Default for Config {
    /// DHCP.
    fn default() -> Self {
        Self {
            dhcp: true,
            addresses: Vec::new(),
            gateways: Vec::new(),
        }
    }
}

impl FromStr for Config {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = Error::Config;
        let mut config = Self {
            dhcp: false,
            ..Self::default()
        };
        for word in text.split(';') {
            if word == "dhcp" {
                config.dhcp = true;
                continue;
            }
            let (address, gateway) = match word.split_once(',') {
                Some((a, g)) => (a, Some(g)),
                None => (word, None),
            };
            let address: IpCidr = address
                .parse()
                .map_err(|()| wrong("not `dhcp` and not ADDRESS/PREFIX[,GATEWAY]"))?;
            if !is_hosts(address.address()) {
                return Err(wrong("no host can have this address"));
            }
            config.addresses.push(address);
            let Some(gateway) = gateway else { continue };
            let gateway: IpAddress = gateway
                .parse()
                .map_err(|()| wrong("the gateway is no address"))?;
            if gateway.version() != address.address().version() || !is_hosts(gateway) {
                return Err(wrong("the gateway is no host of the address's family"));
            }
            if config
                .gateways
                .iter()
                .any(|g| g.version() == gateway.version())
            {
                return Err(wrong("two gateways of one family"));
            }
            config.gateways.push(gateway);
        }
        let v4 = |a: &IpCidr| matches!(a, IpCidr::Ipv4(_));
        let v4 = config.addresses.iter().filter(|a| v4(a)).count() + usize::from(config.dhcp);
        if v4 > 1 {
            return Err(wrong(
                "one IPv4 address, by DHCP or as given, is all there may be",
            ));
        }
        if config.addresses.len() + usize::from(config.dhcp) > MAX_ADDRESSES {
            return Err(wrong("more than 3 addresses"));
        }
        Ok(config)
    }
}

fn is_hosts(address: IpAddress) -> bool {
    let loopback = match address {
        IpAddress::Ipv4(a) => a.is_loopback(),
        IpAddress::Ipv6(a) => a.is_loopback(),
    };
    address.is_unicast() && !loopback
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    fn parse(text: &str) -> Result<Config, Error> {
        text.parse()
    }

    #[test]
    fn good_texts() {
        assert_eq!(parse("dhcp"), Ok(Config::default()));
        let c = parse("10.0.0.2/24,10.0.0.1;fd00::2/64,fd00::1;fd01::2/64").unwrap();
        assert!(!c.dhcp);
        let addresses: Vec<_> = c.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.0.0.2/24", "fd00::2/64", "fd01::2/64"]);
        let gateways: Vec<_> = c.gateways.iter().map(ToString::to_string).collect();
        assert_eq!(gateways, ["10.0.0.1", "fd00::1"]);
        let c = parse("dhcp;fec0::15/64,fec0::2").unwrap();
        assert!(c.dhcp && c.addresses.len() == 1 && c.gateways.len() == 1);
    }

    #[test]
    fn wrong_texts() {
        for (text, part) in [
            ("", "ADDRESS/PREFIX"),
            ("dhcp;", "ADDRESS/PREFIX"),
            ("10.0.0.2", "ADDRESS/PREFIX"),
            ("10.0.0.2/33", "ADDRESS/PREFIX"),
            ("10.0.0.2/24,", "gateway"),
            ("10.0.0.2/24,x", "gateway"),
            ("10.0.0.2/24,fd00::1", "family"),
            ("10.0.0.2/24,224.0.0.1", "family"),
            ("0.0.0.0/0", "no host"),
            ("127.0.0.1/8", "no host"),
            ("224.0.0.1/4", "no host"),
            ("255.255.255.255/0", "no host"),
            ("::1/128", "no host"),
            ("ff02::1/64", "no host"),
            ("10.0.0.2/24;10.0.0.3/24", "one IPv4"),
            ("dhcp;10.0.0.3/24", "one IPv4"),
            ("fd00::2/64,fd00::1;fd00::3/64,fd00::4", "two gateways"),
            ("fd00::2/64;fd00::3/64;fd00::4/64;fd00::5/64", "more than 3"),
            ("dhcp;fd00::2/64;fd00::3/64;fd00::4/64", "more than 3"),
        ] {
            let said = parse(text).unwrap_err().to_string();
            assert!(said.contains(part), "{text}: {said}");
        }
    }
}
