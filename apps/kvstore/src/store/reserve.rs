//! Reservations: log space for a value that a transport writes, and what becomes of it.

use super::entry::{
    ENTRY_HEADER_BYTES, EntryHeader, EntryKind, FLAG_EXPIRES, STATE_LIVE, entry_bytes, key_at,
    seal, seal_summed,
};
use super::mem::store_u64;
use super::once::{RECORD_BYTES, Ticket};
use super::write::object_bytes;
use super::{NEVER, Outcome, RejectRules, RequestId, Store, StoreError, Write};
use crate::crc::Sum;
use core::ops::Range;

/// Log space for a value that something else will write. Give it back by [`Store::commit`] or [`Store::abort`]; until then
/// its segment cannot be cleaned.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a reservation that is neither committed nor aborted holds its segment for ever"]
pub struct Reservation {
    entry: usize,
    hash: u64,
    table: u32,
    key_len: usize,
    value_len: usize,
    expires: u64,
    generation: u64,
    rules: RejectRules,
    once: Option<RequestId>,
    /// Checksum of the key and of the first `summed` bytes of the value.
    sum: Sum,
    summed: usize,
}

impl Reservation {
    /// Where the value goes, relative to the region's start.
    #[must_use]
    pub const fn value(&self) -> Range<usize> {
        let start = self.entry + ENTRY_HEADER_BYTES + self.key_len;
        start..start + self.value_len
    }

    /// The table that it is for.
    #[must_use]
    pub const fn table(&self) -> u32 {
        self.table
    }

    /// Bytes of the value that [`Store::sum_value`] has not summed yet.
    #[must_use]
    pub const fn unsummed(&self) -> usize {
        self.value_len - self.summed
    }

    const fn object_bytes(&self) -> usize {
        object_bytes(self.key_len, self.value_len, self.expires)
    }

    const fn record_bytes(&self) -> usize {
        if self.once.is_some() { RECORD_BYTES } else { 0 }
    }

    const fn bytes(&self) -> usize {
        self.object_bytes() + self.record_bytes()
    }

    const fn header(&self, kind: EntryKind, version: u64) -> EntryHeader {
        EntryHeader {
            state: self.generation << 1,
            crc: 0,
            kind,
            flags: if self.expires == NEVER {
                0
            } else {
                FLAG_EXPIRES
            },
            key_len: self.key_len as u16,
            value_len: self.value_len as u32,
            table: self.table,
            version,
        }
    }
}

impl<R: AsRef<[u8]> + AsMut<[u8]>> Store<R> {
    /// Takes log space for a value of `value_len` bytes, to be written by somebody else and then committed; `write.value` is not
    /// looked at. Several reservations may be open, also for the same key: the last commit wins. Reject rules are
    /// applied now, and again by the commit. Errors as for [`Self::write`].
    pub fn reserve(
        &mut self,
        write: &Write<'_>,
        value_len: usize,
        now: u64,
    ) -> Result<Reservation, StoreError> {
        let &Write {
            table,
            key,
            expires,
            ref rules,
            once,
            ..
        } = write;
        self.tables.user_place(table)?;
        let hash = self.hash(table, key);
        let ticket = self.ticket(once, now)?;
        self.apply_rules(rules, hash, table, key, ticket, now)?;
        self.check_lengths(key, value_len)?;
        let mut reservation = Reservation {
            entry: 0,
            hash,
            table,
            key_len: key.len(),
            value_len,
            expires,
            generation: 0,
            rules: *rules,
            once,
            sum: Sum::default(),
            summed: 0,
        };
        let bytes = reservation.bytes();
        self.admit(hash, table, key, bytes, now)?;
        let (entry, generation) = self.take(bytes, now)?;
        (reservation.entry, reservation.generation) = (entry, generation);
        self.emit_unfinished(&reservation, EntryKind::Pending);
        let mem = &mut self.region.as_mut()[entry..entry + bytes];
        mem[ENTRY_HEADER_BYTES..ENTRY_HEADER_BYTES + key.len()].copy_from_slice(key);
        reservation.sum.add(key);
        let segment = self.log.segment_at(entry);
        segment.pending += bytes as u32;
        segment.open_reservations += 1;
        self.log.bytes.pending += bytes as u64;
        self.open_reservations += 1;
        if let Some(ticket) = ticket {
            self.begin(ticket);
        }
        Ok(reservation)
    }

    /// Writes the headers of a reservation's object, and of the space for its record, as one of `kind`.
    fn emit_unfinished(&mut self, reservation: &Reservation, kind: EntryKind) {
        let split = reservation.object_bytes();
        let header = reservation.header(kind, 0);
        let mem = &mut self.region.as_mut()[reservation.entry..];
        if reservation.once.is_some() {
            emit_space(&mut mem[split..], reservation.generation, kind);
        }
        header.emit(mem);
        seal(mem, &header);
    }

    /// Sums up to `budget` more bytes of a reservation's value, all of which must have been written. What is left is
    /// summed by [`Self::commit`], in one go.
    pub fn sum_value(&self, reservation: &mut Reservation, budget: usize) {
        let value = reservation.value();
        let from = value.start + reservation.summed;
        let to = value.end.min(from.saturating_add(budget));
        if let Some(bytes) = self.region.as_ref().get(from..to) {
            reservation.sum.add(bytes);
            reservation.summed += bytes.len();
        }
    }

    /// Makes a reservation whose value has been written the current object of its key. Returns its version.
    ///
    /// Errors: a reject rule holds by now, or the table was dropped: then the reservation is given up; the reservation is another store's.
    pub fn commit(&mut self, mut reservation: Reservation, now: u64) -> Result<u64, StoreError> {
        self.close(&reservation)?;
        self.sum_value(&mut reservation, usize::MAX);
        let ticket = reservation.once.and_then(|id| self.resume(id));
        match self.commit_closed(&reservation, ticket, now) {
            Ok(version) => Ok(version),
            Err(error) => {
                self.give_up(&reservation);
                Err(error)
            }
        }
    }

    fn commit_closed(
        &mut self,
        reservation: &Reservation,
        ticket: Option<Ticket>,
        now: u64,
    ) -> Result<u64, StoreError> {
        let &Reservation {
            entry, hash, table, ..
        } = reservation;
        let place = self.tables.user_place(table)?;
        let key = key_at(self.region.as_ref(), entry);
        let old = self.lookup(hash, table, key);
        if !reservation.rules.is_none() {
            let current = old.filter(|slot| self.is_current(slot.entry, now));
            let version =
                current.map(|slot| super::entry::version_at(self.region.as_ref(), slot.entry));
            reservation.rules.check(version).inspect_err(|error| {
                if let (Some(ticket), StoreError::Rejected { reason, version }) = (ticket, *error) {
                    self.leases
                        .settle(ticket, Outcome::Rejected { reason, version });
                }
            })?;
        }
        let version = self.next_version(old);
        let bytes = reservation.object_bytes();
        match ticket {
            Some(ticket) => {
                let outcome = Outcome::Written { version };
                self.write_record(
                    ticket,
                    entry + bytes,
                    reservation.generation,
                    table,
                    outcome,
                );
            }
            None if reservation.once.is_some() => {
                let mem = &mut self.region.as_mut()[entry + bytes..];
                emit_space(mem, reservation.generation, EntryKind::Abandoned);
                self.log.bytes.dead += RECORD_BYTES as u64;
            }
            None => {}
        }
        let mut header = reservation.header(EntryKind::Object, version);
        header.state |= STATE_LIVE;
        let mem = &mut self.region.as_mut()[entry..entry + bytes];
        header.emit(mem);
        let mut sum = reservation.sum;
        if reservation.expires != NEVER {
            let at = reservation.value().end - entry;
            store_u64(mem, at, reservation.expires);
            sum.add(&reservation.expires.to_le_bytes());
        }
        seal_summed(mem, &header, &sum);
        self.publish(
            place,
            hash,
            (entry, bytes),
            version,
            reservation.expires,
            old,
        );
        Ok(version)
    }

    /// Gives up a reservation; its space is dead until it is cleaned. Errors: the reservation is another store's.
    pub fn abort(&mut self, reservation: Reservation) -> Result<(), StoreError> {
        self.close(&reservation)?;
        if let Some(id) = reservation.once {
            self.resume(id);
        }
        self.give_up(&reservation);
        Ok(())
    }

    fn give_up(&mut self, reservation: &Reservation) {
        self.emit_unfinished(reservation, EntryKind::Abandoned);
        self.log.bytes.dead += reservation.bytes() as u64;
        self.log.died_bytes += reservation.bytes() as u64;
        self.cleaner.maybe_empty = true;
    }

    /// Takes an open reservation off the account of pending bytes.
    fn close(&mut self, reservation: &Reservation) -> Result<(), StoreError> {
        let Reservation { entry, .. } = *reservation;
        let mem = self.region.as_ref();
        mem.get(entry..entry + reservation.bytes())
            .and_then(|bytes| EntryHeader::parse(bytes).ok())
            .filter(|header| {
                *header
                    == EntryHeader {
                        crc: header.crc,
                        ..reservation.header(EntryKind::Pending, 0)
                    }
            })
            .filter(|_| self.log.segment_of(entry).is_some())
            .ok_or(StoreError::UnknownReservation)?;
        let segment = self.log.segment_at(entry);
        if segment.open_reservations == 0 {
            return Err(StoreError::UnknownReservation);
        }
        segment.pending -= reservation.bytes() as u32;
        segment.open_reservations -= 1;
        self.log.bytes.pending -= reservation.bytes() as u64;
        self.open_reservations -= 1;
        Ok(())
    }
}

/// Writes the header of space for a result record.
fn emit_space(mem: &mut [u8], generation: u64, kind: EntryKind) {
    let header = EntryHeader {
        state: generation << 1,
        crc: 0,
        kind,
        flags: 0,
        key_len: 0,
        value_len: (RECORD_BYTES - ENTRY_HEADER_BYTES) as u32,
        table: 0,
        version: 0,
    };
    const { assert!(RECORD_BYTES == entry_bytes(0, RECORD_BYTES - ENTRY_HEADER_BYTES)) }
    header.emit(mem);
    seal(mem, &header);
}
