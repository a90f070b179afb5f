//! A full check of the store against itself: the log is walked, and everything kept beside it is recomputed.

use super::entry::{EntryHeader, EntryKind, FLAG_EXPIRES, entry_bytes};
use super::once::request_of;
use super::segment::State;
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
        "segment {segment}: the log holds live, tombstone, pending, record and expiring bytes {found:?}, the account says {account:?}"
    )]
    Segment {
        /// Index.
        segment: usize,
        /// Recomputed.
        found: [u64; 5],
        /// As kept.
        account: [u64; 5],
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
    /// One table's account differs from the log.
    #[error(
        "table {table}: the log holds {found:?} objects and bytes, the account says {account:?}"
    )]
    Table {
        /// Id.
        table: u32,
        /// Recomputed.
        found: [u64; 2],
        /// As kept.
        account: [u64; 2],
    },
    /// A segment's first or last expiry leaves out an object.
    #[error("segment {segment} has an object that expires at {expires}, outside of what it says")]
    Expiry {
        /// Index.
        segment: usize,
        /// When the object expires.
        expires: u64,
    },
    /// A result that is kept refers to no record in the log.
    #[error("{kept} results refer to the log, which holds {records} of them")]
    Records {
        /// As kept.
        kept: usize,
        /// Recomputed.
        records: usize,
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
        self.check_own_digest()?;
        let mem = self.region.as_ref();
        let mut per_segment = alloc::vec![[0u64; 5]; self.layout().segments];
        let mut per_table: BTreeMap<u32, [u64; 2]> = BTreeMap::new();
        // Dead objects per counter. The part of a victim already cleaned does not count.
        let mut dead: BTreeMap<u64, (u64, u32)> = BTreeMap::new();
        let (mut live, mut keys) = (0, BTreeSet::new());
        let kept: BTreeSet<usize> = self.leases.records().collect();
        let (victim, mut records) = (self.cleaned_of_victim(), 0);
        for item in self.walk() {
            let (at, entry) = item?;
            let header = entry.header();
            let Some(segment) = self.segment_of(at) else {
                continue;
            };
            let sums = &mut per_segment[segment as usize];
            let cleaned = victim.contains(&at);
            let bytes = header.total_bytes() as u64;
            match header.kind {
                EntryKind::Object if header.is_live() => {
                    sums[0] += bytes;
                    if header.flags & FLAG_EXPIRES != 0 {
                        sums[4] += bytes;
                        self.audit_expiry(segment, entry.expires())?;
                    }
                    live += 1;
                    let table = per_table.entry(header.table).or_default();
                    table[0] += 1;
                    table[1] += bytes;
                    self.audit_reference(at, header, entry.key())?;
                    if !keys.insert((header.table, entry.key())) {
                        return Err(AuditError::Duplicate { offset: at });
                    }
                }
                EntryKind::Object if !cleaned => {
                    let hash = self.hash(header.table, entry.key());
                    dead.entry(self.index.counter_index(hash))
                        .or_insert((hash, 0))
                        .1 += 1;
                }
                EntryKind::Tombstone if !cleaned => {
                    sums[1] += entry_bytes(usize::from(header.key_len), 0) as u64;
                }
                EntryKind::Pending => sums[2] += bytes,
                EntryKind::ResultRecord
                    if kept.contains(&at) && request_of(entry.key()).is_some() =>
                {
                    sums[3] += bytes;
                    records += 1;
                }
                _ => {}
            }
        }
        if records != kept.len() {
            return Err(AuditError::Records {
                kept: kept.len(),
                records,
            });
        }
        for (table, objects, bytes) in self.tables.sums() {
            let (found, account) = (
                per_table.remove(&table).unwrap_or_default(),
                [objects, bytes],
            );
            if found != account {
                return Err(AuditError::Table {
                    table,
                    found,
                    account,
                });
            }
        }
        if let Some((table, found)) = per_table.pop_first() {
            return Err(AuditError::Table {
                table,
                found,
                account: [0; 2],
            });
        }
        let dead_sum: u64 = dead.values().map(|(_, found)| u64::from(*found)).sum();
        if dead_sum != self.cleaner.dead_objects {
            return Err(AuditError::DeadObjects {
                found: dead_sum,
                account: self.cleaner.dead_objects,
            });
        }
        for (_, (hash, found)) in dead {
            let counter = self.index.dead_count(mem, hash);
            if counter != found {
                return Err(AuditError::DeadCounter {
                    hash,
                    found,
                    counter,
                });
            }
        }
        self.audit_segments(&per_segment)?;
        self.audit_index(live)
    }

    fn audit_reference(
        &self,
        at: usize,
        header: &EntryHeader,
        key: &[u8],
    ) -> Result<(), AuditError> {
        let hash = self.hash(header.table, key);
        let mut references = 0;
        self.index.for_chain(self.region.as_ref(), hash, |slot| {
            references += usize::from(slot.entry == at);
        });
        if references == 1 {
            return Ok(());
        }
        Err(AuditError::Unreferenced {
            offset: at,
            references,
        })
    }

    fn audit_expiry(&self, segment: u32, expires: u64) -> Result<(), AuditError> {
        let account = &self.log.segments[segment as usize];
        if (account.first_expiry..=account.last_expiry).contains(&expires) {
            return Ok(());
        }
        Err(AuditError::Expiry {
            segment: segment as usize,
            expires,
        })
    }

    fn audit_segments(&self, per_segment: &[[u64; 5]]) -> Result<(), AuditError> {
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
                    let header = layout.prologue_bytes() as u64;
                    found.overhead += header;
                    let rest = match state {
                        State::Open => segment_bytes - u64::from(segment.used),
                        _ => 0,
                    };
                    found.free += rest;
                    found.live += sums[0];
                    found.tombstones += sums[1];
                    found.pending += sums[2];
                    found.records += sums[3];
                    found.dead += segment_bytes - header - rest - sums[..4].iter().sum::<u64>();
                    let account = [
                        segment.live,
                        segment.tombstones,
                        segment.pending,
                        segment.records,
                        segment.expiring,
                    ];
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

    fn audit_index(&self, live: u64) -> Result<(), AuditError> {
        let mem = self.region.as_ref();
        let (mut slots, mut cursor, mut chained) = (0u64, Some(0), 0);
        let dead_sum = self.index.dead_total(mem);
        while let Some(hash) = cursor {
            chained += self.index.for_chain(mem, hash, |_| slots += 1);
            cursor = self.index.next_bucket(hash);
        }
        if slots != live || live != self.objects {
            return Err(AuditError::Count {
                slots,
                live,
                objects: self.objects,
            });
        }
        if chained != self.index.overflow_used() {
            return Err(AuditError::Overflow {
                chained,
                account: self.index.overflow_used(),
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
