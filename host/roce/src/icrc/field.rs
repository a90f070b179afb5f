//! Arithmetic in GF(2)[x] modulo the CRC-32 polynomial: what a 16-bit field adds to a CRC, and which field a CRC asks for.
//!
//! Bits are reflected: bit 31 of a word is the coefficient of x^0.

/// The polynomial, without x^32.
const POLY: u32 = 0xedb8_8320;
/// x^0.
const ONE: u32 = 0x8000_0000;
/// x^8: one byte further.
const BYTE: u32 = 0x0080_0000;

/// a·b.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut i = 0;
    while i < 32 {
        product ^= b & (a >> (31 - i) & 1).wrapping_neg();
        b = b >> 1 ^ (b & 1).wrapping_neg() & POLY;
        i += 1;
    }
    product
}

/// a^n.
const fn power(mut a: u32, mut n: u32) -> u32 {
    let mut product = ONE;
    while n != 0 {
        if n & 1 != 0 {
            product = multiply(product, a);
        }
        a = multiply(a, a);
        n >>= 1;
    }
    product
}

/// x^-8. The polynomial is primitive, so x has the order 2^32 - 1.
const UNBYTE: u32 = power(BYTE, u32::MAX - 1);

/// Table\[i\] is x^(-8 · 2^i): takes back 2^i bytes.
const UNBYTES: [u32; 16] = {
    let mut table = [UNBYTE; 16];
    let mut i = 1;
    while i < 16 {
        table[i] = multiply(table[i - 1], table[i - 1]);
        i += 1;
    }
    table
};

/// What a big-endian 16-bit field adds to the CRC of the pseudo headers, by its two bytes.
pub(super) struct Field {
    high: [u32; 256],
    low: [u32; 256],
}

impl Field {
    /// `behind`: bytes between the field and the end of the UDP header.
    const fn new(behind: u32) -> Field {
        Field {
            high: byte_table(behind + 1),
            low: byte_table(behind),
        }
    }

    #[inline]
    pub(super) fn of(&self, value: u16) -> u32 {
        let [high, low] = value.to_be_bytes();
        self.high[usize::from(high)] ^ self.low[usize::from(low)]
    }
}

/// What a byte adds that has `behind` bytes behind it.
const fn byte_table(behind: u32) -> [u32; 256] {
    let shift = power(BYTE, behind + 1);
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = multiply(byte as u32, shift);
        byte += 1;
    }
    table
}

/// What the BTH's masked byte adds to the CRC in front of the BTH, by how it differs from ones: a change four bytes into what follows is
/// one of the CRC before it.
pub(super) static MASKED_BYTE: [u32; 256] = {
    let back = power(UNBYTE, crate::wire::bth::MASKED_BYTE as u32);
    let mut table = [0; 256];
    let mut difference = 0;
    while difference < 256 {
        table[difference] = multiply(difference as u32, back);
        difference += 1;
    }
    table
};

/// Bytes between the IPv4 identification and the end of the UDP header.
const BEHIND_IDENT: u32 = 14 + 8;

pub(super) static V4_TOTAL_LEN: Field = Field::new(16 + 8);
pub(super) static V4_IDENT: Field = Field::new(BEHIND_IDENT);
pub(super) static V6_PAYLOAD_LEN: Field = Field::new(34 + 8);
pub(super) static UDP_LEN: Field = Field::new(2);

/// Finds identifications, and keeps what packets of one length have in common: traffic has few lengths.
#[derive(Clone, Copy, Debug)]
pub struct IdentSolver {
    packet_len: usize,
    /// Takes a CRC back from the end of the packet to where the identification stands.
    back: u32,
}

impl Default for IdentSolver {
    fn default() -> IdentSolver {
        IdentSolver::new()
    }
}

impl IdentSolver {
    /// A solver.
    pub const fn new() -> IdentSolver {
        IdentSolver {
            packet_len: 0,
            back: 0,
        }
    }

    /// As [`solve_ident`].
    #[inline]
    pub fn solve(&mut self, residual: u32, packet_len: usize) -> Option<u16> {
        if self.packet_len != packet_len || self.back == 0 {
            // The two bytes of the field, those behind it in the headers, and the packet up to its ICRC.
            let bytes = 2 + BEHIND_IDENT as usize + packet_len.checked_sub(super::ICRC_LEN)?;
            let mut back = ONE;
            for (i, unbytes) in UNBYTES.iter().enumerate() {
                if bytes >> i & 1 != 0 {
                    back = multiply(back, *unbytes);
                }
            }
            if bytes >> UNBYTES.len() != 0 {
                return None;
            }
            *self = IdentSolver { packet_len, back };
        }
        let field = multiply(self.back, residual);
        // The first byte of the field is the low one of the reflected word.
        u16::try_from(field).ok().map(u16::swap_bytes)
    }
}

/// The IPv4 identification with which a packet of `packet_len` bytes (from BTH to ICRC) has the right ICRC, where
/// `residual` is [`super::Flow::residual`] for identification 0. `None` if none makes it right: the packet is corrupt. One corrupt packet
/// in 65,536 passes.
pub fn solve_ident(residual: u32, packet_len: usize) -> Option<u16> {
    IdentSolver::new().solve(residual, packet_len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_and_back() {
        assert_eq!(multiply(BYTE, UNBYTE), ONE);
        assert_eq!(multiply(power(BYTE, 1 << 15), UNBYTES[15]), ONE);
    }
}
