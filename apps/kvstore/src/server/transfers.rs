//! Values and keys that travel by address: READs of a client's memory that are under way.

use alloc::sync::Arc;

use hyv_verbs::{RemoteAddr, SendOp, Sge};

use super::connection::{Connection, Link, kind};
use super::limits::{SUM_LEAST, SUM_SLICE};
use super::region::received;
use super::requests::{Fate, Place};
use super::{Server, buffer_offset, scratch};
use crate::proto::{Key, RemoteBuffer, Request};
use crate::store::{RequestId, Reservation};

/// A READ under way.
#[derive(Debug)]
pub(super) struct Transfer {
    slot: usize,
    stage: Stage,
}

/// What a READ brings.
#[derive(Debug)]
pub(super) enum Stage {
    /// A key, into a scratch buffer; the request waits in its receive buffer.
    Key {
        /// Scratch buffer.
        scratch: u32,
        /// Bytes of the key.
        key_len: usize,
        /// Where the request is.
        place: Place,
    },
    /// A value, into the log.
    Value {
        /// The request's tag.
        tag: u16,
        /// Its id, if it has one.
        once: Option<RequestId>,
        /// Where it goes.
        reservation: Reservation,
    },
}

impl Server {
    /// READs a request's key.
    pub(super) fn fetch_key(&mut self, link: &mut Link, place: Place, key: RemoteBuffer) -> Fate {
        let Some(buffer) = self.scratch.take_large(link) else {
            return Fate::Defer;
        };
        let to = self.scratch.sge(buffer, key.len as usize);
        let stage = Stage::Key {
            scratch: buffer,
            key_len: key.len as usize,
            place,
        };
        self.read_remote(link, key, to, stage);
        Fate::Keep
    }

    pub(super) fn read_remote(
        &mut self,
        link: &mut Link,
        from: RemoteBuffer,
        to: Sge,
        stage: Stage,
    ) {
        let transfer = Transfer {
            slot: link.slot(),
            stage,
        };
        let index = match self.transfers.iter().position(Option::is_none) {
            Some(i) => i,
            None => {
                self.transfers.push(None);
                self.transfers.len() - 1
            }
        };
        self.transfers[index] = Some(transfer);
        let op = SendOp::Read(RemoteAddr {
            addr: from.addr,
            rkey: from.rkey,
        });
        // A failure breaks the connection, and its end gives the transfer up.
        let _ = link.transfer((kind::READ, index as u32), op, to);
    }

    /// A READ has completed.
    pub(super) fn transfer_done(&mut self, conn: &mut Connection, index: u32) {
        let transfer = self
            .transfers
            .get_mut(index as usize)
            .and_then(Option::take);
        match transfer.map(|transfer| transfer.stage) {
            None => {}
            Some(stage @ Stage::Value { .. }) => {
                // Its turn comes among others': what is long is summed in slices.
                let slot = conn.link.slot();
                self.transfers[index as usize] = Some(Transfer { slot, stage });
                self.arrived.push_back(index);
            }
            Some(Stage::Key {
                scratch: buffer,
                key_len,
                place,
            }) => {
                let (requests, keys) = (Arc::clone(&conn.buffers), self.scratch.region());
                let bytes = received(&requests, buffer_offset(place.buffer), place.len as usize);
                let key = received(&keys, scratch::offset(buffer), key_len);
                // It was parsed before.
                let fate = match Request::parse(bytes) {
                    Ok((tag, request)) => {
                        let request = request.with_key(Key::Inline(key));
                        self.execute(&mut conn.link, tag, &request, place)
                    }
                    Err(_) => Fate::Done,
                };
                self.scratch.give_back(&mut conn.link, buffer);
                self.settle(&mut conn.link, place, fate);
            }
        }
    }

    /// Sums a slice of the values that have arrived in the log, in the order of their arrival; with its last byte summed a value is there.
    pub(super) fn sum_arrived(&mut self) {
        let mut left = SUM_SLICE;
        while left > 0
            && let Some(&index) = self.arrived.front()
        {
            let transfer = &mut self.transfers[index as usize];
            if let Some(Transfer {
                stage: Stage::Value { reservation, .. },
                ..
            }) = transfer
            {
                let before = reservation.unsummed();
                self.store.sum_value(reservation, left);
                left -= before - reservation.unsummed();
                if reservation.unsummed() > 0 {
                    return;
                }
            }
            self.arrived.pop_front();
            // A short one costs more than its bytes.
            left = left.saturating_sub(SUM_LEAST);
            let Some(Transfer { slot, stage }) = self.transfers[index as usize].take() else {
                continue;
            };
            let conn = self.conns.get_mut(slot).and_then(Option::take);
            if let (
                Some(mut conn),
                Stage::Value {
                    tag,
                    once,
                    reservation,
                },
            ) = (conn, stage)
            {
                self.commit(&mut conn.link, tag, once, reservation);
                self.any_broken |= conn.link.broken;
                self.conns[slot] = Some(conn);
            }
        }
    }

    /// Gives up what a connection's READs were for, at its end.
    pub(super) fn drop_transfers(&mut self, link: &mut Link) {
        for i in 0..self.transfers.len() {
            if self.transfers[i]
                .as_ref()
                .is_some_and(|t| t.slot == link.slot())
                && let Some(t) = self.transfers[i].take()
            {
                self.arrived.retain(|arrived| *arrived != i as u32);
                self.counters.errors += 1;
                match t.stage {
                    Stage::Value { reservation, .. } => {
                        let aborted = self.store.abort(reservation);
                        debug_assert!(aborted.is_ok(), "a reservation that this server made");
                    }
                    Stage::Key { scratch, place, .. } => {
                        self.scratch.give_back(link, scratch);
                        self.groups[link.group].release(place.buffer);
                    }
                }
            }
        }
    }
}
