//! Latency and bandwidth of single verbs: an *agent* (in a guest or in a Linux process: the same code) posts and polls,
//! a *partner* owns the memory it reaches and answers its SENDs, and says what to measure.
//!
//! Commands and reports travel as SENDs on the measured queue pair itself, never while it is measured. Samples stay in
//! the agent's memory; the partner READs them.

mod agent;
mod control;
mod partner;
mod protocol;

pub use agent::{Agent, Clock, Drive};
pub use partner::{Partner, Samples};
pub use protocol::{Command, Kind, MAX_SAMPLES, Verb};

/// Why a measurement ended early.
#[derive(Debug)]
#[non_exhaustive]
pub enum PerfError {
    /// A control verb.
    Verbs(hyv_verbs::Error),
    /// A work request could not be posted.
    Post(hyv_verbs::PostError),
    /// A work request failed.
    Completion(hyv_verbs::WcStatus),
    /// The other side said something that makes no sense.
    Protocol(&'static str),
    /// The other side is silent.
    Silent,
}

impl core::fmt::Display for PerfError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Verbs(e) => write!(f, "{e}"),
            Self::Post(e) => write!(f, "cannot post a work request: {e}"),
            Self::Completion(s) => write!(f, "a work request completed with {s:?}"),
            Self::Protocol(what) => write!(f, "the other side of the measurement {what}"),
            Self::Silent => f.write_str("the other side of the measurement is silent"),
        }
    }
}

impl core::error::Error for PerfError {}

impl From<hyv_verbs::Error> for PerfError {
    fn from(e: hyv_verbs::Error) -> Self {
        Self::Verbs(e)
    }
}

impl From<hyv_verbs::PostError> for PerfError {
    fn from(e: hyv_verbs::PostError) -> Self {
        Self::Post(e)
    }
}

/// Room for one message on either side, bytes: the largest size that can be measured.
pub const MAX_SIZE: usize = 4 << 20;
/// Layout of either side's region: message buffer, place for incoming messages, samples.
const RECV_AT: u64 = MAX_SIZE as u64;
const SAMPLES_AT: u64 = 2 * MAX_SIZE as u64;
/// Bytes of a side's region.
pub const REGION: usize = 2 * MAX_SIZE + 4 * MAX_SAMPLES;
/// Bytes that [`Kind::Register`] registers.
pub const REGISTERED: usize = 1 << 30;
/// Receives posted on either side, and so the most SENDs that may be under way.
const RECEIVES: u32 = 32;
/// Largest payload sent inline: beyond it the copy into the work queue costs more than the gather.
const INLINE: usize = 64;
/// READs, WRITEs or SENDs under way while bandwidth is measured; fewer than [`RECEIVES`].
pub const DEPTH: u32 = 16;
/// Turns of polling between looks at the clock while waiting for the other side.
const PATIENCE: u32 = 1 << 14;
/// Silence after which the other side counts as gone, ns.
const SILENCE_NS: u64 = 5_000_000_000;

/// Where in its user's RAM a region lies.
fn ram_offset(
    context: &hyv_verbs::Context,
    region: &hyv_verbs::MemoryRegion,
) -> Result<u64, PerfError> {
    context
        .platform()
        .ram_offset(region.as_ptr(), region.len())
        .ok_or(PerfError::Protocol("has a buffer outside its RAM"))
}
