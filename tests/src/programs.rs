//! Where the programs and images under test are.

use std::path::{Path, PathBuf};

/// The repository.
#[must_use]
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}

fn find(variable: &str, usual: &str) -> PathBuf {
    let path =
        std::env::var_os(variable).map_or_else(|| root().join("target").join(usual), PathBuf::from);
    assert!(
        path.is_file(),
        "{variable}: {} is not there; build it with ./run.sh build",
        path.display()
    );
    path
}

/// The store's command line.
#[must_use]
pub fn kv() -> PathBuf {
    find("HYV_KV", "release/kv")
}

/// The launcher of any image.
#[must_use]
pub fn hyv_host() -> PathBuf {
    find("HYV_HOST", "release/hyv-host")
}

/// The store's image.
#[must_use]
pub fn image() -> PathBuf {
    find("HYV_IMAGE", "image/kvstore.elf")
}

/// The image of many tests.
#[must_use]
pub fn test_image() -> PathBuf {
    find("HYV_TEST_IMAGE", "image/hyv-test.elf")
}

/// The tools' command line.
#[must_use]
pub fn tools() -> PathBuf {
    find("HYV_TOOLS", "release/hyv-tools")
}

/// The tools' image.
#[must_use]
pub fn tools_image() -> PathBuf {
    find("HYV_TOOLS_IMAGE", "image/hyv-tools.elf")
}
