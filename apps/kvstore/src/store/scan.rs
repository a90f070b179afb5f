//! Going through all keys while the store changes.
//!
//! The order is that of the keys' hashes, and a cursor is the smallest hash not yet visited. An entry that moves keeps its hash,
//! so what exists throughout is visited exactly once. (Two keys with all 64 bits of hash equal would be visited twice if a
//! page ended between them; the seed makes that one in 2^64 for any pair.)

use super::entry::key_at;
use super::{Found, Store};
use alloc::vec::Vec;

/// Where a scan stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanProgress {
    /// Where to go on; none at the end.
    pub next: Option<u64>,
    /// Objects visited by this call.
    pub visited: u64,
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Visits objects from `cursor` (0 at first) until `visit` returns false (that object is visited again next time),
    /// `buckets` buckets have been looked at, or the end.
    pub fn scan(
        &self,
        cursor: u64,
        buckets: usize,
        mut visit: impl FnMut(&Found) -> bool,
    ) -> ScanProgress {
        let mem = self.region.as_ref();
        let mut chain: Vec<(u64, usize)> = Vec::new();
        let (mut cursor, mut visited) = (cursor, 0);
        for _ in 0..buckets.max(1) {
            chain.clear();
            self.table.for_chain(mem, cursor, |entry| {
                let hash = self.hash(key_at(mem, entry));
                if hash >= cursor {
                    chain.push((hash, entry));
                }
            });
            chain.sort_unstable();
            for &(hash, entry) in &chain {
                if !visit(&Found::at(mem, entry)) {
                    return ScanProgress {
                        next: Some(hash),
                        visited,
                    };
                }
                visited += 1;
            }
            match self.table.next_bucket(cursor) {
                Some(next) => cursor = next,
                None => {
                    return ScanProgress {
                        next: None,
                        visited,
                    };
                }
            }
        }
        ScanProgress {
            next: Some(cursor),
            visited,
        }
    }
}
