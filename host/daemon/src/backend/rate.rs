//! A token bucket in integers: so many requests per second, and so many at once.

/// One user's allowance.
#[derive(Debug)]
pub(super) struct TokenBucket {
    /// What is left, as time: a request costs `cost_ns`.
    credit_ns: u64,
    cost_ns: u64,
    full_ns: u64,
    last_ns: u64,
}

impl TokenBucket {
    /// A full bucket. A rate or burst of 0 counts as 1.
    pub(super) fn new(per_second: u32, burst: u32, now_ns: u64) -> Self {
        let cost_ns = (1_000_000_000 / u64::from(per_second.max(1))).max(1);
        let full_ns = cost_ns.saturating_mul(burst.max(1).into());
        Self {
            credit_ns: full_ns,
            cost_ns,
            full_ns,
            last_ns: now_ns,
        }
    }

    /// Takes one token, if there is one.
    pub(super) fn take(&mut self, now_ns: u64) -> bool {
        let passed = now_ns.saturating_sub(self.last_ns);
        self.last_ns = self.last_ns.max(now_ns);
        self.credit_ns = self.credit_ns.saturating_add(passed).min(self.full_ns);
        let ok = self.credit_ns >= self.cost_ns;
        if ok {
            self.credit_ns -= self.cost_ns;
        }
        ok
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_then_rate() {
        let mut b = TokenBucket::new(1000, 5, 77);
        assert_eq!((0..10).filter(|_| b.take(77)).count(), 5);
        assert!(!b.take(77 + 999_999));
        assert!(b.take(77 + 1_000_000));
        let taken = (0..10_000u64)
            .filter(|i| b.take(2_000_000 + i * 100_000))
            .count();
        assert!((999..=1002).contains(&taken), "{taken}");
        assert_eq!((0..10).filter(|_| b.take(u64::MAX)).count(), 5);
        assert!(!b.take(0), "time that goes back gives nothing");
    }
}
