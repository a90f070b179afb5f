//! Capture files: reading and writing them, and what packets in them are worth.
//!
//! [`Decoder`] reads classic pcap (both byte orders, micro- and nanoseconds) and pcapng; [`file_header`] and [`record_header`] write classic
//! pcap with nanoseconds. [`frame`] finds the RoCEv2 packets in frames, and [`analysis`] checks them and follows their PSNs. Nothing here
//! opens a file.

pub mod analysis;
pub mod finding;
pub mod frame;
mod ng;
mod stream;

use crate::limits;

/// What a captured frame begins with (tcpdump's LINKTYPE_ numbers).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum LinkType {
    /// Ethernet.
    Ethernet,
    /// An IPv4 or IPv6 header.
    RawIp,
    /// `tcpdump -i any`: 16 bytes, ending in an EtherType.
    LinuxSll,
    /// The same, second version: 20 bytes that begin with an EtherType.
    LinuxSll2,
    /// Any other.
    Other(u32),
}

impl LinkType {
    /// From the number in a file. The upper bits of classic pcap (FCS length) are to be masked before.
    pub const fn from_number(number: u32) -> LinkType {
        match number {
            1 => LinkType::Ethernet,
            // LINKTYPE_RAW, its BSD values that some writers use, LINKTYPE_IPV4 and _IPV6.
            101 | 12 | 14 | 228 | 229 => LinkType::RawIp,
            113 => LinkType::LinuxSll,
            276 => LinkType::LinuxSll2,
            other => LinkType::Other(other),
        }
    }

    /// The number in a file.
    pub const fn number(self) -> u32 {
        match self {
            LinkType::Ethernet => 1,
            LinkType::RawIp => 101,
            LinkType::LinuxSll => 113,
            LinkType::LinuxSll2 => 276,
            LinkType::Other(number) => number,
        }
    }
}

/// Why bytes are no capture file, or no longer one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FileError {
    /// Begins like nothing that is known.
    #[error("not a capture: begins with {0:#010x}, which is neither pcap nor pcapng")]
    Magic(u32),
    /// A version of the format that does not exist.
    #[error("pcap version {0}.{1} (2.4 and pcapng 1.x are read)")]
    Version(u16, u16),
    /// Ends in the middle of something.
    #[error("ends in the middle of {what}: {have} of {need} bytes")]
    Truncated {
        /// Of what.
        what: &'static str,
        /// Bytes it would need.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// A length that cannot be.
    #[error("{what} says {len} bytes (at most {max})")]
    Length {
        /// Of what.
        what: &'static str,
        /// Found.
        len: usize,
        /// Allowed.
        max: usize,
    },
    /// A packet of an interface that the file has not described.
    #[error("packet of interface {0}, which the file does not describe")]
    Interface(u32),
    /// A block that contradicts itself.
    #[error("damaged pcapng block of type {0:#010x}")]
    Block(u32),
    /// More interfaces than [`limits::CAPTURE_INTERFACES_MAX`].
    #[error("more than {} interfaces", limits::CAPTURE_INTERFACES_MAX)]
    Interfaces,
}

/// A captured frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record<'a> {
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// What it begins with.
    pub link: LinkType,
    /// Bytes it had on the wire; more than `data` if the snap length cut it.
    pub original_len: usize,
    /// What was captured.
    pub data: &'a [u8],
}

/// What a [`Decoder`] made of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step<'a> {
    /// A record, and how many bytes it took.
    Record(Record<'a>, usize),
    /// A header, or a block without a packet: how many bytes it took.
    Skip(usize),
    /// So many bytes are needed from here, in all. At the file's end: [`Decoder::end`].
    Need(usize),
}

/// Reads a capture file, some bytes at a time.
///
/// Call [`Decoder::step`] with the bytes that have not been taken yet; it takes from their beginning.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    format: Format,
}

#[derive(Clone, Debug, Default)]
enum Format {
    #[default]
    Unknown,
    Classic {
        big_endian: bool,
        nanoseconds: bool,
        link: LinkType,
    },
    Ng(ng::Section),
}

/// Magic numbers of classic pcap, in the writer's byte order.
const MAGIC_MICROSECONDS: u32 = 0xa1b2_c3d4;
const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;

/// Bytes of a classic file's header.
pub const FILE_HEADER_LEN: usize = 24;
/// Bytes in front of each packet of a classic file.
pub const RECORD_HEADER_LEN: usize = 16;

impl Decoder {
    /// For a file of any known format.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Takes the next piece of the file from the beginning of `bytes`.
    pub fn step<'a>(&mut self, bytes: &'a [u8]) -> Result<Step<'a>, FileError> {
        match &mut self.format {
            Format::Unknown => self.begin(bytes),
            Format::Classic {
                big_endian,
                nanoseconds,
                link,
            } => classic(bytes, *big_endian, *nanoseconds, *link),
            Format::Ng(section) => section.step(bytes),
        }
    }

    /// Says what is wrong with a file that ends with `bytes` not taken; nothing if there are none.
    pub fn end(&self, bytes: &[u8], need: usize) -> Result<(), FileError> {
        if bytes.is_empty() && !matches!(self.format, Format::Unknown) {
            return Ok(());
        }
        Err(FileError::Truncated {
            what: match self.format {
                Format::Unknown => "the file's header",
                Format::Classic { .. } => "a packet",
                Format::Ng(_) => "a block",
            },
            need,
            have: bytes.len(),
        })
    }

    fn begin<'a>(&mut self, bytes: &'a [u8]) -> Result<Step<'a>, FileError> {
        if bytes.len() < 4 {
            return Ok(Step::Need(4));
        }
        let magic = word(bytes, 0, false);
        if magic == ng::SECTION_HEADER {
            self.format = Format::Ng(ng::Section::default());
            return self.step(bytes);
        }
        let (big_endian, nanoseconds) = match (magic, magic.swap_bytes()) {
            (MAGIC_MICROSECONDS, _) => (false, false),
            (MAGIC_NANOSECONDS, _) => (false, true),
            (_, MAGIC_MICROSECONDS) => (true, false),
            (_, MAGIC_NANOSECONDS) => (true, true),
            _ => return Err(FileError::Magic(magic.swap_bytes())),
        };
        if bytes.len() < FILE_HEADER_LEN {
            return Ok(Step::Need(FILE_HEADER_LEN));
        }
        let (major, minor) = (half(bytes, 4, big_endian), half(bytes, 6, big_endian));
        if major != 2 {
            return Err(FileError::Version(major, minor));
        }
        self.format = Format::Classic {
            big_endian,
            nanoseconds,
            // The upper four bits say whether frames end in their FCS.
            link: LinkType::from_number(word(bytes, 20, big_endian) & 0x0fff_ffff),
        };
        Ok(Step::Skip(FILE_HEADER_LEN))
    }
}

fn classic(
    bytes: &[u8],
    big_endian: bool,
    nanoseconds: bool,
    link: LinkType,
) -> Result<Step<'_>, FileError> {
    if bytes.len() < RECORD_HEADER_LEN {
        return Ok(Step::Need(RECORD_HEADER_LEN));
    }
    let field = |at| word(bytes, at, big_endian);
    let len = record_len(field(8))?;
    let end = RECORD_HEADER_LEN + len;
    if bytes.len() < end {
        return Ok(Step::Need(end));
    }
    let fraction = u64::from(field(4)) * if nanoseconds { 1 } else { 1000 };
    let record = Record {
        time_ns: u64::from(field(0)) * 1_000_000_000 + fraction,
        link,
        original_len: field(12) as usize,
        data: &bytes[RECORD_HEADER_LEN..end],
    };
    Ok(Step::Record(record, end))
}

fn record_len(len: u32) -> Result<usize, FileError> {
    let len = len as usize;
    if len > limits::CAPTURE_RECORD_MAX {
        return Err(FileError::Length {
            what: "a packet",
            len,
            max: limits::CAPTURE_RECORD_MAX,
        });
    }
    Ok(len)
}

fn word(b: &[u8], at: usize, big_endian: bool) -> u32 {
    let bytes = crate::wire::array(b, at);
    if big_endian {
        u32::from_be_bytes(bytes)
    } else {
        u32::from_le_bytes(bytes)
    }
}

fn half(b: &[u8], at: usize, big_endian: bool) -> u16 {
    let bytes = crate::wire::array(b, at);
    if big_endian {
        u16::from_be_bytes(bytes)
    } else {
        u16::from_le_bytes(bytes)
    }
}

/// The first bytes of a classic file with nanoseconds, little-endian.
pub fn file_header(link: LinkType) -> [u8; FILE_HEADER_LEN] {
    let mut b = [0; FILE_HEADER_LEN];
    b[..4].copy_from_slice(&MAGIC_NANOSECONDS.to_le_bytes());
    b[4..6].copy_from_slice(&2u16.to_le_bytes());
    b[6..8].copy_from_slice(&4u16.to_le_bytes());
    b[16..20].copy_from_slice(&(limits::CAPTURE_RECORD_MAX as u32).to_le_bytes());
    b[20..].copy_from_slice(&link.number().to_le_bytes());
    b
}

/// The bytes in front of a packet of `len` bytes, all of which follow.
pub fn record_header(time_ns: u64, len: usize) -> [u8; RECORD_HEADER_LEN] {
    let mut b = [0; RECORD_HEADER_LEN];
    let len = (len as u32).to_le_bytes();
    b[..4].copy_from_slice(&((time_ns / 1_000_000_000) as u32).to_le_bytes());
    b[4..8].copy_from_slice(&((time_ns % 1_000_000_000) as u32).to_le_bytes());
    b[8..12].copy_from_slice(&len);
    b[12..].copy_from_slice(&len);
    b
}

#[cfg(test)]
mod tests;
