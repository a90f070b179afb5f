//! Two networks on one wire, a virtual clock, and faults.
#![allow(dead_code, reason = "each test file uses a part")]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use hyv_net::{Config, Net, Nic, Surroundings};

/// A small generator: xorshift64*.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub fn fill(&mut self, to: &mut [u8]) {
        for b in to {
            *b = (self.next() >> 56) as u8;
        }
    }
}

/// In a thousand frames, how many suffer what.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub lost: u64,
    pub doubled: u64,
    pub corrupted: u64,
    pub swapped: u64,
}

/// Frames that a side has room for: fewer than a window, so that a full queue is met too.
const ROOM: usize = 24;
/// How far the clock goes at one sleep at most.
const STEP_NS: u64 = 1_000_000;

/// The wire, the clock, and whoever acts while side 0 sleeps.
#[derive(Default)]
pub struct World {
    now_ns: Cell<u64>,
    to: [RefCell<VecDeque<Vec<u8>>>; 2],
    faults: Cell<Faults>,
    random: RefCell<Option<Random>>,
    actor: RefCell<Option<Box<dyn FnMut()>>>,
    pub sleeps: Cell<u64>,
    pub ending: Cell<bool>,
    /// Frames that side 1 sent, kept for replay.
    pub heard: RefCell<Vec<Vec<u8>>>,
}

impl World {
    pub fn new(seed: u64, faults: Faults) -> Rc<Self> {
        let world = Self::default();
        world.faults.set(faults);
        *world.random.borrow_mut() = Some(Random::new(seed));
        Rc::new(world)
    }

    pub fn now_ns(&self) -> u64 {
        self.now_ns.get()
    }

    pub fn heal(&self) {
        self.faults.set(Faults::default());
    }

    /// What happens whenever side 0 sleeps.
    pub fn act(&self, actor: impl FnMut() + 'static) {
        *self.actor.borrow_mut() = Some(Box::new(actor));
    }

    /// Puts a frame on the wire to `side`, as it is.
    pub fn inject(&self, side: usize, frame: &[u8]) {
        self.to[side].borrow_mut().push_back(frame.to_vec());
    }

    fn carry(&self, from: usize, frame: &[u8]) {
        if from == 1 {
            self.heard.borrow_mut().push(frame.to_vec());
        }
        let faults = self.faults.get();
        let mut random = self.random.borrow_mut();
        let random = random.as_mut().expect("made by `new`");
        let mut hit = |per_mille: u64| random.below(1000) < per_mille;
        let (lost, doubled, corrupted, swapped) = (
            hit(faults.lost),
            hit(faults.doubled),
            hit(faults.corrupted),
            hit(faults.swapped),
        );
        if lost {
            return;
        }
        let mut frame = frame.to_vec();
        if corrupted {
            let at = random.below(frame.len() as u64) as usize;
            frame[at] ^= 1 << random.below(8);
        }
        let mut queue = self.to[1 - from].borrow_mut();
        if doubled {
            queue.push_back(frame.clone());
        }
        let last = queue.len();
        queue.push_back(frame);
        if swapped && last > 0 {
            queue.swap(last, last - 1);
        }
    }

    /// The network of `side`, with addresses as on a command line.
    pub fn net(self: &Rc<Self>, side: usize, config: &str) -> Net {
        let config: Config = config.parse().expect("a good configuration");
        let nic = FakeNic {
            world: Rc::clone(self),
            side,
            mtu: 1500,
        };
        let around = FakeSurroundings {
            world: Rc::clone(self),
            side,
        };
        let seed = self.random.borrow_mut().as_mut().expect("made").next();
        Net::new(Box::new(nic), Rc::new(around), &config, seed).expect("a good card")
    }
}

struct FakeNic {
    world: Rc<World>,
    side: usize,
    mtu: u16,
}

impl Nic for FakeNic {
    fn mac(&self) -> [u8; 6] {
        [0x52, 0x54, 0, 0, 0, self.side as u8 + 1]
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn receive(&mut self, into: &mut [u8]) -> Option<usize> {
        let frame = self.world.to[self.side].borrow_mut().pop_front()?;
        into[..frame.len()].copy_from_slice(&frame);
        Some(frame.len())
    }

    fn can_send(&mut self) -> bool {
        self.world.to[1 - self.side].borrow().len() < ROOM
    }

    fn send(&mut self, frame: &[u8]) {
        assert!(
            frame.len() <= usize::from(self.mtu) + 14,
            "longer than the MTU"
        );
        self.world.carry(self.side, frame);
    }

    fn flush(&mut self) {}

    fn arm(&mut self) -> bool {
        self.can_send() && !self.world.to[self.side].borrow().is_empty()
    }

    fn disarm(&mut self) {}
}

struct FakeSurroundings {
    world: Rc<World>,
    side: usize,
}

impl Surroundings for FakeSurroundings {
    fn now_ns(&self) -> u64 {
        self.world.now_ns.get()
    }

    fn wake_seen(&self) -> u64 {
        0
    }

    fn wait(&self, _: u64, deadline_ns: u64) {
        assert_eq!(self.side, 0, "side 1 acts without waiting");
        let world = &self.world;
        world.sleeps.set(world.sleeps.get() + 1);
        let actor = world.actor.borrow_mut().take();
        if let Some(mut actor) = actor {
            actor();
            *world.actor.borrow_mut() = Some(actor);
        }
        // Time passes in any case, or two sides that keep each other busy would never come to a time limit.
        let step = if world.to[0].borrow().is_empty() {
            STEP_NS
        } else {
            STEP_NS / 100
        };
        let now = world.now_ns.get();
        world.now_ns.set(deadline_ns.clamp(now + 1, now + step));
    }

    fn spin_ns(&self) -> u64 {
        0
    }

    fn max_sleep_ns(&self) -> u64 {
        u64::MAX
    }

    fn ending(&self) -> bool {
        self.world.ending.get()
    }
}
