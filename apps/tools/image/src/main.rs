//! The RDMA tools as an appliance.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::string::String;

hyv_unikernel::entry!(main);

fn main() -> Result<(), String> {
    Ok(())
}
