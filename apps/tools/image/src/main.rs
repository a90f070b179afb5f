//! The RDMA tools as an appliance: the argument `tool` says which one this guest is.
//!
//! Arguments (`KEY=VALUE` words on the command line): `tool` (`perf`), `port`.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;

use hyv_tools::perf::{Agent, Clock};
use hyv_unikernel::log::{info, warn};
use hyv_unikernel::platform::Guest;
use hyv_unikernel::{rt, time};
use hyv_verbs::Context;

hyv_unikernel::entry!(main);

fn port(default: u16) -> Result<u16, String> {
    match rt::args().get("port") {
        None => Ok(default),
        Some(text) => text
            .parse()
            .map_err(|_| format!("argument port={text} is not a port")),
    }
}

fn main() -> Result<(), String> {
    match rt::args().get("tool") {
        Some("perf") => perf(),
        Some(other) => Err(format!("argument tool={other}: this image has perf")),
        None => Err("argument tool= is missing: perf".into()),
    }
}

fn perf() -> Result<(), String> {
    let context = Context::open(Arc::new(Guest)).map_err(|e| format!("no device: {e}"))?;
    let clock = Clock {
        ticks: time::tsc,
        hz: time::tsc_hz(),
    };
    let port = port(7072)?;
    let mut agent = Agent::new(&context, clock, port).map_err(|e| format!("{e}"))?;
    info!("measures for whoever connects to port {port}");
    rt::ready();
    agent
        .serve(rt::shutdown_requested, |e| {
            warn!("a measurement ended: {e}")
        })
        .map_err(|e| format!("{e}"))
}
