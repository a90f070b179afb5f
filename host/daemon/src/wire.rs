//! The way to other hosts: which address the device has, and what carries its packets.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

pub use hyv_carrier::ListenAddr;
use hyv_carrier::addr::{ip_of, is_link_local};
use hyv_carrier::netlink::{Netlink, RTN_LOCAL, RTN_UNICAST};
use hyv_carrier::record::Recorded;
use hyv_carrier::{Choice, OpenError, Options};
use hyv_roce::carrier::{Arrival, Carrier, Flow, Gid, Sent};

/// Flags about the wire, shared by all programs that hold a device.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct WireConfig {
    /// Address of this machine that the device gets: its GID, reachable from other hosts by RoCEv2 (UDP port 4791). Without it
    /// everything stays on this host and no socket is opened
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<ListenAddr>,
    /// What carries packets: packet (AF_PACKET; needs CAP_NET_RAW, half the latency), udp (no privilege), or auto
    #[arg(
        long,
        value_name = "auto|udp|packet",
        default_value = "auto",
        requires = "listen"
    )]
    pub carrier: Choice,
    /// Record what the device sends and receives in FILE, which Wireshark and `pcap check` read
    #[arg(long, value_name = "FILE", requires = "listen")]
    pub pcap: Option<PathBuf>,
    /// Mark packets with this DSCP, 0 to 63, where a queue pair's path names no traffic class
    #[arg(long, value_name = "DSCP", requires = "listen", value_parser = clap::value_parser!(u8).range(0..64))]
    pub dscp: Option<u8>,
}

/// The way to other hosts.
pub struct Opened {
    /// What carries packets.
    pub carrier: Box<dyn Carrier>,
    /// Descriptors to sleep on: readable while packets wait.
    pub wait_fds: Vec<OwnedFd>,
    /// Which hosts it leads to.
    pub routes: Routes,
}

/// Which hosts can be reached, as the kernel's routing table says.
#[derive(Debug)]
pub struct Routes {
    netlink: Mutex<Netlink>,
    /// Index of the interface that has the address, for link-local destinations.
    interface: Option<u32>,
}

impl Routes {
    fn open(gid: &Gid) -> std::io::Result<Self> {
        let ip = ip_of(gid);
        let mut netlink = Netlink::open()?;
        let found = netlink.addresses()?.into_iter().find(|a| a.ip == ip);
        Ok(Self {
            netlink: Mutex::new(netlink),
            interface: found.map(|a| a.interface),
        })
    }

    /// Whether packets can go from one address to another.
    #[must_use]
    pub fn has(&self, src: &Gid, dst: &Gid) -> bool {
        let (src, dst) = (ip_of(src), ip_of(dst));
        if src.is_ipv4() != dst.is_ipv4() {
            return false;
        }
        let by = self.interface.filter(|_| is_link_local(dst));
        let mut netlink = self.netlink.lock().unwrap_or_else(PoisonError::into_inner);
        netlink
            .route(dst, Some(src), by)
            .is_ok_and(|r| matches!(r.kind, RTN_UNICAST | RTN_LOCAL))
    }
}

/// A carrier whose packets are marked, where their path asks for no mark of its own.
struct Marked {
    inner: Box<dyn Carrier>,
    traffic_class: u8,
}

impl Marked {
    fn mark(&self, flow: &Flow) -> Flow {
        match flow.traffic_class {
            0 => Flow {
                traffic_class: self.traffic_class,
                ..*flow
            },
            _ => *flow,
        }
    }
}

impl Carrier for Marked {
    fn local(&self) -> Gid {
        self.inner.local()
    }

    fn link_mtu(&self) -> usize {
        self.inner.link_mtu()
    }

    fn burst(&self, flow: &Flow) -> (usize, usize) {
        self.inner.burst(&self.mark(flow))
    }

    fn source_ports(&self) -> (u16, u16) {
        self.inner.source_ports()
    }

    fn ident(&self, index: usize) -> u16 {
        self.inner.ident(index)
    }

    fn send(&mut self, flow: &Flow, segment_len: usize, payloads: &[u8]) -> Sent {
        // The ICRC covers ones in place of the traffic class, so it stays right.
        let flow = self.mark(flow);
        self.inner.send(&flow, segment_len, payloads)
    }

    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize {
        self.inner.receive(take)
    }

    fn cheap_poll(&self) -> bool {
        self.inner.cheap_poll()
    }

    fn takes_company(&self) -> bool {
        self.inner.takes_company()
    }
}

/// Why there is no way to other hosts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// No carrier on that address.
    #[error("--listen {addr}: {source}")]
    Open {
        /// The address.
        addr: String,
        /// Why.
        source: OpenError,
    },
    /// No recording.
    #[error("--pcap {}: {source}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No routing table.
    #[error("--listen: cannot ask the kernel for routes: {0}")]
    Routes(std::io::Error),
}

impl WireConfig {
    /// IPv4 TOS or IPv6 traffic class of what carries no mark of its own.
    #[must_use]
    pub fn traffic_class(&self) -> u8 {
        self.dscp.unwrap_or(0) << 2
    }

    /// Opens the carrier, in the network namespace of the calling thread; `None` without an address.
    ///
    /// # Errors
    /// See [`WireError`].
    pub fn open(&self) -> Result<Option<Opened>, WireError> {
        let Some(addr) = &self.listen else {
            return Ok(None);
        };
        let (carrier, info) =
            hyv_carrier::open(self.carrier, addr, &Options::default()).map_err(|source| {
                WireError::Open {
                    addr: addr.to_string(),
                    source,
                }
            })?;
        tracing::info!("{info}");
        let carrier = match &self.pcap {
            None => carrier,
            Some(path) => {
                let recorded =
                    Recorded::new(carrier, path).map_err(|source| WireError::Record {
                        path: path.clone(),
                        source,
                    })?;
                Box::new(recorded)
            }
        };
        let carrier = match self.traffic_class() {
            0 => carrier,
            traffic_class => Box::new(Marked {
                inner: carrier,
                traffic_class,
            }),
        };
        Ok(Some(Opened {
            routes: Routes::open(&carrier.local()).map_err(WireError::Routes)?,
            carrier,
            wait_fds: info.wait_fds,
        }))
    }
}
