//! What the server does when it is time: asks for signs of life, gives clients up, keeps their results. Its clock is the test's, which drives
//! the server by hand; so seconds pass at once, and a server can stand still.
#![allow(
    unsafe_code,
    reason = "a platform of its own: a process with another clock"
)]

mod common;

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Host, PATIENCE, Raw, config, memory_for, served};
use hyv_verbs::{Context, HostGone, Platform, Process};
use kvstore::proto::{Hello, Reply, Request};
use kvstore::server::limits::{
    KEEPALIVE_NS, KEEPALIVES_PER_ROUND, LEASE_LEFT_NS, LEASE_NS, MAINTENANCE_NS, MAX_SLEEP_NS,
    STUCK_NS,
};
use kvstore::server::{Server, ServerConfig};

const SECOND: u64 = 1_000_000_000;

/// A process whose clock stands still until it is told to go on.
struct Timed {
    process: Arc<Process>,
    now: Arc<AtomicU64>,
}

// SAFETY: all but the time is the process's.
unsafe impl Platform for Timed {
    fn window(&self) -> &hyv_abi::window::Window {
        self.process.window()
    }

    fn ram_offset(&self, ptr: *const u8, len: usize) -> Option<u64> {
        self.process.ram_offset(ptr, len)
    }

    fn alloc_dma(&self, layout: Layout) -> Option<NonNull<u8>> {
        self.process.alloc_dma(layout)
    }

    unsafe fn free_dma(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: as the caller vouches.
        unsafe { self.process.free_dma(ptr, layout) }
    }

    fn kick(&self, vector: u32) {
        self.process.kick(vector);
    }

    fn relax(&self) -> Result<(), HostGone> {
        self.process.relax()
    }

    fn wake_seen(&self) -> u64 {
        self.process.wake_seen()
    }

    fn wait(&self, seen: u64, timeout_ns: Option<u64>) -> Result<(), HostGone> {
        self.process.wait(seen, timeout_ns)
    }

    fn now_ns(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }
}

/// A server with a clock of the test's, and a device for its clients.
struct Scene {
    server: Server,
    users: Context,
    now: Arc<AtomicU64>,
    _host: Host,
}

impl Scene {
    fn new() -> Self {
        let host = Host::new();
        let config = ServerConfig {
            max_connections: 256,
            ..config()
        };
        let now = Arc::new(AtomicU64::new(1));
        let platform = Timed {
            process: host.process("server", memory_for(&config)),
            now: Arc::clone(&now),
        };
        let context = Context::open(Arc::new(platform)).unwrap();
        Self {
            server: Server::new(&context, config).unwrap(),
            users: host.user("clients", 64 << 20),
            now,
            _host: host,
        }
    }

    /// A client with one receive: its second reply waits until it has taken the first.
    fn client(&mut self, lease: bool, client: u64) -> Raw {
        let hello = Hello { lease, client }.to_bytes();
        let users = &self.users;
        served(&mut self.server, || Raw::connect(users, &hello, 1).unwrap())
    }

    /// A round of maintenance, so long after the last one.
    fn round(&mut self, after: u64) {
        self.now.fetch_add(after, Ordering::Relaxed);
        while self.server.poll() > 0 {}
        self.server.poll_connections().unwrap();
        self.server.flush();
        self.server.poll();
    }

    /// Work requests of the server that are done.
    fn done(&self) -> u64 {
        self.server.context().counters().unwrap().work_requests
    }

    /// Waits until so many are done, and takes their completions.
    fn until_done(&mut self, count: u64) {
        let start = std::time::Instant::now();
        while self.done() < count {
            assert!(start.elapsed() < PATIENCE, "{} of {count}", self.done());
            std::thread::yield_now();
        }
        assert_eq!(self.done(), count, "more than were to be asked");
        while self.server.poll() > 0 {}
    }

    /// A ping that is answered.
    fn ping(&mut self, client: &mut Raw) {
        client.request(1, &Request::Ping);
        assert_pong(&served(&mut self.server, || client.reply()));
    }

    /// A client with one reply that it has not taken and another one that waits behind it.
    fn with_a_reply_under_way(&mut self) -> Raw {
        let mut client = self.client(false, 0);
        for _ in 0..2 {
            client.request(1, &Request::Ping);
        }
        let before = self.server.counters().others;
        let start = std::time::Instant::now();
        while self.server.counters().others < before + 2 {
            assert!(start.elapsed() < PATIENCE, "two requests arrive");
            self.server.poll();
        }
        client
    }
}

fn assert_pong(reply: &Option<(u32, Vec<u8>)>) {
    let (imm, bytes) = reply.as_ref().expect("the connection stands");
    assert!(matches!(Reply::parse(*imm, bytes), Ok((1, Reply::Empty))));
}

#[test]
fn a_round_asks_some_for_a_sign_of_life_and_the_next_ones_the_others() {
    const CLIENTS: u64 = 200;
    const EACH: u64 = KEEPALIVES_PER_ROUND as u64;
    let mut scene = Scene::new();
    let _clients: Vec<Raw> = (0..CLIENTS).map(|_| scene.client(false, 0)).collect();
    scene.round(0);
    let begun = scene.done();
    for sweep in 0..3 {
        scene.round(KEEPALIVE_NS);
        let mut asked = begun + sweep * CLIENTS;
        for _ in 0..CLIENTS / EACH {
            asked += EACH;
            scene.until_done(asked);
            scene.round(MAINTENANCE_NS);
        }
        // Each has been asked once, and that is enough for now.
        scene.until_done(begun + (sweep + 1) * CLIENTS);
        for _ in 0..10 {
            scene.round(MAX_SLEEP_NS);
        }
        scene.until_done(begun + (sweep + 1) * CLIENTS);
    }
    assert_eq!(scene.server.connected() as u64, CLIENTS);
}

#[test]
fn everybody_has_a_turn_however_late_the_rounds_come() {
    let mut scene = Scene::new();
    let mut clients: Vec<Raw> = (0..200).map(|_| scene.client(false, 0)).collect();
    // The last one is gone without a word: only who asks it learns that.
    clients[199].qp.to_err().unwrap();
    scene.round(SECOND);
    let mut asked = scene.done();
    for round in 0.. {
        assert!(round < 100, "nobody has asked it");
        scene.round(SECOND);
        if scene.server.connected() < 200 {
            break;
        }
        // From the second round on there are always enough silent ones. One does not answer.
        asked += KEEPALIVES_PER_ROUND as u64;
        common::eventually("the others answer", || scene.done() + 1 >= asked);
    }
    assert_eq!(scene.server.connected(), 199);
    assert!(clients[199].ended());
}

#[test]
fn time_in_which_the_server_stood_still_does_not_count_against_a_client() {
    let mut scene = Scene::new();
    let mut client = scene.with_a_reply_under_way();
    scene.round(MAINTENANCE_NS);
    for _ in 0..3 {
        scene.round(STUCK_NS + SECOND);
        scene.round(MAINTENANCE_NS);
    }
    assert_eq!(scene.server.connected(), 1);
    assert_eq!(scene.server.counters().expelled, 0);
    for _ in 0..2 {
        assert_pong(&client.reply());
    }
    scene.ping(&mut client);
}

#[test]
fn who_takes_no_replies_while_the_server_runs_is_given_up() {
    for step in [MAINTENANCE_NS, MAX_SLEEP_NS] {
        let mut scene = Scene::new();
        let client = scene.with_a_reply_under_way();
        let rounds = |ns: u64| 0..ns / step;
        for _ in rounds(STUCK_NS - SECOND) {
            scene.round(step);
        }
        assert_eq!(scene.server.connected(), 1, "it has time");
        for _ in rounds(2 * SECOND) {
            scene.round(step);
        }
        assert_eq!(scene.server.connected(), 0);
        assert_eq!(scene.server.counters().expelled, 1);
        common::eventually("it is told", || client.ended());
    }
}

#[test]
fn results_are_kept_as_long_as_promised_after_a_client_was_given_up() {
    let mut scene = Scene::new();
    let mut client = scene.client(true, 0);
    let id = client.welcome.client;
    // It is heard for the last time long before its lease is due to be renewed, and found gone after that.
    const PINGS: u64 = 12;
    let alive = LEASE_NS / 2 - 2 * KEEPALIVE_NS - SECOND / 4;
    for _ in 0..PINGS {
        scene.round(alive / PINGS);
        scene.ping(&mut client);
    }
    // The last reply is known to be taken: replies, and as many WRITEs that asked.
    scene.round(MAINTENANCE_NS);
    scene.until_done(2 * PINGS);
    client.qp.to_err().unwrap();
    let mut rounds = 0;
    while scene.server.connected() == 1 {
        assert!(rounds < 200, "it is not given up");
        scene.round(MAX_SLEEP_NS);
        rounds += 1;
    }
    scene.round(LEASE_LEFT_NS - MAX_SLEEP_NS);
    let again = scene.client(true, id);
    assert!(again.welcome.known, "its results are forgotten");
    assert_eq!(again.welcome.client, id);
}
