//! The HyV function as the guest sees it: a window and doorbells, whatever device carries them.

use core::sync::atomic::{AtomicBool, Ordering};

use hyv_abi::window::Window;

use crate::ivshmem::Ivshmem;

/// A device that carries the HyV interface. [`Ivshmem`](crate::function) under any QEMU is the one there is.
pub trait Function: Sync {
    /// The window shared with the host.
    fn window(&self) -> &'static Window;

    /// Rings doorbell `vector` at the host (`KICK_CONTROL`, `KICK_DATA`). All stores before it are
    /// visible to the
    /// host when it hears of it. Costs some microseconds.
    fn kick(&self, vector: u32);
}

static IVSHMEM: Ivshmem = Ivshmem;
static ATTACHED: AtomicBool = AtomicBool::new(false);

/// Finds the function and makes it usable. Called once, at boot.
pub(crate) fn attach() -> Result<(), &'static str> {
    IVSHMEM.attach()?;
    ATTACHED.store(true, Ordering::Release);
    Ok(())
}

/// The function, once boot has found it; always there when the application runs.
#[must_use]
pub fn get() -> Option<&'static dyn Function> {
    ATTACHED
        .load(Ordering::Acquire)
        .then_some(&IVSHMEM as &dyn Function)
}
