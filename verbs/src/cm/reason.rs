//! Why a peer refuses.

use core::fmt;

/// Why a peer refused a connection, or a datagram's request (InfiniBand Architecture 1.4, tables 123 and 12.11.2.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum RejectReason {
    /// It has no room for another connection.
    NoResources,
    /// It gave up waiting.
    Timeout,
    /// It does not understand or serve such a request.
    Unsupported,
    /// Nobody listens on this port.
    NoListener,
    /// It has an older connection with the same queue pair.
    Stale,
    /// The address is not its own.
    WrongAddress,
    /// Its port does not take packets of that size.
    BadMtu,
    /// The program there said no.
    Consumer,
    /// Another one, by its number.
    Other(u32),
}

impl RejectReason {
    /// Of a REJ message.
    #[must_use]
    pub const fn of_rej(status: u32) -> Self {
        match status {
            3 => Self::NoResources,
            4 => Self::Timeout,
            5 | 9 => Self::Unsupported,
            8 => Self::NoListener,
            10 => Self::Stale,
            12 => Self::WrongAddress,
            26 => Self::BadMtu,
            28 => Self::Consumer,
            n => Self::Other(n),
        }
    }

    /// Of a SIDR_REP message; `None` if its status is no refusal but an errno: nobody answered.
    #[must_use]
    pub const fn of_sidr(status: u32) -> Option<Self> {
        Some(match status {
            1 => Self::NoListener,
            2 => Self::Consumer,
            3 => Self::NoResources,
            4 | 5 => Self::Other(status),
            _ => return None,
        })
    }
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoResources => "it has no room for another connection",
            Self::Timeout => "it did not answer in time",
            Self::Unsupported => "it does not serve such requests",
            Self::NoListener => "nobody listens on this port",
            Self::Stale => "it has an older connection with the same queue pair: try again",
            Self::WrongAddress => "the address is not its own",
            Self::BadMtu => "its port does not take packets of that size: ask for a smaller MTU",
            Self::Consumer => "the program there said no",
            Self::Other(n) => {
                return write!(
                    f,
                    "see the InfiniBand Architecture, reason {n} of a REJ or SIDR_REP message"
                );
            }
        })
    }
}
