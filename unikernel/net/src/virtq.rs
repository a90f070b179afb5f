//! The driver's side of a split virtqueue (virtio 1.2, section 2.7) whose chains have one descriptor each.
//!
//! What the device says is checked against a copy that it cannot reach: a descriptor comes back once for each time that it was
//! offered, and no length is longer than what was offered.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU16, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
    Ordering::SeqCst, fence,
};

use virtio_spec::virtq::{Avail, AvailF, Desc, DescF, Used, UsedElem, UsedF};

/// Memory that the device reads and writes too: zero at first, aligned to a page, at its place for good.
pub trait Shared {
    /// The half-word at byte `at`, which is inside and aligned.
    fn u16_at(&self, at: usize) -> &AtomicU16;

    /// The word at byte `at`, which is inside and aligned.
    fn u32_at(&self, at: usize) -> &AtomicU32;

    /// The double word at byte `at`, which is inside and aligned.
    fn u64_at(&self, at: usize) -> &AtomicU64;

    /// Copies out, starting at byte `at`.
    fn read(&self, at: usize, to: &mut [u8]);

    /// Copies in, starting at byte `at`.
    fn write(&self, at: usize, from: &[u8]);

    /// Byte `at` as the device addresses it.
    fn address(&self, at: usize) -> u64;
}

/// The device broke the queue's rules; it is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken(pub &'static str);

// Offsets inside the rings, which `virtio_spec` has as unsized structs.
const IDX: usize = 2;
const RING: usize = 4;

/// Who reads a buffer and who writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device writes.
    In,
    /// The device reads.
    Out,
}

/// Where the three parts of a queue lie in its memory.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    size: u16,
    avail: usize,
    used: usize,
    end: usize,
}

impl Layout {
    /// Of a queue with `size` descriptors, a power of two.
    #[must_use]
    pub fn new(size: u16) -> Self {
        let avail = size_of::<Desc>() * usize::from(size);
        let used = (avail + Avail::layout(size, false).size()).next_multiple_of(64);
        let end = (used + Used::layout(size, false).size()).next_multiple_of(64);
        Self {
            size,
            avail,
            used,
            end,
        }
    }

    /// Descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// First byte after the rings: buffers may begin there.
    #[must_use]
    pub fn end(&self) -> usize {
        self.end
    }

    /// Offsets of descriptors, available ring and used ring.
    #[must_use]
    pub fn parts(&self) -> [usize; 3] {
        [0, self.avail, self.used]
    }
}

/// A queue at the beginning of its memory.
#[derive(Debug)]
pub struct Queue<M> {
    mem: M,
    at: Layout,
    /// Chains ever offered; what of them is published; chains ever taken back.
    offered: u16,
    published: u16,
    taken: u16,
    /// Length of each descriptor that the device has.
    lent: Vec<Option<u32>>,
}

impl<M: Shared> Queue<M> {
    /// Over zeroed memory of at least `Layout::new(size).end()` bytes. The device need not interrupt.
    ///
    /// # Panics
    /// When `size` is no power of two up to 2^15.
    pub fn new(mem: M, size: u16) -> Self {
        assert!(
            size.is_power_of_two(),
            "a virtqueue's size is a power of two"
        );
        let queue = Self {
            mem,
            at: Layout::new(size),
            offered: 0,
            published: 0,
            taken: 0,
            lent: vec![None; usize::from(size)],
        };
        queue.interrupts(false);
        queue
    }

    /// Its memory.
    pub fn memory(&self) -> &M {
        &self.mem
    }

    /// Its shape.
    pub fn layout(&self) -> &Layout {
        &self.at
    }

    /// Device addresses of descriptors, available ring and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        self.at.parts().map(|at| self.mem.address(at))
    }

    /// Whether the device has descriptor `id`.
    pub fn is_lent(&self, id: u16) -> bool {
        self.lent.get(usize::from(id)).is_some_and(Option::is_some)
    }

    /// Gives the device `len` bytes at byte `at` of the memory as descriptor `id`. It sees them after [`Queue::publish`].
    ///
    /// # Panics
    /// When the device has the descriptor already.
    pub fn offer(&mut self, id: u16, at: usize, len: u32, direction: Direction) {
        let lent = &mut self.lent[usize::from(id)];
        assert!(lent.is_none(), "descriptor {id} is the device's");
        *lent = Some(len);
        let flags = match direction {
            Direction::In => DescF::WRITE,
            Direction::Out => DescF::empty(),
        };
        let desc = usize::from(id) * size_of::<Desc>();
        let address = self.mem.address(at);
        self.mem.u64_at(desc).store(address.to_le(), Relaxed);
        let rest = u64::from(len) | u64::from(flags.bits().to_ne()) << 32;
        self.mem.u64_at(desc + 8).store(rest.to_le(), Relaxed);
        let slot = usize::from(self.offered % self.at.size);
        self.mem
            .u16_at(self.at.avail + RING + 2 * slot)
            .store(id.to_le(), Relaxed);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Lets the device see what was offered. True if it wants to be told.
    pub fn publish(&mut self) -> bool {
        if self.published == self.offered {
            return false;
        }
        self.published = self.offered;
        self.mem
            .u16_at(self.at.avail + IDX)
            .store(self.offered.to_le(), Release);
        // Between publishing the index and reading the device's flag (virtio 1.2, section 2.7.13.4.1).
        fence(SeqCst);
        let flags = u16::from_le(self.mem.u16_at(self.at.used).load(Relaxed));
        flags & UsedF::NO_NOTIFY.bits().to_ne() == 0
    }

    /// Whether the device is done with a buffer.
    pub fn has_used(&self) -> bool {
        u16::from_le(self.mem.u16_at(self.at.used + IDX).load(Acquire)) != self.taken
    }

    /// The next buffer that the device is done with: its descriptor, and the bytes written.
    ///
    /// # Errors
    /// When the device names a descriptor that it does not have, or more bytes than there are.
    pub fn take(&mut self) -> Result<Option<(u16, u32)>, Broken> {
        if !self.has_used() {
            return Ok(None);
        }
        let slot = usize::from(self.taken % self.at.size);
        let elem = self.at.used + RING + size_of::<UsedElem>() * slot;
        let id = u32::from_le(self.mem.u32_at(elem).load(Relaxed));
        let len = u32::from_le(self.mem.u32_at(elem + 4).load(Relaxed));
        let lent = self
            .lent
            .get_mut(id as usize)
            .and_then(Option::take)
            .ok_or(Broken("it returned a buffer that it did not have"))?;
        if len > lent {
            return Err(Broken("it wrote more than a buffer holds"));
        }
        self.taken = self.taken.wrapping_add(1);
        // In range, because `lent` has no more than 2^15 entries.
        Ok(Some((id as u16, len)))
    }

    /// Asks for interrupts or not. True if the device was done with a buffer before it could see the request: then none will
    /// come for that.
    pub fn interrupts(&self, wanted: bool) -> bool {
        let flags = if wanted {
            AvailF::empty()
        } else {
            AvailF::NO_INTERRUPT
        };
        self.mem
            .u16_at(self.at.avail)
            .store(flags.bits().to_ne().to_le(), Relaxed);
        fence(SeqCst);
        self.has_used()
    }
}
