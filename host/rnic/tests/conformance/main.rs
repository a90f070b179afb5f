//! One behaviour on every carrier: each scenario runs between two users of one device, whose messages are copied from memory to memory;
//! between two devices on a network in memory; over UDP sockets; and over AF_PACKET. What completes, with which status and how many
//! bytes, what changes in memory, and which events are raised must not depend on it.
//!
//! Time is virtual everywhere, so nothing here depends on how fast the machine is.

#[path = "../common/mod.rs"]
mod common;
mod fabric;

/// Makes four tests of each scenario, one a carrier.
macro_rules! on_every_carrier {
    ($($scenario:ident)*) => { $(
        mod $scenario {
            use crate::fabric::{On, run};

            #[test]
            fn memory() {
                run(On::Memory, super::$scenario);
            }

            #[test]
            fn network() {
                run(On::Network, super::$scenario);
            }

            #[test]
            fn udp() {
                run(On::Udp, super::$scenario);
            }

            #[test]
            fn packet() {
                run(On::Packet, super::$scenario);
            }
        }
    )* };
}

mod data;
mod events;
mod programs;
mod protection;
mod retry;
mod srq;
mod unreliable;
mod windows;
