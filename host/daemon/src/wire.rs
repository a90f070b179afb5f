//! The way to other hosts: which address the device has, and what carries its packets.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use hyv_carrier::record::Recorded;
use hyv_carrier::{Choice, ListenAddr, OpenError, Options};
use hyv_roce::carrier::Carrier;

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
}

/// A carrier, and the descriptors to sleep on.
pub type Opened = (Box<dyn Carrier>, Vec<OwnedFd>);

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
}

impl WireConfig {
    /// Opens the carrier, in the network namespace of the calling thread; with it come descriptors to sleep on. `None` without an address.
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
        Ok(Some((carrier, info.wait_fds)))
    }
}
