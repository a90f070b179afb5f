//! What the engine's tests share: short names for operations on the default table without conditions, and random numbers
//! whose seed is printed.
#![allow(dead_code, reason = "each test uses a part of it")]

use kvstore::store::{
    CleanProgress, DEFAULT_TABLE, Found, RejectRules, Reservation, Store, StoreError, Write,
};

/// Operations on the default table, at time 0.
pub trait Plain {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<u64, StoreError>;
    fn look(&self, key: &[u8]) -> Option<Found>;
    fn del(&mut self, key: &[u8]) -> Result<Option<u64>, StoreError>;
    fn hold(&mut self, key: &[u8], len: usize) -> Result<Reservation, StoreError>;
    fn seal(&mut self, reservation: Reservation) -> Result<u64, StoreError>;
    fn slice(&mut self, budget: usize) -> CleanProgress;
    fn adopt(&mut self, source: &[u8]) -> Result<u64, StoreError>;
}

impl Plain for Store<Vec<u8>> {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<u64, StoreError> {
        self.put(DEFAULT_TABLE, key, value, 0)
    }
    fn look(&self, key: &[u8]) -> Option<Found> {
        self.get(DEFAULT_TABLE, key, 0)
    }
    fn del(&mut self, key: &[u8]) -> Result<Option<u64>, StoreError> {
        self.remove(DEFAULT_TABLE, key, &RejectRules::NONE, None, 0)
    }
    fn hold(&mut self, key: &[u8], len: usize) -> Result<Reservation, StoreError> {
        self.reserve(&Write::new(DEFAULT_TABLE, key, &[]), len, 0)
    }
    fn seal(&mut self, reservation: Reservation) -> Result<u64, StoreError> {
        self.commit(reservation, 0)
    }
    fn slice(&mut self, budget: usize) -> CleanProgress {
        self.clean(budget, 0)
    }
    fn adopt(&mut self, source: &[u8]) -> Result<u64, StoreError> {
        self.replay(source, 0)
    }
}

/// A small generator for histories longer than proptest should shrink.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

/// A fresh seed, or that of `HYV_STORE_SEED`; printed, so that a failure can be run again.
pub fn seed() -> u64 {
    let seed = std::env::var("HYV_STORE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| {
            let now = std::time::SystemTime::now();
            now.duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_nanos() as u64
                | 1
        });
    println!("HYV_STORE_SEED={seed}");
    seed
}
