//! Address handles, and what precedes a datagram.

use alloc::sync::Arc;
use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};

use hyv_abi::control::{CreateAh, DestroyAh};

use crate::context::Gid;
use crate::error::Error;
use crate::mr::{PdInner, ProtectionDomain};
use crate::wr::Datagram;

/// Where datagrams go, as `struct ibv_ah_attr`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AhAttr {
    /// The peer's GID; [`Gid::LOCAL`] for this device.
    pub dest_gid: Gid,
    /// Index of the GID to send from ([`crate::Context::query_gid`]).
    pub sgid_index: u32,
    /// Traffic class (DSCP and ECN).
    pub traffic_class: u8,
    /// Hop limit; 0 takes the device's.
    pub hop_limit: u8,
    /// IPv6 flow label, 20 bits.
    pub flow_label: u32,
    /// Port; 1.
    pub port_num: u32,
}

impl AhAttr {
    /// To a peer, with the usual rest.
    #[must_use]
    pub const fn to(dest_gid: Gid) -> Self {
        Self {
            dest_gid,
            sgid_index: 0,
            traffic_class: 0,
            hop_limit: 64,
            flow_label: 0,
            port_num: 1,
        }
    }

    /// Back to where a datagram came from (`ibv_init_ah_from_wc`).
    #[must_use]
    pub const fn reply_to(grh: &Grh) -> Self {
        Self {
            traffic_class: grh.traffic_class,
            flow_label: grh.flow_label,
            ..Self::to(grh.src)
        }
    }
}

/// An address handle (`struct ibv_ah`), destroyed when dropped. Keep it until the sends that name it have completed.
pub struct AddressHandle {
    pd: Arc<PdInner>,
    handle: u32,
    alive: bool,
}

impl fmt::Debug for AddressHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddressHandle({:#x})", self.handle)
    }
}

impl ProtectionDomain {
    /// Makes an address handle (`ibv_create_ah`).
    ///
    /// # Errors
    /// As any control verb: EHOSTUNREACH for an address without a route, EINVAL for a GID index or port that does not exist,
    /// ENOMEM beyond the quota.
    pub fn create_ah(&self, attr: &AhAttr) -> Result<AddressHandle, Error> {
        let reply = self.inner.context.call(&CreateAh {
            pd: self.inner.handle,
            port_num: attr.port_num,
            dest_gid: attr.dest_gid.0,
            sgid_index: attr.sgid_index,
            traffic_class: u32::from(attr.traffic_class),
            hop_limit: u32::from(attr.hop_limit),
            flow_label: attr.flow_label,
        })?;
        Ok(AddressHandle {
            pd: Arc::clone(&self.inner),
            handle: reply.handle,
            alive: true,
        })
    }
}

impl AddressHandle {
    /// A queue pair there, for [`crate::SendOp::SendTo`].
    #[inline]
    #[must_use]
    pub const fn to(&self, qpn: u32, qkey: u32) -> Datagram {
        Datagram {
            ah: self.handle,
            qpn,
            qkey,
        }
    }

    fn destroy_once(&mut self) -> Result<(), Error> {
        if !core::mem::take(&mut self.alive) {
            return Ok(());
        }
        let ah = self.handle;
        self.pd.context.call(&DestroyAh { ah }).map(|_| ())
    }

    /// Destroys it and says how that went (`ibv_destroy_ah`). Dropping does the same in silence.
    ///
    /// # Errors
    /// As any control verb.
    pub fn destroy(mut self) -> Result<(), Error> {
        self.destroy_once()
    }
}

impl Drop for AddressHandle {
    fn drop(&mut self) {
        let _ = self.destroy_once();
    }
}

/// The network header in the 40 bytes before a received datagram (with
/// [`crate::WorkCompletion::grh`] set; they count in its length). Over IPv4 it is in the last 20 of them, and the first 20 say
/// nothing (IBA 1.4, annex A17).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grh {
    /// Who sent it.
    pub src: Gid,
    /// To whom.
    pub dest: Gid,
    /// DSCP and ECN.
    pub traffic_class: u8,
    /// IPv6 flow label, 20 bits; 0 over IPv4.
    pub flow_label: u32,
    /// Hops left.
    pub hop_limit: u8,
}

impl Grh {
    /// Bytes of the area.
    pub const LEN: usize = 40;

    /// Reads it; `None` if it is neither an IPv4 nor an IPv6 header.
    #[must_use]
    pub fn parse(area: &[u8; Self::LEN]) -> Option<Self> {
        let v4: &[u8; 20] = area.last_chunk()?;
        let is_v6 = area[0] >> 4 == 6;
        // What is left of an older message may look like a version 6, so a good IPv4 header goes first then.
        let is_v4 = v4[0] >> 4 == 4 && (!is_v6 || (v4[0] == 0x45 && sums_up(v4)));
        if is_v4 {
            let at = |i: usize| Gid::from(Ipv4Addr::new(v4[i], v4[i + 1], v4[i + 2], v4[i + 3]));
            return Some(Self {
                src: at(12),
                dest: at(16),
                traffic_class: v4[1],
                flow_label: 0,
                hop_limit: v4[8],
            });
        }
        if !is_v6 {
            return None;
        }
        let (head, addrs) = area.split_first_chunk::<8>()?;
        let (src, rest) = addrs.split_first_chunk::<16>()?;
        let dest = rest.first_chunk::<16>()?;
        let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        Some(Self {
            src: Gid::from(Ipv6Addr::from(*src)),
            dest: Gid::from(Ipv6Addr::from(*dest)),
            traffic_class: (first >> 20) as u8,
            flow_label: first & 0xf_ffff,
            hop_limit: head[7],
        })
    }
}

/// Whether an IPv4 header's checksum is right (RFC 791).
fn sums_up(header: &[u8; 20]) -> bool {
    let (words, _) = header.as_chunks::<2>();
    let sum: u32 = words
        .iter()
        .map(|w| u32::from(u16::from_be_bytes(*w)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (folded & 0xffff) + (folded >> 16) == 0xffff
}
