//! Our end of an exchange: `hyv-tools`, natively or in a guest.

use std::net::IpAddr;
use std::process::Command;

use super::matrix::{Call, End, Exchange, Local, Program, Ready, Role, Work};
use super::{Family, Host};
use crate::{Accelerator, Sandbox, programs};

/// Where our side of an exchange runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// In the process itself.
    Native,
    /// In a guest.
    Guest(Accelerator),
}

/// `hyv-tools` on a [`Host`], as an end of exchanges.
pub struct Ours<'a> {
    local: Local<'a>,
    side: Side,
}

impl<'a> Ours<'a> {
    /// `carrier`: what `--carrier` is given. `more`: further arguments of each command.
    #[must_use]
    pub fn new(
        host: &'a Host,
        sandbox: &'a Sandbox,
        side: Side,
        carrier: &'a str,
        more: &'a [&'a str],
    ) -> Self {
        let ready = match side {
            Side::Native => "waiting for a client on",
            Side::Guest(_) => "guest: up under",
        };
        let line = move |call: &Call| {
            let mut command = command(sandbox, side, call);
            command.args(["--carrier", carrier]).args(more);
            command
        };
        Self {
            local: Local::new(host, sandbox, Ready::Says(ready.into()), line),
            side,
        }
    }
}

/// The command for `call`, which chooses no carrier.
fn command(sandbox: &Sandbox, side: Side, call: &Call) -> Command {
    let row = call.exchange;
    let mut command = sandbox.command(programs::tools());
    let ([port, size, count], own) = (
        [call.port.into(), row.size, row.iterations].map(|n: u32| n.to_string()),
        call.own.to_string(),
    );
    let kind = match row.program {
        Program::RcPingpong => "rc",
        Program::UcPingpong => "uc",
        Program::UdPingpong => "ud",
        Program::Rping => {
            command.args(["rping", "-p", &port, "-S", &size, "-C", &count, "-V"]);
            match call.role {
                Role::Server => command.arg("-s"),
                Role::Client => command.args(["-c", "-a", &call.server.to_string()]),
            };
            ""
        }
    };
    if row.program != Program::Rping {
        command.args(["pingpong", kind, "-p", &port, "-s", &size, "-n", &count]);
        command.args(["-m", &row.path_mtu.to_string()]);
        if call.role == Role::Client {
            command.arg(call.server.to_string());
        }
    }
    command.args(["--listen", &own]);
    if let Side::Guest(accelerator) = side {
        command.args(["--guest", "--accel", accelerator.name(), "--image"]);
        command.arg(programs::tools_image());
    }
    command
}

impl End for Ours<'_> {
    fn ip(&self, family: Family) -> IpAddr {
        self.local.ip(family)
    }

    /// QEMU forwards TCP over IPv4 into a guest, whatever the address of its device is.
    fn listens_at(&self, row: &Exchange) -> IpAddr {
        match (self.side, row.program) {
            (Side::Native, _) | (_, Program::Rping) => self.ip(row.family),
            (Side::Guest(_), _) => self.ip(Family::V4),
        }
    }

    fn start<'a>(&'a self, call: &Call) -> Box<dyn Work + 'a> {
        self.local.start(call)
    }
}
