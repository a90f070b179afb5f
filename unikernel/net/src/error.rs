//! What can go wrong on the network.

use core::fmt;

/// Why a call on the network failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// There is no network card, or it cannot be used; says why, and what to do.
    Device(&'static str),
    /// The text of the addresses is wrong; says how.
    Config(&'static str),
    /// No DHCP server answered in time.
    NoLease,
    /// Nothing listens at the peer's port.
    Refused,
    /// The peer broke the connection off.
    Reset,
    /// The time limit of the call is over; the connection is as it was.
    TimedOut,
    /// This side has closed the connection already.
    Closed,
    /// The peer closed the connection in the middle of what was to be read.
    UnexpectedEnd,
    /// Another listener has the port, or the port is 0.
    PortInUse(u16),
    /// This guest has no address of the peer's family, or the peer's address is none.
    Unaddressable,
    /// All local ports are taken.
    NoPort,
    /// The host asked this guest to end.
    Ending,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Device(why) => write!(f, "no network: {why}"),
            Self::Config(why) => write!(f, "hyv.net: {why}"),
            Self::NoLease => f.write_str(
                "no DHCP server answered: start one on this network, or give the guest an address (--ip)",
            ),
            Self::Refused => f.write_str("connection refused: nothing listens there"),
            Self::Reset => f.write_str("connection reset by the peer"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Closed => f.write_str("the connection is closed"),
            Self::UnexpectedEnd => f.write_str("the peer closed the connection too early"),
            Self::PortInUse(0) => f.write_str("port 0 cannot be listened on"),
            Self::PortInUse(port) => write!(f, "port {port} is listened on already"),
            Self::Unaddressable => {
                f.write_str("this guest has no address of that family, or that is no host's address")
            }
            Self::NoPort => f.write_str("all local ports are taken"),
            Self::Ending => f.write_str("the host asked this guest to end"),
        }
    }
}

impl core::error::Error for Error {}
