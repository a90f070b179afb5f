//! A management datagram of class CM.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hyv_roce::checks::mad(bytes));
