//! The interface that has a carrier's address: what of it may change.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use crate::limits;
use crate::netlink::{Link, Netlink};

/// What may change of an interface.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub mtu: usize,
    pub mac: [u8; 6],
}

/// MTU and hardware address of a link, asked for again when they are old.
#[derive(Debug)]
pub(crate) struct LinkState {
    netlink: RefCell<Netlink>,
    index: u32,
    known: Cell<(Now, Instant)>,
}

impl LinkState {
    pub fn new(netlink: Netlink, link: &Link) -> LinkState {
        let now = Now {
            mtu: link.mtu,
            mac: link.mac,
        };
        LinkState {
            netlink: RefCell::new(netlink),
            index: link.index,
            known: Cell::new((now, Instant::now())),
        }
    }

    pub fn get(&self) -> Now {
        let (now, since) = self.known.get();
        if since.elapsed() < limits::MTU_FRESH {
            return now;
        }
        // An interface that is gone keeps what it had; sending fails by itself.
        let now = self
            .netlink
            .borrow_mut()
            .link(self.index)
            .map_or(now, |link| Now {
                mtu: link.mtu,
                mac: link.mac,
            });
        self.known.set((now, Instant::now()));
        now
    }
}
