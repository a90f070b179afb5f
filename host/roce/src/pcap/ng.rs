//! pcapng (IETF draft-ietf-opsawg-pcapng): sections, interfaces and packets; all other blocks are passed over.

use alloc::vec::Vec;

use crate::limits;

use super::{FileError, LinkType, Record, Step, half, record_len, word};

/// Block type of a section header, the same in both byte orders.
pub(super) const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const SIMPLE_PACKET: u32 = 3;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
/// Block type, length, and length again.
const BLOCK_MIN: usize = 12;
/// Option: resolution of time stamps.
const OPTION_TSRESOL: u16 = 9;
/// Option: seconds to add to time stamps.
const OPTION_TSOFFSET: u16 = 14;

#[derive(Clone, Copy, Debug)]
struct Interface {
    link: LinkType,
    snap_len: usize,
    /// Units of a second: 10^n, or 2^n.
    units: u128,
    offset_s: i64,
}

impl Interface {
    fn time_ns(&self, stamp: u64) -> u64 {
        let ns = u128::from(stamp) * 1_000_000_000 / self.units;
        let ns = i128::try_from(ns).unwrap_or(i128::MAX);
        let ns = ns.saturating_add(i128::from(self.offset_s) * 1_000_000_000);
        u64::try_from(ns.max(0)).unwrap_or(u64::MAX)
    }
}

/// What the blocks so far have said.
#[derive(Clone, Debug, Default)]
pub(super) struct Section {
    big_endian: bool,
    interfaces: Vec<Interface>,
}

impl Section {
    pub(super) fn step<'a>(&mut self, bytes: &'a [u8]) -> Result<Step<'a>, FileError> {
        if bytes.len() < BLOCK_MIN {
            return Ok(Step::Need(BLOCK_MIN));
        }
        if word(bytes, 0, false) == SECTION_HEADER {
            self.interfaces.clear();
            self.big_endian = match word(bytes, 8, false) {
                BYTE_ORDER => false,
                order if order.swap_bytes() == BYTE_ORDER => true,
                _ => return Err(FileError::Block(SECTION_HEADER)),
            };
        }
        let kind = word(bytes, 0, self.big_endian);
        let len = word(bytes, 4, self.big_endian) as usize;
        if len < BLOCK_MIN || !len.is_multiple_of(4) {
            return Err(FileError::Block(kind));
        }
        if len > limits::CAPTURE_BLOCK_MAX {
            return Err(FileError::Length {
                what: "a block",
                len,
                max: limits::CAPTURE_BLOCK_MAX,
            });
        }
        if bytes.len() < len {
            return Ok(Step::Need(len));
        }
        if word(bytes, len - 4, self.big_endian) as usize != len {
            return Err(FileError::Block(kind));
        }
        let body = &bytes[8..len - 4];
        let record = match kind {
            SECTION_HEADER => {
                if body.len() < 16 {
                    return Err(FileError::Block(kind));
                }
                let major = half(body, 4, self.big_endian);
                if major != 1 {
                    return Err(FileError::Version(major, half(body, 6, self.big_endian)));
                }
                None
            }
            INTERFACE => {
                self.interface(body)?;
                None
            }
            ENHANCED_PACKET => Some(self.enhanced(body)?),
            SIMPLE_PACKET => Some(self.simple(body)?),
            _ => None,
        };
        Ok(match record {
            Some(record) => Step::Record(record, len),
            None => Step::Skip(len),
        })
    }

    fn interface(&mut self, body: &[u8]) -> Result<(), FileError> {
        if body.len() < 8 {
            return Err(FileError::Block(INTERFACE));
        }
        if self.interfaces.len() >= limits::CAPTURE_INTERFACES_MAX {
            return Err(FileError::Interfaces);
        }
        let mut interface = Interface {
            link: LinkType::from_number(u32::from(half(body, 0, self.big_endian))),
            snap_len: word(body, 4, self.big_endian) as usize,
            units: 1_000_000,
            offset_s: 0,
        };
        let mut options = &body[8..];
        while options.len() >= 4 {
            let code = half(options, 0, self.big_endian);
            let len = usize::from(half(options, 2, self.big_endian));
            let Some(value) = options.get(4..4 + len) else {
                return Err(FileError::Block(INTERFACE));
            };
            match (code, value) {
                (0, _) => break,
                (OPTION_TSRESOL, &[resolution, ..]) => {
                    let exponent = u32::from(resolution & 0x7f);
                    // Beyond these no clock ticks: 2^63 and 10^19 units of a second are the most that a stamp can count.
                    let units = match resolution & 0x80 {
                        0 if exponent <= 19 => 10u128.pow(exponent),
                        0x80 if exponent <= 63 => 1 << exponent,
                        _ => return Err(FileError::Block(INTERFACE)),
                    };
                    interface.units = units;
                }
                (OPTION_TSOFFSET, value) if value.len() == 8 => {
                    let bytes = crate::wire::array(value, 0);
                    interface.offset_s = if self.big_endian {
                        i64::from_be_bytes(bytes)
                    } else {
                        i64::from_le_bytes(bytes)
                    };
                }
                _ => {}
            }
            options = options.get(4 + len.next_multiple_of(4)..).unwrap_or(&[]);
        }
        self.interfaces.push(interface);
        Ok(())
    }

    fn enhanced<'a>(&self, body: &'a [u8]) -> Result<Record<'a>, FileError> {
        if body.len() < 20 {
            return Err(FileError::Block(ENHANCED_PACKET));
        }
        let field = |at| word(body, at, self.big_endian);
        let interface = self
            .interfaces
            .get(field(0) as usize)
            .ok_or(FileError::Interface(field(0)))?;
        let len = record_len(field(12))?;
        let data = body
            .get(20..20 + len)
            .ok_or(FileError::Block(ENHANCED_PACKET))?;
        Ok(Record {
            time_ns: interface.time_ns(u64::from(field(4)) << 32 | u64::from(field(8))),
            link: interface.link,
            original_len: field(16) as usize,
            data,
        })
    }

    fn simple<'a>(&self, body: &'a [u8]) -> Result<Record<'a>, FileError> {
        let interface = self.interfaces.first().ok_or(FileError::Interface(0))?;
        if body.len() < 4 {
            return Err(FileError::Block(SIMPLE_PACKET));
        }
        let original_len = word(body, 0, self.big_endian) as usize;
        let mut len = original_len;
        if interface.snap_len != 0 {
            len = len.min(interface.snap_len);
        }
        let data = body
            .get(4..4 + len)
            .ok_or(FileError::Block(SIMPLE_PACKET))?;
        Ok(Record {
            time_ns: 0,
            link: interface.link,
            original_len,
            data,
        })
    }
}
