//! Work queues that hold anything, between queue pairs of one host.

use super::{Input, World};

/// Two users write what `bytes` tell them into their queues.
///
/// # Panics
/// If anything of what [`crate::checks`] lists does not hold.
pub fn workqueue(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut world = World::new(bytes, None, None);
    while world.step(&mut input).is_some() {}
    world.end();
}
