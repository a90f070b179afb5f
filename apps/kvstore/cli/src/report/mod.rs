//! The JSON report of a run.

#[cfg(test)]
mod tests;

use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use hyv_lab::{Interval, LatencySummary};

/// What a run of the appliance found out: one JSON object. Ratios are guest ÷ native.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What ran the guest's instructions.
    pub accel: Accel,
    /// From the start of QEMU's process to the first request answered, ms.
    pub boot_ms: f64,
    /// Size of the image file, bytes.
    pub image_bytes: u64,
    /// Guest RAM in use that is not the store's, bytes.
    pub guest_overhead_bytes: u64,
    /// Records loaded; 0 where no file was given.
    pub loaded: u64,
    /// Records read back and found equal; 0 where this was not asked for.
    pub verified: u64,
    /// GETs measured; null without `--bench`.
    pub get: Option<LatencySummary>,
    /// PUTs measured; null without `--bench`.
    pub put: Option<LatencySummary>,
    /// Exits that the guest's own doing caused (KVM's `exits` less `irq_exits`) per million
    /// operations; null under TCG and without operations.
    pub vm_exits_per_million_ops: Option<f64>,
    /// Exits for the host's own interrupts, mostly its timer, per second; null under TCG.
    pub host_irq_exits_per_second: Option<f64>,
    /// Who drove the engine; null without `--bench`.
    pub mode: Option<Mode>,
    /// The machine's own limit in this run; null without `--bench`.
    pub floor: Option<Floor>,
    /// The same server as a Linux process; only there with `--compare native`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub native: Option<Native>,
    /// Ratio of the medians of GET.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ratio_p50: Option<Interval>,
    /// Ratio of the 99th percentiles of GET.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ratio_p99: Option<Interval>,
    /// Ratio of the medians of GET, native against itself: what the method makes of no difference.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub aa_p50: Option<Interval>,
}

/// What the native side of a comparison found: fields as in [`Report`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Native {
    /// Records loaded.
    pub loaded: u64,
    /// Records read back and found equal.
    pub verified: u64,
    /// GETs measured.
    pub get: Option<LatencySummary>,
    /// PUTs measured.
    pub put: Option<LatencySummary>,
    /// Who drove the engine.
    pub mode: Option<Mode>,
    /// The machine's own limit, in the native slices.
    pub floor: Option<Floor>,
}

/// What ran the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The processor, under the kernel's virtual machine.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// Who drove the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The measuring client's own thread.
    Inline,
    /// A thread of the engine's.
    Thread,
}

/// What no data path on this machine can be faster than.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// Round trip of one cache line between the two cores, median, ns.
    pub cache_line_rtt_ns: f64,
}

/// A report that could not be written.
#[derive(Debug, Error)]
#[error("{file}: cannot write the report: {error}")]
pub struct SaveError {
    /// The file as the user named it.
    pub file: String,
    /// The system's reason.
    #[source]
    pub error: io::Error,
}

impl Report {
    /// [`save`] for this report.
    ///
    /// # Errors
    /// As [`save`].
    pub fn save(&self, path: &Path) -> Result<(), SaveError> {
        save(self, path)
    }
}

/// Writes a report to `path` (`-`: standard output), whole or not at all. Pipes and devices are written as they are.
///
/// # Errors
/// [`SaveError`]: nothing was written, or, for `-`, a pipe or a device, not all.
pub fn save(report: &impl Serialize, path: &Path) -> Result<(), SaveError> {
    try_save(report, path).map_err(|error| SaveError {
        file: path.display().to_string(),
        error,
    })
}

/// Finds what is wrong with a report's file before there is a report.
///
/// # Errors
/// That it is a folder, or in none.
pub fn check_target(path: &Path) -> Result<(), String> {
    if path.is_dir() {
        return Err(format!(
            "--json {}: is a folder; name a file",
            path.display()
        ));
    }
    match path.parent().filter(|d| !d.as_os_str().is_empty()) {
        Some(dir) if !dir.is_dir() => Err(format!(
            "--json {}: {} is no folder",
            path.display(),
            dir.display()
        )),
        _ => Ok(()),
    }
}

fn try_save(report: &impl Serialize, path: &Path) -> io::Result<()> {
    if path.as_os_str() == "-" {
        return emit(report, io::stdout().lock());
    }
    if path.metadata().is_ok_and(|meta| !meta.is_file()) {
        return emit(report, std::fs::File::options().write(true).open(path)?);
    }
    let mut file = hyv_lab::Replacement::create(path)?;
    emit(report, &mut file)?;
    file.commit()
}

fn emit(report: &impl Serialize, out: impl Write) -> io::Result<()> {
    let mut out = BufWriter::new(out);
    serde_json::to_writer_pretty(&mut out, report)?;
    out.write_all(b"\n")?;
    out.flush()
}
