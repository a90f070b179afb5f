//! virtio-net (virtio 1.2, section 5.1): a receive queue that always has buffers, and a transmit queue.
//!
//! Negotiated are `VERSION_1`, `MAC` and `MTU`: no offload, so that each buffer holds one frame and frames arrive with their
//! checksums.

use alloc::boxed::Box;
use alloc::vec::Vec;

use virtio_spec::net::{F, Hdr};

use crate::limits::{DEFAULT_MTU, ETHERNET_HEADER, MAX_MTU, MIN_MTU, RX_BUFFERS, TX_BUFFERS};
use crate::nic::Nic;
use crate::virtq::{Broken, Direction, Layout, Queue, Shared};

/// Number of the receive queue.
pub const RX: u16 = 0;
/// Number of the transmit queue.
pub const TX: u16 = 1;

/// What stands before each frame. Without offloads it is zeros, both ways.
const HEADER: usize = size_of::<Hdr>();

/// The features that this driver uses; a device without `VERSION_1` cannot be driven.
pub const FEATURES: F = F::VERSION_1.union(F::MAC).union(F::MTU);

/// The MTU that a device offered, if it did, within what this driver can do.
///
/// # Errors
/// Below what IPv6 needs.
pub fn mtu(offered: Option<u16>) -> Result<u16, &'static str> {
    match offered.unwrap_or(DEFAULT_MTU) {
        n if n < MIN_MTU => Err("the network card's MTU is below 1280, IPv6's least"),
        n => Ok(n.min(MAX_MTU)),
    }
}

/// Bytes of one buffer: header and frame, in whole cache lines.
fn buffer(mtu: u16) -> usize {
    (HEADER + ETHERNET_HEADER + usize::from(mtu)).next_multiple_of(64)
}

/// Bytes of shared memory that queue `number` ([`RX`], [`TX`]) needs.
#[must_use]
pub fn memory(number: u16, mtu: u16) -> usize {
    let size = size(number);
    Layout::new(size).end() + usize::from(size) * buffer(mtu)
}

/// Descriptors of queue `number`.
#[must_use]
pub fn size(number: u16) -> u16 {
    if number == RX { RX_BUFFERS } else { TX_BUFFERS }
}

/// What happened, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames received.
    pub received: u64,
    /// Frames sent.
    pub sent: u64,
    /// Frames that were no frames, or had no room.
    pub dropped: u64,
    /// Doorbells rung.
    pub kicks: u64,
}

/// A card.
pub struct Card<M> {
    rx: Queue<M>,
    tx: Queue<M>,
    /// Transmit descriptors that are ours.
    free: Vec<u16>,
    kick: Box<dyn Fn(u16)>,
    mac: [u8; 6],
    mtu: u16,
    buffer: usize,
    counters: Counters,
    broken: bool,
}

impl<M: Shared> Card<M> {
    /// Over memory of [`memory`] bytes for each queue. `kick` tells the device of a queue by number. The device's
    /// queues must be set up with [`Card::queues`] before [`Nic::flush`] is called.
    pub fn new(rx: M, tx: M, mac: [u8; 6], mtu: u16, kick: Box<dyn Fn(u16)>) -> Self {
        let mut card = Self {
            rx: Queue::new(rx, RX_BUFFERS),
            tx: Queue::new(tx, TX_BUFFERS),
            free: (0..TX_BUFFERS).rev().collect(),
            kick,
            mac,
            mtu,
            buffer: buffer(mtu),
            counters: Counters::default(),
            broken: false,
        };
        for id in 0..RX_BUFFERS {
            card.offer_rx(id);
        }
        card
    }

    /// Its queues, by number.
    pub fn queues(&self) -> [&Queue<M>; 2] {
        [&self.rx, &self.tx]
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn at(&self, queue: &Queue<M>, id: u16) -> usize {
        queue.layout().end() + usize::from(id) * self.buffer
    }

    fn offer_rx(&mut self, id: u16) {
        let at = self.at(&self.rx, id);
        self.rx.offer(id, at, self.buffer as u32, Direction::In);
    }

    fn give_up(&mut self, Broken(why): Broken) {
        self.broken = true;
        log::error!("the network card broke the rules, and is not used any more: {why}");
    }

    /// Takes back the buffers whose frames are out.
    fn reclaim(&mut self) {
        while !self.broken {
            match self.tx.take() {
                Ok(None) => return,
                Ok(Some((id, _))) => self.free.push(id),
                Err(e) => self.give_up(e),
            }
        }
    }
}

impl<M: Shared> Nic for Card<M> {
    fn mac(&self) -> [u8; 6] {
        self.mac
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn receive(&mut self, into: &mut [u8]) -> Option<usize> {
        while !self.broken {
            let (id, len) = match self.rx.take() {
                Ok(used) => used?,
                Err(e) => {
                    self.give_up(e);
                    return None;
                }
            };
            let len = (len as usize).saturating_sub(HEADER);
            let fits = (ETHERNET_HEADER..=into.len()).contains(&len);
            if fits {
                let at = self.at(&self.rx, id) + HEADER;
                self.rx.memory().read(at, &mut into[..len]);
                self.counters.received += 1;
            } else {
                self.counters.dropped += 1;
            }
            self.offer_rx(id);
            if fits {
                return Some(len);
            }
        }
        None
    }

    fn can_send(&mut self) -> bool {
        if self.free.is_empty() {
            self.reclaim();
        }
        !self.broken && !self.free.is_empty()
    }

    fn send(&mut self, frame: &[u8]) {
        let len = HEADER + frame.len();
        if len > self.buffer || !self.can_send() {
            self.counters.dropped += 1;
            return;
        }
        let Some(id) = self.free.pop() else { return };
        let at = self.at(&self.tx, id);
        // The header stays as it was made: zeros.
        self.tx.memory().write(at + HEADER, frame);
        self.tx.offer(id, at, len as u32, Direction::Out);
        self.counters.sent += 1;
    }

    fn flush(&mut self) {
        if self.broken {
            return;
        }
        for (number, wants) in [(RX, self.rx.publish()), (TX, self.tx.publish())] {
            if wants {
                self.counters.kicks += 1;
                (self.kick)(number);
            }
        }
    }

    fn arm(&mut self) -> bool {
        if self.broken {
            return false;
        }
        if self.can_send() {
            self.rx.interrupts(true)
        } else {
            // Without room to answer no frame is taken, so room is what to wait for.
            self.tx.interrupts(true) && self.can_send()
        }
    }

    fn disarm(&mut self) {
        if !self.broken {
            self.rx.interrupts(false);
            self.tx.interrupts(false);
        }
    }
}
