//! The users: what is known of each, and what one of them causes for the others.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hyv_abi::window::summary;

use super::control::ControlQueue;
use super::dispatch::{Caller, dispatch};
use super::limits::{MAX_WAKE, REQUESTS_PER_TURN};
use super::memory::RamView;
use super::provider::{Provider, UserId, Wake};
use super::rate::TokenBucket;
use super::{UserKind, UserMemory};
use crate::cm::{Cm, Effect, UserKey};
use crate::sys::event::EventFd;
use crate::sys::window::SharedWindow;
use crate::vmm::layout;

/// How often one user's broken control queue is worth a line in the log.
const MAX_QUEUE_WARNINGS: u32 = 4;

/// Wakes by an eventfd: an interrupt into a guest, or a process in `poll`.
#[derive(Debug)]
pub(super) struct EventWake(pub(super) EventFd);

impl Wake for EventWake {
    fn wake(&self) {
        // Fails only for a descriptor that is no eventfd, which the type rules out.
        let _ = self.0.signal();
    }
}

/// What others need of a user.
struct Entry {
    id: UserId,
    window: Arc<SharedWindow>,
    wake: Arc<dyn Wake>,
}

/// How to reach every user.
#[derive(Default)]
pub(super) struct Directory {
    entries: HashMap<UserKey, Entry>,
}

impl Directory {
    pub(super) fn insert(
        &mut self,
        key: UserKey,
        id: UserId,
        window: Arc<SharedWindow>,
        wake: Arc<dyn Wake>,
    ) {
        self.entries.insert(key, Entry { id, window, wake });
    }

    pub(super) fn remove(&mut self, key: UserKey) {
        self.entries.remove(&key);
    }

    /// Does what connection management asks for.
    pub(super) fn apply(&self, cm: &mut Cm, provider: &dyn Provider) {
        for effect in cm.take_effects() {
            match effect {
                Effect::FailQp { user, qpn } => {
                    if let Some(e) = self.entries.get(&user) {
                        provider.fail_qpn(e.id, qpn);
                    }
                }
                Effect::SendMad { src, dst, mad } => provider.send_mad(&src, &dst, &mad),
                Effect::Notify(user) => {
                    if let Some(e) = self.entries.get(&user) {
                        e.window
                            .events
                            .summary
                            .fetch_or(summary::CM, Ordering::SeqCst);
                        e.wake.wake();
                    }
                }
            }
        }
    }

    /// Says that the host lives.
    pub(super) fn beat(&self) {
        for e in self.entries.values() {
            layout::beat(&e.window);
        }
    }
}

/// One user.
pub(super) struct User {
    pub(super) key: UserKey,
    pub(super) id: UserId,
    pub(super) name: String,
    pub(super) kind: UserKind,
    pub(super) memory: UserMemory,
    pub(super) ram: RamView,
    pub(super) kick_control: EventFd,
    pub(super) wake: Arc<dyn Wake>,
    pub(super) queue: ControlQueue,
    pub(super) bucket: TokenBucket,
    pub(super) qpns: HashMap<u32, u32>,
    pub(super) queue_warnings: u32,
}

/// What a turn for a user came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Turn {
    /// Requests answered.
    pub(super) requests: usize,
    /// Wants another turn.
    pub(super) more: bool,
    /// Its queue was found broken.
    pub(super) broken: bool,
}

impl User {
    /// Takes the wake-up that the user asks for, if it does: ns from now.
    pub(super) fn take_wake_in(&self) -> Option<u64> {
        let word = &self.memory.window.user.wake_in_ns;
        if word.load(Ordering::Relaxed) == 0 {
            return None;
        }
        match word.swap(0, Ordering::AcqRel) {
            0 => None,
            ns => Some(ns.min(MAX_WAKE.as_nanos() as u64)),
        }
    }

    /// Releases all that it has: its connections first, so that peers learn of it in order, then its objects. The provider
    /// touches its memory no more once this returns.
    pub(super) fn retire(
        &self,
        cm: &mut Cm,
        provider: &dyn Provider,
        directory: &mut Directory,
        now_ns: u64,
    ) {
        cm.tick(now_ns);
        cm.remove_user(self.key);
        directory.apply(cm, provider);
        provider.remove_user(self.id);
        directory.remove(self.key);
    }

    /// Answers some of the user's requests.
    pub(super) fn turn(
        &mut self,
        cm: &mut Cm,
        provider: &dyn Provider,
        directory: &Directory,
        now_ns: u64,
    ) -> Turn {
        let Self {
            key,
            id,
            memory,
            ram,
            queue,
            bucket,
            qpns,
            wake,
            ..
        } = self;
        let mut caller = Caller {
            provider,
            cm,
            key: *key,
            id: *id,
            qpns,
            now_ns,
        };
        let result = queue
            .refresh(&memory.window.user.control, ram)
            .and_then(|()| {
                queue.serve(ram, REQUESTS_PER_TURN, |request| {
                    let reply = dispatch(&mut caller, request, bucket.take(now_ns));
                    // Before the reply is out: who has it may rely on what it says.
                    directory.apply(caller.cm, provider);
                    reply
                })
            });
        match result {
            Ok(served) => {
                if served.notify {
                    wake.wake();
                }
                Turn {
                    requests: served.requests,
                    more: served.more,
                    broken: false,
                }
            }
            Err(e) => {
                if self.queue_warnings < MAX_QUEUE_WARNINGS {
                    self.queue_warnings += 1;
                    tracing::warn!(
                        user = %self.key, name = self.name,
                        "the control queue of this {} is not served until it is set up again: {e}", self.kind
                    );
                }
                Turn {
                    broken: true,
                    ..Turn::default()
                }
            }
        }
    }
}
