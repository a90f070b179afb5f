//! The archive that a Linux kernel unpacks as its first file system: cpio in the "newc" format
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const CONSOLE: u32 = 0o020_600;

/// Writes an archive. Folders appear before what lies in them; everything belongs to root and has no date, so the same
/// content is the same bytes.
pub(super) struct Archive<W> {
    out: W,
    inode: u32,
    known: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self {
            out,
            inode: 0,
            known: BTreeSet::new(),
        }
    }

    /// A file at `path` (no leading slash). `mode`: permission bits. The first one of a name counts.
    pub(super) fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        self.parents(path)?;
        if self.known.insert(path.to_owned()) {
            self.entry(path, 0o100_000 | mode, (0, 0), bytes)?;
        }
        Ok(())
    }

    /// A symbolic link at `path` to `target`.
    pub(super) fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.parents(path)?;
        if self.known.insert(path.to_owned()) {
            self.entry(path, LINK, (0, 0), target.as_bytes())?;
        }
        Ok(())
    }

    /// An empty folder.
    pub(super) fn folder(&mut self, path: &str) -> io::Result<()> {
        self.parents(&format!("{path}/"))
    }

    /// `dev/console`, which the kernel opens for its first process before anything is mounted.
    pub(super) fn console(&mut self) -> io::Result<()> {
        self.parents("dev/console")?;
        self.entry("dev/console", CONSOLE, (5, 1), &[])
    }

    /// The end mark. What `out` buffers is flushed.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        for (at, _) in path.match_indices('/') {
            if self.known.insert(path[..at].to_owned()) {
                self.entry(&path[..at], DIRECTORY, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size =
            u32::try_from(bytes.len()).map_err(|_| io::Error::other(format!("{name}: too big")))?;
        // inode, mode, uid, gid, links, date, size, device of the file, device that it is, length of the name, checksum
        let (major, minor) = device;
        let name_size = name.len() as u32 + 1;
        let fields = [
            self.inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0,
        ];
        let mut head = String::from("070701");
        for field in fields {
            head += &format!("{field:08x}");
        }
        head += name;
        head.push('\0');
        self.padded(head.as_bytes())?;
        self.padded(bytes)
    }

    /// Header with name, and content, each fill up to a multiple of 4.
    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.out
            .write_all(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_folders_come_first() {
        let mut out = Vec::new();
        let mut archive = Archive::new(&mut out);
        archive.file("a/b/c", 0o755, b"hello").unwrap();
        archive.link("a/d", "b/c").unwrap();
        archive.file("a/b/c", 0o644, b"again").unwrap();
        archive.finish().unwrap();
        assert_eq!(out.len() % 4, 0);

        let mut rest = &out[..];
        let mut found = Vec::new();
        while !rest.is_empty() {
            assert_eq!(&rest[..6], b"070701");
            let field = |i: usize| {
                let hex = std::str::from_utf8(&rest[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(hex, 16).unwrap() as usize
            };
            let (mode, size, name) = (field(1), field(6), field(11));
            let body = (110 + name).next_multiple_of(4);
            found.push((
                String::from_utf8(rest[110..110 + name - 1].to_vec()).unwrap(),
                mode,
                rest[body..body + size].to_vec(),
            ));
            rest = &rest[body + size.next_multiple_of(4)..];
        }
        let expected = [
            ("a", 0o040_755, &b""[..]),
            ("a/b", 0o040_755, b""),
            ("a/b/c", 0o100_755, b"hello"),
            ("a/d", 0o120_777, b"b/c"),
            ("TRAILER!!!", 0, b""),
        ];
        let expected: Vec<_> = expected
            .map(|(name, mode, bytes)| (name.to_owned(), mode, bytes.to_vec()))
            .into();
        assert_eq!(found, expected);
    }
}
