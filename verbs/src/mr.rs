//! Protection domains and memory regions.
#![allow(
    unsafe_code,
    reason = "memory regions are memory that the device and this program share"
)]

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;

use hyv_abi::control::{AllocPd, DeallocPd, DeregMr, RegMr, ReregMr, rereg};
use hyv_abi::queue::Sge;
use hyv_abi::types::{Access, Reason};
use spin::mutex::SpinMutex;

use crate::context::{Context, ContextInner};
use crate::dma::{self, DmaBuf};
use crate::error::Error;
use crate::limits::{HUGE, MIN_MR_ALLOC};
use crate::wr::RemoteAddr;

pub(crate) struct PdInner {
    pub(crate) context: Arc<ContextInner>,
    pub(crate) handle: u32,
}

impl Drop for PdInner {
    fn drop(&mut self) {
        let _ = self.context.call(&DeallocPd { pd: self.handle });
    }
}

/// A protection domain. Clones are the same domain; it is deallocated when nothing uses it any more.
#[derive(Clone)]
pub struct ProtectionDomain {
    pub(crate) inner: Arc<PdInner>,
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProtectionDomain({:#x})", self.inner.handle)
    }
}

/// Memory that was part of regions, and is for regions only as long as the context lives: a completion that is
/// polled late may deliver payload into it, which then hits at worst another region of the same program.
pub(crate) struct MrPool(SpinMutex<Vec<DmaBuf>>);

impl MrPool {
    pub(crate) const fn new() -> Self {
        Self(SpinMutex::new(Vec::new()))
    }

    fn take(&self, size: usize) -> Option<DmaBuf> {
        let mut pool = self.0.lock();
        let at = pool.iter().position(|b| b.size() == size)?;
        Some(pool.swap_remove(at))
    }

    fn put(&self, buf: DmaBuf) {
        self.0.lock().push(buf);
    }
}

/// A registration that outlives its [`MemoryRegion`], because memory windows are bound to it.
struct ParkedMr {
    pd: Arc<PdInner>,
    handle: u32,
    owned: Option<DmaBuf>,
}

impl ParkedMr {
    /// Deregisters it; gives it back with the error if windows are bound to it.
    fn deregister(mut self) -> Result<(), (Option<Self>, Error)> {
        let context = Arc::clone(&self.pd.context);
        let done = context.call(&DeregMr { mr: self.handle });
        match done {
            Err(Error::Verb(e)) if e.reason == Reason::WindowsBound => {
                return Err((Some(self), Error::Verb(e)));
            }
            Ok(_) => {
                if let Some(buf) = self.owned.take() {
                    context.pool.put(buf);
                }
            }
            Err(e) => {
                if let Some(buf) = self.owned.take() {
                    // The device may still reach it.
                    buf.retain();
                }
                return Err((None, e));
            }
        }
        Ok(())
    }
}

/// Registrations that wait for memory windows to go.
pub(crate) struct Parked(SpinMutex<Vec<ParkedMr>>);

impl Parked {
    pub(crate) const fn new() -> Self {
        Self(SpinMutex::new(Vec::new()))
    }

    /// Tries again, as a window or a queue pair, with which its windows are unbound, has gone; what still has some bound goes on
    /// waiting.
    pub(crate) fn retry(&self, context: &ContextInner) {
        if self.0.lock().is_empty() {
            return;
        }
        let waiting = core::mem::take(&mut *self.0.lock());
        for mr in waiting {
            if let Err((Some(mr), _)) = mr.deregister() {
                context.parked.0.lock().push(mr);
            }
        }
    }
}

/// Memory for a region of `len` bytes, zeroed.
fn allocate(context: &ContextInner, len: usize) -> Result<DmaBuf, Error> {
    let too_large = || Error::OutOfMemory { len };
    let (size, align) = if len >= HUGE {
        (
            len.checked_next_multiple_of(HUGE).ok_or_else(too_large)?,
            HUGE,
        )
    } else {
        (
            len.max(MIN_MR_ALLOC)
                .checked_next_power_of_two()
                .ok_or_else(too_large)?,
            64,
        )
    };
    match context.pool.take(size) {
        Some(buf) => {
            buf.clear();
            Ok(buf)
        }
        None => DmaBuf::new(context.platform(), size, align),
    }
}

/// What [`MemoryRegion::rereg`] changes; what is `None` stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rereg<'a> {
    /// Another protection domain of the same context.
    pub pd: Option<&'a ProtectionDomain>,
    /// Other access.
    pub access: Option<Access>,
    /// Other memory: so many new, zeroed bytes.
    pub len: Option<usize>,
}

impl Context {
    /// Makes a protection domain (`ibv_alloc_pd`).
    ///
    /// # Errors
    /// As any control verb; ENOMEM beyond the quota.
    pub fn alloc_pd(&self) -> Result<ProtectionDomain, Error> {
        let handle = self.inner.call(&AllocPd {})?.handle;
        let context = Arc::clone(&self.inner);
        Ok(ProtectionDomain {
            inner: Arc::new(PdInner { context, handle }),
        })
    }
}

impl ProtectionDomain {
    /// Allocates and registers `len` zeroed bytes. The memory is aligned to 64 bytes, from 2 MiB on to 2 MiB.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; as any control verb: EINVAL for no bytes or unknown access, ENOMEM beyond a quota.
    pub fn alloc_mr(&self, len: usize, access: Access) -> Result<MemoryRegion, Error> {
        let buf = allocate(&self.inner.context, len)?;
        let (ptr, offset) = (buf.ptr(), buf.offset());
        self.register(ptr, offset, len, access, Some(buf))
    }

    /// Registers memory that is there already (`ibv_reg_mr`).
    ///
    /// # Errors
    /// [`Error::NotShared`] if any of it is not in the RAM that the device reaches; as any control verb: EINVAL for no
    /// bytes or unknown access, ENOMEM beyond a quota.
    ///
    /// # Safety
    /// `len` bytes at `ptr` are valid for reads and writes, by this program and by the device as `access` lets it,
    /// until the region is dropped, with the memory windows that are bound to it, *and* every completion of work posted with
    /// its lkey was polled or its queue pair was destroyed. Rust references into it must not exist while the device may write what they cover.
    pub unsafe fn reg_mr(
        &self,
        ptr: NonNull<u8>,
        len: usize,
        access: Access,
    ) -> Result<MemoryRegion, Error> {
        let offset = self
            .inner
            .context
            .platform()
            .ram_offset(ptr.as_ptr(), len)
            .ok_or(Error::NotShared)?;
        self.register(ptr, offset, len, access, None)
    }

    fn register(
        &self,
        ptr: NonNull<u8>,
        ram_offset: u64,
        len: usize,
        access: Access,
        owned: Option<DmaBuf>,
    ) -> Result<MemoryRegion, Error> {
        // Payload that comes in a completion is written at an SGE's address.
        let iova = ptr.as_ptr().expose_provenance() as u64;
        let request = RegMr {
            pd: self.inner.handle,
            access: access.bits(),
            iova,
            ram_offset,
            len: len as u64,
        };
        let reply = self.inner.context.call(&request)?;
        let (handle, lkey, rkey) = (reply.handle, reply.lkey, reply.rkey);
        Ok(MemoryRegion {
            pd: Arc::clone(&self.inner),
            ptr,
            len,
            handle,
            lkey,
            rkey,
            owned,
            registered: true,
        })
    }
}

/// An access outside a memory region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfRegion {
    /// First byte of the access.
    pub offset: usize,
    /// Bytes of the access.
    pub len: usize,
    /// Bytes of the region.
    pub region: usize,
}

impl fmt::Display for OutOfRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            offset,
            len,
            region,
        } = self;
        write!(
            f,
            "{len} bytes at offset {offset} are not inside a memory region of {region} bytes"
        )
    }
}

impl core::error::Error for OutOfRegion {}

/// A memory region, deregistered when dropped; if memory windows are bound to it, as soon as the last of them, or its queue
/// pair, was dropped.
/// The device may read and write it at any time, so safe access copies.
pub struct MemoryRegion {
    pd: Arc<PdInner>,
    ptr: NonNull<u8>,
    len: usize,
    handle: u32,
    lkey: u32,
    rkey: u32,
    owned: Option<DmaBuf>,
    registered: bool,
}

// SAFETY: memory that belongs to no thread; `&self` gives out atomics and copies only.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegion")
            .field("addr", &self.ptr)
            .field("len", &self.len)
            .field("lkey", &self.lkey)
            .field("rkey", &self.rkey)
            .finish_non_exhaustive()
    }
}

impl MemoryRegion {
    /// Bytes.
    #[inline]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Never: a region of no bytes cannot be made.
    #[inline]
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Local key.
    #[inline]
    #[must_use]
    pub const fn lkey(&self) -> u32 {
        self.lkey
    }

    /// Remote key.
    #[inline]
    #[must_use]
    pub const fn rkey(&self) -> u32 {
        self.rkey
    }

    /// Address of its first byte, for work requests and peers.
    #[inline]
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.ptr.as_ptr().addr() as u64
    }

    /// Its first byte.
    #[inline]
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// An SGE for `len` bytes at `offset`. What reaches outside the region, the device refuses.
    #[inline]
    #[must_use]
    pub fn sge(&self, offset: u64, len: u32) -> Sge {
        Sge {
            addr: self.addr().wrapping_add(offset),
            len,
            lkey: self.lkey,
        }
    }

    /// What a peer needs to reach the byte at `offset`.
    #[inline]
    #[must_use]
    pub fn remote(&self, offset: u64) -> RemoteAddr {
        RemoteAddr {
            addr: self.addr().wrapping_add(offset),
            rkey: self.rkey,
        }
    }

    fn check(&self, offset: usize, len: usize) -> Result<*mut u8, OutOfRegion> {
        match offset.checked_add(len) {
            // SAFETY: inside the region, or one past its end.
            Some(end) if end <= self.len => Ok(unsafe { self.ptr.add(offset) }.as_ptr()),
            _ => Err(OutOfRegion {
                offset,
                len,
                region: self.len,
            }),
        }
    }

    /// Copies `from` to `offset`.
    ///
    /// # Errors
    /// [`OutOfRegion`]; nothing is copied then.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), OutOfRegion> {
        let to = self.check(offset, from.len())?;
        // SAFETY: inside the region (checked), to which no reference but atomics exists (by the contracts of
        // `slice`, `slice_mut` and `reg_mr`).
        unsafe { dma::copy_in(to, from) };
        Ok(())
    }

    /// Copies from `offset` to `to`. What the device writes meanwhile may arrive in part.
    ///
    /// # Errors
    /// [`OutOfRegion`]; nothing is copied then.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), OutOfRegion> {
        let from = self.check(offset, to.len())?;
        // SAFETY: as in `write`.
        unsafe { dma::copy_out(from, to) };
        Ok(())
    }

    /// The word at `offset`, to watch what the device writes there. `None` if outside or not aligned to 8 bytes.
    #[must_use]
    pub fn atomic_u64(&self, offset: usize) -> Option<&AtomicU64> {
        let at = self.check(offset, 8).ok()?.cast::<u64>();
        // SAFETY: inside the region and aligned (checked); as in `write`.
        at.is_aligned().then(|| unsafe { AtomicU64::from_ptr(at) })
    }

    /// The bytes at `offset`.
    ///
    /// # Errors
    /// [`OutOfRegion`].
    ///
    /// # Safety
    /// While the slice lives neither the device (no receive, READ or remote write can hit it) nor this program
    /// writes these bytes.
    pub unsafe fn slice(&self, offset: usize, len: usize) -> Result<&[u8], OutOfRegion> {
        let at = self.check(offset, len)?;
        // SAFETY: inside the region (checked); not written meanwhile, as the caller vouches.
        Ok(unsafe { core::slice::from_raw_parts(at, len) })
    }

    /// The bytes at `offset`, to write.
    ///
    /// # Errors
    /// [`OutOfRegion`].
    ///
    /// # Safety
    /// While the slice lives neither the device nor this program reads or writes these bytes in another way.
    #[allow(
        clippy::mut_from_ref,
        reason = "the caller vouches that slices do not overlap"
    )]
    pub unsafe fn slice_mut(&self, offset: usize, len: usize) -> Result<&mut [u8], OutOfRegion> {
        let at = self.check(offset, len)?;
        // SAFETY: inside the region (checked); not used in another way meanwhile, as the caller vouches.
        Ok(unsafe { core::slice::from_raw_parts_mut(at, len) })
    }

    /// Changes what the region is (`ibv_rereg_mr`). Its keys are new ones afterwards, and the old ones stop working before this
    /// returns. When it fails the region is what it was.
    ///
    /// # Errors
    /// [`Error::OtherContext`], [`Error::OutOfMemory`]; as any control verb: EBUSY while memory windows are bound to it,
    /// EINVAL for no bytes or unknown access, ENOMEM beyond a quota.
    pub fn rereg(&mut self, change: &Rereg<'_>) -> Result<(), Error> {
        let memory = match change.len {
            Some(len) => {
                let buf = allocate(&self.pd.context, len)?;
                Some((buf.ptr(), buf.offset(), len, Some(buf)))
            }
            None => None,
        };
        self.rereg_with(change, memory)
    }

    /// Changes which memory the region is, and more (`ibv_rereg_mr`): as [`rereg`](Self::rereg), but with memory that is there
    /// already. `change.len` does not count.
    ///
    /// # Errors
    /// [`Error::NotShared`] if any of it is not in the RAM that the device reaches, and as [`rereg`](Self::rereg).
    ///
    /// # Safety
    /// As for [`ProtectionDomain::reg_mr`].
    pub unsafe fn rereg_memory(
        &mut self,
        ptr: NonNull<u8>,
        len: usize,
        change: &Rereg<'_>,
    ) -> Result<(), Error> {
        let platform = self.pd.context.platform();
        let offset = platform
            .ram_offset(ptr.as_ptr(), len)
            .ok_or(Error::NotShared)?;
        self.rereg_with(change, Some((ptr, offset, len, None)))
    }

    fn rereg_with(
        &mut self,
        change: &Rereg<'_>,
        memory: Option<(NonNull<u8>, u64, usize, Option<DmaBuf>)>,
    ) -> Result<(), Error> {
        let context = Arc::clone(&self.pd.context);
        let mut request = ReregMr {
            mr: self.handle,
            flags: 0,
            pd: 0,
            access: 0,
            iova: 0,
            ram_offset: 0,
            len: 0,
        };
        if let Some(pd) = change.pd {
            if !Arc::ptr_eq(&pd.inner.context, &context) {
                return Err(Error::OtherContext);
            }
            request.flags |= rereg::PD;
            request.pd = pd.inner.handle;
        }
        if let Some(access) = change.access {
            request.flags |= rereg::ACCESS;
            request.access = access.bits();
        }
        if let Some((ptr, ram_offset, len, _)) = &memory {
            request.flags |= rereg::TRANSLATION;
            request.iova = ptr.as_ptr().expose_provenance() as u64;
            (request.ram_offset, request.len) = (*ram_offset, *len as u64);
        }
        let reply = match context.call(&request) {
            Ok(reply) => reply,
            Err(e) => {
                if let Some((.., Some(buf))) = memory {
                    if matches!(e, Error::Verb(_)) {
                        context.pool.put(buf);
                    } else {
                        // Nobody knows which memory it has now.
                        buf.retain();
                    }
                }
                return Err(e);
            }
        };
        (self.handle, self.lkey, self.rkey) = (reply.handle, reply.lkey, reply.rkey);
        if let Some(pd) = change.pd {
            self.pd = Arc::clone(&pd.inner);
        }
        if let Some((ptr, _, len, owned)) = memory {
            (self.ptr, self.len) = (ptr, len);
            if let Some(old) = core::mem::replace(&mut self.owned, owned) {
                context.pool.put(old);
            }
        }
        Ok(())
    }

    fn deregister(&mut self) -> Result<(), Error> {
        if !core::mem::take(&mut self.registered) {
            return Ok(());
        }
        let mr = ParkedMr {
            pd: Arc::clone(&self.pd),
            handle: self.handle,
            owned: self.owned.take(),
        };
        mr.deregister().map_err(|(parked, e)| {
            if let Some(mr) = parked {
                self.pd.context.parked.0.lock().push(mr);
            }
            e
        })
    }

    /// Deregisters it: its keys stop working before this returns (`ibv_dereg_mr`). Dropping does the same without
    /// saying how it went.
    ///
    /// # Errors
    /// As any control verb: EBUSY while memory windows are bound to it, and then it is deregistered once they or their queue
    /// pairs were dropped. After another error the memory is never reused.
    pub fn deregister_now(mut self) -> Result<(), Error> {
        self.deregister()
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        let _ = self.deregister();
    }
}
