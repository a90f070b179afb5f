//! The guest as surroundings of the verbs: `Context::open(Guest)` and the like.
#![allow(
    unsafe_code,
    reason = "promises the verbs that memory of the heap is what the device reaches"
)]

use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ptr::NonNull;
use core::time::Duration;

use hyv_abi::window::Window;
use hyv_verbs::{HostGone, Platform};

use crate::time::{Instant, now_ns};
use crate::{layout, memory, rt};

/// From this size on memory is not taken from the heap.
const LARGE: usize = crate::layout::LARGE_PAGE as usize;

/// This guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guest;

// SAFETY: the window is mapped by link-time tables and never moves; all RAM is one file that the host
// maps, at offsets that are
// virtual addresses, and stays mapped for good; the heap lies in it.
unsafe impl Platform for Guest {
    fn window(&self) -> &Window {
        rt::window()
    }

    fn ram_offset(&self, ptr: *const u8, len: usize) -> Option<u64> {
        let start = ptr.addr() as u64;
        let end = start.checked_add(len as u64)?;
        let stack = layout::MAIN_STACK_BOTTOM..=layout::MAIN_STACK_TOP;
        let ram = layout::IMAGE_TEXT..=memory::ram_end();
        let inside = |r: core::ops::RangeInclusive<u64>| r.contains(&start) && r.contains(&end);
        (inside(stack) || inside(ram)).then_some(start)
    }

    fn alloc_dma(&self, layout: Layout) -> Option<NonNull<u8>> {
        // Large regions come from RAM that nobody touched: already zero, on large pages, and not from the heap's share.
        if layout.size() >= LARGE && layout.align() <= LARGE {
            return memory::take(layout.size()).map(|m| NonNull::from(m).cast());
        }
        // SAFETY: the trait says that the layout is not empty.
        NonNull::new(unsafe { alloc_zeroed(layout) })
    }

    unsafe fn free_dma(&self, ptr: NonNull<u8>, layout: Layout) {
        // A large region was given for good: appliances make theirs once.
        if layout.size() >= LARGE && layout.align() <= LARGE {
            return;
        }
        // SAFETY: the caller's promise is that of `dealloc`: `alloc_dma` took it from the same heap.
        unsafe { dealloc(ptr.as_ptr(), layout) };
    }

    fn kick(&self, vector: u32) {
        rt::kick(vector);
    }

    fn relax(&self) -> Result<(), HostGone> {
        core::hint::spin_loop();
        // Ends the guest rather than to report a host that is gone: nobody is left to hear it.
        rt::check_host();
        Ok(())
    }

    fn wake_seen(&self) -> u64 {
        rt::wake_count()
    }

    fn wait(&self, seen: u64, timeout_ns: Option<u64>) -> Result<(), HostGone> {
        rt::wait(
            seen,
            timeout_ns.map(|t| Instant::now() + Duration::from_nanos(t)),
        );
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        now_ns()
    }
}
