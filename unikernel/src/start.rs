//! From the first instruction in ring 3 to the application's `main`.
#![allow(
    unsafe_code,
    reason = "reads what the loader left in memory; jumps here come from assembly"
)]

use core::arch::x86_64::__cpuid_count;
use core::fmt::{Display, Write};
use core::slice;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, Ordering::Relaxed};

use hyv_abi::window::UserState;
use log::LevelFilter;

use crate::rt::{self, Args};
use crate::{com1, function, limits, logring, memory, nucleus, paging, time, window};

static ARGS: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
static ARGS_LEN: AtomicUsize = AtomicUsize::new(0);
static RAM_LEN: AtomicU64 = AtomicU64::new(0);

/// The first word of a PVH start info.
const START_MAGIC: u32 = 0x336e_c578;
/// Where a loader may have put start info and command line: below 1 MiB, as `asm/boot.s` maps it.
const LOADER_AREAS: [core::ops::Range<u64>; 3] =
    [0x1000..0x4_0000, 0x8_0000..0xa_0000, 0xc_0000..0x10_0000];

unsafe extern "C" {
    /// The application; [`entry!`](crate::entry) defines it.
    safe fn hyv_main() -> i32;
}

/// Start of ring 3: `start_info` is the address that the loader passed.
#[unsafe(no_mangle)]
extern "C" fn hyv_runtime_start(start_info: u64) -> ! {
    if let Err((what, why)) = set_up(start_info) {
        fail(what, &why);
    }
    let user = &rt::window().user;
    user.state
        .store(UserState::Running as u32, Ordering::Release);
    let code = hyv_main();
    rt::exit(code)
}

/// Before there is anything else: a line on COM1, and the end.
fn fail(what: &str, why: &dyn Display) -> ! {
    let _ = writeln!(com1::Com1, "hyv: {what}: {why}");
    rt::end(UserState::Panicked, rt::EXIT_BOOT)
}

/// An error of set-up: one of our own words or the window's.
enum Why {
    Text(&'static str),
    Window(window::WindowError),
}

impl Display for Why {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Text(t) => f.write_str(t),
            Self::Window(w) => w.fmt(f),
        }
    }
}

fn set_up(start_info: u64) -> Result<(), (&'static str, Why)> {
    let text = |what| move |why| (what, Why::Text(why));
    time::mark_start();
    let args = read_args(start_info).map_err(text("arguments"))?;
    ARGS.store(args.as_ptr().cast_mut(), Relaxed);
    ARGS_LEN.store(args.len(), Relaxed);
    choose_copies().map_err(text("hyv.rep"))?;
    function::attach().map_err(text("HyV function"))?;
    let w = rt::window();
    let boot = window::check(&w.header).map_err(|e| ("window", Why::Window(e)))?;
    w.user.state.store(UserState::Booting as u32, Relaxed);
    time::init(boot.tsc_hz, boot.realtime_ns).map_err(text("clock"))?;
    paging::map_ram(boot.regions(), boot.ram_len).map_err(text("RAM"))?;
    memory::init(boot.ram_len).map_err(text("RAM"))?;
    RAM_LEN.store(boot.ram_len, Relaxed);
    logring::init(log_level().map_err(text("hyv.log"))?);
    Ok(())
}

fn log_level() -> Result<LevelFilter, &'static str> {
    match rt::args().get("hyv.log") {
        None => Ok(LevelFilter::Info),
        Some(l) => l
            .parse()
            .map_err(|_| "not a level: off, error, warn, info, debug or trace"),
    }
}

/// The bytes from `at` to the end of the loader's area that holds it.
fn loader_bytes(at: u64) -> Option<&'static [u8]> {
    let area = LOADER_AREAS.iter().find(|a| a.contains(&at))?;
    // SAFETY: the area is mapped read-only RAM or ROM, and nothing writes it after the loader.
    Some(unsafe { slice::from_raw_parts(at as *const u8, (area.end - at) as usize) })
}

fn read_args(start_info: u64) -> Result<&'static str, &'static str> {
    let info = loader_bytes(start_info)
        .and_then(|b| b.first_chunk::<32>())
        .ok_or("start info is out of reach")?;
    let magic = u32::from_le_bytes([info[0], info[1], info[2], info[3]]);
    if magic != START_MAGIC {
        return Err("this is no PVH start info");
    }
    let (_, at) = info.split_last_chunk::<8>().ok_or("start info is cut")?;
    let at = u64::from_le_bytes(*at);
    if at == 0 {
        return Ok("");
    }
    let bytes = loader_bytes(at).ok_or("the command line is out of reach")?;
    let bytes = &bytes[..bytes.len().min(limits::MAX_ARGS + 1)];
    let len = bytes
        .iter()
        .position(|&b| b == 0)
        .ok_or("the command line is longer than 4096 bytes")?;
    core::str::from_utf8(&bytes[..len]).map_err(|_| "the command line is not UTF-8")
}

pub(crate) fn args() -> Args {
    let at = ARGS.load(Relaxed);
    if at.is_null() {
        return Args::new("");
    }
    // SAFETY: the pair came from one &'static str, and is stored once.
    let bytes = unsafe { slice::from_raw_parts(at, ARGS_LEN.load(Relaxed)) };
    Args::new(core::str::from_utf8(bytes).unwrap_or(""))
}

pub(crate) fn ram_len() -> u64 {
    RAM_LEN.load(Relaxed)
}

/// String instructions are the fastest way to copy much where the CPU says so, and slow under TCG,
/// which says so too.
/// `hyv.rep=BYTES` overrules.
fn choose_copies() -> Result<(), &'static str> {
    if let Some(bytes) = rt::args().get("hyv.rep") {
        nucleus::set_rep_min(bytes.parse().map_err(|_| "not a number of bytes")?);
        return Ok(());
    }
    let erms = __cpuid_count(7, 0).ebx & 1 << 9 != 0;
    if erms && !time::is_hypervisor(b"TCGTCGTCGTCG") {
        nucleus::set_rep_min(limits::REP_MIN);
    }
    Ok(())
}
