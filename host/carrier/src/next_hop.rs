//! Where an Ethernet frame to an address goes: the kernel's routes and neighbours, remembered.
//!
//! A packet socket leaves the kernel no reason to resolve a neighbour or to verify an old entry. So a datagram to the discard
//! port (RFC 863) does: it makes the kernel ask, and is at most one a second and destination.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::time::Instant;

use hyv_roce::carrier::Gid;

use crate::addr::{Owned, ip_of, is_link_local};
use crate::limits;
use crate::netlink::{Neighbour, Netlink, RTN_LOCAL, RTN_UNICAST, nud};
use crate::sys::socket::{Control, RawAddr, Socket};

const DISCARD_PORT: u16 = 9;
/// Interfaces without neighbours (`IFF_NOARP`).
const IFF_NOARP: u32 = 0x80;

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

/// What is known of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resolved {
    To(Mac),
    /// It is this machine.
    Here,
    /// The kernel has been asked to find out.
    Wait,
    Nowhere,
}

/// What the kernel says, as far as this module needs it; tests have their own.
pub(crate) trait Kernel {
    /// Whether `dst` is this machine, and its next hop if it is not; `None` when no usable route leads there.
    fn next_hop(&mut self, dst: IpAddr) -> Option<(bool, IpAddr)>;
    fn neighbour(&mut self, ip: IpAddr) -> io::Result<Neighbour>;
    /// Sends a datagram to `dst`'s discard port.
    fn nudge(&mut self, dst: IpAddr);
    /// The interface has no neighbours to resolve.
    fn no_arp(&self) -> bool;
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    resolved: Resolved,
    checked: Instant,
    nudged: Option<Instant>,
    /// Since when it has been unresolved.
    waiting: Option<Instant>,
}

/// The remembered destinations.
#[derive(Debug)]
pub(crate) struct NextHops<K> {
    kernel: K,
    known: HashMap<Gid, Entry>,
    last: Option<(Gid, Mac, Instant)>,
}

impl<K: Kernel> NextHops<K> {
    pub fn new(kernel: K) -> NextHops<K> {
        NextHops {
            kernel,
            known: HashMap::new(),
            last: None,
        }
    }

    /// Where frames to `dst` go now.
    pub fn resolve(&mut self, dst: &Gid, now: Instant) -> Resolved {
        if let Some((gid, mac, until)) = self.last
            && gid == *dst
            && now < until
        {
            return Resolved::To(mac);
        }
        let known = self.known.get(dst).copied();
        if let Some(entry) = known {
            let fresh = match entry.resolved {
                Resolved::To(_) | Resolved::Here => limits::NEXT_HOP_FRESH,
                Resolved::Wait => limits::NEXT_HOP_RETRY,
                Resolved::Nowhere => limits::NEXT_HOP_DEAD,
            };
            let until = entry.checked + fresh;
            if now < until {
                if let Resolved::To(mac) = entry.resolved {
                    self.last = Some((*dst, mac, until));
                }
                return entry.resolved;
            }
        } else if self.known.len() >= limits::NEXT_HOPS {
            // Destinations in use come back with one question each.
            self.known.clear();
        }
        let entry = self.ask(ip_of(dst), known, now);
        self.known.insert(*dst, entry);
        self.last = None;
        entry.resolved
    }

    fn ask(&mut self, dst: IpAddr, before: Option<Entry>, now: Instant) -> Entry {
        let mut entry = Entry {
            resolved: Resolved::Nowhere,
            checked: now,
            nudged: before.and_then(|entry| entry.nudged),
            waiting: None,
        };
        let Some((local, hop)) = self.kernel.next_hop(dst) else {
            return entry;
        };
        if local {
            entry.resolved = Resolved::Here;
            return entry;
        }
        if self.kernel.no_arp() {
            entry.resolved = Resolved::To([0; 6]);
            return entry;
        }
        let neighbour = self.kernel.neighbour(hop).unwrap_or(Neighbour {
            state: 0,
            mac: None,
        });
        let usable = neighbour.state & (nud::INCOMPLETE | nud::FAILED) == 0;
        match neighbour.mac {
            Some(mac) if usable && neighbour.state != 0 => {
                entry.resolved = Resolved::To(mac);
                // Not confirmed for long: have the kernel verify it while it is used.
                if neighbour.state & nud::STALE != 0 {
                    self.nudge(dst, &mut entry, now);
                }
            }
            _ => {
                let waiting = before.and_then(|entry| entry.waiting).unwrap_or(now);
                entry.waiting = Some(waiting);
                self.nudge(dst, &mut entry, now);
                // Whoever drives the carrier may stop sending to others while it waits, so the wait is short.
                if now.duration_since(waiting) < limits::NEXT_HOP_PATIENCE {
                    entry.resolved = Resolved::Wait;
                }
            }
        }
        entry
    }

    fn nudge(&mut self, dst: IpAddr, entry: &mut Entry, now: Instant) {
        if entry
            .nudged
            .is_none_or(|at| now.duration_since(at) >= limits::NUDGE_EVERY)
        {
            self.kernel.nudge(dst);
            entry.nudged = Some(now);
        }
    }
}

/// The kernel itself.
#[derive(Debug)]
pub(crate) struct Live {
    netlink: Netlink,
    own: Owned,
    loopback: u32,
    /// Owns UDP port 4791 of the address; what it sends has a neighbour resolved.
    guard: Socket,
    warned: bool,
}

impl Live {
    pub fn new(netlink: Netlink, own: Owned, loopback: u32, guard: Socket) -> Live {
        Live {
            netlink,
            own,
            loopback,
            guard,
            warned: false,
        }
    }
}

impl Kernel for Live {
    fn next_hop(&mut self, dst: IpAddr) -> Option<(bool, IpAddr)> {
        let by = is_link_local(dst).then_some(self.own.link.index);
        let route = self.netlink.route(dst, Some(self.own.ip), by).ok()?;
        match route.kind {
            RTN_LOCAL if [self.loopback, self.own.link.index].contains(&route.interface) => {
                Some((true, dst))
            }
            RTN_UNICAST if route.interface == self.own.link.index => {
                Some((false, route.gateway.unwrap_or(dst)))
            }
            _ => {
                if !std::mem::replace(&mut self.warned, true) {
                    tracing::warn!(
                        "{dst} is not reached by {}, which has {}; listen on an address of the right interface, or use `--carrier udp`",
                        self.own.link.name,
                        self.own.ip
                    );
                }
                None
            }
        }
    }

    fn neighbour(&mut self, ip: IpAddr) -> io::Result<Neighbour> {
        self.netlink.neighbour(self.own.link.index, ip)
    }

    fn nudge(&mut self, dst: IpAddr) {
        let scope = if is_link_local(dst) {
            self.own.link.index
        } else {
            0
        };
        let to = RawAddr::ip(dst, DISCARD_PORT, scope);
        // Whether it went shows in the neighbour's state.
        let _ = self
            .guard
            .send(Some(&to), &[IoSlice::new(&[0])], &Control::default());
    }

    fn no_arp(&self) -> bool {
        self.own.link.flags & IFF_NOARP != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[derive(Default)]
    struct Fake {
        route: Option<(bool, IpAddr)>,
        neighbour: Option<Neighbour>,
        nudges: Vec<IpAddr>,
        questions: usize,
    }

    impl Kernel for Fake {
        fn next_hop(&mut self, _: IpAddr) -> Option<(bool, IpAddr)> {
            self.questions += 1;
            self.route
        }
        fn neighbour(&mut self, ip: IpAddr) -> io::Result<Neighbour> {
            assert_eq!(Some(ip), self.route.map(|(_, hop)| hop));
            self.neighbour.ok_or_else(|| io::ErrorKind::NotFound.into())
        }
        fn nudge(&mut self, dst: IpAddr) {
            self.nudges.push(dst);
        }
        fn no_arp(&self) -> bool {
            false
        }
    }

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn dst() -> (IpAddr, Gid) {
        let ip: IpAddr = "10.9.0.1".parse().unwrap();
        (ip, crate::addr::gid_of(ip))
    }

    fn known(state: u16) -> Option<Neighbour> {
        let mac = Some(MAC);
        Some(Neighbour { state, mac })
    }

    #[test]
    fn an_unknown_neighbour_is_asked_for_and_waited_for_shortly() {
        let (ip, gid) = dst();
        let gateway: IpAddr = "10.0.0.254".parse().unwrap();
        let mut hops = NextHops::new(Fake {
            route: Some((false, gateway)),
            ..Fake::default()
        });
        let t0 = Instant::now();
        assert_eq!(hops.resolve(&gid, t0), Resolved::Wait);
        assert_eq!(hops.resolve(&gid, t0), Resolved::Wait);
        assert_eq!(
            (hops.kernel.questions, &hops.kernel.nudges[..]),
            (1, &[ip][..])
        );
        // Nobody answers: as if the network lost it, and asked again now and then.
        let later = t0 + limits::NEXT_HOP_PATIENCE;
        assert_eq!(hops.resolve(&gid, later), Resolved::Nowhere);
        assert_eq!(hops.kernel.nudges.len(), 1);
        let later = later + limits::NUDGE_EVERY;
        assert_eq!(hops.resolve(&gid, later), Resolved::Nowhere);
        assert_eq!(hops.kernel.nudges.len(), 2);
        // It answers.
        hops.kernel.neighbour = known(nud::REACHABLE);
        let later = later + limits::NEXT_HOP_DEAD;
        assert_eq!(hops.resolve(&gid, later), Resolved::To(MAC));
    }

    #[test]
    fn a_known_neighbour_is_believed_for_a_while_and_then_verified() {
        let (_, gid) = dst();
        let mut hops = NextHops::new(Fake {
            route: Some((false, dst().0)),
            neighbour: known(nud::REACHABLE),
            ..Fake::default()
        });
        let hop = Resolved::To(MAC);
        let t0 = Instant::now();
        for _ in 0..5 {
            assert_eq!(hops.resolve(&gid, t0), hop);
        }
        assert_eq!((hops.kernel.questions, hops.kernel.nudges.len()), (1, 0));
        hops.kernel.neighbour = known(nud::STALE);
        let t1 = t0 + limits::NEXT_HOP_FRESH;
        assert_eq!(hops.resolve(&gid, t1), hop);
        assert_eq!((hops.kernel.questions, hops.kernel.nudges.len()), (2, 1));
        // It moved, then vanished.
        let mac = [2, 0, 0, 0, 0, 10];
        hops.kernel.neighbour = Some(Neighbour {
            state: nud::REACHABLE,
            mac: Some(mac),
        });
        let t2 = t1 + limits::NEXT_HOP_FRESH;
        assert_eq!(hops.resolve(&gid, t2), Resolved::To(mac));
        hops.kernel.neighbour = known(nud::FAILED);
        let t3 = t2 + limits::NEXT_HOP_FRESH;
        assert_eq!(hops.resolve(&gid, t3), Resolved::Wait);
    }

    #[test]
    fn this_machine_needs_no_neighbour_and_no_route_is_nowhere() {
        let (_, gid) = dst();
        let mut hops = NextHops::new(Fake {
            route: Some((true, dst().0)),
            ..Fake::default()
        });
        let t0 = Instant::now();
        assert_eq!(hops.resolve(&gid, t0), Resolved::Here);
        hops.kernel.route = None;
        let t1 = t0 + limits::NEXT_HOP_FRESH + Duration::from_millis(1);
        assert_eq!(hops.resolve(&gid, t1), Resolved::Nowhere);
        assert!(hops.kernel.nudges.is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let mut hops = NextHops::new(Fake {
            route: Some((true, dst().0)),
            ..Fake::default()
        });
        let t0 = Instant::now();
        for index in 0..3 * limits::NEXT_HOPS as u128 {
            let _ = hops.resolve(&index.to_be_bytes(), t0);
        }
        assert!(hops.known.len() <= limits::NEXT_HOPS);
    }
}
