//! Why a carrier cannot be opened, and what helps.

use std::io;
use std::net::IpAddr;

/// Why a carrier cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Not an address, or one that cannot be listened on.
    #[error("{text:?}: {reason}")]
    BadAddress {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No interface has this address.
    #[error("{ip} is not an address of this machine; it has {}", list(have))]
    NotHere {
        /// What was asked for.
        ip: IpAddr,
        /// Addresses of this machine, each with its interface.
        have: Vec<String>,
    },
    /// An IPv6 link-local address that several interfaces have, or a scope that none has.
    #[error("{ip} is link-local and needs its interface: {}", list(choices))]
    NeedsScope {
        /// What was asked for.
        ip: IpAddr,
        /// How to write it, one for each interface.
        choices: Vec<String>,
    },
    /// The kernel has not finished looking for duplicates of an IPv6 address.
    #[error(
        "{ip} on {interface} is still tentative (duplicate address detection); is the link up and its peer answering?"
    )]
    Tentative {
        /// The address.
        ip: IpAddr,
        /// Its interface.
        interface: String,
    },
    /// UDP port 4791 of the address is in use.
    #[error("UDP port 4791 of {ip} is taken by {owner}; stop that, or listen on another address")]
    PortTaken {
        /// The address.
        ip: IpAddr,
        /// Who has it, as far as /proc tells.
        owner: String,
    },
    /// Raw packets need a capability.
    #[error(
        "AF_PACKET on {ip} needs CAP_NET_RAW (run as root, or `setcap cap_net_raw+ep` the program); `--carrier udp` needs nothing"
    )]
    NotPermitted {
        /// The address.
        ip: IpAddr,
    },
    /// The interface is of a kind that has no Ethernet frames.
    #[error(
        "{interface} carries no Ethernet frames (hardware type {hardware}); use `--carrier udp`"
    )]
    NotEthernet {
        /// The interface.
        interface: String,
        /// `ARPHRD_*`.
        hardware: u16,
    },
    /// The kernel does not segment UDP for packet sockets.
    #[error(
        "AF_PACKET with UDP segmentation needs Linux 6.2 or newer, this is {release}; use `--carrier udp`"
    )]
    OldKernel {
        /// The kernel's release.
        release: String,
    },
    /// Anything else that the system refused.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        error: io::Error,
    },
}

impl OpenError {
    /// Whether it concerns packet sockets alone, so that UDP sockets may still work.
    pub(crate) fn is_about_packets(&self) -> bool {
        matches!(
            self,
            OpenError::NotPermitted { .. }
                | OpenError::NotEthernet { .. }
                | OpenError::OldKernel { .. }
                | OpenError::System { .. }
        )
    }

    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> OpenError {
        let what = what.into();
        move |error| OpenError::System { what, error }
    }
}

fn list(items: &[String]) -> String {
    if items.is_empty() {
        return "none".into();
    }
    items.join(", ")
}
