//! One image, many tests: `test=NAME` on the command line chooses. See README.md for each test's protocol.
#![no_std]
#![no_main]

extern crate alloc;

mod faults;
mod host;
mod machine;
mod memory;
mod net;

use alloc::string::String;

use hyv_unikernel::log::info;
use hyv_unikernel::rt;

hyv_unikernel::entry!(main);

/// What a test says of itself.
type Verdict = Result<(), String>;

fn main() -> i32 {
    let Some(name) = rt::args().get("test") else {
        hyv_unikernel::log::error!("say test=NAME");
        return 2;
    };
    let verdict = match name {
        "hello" => machine::hello(),
        "exit" => return machine::exit_code(),
        "args" => machine::args(),
        "time" => machine::time(),
        "mem" => memory::functions(),
        "heap" => memory::heap(),
        "oom" => memory::exhaust(),
        "big" => memory::big(),
        "rest" => memory::rest(),
        "copyspeed" => memory::speed(),
        "wake" => host::wake(),
        "sleep" => host::sleep(),
        "atomics" => host::atomics(),
        "logflood" => host::log_flood(),
        "shutdown" => host::shutdown(),
        "hostlost" => host::host_lost(),
        "kicks" => host::kicks(),
        "spin" => host::spin(),
        "netserve" => net::serve(),
        "netcalls" => net::calls(),
        "netnone" => net::none(),
        other => faults::run(other),
    };
    match verdict {
        Ok(()) => {
            info!("pass {name}");
            0
        }
        Err(why) => {
            hyv_unikernel::log::error!("fail {name}: {why}");
            1
        }
    }
}
