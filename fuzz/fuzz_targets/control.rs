//! A control queue that holds anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hyv_host::backend::checks::control(bytes));
