//! What a soak's client does next: a random mix over a few keys that all fight for and many that keep the cleaner busy.

use std::collections::HashMap;

use kvstore_check::op::{Addend, NEVER, Nanos, Outcome, Rules, Version};

use super::store::{Abilities, Request};

/// Longest value under a key that clients fight for, bytes: beyond what travels in a message.
const HOT_BYTES: u64 = 64 << 10;
/// Longest value that fills the store, bytes.
pub(super) const FILL_BYTES: u64 = 2048;
/// Longest time until an object expires: seen by whoever reads it soon after.
const EXPIRY_NS: u64 = 200_000_000;

/// A random sequence (SplitMix64), the same for the same seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub const fn below(&mut self, n: u64) -> u64 {
        ((self.next() as u128 * n as u128) >> 64) as u64
    }

    /// True in so many of 100 cases.
    pub const fn percent(&mut self, n: u64) -> bool {
        self.below(100) < n
    }
}

/// The keys of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keys {
    /// Keys that all clients use.
    pub hot: u64,
    /// Keys that fill the store.
    pub fill: u64,
}

impl Keys {
    /// Name of a key that all use.
    #[must_use]
    pub fn hot(n: u64) -> Vec<u8> {
        format!("hot/{n}").into_bytes()
    }

    /// Name of a key that fills the store.
    #[must_use]
    pub fn fill(n: u64) -> Vec<u8> {
        format!("fill/{n}").into_bytes()
    }

    /// Whether a name is one of those that fill the store, which nobody reads back.
    #[must_use]
    pub fn is_fill(key: &[u8]) -> bool {
        key.starts_with(b"fill/")
    }
}

/// One client's mix.
#[derive(Debug)]
pub struct Workload {
    random: Random,
    keys: Keys,
    abilities: Abilities,
    client: u32,
    written: u64,
    /// Versions seen, for conditions that have a chance.
    versions: HashMap<Vec<u8>, Version>,
}

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// On which key.
    pub key: Vec<u8>,
    /// What.
    pub request: Request,
    /// When to refuse it.
    pub rules: Rules,
}

impl Workload {
    /// The mix of client number `client`, the same for the same seed and answers.
    #[must_use]
    pub fn new(seed: u64, client: u32, keys: Keys, abilities: Abilities) -> Self {
        Self {
            random: Random(seed ^ u64::from(client) << 32),
            keys,
            abilities,
            client,
            written: 0,
            versions: HashMap::new(),
        }
    }

    /// What to do at a time.
    pub fn next(&mut self, now: Nanos) -> Step {
        let r = &mut self.random;
        if self.keys.fill > 0 && r.percent(40) {
            let key = Keys::fill(r.below(self.keys.fill));
            let request = if r.percent(90) {
                let len = 1 + r.below(FILL_BYTES);
                self.write(len, NEVER)
            } else {
                Request::Read
            };
            return Step {
                key,
                request,
                rules: Rules::NONE,
            };
        }
        // Some keys more than others, so that clients meet.
        let n = r.below(self.keys.hot).min(r.below(self.keys.hot));
        let key = Keys::hot(n);
        let is_counter = n.is_multiple_of(4);
        let request = match r.below(100) {
            0..40 => Request::Read,
            40..50 => Request::Remove,
            50..80 if is_counter && self.abilities.increments => {
                Request::Increment(Addend::I64(1 + (r.below(2) as i64)))
            }
            _ => {
                // Not numbers: when an incremented one expires cannot be told from its value.
                let expires = if self.abilities.expiry && !is_counter && r.percent(10) {
                    now + r.below(EXPIRY_NS)
                } else {
                    NEVER
                };
                let len = match r.below(20) {
                    _ if is_counter => 8,
                    0 => 1 + r.below(HOT_BYTES),
                    _ => 1 + r.below(300),
                };
                self.write(len, expires)
            }
        };
        let rules = if self.abilities.rules && self.random.percent(25) {
            self.rules(&key)
        } else {
            Rules::NONE
        };
        Step {
            key,
            request,
            rules,
        }
    }

    /// Takes note of what was told.
    pub fn told(&mut self, key: &[u8], outcome: &Outcome) {
        if outcome.version() != 0 && !Keys::is_fill(key) {
            self.versions.insert(key.to_vec(), outcome.version());
        }
    }

    fn rules(&mut self, key: &[u8]) -> Rules {
        let version = self.versions.get(key).copied().unwrap_or(1);
        match self.random.below(4) {
            0 => Rules {
                exists: true,
                ..Rules::NONE
            },
            1 => Rules {
                absent: true,
                ..Rules::NONE
            },
            2 => Rules {
                at_most: Some(version),
                ..Rules::NONE
            },
            _ => Rules {
                absent: true,
                other_than: Some(version),
                ..Rules::NONE
            },
        }
    }

    /// A value that no other write of any client has, if it has 12 bytes or more, or 8.
    fn write(&mut self, len: u64, expires: Nanos) -> Request {
        self.written += 1;
        let mark = u64::from(self.client) << 32 | self.written & 0xffff_ffff;
        let value = mark
            .to_le_bytes()
            .into_iter()
            .cycle()
            .take(len as usize)
            .collect();
        Request::Write { value, expires }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_replayed_and_clients_differ() {
        let keys = Keys { hot: 10, fill: 10 };
        let steps = |seed, client| {
            let mut w = Workload::new(seed, client, keys, Abilities::default());
            (0..200).map(|t| w.next(t)).collect::<Vec<_>>()
        };
        assert_eq!(steps(1, 1), steps(1, 1));
        assert_ne!(steps(1, 1), steps(1, 2));
        assert_ne!(steps(1, 1), steps(2, 1));
    }

    #[test]
    fn the_mix_uses_what_there_is() {
        let keys = Keys { hot: 8, fill: 100 };
        let all = Abilities {
            rules: true,
            increments: true,
            expiry: true,
        };
        for abilities in [Abilities::default(), all] {
            let mut w = Workload::new(3, 1, keys, abilities);
            let steps: Vec<Step> = (0..2_000).map(|t| w.next(t)).collect();
            let any = |f: fn(&Step) -> bool| steps.iter().any(f);
            assert!(any(|s| s.request == Request::Read));
            assert!(any(|s| s.request == Request::Remove));
            assert!(any(|s| Keys::is_fill(&s.key)) && any(|s| !Keys::is_fill(&s.key)));
            assert_eq!(
                any(|s| matches!(s.request, Request::Increment(_))),
                abilities.increments
            );
            assert_eq!(any(|s| !s.rules.is_none()), abilities.rules);
            assert_eq!(
                any(|s| matches!(s.request, Request::Write { expires, .. } if expires != NEVER)),
                abilities.expiry
            );
        }
    }
}
