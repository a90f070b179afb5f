//! The `kv` command: runs the appliance, talks to it, measures it.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`bench`] | workloads, and running them on stores |
//! | [`commands`] | the subcommands |
//! | [`pump`] | many requests in flight: load, read back |
//! | [`measure`] | slices of one operation after the other, with their floor |
//! | [`soak`] | clients that fight and are killed, and a check of what they were told |
//! | [`session`] | finding a running instance and connecting to it |
//! | [`format`] | TSV and JSON lines |
//! | [`redis`] | the machine's Redis, to compare with |
//! | [`report`] | the JSON report |
//! | [`limits`] | every limit, with its reason |

pub mod bench;
pub mod commands;
pub mod format;
pub mod limits;
pub mod measure;
pub mod pump;
pub mod redis;
pub mod report;
pub mod session;
pub mod soak;
