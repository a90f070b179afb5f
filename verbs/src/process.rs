//! The platform of a native Linux process: a guest without a VM. Window and RAM are sealed memory files that
//! hyv-host makes and passes over a unix socket, with eventfds for kicks and wakes.
#![allow(
    unsafe_code,
    reason = "maps the window and the RAM, and allocates from it"
)]

use std::alloc::Layout;
use std::boxed::Box;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::string::String;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::vec::Vec;

use hyv_abi::ABI_VERSION;
use hyv_abi::session::{HELLO_MAGIC, Hello, NUM_FDS, SOCKET_NAME, Welcome};
use hyv_abi::types::{Errno, Reason, VerbError};
use hyv_abi::window::{MAGIC, WINDOW_LEN, Window};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::SealFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};
use talc::base::Talc;
use talc::source::Manual;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::clock::Clock;
use crate::limits::{GREETING_MS, HUGE, MIN_RAM, PULSE_LIMIT_NS, PULSE_TURNS, YIELD_TURNS};
use crate::platform::{HostGone, Platform};

/// Why a process could not become a user of hyv-host.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConnectError {
    /// There is no socket, or nobody listens on it.
    NotRunning {
        /// The socket.
        socket: PathBuf,
    },
    /// The socket belongs to somebody else.
    Permission {
        /// The socket.
        socket: PathBuf,
    },
    /// The system refused something.
    System {
        /// What was tried.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The host is of another ABI version.
    Version {
        /// The host's.
        host: u32,
    },
    /// The host refused the session.
    Refused(VerbError),
    /// The host answered something else than a greeting.
    Protocol(&'static str),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRunning { socket } => {
                write!(
                    f,
                    "no appliance is running at {}: start one with ./run.sh kvstore",
                    socket.display()
                )
            }
            Self::Permission { socket } => write!(
                f,
                "no permission to use {}: only the user who started the appliance (and root) may connect",
                socket.display()
            ),
            Self::System { what, source } => write!(f, "cannot {what}: {source}"),
            Self::Version { host } => write!(
                f,
                "hyv-host speaks ABI version {host}, this program version {ABI_VERSION}: rebuild both from one source"
            ),
            Self::Refused(e) => write!(f, "hyv-host refused the session: {e}"),
            Self::Protocol(what) => write!(f, "hyv-host broke the protocol: {what}"),
        }
    }
}

impl std::error::Error for ConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::System { source, .. } => Some(source),
            Self::Refused(e) => Some(e),
            _ => None,
        }
    }
}

fn system(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> ConnectError {
    move |e| ConnectError::System {
        what,
        source: e.into(),
    }
}

/// A shared mapping of a whole memory file, on a 2 MiB boundary.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
    reserved: NonNull<u8>,
    reserved_len: usize,
}

// SAFETY: plain memory that belongs to no thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; it gives out an address only.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: &OwnedFd, len: usize) -> Result<Self, ConnectError> {
        let seals =
            rustix::fs::fcntl_get_seals(fd).map_err(system("read the seals of shared memory"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(ConnectError::Protocol(
                "shared memory is not sealed against shrinking",
            ));
        }
        let size = rustix::fs::fstat(fd)
            .map_err(system("look at shared memory"))?
            .st_size;
        if u64::try_from(size).unwrap_or(0) < len as u64 {
            return Err(ConnectError::Protocol(
                "shared memory is shorter than announced",
            ));
        }
        let map = system("map shared memory (see `ulimit -v`)");
        let reserved_len = len
            .checked_add(HUGE)
            .ok_or(ConnectError::Protocol("shared memory is too large"))?;
        // SAFETY: asks for new address space, wherever the kernel likes.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                reserved_len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let reserved = match reserved.map(|p| NonNull::new(p.cast::<u8>())) {
            Ok(Some(p)) => p,
            Ok(None) => return Err(map(rustix::io::Errno::NOMEM)),
            Err(e) => return Err(map(e)),
        };
        let skip = reserved.as_ptr().align_offset(HUGE);
        // SAFETY: `skip` is less than `HUGE`, by which the reservation is longer than `len`.
        let base = unsafe { reserved.add(skip) };
        // Made first, so that the reservation goes if mapping over it fails.
        let mapping = Self {
            base,
            len,
            reserved,
            reserved_len,
        };
        // SAFETY: replaces a part of the reservation above, which nothing else knows of; the seal checked above keeps
        // the file from shrinking under the mapping.
        unsafe {
            rustix::mm::mmap(
                base.as_ptr().cast(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                0,
            )
        }
        .map_err(map)?;
        // SAFETY: advice on our own mapping changes no contents. Refusal changes nothing.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, Advice::LinuxHugepage) };
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole reservation is ours; nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.reserved.as_ptr().cast(), self.reserved_len) };
    }
}

/// Who sleeps on the wake eventfd: one thread, the others wait for it to tell.
#[derive(Default)]
struct Sleepers {
    leader: bool,
}

/// A native process as a user of hyv-host; a [`Platform`].
pub struct Process {
    socket: OwnedFd,
    kicks: [OwnedFd; 2],
    wake: OwnedFd,
    window: Mapping,
    ram: Mapping,
    heap: Mutex<Talc<Manual, talc::DefaultBinning>>,
    clock: Clock,
    wakes: AtomicU64,
    sleepers: Mutex<Sleepers>,
    told: Condvar,
    turns: AtomicU32,
    gone: AtomicBool,
    /// The host's last pulse seen, and when it changed (ns by `clock`).
    pulse: AtomicU64,
    pulse_at: AtomicU64,
}

// SAFETY: the heap's pointers are into `ram`, which moves with it, and a mutex guards them.
unsafe impl Send for Process {}
// SAFETY: as above; everything else is atomic or made for sharing.
unsafe impl Sync for Process {}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("ram_len", &self.ram.len)
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they guard is consistent at every step that can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// Becomes a user of the hyv-host at `path` (its runtime folder, or the socket itself) with at least `ram_len`
    /// bytes of RAM. `name` (32 bytes of it) is for the host's log.
    ///
    /// # Errors
    /// [`ConnectError`]: nobody is there, no permission, another version, or a quota of the host.
    pub fn connect(path: &Path, ram_len: u64, name: &str) -> Result<Arc<Self>, ConnectError> {
        let path = if path.is_dir() {
            path.join(SOCKET_NAME)
        } else {
            path.to_path_buf()
        };
        let socket = open_socket(&path)?;
        let mut hello = Hello::new_zeroed();
        (hello.magic, hello.version, hello.ram_len) =
            (HELLO_MAGIC, ABI_VERSION, ram_len.max(MIN_RAM));
        let end = name
            .char_indices()
            .map(|(i, c)| i + c.len_utf8())
            .take_while(|e| *e <= hello.name.len())
            .last();
        let end = end.unwrap_or(0);
        hello.name[..end].copy_from_slice(&name.as_bytes()[..end]);
        rustix::io::retry_on_intr(|| {
            rustix::net::send(&socket, hello.as_bytes(), SendFlags::NOSIGNAL)
        })
        .map_err(system("greet hyv-host"))?;
        let (welcome, fds) = receive(&socket)?;
        if welcome.magic != HELLO_MAGIC {
            return Err(ConnectError::Protocol(
                "it answered with another magic number",
            ));
        }
        if welcome.version != ABI_VERSION {
            return Err(ConnectError::Version {
                host: welcome.version,
            });
        }
        if welcome.status != 0 {
            let (errno, reason) = (
                Errno::from_u32(welcome.status),
                Reason::from_u32(welcome.reason),
            );
            return Err(ConnectError::Refused(VerbError::new(errno, reason)));
        }
        let fds: [OwnedFd; NUM_FDS] = Vec::into_boxed_slice(fds)
            .try_into()
            .map(|b: Box<[OwnedFd; NUM_FDS]>| *b)
            .map_err(|_| ConnectError::Protocol("it passed another number of file descriptors"))?;
        Self::new(socket, fds, welcome.ram_len)
    }

    fn new(
        socket: OwnedFd,
        fds: [OwnedFd; NUM_FDS],
        ram_len: u64,
    ) -> Result<Arc<Self>, ConnectError> {
        let [window, ram, kick_control, kick_data, wake] = fds;
        let ram_len =
            usize::try_from(ram_len).map_err(|_| ConnectError::Protocol("RAM is too large"))?;
        if (ram_len as u64) < MIN_RAM {
            return Err(ConnectError::Protocol(
                "it gave less RAM than any process gets",
            ));
        }
        let window = Mapping::new(&window, WINDOW_LEN)?;
        let ram = Mapping::new(&ram, ram_len)?;
        let mut heap = Talc::new(Manual);
        // SAFETY: the RAM is mapped as long as the heap lives and nothing else here uses it. The host writes
        // only to what was handed to it from allocations.
        if unsafe { heap.claim(ram.base.as_ptr(), ram.len) }.is_none() {
            return Err(ConnectError::Protocol("it gave too little RAM"));
        }
        let mut process = Self {
            socket,
            kicks: [kick_control, kick_data],
            wake,
            window,
            ram,
            heap: Mutex::new(heap),
            clock: Clock::start(0),
            wakes: AtomicU64::new(0),
            sleepers: Mutex::default(),
            told: Condvar::new(),
            turns: AtomicU32::new(0),
            gone: AtomicBool::new(false),
            pulse: AtomicU64::new(0),
            pulse_at: AtomicU64::new(0),
        };
        if process.window().header.magic.load(Ordering::Acquire) != MAGIC {
            return Err(ConnectError::Protocol("its window is not set up"));
        }
        process.clock = Clock::start(process.window().header.tsc_hz.load(Ordering::Relaxed));
        for fd in process.kicks.iter().chain([&process.wake]) {
            rustix::io::ioctl_fionbio(fd, true).map_err(system("use an eventfd"))?;
        }
        Ok(Arc::new(process))
    }

    /// Bytes of RAM that the host gave.
    #[must_use]
    pub fn ram_len(&self) -> usize {
        self.ram.len
    }

    /// Whether the host lives: its end of the socket is open, and its pulse beats.
    fn look_at_host(&self) -> Result<(), HostGone> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0) {
            self.gone.store(true, Ordering::Relaxed);
            return Err(HostGone);
        }
        let beat = self.window().header.host_beat.load(Ordering::Relaxed);
        let now = self.now_ns();
        if self.pulse.swap(beat, Ordering::Relaxed) != beat
            || self.pulse_at.load(Ordering::Relaxed) == 0
        {
            self.pulse_at.store(now.max(1), Ordering::Relaxed);
        } else if now.saturating_sub(self.pulse_at.load(Ordering::Relaxed)) > PULSE_LIMIT_NS {
            self.gone.store(true, Ordering::Relaxed);
            return Err(HostGone);
        }
        Ok(())
    }

    /// Sleeps on the wake eventfd; whether it was rung.
    fn sleep(&self, timeout: Option<Duration>) -> Result<bool, HostGone> {
        let mut fds = [
            PollFd::new(&self.wake, PollFlags::IN),
            PollFd::new(&self.socket, PollFlags::RDHUP),
        ];
        let timeout = timeout.map(|t| Timespec {
            tv_sec: t.as_secs() as i64,
            tv_nsec: i64::from(t.subsec_nanos()),
        });
        // Interrupted by a signal: a spurious wake-up.
        if rustix::event::poll(&mut fds, timeout.as_ref()).is_err() {
            return Ok(false);
        }
        if !fds[1].revents().is_empty() {
            self.gone.store(true, Ordering::Relaxed);
            return Err(HostGone);
        }
        if fds[0].revents().is_empty() {
            return Ok(false);
        }
        let mut count = [0; 8];
        Ok(rustix::io::read(&self.wake, &mut count).is_ok())
    }
}

fn open_socket(path: &Path) -> Result<OwnedFd, ConnectError> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(system("make a unix socket"))?;
    let address = SocketAddrUnix::new(path).map_err(system("use this path for a socket"))?;
    use rustix::io::Errno as E;
    rustix::net::connect(&socket, &address).map_err(|e| match e {
        E::NOENT | E::CONNREFUSED | E::NOTDIR => ConnectError::NotRunning {
            socket: path.to_path_buf(),
        },
        E::ACCESS | E::PERM => ConnectError::Permission {
            socket: path.to_path_buf(),
        },
        e => system("connect to hyv-host")(e),
    })?;
    let limit = Some(Duration::from_millis(GREETING_MS));
    rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, limit)
        .map_err(system("set a time limit"))?;
    Ok(socket)
}

fn receive(socket: &OwnedFd) -> Result<(Welcome, Vec<OwnedFd>), ConnectError> {
    let mut bytes = [0; size_of::<Welcome>() + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(NUM_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut io = [io::IoSliceMut::new(&mut bytes)];
    // A socket with a time limit is interrupted even by a stop and its continuation (Ctrl-Z and fg, a debugger).
    let got = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut io, &mut control, RecvFlags::CMSG_CLOEXEC)
    })
    .map_err(|e| match e {
        rustix::io::Errno::AGAIN => {
            ConnectError::Protocol("it did not answer in time; see its log")
        }
        rustix::io::Errno::CONNRESET => {
            ConnectError::Protocol("it closed the session; see its log")
        }
        e => system("receive hyv-host's answer")(e),
    })?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.bytes == 0 {
        return Err(ConnectError::Protocol("it closed the session; see its log"));
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(ConnectError::Protocol(
            "file descriptors were lost on the way (see `ulimit -n`)",
        ));
    }
    let welcome = Welcome::read_from_bytes(bytes.get(..got.bytes).unwrap_or_default())
        .map_err(|_| ConnectError::Protocol("its answer has another length"))?;
    Ok((welcome, fds))
}

// SAFETY: window and RAM are mappings of sealed files that stay where they are until the process's last `Arc` is
// dropped; `alloc_dma` gives exclusive, zeroed pieces of the RAM, and `ram_offset` is the distance from its start.
unsafe impl Platform for Process {
    #[inline]
    fn window(&self) -> &Window {
        // SAFETY: mapped, `WINDOW_LEN` long, on a 2 MiB boundary; all atomics.
        unsafe { self.window.base.cast().as_ref() }
    }

    fn ram_offset(&self, ptr: *const u8, len: usize) -> Option<u64> {
        let offset = ptr.addr().checked_sub(self.ram.base.addr().get())?;
        (offset.checked_add(len)? <= self.ram.len).then_some(offset as u64)
    }

    fn alloc_dma(&self, layout: Layout) -> Option<NonNull<u8>> {
        if layout.size() == 0 {
            return None;
        }
        // SAFETY: not of no bytes.
        let ptr = unsafe { lock(&self.heap).allocate(layout) }?;
        // SAFETY: just allocated, so ours alone.
        unsafe { ptr.write_bytes(0, layout.size()) };
        Some(ptr)
    }

    unsafe fn free_dma(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: allocated above with this layout and not used any more, as the caller vouches.
        unsafe { lock(&self.heap).deallocate(ptr.as_ptr(), layout) }
    }

    fn kick(&self, vector: u32) {
        if let Some(fd) = self.kicks.get(vector as usize) {
            // Fails only when the counter is full, and then the host has been kicked.
            let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
    }

    #[inline]
    fn relax(&self) -> Result<(), HostGone> {
        std::hint::spin_loop();
        // Threads may overwrite each other's counts: it says only about when to look.
        let turns = self.turns.load(Ordering::Relaxed).wrapping_add(1);
        self.turns.store(turns, Ordering::Relaxed);
        if turns.is_multiple_of(YIELD_TURNS) {
            if self.gone.load(Ordering::Relaxed) {
                return Err(HostGone);
            }
            if self.window().header.spin_hint.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            if turns.is_multiple_of(PULSE_TURNS) {
                return self.look_at_host();
            }
        }
        Ok(())
    }

    fn wake_seen(&self) -> u64 {
        self.wakes.load(Ordering::Acquire)
    }

    fn wait(&self, seen: u64, timeout_ns: Option<u64>) -> Result<(), HostGone> {
        let timeout = timeout_ns.map(Duration::from_nanos);
        let mut sleepers = lock(&self.sleepers);
        if self.wakes.load(Ordering::Acquire) != seen {
            return Ok(());
        }
        if sleepers.leader {
            // The leader tells when it wakes, for whatever reason; one of us is the next leader then.
            let told = self
                .told
                .wait_timeout(sleepers, timeout.unwrap_or(Duration::from_secs(1)));
            drop(told);
            return if self.gone.load(Ordering::Relaxed) {
                Err(HostGone)
            } else {
                Ok(())
            };
        }
        sleepers.leader = true;
        drop(sleepers);
        let rung = self.sleep(timeout);
        let mut sleepers = lock(&self.sleepers);
        sleepers.leader = false;
        if rung == Ok(true) {
            self.wakes.fetch_add(1, Ordering::AcqRel);
        }
        drop(sleepers);
        self.told.notify_all();
        rung?;
        self.look_at_host()
    }

    #[inline]
    fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }
}

impl AsFd for Process {
    /// The wake eventfd, for programs with an event loop of their own: readable when an event may be pending.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// The default name of a process for the host's log: its program's.
#[must_use]
pub fn program_name() -> String {
    let path = std::env::current_exe().ok();
    let name = path.as_deref().and_then(Path::file_name);
    name.map_or_else(
        || String::from("process"),
        |n| n.to_string_lossy().into_owned(),
    )
}
