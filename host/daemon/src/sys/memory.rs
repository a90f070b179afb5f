//! Sealed memfds, and mappings of them that another party writes to at the same time.
#![allow(unsafe_code, reason = "maps shared memory and copies in and out of it")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Size and alignment of a large page.
pub const HUGE_PAGE: usize = 2 << 20;

/// Seals of every memory file that this process shares: its size never changes again.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// What can go wrong with shared memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A memfd of no bytes.
    #[error("a shared memory file cannot be empty")]
    Empty,
    /// The kernel refused to make the file.
    #[error(
        "cannot create {len} bytes of shared memory: {source} (is there a limit on memory or on open files?)"
    )]
    Create {
        /// Bytes asked for.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused to map the file.
    #[error("cannot map {len} bytes of shared memory: {source} (see `ulimit -v`)")]
    Map {
        /// Bytes asked for.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file from elsewhere that somebody could still truncate, which would kill whoever maps it.
    #[error("a shared memory file is not sealed against shrinking and growing")]
    NotSealed,
    /// The file is smaller than what is to be mapped.
    #[error("a shared memory file has {actual} bytes where {expected} are needed")]
    TooShort {
        /// Bytes needed.
        expected: u64,
        /// Bytes there.
        actual: u64,
    },
    /// An access outside the mapping.
    #[error("{len} bytes at offset {offset:#x} lie outside a mapping of {mapped} bytes")]
    OutOfBounds {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes mapped.
        mapped: u64,
    },
    /// An atomic access at an odd address.
    #[error("offset {offset:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// The offset.
        offset: u64,
        /// The alignment needed.
        align: usize,
    },
    /// Not enough free memory.
    #[error(
        "{} MiB of memory asked for, but only {} MiB are free; give --memory a smaller size or free some",
        asked >> 20,
        available >> 20
    )]
    Insufficient {
        /// Bytes asked for.
        asked: u64,
        /// Bytes free.
        available: u64,
    },
    /// 2 MiB pages could not be made.
    #[error("cannot turn memory into 2 MiB pages: {source}")]
    Collapse {
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Creates a zeroed memory file of `len` bytes whose size is sealed. `name` shows in `/proc/*/maps` only.
///
/// # Errors
/// `Empty` for no bytes; `Create` when the kernel refuses.
pub fn sealed_memfd(name: &str, len: u64) -> Result<OwnedFd, MemoryError> {
    if len == 0 {
        return Err(MemoryError::Empty);
    }
    let create = |source: Errno| MemoryError::Create {
        len,
        source: source.into(),
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 do not know the flag.
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    }
    .map_err(create)?;
    rustix::fs::ftruncate(&fd, len).map_err(create)?;
    rustix::fs::fcntl_add_seals(&fd, SEALS).map_err(create)?;
    Ok(fd)
}

/// Checks that a memory file from elsewhere is sealed and holds at least `len` bytes.
///
/// # Errors
/// `NotSealed`, `TooShort`.
pub fn check_sealed(fd: BorrowedFd<'_>, len: u64) -> Result<(), MemoryError> {
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| MemoryError::NotSealed)?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return Err(MemoryError::NotSealed);
    }
    let actual = rustix::fs::fstat(fd).map_or(0, |s| u64::try_from(s.st_size).unwrap_or(0));
    if actual < len {
        return Err(MemoryError::TooShort {
            expected: len,
            actual,
        });
    }
    Ok(())
}

/// Bytes of memory that can still be taken: what the kernel calls available, or less where a control
/// group limits this process. `None` where neither can be read.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|l| l.trim().strip_suffix("kB"))
        .and_then(|l| l.trim().parse::<u64>().ok())?
        * 1024;
    Some(cgroup_free().map_or(available, |free| free.min(available)))
}

/// Bytes below the tightest limit of the control groups (version 2) that this process is in. The page cache of
/// ordinary files counts as free: the kernel drops it first.
fn cgroup_free() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::/"))?;
    let root = std::path::Path::new("/sys/fs/cgroup");
    root.join(path)
        .ancestors()
        .take_while(|p| p.starts_with(root))
        .filter_map(group_free)
        .min()
}

fn group_free(group: &std::path::Path) -> Option<u64> {
    let number = |file: &str| {
        std::fs::read_to_string(group.join(file))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let (max, current) = (number("memory.max")?, number("memory.current")?);
    let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let field = |name: &str| {
        let line = stat
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|v| v.parse::<u64>().ok()).unwrap_or(0)
    };
    let cache = field("file").saturating_sub(field("shmem"));
    Some(max.saturating_sub(current.saturating_sub(cache)))
}

/// Checks that `asked` bytes are free, with [`crate::limits::HOST_MEMORY_RESERVE`] left over: a memory file is
/// not backed until it is touched, and a page that cannot be had then is a SIGBUS.
///
/// # Errors
/// `Insufficient`.
pub fn check_available(asked: u64) -> Result<(), MemoryError> {
    match available_bytes() {
        Some(free) if free.saturating_sub(crate::limits::HOST_MEMORY_RESERVE) < asked => {
            Err(MemoryError::Insufficient {
                asked,
                available: free,
            })
        }
        _ => Ok(()),
    }
}

/// A whole memory file, mapped shared and writable. Others read and write it at any time, so it is never
/// lent as a slice: copy in, copy out, or use the atomics.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    reserved: NonNull<c_void>,
    reserved_len: usize,
}

// SAFETY: a mapping is plain memory that belongs to no thread; all access goes through atomics or raw pointers.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&self` gives no non-atomic reference into the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `fd`, on a 2 MiB boundary and with large pages asked for when `len` is 2 MiB or more.
    ///
    /// # Errors
    /// `Empty`; `NotSealed` and `TooShort` when the file could fault; `Map` when the kernel refuses.
    pub fn new(fd: impl AsFd, len: u64) -> Result<Self, MemoryError> {
        if len == 0 {
            return Err(MemoryError::Empty);
        }
        check_sealed(fd.as_fd(), len)?;
        let refuse = |source: io::Error| MemoryError::Map { len, source };
        let too_long = || refuse(io::ErrorKind::OutOfMemory.into());
        let bytes = usize::try_from(len).map_err(|_| too_long())?;
        let reserved_len = bytes.checked_add(HUGE_PAGE).ok_or_else(too_long)?;
        // SAFETY: asks for new address space, wherever the kernel likes.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                reserved_len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|e| refuse(e.into()))?;
        let reserved = NonNull::new(reserved).ok_or_else(too_long)?;
        let base = reserved
            .as_ptr()
            .cast::<u8>()
            .map_addr(|a| a.next_multiple_of(HUGE_PAGE));
        let base = NonNull::new(base).ok_or_else(too_long)?;
        let mapping = Self {
            base,
            len: bytes,
            reserved,
            reserved_len,
        };
        // SAFETY: replaces a part of the reservation above, which nothing else knows of; the seals checked above
        // keep the file from shrinking under the mapping.
        unsafe {
            rustix::mm::mmap(
                base.as_ptr().cast(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                0,
            )
        }
        .map_err(|e| refuse(e.into()))?;
        if bytes >= HUGE_PAGE {
            // SAFETY: advice on our own mapping changes no contents. Refusal (no such pages here) changes nothing.
            let _ = unsafe {
                rustix::mm::madvise(
                    base.as_ptr().cast(),
                    bytes,
                    rustix::mm::Advice::LinuxHugepage,
                )
            };
        }
        Ok(mapping)
    }

    /// First byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty mapping cannot be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of `len` bytes at `offset`, all inside the mapping.
    ///
    /// # Errors
    /// `OutOfBounds`.
    #[inline]
    pub fn range(&self, offset: u64, len: u64) -> Result<NonNull<u8>, MemoryError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len as u64 => {
                // SAFETY: `offset` is at most `self.len`, so the result is inside the mapping or one past it.
                Ok(unsafe { self.base.add(offset as usize) })
            }
            _ => Err(MemoryError::OutOfBounds {
                offset,
                len,
                mapped: self.len as u64,
            }),
        }
    }

    fn aligned<T>(&self, offset: u64) -> Result<*mut T, MemoryError> {
        let p = self
            .range(offset, size_of::<T>() as u64)?
            .as_ptr()
            .cast::<T>();
        if !p.is_aligned() {
            return Err(MemoryError::Misaligned {
                offset,
                align: align_of::<T>(),
            });
        }
        Ok(p)
    }

    /// The 32-bit word at `offset`.
    ///
    /// # Errors
    /// `OutOfBounds`, `Misaligned`.
    pub fn atomic_u32(&self, offset: u64) -> Result<&AtomicU32, MemoryError> {
        // SAFETY: aligned, mapped as long as `self` lives, and only accessed atomically.
        Ok(unsafe { AtomicU32::from_ptr(self.aligned(offset)?) })
    }

    /// The 64-bit word at `offset`.
    ///
    /// # Errors
    /// `OutOfBounds`, `Misaligned`.
    pub fn atomic_u64(&self, offset: u64) -> Result<&AtomicU64, MemoryError> {
        // SAFETY: aligned, mapped as long as `self` lives, and only accessed atomically.
        Ok(unsafe { AtomicU64::from_ptr(self.aligned(offset)?) })
    }

    /// Copies from the mapping into `to`. What another party writes meanwhile arrives torn, never unsound.
    ///
    /// # Errors
    /// `OutOfBounds`; nothing is copied then.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.range(offset, to.len() as u64)?.as_ptr();
        let head = from.align_offset(8).min(to.len());
        let (edge, rest) = to.split_at_mut(head);
        let read_byte = |at: usize| {
            // SAFETY: `range` checked that all of `to.len()` bytes from `from` are mapped.
            unsafe { AtomicU8::from_ptr(from.add(at)) }.load(Ordering::Relaxed)
        };
        for (i, b) in edge.iter_mut().enumerate() {
            *b = read_byte(i);
        }
        let mut at = head;
        let mut words = rest.chunks_exact_mut(8);
        for w in &mut words {
            // SAFETY: inside the checked range, and a multiple of 8 from an aligned address.
            let word = unsafe { AtomicU64::from_ptr(from.add(at).cast()) }.load(Ordering::Relaxed);
            w.copy_from_slice(&word.to_ne_bytes());
            at += 8;
        }
        for b in words.into_remainder() {
            *b = read_byte(at);
            at += 1;
        }
        Ok(())
    }

    /// Copies `from` into the mapping.
    ///
    /// # Errors
    /// `OutOfBounds`; nothing is copied then.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), MemoryError> {
        let to = self.range(offset, from.len() as u64)?.as_ptr();
        let head = to.align_offset(8).min(from.len());
        let (edge, rest) = from.split_at(head);
        let write_byte = |at: usize, b: u8| {
            // SAFETY: `range` checked that all of `from.len()` bytes from `to` are mapped.
            unsafe { AtomicU8::from_ptr(to.add(at)) }.store(b, Ordering::Relaxed);
        };
        for (i, b) in edge.iter().enumerate() {
            write_byte(i, *b);
        }
        let mut at = head;
        let mut words = rest.chunks_exact(8);
        for w in &mut words {
            let mut word = [0; 8];
            word.copy_from_slice(w);
            // SAFETY: inside the checked range, and a multiple of 8 from an aligned address.
            unsafe { AtomicU64::from_ptr(to.add(at).cast()) }
                .store(u64::from_ne_bytes(word), Ordering::Relaxed);
            at += 8;
        }
        for b in words.remainder() {
            write_byte(at, *b);
            at += 1;
        }
        Ok(())
    }

    /// Copies `len` bytes from one mapping to another as fast as this machine can: what a device's copy is measured by.
    ///
    /// # Errors
    /// `OutOfBounds`; nothing is copied then.
    pub fn copy_to(&self, offset: u64, to: &Self, at: u64, len: u64) -> Result<(), MemoryError> {
        let (from, to) = (self.range(offset, len)?, to.range(at, len)?);
        // SAFETY: both ranges are mapped; another party may write them meanwhile, and the bytes have no invariants.
        unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), len as usize) };
        Ok(())
    }

    /// Turns `len` bytes at `offset` into 2 MiB pages now, copying what is there. Whole pages inside the range only.
    /// Takes some 5 s per GiB, and backs what was never touched.
    ///
    /// # Errors
    /// `OutOfBounds`; `Collapse` when the kernel cannot (before 6.1) or has no free 2 MiB of physical memory left.
    pub fn collapse(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        self.range(offset, len)?;
        let step = HUGE_PAGE as u64;
        let (start, end) = (offset.next_multiple_of(step), (offset + len) / step * step);
        if start >= end {
            return Ok(());
        }
        let at = self.range(start, end - start)?;
        let mut failed = None;
        for chunk in (0..end - start).step_by(HUGE_PAGE) {
            // A chunk without any page cannot become a large one: give it one.
            // SAFETY: inside our own mapping; a read that nobody depends on.
            let _ = unsafe { at.as_ptr().add(chunk as usize).read_volatile() };
            // SAFETY: our own mapping; contents stay.
            let rc = unsafe {
                libc::madvise(
                    at.as_ptr().add(chunk as usize).cast(),
                    HUGE_PAGE,
                    libc::MADV_COLLAPSE,
                )
            };
            // One that cannot be (empty, or pinned) must not keep the others on small pages.
            if rc != 0 {
                failed = Some(io::Error::last_os_error());
            }
        }
        if let Some(source) = failed {
            return Err(MemoryError::Collapse { source });
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole reservation is ours, and `self` was the last way to reach it.
        let _ = unsafe { rustix::mm::munmap(self.reserved.as_ptr(), self.reserved_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(len: u64) -> Mapping {
        Mapping::new(sealed_memfd("test", len).unwrap(), len).unwrap()
    }

    #[test]
    fn memfd_is_zeroed_sealed_and_aligned() {
        let fd = sealed_memfd("test", 4 << 20).unwrap();
        assert!(rustix::fs::ftruncate(&fd, 4096).is_err());
        assert!(rustix::fs::ftruncate(&fd, 8 << 20).is_err());
        assert!(rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE).is_err());
        let m = Mapping::new(&fd, 4 << 20).unwrap();
        assert_eq!(m.as_ptr().addr() % HUGE_PAGE, 0);
        let mut all = vec![1; m.len()];
        m.read_at(0, &mut all).unwrap();
        assert!(all.iter().all(|b| *b == 0));
    }

    #[test]
    fn two_mappings_of_one_file_share() {
        let fd = sealed_memfd("test", 8192).unwrap();
        let (a, b) = (
            Mapping::new(&fd, 8192).unwrap(),
            Mapping::new(&fd, 8192).unwrap(),
        );
        a.atomic_u64(4096).unwrap().store(7, Ordering::Relaxed);
        assert_eq!(b.atomic_u64(4096).unwrap().load(Ordering::Relaxed), 7);
    }

    #[test]
    fn unsealed_or_short_files_are_refused() {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, 8192).unwrap();
        assert!(matches!(
            Mapping::new(&fd, 8192),
            Err(MemoryError::NotSealed)
        ));
        rustix::fs::fcntl_add_seals(&fd, SEALS).unwrap();
        assert!(matches!(
            Mapping::new(&fd, 8193),
            Err(MemoryError::TooShort { .. })
        ));
        assert!(Mapping::new(&fd, 8192).is_ok());
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(8192).unwrap();
        assert!(matches!(
            Mapping::new(&disk, 8192),
            Err(MemoryError::NotSealed)
        ));
    }

    #[test]
    fn every_access_is_checked() {
        let m = mapped(4096);
        let mut two = [0; 2];
        assert!(m.read_at(4095, &mut two).is_err());
        assert!(m.write_at(4095, &two).is_err());
        assert!(m.read_at(u64::MAX, &mut two).is_err());
        assert!(m.atomic_u64(4089).is_err());
        assert!(m.atomic_u64(4084).is_err());
        assert!(m.atomic_u32(4092).is_ok());
        assert!(m.range(4096, 0).is_ok());
        assert!(m.range(4097, 0).is_err());
        assert!(m.collapse(0, 4097).is_err());
    }

    #[test]
    fn copies_at_any_alignment() {
        let m = mapped(4096);
        let data: Vec<u8> = (0..100).collect();
        for offset in 0..17 {
            for len in 0..40 {
                m.write_at(offset, &[0xee; 64]).unwrap();
                m.write_at(offset, &data[..len]).unwrap();
                let mut back = [0; 64];
                m.read_at(offset, &mut back).unwrap();
                assert_eq!(back[..len], data[..len]);
                assert!(back[len..].iter().all(|b| *b == 0xee));
            }
        }
    }

    #[test]
    fn collapse_keeps_contents() {
        let m = mapped(8 << 20);
        m.write_at(5 << 20, b"kept").unwrap();
        match m.collapse(0, 8 << 20) {
            Ok(()) => {}
            // A kernel without large pages for shared memory says so; the contents must still be there.
            Err(e) => assert!(matches!(e, MemoryError::Collapse { .. }), "{e}"),
        }
        let mut back = [0; 4];
        m.read_at(5 << 20, &mut back).unwrap();
        assert_eq!(&back, b"kept");
    }

    #[test]
    fn more_memory_than_there_is_is_refused() {
        assert!(available_bytes().unwrap() > 0);
        let e = check_available(1 << 60).unwrap_err().to_string();
        assert!(e.contains("--memory"), "{e}");
        check_available(1 << 20).unwrap();
    }
}
