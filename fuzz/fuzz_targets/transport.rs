//! Packets that say anything, at queue pairs with requests of their own.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hyv_rnic::checks::transport(bytes));
