//! Guest and host, each by a cargo call of its own: their triples are the same, their flags are not.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::paths::Paths;
use crate::{cargo, elf};

/// The triple of guests: the host's own, whose prebuilt `core` and `alloc` use vector registers.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Packages that are built for guests only.
pub const GUEST_PACKAGES: [&str; 4] = [
    "hyv-unikernel",
    "kvstore-image",
    "hyv-tools-image",
    "hyv-test-images",
];

/// The store's image.
pub const KVSTORE_IMAGE: &[&str] = &["kvstore-image"];

/// The tools' image.
pub const TOOLS_IMAGE: &[&str] = &["hyv-tools-image"];

/// Every package whose programs are images.
pub const IMAGES: &[&str] = &["kvstore-image", "hyv-tools-image", "hyv-test-images"];

/// A host program: its package and its name.
pub type HostProgram = (&'static str, &'static str);

/// The store's command line.
pub const KV: HostProgram = ("kvstore-cli", "kv");

/// The RDMA tools.
pub const TOOLS: HostProgram = ("hyv-tools-cli", "hyv-tools");

/// The launcher of any image.
pub const HYV_HOST: HostProgram = ("hyv-host", "hyv-host");

/// What rustc is told for guest code. This is the only place.
fn guest_flags(root: &Path) -> Vec<String> {
    let script = root.join("linker/image.ld");
    [
        // AVX2 and BMI; the boot code checks for them before it uses any.
        "-Ctarget-cpu=x86-64-v3",
        // One address space, laid out at link time.
        "-Crelocation-model=static",
        "-Clink-arg=-nostdlib",
        "-Clink-arg=-nostartfiles",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        // Two arguments, and no -Wl, because that would split a path with a comma.
        "-Clink-arg=-T",
        &format!("-Clink-arg={}", script.display()),
        "-Clink-arg=-Wl,--build-id=none",
        "-Clink-arg=-Wl,-z,noexecstack",
        // Backtraces follow frame pointers: there is no unwinder.
        "-Cforce-frame-pointers=yes",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// `cargo SUBCOMMAND` for guest code.
pub fn guest_cargo(paths: &Paths, subcommand: &str) -> Command {
    let mut command = cargo::cargo(&paths.root);
    command.args([
        subcommand,
        "--target",
        TARGET,
        "--profile",
        "image",
        "--target-dir",
    ]);
    command.arg(paths.guest_target());
    // Of all ways to give flags this one alone is not merged with what a user's own cargo
    // configuration has for this triple (a linker that knows no scripts, say). With --target given,
    // cargo keeps it away from build scripts and proc macros.
    command.env(
        "CARGO_ENCODED_RUSTFLAGS",
        guest_flags(&paths.root).join("\x1f"),
    );
    command
}

/// Builds the images of `packages`: of a program `NAME` or `NAME-image`, `NAME.elf` to boot and
/// `NAME.sym.elf` with its symbols.
pub fn images(paths: &Paths, packages: &[&str]) -> Result<()> {
    let folder = paths.images();
    if !folder.exists() {
        eprintln!("Building the guest's image (the first time this takes a while)");
    }
    let mut programs = Vec::new();
    for package in packages {
        // Each by itself: features that another image asks for must not change this one.
        let mut command = guest_cargo(paths, "build");
        command.args(["-p", package]);
        let made = cargo::build(command, package)?;
        if made.is_empty() {
            bail!("cargo made no image of {package}");
        }
        programs.extend(made);
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for program in programs {
        let name = program
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let name = name.strip_suffix("-image").unwrap_or(name);
        let whole =
            fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
        let small =
            elf::stripped(&whole).with_context(|| format!("cannot strip {}", program.display()))?;
        // Symbols first: whoever finds the image finds its symbols.
        replace(&folder.join(format!("{name}.sym.elf")), &whole)?;
        replace(&folder.join(format!("{name}.elf")), &small)?;
    }
    Ok(())
}

/// Puts `bytes` in `path` whole, unless they are there already: a guest that starts at this moment
/// reads the old image or the new one.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
        file.write_all(bytes)?;
        file.persist(path).map_err(|error| error.error)?;
        // The temporary file was for its owner alone; an image is for whoever may read the folder.
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644))
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Builds a host program, optimised.
pub fn host_program(paths: &Paths, (package, name): HostProgram) -> Result<()> {
    if !paths.program(name).exists() {
        eprintln!("Building {name} (the first time this takes a while)");
    }
    let mut command = cargo::cargo(&paths.root);
    command.args([
        "build",
        "--release",
        "-p",
        package,
        "--bin",
        name,
        "--target-dir",
    ]);
    command.arg(&paths.target);
    let programs = cargo::build(command, name)?;
    if !programs.contains(&paths.program(name)) {
        // A triple in the user's cargo configuration puts programs elsewhere.
        let found = programs
            .first()
            .with_context(|| format!("cargo made no {name}"))?;
        let bytes = fs::read(found).with_context(|| format!("cannot read {}", found.display()))?;
        fs::create_dir_all(paths.target.join("release")).context("cannot create target/release")?;
        replace(&paths.program(name), &bytes)?;
        fs::set_permissions(
            paths.program(name),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
    }
    Ok(())
}

/// All images and host programs.
pub fn everything(paths: &Paths) -> Result<()> {
    images(paths, IMAGES)?;
    host_program(paths, KV)?;
    host_program(paths, TOOLS)?;
    host_program(paths, HYV_HOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_left_alone_if_equal() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        replace(&path, b"one").unwrap();
        let first = fs::metadata(&path).unwrap().modified().unwrap();
        replace(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), first);
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
        let error = replace(&folder.path().join("no/image"), b"x").unwrap_err();
        assert!(error.to_string().contains("no/image"));
    }

    #[test]
    fn guest_flags_hold_a_path_with_blanks_and_commas() {
        let flags = guest_flags(Path::new("/a b,c"));
        assert!(flags.contains(&"-Clink-arg=/a b,c/linker/image.ld".to_owned()));
        assert!(flags.iter().all(|flag| !flag.contains('\x1f')));
    }
}
