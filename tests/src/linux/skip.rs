//! Why there is no Linux peer here.

use std::fs::File;
use std::io::Write;

use thiserror::Error;

/// Why there can be no Linux peer here. Tests print it and pass.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Skip {
    /// QEMU is missing or too old.
    #[error("no QEMU: {0}")]
    Qemu(String),
    /// A program is missing, which this package has.
    #[error("`{program}` is missing; apt-get install {package}")]
    Program {
        /// Its name.
        program: &'static str,
        /// The package of Debian that has it.
        package: &'static str,
    },
    /// Namespaces, taps or bridges cannot be made.
    #[error("no network of its own ({0}); it needs root and /dev/net/tun")]
    Network(String),
    /// The packages of the peer's kernel and programs cannot be had.
    #[error("no packages for the peer: {0}")]
    Packages(String),
}

impl Skip {
    /// Says that the test `what` is skipped, and why; also as a line of the file that `HYV_SKIPPED` names, for whoever runs
    /// the tests and does not show what those print that pass.
    ///
    /// # Panics
    /// When `HYV_NO_SKIP` is set: then what cannot be tested is a failure.
    pub fn print(&self, what: &str) {
        assert!(
            std::env::var_os("HYV_NO_SKIP").is_none(),
            "{what} cannot be tested, and HYV_NO_SKIP is set: {self}"
        );
        eprintln!("skipped: {what}: {self}");
        if let Some(path) = std::env::var_os("HYV_SKIPPED") {
            let file = File::options().create(true).append(true).open(&path);
            let reason = self.to_string().replace('\n', " ");
            let written =
                file.and_then(|mut f| f.write_all(format!("{what}: {reason}\n").as_bytes()));
            written.unwrap_or_else(|e| panic!("HYV_SKIPPED={}: {e}", path.display()));
        }
    }
}

/// `value`, or the end of the test with the reason why it is skipped.
///
/// ```no_run
/// # use hyv_e2e::{linux::Kit, or_skip};
/// # fn test() {
/// let kit = or_skip!(Kit::get(), "pingpong with Linux");
/// # }
/// ```
#[macro_export]
macro_rules! or_skip {
    ($value:expr, $what:expr) => {
        match $value {
            Ok(value) => value,
            Err(skip) => {
                let skip: $crate::linux::Skip = skip;
                skip.print($what);
                return;
            }
        }
    };
}
