//! The object that a key names, as far as it is known: what operations do to it, and which answers it allows.
//!
//! A state stands for all objects that fit what was seen: the version of a write whose reply was lost lies in a range until
//! somebody reads it, and before the first look at a window of a history not even the value is known.

use crate::op::{NEVER, Nanos, Operation, Outcome, Reason, Rules, Value, Version};
use crate::seen::UNSEEN;

/// What is known of the object.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Content {
    /// Nothing.
    Unknown,
    /// It exists, with whatever value.
    Exists,
    /// It does not exist.
    Absent,
    /// It exists with this value.
    Present(Value),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct State {
    pub content: Content,
    /// Its version is at least this; of an absent object, the last version that it had.
    pub lo: Version,
    /// And at most this; without meaning (and `MAX`) for an absent one.
    pub hi: Version,
    pub expires: Nanos,
    /// The store's clock has come at least so far.
    pub clock: Nanos,
}

/// One step of a history.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Action {
    Operation(Operation),
    /// The object that was there before the first step expires, if it is one that may.
    Vanish,
}

/// The expiry time of an object of which nobody knows whether it expires.
pub(crate) const SOME_TIME: Nanos = NEVER - 1;

impl State {
    /// A key that never was.
    pub const FRESH: Self = Self::absent_above(0);

    /// Nothing is known of the object; the store's clock has come at least to `clock`.
    pub const fn unknown(clock: Nanos) -> Self {
        Self {
            content: Content::Unknown,
            lo: 0,
            hi: Version::MAX,
            expires: SOME_TIME,
            clock,
        }
    }

    /// No object; the last one had at most this version.
    pub const fn absent_above(floor: Version) -> Self {
        Self {
            content: Content::Absent,
            lo: floor,
            hi: Version::MAX,
            expires: NEVER,
            clock: 0,
        }
    }

    /// An object; version 0: any.
    pub const fn present(value: Value, version: Version, expires: Nanos) -> Self {
        Self {
            content: Content::Present(value),
            lo: version,
            hi: if version == 0 { Version::MAX } else { version },
            expires,
            clock: 0,
        }
    }

    /// Whether its version is known to be this.
    pub const fn has_version(&self, version: Version) -> bool {
        !matches!(self.content, Content::Absent) && self.lo == version && self.hi == version
    }

    /// Whether every object that `other` stands for is one of this state's.
    pub fn covers(&self, other: &Self) -> bool {
        (self.content == other.content || self.content == Content::Unknown)
            && self.lo <= other.lo
            && self.hi >= other.hi
            && self.expires == other.expires
            && self.clock <= other.clock
    }

    /// The state when the store's clock has come to `time`.
    pub fn at(mut self, time: Nanos) -> Self {
        self.clock = self.clock.max(time);
        self.hide_if_expired()
    }

    /// The state when the object has expired, if it may have by `time`.
    pub fn expired(self, time: Nanos) -> Option<Self> {
        (self.expires <= time && self.expires < SOME_TIME).then(|| self.at(self.expires))
    }

    /// The state after `action`, if it may take effect with this outcome; without an outcome: if it has an effect at all.
    pub fn apply(&self, action: &Action, outcome: Option<&Outcome>) -> Option<Self> {
        let operation = match action {
            Action::Operation(operation) => operation,
            Action::Vanish => {
                return (self.expires == SOME_TIME && self.content != Content::Absent)
                    .then(|| self.removed());
            }
        };
        let rules = operation.rules();
        if let Some(Outcome::Rejected { reason, version }) = outcome {
            return self.rejected(&rules, *reason, *version);
        }
        let s = self.passing(&rules)?;
        match (operation, outcome) {
            (Operation::Read { .. }, Some(&Outcome::Found { value, version })) => {
                s.existing()?.with_value(value)?.with_version(version)
            }
            (Operation::Read { .. } | Operation::Remove { .. }, Some(Outcome::Absent)) => {
                s.missing()
            }
            (Operation::Write { value, expires, .. }, Some(&Outcome::Written { version })) => {
                s.replaced(Content::Present(*value), *expires, version)
            }
            (Operation::Write { value, expires, .. }, None) => {
                s.replaced(Content::Present(*value), *expires, 0)
            }
            (Operation::Remove { .. }, Some(&Outcome::Removed { version })) => {
                Some(s.existing()?.with_version(version)?.removed())
            }
            (Operation::Remove { .. }, None) => (s.content != Content::Absent).then(|| s.removed()),
            (Operation::Increment { by, .. }, Some(&Outcome::Added { value, version })) => {
                let fits = match s.content {
                    Content::Unknown | Content::Exists => true,
                    Content::Absent => by.add_to(0) == value,
                    Content::Present(Value::Number(old)) => by.add_to(old) == value,
                    Content::Present(Value::Digest { .. }) => false,
                };
                if !fits {
                    return None;
                }
                let value = Content::Present(Value::Number(value));
                s.replaced(value, s.expires, version)
            }
            (Operation::Increment { by, .. }, None) => {
                let value = match s.content {
                    Content::Unknown | Content::Exists => Content::Exists,
                    Content::Absent => Content::Present(Value::Number(by.add_to(0))),
                    Content::Present(Value::Number(old)) => {
                        Content::Present(Value::Number(by.add_to(old)))
                    }
                    Content::Present(Value::Digest { .. }) => return None,
                };
                s.replaced(value, s.expires, 0)
            }
            (Operation::Increment { .. }, Some(Outcome::NotANumber)) => {
                let s = s.existing()?;
                (!matches!(s.content, Content::Present(Value::Number(_)))).then_some(s)
            }
            _ => None,
        }
    }

    fn hide_if_expired(self) -> Self {
        if self.expires <= self.clock {
            self.removed()
        } else {
            self
        }
    }

    const fn removed(mut self) -> Self {
        self.content = Content::Absent;
        self.hi = Version::MAX;
        self.expires = NEVER;
        self
    }

    fn replaced(mut self, content: Content, expires: Nanos, version: Version) -> Option<Self> {
        let above = self.lo.checked_add(1)?;
        (self.lo, self.hi) = match version {
            0 => (above, Version::MAX),
            v if v >= above => (v, v),
            _ => return None,
        };
        self.content = content;
        self.expires = expires;
        Some(self.hide_if_expired())
    }

    fn existing(mut self) -> Option<Self> {
        match self.content {
            Content::Absent => None,
            Content::Unknown => {
                self.content = Content::Exists;
                Some(self)
            }
            Content::Exists | Content::Present(_) => Some(self),
        }
    }

    fn missing(self) -> Option<Self> {
        matches!(self.content, Content::Absent | Content::Unknown).then(|| self.removed())
    }

    fn with_value(mut self, value: Value) -> Option<Self> {
        if let Content::Present(known) = self.content {
            return (known == value).then_some(self);
        }
        self.content = Content::Present(value);
        Some(self)
    }

    fn with_version(self, version: Version) -> Option<Self> {
        match version {
            0 => Some(self),
            v => self.within(v, v),
        }
    }

    fn within(mut self, lo: Version, hi: Version) -> Option<Self> {
        self.lo = self.lo.max(lo);
        self.hi = self.hi.min(hi);
        (self.lo <= self.hi).then_some(self)
    }

    /// What is known if the rules let an operation pass.
    fn passing(self, rules: &Rules) -> Option<Self> {
        if rules.is_none() {
            return Some(self);
        }
        let missing = if rules.absent { None } else { self.missing() };
        let existing = if rules.exists {
            None
        } else {
            self.existing()
                .and_then(|s| match rules.at_most {
                    Some(limit) => s.within(limit.checked_add(1)?, Version::MAX),
                    None => Some(s),
                })
                .and_then(|s| match rules.other_than {
                    Some(wanted) => s.within(wanted, wanted),
                    None => Some(s),
                })
        };
        match (missing, existing) {
            // Either may be; what both have in common is what was known before.
            (Some(_), Some(_)) => Some(self),
            (one, other) => one.or(other),
        }
    }

    /// What is known if a rule refused an operation.
    fn rejected(self, rules: &Rules, reason: Reason, version: Version) -> Option<Self> {
        match reason {
            Reason::Absent if rules.absent => self.missing(),
            Reason::Exists if rules.exists => self.existing()?.with_version(version),
            Reason::Version if !rules.exists => {
                let s = self.existing()?.with_version(version)?;
                if s.lo == s.hi {
                    return (rules.refuses(Some(s.lo)) == Some(Reason::Version)).then_some(s);
                }
                match (rules.at_most, rules.other_than) {
                    (Some(limit), None) => s.within(0, limit),
                    (None, Some(wanted)) if wanted == s.lo => s.within(wanted + 1, Version::MAX),
                    (None, Some(wanted)) if wanted == s.hi => s.within(0, wanted - 1),
                    (None, None) => None,
                    // A hole in the middle of the range is forgotten: that allows more, never less.
                    _ => Some(s),
                }
            }
            _ => None,
        }
    }
}

impl core::fmt::Display for State {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.content {
            Content::Unknown => return f.write_str("anything"),
            Content::Absent => {
                f.write_str("no object")?;
                return match self.lo {
                    0 => Ok(()),
                    v => write!(f, " (versions up to {v} are used)"),
                };
            }
            Content::Exists => f.write_str("some object")?,
            Content::Present(UNSEEN) => f.write_str("a value that nobody read")?,
            Content::Present(value) => write!(f, "{value}")?,
        }
        match (self.lo, self.hi) {
            (0, Version::MAX) => {}
            (lo, hi) if lo == hi => write!(f, " (version {lo})")?,
            (lo, Version::MAX) => write!(f, " (version {lo} or higher)")?,
            (lo, hi) => write!(f, " (version {lo} to {hi})")?,
        }
        if self.expires < SOME_TIME {
            write!(f, " until {}", self.expires)?;
        }
        Ok(())
    }
}
