//! Packet sequence numbers: 24 bits, modulo 2^24 (IBA 1.4, 9.7.2).

/// A packet sequence number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Psn(u32);

impl Psn {
    const MASK: u32 = 0xff_ffff;

    /// The low 24 bits of `v`.
    #[inline]
    #[must_use]
    pub const fn new(v: u32) -> Self {
        Self(v & Self::MASK)
    }

    /// As a number below 2^24.
    #[inline]
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// `n` packets later.
    #[inline]
    #[must_use]
    pub const fn add(self, n: u32) -> Self {
        Self::new(self.0.wrapping_add(n))
    }

    /// The one before.
    #[inline]
    #[must_use]
    pub const fn prev(self) -> Self {
        Self::new(self.0.wrapping_sub(1))
    }

    /// How many packets after `from` this is: -2^23 to 2^23 - 1.
    #[inline]
    #[must_use]
    pub const fn since(self, from: Self) -> i32 {
        ((self.0.wrapping_sub(from.0) << 8) as i32) >> 8
    }

    /// Whether it is in `first..end`.
    #[inline]
    #[must_use]
    pub const fn within(self, first: Self, end: Self) -> bool {
        self.since(first) >= 0 && self.since(end) < 0
    }
}

impl core::fmt::LowerHex for Psn {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::LowerHex::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::Psn;

    #[test]
    fn arithmetic_wraps() {
        let a = Psn::new(0xff_fffe);
        assert_eq!(a.add(3), Psn::new(1));
        assert_eq!(Psn::new(0).prev(), Psn::new(0xff_ffff));
        assert_eq!(Psn::new(1).since(a), 3);
        assert_eq!(a.since(Psn::new(1)), -3);
        assert_eq!(Psn::new(0x80_0000).since(Psn::new(0)), -(1 << 23));
        assert_eq!(Psn::new(0x7f_ffff).since(Psn::new(0)), (1 << 23) - 1);
        assert!(Psn::new(0).within(a, Psn::new(1)));
        assert!(!Psn::new(1).within(a, Psn::new(1)));
        assert!(!a.within(a, a));
    }
}
