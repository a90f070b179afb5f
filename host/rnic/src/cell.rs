//! Who drives the engine. Exactly one party polls at a time: it holds the lock for as long as it likes and
//! looks at one flag a turn; control takes the lock in between.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::engine::Engine;

/// The engine and the way to it.
pub struct EngineCell {
    engine: Mutex<Engine>,
    /// Parties that wait for the lock and want the driver to let go.
    wanted: AtomicU32,
    /// Set while a client drives inline: the engine's thread rests.
    inline: AtomicBool,
    gate: Mutex<()>,
    opened: Condvar,
    /// Wakes the engine's thread out of its sleep.
    nudge: Mutex<Option<Box<dyn Fn() + Send>>>,
}

impl EngineCell {
    /// A cell around an engine.
    #[must_use]
    pub fn new(engine: Engine) -> Arc<Self> {
        Arc::new(Self {
            engine: Mutex::new(engine),
            wanted: AtomicU32::new(0),
            inline: AtomicBool::new(false),
            gate: Mutex::new(()),
            opened: Condvar::new(),
            nudge: Mutex::new(None),
        })
    }

    pub(crate) fn set_nudge(&self, nudge: Box<dyn Fn() + Send>) {
        *self.nudge.lock().unwrap_or_else(PoisonError::into_inner) = Some(nudge);
    }

    /// Wakes the engine's thread, if there is one.
    pub fn nudge(&self) {
        if let Some(f) = &*self.nudge.lock().unwrap_or_else(PoisonError::into_inner) {
            f();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Engine> {
        // A panic inside the engine is a bug that tests must find; the device goes on for the other users.
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` with the engine stopped between two turns. Must not be called by the driver itself.
    pub fn control<R>(&self, f: impl FnOnce(&mut Engine) -> R) -> R {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let mut engine = self.lock();
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        let result = f(&mut engine);
        let dozing = engine.is_dozing();
        drop(engine);
        if dozing {
            // It may have become able to work, or a timer may have started.
            self.nudge();
        }
        result
    }

    /// Starts to drive. Waits until control and the previous driver let go.
    #[must_use]
    pub fn driver(&self) -> Driver<'_> {
        Driver {
            cell: self,
            engine: Some(self.lock()),
        }
    }

    /// Takes the engine from its thread, until the guard is dropped.
    #[must_use]
    pub fn drive_inline(&self) -> Inline<'_> {
        while self.inline.swap(true, Ordering::SeqCst) {
            std::thread::yield_now();
        }
        self.nudge();
        let mut driver = {
            self.wanted.fetch_add(1, Ordering::SeqCst);
            let d = self.driver();
            self.wanted.fetch_sub(1, Ordering::SeqCst);
            d
        };
        driver.wake_up();
        Inline {
            driver: Some(driver),
        }
    }

    /// For the engine's thread: blocks while somebody drives inline.
    pub(crate) fn wait_for_turn(&self) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        while self.inline.load(Ordering::SeqCst) {
            gate = self
                .opened
                .wait(gate)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn is_inline(&self) -> bool {
        self.inline.load(Ordering::Relaxed)
    }
}

/// The one that polls.
pub struct Driver<'a> {
    cell: &'a EngineCell,
    engine: Option<MutexGuard<'a, Engine>>,
}

impl Driver<'_> {
    /// One turn of the engine; lets control in when it waits.
    #[inline]
    pub fn poll(&mut self) -> usize {
        if self.cell.wanted.load(Ordering::Relaxed) != 0 {
            self.step_aside();
        }
        self.engine().poll()
    }

    /// The engine.
    #[inline]
    pub fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().expect("held except inside step_aside")
    }

    fn wake_up(&mut self) {
        if self.engine().is_dozing() {
            self.engine().wake_up();
        }
    }

    #[cold]
    fn step_aside(&mut self) {
        self.engine = None;
        while self.cell.wanted.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
        self.engine = Some(self.cell.lock());
    }
}

/// Inline driving; gives the engine back to its thread when dropped.
pub struct Inline<'a> {
    driver: Option<Driver<'a>>,
}

impl<'a> Inline<'a> {
    /// The driver.
    #[inline]
    pub fn driver(&mut self) -> &mut Driver<'a> {
        self.driver.as_mut().expect("held until drop")
    }
}

impl Drop for Inline<'_> {
    fn drop(&mut self) {
        let Some(driver) = self.driver.take() else {
            return;
        };
        let cell = driver.cell;
        drop(driver);
        let _gate = cell.gate.lock().unwrap_or_else(PoisonError::into_inner);
        cell.inline.store(false, Ordering::SeqCst);
        cell.opened.notify_all();
    }
}
