//! Links: this side of each conversation with a peer on another host.
//!
//! A link stands for the peer towards its identifier: it takes the identifier's messages and turns them into MADs that are
//! repeated until they are answered, and gives it each of the peer's messages once, however often they come. A link
//! outlives its identifier for as long as there is something to repeat or to answer.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::{Gid, IdKey, Mad, limits};

/// This side's number for a conversation: the communication ID of its MADs, or the request ID of a SIDR exchange.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct LinkId(pub(super) u32);

/// Where a conversation stands, named as in InfiniBand Architecture 1.4, section 12.9.7.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// REQ (or SIDR_REQ) sent, and repeated.
    ReqSent,
    /// REQ (or SIDR_REQ) received; the application thinks.
    ReqRcvd,
    /// REP sent, and repeated.
    RepSent,
    /// REP received; the application readies its queue pair.
    RepRcvd,
    /// The connection stands.
    Established,
    /// DREQ sent, and repeated.
    DreqSent,
    /// Over; what comes late is answered as it was before.
    TimeWait,
}

impl Phase {
    /// Whether [`Link::last`] is repeated until the peer answers.
    pub(super) const fn repeats(self) -> bool {
        matches!(self, Self::ReqSent | Self::RepSent | Self::DreqSent)
    }
}

/// Which message of the peer [`Link::last`] answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Answers {
    /// REQ or SIDR_REQ.
    Req,
    /// REP.
    Rep,
    /// DREQ.
    Dreq,
}

/// One conversation.
#[derive(Debug)]
pub(super) struct Link {
    /// The identifier; none when it is gone, or not there yet.
    pub(super) owner: Option<IdKey>,
    /// This side's address.
    pub(super) local: Gid,
    /// The peer's.
    pub(super) peer: Gid,
    /// Service ID resolution, not a connection.
    pub(super) sidr: bool,
    /// What a SIDR exchange is about; its answer repeats it.
    pub(super) service: u64,
    /// Transaction ID of the exchange that this side or the peer began.
    pub(super) tid: u64,
    /// The peer's number for the conversation; 0 before it is known.
    pub(super) remote: u32,
    /// Queue pairs; 0 before they are known.
    pub(super) local_qpn: u32,
    pub(super) remote_qpn: u32,
    pub(super) phase: Phase,
    /// What the peer gets again: by time while an answer is due, otherwise for each duplicate of what it answers.
    pub(super) last: Option<Box<Mad>>,
    pub(super) answers: Option<Answers>,
    pub(super) retries_left: u8,
    /// Retries that an exchange of this conversation gets.
    pub(super) max_retries: u8,
    /// Time that the peer gets for an answer, ns.
    pub(super) interval_ns: u64,
    /// How long the peer waits for an answer of ours, ns.
    pub(super) patience_ns: u64,
    /// It was asked to wait longer.
    pub(super) asked_patience: bool,
    deadline: Option<u64>,
}

impl Link {
    /// A new conversation.
    pub(super) fn new(owner: Option<IdKey>, local: Gid, peer: Gid, phase: Phase) -> Self {
        Self {
            owner,
            local,
            peer,
            sidr: false,
            service: 0,
            tid: 0,
            remote: 0,
            local_qpn: 0,
            remote_qpn: 0,
            phase,
            last: None,
            answers: None,
            retries_left: 0,
            max_retries: limits::MAX_CM_RETRIES,
            interval_ns: limits::response_ns(limits::RESPONSE_TIMEOUT),
            patience_ns: limits::response_ns(limits::RESPONSE_TIMEOUT),
            asked_patience: false,
            deadline: None,
        }
    }
}

/// All conversations, by either side's number.
#[derive(Debug)]
pub(super) struct Links {
    by_id: HashMap<LinkId, Link>,
    /// By the peer's address, whether it is a SIDR exchange, and the peer's number.
    by_remote: HashMap<(Gid, bool, u32), LinkId>,
    /// By the peer's address and queue pair, while the connection lives.
    by_qpn: HashMap<(Gid, u32), LinkId>,
    deadlines: BTreeSet<(u64, LinkId)>,
    /// Links without an identifier, in the order in which they lost it: those that have something to repeat, and those that
    /// only answer. May name some that are gone.
    lingering: [VecDeque<LinkId>; 2],
    key: u64,
    made: u64,
}

impl Links {
    /// Numbers come from `key`, which nobody outside knows: a peer cannot guess another's conversation.
    pub(super) fn new(key: u64) -> Self {
        Self {
            by_id: HashMap::new(),
            by_remote: HashMap::new(),
            by_qpn: HashMap::new(),
            deadlines: BTreeSet::new(),
            lingering: [VecDeque::new(), VecDeque::new()],
            key,
            made: 0,
        }
    }

    /// A number that is not in use and tells nothing of those before.
    fn fresh(&mut self) -> LinkId {
        use std::hash::Hasher;
        loop {
            self.made += 1;
            // SipHash over the secret: there is no key to give it, but what is hashed first serves as one.
            let mut h = std::hash::DefaultHasher::new();
            h.write_u64(self.key);
            h.write_u64(self.made);
            let id = LinkId(h.finish() as u32);
            if id.0 != 0 && !self.by_id.contains_key(&id) {
                return id;
            }
        }
    }

    /// Adds a conversation. One that a peer began is found by the peer's number from here on.
    pub(super) fn insert(&mut self, link: Link) -> LinkId {
        let id = self.fresh();
        if link.remote != 0 || link.phase == Phase::ReqRcvd {
            self.by_remote
                .insert((link.peer, link.sidr, link.remote), id);
        }
        if link.remote_qpn != 0 {
            self.by_qpn.insert((link.peer, link.remote_qpn), id);
        }
        self.by_id.insert(id, link);
        id
    }

    pub(super) fn get(&self, id: LinkId) -> Option<&Link> {
        self.by_id.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: LinkId) -> Option<&mut Link> {
        self.by_id.get_mut(&id)
    }

    /// The conversation that a peer began.
    pub(super) fn of_remote(&self, peer: Gid, sidr: bool, remote: u32) -> Option<LinkId> {
        self.by_remote.get(&(peer, sidr, remote)).copied()
    }

    /// The live conversation of a peer's queue pair.
    pub(super) fn of_qpn(&self, peer: Gid, qpn: u32) -> Option<LinkId> {
        self.by_qpn.get(&(peer, qpn)).copied()
    }

    /// The peer has said its number and queue pair.
    pub(super) fn learn(&mut self, id: LinkId, remote: u32, qpn: u32) {
        let Some(link) = self.by_id.get_mut(&id) else {
            return;
        };
        (link.remote, link.remote_qpn) = (remote, qpn);
        self.by_remote.insert((link.peer, link.sidr, remote), id);
        self.by_qpn.insert((link.peer, qpn), id);
    }

    /// Sets or clears the time limit.
    pub(super) fn set_deadline(&mut self, id: LinkId, at: Option<u64>) {
        let Some(link) = self.by_id.get_mut(&id) else {
            return;
        };
        if let Some(old) = std::mem::replace(&mut link.deadline, at) {
            self.deadlines.remove(&(old, id));
        }
        if let Some(at) = at {
            self.deadlines.insert((at, id));
        }
    }

    /// The conversation is over until `until`, when it is forgotten.
    pub(super) fn time_wait(&mut self, id: LinkId, until: u64) {
        if let Some(link) = self.by_id.get_mut(&id) {
            link.phase = Phase::TimeWait;
            let qpn = (link.peer, link.remote_qpn);
            if self.by_qpn.get(&qpn) == Some(&id) {
                self.by_qpn.remove(&qpn);
            }
        }
        self.set_deadline(id, Some(until));
    }

    /// Forgets a conversation.
    pub(super) fn remove(&mut self, id: LinkId) {
        self.set_deadline(id, None);
        let Some(link) = self.by_id.remove(&id) else {
            return;
        };
        let remote = (link.peer, link.sidr, link.remote);
        if self.by_remote.get(&remote) == Some(&id) {
            self.by_remote.remove(&remote);
        }
        let qpn = (link.peer, link.remote_qpn);
        if self.by_qpn.get(&qpn) == Some(&id) {
            self.by_qpn.remove(&qpn);
        }
    }

    /// The identifier is gone: the link goes on by itself, among a bounded number of such.
    pub(super) fn orphan(&mut self, id: LinkId) {
        let Some(link) = self.by_id.get_mut(&id) else {
            return;
        };
        link.owner = None;
        if link.deadline.is_none() {
            return self.remove(id);
        }
        // Who makes many that only answer (by being refused) must not push out those that tell a peer of its end.
        let class = usize::from(!link.phase.repeats());
        self.lingering[class].push_back(id);
        while self.lingering[class].len() > limits::MAX_LINGERING {
            let Some(oldest) = self.lingering[class].pop_front() else {
                break;
            };
            if self.by_id.get(&oldest).is_some_and(|l| l.owner.is_none()) {
                self.remove(oldest);
            }
        }
    }

    /// The earliest time limit.
    pub(super) fn next_timeout(&self) -> Option<(u64, LinkId)> {
        self.deadlines.first().copied()
    }

    /// Conversations.
    pub(super) fn len(&self) -> usize {
        debug_assert!(
            self.by_remote
                .values()
                .all(|id| self.by_id.contains_key(id))
        );
        debug_assert!(self.by_qpn.values().all(|id| self.by_id.contains_key(id)));
        self.by_id.len()
    }
}
