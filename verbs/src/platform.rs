//! What the verbs need from their surroundings.
#![allow(
    unsafe_code,
    reason = "the trait's contract cannot be checked: its implementations hand out shared memory"
)]

use core::alloc::Layout;
use core::ptr::NonNull;

use hyv_abi::window::Window;

/// `hyv-host` does not live any more: no verb and no work request will be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostGone;

impl core::fmt::Display for HostGone {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(
            "hyv-host has ended or no longer answers: start it again, and then this program",
        )
    }
}

impl core::error::Error for HostGone {}

/// A user's surroundings: the unikernel, a Linux process, a client inside hyv-host, or a test.
///
/// # Safety
/// The verbs hand RAM offsets of [`alloc_dma`](Platform::alloc_dma) memory to a device that reads and writes there.
/// An implementation guarantees, as long as it lives:
/// - the [`Window`] stays where it is, mapped and shared with the host;
/// - memory from `alloc_dma` is readable, writable, zeroed, exclusive to the caller until `free_dma`, stays
///   mapped even after that, and lies in RAM that the device reaches at the offsets that `ram_offset` gives;
/// - `ram_offset` answers `Some` only if all of the range is such shared RAM, contiguous in it.
pub unsafe trait Platform: Send + Sync {
    /// The window; the same for the platform's life.
    fn window(&self) -> &Window;

    /// RAM offset of `len` bytes at `ptr`, or `None` if any of them is not in shared RAM.
    fn ram_offset(&self, ptr: *const u8, len: usize) -> Option<u64>;

    /// Zeroed memory in shared RAM, or `None` if there is not enough. `layout` is not empty.
    fn alloc_dma(&self, layout: Layout) -> Option<NonNull<u8>>;

    /// Gives memory back.
    ///
    /// # Safety
    /// `ptr` came from `alloc_dma` of this platform with the same layout, and neither the device nor the program
    /// uses it any more.
    unsafe fn free_dma(&self, ptr: NonNull<u8>, layout: Layout);

    /// Rings doorbell vector `vector` of the host ([`hyv_abi::window::KICK_CONTROL`] or `KICK_DATA`).
    fn kick(&self, vector: u32);

    /// One turn of a wait loop: a spin hint; may give way to others, drive an inline engine, and look whether
    /// the host lives.
    ///
    /// # Errors
    /// [`HostGone`].
    fn relax(&self) -> Result<(), HostGone>;

    /// How many wake-ups were noticed so far; for [`wait`](Platform::wait).
    fn wake_seen(&self) -> u64;

    /// Sleeps until a wake-up newer than `seen`, until `timeout_ns` passed, or spuriously. Returns at once if one
    /// came since `seen` was read.
    ///
    /// # Errors
    /// [`HostGone`].
    fn wait(&self, seen: u64, timeout_ns: Option<u64>) -> Result<(), HostGone>;

    /// Monotonic time in ns, of any zero.
    fn now_ns(&self) -> u64;
}
