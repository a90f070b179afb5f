//! Many operations in flight, many in one request, and reads without the server's CPU.

#[path = "../tests/common/mod.rs"]
mod common;

use kvstore::client::{ClientError, MultiResult, Operation};
use kvstore::proto::{Element, MultiOp, Reply};

const OBJECTS: u32 = 1_000;

fn main() -> Result<(), ClientError> {
    let host = common::Host::new();
    let _server = host.serve_usual();
    let mut client = host.client();

    // Submit until the window is full, take completions, go on. Tickets tell them apart.
    let mut of_ticket = [0u32; 16];
    let (mut next, mut done) = (0, 0);
    while done < OBJECTS {
        while next < OBJECTS {
            let value = next.wrapping_mul(next).to_le_bytes();
            match client.submit(&Operation::put(&next.to_le_bytes(), &value)) {
                Ok(ticket) => {
                    of_ticket[usize::from(ticket)] = next;
                    next += 1;
                }
                Err(ClientError::WindowFull) => break,
                Err(e) => return Err(e),
            }
        }
        let mut failed = None;
        done += client.wait(|ticket, reply| {
            if let Err(e) = reply {
                failed = Some((of_ticket[usize::from(ticket)], e));
            }
        })? as u32;
        assert!(failed.is_none(), "{failed:?}");
    }

    // As many in one request.
    let keys: Vec<_> = (0..OBJECTS).map(u32::to_le_bytes).collect();
    let elements: Vec<_> = keys.iter().map(|key| Element::new(0, key)).collect();
    let results = client.multi(MultiOp::Read, &elements)?;
    for (i, result) in (0..OBJECTS).zip(results) {
        let MultiResult::Value { value, .. } = result? else {
            panic!("a read gives a value");
        };
        assert_eq!(value, i.wrapping_mul(i).to_le_bytes());
    }

    // Polled, not waited for: what a loop does that has other work, too. The first finds the way by the hash table, the second by
    // what is known from the first.
    client.prepare_one_sided()?;
    for _ in 0..2 {
        for key in &keys {
            let ticket = client.submit_one_sided(0, key)?;
            let mut found = false;
            while client.outstanding() > 0 {
                client.poll(|t, reply| {
                    found = t == ticket && matches!(reply, Ok(Reply::Value { .. }));
                })?;
            }
            assert!(found);
        }
    }
    println!("{:?}", client.one_sided_counters());
    client.close()
}

#[test]
fn the_pipeline_ends_well() {
    main().unwrap();
}
