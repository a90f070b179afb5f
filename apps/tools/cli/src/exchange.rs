//! `pingpong` and `rping`: exchanges with the stock programs, from this process or from a guest.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, ToSocketAddrs as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyv_host::accel::AccelRequest;
use hyv_host::backend::Quotas;
use hyv_host::instance::{Instance, InstanceConfig};
use hyv_host::program;
use hyv_host::vmm::{Forward, GuestConfig, GuestIp, NetConfig};
use hyv_host::wire::WireConfig;
use hyv_lab::values;
use hyv_tools::{pingpong, rping, words};
use hyv_verbs::{Context, Gid, Platform, Process};

use crate::machine::{self, Roles};

/// RAM of this process's side: 1 MiB messages and 500 receives fit.
const RAM: u64 = 16 << 20;
/// RAM of a guest.
const GUEST_RAM: u64 = 64 << 20;

/// What both commands share.
#[derive(clap::Args, Debug)]
struct Common {
    #[command(flatten)]
    wire: WireConfig,
    /// Run this side in a guest, not in this process
    #[arg(long)]
    guest: bool,
    /// What runs the guest: auto, kvm or tcg
    #[arg(long, value_name = "auto|kvm|tcg", default_value = "auto")]
    accel: AccelRequest,
    /// CPUs to use, for example 0,1: the first for the engine, the second for this side
    #[arg(long, value_name = "CPUS")]
    pin: Option<String>,
    /// The image to boot
    #[arg(long, value_name = "PATH", env = "HYV_TOOLS_IMAGE", hide_env = true)]
    image: Option<PathBuf>,
    /// Give up after so long a silence
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "30s")]
    patience: Duration,
    /// What to log: error, warn, info, debug or trace, or a filter such as hyv_host=debug
    #[arg(long, value_name = "LEVEL", default_value = "warn,guest=info")]
    log: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Rc,
    Uc,
    Ud,
}

/// Arguments of `pingpong`; the short ones are the stock programs'.
#[derive(clap::Args, Debug)]
pub struct PingpongArgs {
    /// Which program the peer is: ibv_rc_pingpong, ibv_uc_pingpong or ibv_ud_pingpong
    #[arg(value_enum, default_value = "rc")]
    kind: Kind,
    /// Connect to the server on this host; without it, be the server
    server: Option<String>,
    /// TCP port for the introduction
    #[arg(short, long, default_value_t = 18515)]
    port: u16,
    /// Bytes of a message (default: 4096, and 1024 for ud)
    #[arg(short, long, value_parser = values::size)]
    size: Option<u64>,
    /// Path MTU: 256, 512, 1024, 2048 or 4096
    #[arg(short, long, default_value_t = 1024)]
    mtu: u32,
    /// Receives posted
    #[arg(short, long, default_value_t = 500)]
    rx_depth: u32,
    /// Messages each way
    #[arg(short = 'n', long, default_value_t = 1000)]
    iters: u32,
    /// Sleep on completion events
    #[arg(short, long)]
    events: bool,
    /// Look at every byte of every message; the peer must be this program with the same flag
    #[arg(short, long)]
    chk: bool,
    /// The guest's network: user (QEMU's user networking) or tap:NAME
    #[arg(long, value_name = "NET", default_value = "user", requires = "guest")]
    net: String,
    /// The guest's own address: ADDRESS/PREFIX[,GATEWAY] (default: DHCP)
    #[arg(long, value_name = "ADDR", requires = "guest")]
    ip: Vec<GuestIp>,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `rping`; the short ones are the stock program's.
#[derive(clap::Args, Debug)]
pub struct RpingArgs {
    /// Be the server
    #[arg(
        short,
        long,
        conflicts_with = "client",
        required_unless_present = "client"
    )]
    server: bool,
    /// Be the client
    #[arg(short, long, requires = "address")]
    client: bool,
    /// The server's address
    #[arg(short, long, value_name = "ADDR")]
    address: Option<IpAddr>,
    /// Port
    #[arg(short, long, default_value_t = 7174)]
    port: u16,
    /// Rounds; a server serves until its client leaves
    #[arg(short = 'C', long, default_value_t = 10)]
    count: u32,
    /// Bytes of ping data
    #[arg(short = 'S', long, value_parser = values::size, default_value = "64")]
    size: u64,
    /// Compare what comes back
    #[arg(short = 'V', long)]
    validate: bool,
    /// Show the ping data
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    common: Common,
}

impl Common {
    fn instance(&self, prefix: &str) -> Result<(Instance, Roles)> {
        let roles = Roles::new(self.pin.as_deref())?;
        let instance = Instance::start(InstanceConfig {
            name: None,
            prefix: prefix.into(),
            engine_cpus: if self.pin.is_some() {
                roles.engine.clone()
            } else {
                Vec::new()
            },
            spin: Duration::from_micros(200),
            quotas: Quotas::default(),
            wire: self.wire.clone(),
        })?;
        Ok((instance, roles))
    }

    fn context(&self, instance: &Instance) -> Result<Context> {
        let process: Arc<Process> = Process::connect(instance.dir().path(), RAM, "tools")?;
        let platform: Arc<dyn Platform> = process;
        Context::open(platform).context("cannot open the device")
    }

    /// Boots the tools' image and waits for its end; Ctrl-C ends it early.
    fn run_guest(
        &self,
        name: &str,
        words: String,
        (net, ips): (Option<NetConfig>, Vec<GuestIp>),
        stop: &AtomicBool,
    ) -> Result<ExitCode> {
        let image = machine::image(self.image.as_ref())?;
        let (qemu, accel) = machine::accelerator(self.accel)?;
        let (instance, roles) = self.instance(name)?;
        let config = GuestConfig {
            name: name.into(),
            image,
            symbols: None,
            args: format!("tool={name} {words} hyv.log=info"),
            memory: GUEST_RAM,
            watchdog: None,
            spin_hint: 1,
            net,
            ips,
        };
        let guest = machine::boot(&instance, &config, (&qemu, &accel), &roles)?;
        eprintln!("guest: up under {accel}");
        while !stop.load(Ordering::Relaxed) {
            if guest
                .qemu()
                .wait_timeout(Duration::from_millis(50))
                .is_some()
            {
                let report = guest.wait();
                if report.is_success() {
                    return Ok(ExitCode::SUCCESS);
                }
                bail!("{report}");
            }
        }
        let _ = guest.shutdown();
        bail!("interrupted");
    }
}

/// Runs `pingpong`.
///
/// # Errors
/// A wrong argument, no device, no peer, or an exchange that failed.
pub fn pingpong(args: &PingpongArgs) -> Result<ExitCode> {
    program::start_log(&args.common.log)?;
    let stop = program::stop_flag()?;
    let transport = match args.kind {
        Kind::Rc => pingpong::Transport::Rc,
        Kind::Uc => pingpong::Transport::Uc,
        Kind::Ud => pingpong::Transport::Ud,
    };
    let defaults = pingpong::Options::new(transport);
    if !(args.mtu.is_power_of_two() && (256..=4096).contains(&args.mtu)) {
        bail!(
            "-m {}: the path MTU is 256, 512, 1024, 2048 or 4096",
            args.mtu
        );
    }
    if args.rx_depth == 0 || args.rx_depth > 8192 {
        bail!("-r {}: from 1 to 8192 receives", args.rx_depth);
    }
    if args.iters == 0 {
        bail!("-n 0: at least one message");
    }
    let size = args.size.unwrap_or(u64::from(defaults.size));
    if size == 0 || size > 4 << 20 {
        bail!("-s {size}: from 1 byte to 4M");
    }
    let options = pingpong::Options {
        size: size as u32,
        mtu: args.mtu,
        rx_depth: args.rx_depth,
        iterations: args.iters,
        events: args.events,
        check: args.chk,
        patience: args.common.patience,
        ..defaults
    };
    let server = args
        .server
        .as_deref()
        .map(|name| {
            resolve(
                name,
                args.port,
                args.common.wire.listen.as_ref().map(|a| a.ip),
            )
        })
        .transpose()?;
    if args.common.guest {
        let mut text = format!("port={} {}", args.port, options.to_words());
        if let Some(server) = &server {
            text.push_str(&format!(" server={}", server.ip()));
        }
        let mut net = NetConfig::parse(&args.net)?;
        if let (Some(NetConfig::User { forwards }), None) = (&mut net, &server) {
            // Where the stock client connects to: the device's own address, if that is one that QEMU can listen on.
            let at = match args.common.wire.listen.as_ref().map(|a| a.ip) {
                Some(IpAddr::V4(ip)) => ip,
                _ => std::net::Ipv4Addr::UNSPECIFIED,
            };
            forwards.push(Forward {
                host: SocketAddrV4::new(at, args.port),
                guest: args.port,
            });
        }
        return args
            .common
            .run_guest("pingpong", text, (net, args.ip.clone()), &stop);
    }
    let (instance, _) = args.common.instance("pingpong")?;
    let context = args.common.context(&instance)?;
    let (role, stream) = match server {
        Some(to) => (pingpong::Role::Client, connect(to)?),
        None => {
            let at = args
                .common
                .wire
                .listen
                .as_ref()
                .map_or(IpAddr::from([127, 0, 0, 1]), |a| a.ip);
            (
                pingpong::Role::Server,
                accept(SocketAddr::new(at, args.port), &stop)?,
            )
        }
    };
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(args.common.patience))?;
    let outcome = pingpong::run(
        &context,
        options,
        role,
        &mut Tcp(stream),
        &mut |mine, theirs| {
            println!("{}", words::endpoint("local", mine));
            println!("{}", words::endpoint("remote", theirs));
        },
    )?;
    for line in words::outcome(&outcome) {
        println!("{line}");
    }
    if outcome.unacknowledged {
        eprintln!("note: {}", words::UNACKNOWLEDGED);
    }
    Ok(ExitCode::SUCCESS)
}

/// The server's address, of the device's own family where it has several.
fn resolve(name: &str, port: u16, like: Option<IpAddr>) -> Result<SocketAddr> {
    let found: Vec<SocketAddr> = (name, port)
        .to_socket_addrs()
        .with_context(|| format!("cannot find `{name}`"))?
        .collect();
    found
        .iter()
        .find(|a| like.is_none_or(|l| l.is_ipv4() == a.is_ipv4()))
        .or(found.first())
        .copied()
        .with_context(|| format!("`{name}` has no address"))
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect_timeout(&to, Duration::from_secs(10)).with_context(|| {
        format!("cannot connect to {to}: is the server started, on that address and port?")
    })
}

fn accept(at: SocketAddr, stop: &AtomicBool) -> Result<TcpStream> {
    let listener = TcpListener::bind(at).with_context(|| format!("cannot listen on {at}"))?;
    listener.set_nonblocking(true)?;
    eprintln!("waiting for a client on {at}");
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e).context("cannot accept a client"),
        }
        if stop.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

struct Tcp(TcpStream);

impl pingpong::Stream for Tcp {
    fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.0
            .write_all(bytes)
            .map_err(|e| format!("cannot talk to the peer over TCP: {e}"))
    }

    fn receive(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        self.0
            .read_exact(bytes)
            .map_err(|e| format!("the peer said nothing over TCP: {e}"))
    }
}

/// Runs `rping`.
///
/// # Errors
/// A wrong argument, no device, no peer, or an exchange that failed.
pub fn rping(args: &RpingArgs) -> Result<ExitCode> {
    program::start_log(&args.common.log)?;
    let stop = program::stop_flag()?;
    let (least, most) = (u64::from(rping::MIN_SIZE), u64::from(rping::MAX_SIZE));
    if !(least..=most).contains(&args.size) {
        bail!("-S {}: from {least} bytes to 1M", args.size);
    }
    let options = rping::Options {
        size: args.size as u32,
        count: args.count,
        validate: args.validate,
        patience: args.common.patience,
    };
    if args.common.guest {
        let mut text = format!(
            "port={} verbose={} {}",
            args.port,
            u8::from(args.verbose),
            options.to_words()
        );
        if let (true, Some(address)) = (args.client, args.address) {
            text.push_str(&format!(" server={address}"));
        }
        return args
            .common
            .run_guest("rping", text, (None, Vec::new()), &stop);
    }
    let (instance, _) = args.common.instance("rping")?;
    let context = args.common.context(&instance)?;
    let mut shown = |text: &str| {
        if args.verbose {
            println!("ping data: {text}");
        }
    };
    let rounds = match (args.client, args.address) {
        (true, Some(address)) => rping::client(
            &context,
            options,
            (Gid::from(address), args.port),
            &mut shown,
        )?,
        _ => rping::server(
            &context,
            options,
            (Gid::LOCAL, args.port),
            &mut || eprintln!("waiting for a client on port {}", args.port),
            &mut || stop.load(Ordering::Relaxed),
            &mut shown,
        )?,
    };
    println!("{rounds} rounds");
    Ok(ExitCode::SUCCESS)
}
