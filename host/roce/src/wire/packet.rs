//! A whole transport packet: BTH, extended headers, payload, pad, ICRC (IBA 1.4, 9.1; A17.4).

use super::{Bth, Extension, Opcode, ParseError, Result, bth, need, opcode::Info};

/// Bytes of the ICRC at the end.
pub const ICRC_LEN: usize = 4;

/// A view over the bytes from BTH to ICRC, whose lengths have been checked against opcode and pad count.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    bytes: &'a [u8],
    info: &'static Info,
    pad: usize,
}

impl<'a> Packet<'a> {
    /// Checks all lengths. After this no accessor panics.
    #[inline]
    pub fn new_checked(bytes: &'a [u8]) -> Result<Packet<'a>> {
        need(bytes, bth::LEN + ICRC_LEN, "packet")?;
        let info = Opcode::info_of(bytes[0]).ok_or(ParseError::Opcode(bytes[0]))?;
        let header_len = info.header_len;
        need(bytes, header_len + ICRC_LEN, info.opcode.name())?;
        if !bytes.len().is_multiple_of(4) {
            return Err(ParseError::Unaligned(bytes.len()));
        }
        let pad = usize::from(bytes[1] >> 4 & 3);
        let rest = bytes.len() - header_len - ICRC_LEN;
        if !info.payload && rest != 0 {
            return Err(ParseError::Excess {
                opcode: info.opcode,
                excess: rest,
            });
        }
        if pad > rest {
            return Err(ParseError::Pad { pad, have: rest });
        }
        Ok(Packet { bytes, info, pad })
    }

    /// What its opcode is.
    #[inline]
    pub fn info(&self) -> &'static Info {
        self.info
    }

    /// All bytes, from BTH to ICRC.
    #[inline]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// BTH and extended headers.
    #[inline]
    pub fn headers(&self) -> &'a [u8] {
        &self.bytes[..self.info.header_len]
    }

    /// Payload without pad.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[self.info.header_len..self.bytes.len() - ICRC_LEN - self.pad]
    }

    /// The 0 to 3 bytes behind it; senders write zeros, receivers ignore them.
    #[inline]
    pub fn pad(&self) -> &'a [u8] {
        &self.bytes[self.bytes.len() - ICRC_LEN - self.pad..self.bytes.len() - ICRC_LEN]
    }

    /// The ICRC as it stands there: little-endian, unlike all else.
    #[inline]
    pub fn icrc(&self) -> u32 {
        let mut b = [0; ICRC_LEN];
        b.copy_from_slice(&self.bytes[self.bytes.len() - ICRC_LEN..]);
        u32::from_le_bytes(b)
    }

    /// Parses the headers.
    #[inline]
    pub fn repr(&self) -> Result<Repr> {
        Repr::parse(self)
    }
}

/// The headers of a packet, parsed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Repr {
    /// Base transport header.
    pub bth: Bth,
    /// Extended headers: those of `bth.opcode`.
    pub ext: Extension,
}

impl Repr {
    /// Parses all headers of a packet.
    #[inline]
    pub fn parse(packet: &Packet<'_>) -> Result<Repr> {
        let bth = Bth::read(packet.bytes, packet.info.opcode)?;
        let ext = Extension::parse(packet.info.layout, &packet.bytes[bth::LEN..])?;
        Ok(Repr { bth, ext })
    }

    /// Parses headers, whatever is behind them: for packets of which only the beginning is there.
    #[inline]
    pub fn parse_headers(bytes: &[u8]) -> Result<Repr> {
        let bth = Bth::parse(bytes)?;
        let ext = Extension::parse(bth.opcode.info().layout, &bytes[bth::LEN..])?;
        Ok(Repr { bth, ext })
    }

    /// Bytes of the headers.
    #[inline]
    pub fn header_len(&self) -> usize {
        bth::LEN + self.ext.layout().len()
    }

    /// Bytes of the packet with `payload_len` bytes of payload: headers, payload, pad, ICRC.
    #[inline]
    pub fn buffer_len(&self, payload_len: usize) -> usize {
        self.header_len() + payload_len.next_multiple_of(4) + ICRC_LEN
    }

    /// Sets the pad count for `payload_len` bytes of payload.
    #[inline]
    pub fn set_pad(&mut self, payload_len: usize) {
        self.bth.pad = pad_of(payload_len);
    }

    /// Writes the headers, and gives how many bytes they have. `buffer` has room for them.
    #[inline]
    pub fn emit_headers(&self, buffer: &mut [u8]) -> usize {
        debug_assert_eq!(
            self.ext.layout(),
            self.bth.opcode.info().layout,
            "extended headers of another opcode than {:?}",
            self.bth.opcode
        );
        self.bth.emit(buffer);
        self.ext.emit(&mut buffer[bth::LEN..]);
        self.header_len()
    }

    /// Writes headers, payload and a pad of zeros, with the pad count that the payload asks for. The ICRC is left to
    /// [`crate::icrc::Flow::seal`]. `buffer` has [`Repr::buffer_len`] bytes.
    pub fn emit(&self, payload: &[u8], buffer: &mut [u8]) {
        let mut repr = *self;
        repr.set_pad(payload.len());
        let at = repr.emit_headers(buffer);
        let end = buffer.len() - ICRC_LEN;
        let (data, pad) = buffer[at..end].split_at_mut(payload.len());
        data.copy_from_slice(payload);
        pad.fill(0);
    }
}

/// The pad count of `payload_len` bytes: what makes them a multiple of four.
#[inline]
pub const fn pad_of(payload_len: usize) -> u8 {
    (payload_len.wrapping_neg() & 3) as u8
}
