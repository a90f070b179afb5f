//! What the fuzz target `control` checks, over the inputs that it starts from and those that once broke something, and over new
//! ones.

use std::hash::{BuildHasher, Hasher};
use std::path::Path;

use hyv_host::backend::checks;

/// Runs the check, and says which input broke it.
fn check(bytes: &[u8], what: &dyn std::fmt::Display) {
    if let Err(panic) = std::panic::catch_unwind(|| checks::control(bytes)) {
        eprintln!("input: {what}");
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn control() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/control");
    let mut inputs = 0;
    for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
    {
        let path = entry.unwrap().path();
        check(&std::fs::read(&path).unwrap(), &path.display());
        inputs += 1;
    }
    assert!(inputs > 0, "no input in {}", folder.display());
}

/// `HYV_SEED` repeats one.
#[test]
fn random_control_queues() {
    let seed = std::env::var("HYV_SEED").ok().map_or_else(
        || {
            let state = std::collections::hash_map::RandomState::new();
            state.build_hasher().finish()
        },
        |s| {
            u64::from_str_radix(s.trim_start_matches("0x"), 16)
                .expect("HYV_SEED is a hexadecimal number")
        },
    );
    println!("seed {seed:#x}");
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    };
    for i in 0..200 {
        let len = next() % 900;
        let bytes: Vec<u8> = (0..len).map(|_| next() as u8).collect();
        check(&bytes, &format_args!("number {i} of seed {seed:#x}"));
    }
}
