//! What a client asked for, and what it was told.

use core::fmt;

use xxhash_rust::xxh3::xxh3_64;

/// Time in ns, of a clock that all clients of a history share (`CLOCK_MONOTONIC` of one machine).
pub type Nanos = u64;

/// An object's version; 0 where it was not told.
pub type Version = u64;

/// The time that never comes: an operation that did not return, an object that does not expire.
pub const NEVER: Nanos = u64::MAX;

/// A value, small enough to keep millions of: itself if it has eight bytes, and so may be a number that was incremented, else its
/// length and a hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Value {
    /// The eight bytes, little-endian.
    Number(u64),
    /// Any other value.
    Digest {
        /// Its length in bytes.
        len: u32,
        /// XXH3 of it, 64 bits, seed 0.
        hash: u64,
    },
}

impl Value {
    /// The value with these bytes, up to 4 GiB of them.
    #[must_use]
    #[inline]
    pub fn of(bytes: &[u8]) -> Self {
        match bytes.try_into() {
            Ok(number) => Self::Number(u64::from_le_bytes(number)),
            Err(_) => Self::Digest {
                len: bytes.len() as u32,
                hash: xxh3_64(bytes),
            },
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Number(n) => write!(f, "number {}", n as i64),
            Self::Digest { len, hash } => write!(f, "{len} B #{hash:016x}"),
        }
    }
}

/// When an operation is refused, as RAMCloud's `RejectRules`. An object that does not exist has no version: only `absent` looks
/// at it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Rules {
    /// Refuse if the object exists.
    pub exists: bool,
    /// Refuse if the object does not exist.
    pub absent: bool,
    /// Refuse if its version is at most this.
    pub at_most: Option<Version>,
    /// Refuse if its version is another.
    pub other_than: Option<Version>,
}

impl Rules {
    /// No condition.
    pub const NONE: Self = Self {
        exists: false,
        absent: false,
        at_most: None,
        other_than: None,
    };

    /// Whether there is no condition.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// Which rule refuses an object with this version; none for one that does not exist.
    #[must_use]
    pub fn refuses(&self, version: Option<Version>) -> Option<Reason> {
        match version {
            None => self.absent.then_some(Reason::Absent),
            Some(_) if self.exists => Some(Reason::Exists),
            Some(v) => (self.at_most.is_some_and(|limit| v <= limit)
                || self.other_than.is_some_and(|wanted| v != wanted))
            .then_some(Reason::Version),
        }
    }
}

/// What an increment adds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Addend {
    /// An integer; sums wrap around.
    I64(i64),
    /// A floating-point number, by its bits.
    F64(u64),
}

impl Addend {
    /// Bits of the sum with the number that has the bits `old`.
    #[must_use]
    pub fn add_to(self, old: u64) -> u64 {
        match self {
            Self::I64(by) => old.wrapping_add(by as u64),
            Self::F64(by) => (f64::from_bits(old) + f64::from_bits(by)).to_bits(),
        }
    }
}

/// What a client asked for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Operation {
    /// Read the object, by whatever way (request or one-sided).
    Read {
        /// When to refuse; most reads have none.
        rules: Option<Box<Rules>>,
    },
    /// Write it.
    Write {
        /// The new value.
        value: Value,
        /// From when on it does not exist any more, on the history's clock; [`NEVER`]: it stays.
        expires: Nanos,
        /// When to refuse.
        rules: Option<Box<Rules>>,
    },
    /// Remove it.
    Remove {
        /// When to refuse.
        rules: Option<Box<Rules>>,
    },
    /// Add to a number; one that does not exist counts as 0, an expiry stays as it is.
    Increment {
        /// What to add.
        by: Addend,
        /// When to refuse.
        rules: Option<Box<Rules>>,
    },
}

impl Operation {
    /// A read without conditions.
    pub const READ: Self = Self::Read { rules: None };
    /// A removal without conditions.
    pub const REMOVE: Self = Self::Remove { rules: None };

    /// A write without conditions, of an object that stays.
    #[must_use]
    pub const fn write(value: Value) -> Self {
        Self::Write {
            value,
            expires: NEVER,
            rules: None,
        }
    }

    /// Adding an integer without conditions.
    #[must_use]
    pub const fn add(by: i64) -> Self {
        Self::Increment {
            by: Addend::I64(by),
            rules: None,
        }
    }

    /// The same operation, refused under these conditions.
    #[must_use]
    pub fn unless(mut self, conditions: Rules) -> Self {
        match &mut self {
            Self::Read { rules }
            | Self::Write { rules, .. }
            | Self::Remove { rules }
            | Self::Increment { rules, .. } => {
                *rules = (!conditions.is_none()).then(|| Box::new(conditions));
            }
        }
        self
    }

    /// When it is refused.
    #[must_use]
    pub fn rules(&self) -> Rules {
        match self {
            Self::Read { rules }
            | Self::Write { rules, .. }
            | Self::Remove { rules }
            | Self::Increment { rules, .. } => rules.as_deref().copied().unwrap_or(Rules::NONE),
        }
    }

    /// Whether a server that keeps its word may answer so.
    #[must_use]
    pub fn may_return(&self, outcome: &Outcome) -> bool {
        match outcome {
            Outcome::Refused => true,
            Outcome::Rejected { reason, .. } => {
                let rules = self.rules();
                match reason {
                    Reason::Exists => rules.exists,
                    Reason::Absent => rules.absent,
                    Reason::Version => rules.at_most.is_some() || rules.other_than.is_some(),
                }
            }
            Outcome::Found { .. } => matches!(self, Self::Read { .. }),
            Outcome::Absent => matches!(self, Self::Read { .. } | Self::Remove { .. }),
            Outcome::Written { .. } => matches!(self, Self::Write { .. }),
            Outcome::Removed { .. } => matches!(self, Self::Remove { .. }),
            Outcome::Added { .. } | Outcome::NotANumber => {
                matches!(self, Self::Increment { .. })
            }
        }
    }
}

/// Which rule refused an operation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reason {
    /// The object exists.
    Exists,
    /// It does not exist.
    Absent,
    /// Its version is too low, or another than given.
    Version,
}

/// What a client was told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// The object that a read found.
    Found {
        /// Its value.
        value: Value,
        /// Its version.
        version: Version,
    },
    /// A read found nothing, or there was nothing to remove.
    Absent,
    /// A write was done.
    Written {
        /// The new version.
        version: Version,
    },
    /// The object was removed.
    Removed {
        /// The version that it had.
        version: Version,
    },
    /// An increment was done.
    Added {
        /// Bits of the sum.
        value: u64,
        /// The new version.
        version: Version,
    },
    /// A rule refused it: nothing was changed.
    Rejected {
        /// Which.
        reason: Reason,
        /// Version of the object, 0 if it does not exist.
        version: Version,
    },
    /// The object to increment has not eight bytes.
    NotANumber,
    /// Refused for another reason (the store is full, say): certainly without effect, and nothing was learnt about the object.
    Refused,
}

impl Outcome {
    /// Whether whoever is told this changed nothing.
    #[must_use]
    pub const fn is_observation(&self) -> bool {
        matches!(
            self,
            Self::Found { .. }
                | Self::Absent
                | Self::Rejected { .. }
                | Self::NotANumber
                | Self::Refused
        )
    }

    /// The version that was told, 0 for none: of the object read, removed or left alone, or of the one written.
    #[must_use]
    pub const fn version(&self) -> Version {
        match *self {
            Self::Found { version, .. }
            | Self::Written { version }
            | Self::Removed { version }
            | Self::Added { version, .. }
            | Self::Rejected { version, .. } => version,
            Self::Absent | Self::NotANumber | Self::Refused => 0,
        }
    }
}

/// What makes a retry recognisable: requests with the same id are one operation, which takes effect at most once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct RequestId {
    /// The client, as the store knows it.
    pub client: u64,
    /// Number of the request, from 1 on; 0: the operation has no id.
    pub sequence: u64,
}

impl RequestId {
    /// No id.
    pub const NONE: Self = Self {
        client: 0,
        sequence: 0,
    };

    /// Whether there is one.
    #[must_use]
    pub const fn is_some(&self) -> bool {
        self.sequence != 0
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut join = " unless";
        let mut say = |f: &mut fmt::Formatter<'_>, text: fmt::Arguments<'_>| {
            write!(f, "{join} {text}")?;
            join = " or";
            Ok(())
        };
        if self.exists {
            say(f, format_args!("it exists"))?;
        }
        if self.absent {
            say(f, format_args!("it is absent"))?;
        }
        if let Some(v) = self.at_most {
            say(f, format_args!("its version is at most {v}"))?;
        }
        if let Some(v) = self.other_than {
            say(f, format_args!("its version is not {v}"))?;
        }
        Ok(())
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { .. } => f.write_str("read")?,
            Self::Write { value, expires, .. } => {
                write!(f, "write {value}")?;
                if *expires != NEVER {
                    write!(f, " until {expires}")?;
                }
            }
            Self::Remove { .. } => f.write_str("remove")?,
            Self::Increment { by, .. } => match by {
                Addend::I64(by) => write!(f, "add {by}")?,
                Addend::F64(by) => write!(f, "add {:?}", f64::from_bits(*by))?,
            },
        }
        write!(f, "{}", self.rules())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = |f: &mut fmt::Formatter<'_>, v: &Version| {
            if *v == 0 {
                Ok(())
            } else {
                write!(f, " (version {v})")
            }
        };
        match self {
            Self::Found { value, version: v } => {
                write!(f, "{value}")?;
                version(f, v)
            }
            Self::Absent => f.write_str("no such object"),
            Self::Written { version: v } => {
                f.write_str("written")?;
                version(f, v)
            }
            Self::Removed { version: v } => {
                f.write_str("removed")?;
                version(f, v)
            }
            Self::Added { value, version: v } => {
                write!(f, "{}", Value::Number(*value))?;
                version(f, v)
            }
            Self::Rejected { reason, version: v } => {
                f.write_str(match reason {
                    Reason::Exists => "rejected: it exists",
                    Reason::Absent => "rejected: it does not exist",
                    Reason::Version => "rejected: its version",
                })?;
                version(f, v)
            }
            Self::NotANumber => f.write_str("not a number"),
            Self::Refused => f.write_str("refused"),
        }
    }
}
