//! A page of keys, the answer to LIST: in a reply, or written to the client's buffer.
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..8 | cursor to go on with |
//! | 8 | 1 if there is more, 0 at the end |
//! | 9 | 0 |
//! | 10..12 | number of keys |
//! | then, per key | length (u16), key |

use super::cursor::Reader;
use super::{ProtoError, Writer};

/// Bytes of a page before its first key.
pub const PAGE_HEADER_BYTES: usize = 12;

/// A checked view of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page<'a> {
    pub(super) bytes: &'a [u8],
    next: Option<u64>,
    count: u16,
}

impl<'a> Page<'a> {
    /// Views `bytes` as a page. Errors: cut off, a key without bytes, or anything left over.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ProtoError> {
        let mut input = Reader { bytes };
        let cursor = input.u64()?;
        let next = match input.u8()? {
            0 if cursor == 0 => None,
            1 => Some(cursor),
            _ => return Err(ProtoError::Field("more")),
        };
        if input.u8()? != 0 {
            return Err(ProtoError::Field("reserved"));
        }
        let count = input.u16()?;
        for _ in 0..count {
            let length = usize::from(input.u16()?);
            if length == 0 {
                return Err(ProtoError::EmptyKey);
            }
            input.take(length)?;
        }
        input.end()?;
        Ok(Self { bytes, next, count })
    }

    /// Where to go on; none at the end.
    #[must_use]
    pub const fn next(&self) -> Option<u64> {
        self.next
    }

    /// Number of keys.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there are no keys on this page (there may be more on the next).
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut input = Reader {
            bytes: self.bytes.get(PAGE_HEADER_BYTES..).unwrap_or_default(),
        };
        core::iter::from_fn(move || {
            let length = input.u16().ok()?;
            input.take(usize::from(length)).ok()
        })
    }
}

/// Builds a page in a buffer.
#[derive(Debug)]
pub struct PageBuilder<'a> {
    out: &'a mut [u8],
    at: usize,
    count: u16,
}

impl<'a> PageBuilder<'a> {
    /// An empty page in `out`. Errors: `out` does not hold even an empty page.
    pub fn new(out: &'a mut [u8]) -> Result<Self, ProtoError> {
        if out.len() < PAGE_HEADER_BYTES {
            return Err(ProtoError::NoRoom {
                available: out.len(),
            });
        }
        Ok(Self {
            out,
            at: PAGE_HEADER_BYTES,
            count: 0,
        })
    }

    /// Adds a key. False, with nothing added: the page is full.
    pub fn push(&mut self, key: &[u8]) -> bool {
        let Ok(length) = u16::try_from(key.len()) else {
            return false;
        };
        if self.at + 2 + key.len() > self.out.len() || self.count == u16::MAX {
            return false;
        }
        self.out[self.at..self.at + 2].copy_from_slice(&length.to_le_bytes());
        self.out[self.at + 2..self.at + 2 + key.len()].copy_from_slice(key);
        self.at += 2 + key.len();
        self.count += 1;
        true
    }

    /// Keys so far.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there are no keys so far.
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
            .and_then(|()| header.put(&[u8::from(next.is_some()), 0]))
            .and_then(|()| header.put(&self.count.to_le_bytes()));
        debug_assert!(written.is_ok(), "the header has its fixed size");
        self.at
    }
}
