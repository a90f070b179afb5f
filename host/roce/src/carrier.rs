//! What carries packets between hosts, seen from the transport.

/// A GID: an IPv6 address, or an IPv4 address mapped into one (`::ffff:a.b.c.d`).
pub type Gid = [u8; 16];

/// UDP destination port of RoCEv2.
pub const UDP_PORT: u16 = 4791;
/// Hop limit (TTL) where an address names none; what Linux sends.
pub const DEFAULT_HOP_LIMIT: u8 = 64;

/// Where packets go, and what their IP and UDP headers say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Flow {
    /// Destination.
    pub dst: Gid,
    /// UDP source port, 0xC000 to 0xFFFF; one of [`Carrier::source_ports`].
    pub src_port: u16,
    /// IPv4 TOS or IPv6 traffic class: DSCP and ECN.
    pub traffic_class: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// IPv6 flow label, 20 bits; 0 over IPv4.
    pub flow_label: u32,
}

/// A packet that came in.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    /// Sender.
    pub src: Gid,
    /// Which of this host's addresses it went to.
    pub dst: Gid,
    /// UDP source port.
    pub src_port: u16,
    /// IPv4 TOS or IPv6 traffic class.
    pub traffic_class: u8,
    /// TTL or hop limit as it arrived.
    pub hop_limit: u8,
    /// IPv4 identification, where the carrier sees it; `None` for IPv6 (which has none) and where it is hidden.
    pub ident: Option<u16>,
    /// From BTH to ICRC, both included.
    pub payload: &'a [u8],
}

/// How sending went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sent {
    /// All segments are on their way.
    All,
    /// No room now; nothing was sent. Try again a little later.
    Busy,
    /// It cannot be sent (no route, unreachable, link down): as if the network had lost it.
    Lost,
}

/// Sends and receives RoCEv2 packets of one address. Not on the data path between QPs of one host.
///
/// A *burst* is several packets to one flow in one call, all of `segment_len` bytes but the last, which may be shorter: what
/// segmentation offload (UDP GSO) takes.
pub trait Carrier: Send {
    /// This end's address.
    fn local(&self) -> Gid;

    /// Bytes of the largest IP packet that the link takes. May change.
    fn link_mtu(&self) -> usize;

    /// Most packets and most bytes (from BTH to ICRC, all packets together) of a burst to `flow`.
    fn burst(&self, flow: &Flow) -> (usize, usize);

    /// UDP source ports that may be used: first and count, contiguous. QPs are spread over them.
    fn source_ports(&self) -> (u16, u16);

    /// The IPv4 identification that segment `index` of a burst will carry: the ICRC covers it.
    fn ident(&self, index: usize) -> u16;

    /// Sends a burst: `payloads` is whole packets back to back, each from BTH to ICRC.
    fn send(&mut self, flow: &Flow, segment_len: usize, payloads: &[u8]) -> Sent;

    /// Hands over what has arrived, up to a batch of its own size; gives how many packets. Never blocks.
    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize;

    /// Whether looking for packets is as cheap as a load (a mapped ring), or a system call that a driver should ration.
    fn cheap_poll(&self) -> bool;

    /// Whether a small packet at the end of a burst costs as good as nothing. Where it does not, an acknowledgement goes alone, once
    /// what the peer waits for is on its way.
    fn takes_company(&self) -> bool;
}

impl<C: Carrier + ?Sized> Carrier for alloc::boxed::Box<C> {
    fn local(&self) -> Gid {
        (**self).local()
    }

    fn link_mtu(&self) -> usize {
        (**self).link_mtu()
    }

    fn burst(&self, flow: &Flow) -> (usize, usize) {
        (**self).burst(flow)
    }

    fn source_ports(&self) -> (u16, u16) {
        (**self).source_ports()
    }

    fn ident(&self, index: usize) -> u16 {
        (**self).ident(index)
    }

    fn send(&mut self, flow: &Flow, segment_len: usize, payloads: &[u8]) -> Sent {
        (**self).send(flow, segment_len, payloads)
    }

    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize {
        (**self).receive(take)
    }

    fn cheap_poll(&self) -> bool {
        (**self).cheap_poll()
    }

    fn takes_company(&self) -> bool {
        (**self).takes_company()
    }
}
