//! Numbers that a seed replays.

use std::time::{SystemTime, UNIX_EPOCH};

/// A small generator (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // Neighbouring seeds must not give neighbouring sequences, and zero gives none.
        Self((seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`, which is not zero.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Any bytes.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(n + 8);
        while bytes.len() < n {
            bytes.extend(self.next_u64().to_le_bytes());
        }
        bytes.truncate(n);
        bytes
    }
}

/// A seed: `HYV_SEED` if that is set, which replays a run, else a new one. Printed, so that a failure shows it.
///
/// # Panics
/// When `HYV_SEED` is no number.
#[must_use]
pub fn seed() -> u64 {
    let seed = match std::env::var("HYV_SEED") {
        Ok(text) => text.parse().expect("HYV_SEED is a number"),
        Err(_) => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |t| t.as_nanos() as u64 % 1_000_000_007),
    };
    eprintln!("HYV_SEED={seed} replays this");
    seed
}
