//! Many clients of one store, in a few processes as far as the device can tell.

use std::path::Path;

use hyv_e2e::{PATIENCE, eventually};
use hyv_verbs::{Context, Gid, Process};
use kvstore::client::{Client, ClientConfig, ClientError, Operation};
use kvstore::proto::Reply;
use kvstore::store::{DEFAULT_TABLE, Increment};

const PORT: u16 = 7070;
/// Processes that they are in, as far as the device can tell.
const PROCESSES: usize = 10;
/// Memory of one of those: rings and buffers of a hundred clients take some 30 MiB.
const PROCESS_RAM: u64 = 128 << 20;

/// Many clients, before the devices that they use.
struct Crowd {
    clients: Vec<Client>,
    _contexts: Vec<Context>,
}

impl Crowd {
    /// Connects `size` of them, by the device of the instance at `dir`.
    fn gather(dir: &Path, store: Gid, size: usize) -> Self {
        let config = ClientConfig {
            timeout: PATIENCE,
            // A machine that stands still for a second loses connections over a network.
            reconnect: Some(PATIENCE),
            ..ClientConfig::default()
        };
        let contexts: Vec<Context> = (0..PROCESSES)
            .map(|_| {
                let process = Process::connect(dir, PROCESS_RAM, "crowd").expect("a session");
                Context::open(process).expect("a device")
            })
            .collect();
        let clients = (0..size)
            .map(|i| {
                Client::connect_with(&contexts[i % PROCESSES], store, PORT, config)
                    .unwrap_or_else(|e| panic!("client {i}: {e}"))
            })
            .collect();
        Self {
            clients,
            _contexts: contexts,
        }
    }

    /// Each client does something.
    fn all<T>(&mut self, mut what: impl FnMut(usize, &mut Client) -> Result<T, ClientError>) {
        for (i, client) in self.clients.iter_mut().enumerate() {
            what(i, client).unwrap_or_else(|e| panic!("client {i}: {e}"));
        }
    }

    /// Each gets so many replies.
    fn answered(&mut self, count: usize, check: impl Fn(usize, &Reply<'_>)) {
        self.all(|i, client| {
            let mut seen = 0;
            while client.outstanding() > 0 {
                client.wait(|_, reply| {
                    check(i, &reply.unwrap_or_else(|e| panic!("client {i}: {e}")));
                    seen += 1;
                })?;
            }
            assert_eq!(seen, count, "client {i}");
            Ok(())
        });
    }

    /// All ask at once, and all get what they asked for.
    fn work(&mut self, round: usize) {
        let value = |i: usize| vec![(i * 7 + round) as u8; 100];
        let key = |i: usize| format!("client {i}").into_bytes();
        // Two requests of each under way: all that a server allows clients when there are many.
        self.all(|i, client| {
            let (key, value) = (key(i), value(i));
            client.submit(&Operation::put(&key, &value))?;
            client.submit(&Operation::get(&key))
        });
        self.answered(2, |i, reply| match reply {
            Reply::Version(_) => {}
            Reply::Value { value: got, .. } => assert_eq!(*got, value(i), "client {i}"),
            other => panic!("client {i}: {other:?}"),
        });
        self.all(|_, client| {
            let one = Increment::I64(1);
            client.submit(&Operation::increment(DEFAULT_TABLE, b"all", one))
        });
        self.answered(1, |i, reply| {
            assert!(
                matches!(reply, Reply::Incremented { .. }),
                "client {i}: {reply:?}"
            );
        });
        self.all(|i, client| {
            let found = client.read_one_sided(DEFAULT_TABLE, &key(i))?;
            assert_eq!(found.expect("it is there").value, value(i), "client {i}");
            Ok(())
        });
    }
}

/// A crowd of `size` comes, works, and leaves, twice; `count` gives a counter of the server, over a connection of its own. Gives the bytes that
/// the server registered for each.
///
/// # Panics
/// When one of them does not get what it asks for.
pub fn come_and_go(dir: &Path, store: Gid, size: usize, count: impl Fn(&str) -> u64) -> u64 {
    let mut crowd = Crowd::gather(dir, store, size);
    let all = size as u64;
    // And the one that asks.
    eventually("they are all connected", || {
        crowd.all(|_, client| client.ping());
        count("connections") == all + 1
    });
    // Those of commands that have ended stay for a while.
    assert!(count("leases") > all);
    for round in 1..=3 {
        crowd.work(round);
        let sum = crowd.clients[round]
            .increment(DEFAULT_TABLE, b"all", Increment::I64(0))
            .expect("the sum");
        assert_eq!(sum.value, Increment::I64((round * size) as i64));
    }
    let bytes = count("connection_bytes");
    assert_eq!(count("objects"), all + 1);
    let lost: u64 = crowd.clients.iter().map(Client::reconnects).sum();
    eprintln!("{lost} connections of {size} clients were lost and made anew");
    // Half of them without a word.
    let left = crowd.clients.split_off(size / 2);
    left.into_iter()
        .for_each(|client| client.close().expect("a farewell"));
    drop(crowd);
    eventually("they are all gone", || count("connections") == 1);
    assert_eq!(count("connection_bytes"), bytes, "kept for the next ones");
    let mut crowd = Crowd::gather(dir, store, size);
    crowd.work(4);
    assert_eq!(count("connection_bytes"), bytes);
    bytes / all
}
