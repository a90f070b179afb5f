//! What a soak's client does next: a random mix over keys that all fight for, keys that expire, and many that keep the cleaner busy.
//!
//! | keys | what is done with them |
//! | --- | --- |
//! | hot | everything, at once, by everybody: reads, writes of 0 B to 1 MiB, removes, conditions; a quarter are numbers, added to |
//! | fading | less often, and what is written expires within seconds |
//! | fill | overwritten: as many as fill the store |
//!
//! Every second key is in a table of its own, under the same name as one in the default table; some are too long for a message.

use std::collections::HashMap;

use kvstore::proto::MultiOp;
use kvstore_check::op::{Addend, NEVER, Nanos, Operation, Outcome, Rules, Value, Version};

use super::limits::{
    CLOCK_SLACK_NS, FILL_BYTES, HOT_BYTES, HUGE_BYTES, LIFETIME_NS, LONG_KEY_BYTES, MAX_ELEMENTS,
    SHORTEST_LIFETIME_NS,
};

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

    /// A number below `n`, and as often between 1 and 2 as between n/2 and n.
    pub const fn skewed(&mut self, n: u64) -> u64 {
        let bits = u64::BITS - n.leading_zeros();
        let limit = 1 << self.below(bits as u64 + 1);
        let limit = if limit < n { limit } else { n };
        self.below(limit)
    }
}

/// A key of a table.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Spot {
    /// Table.
    pub table: u32,
    /// Key.
    pub key: Vec<u8>,
}

impl Spot {
    /// Its name in a history.
    #[must_use]
    pub fn recorded(&self) -> Vec<u8> {
        match self.table {
            0 => self.key.clone(),
            table => [format!("{table}:").as_bytes(), &self.key].concat(),
        }
    }
}

const FILL: &[u8] = b"fill/";

/// The keys of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keys {
    /// Keys that all clients use.
    pub hot: u64,
    /// Keys whose objects expire.
    pub fading: u64,
    /// Keys that fill the store.
    pub fill: u64,
    /// Table of every second one of the first two.
    pub table: u32,
}

impl Keys {
    /// A key that all use.
    #[must_use]
    pub fn hot(&self, n: u64) -> Spot {
        let mut spot = self.spot("hot", n);
        if n % 16 >= 14 {
            spot.key.push(b'/');
            spot.key.resize(LONG_KEY_BYTES, b'x');
        }
        spot
    }

    /// A key whose objects expire.
    #[must_use]
    pub fn fading(&self, n: u64) -> Spot {
        self.spot("fading", n)
    }

    fn spot(&self, kind: &str, n: u64) -> Spot {
        Spot {
            table: if n.is_multiple_of(2) { 0 } else { self.table },
            key: format!("{kind}/{}", n / 2).into_bytes(),
        }
    }

    /// A key that fills the store.
    #[must_use]
    pub fn fill(n: u64) -> Spot {
        Spot {
            table: 0,
            key: [FILL, n.to_string().as_bytes()].concat(),
        }
    }

    /// Which of the keys that fill the store this is, if it is one.
    #[must_use]
    pub fn fill_number(key: &[u8]) -> Option<u64> {
        std::str::from_utf8(key.strip_prefix(FILL)?)
            .ok()?
            .parse()
            .ok()
    }

    /// The keys that are read back after each round.
    pub fn read_back(&self) -> impl Iterator<Item = Spot> + '_ {
        let hot = (0..self.hot).map(|n| self.hot(n));
        hot.chain((0..self.fading).map(|n| self.fading(n)))
    }
}

/// What a client asks for, with the value itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Read.
    Read,
    /// Write.
    Write {
        /// The value.
        value: Vec<u8>,
        /// When it expires, on the clock of the history; [`NEVER`]: it stays.
        expires: Nanos,
    },
    /// Remove.
    Remove,
    /// Add to a number.
    Increment(Addend),
}

impl Request {
    /// As a history has it.
    #[must_use]
    pub fn operation(&self, rules: Rules) -> Operation {
        match self {
            Self::Read => Operation::READ,
            Self::Write { value, expires } => Operation::Write {
                value: Value::of(value),
                expires: *expires,
                rules: None,
            },
            Self::Remove => Operation::REMOVE,
            Self::Increment(by) => Operation::Increment {
                by: *by,
                rules: None,
            },
        }
        .unless(rules)
    }
}

/// One operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// On what.
    pub spot: Spot,
    /// What.
    pub request: Request,
    /// When to refuse it.
    pub rules: Rules,
}

/// What to do next, in one request: several steps if it is a multi-operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Turn {
    /// Of which kind; none: a single operation.
    pub multi: Option<MultiOp>,
    /// The operations.
    pub steps: Vec<Step>,
}

/// One client's mix.
#[derive(Debug)]
pub struct Workload {
    random: Random,
    keys: Keys,
    client: u32,
    written: u64,
    /// Versions seen, for conditions that have a chance.
    versions: HashMap<Spot, Version>,
}

/// Sorts of keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sort {
    Hot,
    Number,
    Fading,
    Fill,
}

impl Workload {
    /// The mix of client number `client`, the same for the same seed and answers.
    #[must_use]
    pub fn new(seed: u64, client: u32, keys: Keys) -> Self {
        Self {
            random: Random(seed ^ u64::from(client) << 32),
            keys,
            client,
            written: 0,
            versions: HashMap::new(),
        }
    }

    /// What to do at a time.
    pub fn next(&mut self, now: Nanos) -> Turn {
        if !self.random.percent(8) {
            return Turn {
                multi: None,
                steps: vec![self.step(now, None)],
            };
        }
        let op = MultiOp::ALL[self.random.below(MultiOp::ALL.len() as u64) as usize];
        let count = 1 + self.random.below(MAX_ELEMENTS);
        Turn {
            multi: Some(op),
            steps: (0..count).map(|_| self.step(now, Some(op))).collect(),
        }
    }

    fn step(&mut self, now: Nanos, op: Option<MultiOp>) -> Step {
        let (spot, sort) = self.spot(op);
        let request = match op {
            None => self.request(now, sort),
            Some(MultiOp::Read) => Request::Read,
            Some(MultiOp::Write) => self.write(now, sort, false),
            Some(MultiOp::Remove) => Request::Remove,
            Some(MultiOp::Increment) => self.increment(&spot),
        };
        let request = match request {
            Request::Increment(_) => self.increment(&spot),
            other => other,
        };
        let rules = if sort != Sort::Fill && self.random.percent(25) {
            self.rules(&spot)
        } else {
            Rules::NONE
        };
        Step {
            spot,
            request,
            rules,
        }
    }

    /// On what to do it. Nobody removes what fills the store.
    fn spot(&mut self, op: Option<MultiOp>) -> (Spot, Sort) {
        let r = &mut self.random;
        let sort = match op {
            None | Some(MultiOp::Read | MultiOp::Write) if self.keys.fill > 0 => match r.below(100)
            {
                0..40 => Sort::Fill,
                40..52 => Sort::Fading,
                _ => Sort::Hot,
            },
            Some(MultiOp::Increment) => Sort::Hot,
            _ if r.percent(20) => Sort::Fading,
            _ => Sort::Hot,
        };
        match sort {
            Sort::Fill => (Keys::fill(r.below(self.keys.fill)), sort),
            Sort::Fading if self.keys.fading > 0 => {
                (self.keys.fading(r.below(self.keys.fading)), sort)
            }
            _ => {
                // Some keys more than others, so that clients meet.
                let n = r.below(self.keys.hot).min(r.below(self.keys.hot));
                let sort = if n % 8 < 2 { Sort::Number } else { Sort::Hot };
                (self.keys.hot(n), sort)
            }
        }
    }

    fn request(&mut self, now: Nanos, sort: Sort) -> Request {
        match (sort, self.random.below(100)) {
            (Sort::Fill, 0..10) | (Sort::Fading, 0..65) | (Sort::Hot | Sort::Number, 0..45) => {
                Request::Read
            }
            (Sort::Fading, 65..70) | (Sort::Hot | Sort::Number, 45..55) => Request::Remove,
            (Sort::Number, 55..85) => Request::Increment(Addend::I64(1)),
            _ => self.write(now, sort, true),
        }
    }

    /// What to add: to some numbers integers, to others floating-point numbers.
    fn increment(&mut self, spot: &Spot) -> Request {
        let n = 1 + self.random.below(3);
        let text = spot.key.split(|b| *b == b'/').nth(1).unwrap_or_default();
        let is_float = text.last().is_some_and(|digit| digit.is_multiple_of(2));
        Request::Increment(if is_float {
            Addend::F64((n as f64 / 4.0).to_bits())
        } else {
            Addend::I64(n as i64 - 2)
        })
    }

    /// A value that no other write of any client has, if it has 8 bytes or more.
    fn write(&mut self, now: Nanos, sort: Sort, alone: bool) -> Request {
        let r = &mut self.random;
        let (len, expires) = match sort {
            Sort::Fill => (9 + r.below(FILL_BYTES - 9), NEVER),
            // Not numbers: when an incremented one expires cannot be told from its value.
            Sort::Number => (8, NEVER),
            Sort::Fading => {
                let lifetime = SHORTEST_LIFETIME_NS + r.below(LIFETIME_NS - SHORTEST_LIFETIME_NS);
                (9 + r.below(600), now + lifetime)
            }
            Sort::Hot => {
                let len = match r.below(400) {
                    0 if alone => 1 + r.below(HUGE_BYTES),
                    1..20 => 9 + r.below(HOT_BYTES),
                    20..24 => r.below(8),
                    _ => 9 + r.below(300),
                };
                // Over before it begins; beyond doubt, so that it does not matter whose clock is right.
                let over = len > 8 && r.percent(2);
                let past = 2 * CLOCK_SLACK_NS + r.below(LIFETIME_NS);
                let expires = if over {
                    now.saturating_sub(past)
                } else {
                    NEVER
                };
                (len, expires)
            }
        };
        self.written += 1;
        let mark = u64::from(self.client) << 32 | self.written & 0xffff_ffff;
        let mark = mark.to_le_bytes().into_iter().cycle();
        Request::Write {
            value: mark.take(len as usize).collect(),
            expires,
        }
    }

    /// Takes note of what was told.
    pub fn told(&mut self, spot: &Spot, outcome: &Outcome) {
        if outcome.version() != 0 && Keys::fill_number(&spot.key).is_none() {
            self.versions.insert(spot.clone(), outcome.version());
        }
    }

    fn rules(&mut self, spot: &Spot) -> Rules {
        let version = self.versions.get(spot).copied().unwrap_or(1);
        match self.random.below(5) {
            0 => Rules {
                exists: true,
                ..Rules::NONE
            },
            1 => Rules {
                absent: true,
                ..Rules::NONE
            },
            2 => Rules {
                at_most: Some(version.saturating_sub(1)),
                ..Rules::NONE
            },
            3 => Rules {
                other_than: Some(version),
                ..Rules::NONE
            },
            _ => Rules {
                absent: true,
                other_than: Some(version),
                ..Rules::NONE
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: Keys = Keys {
        hot: 32,
        fading: 16,
        fill: 100,
        table: 5,
    };

    #[test]
    fn a_seed_is_replayed_and_clients_differ() {
        let turns = |seed, client| {
            let mut w = Workload::new(seed, client, KEYS);
            (0..200).map(|t| w.next(t)).collect::<Vec<_>>()
        };
        assert_eq!(turns(1, 1), turns(1, 1));
        assert_ne!(turns(1, 1), turns(1, 2));
        assert_ne!(turns(1, 1), turns(2, 1));
    }

    #[test]
    fn everything_there_is_happens() {
        let now = 1 << 40;
        let mut w = Workload::new(3, 1, KEYS);
        let turns: Vec<Turn> = (0..5_000).map(|_| w.next(now)).collect();
        for op in MultiOp::ALL {
            assert!(turns.iter().any(|t| t.multi == Some(op)), "{op:?}");
        }
        let steps: Vec<&Step> = turns.iter().flat_map(|t| &t.steps).collect();
        let any = |f: fn(&Step) -> bool| steps.iter().any(|s| f(s));
        assert!(any(|s| s.request == Request::Read));
        assert!(any(|s| s.request == Request::Remove));
        assert!(any(|s| s.spot.table == 0) && any(|s| s.spot.table == 5));
        assert!(any(|s| s.spot.key.len() == LONG_KEY_BYTES));
        assert!(any(|s| !s.rules.is_none()));
        let adds = |f: fn(&Addend) -> bool| {
            let mut requests = steps.iter().map(|s| &s.request);
            requests.any(|r| matches!(r, Request::Increment(by) if f(by)))
        };
        assert!(adds(|by| matches!(by, Addend::I64(_))) && adds(|by| matches!(by, Addend::F64(_))));
        let writes = |f: &dyn Fn(&[u8], Nanos) -> bool| {
            let mut requests = steps.iter().map(|s| &s.request);
            requests.any(|r| matches!(r, Request::Write { value, expires } if f(value, *expires)))
        };
        assert!(writes(&|_, expires| expires < now));
        assert!(writes(&|_, expires| expires > now && expires != NEVER));
        assert!(writes(&|value, _| value.is_empty()));
        assert!(writes(&|value, _| value.len() > 64 << 10));
    }

    /// What is told of expiry and of who wrote what depends on it.
    #[test]
    fn nobody_removes_what_fills_the_store_and_only_long_values_expire() {
        let mut w = Workload::new(4, 1, KEYS);
        for turn in 0..5_000 {
            for step in w.next(1 << 40).steps {
                match step.request {
                    Request::Write { value, expires } => {
                        assert!(expires == NEVER || value.len() > 8, "{turn}");
                        assert!(
                            Keys::fill_number(&step.spot.key).is_none() || step.rules.is_none()
                        );
                    }
                    Request::Remove | Request::Increment(_) => {
                        assert_eq!(Keys::fill_number(&step.spot.key), None, "{turn}");
                    }
                    Request::Read => {}
                }
            }
        }
    }

    #[test]
    fn no_two_keys_have_one_name() {
        let mut names = std::collections::HashSet::new();
        for spot in KEYS.read_back().chain((0..KEYS.fill).map(Keys::fill)) {
            assert!(names.insert(spot.recorded()), "{spot:?}");
        }
        assert_eq!(Keys::fill_number(&Keys::fill(37).key), Some(37));
        assert_eq!(Keys::fill_number(b"fill/x"), None);
    }
}
