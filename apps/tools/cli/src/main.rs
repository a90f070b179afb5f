//! The `hyv-tools` command.

fn main() {}
