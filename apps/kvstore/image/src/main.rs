//! The key-value store as an appliance: everything this guest does.
//!
//! Arguments (`KEY=VALUE` words on the command line): `port` (default 7070), `seed` of the key hash (default: from
//! the time), `clients` (most connections at once), `spin_us` (how long to poll before sleeping).
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

/// Memory left for what the server registers beside the store: completion queues and scratch buffers.
const BESIDE_STORE: usize = 4 << 20;

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
    let config = ServerConfig {
        port: u16::try_from(port).map_err(|_| format!("argument port={port} is not a port"))?,
        store_bytes: memory::rest().saturating_sub(BESIDE_STORE),
        seed: number("seed", time::unix_ns() ^ time::tsc().rotate_left(32))?,
        max_connections: number("clients", limits::MAX_CONNECTIONS as u64)? as usize,
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
