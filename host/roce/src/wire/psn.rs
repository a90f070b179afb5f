//! Arithmetic of packet sequence numbers: 24 bits, modulo 2^24 (IBA 1.4, 9.7.1).

/// Bits of a PSN (and of a QPN, an MSN).
pub const MASK: u32 = 0x00ff_ffff;

/// `psn` and `n` packets further.
#[inline]
pub const fn add(psn: u32, n: u32) -> u32 {
    psn.wrapping_add(n) & MASK
}

/// `psn` and `n` packets back.
#[inline]
pub const fn sub(psn: u32, n: u32) -> u32 {
    psn.wrapping_sub(n) & MASK
}

/// How many packets `a` is ahead of `b`, from -2^23 to 2^23 - 1: negative if it is behind.
#[inline]
pub const fn diff(a: u32, b: u32) -> i32 {
    (a.wrapping_sub(b) << 8).cast_signed() >> 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wraps_and_splits_the_circle_in_half() {
        assert_eq!(add(0xff_ffff, 1), 0);
        assert_eq!(sub(0, 1), 0xff_ffff);
        assert_eq!(diff(0, 0xff_ffff), 1);
        assert_eq!(diff(0xff_ffff, 0), -1);
        assert_eq!(diff(0x7f_ffff, 0), 0x7f_ffff);
        assert_eq!(diff(0x80_0000, 0), -0x80_0000);
    }
}
