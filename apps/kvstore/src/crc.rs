//! CRC-32C (Castagnoli), the checksum of log entries.
//!
//! The instruction for it is in every x86-64 CPU since 2008, so a guest image and a Linux process compute it at the same
//! speed; elsewhere a table does.
#![allow(
    unsafe_code,
    reason = "calls a function compiled for SSE 4.2 after the CPU said it has it"
)]

const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The CRC-32C of `bytes` (initial value and final complement as in iSCSI: of `123456789` it is `0xe3069283`).
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    !update(u32::MAX, bytes)
}

/// The remainder `state` taken on over `bytes`.
#[inline(always)]
fn update(state: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if x86::available() {
        // SAFETY: the CPU has just been found to have SSE 4.2, the one feature that function is compiled for.
        return unsafe { x86::update(state, bytes) };
    }
    portable(state, bytes)
}

/// A CRC-32C under way, of bytes that others will precede.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    state: u32,
    bytes: u64,
}

impl Sum {
    /// Takes in the next bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        self.state = update(self.state, bytes);
        self.bytes += bytes.len() as u64;
    }

    /// The CRC-32C of `prefix` and, behind it, all bytes taken in.
    #[must_use]
    pub fn after(&self, prefix: &[u8]) -> u32 {
        // Remainders are linear: that of the prefix, moved past the other bytes, and that of these by themselves.
        !(multiply(update(u32::MAX, prefix), power_of_x8(self.bytes)) ^ self.state)
    }
}

/// The product of two polynomials modulo that of the CRC; bit 31 is the coefficient of 1.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let (mut product, mut bit) = (0, 1u32 << 31);
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        b = (b >> 1) ^ (POLYNOMIAL & (b & 1).wrapping_neg());
        bit >>= 1;
    }
    product
}

/// x to the power of 8 n modulo the CRC's polynomial.
const fn power_of_x8(mut n: u64) -> u32 {
    let (mut power, mut square) = (1u32 << 31, 1u32 << 23);
    while n != 0 {
        if n & 1 != 0 {
            power = multiply(power, square);
        }
        square = multiply(square, square);
        n >>= 1;
    }
    power
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::{__cpuid, _mm_crc32_u8, _mm_crc32_u32, _mm_crc32_u64};
    use core::sync::atomic::{AtomicU8, Ordering};

    const UNKNOWN: u8 = 0;
    const ABSENT: u8 = 1;
    const PRESENT: u8 = 2;
    const SSE42: u32 = 1 << 20;

    /// CPUID can cost a VM exit, so it is asked once.
    static FOUND: AtomicU8 = AtomicU8::new(UNKNOWN);

    #[inline]
    pub(super) fn available() -> bool {
        if cfg!(target_feature = "sse4.2") {
            return true;
        }
        match FOUND.load(Ordering::Relaxed) {
            UNKNOWN => detect(),
            found => found == PRESENT,
        }
    }

    #[cold]
    fn detect() -> bool {
        let present = __cpuid(1).ecx & SSE42 != 0;
        FOUND.store(if present { PRESENT } else { ABSENT }, Ordering::Relaxed);
        present
    }

    #[target_feature(enable = "sse4.2")]
    pub(super) fn update(state: u32, bytes: &[u8]) -> u32 {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut crc = u64::from(state);
        for word in words {
            crc = _mm_crc32_u64(crc, u64::from_le_bytes(*word));
        }
        let mut crc = crc as u32;
        let (half, rest) = rest.as_chunks::<4>();
        if let [half] = half {
            crc = _mm_crc32_u32(crc, u32::from_le_bytes(*half));
        }
        for &byte in rest {
            crc = _mm_crc32_u8(crc, byte);
        }
        crc
    }
}

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

fn portable(state: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(state, |crc, &byte| {
        (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn known_vectors() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn both_ways_agree_at_every_length() {
        let bytes: Vec<u8> = (0..300u32).map(|n| ((n * 131) >> 3) as u8).collect();
        for length in 0..bytes.len() {
            assert_eq!(
                crc32c(&bytes[..length]),
                !portable(u32::MAX, &bytes[..length])
            );
        }
    }

    #[test]
    fn a_sum_in_parts_is_that_of_the_whole() {
        let bytes: Vec<u8> = (0..5000u32).map(|n| ((n * n * 7) >> 5) as u8).collect();
        for length in (0..bytes.len()).step_by(37) {
            let (prefix, rest) = bytes[..length].split_at(length.min(20));
            let (first, second) = rest.split_at(rest.len() / 3);
            let mut sum = Sum::default();
            sum.add(first);
            sum.add(second);
            assert_eq!(sum.after(prefix), crc32c(&bytes[..length]), "{length}");
        }
    }
}
