//! The JSON report of `perf`.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use hyv_lab::Interval;
use serde::Serialize;

/// One verb and size on one side.
#[derive(Serialize, Debug, Clone)]
pub(crate) struct ResultLine {
    pub verb: &'static str,
    pub size: u32,
    #[serde(rename = "where")]
    pub place: &'static str,
    /// The fastest batch's mean, ns a work request.
    pub min_ns: f64,
    /// Typical: the median of batches.
    pub p50_ns: f64,
    pub p99_ns: f64,
    pub p999_ns: f64,
    /// Work requests in all steady slices.
    pub iterations: u64,
    /// Median time in units of the floor that was measured in the same slices.
    pub floors: f64,
    /// The same in units of two lines, one there and one back; latency runs of one host only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exchanges: Option<f64>,
    /// Bytes a second, from the median; bandwidth runs only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<f64>,
    /// Share of a memcpy between the same buffers on the engine's core; bandwidth runs of one host only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_memcpy: Option<f64>,
    /// Share of what bare sockets with the same offload moved in the same slices; bandwidth runs with `--wire` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_bare: Option<f64>,
}

/// Guest ÷ native of one verb and size.
#[derive(Serialize, Debug, Clone)]
pub(crate) struct RatioLine {
    pub verb: &'static str,
    pub size: u32,
    pub median: f64,
    pub low: f64,
    pub high: f64,
    /// The same of the 99th percentile.
    pub p99: Interval,
}

impl RatioLine {
    /// For people, on standard error.
    pub(crate) fn show(&self, what: &str) {
        let (p50, p99) = ((self.median, self.low, self.high), self.p99);
        eprintln!(
            "  {what:>60} {:.3} ({:.3} to {:.3}), p99 {:.3} ({:.3} to {:.3})",
            p50.0, p50.1, p50.2, p99.median, p99.low, p99.high
        );
    }
}

#[derive(Serialize, Debug, Clone, Copy)]
pub(crate) struct Aa {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

#[derive(Serialize, Debug, Clone, Copy, Default)]
pub(crate) struct Floor {
    /// One cache line between the engine's core and the measured side's, there and back.
    pub cache_line_rtt_ns: Option<f64>,
    /// One line there and another one back, as a request and its completion go: the least that rings can reach.
    pub two_lines_rtt_ns: Option<f64>,
    /// A busy-polled UDP ping-pong over the same path; with `--wire`.
    pub udp_rtt_ns: Option<f64>,
    /// The same with AF_PACKET sockets.
    pub packet_rtt_ns: Option<f64>,
    /// Bytes a second that bare sockets of the carrier's kind move one way, with its offload and packet size; `bw --wire`.
    pub bandwidth: Option<f64>,
}

#[derive(Serialize, Debug)]
pub(crate) struct Report {
    pub what: &'static str,
    pub accel: Option<String>,
    pub results: Vec<ResultLine>,
    pub ratios: Vec<RatioLine>,
    pub aa: Option<Aa>,
    pub floor: Floor,
    /// Who drives the engines: `inline` is the thread of the partner, or with `--wire` of either side. With `--wire` it begins
    /// with `wire` and the carrier.
    pub mode: String,
    /// `udp` or `packet`; with `--wire`.
    pub carrier: Option<String>,
    /// Payload of a packet at most, bytes; with `--wire`.
    pub path_mtu: Option<u32>,
    /// VM exits that the guest caused, per million data verbs; KVM only.
    pub vm_exits_per_million_ops: Option<f64>,
    /// Control verbs, p50 in ns.
    pub control: Vec<ControlLine>,
    /// What idle queue pairs cost; with `--idle-qps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<Idle>,
}

/// Latency beside idle queue pairs ÷ latency without.
#[derive(Serialize, Debug, Clone)]
pub(crate) struct Idle {
    pub queue_pairs: u32,
    pub ratios: Vec<RatioLine>,
}

/// A control verb's time.
#[derive(Serialize, Debug, Clone)]
pub(crate) struct ControlLine {
    pub what: &'static str,
    #[serde(rename = "where")]
    pub place: &'static str,
    pub p50_ns: f64,
}

/// Finds what is wrong with the report's path before anything is measured.
pub(crate) fn check_target(path: &Path) -> Result<()> {
    if path.is_dir() {
        bail!("--json {}: is a folder; name a file", path.display());
    }
    if let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty())
        && !dir.is_dir()
    {
        bail!("--json {}: {} is no folder", path.display(), dir.display());
    }
    Ok(())
}

impl Report {
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        save_json(path, self)
    }
}

/// Writes a report as JSON: to standard output (`-`), or whole or not at all to a file.
pub(crate) fn save_json(path: &Path, report: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(report).context("cannot write the report")?;
    text.push('\n');
    if path == Path::new("-") {
        std::io::stdout()
            .write_all(text.as_bytes())
            .context("cannot write the report to standard output")?;
        return Ok(());
    }
    let whole = || -> std::io::Result<()> {
        let mut file = hyv_lab::Replacement::create(path)?;
        file.write_all(text.as_bytes())?;
        file.commit()
    };
    whole().with_context(|| format!("cannot write {}", path.display()))
}
