//! The parts of the `kv` command that stand on their own: file formats, statistics, the report.

pub mod format;
pub mod limits;
pub mod report;
pub mod stats;
