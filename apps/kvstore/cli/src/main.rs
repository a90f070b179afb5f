//! Placeholder, replaced by the crate.
fn main() {}
