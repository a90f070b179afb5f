//! The control thread: one epoll over commands, the sessions' socket and connections, every user's control kick, and
//! one timer for the beat, for wake-ups that users asked for and for everything that has a time limit.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};

use hyv_abi::session::Hello;
use hyv_abi::types::{Errno, Reason, VerbError};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno as OsErrno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::control::ControlQueue;
use super::limits::{ACCEPT_PAUSE, BEAT, HELLO_TIMEOUT, MAX_PENDING};
use super::memory::RamView;
use super::rate::TokenBucket;
use super::users::{Directory, EventWake, User};
use super::{
    BackendConfig, BackendError, Command, Provider, Quotas, Shared, UserInfo, UserKind, UserSpec,
    Wake,
};
use crate::cm::{Cm, UserKey};
use crate::session::{self, Listener, Parts, Session};
use crate::sys::clock::monotonic_ns;
use crate::sys::event::EventFd;
use crate::sys::socket::{self, SocketError};
use crate::timer::Timers;

/// Events taken from the kernel at once.
const EVENTS: usize = 64;

/// What a descriptor in the epoll stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Command,
    Listener,
    Timer,
    Mads,
    Pending(u64),
    Kick(UserKey),
    Session(UserKey),
}

impl Source {
    /// Keys count up from 1 and never reach 2^56.
    fn pack(self) -> u64 {
        let (tag, key) = match self {
            Self::Command => (0, 0),
            Self::Listener => (1, 0),
            Self::Timer => (2, 0),
            Self::Pending(key) => (3, key),
            Self::Kick(key) => (4, key.0),
            Self::Session(key) => (5, key.0),
            Self::Mads => (6, 0),
        };
        tag << 56 | key
    }

    fn unpack(word: u64) -> Option<Self> {
        let key = word & ((1 << 56) - 1);
        Some(match word >> 56 {
            0 => Self::Command,
            1 => Self::Listener,
            2 => Self::Timer,
            3 => Self::Pending(key),
            4 => Self::Kick(UserKey(key)),
            5 => Self::Session(UserKey(key)),
            6 => Self::Mads,
            _ => return None,
        })
    }
}

/// What a deadline is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Timer {
    Beat,
    /// The listener rests, because no descriptor was left.
    Accept,
    /// A connection must have said hello by now.
    Hello(u64),
    /// A user wants to be woken.
    Wake(UserKey),
}

/// The state of the control thread.
pub(super) struct Service {
    epoll: OwnedFd,
    timer: OwnedFd,
    timer_at: Option<u64>,
    inbox: Receiver<Command>,
    bell: EventFd,
    mad_bell: Option<Arc<EventFd>>,
    shared: Arc<Shared>,
    quotas: Quotas,
    provider: Arc<dyn Provider>,
    cm: Cm,
    directory: Directory,
    users: HashMap<UserKey, User>,
    sessions: HashMap<UserKey, Session>,
    listener: Option<Listener>,
    /// Connections that have not said hello.
    pending: HashMap<u64, OwnedFd>,
    timers: Timers<Timer>,
    /// Users that wait for their turn, each once.
    ready: VecDeque<UserKey>,
    last_key: u64,
    stopping: bool,
}

impl Service {
    pub(super) fn new(
        config: BackendConfig,
        provider: Arc<dyn Provider>,
        inbox: Receiver<Command>,
        bell: EventFd,
        shared: Arc<Shared>,
    ) -> Result<Self, BackendError> {
        let os = |e: OsErrno| BackendError::Descriptor(e.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).map_err(os)?;
        let listener = config
            .runtime_dir
            .as_deref()
            .map(Listener::bind)
            .transpose()?;
        let gids = provider.port_attr(1).map_or(0, |p| p.gid_tbl_len);
        let gids = (0..gids).filter_map(|i| provider.gid(1, i).ok()).collect();
        let mut it = Self {
            epoll,
            timer,
            timer_at: None,
            inbox,
            bell,
            mad_bell: config.wire.as_ref().map(|w| Arc::clone(&w.mad_bell)),
            shared,
            quotas: config.quotas,
            provider,
            cm: Cm::new(config.quotas.cm, gids),
            directory: Directory::default(),
            users: HashMap::new(),
            sessions: HashMap::new(),
            listener,
            pending: HashMap::new(),
            timers: Timers::new(),
            ready: VecDeque::new(),
            last_key: 0,
            stopping: false,
        };
        it.watch(&it.bell, Source::Command, EventFlags::IN)?;
        it.watch(&it.timer, Source::Timer, EventFlags::IN)?;
        if let Some(wire) = config.wire {
            it.watch(&*wire.mad_bell, Source::Mads, EventFlags::IN)?;
            it.cm.set_wire(wire.identity);
        }
        if let Some(l) = &it.listener {
            it.watch(l, Source::Listener, EventFlags::IN)?;
        }
        it.timers
            .set(Timer::Beat, monotonic_ns() + BEAT.as_nanos() as u64);
        Ok(it)
    }

    fn watch(&self, fd: impl AsFd, source: Source, flags: EventFlags) -> Result<(), BackendError> {
        epoll::add(&self.epoll, fd, EventData::new_u64(source.pack()), flags)
            .map_err(|e| BackendError::Descriptor(e.into()))
    }

    fn unwatch(&self, fd: impl AsFd) {
        // Fails only for what is not watched.
        let _ = epoll::delete(&self.epoll, fd);
    }

    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        while !self.stopping {
            self.arm();
            let timeout = (!self.ready.is_empty()).then_some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            });
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(OsErrno::INTR) => {}
                Err(e) => {
                    tracing::error!(
                        "the control thread cannot wait ({e}) and ends; restart the appliance"
                    );
                    break;
                }
            }
            for event in &events {
                if let Some(source) = Source::unpack(event.data.u64()) {
                    self.on_event(source);
                }
            }
            self.on_time();
            for _ in 0..self.ready.len() {
                let Some(key) = self.ready.pop_front() else {
                    break;
                };
                self.serve(key);
            }
        }
        self.shut_down();
    }

    /// Sets the one timer to the earliest of all deadlines.
    fn arm(&mut self) {
        let next = [self.timers.next(), self.cm.next_timeout()]
            .into_iter()
            .flatten()
            .min();
        if next == self.timer_at {
            return;
        }
        // 0 disarms; a deadline at 0 has passed, as has 1.
        let at = next.map_or(0, |at| at.max(1));
        let spec = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: (at / 1_000_000_000) as i64,
                tv_nsec: (at % 1_000_000_000) as i64,
            },
        };
        match rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec) {
            Ok(_) => self.timer_at = next,
            Err(e) => tracing::error!("cannot set the control thread's timer: {e}"),
        }
    }

    fn on_event(&mut self, source: Source) {
        match source {
            Source::Command => {
                let _ = self.bell.take();
                while let Ok(command) = self.inbox.try_recv() {
                    self.on_command(command);
                }
            }
            Source::Timer => {
                // It has fired and is no longer armed.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.timer_at = None;
            }
            Source::Listener => self.on_connection(),
            Source::Mads => self.on_mads(),
            Source::Pending(key) => self.on_hello(key),
            Source::Kick(key) => self.make_ready(key),
            // Nothing more is to be said on it: whatever comes is the end.
            Source::Session(key) => {
                self.remove_user(key);
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        // Whoever asked may have stopped waiting.
        match command {
            Command::Add(spec, reply) => {
                let _ = reply.send(self.add_user(*spec));
            }
            Command::Remove(key, reply) => {
                let _ = reply.send(self.remove_user(key));
            }
            Command::Stop => self.stopping = true,
        }
    }

    fn on_time(&mut self) {
        let now = monotonic_ns();
        while let Some(timer) = self.timers.expired(now) {
            match timer {
                Timer::Beat => {
                    self.directory.beat();
                    self.timers.set(Timer::Beat, now + BEAT.as_nanos() as u64);
                }
                Timer::Accept => {
                    if let Some(l) = &self.listener
                        && let Err(e) = self.watch(l, Source::Listener, EventFlags::IN)
                    {
                        tracing::warn!("sessions are not offered for now: {e}");
                        self.timers
                            .set(Timer::Accept, now + ACCEPT_PAUSE.as_nanos() as u64);
                    }
                }
                Timer::Hello(key) => {
                    if let Some(socket) = self.pending.remove(&key) {
                        self.unwatch(&socket);
                        self.refuse(
                            &socket,
                            VerbError::new(Errno::Again, Reason::None),
                            &"it sent no hello in time",
                        );
                    }
                }
                Timer::Wake(key) => {
                    if let Some(user) = self.users.get(&key) {
                        let fired = &user.memory.window.header.timer_fired;
                        fired.store(
                            fired.load(Ordering::Relaxed).wrapping_add(1),
                            Ordering::Release,
                        );
                        user.wake.wake();
                    }
                }
            }
        }
        if self.cm.next_timeout().is_some_and(|at| at <= now) {
            self.cm.handle_timeout(now);
            self.directory.apply(&mut self.cm, &*self.provider);
        }
    }

    fn on_mads(&mut self) {
        // Before they are taken: those that come meanwhile raise it again.
        if let Some(bell) = &self.mad_bell {
            let _ = bell.take();
        }
        if let Ok(port) = self.provider.port_attr(1) {
            self.cm.set_path_mtu(port.active_mtu);
        }
        let now = monotonic_ns();
        for (src, mad) in self.provider.take_mads() {
            self.cm.handle_mad(&src, &mad, now);
        }
        self.directory.apply(&mut self.cm, &*self.provider);
    }

    fn make_ready(&mut self, key: UserKey) {
        if self.users.contains_key(&key) && !self.ready.contains(&key) {
            self.ready.push_back(key);
        }
    }

    fn serve(&mut self, key: UserKey) {
        let Some(user) = self.users.get_mut(&key) else {
            return;
        };
        let now = monotonic_ns();
        if let Some(ns) = user.take_wake_in() {
            self.timers.set(Timer::Wake(key), now.saturating_add(ns));
        }
        self.cm.tick(now);
        let turn = user.turn(&mut self.cm, &*self.provider, &self.directory, now);
        self.shared
            .requests
            .fetch_add(turn.requests as u64, Ordering::Relaxed);
        self.shared
            .broken_queues
            .fetch_add(turn.broken.into(), Ordering::Relaxed);
        if turn.more {
            self.ready.push_back(key);
        }
    }

    fn add_user(&mut self, spec: UserSpec) -> Result<UserKey, BackendError> {
        let UserSpec {
            name,
            kind,
            memory,
            kick_control,
            kick_data,
            wake,
        } = spec;
        let ram = RamView::new(memory.ram.clone()).map_err(|reason| BackendError::Ram {
            name: name.clone(),
            reason,
        })?;
        let wake: Arc<dyn Wake> = Arc::new(EventWake(wake));
        let id = self
            .provider
            .add_user(&memory, wake.clone(), kick_data)
            .map_err(|source| BackendError::Refused {
                name: name.clone(),
                source,
            })?;
        self.last_key += 1;
        let key = UserKey(self.last_key);
        // By edge and never read: the user shares the eventfd, and one that it drained or made blocking would stop
        // this thread.
        if let Err(e) = self.watch(
            &kick_control,
            Source::Kick(key),
            EventFlags::IN | EventFlags::ET,
        ) {
            self.provider.remove_user(id);
            return Err(e);
        }
        self.cm.add_user(key);
        self.directory
            .insert(key, id, memory.window.clone(), wake.clone());
        let info = UserInfo {
            key,
            name: name.clone(),
            kind,
            ram_len: ram.len(),
            memory: memory.clone(),
        };
        tracing::info!(user = %key, name, ram = info.ram_len, "{kind} added");
        self.shared
            .users
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, info);
        let bucket = TokenBucket::new(
            self.quotas.requests_per_second,
            self.quotas.request_burst,
            monotonic_ns(),
        );
        let user = User {
            key,
            id,
            name,
            kind,
            memory,
            ram,
            kick_control,
            wake,
            queue: ControlQueue::default(),
            bucket,
            qpns: HashMap::new(),
            queue_warnings: 0,
        };
        self.users.insert(key, user);
        // It may have set up its queue before anybody listened.
        self.make_ready(key);
        Ok(key)
    }

    /// Releases all that a user has: its connections first, so that peers learn of it in order, then its objects, then
    /// its memory.
    fn remove_user(&mut self, key: UserKey) -> bool {
        let Some(user) = self.users.remove(&key) else {
            return false;
        };
        self.unwatch(&user.kick_control);
        self.timers.cancel(Timer::Wake(key));
        self.ready.retain(|k| *k != key);
        user.retire(
            &mut self.cm,
            &*self.provider,
            &mut self.directory,
            monotonic_ns(),
        );
        if let Some(session) = self.sessions.remove(&key) {
            self.unwatch(&session);
        }
        self.shared
            .users
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&key);
        tracing::info!(user = %key, name = user.name, "{} removed", user.kind);
        true
    }

    fn refuse(&self, socket: &OwnedFd, error: VerbError, why: &dyn std::fmt::Display) {
        self.shared.refused_sessions.fetch_add(1, Ordering::Relaxed);
        tracing::warn!("a session was refused: {why}");
        session::refuse(socket, error);
    }

    fn on_connection(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let socket = match listener.accept() {
            Ok(Some(socket)) => socket,
            Ok(None) => return,
            Err(e) => {
                tracing::warn!("cannot take a connection: {e}");
                self.unwatch(listener);
                self.timers.set(
                    Timer::Accept,
                    monotonic_ns() + ACCEPT_PAUSE.as_nanos() as u64,
                );
                return;
            }
        };
        let own = rustix::process::geteuid().as_raw();
        match socket::peer_cred(&socket) {
            Ok(peer) if session::may_connect(peer.uid, own) => {}
            Ok(peer) => {
                let why = format!("process {} is of user {}, not of {own}", peer.pid, peer.uid);
                return self.refuse(&socket, VerbError::new(Errno::Perm, Reason::None), &why);
            }
            Err(e) => return self.refuse(&socket, VerbError::new(Errno::Perm, Reason::None), &e),
        }
        let full = VerbError::new(Errno::NoMem, Reason::QuotaObjects);
        if self.pending.len() >= MAX_PENDING {
            return self.refuse(&socket, full, &"too many connections have not said hello");
        }
        self.last_key += 1;
        let key = self.last_key;
        if let Err(e) = self.watch(
            &socket,
            Source::Pending(key),
            EventFlags::IN | EventFlags::RDHUP,
        ) {
            return self.refuse(&socket, full, &e);
        }
        self.pending.insert(key, socket);
        self.timers.set(
            Timer::Hello(key),
            monotonic_ns() + HELLO_TIMEOUT.as_nanos() as u64,
        );
    }

    fn on_hello(&mut self, key: u64) {
        let Some(socket) = self.pending.get(&key) else {
            return;
        };
        // One byte more than a hello, so that a longer message is seen to be one. Descriptors that come along are closed.
        let mut message = [0; size_of::<Hello>() + 1];
        let received = socket::recv_with_fds(socket, &mut message);
        if matches!(&received, Err(SocketError::Io(e)) if e.kind() == std::io::ErrorKind::WouldBlock)
        {
            return;
        }
        let Some(socket) = self.pending.remove(&key) else {
            return;
        };
        self.timers.cancel(Timer::Hello(key));
        self.unwatch(&socket);
        match received {
            Ok((0, _)) => {}
            Ok((n, _)) => {
                if let Err((error, why)) = self.open_session(socket.try_clone(), &message[..n]) {
                    self.refuse(&socket, error, &why);
                }
            }
            Err(e) => self.refuse(&socket, VerbError::new(Errno::Inval, Reason::BadLength), &e),
        }
    }

    fn open_session(
        &mut self,
        socket: std::io::Result<OwnedFd>,
        hello: &[u8],
    ) -> Result<(), (VerbError, String)> {
        let ask =
            session::judge(hello, &self.quotas).map_err(|e| (e, format!("bad hello: {e}")))?;
        let name = &ask.name;
        let quota = |reason| VerbError::new(Errno::NoMem, reason);
        if self.sessions.len() >= self.quotas.sessions {
            let why = format!("{name}: there are {} sessions already", self.sessions.len());
            return Err((quota(Reason::QuotaObjects), why));
        }
        let taken: u64 = self.sessions.values().map(|s| s.ram_len).sum();
        if taken.saturating_add(ask.ram_len) > self.quotas.total_session_ram {
            let why = format!("{name}: all sessions together would have more RAM than they may");
            return Err((quota(Reason::QuotaMemory), why));
        }
        let failed = |e: BackendError| {
            let error = match &e {
                BackendError::Refused { source, .. } => *source,
                BackendError::Memory(_) => quota(Reason::QuotaMemory),
                _ => quota(Reason::QuotaObjects),
            };
            (error, e.to_string())
        };
        let socket = socket.map_err(|e| failed(e.into()))?;
        let parts = Parts::create(ask.ram_len).map_err(failed)?;
        let spec = parts.spec(ask.name, UserKind::Process).map_err(failed)?;
        let key = self.add_user(spec).map_err(failed)?;
        let session = Session::new(socket, ask.ram_len);
        if let Err(e) = self.watch(
            &session,
            Source::Session(key),
            EventFlags::IN | EventFlags::RDHUP,
        ) {
            self.remove_user(key);
            return Err(failed(e));
        }
        let welcomed = parts.welcome(&session);
        self.sessions.insert(key, session);
        if let Err(e) = welcomed {
            // It has gone already; there is nobody to refuse.
            tracing::debug!(user = %key, "a session ended before it began: {e}");
            self.remove_user(key);
            return Ok(());
        }
        self.shared.sessions.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn shut_down(&mut self) {
        self.listener = None;
        self.pending.clear();
        if self.cm.has_wire() {
            tracing::debug!("connection management: {:?}", self.cm.mad_stats());
        }
        let mut keys: Vec<UserKey> = self.users.keys().copied().collect();
        keys.sort_unstable();
        for key in keys {
            if let Some(user) = self.users.get(&key)
                && user.kind != UserKind::Guest
            {
                // Guests are ended by the launcher, which asks them first.
                user.memory
                    .window
                    .header
                    .shutdown
                    .store(1, Ordering::Release);
                user.wake.wake();
            }
            self.remove_user(key);
        }
        // Whoever still waits for an answer gets an error: the inbox is dropped.
    }
}
