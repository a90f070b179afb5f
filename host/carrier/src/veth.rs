//! Two hosts on one machine: network namespaces without names, joined by a veth pair. Nothing is left of them when they are
//! dropped or the process ends, however it ends.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::floor::End;
use crate::sys::netns::{self, Namespace};

/// Why there are no two hosts.
#[derive(Debug, thiserror::Error)]
pub enum VethError {
    /// No namespace.
    #[error(
        "cannot make a network namespace: {0}; run as root (CAP_SYS_ADMIN and CAP_NET_ADMIN are needed)"
    )]
    Namespace(io::Error),
    /// No `ip` program.
    #[error("cannot run `ip`: {0}; install iproute2")]
    NoIp(io::Error),
    /// A link that was refused.
    #[error("`ip {arguments}` in a network namespace: {said}")]
    Ip {
        /// Its arguments.
        arguments: String,
        /// What it said.
        said: String,
    },
}

/// Two namespaces, each with one end of a veth pair and an IPv4 address.
#[derive(Debug)]
pub struct Veth {
    _namespaces: [Namespace; 2],
    ends: [End; 2],
}

/// The interface's name in either namespace.
const INTERFACE: &str = "hyv0";

impl Veth {
    /// Makes them. `mtu`: bytes of the largest IP packet of the link.
    ///
    /// # Errors
    /// See [`VethError`].
    pub fn new(mtu: usize) -> Result<Veth, VethError> {
        let make = || Namespace::new().map_err(VethError::Namespace);
        let namespaces = [make()?, make()?];
        let paths = [namespaces[0].path(), namespaces[1].path()];
        let other = paths[1].display();
        let pair = format!("link add {INTERFACE} type veth peer name {INTERFACE} netns {other}");
        ip(&paths[0], &pair)?;
        let mut at = 0;
        let ends = paths.map(|path| {
            at += 1;
            (path, std::net::IpAddr::from([10, 74, 0, at]))
        });
        for (path, addr) in &ends {
            ip(path, "link set lo up")?;
            ip(path, &format!("addr add {addr}/24 dev {INTERFACE}"))?;
            ip(path, &format!("link set {INTERFACE} mtu {mtu} up"))?;
        }
        Ok(Veth {
            _namespaces: namespaces,
            ends: ends.map(|(path, addr)| End {
                addr: addr.into(),
                netns: Some(path),
                cpu: None,
            }),
        })
    }

    /// Both ends, on any CPU.
    #[must_use]
    pub fn ends(&self) -> [End; 2] {
        self.ends.clone()
    }
}

/// Runs `ip` in a namespace.
fn ip(inside: &Path, arguments: &str) -> Result<(), VethError> {
    let run = || -> Result<std::process::Output, VethError> {
        netns::enter(inside).map_err(VethError::Namespace)?;
        Command::new("ip")
            .args(arguments.split_ascii_whitespace())
            .stdin(Stdio::null())
            .output()
            .map_err(VethError::NoIp)
    };
    // A child is in the namespace of the thread that forks it.
    let output = std::thread::scope(|scope| scope.spawn(run).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    if output.status.success() {
        return Ok(());
    }
    Err(VethError::Ip {
        arguments: arguments.into(),
        said: String::from_utf8_lossy(&output.stderr).trim().into(),
    })
}
