//! Measuring a store: workloads, and stores to run them on.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`workload`] | YCSB's workloads and a mix of reads and writes, as operations that are drawn |
//! | [`random`] | request distributions, names of records |
//! | [`target`] | what a workload asks of a store |
//! | [`rpc`] | this project's store, over verbs |
//! | [`slice`] | runs what was drawn, and takes the time |
//! | [`report`] | what was found out |
//! | [`filled`] | what was found out about a store whose log is filled to some share |
//! | [`lines`] | cache lines that go from one core to the other for an operation |
//! | [`limits`] | every limit, with its reason |

pub mod filled;
pub mod limits;
pub mod lines;
pub mod random;
pub mod report;
pub mod rpc;
pub mod slice;
pub mod target;
pub mod workload;
