//! smoltcp on a card, polled by whoever waits for something.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::time::Duration;

use smoltcp::iface::{Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::dhcpv4;
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint, Ipv6Address, Ipv6Cidr,
};

use crate::config::Config;
use crate::error::Error;
use crate::limits::{
    EPHEMERAL, ETHERNET_HEADER, FIRST_EPHEMERAL, FRAMES_PER_POLL, LINGER, MAX_LEFTOVERS,
};
use crate::nic::{Nic, Surroundings};

/// The card as smoltcp's device. Frames are copied in and out: some 50 ns each, and the queues stay simple.
struct Port {
    nic: Box<dyn Nic>,
    arrived: Vec<u8>,
    leaving: Vec<u8>,
}

struct Arrived<'a>(&'a [u8]);

struct Leaving<'a> {
    nic: &'a mut dyn Nic,
    frame: &'a mut [u8],
}

impl RxToken for Arrived<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        // smoltcp keeps to the MTU that it was told.
        let frame = &mut self.frame[..len];
        let result = f(frame);
        self.nic.send(frame);
        result
    }
}

impl Device for Port {
    type RxToken<'a> = Arrived<'a>;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived<'_>, Leaving<'_>)> {
        // A frame may be answered at once, so it is taken only when the answer has room.
        if !self.nic.can_send() {
            return None;
        }
        let len = self.nic.receive(&mut self.arrived)?;
        let leaving = Leaving {
            nic: &mut *self.nic,
            frame: &mut self.leaving,
        };
        Some((Arrived(&self.arrived[..len]), leaving))
    }

    fn transmit(&mut self, _: Instant) -> Option<Leaving<'_>> {
        self.nic.can_send().then_some(Leaving {
            nic: &mut *self.nic,
            frame: &mut self.leaving,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = usize::from(self.nic.mtu()) + ETHERNET_HEADER;
        capabilities
    }
}

/// A connection that its owner has left, and when its time is over.
struct Leftover {
    socket: SocketHandle,
    deadline_ns: u64,
}

pub(crate) struct Stack {
    iface: Interface,
    port: Port,
    pub(crate) sockets: SocketSet<'static>,
    dhcp: Option<SocketHandle>,
    leftovers: Vec<Leftover>,
    /// Ports with a listener.
    claimed: Vec<u16>,
    next_port: u16,
}

fn instant(now_ns: u64) -> Instant {
    Instant::from_micros((now_ns / 1000).cast_signed())
}

impl Stack {
    /// One round: frames in, sockets served, frames out. True if anything may have changed.
    fn poll(&mut self, now_ns: u64) -> bool {
        let now = instant(now_ns);
        let mut changed = false;
        for _ in 0..FRAMES_PER_POLL {
            match self
                .iface
                .poll_ingress_single(now, &mut self.port, &mut self.sockets)
            {
                PollIngressSingleResult::None => break,
                PollIngressSingleResult::PacketProcessed => {}
                PollIngressSingleResult::SocketStateChanged => changed = true,
            }
        }
        let out = self
            .iface
            .poll_egress(now, &mut self.port, &mut self.sockets);
        changed |= out == PollResult::SocketStateChanged;
        self.lease();
        self.reap(now_ns);
        self.port.nic.flush();
        changed
    }

    /// Takes over what the DHCP server says.
    fn lease(&mut self) {
        let Some(dhcp) = self.dhcp else { return };
        let event = self.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp).poll();
        let (address, router) = match event {
            None => return,
            // Said at the start too.
            Some(dhcpv4::Event::Deconfigured) if self.iface.ipv4_addr().is_none() => return,
            Some(dhcpv4::Event::Deconfigured) => (None, None),
            Some(dhcpv4::Event::Configured(c)) => (Some(IpCidr::Ipv4(c.address)), c.router),
        };
        // A server that hands out an address that no host can have is not obeyed.
        let address = address.filter(|a| a.address().is_unicast());
        self.iface.update_ip_addrs(|addresses| {
            addresses.retain(|a| !matches!(a, IpCidr::Ipv4(_)));
            // One place is kept for it, see `Net::new`.
            let _ = address.map(|a| addresses.insert(0, a));
        });
        let routes = self.iface.routes_mut();
        routes.remove_default_ipv4_route();
        if let Some(router) = router {
            // The place of the one just removed.
            let _ = routes.add_default_ipv4_route(router);
        }
        match address {
            Some(a) => log::info!("DHCP: {a}"),
            None => log::warn!("DHCP: the lease is over"),
        }
    }

    /// Ends connections that nobody owns any more, when they are through or late.
    fn reap(&mut self, now_ns: u64) {
        let sockets = &mut self.sockets;
        // The first are the oldest: where there are too many, they are late.
        let mut surplus = self.leftovers.len().saturating_sub(MAX_LEFTOVERS);
        self.leftovers.retain(|l| {
            let socket = sockets.get_mut::<Socket<'_>>(l.socket);
            let late = now_ns >= l.deadline_ns || surplus > 0;
            surplus = surplus.saturating_sub(1);
            let keep = match (socket.state(), socket.remote_endpoint()) {
                // Through.
                (State::Closed, None) => false,
                // What remains is a reset to send, or a peer's repeated FIN to answer.
                (State::Closed | State::TimeWait, _) => !late,
                _ if late => {
                    socket.abort();
                    true
                }
                _ => true,
            };
            if !keep {
                sockets.remove(l.socket);
            }
            keep
        });
    }

    /// Takes `port` for a listener, if no other has it.
    pub(crate) fn claim(&mut self, port: u16) -> bool {
        let free = !self.claimed.contains(&port);
        if free {
            self.claimed.push(port);
        }
        free
    }

    pub(crate) fn unclaim(&mut self, port: u16) {
        self.claimed.retain(|p| *p != port);
    }

    pub(crate) fn add_tcp(&mut self) -> SocketHandle {
        let buffer =
            || smoltcp::socket::tcp::SocketBuffer::new(vec![0; crate::limits::SOCKET_BUFFER]);
        let mut socket = Socket::new(buffer(), buffer());
        // Requests and answers are written whole.
        socket.set_nagle_enabled(false);
        self.sockets.add(socket)
    }

    pub(crate) fn tcp(&mut self, socket: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(socket)
    }

    /// Gives a connection away: its peer learns of the end as soon as possible.
    pub(crate) fn leave(&mut self, socket: SocketHandle, now_ns: u64) {
        self.tcp(socket).close();
        self.leftovers.push(Leftover {
            socket,
            deadline_ns: now_ns + LINGER.as_nanos() as u64,
        });
    }

    /// Whether a connection or a listener has local port `port`.
    fn port_used(&self, port: u16) -> bool {
        let talks = |s: &smoltcp::socket::Socket<'_>| match s {
            smoltcp::socket::Socket::Tcp(s) => s.local_endpoint().is_some_and(|e| e.port == port),
            _ => false,
        };
        self.claimed.contains(&port) || self.sockets.iter().any(|(_, s)| talks(s))
    }

    /// Sends a SYN from a port of our own.
    pub(crate) fn connect(&mut self, socket: SocketHandle, to: IpEndpoint) -> Result<(), Error> {
        if !to.addr.is_unicast() {
            return Err(Error::Unaddressable);
        }
        let port = (0..EPHEMERAL)
            .map(|i| FIRST_EPHEMERAL + self.next_port.wrapping_add(i) % EPHEMERAL)
            .find(|p| !self.port_used(*p))
            .ok_or(Error::NoPort)?;
        self.next_port = (port - FIRST_EPHEMERAL + 1) % EPHEMERAL;
        let context = self.iface.context();
        self.sockets
            .get_mut::<Socket<'_>>(socket)
            .connect(context, to, port)
            .map_err(|_| Error::Unaddressable)
    }
}

/// The network. Clones are the same network.
#[derive(Clone)]
pub struct Net {
    stack: Rc<RefCell<Stack>>,
    around: Rc<dyn Surroundings>,
}

impl core::fmt::Debug for Net {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Net").finish_non_exhaustive()
    }
}

/// The address that every interface makes for itself (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Address {
    let [a, b, c, d, e, f] = mac;
    let id = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    Ipv6Address::from_bits(0xfe80 << 112 | u128::from(u64::from_be_bytes(id)))
}

impl Net {
    /// Over `nic`. `seed` differs from start to start: ports and sequence numbers follow from it.
    ///
    /// # Errors
    /// [`Error::Device`] when the card's hardware address is none.
    pub fn new(
        nic: Box<dyn Nic>,
        around: Rc<dyn Surroundings>,
        config: &Config,
        seed: u64,
    ) -> Result<Self, Error> {
        let mac = EthernetAddress(nic.mac());
        if !mac.is_unicast() {
            return Err(Error::Device("the network card's address is not unicast"));
        }
        let frame = usize::from(nic.mtu()) + ETHERNET_HEADER;
        let mut port = Port {
            nic,
            arrived: vec![0; frame],
            leaving: vec![0; frame],
        };
        let mut setup = smoltcp::iface::Config::new(HardwareAddress::Ethernet(mac));
        setup.random_seed = seed;
        let now = instant(around.now_ns());
        let mut iface = Interface::new(setup, &mut port, now);
        let full = |_| Error::Config("too many addresses");
        let mut result = Ok(());
        iface.update_ip_addrs(|addresses| {
            let own = IpCidr::Ipv6(Ipv6Cidr::new(link_local(mac.0), 64));
            let all = config.addresses.iter().copied().chain([own]);
            result = all
                .into_iter()
                .try_for_each(|a| addresses.push(a).map_err(full));
            if config.dhcp && addresses.is_full() {
                result = Err(Error::Config("too many addresses"));
            }
        });
        result?;
        for gateway in &config.gateways {
            let routes = iface.routes_mut();
            let added = match *gateway {
                IpAddress::Ipv4(g) => routes.add_default_ipv4_route(g),
                IpAddress::Ipv6(g) => routes.add_default_ipv6_route(g),
            };
            added.map_err(|_| Error::Config("too many gateways"))?;
        }
        let mut sockets = SocketSet::new(Vec::new());
        let dhcp = config.dhcp.then(|| sockets.add(dhcpv4::Socket::new()));
        let stack = Stack {
            iface,
            port,
            sockets,
            dhcp,
            leftovers: Vec::new(),
            claimed: Vec::new(),
            next_port: (seed >> 16) as u16 % EPHEMERAL,
        };
        let net = Self {
            stack: Rc::new(RefCell::new(stack)),
            around,
        };
        net.poll();
        Ok(net)
    }

    /// Serves the network once, without waiting. Whoever does something else for long calls it now and then, so that peers get
    /// their answers. True if anything may have changed.
    pub fn poll(&self) -> bool {
        self.with(|stack, now| stack.poll(now))
    }

    /// Waits until there is an IPv4 address; at once where none was asked for.
    ///
    /// # Errors
    /// [`Error::NoLease`] after `limit`, [`Error::Ending`].
    pub fn wait_configured(&self, limit: Duration) -> Result<(), Error> {
        let ready = |s: &mut Stack| s.dhcp.is_none() || s.iface.ipv4_addr().is_some();
        match self.until(Some(limit), true, |s| ready(s).then_some(Ok(()))) {
            Err(Error::TimedOut) => Err(Error::NoLease),
            other => other,
        }
    }

    /// This guest's addresses, link-local ones among them.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpCidr> {
        self.stack.borrow().iface.ip_addrs().to_vec()
    }

    /// Sleeps until a frame arrives, something is due, or `limit` is over; may return early. For loops that do other work too.
    pub fn wait(&self, limit: Duration) {
        let now = self.around.now_ns();
        self.sleep(now.saturating_add(nanos(limit)));
    }

    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut Stack, u64) -> R) -> R {
        let now = self.around.now_ns();
        f(&mut self.stack.borrow_mut(), now)
    }

    /// Polls until `done` says something, and sleeps where there is nothing to do. `limit` none: for ever. If `heed`, the host's request to
    /// end this guest ends the wait too.
    pub(crate) fn until<R>(
        &self,
        limit: Option<Duration>,
        heed: bool,
        mut done: impl FnMut(&mut Stack) -> Option<Result<R, Error>>,
    ) -> Result<R, Error> {
        let start = self.around.now_ns();
        let deadline = limit.map_or(u64::MAX, |l| start.saturating_add(nanos(l)));
        let mut idle_since = start;
        loop {
            let (changed, result) = self.with(|stack, now| {
                let before = done(stack);
                if before.is_some() {
                    // What was done may be for the wire.
                    stack.poll(now);
                    return (true, before);
                }
                (stack.poll(now), done(stack))
            });
            if let Some(result) = result {
                return result;
            }
            let now = self.around.now_ns();
            if now >= deadline {
                return Err(Error::TimedOut);
            }
            if heed && self.around.ending() {
                return Err(Error::Ending);
            }
            if changed {
                idle_since = now;
            } else if now.saturating_sub(idle_since) >= self.around.spin_ns() {
                self.sleep(deadline);
                idle_since = self.around.now_ns();
            }
        }
    }

    /// Sleeps to `deadline` at most, unless there is something to do.
    fn sleep(&self, deadline: u64) {
        let seen = self.around.wake_seen();
        let (busy, until) = self.with(|stack, now| {
            let busy = stack.port.nic.arm();
            // What is due has to wait for room.
            let due = match stack.port.nic.can_send() {
                true => stack.iface.poll_delay(instant(now), &stack.sockets),
                false => None,
            };
            let due = due.map_or(u64::MAX, |d| {
                now.saturating_add(d.total_micros().saturating_mul(1000))
            });
            let capped = now.saturating_add(self.around.max_sleep_ns());
            (busy || due <= now, deadline.min(due).min(capped))
        });
        if !busy {
            self.around.wait(seen, until);
        }
        self.with(|stack, _| stack.port.nic.disarm());
    }
}

pub(crate) fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}
