//! Turns a `fn main` into an image.

use core::fmt::Display;

/// What `main` may return.
pub trait Outcome {
    /// The exit code; an error is logged.
    fn code(self) -> i32;
}

impl Outcome for () {
    fn code(self) -> i32 {
        0
    }
}

impl Outcome for i32 {
    fn code(self) -> i32 {
        self
    }
}

impl<E: Display> Outcome for Result<(), E> {
    fn code(self) -> i32 {
        match self {
            Ok(()) => 0,
            Err(e) => {
                log::error!("{e}");
                1
            }
        }
    }
}

/// Makes `main` (a `fn() -> impl Outcome`) the application of this image. Once per image, at the top of
/// its root module,
/// which is `#![no_std]` and `#![no_main]`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[allow(
            unsafe_code,
            reason = "the runtime calls the application by this symbol"
        )]
        #[unsafe(no_mangle)]
        extern "C" fn hyv_main() -> i32 {
            $crate::run($main)
        }
    };
}

/// Runs an application; for [`entry!`](crate::entry).
#[doc(hidden)]
pub fn run<T: Outcome>(main: fn() -> T) -> i32 {
    main().code()
}
