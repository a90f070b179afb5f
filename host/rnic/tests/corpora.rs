//! What the fuzz targets check, over the inputs that they start from and those that once broke something, and over new ones.

use std::hash::{BuildHasher, Hasher};
use std::path::Path;

use hyv_rnic::checks;

/// Runs a check, and says which input broke it.
fn check(check: fn(&[u8]), bytes: &[u8], what: &dyn std::fmt::Display) {
    if let Err(panic) = std::panic::catch_unwind(|| check(bytes)) {
        eprintln!("input: {what}");
        std::panic::resume_unwind(panic);
    }
}

fn run(target: &str, f: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let mut inputs = 0;
    for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
    {
        let path = entry.unwrap().path();
        check(f, &std::fs::read(&path).unwrap(), &path.display());
        inputs += 1;
    }
    assert!(inputs > 0, "no input in {}", folder.display());
}

/// `HYV_SEED` repeats one.
fn random(f: fn(&[u8])) {
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
    for i in 0..300 {
        let len = next() % 900;
        let bytes: Vec<u8> = (0..len).map(|_| next() as u8).collect();
        check(f, &bytes, &format_args!("number {i} of seed {seed:#x}"));
    }
}

#[test]
fn workqueue() {
    run("workqueue", checks::workqueue);
}

#[test]
fn transport() {
    run("transport", checks::transport);
}

#[test]
fn random_workqueues() {
    random(checks::workqueue);
}

#[test]
fn random_transports() {
    random(checks::transport);
}
