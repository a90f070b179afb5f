//! Who holds which port. One GID is one port space; a holder without a GID holds the port on all of them.

use std::collections::HashMap;

use super::limits::FIRST_EPHEMERAL_PORT;
use super::{Gid, IdKey};

#[derive(Debug)]
struct Holder {
    gid: Option<Gid>,
    id: IdKey,
}

/// The ports that identifiers hold. Port 0 is never held.
#[derive(Debug, Default)]
pub(super) struct Ports {
    holders: HashMap<u16, Vec<Holder>>,
    next_ephemeral: u16,
}

impl Ports {
    fn is_free(&self, gid: Option<Gid>, port: u16) -> bool {
        self.holders.get(&port).is_none_or(|h| {
            h.iter()
                .all(|h| matches!((h.gid, gid), (Some(a), Some(b)) if a != b))
        })
    }

    /// Takes `port`, or for 0 any free one. `None` when it is taken (or all are).
    pub(super) fn claim(&mut self, gid: Option<Gid>, port: u16, id: IdKey) -> Option<u16> {
        let port = if port == 0 {
            self.free_ephemeral(gid)?
        } else {
            port
        };
        if !self.is_free(gid, port) {
            return None;
        }
        self.holders
            .entry(port)
            .or_default()
            .push(Holder { gid, id });
        Some(port)
    }

    fn free_ephemeral(&mut self, gid: Option<Gid>) -> Option<u16> {
        // Goes round, so that a port that was just given back is not the next one given out.
        (0..=u16::MAX - FIRST_EPHEMERAL_PORT).find_map(|_| {
            let port = self.ephemeral();
            self.is_free(gid, port).then_some(port)
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
    pub(super) fn release(&mut self, port: u16, id: IdKey) {
        if let Some(h) = self.holders.get_mut(&port) {
            h.retain(|h| h.id != id);
            if h.is_empty() {
                self.holders.remove(&port);
            }
        }
    }

    /// Who holds a port on `gid`.
    pub(super) fn holder(&self, gid: Gid, port: u16) -> Option<IdKey> {
        let h = self.holders.get(&port)?;
        h.iter()
            .find(|h| h.gid.is_none_or(|g| g == gid))
            .map(|h| h.id)
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
    fn a_port_on_all_gids_conflicts_with_one_on_any() {
        let (a, b) = (Some([1; 16]), Some([2; 16]));
        let mut p = Ports::default();
        assert_eq!(p.claim(a, 7, id(1)), Some(7));
        assert_eq!(p.claim(a, 7, id(2)), None);
        assert_eq!(p.claim(None, 7, id(2)), None);
        assert_eq!(p.claim(b, 7, id(2)), Some(7));
        assert_eq!(
            (
                p.holder([1; 16], 7),
                p.holder([2; 16], 7),
                p.holder([3; 16], 7)
            ),
            (Some(id(1)), Some(id(2)), None)
        );
        p.release(7, id(1));
        p.release(7, id(2));
        assert_eq!(p.claim(None, 7, id(3)), Some(7));
        assert_eq!(
            (p.claim(a, 7, id(4)), p.holder([9; 16], 7)),
            (None, Some(id(3)))
        );
        p.release(7, id(3));
        assert_eq!(p.len(), 0);
    }

    #[test]
    fn ephemeral_ports_run_out_and_come_back() {
        let mut p = Ports::default();
        let all: Vec<u16> = (0..0x8000)
            .map(|i| p.claim(None, 0, id(i)).unwrap())
            .collect();
        assert!(all.iter().all(|port| *port >= FIRST_EPHEMERAL_PORT));
        assert_eq!(p.len(), 0x8000);
        assert_eq!(p.claim(None, 0, id(0x8000)), None);
        p.release(all[17], id(17));
        assert_eq!(p.claim(None, 0, id(0x8000)), Some(all[17]));
    }
}
