//! What a GET costs in software: client, engine and server in one thread, so that no cache line changes hands.
//! What a run beside another core costs more than this is the machine's own price for sharing.
//!
//!     cargo run --release -p kvstore-cli --example software_cost [ROUNDS [OPERATION ...]]

use std::time::Duration;

use hyv_host::backend::Quotas;
use hyv_host::instance::{Instance, InstanceConfig};
use hyv_host::sys::clock;
use hyv_verbs::{Context, Gid, Process};
use kvstore::client::Client;
use kvstore::server::{Server, ServerConfig};
use kvstore::store::DEFAULT_TABLE;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let instance = Instance::start(InstanceConfig {
        name: None,
        prefix: "software-cost".into(),
        engine_cpus: Vec::new(),
        spin: Duration::from_micros(50),
        wire: hyv_host::wire::WireConfig::default(),
        quotas: Quotas::default(),
    })?;
    let dir = instance.dir().path();
    let server_context = Context::open(Process::connect(dir, 96 << 20, "server")?)?;
    let client_context = Context::open(Process::connect(dir, 16 << 20, "client")?)?;
    let config = ServerConfig {
        port: 7070,
        store_bytes: 32 << 20,
        seed: 1,
        max_connections: 4,
        unix_ns: clock::realtime_ns(),
        one_sided: true,
    };
    let mut server = Server::new(&server_context, config)?;
    // The handshake needs both sides at once.
    let connecting = std::thread::spawn(move || {
        Client::connect(&client_context, Gid::LOCAL, 7070, Duration::from_secs(5))
    });
    while !connecting.is_finished() {
        server.poll();
        server.poll_connections()?;
    }
    let mut client = connecting.join().map_err(|_| "the client panicked")??;
    // A control verb, which whoever drives the engine cannot wait for.
    client.prepare_one_sided()?;
    let mut inline = instance.engine().drive_inline();
    let keys: Vec<Vec<u8>> = (0..1000)
        .map(|i| format!("bench:{i:016}").into_bytes())
        .collect();
    let value = [7u8; 100];
    while !client.is_one_sided() {
        inline.driver().poll();
        client.poll(|_, _| {})?;
    }
    let mut args = std::env::args().skip(1);
    let rounds: u32 = args.next().map_or(Ok(500_000), |n| n.parse())?;
    let wanted: Vec<String> = args.collect();
    for operation in ["PUT", "GET", "GET", "one-sided GET", "one-sided GET"] {
        if operation != "PUT" && !wanted.is_empty() && !wanted.iter().any(|w| w == operation) {
            continue;
        }
        let rounds = match operation {
            // Fills the store, if it is not what is looked at.
            "PUT" if !wanted.is_empty() => keys.len() as u32,
            _ => rounds,
        };
        let start = clock::tsc();
        for r in 0..rounds {
            let key = &keys[(r as usize * 7) % keys.len()];
            match operation {
                "PUT" => client.start_put(key, &value)?,
                "GET" => client.start_get(key)?,
                _ => client.submit_one_sided(DEFAULT_TABLE, key)?,
            };
            let mut done = 0;
            while done == 0 {
                inline.driver().poll();
                if !operation.starts_with("one-sided") {
                    server.poll();
                    inline.driver().poll();
                }
                done = client.poll(|_, reply| assert!(reply.is_ok(), "{reply:?}"))?;
            }
            if operation == "PUT" && r % 1024 == 0 {
                server.clean();
            }
        }
        let ns = (clock::tsc() - start) as f64 * 1e9 / clock::tsc_hz() as f64 / f64::from(rounds);
        println!("{operation}: {ns:.0} ns of software");
    }
    Ok(())
}
