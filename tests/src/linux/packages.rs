//! Packages of Debian: which ones are needed, and their files.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::Skip;

/// One version of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    needs: Vec<String>,
}

/// Runs `program` to its end and gives what it printed.
pub(super) fn said<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = A>,
    folder: &Path,
) -> Result<String, Skip> {
    let mut command = Command::new(program);
    command.args(args);
    let mut line = format!("{command:?}");
    if line.len() > 200 {
        line = line.chars().take(200).chain("…".chars()).collect();
    }
    command
        .current_dir(folder)
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    let failed = |why: String| Skip::Packages(format!("{line}: {why}"));
    let output = command.output().map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        // apt says the same of every package.
        let error = String::from_utf8_lossy(&output.stderr);
        let first = error.lines().find(|l| l.starts_with("E: "));
        let said = first.or(error.lines().last()).unwrap_or("nothing said");
        return Err(failed(format!("{}: {said}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `roots`, with the kernels, modules and libraries that they depend on, in the newest versions that apt can download: what is installed
/// may be newer, and gone from where it came from. Sorted by name.
pub(super) fn closure(roots: &[&str]) -> Result<Vec<Package>, Skip> {
    let mut known: BTreeMap<String, Package> = BTreeMap::new();
    let mut wanted: Vec<String> = roots.iter().map(|&r| r.to_owned()).collect();
    while !wanted.is_empty() {
        let show = ["show", "--all-versions"].map(str::to_owned);
        let text = said("apt-cache", show.iter().chain(&wanted), Path::new("/"))?;
        let found = stanzas(&text);
        if let Some(missing) = wanted.iter().find(|w| found.iter().all(|p| p.name != **w)) {
            return Err(Skip::Packages(format!(
                "apt can download no package `{missing}`"
            )));
        }
        known.extend(found.into_iter().map(|p| (p.name.clone(), p)));
        let needs = known.values().flat_map(|p| &p.needs);
        wanted = needs.filter(|n| !known.contains_key(*n)).cloned().collect();
        wanted.sort();
        wanted.dedup();
    }
    Ok(known.into_values().collect())
}

/// Only what programs are made of: no documentation tools, no interpreters of maintainers' scripts.
fn is_part(name: &str) -> bool {
    ["lib", "zlib", "linux-image-", "linux-modules-"]
        .iter()
        .any(|start| name.starts_with(start))
}

/// Reads what `apt-cache show` prints.
fn stanzas(text: &str) -> Vec<Package> {
    let mut found: Vec<Package> = Vec::new();
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza
                .lines()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(": "))
        };
        // One that is only installed has no file.
        let (Some(name), Some(version), Some(_)) =
            (field("Package"), field("Version"), field("Filename"))
        else {
            continue;
        };
        let depends = [field("Pre-Depends"), field("Depends")];
        // Of alternatives the first is what apt prefers.
        let needs = depends.into_iter().flatten().flat_map(|d| d.split(','));
        let needs = needs.filter_map(|d| d.split_whitespace().next());
        let needs = needs.map(|d| d.split(':').next().unwrap_or(d));
        let package = Package {
            name: name.to_owned(),
            version: version.to_owned(),
            needs: needs.filter(|d| is_part(d)).map(str::to_owned).collect(),
        };
        if found.iter().all(|p| p.name != package.name) {
            found.push(package);
        }
    }
    found
}

/// Downloads `packages` into `folder` and unpacks them all into `root`. apt checks their hashes.
pub(super) fn unpack(packages: &[Package], folder: &Path, root: &Path) -> Result<(), Skip> {
    let exact = packages.iter().map(|p| format!("{}={}", p.name, p.version));
    let args = ["-q", "download"].map(str::to_owned);
    said("apt-get", args.into_iter().chain(exact), folder)?;
    let broken = |e: std::io::Error| Skip::Packages(format!("{}: {e}", folder.display()));
    for entry in fs::read_dir(folder).map_err(broken)? {
        let file = entry.map_err(broken)?.path();
        if file.extension() == Some(OsStr::new("deb")) {
            let args = [OsStr::new("-x"), file.as_os_str(), root.as_os_str()];
            said("dpkg-deb", args, folder)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stanzas_give_versions_and_the_parts_that_are_needed() {
        let text = "Package: tool\nStatus: install ok installed\nVersion: 1:2.0-4\n\n\
            Package: tool\nVersion: 1:2.0-3\nFilename: t.deb\nPre-Depends: libx (>= 1)\n\
            Depends: debconf, liby1:any (= 4) | libz, perl, zlib1g\nDescription: a tool\n\n\
            Package: liby1\nVersion: 4\nFilename: y.deb\n\n\
            Package: tool\nVersion: 1\nFilename: old.deb\n\n";
        let found = stanzas(text);
        let versions: Vec<_> = found.iter().map(|p| (&*p.name, &*p.version)).collect();
        assert_eq!(versions, [("tool", "1:2.0-3"), ("liby1", "4")]);
        assert_eq!(found[0].needs, ["libx", "liby1", "zlib1g"]);
        assert!(found[1].needs.is_empty());
    }
}
