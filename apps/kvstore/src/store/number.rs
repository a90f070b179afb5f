//! Numbers that [`super::Store::increment`] adds to: values of 8 bytes, little-endian.

/// What to add, or a sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Increment {
    /// A signed integer.
    I64(i64),
    /// A floating-point number.
    F64(f64),
}

/// The result of an increment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Incremented {
    /// The new number, of the kind that was added.
    pub value: Increment,
    /// Version of the object.
    pub version: u64,
}

impl Increment {
    /// The sum of this and the number with the bits `old`.
    pub(crate) fn apply(self, old: u64) -> Self {
        match self {
            Self::I64(by) => Self::I64((old as i64).wrapping_add(by)),
            Self::F64(by) => Self::F64(f64::from_bits(old) + by),
        }
    }

    /// The bits of the number, as they are stored.
    #[must_use]
    pub const fn bits(self) -> u64 {
        match self {
            Self::I64(value) => value as u64,
            Self::F64(value) => value.to_bits(),
        }
    }
}
