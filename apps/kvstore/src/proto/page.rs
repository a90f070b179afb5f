//! A page of objects, the answer to ENUMERATE: in a reply, or written to the client's buffer.
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..8 | cursor to go on with |
//! | 8 | 1 if there is more, 0 at the end |
//! | 9 | 1 if the objects have versions and values, 0 if they are keys alone |
//! | 10..12 | number of objects |
//! | then, per key | length (u16), key |
//! | or, per object | length of the key (u16), version (u64), length of the value (u32; bit 31: it is longer than what is eager and left out), key, value |

use super::cursor::{Reader, Writer};
use super::{MIN_PAGE_BUFFER_BYTES, ProtoError};
use crate::limits::{EAGER_VALUE_BYTES, MAX_VALUE_BYTES};

/// Bytes of a page before its first object.
pub const PAGE_HEADER_BYTES: usize = 12;

/// Bytes of an object beyond its key and value.
pub const PAGE_OBJECT_BYTES: usize = 14;

const LEFT_OUT: u32 = 1 << 31;

/// An object on a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageObject<'a> {
    /// The key.
    pub key: &'a [u8],
    /// Its version; 0 on a page of keys.
    pub version: u64,
    /// Bytes of the value; 0 on a page of keys.
    pub value_len: usize,
    /// The value; none if it is longer than [`EAGER_VALUE_BYTES`] (READ it), and on a page of keys.
    pub value: Option<&'a [u8]>,
}

/// A checked view of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page<'a> {
    pub(super) bytes: &'a [u8],
    next: Option<u64>,
    with_values: bool,
    count: u16,
}

fn parse_object<'a>(
    input: &mut Reader<'a>,
    with_values: bool,
) -> Result<PageObject<'a>, ProtoError> {
    let key_len = usize::from(input.u16()?);
    if key_len == 0 {
        return Err(ProtoError::EmptyKey);
    }
    if !with_values {
        return Ok(PageObject {
            key: input.take(key_len)?,
            version: 0,
            value_len: 0,
            value: None,
        });
    }
    let version = input.u64()?;
    let raw = input.u32()?;
    let value_len = (raw & !LEFT_OUT) as usize;
    let left_out = raw & LEFT_OUT != 0;
    if value_len > MAX_VALUE_BYTES || left_out != (value_len > EAGER_VALUE_BYTES) {
        return Err(ProtoError::Field("value_len"));
    }
    Ok(PageObject {
        key: input.take(key_len)?,
        version,
        value_len,
        value: match left_out {
            true => None,
            false => Some(input.take(value_len)?),
        },
    })
}

impl<'a> Page<'a> {
    /// Views `bytes` as a page. Errors: cut off, a key without bytes, a value out of its range, or anything left over.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ProtoError> {
        let mut input = Reader { bytes };
        let cursor = input.u64()?;
        let next = match input.u8()? {
            0 if cursor == 0 => None,
            1 => Some(cursor),
            _ => return Err(ProtoError::Field("more")),
        };
        let with_values = match input.u8()? {
            0 => false,
            1 => true,
            _ => return Err(ProtoError::Field("values")),
        };
        let count = input.u16()?;
        for _ in 0..count {
            parse_object(&mut input, with_values)?;
        }
        input.end()?;
        Ok(Self {
            bytes,
            next,
            with_values,
            count,
        })
    }

    /// Where to go on; none at the end.
    #[must_use]
    pub const fn next(&self) -> Option<u64> {
        self.next
    }

    /// Number of objects.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there are no objects on this page (there may be more on the next).
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether it has versions and values.
    #[must_use]
    pub const fn has_values(&self) -> bool {
        self.with_values
    }

    /// The objects.
    pub fn objects(&self) -> impl Iterator<Item = PageObject<'a>> + use<'a> {
        let mut input = Reader {
            bytes: self.bytes.get(PAGE_HEADER_BYTES..).unwrap_or_default(),
        };
        let with_values = self.with_values;
        core::iter::from_fn(move || parse_object(&mut input, with_values).ok())
    }

    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.objects().map(|object| object.key)
    }
}

/// Builds a page in a buffer.
#[derive(Debug)]
pub struct PageBuilder<'a> {
    out: &'a mut [u8],
    at: usize,
    with_values: bool,
    count: u16,
}

impl<'a> PageBuilder<'a> {
    /// An empty page in `out`, of keys alone or of whole objects. Errors: `out` does not hold even an empty page.
    pub fn new(out: &'a mut [u8], with_values: bool) -> Result<Self, ProtoError> {
        if out.len() < PAGE_HEADER_BYTES {
            return Err(ProtoError::NoRoom {
                available: out.len(),
            });
        }
        Ok(Self {
            out,
            at: PAGE_HEADER_BYTES,
            with_values,
            count: 0,
        })
    }

    /// Bytes of buffer that an object needs on a page of its own.
    #[must_use]
    pub const fn needed(&self, key_len: usize, value_len: usize) -> usize {
        let value = match value_len {
            _ if !self.with_values => return PAGE_HEADER_BYTES + 2 + key_len,
            0..=EAGER_VALUE_BYTES => value_len,
            _ => 0,
        };
        PAGE_HEADER_BYTES + PAGE_OBJECT_BYTES + key_len + value
    }

    /// Adds an object; version and value are not looked at on a page of keys. False, with nothing added: the page is full.
    pub fn push(&mut self, key: &[u8], version: u64, value: &[u8]) -> bool {
        let Ok(key_len) = u16::try_from(key.len()) else {
            return false;
        };
        let mut out = Writer {
            out: self.out,
            at: self.at,
        };
        let mut write = || {
            out.put(&key_len.to_le_bytes())?;
            if !self.with_values {
                return out.put(key);
            }
            out.put(&version.to_le_bytes())?;
            let eager = value.len() <= EAGER_VALUE_BYTES;
            let left_out = if eager { 0 } else { LEFT_OUT };
            out.put(&(value.len() as u32 | left_out).to_le_bytes())?;
            out.put(key)?;
            out.put(if eager { value } else { &[] })
        };
        if write().is_err() || self.count == u16::MAX {
            return false;
        }
        self.at = out.at;
        self.count += 1;
        true
    }

    /// Objects so far.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there are no objects so far.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Completes the page. Returns its length in bytes.
    pub fn finish(self, next: Option<u64>) -> usize {
        let mut header = Writer {
            out: &mut self.out[..PAGE_HEADER_BYTES],
            at: 0,
        };
        let written = header
            .put(&next.unwrap_or(0).to_le_bytes())
            .and_then(|()| header.put(&[u8::from(next.is_some()), u8::from(self.with_values)]))
            .and_then(|()| header.put(&self.count.to_le_bytes()));
        debug_assert!(written.is_ok(), "the header has its fixed size");
        self.at
    }
}

const _: () = assert!(MAX_VALUE_BYTES < LEFT_OUT as usize && MIN_PAGE_BUFFER_BYTES < 1 << 17);
