//! Addresses of a guest's backtrace, turned into functions and lines.

use std::path::{Path, PathBuf};

use crate::limits::{MAX_CODE_ADDRESS, MAX_INLINED};

/// The symbols of one image, read when the first address asks for them.
pub struct Symbols {
    candidates: Vec<PathBuf>,
    loader: Option<Option<addr2line::Loader>>,
}

impl std::fmt::Debug for Symbols {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Symbols")
            .field("candidates", &self.candidates)
            .finish_non_exhaustive()
    }
}

/// One function at an address; several where calls were inlined, innermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its name, demangled.
    pub function: String,
    /// Source file and line, where known.
    pub location: Option<(String, u32)>,
}

impl std::fmt::Display for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.location {
            Some((file, line)) => write!(f, "{} ({file}:{line})", self.function),
            None => f.write_str(&self.function),
        }
    }
}

impl Symbols {
    /// Symbols from `explicit`, or else from what lies beside `image`: for `NAME.elf` that is `NAME.sym.elf`, then
    /// `NAME.elf.debug`, `NAME.elf.sym` and the image itself.
    #[must_use]
    pub fn new(image: &Path, explicit: Option<&Path>) -> Self {
        let beside = |ending: &str| {
            let mut p = image.as_os_str().to_owned();
            p.push(ending);
            PathBuf::from(p)
        };
        let candidates = match explicit {
            Some(p) => vec![p.to_owned()],
            None => vec![
                image.with_extension("sym.elf"),
                beside(".debug"),
                beside(".sym"),
                image.to_owned(),
            ],
        };
        Self {
            candidates,
            loader: None,
        }
    }

    fn loader(&mut self) -> Option<&addr2line::Loader> {
        let candidates = &self.candidates;
        self.loader
            .get_or_insert_with(|| {
                let found = candidates.iter().filter(|p| p.is_file()).find_map(|p| {
                    addr2line::Loader::new(p)
                        .map_err(|e| tracing::debug!(path = %p.display(), "no symbols: {e}"))
                        .ok()
                });
                if found.is_none() {
                    tracing::warn!(
                        "no symbols in any of {candidates:?}: addresses stay as they are"
                    );
                }
                found
            })
            .as_ref()
    }

    /// The functions at `address`, innermost first; none where the symbols do not know it.
    pub fn resolve(&mut self, address: u64) -> Vec<Frame> {
        // The address comes from the guest; the reader of symbols adds to it without a check.
        if address > MAX_CODE_ADDRESS {
            return Vec::new();
        }
        let Some(loader) = self.loader() else {
            return Vec::new();
        };
        let mut found = Vec::new();
        if let Ok(mut frames) = loader.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                if found.len() == MAX_INLINED {
                    break;
                }
                let Some(name) = frame
                    .function
                    .as_ref()
                    .and_then(|n| n.demangle().ok().map(|n| without_hash(&n)))
                else {
                    continue;
                };
                let location = frame.location.as_ref();
                let location = location.and_then(|l| Some((shorten(l.file?), l.line?)));
                found.push(Frame {
                    function: name,
                    location,
                });
            }
        }
        if let Some(symbol) = loader.find_symbol(address) {
            // Line tables name functions without their modules; the symbol of the function that all others
            // were inlined into has the whole path.
            let function = without_hash(&addr2line::demangle_auto(symbol.into(), None));
            match found.last_mut() {
                Some(outermost) => outermost.function = function,
                None => found.push(Frame {
                    function,
                    location: None,
                }),
            }
        }
        found
    }

    /// What a line of a backtrace means: lines `  at 0xADDRESS` and `#3 0xADDRESS` get their functions behind the address, one
    /// line for each inlined call. Every other line has no meaning of this kind: `None`.
    pub fn annotate(&mut self, line: &str) -> Option<String> {
        let address = backtrace_address(line)?;
        let frames = self.resolve(address);
        let (first, inlined_into) = frames.split_first()?;
        let mut text = format!("{} {first}", line.trim_end());
        for frame in inlined_into {
            text.push_str(&format!("\n     in {frame}"));
        }
        Some(text)
    }
}

/// The address in `  at 0x…` or `  #3 0x…`, with nothing after it.
fn backtrace_address(line: &str) -> Option<u64> {
    let (mark, address) = line.trim().split_once(' ')?;
    let numbered = || {
        mark.strip_prefix('#')
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    if mark != "at" && !numbered() {
        return None;
    }
    u64::from_str_radix(address.trim().strip_prefix("0x")?, 16).ok()
}

/// `kvstore::serve::h0123456789abcdef` without its hash.
fn without_hash(name: &str) -> String {
    match name.rsplit_once("::h") {
        Some((path, hash)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
            path.to_owned()
        }
        _ => name.to_owned(),
    }
}

/// A source path as its reader knows it: relative to this folder, to a crate's, or to the standard library's.
fn shorten(path: &str) -> String {
    let here = std::env::current_dir().ok();
    let relative = here
        .as_deref()
        .and_then(|h| Path::new(path).strip_prefix(h).ok());
    if let Some(p) = relative {
        return p.display().to_string();
    }
    let after = |mark: &str| path.split_once(mark).map(|(_, rest)| rest);
    if let Some(p) = after("/registry/src/").and_then(|p| p.split_once('/')) {
        return p.1.to_owned();
    }
    if let Some(p) = after("/rustc/").and_then(|p| p.split_once('/')) {
        return p.1.to_owned();
    }
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prints where its function `place::landmark` is, counted from where it was loaded.
    const PROGRAM: &str = r#"
        mod place {
            #[inline(never)]
            pub fn landmark() -> u64 {
                std::hint::black_box(landmark as fn() -> u64 as usize as u64)
            }
        }
        fn main() {
            let exe = std::env::current_exe().unwrap();
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let line = maps.lines().find(|l| l.ends_with(exe.to_str().unwrap())).unwrap();
            let base = u64::from_str_radix(line.split_once('-').unwrap().0, 16).unwrap();
            println!("{}", place::landmark() - base);
        }
    "#;

    #[test]
    fn functions_and_lines_of_a_program_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let (source, program) = (dir.path().join("program.rs"), dir.path().join("program"));
        std::fs::write(&source, PROGRAM).unwrap();
        // A program of its own: those of tests have no debug information.
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let built = std::process::Command::new(rustc)
            .args(["-O", "-C", "debuginfo=line-tables-only", "-o"])
            .args([&program, &source])
            .status()
            .unwrap();
        assert!(built.success());
        let told = std::process::Command::new(&program).output().unwrap();
        let told = String::from_utf8(told.stdout).unwrap();
        let address: u64 = told.trim().parse().unwrap();

        let mut s = Symbols::new(&program, None);
        let frames = s.resolve(address);
        let last = frames.last().unwrap();
        assert!(last.function.ends_with("place::landmark"), "{frames:?}");
        assert!(
            last.location.as_ref().unwrap().0.ends_with("program.rs"),
            "{frames:?}"
        );
        let line = s.annotate(&format!("  at {address:#x}")).unwrap();
        assert!(
            line.contains("landmark") && line.contains("program.rs:"),
            "{line}"
        );
        assert!(s.resolve(u64::MAX).is_empty());
    }

    #[test]
    fn only_backtrace_lines_are_touched() {
        assert_eq!(backtrace_address("  at 0x10abcd"), Some(0x10_abcd));
        assert_eq!(backtrace_address("#12 0x0000000000200000"), Some(0x20_0000));
        for other in [
            "",
            "at",
            "at 12",
            "at 0x",
            "at 0xzz",
            "look at 0x12",
            "# 0x12",
            "#x 0x12",
            "at 0x12 and more",
            "at 0x11112222333344445",
        ] {
            assert_eq!(backtrace_address(other), None, "{other}");
        }
    }

    #[test]
    fn missing_symbols_leave_lines_alone() {
        let mut s = Symbols::new(Path::new("/nonexistent/image"), None);
        assert_eq!(s.annotate("  at 0x1234"), None);
    }

    #[test]
    fn names_and_paths_are_short() {
        assert_eq!(without_hash("a::b::h0123456789abcdef"), "a::b");
        assert_eq!(without_hash("a::hello"), "a::hello");
        assert_eq!(
            shorten("/rustc/abc/library/core/src/fmt.rs"),
            "library/core/src/fmt.rs"
        );
        assert_eq!(
            shorten("/h/.cargo/registry/src/index-1/talc-5.1/src/lib.rs"),
            "talc-5.1/src/lib.rs"
        );
        assert_eq!(shorten("/elsewhere/x.rs"), "/elsewhere/x.rs");
    }
}
