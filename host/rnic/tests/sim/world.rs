//! Hosts and their users on one clock, and how time passes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hyv_abi::types::{Access, QpType};
use hyv_rnic::{Engine, EngineConfig};
use hyv_roce::carrier::Gid;

use crate::common::net::v4;
use crate::common::{Clock, Cq, FULL, Mr, Ring, Rng, Srq, User};
use crate::memory::{GUARD, Memory};
use crate::net::{Port, SharedNet};
use crate::plan::Plan;

/// Looks of an engine without work after which nothing is left to find: it reads doorbell summaries every eighth.
const IDLE_LOOKS: u32 = 9;
/// RAM of a user: pages appear when they are touched.
const RAM: u64 = 64 << 20;
/// SGEs of a receive are as many as fit.
pub const STRIDE: u32 = 64;

pub struct Host {
    pub engine: Engine,
    pub gid: Gid,
    /// When it wants to be woken, while it sleeps.
    wake_at: Option<u64>,
    kicked: bool,
    /// Looks without work since it last did any.
    idle: u32,
}

impl Host {
    /// It starts anew.
    pub fn renew(&mut self, engine: Engine) {
        self.engine = engine;
        (self.wake_at, self.kicked, self.idle) = (None, false, 0);
    }
}

/// A receive that is posted.
pub struct Receive {
    pub id: u64,
    pub pieces: Vec<(u64, u32)>,
    pub cell: usize,
}

/// A region cut into cells, each for one work request at a time.
pub struct Pool {
    pub mr: Mr,
    pub mem: Memory,
    pub cell: u64,
    pub free: Vec<usize>,
    /// It is deregistered.
    pub dead: bool,
}

impl Pool {
    /// Where a cell begins in RAM.
    pub fn at(&self, cell: usize) -> u64 {
        self.mr.offset + self.cell * cell as u64
    }

    pub fn take(&mut self) -> Option<usize> {
        if self.dead { None } else { self.free.pop() }
    }

    pub fn give(&mut self, cell: usize) {
        // The oldest is used next, so that each is left alone for a while.
        self.free.insert(0, cell);
    }

    /// Bytes of RAM as a piece of the region.
    pub fn sge(&self, at: u64, len: u32) -> hyv_abi::queue::Sge {
        self.mr.sge(at - self.mr.offset, len)
    }
}

/// A user of a host's device.
pub struct Person {
    pub host: usize,
    pub user: User,
    pub pd: u32,
    pub cqs: Vec<Cq>,
    pub srq: Option<Srq>,
    pub srq_pool: Option<Pool>,
    pub srq_posted: Vec<Receive>,
    /// Words that many add to.
    pub words: Pool,
    pub added: [Added; 4],
    /// All of its RAM when it went.
    pub gone: Option<Vec<u8>>,
}

/// What happened to a word that is only added 1 to.
#[derive(Clone, Default)]
pub struct Added {
    pub first: u64,
    pub sure: u64,
    pub perhaps: u64,
    pub seen: Vec<u64>,
}

pub struct World {
    pub plan: Plan,
    pub rng: Rng,
    pub clock: Clock,
    pub net: SharedNet,
    pub hosts: Vec<Host>,
    pub people: Vec<Person>,
    pub trace: bool,
    pub next_id: u64,
}

pub fn engine(net: &SharedNet, clock: &Clock, gid: Gid, plan: &Plan) -> Engine {
    let time = Arc::clone(&clock.0);
    Engine::new(EngineConfig {
        clock: Box::new(move || time.load(Ordering::SeqCst)),
        gid: [0; 16],
        node_guid: u64::from(gid[15]),
        carrier: Some(Box::new(Port {
            net: net.clone(),
            gid,
            burst: plan.burst,
            cheap: plan.cheap,
        })),
        mad_bell: Box::new(|| {}),
    })
}

impl World {
    pub fn new(seed: u64, plan: Plan, trace: bool) -> Self {
        let clock = Clock(Arc::new(1_000_000.into()));
        let net = SharedNet::new(seed ^ 0x6e65_7477, &clock);
        {
            let mut n = net.lock();
            (n.delay, n.per_byte, n.trace) = (plan.delay, plan.per_byte, trace);
        }
        let hosts = (0..plan.hosts)
            .map(|h| {
                let gid = v4(h as u8 + 1);
                Host {
                    engine: engine(&net, &clock, gid, &plan),
                    gid,
                    wake_at: None,
                    kicked: false,
                    idle: 0,
                }
            })
            .collect();
        let mut world = Self {
            rng: Rng(seed ^ 0x776f_726c),
            clock,
            net,
            hosts,
            people: Vec::new(),
            trace,
            next_id: 1,
            plan,
        };
        for h in 0..world.plan.hosts {
            for _ in 0..world.plan.users {
                let person = world.person(h);
                world.people.push(person);
            }
        }
        world
    }

    /// A new user of a host.
    pub fn person(&mut self, host: usize) -> Person {
        let e = &mut self.hosts[host].engine;
        let mut user = User::new(e, RAM);
        let pd = user.pd(e);
        let mut words = pool(
            e,
            &mut user,
            pd,
            &mut self.rng,
            (64, 1),
            format!("host {host}'s words"),
        );
        let mut added: [Added; 4] = Default::default();
        for (i, a) in added.iter_mut().enumerate() {
            // Near the wrap, too.
            a.first = self.rng.next() | u64::MAX << 4;
            words
                .mem
                .put(words.mr.offset + 8 * i as u64, &a.first.to_le_bytes());
        }
        words.mem.lend(words.mr.offset, 32);
        Person {
            host,
            user,
            pd,
            cqs: Vec::new(),
            srq: None,
            srq_pool: None,
            srq_posted: Vec::new(),
            words,
            added,
            gone: None,
        }
    }

    pub fn now(&self) -> u64 {
        self.clock.0.load(Ordering::SeqCst)
    }

    /// A doorbell was rung.
    pub fn rang(&mut self, host: usize, ring: Ring) {
        self.hosts[host].kicked |= ring == Ring::Kick;
    }

    /// A turn of every engine that is awake, or has reason to be. Gives how much moved, and whether more looks are due.
    fn turn(&mut self) -> (usize, bool) {
        let now = self.now();
        let n = self.hosts.len();
        let first = self.rng.below(n as u64) as usize;
        let (mut moved, mut more) = (0, false);
        for i in 0..n {
            let host = &mut self.hosts[(first + i) % n];
            if host.engine.is_dozing() {
                let packet = self.net.lock().next(&host.gid).is_some_and(|at| at <= now);
                if !packet && !host.kicked && host.wake_at.is_none_or(|at| now < at) {
                    continue;
                }
                host.engine.wake_up();
                host.engine.tick();
                (host.kicked, host.idle) = (false, 0);
            }
            match host.engine.poll() {
                0 => host.idle += 1,
                n => {
                    host.idle = 0;
                    moved += n;
                }
            }
            if host.idle < IDLE_LOOKS {
                more = true;
            } else if host.engine.doze() {
                host.wake_at = host.engine.next_timer_ns().map(|t| now + t);
            }
        }
        (moved, more)
    }

    /// Lets so much time pass, ns, or a little more.
    pub fn pass(&mut self, ns: u64) {
        let until = self.now() + ns;
        let mut turns = 0u64;
        loop {
            for host in &mut self.hosts {
                host.idle = 0;
            }
            loop {
                turns += 1;
                assert!(turns < 4_000_000, "the engines never come to rest");
                let (moved, more) = self.turn();
                if moved > 0 {
                    self.clock.advance(100);
                }
                if !more || self.now() >= until && turns > 64 {
                    break;
                }
            }
            let now = self.now();
            if now >= until {
                return;
            }
            let mut next = until;
            for host in &self.hosts {
                // One that will not sleep waits for something that is due in a moment.
                let soon = (!host.engine.is_dozing()).then_some(now + 1_000);
                let packet = self.net.lock().next(&host.gid);
                let wake = host.wake_at.filter(|_| host.engine.is_dozing());
                for at in [soon, packet, wake].into_iter().flatten() {
                    next = next.min(at);
                }
            }
            self.clock.advance(next.max(now + 1) - now);
        }
    }

    pub fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

/// A region of `cells.1` cells of `cells.0` bytes with everything allowed.
pub fn pool(
    e: &mut Engine,
    user: &mut User,
    pd: u32,
    rng: &mut Rng,
    cells: (u64, usize),
    name: String,
) -> Pool {
    user.alloc(GUARD);
    let mr = user.mr(e, pd, cells.0 * cells.1 as u64, FULL | Access::MW_BIND);
    user.alloc(GUARD);
    Pool {
        mem: Memory::new(&user.ram, mr.offset, mr.len, rng, name),
        mr,
        cell: cells.0,
        free: (0..cells.1).collect(),
        dead: false,
    }
}

/// Whether what is sent arrives or an error says that it did not.
pub fn reliable(ty: QpType) -> bool {
    ty == QpType::Rc
}
