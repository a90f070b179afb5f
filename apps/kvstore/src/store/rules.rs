//! Reject rules: conditions on the object's version under which an operation is refused, as RAMCloud has them.

use super::StoreError;
use core::fmt;

/// When to refuse an operation. An object that does not exist, or has expired, has no version, and only `absent` looks at it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RejectRules {
    /// Refuse if the object exists.
    pub exists: bool,
    /// Refuse if the object does not exist.
    pub absent: bool,
    /// Refuse if the object's version is at most this.
    pub at_most: Option<u64>,
    /// Refuse if the object's version is another than this.
    pub other_than: Option<u64>,
}

impl RejectRules {
    /// No rule.
    pub const NONE: Self = Self {
        exists: false,
        absent: false,
        at_most: None,
        other_than: None,
    };

    /// Only create: refuse if the object exists.
    pub const EXISTS: Self = Self {
        exists: true,
        ..Self::NONE
    };

    /// Only change: refuse if the object does not exist.
    pub const ABSENT: Self = Self {
        absent: true,
        ..Self::NONE
    };

    /// Only change what has this version: refuse if the object does not exist or has another.
    #[must_use]
    pub const fn unless_version(version: u64) -> Self {
        Self {
            absent: true,
            other_than: Some(version),
            ..Self::NONE
        }
    }

    /// Whether there is no rule.
    #[must_use]
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        !self.exists && !self.absent && self.at_most.is_none() && self.other_than.is_none()
    }

    /// Applies the rules to an object's version, none if it does not exist. Errors: [`StoreError::Rejected`].
    #[inline]
    pub fn check(&self, version: Option<u64>) -> Result<(), StoreError> {
        let reason = match version {
            None if self.absent => RejectReason::Absent,
            None => return Ok(()),
            Some(_) if self.exists => RejectReason::Exists,
            Some(version)
                if self.at_most.is_some_and(|limit| version <= limit)
                    || self.other_than.is_some_and(|wanted| version != wanted) =>
            {
                RejectReason::Version
            }
            Some(_) => return Ok(()),
        };
        Err(StoreError::Rejected {
            reason,
            version: version.unwrap_or(0),
        })
    }
}

/// Which rule refused an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RejectReason {
    /// The object exists.
    Exists = 1,
    /// The object does not exist.
    Absent = 2,
    /// The object's version is too low, or another than given.
    Version = 3,
}

impl RejectReason {
    /// The reason with number `raw`, if there is one.
    #[must_use]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::Exists,
            2 => Self::Absent,
            3 => Self::Version,
            _ => return None,
        })
    }
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exists => "exists",
            Self::Absent => "does not exist",
            Self::Version => "has another version than the rule allows",
        })
    }
}
