//! Where things are.

use std::path::{Path, PathBuf};

/// Folders of the repository and of what is built from it.
pub struct Paths {
    /// The repository.
    pub root: PathBuf,
    /// Cargo's target folder for host code; those below it are for what is built with other flags.
    pub target: PathBuf,
}

impl Paths {
    /// From where this program was built, and cargo's own variable for the target folder.
    pub fn find() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .unwrap_or(Path::new("/"));
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        // Cargo runs in the root, other programs in the caller's folder: it has to mean one place.
        let target = std::path::absolute(&target).unwrap_or(target);
        Self {
            root: root.to_owned(),
            target,
        }
    }

    /// A host program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.target.join("release").join(name)
    }

    /// Cargo's target folder for guest code.
    pub fn guest_target(&self) -> PathBuf {
        self.target.join("guest")
    }

    /// Cargo's target folder for code built for loom.
    pub fn loom_target(&self) -> PathBuf {
        self.target.join("loom")
    }

    /// Where images lie: `NAME.elf`, and `NAME.sym.elf` with its symbols.
    pub fn images(&self) -> PathBuf {
        self.target.join("image")
    }

    /// What programs and tests are told.
    pub fn environment(&self) -> [(&'static str, PathBuf); 7] {
        [
            ("HYV_KV", self.program("kv")),
            ("HYV_TOOLS", self.program("hyv-tools")),
            ("HYV_TOOLS_IMAGE", self.images().join("hyv-tools.elf")),
            ("HYV_HOST", self.program("hyv-host")),
            ("HYV_IMAGE", self.images().join("kvstore.elf")),
            ("HYV_TEST_IMAGE", self.images().join("hyv-test.elf")),
            ("HYV_IMAGE_DIR", self.images()),
        ]
    }
}
