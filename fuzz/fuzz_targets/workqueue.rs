//! Two users' work queues that hold anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hyv_rnic::checks::workqueue(bytes));
