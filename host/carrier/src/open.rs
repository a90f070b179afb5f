//! Choosing a carrier.

use std::str::FromStr;

use hyv_roce::carrier::Carrier;

use crate::{Info, ListenAddr, OpenError, Options, PacketCarrier, UdpCarrier};

/// What a user asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Choice {
    /// AF_PACKET where it is permitted and works, else UDP sockets.
    #[default]
    Auto,
    /// UDP sockets.
    Udp,
    /// AF_PACKET.
    Packet,
}

impl Choice {
    /// All of them, as they are written.
    pub const NAMES: [&'static str; 3] = ["auto", "udp", "packet"];
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice, String> {
        match text {
            "auto" => Ok(Choice::Auto),
            "udp" => Ok(Choice::Udp),
            "packet" => Ok(Choice::Packet),
            _ => Err(format!(
                "no carrier is called {text:?}: there are {}",
                Choice::NAMES.join(", ")
            )),
        }
    }
}

/// Opens a carrier on an address of this machine, in the calling thread's network namespace.
///
/// # Errors
/// See [`OpenError`]. With [`Choice::Auto`] none that is about AF_PACKET alone: [`Info::note`] says it instead.
pub fn open(
    choice: Choice,
    addr: &ListenAddr,
    options: &Options,
) -> Result<(Box<dyn Carrier>, Info), OpenError> {
    let refused = match choice {
        Choice::Udp => None,
        Choice::Auto | Choice::Packet => match PacketCarrier::open(addr, options) {
            Ok((carrier, info)) => return Ok((Box::new(carrier), info)),
            Err(error) if choice == Choice::Auto && error.is_about_packets() => Some(error),
            Err(error) => return Err(error),
        },
    };
    let (carrier, mut info) = UdpCarrier::open(addr, options)?;
    info.note = refused.map(|error| format!("AF_PACKET would be faster, but: {error}"));
    Ok((Box::new(carrier), info))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in Choice::NAMES {
            assert!(name.parse::<Choice>().is_ok());
        }
        let error = "xdp".parse::<Choice>().unwrap_err();
        assert!(error.contains("auto, udp, packet"), "{error}");
    }

    #[test]
    fn errors_about_the_address_end_any_choice() {
        for choice in [Choice::Auto, Choice::Udp, Choice::Packet] {
            let addr = "192.0.2.78".parse().unwrap();
            let error = open(choice, &addr, &Options::default()).err();
            assert!(
                matches!(error, Some(OpenError::NotHere { .. })),
                "{error:?}"
            );
        }
    }

    #[test]
    fn auto_opens_one_or_the_other() {
        let addr = "127.0.75.1".parse().unwrap();
        let (carrier, info) = open(Choice::Auto, &addr, &Options::default()).unwrap();
        assert_eq!(carrier.local(), crate::addr::gid_of(addr.ip));
        match info.carrier {
            crate::Kind::Packet => assert!(info.note.is_none() && info.icrc_bits == 32),
            crate::Kind::Udp => assert!(info.note.is_some() && info.icrc_bits == 16),
        }
        // Both take the port.
        let again = open(Choice::Udp, &addr, &Options::default()).err();
        assert!(
            matches!(again, Some(OpenError::PortTaken { .. })),
            "{again:?}"
        );
    }
}
