//! Files that are there whole or not at all.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A file under a temporary name beside its target, which [`Self::commit`] puts in the target's place.
/// Dropped before that, it vanishes and the target is as it was.
pub struct Replacement {
    temporary: NamedTempFile,
    target: PathBuf,
}

impl Replacement {
    /// Starts a replacement of `target`; where that is a symbolic link, of what it points to.
    ///
    /// # Errors
    /// Where the folder does not exist or cannot be written.
    pub fn create(target: &Path) -> io::Result<Self> {
        let target = target.canonicalize().unwrap_or_else(|_| target.to_owned());
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // An existing file keeps its mode; a new one gets what the umask leaves of 0666.
        let existing = target.metadata().ok();
        let mode = existing
            .as_ref()
            .map_or(0o666, |meta| meta.permissions().mode() & 0o777);
        let temporary = tempfile::Builder::new()
            .prefix(".hyv-")
            .permissions(Permissions::from_mode(mode))
            .tempfile_in(folder)
            .map_err(plain)?;
        Ok(Self { temporary, target })
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// Where data or the new name cannot be written.
    pub fn commit(self) -> io::Result<()> {
        self.temporary.as_file().sync_all()?;
        self.temporary
            .persist(&self.target)
            .map_err(|error| error.error)?;
        Ok(())
    }
}

/// The system's own error: tempfile wraps it to add a temporary name that means nothing to the user.
fn plain(error: io::Error) -> io::Error {
    let inner = error.get_ref().and_then(|wrapper| wrapper.source());
    match inner
        .and_then(|e| e.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error)
    {
        Some(code) => io::Error::from_raw_os_error(code),
        None => error,
    }
}

impl Write for Replacement {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.temporary.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.temporary.flush()
    }
}
