//! A full check of the store against itself: the log is walked, and everything kept beside it is recomputed.

use super::entry::{EntryKind, entry_bytes};
use super::segment::{SEGMENT_HEADER_BYTES, State};
use super::table::BUCKET_BYTES;
use super::{Accounting, Store, StoreError};
use alloc::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// A contradiction inside the store: a bug of the engine, or memory that something else wrote to.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AuditError {
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] StoreError),
    /// The account of bytes differs from the log.
    #[error("the log holds {found:?}, the account says {account:?}")]
    Account {
        /// Recomputed.
        found: Accounting,
        /// As kept.
        account: Accounting,
    },
    /// One segment's account differs from the log.
    #[error(
        "segment {segment}: the log holds live, tombstone and pending bytes {found:?}, the account says {account:?}"
    )]
    Segment {
        /// Index.
        segment: usize,
        /// Recomputed.
        found: [u64; 3],
        /// As kept.
        account: [u64; 3],
    },
    /// A live entry that the table does not refer to, or refers to more than once.
    #[error("the live entry at {offset} is referred to by {references} slots of the table")]
    Unreferenced {
        /// Offset of the entry.
        offset: usize,
        /// Slots that refer to it.
        references: usize,
    },
    /// Table slots and live entries differ in number.
    #[error("{slots} slots of the table for {live} live entries and {objects} objects")]
    Count {
        /// Used slots.
        slots: u64,
        /// Live entries.
        live: u64,
        /// Objects as counted.
        objects: u64,
    },
    /// A counter of dead objects differs from the log.
    #[error(
        "counter of hash {hash:#018x}: {found} dead objects in the log, the counter says {counter}"
    )]
    DeadCounter {
        /// A hash that falls to it.
        hash: u64,
        /// Recomputed.
        found: u32,
        /// As kept.
        counter: u32,
    },
    /// The number of dead objects differs from the log, or from the sum of the counters.
    #[error("{found} dead objects in the log, the account says {account}")]
    DeadObjects {
        /// Recomputed.
        found: u64,
        /// As kept.
        account: u64,
    },
    /// Two live entries of one key.
    #[error("the live entry at {offset} has a second one of its key")]
    Duplicate {
        /// Offset of the entry.
        offset: usize,
    },
    /// Overflow buckets are lost or used twice.
    #[error("{chained} overflow buckets in chains, the account says {account}")]
    Overflow {
        /// Found in chains.
        chained: usize,
        /// As kept.
        account: usize,
    },
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Checks the whole store: log, table, counters and accounts. Takes time and memory in proportion to its size: for tests
    /// and diagnosis. Errors: the first contradiction found.
    pub fn audit(&self) -> Result<(), AuditError> {
        let mem = self.region.as_ref();
        let mut per_segment = alloc::vec![[0u64; 3]; self.layout().segments];
        // Dead objects per counter. The part of a victim already cleaned does not count.
        let mut dead: BTreeMap<u64, (u64, u32)> = BTreeMap::new();
        let (mut live, mut keys) = (0, BTreeSet::new());
        let victim = self.cleaned_of_victim();
        for item in self.walk() {
            let (at, entry) = item?;
            let header = entry.header();
            let Some(segment) = self.segment_of(at) else {
                continue;
            };
            let sums = &mut per_segment[segment as usize];
            let cleaned = victim.contains(&at);
            match header.kind {
                EntryKind::Object if header.is_live() => {
                    sums[0] += header.total_bytes() as u64;
                    live += 1;
                    let hash = self.hash(entry.key());
                    let mut references = 0;
                    self.table
                        .for_chain(mem, hash, |found| references += usize::from(found == at));
                    if references != 1 {
                        return Err(AuditError::Unreferenced {
                            offset: at,
                            references,
                        });
                    }
                    if !keys.insert(entry.key()) {
                        return Err(AuditError::Duplicate { offset: at });
                    }
                }
                EntryKind::Object if !cleaned => {
                    let hash = self.hash(entry.key());
                    dead.entry(self.table.counter_index(hash))
                        .or_insert((hash, 0))
                        .1 += 1;
                }
                EntryKind::Tombstone if !cleaned => {
                    sums[1] += entry_bytes(usize::from(header.key_len), 0) as u64;
                }
                EntryKind::Pending => sums[2] += header.total_bytes() as u64,
                _ => {}
            }
        }
        let dead_sum: u64 = dead.values().map(|(_, found)| u64::from(*found)).sum();
        if dead_sum != self.cleaner.dead_objects {
            return Err(AuditError::DeadObjects {
                found: dead_sum,
                account: self.cleaner.dead_objects,
            });
        }
        for (_, (hash, found)) in dead {
            let counter = self.table.dead_count(mem, hash);
            if counter != found {
                return Err(AuditError::DeadCounter {
                    hash,
                    found,
                    counter,
                });
            }
        }
        self.audit_segments(&per_segment)?;
        self.audit_table(live)
    }

    fn audit_segments(&self, per_segment: &[[u64; 3]]) -> Result<(), AuditError> {
        let layout = self.layout();
        let segment_bytes = layout.segment_bytes() as u64;
        let mut found = Accounting {
            overhead: layout.region_bytes as u64 - segment_bytes * layout.segments as u64,
            ..Accounting::default()
        };
        for (index, (segment, sums)) in self.log.segments.iter().zip(per_segment).enumerate() {
            match segment.state {
                State::Free => found.free += segment_bytes,
                State::Overflow => found.overhead += segment_bytes,
                state => {
                    let header = SEGMENT_HEADER_BYTES as u64;
                    found.overhead += header;
                    let rest = match state {
                        State::Open => segment_bytes - u64::from(segment.used),
                        _ => 0,
                    };
                    found.free += rest;
                    found.live += sums[0];
                    found.tombstones += sums[1];
                    found.pending += sums[2];
                    found.dead += segment_bytes - header - rest - sums.iter().sum::<u64>();
                    let account = [segment.live, segment.tombstones, segment.pending];
                    let account = account.map(u64::from);
                    if account != *sums {
                        return Err(AuditError::Segment {
                            segment: index,
                            found: *sums,
                            account,
                        });
                    }
                }
            }
        }
        if found == self.log.bytes && found.total() == layout.region_bytes as u64 {
            Ok(())
        } else {
            Err(AuditError::Account {
                found,
                account: self.log.bytes,
            })
        }
    }

    fn audit_table(&self, live: u64) -> Result<(), AuditError> {
        let mem = self.region.as_ref();
        let (mut slots, mut cursor, mut chained) = (0, Some(0), 0);
        let dead_sum = self.table.dead_total(mem);
        while let Some(hash) = cursor {
            let mut in_chain = 0usize;
            self.table.for_chain(mem, hash, |_| in_chain += 1);
            slots += in_chain as u64;
            // A dense chain of n entries: seven a bucket, and one more in the last.
            chained += in_chain.saturating_sub(2) / (BUCKET_BYTES / 8 - 1);
            cursor = self.table.next_bucket(hash);
        }
        if slots != live || live != self.objects {
            return Err(AuditError::Count {
                slots,
                live,
                objects: self.objects,
            });
        }
        if chained != self.table.overflow_used() {
            return Err(AuditError::Overflow {
                chained,
                account: self.table.overflow_used(),
            });
        }
        if dead_sum != self.cleaner.dead_objects {
            return Err(AuditError::DeadObjects {
                found: dead_sum,
                account: self.cleaner.dead_objects,
            });
        }
        Ok(())
    }
}
