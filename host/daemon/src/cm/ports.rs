//! Who holds which port of a port space. Each GID has ports of its own.

use std::collections::HashMap;

use super::limits::FIRST_EPHEMERAL_PORT;
use super::{Gid, IdKey};

/// The ports that identifiers hold. Port 0 is never held.
#[derive(Debug, Default)]
pub(super) struct Ports {
    holders: HashMap<(Gid, u16), IdKey>,
    next_ephemeral: u16,
}

impl Ports {
    /// Takes `port` of a GID, or for 0 any free one. `None` when it is taken (or all are).
    pub(super) fn claim(&mut self, gid: Gid, port: u16, id: IdKey) -> Option<u16> {
        let port = if port == 0 {
            self.free_ephemeral(gid)?
        } else {
            port
        };
        if self.holders.contains_key(&(gid, port)) {
            return None;
        }
        self.holders.insert((gid, port), id);
        Some(port)
    }

    fn free_ephemeral(&mut self, gid: Gid) -> Option<u16> {
        // Goes round, so that a port that was just given back is not the next one given out.
        (0..=u16::MAX - FIRST_EPHEMERAL_PORT).find_map(|_| {
            let port = self.ephemeral();
            (!self.holders.contains_key(&(gid, port))).then_some(port)
        })
    }

    /// The next port of the ephemeral range, whoever holds it: the source port of a connecting identifier that never
    /// asked for one. Connections are told apart by their identifiers, so it need not be its own.
    pub(super) fn ephemeral(&mut self) -> u16 {
        let port = self.next_ephemeral.max(FIRST_EPHEMERAL_PORT);
        self.next_ephemeral = port.checked_add(1).unwrap_or(FIRST_EPHEMERAL_PORT);
        port
    }

    /// Gives a port back.
    pub(super) fn release(&mut self, gid: Gid, port: u16, id: IdKey) {
        if self.holders.get(&(gid, port)) == Some(&id) {
            self.holders.remove(&(gid, port));
        }
    }

    /// Who holds a port of `gid`.
    pub(super) fn holder(&self, gid: Gid, port: u16) -> Option<IdKey> {
        self.holders.get(&(gid, port)).copied()
    }

    /// Ports held.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.holders.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cm::UserKey;

    fn id(handle: u32) -> IdKey {
        IdKey {
            user: UserKey(1),
            handle,
        }
    }

    #[test]
    fn each_gid_has_ports_of_its_own() {
        let (a, b) = ([1; 16], [2; 16]);
        let mut p = Ports::default();
        assert_eq!(p.claim(a, 7, id(1)), Some(7));
        assert_eq!(p.claim(a, 7, id(2)), None);
        assert_eq!(p.claim(b, 7, id(2)), Some(7));
        assert_eq!(
            (p.holder(a, 7), p.holder(b, 7), p.holder([3; 16], 7)),
            (Some(id(1)), Some(id(2)), None)
        );
        p.release(a, 7, id(2));
        assert_eq!(p.holder(a, 7), Some(id(1)), "of another holder");
        p.release(a, 7, id(1));
        assert_eq!(p.claim(a, 7, id(3)), Some(7));
        p.release(a, 7, id(3));
        p.release(b, 7, id(2));
        assert_eq!(p.len(), 0);
    }

    #[test]
    fn ephemeral_ports_run_out_and_come_back() {
        let gid = [1; 16];
        let mut p = Ports::default();
        let all: Vec<u16> = (0..0x8000)
            .map(|i| p.claim(gid, 0, id(i)).unwrap())
            .collect();
        assert!(all.iter().all(|port| *port >= FIRST_EPHEMERAL_PORT));
        assert_eq!(p.len(), 0x8000);
        assert_eq!(p.claim(gid, 0, id(0x8000)), None);
        assert!(p.claim([2; 16], 0, id(0x8000)).is_some());
        p.release(gid, all[17], id(17));
        assert_eq!(p.claim(gid, 0, id(0x8000)), Some(all[17]));
    }
}
