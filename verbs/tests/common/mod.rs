//! A host for tests, in one thread: it serves the control queue when kicked and works on the rings at every
//! turn of a wait loop. It reads and writes shared memory on its own, by what `hyv_abi` says, so that it does not
//! share the library's mistakes.
#![allow(
    unsafe_code,
    reason = "plays the device, in memory that it shares with the library"
)]
#![allow(dead_code, reason = "each test file uses its part")]

mod cm;
mod control;
mod engine;

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use hyv_abi::ABI_VERSION;
use hyv_abi::control::{CmEvent, CreateAh, CreateCq, CreateQp, CreateSrq, Opcode, QpAttr, RegMr};
use hyv_abi::types::{Errno, Reason};
use hyv_abi::window::{KICK_CONTROL, MAGIC, WINDOW_LEN, Window};
use hyv_verbs::{Context, HostGone, Platform};

pub use engine::Fault;

const RAM_LEN: usize = 32 << 20;
const PAGE: usize = 2 << 20;

/// A queue pair as the device sees it.
pub struct Qp {
    pub request: CreateQp,
    pub qpn: u32,
    pub attr: QpAttr,
    pub sq_head: u32,
    pub rq_head: u32,
    /// A receive that a message has begun to fill.
    pub held: Option<engine::Taken>,
}

/// A shared receive queue as the device sees it.
pub struct Srq {
    pub request: CreateSrq,
    pub head: u32,
    pub limit: u32,
    /// Taken by queue pairs that went in the middle of a message.
    pub returned: std::collections::VecDeque<engine::Taken>,
}

/// A memory window as the device sees it.
pub struct Mw {
    pub pd: u32,
    pub rkey: u32,
    pub bound: Option<Bound>,
}

/// What a window covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bound {
    pub mr: u32,
    pub addr: u64,
    pub len: u64,
    pub access: u32,
}

/// A completion queue as the device sees it.
pub struct Cq {
    pub request: CreateCq,
    pub tail: u32,
    pub overrun: bool,
}

/// What the host knows.
#[derive(Default)]
pub struct Device {
    pub next_handle: u32,
    pub pds: BTreeMap<u32, ()>,
    pub mrs: BTreeMap<u32, RegMr>,
    pub cqs: BTreeMap<u32, Cq>,
    pub qps: BTreeMap<u32, Qp>,
    pub srqs: BTreeMap<u32, Srq>,
    pub ahs: BTreeMap<u32, CreateAh>,
    pub mws: BTreeMap<u32, Mw>,
    /// By MR: its keys were changed so often.
    pub rereg: HashMap<u32, u32>,
    pub ids: BTreeMap<u32, cm::Id>,
    pub events: VecDeque<CmEvent>,
    /// Verbs in the order they came, for the drop order.
    pub log: Vec<Opcode>,
    /// The next call of a verb fails so.
    pub refuse: HashMap<u16, (Errno, Reason)>,
    /// What is wrong with the next answers.
    pub fault: Fault,
    pub next_avail: u16,
    pub posts_seen: u64,
    pub completions: u64,
}

/// What the fake memory knows.
#[derive(Default)]
struct Heap {
    next: usize,
    free: Vec<(usize, Layout)>,
    live: BTreeMap<usize, Layout>,
}

pub struct FakeHost {
    window: NonNull<u8>,
    ram: NonNull<u8>,
    heap: Mutex<Heap>,
    device: Mutex<Device>,
    clock: AtomicU64,
    wakes: AtomicU64,
    pub kicks: [AtomicU64; 2],
    pub gone: AtomicBool,
    /// The device does nothing unless `step` is called.
    pub manual: AtomicBool,
    /// Small payload goes into completions, as the ABI allows.
    pub data_in_cqe: AtomicBool,
}

// SAFETY: the memory belongs to no thread; everything else is guarded.
unsafe impl Send for FakeHost {}
// SAFETY: as above.
unsafe impl Sync for FakeHost {}

fn map(len: usize) -> NonNull<u8> {
    let layout = Layout::from_size_align(len, PAGE).unwrap();
    // SAFETY: not of no bytes.
    NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory for a test")
}

impl FakeHost {
    pub fn new() -> Arc<Self> {
        let host = Self {
            window: map(WINDOW_LEN),
            ram: map(RAM_LEN),
            heap: Mutex::default(),
            device: Mutex::default(),
            clock: AtomicU64::new(1),
            wakes: AtomicU64::new(0),
            kicks: Default::default(),
            gone: AtomicBool::new(false),
            manual: AtomicBool::new(false),
            data_in_cqe: AtomicBool::new(true),
        };
        host.device().next_handle = 1;
        let header = &host.window().header;
        header.version.store(ABI_VERSION, Ordering::Relaxed);
        header.generation.store(7, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Arc::new(host)
    }

    /// A host and a context on it.
    pub fn open() -> (Arc<Self>, Context) {
        let host = Self::new();
        let context = Context::open(host.clone()).unwrap();
        (host, context)
    }

    pub fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap()
    }

    /// Allocations that were not given back.
    pub fn live_allocations(&self) -> usize {
        self.heap.lock().unwrap().live.len()
    }

    pub fn load(&self, offset: u64) -> u64 {
        assert!(
            offset.is_multiple_of(8) && offset + 8 <= RAM_LEN as u64,
            "offset {offset:#x}"
        );
        // SAFETY: inside and aligned (checked); the library uses these words atomically too.
        unsafe { AtomicU64::from_ptr(self.ram.add(offset as usize).as_ptr().cast()) }
            .load(Ordering::Acquire)
    }

    pub fn store(&self, offset: u64, value: u64) {
        assert!(
            offset.is_multiple_of(8) && offset + 8 <= RAM_LEN as u64,
            "offset {offset:#x}"
        );
        // SAFETY: as in `load`.
        unsafe { AtomicU64::from_ptr(self.ram.add(offset as usize).as_ptr().cast()) }
            .store(value, Ordering::Release);
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        assert!(offset as usize + len <= RAM_LEN);
        // SAFETY: inside (checked); tests are one thread.
        unsafe { std::slice::from_raw_parts(self.ram.add(offset as usize).as_ptr(), len) }.to_vec()
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= RAM_LEN);
        // SAFETY: inside (checked); tests are one thread.
        unsafe {
            self.ram
                .add(offset as usize)
                .copy_from(NonNull::from(bytes).cast(), bytes.len());
        }
    }

    /// RAM offset of a registered address.
    pub fn offset_of(&self, addr: u64) -> u64 {
        addr - self.ram.as_ptr().addr() as u64
    }

    /// A message begins to fill the next receive of a queue pair.
    pub fn begin_message(&self, qpn: u32) {
        engine::begin_message(self, qpn);
    }

    /// And ends.
    pub fn end_message(&self, qpn: u32, data: &[u8]) {
        engine::end_message(self, qpn, data);
    }

    /// One turn of the device.
    pub fn step(&self) {
        engine::turn(self);
    }

    fn wake(&self) {
        self.wakes.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for FakeHost {
    fn drop(&mut self) {
        for (ptr, len) in [(self.window, WINDOW_LEN), (self.ram, RAM_LEN)] {
            // SAFETY: allocated in `map` with this layout; nobody holds the host any more.
            unsafe { dealloc(ptr.as_ptr(), Layout::from_size_align(len, PAGE).unwrap()) }
        }
    }
}

// SAFETY: window and RAM live as long as the host; `alloc_dma` gives each piece to one caller and zeroes it.
unsafe impl Platform for FakeHost {
    fn window(&self) -> &Window {
        // SAFETY: `WINDOW_LEN` bytes on a 2 MiB boundary, all atomics.
        unsafe { self.window.cast().as_ref() }
    }

    fn ram_offset(&self, ptr: *const u8, len: usize) -> Option<u64> {
        let offset = ptr.addr().checked_sub(self.ram.addr().get())?;
        (offset.checked_add(len)? <= RAM_LEN).then_some(offset as u64)
    }

    fn alloc_dma(&self, layout: Layout) -> Option<NonNull<u8>> {
        let mut heap = self.heap.lock().unwrap();
        let at = match heap.free.iter().position(|(_, l)| *l == layout) {
            Some(i) => heap.free.swap_remove(i).0,
            None => {
                let at = heap.next.next_multiple_of(layout.align());
                if at + layout.size() > RAM_LEN {
                    return None;
                }
                heap.next = at + layout.size();
                at
            }
        };
        heap.live.insert(at, layout);
        // SAFETY: inside, and nobody else's.
        unsafe {
            let ptr = self.ram.add(at);
            ptr.write_bytes(0, layout.size());
            Some(ptr)
        }
    }

    unsafe fn free_dma(&self, ptr: NonNull<u8>, layout: Layout) {
        let at = ptr.addr().get() - self.ram.addr().get();
        let mut heap = self.heap.lock().unwrap();
        assert_eq!(
            heap.live.remove(&at),
            Some(layout),
            "freed twice, or with another layout"
        );
        // Whoever uses it after this sees garbage.
        // SAFETY: the caller does not use it any more.
        unsafe { ptr.write_bytes(0xdd, layout.size()) };
        heap.free.push((at, layout));
    }

    fn kick(&self, vector: u32) {
        self.kicks[vector as usize].fetch_add(1, Ordering::SeqCst);
        if vector == KICK_CONTROL {
            control::serve(self);
        }
    }

    fn relax(&self) -> Result<(), HostGone> {
        if self.gone.load(Ordering::SeqCst) {
            return Err(HostGone);
        }
        self.clock.fetch_add(1_000, Ordering::SeqCst);
        if !self.manual.load(Ordering::SeqCst) {
            self.step();
        }
        Ok(())
    }

    fn wake_seen(&self) -> u64 {
        self.wakes.load(Ordering::SeqCst)
    }

    fn wait(&self, seen: u64, timeout_ns: Option<u64>) -> Result<(), HostGone> {
        if self.wakes.load(Ordering::SeqCst) == seen {
            self.relax()?;
            self.clock
                .fetch_add(timeout_ns.unwrap_or(0), Ordering::SeqCst);
        }
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        self.clock.load(Ordering::SeqCst)
    }
}

impl FakeHost {
    /// Says whether the engine must be kicked.
    pub fn window_need_wakeup(&self, value: u32) {
        self.window()
            .doorbells
            .need_wakeup
            .store(value, Ordering::SeqCst);
    }

    /// Whether a doorbell rang since the last step.
    pub fn doorbell_pending(&self) -> bool {
        self.window().doorbells.pending()
    }
}
