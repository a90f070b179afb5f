//! Connections that come and go.

use alloc::boxed::Box;
use alloc::sync::Arc;

use hyv_verbs::cm::{CmId, ConnParam, EventChannel};
use hyv_verbs::{CmEventKind, Context, Error, Gid};

use super::connection::{Client, Connection, Group, Link};
use super::limits::{LEASE_LEFT_NS, LEASE_NS, tier};
use super::{Server, ServerError, give_back, verb};
use crate::proto::{Hello, PROTOCOL_VERSION, Refusal, Welcome};
use crate::store::{CleanerMode, RequestId, StoreError, hash64};

/// Requests to connect that may wait.
const BACKLOG: u32 = 1_024;

/// The listening side.
pub(super) struct Listener {
    /// Kept open: dropping it would end listening.
    _id: CmId,
    channel: EventChannel,
}

impl Listener {
    pub fn new(context: &Context, port: u16) -> Result<Self, ServerError> {
        let (id, channel) = hyv_verbs::cm::listen(context, (Gid::LOCAL, port), BACKLOG)
            .map_err(verb("cannot listen"))?;
        Ok(Self { _id: id, channel })
    }
}

impl Server {
    /// Takes connection events: new clients, and those that left. Costs one load when there are none.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn poll_connections(&mut self) -> Result<(), ServerError> {
        while let Some(mut event) = self
            .listener
            .channel
            .poll_event()
            .map_err(verb("cannot take connection events"))?
        {
            match event.kind {
                CmEventKind::ConnectRequest => {
                    self.clock.refresh(&self.context);
                    let private = event.private_data();
                    let hello = Hello::parse(private).map_err(|_| match private.first() {
                        Some(&PROTOCOL_VERSION) => Refusal::Malformed,
                        _ => Refusal::Version,
                    });
                    if let Some(id) = event.take_request() {
                        self.answer_request(id, hello);
                    }
                }
                CmEventKind::Disconnected
                | CmEventKind::ConnectError
                | CmEventKind::Unreachable => {
                    let found = self
                        .conns
                        .iter_mut()
                        .flatten()
                        .find(|c| c.id.handle() == event.id);
                    if let Some(conn) = found {
                        conn.link.broken = true;
                        self.any_broken = true;
                    }
                }
                _ => {}
            }
        }
        if self.any_broken {
            self.close_broken();
        }
        Ok(())
    }

    /// Accepts a client, or tells it why not, in the reject's private data.
    fn answer_request(&mut self, mut id: CmId, hello: Result<Hello, Refusal>) {
        let made = hello.and_then(|hello| self.make_link(&mut id, hello));
        let (link, known) = match made {
            Ok(made) => made,
            Err(why) => {
                // If it is gone already, nobody needs to know.
                let _ = id.reject(&[why as u8, PROTOCOL_VERSION]);
                return;
            }
        };
        let (slot, group, (_, index)) = (link.slot(), link.group, link.qp());
        let welcome = Welcome {
            window: self.groups[group].tier.window as u8,
            known,
            lease_ms: match link.client.lease_until {
                0 => 0,
                _ => (LEASE_LEFT_NS / 1_000_000) as u32,
            },
            epoch: self.epoch,
            client: link.client.id,
            now_ns: self.clock.now,
            log: self.log,
        };
        let private = welcome.to_bytes();
        let param = ConnParam {
            private_data: &private,
            ..ConnParam::default()
        };
        if id.accept(&param).is_err() {
            // The client went away meanwhile; there is nobody to refuse.
            self.free_conns.push(slot);
            return;
        }
        if self.by_qp.len() <= index {
            self.by_qp.resize(index + 1, u32::MAX);
        }
        self.by_qp[index] = slot as u32;
        let buffers = Arc::clone(&self.groups[group].buffers);
        self.conns[slot] = Some(Box::new(Connection::new(link, buffers, id)));
        self.groups[group].used += 1;
        self.connected += 1;
        self.counters.connections += 1;
    }

    /// Gives a client what it needs.
    fn make_link(&mut self, id: &mut CmId, hello: Hello) -> Result<(Link, bool), Refusal> {
        if hello.client != 0 {
            // What is left of its former connection must not be executed once this one is there.
            self.close_former(hello.client);
        }
        if self.connected >= self.config.max_connections {
            return Err(Refusal::TooMany);
        }
        let group = self.group().map_err(|_| Refusal::NoResources)?;
        let qp = self.groups[group]
            .create_qp(&self.pd, id)
            .map_err(|_| Refusal::NoResources)?;
        let (client, known) = self.identify(hello)?;
        let slot = self.free_conns.pop().unwrap_or_else(|| {
            self.conns.push(None);
            self.conns.len() - 1
        });
        self.serial = self.serial.wrapping_add(1);
        let of = (group, self.groups[group].tier);
        let link = Link::new(slot, self.serial, of, qp, client, self.clock.now);
        Ok((link, known))
    }

    /// Who the client is: the one that it says if its results are still kept, otherwise a new one.
    fn identify(&mut self, hello: Hello) -> Result<(Client, bool), Refusal> {
        let now = self.clock.now;
        let probe = RequestId {
            client: hello.client,
            sequence: 0,
        };
        let known = hello.client != 0 && self.store.check(probe, 0, now).is_ok();
        let id = if known {
            hello.client
        } else {
            self.clients += 1;
            // Not to be guessed by other clients, and never given twice.
            hash64(self.secret, &self.clients.to_le_bytes()).max(1)
        };
        let mut lease_until = 0;
        if hello.lease {
            lease_until = now + LEASE_NS;
            loop {
                match self.store.take_lease(id, lease_until, now) {
                    Ok(()) => break,
                    Err(StoreError::TooManyLeases) if self.end_former_lease() => {}
                    Err(StoreError::TooManyLeases) => return Err(Refusal::TooManyLeases),
                    Err(_) => return Err(Refusal::NoResources),
                }
            }
        }
        Ok((Client { id, lease_until }, known))
    }

    /// Ends the lease of the client that left first. False: none has left.
    fn end_former_lease(&mut self) -> bool {
        while let Some((client, _)) = self.former.pop_front() {
            let mut conns = self.conns.iter().flatten();
            if !conns.any(|conn| conn.link.client.id == client) {
                return self.store.end_lease(client, self.clock.now).is_ok();
            }
        }
        false
    }

    fn close_former(&mut self, client: u64) {
        let former = self.conns.iter_mut().flatten();
        for conn in former.filter(|conn| conn.link.client.id == client) {
            conn.link.broken = true;
            self.any_broken = true;
        }
        if self.any_broken {
            self.close_broken();
        }
    }

    /// A group with room for another connection.
    fn group(&mut self) -> Result<usize, Error> {
        if let Some(i) = self.groups.iter().position(|g| g.used < g.tier.clients) {
            return Ok(i);
        }
        let group = Group::new(&self.context, &self.pd, tier(self.groups.len()))?;
        self.groups.push(group);
        Ok(self.groups.len() - 1)
    }

    /// Ends connections that broke; what they held is given back.
    #[cold]
    pub(super) fn close_broken(&mut self) {
        while core::mem::take(&mut self.any_broken) {
            for slot in 0..self.conns.len() {
                let Some(conn) = self.conns[slot].as_mut().filter(|c| c.link.broken) else {
                    continue;
                };
                // The peer may be gone already; then there is nobody to tell.
                let _ = conn.id.disconnect();
                conn.link.stop();
                // With that all receives that it took have completed. They are among what is there now.
                let group = conn.link.group;
                while self.poll_group(group) > 0 {}
                let Some(mut conn) = self.conns[slot].take() else {
                    continue;
                };
                self.drop_transfers(&mut conn.link);
                self.drop_jobs(&mut conn.link);
                for (buffer, _) in core::mem::take(&mut conn.link.deferred) {
                    self.groups[group].release(buffer);
                }
                while let Some(held) = conn.link.take_held() {
                    give_back(&mut self.store, &mut self.scratch, &mut conn.link, held);
                }
                if self.cleaner_set_by == Some(conn.link.serial) {
                    self.cleaner_set_by = None;
                    self.store.set_cleaner_mode(CleanerMode::Auto);
                }
                let Client { id, lease_until } = conn.link.client;
                if lease_until != 0 {
                    while self.former.front().is_some_and(|f| f.1 <= self.clock.now) {
                        self.former.pop_front();
                    }
                    self.former.push_back((id, lease_until));
                }
                self.groups[group].used -= 1;
                self.connected -= 1;
                self.free_conns.push(slot);
            }
        }
    }
}
