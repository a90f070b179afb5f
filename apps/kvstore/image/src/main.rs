//! The key-value store as an appliance: everything this guest does.
//!
//! Arguments (`KEY=VALUE` words on the command line): `port` (default 7070), `seed` of the key hash (default: from
//! the time), `clients` (most connections at once), `spin_us` (how long to poll before sleeping), `one_sided` (0: clients may not
//! READ the store themselves).
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;

use hyv_unikernel::log::info;
use hyv_unikernel::platform::Guest;
use hyv_unikernel::{memory, rt, time};
use hyv_verbs::Context;
use kvstore::server::serve::{ServeOptions, Surroundings};
use kvstore::server::{Server, ServerConfig, limits};
use kvstore::status::Status;

hyv_unikernel::entry!(main);

/// Least memory left for what the server registers beside the store: scratch buffers, and the first clients.
const BESIDE_STORE: usize = 8 << 20;
/// At most this part of the memory is left for clients. In the default of 256 MiB all of them find room.
const CLIENTS_FRACTION: usize = 8;

struct Host;

impl Surroundings for Host {
    fn should_stop(&mut self) -> bool {
        rt::shutdown_requested()
    }

    fn publish(&mut self, server: &Server) {
        let page = &rt::window().user;
        Status::of(server).publish(page);
        page.overhead_bytes
            .store(memory::overhead(), core::sync::atomic::Ordering::Relaxed);
    }
}

fn number(key: &str, default: u64) -> Result<u64, String> {
    match rt::args().get(key) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .map_err(|_| format!("argument {key}={text} is not a number")),
    }
}

fn main() -> Result<(), String> {
    let port = number("port", 7070)?;
    let max_connections = number("clients", limits::MAX_CONNECTIONS as u64)? as usize;
    let for_clients = limits::memory_for(max_connections).min(memory::rest() / CLIENTS_FRACTION);
    let config = ServerConfig {
        port: u16::try_from(port).map_err(|_| format!("argument port={port} is not a port"))?,
        store_bytes: memory::rest().saturating_sub(for_clients.max(BESIDE_STORE)),
        seed: number("seed", time::unix_ns() ^ time::tsc().rotate_left(32))?,
        max_connections,
        unix_ns: time::unix_ns(),
        one_sided: number("one_sided", 1)? != 0,
    };
    let spin_ns = number("spin_us", 200)? * 1000;
    let context = Context::open(Arc::new(Guest)).map_err(|e| format!("no device: {e}"))?;
    let mut server = Server::new(&context, config).map_err(|e| format!("{e}"))?;
    info!(
        "serving on port {port} with {} MiB for the store",
        config.store_bytes >> 20
    );
    Host.publish(&server);
    rt::ready();
    server
        .serve(ServeOptions { spin_ns }, &mut Host)
        .map_err(|e| format!("{e}"))?;
    server.close().map_err(|e| format!("{e}"))
}
