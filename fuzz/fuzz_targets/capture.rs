//! A capture file, pcap or pcapng.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hyv_roce::checks::capture(bytes));
