//! What is long is done in slices: small requests are served between those of a write of 1 MiB, of the cleaner's move of such an object,
//! and of the cleaning that a write waits for. The server is driven by hand, turn by turn, so what is counted is work, not time.

mod common;

use common::{Host, PATIENCE, Raw, config, served};
use kvstore::client::{Client, Operation};
use kvstore::limits::{LARGE_MOVE_BYTES, MAX_VALUE_BYTES};
use kvstore::proto::{Key, Reply, Request};
use kvstore::server::limits::{CLEAN_SLICE, SUM_SLICE};
use kvstore::server::{Server, ServerConfig};
use kvstore::store::{CleanerMode, DEFAULT_TABLE, RejectRules, hash64};

const SMALL: &[u8] = b"small";

/// Turns of the server until `so`.
fn turns_until(server: &mut Server, what: &str, mut so: impl FnMut(&mut Server, usize) -> bool) {
    let start = std::time::Instant::now();
    loop {
        let handled = server.poll();
        if so(server, handled) {
            return;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
    }
}

/// A server, a client of large objects and one of small requests.
struct Scene {
    // Clients before the host that they are users of.
    large: Client,
    small: Raw,
    server: Server,
    _host: Host,
}

impl Scene {
    fn new(store_bytes: usize) -> Self {
        let host = Host::new();
        let mut server = host.server(ServerConfig {
            store_bytes,
            ..config()
        });
        let (large, small) = served(&mut server, || {
            let mut large = host.client();
            large.put(SMALL, b"value").unwrap();
            (large, Raw::new(&host.user("small", 16 << 20)))
        });
        Self {
            large,
            small,
            server,
            _host: host,
        }
    }

    /// One small request which lies with the server when its turn begins, and has its reply after that one turn.
    fn small_request_in_one_turn(&mut self) {
        self.small.request(
            7,
            &Request::Read {
                table: DEFAULT_TABLE,
                key: Key::Inline(SMALL),
                rules: RejectRules::NONE,
                buffer: None,
            },
        );
        self.small.delivered();
        let gets = self.server.counters().gets;
        self.server.poll();
        assert_eq!(self.server.counters().gets, gets + 1, "served in this turn");
        let (imm, bytes) = self.small.reply().expect("a reply");
        let (tag, reply) = Reply::parse(imm, &bytes).unwrap();
        assert!(
            tag == 7
                && matches!(
                    reply,
                    Reply::Value {
                        value: b"value",
                        ..
                    }
                ),
            "{reply:?}"
        );
    }

    fn put(&mut self, key: &[u8], value: &[u8]) {
        let large = &mut self.large;
        served(&mut self.server, || large.put(key, value).unwrap());
    }
}

/// A value that no other `salt` gives.
fn value(salt: u32) -> Vec<u8> {
    (0..MAX_VALUE_BYTES as u32)
        .map(|i| (i ^ i >> 8 ^ salt.wrapping_mul(0x9e37)) as u8)
        .collect()
}

#[test]
fn small_requests_are_served_between_the_slices_of_a_large_write() {
    for round in 0..3 {
        // A new one each time: no replies yet that the device says are done, which would be counted below.
        let mut scene = Scene::new(32 << 20);
        let value = value(round);
        scene
            .large
            .submit(&Operation::put(b"large", &value))
            .unwrap();
        let puts = scene.server.counters().puts;
        // The request, and the READ of its value: with that, in the same turn, the first slice of it is summed.
        let mut handled = 0;
        turns_until(&mut scene.server, "the value has arrived", |_, n| {
            handled += n;
            handled == 2
        });
        let mut between = 0;
        while scene.server.counters().puts == puts {
            scene.small_request_in_one_turn();
            between += 1;
        }
        // The first slice was summed before, and the write is there in the turn that sums the last.
        let slices = MAX_VALUE_BYTES.div_ceil(SUM_SLICE);
        assert_eq!(between, slices - 1, "of {slices} slices");
        let large = &mut scene.large;
        served(&mut scene.server, || {
            while large.outstanding() > 0 {
                large
                    .wait(|_, reply| assert!(reply.is_ok(), "{reply:?}"))
                    .unwrap();
            }
            assert!(large.get(b"large").unwrap().unwrap().value == value);
        });
        scene.server.store().audit().unwrap();
    }
}

#[test]
fn small_requests_are_served_while_the_cleaner_moves_large_objects() {
    const OBJECTS: u32 = 8;
    let mut scene = Scene::new(64 << 20);
    for i in 0..OBJECTS {
        scene.put(&i.to_le_bytes(), &value(i));
    }
    let large = &mut scene.large;
    served(&mut scene.server, || {
        large.set_cleaner(CleanerMode::Always).unwrap();
    });
    let moved = |server: &Server| server.store().stats().cleaner.bytes_moved;
    let before = moved(&scene.server);
    let (mut between, mut last) = (0u64, before);
    // Twice what there is.
    let enough = u64::from(2 * OBJECTS) * MAX_VALUE_BYTES as u64;
    let mut idle = 0;
    while last - before < enough {
        scene.small_request_in_one_turn();
        scene.server.clean();
        let now = moved(&scene.server);
        // A slice, and an entry that is short enough to be moved in one go.
        let most = (CLEAN_SLICE + LARGE_MOVE_BYTES) as u64;
        assert!(now - last <= most, "{} bytes in one slice", now - last);
        between += 1;
        // Memory that was freed rests a while before it is used again.
        idle = if now == last { idle + 1 } else { 0 };
        if idle > 100 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(idle < 20_000, "the cleaner stands still");
        last = now;
    }
    let least = enough / (CLEAN_SLICE + LARGE_MOVE_BYTES) as u64;
    assert!(
        between >= least,
        "{between} requests while {enough} bytes were moved"
    );
    let large = &mut scene.large;
    served(&mut scene.server, || {
        for i in 0..OBJECTS {
            let found = large.get(&i.to_le_bytes()).unwrap().unwrap();
            assert!(found.value == value(i), "object {i}");
        }
    });
    scene.server.store().audit().unwrap();
}

/// A store that is nearly full, of objects that the cleaner moves in parts: a write must wait until it has moved some.
#[test]
fn small_requests_are_served_while_a_large_write_waits_for_the_cleaner() {
    const LEN: usize = 3 * LARGE_MOVE_BYTES;
    let mut scene = Scene::new(48 << 20);
    let mut objects = 0u32;
    while scene.server.store().stats().bytes.live < scene.server.store().capacity() * 80 / 100 {
        scene.put(&objects.to_le_bytes(), &value(objects)[..LEN]);
        objects += 1;
    }
    let moved = |server: &Server| server.store().stats().cleaner.bytes_moved;
    let before = moved(&scene.server);
    let (mut between, mut written) = (0u64, 0u32);
    // Until the cleaner had to move as much as several segments hold.
    while moved(&scene.server) - before < 16 * MAX_VALUE_BYTES as u64 {
        // Not in order, which would leave segments that are all dead.
        let i = hash64(1, &written.to_le_bytes()) as u32 % objects;
        scene
            .large
            .submit(&Operation::put(&i.to_le_bytes(), &value(i)[..LEN]))
            .unwrap();
        let mut left = true;
        let mut turns = 0;
        while left {
            let last = moved(&scene.server);
            scene.small_request_in_one_turn();
            scene.server.clean();
            // The write itself may clean a slice, and so may the turn.
            let most = 3 * (CLEAN_SLICE + LARGE_MOVE_BYTES) as u64;
            let slice = moved(&scene.server) - last;
            assert!(slice <= most, "{slice} bytes in one turn");
            between += 1;
            scene
                .large
                .poll(|_, reply| {
                    assert!(reply.is_ok(), "{reply:?}");
                    left = false;
                })
                .unwrap();
            turns += 1;
            if turns > 1000 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            assert!(turns < 20_000, "write {written} is not answered");
        }
        written += 1;
    }
    println!("{between} small requests beside {written} large writes");
    scene.server.store().audit().unwrap();
}
