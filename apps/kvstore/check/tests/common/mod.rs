//! A store that keeps its word, simulated in virtual time with clients that overlap, die and lose replies.
#![allow(dead_code, reason = "each test file uses a part")]

use kvstore_check::op::{
    Addend, NEVER, Nanos, Operation, Outcome, Reason, RequestId, Rules, Value, Version,
};
use kvstore_check::{KeyHistory, Op};

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Seeds to try: `HYV_CHECK_SEED` replays one.
pub fn seeds(n: u64) -> Vec<u64> {
    match std::env::var("HYV_CHECK_SEED") {
        Ok(seed) => vec![seed.parse().expect("HYV_CHECK_SEED is a number")],
        Err(_) => (1..=n).collect(),
    }
}

/// Where fresh seeds begin, each time elsewhere; 0 if `HYV_CHECK_SEED` replays one.
pub fn fresh_seed() -> u64 {
    if std::env::var_os("HYV_CHECK_SEED").is_some() {
        return 0;
    }
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.expect("it is after 1970").as_nanos() as u64
}

/// One object, concretely.
#[derive(Clone, Default, Debug)]
pub struct Object {
    pub held: Option<(Value, Version, Nanos)>,
    /// Highest version so far.
    pub floor: Version,
}

impl Object {
    /// Executes an operation at a time.
    pub fn execute(&mut self, operation: &Operation, now: Nanos) -> Outcome {
        if self.held.is_some_and(|(_, _, expires)| expires <= now) {
            self.held = None;
        }
        if let Some(reason) = operation.rules().refuses(self.held.map(|h| h.1)) {
            let version = self.held.map_or(0, |h| h.1);
            return Outcome::Rejected { reason, version };
        }
        match operation {
            Operation::Read { .. } => match self.held {
                Some((value, version, _)) => Outcome::Found { value, version },
                None => Outcome::Absent,
            },
            Operation::Write { value, expires, .. } => {
                self.floor += 1;
                self.held = Some((*value, self.floor, *expires));
                Outcome::Written {
                    version: self.floor,
                }
            }
            Operation::Remove { .. } => match self.held.take() {
                Some((_, version, _)) => Outcome::Removed { version },
                None => Outcome::Absent,
            },
            Operation::Increment { by, .. } => {
                let (old, expires) = match self.held {
                    None => (0, NEVER),
                    Some((Value::Number(old), _, expires)) => (old, expires),
                    Some(_) => return Outcome::NotANumber,
                };
                let value = by.add_to(old);
                self.floor += 1;
                self.held = Some((Value::Number(value), self.floor, expires));
                Outcome::Added {
                    value,
                    version: self.floor,
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
pub struct Config {
    pub clients: u64,
    /// Percent of operations whose reply is lost, before or after they take effect, or long before they do.
    pub lost: u64,
    pub versions: bool,
    /// Percent of writes that expire.
    pub expiring: u64,
    /// Shortest and longest time until they do.
    pub lifetime: (Nanos, Nanos),
    /// Percent of those whose time was over long before.
    pub over: u64,
    /// Of a million moments so many are those at which half of the operations under way lose their replies.
    pub kills: u64,
    /// How far the store's clock is ahead of the history's.
    pub ahead: i64,
    /// Values that differ; 0: all do.
    pub values: u64,
    pub increments: bool,
    /// Some of them of floating-point numbers.
    pub floats: bool,
    pub conditional: bool,
    pub slack: Nanos,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            clients: 5,
            lost: 0,
            versions: true,
            expiring: 0,
            lifetime: (0, 3_000),
            over: 0,
            kills: 0,
            ahead: 0,
            values: 0,
            increments: true,
            floats: true,
            conditional: true,
            slack: 0,
        }
    }
}

impl Config {
    /// What a key gets that many clients fight for while some are killed: in the time by which the store's clock is in doubt there are a
    /// thousand operations, and objects expire after one to four times as long.
    pub fn soak() -> Self {
        Self {
            clients: 16,
            expiring: 30,
            lifetime: (12_500, 40_000),
            over: 10,
            kills: 300,
            slack: 10_000,
            floats: false,
            ..Self::default()
        }
    }
}

/// A simulated run on one key.
pub struct Sim {
    pub rng: Rng,
    pub object: Object,
    pub now: Nanos,
    pub history: KeyHistory,
    pub config: Config,
    written: u64,
    next_client: u32,
    /// Effects of lost requests that have not happened yet.
    late: Vec<(Nanos, Operation)>,
}

#[derive(Clone)]
struct Running {
    op: Op,
    effect: Nanos,
    returns: Nanos,
    done: bool,
}

impl Sim {
    pub fn new(seed: u64, config: Config) -> Self {
        Self {
            rng: Rng(seed),
            object: Object::default(),
            now: 10_000_000,
            history: KeyHistory::default(),
            config,
            written: 0,
            next_client: 1000,
            late: Vec::new(),
        }
    }

    pub fn value(&mut self) -> Value {
        self.written += 1;
        let n = match self.config.values {
            0 => self.written,
            some => self.rng.below(some),
        };
        if self.config.increments && self.rng.chance(40) {
            Value::Number(1_000 * n)
        } else {
            Value::Digest { len: 100, hash: n }
        }
    }

    fn expiry(&mut self) -> Nanos {
        let (from, to) = self.config.lifetime;
        if !self.rng.chance(self.config.expiring) {
            NEVER
        } else if self.rng.chance(self.config.over) {
            self.now - 2 * self.config.slack - self.rng.below(to)
        } else {
            self.now + from + self.rng.below(to - from)
        }
    }

    /// The store's clock.
    fn clock(&self) -> Nanos {
        self.now.saturating_add_signed(self.config.ahead)
    }

    pub fn operation(&mut self) -> Operation {
        let operation = match self.rng.below(100) {
            0..45 => Operation::READ,
            45..55 => Operation::REMOVE,
            55..70 if self.config.increments => Operation::Increment {
                by: if self.rng.chance(80) || !self.config.floats {
                    Addend::I64(self.rng.below(3) as i64 + 1)
                } else {
                    Addend::F64(1.5f64.to_bits())
                },
                rules: None,
            },
            _ => Operation::Write {
                value: self.value(),
                expires: self.expiry(),
                rules: None,
            },
        };
        if !self.config.conditional || self.rng.chance(75) {
            return operation;
        }
        let near = (self.object.floor + 1).saturating_sub(self.rng.below(3));
        operation.unless(match self.rng.below(4) {
            0 => Rules {
                exists: true,
                ..Rules::NONE
            },
            1 => Rules {
                absent: true,
                ..Rules::NONE
            },
            2 => Rules {
                at_most: Some(near),
                ..Rules::NONE
            },
            _ => Rules {
                absent: self.rng.chance(50),
                other_than: Some(near),
                ..Rules::NONE
            },
        })
    }

    /// Clients that overlap, until `n` operations were asked for and all that will be answered are.
    pub fn run(&mut self, n: usize) {
        let mut running: Vec<Option<Running>> = vec![None; self.config.clients as usize];
        let mut begun = 0;
        while begun < n || running.iter().any(Option::is_some) {
            self.now += 1 + self.rng.below(20);
            let now = self.now;
            self.take_late_effect();
            if self.config.kills > 0 && self.rng.below(1_000_000) < self.config.kills {
                for slot in &mut running {
                    if self.rng.chance(50)
                        && let Some(r) = slot.take()
                    {
                        self.cut(r);
                    }
                }
            }
            // In an order of its own, not that of the clients.
            let mut due: Vec<usize> = (0..running.len()).collect();
            due.sort_by_key(|c| running[*c].as_ref().map_or(NEVER, |r| r.effect));
            for client in due {
                if let Some(r) = &mut running[client] {
                    if !r.done && r.effect <= now {
                        r.done = true;
                        let outcome = self.object.execute(
                            &r.op.operation,
                            self.now.saturating_add_signed(self.config.ahead),
                        );
                        r.op.outcome = Some(outcome);
                    }
                    if r.done && r.returns <= now {
                        r.op.returned = now;
                        let op = r.op.clone();
                        running[client] = None;
                        self.push(op);
                    }
                } else if begun < n && self.rng.chance(30) {
                    begun += 1;
                    let operation = self.operation();
                    let op = Op {
                        client: client as u32,
                        number: begun as u64,
                        invoked: now,
                        returned: NEVER,
                        operation,
                        outcome: None,
                        request: RequestId::NONE,
                    };
                    if self.rng.chance(self.config.lost) {
                        self.lose(op);
                        continue;
                    }
                    let effect = now + self.rng.below(100);
                    let returns = effect + self.rng.below(100);
                    running[client] = Some(Running {
                        op,
                        effect,
                        returns,
                        done: false,
                    });
                }
            }
        }
        self.now += 1;
    }

    fn take_late_effect(&mut self) {
        let (now, clock) = (self.now, self.clock());
        let mut at = 0;
        while at < self.late.len() {
            if self.late[at].0 <= now {
                let (_, operation) = self.late.swap_remove(at);
                self.object.execute(&operation, clock);
            } else {
                at += 1;
            }
        }
    }

    /// A request that was sent loses its reply, or the client dies before it is executed.
    fn cut(&mut self, mut running: Running) {
        running.op.outcome = None;
        if running.done {
            running.op.client = self.next_client;
            self.next_client += 1;
            self.history.ops.push(running.op);
        } else {
            self.lose(running.op);
        }
    }

    /// The client dies: its request is never executed, or some time later.
    fn lose(&mut self, mut op: Op) {
        op.client = self.next_client;
        self.next_client += 1;
        if self.rng.chance(60) {
            let when = self.now + self.rng.below(2_000);
            self.late.push((when, op.operation.clone()));
        }
        self.history.ops.push(op);
    }

    fn push(&mut self, mut op: Op) {
        if !self.config.versions {
            op.outcome = op.outcome.map(without_version);
        }
        self.history.ops.push(op);
    }

    /// One operation while nothing else goes on. Gives its number in the history.
    pub fn alone(&mut self, operation: Operation) -> usize {
        let invoked = self.now;
        let outcome = self.object.execute(&operation, self.clock() + 1);
        self.now += 2;
        let number = self.history.ops.len() as u64 + 1_000_000;
        self.push(Op {
            client: 999,
            number,
            invoked,
            returned: self.now,
            operation,
            outcome: Some(outcome),
            request: RequestId::NONE,
        });
        self.now += 1;
        self.history.ops.len() - 1
    }

    /// Lets everything late happen.
    pub fn settle(&mut self) {
        self.now += 3_000;
        self.take_late_effect();
    }
}

pub fn without_version(outcome: Outcome) -> Outcome {
    let version = 0;
    match outcome {
        Outcome::Found { value, .. } => Outcome::Found { value, version },
        Outcome::Written { .. } => Outcome::Written { version },
        Outcome::Removed { .. } => Outcome::Removed { version },
        Outcome::Added { value, .. } => Outcome::Added { value, version },
        // A refusal by version is told with the version.
        Outcome::Rejected {
            reason: reason @ (Reason::Exists | Reason::Absent),
            ..
        } => Outcome::Rejected { reason, version },
        other => other,
    }
}
