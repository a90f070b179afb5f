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
