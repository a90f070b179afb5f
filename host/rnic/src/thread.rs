//! The engine's own thread: polls while there is work, spins a while, then tells the users that they must
//! kick and sleeps until one does.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};

use crate::cell::EngineCell;

/// Descriptors whose readability wakes the engine: users' kick eventfds, a carrier's sockets, and the cell's nudge.
pub struct Kicks {
    epoll: OwnedFd,
    nudge: OwnedFd,
    fds: Mutex<Vec<(u64, OwnedFd)>>,
}

const NUDGE: u64 = u64::MAX;
/// Descriptors of a carrier: readable while packets wait, and read by the engine alone.
const CARRIER: u64 = u64::MAX - 1;

impl Kicks {
    /// An empty set.
    pub fn new() -> io::Result<Arc<Self>> {
        let ep = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let nudge = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(
            &ep,
            &nudge,
            epoll::EventData::new_u64(NUDGE),
            epoll::EventFlags::IN,
        )?;
        Ok(Arc::new(Self {
            epoll: ep,
            nudge,
            fds: Mutex::new(Vec::new()),
        }))
    }

    /// Adds a user's data-kick eventfd (non-blocking) under a key of the caller's.
    pub fn add(&self, key: u64, fd: OwnedFd) -> io::Result<()> {
        epoll::add(
            &self.epoll,
            &fd,
            epoll::EventData::new_u64(key),
            epoll::EventFlags::IN,
        )?;
        self.lock().push((key, fd));
        Ok(())
    }

    /// Adds a carrier's descriptor: it wakes the thread for as long as it is readable.
    pub fn watch(&self, fd: OwnedFd) -> io::Result<()> {
        epoll::add(
            &self.epoll,
            &fd,
            epoll::EventData::new_u64(CARRIER),
            epoll::EventFlags::IN,
        )?;
        self.lock().push((CARRIER, fd));
        Ok(())
    }

    /// Removes it.
    pub fn remove(&self, key: u64) {
        let mut fds = self.lock();
        if let Some(i) = fds.iter().position(|(k, _)| *k == key) {
            let (_, fd) = fds.swap_remove(i);
            // Closing would do, but QEMU may hold a copy of the same description.
            let _ = epoll::delete(&self.epoll, &fd);
        }
    }

    /// Wakes the thread.
    pub fn nudge(&self) {
        let _ = rustix::io::write(&self.nudge, &1u64.to_ne_bytes());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(u64, OwnedFd)>> {
        self.fds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until a kick or for so long.
    fn wait(&self, timeout: Option<Duration>) {
        let mut events = Vec::with_capacity(64);
        let ts = timeout.map(|t| rustix::event::Timespec {
            tv_sec: t.as_secs() as i64,
            tv_nsec: i64::from(t.subsec_nanos()),
        });
        // EINTR is a wake-up like any other.
        if epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            ts.as_ref(),
        )
        .is_err()
        {
            return;
        }
        let fds = self.lock();
        let mut count = [0u8; 8];
        for event in events {
            let key = event.data.u64();
            let fd = if key == CARRIER {
                None
            } else if key == NUDGE {
                Some(self.nudge.as_fd())
            } else {
                fds.iter()
                    .find(|(k, _)| *k == key)
                    .map(|(_, fd)| fd.as_fd())
            };
            if let Some(fd) = fd {
                let _ = rustix::io::read(fd, &mut count);
            }
        }
    }
}

/// The running thread; stops and joins when dropped.
pub struct EngineThread {
    stop: Arc<AtomicBool>,
    kicks: Arc<Kicks>,
    join: Option<JoinHandle<()>>,
}

impl EngineThread {
    /// Starts it. `spin` is how long it polls without finding work before it sleeps; `setup` runs first in
    /// the thread (pinning).
    pub fn spawn(
        cell: Arc<EngineCell>,
        kicks: Arc<Kicks>,
        spin: Duration,
        setup: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let nudge = Arc::clone(&kicks);
        cell.set_nudge(Box::new(move || nudge.nudge()));
        let join = std::thread::Builder::new()
            .name("rnic-engine".into())
            .spawn({
                let (stop, kicks) = (Arc::clone(&stop), Arc::clone(&kicks));
                move || {
                    setup();
                    while !stop.load(Ordering::Relaxed) {
                        cell.wait_for_turn();
                        drive(&cell, &kicks, spin, &stop);
                    }
                }
            })?;
        Ok(Self {
            stop,
            kicks,
            join: Some(join),
        })
    }
}

/// Polls until idle for `spin`, then sleeps once.
fn drive(cell: &EngineCell, kicks: &Kicks, spin: Duration, stop: &AtomicBool) {
    let mut driver = cell.driver();
    if cell.is_inline() {
        return;
    }
    if driver.engine().is_dozing() {
        driver.engine().wake_up();
        driver.engine().tick();
    }
    let mut idle_since = Instant::now();
    let mut turns = 0u32;
    loop {
        // Also with work at every turn: whoever drives inline, or stops the thread, must not wait for a lull.
        if cell.is_inline() || stop.load(Ordering::Relaxed) {
            return;
        }
        if driver.poll() > 0 {
            turns = 0;
            continue;
        }
        // No pause: on some CPUs it takes as long as a cache line's way from one core to the other.
        turns += 1;
        if turns == 1 {
            idle_since = Instant::now();
        } else if turns.is_multiple_of(64) && idle_since.elapsed() >= spin {
            break;
        }
    }
    if !driver.engine().doze() {
        return;
    }
    let timeout = driver.engine().next_timer_ns().map(Duration::from_nanos);
    drop(driver);
    kicks.wait(timeout);
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.kicks.nudge();
        if let Some(join) = self.join.take() {
            let _ = join.join();
        }
    }
}
