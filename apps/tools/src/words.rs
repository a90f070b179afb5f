//! Options as `KEY=VALUE` words: how the host's command tells a guest what to do.

use alloc::format;
use alloc::string::{String, ToString};
use core::net::IpAddr;
use core::str::FromStr;
use core::time::Duration;

use hyv_verbs::Gid;

use crate::{pingpong, rping};

/// Looks a word up.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<&'a str>;

/// A word's value, or `default` where it is missing.
///
/// # Errors
/// Names the word.
pub fn number<T: FromStr>(words: Lookup<'_>, key: &str, default: T) -> Result<T, String> {
    match words(key) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .map_err(|_| format!("argument {key}={text} makes no sense")),
    }
}

/// An address word.
///
/// # Errors
/// Names the word.
pub fn address(words: Lookup<'_>, key: &str) -> Result<Option<IpAddr>, String> {
    words(key)
        .map(|text| {
            text.parse()
                .map_err(|_| format!("argument {key}={text} is no address"))
        })
        .transpose()
}

impl pingpong::Transport {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rc => "rc",
            Self::Uc => "uc",
            Self::Ud => "ud",
        }
    }
}

impl pingpong::Options {
    /// As words.
    #[must_use]
    pub fn to_words(&self) -> String {
        format!(
            "kind={} size={} mtu={} rx={} iters={} events={} check={} patience_s={}",
            self.transport.name(),
            self.size,
            self.mtu,
            self.rx_depth,
            self.iterations,
            u8::from(self.events),
            u8::from(self.check),
            self.patience.as_secs()
        )
    }

    /// From words.
    ///
    /// # Errors
    /// Names the word that is wrong.
    pub fn from_words(words: Lookup<'_>) -> Result<Self, String> {
        use pingpong::Transport::{Rc, Uc, Ud};
        let transport = match words("kind") {
            Some("rc") | None => Rc,
            Some("uc") => Uc,
            Some("ud") => Ud,
            Some(other) => return Err(format!("argument kind={other}: rc, uc or ud")),
        };
        let d = Self::new(transport);
        Ok(Self {
            transport,
            size: number(words, "size", d.size)?,
            mtu: number(words, "mtu", d.mtu)?,
            rx_depth: number(words, "rx", d.rx_depth)?,
            iterations: number(words, "iters", d.iterations)?,
            events: number(words, "events", 0u8)? != 0,
            check: number(words, "check", 0u8)? != 0,
            patience: Duration::from_secs(number(words, "patience_s", d.patience.as_secs())?),
        })
    }
}

impl rping::Options {
    /// As words.
    #[must_use]
    pub fn to_words(&self) -> String {
        format!(
            "size={} count={} validate={} patience_s={}",
            self.size,
            self.count,
            u8::from(self.validate),
            self.patience.as_secs()
        )
    }

    /// From words.
    ///
    /// # Errors
    /// Names the word that is wrong.
    pub fn from_words(words: Lookup<'_>) -> Result<Self, String> {
        Ok(Self {
            size: number(words, "size", 64)?,
            count: number(words, "count", u32::MAX)?,
            validate: number(words, "validate", 0u8)? != 0,
            patience: Duration::from_secs(number(words, "patience_s", 30)?),
        })
    }
}

/// The lines that the stock programs print about an exchange.
#[must_use]
pub fn outcome(o: &pingpong::Outcome) -> [String; 2] {
    let seconds = o.elapsed_ns as f64 / 1e9;
    let mbit = o.bytes as f64 * 8.0 / 1e6 / seconds;
    let us = o.elapsed_ns as f64 / 1e3 / f64::from(o.iterations);
    [
        format!(
            "{} bytes in {seconds:.2} seconds = {mbit:.2} Mbit/sec",
            o.bytes
        ),
        format!(
            "{} iters in {seconds:.2} seconds = {us:.2} usec/iter",
            o.iterations
        ),
    ]
}

/// What to say of an exchange that was left unacknowledged.
pub const UNACKNOWLEDGED: &str =
    "the peer ended before it acknowledged the last message, as happens where packets are lost";

/// The line that the stock programs print about a side.
#[must_use]
pub fn endpoint(name: &str, e: &pingpong::Endpoint) -> String {
    let gid: IpAddr = e.gid.ip();
    let gid = match gid {
        IpAddr::V4(a) => format!("::ffff:{a}"),
        IpAddr::V6(a) => a.to_string(),
    };
    format!(
        "  {name} address:  LID {:#06x}, QPN {:#08x}, PSN {:#08x}, GID {gid}",
        e.lid, e.qpn, e.psn
    )
}

/// A GID word.
///
/// # Errors
/// When it is missing or no address.
pub fn gid(words: Lookup<'_>, key: &str) -> Result<Gid, String> {
    address(words, key)?
        .map(Gid::from)
        .ok_or_else(|| format!("argument {key}= is missing"))
}
