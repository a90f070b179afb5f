//! The RDMA tools as an appliance: the argument `tool` says which one this guest is (`perf`, `pingpong`, `rping`); the other
//! arguments are `KEY=VALUE` words of that tool (`hyv_tools::words`).
#![no_std]
#![no_main]

extern crate alloc;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::net::IpAddr;
use core::time::Duration;

use hyv_tools::perf::{Agent, Clock};
use hyv_tools::{pingpong, rping, words};
use hyv_unikernel::log::{info, warn};
use hyv_unikernel::net::{self, IpAddress, TcpListener, TcpStream};
use hyv_unikernel::platform::Guest;
use hyv_unikernel::{rt, time};
use hyv_verbs::{Context, Gid};

hyv_unikernel::entry!(main);

fn word(key: &str) -> Option<&'static str> {
    rt::args().get(key)
}

fn main() -> Result<(), String> {
    match word("tool") {
        Some("perf") => perf(),
        Some("pingpong") => pingpong(),
        Some("rping") => rping(),
        Some(other) => Err(format!(
            "argument tool={other}: this image has perf, pingpong and rping"
        )),
        None => Err("argument tool= is missing: perf, pingpong or rping".into()),
    }
}

fn device() -> Result<Context, String> {
    Context::open(Arc::new(Guest)).map_err(|e| format!("no device: {e}"))
}

fn perf() -> Result<(), String> {
    let context = device()?;
    let clock = Clock {
        ticks: time::tsc,
        hz: time::tsc_hz(),
    };
    let port = words::number(&word, "port", 7072)?;
    let mut agent = Agent::new(&context, clock, port).map_err(|e| format!("{e}"))?;
    info!("measures for whoever connects to port {port}");
    rt::ready();
    agent
        .serve(rt::shutdown_requested, |e| {
            warn!("a measurement ended: {e}");
        })
        .map_err(|e| format!("{e}"))
}

/// The introduction's TCP connection.
struct Tcp(TcpStream);

impl pingpong::Stream for Tcp {
    fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.0
            .write_all(bytes)
            .and_then(|()| self.0.flush())
            .map_err(|e| format!("cannot talk to the peer over TCP: {e}"))
    }

    fn receive(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        self.0
            .read_exact(bytes)
            .map_err(|e| format!("the peer said nothing over TCP: {e}"))
    }
}

fn pingpong() -> Result<(), String> {
    let context = device()?;
    let net = net::up().map_err(|e| format!("no network: {e}"))?;
    let options = pingpong::Options::from_words(&word)?;
    let port: u16 = words::number(&word, "port", 18515)?;
    let server = words::address(&word, "server")?;
    let (role, mut stream) = match server {
        None => {
            let mut listener = TcpListener::bind(&net, port)
                .map_err(|e| format!("cannot listen on {port}: {e}"))?;
            rt::ready();
            let stream = listener
                .accept(None)
                .map_err(|e| format!("nobody came: {e}"))?;
            (pingpong::Role::Server, stream)
        }
        Some(address) => {
            rt::ready();
            let ip = match address {
                IpAddr::V4(a) => IpAddress::Ipv4(a),
                IpAddr::V6(a) => IpAddress::Ipv6(a),
            };
            let stream = TcpStream::connect(&net, ip, port, Some(Duration::from_secs(10)))
                .map_err(|e| format!("cannot connect to {address} port {port}: {e}"))?;
            (pingpong::Role::Client, stream)
        }
    };
    stream.set_timeout(Some(options.patience));
    let mut tcp: Box<dyn pingpong::Stream> = Box::new(Tcp(stream));
    let outcome = pingpong::run(&context, options, role, &mut *tcp, &mut |mine, theirs| {
        info!("{}", words::endpoint("local", mine));
        info!("{}", words::endpoint("remote", theirs));
    })
    .map_err(|e| format!("{e}"))?;
    for line in words::outcome(&outcome) {
        info!("{line}");
    }
    if outcome.unacknowledged {
        warn!("{}", words::UNACKNOWLEDGED);
    }
    Ok(())
}

fn rping() -> Result<(), String> {
    let context = device()?;
    let options = rping::Options::from_words(&word)?;
    let port: u16 = words::number(&word, "port", 7174)?;
    let verbose = words::number(&word, "verbose", 0u8)? != 0;
    let mut shown = |text: &str| {
        if verbose {
            info!("ping data: {text}");
        }
    };
    let rounds = if word("server").is_some() {
        rt::ready();
        let to = words::gid(&word, "server")?;
        rping::client(&context, options, (to, port), &mut shown)
    } else {
        rping::server(
            &context,
            options,
            (Gid::LOCAL, port),
            &mut rt::ready,
            &mut rt::shutdown_requested,
            &mut shown,
        )
    }
    .map_err(|e| format!("{e}"))?;
    info!("{rounds} rounds");
    Ok(())
}
