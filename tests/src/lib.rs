//! What the end-to-end tests are written in: a case is a few lines.
//!
//! | piece | what it is |
//! | --- | --- |
//! | [`Sandbox`] | a runtime folder of a test's own: its instances meet no other's, and nothing outlives it |
//! | [`Running`], [`Run`] | a command under a time limit, and what it said |
//! | [`Appliance`] | a store in a guest, started by the command that users type |
//! | [`Accelerator`], [`on_each_accelerator!`] | the same case under KVM and TCG |
//! | [`linux`] | a real RoCEv2 peer in a network of the test's own |
//! | [`records`] | records of every size and their files |
//!
//! The programs come from the variables that the build command sets (`HYV_KV`, `HYV_HOST`, `HYV_IMAGE`,
//! `HYV_TEST_IMAGE`), or else from the repository's `target/`.

mod accelerator;
mod appliance;
mod limits;
pub mod linux;
pub mod programs;
mod random;
pub mod records;
mod run;
mod sandbox;

pub use accelerator::Accelerator;
pub use appliance::Appliance;
pub use random::{Random, seed};
pub use run::{Run, Running};
pub use sandbox::Sandbox;

use std::time::{Duration, Instant};

/// Time for anything that takes well under a second on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `done`; `what` names it if it does not come.
///
/// # Panics
/// When [`PATIENCE`] is over.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < PATIENCE,
            "after {PATIENCE:?} still not: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
