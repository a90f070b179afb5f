//! What a peer boots: a kernel and a first file system, made once of Debian's packages.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::Skip;
use super::cpio::Archive;
use super::packages::{self, Package, said};
use crate::programs;

/// The kernel, which pulls in the version that is current; and what runs on it.
const PACKAGES: [&str; 10] = [
    "linux-image-amd64",
    "busybox-static",
    "dash",
    "rdma-core",
    "ibverbs-utils",
    "ibverbs-providers",
    "rdmacm-utils",
    "perftest",
    "iproute2",
    "kmod",
];

/// Programs, whichever folder of a package they lie in. Here they go to `/usr/sbin`, which comes first.
/// busybox's own shell would take its own `ip` and `tc` wherever others are.
const PROGRAMS: [&str; 23] = [
    "dash",
    "ip",
    "tc",
    "rdma",
    "ibv_devices",
    "ibv_devinfo",
    "ibv_rc_pingpong",
    "ibv_uc_pingpong",
    "ibv_ud_pingpong",
    "ibv_srq_pingpong",
    "ibv_xsrq_pingpong",
    "rping",
    "udaddy",
    "rdma_client",
    "rdma_server",
    "ib_send_lat",
    "ib_send_bw",
    "ib_write_lat",
    "ib_write_bw",
    "ib_read_lat",
    "ib_read_bw",
    "ib_atomic_lat",
    "ib_atomic_bw",
];

/// Modules and, by `modules.dep`, what they need. rxe wants a CRC-32 that nothing names.
const MODULES: [&str; 23] = [
    "virtio_pci",
    "virtio_net",
    "af_packet",
    "crc32_generic",
    "crc32_pclmul",
    "crc32c_generic",
    "crc32c_intel",
    "ib_core",
    "ib_uverbs",
    "ib_umad",
    "ib_cm",
    "rdma_cm",
    "rdma_ucm",
    "udp_tunnel",
    "ip6_udp_tunnel",
    "rdma_rxe",
    "sch_netem",
    "sch_prio",
    "sch_ingress",
    "cls_flower",
    "act_gact",
    "act_mirred",
    "ifb",
];

const INIT: &str = include_str!("init.sh");

/// What makes a kit, besides the packages.
const RECIPE: &str = concat!(
    include_str!("kit.rs"),
    include_str!("packages.rs"),
    include_str!("cpio.rs"),
    include_str!("init.sh")
);

/// Where Debian has libraries, and where the loader looks without being told.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// A kernel and its first file system. Made once in cargo's target folder (some 100 MB of packages, 20 s) and used until the
/// recipe or the packages' versions change.
#[derive(Clone, Debug)]
pub struct Kit {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Kit {
    /// The kit, made if there is none yet. Several processes may ask at once: one makes it.
    ///
    /// # Errors
    /// No apt, no packages. A kit that is there is used even so.
    pub fn get() -> Result<Self, Skip> {
        Self::in_folder(&target().join("linux-peer"))
    }

    fn in_folder(folder: &Path) -> Result<Self, Skip> {
        let broken = |e: io::Error| Skip::Packages(format!("{}: {e}", folder.display()));
        fs::create_dir_all(folder).map_err(broken)?;
        let lock = File::create(folder.join("lock")).map_err(broken)?;
        lock.lock().map_err(broken)?;

        let current = Stamp::now();
        let made = Manifest::read(folder);
        let made = made.filter(|m| m.stamp.recipe == current.recipe && m.kit(folder).is_there());
        if let Some(manifest) = made.as_ref().filter(|m| m.stamp == current) {
            return Ok(manifest.kit(folder));
        }
        match Self::update(folder, made.as_ref()) {
            Ok(kit) => Ok(kit),
            Err(why) => match made {
                Some(old) => {
                    eprintln!("the Linux peer made before is used: {why}");
                    Ok(old.kit(folder))
                }
                None => Err(why),
            },
        }
    }

    fn update(folder: &Path, made: Option<&Manifest>) -> Result<Self, Skip> {
        for (program, package) in [
            ("apt-get", "apt"),
            ("apt-cache", "apt"),
            ("dpkg-deb", "dpkg"),
        ] {
            super::require(program, package)?;
        }
        let packages = packages::closure(&PACKAGES).or_else(|why| {
            // A fresh container has no lists.
            said("apt-get", ["-q", "update"], folder)
                .map_err(|update| Skip::Packages(format!("{why}; {update}")))?;
            packages::closure(&PACKAGES)
        })?;
        let manifest = Manifest::new(Stamp::now(), &packages);
        let kit = manifest.kit(folder);
        if made.is_none_or(|m| m.key != manifest.key) {
            let start = Instant::now();
            build(&kit, folder, &packages)?;
            eprintln!(
                "made a Linux peer of {} packages in {:.1} s: {}",
                packages.len(),
                start.elapsed().as_secs_f32(),
                kit.initrd.display()
            );
        }
        manifest
            .write(folder)
            .map_err(|e| Skip::Packages(format!("{}: {e}", folder.display())))?;
        Ok(kit)
    }

    fn is_there(&self) -> bool {
        self.kernel.is_file() && self.initrd.is_file()
    }

    /// The kernel, as QEMU's `-kernel` takes it.
    #[must_use]
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The first file system, as QEMU's `-initrd` takes it.
    #[must_use]
    pub fn initrd(&self) -> &Path {
        &self.initrd
    }
}

/// Cargo's target folder.
fn target() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or_else(|| "target".into());
    programs::root().join(target)
}

/// A small hash (FNV-1a, 64 bits) as text: a name for content that nobody forges.
fn hash(text: &str) -> String {
    let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

/// What cannot have changed as long as it is equal.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    recipe: String,
    /// When apt's lists of packages last changed.
    lists: String,
}

impl Stamp {
    fn now() -> Self {
        let lists = fs::metadata("/var/lib/apt/lists");
        Self {
            recipe: hash(RECIPE),
            lists: lists.map_or("none".into(), |m| {
                format!("{}.{}", m.mtime(), m.mtime_nsec())
            }),
        }
    }
}

/// What the kit in a folder was made of: a file of the stamp, the key and the packages.
struct Manifest {
    stamp: Stamp,
    key: String,
    packages: String,
}

impl Manifest {
    fn new(stamp: Stamp, packages: &[Package]) -> Self {
        let packages: String = packages
            .iter()
            .map(|p| format!("{} {}\n", p.name, p.version))
            .collect();
        let key = hash(&format!("{}\n{packages}", stamp.recipe));
        Self {
            stamp,
            key,
            packages,
        }
    }

    fn path(folder: &Path) -> PathBuf {
        folder.join("manifest")
    }

    fn read(folder: &Path) -> Option<Self> {
        let text = fs::read_to_string(Self::path(folder)).ok()?;
        let mut lines = text.splitn(4, '\n').map(str::to_owned);
        let mut line = || lines.next();
        let (recipe, lists) = (line()?, line()?);
        Some(Self {
            stamp: Stamp { recipe, lists },
            key: line()?,
            packages: line()?,
        })
    }

    /// Replaces the manifest, and removes the kits that it does not name.
    fn write(&self, folder: &Path) -> io::Result<()> {
        let Stamp { recipe, lists } = &self.stamp;
        let text = format!("{recipe}\n{lists}\n{}\n{}", self.key, self.packages);
        let new = folder.join("manifest.new");
        fs::write(&new, text)?;
        fs::rename(new, Self::path(folder))?;
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() && path.file_name() != Some(OsStr::new(&self.key)) {
                fs::remove_dir_all(path)?;
            }
        }
        Ok(())
    }

    fn kit(&self, folder: &Path) -> Kit {
        let folder = folder.join(&self.key);
        Kit {
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd"),
        }
    }
}

/// Makes `kit`. What it needs on the way lies in `folder` and is removed.
fn build(kit: &Kit, folder: &Path, packages: &[Package]) -> Result<(), Skip> {
    let broken = |e: io::Error| Skip::Packages(format!("making the peer's file system: {e}"));
    let work = tempfile::Builder::new()
        .prefix("making-")
        .tempdir_in(folder)
        .map_err(broken)?;
    let root = work.path().join("root");
    fs::create_dir(&root).map_err(broken)?;
    packages::unpack(packages, work.path(), &root)?;

    let (kernel, release) = kernel(&root)?;
    let initrd = work.path().join("initrd");
    let file = File::create(&initrd).map_err(broken)?;
    // Not compressed: the kernel would unpack it under TCG.
    let mut archive = Archive::new(BufWriter::new(file));
    write_system(&mut archive, &Tree::new(&root)?).map_err(broken)?;
    write_programs(&mut archive, &root, work.path())?;
    write_modules(&mut archive, &root, &release, work.path())?;
    archive.finish().map_err(broken)?;

    let made = kit.initrd.parent().unwrap_or(folder);
    fs::create_dir_all(made).map_err(broken)?;
    fs::rename(kernel, &kit.kernel).map_err(broken)?;
    fs::rename(initrd, &kit.initrd).map_err(broken)
}

/// The kernel and its release: `boot/vmlinuz-RELEASE`.
fn kernel(root: &Path) -> Result<(PathBuf, String), Skip> {
    let files = fs::read_dir(root.join("boot")).into_iter().flatten();
    let mut found = files.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        Some((entry.path(), name.strip_prefix("vmlinuz-")?.to_owned()))
    });
    found
        .next()
        .ok_or_else(|| Skip::Packages("linux-image-amd64 brought no kernel".into()))
}

/// Programs and provider libraries of the packages by file name.
struct Tree {
    files: BTreeMap<String, PathBuf>,
}

impl Tree {
    fn new(root: &Path) -> Result<Self, Skip> {
        let mut files = BTreeMap::new();
        let providers = LIBRARIES.map(|l| format!("{l}/libibverbs"));
        let folders = ["bin", "sbin", "usr/bin", "usr/sbin", "etc/libibverbs.d"];
        for folder in folders.into_iter().chain(providers.iter().map(|p| &**p)) {
            for entry in fs::read_dir(root.join(folder))
                .into_iter()
                .flatten()
                .flatten()
            {
                let name = entry.file_name().to_string_lossy().into_owned();
                // Not what a link of a package points to: kmod is many programs.
                if entry.file_type().is_ok_and(|t| t.is_file()) {
                    files.insert(name, entry.path());
                }
            }
        }
        Ok(Self { files })
    }

    fn find(&self, name: &str) -> io::Result<&Path> {
        let missing = || io::Error::other(format!("no package has `{name}`"));
        self.files
            .get(name)
            .map(PathBuf::as_path)
            .ok_or_else(missing)
    }
}

fn write_system(archive: &mut Archive<BufWriter<File>>, tree: &Tree) -> io::Result<()> {
    archive.folder("dev")?;
    archive.console()?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file("bin/busybox", 0o755, &fs::read(tree.find("busybox")?)?)?;
    archive.link("bin/sh", "/usr/sbin/dash")?;
    archive.file("usr/sbin/kmod", 0o755, &fs::read(tree.find("kmod")?)?)?;
    for name in ["insmod", "lsmod", "rmmod"] {
        archive.link(&format!("usr/sbin/{name}"), "kmod")?;
    }
    for name in PROGRAMS {
        let bytes = fs::read(tree.find(name)?)?;
        archive.file(&format!("usr/sbin/{name}"), 0o755, &bytes)?;
    }
    let driver = fs::read(tree.find("rxe.driver")?)?;
    archive.file("etc/libibverbs.d/rxe.driver", 0o644, &driver)?;
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/sh\n")?;
    // getaddrinfo asks no name server, and finds what has no name.
    archive.file("etc/nsswitch.conf", 0o644, b"hosts: files\n")?;
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n")
}

/// The libraries of every program, as the packages' own loader finds them, and those that only `dlopen` names.
fn write_programs(
    archive: &mut Archive<BufWriter<File>>,
    root: &Path,
    work: &Path,
) -> Result<(), Skip> {
    let broken = |e: io::Error| Skip::Packages(format!("libraries of the peer's programs: {e}"));
    let tree = Tree::new(root)?;
    let loader = Loader::new(root)?;
    let mut libraries = BTreeSet::new();
    let provider = tree
        .files
        .iter()
        .find(|(name, _)| name.starts_with("librxe-rdmav"));
    let (name, provider) = provider
        .ok_or_else(|| Skip::Packages("ibverbs-providers brought no provider for rxe".into()))?;
    for program in PROGRAMS.iter().chain(&["kmod"]) {
        let program = tree.find(program).map_err(broken)?;
        libraries.extend(loader.list(program, work)?);
    }
    libraries.extend(loader.list(provider, work)?);
    // pthread_cancel and backtraces load it.
    libraries.insert(loader.library("libgcc_s.so.1")?);
    for library in &libraries {
        let name = library
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let bytes = fs::read(library).map_err(broken)?;
        let path = format!("lib/x86_64-linux-gnu/{name}");
        archive.file(&path, 0o755, &bytes).map_err(broken)?;
    }
    let bytes = fs::read(provider).map_err(broken)?;
    let path = format!("usr/lib/x86_64-linux-gnu/libibverbs/{name}");
    archive.file(&path, 0o755, &bytes).map_err(broken)?;
    let bytes = fs::read(&loader.program).map_err(broken)?;
    archive
        .file("lib64/ld-linux-x86-64.so.2", 0o755, &bytes)
        .map_err(broken)
}

/// The loader of the unpacked packages: it runs their programs here and lists their libraries, whatever this machine has
/// installed.
struct Loader {
    program: PathBuf,
    folders: Vec<PathBuf>,
}

impl Loader {
    fn new(root: &Path) -> Result<Self, Skip> {
        let folders: Vec<_> = LIBRARIES.iter().map(|l| root.join(l)).collect();
        let mut loader = Self {
            program: PathBuf::new(),
            folders,
        };
        loader.program = loader.library("ld-linux-x86-64.so.2")?;
        Ok(loader)
    }

    fn library(&self, name: &str) -> Result<PathBuf, Skip> {
        let found = self.folders.iter().map(|f| f.join(name));
        found
            .into_iter()
            .find(|f| f.is_file())
            .ok_or_else(|| Skip::Packages(format!("no package has the library {name}")))
    }

    fn path(&self) -> String {
        let folders: Vec<_> = self.folders.iter().map(|f| f.to_string_lossy()).collect();
        folders.join(":")
    }

    fn list(&self, program: &Path, work: &Path) -> Result<Vec<PathBuf>, Skip> {
        let path = self.path();
        let args = [
            "--library-path",
            &path,
            "--list",
            &program.to_string_lossy(),
        ];
        let text = said(&self.program, args, work)?;
        // "libc.so.6 => /path/libc.so.6 (0x7f…)"; the kernel's own and the loader have no arrow or a path of this machine.
        let names = text.lines().filter_map(|l| l.trim().split_once(" => "));
        names
            .filter(|(name, _)| !name.starts_with('/'))
            .map(|(name, _)| self.library(name))
            .collect()
    }

    /// Runs the unpacked `program` under the name `called`.
    fn run(&self, called: &str, program: &Path, args: &[&str], work: &Path) -> Result<(), Skip> {
        let (path, program) = (self.path(), program.to_string_lossy());
        let own = ["--library-path", &path, "--argv0", called, &program];
        said(&self.program, own.iter().chain(args), work)?;
        Ok(())
    }
}

/// The modules, and `modules/order`: their file names, each after those that it needs.
fn write_modules(
    archive: &mut Archive<BufWriter<File>>,
    root: &Path,
    release: &str,
    work: &Path,
) -> Result<(), Skip> {
    let broken = |e: io::Error| Skip::Packages(format!("modules of the peer's kernel: {e}"));
    let tree = Tree::new(root)?;
    let kmod = tree.find("kmod").map_err(broken)?;
    let base = root.to_string_lossy();
    Loader::new(root)?.run("depmod", kmod, &["-b", &base, release], work)?;
    let folder = root.join("lib/modules").join(release);
    let read = |name: &str| fs::read_to_string(folder.join(name));
    let dep = read("modules.dep").map_err(broken)?;
    let builtin = read("modules.builtin").map_err(broken)?;
    let files = order(&MODULES, &dep, &builtin).map_err(broken)?;
    let mut names = String::new();
    for file in files {
        let name = file.rsplit('/').next().unwrap_or(&file);
        let bytes = fs::read(folder.join(&file)).map_err(broken)?;
        archive
            .file(&format!("modules/{name}"), 0o644, &bytes)
            .map_err(broken)?;
        names += &format!("{name}\n");
    }
    archive
        .file("modules/order", 0o644, names.as_bytes())
        .map_err(broken)
}

/// Files of `modules` and of what they need, in an order in which they load.
fn order(modules: &[&str], dep: &str, builtin: &str) -> io::Result<Vec<String>> {
    /// `kernel/a/b-c.ko.xz` is module `b_c`.
    fn module(path: &str) -> String {
        let name = path.rsplit('/').next().unwrap_or(path);
        name.split(".ko").next().unwrap_or(name).replace('-', "_")
    }
    let lines: BTreeMap<String, (&str, &str)> = dep
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(file, needs)| (module(file), (file, needs)))
        .collect();
    let builtin: BTreeSet<String> = builtin.lines().map(module).collect();
    let mut files: Vec<String> = Vec::new();
    for &name in modules {
        let Some(&(file, needs)) = lines.get(name) else {
            // Which ones a kernel has for CRC-32 depends on its version.
            if builtin.contains(name) || name.starts_with("crc32") {
                continue;
            }
            return Err(io::Error::other(format!(
                "the kernel has no module `{name}`"
            )));
        };
        // modules.dep has all that is needed, the innermost last.
        for file in needs.split_whitespace().rev().chain([file]) {
            if files.iter().all(|f| f != file) {
                files.push(file.to_owned());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dep = "kernel/a/rdma_rxe.ko: kernel/b/ib-core.ko.xz kernel/c/udp.ko\n\
            kernel/b/ib-core.ko.xz: kernel/c/udp.ko\nkernel/c/udp.ko:\n";
        let files = order(&["rdma_rxe", "ib_core", "in"], dep, "kernel/in.ko\n").unwrap();
        assert_eq!(
            files,
            [
                "kernel/c/udp.ko",
                "kernel/b/ib-core.ko.xz",
                "kernel/a/rdma_rxe.ko"
            ]
        );
        let error = order(&["missing"], dep, "").unwrap_err().to_string();
        assert!(error.contains("`missing`"), "{error}");
        assert!(order(&["crc32_pclmul"], dep, "").unwrap().is_empty());
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Manifest::read(folder.path()).is_none());
        let manifest = Manifest {
            stamp: Stamp::now(),
            key: "k".into(),
            packages: "a 1\nb 2\n".into(),
        };
        fs::create_dir(folder.path().join("k")).unwrap();
        fs::create_dir(folder.path().join("old")).unwrap();
        manifest.write(folder.path()).unwrap();
        let again = Manifest::read(folder.path()).unwrap();
        assert_eq!(again.stamp, manifest.stamp);
        assert_eq!(
            (again.key, again.packages),
            (manifest.key, manifest.packages)
        );
        assert!(folder.path().join("k").exists());
        assert!(!folder.path().join("old").exists());
        assert!(!again.stamp.recipe.is_empty());
    }
}
