//! What a client asks for.

use super::blocks::{emit_rules, parse_rules};
use super::cursor::{Reader, Writer};
use super::multi::parse_number;
use super::{
    Elements, FLAG_BUFFER, FLAG_EXPIRES, FLAG_ONCE, FLAG_REMOTE, FLAG_RULES, FLAG_TABLE,
    FLAG_VARIANT, MAX_MULTI_BYTES, MAX_PROBE_ROUNDS, MIN_ELEMENT_BYTES, MultiOp, Once, ProtoError,
    RemoteBuffer,
};
use crate::limits::{
    EAGER_KEY_BYTES, EAGER_VALUE_BYTES, MAX_RESULTS, MAX_TABLE_NAME_BYTES, MAX_VALUE_BYTES,
};
use crate::store::{CleanerMode, DEFAULT_TABLE, Increment, NEVER, RejectRules};

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Read an object.
    Read = 1,
    /// Write an object.
    Write = 2,
    /// Remove an object.
    Remove = 3,
    /// A page of a table's objects.
    Enumerate = 4,
    /// The server's state.
    Stats = 5,
    /// Nothing but a reply.
    Ping = 6,
    /// Bounce a cache line so many times: the floor that latencies are compared with.
    Probe = 7,
    /// Add to a number.
    Increment = 8,
    /// Create a table, if there is none of that name.
    CreateTable = 9,
    /// Drop a table with everything in it.
    DropTable = 10,
    /// The id of a table.
    FindTable = 11,
    /// A page of tables.
    Tables = 12,
    /// Give the client's lease back: results are not kept any more.
    EndLease = 13,
    /// When the cleaner works while this connection stands.
    Cleaner = 14,
    /// Many reads.
    MultiRead = 16,
    /// Many writes.
    MultiWrite = 17,
    /// Many removes.
    MultiRemove = 18,
    /// Many increments.
    MultiIncrement = 19,
}

impl Op {
    #[inline]
    const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::Read,
            2 => Self::Write,
            3 => Self::Remove,
            4 => Self::Enumerate,
            5 => Self::Stats,
            6 => Self::Ping,
            7 => Self::Probe,
            8 => Self::Increment,
            9 => Self::CreateTable,
            10 => Self::DropTable,
            11 => Self::FindTable,
            12 => Self::Tables,
            13 => Self::EndLease,
            14 => Self::Cleaner,
            16 => Self::MultiRead,
            17 => Self::MultiWrite,
            18 => Self::MultiRemove,
            19 => Self::MultiIncrement,
            _ => return None,
        })
    }

    /// Flags that go with it.
    #[inline]
    const fn flags(self) -> u8 {
        match self {
            Self::Read => FLAG_TABLE | FLAG_RULES | FLAG_REMOTE | FLAG_BUFFER,
            Self::Write => {
                FLAG_TABLE | FLAG_RULES | FLAG_ONCE | FLAG_EXPIRES | FLAG_REMOTE | FLAG_BUFFER
            }
            Self::Remove => FLAG_TABLE | FLAG_RULES | FLAG_ONCE | FLAG_REMOTE,
            Self::Increment => FLAG_TABLE | FLAG_RULES | FLAG_ONCE | FLAG_REMOTE | FLAG_VARIANT,
            Self::Enumerate => FLAG_TABLE | FLAG_BUFFER | FLAG_VARIANT,
            Self::DropTable => FLAG_TABLE,
            Self::Tables => FLAG_BUFFER,
            Self::MultiRead => FLAG_REMOTE | FLAG_BUFFER,
            Self::MultiWrite | Self::MultiRemove | Self::MultiIncrement => {
                FLAG_ONCE | FLAG_REMOTE | FLAG_BUFFER
            }
            Self::Stats
            | Self::Ping
            | Self::Probe
            | Self::CreateTable
            | Self::FindTable
            | Self::EndLease
            | Self::Cleaner => 0,
        }
    }

    #[inline]
    const fn has_key(self) -> bool {
        matches!(
            self,
            Self::Read | Self::Write | Self::Remove | Self::Increment
        )
    }

    const fn has_name(self) -> bool {
        matches!(self, Self::CreateTable | Self::FindTable)
    }

    const fn of_multi(op: MultiOp) -> Self {
        match op {
            MultiOp::Read => Self::MultiRead,
            MultiOp::Write => Self::MultiWrite,
            MultiOp::Remove => Self::MultiRemove,
            MultiOp::Increment => Self::MultiIncrement,
        }
    }
}

/// A key of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key<'a> {
    /// In the message; 1 to [`EAGER_KEY_BYTES`] bytes.
    Inline(&'a [u8]),
    /// In the client's memory; 1 to [`crate::limits::MAX_KEY_BYTES`] bytes.
    Remote(RemoteBuffer),
}

/// The value of a WRITE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// In the message; at most [`EAGER_VALUE_BYTES`] bytes.
    Inline(&'a [u8]),
    /// In the client's memory; at most [`MAX_VALUE_BYTES`] bytes.
    Remote(RemoteBuffer),
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Request<'a> {
    /// Read an object: into `buffer` if its value is larger than eager, or refused as too large for eager without one.
    Read {
        /// Table.
        table: u32,
        /// Key.
        key: Key<'a>,
        /// When to refuse.
        rules: RejectRules,
        /// Where a value larger than eager goes.
        buffer: Option<RemoteBuffer>,
    },
    /// Write an object.
    Write {
        /// Table.
        table: u32,
        /// Key.
        key: Key<'a>,
        /// Value.
        value: Value<'a>,
        /// When to refuse.
        rules: RejectRules,
        /// From when on the object does not exist any more, ns since 1970; [`NEVER`]: it stays.
        expires: u64,
        /// Execute once.
        once: Option<Once>,
    },
    /// Remove an object.
    Remove {
        /// Table.
        table: u32,
        /// Key.
        key: Key<'a>,
        /// When to refuse.
        rules: RejectRules,
        /// Execute once.
        once: Option<Once>,
    },
    /// Add to a number.
    Increment {
        /// Table.
        table: u32,
        /// Key.
        key: Key<'a>,
        /// What to add.
        by: Increment,
        /// When to refuse.
        rules: RejectRules,
        /// Execute once.
        once: Option<Once>,
    },
    /// A page of a table's objects, in the reply or in `buffer`.
    Enumerate {
        /// Table.
        table: u32,
        /// 0 at first, then what the last page said.
        cursor: u64,
        /// Most objects wanted; 0: as many as fit.
        limit: u16,
        /// Versions and values too.
        values: bool,
        /// Where the page goes.
        buffer: Option<RemoteBuffer>,
    },
    /// Many operations of one kind.
    Multi {
        /// Which.
        op: MultiOp,
        /// How many elements, at least 1; with `once`, at most [`MAX_RESULTS`].
        count: u16,
        /// The elements.
        elements: Elements<'a>,
        /// Execute each once: the first element has this number, the next one the next.
        once: Option<Once>,
        /// Where the results go; none: into the reply.
        buffer: Option<RemoteBuffer>,
    },
    /// Create a table, if there is none of that name.
    CreateTable {
        /// Name.
        name: &'a str,
    },
    /// Drop a table.
    DropTable {
        /// Id.
        table: u32,
    },
    /// The id of a table.
    FindTable {
        /// Name.
        name: &'a str,
    },
    /// A page of tables, in the reply or in `buffer`.
    Tables {
        /// Those with higher ids than this; none: from the first one on.
        after: Option<u32>,
        /// Where the page goes.
        buffer: Option<RemoteBuffer>,
    },
    /// The server's state.
    Stats,
    /// Nothing but a reply.
    Ping,
    /// Bounce a cache line.
    Probe {
        /// How often; 1 to [`MAX_PROBE_ROUNDS`].
        rounds: u32,
    },
    /// Give the lease back.
    EndLease,
    /// When the cleaner works, until this connection ends or any client asks for something else.
    Cleaner {
        /// When.
        mode: CleanerMode,
    },
}

/// The tag of the request in `bytes`, even if the rest of it is malformed, so that its client can be told. None: cut off
/// before the tag.
#[must_use]
pub fn request_tag(bytes: &[u8]) -> Option<u16> {
    bytes.get(4..6)?.try_into().ok().map(u16::from_le_bytes)
}

/// In TABLES: no table before.
const FROM_START: u32 = u32::MAX;

impl<'a> Request<'a> {
    /// Reads a request: its tag and what it asks for. Errors: anything that [`Self::emit`] would not have written.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<(u16, Self), ProtoError> {
        let mut input = Reader { bytes };
        let raw_op = input.u8()?;
        let flags = input.u8()?;
        let key_len = usize::from(input.u16()?);
        let tag = input.u16()?;
        let op = Op::from_raw(raw_op).ok_or(ProtoError::UnknownOp(raw_op))?;
        if op == Op::Read && flags == 0 {
            // What is asked most, in the fewest steps.
            let key = match input.rest() {
                [] => return Err(ProtoError::EmptyKey),
                key if key.len() == key_len && key_len <= EAGER_KEY_BYTES => Key::Inline(key),
                key => return Err(wrong_key(key.len(), key_len)),
            };
            let request = Self::Read {
                table: DEFAULT_TABLE,
                key,
                rules: RejectRules::NONE,
                buffer: None,
            };
            return Ok((tag, request));
        }
        let request = Self::parse_rest(op, flags, key_len, &mut input)?;
        input.end()?;
        Ok((tag, request))
    }

    fn parse_rest(
        op: Op,
        flags: u8,
        key_len: usize,
        input: &mut Reader<'a>,
    ) -> Result<Self, ProtoError> {
        if flags & !op.flags() != 0 {
            return Err(ProtoError::Flags(flags));
        }
        if op.has_key() && key_len == 0 {
            return Err(ProtoError::EmptyKey);
        }
        if !op.has_key() && !op.has_name() && key_len != 0 {
            return Err(ProtoError::Field("key_len"));
        }
        let table = if flags & FLAG_TABLE != 0 {
            match input.u32()? {
                DEFAULT_TABLE => return Err(ProtoError::Field("table")),
                table => table,
            }
        } else {
            DEFAULT_TABLE
        };
        let rules = if flags & FLAG_RULES != 0 {
            parse_rules(input)?
        } else {
            RejectRules::NONE
        };
        let once = match flags & FLAG_ONCE {
            0 => None,
            _ => Some(Once::parse(input)?),
        };
        let expires = if flags & FLAG_EXPIRES != 0 {
            match input.u64()? {
                NEVER => return Err(ProtoError::Field("expires")),
                expires => expires,
            }
        } else {
            NEVER
        };
        let remote = match flags & FLAG_REMOTE {
            0 => None,
            _ => Some(RemoteBuffer::parse(input)?),
        };
        let buffer = match flags & FLAG_BUFFER {
            0 => None,
            _ => Some(RemoteBuffer::parse(input)?),
        };
        let key = |input: &mut Reader<'a>| match remote {
            Some(buffer) if buffer.len as usize != key_len => Err(ProtoError::Field("key_len")),
            Some(buffer) => Ok(Key::Remote(buffer)),
            None if key_len > EAGER_KEY_BYTES => Err(ProtoError::KeyNotEager { bytes: key_len }),
            None => input.take(key_len).map(Key::Inline),
        };
        let multi = |op: MultiOp, input: &mut Reader<'a>| -> Result<Self, ProtoError> {
            let count = input.u16()?;
            let elements = match remote {
                Some(buffer) => Elements::Remote(buffer),
                None => Elements::Inline(input.rest()),
            };
            check_multi(op, count, &elements, once, buffer)?;
            Ok(Self::Multi {
                op,
                count,
                elements,
                once,
                buffer,
            })
        };
        Ok(match op {
            Op::Read => Self::Read {
                table,
                key: key(input)?,
                rules,
                buffer,
            },
            Op::Write => Self::Write {
                table,
                key: key(input)?,
                value: match buffer {
                    Some(buffer) => Value::Remote(check_value(buffer)?),
                    None => Value::Inline(eager_value(input.rest())?),
                },
                rules,
                expires,
                once,
            },
            Op::Remove => Self::Remove {
                table,
                key: key(input)?,
                rules,
                once,
            },
            Op::Increment => {
                let by = parse_number(input, flags)?;
                Self::Increment {
                    table,
                    key: key(input)?,
                    by,
                    rules,
                    once,
                }
            }
            Op::Enumerate => Self::Enumerate {
                table,
                cursor: input.u64()?,
                limit: input.u16()?,
                values: flags & FLAG_VARIANT != 0,
                buffer,
            },
            Op::MultiRead => multi(MultiOp::Read, input)?,
            Op::MultiWrite => multi(MultiOp::Write, input)?,
            Op::MultiRemove => multi(MultiOp::Remove, input)?,
            Op::MultiIncrement => multi(MultiOp::Increment, input)?,
            Op::CreateTable => Self::CreateTable {
                name: name(input, key_len)?,
            },
            Op::FindTable => Self::FindTable {
                name: name(input, key_len)?,
            },
            Op::DropTable => Self::DropTable { table },
            Op::Tables => Self::Tables {
                after: Some(input.u32()?).filter(|id| *id != FROM_START),
                buffer,
            },
            Op::Stats => Self::Stats,
            Op::Ping => Self::Ping,
            Op::Probe => Self::Probe {
                rounds: check_rounds(input.u32()?)?,
            },
            Op::EndLease => Self::EndLease,
            Op::Cleaner => Self::Cleaner {
                mode: CleanerMode::from_raw(input.u8()?).ok_or(ProtoError::Field("mode"))?,
            },
        })
    }

    /// What it asks for.
    #[must_use]
    pub const fn op(&self) -> Op {
        match *self {
            Self::Read { .. } => Op::Read,
            Self::Write { .. } => Op::Write,
            Self::Remove { .. } => Op::Remove,
            Self::Increment { .. } => Op::Increment,
            Self::Enumerate { .. } => Op::Enumerate,
            Self::Multi { op, .. } => Op::of_multi(op),
            Self::CreateTable { .. } => Op::CreateTable,
            Self::DropTable { .. } => Op::DropTable,
            Self::FindTable { .. } => Op::FindTable,
            Self::Tables { .. } => Op::Tables,
            Self::Stats => Op::Stats,
            Self::Ping => Op::Ping,
            Self::Probe { .. } => Op::Probe,
            Self::EndLease => Op::EndLease,
            Self::Cleaner { .. } => Op::Cleaner,
        }
    }

    /// Its key, if it has one.
    #[must_use]
    pub const fn key(&self) -> Option<Key<'a>> {
        match *self {
            Self::Read { key, .. }
            | Self::Write { key, .. }
            | Self::Remove { key, .. }
            | Self::Increment { key, .. } => Some(key),
            _ => None,
        }
    }

    /// What makes it execute once, if anything does.
    #[must_use]
    pub const fn once(&self) -> Option<Once> {
        match *self {
            Self::Write { once, .. }
            | Self::Remove { once, .. }
            | Self::Increment { once, .. }
            | Self::Multi { once, .. } => once,
            _ => None,
        }
    }

    /// The same with another key.
    #[must_use]
    pub fn with_key(mut self, with: Key<'a>) -> Self {
        match &mut self {
            Self::Read { key, .. }
            | Self::Write { key, .. }
            | Self::Remove { key, .. }
            | Self::Increment { key, .. } => *key = with,
            _ => {}
        }
        self
    }

    const fn table(&self) -> u32 {
        match *self {
            Self::Read { table, .. }
            | Self::Write { table, .. }
            | Self::Remove { table, .. }
            | Self::Increment { table, .. }
            | Self::Enumerate { table, .. }
            | Self::DropTable { table } => table,
            _ => DEFAULT_TABLE,
        }
    }

    const fn rules(&self) -> RejectRules {
        match *self {
            Self::Read { rules, .. }
            | Self::Write { rules, .. }
            | Self::Remove { rules, .. }
            | Self::Increment { rules, .. } => rules,
            _ => RejectRules::NONE,
        }
    }

    const fn buffer(&self) -> Option<RemoteBuffer> {
        match *self {
            Self::Read { buffer, .. }
            | Self::Enumerate { buffer, .. }
            | Self::Multi { buffer, .. }
            | Self::Tables { buffer, .. } => buffer,
            Self::Write {
                value: Value::Remote(buffer),
                ..
            } => Some(buffer),
            _ => None,
        }
    }

    /// Writes the request. Returns its length. Errors: a key or value that is empty, too long, or too long to be inline; the
    /// buffer is too short ([`super::MAX_REQUEST_BYTES`] always suffice).
    #[inline]
    pub fn emit(&self, tag: u16, out: &mut [u8]) -> Result<usize, ProtoError> {
        if let Self::Read {
            table: DEFAULT_TABLE,
            key: Key::Inline(key),
            rules,
            buffer: None,
        } = self
            && rules.is_none()
        {
            check_inline_key(key)?;
            let mut out = Writer { out, at: 0 };
            put_header(&mut out, Op::Read, 0, key.len(), tag)?;
            out.put(key)?;
            return Ok(out.at);
        }
        self.emit_any(tag, out)
    }

    fn emit_any(&self, tag: u16, out: &mut [u8]) -> Result<usize, ProtoError> {
        let (remote, name_or_key) = self.check()?;
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let (table, rules, once, buffer) = (self.table(), self.rules(), self.once(), self.buffer());
        let expires = match *self {
            Self::Write { expires, .. } => expires,
            _ => NEVER,
        };
        let variant = matches!(
            self,
            Self::Enumerate { values: true, .. }
                | Self::Increment {
                    by: Increment::F64(_),
                    ..
                }
        );
        let flags = flag(table != DEFAULT_TABLE, FLAG_TABLE)
            | flag(!rules.is_none(), FLAG_RULES)
            | flag(once.is_some(), FLAG_ONCE)
            | flag(expires != NEVER, FLAG_EXPIRES)
            | flag(remote.is_some(), FLAG_REMOTE)
            | flag(buffer.is_some(), FLAG_BUFFER)
            | flag(variant, FLAG_VARIANT);
        let key_len = match (self.key(), remote) {
            (Some(_), Some(buffer)) => buffer.len as usize,
            _ => name_or_key.len(),
        };
        let mut out = Writer { out, at: 0 };
        put_header(&mut out, self.op(), flags, key_len, tag)?;
        if flags & FLAG_TABLE != 0 {
            out.put(&table.to_le_bytes())?;
        }
        if flags & FLAG_RULES != 0 {
            emit_rules(&rules, &mut out)?;
        }
        if let Some(once) = once {
            once.emit(&mut out)?;
        }
        if flags & FLAG_EXPIRES != 0 {
            out.put(&expires.to_le_bytes())?;
        }
        for buffer in [remote, buffer].into_iter().flatten() {
            buffer.emit(&mut out)?;
        }
        match *self {
            Self::Increment { by, .. } => out.put(&by.bits().to_le_bytes())?,
            Self::Enumerate { cursor, limit, .. } => {
                out.put(&cursor.to_le_bytes())?;
                out.put(&limit.to_le_bytes())?;
            }
            Self::Multi { count, .. } => out.put(&count.to_le_bytes())?,
            Self::Tables { after, .. } => out.put(&after.unwrap_or(FROM_START).to_le_bytes())?,
            Self::Probe { rounds } => out.put(&rounds.to_le_bytes())?,
            Self::Cleaner { mode } => out.put(&[mode as u8])?,
            _ => {}
        }
        out.put(name_or_key)?;
        match *self {
            Self::Write {
                value: Value::Inline(value),
                ..
            } => out.put(value)?,
            Self::Multi {
                elements: Elements::Inline(bytes),
                ..
            } => out.put(bytes)?,
            _ => {}
        }
        Ok(out.at)
    }

    /// Checks what is to be emitted. Returns the remote key or elements, and the inline key or name.
    fn check(&self) -> Result<(Option<RemoteBuffer>, &'a [u8]), ProtoError> {
        match *self {
            Self::Write { value, .. } => match value {
                Value::Inline(value) => drop(eager_value(value)?),
                Value::Remote(buffer) => drop(check_value(buffer)?),
            },
            Self::Probe { rounds } => drop(check_rounds(rounds)?),
            Self::Multi {
                op,
                count,
                elements,
                once,
                buffer,
            } => {
                check_multi(op, count, &elements, once, buffer)?;
                if let Elements::Remote(buffer) = elements {
                    return Ok((Some(buffer), &[]));
                }
            }
            Self::CreateTable { name } | Self::FindTable { name } => {
                check_name(name)?;
                return Ok((None, name.as_bytes()));
            }
            Self::Tables { after, .. } if after == Some(FROM_START) => {
                return Err(ProtoError::Field("after"));
            }
            _ => {}
        }
        match self.key() {
            Some(Key::Inline(key)) => {
                check_inline_key(key)?;
                Ok((None, key))
            }
            Some(Key::Remote(buffer)) if buffer.len == 0 => Err(ProtoError::EmptyKey),
            Some(Key::Remote(buffer)) => Ok((Some(buffer), &[])),
            None => Ok((None, &[])),
        }
    }
}

#[inline]
fn put_header(
    out: &mut Writer<'_>,
    op: Op,
    flags: u8,
    key_len: usize,
    tag: u16,
) -> Result<(), ProtoError> {
    let key_len = u16::try_from(key_len).map_err(|_| ProtoError::Field("key_len"))?;
    let mut header = [op as u8, flags, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&key_len.to_le_bytes());
    header[4..6].copy_from_slice(&tag.to_le_bytes());
    out.put(&header)
}

#[cold]
fn wrong_key(found: usize, key_len: usize) -> ProtoError {
    match found.checked_sub(key_len) {
        _ if key_len == 0 => ProtoError::EmptyKey,
        _ if key_len > EAGER_KEY_BYTES => ProtoError::KeyNotEager { bytes: key_len },
        Some(bytes) => ProtoError::Trailing { bytes },
        None => ProtoError::Truncated {
            needed: key_len - found,
        },
    }
}

#[inline]
const fn check_inline_key(key: &[u8]) -> Result<(), ProtoError> {
    match key.len() {
        0 => Err(ProtoError::EmptyKey),
        1..=EAGER_KEY_BYTES => Ok(()),
        bytes => Err(ProtoError::KeyNotEager { bytes }),
    }
}

fn check_name(name: &str) -> Result<(), ProtoError> {
    let fits = (1..=MAX_TABLE_NAME_BYTES).contains(&name.len());
    if fits && !name.chars().any(char::is_control) {
        Ok(())
    } else {
        Err(ProtoError::Field("name"))
    }
}

fn name<'a>(input: &mut Reader<'a>, length: usize) -> Result<&'a str, ProtoError> {
    let name = core::str::from_utf8(input.take(length)?).map_err(|_| ProtoError::Field("name"))?;
    check_name(name)?;
    Ok(name)
}

fn eager_value(value: &[u8]) -> Result<&[u8], ProtoError> {
    if value.len() > EAGER_VALUE_BYTES {
        return Err(ProtoError::ValueNotEager { bytes: value.len() });
    }
    Ok(value)
}

const fn check_value(buffer: RemoteBuffer) -> Result<RemoteBuffer, ProtoError> {
    if buffer.len as usize > MAX_VALUE_BYTES {
        return Err(ProtoError::ValueTooLarge {
            bytes: buffer.len as usize,
        });
    }
    Ok(buffer)
}

fn check_multi(
    op: MultiOp,
    count: u16,
    elements: &Elements<'_>,
    once: Option<Once>,
    buffer: Option<RemoteBuffer>,
) -> Result<(), ProtoError> {
    let most = match elements {
        Elements::Inline(bytes) if bytes.len() > EAGER_KEY_BYTES + EAGER_VALUE_BYTES => {
            return Err(ProtoError::Field("elements"));
        }
        Elements::Inline(bytes) => bytes.len(),
        Elements::Remote(buffer) if buffer.len as usize > MAX_MULTI_BYTES => {
            return Err(ProtoError::Field("elements"));
        }
        Elements::Remote(buffer) => buffer.len as usize,
    };
    let once_fits = once.is_none() || (op != MultiOp::Read && usize::from(count) <= MAX_RESULTS);
    if count == 0 || usize::from(count) * MIN_ELEMENT_BYTES > most || !once_fits {
        return Err(ProtoError::Field("count"));
    }
    if buffer.is_some_and(|buffer| buffer.len as usize > MAX_MULTI_BYTES) {
        return Err(ProtoError::Field("buffer"));
    }
    Ok(())
}

const fn check_rounds(rounds: u32) -> Result<u32, ProtoError> {
    if rounds == 0 || rounds > MAX_PROBE_ROUNDS {
        return Err(ProtoError::Field("rounds"));
    }
    Ok(rounds)
}
