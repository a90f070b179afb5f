//! Exchanges between two ends, from a table.

use std::fmt;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Family, Host, Job, Peer};
use crate::run::Running;
use crate::{PATIENCE, Sandbox};

/// The first port of a table; each exchange has one of its own. The stock programs' default.
const FIRST_PORT: u16 = 18515;

/// Bytes of headers and of the ICRC that a packet may have besides its payload: BTH, DETH, RETH, AETH and immediate.
const HEADERS: usize = 64;

/// What is run on both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    /// `ibv_rc_pingpong`.
    RcPingpong,
    /// `ibv_uc_pingpong`.
    UcPingpong,
    /// `ibv_ud_pingpong`.
    UdPingpong,
    /// `rping`, over connection management.
    Rping,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::RcPingpong,
        Self::UcPingpong,
        Self::UdPingpong,
        Self::Rping,
    ];

    /// The stock program's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::RcPingpong => "ibv_rc_pingpong",
            Self::UcPingpong => "ibv_uc_pingpong",
            Self::UdPingpong => "ibv_ud_pingpong",
            Self::Rping => "rping",
        }
    }

    /// The upper three bits of its packets' opcodes.
    const fn service(self) -> u8 {
        match self {
            Self::RcPingpong | Self::Rping => 0,
            Self::UcPingpong => 1,
            Self::UdPingpong => 3,
        }
    }
}

/// Which end starts the conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// It connects.
    Client,
    /// It listens.
    Server,
}

/// A row of a table: what is run, and under which conditions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exchange {
    /// What.
    pub program: Program,
    /// What our end is; the Linux peer is the other.
    pub ours: Role,
    /// Over which IP.
    pub family: Family,
    /// Path MTU, bytes of payload. [`Program::Rping`] takes what the link gives, and the others at most that; see
    /// [`Peer::link_mtu`].
    pub path_mtu: u32,
    /// Bytes of a message.
    pub size: u32,
    /// How many messages each way.
    pub iterations: u32,
    /// Percentage of RoCEv2 packets that the peer loses, each way.
    pub loss: f64,
}

impl Exchange {
    /// A row without loss. The messages take several packets where the service allows that.
    #[must_use]
    pub fn new(program: Program, ours: Role, family: Family, path_mtu: u32) -> Self {
        Self {
            program,
            ours,
            family,
            path_mtu,
            size: match program {
                Program::UdPingpong => path_mtu - 24,
                Program::Rping => 1000,
                _ => 2 * path_mtu + 100,
            },
            iterations: 20,
            loss: 0.0,
        }
    }

    /// The same under loss, and long enough to see some.
    #[must_use]
    pub fn with_loss(self, percent: f64) -> Self {
        Self {
            loss: percent,
            iterations: 100,
            ..self
        }
    }

    /// Every program, our end as client and as server, over IPv4 and IPv6; RC once more under 4% loss.
    #[must_use]
    pub fn all(path_mtu: u32) -> Vec<Self> {
        let mut rows = Vec::new();
        for family in [Family::V4, Family::V6] {
            for ours in [Role::Client, Role::Server] {
                let row = |program| Self::new(program, ours, family, path_mtu);
                rows.extend(Program::ALL.map(row));
                rows.push(row(Program::RcPingpong).with_loss(4.0));
            }
        }
        rows
    }
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (client, server) = match self.ours {
            Role::Client => ("ours", "Linux"),
            Role::Server => ("Linux", "ours"),
        };
        write!(
            f,
            "{} {client} to {server}, {}, MTU {}, {} x {} bytes",
            self.program.name(),
            self.family,
            self.path_mtu,
            self.iterations,
            self.size
        )?;
        if self.loss > 0.0 {
            write!(f, ", {}% loss", self.loss)?;
        }
        Ok(())
    }
}

/// What an end has to do in an exchange.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The row.
    pub exchange: Exchange,
    /// What this end is.
    pub role: Role,
    /// This end's address.
    pub own: IpAddr,
    /// The other end's.
    pub other: IpAddr,
    /// Where a client finds the server: for the ping-pongs the address for TCP, over which the ends tell each other their
    /// QPs.
    pub server: IpAddr,
    /// TCP port, or port of connection management.
    pub port: u16,
}

/// An end of an exchange.
pub trait End {
    /// Its address.
    fn ip(&self, family: Family) -> IpAddr;

    /// Where it listens as the server of `row`: see [`Call::server`].
    fn listens_at(&self, row: &Exchange) -> IpAddr {
        self.ip(row.family)
    }

    /// Starts what `call` says. A server listens when this returns.
    fn start<'a>(&'a self, call: &Call) -> Box<dyn Work + 'a>;
}

/// What an [`End`] has started. Dropped, it ends.
pub trait Work {
    /// Waits for its end and gives what it printed.
    ///
    /// # Panics
    /// When it does not end within `limit`, or not well.
    fn finish(self: Box<Self>, limit: Duration) -> String;
}

/// Our end: a command line that is run on a [`Host`], made from what it has to do.
pub struct Local<'a> {
    host: &'a Host,
    sandbox: &'a Sandbox,
    line: Box<dyn Fn(&Call) -> Command + 'a>,
    ready: Ready,
}

/// How a server of ours shows that it listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ready {
    /// Its namespace has the TCP port of the [`Call`] in the state LISTEN.
    Tcp,
    /// Its standard output or standard error says this.
    Says(String),
}

impl<'a> Local<'a> {
    /// `line` gives the command, which needs not be made for the namespace.
    pub fn new(
        host: &'a Host,
        sandbox: &'a Sandbox,
        ready: Ready,
        line: impl Fn(&Call) -> Command + 'a,
    ) -> Self {
        Self {
            host,
            sandbox,
            line: Box::new(line),
            ready,
        }
    }
}

impl End for Local<'_> {
    fn ip(&self, family: Family) -> IpAddr {
        self.host.node().ip(family)
    }

    fn start<'a>(&'a self, call: &Call) -> Box<dyn Work + 'a> {
        let command = self.host.enter(&(self.line)(call));
        let mut running = self.sandbox.spawn(command);
        if call.role == Role::Server {
            let what = match &self.ready {
                Ready::Tcp => format!("TCP port {} in the state LISTEN", call.port),
                Ready::Says(text) => format!("`{text}`"),
            };
            let start = Instant::now();
            while !is_ready(&running, &self.ready, call.port) {
                let late = start.elapsed() > PATIENCE;
                assert!(
                    running.runs() && !late,
                    "no {what}\n{}\n{}",
                    running.out(),
                    running.err()
                );
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Box::new(running)
    }
}

fn is_ready(running: &Running, ready: &Ready, port: u16) -> bool {
    match ready {
        Ready::Tcp => ["tcp", "tcp6"].iter().any(|table| {
            let path = format!("/proc/{}/net/{table}", running.pid());
            listens(&std::fs::read_to_string(path).unwrap_or_default(), port)
        }),
        Ready::Says(text) => running.out().contains(text) || running.err().contains(text),
    }
}

/// Whether `/proc/net/tcp` has `port` in the state LISTEN (0A).
fn listens(table: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    table.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        matches!(words[..], [_, own, _, "0A", ..] if own.ends_with(&port))
    })
}

impl Work for Running {
    fn finish(self: Box<Self>, limit: Duration) -> String {
        let run = self.wait(limit).ok();
        format!("{}{}", run.text(), run.err)
    }
}

/// The stock programs.
impl End for Peer {
    fn ip(&self, family: Family) -> IpAddr {
        self.node().ip(family)
    }

    /// The ping-pongs bind the first address that the C library offers, which is IPv4's, whatever their GID.
    fn listens_at(&self, row: &Exchange) -> IpAddr {
        match row.program {
            Program::Rping => self.ip(row.family),
            _ => self.ip(Family::V4),
        }
    }

    fn start<'a>(&'a self, call: &Call) -> Box<dyn Work + 'a> {
        let Call { exchange, port, .. } = *call;
        let (size, count) = (exchange.size, exchange.iterations);
        let mut line = exchange.program.name().to_owned();
        if exchange.program == Program::Rping {
            line += &match call.role {
                Role::Server => format!(" -s -a {}", call.own),
                Role::Client => format!(" -c -a {}", call.server),
            };
            line += &format!(" -p {port} -S {size} -C {count} -v");
        } else {
            let gid = self.gid_index(call.own);
            line += &format!(" -g {gid} -p {port} -s {size} -n {count} -c");
            if exchange.program != Program::UdPingpong {
                line += &format!(" -m {}", exchange.path_mtu);
            }
            if call.role == Role::Client {
                line += &format!(" {}", call.server);
            }
        }
        let job = self.spawn(&line);
        if call.role == Role::Server {
            match exchange.program {
                Program::Rping => self.until_cm(port),
                _ => self.until_tcp(port),
            }
        }
        Box::new(Stock {
            job,
            exchange,
            role: call.role,
        })
    }
}

/// A stock program at work.
struct Stock<'a> {
    job: Job<'a>,
    exchange: Exchange,
    role: Role,
}

impl Work for Stock<'_> {
    fn finish(self: Box<Self>, limit: Duration) -> String {
        let Exchange {
            program,
            size,
            iterations,
            ..
        } = self.exchange;
        let output = self.job.wait(limit);
        let said = |text: &str| output.text.contains(text);
        let well = match program {
            Program::Rping => {
                let data = output.text.matches("ping data: rdma-ping-").count();
                // A server waits for the disconnection, and its status tells of it. A client that has asked for it ends, and says so only
                // if its other thread comes to run before.
                let ended = match self.role {
                    Role::Server => said("DISCONNECT EVENT"),
                    Role::Client => output.status == 0,
                };
                ended && data == iterations as usize
            }
            _ => {
                let bytes = u64::from(size) * u64::from(iterations) * 2;
                output.status == 0
                    && said(&format!("{bytes} bytes in "))
                    && said(&format!("{iterations} iters in "))
                    && !said("invalid data")
            }
        };
        assert!(
            well,
            "in the Linux peer `{}` ended with {}\n{}",
            output.command, output.status, output.text
        );
        output.text
    }
}

/// Rows whose line has this text are run, others are not: for work on one of them.
const ROWS: &str = "HYV_ROWS";

/// So many rows fail before the rest is not run any more: most of them wait for something that does not come.
const FAILURES: usize = 4;

/// Runs the rows of `table` one after the other, between `ours` and `linux`, and prints each with its time. Both ends have
/// to end well, the stock program has to have seen all messages, and the peer's wire shows what the row asks for: packets
/// of the service, right ICRCs, payloads that fill the path MTU and never exceed it, and losses if there are to be any.
/// With `HYV_ROWS=TEXT` in the environment only rows whose line has that text are run.
///
/// # Panics
/// When rows have failed, with all of them; it goes on after the first.
pub fn run(ours: &dyn End, linux: &Peer, table: &[Exchange]) {
    let chosen = std::env::var(ROWS).unwrap_or_default();
    let mut failed = Vec::new();
    for (row, port) in table.iter().zip(FIRST_PORT..) {
        if !row.to_string().contains(&chosen) {
            continue;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| run_row(ours, linux, row, port)));
        if let Err(reason) = outcome {
            let text = reason.downcast_ref::<String>().map(String::as_str);
            let text = text.or(reason.downcast_ref::<&str>().copied());
            failed.push(format!("{row}: {}", text.unwrap_or("for no reason given")));
            if failed.len() == FAILURES {
                break;
            }
            linux.loss(0.0);
        }
    }
    assert!(
        failed.is_empty(),
        "{} rows failed:\n{}",
        failed.len(),
        failed.join("\n\n")
    );
}

fn run_row(ours: &dyn End, linux: &Peer, row: &Exchange, port: u16) {
    let start = Instant::now();
    let before = linux.capture().packets.len();
    linux.loss(row.loss);
    converse(ours, linux, row, port);
    let lost = if row.loss > 0.0 { linux.lost() } else { 0 };
    linux.loss(0.0);
    assert_eq!(lost > 0, row.loss > 0.0, "{lost} packets were lost");
    let packets = linux.capture().packets.split_off(before);
    let ends = [ours.ip(row.family), linux.ip(row.family)];
    let packets = packets
        .iter()
        .filter(|p| ends.contains(&p.from) && ends.contains(&p.to));
    let mut seen = 0;
    let mut longest = 0;
    for packet in packets {
        assert!(packet.icrc_is_right, "{packet:?}");
        if packet.opcode >> 5 == row.program.service() {
            seen += 1;
            longest = longest.max(packet.length);
        }
    }
    let full = row.path_mtu.min(row.size) as usize;
    assert!(
        (full..=full + HEADERS).contains(&longest),
        "the longest of {seen} packets has {longest} bytes"
    );
    let time = start.elapsed().as_secs_f32();
    eprintln!("{time:5.1} s  {row}: {seen} packets, {lost} lost");
}

fn converse(ours: &dyn End, linux: &Peer, row: &Exchange, port: u16) {
    eprintln!("         {row} …");
    match row.ours {
        Role::Client => meet(ours, linux, row, port),
        Role::Server => meet(linux, ours, row, port),
    }
}

/// Runs `row` between any two ends, whoever is ours: the server listens, then the client is started, and both have to end
/// well. [`Exchange::loss`] and [`Exchange::ours`] are the caller's business.
///
/// # Panics
/// When an end does not end well, or not in time.
pub fn meet(client: &dyn End, server: &dyn End, row: &Exchange, port: u16) {
    let call = |role, own: &dyn End, other: &dyn End| Call {
        exchange: *row,
        role,
        own: own.ip(row.family),
        other: other.ip(row.family),
        server: server.listens_at(row),
        port,
    };
    let listening = server.start(&call(Role::Server, server, client));
    let talking = client.start(&call(Role::Client, client, server));
    // Under loss each lost packet is a time-out.
    let limit = 2 * PATIENCE;
    talking.finish(limit);
    listening.finish(limit);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_combination_once() {
        let rows = Exchange::all(1024);
        assert_eq!(rows.len(), (4 + 1) * 2 * 2);
        for (i, row) in rows.iter().enumerate() {
            assert!(!rows[..i].contains(row), "{row}");
            assert!(row.program != Program::UdPingpong || row.size <= row.path_mtu);
        }
    }

    #[test]
    fn a_listening_port_is_found() {
        let table = "  sl  local_address rem_address   st tx_queue\n   \
            0: 0100007F:4853 00000000:0000 0A 00000000:00000000 00:00000000\n   \
            1: 0100007F:4854 0100007F:1234 01 00000000:00000000 00:00000000\n";
        assert!(listens(table, 0x4853));
        assert!(!listens(table, 0x4854));
        assert!(!listens(table, 0x0048));
    }
}
