//! What the store does for a program that asks one thing at a time.
//!
//! It brings its own host and server. A program of its own has `Process::connect` (the folder of a running instance) and
//! `Context::open` in their place.

#[path = "../tests/common/mod.rs"]
mod common;

use kvstore::client::ClientError;
use kvstore::store::{Increment, RejectReason, RejectRules};

fn main() -> Result<(), ClientError> {
    let host = common::Host::new();
    let _server = host.serve_usual();
    let mut client = host.client();

    // Tables keep keys apart. Creating one that exists finds it.
    let (users, _) = client.create_table("users")?;
    let version = client.write(users, b"ada", b"countess")?;
    assert_eq!(
        client.read(users, b"ada")?.map(|o| o.value),
        Some(b"countess".to_vec())
    );
    assert_eq!(
        client.get(b"ada")?,
        None,
        "the default table has a key space of its own"
    );

    // Change only what has not changed meanwhile: read, decide, write with a rule.
    let unchanged = RejectRules::unless_version(version);
    let newer = client.write_if(users, b"ada", b"mathematician", unchanged, 0)?;
    match client.write_if(users, b"ada", b"poet", unchanged, 0) {
        Err(ClientError::Rejected {
            reason: RejectReason::Version,
            version,
        }) => assert_eq!(version, newer),
        other => panic!("the rule should have held: {other:?}"),
    }

    // Executed once, whatever happens to the connection: nobody has to look whether the first try got through.
    client.increment(users, b"logins", Increment::I64(1))?;
    client.reconnect();
    let logins = client.increment(users, b"logins", Increment::I64(1))?;
    assert_eq!(logins.value, Increment::I64(2));

    // Gone by itself, by the server's clock.
    let soon = client.server_time() + 20_000_000;
    client.write_if(users, b"session", b"token", RejectRules::NONE, soon)?;
    common::eventually("the session ends", || {
        client.read(users, b"session").unwrap().is_none()
    });

    // All of a table, in pages.
    let (mut keys, mut cursor) = (0, Some(0));
    while let Some(at) = cursor {
        let page = client.enumerate(users, at, 0)?;
        keys += page.objects.len();
        cursor = page.next;
    }
    assert_eq!(keys, 2);
    client.drop_table(users)?;
    // Gives the lease back, which a client that just ends keeps for a while.
    client.close()
}

#[test]
fn the_tour_ends_well() {
    main().unwrap();
}
