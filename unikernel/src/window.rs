//! The window's header: read once, checked, and kept.

use core::fmt;

use hyv_abi::ABI_VERSION;
use hyv_abi::window::{Header, MAGIC, MAX_REGIONS, WINDOW_LEN};

use core::sync::atomic::Ordering::{Acquire, Relaxed};

use crate::{layout, limits};

/// One piece of RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset in the RAM file, which is also its virtual address.
    pub file_offset: u64,
}

/// What the header says, checked.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// Differs for every user of one host.
    pub generation: u32,
    /// Bytes of RAM.
    pub ram_len: u64,
    /// TSC ticks per second, or 0 where the guest must find out.
    pub tsc_hz: u64,
    /// Wall clock when the host filled the window, ns since 1970.
    pub realtime_ns: u64,
    regions: [Region; MAX_REGIONS],
    num_regions: usize,
}

impl Boot {
    /// RAM, ascending by file offset, without gaps.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions[..self.num_regions]
    }
}

/// Why a window cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowError {
    /// The first word is not the magic number.
    Magic(u64),
    /// Another version of the contract.
    Version(u32),
    /// Another size than this image was built for.
    Length(u64),
    /// The table of RAM regions contradicts itself.
    Regions(&'static str),
    /// Too little RAM.
    TooSmall(u64),
    /// More RAM than the page pool can map.
    TooLarge(u64),
}

impl fmt::Display for WindowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Magic(m) => write!(
                f,
                "the window begins with {m:#x}: it is not hyv-host's, or not ready"
            ),
            Self::Version(v) => {
                write!(
                    f,
                    "hyv-host speaks version {v}, this image {ABI_VERSION}: build both from one tree"
                )
            }
            Self::Length(n) => write!(f, "the window is {n} bytes long, not {WINDOW_LEN}"),
            Self::Regions(why) => write!(f, "the window's table of RAM is wrong: {why}"),
            Self::TooSmall(n) => {
                write!(
                    f,
                    "{n} bytes of RAM are too few: give the guest {} MiB or more",
                    limits::MIN_RAM >> 20
                )
            }
            Self::TooLarge(n) => {
                write!(
                    f,
                    "{n} bytes of RAM are too many: this runtime maps {} GiB",
                    limits::MAX_RAM_GIB
                )
            }
        }
    }
}

impl core::error::Error for WindowError {}

/// Reads and checks a header.
///
/// # Errors
/// Anything that this image cannot live with; see [`WindowError`].
pub fn check(header: &Header) -> Result<Boot, WindowError> {
    let magic = header.magic.load(Acquire);
    if magic != MAGIC {
        return Err(WindowError::Magic(magic));
    }
    let version = header.version.load(Relaxed);
    if version != ABI_VERSION {
        return Err(WindowError::Version(version));
    }
    let len = header.window_len.load(Relaxed);
    if len != WINDOW_LEN as u64 {
        return Err(WindowError::Length(len));
    }
    let num_regions = header.num_regions.load(Relaxed) as usize;
    if num_regions == 0 || num_regions > MAX_REGIONS {
        return Err(WindowError::Regions("their number"));
    }
    let ram_len = header.ram_len.load(Relaxed);
    if ram_len < limits::MIN_RAM {
        return Err(WindowError::TooSmall(ram_len));
    }
    if ram_len > limits::MAX_RAM_GIB * layout::GIB {
        return Err(WindowError::TooLarge(ram_len));
    }
    let mut regions = [Region::default(); MAX_REGIONS];
    let mut end = 0;
    for (to, from) in regions.iter_mut().zip(&header.regions[..num_regions]) {
        *to = Region {
            guest_addr: from.guest_addr.load(Relaxed),
            len: from.len.load(Relaxed),
            file_offset: from.file_offset.load(Relaxed),
        };
        if to.file_offset != end {
            return Err(WindowError::Regions("they leave a gap or overlap"));
        }
        if !to.guest_addr.is_multiple_of(layout::LARGE_PAGE)
            || !end.is_multiple_of(layout::LARGE_PAGE)
        {
            return Err(WindowError::Regions(
                "a region does not begin at a multiple of 2 MiB",
            ));
        }
        end = end
            .checked_add(to.len)
            .ok_or(WindowError::Regions("a length overflows"))?;
    }
    if end != ram_len {
        return Err(WindowError::Regions("their lengths do not add up"));
    }
    if regions[0].guest_addr != 0 || regions[0].len < ram_len.min(layout::GIB) {
        return Err(WindowError::Regions(
            "the first GiB is not where the guest was linked",
        ));
    }
    Ok(Boot {
        generation: header.generation.load(Relaxed),
        ram_len,
        tsc_hz: header.tsc_hz.load(Relaxed),
        realtime_ns: header.realtime_ns.load(Relaxed),
        regions,
        num_regions,
    })
}
