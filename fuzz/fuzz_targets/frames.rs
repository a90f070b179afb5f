//! IP packets, into the analysis of captures.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hyv_roce::checks::frames(bytes));
