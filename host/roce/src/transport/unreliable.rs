//! The receiving half of an unreliable connection (IBA 1.4, 9.8.2): nothing is answered; a gap drops the message that it is
//! in, and reception goes on with the next first packet.

use super::{Go, Psn, Remote, Request, RequestOp};
use crate::wire::Position;

/// What a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnreliableCheck {
    /// Take it. If a message begins here, one that had begun is given up.
    Go(Go),
    /// It belongs to a message that was dropped, or breaks the protocol.
    Drop,
}

#[derive(Clone, Copy, Debug)]
enum Inbound {
    Send {
        offset: u32,
    },
    Write {
        remote: Remote,
        total: u32,
        offset: u32,
    },
}

/// See the module's text.
#[derive(Debug)]
pub struct Unreliable {
    expected: Psn,
    mtu: u32,
    inbound: Option<Inbound>,
}

impl Unreliable {
    /// One that has received nothing.
    #[must_use]
    pub fn new(psn: Psn, mtu: u32) -> Self {
        Self {
            expected: psn,
            mtu,
            inbound: None,
        }
    }

    /// The PSN that the next packet of a message under way has.
    #[must_use]
    pub fn expected(&self) -> Psn {
        self.expected
    }

    /// What this packet is; it counts as taken unless [`Unreliable::give_up`] follows.
    pub fn check(&mut self, r: &Request) -> UnreliableCheck {
        let in_order = r.psn == self.expected;
        self.expected = r.psn.add(1);
        let begun = self.inbound.take();
        let inbound = if in_order { begun } else { None };
        match self.classify(r, inbound) {
            Some((go, next)) => {
                self.inbound = next;
                UnreliableCheck::Go(go)
            }
            None => UnreliableCheck::Drop,
        }
    }

    /// The message that the last packet belongs to is dropped: its further packets are too.
    pub fn give_up(&mut self) {
        self.inbound = None;
    }

    fn classify(&self, r: &Request, inbound: Option<Inbound>) -> Option<(Go, Option<Inbound>)> {
        let fits = match r.position {
            Position::First | Position::Middle => r.len == self.mtu,
            Position::Last => r.len > 0 && r.len <= self.mtu,
            Position::Only => r.len <= self.mtu,
        };
        if !fits {
            return None;
        }
        let ends = r.position.ends();
        match (r.op, r.position.begins(), inbound) {
            (RequestOp::Send, true, _) => Some((
                Go::Send { offset: 0 },
                (!ends).then_some(Inbound::Send { offset: r.len }),
            )),
            (RequestOp::Send, false, Some(Inbound::Send { offset })) => {
                let next = offset.checked_add(r.len)?;
                Some((
                    Go::Send { offset },
                    (!ends).then_some(Inbound::Send { offset: next }),
                ))
            }
            (RequestOp::Write(Some((remote, total))), true, _) => {
                let right = if ends { total == r.len } else { total > r.len };
                right.then_some((
                    Go::Write {
                        remote,
                        offset: 0,
                        total,
                    },
                    (!ends).then_some(Inbound::Write {
                        remote,
                        total,
                        offset: r.len,
                    }),
                ))
            }
            (
                RequestOp::Write(None),
                false,
                Some(Inbound::Write {
                    remote,
                    total,
                    offset,
                }),
            ) => {
                let left = total - offset;
                let right = if ends { r.len == left } else { r.len < left };
                right.then_some((
                    Go::Write {
                        remote,
                        offset,
                        total,
                    },
                    (!ends).then_some(Inbound::Write {
                        remote,
                        total,
                        offset: offset + r.len,
                    }),
                ))
            }
            _ => None,
        }
    }
}
