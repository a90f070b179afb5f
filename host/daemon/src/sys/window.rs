//! The window of one user: a memory file of its own, mapped.
#![allow(unsafe_code, reason = "views shared memory as the window's structure")]

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hyv_abi::window::{WINDOW_LEN, Window};

use super::memory::{Mapping, MemoryError, sealed_memfd};

/// A [`Window`] in a sealed memory file. Every field of it is atomic, so it can be shared with anyone.
#[derive(Debug)]
pub struct SharedWindow {
    mapping: Mapping,
    fd: OwnedFd,
}

impl SharedWindow {
    /// Creates a zeroed window.
    ///
    /// # Errors
    /// As [`sealed_memfd`] and [`Mapping::new`].
    pub fn create() -> Result<Self, MemoryError> {
        let fd = sealed_memfd("hyv-window", WINDOW_LEN as u64)?;
        let mapping = Mapping::new(&fd, WINDOW_LEN as u64)?;
        Ok(Self { mapping, fd })
    }

    /// The memory behind it.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }
}

impl AsFd for SharedWindow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Deref for SharedWindow {
    type Target = Window;

    fn deref(&self) -> &Window {
        // SAFETY: the mapping is WINDOW_LEN bytes (the size of `Window`, asserted in its crate), 2 MiB-aligned, and
        // lives as long as `self`; `Window` is made of atomics only, so any contents and any concurrent writer are sound.
        unsafe { &*self.mapping.as_ptr().cast::<Window>() }
    }
}
