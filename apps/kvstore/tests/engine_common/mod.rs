//! What the engine's tests share: short names for operations on the default table without conditions, and random numbers
//! whose seed is printed.
#![allow(
    dead_code,
    unused_macros,
    unused_imports,
    reason = "each test uses a part of it"
)]

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

/// Seeds of random schedules, each printed before it is used, so that a failure can be run again: at least so many fresh ones, and more until
/// `HYV_STORE_SECONDS` are over; or so many from that of `HYV_STORE_SEED` on.
pub fn seeds(least: u64) -> impl Iterator<Item = u64> {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        let number = text.parse::<u64>();
        Some(number.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
    };
    let given = number("HYV_STORE_SEED");
    let first = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now();
        let since_epoch = now.duration_since(std::time::UNIX_EPOCH).unwrap();
        since_epoch.as_nanos() as u64 | 1
    });
    let seconds = number("HYV_STORE_SECONDS").filter(|_| given.is_none());
    let start = std::time::Instant::now();
    (0..)
        .take_while(move |&round| {
            round < least || seconds.is_some_and(|limit| start.elapsed().as_secs() < limit)
        })
        .map(move |round| {
            let seed = first.wrapping_add(2 * round);
            println!("HYV_STORE_SEED={seed}");
            seed
        })
}

/// Tests of one random schedule each: a function of the seed becomes a test with a fresh one, by itself and, for so long as asked, in the step
/// of fresh seeds of the whole test run, which goes by this module's name.
macro_rules! fresh_seeds {
    ($($name:ident)*) => {
        mod fresh_seeds {
            $(#[test]
            fn $name() {
                crate::engine_common::seeds(1).for_each(super::$name);
            })*
        }
    };
}
pub(crate) use fresh_seeds;
