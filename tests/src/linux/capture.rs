//! What was on the wire.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// UDP port of RoCEv2 (InfiniBand Architecture Specification, annex A17).
const ROCE: u16 = 4791;

/// Frames of a pcap file, as far as they are RoCEv2. A reader of its own, so that it cannot share a mistake with the
/// project's: that one is tested with what this one counts.
#[derive(Clone, Debug, Default)]
pub struct Capture {
    /// RoCEv2 packets in their order.
    pub packets: Vec<Packet>,
    /// Frames that are something else.
    pub others: usize,
}

/// One RoCEv2 packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Who sent it.
    pub from: IpAddr,
    /// To whom.
    pub to: IpAddr,
    /// The opcode of the BTH.
    pub opcode: u8,
    /// The QP that it is for.
    pub qpn: u32,
    /// The PSN.
    pub psn: u32,
    /// Bytes from the BTH to the ICRC, both included.
    pub length: usize,
    /// Whether its ICRC is what its content gives.
    pub icrc_is_right: bool,
}

impl Capture {
    /// Reads a pcap file of Ethernet frames with times in microseconds. A last frame that is still being written is left
    /// out.
    ///
    /// # Errors
    /// The file cannot be read or is no such file.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = fs::read(path)?;
        let bad = |what: &str| io::Error::other(format!("{}: {what}", path.display()));
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        if word(0) != Some(0xa1b2_c3d4) || word(20) != Some(1) {
            return Err(bad("no pcap file of Ethernet frames"));
        }
        let mut capture = Self::default();
        let mut at = 24;
        while let Some(length) = word(at + 8) {
            let Some(frame) = bytes.get(at + 16..at + 16 + length as usize) else {
                break;
            };
            match Packet::parse(frame) {
                Some(packet) => capture.packets.push(packet),
                None => capture.others += 1,
            }
            at += 16 + length as usize;
        }
        Ok(capture)
    }

    /// How many packets there are of each opcode.
    #[must_use]
    pub fn opcodes(&self) -> BTreeMap<u8, usize> {
        let mut counts = BTreeMap::new();
        for packet in &self.packets {
            *counts.entry(packet.opcode).or_default() += 1;
        }
        counts
    }

    /// Those between two addresses, either way.
    #[must_use]
    pub fn between(&self, a: IpAddr, b: IpAddr) -> Vec<&Packet> {
        let these = |p: &&Packet| (p.from, p.to) == (a, b) || (p.from, p.to) == (b, a);
        self.packets.iter().filter(these).collect()
    }
}

impl Packet {
    /// A RoCEv2 packet in an Ethernet frame; nothing if it is something else.
    fn parse(frame: &[u8]) -> Option<Self> {
        let ip = frame.get(14..)?;
        let address = |at: usize| {
            ip.get(at..at + 16)?
                .try_into()
                .ok()
                .map(u128::from_be_bytes)
        };
        let half = |b: &[u8], at: usize| Some(u16::from_be_bytes([*b.get(at)?, *b.get(at + 1)?]));
        // Where the UDP header is, and what the ICRC takes as ones (A17.3.3).
        let (from, to, udp, masked): (IpAddr, IpAddr, usize, &[usize]) = match half(frame, 12)? {
            0x0800 if *ip.get(9)? == 17 => {
                let address = |at: usize| -> Option<IpAddr> {
                    let bytes: [u8; 4] = ip.get(at..at + 4)?.try_into().ok()?;
                    Some(Ipv4Addr::from(bytes).into())
                };
                let header = usize::from(ip[0] & 15) * 4;
                (address(12)?, address(16)?, header, &[1, 8, 10, 11])
            }
            0x86dd if *ip.get(6)? == 17 => {
                let (from, to) = (address(8)?, address(24)?);
                let (from, to) = (Ipv6Addr::from_bits(from), Ipv6Addr::from_bits(to));
                (from.into(), to.into(), 40, &[1, 2, 3, 7])
            }
            _ => return None,
        };
        let length = usize::from(half(ip, udp + 4)?);
        // What follows is padding of the frame.
        let ip = ip.get(..udp + length)?;
        if half(ip, udp + 2)? != ROCE || length < 8 + 12 + 4 {
            return None;
        }
        let bth = &ip[udp + 8..];
        let three = |at: usize| u32::from_be_bytes([0, bth[at], bth[at + 1], bth[at + 2]]);
        let (content, icrc) = ip.split_at(ip.len() - 4);
        let mut covered = [&[0xff; 8], content].concat();
        for at in masked.iter().chain(&[udp + 6, udp + 7, udp + 12]) {
            covered[8 + at] = 0xff;
        }
        if udp == 40 {
            // Only the lower half of this byte is the traffic class.
            covered[8] = ip[0] | 0x0f;
        }
        Some(Self {
            from,
            to,
            opcode: bth[0],
            qpn: three(5),
            psn: three(9),
            length: bth.len(),
            icrc_is_right: crc32(&covered).to_le_bytes() == icrc,
        })
    }
}

/// The CRC-32 of Ethernet.
fn crc32(bytes: &[u8]) -> u32 {
    let bit = |c: u32| (c >> 1) ^ (0xedb8_8320 & (c & 1).wrapping_neg());
    let byte = |c: u32, b: &u8| (0..8).fold(c ^ u32::from(*b), |c, _| bit(c));
    !bytes.iter().fold(!0, byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crc_is_that_of_ethernet() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_file_of_something_else_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        for bytes in [&b""[..], b"not a capture, but long enough to be one"] {
            fs::write(&file, bytes).unwrap();
            let error = Capture::read(&file).unwrap_err().to_string();
            assert!(error.contains("no pcap file"), "{error}");
        }
    }
}
