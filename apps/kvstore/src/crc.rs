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
    #[cfg(target_arch = "x86_64")]
    if x86::available() {
        // SAFETY: the CPU has just been found to have SSE 4.2, the one feature that function is compiled for.
        return unsafe { x86::crc32c(bytes) };
    }
    portable(bytes)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::{__cpuid, _mm_crc32_u8, _mm_crc32_u64};
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
    pub(super) fn crc32c(bytes: &[u8]) -> u32 {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut crc = u64::from(u32::MAX);
        for word in words {
            crc = _mm_crc32_u64(crc, u64::from_le_bytes(*word));
        }
        let mut crc = crc as u32;
        for &byte in rest {
            crc = _mm_crc32_u8(crc, byte);
        }
        !crc
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

fn portable(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
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
            assert_eq!(crc32c(&bytes[..length]), portable(&bytes[..length]));
        }
    }
}
