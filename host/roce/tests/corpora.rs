//! What the fuzz targets check, over the inputs that they start from and those that once broke something.

use std::path::Path;

use hyv_roce::checks;

fn run(target: &str, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let mut inputs = 0;
    for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
    {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        // So that a failure names its input.
        if let Err(panic) = std::panic::catch_unwind(|| check(&bytes)) {
            eprintln!("input: {}", path.display());
            std::panic::resume_unwind(panic);
        }
        inputs += 1;
    }
    assert!(inputs > 0, "no input in {}", folder.display());
}

#[test]
fn packet() {
    run("packet", checks::packet);
}

#[test]
fn mad() {
    run("mad", checks::mad);
}

#[test]
fn frames() {
    run("frames", checks::frames);
}

#[test]
fn capture() {
    run("capture", checks::capture);
}
