//! One private folder per running instance: `$XDG_RUNTIME_DIR/hyv/NAME`, `/run/user/UID/hyv/NAME` or `/tmp/hyv-UID/NAME`.
//!
//! A folder belongs to whoever holds the lock of its lock file, which the kernel drops when its process ends in any
//! way; folders that nobody holds are what killed instances left, and are removed. The lock of the
//! parent folder is held for the few system calls of claiming, cleaning and giving back, so none of them meets another half-way.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::limits::{MAX_INSTANCE_NAME, MAX_INSTANCES_PER_NAME, MAX_SOCKET_PATH};

const LOCK_FILE: &str = "lock";

/// What can go wrong with the folder of an instance.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeDirError {
    /// Not a name that can be part of a path.
    #[error(
        "`{name}` is no name for an instance: use 1 to {MAX_INSTANCE_NAME} letters, digits, `-`, `_` or `.`, and no `.` first"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// Another process holds the name.
    #[error(
        "an instance named `{name}` is running already{}; stop it, or give this one another name",
        pid.map(|p| format!(" (process {p})")).unwrap_or_default()
    )]
    Held {
        /// The name.
        name: String,
        /// Who holds it, if it has said so.
        pid: Option<u32>,
    },
    /// All the numbered names are held.
    #[error("{MAX_INSTANCES_PER_NAME} instances named `{prefix}` are running already; stop some")]
    TooMany {
        /// The name without number.
        prefix: String,
    },
    /// Something else than a folder of this user's own lies there.
    #[error(
        "{path} is not safe to use: {reason}; remove it, or set XDG_RUNTIME_DIR to a folder of your own"
    )]
    Unsafe {
        /// What was looked at.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No socket could be made in it.
    #[error(
        "{path} is too long for a socket ({MAX_SOCKET_PATH} bytes at most); set XDG_RUNTIME_DIR to a shorter folder"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Any other failure.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn at(path: &Path) -> impl Fn(io::Error) -> RuntimeDirError {
    let path = path.to_owned();
    move |source| RuntimeDirError::Io {
        path: path.clone(),
        source,
    }
}

/// The parent of all instances of this user.
#[derive(Debug, Clone)]
pub struct RuntimeRoot {
    path: PathBuf,
}

/// An instance as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// Its process, once it has said so.
    pub pid: Option<u32>,
}

impl RuntimeRoot {
    /// The usual place for this user, made if it is not there, and checked: a folder, no link, of this user, closed to others.
    ///
    /// # Errors
    /// `Unsafe`, `Io`.
    pub fn open() -> Result<Self, RuntimeDirError> {
        let uid = rustix::process::getuid().as_raw();
        let owned = |p: &Path| {
            fs::metadata(p).is_ok_and(|m| m.is_dir() && m.uid() == uid && m.mode() & 0o022 == 0)
        };
        let xdg = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|p| p.is_absolute());
        let base = xdg
            .into_iter()
            .chain([PathBuf::from(format!("/run/user/{uid}"))])
            .find(|p| owned(p))
            .map_or_else(
                || PathBuf::from(format!("/tmp/hyv-{uid}")),
                |p| p.join("hyv"),
            );
        Self::open_at(base)
    }

    /// The same at a path of one's own; its parent must exist.
    ///
    /// # Errors
    /// `Unsafe`, `Io`.
    pub fn open_at(path: PathBuf) -> Result<Self, RuntimeDirError> {
        make_private(&path)?;
        Ok(Self { path })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Holds off every other claim, clean-up and release until the result is dropped.
    fn lock(&self) -> Result<File, RuntimeDirError> {
        let dir = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed())
            .open(&self.path)
            .map_err(at(&self.path))?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&dir, FlockOperation::LockExclusive))
            .map_err(|e| at(&self.path)(e.into()))?;
        Ok(dir)
    }

    /// Claims the folder of `name` for this process and removes what killed instances left behind.
    ///
    /// # Errors
    /// `BadName`, `Held`, `Unsafe`, `PathTooLong`, `Io`.
    pub fn claim(&self, name: &str) -> Result<RuntimeDir, RuntimeDirError> {
        check_name(name)?;
        let _all = self.lock()?;
        self.clean_locked();
        self.claim_locked(name)
    }

    /// Claims `prefix`, or if that is held `prefix-2`, `prefix-3` and so on.
    ///
    /// # Errors
    /// `TooMany`, and as [`Self::claim`] without `Held`.
    pub fn claim_free(&self, prefix: &str) -> Result<RuntimeDir, RuntimeDirError> {
        check_name(prefix)?;
        let _all = self.lock()?;
        self.clean_locked();
        for n in 1..=MAX_INSTANCES_PER_NAME {
            let name = if n == 1 {
                prefix.to_owned()
            } else {
                format!("{prefix}-{n}")
            };
            check_name(&name)?;
            match self.claim_locked(&name) {
                Err(RuntimeDirError::Held { .. }) => {}
                other => return other,
            }
        }
        Err(RuntimeDirError::TooMany {
            prefix: prefix.to_owned(),
        })
    }

    /// Instances that run now, by name.
    ///
    /// # Errors
    /// `Io`.
    pub fn instances(&self) -> Result<Vec<Instance>, RuntimeDirError> {
        let _all = self.lock()?;
        let mut found = Vec::new();
        for name in self.names() {
            if let Err(RuntimeDirError::Held { name, pid }) =
                take_lock(&self.path.join(&name), &name)
            {
                found.push(Instance {
                    path: self.path.join(&name),
                    name,
                    pid,
                });
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Folders in the root that are of this user, held or not.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| check_name(n).is_ok() && check_private(&self.path.join(n)).is_ok())
            .collect()
    }

    /// Removes folders that nobody holds. Failure is no reason not to start, so it is only logged.
    fn clean_locked(&self) {
        for name in self.names() {
            let path = self.path.join(&name);
            if let Ok(lock) = take_lock(&path, &name) {
                match remove_flat(&path) {
                    Ok(()) => {
                        tracing::debug!(path = %path.display(), "removed what a dead instance left");
                    }
                    Err(e) => {
                        tracing::warn!(path = %path.display(), "cannot remove what a dead instance left: {e}");
                    }
                }
                drop(lock);
            }
        }
    }

    fn claim_locked(&self, name: &str) -> Result<RuntimeDir, RuntimeDirError> {
        let path = self.path.join(name);
        if path.as_os_str().len() + 1 + MAX_INSTANCE_NAME > MAX_SOCKET_PATH {
            return Err(RuntimeDirError::PathTooLong { path });
        }
        make_private(&path)?;
        let mut lock = take_lock(&path, name)?;
        let say = |lock: &mut File| {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{}", std::process::id())
        };
        say(&mut lock).map_err(at(&path))?;
        Ok(RuntimeDir {
            root: self.clone(),
            name: name.to_owned(),
            path,
            _lock: lock,
        })
    }
}

/// The folder of this instance; removed with all that is in it when dropped.
#[derive(Debug)]
pub struct RuntimeDir {
    root: RuntimeRoot,
    name: String,
    path: PathBuf,
    _lock: File,
}

impl RuntimeDir {
    /// The instance's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its folder, mode 0700.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of a file or socket in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        let _all = self.root.lock();
        if let Err(e) = remove_flat(&self.path) {
            tracing::warn!(path = %self.path.display(), "cannot remove the runtime folder: {e}");
        }
    }
}

fn check_name(name: &str) -> Result<(), RuntimeDirError> {
    let ok = (1..=MAX_INSTANCE_NAME).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if ok {
        Ok(())
    } else {
        Err(RuntimeDirError::BadName {
            name: name.to_owned(),
        })
    }
}

/// A folder, not a link to one, of this user, closed to everyone else.
fn check_private(path: &Path) -> Result<(), RuntimeDirError> {
    let meta = fs::symlink_metadata(path).map_err(at(path))?;
    let reason = if meta.is_symlink() {
        "it is a symbolic link"
    } else if !meta.is_dir() {
        "it is not a folder"
    } else if meta.uid() != rustix::process::getuid().as_raw() {
        "it belongs to another user"
    } else if meta.mode() & 0o077 != 0 {
        "others may enter it"
    } else {
        return Ok(());
    };
    Err(RuntimeDirError::Unsafe {
        path: path.to_owned(),
        reason,
    })
}

fn make_private(path: &Path) -> Result<(), RuntimeDirError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(at(path)(e)),
    }
    check_private(path)
}

/// Takes the lock of the instance folder `path`, or says who has it.
fn take_lock(path: &Path, name: &str) -> Result<File, RuntimeDirError> {
    let file = path.join(LOCK_FILE);
    let mut lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&file)
        .map_err(at(&file))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let _ = lock.read_to_string(&mut text);
            Err(RuntimeDirError::Held {
                name: name.to_owned(),
                pid: text.trim().parse().ok(),
            })
        }
        Err(e) => Err(at(&file)(e.into())),
    }
}

/// Removes a folder and the files in it; never follows a link, never descends.
fn remove_flat(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn root() -> (tempfile::TempDir, RuntimeRoot) {
        let t = tempfile::tempdir().unwrap();
        let r = RuntimeRoot::open_at(t.path().join("hyv")).unwrap();
        (t, r)
    }

    #[test]
    fn a_name_is_held_until_dropped() {
        let (_t, r) = root();
        let a = r.claim("kv").unwrap();
        assert_eq!(fs::metadata(a.path()).unwrap().mode() & 0o777, 0o700);
        fs::write(a.file("socket"), "").unwrap();
        let me = Some(std::process::id());
        assert!(matches!(r.claim("kv"), Err(RuntimeDirError::Held { pid, .. }) if pid == me));
        assert!(a.file("socket").exists());
        let b = r.claim_free("kv").unwrap();
        assert_eq!(b.name(), "kv-2");
        let names: Vec<_> = r
            .instances()
            .unwrap()
            .into_iter()
            .map(|i| (i.name, i.pid))
            .collect();
        assert_eq!(names, [("kv".to_owned(), me), ("kv-2".to_owned(), me)]);
        drop(a);
        assert!(!r.path().join("kv").exists());
        assert_eq!(r.claim_free("kv").unwrap().name(), "kv");
    }

    #[test]
    fn what_the_dead_leave_is_removed() {
        let (_t, r) = root();
        let dead = r.path().join("dead");
        DirBuilder::new().mode(0o700).create(&dead).unwrap();
        fs::write(dead.join("lock"), "999999999\n").unwrap();
        fs::write(dead.join("socket"), "").unwrap();
        assert!(r.instances().unwrap().is_empty());
        let _a = r.claim("kv").unwrap();
        assert!(!dead.exists());
        let same = r.path().join("same");
        DirBuilder::new().mode(0o700).create(&same).unwrap();
        fs::write(same.join("old"), "").unwrap();
        let b = r.claim("same").unwrap();
        assert!(!b.file("old").exists());
    }

    #[test]
    fn links_and_open_folders_are_refused() {
        let (t, r) = root();
        let elsewhere = t.path().join("elsewhere");
        DirBuilder::new().mode(0o700).create(&elsewhere).unwrap();
        fs::write(elsewhere.join("precious"), "").unwrap();
        symlink(&elsewhere, r.path().join("link")).unwrap();
        assert!(matches!(
            r.claim("link"),
            Err(RuntimeDirError::Unsafe { .. })
        ));
        assert!(matches!(
            RuntimeRoot::open_at(r.path().join("link")),
            Err(RuntimeDirError::Unsafe { .. })
        ));
        assert!(elsewhere.join("precious").exists());
        let open = r.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(
            r.claim("open"),
            Err(RuntimeDirError::Unsafe { .. })
        ));
        fs::write(r.path().join("file"), "").unwrap();
        assert!(matches!(
            r.claim("file"),
            Err(RuntimeDirError::Unsafe { .. })
        ));
    }

    #[test]
    fn names_are_checked() {
        let (_t, r) = root();
        for bad in [
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "a b",
            "a\n",
            &"x".repeat(33),
        ] {
            assert!(
                matches!(r.claim(bad), Err(RuntimeDirError::BadName { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_lock_that_is_a_link_is_not_followed() {
        let (t, r) = root();
        let victim = t.path().join("victim");
        fs::write(&victim, "keep").unwrap();
        let dir = r.path().join("kv");
        DirBuilder::new().mode(0o700).create(&dir).unwrap();
        symlink(&victim, dir.join("lock")).unwrap();
        assert!(matches!(r.claim("kv"), Err(RuntimeDirError::Io { .. })));
        assert_eq!(fs::read_to_string(&victim).unwrap(), "keep");
    }

    #[test]
    fn many_claims_at_once_get_different_names() {
        let (_t, r) = root();
        let held: Vec<_> = std::thread::scope(|s| {
            let tasks: Vec<_> = (0..16)
                .map(|_| s.spawn(|| r.claim_free("n").unwrap()))
                .collect();
            tasks.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let mut names: Vec<_> = held.iter().map(RuntimeDir::name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 16);
    }
}
