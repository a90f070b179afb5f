//! The documented one-liner that turns Debian's package index into a file of records.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use kvstore_cli::format;

/// The one-liners as the documentation has them, wherever they are.
fn one_liners() -> Vec<String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let documents = [
        here.join("README-dumpavail.txt"),
        here.join("../../../README.md"),
    ];
    let lines: Vec<String> = documents
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|text| {
            text.lines()
                .map(|line| line.trim().to_owned())
                .collect::<Vec<_>>()
        })
        .filter(|line| line.starts_with("apt-cache dumpavail |") && line.contains("> debian.tsv"))
        .collect();
    assert!(!lines.is_empty(), "no document shows the one-liner");
    lines
}

/// Runs the one-liner with an `apt-cache` that prints `index`, and checks that each stanza survives.
fn check(one_liner: &str, index: &[u8], stanzas: &[(String, Vec<u8>)]) {
    let folder = tempfile::tempdir().unwrap();
    let apt_cache = folder.path().join("apt-cache");
    fs::write(folder.path().join("index"), index).unwrap();
    fs::write(&apt_cache, "#!/bin/sh\nexec cat \"${0%/*}/index\"\n").unwrap();
    fs::set_permissions(&apt_cache, PermissionsExt::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap();
    let status = Command::new("sh")
        .args(["-c", one_liner])
        .current_dir(folder.path())
        .env("PATH", format!("{}:{path}", folder.path().display()))
        .status()
        .unwrap();
    assert!(status.success());
    let mut expected = stanzas.iter();
    for record in format::open(&folder.path().join("debian.tsv"), None).unwrap() {
        let record = record.unwrap();
        let (key, value) = expected.next().expect("more records than stanzas");
        assert_eq!(String::from_utf8_lossy(&record.key), *key);
        assert!(record.value == *value, "{key} changed");
    }
    assert_eq!(expected.len(), 0, "fewer records than stanzas");
}

#[test]
fn stanzas_with_every_awkward_byte_survive() {
    let mut awkward: Vec<u8> = (0..=255).filter(|b| !b"\n\0".contains(b)).collect();
    awkward.extend_from_slice(b"\\n\\t\\\\\\&\\0 && \\");
    let stanza = |package: &str, version: &str| {
        let head = format!("Package: {package}\nVersion: {version}\nDescription: Package: no\n ");
        let value = [head.as_bytes(), &awkward, b"\n .\n\tVersion: no\nTag: a::b"].concat();
        (format!("{package} {version}"), value)
    };
    let stanzas = [
        stanza("0ad", "0.0.26-3"),
        stanza("libc++1", "1:14.0~rc1+b&2"),
    ];
    let index: Vec<u8> = stanzas
        .iter()
        .flat_map(|(_, value)| [value.as_slice(), b"\n\n"].concat())
        .collect();
    for one_liner in one_liners() {
        check(&one_liner, &index, &stanzas);
    }
}

/// This machine's own index, where it has one.
#[test]
fn debians_whole_index_survives() {
    let Ok(output) = Command::new("apt-cache").arg("dumpavail").output() else {
        eprintln!("skipped: there is no apt-cache");
        return;
    };
    let field = |stanza: &str, name: &str| {
        stanza
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
            .to_owned()
    };
    let stanzas: Vec<(String, Vec<u8>)> = String::from_utf8(output.stdout.clone())
        .unwrap()
        .split("\n\n")
        .map(|stanza| stanza.trim_matches('\n'))
        .filter(|stanza| !stanza.is_empty())
        .map(|s| {
            (
                format!("{} {}", field(s, "Package: "), field(s, "Version: ")),
                s.into(),
            )
        })
        .collect();
    for one_liner in one_liners() {
        check(&one_liner, &output.stdout, &stanzas);
    }
}
