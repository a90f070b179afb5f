//! Going through all objects of a table while the store changes.
//!
//! The order is that of the keys' hashes, and a cursor is the smallest hash not yet visited. An entry that moves keeps its hash,
//! as does one whose bucket gets an overflow bucket, so what exists throughout is visited exactly once. (Two keys with
//! all 64 bits of hash equal would be visited twice if a page ended between them; the seed makes that one in 2^64 for any pair.)

use super::entry::{key_at, table_at};
use super::{Found, Store, StoreError};
use alloc::vec::Vec;

/// Where an enumeration stands: opaque, and worth nothing to another store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(u64);

impl Cursor {
    /// Where an enumeration begins.
    pub const START: Self = Self(0);

    /// The cursor with this number, from a message. Any number is a position.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The cursor as a number, for a message.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }
}

/// What one call of an enumeration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Enumerated {
    /// Where to go on; none at the end.
    pub next: Option<Cursor>,
    /// Objects visited by this call.
    pub visited: u64,
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Visits objects of `table` from `cursor` until `visit` returns false (that object is visited again next time), `buckets`
    /// buckets have been looked at, or the end. Objects that have expired at `now` are left out. Errors: no such table.
    pub fn enumerate(
        &self,
        table: u32,
        cursor: Cursor,
        buckets: usize,
        now: u64,
        mut visit: impl FnMut(&Found) -> bool,
    ) -> Result<Enumerated, StoreError> {
        self.tables.user_place(table)?;
        let mem = self.region.as_ref();
        let mut chain: Vec<(u64, usize)> = Vec::new();
        let (mut cursor, mut visited) = (cursor.0, 0);
        for _ in 0..buckets.max(1) {
            chain.clear();
            self.index.for_chain(mem, cursor, |slot| {
                if table_at(mem, slot.entry) == table && self.is_current(slot.entry, now) {
                    let hash = self.hash(table, key_at(mem, slot.entry));
                    if hash >= cursor {
                        chain.push((hash, slot.entry));
                    }
                }
            });
            chain.sort_unstable();
            for &(hash, entry) in &chain {
                if !visit(&Found::at(mem, entry)) {
                    return Ok(Enumerated {
                        next: Some(Cursor(hash)),
                        visited,
                    });
                }
                visited += 1;
            }
            match self.index.next_bucket(cursor) {
                Some(next) => cursor = next,
                None => {
                    return Ok(Enumerated {
                        next: None,
                        visited,
                    });
                }
            }
        }
        Ok(Enumerated {
            next: Some(Cursor(cursor)),
            visited,
        })
    }
}
