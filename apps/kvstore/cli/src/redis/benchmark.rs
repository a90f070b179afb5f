//! `redis-benchmark`, Redis's own instrument, for the throughput of many pipelining clients.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyv_host::sys::process::spawn_bound;

use super::server::{Address, program};

/// Commands in a pipeline.
pub const PIPELINE: u32 = 16;
/// Clients.
pub const CLIENTS: u32 = 50;

/// What it measured, requests a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// GET alone.
    pub get: f64,
    /// SET alone.
    pub set: f64,
}

impl Rates {
    /// The rate of a mix of both: a request takes the mean of their times.
    #[must_use]
    pub fn mixed(&self, read_share: f64) -> f64 {
        1.0 / (read_share / self.get + (1.0 - read_share) / self.set)
    }
}

/// Runs it with `requests` of GET, then of SET, over so many keys, with values of `value_size` bytes.
///
/// # Errors
/// When it is missing, fails, or says nothing that can be read; [`AtomicBool`] `stop` ends it.
pub fn run(
    address: &Address,
    requests: u64,
    records: u32,
    value_size: usize,
    stop: &AtomicBool,
) -> Result<Rates> {
    let mut command = Command::new(program("redis-benchmark")?);
    match address {
        Address::Unix(path) => command.arg("-s").arg(path),
        Address::Tcp(at) => {
            command.args(["-h", &at.ip().to_string(), "-p", &at.port().to_string()])
        }
    };
    command
        .args(["-P", &PIPELINE.to_string(), "-c", &CLIENTS.to_string()])
        .args(["-n", &requests.to_string(), "-r", &records.to_string()])
        .args(["-d", &value_size.max(1).to_string()])
        // It runs SET before GET, whatever the order here.
        .args(["-t", "set,get", "--csv"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = spawn_bound(command, &[]).context("cannot start redis-benchmark")?;
    loop {
        if child
            .try_wait()
            .context("cannot wait for redis-benchmark")?
            .is_some()
        {
            break;
        }
        if stop.load(Ordering::Relaxed) {
            let _ = child.kill();
            let _ = child.wait();
            bail!("bench: interrupted");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // Its few lines fit a pipe, so it never waited for a reader.
    let output = child
        .wait_with_output()
        .context("cannot read what redis-benchmark says")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!(
            "redis-benchmark failed: {}: {}{}",
            output.status,
            text,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    rates(&text).with_context(|| format!("redis-benchmark --csv said nothing of use: {text:?}"))
}

/// Reads the lines `"SET","123.4",…` and `"GET","123.4",…`.
fn rates(text: &str) -> Option<Rates> {
    let rate = |name: &str| {
        let mut line = text.lines().filter_map(|l| l.trim().strip_prefix(name));
        let value = line.next_back()?.strip_prefix(',')?.split(',').next()?;
        let rate: f64 = value.trim_matches('"').parse().ok()?;
        (rate.is_finite() && rate > 0.0).then_some(rate)
    };
    Some(Rates {
        get: rate("\"GET\"")?,
        set: rate("\"SET\"")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_versions_6_and_7_say() {
        let seven = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\"\n\
            \"SET\",\"500000.00\",\"1.2\",\"0.5\"\n\"GET\",\"1000000.00\",\"0.7\",\"0.2\"\n";
        let six = "\"SET\",\"500000.00\"\n\"GET\",\"1000000.00\"\n";
        for text in [seven, six] {
            let rates = rates(text).expect("readable");
            assert_eq!((rates.set, rates.get), (500_000.0, 1_000_000.0));
            assert!((rates.mixed(0.5) - 666_666.6).abs() < 1.0);
            assert_eq!(rates.mixed(1.0), 1_000_000.0);
        }
        for text in [
            "",
            "\"GET\",\"x\"\n\"SET\",\"1\"",
            "\"GET\",\"1\"",
            "\"GET\",\"0\"\n\"SET\",\"1\"",
        ] {
            assert_eq!(rates(text), None, "{text}");
        }
    }
}
