//! Values and keys that travel by address: READs of a client's memory that are under way.

use alloc::sync::Arc;

use hyv_verbs::{RemoteAddr, Sge};

use super::connection::{Link, NONE};
use super::limits::SCRATCH_BYTES;
use super::region::received;
use super::{Server, buffer_offset};
use crate::proto::RemoteBuffer;
use crate::store::Reservation;

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
        /// The request's receive buffer.
        buffer: u32,
        /// Bytes of the request.
        len: usize,
    },
    /// A value, into the log.
    Value {
        /// The request's tag.
        tag: u16,
        /// Where it goes.
        reservation: Reservation,
    },
}

impl Server {
    /// READs a request's key. False, with the request deferred: no scratch buffer is free.
    pub(super) fn fetch_key(
        &mut self,
        link: &mut Link,
        buffer: u32,
        len: usize,
        key: RemoteBuffer,
    ) -> bool {
        let Some(s) = self.free_scratch.pop() else {
            link.deferred.push_front((buffer, len as u32));
            self.any_deferred = true;
            return false;
        };
        let to = self
            .scratch
            .sge(u64::from(s) * SCRATCH_BYTES as u64, key.len);
        let stage = Stage::Key {
            scratch: s,
            key_len: key.len as usize,
            buffer,
            len,
        };
        self.read(
            link,
            RemoteAddr {
                addr: key.addr,
                rkey: key.rkey,
            },
            to,
            stage,
        );
        true
    }

    pub(super) fn read(&mut self, link: &mut Link, from: RemoteAddr, to: Sge, stage: Stage) {
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
        if link.read(index as u32, from, to).is_err() {
            link.broken = true;
            self.transfer_failed(index as u32);
        }
    }

    /// A READ has completed.
    pub(super) fn transfer_done(&mut self, link: &mut Link, index: u32) {
        let Some(transfer) = self
            .transfers
            .get_mut(index as usize)
            .and_then(Option::take)
        else {
            return;
        };
        match transfer.stage {
            Stage::Value { tag, reservation } => self.commit(link, tag, reservation),
            Stage::Key {
                scratch: s,
                key_len,
                buffer,
                len,
            } => {
                let (buffers, keys) = (Arc::clone(link.buffers()), Arc::clone(&self.scratch));
                let bytes = received(&buffers, buffer_offset(buffer), len);
                let key = received(&keys, s as usize * SCRATCH_BYTES, key_len);
                self.request_with_key(link, bytes, key);
                self.free_scratch.push(s);
                link.release(buffer);
            }
        }
    }

    /// A READ has failed: its connection is in error.
    pub(super) fn transfer_failed(&mut self, index: u32) {
        let Some(transfer) = self
            .transfers
            .get_mut(index as usize)
            .and_then(Option::take)
        else {
            return;
        };
        self.give_up(transfer.stage);
    }

    /// Gives up what a connection's READs were for, at its end.
    pub(super) fn drop_transfers(&mut self, slot: usize) {
        for i in 0..self.transfers.len() {
            if self.transfers[i].as_ref().is_some_and(|t| t.slot == slot)
                && let Some(t) = self.transfers[i].take()
            {
                self.give_up(t.stage);
            }
        }
    }

    fn give_up(&mut self, stage: Stage) {
        self.counters.errors += 1;
        match stage {
            Stage::Value { reservation, .. } => {
                let aborted = self.store.abort(reservation);
                debug_assert!(aborted.is_ok(), "a reservation that this server made");
            }
            Stage::Key { scratch, .. } => {
                debug_assert_ne!(scratch, NONE);
                self.free_scratch.push(scratch);
            }
        }
    }
}
