//! Carries RoCEv2 packets between hosts: UDP sockets and AF_PACKET rings behind [`hyv_roce::carrier::Carrier`].
//!
//! | carrier | needs | ICRC bits it can check | see |
//! | --- | --- | --- | --- |
//! | UDP | nothing | IPv4: 16 of 32 (the identification is hidden), IPv6: 32 | [`udp`] |
//! | AF_PACKET | CAP_NET_RAW, Linux 6.2, Ethernet or loopback | 32 | [`packet`] |
//!
//! Both own UDP port 4791 of one address of this machine and never of the wildcard.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hyv_roce::carrier::Sent;

pub mod addr;
pub mod error;
pub mod floor;
pub mod limits;
mod link;
pub mod netlink;
mod next_hop;
pub mod open;
pub mod owner;
pub mod packet;
pub mod record;
pub mod sys;
pub mod udp;
pub mod veth;

pub use addr::ListenAddr;
pub use error::OpenError;
pub use open::{Choice, open};
pub use packet::PacketCarrier;
pub use record::Recorded;
pub use udp::UdpCarrier;

/// Which carrier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// UDP sockets.
    Udp,
    /// AF_PACKET rings.
    Packet,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Udp => "udp",
            Kind::Packet => "packet",
        })
    }
}

/// Sizes that a user may want to change.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes asked for the UDP receive socket's buffer.
    pub receive_buffer: usize,
    /// Slots of the AF_PACKET receive ring, each of [`limits::SLOT_BYTES`].
    pub ring_slots: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            receive_buffer: limits::RECEIVE_BUFFER,
            ring_slots: limits::RING_SLOTS,
        }
    }
}

/// What a carrier counts. One thread counts, any may read.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets handed to the kernel.
    pub sent_packets: AtomicU64,
    /// Bytes of these, from BTH to ICRC.
    pub sent_bytes: AtomicU64,
    /// Bursts for which there was no room.
    pub busy: AtomicU64,
    /// Bursts that could not be sent.
    pub lost: AtomicU64,
    /// Packets received.
    pub received_packets: AtomicU64,
    /// Bytes of these, from BTH to ICRC.
    pub received_bytes: AtomicU64,
    /// Packets that the kernel dropped because the receive ring was full.
    pub ring_full: AtomicU64,
    /// Frames that were no proper UDP packets.
    pub malformed: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, by: usize) {
        // One writer: no read-modify-write instruction is needed.
        counter.store(
            counter.load(Ordering::Relaxed).wrapping_add(by as u64),
            Ordering::Relaxed,
        );
    }

    fn sent(&self, packets: usize, bytes: usize) -> Sent {
        Counters::add(&self.sent_packets, packets);
        Counters::add(&self.sent_bytes, bytes);
        Sent::All
    }

    fn failed(&self, how: Sent) -> Sent {
        match how {
            Sent::All => {}
            Sent::Busy => Counters::add(&self.busy, 1),
            Sent::Lost => Counters::add(&self.lost, 1),
        }
        how
    }

    fn received(&self, packets: usize, bytes: usize) {
        if packets > 0 {
            Counters::add(&self.received_packets, packets);
            Counters::add(&self.received_bytes, bytes);
        }
    }
}

/// What was opened: its `Display` is a line for the log.
#[derive(Debug)]
pub struct Info {
    /// Which carrier it is.
    pub carrier: Kind,
    /// The address.
    pub local: IpAddr,
    /// Its interface.
    pub interface: String,
    /// Bytes of the largest IP packet of the interface.
    pub mtu: usize,
    /// How many of the ICRC's 32 bits received packets can be checked by.
    pub icrc_bits: u8,
    /// How packets are received, with buffer or ring sizes.
    pub receive: String,
    /// UDP source ports: first and count.
    pub source_ports: (u16, u16),
    /// Why it is not the faster carrier, where that was tried.
    pub note: Option<String>,
    /// To sleep on: level-triggered, readable when packets wait. They are further descriptors of the carrier's sockets, so
    /// the port is free again only when these are closed too.
    pub wait_fds: Vec<OwnedFd>,
    /// What the carrier counts.
    pub counters: Arc<Counters>,
}

impl std::fmt::Display for Info {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (first, count) = self.source_ports;
        write!(
            f,
            "RoCEv2 on {} ({}, MTU {}) by {}: {}; source ports {first}-{}; checks {} of 32 ICRC bits",
            self.local,
            self.interface,
            self.mtu,
            self.carrier,
            self.receive,
            first + (count - 1),
            self.icrc_bits,
        )?;
        if self.icrc_bits < 32 {
            f.write_str(" (a UDP socket hides the IPv4 identification, which the ICRC covers)")?;
        }
        match &self.note {
            Some(note) => write!(f, ". {note}"),
            None => Ok(()),
        }
    }
}
