//! Exactly once: results of requests are kept until their client has acknowledged them, so that a retry gets the result and
//! does not execute again (RIFL: Lee et al., *Implementing Linearizability at Large Scale and Low Latency*, SOSP 2015).
//!
//! A client takes a lease under an id that no client had before, numbers its requests from 1, and says with each which is
//! the first whose result it has not seen. What a request changed and its result are appended to the log in one piece. A
//! result that changed nothing (a refusal, a remove of what does not exist) is kept in memory alone: whoever replays the log may
//! execute the request again. Results are dropped when they are acknowledged or the lease expires.
//!
//! A result record is an entry of its own kind. Key: client and sequence number (u64 each). Value: the client's first incomplete
//! request then, the number of an increment, the kind of outcome (u64 each). Version and table are those of the object.

use super::entry::{ENTRY_HEADER_BYTES, Entry, EntryHeader, EntryKind, entry_bytes, seal};
use super::ids::IdIndex;
use super::mem::{load_u64, store_u64};
use super::tables::DIRECTORY;
use super::{Increment, RejectReason, RejectRules, Store, StoreError};
use crate::limits::{LEASES_PER_SLICE, MAX_LEASES, MAX_RESULTS};
use alloc::boxed::Box;
use alloc::vec::Vec;

const RECORD_KEY_BYTES: usize = 16;
const RECORD_VALUE_BYTES: usize = 24;

/// Bytes of a result record in the log: what a write that executes once takes beside its entry, until its client has seen the result.
pub const RECORD_BYTES: usize = entry_bytes(RECORD_KEY_BYTES, RECORD_VALUE_BYTES);

/// What a lease's key in the directory begins with; then the client's id. No table's name begins with a zero.
const LEASE_PREFIX: &[u8; 6] = b"\0lease";

/// A request of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    /// The client, by the id of its lease.
    pub client: u64,
    /// Number of the request, from 1.
    pub sequence: u64,
}

/// What a request did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// An object was written.
    Written {
        /// Its version.
        version: u64,
    },
    /// An object was removed.
    Removed {
        /// The version that it had.
        version: u64,
    },
    /// There was nothing to remove.
    Absent,
    /// A number was incremented.
    Incremented {
        /// The new number.
        value: Increment,
        /// Version of the object.
        version: u64,
    },
    /// A reject rule held.
    Rejected {
        /// Which.
        reason: RejectReason,
        /// Version of the object; 0 if it does not exist.
        version: u64,
    },
    /// Something else was in the way, and the client was told.
    Refused {
        /// A number that the server chose ([`Store::refuse`]).
        code: u64,
    },
}

impl Outcome {
    /// Kind, version and number, as a record has them.
    const fn parts(self) -> (u64, u64, u64) {
        match self {
            Self::Written { version } => (1, version, 0),
            Self::Removed { version } => (2, version, 0),
            Self::Absent => (3, 0, 0),
            Self::Incremented { value, version } => match value {
                Increment::I64(_) => (4, version, value.bits()),
                Increment::F64(_) => (5, version, value.bits()),
            },
            Self::Rejected { reason, version } => (6, version, reason as u64),
            Self::Refused { code } => (7, 0, code),
        }
    }

    fn from_parts(kind: u64, version: u64, number: u64) -> Option<Self> {
        Some(match kind {
            1 => Self::Written { version },
            2 => Self::Removed { version },
            3 => Self::Absent,
            4 => Self::Incremented {
                value: Increment::I64(number as i64),
                version,
            },
            5 => Self::Incremented {
                value: Increment::F64(f64::from_bits(number)),
                version,
            },
            6 => Self::Rejected {
                reason: RejectReason::from_raw(u8::try_from(number).ok()?)?,
                version,
            },
            7 => Self::Refused { code: number },
            _ => return None,
        })
    }
}

/// What is known of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Progress {
    /// Nothing: execute it.
    New,
    /// It was begun ([`Store::reserve`]) and is not finished.
    InProgress,
    /// It was executed, with this outcome.
    Done(Outcome),
    /// Its result was acknowledged: the client cannot want it any more.
    Stale,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Empty,
    InProgress,
    Done(Outcome),
}

#[derive(Debug, Clone, Copy)]
struct Kept {
    sequence: u64,
    state: State,
    /// Offset of the record in the log; 0: in memory alone.
    record: usize,
}

const EMPTY: Kept = Kept {
    sequence: 0,
    state: State::Empty,
    record: 0,
};

#[derive(Debug)]
struct Lease {
    client: u64,
    expires: u64,
    first_incomplete: u64,
    /// By sequence number modulo [`MAX_RESULTS`].
    kept: Box<[Kept; MAX_RESULTS]>,
}

impl Lease {
    fn new(client: u64, expires: u64) -> Self {
        Self {
            client,
            expires,
            first_incomplete: 1,
            kept: Box::new([EMPTY; MAX_RESULTS]),
        }
    }

    fn kept(&mut self, sequence: u64) -> &mut Kept {
        &mut self.kept[sequence as usize % MAX_RESULTS]
    }

    /// What is known of a request. Errors: too far ahead to be kept.
    fn progress(&self, sequence: u64) -> Result<Progress, StoreError> {
        if sequence < self.first_incomplete {
            return Ok(Progress::Stale);
        }
        if sequence - self.first_incomplete >= MAX_RESULTS as u64 {
            return Err(StoreError::TooManyResults {
                sequence,
                first_incomplete: self.first_incomplete,
            });
        }
        let kept = &self.kept[sequence as usize % MAX_RESULTS];
        Ok(match kept.state {
            State::InProgress if kept.sequence == sequence => Progress::InProgress,
            State::Done(outcome) if kept.sequence == sequence => Progress::Done(outcome),
            _ => Progress::New,
        })
    }
}

/// A request that is new and being executed: which lease and which number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket {
    place: usize,
    sequence: u64,
}

/// All leases.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    list: Vec<Lease>,
    by_client: IdIndex,
    /// No lease expires before.
    next_expiry: u64,
}

impl Leases {
    fn reindex(&mut self) {
        let clients = self.list.iter().enumerate();
        self.by_client
            .rebuild(clients.map(|(place, lease)| (lease.client, place as u32)));
        self.renew_bound();
    }

    fn renew_bound(&mut self) {
        let expiries = self.list.iter().map(|lease| lease.expires);
        self.next_expiry = expiries.min().unwrap_or(u64::MAX);
    }

    fn add(&mut self, client: u64, expires: u64) {
        let place = self.list.len();
        self.list.push(Lease::new(client, expires));
        self.next_expiry = self.next_expiry.min(expires);
        if place == 0 || !self.by_client.insert(client, place as u32, place) {
            self.reindex();
        }
    }

    fn get(&self, client: u64, now: u64) -> Result<usize, StoreError> {
        self.by_client
            .find(client)
            .filter(|place| self.list[*place].expires > now)
            .ok_or(StoreError::NoLease { client })
    }

    /// Keeps the outcome of a request that left nothing in the log.
    pub(crate) fn settle(&mut self, ticket: Ticket, outcome: Outcome) {
        let kept = self.list[ticket.place].kept(ticket.sequence);
        *kept = Kept {
            sequence: ticket.sequence,
            state: State::Done(outcome),
            record: 0,
        };
    }

    /// The offset at which a record of this request is needed, if it is.
    fn kept_at(&mut self, id: RequestId) -> Option<&mut usize> {
        let place = self.by_client.find(id.client)?;
        let kept = self.list[place].kept(id.sequence);
        (kept.sequence == id.sequence && kept.record != 0).then_some(&mut kept.record)
    }

    /// Whether the record at `offset` is needed.
    pub(crate) fn needs(&mut self, id: RequestId, offset: usize) -> bool {
        self.kept_at(id).is_some_and(|record| *record == offset)
    }

    /// Notes that a record was moved.
    pub(crate) fn moved(&mut self, id: RequestId, to: usize) {
        if let Some(record) = self.kept_at(id) {
            *record = to;
        }
    }

    /// Records in the log that are needed.
    pub(crate) fn records(&self) -> impl Iterator<Item = usize> {
        let kept = self.list.iter().flat_map(|lease| lease.kept.iter());
        kept.map(|kept| kept.record).filter(|record| *record != 0)
    }

    /// Leases, expired ones included that were not taken away yet.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether a lease has expired.
    pub(crate) fn any_expired(&self, now: u64) -> bool {
        !self.list.is_empty() && self.next_expiry <= now
    }
}

/// The request whose record has this key.
pub(crate) fn request_of(key: &[u8]) -> Option<RequestId> {
    (key.len() == RECORD_KEY_BYTES).then(|| RequestId {
        client: load_u64(key, 0),
        sequence: load_u64(key, 8),
    })
}

fn lease_key(client: u64) -> [u8; 14] {
    let mut key = [0; 14];
    key[..6].copy_from_slice(LEASE_PREFIX);
    key[6..].copy_from_slice(&client.to_le_bytes());
    key
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Gives `client` a lease until `expires` (ns), or renews the one it has. Ids must never be used again, so they come from
    /// a counter that survives, or from at least 64 random bits. On a full store the lease is kept in memory alone, and on a busy one
    /// if it is to be renewed and three quarters of it are over: no client loses its lease because a store is busy for long.
    ///
    /// Errors: too many clients; [`StoreError::Busy`] as for [`Self::write`].
    pub fn take_lease(&mut self, client: u64, expires: u64, now: u64) -> Result<(), StoreError> {
        let known = self.leases.by_client.find(client);
        if known.is_none() && self.leases.list.len() >= MAX_LEASES {
            self.end_expired_leases(now);
            if self.leases.list.len() >= MAX_LEASES {
                return Err(StoreError::TooManyLeases);
            }
        }
        match self.put_directory(&lease_key(client), &[], expires, now) {
            Ok(_) => {}
            Err(StoreError::Full { .. }) => self.unlogged += 1,
            Err(StoreError::Busy)
                if known.is_some_and(|place| {
                    let left = self.leases.list[place].expires.saturating_sub(now);
                    left < expires.saturating_sub(now) / 4
                }) =>
            {
                self.unlogged += 1;
            }
            Err(error) => return Err(error),
        }
        match self.leases.by_client.find(client) {
            Some(place) => {
                // When the first expires is only a lower bound from now on, and found anew when it is reached.
                self.leases.list[place].expires = expires;
                self.leases.next_expiry = self.leases.next_expiry.min(expires);
            }
            None => self.leases.add(client, expires),
        }
        Ok(())
    }

    /// Ends a client's lease: its results are dropped. Errors: [`StoreError::Busy`] as for [`Self::remove`].
    pub fn end_lease(&mut self, client: u64, now: u64) -> Result<(), StoreError> {
        let Some(place) = self.leases.by_client.find(client) else {
            return Ok(());
        };
        self.remove_in(DIRECTORY, &lease_key(client), &RejectRules::NONE, None, now)?;
        self.forget_lease(place);
        self.leases.reindex();
        Ok(())
    }

    /// Clients with a lease, expired ones included that were not taken away yet.
    #[must_use]
    pub fn leases(&self) -> usize {
        self.leases.len()
    }

    fn forget_lease(&mut self, place: usize) {
        let lease = self.leases.list.swap_remove(place);
        for kept in lease.kept.iter() {
            self.drop_record(kept.record);
        }
    }

    /// Ends leases that have expired, as many as one slice may.
    pub(crate) fn end_expired_leases(&mut self, now: u64) {
        let (mut place, mut ended) = (0, 0);
        while let Some(lease) = self.leases.list.get(place)
            && ended < LEASES_PER_SLICE
        {
            if lease.expires <= now {
                self.forget_lease(place);
                ended += 1;
            } else {
                place += 1;
            }
        }
        if ended > 0 {
            self.leases.reindex();
        } else {
            self.leases.renew_bound();
        }
    }

    /// Drops the results of some leases that have expired, for a write that needs the room. No lease is moved: the write may hold a
    /// [`Ticket`]. Returns whether there may be more.
    pub(crate) fn drop_expired_results(&mut self, now: u64) -> bool {
        let mut dropped = 0;
        for place in 0..self.leases.list.len() {
            let lease = &self.leases.list[place];
            if lease.expires > now || lease.kept.iter().all(|kept| kept.record == 0) {
                continue;
            }
            for index in 0..MAX_RESULTS {
                let kept = &mut self.leases.list[place].kept[index];
                let record = core::mem::replace(kept, EMPTY).record;
                self.drop_record(record);
            }
            dropped += 1;
            if dropped == LEASES_PER_SLICE {
                return true;
            }
        }
        false
    }

    /// What is known of a request, whose client has seen the results of all before `first_incomplete`: those are dropped.
    ///
    /// Errors: the client has no lease; the request is too far ahead of `first_incomplete`.
    #[inline]
    pub fn check(
        &mut self,
        id: RequestId,
        first_incomplete: u64,
        now: u64,
    ) -> Result<Progress, StoreError> {
        let place = self.leases.get(id.client, now)?;
        let known = self.leases.list[place].first_incomplete;
        if first_incomplete > known {
            let first_incomplete = first_incomplete.min(id.sequence.saturating_add(1));
            for sequence in known..first_incomplete.min(known + MAX_RESULTS as u64) {
                let kept = self.leases.list[place].kept(sequence);
                if kept.sequence == sequence && kept.state != State::InProgress {
                    let record = core::mem::replace(kept, EMPTY).record;
                    self.drop_record(record);
                }
            }
            self.leases.list[place].first_incomplete = first_incomplete.max(known);
        }
        self.leases.list[place].progress(id.sequence)
    }

    /// Keeps `code` as the outcome of a request that was not executed and will not be: a copy of it that comes late gets the
    /// same answer. Errors: as [`Self::check`]; the request has another outcome.
    pub fn refuse(&mut self, id: RequestId, code: u64, now: u64) -> Result<(), StoreError> {
        if let Some(ticket) = self.ticket(Some(id), now)? {
            self.leases.settle(ticket, Outcome::Refused { code });
        }
        Ok(())
    }

    fn drop_record(&mut self, record: usize) {
        if record == 0 {
            return;
        }
        self.log.segment_at(record).records -= RECORD_BYTES as u32;
        self.log.bytes.records -= RECORD_BYTES as u64;
        self.log.bytes.dead += RECORD_BYTES as u64;
        self.log.died_bytes += RECORD_BYTES as u64;
        self.cleaner.maybe_empty = true;
    }

    /// The ticket to execute a request, which must be new.
    #[inline(always)]
    pub(crate) fn ticket(
        &mut self,
        once: Option<RequestId>,
        now: u64,
    ) -> Result<Option<Ticket>, StoreError> {
        let Some(RequestId { client, sequence }) = once else {
            return Ok(None);
        };
        let place = self.leases.get(client, now)?;
        match self.leases.list[place].progress(sequence)? {
            Progress::New => Ok(Some(Ticket { place, sequence })),
            _ => Err(StoreError::DuplicateRequest { sequence }),
        }
    }

    /// Notes that a request is being executed over several calls.
    pub(crate) fn begin(&mut self, ticket: Ticket) {
        *self.leases.list[ticket.place].kept(ticket.sequence) = Kept {
            sequence: ticket.sequence,
            state: State::InProgress,
            record: 0,
        };
    }

    /// The ticket of a request in progress, which then counts as new. None: its lease ended meanwhile.
    pub(crate) fn resume(&mut self, id: RequestId) -> Option<Ticket> {
        let place = self.leases.by_client.find(id.client)?;
        let kept = self.leases.list[place].kept(id.sequence);
        if kept.sequence != id.sequence || kept.state != State::InProgress {
            return None;
        }
        *kept = EMPTY;
        Some(Ticket {
            place,
            sequence: id.sequence,
        })
    }

    /// Writes a result record into space of the log at `at`, which the caller took for it.
    pub(crate) fn write_record(
        &mut self,
        ticket: Ticket,
        at: usize,
        generation: u64,
        table: u32,
        outcome: Outcome,
    ) {
        let lease = &mut self.leases.list[ticket.place];
        *lease.kept(ticket.sequence) = Kept {
            sequence: ticket.sequence,
            state: State::Done(outcome),
            record: at,
        };
        let (client, first_incomplete) = (lease.client, lease.first_incomplete);
        let (kind, version, number) = outcome.parts();
        let header = EntryHeader {
            state: generation << 1,
            crc: 0,
            kind: EntryKind::ResultRecord,
            flags: 0,
            key_len: RECORD_KEY_BYTES as u16,
            value_len: RECORD_VALUE_BYTES as u32,
            table,
            version,
        };
        let mem = &mut self.region.as_mut()[at..at + RECORD_BYTES];
        header.emit(mem);
        let fields = [client, ticket.sequence, first_incomplete, number, kind];
        for (index, field) in fields.into_iter().enumerate() {
            store_u64(mem, ENTRY_HEADER_BYTES + 8 * index, field);
        }
        seal(mem, &header);
        self.log.segment_at(at).records += RECORD_BYTES as u32;
        self.log.bytes.records += RECORD_BYTES as u64;
    }

    /// Takes in a lease that a replay found.
    pub(crate) fn restore_lease(&mut self, key: &[u8], expires: u64) {
        if let Some(client) = key.strip_prefix(LEASE_PREFIX)
            && let Ok(client) = client.try_into().map(u64::from_le_bytes)
            && self.leases.by_client.find(client).is_none()
        {
            self.leases.add(client, expires);
        }
    }

    /// Takes in what a replay's record says of its client's acknowledgements; to be done for all before the first
    /// [`Self::restore_record`].
    pub(crate) fn restore_acknowledged(&mut self, record: &Entry<'_>) {
        if let Some((id, first_incomplete, _)) = read_record(record)
            && let Some(place) = self.leases.by_client.find(id.client)
        {
            let lease = &mut self.leases.list[place];
            lease.first_incomplete = lease.first_incomplete.max(first_incomplete);
        }
    }

    /// Takes in a record that a replay found, if its client can still ask for it. Errors: no room.
    pub(crate) fn restore_record(
        &mut self,
        record: &Entry<'_>,
        now: u64,
    ) -> Result<(), StoreError> {
        let Some((id, _, outcome)) = read_record(record) else {
            return Ok(());
        };
        let Ok(place) = self.leases.get(id.client, now) else {
            return Ok(());
        };
        if self.leases.list[place].progress(id.sequence) != Ok(Progress::New) {
            return Ok(());
        }
        let (at, generation) = self.take(RECORD_BYTES, now)?;
        let ticket = Ticket {
            place,
            sequence: id.sequence,
        };
        self.write_record(ticket, at, generation, record.header().table, outcome);
        Ok(())
    }
}

/// Request, first incomplete request, and outcome of a record; none if it is not one.
fn read_record(record: &Entry<'_>) -> Option<(RequestId, u64, Outcome)> {
    let id = request_of(record.key())?;
    let value = record.value();
    if value.len() != RECORD_VALUE_BYTES {
        return None;
    }
    let version = record.header().version;
    let outcome = Outcome::from_parts(load_u64(value, 16), version, load_u64(value, 8))?;
    Some((id, load_u64(value, 0), outcome))
}
