//! A transport packet, from BTH to ICRC.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hyv_roce::checks::packet(bytes));
