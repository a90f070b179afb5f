//! Connection management against peers and an application that do anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hyv_host::cm::checks::conversation(bytes));
