//! Multi-operations: many elements in one request, each with its own result.
//!
//! Elements are packed one after the other, in the message or in the client's memory. An element is flags (u8; of
//! [`FLAG_TABLE`], [`FLAG_RULES`], [`FLAG_EXPIRES`], [`FLAG_VARIANT`]), length of the key (u16), then as in a request of its own what its
//! flags say; then, writing, the length of the value (u32), or incrementing, the number (8 bytes); then the key and the value.
//!
//! Results come in the same order: status (u8); then, if it is not Ok, the detail (u64), otherwise what there is to say: reading,
//! version (u64), length (u32), value; writing and removing, version (u64); incrementing, version and number (u64 each).

use super::blocks::{emit_rules, parse_rules};
use super::cursor::{Reader, Writer};
use super::{FLAG_EXPIRES, FLAG_RULES, FLAG_TABLE, FLAG_VARIANT, ProtoError, RemoteBuffer, Status};
use crate::limits::MAX_VALUE_BYTES;
use crate::store::{Increment, NEVER, RejectRules};

/// Most bytes of one multi-operation's elements, and of its results: bounds what a client must provide, not what the server
/// holds, which takes them in pieces.
pub const MAX_MULTI_BYTES: usize = 4 << 20;

/// Fewest bytes of an element.
pub const MIN_ELEMENT_BYTES: usize = 4;

/// What all elements of a multi-operation do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum MultiOp {
    /// Read.
    Read = 0,
    /// Write.
    Write = 1,
    /// Remove.
    Remove = 2,
    /// Increment.
    Increment = 3,
}

impl MultiOp {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Remove, Self::Increment];

    /// Fewest bytes of buffer for a result of this kind: what any element may need, a value apart.
    #[must_use]
    pub const fn result_bytes(self) -> usize {
        match self {
            Self::Read | Self::Write | Self::Remove => 9,
            Self::Increment => 17,
        }
    }
}

/// Where the elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elements<'a> {
    /// In the message.
    Inline(&'a [u8]),
    /// In the client's memory.
    Remote(RemoteBuffer),
}

/// One element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Element<'a> {
    /// Table.
    pub table: u32,
    /// Key.
    pub key: &'a [u8],
    /// When to refuse.
    pub rules: RejectRules,
    /// Writing: from when on the object does not exist any more; [`NEVER`] in all other cases.
    pub expires: u64,
    /// Writing: the value; otherwise empty.
    pub value: &'a [u8],
    /// Incrementing: what to add; otherwise 0.
    pub by: Increment,
}

impl<'a> Element<'a> {
    /// An element without conditions, for a read or a remove.
    #[must_use]
    pub const fn new(table: u32, key: &'a [u8]) -> Self {
        Self {
            table,
            key,
            rules: RejectRules::NONE,
            expires: NEVER,
            value: &[],
            by: Increment::I64(0),
        }
    }

    /// Reads the element at the start of `bytes`. Returns it, and how many bytes it has.
    ///
    /// Errors: [`ProtoError::Truncated`] if it goes on beyond the end; anything that [`emit_element`] would not have written.
    pub fn parse(op: MultiOp, bytes: &'a [u8]) -> Result<(Self, usize), ProtoError> {
        let mut input = Reader { bytes };
        let flags = input.u8()?;
        let allowed = FLAG_TABLE
            | FLAG_RULES
            | match op {
                MultiOp::Write => FLAG_EXPIRES,
                MultiOp::Increment => FLAG_VARIANT,
                MultiOp::Read | MultiOp::Remove => 0,
            };
        if flags & !allowed != 0 {
            return Err(ProtoError::Flags(flags));
        }
        let key_len = usize::from(input.u16()?);
        if key_len == 0 {
            return Err(ProtoError::EmptyKey);
        }
        let mut element = Self::new(0, &[]);
        if flags & FLAG_TABLE != 0 {
            element.table = input.u32()?;
            if element.table == 0 {
                return Err(ProtoError::Field("table"));
            }
        }
        if flags & FLAG_RULES != 0 {
            element.rules = parse_rules(&mut input)?;
        }
        if flags & FLAG_EXPIRES != 0 {
            element.expires = input.u64()?;
            if element.expires == NEVER {
                return Err(ProtoError::Field("expires"));
            }
        }
        let value_len = match op {
            MultiOp::Write => input.u32()? as usize,
            MultiOp::Increment => {
                element.by = parse_number(&mut input, flags)?;
                0
            }
            MultiOp::Read | MultiOp::Remove => 0,
        };
        if value_len > MAX_VALUE_BYTES {
            return Err(ProtoError::ValueTooLarge { bytes: value_len });
        }
        element.key = input.take(key_len)?;
        element.value = input.take(value_len)?;
        Ok((element, bytes.len() - input.bytes.len()))
    }

    /// Bytes that it takes packed.
    #[must_use]
    pub fn packed_bytes(&self, op: MultiOp) -> usize {
        let mut bytes = 3 + self.key.len() + self.value.len();
        bytes += if self.table == 0 { 0 } else { 4 };
        bytes += match (
            self.rules.is_none(),
            self.rules.at_most,
            self.rules.other_than,
        ) {
            (true, ..) => 0,
            (false, at_most, other) => {
                1 + 8 * (usize::from(at_most.is_some()) + usize::from(other.is_some()))
            }
        };
        bytes += if self.expires == NEVER { 0 } else { 8 };
        bytes
            + match op {
                MultiOp::Write => 4,
                MultiOp::Increment => 8,
                MultiOp::Read | MultiOp::Remove => 0,
            }
    }
}

pub(super) fn parse_number(input: &mut Reader<'_>, flags: u8) -> Result<Increment, ProtoError> {
    let bits = input.u64()?;
    Ok(if flags & FLAG_VARIANT == 0 {
        Increment::I64(bits as i64)
    } else {
        Increment::F64(f64::from_bits(bits))
    })
}

/// Writes an element to the start of `out`. Returns its bytes. Errors: no room; a key or value outside the limits.
pub fn emit_element(
    op: MultiOp,
    element: &Element<'_>,
    out: &mut [u8],
) -> Result<usize, ProtoError> {
    let key_len = u16::try_from(element.key.len()).map_err(|_| ProtoError::Field("key_len"))?;
    if key_len == 0 {
        return Err(ProtoError::EmptyKey);
    }
    if element.value.len() > MAX_VALUE_BYTES {
        return Err(ProtoError::ValueTooLarge {
            bytes: element.value.len(),
        });
    }
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    let flags = flag(element.table != 0, FLAG_TABLE)
        | flag(!element.rules.is_none(), FLAG_RULES)
        | flag(
            element.expires != NEVER && op == MultiOp::Write,
            FLAG_EXPIRES,
        )
        | flag(
            matches!(element.by, Increment::F64(_)) && op == MultiOp::Increment,
            FLAG_VARIANT,
        );
    let mut out = Writer { out, at: 0 };
    out.put(&[flags])?;
    out.put(&key_len.to_le_bytes())?;
    if flags & FLAG_TABLE != 0 {
        out.put(&element.table.to_le_bytes())?;
    }
    if flags & FLAG_RULES != 0 {
        emit_rules(&element.rules, &mut out)?;
    }
    if flags & FLAG_EXPIRES != 0 {
        out.put(&element.expires.to_le_bytes())?;
    }
    match op {
        MultiOp::Write => out.put(&(element.value.len() as u32).to_le_bytes())?,
        MultiOp::Increment => out.put(&element.by.bits().to_le_bytes())?,
        MultiOp::Read | MultiOp::Remove => {}
    }
    out.put(element.key)?;
    if op == MultiOp::Write {
        out.put(element.value)?;
    }
    Ok(out.at)
}

/// One result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementResult<'a> {
    /// An object that was read.
    Value {
        /// Its version.
        version: u64,
        /// Its value.
        value: &'a [u8],
    },
    /// The version of the object that was written or removed.
    Version(u64),
    /// A number was incremented.
    Incremented {
        /// Version of the object.
        version: u64,
        /// The new number's bits; of the kind that was added.
        bits: u64,
    },
    /// The element failed; the others did not for it.
    Failed {
        /// Why; not Ok.
        status: Status,
        /// A number that belongs to the status, or 0. For [`Status::TooLargeForEager`] the bytes of the value: read it alone.
        detail: u64,
    },
}

fn parse_result<'a>(op: MultiOp, input: &mut Reader<'a>) -> Result<ElementResult<'a>, ProtoError> {
    let status = Status::from_raw(input.u8()?).ok_or(ProtoError::Field("status"))?;
    if status != Status::Ok {
        return Ok(ElementResult::Failed {
            status,
            detail: input.u64()?,
        });
    }
    let version = input.u64()?;
    Ok(match op {
        MultiOp::Read => {
            let length = input.u32()? as usize;
            ElementResult::Value {
                version,
                value: input.take(length)?,
            }
        }
        MultiOp::Write | MultiOp::Remove => ElementResult::Version(version),
        MultiOp::Increment => ElementResult::Incremented {
            version,
            bits: input.u64()?,
        },
    })
}

/// A checked view of a multi-operation's results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Results<'a> {
    op: MultiOp,
    bytes: &'a [u8],
    count: usize,
}

impl<'a> Results<'a> {
    /// Views `bytes` as `count` results of `op`. Errors: cut off, unknown statuses, or anything left over.
    pub fn parse(op: MultiOp, count: usize, bytes: &'a [u8]) -> Result<Self, ProtoError> {
        let mut input = Reader { bytes };
        for _ in 0..count {
            parse_result(op, &mut input)?;
        }
        input.end()?;
        Ok(Self { op, bytes, count })
    }

    /// How many.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The results, in the elements' order.
    pub fn iter(&self) -> impl Iterator<Item = ElementResult<'a>> + use<'a> {
        let (op, mut input) = (self.op, Reader { bytes: self.bytes });
        core::iter::from_fn(move || parse_result(op, &mut input).ok())
    }
}

/// Writes results one after the other.
#[derive(Debug)]
pub struct ResultWriter<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl<'a> ResultWriter<'a> {
    /// Goes on at `at` in `out`.
    #[must_use]
    pub const fn new(out: &'a mut [u8], at: usize) -> Self {
        Self { out, at }
    }

    /// Bytes written, what was there before included.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.at
    }

    /// Whether nothing is written.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.at == 0
    }

    /// Bytes that a result takes.
    #[must_use]
    pub const fn needed(result: &ElementResult<'_>) -> usize {
        match result {
            ElementResult::Value { value, .. } => 13 + value.len(),
            ElementResult::Version(_) | ElementResult::Failed { .. } => 9,
            ElementResult::Incremented { .. } => 17,
        }
    }

    /// Adds a result. False, with nothing added: there is no room.
    pub fn push(&mut self, result: &ElementResult<'_>) -> bool {
        let mut out = Writer {
            out: self.out,
            at: self.at,
        };
        let mut write = || match *result {
            ElementResult::Value { version, value } => {
                out.put(&[Status::Ok as u8])?;
                out.put(&version.to_le_bytes())?;
                out.put(&(value.len() as u32).to_le_bytes())?;
                out.put(value)
            }
            ElementResult::Version(version) => {
                out.put(&[Status::Ok as u8])?;
                out.put(&version.to_le_bytes())
            }
            ElementResult::Incremented { version, bits } => {
                out.put(&[Status::Ok as u8])?;
                out.put(&version.to_le_bytes())?;
                out.put(&bits.to_le_bytes())
            }
            ElementResult::Failed { status, detail } => {
                out.put(&[status as u8])?;
                out.put(&detail.to_le_bytes())
            }
        };
        if write().is_err() {
            return false;
        }
        self.at = out.at;
        true
    }
}
